"""The gradcheck of SPMD: a function of shards against one of whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from attrs import frozen
from torch import Tensor

from pmod._collectives.objects import gather_json
from pmod._collectives.values import psum
from pmod._core.arguments import as_int, as_list, check_function, check_tolerance
from pmod._core.marks import mark_varying
from pmod._core.tree import unflatten
from pmod._errors import ArgumentError, coordinates, phrase, quoted
from pmod._mesh.ambient import current_mesh, resolve
from pmod._mesh.axis import Axis, named
from pmod._mesh.mesh import Mesh
from pmod._run.simulate import simulate
from pmod._shard.reading import local_slice
from pmod._shard.spec import P, Specs, check_spec
from pmod._shard.specs import whole_shapes, with_specs

Leaf: TypeAlias = tuple[object, P, str]
"""A leaf of the arguments or of a result, with its spec and its path."""

Wrong: TypeAlias = tuple[str, str]
"""What differs, and by how much."""

TOLERANCE = {
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
}
# of dtypes of 16 bits
COARSE = 2e-2

_NAME = "testing.assert_matches_serial"


def assert_matches_serial(
    f: Callable[..., object],
    serial: Callable[..., object],
    args: Sequence[object],
    *,
    in_specs: Specs,
    out_specs: Specs,
    order: int = 2,
    rtol: float | None = None,
    run: Callable[..., object] = simulate,
    **axis_sizes: int,
) -> None:
    """Assert that a function of shards equals the function `serial` of whole tensors.

    Compared are values, gradients and second derivatives.

    f is a program as every rank runs it, with its calls of pvary. It gets its shards of
    the whole `args`, as in_specs say, and returns shards of what serial returns, as
    out_specs say (`P`, or trees of it, as for `shard_map`). Along an axis that a spec
    leaves out an argument is one value (I), as a parameter is, and so must a result be.
    With axis sizes (``data=2, model=2``) the ranks are made here: run is
    `pmod.simulate`, or `pmod.launch` for processes. Without them all ranks of the
    ambient mesh call it.
    Derivatives are taken with respect to the arguments that require a gradient. If none
    does, all floating-point and complex arguments are used.

    order: 2, or 1 to leave out second derivatives, or 0 for values only. With 0 no
    argument is made to require a gradient, for functions that compute their own. rtol:
    the largest difference allowed, relative to the largest element; by default 1e-9 in
    64 bits, 1e-4 in 32, 2e-2 in 16.
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
        given = f"order is {quoted(order)}"
        raise ArgumentError(phrase(_NAME, given, "Pass 0, 1 or 2 derivatives."))
    if listed is None:
        given = f"args is {quoted(args)}"
        right = "Pass the arguments of f, in a tuple."
        raise ArgumentError(phrase(_NAME, given, right))
    for name, function in (("f", f), ("serial", serial), ("run", run)):
        check_function(function, _NAME, name)
    if rtol is not None:
        rtol = check_tolerance(rtol, _NAME)
    check = _Check(f, serial, tuple(listed), in_specs, out_specs, derivatives, rtol)
    if axis_sizes:
        run(check, **axis_sizes)
    else:
        check()


class _Argument(NamedTuple):
    """An argument that is a tensor."""

    shard: Tensor
    whole: Tensor
    spec: P
    path: str


class _Pair(NamedTuple):
    """An output, or a derivative: this rank's shard of it, and the serial one."""

    shard: Tensor
    whole: Tensor
    spec: P

    @property
    def requires_grad(self) -> bool:
        # one of them alone is an error that its gradients are to show
        return self.shard.requires_grad or self.whole.requires_grad


