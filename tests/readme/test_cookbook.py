"""The README's cookbook on real processes, and compiled: each recipe compares itself with its serial model."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pmod
from tests.lib import spmd
from tests.lib.documents import BLOCKS

RECIPES = {name.removeprefix("cookbook-"): text for name, (_, text) in BLOCKS.items() if name.startswith("cookbook-")}
# what is asked of a tensor (which nodes, how many tokens) ends a graph, and another begins after it
BREAKS = {"graph", "expert"}


def test_every_parallelism_has_a_recipe() -> None:
    assert set(RECIPES) == {"data", "tensor", "sequence", "context", "pipeline", "fsdp", "domain", "graph", "expert"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_short(name: str) -> None:
    """What comes before the serial model is what a user writes."""
    lines = RECIPES[name].split("\ndef serial")[0].splitlines()
    assert sum(bool(line.strip()) for line in lines) < 25


def on_this_mesh(name: str, text: str, compile_it: bool) -> int:
    """Run a recipe on these ranks and not in a simulation, also with its function compiled; how often it checked."""
    torch._dynamo.reset()
    torch.manual_seed(0)  # all ranks draw the same whole arguments
    check: Callable[..., None] = pmod.testing.assert_matches_serial
    size, checked = pmod.current_mesh().size, 0

    def here(f: Any, serial: Any, args: Any, *, order: int = 2, in_specs: Any, out_specs: Any, **sizes: int) -> None:
        nonlocal checked
        ((axis, n),) = sizes.items()
        if n != size:
            return
        checked += 1
        specs = {"in_specs": in_specs, "out_specs": out_specs}
        with pmod.set_mesh(pmod.make_mesh({axis: n})):
            check(f, serial, args, order=order, **specs)
            if compile_it:
                f = torch.compile(f, fullgraph=name not in BREAKS, backend="aot_eager")
                check(f, serial, args, order=min(order, 1), **specs)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Dynamo says where it breaks a graph, and looks at .grad
        patch.setattr(pmod.testing, "assert_matches_serial", here)
        exec(compile(text, name, "exec"), {"__name__": "__main__"})
    return checked


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_compiled_on_processes(name: str) -> None:
    assert spmd.launch(on_this_mesh, name, RECIPES[name], True, data=2) == [1, 1]


def all_recipes() -> list[int]:
    return [on_this_mesh(name, text, False) for name, text in RECIPES.items()]


def test_recipes_on_four_processes() -> None:
    assert spmd.launch(all_recipes, data=4) == [[1] * len(RECIPES)] * 4


def test_fully_sharded_with_checkpoints() -> None:
    """As the text beside the recipe says."""
    text = "from torch.utils.checkpoint import checkpoint\n" + RECIPES["fsdp"]
    with_checkpoint = text.replace("= layer(x, rows)", "= checkpoint(layer, x, rows, use_reentrant=False)")
    assert with_checkpoint != text
    exec(compile(with_checkpoint, "fsdp", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("name", RECIPES)
def test_a_broken_recipe_is_seen(name: str) -> None:
    """Without its first pvary, or sum, or exchange, no recipe equals its serial model."""
    source = inspect.cleandoc(RECIPES[name])
    broken, count = re.subn(BROKEN[name][0], BROKEN[name][1], source, count=1)
    assert count == 1
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        exec(compile(broken, name, "exec"), {"__name__": "__main__"})


BROKEN = {
    "data": (r"pmod\.pvary\(w, \"data\"\)", "w"),
    "tensor": (r"pmod\.pvary\(x, \"model\"\) @ a", "x @ a"),
    "sequence": (r"pmod\.pvary\(scale, \"model\"\)", "scale"),
    "context": (r"> at\[me\]", ">= at[me]"),
    "pipeline": (r"2 \* \(y - ys\[j // 2\]\)", "(y - ys[j // 2])"),
    "fsdp": (r"pmod\.psum\(\(x - y\)\.square\(\)\.sum\(\), \"data\"\)", "(x - y).square().sum()"),
    "domain": (r"boundary=\"periodic\"", 'boundary="zeros"'),
    "graph": (r"pmod\.pvary\(w, \"graph\"\)", "w"),
    "expert": (r"pmod\.pvary\(gate, \"expert\"\)", "gate"),
}
