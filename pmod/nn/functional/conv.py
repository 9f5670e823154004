"""Convolutions of a cut tensor: conv1d to conv3d, and their transposes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pmod._collectives.cuts import too_wide
from pmod._core.arguments import as_int, check_tensor, wrong
from pmod._errors import ArgumentError, ShapeError, near_miss, quoted
from pmod._mesh.axis import Axis
from pmod.nn.functional.given import (
    Axes,
    Bound,
    Held,
    Ints,
    Sizes,
    Spread,
    Wrong,
    bound,
    check_choice,
    cuts_told,
    held_of,
    ints,
    shape_error,
    spatial,
)
from pmod.nn.functional.windows import (
    Slide,
    Spray,
    layout,
    not_empty,
    rows_of,
    without,
)

# torch's name, and that of a halo
BOUNDARIES = {
    "zeros": "zeros",
    "circular": "periodic",
    "reflect": "reflect",
    "replicate": "replicate",
}


def slides(
    kernel: Sequence[int],
    stride: object,
    padding: object,
    dilation: object,
    error: Wrong,
) -> list[Slide]:
    """Return the windows of each spatial dim; all numbers are checked."""
    count = len(kernel)
    strides = ints(stride, "stride", count, 1, error)
    dilations = ints(dilation, "dilation", count, 1, error)
    if not isinstance(padding, str):
        paddings = [(p, p) for p in ints(padding, "padding", count, 0, error)]
    elif padding == "valid":
        paddings = [(0, 0)] * count
    elif padding == "same":
        if set(strides) != {1}:
            raise error(
                f"padding is 'same' and stride {quoted(stride)}",
                "Pass padding as numbers, as torch has it.",
            )
        # an odd row of padding is at the end, as in torch
        totals = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
        paddings = [(total // 2, total - total // 2) for total in totals]
    else:
        raise error(
            f"padding is {quoted(padding)}{near_miss(padding, ('same', 'valid'))}",
            "Pass 'same' or 'valid', an int, or one for each spatial dim.",
        )
    return list(map(Slide, kernel, strides, paddings, dilations))


def check_length(of: Slide, rows: int, where: str, error: Wrong) -> None:
    """Check that the whole has a window."""
    if rows >= 1 and of.length(rows) >= 1:
        return
    padded = rows + sum(of.padding)
    given = f"the whole has {rows} rows{where}, {padded} with padding, and a window {of.extent}"
    right = "Pass an input that is as long, or more padding."
    # torch refuses it, whatever the padding
    if not rows:
        right = "Pass an input with rows."
    raise error(given, right)


# --- what a call is given -------------------------------------------------------------


class _Tensors(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None


def _check_tensors(
    function: str, given: _Tensors, groups: object, count: int, of: Axis
) -> int:
    """Raise, before anything is sent, if torch would not take the tensors.

    Return the number of groups.
    """
    x, weight, bias = given
    is_transposed = "transpose" in function

    # a function: compiled code, where lengths may be symbols, must not make the text
    def shapes(more: str = "") -> str:
        return f"input is {tuple(x.shape)} and weight {tuple(weight.shape)}{more}"

    if x.dim() not in (count + 1, count + 2) or weight.dim() != count + 2:
        right = f"Pass an input of {count + 1} or {count + 2} dims, and a weight of {count + 2}."
        raise wrong(ShapeError, function, of, shapes(), right)
    number = as_int(groups)
    if number is None or number < 1:
        raise wrong(
            ShapeError,
            function,
            of,
            f"groups is {quoted(groups)}",
            "Pass an int of 1 or more.",
        )
    made, taken, *kernel = weight.shape
    is_empty = min(made, *kernel) < 1
    divides = x.shape[-count - 1] == taken * number and made % number == 0
    right = "A weight is (out, in / groups, ...), out a multiple of groups, and its windows are not empty."
    if is_transposed:
        divides = x.shape[-count - 1] == made and made % number == 0
        made, is_empty = taken * number, min(taken, *kernel) < 1
        right = "A weight is (in, out / groups, ...), in a multiple of groups, and its windows are not empty."
    if is_empty or not divides:
        raise wrong(ShapeError, function, of, shapes(f", groups {number}"), right)
    if bias is not None and tuple(bias.shape) != (made,):
        raise wrong(
            ShapeError,
            function,
            of,
            f"bias is {tuple(bias.shape)} and weight {tuple(weight.shape)}",
            f"Pass a bias of ({made},).",
        )
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None:
            _check_alike(function, of, x, name, other)
    # a constant in compiled code too
    return operator.index(number)


def _check_alike(function: str, of: Axis, x: Tensor, name: str, other: Tensor) -> None:
    """Raise unless a parameter is on the input's device, of its dtype."""
    if other.device != x.device:
        right = f"Pass {name}.to({str(x.device)!r})."
        raise wrong(
            ArgumentError,
            function,
            of,
            f"{name} is on {other.device} and input on {x.device}",
            right,
        )
    # autocast brings all of them to one dtype; torch knows none on meta
    is_alike = other.dtype == x.dtype
    if not is_alike and not torch.is_autocast_enabled(x.device.type):
        raise wrong(
            ArgumentError,
            function,
            of,
            f"{name} is {other.dtype} and input {x.dtype}",
            f"Pass {name}.to({x.dtype}), or call it under torch.autocast.",
        )


