"""Pools of a cut tensor: the largest, the mean or the norm of each window."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pmod._core.arguments import as_int, as_list, as_real, check_tensor, wrong
from pmod._errors import ArgumentError, quoted
from pmod._mesh.axis import Axis
from pmod.nn.functional.given import (
    Axes,
    Held,
    Ints,
    Sizes,
    Spread,
    Wrong,
    bound,
    check_flags,
    check_kind,
    cuts_told,
    held_of,
    ints,
    shape_error,
    spatial,
)
from pmod.nn.functional.windows import (
    Layout,
    Slide,
    fetch,
    filled,
    layout,
    not_empty,
    without,
)


class PoolWindows(NamedTuple):
    """What torch's pools are given."""

    kernel_size: object
    stride: object
    padding: object = 0
    dilation: object = 1
    ceil_mode: bool = False


def pool_slides(given: PoolWindows, count: int, error: Wrong) -> list[Slide]:
    """Return the windows of each spatial dim; all numbers are checked."""
    kernels = ints(given.kernel_size, "kernel_size", count, 1, error)
    strides = kernels
    # torch takes an empty list for none, too
    if given.stride is not None and as_list(given.stride) != []:
        strides = ints(given.stride, "stride", count, 1, error)
    paddings = ints(given.padding, "padding", count, 0, error)
    dilations = ints(given.dilation, "dilation", count, 1, error)
    out: list[Slide] = []
    for kernel, stride, padding, dilation in zip(
        kernels, strides, paddings, dilations, strict=True
    ):
        of = Slide(kernel, stride, (padding, padding), dilation, bool(given.ceil_mode))
        # of several dims torch does not count the dilation
        window = of.extent if count == 1 else kernel
        if padding > window // 2:
            raise error(
                f"padding is {quoted(given.padding)} and a window {window}",
                "Pass at most half of the window, as torch has it.",
            )
        out.append(of)
    return out


def check_pooled(of: Slide, rows: int, where: str, error: Wrong) -> None:
    """Check that the result has a row."""
    if rows >= 1 and of.length(rows) >= 1:
        return
    raise error(
        f"the whole has {rows} rows{where}, and a window {of.extent}",
        "Pass an input that is as long, or more padding.",
    )


class _Pool(NamedTuple):
    """A pool, parsed: of each spatial dim its windows and its shards."""

    axis: Axis
    dims: dict[int, Slide]
    held: dict[int, Held]

    @property
    def kernel(self) -> list[int]:
        """The rows of a window, of each dim."""
        return [of.kernel for of in self.dims.values()]

    @property
    def strides(self) -> list[int]:
        """The stride of each dim."""
        return [of.stride for of in self.dims.values()]

    def laid(self, at: int) -> Layout:
        """Return what the ranks' windows reach along a dim."""
        return layout(self.dims[at], self.held[at].sizes)


def _parsed(
    function: str, x: Tensor, kind: str, given: PoolWindows, spread: Spread, count: int
) -> _Pool:
    """Return a pool whose arguments are checked; dims that are not cut have one shard."""
    bounds = bound(function, spread, -count)
    axis = bounds[0][1]
    check_tensor(x, function, axis, name="input")
    check_kind(x, kind, function, axis)
    check_flags(function, ceil_mode=given.ceil_mode)
    error = shape_error(function, axis)
    if x.dim() not in (count + 1, count + 2) or not x.shape[-count - 1]:
        right = f"Pass an input of {count + 1} or {count + 2} dims, with channels."
        raise error(f"input is {tuple(x.shape)}", right)
    cuts = cuts_told(function, spread, bounds)
    slides = pool_slides(given, count, error)
    dims = dict(zip(range(-count, 0), slides, strict=True))

    def check(at: int, rows: int, of: Axis) -> None:
        check_pooled(dims[at], rows, f" along dim {at}", shape_error(function, of))

    held = held_of(function, cuts, x, spatial(count, "pooled"), check)
    for at in dims:
        if at not in held:
            held[at] = Held(axis, (int(x.shape[at]),))
    # dims that are cut come first: what is padded here need not travel
    order = sorted(dims, key=lambda at: len(held[at].sizes) == 1)
    return _Pool(axis, dims, {at: held[at] for at in order})


# --- the largest ----------------------------------------------------------------------


def _lowest(x: Tensor) -> float:
    if x.is_floating_point():
        return -math.inf
    return torch.iinfo(x.dtype).min


