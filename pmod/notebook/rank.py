"""What runs in an engine between the cells.

That is its place among the ranks, what became of a cell, and values out and in.
"""

from __future__ import annotations

import asyncio
import contextvars
import linecache
import os
import re
import signal
import sys
import traceback
from collections.abc import Coroutine, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from attrs import frozen

import pmod
from pmod._core.leaves import map_tensors
from pmod._errors import PmodError, phrase
from pmod._mesh.ambient import set_mesh
from pmod._mesh.make import make_mesh
from pmod._ranks import world
from pmod._ranks.backends import use_device
from pmod._ranks.connect import shutdown
from pmod._run import launch
from pmod._site import HERE, function_of
from pmod._wire import waiting

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

T = TypeVar("T")


def enter(rank: int, size: int, port: int, axes: dict[str, int]) -> None:
    """Leave what this process was connected to, connect as this rank, and set the mesh."""
    shutdown()
    launch.settle_in(size)
    place = launch.topology_of(rank, size, port)
    world.launch_as(place)
    use_device(place.device)
    set_mesh(make_mesh(axes))
    # IPython takes a second to show a traceback that leads through many files, too long
    # for somebody who has pressed the stop button
    _shell().set_custom_exc((KeyboardInterrupt, asyncio.CancelledError), _interrupted)
    _shell().loop_runner = _awaited


def _interrupted(
    shell: InteractiveShell,
    kind: type[BaseException],
    error: Any,
    trace: object,
    tb_offset: int | None = None,
) -> None:
    # the cell is over, and a second interrupt would hit the kernel, which resets this
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # IPython shows, and stores, this in place of a traceback
    error._render_traceback_ = lambda: [kind.__name__]
    shell.showtraceback((kind, error, trace))


# its loop stays between cells, and with it the tasks that a cell has started
_runner = asyncio.Runner()


def _awaited(coroutine: Coroutine[object, object, T]) -> T:
    """Run a cell that awaits to its end.

    The engine's own loop cannot do so: ipyparallel loses such a cell's reply.
    """
    outer, loop = asyncio.get_running_loop(), _runner.get_loop()
    cell: asyncio.Task[T] | None = None

    async def noted() -> T:
        nonlocal cell
        cell = asyncio.current_task()
        return await coroutine

    def interrupt(number: int, frame: FrameType | None) -> None:
        """Raise in code that runs; if the loop waits, end only what the cell awaits."""
        if cell is None or asyncio.current_task(loop) is not None:
            raise KeyboardInterrupt
        cell.cancel()
        # any call wakes the loop up, which has not seen that the cell was cancelled
        loop.call_soon_threadsafe(int)

    before = signal.signal(signal.SIGINT, interrupt)
    asyncio._set_running_loop(None)
    try:
        # the context names the cell, for its outputs
        return _runner.run(noted(), context=contextvars.copy_context())
    finally:
        asyncio._set_running_loop(outer)
        asyncio.set_event_loop(outer)
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, before)


@frozen
class Failure:
    """How a cell ended on a rank that did not finish it."""

    # file and number of each line of the traceback: the same where ranks failed alike
    lines: tuple[str, ...]
    # the innermost line that is the user's, "" if the cell had not begun
    at: str
    # in which collective, "" if it did not wait
    waited: str
    # raised by pmod on purpose: what is inside it explains nothing
    ours: bool


def failure() -> Failure:
    """Return how the last cell failed, from the exception that was shown here."""
    # set, because a rank is asked only if its cell raised
    error: BaseException = sys.last_value  # pyright: ignore[reportAssignmentType]
    frames = list(traceback.walk_tb(error.__traceback__))
    lines: list[str] = []
    for frame, number in frames:
        lines.append(in_cell(f"{frame.f_code.co_filename}:{number}"))
    last = _last_of_user(lines)
    at = ""
    if any(line.startswith("line ") for line in lines):
        text = linecache.getline(*_place(frames[last])).strip()
        at = f"{lines[last]}: {text}"
    waits = [wait for wait in map(_wait_in, frames) if wait is not None]
    waited = _waited(frames[last + 1 :], waits[0]) if waits else ""
    return Failure(tuple(lines), at, waited, isinstance(error, PmodError))


def _last_of_user(lines: Sequence[str]) -> int:
    """Return the number of the innermost line that is the user's, or -1."""
    # Python's own modules are left out as well. Some of them are frozen: `open` runs
    # lines of <frozen codecs>
    inside = ["<frozen "]
    for module in (pmod, torch, os):
        inside.append(os.path.dirname(str(module.__file__)) + os.sep)
    for number in reversed(range(len(lines))):
        if not lines[number].startswith(tuple(inside)):
            return number
    return -1


def _wait_in(entry: tuple[FrameType, int]) -> waiting.Wait | None:
    """Return the wait that a method belongs to, if there is one.

    It is the wait's own method, or one of a wire that was about to wait.
    """
    owner = entry[0].f_locals.get("self")
    for found in (owner, getattr(owner, "_wait", None)):
        if isinstance(found, waiting.Wait):
            return found
    return None


def _place(entry: tuple[FrameType, int]) -> tuple[str, int]:
    return entry[0].f_code.co_filename, entry[1]


def _waited(frames: list[tuple[FrameType, int]], wait: waiting.Wait) -> str:
    """Return `pmod.psum(axis='data')`: the function called, and the axis of its wait."""
    function = f"{wait._said.row} in backward"
    for frame, _ in frames:
        name = function_of(frame)
        # the outermost of pmod's functions is the one that the user called
        if frame.f_code.co_filename.startswith(HERE) and hasattr(pmod, name):
            function = name
            break
    return f"pmod.{function}(axis={wait._axis.label!r})"


def sent() -> dict[tuple[int, ...], int]:
    """Return how many messages went along which ranks, since they were connected."""
    now = world.processes().connection
    counts: dict[tuple[int, ...], int] = {}
    for key, group in now.groups.items():
        ranks = tuple(dist.get_process_group_ranks(group))
        counts[ranks] = now.meetings[key]
    return counts


def in_cell(text: str) -> str:
    """Return the text with `line 3` for the file that IPython says a cell is in."""
    file = r"(?:\S*ipykernel_\d+/\d+\.py|<ipython-input-[^>]*>|\bcell \d+)"
    return re.sub(rf"{file}:(\d+)", r"line \1", text)


def fetch(name: str) -> tuple[bool, object]:
    """Return whether there is such a name, and its value.

    Tensors are on the CPU and without their history.
    """
    names = _names()
    return name in names, map_tensors(lambda x: x.detach().cpu(), names.get(name))


def keep(values: dict[str, object]) -> None:
    """Set names, the tensors on this rank's device."""
    device = world.here().device
    moved: dict[str, object] = {}
    for name, value in values.items():
        moved[name] = map_tensors(lambda x: x.to(device), value)
    # all at once: if one cannot be moved, no name is set
    _names().update(moved)


def _names() -> dict[str, object]:
    return _shell().user_ns


def _shell() -> InteractiveShell:
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    if shell is None:
        given = "there are no variables of cells here"
        right = "pull and push are for a notebook, where IPython runs."
        raise PmodError(phrase("notebook", given, right))
    return shell
