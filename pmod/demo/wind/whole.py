"""The same differences in one process, in plain torch, written by itself.

The parallel ones must agree bit for bit, so each value comes of the same operations in
the same order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pmod.demo.wind.winds import RADIUS, Winds, latitudes


def derivatives(winds: Winds) -> tuple[Tensor, Tensor]:
    """Return vorticity and divergence at all points.

    Shapes: (times, lat, lon), twice.
    """
    u, v, (lat, lon) = winds.u, winds.v, winds.grid
    dy, dx = math.pi / (lat - 1), 2 * math.pi / lon
    cosine = latitudes(lat).cos().to(u)[:, None]

    def north(f: Tensor) -> Tensor:
        # the rows at the poles come out wrong: they are replaced below
        return (f.roll(1, -2) - f.roll(-1, -2)) / (2 * dy)

    def east(f: Tensor) -> Tensor:
        return (f.roll(-1, -1) - f.roll(1, -1)) / (2 * dx)

    vorticity = (east(v) - north(u * cosine)) / (RADIUS * cosine)
    divergence = (east(u) + north(v * cosine)) / (RADIUS * cosine)
    scale = RADIUS * math.tan(dy / 2)
    for pole, circle, sign in ((0, 1, 1), (-1, -2, -1)):
        along, through = (
            torch.stack([u[..., circle, :], v[..., circle, :]]).mean(-1, keepdim=True)
            * sign
            / scale
        )
        vorticity[..., pole, :], divergence[..., pole, :] = along, -through
    return vorticity, divergence
