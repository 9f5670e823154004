"""`assert_matches_serial`: right programs pass, and of wrong ones it says what is wrong, where, and by how much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pmod
from pmod import P
from tests.lib import spmd

X = torch.arange(10.0, dtype=torch.float64).reshape(5, 2) / 10
W = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)
SPECS = (P(), P("data"))


def loss(w: Tensor, x: Tensor) -> Tensor:
    return pmod.psum(torch.tanh(x @ pmod.pvary(w, "data")).square().sum(), "data")


def serial(w: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(x @ w).square().sum()


def check(f: Callable[..., Any], whole: Callable[..., Any] = serial, **options: Any) -> None:
    pmod.testing.assert_matches_serial(f, whole, (W, X), **{"in_specs": SPECS, "out_specs": P(), **options})


def failure(f: Callable[..., Any], whole: Callable[..., Any] = serial, **options: Any) -> list[str]:
    with pytest.raises(AssertionError) as raised:
        check(f, whole, **{"data": 2, **options})
    text = str(raised.value).split("\n")
    assert text[0] == "the function of shards is not the serial one:"
    return text[1:]


@pytest.mark.parametrize("data", [1, 2, 3, 4])
def test_right(data: int) -> None:
    check(loss, data=data)


def test_right_with_trees_numbers_and_uneven_shards() -> None:
    def whole(tree: dict[str, Tensor], y: Tensor, times: int) -> Any:
        return {"rows": tree["x"] * tree["a"] * times, "n": times}, [(y * tree["a"]).sum()]

    def local(tree: dict[str, Tensor], y: Tensor, times: int) -> Any:
        columns = pmod.pvary(pmod.shard(tree["a"], "model"), "data")
        total = pmod.psum((y * pmod.pvary(tree["a"], "model")).sum(), "model")
        return {"rows": tree["x"] * columns * times, "n": times}, [total]

    args = ({"x": torch.randn(5, 3), "a": torch.randn(3)}, torch.randn(5, 3), 2)
    pmod.testing.assert_matches_serial(
        local, whole, args, in_specs=({"x": P("data", "model"), "a": None}, P("model"), None),
        out_specs=({"rows": P("data", "model"), "n": None}, P()), data=2, model=3,
    )  # fmt: skip


def test_a_missing_pvary() -> None:
    lines = failure(lambda w, x: pmod.psum(torch.tanh(x @ w).square().sum(), "data"))
    assert lines[0].startswith("  gradient of args[0]: off by ") and lines[0].endswith(", on rank 0 (data=0)")
    assert lines[1].startswith("  second derivative of args[0]: off by ")
    assert lines[-1] == "The ranks' gradients of args[0] add up to it over data: a pvary is missing."


def test_one_sum_too_many() -> None:
    lines = failure(lambda w, x: loss(pmod.pvary(w, "data"), x))
    assert lines[-1] == "The gradient of args[0] is 2 times the serial one: summed twice over data."


def test_the_axis_that_lacks_it() -> None:
    def half(w: Tensor, x: Tensor) -> Tensor:
        columns = pmod.shard(w, "model", dim=1)  # and no pvary over "data"
        return pmod.psum(torch.tanh(x @ columns).square().sum(), ("data", "model"))

    def pvaried(w: Tensor, x: Tensor) -> Tensor:
        x = pmod.pvary(x, "model")
        return half(pmod.pvary(w, "data"), x)

    check(pvaried, data=2, model=2)
    lines = failure(lambda w, x: half(w, pmod.pvary(x, "model")), data=2, model=2)
    assert lines[-1] == "The ranks' gradients of args[0] add up to it over data: a pvary is missing."
    assert not any("args[1]" in line for line in lines)


def test_a_wrong_value() -> None:
    def wrong(w: Tensor, x: Tensor) -> Tensor:
        return loss(w, x) + (0.5 if pmod.axis_index("data") == 1 else 0)

    lines = failure(wrong, order=0)
    value = serial(W, X).item()
    assert lines == [
        f"  output: off by 0.5 at [], where it is {value + 0.5:.6g} and serial {value:.6g}, on rank 1 (data=1)"
    ]


def test_a_wrong_shard() -> None:
    lines = failure(lambda w, x: x.flip(0), lambda w, x: x, in_specs=SPECS, out_specs=P("data"), order=0)
    assert lines == [
        "  output: off by 0.4 at [0, 0], where it is 0.4 and serial 0, on rank 0 (data=0)",
        "  output: off by 0.2 at [0, 0], where it is 0.8 and serial 0.6, on rank 1 (data=1)",
    ]


def test_other_shapes_leaves_and_dtypes() -> None:
    (line,) = failure(lambda w, x: x[:1], lambda w, x: x, out_specs=P("data"))
    assert line == (
        "  output: the shards make up shape (2, 2) and serial has (5, 2), on rank 0 (data=0), rank 1 (data=1)"
    )
    (line,) = failure(lambda w, x: (w, w), lambda w, x: w)
    assert "it has 2 leaves and serial 1" in line
    assert "it is torch.float32 of shape" in failure(lambda w, x: w.float(), lambda w, x: w)[0]
    assert failure(lambda w, x: (w, 2), lambda w, x: (w, 3))[0].startswith("  output[1]: it is 2 and serial 3")


def test_other_structures_and_kinds_of_leaves() -> None:
    (line,) = failure(lambda w, x: {"a": w}, lambda w, x: {"b": w}, out_specs=P())
    assert "output['a']: it is a Tensor, and serial has a Tensor at output['b']" in line
    assert "output: it is a float, and serial has a Tensor at output" in failure(lambda w, x: 3.0, lambda w, x: W[0])[0]
    assert "output: it is a Tensor, and serial has a float at output" in failure(lambda w, x: W[0], lambda w, x: 3.0)[0]


def test_a_derivative_that_serial_or_a_rank_lacks() -> None:
    lines = failure(loss, lambda w, x: serial(w, x).detach(), order=1)
    assert lines[0].startswith("  gradient of args[0]: off by ")
    (line,) = failure(lambda w, x: loss(w, x).detach() if pmod.axis_index("data") else loss(w, x))
    assert "output: it requires a gradient on 1 of 2 ranks" in line


class Doubled(torch.autograd.Function):
    """A value whose gradient is right once and not twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * ctx.saved_tensors[0].detach() ** 2 * g


