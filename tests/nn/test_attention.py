"""Attention over a sequence or a field that is cut, held against torch's on the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import pmod
import pmod.nn.functional as sharded
from tests.lib import layers, spmd
from tests.lib.layers import Case

Tensor = torch.Tensor


Q, K, V = (2, 4, "x", 3), (2, 4, "x", 3), (2, 4, "x", 5)
attention = F.scaled_dot_product_attention


def attended(**kwargs: Any) -> dict[str, Any]:
    return {
        "torchs": lambda *of: attention(*of, **kwargs),
        "ours": lambda *of, **cut: sharded.scaled_dot_product_attention(*of, **kwargs, **cut),
    }


def near(rows: Tensor, columns: Tensor) -> Tensor:
    """A bias by positions, of which some are never seen."""
    return torch.where((rows - columns).abs() < 3, -(rows - columns).abs().double(), -torch.inf)


def seen(rows: Tensor, columns: Tensor) -> Tensor:
    """The last rows see nothing."""
    return (rows % 3 >= columns % 2) & (rows < 4)


def by_position(mask: Any) -> dict[str, Any]:
    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, columns = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None]
        return attention(q, k, v, mask(rows, columns))

    return {"torchs": whole, "ours": lambda *of, **cut: sharded.scaled_dot_product_attention(*of, mask, **cut)}


def balanced(q: Tensor, k: Tensor, v: Tensor, **cut: Any) -> Tensor:
    q, k, v = (sharded.zigzag(x, **cut) for x in (q, k, v))
    y = sharded.scaled_dot_product_attention(q, k, v, is_causal=True, zigzag=True, **cut)
    return sharded.zigzag(y, back=True, **cut)


def of_whole_queries(**kwargs: Any) -> dict[str, Any]:
    """Keys and values first, so that they are what is cut."""
    return {
        "torchs": lambda k, v, q: attention(q, k, v, **kwargs),
        "ours": lambda k, v, q, **cut: sharded.scaled_dot_product_attention(q, k, v, queries="whole", **kwargs, **cut),
        "out": {},
    }


def neighborhood(count: int, kernel: tuple[int, ...], shape: layers.Pattern) -> Case:
    """Against dense attention whose mask says what is seen."""

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        points = q.shape[-count - 1 : -1]
        places = torch.cartesian_prod(*map(torch.arange, points)).view(-1, count)
        mask = torch.ones(len(places), len(places), dtype=torch.bool)
        for dim, (n, size) in enumerate(zip(points, kernel, strict=True)):
            begin = (places[:, dim] - size // 2).clamp(0, n - size)[:, None]
            mask &= (places[None, :, dim] >= begin) & (places[None, :, dim] < begin + size)
        flat = [x.flatten(-count - 1, -2) for x in (q, k, v)]
        return attention(*flat, mask).unflatten(-2, points)

    name = f"neighborhood_attention{count}d"
    return Case(name, (shape, shape, (*shape[:-1], 2)), torchs=whole, least=max(kernel), alone=count < 3,
                ours=lambda *of, **cut: getattr(sharded, name)(*of, kernel, **cut))  # fmt: skip


CASES: dict[str, Case] = {
    "all": Case("scaled_dot_product_attention", (Q, K, V), **attended()),
    "causal": Case("scaled_dot_product_attention", (Q, K, V), **attended(is_causal=True)),
    "scale": Case("scaled_dot_product_attention", (("x", 3), ("x", 3), ("x", 2)), **attended(scale=0.3)),
    "grouped": Case("scaled_dot_product_attention", (Q, (2, 2, "x", 3), (2, 2, "x", 5)),
                    **attended(is_causal=True, enable_gqa=True)),
    "mask": Case("scaled_dot_product_attention", (Q, K, V, ("x", "=x")), **attended()),
    "mask of each head": Case("scaled_dot_product_attention", (Q, K, V, (2, 1, 1, "=x")), **attended()),
    "bias by position": Case("scaled_dot_product_attention", (Q, K, V), **by_position(near)),
    "mask by position": Case("scaled_dot_product_attention", (Q, K, V), **by_position(seen)),
    "mask by position and the past": Case(
        "scaled_dot_product_attention", (Q, K, V),
        torchs=lambda q, k, v: attention(q, k, v, torch.ones(q.shape[-2], q.shape[-2]).tril().bool()),
        ours=lambda *of, **cut: sharded.scaled_dot_product_attention(
            *of, lambda rows, columns: columns < rows + 2, is_causal=True, **cut)),
    "zigzag": Case("zigzag", (Q, K, V), ours=balanced, **{"torchs": attended(is_causal=True)["torchs"]}),
    "whole queries": Case("scaled_dot_product_attention", (K, V, (2, 4, 3, 3)), **of_whole_queries()),
    "whole queries, causal": Case("scaled_dot_product_attention", (K, V, (2, 4, 3, 3)),
                                  **of_whole_queries(is_causal=True)),
    "neighborhood 1d": neighborhood(1, (3,), (2, "x", 3)),
    "neighborhood 1d, even": neighborhood(1, (4,), (2, 2, "x", 3)),
    "neighborhood 2d": neighborhood(2, (3, 2), (2, "x", "y", 3)),
    "neighborhood 3d": neighborhood(3, (1, 3, 2), (2, "x", 2, 3)),
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


# --- lengths, messages, memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes, by_queries", [((4, 1), (2, 5)), ((0, 3, 3), (1, 0, 2)), ((5,), (3,))])
def test_queries_of_other_lengths(sizes: tuple[int, ...], by_queries: tuple[int, ...]) -> None:
    def run() -> None:
        q, k, v = (
            torch.randn(2, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
            for n in (sum(by_queries), sum(sizes), sum(sizes))
        )
        mine = pmod.shard(q, "x", dim=-2, sizes=by_queries)
        blocks = [pmod.shard(x, "x", dim=-2, sizes=sizes) for x in (k, v)]
        for causal in (False, True):
            y = sharded.scaled_dot_product_attention(
                mine, *blocks, is_causal=causal, axis="x", sizes=sizes, query_sizes=by_queries)
            e = pmod.shard(attention(q, k, v, is_causal=causal), "x", dim=-2, sizes=by_queries)
            torch.testing.assert_close(y, e, rtol=1e-12, atol=1e-12)

    pmod.simulate(run, x=len(sizes))


@pytest.mark.parametrize("causal", [False, True])
def test_one_block_a_step(causal: bool) -> None:
    """n - 1 messages of keys and values together, forward and backward."""

    def run() -> tuple[list[int], list[int]]:
        q, k, v = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(3))
        with pmod.trace() as t:
            y = sharded.scaled_dot_product_attention(q, k, v, is_causal=causal, axis="x", sizes=(3, 3, 3))
            forward = len(t.events)
            y.sum().backward()
        assert {event.row for event in t.events} == {"permute"}
        return tuple([event.nbytes for event in half] for half in (t.events[:forward], t.events[forward:]))

    block = 2 * 3 * (4 + 4) * 4
    assert pmod.simulate(run, x=3) == [([block] * 2, [block] * 2)] * 3


def test_scores_of_one_block_at_a_time() -> None:
    """For backward no scores are kept: what is kept grows as the rows do, not as their square."""

    def kept(rows: int) -> int:
        found: set[int] = set()
        sizes: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            found.add(x.untyped_storage().data_ptr())
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        q, k, v = (torch.randn(1, rows, 8, requires_grad=True) for _ in range(3))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            y = sharded.scaled_dot_product_attention(q, k, v, axis="x", sizes=(rows, rows))
        y.sum().backward()
        return sum(sizes.values())

    small, large = (max(pmod.simulate(kept, rows, x=2)) for rows in (64, 256))
    assert large < 6 * small


def dual_on_rank() -> None:
    x, t = (torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))

    def loss(x: Tensor) -> Tensor:
        return sharded.scaled_dot_product_attention(x, x, x, axis="x", sizes=(3, 3)).sin().sum()

    expected = torch.func.jvp(torch.func.grad(loss), (x,), (t,))[1]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.requires_grad_(), t)
        (g,) = torch.autograd.grad(loss(dual), dual, create_graph=True)
        torch.testing.assert_close(forward_ad.unpack_dual(g).tangent, expected)


def test_forward_over_reverse_without_transforms() -> None:
    """Of dual numbers: what backward computes again has their tangents."""
    spmd.launch(dual_on_rank, x=2)


def test_in_one_start() -> None:
    def run() -> None:
        x = torch.randn(2, 3, 4)
        pending = pmod.start(sharded.scaled_dot_product_attention, x, x, x, axis="x", sizes=(3, 3, 3))
        torch.testing.assert_close(
            pending.wait(), sharded.scaled_dot_product_attention(x, x, x, axis="x", sizes=(3, 3, 3)))

    pmod.simulate(run, x=3)


def test_zigzag_is_undone() -> None:
    def run(sizes: tuple[int, ...]) -> None:
        x = pmod.shard(torch.arange(sum(sizes)), "x", sizes=sizes)
        there = sharded.zigzag(x, axis="x", dim=0, sizes=sizes)
        assert torch.equal(sharded.zigzag(there, axis="x", dim=0, sizes=sizes, back=True), x)

    for sizes in ((4, 4, 4), (3, 0, 5), (1, 1), (7,), (0, 2, 1, 1)):
        pmod.simulate(run, sizes, x=len(sizes))


def test_of_sixteen_bits() -> None:
    def run() -> None:
        whole = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
        x = pmod.shard(whole, "x", dim=-2)
        y = sharded.scaled_dot_product_attention(x, x, x, is_causal=True, axis="x", sizes=(4, 4))
        e = attention(whole, whole, whole, is_causal=True)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, pmod.shard(e, "x", dim=-2))

    pmod.simulate(run, x=2)


X = torch.ones(2, 4, 3)
attend = sharded.scaled_dot_product_attention
WRONG = {
    "dropout": (lambda: attend(X, X, X, dropout_p=0.1, axis="x"),
                "dropout_p is 0.1.\nPass 0: blocks would draw other numbers than the whole."),
    "features": (lambda: attend(X, X[..., :2], X, axis="x"),
                 "query is (2, 4, 3), key (2, 4, 2), value (2, 4, 3).\n"
                 "Pass as many features of query and key, and keys and values alike."),
    "dtypes": (lambda: attend(X, X.double(), X, axis="x"),
               "query is torch.float32, key torch.float64, value torch.float32.\n"
               "Pass tensors of one dtype, on one device."),
    "heads": (lambda: attend(X[:1].expand(3, 4, 3), X, X, enable_gqa=True, axis="x"),
              "query is (3, 4, 3), key (2, 4, 3), value (2, 4, 3).\nPass heads of queries that those of keys divide."),
    "a mask": (lambda: attend(X, X, X, torch.ones(4, 4), axis="x", sizes=(4, 4)),
               "attn_mask is (4, 4) and the whole has 8 keys.\n"
               "Pass (..., 4, 8): this rank's queries, the whole's keys."),
    "queries": (lambda: attend(X[:, :3], X, X, is_causal=True, axis="x", sizes=(4, 4)),
                "this rank has 3 queries and 4 keys.\nPass query_sizes, where queries are cut otherwise than keys."),
    "a dim": (lambda: attend(X, X, X, axis="x", dim=-1),
              "dim -1 is not that of the sequence.\nPass -2; heads and batch are torch's own."),
    "a neighbourhood": (lambda: sharded.neighborhood_attention1d(X, X, X, 9, axis="x", sizes=(4, 4)),
                        "the whole has 8 rows along dim -2, and a neighbourhood 9.\nPass a smaller kernel_size."),
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
def test_refused(key: str) -> None:
    call, text = WRONG[key]

    def run() -> None:
        with pytest.raises(pmod.PmodError) as raised:
            call()
        assert str(raised.value).endswith(f": {text}")

    pmod.simulate(run, x=2)
