"""Neighbours between clouds of points that are cut: the points go round in a ring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pmod._collectives.exchange import held_lengths
from pmod._collectives.permutes import pshift
from pmod._core.arguments import (
    as_int,
    check_own_size,
    check_sizes,
    check_tensor,
    wrong,
)
from pmod._errors import ArgumentError, ShapeError, quoted
from pmod._mesh.ambient import resolve
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import AxisLike

# so many distances are computed at a time
_AT_ONCE = 1 << 22


def knn(
    points: Tensor,
    queries: Tensor,
    k: int,
    *,
    axis: AxisLike,
    sizes: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the k points of all ranks that are nearest to each query of this rank.

    points (p, d) and queries (q, d) are this rank's of two clouds, which may be one; a
    rank may hold none. The result is (numbers, distances), both (q, k), the nearest
    first: a point's number counts the points of all ranks, one rank after another, and
    of points that are equally far the one with the smaller number is nearer. So it is
    the same however the clouds are cut. The distances are differentiable with respect
    to points and queries.
    sizes: how many points each rank holds. Without them the ranks exchange them: one
    small message more.

    V -> V. Transpose: the gradients go round in the other direction.
    Shapes: points (p, d), queries (q, d) -> (q, k) int64, (q, k). Cost: the points of
    each rank, once to every other, in n - 1 shifts; q * p * n distances.
    Raises: ShapeError for other shapes, or a k above the number of all points;
    ArgumentError for dtypes that are not alike; MismatchError for another d elsewhere.

    >>> def nearest():
    ...     mine = torch.tensor([[[0.0], [4.0]], [[1.0], [7.0]]])[pmod.axis_index("x")]
    ...     return pmod.graph.knn(mine, mine, 2, axis="x")[0].tolist()
    >>> pmod.simulate(nearest, x=2)
    [[[0, 2], [1, 2]], [[2, 0], [3, 1]]]
    """
    bound = resolve(axis, "graph.knn")
    _check_clouds(points, queries, "graph.knn", bound)
    count = as_int(k)
    if count is None or count < 1:
        raise wrong(
            ShapeError,
            "graph.knn",
            bound,
            f"k is {quoted(k)}",
            "Pass an int of 1 or more.",
        )
    held = _sizes(points, queries, sizes, "graph.knn", bound)
    if count > sum(held):
        given = f"k is {count} and all ranks together hold {sum(held)} points"
        raise wrong(
            ShapeError, "graph.knn", bound, given, f"Pass a k of at most {sum(held)}."
        )
    numbers = torch.empty((len(queries), 0), dtype=torch.int64, device=points.device)
    places = points.new_empty((len(queries), 0, points.shape[1]))
    for first, block in _blocks(points, axis, held, bound):
        found = _nearest(block, queries, count)
        # all ranks use every block, or its gradient would not be waited for
        places = torch.cat([places, block[found]], 1)
        numbers = torch.cat([numbers, found + first], 1)
        best = _ordered(numbers, places, queries)[:, :count]
        numbers = numbers.gather(1, best)
        places = places.gather(1, best.unsqueeze(-1).expand(-1, -1, places.shape[-1]))
    return numbers, torch.linalg.vector_norm(places - queries[:, None], dim=-1)


