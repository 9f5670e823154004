"""Arguments parsed at the boundary: dims count from the end, sizes become tuples of
int, wrong ones raise.

Whatever is wrong is found here, before anything is sent; inside, nothing is checked
twice.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from pmod._errors import ArgumentError, AxisError, PmodError, ShapeError, phrase, quoted
from pmod._mesh.axis import Axis
from pmod._numbers import as_int, as_ints, as_list, as_number, as_real, halves, joined
from pmod._ranks import world
from pmod._ranks.topology import MOST_RANKS


def wrong(
    kind: type[PmodError], function: str, axis: Axis, given: str, right: str
) -> PmodError:
    """The error to raise: `given` was passed to `function`, `right` would have been."""
    return kind(
        phrase(function, given, right, axis=axis.label, coords=dict(axis.coords))
    )


_FLAGS: Any = (
    bool,
    np.bool_,
)  # a union would be made anew where torch.compile follows this


def check_flag(on: object, function: str, name: str) -> None:
    """A text such as "no" would count as true."""
    if not isinstance(on, _FLAGS):
        raise ArgumentError(
            phrase(function, f"{name} is {quoted(on)}", "Pass True or False.")
        )


def check_function(fn: object, function: str, name: str = "fn") -> None:
    """What is run on the ranks."""
    if not callable(fn):
        right = "Pass the function that the ranks run, then its args."
        raise ArgumentError(phrase(function, f"{name} is {quoted(fn)}", right))


def as_width(width: object) -> tuple[int, int] | None:
    """Rows before and after, or as many on both sides; None where it is neither."""
    rows = as_int(width)
    pair = as_ints(width) if rows is None else (rows, rows)
    if pair is None or len(pair) != 2 or min(pair) < 0:
        return None
    before, after = pair
    return operator.index(before), operator.index(
        after
    )  # constants in a compiled graph


def check_tolerance(rtol: object, function: str) -> float:
    """A real number of 0 or more."""
    real = as_real(rtol)
    if real is None or not 0 <= real < float("inf"):
        raise ArgumentError(
            phrase(
                function,
                f"rtol is {quoted(rtol)}",
                "Pass a number of 0 or more, such as 1e-6.",
            )
        )
    return float(real)


# Of the others torch only stores the bits: it neither copies nor converts them, or has
# no zero among them.
_SENT = frozenset(
    {
        torch.bool,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex32,
        torch.complex64,
        torch.complex128,
    }
)


def check_tensor(x: object, function: str, axis: Axis, *, name: str = "x") -> None:
    """x is a dense tensor of numbers, on a device that the ranks of the mesh send from:
    what any message is made of.
    """
    if not isinstance(x, Tensor):
        raise wrong(
            ArgumentError,
            function,
            axis,
            f"{name} is a {type(x).__name__}",
            f"Pass a tensor, torch.from_numpy({name})."
            if isinstance(x, np.ndarray)
            else "Pass a tensor, or a dict, list or tuple of them.",
        )
    unfit = _unfit_kind(x, name)
    if unfit is not None:
        raise wrong(ArgumentError, function, axis, *unfit)
    if not x.is_cpu and x.device != world.here().device and not world.current().alone:
        here = world.here().device
        right = f"This rank sends from {here}: pass {name}.to({str(here)!r})."
        if x.is_meta:
            right = f"It has no values: pass a tensor on {here}, or see what would be sent with pmod.estimate."
        raise wrong(ArgumentError, function, axis, f"{name} is on {x.device}", right)


LONGEST = sys.maxsize // torch.complex128.itemsize
"""The longest dim that can be addressed, of the largest numbers."""


def _unfit_kind(x: Tensor, name: str) -> tuple[str, str] | None:
    """What is wrong with the kind of a tensor, and what would be right; None for a
    dense tensor of numbers.
    """
    if type(x) is not Tensor:
        if isinstance(
            x, UninitializedParameter | UninitializedBuffer
        ):  # is_lazy(x), which torch.compile refuses
            given = f"{name} is a {type(x).__name__}, which has no shape yet"
            return given, "Call its module once, which gives it one."
        if hasattr(x, "to_local"):
            return f"{name} is a DTensor", f"Pass its shard, {name}.to_local()."
    if x.is_nested:
        return (
            f"{name} is a nested tensor",
            f"Pass the list of its parts, list({name}.unbind()).",
        )
    if x.layout is not torch.strided:
        return (
            f"{name} has layout {x.layout}",
            f"Pass a dense tensor, {name}.to_dense().",
        )
    if x.is_quantized:
        return (
            f"{name} is quantized, {_name(x.dtype)}",
            f"Pass {name}.dequantize(), or {name}.int_repr().",
        )
    if x.dtype not in _SENT:
        return (
            f"{name} is {_name(x.dtype)}, which torch only stores",
            f"Pass its bytes, {name}.view(torch.uint8).",
        )
    return None


def check_sum(x: Tensor, function: str, axis: Axis) -> None:
    """x can be added up: not bool."""
    if x.dtype == torch.bool:
        raise wrong(
            ArgumentError,
            function,
            axis,
            "x is bool, and a sum of truth values is ambiguous",
            "Pass x.int() to count, or use pmax for any and pmin for all.",
        )


def check_mean(x: Tensor, function: str, axis: Axis) -> None:
    """x can be averaged: floating or complex."""
    if not (x.is_floating_point() or x.is_complex()):
        raise wrong(
            ArgumentError,
            function,
            axis,
            f"x is {_name(x.dtype)}, which has no mean",
            "Pass x.float().",
        )


def check_order(x: Tensor, function: str, axis: Axis) -> None:
    """x can be compared: not complex."""
    if x.is_complex():
        raise wrong(
            ArgumentError,
            function,
            axis,
            "x is complex, which has no order",
            "Compare x.abs() or x.real.",
        )


def dim_from_end(
    dim: object,
    x: Tensor,
    function: str,
    axis: Axis,
    *,
    name: str = "dim",
    extra: int = 0,
    no_dims: str = "Pass a tensor with a dim.",
) -> int:
    """A dim as a negative number; `extra` dims are about to be added; `no_dims` is the
    advice for a 0-d tensor.
    """
    ndim = x.dim() + extra
    parsed = as_int(dim)
    if parsed is None:
        raise wrong(
            ShapeError,
            function,
            axis,
            f"{name} is {quoted(dim)}, a {type(dim).__name__}",
            "Pass an int.",
        )
    if not -ndim <= parsed < ndim:
        right = f"Pass {name} from {-ndim} to {ndim - 1}." if ndim else no_dims
        raise wrong(
            ShapeError,
            function,
            axis,
            f"{name} is {parsed} but x has {x.dim()} dims",
            right,
        )
    return parsed - ndim if parsed >= 0 else parsed


def summand(x: Any, least: type, function: str, axis: Axis) -> Any:
    """A number as the tensor that is added up for it: an int as two, so that no sum
    wraps.
    """
    number = as_number(x)
    if number is None or not isinstance(number + least(0), int):
        return from_number(x, least, function, axis)
    try:
        return torch.tensor(
            halves(int(number.real)), dtype=torch.int64, device=world.number_device()
        )
    except OverflowError:
        raise wrong(
            ArgumentError,
            function,
            axis,
            f"x is {x}, of more than 64 bits",
            "Pass a float.",
        ) from None


def total_of(y: Tensor) -> Any:
    """The number that summands add up to."""
    return joined(*y.tolist()) if y.dim() else y.item()


def from_number(x: Any, least: type, function: str, axis: Axis) -> Any:
    """A number as the 0-d tensor that travels for it; anything else unchanged."""
    number = as_number(x)
    if number is None:
        return x
    widest = type(number + least(0))
    dtype = {int: torch.int64, float: torch.float64, complex: torch.complex128}[widest]
    try:
        return torch.tensor(number, dtype=dtype, device=world.number_device())
    except (OverflowError, RuntimeError, ValueError):  # torch raises any of them
        raise wrong(
            ArgumentError,
            function,
            axis,
            f"x is {x}, too large for {dtype}",
            "Pass a float.",
        ) from None


def check_sizes(
    sizes: Sequence[int], function: str, axis: Axis, *, name: str = "sizes"
) -> tuple[int, ...]:
    """One length per rank of the axis."""
    parsed = as_ints(sizes) or ()
    if len(parsed) != axis.size:
        right = f"Pass {axis.size} ints, one per rank of the axis."
        raise wrong(ShapeError, function, axis, f"{name} is {quoted(sizes)}", right)
    if min(parsed) < 0:
        raise wrong(
            ShapeError, function, axis, f"{name} is {parsed}", "A size is 0 or more."
        )
    if sum(parsed) > LONGEST:
        raise wrong(
            ShapeError,
            function,
            axis,
            f"{name} is {parsed}",
            "No machine addresses so much memory.",
        )
    return parsed


def check_adds_up(
    x: Tensor,
    at: int,
    sizes: tuple[int, ...],
    function: str,
    axis: Axis,
    name: str = "sizes",
) -> None:
    """The sizes cut all of x along the dim."""
    if sum(sizes) != x.shape[at]:
        given = f"{name} {sizes} add up to {sum(sizes)} but x.shape[{x.dim() + at}] is {x.shape[at]}"
        right = f"Pass {name} that add up to {x.shape[at]}, {shares(int(x.shape[at]), axis)} say."
        raise wrong(ShapeError, function, axis, given, right)


def check_own_size(
    x: Tensor, at: int, sizes: tuple[int, ...], function: str, axis: Axis, right: str
) -> None:
    """x has the length that the sizes say for this rank."""
    if sizes[axis.index] != x.shape[at]:
        given = f"sizes[{axis.index}] is {sizes[axis.index]} but x.shape[{x.dim() + at}] is {x.shape[at]}"
        raise wrong(ShapeError, function, axis, given, right)


def check_root(root: object, function: str, axis: Axis, *, name: str) -> int:
    """An index along the axis."""
    parsed = as_int(root)
    if parsed is None or not 0 <= parsed < axis.size:
        right = f"Pass an index along the axis, 0 to {axis.size - 1}."
        raise wrong(AxisError, function, axis, f"{name} is {quoted(root)}", right)
    return parsed


def targets_of(
    perm: Sequence[tuple[int, int]], function: str, axis: Axis
) -> tuple[int, ...]:
    """(source, target) pairs as a table: where each rank's value goes, -1 for nowhere."""
    targets = [-1] * axis.size
    listed = as_list(perm)
    for pair in [None] if listed is None else map(as_ints, listed):
        if pair is None or len(pair) != 2:
            raise _wrong_perm(f"perm is {quoted(perm)}", function, axis)
        source, target = pair
        if not (0 <= source < axis.size and 0 <= target < axis.size):
            raise _wrong_perm(
                f"perm holds {(source, target)}, outside the axis", function, axis
            )
        if targets[source] != -1:
            raise _wrong_perm(f"perm has the source {source} twice", function, axis)
        if target in targets:
            raise _wrong_perm(f"perm has the target {target} twice", function, axis)
        targets[source] = target
    return tuple(targets)


