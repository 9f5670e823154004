"""A layer of `pmod.nn.functional` held against torch's on the whole: a case is one call, drawn over lengths and cuts.

A test file has one table of cases. `agrees` is what a rank checks: the value, the gradient and the second derivative by
every tensor, and what `out_sizes` says. `transforms_agree` compares what torch.func makes of the call, `compiles` what
torch.compile does.
"""

# pyright: standard

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

import pmod
import pmod.nn.functional as sharded
from tests.lib.listening import same

Tensor = torch.Tensor
Pattern = tuple[int | str, ...]


def cut(n: int | str) -> bool:
    """Whether a dim of a pattern is cut."""
    return isinstance(n, str) and not n.startswith("=")


QUICK = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


@attrs.frozen
class Case:
    """A call of a layer: `tensors` are shapes, in which the name of a mesh axis stands for a dim that is cut over it.

    The first tensor is the one that the layer's dims are counted of. A tensor without a name is a parameter; "=x" is a
    dim of one as long as the whole along "x".
    """

    name: str
    tensors: tuple[Pattern, ...]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = attrs.field(factory=dict)
    out: dict[int, str] | None = None
    """The dims of the result that are cut, if not those of the first tensor; none of a result that is one value."""
    least: int = 1
    """The shortest whole dim that torch takes."""
    times: int = 1
    """What the length is a multiple of."""
    numbers: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = attrs.field(factory=dict)
    """By axis: what `out_sizes` is told of the layer."""
    torchs: Callable[..., Any] | None = None
    ours: Callable[..., Any] | None = None
    positive: bool = False
    second: bool = True
    """Whether torch's own second derivative is there to be compared with."""
    alone: bool = True
    """Whether an axis alone names the dim that is cut."""

    @property
    def axes(self) -> dict[str, int]:
        """The mesh axes, and the dim of the first tensor that each cuts."""
        shape = self.tensors[0]
        return {str(name): dim - len(shape) for dim, name in enumerate(shape) if cut(name)}

    def whole(self, *xs: Tensor) -> Tensor:
        if self.torchs is not None:
            return self.torchs(*xs)
        f = getattr(F, self.name, None) or getattr(torch, self.name)
        return f(*xs, *self.args, **self.kwargs)


