"""`pmod.nn.functional`: torch's convolutions of the whole tensor, with all derivatives, from its shards; what is sent.

A `Job` is one drawn call. What it must give is torch.nn.functional's on the whole, padded by torch.nn.functional.pad,
cut by the rule that is written out again here: row j of the result is where row j * stride is.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import pmod
import pmod.nn.functional as sharded
from pmod._core.send import memory_format
from pmod.nn.functional import windows
from tests.lib import spmd
from tests.lib.listening import counted, on_processes, on_threads, same
from tests.lib.raised import check, on_all_ranks

# torch says so of the whole; on shards the copy is the window
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

Tensor = torch.Tensor
MODES = {"zeros": "constant", "circular": "circular", "reflect": "reflect", "replicate": "replicate"}  # of pad


def owned(sizes: Sequence[int], length: int, stride: int) -> tuple[int, ...]:
    """How many of `length` rows each rank has, counted one by one."""
    owners = [rank for rank, size in enumerate(sizes) for _ in range(size)]
    counts = Counter(owners[j * stride] if j * stride < len(owners) else len(sizes) - 1 for j in range(length))
    return tuple(counts[rank] for rank in range(len(sizes)))


def each(of: Any, count: int) -> list[int]:
    return list(of) if isinstance(of, tuple) else [of] * count


def random_tensors(shapes: Sequence[Sequence[int]], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(list(shape), dtype=dtype, generator=generator) for shape in shapes]


# --- what is drawn ------------------------------------------------------------------------------------------------


@attrs.frozen
class Job:
    """A convolution of a whole tensor of this shape, its spatial dims cut by `cuts`: {dim: (axis, sizes)}."""

    count: int
    mesh: dict[str, int]
    shape: tuple[int, ...]
    weight: tuple[int, ...]
    bias: bool
    torchs: dict[str, Any]  # stride, padding, dilation, groups
    mode: str
    cuts: dict[int, tuple[Any, tuple[int, ...]]]
    ours: dict[str, Any]
    dtype: torch.dtype = torch.float64

    def tensors(self, seed: int = 0) -> list[Tensor]:
        """x, weight, and bias where there is one."""
        return random_tensors([self.shape, self.weight, *[self.weight[:1]] * self.bias], self.dtype, seed)

    def padding(self) -> list[tuple[int, int]]:
        padding, dilations = self.torchs.get("padding", 0), each(self.torchs.get("dilation", 1), self.count)
        if padding == "same":
            totals = [d * (k - 1) for k, d in zip(self.weight[2:], dilations, strict=True)]
            return [(total // 2, total - total // 2) for total in totals]
        return [(p, p) for p in each(0 if padding == "valid" else padding, self.count)]

    def whole(self, x: Tensor, *of: Tensor) -> Tensor:
        kwargs = dict(self.torchs)
        if self.mode != "zeros":
            pads = [p for pair in reversed(self.padding()) for p in pair]
            x, kwargs["padding"] = F.pad(x, pads, MODES[self.mode]) if any(pads) else x, 0
        return getattr(F, f"conv{self.count}d")(x, *of, **kwargs)

    def call(self, x: Tensor, *of: Tensor) -> Tensor:
        return getattr(sharded, f"conv{self.count}d")(x, *of, **self.torchs, **self.ours)

    def mine(self, x: Tensor, sizes: dict[int, tuple[int, ...]] | None = None) -> Tensor:
        """This rank's shard, of the input unless sizes are given."""
        for dim, (axis, held) in self.cuts.items():
            x = x.split(list(held if sizes is None else sizes[dim]), dim)[pmod.axis_index(axis)]
        return x

    def out_sizes(self, y: Tensor) -> dict[int, tuple[int, ...]]:
        strides = each(self.torchs.get("stride", 1), self.count)
        return {dim: owned(held, y.shape[dim], strides[dim]) for dim, (_, held) in self.cuts.items()}


AXES = [({"x": n}, ("x",)) for n in (1, 2, 3, 4)] + [({"x": 2, "y": 2}, ("x", "y")), ({"x": 2, "y": 2}, (("y", "x"),))]


