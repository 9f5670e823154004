"""`python -m pmod.demo graph`: finite elements against known solutions, the parts, the network, the command."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import re
from pathlib import Path

import attrs
import matplotlib.image
import meshio
import numpy as np
import pytest
import scipy.spatial
import torch
import trimesh

import pmod
from pmod._wire import memory
from pmod.demo.__main__ import main
from pmod.demo.graph import command, files, net, parallel, picture, whole
from pmod.demo.graph.options import Options, check_fit, local_sizes, parse
from pmod.demo.graph.partition import owners, part_of, partitioner
from pmod.demo.graph.problems import Elements, conductivity, make_problems
from pmod.demo.graph.surface import Surface, areas, clean, depth, plate
from tests.lib import forked
from tests.lib.commands import check_refused

pytestmark = pytest.mark.usefixtures("one_thread")


def square(n: int, seed: int = 0) -> Surface:
    """The unit square, its nodes off the grid inside."""
    t = np.linspace(0, 1, n + 1)
    points = np.stack(np.meshgrid(t, t), axis=-1).reshape(-1, 2)
    inside = ((points > 0) & (points < 1)).all(1)[:, None]
    points += inside * np.random.default_rng(seed).uniform(-0.25, 0.25, points.shape) / n
    triangles = scipy.spatial.Delaunay(points).simplices.astype(np.int64)
    triangles = triangles[areas(np.pad(points, ((0, 0), (0, 1))), triangles) > 1e-9]
    return clean(points, triangles)[0]


def sphere(level: int = 1) -> trimesh.Trimesh:
    return trimesh.creation.icosphere(level)


def closed(level: int = 1) -> Surface:
    return clean(np.array(sphere(level).vertices), np.array(sphere(level).faces))[0]


def orders(errors: list[float], widths: list[float]) -> list[float]:
    pairs = itertools.pairwise(zip(errors, widths, strict=True))
    return [math.log(a / b) / math.log(h / k) for (a, h), (b, k) in pairs]


# --- finite elements -------------------------------------------------------------------------------------------------


def test_finite_elements_converge_at_second_order_on_the_square():
    errors, sizes = [], [16, 32, 64]
    for n in sizes:
        surface = square(n)
        x, y = surface.points.numpy()[:, :2].T
        k = 0.02 * np.exp(x + 2 * y)
        sx, sy, cx, cy = (g(math.pi * v) for g in (np.sin, np.cos) for v in (x, y))
        # -div(k grad u) + u for u = cos cos, whose slope across the edge is 0
        f = k * (2 * math.pi**2 * cx * cy + math.pi * (sx * cy + 2 * cx * sy)) + cx * cy
        elements = Elements(surface)
        error = elements.solve(k, f) - cx * cy
        errors.append(math.sqrt(error @ (elements.mass @ error)))
    found = orders(errors, [1 / n for n in sizes])
    assert all(1.8 < order < 2.2 for order in found), (errors, found)


def test_finite_elements_converge_at_second_order_on_a_closed_surface():
    errors, widths = [], []
    for level in (1, 2, 3):
        ball = sphere(level)
        surface = Surface(torch.tensor(ball.vertices), torch.tensor(ball.faces))
        z = surface.points[:, 2].numpy()
        error = Elements(surface).solve(np.full(len(z), 0.3), (2 * 0.3 + 1) * z) - z  # -Laplacian z = 2 z on a sphere
        errors.append(np.sqrt((error**2).mean()))
        widths.append(2.0**-level)
    assert all(1.8 < order < 2.2 for order in orders(errors, widths)), errors


def test_each_piece_has_its_own_solution():
    points = np.concatenate([sphere().vertices, np.add(sphere().vertices, [5, 0, 0])])
    n = len(points) // 2
    surface, said = clean(points, np.concatenate([sphere().faces, np.array(sphere().faces) + n]))
    assert (surface.pieces, said) == (2, [])
    first = surface.points.numpy()[:, 0] < surface.points[:, 0].mean().item()
    u = Elements(surface).solve(np.ones(2 * n), np.where(first, 3.0, -1.0))
    np.testing.assert_allclose(u, np.where(first, 3.0, -1.0), rtol=1e-10)


def test_what_the_solver_cannot_do_is_said(monkeypatch):
    surface = square(3)
    monkeypatch.setattr("pmod.demo.graph.problems.TOLERANCE", 0.0)
    with pytest.raises(pmod.PmodError, match=r"only, above 0\.0\.\nIts triangles are too thin or too unlike in size\."):
        Elements(surface).solve(np.ones(len(surface)), np.arange(len(surface)) + 1.0)


def test_random_fields_have_the_variance_that_is_meant():
    noise = np.random.default_rng(0).normal(size=(len(surface := square(24)), 300))
    fields = Elements(surface).smooth(noise)
    inside = (np.abs(surface.points.numpy()[:, :2] - 0.5) < 0.2).all(1)
    assert fields[inside].std() == pytest.approx(1, rel=0.1)
    assert np.abs(fields.mean(1)).max() < 0.4


@pytest.mark.parametrize("sizes", [(1, 1), (2, 3)])
def test_problems_are_solved_together(sizes):
    surface, (data, graph) = square(5), sizes
    for made in pmod.simulate(lambda: make_problems(surface, 7, 3, quiet=True), data=data, graph=graph):
        assert made.x.shape == (len(surface), 7, 2) and len(made) == 7 and made.x.abs().max() < 1
        for i in range(7):
            k, f = conductivity(made.x[:, i, 0]).numpy(), made.x[:, i, 1].numpy()
            np.testing.assert_allclose(made.u[:, i].numpy(), Elements(surface).solve(k, f), rtol=0, atol=1e-12)
    assert made.u.std(1).min() > 0  # no two are the same


# --- meshes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [60, 500, 2500])
def test_the_plate(nodes):
    surface = plate(nodes, 0)
    assert abs(len(surface) - nodes) < 10 + 0.1 * nodes and surface.pieces == 1
    triangles, points = surface.triangles.numpy(), surface.points.numpy()
    assert areas(points, triangles).sum() == pytest.approx(1)
    assert sorted(np.unique(triangles)) == list(range(len(surface)))
    assert torch.equal(surface.points, plate(nodes, 0).points)
    if nodes == 2500:
        ends = len(surface) - len(surface.edges[0]) // 2 + len(triangles)
        assert ends == -1  # Euler: 1 for the disc, 1 less for each hole; the notch is none
        assert not torch.equal(surface.points[:2000], plate(nodes, 1).points[:2000])


def test_the_plate_has_a_notch_and_holes():
    at = np.array([[0.45, 0.55], [1.15, 0.4], [1.0, 0.95], [0.8, 0.5], [1.7, 0.5], [0.8, 0.1]])
    np.testing.assert_array_equal(depth(at) > 0, [False, False, False, True, False, True])


GOOD = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], dtype=float)
PAIR = [[0, 1, 2], [1, 3, 2]]


@pytest.mark.parametrize(
    ("points", "triangles", "nodes", "said"),
    [
        (GOOD, PAIR, 4, []),
        (np.pad(GOOD, ((0, 0), (0, 1))), PAIR, 4, []),
        ([*GOOD, [np.inf, np.nan]], PAIR, 4, ["1 point of no triangle left out"]),
        ([*GOOD, [1, 1e-12], [0, 1]], [[0, 1, 2], [4, 3, 5]], 4, ["2 points merged with another at its place"]),
        (GOOD, [*PAIR, [0, 0, 3], [1, 1, 1]], 4, ["2 triangles without area left out"]),
        ([*GOOD, [0.5, 0]], [*PAIR, [0, 4, 1]], 4, ["1 triangle without area left out",
                                                     "1 point of such triangles left out"]),
        (GOOD, [*PAIR, [2, 1, 0]], 4, ["1 triangle given twice left out"]),
    ],
)  # fmt: skip
def test_what_is_put_right_in_a_mesh(points, triangles, nodes, said):
    surface, found = clean(np.array(points), np.array(triangles))
    assert (len(surface), len(surface.triangles), found) == (nodes, 2, said)
    corners = surface.points[surface.triangles]
    assert torch.isfinite(corners).all() and surface.pieces == 1
    assert areas(surface.points.numpy(), surface.triangles.numpy()).tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    ("points", "triangles", "message"),
    [
        (GOOD, np.zeros((0, 3), int), "the mesh has no triangles"),
        (GOOD, [[0, 1, 1]], "the mesh has no triangle with an area"),
        (GOOD * 0, PAIR, "the mesh has no triangle with an area"),
        (GOOD, [[0, 1, 4]], "a triangle has the corner 4, and there are 4 points"),
        (GOOD, [[-1, 1, 2]], "a triangle has the corner -1, and there are 4 points"),
        ([*GOOD[:3], [np.nan, 0]], PAIR, "a corner of the mesh is not a finite point"),
        (GOOD[:, :1], PAIR, r"the points are \(4, 1\)"),
    ],
)
def test_a_mesh_that_is_none_is_refused(points, triangles, message):
    with pytest.raises(pmod.PmodError, match=f"^pmod.demo: {message}"):
        clean(np.array(points), np.array(triangles))


@pytest.mark.parametrize("name", ["a.obj", "a.ply", "a.stl", "a.off", "a.glb", "b.vtk", "b.vtu", "b.msh", "b.mesh"])
def test_mesh_files_are_read(tmp_path, name):
    path, ball = tmp_path / name, sphere()
    if name.startswith("a"):
        ball.export(path)
    else:
        meshio.Mesh(ball.vertices, [("triangle", ball.faces)]).write(path)
    surface, said = files.read(path)
    assert (len(surface), len(surface.triangles), surface.pieces) == (42, 80, 1)
    assert said == (["198 points merged with another at its place"] if name == "a.stl" else [])
    spread = torch.linalg.vector_norm(surface.points - surface.points.mean(0), dim=1)
    torch.testing.assert_close(spread, spread.mean().expand(42), rtol=1e-5, atol=0)


def grid(tmp_path: Path, kind: str, *more: tuple[str, list[list[int]]]) -> Path:
    points = [[0, 0, 0], [2, 0, 0], [2, 1, 0], [0, 1, 0], [1, 0, 0], [2, 0.5, 0], [1, 1, 0], [0, 0.5, 0]]
    cells = {"quad": [0, 1, 2, 3], "quad8": list(range(8)), "triangle6": [0, 1, 2, 4, 5, 7], "tetra": [0, 1, 2, 3]}
    meshio.Mesh(np.array(points), [(kind, [cells[kind]]), *more]).write(tmp_path / "a.vtu")
    return tmp_path / "a.vtu"


@pytest.mark.parametrize(
    ("kind", "triangles", "said"),
    [
        ("quad", 2, ["1 quad cell cut into triangles", "4 points of no triangle left out"]),
        ("quad8", 2, ["1 quad8 cell cut into triangles", "4 points of no triangle left out"]),
        ("triangle6", 1, ["1 triangle6 cell taken by their corners", "5 points of no triangle left out"]),
    ],
)
def test_other_cells_become_triangles(tmp_path, kind, triangles, said):
    surface, found = files.read(grid(tmp_path, kind))
    assert (len(surface.triangles), found) == (triangles, said)
    lines, left = files.read(grid(tmp_path, kind, ("line", [[0, 1], [1, 2]])))
    assert len(lines.triangles) == triangles and left == [said[0], "2 line cells left out", said[1]]


def test_a_quad_is_cut_along_its_shorter_diagonal(tmp_path):
    points = np.array([[0, 0, 0], [5, 0.1, 0], [6, 1, 0], [1, 1, 0]])
    for turn in range(2):
        meshio.Mesh(points, [("quad", np.roll([[0, 1, 2, 3]], turn, axis=1))]).write(tmp_path / "a.vtu")
        surface, _ = files.read(tmp_path / "a.vtu")
        sender, receiver = surface.edges
        length = torch.linalg.vector_norm(surface.points[sender] - surface.points[receiver], dim=1)
        width = torch.pdist(surface.points).max()
        assert length.max() < 0.9 * width  # the longer diagonal is no edge


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.ply", "hello", "Not a ply file"),
        ("a.vtk", "hello", "Illegal VTK header"),
        ("a.xyz", "hello", "Could not deduce file format"),
        ("a.stl", "", "the mesh has no triangles"),
        ("a.obj", "v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", "the mesh has no triangle with an area"),
        ("a.obj", None, "there is no such file"),
    ],
)
def test_a_file_that_is_no_mesh_is_refused(tmp_path, name, text, why, capsys):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["graph", "--mesh-file", str(tmp_path / name), "--output", str(tmp_path / "a.png")]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"pmod.demo: cannot use {tmp_path / name}: ") and why in err and out == ""


def test_a_volume_is_refused(tmp_path):
    with pytest.raises(pmod.PmodError, match=r"it holds no surface: 1 tetra cell left out\.\nPass a mesh of triangles"):
        files.read(grid(tmp_path, "tetra"))


@pytest.mark.parametrize(("name", "package"), [("a.obj", "trimesh"), ("a.msh", "meshio")])
def test_the_package_that_reads_is_named(tmp_path, name, package, monkeypatch):
    (tmp_path / name).write_text("")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(pmod.PmodError, match=rf'{package} cannot be imported\..*\n.*pip install "pmod\[mesh\]"'):
        files.read(tmp_path / name)


# --- the parts -------------------------------------------------------------------------------------------------------


def neighbours(surface: Surface, node: int) -> set[int]:
    with_it = surface.triangles[(surface.triangles == node).any(1)]
    return set(with_it.view(-1).tolist()) - {node}


def some(name: str, surface: Surface, ranks: int) -> torch.Tensor:
    if name == "random":
        return torch.randint(ranks, (len(surface),), generator=torch.Generator().manual_seed(0))
    if name == "none":  # all but the last rank have nothing
        return torch.full((len(surface),), ranks - 1)
    if name == "coordinates":
        return pmod.graph.by_coordinates(surface.points, ranks)
    return owners(surface, ranks)


@pytest.mark.parametrize("how", ["usual", "coordinates", "random", "none"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("make", [lambda: plate(120, 0), closed], ids=["plate", "sphere"])
def test_the_parts_hold_what_they_should(make, ranks, how):
    surface = make()
    owner = some(how, surface, ranks)
    parts = pmod.simulate(part_of, surface, owner, torch.float64, graph=ranks)
    assert sorted(torch.cat([part.owned for part in parts]).tolist()) == list(range(len(surface)))
    plans = [part.plan.exchange for part in parts]
    arriving = [
        [part.owned[rows].tolist() for rows in plan.rows.split(plan.send_sizes)]
        for part, plan in zip(parts, plans, strict=True)
    ]
    for rank, part in enumerate(parts):
        held = torch.cat([part.owned, part.ghosts])
        around = {node: neighbours(surface, node) for node in part.owned.tolist()}
        assert set(part.ghosts.tolist()) == set().union(*around.values()) - set(part.owned.tolist())
        assert part.ghosts.tolist() == [node for sent in arriving for node in sent[rank]]
        edges = list(zip(held[part.receiver].tolist(), held[part.sender].tolist(), strict=True))
        assert edges == [(node, other) for node in sorted(around) for other in sorted(around[node])]
        assert part.degree.view(-1).tolist() == [len(around[node]) for node in part.owned.tolist()]
        way = (surface.points[held[part.sender]] - surface.points[held[part.receiver]]).double()
        torch.testing.assert_close(part.shape[:, 3], torch.linalg.vector_norm(part.shape[:, :3], dim=1))
        if len(way):
            ratio = part.shape[:, 3] / torch.linalg.vector_norm(way, dim=1)
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
@pytest.mark.parametrize("present", [True, False])
def test_the_partitioners_share_the_work_and_cut_little(ranks, present, monkeypatch):
    if not present:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pymetis" else find(name))
    surface = plate(800, 0)
    assert partitioner(surface, ranks) == ("METIS" if present else "coordinate bisection")
    owner = owners(surface, ranks)
    sender, receiver = surface.edges
    work = torch.bincount(owner[receiver], minlength=ranks)
    assert work.max() < 1.1 * len(sender) / ranks
    assert (owner[sender] != owner[receiver]).double().mean() < 0.06 * (ranks - 1)


def test_more_ranks_than_nodes():
    surface = clean(GOOD, np.array(PAIR))[0]
    owner = owners(surface, 7)
    assert partitioner(surface, 7) == "coordinate bisection"
    assert sorted(owner.tolist()) == sorted(set(owner.tolist())) and owner.max() < 7  # a rank each


# --- the network -----------------------------------------------------------------------------------------------------


def tiny(**changes: object) -> Options:
    usual = {"channels": 5, "rounds": 2, "train": 6, "test": 4, "batch": 6, "steps": 2, "float64": True}
    return Options(**{**usual, **changes})


@pytest.mark.parametrize(
    ("sizes", "how"),
    [((1, 1), "usual"), ((2, 1), "usual"), ((1, 3), "usual"), ((2, 2), "random"), ((3, 2), "usual"), ((1, 4), "none"),
     ((1, 3), "random")],
)  # fmt: skip
@pytest.mark.parametrize("make", [lambda: plate(60, 0), closed], ids=["plate", "sphere"])
def test_loss_and_gradients_are_those_of_the_whole_mesh(make, sizes, how, monkeypatch):
    surface, (data, graph) = make(), sizes
    monkeypatch.setattr(parallel, "owners", lambda surface, ranks: some(how, surface, ranks))
    first, *others = pmod.simulate(parallel.train, tiny(), surface, data=data, graph=graph)
    assert set(others) <= {None}
    assert all(check.holds for check in command.compare(first, tiny()))
    assert len(first.steps) == 2 and first.steps[0].loss != first.steps[1].loss
    for step in first.steps:
        problems = first.train[step.batch]
        loss, gradients = whole.loss_and_gradients(step.weights, surface, problems.x, problems.u / first.scale)
        torch.testing.assert_close(step.loss, loss, rtol=0, atol=1e-13)
        assert gradients.keys() == step.gradients.keys() == step.weights.keys()
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(step.gradients[name], gradient, rtol=0, atol=1e-13, msg=name)


@pytest.mark.parametrize("tests", [3, 1])  # of one problem a rank along data has none
def test_predictions_and_errors_are_those_of_the_whole_mesh(tests):
    surface, options = plate(60, 0), tiny(test=tests)
    first, *_ = pmod.simulate(parallel.train, options, surface, data=2, graph=3)
    weights = first.steps[1].weights
    with torch.no_grad():
        wanted = whole.network(weights, surface, first.test.x) * first.scale
    torch.testing.assert_close(first.run.prediction, wanted, rtol=0, atol=1e-13)
    errors = (wanted - first.test.u).norm(dim=0) / first.test.u.norm(dim=0)
    assert first.run.error == pytest.approx(errors.mean().item(), rel=1e-12)
    assert list(first.run.errors) == [1, 2]


def test_a_wrong_loss_or_gradient_is_found(monkeypatch):
    right = pmod.graph.halo
    for thing, name, wrong, holds in [
        (pmod.graph, "halo", lambda x, plan: torch.cat([x, 0.9 * right(x, plan)[len(x) :]]), [False, False]),
        (net, "varying", lambda model: dict(model.named_parameters()), [True, False]),  # not added up over the ranks
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(thing, name, wrong)
            patch.setattr(parallel._Trainer, "traffic", lambda self: [])
            outcome = pmod.simulate(parallel.train, tiny(), plate(60, 0), data=1, graph=2)[0]
        first = attrs.evolve(outcome, steps=outcome.steps[:1])
        assert [check.holds for check in command.compare(first, tiny())] == holds
    for step, wrong in ((0, 2e-10), (1, 2e-10), (0, math.nan)):  # in one of the parameters, at one of the two times
        outcome = pmod.simulate(parallel.train, tiny(), plate(60, 0), data=1, graph=2)[0]
        outcome.steps[step].gradients["decode.2.bias"] += wrong
        assert [check.holds for check in command.compare(outcome, tiny())] == [True, False]


def test_all_ranks_take_the_mesh_of_the_first():
    def agreed() -> tuple[Surface, torch.Tensor]:
        mine = [plate(60, 0), closed(), plate(60, 1)][pmod.axis_index("graph")]
        return parallel._agreed(mine)

    wanted = plate(60, 0)
    for surface, owner in pmod.simulate(agreed, data=1, graph=3):
        assert torch.equal(surface.points, wanted.points) and torch.equal(surface.triangles, wanted.triangles)
        assert torch.equal(owner, owners(wanted, 3))


def test_messages_in_a_step(monkeypatch):
    """Ghosts once a round and once back, the loss, the gradients of all parameters together."""
    sent: list[int] = []
    exchange = memory.MemoryWire._exchange

    def noted(self: memory.MemoryWire, what: object) -> object:
        if self.index == 0:
            sent.append(self.size)
        return exchange(self, what)

    def step() -> None:
        surface, options = plate(60, 0), tiny(rounds=3)
        problems = make_problems(surface, 10, 0, quiet=True)
        model = net.GraphNet(5, 3).double()
        trainer = parallel._Trainer(model, surface, owners(surface, 2), problems[:6], problems[6:], 1.0, options)
        if pmod.axis_index("graph") == 0:
            sent.clear()
        trainer.loss(torch.arange(6)).backward()

    monkeypatch.setattr(memory.MemoryWire, "_exchange", noted)
    pmod.simulate(step, data=1, graph=2)
    assert sent == [2] * (3 + 3 + 1 + 1)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--mesh grph=2", "no axis 'grph'; did you mean 'graph'?: write data=2,graph=2"),
        ("--nodes 5", "5 is less than 50"),
        ("--mesh-file a.obj --nodes 60", "--nodes is for the mesh that the demo makes itself"),
        ("--output no/such/folder/x.png", "there is no folder"),
        ("--epochs 2 --steps 3", "not allowed with argument --epochs"),
    ],
)
def test_a_command_line_that_is_wrong_says_what_is(arguments, message, capsys):
    check_refused(parse, arguments, message, capsys)


def test_a_command_line_becomes_options(capsys, monkeypatch):
    assert parse([]) == Options()
    got = parse(["--mesh", "graph=2", "--steps", "7", "--float64", "--mesh-file", "a.obj", "--no-serial"])
    assert got == Options({"data": 1, "graph": 2}, Path("a.obj"), steps=7, float64=True, serial=False)
    assert Options(epochs=3, batch=5).steps_on(17) == 9 and got.dtype == torch.float64
    for arguments in (["--help"], ["graph", "--help"]):
        with pytest.raises(SystemExit):
            main(arguments)
    assert capsys.readouterr().out.count("python -m pmod.demo graph") > 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert local_sizes(Options()) == {"data": 1, "graph": 3}
    assert local_sizes(Options({"data": -1, "graph": 1})) == {"data": 3, "graph": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 7}, "a batch of 7 is more than 6 problems.\nPass --batch 6 or less."),
        ({"batch": 3}, "a batch of 3 does not divide by data=2.\nPass a --batch that is a multiple of 2."),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    check_fit(tiny(), {"data": 2, "graph": 99})
    with pytest.raises(pmod.PmodError) as caught:
        check_fit(tiny(**changes), {"data": 2, "graph": 1})
    assert str(caught.value).startswith(f"pmod.demo: {message}")


SMALL = "--train 6 --test 3 --batch 4 --channels 5 --rounds 2 --steps 5"


def test_under_a_launcher_it_uses_the_ranks_that_are_there(tmp_path, capsys, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29513"}.items():
        monkeypatch.setenv(name, value)
    sphere().export(tmp_path / "ball.stl")
    given = ["graph", *SMALL.split(), "--mesh-file", str(tmp_path / "ball.stl"), "--output", str(tmp_path / "a.png")]
    try:
        assert main(given) == 0
        said = capsys.readouterr().out
        assert said.startswith(
            "nodes   42, in 80 triangles: from ball.stl\n"
            "        198 points merged with another at its place\n"
            "mesh    data=1 x graph=1: 1 rank, started by env\n"
        )
        assert "(bound 1e-04)" in said and "ghost rows are 0.0% of all nodes" in said
        monkeypatch.setattr(picture, "draw", lambda path, outcome: None)  # once is enough
        monkeypatch.setattr(command, "bound", lambda options: -1.0)
        assert main(given) == 1
        assert capsys.readouterr().out.count("ABOVE THE BOUND") == 2
        assert main([*given, "--no-serial"]) == 0
        assert main([*given, "--mesh", "graph=2"]) == 2
    finally:
        pmod.shutdown()


def test_the_command_from_end_to_end(tmp_path):
    given = [*SMALL.split(), "--nodes", "90", "--float64", "--mesh", "graph=2"]
    done = forked.run_module("pmod.demo", ["graph", *given], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    surface = plate(90, 0)
    owner = owners(surface, 2)
    parts = pmod.simulate(part_of, surface, owner, torch.float32, graph=2)
    lines = done.stdout.splitlines()
    assert lines[0] == f"nodes   {len(surface)}, in {len(surface.triangles)} triangles: a plate with two holes"
    assert lines[1] == "mesh    data=1 x graph=2: 2 ranks, started here"
    assert lines[2] == "parts   2 of the nodes, by METIS"
    weights = sum(p.numel() for p in net.GraphNet(5, 2).parameters())
    for rank, (part, other) in enumerate(zip(parts, reversed(parts), strict=True)):
        (row,) = [line.split() for line in lines if line.split()[:1] == [f"0,{rank}"]]
        row_bytes = 8 * 4 * 5 * 2  # float64, batch, channels, rounds
        sent = [len(other.ghosts) * row_bytes, len(part.ghosts) * row_bytes, 8, 8 * weights]
        assert row[1:3] == [str(len(part.owned)), str(len(part.ghosts))]
        assert row[4:] == [f"{n / 1e3:.2f}" for n in (*sent, sum(sent))]
    ghosts = sum(len(part.ghosts) for part in parts)
    assert f"ghost rows are {ghosts / len(surface):.1%} of all nodes" in done.stdout
    checks = [re.search(r"(\S+) \(bound 1e-10\).*  ok$", line) for line in lines]
    assert sum(check is not None for check in checks) == 2
    assert lines[-1].endswith("picture: pmod-demo-graph.png") and "\033" not in done.stdout
    assert (tmp_path / "pmod-demo-graph.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("make", [lambda: plate(60, 0), closed], ids=["flat", "closed"])
def test_the_picture_shows_the_parts_and_the_fields(make, tmp_path):
    surface, path = make(), tmp_path / "a.png"
    outcome = pmod.simulate(parallel.train, tiny(), surface, data=1, graph=3)[0]
    picture.draw(path, outcome)
    seen = (255 * matplotlib.image.imread(path)[..., :3]).round().astype(int)
    assert seen.shape == (816, 1680, 3)
    parts = seen[60:480, :680].reshape(-1, 3)
    for panel in np.split(seen[590:730, :1650], 5, axis=1):  # above the colour bars
        assert len(np.unique(panel.reshape(-1, 3), axis=0)) > 100
        assert (panel != 255).any(-1).mean() > 0.2
    for of_a_rank in (lambda r, g, b: b - r, lambda r, g, b: r - b, lambda r, g, b: g - r):
        strength = of_a_rank(*parts.T)
        assert (strength > 40).sum() > 300  # blue, orange, green
