"""What users of `physicsnemo.distributed` met with, and what pmod does there: its defects one by one, then its jobs.

The numbers of the defects are those of the issue that asks for this; each test is the fact, with numbers by hand where
that is possible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import pmod
from tests.lib.listening import counted, same

Tensor = torch.Tensor


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.float64)


# --- defects of process state -------------------------------------------------------------------------------------


def groups_on_rank() -> None:
    mesh = pmod.current_mesh()
    for axis in ("data", "model", ("model", "data")):
        sub = mesh[axis]
        assert sub.size == pmod.axis_size(axis) == mesh.axis_size(axis)
        if dist.is_initialized():
            group = mesh.group(axis)
            assert dist.get_process_group_ranks(group) == sub.ranks.reshape(-1).tolist()
            total = torch.tensor([mesh.topology.rank])
            dist.all_reduce(total, group=group)
            assert total.item() == sub.ranks.sum()


def test_07_groups_by_name(run: Any) -> None:
    run(groups_on_rank, data=2, model=2)


def test_07_groups_in_one_process() -> None:
    mesh = pmod.make_mesh(data=1, model=1)
    with pmod.set_mesh(mesh):
        groups_on_rank()
        assert mesh.group("model").size() == mesh.group(("data", "model")).size() == 1
        assert (mesh["model"].size, pmod.axis_index("data"), pmod.psum(3, ("data", "model"))) == (1, 0, 3)
    pmod.shutdown()


def test_07_a_size_message_has_its_numbers_in_place() -> None:
    place = pmod.Topology(rank=0, world_size=8)
    with pytest.raises(pmod.PmodError, match="data=3, model=2 need 6 ranks, but the world has 8"):
        pmod.make_mesh(data=3, model=2, topology=place)


# --- defects of derivatives ---------------------------------------------------------------------------------------


def kept_input_on_rank() -> None:
    x = ones(1).requires_grad_()
    y = x * 2
    before = y._version
    total = pmod.psum(y, "x")
    (total.sin() * 1 + (y**2).sum() / 2).backward()  # y is needed for its own derivative
    assert y._version == before and y.item() == 2
    same(x.grad, 2 * torch.cos(total.detach()) + 2 * 2 * ones(1), "gradient")


def test_08_a_sum_leaves_its_input(run: Any) -> None:
    run(kept_input_on_rank, x=2)


def siblings_on_rank() -> None:
    i = pmod.axis_index("x")
    x = ones(1).requires_grad_()
    y = x * 1
    varied = pmod.pvary(y, "x")
    seed = ones(1)
    # one cotangent for both branches
    torch.autograd.backward([varied + y], [seed])
    assert seed.item() == 1
    assert x.grad.item() == 2 + 1, f"rank {i}: the branch that is not shared gets its gradient once"


def test_09_the_branch_beside_a_copy_keeps_its_gradient(run: Any) -> None:
    run(siblings_on_rank, x=2)


def scattered_on_rank() -> None:
    i = pmod.axis_index("x")
    for shape in ((3,), (0,), (5,)):
        x = ones(*((3,) if i == 1 else shape)).requires_grad_()
        y = pmod.scatter_v(x, "x", sizes=(1, 2), src=1)
        (g,) = torch.autograd.grad((y * (i + 2)).sum(), x)
        assert g.tolist() == ([2, 3, 3] if i == 1 else [0] * shape[0])


def test_10_scatter_v_has_zeros_off_its_root(run: Any) -> None:
    run(scattered_on_rank, x=2)


def second_order_on_rank() -> None:
    """S is the sum over both ranks of (sum of all x) ** 3: on 2 ranks, its slope is 6 s**2, and of that 12 s."""
    i = pmod.axis_index("x")
    x = (ones(1 + i) * (1 + i)).requires_grad_()  # 1; 2, 2
    y = pmod.all_gather_v(x, "x", sizes=(1, 2)).sum() ** 3
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    assert first.tolist() == [6 * 25] * (1 + i)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.tolist() == [3 * 12 * 5] * (1 + i)  # all three slopes depend on each x


def test_11_double_backward_through_all_gather_v(run: Any) -> None:
    run(second_order_on_rank, x=2)


def columns_on_rank() -> None:
    i = pmod.axis_index("x")
    x = (torch.arange(6.0).view(2, 3) + 10 * i).requires_grad_()
    rows = [torch.tensor([2]), torch.tensor([0, 2])]
    y = pmod.indexed_all_to_all_v(x, "x", indices=rows, dim=1)
    expected = [[[2, 12], [5, 15]], [[0, 2, 10, 12], [3, 5, 13, 15]]][i]
    assert y.tolist() == expected
    (g,) = torch.autograd.grad((y * (i + 1)).sum(), x)
    assert g.tolist() == [[2, 0, 3]] * 2  # column 0 to rank 1, column 2 to both


def test_12_rows_along_another_dim(run: Any) -> None:
    run(columns_on_rank, x=2)


def accumulated_on_rank() -> None:
    layer = nn.Linear(1, 1, bias=False)
    pmod.share_parameters(layer, "x")
    for _ in range(3):
        layer(torch.ones(1, 1)).sum().backward()
    assert layer.weight.grad.item() == 6
    # where one rank lacks a gradient, the others do not wait
    for attach in (pmod.share_parameters, pmod.data_parallel):
        module = Either()
        attach(module, "x", reduce="sum")
        for _ in range(3):
            module(torch.ones(1, 1)).sum().backward()
        assert [p.grad.item() for p in module.parameters()] == [3, 3]


class Either(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.pair["ab"[pmod.axis_index("x")]](x)


def test_13_shared_gradients_are_added_once(run: Any) -> None:
    run(accumulated_on_rank, x=2)


def sizes_in_backward_on_rank() -> None:
    i, n = pmod.axis_index("x"), pmod.axis_size("x")
    for sizes in ((1,) * n, (3, 1, 0, 2)[:n]):
        weights = torch.arange(1.0, 1 + sum(sizes), dtype=torch.float64)
        own = weights.split(list(sizes))[i]
        for gathered, factor in (
            (lambda x, sizes=sizes: pmod.unshard(x, "x", sizes=sizes), 1),  # one loss, held by all
            (lambda x, sizes=sizes: pmod.all_gather_v(x, "x", sizes=sizes), n),  # a loss for each rank
        ):
            x = ones(sizes[i]).requires_grad_()
            (g,) = torch.autograd.grad((gathered(x) * weights).sum(), x)
            assert g.tolist() == (factor * own).tolist()


@pytest.mark.parametrize("ranks", [2, 4])
def test_14_sizes_count_in_backward(run: Any, ranks: int) -> None:
    run(sizes_in_backward_on_rank, x=ranks)


def uneven_on_rank() -> None:
    i, n = pmod.axis_index("x"), pmod.axis_size("x")
    whole = torch.arange(5.0 * 7).view(5, 7)
    rows, columns = pmod.split_sizes(5, n), pmod.split_sizes(7, n)
    assert rows == (2, 2, 1, 0)
    mine = pmod.shard(whole, "x")
    turned = pmod.all_to_all(mine, "x", split_dim=1, concat_dim=0, split_sizes=columns, concat_sizes=rows)
    assert torch.equal(turned, whole.split(list(columns), 1)[i])
    back = pmod.all_to_all(turned, "x", split_dim=0, concat_dim=1, split_sizes=rows, concat_sizes=columns)
    assert torch.equal(back, mine)
    assert torch.equal(pmod.unshard(back, "x", length=5), whole)
    assert torch.equal(pmod.all_gather_v(turned, "x", dim=1), whole)


def test_17_uneven_shards_and_transposes(run: Any) -> None:
    run(uneven_on_rank, x=4)


def untold_sizes_on_rank() -> None:
    i = pmod.axis_index("x")
    x = ones(1 + i, 2).requires_grad_()
    y = pmod.all_gather_v(x, "x")
    (g,) = torch.autograd.grad((y * (i + 1)).sum(), x)
    assert g.tolist() == [[3, 3]] * (1 + i)
    # nobody asks for a gradient: nothing is sent
    other = ones(3, 2).requires_grad_()
    z = pmod.all_gather_v(ones(1 + i, 2), "x") * other
    _, sent = counted(lambda: z.sum().backward())
    assert not sent


def test_18_sizes_left_out(run: Any) -> None:
    run(untold_sizes_on_rank, x=2)


def test_18_one_process_without_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pmod._ranks.groups, "connect", lambda *_: pytest.fail("a process group was asked for"))
    x = ones(3).requires_grad_()
    rows = torch.tensor([2, 2, 0])
    with pmod.set_mesh(pmod.make_mesh(x=1)):
        y = (
            pmod.all_gather_v(x, "x") + pmod.gather_v(x, "x") + pmod.scatter_v(x, "x", sizes=(3,))
            + pmod.psum_scatter_v(x, "x", sizes=[3]) + pmod.all_to_all_v(x, "x", send_sizes=(3,))
            + pmod.indexed_all_to_all_v(x, "x", indices=[rows])
            + pmod.indexed_all_to_all_v(x, "x", indices=pmod.exchange_plan([rows], "x"))
        )  # fmt: skip
        layer = pmod.data_parallel(nn.Linear(3, 1, dtype=torch.float64), "x")
        pmod.share_parameters(layer, "x")
        layer(y).sum().backward()
    assert y.tolist() == [7, 7, 7] and layer.weight.grad.tolist() == [[7, 7, 7]]
    w = layer.weight.detach()[0]
    same(x.grad, 5 * w + 2 * torch.stack([w[2], 0 * w[0], w[0] + w[1]]), "gradient")


# --- also asked for -----------------------------------------------------------------------------------------------


def test_an_unknown_name_is_not_the_world() -> None:
    def rank() -> None:
        mesh = pmod.current_mesh()
        for use in (mesh.axis_size, mesh.axis_index, mesh.__getitem__, lambda name: pmod.psum(1, name)):
            with pytest.raises(pmod.AxisError, match="no axis 'modle'; did you mean 'model'"):
                use("modle")

    pmod.simulate(rank, data=2, model=2)


def test_early_use_does_not_run_alone() -> None:
    for use in (lambda: pmod.psum(ones(1), "data"), lambda: pmod.axis_size("data"),
                lambda: pmod.share_parameters(nn.Linear(1, 1), "data")):  # fmt: skip
        with pytest.raises(pmod.NoMeshError):
            use()


def mean_on_rank() -> None:
    """Of losses that are means over a rank's samples, the mean of the gradients is right, of sums their sum."""
    i, n = pmod.axis_index("x"), pmod.axis_size("x")
    samples = torch.arange(4.0 * n, dtype=torch.float64).view(n, 4, 1)
    for reduce, over in (("mean", torch.mean), ("sum", torch.sum)):
        plain, shared = (nn.Linear(1, 1, dtype=torch.float64) for _ in range(2))
        pmod.share_parameters(shared, "x", reduce=reduce)
        plain.load_state_dict(shared.state_dict())
        parallel = pmod.data_parallel(nn.Linear(1, 1, dtype=torch.float64), "x", reduce=reduce)
        parallel.load_state_dict(shared.state_dict())
        for module in (shared, parallel):
            over(module(samples[i]) ** 2).backward()
        over(plain(samples.view(-1, 1)) ** 2).backward()
        for module in (shared, parallel):
            same(module.weight.grad, plain.weight.grad, reduce)
            same(module.bias.grad, plain.bias.grad, reduce)


