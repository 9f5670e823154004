"""The wire of an estimate, whose other ranks do not exist.

What they would send is made up, with the right shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pmod._mesh.axis import Axis
from pmod._ranks.backends import Backend, backend_for
from pmod._ranks.topology import Topology
from pmod._ranks.world import Processes, World
from pmod._torch import all_gather_of
from pmod._wire.base import Wire
from pmod._wire.board import Said
from pmod._wire.counts import Runs, others_with_any, runs_of, start_of, total
from pmod._wire.gloo import GlooWire
from pmod._wire.process_group import GroupWire
from pmod._wire.sent import Sent, arrived
from pmod._wire.sums import Reduction, scaled
from pmod._wire.traffic import count_bytes


class _NoGroup:
    """A process group whose messages go nowhere."""

    def __getattr__(self, name: str) -> Callable[..., _NoGroup]:
        # What every method returns is a work, which the group itself is, too.
        return lambda *_: self

    def wait(self, *_: object) -> None:
        pass


class _OfRuns(Wire):
    """A wire that lists no rank: it may have any number of them."""

    def equal(self, count: int) -> Sequence[int]:
        return Runs([(count, self.size)])

    def even(self, number: int) -> Sequence[int]:
        low, more = divmod(number, self.size)
        return Runs([(low + 1, more), (low, self.size - more)])

    def only_at(self, rank: int | None, count: int) -> Sequence[int]:
        if rank is None:
            return self.equal(0)
        return Runs([(0, rank), (count, 1), (0, self.size - rank - 1)])


class _Unsent(_OfRuns):
    """What a wire sends is counted, and what arrives has no values."""

    def combined(
        self, parts: Tensor, how: Reduction, dtype: torch.dtype, divisor: int
    ) -> Tensor:
        return parts.new_empty(parts.shape[1:])


class _UnsentGroup(_Unsent, GroupWire):
    """The messages of a backend's collectives."""

    def all_to_all(
        self, x: Tensor, send: Sequence[int], recv: Sequence[int]
    ) -> Sent[Tensor]:
        out = _blank(x, total(recv))
        self.group.alltoall_base(out, x, recv, send)
        return arrived(out)

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Sent[Tensor]:
        out = _blank(x, total(counts))
        all_gather_of(self.group)(out, x)
        return arrived(out)


class _UnsentGloo(_Unsent, GlooWire):
    """The messages that gloo sends from rank to rank."""

    # where gloo adds up what arrives changes nothing that is sent
    all_reduce = Wire.all_reduce
    _reduce_by_parts = Wire._reduce_by_parts

    def all_to_all(
        self, x: Tensor, send: Sequence[int], recv: Sequence[int]
    ) -> Sent[Tensor]:
        sent, received = total(send), total(recv)
        messages = others_with_any(send, recv, self.index, "send")
        leaving = (sent - send[self.index]) * x.element_size()
        arriving = (received - recv[self.index]) * x.element_size()
        count_bytes(leaving, arriving, messages)
        return arrived(_blank(x, received))

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Sent[Tensor]:
        others, received = self.size - 1, total(counts)
        arriving = (received - counts[self.index]) * x.element_size()
        count_bytes(others * x.nbytes, arriving, others if x.numel() else 0)
        return arrived(_blank(x, received))


# A backend whose wire stands in none of these sends by it, and takes as long as that
# takes for so many ranks.
_UNSENT: dict[Callable[..., Wire], type[GroupWire]] = {
    GroupWire: _UnsentGroup,
    GlooWire: _UnsentGloo,
}


class Mirror(_OfRuns):
    """A wire that sends as a backend's own does, to nobody.

    What would arrive is what this rank has.
    """

    def __init__(self, axis: Axis, backend: Backend) -> None:
        super().__init__(axis.size, axis.index)
        wire = _UNSENT.get(backend.wire, backend.wire)
        self._out: Wire = wire(axis.size, axis.index, _NoGroup(), backend, None)

    def all_to_all(
        self, x: Tensor, send: Sequence[int], recv: Sequence[int]
    ) -> Sent[Tensor]:
        mine = x.narrow(0, start_of(send, self.index), send[self.index])
        sent = self._out.all_to_all(x, send, recv)
        return sent.then(lambda _: _fitted_to_all(mine, recv))

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Sent[Tensor]:
        return self._out.all_gather(x, counts).then(lambda _: _fitted_to_all(x, counts))

    def reduce_scatter(
        self, x: Tensor, counts: Sequence[int], dtype: torch.dtype
    ) -> Sent[Tensor]:
        mine = x.narrow(0, start_of(counts, self.index), counts[self.index])
        total = (mine.to(dtype) * self.size).to(x.dtype)
        return self._out.reduce_scatter(x, counts, dtype).then(lambda _: total)

    def all_reduce(
        self, x: Tensor, how: Reduction, dtype: torch.dtype, divisor: int
    ) -> Sent[Tensor]:
        total = x.clone()
        if how == "sum":
            total = scaled(x.to(dtype) * self.size, divisor).to(x.dtype)
        return self._out.all_reduce(x, how, dtype, divisor).then(lambda _: total)

    def broadcast(self, x: Tensor, root: int) -> Sent[Tensor]:
        return self._out.broadcast(x, root).then(lambda _: x.clone())

    def reduce(self, x: Tensor, root: int, dtype: torch.dtype) -> Sent[Tensor]:
        total = torch.zeros_like(x)
        if self.index == root:
            total = (x.to(dtype) * self.size).to(x.dtype)
        return self._out.reduce(x, root, dtype).then(lambda _: total)

    def permute(
        self,
        x: Tensor,
        target: int | None,
        source: int | None,
        count: int | None = None,
    ) -> Sent[Tensor]:
        if count is None:
            count = x.numel()
        # What arrives on a real wire shares no memory with x, either.
        arriving = x.new_zeros(count) if source is None else _fitted(x, count).clone()
        return self._out.permute(x, target, source, count).then(lambda _: arriving)

    def barrier(self) -> None:
        self._out.barrier()

    def words(self, mine: str) -> list[str]:
        """Return what each rank says, for `assert_invariant`."""
        return [mine] * self.size


class Nobody(World):
    """The world of an estimate: one rank of a mesh whose other ranks do not exist."""

    alone = True

    def __init__(self, processes: Processes, topology: Topology) -> None:
        super().__init__(processes)
        self._topology = topology

    @property
    def topology(self) -> Topology:
        return self._topology

    def wire(self, axis: Axis, said: Said, device: torch.device) -> Wire:
        # Tensors of an estimate may be on the CPU or on "meta", in place of a GPU that
        # need not exist.
        for kind in (axis.topology.device.type, device.type):
            if kind not in ("cpu", "meta"):
                return Mirror(axis, backend_for(kind, "estimate"))
        return Mirror(axis, backend_for("cpu", "estimate"))


def _fitted(part: Tensor, count: int) -> Tensor:
    """Return as many elements as are expected: the first ones, and zeros."""
    if len(part) >= count:
        return part[:count]
    return torch.cat([part, part.new_zeros(count - len(part))])


def _fitted_to_all(part: Tensor, counts: Sequence[int]) -> Tensor:
    parts = [_fitted(part, count).repeat(times) for count, times in runs_of(counts)]
    return torch.cat(parts)


def _blank(like: Tensor, count: int) -> Tensor:
    """Return so many elements of no value, in the memory of one."""
    return like.new_empty(1).expand(count)
