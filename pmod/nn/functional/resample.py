"""Resampling a cut tensor, and pools with a result of a given length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pmod._core.arguments import as_int, as_list, check_tensor, wrong
from pmod._core.bind import unmoved
from pmod._errors import ArgumentError, ShapeError, quoted
from pmod._mesh.axis import Axis
from pmod._torch import constant_in_graphs, no_function_modes, no_transforms
from pmod.nn.functional.given import (
    Axes,
    Held,
    Ints,
    Sizes,
    Spread,
    bound,
    check_choice,
    check_flags,
    check_kind,
    check_result,
    cuts_told,
    held_of,
    shape_error,
    spatial,
)
from pmod.nn.functional.taps import (
    Kind,
    Taps,
    bin_plan,
    resample_plan,
    tapped,
    weighted,
)
from pmod.nn.functional.windows import fetch, fetch_all, not_empty, without

# of one dim
_MODES = {"bilinear": "linear", "trilinear": "linear"}
_ALL_MODES = (
    "nearest",
    "nearest-exact",
    "linear",
    "bilinear",
    "bicubic",
    "trilinear",
    "area",
)


def _spatially(
    function: str, x: Tensor, spread: Spread, count: int
) -> tuple[Axis, dict[int, Held]]:
    """Return the spatial dims, those that are not cut with one shard."""
    bounds = bound(function, spread, -count)
    axis = bounds[0][1]
    cuts = cuts_told(function, spread, bounds)

    def check(at: int, rows: int, of: Axis) -> None:
        if rows < 1:
            said = f"the whole has 0 rows along dim {at}"
            raise wrong(ShapeError, function, of, said, "Pass an input with rows.")

    held = held_of(function, cuts, x, spatial(count, "resampled"), check)
    for at in range(-count, 0):
        held.setdefault(at, Held(axis, (int(x.shape[at]),)))
    return axis, held


@constant_in_graphs
def _torchs_shape(
    whole: tuple[int, ...],
    size: object,
    scale_factor: object,
    mode: str,
    flags: tuple[bool | None, bool | None, bool],
) -> tuple[int, ...] | str:
    """Return the lengths that torch gives the result, or what it says against it."""
    align, recompute, antialias = flags
    with no_transforms(), no_function_modes():
        x = torch.empty((1, 1, *whole), device="meta")
        try:
            y = F.interpolate(
                x,
                size,  # pyright: ignore[reportArgumentType]  # it is torch that checks
                scale_factor,  # pyright: ignore[reportArgumentType]
                mode,
                align,
                recompute,
                antialias,
            )
        except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
            return str(error).partition("\n")[0]
    return tuple(y.shape[2:])


def _plain(given: object) -> object:
    """Return a list as a tuple: compiled code takes it for a constant."""
    listed = as_list(given)
    return given if listed is None else tuple(listed)


def interpolate(
    input: Tensor,
    size: Ints | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.interpolate of the whole.

    size is that of the whole. All modes of torch, for 1 to 3 spatial dims. Row j of the
    result is on the rank that has row floor(j * length / new length) of the input.

    V -> V. Shapes: input (n, channels, k, ...) -> (n, channels, k', ...), k' as long as
    `out_sizes` says.
    Cost: the rows of other ranks that a rank's own rows are made of, once: one or two
    at each border for linear modes.
    Raises: ArgumentError for what torch refuses; ShapeError for sizes that do not fit.

    >>> def doubled():
    ...     x = pmod.shard(torch.tensor([[[0.0, 1.0, 2.0, 3.0]]]), "x", dim=-1)
    ...     return pmod.nn.functional.interpolate(x, scale_factor=2, mode="linear", axis="x")
    >>> pmod.simulate(doubled, x=2)[1]
    tensor([[[1.7500, 2.2500, 2.7500, 3.0000]]])
    """
    function = "nn.functional.interpolate"
    spread = Spread(axis, dim, sizes)
    count = _spatial_dims(function, input, spread)
    check_flags(function, antialias=antialias)
    for name, flag in (
        ("align_corners", align_corners),
        ("recompute_scale_factor", recompute_scale_factor),
    ):
        if flag is not None:
            check_flags(function, **{name: flag})
    of = bound(function, spread, -1)[0][1]
    check_choice(mode, "mode", _ALL_MODES, function, of)
    kind = "real" if mode.startswith("nearest") else "floating"
    check_kind(input, kind, function, of)
    first, held = _spatially(function, input, spread, count)
    whole = tuple([held[at].total for at in range(-count, 0)])
    scales = _plain(scale_factor)
    flags = (align_corners, recompute_scale_factor, bool(antialias))
    lengths = _torchs_shape(whole, _plain(size), scales, mode, flags)
    if isinstance(lengths, str):
        said = f"the whole has {whole}, and torch says: {lengths.rstrip('.')}"
        right = "Pass what torch.nn.functional.interpolate takes."
        raise wrong(ArgumentError, function, first, said, right)
    for at, length in zip(range(-count, 0), lengths, strict=True):
        check_result(at, length, function, first)
    if mode == "area":
        return _means(input, held, dict(zip(range(-count, 0), lengths, strict=True)))
    # of 16 bits torch computes in 32
    x = input
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    factors: list[float | None] = [None] * count
    if scales is not None and not recompute_scale_factor:
        each = scales if isinstance(scales, tuple) else (scales,) * count
        factors = list(map(float, cast(Any, each)))
    for i, at in enumerate(range(-count, 0)):
        align = bool(align_corners)
        kind = Kind(_MODES.get(mode, mode), align, bool(antialias), factors[i])
        if len(held[at].sizes) > 1:
            x = _along(x, at, held[at], lengths[i], kind)
    x = _by_torch(x, held, lengths, factors, (mode, align_corners, bool(antialias)))
    if x is input:
        return unmoved([x])[0]
    return x.to(input.dtype)


