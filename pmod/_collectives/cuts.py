"""The dims that a halo is taken along, checked: axes, lengths, widths, boundaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from pmod._collectives.exchange import others, swapped_alike
from pmod._core.arguments import (
    as_width,
    check_own_size,
    check_sizes,
    check_sum,
    check_tensor,
    dim_from_end,
    wrong,
)
from pmod._errors import ArgumentError, AxisError, ShapeError, near_miss, phrase, quoted
from pmod._mesh.ambient import resolve
from pmod._mesh.axis import Axis

Width: TypeAlias = int | tuple[int, int]
"""Rows before and after, or as many on both sides."""

BOUNDARIES = ("zeros", "periodic", "reflect", "replicate")


class Cut(NamedTuple):
    """One dim that is cut along one axis, as the user said."""

    axis: Axis
    dim: object
    width: tuple[int, int]
    boundary: str
    sizes: tuple[int, ...] | None


def _parsed(
    function: str, axis: Axis, dim: object, width: object, boundary: object, sizes: Any
) -> Cut:
    rows = as_width(width)
    if rows is None:
        right = "Pass an int of 0 or more, or two: the rows before and after."
        raise wrong(ShapeError, function, axis, f"width is {quoted(width)}", right)
    if not isinstance(boundary, str) or boundary not in BOUNDARIES:
        right = "Pass 'zeros' (torch.nn.functional.pad's constant), 'periodic' (circular), 'reflect' or 'replicate'."
        given = f"boundary is {quoted(boundary)}{near_miss(boundary, BOUNDARIES)}"
        raise wrong(ArgumentError, function, axis, given, right)
    told = None if sizes is None else check_sizes(sizes, function, axis)
    cut = Cut(axis, dim, rows, boundary, told)
    if told is not None:
        _check_width(cut, sum(told), function)
    return cut


def too_wide(width: tuple[int, int], total: int, boundary: str) -> int | None:
    """Return the widest that torch.nn.functional.pad allows; None if `width` fits."""
    widest = max(width)
    limits = {
        "zeros": widest,
        "periodic": total,
        "reflect": max(total - 1, 0),
        "replicate": widest if total else 0,
    }
    return limits[boundary] if limits[boundary] < widest else None


def _check_width(cut: Cut, total: int, function: str) -> None:
    """Check that the whole has enough rows to be padded so."""
    limit = too_wide(cut.width, total, cut.boundary)
    if limit is not None:
        given = f"width is {cut.width} with boundary={cut.boundary!r}, but all shards together have {total} rows"
        raise wrong(
            ShapeError,
            function,
            cut.axis,
            given,
            f"Pass a width of at most {limit}, or boundary='zeros'.",
        )


def axes_by_dim(
    function: str, axis: Any, dim: int | None, default: int
) -> list[tuple[Any, Axis]]:
    """Return the dims that are cut, each with its axis, in one order on all ranks."""
    if not isinstance(axis, Mapping):
        at = default if dim is None else dim
        return [(at, resolve(axis, function))]
    if not axis:
        raise ArgumentError(
            phrase(
                function, "axis is an empty mapping", "Pass {dim: axis}, or one axis."
            )
        )
    # ranks may have written their mappings in different orders, and must send in one
    bound = [(key, resolve(axis[key], function)) for key in sorted(axis, key=repr)]
    first = bound[0][1]
    if dim is not None:
        given = f"dim is {quoted(dim)} and axis a mapping"
        raise wrong(
            ArgumentError, function, first, given, "The mapping names the dims."
        )
    seen: set[str] = set()
    for _, of in bound:
        names = {of.label} if isinstance(of.label, str) else set(of.label)
        if names & seen:
            given = f"two dims are cut along {min(names & seen)!r}"
            raise wrong(AxisError, function, of, given, "Cut one along each axis.")
        seen |= names
    return bound


def by_dim(
    function: str, given: Any, name: str, axis: Any, bound: list[tuple[Any, Axis]]
) -> list[Any]:
    """Return what was given for each dim that is cut.

    One value is for all dims; if axis is a mapping, a mapping gives one to each.
    """
    first = bound[0][1]
    if not isinstance(axis, Mapping):
        return [given]
    if not isinstance(given, Mapping):
        # sizes of one dim are never those of another by accident
        if name == "sizes" and given is not None:
            right = "Pass {dim: sizes}, as axis is {dim: axis}; None for a dim whose sizes are to be exchanged."
            raise wrong(ShapeError, function, first, f"sizes is {quoted(given)}", right)
        return [given] * len(bound)
    if set(given) != {key for key, _ in bound}:
        right = f"Name the same dims as axis does, {[key for key, _ in bound]}."
        raise wrong(
            ArgumentError,
            function,
            first,
            f"{name} names the dims {sorted(given, key=repr)}",
            right,
        )
    return [given[key] for key, _ in bound]


def cuts_of(
    function: str,
    axis: object,
    dim: int | None,
    width: object,
    boundary: object,
    sizes: object,
) -> list[Cut]:
    bound = axes_by_dim(function, axis, dim, 0)
    told = by_dim(function, sizes, "sizes", axis, bound)
    widths = by_dim(function, width, "width", axis, bound)
    boundaries = by_dim(function, boundary, "boundary", axis, bound)
    cuts: list[Cut] = []
    for (key, of), *rest in zip(bound, widths, boundaries, told, strict=True):
        cuts.append(_parsed(function, of, key, *rest))
    return cuts


def places_of(function: str, cuts: list[Cut], xs: list[Any]) -> list[list[int]]:
    """Return the dims of every leaf, for each cut, from the end."""
    for x in xs:
        check_tensor(x, function, cuts[0].axis)
        if function == "halo_reduce":
            check_sum(x, function, cuts[0].axis)
    dims: list[list[int]] = []
    for cut in cuts:
        dims.append([dim_from_end(cut.dim, x, function, cut.axis) for x in xs])
    for x, ats in zip(xs, zip(*dims, strict=True), strict=True):
        if len(set(ats)) != len(ats):
            given = f"two of the dims {[cut.dim for cut in cuts]} are the same dim of x, which has {x.dim()}"
            raise wrong(
                ShapeError, function, cuts[0].axis, given, "Name each dim once."
            )
    return dims


def _own_length(
    function: str, cut: Cut, xs: list[Tensor], dims: list[int], spare: int
) -> int:
    """Return the length of this rank's shard, without `spare` rows of halo."""
    with_halos = [int(x.shape[at]) for x, at in zip(xs, dims, strict=True)]
    length = with_halos[0] - spare
    # one message tells the sizes of all leaves
    if len(set(with_halos)) > 1:
        rows = ", ".join(map(str, with_halos))
        given = f"the leaves of x have {rows} rows along dim {cut.dim}"
        raise wrong(
            ShapeError,
            function,
            cut.axis,
            given,
            "Pass shards of one length, or call it for each.",
        )
    if length < 0:
        given = f"x.shape[{xs[0].dim() + dims[0]}] is {with_halos[0]} but the halos have {spare} rows"
        raise wrong(
            ShapeError,
            function,
            cut.axis,
            given,
            "Pass a shard with its halos, as halo_exchange gives it.",
        )
    return length


