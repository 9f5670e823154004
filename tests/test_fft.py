"""`pmod.fft`: torch.fft's numbers and derivatives on the whole tensor, from its shards; what is sent, what is refused.

A `Job` is one drawn call with what torch.fft makes of the whole tensor; modes that are left out are picked by their
frequency, one by one. Every job is held to the value, to the gradients of a linear and of a nonlinear function, and to
a second derivative.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
import pytest
import torch

import pmod
from tests.test_collectives import same

Tensor = torch.Tensor
FUNCTIONS = ("fft", "ifft", "rfft", "irfft", "fft2", "ifft2", "rfft2", "irfft2", "fftn", "ifftn", "rfftn", "irfftn")


# --- what is drawn ------------------------------------------------------------------------------------------------


@attrs.define
class Job:
    """A call of a function of pmod.fft, and the whole tensor. Several axes: cut along `ins`, `outs`, by `sizes`."""

    function: str
    x: Tensor
    torchs: dict[str, Any]  # torch.fft's own arguments
    ours: dict[str, Any]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]
    mesh: dict[str, int]

    @property
    def dims(self) -> list[int]:
        dim = self.torchs.get(
            "dim", -1 if self.function.endswith("fft") else (-2, -1) if "2" in self.function else None
        )
        if dim is None:
            s = self.torchs.get("s")
            return list(range(-(self.x.dim() if s is None else len(s)), 0))
        return [d % self.x.dim() - self.x.dim() for d in (dim if isinstance(dim, tuple) else (dim,))]

    def whole(self, x: Tensor) -> Tensor:
        """What torch.fft gives, with the modes that are asked for."""
        f, modes = getattr(torch.fft, self.function), self.ours.get("modes")
        kept = list(modes) if isinstance(modes, tuple) else [modes] * len(self.dims)
        if self.function[0] != "i":
            y = f(x, **self.torchs)
            for number, (dim, k) in enumerate(zip(self.dims, kept, strict=True)):
                if k is not None:
                    y = y.index_select(dim, self.picked(k, y.shape[dim], number))
            return y
        lengths = self.torchs.get("n", self.torchs.get("s"))
        for number, (dim, k) in enumerate(zip(self.dims, kept, strict=True)):
            if k is not None:
                n = lengths if isinstance(lengths, int) else lengths[number]
                n = n // 2 + 1 if self.half(number) else n
                shape = list(x.shape)
                shape[dim] = n
                x = torch.zeros(shape, dtype=x.dtype).index_copy(dim, self.picked(k, n, number), x)
        return f(x, **self.torchs)

    def half(self, number: int) -> bool:
        return "rfft" in self.function and number == len(self.dims) - 1

    def picked(self, k: int, n: int, number: int) -> Tensor:
        if self.half(number):
            return torch.arange(k)
        return torch.fft.fftfreq(k, 1 / k).round().long() % n

    def cut(self, x: Tensor, dims: Sequence[int], sizes: Sequence[Sequence[int]]) -> Tensor:
        """This rank's shard."""
        for axis, dim, lengths in zip(self.mesh, dims, sizes, strict=True):
            x = x.split(list(lengths), dim)[pmod.axis_index(axis)]
        return x

    def join(self, shards: list[Tensor], dims: Sequence[int]) -> Tensor:
        for size, dim in reversed(list(zip(self.mesh.values(), dims, strict=True))):
            shards = [torch.cat(shards[i : i + size], dim) for i in range(0, len(shards), size)]
        return shards[0]

    def call(self, x: Tensor) -> Tensor:
        axes = tuple(self.mesh)
        return getattr(pmod.fft, self.function)(x, **self.torchs, **self.ours, axis=axes if len(axes) > 1 else axes[0])


