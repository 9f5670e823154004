"""Calls that are sent ahead of the wait for them.

`start` runs a function twice; what the first run sent, the second one waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from pmod._core.bind import Starter, carry, is_ahead, send_ahead, started
from pmod._core.row import Call
from pmod._core.watch import tell, told, watchers
from pmod._errors import PmodError, phrase
from pmod._mesh.ambient import ambient, under
from pmod._site import Line, Origin, Site, call_site, on_behalf_of, origin
from pmod._torch import (
    are_transforms_active,
    count_dispatch_modes,
    no_dispatch_modes,
    no_interpreters,
)
from pmod._wire.sent import Sent

T = TypeVar("T")


class Sending(BaseException):
    """The first messages of a piece are under way: leave it, it is run again later."""


class _Ahead(NamedTuple):
    """A message that was sent before anybody waited for it."""

    call: Call
    sent: Sent[list[Tensor]]
    origin: Origin


@contextmanager
def started_by(starter: Starter | None) -> Generator[None]:
    """Let a starter have the calls that are bound here; None runs them as always."""
    before, started.by = started.by, starter
    try:
        yield
    finally:
        started.by = before


class FirstRun(Starter):
    """The run of a piece that sends its first messages, and leaves."""

    def __init__(self) -> None:
        self.ahead: list[_Ahead] = []
        self.answers: list[object] = []

    def bind(self, call: Call, xs: list[Tensor]) -> Sequence[Tensor]:
        self._send(call, xs)
        raise Sending

    def prepare(self, calls: Sequence[tuple[Call, list[Tensor]]]) -> None:
        for call, xs in calls:
            if is_ahead(call):
                self._send(call, xs)
        if self.ahead:
            raise Sending

    def _send(self, call: Call, xs: list[Tensor]) -> None:
        of = origin() if watchers() else ("", "")
        with told(call, xs, of):
            self.ahead.append(_Ahead(call, send_ahead(call, xs), of))


class SecondRun(Starter):
    """The run of a piece that finds what the first run sent.

    What follows from that is sent as always.
    """

    def __init__(self, first: FirstRun, name: str, line: Line) -> None:
        self._ahead = first.ahead
        self.answers = first.answers
        self._name = name
        # an error names the line that started it
        self._line = line

    def bind(self, call: Call, xs: list[Tensor]) -> Sequence[Tensor]:
        if not self._ahead:
            return carry_watched(call, xs)
        first = self._ahead.pop(0)
        if first.call != call:
            raise self._unlike(first.call, call)
        if not watchers():
            return carry(call, xs, lambda _: first.sent.wait())
        began = perf_counter()
        with on_behalf_of(first.origin):
            ys = carry(call, xs, lambda _: first.sent.wait())
        seconds = perf_counter() - began
        tell(lambda watcher: watcher.waited(call, seconds))
        return ys

    def check_all_found(self) -> None:
        """Raise where a message of the first run was not asked for."""
        if self._ahead:
            raise self._unlike(self._ahead[0].call, None)

    def _unlike(self, first: Call, second: Call | None) -> PmodError:
        one, other = _shown(first), "nothing"
        if second is not None:
            other = _shown(second)
        # the names do not tell them apart
        if second is not None and one == other:
            one += f" with {first.params}"
            other += f" with {second.params}"
        given = f"the function is not pure: its first run called {one}, "
        given += f"its second run {other}"
        right = "Make it depend on its arguments only, and change none of them between "
        right += "start and wait."
        places = f"Started at {Site.at(self._line)}\nWaited for at {call_site()[1]}"
        return PmodError(phrase(self._name, given, f"{right}\n{places}"))


def carry_watched(call: Call, xs: list[Tensor]) -> Sequence[Tensor]:
    """Run a call now, while `start` runs the function that makes it."""
    if not watchers():
        return carry(call, xs)
    # `bind` has left it to the starter to tell them
    with told(call, xs, origin()):
        return carry(call, xs)


def _shown(call: Call) -> str:
    return f"{call.row.name} along {call.axis.label!r}"


def once(ask: Callable[[], T]) -> T:
    """Return ask(): the first run of a piece asks, and the second remembers.

    Its messages decide what is sent next.
    """
    by = started.by
    if isinstance(by, SecondRun) and by.answers:
        return cast(T, by.answers.pop(0))
    # what it sends is not a first message of the piece
    with started_by(None):
        answer = ask()
    if isinstance(by, FirstRun):
        by.answers.append(answer)
    return answer


def surroundings() -> Callable[[], ExitStack]:
    """Return a function that enters the mesh, the grad mode and autocast of now."""
    mesh, grad = ambient(), torch.is_grad_enabled()
    cache = torch.is_autocast_cache_enabled()
    casts = [(device, *_autocast(device)) for device in ("cpu", "cuda")]

    def enter() -> ExitStack:
        stack = ExitStack()
        # somebody may wait inside transforms and modes that this was not called in
        if are_transforms_active():
            stack.enter_context(no_interpreters())
        if count_dispatch_modes() > 0:
            stack.enter_context(no_dispatch_modes())
        for device, on, dtype in casts:
            if (on, dtype) != _autocast(device):
                stack.enter_context(torch.autocast(device, dtype, on, cache))
        stack.enter_context(torch.set_grad_enabled(grad))
        stack.enter_context(under(mesh))
        return stack

    return enter


def _autocast(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