@st.composite
def jobs(draw: Any, axes: Sequence[Any] = tuple(AXES)) -> Job:
    """Any dims, windows, paddings, shards; an argument at its default is left out half of the time."""
    few = st.integers(1, 3)
    mesh, names = draw(st.sampled_from(axes))
    count = draw(st.integers(len(names), 3))
    kernel = [draw(st.integers(1, 4 if count < 3 else 3)) for _ in range(count)]
    dilation = [draw(st.integers(1, 2)) for _ in range(count)]
    groups, per_group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    mode = draw(st.sampled_from(list(MODES)))
    kind = draw(st.sampled_from(["same", "valid", "numbers"]))
    stride = [1] * count if kind == "same" else [draw(few) for _ in range(count)]
    padding = [draw(st.integers(0, 3)) if kind == "numbers" else 0 for _ in range(count)]
    cut = draw(st.permutations(range(-count, 0)))[: len(names)]
    cuts, shape = {}, []
    for i, dim in enumerate(range(-count, 0)):
        extent = dilation[i] * (kernel[i] - 1) + 1
        pad = extent // 2 if kind == "same" else padding[i]
        least = max(1, 0 if kind == "same" else extent - 2 * pad, {"circular": pad, "reflect": pad + 1}.get(mode, 1))
        if dim not in cut:
            shape.append(least + draw(st.integers(0, 2)))
            continue
        axis = names[list(cut).index(dim)]
        n = math.prod(mesh[name] for name in (axis if isinstance(axis, tuple) else (axis,)))
        sizes = [draw(st.sampled_from([0, 1, 2, 3, 5])) for _ in range(n)]
        sizes[draw(st.integers(0, n - 1))] += max(0, least - sum(sizes))
        cuts[dim] = (axis, tuple(sizes) if draw(st.booleans()) else pmod.split_sizes(sum(sizes), n))
        shape.append(sum(sizes))
    torchs: dict[str, Any] = {"padding": kind if kind != "numbers" else tuple(padding)}
    for name, of in {"stride": tuple(stride), "dilation": tuple(dilation), "groups": groups}.items():
        if of not in (1, (1,) * count) or draw(st.booleans()):
            torchs[name] = of[0] if isinstance(of, tuple) and set(of) == {of[0]} and draw(st.booleans()) else of
    batch = draw(st.sampled_from([(), (0,), (2,)]))
    ours: dict[str, Any] = {"padding_mode": mode} if mode != "zeros" or draw(st.booleans()) else {}
    key = {dim: dim + draw(st.sampled_from([0, len(batch) + 1 + count])) for dim in cuts}
    told = draw(st.booleans())
    if len(cuts) > 1 or draw(st.booleans()):
        ours["axis"] = {key[dim]: axis for dim, (axis, _) in cuts.items()}
        if told:
            ours["sizes"] = {key[dim]: sizes for dim, (_, sizes) in cuts.items()}
    else:
        ((dim, (axis, sizes)),) = cuts.items()
        ours |= {"axis": axis} | ({"sizes": sizes} if told else {}) | ({"dim": key[dim]} if dim != -count else {})
    made = (*batch, groups * per_group, *shape), (groups * draw(st.integers(1, 2)), per_group, *kernel)
    dtype = draw(st.sampled_from([torch.float64, torch.complex128]))
    return Job(count, mesh, *made, draw(st.booleans()), torchs, mode, cuts, ours, dtype)


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b.conj()).real.sum()


