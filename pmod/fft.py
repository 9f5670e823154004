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

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pmod._collectives.spectrum import (
    Cut,
    Ints,
    Lengths,
    Some,
    lowest,
    modes_of,
    transform,
)
from pmod._core.arguments import (
    LONGEST,
    as_int,
    as_real,
    check_adds_up,
    check_sizes,
    shares,
)
from pmod._errors import ArgumentError, ShapeError, phrase, quoted
from pmod._mesh.ambient import resolve
from pmod._mesh.mesh import AxisLike

# --- one dim --------------------------------------------------------------------------


def fft(
    x: Tensor,
    n: int | None = None,
    dim: int = -1,
    norm: str | None = None,
    *,
    axis: AxisLike,
    in_dim: int | None = None,
    out_dim: int | None = None,
    sizes: Sequence[int] | None = None,
    modes: int | None = None,
) -> Tensor:
    """Transform over a dim that is cut over an axis: torch.fft.fft on shards.

    V -> V. Shapes: x (..., k, ...), the whole (..., m, ...) -> the shard of (..., n,
    ...), n being m by default; it is `dim` that is cut, on the way in and out, unless
    in_dim and out_dim say otherwise.
    Cost: two exchanges of the shard, there and back through the longest other dim; one
    where out_dim is another dim; none where in_dim is. A tensor without another dim is
    gathered on all ranks.
    Raises: ShapeError for dims, lengths or sizes that do not fit; ArgumentError for
    16-bit floats or another norm.

    >>> pmod.simulate(lambda: pmod.fft.fft(pmod.shard(torch.arange(4.0), "model"), axis="model"), model=2)
    [tensor([ 6.+0.j, -2.+2.j]), tensor([-2.+0.j, -2.-2.j])]
    """
    return transform("fft", x, n, dim, norm, Cut(axis, in_dim, out_dim, sizes, modes))


def ifft(
    x: Tensor,
    n: int | None = None,
    dim: int = -1,
    norm: str | None = None,
    *,
    axis: AxisLike,
    in_dim: int | None = None,
    out_dim: int | None = None,
    sizes: Sequence[int] | None = None,
    modes: int | None = None,
) -> Tensor:
    """The inverse of `fft`: torch.fft.ifft on shards.

    V -> V. Shapes: x (..., k, ...), the whole (..., m, ...) -> the shard of (..., n,
    ...), n being m by default.
    Cost, Raises: as `fft`.

    >>> pmod.simulate(lambda: pmod.fft.ifft(torch.tensor([[2.0 + 0j, 4.0]]), axis="model", in_dim=0), model=2)[1]
    tensor([[ 3.+0.j, -1.+0.j]])
    """
    return transform("ifft", x, n, dim, norm, Cut(axis, in_dim, out_dim, sizes, modes))


def rfft(
    x: Tensor,
    n: int | None = None,
    dim: int = -1,
    norm: str | None = None,
    *,
    axis: AxisLike,
    in_dim: int | None = None,
    out_dim: int | None = None,
    sizes: Sequence[int] | None = None,
    modes: int | None = None,
) -> Tensor:
    """Return the half spectrum over a dim that is cut: torch.fft.rfft on shards.

    V -> V. Shapes: x (..., k, ...) real, the whole (..., m, ...) -> the shard of (...,
    n // 2 + 1, ...).
    Cost: as `fft`; the signal travels as real numbers, its half spectrum back as
    complex ones.
    Raises: as `fft`; ArgumentError for complex x.

    >>> pmod.simulate(lambda: pmod.fft.rfft(pmod.shard(torch.arange(4.0), "model"), axis="model"), model=2)
    [tensor([ 6.+0.j, -2.+2.j]), tensor([-2.+0.j])]
    """
    return transform("rfft", x, n, dim, norm, Cut(axis, in_dim, out_dim, sizes, modes))


def irfft(
    x: Tensor,
    n: int | None = None,
    dim: int = -1,
    norm: str | None = None,
    *,
    axis: AxisLike,
    in_dim: int | None = None,
    out_dim: int | None = None,
    sizes: Sequence[int] | None = None,
    modes: int | None = None,
) -> Tensor:
    """The inverse of `rfft`: torch.fft.irfft on shards.

    V -> V. Shapes: x (..., k, ...), the whole (..., m, ...) -> the shard of (..., n,
    ...), real; n is 2 * (m - 1) by default, so that odd lengths have to be passed.
    Cost, Raises: as `fft`.

    >>> def there_and_back(x):
    ...     modes = pmod.fft.rfft(pmod.shard(x, "model"), axis="model")
    ...     return pmod.fft.irfft(modes, n=3, axis="model").round()
    >>> pmod.simulate(there_and_back, torch.tensor([1.0, 2.0, 4.0]), model=2)
    [tensor([1., 2.]), tensor([4.])]
    """
    return transform("irfft", x, n, dim, norm, Cut(axis, in_dim, out_dim, sizes, modes))


