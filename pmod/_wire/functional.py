"""The wire of compiled code: messages are written as torch's own functional collectives.

Inductor knows them, and so may overlap them with what is computed. A compiler traces
what is done here once. What has no such form raises `Unwritten`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pmod._torch import functional_collectives
from pmod._wire.base import SMALL, Wire
from pmod._wire.process_group import CARRIED
from pmod._wire.sent import Sent, arrived
from pmod._wire.sums import Reduction


class Unwritten(Exception):
    """A message that has no form in torch's functional collectives."""


class Functional(Wire):
    """Writes messages down for the group of this name.

    sums: the dtypes that the group's backend adds up by itself.
    """

    def __init__(
        self, size: int, index: int, group: str, sums: frozenset[torch.dtype]
    ) -> None:
        super().__init__(size, index)
        self._group = group
        self._sums = sums
        self._ops = functional_collectives()

    def _written(self, y: Tensor) -> Sent[Tensor]:
        return arrived(self._ops.wait_tensor.default(y))

    def _carried(
        self, x: Tensor, write: Callable[[Tensor, int], Tensor]
    ) -> Sent[Tensor]:
        """Write a message of x: write(tensor, numbers that stand for one of x's)."""
        if x.is_complex():
            pairs = torch.view_as_real(x).reshape(-1)
            arriving = self._written(write(pairs, 2))
            return arriving.then(lambda y: torch.view_as_complex(y.view(-1, 2)))
        if x.dtype not in CARRIED:
            raise Unwritten
        return self._written(write(x, 1))

    def all_to_all(
        self, x: Tensor, send: Sequence[int], recv: Sequence[int]
    ) -> Sent[Tensor]:
        def write(y: Tensor, scale: int) -> Tensor:
            coming = [scale * count for count in recv]
            going = [scale * count for count in send]
            return self._ops.all_to_all_single.default(y, coming, going, self._group)

        return self._carried(x, write)

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Sent[Tensor]:
        if len(set(counts)) > 1:
            return super().all_gather(x, counts)
        gather = self._ops.all_gather_into_tensor.default
        return self._carried(x, lambda y, _: gather(y, self.size, self._group))

    def reduce_scatter(
        self, x: Tensor, counts: Sequence[int], dtype: torch.dtype
    ) -> Sent[Tensor]:
        if dtype != x.dtype or dtype not in self._sums or len(set(counts)) > 1:
            return super().reduce_scatter(x, counts, dtype)
        scatter = self._ops.reduce_scatter_tensor.default
        return self._written(scatter(x, "sum", self.size, self._group))

    def all_reduce(
        self, x: Tensor, how: Reduction, dtype: torch.dtype, divisor: int
    ) -> Sent[Tensor]:
        as_it_is = x.dtype == dtype or x.nbytes <= SMALL
        if how != "sum" or dtype not in self._sums or not as_it_is:
            return super().all_reduce(x, how, dtype, divisor)
        wide = x.to(dtype)
        total = self._written(self._ops.all_reduce.default(wide, "sum", self._group))
        if divisor != 1:
            total = total.then(lambda y: y / divisor)
        return total.then(lambda y: y.to(x.dtype))

    def broadcast(self, x: Tensor, root: int) -> Sent[Tensor]:
        send = self._ops.broadcast.default
        return self._carried(x, lambda y, _: send(y, root, self._group))
