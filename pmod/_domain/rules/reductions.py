"""Reductions: those of the whole, one value along the axes that cut what is reduced."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pmod._collectives.slices import all_gather, unshard
from pmod._domain.blocks import Blocks, label_of
from pmod._domain.layout import Axes, Layout, Part, with_cut, without
from pmod._domain.refusals import along_cut, no_exact_form
from pmod._domain.rules.dims import Dims, dims_of
from pmod._domain.rules.pointwise import pointwise
from pmod._domain.rules.table import Function, rule
from pmod.nn import functional as sharded


def total(b: Blocks, x: Tensor, dims: Sequence[int], *, keepdim: bool = True) -> Tensor:
    """Return the sum over dims of the whole."""
    layout = b.layout(x)
    y = x.sum(list(dims), keepdim=keepdim) if dims else x.clone()
    y = b.sum(y, b.over(layout, dims))
    return b.note(y, without(layout, dims, keepdim=keepdim))


def count(b: Blocks, x: Tensor, dims: Sequence[int]) -> int:
    """Return how many elements of the whole are reduced to one."""
    shape = b.whole(x)
    return math.prod(shape[d] for d in dims)


@rule("sum", "nansum")
def add_up(
    b: Blocks,
    func: Function,
    x: Tensor,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    axis: Dims = None,
) -> Tensor:
    dims = dims_of(axis if dim is None else dim, x.dim())
    if func.__name__ == "nansum":
        x = b.note(torch.where(x.isnan(), 0, x), b.layout(x))
    if dtype is not None:
        x = b.note(x.to(dtype), b.layout(x))
    return total(b, x, dims or dims_of(None, x.dim()), keepdim=keepdim)


@rule("mean")
def mean(
    b: Blocks,
    func: Function,
    x: Tensor,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    axis: Dims = None,
) -> Tensor:
    dims = dims_of(axis if dim is None else dim, x.dim()) or dims_of(None, x.dim())
    y = add_up(b, torch.sum, x, dims, keepdim, dtype=dtype)
    return b.note(y / count(b, x, dims), b.layout(y))


def mean_and_variance(
    b: Blocks, x: Tensor, dims: Sequence[int]
) -> tuple[Tensor, Tensor, int, Axes]:
    """Return mean and mean square deviation, how many, and the axes that are summed over.

    Both are one value along these. A block's own are joined: two small messages, and of
    the size of x nothing is kept but x itself.
    """
    n, axes = count(b, x, dims), b.over(b.layout(x), dims)
    k = math.prod(x.shape[d] for d in dims)
    if x.numel():
        variance, middle = torch.var_mean(x, list(dims), correction=0, keepdim=True)
    else:
        middle = x.sum(list(dims), keepdim=True)
        variance = middle.real if x.is_complex() else middle
    if not axes:
        return middle, variance, n, axes
    whole = b.sum(middle * k, axes) / n
    apart = middle - b.varied(whole, axes)
    spread = (apart * apart.conj()).real if x.is_complex() else apart.square()
    return whole, b.sum((variance + spread) * k, axes) / n, n, axes


@rule("var", "std", "var_mean", "std_mean")
def deviations(
    b: Blocks,
    func: Function,
    x: Tensor,
    dim: Dims | bool = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
    axis: Dims = None,
) -> Any:
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    if correction is None:
        correction = 0 if unbiased is False else 1
    dims = dims_of(axis if dim is None else dim, x.dim()) or dims_of(None, x.dim())
    middle, variance, n, _ = mean_and_variance(b, x, dims)
    # as torch: nan where nothing is left
    spread = variance * n / max(n - correction, 0) if n > correction else variance / 0
    name = func.__name__
    if name.startswith("std"):
        spread = spread.sqrt()
    layout = without(b.layout(x), dims, keepdim=keepdim)
    out: list[Tensor] = []
    for y in (spread, middle):
        out.append(b.note(y if keepdim else y.squeeze(dims), layout))
    return tuple(out) if name.endswith("mean") else out[0]


def _filled(x: Tensor, dims: Sequence[int], value: float) -> Tensor:
    """Return x with one row more along dims, so that an empty block has an extremum."""
    pads: list[int] = []
    for d in reversed(range(x.dim())):
        pads += [0, int(d in dims)]
    return F.pad(x, pads, value=value)


def _lowest(x: Tensor) -> float:
    if x.dtype == torch.bool:
        return 0
    if x.is_floating_point():
        return -math.inf
    return torch.iinfo(x.dtype).min


def greatest_of_all(b: Blocks, x: Tensor, dims: Sequence[int], axes: Axes) -> Tensor:
    """Return the greatest along dims of the whole, one value, without a derivative."""
    z = _filled(x.detach(), dims, _lowest(x)).amax(list(dims), keepdim=True)
    return b.greatest(z, axes)


def extremum(
    b: Blocks, x: Tensor, dims: Sequence[int], *, least: bool, keepdim: bool
) -> Tensor:
    """Return amax or amin of the whole.

    As torch's, its gradient goes in equal parts to all that attain it.
    """
    dims, layout = list(dims), b.layout(x)
    axes = b.over(layout, dims)
    kept = without(layout, dims, keepdim=keepdim)
    if not axes:
        f = x.amin if least else x.amax
        return b.note(f(list(dims), keepdim=keepdim), kept)
    if least and not x.is_floating_point():
        # in two's complement the least has no negative
        top = ~greatest_of_all(b, ~x, dims, axes)
    elif least:
        top = -greatest_of_all(b, -x, dims, axes)
    else:
        top = greatest_of_all(b, x, dims, axes)
    if not x.requires_grad and not x.is_floating_point():
        return b.note(top if keepdim else top.squeeze(dims), kept)
    # nan is equal to nothing, and nan is the extremum
    hit = (x == top) | (x.isnan() & top.isnan())
    hits = b.sum(hit.sum(list(dims), keepdim=True), axes)
    share = torch.where(hit, x, 0).sum(list(dims), keepdim=True)
    y = b.sum(share, axes) / hits
    return b.note(y if keepdim else y.squeeze(dims), kept)


@rule("amax", "amin")
def amax(
    b: Blocks, func: Function, x: Tensor, dim: Dims = (), keepdim: bool = False
) -> Tensor:
    dims = dims_of(dim, x.dim()) or dims_of(None, x.dim())
    return extremum(b, x, dims, least=func.__name__ == "amin", keepdim=keepdim)


@rule("max", "min")
def greatest(
    b: Blocks,
    func: Function,
    x: Tensor,
    dim: int | Tensor | None = None,
    keepdim: bool = False,
    **named: Any,
) -> Any:
    least = func.__name__ == "min"
    other = named.get("other", dim)
    if isinstance(other, Tensor):
        return pointwise(b, torch.minimum if least else torch.maximum, x, other)
    if dim is None:
        return extremum(b, x, range(x.dim()), least=least, keepdim=False)
    return along_whole(b, func, x, dim, keepdim)


@rule("aminmax")
def aminmax(
    b: Blocks,
    func: Function,
    x: Tensor,
    *,
    dim: int | None = None,
    keepdim: bool = False,
) -> Any:
    dims = dims_of(dim, x.dim())
    low = extremum(b, x, dims, least=True, keepdim=keepdim)
    return low, extremum(b, x, dims, least=False, keepdim=keepdim)


@rule("argmax", "argmin", "median", "nanmedian", "mode", "kthvalue", "cummax", "cummin")
def along_whole(b: Blocks, func: Function, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Reduce along a dim that is whole here; along one that is cut, say so."""
    name = func.__name__
    at = 1 if name == "kthvalue" else 0
    usual = None if name in ("argmax", "argmin", "median", "nanmedian") else -1
    dim = kwargs.get("dim", args[at] if len(args) > at else usual)
    layout = b.layout(x)
    dims = dims_of(dim, x.dim())
    for d in dims:
        if layout[d] is not None:
            raise along_cut(name, d)
    keepdim = bool(kwargs.get("keepdim", args[at + 1] if len(args) > at + 1 else False))
    keepdim = keepdim or name in ("cummax", "cummin")
    y = func(x, *args, **kwargs)
    after = without(layout, dims, keepdim=keepdim)
    for of in [y] if isinstance(y, Tensor) else y:
        b.note(of, after)
    return y