def derivatives(
    f: Callable[..., Tensor], of: Sequence[Tensor], vs: Sequence[Tensor], w: Callable[[Tensor], Tensor],
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The value, the gradient of a nonlinear function of it, and that of its product with vs; total: of all shards."""
    leaves = [x.clone().requires_grad_() for x in of]
    y = f(*leaves)
    first = torch.autograd.grad(dot(y * y * y, w(y)), leaves, create_graph=True)
    # what belongs to a shard is one rank's, what belongs to the weights is all ranks'
    product = total(dot(first[0], vs[0])) + sum(dot(g, v) for g, v in zip(first[1:], vs[1:], strict=True))
    second = torch.autograd.grad(product, leaves, materialize_grads=True)  # torch's of an empty batch are unused
    return (y.detach(), *[g.detach() for g in first], *second)


def on_rank(job: Job) -> None:
    """Value, first and second derivatives by x, weight and bias: all that torch has on the whole."""
    of, vs = job.tensors(), job.tensors(1)
    (w,) = random_tensors([job.whole(*of).shape], job.dtype, 2)
    expected = derivatives(job.whole, of, vs, lambda y: w)
    axes = tuple(job.mesh)
    out = job.out_sizes(w)
    found = derivatives(
        lambda x, *of: job.call(x, *pmod.pvary(of, axes)), [job.mine(of[0]), *of[1:]], [job.mine(vs[0]), *vs[1:]],
        lambda y: job.mine(w, out), lambda x: pmod.psum(x, axes),
    )  # fmt: skip
    n = len(of)
    names = ["x", "weight", "bias"][:n]
    assert found[0].shape == job.mine(w, out).shape, f"{found[0].shape}, not {job.mine(w, out).shape}"
    same(found[0], job.mine(expected[0], out), "value")
    for i, name in enumerate(names):
        for k, order in ((1, "gradient"), (1 + n, "second derivative")):
            whole = expected[k + i]
            same(found[k + i], whole if i else job.mine(whole), f"{order} by {name}", rtol=1e-9, atol=1e-9)
    for dim, (_, sizes) in job.cuts.items():
        numbers = [each(job.torchs.get(name, 1), job.count)[dim] for name in ("stride", "dilation")]
        padding = job.torchs["padding"]
        padding = padding[dim] if isinstance(padding, tuple) else padding
        assert sharded.out_sizes("conv2d", sizes, job.weight[dim], numbers[0], padding, numbers[1]) == out[dim]


QUICK = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


@settings(max_examples=30, **QUICK)
@given(jobs())
def test_drawn(job: Job) -> None:
    pmod.simulate(on_rank, job, **job.mesh)


@pytest.mark.parametrize("axes", [AXES[1], AXES[2]], ids=["2", "3"])
def test_drawn_on_real_ranks(axes: Any) -> None:
    @settings(max_examples=3, **QUICK)
    @given(jobs([axes]))
    def run(job: Job) -> None:
        spmd.launch(on_rank, job, **job.mesh)

    run()


def small_on_rank(cases: list[tuple[tuple[int, ...], int, int, int, int, str]]) -> None:
    x, w = random_tensors([(2, 1, 7), (1, 1, 4)], torch.float64, 0)
    for sizes, kernel, stride, padding, dilation, mode in cases:
        whole = x[..., : sum(sizes)]
        if padding > {"circular": sum(sizes), "reflect": sum(sizes) - 1}.get(mode, 9):
            continue
        padded = F.pad(whole, (padding, padding), MODES[mode])
        if padded.shape[-1] < dilation * (kernel - 1) + 1:
            continue
        expected = F.conv1d(padded, w[..., :kernel], None, stride, 0, dilation)
        mine, out = whole.split(list(sizes), -1), owned(sizes, expected.shape[-1], stride)
        i = pmod.axis_index("x")
        y = sharded.conv1d(mine[i], w[..., :kernel], None, stride, padding, dilation, axis="x", padding_mode=mode,
                           sizes=sizes)  # fmt: skip
        same(y, expected.split(list(out), -1)[i], f"{sizes, kernel, stride, padding, dilation, mode}")


def test_every_window_of_small_shards() -> None:
    """All there is for a few sizes: empty shards, shards shorter than a window, more ranks than rows."""
    numbers = list(itertools.product((1, 4), (1, 3), (0, 1, 3), (1, 2), MODES))
    for sizes in [(3, 4), (0, 3), (2, 0, 3), (0, 0, 2, 0), (1, 4, 0, 1)]:
        pmod.simulate(small_on_rank, [(sizes, *each) for each in numbers], x=len(sizes))


# --- one layer after another --------------------------------------------------------------------------------------


def network(x: Tensor, weights: Sequence[Tensor], conv: Callable[..., Tensor]) -> Tensor:
    x = conv(x, weights[0], padding="same", padding_mode="circular").sin()
    x = conv(x, weights[1], stride=2, padding=1).sin()
    return conv(x, weights[2], dilation=(2, 1), padding=(0, 1))


def chained_on_rank() -> None:
    x, *weights = random_tensors([(2, 3, 13, 6), (4, 3, 4, 3), (4, 4, 3, 3), (2, 4, 3, 3)], torch.float64, 3)
    for cut in (-2, -1):
        sizes = start = pmod.split_sizes(x.shape[cut], 3)

        def layer(x: Tensor, weight: Tensor, cut: int = cut, **kwargs: Any) -> Tensor:
            nonlocal sizes
            y = sharded.conv2d(x, weight, axis="x", dim=cut, sizes=sizes, **kwargs)
            of = {k: v[cut] if isinstance(v, tuple) else v for k, v in kwargs.items() if k != "padding_mode"}
            sizes = sharded.out_sizes("conv2d", sizes, weight.shape[cut], **of)
            return y

        def whole(x: Tensor, weight: Tensor, padding_mode: str = "zeros", **kwargs: Any) -> Tensor:
            if padding_mode == "circular":
                return F.conv2d(F.pad(x, (1, 1, 1, 2), "circular"), weight)
            return F.conv2d(x, weight, **kwargs)

        expected = network(x, weights, whole)
        y, sent = counted(lambda cut=cut, start=start, layer=layer: network(
            x.split(list(start), cut)[pmod.axis_index("x")], weights, layer))  # fmt: skip
        same(y, expected.split(list(sizes), cut)[pmod.axis_index("x")], f"{cut}: value")
        assert not any("swap" in str(call) for call in sent)
        same(pmod.unshard(y, "x", dim=cut, sizes=sizes), expected, "joined")


def test_chained() -> None:
    pmod.simulate(chained_on_rank, x=3)


# --- torch.func, checkpoint, start, compile -----------------------------------------------------------------------

ROWS = Job(2, {"x": 3}, (2, 2, 7, 4), (2, 2, 3, 2), True, {"stride": (2, 1), "padding": (1, 0)}, "reflect",
           {-2: ("x", (3, 1, 3))}, {"axis": "x", "padding_mode": "reflect", "sizes": (3, 1, 3)})  # fmt: skip
BOTH = Job(2, {"x": 2, "y": 2}, (3, 7, 5), (2, 3, 3, 4), False, {"padding": "same"}, "zeros",
           {-2: ("x", (3, 4)), -1: ("y", (5, 0))},
           {"axis": {1: "x", 2: "y"}, "sizes": {1: (3, 4), 2: (5, 0)}, "padding_mode": "zeros"})  # fmt: skip


def transforms_on_rank(job: Job) -> None:
    of, vs = job.tensors(), job.tensors(1)
    y, t = jvp(job.whole, tuple(of), tuple(vs))
    out = job.out_sizes(y)
    x, v = [job.mine(of[0]), *of[1:]], [job.mine(vs[0]), *vs[1:]]
    value, tangent = jvp(job.call, tuple(x), tuple(v))
    same(value, job.mine(y, out), "value under jvp")
    same(tangent, job.mine(t, out), "jvp")
    both = vmap(job.call, in_dims=1)(*[torch.stack(pair, 1) for pair in zip(x, v, strict=True)])
    same(both, torch.stack([job.call(*x), job.call(*v)]), "vmap")
    over_x = vmap(job.call, in_dims=(-1, *[None] * (len(x) - 1)))(torch.stack([x[0], v[0]], -1), *x[1:])
    same(over_x[1], job.mine(job.whole(vs[0], *of[1:]), out), "vmap over x alone")
    w = job.mine(random_tensors([y.shape], job.dtype, 2)[0], out)

    def S(*of: Tensor) -> Tensor:
        return dot(job.call(*of).sin(), w)

    leaves = [a.clone().requires_grad_() for a in x]
    first = torch.autograd.grad(S(*leaves), leaves, create_graph=True)
    second = torch.autograd.grad(sum(dot(g, a) for g, a in zip(first, v, strict=True)), leaves)
    numbers = tuple(range(len(x)))
    for g, e in zip(grad(S, argnums=numbers)(*x), first, strict=True):
        same(g, e, "torch.func.grad")
    for g, e in zip(jvp(grad(S, argnums=numbers), tuple(x), tuple(v))[1], second, strict=True):
        same(g, e, "forward over reverse")
    for g, e in zip(vjp(job.call, *x)[1](w), torch.autograd.grad(job.call(*leaves), leaves, w), strict=True):
        same(g, e, "vjp")
    again = checkpoint(job.call, *leaves, use_reentrant=False)
    for g, e in zip(torch.autograd.grad(dot(again.sin(), w), leaves), first, strict=True):
        same(g, e.detach(), "checkpoint")


@pytest.mark.parametrize("job", [ROWS, BOTH], ids=["rows", "both"])
def test_transforms(job: Job) -> None:
    pmod.simulate(transforms_on_rank, job, **job.mesh)


def started_on_rank(job: Job) -> None:
    of = job.tensors()
    leaves = [job.mine(of[0]).requires_grad_(), *[a.requires_grad_() for a in of[1:]]]
    expected = job.call(*leaves)
    pending, sent = counted(lambda: pmod.start(sharded.conv2d, *leaves, **job.torchs, **job.ours))
    # up and down, or the one message of two ranks; none of a shard without columns
    assert len(sent) == (0 if leaves[0].numel() == 0 else 2 if job.mesh["x"] == 3 else 1)
    y, sent = counted(pending.wait)
    assert not sent
    same(y, expected.detach(), "start")
    gradients = [torch.autograd.grad(dot(z, z), leaves) for z in (y, expected)]
    for g, e in zip(*gradients, strict=True):
        same(g, e, "gradient after start")


@pytest.mark.parametrize("run", [on_threads, on_processes])
def test_start(run: Any) -> None:
    run(started_on_rank, ROWS, x=3)
    if run is on_threads:
        run(started_on_rank, BOTH, x=2, y=2)


def test_in_shard_map() -> None:
    """Whole tensors in and out; the weight's gradient is that of all ranks, made varying by hand or not."""
    of = random_tensors([(2, 3, 7, 5), (4, 3, 3, 3)], torch.float64, 8)
    spec = pmod.P(None, None, "x")

    def gradients(f: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in of]
        y = f(*leaves)
        return [y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)]

    def run() -> None:
        for vary in (lambda w: w, lambda w: pmod.pvary(w, "x")):
            ours = pmod.shard_map(
                lambda x, w, vary=vary: sharded.conv2d(x, vary(w), padding=1, axis="x"),
                in_specs=(spec, pmod.P()), out_specs=spec)  # fmt: skip
            for found, e in zip(gradients(ours), expected, strict=True):
                same(found, e, "in shard_map")

    expected = gradients(lambda x, w: F.conv2d(x, w, padding=1))
    pmod.simulate(run, x=3)