@frozen(eq=False)
class _Check:
    """The check, as each rank runs it."""

    f: Callable[..., object]
    serial: Callable[..., object]
    args: tuple[object, ...]
    in_specs: Specs
    out_specs: Specs
    order: int
    rtol: float | None

    def __call__(self) -> None:
        mesh = current_mesh()
        everywhere = resolve(mesh, _NAME)
        leaves = with_specs(self.args, self.in_specs, _NAME, "args", everywhere)
        chosen = _differentiated([x for x, _, _ in leaves], self.order)
        arguments = _arguments(leaves, chosen, mesh)
        shards: list[object] = []
        wholes: list[object] = []
        for i, (x, _, _) in enumerate(leaves):
            tensor = arguments.get(i)
            shards.append(x if tensor is None else tensor.shard)
            wholes.append(x if tensor is None else tensor.whole)
        result = self.f(*unflatten(self.args, _NAME, everywhere, shards))
        serial = self.serial(*unflatten(self.args, _NAME, everywhere, wholes))
        compared = _Compared(mesh, [arguments[i] for i in chosen], self.rtol)
        found = with_specs(result, self.out_specs, _NAME, "output", everywhere)
        expected = with_specs(serial, P(), _NAME, "output", everywhere)
        wrong: list[str] = []
        for what, text in compared.outputs(found, expected, self.order):
            wrong.append(f"{what}: {text}")
        # all ranks raise where one does, so that none waits for it in what comes next
        said = gather_json(wrong, mesh)
        if not any(said):
            return
        lines = ["the function of shards is not the serial one:"]
        lines += _by_rank(said, everywhere, mesh)
        raise AssertionError("\n".join([*lines, *compared.hints()]))


def _arguments(
    leaves: Sequence[Leaf], chosen: Sequence[int], mesh: Mesh
) -> dict[int, _Argument]:
    """Return the leaves that are tensors, by their place: each a leaf of its own graph."""
    arguments: dict[int, _Argument] = {}
    for i, (x, spec, path) in enumerate(leaves):
        if not isinstance(x, Tensor):
            continue
        check_spec(spec, x.shape, mesh, _NAME, path)
        whole = x.detach().clone().requires_grad_(i in chosen)
        shard = _shard(x, spec, mesh).detach().clone().requires_grad_(i in chosen)
        # no collective has made this shard: without a mark `debug` takes it for invariant
        for name in spec.axes:
            mark_varying(shard, mesh[name])
        arguments[i] = _Argument(shard, whole, spec, path)
    return arguments


def _by_rank(said: Sequence[list[str]], everywhere: Axis, mesh: Mesh) -> Iterator[str]:
    """Yield what the ranks found, each line once, with the ranks that found it."""
    ranks_of: dict[str, list[str]] = {}
    for rank, lines in zip(everywhere.ranks, said, strict=True):
        for line in lines:
            ranks = ranks_of.setdefault(line, [])
            ranks.append(f"rank {rank} {coordinates(mesh.coords_of(rank))}")
    for line, ranks in ranks_of.items():
        yield f"  {line}, on {', '.join(ranks)}"


