"""Arguments parsed at the boundary: dims count from the end, sizes become tuples of int, wrong ones raise.

Whatever is wrong is found here, before anything is sent; inside, nothing is checked twice.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from pmod import _groups
from pmod._errors import ArgumentError, AxisError, PmodError, ShapeError, explain
from pmod._mesh import Axis


def wrong(kind: type[PmodError], function: str, axis: Axis, given: str, right: str) -> PmodError:
    """The error to raise: `given` was passed to `function`, `right` would have been."""
    return kind(explain(function, given, right, axis=axis.label, coords=dict(axis.coords)))


def check_tensor(x: object, function: str, axis: Axis, *, name: str = "x") -> None:
    """x is a dense tensor on a device that the ranks of the mesh send from."""
    if not isinstance(x, Tensor):
        raise wrong(
            ArgumentError,
            function,
            axis,
            f"{name} is a {type(x).__name__}",
            "Pass a tensor, or a dict, list or tuple of them.",
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


def _as_int(x: object) -> int | None:
    """x as an int where it is one, of numpy too; None for anything else, bool included."""
    if type(x) is int:
        return x
    return operator.index(x) if isinstance(x, SupportsIndex) and not isinstance(x, bool) else None


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
    parsed = _as_int(dim)
    if parsed is None:
        raise wrong(ShapeError, function, axis, f"{name} is {dim!r}, a {type(dim).__name__}", "Pass an int.")
    if not -ndim <= parsed < ndim:
        right = f"Pass {name} from {-ndim} to {ndim - 1}." if ndim else no_dims
        raise wrong(ShapeError, function, axis, f"{name} is {parsed} but x has {x.dim()} dims", right)
    return parsed - ndim if parsed >= 0 else parsed


def check_sizes(sizes: Sequence[int], function: str, axis: Axis, *, name: str = "sizes") -> tuple[int, ...]:
    """One length per rank of the axis."""
    try:
        parsed = tuple([operator.index(size) for size in sizes])
    except TypeError:  # not a sequence, or not of ints
        parsed = ()
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
    parsed = _as_int(root)
    if parsed is None or not 0 <= parsed < axis.size:
        raise wrong(
            AxisError, function, axis, f"{name} is {root!r}", f"Pass an index along the axis, 0 to {axis.size - 1}."
        )
    return parsed


def targets_of(perm: Sequence[tuple[int, int]], function: str, axis: Axis) -> tuple[int, ...]:
    """(source, target) pairs as a table: where each rank's value goes, -1 for nowhere."""
    if axis.size == 1 and perm == [(0, 0)]:  # a ring of one, which costs as little as it does
        return (0,)
    targets = [-1] * axis.size
    index = operator.index
    try:
        pairs = [(index(source), index(target)) for source, target in perm]
    except (TypeError, ValueError):
        raise _wrong_perm(f"perm is {perm!r}", function, axis) from None
    for source, target in pairs:
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
    if axis.size == 1 and perm == [0]:
        return (0,)
    try:
        parsed = [operator.index(source) for source in perm]
    except TypeError:
        parsed = []
    if sorted(parsed) != list(range(axis.size)):
        raise wrong(
            AxisError,
            function,
            axis,
            f"perm is {perm!r}, no permutation",
            f"Pass each index 0 to {axis.size - 1} once; perm[i] is where output i comes from.",
        )
    return tuple(parsed)


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
    ints = all(isinstance(size, int) for size in (n, parts))  # pyright: ignore[reportUnnecessaryIsInstance]
    if not ints or n < 0 or parts < 1:
        given = f"n is {n!r} and parts is {parts!r}"
        raise ShapeError(explain("split_sizes", given, "Pass a length of 0 or more and 1 or more parts."))
    n = operator.index(n)  # plain: sizes go into the call, whose text torch.compile cannot write with symbols
    step = -(-n // parts)
    return tuple(max(0, min(step, n - step * i)) for i in range(parts))
