"""Darcy flow through a medium of two permeabilities: random media, a finite-volume
solver, the published data format.

    -div(a grad u) = 1 in the unit square, u = 0 on its edge; a is 12 where a Gaussian random field is positive, else 3

The square is cut into n x n cells, a and u live at their centres, and the flux through
a face is driven by the harmonic mean of the two permeabilities. That gives a symmetric
positive definite 5-point system, second order where a is smooth.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

import pmod
from pmod._errors import PmodError, phrase
from pmod.demo.console import progress

PERMEABLE, TIGHT = 12.0, 3.0
TOLERANCE = 1e-10
_ITERATIONS = 500
_CHUNK = (
    64  # problems solved at once: they stay in the cache, and the progress bar moves
)


@attrs.frozen(eq=False)
class Fields:
    """Problems and their solutions on a grid: where the medium is permeable, and the
    pressure u.

    Shapes: x (N, n, n) bool, y (N, n, n).
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, which: slice | Tensor) -> Fields:
        return Fields(self.x[which], self.y[which])

    def to(self, target: torch.device) -> Fields:
        return Fields(self.x.to(target), self.y.to(target))

    def with_mirror_images(self) -> Fields:
        """Twice as many: a problem mirrored in the diagonal is a problem, and its
        solution is mirrored.
        """
        return Fields(*(torch.cat([v, v.mT]) for v in (self.x, self.y)))


# --- random media ---------------------------------------------------------------------


def random_fields(count: int, n: int, generator: torch.Generator) -> Tensor:
    """Samples of a Gaussian random field of mean 0 and covariance 9 (9 - Laplacian)^-2,
    no slope across the edge.

    Shapes: -> (count, n, n), float64: the values at the centres of the cells.
    """
    k = torch.arange(n, dtype=torch.float64)
    cosines = math.sqrt(2) * torch.cos(
        math.pi * torch.outer(k, k + 0.5) / n
    )  # row k: the k-th, of norm 1 on (0, 1)
    cosines[0] = 1
    spread = 3 / (math.pi**2 * (k[:, None] ** 2 + k**2) + 9)
    spread[0, 0] = 0
    noise = torch.randn(count, n, n, dtype=torch.float64, generator=generator)
    return cosines.T @ (spread * noise) @ cosines


def permeability(x: Tensor) -> Tensor:
    """12 where the medium is permeable, 3 elsewhere; float64."""
    return torch.where(x, PERMEABLE, TIGHT).double()


# --- the solver -----------------------------------------------------------------------


def conductances(a: Tensor) -> tuple[Tensor, Tensor]:
    """What each face lets through per difference of u: between rows (..., n+1, n),
    between columns (..., n, n+1).

    Inside that is the harmonic mean of the two cells; the edge is half a cell away from
    the outermost centres.
    """
    inside = [
        2 * p * q / (p + q)
        for p, q in ((a[..., 1:, :], a[..., :-1, :]), (a[..., 1:], a[..., :-1]))
    ]
    rows = torch.cat([2 * a[..., :1, :], inside[0], 2 * a[..., -1:, :]], -2)
    columns = torch.cat([2 * a[..., :1], inside[1], 2 * a[..., -1:]], -1)
    return rows, columns


def outflow(faces: tuple[Tensor, Tensor], u: Tensor) -> Tensor:
    """The flow out of each cell, which is the operator -div(a grad u) times the area of
    a cell.
    """
    edge_row, edge_column = (
        torch.zeros_like(u[..., :1, :]),
        torch.zeros_like(u[..., :1]),
    )
    rows = faces[0] * u.diff(dim=-2, prepend=edge_row, append=edge_row)
    columns = faces[1] * u.diff(dim=-1, prepend=edge_column, append=edge_column)
    return -rows.diff(dim=-2) - columns.diff(dim=-1)


