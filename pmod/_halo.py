"""Halos: a shard with the rows around it that other shards hold (`halo_exchange`), and the transpose (`halo_reduce`).

The sizes of all shards say, on every rank alike, which rows each of them needs of which other for its window, rows one
after another of the padded whole. A `Plan` is one rank's part in that, three linear steps:

    x  --takes-->  x, messages  --permutes-->  x, messages  --places-->  window

Takes and places are copies of runs of rows, and each step has a transpose: the steps' transposes in reverse order are
`halo_reduce`. Nothing here is differentiated by hand: copies are torch's, permutes are those of `ppermute`.
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache, reduce
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from pmod._ambient import resolve
from pmod._arguments import as_width, check_own_size, check_sizes, check_sum, check_tensor, dim_from_end, wrong
from pmod._autodiff import Call, bind_all, memory_format, unmoved
from pmod._collectives import PERMUTE
from pmod._errors import ArgumentError, AxisError, ShapeError, explain, near_miss, quoted
from pmod._mesh import Axis, AxisLike
from pmod._pytree import Tree, map_leaves
from pmod._ragged import _others, _swapped_alike
from pmod._start import as_piece
from pmod._wire import addable, as_added

Width: TypeAlias = int | tuple[int, int]
"""Rows before and after, or as many on both sides."""

BOUNDARIES = ("zeros", "periodic", "reflect", "replicate")

# --- which rows are needed of whom ----------------------------------------------------------------


class Run(NamedTuple):
    """Rows one after another in a buffer."""

    buffer: int
    start: int
    rows: int


class Copy(NamedTuple):
    """Rows brought from one run to another; one row to many is repeated, many to one are summed."""

    of: Run
    to: Run
    reverse: bool

    @property
    def T(self) -> Copy:
        """The transpose."""
        return Copy(self.to, self.of, self.reverse)


class Plan(NamedTuple):
    """One rank's part; buffer 0 is the shard, buffer g message g. `permutes`: targets and rows of each message."""

    takes: tuple[Copy, ...]
    permutes: tuple[tuple[tuple[int, ...], int], ...]
    places: tuple[Copy, ...]
    held: int  # rows of the shard
    gives: int  # rows of the result

    @property
    def T(self) -> Plan:
        """The transpose: that of each step, in reverse order."""
        back = tuple((PERMUTE.flip((targets,))[0], rows) for targets, rows in self.permutes)
        takes, places = (tuple(copy.T for copy in copies) for copies in (self.places, self.takes))
        return Plan(takes, back, places, self.held, self.held)

    @property
    def moves(self) -> bool:
        """The window is not the shard itself, or others need rows of it."""
        return bool(self.permutes) or self.takes != self.places or self.held != self.gives


Windows: TypeAlias = tuple[tuple[int, int], ...]
"""Of each rank: the rows low to high - 1 of the padded whole, those before its first below 0."""


def _around(sizes: tuple[int, ...], width: tuple[int, int]) -> Windows:
    """Every shard with rows around it."""
    return tuple((start - width[0], end + width[1]) for start, end in pairwise(accumulate(sizes, initial=0)))


def _window(low: int, high: int, total: int, boundary: str) -> list[tuple[int, Run, int, bool]]:
    """The rows low to high - 1 of the padded whole: where in the window, which of its rows, how often, reversed."""
    out = [(max(low, 0), max(low, 0), min(high, total), False)]
    below, above = (low, min(high, 0)), (max(low, total), high)
    if boundary == "periodic":
        out += [(a, a + by, b + by, False) for (a, b), by in ((below, total), (above, -total))]
    elif boundary == "reflect":  # row a stands for row about - a
        out += [(a, about - b + 1, about - a + 1, True) for (a, b), about in ((below, 0), (above, 2 * total - 2))]
    runs = [(at - low, Run(0, start, end - start), end - start, reverse) for at, start, end, reverse in out]
    if boundary == "replicate":
        edges = ((below, 0), (above, total - 1))
        runs += [(a - low, Run(0, edge, 1), b - a, False) for (a, b), edge in edges]
    return [run for run in runs if run[2] > 0]


class Need(NamedTuple):
    """Rows of an owner's shard, and where they go in the window."""

    owner: int
    start: int
    rows: int
    at: int
    length: int
    reverse: bool


