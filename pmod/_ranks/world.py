"""The world that a rank lives in, held by one variable: the one place of state.

A rank is a process (`Processes`), a thread of a simulation (`Threads`, in
`_wire/memory.py`), or a rank whose others do not exist (`Nobody`, in
`_wire/nobody.py`). What the floors above know of a rank hangs on its world: the mesh,
who watches, the meters, and what its axes send by. What `shutdown` forgets is in
`Connection`; what outlives it, as the stores do, is in `Processes`.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator
from queue import SimpleQueue
from typing import Any, Protocol, TypeAlias, TypeVar, cast
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from pmod._errors import AxisError, TopologyError, phrase, quoted
from pmod._numbers import as_real
from pmod._ranks import place as _place
from pmod._ranks.backends import Backend
from pmod._ranks.topology import Topology
from pmod._torch import default_store, groups_known

T = TypeVar("T")


class _Witness(Protocol):
    """What compares calls after the fact; `_wire/rolling.py` has it."""

    def start(self) -> object: ...

    def stop(self) -> object: ...


class Job(Protocol):
    """A call that blocks, in a thread of `blocking.py`."""

    def run(self) -> object: ...

    def release(self) -> object: ...


W = TypeVar("W", bound=_Witness)

# The numbers of some messages, and what was said of each.
History: TypeAlias = deque[tuple[int, Any]]

log = logging.getLogger("pmod")

DEFAULT_TIMEOUT = 600.0
# In seconds; torch overflows somewhat later.
LONGEST = 1e9


class Made(dict[object, Any]):
    """The calls that were made along the axes of a mesh (`_core/ready.py`).

    They hold process groups, so they go with the connection.
    """


class Connection:
    """What this process has connected; `shutdown` begins a new one.

    world: the default group that `groups` were made under. topology: that of the world.
    histories: the last calls along each rank set. witness: what compares the calls
    whose messages have no tags. places: the host and the process of those that this one
    has met. farewells: what the waits that failed say to the others at the end.
    """

    def __init__(self) -> None:
        self.forget_groups()
        self.world: dist.ProcessGroup | None = None
        self.started_world = False
        self.topology: Topology | None = None
        # How often each rank set was made in this world, because a name may not come
        # twice in one store, and how often each was sent along.
        self.made: Counter[str] = Counter()
        self.meetings: Counter[str] = Counter()
        self.histories: dict[str, History] = {}
        self.witness: _Witness | None = None
        self.places: dict[int, tuple[str, int]] = {}
        self.farewells: list[Callable[[], None]] = []
        self._made: WeakValueDictionary[int, Made] = WeakValueDictionary()

    def forget_groups(self) -> None:
        self.groups: dict[str, dist.ProcessGroup] = {}
        # The keys of those that pmod has made within the world, which it must end even
        # where the world is the user's.
        self.made_here: set[str] = set()
        # Of these groups, for each device.
        self.backends: dict[tuple[str, torch.device], Backend] = {}

    def keep(self, made: Made) -> None:
        """Let these calls be forgotten when the connection is."""
        self._made[id(made)] = made

    def forget_calls(self) -> None:
        for made in self._made.values():
            made.clear()

    def next_meeting(self, key: str) -> int:
        """Return the number of a message along these ranks, the same on all of them."""
        self.meetings[key] += 1
        return self.meetings[key]

    def history(self, key: str) -> History:
        """Return the last messages along these ranks: numbers, and what was said."""
        return self.histories.setdefault(key, deque(maxlen=16))


class World:
    """What one rank lives in.

    by_processes: whether its ranks are processes, which connect and have process
    groups. alone: whether its other ranks do not exist. here: the world of this thread,
    which may be that of the process. Types of the floors above are named in comments,
    because this floor may not import them.
    """

    by_processes = False
    alone = False

    def __init__(self, processes: Processes) -> None:
        # Of this process, whatever stands in its place.
        self.processes = processes
        self.here: World = self
        # The ambient one: a Mesh, or None.
        self.mesh: Any = None
        # Of `_core/watch.py`, of `_wire/traffic.py`, and of `_wire/board.py`.
        self.watchers: list[Any] = []
        self.meters: list[Any] = []
        self.board: Any = None

    @property
    def topology(self) -> Topology:
        """This rank's place."""
        raise NotImplementedError

    @property
    def store(self) -> Store | None:
        """A store that all ranks of the world read and write, if there is one."""
        return None

    def wire(self, axis: Any, said: Any, device: torch.device) -> Any:
        """Return the Wire along an Axis, for a message in tensors of this device.

        All ranks must say of the message what is Said.
        """
        raise NotImplementedError


