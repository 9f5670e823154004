"""How many bytes and messages a rank sends and receives, for `trace`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
from torch import Tensor

from pmod._ranks import world
from pmod._torch import all_gather_of, reduce_scatter_of
from pmod._wire.counts import others_with_any, total

if TYPE_CHECKING:
    from torch.distributed import BroadcastOptions, Work


@attrs.frozen
class Traffic:
    """What a rank hands over for other ranks and gets from them."""

    sent: int = 0  # bytes
    received: int = 0  # bytes
    # Only those that follow one another count: a sum or a broadcast is as many as a
    # tree has steps.
    messages: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.sent + other.sent,
            self.received + other.received,
            self.messages + other.messages,
        )

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.sent - other.sent,
            self.received - other.received,
            self.messages - other.messages,
        )


class Meter:
    """A count of the traffic of this process, for `trace`."""

    def __init__(self) -> None:
        self.total = Traffic()


def meters() -> list[Meter]:
    """Return the meters of this process; in a simulation, those of this rank."""
    return world.now.here.meters


def count_bytes(sent: int, received: int, messages: int) -> None:
    """Note bytes that are on their way to and from other ranks."""
    for meter in meters():
        meter.total += Traffic(sent, received, messages)


def count_parts(
    send: Sequence[int], recv: Sequence[int], index: int, itemsize: int
) -> None:
    """Note an exchange of parts."""
    messages = others_with_any(send, recv, index, "both")
    # What a rank keeps for itself does not travel.
    sent = total(send) - send[index]
    received = total(recv) - recv[index]
    count_bytes(sent * itemsize, received * itemsize, messages)


class Metered:
    """A process group whose bytes are counted, call by call.

    The count is exact for what goes from one rank to another. A backend chooses the way
    of some sums by itself: that of a small tensor on gloo, and every sum on NCCL. These
    count as what a ring sends.
    """

    def __init__(self, group: Any, size: int, index: int) -> None:
        # torch's stubs do not know the C++ methods of a group.
        self._group, self._size, self._index = group, size, index
        self._steps = (size - 1).bit_length()  # of a tree

    def alltoall_base(
        self, out: Tensor, x: Tensor, recv: Sequence[int], send: Sequence[int]
    ) -> Work:
        count_parts(send, recv, self._index, x.element_size())
        return self._group.alltoall_base(out, x, recv, send)

    def _allgather_base(self, out: Tensor, x: Tensor) -> Work:
        count_bytes((self._size - 1) * x.nbytes, out.nbytes - x.nbytes, self._steps)
        return all_gather_of(self._group)(out, x)

    def allgather(self, outs: list[list[Tensor]], xs: list[Tensor]) -> Work:
        received = sum(out.nbytes for out in outs[0]) - xs[0].nbytes
        count_bytes((self._size - 1) * xs[0].nbytes, received, self._steps)
        return self._group.allgather(outs, xs)

    def _reduce_scatter_base(self, out: Tensor, x: Tensor) -> Work:
        nbytes = (self._size - 1) * x.nbytes // self._size
        count_bytes(nbytes, nbytes, self._steps)
        return reduce_scatter_of(self._group)(out, x)

    def allreduce(self, xs: list[Tensor]) -> Work:
        nbytes = 2 * (self._size - 1) * xs[0].nbytes // self._size
        count_bytes(nbytes, nbytes, 2 * self._steps)
        return self._group.allreduce(xs)

    def broadcast(self, xs: list[Tensor], options: BroadcastOptions) -> Work:
        nbytes = xs[0].nbytes
        if self._index == options.rootRank:
            count_bytes(nbytes, 0, self._steps)
        else:
            count_bytes(0, nbytes, self._steps)
        return self._group.broadcast(xs, options)

    def send(self, xs: list[Tensor], to: int, tag: int) -> Work:
        # Whoever calls counts it, and what `recv` gets: both are called in a thread,
        # which may not be the one whose meters count.
        return self._group.send(xs, to, tag)

    def recv(self, xs: list[Tensor], of: int, tag: int) -> Work:
        return self._group.recv(xs, of, tag)

    def barrier(self) -> Work:
        count_bytes(0, 0, self._steps)
        return self._group.barrier()
