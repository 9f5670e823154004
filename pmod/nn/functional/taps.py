"""Rows of a result that are made of a few rows each: resampling and adaptive pools.

A tap is a row that a row of the result is made of, with its weight. Those of a
resampling are read off torch's own function, so that the numbers are torch's.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from pmod._collectives.halo_plan import Windows
from pmod._torch import constant_in_graphs, no_function_modes, no_transforms
from pmod.nn.functional.windows import Scale, Sizes, begins

Rows: TypeAlias = tuple[tuple[int, ...], ...]
"""Of each row of a result, the rows that it is made of: as many, the last one repeated."""
Weights: TypeAlias = tuple[tuple[float, ...], ...]


class Taps(NamedTuple):
    """A rank's rows of a result, made of a window's rows; without weights, chosen of them."""

    rows: Rows
    weights: Weights | None

    @property
    def width(self) -> int:
        """How many rows each is made of, 1 where there is no row."""
        return len(self.rows[0]) if self.rows else 1


def _even(rows: list[list[int]], weights: list[list[float]] | None) -> Taps:
    """Return taps, as many for each row: what is added weighs nothing."""
    width = max(map(len, rows), default=1)
    out: list[tuple[int, ...]] = []
    for taps in rows:
        out.append((*taps, *[taps[-1]] * (width - len(taps))))
    if weights is None:
        return Taps(tuple(out), None)
    heavy: list[tuple[float, ...]] = []
    for shares in weights:
        heavy.append((*shares, *[0.0] * (width - len(shares))))
    # rows that are taken as they are need no multiplication, and keep their dtype
    if width == 1 and all(shares == (1.0,) for shares in heavy):
        return Taps(tuple(out), None)
    return Taps(tuple(out), tuple(heavy))


def tapped(x: Tensor, at: int, taps: Taps) -> Tensor:
    """Return the rows that taps lead to, in a dim of their own after that of the result."""
    index = torch.tensor(taps.rows, dtype=torch.int64, device=x.device).flatten()
    return x.index_select(at, index).unflatten(at, (len(taps.rows), taps.width))


def weighted(x: Tensor, at: int, taps: Taps) -> Tensor:
    """Return the rows of a result that are sums of rows of x."""
    y = tapped(x, at, taps)
    if taps.weights is None:
        return y.select(at, 0) if taps.width == 1 else y.sum(at)
    weights = torch.tensor(taps.weights, dtype=x.dtype, device=x.device)
    shape = [len(taps.rows), taps.width] + [1] * (-at - 1)
    return (y * weights.view(shape)).sum(at)


# --- resampling -----------------------------------------------------------------------


class Kind(NamedTuple):
    """How torch resamples one dim."""

    mode: str
    align: bool | None
    antialias: bool
    scale: float | None
    """What the caller said, if the coordinates follow it; None if they follow the lengths."""


def _width(kind: Kind, rows: int, to: int) -> int:
    """Return more rows than any row of the result is made of."""
    ratio = rows / to if kind.scale is None else 1 / kind.scale
    support = {"nearest": 1, "nearest-exact": 1, "bicubic": 4}.get(kind.mode, 2)
    if kind.antialias:
        support = math.ceil(support * max(ratio, 1.0)) + 1
    return min(support + 1, rows)


def _resampled(probe: Tensor, to: int, kind: Kind) -> Tensor:
    """Return what torch makes of the rows of a (channels, rows)."""
    is_flat = kind.mode != "bicubic" and not kind.antialias
    mode = kind.mode
    if not is_flat and mode == "linear":
        mode = "bilinear"
    # along the last dim: of images one column wide torch's antialias is another
    x = probe.unsqueeze(0) if is_flat else probe[None, :, None, :]
    size = scale = None
    if kind.scale is None:
        size = (to,) if is_flat else (1, to)
    else:
        scale = (kind.scale,) if is_flat else (1.0, kind.scale)
    align = kind.align if mode in ("linear", "bilinear", "bicubic") else None
    y = F.interpolate(
        x,
        size,
        scale,
        mode,
        align,
        recompute_scale_factor=None,
        antialias=kind.antialias,
    )
    return y[0] if is_flat else y[0, :, 0]


@lru_cache(maxsize=128)
def _resampling(kind: Kind, rows: int, to: int) -> tuple[list[list[int]], Weights]:
    """Return the taps of the whole, of any width.

    A probe has ones at every `width`-th row. Of these a row of the result meets one at
    most: what it becomes is its weight, and a second probe, of the rows' numbers, says
    which row it is.
    """
    width = _width(kind, rows, to)
    with no_transforms(), no_function_modes(), torch.no_grad():
        numbers = torch.arange(rows, dtype=torch.float64)
        classes = torch.arange(width, dtype=torch.float64)[:, None]
        ones = (numbers.remainder(width) == classes).double()
        probes = torch.cat([ones, ones * (numbers + 1)])
        shares, places = _resampled(probes, to, kind).T.split(width, 1)
        found = (places / shares).round().nan_to_num(0.0).long() - 1
    out: list[list[int]] = []
    weights: list[tuple[float, ...]] = []
    for at, share in zip(found.tolist(), shares.tolist(), strict=True):
        pairs = sorted([pair for pair in zip(at, share, strict=True) if pair[1] != 0.0])
        # a row of zeros would have no tap
        pairs = pairs or [(0, 0.0)]
        out.append([row for row, _ in pairs])
        weights.append(tuple([part for _, part in pairs]))
    return out, tuple(weights)


@lru_cache(maxsize=256)
def _resample_plan(
    kind: tuple[object, ...], to: int, sizes: Sizes, place: int
) -> tuple[Windows, Rows, Weights | None]:
    rows, weights = _resampling(Kind(*kind), sum(sizes), to)  # pyright: ignore[reportArgumentType]
    windows: list[tuple[int, int]] = []
    own = Taps((), None)
    for i, (first, end) in enumerate(pairwise(Scale(to).starts(sizes))):
        low = high = 0
        if first < end:
            low = min(map(min, rows[first:end]))
            high = max(map(max, rows[first:end])) + 1
        windows.append((low, high))
        if i == place:
            mine: list[list[int]] = []
            for taps in rows[first:end]:
                mine.append([row - low for row in taps])
            own = _even(mine, list(map(list, weights[first:end])))
    return tuple(windows), own.rows, own.weights


@constant_in_graphs
def resample_plan(
    kind: tuple[object, ...], to: int, sizes: Sizes, place: int
) -> tuple[Windows, Rows, Weights | None]:
    """Return each rank's window, and this one's taps."""
    return _resample_plan(kind, to, sizes, place)


# --- adaptive pools -------------------------------------------------------------------


@lru_cache(maxsize=256)
def _bin_plan(
    rows: int, to: int, sizes: Sizes, place: int
) -> tuple[Rows, Weights, Sizes, Windows, Rows]:
    bins: list[tuple[int, int]] = []
    for j in range(to):
        bins.append((j * rows // to, -(-(j + 1) * rows // to)))
    # what each rank makes of its own rows: of every bin that has one of them, a part
    parts: list[int] = []
    counts: list[int] = []
    own = Taps((), ())
    for i, (start, end) in enumerate(pairwise(begins(sizes))):
        first = last = 0
        if start < end:
            first, last = start * to // rows, -(-end * to // rows)
        parts += range(first, last)
        counts.append(last - first)
        if i == place:
            own = _own_parts(bins, first, last, start, end)
    # the parts of all ranks are in the order of the bins
    windows: list[tuple[int, int]] = []
    joins = Taps((), None)
    for i, (first, end) in enumerate(pairwise(Scale(to).starts(sizes))):
        inside = [at for at, of in enumerate(parts) if first <= of < end]
        low, high = (inside[0], inside[-1] + 1) if inside else (0, 0)
        windows.append((low, high))
        if i == place:
            joins = _joins(parts, range(first, end), low, high)
    assert own.weights is not None
    return own.rows, own.weights, tuple(counts), tuple(windows), joins.rows


def _own_parts(
    bins: list[tuple[int, int]], first: int, last: int, start: int, end: int
) -> Taps:
    """Return the rows of a shard that each bin has, each with its share of the mean."""
    rows: list[list[int]] = []
    weights: list[list[float]] = []
    for low, high in bins[first:last]:
        inside = range(max(low, start) - start, min(high, end) - start)
        rows.append(list(inside))
        weights.append([1 / (high - low)] * len(inside))
    of = _even(rows, weights)
    if of.weights is None:
        return Taps(of.rows, ((1.0,),) * len(of.rows))
    return of


def _joins(parts: list[int], bins: range, low: int, high: int) -> Taps:
    """Return which parts of a window make up each bin."""
    found: list[list[int]] = []
    for j in bins:
        found.append([at - low for at in range(low, high) if parts[at] == j])
    return _even(found, None)


@constant_in_graphs
def bin_plan(
    rows: int, to: int, sizes: Sizes, place: int
) -> tuple[Rows, Weights, Sizes, Windows, Rows]:
    """Return how a rank pools: its own rows, then the parts of others.

    The taps of its own rows with their weights; how many parts each rank makes; which
    of them, one after another, each rank needs; and the taps of these.
    """
    return _bin_plan(rows, to, sizes, place)
