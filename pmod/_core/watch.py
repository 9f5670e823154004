"""Who watches the calls: `debug`, `trace`, `estimate` and `explain` are watchers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Self, TypeVar

import torch
from torch import Tensor

from pmod._core.row import Call
from pmod._errors import PmodError, phrase
from pmod._mesh.axis import Axis
from pmod._ranks import world
from pmod._site import Origin, call_site, on_behalf_of

T = TypeVar("T")


class Watcher:
    """A check or a counter of your own: it is told of every collective, forward and
    backward, while it is on.

    Write a class with some of these methods, which do nothing here, and put it on:
    ``with MyWatcher() as watcher:``. It then hears of this rank's collectives; one that
    is on where `simulate` is called hears of those of all its ranks. `call` says what
    is sent: ``call.row.name`` ("psum", "all_gather", ...), ``call.axis.label`` and
    ``call.axis.size``. Several hear of a call in the order in which they were put on,
    and of its end in the other one. What `before` raises reaches the user in place of
    the call, and nothing is sent: raise on all ranks, or the others wait for this one.
    Those that have heard `before` of a call hear its `after`, whatever is raised.
    Nobody hears of the collectives that a watcher calls itself. Compiled code is not
    seen. Cost: some 10 us per collective.
    Raises: PmodError where it is put on twice.

    >>> class BytesOfModules(pmod.Watcher):
    ...     def __init__(self, model):
    ...         self.inside, self.bytes = ["elsewhere"], {}
    ...         for name, module in model.named_modules():
    ...             module.register_forward_pre_hook(lambda *_, name=name: self.inside.append(name))
    ...             module.register_forward_hook(lambda *_: self.inside.__delitem__(-1))
    ...     def before(self, call, xs, origin):
    ...         inside = self.inside[-1]
    ...         self.bytes[inside] = self.bytes.get(inside, 0) + sum(x.nbytes for x in xs)
    >>> class Centred(torch.nn.Module):
    ...     def forward(self, x):
    ...         return x - pmod.pmean(x, "data")
    >>> def step():
    ...     model = torch.nn.Sequential(torch.nn.ReLU(), Centred())
    ...     with BytesOfModules(model) as watcher:
    ...         pmod.psum(model(torch.ones(4, requires_grad=True)).sum(), "data").backward()
    ...     return watcher.bytes
    >>> pmod.simulate(step, data=2)[0]  # in the module; and the loss, and backward
    {'1': 16, 'elsewhere': 24}
    """

    def before(self, call: Call, xs: Sequence[Tensor], origin: Origin) -> None:
        """A call begins: its tensors, which must stay as they are; the public function,
        and the line that called it.

        The function of a derivative reads "the backward of psum", with the line of the
        forward call.
        """

    def after(self, call: Call) -> None:
        """The call of the last `before` has its result, or has failed; one that was
        started is under way.
        """

    def waited(self, call: Call, seconds: float) -> None:
        """A call that was started has its result, after so many seconds of waiting."""

    def claimed(
        self, leaves: Sequence[tuple[Tensor, str]], axis: Axis, function: str
    ) -> None:
        """Specs say of these leaves, with their names, that all ranks hold the same."""

    def compiled(self) -> None:
        """A collective goes into a compiled graph, where it is not seen."""

    def __enter__(self) -> Self:
        if any(watcher is self for watcher in watchers()):
            given = f"this {type(self).__name__} is on already"
            right = "Put it on once, or make another one."
            raise PmodError(phrase("Watcher", given, right))
        watchers().append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        watchers()[:] = [watcher for watcher in watchers() if watcher is not self]


def watchers() -> list[Watcher]:
    """Return those of this process; in a simulation those of this rank."""
    return world.now.here.watchers


def called_as(function: str, f: Callable[..., T], *args: object) -> T:
    """Return f(*args), called in a hook.

    Watchers see what it sends as this function's, at the user's line.
    """
    if torch.compiler.is_compiling() or not watchers():
        return f(*args)
    with on_behalf_of((function, call_site()[1])):
        return f(*args)


class _Telling(threading.local):
    now: bool = False


_telling = _Telling()


def _hears(hear: Callable[..., None], *args: object) -> None:
    """Call a method of a watcher; nobody hears of what it sends itself."""
    _telling.now = True
    try:
        hear(*args)
    finally:
        _telling.now = False


def tell(hear: Callable[[Watcher], None]) -> None:
    """Let all watchers hear, in their order, also where one of them raises."""
    with ExitStack() as stack:
        for watcher in reversed(watchers()):
            stack.callback(_hears, hear, watcher)


@contextmanager
def told(call: Call, xs: list[Tensor], of: Origin) -> Generator[None]:
    """Let the watchers hear this call begin and end."""
    # what a watcher sends itself would have it watch itself, without end
    if _telling.now:
        yield
        return
    with ExitStack() as stack:
        for watcher in list(watchers()):
            _hears(watcher.before, call, xs, of)
            stack.callback(_hears, watcher.after, call)
        yield
