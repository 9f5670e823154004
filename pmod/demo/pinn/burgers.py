"""Burgers' equation, where to ask that it holds, and its solution by a formula.

The formula is that of Cole and Hopf.

    u_t + u u_x = nu u_xx for -1 < x < 1, u(0, x) = -sin(pi x), u(t, -1) = u(t, 1) = 0, nu = 0.01 / pi

A wave that steepens at x = 0 until the viscosity holds it, from t = 1 / pi on, in a
layer of width nu.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

NU = 0.01 / math.pi
# the grid that the error is measured on
TIMES, PLACES = 101, 257
# nodes of the quadrature; with 150 nothing changes above rounding
_ORDER = 100


def solution(t: Tensor, x: Tensor) -> Tensor:
    """Return u by Gauss-Hermite quadrature.

    It is the heat kernel against exp(-cos(pi y) / (2 pi nu)).

    Shapes: t and x alike -> the same shape; float64.
    """
    nodes, weights = (
        torch.from_numpy(v) for v in np.polynomial.hermite.hermgauss(_ORDER)
    )
    y = x[..., None] - 2 * (NU * t[..., None]).sqrt() * nodes
    exponent = -torch.cos(math.pi * y) / (2 * math.pi * NU)
    # without the shift e**50 would be among them
    density = weights * (exponent - exponent.amax(-1, keepdim=True)).exp()
    return -(torch.sin(math.pi * y) * density).sum(-1) / density.sum(-1)


def grid() -> tuple[Tensor, Tensor]:
    """Return t from 0 to 1 down, x from -1 to 1 across.

    Shapes: (TIMES, PLACES), twice.
    """
    sides = (
        torch.linspace(0, 1, TIMES, dtype=torch.float64),
        torch.linspace(-1, 1, PLACES, dtype=torch.float64),
    )
    t, x = torch.meshgrid(*sides, indexing="ij")
    return t.contiguous(), x.contiguous()


def collocation_points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return where the equation is asked to hold.

    x > 0 is enough, because u is odd in x. Half of the points are drawn towards x = 0.

    Shapes: t and x (count, 1).
    """
    drawn = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(
        count, dtype=torch.float64
    )
    t, x = drawn[:, :1].contiguous(), drawn[:, 1:].contiguous()
    x[: count // 2] **= 3
    return t, x
