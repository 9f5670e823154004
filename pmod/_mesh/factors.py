"""The ranks of a mesh as arithmetic, not as an array: 131,072 cost as much as four.

Axis i is a list of factors (size, stride), slowest first, and

    rank(coords) = offset + sum of the strides times the digits of the coords

Flattening joins lists of factors, splitting cuts them. Only a mesh over ranks in no
such order (``ranks=[3, 0, 2]``) holds them, as `base`, and the arithmetic then gives
places in `base`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from pmod._errors import AxisError, phrase, quoted

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Factors: TypeAlias = tuple[tuple[int, int], ...]
"""(size, stride) pairs, slowest first."""


def size_of(factors: Factors) -> int:
    """Return the number of ranks along an axis."""
    return math.prod([size for size, _ in factors])


def all_places(offset: int, axes: Iterable[Factors]) -> NDArray[np.int64]:
    """Return rank(coords) for all coords: an array with one dimension per axis."""
    place = np.array(offset, dtype=np.int64)
    shape: list[int] = []
    for factors in axes:
        shape.append(size_of(factors))
        for size, stride in factors:
            place = np.add.outer(place, np.arange(size, dtype=np.int64) * stride)
    return place.reshape(shape)


def merged(factors: Factors) -> Factors:
    """Return the shortest list of factors for the same ranks: equal axes are equal."""
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
    """Return what an index along an axis adds to the rank."""
    place = 0
    for size, stride in reversed(factors):
        index, digit = divmod(index, size)
        place += digit * stride
    return place


def places_along(axes: Sequence[Factors], coords: Sequence[int]) -> int:
    """Return what the coords along all axes add to the rank."""
    return sum(map(place_of, axes, coords))


def indices_of(place: int, axes: Sequence[Factors]) -> tuple[int, ...] | None:
    """Return the coords to which `places_along` gives this place; None if it is none.

    A digit of the index along an axis counts for as much as the sizes after it multiply
    to.
    """
    digits: list[tuple[int, int, int, int]] = []
    for number, factors in enumerate(axes):
        worth = 1
        for size, stride in reversed(factors):
            digits.append((stride, size, worth, number))
            worth *= size
    indices = [0] * len(axes)
    # Strides nest, each being at least the whole extent of the next, so the digit of
    # the largest stride is the leading one. It is negative where the place is.
    for stride, size, worth, number in sorted(digits, reverse=True):
        digit, place = divmod(place, stride)
        if not 0 <= digit < size:
            return None
        indices[number] += digit * worth
    return None if place else tuple(indices)


def take_fastest(factors: Factors, size: int) -> tuple[Factors, Factors]:
    """Cut `size` ranks off the fast end; return the factors taken and those left."""
    taken: list[tuple[int, int]] = []
    left = list(factors)
    need = size
    while need > 1:
        count, stride = left.pop()
        part = math.gcd(count, need)
        # A digit may be cut itself only where it is the last that is needed; else the
        # digits of the flattened axes do not line up with the cut.
        is_cut = part < count
        if is_cut and part != need:
            raise AxisError(
                phrase(
                    "Mesh.split",
                    f"a size of {size} cuts across the axes "
                    "that were flattened into this one",
                    "Split it by the sizes that it was flattened from.",
                )
            )
        taken.insert(0, (part, stride))
        if is_cut:
            left.append((count // part, stride * part))
        need //= part
    return tuple(taken), tuple(left)


def layout(
    ranks: Sequence[int] | None, world_size: int
) -> tuple[int, int, tuple[int, ...] | None, int]:
    """Return offset, stride, base and number of the ranks that a mesh covers."""
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
    # Ranks at even steps upward are arithmetic; any other order must be kept as a list.
    step = listed[1] - listed[0] if len(listed) > 1 else 1
    if step > 0 and listed == list(range(listed[0], listed[-1] + 1, step)):
        return listed[0], step, None, len(listed)
    return 0, 1, tuple(listed), len(listed)


def _listed(ranks: Sequence[int]) -> list[int]:
    """Return the ranks as ints, from nested sequences or an array."""
    # numpy raises for what is ragged. Others tell numpy what they like, as a tensor
    # without values does.
    try:
        array = np.asarray(ranks)
    except Exception:
        array = np.asarray("")
    is_whole = array.size == 0 or array.dtype.kind in "iu"
    if array.ndim == 0 or not is_whole:
        right = "List the ranks that the mesh covers, as ints."
        raise AxisError(phrase("make_mesh", f"ranks is {quoted(ranks)}", right))
    return [int(rank) for rank in array.reshape(-1)]


def few(ranks: ArrayLike) -> str:
    """Return some ranks, for an error."""
    flat = np.asarray(ranks).reshape(-1)
    if flat.size <= 8:
        return str(flat.tolist())
    return f"[{flat[0]}, {flat[1]}, ..., {flat[-1]}]"
