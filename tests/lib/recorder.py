"""A process group that notes what it is asked to send."""

# pyright: standard

from __future__ import annotations

from typing import Any

from torch import Tensor


class Recorder:
    """A process group that notes its calls, and how many elements of the caller's go into each."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def wait(self) -> None:
        pass

    def _noted(self, name: str, sent: Any) -> Recorder:
        self.calls.append((name, sent))
        return self

    def alltoall_base(self, out: Tensor, x: Tensor, recv: list[int], send: list[int]) -> Recorder:
        # rows, or elements; nothing stands for equal parts
        assert sum(send) in (0, len(x), x.numel()) and sum(recv) in (0, len(out), out.numel())
        return self._noted("alltoall_base", list(send))

    def _allgather_base(self, out: Tensor, x: Tensor) -> Recorder:
        return self._noted("_allgather_base", x.numel())

    def allgather(self, outs: list[list[Tensor]], xs: list[Tensor]) -> Recorder:
        return self._noted("allgather", [out.numel() for out in outs[0]])

    def _reduce_scatter_base(self, out: Tensor, x: Tensor) -> Recorder:
        return self._noted("_reduce_scatter_base", x.numel())

    def allreduce(self, xs: list[Tensor]) -> Recorder:
        return self._noted("allreduce", str(xs[0].dtype).removeprefix("torch."))

    def broadcast(self, xs: list[Tensor], options: Any) -> Recorder:
        return self._noted("broadcast", xs[0].numel())

    def send(self, xs: list[Tensor], to: int, tag: int) -> Recorder:
        return self._noted("send", (xs[0].numel(), to))

    def recv(self, xs: list[Tensor], of: int, tag: int) -> Recorder:
        return self._noted("recv", (xs[0].numel(), of))