def _max_pool(
    x: Tensor, given: PoolWindows, indices: bool, spread: Spread, count: int
) -> tuple[Tensor, Tensor | None]:
    """Return this rank's shard of torch's pool of the whole, and where the largest are."""
    function = f"nn.functional.max_pool{count}d"
    check_flags(function, return_indices=indices)
    # torch has no pool of integers along one dim
    kind = "floating" if count == 1 else "real"
    pool = _parsed(function, x, kind, given, spread, count)
    is_padded = False
    for at, held in pool.held.items():
        x, gaps = filled(x, at, held, pool.laid(at).windows, _lowest(x))
        is_padded = is_padded or gaps != (0, 0)
    x, empty = not_empty(x, {at: of.extent for at, of in pool.dims.items()})
    dilations = [of.dilation for of in pool.dims.values()]
    numbers = (pool.kernel, pool.strides, 0, dilations)
    torchs = getattr(F, f"max_pool{count}d")
    if not indices and not is_padded:
        return without(torchs(x, *numbers), empty), None
    y, found = torchs(x, *numbers, return_indices=True)
    local, of_whole = _places(found, x, pool)
    if is_padded:
        # of equal rows torch takes the first, and of rows that are all the lowest the
        # first that is not padding
        y = x.flatten(-count).gather(-1, local.flatten(-count)).view(y.shape)
    return without(y, empty), without(of_whole, empty)


def _places(found: Tensor, x: Tensor, pool: _Pool) -> tuple[Tensor, Tensor]:
    """Return where the largest are, in the window x and in the whole.

    Padding is found where all of a window is the lowest number.
    """
    local, of_whole = torch.zeros_like(found), torch.zeros_like(found)
    rest, step, whole_step = found, 1, 1
    for at in sorted(pool.dims, reverse=True):
        held = pool.held[at]
        low = pool.laid(at).windows[held.place][0]
        rows = x.shape[at]
        place = rest % rows
        rest = rest.div(rows, rounding_mode="floor")
        # what lies before the whole moves to the first row of its window that does not
        step_of = pool.dims[at].dilation
        before = (-low - place).clamp(min=0)
        place = place - (-before).div(step_of, rounding_mode="floor") * step_of
        local = local + place * step
        of_whole = of_whole + (place + low) * whole_step
        step, whole_step = step * rows, whole_step * held.total
    return local, of_whole


# --- the mean -------------------------------------------------------------------------


class _Counts(NamedTuple):
    """What a window's sum is divided by: torch's arguments."""

    count_include_pad: bool = True
    divisor_override: int | None = None


def _avg_pool(
    function: str,
    x: Tensor,
    given: PoolWindows,
    counts: _Counts,
    spread: Spread,
    count: int,
) -> Tensor:
    """Return this rank's shard of torch's pool of the whole."""
    divisor = counts.divisor_override
    check_flags(function, count_include_pad=counts.count_include_pad)
    if divisor is not None and not as_int(divisor):
        of = bound(function, spread, -count)[0][1]
        said = f"divisor_override is {quoted(divisor)}"
        raise wrong(ArgumentError, function, of, said, "Pass an int other than 0.")
    pool = _parsed(function, x, "floating", given, spread, count)
    factors: dict[int, list[float]] = {}
    for at, held in pool.held.items():
        laid = pool.laid(at)
        x = fetch(x, at, held, laid.windows)
        if divisor is None:
            rows = laid.rows(held.place)
            factors[at] = _factors(
                pool.dims[at], held.total, rows, counts.count_include_pad
            )
    x, empty = not_empty(x, {at: of.kernel for at, of in pool.dims.items()})
    y = without(getattr(F, f"avg_pool{count}d")(x, pool.kernel, pool.strides), empty)
    if divisor is not None:
        return y * (math.prod(pool.kernel) / divisor)
    for at, parts in factors.items():
        # inside the whole a window has as many rows as torch counted
        if any(part != 1.0 for part in parts):
            y = y * torch.tensor(parts, dtype=y.dtype, device=y.device).view(
                [-1] + [1] * (-at - 1)
            )
    return y


def _factors(
    of: Slide, total: int, rows: tuple[int, int], with_padding: bool
) -> list[float]:
    """Return by how much more each window's mean is, whose padding does not count."""
    out: list[float] = []
    for j in range(*rows):
        low = j * of.stride - of.padding[0]
        high = min(low + of.kernel, total + of.padding[1])
        # what ceil_mode adds behind the padding never counts
        counted = high - low
        if not with_padding:
            counted = min(high, total) - max(low, 0)
        out.append(of.kernel / counted)
    return out


# --- the norm -------------------------------------------------------------------------


