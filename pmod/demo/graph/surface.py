"""Triangle meshes: what they hold, one that is generated, and what is put right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pmod._errors import PmodError, phrase

Reals = NDArray[np.float64]
Numbers = NDArray[np.int64]

# points of a mesh of size 1 that are closer than this are one
_SAME = 1e-9
# a triangle whose longest side is 1 has no area if it has less than this
_FLAT = 1e-12


@attrs.define(slots=False, eq=False)
class Surface:
    """A triangle mesh of area 1, flat or curved, closed or not, in one piece or more.

    Shapes: points (n, 3) float64, triangles (m, 3) int64. Every point is a corner of
    some triangle.
    """

    points: Tensor
    triangles: Tensor

    def __len__(self) -> int:
        return len(self.points)

    @cached_property
    def edges(self) -> tuple[Tensor, Tensor]:
        """Return (sender, receiver) of each directed edge, by receiver, then sender."""
        t, n = self.triangles, len(self)
        ends = torch.cat([t[:, [i, j]] for i in range(3) for j in range(3) if i != j])
        keys = torch.unique(ends[:, 0] * n + ends[:, 1])
        return keys % n, keys // n

    @property
    def pieces(self) -> int:
        """Return how many parts hang together."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        sender, receiver = (v.numpy() for v in self.edges)
        graph = coo_array(
            (np.ones(len(sender)), (sender, receiver)), shape=(len(self), len(self))
        )
        return int(connected_components(graph, directed=False)[0])


def clean(points: Reals, triangles: Numbers) -> tuple[Surface, list[str]]:
    """Return the mesh that is meant, and what was put right.

    That may be points that coincide, triangles without area, or triangles given twice.

    Shapes: points (n, 2) or (n, 3), triangles (m, 3).
    Raises: PmodError where nothing is left, for points that are not finite, and for
    corners that do not exist.
    """
    _check(points, triangles)
    points = np.pad(points, ((0, 0), (0, 3 - points.shape[1])))
    said: list[str] = []

    used, corners = np.unique(triangles, return_inverse=True)
    _note(said, len(points) - len(used), "point", "of no triangle left out")
    points = points[used] - points[used].min(0)
    points /= points.max() or 1.0
    _, first, same = np.unique(
        np.round(points / _SAME), axis=0, return_index=True, return_inverse=True
    )
    _note(said, len(points) - len(first), "point", "merged with another at its place")
    triangles = first[same.reshape(-1)[corners.reshape(-1, 3)]]

    thin = areas(points, triangles) <= _FLAT * _longest(points, triangles) ** 2
    _note(said, int(thin.sum()), "triangle", "without area left out")
    triangles = triangles[~thin]
    _, once = np.unique(np.sort(triangles, axis=1), axis=0, return_index=True)
    _note(said, len(triangles) - len(once), "triangle", "given twice left out")
    triangles = triangles[np.sort(once)]
    if not len(triangles):
        raise PmodError(phrase("demo", "the mesh has no triangle with an area"))
    kept, corners = np.unique(triangles, return_inverse=True)
    _note(said, len(first) - len(kept), "point", "of such triangles left out")
    points = points[kept]
    triangles = corners.reshape(-1, 3).astype(np.int64)
    points /= np.sqrt(areas(points, triangles).sum())
    return Surface(torch.from_numpy(points), torch.from_numpy(triangles)), said


def _check(points: Reals, triangles: Numbers) -> None:
    if points.ndim != 2 or points.shape[1] not in (2, 3):
        raise PmodError(
            phrase(
                "demo",
                f"the points are {points.shape}",
                "They should be (n, 2) or (n, 3).",
            )
        )
    if not len(triangles):
        raise PmodError(phrase("demo", "the mesh has no triangles"))
    low, high = int(triangles.min()), int(triangles.max())
    if low < 0 or high >= len(points):
        given = f"a triangle has the corner {low if low < 0 else high}, and there are {len(points)} points"
        raise PmodError(
            phrase("demo", given, "Corners count from the first point of the file.")
        )
    if not np.isfinite(points[np.unique(triangles)]).all():
        raise PmodError(phrase("demo", "a corner of the mesh is not a finite point"))


def _note(said: list[str], count: int, what: str, did: str) -> None:
    if count:
        said.append(f"{count} {what}{'s' * (count > 1)} {did}")


def areas(points: Reals, triangles: Numbers) -> Reals:
    """Return the area of each triangle."""
    a, b, c = (points[triangles[:, i]] for i in range(3))
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2


def _longest(points: Reals, triangles: Numbers) -> Reals:
    corners = points[triangles]
    return np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=2).max(1)


# --- one that is generated ------------------------------------------------------------

_WIDTH, _HEIGHT = 1.6, 1.0
# x, y, radius; the rim cuts the last one off, which makes the notch
_HOLES = (
    (0.45, 0.55, 0.2),
    (1.15, 0.4, 0.15),
    (1.0, 1.0, 0.18),
)
# the area that is left, about, and the length of its rim
_AREA, _RIM = 1.33, 7.0


def plate(nodes: int, seed: int) -> Surface:
    """Return a plate with two holes and a notch, of about so many points.

    They are a hexagonal grid that is shaken, and the rim.
    """
    from scipy.spatial import Delaunay

    # nodes = area / (0.87 gap^2) + rim / (2 gap): points inside keep half a gap from
    # the rim
    gap = (_RIM / 4 + math.sqrt(_RIM**2 / 16 + nodes * _AREA / 0.87)) / nodes
    rows, columns = np.mgrid[: int(_HEIGHT / (0.87 * gap)) + 2, : int(_WIDTH / gap) + 2]
    grid = np.stack(
        [(columns + rows % 2 / 2) * gap, rows * 0.87 * gap], axis=-1
    ).reshape(-1, 2)
    inside = grid + np.random.default_rng(seed).uniform(-0.3, 0.3, grid.shape) * gap
    points = np.concatenate([_rim(gap), inside[depth(inside) > 0.5 * gap]])
    triangles = Delaunay(points).simplices.astype(np.int64)
    centres = points[triangles].mean(1)
    return clean(points, triangles[depth(centres) > 0])[0]


def depth(points: Reals) -> Reals:
    """Return how deep points lie inside the plate; negative outside."""
    x, y = points.T
    walls = [x, _WIDTH - x, y, _HEIGHT - y]
    holes = [np.hypot(x - a, y - b) - r for a, b, r in _HOLES]
    return np.min([*walls, *holes], axis=0)


def _rim(gap: float) -> Reals:
    """Return points on the edge of the plate."""
    lines: list[Reals] = []
    corners: Sequence[tuple[float, float]] = [
        (0, 0),
        (_WIDTH, 0),
        (_WIDTH, _HEIGHT),
        (0, _HEIGHT),
    ]
    for (x, y), (to_x, to_y) in zip(corners, [*corners[1:], corners[0]], strict=True):
        t = np.linspace(
            0, 1, int(np.hypot(to_x - x, to_y - y) / gap) + 1, endpoint=False
        )
        lines.append(np.stack([x + t * (to_x - x), y + t * (to_y - y)], axis=1))
    for x, y, r in _HOLES:
        t = (
            np.linspace(0, 2 * np.pi, max(int(2 * np.pi * r / gap), 6), endpoint=False)
            + 0.01
        )
        lines.append(np.stack([x + r * np.cos(t), y + r * np.sin(t)], axis=1))
    line = np.concatenate(lines)
    return line[depth(line) > -1e-12]
