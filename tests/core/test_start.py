"""`start`: the same values and derivatives as the direct call, on threads and on real ranks; and what it refuses."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import pmod
import pmod.nn.functional
from pmod._core import start as _start
from tests.lib.listening import counted, same

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


# --- a function of the user's runs once ---------------------------------------------------------------------------


def once_on_rank() -> None:
    """The random numbers, buffers and autocast are those of the call."""
    n = pmod.axis_size("x")
    w = torch.ones(1000, requires_grad=True)

    def seeded() -> Tensor:
        with pmod.rng(0, ()):
            return pmod.psum(nn.functional.dropout(w), "x")

    for f in (lambda: pmod.psum(nn.functional.dropout(w), "x"), seeded):
        with pmod.rng(1, ()):
            y = pmod.start(f).wait()
        (gradient,) = torch.autograd.grad(y.sum(), w)
        assert torch.equal(gradient, y.detach() / n)
    norm = nn.BatchNorm1d(3).double()
    pmod.start(lambda x: pmod.psum(norm(x), "x"), rows()).wait()
    assert norm.num_batches_tracked == 1
    calls: list[int] = []
    pmod.start(lambda x: [calls.append(1), pmod.psum(pmod.psum(x, "x"), "x")], rows()).wait()
    assert calls == [1]


def autocast_on_rank() -> None:
    for f in (lambda x, w: pmod.psum(x @ w, "x"), lambda x, w: pmod.psum(x @ w, "x") @ w, convolved):
        for there, later in ((True, False), (False, True), (True, True)):
            w = torch.full((4, 4), 1 / 3, requires_grad=True)
            x = torch.ones(2, 4)
            with torch.autocast("cpu", torch.bfloat16, enabled=there):
                pending, direct = pmod.start(f, x, w), f(x, w)
            with torch.autocast("cpu", torch.bfloat16, enabled=later):
                y = pending.wait()
            assert y.dtype == direct.dtype == (torch.bfloat16 if there else torch.float32)
            same(y.detach(), direct.detach(), "value", rtol=0, atol=0)
            # whether w is cast once or twice decides how its gradient is rounded; threads share the cache of casts
            same(*(torch.autograd.grad(z.sum(), w)[0] for z in (y, direct)), "gradient", rtol=1e-2)


def convolved(x: Tensor, w: Tensor) -> Tensor:
    return pmod.nn.functional.conv1d(x[:, None], w[:1, None, :3], axis="x", padding=1)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_runs_once(run: Any, ranks: int) -> None:
    run(once_on_rank, x=ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_autocast_is_that_of_the_start(run: Any, ranks: int) -> None:
    run(autocast_on_rank, x=ranks)


def _changed(y: Tensor) -> Tensor:
    y.add_(1)
    return y


def _hooked(y: Tensor) -> Tensor:
    y.register_hook(lambda g: 3 * g)
    return y


def _kept(y: Tensor) -> Tensor:
    module = nn.Module()
    module.register_buffer("y", y)
    return module.y


def _marked(y: Tensor) -> Tensor:
    y.mark = 3
    return y + y.mark


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


# what a started function may do with a result that is under way
USES: dict[str, Callable[[Tensor], Any]] = {
    "nothing": lambda y: y,
    "shape": lambda y: torch.ones(y.shape),
    "dtype and device": lambda y: torch.ones(len(y), dtype=y.dtype, device=y.device),
    "dim": lambda y: torch.ones(y.dim(), y.numel()),
    "requires_grad": lambda y: torch.tensor([y.requires_grad, y.is_leaf, y.is_floating_point(), y._version == 0]),
    "a number": lambda y: torch.tensor([y.sum().item(), float(y.detach()[0, 0]), bool(y[0, 0] > 0)]),
    "repr": lambda y: torch.tensor(len(repr(y))),
    "numpy": lambda y: torch.from_numpy(np.asarray(y.detach()) + 1),
    "pickle": lambda y: pickle.loads(pickle.dumps(y.detach())),
    "deepcopy": lambda y: copy.deepcopy({"y": y.detach()})["y"],
    "cat": lambda y: torch.cat([y, torch.ones(1, 3), y]),
    "an index": lambda y: torch.arange(9)[pmod.psum(torch.ones(2, dtype=torch.int64), "x")],
    "set an item": lambda y: torch.zeros_like(y).index_put((torch.tensor([0]),), y[0]),
    "in place": _changed,
    "add into another": lambda y: torch.ones(4, 3, dtype=torch.float64).add_(y),
    "a hook": _hooked,
    "a buffer": _kept,
    "an attribute": _marked,
    "iterate": lambda y: sum(y),
    "checkpoint": lambda y: checkpoint(torch.sin, y, use_reentrant=False),
    "collectives": lambda y: pmod.pmax(pmod.all_gather({"a": y, "b": y * 2}, "x")["b"], "x"),
    "a custom Function": lambda y: Twice.apply(y.clone()),
    "torch.func": lambda y: torch.func.grad(lambda a: (a * a).sum())(y.clone()),
    "torch.func, in a closure": lambda y: torch.func.grad(lambda a: (a * y).sum())(y.detach().sin()),
    "vmap, in a closure": lambda y: torch.vmap(lambda a: a * y.sum())(torch.ones(2)),
    "a backward": lambda y: torch.autograd.grad(pmod.psum(y.sin(), "x").sum(), y, create_graph=True)[0],
    "no_grad": lambda y: pmod.psum(y, "x") + no_grad(lambda: pmod.psum(y, "x")),
    "a Function that sends": lambda y: Sends.apply(y.clone()),
    "a module": lambda y: nn.Sequential(nn.Identity(), nn.Tanh())(y),
    "autograd.grad": lambda y: torch.autograd.grad(y, y, torch.ones_like(y), allow_unused=True)[0],
}


def no_grad(f: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return f()


class Sends(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return pmod.psum(x, "x")

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 5 * pmod.psum(g, "x")


def touched_on_rank(how: Callable[[Tensor], Tensor]) -> None:
    for name, use in USES.items():

        def outcome(start: bool, use: Any = use) -> list[Tensor]:
            x = rows().requires_grad_()
            y = pmod.start(lambda: use(how(x))).wait() if start else use(how(x))
            assert type(y) is Tensor
            return [y, torch.autograd.grad(y.sum(), x, allow_unused=True)[0]] if y.requires_grad else [y]

        direct, started = outcome(False), outcome(True)
        assert len(started) == len(direct), name
        for a, b in zip(started, direct, strict=True):
            assert (a is None) == (b is None), name
            if b is not None:
                same(a, b.detach(), name, rtol=0, atol=0)


HOWS: dict[str, Callable[[Tensor], Tensor]] = {
    "psum": lambda x: pmod.psum(x, "x"),
    "pmean with a weight": lambda x: pmod.pmean(x, "x", weight=x.exp()),
    "pmax of a tree": lambda x: pmod.pmax([x, x.sin()], "x")[1],
}


@pytest.mark.parametrize("how", HOWS)
def test_what_is_under_way_is_a_tensor_like_any_other(run: Any, how: str) -> None:
    run(touched_on_rank, HOWS[how], x=2)


class Box:
    def __init__(self, y: Tensor) -> None:
        self.y = y


def found_on_rank() -> None:
    """After `wait` every result is a plain tensor, wherever the function put it; before, touching it is enough."""
    x = rows().requires_grad_()
    kept: list[Tensor] = []

    def boxed() -> Any:
        y = pmod.psum(x, "x")
        kept.append(y)
        return Box(y), {"deep": (y,)}, lambda: y

    pending = pmod.start(boxed)
    assert type(kept[0]) is not Tensor
    box, tree, ask = pending.wait()
    assert box.y is tree["deep"][0] is ask() is kept[0]
    assert type(box.y) is Tensor
    assert box.y.grad_fn is not None
    pending = pmod.start(boxed)
    same(kept[1].detach(), box.y.detach(), "touched before the wait", rtol=0, atol=0)
    assert pending.wait()[0].y is kept[1]
    # what more than one message follows from is sent in the order of the calls, not of the result
    first, second = rows(), rows() + 1
    tree = pmod.start(lambda: dict(sorted({
        pmod.axis_index("x"): pmod.pmax({"a": first}, "x")["a"], 1 - pmod.axis_index("x"): pmod.psum(second, "x"),
    }.items()))).wait()  # fmt: skip
    same(tree[pmod.axis_index("x")], pmod.pmax(first, "x"), "first")


def test_nothing_under_way_is_left(run: Any) -> None:
    run(found_on_rank, x=2)


def ahead_on_rank() -> None:
    """What is under way costs no wait: the messages are sent at the start, of pmod's functions within f, too."""
    x = rows().requires_grad_()
    for f, first in (
        (lambda: [pmod.psum(x, "x"), pmod.all_gather(x, "x")], 2),
        (lambda: pmod.pmax(x, "x"), 1),
        (lambda: pmod.pmean(x, "x", weight=x.exp()), 1),
        (lambda: pmod.halo_exchange(x, "x", width=1, sizes=(4, 4)), 1),
    ):
        pending, sent = counted(lambda f=f: pmod.start(f))
        assert len(sent) == first
        _, whole = counted(f)
        _, after = counted(pending.wait)
        assert len(sent) + len(after) == len(whole)