def _check_told(
    function: str, cut: Cut, x: Tensor, at: int, own: int, spare: int
) -> None:
    """Check that the sizes that were given fit this rank's shard."""
    index, told = cut.axis.index, cut.sizes
    if told is None or told[index] == own:
        return
    right = f"Pass sizes={(*told[:index], own, *told[index + 1 :])}, or leave sizes out to exchange them."
    if not spare:
        check_own_size(x, at, told, function, cut.axis, right)
    given = f"sizes[{index}] is {told[index]} but x.shape[{x.dim() + at}] is {own + spare}, {own} without its halos"
    raise wrong(ShapeError, function, cut.axis, given, right)


def settled(
    function: str, cuts: list[Cut], xs: list[Tensor], dims: list[list[int]], back: bool
) -> list[Cut]:
    """Return the cuts with the sizes of all shards.

    Those that were given are checked before any are exchanged.
    """
    # what halo_reduce is given has its halos
    spares = [0] * len(cuts)
    if back:
        spares = [sum(cut.width) for cut in cuts]
    owns: list[int] = []
    for cut, ats, spare in zip(cuts, dims, spares, strict=True):
        owns.append(_own_length(function, cut, xs, ats, spare))
    for cut, ats, own, spare in zip(cuts, dims, owns, spares, strict=True):
        _check_told(function, cut, xs[0], ats[0], own, spare)
    out: list[Cut] = []
    for cut, ats, own in zip(cuts, dims, owns, strict=True):
        if cut.sizes is None:
            fits = ", ".join(map(others, xs, ats))
            mine = [[own]] * cut.axis.size
            told = swapped_alike(mine, fits, xs[0].device, function, cut.axis)
            sizes = tuple([size for (size,) in told])
            cut = cut._replace(sizes=sizes)
            _check_width(cut, sum(sizes), function)
        out.append(cut)
    return out
