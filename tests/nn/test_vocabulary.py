"""Weights that are cut, and losses over a cut field, held against torch's on the whole."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import pmod
import pmod.nn.functional as sharded
from tests.lib import layers, spmd
from tests.lib.layers import Case

Tensor = torch.Tensor


IDS = torch.tensor([[3, 0, 1], [2, 2, 4]])
CLASSES = torch.tensor([3, 0, -100, 1])


def entropy(*names: str, shape: layers.Pattern = (4, "x"), target: Tensor = CLASSES, **kwargs: Any) -> Case:
    """The input, and what `names` say by keyword; the target is the same numbers on every rank."""

    def call(function: Any, x: Tensor, *of: Tensor, **cut: Any) -> Tensor:
        # torch has no derivative by the weights
        more = dict(zip(names, [w.detach() for w in of], strict=True))
        return function(x, target, **more, **kwargs, **cut)

    return Case("cross_entropy", (shape, *[("x",)] * len(names)), torchs=partial(call, F.cross_entropy), out={},
                least=4, ours=partial(call, sharded.cross_entropy), positive=bool(names))  # fmt: skip


def probable(*shapes: layers.Pattern, alone: bool = False, **kwargs: Any) -> Case:
    """With probabilities, that are the same shape."""

    def call(function: Any) -> Any:
        return lambda x, t, **cut: function(x, t, **kwargs, **cut)

    return Case("cross_entropy", shapes, torchs=call(F.cross_entropy), ours=call(sharded.cross_entropy), out={},
                alone=alone)  # fmt: skip


def lost(name: str, *shapes: layers.Pattern, torchs: Any = None, weight: bool = False, **kwargs: Any) -> Case:
    def call(function: Any) -> Any:
        def run(*of: Tensor, axis: Any = None, dim: Any = None, sizes: Any = None) -> Tensor:
            x, y, *rest = of
            more = dict(kwargs) | ({"weight": rest[0]} if weight else {})
            return function(x, y, **more, **({} if axis is None else {"axis": axis}))

        return run

    out = None if kwargs.get("reduction") == "none" else {}
    return Case(name, shapes, torchs=call(torchs or getattr(F, name)), ours=call(getattr(sharded, name)), out=out,
                positive=weight)  # fmt: skip


def relative(x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    w = torch.ones_like(x) if weight is None else weight
    norms = [(w.sqrt() * z).flatten(1).norm(dim=1) for z in (x - y, y)]
    return (norms[0] / norms[1]).mean()


FIELD = (2, 3, "x", 4)
CASES: dict[str, Case] = {
    "embedding": Case("embedding", (("x", 3),), torchs=lambda w: F.embedding(IDS, w), least=5, out={},
                      ours=lambda w, **cut: sharded.embedding(IDS, w, axis="x", sizes=of_rows(cut))),
    "embedding with padding": Case("embedding", (("x", 3),), torchs=lambda w: F.embedding(IDS, w, 2), least=5, out={},
                                   ours=lambda w, **cut: sharded.embedding(IDS, w, 2, axis="x", sizes=of_rows(cut))),
    "linear by column": Case("linear", (("x", 3), ("x",)), out={-1: "x"}, torchs=lambda w, b: F.linear(INPUT, w, b),
                             ours=lambda w, b, **cut: sharded.linear(INPUT, w, b, axis="x")),
    "linear by row": Case("linear", ((2, 4, "x"), (3, "x")), out={}, torchs=lambda x, w: F.linear(x, w, BIAS),
                          ours=lambda x, w, **cut: sharded.linear(x, w, BIAS, axis="x", dim=1)),
    "cross_entropy": entropy(),
    "cross_entropy, weighted": entropy("weight"),
    "cross_entropy, smoothed": entropy(label_smoothing=0.2),
    "cross_entropy, smoothed and weighted": entropy("weight", label_smoothing=0.2),
    "cross_entropy, summed": entropy(reduction="sum"),
    "cross_entropy of each": entropy(reduction="none"),
    "cross_entropy of points": entropy(shape=(2, "x", 2), target=CLASSES.view(2, 2)),
    "cross_entropy of probabilities": probable((4, "x"), (4, "x"), alone=True, label_smoothing=0.1),
    "cross_entropy over a field": probable((2, 3, "x", 2), (2, 3, "x", 2)),
    "cross_entropy over a field and classes": probable((2, "y", "x"), (2, "y", "x")),
    "mse_loss": lost("mse_loss", FIELD, FIELD),
    "mse_loss by area": lost("mse_loss", FIELD, FIELD, FIELD, weight=True),
    "mse_loss of each": lost("mse_loss", FIELD, FIELD, reduction="none"),
    "mse_loss both": lost("mse_loss", (2, "x", "y"), (2, "x", "y"), reduction="sum"),
    "l1_loss": lost("l1_loss", FIELD, FIELD),
    "l1_loss by area": lost("l1_loss", FIELD, FIELD, FIELD, weight=True, reduction="sum"),
    "relative_l2_loss": lost("relative_l2_loss", FIELD, FIELD, torchs=relative),
    "relative_l2_loss by area": lost("relative_l2_loss", FIELD, FIELD, FIELD, torchs=relative, weight=True),
}  # fmt: skip
INPUT = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
BIAS = torch.arange(3.0, dtype=torch.float64)


def of_rows(cut: dict[str, Any]) -> Any:
    sizes = cut.get("sizes")
    return sizes[-2] if isinstance(sizes, dict) else sizes


@pytest.mark.parametrize("key", CASES)
def test_drawn(key: str) -> None:
    layers.check_drawn(CASES[key])


@pytest.mark.parametrize("key", CASES)
def test_transforms(key: str) -> None:
    layers.check_transforms(CASES[key])


def on_a_rank(what: str) -> None:
    layers.each(CASES, what)


def test_on_real_ranks() -> None:
    spmd.launch(on_a_rank, "agrees", x=2)
    spmd.launch(on_a_rank, "agrees", x=2, y=2)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compile() -> None:
    spmd.launch(on_a_rank, "compiles", x=2)


# --- what a rank uses, and what is refused -------------------------------------------------------------------------


def test_the_input_of_a_column_has_its_whole_gradient() -> None:
    def run() -> None:
        weight = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        x = INPUT.clone().requires_grad_()
        y = sharded.linear(x, pmod.shard(weight, "x"), axis="x")
        (g,) = torch.autograd.grad(y.square().sum(), x)
        leaf = INPUT.clone().requires_grad_()
        (e,) = torch.autograd.grad(F.linear(leaf, weight).square().sum(), leaf)
        torch.testing.assert_close(g, e)

    pmod.simulate(run, x=3)


def test_logits_of_minus_infinity() -> None:
    """Classes that are ruled out, on one rank all of them, take no part."""

    def run() -> None:
        whole = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        whole[0, :3] = -torch.inf
        target = torch.tensor([4, 2])
        x = pmod.shard(whole, "x", dim=1)
        y = sharded.cross_entropy(x, target, axis="x", sizes=(3, 3))
        torch.testing.assert_close(y, F.cross_entropy(whole, target))

    pmod.simulate(run, x=2)


def test_a_loss_sends_two_numbers() -> None:
    def run() -> list[int]:
        x = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
        with pmod.trace() as t:
            sharded.mse_loss(x, torch.zeros_like(x), axis="x").backward()
        return [event.nbytes for event in t.events if event.nbytes]

    assert pmod.simulate(run, x=2) == [[16]] * 2


X = torch.ones(2, 3)
WRONG = {
    "shapes": (lambda: sharded.mse_loss(X, X[:1], axis="x"),
               "input is (2, 3) and target (1, 3).\nPass target in the shape of input: nothing is broadcast."),
    "reduction": (lambda: sharded.l1_loss(X, X, "men", axis="x"),
                  "reduction is 'men'; did you mean 'mean'?\nPass 'none', 'mean' or 'sum'."),
    "samples": (lambda: sharded.relative_l2_loss(X, X, axis={0: "x"}),
                "dim 0, that of the samples, is cut.\nTake the mean of the samples' losses with pmean."),
    "numbers": (lambda: sharded.embedding(X, X, axis="x"), "input is torch.float32.\nPass input.long()."),
    "padding": (lambda: sharded.embedding(IDS, X, 9, axis="x", sizes=(2, 2)),
                "padding_idx is 9 and the whole has 4 rows.\nPass a row of the whole."),
    "features": (lambda: sharded.linear(X, X[:, :2], axis="x"),
                 "input is (2, 3) and weight (2, 2).\nPass input (..., k) and weight (m, k)."),
    "bias": (lambda: sharded.linear(X, X, X[0], axis="x"), "bias is (3,) and weight (2, 3).\nPass (2,)."),
    "target": (lambda: sharded.cross_entropy(X, torch.tensor([0]), axis="x"), "target is (1,).\nPass (2,)."),
    "smoothing": (lambda: sharded.cross_entropy(X, torch.tensor([0, 0]), label_smoothing=2.0, axis="x"),
                  "label_smoothing is 2.0.\nPass a number from 0 to 1."),
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
def test_refused(key: str) -> None:
    call, text = WRONG[key]

    def run() -> None:
        with pytest.raises(pmod.PmodError) as raised:
            call()
        assert str(raised.value).endswith(f": {text}")

    pmod.simulate(run, x=2)


def test_a_row_that_is_not_there() -> None:
    def run() -> None:
        with pytest.raises(IndexError):
            sharded.embedding(torch.tensor([4]), X, axis="x", sizes=(2, 2))
        with pytest.raises(IndexError):
            sharded.cross_entropy(X, torch.tensor([0, 6]), axis="x", sizes=(3, 3))

    pmod.simulate(run, x=2)
