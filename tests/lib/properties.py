"""Every Case of table.py times every property, on threads and on real ranks: value, derivatives, transforms, layouts.

A property is a function of a `Here`, run on every rank. What it compares with comes from the oracle alone: the value
from numpy, and all derivatives from the Jacobian as a matrix. With J that matrix, w weights, and S = Re sum(w exp(y))
of the result y:

    gradient of S          J' conj(w exp(y))
    Hessian of S, times v  J' conj(w exp(y) Jv)
    third derivative, v u  J' conj(w exp(y) Jv Ju)

A V counts once per rank and an I once, in S and in every product.
"""

# pyright: standard

from __future__ import annotations

import itertools
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap
from torch.utils.checkpoint import checkpoint

import pmod
from pmod._core.row import ROWS
from tests.lib import oracle
from tests.lib.listening import counted, listening, same
from tests.lib.oracle import Arrays
from tests.lib.table import CASES, Case, Choices, Here

_func: Any = torch.func  # whose stubs do not tell two results from three
jvp, vjp = _func.jvp, _func.vjp


def value(h: Here) -> Any:
    for grads in (False, True):
        x = h.mine(h.xs).requires_grad_(grads)
        y = h.call(x)
        same(y, h.mine(h.ys), f"value, requires_grad={grads}")
        assert y.requires_grad == grads
    with torch.no_grad():
        assert h.shares or not h.call(h.leaf()).requires_grad
    with torch.inference_mode():
        same(h.call(h.mine(h.xs)), h.mine(h.ys), "value in inference mode")
    return y.detach()


def same_bits(results: list[Tensor]) -> None:
    """What is invariant is the same to the last bit."""
    assert all(torch.equal(y, results[0]) for y in results)


def gradient(h: Here) -> None:
    x = h.leaf()
    y = h.call(x)
    (g,) = torch.autograd.grad(y, x, h.mine(h.ws), retain_graph=True)
    same(g, h.mine(h.jacobian.pull(h.ws)), "gradient of sum(w * y)")
    # an expanded cotangent
    (g,) = torch.autograd.grad(y.real.sum(), x, retain_graph=True)
    same(g, h.mine(h.jacobian.pull([np.ones(y.shape) + 0 * y for y in h.ys])), "gradient of sum(y)")
    h.loss(y).backward()
    same(x.grad, h.mine(h.derivative()), "gradient of S")


def accumulated(h: Here) -> None:
    """Two leaves under one cotangent, backward twice: each has a gradient of its own to add to."""
    if h.n == 1:
        return  # untiled, these are torch's own views, and torch adds the gradients of two of them into one storage
    a, b = h.leaf(), h.leaf()
    for _ in range(2):
        h.loss((h.call(a) + h.call(b)) / 2).backward()
    for leaf in (a, b):
        same(leaf.grad, h.mine(h.derivative()), "gradient after two backward passes")


def higher(h: Here) -> None:
    x, v, u = h.leaf(), h.mine(h.vs), h.mine(h.us)
    (first,) = torch.autograd.grad(h.loss(h.call(x)), x, create_graph=True)
    same(first, h.mine(h.derivative()), "gradient of S")
    (second,) = torch.autograd.grad((first.conj() * v).sum().real, x, create_graph=True)
    same(second, h.mine(h.derivative(h.vs)), "Hessian of S")
    (third,) = torch.autograd.grad((second.conj() * u).sum().real, x)
    same(third, h.mine(h.derivative(h.vs, h.us)), "third derivative of S")


def complex_numbers(h: Here) -> None:
    h = h.on_complex()
    same(h.call(h.mine(h.xs)), h.mine(h.ys), "complex value")
    gradient(h)
    higher(h)
    _, t = jvp(h.call, (h.mine(h.xs),), (h.mine(h.vs),))
    same(t, h.mine(h.jacobian.push(h.vs)), "complex jvp")
    same(vjp(h.call, h.mine(h.xs))[1](h.mine(h.ws))[0], h.mine(h.jacobian.pull(h.ws)), "complex vjp")


def adjoint(h: Here) -> tuple[float, float]:
    """<Lx, w> and <x, L'w>, this rank's part; no oracle."""
    x, w = h.leaf(), h.mine(h.ws)
    y = h.call(x)
    (g,) = torch.autograd.grad(y, x, w)
    return float((y.detach() * w).sum()), float((x.detach() * g).sum())


