"""Transforms of Hermitian signals: torch.fft's hfft and its kin, on shards."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pmod._collectives.spectrum import Cut, Ints, Lengths, Some, hermitian
from pmod._mesh.mesh import AxisLike


def hfft(
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
    """Return the real transform of a half Hermitian signal: torch.fft.hfft on shards.

    It is `irfft` of the conjugate, with the norms the other way round.

    V -> V. Shapes: x (..., k, ...), half of a whole (..., m, ...) -> the shard of (...,
    n, ...), real; n is 2 * (m - 1) by default.
    Cost, Raises: as `irfft`.

    >>> pmod.simulate(lambda: pmod.fft.hfft(pmod.shard(torch.tensor([2.0, 1.0, 0.0]), "x"), axis="x"), x=2)
    [tensor([4., 2.]), tensor([0., 2.])]
    """
    return hermitian("hfft", x, n, dim, norm, Cut(axis, in_dim, out_dim, sizes, modes))


def ihfft(
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
    """The inverse of `hfft`: torch.fft.ihfft on shards.

    It is the conjugate of `rfft`, with the norms the other way round.

    V -> V. Shapes: x (..., k, ...) real, the whole (..., m, ...) -> the shard of (...,
    n // 2 + 1, ...), n being m by default.
    Cost, Raises: as `rfft`.

    >>> pmod.simulate(lambda: pmod.fft.ihfft(pmod.shard(torch.ones(4), "x"), axis="x").abs(), x=2)
    [tensor([1., 0.]), tensor([0.])]
    """
    return hermitian("ihfft", x, n, dim, norm, Cut(axis, in_dim, out_dim, sizes, modes))


def hfft2(
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
    """Return the real transform of a field of half Hermitian rows: torch.fft.hfft2.

    V -> V. Shapes: as `irfft2`, cut as there. Cost, Raises: as `irfft2`.

    >>> pmod.simulate(lambda: pmod.fft.hfft2(torch.ones(2, 1), s=(2, 2), axis="x"), x=2)[0]
    tensor([[4., 0.]])
    """
    return hermitian("hfft2", x, s, dim, norm, Cut(axis, in_dim, out_dim, sizes, modes))


def ihfft2(
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
    """The inverse of `hfft2`: torch.fft.ihfft2 on shards.

    V -> V. Shapes: as `rfft2`, cut as there. Cost, Raises: as `rfft2`.

    >>> pmod.simulate(lambda: pmod.fft.ihfft2(torch.ones(1, 2), axis="x").abs(), x=2)[0]
    tensor([[1.],
            [0.]])
    """
    return hermitian(
        "ihfft2", x, s, dim, norm, Cut(axis, in_dim, out_dim, sizes, modes)
    )


def hfftn(
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
    """Return the real transform of a half Hermitian field: torch.fft.hfftn on shards.

    V -> V. Shapes: as `irfftn`, cut as there. Cost, Raises: as `irfftn`.

    >>> pmod.simulate(lambda: pmod.fft.hfftn(torch.ones(2, 1), s=(2, 2), axis="x"), x=2)[1]
    tensor([[0., 0.]])
    """
    return hermitian("hfftn", x, s, dim, norm, Cut(axis, in_dim, out_dim, sizes, modes))


def ihfftn(
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
    """The inverse of `hfftn`: torch.fft.ihfftn on shards.

    V -> V. Shapes: as `rfftn`, cut as there. Cost, Raises: as `rfftn`.

    >>> pmod.simulate(lambda: pmod.fft.ihfftn(torch.ones(1, 2), axis="x").abs(), x=2)[1]
    tensor([[0.],
            [0.]])
    """
    return hermitian(
        "ihfftn", x, s, dim, norm, Cut(axis, in_dim, out_dim, sizes, modes)
    )
