"""The wire over a torch process group: gloo for tensors on the CPU, NCCL for tensors on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pmod._mesh.axis import Axis
from pmod._ranks import world
from pmod._ranks.blocking import InThread
from pmod._wire.base import SMALL, Alone, Wire
from pmod._wire.board import Said, code_of, come_back
from pmod._wire.rolling import has_tags, note
from pmod._wire.sent import Sent, arrived
from pmod._wire.sums import Reduction, bytes_of, scaled
from pmod._wire.traffic import Metered, count_bytes, meters
from pmod._wire.waiting import Wait, Work

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# What gloo and NCCL carry as they are; anything else travels as bytes.
CARRIED = {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64}  # fmt: skip # noqa: E501
NATIVE_SUMS = {torch.float32, torch.float64, torch.int32, torch.int64}


class _Patient:
    """A work whose wait is `Wait.until_done`."""

    __slots__ = ("_wait", "_work")

    def __init__(self, work: Work, wait: Wait) -> None:
        self._work, self._wait = work, wait

    def wait(self) -> None:
        self._wait.until_done(self._work)


class GroupWire(Wire):
    """A torch process group: gloo for cpu tensors, NCCL for cuda tensors."""

    def __init__(self, size: int, index: int, group: ProcessGroup | Any, wait: Wait | None = None) -> None:
        super().__init__(size, index)
        self.group: Any = Metered(group, size, index) if meters() else group  # its C++ methods have no stubs
        self._wait = wait
        self._exchanges = 0

    def _on_its_way(self, x: Tensor, work: Any, finish: Callable[[], Any]) -> Sent:
        """NCCL's wait does not block; gloo's does, and `Wait` does so in its stead."""
        if self._wait is not None and not self.by_nccl(x):
            work = _Patient(work, self._wait)
        return Sent((work,), finish)

    def by_nccl(self, x: Tensor) -> bool:
        """Whether NCCL carries x; else gloo does."""
        return x.is_cuda

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Sent:
        out = x.new_empty(sum(recv))
        scale = 1
        carried_out, carried_x = out, x
        if x.dtype not in CARRIED:
            carried_out, carried_x, scale = bytes_of(out), bytes_of(x), x.element_size()
        recv, send = [scale * n for n in recv], [scale * n for n in send]
        if self.by_nccl(x):
            return self._on_its_way(x, self.group.alltoall_base(carried_out, carried_x, recv, send), lambda: out)
        ins, outs = carried_x.split(send), carried_out.split(recv)
        if self._wait is not None:
            nbytes = carried_x.element_size()
            self._wait.exchange = self._exchanges, [nbytes * n for n in send], [nbytes * n for n in recv]
        arriving = [(outs[rank], rank) for rank in self._others() if recv[rank]]
        work = self._peer_to_peer([(ins[rank], rank) for rank in self._others() if send[rank]], arriving)
        outs[self.index].copy_(ins[self.index])
        return self._on_its_way(x, work, lambda: out)

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Sent:
        if x.dtype not in CARRIED:
            scale, dtype = x.element_size(), x.dtype
            return self.all_gather(bytes_of(x), [scale * n for n in counts]).then(lambda y: y.view(dtype))
        out = x.new_empty(sum(counts))
        parts = out.split(list(counts))
        if self.by_nccl(x) and len(set(counts)) == 1:
            return self._on_its_way(x, self.group._allgather_base(out, x), lambda: out)
        if self.by_nccl(x):
            return self._on_its_way(x, self.group.allgather([list(parts)], [x]), lambda: out)
        arriving = [(parts[rank], rank) for rank in self._others() if counts[rank]]
        work = self._peer_to_peer([(x, rank) for rank in self._others() if x.numel()], arriving)
        parts[self.index].copy_(x)
        return self._on_its_way(x, work, lambda: out)

    def _peer_to_peer(self, sent: Sequence[tuple[Tensor, int]], received: Sequence[tuple[Tensor, int]]) -> Work:
        """Send and receive in a thread: gloo blocks there until the two ranks have connected."""
        tag = self._tags()
        count_bytes(sum(part.nbytes for part, _ in sent), sum(part.nbytes for part, _ in received), len(sent))

        def run() -> None:
            works = [self.group.recv([part], rank, tag(part)) for part, rank in received]
            works += [self.group.send([part], rank, tag(part)) for part, rank in sent]
            for work in works:
                work.wait()

        return InThread(run, lambda: _cut_off(self.group, [rank for _, rank in [*sent, *received]]))

    def _tags(self) -> Callable[[Tensor], int]:
        """The tags of one exchange. gloo gives a message to whoever asks for its tag, and trusts its length."""
        wait, number = self._wait, self._exchanges
        self._exchanges += 1
        return (lambda part: TAG) if wait is None else (lambda part: wait.tag(number, part.nbytes))

    def _others(self) -> list[int]:
        """The other ranks, starting with the next, so that not all send to the same one first."""
        return [(self.index + step) % self.size for step in range(1, self.size)]

    def reduce_scatter(self, x: Tensor, counts: Sequence[int], dtype: torch.dtype) -> Sent:
        if self.by_nccl(x) and dtype == x.dtype and len(set(counts)) == 1:
            out = x.new_empty(counts[0])
            return self._on_its_way(x, self.group._reduce_scatter_base(out, x), lambda: out)
        return super().reduce_scatter(x, counts, dtype)

    def all_reduce(self, x: Tensor, how: Reduction, dtype: torch.dtype, divisor: int) -> Sent:
        nbytes = x.numel() * x.element_size()
        # NCCL's own, but for large 16-bit sums, whose parts stay 16-bit; gloo's own aborts at unlike lengths
        native = self.by_nccl(x) and how == "sum" and dtype in NATIVE_SUMS
        if native and (x.dtype == dtype or nbytes <= SMALL):
            total = x.to(dtype, copy=True)
            work = self.group.allreduce([total])
            return self._on_its_way(x, work, lambda: scaled(total, divisor).to(x.dtype))
        return super().all_reduce(x, how, dtype, divisor)

    def broadcast(self, x: Tensor, root: int) -> Sent:
        out = x.clone() if self.index == root else torch.empty_like(x)
        carried = out if x.dtype in CARRIED else bytes_of(out)
        work = _broadcast(self.group, carried, root) if self.by_nccl(x) else self._down_a_tree(carried, root)
        return self._on_its_way(x, work, lambda: out)

    def _down_a_tree(self, x: Tensor, root: int) -> Work:
        """The root's x to all in ceil(log2 n) steps: a binomial tree, counted from the root."""
        place, size = (self.index - root) % self.size, self.size
        span = place & -place or 1 << (size - 1).bit_length()  # it serves the ranks place + 1 to place + span - 1
        halves = [span >> step for step in range(1, span.bit_length())]
        below = [(place + half + root) % size for half in halves if place + half < size]
        tag = self._tags()(x)
        count_bytes(len(below) * x.nbytes, x.nbytes if place else 0, (size - 1).bit_length())

        def run() -> None:
            if place:
                self.group.recv([x], (place - span + root) % size, tag).wait()
            for work in [self.group.send([x], rank, tag) for rank in below]:
                work.wait()

        return InThread(run, lambda: _cut_off(self.group, [*below, (place - span + root) % size]))

    def permute(self, x: Tensor, target: int | None, source: int | None, count: int | None = None) -> Sent:
        if self.by_nccl(x):
            return super().permute(x, target, source, count)
        count = x.numel() if count is None else count
        # gloo's all_to_all would trouble every rank with an empty message
        if x.dtype not in CARRIED:
            dtype, scale = x.dtype, x.element_size()
            return self.permute(bytes_of(x), target, source, scale * count).then(lambda y: y.view(dtype))
        if target == self.index:
            return arrived(x.clone())
        out = x.new_zeros(count) if source is None else x.new_empty(count)
        # what is empty is not sent, as both sides know
        sent = [] if target is None or x.numel() == 0 else [target]
        received = [] if source is None or count == 0 else [source]
        work = self._peer_to_peer([(x, rank) for rank in sent], [(out, rank) for rank in received])
        return self._on_its_way(x, work, lambda: out)

    def barrier(self) -> None:
        work = self.group.barrier()
        if self._wait is None or self._wait.device.type == "cuda":
            work.wait()
        else:
            self._wait.until_done(work)


