"""Which dims are cut, as a layer's caller says it, checked.

Every layer takes `axis`, `sizes`, and mostly `dim`. They become a `Cut` for each dim
that is cut, by dims that count from the end.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from pmod._collectives.cuts import Cut, axes_by_dim, by_dim, places_of, settled
from pmod._core.arguments import (
    LONGEST,
    as_int,
    as_list,
    check_flag,
    check_sizes,
    check_tensor,
    wrong,
)
from pmod._errors import ArgumentError, PmodError, ShapeError, near_miss, quoted
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import AxisLike

Ints: TypeAlias = int | Sequence[int]
Sizes: TypeAlias = Sequence[int] | Mapping[int, Sequence[int] | None]
Axes: TypeAlias = AxisLike | Mapping[int, AxisLike]

Wrong: TypeAlias = Callable[[str, str], PmodError]
"""The error for what is given, and what would be right."""

Check: TypeAlias = Callable[[int, int, Axis], None]
"""Raise unless a dim of the whole may be so long: the dim, its length, the axis."""


class Spread(NamedTuple):
    """How a tensor is cut, as the caller says it."""

    axis: Axes
    dim: int | None
    sizes: Sizes | None


class Held(NamedTuple):
    """A dim that is cut: its axis, and the length of each rank's shard.

    A dim that is whole on every rank has one shard.
    """

    axis: Axis
    sizes: tuple[int, ...]

    @property
    def place(self) -> int:
        """Which shard is this rank's."""
        return self.axis.index if len(self.sizes) > 1 else 0

    @property
    def start(self) -> int:
        """The row of the whole that this rank's first row is."""
        return sum(self.sizes[: self.place])

    @property
    def total(self) -> int:
        """The length of the whole."""
        return sum(self.sizes)


class Along(NamedTuple):
    """The dims that a layer works along, and what to say of another one."""

    dims: tuple[int, ...]
    kind: str
    right: str


def spatial(count: int, done: str) -> Along:
    """Return the last dims of a layer; what torch alone does with shards of a batch."""
    right = (
        f"Pass a dim from {-count} to -1; shards of a batch are {done} by torch alone."
    )
    return Along(tuple(range(-count, 0)), "a spatial one", right)


Bound: TypeAlias = list[tuple[int, Axis]]
"""The dims that are cut, each with its axis, as the caller counts them."""


def bound(function: str, spread: Spread, default: int) -> Bound:
    """Return the dims that are cut; `default` is that of one axis without a dim."""
    return axes_by_dim(function, spread.axis, spread.dim, default)


def cuts_told(function: str, spread: Spread, dims: Bound) -> list[Cut]:
    """Return the cuts, with the sizes that the caller told."""
    told = by_dim(function, spread.sizes, "sizes", spread.axis, dims)
    cuts: list[Cut] = []
    for (key, of), sizes in zip(dims, told, strict=True):
        held = None if sizes is None else check_sizes(sizes, function, of)
        # without a width: what a rank needs follows from its windows
        cuts.append(Cut(of, key, (0, 0), "zeros", held))
    return cuts


def no_check(at: int, rows: int, of: Axis) -> None:
    """Any length will do."""


def held_of(
    function: str,
    cuts: list[Cut],
    x: Tensor,
    along: Along,
    check: Check = no_check,
) -> dict[int, Held]:
    """Return the dims that are cut, counted from the end, with the sizes of all shards.

    What can be checked before sizes are exchanged is.
    """
    placed = [places[0] for places in places_of(function, cuts, [x])]
    # ranks may have named the dims in different orders, and must exchange in one
    by_place = dict(sorted(zip(placed, cuts, strict=True), key=lambda one: one[0]))
    for at, cut in by_place.items():
        if at not in along.dims:
            given = f"dim {cut.dim} is not {along.kind}"
            raise wrong(ShapeError, function, cut.axis, given, along.right)
        if cut.sizes is not None:
            check(at, sum(cut.sizes), cut.axis)
    for at in along.dims:
        if at not in by_place:
            check(at, x.shape[at], cuts[0].axis)
    known = settled(
        function, list(by_place.values()), [x], [[at] for at in by_place], False
    )
    out: dict[int, Held] = {}
    for at, cut in zip(by_place, known, strict=True):
        assert cut.sizes is not None
        check(at, sum(cut.sizes), cut.axis)
        out[at] = Held(cut.axis, cut.sizes)
    return out