def draw(function: str, seed: int, mesh: dict[str, int] | None = None) -> Job:
    """Any shape, sizes, dims, lengths, norm; half of the arguments are left out."""
    numbers = np.random.default_rng([zlib.crc32(function.encode()), seed])

    def integer(low: int, high: int) -> int:
        return int(numbers.integers(low, high + 1))

    def maybe() -> bool:
        return integer(0, 1) == 1

    inverse, real = function[0] == "i", "rfft" in function
    mesh = {"model": integer(2, 4)} if mesh is None else mesh
    count = len(mesh)
    ndim = integer(max(1 if function.endswith("fft") else 2, count), 4)
    shape = [integer(1, 5) for _ in range(ndim)]
    torchs: dict[str, Any] = {}
    dims = [-1] if function.endswith("fft") else [-2, -1] if "2" in function else list(range(-ndim, 0))
    if maybe():
        some = 1 if function.endswith("fft") else 2 if "2" in function else integer(1, ndim)
        dims = [int(d) - ndim for d in numbers.permutation(ndim)[:some]]
        given = tuple(d + ndim if maybe() else d for d in dims)
        torchs["dim"] = given[0] if function.endswith("fft") else given
    if real and inverse and shape[dims[-1]] == 1:
        shape[dims[-1]] = 2
    held = [2 * (shape[d] - 1) if real and inverse and d == dims[-1] else shape[d] for d in dims]
    lengths, modes = held, None
    if maybe():
        modes_too = maybe()
        lengths = [integer(1, 7) for _ in dims]
        if modes_too and inverse:  # the spectrum that is held has to fit
            lengths = [n + integer(0, 3) for n in held]
            modes = tuple(shape[d] if maybe() else None for d in dims)
        torchs["n" if function.endswith("fft") else "s"] = lengths[0] if function.endswith("fft") else tuple(lengths)
    if not inverse and maybe():
        most = [n // 2 + 1 if real and d == dims[-1] else n for n, d in zip(lengths, dims, strict=True)]
        modes = tuple(integer(1, k) if maybe() else None for k in most)
    norm = (None, "backward", "ortho", "forward")[integer(0, 3)]
    if norm is not None or maybe():
        torchs["norm"] = norm
    ours: dict[str, Any] = {}
    if modes is not None:
        ours["modes"] = modes[0] if function.endswith("fft") else modes
    first, last = dims[:count], dims[-count:]
    ins, outs = (last, first) if inverse else (first, last)
    if maybe() or len(dims) < count:
        ins = [int(d) - ndim for d in numbers.permutation(ndim)[:count]]
        ours["in_dim"] = ins[0] if count == 1 else tuple(ins)
        if not set(ins) & set(dims):
            outs = ins
    if maybe() or len(dims) < count:
        outs = [int(d) - ndim for d in numbers.permutation(ndim)[:count]]
        ours["out_dim"] = outs[0] if count == 1 else tuple(outs)
    elif count > 1 and "in_dim" not in ours:
        ours["in_dim"] = tuple(ins)
    sizes = tuple(pmod.split_sizes(shape[d], n) for d, n in zip(ins, mesh.values(), strict=True))
    if maybe():
        sizes = tuple(
            tuple(int(k) for k in numbers.multinomial(shape[d], [1 / n] * n))
            for d, n in zip(ins, mesh.values(), strict=True)
        )
    if maybe():
        ours["sizes"] = sizes[0] if count == 1 else sizes
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.complex128 if inverse or (not real and maybe()) else torch.float64
    x = torch.randn(shape, dtype=dtype, generator=generator)
    return Job(function, x, torchs, ours, tuple(ins), tuple(outs), sizes, mesh)


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b.conj()).real.sum()


def derivatives(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, w: Tensor) -> list[Tensor]:
    """The value, the gradients of Re <y, w> and of a nonlinear function, and of the latter's along v."""
    x = x.detach().requires_grad_()
    y = f(x)
    linear = torch.autograd.grad(dot(y, w), x, retain_graph=True)[0]
    first = torch.autograd.grad(dot(y * y * y, w), x, create_graph=True)[0]
    return [y.detach(), linear, first.detach(), torch.autograd.grad(dot(first, v), x)[0]]


def hold(job: Job, run: Callable[..., list[Any]] = pmod.simulate) -> None:
    """The shards of the ranks, joined, are torch.fft's."""
    generator = torch.Generator().manual_seed(1)
    y = job.whole(job.x)
    v = torch.randn(job.x.shape, dtype=job.x.dtype, generator=generator)
    w = torch.randn(y.shape, dtype=y.dtype, generator=generator)
    expected = derivatives(job.whole, job.x, v, w)
    for x, results in zip(expected, zip(*run(on_rank, job, v, w, **job.mesh), strict=True), strict=True):
        got = job.join(list(results), job.outs if x is expected[0] else job.ins)
        same(got, x, f"{job}")


def on_rank(job: Job, v: Tensor, w: Tensor) -> list[Tensor]:
    shares = [
        held if before == after and before not in job.dims else pmod.split_sizes(w.shape[after], n)  # nothing moves
        for before, after, held, n in zip(job.ins, job.outs, job.sizes, job.mesh.values(), strict=True)
    ]
    x, v, w = job.cut(job.x, job.ins, job.sizes), job.cut(v, job.ins, job.sizes), job.cut(w, job.outs, shares)
    results = derivatives(job.call, x, v, w)
    assert results[0].shape == w.shape, "the share of split_sizes"
    return results


@pytest.mark.parametrize("function", FUNCTIONS)
def test_drawn(function: str) -> None:
    for seed in range(16):
        hold(draw(function, seed))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_pencils(function: str) -> None:
    for seed in range(5):
        hold(draw(function, seed, {"x": 2, "y": 2 + seed % 2}))


# --- every cut ----------------------------------------------------------------------------------------------------

CUTS = [(i, o) for i in (-3, -2, -1) for o in (-3, -2, -1)]


@pytest.mark.parametrize("function", ["fft2", "ifft2", "rfft2", "irfft2"])
@pytest.mark.parametrize("dim", [(-2, -1), (-1, -2)], ids=str)
def test_every_cut(function: str, dim: tuple[int, int]) -> None:
    """From each dim to each, also a batch dim, and against the order of a real transform; more ranks than rows too."""
    for seed, (before, after) in enumerate(CUTS):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 7, 6, dtype=torch.complex128, generator=generator)
        x = x.real if function == "rfft2" else x
        ours = {"in_dim": before, "out_dim": after}
        sizes = (pmod.split_sizes(x.shape[before], 4),)
        hold(Job(function, x, {"dim": dim}, ours, (before,), (after,), sizes, {"model": 4}))
