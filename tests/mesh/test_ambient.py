"""The ambient mesh: set, nested, restored; and found wherever backward and checkpoints run code that names an axis."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pmod
from pmod._mesh import ambient
from pmod._ranks import world
from tests.lib import spmd


def mesh_of(**sizes: int) -> pmod.Mesh:
    return pmod.make_mesh(sizes, topology=pmod.Topology(rank=0, world_size=1))


@pytest.fixture
def a() -> pmod.Mesh:
    return mesh_of(a=1)


@pytest.fixture
def b() -> pmod.Mesh:
    return mesh_of(b=1)


@pytest.fixture
def c() -> pmod.Mesh:
    return mesh_of(c=1)


@pytest.fixture(autouse=True)
def _no_mesh_before_and_after() -> Iterator[None]:
    assert ambient.ambient() is None
    yield
    ambient._put(None)
    assert world.current() is world.processes()


def current() -> pmod.Mesh | None:
    try:
        return pmod.current_mesh()
    except pmod.NoMeshError:
        return None


# --- set_mesh -------------------------------------------------------------------------------------------------------


def test_as_a_statement_it_holds_until_further_notice(a, b):
    pmod.set_mesh(a)
    assert pmod.current_mesh() is a
    pmod.set_mesh(b)
    assert pmod.current_mesh() is b
    assert pmod.axis_size("b") == 1
    with pytest.raises(pmod.AxisError):
        pmod.axis_size("a")


def test_as_a_context_manager_it_restores_what_was_there(a, b, c):
    with pmod.set_mesh(a) as entered:
        assert entered is a and pmod.current_mesh() is a
        with pmod.set_mesh(b), pmod.set_mesh(c):
            assert pmod.current_mesh() is c
        assert pmod.current_mesh() is a
        with pmod.set_mesh(a):
            pass
        assert pmod.current_mesh() is a
    assert current() is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit, pmod.AxisError])
def test_it_restores_after_an_exception_and_lets_it_through(a, b, error):
    with pytest.raises(error), pmod.set_mesh(a):
        try:
            with pmod.set_mesh(b):
                raise error("x")
        finally:
            assert pmod.current_mesh() is a
    assert current() is None


def test_a_statement_inside_a_with_holds_until_its_end(a, b, c):
    pmod.set_mesh(c)
    with pmod.set_mesh(a):
        pmod.set_mesh(b)
        assert pmod.current_mesh() is b
        with pmod.set_mesh(a):
            pmod.set_mesh(c)
        assert pmod.current_mesh() is b
    assert pmod.current_mesh() is c


def test_what_set_mesh_returns_can_be_entered_later_and_again(a, b):
    kept = pmod.set_mesh(a)
    pmod.set_mesh(b)
    for _ in range(2):
        with kept:
            assert pmod.current_mesh() is a
        assert pmod.current_mesh() is b


def test_one_set_mesh_can_be_entered_inside_itself(a, b, c):
    kept = pmod.set_mesh(a)
    pmod.set_mesh(b)
    with kept:
        with kept:
            assert pmod.current_mesh() is a
        assert pmod.current_mesh() is a
        with pmod.set_mesh(c), kept:
            assert pmod.current_mesh() is a
        assert pmod.current_mesh() is a
    assert pmod.current_mesh() is b


@pytest.mark.parametrize("wrong", [None, {"data": 1}, "data", pmod.Mesh, 3])
def test_what_is_no_mesh_is_refused_and_changes_nothing(a, wrong):
    pmod.set_mesh(a)
    with pytest.raises(pmod.ArgumentError) as caught:
        pmod.set_mesh(wrong)
    assert str(caught.value) == f"pmod.set_mesh: mesh is a {type(wrong).__name__}.\nPass a pmod.Mesh."
    assert isinstance(caught.value, TypeError)
    assert pmod.current_mesh() is a


WAYS_OUT = "Either set one, pmod.set_mesh(pmod.make_mesh(data=-1)), or pass a sub-mesh, axis=mesh['data']."


def test_without_a_mesh_the_error_shows_two_ways_out(a):
    x = torch.ones(2)
    calls: dict[str, Callable[[], Any]] = {
        "current_mesh": pmod.current_mesh,
        "psum(axis='data')": lambda: pmod.psum(x, "data"),
        "shard(axis=('data', 'model'))": lambda: pmod.shard(x, ("data", "model")),
        "axis_index(axis='data')": lambda: pmod.axis_index("data"),
        "axis_size(axis='data')": lambda: pmod.axis_size("data"),
        "barrier(axis='data')": lambda: pmod.barrier("data"),
    }
    for function, call in calls.items():
        with pytest.raises(pmod.NoMeshError) as caught:
            call()
        assert str(caught.value) == f"pmod.{function}: no mesh is set.\n{WAYS_OUT}"
    # and they are ways out
    assert pmod.psum(x, axis=a["a"]) is not None
    pmod.set_mesh(pmod.make_mesh(data=-1, topology=pmod.Topology(rank=0, world_size=1)))
    assert pmod.psum(x, "data") is not None


def test_a_sub_mesh_needs_no_ambient_mesh_and_heeds_none():
    def rank() -> list[int]:
        mesh = pmod.current_mesh()
        other = mesh.rename(x="y", y="x")
        with pmod.set_mesh(other):
            return [pmod.psum(1, axis) for axis in (mesh["x"], other["x"], "x", "y")]

    assert pmod.simulate(rank, x=2, y=3) == [[2, 3, 3, 2]] * 6


def test_the_mesh_is_the_same_on_every_thread(a, b):
    pmod.set_mesh(a)
    seen: list[pmod.Mesh | None] = []
    thread = threading.Thread(target=lambda: (seen.append(current()), pmod.set_mesh(b)))
    thread.start()
    thread.join()
    assert seen == [a]
    assert pmod.current_mesh() is b


def test_a_simulation_has_a_mesh_of_its_own_on_every_rank(a):
    pmod.set_mesh(a)

    def rank() -> tuple[Any, ...]:
        before = pmod.current_mesh()
        with pmod.set_mesh(before.rename(r=f"r{pmod.axis_index('r')}")):
            pmod.barrier(before["r"])  # the other ranks run here, with their own mesh set
            name = pmod.current_mesh().axis_names
        pmod.barrier("r")
        return name, pmod.current_mesh() is before

    assert pmod.simulate(rank, r=3) == [(("r0",), True), (("r1",), True), (("r2",), True)]
    assert pmod.current_mesh() is a


# --- inside backward ------------------------------------------------------------------------------------------------
# Rank r of x and of y has another sum along each axis, so a wrong mesh gives a wrong number.


class SumInBackward(torch.autograd.Function):
    """Names an axis only in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[Any]) -> Tensor:
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        ctx.seen.append((pmod.current_mesh().axis_names, threading.get_ident()))
        return pmod.psum(g, "x"), None


