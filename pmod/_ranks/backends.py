"""The backends of torch.distributed that tensors go by: one record each.

`_wire/` fills them in, a file a backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
import torch

from pmod._errors import TopologyError, phrase

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _nothing(_: object) -> None:
    pass


@attrs.frozen
class Backend:
    """What decides how messages go by a backend.

    `name` is torch.distributed's, and `device_type` that of the tensors. `wire` makes
    the Wire of a message from the size of its axis, this rank's index there, the
    process group, this record and the message's `Wait`. Where a wait `blocks` this
    process, pmod waits in its stead, so that Ctrl-C and the deadline end it. Where
    messages have `tags`, those of unlike calls never meet; where they have none, calls
    are compared after the fact. `carries` lists the dtypes that travel as they are,
    others as bytes, and `sums` those that the backend adds up by itself; other sums are
    taken here, in rank order. Where it is `in_graphs`, compiled code sends by itself, by
    torch's functional collectives. `set_device` makes a device the current one, before
    anything is connected. `cut_off` closes the connections of a group, so that those
    who wait hear of a rank that has left.
    """

    name: str
    device_type: str
    wire: Callable[..., Any]
    blocks: bool
    tags: bool = False
    carries: frozenset[torch.dtype] = frozenset()
    sums: frozenset[torch.dtype] = frozenset()
    in_graphs: bool = False
    set_device: Callable[[torch.device], None] = _nothing
    cut_off: Callable[[ProcessGroup], None] = _nothing


_BACKENDS: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Let tensors go by a backend.

    The first one of a device type is what `Topology` chooses for it.
    """
    _BACKENDS[backend.name] = backend


def supported() -> list[str]:
    """Return the types of device from which tensors can travel."""
    return list(dict.fromkeys(backend.device_type for backend in _BACKENDS.values()))


def backend_for(device_type: str, function: str) -> Backend:
    """Return the backend that is chosen for tensors of this type of device."""
    first: dict[str, str] = {}
    for backend in _BACKENDS.values():
        if backend.device_type == device_type:
            return backend
        first.setdefault(backend.device_type, backend.name)
    listed = [f"{kind} (by {name})" for kind, name in first.items()]
    given = f"pmod has no backend for tensors on {device_type}"
    raise TopologyError(phrase(function, given, f"It has one for {', '.join(listed)}."))


def chosen_for(device: torch.device) -> str:
    """Return the backends of ranks with this device, as torch.distributed takes them.

    The CPU has one in any case.
    """
    mine, cpu = backend_for(device.type, "Topology"), backend_for("cpu", "Topology")
    if mine is cpu:
        return cpu.name
    return f"cpu:{cpu.name},{mine.device_type}:{mine.name}"


def backend_in(config: str, device_type: str) -> Backend:
    """Return the backend of a process group for tensors of this type of device.

    config: the group's, such as "cpu:gloo,cuda:nccl". One that pmod does not know
    (torch's fake one, MPI) is used as the one that it would choose.
    """
    for part in config.split(","):
        kind, _, name = part.rpartition(":")
        known = _BACKENDS.get(name)
        # A part without a type of device stands for all that its backend has.
        is_meant = kind in ("", device_type)
        if known is None or not is_meant:
            continue
        if known.device_type == device_type:
            return known
    return backend_for(device_type, "Mesh")


def use_device(device: torch.device) -> None:
    """Make it this process's current device, where its type has one.

    That is what plain "cuda" is, and what NCCL takes.
    """
    backend_for(device.type, "make_mesh").set_device(device)
