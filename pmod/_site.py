"""Who called: the public function, the user's line, and the call of a derivative."""

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

# they use pmod as a user does
_JOBS = (f"{HERE}demo{os.sep}", f"{HERE}bench{os.sep}", f"{HERE}doctor.py")
# they run what a user starts
_STARTS = (f"{HERE}_core{os.sep}start.py", f"{HERE}_core{os.sep}ahead.py")
# the code of what stands for a public function, which is its `f` (_core/ready.py)
_STANDS_IN = "at_once_or"
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


def function_of(frame: FrameType) -> str:
    """Return the name of the function of pmod's that a frame runs, or stands in for."""
    name = frame.f_code.co_name
    if name == _STANDS_IN:
        return frame.f_locals["f"].__name__
    return name


def _outside() -> tuple[str, FrameType]:
    """Return the public function that was called, and the user's innermost frame."""
    torch = sys.modules.get("torch")
    inside = (HERE, contextlib.__file__)
    if torch is not None:
        inside += (os.path.dirname(str(torch.__file__)) + os.sep,)
    frame, function = sys._getframe(2), ""
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if not file.startswith(inside) or file.startswith(_JOBS):
            break
        if file.startswith(HERE) and file not in _STARTS:
            function = function_of(frame)
            owner = frame.f_code.co_qualname.split(".")[0]
            # a class that reads as a function: its name is what the user wrote
            if function in ("__enter__", "__exit__") or owner in _CALLED:
                function = owner
        frame = frame.f_back
    return _CALLED.get(function, function), frame


Line: TypeAlias = tuple[str, int, str]
"""A file, a line's number in it, and the module's name.

It costs nothing to note, and may become a `Site`.
"""


def line_of(frame: FrameType) -> Line:
    """Return the line that a frame is at."""
    return (
        frame.f_code.co_filename,
        frame.f_lineno,
        str(frame.f_globals.get("__name__", "")),
    )


class Site(str):
    """A line of the user's code, as messages show it.

    `alike` names it on every node, wherever its file lies there.
    """

    alike: str

    @staticmethod
    def of(frame: FrameType) -> Site:
        """Return the line that a frame is at."""
        return Site.at(line_of(frame))

    @staticmethod
    def at(line_of: Line) -> Site:
        """Return a line that `line_of` has noted."""
        file, number, module = line_of
        line = linecache.getline(file, number).strip()
        file = _CELL.sub(r"cell \1", file)
        rest = f":{number}: {line}" if line else f":{number}"
        site = Site(file + rest)
        # a module has one name on all nodes, though a script is __mp_main__ in the
        # processes that it starts
        module = module.replace("__mp_main__", "__main__")
        site.alike = f"{module} {os.path.basename(file)}{rest}"
        return site


def call_site() -> tuple[str, Site]:
    """Return the public function that was called, and from which line of the user's.

    That is the innermost line outside pmod and torch.
    """
    function, frame = _outside()
    return function, Site.of(frame)


def call_source() -> str:
    """Return the text of the call in the user's code that led here.

    "" if its source is not at hand.
    """
    frame = _outside()[1]
    file, code = frame.f_code.co_filename, frame.f_code
    # an instruction has two bytes
    position = next(islice(code.co_positions(), frame.f_lasti // 2, None), (None,))
    known = [number for number in position if number is not None]
    if len(known) < 4:
        return ""
    first, last, start, end = known
    numbers = range(first, last + 1)
    # columns are counted in bytes
    lines = [linecache.getline(file, number).encode() for number in numbers]
    lines[-1] = lines[-1][:end]
    lines[0] = lines[0][start:]
    return b"".join(lines).decode()


Origin: TypeAlias = tuple[str, str]
"""The public function that made a call, and the user's line."""

BACKWARD = "the backward of "


def backward_of(forward: Origin) -> Origin:
    """Return the origin of a call's transpose, and of that one's."""
    return BACKWARD + forward[0].removeprefix(BACKWARD), forward[1]


class _Watched(threading.local):
    """The call that this thread binds, while somebody watches.

    Its derivatives have the same origin.
    """

    origin: Origin | None = None
    # the structure of what the call takes
    tree: str = ""


watched = _Watched()


@contextmanager
def on_behalf_of(of: Origin) -> Generator[None]:
    """Let what is sent here belong to a call, or to its backward, elsewhere."""
    before, watched.origin = watched.origin, of
    try:
        yield
    finally:
        watched.origin = before


@contextmanager
def of_tree(structure: str) -> Generator[None]:
    """Let what is bound here take the leaves of a tree of this structure."""
    before, watched.tree = watched.tree, structure
    try:
        yield
    finally:
        watched.tree = before


def structure() -> str:
    """Return the structure of the tree whose leaves are bound, as `of_tree` said."""
    return watched.tree


def origin() -> Origin:
    """Return the origin of the call that is being bound.

    If nobody watches, it is that of what the user called.
    """
    return watched.origin or call_site()
