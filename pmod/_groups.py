"""Connecting the processes, and the one cache of process groups.

State lives here and in ``_ambient.py`` only. A group is made on first use by its own members and nobody else, so ranks
may first use their axes in any order. torch's public ``new_group`` cannot do that: it needs every rank of the world,
and with ``use_local_synchronization`` it derives the group's name from how many groups this process knows, so that
ranks with different histories wait for each other under different names. We name groups by their ranks and a counter
per rank set, through the private ``_new_process_group_helper`` (tests/test_groups.py tells when it moves).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import hashlib
import ipaddress
import logging
import os
import socket
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Generator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# public by torch's documentation, though not by its stubs
from torch.distributed import HashStore, PrefixStore, Store, TCPStore, rendezvous  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import _torchelastic_use_agent_store

from pmod import _place
from pmod._blocking import busy, hold_still
from pmod._errors import AxisError, CollectiveTimeout, PmodError, TopologyError, call_site, explain, quoted
from pmod._meeting import Meeting
from pmod._numbers import as_real
from pmod._topology import Topology

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
        self.farewells: list[Callable[[], None]] = []  # what the waits that failed say to the others at the end


_state = _State()
_lock = threading.RLock()
# The stores outlive a shutdown: the ranks that come back must not meet at a server that is about to end.
_stores: dict[tuple[str, int], Store] = {}
_launch_meetings: Counter[tuple[str | None, int | None]] = Counter()  # how often this rank met at each store of `launch`
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
    if _state.topology is not None and _state.world is not None and _state.world is dist.group.WORLD:
        return _state.topology
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
    _inherited.append(vars(_state).copy())
    _state.__init__()
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
            raise AxisError(explain("make_mesh", f"timeout is {quoted(timeout)}", "Pass seconds, a number above 0."))
        return seconds
    text = os.environ.get("PMOD_TIMEOUT", str(DEFAULT_TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < LONGEST:
        raise TopologyError(explain("make_mesh", f"PMOD_TIMEOUT is {text!r}", "Set it to seconds, a number above 0."))
    return seconds


def number_device() -> torch.device:
    """Where Python numbers travel: the cpu, unless the user's process group has no backend for it."""
    if dist.is_initialized() and simulated is None and "cpu" not in dist.get_backend_config():
        return here().device
    return torch.device("cpu")


def connect(topology: Topology, seconds: float, mesh: str = "") -> None:
    """Join the default process group, starting it where nobody has; `mesh` is for the log."""
    with _lock:
        if topology.world_size > 1 and _place.is_no_rank():
            raise _place.refusal(_place.of_parent() or topology)
        if dist.is_initialized():
            _join(topology)
            return
        if topology.device.type == "cuda":
            torch.cuda.set_device(topology.device)  # what NCCL takes for a barrier, and plain "cuda" for a tensor
        timeout = timedelta(seconds=seconds)
        store, places = _store(topology, timeout)
        try:
            with _lazy_gloo():
                dist.init_process_group(
                    topology.backend, store=store, rank=topology.rank, world_size=topology.world_size, timeout=timeout
                )
            _enter_world(topology, started=True)
            _state.places = places
        except BaseException:
            # Ctrl-C came in between. Nobody else has a world that is half there, so the next make_mesh may not use it.
            if dist.is_initialized():
                _end(_all_groups(), whole_world=True)
            _state.__init__()
            raise
        atexit.register(_at_exit)
        announce(topology, mesh)


def announce(topology: Topology, mesh: str) -> None:
    """One line in the log, by rank 0: who started what, and where."""
    if topology.rank == 0:
        size, nodes = topology.world_size, topology.num_nodes
        met = "" if size == 1 else f", met at {topology.master_addr}:{topology.master_port}"
        log.info(
            "%d rank%s on %d node%s, started by %s%s: backend %s, device %s%s", size, "s" * (size > 1), nodes,
            "s" * (nodes > 1), topology.launcher, met, topology.backend, topology.device, mesh and f", mesh {mesh}",
        )  # fmt: skip


PLACE = "pmod/place/{}"  # key of the store of the world -> host and process of a rank


def _enter_world(topology: Topology, *, started: bool) -> None:
    _begin_anew()
    _state.world, _state.started_world, _state.topology = dist.group.WORLD, started, topology
    _place.record(topology)
    store = blackboard()
    if store is not None:
        with contextlib.suppress(RuntimeError):  # a user's store may hold nothing (torch's fake one)
            store.set(PLACE.format(topology.rank), f"{socket.gethostname()}\x1f{os.getpid()}")


def place_of_process(rank: int) -> tuple[str, int] | None:
    """The host and the process of a rank, where this process has met it."""
    return _state.places.get(rank)


