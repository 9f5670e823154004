"""Convolutions, pools, padding, interpolation: through pmod.nn.functional.

A rank fetches the rows that its windows reach; `out_sizes` says how the result is cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import FunctionType
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from pmod._domain.blocks import Blocks, label_of
from pmod._domain.layout import Cut, Part, with_cut
from pmod._domain.refusals import along_cut, no_exact_form
from pmod._domain.rules.dims import repeated
from pmod._domain.rules.reductions import mean
from pmod._domain.rules.table import Function, rule
from pmod.nn import functional as sharded


class _Spread(NamedTuple):
    """A tensor whose last dims are spatial, and how these are cut, by dims from the end."""

    x: Tensor
    parts: dict[int, Part]

    @property
    def named(self) -> dict[str, Any]:
        """What a layer of pmod.nn.functional takes by name."""
        axis = {at: label_of(part.axes) for at, part in self.parts.items()}
        return {
            "axis": axis,
            "sizes": {at: part.sizes for at, part in self.parts.items()},
        }


def _spread(b: Blocks, x: Tensor, count: int, name: str, *, channels: bool) -> _Spread:
    """Return how the last `count` dims are cut; channels: whether theirs must be whole."""
    x = b.plain(x)
    layout = b.layout(x)
    if channels and layout[-count - 1] is not None:
        right = "Cut the batch, rows or columns."
        raise along_cut(name, x.dim() - count - 1, right)
    parts: dict[int, Part] = {}
    for at in range(-count, 0):
        cut = layout[at]
        if isinstance(cut, Part):
            parts[at] = cut
    return _Spread(x, parts)


def _noted(
    b: Blocks,
    y: Tensor,
    spread: _Spread,
    name: str,
    numbers: Mapping[int, Sequence[Any]],
) -> Tensor:
    """Note how a result is cut; numbers: those of the layer, of each spatial dim."""
    cuts: list[Cut] = list(b.layout(spread.x))
    for at, part in spread.parts.items():
        sizes = sharded.out_sizes(name, part.sizes, *numbers[at])
        cuts[at] = Part(part.axes, sizes)
    return b.note(y, tuple(cuts))


def _by_dim(count: int, *given: Any) -> dict[int, Sequence[Any]]:
    """Return the numbers of each spatial dim; a word is for all of them."""
    columns: list[list[Any]] = []
    for value in given:
        if isinstance(value, str | bool) or value is None:
            columns.append([value] * count)
        else:
            columns.append(repeated(value, count))
    rows: list[Sequence[Any]] = list(zip(*columns, strict=True))
    return dict(zip(range(-count, 0), rows, strict=True))


@rule("conv1d", "conv2d", "conv3d")
def conv(
    b: Blocks,
    func: Function,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    name, count = func.__name__, weight.dim() - 2
    weight, bias = _varied(b, name, input, weight, bias)
    spread = _spread(b, input, count, name, channels=True)
    numbers = (stride, padding, dilation)
    if not spread.parts:
        y = func(spread.x, weight, bias, *numbers, groups)
        return b.note(y, b.layout(spread.x))
    f = getattr(sharded, name)
    y = f(spread.x, weight, bias, *numbers, groups, **spread.named)
    of = _by_dim(count, list(weight.shape[2:]), *numbers)
    return _noted(b, y, spread, name, of)


def _varied(
    b: Blocks, name: str, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the parameters of a layer for a use that varies as its input."""
    axes = b.axes_of(x)
    for of in (weight, bias):
        if of is not None and b.is_cut(of):
            raise no_exact_form(name, "its weight is cut", "Pass a whole weight.")
    return b.vary(weight, axes), None if bias is None else b.vary(bias, axes)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(
    b: Blocks,
    func: Function,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    name, count = func.__name__, weight.dim() - 2
    weight, bias = _varied(b, name, input, weight, bias)
    spread = _spread(b, input, count, name, channels=True)
    numbers = (stride, padding, output_padding, groups, dilation)
    if not spread.parts:
        y = func(spread.x, weight, bias, *numbers)
        return b.note(y, b.layout(spread.x))
    f = getattr(sharded, name)
    y = f(spread.x, weight, bias, *numbers, **spread.named)
    of = _by_dim(
        count, list(weight.shape[2:]), stride, padding, output_padding, dilation
    )
    return _noted(b, y, spread, name, of)


@rule("max_pool1d", "max_pool2d", "max_pool3d", "max_pool1d_with_indices",
      "max_pool2d_with_indices", "max_pool3d_with_indices", outer=True)  # fmt: skip
def max_pool(
    b: Blocks,
    func: Function,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    name = func.__name__[: len("max_pool2d")]
    wants = return_indices or name != func.__name__
    count = int(name[-2])
    spread = _spread(b, input, count, name, channels=False)
    stride = None if stride in ([], ()) else stride
    numbers = (kernel_size, stride, padding, dilation, ceil_mode)
    if not spread.parts:
        made = func(spread.x, *numbers)
        for y in [made] if isinstance(made, Tensor) else made:
            b.note(y, b.layout(spread.x))
        return made
    f = getattr(sharded, name)
    made = f(spread.x, *numbers, return_indices=wants, **spread.named)
    of = _by_dim(count, *numbers)
    if not wants:
        return _noted(b, made, spread, name, of)
    return tuple([_noted(b, y, spread, name, of) for y in made])


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d")
def avg_pool(
    b: Blocks,
    func: Function,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    *divisor: int | None,
    divisor_override: int | None = None,
) -> Tensor:
    name = func.__name__
    count = int(name[-2])
    spread = _spread(b, input, count, name, channels=False)
    stride = None if stride in ([], ()) else stride
    numbers = (kernel_size, stride, padding, ceil_mode)
    # the pool of one dim does not have one
    own = divisor or ((divisor_override,) if divisor_override is not None else ())
    if not spread.parts:
        y = func(
            spread.x,
            kernel_size,
            stride or kernel_size,
            padding,
            ceil_mode,
            count_include_pad,
            *own,
        )
        return b.note(y, b.layout(spread.x))
    f = getattr(sharded, name)
    y = f(spread.x, *numbers, count_include_pad, *own, **spread.named)
    return _noted(b, y, spread, name, _by_dim(count, *numbers))


@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
      "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
      outer=True)  # fmt: skip
def adaptive_pool(
    b: Blocks,
    func: Function,
    input: Tensor,
    output_size: Any,
    return_indices: bool = False,
) -> Any:
    name = func.__name__
    count = int(name[-2])
    spread = _spread(b, input, count, name, channels=False)
    sizes = list(output_size) if isinstance(output_size, Sequence) else [output_size]
    sizes = sizes * count if len(sizes) == 1 else sizes
    if name.startswith("adaptive_avg") and spread.parts and sizes == [1] * count:
        # a mean is one value, of which every rank needs the same
        return mean(b, func, spread.x, list(range(-count, 0)), True)
    named: dict[str, Any] = dict(spread.named) if spread.parts else {}
    # torch's own, below its functions in Python, returns both
    is_inner = name.startswith("adaptive_max") and not isinstance(func, FunctionType)
    if return_indices or is_inner:
        named["return_indices"] = True
    f = getattr(sharded if spread.parts else F, name)
    made = f(spread.x, sizes, **named)
    of = {i - count: (size,) for i, size in enumerate(sizes)}
    if isinstance(made, Tensor):
        return _noted(b, made, spread, name, of)
    return tuple([_noted(b, y, spread, name, of) for y in made])


@rule("interpolate", outer=True)
def interpolate(
    b: Blocks,
    func: Function,
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    count = input.dim() - 2
    spread = _spread(b, input, count, "interpolate", channels=False)
    numbers = (mode, align_corners, recompute_scale_factor, antialias)
    if not spread.parts:
        y = F.interpolate(spread.x, size, scale_factor, *numbers)
        return b.note(y, b.layout(spread.x))
    f = sharded.interpolate
    y = f(spread.x, size, scale_factor, *numbers, **spread.named)
    sizes, scales = [size] * count, [scale_factor] * count
    if isinstance(size, Sequence):
        sizes = list(size)
    if isinstance(scale_factor, Sequence):
        scales = list(scale_factor)
    pairs = zip(sizes, scales, strict=True)
    of = {i - count: pair for i, pair in enumerate(pairs)}
    return _noted(b, y, spread, "interpolate", of)


@rule("upsample", outer=True)
def upsample(b: Blocks, func: Function, *args: Any, **kwargs: Any) -> Tensor:
    return interpolate(b, func, *args, **kwargs)


MODES = {
    "constant": "zeros",
    "circular": "periodic",
    "reflect": "reflect",
    "replicate": "replicate",
}


@rule("pad", "constant_pad_nd")
def pad(
    b: Blocks,
    func: Function,
    input: Tensor,
    pad: Sequence[int],
    mode: Any = "constant",
    value: float | None = None,
) -> Tensor:
    if func.__name__ == "constant_pad_nd" and not isinstance(mode, str):
        mode, value = "constant", mode
    x = input
    left = list(pad)
    for i in range(len(left) // 2):
        d = x.dim() - 1 - i
        around = (left[2 * i], left[2 * i + 1])
        if b.layout(x)[d] is not None and around != (0, 0):
            left[2 * i], left[2 * i + 1] = 0, 0
            x = _padded(b, x, d, around, mode, value or 0.0)
    if any(left):
        # torch pads nothing in other ways than with zeros
        mode, value = (mode, value) if x.numel() else ("constant", 0.0)
        x = b.note(F.pad(x, left, mode, value), b.layout(x))
    return b.note(x.view_as(x), b.layout(x)) if x is input else x


def _padded(
    b: Blocks, x: Tensor, d: int, around: tuple[int, int], mode: str, value: float
) -> Tensor:
    """Return x with rows of the whole around it, or without its first or last ones.

    Borders keep their places: what a convolution without padding then takes away it
    takes from the last rank, where it was added.
    """
    x = b.plain(x, [d])
    layout, part = b.layout(x), b.layout(x)[d]
    assert isinstance(part, Part)
    before, after = around
    n = part.total + before + after
    limit = {"circular": part.total, "reflect": part.total - 1}.get(mode, n)
    if n < 0 or max(around) > max(limit, 0) or (mode == "replicate" and not part.total):
        right = f"Pad {mode} by at most {limit}."
        raise no_exact_form("pad", f"{around} rows around {part.total}", right)
    new = part.cut_at([*[min(start, n) for start in part.starts[:-1]], n])
    windows: list[tuple[int, int]] = []
    for first, end in pairwise(new.starts):
        windows.append((first - before, end - before) if first < end else (0, 0))
    low, high = windows[b.index(part)]
    if mode == "constant" and value:
        clipped = [_clipped(window, part.total) for window in windows]
        y = b.window(x, d, part, tuple(clipped))
        gaps = _gaps(low, high, part.total)
        y = F.pad(y, [0, 0] * (x.dim() - 1 - d) + gaps, value=value)
    else:
        y = b.window(x, d, part, tuple(windows), MODES[mode])
    return b.note(y, with_cut(layout, d, new))


def _clipped(window: tuple[int, int], n: int) -> tuple[int, int]:
    low, high = max(window[0], 0), min(window[1], n)
    return (low, high) if low < high else (0, 0)


def _gaps(low: int, high: int, n: int) -> list[int]:
    """Return how many rows of a window lie before the whole, and behind it."""
    rows = high - low
    before = min(max(-low, 0), rows)
    return [before, min(max(high - n, 0), rows - before)]
