"""The sizes of a mesh's axes: what is accepted, how -1 is filled in, how to count.

Places along several axes are counted with the last axis fastest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from pmod._errors import AxisError, phrase, quoted
from pmod._numbers import as_int
from pmod._ranks.topology import MOST_RANKS


def shown_sizes(sizes: Mapping[str, int]) -> str:
    """Return ``data=2, model=2``, as messages and pictures write it."""
    return ", ".join([f"{name}={size}" for name, size in sizes.items()])


def parse_sizes(text: str) -> dict[str, int]:
    """Return ``data=2,model=2`` as a dict; spaces may stand in place of commas.

    Raises: ValueError where a part is not an axis, or an axis is given twice. Whether a
    number is a size, and which names there are, is for the caller to say.
    """
    sizes: dict[str, int] = {}
    for part in text.replace(",", " ").split() or [""]:
        name, _, size = part.partition("=")
        if not name or not size.removeprefix("-").isdecimal():
            raise ValueError(f"{part!r} is not an axis")
        # where axes are keywords, it is taken for the deadline
        if name == "timeout":
            raise ValueError(f"{part!r} is a deadline in seconds, not an axis")
        if name in sizes:
            raise ValueError(f"axis {name!r} is given twice")
        sizes[name] = int(size)
    return sizes


def number_of(coords: Sequence[int], sizes: Sequence[int]) -> int:
    """Return the number of the place with these coords, the last axis fastest."""
    number = 0
    for index, size in zip(coords, sizes, strict=True):
        number = number * size + index
    return number


def coords_at(number: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the coords of the place with this number, the last axis fastest."""
    coords: list[int] = []
    for size in reversed(sizes):
        number, index = divmod(number, size)
        coords.append(index)
    return tuple(reversed(coords))


def named_coords_at(number: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the same, by the names of the axes."""
    return dict(zip(sizes, coords_at(number, list(sizes.values())), strict=True))


def check_names(names: Iterable[object], function: str) -> None:
    """Raise unless the names of axes are non-empty strings, each its own."""
    seen: set[object] = set()
    for name in names:
        if not isinstance(name, str) or not name:
            raise AxisError(
                phrase(
                    function,
                    f"{quoted(name)} is not an axis name",
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


def as_size(name: str, given: object, function: str, right: str) -> int:
    """Return the size that was given for an axis, an int of 1 or more.

    right: what the error says would be right.
    """
    size = as_int(given)
    if size is None or size < 1:
        raise AxisError(
            phrase(function, f"{name}={quoted(given)} is not a size", right)
        )
    return size


def fill_in(
    sizes: Mapping[str, int], total: int, function: str, have: str
) -> dict[str, int]:
    """Return the sizes with -1 replaced; they must multiply to `total`."""
    check_names(sizes, function)
    right = "Sizes are ints of 1 or more; one may be -1."
    filled: dict[str, int] = {}
    unknown: list[str] = []
    for name, given in sizes.items():
        if as_int(given) == -1:
            unknown.append(name)
            # it keeps the place among the axes, and leaves the product as it is
            given = 1
        filled[name] = as_size(name, given, function, right)
    asked = shown_sizes({**filled, **dict.fromkeys(unknown, -1)})
    if len(unknown) > 1:
        raise AxisError(
            phrase(
                function,
                f"{asked}: two sizes are -1",
                "Leave one size to be worked out.",
            )
        )
    known = math.prod(filled.values())
    if unknown:
        filled[unknown[0]] = total // known
    if math.prod(filled.values()) == total:
        return filled
    needed = "1 rank" if known == 1 else f"{known} ranks"
    if unknown:
        needed = f"a multiple of {needed}"
    raise AxisError(
        phrase(
            function,
            f"{asked} need {needed}, but {have}",
            f"Make the sizes multiply to {total}; -1 stands for the rest.",
        )
    )


def check_axis_sizes(
    sizes: Mapping[str, int], function: str, example: str
) -> dict[str, int]:
    """Return the sizes as ints, or raise: there are axes, and no size is left open."""
    if not sizes:
        raise AxisError(
            phrase(function, "no axis size is given", f"Name the axes: {example}.")
        )
    right = "Sizes are ints of 1 or more."
    parsed: dict[str, int] = {}
    for name, given in sizes.items():
        parsed[name] = as_size(name, given, function, right)
    # Here no topology bounds the product, and numbers of ranks must fit 32 bits.
    if math.prod(parsed.values()) > MOST_RANKS:
        raise AxisError(
            phrase(
                function,
                f"{shown_sizes(parsed)} are too many ranks",
                f"There are at most {MOST_RANKS}.",
            )
        )
    return parsed
