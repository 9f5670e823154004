"""The world that this process has connected, or the simulation that stands in its place: the one place of state.

What `shutdown` empties is in `_State`. What outlives it (stores, groups that are left behind) stands beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from pmod._errors import AxisError, TopologyError, phrase, quoted
from pmod._numbers import as_real
from pmod._ranks import place as _place
from pmod._ranks.topology import Topology
from pmod._torch import default_store, groups_known

log = logging.getLogger("pmod")

DEFAULT_TIMEOUT = 600.0
LONGEST = 1e9  # seconds; torch overflows somewhat later


class _State:
    """What this process has connected; emptied by `shutdown`."""

    def __init__(self) -> None:
        self.groups: dict[str, dist.ProcessGroup] = {}
        self.world: dist.ProcessGroup | None = None  # the default group that `groups` were made under
        self.started_world = False
        self.topology: Topology | None = None  # of the world
        # how often each rank set was made in this world: a name may not come twice in one store
        self.made: Counter[str] = Counter()
        self.meetings: Counter[str] = Counter()  # how often each rank set was sent along
        self.histories: dict[str, deque[tuple[int, Any]]] = {}  # the last calls along each rank set
        self.witness: Any = None  # compares the calls whose messages have no tags
        self.places: dict[int, tuple[str, int]] = {}  # the host and the process of those that this one has met
        self.runs = 0  # how many functions `launch` has run here
        self.farewells: list[Callable[[], None]] = []  # what the waits that failed say to the others at the end


state = _State()
_lock = threading.RLock()
# The stores outlive a shutdown: the ranks that come back must not meet at a server that is about to end.
stores: dict[tuple[str, int], Store] = {}
before_end: list[Callable[[], None]] = []  # what the modules above say to the others when a world ends
# Where `launch` put this process, which no environment variable says.
launched: Topology | None = None

# The world of a running simulation, one per thread, or of an estimate (attributes: topology, mesh, wire, watchers,
# meters; of an estimate: alone), or None: one look-up when off.
simulated: Any = None
_simulating = threading.Lock()


@contextlib.contextmanager
def instead_of_processes(world: Any) -> Generator[None]:
    """While it lasts, `world` stands for what this process has connected; one at a time."""
    global simulated
    with _simulating:
        simulated = world
        try:
            yield
        finally:
            simulated = None


def in_simulation() -> bool:
    """Whether this thread is a rank of a simulation or of an estimate."""
    return simulated is not None and hasattr(simulated, "topology")


def alone() -> bool:
    """Whether the other ranks do not exist: in an estimate."""
    return in_simulation() and hasattr(simulated, "alone")


def here() -> Topology:
    """The topology of this process (of this thread in a simulation): of what it has connected, else detected.

    In a process that works for a rank, that of the rank.
    """
    if in_simulation():
        return simulated.topology
    if state.topology is not None and state.world is not None and state.world is dist.group.WORLD:
        return state.topology
    return launched or _place.of_parent() or Topology.detect()


def launch_as(topology: Topology) -> None:
    """`launch`, or a notebook, has made this process this rank."""
    global launched
    launched = topology
    _place.record(topology)


def _keep_apart() -> None:
    """In a forked child: what it finds in memory is its parent's, whose connections it must not use or end."""
    global _lock, launched
    _lock, launched = threading.RLock(), None  # another thread may have held it
    _inherited.append(vars(state).copy())
    state.__init__()
    _place.forked(dist.group.WORLD if dist.is_available() and dist.is_initialized() else None)
    if in_simulation():
        parent = simulated.topology

        def refuse(axis: Any, _: object) -> Any:
            raise _place.refusal(parent)

        simulated.wire = refuse


_inherited: list[dict[str, Any]] = []  # kept, because to let go of a group ends it
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_apart)


