"""Winds on a regular grid of the globe, and some whose vorticity is known."""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

# of the earth, in metres, as the published reference has it
RADIUS = 6.3712e6


@attrs.frozen(eq=False)
class Winds:
    """The wind eastward (u) and northward (v), in m/s.

    Rows go from the north pole to the south, columns once round.

    Shapes: u and v (times, lat, lon), float64.
    """

    u: Tensor
    v: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """Return how many rows and columns there are."""
        return int(self.u.shape[-2]), int(self.u.shape[-1])

    def coarser(self) -> Winds:
        """Return every second row and column.

        Of an odd number of rows and an even one of columns they are a regular grid,
        too.
        """
        return Winds(every_second(self.u), every_second(self.v))


def every_second(field: Tensor) -> Tensor:
    return field[..., ::2, ::2]


def latitudes(rows: int) -> Tensor:
    """Return the latitudes from pole to pole, in radians. Shapes: -> (rows,)."""
    return torch.linspace(math.pi / 2, -math.pi / 2, rows, dtype=torch.float64)


def longitudes(columns: int) -> Tensor:
    """Return the longitudes once round, in radians. Shapes: -> (columns,)."""
    return torch.arange(columns, dtype=torch.float64) * (2 * math.pi / columns)


def solid_body(rows: int, columns: int, tilt: float, speed: float = 40.0) -> Winds:
    """Return the winds of a solid body that turns.

    Its axis is `tilt` degrees from the poles', its speed `speed` m/s on its equator.
    """
    up, along, angle = latitudes(rows)[:, None], longitudes(columns), math.radians(tilt)
    u = speed * (up.cos() * math.cos(angle) + up.sin() * along.cos() * math.sin(angle))
    v = -speed * along.sin().expand(rows, -1) * math.sin(angle)
    return Winds(u[None], v[None])


def solid_body_vorticity(
    rows: int, columns: int, tilt: float, speed: float = 40.0
) -> Tensor:
    """Return twice the rate of turning, times the sine of the latitude about its axis.

    There is no divergence.

    Shapes: -> (1, rows, columns).
    """
    up, along, angle = latitudes(rows)[:, None], longitudes(columns), math.radians(tilt)
    sine = up.sin() * math.cos(angle) - along.cos() * up.cos() * math.sin(angle)
    return (2 * speed / RADIUS * sine)[None]


def norm(field: Tensor, cap: float = 0.0) -> float:
    """Return the root mean square over the globe, each point weighted by its area.

    Points within `cap` degrees of a pole are left out.
    """
    up = latitudes(int(field.shape[-2]))
    weight = (up.cos() * outside(up, cap))[:, None].expand_as(field)
    return math.sqrt((weight * field.square()).sum().item() / weight.sum().item())


def outside(up: Tensor, cap: float) -> Tensor:
    """Return which of the latitudes are at least `cap` degrees from both poles."""
    return up.abs() <= math.radians(90 - cap) + 1e-9
