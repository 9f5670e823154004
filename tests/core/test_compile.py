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
from pmod._core.row import decode, encode
from tests.lib import spmd
from tests.lib.listening import counted, listening, same
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


# --- programs, which Inductor may reorder and fuse ----------------------------------------------------------------


def program(x: Tensor, w: Tensor) -> Tensor:
    """A norm, a ring step, a transpose, uneven shards; a V loss."""
    centred = x - pmod.pvary(pmod.start(pmod.pmean, x.mean(0), "x").wait(), "x")
    ring = pmod.pshift(torch.tanh(centred @ pmod.pvary(w, "x")), "x")
    turned = pmod.all_to_all(ring, "x", split_dim=1, concat_dim=0)
    whole = pmod.unshard(turned[: 3 - 2 * pmod.axis_index("x")], "x", sizes=(3, 1))
    return pmod.shard(whole * whole.sin(), "x", dim=1).square().mean()


def gathered(w: Tensor) -> Tensor:
    """Small, for the transforms inside."""
    return pmod.psum_scatter(pmod.all_gather(w, "x").sin(), "x").sum() + pmod.pvary(pmod.pmax(w, "x"), "x").exp().sum()


def program_on_rank(backend: str) -> None:
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # no pool of its own for each rank
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(2, 4, 4, dtype=torch.float64, generator=generator)[pmod.axis_index("x")].requires_grad_()
    w = torch.rand(4, 4, dtype=torch.float64, generator=generator).requires_grad_()
    loss, got = program(x, w), compiled(program, backend)(x, w)
    same(got, loss.detach(), "loss")
    expected = torch.autograd.grad(loss, (x, w))
    for g, e in zip(torch.autograd.grad(got, (x, w)), expected, strict=True):
        same(g, e, "gradient")

    def inside(x: Tensor) -> list[Tensor]:
        tangent = jvp(gathered, (x,), (x.cos(),))[1]
        second = grad(lambda x: (grad(gathered)(x) * x).sum())(x)
        return [tangent, second, vmap(gathered, in_dims=1)(x)]

    for result, e in zip(compiled(inside, backend)(x.detach()), inside(x.detach()), strict=True):
        same(result, e, "a transform inside")


def test_program() -> None:
    spmd.launch(program_on_rank, "inductor", x=2)


def all_messages(x: Tensor) -> Tensor:
    """Messages that this rank needs early, late or not at all."""
    i = pmod.axis_index("x")
    here = pmod.gather(x.sin(), "x", dst=0)  # of length 0 on rank 1
    late = pmod.all_gather(x.exp().cos() @ x, "x")
    pmod.psum(x * 2, "x")
    whole = pmod.unshard(x[: 4 - 4 * i], "x", sizes=(4, 0))
    swapped = pmod.pshift(x - 1, "x")
    return here.sum() + late.sum() * i + swapped.sum() * (1 - i) + pmod.pvary(whole, "x").sum()


def order_on_rank(backend: str) -> list[list[str]]:
    torch._dynamo.reset()
    x = torch.full((4, 4), 0.5 + pmod.axis_index("x"), dtype=torch.float64, requires_grad=True)
    orders, results = [], []
    with listening():
        for f in (all_messages, compiled(all_messages, backend)):
            y, forward = counted(lambda f=f: f(x))
            (g,), backward = counted(lambda y=y: torch.autograd.grad(y, x))
            orders += [[name for name, *_ in sent] for sent in (forward, backward)]
            results += [y, g]
    same(results[2], results[0].detach(), "value")
    same(results[3], results[1], "gradient")
    return orders


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_order_of_messages(backend: str) -> None:
    """Ranks whose shapes and needs differ send the same messages in the same order, and drop none."""
    first, second = spmd.launch(order_on_rank, backend, x=2)
    eager_forward, _, forward, backward = first
    assert forward == eager_forward == ["all_to_all", "all_gather", "all_reduce", "all_gather", "permute"]
    assert second[2] == forward and second[3] == backward


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


# --- what is in a compiled graph, and in an import ----------------------------------------------------------------


def calls_on_rank() -> list[str]:
    """The texts of all calls in the graph of a program, forward and backward."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    found: list[str] = []

    def note(graph: Any, _: Any) -> Any:
        for node in graph.graph.nodes:
            found.extend(arg for arg in node.args if isinstance(arg, str) and "|" in arg)
        return make_boxed_func(graph)

    x = torch.rand(2, 4, 4, dtype=torch.float64)[0].requires_grad_()
    w = torch.rand(4, 4, dtype=torch.float64).requires_grad_()
    compiled(program, aot_autograd(fw_compiler=note))(x, w).backward()
    return found


def test_graphs_hold_no_process() -> None:
    """A call in a graph is text, which another process reads as the same call."""
    of_ranks = spmd.launch(calls_on_rank, x=2)
    rows = {text.split("|")[0] for text in of_ranks[0]}
    assert rows >= {"psum", "permute", "all_to_all", "unshard", "shard", "pvary"}
    for index, texts in enumerate(of_ranks):
        for text in texts:
            call = decode(text)
            assert encode(call.row.name, call.axis.key, call.params) == text
            assert (call.axis.ranks, call.axis.index, call.axis.size) == ([0, 1], index, 2)
    read = "import sys, pmod._core.row as a; c = a.decode(sys.argv[1]); print(a.encode(c[0].name, c[1].key, c[2]))"
    text = next(text for text in of_ranks[1] if text.startswith("unshard"))
    printed = subprocess.run([sys.executable, "-c", read, text], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == text


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


# --- what torch cannot do -----------------------------------------------------------------------------------------


def penalized(x: Tensor, w: Tensor) -> Tensor:
    return pmod.psum(torch.tanh(x @ pmod.pvary(w, "x")).sum(), "x")


def moved_only(x: Tensor, w: Tensor) -> Tensor:
    return (pmod.pshift(x.sin(), "x") @ w).cos().sum()


def second_on_rank(backend: str) -> None:
    torch._dynamo.reset()
    w = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3).requires_grad_()
    x = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(2, 4).requires_grad_()
    for f in (penalized, moved_only):
        y = compiled(f, backend)(x, w)
        with pytest.raises(pmod.PmodError, match="create_graph=True, and what torch compiles has no second derivative"):
            torch.autograd.grad(y, x, create_graph=True)
        # a graph that is only kept is right, and so are both derivatives inside
        for _ in range(2):
            same(torch.autograd.grad(y, w, retain_graph=True)[0], torch.autograd.grad(f(x, w), w)[0], "first")
        penalty = compiled(lambda w, f=f: grad(f)(x.detach(), w).square().sum(), backend)(w)
        (slope,) = torch.autograd.grad(f(x, w), x, create_graph=True)
        expected = torch.autograd.grad(slope.square().sum(), w)
        same(torch.autograd.grad(penalty, w)[0], expected[0], "second")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_second_derivative_of_compiled_code_is_refused(backend: str) -> None:
    """torch drops it silently, where what is differentiated is not what the compiled function returned."""
    spmd.launch(second_on_rank, backend, x=2)
