"""The `_v` forms: the rows of `_slices` with a length per rank, and the exchange of those lengths.

Sizes are lengths along `dim`, one per rank of the axis; 0 is a size like any other. Where they are left out the ranks
tell each other, in one small message of int64 numbers, and at once see whether their tensors fit together.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from pmod import _groups
from pmod._ambient import resolve
from pmod._arguments import (
    accumulate_in,
    check_adds_up,
    check_own_size,
    check_root,
    check_sizes,
    check_sum,
    check_tensor,
    dim_from_end,
    wrong,
)
from pmod._autodiff import Call, Params, memory_format, origin, told
from pmod._errors import ArgumentError, AxisError, MismatchError, ShapeError
from pmod._mesh import Axis, AxisLike
from pmod._pytree import Tree, each, flatten
from pmod._slices import ALL_GATHER, ALL_TO_ALL, GATHER, PSUM_SCATTER, SCATTER
from pmod._start import once
from pmod._wire import accumulator, wire_of

Sizes = tuple[int, ...]

HEAD = 8  # numbers in the message that tells sizes; trees of more leaves send a second one

# --- what the ranks tell each other ---------------------------------------------------------------


def _check_eager(function: str, axis: Axis) -> None:
    if torch.compiler.is_compiling():
        given = "sizes are left out under torch.compile"
        raise wrong(ArgumentError, function, axis, given, "Pass them: a compiled graph is fixed.")


def _swapped(numbers: Sequence[Sequence[int]], device: torch.device, axis: Axis) -> list[list[int]]:
    """numbers[j] goes to rank j; what arrives, by rank. As many numbers for each."""
    if axis.size == 1:
        return [list(row) for row in numbers]
    width = len(numbers[0])
    if device.type == "meta":
        device = _groups.number_device()

    def send() -> list[list[int]]:
        counts = [width] * axis.size
        # plain numbers, in any transform and mode
        with torch._C._DisableFuncTorch(), torch._C.DisableTorchFunction(), torch.no_grad():
            flat = torch.tensor(numbers, dtype=torch.int64, device=device).view(-1)
            with told(Call(ALL_TO_ALL, axis, (-1, -1, None, None)), [flat], origin()):
                return wire_of(axis).all_to_all(flat, counts, counts).wait().view(axis.size, width).tolist()

    return once(send)


def _others(x: Tensor, at: int) -> str:
    """The shape and dtype of x, without the length along the dim: they must be the same on all ranks."""
    shape = ["..." if i == x.dim() + at else str(size) for i, size in enumerate(x.shape)]
    return f"({', '.join(shape)}) {str(x.dtype).removeprefix('torch.')}"


def _swapped_alike(
    numbers: Sequence[Sequence[int]], fits: str, device: torch.device, function: str, axis: Axis
) -> list[list[int]]:
    """`_swapped`, where all ranks must hold what `fits` says."""
    _check_eager(function, axis)
    mine = zlib.crc32(fits.encode())
    rows = [[mine, *row] for row in numbers]
    # as long on every rank, so that one with another number of leaves is seen too, not waited for or aborted by gloo
    arrived = _swapped([(row + [0] * HEAD)[:HEAD] for row in rows], device, axis)
    strangers = [rank for rank, row in enumerate(arrived) if row[0] != mine]
    if strangers:
        given = f"x is {fits} here, and of another shape or dtype at index {', '.join(map(str, strangers))} of the axis"
        right = "Shards differ in length along dim only."
        raise wrong(MismatchError, function, axis, given, right)
    if len(rows[0]) > HEAD:
        more = _swapped([row[HEAD:] for row in rows], device, axis)
        arrived = [head + tail for head, tail in zip(arrived, more, strict=True)]
    return [row[1 : len(rows[0])] for row in arrived]


def _leaves(tree: Any, dim: int, function: str, axis: Axis) -> list[tuple[Tensor, int]]:
    """The leaves with their dim counted from the end."""
    leaves: list[Any] = []
    flatten(tree, function, axis, leaves)
    for x in leaves:
        check_tensor(x, function, axis)
    return [(x, dim_from_end(dim, x, function, axis)) for x in leaves]


def _sizes_of_leaves(
    tree: Any, dim: int, sizes: Sequence[int] | None, function: str, axis: Axis
) -> Iterator[tuple[int, Sizes]]:
    """The dim and the sizes of every leaf: those given, or what the ranks hold."""
    leaves = _leaves(tree, dim, function, axis)
    if sizes is not None:
        given = check_sizes(sizes, function, axis)
        for x, at in leaves:
            fitting = (*given[: axis.index], int(x.shape[at]), *given[axis.index + 1 :])
            right = f"Pass sizes={fitting}, or leave sizes out to exchange them."
            check_own_size(x, at, given, function, axis, right)
        return iter([(at, given) for _, at in leaves])
    return zip([at for _, at in leaves], held_lengths(leaves, function, axis), strict=True)


def held_lengths(leaves: Sequence[tuple[Tensor, int]], function: str, axis: Axis) -> list[Sizes]:
    """For each (tensor, dim from the end) what the ranks hold: told by all to all, in one message."""
    if not leaves:
        return []
    lengths = [int(x.shape[at]) for x, at in leaves]
    fits = ", ".join(_others(x, at) for x, at in leaves)
    held = _swapped_alike([lengths] * axis.size, fits, leaves[0][0].device, function, axis)
    return list(zip(*held, strict=True))


# --- all_gather_v <-> psum_scatter_v --------------------------------------------------------------


def all_gather_v(
    x: Tree,
    axis: AxisLike,
    *,
    sizes: Sequence[int] | None = None,
    dim: int = 0,
    reduce_dtype: torch.dtype | None = None,
) -> Tree:
    """Shards of any lengths joined along `dim`, on every rank, which goes on with them in its own way.

    V -> V. Transpose: psum_scatter_v. `unshard` is the V -> I form, for a whole that all ranks use alike.
    Shapes: x (..., sizes[i], ...) on rank i -> (..., sum(sizes), ...). Without sizes the ranks exchange them: one small
    message more, and on cuda a wait for it.
    Cost: x sent to every other rank, nothing padded. reduce_dtype: what 16-bit gradients add up in, float32 by default.
    Raises: ShapeError where sizes[i] is not this rank's length; MismatchError where exchanged shapes do not fit.

    >>> pmod.simulate(lambda: pmod.all_gather_v(torch.arange(pmod.axis_index("model")), "model"), model=3)[0]
    tensor([0, 0, 1])
    """
    bound = resolve(axis, "all_gather_v")
    asked = accumulate_in(reduce_dtype, "all_gather_v", bound)
    held = _sizes_of_leaves(x, dim, sizes, "all_gather_v", bound)

    def prepare(x: Tensor) -> tuple[Tensor, Params]:
        return x, (*next(held), asked)

    return each(ALL_GATHER, x, bound, "all_gather_v", prepare)


def psum_scatter_v(
    x: Tree, axis: AxisLike, *, sizes: Sequence[int], dim: int = 0, reduce_dtype: torch.dtype | None = None
) -> Tree:
    """Sum over the axis, keeping this rank's slice, whose length is this rank's size.

    V -> V. Transpose: all_gather_v.
    Shapes: x (..., sum(sizes), ...) -> (..., sizes[i], ...) on rank i.
    Cost: to every other rank its slice of x. 16-bit floats add up in float32 unless reduce_dtype says otherwise.
    Raises: ShapeError where sizes do not add up to x's length; ArgumentError for bool.

    >>> pmod.simulate(lambda: pmod.psum_scatter_v(torch.arange(3.0), "model", sizes=(1, 2)), model=2)
    [tensor([0.]), tensor([2., 4.])]
    """
    bound = resolve(axis, "psum_scatter_v")
    asked = accumulate_in(reduce_dtype, "psum_scatter_v", bound)
    given = check_sizes(sizes, "psum_scatter_v", bound)

    def prepare(x: Tensor) -> tuple[Tensor, Params]:
        check_sum(x, "psum_scatter_v", bound)
        at = dim_from_end(dim, x, "psum_scatter_v", bound)
        check_adds_up(x, at, given, "psum_scatter_v", bound)
        return x, (at, given, asked)

    return each(PSUM_SCATTER, x, bound, "psum_scatter_v", prepare)


# --- gather_v <-> scatter_v -----------------------------------------------------------------------


def gather_v(
    x: Tree, axis: AxisLike, *, sizes: Sequence[int] | None = None, dim: int = 0, dst: int = 0
) -> Tree:
    """Shards of any lengths joined along `dim` on dst; elsewhere a tensor of length 0 along `dim`.

    V -> V. Transpose: scatter_v.
    Shapes: x (..., sizes[i], ...) on rank i -> (..., sum(sizes), ...) on dst, (..., 0, ...) elsewhere. Without sizes
    the ranks exchange them: one small message more, and on cuda a wait for it.
    All ranks go on alike, also with what is empty: what dst alone makes of it has no second derivative elsewhere.
    Cost: x sent to dst. Raises: ShapeError where sizes[i] is not this rank's length; MismatchError where exchanged
    shapes do not fit; AxisError where dst is no index along the axis.

    >>> pmod.simulate(lambda: pmod.gather_v(torch.arange(pmod.axis_index("model")), "model", dst=1), model=2)
    [tensor([], dtype=torch.int64), tensor([0])]
    """
    bound = resolve(axis, "gather_v")
    root = check_root(dst, "gather_v", bound, name="dst")
    held = _sizes_of_leaves(x, dim, sizes, "gather_v", bound)

    def prepare(x: Tensor) -> tuple[Tensor, Params]:
        return x, (*next(held), root)

    return each(GATHER, x, bound, "gather_v", prepare)


def scatter_v(x: Tree, axis: AxisLike, *, sizes: Sequence[int], dim: int = 0, src: int = 0) -> Tree:
    """This rank's slice of src's tensor, whose length is this rank's size.

    V -> V. Transpose: gather_v. Off src, x is a placeholder of src's dtype and shape but for any length along `dim`:
    its values are not read, and its gradient is zeros of its own shape.
    Shapes: x (..., sum(sizes), ...) on src -> (..., sizes[i], ...) on rank i.
    Cost: src sends every other rank its slice. Raises: ShapeError where sizes do not add up to src's length; AxisError
    where src is no index along the axis.

    >>> pmod.simulate(lambda: pmod.scatter_v(torch.arange(3), "model", sizes=(1, 2)), model=2)
    [tensor([0]), tensor([1, 2])]
    """
    bound = resolve(axis, "scatter_v")
    root = check_root(src, "scatter_v", bound, name="src")
    given = check_sizes(sizes, "scatter_v", bound)

    def prepare(x: Tensor) -> tuple[Tensor, Params]:
        at = dim_from_end(dim, x, "scatter_v", bound)
        if bound.index != root:
            return x.narrow(at, 0, 0), (at, given, root)
        check_adds_up(x, at, given, "scatter_v", bound)
        return x, (at, given, root)

    return each(SCATTER, x, bound, "scatter_v", prepare)


# --- all_to_all_v <-> itself ----------------------------------------------------------------------


def all_to_all_v(
    x: Tree, axis: AxisLike, *, send_sizes: Sequence[int], recv_sizes: Sequence[int] | None = None, dim: int = 0
) -> Tree:
    """Cut x along `dim` into parts of these lengths, part j to rank j; join what arrives in the order of the ranks.

    V -> V. Transpose: itself, the sizes swapped.
    Shapes: x (..., sum(send_sizes), ...) -> (..., sum(recv_sizes), ...); recv_sizes[j] is rank j's send_sizes[i] on
    rank i. Without recv_sizes the ranks exchange them: one small message more, and on cuda a wait for it.
    Cost: to every other rank its part. Raises: ShapeError where send_sizes do not add up to x's length, or recv_sizes
    contradict them; MismatchError where exchanged shapes do not fit.

    >>> def swap():
    ...     x = torch.arange(3) + 10 * pmod.axis_index("model")
    ...     return pmod.all_to_all_v(x, "model", send_sizes=[(0, 3), (2, 1)][pmod.axis_index("model")])
    >>> pmod.simulate(swap, model=2)
    [tensor([10, 11]), tensor([ 0,  1,  2, 12])]
    """
    bound = resolve(axis, "all_to_all_v")
    sent = check_sizes(send_sizes, "all_to_all_v", bound, name="send_sizes")
    leaves = _leaves(x, dim, "all_to_all_v", bound)
    for leaf, at in leaves:
        check_adds_up(leaf, at, sent, "all_to_all_v", bound, "send_sizes")
    received = _received(leaves, sent, recv_sizes, "all_to_all_v", bound)

    def prepare(x: Tensor) -> tuple[Tensor, Params]:
        at = dim_from_end(dim, x, "all_to_all_v", bound)
        return x, (at, at, sent, received)

    return each(ALL_TO_ALL, x, bound, "all_to_all_v", prepare)


def _received(
    leaves: list[tuple[Tensor, int]], sent: Sizes, recv_sizes: Sequence[int] | None, function: str, axis: Axis
) -> Sizes:
    """How much each rank sends to this one: as given, or as they say."""
    if recv_sizes is None:
        if not leaves:
            return sent
        fits = ", ".join(_others(x, at) for x, at in leaves)
        answers = _swapped_alike([[size] for size in sent], fits, leaves[0][0].device, function, axis)
        return tuple(size for (size,) in answers)
    received = check_sizes(recv_sizes, function, axis, name="recv_sizes")
    if received[axis.index] != sent[axis.index]:
        given = f"recv_sizes[{axis.index}] is {received[axis.index]} but this rank sends itself {sent[axis.index]}"
        raise wrong(ShapeError, function, axis, given, "recv_sizes[j] is what rank j sends to this rank.")
    return received


# --- indexed_all_to_all_v -------------------------------------------------------------------------


@attrs.frozen(eq=False)
class ExchangePlan:
    """Which rows go to which rank, made by `exchange_plan` and used every step in place of the indices.

    `send_sizes` and `recv_sizes` count the rows per rank; `rows`, `bounds` and `place` are what is checked and sent.

    >>> def lengths():
    ...     first, none = torch.tensor([0]), torch.tensor([], dtype=torch.int64)
    ...     plan = pmod.exchange_plan([none, first], "graph")  # row 0 for rank 1
    ...     return plan.send_sizes, plan.recv_sizes
    >>> pmod.simulate(lengths, graph=2)
    [((0, 1), (0, 0)), ((0, 1), (1, 1))]
    """

    send_sizes: Sizes
    recv_sizes: Sizes
    rows: Tensor = attrs.field(repr=False)
    """The indices of all ranks, one after another."""
    bounds: tuple[int, int] = attrs.field(repr=False)
    """The smallest and the largest index; (0, -1) where there is none."""
    place: tuple[str, int] = attrs.field(repr=False)
    """The ranks of the axis, and this rank's index: the plan is for this place only."""


