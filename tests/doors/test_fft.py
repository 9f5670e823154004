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
from torch.func import grad, jvp, vmap

import pmod
from tests.lib import spmd
from tests.lib.listening import same

Tensor = torch.Tensor
FUNCTIONS = ("fft", "ifft", "rfft", "irfft", "fft2", "ifft2", "rfft2", "irfft2", "fftn", "ifftn", "rfftn", "irfftn")
# what has the shapes and cuts of another
HERMITIAN = {f"{h}fft{end}": f"{other}fft{end}" for h, other in (("h", "ir"), ("ih", "r")) for end in ("", "2", "n")}


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
    called: str = ""  # one of HERMITIAN, if it is that

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
        f, modes = getattr(torch.fft, self.called or self.function), self.ours.get("modes")
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
        f = getattr(pmod.fft, self.called or self.function)
        return f(x, **self.torchs, **self.ours, axis=axes if len(axes) > 1 else axes[0])


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
    for seed in range(10):
        hold(draw(function, seed))


def hermitian(function: str, seed: int, mesh: dict[str, int] | None = None) -> Job:
    return attrs.evolve(draw(HERMITIAN[function], seed, mesh), called=function)


@pytest.mark.parametrize("function", HERMITIAN)
def test_hermitian(function: str) -> None:
    for seed in range(10):
        hold(hermitian(function, seed))
    hold(hermitian(function, 1, {"x": 2, "y": 2}) if function[-1] in "2n" else hermitian(function, 11))
    with pytest.raises(pmod.ArgumentError, match=rf"pmod.fft.{function}\(axis='x'\).*norm is 'other'"):
        pmod.simulate(lambda: getattr(pmod.fft, function)(torch.ones(2, 2), norm="other", axis="x"), x=2)


def test_hermitian_inputs() -> None:
    for function in ("ihfft", "ihfft2"):
        use = function.replace("ih", "i")
        with pytest.raises(pmod.ArgumentError, match=rf"fft.{function}.*x is complex.\nPass x.real, or use {use}."):
            pmod.simulate(lambda f=function: getattr(pmod.fft, f)(torch.ones(2, 2) * 1j, axis="x"), x=2)
    with pytest.raises(pmod.ArgumentError, match=r"pmod.fft.hfft\(axis='x'\).*x is a int"):
        pmod.simulate(lambda: pmod.fft.hfft(3, axis="x"), x=2)


def hermitian_on_processes() -> None:
    for function in HERMITIAN:
        job = hermitian(function, 0, {"x": 2})
        x = job.cut(job.x, job.ins, job.sizes)
        y = job.whole(job.x)
        share = job.sizes[0] if job.ins == job.outs and job.ins[0] not in job.dims else pmod.split_sizes(
            y.shape[job.outs[0]], 2)  # fmt: skip
        same(job.call(x), job.cut(y, job.outs, (share,)), function)


def test_hermitian_on_processes() -> None:
    spmd.launch(hermitian_on_processes, x=2)


# --- the order of modes -------------------------------------------------------------------------------------------

SHIFTS: list[tuple[tuple[int, ...], Any, Any, Any, dict[str, int]]] = [  # shape, dim, in_dim, sizes, mesh
    ((7,), None, None, (3, 4), {"x": 2}),
    ((8,), 0, None, (0, 1, 7), {"x": 3}),
    ((5, 6), None, None, (2, 4), {"x": 2}),
    ((5, 6), (1, 0), None, (3, 2), {"x": 2}),
    ((5, 6), -1, 0, (5, 0), {"x": 2}),
    ((5, 6, 3), (0, 1), (0, 1), ((2, 3), (1, 5)), {"x": 2, "y": 2}),
    ((5, 6, 3), (0, 2), (0, 1), ((2, 3), (1, 5)), {"x": 2, "y": 2}),
    ((1, 4), None, 0, (1, 0, 0), {"x": 3}),
]