def test_user_functions_send_ahead(run: Any) -> None:
    run(ahead_on_rank, x=2)


class Ignores(torch.autograd.Function):
    """Neither touches its argument nor refers to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.ones(4, 3, dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def unseen_on_rank() -> None:
    """Who cannot be made to wait does not get a wrong gradient."""
    x = rows().requires_grad_()
    for use in (Twice.apply, Ignores.apply, lambda y: torch.func.grad(lambda a: (a * a).sum())(y)):
        with pytest.raises(pmod.PmodError, match=r"used before it arrived[\s\S]*y\.clone\(\)"):
            pmod.start(lambda use=use: use(pmod.psum(x, "x"))).wait()
    same(pmod.psum(x, "x"), pmod.psum(x, "x").detach(), "the wire still works")


def test_a_result_is_not_used_unseen(run: Any) -> None:
    run(unseen_on_rank, x=2)


def changed_on_rank() -> None:
    """What was sent must stay, also where f refers to it; what f has computed with need not."""
    for f in (lambda x: pmod.psum(x, "x"), lambda x: pmod.pmax([x], "x"), lambda x: pmod.all_gather({"a": x}, "x")):
        x = rows()
        pending = pmod.start(lambda f=f, x=x: f(x))
        x.add_(1)
        with pytest.raises(pmod.ArgumentError, match="changed in place between start and wait"):
            pending.wait()
    x = rows()
    pending = pmod.start(lambda x: pmod.psum(x * 2, "x"), x)
    x.zero_()
    same(pending.wait(), pmod.psum(rows() * 2, "x"), "value")


def test_what_was_sent_must_stay(run: Any) -> None:
    run(changed_on_rank, x=2)


def impure_on_rank() -> None:
    """Work of pmod's own that is not the same in both runs is named; there is none, so this makes some."""
    x, functions = rows(), [pmod.psum, pmod.pshift]
    piece = _start._Piece(lambda: functions.pop()(x, "x"), "halo_exchange", [x], ("train.py", 41, "train"))
    with pytest.raises(pmod.PmodError, match=r"not pure: its first run called permute along 'x', its second run psum"):
        piece.finish()