# --- two dims and more ----------------------------------------------------------------


def fft2(
    x: Tensor,
    s: Ints | None = None,
    dim: Ints = (-2, -1),
    norm: str | None = None,
    *,
    axis: AxisLike,
    in_dim: Ints | None = None,
    out_dim: Ints | None = None,
    sizes: Lengths | None = None,
    modes: Some | None = None,
) -> Tensor:
    """Transform over two dims, one of them cut: torch.fft.fft2 on shards.

    V -> V. Shapes: x (..., h/ranks, w), cut along the first of `dim` -> (..., h,
    w/ranks), cut along the last.
    Cost: one exchange, of the rank's rows transformed along the last dim.
    Raises: ShapeError for dims, lengths or sizes that do not fit; ArgumentError for
    16-bit floats or another norm.

    >>> pmod.simulate(lambda: pmod.fft.fft2(torch.ones(1, 2), axis="model"), model=2)[0]
    tensor([[4.+0.j],
            [0.+0.j]])
    """
    return transform("fft2", x, s, dim, norm, Cut(axis, in_dim, out_dim, sizes, modes))


def ifft2(
    x: Tensor,
    s: Ints | None = None,
    dim: Ints = (-2, -1),
    norm: str | None = None,
    *,
    axis: AxisLike,
    in_dim: Ints | None = None,
    out_dim: Ints | None = None,
    sizes: Lengths | None = None,
    modes: Some | None = None,
) -> Tensor:
    """The inverse of `fft2`: torch.fft.ifft2 on shards.

    V -> V. Shapes: x (..., h, w/ranks), cut along the last of `dim` -> (..., h/ranks,
    w), cut along the first.
    Cost: one exchange, of the rank's columns transformed along the first dim. Raises:
    as `fft2`.

    >>> pmod.simulate(lambda: pmod.fft.ifft2(torch.tensor([[4.0], [0.0]]), axis="model").abs(), model=2)[0]
    tensor([[2., 0.]])
    """
    return transform("ifft2", x, s, dim, norm, Cut(axis, in_dim, out_dim, sizes, modes))


def rfft2(
    x: Tensor,
    s: Ints | None = None,
    dim: Ints = (-2, -1),
    norm: str | None = None,
    *,
    axis: AxisLike,
    in_dim: Ints | None = None,
    out_dim: Ints | None = None,
    sizes: Lengths | None = None,
    modes: Some | None = None,
) -> Tensor:
    """Return the half spectrum of a field, cut by rows: torch.fft.rfft2 on shards.

    V -> V. Shapes: x (..., h/ranks, w) real, cut along the first of `dim` -> (..., h,
    (w//2 + 1)/ranks), cut along the last. With modes=(i, j) (..., i, j/ranks).
    Cost: one exchange, of the rank's rows as half spectra, of which modes sends the
    lowest j only. Cut along the last dim on the way in and another of `dim` on the way
    out, whole spectra travel: twice as much.
    Raises: ShapeError for dims, lengths, sizes or modes that do not fit; ArgumentError
    for complex x, 16-bit floats or another norm.

    >>> pmod.simulate(lambda: pmod.fft.rfft2(torch.ones(1, 4), axis="model"), model=2)
    [tensor([[8.+0.j, 0.+0.j],
             [0.+0.j, 0.+0.j]]), tensor([[0.+0.j],
             [0.+0.j]])]
    >>> pmod.simulate(lambda: pmod.fft.rfft2(torch.ones(1, 4), axis="model", modes=(1, 2)), model=2)
    [tensor([[8.+0.j]]), tensor([[0.+0.j]])]
    """
    return transform("rfft2", x, s, dim, norm, Cut(axis, in_dim, out_dim, sizes, modes))


def irfft2(
    x: Tensor,
    s: Ints | None = None,
    dim: Ints = (-2, -1),
    norm: str | None = None,
    *,
    axis: AxisLike,
    in_dim: Ints | None = None,
    out_dim: Ints | None = None,
    sizes: Lengths | None = None,
    modes: Some | None = None,
) -> Tensor:
    """The inverse of `rfft2`: torch.fft.irfft2 on shards.

    V -> V. Shapes: x (..., h, (w//2 + 1)/ranks), cut along the last of `dim` -> (...,
    h/ranks, w) real, cut along the first. With modes x has the lowest modes only, and
    `s` is (h, w).
    Cost: one exchange, of the rank's columns transformed along the first dim. Cut the
    other way round, whole spectra
    travel: twice as much. Raises: as `rfft2`; ShapeError for modes without s.

    >>> def smooth(x):
    ...     modes = pmod.fft.rfft2(x, axis="model", modes=(1, 2))
    ...     return pmod.fft.irfft2(modes, s=(2, 4), axis="model", modes=(1, 2))
    >>> pmod.simulate(smooth, torch.tensor([[1.0, 2.0, 1.0, 0.0]]), model=2)[1]
    tensor([[1., 2., 1., 0.]])
    """
    return transform(
        "irfft2", x, s, dim, norm, Cut(axis, in_dim, out_dim, sizes, modes)
    )


