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
from typing import Any, TypeVar

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

log = logging.getLogger("pmod")

DEFAULT_TIMEOUT = 600.0
LONGEST = 1e9  # seconds; torch overflows somewhat later


class Connection:
    """What this process has connected; `shutdown` begins a new one."""

    def __init__(self) -> None:
        self.forget_groups()
        self.world: dist.ProcessGroup | None = (
            None  # the default group that `groups` were made under
        )
        self.started_world = False
        self.topology: Topology | None = None  # of the world
        # how often each rank set was made in this world: a name may not come twice in
        # one store
        self.made: Counter[str] = Counter()
        self.meetings: Counter[str] = (
            Counter()
        )  # how often each rank set was sent along
        self.histories: dict[
            str, deque[tuple[int, Any]]
        ] = {}  # the last calls along each rank set
        self.witness: Any = None  # compares the calls whose messages have no tags
        self.places: dict[
            int, tuple[str, int]
        ] = {}  # the host and the process of those that this one has met
        self.runs = 0  # how many functions `launch` has run here
        self.farewells: list[
            Callable[[], None]
        ] = []  # what the waits that failed say to the others at the end

    def forget_groups(self) -> None:
        self.groups: dict[str, dist.ProcessGroup] = {}
        self.made_here: set[str] = (
            set()
        )  # the keys of those that pmod has made within the world
        self.backends: dict[
            tuple[str, torch.device], Backend
        ] = {}  # of these groups, for each device

    def next_meeting(self, key: str) -> int:
        """The number of a message along these ranks, the same on all of them."""
        self.meetings[key] += 1
        return self.meetings[key]

    def history(self, key: str) -> deque[tuple[int, Any]]:
        """The numbers of the last messages along these ranks, and what was said of
        them.
        """
        return self.histories.setdefault(key, deque(maxlen=16))


class World:
    """What one rank lives in. Types of the floors above are named in comments, because
    this floor may not import them.

    by_processes: whether its ranks are processes, which connect and have process
    groups. alone: whether its other ranks do not exist.
    """

    by_processes = False
    alone = False

    def __init__(self, processes: Processes) -> None:
        self.processes = processes  # of this process, whatever stands in its place
        self.here: World = (
            self  # the world of this thread, which may be that of the process
        )
        self.mesh: Any = None  # the ambient one: a Mesh, or None
        self.watchers: list[Any] = []  # of `_core/watch.py`
        self.meters: list[Any] = []  # of `_wire/traffic.py`
        self.board: Any = None  # of `_wire/board.py`, on `store`

    @property
    def topology(self) -> Topology:
        """This rank's place."""
        raise NotImplementedError

    @property
    def store(self) -> Store | None:
        """A store that all ranks of the world read and write; None where there is none."""
        return None

    def wire(self, axis: Any, said: Any, device: torch.device) -> Any:
        """The Wire along an Axis, for a message in tensors of this device of which all
        ranks must say what is Said.
        """
        raise NotImplementedError


class Processes(World):
    """The world of a process: there is one, and a simulation or an estimate stands in
    its place for a while.
    """

    by_processes = True

    def __init__(self) -> None:
        super().__init__(self)
        self.connection = Connection()
        self.lock = threading.RLock()
        self.standing_in = (
            threading.Lock()
        )  # held by the simulation or the estimate that stands in its place
        # The stores outlive a shutdown: the ranks that come back must not meet at a
        # server that is about to end.
        self.stores: dict[tuple[str, int], Store] = {}
        self.launch_meetings: Counter[tuple[str | None, int | None]] = (
            Counter()
        )  # at each store of `launch`
        # when the last meeting was over, or this process began: who came before that
        # came to another one
        self.met = time.time()
        self.launched: Topology | None = (
            None  # where `launch` put this process, which no environment variable says
        )
        self.brought: _place.Place | None = (
            None  # the place that a mesh has brought to this process
        )
        self.left_behind: set[dist.ProcessGroup] = set()
        # of the process that this one was forked from; kept, because to let go of a
        # group ends it
        self.inherited: list[Connection] = []
        self.inherited_world: Any = (
            None  # torch's default group, if this process was forked while it had one
        )
        self.idle: list[
            Any
        ] = []  # the queues of the threads of `blocking.py` that have nothing to do,
        self.busy: set[int] = (
            set()
        )  # and the threads that are in a call which may block
        # What the floors above fill in, beside `wire`: what they say to the others when
        # a world ends.
        self.before_end: list[Callable[[], None]] = []
        self._kept: dict[Any, Any] = {}

    @property
    def topology(self) -> Topology:
        """Of what this process has connected, else detected; in one that works for a
        rank, that of the rank.
        """
        connection = self.connection
        if (
            connection.topology is not None
            and connection.world is not None
            and connection.world is dist.group.WORLD
        ):
            return connection.topology
        return self.launched or of_parent() or Topology.detect()

    @property
    def store(self) -> Store | None:
        if not dist.is_initialized():
            return None
        return default_store()

    def the(self, kind: Callable[[], T]) -> T:
        """The one object of a class of a floor above that this process has."""
        if kind not in self._kept:
            self._kept.setdefault(kind, kind())
        return self._kept[kind]

    def begin_anew(self) -> None:
        """Forget what was connected."""
        if self.connection.witness is not None:
            self.connection.witness.stop()
        self.connection = Connection()