def _by_torch(
    x: Tensor,
    held: dict[int, Held],
    lengths: tuple[int, ...],
    said: list[float | None],
    how: tuple[str, bool | None, bool],
) -> Tensor:
    """Resample the dims that are whole here, by torch's function, which leaves others."""
    count, (mode, align, antialias) = len(lengths), how
    size: list[int] = []
    scale: list[float] = []
    same = True
    for i, at in enumerate(range(-count, 0)):
        is_cut = len(held[at].sizes) > 1
        size.append(int(x.shape[at]) if is_cut else lengths[i])
        scale.append(1.0 if is_cut else said[i] or 1.0)
        kept = size[-1] == x.shape[at] and scale[-1] == 1.0
        same = same and (is_cut or (kept and not antialias))
    if same:
        return x
    # of nothing torch makes nothing: a row is resampled, and dropped
    x, empty = not_empty(x, dict.fromkeys(held, 1))
    for at in empty:
        size[at] = 1
    if said[0] is None:
        y = F.interpolate(x, tuple(size), None, mode, align, antialias=antialias)
    else:
        y = F.interpolate(x, None, scale, mode, align, antialias=antialias)
    return without(y, empty)


def _spatial_dims(function: str, x: Tensor, spread: Spread) -> int:
    """Return how many spatial dims there are; x is checked."""
    of = bound(function, spread, -1)[0][1]
    check_tensor(x, function, of, name="input")
    if x.dim() not in (3, 4, 5):
        said = f"input is {tuple(x.shape)}"
        raise wrong(ShapeError, function, of, said, "Pass an input of 3 to 5 dims.")
    return x.dim() - 2


def _along(x: Tensor, at: int, held: Held, to: int, kind: Kind) -> Tensor:
    """Resample one dim."""
    # a length that stays is resampled too, unless torch gives each row as it is
    if to == held.total and kind.scale in (None, 1.0) and not kind.antialias:
        return x
    windows, rows, weights = resample_plan(tuple(kind), to, held.sizes, held.place)
    return weighted(fetch(x, at, held, windows), at, Taps(rows, weights))


# --- adaptive pools -------------------------------------------------------------------


def _adaptive(
    function: str, x: Tensor, output_size: object, spread: Spread, count: int
) -> tuple[dict[int, Held], dict[int, int]]:
    """Return the spatial dims, and the lengths that their results have."""
    of = bound(function, spread, -count)[0][1]
    check_tensor(x, function, of, name="input")
    check_kind(x, "floating" if "avg" in function else "real", function, of)
    error = shape_error(function, of)
    if x.dim() not in (count + 1, count + 2):
        right = f"Pass an input of {count + 1} or {count + 2} dims."
        raise error(f"input is {tuple(x.shape)}", right)
    listed = as_list(output_size)
    wanted = [output_size] * count if listed is None else listed
    lengths = list(map(as_int, wanted))
    fits = len(wanted) == count
    for one, length in zip(wanted, lengths, strict=True):
        fits = fits and (one is None or (length is not None and length >= 1))
    if not fits:
        right = f"Pass an int of 1 or more, or {count} of them; None keeps a length."
        raise error(f"output_size is {quoted(output_size)}", right)
    for i, length in enumerate(lengths):
        check_result(i - count, length or 0, function, of)
    _, held = _spatially(function, x, spread, count)
    to: dict[int, int] = {}
    for at, length in zip(range(-count, 0), lengths, strict=True):
        to[at] = held[at].total if length is None else length
    return held, to