def fftn(
    x: Tensor,
    s: Ints | None = None,
    dim: Ints | None = None,
    norm: str | None = None,
    *,
    axis: AxisLike,
    in_dim: Ints | None = None,
    out_dim: Ints | None = None,
    sizes: Lengths | None = None,
    modes: Some | None = None,
) -> Tensor:
    """Transform over several dims, some of them cut: torch.fft.fftn on shards.

    V -> V. Shapes: x cut along the first of `dim`, all dims by default ->
    torch.fft.fftn's, cut along the last.
    Cost: one exchange for each axis, of what the rank holds. Raises: as `fft2`.

    >>> def pencils():
    ...     x = torch.ones(1, 1, 2)  # of a whole (2, 2, 2), cut along the first dim over x, along the second over y
    ...     return pmod.fft.fftn(x, axis=("x", "y"), in_dim=(0, 1), out_dim=(1, 2)).flatten()
    >>> pmod.simulate(pencils, x=2, y=2)[0]
    tensor([8.+0.j, 0.+0.j])
    """
    return transform("fftn", x, s, dim, norm, Cut(axis, in_dim, out_dim, sizes, modes))


def ifftn(
    x: Tensor,
    s: Ints | None = None,
    dim: Ints | None = None,
    norm: str | None = None,
    *,
    axis: AxisLike,
    in_dim: Ints | None = None,
    out_dim: Ints | None = None,
    sizes: Lengths | None = None,
    modes: Some | None = None,
) -> Tensor:
    """The inverse of `fftn`: torch.fft.ifftn on shards.

    V -> V. Shapes: x cut along the last of `dim`, all dims by default ->
    torch.fft.ifftn's, cut along the first.
    Cost: one exchange for each axis, of what the rank holds. Raises: as `fft2`.

    >>> pmod.simulate(lambda: pmod.fft.ifftn(torch.tensor([[4.0], [0.0]]), axis="model").abs(), model=2)[0]
    tensor([[2., 0.]])
    """
    return transform("ifftn", x, s, dim, norm, Cut(axis, in_dim, out_dim, sizes, modes))


def rfftn(
    x: Tensor,
    s: Ints | None = None,
    dim: Ints | None = None,
    norm: str | None = None,
    *,
    axis: AxisLike,
    in_dim: Ints | None = None,
    out_dim: Ints | None = None,
    sizes: Lengths | None = None,
    modes: Some | None = None,
) -> Tensor:
    """Return the half spectrum over several dims: torch.fft.rfftn on shards.

    V -> V. Shapes: x real, cut along the first of `dim`, all dims by default ->
    torch.fft.rfftn's, cut along the last.
    Cost: one exchange for each axis, of half spectra; whole ones as in `rfft2`. Raises:
    as `rfft2`.

    >>> pmod.simulate(lambda: pmod.fft.rfftn(torch.ones(1, 4), axis="model"), model=2)[1]
    tensor([[0.+0.j],
            [0.+0.j]])
    """
    return transform("rfftn", x, s, dim, norm, Cut(axis, in_dim, out_dim, sizes, modes))


def irfftn(
    x: Tensor,
    s: Ints | None = None,
    dim: Ints | None = None,
    norm: str | None = None,
    *,
    axis: AxisLike,
    in_dim: Ints | None = None,
    out_dim: Ints | None = None,
    sizes: Lengths | None = None,
    modes: Some | None = None,
) -> Tensor:
    """The inverse of `rfftn`: torch.fft.irfftn on shards.

    V -> V. Shapes: x cut along the last of `dim`, all dims by default ->
    torch.fft.irfftn's, real, cut along the first.
    Cost: one exchange for each axis, of half spectra; whole ones as in `irfft2`.
    Raises: as `irfft2`.

    >>> def there_and_back(x):
    ...     return pmod.fft.irfftn(pmod.fft.rfftn(x, axis="model"), s=(2, 3), axis="model").round()
    >>> pmod.simulate(there_and_back, torch.tensor([[1.0, 2.0, 4.0]]), model=2)[1]
    tensor([[1., 2., 4.]])
    """
    return transform(
        "irfftn", x, s, dim, norm, Cut(axis, in_dim, out_dim, sizes, modes)
    )


