"""`python -m pmod.demo pinn`: the formula, the network over a mesh against one process, L-BFGS, the command."""

from __future__ import annotations

import copy
import itertools
import math
from itertools import islice

import matplotlib.image
import numpy as np
import pytest
import torch

import pmod
from pmod.demo.__main__ import main
from pmod.demo.pinn import burgers, command, net, parallel, picture, whole
from pmod.demo.pinn.burgers import NU, collocation_points, grid, solution
from pmod.demo.pinn.descent import MEMORY, coefficients, descend, minimize
from pmod.demo.pinn.options import TRIAL, Options, local_sizes, parse
from tests.lib import forked
from tests.lib.commands import check_refused

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(**changes: object) -> Options:
    return Options(**{"points": 61, "width": 7, "pairs": 2, "warm_up": 12, "steps": 8, **changes})


# --- the equation ----------------------------------------------------------------------------------------------------


def test_the_formula_solves_burgers_equation(monkeypatch):
    t = torch.linspace(0.05, 1, 7, dtype=torch.float64)[:, None].expand(-1, 9).clone().requires_grad_()
    x = torch.linspace(-0.95, 0.95, 9, dtype=torch.float64).expand(7, -1).clone().requires_grad_()
    u = solution(t, x)
    u_t, u_x = torch.autograd.grad(u.sum(), (t, x), create_graph=True)
    (u_xx,) = torch.autograd.grad(u_x.sum(), x)
    residual = u_t + u * u_x - NU * u_xx
    assert u_t.abs().max() > 1 and u_x.abs().max() > 100
    assert residual.abs().max() < 1e-7 * (u_x.abs().max() + u_xx.abs().max() * NU)
    start = torch.zeros(9, dtype=torch.float64)
    torch.testing.assert_close(solution(start, x[0]), -torch.sin(math.pi * x[0]))
    ends = solution(t[:, :2], torch.tensor([-1.0, 1.0], dtype=torch.float64).expand(7, 2))
    assert ends.abs().max() < 1e-12
    before = solution(*grid())
    monkeypatch.setattr(burgers, "_ORDER", 150)
    torch.testing.assert_close(solution(*grid()), before, rtol=0, atol=1e-13)


def test_points_are_where_they_should_be():
    t, x = collocation_points(200, seed=3)
    assert t.shape == x.shape == (200, 1) and min(t.min(), x.min()) >= 0 and max(t.max(), x.max()) <= 1
    assert (x < 0.1).float().mean() == pytest.approx(0.5 * 0.1 + 0.5 * 0.1 ** (1 / 3), abs=0.02)
    assert torch.equal(collocation_points(200, seed=3)[1], x) and not torch.equal(collocation_points(200, seed=4)[1], x)


# --- L-BFGS ----------------------------------------------------------------------------------------------------------


def plain_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b.T


def test_the_direction_is_that_of_the_two_loops():
    generator = torch.Generator().manual_seed(0)
    s, y = torch.randn(2, 4, 9, dtype=torch.float64, generator=generator)
    y = y + 3 * s  # so that s @ y > 0
    g = torch.randn(9, dtype=torch.float64, generator=generator)
    basis = torch.cat([s, y, g[None]])
    q, along = g.clone(), {}  # as Nocedal has them
    for i in reversed(range(4)):
        along[i] = (s[i] @ q) / (s[i] @ y[i])
        q = q - along[i] * y[i]
    q = q * (s[3] @ y[3]) / (y[3] @ y[3])
    for i in range(4):
        q = q + s[i] * (along[i] - (y[i] @ q) / (s[i] @ y[i]))
    torch.testing.assert_close(coefficients(basis @ basis.T) @ basis, -q)
    torch.testing.assert_close(coefficients((g @ g)[None, None]), torch.tensor([-1.0], dtype=torch.float64))


def test_it_goes_down_a_curved_valley_to_its_end():
    p = [torch.tensor([-1.2], dtype=torch.float64, requires_grad=True), torch.ones(1, 1).double().requires_grad_()]

    def rosenbrock() -> torch.Tensor:
        return ((1 - p[0]) ** 2 + 100 * (p[1][0] - p[0] ** 2) ** 2).sum()

    curve = list(islice(minimize(rosenbrock, p, plain_products), 200))
    assert curve[-1] < 1e-20 and all(a > b for a, b in itertools.pairwise(curve))
    assert len(curve) < 60  # it ends where nothing is lower
    assert [v.item() for v in p] == pytest.approx([1, 1], abs=1e-9)


def test_it_forgets_what_is_long_ago():
    seen: list[int] = []

    def products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append(len(a))
        return a @ b.T

    p = [torch.linspace(1, 2, 80, dtype=torch.float64).requires_grad_()]
    scale = torch.logspace(0, 8, 80, dtype=torch.float64)
    list(islice(minimize(lambda: (scale * p[0] ** 2 + p[0] ** 4).sum(), p, products), MEMORY + 9))
    assert max(seen) == 2 * MEMORY + 1


