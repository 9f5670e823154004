"""Latitudes, their weights, and Legendre functions there: what is the same in each call."""

from __future__ import annotations

from functools import lru_cache
from math import pi
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pmod._core.arguments import LONGEST, as_int
from pmod._errors import ArgumentError, PmodError, ShapeError, near_miss, phrase, quoted
from pmod._torch import constant_in_graphs

Reals = NDArray[np.float64]

GRIDS = ("equiangular", "legendre-gauss", "lobatto")
NORMS = ("ortho", "schmidt", "unnorm")


def latitudes(nlat: int, grid: str = "equiangular") -> tuple[Tensor, Tensor]:
    """Return the colatitudes of a grid, from the north pole on, and their weights.

    A sum of values times weights is an integral over the cosine of the colatitude; over
    the sphere it is that times 2 pi, of means over longitudes. "equiangular" and
    "lobatto" have both poles (Clenshaw-Curtis and Gauss-Lobatto), "legendre-gauss" none.
    Shapes: -> (nlat,), (nlat,), float64 on the cpu. Nothing is sent.
    Raises: ArgumentError for another grid; ShapeError for too few latitudes.

    >>> pmod.sht.latitudes(3)
    (tensor([0.0000, 1.5708, 3.1416], dtype=torch.float64), tensor([0.3333, 1.3333, 0.3333], dtype=torch.float64))
    """
    check_grid(grid, "sht.latitudes")
    x, weights = nodes(check_count(nlat, grid, "sht.latitudes"), grid)
    return torch.from_numpy(np.arccos(x)), torch.from_numpy(weights.copy())


def check_grid(grid: object, function: str) -> None:
    """Raise for a grid that does not exist."""
    if not isinstance(grid, str) or grid not in GRIDS:
        given = f"grid is {quoted(grid)}{near_miss(grid, GRIDS)}"
        right = f"Pass one of {', '.join(map(repr, GRIDS))}."
        raise _wrong(ArgumentError, function, given, right)


def check_count(nlat: object, grid: str, function: str) -> int:
    """Return the number of latitudes."""
    count, least = as_int(nlat), 1 if grid == "legendre-gauss" else 2
    if count is None or not least <= count <= LONGEST:
        given = f"nlat is {quoted(nlat)}"
        right = f"A {grid} grid has {least} latitudes or more."
        raise _wrong(ShapeError, function, given, right)
    return count


def _wrong(kind: type[PmodError], function: str, given: str, right: str) -> PmodError:
    return kind(phrase(function, given, right))


@lru_cache(maxsize=64)
def nodes(nlat: int, grid: str) -> tuple[Reals, Reals]:
    """Return the cosines of the colatitudes, from 1 down, and their weights."""
    if grid == "legendre-gauss":
        x, weights = np.polynomial.legendre.leggauss(nlat)
    elif grid == "lobatto":
        x, weights = _lobatto(nlat)
    else:
        x, weights = _clenshaw_curtis(nlat)
    return x[::-1].copy(), weights[::-1].copy()


def _clenshaw_curtis(n: int) -> tuple[Reals, Reals]:
    x = np.cos(np.linspace(pi, 0, n))
    last = n - 1
    # the integrals of the Chebyshev polynomials of even degree, then their inverse
    # cosine transform
    even = np.arange(0, last + 1, 2)
    moments = 2.0 / (1.0 - even.astype(np.float64) ** 2)
    scale = np.ones(len(even))
    scale[0] = 0.5
    if last % 2 == 0:
        scale[-1] = 0.5
    angles = np.outer(np.arange(n), even) * (pi / last)
    weights = (2.0 / last) * (np.cos(angles) @ (moments * scale))
    weights[[0, -1]] /= 2
    return x, weights


def _lobatto(n: int) -> tuple[Reals, Reals]:
    x = -np.cos(np.linspace(0, pi, n))
    before, last = np.ones(n), x.copy()
    # Newton's steps from Chebyshev's nodes, which are close
    for _ in range(100):
        before, last = np.ones(n), x.copy()
        for k in range(2, n):
            before, last = last, ((2 * k - 1) * x * last - (k - 1) * before) / k
        step = (x * last - before) / (n * last)
        x = x - step
        if abs(step).max() < 1e-16:
            break
    return x, 2.0 / (n * (n - 1) * last**2)


# --- Legendre functions ---------------------------------------------------------------


