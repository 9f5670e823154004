"""Who watches the calls: `debug`, `trace`, `estimate` and `explain` are watchers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from pmod._core.row import Call
from pmod._ranks import world
from pmod._site import Origin, call_site, on_behalf_of

T = TypeVar("T")


class Watcher(Protocol):
    """What is told of every collective: `debug` and `trace`."""

    def before(self, call: Any, xs: Sequence[torch.Tensor], origin: tuple[str, str]) -> None:
        """`origin`: the public function, and the line that called it."""
        ...

    def after(self, call: Any) -> None:
        """The call of the last `before` has its result, or has failed; one that was started is under way."""
        ...

    def waited(self, call: Any, seconds: float) -> None:
        """A call that was started has its result."""
        ...

    def compiled(self) -> None:
        """A collective goes into a compiled graph, where it is not seen."""
        ...


def watchers() -> list[Watcher]:
    """Those of this process; in a simulation those of this rank."""
    return world.now.here.watchers


def called_as(function: str, f: Callable[..., T], *args: Any) -> T:
    """f(*args), called in a hook: who watches sees what it sends as this function's, at the user's line."""
    if torch.compiler.is_compiling() or not watchers():
        return f(*args)
    with on_behalf_of((function, call_site()[1])):
        return f(*args)


@contextmanager
def told(call: Call, xs: list[Tensor], of: Origin) -> Generator[None]:
    """The watchers see this call begin and end."""
    began: list[Watcher] = []
    try:
        for watcher in watchers():
            watcher.before(call, xs, of)
            began.append(watcher)
        yield
    finally:
        for watcher in began:
            watcher.after(call)
