"""How long the shards of a result are: `out_sizes`, the next layer's `sizes`."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

from pmod._core.arguments import as_int, as_real, split_sizes
from pmod._errors import ArgumentError, PmodError, ShapeError, near_miss, phrase, quoted
from pmod.nn.functional.blocks import fold_spray
from pmod.nn.functional.conv import (
    SprayNumbers,
    check_length,
    check_made,
    slides,
    sprays,
)
from pmod.nn.functional.given import Wrong, ints
from pmod.nn.functional.pools import PoolWindows, check_pooled, pool_slides
from pmod.nn.functional.windows import Rule, Scale, Shift, Slide, lengths

Lengths = tuple[int, ...]


def _laid(rule: Rule, sizes: Lengths) -> Lengths:
    return lengths(rule.starts(sizes))


def _conv(
    error: Wrong,
    sizes: Lengths,
    kernel_size: int,
    stride: int = 1,
    padding: int | str = 0,
    dilation: int = 1,
) -> Lengths:
    kernel = ints(kernel_size, "kernel_size", 1, 1, error)
    (of,) = slides(kernel, stride, padding, dilation, error)
    check_length(of, sum(sizes), "", error)
    return _laid(of, sizes)


def _conv_transpose(
    error: Wrong,
    sizes: Lengths,
    kernel_size: int,
    stride: int = 1,
    padding: int = 0,
    output_padding: int = 0,
    dilation: int = 1,
) -> Lengths:
    kernel = ints(kernel_size, "kernel_size", 1, 1, error)
    (of,) = sprays(
        kernel, SprayNumbers(stride, padding, output_padding, dilation), error
    )
    check_made(of, sum(sizes), "", error)
    return _laid(of, sizes)


def _max_pool(
    error: Wrong,
    sizes: Lengths,
    kernel_size: int,
    stride: int | None = None,
    padding: int = 0,
    dilation: int = 1,
    ceil_mode: bool = False,
) -> Lengths:
    given = PoolWindows(kernel_size, stride, padding, dilation, ceil_mode)
    (of,) = pool_slides(given, 1, error)
    check_pooled(of, sum(sizes), "", error)
    return _laid(of, sizes)


def _avg_pool(
    error: Wrong,
    sizes: Lengths,
    kernel_size: int,
    stride: int | None = None,
    padding: int = 0,
    ceil_mode: bool = False,
) -> Lengths:
    return _max_pool(error, sizes, kernel_size, stride, padding, 1, ceil_mode)


def _lp_pool(
    error: Wrong,
    sizes: Lengths,
    kernel_size: int,
    stride: int | None = None,
    ceil_mode: bool = False,
) -> Lengths:
    return _max_pool(error, sizes, kernel_size, stride, 0, 1, ceil_mode)


def _unfold(
    error: Wrong,
    sizes: Lengths,
    kernel_size: int,
    dilation: int = 1,
    padding: int = 0,
    stride: int = 1,
) -> Lengths:
    return _conv(error, sizes, kernel_size, stride, padding, dilation)


def _fold(
    error: Wrong,
    sizes: Lengths,
    output_size: int,
    kernel_size: int,
    dilation: int = 1,
    padding: int = 0,
    stride: int = 1,
) -> Lengths:
    kernel = ints(kernel_size, "kernel_size", 1, 1, error)
    (of,) = slides(kernel, stride, padding, dilation, error)
    (length,) = ints(output_size, "output_size", 1, 1, error)
    if of.length(length) != sum(sizes):
        right = f"Pass shards of {of.length(length)} windows."
        raise error(f"sizes is {sizes} and output_size {length}", right)
    return _laid(fold_spray(of, length, sum(sizes)), sizes)


def _pad(error: Wrong, sizes: Lengths, before: int, after: int) -> Lengths:
    rows = [as_int(before), as_int(after)]
    if None in rows or sum(sizes) + before + after < 0:
        right = "Pass ints, that take away at most all rows."
        raise error(f"pad is {quoted((before, after))} and sizes {sizes}", right)
    return _laid(Shift(before, after), sizes)


def _diff(error: Wrong, sizes: Lengths, n: int = 1) -> Lengths:
    (order,) = ints(n, "n", 1, 0, error)
    if order >= sum(sizes):
        return (0,) * len(sizes)
    return _laid(Slide(order + 1, 1, (0, 0), 1), sizes)


def _cat(error: Wrong, sizes: Lengths, *others: Sequence[int]) -> Lengths:
    out = sizes
    for other in others:
        more = as_lengths(other, error)
        if len(more) != len(sizes):
            right = "Pass as many lengths of each tensor."
            raise error(f"sizes is {sizes} and {more}", right)
        out = tuple(map(operator.add, out, more))
    return out


def _shuffle(error: Wrong, sizes: Lengths, upscale_factor: int) -> Lengths:
    (factor,) = ints(upscale_factor, "upscale_factor", 1, 1, error)
    return tuple(size * factor for size in sizes)


def _unshuffle(error: Wrong, sizes: Lengths, downscale_factor: int) -> Lengths:
    (factor,) = ints(downscale_factor, "downscale_factor", 1, 1, error)
    return _conv(error, sizes, factor, factor)


def _interpolate(
    error: Wrong,
    sizes: Lengths,
    size: int | None = None,
    scale_factor: float | None = None,
) -> Lengths:
    rows, scale = as_int(size), as_real(scale_factor)
    if scale is not None and scale > 0 and size is None:
        # as torch has it
        rows = math.floor(float(sum(sizes)) * scale)
    if rows is None or rows < 1 or (size is not None and scale_factor is not None):
        given = f"size is {quoted(size)} and scale_factor {quoted(scale_factor)}"
        raise error(given, "Pass the whole's new length, or a positive factor.")
    return _laid(Scale(rows), sizes)


def _adaptive(error: Wrong, sizes: Lengths, output_size: int | None) -> Lengths:
    if output_size is None:
        return sizes
    (rows,) = ints(output_size, "output_size", 1, 1, error)
    return _laid(Scale(rows), sizes)


def _topk(error: Wrong, sizes: Lengths, k: int) -> Lengths:
    (count,) = ints(k, "k", 1, 0, error)
    if count > sum(sizes):
        raise error(f"k is {count} and sizes {sizes}", "Pass at most all rows.")
    return split_sizes(count, len(sizes))


def _same(error: Wrong, sizes: Lengths, *args: object, **kwargs: object) -> Lengths:
    return sizes


# their shards are as long as those of their input
_KEEPING = (
    "roll",
    "flip",
    "batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "rms_norm",
    "softmax",
    "log_softmax",
    "cumsum",
    "sort",
)

_LAWS: dict[str, Callable[..., Lengths]] = {
    "conv?d": _conv,
    "conv_transpose?d": _conv_transpose,
    "max_pool?d": _max_pool,
    "avg_pool?d": _avg_pool,
    "lp_pool?d": _lp_pool,
    "adaptive_avg_pool?d": _adaptive,
    "adaptive_max_pool?d": _adaptive,
    "interpolate": _interpolate,
    "unfold": _unfold,
    "fold": _fold,
    "pixel_shuffle": _shuffle,
    "pixel_unshuffle": _unshuffle,
    "pad": _pad,
    "diff": _diff,
    "cat": _cat,
    "topk": _topk,
    **dict.fromkeys(_KEEPING, _same),
}


def _law_of(function: str | Callable[..., Any]) -> Callable[..., Lengths]:
    """Return the law of a layer: conv of conv1d to conv3d."""
    name = getattr(function, "__name__", str(function))
    law = _LAWS.get(name)
    if law is None and name[-2:] in ("1d", "2d", "3d"):
        law = _LAWS.get(f"{name[:-2]}?d")
    if law is None:
        raise _unknown(name)
    return law


def out_sizes(
    function: str | Callable[..., Any],
    sizes: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> tuple[int, ...]:
    """Return how long the shards of a layer's result are along a dim.

    function: a layer of `pmod.nn.functional` or of torch.nn.functional, or its name;
    sizes: the lengths of its input's shards. What follows are the layer's own numbers
    of that dim: `kernel_size` where it takes a weight, and no tensors. Nothing is sent.

    Raises: ShapeError for sizes or numbers that do not fit; ArgumentError for a
    function that it does not know.

    >>> rows = pmod.split_sizes(10, 3)
    >>> rows, pmod.nn.functional.out_sizes("conv2d", rows, 3, padding=1)
    ((4, 4, 2), (4, 4, 2))
    >>> pmod.nn.functional.out_sizes("max_pool2d", rows, 3, stride=2)
    (2, 2, 0)
    """

    def error(given: str, right: str) -> PmodError:
        return ShapeError(phrase("nn.functional.out_sizes", given, right))

    law = _law_of(function)
    return law(error, as_lengths(sizes, error), *args, **kwargs)


def as_lengths(sizes: Sequence[int], error: Wrong) -> Lengths:
    """Return the lengths of the shards."""
    listed = list(sizes) if isinstance(sizes, Sequence) else []  # pyright: ignore[reportUnnecessaryIsInstance]
    held = tuple(
        [size for size in map(as_int, listed) if size is not None and size >= 0]
    )
    if not held or len(held) != len(listed):
        right = "Pass ints of 0 or more, one per rank of the axis."
        raise error(f"sizes is {quoted(sizes)}", right)
    return held


def _unknown(name: str) -> PmodError:
    known: list[str] = []
    for law in _LAWS:
        known += [
            law.replace("?", count) for count in ("1", "2", "3")[: 1 + 2 * ("?" in law)]
        ]
    given = f"function is {quoted(name)}{near_miss(name, known)}"
    right = "Pass a layer of pmod.nn.functional, or its name."
    return ArgumentError(phrase("nn.functional.out_sizes", given, right))
