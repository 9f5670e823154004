"""`pvary` of many tensors at once, in whose backward every rank takes part, and which knows what no rank used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pmod._collectives.values import PVARY
from pmod._core.tree import alike, together
from pmod._core.watch import called_as
from pmod._mesh.axis import Axis
from pmod._torch import are_transforms_active, is_wrapped, older_vmap_level


def pvary_used(xs: Sequence[Tensor], axis: Axis, function: str) -> tuple[list[Tensor], list[Tensor]]:
    """Copies, and empty tensors from which backward comes to the nodes of the copies: one for each dtype and device.

    A vector travels along, which says in backward which copies a rank used. What no rank used gets no gradient.
    """
    copies, links = list(xs), list[Tensor]()
    for places in alike(xs):
        made, link = _of_one_kind([xs[i] for i in places], axis, function)
        links.append(link)
        for i, y in zip(places, made, strict=True):
            copies[i] = y
    return copies, links


def _of_one_kind(xs: Sequence[Tensor], axis: Axis, function: str) -> tuple[list[Tensor], Tensor]:
    flags = torch.zeros(len(xs), dtype=xs[0].dtype, device=xs[0].device, requires_grad=True)
    *copies, counts = called_as(function, together, PVARY, [*xs, flags], axis, (1, None))
    node: Any = counts.grad_fn
    if node is not None and not are_transforms_active():
        used = _Used(len(xs))
        node.register_prehook(used.before)
        node.register_hook(used.after)
    return list(copies), counts[:0]


class _Used:
    """The hooks of one node."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._unused: list[int] = []  # here, in the backward that runs

    def before(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        *of_copies, of_flags = gradients
        self._unused = []
        if of_flags is None or _is_batched(gradients):
            return None
        self._unused = [i for i, gradient in enumerate(of_copies) if gradient is None]
        flags = [float(gradient is not None) for gradient in of_copies]
        return (*of_copies, torch.tensor(flags, dtype=of_flags.dtype, device=of_flags.device))

    def after(self, gradients: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...] | None:
        counts = gradients[-1]
        if not self._unused or counts is None:
            return None
        out, first = list(gradients), len(gradients) - 1 - self._n
        users: list[Any] = counts.detach().real.tolist()  # waits for the device, only where something was unused here
        for i in self._unused:
            if users[i] == 0:
                out[first + i] = None
        return tuple(out)


def _is_batched(xs: Sequence[Tensor | None]) -> bool:
    """Whether a vmap runs: what is read would be of many gradients at once."""
    return older_vmap_level() > 0 or any(x is not None and is_wrapped(x) for x in xs)


def linked(y: Tensor, links: Sequence[Tensor]) -> Tensor:
    """y, from which backward comes to the links: the difference keeps the sign of a zero."""
    return y - torch.stack([x.to(y.device, y.dtype) for x in links]).sum()
