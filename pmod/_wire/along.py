"""The wire along an axis.

It goes over the process group that the axis's ranks have, by the backend that carries
the tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from pmod._mesh.axis import Axis
from pmod._ranks import world
from pmod._ranks.backends import Backend, backend_in, register
from pmod._wire.base import Alone, Wire
from pmod._wire.board import Said, code_of, come_back
from pmod._wire.fake import FAKE
from pmod._wire.functional import Functional
from pmod._wire.gloo import GLOO
from pmod._wire.nccl import NCCL
from pmod._wire.rolling import note, noting, stop_noting
from pmod._wire.waiting import Wait

for built_in in (GLOO, NCCL, FAKE):
    register(built_in)


def wire_of(
    axis: Axis, device: torch.device, row: str = "", said: Said | None = None
) -> Wire:
    """Return the wire along an axis, for a message of this row.

    device: where the tensors are. said: what all ranks must say of the message.
    """
    if axis.size == 1:
        return Alone(1, 0)
    return world.now.here.wire(axis, said or Said(row, code_of(row)), device)


def ready_wire(
    axis: Axis, device: torch.device
) -> tuple[Wire, Callable[[Said], None]] | None:
    """Return a wire for all messages to come, and what notes each of them.

    None where a wire is for one message: where it has a tag, or blocks this process.
    """
    backend = backend_along(axis, device)
    others_by = backend_along(axis, axis.topology.device)
    if backend.tags or backend.blocks or others_by.tags:
        return None
    wire = backend.wire(axis.size, axis.index, axis.group, backend, None)
    return wire, noting(axis)


def group_in_graphs(axis: Axis) -> str:
    """Return the name of the group by which compiled code sends along an axis.

    "" where pmod sends in its stead. What compiled code sends is not noted, so calls
    along the axis are compared no more.
    """
    if axis.size == 1 or not world.current().by_processes:
        return ""
    if not backend_along(axis, axis.topology.device).in_graphs:
        return ""
    stop_noting(axis)
    return axis.group.group_name


def functional_wire(axis: Axis, group: str) -> Wire:
    """Return the wire that writes messages into the graph of compiled code."""
    sums = backend_along(axis, axis.topology.device).sums
    return Functional(axis.size, axis.index, group, sums)


def backend_along(axis: Axis, device: torch.device) -> Backend:
    """Return the backend of an axis for tensors of this device."""
    known, key = world.now.processes.connection.backends, (axis.group_key, device)
    found = known.get(key)
    if found is None:
        config = dist.get_backend_config(axis.group)
        found = known[key] = backend_in(config, device.type)
    return found


def _over_group(axis: Axis, said: Said, device: torch.device) -> Wire:
    group, usual = axis.group, axis.topology.device
    backend = backend_along(axis, device)
    wait = Wait(axis, said, backend.cut_off)
    if world.is_left_behind(group):
        wait.refuse()
    come_back(axis.topology.rank)
    # Whatever this message goes by, the others along the axis go by the backend of the
    # mesh's device.
    others_by = backend if device == usual else backend_along(axis, usual)
    if not others_by.tags:
        note(axis, wait.number, said)
    return backend.wire(axis.size, axis.index, group, backend, wait)


world.processes().wire = _over_group