class Processes(World):
    """The world of a process, which has one.

    A simulation or an estimate stands in its place for a while, and then holds
    `standing_in`.
    """

    by_processes = True

    def __init__(self) -> None:
        super().__init__(self)
        self.connection = Connection()
        self.lock = threading.RLock()
        self.standing_in = threading.Lock()
        # What a child that is forked meanwhile does first, if it is none of the ranks'.
        self.left_in_child: Callable[[], None] | None = None
        # The rank of a simulation, or of an estimate, that has forked this process.
        self.forked_by: Topology | None = None
        # The stores outlive a shutdown: the ranks that come back must not meet at a
        # server that is about to end.
        self.stores: dict[tuple[str, int], Store] = {}
        # How often ranks met at each store of `launch`.
        self.launch_meetings: Counter[tuple[str | None, int | None]] = Counter()
        # When the last meeting was over, or this process began: who came before that
        # came to another one.
        self.met = time.time()
        # Where `launch` put this process, which no environment variable says.
        self.launched: Topology | None = None
        # How many functions `launch` has run here: the number of the last one, the same
        # on all ranks, whatever they have connected since.
        self.runs = 0
        # The place that a mesh has brought to this process.
        self.brought: _place.Place | None = None
        self.left_behind: set[dist.ProcessGroup] = set()
        # Of the process that this one was forked from, with torch's default group if
        # there was one. They are kept, because to let go of a group ends it.
        self.inherited: list[Connection] = []
        self.inherited_world: dist.ProcessGroup | None = None
        # The queues of the threads of `blocking.py` that have nothing to do, and the
        # threads that are in a call which may block.
        self.idle: list[SimpleQueue[Job]] = []
        self.busy: set[int] = set()
        # What the floors above fill in, beside `wire`: what they say to the others when
        # a world ends.
        self.before_end: list[Callable[[], None]] = []
        self._kept: dict[object, object] = {}

    @property
    def topology(self) -> Topology:
        """The place of what this process has connected, else the one that it detects.

        A process that works for a rank has the place of that rank.
        """
        connection = self.connection
        joined = connection.world
        # The user may have ended that world, and begun another.
        goes_on = joined is not None and joined is dist.group.WORLD
        if goes_on and connection.topology is not None:
            return connection.topology
        told = self.launched or of_parent()
        return told or Topology.detect()

    @property
    def store(self) -> Store | None:
        if not dist.is_initialized():
            return None
        return default_store()

    def the(self, kind: Callable[[], T]) -> T:
        """Return the one object of a class of a floor above that this process has."""
        if kind not in self._kept:
            # Where two threads come at once, both get the first one's.
            self._kept.setdefault(kind, kind())
        return cast(T, self._kept[kind])

    def begin_anew(self) -> None:
        """Forget what was connected."""
        if self.connection.witness is not None:
            self.connection.witness.stop()
        self.connection.forget_calls()
        self.connection = Connection()


now: World = Processes()
"""What stands for this process: the one variable.

Where a call more would not cost, read `current` or `processes`.
"""


def current() -> World:
    """Return the world of this thread."""
    return now.here


def processes() -> Processes:
    """Return the world of this process, also while another stands in its place."""
    return now.processes


@contextlib.contextmanager
def instead_of_processes(
    world: World, left_in_child: Callable[[], None] | None = None
) -> Generator[None]:
    """Let `world` stand for what this process has connected; one does at a time.

    left_in_child: what a child does that another thread forks meanwhile; the ranks of
    `world` stay behind.
    """
    global now
    ours = world.processes
    if ours.forked_by is not None:
        raise _place.refusal(ours.forked_by)
    with ours.standing_in:
        now, ours.left_in_child = world, left_in_child
        try:
            yield
        finally:
            now, ours.left_in_child = ours, None


def here() -> Topology:
    """Return the topology of this rank."""
    return current().topology


def to_connect() -> Topology:
    """Return the topology that `make_mesh` connects: the launcher's, or torch's own.

    Some launchers say nothing but what torch.distributed was initialized with.
    """
    known = here()
    # No variable tells of ranks that are threads, or that `launch` has started.
    if not current().by_processes or known.launcher == "launch":
        return known
    if not (dist.is_available() and dist.is_initialized()):
        return Topology.detect()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if (known.rank, known.world_size) == (rank, world_size):
        return known
    return Topology(rank=rank, world_size=world_size, device=known.device)


def launch_as(topology: Topology) -> None:
    """Note that `launch`, or a notebook, has made this process this rank."""
    processes().launched = topology
    _place.record(topology)


