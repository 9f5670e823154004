"""`pmod.graph`: parts of a graph, ghosts, layers of others on them, and neighbours between clouds that are cut."""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import pmod
from tests.lib import spmd

Tensor = torch.Tensor


def grid(height: int, width: int) -> Tensor:
    """The edges between neighbours of a grid, both ways."""
    at = torch.arange(height * width).view(height, width)
    across = torch.stack([at[:, :-1].reshape(-1), at[:, 1:].reshape(-1)])
    down = torch.stack([at[:-1].reshape(-1), at[1:].reshape(-1)])
    return torch.cat([across, down, across.flip(0), down.flip(0)], 1)


def random_graph(n: int, edges: int) -> Tensor:
    return torch.randint(n, (2, edges), generator=torch.Generator().manual_seed(n))


@pytest.fixture
def without_metis(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pymetis" else find(name))


# --- owners -------------------------------------------------------------------------------------------------------


def pieces(owner: Tensor, edges: Tensor) -> int:
    """How many pieces the parts hang together in, counted one node after the other."""
    left, found = set(range(len(owner))), 0
    while left:
        todo, found = [left.pop()], found + 1
        while todo:
            node = todo.pop()
            for other in edges[1][edges[0] == node].tolist() + edges[0][edges[1] == node].tolist():
                if other in left and owner[other] == owner[node]:
                    left.remove(other)
                    todo.append(other)
    return found


def test_no_part_is_empty() -> None:
    """METIS alone leaves 14 of these 24 empty."""
    pymetis = pytest.importorskip("pymetis")
    edges = grid(6, 6)
    _, alone = pymetis.part_graph(24, adjacency=[edges[1][edges[0] == node].tolist() for node in range(36)])
    assert len(set(alone)) < 20
    for parts in (2, 5, 24, 35, 36):
        counts = torch.bincount(pmod.graph.owners(edges, 36, parts), minlength=parts)
        assert len(counts) == parts and counts.min() > 0 and counts.max() <= 36 // parts + 2
    assert torch.bincount(pmod.graph.owners(edges, 36, 40)).max() == 1


@pytest.mark.parametrize("points", [None, torch.arange(200.0)[:, None]], ids=["order", "coordinates"])
@pytest.mark.usefixtures("without_metis")
def test_without_metis(points: Tensor | None) -> None:
    """Parts follow one another, of equal work; one node as heavy as all others leaves nobody without."""
    edges = random_graph(200, 600)
    owner = pmod.graph.owners(edges, 200, 7, points=points)
    assert torch.equal(owner, owner.sort().values) and len(set(owner.tolist())) == 7
    work = torch.bincount(owner, weights=1.0 + torch.bincount(edges[1], minlength=200), minlength=7)
    assert work.max() < 1.15 * work.mean()
    heavy = torch.ones(200)
    heavy[100] = 1000
    owner = pmod.graph.owners(edges, 200, 7, weights=heavy, points=points)
    assert torch.bincount(owner, minlength=7).min() > 0


def test_pieces_go_to_the_parts_around_them() -> None:
    from pmod.graph.owners import _without_pieces

    edges = grid(6, 6)
    owner = (torch.arange(36) % 6 >= 3).long()
    owner[0] = 1  # a node of part 1 within part 0
    source, target = edges.numpy()
    found = _without_pieces(owner.numpy(), source, target, 2, np.ones(36))
    assert pieces(owner, edges) == 3 and pieces(torch.from_numpy(found), edges) == 2
    full = np.ones(36)
    full[0] = 18  # there is no room for it
    assert _without_pieces(owner.numpy(), source, target, 2, full).tolist() == owner.tolist()


def test_metis_cuts_few_edges() -> None:
    pytest.importorskip("pymetis")
    edges = grid(20, 20)
    owner = pmod.graph.owners(edges, 400, 4)
    assert (owner[edges[0]] != owner[edges[1]]).double().mean() < 0.08
    assert pieces(owner, edges) == 4
    weights = torch.ones(400)
    weights[:200] = 9  # the half above has nine tenths of the work
    owner = pmod.graph.owners(edges, 400, 4, weights=weights)
    assert torch.bincount(owner, weights=weights).max() < 1.1 * weights.sum() / 4


# --- parts and ghosts ---------------------------------------------------------------------------------------------

GRAPHS: dict[str, tuple[Tensor, int]] = {
    "grid": (grid(4, 5), 20),
    "random": (random_graph(17, 60), 17),  # directed, with loops and repeated edges
    "no edges": (torch.empty(2, 0, dtype=torch.int64), 5),
    "nothing": (torch.empty(2, 0, dtype=torch.int64), 0),
}


def layer(x: Tensor, edge_index: Tensor) -> Tensor:
    """Some layer of a graph: sums of what comes in, and each node itself."""
    source, target = edge_index
    return torch.sin(x + torch.zeros_like(x).index_add(0, target, x[source] * x[target].cos()))


def whole_loss(x: Tensor, edge_index: Tensor) -> Tensor:
    return (layer(layer(x, edge_index), edge_index) * torch.arange(x.numel()).view(x.shape)).sum()


def gradients(name: str, owner: Tensor | None) -> None:
    """Value, gradient and second derivative of two layers, each after a halo."""
    edge_index, n = GRAPHS[name]
    features = torch.linspace(-1, 1, n * 2, dtype=torch.float64).view(n, 2)
    part = pmod.graph.partition(edge_index, n, axis="graph", owner=owner)
    everywhere = features.clone().requires_grad_()
    right = whole_loss(everywhere, edge_index)
    (first,) = torch.autograd.grad(right, everywhere, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), everywhere)

    mine = features[part.owned].requires_grad_()
    x = mine
    for _ in range(2):
        x = layer(pmod.graph.halo(x, part.plan), part.edge_index)
    weights = torch.arange(n * 2).view(n, 2)[part.owned]
    loss = pmod.psum((x[: len(part.owned)] * weights).sum(), "graph")
    torch.testing.assert_close(loss, right)
    (slope,) = torch.autograd.grad(loss, mine, create_graph=True)
    torch.testing.assert_close(slope, first[part.owned])
    (bend,) = torch.autograd.grad(pmod.psum((slope**2).sum(), "graph"), mine)
    torch.testing.assert_close(bend, second[part.owned])