now: World = Processes()
"""What stands for this process: the one variable. Where a call more would not cost,
read `current` or `processes`.
"""


def current() -> World:
    """The world of this thread."""
    return now.here


def processes() -> Processes:
    """The world of this process, also while a simulation or an estimate stands in its
    place.
    """
    return now.processes


@contextlib.contextmanager
def instead_of_processes(world: World) -> Generator[None]:
    """While it lasts, `world` stands for what this process has connected; one at a
    time.
    """
    global now
    with world.processes.standing_in:
        now = world
        try:
            yield
        finally:
            now = world.processes


def here() -> Topology:
    """The topology of this rank."""
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
    """`launch`, or a notebook, has made this process this rank."""
    processes().launched = topology
    _place.record(topology)


def _keep_apart() -> None:
    """In a forked child: what it finds in memory is its parent's, whose connections it
    must not use or end.
    """
    ours, rank = processes(), current()
    ours.lock = threading.RLock()  # another thread may have held it
    ours.launched = None
    ours.idle.clear()  # threads stay behind
    ours.busy.clear()
    ours.inherited.append(ours.connection)
    ours.connection = Connection()
    ours.inherited_world = (
        dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    )
    if not rank.by_processes:
        parent = rank.topology

        def refuse(axis: Any, said: Any, device: torch.device) -> Any:
            raise _place.refusal(parent)

        rank.wire = refuse


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_apart)


def of_parent() -> Topology | None:
    """The place of the rank that this process works for; None in a rank, and where no
    rank started it.
    """
    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if world is not None and world is not processes().inherited_world:
        return None  # it has connected for itself
    return _place.of_parent(processes().brought)


def is_no_rank() -> bool:
    """Whether this process works for a rank, or is being set up by multiprocessing,
    which imports the script.
    """
    return _place.is_being_set_up() or of_parent() is not None


def place_for_child(topology: Topology) -> _place.Place | None:
    """What a mesh of this topology brings to a child that is about to start, if it is
    the place of this process.
    """
    place = _place.for_child(topology)
    if place is None:
        return None
    known = here()
    return (
        place
        if (known.rank, known.world_size) == (topology.rank, topology.world_size)
        else None
    )


def here_with(place: _place.Place | None) -> Topology:
    """The topology of a process to which a mesh, sent before it was set up, has brought
    this place.
    """
    if place is not None:
        processes().brought = place
    return here()


def deadline(timeout: object) -> float:
    """The seconds until a collective gives up: what was asked for, else PMOD_TIMEOUT,
    else 600.
    """
    if timeout is not None:
        seconds = as_real(timeout)
        if seconds is None or not 0 < seconds < LONGEST:
            raise AxisError(
                phrase(
                    "make_mesh",
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
                "make_mesh",
                f"PMOD_TIMEOUT is {text!r}",
                "Set it to seconds, a number above 0.",
            )
        )
    return seconds


def number_device() -> torch.device:
    """Where Python numbers travel: the cpu, unless the user's process group has no
    backend for it.
    """
    if (
        dist.is_initialized()
        and current().by_processes
        and "cpu" not in dist.get_backend_config()
    ):
        return here().device
    return torch.device("cpu")


PLACE = "pmod/place/{}"  # key of the store of the world -> host and process of a rank


def witness(make: Callable[[], Any]) -> Any:
    """What compares this world's calls after the fact: made and started at the first of
    them.
    """
    ours = processes()
    if ours.connection.witness is None:
        with ours.lock:
            if ours.connection.witness is None:
                made = make()
                made.start()
                ours.connection.witness = made
    return ours.connection.witness


def leave_behind(
    group: dist.ProcessGroup, farewell: Callable[[], None] | None = None
) -> None:
    """Never use or end this group: a message of it waits for ever or has failed, and so
    might the group's end.

    farewell: what `shutdown` does first, for those that may wait for this rank.
    """
    ours = processes()
    with ours.lock:
        if not ours.left_behind:
            end_without_destructors()
        if group not in ours.left_behind:
            ours.left_behind.add(group)
            ctypes.pythonapi.Py_IncRef(
                ctypes.py_object(group)
            )  # beyond the end of Python, too
        if farewell is not None:
            ours.connection.farewells.append(farewell)


def end_without_destructors() -> None:
    """Leave at once where the process has ended but for C++: its destructors meet the
    threads of what was left behind.

    The exit status stays, and so does what was printed. Where the C library has no
    `on_exit`, nothing is done.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):
        # called in the reverse order: first what C has buffered is written, then the
        # process is over
        libc.on_exit(libc._exit, None)
        libc.__cxa_atexit(libc.fflush, None, None)


def is_left_behind(group: dist.ProcessGroup) -> bool:
    """Whether a message of this group was left waiting: what is sent now may be taken
    for it elsewhere.
    """
    return group in processes().left_behind


def all_groups() -> list[dist.ProcessGroup]:
    return groups_known()


def leave_all_behind(groups: list[dist.ProcessGroup]) -> None:
    for group in groups:
        leave_behind(group)
