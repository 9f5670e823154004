"""What a launched rank is told to run, and what comes back from it, as bytes."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, TypeAlias

from attrs import field, frozen

from pmod._errors import ArgumentError, PmodError, phrase


@frozen
class Task:
    """What every rank runs, under which mesh, and whether the ranks end after it.

    timeout: that of the mesh, None for the default.

    `packed` is opened under that mesh, so that meshes in it find their place.
    """

    axis_sizes: dict[str, int]
    packed: bytes = field(repr=False)
    last: bool = False
    timeout: float | None = None

    @staticmethod
    def of(
        fn: Callable[..., object],
        args: Sequence[object],
        axis_sizes: Mapping[str, int],
        *,
        last: bool = False,
        timeout: float | None = None,
    ) -> Task:
        """Return the task of a call; ArgumentError where fn or args cannot be sent."""
        try:
            packed = _pack((fn, tuple(args)))
        except pickle.PicklingError as error:
            raise ArgumentError(
                phrase("launch", f"fn or args cannot be sent to the ranks: {error}")
            ) from None
        return Task(dict(axis_sizes), packed, last, timeout)


@frozen
class Returned:
    """What the function returned."""

    packed: bytes = field(repr=False)


@frozen
class Raised:
    """An exception: always its text, and itself where it can be pickled."""

    summary: str
    text: str
    packed: bytes | None = field(repr=False)

    @staticmethod
    def of(error: BaseException) -> Raised:
        trace = error.__traceback__
        # The first frame is this package's.
        if trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        text = "".join(traceback.format_exception(type(error), error, trace))
        summary = "".join(traceback.format_exception_only(error)).strip()
        packed = None
        with contextlib.suppress(pickle.PicklingError):
            packed = _pack(error)
        return Raised(summary, text, packed)

    def __str__(self) -> str:
        return self.summary

    def error(self) -> Exception | None:
        """Return the exception itself, or None where it cannot be raised here."""
        if self.packed is None:
            return None
        # Its __init__ may have other arguments than Exception.args, or its class not be
        # here.
        try:
            error = pickle.loads(self.packed)
        except Exception:
            return None
        # A SystemExit must not end the parent, too.
        return error if isinstance(error, Exception) else None


@frozen
class Died:
    """A process that ended without a word."""

    exitcode: int | None

    @property
    def advice(self) -> str:
        if self.exitcode == -signal.SIGKILL:
            return "The system does that when memory runs out."
        return "What it printed (on stderr) may say why."

    def __str__(self) -> str:
        if self.exitcode is None:
            return "closed its connection"
        if self.exitcode >= 0:
            return f"ended with exit code {self.exitcode}"
        try:
            name = signal.Signals(-self.exitcode).name
        except ValueError:
            name = "a signal"
        return f"was ended by {name} (exit code {self.exitcode})"


Outcome: TypeAlias = Returned | Raised | Died


class _ByReference(pickle.Pickler):
    """The standard pickler, which refuses what only this side's `__main__` has.

    The other side may not import that `__main__`, or not find there what was typed.
    """

    def reducer_override(self, obj: object, /) -> Any:
        if isinstance(obj, (type, FunctionType)) and _is_only_here(obj):
            raise pickle.PicklingError(
                f"{obj.__qualname__} is defined in an interactive session"
            )
        return NotImplemented


def _is_only_here(obj: type | FunctionType) -> bool:
    """Return whether a rank that starts from this process's `__main__` lacks `obj`."""
    if obj.__module__ != "__main__":
        return False
    if not main_is_imported():
        return True
    # After `python -i script.py`, what was typed is in __main__ and in no file.
    is_class = isinstance(obj, type)
    return not is_class and not os.path.isfile(obj.__code__.co_filename)


def main_is_imported() -> bool:
    """Return whether multiprocessing imports this `__main__` into its children.

    It does a script or a module, but not a session.
    """
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return spec.name != "__main__" and not spec.name.endswith(".__main__")
    path = getattr(main, "__file__", None)
    # `python -` calls its file <stdin>.
    return path is not None and os.path.isfile(path)


def _pack(value: object) -> bytes:
    """Pickle a value by reference where that reaches the other side, else by value.

    Raises: pickle.PicklingError with the reason and what would help.
    """
    buffer = io.BytesIO()
    # A __reduce__ raises what it likes, here and below.
    try:
        _ByReference(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
        return buffer.getvalue()
    except Exception as error:
        reason = str(error)
    try:
        cloudpickle = importlib.import_module("cloudpickle")
    except ImportError:
        raise pickle.PicklingError(
            f"{reason}.\nDefine it at the top level of a module, "
            "or install cloudpickle, which carries notebook cells, "
            "lambdas and closures: pip install cloudpickle"
        ) from None
    try:
        return cloudpickle.dumps(value)
    except Exception as error:
        raise pickle.PicklingError(str(error)) from None


def unpack(packed: bytes) -> tuple[Callable[..., object], tuple[object, ...]]:
    """Return fn and args, or raise what would be right."""
    try:
        return pickle.loads(packed)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise PmodError(
            phrase(
                "launch",
                f"fn or args cannot be loaded in the ranks: {reason}",
                "What is passed must be defined at the top level of a module "
                'or script, and not under `if __name__ == "__main__":`.',
            )
        ) from error


def pack_result(result: object) -> bytes:
    """Pickle what fn returned, or raise what would be right."""
    try:
        return _pack(result)
    except pickle.PicklingError as error:
        kind = type(result).__name__
        raise PmodError(
            phrase(
                "launch",
                f"fn returned a {kind}, which cannot be sent back: {error}",
                "Return tensors, numbers, or containers of them.",
            )
        ) from None
