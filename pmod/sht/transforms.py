"""The four transforms: scalar and vector, forward and inverse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pmod._collectives.cuts import axes_by_dim, by_dim
from pmod._collectives.exchange import held_lengths
from pmod._collectives.slices import ALL_TO_ALL, Exchange
from pmod._collectives.spectrum import Cut, transform
from pmod._core.arguments import (
    as_int,
    as_ints,
    check_flag,
    check_own_size,
    check_sizes,
    check_tensor,
    dim_from_end,
    shares,
    wrong,
)
from pmod._core.bind import bind
from pmod._errors import ArgumentError, ShapeError, near_miss, quoted
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import AxisLike
from pmod.sht.tables import NORMS, Table, check_count, check_grid, tensor_of

Axes = AxisLike | Mapping[int, AxisLike]
Sizes = Sequence[int] | Mapping[int, Sequence[int] | None]

_RIGHT = "Pass the lengths that the ranks hold, or leave sizes out to exchange them."


def sht(
    x: Tensor,
    *,
    axis: Axes,
    lmax: int | None = None,
    mmax: int | None = None,
    grid: str = "equiangular",
    norm: str = "ortho",
    csphase: bool = True,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return the spherical harmonic coefficients of a real field.

    V -> V. Shapes: x (..., lat, lon), the whole (..., nlat, nlon) -> complex (..., l,
    m), the whole (..., lmax, mmax). lmax: by default what the grid integrates exactly:
    nlat of "legendre-gauss", nlat - 1 of "lobatto", half of the others; it and mmax are
    both the smaller of the two, and at most nlon // 2 + 1.
    Cost: along the longitudes' axis two exchanges, of the shard and of its modes; along
    the latitudes' two, of the modes and of the coefficients.
    Raises: ShapeError for dims, lengths or sizes that do not fit; ArgumentError for x
    that is complex or of 16 bits, another grid or norm.

    >>> modes = pmod.simulate(lambda: pmod.sht.sht(torch.ones(3, 4), axis={-1: "lon"}), lon=2)
    >>> modes[0].real.round(decimals=4)
    tensor([[3.5449],
            [0.0000]])
    """
    return _forward("sht.sht", x, axis, lmax, mmax, _Kind(grid, norm, csphase), sizes)


def isht(
    x: Tensor,
    s: Sequence[int],
    *,
    axis: Axes,
    grid: str = "equiangular",
    norm: str = "ortho",
    csphase: bool = True,
    sizes: Sizes | None = None,
) -> Tensor:
    """The inverse of `sht`: return the real field of spherical harmonic coefficients.

    V -> V. Shapes: x complex (..., l, m), the whole (..., lmax, mmax) -> (..., lat,
    lon), the whole (..., nlat, nlon), which is s.
    Cost: as `sht`, the other way. Raises: as `sht`; ArgumentError for x that is real.

    >>> def there_and_back():
    ...     x = pmod.shard(torch.arange(3.0)[:, None].expand(3, 6), "lat")
    ...     modes = pmod.sht.sht(x, axis="lat", grid="legendre-gauss")
    ...     return pmod.sht.isht(modes, (3, 6), axis="lat", grid="legendre-gauss")[:, 0].round().long()
    >>> pmod.simulate(there_and_back, lat=2)
    [tensor([0, 1]), tensor([2])]
    """
    return _inverse("sht.isht", x, s, axis, _Kind(grid, norm, csphase), sizes)


