"""Rows of a cut tensor that move, windows as columns, channels as pixels, held against torch's on the whole."""

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


def padded(pad: tuple[int, ...], mode: str = "constant", value: float | None = None, **more: Any) -> Case:
    """One dim that is cut, padded; torch pads the last dim of three in all modes."""

    def whole(x: Tensor) -> Tensor:
        return F.pad(x, pad, mode, value) if any(pad) else x * 1.0

    return Case("pad", ((2, 3, "x"),), (pad, mode, value), torchs=whole, numbers={"x": (pad, {})}, **more)


def joined(x: Tensor, y: Tensor, **cut: Any) -> Tensor:
    """x, y and x again, along the dim that is cut."""
    sizes = cut.pop("sizes", None)
    dim = next(iter(cut["axis"])) if isinstance(cut["axis"], dict) else -2
    if sizes is not None:
        sizes = sizes[dim] if isinstance(sizes, dict) else sizes
        sizes = [sizes] * 3
    return sharded.cat([x, y, x], dim, sizes=sizes, **cut)


def again(x: Tensor, **cut: Any) -> Tensor:
    """All rows on the last rank, but for one on the first."""
    axis, sizes = cut["axis"], cut.get("sizes")
    if isinstance(axis, dict):
        ((dim, axis),) = axis.items()
        sizes = sizes[dim] if sizes is not None else None
    n, total = pmod.axis_size(axis), pmod.psum(x.shape[-2], axis) if sizes is None else sum(sizes)
    to = [0] * n
    to[0] += min(1, total)
    to[-1] += total - min(1, total)
    return sharded.recut(x, to, axis=axis, dim=-2, sizes=sizes)


CASES: dict[str, Case] = {
    "pad": padded((1, 2)),
    "pad with a value": padded((3, 0), value=2.5),
    "crop": padded((-2, -1), least=4),
    "crop and pad": padded((-2, 1), least=4),
    "pad nothing": padded((0, 0)),
    "pad circular": padded((2, 3), "circular", least=3),
    "pad reflect": padded((2, 3), "reflect", least=4),
    "pad reflect and crop": padded((-1, 3), "reflect", least=5),
    "pad replicate": padded((2, 3), "replicate"),
    "pad both": Case("pad", ((1, "x", "y"),), ((1, 2, 3, 0),), numbers={"y": ((1, 2), {}), "x": ((3, 0), {})}),
    "pad both circular": Case("pad", ((1, 1, "x", "y"),), ((1, 2, 2, 0), "circular"), least=3),
    "pad another dim too": Case("pad", ((1, 2, "x", 3),), ((1, 2, 2, 0), "reflect"), least=4),
    "roll": Case("roll", ((2, "x", 3),), (2, -2), numbers={"x": ((), {})}),
    "roll back": Case("roll", ((2, "x", 3),), ((-3, 1), (-2, -1))),
    "roll both": Case("roll", ((2, "x", "y"),), ((-3, 10), (-2, -1))),
    "flip": Case("flip", ((2, "x", 3),), ((-2,),), numbers={"x": ((), {})}),
    "flip both": Case("flip", ((2, "x", "y"),), ((-2, -1, 0),)),
    "diff": Case("diff", ((2, "x", 3),), kwargs={"dim": -2}, numbers={"x": ((), {})}),
    "diff of diff": Case("diff", ((2, "x", 3),), kwargs={"dim": -2, "n": 3}, numbers={"x": ((3,), {})}),
    "diff of another dim": Case("diff", ((2, "x", 3),), kwargs={"dim": -1}, alone=False),
    "cat": Case("cat", ((2, "x", 3), (2, "x", 3)), torchs=lambda x, y: torch.cat([x, y, x], -2), ours=joined),
    "recut": Case("recut", ((2, "x", 3),), torchs=lambda x: x * 1.0, ours=again),
    "unfold": Case("unfold", ((1, 2, "x", 4),), (3, 1, 1, 2), torchs=lambda x: F.unfold(x, 3, 1, 1, 2),
                   ours=lambda x, **cut: sharded.unfold(x, 3, 1, 1, 2, **cut), out={-1: "x"}),
    "unfold, dilated": Case("unfold", ((2, "x", 5),), out={-1: "x"}, least=5,
                            torchs=lambda x: F.unfold(x, (3, 2), (2, 1), 0, (1, 2)),
                            ours=lambda x, **cut: sharded.unfold(x, (3, 2), (2, 1), 0, (1, 2), **cut)),
    "pixel_shuffle": Case("pixel_shuffle", ((8, "x", 2),), (2,), numbers={"x": ((2,), {})}),
    "pixel_unshuffle": Case("pixel_unshuffle", ((1, 2, "x", 4),), (2,), numbers={"x": ((2,), {})}, times=2),
    "pixel_unshuffle both": Case("pixel_unshuffle", ((2, "x", "y"),), (3,), times=3),
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


# --- what moves ---------------------------------------------------------------------------------------------------


def test_blocks_that_borders_cut() -> None:
    """The factor does not divide the shards."""

    def run() -> None:
        whole = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0))
        sizes = (2, 0, 5, 2)
        x = whole.split(list(sizes), -2)[pmod.axis_index("x")]
        out = sharded.out_sizes("pixel_unshuffle", sizes, 3)
        y = sharded.pixel_unshuffle(x, 3, axis="x", sizes=sizes)
        assert torch.equal(y, F.pixel_unshuffle(whole, 3).split(list(out), -2)[pmod.axis_index("x")])

    pmod.simulate(run, x=4)


FOLDS = [(3, 1, 1, 2), (2, 1, 0, 3), (2, 2, 1, 1), (3, 1, 0, 1)]


