"""Gradients of passes under `no_sync`, which no message has carried yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast
from weakref import finalize, ref

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from pmod._torch import version_of


class Unsent:
    """The parameters whose `.grad` is this rank's own, since passes under `no_sync`.

    refuse: makes the error for what would take such a gradient for that of all ranks.
    """

    def __init__(self, refuse: Callable[[str], Exception]) -> None:
        # the contexts that are open, one in another
        self.contexts = 0
        self._refuse = refuse
        self._sees_optimizers = False
        # by id, each with the version of its value at that pass
        self._parameters: dict[int, tuple[Tensor, int]] = {}

    def __contains__(self, p: Tensor) -> bool:
        return id(p) in self._parameters and p.grad is not None

    def add(self, p: Tensor) -> None:
        """Remember that its gradient is this rank's own."""
        self._parameters[id(p)] = p, version_of(p)

    def sent(self, parameters: Iterable[Tensor]) -> None:
        """Forget those whose gradients all ranks have now."""
        for p in parameters:
            self._parameters.pop(id(p), None)

    def clear(self) -> None:
        """Forget all of them."""
        self._parameters.clear()

    def check_values(self) -> None:
        """Raise if a parameter has changed by a gradient that was never sent."""
        for p, version in [*self._parameters.values()]:
            if version_of(p) == version:
                continue
            # a gradient that was thrown away needs no message
            if _is_nothing(p.grad):
                self.sent([p])
            else:
                raise self._refuse("a parameter was changed")

    def watch_optimizers(self) -> None:
        """Raise before any optimizer uses one of these gradients, from now on."""
        if self._sees_optimizers:
            return
        self._sees_optimizers = True
        of = ref(self)

        def before_step(optimizer: Optimizer, *_: object) -> None:
            unsent = of()
            if unsent is not None:
                unsent._check_step(optimizer)

        # it stays for good: ranks that are threads share torch's table of such hooks,
        # which must not change while one of them goes through it
        finalize(self, register_optimizer_step_pre_hook(before_step).remove)

    def _check_step(self, optimizer: Optimizer) -> None:
        if not self._parameters:
            return
        for group in optimizer.param_groups:
            for p in cast(list[Tensor], group["params"]):
                if p in self and not _is_nothing(p.grad):
                    raise self._refuse("optimizer.step() was called")


def _is_nothing(gradient: Tensor | None) -> bool:
    """Return whether `zero_grad` has left this."""
    return gradient is None or not bool(gradient.to_dense().any())
