"""The place of a process that is not a rank itself but works for one: a DataLoader's worker, for example.

A rank writes its place down in what multiprocessing hands on to every child: by fork, by spawn, by a forkserver however
old it is, and from child to grandchild. No environment variable could do that: a forkserver keeps its own, and a new
program that a rank starts is no worker of it. A mesh that travels to such a child brings the place as well, because it
is loaded before multiprocessing has set the child up.
"""

from __future__ import annotations

import os
from multiprocessing import current_process
from multiprocessing.context import get_spawning_popen
from typing import Any, TypeAlias

import attrs
import torch.distributed as dist

from pmod._errors import TopologyError, phrase
from pmod._ranks.topology import Topology
from pmod._site import call_site

Place: TypeAlias = tuple[int, dict[str, Any]]
"""The process id of a rank and the fields of its Topology: plain values, so that a child need not import pmod."""

_KEY = "pmod rank"
_brought: Place | None = None  # by a mesh
_inherited_world: Any = None  # torch's default group, if this process was forked while it had one


def _config() -> dict[str, Any]:
    """What multiprocessing copies to the children of a process; private: tests/run/test_launch.py tells if it moves."""
    private: Any = current_process()
    return private._config


def _as_place(topology: Topology) -> Place:
    fields = {field.name: getattr(topology, field.name) for field in attrs.fields(Topology)}
    return os.getpid(), {**fields, "device": str(topology.device)}


def record(topology: Topology | None) -> None:
    """This process is this rank, and what it starts will work for it; None: it is a rank no longer."""
    if topology is None or topology.world_size == 1:
        _config().pop(_KEY, None)
    else:
        _config()[_KEY] = _as_place(topology)


def forked(world: Any) -> None:
    """This process was forked while `world` was torch's default group: its connections are the parent's."""
    global _inherited_world
    _inherited_world = world


def of_parent() -> Topology | None:
    """The place of the rank that this process works for; None in a rank, and where no rank started it."""
    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if world is not None and world is not _inherited_world:
        return None  # it has connected for itself
    place: Place | None = _config().get(_KEY, _brought)
    return None if place is None or place[0] == os.getpid() else Topology(**place[1])


def is_no_rank() -> bool:
    """Whether this process works for a rank, or is being set up by multiprocessing, which imports the script."""
    return getattr(current_process(), "_inheriting", False) or of_parent() is not None


def for_child(topology: Topology) -> Place | None:
    """What a mesh brings along: this place, if it is being sent to a child that is about to start."""
    return None if get_spawning_popen() is None or topology.world_size == 1 else _as_place(topology)


def bring(place: Place) -> None:
    """A mesh that was sent to this process, before it was set up, came from there."""
    global _brought
    _brought = place


def refusal(parent: Topology) -> TopologyError:
    """The error of a collective in such a process, whose messages would mix with those of its rank."""
    given = f"this process works for rank {parent.rank} of {parent.world_size} (as a DataLoader's worker does) "
    right = "A worker may ask for coords, axis_index and local_slice; call collectives in the process of the rank."
    return TopologyError(phrase(call_site()[0] or "make_mesh", f"{given}and is not a rank itself", right))
