"""The place of a process that is not a rank itself but works for one: a DataLoader's
worker, for example.

A rank writes its place down in what multiprocessing hands on to every child: by fork,
by spawn, by a forkserver however old it is, and from child to grandchild. No
environment variable could do that: a forkserver keeps its own, and a new program that a
rank starts is no worker of it. A mesh that travels to such a child brings the place as
well, because it is loaded before multiprocessing has set the child up.
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
"""The process id of a rank and the fields of its Topology: plain values, so that a
child need not import pmod.
"""

_KEY = "pmod rank"


def _config() -> dict[str, Any]:
    """What multiprocessing copies to the children of a process; private:
    tests/run/test_launch.py tells if it moves.
    """
    private: Any = current_process()
    return private._config


def _as_place(topology: Topology) -> Place:
    fields = {
        field.name: getattr(topology, field.name) for field in attrs.fields(Topology)
    }
    return os.getpid(), {**fields, "device": str(topology.device)}


def record(topology: Topology | None) -> None:
    """This process is this rank, and what it starts will work for it; None: it is a
    rank no longer.
    """
    if topology is None or topology.world_size == 1:
        _config().pop(_KEY, None)
    else:
        _config()[_KEY] = _as_place(topology)


def of_parent(brought: Place | None) -> Topology | None:
    """The place of the rank that started this process, or that a mesh has brought here;
    None in that rank.
    """
    place: Place | None = _config().get(_KEY, brought)
    return None if place is None or place[0] == os.getpid() else Topology(**place[1])


def is_being_set_up() -> bool:
    """Whether multiprocessing sets this process up, and imports the script meanwhile."""
    return getattr(current_process(), "_inheriting", False)


def for_child(topology: Topology) -> Place | None:
    """What a mesh brings along: this place, if it is being sent to a child that is
    about to start.
    """
    return (
        None
        if get_spawning_popen() is None or topology.world_size == 1
        else _as_place(topology)
    )


def refusal(parent: Topology) -> TopologyError:
    """The error of a collective in such a process, whose messages would mix with those
    of its rank.
    """
    given = f"this process works for rank {parent.rank} of {parent.world_size} (as a DataLoader's worker does) "
    right = "A worker may ask for coords, axis_index and local_slice; call collectives in the process of the rank."
    return TopologyError(
        phrase(call_site()[0] or "make_mesh", f"{given}and is not a rank itself", right)
    )
