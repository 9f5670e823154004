"""Convolutions of a tensor that is cut over ranks: torch.nn.functional on shards.

    y = pmod.nn.functional.conv2d(x, weight, bias, padding="same", axis="space")  # rows cut over "space"
    y = pmod.nn.functional.conv2d(x, weight, bias, padding=1, axis={-2: "y", -1: "x"})  # rows and columns

x is this rank's shard of a whole tensor, in the order of the ranks, each as long as it
likes, empty ones included. The result is this rank's shard of what torch.nn.functional
gives on the whole. A rank fetches the rows around its own that its windows reach into,
as `halo_exchange` does, and convolves: values, gradients and higher derivatives are
torch's. So is the memory format: of a channels_last x, and of a slice of one, the
result is channels_last.

Names, arguments and defaults are torch's. These follow, by keyword:

- axis: the mesh axis; or, for several dims, {dim: axis}.
- dim: the dim of x that is cut where axis is one axis, by default the first spatial
  one.
- padding_mode: what the whole is padded with, "zeros", "circular", "reflect" or
  "replicate", as of torch.nn.Conv2d.
- sizes: the length of each rank's shard along dim; {dim: sizes} where axis is a
  mapping. Without them the ranks exchange them: one small message more per dim, and on
  cuda a wait for it; under torch.compile they must be given.

Which rank has which row of the result: row j is where row j * stride of x is; rows past
the end of x are on the last rank. With stride 1, shards keep their lengths; only the
last ones shrink or grow when the result is shorter or longer than x. With a larger
stride, each shard starts at ceil(start / stride). A rank has as much of the result as of x,
neighbours alone talk where shards are as long as a window with its padding, and patches
(a stride as long as the window, that divides the shards) need no message. `conv_sizes`
says what the lengths are, for the next layer's `sizes`: nothing is sent for that.

`pmod.start(conv2d, ...)` sends the rows of the first dim that is cut and returns;
`wait` convolves.

x, weight and bias are V. A weight that every rank holds (I) goes through `pvary` once,
as everywhere: then its gradient arrives already summed, and without it each rank has
the part of its own rows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pmod._collectives.cuts import (
    Cut,
    axes_by_dim,
    by_dim,
    places_of,
    settled,
    too_wide,
)
from pmod._collectives.halo import carry_out, laid_out_as
from pmod._collectives.halo_plan import Plan, window_plan
from pmod._core.arguments import LONGEST, as_int, check_sizes, check_tensor, wrong
from pmod._core.send import memory_format
from pmod._errors import ArgumentError, PmodError, ShapeError, near_miss, phrase, quoted
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import AxisLike
from pmod._torch import constant_in_graphs

Ints = int | Sequence[int]
Sizes = Sequence[int] | Mapping[int, Sequence[int] | None]

# torch's name, and that of a halo
BOUNDARIES = {
    "zeros": "zeros",
    "circular": "periodic",
    "reflect": "reflect",
    "replicate": "replicate",
}

# --- one dim --------------------------------------------------------------------------


class _Dim(NamedTuple):
    """A spatial dim, as the whole is convolved along it."""

    kernel: int
    stride: int
    padding: tuple[int, int]
    dilation: int

    @property
    def numbers(self) -> _Numbers:
        return self.kernel, self.stride, self.padding, self.dilation

    @property
    def extent(self) -> int:
        """The rows from the first to the last of a window."""
        return self.dilation * (self.kernel - 1) + 1

    def length(self, rows: int) -> int:
        """Return the length of the result."""
        return (rows + sum(self.padding) - self.extent) // self.stride + 1

    def starts(self, sizes: tuple[int, ...]) -> list[int]:
        """Return where each rank's rows of the result begin, and its length."""
        length = self.length(sum(sizes))
        starts = [0, *accumulate(sizes[:-1])]
        # rounded up: a row of the result is where its row of x is
        return [*[min(-(-start // self.stride), length) for start in starts], length]

    def windows(self, sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """Return the rows that each rank's rows of the result are made of."""
        out: list[tuple[int, int]] = []
        for first, end in pairwise(self.starts(sizes)):
            # a rank without a row of the result needs no row
            low = high = 0
            if first < end:
                low = first * self.stride - self.padding[0]
                high = (end - 1) * self.stride - self.padding[0] + self.extent
            out.append((low, high))
        return tuple(out)


_Numbers: TypeAlias = tuple[int, int, tuple[int, int], int]
"""A `_Dim` as a plain tuple: compiled code takes it for a constant."""


@lru_cache(maxsize=256)
def _plan_of(index: int, sizes: tuple[int, ...], of: _Numbers, boundary: str) -> Plan:
    return window_plan(index, sizes, _Dim(*of).windows(sizes), boundary)


@constant_in_graphs
def _plan(index: int, sizes: tuple[int, ...], of: _Numbers, boundary: str) -> Plan:
    """Return how a rank comes by its window."""
    return _plan_of(index, sizes, of, boundary)


Wrong = Callable[[str, str], PmodError]
"""The error for what is given, and what would be right."""


def _ints(given: object, name: str, count: int, least: int, error: Wrong) -> list[int]:
    """Return one number for each spatial dim."""
    listed = list(given) if isinstance(given, tuple | list) else [given]
    parsed: list[int] = []
    for one in listed:
        number = as_int(one)
        if number is not None and least <= number <= LONGEST:
            # a constant in compiled code too: plans are made of it
            parsed.append(operator.index(number))
    if len(parsed) != len(listed) or len(parsed) not in (1, count):
        of = f"an int of {least} or more"
        if count > 1:
            of += f", or {count} of them"
        raise error(f"{name} is {quoted(given)}", f"Pass {of}.")
    if len(parsed) == 1:
        return parsed * count
    return parsed


def _dims(
    kernel: Sequence[int],
    stride: object,
    padding: object,
    dilation: object,
    error: Wrong,
) -> list[_Dim]:
    """Return the spatial dims; all numbers are checked."""
    count = len(kernel)
    strides = _ints(stride, "stride", count, 1, error)
    dilations = _ints(dilation, "dilation", count, 1, error)
    if not isinstance(padding, str):
        paddings = [(p, p) for p in _ints(padding, "padding", count, 0, error)]
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
    return list(map(_Dim, kernel, strides, paddings, dilations))


def _check_length(of: _Dim, rows: int, where: str, error: Wrong) -> None:
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


def conv_sizes(
    sizes: Sequence[int],
    kernel_size: int,
    stride: int = 1,
    padding: int | str = 0,
    dilation: int = 1,
) -> tuple[int, ...]:
    """Return how long the shards of a convolution's result are along a dim.

    `sizes` are the lengths of its input's shards. The numbers are those of that dim.
    Nothing is sent: it is the rule that row j is where row j * stride of the input is,
    and rows past its end on the last rank.

    Raises: ShapeError for sizes or numbers that do not fit.

    >>> rows = pmod.split_sizes(10, 3)
    >>> rows, pmod.nn.functional.conv_sizes(rows, 3, padding=1), pmod.nn.functional.conv_sizes(rows, 3, stride=2)
    ((4, 4, 2), (4, 4, 2), (2, 2, 0))
    """

    def error(given: str, right: str) -> PmodError:
        return ShapeError(phrase("nn.functional.conv_sizes", given, right))

    listed = list(sizes) if isinstance(sizes, Sequence) else []  # pyright: ignore[reportUnnecessaryIsInstance]
    ints = map(as_int, listed)
    held = tuple([size for size in ints if size is not None and size >= 0])
    if not held or len(held) != len(listed):
        raise error(
            f"sizes is {quoted(sizes)}",
            "Pass ints of 0 or more, one per rank of the axis.",
        )
    (of,) = _dims(
        _ints(kernel_size, "kernel_size", 1, 1, error), stride, padding, dilation, error
    )
    _check_length(of, sum(held), "", error)
    return tuple(end - first for first, end in pairwise(of.starts(held)))


# --- any number of them ---------------------------------------------------------------


class _Spread(NamedTuple):
    """How the tensor is cut and padded: what follows torch's own arguments."""

    axis: AxisLike | Mapping[int, AxisLike]
    dim: int | None
    padding_mode: str
    sizes: Sizes | None


def _check_tensors(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: object, count: int, of: Axis
) -> None:
    """Raise, before anything is sent, if torch would not take the tensors."""
    function = f"nn.functional.conv{count}d"

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
    if is_empty or not divides:
        right = "A weight is (out, in / groups, ...), out a multiple of groups, and its windows are not empty."
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
        if other is None:
            continue
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


def _parse(
    spread: _Spread,
    count: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: object,
) -> list[Cut]:
    """Return the cuts as they were given, and check the tensors."""
    function = f"nn.functional.conv{count}d"
    bound = axes_by_dim(function, spread.axis, spread.dim, -count)
    first = bound[0][1]
    check_tensor(x, function, first, name="input")
    check_tensor(weight, function, first, name="weight")
    if bias is not None:
        check_tensor(bias, function, first, name="bias")
    _check_tensors(x, weight, bias, groups, count, first)
    mode = cast(object, spread.padding_mode)
    if not isinstance(mode, str) or mode not in BOUNDARIES:
        given = f"padding_mode is {quoted(mode)}{near_miss(mode, BOUNDARIES)}"
        raise wrong(
            ArgumentError,
            function,
            first,
            given,
            "Pass 'zeros', 'circular', 'reflect' or 'replicate'.",
        )
    told = by_dim(function, spread.sizes, "sizes", spread.axis, bound)
    cuts: list[Cut] = []
    for (key, of), sizes in zip(bound, told, strict=True):
        held = None if sizes is None else check_sizes(sizes, function, of)
        # without a width: what a rank needs follows from the windows
        cuts.append(Cut(of, key, (0, 0), "zeros", held))
    return cuts


def _held(
    function: str, dims: dict[int, _Dim], cuts: list[Cut], x: Tensor, mode: str
) -> dict[int, Cut]:
    """Return the cuts by their dims, with the sizes of all shards.

    What can be checked before these are exchanged is.
    """

    def check(at: int, rows: int, of: Axis) -> None:
        where, padding = f" along dim {at}", dims[at].padding
        error = partial(wrong, ShapeError, function, of)
        _check_length(dims[at], rows, where, error)
        limit = too_wide(padding, rows, BOUNDARIES[mode])
        if limit is not None:
            given = f"padding is {padding} with padding_mode={mode!r}, but the whole has {rows} rows{where}"
            raise wrong(
                ShapeError,
                function,
                of,
                given,
                f"Pass padding of at most {limit}, or padding_mode='zeros'.",
            )

    placed = [places[0] for places in places_of(function, cuts, [x])]
    # ranks may have named the dims in different orders, and must exchange in one
    held = dict(sorted(zip(placed, cuts, strict=True), key=lambda one: one[0]))
    for at, cut in held.items():
        if at not in dims:
            right = f"Pass a dim from {min(dims)} to -1; shards of a batch are convolved by torch alone."
            raise wrong(
                ShapeError,
                function,
                cut.axis,
                f"dim {cut.dim} is not a spatial one",
                right,
            )
        if cut.sizes is not None:
            check(at, sum(cut.sizes), cut.axis)
    for at in dims:
        if at not in held:
            check(at, x.shape[at], cuts[0].axis)
    known = settled(function, list(held.values()), [x], [[at] for at in held], False)
    for at, cut in zip(held, known, strict=True):
        assert cut.sizes is not None
        check(at, sum(cut.sizes), cut.axis)
    return dict(zip(held, known, strict=True))


def _window(
    x: Tensor, dims: dict[int, _Dim], held: dict[int, Cut], boundary: str, axis: Axis
) -> tuple[Tensor, list[int]]:
    """Return what this rank convolves, and the padding that is left to torch."""
    left = dict.fromkeys(dims, 0)
    # dims that are cut come first: what is padded here need not travel
    for at in sorted(dims, key=lambda at: at not in held):
        of, cut = dims[at], held.get(at)
        if cut is not None and cut.axis.size > 1:
            assert cut.sizes is not None
            plan = _plan(cut.axis.index, cut.sizes, of.numbers, boundary)
        elif boundary == "zeros" and of.padding[0] == of.padding[1]:
            # torch pads so itself, without a copy
            left[at] = of.padding[0]
            continue
        else:
            plan = _plan(0, (operator.index(x.shape[at]),), of.numbers, boundary)
        if plan.moves:
            (x,) = carry_out(plan, [x], [at], axis if cut is None else cut.axis)
    return x, list(left.values())


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: object,
    padding: object,
    dilation: object,
    groups: int,
    spread: _Spread,
    count: int,
) -> Tensor:
    """Return this rank's shard of torch's convolution of the whole."""
    function = f"nn.functional.conv{count}d"
    cuts = _parse(spread, count, x, weight, bias, groups)
    axis = cuts[0].axis

    def error(given: str, right: str) -> PmodError:
        return wrong(ShapeError, function, axis, given, right)

    parsed = _dims(
        [operator.index(k) for k in weight.shape[2:]], stride, padding, dilation, error
    )
    dims = dict(zip(range(-count, 0), parsed, strict=True))
    held = _held(function, dims, cuts, x, spread.padding_mode)
    x, left = _window(x, dims, held, BOUNDARIES[spread.padding_mode], axis)
    empty, kept = [at for at in held if x.shape[at] == 0], memory_format(x)
    # torch gives no empty result: a window of zeros is convolved, and the row dropped
    for at in empty:
        x = laid_out_as(F.pad(x, [0, 0] * (-at - 1) + [0, dims[at].extent]), kept)
    strides = [of.stride for of in parsed]
    dilations = [of.dilation for of in parsed]
    y = getattr(F, f"conv{count}d")(
        x, weight, bias, strides, left, dilations, operator.index(groups)
    )
    for at in empty:
        y = y.narrow(at, 0, 0)
    return y


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    axis: AxisLike | Mapping[int, AxisLike],
    dim: int | None = None,
    padding_mode: str = "zeros",
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.conv1d of a whole signal.

    V -> V. Shapes: input (..., channels, k), weight (out, channels / groups, kernel) ->
    (..., out, k'), k' being `conv_sizes` of the k of all ranks at this one.
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
    spread = _Spread(axis, dim, padding_mode, sizes)
    return _conv(input, weight, bias, stride, padding, dilation, groups, spread, 1)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    axis: AxisLike | Mapping[int, AxisLike],
    dim: int | None = None,
    padding_mode: str = "zeros",
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.conv2d of a whole image.

    V -> V. Shapes: input (..., channels, h/ranks, w), weight (out, channels / groups,
    kernel, kernel) -> (..., out, h'/ranks, w'); the shards along a dim that is cut are
    as long as `conv_sizes` says.
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
    spread = _Spread(axis, dim, padding_mode, sizes)
    return _conv(input, weight, bias, stride, padding, dilation, groups, spread, 2)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    axis: AxisLike | Mapping[int, AxisLike],
    dim: int | None = None,
    padding_mode: str = "zeros",
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.conv3d of a whole volume.

    V -> V. Shapes: input (..., channels, d/ranks, h, w), weight (out, channels /
    groups, kernel, kernel, kernel) -> (..., out, d'/ranks, h', w'); the shards along a
    dim that is cut are as long as `conv_sizes` says.
    Cost: as `conv2d`. Raises: as `conv1d`.

    >>> def smooth():
    ...     weight = torch.full((1, 1, 3, 3, 3), 1 / 27)
    ...     pencil = torch.ones(1, 2, 2, 3)  # of a whole (1, 4, 4, 3)
    ...     axes, periodic = {-3: "z", -2: "y"}, "circular"
    ...     return pmod.nn.functional.conv3d(pencil, weight, padding="same", padding_mode=periodic, axis=axes)
    >>> pmod.simulate(smooth, z=2, y=2)[3].shape
    torch.Size([1, 2, 2, 3])
    """
    spread = _Spread(axis, dim, padding_mode, sizes)
    return _conv(input, weight, bias, stride, padding, dilation, groups, spread, 3)
