"""The gradcheck of SPMD: a function of shards against the same function of whole
tensors in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pmod._collectives.objects import gather_json
from pmod._collectives.values import psum
from pmod._core.arguments import check_function, check_tolerance
from pmod._core.marks import mark_varying
from pmod._core.tree import unflatten
from pmod._errors import ArgumentError, coordinates, phrase, quoted
from pmod._mesh.ambient import current_mesh, resolve
from pmod._mesh.axis import named
from pmod._mesh.mesh import Mesh
from pmod._numbers import as_int, as_list
from pmod._run.simulate import simulate
from pmod._shard.spec import P, Specs, check_spec
from pmod._shard.specs import local_slice, whole_shapes, with_specs

Leaf: TypeAlias = tuple[Any, P, str]

TOLERANCE = {
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
}
COARSE = 2e-2  # of dtypes of 16 bits


def assert_matches_serial(
    f: Callable[..., Any],
    serial: Callable[..., Any],
    args: Sequence[Any],
    *,
    in_specs: Specs,
    out_specs: Specs,
    order: int = 2,
    rtol: float | None = None,
    run: Callable[..., Any] = simulate,
    **axis_sizes: int,
) -> None:
    """Assert that a function of shards is the function `serial` of whole tensors:
    value, gradient, second derivative.

    f is a program as every rank runs it, pvary and all: it gets its shards of the whole
    `args`, as in_specs say, and returns shards of what serial returns, as out_specs say
    (`P`, or trees of it, as for `shard_map`). Along an axis that a spec leaves out an
    argument is one value (I), as a parameter is, and so must a result be. With axis
    sizes (``data=2, model=2``) the ranks are made here: run is `pmod.simulate`, or
    `pmod.launch` for processes. Without them all ranks of the ambient mesh call it.
    Differentiated are the arguments that require a gradient; where none does, all of
    floating or complex dtype. order: 2, or 1 to leave out second derivatives, or 0 for
    values only, for which no argument is made to require a gradient: of a function that
    computes its own. rtol: the largest difference allowed, relative to the largest
    element; by default 1e-9 in 64 bits, 1e-4 in 32, 2e-2 in 16.
    Raises: AssertionError on all ranks, with which output or gradient is wrong, on
    which ranks, and by how much.

    >>> w, x = torch.tensor([2.0, 3.0]), torch.arange(6.0).reshape(3, 2)
    >>> def loss(w, x):
    ...     return pmod.psum((x @ pmod.pvary(w, "data")).square().sum(), "data")
    >>> pmod.testing.assert_matches_serial(
    ...     loss, lambda w, x: (x @ w).square().sum(), (w, x),
    ...     in_specs=(pmod.P(), pmod.P("data")), out_specs=pmod.P(), data=2)
    """
    derivatives, listed = as_int(order), as_list(args)
    if derivatives not in (0, 1, 2):
        raise ArgumentError(
            phrase(_NAME, f"order is {quoted(order)}", "Pass 0, 1 or 2 derivatives.")
        )
    if listed is None:
        raise ArgumentError(
            phrase(
                _NAME, f"args is {quoted(args)}", "Pass the arguments of f, in a tuple."
            )
        )
    for name, function in (("f", f), ("serial", serial), ("run", run)):
        check_function(function, _NAME, name)
    if rtol is not None:
        rtol = check_tolerance(rtol, _NAME)
    check = _Check(f, serial, tuple(listed), in_specs, out_specs, derivatives, rtol)
    if axis_sizes:
        run(check, **axis_sizes)
    else:
        check()


class _Check:
    """The check, as each rank runs it."""

    def __init__(
        self,
        f: Any,
        serial: Any,
        args: tuple[Any, ...],
        in_specs: Specs,
        out_specs: Specs,
        order: int,
        rtol: float | None,
    ) -> None:
        self.f, self.serial, self.args = f, serial, args
        self.in_specs, self.out_specs = in_specs, out_specs
        self.order, self.rtol = order, rtol

    def __call__(self) -> None:
        mesh = current_mesh()
        everywhere = resolve(mesh, _NAME)
        whole = with_specs(self.args, self.in_specs, _NAME, "args", everywhere)
        for x, spec, where in whole:
            if isinstance(x, Tensor):
                check_spec(spec, x.shape, mesh, _NAME, where)
        chosen = _differentiated([x for x, _, _ in whole], self.order)
        wholes = [_leaf(x, i in chosen) for i, (x, _, _) in enumerate(whole)]
        shards = [
            _leaf(_shard(x, spec, mesh), i in chosen)
            for i, (x, spec, _) in enumerate(whole)
        ]
        for x, (_, spec, _) in zip(shards, whole, strict=True):
            for name in spec.axes if isinstance(x, Tensor) else ():
                mark_varying(x, mesh[name])  # for `debug`
        result = self.f(*unflatten(self.args, _NAME, everywhere, list(shards)))
        serial = self.serial(*unflatten(self.args, _NAME, everywhere, list(wholes)))
        compared = _Compared(
            mesh, [(shards[i], wholes[i], *whole[i][1:]) for i in chosen], self.rtol
        )
        found = with_specs(result, self.out_specs, _NAME, "output", everywhere)
        expected = with_specs(serial, P(), _NAME, "output", everywhere)
        wrong = [
            f"{what}: {text}"
            for what, text in compared.outputs(found, expected, self.order)
        ]
        said = gather_json(wrong, mesh)
        if not any(said):
            return
        alike: dict[str, list[str]] = {}
        for rank, lines_of_rank in zip(everywhere.ranks, said, strict=True):
            for line in lines_of_rank:
                alike.setdefault(line, []).append(
                    f"rank {rank} {coordinates(mesh.coords_of(rank))}"
                )
        lines = [f"  {line}, on {', '.join(ranks)}" for line, ranks in alike.items()]
        raise AssertionError(
            "\n".join(
                [
                    "the function of shards is not the serial one:",
                    *lines,
                    *compared.hints(),
                ]
            )
        )


_NAME = "testing.assert_matches_serial"

Wrong: TypeAlias = tuple[str, str]
"""What differs, and by how much."""


class _Compared:
    """Values and derivatives of the ranks beside those of the serial function."""

    def __init__(
        self,
        mesh: Mesh,
        arguments: list[tuple[Tensor, Tensor, P, str]],
        rtol: float | None,
    ) -> None:
        self.mesh = mesh
        self.arguments = (
            arguments  # those differentiated: the shard, the whole, its spec, its path
        )
        self.rtol = rtol
        self.first: list[
            tuple[Tensor, Tensor]
        ] = []  # for each of them the gradient here, and the serial one's shard

    def outputs(
        self, found: list[Leaf], expected: list[Leaf], order: int
    ) -> Iterator[Wrong]:
        """What differs of the outputs, then of the derivatives; outputs of other shapes
        are not differentiated.
        """
        if len(found) != len(expected):
            yield "output", f"it has {len(found)} leaves and serial {len(expected)}"
            return
        for (y, _, where), (z, _, path) in zip(found, expected, strict=True):
            if where != path or isinstance(y, Tensor) != isinstance(z, Tensor):
                yield (
                    where,
                    f"it is a {type(y).__name__}, and serial has a {type(z).__name__} at {path}",
                )
                return
            if not isinstance(y, Tensor) and y != z:
                yield where, f"it is {y!r} and serial {z!r}"
        leaves = [leaf for leaf in found if isinstance(leaf[0], Tensor)]
        wholes = [z for z, _, _ in expected if isinstance(z, Tensor)]
        specs: list[P] = []
        for (y, spec, where), z, held in zip(
            leaves, wholes, whole_shapes(leaves, self.mesh, _NAME), strict=True
        ):
            specs.append(P(*spec.entries, sizes=held))
            shape = [
                sum(held[dim]) if dim in held else int(length)
                for dim, length in enumerate(y.shape)
            ]
            if list(z.shape) != shape:
                yield (
                    where,
                    f"the shards make up shape {tuple(shape)} and serial has {tuple(z.shape)}",
                )
                return
            yield from self._differ(where, y, _shard(z, specs[-1], self.mesh), z)
            ranks = psum(int(y.requires_grad), self.mesh)
            if ranks not in (0, self.mesh.size):
                yield (
                    where,
                    f"it requires a gradient on {ranks} of {self.mesh.size} ranks",
                )
                return  # its backward would wait for the others
        yield from self._derivatives([y for y, _, _ in leaves], wholes, specs, order)

    def _derivatives(
        self, ys: list[Tensor], zs: list[Tensor], specs: list[P], order: int
    ) -> Iterator[Wrong]:
        """The gradients of the sum of all elements, each times a number of its own;
        then the same of those.
        """
        shards, wholes = (
            [x for x, _, _, _ in self.arguments],
            [x for _, x, _, _ in self.arguments],
        )
        kinds = ("gradient", "second derivative")[:order]
        for kind in kinds:
            kept = [
                i
                for i, (y, z) in enumerate(zip(ys, zs, strict=True))
                if y.requires_grad or z.requires_grad
            ]
            if not kept:
                return
            numbers = [_numbers(zs[i], i) for i in kept]
            own = [
                _shard(n, specs[i], self.mesh)
                for n, i in zip(numbers, kept, strict=True)
            ]
            more = (
                kind != kinds[-1]
            )  # a compiled function has no derivative of its gradient
            ys = _gradients([ys[i] for i in kept], shards, own, create_graph=more)
            zs = _gradients([zs[i] for i in kept], wholes, numbers, create_graph=more)
            specs = [spec for _, _, spec, _ in self.arguments]
            wanted = [
                _shard(z, spec, self.mesh) for z, spec in zip(zs, specs, strict=True)
            ]
            self.first = self.first or list(zip(ys, wanted, strict=True))
            for y, want, z, (_, _, _, where) in zip(
                ys, wanted, zs, self.arguments, strict=True
            ):
                yield from self._differ(f"{kind} of {where}", y, want, z)

    def _differ(
        self, what: str, got: Tensor, want: Tensor, whole: Tensor
    ) -> Iterator[Wrong]:
        if got.dtype != want.dtype or got.shape != want.shape:
            text = f"it is {got.dtype} of shape {tuple(got.shape)} and serial {want.dtype} of {tuple(want.shape)}"
            yield what, text
        elif self._distance(got, want) > self._allowed(whole):
            off = _off(got, want)
            worst = int(off.argmax())
            place = [
                int(i) for i in torch.unravel_index(torch.tensor(worst), off.shape)
            ]
            a, b = got.reshape(-1)[worst].item(), want.reshape(-1)[worst].item()
            yield (
                what,
                f"off by {off.max().item():.3g} at {place}, where it is {a:.6g} and serial {b:.6g}",
            )

    def _distance(self, got: Tensor, want: Tensor) -> float:
        return _off(got, want).max().item() if want.numel() else 0.0

    def _allowed(self, whole: Tensor) -> float:
        largest = (
            whole.detach().abs().double().nan_to_num(posinf=0).max().item()
            if whole.numel()
            else 0.0
        )
        tolerance = (
            TOLERANCE.get(whole.dtype, COARSE) if self.rtol is None else self.rtol
        )
        return tolerance * (largest or 1.0)

    def hints(self) -> list[str]:
        """What makes a gradient wrong: without pvary the ranks' add up to it, with one
        too many it is n times it.
        """
        out: list[str] = []
        for (_, whole, spec, where), (got, want) in zip(
            self.arguments, self.first, strict=False
        ):
            names = tuple(
                name
                for name, n in self.mesh.shape.items()
                if name not in spec.axes and n > 1
            )
            candidates = (
                [names, *[(name,) for name in names]]
                if len(names) > 1
                else [names]
                if names
                else []
            )
            for along in candidates:
                n, total, over = (
                    self.mesh.axis_size(along),
                    psum(got.detach(), self.mesh[along]),
                    named(along),
                )
                allowed = self._allowed(whole) + 1e-6 * self._distance(
                    want, torch.zeros_like(want)
                )
                if self._distance(got, want) <= allowed or got.shape != want.shape:
                    continue
                if self._distance(total, want) <= allowed:
                    out.append(
                        f"The ranks' gradients of {where} add up to it over {over}: a pvary is missing."
                    )
                elif self._distance(got / n, want) <= allowed:
                    out.append(
                        f"The gradient of {where} is {n} times the serial one: summed twice over {over}."
                    )
        return out


def _off(got: Tensor, want: Tensor) -> Tensor:
    """How far each element is off; NaN where both have it, and equal infinities, are
    not off.
    """
    wide = torch.complex128 if want.is_complex() else torch.float64
    a, b = got.detach().to(wide), want.detach().to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    return (
        (a - b).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(same, 0)
    )


def _differentiated(leaves: list[Any], order: int) -> list[int]:
    """Those that require a gradient; where none does, and something is differentiated,
    all that could.
    """
    smooth = [
        i
        for i, x in enumerate(leaves)
        if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
    ]
    return [i for i in smooth if leaves[i].requires_grad] or (smooth if order else [])


def _leaf(x: Any, differentiated: bool) -> Any:
    return (
        x.detach().clone().requires_grad_(differentiated)
        if isinstance(x, Tensor)
        else x
    )


def _shard(x: Any, spec: P, mesh: Mesh) -> Any:
    return x[local_slice(x.shape, spec, mesh=mesh)] if isinstance(x, Tensor) else x


def _numbers(like: Tensor, seed: int) -> Tensor:
    """The same on all ranks, whatever they drew before."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.complex128 if like.is_complex() else torch.float64
    return torch.randn(like.shape, generator=generator, dtype=dtype).to(
        like.device, like.dtype
    )


def _gradients(
    ys: list[Tensor], xs: list[Tensor], numbers: list[Tensor], *, create_graph: bool
) -> list[Tensor]:
    """Zeros where there is no way from xs to ys."""
    pairs = [(y, n) for y, n in zip(ys, numbers, strict=True) if y.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in xs]
    outputs, cotangents = zip(*pairs, strict=True)
    return list(
        torch.autograd.grad(
            outputs, xs, cotangents, create_graph=create_graph, materialize_grads=True
        )
    )
