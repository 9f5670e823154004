"""Ranks whose gloo has no tags: what goes by NCCL elsewhere goes the same way here, by gloo's own collectives."""

# pyright: standard

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from pmod._ranks import backends, world
from pmod._ranks.backends import Backend
from pmod._wire.base import Wire
from pmod._wire.nccl import NCCL
from pmod._wire.process_group import CARRIED, GroupWire
from pmod._wire.sent import Sent


class Even(GroupWire):
    """What NCCL does with uneven shards, gloo cannot."""

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Sent[Tensor]:
        if len(set(counts)) > 1:
            return Wire.all_gather(self, x, counts)
        return super().all_gather(x, counts)


UNTAGGED = Backend("gloo", "cpu", Even, blocks=False, in_graphs=True, carries=CARRIED, sums=NCCL.sums)


@contextmanager
def untagged() -> Iterator[None]:
    """In a rank: what goes by gloo goes without tags, and compiled code sends by itself."""
    known = backends._BACKENDS["gloo"]
    _use(UNTAGGED)
    try:
        yield
    finally:
        _use(known)


def _use(backend: Backend) -> None:
    backends.register(backend)
    # the one that is there now: the function may have made another
    connection = world.processes().connection
    connection.backends.clear()
    connection.forget_calls()


def call_untagged(f: Callable[..., Any], *args: Any) -> Any:
    with untagged():
        return f(*args)
