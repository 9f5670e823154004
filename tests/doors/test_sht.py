"""`pmod.sht`: torch-harmonics' numbers, and those of one process however the field is cut, to second order."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import pmod
from pmod.sht import latitudes
from tests.lib import spmd
from tests.lib.sht_table import PATH, entries, field, name

Tensor = torch.Tensor
BOTH = {-2: "lat", -1: "lon"}


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    with np.load(PATH) as file:
        return dict(file)


def alone(call: Callable[[], Any]) -> Any:
    return pmod.simulate(call, lat=1, lon=1)[0]


def all_four(x: Tensor, nlat: int, nlon: int, lmax: int | None, **options: Any) -> tuple[Tensor, Tensor]:
    """Of a scalar and a vector one after the other: the coefficients, and the fields that come back."""
    modes = [
        pmod.sht.sht(x[:1], axis=BOTH, lmax=lmax, **options),
        pmod.sht.vsht(x[1:], axis=BOTH, lmax=lmax, **options),
    ]
    back = [
        pmod.sht.isht(modes[0], (nlat, nlon), axis=BOTH, **options),
        pmod.sht.ivsht(modes[1], (nlat, nlon), axis=BOTH, **options),
    ]
    return torch.cat(modes), torch.cat(back)


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: name(*entry))
def test_numbers_of_torch_harmonics(entry: Any, table: dict[str, Any]) -> None:
    grid, norm, csphase, nlat, nlon, lmax = entry
    options = {"grid": grid, "norm": norm, "csphase": csphase}
    modes, back = alone(lambda: all_four(field(nlat, nlon), nlat, nlon, lmax or None, **options))
    np.testing.assert_allclose(modes.numpy(), table[f"{name(*entry)}/modes"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(back.numpy(), table[f"{name(*entry)}/back"], rtol=0, atol=1e-12)


@pytest.fixture
def in_double() -> Iterator[None]:
    """torch-harmonics divides by l (l + 1) in torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("grid", ["equiangular", "legendre-gauss", "lobatto"])