def legendre(x: Reals, degrees: int, first: int, end: int) -> Reals:
    """Return the orthonormal Legendre functions of orders first to end - 1 at x.

    They have no Condon-Shortley phase.
    Shapes: -> (orders, degrees, points).
    """
    table = np.zeros((end - first, degrees, len(x)))
    sine = np.sqrt((1 - x) * (1 + x))
    seed = np.full(len(x), 1 / np.sqrt(4 * pi))
    # that of an order and its own degree, from the order below
    for m in range(min(end, degrees)):
        if m:
            seed = np.sqrt((2 * m + 1) / (2 * m)) * sine * seed
        if m < first:
            continue
        table[m - first, m] = seed
        if m + 1 < degrees:
            table[m - first, m + 1] = np.sqrt(2 * m + 3) * x * seed
    # those of all orders of a degree, from the two degrees below
    for degree in range(first + 2, degrees):
        m = np.arange(first, min(end, degree - 1), dtype=np.float64)[:, None]
        a = np.sqrt((4.0 * degree**2 - 1) / (degree**2 - m**2))
        b = np.sqrt(((degree - 1.0) ** 2 - m**2) / (4 * (degree - 1.0) ** 2 - 1))
        rows = table[: len(m)]
        rows[:, degree] = a * (x * rows[:, degree - 1] - b * rows[:, degree - 2])
    return table


def _derivatives(x: Reals, degrees: int, first: int, end: int) -> Reals:
    """Return the derivatives by colatitude, and the order's multiple by the sine.

    Shapes: -> (2, orders, degrees, points).
    """
    low = max(first - 1, 0)
    table = legendre(x, degrees + 1, low, end + 1)
    m = np.arange(first, end, dtype=np.float64)[:, None, None]
    degree = np.arange(degrees, dtype=np.float64)[None, :, None]
    above = table[first + 1 - low : end + 1 - low]
    # the function of order -1 is that of order 1, negated
    below = (
        table[first - 1 - low : end - 1 - low]
        if first
        else np.concatenate([-table[1:2], table[: end - 1]])
    )
    exists = m <= degree
    down = np.sqrt(np.maximum((degree + m) * (degree - m + 1), 0))
    up = np.sqrt(np.maximum((degree - m) * (degree + m + 1), 0))
    slopes = 0.5 * (down * below[:, :degrees] - up * above[:, :degrees])
    # by degrees one higher, which divides by no sine
    down = np.sqrt(np.maximum((degree - m + 1) * (degree - m + 2), 0))
    up = np.sqrt((degree + m + 1) * (degree + m + 2))
    scale = 0.5 * np.sqrt((2 * degree + 1) / (2 * degree + 3))
    multiples = scale * (down * below[:, 1:] + up * above[:, 1:])
    return np.stack([slopes * exists, multiples * exists * (m > 0)])


class Table(NamedTuple):
    """Which Legendre functions: of a grid, of some orders, normed, forward or inverse."""

    nlat: int
    grid: str
    lmax: int
    first: int
    end: int
    norm: str
    csphase: bool
    vector: bool
    inverse: bool


@lru_cache(maxsize=16)
def _tensor(table: Table, dtype: torch.dtype, device: torch.device) -> Tensor:
    x, weights = nodes(table.nlat, table.grid)
    of = table.lmax, table.first, table.end
    values = _derivatives(x, *of) if table.vector else legendre(x, *of)[None]
    degrees = np.arange(table.lmax, dtype=np.float64)[None, None, :, None]
    if table.norm != "ortho":
        values = values * np.sqrt(4 * pi) ** (-1 if table.inverse else 1)
    if table.norm == "schmidt":
        root = np.sqrt(2 * degrees + 1)
        values = values * root if table.inverse else values / root
    if table.csphase:
        # odd orders
        values[:, 1 - table.first % 2 :: 2] *= -1
    if not table.inverse:
        values = values * (2 * pi * weights)
        if table.vector:
            values = values / np.maximum(degrees * (degrees + 1), 1)
            values[1] *= -1
        # what the sum is over comes first
        values = values.swapaxes(-1, -2)
    with torch.inference_mode(False):
        held = torch.from_numpy(np.ascontiguousarray(values))
        return held.to(device, dtype)


@constant_in_graphs
def _constant(key: tuple[Any, ...], dtype: torch.dtype, device: str) -> Tensor:
    return _tensor(Table(*key), dtype, torch.device(device))


def tensor_of(table: Table, like: Tensor) -> Tensor:
    """Return the factors of a transform, in the dtype and on the device of a tensor.

    Shapes: -> (1 or 2, orders, nlat, degrees) forward, (1 or 2, orders, degrees, nlat)
    inverse.
    """
    return _constant(tuple(table), like.dtype, str(like.device))