def shifts(shape: tuple[int, ...], dim: Any, in_dim: Any, sizes: Any, mesh: dict[str, int]) -> None:
    x = torch.randn(shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    several = len(mesh) > 1
    dims = range(len(shape)) if dim is None else (dim,) if isinstance(dim, int) else dim
    ins = in_dim if several else (list(dims)[-1] if in_dim is None else in_dim,)

    def cut(y: Tensor) -> Tensor:
        for name, at, lengths in zip(mesh, ins, sizes if several else (sizes,), strict=True):
            y = y.split(list(lengths), at)[pmod.axis_index(name)]
        return y

    axis = tuple(mesh) if several else next(iter(mesh))
    for function in ("fftshift", "ifftshift"):
        y = getattr(torch.fft, function)(x, dim)
        mine = cut(x).detach().requires_grad_()
        for told in (sizes, None):
            found = getattr(pmod.fft, function)(mine, dim, axis=axis, in_dim=in_dim, sizes=told)
            assert torch.equal(found, cut(y))
            weights = torch.arange(y.numel(), dtype=torch.float64).view(shape)
            (slope,) = torch.autograd.grad((found.abs().square() * cut(weights)).sum(), mine)
            (whole,) = torch.autograd.grad((y.abs().square() * weights).sum(), x, retain_graph=True)
            same(slope, cut(whole), function)


@pytest.mark.parametrize("case", SHIFTS, ids=str)
def test_shifts(case: Any) -> None:
    pmod.simulate(shifts, *case, **case[-1])


def test_shifts_on_processes() -> None:
    spmd.launch(shifts, *SHIFTS[2], x=2)


def test_modes_of_a_shifted_spectrum() -> None:
    """As older Fourier neural operators keep them: shifted, then the middle of that."""
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).double()
    for k in (1, 4, 5):
        middle = torch.fft.fftshift(torch.fft.fft2(x), -2).narrow(-2, 3 - k // 2, k)

        def kept(k: int = k) -> Tensor:
            modes = pmod.fft.fft2(pmod.shard(x, "x", dim=-1), axis="x", in_dim=-1, out_dim=-2, modes=(k, None))
            return pmod.fft.fftshift(modes, -2, axis="x")

        same(torch.cat(pmod.simulate(kept, x=2)), middle, f"{k} modes")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x: pmod.fft.fftshift(x, 2, axis="x"), "dim is 2 but x has 2 dims"),
        (lambda x: pmod.fft.fftshift(x, (0, -2), axis="x"), "dim is (0, -2).\nName each dim once."),
        (lambda x: pmod.fft.ifftshift(x, (), axis="x"), "dim is ().\nName each dim once."),
        (lambda x: pmod.fft.fftshift(x, in_dim=(0, 1), axis="x"), "in_dim is (0, 1)"),
        (lambda x: pmod.fft.fftshift(x, axis="x", sizes=(1, 1)), "sizes[0] is 1 but x.shape[1] is 3"),
        (lambda x: pmod.fft.fftshift(x[0, 0], axis="x"), "Name each dim once."),
    ],
)
def test_wrong_shifts(call: Any, text: str) -> None:
    with pytest.raises(pmod.ShapeError) as raised:
        pmod.simulate(call, torch.ones(4, 3), x=2)
    assert text in str(raised.value)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_pencils(function: str) -> None:
    for seed in range(3):
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


# --- on real ranks, in transforms, compiled -----------------------------------------------------------------------


def test_real_ranks() -> None:
    for seed, function in enumerate(FUNCTIONS):
        hold(draw(function, seed, {"model": 2}), spmd.launch)


def transforms(job: Job) -> list[Tensor]:
    """vmap, jvp, grad and grad of grad, each of the sharded function."""
    x = job.cut(job.x, job.ins, job.sizes)
    batch = torch.stack([x, x.cos(), x.sin()], 1)
    v = x.cos()

    def S(x: Tensor) -> Tensor:
        return dot(job.call(x), job.call(x)).sin()

    return [vmap(job.call, in_dims=1)(batch), jvp(job.call, (x,), (v,))[1], jvp(grad(S), (x,), (v,))[1],
            vmap(grad(S), in_dims=1, out_dims=1)(batch)]  # fmt: skip