@attrs.frozen
class Drawn:
    """A case with the lengths of all shards, by axis, and how the call says it."""

    case: Case
    sizes: dict[str, tuple[int, ...]]
    mapping: bool = True
    told: bool = True

    @property
    def mesh(self) -> dict[str, int]:
        return {name: len(sizes) for name, sizes in self.sizes.items()}

    def tensors(self, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        made = []
        for pattern in self.case.tensors:
            shape = [sum(self.sizes[n.lstrip("=")]) if isinstance(n, str) else n for n in pattern]
            x = torch.randn(shape, dtype=torch.float64, generator=generator)
            made.append(x.abs() + 0.1 if self.case.positive else x)
        return made

    def mine(self, x: Tensor, pattern: Pattern) -> Tensor:
        for dim, name in enumerate(pattern):
            if cut(name):
                x = x.split(list(self.sizes[str(name)]), dim)[pmod.axis_index(str(name))]
        return x

    def all_mine(self, xs: Sequence[Tensor]) -> list[Tensor]:
        return [self.mine(x, pattern) for x, pattern in zip(xs, self.case.tensors, strict=True)]

    def call(self, *xs: Tensor) -> Tensor:
        axes = self.case.axes
        said: dict[str, Any] = {}
        if self.mapping or len(axes) > 1 or not self.case.alone:
            said["axis"] = {dim: name for name, dim in axes.items()}
            if self.told:
                said["sizes"] = {dim: self.sizes[name] for name, dim in axes.items()}
        else:
            ((name, dim),) = axes.items()
            said["axis"] = name
            if "dim" not in self.case.kwargs and not self.case.ours:
                said["dim"] = dim
            if self.told:
                said["sizes"] = self.sizes[name]
        if self.case.ours is not None:
            return self.case.ours(*xs, **said)
        return getattr(sharded, self.case.name)(*xs, *self.case.args, **self.case.kwargs, **said)

    def varied(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """The tensors, parameters made varying."""
        names = tuple(self.mesh)
        out = list(xs)
        for i, pattern in enumerate(self.case.tensors):
            missing = tuple(name for name in names if name not in pattern)
            if missing:
                out[i] = pmod.pvary(xs[i], missing)
        return out

    def out(self) -> dict[int, str]:
        if self.case.out is not None:
            return self.case.out
        return {dim: name for name, dim in self.case.axes.items()}

    def lengths(self, y: Tensor) -> dict[int, tuple[int, ...]]:
        """How long the shards of the result are, as all ranks tell."""
        return {
            dim: tuple(pmod.all_gather(torch.tensor([y.shape[dim]]), name).tolist()) for dim, name in self.out().items()
        }

    def part(self, whole: Tensor, lengths: dict[int, tuple[int, ...]]) -> Tensor:
        for dim, name in self.out().items():
            assert sum(lengths[dim]) == whole.shape[dim], f"shards {lengths[dim]} of a result of {whole.shape[dim]}"
            whole = whole.split(list(lengths[dim]), dim)[pmod.axis_index(name)]
        return whole


@st.composite
def drawn(draw: Any, case: Case) -> Drawn:
    """Lengths of 0, 1 and more; more ranks than rows; sizes told or not."""
    sizes: dict[str, tuple[int, ...]] = {}
    for name in case.axes:
        n = draw(st.integers(1, 4)) if len(case.axes) == 1 else 2
        held = [case.times * draw(st.sampled_from([0, 0, 1, 2, 3, 5])) for _ in range(n)]
        short = max(0, case.least - sum(held))
        held[draw(st.integers(0, n - 1))] += -(-short // case.times) * case.times
        if not sum(held):
            held[-1] = case.times
        sizes[name] = tuple(held)
    return Drawn(case, sizes, draw(st.booleans()), draw(st.booleans()))


def fixed(case: Case, ranks: int = 2) -> Drawn:
    """Uneven lengths on a few ranks."""
    sizes: dict[str, tuple[int, ...]] = {}
    for name in case.axes:
        rest = -(-max(case.least, 5) // case.times)
        sizes[name] = (case.times * 2, *[0] * (ranks - 2), case.times * max(1, rest - 2))
    return Drawn(case, sizes)


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


def derivatives(
    f: Callable[..., Tensor],
    of: Sequence[Tensor],
    vs: Sequence[Tensor],
    w: Callable[[Tensor], Tensor],
    total: Callable[[list[Tensor]], Tensor],
    second: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The value, the gradient of a nonlinear function of it, and that of its product with vs."""
    leaves = [x.clone().requires_grad_() for x in of]
    y = f(*leaves)
    first = torch.autograd.grad(dot(y * y * y, w(y)), leaves, create_graph=second, materialize_grads=True)
    if not second:
        return y.detach(), list(first), []
    product = total([dot(g, v) for g, v in zip(first, vs, strict=True)])
    again = torch.autograd.grad(product, leaves, materialize_grads=True)
    return y.detach(), [g.detach() for g in first], list(again)


def agrees(drawn: Drawn) -> None:
    """Of a rank: what the layer gives is torch's, with both derivatives; `out_sizes` says the lengths."""
    case, of, vs = drawn.case, drawn.tensors(), drawn.tensors(1)
    value = case.whole(*of)
    w = torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(2))

    def plain(products: list[Tensor]) -> Tensor:
        return sum(products, torch.zeros((), dtype=torch.float64))

    expected = derivatives(case.whole, of, vs, lambda _: w, plain, case.second)

    def total(products: list[Tensor]) -> Tensor:
        """What belongs to shards is added up over the axes that they are cut along."""
        out = torch.zeros((), dtype=torch.float64)
        for product, pattern in zip(products, case.tensors, strict=True):
            names = tuple(str(name) for name in pattern if cut(name))
            out = out + (pmod.psum(product, names) if names else product)
        return out

    lengths: dict[int, tuple[int, ...]] = {}

    def weights(y: Tensor) -> Tensor:
        lengths.update(drawn.lengths(y))
        part = drawn.part(w, lengths)
        assert y.shape == part.shape, f"a shard of {tuple(y.shape)}, not {tuple(part.shape)}"
        return part

    found = derivatives(
        lambda *xs: drawn.call(*drawn.varied(xs)), drawn.all_mine(of), drawn.all_mine(vs), weights, total, case.second
    )
    same(found[0], drawn.part(expected[0], lengths), "value", rtol=1e-12, atol=1e-12)
    for order, mine, theirs in (("gradient", found[1], expected[1]), ("second derivative", found[2], expected[2])):
        scale = max([1.0, *[float(g.abs().max()) for g in theirs if g.numel()]])
        for i, (g, e) in enumerate(zip(mine, drawn.all_mine(theirs) if theirs else [], strict=True)):
            same(g / scale, e / scale, f"{order} by tensor {i}", rtol=1e-12, atol=1e-12)
    for name, (args, kwargs) in case.numbers.items():
        dim = next(dim for dim, other in drawn.out().items() if other == name)
        told = sharded.out_sizes(case.name, drawn.sizes[name], *args, **kwargs)
        assert told == lengths[dim], f"out_sizes says {told}, but shards have {lengths[dim]}"


def transforms_agree(drawn: Drawn) -> None:
    """Of a rank: jvp, vmap and forward over reverse give what torch and autograd do."""
    case, of, vs = drawn.case, drawn.tensors(), drawn.tensors(1)
    xs, ts = tuple(drawn.all_mine(of)), tuple(drawn.all_mine(vs))
    y, tangent, *_ = jvp(case.whole, tuple(of), tuple(vs))
    value, moved, *_ = jvp(drawn.call, xs, ts)
    lengths = drawn.lengths(value)
    same(value, drawn.part(y, lengths), "value under jvp")
    same(moved, drawn.part(tangent, lengths), "jvp", rtol=1e-9, atol=1e-9)
    both = vmap(drawn.call, in_dims=1)(*[torch.stack([x, t], 1) for x, t in zip(xs, ts, strict=True)])
    same(both, torch.stack([drawn.call(*xs), drawn.call(*ts)]), "vmap", rtol=1e-9, atol=1e-9)

    def loss(*of: Tensor) -> Tensor:
        return drawn.call(*of).sin().sum()

    leaves = [x.clone().requires_grad_() for x in xs]
    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True, materialize_grads=True)
    numbers = tuple(range(len(xs)))
    for g, e in zip(grad(loss, argnums=numbers)(*xs), first, strict=True):
        same(g, e.detach(), "torch.func.grad", rtol=1e-9, atol=1e-9)
    if case.second:
        product = sum((dot(g, t) for g, t in zip(first, ts, strict=True)), torch.zeros(()))
        second = torch.autograd.grad(product, leaves, materialize_grads=True)
        for g, e in zip(jvp(grad(loss, argnums=numbers), xs, ts)[1], second, strict=True):
            same(g, e, "forward over reverse", rtol=1e-9, atol=1e-9)


def compiles(drawn: Drawn) -> None:
    """Of a rank: one graph, with the value and the gradient of the call."""
    torch._dynamo.reset()
    leaves = [x.clone().requires_grad_() for x in drawn.all_mine(drawn.tensors())]

    def loss(*of: Tensor) -> Tensor:
        return drawn.call(*of).sin()

    expected = loss(*leaves)
    y = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    same(y, expected.detach(), f"{drawn.case.name} compiled")
    gradients = [torch.autograd.grad(z.square().sum(), leaves, materialize_grads=True) for z in (y, expected)]
    for g, e in zip(*gradients, strict=True):
        same(g, e, f"the gradient of {drawn.case.name} compiled")


def check_drawn(case: Case, examples: int = 12) -> None:
    """Compare on simulated ranks, over lengths and cuts."""

    @settings(max_examples=examples, **QUICK)
    @given(drawn(case))
    def run(one: Drawn) -> None:
        pmod.simulate(agrees, one, **one.mesh)

    run()


def check_transforms(case: Case) -> None:
    one = fixed(case)
    pmod.simulate(transforms_agree, one, **one.mesh)


def each(cases: dict[str, Case], what: str) -> None:
    """Of a rank: run a check of the cases whose axes are those of its mesh."""
    names = set(pmod.current_mesh().axis_names)
    for key, case in cases.items():
        if set(case.axes) == names:
            with named(key):
                globals()[what](fixed(case))


@contextlib.contextmanager
def named(key: str) -> Any:
    """Say of which case an error is."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in the case {key!r}")
        raise
