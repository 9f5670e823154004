"""Darcy flow through a medium of two permeabilities, a solver, and a file format.

    -div(a grad u) = 1 in the unit square, u = 0 on its edge; a is 12 where a Gaussian random field is positive, else 3

The square is cut into n x n cells, a and u live at their centres, and the flux through
a face is driven by the harmonic mean of the two permeabilities. That gives a symmetric
positive definite 5-point system, second order where a is smooth.
"""

from __future__ import annotations

import math
from pathlib import Path

import attrs
import torch
from torch import Tensor

import pmod
from pmod._console import progress
from pmod._errors import PmodError, phrase

PERMEABLE, TIGHT = 12.0, 3.0
TOLERANCE = 1e-10
_ITERATIONS = 500
# so many problems are solved at once that they stay in the cache and the progress bar
# moves
_CHUNK = 64


@attrs.frozen(eq=False)
class Fields:
    """Problems on a grid (where the medium is permeable) and their solutions u.

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
        """Return twice as many: these, and these mirrored in the diagonal.

        The mirror image of a problem is a problem, whose solution is mirrored as well.
        """
        return Fields(*(torch.cat([v, v.mT]) for v in (self.x, self.y)))


# --- random media ---------------------------------------------------------------------


def random_fields(count: int, n: int, generator: torch.Generator) -> Tensor:
    """Draw Gaussian random fields of mean 0 and covariance 9 (9 - Laplacian)^-2.

    They have no slope across the edge.

    Shapes: -> (count, n, n), float64: the values at the centres of the cells.
    """
    k = torch.arange(n, dtype=torch.float64)
    # row k is the k-th cosine, of norm 1 on (0, 1)
    cosines = math.sqrt(2) * torch.cos(math.pi * torch.outer(k, k + 0.5) / n)
    cosines[0] = 1
    spread = 3 / (math.pi**2 * (k[:, None] ** 2 + k**2) + 9)
    spread[0, 0] = 0
    noise = torch.randn(count, n, n, dtype=torch.float64, generator=generator)
    return cosines.T @ (spread * noise) @ cosines


def permeability(x: Tensor) -> Tensor:
    """Return 12 where the medium is permeable and 3 elsewhere, in float64."""
    return torch.where(x, PERMEABLE, TIGHT).double()


# --- the solver -----------------------------------------------------------------------


def conductances(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return what each face lets through per difference of u.

    That is between rows (..., n+1, n), and between columns (..., n, n+1).

    Inside that is the harmonic mean of the two cells; the edge is half a cell away from
    the outermost centres.
    """
    between_rows = _harmonic_mean(a[..., 1:, :], a[..., :-1, :])
    between_columns = _harmonic_mean(a[..., 1:], a[..., :-1])
    rows = torch.cat([2 * a[..., :1, :], between_rows, 2 * a[..., -1:, :]], -2)
    columns = torch.cat([2 * a[..., :1], between_columns, 2 * a[..., -1:]], -1)
    return rows, columns


def _harmonic_mean(p: Tensor, q: Tensor) -> Tensor:
    return 2 * p * q / (p + q)


def outflow(faces: tuple[Tensor, Tensor], u: Tensor) -> Tensor:
    """Return the flow out of each cell: -div(a grad u) times the area of a cell."""
    # u is 0 on the edge of the square
    edge_row = torch.zeros_like(u[..., :1, :])
    edge_column = torch.zeros_like(u[..., :1])
    rows = faces[0] * u.diff(dim=-2, prepend=edge_row, append=edge_row)
    columns = faces[1] * u.diff(dim=-1, prepend=edge_column, append=edge_column)
    return -rows.diff(dim=-2) - columns.diff(dim=-1)


def _sines(n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors (as rows) and eigenvalues for a = 1 in one dimension."""
    k = torch.arange(1, n + 1, dtype=like.dtype, device=like.device)
    sines = math.sqrt(2 / n) * torch.sin(math.pi * torch.outer(k, k - 0.5) / n)
    # the fastest one is +1, -1, ..., which has twice the norm of the others
    sines[-1] /= math.sqrt(2)
    return sines, 4 * torch.sin(math.pi * k / (2 * n)) ** 2


def _dot(p: Tensor, q: Tensor) -> Tensor:
    return (p * q).sum((-2, -1), keepdim=True)


def solve(a: Tensor, f: Tensor | float = 1.0) -> Tensor:
    """Return the pressure u of -div(a grad u) = f in the unit square, 0 on its edge.

    Conjugate gradients on all problems at once. A solve with a = 1, by sine transforms,
    comes before each step, so that the number of steps depends on the contrast of a
    only, not on the grid.
    Shapes: a (N, n, n), f (N, n, n) or a number -> (N, n, n).
    Raises: PmodError if a residual stays above 1e-10 of f.
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
    given = (
        f"after {_ITERATIONS} steps a Darcy problem has a residual of {worst:.1e}, "
        f"above {TOLERANCE}"
    )
    right = (
        "The permeability must be positive; "
        "the solver wants it within a few powers of ten."
    )
    raise PmodError(phrase("demo", given, right))


def residual(faces: tuple[Tensor, Tensor], u: Tensor, right: Tensor) -> float:
    """Return the largest |right - outflow| / |right| of the problems."""
    if not len(u):
        return 0.0
    off = torch.linalg.vector_norm(right - outflow(faces, u), dim=(-2, -1))
    given = torch.linalg.vector_norm(right, dim=(-2, -1))
    return float((off / given.clamp_min(torch.finfo(u.dtype).tiny)).max())


def solve_together(x: Tensor, *, quiet: bool = False) -> Tensor:
    """Solve the problems, a share on each rank; all ranks get all solutions.

    They are in float32.

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
    """Read a file such as darcy_train_16.pt.

    It holds a dict of x (N, n, n) bool and y (N, n, n) float32.

    Raises: PmodError if it is not such a file.
    """
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    # torch.load raises whatever unpickling raises, with pages of advice after the first
    # line
    except Exception as error:
        why = str(error).partition("\n")[0] or type(error).__name__
        raise _unreadable(path, why) from None
    if not isinstance(found, dict) or not {"x", "y"} <= found.keys():
        raise _unreadable(path, "it holds no dict with 'x' and 'y'")
    x, y = found["x"], found["y"]
    if not _are_grids(x, y):
        raise _unreadable(path, f"x is {_shape_of(x)} and y is {_shape_of(y)}")
    if x.dtype != torch.bool or not y.is_floating_point():
        raise _unreadable(path, f"x is {x.dtype} and y is {y.dtype}")
    return Fields(x, y)


def _are_grids(x: object, y: object) -> bool:
    """Return whether both are of one shape (N, n, n), N not 0."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return False
    if x.shape != y.shape or x.ndim != 3:
        return False
    return len(x) > 0 and x.shape[1] == x.shape[2]


def _shape_of(x: object) -> object:
    return tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__


def _unreadable(path: Path, why: str) -> PmodError:
    right = "It should hold a dict of x (N, n, n), bool, and y (N, n, n), float32, saved with torch.save."
    return PmodError(phrase("demo", f"cannot use {path}: {why.rstrip('.')}", right))
