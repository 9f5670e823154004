"""Whole programs under torch.compile(fullgraph=True), on real ranks: Inductor may reorder and fuse what they hold."""

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

Tensor = torch.Tensor
# Inductor, when it is imported, defines a class with a decorator that torch has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def compiled(f: Callable[..., Any], backend: Any) -> Callable[..., Any]:
    return torch.compile(f, fullgraph=True, backend=backend)


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
    import torch._inductor.config as inductor

    inductor.compile_threads = 1
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


# --- what is in a compiled graph ----------------------------------------------------------------------------------


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
    # what moves nothing, as pvary and shard, is torch's own operators there
    assert rows == {"psum", "permute", "all_to_all", "unshard"}
    for index, texts in enumerate(of_ranks):
        for text in texts:
            call = decode(text)
            assert encode(call.row.name, call.axis.key, call.params) == text
            assert (call.axis.ranks, call.axis.index, call.axis.size) == ([0, 1], index, 2)
    read = "import sys, pmod._core.row as a; c = a.decode(sys.argv[1]); print(a.encode(c[0].name, c[1].key, c[2]))"
    text = next(text for text in of_ranks[1] if text.startswith("unshard"))
    printed = subprocess.run([sys.executable, "-c", read, text], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == text


# --- what torch cannot do -----------------------------------------------------------------------------------------


def penalized(x: Tensor, w: Tensor) -> Tensor:
    return pmod.psum(torch.tanh(x @ pmod.pvary(w, "x")).sum(), "x")


def moved_only(x: Tensor, w: Tensor) -> Tensor:
    return (pmod.pshift(x.sin(), "x") @ w).cos().sum()


def second_on_rank(backend: str) -> None:
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # no pool of its own for each rank
    torch._dynamo.reset()
    w = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3).requires_grad_()
    x = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(2, 4).requires_grad_()
    # the refusal is in the graph of backward, which both backends get: one function shows that Inductor keeps it
    for f in (penalized,) if backend == "inductor" else (penalized, moved_only):
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
