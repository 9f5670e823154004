"""Vorticity and divergence by differences of neighbours over a mesh ("lat", "lon")."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import pmod
from pmod.demo.wind.winds import RADIUS, latitudes


def derivatives(u: Tensor, v: Tensor, lat: int, lon: int) -> tuple[Tensor, Tensor]:
    """Return vorticity and divergence at this rank's points of a lat x lon grid.

    Both poles belong to the grid.

    V -> V. u, v (..., rows of this rank, columns of this rank) -> the same shape,
    twice.
    """
    rows, columns = (
        pmod.split_sizes(lat, pmod.axis_size("lat")),
        pmod.split_sizes(lon, pmod.axis_size("lon")),
    )
    first, held = sum(rows[: pmod.axis_index("lat")]), rows[pmod.axis_index("lat")]
    u, v = pmod.halo_exchange(
        (u, v),
        {-2: "lat", -1: "lon"},
        width=1,
        boundary={-2: "zeros", -1: "periodic"},
        sizes={-2: rows, -1: columns},
    )
    cosine = F.pad(latitudes(lat).cos(), (1, 1)).to(u)[first : first + held + 2, None]
    dy, dx = math.pi / (lat - 1), 2 * math.pi / lon

    def north(f: Tensor) -> Tensor:
        return (f[..., :-2, 1:-1] - f[..., 2:, 1:-1]) / (2 * dy)

    def east(f: Tensor) -> Tensor:
        return (f[..., 1:-1, 2:] - f[..., 1:-1, :-2]) / (2 * dx)

    across = RADIUS * cosine[1:-1]
    vorticity = (east(v) - north(u * cosine)) / across
    divergence = (east(u) + north(v * cosine)) / across
    # at a pole there is no east: what flows along and through the next circle, over the
    # area of the cap inside
    for here, pole, circle, sign in (
        (first == 0, 0, 2, 1),
        (first + held == lat, -1, -3, -1),
    ):
        if here and held:
            around = pmod.unshard(
                torch.stack([u, v])[..., circle, 1:-1], "lon", dim=-1, sizes=columns
            )
            along, through = (
                around.mean(-1, keepdim=True) * sign / (RADIUS * math.tan(dy / 2))
            )
            vorticity[..., pole, :], divergence[..., pole, :] = along, -through
    return vorticity, divergence
