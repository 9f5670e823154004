"""Arguments parsed at the boundary, where wrong ones raise.

Dims count from the end, sizes become tuples of int. Whatever is wrong is found here,
before anything is sent; inside, nothing is checked twice.
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
from pmod._numbers import (
    Number,
    as_int,
    as_ints,
    as_list,
    as_number,
    as_real,
    halves,
    joined,
)
from pmod._ranks import world
from pmod._ranks.topology import MOST_RANKS


def wrong(
    kind: type[PmodError], function: str, axis: Axis, given: str, right: str
) -> PmodError:
    """Return the error to raise: what was passed to `function`, and what to pass."""
    coords = dict(axis.coords)
    return kind(phrase(function, given, right, axis=axis.label, coords=coords))


# a union would be made anew where torch.compile follows this
_FLAGS: tuple[type, ...] = (bool, np.bool_)


def check_flag(on: object, function: str, name: str) -> None:
    """Raise if it is not True or False, since a text such as "no" counts as true."""
    if not isinstance(on, _FLAGS):
        given = f"{name} is {quoted(on)}"
        raise ArgumentError(phrase(function, given, "Pass True or False."))


def check_function(fn: object, function: str, name: str = "fn") -> None:
    """Raise for what cannot be run on the ranks."""
    if not callable(fn):
        right = "Pass the function that the ranks run, then its args."
        raise ArgumentError(phrase(function, f"{name} is {quoted(fn)}", right))


def as_width(width: object) -> tuple[int, int] | None:
    """Return the rows before and after; an int is both; None for anything else."""
    rows = as_int(width)
    pair = as_ints(width) if rows is None else (rows, rows)
    if pair is None or len(pair) != 2:
        return None
    before, after = pair
    if before < 0 or after < 0:
        return None
    # constants in a compiled graph
    return operator.index(before), operator.index(after)


def check_tolerance(rtol: object, function: str) -> float:
    """Return a real number of 0 or more."""
    real = as_real(rtol)
    if real is None or not 0 <= real < float("inf"):
        right = "Pass a number of 0 or more, such as 1e-6."
        raise ArgumentError(phrase(function, f"rtol is {quoted(rtol)}", right))
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
    """Raise unless x is what a message is made of.

    That is a dense tensor of numbers, on a device that the ranks of the mesh send from.
    """
    if not isinstance(x, Tensor):
        right = "Pass a tensor, or a dict, list or tuple of them."
        if isinstance(x, np.ndarray):
            right = f"Pass a tensor, torch.from_numpy({name})."
        given = f"{name} is a {type(x).__name__}"
        raise wrong(ArgumentError, function, axis, given, right)
    unfit = unfit_kind(x, name)
    if unfit is not None:
        raise wrong(ArgumentError, function, axis, *unfit)
    # any rank also sends from its CPU
    if x.is_cpu:
        return
    here = world.here().device
    if x.device != here and not world.current().alone:
        right = f"This rank sends from {here}: pass {name}.to({str(here)!r})."
        if x.is_meta:
            right = f"It has no values: pass a tensor on {here}, or see what would be "
            right += "sent with pmod.estimate."
        raise wrong(ArgumentError, function, axis, f"{name} is on {x.device}", right)


LONGEST = sys.maxsize // torch.complex128.itemsize
"""The longest dim that can be addressed, of the largest numbers."""


def unfit_kind(x: Tensor, name: str) -> tuple[str, str] | None:
    """Return what is wrong with the kind of a tensor, and what would be right.

    None for a dense tensor of numbers.
    """
    if type(x) is not Tensor:
        # is_lazy(x) asks the same, but torch.compile refuses it
        if isinstance(x, UninitializedParameter | UninitializedBuffer):
            given = f"{name} is a {type(x).__name__}, which has no shape yet"
            return given, "Call its module once, which gives it one."
        if hasattr(x, "to_local"):
            return f"{name} is a DTensor", f"Pass its shard, {name}.to_local()."
    if x.is_nested:
        right = f"Pass the list of its parts, list({name}.unbind())."
        return f"{name} is a nested tensor", right
    if x.layout is not torch.strided:
        right = f"Pass a dense tensor, {name}.to_dense()."
        return f"{name} has layout {x.layout}", right
    if x.is_quantized:
        right = f"Pass {name}.dequantize(), or {name}.int_repr()."
        return f"{name} is quantized, {_name(x.dtype)}", right
    if x.dtype not in _SENT:
        right = f"Pass its bytes, {name}.view(torch.uint8)."
        return f"{name} is {_name(x.dtype)}, which torch only stores", right
    return None


def check_sum(x: Tensor, function: str, axis: Axis) -> None:
    """Raise if x cannot be added up, because it is bool."""
    if x.dtype == torch.bool:
        given = "x is bool, and a sum of truth values is ambiguous"
        right = "Pass x.int() to count, or use pmax for any and pmin for all."
        raise wrong(ArgumentError, function, axis, given, right)


def check_mean(x: Tensor, function: str, axis: Axis) -> None:
    """Raise if x cannot be averaged, because it is neither floating nor complex."""
    if not (x.is_floating_point() or x.is_complex()):
        given = f"x is {_name(x.dtype)}, which has no mean"
        raise wrong(ArgumentError, function, axis, given, "Pass x.float().")


def check_order(x: Tensor, function: str, axis: Axis) -> None:
    """Raise if x cannot be compared, because it is complex."""
    if x.is_complex():
        given = "x is complex, which has no order"
        raise wrong(ArgumentError, function, axis, given, "Compare x.abs() or x.real.")


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
    """Return a dim as a negative number.

    extra: how many dims are about to be added; no_dims: the advice for a 0-d tensor.
    """
    ndim = x.dim() + extra
    parsed = as_int(dim)
    if parsed is None:
        given = f"{name} is {quoted(dim)}, a {type(dim).__name__}"
        raise wrong(ShapeError, function, axis, given, "Pass an int.")
    if not -ndim <= parsed < ndim:
        given = f"{name} is {parsed} but x has {x.dim()} dims"
        right = f"Pass {name} from {-ndim} to {ndim - 1}." if ndim else no_dims
        raise wrong(ShapeError, function, axis, given, right)
    if parsed < 0:
        return parsed
    return parsed - ndim


def summand(x: Any, least: type, function: str, axis: Axis) -> Any:
    """Return the tensor that is added up for a number; anything else unchanged."""
    number = as_number(x)
    if number is None or not isinstance(number + least(0), int):
        return from_number(x, least, function, axis)
    # an int as two, so that no sum wraps
    try:
        pair = halves(int(number.real))
    except OverflowError:
        given = f"x is {x}, of more than 64 bits"
        raise wrong(ArgumentError, function, axis, given, "Pass a float.") from None
    return torch.tensor(pair, dtype=torch.int64, device=world.number_device())


def total_of(y: Tensor) -> Number:
    """Return the number that summands add up to."""
    if y.dim() == 0:
        return y.item()
    return joined(*y.tolist())


_DTYPES = {int: torch.int64, float: torch.float64, complex: torch.complex128}


def from_number(x: Any, least: type, function: str, axis: Axis) -> Any:
    """Return the 0-d tensor that travels for a number; anything else unchanged."""
    number = as_number(x)
    if number is None:
        return x
    dtype = _DTYPES[type(number + least(0))]
    try:
        return torch.tensor(number, dtype=dtype, device=world.number_device())
    except (OverflowError, RuntimeError, ValueError):
        # which of them torch raises depends on the dtype
        given = f"x is {x}, too large for {dtype}"
        raise wrong(ArgumentError, function, axis, given, "Pass a float.") from None


def check_sizes(
    sizes: Sequence[int], function: str, axis: Axis, *, name: str = "sizes"
) -> tuple[int, ...]:
    """Return one length per rank of the axis."""
    parsed = as_ints(sizes) or ()
    if len(parsed) != axis.size:
        right = f"Pass {axis.size} ints, one per rank of the axis."
        raise wrong(ShapeError, function, axis, f"{name} is {quoted(sizes)}", right)
    given = f"{name} is {parsed}"
    if min(parsed) < 0:
        raise wrong(ShapeError, function, axis, given, "A size is 0 or more.")
    if sum(parsed) > LONGEST:
        right = "No machine addresses so much memory."
        raise wrong(ShapeError, function, axis, given, right)
    return parsed


def check_adds_up(
    x: Tensor,
    at: int,
    sizes: tuple[int, ...],
    function: str,
    axis: Axis,
    name: str = "sizes",
) -> None:
    """Raise unless the sizes cut all of x along the dim."""
    length = x.shape[at]
    if sum(sizes) != length:
        given = f"{name} {sizes} add up to {sum(sizes)} "
        given += f"but x.shape[{x.dim() + at}] is {length}"
        right = f"Pass {name} that add up to {length}, "
        right += f"{shares(int(length), axis)} say."
        raise wrong(ShapeError, function, axis, given, right)


def check_own_size(
    x: Tensor, at: int, sizes: tuple[int, ...], function: str, axis: Axis, right: str
) -> None:
    """Raise unless x has the length that the sizes say for this rank."""
    own = sizes[axis.index]
    if own != x.shape[at]:
        given = f"sizes[{axis.index}] is {own} "
        given += f"but x.shape[{x.dim() + at}] is {x.shape[at]}"
        raise wrong(ShapeError, function, axis, given, right)


def check_root(root: object, function: str, axis: Axis, *, name: str) -> int:
    """Return an index along the axis."""
    parsed = as_int(root)
    if parsed is None or not 0 <= parsed < axis.size:
        right = f"Pass an index along the axis, 0 to {axis.size - 1}."
        raise wrong(AxisError, function, axis, f"{name} is {quoted(root)}", right)
    return parsed


def targets_of(
    perm: Sequence[tuple[int, int]], function: str, axis: Axis
) -> tuple[int, ...]:
    """Return where the value of each rank goes, -1 for nowhere.

    perm: (source, target) pairs.
    """
    targets = [-1] * axis.size
    listed = as_list(perm)
    if listed is None:
        raise _wrong_perm(f"perm is {quoted(perm)}", function, axis)
    inside = range(axis.size)
    for pair in map(as_ints, listed):
        if pair is None or len(pair) != 2:
            raise _wrong_perm(f"perm is {quoted(perm)}", function, axis)
        source, target = pair
        if source not in inside or target not in inside:
            given = f"perm holds {(source, target)}, outside the axis"
            raise _wrong_perm(given, function, axis)
        if targets[source] != -1:
            raise _wrong_perm(f"perm has the source {source} twice", function, axis)
        if target in targets:
            raise _wrong_perm(f"perm has the target {target} twice", function, axis)
        targets[source] = target
    return tuple(targets)


def _wrong_perm(given: str, function: str, axis: Axis) -> PmodError:
    right = f"Pass (source, target) pairs of indices 0 to {axis.size - 1}, "
    right += "each source and each target once."
    return wrong(AxisError, function, axis, given, right)


def check_permutation(
    perm: Sequence[int], function: str, axis: Axis
) -> tuple[int, ...]:
    """Return every index along the axis, once each."""
    parsed = as_ints(perm) or ()
    if sorted(parsed) != list(range(axis.size)):
        given = f"perm is {quoted(perm)}, no permutation"
        right = f"Pass each index 0 to {axis.size - 1} once; "
        right += "perm[i] is where output i comes from."
        raise wrong(AxisError, function, axis, given, right)
    return parsed


_ADDED_IN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulate_in(
    reduce_dtype: torch.dtype | None, function: str, axis: Axis
) -> str | None:
    """Return the name of the dtype to add up in, None for the default."""
    if reduce_dtype is None:
        return None
    if not isinstance(reduce_dtype, torch.dtype) or reduce_dtype not in _ADDED_IN:  # pyright: ignore[reportUnnecessaryIsInstance]
        given = f"reduce_dtype is {quoted(reduce_dtype)}"
        right = "Pass a floating dtype of 16 bits or more, such as torch.float32."
        raise wrong(ArgumentError, function, axis, given, right)
    return _name(reduce_dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shares(n: int, axis: Axis) -> tuple[int, ...]:
    """Return how a dim of length n is cut along an axis.

    Along several, the shares of one are cut along the next.
    """
    return split_sizes(n, axis.parts)


def split_sizes(n: int, parts: int | tuple[int, ...] | list[int]) -> tuple[int, ...]:
    """Return how `shard` cuts a dim of length n into parts.

    Each has length ceil(n / parts); the last ones are shorter or empty. That is the
    convention of torch.chunk and DTensor, so that a shard is the same thing to pmod,
    DTensor, FSDP2 and DCP. One number per axis cuts the dim over several axes: along
    the first, then each part along the next.

    Raises: ShapeError if n is negative, or if parts is less than 1 or more than there
    can be ranks.

    >>> pmod.split_sizes(10, 4)
    (3, 3, 3, 1)
    >>> pmod.split_sizes(5, 4)
    (2, 2, 1, 0)
    >>> pmod.split_sizes(9, (2, 2))
    (3, 2, 2, 2)
    """
    count, length = as_int(parts), as_int(n)
    counts = as_ints(parts) if count is None else (count,)
    if length is None or length < 0:
        raise _unfit_split(n, parts)
    if counts is None or min(counts, default=1) < 1:
        raise _unfit_split(n, parts)
    if math.prod(counts) > MOST_RANKS:
        right = f"There are at most {MOST_RANKS} ranks."
        raise ShapeError(phrase("split_sizes", f"parts is {quoted(parts)}", right))
    # plain: sizes go into the call, whose text torch.compile cannot write with symbols
    lengths: tuple[int, ...] = (operator.index(length),)
    for each in counts:
        cuts = [_cut(whole, each) for whole in lengths]
        lengths = sum(cuts, ())
    return lengths


def _unfit_split(n: object, parts: object) -> ShapeError:
    given = f"n is {quoted(n)} and parts is {quoted(parts)}"
    right = "Pass a length of 0 or more and 1 or more parts."
    return ShapeError(phrase("split_sizes", given, right))


def _cut(length: int, count: int) -> tuple[int, ...]:
    step = -(-length // count)
    starts = [min(step * part, length) for part in range(count)]
    return tuple([min(step, length - start) for start in starts])