def exchange_plan(indices: Sequence[Tensor], axis: AxisLike) -> ExchangePlan:
    """Which rows go where, prepared once: how many rows arrive is exchanged now, in one small message.

    indices: int64 tensors of one dim, one per rank of the axis; indices[j] are the rows for rank j, on the device of
    the tensors to be sent. The plan is a value: immutable, picklable, good for tensors of any shape and dtype that have
    those rows. With it `indexed_all_to_all_v` sends the rows and nothing else, and does not wait for the device.

    Raises: ArgumentError for what is no int64 tensor; ShapeError for another number of them.

    >>> def plan():
    ...     halo = {0: [[], [2]], 1: [[0], []]}[pmod.axis_index("graph")]  # rank 0's last row, rank 1's first
    ...     return pmod.exchange_plan([torch.tensor(rows, dtype=torch.int64) for rows in halo], "graph")
    >>> pmod.simulate(plan, graph=2)[0]
    ExchangePlan(send_sizes=(0, 1), recv_sizes=(0, 1))
    """
    bound = resolve(axis, "exchange_plan")
    _check_eager("exchange_plan", bound)
    rows, sent = _rows(indices, "exchange_plan", bound)
    bounds = _bounds(rows)
    if bounds[0] < 0:
        raise wrong(ShapeError, "exchange_plan", bound, f"indices hold {bounds[0]}", "Rows count from 0.")
    received = tuple(size for (size,) in _swapped([[size] for size in sent], rows.device, bound))
    return ExchangePlan(sent, received, rows.detach().clone(), bounds, _place(bound))


