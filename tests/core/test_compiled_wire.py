"""Compiled code that sends by itself (_wire/functional.py): torch's own collectives, where a backend has no tags.

The ranks are real, and so are the messages: gloo without tags stands in for NCCL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import pmod
from pmod._ranks import world
from tests.lib import spmd
from tests.lib.listening import same
from tests.lib.untagged import call_untagged

Tensor = torch.Tensor
# Inductor, when it is imported, defines a class with a decorator that torch has deprecated
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning"),
]

# what each makes of a square tensor: all that torch has a form for
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "psum": lambda x: pmod.psum(x.sin(), "x"),
    "pmean": lambda x: pmod.pmean(x.sin(), "x"),
    "pmax": lambda x: pmod.pmax(x.sin(), "x"),
    "pick": lambda x: pmod.pick(x.sin(), "x", src=1),
    "all_gather": lambda x: pmod.all_gather(x.sin(), "x", dim=1),
    "psum_scatter": lambda x: pmod.psum_scatter(x.sin(), "x", dim=1),
    "all_to_all": lambda x: pmod.all_to_all(x.sin(), "x", split_dim=1, concat_dim=0),
    "pshift": lambda x: pmod.pshift(x.sin(), "x"),
    "unshard": lambda x: pmod.unshard(x[: 4 - 4 * pmod.axis_index("x")], "x", sizes=(4, 0)).sin(),
    "complex": lambda x: torch.view_as_real(pmod.all_to_all(torch.complex(x, x.sin()), "x", split_dim=1, concat_dim=0)),
    "sixteen": lambda x: pmod.psum(x.bfloat16(), "x").to(x.dtype),
}


def together(x: Tensor) -> Tensor:
    """Every call, of which this rank needs one early, one late and one not at all, and whose ranks differ in that."""
    i, found = pmod.axis_index("x"), torch.zeros((), dtype=x.dtype)
    for place, call in enumerate(CALLS.values()):
        y = call(x * (1 + place))
        found = found + (y.sum() if (place + i) % 3 else y.sum() * 0 * i)
    pmod.psum(x * 2, "x")
    return found + pmod.pvary(pmod.psum(x, "x"), "x").exp().cos().sum()


def compiled_on_rank(backend: str) -> str:
    import torch._inductor.config as inductor
    from torch._inductor.utils import run_and_get_code

    inductor.compile_threads = 1
    torch._dynamo.reset()
    x = torch.full((4, 4), 0.5 + pmod.axis_index("x"), dtype=torch.float64, requires_grad=True)
    y = together(x)
    (g,) = torch.autograd.grad(y, x)
    fast = torch.compile(together, fullgraph=True, backend=backend)
    found, code = run_and_get_code(fast, x)
    same(found, y.detach(), "value")
    same(torch.autograd.grad(found, x)[0], g, "gradient")
    # another world, whose groups have other names
    pmod.shutdown()
    with pmod.set_mesh(pmod.make_mesh(x=2)), torch.no_grad():
        same(fast(x), y.detach(), "value in another world")
    return "\n".join(code)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_values_and_gradients(backend: str) -> None:
    found = spmd.launch(call_untagged, compiled_on_rank, backend, x=2)
    if backend == "aot_eager":
        return
    for code in found:
        for name in ("all_reduce_", "all_gather_into", "all_to_all_single", "reduce_scatter_tensor", "broadcast_"):
            assert f"torch.ops._c10d_functional.{name}" in code, name
        assert "torch.ops.pmod.linear" not in code


def compared_no_more() -> list[Any]:
    x = torch.ones(3)
    for _ in range(3):
        pmod.psum(x, "x")
    witness: Any = world.processes().connection.witness
    (calls,) = [calls for calls in witness._calls.values() if len(calls.axis.ranks) == 2]
    before = len(calls.told())
    if pmod.axis_index("x") == 0:
        torch._dynamo.reset()
        torch.compile(lambda x: pmod.psum(x, "x"), fullgraph=True, backend="aot_eager")(x)
    else:
        pmod.psum(x, "x")
    return [before, len(calls.told()), pmod.psum(x, "x").tolist()]


def test_a_rank_that_compiles_alone_raises_no_false_alarm() -> None:
    """What compiled code sends is not noted, so calls of that axis are compared no more."""
    first, second = spmd.launch(call_untagged, compared_no_more, x=2)
    assert first == [3, 0, [2.0] * 3] and second == [3, 4, [2.0] * 3]
