"""How many bytes and messages a rank sends and receives, for `trace`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
from torch import Tensor

from pmod._ranks import world
from pmod._torch import all_gather_flat, reduce_scatter_flat


@attrs.frozen
class Traffic:
    """What a rank hands over for other ranks and gets from them."""

    sent: int = 0  # bytes
    received: int = 0  # bytes
    messages: int = 0  # that follow one another: a sum or a broadcast is as many as a tree has steps

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
    """Counts the traffic of this process (`trace`)."""

    def __init__(self) -> None:
        self.total = Traffic()


def meters() -> list[Meter]:
    """Those of this process; in a simulation those of this rank."""
    return world.now.here.meters


def count_bytes(sent: int, received: int, messages: int) -> None:
    """Note bytes that are on their way to and from other ranks."""
    for meter in meters():
        meter.total += Traffic(sent, received, messages)


def count_parts(
    send: Sequence[int], recv: Sequence[int], index: int, itemsize: int
) -> None:
    """Note an exchange of parts: what a rank keeps for itself does not travel."""
    messages = sum(
        (n > 0 or m > 0) and rank != index
        for rank, (n, m) in enumerate(zip(send, recv, strict=True))
    )
    count_bytes(
        (sum(send) - send[index]) * itemsize,
        (sum(recv) - recv[index]) * itemsize,
        messages,
    )


class Metered:
    """A process group whose bytes are counted, call by call.

    Exact for what goes from one rank to another; where a backend chooses the way by
    itself, the sum of a small tensor on gloo and every sum on NCCL, it is what a ring
    sends.
    """

    def __init__(self, group: Any, size: int, index: int) -> None:
        self._group, self._size, self._index = group, size, index
        self._steps = (size - 1).bit_length()  # of a tree

    def alltoall_base(
        self, out: Tensor, x: Tensor, recv: Sequence[int], send: Sequence[int]
    ) -> Any:
        count_parts(send, recv, self._index, x.element_size())
        return self._group.alltoall_base(out, x, recv, send)

    def _allgather_base(self, out: Tensor, x: Tensor) -> Any:
        count_bytes((self._size - 1) * x.nbytes, out.nbytes - x.nbytes, self._steps)
        return all_gather_flat(self._group, out, x)

    def allgather(self, outs: list[list[Tensor]], xs: list[Tensor]) -> Any:
        received = sum(out.nbytes for out in outs[0]) - xs[0].nbytes
        count_bytes((self._size - 1) * xs[0].nbytes, received, self._steps)
        return self._group.allgather(outs, xs)

    def _reduce_scatter_base(self, out: Tensor, x: Tensor) -> Any:
        nbytes = (self._size - 1) * x.nbytes // self._size
        count_bytes(nbytes, nbytes, self._steps)
        return reduce_scatter_flat(self._group, out, x)

    def allreduce(self, xs: list[Tensor]) -> Any:
        nbytes = 2 * (self._size - 1) * xs[0].nbytes // self._size
        count_bytes(nbytes, nbytes, 2 * self._steps)
        return self._group.allreduce(xs)

    def broadcast(self, xs: list[Tensor], options: Any) -> Any:
        root = self._index == options.rootRank
        count_bytes(
            xs[0].nbytes if root else 0, 0 if root else xs[0].nbytes, self._steps
        )
        return self._group.broadcast(xs, options)

    def send(self, xs: list[Tensor], to: int, tag: int) -> Any:
        return self._group.send(
            xs, to, tag
        )  # counted by who calls: it is called in a thread

    def recv(self, xs: list[Tensor], of: int, tag: int) -> Any:
        return self._group.recv(xs, of, tag)

    def barrier(self) -> Any:
        count_bytes(0, 0, self._steps)
        return self._group.barrier()