def indexed_all_to_all_v(
    x: Tree,
    axis: AxisLike,
    *,
    indices: Sequence[Tensor] | ExchangePlan,
    recv_sizes: Sequence[int] | None = None,
    dim: int = 0,
    reduce_dtype: torch.dtype | None = None,
) -> Tree:
    """Send to each rank the rows of x that its indices name; join what arrives in the order of the ranks.

    V -> V. Transpose: sends back and adds into the rows the indices name; repeats add up, 16-bit ones in float32 unless
    reduce_dtype says otherwise.
    Shapes: x (..., m, ...) -> (..., sum(recv_sizes), ...), along `dim`; recv_sizes[j] is the length of rank j's
    indices[i] on rank i. indices: int64 tensors of one dim, one per rank of the axis, or an `exchange_plan`. Without a
    plan or recv_sizes the ranks exchange them: one small message more, and on cuda a wait for it.
    Cost: every row that is named, once for each time that it is named, to that rank only.
    Raises, before anything is sent: ShapeError for an index that x has no row for (without a plan, cuda is waited for
    to find it; in compiled code it is left to torch), and where recv_sizes contradict the indices; MismatchError where
    exchanged shapes do not fit; AxisError where the plan is for another axis or rank.

    >>> def ghosts():
    ...     x = torch.arange(3) + 10 * pmod.axis_index("graph")
    ...     indices = [torch.tensor([], dtype=torch.int64), torch.tensor([2, 0])]  # for rank 0, for rank 1
    ...     return pmod.indexed_all_to_all_v(x, "graph", indices=indices)
    >>> pmod.simulate(ghosts, graph=2)
    [tensor([], dtype=torch.int64), tensor([ 2,  0, 12, 10])]
    """
    function = "indexed_all_to_all_v"
    bound = resolve(axis, function)
    asked = accumulate_in(reduce_dtype, function, bound)
    leaves = _leaves(x, dim, function, bound)
    if isinstance(indices, ExchangePlan):
        _check_plan(indices, recv_sizes, function, bound)
        rows, sent, bounds = indices.rows, indices.send_sizes, indices.bounds
    else:
        rows, sent = _rows(indices, function, bound, leaves[0][0] if leaves else None)
        bounds = (0, -1) if torch.compiler.is_compiling() else _bounds(rows)
    for leaf, at in leaves:
        _check_rows(leaf, at, rows, bounds, function, bound)
    if isinstance(indices, ExchangePlan):
        received = indices.recv_sizes
    else:
        received = _received(leaves, sent, recv_sizes, function, bound)

    def prepare(x: Tensor) -> tuple[Tensor, Params]:
        at = dim_from_end(dim, x, function, bound)
        # the gradient is added up in the dtype of what is selected from
        taken = x.to(accumulator(x.dtype, asked)).index_select(at, rows).to(x.dtype)
        kept = memory_format(x)
        return taken if kept is None else taken.contiguous(memory_format=kept), (at, at, sent, received)

    return each(ALL_TO_ALL, x, bound, function, prepare)


