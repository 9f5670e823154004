"""The place of a process that works for a rank: a DataLoader's worker, for example.

A rank writes its place down in what multiprocessing hands on to every child: by fork,
by spawn, by a forkserver however old it is, and from child to grandchild. No
environment variable could do that: a forkserver keeps its own, and a new program that a
rank starts is not a worker of it. A mesh that travels to such a child brings the place
as well, because it is loaded before multiprocessing has set the child up.
"""

from __future__ import annotations

import os
from multiprocessing import current_process
from multiprocessing.context import get_spawning_popen
from typing import Any, TypeAlias

import attrs

from pmod._errors import TopologyError, phrase
from pmod._ranks.topology import Topology
from pmod._site import call_site

Place: TypeAlias = tuple[int, dict[str, Any]]
"""The process id of a rank and the fields of its Topology.

They are plain values, so that a child need not import pmod.
"""

_KEY = "pmod rank"


def _config() -> dict[str, Place]:
    """Return what multiprocessing copies to the children of a process.

    It is private, and tests/run/test_launch.py tells if it moves.
    """
    return vars(current_process())["_config"]


def _as_place(topology: Topology) -> Place:
    names = [field.name for field in attrs.fields(Topology)]
    fields = {name: getattr(topology, name) for name in names}
    return os.getpid(), {**fields, "device": str(topology.device)}


def record(topology: Topology | None) -> None:
    """Note that this process is this rank, for which what it starts will work.

    None: it is a rank no longer.
    """
    if topology is None or topology.world_size == 1:
        _config().pop(_KEY, None)
    else:
        _config()[_KEY] = _as_place(topology)


def of_parent(brought: Place | None) -> Topology | None:
    """Return the place of the rank that started this process; None in that rank.

    brought: the place that a mesh has brought here.
    """
    place = _config().get(_KEY, brought)
    if place is None or place[0] == os.getpid():
        return None
    return Topology(**place[1])


def is_being_set_up() -> bool:
    """Return whether multiprocessing still imports the script into this process."""
    return getattr(current_process(), "_inheriting", False)


def for_child(topology: Topology) -> Place | None:
    """Return what a mesh brings along: this place, if a child is about to start."""
    if get_spawning_popen() is None or topology.world_size == 1:
        return None
    return _as_place(topology)


def refusal(parent: Topology) -> TopologyError:
    """Return the error of a collective in such a process.

    Its messages would mix with those of its rank.
    """
    given = (
        f"this process works for rank {parent.rank} of {parent.world_size} "
        "(as a DataLoader's worker does) and is not a rank itself"
    )
    right = (
        "A worker may ask for coords, axis_index and local_slice; "
        "call collectives in the process of the rank."
    )
    return TopologyError(phrase(call_site()[0] or "make_mesh", given, right))
