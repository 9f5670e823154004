"""A persistent pool of local ranks, started once per size and used by every test that needs real processes.

A test passes a function of its module; what a rank asserts fails the test:

    def ranks_agree(x):
        assert pmod.psum(x, "model").item() == 2

    def test_psum():
        spmd.launch(ranks_agree, torch.ones(()), model=2)

One rank's exception fails the test on all, and a rank that hangs does so until the deadline: either ends that pool, and
the next use starts a new one (seconds). So what is expected to raise is caught in the function, with `pytest.raises`.
"""

# pyright: standard

from __future__ import annotations

import atexit
import faulthandler
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

from pmod._ranks import world
from pmod._run.launch import Ranks
from pmod._run.task import Task

LONG = 600.0
"""Seconds that only a hang reaches, on however busy a machine."""

_pools: dict[int, Ranks] = {}


def launch(fn: Callable[..., Any], /, *args: Any, timeout: float = LONG, **axis_sizes: int) -> list[Any]:
    """`pmod.launch` on ranks that stay: what `fn(*args)` returned on each, in rank order."""
    size = math.prod(axis_sizes.values())
    pool = _pools.get(size)
    if pool is None:
        pool = _pools[size] = Ranks(size)
    try:
        task = Task.of(_as_test, (fn, args, timeout, list(warnings.filters)), axis_sizes)
        returned: list[Any] = pool.run(task, timeout)
    except BaseException:
        del _pools[size]
        pool.close(patience=0)
        raise
    # gloo's threads of groups that were left behind look for messages 100 times a second, until their process ends
    if any(left for _, left in returned):
        del _pools[size]
        pool.close(patience=1.0)
    return [result for result, _ in returned]


_met = 0


def meet(size: int) -> None:
    """In a rank: go on when all have come here. It asks the store, so that it needs no group that still works."""
    global _met
    _met += 1
    store = world.current().store
    assert store is not None
    key = f"test/meets {_met}"
    store.add(key, 1)
    while store.add(key, 0) < size:
        time.sleep(0.01)


def _as_test(fn: Callable[..., Any], args: tuple[Any, ...], timeout: float, filters: list[Any]) -> tuple[Any, bool]:
    """In a rank: treat warnings as the test does; before the deadline, show on stderr where the rank hangs.

    Also returns whether this process has left groups behind.
    """
    faulthandler.dump_traceback_later(0.9 * timeout)
    try:
        with warnings.catch_warnings():
            list_of_all: Any = warnings.filters
            list_of_all[:] = filters
            return fn(*args), bool(world.processes().left_behind)
    finally:
        faulthandler.cancel_dump_traceback_later()


@atexit.register
def close() -> None:
    """End the pools, before multiprocessing waits for their processes."""
    while _pools:
        _pools.popitem()[1].close(patience=1.0)
