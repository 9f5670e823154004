"""What counts as a number: Python's numbers and numpy's scalars.

No other file decides that. An array or a tensor is not a number, whatever its size; a bool is not an int, nor is a
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
_KINDS: tuple[type, ...] = (bool, int, float, complex)
# a union would be made anew where torch.compile follows this
_NUMPY = (np.number, np.bool_)


def as_int(x: object) -> int | None:
    """Return x as an int if it is one, of numpy too; None for anything else.

    A bool is something else.
    """
    if isinstance(x, bool):
        return None
    # torch.compile follows this question, of its symbols too, and not the next one
    if isinstance(x, int):
        return operator.index(x)
    if not isinstance(x, SupportsIndex) or getattr(x, "dtype", None) is torch.bool:
        return None
    try:
        return operator.index(x)
    except Exception:
        # an array or a tensor of more than one number, or of no ints; a class of the
        # user's raises what it likes
        return None


def as_list(xs: object) -> list[Any] | None:
    """Return the items of a list, tuple, range, array or tensor; None for anything else.

    A text is something else, and so is what has no order of its own (a set), is gone
    when it was read (a generator) or gives its keys (a dict).
    """
    if isinstance(xs, str | bytes):
        return None
    if isinstance(xs, Sequence):
        return list(cast(Sequence[object], xs))
    if not isinstance(xs, np.ndarray | torch.Tensor):
        return None
    try:
        return [*xs]
    except Exception:
        # of no dims; torch lists no tensor that is sparse, nested or without values
        return None


def as_ints(xs: object) -> tuple[int, ...] | None:
    """Return the ints of a list, tuple, range, array or tensor.

    None for anything else, also where one of the items is not an int.
    """
    listed = as_list(xs)
    if listed is None:
        return None
    ints: list[int] = []
    for item in listed:
        number = as_int(item)
        if number is None:
            return None
        ints.append(number)
    return tuple(ints)


def as_number(x: object) -> Number | None:
    """Return x as the Python number that it equals; None for anything else.

    numpy's dates and long doubles are something else.
    """
    value = x
    if isinstance(x, _NUMPY) and not isinstance(x, np.timedelta64):
        value = x.item()
    for kind in _KINDS:
        if isinstance(value, kind):
            return cast(Number, value if type(value) is kind else kind(value))
    return None


def as_real(x: object) -> int | float | None:
    """Return x as a real number; None for anything else.

    A bool is something else, and so is an int that is larger than floats are.
    """
    number = as_number(x)
    if number is None or isinstance(number, bool | complex):
        return None
    if isinstance(number, int) and abs(number) > sys.float_info.max:
        return None
    return number


# A sum of int64 numbers would wrap: an int travels as two numbers of 32 bits, with room
# for the sum over 2**30 ranks.
BITS = 32


def halves(x: int) -> list[int]:
    """Cut an int of up to 64 bits in two.

    x is 2**32 times the first, plus the second, and so is a sum of several.
    """
    if not -(2**63) <= x < 2**64:
        raise OverflowError
    return [x >> BITS, x & (2**BITS - 1)]


def joined(high: int, low: int) -> int:
    """Return the int whose halves these are, or the sum of ints, if they are sums."""
    return (high << BITS) + low