def next_meeting(key: str) -> int:
    """The number of a message along these ranks, the same on all of them."""
    _state.meetings[key] += 1
    return _state.meetings[key]


def history(key: str) -> deque[tuple[int, Any]]:
    """The numbers of the last messages along these ranks, and what was said of them."""
    return _state.histories.setdefault(key, deque(maxlen=16))


def witness(make: Callable[[], Any]) -> Any:
    """What compares this world's calls after the fact: made and started at the first of them."""
    if _state.witness is None:
        with _lock:
            if _state.witness is None:
                made = make()
                made.start()
                _state.witness = made
    return _state.witness


def _begin_anew() -> None:
    """Forget what was connected."""
    if _state.witness is not None:
        _state.witness.stop()
    _state.__init__()


_left_behind: set[dist.ProcessGroup] = set()


def leave_behind(group: dist.ProcessGroup, farewell: Callable[[], None] | None = None) -> None:
    """Never use or end this group: a message of it waits for ever or has failed, and so might the group's end.

    farewell: what `shutdown` does first, for those that may wait for this rank.
    """
    with _lock:
        if not _left_behind:
            _end_without_destructors()
        if group not in _left_behind:
            _left_behind.add(group)
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))  # beyond the end of Python, too
        if farewell is not None:
            _state.farewells.append(farewell)


def _end_without_destructors() -> None:
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
    return group in _left_behind


def _join(topology: Topology) -> None:
    """The user (or an earlier mesh) initialized torch.distributed: use it, and check that it is the same world."""
    actual = (dist.get_rank(), dist.get_world_size())
    if actual != (topology.rank, topology.world_size):
        raise TopologyError(
            explain(
                "make_mesh",
                f"torch.distributed is initialized as rank {actual[0]} of {actual[1]}, "
                f"the topology says rank {topology.rank} of {topology.world_size}",
                "Leave topology out, or call torch.distributed.destroy_process_group() first.",
            )
        )
    if dist.group.WORLD is not _state.world:
        _enter_world(topology, started=False)


def _store(topology: Topology, timeout: timedelta) -> tuple[Store, dict[int, tuple[str, int]]]:
    """A store of this connection alone, and where the processes are whose ranks have come together there."""
    store = _store_of_job(topology, timeout)
    if topology.world_size == 1:
        return store, {}
    if topology.launcher == "launch":  # whose ranks all end where one fails, so that all have counted alike
        place = topology.master_addr, topology.master_port  # a notebook that replaces an engine has a new store
        _launch_meetings[place] += 1
        return PrefixStore(str(_launch_meetings[place]), store), {}
    meeting = Meeting(store, topology)
    return PrefixStore(meeting.come(timeout.total_seconds()), store), meeting.places


def _store_of_job(topology: Topology, timeout: timedelta) -> Store:
    """The store where the ranks of this job meet, now and whenever they connect anew."""
    if topology.world_size == 1:
        return HashStore()
    if topology.master_addr is None or topology.master_port is None:
        raise TopologyError(
            explain(
                "make_mesh",
                f"{topology.launcher} says rank {topology.rank} of {topology.world_size} but not where to meet",
                "Set MASTER_ADDR to the first rank's host and MASTER_PORT to a port that is free there, on every rank.",
            )
        )
    address, port = topology.master_addr, topology.master_port
    store = _stores.get((address, port))
    if store is None and topology.launcher == "launch":  # the parent of the ranks serves the store
        store = TCPStore(address, port, topology.world_size, is_master=False, timeout=timeout, wait_for_workers=False)
    elif store is None:
        store = _meet(address, port, topology, timeout)
    else:
        store.set_timeout(timeout)  # it had that of the mesh before
    _stores[address, port] = store
    return PrefixStore(f"pmod/{topology.job}", store)  # another job may not be read


def _meet(address: str, port: int, topology: Topology, timeout: timedelta) -> Store:
    """The store that rank 0, or torchrun's agent, serves at this address."""
    seconds = f"{timeout.total_seconds():g} s"
    loopback = None if _torchelastic_use_agent_store() else _loopback(address)
    try:
        listener = _listener(loopback, port, topology) if loopback is not None and topology.rank == 0 else None
        if listener is not None:
            return TCPStore(
                address, port, topology.world_size, is_master=True, timeout=timeout, wait_for_workers=False,
                multi_tenant=True, master_listen_fd=listener.detach(),
            )  # fmt: skip
        host = loopback or address
        host = f"[{host}]" if ":" in host else host
        # a world of one: it would wait for the others without a look at them, as `Meeting` has
        meeting = rendezvous(f"tcp://{host}:{port}", topology.rank, 1, timeout=timeout)
        return next(iter(meeting))[0]
    except (dist.DistNetworkError, OSError) as error:
        if "EADDRINUSE" in str(error) or "ddress already in use" in str(error):
            given = f"port {port} of {address} is taken, perhaps by another job"
            right = "Set MASTER_PORT to a free port, the same on every rank."
            raise TopologyError(explain("make_mesh", given, right)) from None
        if isinstance(error, OSError):
            right = "Set MASTER_PORT to a port that this process may listen at."
            raise TopologyError(explain("make_mesh", f"port {port} of {address}: {error.strerror}", right)) from None
        given = f"rank 0 did not come to {address}:{port} within {seconds}"
    right = "Were all ranks started, and with the same MASTER_ADDR and MASTER_PORT? May they reach that port?"
    raise CollectiveTimeout(explain("make_mesh", given, right))


