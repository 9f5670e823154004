"""gloo: tensors on the CPU, from rank to rank, each message with a tag of its own call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from pmod._ranks.backends import Backend
from pmod._ranks.blocking import InThread
from pmod._wire.process_group import GroupWire
from pmod._wire.sent import Sent, arrived
from pmod._wire.sums import bytes_of
from pmod._wire.traffic import count_bytes
from pmod._wire.waiting import Work

TAG = 0x706D  # of what belongs to no call


class GlooWire(GroupWire):
    """A process group on gloo: sends and receives, because its collectives have no tags
    and abort at unlike lengths.
    """

    _exchanges = 0  # of this message, so far

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Sent:
        out = x.new_empty(sum(recv))
        carried_out, carried_x = out, x
        if x.dtype not in self._backend.carries:
            scale = x.element_size()
            carried_out, carried_x = bytes_of(out), bytes_of(x)
            recv, send = [scale * n for n in recv], [scale * n for n in send]
        ins, outs = carried_x.split(list(send)), carried_out.split(list(recv))
        if self._wait is not None:
            nbytes = carried_x.element_size()
            self._wait.exchange = (
                self._exchanges,
                [nbytes * n for n in send],
                [nbytes * n for n in recv],
            )
        arriving = [(outs[rank], rank) for rank in self._others() if recv[rank]]
        work = self._peer_to_peer(
            [(ins[rank], rank) for rank in self._others() if send[rank]], arriving
        )
        outs[self.index].copy_(ins[self.index])
        return self._on_its_way(work, lambda: out)

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Sent:
        if x.dtype not in self._backend.carries:
            scale, dtype = x.element_size(), x.dtype
            return self.all_gather(bytes_of(x), [scale * n for n in counts]).then(
                lambda y: y.view(dtype)
            )
        out = x.new_empty(sum(counts))
        parts = out.split(list(counts))
        arriving = [(parts[rank], rank) for rank in self._others() if counts[rank]]
        work = self._peer_to_peer(
            [(x, rank) for rank in self._others() if x.numel()], arriving
        )
        parts[self.index].copy_(x)
        return self._on_its_way(work, lambda: out)

    def _peer_to_peer(
        self, sent: Sequence[tuple[Tensor, int]], received: Sequence[tuple[Tensor, int]]
    ) -> Work:
        """Send and receive in a thread: gloo blocks there until the two ranks have
        connected.
        """
        tag = self._tags()
        count_bytes(
            sum(part.nbytes for part, _ in sent),
            sum(part.nbytes for part, _ in received),
            len(sent),
        )

        def run() -> None:
            works = [
                self.group.recv([part], rank, tag(part)) for part, rank in received
            ]
            works += [self.group.send([part], rank, tag(part)) for part, rank in sent]
            for work in works:
                work.wait()

        return InThread(
            run, lambda: _cut_off(self.group, [rank for _, rank in [*sent, *received]])
        )

    def _tags(self) -> Callable[[Tensor], int]:
        """The tags of one exchange. gloo gives a message to whoever asks for its tag,
        and trusts its length.
        """
        wait, number = self._wait, self._exchanges
        self._exchanges += 1
        return (
            (lambda part: TAG)
            if wait is None
            else (lambda part: wait.tag(number, part.nbytes))
        )

    def _others(self) -> list[int]:
        """The other ranks, starting with the next, so that not all send to the same one
        first.
        """
        return [(self.index + step) % self.size for step in range(1, self.size)]

    def broadcast(self, x: Tensor, root: int) -> Sent:
        out = x.clone() if self.index == root else torch.empty_like(x)
        work = self._down_a_tree(
            out if x.dtype in self._backend.carries else bytes_of(out), root
        )
        return self._on_its_way(work, lambda: out)

    def _down_a_tree(self, x: Tensor, root: int) -> Work:
        """The root's x to all in ceil(log2 n) steps: a binomial tree, counted from the
        root.
        """
        place, size = (self.index - root) % self.size, self.size
        span = (
            place & -place or 1 << (size - 1).bit_length()
        )  # it serves the ranks place + 1 to place + span - 1
        halves = [span >> step for step in range(1, span.bit_length())]
        below = [(place + half + root) % size for half in halves if place + half < size]
        tag = self._tags()(x)
        count_bytes(
            len(below) * x.nbytes, x.nbytes if place else 0, (size - 1).bit_length()
        )

        def run() -> None:
            if place:
                self.group.recv([x], (place - span + root) % size, tag).wait()
            for work in [self.group.send([x], rank, tag) for rank in below]:
                work.wait()

        return InThread(
            run, lambda: _cut_off(self.group, [*below, (place - span + root) % size])
        )

    def permute(
        self,
        x: Tensor,
        target: int | None,
        source: int | None,
        count: int | None = None,
    ) -> Sent:
        count = x.numel() if count is None else count
        # gloo's all_to_all would trouble every rank with an empty message
        if x.dtype not in self._backend.carries:
            dtype, scale = x.dtype, x.element_size()
            return self.permute(bytes_of(x), target, source, scale * count).then(
                lambda y: y.view(dtype)
            )
        if target == self.index:
            return arrived(x.clone())
        out = x.new_zeros(count) if source is None else x.new_empty(count)
        # what is empty is not sent, as both sides know
        sent = [] if target is None or x.numel() == 0 else [target]
        received = [] if source is None or count == 0 else [source]
        work = self._peer_to_peer(
            [(x, rank) for rank in sent], [(out, rank) for rank in received]
        )
        return self._on_its_way(work, lambda: out)


def _cut_off(group: Any, ranks: Sequence[int] | None = None) -> None:
    """Close the connections of a group: gloo does so, with all of them, where a receive
    does not come in time.

    ranks: those of its ranks with which it is connected; the neighbours, unless it is
    known better.
    """
    if ranks is None:
        ranks = [(group.rank() + step) % group.size() for step in (1, -1)]
    for rank in ranks:
        with contextlib.suppress(RuntimeError):
            group.recv([torch.empty(1)], rank, TAG).wait(timedelta(milliseconds=1))


GLOO = Backend(
    "gloo",
    "cpu",
    GlooWire,
    blocks=True,
    tags=True,
    cut_off=_cut_off,
    carries=frozenset(
        {
            torch.float32,
            torch.float64,
            torch.float16,
            torch.bfloat16,
            torch.int8,
            torch.uint8,
            torch.int32,
            torch.int64,
        }
    ),
)