JOBS = {
    "rfft2": Job("rfft2", torch.empty(5, 7), {"s": (6, 7)}, {"modes": (3, 3)}, (-2,), (-1,), ((3, 2),), {"model": 2}),
    "irfft2": Job("irfft2", torch.empty(7, 4), {"s": (9, 7)}, {"modes": (7, 4)}, (-1,), (-2,), ((2, 2),), {"model": 2}),
    "fft": Job("fft", torch.empty(5, 3), {"dim": 0, "norm": "ortho"}, {}, (-2,), (-2,), ((3, 2),), {"model": 2}),
    "rfft": Job("rfft", torch.empty(5), {}, {}, (-1,), (-1,), ((3, 2),), {"model": 2}),
    "irfftn": Job("irfftn", torch.empty(4, 5), {"dim": (1, 0)}, {}, (-2,), (-1,), ((1, 3),), {"model": 2}),
}  # fmt: skip


def prepared(name: str, dtype: torch.dtype = torch.float64) -> Job:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(JOBS[name].x.shape, dtype=dtype, generator=generator)
    ours = {**JOBS[name].ours, "sizes": JOBS[name].sizes[0]}
    return attrs.evolve(JOBS[name], x=x, ours=ours)


@pytest.mark.parametrize("name", JOBS)
def test_transforms(name: str) -> None:
    """Of a loss that each rank makes of its own share, and that is all ranks' sum."""
    job = prepared(name)

    def S(x: Tensor) -> Tensor:
        shares = job.whole(x).split(list(pmod.split_sizes(length, 2)), job.outs[0])
        return sum((dot(y, y).sin() for y in shares), torch.zeros(()))

    length = job.whole(job.x).shape[job.outs[0]]
    batch = torch.stack([job.x, job.x.cos(), job.x.sin()])
    v = job.x.cos()
    expected = [
        torch.stack([job.whole(x) for x in batch]),
        job.whole(v),
        jvp(grad(S), (job.x,), (v,))[1],
        torch.stack([grad(S)(x) for x in batch]),
    ]
    results: list[Any] = [list(column) for column in zip(*pmod.simulate(transforms, job, model=2), strict=True)]
    results[3] = [x.movedim(1, 0) for x in results[3]]
    for got, x, dims in zip(results, expected, (job.outs, job.outs, job.ins, job.ins), strict=True):
        same(job.join(got, dims), x, name)


def compiled_on_rank(jobs: list[Job]) -> None:
    torch._dynamo.reset()
    for job in jobs:
        x = job.cut(job.x, job.ins, job.sizes).requires_grad_()
        compiled = torch.compile(job.call, fullgraph=True, backend="aot_eager")
        y, got = job.call(x), compiled(x)
        same(got, y.detach(), f"{job}: value")
        gradients = [torch.autograd.grad(dot(z * z, z), x)[0] for z in (got, y)]
        same(gradients[0], gradients[1], f"{job}: gradient")
    torch._dynamo.reset()
    x, v = x.detach(), x.detach().cos()

    def inside() -> list[Tensor]:
        return [jvp(job.call, (x,), (v,))[1], vmap(grad(lambda x: dot(job.call(x), job.call(x)).sin()))(x[None])]

    for z, e in zip(torch.compile(inside, fullgraph=True, backend="aot_eager")(), inside(), strict=True):
        same(z, e, f"{job}: inside")
    unsaid = attrs.evolve(job, ours={})
    with pytest.raises(Exception, match=r"fft.irfft2.*sizes are left out under torch.compile") as raised:
        torch.compile(unsaid.call, fullgraph=True, backend="aot_eager", dynamic=True)(x)
    assert "Pass them" in str(raised.value)

    def of_any_length(x: Tensor) -> Tensor:
        return pmod.fft.rfft2(x, axis="model", sizes=(x.shape[0], x.shape[0]))

    compiled = torch.compile(of_any_length, fullgraph=True, backend="aot_eager")
    for n in (2, 5, 4):  # from the second on torch takes lengths for variables
        x = torch.rand(n, n + 2, dtype=torch.float64)
        same(compiled(x), of_any_length(x), f"of length {n}")


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled() -> None:
    spmd.launch(compiled_on_rank, [prepared(name) for name in ("rfft", "irfft2")], model=2)


