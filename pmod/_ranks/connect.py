"""Connecting the processes: how they meet, how the world starts, and how it ends."""

from __future__ import annotations

import atexit
import contextlib
import errno
import ipaddress
import os
import socket
import threading
import time
import weakref
from collections.abc import Generator
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist
from torch.distributed import (
    HashStore,  # pyright: ignore[reportPrivateImportUsage]
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
    rendezvous,  # pyright: ignore[reportPrivateImportUsage]
)

from pmod._errors import CollectiveTimeout, TopologyError, phrase
from pmod._ranks import place as _place
from pmod._ranks import world
from pmod._ranks.backends import use_device
from pmod._ranks.blocking import hold_still
from pmod._ranks.meeting import Meeting
from pmod._ranks.topology import Topology
from pmod._ranks.world import (
    PLACE,
    Connection,
    all_groups,
    end_without_destructors,
    is_left_behind,
    leave_all_behind,
    leave_behind,
    log,
)
from pmod._site import call_site
from pmod._torch import is_agents_store


def connect(topology: Topology, seconds: float, mesh: str = "") -> None:
    """Join the default process group, starting it where nobody has.

    `mesh` is for the log.
    """
    processes = world.processes()
    with processes.lock:
        if topology.world_size > 1 and world.is_no_rank():
            raise _place.refusal(world.of_parent() or topology)
        if dist.is_initialized():
            _join(topology)
            return
        use_device(topology.device)
        timeout = timedelta(seconds=seconds)
        store, places = _store(topology, timeout)
        try:
            with lazy_gloo():
                dist.init_process_group(
                    topology.backend,
                    store=store,
                    rank=topology.rank,
                    world_size=topology.world_size,
                    timeout=timeout,
                )
            _enter_world(topology, started=True)
            processes.connection.places = places
        except BaseException:
            # Ctrl-C came in between. Nobody else has a world that is half there, so the
            # next make_mesh may not use it.
            if dist.is_initialized():
                _end(all_groups(), whole_world=True)
            processes.connection = Connection()
            raise
        atexit.register(_at_exit)
        announce(topology, mesh)


def announce(topology: Topology, mesh: str) -> None:
    """Log who started what, and where: one line, by rank 0."""
    if topology.rank != 0:
        return
    size, nodes = topology.world_size, topology.num_nodes
    met = ""
    if size > 1:
        met = f", met at {topology.master_addr}:{topology.master_port}"
    log.info(
        "%d rank%s on %d node%s, started by %s%s: backend %s, device %s%s",
        size,
        "s" * (size > 1),
        nodes,
        "s" * (nodes > 1),
        topology.launcher,
        met,
        topology.backend,
        topology.device,
        mesh and f", mesh {mesh}",
    )


def _enter_world(topology: Topology, *, started: bool) -> None:
    processes = world.processes()
    processes.begin_anew()
    connection = processes.connection
    connection.world = dist.group.WORLD
    connection.started_world = started
    connection.topology = topology
    _place.record(topology)
    store = world.current().store
    if store is None:
        return
    here = f"{socket.gethostname()}\x1f{os.getpid()}"
    # A user's store may hold nothing (torch's fake one).
    with contextlib.suppress(RuntimeError):
        store.set(PLACE.format(topology.rank), here)


def _join(topology: Topology) -> None:
    """Use the world that the user (or an earlier mesh) has initialized.

    It must be the world of this topology.
    """
    actual = (dist.get_rank(), dist.get_world_size())
    if actual != (topology.rank, topology.world_size):
        raise TopologyError(
            phrase(
                "make_mesh",
                f"torch.distributed is initialized as rank {actual[0]} of {actual[1]}, "
                f"the topology says rank {topology.rank} of {topology.world_size}",
                "Leave topology out, or call torch.distributed.destroy_process_group() "
                "first.",
            )
        )
    if dist.group.WORLD is not world.processes().connection.world:
        _enter_world(topology, started=False)


def _store(
    topology: Topology, timeout: timedelta
) -> tuple[Store, dict[int, tuple[str, int]]]:
    """Return a store of this connection alone, and where the ranks there are."""
    store = _store_of_job(topology, timeout)
    if topology.world_size == 1:
        return store, {}
    processes = world.processes()
    # These ranks all end where one fails, so all have counted alike. A notebook that
    # replaces an engine has a new store, where the count begins anew.
    if topology.launcher == "launch":
        place = topology.master_addr, topology.master_port
        met = processes.launch_meetings
        met[place] += 1
        return PrefixStore(str(met[place]), store), {}
    meeting = Meeting(store, topology, processes.met)
    name = meeting.come(timeout.total_seconds())
    processes.met = time.time()
    return PrefixStore(name, store), meeting.places


