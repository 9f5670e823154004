"""What the launcher told this process: one frozen value, and nothing is sent for it."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Mapping
from functools import lru_cache
from math import inf
from typing import Any

import attrs
import torch

from pmod._errors import TopologyError, phrase, quoted
from pmod._numbers import as_int
from pmod._ranks.backends import chosen_for, supported
from pmod._ranks.launchers import (
    PMI,
    as_assignments,
    choose_launcher,
    facts_of,
    names_of,
    port_of_proxy,
    refuse,
)

_log = logging.getLogger("pmod")

# torch numbers ranks in 32 bits.
MOST_RANKS = 2**31 - 1
# The launcher of ranks that are threads of one process.
THREADS = "simulate"
# The default of a field that `_fill` works out from the others.
_FILLED: Any = None


def _as_device(device: torch.device | str) -> torch.device:
    # torch raises any of these.
    try:
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        given = f"device is {quoted(device)}"
        right = "Pass a torch.device, or its name: 'cpu', 'cuda:0'."
        raise TopologyError(phrase("Topology", given, right)) from None


@attrs.frozen
class Topology:
    """Where this process stands among the processes of its job.

    Only `rank` and `world_size` are needed. By hand, all ranks are on one node unless
    `num_nodes` or `local_world_size` says otherwise, and ranks fill one node after the
    other; `backend` follows `device`. `master_addr` and `master_port` are where the
    ranks meet, None where the launcher does not say; `job` is what the launcher calls
    this job, so that the ranks of another that come to the same port by mistake stay
    strangers. `launcher` says which one it is, "single" by hand, and `restart_count`
    how often torchrun has restarted the ranks. Nothing here touches the network.

    Raises: TopologyError when the numbers contradict each other.

    >>> here = Topology(rank=5, world_size=8, num_nodes=2)
    >>> here.local_rank, here.local_world_size, here.node_rank
    (1, 4, 1)
    """

    rank: int
    world_size: int
    local_rank: int = _FILLED
    local_world_size: int = _FILLED
    node_rank: int = _FILLED
    num_nodes: int = _FILLED
    device: torch.device = attrs.field(
        default=torch.device("cpu"), converter=_as_device
    )
    backend: str = _FILLED
    launcher: str = "single"
    master_addr: str | None = None
    master_port: int | None = None
    restart_count: int = 0
    job: str = ""

    def __attrs_post_init__(self) -> None:
        _check(self, "world_size", 1, high=MOST_RANKS)
        _check(self, "rank", 0, "world_size")
        _check(self, "local_world_size", 1, "world_size", optional=True)
        _check(self, "num_nodes", 1, "world_size", optional=True)
        _fill(self)
        _check(self, "node_rank", 0, "num_nodes")
        _check(self, "master_port", 1, high=65535, optional=True)
        _check(self, "restart_count", 0)
        _check_texts(self)
        _check_nodes(self)

    @classmethod
    def detect(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        device_count: int | None = None,
    ) -> Topology:
        """Return what a launcher's variables say; one process where there are none.

        The launchers are torchrun, Open MPI, PMI (hydra, pmi2) and Slurm.
        A pure function of its arguments; None stands for `os.environ` and for the GPUs
        that torch sees: those of CUDA and ROCm, which torch both calls "cuda". Of
        another accelerator (XPU, MPS) a warning is logged, because pmod has no backend
        for it, and the ranks are on the CPU. PMOD_LAUNCHER (env, openmpi, pmi, slurm,
        single) decides when set. MASTER_ADDR and MASTER_PORT count under every
        launcher; under Open MPI, PMI and Slurm they are worked out where the variables
        allow it. hydra's do not name the job, so the port follows from the process that
        started the ranks of the node, if environ is None. Slurm's variables outside a
        step of srun give one process and a logged warning.

        Raises: TopologyError when a part of a launcher's variables is missing, is not a
        number, or contradicts another.

        >>> variables = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
        >>> here = Topology.detect(variables, device_count=2)
        >>> here.launcher, here.rank, here.device, here.backend
        ('env', 3, device(type='cuda', index=1), 'cpu:gloo,cuda:nccl')
        """
        told = os.environ if environ is None else environ
        if not isinstance(told, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise refuse(
                f"environ is {quoted(environ)}",
                "Pass a mapping of names to texts, such as os.environ.",
            )
        kind, visible = _visible(device_count)
        here = _told(told, visible, by_os=environ is None)
        device = "cpu"
        if visible:
            # Modulo, because a task that is bound to a GPU of its own sees that one
            # only, as number 0.
            device = f"{kind}:{here.local_rank % visible}"
        return attrs.evolve(here, device=device, backend=_FILLED)


def _visible(device_count: object) -> tuple[str, int]:
    """Return the type and the number of accelerators, for `detect`'s `device_count`."""
    if device_count is None:
        return _accelerators()
    count = as_int(device_count)
    if count is None or count < 0:
        given = f"device_count is {quoted(device_count)}"
        raise refuse(given, "Pass a number of GPUs, 0 or more.")
    return "cuda", count


