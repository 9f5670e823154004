"""What each rank of the job does: take its part, differentiate, hand in the results."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

import pmod
from pmod.demo.wind import stencil
from pmod.demo.wind.options import AXES
from pmod.demo.wind.winds import Winds


@attrs.frozen(eq=False)
class Outcome:
    """What the comparison, the text and the picture need.

    Shapes: vorticity, divergence (times, lat, lon). rows, columns: how many each rank
    along "lat" and "lon" holds.
    sent, held: for each rank, the bytes that it sent for its halos, and those of its
    winds.
    """

    vorticity: Tensor
    divergence: Tensor
    axis_sizes: dict[str, int]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    sent: list[int]
    held: list[int]
    threads: int


def differentiate(winds: Winds) -> Outcome | None:
    """Differentiate over the mesh ("lat", "lon"); rank 0 returns the outcome."""
    mesh, (lat, lon) = pmod.current_mesh(), winds.grid
    # rank 0's on all ranks: unlike machines may round differently
    both = pmod.pick((winds.u.to(mesh.device), winds.v.to(mesh.device)), AXES)
    u, v = pmod.shard(pmod.shard(both, "lat", dim=-2), "lon", dim=-1)
    with pmod.trace() as halos:
        found = stencil.derivatives(u, v, lat, lon)
    counted = torch.tensor(
        [halos.total_bytes(), u.nbytes + v.nbytes], device=mesh.device
    )
    sent, held = pmod.all_gather(counted, AXES, tiled=False).T.tolist()
    whole = pmod.unshard(
        pmod.unshard(found, "lon", dim=-1, length=lon), "lat", dim=-2, length=lat
    )
    vorticity, divergence = (field.cpu() for field in whole)
    if mesh.topology.rank != 0:
        return None
    rows, columns = (
        pmod.split_sizes(n, mesh.shape[axis])
        for n, axis in zip((lat, lon), AXES, strict=True)
    )
    return Outcome(
        vorticity,
        divergence,
        mesh.shape,
        rows,
        columns,
        sent,
        held,
        torch.get_num_threads(),
    )
