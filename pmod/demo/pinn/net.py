"""A network that is cut over "model", on points that are spread over "data".

Megatron's scheme: of two layers the first is cut by its outputs and the second by its
inputs, so that between them nothing is sent. It holds to any order of derivatives:
those of the solution in t and x are taken through it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pmod
from pmod.demo.pinn.burgers import NU

CUT = {"columns": 0, "columns_bias": 0, "rows": 1}
"""The parameters of a pair that are cut over "model", and in which dim; all ranks hold
the others.
"""


class Pair(nn.Module):
    """Two linear layers and a tanh between them, cut along the hidden units."""

    def __init__(
        self,
        inputs: int,
        width: int,
        outputs: int,
        generator: torch.Generator,
        *,
        last: bool,
    ) -> None:
        super().__init__()
        # all ranks draw the whole, and take their part: they agree on every weight
        columns = torch.randn(width, inputs, generator=generator) / math.sqrt(inputs)
        rows = torch.randn(outputs, width, generator=generator) / math.sqrt(width)
        self.columns = nn.Parameter(pmod.shard(columns, "model").clone())
        self.columns_bias = nn.Parameter(
            pmod.shard(torch.zeros(width), "model").clone()
        )
        self.rows = nn.Parameter(pmod.shard(rows, "model", dim=1).clone())
        # in the last pair it would cancel: u is odd, and a bias is not
        self.rows_bias = None if last else nn.Parameter(torch.zeros(outputs))
        # these are each rank's own, though all start as the same zeros
        pmod.mark_varying(self.columns_bias, "model")

    def forward(self, h: Tensor) -> Tensor:
        """I -> I along "model". h (points of this rank, inputs) -> (points of this
        rank, outputs).
        """
        hidden = torch.tanh(
            F.linear(pmod.pvary(h, "model"), self.columns, self.columns_bias)
        )
        y = pmod.psum(F.linear(hidden, self.rows), "model")
        return y if self.rows_bias is None else y + self.rows_bias


class Net(nn.Module):
    """u(t, x): odd in x, and right at t = 0 and at x = -1 and 1 from the start."""

    def __init__(self, width: int, pairs: int, seed: int) -> None:
        super().__init__()
        ends, generator = (
            [2, *[width] * (pairs - 1), 1],
            torch.Generator().manual_seed(seed),
        )
        made = [
            Pair(ends[i], width, ends[i + 1], generator, last=i == pairs - 1)
            for i in range(pairs)
        ]
        self.pairs = nn.ModuleList(made)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """t, x (points of this rank, 1) -> the same shape."""
        # both at x and at -x: their difference is odd in x
        y = torch.cat([torch.cat([2 * t - 1, x], -1), torch.cat([2 * t - 1, -x], -1)])
        for i, pair in enumerate(self.pairs):
            y = pair(torch.tanh(y) if i else y)
        here, mirrored = y.chunk(2)
        return t * (1 - x * x) * (here - mirrored) - torch.sin(math.pi * x)


def loss(model: nn.Module, t: Tensor, x: Tensor, count: int) -> Tensor:
    """Return the mean square of u_t + u u_x - nu u_xx. V -> I along "data".

    It is the mean over the points of all ranks, `count` of them.

    t and x are leaves: each rank's own slice of the points, in which its part of u is
    differentiated.
    """
    held: dict[str, Tensor] = dict(model.named_parameters())
    parameters = pmod.pvary(held, "data")
    u = torch.func.functional_call(model, parameters, (t, x))
    u_t, u_x = torch.autograd.grad(u.sum(), (t, x), create_graph=True)
    (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
    return pmod.psum((u_t + u * u_x - NU * u_xx).square().sum(), "data") / count
