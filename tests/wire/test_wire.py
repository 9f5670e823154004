"""Which call of a process group carries which message: on gloo and on NCCL, by evenness, number of ranks and size.

The group is a recorder, and cuda tensors are fake ones, so both backends are looked at where neither runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pmod._wire.base import SMALL
from pmod._wire.gloo import GLOO
from pmod._wire.nccl import NCCL
from pmod._wire.process_group import GroupWire
from pmod._wire.traffic import Meter, Traffic, meters
from tests.lib.recorder import Recorder

Tensor = torch.Tensor


def calls(
    message: Callable[[GroupWire, Callable[..., Tensor]], Any], device: str, n: int, index: int = 0
) -> list[tuple[str, Any]]:
    """What rank `index` of n asks of its group for a message."""
    group = Recorder()
    backend = GLOO if device == "cpu" else NCCL
    wire = backend.wire(n, index, group, backend)

    def ones(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(count, dtype=dtype, device=device)

    with FakeTensorMode():
        message(wire, ones).wait()
    return group.calls


EVEN, SKEWED = [3, 3, 3, 3], [1000, 0, 2, 1]


@pytest.mark.parametrize(
    ("device", "sizes", "expected"),
    [
        ("cuda", EVEN, [("_allgather_base", 3)]),
        ("cuda", SKEWED, [("allgather", SKEWED)]),  # which NCCL sends as one broadcast per rank
        ("cpu", EVEN, [(k, (3, r)) for k in ("recv", "send") for r in (1, 2, 3)]),
        # nothing is received from the rank that has nothing
        ("cpu", SKEWED, [("recv", (2, 2)), ("recv", (1, 3)), *[("send", (1000, r)) for r in (1, 2, 3)]]),
    ],
)
def test_all_gather(device: str, sizes: list[int], expected: list[Any]) -> None:
    assert calls(lambda wire, ones: wire.all_gather(ones(sizes[0]), sizes), device, 4) == expected


@pytest.mark.parametrize("sizes", [[5, 5], [5, 1], [5, 0]])
def test_all_gather_of_two_ranks_sends_what_the_other_lacks(sizes: list[int]) -> None:
    found = calls(lambda wire, ones: wire.all_gather(ones(sizes[0]), sizes), "cpu", 2)
    assert found == [("recv", (sizes[1], 1))] * (sizes[1] > 0) + [("send", (sizes[0], 1))]


def test_an_empty_shard_is_not_sent() -> None:
    found = calls(lambda wire, ones: wire.all_gather(ones(0), SKEWED), "cpu", 4, index=1)
    assert found == [("recv", (2, 2)), ("recv", (1, 3)), ("recv", (1000, 0))]


@pytest.mark.parametrize(
    ("device", "sizes", "dtype", "expected"),
    [
        ("cuda", EVEN, torch.float32, [("_reduce_scatter_base", 12)]),
        ("cuda", EVEN, torch.bfloat16, [("alltoall_base", EVEN)]),  # parts of 16 bits, added in float32
        ("cuda", SKEWED, torch.float32, [("alltoall_base", SKEWED)]),
        ("cpu", EVEN, torch.float32, [(k, (3, r)) for k in ("recv", "send") for r in (1, 2, 3)]),
        ("cpu", SKEWED, torch.float32, [*[("recv", (1000, r)) for r in (1, 2, 3)], ("send", (2, 2)), ("send", (1, 3))]),
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
        ("cpu", 4, 8, torch.float32, ("recv", (8, 1)), 6),
        ("cpu", 4, LARGE, torch.float32, ("recv", (LARGE // 4, 1)), 12),  # then each sends its part to three
        ("cpu", 2, 8, torch.float32, ("recv", (8, 1)), 2),
        ("cpu", 2, LARGE, torch.float32, ("recv", (LARGE, 1)), 2),
    ],
)
def test_all_reduce(
    device: str, n: int, count: int, dtype: torch.dtype, first: tuple[str, Any], messages: int
) -> None:
    found = calls(lambda wire, ones: wire.all_reduce(ones(count, dtype), "sum", torch.float32, 1), device, n)
    assert (found[0], len(found)) == (first, messages)


def test_what_gloo_does_not_carry_travels_as_bytes() -> None:
    found = calls(lambda wire, ones: wire.all_gather(ones(3, torch.complex64), [3, 1]), "cpu", 2)
    assert found == [("recv", (8, 1)), ("send", (24, 1))]


@pytest.mark.parametrize("root", [0, 2])
def test_a_broadcast_goes_down_a_tree(root: int) -> None:
    """Each of 6 ranks but the root receives once, from one that has it."""
    heard: dict[int, int] = {}
    sent: set[tuple[int, int]] = set()
    for index in range(6):
        found = calls(lambda wire, ones: wire.broadcast(ones(3), root), "cpu", 6, index=index)
        heard.update((index, rank) for name, (_, rank) in found if name == "recv")
        sent |= {(index, rank) for name, (_, rank) in found if name == "send"}
    assert sent == {(rank, index) for index, rank in heard.items()} and len(sent) == 5 and root not in heard


def test_messages_to_one_rank_are_counted() -> None:
    meter = Meter()
    meters().append(meter)
    try:
        calls(lambda wire, ones: wire.all_gather(ones(2), [2, 1, 0]), "cpu", 3)
    finally:
        meters().remove(meter)
    assert meter.total == Traffic(16, 4, 2)
