"""Functions along a dim that is cut: softmax, sums, selections, orders."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pmod._core.arguments import (
    as_int,
    check_order,
    check_tensor,
    dim_from_end,
    shares,
    wrong,
)
from pmod._errors import ArgumentError, ShapeError, quoted
from pmod._mesh.axis import Axis
from pmod.nn.functional.given import (
    Axes,
    Held,
    Sizes,
    Spread,
    any_dim,
    bound,
    check_dtype,
    check_flags,
    check_kind,
    cuts_told,
    held_of,
)
from pmod.nn.functional.links import (
    gathered,
    largest,
    shifted,
    sum_before,
    sum_of_all,
    swapped_dims,
    tied,
)


class _Of(NamedTuple):
    """The dim that a function runs along."""

    at: int
    axis: Axis
    """The axis that errors name."""
    held: Held | None
    """None if the dim is not cut."""


def _along(
    function: str,
    x: Tensor,
    dim: object,
    axis: Axes,
    sizes: Sizes | None,
    check: Callable[[Axis], None],
) -> _Of:
    """Return the dim; an axis alone is that of it. The shards' lengths are settled.

    check: what raises before anything is sent.
    """
    number = as_int(dim)
    spread = Spread(axis, None, sizes)
    bounds = bound(function, spread, 0 if number is None else number)
    first = bounds[0][1]
    check_tensor(x, function, first, name="input")
    at = dim_from_end(dim, x, function, first)
    check(first)
    held = held_of(function, cuts_told(function, spread, bounds), x, any_dim(x))
    return _Of(at, first, held.get(at))


def _cut_along(
    function: str,
    x: Tensor,
    dim: object,
    axis: Axes,
    sizes: Sizes | None,
    dtype: torch.dtype | None,
) -> tuple[int, Axis | None]:
    """Return the dim and the axis that cuts it; no lengths are needed."""
    number = as_int(dim)
    spread = Spread(axis, None, sizes)
    bounds = bound(function, spread, 0 if number is None else number)
    first = bounds[0][1]
    check_tensor(x, function, first, name="input")
    check_dtype(dtype, function, first)
    check_kind(x, "of numbers", function, first)
    if "softmax" in function:
        check_kind(torch.empty((), dtype=dtype or x.dtype), "floating", function, first)
    cuts = cuts_told(function, spread, bounds)
    if any(cut.sizes is not None for cut in cuts):
        # lengths that are told are checked all the same
        told = [cut for cut in cuts if cut.sizes is not None]
        held_of(function, told, x, any_dim(x))
    at = dim_from_end(dim, x, function, first)
    by_dim = {dim_from_end(key, x, function, of): of for key, of in bounds}
    return at, by_dim.get(at)


def _computed(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return x in the dtype to compute in: of 16 bits torch computes in 32."""
    if dtype is not None:
        x = x.to(dtype)
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# --- softmax --------------------------------------------------------------------------


def top_of(x: Tensor, at: int, axis: Axis | None) -> Tensor:
    """Return the largest along a dim of the whole; what is computed with it may vary."""
    own = x.detach()
    if not own.shape[at]:
        # of nothing there is no largest
        own = own.new_full((), -torch.inf) + own.sum(at, keepdim=True)
    top = own.amax(at, keepdim=True)
    return top if axis is None else largest(top, axis)


def _softmax(
    function: str,
    x: Tensor,
    dim: int,
    dtype: torch.dtype | None,
    axis: Axes,
    sizes: Sizes | None,
) -> Tensor:
    """Return the softmax of the whole, or its logarithm."""
    at, of = _cut_along(function, x, dim, axis, sizes, dtype)
    is_log = function.endswith("log_softmax")
    if of is None or of.size == 1:
        torchs = torch.log_softmax if is_log else torch.softmax
        return torchs(x, at, dtype=dtype)
    wide = _computed(x, dtype)
    moved = wide - top_of(wide, at, of)
    powers = moved.exp()
    total = sum_of_all(powers.sum(at, keepdim=True), of)
    y = moved - total.log() if is_log else powers / total
    return y.to(x.dtype if dtype is None else dtype)


