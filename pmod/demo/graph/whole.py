"""The same network on the whole mesh, in plain torch: the ranks must agree with it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from pmod.demo.graph.surface import Surface


def loss_and_gradients(
    weights: dict[str, Tensor], surface: Surface, x: Tensor, u: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean square error on these problems, and each weight's gradient.

    Shapes: x (n, batch, 2), u (n, batch).
    """
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    value = (network(leaves, surface, x) - u).square().mean()
    return value.detach(), dict(
        zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True)
    )


def neighbours(surface: Surface) -> tuple[Tensor, Tensor]:
    """Return the two ends of each edge, once each way round."""
    from scipy.sparse import coo_array

    t, n = surface.triangles.numpy(), len(surface)
    ones = np.ones(len(t))
    beside = sum(
        coo_array((ones, (t[:, i], t[:, (i + 1) % 3])), shape=(n, n)).tocsr()
        for i in range(3)
    )
    a, b = (beside + beside.T).nonzero()  # pyright: ignore[reportAttributeAccessIssue]
    return torch.from_numpy(a).long(), torch.from_numpy(b).long()


def network(w: dict[str, Tensor], surface: Surface, x: Tensor) -> Tensor:
    """x (n, batch, 2) -> (n, batch)."""

    def layer(name: str, y: Tensor) -> Tensor:
        return linear(y, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def layers(name: str, y: Tensor) -> Tensor:
        return layer(f"{name}.2", gelu(layer(f"{name}.0", y)))

    at, neighbour = (v.to(x.device) for v in neighbours(surface))
    points = surface.points.to(x.device)
    apart = points[neighbour] - points[at]
    length = apart.norm(dim=1, keepdim=True)
    edges = layers("edges", (torch.cat([apart, length], 1) / length.mean()).to(x.dtype))
    degree = torch.bincount(at, minlength=len(x))[:, None, None]
    h = layers("nodes", x)
    for i in range(
        len({name.split(".")[1] for name in w if name.startswith("rounds.")})
    ):
        r = f"rounds.{i}"
        heard = layer(f"{r}.sender", h)[neighbour] + layer(f"{r}.receiver", h)[at]
        total = torch.zeros_like(h).index_add(
            0, at, gelu(heard + layer(f"{r}.edge", edges)[:, None])
        )
        h = h + layer(
            f"{r}.out", gelu(layer(f"{r}.update", torch.cat([h, total / degree], -1)))
        )
    return layers("decode", h)[..., 0]
