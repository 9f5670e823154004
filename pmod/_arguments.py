"""Arguments parsed at the boundary: dims count from the end, sizes become tuples of int, wrong ones raise.

Whatever is wrong is found here, before anything is sent; inside, nothing is checked twice.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmod import _groups
from pmod._errors import ArgumentError, AxisError, PmodError, ShapeError, explain
from pmod._mesh import Axis
from pmod._numbers import as_int, as_number, as_real, halves, joined


def wrong(kind: type[PmodError], function: str, axis: Axis, given: str, right: str) -> PmodError:
    """The error to raise: `given` was passed to `function`, `right` would have been."""
    return kind(explain(function, given, right, axis=axis.label, coords=dict(axis.coords)))


def check_flag(on: object, function: str, name: str) -> None:
    """A text such as "no" would count as true."""
    if not isinstance(on, bool | np.bool_):
        raise ArgumentError(explain(function, f"{name} is {on!r}", "Pass True or False."))


def check_function(fn: object, function: str) -> None:
    """What `launch` and `simulate` run on every rank."""
    if not callable(fn):
        right = "Pass the function that the ranks run, then its args."
        raise ArgumentError(explain(function, f"fn is {fn!r}", right))


def check_tolerance(rtol: object, function: str) -> None:
    """A real number of 0 or more."""
    real = as_real(rtol)
    if real is None or not 0 <= real < float("inf"):
        raise ArgumentError(explain(function, f"rtol is {rtol!r}", "Pass a number of 0 or more, such as 1e-6."))


def check_tensor(x: object, function: str, axis: Axis, *, name: str = "x") -> None:
    """x is a dense tensor on a device that the ranks of the mesh send from."""
    if not isinstance(x, Tensor):
        raise wrong(
            ArgumentError,
            function,
            axis,
            f"{name} is a {type(x).__name__}",
            f"Pass a tensor, torch.from_numpy({name})." if isinstance(x, np.ndarray)
            else "Pass a tensor, or a dict, list or tuple of them.",
        )
    if type(x) is not Tensor and hasattr(x, "to_local"):
        raise wrong(ArgumentError, function, axis, f"{name} is a DTensor", f"Pass its shard, {name}.to_local().")
    if x.layout is not torch.strided:
        right = f"Pass a dense tensor, {name}.to_dense()."
        raise wrong(ArgumentError, function, axis, f"{name} has layout {x.layout}", right)
    if not x.is_cpu and x.device != _groups.here().device and not _groups.alone():
        here = _groups.here().device
        raise wrong(
            ArgumentError,
            function,
            axis,
            f"{name} is on {x.device}",
            f"This rank sends from {here}: pass {name}.to({str(here)!r}).",
        )


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
        raise wrong(ArgumentError, function, axis, f"x is {_name(x.dtype)}, which has no mean", "Pass x.float().")


def check_order(x: Tensor, function: str, axis: Axis) -> None:
    """x can be compared: not complex."""
    if x.is_complex():
        raise wrong(ArgumentError, function, axis, "x is complex, which has no order", "Compare x.abs() or x.real.")


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
    """A dim as a negative number; `extra` dims are about to be added; `no_dims` is the advice for a 0-d tensor."""
    ndim = x.dim() + extra
    parsed = as_int(dim)
    if parsed is None:
        raise wrong(ShapeError, function, axis, f"{name} is {dim!r}, a {type(dim).__name__}", "Pass an int.")
    if not -ndim <= parsed < ndim:
        right = f"Pass {name} from {-ndim} to {ndim - 1}." if ndim else no_dims
        raise wrong(ShapeError, function, axis, f"{name} is {parsed} but x has {x.dim()} dims", right)
    return parsed - ndim if parsed >= 0 else parsed


def summand(x: Any, least: type, function: str, axis: Axis) -> Any:
    """A number as the tensor that is added up for it: an int as two, so that no sum wraps."""
    number = as_number(x)
    if number is None or not isinstance(number + least(0), int):
        return from_number(x, least, function, axis)
    try:
        return torch.tensor(halves(int(number.real)), dtype=torch.int64, device=_groups.number_device())
    except OverflowError:
        raise wrong(ArgumentError, function, axis, f"x is {x}, of more than 64 bits", "Pass a float.") from None


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
        return torch.tensor(number, dtype=dtype, device=_groups.number_device())
    except (OverflowError, RuntimeError, ValueError):  # torch raises any of them
        raise wrong(ArgumentError, function, axis, f"x is {x}, too large for {dtype}", "Pass a float.") from None


def _ints(xs: Any) -> tuple[int, ...] | None:
    """The numbers of a sequence, None where it is none or one of them is no int."""
    try:
        parsed = [as_int(x) for x in xs]
    except TypeError:  # not a sequence
        return None
    ints = [x for x in parsed if x is not None]
    return tuple(ints) if len(ints) == len(parsed) else None


def check_sizes(sizes: Sequence[int], function: str, axis: Axis, *, name: str = "sizes") -> tuple[int, ...]:
    """One length per rank of the axis."""
    parsed = _ints(sizes) or ()
    if len(parsed) != axis.size:
        raise wrong(
            ShapeError, function, axis, f"{name} is {sizes!r}", f"Pass {axis.size} ints, one per rank of the axis."
        )
    if min(parsed) < 0:
        raise wrong(ShapeError, function, axis, f"{name} is {parsed}", "A size is 0 or more.")
    return parsed


def check_adds_up(x: Tensor, at: int, sizes: tuple[int, ...], function: str, axis: Axis, name: str = "sizes") -> None:
    """The sizes cut all of x along the dim."""
    if sum(sizes) != x.shape[at]:
        given = f"{name} {sizes} add up to {sum(sizes)} but x.shape[{x.dim() + at}] is {x.shape[at]}"
        right = f"Pass {name} that add up to {x.shape[at]}, {shares(int(x.shape[at]), axis)} say."
        raise wrong(ShapeError, function, axis, given, right)


def check_own_size(x: Tensor, at: int, sizes: tuple[int, ...], function: str, axis: Axis, right: str) -> None:
    """x has the length that the sizes say for this rank."""
    if sizes[axis.index] != x.shape[at]:
        given = f"sizes[{axis.index}] is {sizes[axis.index]} but x.shape[{x.dim() + at}] is {x.shape[at]}"
        raise wrong(ShapeError, function, axis, given, right)


def check_root(root: object, function: str, axis: Axis, *, name: str) -> int:
    """An index along the axis."""
    parsed = as_int(root)
    if parsed is None or not 0 <= parsed < axis.size:
        raise wrong(
            AxisError, function, axis, f"{name} is {root!r}", f"Pass an index along the axis, 0 to {axis.size - 1}."
        )
    return parsed


def targets_of(perm: Sequence[tuple[int, int]], function: str, axis: Axis) -> tuple[int, ...]:
    """(source, target) pairs as a table: where each rank's value goes, -1 for nowhere."""
    targets = [-1] * axis.size
    try:
        pairs = [_ints(pair) for pair in perm]
    except TypeError:  # not a sequence
        pairs = [None]
    for pair in pairs:
        if pair is None or len(pair) != 2:
            raise _wrong_perm(f"perm is {perm!r}", function, axis)
        source, target = pair
        if not (0 <= source < axis.size and 0 <= target < axis.size):
            raise _wrong_perm(f"perm holds {(source, target)}, outside the axis", function, axis)
        if targets[source] != -1:
            raise _wrong_perm(f"perm has the source {source} twice", function, axis)
        if target in targets:
            raise _wrong_perm(f"perm has the target {target} twice", function, axis)
        targets[source] = target
    return tuple(targets)