def place_for_child(topology: Topology) -> _place.Place | None:
    """What a mesh of this topology brings to a child that is about to start, if it is the place of this process."""
    place = _place.for_child(topology)
    if place is None:
        return None
    known = here()
    return place if (known.rank, known.world_size) == (topology.rank, topology.world_size) else None


def here_with(place: _place.Place | None) -> Topology:
    """The topology of a process to which a mesh has brought this place."""
    if place is not None:
        _place.bring(place)
    return here()


def deadline(timeout: object) -> float:
    """The seconds until a collective gives up: what was asked for, else PMOD_TIMEOUT, else 600."""
    if timeout is not None:
        seconds = as_real(timeout)
        if seconds is None or not 0 < seconds < LONGEST:
            raise AxisError(phrase("make_mesh", f"timeout is {quoted(timeout)}", "Pass seconds, a number above 0."))
        return seconds
    text = os.environ.get("PMOD_TIMEOUT", str(DEFAULT_TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < LONGEST:
        raise TopologyError(phrase("make_mesh", f"PMOD_TIMEOUT is {text!r}", "Set it to seconds, a number above 0."))
    return seconds


def number_device() -> torch.device:
    """Where Python numbers travel: the cpu, unless the user's process group has no backend for it."""
    if dist.is_initialized() and simulated is None and "cpu" not in dist.get_backend_config():
        return here().device
    return torch.device("cpu")


PLACE = "pmod/place/{}"  # key of the store of the world -> host and process of a rank


def place_of_process(rank: int) -> tuple[str, int] | None:
    """The host and the process of a rank, where this process has met it."""
    return state.places.get(rank)


def next_meeting(key: str) -> int:
    """The number of a message along these ranks, the same on all of them."""
    state.meetings[key] += 1
    return state.meetings[key]


def history(key: str) -> deque[tuple[int, Any]]:
    """The numbers of the last messages along these ranks, and what was said of them."""
    return state.histories.setdefault(key, deque(maxlen=16))


def witness(make: Callable[[], Any]) -> Any:
    """What compares this world's calls after the fact: made and started at the first of them."""
    if state.witness is None:
        with _lock:
            if state.witness is None:
                made = make()
                made.start()
                state.witness = made
    return state.witness


def begin_anew() -> None:
    """Forget what was connected."""
    if state.witness is not None:
        state.witness.stop()
    state.__init__()


left_behind: set[dist.ProcessGroup] = set()


def leave_behind(group: dist.ProcessGroup, farewell: Callable[[], None] | None = None) -> None:
    """Never use or end this group: a message of it waits for ever or has failed, and so might the group's end.

    farewell: what `shutdown` does first, for those that may wait for this rank.
    """
    with _lock:
        if not left_behind:
            end_without_destructors()
        if group not in left_behind:
            left_behind.add(group)
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))  # beyond the end of Python, too
        if farewell is not None:
            state.farewells.append(farewell)


def end_without_destructors() -> None:
    """Leave at once where the process has ended but for C++: its destructors meet the threads of what was left behind.

    The exit status stays, and so does what was printed. Where the C library has no `on_exit`, nothing is done.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):
        # called in the reverse order: first what C has buffered is written, then the process is over
        libc.on_exit(libc._exit, None)
        libc.__cxa_atexit(libc.fflush, None, None)


def is_left_behind(group: dist.ProcessGroup) -> bool:
    """Whether a message of this group was left waiting: what is sent now may be taken for it elsewhere."""
    return group in left_behind


def blackboard() -> Store | None:
    """A store that all ranks of the world read and write; None in a simulation and before anything is connected."""
    if simulated is not None or not dist.is_initialized():
        return None
    return default_store()


def meetings() -> dict[str, int]:
    """How often this rank has sent along each rank set."""
    return dict(state.meetings)


def all_groups() -> list[dist.ProcessGroup]:
    return groups_known()


def leave_all_behind(groups: list[dist.ProcessGroup]) -> None:
    for group in groups:
        leave_behind(group)