def test_sum_or_mean(run: Any) -> None:
    run(mean_on_rank, x=2)


def reduced_on_rank() -> None:
    """reduce_loss and fused_all_reduce: here a loss that is reduced keeps its derivative."""
    i = pmod.axis_index("x")
    x = ones(1).requires_grad_()
    loss = pmod.pmean(x.sum() * (1 + i), "x")
    assert loss.item() == 1.5 and loss.requires_grad
    (g,) = torch.autograd.grad(loss, x)
    assert g.item() == (1 + i) / 2
    out, sent = counted(lambda: pmod.psum({"a": ones(2), "b": [ones(3) * i], "n": 5}, "x"))
    assert out["a"].tolist() == [2, 2] and out["b"][0].tolist() == [1] * 3 and out["n"] == 10
    assert [count for *_, count in sent] == [5, 2]  # an int travels as two numbers


def test_metrics(run: Any) -> None:
    run(reduced_on_rank, x=2)


# --- its jobs: a graph in parts -----------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Graph:
    """Nodes owned in blocks, edges by the owner of their target."""

    owned: tuple[int, ...]
    edges: Tensor  # (2, e): source, target

    @staticmethod
    def drawn(owned: tuple[int, ...], edges: int, seed: int) -> Graph:
        generator = torch.Generator().manual_seed(seed)
        return Graph(owned, torch.randint(sum(owned), (2, edges), generator=generator))

    @property
    def starts(self) -> list[int]:
        return [0, *np.cumsum(self.owned).tolist()]

    def owners(self, nodes: Tensor) -> Tensor:
        return torch.bucketize(nodes, torch.tensor(self.starts[1:]), right=True)

    def edges_of(self, rank: int) -> Tensor:
        return self.edges[:, self.owners(self.edges[1]) == rank]

    def needed(self, owner: int, rank: int) -> Tensor:
        """The nodes of `owner` that edges of `rank` start from, each once."""
        sources = self.edges_of(rank)[0].unique()
        return sources[self.owners(sources) == owner]