VOLUME = Job(3, {"x": 2}, (1, 2, 3, 3, 5), (1, 2, 2, 2, 3), True, {"padding": "same"}, "circular",
             {-1: ("x", (4, 1))}, {"axis": "x", "dim": -1, "padding_mode": "circular", "sizes": (4, 1)})  # fmt: skip
LINE = Job(1, {"x": 2}, (2, 6), (2, 2, 3), False, {"stride": 2}, "zeros", {-1: ("x", (1, 5))},
           {"axis": "x", "sizes": (1, 5)})  # fmt: skip


def compiled_on_rank() -> None:
    torch._dynamo.reset()
    for job in (VOLUME, LINE):
        of = job.tensors()
        leaves = [job.mine(of[0]).requires_grad_(), *[a.requires_grad_() for a in of[1:]]]

        f, kwargs = getattr(sharded, f"conv{job.count}d"), {**job.torchs, **job.ours}

        def value(x: Tensor, *of: Tensor, f: Any = f, kwargs: Any = kwargs) -> Tensor:
            return f(x, *pmod.pvary(of, "x"), **kwargs).sin()

        expected = value(*leaves)
        y = torch.compile(value, fullgraph=True, backend="aot_eager")(*leaves)
        same(y, expected.detach(), f"{job.count}: value")
        for g, e in zip(*[torch.autograd.grad(z.square().sum(), leaves) for z in (y, expected)], strict=True):
            same(g, e, f"{job.count}: gradient")
    weight = torch.ones(1, 1, 3)

    def of_any_length(x: Tensor) -> Tensor:
        return sharded.conv1d(x, weight, padding=1, axis="x", sizes=(x.shape[-1], x.shape[-1]))

    compiled = torch.compile(of_any_length, fullgraph=True, backend="eager")
    for n in (2, 5, 4):  # from the second on torch takes lengths for variables
        x = torch.rand(1, n)
        same(compiled(x), of_any_length(x), f"of length {n}")

    def inside(x: Tensor) -> Tensor:
        return jvp(grad(lambda x: of_any_length(x).sin().sum()), (x,), (x.cos(),))[1]

    same(torch.compile(inside, fullgraph=True, backend="eager")(x), inside(x), "forward over reverse")
    with pytest.raises(Exception, match=r"functional.conv1d\(axis='x'\).*sizes are left out under torch.compile"):
        torch.compile(lambda x: sharded.conv1d(x, weight, axis="x"), fullgraph=True, backend="eager")(x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compile() -> None:
    spmd.launch(compiled_on_rank, x=2)


# --- what is kept -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(4, 3), (1, 6), (7, 0)])
@pytest.mark.parametrize("count", [2, 3])
def test_a_slice_of_a_channels_last_image_gives_one(count: int, sizes: tuple[int, int]) -> None:
    kept = torch.channels_last if count == 2 else torch.channels_last_3d
    whole = torch.rand((2, 4) + (7,) * count).contiguous(memory_format=kept)
    weight, conv = torch.rand((6, 4) + (3,) * count), f"conv{count}d"
    assert getattr(F, conv)(whole, weight).is_contiguous(memory_format=kept)  # as torch does

    def run(dim: int, mode: str) -> None:
        rank = pmod.axis_index("x")
        x = whole.narrow(dim, sum(sizes[:rank]), sizes[rank])
        y = getattr(sharded, conv)(x, weight, padding=1, padding_mode=mode, axis="x", dim=dim, sizes=sizes)
        assert y.shape[dim] == sizes[rank] and memory_format(y) is kept

    for dim in range(-count, 0):
        for mode in ("zeros", "circular"):
            pmod.simulate(run, dim, mode, x=2)


def kept_on_rank() -> None:
    of = random_tensors([(2, 4, 3, 5), (6, 2, 3, 3), (6,)], torch.float64, 5)
    kwargs: dict[str, Any] = {"padding": 1, "groups": 2, "axis": "x", "sizes": (3, 3)}
    expected = sharded.conv2d(*of, **kwargs)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = sharded.conv2d(*[a.to(dtype) for a in of], **kwargs)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=1e-5 if dtype == torch.float32 else 0.1)
    last = [of[0].contiguous(memory_format=torch.channels_last), *of[1:]]
    y = sharded.conv2d(*last, **kwargs)
    same(y, expected, "channels_last")
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    assert sharded.conv2d(*of, **kwargs).is_contiguous()
    with torch.autocast("cpu", torch.bfloat16):
        y = sharded.conv2d(of[0].float(), of[1].bfloat16(), of[2].float(), **kwargs)
    assert y.dtype == torch.bfloat16
    module = torch.nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular", dtype=torch.float64)
    x = pmod.all_gather(of[0], "x", dim=-2)
    y = sharded.conv2d(of[0], module.weight, module.bias, padding=module.padding, padding_mode=module.padding_mode,
                       axis="x")  # fmt: skip
    whole = torch.nn.functional.conv2d(F.pad(x, (2, 2, 2, 2), "circular"), module.weight, module.bias)
    rows = sharded.out_sizes("conv2d", (3, 3), 3, padding=2)
    same(y, whole.split(list(rows), -2)[pmod.axis_index("x")].detach(), "what a module holds")


