"""Random numbers by position: each element of the whole has its own, however it is cut.

An element's number is a hash of the call's seed, of how many draws came before, and of
its place in the whole. So blocks differ, copies agree, and another cut changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pmod._collectives.values import pick
from pmod._domain.layout import Axes, Fold, Layout, Part, Place, Shape
from pmod._mesh.mesh import Mesh

# the steps of splitmix64, as signed numbers of 64 bits
_STEP = -7046029254386353131
_FIRST = -4658895280553007687
_SECOND = -7723592293110705685


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Return x shifted to the right as an unsigned number."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(x: Tensor) -> Tensor:
    """Return bits that look random, other ones for every number."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def positions(
    layout: Layout, shape: Shape, place: Place, device: torch.device
) -> Tensor:
    """Return where each element of a block is in the whole, counted in C order."""
    at = torch.zeros((), dtype=torch.int64, device=device)
    stride = math.prod(shape)
    for d, length in enumerate(shape):
        stride = stride // max(length, 1)
        cut = layout[d] if layout else None
        rows = _rows_of(cut, length, place, device) * stride
        at = at.unsqueeze(-1) + rows
    return at


def _rows_of(cut: object, length: int, place: Place, device: torch.device) -> Tensor:
    """Return which rows of a dim this rank has."""
    if isinstance(cut, Part):
        begin = cut.starts[place[cut.axes]]
        end = begin + cut.sizes[place[cut.axes]]
        return torch.arange(begin, end, device=device)
    if not isinstance(cut, Fold):
        return torch.arange(length, device=device)
    rows = torch.zeros((1,), dtype=torch.int64, device=device)
    for factor, part in zip(cut.lengths, cut.parts, strict=True):
        inner = _rows_of(part, factor, place, device)
        rows = (rows.unsqueeze(-1) * factor + inner).flatten()
    return rows


class Draws:
    """What a call draws: a seed that all ranks agree on, and how often it drew.

    Each draw takes a number from torch's generator, too: where a checkpoint sets its
    state back, the same draws come again.
    """

    def __init__(self, mesh: Mesh, axes: Axes) -> None:
        self._mesh = mesh
        self._axes = axes
        self._seed: int | None = None
        # of each draw: the state of torch's generator before it
        self._drawn: dict[bytes, int] = {}

    def next_seed(self) -> int:
        """Return the seed of the next draw, the same on all ranks of the domain."""
        if self._seed is None:
            # torch's generators may differ between ranks: the first rank's number counts
            with torch.random.fork_rng([]):
                own = torch.randint(2**62, ())
            label = self._axes[0] if len(self._axes) == 1 else self._axes
            self._seed = int(pick(own, label).item())
        state = torch.get_rng_state().numpy().tobytes()
        torch.randint(2, ())
        count = self._drawn.setdefault(state, len(self._drawn) + 1)
        # a tensor, whose products wrap around
        mixed = _mixed(torch.tensor(self._seed) + torch.tensor(count) * _STEP)
        return int(mixed.item())

    def uniform(
        self, layout: Layout, shape: Sequence[int], place: Place, device: torch.device
    ) -> Tensor:
        """Return a float64 number in [0, 1) for each element of a block."""
        seed = self.next_seed()
        at = positions(layout, tuple(shape), place, device)
        bits = _mixed(_mixed(at * _STEP + seed) + seed)
        return _shifted(bits, 11).double() * 2.0**-53
