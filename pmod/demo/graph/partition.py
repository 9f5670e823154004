"""Who owns which node, and what of the mesh each rank then needs."""

from __future__ import annotations

import importlib.util

import attrs
import numpy as np
import torch
from torch import Tensor

from pmod.demo.graph.surface import Numbers, Reals, Surface


def partitioner(surface: Surface, ranks: int) -> str:
    """Return the name of what `owners` uses: METIS, if it is installed and pays."""
    # METIS wants a few nodes for each part
    return (
        "METIS"
        if importlib.util.find_spec("pymetis") and len(surface) >= 8 * ranks > 8
        else "coordinate bisection"
    )


def owners(surface: Surface, ranks: int) -> Tensor:
    """Return the rank of each node, so that all ranks have about the same work.

    The work of a node is its edges, not itself.

    Shapes: -> (n,) int64.
    """
    work = 1 + torch.bincount(surface.edges[1], minlength=len(surface)).numpy()
    if partitioner(surface, ranks) == "METIS":
        return torch.from_numpy(_by_metis(surface, ranks, work))
    return torch.from_numpy(by_coordinates(surface.points.numpy(), ranks, work))


def _by_metis(surface: Surface, ranks: int, work: Numbers) -> Numbers:
    import pymetis

    sender, receiver = (v.numpy() for v in surface.edges)
    starts = np.searchsorted(receiver, np.arange(len(surface) + 1))
    adjacency = pymetis.CSRAdjacency(starts, sender)
    _, parts = pymetis.part_graph(ranks, adjacency, vweights=work.tolist())
    return np.asarray(parts, dtype=np.int64)


def by_coordinates(points: Reals, ranks: int, work: Numbers) -> Numbers:
    """Halve the ranks, and with them the work, across the longest side, and so on."""
    found = np.zeros(len(points), dtype=np.int64)
    todo = [(np.arange(len(points)), 0, ranks)]
    while todo:
        nodes, first, count = todo.pop()
        found[nodes] = first
        if count == 1 or not len(nodes):
            continue
        side = int(np.ptp(points[nodes], axis=0).argmax())
        nodes = nodes[np.argsort(points[nodes, side], kind="stable")]
        low = count // 2
        done = np.cumsum(work[nodes]) - work[nodes] / 2
        cut = int(np.searchsorted(done, work[nodes].sum() * low / count))
        todo += [(nodes[:cut], first, low), (nodes[cut:], first + low, count - low)]
    return found


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
    outgoing: list[Tensor]
    """Which of this rank's nodes are ghosts of each rank."""
    shape: Tensor
    """(edges, 4): the way from receiver to sender, and how long it is, in mean lengths
    of the mesh.
    """
    degree: Tensor
    """(owned, 1, 1): how many edges end at each node of this rank."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Part:
        """Return the same on a device, the reals in this dtype."""
        owned, ghosts, sender, receiver = (
            v.to(device) for v in (self.owned, self.ghosts, self.sender, self.receiver)
        )
        outgoing = [v.to(device) for v in self.outgoing]
        return Part(
            owned,
            ghosts,
            sender,
            receiver,
            outgoing,
            self.shape.to(device, dtype),
            self.degree.to(device, dtype),
        )


def part_of(surface: Surface, owner: Tensor, ranks: int, rank: int) -> Part:
    """Return the part of one of the ranks; it may be empty."""
    sender, receiver = surface.edges
    incoming = owner[receiver] == rank
    s, r = sender[incoming], receiver[incoming]
    owned = (owner == rank).nonzero().view(-1)
    ghosts = torch.unique(s[owner[s] != rank])
    ghosts = ghosts[owner[ghosts].argsort(stable=True)]
    local = torch.full((len(surface),), -1)
    local[torch.cat([owned, ghosts])] = torch.arange(len(owned) + len(ghosts))
    leaving = (owner[sender] == rank) & (owner[receiver] != rank)
    to = owner[receiver]
    outgoing = [
        local[torch.unique(sender[leaving & (to == other)])] for other in range(ranks)
    ]
    way = surface.points[s] - surface.points[r]
    mean = torch.linalg.vector_norm(
        surface.points[sender] - surface.points[receiver], dim=1
    ).mean()
    shape = (
        torch.cat([way, torch.linalg.vector_norm(way, dim=1, keepdim=True)], dim=1)
        / mean
    )
    degree = torch.bincount(local[r], minlength=len(owned)).view(-1, 1, 1).double()
    return Part(owned, ghosts, local[s], local[r], outgoing, shape, degree)