@pytest.mark.parametrize("numbers", FOLDS)
def test_fold(numbers: tuple[int, int, int, int]) -> None:
    """Of any lengths, rows or columns of windows or both, with both derivatives."""
    kernel, dilation, padding, stride = numbers
    height, width = 11, 7

    def run(cuts: dict[int, tuple[str, tuple[int, ...]]]) -> None:
        whole = torch.randn(2, 2 * kernel**2, rows * columns, dtype=torch.float64,
                            generator=torch.Generator().manual_seed(1), requires_grad=True)  # fmt: skip
        x = whole.detach().unflatten(-1, (rows, columns))
        out = F.fold(whole, (height, width), *numbers)
        for dim, (name, held) in cuts.items():
            x = x.split(list(held), dim)[pmod.axis_index(name)]
            lengths = sharded.out_sizes("fold", held, (height, width)[dim], *numbers)
            out = out.split(list(lengths), dim)[pmod.axis_index(name)]
        leaf = x.flatten(-2).clone().requires_grad_()
        y = sharded.fold(leaf, (height, width), *numbers, axis={dim: name for dim, (name, _) in cuts.items()},
                         sizes={dim: held for dim, (_, held) in cuts.items()})  # fmt: skip
        torch.testing.assert_close(y, out, rtol=1e-12, atol=1e-12)
        (g,) = torch.autograd.grad(y.pow(3).sum(), leaf, create_graph=True)
        (again,) = torch.autograd.grad(g.sin().sum(), leaf)
        expected = F.fold(whole, (height, width), *numbers).pow(3).sum()
        (e,) = torch.autograd.grad(expected, whole, create_graph=True)
        (e_again,) = torch.autograd.grad(e.sin().sum(), whole)
        for found, of_whole in ((g, e), (again, e_again)):
            part = of_whole.unflatten(-1, (rows, columns))
            for dim, (name, held) in cuts.items():
                part = part.split(list(held), dim)[pmod.axis_index(name)]
            torch.testing.assert_close(found, part.flatten(-2), rtol=1e-10, atol=1e-10)

    rows, columns = ((n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for n in (height, width))
    pmod.simulate(run, {-2: ("x", (rows - 2, 0, 2))}, x=3)
    pmod.simulate(run, {-1: ("x", (0, columns))}, x=2)
    pmod.simulate(run, {-2: ("x", (1, rows - 1)), -1: ("y", (columns - 1, 1))}, x=2, y=2)


def test_what_does_not_move_is_a_tensor_of_its_own() -> None:
    def run() -> None:
        x = torch.ones(2, 3)
        for y in (
            sharded.roll(x, 0, 0, axis="x"), sharded.pad(x, (0, 0), axis="x"), sharded.recut(x, (2, 2), axis="x"),
        ):  # fmt: skip
            y.add_(1)
            assert torch.equal(x, torch.ones(2, 3))

    pmod.simulate(run, x=2)


WRONG = {
    "reflect": (lambda x: sharded.pad(x, (4, 0), "reflect", axis="x", sizes=(2, 2)),
                "pad is (4, 0) and the whole has 4 rows along dim -1.\nPass at most 3 rows with mode='reflect'."),
    "crop": (lambda x: sharded.pad(x, (-3, -2), axis="x", sizes=(2, 2)),
             "pad is (-3, -2) and the whole has 4 rows along dim -1.\nTake away at most all of them."),
    "odd": (lambda x: sharded.pad(x, (1,), axis="x"),
            "pad is (1,) and input has 2 dims.\nPass two ints for each dim, those of the last dim first."),
    "a mode": (lambda x: sharded.pad(x, (1, 1), "zeros", axis="x"),
               "mode is 'zeros'.\nPass 'constant', 'circular', 'reflect' or 'replicate'."),
    "shifts": (lambda x: sharded.roll(x, (1, 2), 0, axis="x"),
               "shifts is (1, 2) and dims 0.\nPass an int for each dim."),
    "twice": (lambda x: sharded.flip(x, (0, 0), axis="x"), "dims is (0, 0).\nName each dim once."),
    "recut": (lambda x: sharded.recut(x, (1, 1), axis="x", dim=1, sizes=(2, 2)),
              "to (1, 1) adds up to 2 but the whole has 4 rows.\nPass lengths that add up to 4."),
    "nothing": (lambda x: sharded.cat([], axis="x"), "tensors is [].\nPass a list of tensors."),
    "sizes": (lambda x: sharded.cat([x, x], axis="x", sizes=[(2, 2)]),
              "sizes is [(2, 2)] and there are 2 tensors.\nPass a list of lengths for each."),
    "a factor": (lambda x: sharded.pixel_unshuffle(x[None], 3, axis="x", sizes=(2, 2)),
                 "the whole has 4 rows along dim -2.\nPass a multiple of 3."),
    "channels": (lambda x: sharded.pixel_shuffle(x[None], 2, axis="x"),
                 "input is (1, 2, 2) and upscale_factor 2.\nPass channels that the square of the factor divides."),
    "windows": (lambda x: sharded.fold(x, 3, 1, axis="x", sizes=(2, 1)),
                "input is (2, 2), and this rank has <n> x 3 windows.\n"
                "Pass (..., channels * kernel * kernel, windows)."),
    "two cuts": (lambda x: sharded.fold(x, 2, 1, axis={-2: "x", -1: "y"}),
                 "sizes are left out and two dims are cut.\nPass sizes."),
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
def test_refused(key: str) -> None:
    call, text = WRONG[key]

    def run() -> None:
        with pytest.raises(pmod.PmodError) as raised:
            call(torch.ones(2, 2))
        assert str(raised.value).endswith(f": {text.replace('<n>', str(2 - pmod.axis_index('x')))}")

    pmod.simulate(run, x=2, y=1)