TAG = 0x706D  # of what belongs to no call


def _cut_off(group: Any, ranks: Sequence[int] | None = None) -> None:
    """Close the connections of a group: gloo does so, with all of them, where a receive does not come in time.

    ranks: those of its ranks with which it is connected; the neighbours, unless it is known better.
    """
    if ranks is None:
        ranks = [(group.rank() + step) % group.size() for step in (1, -1)]
    for rank in ranks:
        with contextlib.suppress(RuntimeError):
            group.recv([torch.empty(1)], rank, TAG).wait(timedelta(milliseconds=1))


def _broadcast(group: Any, x: Tensor, root: int) -> Any:
    options = torch.distributed.BroadcastOptions()
    options.rootRank = root
    options.rootTensor = 0
    return group.broadcast([x], options)


def wire_of(axis: Axis, row: str = "", said: Said | None = None) -> Wire:
    """The wire that joins the ranks of an axis, for a message of this row; `said` is what all ranks must say of it."""
    if axis.size == 1:
        return Alone(1, 0)
    return world.current().wire(axis, said or Said(row, code_of(row)))


def _over_group(axis: Axis, said: Said) -> Wire:
    group, wait = axis.group, Wait(axis, said, _cut_off)
    if world.is_left_behind(group):
        wait.refuse()
    come_back(axis.topology.rank)
    if not has_tags(axis):
        note(axis, wait.number, said)
    return GroupWire(axis.size, axis.index, group, wait)


world.processes().carry = _over_group
