"""`debug`: ranks compare what they are about to do, so that a hang becomes an error.

Speed is traded for proof. Before each collective every rank writes its words on a
board, the store of the world, and reads the others'. Where they differ all of them
raise the same table. What a row takes as invariant must be the same bits on every rank.
A rank that waits long says on the board for what, so ranks that wait for each other in
a cycle see it within seconds.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from pmod._core.arguments import check_flag, check_tolerance
from pmod._core.lineage import lineage
from pmod._core.row import Call
from pmod._core.watch import Watcher, watchers
from pmod._debug.compare import (
    Words,
    bits_of,
    compare_calls,
    compare_words,
    differ,
    difference,
    outside_transforms,
)
from pmod._debug.invariant import check_lineage, check_root
from pmod._errors import ArgumentError, phrase, quoted
from pmod._mesh.ambient import ambient
from pmod._mesh.axis import Axis
from pmod._mesh.factors import few
from pmod._ranks import world
from pmod._site import BACKWARD, Origin, call_site
from pmod._torch import are_transforms_active

P = ParamSpec("P")
R = TypeVar("R")


class _Checker(Watcher):
    """The watcher that `debug` sets."""

    def __init__(self, rtol: float) -> None:
        self.rtol = rtol
        self.warned = False

    def claimed(
        self, leaves: Sequence[tuple[Tensor, str]], axis: Axis, function: str
    ) -> None:
        """Raise if leaves whose specs leave the axis out differ between its ranks."""
        if axis.size == 1:
            return
        site = call_site()[1]
        origin, (xs, names) = (function, site), zip(*leaves, strict=True)
        shapes = [tuple(x.shape) for x in xs]
        words = Words.of_tensors(xs, origin, axis, ", ".join(names), shapes)
        with outside_transforms():
            same = compare_words(words, bits_of(xs), axis, origin)
            found = difference(xs, names, axis, self.rtol, same)
        if found is not None:
            ranks = f"ranks {few(axis.ranks)} should hold one value"
            given = f"{found}, but its spec leaves {axis.label!r} out, so {ranks}"
            ways = "pmod.replicate, pmod.pmean"
            right = f"Make it one ({ways}), or name the axis in the spec."
            raise differ(origin, axis, given, f"{right}\nCalled at {site}")

    def compiled(self) -> None:
        if not self.warned:
            self.warned = True
            right = "Run the eager function under debug."
            text = phrase("debug", "compiled code is not checked", right)
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def before(self, call: Call, xs: Sequence[Tensor], origin: Origin) -> None:
        if call.axis.size == 1:
            return
        words = Words.of_call(call, xs, origin)
        traced = self._has_lineage(call, origin)
        with outside_transforms():
            self._check(call, xs, words, origin)
            differentiated = [x for x in xs if traced and x.requires_grad]
            if differentiated:
                found = [lineage(x, call.axis) for x in differentiated]
                check_lineage(found, call.axis, origin)

    def _has_lineage(self, call: Call, origin: Origin) -> bool:
        """Return whether torch's graph says what x is made from."""
        forward = call.row.takes == "V" and not origin[0].startswith(BACKWARD)
        return forward and torch.is_grad_enabled() and not are_transforms_active()

    def _check(
        self, call: Call, xs: Sequence[Tensor], words: Words, origin: Origin
    ) -> None:
        invariant = call.row.takes == "I"
        same = compare_calls(call, xs, words, origin, invariant)
        if not invariant:
            return
        name = "the gradient" if origin[0].startswith(BACKWARD) else "x"
        names = [name]
        if len(xs) > 1:
            names = [f"{name} {i}" for i in range(len(xs))]
        found = difference(xs, names, call.axis, self.rtol, same)
        if found is not None:
            given = f"{found}, but all ranks should hold the same there (I)"
            raise differ(origin, call.axis, given, f"Called at {origin[1]}")


def _checker_in(watching: Iterable[Watcher]) -> _Checker | None:
    """Return the watcher that `debug` has set, if it is on."""
    for watcher in watching:
        if isinstance(watcher, _Checker):
            return watcher
    return None