def _means(x: Tensor, held: dict[int, Held], to: dict[int, int]) -> Tensor:
    """Return the mean of each bin, one dim after another.

    A rank adds up its own rows, and what is sent are the sums of bins that borders cut.
    """
    given, wide = x, x
    if x.dtype in (torch.float16, torch.bfloat16):
        wide = x.float()
    y = wide
    for at, cut in held.items():
        if to[at] == cut.total:
            continue
        rows, weights, counts, windows, joins = bin_plan(
            cut.total, to[at], cut.sizes, cut.place
        )
        y = weighted(y, at, Taps(rows, weights))
        parts = fetch(y, at, Held(cut.axis, counts), windows)
        y = weighted(parts, at, _summed(joins))
    if y is wide:
        return unmoved([given])[0]
    return y.to(given.dtype)


def _summed(joins: tuple[tuple[int, ...], ...]) -> Taps:
    """Return taps that add up: a row that only fills up counts once."""
    weights: list[tuple[float, ...]] = []
    for taps in joins:
        weights.append(tuple([float(at not in taps[:i]) for i, at in enumerate(taps)]))
    return Taps(joins, tuple(weights))


def _adaptive_avg_pool(
    x: Tensor, output_size: object, spread: Spread, count: int
) -> Tensor:
    function = f"nn.functional.adaptive_avg_pool{count}d"
    held, to = _adaptive(function, x, output_size, spread, count)
    return _means(x, held, to)


