"""`indexed_all_to_all_v`: rows by index, as graphs and particles need them."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from pmod._collectives.exchange import Sizes, check_eager, leaves_of, swapped
from pmod._collectives.ragged import rows_received
from pmod._collectives.slices import ALL_TO_ALL, Exchange
from pmod._core.arguments import accumulate_in, dim_from_end, wrong
from pmod._core.collective import collective
from pmod._core.row import V
from pmod._core.send import memory_format
from pmod._core.tree import Tree, each
from pmod._errors import ArgumentError, AxisError, ShapeError
from pmod._mesh.ambient import resolve
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import AxisLike
from pmod._torch import constant_in_graphs, is_batched, no_function_modes
from pmod._wire.sums import accumulator


@attrs.frozen(eq=False)
class ExchangePlan:
    """Which rows go to which rank, used every step in place of the indices.

    `exchange_plan` makes it. `send_sizes` and `recv_sizes` count the rows per rank;
    `rows`, `bounds` and `place` are what is checked and sent.

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
    """Prepare which rows go where, and exchange how many arrive, in one small message.

    indices: int64 tensors of one dim, one per rank of the axis; indices[j] are the rows
    for rank j, on the device of the tensors to be sent. The plan is a value: immutable,
    picklable, good for tensors of any shape and dtype that have those rows. With it
    `indexed_all_to_all_v` sends the rows and nothing else, and does not wait for the
    device.

    Raises: ArgumentError if one is not an int64 tensor; ShapeError for another number of
    them.

    >>> def plan():
    ...     halo = {0: [[], [2]], 1: [[0], []]}[pmod.axis_index("graph")]  # rank 0's last row, rank 1's first
    ...     return pmod.exchange_plan([torch.tensor(rows, dtype=torch.int64) for rows in halo], "graph")
    >>> pmod.simulate(plan, graph=2)[0]
    ExchangePlan(send_sizes=(0, 1), recv_sizes=(0, 1))
    """
    bound = resolve(axis, "exchange_plan")
    check_eager("exchange_plan", bound)
    rows, sent = _rows(indices, "exchange_plan", bound)
    bounds = _bounds(rows)
    if bounds[0] < 0:
        raise wrong(
            ShapeError,
            "exchange_plan",
            bound,
            f"indices hold {bounds[0]}",
            "Rows count from 0.",
        )
    told = [[size] for size in sent]
    received = tuple(size for (size,) in swapped(told, rows.device, bound))
    return ExchangePlan(sent, received, rows.detach().clone(), bounds, _place(bound))