def _sines(n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvectors (as rows) and eigenvalues of the 5-point system for a = 1 in one
    dimension.
    """
    k = torch.arange(1, n + 1, dtype=like.dtype, device=like.device)
    sines = math.sqrt(2 / n) * torch.sin(math.pi * torch.outer(k, k - 0.5) / n)
    sines[-1] /= math.sqrt(2)  # the fastest one is +1, -1, ...: twice the norm
    return sines, 4 * torch.sin(math.pi * k / (2 * n)) ** 2


def _dot(p: Tensor, q: Tensor) -> Tensor:
    return (p * q).sum((-2, -1), keepdim=True)


def solve(a: Tensor, f: Tensor | float = 1.0) -> Tensor:
    """The pressure u of -div(a grad u) = f in the unit square, u = 0 on its edge.

    Conjugate gradients on all problems at once. A solve with a = 1, by sine transforms,
    comes before each step, so that the number of steps depends on the contrast of a
    only, not on the grid.
    Shapes: a (N, n, n), f (N, n, n) or a number -> (N, n, n).
    Raises: PmodError where a residual stays above 1e-10 of f.
    """
    n = a.shape[-1]
    faces, right = conductances(a), (torch.zeros_like(a) + f) / n**2
    sines, values = _sines(n, a)
    spectrum = values[:, None] + values

    def smooth(r: Tensor) -> Tensor:
        return sines.T @ ((sines @ r @ sines.T) / spectrum) @ sines

    u, r = torch.zeros_like(a), right
    z = smooth(r)
    p, rz = z, _dot(r, z)
    for _ in range(_ITERATIONS):
        if residual(faces, u, right) <= TOLERANCE:
            return u
        ap = outflow(faces, p)
        # a problem that is solved already moves no further, rather than by 0 / 0
        step = rz / _dot(p, ap).clamp_min(torch.finfo(a.dtype).tiny)
        u, r = u + step * p, r - step * ap
        z = smooth(r)
        before, rz = rz, _dot(r, z)
        p = z + rz / before.clamp_min(torch.finfo(a.dtype).tiny) * p
    worst = residual(faces, u, right)
    raise PmodError(
        phrase(
            "demo",
            f"after {_ITERATIONS} steps a Darcy problem has a residual of {worst:.1e}, above {TOLERANCE}",
            "The permeability must be positive; the solver wants it within a few powers of ten.",
        )
    )


def residual(faces: tuple[Tensor, Tensor], u: Tensor, right: Tensor) -> float:
    """The largest |right - outflow| / |right| of the problems."""
    if not len(u):
        return 0.0
    norms = [
        torch.linalg.vector_norm(v, dim=(-2, -1))
        for v in (right - outflow(faces, u), right)
    ]
    return float((norms[0] / norms[1].clamp_min(torch.finfo(u.dtype).tiny)).max())


def solve_together(x: Tensor, *, quiet: bool = False) -> Tensor:
    """Solve the problems, each rank of the mesh a share of them, and give all ranks all
    solutions, as float32.

    I -> I. Shapes: x (N, n, n) bool -> (N, n, n).
    """
    mine = permeability(pmod.shard(x, ("data", "space")))
    bar = progress(
        total=len(mine),
        what="solving this rank's Darcy problems",
        unit="problem",
        quiet=quiet,
    )
    solved: list[Tensor] = []
    with bar:
        for a in mine.split(_CHUNK):
            solved.append(solve(a).float())
            bar.update(len(a))
    return pmod.unshard(torch.cat(solved), ("data", "space"), length=len(x))


# --- the published format -------------------------------------------------------------


def read(path: Path) -> Fields:
    """Read a file such as darcy_train_16.pt: a dict of x (N, n, n) bool and y (N, n, n)
    float32.

    Raises: PmodError where it is no such file.
    """
    try:
        found: Any = torch.load(path, weights_only=True, map_location="cpu")
    except (
        Exception
    ) as error:  # torch.load raises whatever unpickling raises, with pages of advice
        raise _unreadable(
            path, str(error).splitlines()[0] if str(error) else type(error).__name__
        ) from None
    if not isinstance(found, dict) or not {"x", "y"} <= found.keys():
        raise _unreadable(path, "it holds no dict with 'x' and 'y'")
    x, y = found["x"], found["y"]
    shapes = [
        tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in (x, y)
    ]
    if (
        shapes[0] != shapes[1]
        or len(shapes[0]) != 3
        or not len(x)
        or shapes[0][1] != shapes[0][2]
    ):
        raise _unreadable(path, f"x is {shapes[0]} and y is {shapes[1]}")
    if x.dtype != torch.bool or not y.is_floating_point():
        raise _unreadable(path, f"x is {x.dtype} and y is {y.dtype}")
    return Fields(x, y)


def _unreadable(path: Path, why: str) -> PmodError:
    right = "It should hold a dict of x (N, n, n), bool, and y (N, n, n), float32, saved with torch.save."
    return PmodError(phrase("demo", f"cannot use {path}: {why.rstrip('.')}", right))
