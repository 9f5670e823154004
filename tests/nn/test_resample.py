"""Resampling a cut tensor and adaptive pools, held against torch's on the whole."""

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


def resampled(shape: layers.Pattern, told: dict[str, Any] | None = None, **kwargs: Any) -> Case:
    numbers = {} if told is None else {"x": ((), told)}
    return Case("interpolate", (shape,), kwargs=kwargs, numbers=numbers, least=2)


LINE, ROWS, BOTH = (2, 2, "x"), (1, 2, "x", 5), (1, 2, "x", "y")
CASES: dict[str, Case] = {
    "nearest": resampled(LINE, {"scale_factor": 2}, scale_factor=2),
    "nearest by a fraction": resampled(LINE, {"scale_factor": 1.7}, scale_factor=1.7),
    "nearest down": resampled(ROWS, {"scale_factor": 0.6}, scale_factor=0.6),
    "nearest-exact": resampled(LINE, {"size": 7}, size=7, mode="nearest-exact"),
    "nearest both": resampled(BOTH, {"size": 3}, size=(3, 9)),
    "linear": resampled(LINE, {"size": 9}, size=9, mode="linear"),
    "linear, aligned": resampled(LINE, {"size": 9}, size=9, mode="linear", align_corners=True),
    "linear to one": resampled(LINE, {"size": 1}, size=1, mode="linear", align_corners=True),
    "linear by a fraction": resampled(LINE, {"scale_factor": 1.3}, scale_factor=1.3, mode="linear"),
    "linear by a recomputed fraction": resampled(LINE, scale_factor=1.3, mode="linear", recompute_scale_factor=True),
    "bilinear": resampled(ROWS, {"scale_factor": 2}, scale_factor=2, mode="bilinear"),
    "bilinear both": resampled(BOTH, scale_factor=(1.5, 2), mode="bilinear", align_corners=True),
    "bilinear of one length": resampled((1, 1, "x", 4), size=(7, 4), mode="bilinear"),
    "bilinear antialias": resampled(ROWS, {"size": 2}, size=(2, 3), mode="bilinear", antialias=True),
    "bicubic": resampled(ROWS, {"size": 8}, size=(8, 3), mode="bicubic"),
    "bicubic, aligned": resampled(BOTH, {"size": 8}, size=(8, 3), mode="bicubic", align_corners=True),
    "bicubic antialias": resampled(ROWS, {"size": 2}, size=(2, 7), mode="bicubic", antialias=True),
    "trilinear": resampled((1, 1, 2, "x", 3), {"scale_factor": 2}, scale_factor=2, mode="trilinear"),
    "area": resampled(ROWS, {"size": 3}, size=(3, 2), mode="area"),
    "adaptive_avg_pool1d": Case("adaptive_avg_pool1d", (LINE,), (3,), numbers={"x": ((3,), {})}),
    "adaptive_avg_pool1d to one": Case("adaptive_avg_pool1d", (LINE,), (1,), numbers={"x": ((1,), {})}),
    "adaptive_avg_pool1d to more": Case("adaptive_avg_pool1d", (LINE,), (11,), numbers={"x": ((11,), {})}),
    "adaptive_avg_pool2d": Case("adaptive_avg_pool2d", (BOTH,), ((2, 3),)),
    "adaptive_avg_pool2d, kept": Case("adaptive_avg_pool2d", (ROWS,), ((None, 3),), numbers={"x": ((None,), {})}),
    "adaptive_avg_pool3d": Case("adaptive_avg_pool3d", ((1, 2, 3, "x", 4),), (2,)),
    "adaptive_max_pool1d": Case("adaptive_max_pool1d", (LINE,), (3,), numbers={"x": ((3,), {})}),
    "adaptive_max_pool2d": Case("adaptive_max_pool2d", (BOTH,), ((1, 4),)),
    "adaptive_max_pool3d": Case("adaptive_max_pool3d", ((1, 2, 3, "x", 4),), (2,)),
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


# --- which one is the largest -------------------------------------------------------------------------------------


def indices_on_rank(sizes: tuple[int, ...], whole: Tensor, to: tuple[int, int]) -> None:
    i = pmod.axis_index("x")
    x = whole.split(list(sizes), -2)[i]
    leaf, of_whole = x.double().requires_grad_(), whole.double().requires_grad_()
    y, places = sharded.adaptive_max_pool2d(leaf, to, True, axis="x", sizes=sizes)
    expected, indices = F.adaptive_max_pool2d(of_whole, to, True)
    out = sharded.out_sizes("adaptive_max_pool2d", sizes, to[0])
    assert torch.equal(y, expected.split(list(out), -2)[i])
    assert torch.equal(places, indices.split(list(out), -2)[i])
    (g,) = torch.autograd.grad(y.sum(), leaf)
    (e,) = torch.autograd.grad(expected.sum(), of_whole)
    assert torch.equal(g, e.split(list(sizes), -2)[i])


@settings(max_examples=25, **layers.QUICK)
@given(st.data())
def test_indices_are_those_of_the_whole(data: st.DataObject) -> None:
    """Of equal numbers too: the first in the order of memory."""
    n = data.draw(st.integers(1, 4))
    sizes = [data.draw(st.sampled_from([0, 1, 2, 4])) for _ in range(n)]
    sizes[data.draw(st.integers(0, n - 1))] += 1
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    whole = torch.randint(0, 2, (2, sum(sizes), 6), generator=generator)
    to = (data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8)))
    pmod.simulate(indices_on_rank, tuple(sizes), whole, to, x=n)


