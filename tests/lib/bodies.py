"""What the bodies of `shard_map` in several files use."""

# pyright: standard

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pmod
from pmod import P

DATA = P("data")


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


class Cube(torch.autograd.Function):
    """What shard_map cannot see into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x**2 * y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, y = ctx.saved_tensors
        return 2 * x * y * g, x**2 * g


def message(f: Callable[..., Any], **mesh: int) -> str:
    """The error on the first rank."""
    with pytest.raises(pmod.PmodError) as raised:
        pmod.simulate(f, **mesh)
    return str(raised.value)