def test_torch_harmonics_itself(grid: str) -> None:
    """More latitudes than a table holds."""
    harmonics = pytest.importorskip("torch_harmonics")
    nlat, nlon = 61, 120
    kinds = ("RealSHT", "InverseRealSHT", "RealVectorSHT", "InverseRealVectorSHT")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the default truncation
        sht, isht, vsht, ivsht = (getattr(harmonics, kind)(nlat, nlon, grid=grid) for kind in kinds)
    x = field(nlat, nlon)
    modes, back = alone(lambda: all_four(x, nlat, nlon, None, grid=grid))
    expected = torch.cat([sht(x[:1]), vsht(x[1:])])
    torch.testing.assert_close(modes, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(back, torch.cat([isht(expected[:1]), ivsht(expected[1:])]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", ["equiangular", "legendre-gauss", "lobatto"])
@pytest.mark.parametrize("nlat", [2, 3, 8, 33])
def test_latitudes(grid: str, nlat: int) -> None:
    """Polynomials of the cosine are integrated exactly, as high as the rule goes."""
    angles, weights = latitudes(nlat, grid)
    assert (angles.diff() > 0).all()
    exact = {"equiangular": nlat - 1, "legendre-gauss": 2 * nlat - 1, "lobatto": 2 * nlat - 3}[grid]
    for power in range(exact + 1):
        value = (weights * angles.cos() ** power).sum().item()
        assert value == pytest.approx((1 + (-1) ** power) / (power + 1), abs=1e-13)


def test_what_the_coefficients_are() -> None:
    """Of a harmonic, 1 in its place; of a gradient and of what turns, spheroidal and toroidal parts alone."""
    theta = latitudes(9, "legendre-gauss")[0][:, None]
    lon = torch.arange(16, dtype=torch.float64) * (2 * math.pi / 16)
    # the harmonic of degree 2 and order 1, with its conjugate
    y = -math.sqrt(15 / (8 * math.pi)) * theta.sin() * theta.cos() * 2 * lon.cos()
    slope = -math.sqrt(15 / (8 * math.pi)) * (2 * theta).cos() * 2 * lon.cos()
    along = math.sqrt(15 / (8 * math.pi)) * theta.cos() * 2 * lon.sin()

    def modes() -> tuple[Tensor, Tensor, Tensor]:
        gradient = torch.stack([slope, along])
        turned = torch.stack([along, -slope])
        options = {"axis": BOTH, "grid": "legendre-gauss"}
        return (
            pmod.sht.sht(y, **options), pmod.sht.vsht(gradient, **options), pmod.sht.vsht(turned, **options)
        )  # fmt: skip

    scalar, gradient, turned = alone(modes)
    one = torch.zeros(9, 9, dtype=torch.complex128)
    one[2, 1] = 1
    torch.testing.assert_close(scalar, one, rtol=0, atol=1e-14)
    torch.testing.assert_close(gradient, torch.stack([one, 0 * one]), rtol=0, atol=1e-14)
    torch.testing.assert_close(turned[0].abs(), 0 * one.abs(), rtol=0, atol=1e-14)
    torch.testing.assert_close(turned[1].abs(), one.abs(), rtol=0, atol=1e-14)


# --- cut fields ---------------------------------------------------------------------------------------------------

# sizes along lat and along lon; None where the dim is whole
CUTS: list[tuple[tuple[int, ...] | None, tuple[int, ...] | None]] = [
    ((4, 3), (5, 4)),
    ((5, 0, 2), (9,)),
    ((7,), (2, 6, 1)),
    ((3, 4), None),
    (None, (0, 9)),
    ((2, 2, 2, 1), None),
    ((1, 6), (4, 5, 0)),
]


def weights_like(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape)


def loss_of(modes: Tensor, back: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """Something not linear of both, so that the second derivative is one."""
    real = torch.view_as_real(modes)
    return ((real * weights[0][..., None]).sin() * real.exp()).sum() + (back * weights[1]).sin().sum()


def derivatives(x: Tensor, transform: Callable[[Tensor], tuple[Tensor, Tensor]], weights: Any, total: Any) -> Any:
    x = x.clone().requires_grad_()
    modes, back = transform(x)
    loss = total(loss_of(modes, back, weights(modes, back)))
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    (bend,) = torch.autograd.grad(total(slope.square().sum()), x)
    return modes, back, loss, slope, bend


def check_cut(grid: str, lats: tuple[int, ...] | None, lons: tuple[int, ...] | None, tell: bool) -> None:
    nlat, nlon, lmax = 7, 9, 4
    x = field(nlat, nlon) / 3
    axis = {dim: name for dim, name, cut in ((-2, "lat", lats), (-1, "lon", lons)) if cut is not None}
    told = {dim: cut for dim, cut in ((-2, lats), (-1, lons)) if cut is not None}

    def part(y: Tensor, cuts: dict[int, Any]) -> Tensor:
        for dim, cut in cuts.items():
            y = y.split(cut, dim)[pmod.axis_index(axis[dim])]
        return y

    def shares(height: int, width: int) -> dict[int, tuple[int, ...]]:
        lengths = {-2: height, -1: width}
        return {dim: pmod.split_sizes(lengths[dim], pmod.axis_size(name)) for dim, name in axis.items()}

    modes_cut, back_cut = shares(lmax, lmax), shares(nlat, nlon)

    def ours(y: Tensor) -> tuple[Tensor, Tensor]:
        options = {"axis": axis, "grid": grid}
        sizes, held = (told, modes_cut) if tell else (None, None)
        modes = torch.cat([
            pmod.sht.sht(y[:1], lmax=lmax, sizes=sizes, **options),
            pmod.sht.vsht(y[1:], lmax=lmax, sizes=sizes, **options),
        ])
        back = torch.cat([
            pmod.sht.isht(modes[:1], (nlat, nlon), sizes=held, **options),
            pmod.sht.ivsht(modes[1:], (nlat, nlon), sizes=held, **options),
        ])
        return modes, back

    def whole(y: Tensor) -> tuple[Tensor, Tensor]:
        one = pmod.current_mesh().split("lat", all=-1, alone=1)["alone"]
        options = {"axis": one, "grid": grid}
        modes = torch.cat([pmod.sht.sht(y[:1], lmax=lmax, **options), pmod.sht.vsht(y[1:], lmax=lmax, **options)])
        back = [pmod.sht.isht(modes[:1], (nlat, nlon), **options), pmod.sht.ivsht(modes[1:], (nlat, nlon), **options)]
        return modes, torch.cat(back)

    def of_whole(modes: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
        return weights_like(torch.empty(3, lmax, lmax)), weights_like(torch.empty(3, nlat, nlon))

    def of_part(modes: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
        of_modes, of_back = of_whole(modes, back)
        return part(of_modes, modes_cut), part(of_back, back_cut)

    found = derivatives(part(x, told), ours, of_part, lambda y: pmod.psum(y, tuple(axis.values())))
    right = derivatives(x, whole, of_whole, lambda y: y)
    cuts = (modes_cut, back_cut, {}, told, told)
    for what, a, b, cut in zip(("modes", "back", "loss", "first", "second"), found, right, cuts, strict=True):
        right = part(b, cut)
        torch.testing.assert_close(a, right, rtol=1e-11, atol=1e-12, msg=lambda text, what=what: f"{what}: {text}")


@pytest.mark.parametrize("tell", [True, False])
@pytest.mark.parametrize(("lats", "lons"), CUTS)
def test_cut_fields(lats: tuple[int, ...] | None, lons: tuple[int, ...] | None, tell: bool) -> None:
    """Values, gradients and second derivatives are those of one process."""
    pmod.simulate(check_cut, "equiangular", lats, lons, tell, lat=len(lats or (1,)), lon=len(lons or (1,)))


@pytest.mark.parametrize("grid", ["legendre-gauss", "lobatto"])
def test_cut_fields_of_other_grids(grid: str) -> None:
    pmod.simulate(check_cut, grid, (3, 4), (2, 7), False, lat=2, lon=2)


def test_on_processes() -> None:
    spmd.launch(check_cut, "equiangular", (4, 3), None, False, lat=2, lon=1)
    spmd.launch(check_cut, "equiangular", None, (5, 4), True, lat=1, lon=2)


def test_float32_and_transforms() -> None:
    """Under vmap and jvp, and in single precision, on processes: simulated ranks would share a transform's levels."""
    def calls() -> None:
        x = field(6, 8)[:2]
        sizes = {-2: (6,), -1: (4, 4)}
        mine = x.split(4, -1)[pmod.axis_index("lon")]

        def f(y: Tensor) -> Tensor:
            return pmod.sht.sht(y, axis=BOTH, sizes=sizes)

        right = f(mine)
        torch.testing.assert_close(f(mine.float()).to(torch.complex128), right, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.vmap(f)(mine), right)
        _, tangent = torch.func.jvp(f, (mine,), (mine.cos(),))
        torch.testing.assert_close(tangent, f(mine.cos()))

    spmd.launch(calls, lat=1, lon=2)


def compiled_on_rank() -> None:
    torch._dynamo.reset()
    x = field(6, 8).split(4, -1)[pmod.axis_index("lon")].clone().requires_grad_()
    sizes = {-2: (6,), -1: (4, 4)}

    def there_and_back(x: Tensor) -> Tensor:
        modes = pmod.sht.vsht(x[1:], axis=BOTH, sizes=sizes)
        return pmod.sht.ivsht(modes, (6, 8), axis=BOTH, sizes={-2: (3,), -1: (2, 1)})

    y, got = there_and_back(x), torch.compile(there_and_back, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, y)
    gradients = [torch.autograd.grad(z.sin().sum(), x)[0] for z in (got, y)]
    torch.testing.assert_close(*gradients)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled() -> None:
    spmd.launch(compiled_on_rank, lat=1, lon=2)


# --- what is wrong ------------------------------------------------------------------------------------------------

X = torch.ones(4, 6)
MODES = torch.ones(2, 2, dtype=torch.complex64)
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a grid": (
        lambda: pmod.sht.sht(X, axis=BOTH, grid="equiangula"), pmod.ArgumentError,
        "grid is 'equiangula'; did you mean 'equiangular'?\nPass one of"),
    "a norm": (
        lambda: pmod.sht.sht(X, axis=BOTH, norm="four"), pmod.ArgumentError, "norm is 'four'.\nPass one of 'ortho', "),
    "a phase": (lambda: pmod.sht.sht(X, axis=BOTH, csphase=1), pmod.ArgumentError, "csphase is 1"),
    "no tensor": (lambda: pmod.sht.sht(3, axis=BOTH), pmod.ArgumentError, "x is a"),
    "one dim": (lambda: pmod.sht.sht(X[0], axis={-1: "lon"}), pmod.ShapeError, "x has the shape (6,).\nPass (..., lat"),
    "no vector": (
        lambda: pmod.sht.vsht(torch.ones(3, 4, 6), axis=BOTH), pmod.ShapeError,
        "x has the shape (3, 4, 6).\nPass (..., 2, lat, lon)."),
    "complex": (lambda: pmod.sht.sht(X.cfloat(), axis=BOTH), pmod.ArgumentError, "x is complex64.\nPass float32 or"),
    "16 bits": (lambda: pmod.sht.sht(X.half(), axis=BOTH), pmod.ArgumentError, "x is float16.\nPass float32 or "),
    "real modes": (
        lambda: pmod.sht.isht(X, (4, 6), axis=BOTH), pmod.ArgumentError, "x is float32.\nPass complex64 or complex128"),
    "another dim": (
        lambda: pmod.sht.sht(torch.ones(2, 4, 6), axis={0: "lat"}), pmod.ShapeError,
        "axis names dim 0.\nName the last two dims, -2 and -1, each once."),
    "a dim twice": (
        lambda: pmod.sht.sht(X, axis={0: "lat", -2: "lon"}), pmod.ShapeError, "Name the last two dims, -2 and -1"),
    "sizes": (
        lambda: pmod.sht.sht(X, axis="lat", sizes=(3, 5)), pmod.ShapeError, "sizes[0] is 3 but x.shape[0] is 4."),
    "degrees": (lambda: pmod.sht.sht(X, axis=BOTH, lmax=0), pmod.ShapeError, "lmax is 0.\nPass an int of 1 or more."),
    "orders": (
        lambda: pmod.sht.sht(X, axis=BOTH, lmax=9, mmax=9), pmod.ShapeError,
        "lmax and mmax ask for 9 orders and 12 longitudes have 7.\nPass an mmax of at most that."),
    "a shape": (lambda: pmod.sht.isht(MODES, 4, axis=BOTH), pmod.ShapeError, "s is 4.\nPass (nlat, nlon)."),
    "few latitudes": (
        lambda: pmod.sht.isht(MODES, (1, 8), axis=BOTH), pmod.ShapeError, "nlat is 1.\nA equiangular grid has 2"),
    "unlike lengths": (
        lambda: pmod.sht.isht(MODES[:1], (8, 8), axis=BOTH), pmod.ShapeError, "x has 2 degrees and 4 orders.\nPass as"),
    "no latitudes": (lambda: latitudes(0, "legendre-gauss"), pmod.ShapeError, "sht.latitudes: nlat is 0.\nA legendre"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong(what: str) -> None:
    call, error, text = WRONG[what]

    def calls() -> str:
        with pytest.raises(error) as raised:
            call()
        return str(raised.value)

    assert re.search(re.escape(text), pmod.simulate(calls, lat=2, lon=2)[0])
