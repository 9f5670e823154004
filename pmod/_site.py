"""Who called: the public function, the user's line, and the call that a derivative
belongs to.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import re
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from itertools import islice
from types import FrameType
from typing import TypeAlias

HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep

_JOBS = tuple(
    os.path.join(HERE, name)
    for name in ("demo" + os.sep, "bench" + os.sep, "doctor.py")
)  # users of pmod
_STARTS = tuple(
    os.path.join(HERE, "_core", name) for name in ("start.py", "ahead.py")
)  # they run what a user starts
# by shard_map, and within its body; in hooks
_CALLED = {
    "mapped": "shard_map",
    "__torch_function__": "pvary",
    "_Reducer": "data_parallel",
    "SharedParameters": "share_parameters",
}
# Jupyter names a cell's file after the process and the cell's text: on all ranks it is
# the same cell
_CELL = re.compile(r".*[/\\]ipykernel_\d+[/\\](\d+)\.py")


def _outside() -> tuple[str, FrameType]:
    """The public function that was called, and the innermost frame outside pmod and
    torch.
    """
    torch = sys.modules.get("torch")
    inside = (HERE, contextlib.__file__)
    if torch is not None:
        inside += (os.path.dirname(str(torch.__file__)) + os.sep,)
    frame, function = sys._getframe(2), ""
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        if frame.f_code.co_filename.startswith(_JOBS):
            break
        if (
            frame.f_code.co_filename.startswith(HERE)
            and frame.f_code.co_filename not in _STARTS
        ):
            function = frame.f_code.co_name
            owner = frame.f_code.co_qualname.split(".")[0]
            if (
                function in ("__enter__", "__exit__") or owner in _CALLED
            ):  # of a class that reads as a function: first
                function = owner
        frame = frame.f_back
    return _CALLED.get(function, function), frame


Line: TypeAlias = tuple[str, int, str]
"""A file, a line's number in it, and the module's name: what costs nothing to note, and
may become a `Site`.
"""


def line_of(frame: FrameType) -> Line:
    """The line that a frame is at."""
    return (
        frame.f_code.co_filename,
        frame.f_lineno,
        str(frame.f_globals.get("__name__", "")),
    )


class Site(str):
    """A line of the user's code, as messages show it; `alike` names it on every node,
    wherever its file lies there.
    """

    alike: str

    @staticmethod
    def of(frame: FrameType) -> Site:
        """The line that a frame is at."""
        return Site.at(line_of(frame))

    @staticmethod
    def at(line_of: Line) -> Site:
        """A line that `line_of` has noted."""
        file, number, module = line_of
        line = linecache.getline(file, number).strip()
        file = _CELL.sub(r"cell \1", file)
        rest = f":{number}" + (f": {line}" if line else "")
        site = Site(file + rest)
        # a module has one name on all nodes, though a script is __mp_main__ in the
        # processes that it starts
        site.alike = f"{module.replace('__mp_main__', '__main__')} {os.path.basename(file)}{rest}"
        return site


def call_site() -> tuple[str, Site]:
    """The public function that was called, and from where: the innermost line outside
    pmod and torch.
    """
    function, frame = _outside()
    return function, Site.of(frame)


def call_source() -> str:
    """The text of the call in the user's code that led here, "" where its source is not
    at hand.
    """
    frame = _outside()[1]
    position = next(
        islice(frame.f_code.co_positions(), frame.f_lasti // 2, None), (None,) * 4
    )
    first, last, start, end = position
    if first is None or last is None or start is None or end is None:
        return ""
    lines = [
        linecache.getline(frame.f_code.co_filename, number).encode()
        for number in range(first, last + 1)
    ]
    lines[-1] = lines[-1][:end]
    lines[0] = lines[0][start:]
    return b"".join(lines).decode()


Origin: TypeAlias = tuple[str, str]
"""The public function that made a call, and the user's line."""

BACKWARD = "the backward of "


def backward_of(forward: Origin) -> Origin:
    """The origin of a call's transpose, and of that one's."""
    return BACKWARD + forward[0].removeprefix(BACKWARD), forward[1]


class _Watched(threading.local):
    """The call that this thread binds, while somebody watches: its derivatives have the
    same origin.
    """

    origin: Origin | None = None
    tree: str = ""  # the structure of what the call takes


watched = _Watched()


@contextmanager
def on_behalf_of(of: Origin) -> Generator[None]:
    """What is sent here belongs to a call, or to its backward, elsewhere."""
    before, watched.origin = watched.origin, of
    try:
        yield
    finally:
        watched.origin = before


@contextmanager
def of_tree(structure: str) -> Generator[None]:
    """What is bound here takes the leaves of a tree of this structure."""
    before, watched.tree = watched.tree, structure
    try:
        yield
    finally:
        watched.tree = before


def structure() -> str:
    """Of the tree whose leaves are bound, as `of_tree` said."""
    return watched.tree


def origin() -> Origin:
    """Of the call that is being bound; where nobody watches, of what the user called."""
    return watched.origin or call_site()
