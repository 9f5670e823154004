"""Every collective under torch.compile(fullgraph=True), on real ranks: values compared, never only "it ran"."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import grad, jvp, vmap

import pmod
from tests.lib import spmd
from tests.lib.listening import same
from tests.lib.table import CASES, Here, as_tensors

Tensor = torch.Tensor
# Inductor, when it is imported, defines a class with a decorator that torch has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def compiled(f: Callable[..., Any], backend: Any = "aot_eager") -> Callable[..., Any]:
    return torch.compile(f, fullgraph=True, backend=backend)


# --- every case ---------------------------------------------------------------------------------------------------


# whose transforms inside are those of the same row (pmax, ppermute, psum), or of its transpose, which grad calls
BY_OTHERS = {"pmin", "pshuffle", "pshift", "pmean", "pvary", "psum_scatter", "shard", "place", "reduce", "scatter"}


def case_on_rank(name: str, turn: int | None = None) -> None:
    """Forward, backward, and torch.func's transforms inside the compiled function, against the oracle."""
    torch._dynamo.reset()
    h = Here(CASES[name], "x", 1, turn=0 if CASES[name].asks else turn)  # with sizes: compiled code cannot ask
    function, axis = getattr(pmod, name), h.axis
    kwargs = {k: as_tensors(v) for k, v in h.drawn.kwargs[h.index].items()}
    x, v, w = h.mine(h.xs), h.mine(h.vs), h.mine(h.ws)
    batch = [h.on() for _ in range(2)]
    rows = torch.stack([b.mine(b.xs) for b in batch], -1)

    def value(x: Tensor) -> Tensor:
        return function(x, axis, **kwargs)

    def loss(x: Tensor) -> Tensor:
        return torch.dot(w.reshape(-1), value(x).reshape(-1).exp())

    def slope(x: Tensor) -> tuple[Tensor, Tensor]:
        g = grad(loss)(x)
        return (g * v).sum(), g

    def transformed(x: Tensor, v: Tensor, rows: Tensor) -> dict[str, Tensor]:
        second, first = grad(slope, has_aux=True)(x)
        tangent = jvp(value, (x,), (v,))[1]
        return {"grad": first, "grad of grad": second, "jvp": tangent, "vmap": vmap(value, in_dims=-1)(rows)}

    leaf = h.leaf()
    y = compiled(value)(leaf)
    same(y, h.mine(h.ys), f"{name}: value")
    same(torch.autograd.grad(y, leaf, w)[0], h.mine(h.jacobian.pull(h.ws)), f"{name}: gradient")
    if name in BY_OTHERS or (name.endswith("_v") and "indexed" not in name):
        return
    expected = {
        "grad": h.mine(h.derivative()),
        "grad of grad": h.mine(h.derivative(h.vs)),
        "jvp": h.mine(h.jacobian.push(h.vs)),
        "vmap": torch.stack([b.mine(b.ys) for b in batch]),
    }
    found = compiled(transformed)(x, v, rows)
    for what, result in found.items():
        same(result, expected[what], f"{name}: {what} inside")


def cases_on_rank(names: list[str]) -> None:
    for name in names:
        case_on_rank(name)


@pytest.mark.parametrize("part", range(4))
def test_every_case(part: int) -> None:
    spmd.launch(cases_on_rank, list(CASES)[part::4], x=2)


def test_a_permutation_of_uneven_shards() -> None:
    spmd.launch(case_on_rank, "ppermute", 2, x=2)


# --- meshes -------------------------------------------------------------------------------------------------------


def swapped_on_rank() -> None:
    """Code that was compiled under one mesh, run under others, whose axis is elsewhere or turned round."""
    torch._dynamo.reset()
    grid = pmod.current_mesh()
    rank = grid.topology.rank
    x = torch.tensor([float(10**rank)])

    # three functions, because each must notice by itself that the mesh is another one
    def named(x: Tensor) -> list[Tensor]:
        return [pmod.psum(x, "a") + pmod.axis_index("a")]

    def current(x: Tensor) -> list[Tensor]:
        return [pmod.pshift(x, pmod.current_mesh()["a"])]

    def given(x: Tensor, mesh: pmod.Mesh, axis: pmod.Mesh) -> list[Tensor]:
        return [pmod.all_gather(x, axis), pmod.psum(x, mesh["a"]) + pmod.psum(x, mesh["b", "a"])]

    fast = {f: compiled(f) for f in (named, current, given)}
    turned = grid.rename(a="b", b="a")
    mirrored = pmod.make_mesh(a=2, b=1, ranks=[1, 0], topology=grid.topology)
    for mesh in (grid, turned, mirrored, grid, turned):
        with pmod.set_mesh(mesh):
            for f, rest in ((named, ()), (current, ()), (given, (mesh, mesh["a"]))):
                for got, expected in zip(fast[f](x, *rest), f(x, *rest), strict=True):
                    same(got, expected, f"{f.__name__} under {mesh!r}")
    # backward belongs to the mesh of its forward, whatever is set by then
    leaf = x.clone().requires_grad_()
    y = fast[given](leaf, grid, grid["a"])[0]
    with pmod.set_mesh(turned):
        (y * (rank + 1)).sum().backward()
    assert leaf.grad.tolist() == [3.0]


def test_mesh_swapped() -> None:
    spmd.launch(swapped_on_rank, a=2, b=1)


# --- imports and lengths ----------------------------------------------------------------------------------------------


def test_import_is_light() -> None:
    """torch.compile's and DTensor's machinery costs seconds: importing pmod must not load it."""
    heavy = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor")
    script = f"import sys, pmod; print([name for name in sys.modules if name.startswith({heavy})])"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


def other_lengths_on_rank() -> None:
    """Uneven shares in a graph that torch compiles once more, with symbols for lengths."""
    torch._dynamo.reset()
    there_and_back = compiled(lambda x: pmod.unshard(pmod.shard(x, "x").sin(), "x", length=x.shape[0]))
    for n in (5, 7, 9, 4):
        x = torch.arange(float(n))
        same(there_and_back(x), x.sin(), f"length {n}")


def test_shares_of_other_lengths() -> None:
    spmd.launch(other_lengths_on_rank, x=2)


@pytest.mark.parametrize("axis", [lambda: "a", lambda: pmod.current_mesh()["a"]], ids=["name", "sub-mesh"])
def test_a_simulated_rank_says_that_it_cannot(axis: Any) -> None:
    f = torch.compile(lambda x: pmod.psum(x, axis()), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="a simulated rank runs compiled code"):
        pmod.simulate(f, torch.ones(2), a=2)
