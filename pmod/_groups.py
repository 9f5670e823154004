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
import hashlib
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Generator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# public by torch's documentation, though not by its stubs
from torch.distributed import HashStore, PrefixStore, Store, TCPStore, rendezvous  # pyright: ignore[reportPrivateImportUsage]

from pmod import _place
from pmod._errors import AxisError, CollectiveTimeout, PmodError, TopologyError, explain, quoted
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


_state = _State()
_lock = threading.RLock()
# The stores outlive a shutdown: the ranks that come back must not meet at a server that is about to end. The number is
# that of the connection, which keeps one from reading the keys of another.
_stores: dict[tuple[str, int], tuple[Store, int]] = {}
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
        store = _store(topology, timeout)
        with _lazy_gloo():
            dist.init_process_group(
                topology.backend, store=store, rank=topology.rank, world_size=topology.world_size, timeout=timeout
            )
        _enter_world(topology, started=True)
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
    _state.__init__()
    _state.world, _state.started_world, _state.topology = dist.group.WORLD, started, topology
    _place.record(topology)
    store = blackboard()
    if store is not None:
        with contextlib.suppress(RuntimeError):  # a user's store may hold nothing (torch's fake one)
            store.set(PLACE.format(topology.rank), f"{socket.gethostname()}\x1f{os.getpid()}")


def next_meeting(key: str) -> int:
    """The number of a message along these ranks, the same on all of them."""
    _state.meetings[key] += 1
    return _state.meetings[key]


def history(key: str) -> deque[tuple[int, Any]]:
    """The numbers of the last messages along these ranks, and what was said of them."""
    return _state.histories.setdefault(key, deque(maxlen=16))


_left_behind: set[dist.ProcessGroup] = set()


def leave_behind(group: dist.ProcessGroup) -> None:
    """Never end this group: a message of it waits for ever, and so would the group's end."""
    with _lock:
        if group not in _left_behind:
            _left_behind.add(group)
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))  # beyond the end of Python, too


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


def _store(topology: Topology, timeout: timedelta) -> Store:
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
    store, number = _stores.get((address, port), (None, 0))
    if store is None and topology.launcher == "launch":  # the parent of the ranks serves the store
        store = TCPStore(address, port, topology.world_size, is_master=False, timeout=timeout)
    elif store is None:
        store = _meet(address, port, topology, timeout)
    else:
        store.set_timeout(timeout)  # it had that of the mesh before
    _stores[address, port] = store, number + 1
    # neither another job nor an earlier connection of this one may be read
    store = PrefixStore(f"pmod/{topology.job}/{number}", store)
    if topology.launcher != "env":
        return store
    return PrefixStore(_agreed_attempt(store, topology, timeout.total_seconds()), store)


def _agreed_attempt(store: Store, topology: Topology, seconds: float) -> str:
    """A name for this start of the ranks, which no process of an earlier one knows.

    torchrun's agents outlive their workers, and so does what those wrote into the store; and each agent counts restarts
    for itself (TORCHELASTIC_RESTART_COUNT), so that the counts of two hosts differ after one worker has died. So each
    rank writes down a word of its own. Rank 0 proposes the words that it finds; whoever finds its word among them
    agrees, which the dead cannot; and what all have agreed to is the name.
    """
    rank, size, word = topology.rank, topology.world_size, uuid.uuid4().hex
    words = [f"word/{other}" for other in range(size)]
    store.set(words[rank], word)
    until, proposed, agreed, pause = time.monotonic() + seconds, "", "", 0.002
    while time.monotonic() < until:
        if rank == 0 and store.check(words):
            found = ",".join(text.decode() for text in store.multi_get(words))
            if found != proposed:  # one of them was of a rank that is no more
                proposed = found
                store.set("proposed", found)
        elif rank != 0 and store.check(["proposed"]):
            proposed = store.get("proposed").decode()
        name = hashlib.sha1(proposed.encode()).hexdigest()
        if word in proposed and name != agreed:
            agreed = name
            store.add(f"agreed/{name}", 1)
        if agreed and store.add(f"agreed/{agreed}", 0) == size:
            return agreed
        time.sleep(pause)
        pause = min(1.5 * pause, 0.25)
    right = "Were all ranks started, and with the same MASTER_ADDR and MASTER_PORT?"
    raise CollectiveTimeout(explain("make_mesh", f"not all {size} ranks came within {seconds:g} s", right))


def _meet(address: str, port: int, topology: Topology, timeout: timedelta) -> Store:
    """The store that rank 0, or torchrun's agent, serves at this address."""
    seconds = f"{timeout.total_seconds():g} s"
    try:
        if topology.launcher != "env" and topology.rank == 0 and address.startswith("127."):
            # all ranks are on this host, so nobody else need reach it; torch would listen on all interfaces
            listener = socket.create_server((address, port), backlog=max(128, topology.world_size))
            return TCPStore(
                address, port, topology.world_size, is_master=True, timeout=timeout, master_listen_fd=listener.detach()
            )
        meeting = rendezvous(f"tcp://{address}:{port}", topology.rank, topology.world_size, timeout=timeout)
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
    except dist.DistStoreError as error:
        came = re.search("[0-9]+/[0-9]+ clients joined", str(error))
        given = f"not all ranks came to {address}:{port} within {seconds}{f' ({came[0]})' if came else ''}"
    right = "Were all ranks started, and with the same MASTER_ADDR and MASTER_PORT? May they reach that port?"
    raise CollectiveTimeout(explain("make_mesh", given, right))


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
    with _lazy_gloo():
        group, _ = private._new_process_group_helper(
            len(ranks),
            ranks.index(dist.get_rank()),
            ranks,
            dist.get_backend_config(),
            # a connection of its own: a group that waits in the store for its members would lock out the next group
            private._get_default_store().clone(),
            name,
            timeout=timeout,
            group_desc=f"pmod over ranks {ranks if len(ranks) <= 8 else f'{ranks[0]}..{ranks[-1]}'}",
        )
    # what new_group does after the helper: global rank -> rank within the group
    private._world.pg_group_ranks[group] = {rank: index for index, rank in enumerate(ranks)}
    return group


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


def shutdown() -> None:
    """End what `make_mesh` started: its process groups, and the world if pmod connected it.

    Runs at exit by itself, and may be called any number of times. A process group that the user initialized is left
    alone. Afterwards `make_mesh` starts afresh.

    >>> pmod.shutdown()
    """
    with _lock:
        atexit.unregister(_at_exit)
        ours, started = list(_state.groups.values()), _state.started_world
        connected = dist.is_initialized() and dist.group.WORLD is _state.world
        if started or not connected:
            _state.__init__()
            _place.record(launched)
        else:  # the user's world goes on, and so do its store and the names used in it
            _state.groups = {}
    if connected and started:
        dist.destroy_process_group()
    elif connected:
        for group in ours:
            if group is not dist.group.WORLD and group.group_name.startswith("pmod:"):
                dist.destroy_process_group(group)
