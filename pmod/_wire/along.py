"""The wire along an axis: over the process group that its ranks have, by the backend that carries the tensors."""

from __future__ import annotations

import torch
import torch.distributed as dist

from pmod._mesh.axis import Axis
from pmod._ranks import world
from pmod._ranks.backends import Backend, backend_in, register
from pmod._wire.base import Alone, Wire
from pmod._wire.board import Said, code_of, come_back
from pmod._wire.gloo import GLOO
from pmod._wire.nccl import NCCL
from pmod._wire.rolling import note
from pmod._wire.waiting import Wait

for built_in in (GLOO, NCCL):
    register(built_in)


def wire_of(axis: Axis, device: torch.device, row: str = "", said: Said | None = None) -> Wire:
    """The wire along an axis, for a message of this row in tensors of this device.

    said: what all ranks must say of the message.
    """
    if axis.size == 1:
        return Alone(1, 0)
    return world.current().wire(axis, said or Said(row, code_of(row)), device)


def backend_along(axis: Axis, device_type: str) -> Backend:
    """The backend of an axis for tensors of this type of device."""
    known, key = world.processes().connection.backends, (axis.group_key, device_type)
    found = known.get(key)
    if found is None:
        found = known[key] = backend_in(dist.get_backend_config(axis.group), device_type)
    return found


def _over_group(axis: Axis, said: Said, device: torch.device) -> Wire:
    group, place = axis.group, axis.topology.device.type
    backend = usual = backend_along(axis, place)
    if device.type != place:
        backend = backend_along(axis, device.type)
    wait = Wait(axis, said, backend.cut_off)
    if world.is_left_behind(group):
        wait.refuse()
    come_back(axis.topology.rank)
    if not usual.tags:
        note(axis, wait.number, said)
    return backend.wire(axis.size, axis.index, group, backend, wait)


world.processes().carry = _over_group
