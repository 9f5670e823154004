"""Mesh files of other people's making: those of graphics are read with trimesh, those
of simulation with meshio.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from pmod._errors import PmodError, phrase
from pmod.demo.console import check_extra
from pmod.demo.graph.surface import Numbers, Reals, Surface, clean

Found: TypeAlias = tuple[
    Reals, list[tuple[str, Any]]
]  # the points, and cells of each kind

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
    """The surface in a file, and what was put right or left out.

    Quads and polygons are cut into triangles, cells of higher order are taken by their
    corners; cells that are no surface are left out.
    Raises: PmodError where what reads it is missing, cannot read the file, or finds no
    surface in it.
    """
    graphics = path.suffix.lower() in _GRAPHICS
    if not path.is_file():
        raise _unusable(path, "there is no such file", "")
    check_extra("trimesh" if graphics else "meshio", extra="mesh")
    points, blocks = _quietly(_trimesh if graphics else _meshio, path)
    said: list[str] = []
    triangles: list[Numbers] = []
    for kind, cells in blocks:
        corners = _CORNERS.get(kind) or (
            _width(cells) if kind.startswith("polygon") else 0
        )
        count = f"{len(cells)} {kind} cell{'s' * (len(cells) != 1)}"
        if not corners:
            said += [f"{count} left out"] if len(cells) else []
            continue
        if kind != "triangle":
            said.append(
                f"{count} {'cut into triangles' if corners > 3 else 'taken by their corners'}"
            )
        triangles.append(_cut(points, np.asarray(cells, dtype=np.int64)[:, :corners]))
    if not triangles:
        given = "it holds no surface" + (f": {', '.join(said)}" if said else "")
        raise _unusable(
            path,
            given,
            "Pass a mesh of triangles, quads or polygons; of a volume, its surface.",
        )
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

    found: Any = meshio.read(path)
    return np.asarray(found.points, dtype=np.float64), [
        (block.type, block.data) for block in found.cells
    ]


def _trimesh(path: Path) -> Found:
    import trimesh

    found: Any = trimesh.load_mesh(path, process=False)
    return np.asarray(found.vertices, dtype=np.float64), [("triangle", found.faces)]


def _quietly(reader: Callable[[Path], Found], path: Path) -> Found:
    heard = io.StringIO()  # meshio prints what it tried, and then leaves the program
    try:
        with (
            contextlib.redirect_stdout(heard),
            contextlib.redirect_stderr(heard),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            return reader(path)
    except (
        Exception,
        SystemExit,
    ) as error:  # a reader raises whatever its parsing raises
        why = " ".join(
            (str(error) if isinstance(error, Exception) else heard.getvalue()).split()
        )
        right = "It should be a mesh: .obj, .ply, .stl, .off or .glb, or in a format that meshio reads."
        raise _unusable(path, why.rstrip(".") or type(error).__name__, right) from None


def _width(cells: Any) -> int:
    return np.asarray(cells).shape[1]


def _cut(points: Reals, cells: Numbers) -> Numbers:
    """Triangles for cells of 3 or more corners: a quad along its shorter diagonal,
    others as a fan.
    """
    if (
        cells.shape[1] == 4
        and cells.min(initial=0) >= 0
        and cells.max(initial=0) < len(points)
    ):
        p = points[cells]
        other = np.linalg.norm(p[:, 1] - p[:, 3], axis=1) < np.linalg.norm(
            p[:, 0] - p[:, 2], axis=1
        )
        cells = np.where(other[:, None], np.roll(cells, -1, axis=1), cells)
    return np.concatenate(
        [cells[:, [0, i, i + 1]] for i in range(1, cells.shape[1] - 1)]
    )