# --- frequencies ----------------------------------------------------------------------


class _Wanted(NamedTuple):
    """What fftfreq and rfftfreq were given."""

    n: object
    d: object
    axis: AxisLike | None
    sizes: Sequence[int] | None
    modes: object
    dtype: object
    device: object


def _device(device: object, function: str) -> torch.device | None:
    """Return a device that this process has."""
    if device is None:
        return None
    asked: Any = device
    try:
        # an allocation: torch.device() takes devices that are not here
        return torch.empty(0, device=asked).device
    # torch raises any of them
    except (RuntimeError, TypeError, ValueError, AssertionError):
        right = "Pass a torch.device that is here, or its name: 'cpu', 'cuda:0'."
        raise ArgumentError(
            phrase(function, f"device is {quoted(device)}", right)
        ) from None


def _frequencies(name: str, wanted: _Wanted) -> Tensor:
    """Return this rank's share of the frequencies that are kept."""
    function = f"fft.{name}"
    n, d, few = as_int(wanted.n), as_real(wanted.d), as_int(wanted.modes)
    if n is None or not 1 <= n <= LONGEST:
        raise ShapeError(
            phrase(function, f"n is {quoted(wanted.n)}", "Pass a length of 1 or more.")
        )
    # written so that NaN is refused, too
    if d is None or not 0 < abs(d) < inf:
        raise ArgumentError(
            phrase(
                function, f"d is {quoted(wanted.d)}", "Pass the distance of two points."
            )
        )
    dtype = wanted.dtype
    is_floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    if dtype is not None and not is_floating:
        raise ArgumentError(
            phrase(
                function, f"dtype is {quoted(wanted.dtype)}", "Pass a floating dtype."
            )
        )
    half = name == "rfftfreq"
    whole = modes_of(n, half)
    if wanted.modes is not None and (few is None or not 1 <= few <= whole):
        given = f"modes is {quoted(wanted.modes)} and there are {whole}"
        raise ShapeError(phrase(function, given, f"Pass from 1 to {whole}."))
    bound = None if wanted.axis is None else resolve(wanted.axis, function)
    # what is wrong with the sizes is said before anything is made
    cut = None
    if bound is not None and wanted.sizes is not None:
        cut = check_sizes(wanted.sizes, function, bound)
    device = _device(wanted.device, function)
    kept: Tensor = getattr(torch.fft, name)(
        n, float(d), dtype=wanted.dtype, device=device
    )
    # the lowest of a whole spectrum are not its first: negative ones stand at its end
    if few is not None:
        kept = lowest(kept, -1, few, half)
    if bound is None:
        return kept
    # as `transform` cuts what it returns
    if cut is None:
        cut = shares(int(kept.shape[0]), bound)
    check_adds_up(kept, -1, cut, function, bound)
    return kept.narrow(0, sum(cut[: bound.index]), cut[bound.index])


def fftfreq(
    n: int,
    d: float = 1.0,
    *,
    axis: AxisLike | None = None,
    sizes: Sequence[int] | None = None,
    modes: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return this rank's share of torch.fft.fftfreq's frequencies of n modes.

    axis, sizes: how the spectrum is cut; without an axis all of it. modes: of the
    lowest only.
    Shapes: (sizes[i],) on rank i, by default the shares of `split_sizes`. Cost: nothing
    is sent.
    Raises: ShapeError where n, sizes or modes do not fit; ArgumentError for another d,
    dtype or device.

    >>> pmod.simulate(lambda: pmod.fft.fftfreq(4, 1 / 4, axis="model"), model=2)
    [tensor([0., 1.]), tensor([-2., -1.])]
    """
    return _frequencies("fftfreq", _Wanted(n, d, axis, sizes, modes, dtype, device))


def rfftfreq(
    n: int,
    d: float = 1.0,
    *,
    axis: AxisLike | None = None,
    sizes: Sequence[int] | None = None,
    modes: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return this rank's share of torch.fft.rfftfreq's frequencies of n points.

    axis, sizes: how the spectrum is cut; without an axis all of it. modes: of the
    lowest only.
    Shapes: (sizes[i],) on rank i, by default the shares of `split_sizes`. Cost: nothing
    is sent.
    Raises: ShapeError where n, sizes or modes do not fit; ArgumentError for another d,
    dtype or device.

    >>> pmod.simulate(lambda: pmod.fft.rfftfreq(4, 1 / 4, axis="model"), model=2)
    [tensor([0., 1.]), tensor([2.])]
    """
    return _frequencies("rfftfreq", _Wanted(n, d, axis, sizes, modes, dtype, device))
