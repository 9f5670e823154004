"""Dims and sizes as the functions of torch take them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TypeAlias, cast

from pmod._core.arguments import as_int

Dims: TypeAlias = int | Sequence[int] | None


def dims_of(dim: Dims, n: int) -> list[int]:
    """Return dims counted from the front, all of them for None."""
    if dim is None:
        return list(range(n))
    if isinstance(dim, Sequence):
        return [operator.index(d) % max(n, 1) for d in dim]
    return [operator.index(dim) % max(n, 1)]


def numbers(given: Sequence[object]) -> list[int]:
    """Return sizes that come one by one, or as one sequence."""
    if len(given) == 1 and as_int(given[0]) is None:
        given = cast(Sequence[object], given[0])
    return [operator.index(cast(int, size)) for size in given]


def repeated(value: int | Sequence[int], n: int) -> list[int]:
    """Return one number for each of n dims."""
    if not isinstance(value, Sequence):
        return [operator.index(value)] * n
    listed = [operator.index(v) for v in value]
    return listed * n if len(listed) == 1 else listed