def _accelerators() -> tuple[str, int]:
    """Return the type of torch's accelerators, and how many can send messages.

    It asks what torch was built for, and for torch's own count: neither starts the
    accelerator, which a fork could not undo.
    """
    built_for = torch.accelerator.current_accelerator()
    visible = 0 if built_for is None else torch.accelerator.device_count()
    if built_for is None or visible == 0:
        return "cpu", 0
    if built_for.type not in supported():
        _say_unused(built_for.type, visible)
        return "cpu", 0
    return built_for.type, visible


@lru_cache
def _say_unused(kind: str, visible: int) -> None:
    """Log a warning, once in a process."""
    _log.warning(
        "the ranks are on the CPU: torch sees %d %s device%s, "
        "and pmod has a backend for %s only.",
        visible,
        kind,
        "s" * (visible > 1),
        " and ".join(supported()),
    )


def _put(topology: Topology, name: str, value: object) -> None:
    object.__setattr__(topology, name, value)


def _check(
    topology: Topology,
    name: str,
    low: int,
    below: str = "",
    high: float = inf,
    optional: bool = False,
) -> None:
    """Check one number: it is from `low` to `high`, or to the field `below`.

    It may equal that field, unless `low` is 0. numpy's integers count, and become int.
    """
    value: object = getattr(topology, name)
    if value is None and optional:
        return
    limit = high
    if below:
        limit = getattr(topology, below) - 1 + low
    number = as_int(value)
    if number is not None and low <= number <= limit:
        _put(topology, name, number)
        return
    given = f"{name} is {quoted(value)}"
    if below:
        given += f", and {below} is {getattr(topology, below)}"
    span = f"{low} up" if limit == inf else f"{low} to {limit}"
    right = f"{name} is a whole number from {span}."
    raise TopologyError(phrase("Topology", given, right))


def _check_texts(topology: Topology) -> None:
    texts = {
        "backend": topology.backend,
        "launcher": topology.launcher,
        "master_addr": topology.master_addr,
        "job": topology.job,
    }
    # the only one that a launcher may leave open
    if topology.master_addr is None:
        del texts["master_addr"]
    for name, text in texts.items():
        if not isinstance(text, str):
            given = f"{name} is {quoted(text)}"
            raise TopologyError(phrase("Topology", given, f"{name} is a text."))


def _check_nodes(topology: Topology) -> None:
    """Raise where the ranks elsewhere do not make up the other nodes."""
    others = topology.num_nodes - 1
    elsewhere = topology.world_size - topology.local_world_size
    # Every other node has a rank or more, and without other nodes nobody is elsewhere.
    fits = others <= elsewhere and (others > 0 or elsewhere == 0)
    if not fits:
        raise TopologyError(
            phrase(
                "Topology",
                f"num_nodes is {topology.num_nodes}, "
                f"local_world_size is {topology.local_world_size}, "
                f"and world_size is {topology.world_size}",
                f"That leaves {elsewhere} ranks for {others} other nodes.",
            )
        )


