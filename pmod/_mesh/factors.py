"""The ranks of a mesh as arithmetic, not as an array, so that 131,072 ranks cost as
much as four.

Axis i is a list of factors (size, stride), slowest first, and

    rank(coords) = offset + sum of the strides times the digits of the coords

Flattening joins lists of factors, splitting cuts them. Only a mesh over ranks in no
such order (``ranks=[3, 0, 2]``) holds them, as `base`, and the arithmetic then gives
places in `base`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from pmod._errors import AxisError, phrase, quoted

Factors: TypeAlias = tuple[tuple[int, int], ...]
"""(size, stride) pairs, slowest first."""


def all_places(
    offset: int, axes: Iterable[Factors]
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """rank(coords) for all coords: an array with one dimension per axis."""
    place = np.array(offset, dtype=np.int64)
    shape: list[int] = []
    for factors in axes:
        shape.append(math.prod(size for size, _ in factors))
        for size, stride in factors:
            place = np.add.outer(place, np.arange(size, dtype=np.int64) * stride)
    return place.reshape(shape)


def merged(factors: Factors) -> Factors:
    """The shortest list of factors for the same ranks, so that equal axes compare
    equal.
    """
    out: list[tuple[int, int]] = []
    for size, stride in factors:
        if size == 1:
            continue
        if out and out[-1][1] == size * stride:
            out[-1] = (out[-1][0] * size, stride)
        else:
            out.append((size, stride))
    return tuple(out)


def place_of(factors: Factors, index: int) -> int:
    """What index along an axis adds to the rank."""
    place = 0
    for size, stride in reversed(factors):
        index, digit = divmod(index, size)
        place += digit * stride
    return place


def take_fastest(factors: Factors, size: int) -> tuple[Factors, Factors]:
    """Cut `size` ranks off the fast end: (the factors taken, the factors left)."""
    taken: list[tuple[int, int]] = []
    left = list(factors)
    need = size
    while need > 1:
        count, stride = left.pop()
        part = math.gcd(count, need)
        if part == 1 or (part < count and part != need):
            # the digits of the flattened axes do not line up with the cut
            raise AxisError(
                phrase(
                    "Mesh.split",
                    f"a size of {size} cuts across the axes that were flattened into this one",
                    "Split it by the sizes that it was flattened from.",
                )
            )
        taken.insert(0, (part, stride))
        if part < count:
            left.append((count // part, stride * part))
        need //= part
    return tuple(taken), tuple(left)


def layout(
    ranks: Sequence[int] | None, world_size: int
) -> tuple[int, int, tuple[int, ...] | None, int]:
    """(offset, stride, base, number of ranks) of the ranks that a mesh covers."""
    if ranks is None:
        return 0, 1, None, world_size
    listed = _listed(ranks)
    for rank in listed:
        if not 0 <= rank < world_size:
            raise AxisError(
                phrase(
                    "make_mesh",
                    f"ranks holds {rank}",
                    f"The world has ranks 0 to {world_size - 1}.",
                )
            )
    if not listed or len(set(listed)) != len(listed):
        what = "ranks is empty" if not listed else "ranks holds a rank twice"
        raise AxisError(
            phrase("make_mesh", what, "List each rank that the mesh covers once.")
        )
    step = listed[1] - listed[0] if len(listed) > 1 else 1
    if step > 0 and listed == list(range(listed[0], listed[-1] + 1, step)):
        return listed[0], step, None, len(listed)
    return 0, 1, tuple(listed), len(listed)


def _listed(ranks: Sequence[int]) -> list[int]:
    """The ranks as ints, from nested sequences or an array."""
    try:
        array = np.asarray(ranks)
    except (
        Exception
    ):  # ragged; or it tells numpy what it likes, as a tensor without values does
        array = np.asarray("")
    if array.ndim == 0 or (array.size > 0 and array.dtype.kind not in "iu"):
        right = "List the ranks that the mesh covers, as ints."
        raise AxisError(phrase("make_mesh", f"ranks is {quoted(ranks)}", right))
    return [int(rank) for rank in array.reshape(-1)]


def few(ranks: np.ndarray[Any, Any] | Sequence[int]) -> str:
    """Some ranks, for an error."""
    flat = np.asarray(ranks).reshape(-1)
    return (
        str(flat.tolist())
        if flat.size <= 8
        else f"[{flat[0]}, {flat[1]}, ..., {flat[-1]}]"
    )
