"""Steady diffusion on a triangle mesh, solved with linear finite elements.

    -div(k grad u) + u = f, no flow across the edge

The term u is what makes the solution unique on every mesh, closed ones and each piece
of several. k lies between a third and three times 0.002, so that a source is felt over
a twentieth of the mesh's size, which is 1; f lies between -1 and 1, and so does u.
"""

from __future__ import annotations

import math
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

import pmod
from pmod._console import progress
from pmod._errors import PmodError, phrase
from pmod.demo.graph.surface import Numbers, Reals, Surface

TOLERANCE = 1e-10
_AXES = ("data", "graph")
_CONDUCTIVITY, _CONTRAST = 0.002, 3.0
# media and sources vary over about 5 / 14 of the mesh's size
_WAVES = 14.0


@attrs.frozen(eq=False)
class Problems:
    """Media, sources and solutions at the nodes of one mesh.

    Shapes: x (n, N, 2): the logarithm of the medium and the source, both from -1 to 1;
    u (n, N).
    """

    x: Tensor
    u: Tensor

    def __len__(self) -> int:
        return self.u.shape[1]

    def __getitem__(self, which: slice | Tensor) -> Problems:
        return Problems(self.x[:, which], self.u[:, which])

    def rows(self, which: Tensor) -> Problems:
        """Return them at some of the nodes."""
        return Problems(self.x[which], self.u[which])

    def to(self, target: torch.device | torch.dtype) -> Problems:
        return Problems(self.x.to(target), self.u.to(target))


def conductivity(x: Tensor) -> Tensor:
    """Return k, from the first of the inputs."""
    return _CONDUCTIVITY * _CONTRAST**x


# --- finite elements ------------------------------------------------------------------


class Elements:
    """Linear finite elements on a mesh, ready to be put together for any medium."""

    def __init__(self, surface: Surface) -> None:
        self._n, self._t = len(surface), surface.triangles.numpy()
        corners = surface.points.numpy()[self._t]
        # side i lies opposite to corner i, where its hat function is 1
        sides = np.roll(corners, 1, axis=1) - np.roll(corners, -1, axis=1)
        area = np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1) / 2
        self._stiffness = np.einsum("tix,tjx->tij", sides, sides) / (
            4 * area[:, None, None]
        )
        self.mass = self._assembled(area[:, None, None] / 12 * (1 + np.eye(3)))
        self._lumped = np.asarray(self.mass.sum(1), dtype=np.float64)

    def _assembled(self, elements: Reals) -> Any:
        from scipy.sparse import coo_array

        rows: Numbers = np.repeat(self._t, 3, axis=1).reshape(-1)
        columns: Numbers = np.tile(self._t, 3).reshape(-1)
        return coo_array(
            (elements.reshape(-1), (rows, columns)), shape=(self._n, self._n)
        ).tocsc()

    def stiffness(self, k: Reals) -> Any:
        """Return the matrix of -div(k grad u), k given at the nodes."""
        return self._assembled(k[self._t].mean(1)[:, None, None] * self._stiffness)

    def solve(self, k: Reals, f: Reals, *, reaction: float = 1.0) -> Reals:
        """Return u of -div(k grad u) + reaction u = f, no flow across the edge.

        Shapes: k (n,), f (n,) -> (n,). Raises: PmodError if the residual stays above
        1e-10 of the right side.
        """
        matrix, right = self.stiffness(k) + reaction * self.mass, self.mass @ f
        u: Reals = _factors(matrix).solve(right)
        residual = float(
            np.linalg.norm(right - matrix @ u)
            / max(np.linalg.norm(right), np.finfo(float).tiny)
        )
        if not residual <= TOLERANCE:
            given = (
                "a problem on this mesh is solved to a residual of "
                f"{residual:.1e} only, above {TOLERANCE}"
            )
            right = "Its triangles are too thin or too unlike in size."
            raise PmodError(phrase("demo", given, right))
        return u

    def smooth(self, noise: Reals) -> Reals:
        """Return Gaussian random fields, made of independent normal noise at each node.

        White noise is what (waves^2 - Laplacian)^2 makes of that field, which gives it
        its smoothness on any mesh.
        Shapes: noise (n, N) -> (n, N).
        """
        matrix = self.stiffness(np.ones(self._n)) + _WAVES**2 * self.mass
        factors, white = _factors(matrix), np.sqrt(self._lumped)[:, None] * noise
        once: Reals = factors.solve(white)
        # the factor gives the field variance 1 in the plane
        return math.sqrt(12 * math.pi) * _WAVES**3 * factors.solve(self.mass @ once)


def _factors(matrix: Any) -> Any:
    from scipy.sparse.linalg import splu

    # the order and the pivots that suit a symmetric positive definite matrix
    return splu(
        matrix.tocsc(),
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )


# --- on the ranks ---------------------------------------------------------------------


def make_problems(surface: Surface, count: int, seed: int, *, quiet: bool) -> Problems:
    """Draw problems and solve them, a share on each rank; all ranks get all. I -> I."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(
        len(surface), 2 * count, dtype=torch.float64, generator=generator
    ).view(-1, count, 2)
    mine = pmod.shard(noise, _AXES, dim=1)
    elements, n, share = Elements(surface), len(surface), mine.shape[1]
    x = np.tanh(elements.smooth(mine.reshape(n, -1).numpy())).reshape(n, share, 2)
    k = conductivity(torch.from_numpy(x[..., 0])).numpy()
    u = np.zeros((n, share))
    with progress(
        total=share, what="solving this rank's problems", unit="problem", quiet=quiet
    ) as bar:
        for i in range(share):
            u[:, i] = elements.solve(k[:, i], x[:, i, 1])
            bar.update()
    here = [torch.from_numpy(v).to(pmod.current_mesh().device) for v in (x, u)]
    x, u = (pmod.unshard(v, _AXES, dim=1, length=count).cpu() for v in here)
    return Problems(x, u)