def _adaptive_max_pool(
    x: Tensor, output_size: object, spread: Spread, count: int, indices: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the largest of each bin, and which row of the whole it is."""
    function = f"nn.functional.adaptive_max_pool{count}d"
    check_flags(function, return_indices=indices)
    held, to = _adaptive(function, x, output_size, spread, count)
    found = [x]
    # of equal ones torch takes the first in the order of memory: the last dim first
    for at in sorted(held, reverse=True):
        cut = held[at]
        rows, _, counts, windows, joins = bin_plan(
            cut.total, to[at], cut.sizes, cut.place
        )
        if indices:
            found.append(_numbered(found[0], at, cut))
        found = _largest(found, at, rows)
        found = fetch_all(found, at, Held(cut.axis, counts), windows)
        found = _largest(found, at, joins)
    if not indices:
        return found[0], None
    flat, step = torch.zeros_like(found[1]), 1
    for at, place in zip(sorted(held, reverse=True), found[1:], strict=True):
        flat = flat + place * step
        step *= held[at].total
    return found[0], flat


def _numbered(x: Tensor, at: int, held: Held) -> Tensor:
    """Return the number of each row of the whole, in the shape of x."""
    numbers = torch.arange(x.shape[at], device=x.device) + held.start
    return numbers.view([-1] + [1] * (-at - 1)).expand(x.shape)


def _largest(
    xs: list[Tensor], at: int, rows: tuple[tuple[int, ...], ...]
) -> list[Tensor]:
    """Return the largest of the rows of each bin, and what stands there in the others."""
    taps = Taps(rows, None)
    values, place = tapped(xs[0], at, taps).max(at, keepdim=True)
    out = [values.squeeze(at)]
    for x in xs[1:]:
        out.append(tapped(x, at, taps).gather(at, place).squeeze(at))
    return out


def adaptive_avg_pool1d(
    input: Tensor,
    output_size: int | Sequence[int],
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch's adaptive_avg_pool1d of a whole signal.

    output_size is that of the whole.
    Row j of the result is on the rank that has the first row of its bin.

    V -> V. Shapes: input (..., k) -> (..., k'), as long as `out_sizes` says.
    Cost: one row for each border that falls within a bin, the sum of a rank's part.
    Raises: ShapeError for shapes or sizes that do not fit; ArgumentError for integers.

    >>> def pooled():
    ...     x = pmod.shard(torch.arange(6.0)[None], "x", dim=-1)
    ...     return pmod.nn.functional.adaptive_avg_pool1d(x, 2, axis="x")
    >>> pmod.simulate(pooled, x=3)
    [tensor([[1.]]), tensor([[4.]]), tensor([], size=(1, 0))]
    """
    return _adaptive_avg_pool(input, output_size, Spread(axis, dim, sizes), 1)


def adaptive_avg_pool2d(
    input: Tensor,
    output_size: int | Sequence[int | None] | None,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch's adaptive_avg_pool2d of a whole image.

    output_size is that of the whole.

    V -> V. Shapes: input (..., h, w) -> (..., h', w'), as long as `out_sizes` says.
    Cost, Raises: as `adaptive_avg_pool1d`.

    >>> def pooled():
    ...     return pmod.nn.functional.adaptive_avg_pool2d(torch.ones(1, 2, 6), (4, 3), axis="y").shape
    >>> pmod.simulate(pooled, y=2)[0]
    torch.Size([1, 2, 3])
    """
    return _adaptive_avg_pool(input, output_size, Spread(axis, dim, sizes), 2)


def adaptive_avg_pool3d(
    input: Tensor,
    output_size: int | Sequence[int | None] | None,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch's adaptive_avg_pool3d of a whole volume.

    output_size is that of the whole.

    V -> V. Shapes: input (..., d, h, w) -> (..., d', h', w'), as long as `out_sizes` says.
    Cost, Raises: as `adaptive_avg_pool1d`.

    >>> def pooled():
    ...     return pmod.nn.functional.adaptive_avg_pool3d(torch.ones(1, 2, 6, 6), 2, axis="z").shape
    >>> pmod.simulate(pooled, z=2)[0]
    torch.Size([1, 1, 2, 2])
    """
    return _adaptive_avg_pool(input, output_size, Spread(axis, dim, sizes), 3)


def adaptive_max_pool1d(
    input: Tensor,
    output_size: int | Sequence[int],
    return_indices: bool = False,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return this rank's shard of torch's adaptive_max_pool1d of a whole signal.

    output_size is that of the whole; return_indices: where the largest are, as indices
    of the whole, flattened.

    V -> V. Shapes: input (..., k) -> (..., k'), as long as `out_sizes` says.
    Cost: one row for each border that falls within a bin, the largest of a rank's part,
    and its indices where they are wanted.
    Raises: ShapeError for shapes or sizes that do not fit.

    >>> def pooled():
    ...     x = pmod.shard(torch.arange(6.0)[None], "x", dim=-1)
    ...     return pmod.nn.functional.adaptive_max_pool1d(x, 2, True, axis="x")
    >>> pmod.simulate(pooled, x=2)
    [(tensor([[2.]]), tensor([[2]])), (tensor([[5.]]), tensor([[5]]))]
    """
    spread = Spread(axis, dim, sizes)
    y, places = _adaptive_max_pool(input, output_size, spread, 1, return_indices)
    if places is None:
        return y
    return y, places


def adaptive_max_pool2d(
    input: Tensor,
    output_size: int | Sequence[int | None] | None,
    return_indices: bool = False,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return this rank's shard of torch's adaptive_max_pool2d of a whole image.

    output_size is that of the whole; return_indices: where the largest are, as indices
    of the whole, flattened.

    V -> V. Shapes: input (..., h, w) -> (..., h', w'), as long as `out_sizes` says.
    Cost, Raises: as `adaptive_max_pool1d`.

    >>> def pooled():
    ...     return pmod.nn.functional.adaptive_max_pool2d(torch.ones(1, 2, 6), (4, 3), axis="y").shape
    >>> pmod.simulate(pooled, y=2)[0]
    torch.Size([1, 2, 3])
    """
    spread = Spread(axis, dim, sizes)
    y, places = _adaptive_max_pool(input, output_size, spread, 2, return_indices)
    if places is None:
        return y
    return y, places


def adaptive_max_pool3d(
    input: Tensor,
    output_size: int | Sequence[int | None] | None,
    return_indices: bool = False,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return this rank's shard of torch's adaptive_max_pool3d of a whole volume.

    output_size is that of the whole; return_indices: where the largest are, as indices
    of the whole, flattened.

    V -> V. Shapes: input (..., d, h, w) -> (..., d', h', w'), as long as `out_sizes` says.
    Cost, Raises: as `adaptive_max_pool1d`.

    >>> def pooled():
    ...     return pmod.nn.functional.adaptive_max_pool3d(torch.ones(1, 2, 6, 6), 2, axis="z").shape
    >>> pmod.simulate(pooled, z=2)[0]
    torch.Size([1, 1, 2, 2])
    """
    spread = Spread(axis, dim, sizes)
    y, places = _adaptive_max_pool(input, output_size, spread, 3, return_indices)
    if places is None:
        return y
    return y, places
