"""Transposed convolutions and pools of a cut tensor, held against torch's on the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import pmod
import pmod.nn.functional as sharded
from tests.lib import layers, spmd
from tests.lib.layers import Case

Tensor = torch.Tensor


def windows(name: str, *args: Any, least: int = 4, **kwargs: Any) -> Case:
    """A pool of the last dims, the first or the last one cut."""
    count = int(name[-2])
    shape = {1: (2, 3, "x"), 2: (2, "x", 3) if least < 0 else (2, 3, "x", 5), 3: (2, 4, 5, "x")}[count]
    return Case(name, (shape,), args, kwargs, least=least, numbers={"x": (args[name.startswith("lp"):], kwargs)})


CASES: dict[str, Case] = {
    # input, weight, bias, stride, padding, output_padding, groups, dilation
    "conv_transpose1d": Case("conv_transpose1d", ((2, 4, "x"), (4, 3, 3), (6,)), (2, 1, 1, 2, 1),
                             least=2, numbers={"x": ((3, 2, 1, 1), {})}),
    "conv_transpose1d, plain": Case("conv_transpose1d", ((4, "x"), (4, 3, 2)), kwargs={"stride": 2},
                                    numbers={"x": ((2,), {"stride": 2})}),
    "conv_transpose1d, long stride": Case("conv_transpose1d", ((4, "x"), (4, 1, 2), (1,)), (5, 0, 4),
                                          numbers={"x": ((2, 5, 0, 4), {})}),
    "conv_transpose1d, dilated": Case("conv_transpose1d", ((4, "x"), (4, 1, 3)), (None, 1, 2, 1, 1, 3), least=3,
                                      numbers={"x": ((3, 1, 2, 1, 3), {})}),
    "conv_transpose2d": Case("conv_transpose2d", ((1, 2, "x", "y"), (2, 3, 3, 4), (3,)), ((2, 1), (1, 0), (1, 0)),
                             least=2, numbers={"x": ((3, 2, 1, 1), {}), "y": ((4,), {})}),
    "conv_transpose3d": Case("conv_transpose3d", ((1, 2, 2, "x", 2), (2, 1, 2, 3, 2)), (None, 2, (0, 1, 0)), least=2,
                             numbers={"x": ((3, 2, 1), {})}),
    "max_pool1d": windows("max_pool1d", 3, 2, 1),
    "max_pool1d, dilated": windows("max_pool1d", 2, 1, 1, 3, True),
    "max_pool2d": windows("max_pool2d", 3, 2, 1, ceil_mode=True),
    "max_pool2d, patches": windows("max_pool2d", 2),
    "max_pool2d, both": Case("max_pool2d", ((1, 2, "x", "y"),), (3, 1, 1), least=2),
    "max_pool3d": windows("max_pool3d", 3, 2, 1),
    "avg_pool1d": windows("avg_pool1d", 3, 2, 1),
    "avg_pool1d, ceil": windows("avg_pool1d", 4, 3, 2, ceil_mode=True),
    "avg_pool1d, long stride": windows("avg_pool1d", 2, 5, ceil_mode=True),
    "avg_pool2d": windows("avg_pool2d", 3, 2, 1, ceil_mode=True),
    "avg_pool2d, both": Case("avg_pool2d", ((1, 2, "x", "y"),), (3, 1, 1, False, False), least=2),
    "avg_pool3d": windows("avg_pool3d", 2, 1, 1),
    "lp_pool1d": windows("lp_pool1d", 2, 3, 2),
    "lp_pool2d": windows("lp_pool2d", 2, 3, 2, True),
    "lp_pool3d": windows("lp_pool3d", 4, 2),
    "lp_pool2d, inf": windows("lp_pool2d", float("inf"), 3, 2),
}  # fmt: skip
# what `out_sizes` does not ask: it changes no length
EXTRA: dict[str, Case] = {
    "avg_pool1d, without padding": Case("avg_pool1d", ((2, "x"),), (4, 2, 2, True, False), least=4),
    "avg_pool2d, divisor": Case("avg_pool2d", ((2, "x", 4),), (3, 2, 1, True, True, 5), least=3),
    "avg_pool3d, divisor": Case("avg_pool3d", ((1, 2, "x", 4, 4),), (2, 2, 1, True, False, -3), least=3),
}
CASES |= EXTRA


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


# --- which one is the largest -------------------------------------------------------------------------------------


def indices_on_rank(sizes: tuple[int, ...], whole: Tensor, kwargs: dict[str, Any]) -> None:
    """Ties, rows that are all -inf, and integers: the indices are torch's, and the gradient goes where torch's does."""
    kwargs = {"return_indices": True, **kwargs}
    x = whole.split(list(sizes), -2)[pmod.axis_index("x")].clone()
    leaf = whole.clone()
    if whole.is_floating_point():
        x.requires_grad_()
        leaf.requires_grad_()
    y, places = sharded.max_pool2d(x, **kwargs, axis="x", dim=-2, sizes=sizes)
    expected, indices = F.max_pool2d(leaf, **kwargs)
    told = (kwargs[name] for name in ("kernel_size", "stride", "padding", "dilation", "ceil_mode"))
    out = sharded.out_sizes("max_pool2d", sizes, *told)
    i = pmod.axis_index("x")
    assert torch.equal(y, expected.split(list(out), -2)[i])
    assert torch.equal(places, indices.split(list(out), -2)[i])
    if whole.is_floating_point():
        (g,) = torch.autograd.grad(y.sum(), x)
        (e,) = torch.autograd.grad(expected.sum(), leaf)
        assert torch.equal(g, e.split(list(sizes), -2)[i])


@settings(max_examples=25, **layers.QUICK)
@given(st.data())
def test_indices_are_those_of_the_whole(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 4))
    sizes = [data.draw(st.sampled_from([0, 1, 2, 4])) for _ in range(n)]
    sizes[data.draw(st.integers(0, n - 1))] += 5
    seed = data.draw(st.integers(0, 9))
    whole = torch.randint(0, 2, (2, sum(sizes), 6), generator=torch.Generator().manual_seed(seed)).double()
    kind = data.draw(st.sampled_from(["ties", "lowest", "integers"]))
    if kind == "lowest":
        whole = torch.where(whole == 0, -torch.inf, 1.0)
        whole[0] = -torch.inf
    elif kind == "integers":
        whole = whole.long() - 5
    kernel, dilation = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    padding = data.draw(st.integers(0, kernel // 2))
    kwargs = {"kernel_size": kernel, "stride": data.draw(st.integers(1, 3)), "padding": padding, "dilation": dilation,
              "ceil_mode": data.draw(st.booleans())}  # fmt: skip
    pmod.simulate(indices_on_rank, tuple(sizes), whole, kwargs, x=n)


# --- what is refused ----------------------------------------------------------------------------------------------

WRONG = {
    "padding": (lambda x: sharded.max_pool1d(x, 3, 1, 2, axis="x"),
                "padding is 2 and a window 3.\nPass at most half of the window, as torch has it."),
    "window": (lambda x: sharded.avg_pool1d(x, 9, axis="x", sizes=(4, 4)),
               "the whole has 8 rows along dim -1, and a window 9.\nPass an input that is as long, or more padding."),
    "a batch": (lambda x: sharded.lp_pool1d(x, 2, 2, axis="x", dim=0),
                "dim 0 is not a spatial one.\nPass a dim from -1 to -1; shards of a batch are pooled by torch alone."),
    "integers": (lambda x: sharded.avg_pool1d(x.long(), 2, axis="x"),
                 "input is int64.\nPass one that is floating, input.float() for example."),
    "norm": (lambda x: sharded.lp_pool1d(x, 0, 2, axis="x"), "norm_type is 0.\nPass a number other than 0, or inf."),
    "output_padding": (
        lambda x: sharded.conv_transpose1d(x, torch.ones(2, 1, 3), output_padding=1, axis="x"),
        "output_padding is 1, stride 1 and dilation 1.\n"
        "Pass an output_padding that is less than stride or dilation, as torch has it."),
    "too much padding": (
        lambda x: sharded.conv_transpose1d(x, torch.ones(2, 1, 1), padding=5, axis="x", sizes=(4, 4)),
        "the whole has 8 rows along dim -1, of which -2 would be made.\nPass less padding."),
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
def test_refused(key: str) -> None:
    call, text = WRONG[key]

    def run() -> None:
        with pytest.raises(pmod.PmodError) as raised:
            call(torch.ones(1, 2, 4))
        assert str(raised.value).endswith(f": {text}")

    pmod.simulate(run, x=2)


def test_unknown_to_out_sizes() -> None:
    with pytest.raises(pmod.ArgumentError, match=r"function is 'max_pool4d'; did you mean 'max_pool"):
        sharded.out_sizes("max_pool4d", (4, 4), 2)
    assert sharded.out_sizes(F.max_pool2d, (4, 4), 2) == (2, 2)


@pytest.mark.parametrize("name, args, expected", [
    ("max_pool2d", (2, 2), (2, 1, 2, 0)), ("max_pool2d", (3, 3, 1), (2, 0, 1, 1)), ("unfold", (3,), (4, 1, 3, 0)),
    ("conv_transpose2d", (3, 2), (8, 2, 8, 3)), ("interpolate", (20,), (8, 2, 8, 2)),
    ("interpolate", (5,), (2, 1, 2, 0)),
    ("adaptive_avg_pool2d", (5,), (2, 1, 2, 0)), ("pad", (2, 1), (6, 1, 4, 2)), ("pad", (-5, 0), (0, 0, 4, 1)),
    ("pixel_shuffle", (3,), (12, 3, 12, 3)), ("topk", (6,), (2, 2, 2, 0)), ("cat", ((1, 0, 2, 0),), (5, 1, 6, 1)),
    ("fold", (22, 3, 1, 0, 2), (8, 2, 8, 4)),
])  # fmt: skip
def test_which_rank_has_which_row(name: str, args: tuple[Any, ...], expected: tuple[int, ...]) -> None:
    """Row j is where row j * stride is, or its share of the length; what is past the end is on the last rank."""
    assert sharded.out_sizes(name, (4, 1, 4, 1), *args) == expected
