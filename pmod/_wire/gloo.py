"""gloo: tensors on the CPU, from rank to rank, each message with a tag of its call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from pmod._ranks.backends import Backend
from pmod._ranks.blocking import InThread
from pmod._wire.base import SMALL
from pmod._wire.counts import scaled_counts
from pmod._wire.process_group import CARRIED, GroupWire, as_bytes
from pmod._wire.sent import Sent, arrived
from pmod._wire.sums import Reduction, bytes_of, reduce_into
from pmod._wire.traffic import count_bytes
from pmod._wire.waiting import Work

# The tag of what belongs to no call.
TAG = 0x706D

Part = tuple[Tensor, int]
"""A tensor, and the rank that it goes to or comes from."""


class GlooWire(GroupWire):
    """A process group on gloo, by its sends and receives.

    gloo's collectives have no tags, and abort at unlike lengths.
    """

    _exchanges = 0  # of this message, so far

    def all_to_all(
        self, x: Tensor, send: Sequence[int], recv: Sequence[int]
    ) -> Sent[Tensor]:
        out = x.new_empty(sum(recv))
        work = self._exchange(out, x, send, recv)
        return self._on_its_way(work, lambda: out)

    def _exchange(
        self, out: Tensor, x: Tensor, send: Sequence[int], recv: Sequence[int]
    ) -> Work:
        """Send parts of x, and receive into `out`; as `all_to_all` does."""
        carried_out, carried_x = out, x
        if x.dtype not in self._backend.carries:
            carried_out, carried_x, send, recv = as_bytes(out, x, send, recv)
        ins, outs = carried_x.split(list(send)), carried_out.split(list(recv))
        if self._wait is not None:
            # Ranks that expect other lengths wait for ever, because the length is part
            # of a tag. From these bytes they learn why.
            nbytes = carried_x.element_size()
            sent, expected = scaled_counts(nbytes, send), scaled_counts(nbytes, recv)
            self._wait.exchange = (self._exchanges, sent, expected)
        leaving, arriving = self._of_others(ins, send), self._of_others(outs, recv)
        work = self._peer_to_peer(leaving, arriving)
        outs[self.index].copy_(ins[self.index])
        return work

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Sent[Tensor]:
        if x.dtype not in self._backend.carries:
            return self._gather_bytes(x, counts)
        out = x.new_empty(sum(counts))
        parts = out.split(list(counts))
        parts[self.index].copy_(x)
        return self._on_its_way(self._join(parts), lambda: out)

    def _join(self, parts: Sequence[Tensor]) -> Work:
        """Send this rank's part of a result, and receive the others where they lie."""
        parts = [self._carried(part) for part in parts]
        own, counts = parts[self.index], [part.numel() for part in parts]
        leaving = self._of_others([own] * self.size, [own.numel()] * self.size)
        return self._peer_to_peer(leaving, self._of_others(parts, counts))

    def all_reduce(
        self, x: Tensor, how: Reduction, dtype: torch.dtype, divisor: int
    ) -> Sent[Tensor]:
        if x.nbytes <= SMALL:
            return super().all_reduce(x, how, dtype, divisor)
        # What is large is added up where it arrives: beside the result, no copy of the
        # message is held.
        if self.size > 2:
            return self._reduce_by_parts(x, how, dtype, divisor)
        out, other = torch.empty_like(x), 1 - self.index
        work = self._peer_to_peer(
            [(self._carried(x), other)], [(self._carried(out), other)]
        )

        def add() -> Tensor:
            parts = [x, out] if self.index == 0 else [out, x]
            reduce_into(out, parts, how, dtype, divisor)
            return out

        return self._on_its_way(work, add)

    def _reduce_by_parts(
        self, x: Tensor, how: Reduction, dtype: torch.dtype, divisor: int
    ) -> Sent[Tensor]:
        counts = self.even(x.numel())
        mine = counts[self.index]
        # one memory for the parts that arrive first, and then for the result
        memory = x.new_empty(max(self.size * mine, x.numel()))
        parts = memory[: self.size * mine]
        work = self._exchange(parts, x, counts, [mine] * self.size)

        def gather() -> Sent[Tensor]:
            reduced = x.new_empty(mine)
            rows = parts.view(self.size, mine).unbind()
            reduce_into(reduced, rows, how, dtype, divisor)
            # no view, which autograd would copy
            rest = memory.numel() - x.numel()
            out, _ = torch.unsafe_split_with_sizes(memory, [x.numel(), rest])
            places = out.split(counts)
            places[self.index].copy_(reduced)
            return self._on_its_way(self._join(places), lambda: out)

        return self._on_its_way(work, lambda: None).then(lambda _: gather())

    def _peer_to_peer(self, leaving: Sequence[Part], arriving: Sequence[Part]) -> Work:
        """Send and receive in a thread, because gloo blocks until two ranks connect."""
        tag = self._tags()
        count_bytes(_nbytes(leaving), _nbytes(arriving), len(leaving))

        def run() -> None:
            # All begin before one is waited for: two ranks that send to each other
            # would else wait for each other.
            works = [self.group.recv([x], rank, tag(x)) for x, rank in arriving]
            works += [self.group.send([x], rank, tag(x)) for x, rank in leaving]
            for work in works:
                work.wait()

        ranks = [rank for _, rank in [*leaving, *arriving]]
        return InThread(run, lambda: _cut_off(self.group, ranks))

    def _tags(self) -> Callable[[Tensor], int]:
        """Return what gives the messages of one exchange their tags.

        gloo gives a message to whoever asks for its tag, and trusts its length.
        """
        wait, number = self._wait, self._exchanges
        self._exchanges += 1
        if wait is None:
            return lambda part: TAG
        return lambda part: wait.tag(number, part.nbytes)

    def _of_others(
        self, tensors: Sequence[Tensor], counts: Sequence[int]
    ) -> list[Part]:
        """Return the tensors of the other ranks, without those of no elements."""
        # They start with the next rank, so that not all send to the same one first.
        size = self.size
        others = [(self.index + step) % size for step in range(1, size)]
        return [(tensors[rank], rank) for rank in others if counts[rank]]

    def broadcast(self, x: Tensor, root: int) -> Sent[Tensor]:
        out = x.clone() if self.index == root else torch.empty_like(x)
        work = self._down_a_tree(self._carried(out), root)
        return self._on_its_way(work, lambda: out)

    def _down_a_tree(self, x: Tensor, root: int) -> Work:
        """Carry the root's x to all in ceil(log2 n) steps.

        The ranks form a binomial tree, counted from the root.
        """
        place, size = (self.index - root) % self.size, self.size
        steps = (size - 1).bit_length()
        # This rank serves the places from place + 1 to place + span - 1. The span is
        # the lowest bit of its place; the root's place has none, and it serves all.
        span = place & -place or 1 << steps
        halves = [span >> step for step in range(1, span.bit_length())]
        below = [(place + half + root) % size for half in halves if place + half < size]
        above = (place - span + root) % size
        tag = self._tags()(x)
        count_bytes(len(below) * x.nbytes, x.nbytes if place else 0, steps)

        def run() -> None:
            if place:
                self.group.recv([x], above, tag).wait()
            works = [self.group.send([x], rank, tag) for rank in below]
            for work in works:
                work.wait()

        return InThread(run, lambda: _cut_off(self.group, [*below, above]))

    def permute(
        self,
        x: Tensor,
        target: int | None,
        source: int | None,
        count: int | None = None,
    ) -> Sent[Tensor]:
        # An all_to_all, as in the base class, would trouble every rank of the axis.
        if count is None:
            count = x.numel()
        if x.dtype not in self._backend.carries:
            dtype, scale = x.dtype, x.element_size()
            as_bytes = self.permute(bytes_of(x), target, source, scale * count)
            return as_bytes.then(lambda y: y.view(dtype))
        if target == self.index:
            return arrived(x.clone())
        # What is empty is not sent, as both sides know.
        leaving: list[Part] = []
        arriving: list[Part] = []
        if target is not None and x.numel():
            leaving.append((x, target))
        if source is None:
            out = x.new_zeros(count)
        else:
            out = x.new_empty(count)
            if count:
                arriving.append((out, source))
        work = self._peer_to_peer(leaving, arriving)
        return self._on_its_way(work, lambda: out)


def _nbytes(parts: Sequence[Part]) -> int:
    return sum([x.nbytes for x, _ in parts])


def _cut_off(group: Any, ranks: Sequence[int] | None = None) -> None:
    """Close the connections of a group.

    ranks: those of its ranks with which it is connected. By default they are taken to
    be the neighbours.
    """
    if ranks is None:
        ranks = [(group.rank() + step) % group.size() for step in (1, -1)]
    for rank in ranks:
        # gloo closes the connections, all of them, where a receive does not come in
        # time; it says so as a RuntimeError.
        with contextlib.suppress(RuntimeError):
            group.recv([torch.empty(1)], rank, TAG).wait(timedelta(milliseconds=1))


GLOO = Backend(
    "gloo",
    "cpu",
    GlooWire,
    blocks=True,
    tags=True,
    cut_off=_cut_off,
    carries=CARRIED,
)