def test_a_wrong_second_derivative() -> None:
    lines = failure(lambda w, x: Doubled.apply(x), lambda w, x: x**3, out_specs=P("data"))
    assert len(lines) == 2 and all(line.startswith("  second derivative of args[1]: off by ") for line in lines)
    check(lambda w, x: Doubled.apply(x), lambda w, x: x**3, out_specs=P("data"), order=1, data=2)


def test_only_what_requires_a_gradient() -> None:
    def loose(w: Tensor, x: Tensor) -> Tensor:
        return loss(w, x.detach())

    assert any("gradient of args[1]" in line for line in failure(loose))
    pmod.testing.assert_matches_serial(
        loose, serial, (W.clone().requires_grad_(), X), in_specs=SPECS, out_specs=P(), data=2
    )


def test_values_only_need_no_gradient() -> None:
    """One rank sends what depends on w, another does not: for values only that is no difference between them."""

    def from_first(w: Tensor, x: Tensor) -> Tensor:
        assert not w.requires_grad and not x.requires_grad
        return pmod.psum(w if pmod.axis_index("data") == 0 else torch.zeros_like(w), "data")

    with pmod.debug():
        check(from_first, lambda w, x: w, order=0, data=2)


def test_nan_infinity_and_tolerance() -> None:
    special = torch.tensor([float("nan"), float("inf"), 1.0], dtype=torch.float64)
    check(lambda w, x: special * 1, lambda w, x: special * 1, order=0, data=2)
    assert "off by inf at [0]" in failure(lambda w, x: torch.ones_like(special), lambda w, x: special, order=0)[0]
    check(lambda w, x: loss(w, x) * 1.001, data=2, rtol=0.01)
    assert failure(lambda w, x: loss(w, x) * 1.001, rtol=1e-6)


def on_every_rank() -> None:
    check(loss)
    with pmod.debug():
        check(loss)
    wrong = loss if pmod.axis_index("data") == 0 else lambda w, x: loss(w, x) * 2
    with pytest.raises(AssertionError, match=r"output: off by .*, on rank 1 \(data=1\)"):
        check(wrong, order=0)  # rank 0 raises, too


def test_on_processes() -> None:
    spmd.launch(on_every_rank, data=2)
    check(loss, data=2, run=spmd.launch)


def test_wrong_arguments() -> None:
    with pytest.raises(pmod.ArgumentError, match="order is 3"):
        check(loss, order=3, data=2)
    with pytest.raises(pmod.NoMeshError):
        check(loss)
    with pytest.raises(pmod.AxisError, match=r"args\[1\]: the mesh has no axis 'data'"):
        check(loss, model=2)
