"""What counts as a number: Python's numbers and numpy's scalars, in the one place that
says so.

An array or a tensor is not a number, whatever its size; a bool is not an int, nor is a
tensor of one.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any, SupportsIndex, cast

import numpy as np
import torch

Number = bool | int | float | complex
_KINDS: tuple[Any, ...] = (bool, int, float, complex)
_NUMPY: Any = (
    np.number,
    np.bool_,
)  # a union would be made anew where torch.compile follows this


def as_int(x: object) -> int | None:
    """Return x as an int if it is one, of numpy too; None for anything else, bool
    included.
    """
    if isinstance(
        x, int
    ):  # torch.compile follows this question, of its symbols too, and not the next one
        return None if isinstance(x, bool) else operator.index(x)
    if not isinstance(x, SupportsIndex) or getattr(x, "dtype", None) is torch.bool:
        return None
    try:
        return operator.index(x)
    except Exception:  # an array or a tensor of more than one number, or of no ints; a stranger's raises what it likes
        return None


def as_list(xs: object) -> list[Any] | None:
    """Return the items of a list, tuple, range, array or tensor; None for anything
    else, texts included.

    What has no order of its own (a set), is gone when it was read (a generator) or
    gives its keys (a dict) is no list.
    """
    if isinstance(xs, str | bytes):
        return None
    if isinstance(xs, Sequence):
        return list(cast(Sequence[Any], xs))
    try:
        return [*xs] if isinstance(xs, np.ndarray | torch.Tensor) else None
    except (
        Exception
    ):  # of no dims; torch lists no tensor that is sparse, nested or without values
        return None


def as_ints(xs: object) -> tuple[int, ...] | None:
    """Return the ints of a list, tuple, range, array or tensor; None for anything else,
    and where one is no int.
    """
    listed = as_list(xs)
    if listed is None:
        return None
    ints = [number for number in map(as_int, listed) if number is not None]
    return tuple(ints) if len(ints) == len(listed) else None


def as_number(x: object) -> Number | None:
    """Return x as the Python number that it equals; None for anything else, numpy's
    dates and long doubles included.
    """
    value: Any = x
    if isinstance(x, _NUMPY) and not isinstance(x, np.timedelta64):
        value = value.item()
    for kind in _KINDS:
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    return None


def as_real(x: object) -> int | float | None:
    """Return x as a real number that is not a bool and not larger than floats are; None
    for anything else.
    """
    number = as_number(x)
    if number is None or isinstance(number, bool | complex):
        return None
    return (
        None if isinstance(number, int) and abs(number) > sys.float_info.max else number
    )


# A sum of int64 numbers would wrap: an int travels as two numbers of 32 bits, with room
# for the sum over 2**30 ranks.
BITS = 32


def halves(x: int) -> list[int]:
    """Cut an int of up to 64 bits in two: x is 2**32 times the first, plus the second,
    and so is a sum of several.
    """
    if not -(2**63) <= x < 2**64:
        raise OverflowError
    return [x >> BITS, x & (2**BITS - 1)]


def joined(high: int, low: int) -> int:
    """Return the int whose halves these are, or the sum of those whose halves add up to
    these.
    """
    return (high << BITS) + low
