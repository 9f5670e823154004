"""How much memory a message takes beside what goes in and what comes out, and that its sums are those of rank order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import pmod
from pmod._core import send
from pmod._wire import sums
from pmod._wire.sums import accumulator, reduce_parts
from tests.lib import spmd
from tests.lib.listening import counted, on_threads

Tensor = torch.Tensor
DTYPES = [torch.float32, torch.bfloat16, torch.int16, torch.complex64]


def peak(f: Callable[[], Any]) -> int:
    """Return how many bytes f held at once, its result among them: as torch counts them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = f()
    held = most = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    del kept
    return most


@contextmanager
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "BLOCK", 1 << 12)
        yield


def sums_on_rank() -> None:
    rank, n = pmod.axis_index("x"), pmod.axis_size("x")
    for dtype in DTYPES:
        # no multiple of the ranks, nor of a block
        generator = torch.Generator().manual_seed(rank)
        x = (100 * torch.randn(50_003, generator=generator)).to(dtype)
        before = x.clone()
        parts = pmod.all_gather(x, "x", tiled=False)
        wanted = reduce_parts(parts, "sum", accumulator(dtype, None), 1)
        with small_blocks():
            found = pmod.psum(x, "x")
        assert torch.equal(found, wanted), f"{dtype} on {n} ranks"
        assert torch.equal(x, before)
        if not dtype.is_complex:
            assert torch.equal(pmod.pmax(x, "x"), parts.amax(0)), f"{dtype} on {n} ranks"
        if dtype.is_floating_point:
            wanted = reduce_parts(parts, "sum", accumulator(dtype, None), n)
            assert torch.equal(pmod.pmean(x, "x"), wanted), f"{dtype} on {n} ranks"


@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_that_are_added_up_in_place_are_in_rank_order(ranks: int) -> None:
    spmd.launch(sums_on_rank, x=ranks)


def peaks_on_rank() -> dict[str, float]:
    size = 1 << 20
    found: dict[str, float] = {}
    with small_blocks():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.ones(size, dtype=dtype).requires_grad_()
            found[f"psum {dtype}"] = peak(lambda x=x: pmod.psum(x.detach(), "x")) / x.nbytes
            y, g = pmod.pvary(x, "x"), torch.ones_like(x)
            found[f"pvary {dtype}"] = peak(lambda x=x, y=y, g=g: torch.autograd.grad(y, x, g)) / x.nbytes
    return found


@pytest.mark.parametrize(("ranks", "most"), [(2, 1.1), (3, 1.5)])
def test_a_sum_holds_little_beside_its_result(ranks: int, most: float) -> None:
    for found in spmd.launch(peaks_on_rank, x=ranks):
        assert all(0.99 < times < most for times in found.values()), found


def buckets_on_rank() -> None:
    leaves = [torch.ones(count) * (i + 1 + pmod.axis_index("x")) for i, count in enumerate((400, 500, 2000, 10, 0, 20))]
    wanted = [pmod.psum(x, "x") for x in leaves]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(send, "BUCKET", 4000)
        found, sent = counted(lambda: pmod.psum(leaves, "x"))
        # 900 floats fill one, 2000 are more than one, and the last share one
        assert [numel for _, _, numel in sent] == [900, 2000, 30]
        # what is sent ahead goes at once
        ahead, sent = counted(lambda: pmod.start(pmod.psum, leaves, "x"))
        assert [numel for _, _, numel in sent] == [2930]
        later = ahead.wait()
        variant = [x.requires_grad_() for x in leaves]
        y = sum(x.sum() for x in pmod.pvary(variant, "x"))
        _, sent = counted(y.backward)
        assert [numel for _, _, numel in sent] == [900, 2000, 30]
    for x, e, z in zip(found, wanted, later, strict=True):
        assert torch.equal(x, e) and torch.equal(z, e)
    assert all(torch.equal(x.grad, torch.full_like(x, 2.0)) for x in variant)


def test_a_large_tree_goes_in_buckets() -> None:
    on_threads(buckets_on_rank, x=2)