def sums_in_backward(how: str) -> None:
    mesh = pmod.current_mesh()
    seen: list[Any] = []
    x = torch.tensor(1.0, requires_grad=True)
    here = 10.0 ** (2 * mesh.axis_index("x") + mesh.axis_index("y"))
    y = SumInBackward.apply(x, seen) * here
    if how == "hook":
        x.register_hook(lambda g: pmod.psum(g, "y"))
    run_backward(how, y)
    along_x = sum(10.0 ** (2 * i + mesh.axis_index("y")) for i in range(2))
    expected = along_x if how != "hook" else 1111.0
    assert x.grad is not None and x.grad.item() == expected
    (axes, thread), = seen  # fmt: skip
    assert axes == ("x", "y")
    assert (thread == threading.get_ident()) == (how in ("here", "hook"))


class Deep(torch.autograd.Function):
    """A backward inside a backward, `depth` times: from a certain depth on, torch runs it on its own threads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[], None], depth: int) -> Tensor:
        ctx.run, ctx.depth = run, depth
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        with torch.enable_grad():
            if ctx.depth == 0:
                ctx.run()
            else:
                Deep.apply(torch.ones((), requires_grad=True), ctx.run, ctx.depth - 1).backward()
        return g, None, None


def run_backward(how: str, loss: Tensor) -> None:
    if how == "thread":
        errors: list[BaseException] = []

        def backward() -> None:
            try:
                loss.backward()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
        assert not errors, errors
    elif how == "autograd's thread":
        Deep.apply(torch.ones((), requires_grad=True), loss.backward, 70).backward()
    else:
        loss.backward()


@pytest.mark.parametrize("how", ["here", "hook", "thread", "autograd's thread"])
def test_the_mesh_is_found_inside_backward_on_whatever_thread(how):
    spmd.launch(sums_in_backward, how, x=2, y=2)


def test_the_mesh_is_found_inside_backward_in_a_simulation():
    pmod.simulate(sums_in_backward, "here", x=2, y=2)
    pmod.simulate(sums_in_backward, "hook", x=2, y=2)


def test_a_backward_outside_the_with_keeps_to_the_groups_of_the_forward():
    def rank(other: str) -> float:
        mesh = pmod.current_mesh()
        ambient._put(None)
        x = torch.tensor(1.0, requires_grad=True)
        with pmod.set_mesh(mesh):
            y = pmod.pvary(x, "x") * 10.0 ** (2 * pmod.axis_index("x") + pmod.axis_index("y"))
        if other:
            pmod.set_mesh(mesh.rename(x="y", y="x"))
        y.backward()
        assert x.grad is not None
        return x.grad.item()

    for other in ("", "swapped"):
        assert pmod.simulate(rank, other, x=2, y=2) == [101.0, 1010.0, 101.0, 1010.0]


# --- checkpoints ----------------------------------------------------------------------------------------------------


def block(x: Tensor) -> Tensor:
    """Needs the sum along x again when it is recomputed."""
    return (pmod.pvary(pmod.psum(x, "x"), "x").sin() * x).sum()


def gradient(run: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor], after: str, passes: int = 1) -> Tensor:
    """The gradient of a block whose forward ran inside `with set_mesh(mesh)`, and the backward after it."""
    mesh = pmod.current_mesh()
    ambient._put(None)
    x = (torch.arange(2.0) + pmod.axis_index(mesh["x", "y"])).requires_grad_()
    with pmod.set_mesh(mesh):
        loss = run(block, x)
        if after == "inside":
            loss.backward()
    if after == "another mesh":
        pmod.set_mesh(mesh.rename(x="y", y="x"))
    if after != "inside":
        for number in range(passes):
            before = current()
            loss.backward(retain_graph=number + 1 < passes)
            assert current() is before
    assert x.grad is not None
    return x.grad


def plain(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return f(x)


def kept(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(f, x, use_reentrant=False, context_fn=pmod.keep_mesh)


def not_kept(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(f, x, use_reentrant=False)


def kept_twice(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A checkpoint within a checkpoint."""
    return kept(lambda x: kept(f, x) * 1, x)