def passed(x_from: Tensor, x_to: Tensor, sources: Tensor, targets: Tensor, w: Tensor) -> Tensor:
    """One step of message passing: x_from are the nodes that edges start from, x_to the ones they end in."""
    message = torch.tanh(x_from[sources] @ w[0] + x_to[targets] @ w[1])
    return x_to + torch.zeros_like(x_to).index_add(0, targets, message)


def by_all_gather_v(graph: Graph, x: Tensor, w: Tensor) -> Tensor:
    i = pmod.axis_index("x")
    sources, targets = graph.edges_of(i)
    return passed(pmod.all_gather_v(x, "x", sizes=graph.owned), x, sources, targets - graph.starts[i], w)


def by_rows(graph: Graph, x: Tensor, w: Tensor, plan: bool = False) -> Tensor:
    i, n = pmod.axis_index("x"), pmod.axis_size("x")
    sources, targets = graph.edges_of(i)
    rows: Any = [graph.needed(i, rank) - graph.starts[i] for rank in range(n)]
    held = torch.cat([graph.needed(rank, i) for rank in range(n)])
    ghosts = pmod.indexed_all_to_all_v(x, "x", indices=pmod.exchange_plan(rows, "x") if plan else rows)
    assert len(ghosts) == len(held)
    return passed(ghosts, x, torch.searchsorted(held, sources), targets - graph.starts[i], w)


