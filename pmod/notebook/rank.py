"""What runs in an engine, between the cells: its place among the ranks, what became of
a cell, values out and in.
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
from collections.abc import Coroutine
from types import FrameType
from typing import Any

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
from pmod._site import HERE
from pmod._wire import waiting


def enter(rank: int, size: int, port: int, axes: dict[str, int]) -> None:
    """Leave what this process was connected to, connect as this rank, and set the mesh."""
    shutdown()
    launch.settle_in(size)
    place = launch.topology_of(rank, size, port)
    world.launch_as(place)
    use_device(place.device)
    set_mesh(make_mesh(axes))
    # IPython takes a second to show a traceback that leads through many files, and
    # somebody has pressed the stop button
    _shell().set_custom_exc((KeyboardInterrupt, asyncio.CancelledError), _interrupted)
    _shell().loop_runner = _awaited


def _interrupted(
    shell: Any, kind: type[BaseException], error: Any, trace: Any, tb_offset: Any = None
) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the cell is over, another one would hit the kernel; it resets this
    error._render_traceback_ = lambda: [
        kind.__name__
    ]  # IPython shows, and stores, this instead
    shell.showtraceback((kind, error, trace))


_runner = (
    asyncio.Runner()
)  # its loop stays, and with it the tasks that a cell has started


def _awaited(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a cell that awaits to its end, which the engine's loop cannot: such a cell's
    reply is lost by ipyparallel.
    """
    outer, loop = asyncio.get_running_loop(), _runner.get_loop()
    cell: asyncio.Task[Any] | None = None

    async def noted() -> Any:
        nonlocal cell
        cell = asyncio.current_task()
        return await coroutine

    def interrupt(number: int, frame: FrameType | None) -> None:
        """Raise in code that runs, as in any cell; where the loop waits, end what the
        cell awaits, and not the loop.
        """
        if cell is None or asyncio.current_task(loop) is not None:
            raise KeyboardInterrupt
        cell.cancel()
        loop.call_soon_threadsafe(int)  # wakes it up

    before = signal.signal(signal.SIGINT, interrupt)
    asyncio._set_running_loop(None)
    try:
        return _runner.run(
            noted(), context=contextvars.copy_context()
        )  # which names the cell for its outputs
    finally:
        asyncio._set_running_loop(outer)
        asyncio.set_event_loop(outer)
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, before)


@frozen
class Failure:
    """How a cell ended on a rank that did not finish it."""

    lines: tuple[
        str, ...
    ]  # file and number of each line of the traceback: the same where ranks failed alike
    at: str  # the innermost line that is the user's, "" where the cell had not begun
    waited: str  # in which collective, "" where it did not wait
    ours: bool  # raised by pmod on purpose: what is inside it explains nothing


def failure() -> Failure:
    """Of the last exception that was shown here."""
    error: BaseException = sys.last_value  # pyright: ignore[reportAssignmentType]  # a rank is asked where it raised
    frames = list(traceback.walk_tb(error.__traceback__))
    lines = tuple(
        in_cell(f"{frame.f_code.co_filename}:{number}") for frame, number in frames
    )
    inside = tuple(
        os.path.dirname(str(module.__file__)) + os.sep for module in (pmod, torch, os)
    )
    # Python's own modules, some of which are frozen: `open` runs lines of <frozen
    # codecs>
    last = max(
        (
            i
            for i, line in enumerate(lines)
            if not line.startswith((*inside, "<frozen "))
        ),
        default=-1,
    )
    began = any(line.startswith("line ") for line in lines)
    at = (
        f"{lines[last]}: {linecache.getline(*_place(frames[last])).strip()}"
        if began
        else ""
    )
    waits = [wait for wait in map(_wait_in, frames) if wait is not None]
    waited = _waited(frames[last + 1 :], waits[0]) if waits else ""
    return Failure(lines, at, waited, isinstance(error, PmodError))


def _wait_in(entry: tuple[FrameType, int]) -> waiting.Wait | None:
    """The wait that a method belongs to: its own, or that of a wire which was about to
    wait.
    """
    owner: Any = entry[0].f_locals.get("self")
    wait = owner if isinstance(owner, waiting.Wait) else getattr(owner, "_wait", None)
    return wait if isinstance(wait, waiting.Wait) else None


def _place(entry: tuple[FrameType, int]) -> tuple[str, int]:
    return entry[0].f_code.co_filename, entry[1]


def _waited(frames: list[tuple[FrameType, int]], wait: waiting.Wait) -> str:
    """`psum(axis='data')`: the public function, and the axis of the wait it came to."""
    ours = [
        frame.f_code.co_name
        for frame, _ in frames
        if frame.f_code.co_filename.startswith(HERE)
    ]
    function = next(
        (name for name in ours if hasattr(pmod, name)), f"{wait._said.row} in backward"
    )
    return f"pmod.{function}(axis={wait._axis.label!r})"


def sent() -> dict[tuple[int, ...], int]:
    """How many messages went along which ranks, since they were connected."""
    now = world.processes().connection
    return {
        tuple(dist.get_process_group_ranks(group)): now.meetings[key]
        for key, group in now.groups.items()
    }


def in_cell(text: str) -> str:
    """`line 3` for the name of the file that IPython pretends to have written a cell
    to.
    """
    return re.sub(
        r"(?:\S*ipykernel_\d+/\d+\.py|<ipython-input-[^>]*>|\bcell \d+):(\d+)",
        r"line \1",
        text,
    )


def fetch(name: str) -> tuple[bool, object]:
    """Whether there is such a name, and its value, the tensors on the CPU and without
    their history.
    """
    names = _names()
    return name in names, map_tensors(lambda x: x.detach().cpu(), names.get(name))


def keep(values: dict[str, object]) -> None:
    """Set names, the tensors on this rank's device."""
    device = world.here().device
    _names().update(
        {
            name: map_tensors(lambda x: x.to(device), value)
            for name, value in values.items()
        }
    )


def _names() -> dict[str, Any]:
    return _shell().user_ns


def _shell() -> Any:
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    if shell is None:
        right = "pull and push are for a notebook, where IPython runs."
        raise PmodError(
            phrase("notebook", "there are no variables of cells here", right)
        )
    return shell