def compiled_pencils_on_rank(x: Tensor) -> tuple[Tensor, Tensor]:
    torch._dynamo.reset()
    mesh = pmod.current_mesh()
    sizes = pmod.split_sizes(x.shape[0], 2), pmod.split_sizes(x.shape[1], 2)

    def energy(x: Tensor) -> Tensor:
        pencil = pmod.shard(pmod.shard(x, "x", dim=0), "y", dim=1)
        modes = pmod.fft.rfftn(pencil, axis=mesh["x", "y"], in_dim=(0, 1), sizes=sizes)
        return pmod.psum(modes.abs().pow(3).sum(), ("x", "y"))

    value = torch.compile(energy, fullgraph=True, backend="aot_eager")(x.requires_grad_())
    return value.detach(), torch.autograd.grad(value, x)[0]


def test_compiled_pencils() -> None:
    x = torch.randn(5, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = x.clone().requires_grad_()
    energy = torch.fft.rfftn(whole).abs().pow(3).sum()
    (gradient,) = torch.autograd.grad(energy, whole)
    for value, got in spmd.launch(compiled_pencils_on_rank, x, x=2, y=2):
        same(value, energy.detach(), "value")
        same(got, gradient, "gradient")


# --- what is sent -------------------------------------------------------------------------------------------------


def sent(f: Callable[[], Any]) -> list[tuple[str, str, int]]:
    with pmod.trace() as t:
        f()
    return [(event.function, event.row, event.nbytes) for event in t.events]


def traffic_on_rank() -> list[list[tuple[str, str, int]]]:
    """(function, row, bytes) of the messages of some calls, each from rows of a whole (8, 10) in shares of 3, 3, 2."""
    axis, sizes = "model", pmod.split_sizes(8, 3)
    x = torch.ones(8, 10, dtype=torch.float64).split(list(sizes))[pmod.axis_index("model")].requires_grad_()
    y = pmod.fft.rfft2(x, axis=axis, sizes=sizes)
    few = pmod.fft.rfft2(x, axis=axis, sizes=sizes, modes=(5, 3))
    z = torch.ones(8, (4, 4, 2)[pmod.axis_index("model")], dtype=torch.float64)
    columns = pmod.split_sizes(6, 3)
    return [
        sent(lambda: pmod.fft.rfft2(x, axis=axis, sizes=sizes)),
        sent(lambda: pmod.fft.rfft2(x, axis=axis)),
        sent(lambda: pmod.fft.rfft2(x, axis=axis, sizes=sizes, modes=(5, 3))),
        sent(lambda: pmod.fft.rfft2(x, axis=axis, sizes=sizes).abs().sum().backward()),
        sent(lambda: pmod.fft.irfft2(y, s=(8, 10), axis=axis, sizes=columns)),
        sent(lambda: pmod.fft.irfft2(few, s=(8, 10), axis=axis, sizes=(1, 1, 1), modes=(5, 3))),
        sent(lambda: pmod.fft.rfft2(x, axis=axis, sizes=sizes, out_dim=0)),
        sent(lambda: pmod.fft.rfft2(z, axis=axis, sizes=(4, 4, 2), in_dim=1, out_dim=1)),
        sent(lambda: pmod.fft.rfft(x, axis=axis, in_dim=0)),
        sent(lambda: pmod.fft.rfft(x[:, 0], axis=axis, sizes=sizes)),
    ]


def test_what_is_sent() -> None:
    """A complex number has 16 bytes; a rank keeps its own part."""
    rows, half, low, z = (3, 3, 2), (2, 2, 2), (1, 1, 1), (4, 4, 2)
    for rank, events in enumerate(pmod.simulate(traffic_on_rank, model=3)):
        there, kept = 16 * rows[rank] * (6 - half[rank]), 16 * rows[rank] * (3 - low[rank])
        back = 16 * half[rank] * (8 - rows[rank])
        lengths = ("rfft2", "all_to_all", 2 * 8 * 8)
        # all of a column of modes, and from there the rows of the others
        assert events[0] == [("rfft2", "all_to_all", there)]
        assert events[1] == [lengths, ("rfft2", "all_to_all", there)]
        assert events[2] == [("rfft2", "all_to_all", kept)]
        assert events[3] == [("rfft2", "all_to_all", there), ("the backward of rfft2", "all_to_all", back)]
        assert events[4] == [("irfft2", "all_to_all", back)]
        assert events[5] == [("irfft2", "all_to_all", 16 * low[rank] * (8 - rows[rank]))]
        assert events[6] == [("rfft2", "all_to_all", there), ("rfft2", "all_to_all", back)]
        # where the real dim is cut it travels as it is, and back as half a spectrum
        real, complex_ = 8 * z[rank] * (8 - rows[rank]), 16 * rows[rank] * (6 - half[rank])
        assert events[7] == [("rfft2", "all_to_all", real), ("rfft2", "all_to_all", complex_)]
        assert events[8] == []
        # of one dim: all gather the whole, as real numbers, and cut what they need out of its spectrum
        assert [event for event in events[9] if event[2]] == [("rfft", "unshard", 2 * 8 * rows[rank])]


def test_real_transforms_come_first_and_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, tuple[int, ...]]] = []

    def noting(name: str, f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(x: Tensor, *args: Any) -> Tensor:
            calls.append((name, tuple(x.shape)))
            return f(x, *args)

        return noted

    for name in ("fft", "ifft", "rfft", "irfft"):
        monkeypatch.setattr(torch.fft, name, noting(name, getattr(torch.fft, name)))

    def on_rank() -> None:
        modes = pmod.fft.rfft2(torch.ones(3, 10), axis="model")
        pmod.fft.irfft2(modes, axis="model")

    pmod.simulate(on_rank, model=2)
    assert sorted(calls) == sorted(2 * [("rfft", (3, 10)), ("fft", (6, 3)), ("ifft", (6, 3)), ("irfft", (3, 6))])


def pencils_on_rank() -> list[tuple[str, str, int]]:
    x = torch.ones(2, 3, 6, dtype=torch.float64)  # of (4, 6, 6) on 2 x 2 ranks
    sizes = ((2, 2), (3, 3))
    both = pmod.current_mesh()["x", "y"]  # as good as ("x", "y")
    return sent(lambda: pmod.fft.rfftn(x, axis=both, in_dim=(0, 1), sizes=sizes))


def test_pencils_send_one_message_along_each_axis() -> None:
    there = [("rfftn", "all_to_all", 16 * 2 * 3 * 2), ("rfftn", "all_to_all", 16 * 2 * 3 * 2)]
    last = [("rfftn", "all_to_all", 16 * 2 * 3 * 2), ("rfftn", "all_to_all", 16 * 2 * 3 * 2)]
    assert pmod.simulate(pencils_on_rank, x=2, y=2) == [there, last, there, last]


def alone_on_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, generator=generator)
    for function in FUNCTIONS:
        for y in (x, x.double()):
            with pmod.trace() as t:
                got = getattr(pmod.fft, function)(y, axis="model")
            assert not t.events
            torch.testing.assert_close(got, getattr(torch.fft, function)(y), rtol=0, atol=0)
    long = torch.randn(1009, 3, generator=generator)
    one = pmod.fft.fftn(long, dim=(0,), axis="model")
    torch.testing.assert_close(one, torch.fft.fftn(long, dim=(0,)), rtol=0, atol=0)


