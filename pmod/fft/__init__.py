"""Fourier transforms of a tensor that is cut over ranks: torch.fft on shards.

    modes = pmod.fft.rfft2(x, axis="model")  # in: rows on each rank; out: columns of the spectrum
    x = pmod.fft.irfft2(modes, s=(height, width), axis="model")  # and back

x is this rank's shard of a global tensor, cut along `in_dim`; the result is this rank's
shard of what torch.fft gives on the whole, cut along `out_dim` in shares of
`split_sizes(length, n)`. A rank transforms the dims that it holds whole, an exchange
makes others whole, and so on: each stage is one call of torch.fft, each exchange one
`all_to_all`. Nothing here has a derivative of its own: all are those of torch.fft and
of the collectives.

Names, arguments and defaults are torch.fft's, but for `out`. These follow, by keyword:

- axis: the mesh axis.
- in_dim, out_dim: the dim that is cut on the way in, and on the way out. A forward
  transform goes from the first of `dim` to the last, an inverse from the last to the
  first, so that a pair of them exchanges twice. Where in_dim is none of `dim`, out_dim
  is in_dim and nothing is sent. Where both are the same dim of `dim` (as in one
  dimension, by default) it goes there and back through the longest other dim, in two
  exchanges; without one of length 2 all ranks gather the whole.
- sizes: the lengths of the shards along in_dim, one per rank. Without them the ranks
  exchange them: one small message more, and on cuda a wait for it; under torch.compile
  they must be given.
- modes: how many modes of each dim of `dim` are kept, the lowest, in torch's order: 0
  to k - 1 of the half spectrum of a real transform, those of fftfreq(k) of a whole one.
  A forward transform leaves the others out before they are sent. An inverse is given
  such a spectrum, and the length `s` (or `n`) of the signal that it belongs to.

Over several mesh axes (pencils): a tuple of axes with tuples for in_dim and out_dim, a
dim for each axis; by default the first dims of `dim` and the last. Each axis makes its
exchanges by itself; sizes are then a tuple of sizes.

What is wrong raises before anything is sent; what only the whole length shows, on all
ranks, once they know it.
"""

from pmod.fft.hermitian import hfft as hfft
from pmod.fft.hermitian import hfft2 as hfft2
from pmod.fft.hermitian import hfftn as hfftn
from pmod.fft.hermitian import ihfft as ihfft
from pmod.fft.hermitian import ihfft2 as ihfft2
from pmod.fft.hermitian import ihfftn as ihfftn
from pmod.fft.order import fftfreq as fftfreq
from pmod.fft.order import fftshift as fftshift
from pmod.fft.order import ifftshift as ifftshift
from pmod.fft.order import rfftfreq as rfftfreq
from pmod.fft.transforms import fft as fft
from pmod.fft.transforms import fft2 as fft2
from pmod.fft.transforms import fftn as fftn
from pmod.fft.transforms import ifft as ifft
from pmod.fft.transforms import ifft2 as ifft2
from pmod.fft.transforms import ifftn as ifftn
from pmod.fft.transforms import irfft as irfft
from pmod.fft.transforms import irfft2 as irfft2
from pmod.fft.transforms import irfftn as irfftn
from pmod.fft.transforms import rfft as rfft
from pmod.fft.transforms import rfft2 as rfft2
from pmod.fft.transforms import rfftn as rfftn
