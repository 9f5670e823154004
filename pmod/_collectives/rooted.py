"""The rows of the derivative table between one rank and all: `gather` and `scatter`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from pmod._collectives.slices import (
    Sizes,
    _blocks,
    _but_for_dim,
    _check_divides,
    _joined_later,
    _unit,
    _with_length,
)
from pmod._core.arguments import (
    check_adds_up,
    check_root,
    check_sizes,
    dim_from_end,
)
from pmod._core.collective import collective
from pmod._core.row import Row, V, pair
from pmod._core.tree import Tree, each
from pmod._mesh.ambient import resolve
from pmod._mesh.mesh import AxisLike
from pmod._wire.base import Wire
from pmod._wire.sent import Sent


class RootParts(NamedTuple):
    """The parameters of `gather` and `scatter`."""

    dim: int
    sizes: Sizes
    root: int
    """The index of the rank that has the whole."""


def _on_root(params: RootParts, wire: Wire) -> Sizes:
    """Return the lengths of the whole's parts: on other ranks all are 0."""
    if wire.index == params.root:
        return params.sizes
    return (0,) * wire.size


def _only_root(count: int, params: RootParts, wire: Wire) -> list[int]:
    """Return the number of elements by rank, where the root alone has any."""
    counts = [0] * wire.size
    counts[params.root] = count
    return counts


def _send_gather(x: Tensor, wire: Wire, params: RootParts) -> Sent[Tensor]:
    unit = _unit(x, params.dim)
    lengths = _on_root(params, wire)
    send = _only_root(x.numel(), params, wire)
    sent = wire.all_to_all(x.reshape(-1), send, [unit * length for length in lengths])
    return _joined_later(sent, x.shape, params.dim, lengths)


def _send_scatter(x: Tensor, wire: Wire, params: RootParts) -> Sent[Tensor]:
    dim = params.dim
    unit = _unit(x, dim)
    lengths = _on_root(params, wire)
    shape = _with_length(x.shape, dim, params.sizes[wire.index])
    recv = _only_root(math.prod(shape), params, wire)
    blocks = _blocks(x, dim, lengths)
    sent = wire.all_to_all(blocks, [unit * length for length in lengths], recv)
    return sent.then(lambda y: y.view(shape))


GATHER, SCATTER = pair(
    Row(
        "gather",
        V,
        V,
        RootParts,
        _send_gather,
        agreed=_but_for_dim,
        why="each rank has the gradient of its slice, which came from one rank",
    ),
    Row(
        "scatter",
        V,
        V,
        RootParts,
        _send_scatter,
        agreed=_but_for_dim,
        why="one rank has the gradient of the whole: each slice's goes back to its rank",
    ),
)


@collective(
    V, V, transpose="scatter", value="the shards joined on dst, nothing elsewhere"
)
def gather(x: Tree, axis: AxisLike, *, dim: int = 0, dst: int = 0) -> Tree:
    """Join the shards of all ranks along `dim` on dst.

    V -> V. Transpose: scatter. Shapes: x (..., k, ...) -> (..., n*k, ...) on dst, (...,
    0, ...) elsewhere.
    Cost: x sent to dst. Raises: ShapeError where x has no such dim; AxisError where dst
    is not an index along the axis.

    >>> pmod.simulate(lambda: pmod.gather(torch.tensor([pmod.axis_index("model")]), "model"), model=2)
    [tensor([0, 1]), tensor([], dtype=torch.int64)]
    """
    bound = resolve(axis, "gather")
    root = check_root(dst, "gather", bound, name="dst")

    def prepare(x: Tensor) -> tuple[Tensor, RootParts]:
        at = dim_from_end(dim, x, "gather", bound)
        return x, RootParts(at, (int(x.size(at)),) * bound.size, root)

    return each(GATHER, x, bound, "gather", prepare)


@collective(V, V, transpose="gather", value="this rank's slice of src's tensor")
def scatter(
    x: Tree,
    axis: AxisLike,
    *,
    dim: int = 0,
    src: int = 0,
    sizes: Sequence[int] | None = None,
) -> Tree:
    """This rank's slice of src's tensor.

    V -> V. Transpose: gather. Off src, x is a placeholder of src's shape (with sizes,
    of any length along `dim`): its values are not read, and its gradient is zeros of
    its own shape.
    Shapes: x (..., m, ...) -> (..., sizes[i], ...) on rank i; without sizes, equal
    parts.
    Cost: src sends (n-1)/n of x. Raises: ShapeError where dim does not divide by n or
    sizes do not add up to src's length; AxisError where src is not an index along the axis.

    >>> pmod.simulate(lambda: pmod.scatter(torch.arange(4) * (1 - pmod.axis_index("model")), "model"), model=2)
    [tensor([0, 1]), tensor([2, 3])]
    """
    bound = resolve(axis, "scatter")
    root = check_root(src, "scatter", bound, name="src")
    given = None if sizes is None else check_sizes(sizes, "scatter", bound)

    def prepare(x: Tensor) -> tuple[Tensor, RootParts]:
        at = dim_from_end(dim, x, "scatter", bound)
        if given is None:
            _check_divides(x, at, "scatter", bound, right="Pass sizes={sizes}.")
        elif bound.index == root:
            check_adds_up(x, at, given, "scatter", bound)
        parts = given or (int(x.shape[at]) // bound.size,) * bound.size
        # what another rank than the root passes is a placeholder, and is not sent
        params = RootParts(at, parts, root)
        if bound.index == root or bound.size == 1:
            return x, params
        return x.narrow(at, 0, 0), params

    return each(SCATTER, x, bound, "scatter", prepare)
