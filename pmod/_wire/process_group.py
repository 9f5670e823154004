"""A wire over a torch process group, by the collectives that its backend has.

The backends are in files of their own, such as `nccl.py` and `gloo.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from pmod._ranks.backends import Backend
from pmod._torch import all_gather_of, own_backend, reduce_scatter_of
from pmod._wire.base import SMALL, AtOnce, Wire
from pmod._wire.counts import are_equal, scaled_counts
from pmod._wire.sent import Sent
from pmod._wire.sums import Reduction, bytes_of, scaled
from pmod._wire.traffic import Metered, meters
from pmod._wire.waiting import Wait, Work

if TYPE_CHECKING:
    from torch.distributed import BroadcastOptions, ProcessGroup

T = TypeVar("T")

CARRIED = frozenset(
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
)
"""What gloo and NCCL carry as it is."""


class _Patient:
    """A work whose wait is `Wait.until_done`."""

    __slots__ = ("_wait", "_work")

    def __init__(self, work: Work, wait: Wait) -> None:
        self._work, self._wait = work, wait

    def wait(self) -> None:
        self._wait.until_done(self._work)


class GroupWire(Wire):
    """The collectives of a torch process group, for one type of device."""

    def __init__(
        self,
        size: int,
        index: int,
        group: ProcessGroup | Any,
        backend: Backend,
        wait: Wait | None = None,
    ) -> None:
        super().__init__(size, index)
        # torch's stubs do not know the C++ methods of a group.
        self.group: Any = group
        if meters():
            self.group = Metered(group, size, index)
        self._backend = backend
        self._wait = wait

    def _on_its_way(self, work: Work, finish: Callable[[], T]) -> Sent[T]:
        # Where a work blocks the process, pmod waits in its stead: a wait of gloo's
        # hears neither Ctrl-C nor the deadline.
        if self._backend.blocks and self._wait is not None:
            return Sent((_Patient(work, self._wait),), finish)
        return Sent((work,), finish)

    def all_to_all(
        self, x: Tensor, send: Sequence[int], recv: Sequence[int]
    ) -> Sent[Tensor]:
        out = x.new_empty(sum(recv))
        carried_out, carried_x = out, x
        if x.dtype not in self._backend.carries:
            carried_out, carried_x, send, recv = as_bytes(out, x, send, recv)
        work = self.group.alltoall_base(carried_out, carried_x, list(recv), list(send))
        return self._on_its_way(work, lambda: out)

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Sent[Tensor]:
        if x.dtype not in self._backend.carries:
            return self._gather_bytes(x, counts)
        out = x.new_empty(sum(counts))
        if are_equal(counts):
            work = all_gather_of(self.group)(out, x)
        else:
            work = self.group.allgather([list(out.split(list(counts)))], [x])
        return self._on_its_way(work, lambda: out)

    def _carried(self, x: Tensor) -> Tensor:
        """Return x, or its bytes if the backend does not carry its dtype."""
        return x if x.dtype in self._backend.carries else bytes_of(x)

    def _gather_bytes(self, x: Tensor, counts: Sequence[int]) -> Sent[Tensor]:
        """Gather x as bytes, which every backend carries."""
        dtype, scale = x.dtype, x.element_size()
        arriving = self.all_gather(bytes_of(x), scaled_counts(scale, counts))
        return arriving.then(lambda y: y.view(dtype))

    def reduce_scatter(
        self, x: Tensor, counts: Sequence[int], dtype: torch.dtype
    ) -> Sent[Tensor]:
        native = dtype == x.dtype and dtype in self._backend.sums
        if not (native and are_equal(counts)):
            return super().reduce_scatter(x, counts, dtype)
        out = x.new_empty(counts[0])
        work = reduce_scatter_of(self.group)(out, x)
        return self._on_its_way(work, lambda: out)

    def all_reduce(
        self, x: Tensor, how: Reduction, dtype: torch.dtype, divisor: int
    ) -> Sent[Tensor]:
        # A large 16-bit sum is not left to the backend: it would travel in `dtype`, and
        # by the base class its parts stay 16-bit.
        nbytes = x.numel() * x.element_size()
        as_it_is = x.dtype == dtype or nbytes <= SMALL
        native = how == "sum" and dtype in self._backend.sums
        if not (native and as_it_is):
            return super().all_reduce(x, how, dtype, divisor)
        total = x.to(dtype, copy=True)
        work = self.group.allreduce([total])
        return self._on_its_way(work, lambda: scaled(total, divisor).to(x.dtype))

    def broadcast(self, x: Tensor, root: int) -> Sent[Tensor]:
        out = x.clone() if self.index == root else torch.empty_like(x)
        carried = self._carried(out)
        work = self.group.broadcast([carried], _from_root(root))
        return self._on_its_way(work, lambda: out)

    def ready_sum(
        self, like: Tensor, dtype: torch.dtype, divisor: int
    ) -> AtOnce | None:
        if dtype != like.dtype or dtype not in self._backend.sums:
            return None
        allreduce = own_backend(self.group, like.device).allreduce

        def add_up(x: Tensor) -> Tensor:
            y = x.clone()
            allreduce([y]).wait()
            return y if divisor == 1 else y.div_(divisor)

        return add_up

    def ready_broadcast(self, like: Tensor, root: int) -> AtOnce | None:
        if like.dtype not in self._backend.carries:
            return None
        broadcast = own_backend(self.group, like.device).broadcast
        options, here = _from_root(root), self.index == root

        def bring(x: Tensor) -> Tensor:
            y = x.clone() if here else torch.empty_like(x)
            broadcast([y], options).wait()
            return y

        return bring

    def ready_gather(self, like: Tensor) -> AtOnce | None:
        if like.dtype not in self._backend.carries:
            return None
        gather = all_gather_of(own_backend(self.group, like.device))
        shape = (self.size * like.shape[0], *like.shape[1:])

        def join(x: Tensor) -> Tensor:
            y = x.new_empty(shape)
            gather(y, x).wait()
            return y

        return join

    def ready_scatter(self, like: Tensor, dtype: torch.dtype) -> AtOnce | None:
        if dtype != like.dtype or dtype not in self._backend.sums:
            return None
        scatter = reduce_scatter_of(own_backend(self.group, like.device))
        shape = (like.shape[0] // self.size, *like.shape[1:])

        def add_up(x: Tensor) -> Tensor:
            y = x.new_empty(shape)
            scatter(y, x).wait()
            return y

        return add_up

    def ready_exchange(
        self, like: Tensor, rows: tuple[list[int], list[int]] | None = None
    ) -> AtOnce | None:
        if like.dtype not in self._backend.carries:
            return None
        exchange = own_backend(self.group, like.device).alltoall_base
        # no lists stand for equal parts
        send, recv = rows or ([], [])

        def swap(x: Tensor) -> Tensor:
            y = torch.empty_like(x)
            exchange(y, x, recv, send).wait()
            return y

        return swap

    def barrier(self) -> None:
        self._on_its_way(self.group.barrier(), lambda: None).wait()


def _from_root(root: int) -> BroadcastOptions:
    options = torch.distributed.BroadcastOptions()
    options.rootRank = root
    options.rootTensor = 0
    return options


def as_bytes(
    out: Tensor, x: Tensor, send: Sequence[int], recv: Sequence[int]
) -> tuple[Tensor, Tensor, Sequence[int], Sequence[int]]:
    """Return the bytes of what arrives and of what is sent, and how many go where."""
    scale = x.element_size()
    counts = scaled_counts(scale, send), scaled_counts(scale, recv)
    return bytes_of(out), bytes_of(x), *counts