@pytest.mark.parametrize("how", ["default", "random", "last"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("name", GRAPHS)
def test_layers(name: str, ranks: int, how: str) -> None:
    n = GRAPHS[name][1]
    owner = None
    if how == "random":
        owner = torch.randint(ranks, (n,), generator=torch.Generator().manual_seed(1))
    elif how == "last":  # the others own nothing
        owner = torch.full((n,), ranks - 1)
    pmod.simulate(gradients, name, owner, graph=ranks)


def on_two() -> None:
    for name in GRAPHS:
        gradients(name, None)


def test_on_processes() -> None:
    spmd.launch(on_two, graph=2)


@pytest.mark.parametrize("name", GRAPHS)
def test_what_a_part_holds(name: str) -> None:
    edge_index, n = GRAPHS[name]

    def part() -> Any:
        return pmod.graph.partition(edge_index, n)

    parts = pmod.simulate(part, a=2, b=2)  # all axes of the mesh, as one
    assert sorted(torch.cat([part.owned for part in parts]).tolist()) == list(range(n))
    assert sorted(torch.cat([part.edges for part in parts]).tolist()) == list(range(edge_index.shape[1]))
    for rank, part in enumerate(parts):
        assert torch.equal(part.owner, parts[0].owner)
        assert part.owned.tolist() == (part.owner == rank).nonzero().view(-1).tolist()
        assert torch.equal(part.nodes[part.edge_index], edge_index[:, part.edges])
        assert part.edges.tolist() == sorted(part.edges.tolist())
        needed = {node for node in edge_index[0][part.edges].tolist() if part.owner[node] != rank}
        assert part.ghosts.tolist() == sorted(needed, key=lambda node: (part.owner[node].item(), node))
        assert (part.plan.owned, part.plan.ghosts) == (len(part.owned), len(part.ghosts))


def test_along_another_dim() -> None:
    def rows() -> None:
        part = pmod.graph.partition(*GRAPHS["grid"], axis="graph")
        x = torch.arange(60).view(3, 20)
        wide = pmod.graph.halo(x[:, part.owned], part.plan, dim=1)
        assert torch.equal(wide, x[:, part.nodes])
        stale = torch.cat([x[:, part.owned], torch.zeros_like(x[:, part.ghosts])], 1)
        assert torch.equal(pmod.graph.halo(stale, part.plan, dim=-1), wide)

    pmod.simulate(rows, graph=3)


RING = torch.stack([torch.arange(4), torch.arange(4).roll(1)])
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "edges of another dtype": (
        lambda: pmod.graph.partition(RING.int(), 4), pmod.ArgumentError, "graph.partition: edge_index is a torch.int"),
    "no tensor": (lambda: pmod.graph.partition([[0], [1]], 4), pmod.ArgumentError, "edge_index is a list."),
    "edges of another shape": (
        lambda: pmod.graph.partition(RING.T, 4), pmod.ShapeError, "edge_index has the shape (4, 2).\nPass (2, edges)."),
    "a node that is not there": (
        lambda: pmod.graph.partition(RING, 3), pmod.ShapeError, "edge_index holds 3 and there are 3 nodes.\nNodes"),
    "a negative node": (lambda: pmod.graph.partition(RING - 1, 4), pmod.ShapeError, "edge_index holds -1 and there"),
    "no number": (lambda: pmod.graph.partition(RING, 4.0), pmod.ShapeError, "graph.partition: n is 4.0."),
    "an owner that is not there": (
        lambda: pmod.graph.partition(RING, 4, owner=torch.tensor([0, 0, 1, 2])), pmod.ShapeError,
        "owner holds 2.\nThe ranks of the axis are 0 to 1."),
    "owners of another number": (
        lambda: pmod.graph.partition(RING, 4, owner=torch.zeros(3).long()), pmod.ShapeError,
        "owner has the shape (3,) and there are 4 nodes."),
    "owners of another dtype": (
        lambda: pmod.graph.partition(RING, 4, owner=torch.zeros(4)), pmod.ArgumentError, "owner is a Tensor."),
    "weights of another shape": (
        lambda: pmod.graph.partition(RING, 4, weights=torch.ones(3)), pmod.ShapeError,
        "graph.owners: weights has the shape (3,) and there are 4 nodes."),
    "weights below 0": (
        lambda: pmod.graph.partition(RING, 4, weights=-torch.ones(4)), pmod.ArgumentError, "weights hold -1."),
    "points that are none": (
        lambda: pmod.graph.partition(RING, 4, points=torch.full((4, 2), torch.nan)), pmod.ArgumentError,
        "points holds a NaN or an infinity."),
    "parts": (lambda: pmod.graph.owners(RING, 4, 0), pmod.ShapeError, "graph.owners: parts is 0."),
    "another plan": (
        lambda: pmod.graph.halo(torch.ones(4), None), pmod.ArgumentError, "plan is a NoneType.\nPass the plan of"),
    "rows": (
        lambda: pmod.graph.halo(torch.ones(5), pmod.graph.partition(RING, 4, owner=torch.tensor([0, 0, 1, 1])).plan),
        pmod.ShapeError, "x.shape[0] is 5, and there are 2 nodes and 1 ghosts.\nPass a row for each of this rank's"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong(name: str) -> None:
    call, error, text = WRONG[name]

    def calls() -> None:
        with pytest.raises(error, match=re.escape(text)):
            call()

    pmod.simulate(calls, graph=2)


@pytest.mark.parametrize("what", ["edges", "order", "owners", "n"])
def test_unlike_graphs(what: str) -> None:
    """Every rank says so: a plan of unlike graphs might fit by accident."""
    def calls() -> None:
        me = pmod.axis_index("graph")
        edges, owner, n = RING.clone(), torch.tensor([0, 0, 1, 1]), 4
        if what == "edges" and me:
            edges[0, 0] = 2
        elif what == "order" and me:
            edges = edges.flip(1)
        elif what == "owners" and me:
            owner = owner.flip(0)
        elif what == "n" and me:
            n, owner = 5, torch.tensor([0, 0, 1, 1, 1])
        with pytest.raises(pmod.MismatchError, match=r"the graph or its owners are not those at index . of"):
            pmod.graph.partition(edges, n, owner=owner)

    pmod.simulate(calls, graph=2)


# --- layers of others ---------------------------------------------------------------------------------------------


def check_gat() -> None:
    from torch_geometric.nn import GAT

    torch.manual_seed(0)
    edge_index, n = random_graph(40, 200), 40
    net = GAT(3, 8, num_layers=3, out_channels=2, heads=2).double()
    x = torch.randn(n, 3, dtype=torch.float64)
    right = net(x, edge_index).square().sum()
    expected = torch.autograd.grad(right, list(net.parameters()))

    part = pmod.graph.partition(edge_index, n, axis="graph")
    pmod.share_parameters(net, "graph")
    for conv in net.convs:
        conv.register_forward_pre_hook(lambda _, args: (pmod.graph.halo(args[0], part.plan), *args[1:]))
    loss = pmod.psum(net(x[part.owned], part.edge_index)[: len(part.owned)].square().sum(), "graph")
    loss.backward()
    torch.testing.assert_close(loss, right, rtol=1e-12, atol=1e-12)
    for p, g in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)


def test_gat_of_pyg() -> None:
    pytest.importorskip("torch_geometric")
    spmd.launch(check_gat, graph=2)


def check_mesh_graph_net() -> None:
    from physicsnemo.models.meshgraphnet import MeshGraphNet
    from torch_geometric.data import Data

    torch.manual_seed(0)
    edge_index, n = random_graph(40, 200), 40
    net = MeshGraphNet(3, 2, 2, processor_size=3, hidden_dim_processor=8, hidden_dim_node_encoder=8,
                       hidden_dim_edge_encoder=8, hidden_dim_node_decoder=8).double()  # fmt: skip
    nodes, edges = torch.randn(n, 3, dtype=torch.float64), torch.randn(200, 2, dtype=torch.float64)
    right = net(nodes, edges, Data(edge_index=edge_index, num_nodes=n)).square().sum()
    expected = torch.autograd.grad(right, list(net.parameters()))

    part = pmod.graph.partition(edge_index, n, axis="graph")
    pmod.share_parameters(net, "graph")
    for block in net.processor.processor_layers[::2]:  # those of edges, which stand before those of nodes
        block.register_forward_pre_hook(lambda _, args: (args[0], pmod.graph.halo(args[1], part.plan), *args[2:]))
    local = Data(edge_index=part.edge_index, num_nodes=len(part.nodes))
    loss = pmod.psum(net(nodes[part.nodes], edges[part.edges], local)[: len(part.owned)].square().sum(), "graph")
    loss.backward()
    torch.testing.assert_close(loss, right, rtol=1e-12, atol=1e-12)
    for p, g in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)


def test_mesh_graph_net_of_physicsnemo() -> None:
    pytest.importorskip("torch_geometric")
    pytest.importorskip("torch_scatter")
    pytest.importorskip("physicsnemo")
    spmd.launch(check_mesh_graph_net, graph=2)


# --- neighbours ---------------------------------------------------------------------------------------------------


def clouds(kind: str, count: int, queries: int, dims: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    points = torch.rand(count, dims, dtype=torch.float64, generator=generator)
    asked = torch.rand(queries, dims, dtype=torch.float64, generator=generator)
    if kind == "ties":  # a lattice, whose distances are often equal
        points, asked = (points * 3).round(), (asked * 3).round()
    return points, asked


def by_hand(points: Tensor, queries: Tensor) -> list[list[tuple[float, int]]]:
    """Of each query the points by distance, then by number."""
    rows: list[list[tuple[float, int]]] = []
    for query in queries.numpy():
        # added up one dim after the other
        squares = [sum(float((a - b) ** 2) for a, b in zip(query, point, strict=True)) for point in points.numpy()]
        rows.append(sorted(zip(squares, itertools.count())))
    return rows


def search(kind: str, sizes: tuple[int, ...], asked: tuple[int, ...], dims: int, tell: bool) -> None:
    points, queries = clouds(kind, sum(sizes), sum(asked), dims)
    me = pmod.axis_index("x")
    mine, here = (x.split(of)[me].clone().requires_grad_() for x, of in ((points, sizes), (queries, asked)))
    rows = by_hand(points, here.detach())
    told = sizes if tell else None
    for k in (1, 3, sum(sizes)):
        numbers, distances = pmod.graph.knn(mine, here, k, axis="x", sizes=told)
        assert numbers.tolist() == [[number for _, number in row[:k]] for row in rows]
        expected = torch.tensor([[square for square, _ in row[:k]] for row in rows], dtype=torch.float64)
        torch.testing.assert_close(distances, expected.view(-1, k).sqrt())
    pairs, apart = pmod.graph.radius_search(mine, here, 0.5 if kind == "random" else 1.0, axis="x", sizes=told)
    limit = 0.25 if kind == "random" else 1.0
    near = [(i, number) for i, row in enumerate(rows) for number in sorted(n for square, n in row if square <= limit)]
    assert list(map(tuple, pairs.T.tolist())) == near
    # gradients, of what other ranks ask for too
    loss = pmod.psum(distances.square().sum() + (apart + 1).log().sum(), "x")
    found = torch.autograd.grad(loss, [mine, here])
    everywhere = [x.clone().requires_grad_() for x in (points, queries)]
    all_apart = (everywhere[1][:, None] - everywhere[0]).square().sum(-1)
    is_near = all_apart.detach() <= limit
    lengths = torch.linalg.vector_norm((everywhere[1][:, None] - everywhere[0])[is_near], dim=-1)
    whole = all_apart.sum() + (lengths + 1).log().sum()
    for grad, x, of in zip(found, torch.autograd.grad(whole, everywhere), (sizes, asked), strict=True):
        torch.testing.assert_close(grad, x.split(of)[me])


@pytest.mark.parametrize("tell", [True, False])
@pytest.mark.parametrize("kind", ["random", "ties"])
@pytest.mark.parametrize(
    ("sizes", "asked", "dims"),
    [((7,), (3,), 2), ((5, 4), (2, 6), 3), ((3, 0, 6), (0, 4, 1), 2), ((0, 0, 5, 1), (1, 0, 2, 2), 1)],
)
def test_neighbours(sizes: tuple[int, ...], asked: tuple[int, ...], dims: int, kind: str, tell: bool) -> None:
    pmod.simulate(search, kind, sizes, asked, dims, tell, x=len(sizes))


def test_neighbours_on_processes() -> None:
    spmd.launch(search, "ties", (5, 4), (2, 6), 3, False, x=2)


def test_some_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pmod.graph.search._AT_ONCE", 7)
    pmod.simulate(search, "ties", (5, 4), (2, 6), 3, False, x=2)


POINTS = torch.ones(3, 2)
WRONG_SEARCH: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "k": (lambda: pmod.graph.knn(POINTS, POINTS, 0, axis="x"), pmod.ShapeError, "k is 0.\nPass an int of 1 or more."),
    "too many": (
        lambda: pmod.graph.knn(POINTS, POINTS, 7, axis="x"), pmod.ShapeError,
        "k is 7 and all ranks together hold 6 points.\nPass a k of at most 6."),
    "a shape": (lambda: pmod.graph.knn(POINTS[0], POINTS, 1, axis="x"), pmod.ShapeError, "points has the shape (2,)."),
    "two spaces": (
        lambda: pmod.graph.knn(POINTS, POINTS[:, :1], 1, axis="x"), pmod.ShapeError,
        "points have 2 coordinates and queries 1."),
    "ints": (lambda: pmod.graph.knn(POINTS.long(), POINTS, 1, axis="x"), pmod.ArgumentError, "points is int64.\nPass"),
    "two dtypes": (
        lambda: pmod.graph.knn(POINTS, POINTS.double(), 1, axis="x"), pmod.ArgumentError,
        "points are torch.float32 on cpu and queries torch.float64 on cpu."),
    "sizes": (
        lambda: pmod.graph.knn(POINTS, POINTS, 1, axis="x", sizes=(2, 2)), pmod.ShapeError,
        "is 2 but x.shape[0] is 3.\nPass how many points each rank holds"),
    "a radius": (
        lambda: pmod.graph.radius_search(POINTS, POINTS, -1.0, axis="x"), pmod.ArgumentError, "radius is -1.0.\nPass"),
    "no radius": (
        lambda: pmod.graph.radius_search(POINTS, POINTS, True, axis="x"), pmod.ArgumentError, "radius is True.\nPass"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_SEARCH)
def test_wrong_searches(name: str) -> None:
    call, error, text = WRONG_SEARCH[name]

    def calls() -> None:
        with pytest.raises(error, match=re.escape(text)):
            call()

    pmod.simulate(calls, x=2)
