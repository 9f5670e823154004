"""A message-passing network whose nodes are spread over a mesh ("data", "graph").

The problems of a batch are sharded over "data", the nodes over "graph". What acts on a
node or an edge is local; what its neighbours on other ranks say is fetched in each
round by `pmod.graph.halo`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pmod
from pmod.demo.graph.partition import Part


class Round(nn.Module):
    """A round of messages.

    Each edge forms one from its two ends and its shape; each node takes the mean of
    those that reach it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.sender = nn.Linear(channels, channels, bias=False)
        self.receiver = nn.Linear(channels, channels)
        self.edge = nn.Linear(channels, channels, bias=False)
        self.update = nn.Linear(2 * channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, h: Tensor, edges: Tensor, part: Part) -> Tensor:
        """V -> V. h (nodes of this rank, batch, channels) -> the same shape."""
        sent = pmod.graph.halo(self.sender(h), part.plan)
        messages = F.gelu(
            sent[part.sender]
            + self.receiver(h)[part.receiver]
            + self.edge(edges)[:, None]
        )
        mean = torch.zeros_like(h).index_add(0, part.receiver, messages) / part.degree
        return h + self.out(F.gelu(self.update(torch.cat([h, mean], dim=-1))))


class GraphNet(nn.Module):
    """A network that encodes the medium and the source, and decodes the solution."""

    def __init__(self, channels: int, rounds: int) -> None:
        super().__init__()
        self.nodes = nn.Sequential(
            nn.Linear(2, channels), nn.GELU(), nn.Linear(channels, channels)
        )
        self.edges = nn.Sequential(
            nn.Linear(4, channels), nn.GELU(), nn.Linear(channels, channels)
        )
        self.rounds = nn.ModuleList(Round(channels) for _ in range(rounds))
        self.decode = nn.Sequential(
            nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, 1)
        )

    def forward(self, x: Tensor, part: Part) -> Tensor:
        """V -> V. x (nodes of this rank, batch, 2) -> (nodes of this rank, batch)."""
        h, edges = self.nodes(x), self.edges(part.shape)
        for processor in self.rounds:
            h = processor(h, edges, part)
        return self.decode(h).squeeze(-1)


def varying(model: GraphNet) -> dict[str, Tensor]:
    """The parameters, once a step: backward() then sums their gradients in one message.
    I -> V.
    """
    held: dict[str, Tensor] = dict(model.named_parameters())
    return pmod.pvary(held, ("data", "graph"))


def predict(
    model: GraphNet,
    parameters: dict[str, Tensor],
    x: Tensor,
    part: Part,
) -> Tensor:
    """Return the model's output with these parameters. V -> V."""
    return torch.func.functional_call(model, parameters, (x, part))


def loss(prediction: Tensor, u: Tensor, count: int) -> Tensor:
    """Return the mean square over the nodes and problems of all ranks. V -> I.

    count: how many of them there are.
    """
    return pmod.psum((prediction - u).square().sum(), ("data", "graph")) / count


def relative_errors(prediction: Tensor, u: Tensor) -> Tensor:
    """Return |prediction - u| / |u| of each problem. V -> I along "graph".

    Both norms are over the nodes of all ranks.
    """
    wrong, whole = pmod.psum(
        ((prediction - u).square().sum(0), u.square().sum(0)), "graph"
    )
    return (wrong / whole).sqrt()
