"""The same in one process, in plain torch: the parallel network must agree with it."""

from __future__ import annotations

from itertools import islice
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import linear

from pmod.demo.pinn.burgers import NU
from pmod.demo.pinn.descent import descend

Weights: TypeAlias = dict[str, Tensor]


def network(w: Weights, t: Tensor, x: Tensor) -> Tensor:
    """t, x (points, 1) -> the same shape."""
    odd = layers(w, t, x) - layers(w, t, -x)
    return -torch.sin(torch.pi * x) + t * (1 - x**2) * odd


def layers(w: Weights, t: Tensor, x: Tensor) -> Tensor:
    """Return what the solution is made from."""
    y, pairs = torch.cat([2 * t - 1, x], 1), (len(w) + 1) // 4
    for i in range(pairs):
        columns, columns_bias, rows = (
            w[f"pairs.{i}.{name}"] for name in ("columns", "columns_bias", "rows")
        )
        hidden = torch.tanh(linear(y, columns, columns_bias))
        if i == pairs - 1:
            return linear(hidden, rows)
        y = torch.tanh(linear(hidden, rows, w[f"pairs.{i}.rows_bias"]))
    return y


def loss(w: Weights, t: Tensor, x: Tensor) -> Tensor:
    """Return the mean square of what the equation leaves over."""
    t, x = t.clone().requires_grad_(), x.clone().requires_grad_()
    u = network(w, t, x)
    ones = torch.ones_like(u)
    (u_t,) = torch.autograd.grad(u, t, ones, create_graph=True)
    (u_x,) = torch.autograd.grad(u, x, ones, create_graph=True)
    (u_xx,) = torch.autograd.grad(u_x, x, ones, create_graph=True)
    return (u_t + u * u_x - NU * u_xx).pow(2).mean()


def train(
    weights: Weights, t: Tensor, x: Tensor, warm_up: int, steps: int
) -> tuple[Tensor, Weights]:
    """Take so many steps from the weights on, the first `warm_up` with Adam.

    Returns the loss of each, and the weights at the end.
    """
    held = {name: value.clone().requires_grad_() for name, value in weights.items()}
    descent = descend(
        lambda: loss(held, t, x), list(held.values()), lambda a, b: a @ b.T, warm_up
    )
    curve = torch.tensor(list(islice(descent, steps)), dtype=torch.float64)
    return curve, {name: value.detach() for name, value in held.items()}