def test_dtypes_and_memory_formats() -> None:
    pmod.simulate(kept_on_rank, x=2)


def test_nothing_is_copied_where_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "carry_out", None)

    def run() -> None:
        x = torch.rand(1, 4, 4)
        for weight, stride in ((torch.rand(1, 1, 1, 1), 1), (torch.rand(1, 1, 2, 2), 2)):
            y = sharded.conv2d(x, weight, stride=stride, axis="x", sizes=(4, 4))
            assert torch.equal(y, F.conv2d(x, weight, stride=stride))

    pmod.simulate(run, x=2)
    with pmod.set_mesh(pmod.make_mesh(x=1)):
        sharded.conv2d(torch.rand(1, 4, 4), torch.rand(1, 1, 3, 3), padding=1, axis="x")


def test_one_rank_is_torch() -> None:
    """Bit for bit, with nothing sent."""
    x, weight, bias = random_tensors([(2, 3, 5, 6), (4, 3, 3, 2), (4,)], torch.float32, 6)
    with pmod.set_mesh(pmod.make_mesh(x=1)):
        for kwargs in ({}, {"padding": 1}, {"stride": (2, 3), "dilation": 2}, {"padding": (2, 1)}):
            y, sent = counted(lambda kwargs=kwargs: sharded.conv2d(x, weight, bias, **kwargs, axis="x"))
            assert torch.equal(y, F.conv2d(x, weight, bias, **kwargs)) and not sent


@pytest.mark.parametrize("count", [1, 2, 3])
def test_arguments_are_torchs(count: int) -> None:
    """Names, order and defaults, as torch's documentation has them."""
    name = f"conv{count}d"
    said = (getattr(F, name).__doc__ or "").strip().split("(")[1].split(")")[0].split(", ")
    ours = inspect.signature(getattr(sharded, name)).parameters.values()
    told = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in ours if p.kind is not p.KEYWORD_ONLY]
    assert told == said
    assert [p.name for p in ours if p.kind is p.KEYWORD_ONLY] == ["axis", "dim", "padding_mode", "sizes"]


# --- messages -----------------------------------------------------------------------------------------------------