class _Compared:
    """Values and derivatives of the ranks beside those of the serial function."""

    def __init__(
        self, mesh: Mesh, arguments: list[_Argument], rtol: float | None
    ) -> None:
        self.mesh = mesh
        # those that derivatives are taken with respect to
        self.arguments = arguments
        self.rtol = rtol
        # the gradient with respect to each of them, once it is known
        self.first: list[_Pair] = []

    def outputs(
        self, found: list[Leaf], expected: list[Leaf], order: int
    ) -> Iterator[Wrong]:
        """Yield what differs in the outputs, then in the derivatives.

        Outputs of other shapes are not differentiated.
        """
        alike = yield from _structure(found, expected)
        if not alike:
            return
        leaves: list[tuple[Tensor, P, str]] = []
        for y, spec, path in found:
            if isinstance(y, Tensor):
                leaves.append((y, spec, path))
        wholes = [z for z, _, _ in expected if isinstance(z, Tensor)]
        sizes = whole_shapes(leaves, self.mesh, _NAME)
        pairs: list[_Pair] = []
        for (y, spec, path), z, held in zip(leaves, wholes, sizes, strict=True):
            pair = _Pair(y, z, P(*spec.entries, sizes=held))
            smooth = yield from self._output(path, pair)
            if not smooth:
                return
            pairs.append(pair)
        yield from self._derivatives(pairs, order)

    def _output(self, path: str, pair: _Pair) -> Generator[Wrong, None, bool]:
        """Yield what differs in one output; return whether derivatives can follow."""
        held = dict(pair.spec.sizes)
        shape = tuple(map(int, pair.shard.shape))
        for dim, lengths in held.items():
            shape = (*shape[:dim], sum(lengths), *shape[dim + 1 :])
        if tuple(pair.whole.shape) != shape:
            serial = tuple(pair.whole.shape)
            yield path, f"the shards make up shape {shape} and serial has {serial}"
            return False
        yield from self._differ(path, pair)
        ranks = psum(int(pair.shard.requires_grad), self.mesh)
        # a backward on some ranks alone would wait for the others
        if ranks not in (0, self.mesh.size):
            yield path, f"it requires a gradient on {ranks} of {self.mesh.size} ranks"
            return False
        return True

    def _derivatives(self, pairs: list[_Pair], order: int) -> Iterator[Wrong]:
        """Yield what differs in the gradients, then in the gradients of those."""
        kinds = ("gradient", "second derivative")[:order]
        for kind in kinds:
            if not any(pair.requires_grad for pair in pairs):
                return
            # the graph of the last ones is not asked for: a compiled function has no
            # derivative of its gradient
            pairs = self._gradients(pairs, create_graph=kind != kinds[-1])
            self.first = self.first or pairs
            for pair, argument in zip(pairs, self.arguments, strict=True):
                yield from self._differ(f"{kind} of {argument.path}", pair)

    def _gradients(self, pairs: list[_Pair], *, create_graph: bool) -> list[_Pair]:
        """Return the gradients of the sum of all elements, each times its own number."""
        local: list[tuple[Tensor, Tensor]] = []
        serial: list[tuple[Tensor, Tensor]] = []
        for seed, pair in enumerate(pairs):
            if pair.requires_grad:
                numbers = _numbers(pair.whole, seed)
                serial.append((pair.whole, numbers))
                local.append((pair.shard, _shard(numbers, pair.spec, self.mesh)))
        shards = [argument.shard for argument in self.arguments]
        wholes = [argument.whole for argument in self.arguments]
        specs = [argument.spec for argument in self.arguments]
        ys = _gradients(local, shards, create_graph=create_graph)
        zs = _gradients(serial, wholes, create_graph=create_graph)
        return list(map(_Pair, ys, zs, specs))

    def _differ(self, what: str, pair: _Pair) -> Iterator[Wrong]:
        got, want = pair.shard, _shard(pair.whole, pair.spec, self.mesh)
        if got.dtype != want.dtype or got.shape != want.shape:
            found = f"it is {got.dtype} of shape {tuple(got.shape)}"
            yield what, f"{found} and serial {want.dtype} of {tuple(want.shape)}"
        elif _distance(got, want) > self._allowed(pair.whole):
            off = _off(got, want)
            worst = off.argmax()
            place = [int(index) for index in torch.unravel_index(worst, off.shape)]
            a, b = got.reshape(-1)[worst].item(), want.reshape(-1)[worst].item()
            where = f"at {place}, where it is {a:.6g} and serial {b:.6g}"
            yield what, f"off by {off.max().item():.3g} {where}"

    def _allowed(self, whole: Tensor) -> float:
        tolerance = self.rtol
        if tolerance is None:
            tolerance = TOLERANCE.get(whole.dtype, COARSE)
        # relative to the whole: a shard may hold only small elements, or none
        magnitudes = whole.detach().abs().double().nan_to_num(posinf=0)
        largest = magnitudes.max().item() if whole.numel() else 0.0
        return tolerance * (largest or 1.0)

    def hints(self) -> list[str]:
        """Return what may have made the gradients wrong.

        Without a pvary the ranks' gradients add up to the serial one; with one too many
        each is n times it.
        """
        hints: list[str] = []
        # no gradient was reached if the outputs differ in shape
        for argument, gradient in zip(self.arguments, self.first, strict=False):
            for along in self._invariant(argument.spec):
                hints += self._hint(argument, gradient, along)
        return hints

    def _invariant(self, spec: P) -> list[tuple[str, ...]]:
        """Return the axes that the spec leaves out: all of them as one, then each."""
        names: list[str] = []
        for name, size in self.mesh.shape.items():
            if size > 1 and name not in spec.axes:
                names.append(name)
        alone = [(name,) for name in names]
        return [tuple(names), *alone] if len(names) > 1 else alone

    def _hint(
        self, argument: _Argument, gradient: _Pair, along: tuple[str, ...]
    ) -> list[str]:
        got, want = gradient.shard, _shard(gradient.whole, gradient.spec, self.mesh)
        n, over = self.mesh.axis_size(along), named(along)
        # before any return: ranks whose gradient is right take part in the sum, too
        total = psum(got.detach(), self.mesh[along])
        zero = torch.zeros_like(want)
        allowed = self._allowed(argument.whole) + 1e-6 * _distance(want, zero)
        if got.shape != want.shape or _distance(got, want) <= allowed:
            return []
        path = argument.path
        if _distance(total, want) <= allowed:
            sum_of = f"The ranks' gradients of {path} add up to it over {over}"
            return [f"{sum_of}: a pvary is missing."]
        if _distance(got / n, want) <= allowed:
            times = f"The gradient of {path} is {n} times the serial one"
            return [f"{times}: summed twice over {over}."]
        return []