def test_one_rank_is_torch_to_the_bit() -> None:
    with pmod.set_mesh(pmod.make_mesh(model=1, topology=pmod.Topology(rank=0, world_size=1))):
        alone_on_rank()


# --- dtypes, nothing, frequencies ---------------------------------------------------------------------------------


def dtypes_on_rank() -> None:
    for dtype in (torch.float32, torch.float64, torch.complex64, torch.int64, torch.bool):
        for rows in (5, 1):  # with one row all ranks but the first have nothing
            x = torch.arange(3 * rows).view(rows, 3).to(dtype)
            functions = ("fft2", "ifft2", "irfft2") if dtype.is_complex else ("fft2", "ifft2", "irfft2", "rfft2")
            for function in functions:
                expected = getattr(torch.fft, function)(x)
                got = getattr(pmod.fft, function)(pmod.shard(x, "model"), axis="model", in_dim=0, out_dim=1)
                torch.testing.assert_close(got, pmod.shard(expected, "model", dim=1))
    none = torch.ones(0, 2, 4, requires_grad=True)  # an empty batch, which torch.fft itself refuses with MKL
    y = pmod.fft.rfft2(none, axis="model")
    assert (y.dtype, y.shape) == (torch.complex64, (0, 6, 1))
    z = pmod.fft.irfft2(y, axis="model")
    assert (z.dtype, z.shape) == (torch.float32, (0, 2, 4))
    z.sum().backward()
    assert none.grad is not None and none.grad.shape == none.shape


