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
    # torch adds no tensor of 8 bits to one of another dtype
    if is_eight_bits(part):
        part = part.to(total.dtype)
    return total + part


def _totals(parts: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Return the running sums, in `dtype`, of parts in the order of the scan."""
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
        # two messages cost more than they save, for what is small or goes to one rank
        if wire.size > 2 and y.nbytes > SMALL:
            return _scan_by_parts(y, wire, order, exclusive, dtype)
        return _scan_whole(y, wire, order, exclusive, dtype)

    return real_sum(x, send)


def _scan_whole(
    x: Tensor, wire: Wire, order: range, exclusive: bool, dtype: torch.dtype
) -> Sent[Tensor]:
    """Send x to the ranks after this one, and add up what comes from those before it.

    It takes one round trip.
    """
    here = order.index(wire.index)
    # its own part is not sent, but stands in both: an estimate has no other part
    send, recv = [0] * wire.size, [0] * wire.size
    for rank in order[here:]:
        send[rank] = x.numel()
    for rank in order[: here + 1]:
        recv[rank] = x.numel()

    def add_up(y: Tensor) -> Tensor:
        parts = y.split(recv)
        last = here if exclusive else here + 1
        before = [parts[rank] for rank in order[:last]]
        if not before:
            return torch.zeros_like(x)
        # a copy: one part alone would be a view of the message
        return list(_totals(before, dtype))[-1].to(x.dtype, copy=True)

    return wire.all_to_all(x.repeat(wire.size - here), send, recv).then(add_up)


def _scan_by_parts(
    x: Tensor, wire: Wire, order: range, exclusive: bool, dtype: torch.dtype
) -> Sent[Tensor]:
    """Scan this rank's part of every rank's x, and give each rank its own.

    2 (n-1)/n of x is sent, in x's dtype.
    """
    counts = even_counts(x.numel(), wire.size)
    mine = [counts[wire.index]] * wire.size

    def give_back(y: Tensor) -> Sent[Tensor]:
        parts = y.split(mine)
        in_order = [parts[rank] for rank in order]
        totals = [total.to(x.dtype) for total in _totals(in_order, dtype)]
        if exclusive:
            totals = [torch.zeros_like(totals[0]), *totals[:-1]]
        # a message is in the order of the ranks, which is that of the scan or its reverse
        by_rank = totals[:: order.step]
        return wire.all_to_all(torch.cat(by_rank), mine, counts)

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
    """Return the running sum over the axis: on each rank the sum over the ranks up to it.

    It includes the rank itself. exclusive: without it, so zeros on the first rank; reverse: over the ranks from
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
