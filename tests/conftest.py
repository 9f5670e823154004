"""What holds for every file of tests."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from typing import Any
from unittest import mock

import hypothesis
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pmod._run import launch
from pmod._wire.memory import MemoryWire
from tests.lib.listening import on_processes, on_threads

# torch asks the name server about each process that connects to a store. Where an answer is lost, ask again soon: a
# deadline that a test gives is shorter than the 5 s of the resolver.
os.environ.setdefault("RES_OPTIONS", "timeout:1")


# No test depends on how fast the machine is.
hypothesis.settings.register_profile(
    "any speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any speed")

# What takes longest, or mostly waits, is begun first, beside all others: a worker that is through with short files has
# more of them to do, and none waits at the end for one that has begun a long file last.
LONG = (
    "test_unlike.py",
    "test_notebooks.py",
    "test_compile.py",
    "test_compiled_cases.py",
    "test_collectives.py",
    "test_launch.py",
    "test_notebook.py",
    "test_docs.py",
    "test_waiting.py",
    "test_groups.py",
    "test_parallel.py",
    "test_demo.py",
    "test_demo_graph.py",
    "test_demo_wind.py",
    "test_demo_pinn.py",
    "test_demo_elastic.py",
    "test_doctor.py",
    "test_debug.py",
    "test_kinds.py",
    "test_nn.py",
    "test_trace.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


@pytest.fixture(autouse=True, scope="session")
def ranks_are_forked() -> Iterator[None]:
    """Fork the ranks that tests start from one process that has imported torch, which takes seconds, once.

    `launch` spawns ranks, which then see the caller's environment as it is. So do these where it has changed since, and
    in tests of how ranks start (`spawned`).
    """
    multiprocessing.set_forkserver_preload(["tests.lib.preloaded"])
    forkserver.ensure_running()
    before = _environment()

    def context(method: str) -> Any:
        forked = method == "spawn" and _environment() == before
        return multiprocessing.get_context("forkserver" if forked else method)

    with mock.patch.object(launch, "get_context", context):
        yield


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks of this test start as they do for users."""
    monkeypatch.setattr(launch, "get_context", multiprocessing.get_context)


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
    all_to_all = MemoryWire.all_to_all

    def noted(self: Any, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Any:
        pairs.update((self.index, to) for to, count in enumerate(send) if count)
        return all_to_all(self, x, send, recv)

    monkeypatch.setattr(MemoryWire, "all_to_all", noted)
    return pairs


@pytest.fixture(params=[on_threads, on_processes], ids=["threads", "processes"])
def run(request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    """Run a function of the test's module on ranks of either kind."""
    return request.param


@pytest.fixture
def messages(monkeypatch) -> list[Any]:
    """What was sent, on any rank of a simulation."""
    sent: list[Any] = []
    exchange = MemoryWire._exchange

    def counted(self: MemoryWire, what: Any) -> Any:
        sent.append(what)
        return exchange(self, what)

    monkeypatch.setattr(MemoryWire, "_exchange", counted)
    return sent
