"""What is sent, counted on ranks of either kind; and two tensors compared."""

# pyright: standard

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np
import pytest
import torch

import pmod
from pmod._wire.gloo import GlooWire
from pmod._wire.memory import MemoryWire
from tests.lib import spmd

Tensor = torch.Tensor


def same(actual: Any, expected: Any, what: str, *, rtol: float = 1e-11, atol: float = 1e-11) -> None:
    if isinstance(expected, np.ndarray | np.generic):
        expected = torch.from_numpy(np.array(expected))
    torch.testing.assert_close(actual.detach(), expected, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}")


_ear = threading.local()  # of each rank, also where ranks are threads


_SENDING = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce", "broadcast", "reduce", "permute")


@contextmanager
def listening() -> Iterator[None]:
    """Note what is asked of a wire, not what a wire makes of it."""

    def noting(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def noted(wire: Any, x: Tensor, *args: Any) -> Any:
            depth = getattr(_ear, "depth", 0)
            if depth == 0:
                getattr(_ear, "sent", []).append((method.__name__, x.dtype, x.numel()))
            _ear.depth = depth + 1
            try:
                return method(wire, x, *args)
            finally:
                _ear.depth = depth

        return noted

    with pytest.MonkeyPatch.context() as patch:
        for wire, name in itertools.product((MemoryWire, GlooWire), _SENDING):
            patch.setattr(wire, name, noting(getattr(wire, name)))
        yield


def counted(f: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """What f returns, and what it sent."""
    _ear.sent = []
    return f(), _ear.sent


def heard(fn: Callable[..., Any], *args: Any) -> Any:
    with listening():
        return fn(*args)


def on_threads(fn: Callable[..., Any], *args: Any, **sizes: int) -> list[Any]:
    with listening():
        return pmod.simulate(fn, *args, **sizes)


def on_processes(fn: Callable[..., Any], *args: Any, **sizes: int) -> list[Any]:
    return spmd.launch(heard, fn, *args, **sizes)
