"""Halos: a shard with rows of others around it, and the transpose of that.

They are `halo_exchange` and `halo_reduce`. The sizes of all shards say, on every rank
alike, which rows each of them needs of which other for its window, rows one after
another of the padded whole. A `Plan` is one rank's part in that, three linear steps:

    x  --takes-->  x, messages  --permutes-->  x, messages  --places-->  window

Takes and places are copies of runs of rows, and each step has a transpose: the steps'
transposes in reverse order are `halo_reduce`. Nothing here is differentiated by hand:
copies are torch's, permutes are those of `ppermute`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import partial, reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pmod._collectives.cuts import Width, cuts_of, places_of, settled
from pmod._collectives.halo_plan import Copy, Plan, exchange_of, plan_back
from pmod._collectives.permutes import PERMUTE, Permutation
from pmod._core.bind import bind_all, unmoved
from pmod._core.collective import collective
from pmod._core.row import Call, V
from pmod._core.send import memory_format
from pmod._core.start import as_piece
from pmod._core.tree import Tree, alike, map_leaves
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import AxisLike
from pmod._wire.sums import addable, as_added


def _rows(copy: Copy, xs: Sequence[Tensor], dim: int) -> Tensor:
    """Return what a copy brings."""
    length = copy.to.rows
    y = xs[copy.of.buffer].narrow(dim, copy.of.start, copy.of.rows)
    if copy.reverse:
        y = y.flip(dim)
    if copy.of.rows == length:
        return y
    # many rows to one: the transpose of a repeated row. torch would widen integers
    if copy.of.rows > 1:
        return y.sum(dim, keepdim=True, dtype=y.dtype)
    shape = [-1] * y.dim()
    shape[dim] = length
    return y.expand(shape)


def _pieces(
    copies: Sequence[Copy], xs: Sequence[Tensor], target: int, length: int, dim: int
) -> list[Tensor]:
    """Return a buffer in pieces: at each row the sum of the copies that go there.

    Where none goes there are zeros. A buffer that brings nothing gives an empty piece,
    because every rank must depend on every message: in backward it would not take part
    in sending it back.
    """
    arriving = [copy for copy in copies if copy.to.buffer == target]
    used = [copy.of.buffer for copy in arriving]
    pieces = [x.narrow(dim, 0, 0) for buffer, x in enumerate(xs) if buffer not in used]
    # between two of these rows the same copies arrive
    cuts = {0, length}
    for copy in arriving:
        cuts |= {copy.to.start, copy.to.end}
    for start, end in pairwise(sorted(cuts)):
        parts: list[Tensor] = []
        for copy in arriving:
            if copy.to.start <= start and end <= copy.to.end:
                rows = _rows(copy, xs, dim)
                parts.append(rows.narrow(dim, start - copy.to.start, end - start))
        if not parts:
            shape = list(xs[0].shape)
            shape[dim] = end - start
            parts = [xs[0].new_zeros(shape)]
        pieces.append(reduce(operator.add, parts))
    return pieces


def laid_out_as(y: Tensor, kept: torch.memory_format | None) -> Tensor:
    """Return y in a memory format, if there is one to keep."""
    if kept is None:
        return y
    return y.contiguous(memory_format=kept)


def carry_out(
    plan: Plan, xs: Sequence[Tensor], dims: Sequence[int], axis: Axis
) -> list[Tensor]:
    """Carry out the plan on every leaf, those of one dtype and device together."""
    wide, ats = list(xs), list(dims)
    for i, x in enumerate(xs):
        # torch.cat's backward gives no derivative to an empty tensor of one dim, which
        # it takes for one of any shape
        if x.dim() == 1:
            wide[i], ats[i] = x.unsqueeze(-1), -2
    buffers = list(map(partial(_taken, plan), wide, ats))
    _permute(plan, buffers, axis)
    out: list[Tensor] = []
    for given, x, held, dim in zip(xs, wide, buffers, ats, strict=True):
        pieces = _pieces(plan.places, held, 0, plan.gives, dim)
        y = laid_out_as(torch.cat(pieces, dim), memory_format(x))
        out.append(y.squeeze(-1) if given.dim() == 1 else y)
    return out


def _taken(plan: Plan, x: Tensor, dim: int) -> list[Tensor]:
    """Return the buffers of a leaf: its shard, and a message for each permute."""
    kept = memory_format(x)
    buffers: list[Tensor] = []
    for target, length in enumerate([plan.held, *[rows for _, rows in plan.permutes]]):
        pieces = _pieces(plan.takes, [x], target, length, dim)
        y = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
        # the shard stays a view: nothing but its rows is used
        buffers.append(laid_out_as(y, kept) if target else y)
    return buffers


def _permute(plan: Plan, buffers: list[list[Tensor]], axis: Axis) -> None:
    """Replace the messages of all leaves by those that arrive."""
    groups = alike([leaf[0] for leaf in buffers])
    calls: list[tuple[Call, list[Tensor]]] = []
    for g, (targets, _) in enumerate(plan.permutes, 1):
        call = PERMUTE.along(axis, Permutation(targets))
        for some in groups:
            calls.append((call, [buffers[i][g] for i in some]))
    # all are sent before any is waited for
    arrived = iter(bind_all(calls))
    for g in range(1, len(plan.permutes) + 1):
        for some in groups:
            for i, message in zip(some, next(arrived), strict=True):
                buffers[i][g] = message


def _along(
    axis: object,
    dim: int | None,
    width: object,
    boundary: object,
    sizes: object,
    x: Tree,
    *,
    back: bool,
) -> Tree:
    """Exchange halos one dim after another, or `back`, its transpose, in reverse order."""
    function, plan_of = "halo_exchange", exchange_of
    if back:
        function, plan_of = "halo_reduce", plan_back
    cuts = cuts_of(function, axis, dim, width, boundary, sizes)

    def run(xs: list[Any]) -> list[Any]:
        if not xs:
            return xs
        given, dims = xs, places_of(function, cuts, xs)
        # rows are added up in a dtype that torch adds in, and come back in x's
        if back:
            xs = [addable(x) for x in xs]
        known = settled(function, cuts, xs, dims, back)
        steps = list(zip(known, dims, strict=True))
        # corners go through both neighbours: the transpose takes that way back
        for cut, ats in reversed(steps) if back else steps:
            assert cut.sizes is not None
            if cut.width != (0, 0):
                plan = plan_of(cut.axis.index, cut.sizes, cut.width, cut.boundary)
                xs = carry_out(plan, xs, ats, cut.axis)
        if back:
            xs = [as_added(y, x.dtype) for x, y in zip(given, xs, strict=True)]
        # a result shares no memory with x, which the user may change
        if all(map(operator.is_, given, xs)):
            return unmoved(xs)
        return xs

    return map_leaves(as_piece(run, function), x, function, cuts[0].axis)


@collective(
    V,
    V,
    transpose="halo_reduce",
    value="the shard with rows of its neighbours on both sides",
)
def halo_exchange(
    x: Tree,
    axis: AxisLike | Mapping[int, AxisLike],
    *,
    dim: int | None = None,
    width: Width | Mapping[int, Width],
    boundary: str | Mapping[int, str] = "zeros",
    sizes: Sequence[int] | Mapping[int, Sequence[int] | None] | None = None,
) -> Tree:
    """Return the shard with `width` rows around it along `dim`, 0 unless given.

    It is a window of the whole tensor, padded. The shards are cut along `dim` in the
    order of the ranks, each as long as it likes, empty ones included. width: rows
    before and after, one int for both; wider than the neighbours' shards too. boundary,
    at the ends of the whole: "zeros", "periodic", "reflect" or "replicate",
    torch.nn.functional.pad's constant 0, circular, reflect, replicate. Several dims:
    axis={dim: axis}, corners included; width, boundary and sizes then may be mappings
    by dim too.
    sizes: the length of each rank's shard. Without them the ranks exchange them: one
    small message more per dim, and on cuda a wait for it. Under torch.compile they must
    be given.

    V -> V. Transpose: halo_reduce.
    Shapes: x (..., k, ...) -> (..., before + k + after, ...), k alone differing between
    ranks. The result is channels_last where x, or what it is a slice of, is.
    Cost: each row that another rank needs, once to it: where shards are that long,
    `width` rows to each neighbour and nothing to others. A width of 0 gives x.
    Raises: ShapeError for a width that padding the whole would not allow (reflect: less
    than its length; periodic: at most), sizes that are not this rank's, a dim twice;
    AxisError for an axis twice; ArgumentError for another boundary.

    The rows 0 1 2 on rank 0, 3 4 on rank 1, width=1, boundary="periodic":

        rank 0:  4 | 0 1 2 | 3
        rank 1:  2 | 3 4   | 0

    >>> def smooth():
    ...     x = pmod.shard(torch.arange(5), "x", sizes=(3, 2))
    ...     return pmod.halo_exchange(x, "x", width=1, boundary="periodic", sizes=(3, 2))
    >>> pmod.simulate(smooth, x=2)
    [tensor([4, 0, 1, 2, 3]), tensor([2, 3, 4, 0])]
    """
    return _along(axis, dim, width, boundary, sizes, x, back=False)


@collective(
    V,
    V,
    transpose="halo_exchange",
    value="the shard, with what was computed for it elsewhere added",
)
def halo_reduce(
    x: Tree,
    axis: AxisLike | Mapping[int, AxisLike],
    *,
    dim: int | None = None,
    width: Width | Mapping[int, Width],
    boundary: str | Mapping[int, str] = "zeros",
    sizes: Sequence[int] | Mapping[int, Sequence[int] | None] | None = None,
) -> Tree:
    """Add rows of halo to the rows that they are copies of, and drop them.

    What windows scatter is summed at its owners. Arguments as in `halo_exchange`, x
    being what that gives; sizes are those of the shards without their halos. With
    boundary="zeros" what lies outside the whole is lost; with the others it goes to the
    row that it would come from.

    V -> V. Transpose: halo_exchange.
    Shapes: x (..., before + k + after, ...) -> (..., k, ...).
    Cost: as halo_exchange, the other way: sums of rows for one owner are taken before
    they are sent.
    Raises: as halo_exchange; ArgumentError for bool.

    Ones on 3 and 2 rows with width=1, boundary="periodic":

        rank 0:  1 | 1 1 1 | 1         rank 0:  2 1 2
        rank 1:  1 | 1 1   | 1         rank 1:  2 2

    >>> def deposit():
    ...     x = torch.ones([5, 4][pmod.axis_index("x")])
    ...     return pmod.halo_reduce(x, "x", width=1, boundary="periodic", sizes=(3, 2))
    >>> pmod.simulate(deposit, x=2)
    [tensor([2., 1., 2.]), tensor([2., 2.])]
    """
    return _along(axis, dim, width, boundary, sizes, x, back=True)