def test_dtypes_and_nothing() -> None:
    pmod.simulate(dtypes_on_rank, model=3)


def frequencies_on_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(5, 6, dtype=torch.float64, generator=generator)
    x = pmod.shard(signal, "model")
    across = pmod.fft.rfftfreq(6, 1 / 6, axis="model", dtype=torch.float64)
    down = pmod.fft.fftfreq(5, 1 / 5, dtype=torch.float64)
    modes = pmod.fft.rfft2(x, axis="model")
    slope = pmod.fft.irfft2(2j * torch.pi * across * modes, s=(5, 6), axis="model")
    whole = torch.fft.irfft2(2j * torch.pi * torch.arange(4.0, dtype=torch.float64) * torch.fft.rfft2(signal), s=(5, 6))
    same(slope, pmod.shard(whole, "model"), "a derivative across the columns")
    same(down, torch.fft.fftfreq(5, 1 / 5, dtype=torch.float64), "without an axis")
    some = pmod.fft.fftfreq(8, 1 / 8, axis="model", modes=5, sizes=(1, 4))
    assert some.tolist() == ([0.0] if pmod.axis_index("model") == 0 else [1.0, 2.0, -2.0, -1.0])
    assert pmod.fft.rfftfreq(8, 1 / 8, axis="model", modes=3).tolist() == [[0.0, 1.0], [2.0]][pmod.axis_index("model")]


def test_frequencies() -> None:
    pmod.simulate(frequencies_on_rank, model=2)


def started_on_rank() -> None:
    x = pmod.shard(torch.arange(12.0).view(4, 3), "model").requires_grad_()
    y = pmod.start(pmod.fft.rfft2, x, axis="model").wait()
    same(y, pmod.fft.rfft2(x.detach(), axis="model"), "started")
    with pmod.debug():
        z = pmod.fft.irfft2(y, s=(4, 3), axis="model")
        z.sum().backward()
    same(z, x.detach(), "there and back", rtol=1e-6, atol=1e-6)
    same(x.grad, torch.ones(2, 3), "the gradient", rtol=1e-6, atol=1e-6)


def test_started_and_debugged() -> None:
    pmod.simulate(started_on_rank, model=2)


# --- an FNO's layer -----------------------------------------------------------------------------------------------


def fno_on_rank(field: Tensor, weight: Tensor) -> Tensor:
    """The spectral convolution of pmod.demo.fno, in three lines."""
    sizes, few = pmod.split_sizes(9, 3), (4, 3)
    x = pmod.fft.rfft2(pmod.shard(field, "model", dim=-2), axis="model", sizes=sizes, modes=few)
    x = torch.einsum("bixy,ioxy->boxy", x, pmod.shard(weight, "model", dim=-1))
    return pmod.fft.irfft2(x, s=(9, 8), axis="model", sizes=pmod.split_sizes(3, 3), modes=few)