def _bound(
    function: str, spread: Spread, given: _Tensors, groups: object, count: int
) -> tuple[Bound, int]:
    """Return the dims that are cut and the groups; the tensors are checked."""
    dims = bound(function, spread, -count)
    axis = dims[0][1]
    check_tensor(given.x, function, axis, name="input")
    check_tensor(given.weight, function, axis, name="weight")
    if given.bias is not None:
        check_tensor(given.bias, function, axis, name="bias")
    return dims, _check_tensors(function, given, groups, count, axis)


def _window(
    x: Tensor,
    dims: dict[int, Slide],
    held: dict[int, Held],
    boundary: str,
    axis: Axis,
) -> tuple[Tensor, list[int]]:
    """Return what this rank convolves, and the padding that is left to torch."""
    left = dict.fromkeys(dims, 0)
    # dims that are cut come first: what is padded here need not travel
    for at in sorted(dims, key=lambda at: at not in held):
        of, cut = dims[at], held.get(at)
        if cut is None or cut.axis.size == 1:
            if boundary == "zeros" and of.padding[0] == of.padding[1]:
                # torch pads so itself, without a copy
                left[at] = of.padding[0]
                continue
            cut = Held(axis, (operator.index(x.shape[at]),))
        x = rows_of(x, at, cut, of, boundary)
    return x, list(left.values())


