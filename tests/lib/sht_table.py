"""Write sht_table.npz, what torch-harmonics says about some transforms: run by hand, where it is installed.

    pip install torch-harmonics==0.9.3 && python tests/lib/sht_table.py

Each entry is named by grid, norm, phase, latitudes, longitudes and lmax (0 for its default). It is the coefficients of
`field(...)`, a scalar and the two parts of a vector one after the other, and the fields that come back of them.
"""

import itertools
import warnings
from pathlib import Path

import numpy as np
import torch

GRIDS, NORMS = ("equiangular", "legendre-gauss", "lobatto"), ("ortho", "schmidt", "unnorm")
SHAPES = ((6, 8, 0), (5, 9, 4))
PATH = Path(__file__).with_suffix(".npz")


def field(nlat: int, nlon: int) -> torch.Tensor:
    """A field and a vector field, as three."""
    t = torch.arange(3 * nlat * nlon, dtype=torch.float64)
    return (t * 0.7).sin().add((t * 0.13).cos()).view(3, nlat, nlon)


def entries() -> list[tuple[str, str, bool, int, int, int]]:
    kinds = [(grid, norm, phase) for grid in GRIDS for norm in NORMS for phase in (True, False)]
    # both shapes for one norm, the smaller for all
    small = [(*kind, *SHAPES[1]) for kind in kinds]
    return small + [(*kind, *SHAPES[0]) for kind in kinds if kind[1:] == ("ortho", True)]


def name(*entry: object) -> str:
    return "/".join(map(str, entry))


def main() -> None:
    import torch_harmonics

    # else it divides by l (l + 1) in single precision
    torch.set_default_dtype(torch.float64)
    table: dict[str, np.ndarray] = {}
    for grid, norm, phase, nlat, nlon, lmax in entries():
        options = {"lmax": lmax or None, "grid": grid, "norm": norm, "csphase": phase}
        kinds = ("RealSHT", "InverseRealSHT", "RealVectorSHT", "InverseRealVectorSHT")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the default truncation
            sht, isht, vsht, ivsht = (getattr(torch_harmonics, kind)(nlat, nlon, **options) for kind in kinds)
        x = field(nlat, nlon)
        modes = torch.cat([sht(x[:1]), vsht(x[1:])])
        back = torch.cat([isht(modes[:1]), ivsht(modes[1:])])
        key = name(grid, norm, phase, nlat, nlon, lmax)
        table[f"{key}/modes"], table[f"{key}/back"] = modes.numpy(), back.numpy()
    np.savez_compressed(PATH, **table)
    print(len(list(itertools.chain(table))), "arrays,", PATH.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
