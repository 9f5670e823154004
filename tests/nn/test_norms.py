"""Norms of a cut tensor, whose statistics are those of the whole, held against torch's on the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import pmod
import pmod.nn.functional as sharded
from tests.lib import layers, spmd
from tests.lib.layers import Case

Tensor = torch.Tensor


def trained(x: Tensor, *of: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, *of, training=True)


def ours(x: Tensor, *of: Tensor, **cut: Any) -> Tensor:
    return sharded.batch_norm(x, None, None, *of, training=True, **cut)


def by_instance(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, weight=weight, bias=bias)


def shaped(function: Any) -> Any:
    """A norm over the last dims, whose shape is that of the whole, which the weight has."""

    def call(x: Tensor, weight: Tensor, *rest: Tensor, **cut: Any) -> Tensor:
        return function(x, weight.shape, weight, *rest, **cut)

    return call


CASES: dict[str, Case] = {
    "batch_norm": Case("batch_norm", ((2, 3, "x", 2), (3,), (3,)), torchs=trained, ours=ours),
    "batch_norm of samples": Case("batch_norm", (("x", 3), (3,)), torchs=trained, ours=ours, least=2),
    "batch_norm of samples and rows": Case("batch_norm", (("y", 3, "x", 2),), torchs=trained, ours=ours),
    "batch_norm both": Case("batch_norm", ((2, 3, "x", "y"), (3,), (3,)), torchs=trained, ours=ours),
    "batch_norm in eval": Case(
        "batch_norm", ((2, 3, "x"), (3,)),
        torchs=lambda x, w: F.batch_norm(x, torch.ones(3).double(), 2 + w.detach() ** 2, w),
        ours=lambda x, w, **cut: sharded.batch_norm(x, torch.ones(3).double(), 2 + w.detach() ** 2, w, **cut)),
    "instance_norm": Case("instance_norm", ((2, 3, "x", 2), (3,), (3,)), torchs=by_instance,
                          ours=lambda x, w, b, **cut: sharded.instance_norm(x, weight=w, bias=b, **cut)),
    "instance_norm both": Case("instance_norm", ((2, 3, "x", "y"),), least=2),
    "group_norm": Case("group_norm", ((2, 6, "x", 2), (6,), (6,)), torchs=lambda x, w, b: F.group_norm(x, 3, w, b),
                       ours=lambda x, w, b, **cut: sharded.group_norm(x, 3, w, b, **cut)),
    "group_norm both": Case("group_norm", ((2, 2, "x", "y"),), (2,)),
    "layer_norm": Case("layer_norm", ((2, 3, "x"), ("=x",), ("=x",)), torchs=shaped(F.layer_norm),
                       ours=shaped(sharded.layer_norm), least=2),
    "layer_norm both": Case("layer_norm", ((2, "x", 3, "y"), ("=x", 3, "=y"), ("=x", 3, "=y")),
                            torchs=shaped(F.layer_norm), ours=shaped(sharded.layer_norm)),
    "rms_norm": Case("rms_norm", ((2, 3, "x"), ("=x",)), torchs=shaped(F.rms_norm), ours=shaped(sharded.rms_norm)),
    "rms_norm of two dims": Case("rms_norm", ((2, "x", 3), ("=x", 3)), torchs=shaped(F.rms_norm),
                                 ours=shaped(sharded.rms_norm)),
}  # fmt: skip


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


# --- running statistics -------------------------------------------------------------------------------------------


def running_on_rank(name: str, sizes: tuple[int, ...]) -> list[Tensor]:
    whole = 3 + torch.randn(2, 3, sum(sizes), 4, generator=torch.Generator().manual_seed(0))
    x = whole.split(list(sizes), 2)[pmod.axis_index("x")]
    mine, theirs = ([torch.zeros(3), torch.ones(3)] for _ in range(2))
    mode = {"batch_norm": "training", "instance_norm": "use_input_stats"}[name]
    for momentum in (0.1, 0.5):
        kwargs = {mode: True, "momentum": momentum}
        y = getattr(sharded, name)(x, *mine, **kwargs, axis="x", sizes=sizes)
        e = getattr(F, name)(whole, *theirs, **kwargs)
        torch.testing.assert_close(y, e.split(list(sizes), 2)[pmod.axis_index("x")])
    torch.testing.assert_close(mine, theirs)
    kwargs = {mode: False}
    y = getattr(sharded, name)(x, *mine, **kwargs, axis="x", sizes=sizes)
    e = getattr(F, name)(whole, *theirs, **kwargs)
    torch.testing.assert_close(y, e.split(list(sizes), 2)[pmod.axis_index("x")])
    return mine


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
@pytest.mark.parametrize("sizes", [(3, 4), (0, 5, 1), (6,)])
def test_running_statistics(name: str, sizes: tuple[int, ...]) -> None:
    """They are those of one process, and the same bits on every rank."""
    buffers = pmod.simulate(running_on_rank, name, sizes, x=len(sizes))
    for others in buffers[1:]:
        assert all(map(torch.equal, buffers[0], others))


def test_of_sixteen_bits() -> None:
    """Statistics are taken in float32, as torch does."""

    def run() -> None:
        whole = 100 + torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0))
        for dtype in (torch.bfloat16, torch.float16):
            x = pmod.shard(whole.to(dtype), "x", dim=-1)
            w = torch.ones(4, dtype=dtype)
            y = sharded.group_norm(x, 2, w, w, axis="x", sizes=(32, 32))
            assert y.dtype == dtype
            e = pmod.shard(F.group_norm(whole.to(dtype), 2, w, w), "x", dim=-1)
            torch.testing.assert_close(y, e)

    pmod.simulate(run, x=2)


def test_one_small_message_each_way() -> None:
    def run() -> tuple[int, int, list[int]]:
        x = torch.randn(2, 6, 5, 4, dtype=torch.float64, requires_grad=True)
        with pmod.trace() as t:
            y = sharded.group_norm(x, 3, axis="x", sizes=(5, 5))
            forward = len(t.events)
            y.square().sum().backward()
        return forward, len(t.events) - forward, [event.nbytes for event in t.events]

    # two numbers of each group of each sample
    assert pmod.simulate(run, x=2) == [(1, 1, [2 * 3 * 2 * 8] * 2)] * 2


X = torch.ones(2, 4, 3)
WRONG = {
    "channels": (lambda: sharded.group_norm(X, 2, axis="x", dim=1),
                 "dim 1 is not one that the statistics run over.\n"
                 "Pass one of -1; along others torch's own norm is that of the whole."),
    "groups": (lambda: sharded.group_norm(X, 3, axis="x"),
               "num_groups is 3 and input has 4 channels.\nPass one that divides them."),
    "weight": (lambda: sharded.batch_norm(X, None, None, torch.ones(3), training=True, axis="x"),
               "weight is (3,).\nPass (4,)."),
    "no statistics": (lambda: sharded.batch_norm(X, None, None, axis="x"),
                      "there are no running statistics, and none are taken.\nPass running_mean and running_var."),
    "one value": (lambda: sharded.instance_norm(X[:, :, :pmod.axis_index("x")], axis="x", sizes=(0, 1)),
                  "the whole has one value for each channel.\nPass more, or a norm with running statistics in eval."),
    "nothing": (lambda: sharded.layer_norm(X[:, :, :0], (0,), axis="x", sizes=(0, 0)),
                "the whole has nothing to take the mean of.\nPass an input with rows."),
    "normalized_shape": (lambda: sharded.layer_norm(X, (4, 3), axis="x", dim=-1, sizes=(3, 3)),
                         "normalized_shape is (4, 3), but the whole has (..., 4, 6).\nPass the whole's lengths."),
    "integers": (lambda: sharded.rms_norm(X.long(), (6,), axis="x"),
                 "input is int64.\nPass one that is floating, input.float() for example."),
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
def test_refused(key: str) -> None:
    call, text = WRONG[key]

    def run() -> None:
        with pytest.raises(pmod.PmodError) as raised:
            call()
        assert str(raised.value).endswith(f": {text}")

    pmod.simulate(run, x=2)