def _store_of_job(topology: Topology, timeout: timedelta) -> Store:
    """Return the store where the ranks of this job meet, whenever they connect anew."""
    if topology.world_size == 1:
        return HashStore()
    address, port = topology.master_addr, topology.master_port
    if address is None or port is None:
        raise TopologyError(
            phrase(
                "make_mesh",
                f"{topology.launcher} says rank {topology.rank} "
                f"of {topology.world_size} but not where to meet",
                "Set MASTER_ADDR to the first rank's host and MASTER_PORT to a port "
                "that is free there, on every rank.",
            )
        )
    stores = world.processes().stores
    store = stores.get((address, port))
    if store is not None:
        # It had the timeout of the mesh before.
        store.set_timeout(timeout)
    elif topology.launcher == "launch":
        # The parent of the ranks serves the store.
        store = TCPStore(
            address,
            port,
            topology.world_size,
            is_master=False,
            timeout=timeout,
            wait_for_workers=False,
        )
    else:
        store = _meet(address, port, topology, timeout)
    stores[address, port] = store
    # What another job wrote, which came to this store by mistake, may not be read.
    return PrefixStore(f"pmod/{topology.job}", store)


def _meet(address: str, port: int, topology: Topology, timeout: timedelta) -> Store:
    """Return the store that rank 0, or torchrun's agent, serves at this address."""
    try:
        return _serve_or_find(address, port, topology, timeout)
    except (dist.DistNetworkError, OSError) as error:
        if "EADDRINUSE" in str(error) or "ddress already in use" in str(error):
            given = f"port {port} of {address} is taken, perhaps by another job"
            right = "Set MASTER_PORT to a free port, the same on every rank."
            raise TopologyError(phrase("make_mesh", given, right)) from None
        if isinstance(error, OSError):
            given = f"port {port} of {address}: {error.strerror}"
            right = "Set MASTER_PORT to a port that this process may listen at."
            raise TopologyError(phrase("make_mesh", given, right)) from None
    seconds = f"{timeout.total_seconds():g} s"
    given = f"rank 0 did not come to {address}:{port} within {seconds}"
    right = (
        "Were all ranks started, and with the same MASTER_ADDR and MASTER_PORT? "
        "May they reach that port?"
    )
    raise CollectiveTimeout(phrase("make_mesh", given, right))


def _serve_or_find(
    address: str, port: int, topology: Topology, timeout: timedelta
) -> Store:
    loopback = None if is_agents_store() else _loopback(address)
    if loopback is not None and topology.rank == 0:
        listener = _listener(loopback, port, topology)
        if listener is not None:
            return TCPStore(
                address,
                port,
                topology.world_size,
                is_master=True,
                timeout=timeout,
                wait_for_workers=False,
                multi_tenant=True,
                master_listen_fd=listener.detach(),
            )
    host = loopback or address
    # an IPv6 address in a URL
    if ":" in host:
        host = f"[{host}]"
    # A world of one: it would wait for the others without a look at them, as `Meeting`
    # has.
    meeting = rendezvous(f"tcp://{host}:{port}", topology.rank, 1, timeout=timeout)
    return next(iter(meeting))[0]


def _loopback(address: str) -> str | None:
    """Return the loopback address that is meant, if it is one.

    That of a host's name does not count, because other hosts may see another one.
    """
    if address == "localhost":
        entries = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
        found = [str(entry[4][0]) for entry in entries]
        # IPv4 where there is.
        return min(found, key=lambda text: ":" in text)
    # A host's name is not an address.
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(address).is_loopback:
            return address
    return None


def _listener(address: str, port: int, topology: Topology) -> socket.socket | None:
    """Return a socket for the store where all ranks are on this host.

    Nobody else need reach it, and torch would let them. None where the port is taken:
    if by a store of this process, torch shares that, else it says so.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # All ranks may come at once.
    waiting = max(128, topology.world_size)
    try:
        return socket.create_server((address, port), family=family, backlog=waiting)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return None


INTERFACE = (
    "Between hosts gloo takes the interface of this host's name. "
    "GLOO_SOCKET_IFNAME, for example eth0, names another."
)


class _ClonedStore(Protocol):
    """A Store, of which torch's stubs do not know the second method."""

    def check(self, keys: list[str], /) -> bool: ...

    def clone(self) -> Store: ...