def by_plan(graph: Graph, x: Tensor, w: Tensor) -> Tensor:
    return by_rows(graph, x, w, plan=True)


def by_the_first_rank(graph: Graph, x: Tensor, w: Tensor) -> Tensor:
    """Features meet on one rank, which sends each its part of the result."""
    whole = pmod.gather_v(x, "x", sizes=graph.owned)
    # the same code on the others, of nothing: their part of each derivative is to answer
    sources, targets = graph.edges if pmod.axis_index("x") == 0 else graph.edges[:, :0]
    return pmod.scatter_v(passed(whole, whole, sources, targets, w), "x", sizes=graph.owned)


WAYS: dict[str, Callable[[Graph, Tensor, Tensor], Tensor]] = {
    f.__name__: f for f in (by_all_gather_v, by_rows, by_plan, by_the_first_rank)
}


def graph_on_rank(owned: tuple[int, ...], edges: int) -> None:
    i = pmod.axis_index("x")
    graph = Graph.drawn(owned, edges, seed=edges)
    generator = torch.Generator().manual_seed(1)
    nodes = torch.randn(sum(owned), 3, dtype=torch.float64, generator=generator)
    weights = torch.randn(2, 3, 3, dtype=torch.float64, generator=generator)
    scale = torch.randn(sum(owned), 3, dtype=torch.float64, generator=generator)
    own = slice(graph.starts[i], graph.starts[i + 1])

    def derivatives(step: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor, scale: Tensor) -> list[Tensor]:
        """Two steps; the gradients, and the gradients of what they add up to (x counts once per rank, w once)."""
        x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = step(step(x, w), w)
        gx, gw = torch.autograd.grad((y * scale).sum(), (x, w), create_graph=True)
        hx, hw = torch.autograd.grad((gx * scale).sin().sum(), (x, w))
        return [y, gx, gw, hx, hw]

    serial = derivatives(lambda x, w: passed(x, x, *graph.edges, w), nodes, weights, scale)
    for name, way in WAYS.items():
        parts = derivatives(lambda x, w, way=way: way(graph, x, pmod.pvary(w, "x")), nodes[own], weights, scale[own])
        for what, got, e in zip(("y", "gx", "gw", "hx", "hw"), parts, serial, strict=True):
            same(got, (e if what.endswith("w") else e[own]).detach(), f"{name}: {what}", rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("owned", [(5, 0, 3, 6), (1, 1, 1, 1), (0, 0, 9, 0), (2, 7, 4, 3)], ids=str)
def test_message_passing_on_a_graph_in_parts(run: Any, owned: tuple[int, ...]) -> None:
    run(graph_on_rank, owned, 40, x=4)


# --- its jobs: sizes r + 2, redistribution, rings, shared parameters ----------------------------------------------


def r_plus_two_on_rank() -> None:
    """Rank r holds r + 2 rows; every function there and back, and with each gradient by hand."""
    i, n = pmod.axis_index("x"), pmod.axis_size("x")
    sizes = [r + 2 for r in range(n)]
    whole = torch.arange(2.0 * sum(sizes), dtype=torch.float64).view(-1, 2)
    start = sum(sizes[:i])
    x = whole[start : start + i + 2].clone().requires_grad_()
    mine = slice(start, start + i + 2)

    y = pmod.all_gather_v(x, "x", sizes=sizes)
    assert torch.equal(y, whole)
    (g,) = torch.autograd.grad(y, x, whole * (i + 1))
    assert torch.equal(g, whole[mine] * n * (n + 1) / 2)

    y = pmod.gather_v(x, "x", sizes=sizes, dst=n - 1)
    assert torch.equal(y, whole if i == n - 1 else whole[:0])
    (g,) = torch.autograd.grad(y, x, 3 * y.detach())
    assert torch.equal(g, 3 * whole[mine])

    z = (whole if i == 1 else whole[:0]).clone().requires_grad_()
    y = pmod.scatter_v(z, "x", sizes=sizes, src=1)
    assert torch.equal(y, whole[mine])
    (g,) = torch.autograd.grad(y, z, ones(*y.shape) * (i + 1))
    expected = torch.cat([ones(size, 2) * (r + 1) for r, size in enumerate(sizes)])
    assert torch.equal(g, expected if i == 1 else whole[:0])

    rows = [torch.arange(i + 2).flip(0)] * n
    y = pmod.indexed_all_to_all_v(x, "x", indices=rows, recv_sizes=sizes)
    assert torch.equal(y, torch.cat([part.flip(0) for part in whole.split(sizes)]))
    (g,) = torch.autograd.grad(y, x, ones(*y.shape))
    assert g.unique().tolist() == [n]


@pytest.mark.parametrize("ranks", [2, 4])
def test_sizes_r_plus_two(run: Any, ranks: int) -> None:
    run(r_plus_two_on_rank, x=ranks)


def redistributed_on_rank() -> None:
    """From one way to hold rows to another, uneven and empty shards among them, and back by the gradient."""
    i, n = pmod.axis_index("x"), pmod.axis_size("x")
    ways = [(3, 0, 4, 1), (0, 8, 0, 0), (2, 2, 2, 2), (1, 2, 0, 5), (0, 0, 0, 8)]
    whole = torch.arange(16.0).view(2, 8)
    for before, after in zip(ways, [*ways[1:], ways[0]], strict=True):
        edges = [np.cumsum([0, *sizes]) for sizes in (before, after)]

        def overlap(a: int, b: int, edges: Any = edges) -> int:
            """How much of what rank a held rank b is to hold."""
            (start, end), (to_start, to_end) = (e[r : r + 2] for e, r in zip(edges, (a, b), strict=True))
            return max(0, min(end, to_end) - max(start, to_start))

        x = whole.split(before, 1)[i].clone().requires_grad_()
        send = [overlap(i, r) for r in range(n)]
        for recv in (None, [overlap(r, i) for r in range(n)]):
            y = pmod.all_to_all_v(x, "x", send_sizes=send, recv_sizes=recv, dim=1)
            expected = whole.split(after, 1)[i]
            assert torch.equal(y, expected)
            (g,) = torch.autograd.grad(y, x, expected**2)
            assert torch.equal(g, x.detach() ** 2)


def test_redistribution(run: Any) -> None:
    run(redistributed_on_rank, x=4)


def ring_on_rank() -> None:
    """What every rank holds goes once around, in one direction and the other."""
    i, n = pmod.axis_index("x"), pmod.axis_size("x")
    for offset in (1, -1):
        x = (ones(2) * (i + 1)).requires_grad_()
        total, passing = x * 0, x
        for step in range(n):
            total = total + (step + 1) * passing
            passing = pmod.pshift(passing, "x", offset)
        assert torch.equal(passing, x)
        held = [(i - step * offset) % n + 1 for step in range(n)]
        assert total.tolist() == [sum((k + 1) * value for k, value in enumerate(held))] * 2
        (g,) = torch.autograd.grad((total * (i + 1)).sum(), x)
        reached = [(i + step * offset) % n + 1 for step in range(n)]
        assert g.tolist() == [sum((k + 1) * weight for k, weight in enumerate(reached))] * 2


@pytest.mark.parametrize("ranks", [2, 4])
def test_ring(run: Any, ranks: int) -> None:
    run(ring_on_rank, x=ranks)


def shared_sums_on_rank() -> None:
    """A module marked as shared over one axis, another over the other: each sum over its own, once per call."""
    mesh = pmod.current_mesh()
    rank = mesh.topology.rank
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1)
    handles = [pmod.share_parameters(net[0], "a"), pmod.share_parameters(net[1], ("a", "b"))]
    for calls in (1, 2):
        net(ones(1, 1) * (rank + 1)).sum().backward()
        along_a = sum(r + 1 for r in mesh["a"].ranks.reshape(-1).tolist())
        assert net[0].weight.grad.item() == calls * along_a
        assert net[1].weight.grad.item() == calls * (1 + 2 + 3 + 4)
    net.zero_grad()
    for handle in handles:
        handle.remove()
    net(ones(1, 1) * (rank + 1)).sum().backward()
    assert [p.grad.item() for p in net.parameters()] == [rank + 1] * 2


def test_shared_parameter_sums(run: Any) -> None:
    run(shared_sums_on_rank, a=2, b=2)
