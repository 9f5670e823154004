"""A whole field beside its blocks: what domain_parallel gives, held against one process to second order."""

# pyright: standard

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import pmod
from pmod import P

Tensor = torch.Tensor


class Cutting(NamedTuple):
    """A mesh, and how dims of a field are cut over it: {dim: (axis, sizes)}."""

    mesh: dict[str, int]
    dims: dict[int, tuple[str, tuple[int, ...]]]

    @property
    def spec(self) -> P:
        last = max(self.dims)
        return P(*[self.dims[d][0] if d in self.dims else None for d in range(last + 1)])

    @property
    def sizes(self) -> dict[int, tuple[int, ...]]:
        return {d: sizes for d, (_, sizes) in self.dims.items()}

    def block(self, x: Tensor) -> Tensor:
        for d, (axis, sizes) in self.dims.items():
            x = x.split(list(sizes), d)[pmod.axis_index(axis)]
        return x.detach().clone().requires_grad_(x.requires_grad)


def cuttings(rows: int, columns: int, dims: tuple[int, int] = (2, 3)) -> dict[str, Cutting]:
    """Ways to cut a field of so many rows and columns: uneven, with empty blocks, over two axes."""
    first, second = dims
    rest = rows - rows // 4
    return {
        "uneven": Cutting({"lat": 2}, {first: ("lat", (rows // 4, rest))}),
        "empty": Cutting({"lat": 3}, {first: ("lat", (rows - 1, 0, 1))}),
        "both": Cutting({"lat": 2, "lon": 2}, {
            first: ("lat", pmod.split_sizes(rows, 2)), second: ("lon", (columns // 3, columns - columns // 3))}),
        "empty both": Cutting({"lat": 2, "lon": 2}, {
            first: ("lat", (rows, 0)), second: ("lon", (columns // 3, columns - columns // 3))}),
    }  # fmt: skip


def joined(y: Tensor, cut: P) -> Tensor:
    """The whole of a result, on every rank."""
    for d, entry in enumerate(cut.entries):
        if entry is not None:
            y = pmod.unshard(y, entry, dim=d, sizes=dict(cut.sizes)[d])
    return y


def number(y: Tensor) -> Tensor:
    """A number of a result, to which each element adds in its own way."""
    if y.is_complex():
        y = torch.view_as_real(y)
    weight = torch.linspace(-1, 1, max(y.numel(), 1), dtype=y.dtype).reshape(y.shape)
    return (y * weight).sum() + y.square().sum() / 7


def everything(
    f: Callable[[Any], Any], x: Any, params: list[Any], total: Callable[[Any], Any], order: int
) -> list[Any]:
    """The value, its gradients, and (order 2) the gradient of their norm: to x and parameters."""
    y, loss = f(x)
    if not loss.requires_grad:
        return [y]
    of = [x, *params]
    first = torch.autograd.grad(loss, of, create_graph=order > 1, allow_unused=True)
    if order == 1:
        return [y, *first]
    squares = [total(g) if i == 0 else g.abs().square().sum() for i, g in enumerate(first) if g is not None]
    norm = torch.stack(squares).sum()
    second: Any = [None] * len(of)
    if norm.requires_grad:
        second = torch.autograd.grad(norm, of, allow_unused=True)
    return [y, *first, *second]


def whole_of(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        y = f(x)
        floating = y.is_floating_point() or y.is_complex()
        return y, number(y) if floating else y.double().sum()

    return run


def held_to(
    f: Callable[[Any], Any], x: Tensor, cutting: Cutting, params: list[Any], *, rtol: float = 1e-10, order: int = 2
) -> None:
    """In a rank: f of blocks is f of the whole, in value, gradients and second derivatives."""
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    wanted = everything(whole_of(f), x, params, lambda g: g.abs().square().sum(), order)
    net = pmod.domain_parallel(whole_of(f), cutting.spec, sizes=cutting.sizes)
    ours, names = cutting.block(x), tuple(cutting.mesh)
    found = everything(net, ours, params, lambda g: pmod.psum(g.abs().square().sum(), names), order)
    assert len(found) == len(wanted)
    given, out = pmod.cut_of(ours), pmod.cut_of(found[0])
    # y, then x and the parameters, twice
    at_x = {1, 2 + len(params)}
    for i, (y, expected) in enumerate(zip(found, wanted, strict=True)):
        y, expected = [z if z is None else z.detach() for z in (y, expected)]
        if y is None or expected is None:
            # a derivative that is nowhere used is left out or zero
            rest = expected if y is None else y
            assert rest is None or not rest.abs().max(), i
            continue
        spec = out if i == 0 else given if i in at_x else P()
        y = joined(y, spec)
        assert y.shape == expected.shape, (i, y.shape, expected.shape)
        if expected.numel():
            scale = expected.abs().max().double().clamp(min=1)
            assert ((y - expected).abs().max() / scale).item() < rtol, (i, y, expected)


def on_all(f: Callable[..., Any], cutting: Cutting, *args: Any) -> list[Any]:
    """Run f(*args) on simulated ranks of a cutting's mesh."""
    return pmod.simulate(functools.partial(f, *args), **cutting.mesh)
