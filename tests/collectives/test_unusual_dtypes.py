"""Sums and extrema of dtypes that torch only stores: unsigned ints, floats of 8 bits, complex numbers of two halves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pmod
from pmod._wire.base import SMALL
from tests.lib import spmd

UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]
FLOATS = [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz]
LENGTHS = [6, 6 * SMALL]  # in one message, and by parts


def unsigned(dtype: torch.dtype, rank: int, length: int) -> Tensor:
    """With and without the first bit, so that sums wrap around."""
    bits = 8 * dtype.itemsize
    numbers = np.random.default_rng(rank).integers(0, 2**bits, length, dtype=f"uint{bits}", endpoint=False)
    return torch.from_numpy(numbers)


def floats(dtype: torch.dtype, rank: int, length: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(rank).normal(size=length)).float().to(dtype)


def alike(y: Tensor, want: Tensor) -> None:
    assert y.dtype == want.dtype and y.shape == want.shape
    assert torch.equal(y.view(torch.uint8), want.contiguous().view(torch.uint8))


def check_unsigned(dtype: torch.dtype, length: int) -> None:
    n, index = pmod.axis_size("x"), pmod.axis_index("x")
    whole = np.stack([unsigned(dtype, rank, length).numpy() for rank in range(n)])
    x, total = unsigned(dtype, index, length), torch.from_numpy(whole.sum(0, dtype=whole.dtype))
    alike(pmod.psum(x, "x"), total)
    alike(pmod.psum({"a": x, "b": [x]}, "x")["b"][0], total)
    alike(pmod.psum_scatter(x, "x"), total.chunk(n)[index])
    alike(pmod.reduce(x, "x", dst=n - 1), total if index == n - 1 else torch.zeros_like(x))
    alike(pmod.pmax(x, "x"), torch.from_numpy(whole.max(0)))
    alike(pmod.pmin(x, "x"), torch.from_numpy(whole.min(0)))
    alike(pmod.all_gather(x, "x"), torch.from_numpy(whole.reshape(-1)))


def check_floats(dtype: torch.dtype, length: int) -> None:
    """Added up in float32, and rounded once."""
    n, index = pmod.axis_size("x"), pmod.axis_index("x")
    whole = torch.stack([floats(dtype, rank, length).float() for rank in range(n)])
    x, total = floats(dtype, index, length), sum(whole.unbind()[1:], whole[0]).to(dtype)
    alike(pmod.psum(x, "x"), total)
    alike(pmod.pmean(x, "x"), (sum(whole.unbind()[1:], whole[0]) / n).to(dtype))
    alike(pmod.psum_scatter(x, "x"), total.view(torch.uint8).chunk(n)[index].view(dtype))
    alike(pmod.pmax(x, "x"), whole.amax(0).to(dtype))
    alike(pmod.pmin(x, "x"), whole.amin(0).to(dtype))


CHECKS: list[tuple[Callable[..., None], torch.dtype]] = [
    *((check_unsigned, dtype) for dtype in UNSIGNED),
    *((check_floats, dtype) for dtype in FLOATS),
]


@pytest.mark.parametrize(("check", "dtype"), CHECKS, ids=[str(dtype) for _, dtype in CHECKS])
@pytest.mark.parametrize("length", LENGTHS)
def test_simulated(check: Any, dtype: torch.dtype, length: int) -> None:
    for n in (1, 2, 3):
        pmod.simulate(check, dtype, length, x=n)


@pytest.mark.parametrize(("check", "dtype"), CHECKS, ids=[str(dtype) for _, dtype in CHECKS])
def test_on_processes(check: Any, dtype: torch.dtype) -> None:
    for length in LENGTHS:
        spmd.launch(check, dtype, length, x=2)


@pytest.mark.parametrize("dtype", [*UNSIGNED, *FLOATS])
@pytest.mark.parametrize("n", [1, 2])
def test_what_halos_add_up(dtype: torch.dtype, n: int) -> None:
    def each() -> Tensor:
        x = torch.tensor([1.0, 2.0, 3.0, 4.0]).to(dtype)
        return pmod.halo_reduce(x, "x", width=1, boundary="periodic")

    want = torch.tensor([2.0 + 4.0, 1.0 + 3.0]).to(dtype)
    for y in pmod.simulate(each, x=n):
        alike(y, want)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_complex_numbers_of_two_halves() -> None:
    x = torch.tensor([1 + 2j, 3 - 1j]).to(torch.complex32)
    for weight in (None, 2.0):
        for y in pmod.simulate(lambda weight=weight: pmod.pmean(x, "x", weight=weight), x=2):
            alike(torch.view_as_real(y), torch.view_as_real(x))
    for y in pmod.simulate(lambda: pmod.psum(x, "x"), x=2):
        alike(torch.view_as_real(y), 2 * torch.view_as_real(x))
