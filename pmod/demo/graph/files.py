"""Mesh files that others made: graphics are read by trimesh, simulations by meshio."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Sized
from pathlib import Path
from typing import TypeAlias

import numpy as np

from pmod._console import check_extra
from pmod._errors import PmodError, phrase
from pmod.demo.graph.surface import Numbers, Reals, Surface, clean

# the points, and cells of each kind
Found: TypeAlias = tuple[Reals, list[tuple[str, Sized]]]

_GRAPHICS = {".obj", ".ply", ".stl", ".off", ".glb", ".gltf"}
# how many of a cell's nodes are corners; those that follow are on its sides, and the
# triangles do without them
_CORNERS = {
    "triangle": 3,
    "triangle6": 3,
    "triangle7": 3,
    "triangle10": 3,
    "quad": 4,
    "quad8": 4,
    "quad9": 4,
}


def read(path: Path) -> tuple[Surface, list[str]]:
    """Return the surface in a file, and what was put right or left out.

    Quads and polygons are cut into triangles, cells of higher order are taken by their
    corners; cells that are no surface are left out.
    Raises: PmodError if the package that reads it is missing, cannot read the file, or
    finds no surface in it.
    """
    graphics = path.suffix.lower() in _GRAPHICS
    if not path.is_file():
        raise _unusable(path, "there is no such file", "")
    check_extra("trimesh" if graphics else "meshio", extra="mesh")
    points, blocks = _quietly(_trimesh if graphics else _meshio, path)
    said: list[str] = []
    triangles: list[Numbers] = []
    for kind, cells in blocks:
        corners = _corners(kind, cells)
        count = f"{len(cells)} {kind} cell{'s' * (len(cells) != 1)}"
        if not corners:
            if len(cells):
                said.append(f"{count} left out")
            continue
        if corners > 3:
            said.append(f"{count} cut into triangles")
        elif kind != "triangle":
            said.append(f"{count} taken by their corners")
        triangles.append(_cut(points, np.asarray(cells, dtype=np.int64)[:, :corners]))
    if not triangles:
        given = "it holds no surface"
        if said:
            given += f": {', '.join(said)}"
        right = "Pass a mesh of triangles, quads or polygons; of a volume, its surface."
        raise _unusable(path, given, right)
    try:
        surface, more = clean(points, np.concatenate(triangles))
    except PmodError as error:
        given, _, right = str(error).removeprefix("pmod.demo: ").partition(".\n")
        raise _unusable(path, given.rstrip("."), right) from None
    return surface, said + more


def _unusable(path: Path, given: str, right: str) -> PmodError:
    return PmodError(phrase("demo", f"cannot use {path}: {given}", right))


def _meshio(path: Path) -> Found:
    import meshio

    found = meshio.read(path)
    points = np.asarray(found.points, dtype=np.float64)
    return points, [(block.type, block.data) for block in found.cells]


def _trimesh(path: Path) -> Found:
    import trimesh

    found = trimesh.load_mesh(path, process=False)
    return np.asarray(found.vertices, dtype=np.float64), [("triangle", found.faces)]


def _quietly(reader: Callable[[Path], Found], path: Path) -> Found:
    # meshio prints what it tried, and then exits: neither may end the demo unsaid
    heard = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(heard),
            contextlib.redirect_stderr(heard),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            return reader(path)
    # a reader raises whatever the parsing of a broken file raises
    except (Exception, SystemExit) as error:
        text = str(error) if isinstance(error, Exception) else heard.getvalue()
        why = " ".join(text.split()).rstrip(".") or type(error).__name__
        right = (
            "It should be a mesh: .obj, .ply, .stl, .off or .glb, "
            "or in a format that meshio reads."
        )
        raise _unusable(path, why, right) from None


def _corners(kind: str, cells: object) -> int:
    """Return how many corners a cell of this kind has, 0 if it is no surface."""
    if kind.startswith("polygon"):
        return np.asarray(cells).shape[1]
    return _CORNERS.get(kind, 0)


def _cut(points: Reals, cells: Numbers) -> Numbers:
    """Return triangles for cells of 3 or more corners.

    A quad is cut along its shorter diagonal, other cells as a fan.
    """
    corners = cells.shape[1]
    # a corner that does not exist is reported later, with the triangles that have it
    exist = cells.min(initial=0) >= 0 and cells.max(initial=0) < len(points)
    if corners == 4 and exist:
        p = points[cells]
        first = np.linalg.norm(p[:, 0] - p[:, 2], axis=1)
        other = np.linalg.norm(p[:, 1] - p[:, 3], axis=1)
        turned = np.roll(cells, -1, axis=1)
        cells = np.where((other < first)[:, None], turned, cells)
    fan = [cells[:, [0, i, i + 1]] for i in range(1, corners - 1)]
    return np.concatenate(fan)
