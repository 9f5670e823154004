"""The libraries whose collectives have a gradient, and what of them pmod is beside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pmod._torch import (
    exchange_differentiably,
    gather_differentiably,
    reduce_differentiably,
    scatter_differentiably,
)
from pmod.bench.cases import CASES, Function
from pmod.bench.clock import Runs

FORWARD, BOTH_WAYS = "forward", "forward + backward"


def functional() -> dict[str, Function]:
    """Return the functional collectives that have a gradient."""
    group, wait = dist.group.WORLD, _arrived
    reduce, gather = reduce_differentiably(), gather_differentiably()
    scatter, exchange = scatter_differentiably(), exchange_differentiably()
    return {
        "psum": lambda x: wait(reduce(x, "sum", group)),
        "all_gather": lambda x: wait(gather(x, 0, group)),
        "psum_scatter": lambda x: wait(scatter(x, "sum", 0, group)),
        "all_to_all": lambda x: wait(exchange(x, None, None, group)),
    }


class _Asynchronous(Protocol):
    """The results of torch's functional collectives."""

    def trigger_wait(self) -> Tensor: ...


def _arrived(y: _Asynchronous) -> Tensor:
    # Torch waits when the result is first used. Its own function for that is dearer
    # than this, because the result is a tensor of a class of its own.
    y.trigger_wait()
    return cast(Tensor, y)


def differentiable() -> dict[str, Function]:
    """Return the collectives of torch.distributed.nn."""
    # by its name, because torch's stubs do not type what it holds
    of = import_module("torch.distributed.nn.functional")

    def scatter(x: Tensor) -> Tensor:
        parts = list(x.chunk(dist.get_world_size()))
        return of.reduce_scatter(torch.empty_like(parts[0]), parts)

    return {
        "psum": of.all_reduce,
        "all_gather": lambda x: torch.cat(of.all_gather(x)),
        "psum_scatter": scatter,
        "all_to_all": lambda x: of.all_to_all_single(torch.empty_like(x), x),
    }


def dtensor() -> dict[str, Function]:
    """Return what changes the placement of a DTensor, from tensor to tensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def moved(before: Placement, after: Placement, x: Tensor) -> Tensor:
        whole = DTensor.from_local(x, mesh, [before], run_check=False)
        return whole.redistribute(placements=[after]).to_local()

    return {
        "psum": partial(moved, Partial(), Replicate()),
        "all_gather": partial(moved, Shard(0), Replicate()),
        "psum_scatter": partial(moved, Partial(), Shard(0)),
    }


PEERS = {
    "functional": functional,
    "distributed.nn": differentiable,
    "DTensor": dtensor,
}


def runs_of_peers() -> Runs:
    """Return each collective beside those of the peers, once there and there and back.

    All ranks of the default group call it.
    """
    runs: Runs = {}
    for peer, collectives in PEERS.items():
        for name, theirs in collectives().items():
            ours = CASES[name].ours
            x = torch.ones(8, 8)
            runs[name, f"{peer}, {FORWARD}"] = _both(partial, (ours, theirs), x)
            parameter = torch.ones(8, 8, requires_grad=True)
            pair = _both(_there_and_back, (ours, theirs), parameter)
            runs[name, f"{peer}, {BOTH_WAYS}"] = pair
    return runs


def _both(
    how: Callable[[Function, Tensor], Callable[[], object]],
    pair: tuple[Function, Function],
    x: Tensor,
) -> Sequence[Callable[[], object]]:
    return [how(function, x) for function in pair]


def _there_and_back(function: Function, x: Tensor) -> Callable[[], object]:
    g = torch.ones_like(function(x))
    return lambda: torch.autograd.grad(function(x), x, g)