def test_parameters_that_are_spread_go_the_same_way():
    """A sum of squares whose variables are on 3 ranks: as if one process had them all."""
    scale = torch.logspace(0, 3, 9, dtype=torch.float64)

    def loss(p: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (scale * (p - 1) ** 2 + (p - 1) ** 4).sum()

    def run() -> tuple[list[float], list[float]]:
        p = [torch.zeros(3, dtype=torch.float64, requires_grad=True)]
        mine = pmod.shard(scale, "model")
        descent = descend(lambda: pmod.psum(loss(p[0], mine), "model"), p, lambda a, b: pmod.psum(a @ b.T, "model"), 5)
        curve = list(islice(descent, 20))
        return curve, pmod.unshard(p[0].detach(), "model").tolist()

    alone = [torch.zeros(9, dtype=torch.float64, requires_grad=True)]
    wanted = list(islice(descend(lambda: loss(alone[0], scale), alone, plain_products, 5), 20))
    for curve, end in pmod.simulate(run, model=3):
        assert curve == pytest.approx(wanted, rel=1e-9)
        assert end == pytest.approx(alone[0].tolist(), abs=1e-9)


# --- over a mesh, and in one process ---------------------------------------------------------------------------------


def on_a_rank(options: Options) -> tuple[dict[str, torch.Tensor], float, dict[str, torch.Tensor]]:
    """The whole weights, the loss, and its whole gradient."""
    model = net.Net(options.width, options.pairs, options.seed).double()
    trainer = parallel._Trainer(model, collocation_points(options.points, options.seed), options)
    value = trainer.loss()
    gradients = torch.autograd.grad(value, trainer.parameters)
    weights = trainer.weights()
    with torch.no_grad():
        for p, gradient in zip(trainer.parameters, gradients, strict=True):
            p.copy_(gradient)
    return weights, value.item(), trainer.weights()


@pytest.mark.parametrize(
    "axis_sizes",
    [{"data": 1, "model": 1}, {"data": 2, "model": 2}, {"data": 3, "model": 1}, {"data": 1, "model": 9}],
    ids=str,
)
def test_loss_and_gradient_are_those_of_one_process(axis_sizes):  # 9 ranks share 7 units
    options = tiny(pairs=3)
    points = collocation_points(options.points, options.seed)
    for weights, value, gradients in pmod.simulate(on_a_rank, options, **axis_sizes):
        leaves = {name: w.requires_grad_() for name, w in copy.deepcopy(weights).items()}
        assert leaves["pairs.0.columns"].shape == (7, 2) and len(leaves) == 11
        wanted = whole.loss(leaves, *points)
        assert value == pytest.approx(wanted.item(), rel=1e-12)
        each = torch.autograd.grad(wanted, list(leaves.values()))
        for (name, gradient), right in zip(gradients.items(), each, strict=True):
            assert right.abs().max() > 1e-6
            torch.testing.assert_close(gradient, right, rtol=0, atol=1e-12, msg=name)


def test_the_network_is_odd_and_right_at_the_edges():
    w = on_one()
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    t = torch.rand(9, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = whole.network(w, t, x)
    torch.testing.assert_close(whole.network(w, t, -x), -u)
    torch.testing.assert_close(whole.network(w, 0 * t, x), -torch.sin(math.pi * x))
    assert u[[0, -1]].abs().max() < 1e-12 and (u + torch.sin(math.pi * x)).abs().max() > 0.01


def on_one() -> dict[str, torch.Tensor]:
    return pmod.simulate(on_a_rank, tiny(), data=1, model=1)[0][0]


@pytest.mark.parametrize("axis_sizes", [{"data": 2, "model": 2}, {"data": 1, "model": 3}], ids=str)
def test_training_follows_one_process(axis_sizes, capsys):
    options = tiny()
    outcome, *others = pmod.simulate(parallel.train, options, **axis_sizes)
    assert set(others) == {None}
    checks = command.compare(outcome)
    assert all(check.holds for check in checks) and max(check.value for check in checks) < 1e-11
    first, after = outcome.trials
    assert (first.warm_up, after.warm_up) == (TRIAL, 0) and len(first.losses) == len(after.losses) == TRIAL
    # the training itself is that of one process, too, and the last trial begins where it ended
    curve, end = whole.train(first.before, outcome.t, outcome.x, 12, 20)
    torch.testing.assert_close(outcome.run.losses, curve, rtol=1e-9, atol=0)
    for name, value in end.items():
        torch.testing.assert_close(after.before[name], value, rtol=0, atol=1e-9)
    t, x = grid()
    with torch.no_grad():
        wanted = whole.network(after.before, t.reshape(-1, 1), x.reshape(-1, 1)).view_as(t)
    torch.testing.assert_close(outcome.run.prediction, wanted, rtol=0, atol=1e-12)
    truth = solution(t, x)
    assert outcome.run.error == pytest.approx(((wanted - truth).norm() / truth.norm()).item(), rel=1e-9)
    assert list(outcome.run.errors) == list(range(2, 21, 2)) and capsys.readouterr().out.count("%") == 10


def test_what_is_wrong_is_found(monkeypatch):
    psum = pmod.psum
    with monkeypatch.context() as patch:
        patch.setattr(pmod, "psum", lambda x, axis: (1 + 1e-6) * psum(x, axis))
        outcome = pmod.simulate(parallel.train, tiny(steps=1), data=2, model=2)[0]
    assert [check.holds for check in command.compare(outcome)] == [False, False]
    outcome = pmod.simulate(parallel.train, tiny(), data=1, model=2)[0]
    outcome.trials[1].after["pairs.0.rows"][2, 1] += 2e-10
    assert [check.holds for check in command.compare(outcome)] == [True, False]
    outcome.trials[0].losses[3] = math.nan
    assert [check.holds for check in command.compare(outcome)] == [False, False]


def test_messages_of_a_loss_and_its_gradient():
    """Over data the loss and all gradients together; over model what crosses between pairs, to third order."""
    sent = pmod.simulate(parallel.train, tiny(pairs=2), data=2, model=2)[0].sent
    weights = sum(p.numel() for p in pmod.simulate(lambda: net.Net(7, 2, 0), data=1, model=2)[0].parameters())
    assert sent["data"] == (2, 8 * (1 + weights))
    assert sent["model"][0] == 12


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--mesh modle=2", "no axis 'modle'; did you mean 'model'?: write data=2,model=2"),
        ("--width 0", "0 is less than 1"),
        ("--output no/such/folder/x.png", "there is no folder"),
    ],
)
def test_a_command_line_that_is_wrong_says_what_is(arguments, message, capsys):
    check_refused(parse, arguments, message, capsys)