def _wrong_perm(given: str, function: str, axis: Axis) -> PmodError:
    right = f"Pass (source, target) pairs of indices 0 to {axis.size - 1}, each source and each target once."
    return wrong(AxisError, function, axis, given, right)


def check_permutation(perm: Sequence[int], function: str, axis: Axis) -> tuple[int, ...]:
    """Every index along the axis, once each."""
    parsed = _ints(perm) or ()
    if sorted(parsed) != list(range(axis.size)):
        raise wrong(
            AxisError,
            function,
            axis,
            f"perm is {perm!r}, no permutation",
            f"Pass each index 0 to {axis.size - 1} once; perm[i] is where output i comes from.",
        )
    return parsed


def accumulate_in(reduce_dtype: torch.dtype | None, function: str, axis: Axis) -> str | None:
    """The name of the dtype to add up in, None for the default."""
    if reduce_dtype is None:
        return None
    if not isinstance(reduce_dtype, torch.dtype) or not reduce_dtype.is_floating_point:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise wrong(
            ArgumentError,
            function,
            axis,
            f"reduce_dtype is {reduce_dtype!r}",
            "Pass a floating dtype, torch.float32 say.",
        )
    return _name(reduce_dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shares(n: int, axis: Axis) -> tuple[int, ...]:
    """How a dim of length n is cut along an axis; along several, the shares of one are cut along the next."""
    return split_sizes(n, axis.parts)


def split_sizes(n: int, parts: int | tuple[int, ...] | list[int]) -> tuple[int, ...]:
    """How `shard` cuts a dim of length n: ceil(n / parts) each, the last ones shorter or empty.

    The convention of torch.chunk and DTensor, so that a shard is the same thing to pmod, DTensor, FSDP2 and DCP. With
    one number per axis, a dim that is cut over several axes: first along the first, then each part along the next.

    Raises: ShapeError where n is negative or parts is less than 1.

    >>> pmod.split_sizes(10, 4)
    (3, 3, 3, 1)
    >>> pmod.split_sizes(5, 4)
    (2, 2, 1, 0)
    >>> pmod.split_sizes(9, (2, 2))
    (3, 2, 2, 2)
    """
    if isinstance(parts, tuple | list):
        lengths = split_sizes(n, 1)
        for each in parts:
            lengths = tuple([part for length in lengths for part in split_sizes(length, each)])
        return lengths
    length, count = as_int(n), as_int(parts)
    if length is None or count is None or length < 0 or count < 1:
        given = f"n is {n!r} and parts is {parts!r}"
        raise ShapeError(explain("split_sizes", given, "Pass a length of 0 or more and 1 or more parts."))
    length = operator.index(length)  # plain: sizes go into the call, whose text torch.compile cannot write with symbols
    step = -(-length // count)
    return tuple(max(0, min(step, length - step * i)) for i in range(count))
