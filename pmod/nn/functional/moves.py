"""Rows of a cut tensor that move: padding, rolling, flipping, joining, other cuts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pmod._collectives.cuts import Cut, axes_by_dim, too_wide
from pmod._core.arguments import (
    LONGEST,
    as_int,
    as_list,
    as_real,
    check_sizes,
    check_tensor,
    dim_from_end,
    wrong,
)
from pmod._core.bind import unmoved
from pmod._errors import ArgumentError, ShapeError, quoted
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import AxisLike
from pmod.nn.functional.given import (
    Along,
    Axes,
    Held,
    Ints,
    Sizes,
    Spread,
    any_dim,
    bound,
    check_choice,
    check_kind,
    cuts_told,
    held_of,
    ints,
    no_check,
    shape_error,
)
from pmod.nn.functional.windows import (
    Mirror,
    Shift,
    Slide,
    begins,
    fetch,
    filled,
    layout,
    rows_of,
)

# torch's name, and that of a halo
_MODES = {
    "constant": "zeros",
    "circular": "periodic",
    "reflect": "reflect",
    "replicate": "replicate",
}


def _fresh(y: Tensor, x: Tensor) -> Tensor:
    """Return y as a tensor of its own, where nothing moved."""
    return unmoved([x])[0] if y is x else y


# --- padding --------------------------------------------------------------------------


def _pads(
    given: Sequence[int], x: Tensor, function: str, axis: Axis
) -> dict[int, tuple[int, int]]:
    """Return the rows before and after of each dim that is padded."""
    listed = as_list(given)
    parsed = [] if listed is None else list(map(as_int, listed))
    numbers = [one for one in parsed if one is not None and abs(one) <= LONGEST]
    is_whole = listed is not None and len(numbers) == len(listed)
    if not is_whole or len(numbers) % 2 or len(numbers) > 2 * x.dim():
        said = f"pad is {quoted(given)} and input has {x.dim()} dims"
        right = "Pass two ints for each dim, those of the last dim first."
        raise wrong(ShapeError, function, axis, said, right)
    out: dict[int, tuple[int, int]] = {}
    for i in range(len(numbers) // 2):
        out[-1 - i] = (numbers[2 * i], numbers[2 * i + 1])
    return out


def _check_value(function: str, value: object, dtype: torch.dtype, of: Axis) -> None:
    """Raise unless a number may stand in a tensor of this dtype."""
    number = 0 if value is None else as_real(value)
    try:
        if number is not None:
            torch.full((), number, dtype=dtype)
            return
    except (OverflowError, RuntimeError):
        # it is too large
        pass
    said = f"value is {quoted(value)}"
    right = f"Pass a real number that {dtype} can hold."
    raise wrong(ArgumentError, function, of, said, right)


def pad(
    input: Tensor,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.pad of the whole.

    Only the ends of the whole are padded: what is added before is on the first rank,
    what is added after on the last, and what negative numbers take away is taken from
    there. dim: the first one that is padded, unless given. Every mode works along any
    dim.

    V -> V. Shapes: input (..., k, ...) -> (..., k', ...), k' being `out_sizes("pad", k,
    before, after)`.
    Cost: the rows that a mode copies from another rank, once; nothing of constants.
    Raises: ShapeError for a pad that torch would not allow; ArgumentError for another
    mode.

    >>> def padded():
    ...     x = pmod.shard(torch.arange(1.0, 5.0), "x")
    ...     return pmod.nn.functional.pad(x, (1, 2), "circular", axis="x")
    >>> pmod.simulate(padded, x=2)
    [tensor([4., 1., 2.]), tensor([3., 4., 1., 2.])]
    """
    function = "nn.functional.pad"
    count = max(1, len(pad) // 2 if isinstance(pad, Sequence) else 1)  # pyright: ignore[reportUnnecessaryIsInstance]
    spread = Spread(axis, dim, sizes)
    bounds = bound(function, spread, -count)
    first = bounds[0][1]
    check_tensor(input, function, first, name="input")
    check_kind(input, "of numbers", function, first)
    _check_value(function, value, input.dtype, first)
    check_choice(mode, "mode", _MODES, function, first)
    pads = _pads(pad, input, function, first)
    cuts = cuts_told(function, spread, bounds)

    def check(at: int, rows: int, of: Axis) -> None:
        before, after = pads.get(at, (0, 0))
        said = f"pad is {quoted(pad)} and the whole has {rows} rows along dim {at}"
        error = shape_error(function, of)
        if rows + before + after < 0:
            raise error(said, "Take away at most all of them.")
        around = (max(before, 0), max(after, 0))
        limit = too_wide(around, rows, _MODES[mode])
        if limit is not None:
            right = f"Pass at most {limit} rows with mode={mode!r}."
            raise error(said, right)

    held = held_of(function, cuts, input, any_dim(input), check)
    x, local = input, list(pad)
    for at, (before, after) in pads.items():
        cut = held.get(at)
        if cut is None and mode == "constant":
            continue
        local[-2 * at - 2] = local[-2 * at - 1] = 0
        shift = Shift(before, after)
        cut = cut or Held(first, (int(x.shape[at]),))
        if mode == "constant":
            x, _ = filled(x, at, cut, layout(shift, cut.sizes).windows, value or 0.0)
        else:
            x = rows_of(x, at, cut, shift, _MODES[mode])
    if any(local):
        return F.pad(x, local, value=value)
    return _fresh(x, input)


# --- rolling and flipping -------------------------------------------------------------


def _dims(
    given: object, x: Tensor, function: str, axis: Axis, name: str = "dims"
) -> list[int]:
    """Return several dims, counted from the end."""
    listed = as_list(given)
    dims = [given] if listed is None else listed
    return [dim_from_end(dim, x, function, axis, name=name) for dim in dims]


def _first_of(dims: object) -> int:
    """Return the dim that is cut where the caller names an axis alone."""
    listed = as_list(dims)
    first = listed[0] if listed else dims
    number = as_int(first)
    return 0 if number is None else number


def roll(
    input: Tensor,
    shifts: Ints,
    dims: Ints,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.roll of the whole.

    dim: the first of `dims`, unless given. Without dims torch rolls a flattened tensor,
    which no shard is a run of: here dims are named.

    V -> V. Shapes: input (..., k, ...) -> (..., k, ...).
    Cost: each row that changes its rank, once.
    Raises: ShapeError for shifts, dims or sizes that do not fit.

    >>> def rolled():
    ...     x = pmod.shard(torch.arange(5), "x")
    ...     return pmod.nn.functional.roll(x, 1, 0, axis="x")
    >>> pmod.simulate(rolled, x=2)
    [tensor([4, 0, 1]), tensor([2, 3])]
    """
    function = "nn.functional.roll"
    spread = Spread(axis, dim, sizes)
    bounds = bound(function, spread, _first_of(dims))
    first = bounds[0][1]
    check_tensor(input, function, first, name="input")
    check_kind(input, "of numbers", function, first)
    ats = _dims(dims, input, function, first)
    steps = list(map(as_int, as_list(shifts) or [shifts]))
    if len(steps) != len(ats) or None in steps:
        said = f"shifts is {quoted(shifts)} and dims {quoted(dims)}"
        raise wrong(ShapeError, function, first, said, "Pass an int for each dim.")
    held = held_of(function, cuts_told(function, spread, bounds), input, any_dim(input))
    x = input
    for step, at in zip(steps, ats, strict=True):
        assert step is not None
        cut = held.get(at)
        if cut is None:
            x = x.roll(step, at)
        elif cut.total:
            turned = step % cut.total
            x = rows_of(x, at, cut, Shift(turned, -turned, True), "periodic")
    return _fresh(x, input)


def flip(
    input: Tensor,
    dims: Ints,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.flip of the whole.

    dim: the first of `dims`, unless given.

    V -> V. Shapes: input (..., k, ...) -> (..., k, ...).
    Cost: each row that changes its rank, once.
    Raises: ShapeError for dims or sizes that do not fit.

    >>> def flipped():
    ...     x = pmod.shard(torch.arange(5), "x")
    ...     return pmod.nn.functional.flip(x, 0, axis="x")
    >>> pmod.simulate(flipped, x=2)
    [tensor([4, 3, 2]), tensor([1, 0])]
    """
    function = "nn.functional.flip"
    spread = Spread(axis, dim, sizes)
    bounds = bound(function, spread, _first_of(dims))
    check_tensor(input, function, bounds[0][1], name="input")
    check_kind(input, "of numbers", function, bounds[0][1])
    ats = _dims(dims, input, function, bounds[0][1])
    if len(set(ats)) != len(ats):
        said = f"dims is {quoted(dims)}"
        raise wrong(ShapeError, function, bounds[0][1], said, "Name each dim once.")
    held = held_of(function, cuts_told(function, spread, bounds), input, any_dim(input))
    x = input
    for at in ats:
        if at in held:
            x = rows_of(x, at, held[at], Mirror())
    return x.flip(ats)


def diff(
    input: Tensor,
    n: int = 1,
    dim: int = -1,
    *,
    axis: Axes,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.diff of the whole along a dim.

    An axis alone is that of `dim`. What torch prepends or appends is joined before,
    with `cat`.

    V -> V. Shapes: input (..., k, ...) -> (..., k, ...), n fewer on the last ranks.
    Cost: n rows to the rank before.
    Raises: ShapeError for an n, a dim or sizes that do not fit.

    >>> def differences():
    ...     x = pmod.shard(torch.tensor([1, 2, 4, 8, 16]), "x")
    ...     return pmod.nn.functional.diff(x, axis="x")
    >>> pmod.simulate(differences, x=2)
    [tensor([1, 2, 4]), tensor([8])]
    """
    function = "nn.functional.diff"
    bounds = bound(function, Spread(axis, None, sizes), dim)
    of = bounds[0][1]
    check_tensor(input, function, of, name="input")
    check_kind(input, "of numbers", function, of)
    at = dim_from_end(dim, input, function, of)
    (order,) = ints(n, "n", 1, 0, shape_error(function, of))
    cuts = cuts_told(function, Spread(axis, None, sizes), bounds)
    held = held_of(function, cuts, input, any_dim(input))
    if at not in held:
        return torch.diff(input, order, at)
    cut = held[at]
    if cut.total <= order:
        return input.narrow(at, 0, 0)
    rule = Slide(order + 1, 1, (0, 0), 1)
    first, end = layout(rule, cut.sizes).rows(cut.place)
    y = torch.diff(rows_of(input, at, cut, rule), order, at)
    # a rank without a row of the result has an empty window, of which torch makes none
    return y.narrow(at, 0, end - first)


# --- joining, other cuts --------------------------------------------------------------


def recut(
    input: Tensor,
    to: Sequence[int],
    *,
    axis: AxisLike,
    dim: int = 0,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """Return the same whole, cut in shards of other lengths.

    V -> V. Shapes: input (..., sizes[i], ...) -> (..., to[i], ...) on rank i.
    Cost: each row that changes its rank, once.
    Raises: ShapeError for lengths that do not add up to the whole.

    >>> def again():
    ...     x = pmod.shard(torch.arange(5), "x", sizes=(4, 1))
    ...     return pmod.nn.functional.recut(x, (2, 3), axis="x", sizes=(4, 1))
    >>> pmod.simulate(again, x=2)
    [tensor([0, 1]), tensor([2, 3, 4])]
    """
    function = "nn.functional.recut"
    spread = Spread(axis, dim, sizes)
    bounds = axes_by_dim(function, axis, dim, 0)
    of = bounds[0][1]
    check_tensor(input, function, of, name="input")
    wanted = check_sizes(to, function, of, name="to")

    def check(at: int, rows: int, of: Axis) -> None:
        if rows != sum(wanted):
            said = f"to {wanted} adds up to {sum(wanted)} but the whole has {rows} rows"
            right = f"Pass lengths that add up to {rows}."
            raise wrong(ShapeError, function, of, said, right)

    at = dim_from_end(dim, input, function, of)
    along = Along((at,), "", "")
    cuts = cuts_told(function, spread, bounds)
    # of the shards alone, no sum is known before
    held = held_of(function, cuts, input, along, check)[at]
    windows = tuple(pairwise(begins(wanted)))
    return _fresh(fetch(input, at, held, windows), input)


def cat(
    tensors: Sequence[Tensor],
    dim: int = 0,
    *,
    axis: Axes,
    sizes: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Return this rank's shard of torch.cat of the wholes.

    An axis alone is that of `dim`; where `dim` is not cut, nothing moves.
    sizes: along `dim`, the lengths of each tensor's shards, a list for each.

    V -> V. Shapes: each (..., k, ...) -> (..., their sum, ...): a rank has as many rows
    of the result as of all tensors together.
    Cost: each row that changes its rank, once.
    Raises: ShapeError for shapes, a dim or sizes that do not fit.

    >>> def joined():
    ...     x = pmod.shard(torch.arange(4), "x")
    ...     return pmod.nn.functional.cat([x, 10 * x], axis="x")
    >>> pmod.simulate(joined, x=2)
    [tensor([0, 1, 2, 3]), tensor([ 0, 10, 20, 30])]
    """
    function = "nn.functional.cat"
    bounds = axes_by_dim(function, axis, None, dim)
    first = bounds[0][1]
    xs = list(tensors) if isinstance(tensors, tuple | list) else []
    if not xs:
        said = f"tensors is {quoted(tensors)}"
        raise wrong(ArgumentError, function, first, said, "Pass a list of tensors.")
    for i, x in enumerate(xs):
        check_tensor(x, function, first, name=f"tensors[{i}]")
    at = dim_from_end(dim, xs[0], function, first)
    of = {dim_from_end(key, xs[0], function, first): one for key, one in bounds}.get(at)
    if of is None:
        return torch.cat(xs, at)
    held = _held_of_all(function, xs, at, of, sizes)
    by_rank = zip(*[one.sizes for one in held], strict=True)
    borders = list(pairwise(begins(tuple(map(sum, by_rank)))))
    parts: list[Tensor] = []
    before = 0
    for x, one in zip(xs, held, strict=True):
        windows: list[tuple[int, int]] = []
        for start, end in borders:
            low = min(max(start - before, 0), one.total)
            windows.append((low, min(max(end - before, low), one.total)))
        parts.append(fetch(x, at, one, tuple(windows)))
        before += one.total
    return torch.cat(parts, at)


def _held_of_all(
    function: str, xs: list[Tensor], at: int, axis: Axis, sizes: object
) -> list[Held]:
    """Return how each of several tensors is cut along one dim."""
    told = [None] * len(xs) if sizes is None else as_list(sizes)
    if told is None or len(told) != len(xs):
        said = f"sizes is {quoted(sizes)} and there are {len(xs)} tensors"
        raise wrong(
            ShapeError, function, axis, said, "Pass a list of lengths for each."
        )
    cuts: list[Cut] = []
    for x, one in zip(xs, told, strict=True):
        if x.dim() != xs[0].dim():
            said = f"tensors have {xs[0].dim()} and {x.dim()} dims"
            right = "Pass tensors of as many dims."
            raise wrong(ShapeError, function, axis, said, right)
        lengths = None if one is None else check_sizes(cast(Any, one), function, axis)
        cuts.append(Cut(axis, at, (0, 0), "zeros", lengths))
    along = Along((at,), "", "")
    out: list[Held] = []
    for x, cut in zip(xs, cuts, strict=True):
        out.append(held_of(function, [cut], x, along, no_check)[at])
    return out