def _wrong_perm(given: str, function: str, axis: Axis) -> PmodError:
    right = f"Pass (source, target) pairs of indices 0 to {axis.size - 1}, each source and each target once."
    return wrong(AxisError, function, axis, given, right)


def check_permutation(
    perm: Sequence[int], function: str, axis: Axis
) -> tuple[int, ...]:
    """Every index along the axis, once each."""
    parsed = as_ints(perm) or ()
    if sorted(parsed) != list(range(axis.size)):
        raise wrong(
            AxisError,
            function,
            axis,
            f"perm is {quoted(perm)}, no permutation",
            f"Pass each index 0 to {axis.size - 1} once; perm[i] is where output i comes from.",
        )
    return parsed


_ADDED_IN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulate_in(
    reduce_dtype: torch.dtype | None, function: str, axis: Axis
) -> str | None:
    """The name of the dtype to add up in, None for the default."""
    if reduce_dtype is None:
        return None
    if not isinstance(reduce_dtype, torch.dtype) or reduce_dtype not in _ADDED_IN:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise wrong(
            ArgumentError,
            function,
            axis,
            f"reduce_dtype is {quoted(reduce_dtype)}",
            "Pass a floating dtype of 16 bits or more, such as torch.float32.",
        )
    return _name(reduce_dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shares(n: int, axis: Axis) -> tuple[int, ...]:
    """How a dim of length n is cut along an axis; along several, the shares of one are
    cut along the next.
    """
    return split_sizes(n, axis.parts)


def split_sizes(n: int, parts: int | tuple[int, ...] | list[int]) -> tuple[int, ...]:
    """How `shard` cuts a dim of length n: ceil(n / parts) each, the last ones shorter
    or empty.

    The convention of torch.chunk and DTensor, so that a shard is the same thing to
    pmod, DTensor, FSDP2 and DCP. With one number per axis, a dim that is cut over
    several axes: first along the first, then each part along the next.

    Raises: ShapeError where n is negative, or parts is less than 1 or more than there
    can be ranks.

    >>> pmod.split_sizes(10, 4)
    (3, 3, 3, 1)
    >>> pmod.split_sizes(5, 4)
    (2, 2, 1, 0)
    >>> pmod.split_sizes(9, (2, 2))
    (3, 2, 2, 2)
    """
    listed = as_list(parts)
    if listed is None:
        listed = [parts]
    length, counts = (
        as_int(n),
        [number for number in map(as_int, listed) if number is not None and number > 0],
    )
    if length is None or length < 0 or len(counts) != len(listed):
        given = f"n is {quoted(n)} and parts is {quoted(parts)}"
        raise ShapeError(
            phrase(
                "split_sizes", given, "Pass a length of 0 or more and 1 or more parts."
            )
        )
    if math.prod(counts) > MOST_RANKS:
        raise ShapeError(
            phrase(
                "split_sizes",
                f"parts is {quoted(parts)}",
                f"There are at most {MOST_RANKS} ranks.",
            )
        )
    # plain: sizes go into the call, whose text torch.compile cannot write with symbols
    lengths: tuple[int, ...] = (operator.index(length),)
    for count in counts:
        lengths = tuple([part for whole in lengths for part in _cut(whole, count)])
    return lengths


def _cut(length: int, count: int) -> tuple[int, ...]:
    step = -(-length // count)
    whole, rest = divmod(length, step) if step else (0, 0)
    parts = (step,) * whole + (rest,) * (rest > 0)
    return parts + (0,) * (count - len(parts))