def test_an_fno_keeps_its_lowest_modes() -> None:
    generator = torch.Generator().manual_seed(0)
    field = torch.randn(2, 3, 9, 8, dtype=torch.float64, generator=generator)
    weight = torch.randn(3, 3, 4, 3, dtype=torch.complex128, generator=generator)
    kept = [0, 1, -2, -1]
    low = torch.einsum("bixy,ioxy->boxy", torch.fft.rfft2(field)[..., kept, :3], weight)
    padded = torch.zeros(2, 3, 9, 5, dtype=torch.complex128)
    padded[..., kept, :3] = low
    expected = torch.fft.irfft2(padded, s=(9, 8))
    same(torch.cat(pmod.simulate(fno_on_rank, field, weight, model=3), -2), expected, "an FNO's layer")


# --- what the ancestor's users met with ---------------------------------------------------------------------------


def interior_modes_on_rank() -> None:
    """x = [a, b, c] of one row to 4 points: d x[0] / d (a, b, c) = (1, 2, 1) / 4, interior modes twice."""
    index = pmod.axis_index("model")
    modes = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.complex128).split([2, 1], -1)[index].clone().requires_grad_()
    y = pmod.fft.irfft2(modes, axis="model")
    assert y.shape == (1 - index, 4)
    y[:, 0].sum().backward()
    same(modes.grad, torch.tensor([[[0.25 + 0j, 0.5]], [[0.25 + 0j]]][index], dtype=torch.complex128), "gradient")


def test_15_irfft2_works_and_counts_interior_modes_twice() -> None:
    pmod.simulate(interior_modes_on_rank, model=2)


@pytest.mark.parametrize("norm", ["backward", "ortho", "forward"])
def test_16_the_gradient_of_rfft2_in_every_norm(norm: str) -> None:
    """d |X[0, 0]| / dx is the scale of the norm; s pads (2, 4) to (4, 6), in shape and in scale."""
    scale = {"backward": 1.0, "ortho": 24**-0.5, "forward": 1 / 24}[norm]

    def on_rank() -> None:
        x = torch.ones(1, 4, dtype=torch.float64, requires_grad=True)
        y = pmod.fft.rfft2(x, s=(4, 6), norm=norm, axis="model")
        assert y.shape == (4, 2)
        (y[0, 0].real * (pmod.axis_index("model") == 0)).backward()
        same(x.grad, torch.full((1, 4), scale, dtype=torch.float64), "gradient")

    pmod.simulate(on_rank, model=2)


# --- what is refused ----------------------------------------------------------------------------------------------