def _structure(
    found: Sequence[Leaf], expected: Sequence[Leaf]
) -> Generator[Wrong, None, bool]:
    """Yield what differs in the leaves besides tensors; return whether they match."""
    if len(found) != len(expected):
        yield "output", f"it has {len(found)} leaves and serial {len(expected)}"
        return False
    for (y, _, where), (z, _, path) in zip(found, expected, strict=True):
        if where != path or isinstance(y, Tensor) != isinstance(z, Tensor):
            serial = f"serial has a {type(z).__name__} at {path}"
            yield where, f"it is a {type(y).__name__}, and {serial}"
            return False
        if not isinstance(y, Tensor) and y != z:
            yield where, f"it is {y!r} and serial {z!r}"
    return True


def _distance(got: Tensor, want: Tensor) -> float:
    return _off(got, want).max().item() if want.numel() else 0.0


def _off(got: Tensor, want: Tensor) -> Tensor:
    """Return how far each element is off.

    A NaN that both have, or equal infinities, are not off.
    """
    wide = torch.complex128 if want.is_complex() else torch.float64
    a, b = got.detach().to(wide), want.detach().to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    off = (a - b).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    return off.masked_fill(same, 0)


def _differentiated(leaves: Sequence[object], order: int) -> list[int]:
    """Return the places of the arguments that derivatives are taken with respect to.

    These are the tensors that require a gradient. If none does, and derivatives are
    asked for, all that could.
    """
    smooth: list[int] = []
    asked: list[int] = []
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()):
            smooth.append(i)
            if x.requires_grad:
                asked.append(i)
    if asked or not order:
        return asked
    return smooth


def _shard(x: Tensor, spec: P, mesh: Mesh) -> Tensor:
    return x[local_slice(x.shape, spec, mesh=mesh)]


def _numbers(like: Tensor, seed: int) -> Tensor:
    """Return random numbers, the same on all ranks whatever they drew before."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.complex128 if like.is_complex() else torch.float64
    numbers = torch.randn(like.shape, generator=generator, dtype=dtype)
    return numbers.to(like.device, like.dtype)


def _gradients(
    outputs: list[tuple[Tensor, Tensor]], xs: list[Tensor], *, create_graph: bool
) -> list[Tensor]:
    """Return the gradients of outputs, given with their cotangents; zeros if none."""
    smooth = [pair for pair in outputs if pair[0].requires_grad]
    if not smooth:
        return [torch.zeros_like(x) for x in xs]
    ys, cotangents = zip(*smooth, strict=True)
    # materialize: zeros in place of None if no way leads from an argument to an output
    gradients = torch.autograd.grad(
        ys, xs, cotangents, create_graph=create_graph, materialize_grads=True
    )
    return list(gradients)
