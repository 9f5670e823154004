"""What is compared: each collective, and the raw calls that give the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor

import pmod
from pmod._core.collective import COLLECTIVES

AXIS = "ranks"

Function: TypeAlias = Callable[[Tensor], Any]


@frozen
class Case:
    """A collective beside the raw calls that give the same, out of place."""

    ours: Function
    # None if torch.distributed has no such call
    raw: Function | None
    # the message of the transpose, None if it needs none
    raw_back: Function | None = None


def _copied(x: Tensor, send: Callable[[Tensor], object]) -> Tensor:
    y = x.clone()
    send(y)
    return y


def _all_reduce(x: Tensor) -> Tensor:
    return _copied(x, dist.all_reduce)


def _mean(x: Tensor) -> Tensor:
    return _all_reduce(x).div_(dist.get_world_size())


def _maximum(x: Tensor) -> Tensor:
    return _copied(x, partial(dist.all_reduce, op=dist.ReduceOp.MAX))


def _minimum(x: Tensor) -> Tensor:
    return _copied(x, partial(dist.all_reduce, op=dist.ReduceOp.MIN))


def _broadcast(x: Tensor) -> Tensor:
    return _copied(x, partial(dist.broadcast, src=0))


def _reduce(x: Tensor) -> Tensor:
    return _copied(x, partial(dist.reduce, dst=0))


# torch 2.13 renamed them, and warns of the old names on each call
_torch: Any = dist
if hasattr(_torch, "all_gather_single"):
    _all_gather_single = _torch.all_gather_single
    _reduce_scatter_single = _torch.reduce_scatter_single
else:
    _all_gather_single = _torch.all_gather_into_tensor
    _reduce_scatter_single = _torch.reduce_scatter_tensor


def raw_all_gather(x: Tensor) -> Tensor:
    y = x.new_empty(dist.get_world_size() * x.shape[0], *x.shape[1:])
    _all_gather_single(y, x)
    return y


def _reduce_scatter(x: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0] // dist.get_world_size(), *x.shape[1:])
    _reduce_scatter_single(y, x)
    return y


def _all_to_all(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    dist.all_to_all_single(y, x)
    return y


def _gather(x: Tensor) -> Tensor:
    if dist.get_rank() != 0:
        dist.gather(x, dst=0)
        return x[:0]
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.gather(x, parts, dst=0)
    return torch.cat(parts)


def _scatter(x: Tensor) -> Tensor:
    n = dist.get_world_size()
    y = x.new_empty(x.shape[0] // n, *x.shape[1:])
    # torch refuses a list on ranks that are not the source
    parts = list(x.chunk(n)) if dist.get_rank() == 0 else None
    dist.scatter(y, parts, src=0)
    return y


def _shift(x: Tensor) -> Tensor:
    rank, n = dist.get_rank(), dist.get_world_size()
    y = torch.empty_like(x)
    # in one batch: one after the other, all ranks would wait for a receiver
    messages = [
        dist.P2POp(dist.isend, x, (rank + 1) % n),
        dist.P2POp(dist.irecv, y, (rank - 1) % n),
    ]
    for work in dist.batch_isend_irecv(messages):
        work.wait()
    return y


def _view(x: Tensor) -> Tensor:
    return x.view_as(x)


def _slice(x: Tensor) -> Tensor:
    length = x.shape[0] // dist.get_world_size()
    return x.narrow(0, dist.get_rank() * length, length)


def _on_first(x: Tensor) -> Tensor:
    return x.view_as(x) if dist.get_rank() == 0 else torch.zeros_like(x)


def _ppermute(x: Tensor) -> Tensor:
    n = pmod.axis_size(AXIS)
    return pmod.ppermute(x, AXIS, [(i, (i + 1) % n) for i in range(n)])


def _pshuffle(x: Tensor) -> Tensor:
    n = pmod.axis_size(AXIS)
    return pmod.pshuffle(x, AXIS, [(i - 1) % n for i in range(n)])


def _all_to_all_rows(x: Tensor) -> Tensor:
    return pmod.all_to_all(x, AXIS, split_dim=0, concat_dim=0)


CASES = {
    "psum": Case(lambda x: pmod.psum(x, AXIS), _all_reduce),
    "pmean": Case(lambda x: pmod.pmean(x, AXIS), _mean),
    "pmax": Case(lambda x: pmod.pmax(x, AXIS), _maximum, _all_reduce),
    "pmin": Case(lambda x: pmod.pmin(x, AXIS), _minimum, _all_reduce),
    "pvary": Case(lambda x: pmod.pvary(x, AXIS), _view, _all_reduce),
    "pick": Case(lambda x: pmod.pick(x, AXIS), _broadcast),
    "place": Case(lambda x: pmod.place(x, AXIS), _on_first, _broadcast),
    "broadcast": Case(lambda x: pmod.broadcast(x, AXIS), _broadcast, _reduce),
    "reduce": Case(lambda x: pmod.reduce(x, AXIS), _reduce, _broadcast),
    "all_gather": Case(
        lambda x: pmod.all_gather(x, AXIS), raw_all_gather, _reduce_scatter
    ),
    "psum_scatter": Case(
        lambda x: pmod.psum_scatter(x, AXIS), _reduce_scatter, raw_all_gather
    ),
    "shard": Case(lambda x: pmod.shard(x, AXIS), _slice, raw_all_gather),
    "unshard": Case(lambda x: pmod.unshard(x, AXIS), raw_all_gather),
    "gather": Case(lambda x: pmod.gather(x, AXIS), _gather, _scatter),
    "scatter": Case(lambda x: pmod.scatter(x, AXIS), _scatter, _gather),
    "all_to_all": Case(_all_to_all_rows, _all_to_all, _all_to_all),
    "pshift": Case(lambda x: pmod.pshift(x, AXIS), _shift, _shift),
    "ppermute": Case(_ppermute, _shift, _shift),
    "pshuffle": Case(_pshuffle, _shift, _shift),
}
for _name, _of in COLLECTIVES.items():
    # the ragged forms bind the rows of the others, and have a section of their own
    if _name not in CASES and not _name.endswith("_v") and not _of.required:
        CASES[_name] = Case(partial(_of.function, axis=AXIS), None)

# one of each kind of message: pmean, unshard, pick and the permutations send what these
# send
MESSAGES = (
    "psum",
    "pmax",
    "all_gather",
    "psum_scatter",
    "all_to_all",
    "pshift",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
)