def radius_search(
    points: Tensor,
    queries: Tensor,
    radius: float,
    *,
    axis: AxisLike,
    sizes: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the points of all ranks within a radius of each query of this rank.

    Arguments and numbers as in `knn`; a point at exactly the radius is within it. The
    result is (pairs, distances): pairs (2, m) int64 has the number of a query of this
    rank, counted on this rank, and that of a point, counted over all ranks, by query
    and then by point; distances are (m,), and differentiable.

    V -> V. Transpose: the gradients go round in the other direction.
    Shapes: points (p, d), queries (q, d) -> (2, m) int64, (m,). Cost: as `knn`.
    Raises: as `knn`; ArgumentError if radius is not a number of 0 or more.

    >>> def within():
    ...     mine = torch.tensor([[[0.0], [4.0]], [[1.0], [7.0]]])[pmod.axis_index("x")]
    ...     return pmod.graph.radius_search(mine, mine, 3.0, axis="x")[0].tolist()
    >>> pmod.simulate(within, x=2)
    [[[0, 0, 1, 1, 1], [0, 2, 1, 2, 3]], [[0, 0, 0, 1, 1], [0, 1, 2, 1, 3]]]
    """
    bound = resolve(axis, "graph.radius_search")
    _check_clouds(points, queries, "graph.radius_search", bound)
    if type(radius) not in (int, float) or not radius >= 0:
        given = f"radius is {quoted(radius)}"
        raise wrong(
            ArgumentError,
            "graph.radius_search",
            bound,
            given,
            "Pass a number of 0 or more.",
        )
    held = _sizes(points, queries, sizes, "graph.radius_search", bound)
    pairs: list[Tensor] = []
    places: list[Tensor] = []
    for first, block in _blocks(points, axis, held, bound):
        of, found = _within(block, queries, float(radius))
        pairs.append(torch.stack([of, found + first]))
        places.append(block[found])
    joined = torch.cat(pairs, 1)
    # by point, then stably by query
    order = joined[1].argsort(stable=True)
    order = order[joined[0][order].argsort(stable=True)]
    joined = joined[:, order]
    apart = torch.cat(places)[order] - queries[joined[0]]
    return joined, torch.linalg.vector_norm(apart, dim=-1)


def _check_clouds(points: Tensor, queries: Tensor, function: str, axis: Axis) -> None:
    for name, x in (("points", points), ("queries", queries)):
        check_tensor(x, function, axis, name=name)
        if x.dim() != 2:
            given = f"{name} has the shape {tuple(x.shape)}"
            raise wrong(
                ShapeError,
                function,
                axis,
                given,
                "Pass a row for each point: (count, d).",
            )
        if not x.is_floating_point():
            given = f"{name} is {str(x.dtype).removeprefix('torch.')}"
            raise wrong(ArgumentError, function, axis, given, f"Pass {name}.double().")
    if points.shape[1] != queries.shape[1]:
        given = (
            f"points have {points.shape[1]} coordinates and queries {queries.shape[1]}"
        )
        raise wrong(ShapeError, function, axis, given, "Pass two clouds in one space.")
    if points.dtype != queries.dtype or points.device != queries.device:
        given = f"points are {points.dtype} on {points.device} and queries {queries.dtype} on {queries.device}"
        raise wrong(
            ArgumentError,
            function,
            axis,
            given,
            "Pass two clouds of one dtype on one device.",
        )


def _sizes(
    points: Tensor,
    queries: Tensor,
    sizes: Sequence[int] | None,
    function: str,
    axis: Axis,
) -> tuple[int, ...]:
    if sizes is None:
        return held_lengths([(points, -2)], function, axis)[0]
    told = check_sizes(sizes, function, axis)
    right = "Pass how many points each rank holds, or leave sizes out to exchange them."
    check_own_size(points, -2, told, function, axis, right)
    return told


def _blocks(
    points: Tensor, over: AxisLike, held: tuple[int, ...], axis: Axis
) -> Iterator[tuple[int, Tensor]]:
    """Yield the points of each rank, with the number of their first, this rank's first."""
    block = points
    for step in range(axis.size):
        if step:
            sizes = [held[rank - step + 1] for rank in range(axis.size)]
            block = pshift(block, over, sizes=sizes)
        owner = (axis.index - step) % axis.size
        yield sum(held[:owner]), block


def _squares(block: Tensor, queries: Tensor) -> Tensor:
    """Return the squared distances (q, p), each the same in whatever block it is."""
    total = queries.new_zeros((len(queries), len(block)))
    # one dim after the other: a product of matrices would round unlike for each shape
    for q, p in zip(queries.unbind(1), block.unbind(1), strict=True):
        total += (q[:, None] - p[None, :]).square()
    return total


def _chunks(block: Tensor, queries: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the squared distances of some queries at a time, with the first of these."""
    rows = max(_AT_ONCE // max(len(block), 1), 1)
    with torch.no_grad():
        for first in range(0, len(queries), rows):
            some = queries.detach()[first : first + rows]
            yield first, _squares(block.detach(), some)


def _nearest(block: Tensor, queries: Tensor, k: int) -> Tensor:
    """Return the places in a block of the k nearest points, or of all of fewer."""
    few = min(k, len(block))
    found = [queries.new_empty((0, few), dtype=torch.int64)]
    for _, squares in _chunks(block, queries):
        found.append(squares.sort(dim=1, stable=True).indices[:, :few])
    return torch.cat(found)


def _ordered(numbers: Tensor, places: Tensor, queries: Tensor) -> Tensor:
    """Return the order of candidates by distance, then by number."""
    with torch.no_grad():
        squares = queries.new_zeros(numbers.shape)
        for q, p in zip(queries.unbind(1), places.unbind(2), strict=True):
            squares += (q[:, None] - p).square()
        order = numbers.argsort(dim=1, stable=True)
        return order.gather(1, squares.gather(1, order).argsort(dim=1, stable=True))


def _within(block: Tensor, queries: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Return the pairs of a query and a point of a block that are near."""
    none = queries.new_empty((0,), dtype=torch.int64)
    of, found = [none], [none]
    for first, squares in _chunks(block, queries):
        near = (squares.sqrt() <= radius).nonzero()
        of.append(near[:, 0] + first)
        found.append(near[:, 1])
    return torch.cat(of), torch.cat(found)
