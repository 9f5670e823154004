"""The transforms of torch.fft that take and give spectra: fft, rfft, and their kin."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pmod._collectives.spectrum import (
    Cut,
    Ints,
    Lengths,
    Some,
    transform,
)
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
