"""`start`: the same values and derivatives as the direct call, on threads and on real ranks; and what it refuses."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import grad, jvp, vmap

import pmod
from tests.test_collectives import counted, run, same

__all__ = ["run"]  # the fixture

Tensor = torch.Tensor


def both_dtypes(x: Tensor) -> Tensor:
    tree = pmod.psum({"a": x, "b": [x.float() * 2, None], "c": x[0].exp()}, "x")
    return tree["a"].sum() + tree["b"][0].double().sum() * tree["c"].sum()


def two_in_a_row(x: Tensor) -> Tensor:
    return pmod.psum(pmod.all_gather(x.sin(), "x").cos(), "x")


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "psum": lambda x: pmod.psum(x, "x"),
    "weighted mean": lambda x: pmod.pmean(x, "x", weight=x.exp()),
    "pmax": lambda x: pmod.pmax(x, "x"),
    "all_gather": lambda x: pmod.all_gather(x, "x", dim=1),
    "psum_scatter": lambda x: pmod.psum_scatter(x, "x"),
    "all_to_all": lambda x: pmod.all_to_all(x, "x", split_dim=0, concat_dim=1),
    "unshard": lambda x: pmod.unshard(x, "x", sizes=(4,) * pmod.axis_size("x")),
    "broadcast": lambda x: pmod.broadcast(x, "x", src=1),
    "reduce": lambda x: pmod.reduce(x, "x", dst=1),
    "gather": lambda x: pmod.gather(x, "x"),
    "pshift": lambda x: pmod.pshift(x, "x"),
    "pvary": lambda x: pmod.pvary(x, "x"),  # sends nothing
    "a tree of two dtypes": both_dtypes,
    "two in a row": two_in_a_row,
    "an expression": lambda x: (pmod.psum(x * x, "x") + 1).sqrt() * x,
}


def rows(count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(pmod.axis_index("x"))
    return torch.rand(4, count, dtype=torch.float64, generator=generator)


def derivatives(f: Callable[[Tensor], Any]) -> list[Tensor]:
    """Value, gradient, and the gradient of that."""
    x = rows().requires_grad_()
    y = f(x)
    (first,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.cos().sum(), x)
    return [y, first, second]


def same_on_rank() -> None:
    for name, f in FUNCTIONS.items():
        direct, sent = counted(lambda f=f: derivatives(f))
        started, sent_ahead = counted(lambda f=f: derivatives(lambda x: pmod.start(f, x).wait()))
        assert sent_ahead == sent, f"{name} sends {sent_ahead} for {sent}"
        for a, b, what in zip(started, direct, ("value", "gradient", "second"), strict=True):
            assert a.requires_grad == b.requires_grad
            same(a, b.detach(), f"{name}: {what}", rtol=0, atol=0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_same_derivatives(run: Any, ranks: int) -> None:
    run(same_on_rank, x=ranks)


def transformed_on_rank() -> None:
    x, v = rows(), rows().cos()
    for name in ("psum", "all_gather", "pshift"):
        f = FUNCTIONS[name]

        def started(x: Tensor, f: Any = f) -> Tensor:
            return pmod.start(f, x).wait().sin()

        def direct(x: Tensor, f: Any = f) -> Tensor:
            return f(x).sin()

        same(grad(lambda x: started(x).sum())(x), grad(lambda x: direct(x).sum())(x), f"{name}: grad")
        same(jvp(started, (x,), (v,))[1], jvp(direct, (x,), (v,))[1], f"{name}: jvp")
        x3 = torch.stack([x, v], -1)
        same(vmap(started, in_dims=-1)(x3), vmap(direct, in_dims=-1)(x3), f"{name}: vmap")


def test_transforms(run: Any) -> None:
    run(transformed_on_rank, x=2)


def overlapping_on_rank(count: int) -> None:
    """What is sent is sent at the start; computing goes on, and the waits come in an order of their own."""
    x = rows(count)
    first, sent = counted(lambda: pmod.start(pmod.psum, x, "x"))
    assert len(sent) == 1
    second, sent = counted(lambda: pmod.start(pmod.all_gather, x + 1, axis="x", dim=1))
    assert len(sent) == 1
    third = pmod.start(pmod.pshift, x * 2, "x")
    between = pmod.psum(x.sin(), "x")  # a direct call while three are under way
    same(third.wait(), pmod.pshift(x * 2, "x"), "third")
    same(first.wait(), pmod.psum(x, "x"), "first", rtol=1e-15)
    same(second.wait(), pmod.all_gather(x + 1, "x", dim=1), "second")
    same(between, pmod.psum(x.sin(), "x"), "between", rtol=1e-15)


@pytest.mark.parametrize("count", [3, 3000])
def test_overlap(run: Any, count: int) -> None:
    run(overlapping_on_rank, count, x=4)


def remembered_on_rank() -> None:
    x = rows().requires_grad_()
    pending = pmod.start(pmod.psum, {"a": x, "b": [x.float()]}, "x")
    assert pending.wait() is pending.wait()
    # grad mode and the mesh are those of the start
    with torch.no_grad():
        pending = pmod.start(pmod.psum, x, "x")
    assert not pending.wait().requires_grad
    pending = pmod.start(pmod.psum, x, "x")
    mesh = pmod.current_mesh()
    with torch.no_grad(), pmod.set_mesh(mesh.rename(x="other")):
        y = pending.wait()
        assert pmod.current_mesh().axis_names == ("other",)
    assert y.requires_grad
    same(y, pmod.psum(x, "x").detach(), "value")


def test_what_is_remembered(run: Any) -> None:
    run(remembered_on_rank, x=2)


def refused_on_rank() -> None:
    x = rows()
    # at once, and with nothing sent
    for error, call in (
        (pmod.AxisError, lambda: pmod.start(pmod.psum, x, "y")),
        (pmod.ShapeError, lambda: pmod.start(pmod.all_gather, x, "x", dim=2)),
        (pmod.ArgumentError, lambda: pmod.start(pmod.psum, x > 0, "x")),
        (ZeroDivisionError, lambda: pmod.start(lambda x: 1 / 0, x)),
    ):

        def attempt(error: Any = error, call: Any = call) -> None:
            with pytest.raises(error):
                call()

        _, sent = counted(attempt)
        assert sent == []
    with pytest.raises(pmod.PmodError, match="calls start itself"):
        pmod.start(lambda x: pmod.start(pmod.psum, x, "x").wait(), x)
    # a change in place would be seen by some ranks and not by others
    for change in (lambda x: x.add_(1), lambda x: x[0].zero_()):
        y = x.clone()
        pending = pmod.start(pmod.psum, {"deep": [y]}, "x")
        change(y)
        with pytest.raises(pmod.ArgumentError, match="changed in place between start and wait"):
            pending.wait()
        with pytest.raises(pmod.PmodError, match="wait raised before"):
            pending.wait()
    same(pmod.psum(x, "x"), pmod.psum(x, "x"), "the wire still works")


def test_refused(run: Any) -> None:
    run(refused_on_rank, x=2)


def forgotten_on_rank() -> None:
    with pytest.warns(RuntimeWarning, match=r"pmod\.psum: a Pending was never waited for"):
        pmod.start(pmod.psum, rows(), "x")
        gc.collect()
    pending = pmod.start(pmod.psum, rows(), "x")
    pending.wait()
    del pending  # warnings are errors here
    gc.collect()


def test_never_waited_for(run: Any) -> None:
    run(forgotten_on_rank, x=2)


def test_one_rank() -> None:
    with pmod.set_mesh(pmod.make_mesh(x=1)):
        x = rows().requires_grad_()
        y = pmod.start(pmod.psum, x * 2, "x").wait()
        same(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 2).detach(), "gradient")
