"""Spherical harmonic transforms of fields that are cut over latitudes and longitudes.

    modes = pmod.sht.sht(x, axis={-2: "lat", -1: "lon"})  # in: latitudes and longitudes; out: degrees and orders
    x = pmod.sht.isht(modes, (nlat, nlon), axis={-2: "lat", -1: "lon"})  # and back

x is this rank's shard of a real field (..., nlat, nlon), the first latitude at the north
pole; the spectrum (..., lmax, mmax) is complex, cut along degrees and orders in shares of
`split_sizes`, by the same axes. Numbers, grids, norms and truncation are those of
torch-harmonics' RealSHT and its three others. Longitudes are transformed by
`pmod.fft`; an exchange along the latitudes' axis then makes these whole for some orders
each, a product with the Legendre functions sums over them, and an exchange brings
degrees and orders to their ranks. Nothing here has a derivative of its own.

By keyword, in all four:

- axis: {dim: axis} for -2, -1 or both, or the axis that cuts dim -2.
- grid: "equiangular", "legendre-gauss" or "lobatto", how latitudes lie (`latitudes`).
- norm: "ortho", "schmidt" or "unnorm", csphase: whether odd orders are negated.
- sizes: the lengths of the shards that come in, one per rank of the axis, or {dim:
  sizes}. Without them the ranks exchange them: one small message more per axis; under
  torch.compile they must be given.

The tables of Legendre functions are computed for this rank's orders only, at the first
call of a kind, and the last 16 are kept.
"""

from pmod.sht.tables import latitudes as latitudes
from pmod.sht.transforms import isht as isht
from pmod.sht.transforms import ivsht as ivsht
from pmod.sht.transforms import sht as sht
from pmod.sht.transforms import vsht as vsht
