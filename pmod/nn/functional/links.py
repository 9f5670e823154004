"""Collectives along an axis that is resolved already: a layer's own messages."""

from __future__ import annotations

import torch
from torch import Tensor

from pmod._collectives.permutes import PERMUTE, Permutation
from pmod._collectives.scans import SCAN, Scan
from pmod._collectives.slices import ALL_GATHER, ALL_TO_ALL, Exchange, Parts
from pmod._collectives.values import EXTREMUM, PSUM, PVARY, SUM, Extremum
from pmod._core.bind import bind
from pmod._mesh.axis import Axis


def stacked(x: Tensor, axis: Axis) -> Tensor:
    """Return the tensors of all ranks along a new first dim. V -> V."""
    parts = Parts(-x.dim() - 1, None, None)
    return bind(ALL_GATHER.along(axis, parts), [x.unsqueeze(0)])[0]


def gathered(x: Tensor, at: int, axis: Axis, sizes: tuple[int, ...]) -> Tensor:
    """Return the shards of all ranks, joined along a dim. V -> V."""
    return bind(ALL_GATHER.along(axis, Parts(at, sizes, None)), [x])[0]


def total(x: Tensor, axis: Axis) -> Tensor:
    """Return the sum over the ranks. V -> I."""
    return bind(PSUM.along(axis, SUM), [x])[0]


def varied(x: Tensor, axis: Axis) -> Tensor:
    """Return one value, for varying use. I -> V."""
    return bind(PVARY.along(axis, SUM), [x])[0]


def sum_of_all(x: Tensor, axis: Axis) -> Tensor:
    """Return the sum over the ranks, for varying use. V -> V."""
    if axis.size == 1:
        return x
    return varied(total(x, axis), axis)


def largest(x: Tensor, axis: Axis) -> Tensor:
    """Return the largest over the ranks, of which no derivative is wanted."""
    with torch.no_grad():
        return bind(EXTREMUM.along(axis, Extremum("max")), [x.detach()])[0]


def sum_before(x: Tensor, axis: Axis) -> Tensor:
    """Return the sum over the ranks before this one. V -> V."""
    return bind(SCAN.along(axis, Scan(True, False, None)), [x])[0]


def swapped_dims(
    x: Tensor,
    axis: Axis,
    split: tuple[int, tuple[int, ...]],
    concat: tuple[int, tuple[int, ...]],
) -> Tensor:
    """Return the same whole, cut along the first dim and no longer along the second."""
    exchange = Exchange(split[0], concat[0], split[1], concat[1])
    return bind(ALL_TO_ALL.along(axis, exchange), [x])[0]


def shifted(
    x: Tensor, at: int, axis: Axis, held: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """Return the block of the rank before, and the lengths that all ranks hold then."""
    n = axis.size
    targets = tuple([(rank + 1) % n for rank in range(n)])
    given = held[-1:] + held[:-1]
    if len(set(held)) == 1:
        return bind(PERMUTE.along(axis, Permutation(targets)), [x])[0], given
    params = Permutation(targets, at, held, given)
    return bind(PERMUTE.along(axis, params), [x])[0], given


def tied(y: Tensor, block: Tensor) -> Tensor:
    """Return y, which depends on a block that it is not made of.

    Every rank must depend on every message: in backward it would not take part in
    sending it back.
    """
    if not (block.is_floating_point() or block.is_complex()):
        return y
    return y + block.narrow(-1, 0, 0).sum().to(y.dtype)
