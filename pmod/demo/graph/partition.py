"""Who owns which node, and what of the mesh each rank then needs."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

import pmod
from pmod.demo.graph.surface import Surface


def partitioner(surface: Surface, ranks: int) -> str:
    """Return the name of what `owners` uses: METIS, if it is installed and pays."""
    by_metis = pmod.graph.uses_metis(len(surface), ranks)
    return "METIS" if by_metis else "coordinate bisection"


def owners(surface: Surface, ranks: int) -> Tensor:
    """Return the rank of each node, so that all ranks have about the same work.

    The work of a node is its edges, not itself.

    Shapes: -> (n,) int64.
    """
    edges = torch.stack(surface.edges)
    return pmod.graph.owners(edges, len(surface), ranks, points=surface.points)


@attrs.frozen(eq=False)
class Part:
    """What one rank holds.

    Its own nodes come first, then the ghosts: nodes of other ranks that send to its
    own.

    Numbers in `owned` and `ghosts` are those of the whole mesh; in all else they count
    the nodes of this rank.
    """

    owned: Tensor
    ghosts: Tensor
    """By owner: the order in which they arrive."""
    sender: Tensor
    receiver: Tensor
    """An edge belongs to the rank that owns its receiver. By receiver, as in the whole
    mesh.
    """
    plan: pmod.graph.Plan
    """Which nodes are ghosts where."""
    shape: Tensor
    """(edges, 4): the way from receiver to sender, and how long it is, in mean lengths
    of the mesh.
    """
    degree: Tensor
    """(owned, 1, 1): how many edges end at each node of this rank."""


def part_of(surface: Surface, owner: Tensor, dtype: torch.dtype) -> Part:
    """Return the part of this rank along "graph", on its device; it may be empty."""
    device = pmod.current_mesh().device
    edges = torch.stack(surface.edges).to(device)
    part = pmod.graph.partition(edges, len(surface), axis="graph", owner=owner)
    points = surface.points.to(device)
    ways = points[edges[0]] - points[edges[1]]
    lengths = torch.linalg.vector_norm(ways, dim=1, keepdim=True)
    shape = torch.cat([ways, lengths], dim=1)[part.edges] / lengths.mean()
    sender, receiver = part.edge_index
    degree = torch.bincount(receiver, minlength=len(part.owned)).view(-1, 1, 1)
    return Part(
        part.owned,
        part.ghosts,
        sender,
        receiver,
        part.plan,
        shape.to(dtype),
        degree.to(dtype),
    )
