"""`python -m pmod.demo`: the solver against other solvers, the model over a mesh against one process, the command."""

from __future__ import annotations

import copy
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch

import pmod
from pmod import _console as console
from pmod._wire import base
from pmod.demo import compare, darcy, fno, parallel, picture, serial
from pmod.demo.__main__ import main
from pmod.demo.darcy import (
    Fields,
    conductances,
    outflow,
    permeability,
    random_fields,
    solve,
)
from pmod.demo.options import Options, check_fit, local_sizes, parse
from pmod.demo.training import Run, Scale, batches
from tests.lib.commands import check_refused

ROOT = Path(pmod.__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


def rough(count: int, n: int, seed: int = 0) -> torch.Tensor:
    """Permeabilities between 1 and 100 without any order."""
    generator = torch.Generator().manual_seed(seed)
    return 100 ** torch.rand(count, n, n, dtype=torch.float64, generator=generator)


def media(count: int, n: int, seed: int = 0) -> torch.Tensor:
    return random_fields(count, n, torch.Generator().manual_seed(seed)) > 0


# --- the solver ------------------------------------------------------------------------------------------------------


def system_of(a: np.ndarray) -> scipy.sparse.csc_matrix:
    """The finite-volume system, cell by cell and face by face."""
    n = len(a)
    matrix = scipy.sparse.lil_matrix((n * n, n * n))
    for i in range(n):
        for j in range(n):
            for k, m in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
                here, there = i * n + j, k * n + m
                if 0 <= k < n and 0 <= m < n:
                    through = 1 / (0.5 / a[i, j] + 0.5 / a[k, m])  # two half cells in series
                    matrix[here, there] -= through
                else:
                    through = 1 / (0.5 / a[i, j])
                matrix[here, here] += through
    return matrix.tocsc()


@pytest.mark.parametrize("n", [1, 2, 7, 12])
def test_the_solver_agrees_with_a_direct_solve_of_the_system(n):
    a = rough(3, n)
    f = torch.randn(3, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = solve(a, f)
    for one, right, u in zip(a, f, got, strict=True):
        wanted = scipy.sparse.linalg.spsolve(system_of(one.numpy()), right.numpy().ravel() / n**2)
        np.testing.assert_allclose(u.numpy().ravel(), wanted, rtol=0, atol=1e-7 * abs(wanted).max())


def test_the_solver_converges_at_second_order_to_a_manufactured_solution():
    errors = []
    for n in (8, 16, 32, 64):
        t = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        x, y = torch.meshgrid(t, t, indexing="ij")
        a = torch.exp(x + 2 * y)
        sx, sy, cx, cy = (g(math.pi * v) for g in (torch.sin, torch.cos) for v in (x, y))
        f = a * (2 * math.pi**2 * sx * sy - math.pi * (cx * sy + 2 * sx * cy))  # -div(a grad(sin sin))
        errors.append((solve(a[None], f[None])[0] - sx * sy).square().mean().sqrt().item())
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(1.85 < order < 2.15 for order in orders), (errors, orders)


def test_the_system_is_symmetric_and_positive():
    a = rough(2, 9)
    p, q = torch.randn(2, 2, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    faces = conductances(a)
    torch.testing.assert_close((outflow(faces, p) * q).sum(), (p * outflow(faces, q)).sum(), rtol=1e-12, atol=0)
    assert (outflow(faces, p) * p).sum() > 0


def test_the_pressure_obeys_the_maximum_principle():
    a, f = rough(1, 10), torch.zeros(1, 10, 10, dtype=torch.float64)
    f[0, 3, 6] = 1  # a single source: u is positive, and largest there
    u = solve(a, f)
    assert u.min() > 0
    assert u.argmax() == 3 * 10 + 6


def test_the_pressure_follows_the_symmetries_of_the_square_and_scales():
    a = rough(2, 8)
    u = solve(a)
    torch.testing.assert_close(solve(a.mT), u.mT)
    torch.testing.assert_close(solve(a.flip(-1)), u.flip(-1))
    torch.testing.assert_close(solve(a.rot90(1, (1, 2))), u.rot90(1, (1, 2)))
    torch.testing.assert_close(solve(4 * a, 2.0), u / 2)


def test_the_number_of_steps_does_not_grow_with_the_grid(monkeypatch):
    monkeypatch.setattr(darcy, "_ITERATIONS", 30)  # contrast 4: each step cuts the error by 3
    for n in (8, 64):
        solve(permeability(media(2, n)))
    monkeypatch.setattr(darcy, "_ITERATIONS", 5)
    with pytest.raises(pmod.PmodError, match=r"^pmod.demo: after 5 steps a Darcy problem has a residual of \d"):
        solve(permeability(media(2, 64)))


def test_uniform_media_and_problems_without_a_source_need_no_special_case():
    a = torch.ones(2, 6, 6, dtype=torch.float64)
    f = torch.ones_like(a)
    f[1] = 0
    u = solve(a, f)
    assert not u[1].any()
    wanted = scipy.sparse.linalg.spsolve(system_of(a[0].numpy()), np.full(36, 1 / 36))
    np.testing.assert_allclose(u[0].numpy().ravel(), wanted, rtol=1e-9)


def test_random_fields_have_the_covariance_that_they_are_named_for():
    n, count = 12, 4000
    fields = random_fields(count, n, torch.Generator().manual_seed(3))
    assert fields.mean((1, 2)).abs().max() < 1e-12  # the constant mode is left out
    k = torch.arange(n)
    modes = (fields.mean(0).abs() / fields.std(0)).max() * count**0.5
    assert modes < 5  # mean 0 everywhere, to the accuracy of the sample
    for p, q in ((1, 0), (0, 2), (3, 1)):
        wave = torch.cos(math.pi * p * (k + 0.5) / n)[:, None] * torch.cos(math.pi * q * (k + 0.5) / n)
        wave = wave.double() / wave.double().square().mean().sqrt()
        wanted = 3 / (math.pi**2 * (p**2 + q**2) + 9)
        assert (fields * wave).mean((1, 2)).std().item() == pytest.approx(wanted, rel=0.05)
    assert (fields > 0).double().mean().item() == pytest.approx(0.5, abs=0.02)


def test_a_seed_gives_the_same_media_again_and_another_seed_others():
    assert torch.equal(media(3, 8, seed=1), media(3, 8, seed=1))
    assert not torch.equal(media(3, 8, seed=1), media(3, 8, seed=2))


def test_ranks_solve_their_share_and_all_get_all():
    x = media(7, 8)
    whole = solve(permeability(x)).float()
    for got in pmod.simulate(lambda: darcy.solve_together(x, quiet=True), data=2, space=2):
        torch.testing.assert_close(got, whole, rtol=1e-6, atol=0)


# --- the model over a mesh, and in one process -----------------------------------------------------------------------


def models(modes: int, dtype: torch.dtype = torch.float64) -> tuple[fno.FNO, serial.SerialFNO]:
    torch.manual_seed(0)
    ours, plain = fno.FNO(5, modes, 2).to(dtype), serial.SerialFNO(5, modes, 2).to(dtype)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def on_a_rank(ours: fno.FNO, a: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, float, list[torch.Tensor]]:
    """This rank's part of what is whole: the prediction joined again, the loss, the gradients."""
    ours = copy.deepcopy(ours)  # functional_call puts the rank's parameters into the module for a while
    problems, height = a.shape[:2]
    a, y = pmod.shard(pmod.shard((a, y), "space", dim=1), "data")
    value = fno.loss(ours, a, y, height)
    gradients = torch.autograd.grad(value, list(ours.parameters()))
    whole = pmod.unshard(ours(a, height).detach(), "space", dim=1, length=height)
    return pmod.unshard(whole, "data", length=problems), value.item(), list(gradients)


@pytest.mark.parametrize(
    ("axis_sizes", "height", "width", "modes"),
    [
        ({"data": 1, "space": 1}, 8, 8, 3),
        ({"data": 1, "space": 2}, 8, 8, 4),
        ({"data": 2, "space": 2}, 7, 9, 3),
        ({"data": 1, "space": 4}, 9, 10, 4),  # rows 3, 3, 3, 0
        ({"data": 2, "space": 3}, 11, 8, 4),  # modes 2, 2, 0; rows 4, 4, 3
        ({"data": 1, "space": 3}, 85, 85, 4),
        ({"data": 1, "space": 7}, 5, 5, 1),  # more ranks than rows, and than modes
    ],
)
def test_value_and_gradient_are_those_of_one_process(axis_sizes, height, width, modes):
    ours, plain = models(modes)
    a, y = torch.randn(2, 4, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    prediction = plain(a)
    value = serial.relative_errors(prediction, y).mean()
    gradients = torch.autograd.grad(value, list(plain.parameters()))
    for got, loss, ranks_gradients in pmod.simulate(on_a_rank, ours, a, y, **axis_sizes):
        torch.testing.assert_close(got, prediction.detach(), rtol=0, atol=1e-10)
        assert loss == pytest.approx(value.item(), rel=0, abs=1e-10)
        for ranks_own, wanted in zip(ranks_gradients, gradients, strict=True):
            assert wanted.abs().max() > 1e-6
            torch.testing.assert_close(ranks_own, wanted, rtol=0, atol=1e-10)


def test_the_serial_model_multiplies_the_modes_it_says():
    layer = serial.Spectral(1, 2).double()
    weight = torch.randn(4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))  # 0, 1, -2, -1
    layer.load_state_dict({"weight": weight[:, :, None, None]})
    t = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
    for p, q in ((0, 1), (1, 1), (-1, 1), (-2, 1), (2, 1), (0, 2)):  # frequency along rows, along columns
        wave = torch.exp(1j * (p * t[:, None] + q * t))
        kept = -2 <= p < 2 and q < 2
        wanted = wave * (torch.view_as_complex(weight)[p % 4, q] if kept else 0)
        torch.testing.assert_close(layer(wave.real[None, None])[0, 0], wanted.real, rtol=0, atol=1e-12)


def test_gradients_arrive_in_one_message(monkeypatch):
    sent: list[int] = []
    all_reduce = base.Wire.all_reduce

    def counted(self: base.Wire, x: torch.Tensor, *rest: object) -> object:
        if self.size == 4 and self.index == 0:  # the axis ("data", "space")
            sent.append(x.numel())
        return all_reduce(self, x, *rest)

    monkeypatch.setattr(base.Wire, "all_reduce", counted)
    ours, _ = models(3)
    pmod.simulate(on_a_rank, ours, *torch.randn(2, 4, 8, 8, dtype=torch.float64), data=2, space=2)
    assert sent == [sum(parameter.numel() for parameter in ours.parameters())]


def test_only_the_kept_modes_are_sent():
    layer = fno.SpectralConv(5, 3)  # of 33 columns in Fourier space 3 are kept, 2 on rank 0 and 1 on rank 1

    def sent() -> list[int]:
        with pmod.trace() as t:
            assert layer(torch.randn(4, 5, 4, 64), 8).shape == (4, 5, 4, 64)
        return [event.nbytes for event in t.events]

    column = 4 * 5 * 4 * 8  # batch, channels, rows of a rank, complex64
    assert pmod.simulate(sent, space=2) == [[column, 2 * column], [2 * column, column]]


def tiny(**changes: object) -> Options:
    return Options(**{"channels": 4, "modes": 2, "layers": 2, "batch": 4, "steps": 5, "float64": True, **changes})


def published(n: int, train: int = 9, test: int = 5) -> tuple[Fields, Fields]:
    x = media(train + test, n)
    fields = Fields(x, solve(permeability(x)).float())
    return fields[:train], fields[train:]


@pytest.mark.parametrize("axis_sizes", [{"data": 2, "space": 2}, {"data": 4, "space": 3}])
def test_training_follows_one_process(axis_sizes):  # 4 ranks share 5 problems to test on: 2, 2, 1, 0
    data, options = published(7), tiny()
    first, *others = pmod.simulate(parallel.train, options, data, **axis_sizes)
    assert set(others) == {None}  # rank 0 has the outcome
    assert torch.equal(first.train.x, torch.cat([data[0].x, data[0].x.mT]))  # mirror images are problems, too
    assert torch.equal(first.train.y, torch.cat([data[0].y, data[0].y.mT]))
    other = serial.train(options, first.train, data[1], first.weights)
    assert len(first.run.losses) == 5 and first.run.losses.dtype == torch.float64
    assert first.run.losses[0] != first.run.losses[-1]
    torch.testing.assert_close(first.run.losses, other.losses, rtol=0, atol=1e-12)
    torch.testing.assert_close(first.run.prediction, other.prediction, rtol=0, atol=1e-12)
    assert first.run.errors == pytest.approx(other.errors, rel=0, abs=1e-12)
    assert list(first.run.errors) == [1, 2, 3, 4, 5]
    truth = data[1].y.double()
    by_hand = (other.prediction - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
    assert first.run.error == pytest.approx(by_hand.mean().item(), rel=1e-12)


def test_problems_are_made_as_asked(capsys):
    options = Options(size=8, train=3, test=2)
    for train, test in pmod.simulate(lambda: parallel.make_problems(options, quiet=True), data=1, space=2):
        assert (train.x.shape, test.x.shape) == ((3, 8, 8), (2, 8, 8))
        assert train.x.dtype == torch.bool and train.y.dtype == torch.float32
        torch.testing.assert_close(test.y, solve(permeability(test.x)).float(), rtol=1e-6, atol=0)
    assert capsys.readouterr().out == ""


def test_scale_and_batches():
    train, _ = published(6)
    x, y = Scale.of(train).apply(train, torch.float64)
    for v in (x, y):
        assert v.mean().item() == pytest.approx(0, abs=1e-12) and v.std().item() == pytest.approx(1)
    torch.testing.assert_close(Scale.of(train).undo(y), train.y.double())
    stream = batches(7, 3, seed=0)
    rounds = [torch.cat([next(stream), next(stream)]).tolist() for _ in range(3)]
    assert all(len(set(one)) == 6 and set(one) <= set(range(7)) for one in rounds)
    assert rounds[0] != rounds[1]
    assert torch.equal(next(batches(7, 3, seed=0)), torch.tensor(rounds[0][:3]))


# --- the published format --------------------------------------------------------------------------------------------


def save(path: Path, fields: Fields) -> Path:
    torch.save({"x": fields.x, "y": fields.y}, path)
    return path


def test_the_published_format_is_read(tmp_path):
    fields, _ = published(6)
    got = darcy.read(save(tmp_path / "train.pt", fields))
    assert torch.equal(got.x, fields.x) and torch.equal(got.y, fields.y) and len(got[:2]) == 2


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (None, "No such file"),
        (b"no archive", "cannot use"),
        ([1, 2], "it holds no dict with 'x' and 'y'"),
        ({"x": torch.ones(2, 3, 3)}, "it holds no dict with 'x' and 'y'"),
        ({"x": torch.ones(2, 3, 3) > 0, "y": torch.ones(3, 3)}, r"x is \(2, 3, 3\) and y is \(3, 3\)"),
        ({"x": torch.ones(2, 3, 3) > 0, "y": [1]}, r"x is \(2, 3, 3\) and y is list"),
        ({"x": torch.ones(2, 3, 4) > 0, "y": torch.ones(2, 3, 4)}, r"x is \(2, 3, 4\) and y is \(2, 3, 4\)"),
        ({"x": torch.ones(2, 3, 3), "y": torch.ones(2, 3, 3)}, r"x is torch.float32 and y is torch.float32"),
    ],
)
def test_a_file_that_is_something_else_is_refused(tmp_path, what, why, capsys):
    path, good = tmp_path / "some.pt", save(tmp_path / "good.pt", published(6)[0])
    if isinstance(what, bytes):
        path.write_bytes(what)
    elif what is not None:
        torch.save(what, path)
    with pytest.raises(pmod.PmodError, match=rf"^pmod.demo: cannot use {path}: .*{why if why != 'cannot use' else ''}"):
        darcy.read(path)
    assert main(["--data", str(good), "--test-data", str(path)]) == 2
    assert "It should hold a dict of x (N, n, n), bool, and y (N, n, n), float32" in capsys.readouterr().err


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--mesh dta=2", "no axis 'dta'; did you mean 'data'?: write data=2,space=2"),
        ("--mesh data=2,data=2", "axis 'data' is given twice"),
        ("--mesh data=0", "data=0 is not a size"),
        ("--mesh data", "'data' is not an axis: write data=2,space=2"),
        ("--mesh data=-1,space=-1", "two sizes are -1"),
        ("--epochs 2 --steps 3", "not allowed with argument --epochs"),
        ("--steps 0", "0 is less than 1"),
        ("--modes two", "invalid whole number value: 'two'"),
        ("--data a.pt", "--data and --test-data go together"),
        ("--test-data a.pt", "--data and --test-data go together"),
        ("--data a.pt --test-data b.pt --size 8", "--size is for problems that the demo makes itself"),
        ("--output no/such/folder/x.png", "there is no folder"),
        ("--chan 3", "unrecognized arguments: --chan 3"),
    ],
)
def test_a_command_line_that_is_wrong_says_what_is(arguments, message, capsys):
    check_refused(parse, arguments, message, capsys)


