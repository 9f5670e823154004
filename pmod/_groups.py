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
import hashlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Generator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# public by torch's documentation, though not by its stubs
from torch.distributed import HashStore, PrefixStore, Store, TCPStore, rendezvous  # pyright: ignore[reportPrivateImportUsage]

from pmod._errors import TopologyError, explain
from pmod._topology import Topology

log = logging.getLogger("pmod")

DEFAULT_TIMEOUT = 600.0


class _State:
    """What this process has connected; one instance, reset by `shutdown`."""

    def __init__(self) -> None:
        self.groups: dict[str, dist.ProcessGroup] = {}
        self.world: dist.ProcessGroup | None = None  # the default group that `groups` were made under
        self.started_world = False
        self.topology: Topology | None = None
        self.timeout: float = DEFAULT_TIMEOUT


_state = _State()
_lock = threading.RLock()
# How often each rank set (and the world) was made. It survives shutdown: a name may not come twice in one store.
_made: Counter[str] = Counter()

# The per-thread world of a running simulation (attributes: topology, mesh, wire), or None: one look-up when off.
simulated: threading.local | None = None


def here() -> Topology:
    """The topology of this process (of this thread in a simulation): what was last used, else detected."""
    if simulated is not None and hasattr(simulated, "topology"):
        return simulated.topology
    return _state.topology or Topology.detect()


def number_device() -> torch.device:
    """Where Python numbers travel: the cpu, unless the user's process group has no backend for it."""
    if dist.is_initialized() and simulated is None and "cpu" not in dist.get_backend_config():
        return here().device
    return torch.device("cpu")


def settle(topology: Topology, timeout: float | None) -> None:
    """Remember what the mesh in the making said about this process."""
    if simulated is not None and hasattr(simulated, "topology"):
        return
    _state.topology = topology
    _state.timeout = timeout if timeout is not None else _default_timeout()


def _default_timeout() -> float:
    text = os.environ.get("PMOD_TIMEOUT")
    if text is None:
        return DEFAULT_TIMEOUT
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds > 0:
        raise TopologyError(explain("make_mesh", f"PMOD_TIMEOUT is {text!r}", "Set it to seconds, a number above 0."))
    return seconds


def connect(topology: Topology) -> None:
    """Join the default process group, starting it where nobody has."""
    with _lock:
        if dist.is_initialized():
            _join(topology)
            return
        _state.groups.clear()
        if topology.device.type == "cuda":
            torch.cuda.set_device(topology.device)  # what NCCL takes for a barrier, and plain "cuda" for a tensor
        timeout = timedelta(seconds=_state.timeout)
        store = _store(topology, timeout)
        with _lazy_gloo():
            dist.init_process_group(
                topology.backend, store=store, rank=topology.rank, world_size=topology.world_size, timeout=timeout
            )
        _state.started_world = True
        _state.world = dist.group.WORLD
        atexit.register(shutdown)
        if topology.rank == 0:
            log.info(
                "%d ranks on %d nodes, started by %s: backend %s, device %s",
                topology.world_size, topology.num_nodes, topology.launcher, topology.backend, topology.device,
            )  # fmt: skip


def _join(topology: Topology) -> None:
    """The user (or an earlier mesh) initialized torch.distributed: use it, and check that it is the same world."""
    if dist.group.WORLD is not _state.world:
        _state.groups.clear()
        _state.world = dist.group.WORLD
        _state.started_world = False
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
    store: Store
    if topology.launcher == "launch":  # the parent of the ranks serves the store
        store = TCPStore(address, port, topology.world_size, is_master=False, timeout=timeout)
    else:
        meeting = rendezvous(f"tcp://{address}:{port}", topology.rank, topology.world_size, timeout=timeout)
        store = next(iter(meeting))[0]
    # neither a restarted job nor a second connection may read the keys of the one before it
    _made["world"] += 1
    return PrefixStore(f"pmod/attempt_{topology.restart_count}/{_made['world']}", store)


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


def group_of(key: str, ranks: Callable[[], list[int]]) -> dist.ProcessGroup:
    """The process group over `ranks()` in this order; `key` names the same ranks in the same order."""
    found = _state.groups.get(key)
    if found is not None and _state.world is dist.group.WORLD:
        return found
    with _lock:
        if not dist.is_initialized() or dist.group.WORLD is not _state.world:
            connect(here())
        found = _state.groups.get(key)
        if found is None:
            found = _state.groups[key] = _make_group(key, ranks())
        return found


def _make_group(key: str, ranks: list[int]) -> dist.ProcessGroup:
    if ranks == list(range(dist.get_world_size())):
        world = dist.group.WORLD
        assert world is not None
        return world
    import torch.distributed.distributed_c10d as c10d

    digest = hashlib.sha1(key.encode()).hexdigest()[:16]
    name = f"pmod:{digest}:{_made[key]}"
    _made[key] += 1
    private: Any = c10d
    with _lazy_gloo():
        group, _ = private._new_process_group_helper(
            len(ranks),
            ranks.index(dist.get_rank()),
            ranks,
            dist.get_backend_config(),
            private._get_default_store(),
            name,
            timeout=timedelta(seconds=_state.timeout),
            group_desc=f"pmod over ranks {ranks if len(ranks) <= 8 else f'{ranks[0]}..{ranks[-1]}'}",
        )
    # what new_group does after the helper: global rank -> rank within the group
    private._world.pg_group_ranks[group] = {rank: index for index, rank in enumerate(ranks)}
    return group


def adopt(key: str, group: dist.ProcessGroup) -> None:
    """Use a group that somebody else made (a DeviceMesh's) for these ranks, unless we have one."""
    with _lock:
        connect(here())
        _state.groups.setdefault(key, group)


def shutdown() -> None:
    """End what `make_mesh` started: its process groups, and the world if pmod connected it.

    Runs at exit by itself, and may be called any number of times. A process group that the user initialized is left
    alone. Afterwards `make_mesh` starts afresh.

    >>> pmod.shutdown()
    """
    with _lock:
        ours = list(_state.groups.values())
        world = _state.world if _state.started_world else None
        atexit.unregister(shutdown)
        connected = dist.is_initialized() and dist.group.WORLD is _state.world
        _state.groups, _state.world, _state.started_world = {}, None, False
    if not connected:
        return
    if world is not None:
        dist.destroy_process_group()
        return
    for group in ours:
        made_by_us = group is not dist.group.WORLD and group.group_name.startswith("pmod:")
        if made_by_us:
            dist.destroy_process_group(group)
