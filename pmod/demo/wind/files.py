"""Fields on a regular grid of the globe, from netCDF 4 (which is HDF5) or .npy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmod._errors import PmodError, phrase
from pmod.demo.console import check_extra
from pmod.demo.wind.winds import Winds


def read(u: Path, v: Path) -> Winds:
    """The winds of two files. Raises: PmodError where they are none, or do not fit
    together.
    """
    fields = field(u), field(v)
    check_like(fields[0], fields[1], v)
    return Winds(*fields)


def check_like(wanted: Tensor, found: Tensor, path: Path) -> None:
    """Raise PmodError where what a file holds has another shape than what it belongs
    to.
    """
    if wanted.shape != found.shape:
        given = f"it holds {tuple(found.shape)} (times, lat, lon), beside {tuple(wanted.shape)}"
        raise _unusable(path, given, "Pass files of the same times and grid.")


def field(path: Path) -> Tensor:
    """A field, from the north pole to the south.

    Shapes: -> (times, lat, lon), float64: all dims but the last two are taken for
    times.
    Raises: PmodError where the file holds no such field.
    """
    if not path.is_file():
        raise _unusable(path, "there is no such file", "")
    if path.suffix != ".npy":
        check_extra("h5py")
    try:
        found = (
            np.load(path, allow_pickle=False)
            if path.suffix == ".npy"
            else _netcdf(path)
        )
    except PmodError:
        raise
    except Exception as error:  # readers raise whatever their parsing raises
        why = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise _unusable(path, why, "It should be netCDF 4 (HDF5), or .npy.") from None
    shape: tuple[int, ...] = found.shape
    if (
        found.dtype.kind != "f"
        or len(shape) < 2
        or min(shape[-2:]) < 3
        or not np.isfinite(found).all()
    ):
        given = f"it holds {found.dtype} of shape {shape}"
        raise _unusable(
            path,
            given,
            "It should be finite floating numbers (..., lat, lon), at least 3 x 3.",
        )
    return torch.from_numpy(found.astype(np.float64).reshape(-1, *shape[-2:]))


def _netcdf(path: Path) -> Any:
    """The one variable on the file's grid."""
    import h5py

    with h5py.File(path) as file:
        held: dict[str, Any] = {
            name: value
            for name, value in file.items()
            if isinstance(value, h5py.Dataset)
        }
        lat, lon = (
            _coordinate(path, held, names)
            for names in (("latitude", "lat"), ("longitude", "lon"))
        )
        on_grid = [
            name
            for name, value in held.items()
            if value.shape[-2:] == (len(lat), len(lon))
        ]
        if len(on_grid) != 1:
            given = f"{len(on_grid)} variables are on its grid of {len(lat)} x {len(lon)}: {', '.join(on_grid) or '-'}"
            raise _unusable(path, given, "Pass a file of one field (..., lat, lon).")
        found = held[on_grid[0]][()]
    to_south = np.linspace(90, -90, len(lat))
    southward = bool(np.allclose(lat, to_south, atol=1e-3))
    round_once = np.allclose(np.diff(lon), 360 / len(lon), atol=1e-3)
    if not (southward or np.allclose(lat[::-1], to_south, atol=1e-3)) or not round_once:
        given = f"its grid is {lat[0]:g} ... {lat[-1]:g} degrees of latitude, {lon[0]:g} ... {lon[-1]:g} of longitude"
        raise _unusable(
            path,
            given,
            "It should be regular, both poles in it, and go eastward once round.",
        )
    return found if southward else found[..., ::-1, :]


def _coordinate(path: Path, held: dict[str, Any], names: tuple[str, ...]) -> Any:
    for name in names:
        if name in held and held[name].ndim == 1:
            return held[name][()]
    raise _unusable(
        path,
        f"it has no {' or '.join(names)} of one dimension",
        "It should say where its points are.",
    )


def _unusable(path: Path, given: str, right: str) -> PmodError:
    return PmodError(phrase("demo", f"cannot use {path}: {given}", right))