@settings(max_examples=40, **layers.QUICK)
@given(st.data())
def test_any_length_to_any_other(data: st.DataObject) -> None:
    """The taps that are read off torch's function are all there are, whatever the lengths."""
    rows, to = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    mode = data.draw(st.sampled_from(["nearest", "nearest-exact", "bilinear", "bicubic", "area"]))
    kwargs: dict[str, Any] = {"mode": mode, "size": (to, 2)}
    if data.draw(st.booleans()):
        kwargs["size"], kwargs["scale_factor"] = None, (max(to / rows, 1.01 / rows), 1)
    if mode.startswith("bi"):
        kwargs["align_corners"] = data.draw(st.booleans())
        kwargs["antialias"] = data.draw(st.booleans())
    sizes = pmod.split_sizes(rows, 3)

    def run() -> None:
        whole = torch.randn(1, 2, rows, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        expected = F.interpolate(whole, **kwargs)
        y = sharded.interpolate(pmod.shard(whole, "x", dim=-2), axis="x", sizes=sizes, **kwargs)
        out = sharded.out_sizes("interpolate", sizes, expected.shape[-2])
        torch.testing.assert_close(y, pmod.shard(expected, "x", dim=-2, sizes=out), rtol=1e-12, atol=1e-12)

    pmod.simulate(run, x=3)


def test_dtypes() -> None:
    def run() -> None:
        whole = torch.randn(1, 2, 8, 3, generator=torch.Generator().manual_seed(0))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = whole.to(dtype)
            for kwargs in ({"scale_factor": 2, "mode": "bilinear"}, {"size": (3, 3), "mode": "area"}):
                y = sharded.interpolate(pmod.shard(x, "x", dim=-2), axis="x", sizes=(4, 4), **kwargs)
                e = F.interpolate(x, **kwargs)
                out = sharded.out_sizes("interpolate", (4, 4), e.shape[-2])
                torch.testing.assert_close(y, pmod.shard(e, "x", dim=-2, sizes=out))
        x = torch.arange(6, dtype=torch.uint8).view(1, 1, 6)
        y = sharded.interpolate(pmod.shard(x, "x", dim=-1), scale_factor=2, axis="x", sizes=(3, 3))
        assert torch.equal(y, pmod.shard(F.interpolate(x, scale_factor=2), "x", dim=-1))

    pmod.simulate(run, x=2)


def test_sums_travel_and_not_rows() -> None:
    """A pool to one row sends one row of each rank to the first."""

    def run() -> list[int]:
        with pmod.trace() as t:
            sharded.adaptive_avg_pool2d(torch.ones(2, 100, 3), (1, None), axis="x", sizes=(100, 100, 100))
        return [event.nbytes for event in t.events if event.nbytes]

    assert pmod.simulate(run, x=3) == [[], [2 * 3 * 4], [2 * 3 * 4]]


X = torch.ones(1, 2, 4)
WRONG = {
    "mode": (lambda: sharded.interpolate(X, 3, mode="bilinear", axis="x", sizes=(4, 4)),
             "Got 3D input, but bilinear mode needs 4D input.\nPass what torch.nn.functional.interpolate takes."),
    "both": (lambda: sharded.interpolate(X, 3, 2.0, axis="x", sizes=(4, 4)),
             "only one of size or scale_factor should be defined.\nPass what torch.nn.functional.interpolate takes."),
    "dims": (lambda: sharded.interpolate(X[0], 3, axis="x"), "input is (2, 4).\nPass an input of 3 to 5 dims."),
    "integers": (lambda: sharded.interpolate(X.long(), 3, mode="linear", axis="x", sizes=(4, 4)),
                 "input is int64.\nPass one that is floating, input.float() for example."),
    "output_size": (lambda: sharded.adaptive_avg_pool1d(X, 0, axis="x"),
                    "output_size is 0.\nPass an int of 1 or more, or 1 of them; None keeps a length."),
    "nothing": (lambda: sharded.adaptive_max_pool1d(X[..., :0], 1, axis="x", sizes=(0, 0)),
                "the whole has 0 rows along dim -1.\nPass an input with rows."),
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
def test_refused(key: str) -> None:
    call, text = WRONG[key]

    def run() -> None:
        with pytest.raises(pmod.PmodError) as raised:
            call()
        assert str(raised.value).endswith(f": {text}")

    pmod.simulate(run, x=2)