def _loopback(address: str) -> str | None:
    """The loopback address that is meant: of a host's name it may be one that other hosts do not see."""
    if address == "localhost":
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)]
        return min(found, key=lambda text: ":" in text)  # IPv4 where there is
    with contextlib.suppress(ValueError):
        return address if ipaddress.ip_address(address).is_loopback else None
    return None


def _listener(address: str, port: int, topology: Topology) -> socket.socket | None:
    """A socket for the store where all ranks are on this host: nobody else need reach it, and torch would let them.

    None where the port is taken: if by a store of this process, torch shares that, else it says so.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, backlog=max(128, topology.world_size))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return None


INTERFACE = "Between hosts gloo takes the interface of this host's name; GLOO_SOCKET_IFNAME=eth0, say, names another."


@contextlib.contextmanager
def _lazy_gloo() -> Generator[None]:
    """gloo pairs connect at their first message, not when the group is made.

    Otherwise making a group waits for its other members, and ranks that make groups in a cyclic order wait for ever.
    """
    before = os.environ.get("TORCH_GLOO_LAZY_INIT")
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCH_GLOO_LAZY_INIT"]
        else:
            os.environ["TORCH_GLOO_LAZY_INIT"] = before


def group_of(key: str, ranks: Callable[[], list[int]], topology: Topology, seconds: float) -> dist.ProcessGroup:
    """The process group over `ranks()` in this order; `key` names the same ranks in the same order."""
    if in_simulation():
        raise PmodError(explain("Mesh.group", "a simulated rank has no process group", "Use pmod's own functions."))
    found = _state.groups.get(key)
    if found is not None and _state.world is dist.group.WORLD and _same_place(topology):
        return found
    with _lock:
        connect(topology, seconds)
        found = _state.groups.get(key)
        if found is None:
            found = _state.groups[key] = _make_group(key, ranks(), timedelta(seconds=seconds))
        return found


def _same_place(topology: Topology) -> bool:
    world = _state.topology
    return world is topology or (
        world is not None and (world.rank, world.world_size) == (topology.rank, topology.world_size)
    )


def _make_group(key: str, ranks: list[int], timeout: timedelta) -> dist.ProcessGroup:
    if ranks == list(range(dist.get_world_size())):
        world = dist.group.WORLD
        assert world is not None
        return world
    import torch.distributed.distributed_c10d as c10d

    digest = hashlib.sha1(key.encode()).hexdigest()[:16]
    name = f"pmod:{digest}:{_state.made[key]}"
    _state.made[key] += 1
    private: Any = c10d
    store = _own_connection(private._get_default_store())
    with _lazy_gloo():
        group, _ = private._new_process_group_helper(
            len(ranks),
            ranks.index(dist.get_rank()),
            ranks,
            dist.get_backend_config(),
            store,
            name,
            timeout=timeout,
            group_desc=f"pmod over ranks {ranks if len(ranks) <= 8 else f'{ranks[0]}..{ranks[-1]}'}",
        )
    # what new_group does after the helper: global rank -> rank within the group
    private._world.pg_group_ranks[group] = {rank: index for index, rank in enumerate(ranks)}
    return group


def _own_connection(store: Any) -> Store:
    """One more to this store: a group that waits in the store for its members would lock out the next group."""
    try:
        store.check([PLACE.format(0)])  # fails at once where its server is gone; to connect is tried until the deadline
        return store.clone()
    except RuntimeError:
        given = "the store of the world cannot be reached, which rank 0 or the launcher serves"
        right = "Has rank 0 ended? Begin anew on all ranks: pmod.shutdown(), then pmod.make_mesh."
        raise CollectiveTimeout(explain(call_site()[0] or "make_mesh", given, right)) from None


def blackboard() -> Store | None:
    """A store that all ranks of the world read and write; None in a simulation and before anything is connected."""
    if simulated is not None or not dist.is_initialized():
        return None
    import torch.distributed.distributed_c10d as c10d

    private: Any = c10d
    return private._get_default_store()


def adopt(key: str, ranks: list[int], group: dist.ProcessGroup, topology: Topology, seconds: float) -> None:
    """Use a group that somebody else made (a DeviceMesh's) for these ranks, unless its order differs or we have one."""
    if dist.get_process_group_ranks(group) == ranks:
        with _lock:
            connect(topology, seconds)
            _state.groups.setdefault(key, group)


def _at_exit() -> None:
    # gloo's threads let go of the tensors of the last message a little after it is done. For that they need the
    # interpreter, and where it is ending they abort the process ("terminate called without an active exception").
    time.sleep(0.05)
    shutdown()
    hold_still()


def shutdown() -> None:
    """End what `make_mesh` started: its process groups, and the world if pmod connected it.

    Runs at exit by itself, and may be called any number of times. A process group that the user initialized is left
    alone. Afterwards `make_mesh` starts afresh. After a failed wait the connections stay as they are until the process
    ends, because gloo might wait for ever to end them; the ranks that wait for this one are told.

    >>> pmod.shutdown()
    """
    with _lock:
        atexit.unregister(_at_exit)
        started = _state.started_world
        connected = dist.is_initialized() and dist.group.WORLD is _state.world
        if connected:
            for farewell in _state.farewells or (before_end if started else []):
                with contextlib.suppress(RuntimeError):  # the store may be gone, or Python too near its end
                    farewell()
        if connected and started:
            _end(_all_groups(), whole_world=True)
        elif connected:
            _end(_made_groups(), whole_world=False)
        if started or not connected:
            _begin_anew()
            _place.record(launched)
        else:  # the user's world goes on, and so do its store and the names used in it
            _state.groups, _state.farewells = {}, []


def meetings() -> dict[str, int]:
    """How often this rank has sent along each rank set."""
    return dict(_state.meetings)


def groups_in_use() -> list[dist.ProcessGroup]:
    """Those along which something was sent."""
    return [group for key, group in _state.groups.items() if _state.meetings[key]]


def _made_groups() -> list[dist.ProcessGroup]:
    """Those that pmod has made within a world of the user's."""
    ours = [group for group in _state.groups.values() if group.group_name.startswith("pmod:")]
    return [group for group in ours if group is not dist.group.WORLD]


def _all_groups() -> list[dist.ProcessGroup]:
    import torch.distributed.distributed_c10d as c10d

    private: Any = c10d
    return list(private._world.pg_map)


_PATIENCE = 5.0  # seconds for a group to end: some hundredths do where nothing is wrong


def _end(groups: list[dist.ProcessGroup], *, whole_world: bool) -> None:
    """Take the groups out of torch.distributed, and end those that can be ended; `groups` is emptied.

    A group that was left behind stays, and so do all others of its world, whose connections the same death has broken:
    gloo ends a group's thread at a moment without an event (Loop::run), and a connection that breaks once it is asked
    to end is never taken off its list, so that this moment never comes. A death that nobody has noticed yet can do the
    same to any group. So groups end in a thread, for which this one waits so long and no longer. A group that somebody
    else holds would end elsewhere, without a bound: it stays as well.
    """
    if any(group in _left_behind for group in groups):
        _leave_all_behind(groups)
    watched = [weakref.ref(group) for group in groups]
    taken_out, ended, errors = threading.Event(), threading.Event(), list[BaseException]()

    def end() -> None:
        busy.add(threading.get_ident())
        try:
            _take_out(groups, whole_world)
        except BaseException as error:
            errors.append(error)
        taken_out.set()
        groups.clear()
        busy.discard(threading.get_ident())
        ended.set()

    try:
        threading.Thread(target=end, name="pmod ends", daemon=True).start()
    except RuntimeError:  # Python is too near its end
        _leave_all_behind(groups)
        return
    try:
        taken_out.wait()
    except BaseException:  # Ctrl-C, and yet a world that is half there could be taken for a whole one
        taken_out.wait()
        raise
    if not ended.wait(_PATIENCE):
        log.warning("gloo does not end a process group within %g s, so it is left behind", _PATIENCE)
        _end_without_destructors()
    for reference in watched:
        group = reference()
        if group is not None:
            leave_behind(group)
    if errors:
        raise errors[0]


def _leave_all_behind(groups: list[dist.ProcessGroup]) -> None:
    for group in groups:
        leave_behind(group)


def _take_out(groups: list[dist.ProcessGroup], whole_world: bool) -> None:
    """Make torch.distributed forget the groups, all while `groups` holds them."""
    if whole_world:
        dist.destroy_process_group()
        _state.world = None
    else:
        for group in groups:
            dist.destroy_process_group(group)
    _state.groups = {}
