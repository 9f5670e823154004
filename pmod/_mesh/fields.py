"""What may stand in the fields of a `Mesh`, for whoever calls the class by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from pmod._errors import ArgumentError, phrase, quoted
from pmod._mesh.factors import Factors, all_places
from pmod._numbers import as_int, as_ints, as_real
from pmod._ranks.topology import MOST_RANKS, Topology


def check_fields(
    axis_names: object,
    axes: object,
    offset: object,
    base: object,
    topology: object,
    timeout: object,
) -> None:
    """Raise where someone calls the class with what `make_mesh` would not pass it."""
    fields = {
        "axis_names": axis_names,
        "axes": axes,
        "offset": offset,
        "base": base,
        "topology": topology,
        "timeout": timeout,
    }
    fits = {
        "axis_names": _is_tuple_of(_is_text, axis_names),
        "axes": _is_tuple_of(_are_factors, axes),
        "offset": _is_offset(offset),
        "base": base is None or _are_ranks(base),
        "topology": isinstance(topology, Topology),
        "timeout": as_real(timeout) is not None,
    }
    wrong = [name for name, fit in fits.items() if not fit]
    if not wrong:
        # Only of fields that are right by themselves can it be asked whether they
        # belong together.
        names = cast(tuple[str, ...], axis_names)
        factors = cast(tuple[Factors, ...], axes)
        if len(factors) != len(names):
            wrong = ["axes"]
        elif base is not None and not _covers(base, cast(int, offset), factors):
            wrong = ["base"]
    if wrong:
        name = wrong[0]
        raise ArgumentError(
            phrase(
                "Mesh",
                f"{name} is {quoted(fields[name])}",
                "Make a mesh with pmod.make_mesh, or from another mesh.",
            )
        )


def _is_tuple_of(fits: Callable[[object], bool], value: object) -> bool:
    return type(value) is tuple and all(map(fits, cast(tuple[object, ...], value)))


def _is_text(name: object) -> bool:
    return type(name) is str


def _are_factors(axis: object) -> bool:
    return _is_tuple_of(_is_pair, axis)


def _is_pair(pair: object) -> bool:
    """Return whether it is a size and a stride."""
    # every mesh asks this once an axis, and its own factors are these
    if type(pair) is tuple:
        own = cast(tuple[object, ...], pair)
        if [type(number) for number in own] == [int, int]:
            return min(cast(tuple[int, int], own)) >= 1
    ints = as_ints(pair)
    if ints is None or len(ints) != 2:
        return False
    return min(ints) >= 1


def _is_offset(offset: object) -> bool:
    number = as_int(offset)
    return number is not None and 0 <= number <= MOST_RANKS


def _are_ranks(base: object) -> bool:
    return type(base) is tuple and as_ints(cast(object, base)) is not None


def _covers(base: object, offset: int, axes: tuple[Factors, ...]) -> bool:
    """Return whether the list of ranks is long enough for all places."""
    last = all_places(offset, axes).max(initial=0)
    return bool(last < len(cast(tuple[int, ...], base)))