X = torch.ones(2, 3, 4)
Z = torch.ones(2, 3, dtype=torch.complex64)
REFUSED: list[tuple[Callable[..., Any], Tensor, dict[str, Any], type[Exception], str]] = [
    (pmod.fft.rfft2, X, {"dim": (0, 0)}, pmod.ShapeError, "dim is (0, 0).\nPass one dim or more, each once."),
    (pmod.fft.rfft2, X, {"dim": ()}, pmod.ShapeError, "dim is ().\nPass one dim or more, each once."),
    (pmod.fft.rfft2, X, {"dim": (0, 3)}, pmod.ShapeError, "dim is 3 but x has 3 dims.\nPass dim from -3 to 2."),
    (pmod.fft.fft2, X[0, 0], {}, pmod.ShapeError, "dim is -2 but x has 1 dims.\nPass dim from -1 to 0."),
    (pmod.fft.fft2, X, {"dim": (0, "a")}, pmod.ShapeError, "dim is 'a', a str.\nPass an int."),
    (pmod.fft.rfft2, X, {"s": (3,)}, pmod.ShapeError, "s is (3,) and dim has 2 dims.\nPass a length for each dim."),
    (pmod.fft.rfft2, X, {"s": (3, 0)}, pmod.ShapeError,
     "the signal has 0 points along dim -1.\nPass s of 1 or more."),
    (pmod.fft.fft, X, {"n": -1}, pmod.ShapeError, "the signal has -1 points along dim -1.\nPass n of 1 or more."),
    (pmod.fft.fft, X, {"n": 2.5}, pmod.ShapeError, "n holds 2.5, a float.\nPass ints."),
    (pmod.fft.irfft, X[..., :1], {"in_dim": 0}, pmod.ShapeError,
     "the signal has 0 points along dim -1.\nPass n of 1 or more."),
    (pmod.fft.rfft2, X, {"in_dim": 5}, pmod.ShapeError, "in_dim is 5 but x has 3 dims.\nPass in_dim from -3 to 2."),
    (pmod.fft.rfft2, X, {"out_dim": 5}, pmod.ShapeError, "out_dim is 5 but x has 3 dims.\nPass out_dim from -3 to 2."),
    (pmod.fft.rfft2, X, {"in_dim": (0, 1)}, pmod.ShapeError,
     "in_dim is (0, 1).\nPass 1 of them, each once: a dim per axis."),
    (pmod.fft.rfft2, X, {"sizes": (3, 3, 3)}, pmod.ShapeError,
     "sizes is (3, 3, 3).\nPass 2 ints, one per rank of the axis."),
    (pmod.fft.rfft2, X, {"sizes": (2, 3)}, pmod.ShapeError,
     "sizes[0] is 2 but x.shape[1] is 3.\nPass sizes=(3, 3), or leave sizes out to exchange them."),
    (pmod.fft.rfft2, X, {"modes": (2, 4)}, pmod.ShapeError, "modes is (2, 4) and dim -1 has 3.\nPass from 1 to 3."),
    (pmod.fft.rfft2, X, {"modes": (7, 2), "sizes": (3, 3)}, pmod.ShapeError,
     "modes is (7, 2) and dim -2 has 6.\nPass from 1 to 6."),
    (pmod.fft.rfft2, X, {"modes": 3}, pmod.ShapeError,
     "modes is 3 and dim has 2 dims.\nPass one for each dim, or None."),
    (pmod.fft.irfft2, X, {"modes": (3, 3)}, pmod.ShapeError,
     "modes is (3, 3) without the length of the signal.\nPass s as well."),
    (pmod.fft.irfft2, X, {"modes": (2, None), "s": (9, 9)}, pmod.ShapeError,
     "modes is (2, None) and x has 3 along dim -2.\nPass the number that x has."),
    (pmod.fft.rfft2, X, {"norm": "full"}, pmod.ArgumentError,
     "norm is 'full'.\nPass 'backward', 'ortho' or 'forward'."),
    (pmod.fft.rfft2, Z, {}, pmod.ArgumentError, "x is complex.\nPass x.real, or use fft2."),
    (pmod.fft.fft2, X.half(), {}, pmod.ArgumentError, "x is torch.float16.\nPass x.float()."),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refused(number: int) -> None:
    """Before anything is sent: by a rank that is alone with its mistake, and where it is."""
    f, x, kwargs, kind, text = REFUSED[number]

    def on_rank() -> None:
        if pmod.axis_index("model") == 0:
            with pytest.raises(kind) as raised:
                f(x, **kwargs, axis="model")
            assert str(raised.value) == f"pmod.fft.{f.__name__}(axis='model') at (model=0): {text}"

    pmod.simulate(on_rank, model=2)


def test_refused_over_several_axes() -> None:
    def on_rank() -> None:
        for ours in ({"in_dim": (0, 1, 2)}, {"in_dim": (0, 0)}, {"in_dim": (0, 1), "sizes": ((2, 2),)}):
            with pytest.raises(pmod.ShapeError, match="Pass 2 "):
                pmod.fft.fftn(X, axis=("x", "y"), **ours)
        with pytest.raises(pmod.ShapeError, match="Pass in_dim and out_dim, a dim per axis"):
            pmod.fft.fft(X, axis=("x", "y"), in_dim=(0, 2))
        with pytest.raises(pmod.ShapeError, match="modes is 5 and there are 4"):
            pmod.fft.fftfreq(4, axis="x", modes=5)
        with pytest.raises(pmod.ShapeError, match=r"add up to 5 but x\.shape"):
            pmod.fft.rfftfreq(4, axis="x", sizes=(2, 3))

    pmod.simulate(on_rank, x=2, y=2)
