"""`pvary` of many tensors at once, in whose backward every rank takes part, and which
knows what no rank used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pmod._collectives.values import PVARY, SUM
from pmod._core.bind import transposed
from pmod._core.row import Call
from pmod._core.tree import alike, together
from pmod._core.watch import called_as
from pmod._mesh.axis import Axis
from pmod._site import Origin
from pmod._torch import are_transforms_active, is_wrapped, older_vmap_level


class Idle:
    """What no rank used in the last backward pass: the next one sends nothing of it,
    unless a rank uses it again.

    The ranks agree on it: each learns it from a sum over all of them.
    """

    def __init__(self) -> None:
        self._places: dict[Any, frozenset[int]] = {}  # by what is sent together

    def among(self, key: Any) -> frozenset[int]:
        """The places of what nobody used."""
        return self._places.get(key, frozenset())

    def note(self, key: Any, places: frozenset[int]) -> None:
        """Keep them for the next pass."""
        self._places[key] = places


def pvary_used(
    xs: Sequence[Tensor], axis: Axis, function: str, idle: Idle
) -> tuple[list[Tensor], list[Tensor]]:
    """Copies, and empty tensors from which backward comes to the nodes of the copies:
    one for each dtype and device.

    A vector travels along, which says in backward which copies a rank used. What no
    rank used gets no gradient, and from the next pass on is not sent.
    """
    copies, links = list(xs), list[Tensor]()
    for places in alike(xs):
        made, link = _of_one_kind([xs[i] for i in places], axis, function, idle)
        links.append(link)
        for i, y in zip(places, made, strict=True):
            copies[i] = y
    return copies, links


def _of_one_kind(
    xs: Sequence[Tensor], axis: Axis, function: str, idle: Idle
) -> tuple[list[Tensor], Tensor]:
    flags = torch.zeros(
        len(xs), dtype=xs[0].dtype, device=xs[0].device, requires_grad=True
    )
    call = PVARY.along(axis, SUM)
    *copies, counts = called_as(function, together, PVARY, [*xs, flags], axis, SUM)
    node: Any = counts.grad_fn
    if node is not None and not are_transforms_active():
        node.set_materialize_grads(False)  # None stands for what is unused here
        node.instead = _Sums(xs, call, function, idle)
    return list(copies), counts[:0]


class _Sums:
    """What backward of one node does: the sums over the ranks, but for what no rank
    used.
    """

    def __init__(
        self, xs: Sequence[Tensor], call: Call, function: str, idle: Idle
    ) -> None:
        self._shapes = [
            *[x.shape for x in xs],
            torch.Size([len(xs)]),
        ]  # and of the flags
        self._dtype, self._device = xs[0].dtype, xs[0].device
        self._call, self._function = call, function
        self._idle, self._key = (
            idle,
            (call.axis.key, self._dtype, self._device, *self._shapes),
        )

    def __call__(
        self,
        gradients: Sequence[Tensor | None],
        needed: Sequence[bool],
        forward: Origin,
    ) -> list[Tensor | None]:
        flags = len(self._shapes) - 1
        asked = gradients[flags] is not None and not _is_batched(gradients)
        if not asked:
            return self._summed(dict(enumerate(gradients)), needed, forward)
        sent = dict(enumerate(gradients))
        sent[flags] = self._new(
            [float(gradient is not None) for gradient in gradients[:flags]]
        )
        idle = self._idle.among(self._key)
        kept_back = {i: sent.pop(i) for i in sorted(idle)}
        sums = self._summed(sent, needed, forward)
        counts = sums[flags]
        if (
            counts is None
        ):  # nobody asked for the flags: of what was kept back, all is used
            idle = frozenset[int]()
        elif kept_back or any(gradient is None for gradient in gradients):
            users: list[float] = (
                counts.detach().real.tolist()
            )  # waits for the device, only where it must
            idle = frozenset([i for i in range(flags) if users[i] == 0])
            self._idle.note(self._key, idle)
        else:  # what is used here is idle nowhere, as the other ranks hear
            self._idle.note(self._key, frozenset())
        late = {i: gradient for i, gradient in kept_back.items() if i not in idle}
        if late:
            after_all = self._summed(late, needed, forward)
            sums = [after_all[i] if i in late else y for i, y in enumerate(sums)]
        return [None if i in idle else y for i, y in enumerate(sums)]

    def _summed(
        self,
        gradients: dict[int, Tensor | None],
        needed: Sequence[bool],
        forward: Origin,
    ) -> list[Tensor | None]:
        """The sums of these gradients, by their places."""
        places = [i for i in gradients if needed[i]]
        own = (
            transposed(
                self._call, [self._zeros_for(i, gradients[i]) for i in places], forward
            )
            if places
            else []
        )
        sums = dict(zip(places, own, strict=True))
        return [sums.get(i) for i in range(len(self._shapes))]

    def _new(self, numbers: list[float]) -> Tensor:
        return torch.tensor(numbers, dtype=self._dtype, device=self._device)

    def _zeros_for(self, i: int, gradient: Tensor | None) -> Tensor:
        """The gradient, or the zeros that None stands for."""
        if gradient is not None:
            return gradient
        return torch.zeros(self._shapes[i], dtype=self._dtype, device=self._device)


def _is_batched(xs: Sequence[Tensor | None]) -> bool:
    """Whether a vmap runs: what is read would be of many gradients at once."""
    return older_vmap_level() > 0 or any(x is not None and is_wrapped(x) for x in xs)


def linked(y: Tensor, links: Sequence[Tensor]) -> Tensor:
    """y, from which backward comes to the links: the difference keeps the sign of a
    zero.
    """
    return y - torch.stack([x.to(y.device, y.dtype) for x in links]).sum()
