"""`start`: a function whose messages are sent now and waited for later.

What pmod itself does is pure. Such a piece of work (`_Piece`) is run up to its first
messages, which are sent, and is left; when its result is wanted it is run again, and
finds what was sent. A function of pmod's is one piece.

A user's function is not pure: it may draw random numbers, or change buffers. It runs
once, and each collective in it is a piece. In place of the results it gets tensors that
are under way (`_Later`): whoever touches one waits for it, and from then on it is a
tensor like any other.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any, Generic, NoReturn, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from pmod._core.ahead import (
    FirstRun,
    SecondRun,
    Sending,
    carry_watched,
    started_by,
    surroundings,
)
from pmod._core.bind import Starter, is_transformed, started
from pmod._core.leaves import tensors_in
from pmod._core.ready import without_memory
from pmod._core.row import Call
from pmod._errors import ArgumentError, PmodError, phrase, quoted
from pmod._site import Line, line_of
from pmod._torch import (
    are_transforms_active,
    backward_here,
    count_function_modes,
    count_uses,
    forward_level,
    make_wrapper,
    no_function_subclasses,
    saving_hooks,
    swap_values,
    untraced,
    version_of,
)

T = TypeVar("T")


class _Piece(Generic[T]):
    """A pure function that has sent its first messages; `finish` gives its result."""

    def __init__(
        self, f: Callable[[], T], name: str, tensors: Sequence[Tensor], line: Line
    ) -> None:
        self._name = name
        # an error names the line that started it
        self._line = line
        self._tensors = [x for x in tensors if not is_lazy(x) and not x.is_inference()]
        self._versions = [version_of(x) for x in self._tensors]
        self._enter = surroundings()
        self._results: list[T] = []
        self._f: Callable[[], T] | None = f
        self._first = FirstRun()
        try:
            with started_by(self._first):
                self._results.append(f())
        except Sending:
            return
        # no message was needed, so there is nothing to run again
        self._f = None

    @property
    def under_way(self) -> bool:
        return self._f is not None

    def replace(self, result: T | None) -> None:
        """Remember another result, or none."""
        self._results = [] if result is None else [result]

    def finish(self) -> T:
        """Return the result, the same each time; raise if it raised before."""
        # it is run again once only, also where that raises
        f, self._f = self._f, None
        if f is not None:
            self._results.append(self._run_again(f))
        if not self._results:
            raise _raised_before(self._name)
        return self._results[0]

    def _run_again(self, f: Callable[[], T]) -> T:
        if [version_of(x) for x in self._tensors] != self._versions:
            given = "a tensor was changed in place between start and wait"
            right = "Change a copy, or wait first."
            raise ArgumentError(phrase(self._name, given, right))
        second = SecondRun(self._first, self._name, self._line)
        with started_by(second), self._enter():
            result = f()
        second.check_all_found()
        return result


def _raised_before(name: str) -> PmodError:
    return PmodError(phrase(name, "its wait raised before", "Start it again."))


class _Later(Tensor):
    """A tensor that is under way.

    Whatever is done with it first makes it the tensor that arrives: the same object.
    """

    settle: Callable[[], None]

    @staticmethod
    def of(like: Tensor) -> _Later:
        # it may require a gradient: who uses it unseen then refers to it, which
        # `become` sees
        has_gradient = like.is_floating_point() or like.is_complex()
        return make_wrapper(
            _Later,
            (),
            dtype=like.dtype,
            device=like.device,
            requires_grad=torch.is_grad_enabled() and has_gradient,
        )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        # where a compiler traces this, it must not follow the wait into the message
        untraced(_settle_all)((args, kwargs))
        return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, *_: object, **__: object) -> NoReturn:
        # what comes this far was not seen by __torch_function__, which waits
        raise _used_unseen()

    def become(self, value: Tensor) -> None:
        """Be the tensor that has arrived: `value`, which is nothing afterwards.

        Raises: PmodError where autograd or a transform holds the tensor as it was.
        """
        with no_function_subclasses():
            if self.grad_fn is not None or count_uses(self) > 1:
                raise _used_unseen()
        del self.settle
        swap_values(self, value)
        self.__class__ = Tensor  # pyright: ignore[reportAttributeAccessIssue]


def _become(
    laters: Sequence[_Later], values: Sequence[Tensor], xs: Sequence[Tensor]
) -> None:
    # `become` empties the value: an argument of the user's, or one that comes twice, is
    # passed on as a view
    kept = {id(x) for x in xs}
    for later, value in zip(laters, values, strict=True):
        if id(value) in kept:
            later.become(value.view_as(value))
        else:
            later.become(value)
            kept.add(id(value))


def _used_unseen() -> PmodError:
    given = "a result was used before it arrived, by a custom autograd.Function or a "
    given += "torch.func transform"
    right = "Pass y.clone() to these: it waits for the message."
    return PmodError(phrase("start", given, right))


def _settle_all(tree: object) -> None:
    """Wait for the tensors that are under way in what a torch function was given."""
    for x in tensors_in(tree):
        # one that comes twice has become a tensor when its turn comes again
        if isinstance(x, _Later):
            x.settle()


class _Once(Starter):
    """Makes each collective of a user's function a piece."""

    def __init__(self, line: Line) -> None:
        self._state = self._now()
        self._line = line
        self.settles: list[Callable[[], None]] = []

    def _now(self) -> tuple[object, ...]:
        # where it differs from that at the start, f is in a custom Function, a
        # backward, a checkpoint or a dual level of its own, which need a result at once
        task, level = backward_here(), forward_level()
        return torch.is_grad_enabled(), task, level, saving_hooks(True)

    def bind(self, call: Call, xs: list[Tensor]) -> Sequence[Tensor]:
        if not self._can_wait():
            return carry_watched(call, xs)
        # by then the one who runs the piece has taken this one's place
        return self.defer(
            lambda: cast(Starter, started.by).bind(call, xs), xs, call.row.name
        )

    def _can_wait(self) -> bool:
        return self._now() == self._state

    def can_defer(self, xs: list[Any]) -> bool:
        """Whether pure work on these may be run in two runs."""
        if not all(isinstance(x, Tensor) for x in xs):
            return False
        # a mode (shard_map's) or a transform would see the two runs as two
        if count_function_modes() > 0 or not self._can_wait():
            return False
        return not is_transformed(xs)

    def defer(
        self, f: Callable[[], Sequence[Tensor]], xs: Sequence[Tensor], name: str
    ) -> Sequence[Tensor]:
        """Send the first messages of f, and return what becomes its results.

        f returns as many tensors as xs, of their dtypes and on their devices.
        """
        piece = _Piece(f, name, xs, self._line)
        if not piece.under_way:
            return piece.finish()
        laters = [_Later.of(x) for x in xs]

        def settle() -> None:
            values = piece.finish()
            if values is not laters:
                # where `become` raises there is no result
                piece.replace(None)
                _become(laters, values, xs)
                piece.replace(laters)

        for later in laters:
            later.settle = settle
        self.settles.append(settle)
        return laters