def softmax(
    input: Tensor,
    dim: int,
    *,
    dtype: torch.dtype | None = None,
    axis: Axes,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.softmax of the whole along a dim.

    An axis alone is that of `dim`.

    V -> V. Shapes: input (..., k, ...) -> the same.
    Cost: two numbers for each row to every rank, in two messages; no lengths are
    needed.
    Raises: ShapeError for a dim or sizes that do not fit; ArgumentError for integers.

    >>> def shares():
    ...     x = pmod.shard(torch.tensor([1.0, 2.0, 4.0]).log(), "x")
    ...     return (7 * pmod.nn.functional.softmax(x, 0, axis="x")).round(decimals=4)
    >>> pmod.simulate(shares, x=2)
    [tensor([1., 2.]), tensor([4.])]
    """
    return _softmax("nn.functional.softmax", input, dim, dtype, axis, sizes)


def log_softmax(
    input: Tensor,
    dim: int,
    *,
    dtype: torch.dtype | None = None,
    axis: Axes,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.log_softmax of the whole along a dim.

    V -> V. Shapes, Cost, Raises: as `softmax`.

    >>> def shares():
    ...     x = pmod.shard(torch.zeros(4), "x")
    ...     return pmod.nn.functional.log_softmax(x, 0, axis="x").exp()
    >>> pmod.simulate(shares, x=2)
    [tensor([0.2500, 0.2500]), tensor([0.2500, 0.2500])]
    """
    return _softmax("nn.functional.log_softmax", input, dim, dtype, axis, sizes)


# --- running sums ---------------------------------------------------------------------


def cumsum(
    input: Tensor,
    dim: int,
    *,
    dtype: torch.dtype | None = None,
    axis: Axes,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.cumsum of the whole along a dim.

    An axis alone is that of `dim`.

    V -> V. Shapes: input (..., k, ...) -> the same.
    Cost: one row to every rank after this one; no lengths are needed.
    Raises: ShapeError for a dim or sizes that do not fit.

    >>> def sums():
    ...     x = pmod.shard(torch.arange(5), "x")
    ...     return pmod.nn.functional.cumsum(x, 0, axis="x")
    >>> pmod.simulate(sums, x=2)
    [tensor([0, 1, 3]), tensor([ 6, 10])]
    """
    at, of = _cut_along("nn.functional.cumsum", input, dim, axis, sizes, dtype)
    y = input.cumsum(at, dtype=dtype)
    if of is None or of.size == 1:
        return y
    return y + sum_before(input.sum(at, keepdim=True, dtype=dtype), of)


# --- selections -----------------------------------------------------------------------


def _selected(
    x: Tensor, of: _Of, index: Tensor, select: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return rows of the whole, whose blocks pass by one after another.

    select: what takes rows of a block, by their numbers in it.
    """
    held = of.held
    assert held is not None
    check_inside(index, held.total)
    starts = [sum(held.sizes[:rank]) for rank in range(len(held.sizes))]
    block, lengths = x, held.sizes
    y: Tensor | None = None
    for step in range(held.axis.size):
        owner = (held.axis.index - step) % held.axis.size
        rows = index - starts[owner]
        if block.shape[of.at]:
            inside = (rows >= 0) & (rows < held.sizes[owner])
            some = select(block, rows.clamp(0, held.sizes[owner] - 1))
            if inside.dim() < some.dim():
                inside = inside.view([-1] + [1] * (-of.at - 1))
            some = some.where(inside, torch.zeros((), dtype=x.dtype, device=x.device))
            y = some if y is None else y + some
        elif y is not None:
            y = tied(y, block)
        if step < held.axis.size - 1:
            block, lengths = shifted(block, of.at, held.axis, lengths)
    assert y is not None
    return y


def check_inside(index: Tensor, rows: int) -> None:
    """Let torch raise for a row that is not there."""
    torch.arange(rows, device=index.device).index_select(0, index.flatten())


def check_numbers(function: str, x: object, name: str, axis: Axis) -> None:
    """Raise unless a tensor holds numbers of rows."""
    check_tensor(x, function, axis, name=name)
    assert isinstance(x, Tensor)
    if x.dtype not in (torch.int32, torch.int64):
        said = f"{name} is {x.dtype}"
        raise wrong(ArgumentError, function, axis, said, f"Pass {name}.long().")


def index_select(
    input: Tensor,
    dim: int,
    index: Tensor,
    *,
    axis: Axes,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return rows of the whole: torch.index_select along a dim that is cut.

    An axis alone is that of `dim`. index: the rows of the whole that this rank wants,
    as many as it likes. The whole's result is what all ranks want, one after another.

    V -> V. Shapes: input (..., k, ...), index (m,) -> (..., m, ...).
    Cost: n - 1 messages of a block each, which pass from rank to rank; the memory of
    one block.
    Raises: ShapeError for a dim or sizes that do not fit; ArgumentError for an index of
    another dtype; IndexError, of torch, for a row that is not there.

    >>> def picked():
    ...     x = pmod.shard(10 * torch.arange(4), "x")
    ...     return pmod.nn.functional.index_select(x, 0, torch.tensor([3, 0]), axis="x")
    >>> pmod.simulate(picked, x=2)
    [tensor([30,  0]), tensor([30,  0])]
    """
    function = "nn.functional.index_select"

    def check(first: Axis) -> None:
        check_kind(input, "of numbers", function, first)
        check_numbers(function, index, "index", first)
        if index.dim() != 1:
            said = f"index is {tuple(index.shape)}"
            raise wrong(ShapeError, function, first, said, "Pass an index of one dim.")

    of = _along(function, input, dim, axis, sizes, check)
    if of.held is None or not of.held.total:
        return input.index_select(of.at, index)
    return _selected(input, of, index, lambda x, rows: x.index_select(of.at, rows))


def take_along_dim(
    input: Tensor,
    indices: Tensor,
    dim: int,
    *,
    axis: Axes,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return elements of the whole: torch.take_along_dim along a dim that is cut.

    An axis alone is that of `dim`. indices: this rank's, rows of the whole; those of
    all ranks may be the shards of a whole, in any lengths.

    V -> V. Shapes: input (..., k, ...), indices (..., m, ...) -> (..., m, ...).
    Cost, Raises: as `index_select`.

    >>> def picked():
    ...     x = pmod.shard(10 * torch.arange(4), "x")
    ...     indices = pmod.shard(torch.tensor([3, 2, 1, 0]), "x")
    ...     return pmod.nn.functional.take_along_dim(x, indices, 0, axis="x")
    >>> pmod.simulate(picked, x=2)
    [tensor([30, 20]), tensor([10,  0])]
    """
    function = "nn.functional.take_along_dim"

    def check(first: Axis) -> None:
        check_kind(input, "of numbers", function, first)
        check_numbers(function, indices, "indices", first)
        if indices.dim() != input.dim():
            said = f"indices has {indices.dim()} dims and input {input.dim()}"
            raise wrong(ShapeError, function, first, said, "Pass as many.")

    of = _along(function, input, dim, axis, sizes, check)
    if of.held is None or not of.held.total:
        return torch.take_along_dim(input, indices, of.at)
    return _selected(
        input, of, indices, lambda x, rows: torch.take_along_dim(x, rows, of.at)
    )


# --- orders ---------------------------------------------------------------------------


def _whole_at(
    x: Tensor,
    of: _Of,
    run: Callable[[Tensor], tuple[Tensor, Tensor]],
    lengths: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Run what needs a dim whole, and return shards of these lengths along it.

    The longest other dim is cut meanwhile. Without one of two rows every rank has the
    whole.
    """
    at, held = of.at, of.held
    assert held is not None
    longest, most = 0, 1
    # on all ranks the same: along this axis they differ in one dim alone
    for dim in range(-x.dim(), 0):
        if dim != at and x.shape[dim] > most:
            longest, most = dim, int(x.shape[dim])
    if longest == 0:
        whole = gathered(x, at, held.axis, held.sizes)
        first = sum(lengths[: held.place])
        own = [y.narrow(at, first, lengths[held.place]) for y in run(whole)]
        return own[0], own[1]
    parts = shares(most, held.axis)
    swapped = swapped_dims(x, held.axis, (longest, parts), (at, held.sizes))
    out: list[Tensor] = []
    for y in run(swapped):
        out.append(swapped_dims(y, held.axis, (at, lengths), (longest, parts)))
    return out[0], out[1]


def sort(
    input: Tensor,
    dim: int = -1,
    descending: bool = False,
    stable: bool = False,
    *,
    axis: Axes,
    sizes: Sizes | None = None,
) -> tuple[Tensor, Tensor]:
    """Return this rank's shard of torch.sort of the whole along a dim.

    An axis alone is that of `dim`. While it sorts, the longest other dim is cut in its
    place; without one every rank sorts the whole. The indices are those of the whole.

    V -> V. Shapes: input (..., k, ...) -> the same, twice.
    Cost: the shard to the ranks that sort it, and it and its indices back.
    Raises: ShapeError for a dim or sizes that do not fit; ArgumentError for complex.

    >>> def ordered():
    ...     x = pmod.shard(torch.tensor([3, 0, 2, 1]), "x")
    ...     return pmod.nn.functional.sort(x, axis="x")[0]
    >>> pmod.simulate(ordered, x=2)
    [tensor([0, 1]), tensor([2, 3])]
    """
    function = "nn.functional.sort"
    check_flags(function, descending=descending, stable=stable)

    def check(first: Axis) -> None:
        check_order(input, function, first)
        check_kind(input, "of numbers", function, first)

    of = _along(function, input, dim, axis, sizes, check)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = torch.sort(
            x, dim=of.at, descending=bool(descending), stable=bool(stable)
        )
        return values, indices

    if of.held is None or of.held.axis.size == 1:
        return run(input)
    return _whole_at(input, of, run, of.held.sizes)


def topk(
    input: Tensor,
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,
    *,
    axis: Axes,
    sizes: Sizes | None = None,
) -> tuple[Tensor, Tensor]:
    """Return this rank's shard of torch.topk of the whole along a dim.

    An axis alone is that of `dim`. The k rows are cut as `split_sizes` cuts them; their
    indices are those of the whole.

    V -> V. Shapes: input (..., n, ...) -> (..., k / ranks, ...), twice.
    Cost: as `sort`, but for the way back, on which k rows go.
    Raises: as `sort`; ShapeError for a k that is more than the whole.

    >>> def first():
    ...     x = pmod.shard(torch.tensor([3, 0, 2, 1]), "x")
    ...     return pmod.nn.functional.topk(x, 2, axis="x")
    >>> pmod.simulate(first, x=2)
    [(tensor([3]), tensor([0])), (tensor([2]), tensor([2]))]
    """
    function = "nn.functional.topk"
    check_flags(function, largest=largest, sorted=sorted)
    count = as_int(k)

    def check(first: Axis) -> None:
        check_order(input, function, first)
        check_kind(input, "real", function, first)
        if count is None or count < 0:
            said = f"k is {quoted(k)}"
            raise wrong(ShapeError, function, first, said, "Pass an int of 0 or more.")

    of = _along(function, input, dim, axis, sizes, check)
    rows = int(input.shape[of.at]) if of.held is None else of.held.total
    if count is None or count > rows:
        said = f"k is {quoted(k)} and the whole has {rows} rows"
        raise wrong(ShapeError, function, of.axis, said, f"Pass an int of 0 to {rows}.")
    most, ordered = bool(largest), bool(sorted)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = torch.topk(x, count, of.at, most, ordered)
        return values, indices

    if of.held is None or of.held.axis.size == 1:
        return run(input)
    return _whole_at(input, of, run, shares(count, of.held.axis))