def same_products(case: Case, parts: list[tuple[float, float]]) -> None:
    left = sum(part[0] for part in parts[: None if case.gives == "V" else 1])
    right = sum(part[1] for part in parts[: None if case.takes == "V" else 1])
    assert abs(left - right) < 1e-10, f"<Lx, w> is {left}, <x, L'w> is {right}"


def transforms(h: Here) -> None:
    x, v, u, w = h.mine(h.xs), h.mine(h.vs), h.mine(h.us), h.mine(h.ws)

    def S(x: Tensor) -> Tensor:
        return h.loss(h.call(x))

    def curved(x: Tensor) -> Tensor:
        return h.call(x).exp()

    jv, ju = (h.mine(h.jacobian.push(tangents)) for tangents in (h.vs, h.us))
    y = h.mine(h.ys)
    hv = h.mine(h.derivative(h.vs))
    same(grad(S)(x), h.mine(h.derivative()), "func.grad")
    value, pull = vjp(h.call, x)
    same(value, y, "value of vjp")
    same(pull(w)[0], h.mine(h.jacobian.pull(h.ws)), "vjp")
    value, tangent = jvp(h.call, (x,), (v,))
    same(value, y, "value of jvp")
    same(tangent, jv, "jvp")
    same(grad(lambda x: (grad(S)(x) * v).sum())(x), hv, "grad of grad")
    same(jvp(grad(S), (x,), (v,))[1], hv, "jvp of grad")
    same(grad(lambda x: (w * jvp(curved, (x,), (v,))[1]).sum())(x), hv, "grad of jvp")
    slope, curve = jvp(lambda x: jvp(curved, (x,), (v,))[1], (x,), (u,))
    same(slope, y.exp() * jv, "value of jvp of jvp")
    same(curve, y.exp() * jv * ju, "jvp of jvp")
    third = h.mine(h.derivative(h.vs, h.us))
    same(jvp(lambda x: jvp(grad(S), (x,), (v,))[1], (x,), (u,))[1], third, "jvp of jvp of grad")


def batched(h: Here) -> None:
    batch = [h.on(ws=h.ws) for _ in range(3)]
    rows = [b.mine(b.xs) for b in batch]
    ys = torch.stack([b.mine(b.ys) for b in batch])
    gradients = torch.stack([b.mine(b.derivative()) for b in batch])

    def S(x: Tensor) -> Tensor:
        return h.loss(h.call(x))

    for dim in range(-rows[0].dim() - 1, rows[0].dim() + 1):
        same(vmap(h.call, in_dims=dim)(torch.stack(rows, dim)), ys, f"vmap, in_dims={dim}")
    same(vmap(grad(S), in_dims=-1)(torch.stack(rows, -1)), gradients, "vmap of grad")
    x = torch.stack(rows)
    same(vmap(h.call, out_dims=-1)(x), ys.movedim(0, -1), "vmap, out_dims=-1")
    same(grad(lambda x: sum(map(h.loss, vmap(h.call)(x))))(x), gradients, "grad of vmap")
    pairs = torch.stack([x, x.flip(0)], -1)
    same(vmap(vmap(h.call), in_dims=-1)(pairs), torch.stack([ys, ys.flip(0)]), "vmap of vmap")
    v = h.mine(h.vs)
    second = torch.stack([b.mine(b.derivative(h.vs)) for b in batch])
    same(vmap(lambda x: jvp(grad(S), (x,), (v,))[1])(x), second, "vmap of jvp of grad")
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(torch.stack(list(map(h.loss, vmap(h.call)(leaf)))).sum(), leaf)
    same(g, gradients, "backward through vmap")


