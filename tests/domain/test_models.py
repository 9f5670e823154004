"""Whole models of torch.nn, unmodified: value, every gradient and second derivatives are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.lib import models, spmd
from tests.lib.fields import cuttings, held_to, on_all

Tensor = torch.Tensor

SHAPES = {"UNet": (2, 2, 16, 20), "UNet, odd": (1, 2, 19, 13), "ResNet": (2, 2, 32, 24), "ViT": (2, 2, 12, 8)}


def made(name: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    shape = SHAPES[name]
    kind = getattr(models, name.split(",")[0])
    model = kind(*shape[2:]) if name == "ViT" else kind()
    return model.double(), torch.randn(shape, dtype=torch.float64)


def of(name: str, kind: str) -> Any:
    return cuttings(*SHAPES[name][2:])[kind]


def agrees(name: str, kind: str) -> None:
    model, x = made(name)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        held_to(model, x, of(name, kind), list(model.parameters()))


@pytest.mark.parametrize("kind", ["uneven", "empty", "both", "empty both"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_model_is_that_of_one_process(name: str, kind: str) -> None:
    on_all(agrees, of(name, kind), name, kind)


@pytest.mark.parametrize("name", SHAPES)
def test_on_processes(name: str) -> None:
    spmd.launch(agrees, name, "uneven", lat=2)