def as_piece(
    f: Callable[[list[Any]], Sequence[Any]], name: str
) -> Callable[[list[Any]], Sequence[Any]]:
    """Make pure work a piece where it can wait.

    f takes a list and returns as many; it goes on after its first message.
    """

    def work(leaves: list[Any]) -> Sequence[Any]:
        # asked first: torch.compile does not follow what comes below
        if torch.compiler.is_compiling():
            return f(leaves)
        by = started.by
        if isinstance(by, _Once) and by.can_defer(leaves):
            return by.defer(lambda: f(leaves), leaves, name)
        return f(leaves)

    return work


def _is_pure(f: object, args: Iterable[object], kwargs: dict[str, object]) -> bool:
    """Whether f is a function of pmod's that calls nothing of the user's."""
    while isinstance(f, partial):
        f, args, kwargs = f.func, (*args, *f.args), kwargs | f.keywords
    if any(map(_is_function, (*args, *kwargs.values()))):
        return False
    if isinstance(f, MethodType):
        f = f.__func__
    f = without_memory(f)
    if not isinstance(f, FunctionType) or f.__module__.partition(".")[0] != "pmod":
        return False
    # a decorator's inner function, and one that a function of pmod's makes, may call
    # what they were given
    return f.__code__.co_name == f.__name__ and "<locals>" not in f.__qualname__


def _is_function(x: object) -> bool:
    return callable(x) and not isinstance(x, Tensor)


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
        """Return the result, with its derivative: each time the same object.

        Raises: ArgumentError where a tensor was changed in place after `start`; what
        the started function raises.
        """
        finish, self._finish = self._finish, None
        if finish is not None:
            self._result.append(finish())
        if not self._result:
            raise _raised_before(self._name)
        return self._result[0]

    def __del__(self) -> None:
        # one whose __init__ raised has no such attribute
        if getattr(self, "_finish", None) is None:
            return
        given = "a Pending was never waited for"
        right = "Call .wait(), also where the result is unused."
        warnings.warn(phrase(self._name, given, right), RuntimeWarning, stacklevel=2)


def start(f: Callable[..., T], *args: Any, **kwargs: Any) -> Pending[T]:
    """Start a collective and return at once; ``.wait()`` gives its result.

    The result has its derivatives, as that of the plain call. f is usually a
    collective, but may be any function. It runs once, now: its random numbers, buffers
    and autocast are those of the call. What its collectives return is under way:
    whatever f does with that waits for it first, so compute with the results after
    `wait`. (A function of pmod's that goes on after its first message, as a convolution
    does, goes on at `wait`.) Until then what was sent must stay as it is: if a tensor
    was changed in place, `wait` raises. All ranks start and wait in the same order.
    Under torch.func transforms and torch.compile nothing is sent ahead: the result is
    ready at once.

    Raises: what f raises, at once if it is about its arguments; PmodError where f
    passes what is under way to a custom autograd.Function or a torch.func transform,
    which cannot wait: pass them a clone.

    >>> pending = pmod.start(pmod.psum, torch.ones(2), mesh["model"])
    >>> pending.wait()  # after some other work
    tensor([1., 1.])
    """
    if not callable(f):
        right = "Pass a function, then its arguments."
        raise ArgumentError(phrase("start", f"f is {quoted(f)}", right))
    name = getattr(f, "__name__", type(f).__name__)
    if torch.compiler.is_compiling() or are_transforms_active():
        result = f(*args, **kwargs)
        return Pending(lambda: result, name)
    if started.by is not None:
        given = f"{name} calls start itself"
        raise PmodError(phrase("start", given, "Start the functions one by one."))
    line = line_of(sys._getframe(1))
    if _is_pure(f, args, kwargs):
        tensors = tensors_in((args, kwargs))
        piece = _Piece(lambda: f(*args, **kwargs), name, tensors, line)
        return Pending(piece.finish, name)
    once = _Once(line)
    with started_by(once):
        result = f(*args, **kwargs)

    def finish() -> T:
        # in the order of the calls, which is the same on all ranks
        for settle in once.settles:
            settle()
        return result

    return Pending(finish, name)