@contextlib.contextmanager
def lazy_gloo() -> Generator[None]:
    """Let gloo pairs connect at their first message, not when the group is made.

    Otherwise making a group waits for its other members, and ranks that make groups in
    a cyclic order wait for ever.
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


def own_connection(store: _ClonedStore) -> Store:
    """Return one more connection to this store.

    On the same one a group that waits in the store for its members would lock out the
    next group.
    """
    try:
        # This fails at once where its server is gone, while to connect is tried until
        # the deadline.
        store.check([PLACE.format(0)])
        return store.clone()
    except RuntimeError:
        given = (
            "the store of the world cannot be reached, "
            "which rank 0 or the launcher serves"
        )
        right = (
            "Has rank 0 ended? Begin anew on all ranks: "
            "pmod.shutdown(), then pmod.make_mesh."
        )
        function = call_site()[0] or "make_mesh"
        raise CollectiveTimeout(phrase(function, given, right)) from None


def _at_exit() -> None:
    # gloo's threads let go of the tensors of the last message a little after it is
    # done. For that they need the interpreter, and where it is ending they abort the
    # process ("terminate called without an active exception").
    time.sleep(0.05)
    shutdown()
    hold_still()


def shutdown() -> None:
    """End what `make_mesh` started: its process groups, and the world if it is pmod's.

    It is pmod's where pmod connected it. Runs at exit by itself, and may be called any
    number of times. A process group that the user initialized is left alone. Afterwards
    `make_mesh` starts afresh. After a failed wait the connections stay as they are
    until the process ends, because gloo might wait for ever to end them; the ranks that
    wait for this one are told.

    >>> pmod.shutdown()
    """
    processes = world.processes()
    with processes.lock:
        atexit.unregister(_at_exit)
        connection = processes.connection
        started = connection.started_world
        connected = dist.is_initialized() and dist.group.WORLD is connection.world
        if connected:
            # Before the groups end, because those who wait for this rank must be told.
            _say_farewell(connection)
        if connected and started:
            _end(all_groups(), whole_world=True)
        elif connected:
            _end(_made_groups(), whole_world=False)
        if started or not connected:
            processes.begin_anew()
            _place.record(processes.launched)
        else:
            # The user's world goes on, and so do its store and the names used in it.
            connection.forget_groups()
            connection.farewells = []


def _say_farewell(connection: Connection) -> None:
    farewells = connection.farewells
    if not farewells and connection.started_world:
        farewells = world.processes().before_end
    for farewell in farewells:
        # The store may be gone, or Python too near its end.
        with contextlib.suppress(RuntimeError):
            farewell()


def groups_in_use() -> list[dist.ProcessGroup]:
    """Return those along which something was sent."""
    connection = world.processes().connection
    sent = connection.meetings
    return [group for key, group in connection.groups.items() if sent[key]]


def _made_groups() -> list[dist.ProcessGroup]:
    """Return those that pmod has made within a world of the user's."""
    connection = world.processes().connection
    return [connection.groups[key] for key in connection.made_here]


# Seconds for a group to end: some hundredths do where nothing is wrong.
_PATIENCE = 5.0


def _end(groups: list[dist.ProcessGroup], *, whole_world: bool) -> None:
    """Take the groups out of torch.distributed, and end those that can be ended.

    `groups` is emptied. A group that was left behind stays, and so do all others of its
    world, whose connections the same death has broken. gloo ends a group's thread at a
    moment without an event (Loop::run), and a connection that breaks once it is asked
    to end is never taken off its list, so that this moment never comes. A death that
    nobody has noticed yet can do the same to any group. So groups end in a thread, for
    which this one waits so long and no longer. A group that somebody else holds would
    end elsewhere, without a bound: it stays as well.
    """
    if any(map(is_left_behind, groups)):
        leave_all_behind(groups)
    watched = [weakref.ref(group) for group in groups]
    taken_out, ended = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def end() -> None:
        # Where Python ends meanwhile, `hold_still` must know of this thread.
        busy, me = world.processes().busy, threading.get_ident()
        busy.add(me)
        try:
            _take_out(groups, whole_world)
        except BaseException as error:
            errors.append(error)
        taken_out.set()
        # The last reference to a group ends it.
        groups.clear()
        busy.discard(me)
        ended.set()

    try:
        threading.Thread(target=end, name="pmod ends", daemon=True).start()
    except RuntimeError:
        # Python is too near its end.
        leave_all_behind(groups)
        return
    try:
        taken_out.wait()
    except BaseException:
        # Ctrl-C, and yet a world that is half there could be taken for a whole one.
        taken_out.wait()
        raise
    if not ended.wait(_PATIENCE):
        log.warning(
            "gloo does not end a process group within %g s, so it is left behind",
            _PATIENCE,
        )
        end_without_destructors()
    # Those that are still there are held by somebody.
    for reference in watched:
        group = reference()
        if group is not None:
            leave_behind(group)
    if errors:
        raise errors[0]


def _take_out(groups: list[dist.ProcessGroup], whole_world: bool) -> None:
    """Make torch.distributed forget the groups, all while `groups` holds them."""
    connection = world.processes().connection
    if whole_world:
        dist.destroy_process_group()
        connection.world = None
    else:
        for group in groups:
            dist.destroy_process_group(group)
    connection.forget_groups()
