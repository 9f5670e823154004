"""The one cache of process groups.

A group is made on first use by its own members and nobody else, so ranks
may first use their axes in any order. torch's public ``new_group`` cannot do that: it needs every rank of the world,
and with ``use_local_synchronization`` it derives the group's name from how many groups this process knows, so that
ranks with different histories wait for each other under different names. We name groups by their ranks and a counter
per rank set, through the private helper of ``new_group`` (tests/ranks/test_groups.py tells when it moves).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from pmod._errors import PmodError, phrase
from pmod._ranks import connect
from pmod._ranks import world as _world
from pmod._ranks.connect import lazy_gloo, own_connection
from pmod._ranks.topology import Topology
from pmod._ranks.world import in_simulation, state
from pmod._torch import default_store, make_group, note_ranks


def group_of(key: str, ranks: Callable[[], list[int]], topology: Topology, seconds: float) -> dist.ProcessGroup:
    """The process group over `ranks()` in this order; `key` names the same ranks in the same order."""
    if in_simulation():
        raise PmodError(phrase("Mesh.group", "a simulated rank has no process group", "Use pmod's own functions."))
    found = state.groups.get(key)
    if found is not None and state.world is dist.group.WORLD and _same_place(topology):
        return found
    with _world._lock:
        connect.connect(topology, seconds)
        found = state.groups.get(key)
        if found is None:
            found = state.groups[key] = _make_group(key, ranks(), timedelta(seconds=seconds))
        return found


def _same_place(topology: Topology) -> bool:
    world = state.topology
    return world is topology or (
        world is not None and (world.rank, world.world_size) == (topology.rank, topology.world_size)
    )


def _make_group(key: str, ranks: list[int], timeout: timedelta) -> dist.ProcessGroup:
    if ranks == list(range(dist.get_world_size())):
        world = dist.group.WORLD
        assert world is not None
        return world
    digest = hashlib.sha1(key.encode()).hexdigest()[:16]
    name = f"pmod:{digest}:{state.made[key]}"
    state.made[key] += 1
    store = own_connection(default_store())
    with lazy_gloo():
        group, _ = make_group(
            len(ranks),
            ranks.index(dist.get_rank()),
            ranks,
            dist.get_backend_config(),
            store,
            name,
            timeout=timeout,
            group_desc=f"pmod over ranks {ranks if len(ranks) <= 8 else f'{ranks[0]}..{ranks[-1]}'}",
        )
    note_ranks(group, ranks)
    return group


def adopt(key: str, ranks: list[int], group: dist.ProcessGroup, topology: Topology, seconds: float) -> None:
    """Use a group that somebody else made (a DeviceMesh's) for these ranks, unless its order differs or we have one."""
    if dist.get_process_group_ranks(group) == ranks:
        with _world._lock:
            connect.connect(topology, seconds)
            state.groups.setdefault(key, group)
