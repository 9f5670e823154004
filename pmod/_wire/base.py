"""The only file that sends: seven functions on flat, contiguous, real tensors.

A `Wire` joins the ranks of one axis. The base class builds everything from `all_gather`
and `all_to_all`; a backend overrides what it does better. Counts are numbers of
elements, one per rank of the axis. Every function returns a `Sent`, which is on its way
until `Sent.wait`.

Sums are taken in rank order wherever the parts are at hand, so they are the same bits
on every run and rank. Floats of 16 bits add up in float32 (`accumulator`). They travel
in 16 bits where that halves the bytes of a large message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from pmod._wire.sent import Sent, arrived
from pmod._wire.sums import Reduction, reduce_parts

AtOnce: TypeAlias = Callable[[Tensor], Tensor]
"""Sends a tensor, waits, and returns what arrives."""

# Messages below this size are latency: one round trip beats fewer bytes. Measured with
# pmod.bench on gloo, 4 ranks.
SMALL = 16 * 1024


class Wire:
    """The ranks of one axis, as this rank sees them.

    A backend must give `all_to_all` and `barrier`; the rest follows from these.
    """

    def __init__(self, size: int, index: int) -> None:
        self.size = size
        self.index = index

    def equal(self, count: int) -> Sequence[int]:
        """Return one count for every rank."""
        return [count] * self.size

    def even(self, number: int) -> Sequence[int]:
        """Cut `number` as evenly as it goes, the larger parts first."""
        return even_counts(number, self.size)

    def only_at(self, rank: int | None, count: int) -> Sequence[int]:
        """Return the count at the place of a rank, if there is one, and else zeros."""
        return counts_at(rank, count, self.size)

    def combined(
        self, parts: Tensor, how: Reduction, dtype: torch.dtype, divisor: int
    ) -> Tensor:
        """Combine what arrived, a row from each rank, in the order of the ranks."""
        return reduce_parts(parts, how, dtype, divisor)

    def all_to_all(
        self, x: Tensor, send: Sequence[int], recv: Sequence[int]
    ) -> Sent[Tensor]:
        """Send part j of x (`send[j]` elements) to rank j.

        Returns the parts that arrive, joined in rank order.
        """
        raise NotImplementedError

    def barrier(self) -> None:
        """Wait for all ranks."""
        raise NotImplementedError

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Sent[Tensor]:
        """Return all ranks' x, joined in rank order."""
        return self.all_to_all(x.repeat(self.size), self.equal(x.numel()), counts)

    def reduce_scatter(
        self, x: Tensor, counts: Sequence[int], dtype: torch.dtype
    ) -> Sent[Tensor]:
        """Return this rank's part of the sum of all x."""
        mine = counts[self.index]
        arriving = self.all_to_all(x, counts, self.equal(mine))
        return arriving.then(
            lambda y: self.combined(y.view(self.size, mine), "sum", dtype, 1)
        )

    def all_reduce(
        self, x: Tensor, how: Reduction, dtype: torch.dtype, divisor: int
    ) -> Sent[Tensor]:
        """Return the sum, the maximum or the minimum of all x.

        A sum is taken in `dtype`, and divided by `divisor`.
        """
        # Two ranks send the same bytes either way, so they save the second round trip.
        if self.size > 2 and x.numel() * x.element_size() > SMALL:
            return self._reduce_by_parts(x, how, dtype, divisor)
        arriving = self.all_gather(x, self.equal(x.numel()))
        return arriving.then(
            lambda y: self.combined(y.view(self.size, -1), how, dtype, divisor)
        )

    def _reduce_by_parts(
        self, x: Tensor, how: Reduction, dtype: torch.dtype, divisor: int
    ) -> Sent[Tensor]:
        """Reduce a part of x on each rank, and gather the parts.

        This sends 2 (n-1)/n of x, in x's dtype.
        """
        counts = self.even(x.numel())
        mine = counts[self.index]
        arriving = self.all_to_all(x, counts, self.equal(mine))

        def gather(y: Tensor) -> Sent[Tensor]:
            parts = y.view(self.size, mine)
            return self.all_gather(self.combined(parts, how, dtype, divisor), counts)

        return arriving.then(gather)

    def broadcast(self, x: Tensor, root: int) -> Sent[Tensor]:
        """Return the root's x on every rank."""
        recv = self.only_at(root, x.numel())
        if self.index != root:
            return self.all_to_all(x[:0], self.equal(0), recv)
        return self.all_to_all(x.repeat(self.size), self.equal(x.numel()), recv)

    def reduce(self, x: Tensor, root: int, dtype: torch.dtype) -> Sent[Tensor]:
        """Return the sum of all x on the root, zeros elsewhere."""
        send = self.only_at(root, x.numel())
        if self.index != root:
            arriving = self.all_to_all(x, send, self.equal(0))
            return arriving.then(lambda _: torch.zeros_like(x))
        arriving = self.all_to_all(x, send, self.equal(x.numel()))
        return arriving.then(
            lambda y: self.combined(y.view(self.size, -1), "sum", dtype, 1)
        )

    def permute(
        self,
        x: Tensor,
        target: int | None,
        source: int | None,
        count: int | None = None,
    ) -> Sent[Tensor]:
        """Send x to the target, and return what the source sent: zeros without one.

        count: how many elements arrive; by default as many as x has.
        """
        if count is None:
            count = x.numel()
        send = self.only_at(target, x.numel())
        recv = self.only_at(source, count)
        sent = x[:0] if target is None else x
        arriving = self.all_to_all(sent, send, recv)
        if source is None:
            return arriving.then(lambda _: x.new_zeros(count))
        return arriving

    def ready_sum(
        self, like: Tensor, dtype: torch.dtype, divisor: int
    ) -> AtOnce | None:
        """Return what adds up tensors like this one, and waits; as `all_reduce` does.

        None where the wire has no shorter way.
        """
        return None

    def ready_broadcast(self, like: Tensor, root: int) -> AtOnce | None:
        """Return what brings the root's tensor, and waits; as `broadcast` does."""
        return None

    def ready_gather(self, like: Tensor) -> AtOnce | None:
        """Return what joins along the first dim, and waits; as `all_gather` does."""
        return None

    def ready_scatter(self, like: Tensor, dtype: torch.dtype) -> AtOnce | None:
        """Return what adds up equal parts of the first dim; as `reduce_scatter` does."""
        return None

    def ready_exchange(
        self, like: Tensor, rows: tuple[list[int], list[int]] | None = None
    ) -> AtOnce | None:
        """Return what sends parts of the first dim, and waits; as `all_to_all` does.

        rows: how many go to each rank and come from each, as many in all; by default
        the parts are equal.
        """
        return None


def even_counts(total: int, parts: int) -> list[int]:
    """Cut `total` as evenly as it goes, the larger parts first."""
    low, more = divmod(total, parts)
    return [low + 1] * more + [low] * (parts - more)


def counts_at(rank: int | None, count: int, size: int) -> list[int]:
    """Return `count` at the place of a rank, if there is one, and zeros elsewhere."""
    counts = [0] * size
    if rank is not None:
        counts[rank] = count
    return counts


class ShapesOnly(Wire):
    """A wire that sends nothing: from it torch.compile learns the shapes of results."""

    def all_to_all(
        self, x: Tensor, send: Sequence[int], recv: Sequence[int]
    ) -> Sent[Tensor]:
        return arrived(x.new_empty(sum(recv)))

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Sent[Tensor]:
        return arrived(x.new_empty(sum(counts)))

    def barrier(self) -> None:
        pass


class Alone(Wire):
    """The wire along an axis of one rank."""

    def all_to_all(
        self, x: Tensor, send: Sequence[int], recv: Sequence[int]
    ) -> Sent[Tensor]:
        return arrived(x[: recv[0]].clone())

    def barrier(self) -> None:
        pass