def _conv(
    given: _Tensors,
    stride: object,
    padding: object,
    dilation: object,
    groups: int,
    padding_mode: str,
    spread: Spread,
    count: int,
) -> Tensor:
    """Return this rank's shard of torch's convolution of the whole."""
    function = f"nn.functional.conv{count}d"
    bounds, parts = _bound(function, spread, given, groups, count)
    axis = bounds[0][1]
    check_choice(padding_mode, "padding_mode", BOUNDARIES, function, axis)
    cuts = cuts_told(function, spread, bounds)
    x, weight, bias = given
    error = shape_error(function, axis)
    kernel = [operator.index(k) for k in weight.shape[2:]]
    parsed = slides(kernel, stride, padding, dilation, error)
    dims = dict(zip(range(-count, 0), parsed, strict=True))

    def check(at: int, rows: int, of: Axis) -> None:
        where, around = f" along dim {at}", dims[at].padding
        check_length(dims[at], rows, where, shape_error(function, of))
        limit = too_wide(around, rows, BOUNDARIES[padding_mode])
        if limit is not None:
            said = f"padding is {around} with padding_mode={padding_mode!r}, but the whole has {rows} rows{where}"
            right = f"Pass padding of at most {limit}, or padding_mode='zeros'."
            raise wrong(ShapeError, function, of, said, right)

    held = held_of(function, cuts, x, spatial(count, "convolved"), check)
    x, left = _window(x, dims, held, BOUNDARIES[padding_mode], axis)
    x, empty = not_empty(x, {at: dims[at].extent for at in held})
    strides = [of.stride for of in parsed]
    dilations = [of.dilation for of in parsed]
    y = getattr(F, f"conv{count}d")(x, weight, bias, strides, left, dilations, parts)
    return without(y, empty)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    axis: Axes,
    dim: int | None = None,
    padding_mode: str = "zeros",
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.conv1d of a whole signal.

    V -> V. Shapes: input (..., channels, k), weight (out, channels / groups, kernel) ->
    (..., out, k'), k' being `out_sizes` of the k of all ranks at this one.
    Cost: each row that a window of another rank reaches, once to it: kernel - 1 of them
    across a border, where stride and dilation are 1.
    Raises: ShapeError for shapes, numbers or sizes that do not fit, and a padding that
    torch.nn.functional.pad would not allow; ArgumentError for tensors of other dtypes
    or devices, or another padding_mode; AxisError as everywhere.

    >>> def differences():
    ...     x = pmod.shard(torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]]), "x", dim=-1)
    ...     return pmod.nn.functional.conv1d(x, torch.tensor([[[-1.0, 1.0]]]), axis="x")
    >>> pmod.simulate(differences, x=2)
    [tensor([[1., 2., 4.]]), tensor([[8.]])]
    """
    given, spread = _Tensors(input, weight, bias), Spread(axis, dim, sizes)
    return _conv(given, stride, padding, dilation, groups, padding_mode, spread, 1)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    axis: Axes,
    dim: int | None = None,
    padding_mode: str = "zeros",
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.conv2d of a whole image.

    V -> V. Shapes: input (..., channels, h/ranks, w), weight (out, channels / groups,
    kernel, kernel) -> (..., out, h'/ranks, w'); the shards along a dim that is cut are
    as long as `out_sizes` says.
    Cost: each row that a window of another rank reaches, once to it, corners included;
    for each dim that is cut a message to each neighbour. Raises: as `conv1d`.

    A weight that all ranks hold goes through pvary once; its gradient is then that of
    the whole image:

    >>> def gradient():
    ...     weight = torch.ones(1, 1, 3, 3, requires_grad=True)
    ...     x = torch.ones(1, 2, 4)  # of a whole (1, 4, 4)
    ...     y = pmod.nn.functional.conv2d(x, pmod.pvary(weight, "y"), padding="same", axis="y")
    ...     y.sum().backward()
    ...     return weight.grad[0, 0]
    >>> pmod.simulate(gradient, y=2)[1]
    tensor([[ 9., 12.,  9.],
            [12., 16., 12.],
            [ 9., 12.,  9.]])
    """
    given, spread = _Tensors(input, weight, bias), Spread(axis, dim, sizes)
    return _conv(given, stride, padding, dilation, groups, padding_mode, spread, 2)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    axis: Axes,
    dim: int | None = None,
    padding_mode: str = "zeros",
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.conv3d of a whole volume.

    V -> V. Shapes: input (..., channels, d/ranks, h, w), weight (out, channels /
    groups, kernel, kernel, kernel) -> (..., out, d'/ranks, h', w'); the shards along a
    dim that is cut are as long as `out_sizes` says.
    Cost: as `conv2d`. Raises: as `conv1d`.

    >>> def smooth():
    ...     weight = torch.full((1, 1, 3, 3, 3), 1 / 27)
    ...     pencil = torch.ones(1, 2, 2, 3)  # of a whole (1, 4, 4, 3)
    ...     axes, periodic = {-3: "z", -2: "y"}, "circular"
    ...     return pmod.nn.functional.conv3d(pencil, weight, padding="same", padding_mode=periodic, axis=axes)
    >>> pmod.simulate(smooth, z=2, y=2)[3].shape
    torch.Size([1, 2, 2, 3])
    """
    given, spread = _Tensors(input, weight, bias), Spread(axis, dim, sizes)
    return _conv(given, stride, padding, dilation, groups, padding_mode, spread, 3)


# --- transposed -----------------------------------------------------------------------


class SprayNumbers(NamedTuple):
    """What torch's transposed convolutions are given for each dim."""

    stride: object
    padding: object
    output_padding: object
    dilation: object


def sprays(kernel: list[int], numbers: SprayNumbers, error: Wrong) -> list[Spray]:
    """Return the windows of each spatial dim; all numbers are checked."""
    count = len(kernel)
    strides = ints(numbers.stride, "stride", count, 1, error)
    paddings = ints(numbers.padding, "padding", count, 0, error)
    more = ints(numbers.output_padding, "output_padding", count, 0, error)
    dilations = ints(numbers.dilation, "dilation", count, 1, error)
    for extra, stride, dilation in zip(more, strides, dilations, strict=True):
        if extra >= max(stride, dilation):
            raise error(
                f"output_padding is {quoted(numbers.output_padding)}, stride {stride} and dilation {dilation}",
                "Pass an output_padding that is less than stride or dilation, as torch has it.",
            )
    return list(map(Spray, kernel, strides, paddings, dilations, more))


def check_made(of: Spray, rows: int, where: str, error: Wrong) -> None:
    """Check that the result has a row."""
    if rows < 1:
        raise error(f"the whole has 0 rows{where}", "Pass an input with rows.")
    if of.length(rows) < 1:
        raise error(
            f"the whole has {rows} rows{where}, of which {of.length(rows)} would be made",
            "Pass less padding.",
        )


def sprayed(
    x: Tensor, dims: dict[int, Spray], held: dict[int, Held]
) -> tuple[Tensor, dict[int, tuple[int, int]]]:
    """Return the windows that this rank's rows are made of, and which rows to keep.

    The rows are those of what the windows make without padding.
    """
    kept: dict[int, tuple[int, int]] = {}
    for at, cut in held.items():
        of = dims[at]
        laid = layout(of, cut.sizes)
        first, end = laid.rows(cut.place)
        x = rows_of(x, at, cut, of)
        low = laid.windows[cut.place][0]
        kept[at] = (0, 0)
        if first < end:
            kept[at] = (first + of.padding - low * of.stride, end - first)
    return x, kept


def _conv_transpose(
    given: _Tensors, numbers: SprayNumbers, groups: object, spread: Spread, count: int
) -> Tensor:
    """Return this rank's shard of torch's transposed convolution of the whole."""
    function = f"nn.functional.conv_transpose{count}d"
    bounds, parts = _bound(function, spread, given, groups, count)
    cuts = cuts_told(function, spread, bounds)
    x, weight, bias = given
    kernel = [operator.index(k) for k in weight.shape[2:]]
    parsed = sprays(kernel, numbers, shape_error(function, bounds[0][1]))
    dims = dict(zip(range(-count, 0), parsed, strict=True))

    def check(at: int, rows: int, of: Axis) -> None:
        check_made(dims[at], rows, f" along dim {at}", shape_error(function, of))

    held = held_of(function, cuts, x, spatial(count, "convolved"), check)
    x, kept = sprayed(x, dims, held)
    x, _ = not_empty(x, dict.fromkeys(held, 1))
    padding: list[int] = []
    more: list[int] = []
    for at, of in dims.items():
        if at not in kept:
            padding.append(of.padding)
            more.append(of.output_padding)
            continue
        made = (x.shape[at] - 1) * of.stride + of.extent
        # rows that no window reaches
        padding.append(0)
        more.append(max(0, sum(kept[at]) - made))
    strides = [of.stride for of in parsed]
    dilations = [of.dilation for of in parsed]
    y = getattr(F, f"conv_transpose{count}d")(
        x, weight, bias, strides, padding, more, parts, dilations
    )
    for at, (first, rows) in kept.items():
        y = y.narrow(at, first, rows)
    return y


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.conv_transpose1d of a whole signal.

    Row j of the result is on the rank that has row floor(j / stride) of the input; rows
    past its end are on the last rank.
    V -> V. Shapes: input (..., channels, k), weight (channels, out / groups, kernel) ->
    (..., out, k'), k' being `out_sizes` of the k of all ranks at this one.
    Cost: each row whose window reaches rows of another rank, once to it; nothing where
    the kernel is as long as the stride and padding is 0.
    Raises: as `conv1d`.

    >>> def doubled():
    ...     x = pmod.shard(torch.tensor([[1.0, 2.0, 4.0]]), "x", dim=-1)
    ...     return pmod.nn.functional.conv_transpose1d(x, torch.ones(1, 1, 2), stride=2, axis="x")
    >>> pmod.simulate(doubled, x=2)
    [tensor([[1., 1., 2., 2.]]), tensor([[4., 4.]])]
    """
    given, spread = _Tensors(input, weight, bias), Spread(axis, dim, sizes)
    numbers = SprayNumbers(stride, padding, output_padding, dilation)
    return _conv_transpose(given, numbers, groups, spread, 1)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.conv_transpose2d of a whole image.

    V -> V. Shapes: input (..., channels, h/ranks, w), weight (channels, out / groups,
    kernel, kernel) -> (..., out, h'/ranks, w'); shards are as long as `out_sizes` says.
    Cost: as `conv_transpose1d`, for each dim that is cut. Raises: as `conv1d`.

    >>> def upsampled():
    ...     x, weight = torch.ones(1, 1, 3), torch.ones(1, 1, 2, 2)
    ...     return pmod.nn.functional.conv_transpose2d(x, weight, stride=2, axis="y").shape
    >>> pmod.simulate(upsampled, y=2)[0]
    torch.Size([1, 2, 6])
    """
    given, spread = _Tensors(input, weight, bias), Spread(axis, dim, sizes)
    numbers = SprayNumbers(stride, padding, output_padding, dilation)
    return _conv_transpose(given, numbers, groups, spread, 2)


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.conv_transpose3d of a whole volume.

    V -> V. Shapes: input (..., channels, d/ranks, h, w), weight (channels, out /
    groups, kernel, kernel, kernel) -> (..., out, d'/ranks, h', w'); shards are as long
    as `out_sizes` says.
    Cost: as `conv_transpose1d`, for each dim that is cut. Raises: as `conv1d`.

    >>> def upsampled():
    ...     x, weight = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2, 2)
    ...     return pmod.nn.functional.conv_transpose3d(x, weight, stride=2, axis="z").shape
    >>> pmod.simulate(upsampled, z=2)[0]
    torch.Size([1, 2, 4, 4])
    """
    given, spread = _Tensors(input, weight, bias), Spread(axis, dim, sizes)
    numbers = SprayNumbers(stride, padding, output_padding, dilation)
    return _conv_transpose(given, numbers, groups, spread, 3)
