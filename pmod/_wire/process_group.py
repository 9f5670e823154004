"""A wire over a torch process group, by the collectives that its backend has: `nccl.py`
is one, `gloo.py` another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pmod._ranks.backends import Backend
from pmod._torch import all_gather_flat, reduce_scatter_flat
from pmod._wire.base import SMALL, Wire
from pmod._wire.sent import Sent
from pmod._wire.sums import Reduction, bytes_of, scaled
from pmod._wire.traffic import Metered, meters
from pmod._wire.waiting import Wait, Work

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Patient:
    """A work whose wait is `Wait.until_done`."""

    __slots__ = ("_wait", "_work")

    def __init__(self, work: Work, wait: Wait) -> None:
        self._work, self._wait = work, wait

    def wait(self) -> None:
        self._wait.until_done(self._work)


class GroupWire(Wire):
    """The collectives of a torch process group, where one device type goes by one
    backend.
    """

    def __init__(
        self,
        size: int,
        index: int,
        group: ProcessGroup | Any,
        backend: Backend,
        wait: Wait | None = None,
    ) -> None:
        super().__init__(size, index)
        self.group: Any = (
            Metered(group, size, index) if meters() else group
        )  # its C++ methods have no stubs
        self._backend = backend
        self._wait = wait

    def _on_its_way(self, work: Any, finish: Callable[[], Any]) -> Sent:
        if self._backend.blocks and self._wait is not None:
            work = _Patient(work, self._wait)
        return Sent((work,), finish)

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Sent:
        out = x.new_empty(sum(recv))
        carried_out, carried_x = out, x
        if x.dtype not in self._backend.carries:
            scale = x.element_size()
            carried_out, carried_x = bytes_of(out), bytes_of(x)
            recv, send = [scale * n for n in recv], [scale * n for n in send]
        work = self.group.alltoall_base(carried_out, carried_x, list(recv), list(send))
        return self._on_its_way(work, lambda: out)

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Sent:
        if x.dtype not in self._backend.carries:
            scale, dtype = x.element_size(), x.dtype
            return self.all_gather(bytes_of(x), [scale * n for n in counts]).then(
                lambda y: y.view(dtype)
            )
        out = x.new_empty(sum(counts))
        if len(set(counts)) == 1:
            return self._on_its_way(all_gather_flat(self.group, out, x), lambda: out)
        return self._on_its_way(
            self.group.allgather([list(out.split(list(counts)))], [x]), lambda: out
        )

    def reduce_scatter(
        self, x: Tensor, counts: Sequence[int], dtype: torch.dtype
    ) -> Sent:
        if dtype == x.dtype and dtype in self._backend.sums and len(set(counts)) == 1:
            out = x.new_empty(counts[0])
            return self._on_its_way(
                reduce_scatter_flat(self.group, out, x), lambda: out
            )
        return super().reduce_scatter(x, counts, dtype)

    def all_reduce(
        self, x: Tensor, how: Reduction, dtype: torch.dtype, divisor: int
    ) -> Sent:
        nbytes = x.numel() * x.element_size()
        # the backend's own, but for large 16-bit sums, whose parts stay 16-bit
        native = how == "sum" and dtype in self._backend.sums
        if native and (x.dtype == dtype or nbytes <= SMALL):
            total = x.to(dtype, copy=True)
            work = self.group.allreduce([total])
            return self._on_its_way(work, lambda: scaled(total, divisor).to(x.dtype))
        return super().all_reduce(x, how, dtype, divisor)

    def broadcast(self, x: Tensor, root: int) -> Sent:
        out = x.clone() if self.index == root else torch.empty_like(x)
        options = torch.distributed.BroadcastOptions()
        options.rootRank = root
        options.rootTensor = 0
        work = self.group.broadcast(
            [out if x.dtype in self._backend.carries else bytes_of(out)], options
        )
        return self._on_its_way(work, lambda: out)

    def barrier(self) -> None:
        self._on_its_way(self.group.barrier(), lambda: None).wait()
