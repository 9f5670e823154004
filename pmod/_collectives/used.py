"""`pvary` of many tensors at once, which knows in backward what no rank used.

Every rank takes part in that backward, whatever it used itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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
    """What no rank used in the last backward pass.

    The next pass sends nothing of it, unless a rank uses it again. The ranks agree on
    it, because each learns it from a sum over all of them.
    """

    def __init__(self) -> None:
        # by what is sent together
        self._places: dict[object, frozenset[int]] = {}

    def among(self, key: object) -> frozenset[int]:
        """Return the places of what nobody used."""
        return self._places.get(key, frozenset())

    def note(self, key: object, places: frozenset[int]) -> None:
        """Keep the places for the next pass."""
        self._places[key] = places


def pvary_used(
    xs: Sequence[Tensor], axis: Axis, function: str, idle: Idle
) -> tuple[list[Tensor], list[Tensor]]:
    """Return copies, and the empty tensors that lead backward to their nodes.

    There is one node, and one such tensor, for each dtype and device. A vector travels
    along, which says in backward which copies a rank used. What no rank used gets no
    gradient, and from the next pass on is not sent.
    """
    copies, links = list(xs), list[Tensor]()
    for places in alike(xs):
        made, link = _of_one_kind([xs[i] for i in places], axis, function, idle)
        links.append(link)
        for i, y in zip(places, made, strict=True):
            copies[i] = y
    return copies, links


def pvary_alone(xs: Sequence[Tensor], axis: Axis, function: str) -> list[Tensor]:
    """Return copies along an axis of one rank; what is unused gets no gradient."""
    call = PVARY.along(axis, SUM)
    copies = called_as(function, together, PVARY, list(xs), axis, SUM)
    for node in dict.fromkeys([y.grad_fn for y in copies]):
        if node is not None:
            _let_go_on(node, partial(_of_used, call))
    return copies


def _of_used(
    call: Call,
    gradients: Sequence[Tensor | None],
    needed: Sequence[bool],
    forward: Origin,
) -> list[Tensor | None]:
    """Return the derivative of a call, None where a gradient is None."""
    found: list[Tensor | None] = [None] * len(gradients)
    used: list[Tensor] = []
    places: list[int] = []
    for i, gradient in enumerate(gradients):
        if gradient is not None and needed[i]:
            used.append(gradient)
            places.append(i)
    if used:
        for i, y in zip(places, transposed(call, used, forward), strict=True):
            found[i] = y
    return found


def _let_go_on(node: Any, instead: Callable[..., list[Tensor | None]]) -> None:
    """Let backward of a node do this, with None for the gradients of what is unused."""
    # zeros would count as used
    node.set_materialize_grads(False)
    node.instead = instead


def _of_one_kind(
    xs: Sequence[Tensor], axis: Axis, function: str, idle: Idle
) -> tuple[list[Tensor], Tensor]:
    flags = torch.zeros(
        len(xs), dtype=xs[0].dtype, device=xs[0].device, requires_grad=True
    )
    call = PVARY.along(axis, SUM)
    *copies, counts = called_as(function, together, PVARY, [*xs, flags], axis, SUM)
    node = counts.grad_fn
    if node is not None and not are_transforms_active():
        _let_go_on(node, _Sums(xs, call, function, idle))
    return list(copies), counts[:0]


class _Sums:
    """What backward of one node does: the sums over the ranks of what any rank used."""

    def __init__(
        self, xs: Sequence[Tensor], call: Call, function: str, idle: Idle
    ) -> None:
        # the last shape is that of the flags
        self._shapes = [*[x.shape for x in xs], torch.Size([len(xs)])]
        self._dtype, self._device = xs[0].dtype, xs[0].device
        self._call, self._function = call, function
        self._idle = idle
        self._key = (call.axis.key, self._dtype, self._device, *self._shapes)

    def __call__(
        self,
        gradients: Sequence[Tensor | None],
        needed: Sequence[bool],
        forward: Origin,
    ) -> list[Tensor | None]:
        flags = len(self._shapes) - 1
        sent = dict(enumerate(gradients))
        # many gradients at once have no flags that could be read
        if gradients[flags] is None or _is_batched(gradients):
            return self._summed(sent, needed, forward)
        used = [float(gradient is not None) for gradient in gradients[:flags]]
        sent[flags] = self._new(used)
        kept_back: dict[int, Tensor | None] = {}
        for i in sorted(self._idle.among(self._key)):
            kept_back[i] = sent.pop(i)
        sums = self._summed(sent, needed, forward)
        all_used = all(used) and not kept_back
        idle = self._now_idle(sums[flags], all_used)
        # what a rank uses again is sent after all, by all ranks
        late = {i: gradient for i, gradient in kept_back.items() if i not in idle}
        if late:
            after_all = self._summed(late, needed, forward)
            for i in late:
                sums[i] = after_all[i]
        for i in idle:
            sums[i] = None
        return sums

    def _now_idle(self, counts: Tensor | None, all_used: bool) -> frozenset[int]:
        """Return what no rank used, from how many ranks used each, and remember it."""
        # nobody asked for the flags: of what was kept back, all is used
        if counts is None:
            return frozenset()
        idle: set[int] = set()
        # what is used here is idle nowhere, as the other ranks hear; to read the counts
        # is to wait for the device
        if not all_used:
            users: list[float] = counts.detach().real.tolist()
            idle = {i for i, ranks in enumerate(users) if ranks == 0}
        self._idle.note(self._key, frozenset(idle))
        return frozenset(idle)

    def _summed(
        self,
        gradients: dict[int, Tensor | None],
        needed: Sequence[bool],
        forward: Origin,
    ) -> list[Tensor | None]:
        """Return the sums of these gradients, at their places."""
        sums: list[Tensor | None] = [None] * len(self._shapes)
        places = [i for i in gradients if needed[i]]
        if not places:
            return sums
        # a rank that did not use it adds zeros: the others wait for all
        own = [self._zeros_for(i, gradients[i]) for i in places]
        for i, y in zip(places, transposed(self._call, own, forward), strict=True):
            sums[i] = y
        return sums

    def _new(self, numbers: list[float]) -> Tensor:
        return torch.tensor(numbers, dtype=self._dtype, device=self._device)

    def _zeros_for(self, i: int, gradient: Tensor | None) -> Tensor:
        """Return the gradient, or the zeros that None stands for."""
        if gradient is not None:
            return gradient
        return torch.zeros(self._shapes[i], dtype=self._dtype, device=self._device)


def _is_batched(xs: Sequence[Tensor | None]) -> bool:
    """Return whether a vmap runs: what is read would be of many gradients at once."""
    if older_vmap_level() > 0:
        return True
    return any(x is not None and is_wrapped(x) for x in xs)


def linked(y: Tensor, links: Sequence[Tensor]) -> Tensor:
    """Return y such that backward comes from it to the links."""
    # a difference, because a sum with 0.0 loses the sign of -0.0
    return y - torch.stack([x.to(y.device, y.dtype) for x in links]).sum()