def _lp_pool(
    x: Tensor,
    norm_type: float,
    given: PoolWindows,
    spread: Spread,
    count: int,
) -> Tensor:
    """Return this rank's shard of torch's pool of the whole: torch's own composition."""
    function = f"nn.functional.lp_pool{count}d"
    of = bound(function, spread, -count)[0][1]
    check_tensor(x, function, of, name="input")
    check_kind(x, "floating", function, of)
    norm = as_real(norm_type)
    if norm is None or norm == 0 or math.isnan(norm):
        given_norm = f"norm_type is {quoted(norm_type)}"
        right = "Pass a number other than 0, or inf."
        raise wrong(ArgumentError, function, of, given_norm, right)
    norm = float(norm)
    if math.isinf(norm):
        sign = math.copysign(1.0, norm)
        return sign * _max_pool(sign * x.abs(), given, False, spread, count)[0]
    means = _avg_pool(function, x.pow(norm), given, _Counts(), spread, count)
    rows = ints(given.kernel_size, "kernel_size", count, 1, shape_error(function, of))
    total = (torch.sign(means) * F.relu(torch.abs(means))).mul(math.prod(rows))
    return total.pow(1.0 / norm)


# --- by name --------------------------------------------------------------------------


def max_pool1d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return this rank's shard of torch.nn.functional.max_pool1d of a whole signal.

    V -> V. Shapes: input (..., k) -> (..., k'), as long as `out_sizes` says.
    return_indices: where each of them is, as an index of the whole, flattened.
    Cost: each row that a window of another rank reaches, once to it; nothing where
    windows do not cross the borders.
    Raises: ShapeError for shapes, numbers or sizes that do not fit; AxisError as
    everywhere.

    >>> def pooled():
    ...     x = pmod.shard(torch.tensor([[1.0, 5.0, 2.0, 4.0, 3.0]]), "x", dim=-1)
    ...     return pmod.nn.functional.max_pool1d(x, 2, return_indices=True, axis="x")
    >>> pmod.simulate(pooled, x=2)[0]
    (tensor([[5., 4.]]), tensor([[1, 3]]))
    """
    given = PoolWindows(kernel_size, stride, padding, dilation, ceil_mode)
    spread = Spread(axis, dim, sizes)
    y, places = _max_pool(input, given, return_indices, spread, 1)
    if not return_indices:
        return y
    assert places is not None
    return y, places


def max_pool2d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return this rank's shard of torch.nn.functional.max_pool2d of a whole image.

    V -> V. Shapes: input (..., h, w) -> (..., h', w'), as long as `out_sizes` says.
    Cost, Raises: as `max_pool1d`.

    >>> def pooled():
    ...     return pmod.nn.functional.max_pool2d(torch.ones(1, 4, 6), 3, 2, 1, axis="y").shape
    >>> pmod.simulate(pooled, y=2)[0]
    torch.Size([1, 2, 3])
    """
    given = PoolWindows(kernel_size, stride, padding, dilation, ceil_mode)
    spread = Spread(axis, dim, sizes)
    y, places = _max_pool(input, given, return_indices, spread, 2)
    if not return_indices:
        return y
    assert places is not None
    return y, places


def max_pool3d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return this rank's shard of torch.nn.functional.max_pool3d of a whole volume.

    V -> V. Shapes: input (..., d, h, w) -> (..., d', h', w'), as long as `out_sizes` says.
    Cost, Raises: as `max_pool1d`.

    >>> def pooled():
    ...     return pmod.nn.functional.max_pool3d(torch.ones(1, 2, 4, 4), 2, axis="z").shape
    >>> pmod.simulate(pooled, z=2)[0]
    torch.Size([1, 1, 2, 2])
    """
    given = PoolWindows(kernel_size, stride, padding, dilation, ceil_mode)
    spread = Spread(axis, dim, sizes)
    y, places = _max_pool(input, given, return_indices, spread, 3)
    if not return_indices:
        return y
    assert places is not None
    return y, places


def avg_pool1d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.avg_pool1d of a whole signal.

    V -> V. Shapes: input (..., k) -> (..., k'), as long as `out_sizes` says.
    Cost: as `max_pool1d`. Raises: as `max_pool1d`; ArgumentError for integers.

    >>> def pooled():
    ...     x = pmod.shard(torch.tensor([[1.0, 5.0, 2.0, 4.0, 3.0]]), "x", dim=-1)
    ...     return pmod.nn.functional.avg_pool1d(x, 2, ceil_mode=True, axis="x")
    >>> pmod.simulate(pooled, x=2)
    [tensor([[3., 3.]]), tensor([[3.]])]
    """
    given = PoolWindows(kernel_size, stride, padding, 1, ceil_mode)
    counts, spread = _Counts(count_include_pad), Spread(axis, dim, sizes)
    return _avg_pool("nn.functional.avg_pool1d", input, given, counts, spread, 1)


def avg_pool2d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.avg_pool2d of a whole image.

    V -> V. Shapes: input (..., h, w) -> (..., h', w'), as long as `out_sizes` says.
    Cost: as `max_pool1d`. Raises: as `max_pool1d`; ArgumentError for integers.

    >>> def pooled():
    ...     return pmod.nn.functional.avg_pool2d(torch.ones(1, 4, 6), 3, 2, 1, axis="y").shape
    >>> pmod.simulate(pooled, y=2)[0]
    torch.Size([1, 2, 3])
    """
    given = PoolWindows(kernel_size, stride, padding, 1, ceil_mode)
    counts, spread = (
        _Counts(count_include_pad, divisor_override),
        Spread(axis, dim, sizes),
    )
    return _avg_pool("nn.functional.avg_pool2d", input, given, counts, spread, 2)


def avg_pool3d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.avg_pool3d of a whole volume.

    V -> V. Shapes: input (..., d, h, w) -> (..., d', h', w'), as long as `out_sizes` says.
    Cost: as `max_pool1d`. Raises: as `max_pool1d`; ArgumentError for integers.

    >>> def pooled():
    ...     return pmod.nn.functional.avg_pool3d(torch.ones(1, 2, 4, 4), 2, axis="z").shape
    >>> pmod.simulate(pooled, z=2)[0]
    torch.Size([1, 1, 2, 2])
    """
    given = PoolWindows(kernel_size, stride, padding, 1, ceil_mode)
    counts, spread = (
        _Counts(count_include_pad, divisor_override),
        Spread(axis, dim, sizes),
    )
    return _avg_pool("nn.functional.avg_pool3d", input, given, counts, spread, 3)


def lp_pool1d(
    input: Tensor,
    norm_type: float,
    kernel_size: Ints,
    stride: Ints | None = None,
    ceil_mode: bool = False,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.lp_pool1d of a whole signal.

    V -> V. Shapes: input (..., k) -> (..., k'), as long as `out_sizes` says.
    Cost: as `max_pool1d`. Raises: as `max_pool1d`; ArgumentError for a norm_type of 0.

    >>> def pooled():
    ...     x = pmod.shard(torch.tensor([[3.0, 4.0, 6.0, 8.0]]), "x", dim=-1)
    ...     return pmod.nn.functional.lp_pool1d(x, 2, 2, axis="x")
    >>> pmod.simulate(pooled, x=2)
    [tensor([[5.]]), tensor([[10.]])]
    """
    given = PoolWindows(kernel_size, stride, 0, 1, ceil_mode)
    return _lp_pool(input, norm_type, given, Spread(axis, dim, sizes), 1)


def lp_pool2d(
    input: Tensor,
    norm_type: float,
    kernel_size: Ints,
    stride: Ints | None = None,
    ceil_mode: bool = False,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.lp_pool2d of a whole image.

    V -> V. Shapes: input (..., h, w) -> (..., h', w'), as long as `out_sizes` says.
    Cost: as `max_pool1d`. Raises: as `max_pool1d`; ArgumentError for a norm_type of 0.

    >>> def pooled():
    ...     return pmod.nn.functional.lp_pool2d(torch.ones(1, 4, 6), 2, 2, axis="y").shape
    >>> pmod.simulate(pooled, y=2)[0]
    torch.Size([1, 2, 3])
    """
    given = PoolWindows(kernel_size, stride, 0, 1, ceil_mode)
    return _lp_pool(input, norm_type, given, Spread(axis, dim, sizes), 2)


def lp_pool3d(
    input: Tensor,
    norm_type: float,
    kernel_size: Ints,
    stride: Ints | None = None,
    ceil_mode: bool = False,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.lp_pool3d of a whole volume.

    V -> V. Shapes: input (..., d, h, w) -> (..., d', h', w'), as long as `out_sizes` says.
    Cost: as `max_pool1d`. Raises: as `max_pool1d`; ArgumentError for a norm_type of 0.

    >>> def pooled():
    ...     return pmod.nn.functional.lp_pool3d(torch.ones(1, 2, 4, 4), 2, 2, axis="z").shape
    >>> pmod.simulate(pooled, z=2)[0]
    torch.Size([1, 1, 2, 2])
    """
    given = PoolWindows(kernel_size, stride, 0, 1, ceil_mode)
    return _lp_pool(input, norm_type, given, Spread(axis, dim, sizes), 3)
