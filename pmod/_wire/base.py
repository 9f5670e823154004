"""The only file that sends: seven functions on flat, contiguous, real tensors.

A `Wire` joins the ranks of one axis. The base class builds everything from `all_gather`
and `all_to_all`; a backend overrides what it does better. Counts are numbers of
elements, one per rank of the axis. Every function returns a `Sent`, which is on its way
until `Sent.wait`.

Sums are taken in rank order wherever the parts are at hand, so they are the same bits
on every run and rank; 16-bit floats add up in float32 (`accumulator`), and travel in 16
bits where that halves the bytes of a large message.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pmod._wire.sent import Sent, arrived
from pmod._wire.sums import Reduction, reduce_parts

# Messages below this size are latency: one round trip beats fewer bytes. Measured with
# pmod.bench on gloo, 4 ranks.
SMALL = 16 * 1024


class Wire:
    """The ranks of one axis, as this rank sees them."""

    def __init__(self, size: int, index: int) -> None:
        self.size = size
        self.index = index

    # --- what a backend must give -----------------------------------------------------

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Sent:
        """Part j of x (`send[j]` elements) to rank j; the parts that arrive, joined in
        rank order.
        """
        raise NotImplementedError

    def barrier(self) -> None:
        """Wait for all ranks."""
        raise NotImplementedError

    # --- what follows -----------------------------------------------------------------

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Sent:
        """All ranks' x, joined in rank order."""
        return self.all_to_all(x.repeat(self.size), [x.numel()] * self.size, counts)

    def reduce_scatter(
        self, x: Tensor, counts: Sequence[int], dtype: torch.dtype
    ) -> Sent:
        """This rank's part of the sum of all x."""
        mine = counts[self.index]
        arriving = self.all_to_all(x, counts, [mine] * self.size)
        return arriving.then(
            lambda y: reduce_parts(y.view(self.size, mine).unbind(), "sum", dtype, 1)
        )

    def all_reduce(
        self, x: Tensor, how: Reduction, dtype: torch.dtype, divisor: int
    ) -> Sent:
        """The sum (in `dtype`, divided by `divisor`), maximum or minimum of all x."""
        if self.size > 2 and x.numel() * x.element_size() > SMALL:
            return self._reduce_by_parts(x, how, dtype, divisor)
        arriving = self.all_gather(x, [x.numel()] * self.size)
        return arriving.then(
            lambda y: reduce_parts(y.view(self.size, -1).unbind(), how, dtype, divisor)
        )

    def _reduce_by_parts(
        self, x: Tensor, how: Reduction, dtype: torch.dtype, divisor: int
    ) -> Sent:
        """Each rank reduces its part of x, and the parts are gathered: 2 (n-1)/n of x
        sent, in x's dtype.
        """
        counts = even_counts(x.numel(), self.size)
        mine = counts[self.index]
        arriving = self.all_to_all(x, counts, [mine] * self.size)

        def gather(y: Tensor) -> Sent:
            return self.all_gather(
                reduce_parts(y.view(self.size, mine).unbind(), how, dtype, divisor),
                counts,
            )

        return arriving.then(gather)

    def broadcast(self, x: Tensor, root: int) -> Sent:
        """The root's x on every rank."""
        send = [x.numel() if self.index == root else 0] * self.size
        recv = [x.numel() if rank == root else 0 for rank in range(self.size)]
        return self.all_to_all(
            x.repeat(self.size) if self.index == root else x[:0], send, recv
        )

    def reduce(self, x: Tensor, root: int, dtype: torch.dtype) -> Sent:
        """The sum of all x on the root, zeros elsewhere."""
        send = [x.numel() if rank == root else 0 for rank in range(self.size)]
        if self.index != root:
            return self.all_to_all(x, send, [0] * self.size).then(
                lambda _: torch.zeros_like(x)
            )
        arriving = self.all_to_all(x, send, [x.numel()] * self.size)
        return arriving.then(
            lambda y: reduce_parts(y.view(self.size, -1).unbind(), "sum", dtype, 1)
        )

    def permute(
        self,
        x: Tensor,
        target: int | None,
        source: int | None,
        count: int | None = None,
    ) -> Sent:
        """x to the target; the `count` elements (as many as x has) that the source
        sent, zeros where there is none.
        """
        count = x.numel() if count is None else count
        send = [x.numel() if rank == target else 0 for rank in range(self.size)]
        recv = [count if rank == source else 0 for rank in range(self.size)]
        arriving = self.all_to_all(x if target is not None else x[:0], send, recv)
        return arriving.then(lambda y: x.new_zeros(count) if source is None else y)


def even_counts(total: int, parts: int) -> list[int]:
    """`total` cut as evenly as it goes, the larger parts first."""
    low, more = divmod(total, parts)
    return [low + 1] * more + [low] * (parts - more)


class ShapesOnly(Wire):
    """Sends nothing and knows only shapes: how torch.compile learns what a collective
    returns.
    """

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Sent:
        return arrived(x.new_empty(sum(recv)))

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Sent:
        return arrived(x.new_empty(sum(counts)))

    def barrier(self) -> None:
        pass


class Alone(Wire):
    """An axis of one rank."""

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Sent:
        return arrived(x[: recv[0]].clone())

    def barrier(self) -> None:
        pass