@collective(
    V,
    V,
    transpose="sends back and adds into the rows the indices name",
    value="the rows that are named, on the rank that they are named for",
)
def indexed_all_to_all_v(
    x: Tree,
    axis: AxisLike,
    *,
    indices: Sequence[Tensor] | ExchangePlan,
    recv_sizes: Sequence[int] | None = None,
    dim: int = 0,
    reduce_dtype: torch.dtype | None = None,
) -> Tree:
    """Send to each rank the rows of x that its indices name, and join what arrives.

    V -> V. Transpose: sends back and adds into the rows the indices name; repeats add
    up, 16-bit ones in float32 unless reduce_dtype says otherwise.
    Shapes: x (..., m, ...) -> (..., sum(recv_sizes), ...), along `dim`; recv_sizes[j]
    is the length of rank j's indices[i] on rank i. indices: int64 tensors of one dim,
    one per rank of the axis, or an `exchange_plan`. Without a plan or recv_sizes the
    ranks exchange them: one small message more, and on cuda a wait for it.
    Cost: every row that is named, once for each time that it is named, to that rank
    only.
    Raises, before anything is sent: ShapeError for an index that x has no row for
    (without a plan, cuda is waited for to find it; in compiled code it is left to
    torch), and where recv_sizes contradict the indices; MismatchError where exchanged
    shapes do not fit; AxisError where the plan is for another axis or rank.

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
    leaves = leaves_of(x, dim, function, bound)
    if isinstance(indices, ExchangePlan):
        _check_plan(indices, recv_sizes, function, bound)
        rows, sent, bounds = indices.rows, indices.send_sizes, indices.bounds
    else:
        rows, sent = _rows(indices, function, bound, leaves[0][0] if leaves else None)
        # compiled code reads no tensor: there torch finds a wrong index
        bounds = (0, -1) if torch.compiler.is_compiling() else _bounds(rows)
    for leaf, at in leaves:
        _check_rows(leaf, at, rows, bounds, function, bound)
    if isinstance(indices, ExchangePlan):
        received = indices.recv_sizes
    else:
        received = rows_received(leaves, sent, recv_sizes, function, bound)

    def prepare(x: Tensor) -> tuple[Tensor, Exchange]:
        at = dim_from_end(dim, x, function, bound)
        # the gradient is added up in the dtype of what is selected from
        taken = x.to(accumulator(x.dtype, asked)).index_select(at, rows).to(x.dtype)
        kept = memory_format(x)
        if kept is not None:
            taken = taken.contiguous(memory_format=kept)
        return taken, Exchange(at, at, sent, received)

    return each(ALL_TO_ALL, x, bound, function, prepare)


def _rows(
    indices: Sequence[Tensor], function: str, axis: Axis, x: Tensor | None = None
) -> tuple[Tensor, Sizes]:
    """The indices of all ranks one after another, and how many each has."""
    right = f"Pass {axis.size} int64 tensors of one dim, one per rank of the axis."
    if not isinstance(indices, list | tuple) or len(indices) != axis.size:
        held = f"a {type(indices).__name__}"
        if isinstance(indices, list | tuple):
            held = f"{len(indices)} of them"
        raise wrong(ShapeError, function, axis, f"indices are {held}", right)
    for rank, rows in enumerate(indices):
        if not isinstance(rows, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise wrong(
                ArgumentError,
                function,
                axis,
                f"indices[{rank}] is a {type(rows).__name__}",
                right,
            )
        if rows.dtype != torch.int64 or rows.dim() != 1:
            given = f"indices[{rank}] has dtype {str(rows.dtype).removeprefix('torch.')} and {rows.dim()} dims"
            raise wrong(ArgumentError, function, axis, given, right)
        if is_batched(rows):
            raise wrong(
                ArgumentError,
                function,
                axis,
                f"indices[{rank}] is mapped by vmap",
                "Map over x only.",
            )
        other, name = (indices[0], "indices[0]") if x is None else (x, "x")
        if rows.device != other.device:
            given = (
                f"indices[{rank}] is on {rows.device} and {name} is on {other.device}"
            )
            raise wrong(
                ArgumentError, function, axis, given, f"Pass indices on {other.device}."
            )
    return torch.cat(list(indices)), tuple(len(rows) for rows in indices)


def _bounds(rows: Tensor) -> tuple[int, int]:
    if rows.numel() == 0:
        return 0, -1
    with no_function_modes():
        low, high = torch.stack(rows.aminmax()).tolist()
    return low, high


def _check_rows(
    x: Tensor, at: int, rows: Tensor, bounds: tuple[int, int], function: str, axis: Axis
) -> None:
    if rows.device != x.device:
        given = f"indices are on {rows.device} and x is on {x.device}"
        raise wrong(
            ArgumentError, function, axis, given, f"Pass indices on {x.device}."
        )
    low, high = bounds
    if low < 0 or high >= x.shape[at]:
        outside = low if low < 0 else high
        given = f"indices hold {outside} but x.shape[{x.dim() + at}] is {x.shape[at]}"
        right = ""
        # no index is right where x has no row
        if x.shape[at]:
            right = f"Rows are 0 to {x.shape[at] - 1}."
        raise wrong(ShapeError, function, axis, given, right)


def _place(axis: Axis) -> tuple[str, int]:
    # compiled code cannot compute it, and takes it for a constant
    if torch.compiler.is_compiling():
        return _ranks_of(axis.key), axis.index
    return axis.group_key, axis.index


@constant_in_graphs
def _ranks_of(axis_key: str) -> str:
    return Axis.parse(axis_key).group_key


def _check_plan(
    plan: ExchangePlan, recv_sizes: Sequence[int] | None, function: str, axis: Axis
) -> None:
    place = _place(axis)
    if plan.place != place:
        given = f"the plan is for index {plan.place[1]} of the ranks {plan.place[0]}"
        right = f"This is index {place[1]} of the ranks {place[0]}: each rank makes its own plan, per axis."
        raise wrong(AxisError, function, axis, given, right)
    if recv_sizes is not None:
        raise wrong(
            ShapeError,
            function,
            axis,
            "recv_sizes and a plan are given",
            "The plan knows recv_sizes.",
        )
