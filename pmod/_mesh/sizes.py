"""The sizes of a mesh's axes: what is accepted, and how -1 is filled in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from pmod._errors import AxisError, phrase, quoted
from pmod._numbers import as_int
from pmod._ranks.topology import MOST_RANKS


def check_names(names: Iterable[object], function: str) -> None:
    """Names of axes are non-empty strings, each its own."""
    seen: set[object] = set()
    for name in names:
        if not isinstance(name, str) or not name:
            raise AxisError(
                phrase(
                    function,
                    f"{quoted(name)} is no axis name",
                    "Name axes with non-empty strings.",
                )
            )
        if name in seen:
            raise AxisError(
                phrase(
                    function,
                    f"two axes are called {quoted(name)}",
                    "Give each axis its own name.",
                )
            )
        seen.add(name)


def fill_in(
    sizes: Mapping[str, int], total: int, function: str, have: str
) -> dict[str, int]:
    """The sizes with -1 replaced; they must multiply to `total`."""
    check_names(sizes, function)
    parsed: dict[str, int] = {}
    for name, given in sizes.items():
        size = as_int(given)
        if size is None or (size < 1 and size != -1):
            raise AxisError(
                phrase(
                    function,
                    f"{name}={quoted(given)} is no size",
                    "Sizes are ints of 1 or more; one may be -1.",
                )
            )
        parsed[name] = size
    sizes = parsed
    asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
    known = math.prod(size for size in sizes.values() if size != -1)
    open_ = [name for name, size in sizes.items() if size == -1]
    if len(open_) > 1:
        raise AxisError(
            phrase(
                function,
                f"{asked}: two sizes are -1",
                "Leave one size to be worked out.",
            )
        )
    if open_ and total % known == 0:
        return {
            name: total // known if size == -1 else size for name, size in sizes.items()
        }
    if known != total or open_:
        what = f"{asked} need{' a multiple of' if open_ else ''} {known} rank{'s' if known != 1 else ''}, but {have}"
        raise AxisError(
            phrase(
                function,
                what,
                f"Make the sizes multiply to {total}; -1 stands for the rest.",
            )
        )
    return dict(sizes)


def check_axis_sizes(
    sizes: Mapping[str, int], function: str, example: str
) -> dict[str, int]:
    """The sizes; there are axes, and their sizes are known."""
    if not sizes:
        raise AxisError(
            phrase(function, "no axis size is given", f"Name the axes: {example}.")
        )
    parsed: dict[str, int] = {}
    for name, given in sizes.items():
        size = as_int(given)
        if size is None or size < 1:
            raise AxisError(
                phrase(
                    function,
                    f"{name}={quoted(given)} is no size",
                    "Sizes are ints of 1 or more.",
                )
            )
        parsed[name] = size
    if math.prod(parsed.values()) > MOST_RANKS:
        given = f"{', '.join(f'{name}={size}' for name, size in parsed.items())} are too many ranks"
        raise AxisError(phrase(function, given, f"There are at most {MOST_RANKS}."))
    return parsed