def _keep_apart() -> None:
    """Set what was connected aside in a forked child.

    What it finds in memory is its parent's, whose connections it must not use or end.
    """
    global now
    ours, rank = processes(), current()
    # Another thread, which is not in the child, may have held them.
    ours.lock = threading.RLock()
    ours.standing_in = threading.Lock()
    ours.launched = None
    # Threads stay behind.
    ours.idle.clear()
    ours.busy.clear()
    ours.inherited.append(ours.connection)
    ours.connection = Connection()
    ours.inherited_world = _default_group()
    if rank.by_processes:
        now = ours
        if ours.left_in_child is not None:
            ours.left_in_child()
    else:
        ours.forked_by = parent = rank.topology

        def refuse(axis: object, said: object, device: torch.device) -> None:
            raise _place.refusal(parent)

        rank.wire = refuse


def _default_group() -> dist.ProcessGroup | None:
    if not dist.is_available() or not dist.is_initialized():
        return None
    return dist.group.WORLD


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_apart)


def of_parent() -> Topology | None:
    """Return the place of the rank that this process works for.

    None in a rank, and where no rank started it.
    """
    world = _default_group()
    # It has connected for itself.
    if world is not None and world is not processes().inherited_world:
        return None
    return _place.of_parent(processes().brought)


def is_no_rank() -> bool:
    """Return whether this process works for a rank, or is still being set up.

    multiprocessing imports the script while it sets a process up.
    """
    return _place.is_being_set_up() or of_parent() is not None


def place_for_child(topology: Topology) -> _place.Place | None:
    """Return what a mesh of this topology brings to a child that is about to start.

    None unless the topology is that of this process.
    """
    place = _place.for_child(topology)
    if place is None:
        return None
    known = here()
    if (known.rank, known.world_size) != (topology.rank, topology.world_size):
        return None
    return place


def here_with(place: _place.Place | None) -> Topology:
    """Return the topology of a process to which a mesh may have brought this place."""
    if place is not None:
        processes().brought = place
    return here()


def deadline(timeout: object, function: str = "make_mesh") -> float:
    """Return the seconds until a collective gives up.

    They are what the function was asked for, else PMOD_TIMEOUT, else 600.
    """
    if timeout is not None:
        seconds = as_real(timeout)
        if seconds is None or not 0 < seconds < LONGEST:
            raise AxisError(
                phrase(
                    function,
                    f"timeout is {quoted(timeout)}",
                    "Pass seconds, a number above 0.",
                )
            )
        return seconds
    text = os.environ.get("PMOD_TIMEOUT", str(DEFAULT_TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < LONGEST:
        raise TopologyError(
            phrase(
                function,
                f"PMOD_TIMEOUT is {text!r}",
                "Set it to seconds, a number above 0.",
            )
        )
    return seconds


def number_device() -> torch.device:
    """Return where Python numbers travel.

    It is the cpu, unless the user's process group has no backend for it.
    """
    cpu = torch.device("cpu")
    if not dist.is_initialized() or not current().by_processes:
        return cpu
    if "cpu" in dist.get_backend_config():
        return cpu
    return here().device


# The key in the store of the world that has the host and the process of a rank.
PLACE = "pmod/place/{}"


def witness(make: Callable[[], W]) -> W:
    """Return what compares this world's calls after the fact.

    It is made and started at the first of them.
    """
    ours = processes()
    # Looked at first without the lock, which most calls need not take.
    if ours.connection.witness is None:
        with ours.lock:
            if ours.connection.witness is None:
                made = make()
                made.start()
                ours.connection.witness = made
    return cast(W, ours.connection.witness)


def leave_behind(
    group: dist.ProcessGroup, farewell: Callable[[], None] | None = None
) -> None:
    """Never use or end this group, of which a message waits for ever or has failed.

    The group's end might wait for ever, too. farewell: what `shutdown` does first, for
    those that may wait for this rank.
    """
    ours = processes()
    with ours.lock:
        if not ours.left_behind:
            end_without_destructors()
        if group not in ours.left_behind:
            ours.left_behind.add(group)
            # Beyond the end of Python, too, where the set is emptied.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        if farewell is not None:
            ours.connection.farewells.append(farewell)


def end_without_destructors() -> None:
    """Leave at once where the process has ended but for C++.

    Its destructors would meet the threads of what was left behind. The exit status
    stays, and so does what was printed. Where the C library has no `on_exit`, nothing
    is done.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):
        # called in the reverse order: first what C has buffered is written, then the
        # process is over
        libc.on_exit(libc._exit, None)
        libc.__cxa_atexit(libc.fflush, None, None)


def is_left_behind(group: dist.ProcessGroup) -> bool:
    """Return whether a message of this group was left waiting.

    What is sent now may be taken for it elsewhere.
    """
    return group in processes().left_behind


def all_groups() -> list[dist.ProcessGroup]:
    return groups_known()


def leave_all_behind(groups: list[dist.ProcessGroup]) -> None:
    for group in groups:
        leave_behind(group)