def _rows(
    indices: Sequence[Tensor], function: str, axis: Axis, x: Tensor | None = None
) -> tuple[Tensor, Sizes]:
    """The indices of all ranks one after another, and how many each has."""
    right = f"Pass {axis.size} int64 tensors of one dim, one per rank of the axis."
    if not isinstance(indices, list | tuple) or len(indices) != axis.size:
        held = f"{len(indices)} of them" if isinstance(indices, list | tuple) else f"a {type(indices).__name__}"
        raise wrong(ShapeError, function, axis, f"indices are {held}", right)
    for rank, rows in enumerate(indices):
        if not isinstance(rows, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise wrong(ArgumentError, function, axis, f"indices[{rank}] is a {type(rows).__name__}", right)
        if rows.dtype != torch.int64 or rows.dim() != 1:
            given = f"indices[{rank}] has dtype {str(rows.dtype).removeprefix('torch.')} and {rows.dim()} dims"
            raise wrong(ArgumentError, function, axis, given, right)
        if torch._C._functorch.is_batchedtensor(rows):  # type: ignore[attr-defined]
            raise wrong(ArgumentError, function, axis, f"indices[{rank}] is mapped by vmap", "Map over x only.")
        other, name = (indices[0], "indices[0]") if x is None else (x, "x")
        if rows.device != other.device:
            given = f"indices[{rank}] is on {rows.device} and {name} is on {other.device}"
            raise wrong(ArgumentError, function, axis, given, f"Pass indices on {other.device}.")
    return torch.cat(list(indices)), tuple(len(rows) for rows in indices)


def _bounds(rows: Tensor) -> tuple[int, int]:
    if rows.numel() == 0:
        return 0, -1
    with torch._C.DisableTorchFunction():
        low, high = torch.stack(rows.aminmax()).tolist()
    return low, high


def _check_rows(x: Tensor, at: int, rows: Tensor, bounds: tuple[int, int], function: str, axis: Axis) -> None:
    if rows.device != x.device:
        given = f"indices are on {rows.device} and x is on {x.device}"
        raise wrong(ArgumentError, function, axis, given, f"Pass indices on {x.device}.")
    low, high = bounds
    if low < 0 or high >= x.shape[at]:
        given = f"indices hold {low if low < 0 else high} but x.shape[{x.dim() + at}] is {x.shape[at]}"
        raise wrong(ShapeError, function, axis, given, f"Rows are 0 to {x.shape[at] - 1}." if x.shape[at] else "")


def _place(axis: Axis) -> tuple[str, int]:
    ranks = _ranks_of(axis.key) if torch.compiler.is_compiling() else axis.group_key
    return ranks, axis.index


def _ranks_of(axis_key: str) -> str:
    return Axis.parse(axis_key).group_key


_ranks_of._dynamo_marked_constant = True  # type: ignore[attr-defined] # see _ambient._constant


def _check_plan(plan: ExchangePlan, recv_sizes: Sequence[int] | None, function: str, axis: Axis) -> None:
    place = _place(axis)
    if plan.place != place:
        given = f"the plan is for index {plan.place[1]} of the ranks {plan.place[0]}"
        right = f"This is index {place[1]} of the ranks {place[0]}: each rank makes its own plan, per axis."
        raise wrong(AxisError, function, axis, given, right)
    if recv_sizes is not None:
        raise wrong(ShapeError, function, axis, "recv_sizes and a plan are given", "The plan knows recv_sizes.")
