"""Calls that are sent ahead: `start` runs a function twice, and what the first run sent
the second one waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pmod._core.bind import Starter, carry, send_ahead, started
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
    """The first messages of a piece are under way: leave it, it is run again when its
    result is wanted.
    """


class _Ahead(NamedTuple):
    """A message that was sent before anybody waits for it."""

    call: Call
    sent: Sent[list[Tensor]]
    origin: Origin


@contextmanager
def started_by(starter: Starter | None) -> Generator[None]:
    before, started.by = started.by, starter
    try:
        yield
    finally:
        started.by = before


class FirstRun(Starter):
    """Sends the first messages, and leaves."""

    def __init__(self) -> None:
        self.ahead: list[_Ahead] = []
        self.answers: list[Any] = []

    def bind(self, call: Call, xs: list[Tensor]) -> Sequence[Tensor]:
        self._send(call, xs)
        raise Sending

    def prepare(self, calls: Sequence[tuple[Call, list[Tensor]]]) -> None:
        for call, xs in calls:
            if not call.row.local and call.axis.size > 1:
                self._send(call, xs)
        if self.ahead:
            raise Sending

    def _send(self, call: Call, xs: list[Tensor]) -> None:
        of = origin() if watchers() else ("", "")
        with told(call, xs, of):
            self.ahead.append(_Ahead(call, send_ahead(call, xs), of))


class SecondRun(Starter):
    """Finds what the first run sent; what follows from that is sent as always."""

    def __init__(self, first: FirstRun, name: str, line: Line) -> None:
        self._ahead = first.ahead
        self.answers = first.answers
        self._name = name
        self._line = line  # that started it

    def bind(self, call: Call, xs: list[Tensor]) -> Sequence[Tensor]:
        if not self._ahead:
            with told(call, xs, origin()) if watchers() else ExitStack():
                return carry(call, xs)
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
        with_params = (
            second is not None and first[:2] == second[:2]
        )  # else the names tell them apart
        calls = [
            _shown(first, with_params),
            "nothing" if second is None else _shown(second, with_params),
        ]
        given = f"the function is not pure: its first run called {calls[0]}, its second run {calls[1]}"
        right = "Make it depend on its arguments only, and change none of them between start and wait."
        places = f"Started at {Site.at(self._line)}\nWaited for at {call_site()[1]}"
        return PmodError(phrase(self._name, given, f"{right}\n{places}"))


def _shown(call: Call, with_params: bool) -> str:
    return f"{call.row.name} along {call.axis.label!r}" + (
        f" with {call.params}" if with_params else ""
    )


def once(ask: Callable[[], T]) -> T:
    """Return ask(), whose messages decide what is sent next: the first run asks, and
    the second remembers.
    """
    by = started.by
    if isinstance(by, SecondRun) and by.answers:
        return by.answers.pop(0)
    with started_by(None):
        answer = ask()
    if isinstance(by, FirstRun):
        by.answers.append(answer)
    return answer


def surroundings() -> Callable[[], ExitStack]:
    """Keep the mesh, the grad mode and autocast, to be entered again."""
    mesh, grad, cache = (
        ambient(),
        torch.is_grad_enabled(),
        torch.is_autocast_cache_enabled(),
    )
    casts = [(device, *_autocast(device)) for device in ("cpu", "cuda")]

    def enter() -> ExitStack:
        stack = ExitStack()
        if are_transforms_active():  # somebody waits inside them
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
