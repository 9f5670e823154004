"""A message under way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class Sent:
    """A message under way; `wait` gives its tensor, once and for all."""

    __slots__ = ("_finish", "_works")

    def __init__(self, works: Sequence[Any], finish: Callable[[], Any]) -> None:
        self._works = works
        self._finish = finish

    def wait(self) -> Any:
        for work in self._works:
            work.wait()
        result = self._finish()
        # a second message may follow from what the first one brought
        return result.wait() if isinstance(result, Sent) else result

    def then(self, f: Callable[[Any], Any]) -> Sent:
        """The same message, with `f` applied to what it brings; `f` may send again."""
        return Sent((), lambda: f(self.wait()))


def arrived(x: Tensor) -> Sent:
    """What needed no message."""
    return Sent((), lambda: x)
