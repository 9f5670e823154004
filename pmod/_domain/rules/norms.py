"""Norms by the sums of the whole: statistics are one value, blocks are scaled by them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pmod._domain.blocks import Blocks
from pmod._domain.layout import Layout
from pmod._domain.refusals import along_cut, no_exact_form
from pmod._domain.rules.reductions import count, mean_and_variance, total
from pmod._domain.rules.table import Function, rule


def prepared(
    b: Blocks,
    w: Tensor | None,
    layout: Layout,
    dims: Sequence[int],
    view: Sequence[int] | None = None,
) -> Tensor | None:
    """Return a weight along these dims of the whole, for a block of this layout."""
    if w is None:
        return None
    for i, d in enumerate(dims):
        cut = layout[d]
        if cut is not None:
            w = b.shard(w, i, cut)
    axes: set[str] = set()
    for cut in layout:
        if cut is not None:
            axes |= {*cut.axes}
    w = b.vary(w, axes)
    shape = [1] * len(layout)
    for i, d in enumerate(dims):
        shape[d] = w.shape[i]
    return w.reshape(view or shape)


def standardized(
    b: Blocks,
    x: Tensor,
    dims: Sequence[int],
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return (x - mean) / std * weight + bias, mean, variance, and of how many.

    It is x * scale + shift, so that of the size of x only x is kept for backward.
    """
    mean, variance, n, axes = mean_and_variance(b, x, dims)
    middle, spread = mean, variance
    if axes:
        middle, spread = b.varied(mean, axes), b.varied(variance, axes)
    scale = (spread + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -middle * scale
    if bias is not None:
        shift = bias + shift
    return torch.addcmul(shift, x, scale), mean, variance, n


def _in_float(x: Tensor) -> Tensor:
    """Return 16-bit numbers as float32, in which torch takes statistics."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@rule("group_norm")
def group_norm(
    b: Blocks,
    func: Function,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    layout = b.layout(x)
    if layout[1] is not None:
        raise along_cut("group_norm", 1, "Cut its rows and columns.")
    grouped: Layout = (layout[0], None, None, *layout[2:])
    # of 16 bits, too, statistics are those of float32
    y = b.note(_in_float(x).unflatten(1, (num_groups, -1)), grouped)
    view = [1, num_groups, -1] + [1] * (x.dim() - 2)
    scale, shift = [prepared(b, w, layout, [1], view) for w in (weight, bias)]
    dims = list(range(2, y.dim()))
    out = standardized(b, y, dims, eps, scale, shift)[0]
    return b.note(out.flatten(1, 2).to(x.dtype), layout)


@rule("layer_norm", "rms_norm", "native_layer_norm")
def layer_norm(
    b: Blocks,
    func: Function,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = None,
    cudnn_enabled: bool = True,
) -> Tensor:
    name, layout = func.__name__, b.layout(x)
    if name == "rms_norm" and isinstance(bias, float):
        bias, eps = None, bias
    if name == "native_layer_norm":
        raise no_exact_form(name, "it has no rule", "Use layer_norm.")
    dims = list(range(x.dim() - len(normalized_shape), x.dim()))
    axes = b.axes_of(x)
    if not b.over(layout, dims):
        w = None if weight is None else b.vary(weight, axes)
        if name == "rms_norm":
            return b.note(func(x, normalized_shape, w, eps), layout)
        offset = None if bias is None else b.vary(bias, axes)
        y = func(x, normalized_shape, w, offset, 1e-5 if eps is None else eps)
        return b.note(y, layout)
    scale, shift = [prepared(b, w, layout, dims) for w in (weight, bias)]
    if name == "rms_norm":
        return _rms(b, x, dims, scale, eps)
    wide = b.note(_in_float(x), layout)
    epsilon = 1e-5 if eps is None else eps
    y = standardized(b, wide, dims, epsilon, scale, shift)[0]
    return b.note(y.to(x.dtype), layout)


def _rms(
    b: Blocks, x: Tensor, dims: Sequence[int], scale: Tensor | None, eps: float | None
) -> Tensor:
    layout = b.layout(x)
    squares = total(b, b.note(x.square(), layout), dims)
    middle = b.varied(squares, b.over(layout, dims)) / count(b, x, dims)
    epsilon = torch.finfo(x.dtype).eps if eps is None else eps
    y = x * (middle + epsilon).rsqrt()
    return b.note(y if scale is None else y * scale, layout)


@rule("batch_norm")
def batch_norm(
    b: Blocks,
    func: Function,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    dims = [0, *range(2, x.dim())]
    return _by_channel(
        b, x, (weight, bias), (running_mean, running_var), training, momentum, eps, dims
    )


@rule("instance_norm")
def instance_norm(
    b: Blocks,
    func: Function,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    dims = list(range(2, x.dim()))
    running = (running_mean, running_var)
    if any([b.is_cut(of) for of in running if of is not None]):
        raise no_exact_form("instance_norm", "its statistics are cut", "Cut the rows.")
    return _by_channel(
        b, x, (weight, bias), running, use_input_stats, momentum, eps, dims
    )


def _by_channel(
    b: Blocks,
    x: Tensor,
    affine: tuple[Tensor | None, Tensor | None],
    running: tuple[Tensor | None, Tensor | None],
    uses_own: bool,
    momentum: float,
    eps: float,
    dims: Sequence[int],
) -> Tensor:
    """Normalize each channel by statistics over these dims, or by the running ones."""
    layout = b.layout(x)
    scale, shift = [prepared(b, w, layout, [1]) for w in affine]
    if uses_own:
        wide = b.note(_in_float(x), layout)
        y, mean, variance, n = standardized(b, wide, dims, eps, scale, shift)
        _update(running, mean, variance * n / max(n - 1, 1), momentum, layout)
        return b.note(y.to(x.dtype), layout)
    middle, spread = [prepared(b, of, layout, [1]) for of in running]
    assert middle is not None and spread is not None
    factor = (spread + eps).rsqrt()
    if scale is not None:
        factor = factor * scale
    offset = -middle * factor
    if shift is not None:
        offset = shift + offset
    return b.note(torch.addcmul(offset, x, factor).to(x.dtype), layout)


def _update(
    running: tuple[Tensor | None, Tensor | None],
    mean: Tensor,
    variance: Tensor,
    momentum: float,
    layout: Layout,
) -> None:
    """Move the running statistics, the same on all ranks."""
    is_own = (layout[0] is not None and mean.shape[0] > 1) or layout[1] is not None
    if is_own and running[0] is not None:
        why = "its batch or channels are cut, and its running statistics are not"
        raise no_exact_form("a norm", why, "Pass track_running_stats=False.")
    for old, new in zip(running, (mean, variance), strict=True):
        if old is not None:
            # of each instance: their mean
            own = new.detach().mean(0).flatten()
            with torch.no_grad():
                old.lerp_(own.to(old.dtype), momentum)