class _Backward:
    """A look into torch.autograd's two entries, while debug is on in this process.

    torch's anomaly mode is on meanwhile, so that the graph knows the lines that made
    it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # The ranks of a simulation share torch's entries, so the last one puts them
        # back.
        self._users = 0
        self._backward: Callable[..., object] = torch.autograd.backward
        self._grad: Callable[..., object] = torch.autograd.grad
        self._anomaly = (False, True)

    def watch(self) -> None:
        """Look into torch's entries from now on."""
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            autograd = torch.autograd
            self._backward, self._grad = autograd.backward, autograd.grad
            autograd.backward = self._watched_backward
            autograd.grad = self._watched_grad
            check_nan = torch.is_anomaly_check_nan_enabled()
            self._anomaly = torch.is_anomaly_enabled(), check_nan
            # The mode's own search for NaN is left as the user has it.
            autograd.set_detect_anomaly(True, check_nan=all(self._anomaly))

    def leave(self) -> None:
        """Take back one `watch`."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                torch.autograd.backward = self._backward
                torch.autograd.grad = self._grad
                torch.autograd.set_detect_anomaly(*self._anomaly)

    def _watched_backward(self, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        _look_at_roots(tensors, kwargs.get("inputs"))
        return self._backward(tensors, *args, **kwargs)

    def _watched_grad(
        self, outputs: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> object:
        _look_at_roots(outputs, inputs)
        return self._grad(outputs, inputs, *args, **kwargs)


def _look_at_roots(
    roots: Tensor | Iterable[object], inputs: Tensor | Sequence[Tensor] | None
) -> None:
    if are_transforms_active() or _checker_in(watchers()) is None:
        return
    wanted = [inputs] if isinstance(inputs, Tensor) else inputs
    for root in [roots] if isinstance(roots, Tensor) else roots:
        # torch takes edges of the graph, too, of which nothing is known here.
        if isinstance(root, Tensor) and root.requires_grad:
            with outside_transforms():
                check_root(root, wanted)


class debug:  # lower case: it reads as the function it is called as
    """Compare the ranks before each collective, so that hangs and silent corruption
    become errors.

    As a context manager, ``with pmod.debug():``; as a statement, ``pmod.debug()`` until
    ``pmod.debug(False)``; or for a whole run, PMOD_DEBUG=1. All ranks switch it on and
    off at the same places. Before each collective, forward and backward, the ranks of
    the axis compare function, axis, arguments, shapes, dtypes, devices, requires_grad,
    active transforms, the structure of trees with the keys of their dicts, and call
    site (module, file name and line: the files may lie elsewhere on each node); what is
    taken as invariant (into `pvary`, `shard`, `place`, and back into `psum`, `unshard`,
    `pick`) must be the same bits on all of them, or within rtol of the largest
    magnitude. Ranks that wait for each other in different places find out within
    seconds.
    Cost: one small message before each collective, and a look at every bit of what is
    invariant. Eager code only: compiled code runs unchecked, and a warning says so.
    Raises: MismatchError on every rank of the axis, with what each was about to do.

    >>> def step():
    ...     with pmod.debug():
    ...         return pmod.psum(torch.ones(2 if pmod.axis_index("model") else 3), "model")
    >>> pmod.simulate(step, model=2)  # doctest: +ELLIPSIS, +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    MismatchError: pmod.psum(axis='model') at (model=0): the ranks differ in shapes: ...
    """

    def __init__(self, on: bool = True, *, rtol: float = 0.0) -> None:
        check_flag(on, "debug", "on")
        rtol = check_tolerance(rtol, "debug")
        self._before = list(watchers())
        wanted = [w for w in self._before if not isinstance(w, _Checker)]
        # The one rank of an estimate has nobody to compare with.
        if on and not world.current().alone:
            wanted.append(_Checker(rtol))
        self._change(wanted)

    def _change(self, to: list[Watcher]) -> None:
        was = _checker_in(watchers()) is not None
        now = _checker_in(to) is not None
        watchers()[:] = to
        if now and not was:
            world.processes().the(_Backward).watch()
        elif was and not now:
            world.processes().the(_Backward).leave()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._change(self._before)


def checked(f: Callable[P, R]) -> Callable[P, R]:
    """Return a step function that runs under `debug` the first time, and then plainly.

    Each new signature is checked once: the shapes and dtypes of its tensors, what
    requires grad, the types of all else, grad mode and mesh. All ranks must come to a
    new signature in the same call: where shards change their lengths from step to step
    on some ranks only, use `debug` instead.
    Cost: a look-up per call. Raises: ArgumentError where f cannot be called; as
    `debug`, in those calls.

    >>> @pmod.checked
    ... def total(x):
    ...     return pmod.psum(x, "model")
    >>> pmod.simulate(lambda: total(torch.ones(2)), model=2)[0]
    tensor([2., 2.])
    """
    if not callable(f):
        right = "Pass a step function: @pmod.checked above its def."
        raise ArgumentError(phrase("checked", f"f is {quoted(f)}", right))
    seen: set[object] = set()

    @wraps(f)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        ours = world.current()
        # The one rank of an estimate has nobody to compare with.
        if ours.alone:
            return f(*args, **kwargs)
        # Ranks that are threads share this function, and each must be checked.
        place = None if ours.by_processes else ours.topology.rank
        mode = ambient(), torch.is_grad_enabled(), place
        key = *mode, _signature(args), _signature(kwargs)
        if key in seen or torch.compiler.is_compiling():
            return f(*args, **kwargs)
        with debug():
            result = f(*args, **kwargs)
        seen.add(key)
        return result

    return wrapper


def _signature(tree: object) -> object:
    """Return what makes `checked` check again when it is new."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.dtype, tree.device, tree.requires_grad
    if isinstance(tree, dict):
        return tuple((key, _signature(value)) for key, value in tree.items())
    if isinstance(tree, list | tuple):
        return tuple(map(_signature, tree))
    return type(tree)


if os.environ.get("PMOD_DEBUG", "0") not in ("", "0"):
    debug()
