"""`start`: a function whose messages are sent now and waited for later.

What pmod itself does is pure. Such a piece of work (`_Piece`) is run up to its first messages, which are sent, and is
left; when its result is wanted it is run again, and finds what was sent.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from time import perf_counter
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from pmod._ambient import ambient, under, watchers
from pmod._autodiff import Call, Origin, Starter, carry, on_behalf_of, origin, send_ahead, started, tensors_in, told
from pmod._errors import ArgumentError, PmodError, explain
from pmod._wire import Sent

T = TypeVar("T")


# --- a pure function, run twice -------------------------------------------------------------------


class _Sending(BaseException):
    """The first messages of a piece are under way: leave it, it is run again when its result is wanted."""


class _Ahead(NamedTuple):
    """A message that was sent before anybody waits for it."""

    call: Call
    sent: Sent
    origin: Origin


@contextmanager
def _by(starter: Starter | None) -> Generator[None]:
    before, started.by = started.by, starter
    try:
        yield
    finally:
        started.by = before


class _FirstRun(Starter):
    """Sends the first messages, and leaves."""

    def __init__(self) -> None:
        self.ahead: list[_Ahead] = []
        self.answers: list[Any] = []

    def bind(self, call: Call, xs: list[Tensor]) -> Sequence[Tensor]:
        self._send(call, xs)
        raise _Sending

    def prepare(self, calls: Sequence[tuple[Call, list[Tensor]]]) -> None:
        for call, xs in calls:
            if not call.row.local and call.axis.size > 1:
                self._send(call, xs)
        if self.ahead:
            raise _Sending

    def _send(self, call: Call, xs: list[Tensor]) -> None:
        of = origin() if watchers() else ("", "")
        with told(call, xs, of):
            self.ahead.append(_Ahead(call, send_ahead(call, xs), of))


class _SecondRun(Starter):
    """Finds what the first run sent; what follows from that is sent as always."""

    def __init__(self, first: _FirstRun, name: str) -> None:
        self._ahead = first.ahead
        self.answers = first.answers
        self._name = name

    def bind(self, call: Call, xs: list[Tensor]) -> Sequence[Tensor]:
        if not self._ahead:
            with told(call, xs, origin()) if watchers() else ExitStack():
                return carry(call, xs)
        first = self._ahead.pop(0)
        if first.call != call:
            given = (
                f"the function is not pure: its first run called {_shown(first.call)}, its second run {_shown(call)}"
            )
            raise PmodError(explain(self._name, given, "Make it depend on its arguments only."))
        if not watchers():
            return carry(call, xs, lambda _: first.sent.wait())
        began = perf_counter()
        with on_behalf_of(first.origin):
            ys = carry(call, xs, lambda _: first.sent.wait())
        for watcher in watchers():
            watcher.waited(call, perf_counter() - began)
        return ys


def _shown(call: Call) -> str:
    return f"{call.row.name} along {call.axis.label!r}"


def once(ask: Callable[[], T]) -> T:
    """Return ask(), whose messages decide what is sent next: the first run asks, and the second remembers."""
    by = started.by
    if isinstance(by, _SecondRun) and by.answers:
        return by.answers.pop(0)
    with _by(None):
        answer = ask()
    if isinstance(by, _FirstRun):
        by.answers.append(answer)
    return answer


def _surroundings() -> Callable[[], ExitStack]:
    """Keep the mesh, the grad mode and autocast, to be entered again."""
    mesh, grad, cache = ambient(), torch.is_grad_enabled(), torch.is_autocast_cache_enabled()
    casts = [(device, *_autocast(device)) for device in ("cpu", "cuda")]

    def enter() -> ExitStack:
        stack = ExitStack()
        for device, on, dtype in casts:
            if (on, dtype) != _autocast(device):
                stack.enter_context(torch.autocast(device, dtype, on, cache))
        stack.enter_context(torch.set_grad_enabled(grad))
        stack.enter_context(under(mesh))
        return stack

    return enter


def _autocast(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


class _Piece(Generic[T]):
    """A pure function that has sent its first messages; `finish` gives its result, or raises, and again the same."""

    def __init__(self, f: Callable[[], T], name: str, tensors: Sequence[Tensor]) -> None:
        self._name = name
        self._tensors = [x for x in tensors if not x.is_inference()]
        self._versions = [x._version for x in self._tensors]
        self._enter = _surroundings()
        self._results: list[T] = []
        self._f: Callable[[], T] | None = f
        self._first = _FirstRun()
        try:
            with _by(self._first):
                self._results.append(f())
        except _Sending:
            return
        self._f = None  # no message was needed

    @property
    def under_way(self) -> bool:
        return self._f is not None

    def finish(self) -> T:
        f, self._f = self._f, None
        if f is not None:
            if any(x._version != version for x, version in zip(self._tensors, self._versions, strict=True)):
                given = "a tensor was changed in place between start and wait"
                raise ArgumentError(explain(self._name, given, "Change a copy, or wait first."))
            with _by(_SecondRun(self._first, self._name)), self._enter():
                self._results.append(f())
        if not self._results:
            raise PmodError(explain(self._name, "its wait raised before", "Start it again."))
        return self._results[0]


class Pending(Generic[T]):
    """A collective under way, made by `start`; `wait` gives its result.

    >>> pending = pmod.start(pmod.psum, torch.ones(2), mesh["model"])
    >>> pending.wait() is pending.wait()
    True
    """

    def __init__(self, finish: Callable[[], T], name: str) -> None:
        self._finish: Callable[[], T] | None = finish
        self._name = name
        self._result: list[T] = []

    def wait(self) -> T:
        """Return the result, with its derivative; the same object however often it is asked for.

        Raises: ArgumentError where a tensor was changed in place after `start`; what the started function raises.
        """
        finish, self._finish = self._finish, None
        if finish is not None:
            self._result.append(finish())
        if not self._result:
            raise PmodError(explain(self._name, "its wait raised before", "Start it again."))
        return self._result[0]

    def __del__(self) -> None:
        if getattr(self, "_finish", None) is not None:
            warnings.warn(
                explain(self._name, "a Pending was never waited for", "Call .wait(), also where the result is unused."),
                RuntimeWarning,
                stacklevel=2,
            )


def start(f: Callable[..., T], *args: Any, **kwargs: Any) -> Pending[T]:
    """Start a collective and return at once; ``.wait()`` gives the same differentiable result.

    f is any pure function of tensors, usually a collective. What it does before its first message is done now, the rest
    at `wait`, for which f is run a second time and finds the message that was sent. Until then its tensors must stay as
    they are: where one was changed in place, `wait` raises. All ranks start and wait in the same order. Under
    torch.func transforms and torch.compile nothing is sent ahead: the result is ready at once.

    Raises: what f raises, at once if it is about its arguments.

    >>> pending = pmod.start(pmod.psum, torch.ones(2), mesh["model"])
    >>> pending.wait()  # after some other work
    tensor([1., 1.])
    """
    name = getattr(f, "__name__", type(f).__name__)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        result = f(*args, **kwargs)
        return Pending(lambda: result, name)
    if started.by is not None:
        raise PmodError(explain("start", f"{name} calls start itself", "Start the functions one by one."))
    piece = _Piece(partial(f, *args, **kwargs), name, tensors_in((args, kwargs)))
    return Pending(piece.finish, name)
