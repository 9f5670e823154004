"""The one cache of process groups.

A group is made on first use by its own members and nobody else, so ranks may first use
their axes in any order. torch's public ``new_group`` cannot do that: it needs every
rank of the world, and with ``use_local_synchronization`` it derives the group's name
from how many groups this process knows, so that ranks with different histories wait for
each other under different names. We name groups by their ranks and a counter per rank
set, through the private helper of ``new_group`` (tests/ranks/test_groups.py tells when
it moves).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from pmod._errors import PmodError, phrase
from pmod._ranks import connect, world
from pmod._ranks.connect import lazy_gloo, own_connection
from pmod._ranks.topology import Topology
from pmod._ranks.world import Connection
from pmod._torch import default_store, make_group, note_ranks


def group_of(
    key: str, ranks: Callable[[], list[int]], topology: Topology, seconds: float
) -> dist.ProcessGroup:
    """Return the process group over `ranks()` in this order.

    `key` names the same ranks in the same order.
    """
    ours = world.now.here
    if not ours.by_processes:
        raise PmodError(
            phrase(
                "Mesh.group",
                "a simulated rank has no process group",
                "Use pmod's own functions.",
            )
        )
    processes = ours.processes
    connection = processes.connection
    found = connection.groups.get(key)
    if found is not None and _is_current(connection, topology):
        return found
    with processes.lock:
        connect.connect(topology, seconds)
        # It may have joined another world than the one before.
        connection = processes.connection
        found = connection.groups.get(key)
        if found is None:
            timeout = timedelta(seconds=seconds)
            found = connection.groups[key] = _make_group(key, ranks(), timeout)
            if found is not dist.group.WORLD:
                connection.made_here.add(key)
        return found


def _is_current(connection: Connection, topology: Topology) -> bool:
    """Return whether the connection is of torch's world, at this topology's place."""
    # The user may have ended the world that the groups were made in.
    if connection.world is not dist.group.WORLD:
        return False
    known = connection.topology
    if known is topology:
        return True
    if known is None:
        return False
    return (known.rank, known.world_size) == (topology.rank, topology.world_size)


def _make_group(key: str, ranks: list[int], timeout: timedelta) -> dist.ProcessGroup:
    if ranks == list(range(dist.get_world_size())):
        everyone = dist.group.WORLD
        assert everyone is not None
        return everyone
    # The same ranks may come again once their group has ended, and a name may not come
    # twice in one store.
    made = world.processes().connection.made
    digest = hashlib.sha1(key.encode()).hexdigest()[:16]
    name = f"pmod:{digest}:{made[key]}"
    made[key] += 1
    shown = str(ranks) if len(ranks) <= 8 else f"{ranks[0]}..{ranks[-1]}"
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
            group_desc=f"pmod over ranks {shown}",
        )
    note_ranks(group, ranks)
    return group


def adopt(
    key: str,
    ranks: list[int],
    group: dist.ProcessGroup,
    topology: Topology,
    seconds: float,
) -> None:
    """Use a group that somebody else made (a DeviceMesh's) for these ranks.

    It is left alone where its order differs, or there is one already.
    """
    if dist.get_process_group_ranks(group) != ranks:
        return
    processes = world.processes()
    with processes.lock:
        connect.connect(topology, seconds)
        processes.connection.groups.setdefault(key, group)
