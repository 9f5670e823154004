"""A message under way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar, cast

from torch import Tensor

T = TypeVar("T")
U = TypeVar("U")


class Waitable(Protocol):
    """A work of torch, or of pmod's own."""

    def wait(self) -> object: ...


class Sent(Generic[T]):
    """A message under way; `wait` gives what it brings, once and for all."""

    __slots__ = ("_finish", "_works")

    def __init__(
        self, works: Sequence[Waitable], finish: Callable[[], T | Sent[T]]
    ) -> None:
        self._works = works
        self._finish = finish

    def wait(self) -> T:
        """Wait for the message, and return what it brings."""
        for work in self._works:
            work.wait()
        result = self._finish()
        # A second message may follow from what the first one brought.
        if isinstance(result, Sent):
            return cast("Sent[T]", result).wait()
        return result

    def then(self, f: Callable[[T], U | Sent[U]]) -> Sent[U]:
        """Return the same message, with `f` applied to what it brings.

        `f` may send again.
        """
        return Sent((), lambda: f(self.wait()))


def arrived(x: Tensor) -> Sent[Tensor]:
    """Return what needed no message as one that has arrived."""
    return Sent((), lambda: x)
