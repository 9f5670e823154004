"""Frequencies, and the order in which modes stand."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pmod._collectives.shifts import shifted
from pmod._collectives.spectrum import Ints, Lengths, lowest, modes_of
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


def fftshift(
    x: Tensor,
    dim: Ints | None = None,
    *,
    axis: AxisLike,
    in_dim: Ints | None = None,
    sizes: Lengths | None = None,
) -> Tensor:
    """Move the zero frequency to the middle of dims, one of them cut: on shards.

    in_dim is the last of `dim` (of all dims by default), as it is in a spectrum. After
    `modes` of a transform were kept, this gives them in the order of a spectrum that was
    shifted first and then cut off on both sides.

    V -> V. Shapes: x (..., k, ...) -> (..., k, ...), cut as before. Cost: the rows that
    other ranks then hold, about half of the shard. Raises: ShapeError for dims or sizes
    that do not fit. torch: torch.fft.fftshift.

    >>> pmod.simulate(lambda: pmod.fft.fftshift(pmod.fft.fftfreq(5, 1 / 5, axis="x"), axis="x"), x=2)
    [tensor([-2., -1.,  0.]), tensor([1., 2.])]
    """
    return shifted("fftshift", x, dim, axis, in_dim, sizes)


def ifftshift(
    x: Tensor,
    dim: Ints | None = None,
    *,
    axis: AxisLike,
    in_dim: Ints | None = None,
    sizes: Lengths | None = None,
) -> Tensor:
    """The inverse of `fftshift`: move the zero frequency to the front, on shards.

    V -> V. Shapes: x (..., k, ...) -> (..., k, ...), cut as before. Cost, Raises: as
    `fftshift`. torch: torch.fft.ifftshift.

    >>> def there_and_back():
    ...     x = pmod.shard(torch.arange(5), "x")
    ...     return pmod.fft.ifftshift(pmod.fft.fftshift(x, axis="x"), axis="x")
    >>> pmod.simulate(there_and_back, x=2)
    [tensor([0, 1, 2]), tensor([3, 4])]
    """
    return shifted("ifftshift", x, dim, axis, in_dim, sizes)
