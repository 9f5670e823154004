"""The error types, and the one formatter of their messages."""

from __future__ import annotations

import contextlib
import difflib
import linecache
import os
import re
import sys
from collections.abc import Iterable, Mapping
from itertools import islice
from types import FrameType


class PmodError(Exception):
    """The root: ``except pmod.PmodError`` catches all that pmod raises on purpose."""


class NoMeshError(PmodError):
    """An axis was named and no mesh is set."""


class AxisError(PmodError, ValueError):
    """An axis, a root or a permutation that the mesh does not have."""


class ShapeError(PmodError, ValueError):
    """A dim that the tensor lacks, or sizes that do not fit it."""


class ArgumentError(PmodError, TypeError):
    """Not a tensor, a dtype that the function cannot take, or a tensor on another device."""


class TopologyError(PmodError):
    """What the launcher says is incomplete or contradicts itself."""


class MismatchError(PmodError):
    """The ranks of one program did not make the same calls."""


class CollectiveTimeout(PmodError):
    """Some ranks did not arrive before the deadline, or cannot any more: they died, or raised."""


def coordinates(coords: Mapping[str, int] | None) -> str:
    """``(data=0, model=1)``, as messages and pictures write a rank's place."""
    if coords is None:
        return "(outside the mesh)"
    return "(" + ", ".join(f"{name}={index}" for name, index in coords.items()) + ")"


_LONGEST = 200  # characters of a value in a message, which is to be read in one look


def quoted(value: object) -> str:
    """A value as messages write it: its repr in one line, not too long.

    >>> quoted([1, 2]), quoted("model")
    ('[1, 2]', "'model'")
    """
    try:
        text = repr(value)
    except Exception:  # a __repr__ raises what it likes, that of a tensor of 1-bit ints too
        return f"a {type(value).__name__}"
    if "\n" in text:
        text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def explain(
    function: str,
    given: str,
    right: str = "",
    *,
    axis: object = None,
    coords: Mapping[str, int] | None = None,
) -> str:
    """The text of every error: which function, axis and rank; what was given; what would be right.

    >>> print(explain("shard", "x.shape[0] is 5", "Pass sizes=(3, 2).", axis="model", coords={"model": 1}))
    pmod.shard(axis='model') at (model=1): x.shape[0] is 5.
    Pass sizes=(3, 2).
    """
    call = f"pmod.{function}" + ("" if axis is None else f"(axis={quoted(axis)})")
    place = "" if coords is None else f" at {coordinates(coords)}"
    stop = "" if given.endswith("?") else "."
    return f"{call}{place}: {given}{stop}" + (f"\n{right}" if right else "")


def endless(function: str = "") -> ArgumentError:
    """The error of a tree in which a walk came to no end; by default of the public function that was called."""
    given = "a tree holds itself, or is nested too deeply"
    return ArgumentError(explain(function or call_site()[0], given, "Pass containers that do not hold themselves."))


def near_miss(given: object, known: Iterable[str]) -> str:
    """``; did you mean 'model'?`` where one of the known names is close, else nothing."""
    close = difflib.get_close_matches(given, list(known), n=1) if isinstance(given, str) else []
    return f"; did you mean {close[0]!r}?" if close else ""


_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


_JOBS = tuple(os.path.join(_HERE, name) for name in ("demo" + os.sep, "bench.py", "doctor.py"))  # users of pmod
_START = os.path.join(_HERE, "_start.py")  # runs the function that a user starts
# by shard_map, and within its body; in hooks
_CALLED = {
    "mapped": "shard_map", "__torch_function__": "pvary", "_Reducer": "data_parallel",
    "SharedParameters": "share_parameters",
}  # fmt: skip
# Jupyter names a cell's file after the process and the cell's text: on all ranks it is the same cell
_CELL = re.compile(r".*[/\\]ipykernel_\d+[/\\](\d+)\.py")


def _outside() -> tuple[str, FrameType]:
    """The public function that was called, and the innermost frame outside pmod and torch."""
    torch = sys.modules.get("torch")
    inside = (_HERE, contextlib.__file__)
    if torch is not None:
        inside += (os.path.dirname(str(torch.__file__)) + os.sep,)
    frame, function = sys._getframe(2), ""
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        if frame.f_code.co_filename.startswith(_JOBS):
            break
        if frame.f_code.co_filename.startswith(_HERE) and frame.f_code.co_filename != _START:
            function = frame.f_code.co_name
            owner = frame.f_code.co_qualname.split(".")[0]
            if function in ("__enter__", "__exit__") or owner in _CALLED:  # of a class that reads as a function: first
                function = owner
        frame = frame.f_back
    return _CALLED.get(function, function), frame


class Site(str):
    """A line of the user's code, as messages show it; `alike` names it on every node, wherever its file lies there."""

    alike: str

    @staticmethod
    def of(frame: FrameType) -> Site:
        """The line that a frame is at."""
        file, number = frame.f_code.co_filename, frame.f_lineno
        line = linecache.getline(file, number).strip()
        file = _CELL.sub(r"cell \1", file)
        rest = f":{number}" + (f": {line}" if line else "")
        site = Site(file + rest)
        # a module has one name on all nodes, though a script is __mp_main__ in the processes that it starts
        module = str(frame.f_globals.get("__name__", "")).replace("__mp_main__", "__main__")
        site.alike = f"{module} {os.path.basename(file)}{rest}"
        return site


def call_site() -> tuple[str, Site]:
    """The public function that was called, and from where: the innermost line outside pmod and torch."""
    function, frame = _outside()
    return function, Site.of(frame)


def call_source() -> str:
    """The text of the call in the user's code that led here, "" where its source is not at hand."""
    frame = _outside()[1]
    position = next(islice(frame.f_code.co_positions(), frame.f_lasti // 2, None), (None,) * 4)
    first, last, start, end = position
    if first is None or last is None or start is None or end is None:
        return ""
    lines = [linecache.getline(frame.f_code.co_filename, number).encode() for number in range(first, last + 1)]
    lines[-1] = lines[-1][:end]
    lines[0] = lines[0][start:]
    return b"".join(lines).decode()