@rule("sort", "argsort", "msort", "topk", "cumprod", "logcumsumexp", "renorm")
def keeping(b: Blocks, func: Function, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run what works along one dim and leaves the others as they are."""
    name = func.__name__
    at = 1 if name == "topk" else 0
    dim = kwargs.get("dim", args[at] if len(args) > at else -1)
    if name == "msort":
        dim = 0
    if isinstance(dim, bool):
        # argsort(x, stable=...) takes them by name
        dim = -1
    if name == "renorm":
        raise no_exact_form(name, "it has no exact form", "Write it with norm.")
    layout = b.layout(x)
    (d,) = dims_of(dim, x.dim())
    if layout[d] is not None:
        if name in ("sort", "topk", "argsort"):
            return _ordered(b, func, x, d, *args, **kwargs)
        raise along_cut(name, d)
    y = func(x, *args, **kwargs)
    for of in [y] if isinstance(y, Tensor) else y:
        b.note(of, layout)
    return y


def _ordered(
    b: Blocks, func: Function, x: Tensor, d: int, *args: Any, **kwargs: Any
) -> Any:
    """Sort along a dim that is cut; of topk the few that are left are cut evenly."""
    x = b.plain(x, [d])
    layout, part = b.layout(x), b.layout(x)[d]
    assert isinstance(part, Part)
    name = func.__name__
    f = getattr(sharded, "topk" if name == "topk" else "sort")
    given = inspect.signature(f).bind(x, *args, **{**kwargs, "axis": ""}).arguments
    named = {**given, "dim": d, "axis": label_of(part.axes), "sizes": part.sizes}
    values, indices = f(**named)
    if name == "topk":
        layout = with_cut(layout, d, part.evenly(values_of(given["k"])))
    b.note(indices, layout)
    return indices if name == "argsort" else (b.note(values, layout), indices)


def values_of(k: object) -> int:
    """Return how many are asked for."""
    return operator.index(cast(int, k))


@rule("prod")
def product(
    b: Blocks,
    func: Function,
    x: Tensor,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    layout = b.layout(x)
    dims = dims_of(dim, x.dim())
    axes = b.over(layout, dims)
    y = x if dtype is None else x.to(dtype)
    for d in sorted(dims, reverse=True):
        y = y.prod(d, keepdim=keepdim)
    if axes:
        # each rank's product: n numbers for each that is left
        y = unshard(y.unsqueeze(0), label_of(axes), dim=0).prod(0)
    return b.note(y, without(layout, dims, keepdim=keepdim))


@rule("norm", "linalg_norm", "linalg_vector_norm")
def norm(
    b: Blocks,
    func: Function,
    x: Tensor,
    ord: float | str | None = 2,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    p: float | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    of = p if p is not None else ord
    if of is None or of == "fro":
        of = 2
    dims = dims_of(dim, x.dim())
    if isinstance(of, str) or (func.__name__ == "linalg_norm" and len(dims) == 2):
        raise no_exact_form(
            func.__name__, f"the matrix norm {of!r}", "Use vector_norm."
        )
    layout = b.layout(x)
    if not b.over(layout, dims):
        y = torch.linalg.vector_norm(x, of, dims, keepdim, dtype=dtype)
        return b.note(y, without(layout, dims, keepdim=keepdim))
    a = b.note((x if dtype is None else x.to(dtype)).abs(), layout)
    if of in (math.inf, -math.inf):
        return extremum(b, a, dims, least=of < 0, keepdim=keepdim)
    if of == 0:
        return total(b, b.note((a != 0).to(a.dtype), layout), dims, keepdim=keepdim)
    if of == 1:
        return total(b, a, dims, keepdim=keepdim)
    powers = a.square() if of == 2 else a.pow(of)
    y = total(b, b.note(powers, layout), dims, keepdim=keepdim)
    # where the norm is 0, so is torch's derivative: of the root it would be infinite
    safe = torch.where(y > 0, y, 1)
    return b.note(torch.where(y > 0, safe.pow(1 / of), 0), b.layout(y))


@rule("any", "all", "count_nonzero")
def truth(
    b: Blocks, func: Function, x: Tensor, dim: Dims = None, keepdim: Any = False
) -> Tensor:
    if func.__name__ == "count_nonzero" and keepdim is not False:
        right = "Pass dims as one tuple."
        raise no_exact_form("count_nonzero", "of dims one by one", right)
    holds = ~x.bool() if func.__name__ == "all" else x.bool()
    dims = dims_of(dim, x.dim())
    n = total(b, b.note(holds.long(), b.layout(x)), dims, keepdim=keepdim)
    if func.__name__ == "count_nonzero":
        return n
    return b.note(n == 0 if func.__name__ == "all" else n > 0, b.layout(n))


@rule("equal", "allclose")
def same(
    b: Blocks, func: Function, x: Tensor, y: Tensor, *args: Any, **kw: Any
) -> bool:
    if b.whole(x) != b.whole(y):
        return False
    f = torch.eq if func.__name__ == "equal" else torch.isclose
    z = pointwise(b, f, x, y, *args, **kw)
    return bool(truth(b, torch.all, z).item())


@rule("softmax", "log_softmax", "logsumexp", "softmin")
def softmax(
    b: Blocks,
    func: Function,
    x: Tensor,
    dim: Dims = None,
    keepdim: Any = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    name, layout = func.__name__, b.layout(x)
    if isinstance(keepdim, torch.dtype):
        dtype, keepdim = keepdim, False
    if dtype is not None:
        x = x.to(dtype)
    dims = dims_of(dim, x.dim())
    axes = b.over(layout, dims)
    if not axes:
        if name == "logsumexp":
            y = x.logsumexp(dims, keepdim=keepdim)
            return b.note(y, without(layout, dims, keepdim=keepdim))
        return b.note(func(x, dims[0]), layout)
    top = greatest_of_all(b, x, dims, axes)
    # what is -inf everywhere must not become nan
    top = torch.where(top.isfinite(), top, 0)
    e = (x - top).exp()
    s = b.sum(e.sum(dims, keepdim=True), axes)
    if name == "softmax":
        return b.note(e / b.varied(s, axes), layout)
    logarithm = s.log() + top
    if name == "log_softmax":
        return b.note(x - b.varied(logarithm, axes), layout)
    y = logarithm if keepdim else logarithm.squeeze(dims)
    return b.note(y, without(layout, dims, keepdim=keepdim))


@rule("cumsum")
def cumsum(
    b: Blocks,
    func: Function,
    x: Tensor,
    dim: int,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    (d,) = dims_of(dim, x.dim())
    x = b.plain(x, [d])
    layout: Layout = b.layout(x)
    y = x.cumsum(d, dtype=dtype)
    part = layout[d]
    if isinstance(part, Part):
        own = x.sum(d, dtype=dtype)
        sums = all_gather(own, label_of(part.axes), dim=0, tiled=False)
        before = sums[: b.index(part)].sum(0, dtype=sums.dtype)
        y = y + before.unsqueeze(d)
    return b.note(y, layout)


@rule("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__complex__",
      "is_nonzero", "numpy", "__array__", "nonzero", "argwhere", "unique",
      "unique_dim", "unique_consecutive", "masked_select", "bincount", "histc",
      "data_ptr", "untyped_storage", "storage", "__dlpack__", "stride",
      "storage_offset", "register_post_accumulate_grad_hook")  # fmt: skip
def own_number(b: Blocks, func: Function, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    right = "Reduce it first (sum, mean, amax: one value), or compute it outside."
    raise no_exact_form(
        func.__name__, "of a block it is a number of this rank's", right
    )