def _fill(topology: Topology) -> None:
    """Work out the fields that were left out, each from those before it."""
    t, size = topology, topology.world_size
    _put_if_left_out(t, "local_world_size", -(-size // (t.num_nodes or 1)))
    _put_if_left_out(t, "num_nodes", -(-size // t.local_world_size))
    _put_if_left_out(t, "local_rank", t.rank % t.local_world_size)
    _check(t, "local_rank", 0, "local_world_size")
    _put_if_left_out(t, "node_rank", _node(t))
    # No backend is chosen where one is given, so that it may be one pmod does not know.
    if t.backend is _FILLED:
        _put(t, "backend", chosen_for(t.device))


def _put_if_left_out(topology: Topology, name: str, value: int) -> None:
    if getattr(topology, name) is _FILLED:
        _put(topology, name, value)


def is_thread(place: Topology) -> bool:
    """Return whether this is the place of a thread, of which a process has several."""
    return place.launcher == THREADS


def ranks_of_node(place: Topology) -> range:
    """Return the ranks of this node, whose processes can be looked at."""
    first = place.rank - place.local_rank
    return range(first, min(first + place.local_world_size, place.world_size))


def _node(t: Topology) -> int:
    """Return the node of this rank, if ranks fill one node after the other."""
    start = t.rank - t.local_rank
    is_even = t.local_world_size * t.num_nodes == t.world_size
    # No node starts there, so the ranks go round the nodes instead.
    if is_even and start % t.local_world_size:
        return t.rank % t.num_nodes
    # So the last node is right where nodes are uneven.
    if start + t.local_world_size >= t.world_size:
        return t.num_nodes - 1
    return max(0, start * t.num_nodes // t.world_size)


def _told(environ: Mapping[str, str], visible: int, *, by_os: bool) -> Topology:
    """Return the place that the variables tell, still on the CPU.

    by_os: whether they are those of this process, so that its parent may be asked.
    """
    launcher = choose_launcher(environ)
    if launcher is None:
        return Topology(rank=0, world_size=1)
    facts = facts_of(environ, launcher, visible)
    try:
        here = Topology(**facts)
    except TopologyError as error:
        shown = as_assignments(environ, names_of(launcher))
        raise TopologyError(f"{error}\nThe variables: {shown}.") from None
    # Every node has a proxy of its own, so over several nodes the ports would differ.
    has_proxy = launcher is PMI and here.num_nodes == 1
    if has_proxy and by_os and here.master_port is None:
        return attrs.evolve(here, master_port=port_of_proxy())
    return here


def warn_of_straddling(sizes: Mapping[str, int], place: Topology) -> None:
    """Warn of an axis that crosses nodes, although it would fit into one.

    The larger axes after it must fit in with it, because they have the better claim to
    a node. So on nodes of 4 ``data=2, model=4`` is as it should be, and
    ``model=4, data=2`` is not.
    """
    node = place.local_world_size
    lengths = list(sizes.values())
    # The stride of the axis at hand: the product of the sizes after it.
    stride = 1
    for number, name in reversed(list(enumerate(sizes))):
        size = lengths[number]
        later = [other for other in lengths[number + 1 :] if size <= other <= node]
        would_fit = size > 1 and size * math.prod(later) <= node
        if would_fit and node % (size * stride) != 0:
            # the line of the user's who called make_mesh
            warnings.warn(
                phrase(
                    "make_mesh",
                    f"axis {name!r} (size {size}) straddles nodes of {node} ranks, "
                    "though it would fit into one",
                    f"Name it last, with a size that divides {node}, "
                    "or order the ranks with ranks=.",
                ),
                stacklevel=3,
            )
        stride *= size