def jacobians(h: Here) -> None:
    """Seeded on every rank at once, as an SPMD program does."""
    if not h.alike:
        return
    x = h.mine(h.xs)
    units_in: Any = np.eye(h.xs[0].size).reshape((h.xs[0].size, *h.xs[0].shape))
    units_out: Any = np.eye(h.ys[0].size).reshape((h.ys[0].size, *h.ys[0].shape))

    def columns(push: Callable[[Arrays], Arrays]) -> Tensor:
        parts = [h.mine(push([unit] * h.n)) for unit in units_in]
        return torch.stack(parts, -1).reshape((*parts[0].shape, *x.shape))

    if units_out.size and units_in.size:
        rows = torch.stack([h.mine(h.jacobian.pull([unit] * h.n)) for unit in units_out])
        same(jacrev(h.call)(x), rows.reshape((*h.ys[0].shape, *x.shape)), "jacrev")
        same(jacfwd(h.call)(x), columns(h.jacobian.push), "jacfwd")
        same(hessian(lambda x: h.loss(h.call(x)))(x), columns(h.derivative), "hessian")


def checkpointed(h: Here) -> None:
    x, v = h.leaf(), h.mine(h.vs)
    loss = checkpoint(lambda x: h.loss(h.call(x)), x, use_reentrant=False)
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    same(first, h.mine(h.derivative()), "gradient of S")
    (second,) = torch.autograd.grad((first * v).sum(), x)
    same(second, h.mine(h.derivative(h.vs)), "Hessian of S")


def untouched(h: Here) -> None:
    x, w = h.leaf(), h.mine(h.ws)
    version, before = x._version, x.detach().clone()
    y = h.call(x)
    torch.autograd.grad(y, x, w)
    assert (x._version, w._version) == (version, 0)
    shared = y.numel() > 0 and y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert h.shares or not shared, "the result shares storage with x"
    assert torch.equal(x, before) and torch.equal(w, h.mine(h.ws))


def changed(h: Here) -> None:
    """A result that is the caller's own may be changed in place, and still be differentiated."""
    if h.case.name in ("pvary", "place", "shard"):
        return
    x = h.leaf()
    (g,) = torch.autograd.grad(h.call(x).mul_(2), x, h.mine(h.ws))
    same(g, 2 * h.mine(h.jacobian.pull(h.ws)), "gradient through a change in place")


def layouts(h: Here) -> None:
    """Other strides on other ranks: what is sent is the elements in their order."""

    def laid_out(x: Tensor, how: int) -> Tensor:
        backwards = tuple(reversed(range(x.dim())))
        how = (h.index + how) % 4
        if how == 1:
            return x.permute(backwards).contiguous().permute(backwards)
        if how == 2:
            return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
        if how == 3:
            return torch.ops.aten._neg_view.default(-x)
        return x

    for how in range(4):
        x = laid_out(h.mine(h.xs), how).requires_grad_()
        y = h.call(x)
        same(y, h.mine(h.ys), f"value of layout {how}")
        (g,) = torch.autograd.grad(y, x, laid_out(h.mine(h.ws), how + 1))
        same(g, h.mine(h.jacobian.pull(h.ws)), f"gradient of layout {how}")
    if h.xs[0].ndim and len(set(map(np.shape, h.xs))) == 1:  # expanded: stride 0 along the first dim
        xs = [np.broadcast_to(x[:1], x.shape) for x in h.xs]
        y = h.call(h.mine([x[:1] for x in xs]).expand(*xs[0].shape))
        same(y, h.mine(h.drawn.oracle(xs)), "value of an expanded tensor")
    if "complex" in h.case.dtypes:
        h = h.on_complex()
        x = torch.conj(h.mine([x.conj() for x in h.xs]))
        assert x.is_conj()
        same(h.call(x if h.index % 2 == 0 else x.resolve_conj()), h.mine(h.ys), "value of a conjugate view")


