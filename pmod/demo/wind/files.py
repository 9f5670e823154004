"""Fields on a regular grid of the globe, from netCDF 4 (which is HDF5) or .npy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from pmod._console import check_extra
from pmod._errors import PmodError, phrase
from pmod.demo.wind.winds import Winds

Array: TypeAlias = np.ndarray[Any, Any]
"""numpy's, or a dataset of h5py, which is read as one."""


def read(u: Path, v: Path) -> Winds:
    """Return the winds of two files.

    Raises: PmodError if they are none, or do not fit together.
    """
    fields = field(u), field(v)
    check_like(fields[0], fields[1], v)
    return Winds(*fields)


def check_like(wanted: Tensor, found: Tensor, path: Path) -> None:
    """Raise PmodError if a file's field has another shape than what it belongs to."""
    if wanted.shape != found.shape:
        shapes = f"{tuple(found.shape)} (times, lat, lon), beside {tuple(wanted.shape)}"
        given = f"it holds {shapes}"
        raise _unusable(path, given, "Pass files of the same times and grid.")


def field(path: Path) -> Tensor:
    """Return a field, from the north pole to the south.

    Shapes: -> (times, lat, lon), float64: all dims but the last two are taken for
    times.
    Raises: PmodError if the file holds no such field.
    """
    if not path.is_file():
        raise _unusable(path, "there is no such file", "")
    if path.suffix != ".npy":
        check_extra("h5py")
    try:
        found = _npy(path) if path.suffix == ".npy" else _netcdf(path)
    except PmodError:
        raise
    # a reader raises whatever the parsing of a broken file raises
    except Exception as error:
        why = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise _unusable(path, why, "It should be netCDF 4 (HDF5), or .npy.") from None
    shape: tuple[int, ...] = found.shape
    # differences need a point on both sides of each
    is_grid = len(shape) >= 2 and min(shape[-2:]) >= 3
    if found.dtype.kind != "f" or not is_grid or not np.isfinite(found).all():
        given = f"it holds {found.dtype} of shape {shape}"
        right = "It should be finite floating numbers (..., lat, lon), at least 3 x 3."
        raise _unusable(path, given, right)
    return torch.from_numpy(found.astype(np.float64).reshape(-1, *shape[-2:]))


def _npy(path: Path) -> Array:
    return np.load(path, allow_pickle=False)


def _netcdf(path: Path) -> Array:
    """Return the one variable on the file's grid."""
    import h5py

    with h5py.File(path) as file:
        held: dict[str, Array] = {}
        for name, value in file.items():
            if isinstance(value, h5py.Dataset):
                held[name] = cast(Array, value)
        lat = _coordinate(path, held, ("latitude", "lat"))
        lon = _coordinate(path, held, ("longitude", "lon"))
        grid = (len(lat), len(lon))
        on_grid = [name for name, value in held.items() if value.shape[-2:] == grid]
        if len(on_grid) != 1:
            found = ", ".join(on_grid) or "-"
            size = f"{grid[0]} x {grid[1]}"
            given = f"{len(on_grid)} variables are on its grid of {size}: {found}"
            raise _unusable(path, given, "Pass a file of one field (..., lat, lon).")
        values = held[on_grid[0]][()]
    to_south = np.linspace(90, -90, len(lat))
    southward = np.allclose(lat, to_south, atol=1e-3)
    northward = np.allclose(lat[::-1], to_south, atol=1e-3)
    round_once = np.allclose(np.diff(lon), 360 / len(lon), atol=1e-3)
    if not round_once or not (southward or northward):
        given = (
            f"its grid is {lat[0]:g} ... {lat[-1]:g} degrees of latitude, "
            f"{lon[0]:g} ... {lon[-1]:g} of longitude"
        )
        right = "It should be regular, both poles in it, and go eastward once round."
        raise _unusable(path, given, right)
    return values if southward else values[..., ::-1, :]


def _coordinate(path: Path, held: dict[str, Array], names: tuple[str, ...]) -> Array:
    for name in names:
        if name in held and held[name].ndim == 1:
            return held[name][()]
    given = f"it has no {' or '.join(names)} of one dimension"
    raise _unusable(path, given, "It should say where its points are.")


def _unusable(path: Path, given: str, right: str) -> PmodError:
    return PmodError(phrase("demo", f"cannot use {path}: {given}", right))