AFTER = ["inside", "outside", "another mesh"]


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("run", [kept, kept_twice])
def test_keep_mesh_recomputes_under_the_mesh_of_the_forward(run, after):
    expected = pmod.simulate(gradient, plain, "inside", x=2, y=2)
    assert not torch.equal(expected[0], expected[1])
    found = pmod.simulate(gradient, run, after, x=2, y=2)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("after", AFTER)
def test_keep_mesh_on_real_ranks(after):
    expected = pmod.simulate(gradient, plain, "inside", x=2, y=2)
    found = spmd.launch(gradient, kept, after, x=2, y=2)
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(found, expected, strict=True))


def test_keep_mesh_when_backward_runs_twice():
    expected = pmod.simulate(gradient, plain, "outside", 2, x=2, y=2)
    found = pmod.simulate(gradient, kept, "another mesh", 2, x=2, y=2)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_keep_mesh_keeps_that_there_was_no_mesh():
    def rank() -> bool:
        mesh = pmod.current_mesh()
        ambient._put(None)
        x = torch.ones(1, requires_grad=True)
        seen: list[pmod.Mesh | None] = []
        loss = kept(lambda x: (seen.append(current()), pmod.psum(x, mesh["x"]).sin().sum())[1], x)
        pmod.set_mesh(mesh)
        loss.backward()
        return seen == [None, None] and pmod.current_mesh() is mesh

    assert pmod.simulate(rank, x=2) == [True, True]


def test_a_checkpoint_without_keep_mesh_finds_the_mesh_that_is_set():
    expected = pmod.simulate(gradient, plain, "inside", x=2, y=2)
    found = pmod.simulate(gradient, not_kept, "inside", x=2, y=2)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(pmod.NoMeshError):
        pmod.simulate(gradient, not_kept, "outside", x=2, y=2)
    # what keep_mesh is for: the names mean other ranks by now
    wrong = pmod.simulate(gradient, not_kept, "another mesh", x=2, y=2)
    assert not any(torch.equal(a, b) for a, b in zip(wrong, expected, strict=True))


def test_keep_mesh_restores_after_an_exception_in_the_recomputation():
    def rank() -> bool:
        mesh = pmod.current_mesh()
        x = torch.ones(1, requires_grad=True)
        calls: list[int] = []

        def fails_the_second_time(x: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) == 2:
                raise ValueError("recomputed")
            return pmod.psum(x, "x").sin().sum()

        loss = kept(fails_the_second_time, x)
        other = mesh.rename(x="z")
        pmod.set_mesh(other)
        with pytest.raises(ValueError, match="recomputed"):
            loss.backward()
        return pmod.current_mesh() is other

    assert pmod.simulate(rank, x=2) == [True, True]


# --- a mesh as a value ----------------------------------------------------------------------------------------------


def test_a_module_that_holds_a_mesh_can_be_copied():
    def rank() -> tuple[Any, ...]:
        module = torch.nn.Linear(1, 1)
        module.mesh = pmod.current_mesh()["x"]  # type: ignore[assignment]
        copied = copy.deepcopy(module)
        return copied.mesh == module.mesh, copied.mesh.coords == module.mesh.coords, pmod.psum(1, copied.mesh)

    assert pmod.simulate(rank, x=2, y=2) == [(True, True, 2)] * 4
