"""Where the demo's ranks come from: a launcher's, or its own."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch

import pmod
from pmod._console import say
from pmod.demo.options import shown

T = TypeVar("T")


def launched(sizes: Mapping[str, int]) -> pmod.Mesh | None:
    """Return the mesh of these sizes on a launcher's ranks, None without a launcher."""
    if pmod.Topology.detect().launcher == "single":
        return None
    return pmod.make_mesh(sizes)


def run(
    mesh: pmod.Mesh | None, sizes: Mapping[str, int], f: Callable[..., T], *args: object
) -> T:
    """Run f on every rank of the mesh, or of one that is started here.

    Returns what f returns on this rank, or on the first.
    """
    place = pmod.Topology.detect()
    if place.rank == 0:
        ranks = math.prod(sizes.values())
        started = "started here" if mesh is None else f"started by {place.launcher}"
        say(f"mesh    {shown(sizes)}: {ranks} rank{'s' * (ranks > 1)}, {started}")
    if mesh is None:
        return pmod.launch(f, *args, **sizes)[0]
    # under mpirun each rank would start a thread per core of the node, and they would
    # wait for one another
    with pmod.set_mesh(mesh), threads((os.cpu_count() or 1) // place.local_world_size):
        return f(*args)


def device_of_one() -> torch.device:
    """Return where one process computes what the ranks' results are compared with."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def threads(most: int) -> Generator[None]:
    """Compute with no more threads than that."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, most)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
