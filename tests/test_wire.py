"""Which call of a process group carries which message: on gloo and on NCCL, by evenness, number of ranks and size.

The group is a recorder, and cuda tensors are fake ones, so both backends are looked at where neither runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pmod._wire import SMALL, GroupWire

Tensor = torch.Tensor


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
        assert sum(send) in (0, x.numel()) and sum(recv) in (0, out.numel())
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


def calls(
    message: Callable[[GroupWire, Callable[..., Tensor]], Any], device: str, n: int, index: int = 0, ahead: bool = False
) -> list[tuple[str, Any]]:
    """What rank `index` of n asks of its group for a message."""
    group = Recorder()
    wire = GroupWire(n, index, group)  # type: ignore[arg-type]
    wire.ahead = ahead

    def ones(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(count, dtype=dtype, device=device)

    with FakeTensorMode():
        message(wire, ones).wait()
    return group.calls


EVEN, SKEWED = [3, 3, 3, 3], [1000, 0, 2, 1]


@pytest.mark.parametrize(
    ("device", "sizes", "ahead", "expected"),
    [
        ("cuda", EVEN, False, [("_allgather_base", 3)]),
        ("cuda", SKEWED, False, [("allgather", SKEWED)]),  # which NCCL sends as one broadcast per rank
        ("cpu", EVEN, True, [("_allgather_base", 3)]),
        ("cpu", SKEWED, True, [("alltoall_base", [1000] * 4)]),
        ("cpu", EVEN, False, [(k, (3, r)) for k in ("recv", "send") for r in (1, 2, 3)]),
        # nothing is received from the rank that has nothing
        ("cpu", SKEWED, False, [("recv", (2, 2)), ("recv", (1, 3)), *[("send", (1000, r)) for r in (1, 2, 3)]]),
    ],
)
def test_all_gather(device: str, sizes: list[int], ahead: bool, expected: list[Any]) -> None:
    assert calls(lambda wire, ones: wire.all_gather(ones(sizes[0]), sizes), device, 4, ahead=ahead) == expected


@pytest.mark.parametrize("sizes", [[5, 5], [5, 1], [5, 0]])
def test_all_gather_of_two_ranks_sends_what_the_other_lacks(sizes: list[int]) -> None:
    found = calls(lambda wire, ones: wire.all_gather(ones(sizes[0]), sizes), "cpu", 2)
    assert found == [("alltoall_base", [0, sizes[0]])]


def test_an_empty_shard_is_not_sent() -> None:
    found = calls(lambda wire, ones: wire.all_gather(ones(0), SKEWED), "cpu", 4, index=1)
    assert found == [("recv", (2, 2)), ("recv", (1, 3)), ("recv", (1000, 0))]


@pytest.mark.parametrize(
    ("device", "sizes", "dtype", "expected"),
    [
        ("cuda", EVEN, torch.float32, [("_reduce_scatter_base", 12)]),
        ("cuda", EVEN, torch.bfloat16, [("alltoall_base", EVEN)]),  # parts of 16 bits, added in float32
        ("cuda", SKEWED, torch.float32, [("alltoall_base", SKEWED)]),
        ("cpu", EVEN, torch.float32, [("alltoall_base", EVEN)]),
        ("cpu", SKEWED, torch.float32, [("alltoall_base", SKEWED)]),
    ],
)
def test_reduce_scatter(device: str, sizes: list[int], dtype: torch.dtype, expected: list[Any]) -> None:
    def message(wire: GroupWire, ones: Callable[..., Tensor]) -> Any:
        return wire.reduce_scatter(ones(sum(sizes), dtype), sizes, torch.float32)

    assert calls(message, device, 4) == expected


LARGE = SMALL  # floats: four times as many bytes


@pytest.mark.parametrize(
    ("device", "n", "count", "dtype", "first", "messages"),
    [
        ("cuda", 4, 8, torch.float32, ("allreduce", "float32"), 1),
        ("cuda", 4, LARGE, torch.float32, ("allreduce", "float32"), 1),
        ("cuda", 4, 8, torch.bfloat16, ("allreduce", "float32"), 1),
        ("cuda", 4, LARGE, torch.bfloat16, ("alltoall_base", [LARGE // 4] * 4), 2),
        ("cpu", 4, 8, torch.float32, ("allreduce", "float32"), 1),
        ("cpu", 4, LARGE, torch.float32, ("alltoall_base", [LARGE // 4] * 4), 7),  # then each sends its part to three
        ("cpu", 2, 8, torch.float32, ("alltoall_base", [0, 8]), 1),
        ("cpu", 2, LARGE, torch.float32, ("alltoall_base", [0, LARGE]), 1),
    ],
)
def test_all_reduce(
    device: str, n: int, count: int, dtype: torch.dtype, first: tuple[str, Any], messages: int
) -> None:
    found = calls(lambda wire, ones: wire.all_reduce(ones(count, dtype), "sum", torch.float32, 1), device, n)
    assert (found[0], len(found)) == (first, messages)


def test_what_gloo_does_not_carry_travels_as_bytes() -> None:
    found = calls(lambda wire, ones: wire.all_gather(ones(3, torch.complex64), [3, 1]), "cpu", 2)
    assert found == [("alltoall_base", [0, 24])]