def argument_changed_on_rank() -> None:
    """What only the arguments hold may change after the first run: the error names both calls and both lines."""
    pairs = [(0, 1)]
    pending = pmod.start(pmod.ppermute, rows(), "x", pairs)
    pairs.append((1, 0))
    with pytest.raises(pmod.PmodError) as caught:
        pending.wait()
    said, right, *lines = str(caught.value).split("\n")
    first, second = (f"permute along 'x' with Permutation(targets={targets})" for targets in ((1, -1), (1, 0)))
    calls = f"its first run called {first}, its second run {second}."
    if said != f"pmod.ppermute: the function is not pure: {calls}":
        raise AssertionError(said)  # checked in a rank's process too, where python -O leaves out an assert
    if right != "Make it depend on its arguments only, and change none of them between start and wait.":
        raise AssertionError(right)
    for line, begins, ends in zip(lines, ("Started at ", "Waited for at "), ('"x", pairs)', ".wait()"), strict=True):
        if not (line.startswith(begins) and "test_start.py" in line and line.endswith(ends)):
            raise AssertionError(line)


def test_an_argument_that_changes(run: Any) -> None:
    run(argument_changed_on_rank, x=2)


def test_two_runs_that_differ(run: Any) -> None:
    run(impure_on_rank, x=2)


def started_within(x: Tensor) -> Tensor:
    return pmod.start(lambda: direct_within(x)).wait()


def direct_within(x: Tensor) -> Tensor:
    return pmod.psum(nn.functional.dropout(x.sum(0)), "x") * pmod.axis_size("x")


def mapped_on_rank() -> None:
    x = torch.ones(4, 1000, requires_grad=True)
    inner, outer = (
        pmod.shard_map(f, in_specs=pmod.P("x"), out_specs=pmod.P()) for f in (started_within, direct_within)
    )
    for call in (lambda: inner(x), lambda: pmod.start(outer, x).wait()):
        with pmod.rng(0, ()):
            y = call()
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(y != 0, (gradient != 0).all(0))
        assert 300 < y.count_nonzero() < 1000


@pytest.mark.parametrize("ranks", [1, 2])
def test_within_shard_map(run: Any, ranks: int) -> None:
    run(mapped_on_rank, x=ranks)


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


def test_an_axis_that_is_a_list_of_names():
    """It is not hashable, and the same axis whenever it is asked for."""
    assert pmod.simulate(lambda: pmod.start(pmod.psum, torch.ones(()), ["x"]).wait().item(), x=2) == [2.0, 2.0]
