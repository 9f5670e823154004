"""Winds on a regular grid of the globe, and some whose vorticity is known: those of a
solid body that turns.
"""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

RADIUS = 6.3712e6  # of the earth, in metres: that of the published reference


@attrs.frozen(eq=False)
class Winds:
    """The wind eastward (u) and northward (v), in m/s: rows from the north pole to the
    south, columns once round.

    Shapes: u and v (times, lat, lon), float64.
    """

    u: Tensor
    v: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """How many rows and columns."""
        return int(self.u.shape[-2]), int(self.u.shape[-1])

    def coarser(self) -> Winds:
        """Every second row and column: of an odd number of rows and an even one of
        columns a regular grid, too.
        """
        return Winds(every_second(self.u), every_second(self.v))


def every_second(field: Tensor) -> Tensor:
    return field[..., ::2, ::2]


def latitudes(rows: int) -> Tensor:
    """From pole to pole, in radians. Shapes: -> (rows,)."""
    return torch.linspace(math.pi / 2, -math.pi / 2, rows, dtype=torch.float64)


def longitudes(columns: int) -> Tensor:
    """Once round, in radians. Shapes: -> (columns,)."""
    return torch.arange(columns, dtype=torch.float64) * (2 * math.pi / columns)


def solid_body(rows: int, columns: int, tilt: float, speed: float = 40.0) -> Winds:
    """A solid body that turns about an axis, `tilt` degrees from the poles', at `speed`
    m/s on its equator.
    """
    up, along, angle = latitudes(rows)[:, None], longitudes(columns), math.radians(tilt)
    u = speed * (up.cos() * math.cos(angle) + up.sin() * along.cos() * math.sin(angle))
    v = -speed * along.sin().expand(rows, -1) * math.sin(angle)
    return Winds(u[None], v[None])


def solid_body_vorticity(
    rows: int, columns: int, tilt: float, speed: float = 40.0
) -> Tensor:
    """Twice the rate of turning, times the sine of the latitude about that axis; there
    is no divergence.

    Shapes: -> (1, rows, columns).
    """
    up, along, angle = latitudes(rows)[:, None], longitudes(columns), math.radians(tilt)
    sine = up.sin() * math.cos(angle) - along.cos() * up.cos() * math.sin(angle)
    return (2 * speed / RADIUS * sine)[None]


def norm(field: Tensor, cap: float = 0.0) -> float:
    """The root mean square over the globe, each point for its area; not over points
    within `cap` degrees of a pole.
    """
    up = latitudes(int(field.shape[-2]))
    weight = (up.cos() * outside(up, cap))[:, None].expand_as(field)
    return math.sqrt((weight * field.square()).sum().item() / weight.sum().item())


def outside(up: Tensor, cap: float) -> Tensor:
    """Which of the latitudes are at least `cap` degrees from both poles."""
    return up.abs() <= math.radians(90 - cap) + 1e-9
