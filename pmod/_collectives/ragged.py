"""The `_v` forms: the rows of `slices.py` with a length per rank.

Sizes are lengths along `dim`, one per rank of the
axis; 0 is a size like any other. Where they are left out the ranks tell each other, in
one small message of int64 numbers, and at once see whether their tensors fit together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pmod._collectives.exchange import (
    Sizes,
    leaves_of,
    others,
    sizes_of_leaves,
    swapped_alike,
)
from pmod._collectives.rooted import GATHER, SCATTER, RootParts
from pmod._collectives.slices import (
    ALL_GATHER,
    ALL_TO_ALL,
    PSUM_SCATTER,
    Exchange,
    Parts,
)
from pmod._core.arguments import (
    accumulate_in,
    check_adds_up,
    check_root,
    check_sizes,
    check_sum,
    dim_from_end,
    wrong,
)
from pmod._core.collective import collective
from pmod._core.row import V
from pmod._core.tree import Tree, each
from pmod._errors import ShapeError
from pmod._mesh.ambient import resolve
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import AxisLike


@collective(
    V, V, transpose="psum_scatter_v", value="shards of any lengths joined along dim"
)
def all_gather_v(
    x: Tree,
    axis: AxisLike,
    *,
    sizes: Sequence[int] | None = None,
    dim: int = 0,
    reduce_dtype: torch.dtype | None = None,
) -> Tree:
    """Join shards of any lengths along `dim`, on every rank.

    V -> V. Transpose: psum_scatter_v. `unshard` is the V -> I form, for a whole that
    all ranks use alike.
    Shapes: x (..., sizes[i], ...) on rank i -> (..., sum(sizes), ...). Without sizes
    the ranks exchange them: one small message more, and on cuda a wait for it.
    Cost: x sent to every other rank, nothing padded. reduce_dtype: what 16-bit
    gradients add up in, float32 by default.
    Raises: ShapeError where sizes[i] is not this rank's length; MismatchError where
    exchanged shapes do not fit.

    >>> pmod.simulate(lambda: pmod.all_gather_v(torch.arange(pmod.axis_index("model")), "model"), model=3)[0]
    tensor([0, 0, 1])
    """
    bound = resolve(axis, "all_gather_v")
    asked = accumulate_in(reduce_dtype, "all_gather_v", bound)
    held = sizes_of_leaves(x, dim, sizes, "all_gather_v", bound)

    def prepare(x: Tensor) -> tuple[Tensor, Parts]:
        return x, Parts(*next(held), asked)

    return each(ALL_GATHER, x, bound, "all_gather_v", prepare)


@collective(
    V,
    V,
    transpose="all_gather_v",
    value="this rank's slice of the sum, of its own length",
)
def psum_scatter_v(
    x: Tree,
    axis: AxisLike,
    *,
    sizes: Sequence[int],
    dim: int = 0,
    reduce_dtype: torch.dtype | None = None,
) -> Tree:
    """Sum over the axis, keeping this rank's slice, whose length is this rank's size.

    V -> V. Transpose: all_gather_v.
    Shapes: x (..., sum(sizes), ...) -> (..., sizes[i], ...) on rank i.
    Cost: to every other rank its slice of x. 16-bit floats add up in float32 unless
    reduce_dtype says otherwise.
    Raises: ShapeError where sizes do not add up to x's length; ArgumentError for bool.

    >>> pmod.simulate(lambda: pmod.psum_scatter_v(torch.arange(3.0), "model", sizes=(1, 2)), model=2)
    [tensor([0.]), tensor([2., 4.])]
    """
    bound = resolve(axis, "psum_scatter_v")
    asked = accumulate_in(reduce_dtype, "psum_scatter_v", bound)
    given = check_sizes(sizes, "psum_scatter_v", bound)

    def prepare(x: Tensor) -> tuple[Tensor, Parts]:
        check_sum(x, "psum_scatter_v", bound)
        at = dim_from_end(dim, x, "psum_scatter_v", bound)
        check_adds_up(x, at, given, "psum_scatter_v", bound)
        return x, Parts(at, given, asked)

    return each(PSUM_SCATTER, x, bound, "psum_scatter_v", prepare)


@collective(
    V,
    V,
    transpose="scatter_v",
    value="shards of any lengths joined on dst, nothing elsewhere",
)
def gather_v(
    x: Tree,
    axis: AxisLike,
    *,
    sizes: Sequence[int] | None = None,
    dim: int = 0,
    dst: int = 0,
) -> Tree:
    """Join shards of any lengths along `dim` on dst.

    V -> V. Transpose: scatter_v.
    Shapes: x (..., sizes[i], ...) on rank i -> (..., sum(sizes), ...) on dst, (..., 0,
    ...) elsewhere. Without sizes the ranks exchange them: one small message more, and
    on cuda a wait for it. All ranks go on alike, also with what is empty: what dst
    alone makes of it has no second derivative elsewhere.
    Cost: x sent to dst. Raises: ShapeError where sizes[i] is not this rank's length;
    MismatchError where exchanged shapes do not fit; AxisError where dst is not an index
    along the axis.

    >>> pmod.simulate(lambda: pmod.gather_v(torch.arange(pmod.axis_index("model")), "model", dst=1), model=2)
    [tensor([], dtype=torch.int64), tensor([0])]
    """
    bound = resolve(axis, "gather_v")
    root = check_root(dst, "gather_v", bound, name="dst")
    held = sizes_of_leaves(x, dim, sizes, "gather_v", bound)

    def prepare(x: Tensor) -> tuple[Tensor, RootParts]:
        return x, RootParts(*next(held), root)

    return each(GATHER, x, bound, "gather_v", prepare)


@collective(
    V,
    V,
    transpose="gather_v",
    value="this rank's slice of src's tensor, of its own length",
)
def scatter_v(
    x: Tree, axis: AxisLike, *, sizes: Sequence[int], dim: int = 0, src: int = 0
) -> Tree:
    """This rank's slice of src's tensor, whose length is this rank's size.

    V -> V. Transpose: gather_v. Off src, x is a placeholder of src's dtype and shape
    but for any length along `dim`: its values are not read, and its gradient is zeros
    of its own shape.
    Shapes: x (..., sum(sizes), ...) on src -> (..., sizes[i], ...) on rank i.
    Cost: src sends every other rank its slice. Raises: ShapeError where sizes do not
    add up to src's length; AxisError where src is not an index along the axis.

    >>> pmod.simulate(lambda: pmod.scatter_v(torch.arange(3), "model", sizes=(1, 2)), model=2)
    [tensor([0]), tensor([1, 2])]
    """
    bound = resolve(axis, "scatter_v")
    root = check_root(src, "scatter_v", bound, name="src")
    given = check_sizes(sizes, "scatter_v", bound)

    def prepare(x: Tensor) -> tuple[Tensor, RootParts]:
        at = dim_from_end(dim, x, "scatter_v", bound)
        if bound.index != root:
            return x.narrow(at, 0, 0), RootParts(at, given, root)
        check_adds_up(x, at, given, "scatter_v", bound)
        return x, RootParts(at, given, root)

    return each(SCATTER, x, bound, "scatter_v", prepare)


@collective(
    V, V, transpose="itself, the sizes swapped", value="part j to rank j, of any length"
)
def all_to_all_v(
    x: Tree,
    axis: AxisLike,
    *,
    send_sizes: Sequence[int],
    recv_sizes: Sequence[int] | None = None,
    dim: int = 0,
) -> Tree:
    """Send part j of x along `dim` to rank j, and join what arrives in rank order.

    V -> V. Transpose: itself, the sizes swapped.
    Shapes: x (..., sum(send_sizes), ...) -> (..., sum(recv_sizes), ...); recv_sizes[j]
    is rank j's send_sizes[i] on rank i. Without recv_sizes the ranks exchange them: one
    small message more, and on cuda a wait for it.
    Cost: to every other rank its part. Raises: ShapeError where send_sizes do not add
    up to x's length, or recv_sizes contradict them; MismatchError where exchanged
    shapes do not fit.

    >>> def swap():
    ...     x = torch.arange(3) + 10 * pmod.axis_index("model")
    ...     return pmod.all_to_all_v(x, "model", send_sizes=[(0, 3), (2, 1)][pmod.axis_index("model")])
    >>> pmod.simulate(swap, model=2)
    [tensor([10, 11]), tensor([ 0,  1,  2, 12])]
    """
    bound = resolve(axis, "all_to_all_v")
    sent = check_sizes(send_sizes, "all_to_all_v", bound, name="send_sizes")
    leaves = leaves_of(x, dim, "all_to_all_v", bound)
    for leaf, at in leaves:
        check_adds_up(leaf, at, sent, "all_to_all_v", bound, "send_sizes")
    received = rows_received(leaves, sent, recv_sizes, "all_to_all_v", bound)

    def prepare(x: Tensor) -> tuple[Tensor, Exchange]:
        at = dim_from_end(dim, x, "all_to_all_v", bound)
        return x, Exchange(at, at, sent, received)

    return each(ALL_TO_ALL, x, bound, "all_to_all_v", prepare)


def rows_received(
    leaves: list[tuple[Tensor, int]],
    sent: Sizes,
    recv_sizes: Sequence[int] | None,
    function: str,
    axis: Axis,
) -> Sizes:
    """How much each rank sends to this one: as given, or as they say."""
    if recv_sizes is None:
        if not leaves:
            return sent
        # one message serves all leaves
        fits = ", ".join([others(x, at) for x, at in leaves])
        answers = swapped_alike(
            [[size] for size in sent], fits, leaves[0][0].device, function, axis
        )
        return tuple(size for (size,) in answers)
    received = check_sizes(recv_sizes, function, axis, name="recv_sizes")
    if received[axis.index] != sent[axis.index]:
        given = f"recv_sizes[{axis.index}] is {received[axis.index]} but this rank sends itself {sent[axis.index]}"
        raise wrong(
            ShapeError,
            function,
            axis,
            given,
            "recv_sizes[j] is what rank j sends to this rank.",
        )
    return received
