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
    """What every rank runs, under which mesh; `packed` is opened under it, so that
    meshes in it find their place.
    """

    axis_sizes: dict[str, int]
    packed: bytes = field(repr=False)
    last: bool = False  # whether the ranks end after it

    @staticmethod
    def of(
        fn: Callable[..., object],
        args: Sequence[object],
        axis_sizes: Mapping[str, int],
        *,
        last: bool = False,
    ) -> Task:
        try:
            return Task(dict(axis_sizes), _pack((fn, tuple(args))), last)
        except pickle.PicklingError as error:
            raise ArgumentError(
                phrase("launch", f"fn or args cannot be sent to the ranks: {error}")
            ) from None


@frozen
class Returned:
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
        if trace is not None and trace.tb_next is not None:
            trace = trace.tb_next  # the first frame is this file's
        packed = None
        with contextlib.suppress(pickle.PicklingError):
            packed = _pack(error)
        summary = "".join(traceback.format_exception_only(error)).strip()
        return Raised(
            summary,
            "".join(traceback.format_exception(type(error), error, trace)),
            packed,
        )

    def error(self) -> Exception | None:
        if self.packed is None:
            return None
        try:
            error = pickle.loads(self.packed)
        except Exception:  # an __init__ with other arguments than Exception.args, a class that is not here
            return None
        return (
            error if isinstance(error, Exception) else None
        )  # a SystemExit must not end the parent, too


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
    """The standard pickler, which refuses what is named in a `__main__` that the other
    side does not import.
    """

    def reducer_override(self, obj: Any, /) -> Any:
        if (
            isinstance(obj, (type, FunctionType))
            and obj.__module__ == "__main__"
            and not _imported_with_main(obj)
        ):
            raise pickle.PicklingError(
                f"{obj.__qualname__} is defined in an interactive session"
            )
        return NotImplemented


def _imported_with_main(obj: type | FunctionType) -> bool:
    """Whether a rank that starts from this process's `__main__` finds `obj` there."""
    # after `python -i script.py`, what was typed is in __main__ and in no file
    return main_is_imported() and (
        isinstance(obj, type) or os.path.isfile(obj.__code__.co_filename)
    )


def main_is_imported() -> bool:
    """Whether multiprocessing imports this `__main__` into its children: a script or a
    module, but no session.
    """
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return spec.name != "__main__" and not spec.name.endswith(".__main__")
    path = getattr(main, "__file__", None)
    return path is not None and os.path.isfile(
        path
    )  # `python -` calls its file <stdin>


def _pack(value: object) -> bytes:
    """Pickled by reference where that reaches the other side, else by value.

    Raises: pickle.PicklingError with the reason and what would help.
    """
    buffer = io.BytesIO()
    try:
        _ByReference(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
        return buffer.getvalue()
    except Exception as error:  # a __reduce__ raises what it likes
        reason = str(error)
    try:
        cloudpickle = importlib.import_module("cloudpickle")
    except ImportError:
        raise pickle.PicklingError(
            f"{reason}.\nDefine it at the top level of a module, or install cloudpickle, which carries notebook cells, "
            "lambdas and closures: pip install cloudpickle"
        ) from None
    try:
        return cloudpickle.dumps(value)
    except Exception as error:
        raise pickle.PicklingError(str(error)) from None


def unpack(packed: bytes) -> tuple[Callable[..., object], tuple[object, ...]]:
    try:
        return pickle.loads(packed)
    except Exception as error:
        raise PmodError(
            phrase(
                "launch",
                f"fn or args cannot be loaded in the ranks: {type(error).__name__}: {error}",
                "What is passed must be defined at the top level of a module or script, "
                'and not under `if __name__ == "__main__":`.',
            )
        ) from error


def pack_result(result: object) -> bytes:
    try:
        return _pack(result)
    except pickle.PicklingError as error:
        raise PmodError(
            phrase(
                "launch",
                f"fn returned a {type(result).__name__}, which cannot be sent back: {error}",
                "Return tensors, numbers, or containers of them.",
            )
        ) from None
