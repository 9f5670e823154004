"""A rank's part of a graph, and the ghosts that its edges need."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from pmod._collectives.exchange import check_eager, swapped
from pmod._collectives.indexed import ExchangePlan, exchange_plan, indexed_all_to_all_v
from pmod._collectives.values import pick
from pmod._core.arguments import check_tensor, dim_from_end, wrong
from pmod._errors import ArgumentError, MismatchError, ShapeError
from pmod._mesh.ambient import current_mesh, resolve
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import AxisLike, Mesh
from pmod.graph.owners import check_edges, owners


@attrs.frozen(eq=False)
class Plan:
    """What `halo` needs: `over` which axis, which rows go where, how many nodes there are.

    `exchange` is the `pmod.ExchangePlan` of the rows that this rank sends, `owned` and
    `ghosts` count its nodes.

    >>> ring = torch.arange(4)
    >>> edges = torch.stack([ring, ring.roll(1)])
    >>> plans = pmod.simulate(lambda: pmod.graph.partition(edges, 4, owner=torch.tensor([0, 0, 0, 1])).plan, graph=2)
    >>> plans[0].owned, plans[0].ghosts, plans[0].exchange.send_sizes
    (3, 1, (0, 1))
    """

    over: Mesh
    exchange: ExchangePlan
    owned: int
    ghosts: int


@attrs.frozen(eq=False)
class Part:
    """What one rank holds of a graph.

    `owned`: the numbers of its own nodes, in the whole graph, in order. `ghosts`: those
    of the nodes of other ranks from which edges come to its own, by owner. `nodes`: both,
    in the order in which rows of features stand. `edge_index`: (2, edges), the edges
    that end at its own nodes, between places in `nodes`, in the order of the whole;
    `edges`: their places in the whole, to take features of edges by. `owner`: (n,), the
    rank of each node of the whole graph. `plan`: for `halo`.

    >>> def part():
    ...     edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    ...     part = pmod.graph.partition(edges, 4, owner=torch.tensor([0, 0, 1, 1]))
    ...     return part.nodes, part.edge_index.tolist()
    >>> pmod.simulate(part, graph=2)[0]
    (tensor([0, 1, 3]), [[0, 2], [1, 0]])
    """

    owned: Tensor
    ghosts: Tensor
    edge_index: Tensor
    edges: Tensor
    owner: Tensor
    plan: Plan

    @property
    def nodes(self) -> Tensor:
        """The numbers of the owned nodes, then of the ghosts."""
        return torch.cat([self.owned, self.ghosts])


def partition(
    edge_index: Tensor,
    n: int,
    *,
    axis: AxisLike | None = None,
    owner: Tensor | None = None,
    weights: Tensor | None = None,
    points: Tensor | None = None,
) -> Part:
    """Return this rank's part of a graph that all ranks of the axis know.

    edge_index: (2, edges) int64, from row 0 to row 1, between n nodes; an undirected
    graph has each edge both ways. An edge is with the rank that owns its target. axis:
    all axes of the ambient mesh, as one, by default. owner: (n,) int64, the index along
    the axis of the rank that owns each node; by default `owners` with these weights and
    points, as the first rank finds them. A rank may own nothing.
    Cost: small messages: the owners once, and how many ghosts each rank has.
    Raises: ArgumentError for tensors of another dtype; ShapeError for other shapes, and
    numbers of nodes or ranks that do not exist; MismatchError on every rank where the
    ranks pass unlike graphs or owners.

    >>> def ghosts():
    ...     path = torch.arange(5)
    ...     edges = torch.stack([torch.cat([path[:-1], path[1:]]), torch.cat([path[1:], path[:-1]])])
    ...     part = pmod.graph.partition(edges, 5, axis="graph", owner=torch.tensor([0, 0, 0, 1, 1]))
    ...     return part.owned.tolist(), part.ghosts.tolist()
    >>> pmod.simulate(ghosts, graph=2)
    [([0, 1, 2], [3]), ([3, 4], [2])]
    """
    function = "graph.partition"
    over = _over(axis)
    bound = resolve(over, function)
    check_eager(function, bound)
    edge_index = check_edges(edge_index, n, function)
    if owner is None:
        found = owners(edge_index, n, bound.size, weights=weights, points=points)
        # unlike machines may round differently
        owner = pick(found.to(edge_index.device), over)
    else:
        _check_owner(owner, n, bound)
        owner = owner.detach().to(edge_index.device)
    _check_alike(edge_index, n, owner, function, bound)
    return _part(edge_index, owner, over, bound)


def halo(x: Tensor, plan: Plan, *, dim: int = 0) -> Tensor:
    """Return the rows of this rank's own nodes, then those of its ghosts, as they are now.

    x has rows of its own nodes, or of the ghosts too: these are replaced by what their
    owners hold, so that the call may stand before each layer.

    V -> V. Transpose: the gradients of the ghosts are added to the rows of their owners.
    Shapes: x (..., owned, ...) or (..., owned + ghosts, ...) -> (..., owned + ghosts,
    ...), along `dim`.
    Cost: each row that is a ghost elsewhere, once to each rank where it is.
    Raises: ShapeError for another number of rows; ArgumentError if plan is not that of
    `partition`; AxisError where the plan is another rank's.

    >>> def rows():
    ...     ring = torch.arange(4)
    ...     part = pmod.graph.partition(torch.stack([ring, ring.roll(1)]), 4, owner=torch.tensor([0, 0, 1, 1]))
    ...     return pmod.graph.halo(10 * part.owned, part.plan)
    >>> pmod.simulate(rows, graph=2)
    [tensor([ 0, 10, 20]), tensor([20, 30,  0])]
    """
    if not isinstance(plan, Plan):  # pyright: ignore[reportUnnecessaryIsInstance]
        bound = resolve(current_mesh(), "graph.halo")
        given = f"plan is a {type(plan).__name__}"
        raise wrong(
            ArgumentError,
            "graph.halo",
            bound,
            given,
            "Pass the plan of partition(...).",
        )
    bound = resolve(plan.over, "graph.halo")
    check_tensor(x, "graph.halo", bound)
    at = dim_from_end(dim, x, "graph.halo", bound)
    rows = int(x.shape[at])
    if rows not in (plan.owned, plan.owned + plan.ghosts):
        given = f"x.shape[{x.dim() + at}] is {rows}, and there are {plan.owned} nodes and {plan.ghosts} ghosts"
        right = "Pass a row for each of this rank's nodes, or for the ghosts as well."
        raise wrong(ShapeError, "graph.halo", bound, given, right)
    own = x.narrow(at, 0, plan.owned)
    ghosts = indexed_all_to_all_v(own, plan.over, indices=plan.exchange, dim=at)
    return torch.cat([own, ghosts], at)


def _over(axis: AxisLike | None) -> Mesh:
    if isinstance(axis, Mesh):
        return axis
    mesh = current_mesh()
    return mesh if axis is None else mesh[axis]


def _check_owner(owner: object, n: int, axis: Axis) -> None:
    function, right = (
        "graph.partition",
        "Pass an int64 tensor (n,): the index of the rank that owns each node.",
    )
    if not isinstance(owner, Tensor) or owner.dtype != torch.int64:
        kind = type(owner).__name__
        raise wrong(ArgumentError, function, axis, f"owner is a {kind}", right)
    if owner.dim() != 1 or len(owner) != n:
        given = f"owner has the shape {tuple(owner.shape)} and there are {n} nodes"
        raise wrong(ShapeError, function, axis, given, right)
    if n:
        low, high = torch.stack(owner.aminmax()).tolist()
        if low < 0 or high >= axis.size:
            outside = low if low < 0 else high
            given = f"owner holds {outside}"
            right = f"The ranks of the axis are 0 to {axis.size - 1}."
            raise wrong(ShapeError, function, axis, given, right)


# an odd number of 64 bits, with as many ones as zeros
_MIX = -7046029254386353131


def _digest(x: Tensor) -> int:
    """Return a number that unlike tensors of ints do not share."""
    flat = x.reshape(-1)
    places = 2 * torch.arange(len(flat), device=x.device) + 1
    mixed = (flat + places) * _MIX
    return int(((mixed ^ (mixed >> 29)) * places).sum())


def _check_alike(
    edge_index: Tensor, n: int, owner: Tensor, function: str, axis: Axis
) -> None:
    mine = [n, edge_index.shape[1], _digest(edge_index), _digest(owner)]
    arrived = swapped([mine] * axis.size, edge_index.device, axis)
    for rank, theirs in enumerate(arrived):
        if theirs != mine:
            given = f"the graph or its owners are not those at index {rank} of the axis"
            right = "Every rank passes the whole graph, with the same edges in the same order."
            raise wrong(MismatchError, function, axis, given, right)


def _part(edge_index: Tensor, owner: Tensor, over: Mesh, axis: Axis) -> Part:
    source, target = edge_index
    n, mine = len(owner), axis.index
    of_source, of_target = owner[source], owner[target]
    edges = (of_target == mine).nonzero().view(-1)
    owned = (owner == mine).nonzero().view(-1)
    arriving = source[edges][of_source[edges] != mine]
    # by owner, then by number: so they arrive
    keys = torch.unique(owner[arriving] * n + arriving)
    ghosts = keys % n if n else keys
    local = torch.full((n,), -1, device=owner.device)
    local[torch.cat([owned, ghosts])] = torch.arange(
        len(owned) + len(ghosts), device=owner.device
    )
    leaving = (of_source == mine) & (of_target != mine)
    pairs = torch.unique(of_target[leaving] * n + source[leaving])
    counts = torch.bincount(pairs // max(n, 1), minlength=axis.size).tolist()
    rows = local[pairs % max(n, 1)].split(counts)
    plan = Plan(over, exchange_plan(rows, over), len(owned), len(ghosts))
    held = local[edge_index[:, edges]]
    return Part(owned, ghosts, held, edges, owner, plan)
