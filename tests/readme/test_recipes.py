"""What a training loop adds: the README's recipes on real processes, and beside every way to reduce gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pmod
from tests.lib import spmd
from tests.lib.documents import BLOCKS, printed_here


@pytest.mark.parametrize("name", ["amp", "ema"])
def test_the_recipe_on_processes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate, ran = pmod.simulate, []

    def launch(fn: Callable[..., Any], *args: Any, **axis_sizes: int) -> list[Any]:
        if set(axis_sizes.values()) == {1}:  # what it is compared with
            return simulate(fn, *args, **axis_sizes)
        ran.append(axis_sizes)
        return spmd.launch(fn, *args, **axis_sizes)

    monkeypatch.setattr(pmod, "simulate", launch)
    printed_here(BLOCKS[name][1])
    assert ran == [{"amp": {"model": 2}, "ema": {"data": 2}}[name]]


ATTACH: dict[str, Callable[[nn.Module], object]] = {
    "data_parallel": lambda module: pmod.data_parallel(module, "data"),
    "share_parameters": lambda module: pmod.share_parameters(module, "data", reduce="mean"),
}


def averaged(how: str, x: Tensor) -> dict[str, Tensor]:
    """Five steps, the average after them, and the average as a model: the module's hooks are copied along."""
    torch.manual_seed(pmod.axis_index("data"))  # what attaches makes the parameters equal
    model = nn.Sequential(nn.Linear(3, 4, dtype=torch.float64), nn.Tanh(), nn.Linear(4, 1, dtype=torch.float64))
    ATTACH[how](model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (model(pmod.shard(x, "data")) - 1).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    with torch.no_grad():
        mine = average(pmod.shard(x, "data"))  # with nobody else: nothing is sent
    found = {"model": model(x).detach(), "average": average(x).detach(), "mine": mine}
    return {**found, **{f"parameter {name}": p.detach() for name, p in average.module.named_parameters()}}


@pytest.mark.parametrize("how", ATTACH)
def test_an_average_of_parameters_is_that_of_one_process(how: str) -> None:
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3).cos()
    (alone,) = pmod.simulate(averaged, how, x, data=1)
    found = pmod.simulate(averaged, how, x, data=2)
    alone["mine"] = alone["average"]
    joined = torch.cat([values.pop("mine") for values in found])
    for values in found:
        torch.testing.assert_close({**values, "mine": joined}, alone, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(alone["average"], alone["model"], rtol=1e-3)