def test_a_command_line_becomes_options(capsys, monkeypatch):
    assert parse([]) == Options()
    got = parse(["--mesh", "model=2", "--steps", "7", "--warm-up", "3", "--no-serial"])
    assert got == Options({"data": 1, "model": 2}, steps=7, warm_up=3, serial=False)
    for arguments in (["--help"], ["pinn", "--help"]):
        with pytest.raises(SystemExit):
            main(arguments)
    assert capsys.readouterr().out.count("python -m pmod.demo pinn") > 3
    for gpus, sizes in ((0, (2, 2)), (1, (1, 1)), (3, (1, 3)), (8, (2, 2))):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert tuple(local_sizes(Options()).values()) == sizes
    assert local_sizes(Options({"data": 1, "model": 2})) == {"data": 1, "model": 2}


def test_under_a_launcher_it_uses_the_ranks_that_are_there(tmp_path, capsys, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}.items():
        monkeypatch.setenv(name, value)
    small = ["--points", "30", "--width", "4", "--pairs", "1", "--warm-up", "2", "--steps", "3"]
    given = ["pinn", *small, "--output", str(tmp_path / "a.png")]
    monkeypatch.setattr(picture, "draw", lambda *given: None)
    try:
        assert main(given) == 0
        said = capsys.readouterr().out
        assert said.startswith("mesh    data=1 x model=1: 1 rank, started by env\n") and said.count("  ok") == 2
        monkeypatch.setattr(command, "BOUND", -1.0)
        assert main(given) == 1
        assert capsys.readouterr().out.count("ABOVE THE BOUND") == 2
        assert main([*given, "--no-serial"]) == 0
        monkeypatch.setattr(command, "Options", lambda: tiny(warm_up=2, steps=3))  # the usual numbers
        assert main([*given, "--no-serial"]) == 1
        assert "(bound 5%)  ABOVE THE BOUND" in capsys.readouterr().out
        assert main([*given, "--mesh", "model=2"]) == 2
    finally:
        pmod.shutdown()


def test_the_command_from_end_to_end(tmp_path):
    small = ["--points", "60", "--width", "6", "--pairs", "2", "--warm-up", "10", "--steps", "10"]
    done = forked.run_module("pmod.demo", ["pinn", "--mesh", "model=2", *small], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "mesh    data=1 x model=2: 2 ranks, started here"
    table = [line.split() for line in lines if line.lstrip()[:1].isdigit()]
    assert [row[0] for row in table] == [str(step) for step in range(2, 21, 2)]
    assert float(table[-1][1]) < float(table[0][1])
    assert sum(line.startswith("difference of the ") and line.endswith("  ok") for line in lines) == 2
    assert lines[-1].endswith("picture: pmod-demo-pinn.png") and "\033" not in done.stdout
    assert (tmp_path / "pmod-demo-pinn.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_the_solution_and_the_curve(tmp_path):
    outcome = pmod.simulate(parallel.train, tiny(), data=1, model=2)[0]
    picture.draw(tmp_path / "a.png", outcome)
    seen = matplotlib.image.imread(tmp_path / "a.png")
    assert seen.shape == (1008, 1560, 4)
    for part in (np.s_[60:340, 80:740], np.s_[60:340, 860:1520]):
        assert len(np.unique(seen[part].reshape(-1, 4), axis=0)) > 100
    for part in (np.s_[560:960, 80:740], np.s_[560:960, 860:1520]):
        assert 0.01 < (seen[part][..., :3].min(-1) < 0.9).mean() < 0.5