DTYPES = {
    "bool": [torch.bool],
    "int": [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8],
    "float": [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    "complex": [torch.complex64, torch.complex128],
}


def dtypes(h: Here) -> None:
    """Rounded once, to the dtype of x."""
    for family in h.case.dtypes.split():
        for dtype in DTYPES[family]:
            numbers = h.on_complex() if family == "complex" else h.on()
            wide = {"bool": torch.bool, "int": torch.int64, "complex": torch.complex128}.get(family, torch.float64)
            tensors = [torch.from_numpy(np.array(4 * x)).to(wide).to(dtype) for x in numbers.xs]
            expected = h.mine(h.drawn.oracle([x.to(wide).numpy() for x in tensors])).to(dtype)
            rtol = torch.finfo(dtype).eps if family in ("float", "complex") else 0
            atol = 1e-6 if dtype.itemsize <= 2 else 50 * rtol
            same(h.call(tensors[h.index]), expected, f"value in {dtype}", rtol=rtol, atol=atol if rtol else 0)
            if rtol:
                x = tensors[h.index].requires_grad_()
                (g,) = torch.autograd.grad(h.call(x).abs().sum(), x)
                assert g.dtype == dtype


Pair = namedtuple("Pair", "first second")


def trees(h: Here) -> None:
    """A tree is its leaves, whatever the order of a dict on each rank."""
    parts = [h.on() for _ in range(4)]
    leaves = [part.leaf() for part in parts]

    def tree(leaves: list[Any], *nothing: None) -> dict[str, Any]:
        a, b, c, d = leaves
        items = {"b": [a, *nothing], "a": (b,), "c": OrderedDict(z=Pair(c, d))}
        return dict(list(items.items())[:: (-1) ** h.index])

    def leaves_of(t: dict[str, Any]) -> list[Tensor]:
        return [t["b"][0], t["a"][0], *t["c"]["z"]]

    x = tree(leaves, None)
    y = h.call(x)
    assert list(y) == list(x) and list(map(type, y.values())) == list(map(type, x.values()))
    assert type(y["c"]["z"]) is Pair and y["b"][1] is None
    for part, result in zip(parts, leaves_of(y), strict=True):
        same(result, part.mine(part.ys), "value of a leaf")
    if ROWS[h.case.rows[0]].fused or h.case.name in ("pvary", "place"):
        # each rank uses its own half of the leaves (the same half, where it is one value): zeros stand for the rest
        for k, part in enumerate(parts):
            idle = [(k + (rank if h.case.gives == "V" else 0)) % 2 for rank in range(h.n)]
            part.ws = [np.zeros_like(w) if idle[rank] else w for rank, w in enumerate(part.ws)]
        used = [k for k, part in enumerate(parts) if (k + (h.index if h.case.gives == "V" else 0)) % 2 == 0]
    else:
        used = list(range(4))
    loss = torch.stack([parts[k].loss(leaves_of(y)[k]) for k in used]).sum()
    for part, g in zip(parts, torch.autograd.grad(loss, leaves, allow_unused=h.still), strict=True):
        same(torch.zeros_like(leaves[0]) if g is None else g, part.mine(part.derivative()), "gradient of a leaf")
    tangents = [part.mine(part.vs) for part in parts]
    _, pushed = jvp(h.call, (tree([x.detach() for x in leaves]),), (tree(tangents),))
    for part, t in zip(parts, leaves_of(pushed), strict=True):
        same(t, part.mine(part.jacobian.push(part.vs)), "jvp of a leaf")


def mapped_trees(h: Here) -> None:
    """vmap over some leaves of a tree."""
    parts = [[h.on() for _ in range(2)] for _ in range(3)]
    rows = [[part.mine(part.xs) for part in batch] for batch in parts]
    x = {"a": torch.stack(rows[0]), "b": rows[1][0], "c": torch.stack(rows[2], -1)}
    y = vmap(h.call, in_dims=({"a": 0, "b": None, "c": -1},))(x)
    parts[1][1] = parts[1][0]
    for batch, key in zip(parts, "abc", strict=True):
        same(y[key], torch.stack([part.mine(part.ys) for part in batch]), f"vmap, leaf {key}")


def messages(h: Here) -> None:
    """One forward unless the input is invariant, one backward unless the output is; none where nobody asks."""
    asked = 1 if h.n > 1 and h.case.asked(h.drawn.kwargs[h.index]) else 0
    forward = 0 if h.still or h.case.takes == "I" else 1 + asked
    backward = 0 if h.still or h.case.gives == "I" else 1
    x, w = h.leaf(), h.mine(h.ws)
    y, sent = counted(lambda: h.call(x))
    # an extremum with a derivative counts the ranks that attain it
    assert len(sent) == forward * (1 if h.case.linear else 2), f"forward: {sent}"
    _, sent = counted(lambda: torch.autograd.grad(y, x, w, create_graph=True)[0])
    assert len(sent) == backward, f"backward: {sent}"
    other = torch.ones_like(y, requires_grad=True)
    _, sent = counted(lambda: torch.autograd.grad((h.call(x).detach() * other).sum(), other))
    assert len(sent) == forward * (1 if h.case.linear else 2), f"backward where no gradient is wanted: {sent}"
    both = h.call(x)
    _, sent = counted(lambda: torch.autograd.grad((both * other).sum(), other))
    assert not sent, f"backward to something else: {sent}"
    xs = torch.stack([x.detach()] * 3)
    _, sent = counted(lambda: vmap(h.call)(xs))
    assert len(sent) == forward * (1 if h.case.linear else 2), f"vmap: {sent}"
    if h.alike:
        _, sent = counted(lambda: jacrev(h.call)(x.detach()))
        assert len(sent) == forward * (1 if h.case.linear else 2) + backward, f"jacrev: {sent}"


def duals(h: Here) -> None:
    """torch.autograd.forward_ad, whose levels are the process's: on real ranks only."""
    with forward_ad.dual_level():
        y, t = forward_ad.unpack_dual(h.call(forward_ad.make_dual(h.leaf(), h.mine(h.vs))))
    same(y, h.mine(h.ys), "value of a dual number")
    same(t, h.mine(h.jacobian.push(h.vs)), "tangent of a dual number")


def gradchecked(h: Here) -> None:
    """torch's own check, of a function of one invariant value, so that all ranks perturb the same thing."""
    largest = tuple(np.max([x.shape for x in h.xs], axis=0).astype(int)) if h.xs[0].ndim else ()
    own = tuple(slice(0, length) for length in h.xs[h.index].shape)
    x = torch.tensor(h.random([largest] * h.n, "I")[0]).requires_grad_()
    if x.numel() == 0:
        return  # torch refuses it
    scale = 1.0 + h.index

    def whole(x: Tensor) -> Tensor:
        if h.case.takes == "V":
            x = pmod.pvary(x, h.axis)[own] * scale
        y = h.call(x).exp()
        return y if h.case.gives == "I" else pmod.psum((y * h.mine(h.ws)).sum(), h.axis)

    real_ranks = dist.is_initialized()
    assert torch.autograd.gradcheck(whole, x, check_forward_ad=real_ranks)
    seeds = torch.full_like(whole(x), 0.5).detach().requires_grad_()
    assert torch.autograd.gradgradcheck(whole, x, seeds, check_fwd_over_rev=real_ranks)


PROPERTIES: dict[str, Callable[[Here], Any]] = {
    f.__name__: f
    for f in (
        value, gradient, accumulated, higher, complex_numbers, adjoint, transforms, batched, jacobians, checkpointed,
        untouched, changed, layouts, dtypes, trees, mapped_trees, messages, gradchecked, duals,
    )
}  # fmt: skip


EVERYWHERE = ("value", "gradient", "adjoint")  # on every kind of axis


HEAVY = ("transforms", "batched", "complex_numbers", "trees", "jacobians", "gradchecked")  # on few


def applies(prop: str, case: Case) -> bool:
    return "complex" in case.dtypes if prop == "complex_numbers" else True


def on_rank(case: str, prop: str, axis: str, *seed: Any, **choices: Any) -> Any:
    """A property of a draw on this rank; what fails says which draw."""
    if prop == "gradchecked":  # which perturbs each element
        choices = {"ndim": 1, "lengths": (2, 3), **choices}
    h = Here(CASES[case], axis, *seed, **choices)
    try:
        return PROPERTIES[prop](h)
    except Exception as error:
        error.add_note(f"pmod.{case}, {prop}, axis {axis}, seed {seed}, {choices or ''}: {h.drawn}")
        raise


def on_all(case: str, prop: str, axis: str, sizes: dict[str, int], results: list[Any]) -> None:
    """What only a look at all ranks shows."""
    names = axis.removeprefix("mesh[").removesuffix("]").split(",")
    for group in oracle.groups(sizes, names):
        of_group = [results[rank] for rank in group]
        if prop == "value" and CASES[case].gives == "I":
            same_bits(of_group)
        if prop == "adjoint":
            same_products(CASES[case], of_group)


def simulated(case: str, prop: str, axis: str, sizes: dict[str, int], *seed: Any, **choices: Any) -> None:
    def run() -> Any:
        return on_rank(case, prop, axis, *seed, **choices)

    with listening():
        on_all(case, prop, axis, sizes, pmod.simulate(run, **sizes))


PAIRS = [(prop, case) for prop, case in itertools.product(PROPERTIES, CASES) if applies(prop, CASES[case])]


def threads(prop: str, case: str) -> None:
    """The property on simulated meshes of several shapes."""
    pair, grid, cube = {"x": 2}, {"a": 2, "b": 2}, {"a": 2, "b": 2, "c": 2}
    ways = CASES[case].ways
    for turn in range(0, ways, 2 if prop in HEAVY else 1):
        simulated(case, prop, "x", pair, turn, turn=turn)
    if prop == "gradchecked":
        return
    simulated(case, prop, "b,a", grid, turn=ways - 1)
    if prop != "messages":  # an empty one is not sent
        simulated(case, prop, "x", pair, empty=True, ndim=2)
    if prop in HEAVY:
        return
    simulated(case, prop, "x", {"x": 1}, turn=ways - 1)
    simulated(case, prop, "x", {"x": 3}, turn=0)
    if prop in (*EVERYWHERE, "higher", "layouts", "dtypes"):
        simulated(case, prop, "x", pair, ndim=0)
    if prop in EVERYWHERE:
        for axis, sizes in (("a", grid), ("c,a", cube), ("mesh[a,b]", grid), ("mesh[b]", grid)):
            simulated(case, prop, axis, sizes)


def channels_last_on_rank(ndim: int) -> None:
    kept = {4: torch.channels_last, 5: torch.channels_last_3d}[ndim]
    for name, seed in itertools.product(CASES, range(2)):
        h = Here(CASES[name], "x", seed, ndim=ndim, lengths=(2, 3))
        dense = h.mine(h.xs).contiguous(memory_format=kept)
        part = F.pad(dense, (1, 1)).contiguous(memory_format=kept)[..., 1:-1]  # a slice, as a shard is
        for x in (dense, part):
            y = h.call(x)
            same(y, h.mine(h.ys), name)
            tiled = h.drawn.kwargs[0].get("tiled", True)
            if torch.empty_like(x).is_contiguous():  # one channel, or one pixel: torch has it so
                continue
            view = name == "shard" or (x is part and y.untyped_storage()._cdata == x.untyped_storage()._cdata)
            if y.dim() == ndim and y.numel() and tiled and not view:
                assert y.is_contiguous(memory_format=kept), f"pmod.{name} {h.drawn}: strides {y.stride()}"


def extremum_on_rank(name: str, dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    values = [1.0, 2.0, top, -top, np.inf, -np.inf, np.nan]
    columns = [np.array(column) for column in zip(*itertools.product(values, repeat=3), strict=True)]
    h = Here(CASES[name], "x", drawn=CASES[name].draw(Choices.seeded(ndim=1, lengths=(len(columns[0]),) * 2), 3))
    h = h.on(columns)
    x, w = h.mine(h.xs).to(dtype).requires_grad_(), h.mine(h.ws).to(dtype)
    y = h.call(x)
    torch.testing.assert_close(y.detach(), h.mine(h.ys).to(dtype), rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        torch.testing.assert_close(h.call(x), y.detach(), rtol=0, atol=0, equal_nan=True)
    eps = 4 * torch.finfo(dtype).eps
    pulled = h.mine(h.jacobian.pull([w.double().numpy()] * 3)).to(dtype)
    same(torch.autograd.grad(y, x, w)[0], pulled, "gradient", rtol=eps, atol=0)
    same(grad(lambda x: (w * h.call(x).nan_to_num(0, 0, 0)).sum())(x.detach()), torch.where(y.isfinite(), pulled, 0),
         "func.grad where it is finite", rtol=eps, atol=0)  # fmt: skip
    v = torch.ones_like(x)
    same(jvp(h.call, (x.detach(),), (v.detach(),))[1], torch.ones_like(y), "jvp of the same on all", rtol=eps, atol=0)


SIXTEEN: dict[str, Callable[[Tensor, Any], Tensor]] = {
    # (v, reduce_dtype) -> the sum of all ranks' v, wherever it is taken
    "psum": lambda v, dtype: pmod.psum(v, "x", reduce_dtype=dtype),
    "pmean": lambda v, dtype: pmod.pmean(v, "x", reduce_dtype=dtype) * 4,
    "reduce": lambda v, dtype: pmod.pick(pmod.reduce(v, "x", dst=1, reduce_dtype=dtype), "x", src=1),
    "psum_scatter": lambda v, dtype: pmod.psum_scatter(torch.stack([v] * 4), "x", reduce_dtype=dtype)[0],
    "pvary": lambda v, dtype: vjp(lambda z: pmod.pvary(z, "x", reduce_dtype=dtype), v)[1](v)[0],
    "all_gather": lambda v, dtype: vjp(lambda z: pmod.all_gather(z[None], "x", reduce_dtype=dtype), v)[1](
        torch.stack([v] * 4)
    )[0],
    "broadcast": lambda v, dtype: pmod.pick(
        vjp(lambda z: pmod.broadcast(z, "x", src=2, reduce_dtype=dtype), v)[1](v)[0], "x", src=2
    ),
}


def sixteen_on_rank(count: int) -> None:
    first = pmod.axis_index("x") == 0
    for name, f in SIXTEEN.items():
        for dtype, v, reduce_dtype, total in (
            (torch.bfloat16, 256 if first else 1, None, 260),  # 259, rounded once
            (torch.bfloat16, 256 if first else 1, torch.bfloat16, 256),  # each 1 is lost
            (torch.float32, 2**24 if first else 1, torch.float64, 2**24 + 4),  # likewise, 2**24 + 3
        ):
            got = f(torch.full((count,), float(v), dtype=dtype), reduce_dtype)
            assert got.dtype == dtype and got.unique().tolist() == [total], f"{name} {dtype} in {reduce_dtype}: {got}"
    # the sum of these is no float16, their mean is
    x = torch.full((count,), 60000.0, dtype=torch.float16, requires_grad=True)
    for weight in (None, 3.0):
        y = pmod.pmean(x, "x", weight=weight)
        assert y.dtype == torch.float16 and y.unique().tolist() == [60000]
        (g,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert g.unique().tolist() == [0.25]


def fused_on_rank() -> list[Any]:
    i, n = pmod.axis_index("x"), pmod.axis_size("x")
    double, single, half = torch.float64, torch.float32, torch.bfloat16
    shapes = {"w": ((3,), double), "h": ((2, 2), single), "b": ((), double), "z": ((2,), half), "idle": ((5,), double)}
    keys = list(shapes)[:: (-1) ** i]
    params = {k: torch.ones(shapes[k][0], dtype=shapes[k][1], requires_grad=k != "idle") for k in keys}
    varied, none = counted(lambda: pmod.pvary(params, "x"))
    assert none == [] and list(varied) == keys
    # a rank that does not use a leaf sends zeros for it
    loss = torch.stack([(i + 1) * varied[k].sum().double() for k in ("h", "z", "w" if i else "b")]).sum()
    grads, back = counted(lambda: torch.autograd.grad(loss, [params["w"], params["b"], params["h"], params["z"]]))
    total = n * (n + 1) / 2
    assert [g.unique().tolist() for g in grads] == [[total - 1], [1.0], [total], [total]]
    (w,), part = counted(lambda: torch.autograd.grad(pmod.pvary(params, "x")["w"].sum(), [params["w"]]))
    assert w.tolist() == [n] * 3
    _, forward = counted(lambda: pmod.psum(params, "x"))
    _, unasked = counted(lambda: torch.autograd.grad(pmod.psum(params, "x")["w"].sum(), [params["w"]]))
    assert unasked == forward
    # leaves that have dims of their own are sent one by one
    _, each = counted(lambda: pmod.all_gather([params["w"], params["h"]], "x"))
    return [back, part, forward, each]


def fused_messages(run: Any) -> None:
    """One message per dtype, the same on every rank, and only what was asked for in backward."""
    results = run(fused_on_rank, x=2)
    assert results[0] == results[1]
    back, part, forward, each = results[0]
    double, single, half = torch.float64, torch.float32, torch.bfloat16
    assert {*back} == {("all_reduce", half, 2), ("all_reduce", single, 4), ("all_reduce", double, 4)} and len(back) == 3
    assert part == [("all_reduce", double, 4)]
    assert forward == [("all_reduce", double, 9), ("all_reduce", single, 4), ("all_reduce", half, 2)]
    assert [count for _, _, count in each] == [3, 4]
