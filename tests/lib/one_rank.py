"""What each collective gives along an axis of one rank."""

# pyright: standard

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import pmod

X = torch.linspace(-1.5, 2.0, 6, dtype=torch.float64).view(2, 3)


# On one rank each of these gives its argument back.
IDENTITIES: dict[str, Callable[[Any, Any], Any]] = {
    "psum": pmod.psum,
    "pmean": pmod.pmean,
    "pmean with a weight": lambda x, axis: pmod.pmean(x, axis, weight=3),
    "pmean with weights": lambda x, axis: pmod.pmean(x, axis, weight=torch.tensor([1.0, 2.0, 4.0])),
    "pmax": pmod.pmax,
    "pmin": pmod.pmin,
    "pick": pmod.pick,
    "place": pmod.place,
    "pvary": pmod.pvary,
    "broadcast": pmod.broadcast,
    "reduce": pmod.reduce,
    "all_gather": lambda x, axis: pmod.all_gather(x, axis, dim=1),
    "psum_scatter": lambda x, axis: pmod.psum_scatter(x, axis, dim=-1),
    "shard": lambda x, axis: pmod.shard(x, axis, dim=1),
    "shard with sizes": lambda x, axis: pmod.shard(x, axis, dim=1, sizes=(3,)),
    "unshard": lambda x, axis: pmod.unshard(x, axis, dim=-1),
    "unshard with sizes": lambda x, axis: pmod.unshard(x, axis, sizes=[2]),
    "unshard with length": lambda x, axis: pmod.unshard(x, axis, length=2),
    "gather": pmod.gather,
    "scatter": pmod.scatter,
    "scatter with sizes": lambda x, axis: pmod.scatter(x, axis, dim=1, sizes=(3,)),
    "all_to_all": lambda x, axis: pmod.all_to_all(x, axis, split_dim=0, concat_dim=1),
    "all_to_all with sizes": lambda x, axis: pmod.all_to_all(
        x, axis, split_dim=0, concat_dim=1, split_sizes=(2,), concat_sizes=(3,)
    ),
    "ppermute": lambda x, axis: pmod.ppermute(x, axis, [(0, 0)]),
    "pshuffle": lambda x, axis: pmod.pshuffle(x, axis, [0]),
    "pshift": pmod.pshift,
    "pshift by 0 without wrap": lambda x, axis: pmod.pshift(x, axis, 0, wrap=False),
}


ZEROS: dict[str, Callable[[Any, Any], Any]] = {
    "ppermute": lambda x, axis: pmod.ppermute(x, axis, []),
    "pshift": lambda x, axis: pmod.pshift(x, axis, 1, wrap=False),
}