def spread_over(
    function: str,
    spread: Spread,
    x: Tensor,
    default: int,
    along: Along,
    check: Check = no_check,
) -> dict[int, Held]:
    """Return the dims of x that are cut, if nothing else is to be checked before."""
    dims = bound(function, spread, default)
    check_tensor(x, function, dims[0][1], name="input")
    cuts = cuts_told(function, spread, dims)
    return held_of(function, cuts, x, along, check)


def shape_error(function: str, axis: Axis) -> Wrong:
    """Return what makes the ShapeErrors of a call."""

    def error(given: str, right: str) -> PmodError:
        return wrong(ShapeError, function, axis, given, right)

    return error


def ints(given: object, name: str, count: int, least: int, error: Wrong) -> list[int]:
    """Return one number for each spatial dim."""
    several = as_list(given)
    listed = [given] if several is None else several
    parsed: list[int] = []
    for one in listed:
        number = as_int(one)
        if number is not None and least <= number <= LONGEST:
            # a constant in compiled code too: plans are made of it
            parsed.append(operator.index(number))
    if len(parsed) != len(listed) or len(parsed) not in (1, count):
        of = f"an int of {least} or more"
        if count > 1:
            of += f", or {count} of them"
        raise error(f"{name} is {quoted(given)}", f"Pass {of}.")
    if len(parsed) == 1:
        return parsed * count
    return parsed


def check_choice(
    given: object, name: str, choices: Iterable[str], function: str, axis: Axis
) -> None:
    """Raise unless a text is one of the choices."""
    known = tuple(choices)
    if isinstance(given, str) and given in known:
        return
    said = f"{name} is {quoted(given)}{near_miss(given, known)}"
    *first, last = map(repr, known)
    raise wrong(
        ArgumentError, function, axis, said, f"Pass {', '.join(first)} or {last}."
    )


def any_dim(x: Tensor) -> Along:
    """Return all dims of x, where a layer works along each or passes it on."""
    return Along(tuple(range(-x.dim(), 0)), "a dim of it", "")


_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# what torch's functions take, of all that is sent
_TAKEN: dict[str, tuple[torch.dtype, ...]] = {
    "floating": _FLOATING,
    "floating or complex": (*_FLOATING, torch.complex64, torch.complex128),
    "real": (*_FLOATING, *_WHOLE),
    "of numbers": (
        *_FLOATING,
        *_WHOLE,
        torch.bool,
        torch.complex64,
        torch.complex128,
    ),
}


def check_kind(
    x: Tensor, kind: str, function: str, axis: Axis, *, name: str = "input"
) -> None:
    """Raise unless torch computes with tensors of this dtype."""
    if x.dtype in _TAKEN[kind]:
        return
    said = f"{name} is {str(x.dtype).removeprefix('torch.')}"
    right = f"Pass one that is {kind}, {name}.float() for example."
    raise wrong(ArgumentError, function, axis, said, right)


def check_dtype(dtype: object, function: str, axis: Axis) -> None:
    """Raise unless a dtype to compute in is none, or one that torch computes in."""
    if dtype is None:
        return
    # torch adds up no truth values
    known = isinstance(dtype, torch.dtype) and dtype in _TAKEN["of numbers"]
    if known and dtype != torch.bool:
        return
    right = "Pass a dtype that torch computes in, torch.float32 for example."
    raise wrong(ArgumentError, function, axis, f"dtype is {quoted(dtype)}", right)


def check_flags(function: str, **flags: object) -> None:
    """Raise unless each is True or False."""
    for name, on in flags.items():
        check_flag(on, function, name)


MOST_ROWS = 2**26


def check_result(at: int, rows: int, function: str, axis: Axis) -> None:
    """Raise for a result whose rows are too many to be listed one by one."""
    if rows > MOST_ROWS:
        said = f"the result would have {rows} rows along dim {at}"
        right = f"Pass at most {MOST_ROWS}."
        raise wrong(ShapeError, function, axis, said, right)