def test_a_command_line_becomes_options(capsys):
    assert parse([]) == Options()
    got = parse(["--mesh", "space=2", "--steps", "7", "--float64", "--no-serial", "--seed", "3", "--output", "a.pdf"])
    assert got == Options(
        mesh={"data": 1, "space": 2}, steps=7, float64=True, serial=False, seed=3, output=Path("a.pdf")
    )
    assert got.dtype == torch.float64 and got.steps_on(1000) == 7
    assert Options(epochs=3, batch=50).steps_on(120) == 6
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    assert left.value.code == 0
    assert "torchrun --nproc-per-node 4 -m pmod.demo --mesh data=2,space=2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cores", "changes", "sizes"),
    [
        (2, {}, (1, 2)),
        (16, {}, (1, 4)),
        (1, {"mesh": {"data": 3, "space": 1}}, (3, 1)),
        (4, {"mesh": {"data": -1, "space": 2}}, (2, 2)),
    ],
)
def test_ranks_of_its_own(monkeypatch, cores, changes, sizes):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert tuple(local_sizes(Options(**changes)).values()) == sizes
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert tuple(local_sizes(Options()).values()) == (1, 3)


@pytest.mark.parametrize(
    ("changes", "sizes", "message"),
    [
        ({"modes": 5}, (1, 2), "5 modes of each sign need 10 cells along a side, and there are 8.\nPass --modes 4"),
        ({"batch": 20}, (1, 2), "a batch of 20 is more than 9 problems and their mirror images.\nPass --batch 18 or"),
        ({"batch": 5}, (2, 1), "a batch of 5 does not divide by data=2.\nPass a --batch that is a multiple of 2."),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, sizes, message):
    shapes = (9, 8, 8), (5, 8, 8)
    check_fit(tiny(), *shapes, {"data": 2, "space": 2})
    with pytest.raises(pmod.PmodError) as caught:
        check_fit(tiny(**changes), *shapes, dict(zip(("data", "space"), sizes, strict=True)))
    assert str(caught.value).startswith(f"pmod.demo: {message}")


def test_a_job_that_is_none_is_named(capsys):
    assert main(["winds", "--mesh", "lat=2"]) == 2
    said = "pmod.demo: no job 'winds'; did you mean 'wind'?\nPass graph, wind, pinn, or none for Darcy flow.\n"
    assert capsys.readouterr().err == said


def test_the_missing_extra_is_named(monkeypatch, capsys):
    find = console.importlib.util.find_spec
    monkeypatch.setattr(console.importlib.util, "find_spec", lambda name: None if name == "tqdm" else find(name))
    assert main([]) == 2
    assert capsys.readouterr().err == (
        'pmod.demo: tqdm cannot be imported.\nInstall the demo\'s extra: pip install "pmod[demo]"\n'
    )


def test_a_picture_of_no_kind_is_refused_before_the_training(tmp_path, capsys):
    assert main(["--output", str(tmp_path / "a.xyz")]) == 2
    assert "is no kind of picture that matplotlib writes.\nEnd it in ." in capsys.readouterr().err


def test_colour_is_for_terminals(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for out, err in ((False, False), (True, False), (False, True), (True, True)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda out=out: out, raising=False)
        monkeypatch.setattr(sys.stderr, "isatty", lambda err=err: err, raising=False)
        assert console.paint("ok", "green") == ("\033[32mok\033[0m" if out and err else "ok")
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.paint("ok", "green") == "ok"


def run(losses: list[float], error: float) -> Run:
    return Run(torch.tensor(losses, dtype=torch.float64), {len(losses): error}, torch.zeros(1), 0.0)


@pytest.mark.parametrize(
    ("options", "losses", "error", "holds"),
    [
        (Options(), [1e-5] * 50 + [1.0] * 10, 0.004, [True, True]),
        (Options(), [0.0] * 49 + [2e-4] + [0.0] * 10, 0.006, [False, False]),
        (Options(), [0.0] * 49 + [math.nan], math.nan, [False, False]),
        (Options(float64=True), [9e-11] * 100 + [1.0], 0.0, [True, True]),
        (Options(float64=True), [0.0] * 99 + [2e-10], 0.0, [False, True]),
        (Options(float64=True), [0.0, 2e-10], 0.0, [False, True]),
    ],
)
def test_the_bounds(options, losses, error, holds):
    checks = compare.compare(run(losses, 0.1 + error), run([0.0] * len(losses), 0.1), options)
    assert [check.holds for check in checks] == holds
    assert ["ABOVE THE BOUND" in str(check) for check in checks] == [not one for one in holds]


@pytest.fixture
def under_torchrun(monkeypatch):
    """The one rank of a launcher."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}.items():
        monkeypatch.setenv(name, value)
    yield
    pmod.shutdown()


def test_under_a_launcher_it_uses_the_ranks_that_are_there(under_torchrun, tmp_path, capsys, monkeypatch):
    files = [save(tmp_path / name, fields) for name, fields in zip(("a.pt", "b.pt"), published(7), strict=True)]
    small = f"--data {files[0]} --test-data {files[1]} --train 8 --test 3 --channels 3 --layers 1 --modes 2 --batch 4"
    command = [*small.split(), "--epochs", "1", "--output", str(tmp_path / "a.png")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "mesh    data=1 x space=1: 1 rank, started by env\ndata    8 + 3 problems on 7 x 7 cells, from a.pt\n"
    )
    assert "over the first 4 steps (bound 1e-04)" in said and "picture: " in said
    assert main([*command, "--mesh", "space=2"]) == 2
    assert "the world has 1" in capsys.readouterr().err
    monkeypatch.setattr(compare, "ERROR_BOUND", -1.0)
    assert main(command) == 1
    assert "ABOVE THE BOUND" in capsys.readouterr().out
    assert main([*command, "--no-serial"]) == 0


def test_the_picture_shows_the_fields_and_the_curves(tmp_path):
    data = published(8)
    outcome = parallel.Outcome(*data, {}, Run(torch.rand(9), {3: 0.5, 9: 0.2}, data[1].y + 1e-3, 1.0),
                               {"data": 1, "space": 3}, [3, 3, 2], 1)  # fmt: skip
    path = tmp_path / "a.png"
    seen = []
    for other in (None, Run(torch.rand(9), {9: 0.2}, data[1].y, 1.0)):
        picture.draw(path, outcome, other, (5, 1e-4))
        seen.append(matplotlib.image.imread(path))
    assert seen[0].shape == seen[1].shape == (840, 1440, 4)
    left, right = seen[0][470:, :820], seen[0][470:, 880:]
    assert len(np.unique(seen[0][:350].reshape(-1, 4), axis=0)) > 100  # the colours of the fields
    assert np.any(seen[1][470:, :820] != left) and np.any(seen[1][470:, 880:] != right)


def test_the_command_from_end_to_end(tmp_path):
    small = "--size 9 --train 10 --test 5 --batch 4 --channels 4 --layers 2 --modes 3 --steps 12 --float64"
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, "-m", "pmod.demo", *small.split(), "--mesh", "data=1,space=2"],
        cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "mesh    data=1 x space=2: 2 ranks, started here"
    assert lines[1] == "data    10 + 5 problems on 9 x 9 cells, solved to a residual of 1e-10"
    table = [line.split() for line in lines if line.lstrip()[:1].isdigit()]
    assert [row[0] for row in table] == [str(step) for step in range(1, 13)] * 2
    assert [row[:3] for row in table[:12]] == [row[:3] for row in table[12:]]
    assert any(line.startswith("largest difference of the losses") and line.endswith("  ok") for line in lines)
    assert lines[-1].endswith("picture: pmod-demo-darcy.png") and "\033" not in done.stdout
    assert (tmp_path / "pmod-demo-darcy.png").read_bytes().startswith(b"\x89PNG")
