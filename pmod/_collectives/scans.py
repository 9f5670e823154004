"""`pscan`: each rank gets the sum over the ranks up to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from pmod._collectives.values import fused
from pmod._core.arguments import accumulate_in, check_flag, check_sum
from pmod._core.collective import collective
from pmod._core.row import Row, V, pair
from pmod._core.tree import Tree
from pmod._mesh.ambient import resolve
from pmod._mesh.mesh import AxisLike
from pmod._wire.base import SMALL, Wire, even_counts
from pmod._wire.sent import Sent
from pmod._wire.sums import accumulator, is_eight_bits, real_sum


def _added(total: Tensor, part: Tensor) -> Tensor:
    return total + (part.to(total.dtype) if is_eight_bits(part) else part)


def _totals(parts: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """The running sums of parts that are given in the order of the scan, each in
    `dtype`.
    """
    return accumulate(parts[1:], _added, initial=parts[0].to(dtype))


class Scan(NamedTuple):
    """The parameters of `pscan`."""

    exclusive: bool
    reverse: bool
    reduce_dtype: str | None
    """The name of the dtype that 16-bit floats add up in; None for float32."""


def _send_scan(x: Tensor, wire: Wire, params: Scan) -> Sent[Tensor]:
    exclusive, reverse, asked = params
    order = range(wire.size)[::-1] if reverse else range(wire.size)

    def send(y: Tensor, _: int) -> Sent[Tensor]:
        dtype = accumulator(y.dtype, asked)
        by_parts = wire.size > 2 and y.nbytes > SMALL
        return (_scan_by_parts if by_parts else _scan_whole)(
            y, wire, order, exclusive, dtype
        )

    return real_sum(x, send)


def _scan_whole(
    x: Tensor, wire: Wire, order: range, exclusive: bool, dtype: torch.dtype
) -> Sent[Tensor]:
    """Each rank sends x to those after it, in one round trip, and adds up what comes
    from those before it.
    """
    here, n = order.index(wire.index), x.numel()
    # its own part is not sent; it stands where an estimate, which has no other, finds
    # it
    send = [n if order.index(rank) >= here else 0 for rank in range(wire.size)]
    recv = [n if order.index(rank) <= here else 0 for rank in range(wire.size)]

    def add_up(y: Tensor) -> Tensor:
        parts = y.split(recv)
        before = [parts[rank] for rank in order[: here + (not exclusive)]]
        return (
            list(_totals(before, dtype))[-1].to(x.dtype, copy=True)
            if before
            else torch.zeros_like(x)
        )

    return wire.all_to_all(x.repeat(wire.size - here), send, recv).then(add_up)


def _scan_by_parts(
    x: Tensor, wire: Wire, order: range, exclusive: bool, dtype: torch.dtype
) -> Sent[Tensor]:
    """Each rank scans its part of every rank's x, and gives each its own: 2 (n-1)/n of
    x sent, in x's dtype.
    """
    counts = even_counts(x.numel(), wire.size)
    mine = [counts[wire.index]] * wire.size

    def give_back(y: Tensor) -> Sent[Tensor]:
        parts = y.split(mine)
        totals = [
            total.to(x.dtype)
            for total in _totals([parts[rank] for rank in order], dtype)
        ]
        if exclusive:
            totals = [torch.zeros_like(totals[0]), *totals[:-1]]
        return wire.all_to_all(
            torch.cat([totals[order.index(rank)] for rank in range(wire.size)]),
            mine,
            counts,
        )

    return wire.all_to_all(x, counts, mine).then(give_back)


def _turned(params: Scan) -> Scan:
    exclusive, reverse, asked = params
    return Scan(exclusive, not reverse, asked)


# on one rank an exclusive scan is 0, and no identity
SCAN = Row(
    "scan",
    V,
    V,
    Scan,
    _send_scan,
    flip=_turned,
    fused=True,
    alone=False,
    why="each value went into the sums of the ranks after it: their gradients add up",
)
pair(SCAN, SCAN)


@collective(
    V,
    V,
    transpose="the scan in the other direction",
    value="the sum over the ranks up to this one",
)
def pscan(
    x: Tree,
    axis: AxisLike,
    *,
    exclusive: bool = False,
    reverse: bool = False,
    reduce_dtype: torch.dtype | None = None,
) -> Tree:
    """The running sum over the axis: on each rank the sum over the ranks up to it,
    itself among them.

    exclusive: without itself, so zeros on the first rank; reverse: over the ranks from
    this one on.
    V -> V. Transpose: the scan in the other direction.
    Shapes: x (...) -> (...), the same shape on all ranks.
    Cost: x sent to every rank after this one; where that is much, 2 (n-1)/n of x in two
    messages. Sums are taken in the order of the ranks, and are the same bits on every
    run. Floats of 16 and 8 bits add up in float32 (`reduce_dtype` to change that) and
    come back in x's dtype. Trees travel as one message per dtype and device. Numbers
    come back as Python numbers, as from `psum`.
    Raises: ArgumentError for bool tensors.
    JAX: lax.cumsum over a dim, which has `reverse` too. MPI: Scan, and Exscan where
    exclusive.

    >>> pmod.simulate(lambda: pmod.pscan(torch.tensor(1 + pmod.axis_index("x")), "x"), x=3)
    [tensor(1), tensor(3), tensor(6)]
    >>> pmod.simulate(lambda: pmod.pscan(5 + pmod.axis_index("x"), "x", exclusive=True), x=3)  # where rows begin
    [0, 5, 11]
    """
    bound = resolve(axis, "pscan")
    check_flag(exclusive, "pscan", "exclusive")
    check_flag(reverse, "pscan", "reverse")
    params = Scan(
        bool(exclusive),
        bool(reverse),
        accumulate_in(reduce_dtype, "pscan", bound),
    )
    return fused("pscan", SCAN, x, bound, params, check_sum, int)
