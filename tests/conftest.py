"""What holds for every file of tests."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pmod._simulate import _MemoryWire

# torch asks the name server about each process that connects to a store. Where an answer is lost, ask again soon: a
# deadline that a test gives is shorter than the 5 s of the resolver.
os.environ.setdefault("RES_OPTIONS", "timeout:1")


# what takes longest, or mostly waits: begun first, beside all others
LONG = (
    "test_unlike.py",
    "test_notebooks.py",
    "test_compile.py",
    "test_collectives.py",
    "test_launch.py",
    "test_notebook.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True, scope="module")
def nothing_stays_connected() -> Iterator[None]:
    """Files share a process, and the next one may count on being alone."""
    yield
    assert not dist.is_initialized(), "a test of this file left a process group: pmod.shutdown()"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors, and a machine that others use too: threads would wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def talks(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int]]:
    """(from, to) of simulated ranks -> how many messages of elements went."""
    pairs: Counter[tuple[int, int]] = Counter()
    all_to_all = _MemoryWire.all_to_all

    def noted(self: Any, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Any:
        pairs.update((self.index, to) for to, count in enumerate(send) if count)
        return all_to_all(self, x, send, recv)

    monkeypatch.setattr(_MemoryWire, "all_to_all", noted)
    return pairs