def _needs(low: int, high: int, sizes: tuple[int, ...], boundary: str) -> list[Need]:
    """All that a window is made of, whoever holds it; what is not listed is zeros."""
    starts = [0, *accumulate(sizes)]
    out: list[Need] = []
    for at, (_, start, count), length, reverse in _window(low, high, starts[-1], boundary):
        first, end = start, start + count
        while first < end:
            owner = bisect_right(starts, first, hi=len(sizes)) - 1  # of shards that start here, the last is not empty
            last = min(end, starts[owner + 1])
            place = at + (end - last if reverse else first - start)
            rows = last - first
            out.append(Need(owner, first - starts[owner], rows, place, rows if count > 1 else length, reverse))
            first = last
    return out


def _merged(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Intervals without overlap that cover the same rows."""
    out: list[tuple[int, int]] = []
    for start, end in sorted(runs):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


class _Exchange(NamedTuple):
    needs: list[list[Need]]
    sent: dict[tuple[int, int], list[tuple[int, int]]]  # (owner, rank) -> intervals of the owner's rows, each once
    message: dict[tuple[int, int], int]  # (owner, rank) -> which permute carries them
    permutes: tuple[tuple[tuple[int, ...], int], ...]


@lru_cache(maxsize=256)
def _exchange(sizes: tuple[int, ...], windows: Windows, boundary: str) -> _Exchange:
    """What goes from whom to whom. A permute joins the pairs as far apart with as many rows: none is sent in vain."""
    n = len(sizes)
    needs = [_needs(low, high, sizes, boundary) for low, high in windows]
    wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for rank, of in enumerate(needs):
        for need in of:
            if need.owner != rank:
                wanted.setdefault((need.owner, rank), []).append((need.start, need.start + need.rows))
    sent = {pair: _merged(runs) for pair, runs in wanted.items()}
    alike: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for pair, runs in sent.items():
        rows = sum(end - start for start, end in runs)
        alike.setdefault(((pair[1] - pair[0]) % n, rows), []).append(pair)
    message: dict[tuple[int, int], int] = {}
    permutes: list[tuple[tuple[int, ...], int]] = []
    for (_, rows), pairs in sorted(alike.items()):
        targets = [-1] * n
        for owner, rank in pairs:
            targets[owner] = rank
            message[owner, rank] = len(permutes) + 1
        permutes.append((tuple(targets), rows))
    return _Exchange(needs, sent, message, tuple(permutes))


def window_plan(index: int, sizes: tuple[int, ...], windows: Windows, boundary: str) -> Plan:
    """The part of the rank at this index."""
    exchange = _exchange(sizes, windows, boundary)
    own = sizes[index]
    takes = [Copy(Run(0, 0, own), Run(0, 0, own), False)] if own else []
    for (owner, rank), runs in exchange.sent.items():
        at = 0
        for start, end in runs if owner == index else ():
            takes.append(Copy(Run(0, start, end - start), Run(exchange.message[owner, rank], at, end - start), False))
            at += end - start
    places: list[Copy] = []
    for need in exchange.needs[index]:
        buffer, start = 0, need.start
        if need.owner != index:
            pair = (need.owner, index)
            buffer = exchange.message[pair]
            start = sum(min(end, need.start) - first for first, end in exchange.sent[pair] if first <= need.start)
        places.append(Copy(Run(buffer, start, need.rows), Run(0, need.at, need.length), need.reverse))
    low, high = windows[index]
    return Plan(tuple(takes), exchange.permutes, tuple(places), own, high - low)


@lru_cache(maxsize=256)
def _around_plan(index: int, sizes: tuple[int, ...], width: tuple[int, int], boundary: str) -> Plan:
    return window_plan(index, sizes, _around(sizes, width), boundary)


def _plan(index: int, sizes: tuple[int, ...], width: tuple[int, int], boundary: str) -> Plan:
    return _around_plan(index, sizes, width, boundary)


def _plan_back(index: int, sizes: tuple[int, ...], width: tuple[int, int], boundary: str) -> Plan:
    return _around_plan(index, sizes, width, boundary).T


for _constant in (_plan, _plan_back):  # numbers in, numbers out: compiled code need not see how
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined] # see _ambient._constant

# --- carrying a plan out --------------------------------------------------------------------------


def _rows(copy: Copy, xs: Sequence[Tensor], dim: int) -> Tensor:
    """What a copy brings."""
    length = copy.to.rows
    y = xs[copy.of.buffer].narrow(dim, copy.of.start, copy.of.rows)
    if copy.reverse:
        y = y.flip(dim)
    if copy.of.rows == length:
        return y
    if copy.of.rows > 1:
        return y.sum(dim, keepdim=True, dtype=y.dtype)
    shape = [-1] * y.dim()
    shape[dim] = length
    return y.expand(shape)


def _pieces(copies: Sequence[Copy], xs: Sequence[Tensor], target: int, length: int, dim: int) -> list[Tensor]:
    """A buffer in pieces: at each row the sum of the copies that go there, zeros where none goes.

    Of each buffer that brings nothing an empty piece: every rank must depend on every message, or in backward it would
    not take part in sending it back.
    """
    arriving = [copy for copy in copies if copy.to.buffer == target]
    used = [copy.of.buffer for copy in arriving]
    pieces = [x.narrow(dim, 0, 0) for buffer, x in enumerate(xs) if buffer not in used]
    cuts = {0, length}
    for copy in arriving:
        cuts |= {copy.to.start, copy.to.start + copy.to.rows}
    for start, end in pairwise(sorted(cuts)):
        parts = [
            _rows(copy, xs, dim).narrow(dim, start - copy.to.start, end - start)
            for copy in arriving
            if copy.to.start <= start and end <= copy.to.start + copy.to.rows
        ]
        if not parts:
            shape = list(xs[0].shape)
            shape[dim] = end - start
            parts = [xs[0].new_zeros(shape)]
        pieces.append(reduce(operator.add, parts))
    return pieces


def _laid_out_as(y: Tensor, kept: torch.memory_format | None) -> Tensor:
    return y if kept is None else y.contiguous(memory_format=kept)


def carry_out(plan: Plan, xs: Sequence[Tensor], dims: Sequence[int], axis: Axis) -> list[Tensor]:
    """The plan on every leaf; a permute sends those of one dtype and device together."""
    # torch.cat's backward gives no derivative to an empty tensor of one dim, which it takes for one of any shape
    flat = [x.dim() == 1 for x in xs]
    xs = [x.unsqueeze(-1) if one else x for x, one in zip(xs, flat, strict=True)]
    dims = [-2 if one else dim for dim, one in zip(dims, flat, strict=True)]
    formats = [memory_format(x) for x in xs]
    buffers: list[list[Tensor]] = []
    alike: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    lengths = [plan.held, *[rows for _, rows in plan.permutes]]
    for i, (x, dim, kept) in enumerate(zip(xs, dims, formats, strict=True)):
        alike.setdefault((x.dtype, x.device), []).append(i)
        taken = [_pieces(plan.takes, [x], target, length, dim) for target, length in enumerate(lengths)]
        whole = [pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim) for pieces in taken]
        buffers.append([whole[0], *[_laid_out_as(message, kept) for message in whole[1:]]])
    calls: list[tuple[Call, list[Tensor]]] = []
    for g, (targets, _) in enumerate(plan.permutes, 1):
        calls += [(Call(PERMUTE, axis, (targets,)), [buffers[i][g] for i in some]) for some in alike.values()]
    arrived = iter(bind_all(calls))
    for g in range(1, len(lengths)):
        for some in alike.values():
            for i, message in zip(some, next(arrived), strict=True):
                buffers[i][g] = message
    out: list[Tensor] = []
    for held, dim, kept in zip(buffers, dims, formats, strict=True):
        out.append(_laid_out_as(torch.cat(_pieces(plan.places, held, 0, plan.gives, dim), dim), kept))
    return [y.squeeze(-1) if one else y for y, one in zip(out, flat, strict=True)]


# --- arguments ------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """One dim that is cut along one axis, as the user said."""

    axis: Axis
    dim: object
    width: tuple[int, int]
    boundary: str
    sizes: tuple[int, ...] | None


def _parsed(function: str, axis: Axis, dim: object, width: object, boundary: object, sizes: Any) -> Cut:
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
    """The widest that torch.nn.functional.pad would pad the whole, where that is less; None where it is not."""
    widest = max(width)
    limits = {"zeros": widest, "periodic": total, "reflect": max(total - 1, 0), "replicate": widest if total else 0}
    return limits[boundary] if limits[boundary] < widest else None


def _check_width(cut: Cut, total: int, function: str) -> None:
    """The whole has enough rows to be padded so."""
    limit = too_wide(cut.width, total, cut.boundary)
    if limit is not None:
        given = f"width is {cut.width} with boundary={cut.boundary!r}, but all shards together have {total} rows"
        raise wrong(ShapeError, function, cut.axis, given, f"Pass a width of at most {limit}, or boundary='zeros'.")


def axes_by_dim(function: str, axis: Any, dim: int | None, default: int) -> list[tuple[Any, Axis]]:
    """The dims that are cut, each with its axis, in an order that is the same on all ranks."""
    if not isinstance(axis, Mapping):
        return [(default if dim is None else dim, resolve(axis, function))]
    if not axis:
        raise ArgumentError(explain(function, "axis is an empty mapping", "Pass {dim: axis}, or one axis."))
    # ranks may have written their mappings in different orders, and must send in one
    bound = [(key, resolve(axis[key], function)) for key in sorted(axis, key=repr)]
    first = bound[0][1]
    if dim is not None:
        given = f"dim is {quoted(dim)} and axis a mapping"
        raise wrong(ArgumentError, function, first, given, "The mapping names the dims.")
    seen: set[str] = set()
    for _, of in bound:
        names = {of.label} if isinstance(of.label, str) else set(of.label)
        if names & seen:
            given = f"two dims are cut along {min(names & seen)!r}"
            raise wrong(AxisError, function, of, given, "Cut one along each axis.")
        seen |= names
    return bound


def by_dim(function: str, given: Any, name: str, axis: Any, bound: list[tuple[Any, Axis]]) -> list[Any]:
    """What was given for each dim that is cut: one value for all, or where axis is a mapping another one."""
    first = bound[0][1]
    if not isinstance(axis, Mapping):
        return [given]
    if name == "sizes" and given is not None and not isinstance(given, Mapping):
        right = "Pass {dim: sizes}, as axis is {dim: axis}; None for a dim whose sizes are to be exchanged."
        raise wrong(ShapeError, function, first, f"sizes is {quoted(given)}", right)
    if not isinstance(given, Mapping):
        return [given] * len(bound)
    if set(given) != {key for key, _ in bound}:
        right = f"Name the same dims as axis does, {[key for key, _ in bound]}."
        raise wrong(ArgumentError, function, first, f"{name} names the dims {sorted(given, key=repr)}", right)
    return [given[key] for key, _ in bound]


def _cuts(function: str, axis: Any, dim: int | None, width: Any, boundary: Any, sizes: Any) -> list[Cut]:
    bound = axes_by_dim(function, axis, dim, 0)
    told = by_dim(function, sizes, "sizes", axis, bound)
    widths = by_dim(function, width, "width", axis, bound)
    boundaries = by_dim(function, boundary, "boundary", axis, bound)
    each = zip(bound, widths, boundaries, told, strict=True)
    return [_parsed(function, of, key, wide, end, held) for (key, of), wide, end, held in each]


def places_of(function: str, cuts: list[Cut], xs: list[Any]) -> list[list[int]]:
    """The dims of every leaf, for each cut, from the end."""
    for x in xs:
        check_tensor(x, function, cuts[0].axis)
        if function == "halo_reduce":
            check_sum(x, function, cuts[0].axis)
    dims = [[dim_from_end(cut.dim, x, function, cut.axis) for x in xs] for cut in cuts]
    for x, ats in zip(xs, zip(*dims, strict=True), strict=True):
        if len(set(ats)) != len(ats):
            given = f"two of the dims {[cut.dim for cut in cuts]} are the same dim of x, which has {x.dim()}"
            raise wrong(ShapeError, function, cuts[0].axis, given, "Name each dim once.")
    return dims


def _own_length(function: str, cut: Cut, xs: list[Tensor], dims: list[int], spare: int) -> int:
    """The length of this rank's shard, without `spare` rows of halo."""
    lengths = [int(x.shape[at]) - spare for x, at in zip(xs, dims, strict=True)]
    if len(set(lengths)) > 1:
        given = f"the leaves of x have {', '.join(str(length + spare) for length in lengths)} rows along dim {cut.dim}"
        raise wrong(ShapeError, function, cut.axis, given, "Pass shards of one length, or call it for each.")
    if lengths[0] < 0:
        given = f"x.shape[{xs[0].dim() + dims[0]}] is {lengths[0] + spare} but the halos have {spare} rows"
        raise wrong(ShapeError, function, cut.axis, given, "Pass a shard with its halos, as halo_exchange gives it.")
    return lengths[0]


def _check_told(function: str, cut: Cut, x: Tensor, at: int, own: int, spare: int) -> None:
    """The sizes that were given fit this rank's shard."""
    index, told = cut.axis.index, cut.sizes
    if told is None or told[index] == own:
        return
    right = f"Pass sizes={(*told[:index], own, *told[index + 1 :])}, or leave sizes out to exchange them."
    if not spare:
        check_own_size(x, at, told, function, cut.axis, right)
    given = f"sizes[{index}] is {told[index]} but x.shape[{x.dim() + at}] is {own + spare}, {own} without its halos"
    raise wrong(ShapeError, function, cut.axis, given, right)


def settled(function: str, cuts: list[Cut], xs: list[Tensor], dims: list[list[int]], back: bool) -> list[Cut]:
    """The cuts with the sizes of all shards, those that were given checked before any is exchanged."""
    spares = [sum(cut.width) if back else 0 for cut in cuts]
    owns = [_own_length(function, cut, xs, ats, spare) for cut, ats, spare in zip(cuts, dims, spares, strict=True)]
    for cut, ats, own, spare in zip(cuts, dims, owns, spares, strict=True):
        _check_told(function, cut, xs[0], ats[0], own, spare)
    out: list[Cut] = []
    for cut, ats, own in zip(cuts, dims, owns, strict=True):
        if cut.sizes is None:
            fits = ", ".join(_others(x, at) for x, at in zip(xs, ats, strict=True))
            told = _swapped_alike([[own]] * cut.axis.size, fits, xs[0].device, function, cut.axis)
            cut = cut._replace(sizes=tuple(size for (size,) in told))
            _check_width(cut, sum(size for (size,) in told), function)
        out.append(cut)
    return out


# --- halo_exchange <-> halo_reduce ----------------------------------------------------------------


def _along(axis: Any, dim: int | None, width: Any, boundary: Any, sizes: Any, x: Tree, *, back: bool) -> Tree:
    """halo_exchange one dim after another, or `back`, its transpose, in reverse order."""
    function, plan_of, step = ("halo_reduce", _plan_back, -1) if back else ("halo_exchange", _plan, 1)
    cuts = _cuts(function, axis, dim, width, boundary, sizes)

    def run(xs: list[Any]) -> list[Any]:
        if not xs:
            return xs
        given, dims = xs, places_of(function, cuts, xs)
        if back:
            xs = [addable(x) for x in xs]
        for cut, ats in list(zip(settled(function, cuts, xs, dims, back), dims, strict=True))[::step]:
            assert cut.sizes is not None
            if cut.width != (0, 0):
                xs = carry_out(plan_of(cut.axis.index, cut.sizes, cut.width, cut.boundary), xs, ats, cut.axis)
        if back:
            xs = [as_added(y, x.dtype) for x, y in zip(given, xs, strict=True)]
        if all(y is x for x, y in zip(given, xs, strict=True)):
            return unmoved(xs)
        return xs

    return map_leaves(as_piece(run, function), x, function, cuts[0].axis)


def halo_exchange(
    x: Tree,
    axis: AxisLike | Mapping[int, AxisLike],
    *,
    dim: int | None = None,
    width: Width | Mapping[int, Width],
    boundary: str | Mapping[int, str] = "zeros",
    sizes: Sequence[int] | Mapping[int, Sequence[int] | None] | None = None,
) -> Tree:
    """The shard with `width` rows around it along `dim` (0 unless given): a window of the whole tensor, padded.

    The shards are cut along `dim` in the order of the ranks, each as long as it likes, empty ones included. width: rows
    before and after, one int for both; wider than the neighbours' shards too. boundary, at the ends of the whole:
    "zeros", "periodic", "reflect" or "replicate", torch.nn.functional.pad's constant 0, circular, reflect, replicate.
    Several dims: axis={dim: axis}, corners included; width, boundary and sizes then may be mappings by dim too.
    sizes: the length of each rank's shard. Without them the ranks exchange them: one small message more per dim, and on
    cuda a wait for it. Under torch.compile they must be given.

    V -> V. Transpose: halo_reduce.
    Shapes: x (..., k, ...) -> (..., before + k + after, ...), k alone differing between ranks. The result is
    channels_last where x, or what it is a slice of, is.
    Cost: each row that another rank needs, once to it: where shards are that long, `width` rows to each neighbour
    and nothing to others. A width of 0 gives x.
    Raises: ShapeError for a width that padding the whole would not allow (reflect: less than its length; periodic: at
    most), sizes that are not this rank's, a dim twice; AxisError for an axis twice; ArgumentError for another boundary.

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


def halo_reduce(
    x: Tree,
    axis: AxisLike | Mapping[int, AxisLike],
    *,
    dim: int | None = None,
    width: Width | Mapping[int, Width],
    boundary: str | Mapping[int, str] = "zeros",
    sizes: Sequence[int] | Mapping[int, Sequence[int] | None] | None = None,
) -> Tree:
    """Rows of halo added to the rows that they are copies of, and dropped: what windows scatter, summed at its owners.

    Arguments as in `halo_exchange`, x being what that gives; sizes are those of the shards without their halos. With
    boundary="zeros" what lies outside the whole is lost; with the others it goes to the row that it would come from.

    V -> V. Transpose: halo_exchange.
    Shapes: x (..., before + k + after, ...) -> (..., k, ...).
    Cost: as halo_exchange, the other way: sums of rows for one owner are taken before they are sent.
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
