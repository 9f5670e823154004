"""Functions along a dim that is cut, held against torch's on the whole."""

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


def of_one(function: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The values of a function that gives indices too."""
    return {
        "torchs": lambda x: getattr(torch, function)(x, *args, **kwargs)[0],
        "ours": lambda x, **cut: getattr(sharded, function)(x, *args, **kwargs, **cut)[0],
    }


def selected(x: Tensor, **cut: Any) -> Tensor:
    """Every other row of the whole, the last first, as many for each rank."""
    rows = torch.tensor([4, 2, 0, 1, 1, 3])
    axis = cut["axis"][-2] if isinstance(cut["axis"], dict) else cut["axis"]
    return sharded.index_select(x, -2, pmod.shard(rows, axis), **cut)


def taken(x: Tensor, **cut: Any) -> Tensor:
    axis = cut["axis"][-2] if isinstance(cut["axis"], dict) else cut["axis"]
    return sharded.take_along_dim(x, pmod.shard(PLACES, axis, dim=-2), -2, **cut)


PLACES = torch.randint(0, 5, (1, 6, 3), generator=torch.Generator().manual_seed(3))
ROWS = {"x": ((), {})}
CASES: dict[str, Case] = {
    "softmax": Case("softmax", ((2, "x", 3),), kwargs={"dim": -2}, numbers=ROWS),
    "softmax of another dim": Case("softmax", ((2, "x", 3),), kwargs={"dim": -1}, alone=False),
    "softmax both": Case("softmax", ((2, "x", "y"),), kwargs={"dim": -1}),
    "log_softmax": Case("log_softmax", ((2, 3, "x"),), kwargs={"dim": -1}, numbers=ROWS),
    "cumsum": Case("cumsum", ((2, "x", 3),), kwargs={"dim": 1}, numbers=ROWS),
    "index_select": Case("index_select", ((2, "x", 3),), torchs=lambda x: x[:, [4, 2, 0, 1, 1, 3]], ours=selected,
                         least=5),
    "take_along_dim": Case("take_along_dim", ((2, "x", 3),), torchs=lambda x: torch.take_along_dim(x, PLACES, 1),
                           ours=taken, least=5),
    "sort": Case("sort", ((2, "x", 3),), **of_one("sort", -2), numbers=ROWS),
    "sort of a line": Case("sort", (("x",),), **of_one("sort", -1, descending=True)),
    "topk": Case("topk", ((2, "x", 3),), **of_one("topk", 3, -2), numbers={"x": ((3,), {})}, least=3),
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


# --- integers, infinities, what is refused ------------------------------------------------------------------------


def of_integers(sizes: tuple[int, ...]) -> None:
    whole = torch.randint(0, 4, (3, sum(sizes)), generator=torch.Generator().manual_seed(0))
    x, cut = pmod.shard(whole, "x", dim=-1, sizes=sizes), {"axis": "x", "sizes": sizes}
    for y, e in (
        (sharded.cumsum(x, -1, **cut), whole.cumsum(-1)),
        (sharded.cumsum(x > 1, -1, **cut), (whole > 1).cumsum(-1)),
        (sharded.cumsum(x, -1, dtype=torch.float32, **cut), whole.cumsum(-1, dtype=torch.float32)),
        *zip(sharded.sort(x, stable=True, **cut), torch.sort(whole, stable=True), strict=True),
        (sharded.flip(x, -1, **cut), whole.flip(-1)),
    ):
        mine = pmod.shard(e, "x", dim=-1, sizes=sizes)
        assert y.dtype == e.dtype and torch.equal(y, mine)
    values, indices = sharded.topk(x, 3, largest=False, **cut)
    out = sharded.out_sizes("topk", sizes, 3)
    found = torch.topk(whole, 3, largest=False)[0]
    assert torch.equal(values, pmod.shard(found, "x", dim=-1, sizes=out))
    assert torch.equal(whole.take_along_dim(pmod.all_gather_v(indices, "x", dim=-1), -1), found)


@pytest.mark.parametrize("sizes", [(2, 3), (0, 4, 1), (5,)])
def test_integers_and_indices(sizes: tuple[int, ...]) -> None:
    pmod.simulate(of_integers, sizes, x=len(sizes))


def test_infinities() -> None:
    """Rows without a finite number, on one rank or on all, are what torch makes of them; 16 bits are computed in 32."""

    def run() -> None:
        whole = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
        whole[0, :3] = -torch.inf
        whole[1] = -torch.inf
        whole[2, 4] = torch.nan
        for x in (whole, whole.bfloat16()):
            for name in ("softmax", "log_softmax"):
                y = getattr(sharded, name)(pmod.shard(x, "x", dim=-1), -1, axis="x")
                torch.testing.assert_close(y, pmod.shard(getattr(F, name)(x, -1), "x", dim=-1), equal_nan=True)

    pmod.simulate(run, x=2)


def test_nothing_is_exchanged_for_lengths() -> None:
    def run() -> list[str]:
        x = torch.ones(2, pmod.axis_index("x"))
        with pmod.trace() as t:
            sharded.softmax(x, -1, axis="x")
            sharded.cumsum(x, -1, axis="x")
        return [event.row for event in t.events]

    assert pmod.simulate(run, x=2) == [["extremum", "psum", "pvary", "scan"]] * 2


X = torch.ones(2, 3)
WRONG = {
    "integers": (lambda: sharded.softmax(X.long(), 1, axis="x"),
                 "input is int64.\nPass one that is floating, input.float() for example."),
    "k": (lambda: sharded.topk(X, 7, axis="x", sizes=(3, 3)),
          "k is 7 and the whole has 6 rows.\nPass an int of 0 to 6."),
    "complex": (lambda: sharded.sort(X + 1j, axis="x"),
                "x is complex, which has no order.\nCompare x.abs() or x.real."),
    "index": (lambda: sharded.index_select(X, 0, X[0], axis="x"), "index is torch.float32.\nPass index.long()."),
    "dims": (lambda: sharded.take_along_dim(X, torch.tensor([0]), 0, axis="x"),
             "indices has 1 dims and input 2.\nPass as many."),
    "sizes": (lambda: sharded.cumsum(X, 1, axis="x", sizes=(2, 2)),
              "sizes[<i>] is 2 but x.shape[1] is 3.\nPass sizes=<fits>, or leave sizes out to exchange them."),
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
def test_refused(key: str) -> None:
    call, text = WRONG[key]

    def run() -> None:
        i = pmod.axis_index("x")
        said = text.replace("<i>", str(i)).replace("<fits>", str((2, 3) if i else (3, 2)))
        with pytest.raises(pmod.PmodError) as raised:
            call()
        assert str(raised.value).endswith(f": {said}")

    pmod.simulate(run, x=2)


def test_a_row_that_is_not_there() -> None:
    def run() -> None:
        for row in (6, -1):
            with pytest.raises(IndexError):
                sharded.index_select(X, 1, torch.tensor([row]), axis="x", sizes=(3, 3))

    pmod.simulate(run, x=2)
