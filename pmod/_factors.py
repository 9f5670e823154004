"""The ranks of a mesh as arithmetic, not as an array, so that 131,072 ranks cost as much as four.

Axis i is a list of factors (size, stride), slowest first, and

    rank(coords) = offset + sum of the strides times the digits of the coords

Flattening joins lists of factors, splitting cuts them. Only a mesh over ranks in no such order (``ranks=[3, 0, 2]``)
holds them, as `base`, and the arithmetic then gives places in `base`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from pmod._errors import AxisError, explain, quoted
from pmod._numbers import as_int

Factors: TypeAlias = tuple[tuple[int, int], ...]
"""(size, stride) pairs, slowest first."""


def all_places(offset: int, axes: Iterable[Factors]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """rank(coords) for all coords: an array with one dimension per axis."""
    place = np.array(offset, dtype=np.int64)
    shape: list[int] = []
    for factors in axes:
        shape.append(math.prod(size for size, _ in factors))
        for size, stride in factors:
            place = np.add.outer(place, np.arange(size, dtype=np.int64) * stride)
    return place.reshape(shape)


def merged(factors: Factors) -> Factors:
    """The shortest list of factors for the same ranks, so that equal axes compare equal."""
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
                explain("Mesh.split", f"a size of {size} cuts across the axes that were flattened into this one",
                        "Split it by the sizes that it was flattened from.")
            )  # fmt: skip
        taken.insert(0, (part, stride))
        if part < count:
            left.append((count // part, stride * part))
        need //= part
    return tuple(taken), tuple(left)


def layout(ranks: Sequence[int] | None, world_size: int) -> tuple[int, int, tuple[int, ...] | None, int]:
    """(offset, stride, base, number of ranks) of the ranks that a mesh covers."""
    if ranks is None:
        return 0, 1, None, world_size
    listed = _listed(ranks)
    for rank in listed:
        if not 0 <= rank < world_size:
            raise AxisError(explain("make_mesh", f"ranks holds {rank}", f"The world has ranks 0 to {world_size - 1}."))
    if not listed or len(set(listed)) != len(listed):
        what = "ranks is empty" if not listed else "ranks holds a rank twice"
        raise AxisError(explain("make_mesh", what, "List each rank that the mesh covers once."))
    step = listed[1] - listed[0] if len(listed) > 1 else 1
    if step > 0 and listed == list(range(listed[0], listed[-1] + 1, step)):
        return listed[0], step, None, len(listed)
    return 0, 1, tuple(listed), len(listed)


def _listed(ranks: Sequence[int]) -> list[int]:
    """The ranks as ints, from nested sequences or an array."""
    try:
        array = np.asarray(ranks)
    except Exception:  # ragged; or it tells numpy what it likes, as a tensor without values does
        array = np.asarray("")
    if array.ndim == 0 or (array.size > 0 and array.dtype.kind not in "iu"):
        right = "List the ranks that the mesh covers, as ints."
        raise AxisError(explain("make_mesh", f"ranks is {quoted(ranks)}", right))
    return [int(rank) for rank in array.reshape(-1)]


# --- names and sizes ------------------------------------------------------------------------------


def few(ranks: np.ndarray[Any, Any] | Sequence[int]) -> str:
    """Some ranks, for an error."""
    flat = np.asarray(ranks).reshape(-1)
    return str(flat.tolist()) if flat.size <= 8 else f"[{flat[0]}, {flat[1]}, ..., {flat[-1]}]"


def check_names(names: Iterable[object], function: str) -> None:
    """Names of axes are non-empty strings, each its own."""
    seen: set[object] = set()
    for name in names:
        if not isinstance(name, str) or not name:
            raise AxisError(explain(function, f"{quoted(name)} is no axis name", "Name axes with non-empty strings."))
        if name in seen:
            raise AxisError(explain(function, f"two axes are called {quoted(name)}", "Give each axis its own name."))
        seen.add(name)


def fill_in(sizes: Mapping[str, int], total: int, function: str, have: str) -> dict[str, int]:
    """The sizes with -1 replaced; they must multiply to `total`."""
    check_names(sizes, function)
    parsed: dict[str, int] = {}
    for name, given in sizes.items():
        size = as_int(given)
        if size is None or (size < 1 and size != -1):
            raise AxisError(
                explain(function, f"{name}={quoted(given)} is no size", "Sizes are ints of 1 or more; one may be -1.")
            )
        parsed[name] = size
    sizes = parsed
    asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
    known = math.prod(size for size in sizes.values() if size != -1)
    open_ = [name for name, size in sizes.items() if size == -1]
    if len(open_) > 1:
        raise AxisError(explain(function, f"{asked}: two sizes are -1", "Leave one size to be worked out."))
    if open_ and total % known == 0:
        return {name: total // known if size == -1 else size for name, size in sizes.items()}
    if known != total or open_:
        what = f"{asked} need{' a multiple of' if open_ else ''} {known} rank{'s' if known != 1 else ''}, but {have}"
        raise AxisError(explain(function, what, f"Make the sizes multiply to {total}; -1 stands for the rest."))
    return dict(sizes)