ROW = 2 * 5 * 8  # bytes: channels, columns, a float64


def sent_by(sizes: tuple[int, ...], kernel: int, kwargs: dict[str, Any], known: bool = True) -> list[list[int]]:
    """The bytes that this rank sends forward, and backward."""
    x = torch.ones(2, sizes[pmod.axis_index("x")], 5, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(1, 2, kernel, 1, dtype=torch.float64)
    with pmod.trace() as t:
        y = sharded.conv2d(x, weight, axis="x", sizes=sizes if known else None, **kwargs)
        forward = len(t.events)
        y.sum().backward()
    assert {event.function for event in t.events[:forward]} <= {"conv2d"}
    assert {event.function for event in t.events[forward:]} <= {"the backward of conv2d"}
    return [[event.nbytes for event in half] for half in (t.events[:forward], t.events[forward:])]


EVEN = (4, 4, 4, 4)
# shards, kernel, arguments -> rows that each rank sends, forward and backward
VOLUMES: list[tuple[tuple[int, ...], int, dict[str, Any], list[int], list[int]]] = [
    (EVEN, 3, {"padding": "same"}, [1, 2, 2, 1], [1, 2, 2, 1]),
    (EVEN, 3, {"padding": (1, 0), "padding_mode": "circular"}, [2, 2, 2, 2], [2, 2, 2, 2]),
    (EVEN, 4, {"padding": "same"}, [1, 3, 3, 2], [2, 3, 3, 1]),  # one row before, two after
    (EVEN, 3, {"dilation": (2, 1), "padding": "same"}, [2, 4, 4, 2], [2, 4, 4, 2]),
    (EVEN, 3, {}, [0, 2, 2, 2], [2, 2, 2, 0]),  # the two rows after
    (EVEN, 3, {"stride": (2, 1), "padding": (1, 0)}, [1, 1, 1, 0], [0, 1, 1, 1]),  # the row before
    (EVEN, 2, {"stride": (2, 1)}, [0, 0, 0, 0], [0, 0, 0, 0]),
    (EVEN, 1, {}, [0, 0, 0, 0], [0, 0, 0, 0]),
    ((3, 3), 2, {"stride": (2, 1)}, [0, 1], [1, 0]),  # a patch across the border
    ((4, 4), 1, {"stride": (3, 1)}, [0, 0], [0, 0]),
    ((2, 2, 2), 7, {"padding": (3, 0)}, [3, 4, 3], [3, 4, 3]),  # two hops, the second with one row
    ((5, 0, 5), 5, {"padding": "same"}, [2, 0, 2], [2, 0, 2]),  # the empty shard has no row of the result
    ((5,), 3, {"padding": (1, 0), "padding_mode": "circular"}, [0], [0]),
]


@pytest.mark.parametrize("sizes, kernel, kwargs, forward, backward", VOLUMES)
def test_rows_sent(sizes: Any, kernel: int, kwargs: dict[str, Any], forward: list[int], backward: list[int]) -> None:
    n = len(sizes)
    found = pmod.simulate(sent_by, sizes, kernel, kwargs, x=n)
    assert [sum(rank[0]) / ROW for rank in found] == forward
    assert [sum(rank[1]) / ROW for rank in found] == backward
    told = pmod.simulate(sent_by, sizes, kernel, kwargs, False, x=n)
    # where sizes are left out, one small message more: 8 numbers to each other rank
    assert [rank[0] for rank in told] == [[64 * (n - 1)] * (n > 1) + rank[0] for rank in found]


def test_elements_sent_of_blocks() -> None:
    """A row, then a column as long as the window: with the neighbour's row and the padding."""

    def run() -> int:
        with pmod.trace() as t:
            sharded.conv2d(torch.ones(3, 4, 5), torch.ones(1, 3, 3, 3), padding=1, axis={-2: "x", -1: "y"},
                           sizes={-2: (4, 4), -1: (5, 5)})  # fmt: skip
        return t.total_bytes()

    assert pmod.simulate(run, x=2, y=2) == [3 * (5 + 6) * 4] * 4


def test_rows_sent_on_many_ranks() -> None:
    """The first of 1024 ranks sends its last row, forward, and the gradient of its neighbour's first, backward."""

    def run() -> None:
        x = torch.empty(8, 64, 32, 4096, device="meta", requires_grad=True)
        weight = torch.empty(64, 1, 3, 3, device="meta")
        sharded.conv2d(x, weight, padding="same", groups=64, axis="x", sizes=[32] * 1024).sum().backward()

    events = pmod.estimate(run, mesh={"x": 1024}).events
    assert [event.nbytes for event in events if event.nbytes] == [8 * 64 * 4096 * 4] * 2


def test_only_neighbours_talk(talks: Counter[tuple[int, int]]) -> None:
    def run(**kwargs: Any) -> None:
        sharded.conv1d(torch.ones(1, 4), torch.ones(1, 1, 3), axis="x", sizes=[4] * 5, **kwargs)

    pmod.simulate(lambda: run(padding=1), x=5)
    line = {(i, i + 1) for i in range(4)} | {(i + 1, i) for i in range(4)}
    assert talks == dict.fromkeys(line, 1)
    talks.clear()
    pmod.simulate(lambda: run(stride=2, padding=1), x=5)
    assert talks == {(i, i + 1): 1 for i in range(4)}
    talks.clear()
    pmod.simulate(lambda: run(padding=1, padding_mode="circular"), x=5)
    assert talks == dict.fromkeys(line | {(4, 0), (0, 4)}, 1)


# --- what is refused ----------------------------------------------------------------------------------------------

X, W = torch.ones(1, 2, 4, 5), torch.ones(2, 2, 3, 3)


def conv(x: Any = X, weight: Any = W, bias: Any = None, **kwargs: Any) -> Any:
    return sharded.conv2d(x, weight, bias, **{"axis": "model", "sizes": (4, 4), **kwargs})


A_WEIGHT = "A weight is (out, in / groups, ...), out a multiple of groups, and its windows are not empty."
A_MODE = "Pass 'zeros', 'circular', 'reflect' or 'replicate'."
LONGER = "Pass an input that is as long, or more padding."
SPATIAL = "Pass a dim from -2 to -1; shards of a batch are convolved by torch alone."
# the call, its error, and its text after the place
WRONG: dict[str, tuple[Callable[[], Any], type[pmod.PmodError], str]] = {
    "no tensor": (
        lambda: conv(1.0), pmod.ArgumentError,
        "input is a float.\nPass a tensor, or a dict, list or tuple of them."),
    "no weight": (
        lambda: conv(weight=None), pmod.ArgumentError,
        "weight is a NoneType.\nPass a tensor, or a dict, list or tuple of them."),
    "dims": (
        lambda: conv(X[0, 0]), pmod.ShapeError,
        "input is (4, 5) and weight (2, 2, 3, 3).\nPass an input of 3 or 4 dims, and a weight of 4."),
    "the weight's dims": (
        lambda: conv(weight=W[0]), pmod.ShapeError,
        "input is (1, 2, 4, 5) and weight (2, 3, 3).\nPass an input of 3 or 4 dims, and a weight of 4."),
    "channels": (
        lambda: conv(X[:, :1]), pmod.ShapeError,
        f"input is (1, 1, 4, 5) and weight (2, 2, 3, 3), groups 1.\n{A_WEIGHT}"),
    "groups": (
        lambda: conv(X, torch.ones(3, 1, 3, 3), groups=2), pmod.ShapeError,
        f"input is (1, 2, 4, 5) and weight (3, 1, 3, 3), groups 2.\n{A_WEIGHT}"),
    "no groups": (lambda: conv(groups=0), pmod.ShapeError, "groups is 0.\nPass an int of 1 or more."),
    "an empty window": (
        lambda: conv(weight=W[:, :, :0]), pmod.ShapeError,
        f"input is (1, 2, 4, 5) and weight (2, 2, 0, 3), groups 1.\n{A_WEIGHT}"),
    "bias": (
        lambda: conv(bias=torch.ones(3)), pmod.ShapeError,
        "bias is (3,) and weight (2, 2, 3, 3).\nPass a bias of (2,)."),
    "dtype": (
        lambda: conv(weight=W.double()), pmod.ArgumentError,
        "weight is torch.float64 and input torch.float32.\n"
        "Pass weight.to(torch.float32), or call it under torch.autocast."),
    "device": (
        lambda: conv(bias=torch.ones(2, device="meta")), pmod.ArgumentError,
        "bias is on meta.\nIt has no values: pass a tensor on cpu, or see what would be sent with pmod.estimate."),
    "stride": (lambda: conv(stride=0), pmod.ShapeError, "stride is 0.\nPass an int of 1 or more, or 2 of them."),
    "strides": (
        lambda: conv(stride=(1, 2, 3)), pmod.ShapeError,
        "stride is (1, 2, 3).\nPass an int of 1 or more, or 2 of them."),
    "dilation": (
        lambda: conv(dilation=1.5), pmod.ShapeError, "dilation is 1.5.\nPass an int of 1 or more, or 2 of them."),
    "padding": (
        lambda: conv(padding=(0, -1)), pmod.ShapeError, "padding is (0, -1).\nPass an int of 0 or more, or 2 of them."),
    "a name": (
        lambda: conv(padding="sane"), pmod.ShapeError,
        "padding is 'sane'; did you mean 'same'?\nPass 'same' or 'valid', an int, or one for each spatial dim."),
    "a stride and the same": (
        lambda: conv(padding="same", stride=2), pmod.ShapeError,
        "padding is 'same' and stride 2.\nPass padding as numbers, as torch has it."),
    "a mode": (
        lambda: conv(padding_mode="circle"), pmod.ArgumentError,
        f"padding_mode is 'circle'; did you mean 'circular'?\n{A_MODE}"),
    "the halo's mode": (
        lambda: conv(padding_mode="periodic"), pmod.ArgumentError, f"padding_mode is 'periodic'.\n{A_MODE}"),
    "a window too long": (
        lambda: conv(weight=torch.ones(2, 2, 9, 1)), pmod.ShapeError,
        f"the whole has 8 rows along dim -2, 8 with padding, and a window 9.\n{LONGER}"),
    "a window too long for a dim that is not cut": (
        lambda: conv(weight=torch.ones(2, 2, 1, 4), dilation=2, padding=(0, 0), sizes=None), pmod.ShapeError,
        f"the whole has 5 rows along dim -1, 5 with padding, and a window 7.\n{LONGER}"),
    "a window too long where other sizes are not told": (
        lambda: conv(weight=torch.ones(2, 2, 9, 1), axis={2: "model", 3: "data"}, sizes={2: (4, 4), 3: None}),
        pmod.ShapeError, f"the whole has 8 rows along dim -2, 8 with padding, and a window 9.\n{LONGER}"),
    "nothing": (
        lambda: conv(X[:, :, :0], padding=3, sizes=(0, 0)), pmod.ShapeError,
        "the whole has 0 rows along dim -2, 6 with padding, and a window 3.\nPass an input with rows."),
    "reflect": (
        lambda: conv(padding=(8, 0), padding_mode="reflect"), pmod.ShapeError,
        "padding is (8, 8) with padding_mode='reflect', but the whole has 8 rows along dim -2.\n"
        "Pass padding of at most 7, or padding_mode='zeros'."),
    "circular": (
        lambda: conv(padding=(0, 6), padding_mode="circular"), pmod.ShapeError,
        "padding is (6, 6) with padding_mode='circular', but the whole has 5 rows along dim -1.\n"
        "Pass padding of at most 5, or padding_mode='zeros'."),
    "a dim that is not spatial": (
        lambda: conv(dim=0), pmod.ShapeError, f"dim 0 is not a spatial one.\n{SPATIAL}"),
    "a dim too far": (
        lambda: conv(dim=4), pmod.ShapeError, "dim is 4 but x has 4 dims.\nPass dim from -4 to 3."),
    "sizes": (
        lambda: conv(sizes=(3, 3)), pmod.ShapeError,
        "sizes[<i>] is 3 but x.shape[2] is 4.\nPass sizes=<fits>, or leave sizes out to exchange them."),
    "three sizes": (
        lambda: conv(sizes=(4, 4, 0)), pmod.ShapeError,
        "sizes is (4, 4, 0).\nPass 2 ints, one per rank of the axis."),
    "an axis twice": (
        lambda: conv(axis={2: "model", 3: "model"}, sizes=None), pmod.AxisError,
        "two dims are cut along 'model'.\nCut one along each axis."),
    "dim and a mapping": (
        lambda: conv(axis={2: "model"}, dim=2, sizes=None), pmod.ArgumentError,
        "dim is 2 and axis a mapping.\nThe mapping names the dims."),
    "other dims": (
        lambda: conv(axis={2: "model"}, sizes={3: (4, 4)}), pmod.ArgumentError,
        "sizes names the dims [3].\nName the same dims as axis does, [2]."),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_refused(name: str, messages: list[Any]) -> None:
    call, kind, text = WRONG[name]
    for mesh, error in on_all_ranks(call):
        i = mesh.axis_index("model")
        place = f"(data={mesh.axis_index('data')}, model={i})"
        said = text.replace("<i>", str(i)).replace("<fits>", "(4, 3)" if i == 0 else "(3, 4)")
        check(error, kind, f"pmod.nn.functional.conv2d(axis='model') at {place}: {said}")
    assert not messages


def test_refused_after_sizes_are_told(messages: list[Any]) -> None:
    """All ranks find it alike, and no rows are sent."""
    results = on_all_ranks(lambda: conv(weight=torch.ones(2, 2, 9, 1), sizes=None))
    for mesh, error in results:
        place = f"(data={mesh.axis_index('data')}, model={mesh.axis_index('model')})"
        check(error, pmod.ShapeError,
              f"pmod.nn.functional.conv2d(axis='model') at {place}: the whole has 8 rows along dim -2, 8 with padding, "
              f"and a window 9.\n{LONGER}")  # fmt: skip
    assert len(messages) == len(results), "the sizes, once"


def test_devices_that_differ() -> None:
    """Each of a kind that the rank sends from."""
    with pytest.raises(pmod.ArgumentError) as raised:
        pmod.estimate(lambda: conv(weight=W.to("meta")), mesh={"model": 2})
    check(raised.value, pmod.ArgumentError,
          "pmod.nn.functional.conv2d(axis='model') at (model=0): weight is on meta and input on cpu.\n"
          "Pass weight.to('cpu').")  # fmt: skip


SIZES: dict[str, tuple[Callable[[], Any], str]] = {
    "sizes": (
        lambda: sharded.out_sizes("conv2d", (4, -1), 3),
        "sizes is (4, -1).\nPass ints of 0 or more, one per rank of the axis."),
    "a number": (
        lambda: sharded.out_sizes("conv2d", 4, 3),  # type: ignore[arg-type]
        "sizes is 4.\nPass ints of 0 or more, one per rank of the axis."),
    "a kernel for each dim": (
        lambda: sharded.out_sizes("conv2d", (4, 4), (3, 3)),  # type: ignore[arg-type]
        "kernel_size is (3, 3).\nPass an int of 1 or more."),
    "stride": (lambda: sharded.out_sizes("conv2d", (4, 4), 3, 0), "stride is 0.\nPass an int of 1 or more."),
    "too long": (
        lambda: sharded.out_sizes("conv2d", (4, 4), 9),
        f"the whole has 8 rows, 8 with padding, and a window 9.\n{LONGER}"),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_sizes_refused(name: str) -> None:
    call, text = SIZES[name]
    with pytest.raises(pmod.ShapeError) as raised:
        call()
    check(raised.value, pmod.ShapeError, f"pmod.nn.functional.out_sizes: {text}")