def vsht(
    x: Tensor,
    *,
    axis: Axes,
    lmax: int | None = None,
    mmax: int | None = None,
    grid: str = "equiangular",
    norm: str = "ortho",
    csphase: bool = True,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return the coefficients of a tangential field: spheroidal and toroidal.

    V -> V. Shapes: x (..., 2, lat, lon), along colatitude and longitude -> complex
    (..., 2, l, m). All else is as in `sht`, vorticity and divergence of the field being
    l (l + 1) times the coefficients.
    Cost, Raises: as `sht`.

    >>> pmod.simulate(lambda: pmod.sht.vsht(torch.ones(2, 4, 4), axis={-1: "lon"}).shape, lon=2)
    [torch.Size([2, 2, 1]), torch.Size([2, 2, 1])]
    """
    kind = _Kind(grid, norm, csphase, vector=True)
    return _forward("sht.vsht", x, axis, lmax, mmax, kind, sizes)


def ivsht(
    x: Tensor,
    s: Sequence[int],
    *,
    axis: Axes,
    grid: str = "equiangular",
    norm: str = "ortho",
    csphase: bool = True,
    sizes: Sizes | None = None,
) -> Tensor:
    """The inverse of `vsht`: return the field of spheroidal and toroidal coefficients.

    V -> V. Shapes: x complex (..., 2, l, m) -> (..., 2, lat, lon), the whole (..., 2,
    nlat, nlon), s being (nlat, nlon).
    Cost, Raises: as `isht`.

    >>> modes = torch.zeros(2, 2, 1, dtype=torch.complex64)
    >>> pmod.simulate(lambda: pmod.sht.ivsht(modes, (4, 4), axis={-1: "lon"}).shape, lon=2)
    [torch.Size([2, 4, 2]), torch.Size([2, 4, 2])]
    """
    kind = _Kind(grid, norm, csphase, vector=True)
    return _inverse("sht.ivsht", x, s, axis, kind, sizes)


# --- what is given --------------------------------------------------------------------


class _Kind(NamedTuple):
    grid: str
    norm: str
    csphase: bool
    vector: bool = False


class _Side(NamedTuple):
    """One of the two dims of x: what cuts it, and the lengths of the shards."""

    over: AxisLike | None
    axis: Axis | None
    sizes: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        """Whether one rank holds all of it."""
        return self.axis is None or self.axis.size == 1

    @property
    def whole(self) -> int:
        """The length of the whole."""
        return sum(self.sizes)

    def cut(self, length: int) -> tuple[int, ...]:
        """Return how the result of this length is cut."""
        return (length,) if self.axis is None else shares(length, self.axis)

    def place(self, sizes: tuple[int, ...]) -> tuple[int, int]:
        """Return the first and the end of this rank's part."""
        index = 0 if self.axis is None else self.axis.index
        start = sum(sizes[:index])
        return start, start + sizes[index]


def _check(x: Tensor, kind: _Kind, inverse: bool, function: str, axis: Axis) -> None:
    """Raise if x or an option is not of its kind."""
    check_tensor(x, function, axis)
    least = 3 if kind.vector else 2
    if x.dim() < least or (kind.vector and x.shape[-3] != 2):
        of = "(..., 2, l, m)" if inverse else "(..., 2, lat, lon)"
        right = of if kind.vector else of.replace(" 2,", "")
        given = f"x has the shape {tuple(x.shape)}"
        raise wrong(ShapeError, function, axis, given, f"Pass {right}.")
    dtypes = (torch.float32, torch.float64)
    if inverse:
        dtypes = (torch.complex64, torch.complex128)
    if x.dtype not in dtypes:
        given = f"x is {str(x.dtype).removeprefix('torch.')}"
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise wrong(ArgumentError, function, axis, given, f"Pass {names}.")
    check_grid(kind.grid, function)
    norm = kind.norm
    if not isinstance(norm, str) or norm not in NORMS:  # pyright: ignore[reportUnnecessaryIsInstance]
        given = f"norm is {quoted(kind.norm)}{near_miss(kind.norm, NORMS)}"
        right = f"Pass one of {', '.join(map(repr, NORMS))}."
        raise wrong(ArgumentError, function, axis, given, right)
    check_flag(kind.csphase, function, "csphase")


def _sides(
    x: Tensor,
    axis: Axes,
    bound: list[tuple[Any, Axis]],
    sizes: Sizes | None,
    function: str,
) -> tuple[_Side, _Side]:
    """Return the two dims of x; what is wrong raises before lengths are exchanged."""
    told = by_dim(function, sizes, "sizes", axis, bound)
    given: dict[int, tuple[AxisLike, Axis, Sizes | None]] = {}
    for (dim, of), lengths in zip(bound, told, strict=True):
        at = dim_from_end(dim, x, function, of, name="axis")
        if at < -2 or at in given:
            text = f"axis names dim {quoted(dim)}"
            right = "Name the last two dims, -2 and -1, each once."
            raise wrong(ShapeError, function, of, text, right)
        if lengths is not None:
            lengths = check_sizes(lengths, function, of)
            check_own_size(x, at, lengths, function, of, _RIGHT)
        over = axis[dim] if isinstance(axis, Mapping) else axis
        given[at] = (over, of, lengths)
    sides: list[_Side] = []
    for at in (-2, -1):
        side = _Side(None, None, (int(x.shape[at]),))
        if at in given:
            over, of, lengths = given[at]
            held: Any = lengths
            if lengths is None:
                held = held_lengths([(x, at)], function, of)[0]
            side = _Side(over, of, held)
        sides.append(side)
    return sides[0], sides[1]


def _counts(
    lmax: object, mmax: object, function: str, axis: Axis
) -> tuple[int | None, int | None]:
    """Return the numbers of degrees and orders that were asked for."""
    found: list[int | None] = []
    for name, given in (("lmax", lmax), ("mmax", mmax)):
        count = as_int(given)
        if given is not None and (count is None or count < 1):
            text = f"{name} is {quoted(given)}"
            raise wrong(ShapeError, function, axis, text, "Pass an int of 1 or more.")
        found.append(count)
    return found[0], found[1]


def _degrees(
    nlat: int,
    nlon: int,
    asked: tuple[int | None, int | None],
    grid: str,
    function: str,
    axis: Axis,
) -> int:
    """Return the number of degrees, which is that of the orders."""
    exact = {
        "legendre-gauss": nlat,
        "lobatto": nlat - 1,
        "equiangular": (nlat + 1) // 2,
    }
    lmax, mmax = asked
    most = nlon // 2 + 1
    count = min(lmax or exact[grid], mmax or most)
    if count > most:
        given = (
            f"lmax and mmax ask for {count} orders and {nlon} longitudes have {most}"
        )
        raise wrong(ShapeError, function, axis, given, "Pass an mmax of at most that.")
    return count


def _check_field(nlat: int, nlon: int, grid: str, function: str, axis: Axis) -> None:
    check_count(nlat, grid, function)
    if nlon < 1:
        given = f"there are {nlon} longitudes"
        raise wrong(ShapeError, function, axis, given, "A field has 1 or more.")


# --- what is done ---------------------------------------------------------------------


def _over(
    side: _Side, before: int, after: int, held: Any, cut: Any, x: Tensor
) -> Tensor:
    """Exchange: dim `before`, cut as `held`, becomes whole, and `after` is cut as `cut`."""
    if side.axis is None or side.is_whole:
        return x
    return bind(ALL_TO_ALL.along(side.axis, Exchange(after, before, cut, held)), [x])[0]


def _real(x: Tensor) -> Tensor:
    """Return the real and imaginary parts, in a dim at the end."""
    if x.numel():
        return torch.view_as_real(x.resolve_conj())
    # backward of a view finds fault with the strides of an empty gradient
    return torch.stack([x.real, x.imag], -1)


def _complex(parts: Tensor) -> Tensor:
    """Return the numbers whose real and imaginary parts are in the last dim."""
    if parts.numel():
        return torch.view_as_complex(parts.contiguous())
    return torch.complex(*parts.unbind(-1))


def _sums(x: Tensor, kind: _Kind, table: Table) -> Tensor:
    """Multiply by the Legendre functions, and sum over the dim before the last."""
    lead, (rows, orders) = x.shape[:-2], x.shape[-2:]
    many = lead.numel()
    # orders are apart; real and imaginary parts are rows of one product, whose sums run
    # over what lies side by side in memory
    real = _real(x)
    factors = tensor_of(table, real)
    real = real.reshape(many, rows, orders, 2)
    real = real.permute(2, 0, 3, 1).reshape(orders, 2 * many, rows)

    def product(of: Tensor) -> Tensor:
        y = torch.bmm(real, of).view(orders, many, 2, of.shape[-1])
        y = _complex(y.permute(1, 3, 0, 2))
        return y.reshape(*lead, of.shape[-1], orders)

    if not kind.vector:
        return product(factors[0])
    slopes, multiples = product(factors[0]), product(factors[1])
    (a, b), (c, d) = slopes.unbind(-3), multiples.unbind(-3)
    return torch.stack([a + 1j * d, 1j * c - b], -3)


def _forward(
    function: str,
    x: Tensor,
    axis: Axes,
    lmax: object,
    mmax: object,
    kind: _Kind,
    sizes: Sizes | None,
) -> Tensor:
    bound = axes_by_dim(function, axis, None, -2)
    first = bound[0][1]
    _check(x, kind, False, function, first)
    asked = _counts(lmax, mmax, function, first)
    lat, lon = _sides(x, axis, bound, sizes, function)
    _check_field(lat.whole, lon.whole, kind.grid, function, first)
    count = _degrees(lat.whole, lon.whole, asked, kind.grid, function, first)
    if not lon.is_whole:
        assert lon.over is not None
        cut = Cut(lon.over, -1, -1, lon.sizes, count)
        x = transform("rfft", x, None, -1, "forward", cut)
    elif x.numel():
        x = torch.fft.rfft(x, dim=-1, norm="forward").narrow(-1, 0, count)
    else:
        # MKL refuses an empty tensor; this one keeps the derivative
        x = F.pad(x, [0, count - lon.whole])
        x = torch.complex(x, torch.zeros_like(x))
    # orders of this rank along the longitudes' axis, and some of these along the other
    start, end = lon.place(lon.cut(count))
    some = lat.cut(end - start)
    low, high = lat.place(some)
    table = Table(
        lat.whole, kind.grid, count, start + low, start + high, kind.norm,
        bool(kind.csphase), kind.vector, inverse=False,
    )  # fmt: skip
    x = _over(lat, -2, -1, lat.sizes, some, x)
    x = _sums(x, kind, table)
    return _over(lat, -1, -2, some, lat.cut(count), x)


def _inverse(
    function: str, x: Tensor, s: object, axis: Axes, kind: _Kind, sizes: Sizes | None
) -> Tensor:
    bound = axes_by_dim(function, axis, None, -2)
    first = bound[0][1]
    _check(x, kind, True, function, first)
    shape = as_ints(s)
    if shape is None or len(shape) != 2:
        given = f"s is {quoted(s)}"
        raise wrong(ShapeError, function, first, given, "Pass (nlat, nlon).")
    nlat, nlon = shape
    _check_field(nlat, nlon, kind.grid, function, first)
    lat, lon = _sides(x, axis, bound, sizes, function)
    count = lat.whole
    if count != lon.whole or not 1 <= count <= nlon // 2 + 1:
        given = f"x has {count} degrees and {lon.whole} orders"
        right = f"Pass as many of both, as `sht` gives, from 1 to {nlon // 2 + 1}."
        raise wrong(ShapeError, function, first, given, right)
    start, end = lon.place(lon.sizes)
    some = lat.cut(end - start)
    low, high = lat.place(some)
    table = Table(
        nlat, kind.grid, count, start + low, start + high, kind.norm,
        bool(kind.csphase), kind.vector, inverse=True,
    )  # fmt: skip
    x = _over(lat, -2, -1, lat.sizes, some, x)
    x = _sums(x, kind, table)
    x = _over(lat, -1, -2, some, lat.cut(nlat), x)
    if not lon.is_whole:
        assert lon.over is not None
        cut = Cut(lon.over, -1, -1, lon.sizes, count)
        return transform("irfft", x, nlon, -1, "forward", cut)
    if x.numel():
        return torch.fft.irfft(x, n=nlon, dim=-1, norm="forward")
    return F.pad(x.real, [0, nlon - count])
