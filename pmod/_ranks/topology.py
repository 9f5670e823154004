"""What the launcher told this process: one frozen value, worked out from variables
alone, nothing sent.
"""

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
    Launcher,
    as_assignments,
    choose_launcher,
    facts_of,
    names_of,
    port_of_proxy,
    refuse,
)

_log = logging.getLogger("pmod")

MOST_RANKS = 2**31 - 1  # torch numbers ranks in 32 bits
THREADS = "simulate"  # the launcher of ranks that are threads of one process
_FILLED: Any = None  # the default of a field that _fill works out from the others


def _as_device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError):  # torch raises any of them
        right = "Pass a torch.device, or its name: 'cpu', 'cuda:0'."
        raise TopologyError(
            phrase("Topology", f"device is {quoted(device)}", right)
        ) from None


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
        for name, optional in (
            ("backend", False),
            ("launcher", False),
            ("master_addr", True),
            ("job", False),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) and not (value is None and optional):
                raise TopologyError(
                    phrase(
                        "Topology", f"{name} is {quoted(value)}", f"{name} is a text."
                    )
                )
        others, elsewhere = self.num_nodes - 1, self.world_size - self.local_world_size
        if others > elsewhere or (elsewhere and not others):
            sizes = f"local_world_size is {self.local_world_size}, and world_size is {self.world_size}"
            given = f"num_nodes is {self.num_nodes}, {sizes}"
            raise TopologyError(
                phrase(
                    "Topology",
                    given,
                    f"That leaves {elsewhere} ranks for {others} other nodes.",
                )
            )

    @classmethod
    def detect(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        device_count: int | None = None,
    ) -> Topology:
        """What the variables of torchrun, Open MPI, PMI (hydra, pmi2) or Slurm say;
        else one process.

        A pure function of its arguments; None stands for `os.environ` and for the GPUs
        that torch sees: those of CUDA and ROCm, which torch both calls "cuda". Of
        another accelerator (XPU, MPS) a warning is logged, because pmod has no backend
        for it, and the ranks are on the CPU. PMOD_LAUNCHER (env, openmpi, pmi, slurm,
        single) decides when set. MASTER_ADDR and MASTER_PORT count under every
        launcher; under Open MPI, PMI and Slurm they are worked out where the variables
        allow it. hydra's name no job: given None, the port follows from the process
        that started the ranks of the node. Slurm's variables outside a step of srun
        give one process and a logged warning.

        Raises: TopologyError when a part of a launcher's variables is missing, is no
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
        count = 0 if device_count is None else as_int(device_count)
        if count is None or count < 0:
            raise refuse(
                f"device_count is {quoted(device_count)}",
                "Pass a number of GPUs, 0 or more.",
            )
        kind, visible = _accelerators() if device_count is None else ("cuda", count)
        launcher = choose_launcher(told)
        here = (
            cls(rank=0, world_size=1)
            if launcher is None
            else _told(told, launcher, visible)
        )
        if (
            environ is None
            and launcher is PMI
            and here.master_port is None
            and here.num_nodes == 1
        ):
            here = attrs.evolve(here, master_port=port_of_proxy())
        # modulo, because a task that is bound to a GPU of its own sees that one only,
        # as number 0
        device = f"{kind}:{here.local_rank % visible}" if visible else "cpu"
        return attrs.evolve(here, device=device, backend=_FILLED)


def _accelerators() -> tuple[str, int]:
    """The type of the accelerators that torch sees, and how many of them messages can
    go from.

    What torch was built for, and a count of its own: neither starts the accelerator,
    which a fork could not undo.
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
    """Say it once in a process."""
    _log.warning(
        "the ranks are on the CPU: torch sees %d %s device%s, and pmod has a backend for %s only.",
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
    """One number: from `low` to `high`, or to the field `below` (and not equal to it,
    where `low` is 0).
    """
    value: Any = getattr(topology, name)
    number = as_int(value)  # numpy's integers count, and become int
    if number is None:
        if value is None and optional:
            return
        number = low - 1
    limit = getattr(topology, below) if below else None
    high = high if limit is None else limit - 1 + low
    if not low <= number <= high:
        given = f"{name} is {quoted(value)}" + (
            f", and {below} is {limit}" if below else ""
        )
        span = f"{low} up" if high == inf else f"{low} to {high}"
        raise TopologyError(
            phrase("Topology", given, f"{name} is a whole number from {span}.")
        )
    _put(topology, name, number)


def _fill(topology: Topology) -> None:
    """Work out the fields that were left out."""
    t, size = topology, topology.world_size
    if t.local_world_size is _FILLED:
        _put(t, "local_world_size", -(-size // (t.num_nodes or 1)))
    if t.num_nodes is _FILLED:
        _put(t, "num_nodes", -(-size // t.local_world_size))
    if t.local_rank is _FILLED:
        _put(t, "local_rank", t.rank % t.local_world_size)
    _check(t, "local_rank", 0, "local_world_size")
    if t.node_rank is _FILLED:
        _put(t, "node_rank", _node(t))
    if t.backend is _FILLED:
        _put(t, "backend", chosen_for(t.device))


def is_thread(place: Topology) -> bool:
    """Whether this is the place of a thread, of which a process has several."""
    return place.launcher == THREADS


def ranks_of_node(place: Topology) -> range:
    """The ranks of this node, whose processes can be looked at."""
    first = place.rank - place.local_rank
    return range(first, min(first + place.local_world_size, place.world_size))


def _node(t: Topology) -> int:
    """The node of this rank, if ranks fill one node after the other."""
    start = t.rank - t.local_rank
    if t.local_world_size * t.num_nodes == t.world_size and start % t.local_world_size:
        return (
            t.rank % t.num_nodes
        )  # no node starts there: the ranks go round the nodes instead
    if start + t.local_world_size >= t.world_size:
        return t.num_nodes - 1  # so the last node is right where nodes are uneven
    return max(0, start * t.num_nodes // t.world_size)


def _told(environ: Mapping[str, str], launcher: Launcher, visible: int) -> Topology:
    facts = facts_of(environ, launcher, visible)
    try:
        return Topology(**facts)
    except TopologyError as error:
        raise TopologyError(
            f"{error}\nThe variables: {as_assignments(environ, names_of(launcher))}."
        ) from None


def warn_of_straddling(sizes: Mapping[str, int], place: Topology) -> None:
    """Name an axis that crosses nodes although it and the larger axes after it would
    fit into one.

    Larger axes have the better claim to a node, so ``data=2, model=4`` on nodes of 4 is
    as it should be, and ``model=4, data=2`` is not.
    """
    node = place.local_world_size
    if place.num_nodes == 1:
        return
    names, lengths = list(sizes), list(sizes.values())
    inner = 1  # the stride of the axis at hand
    for number in reversed(range(len(names))):
        size = lengths[number]
        later = math.prod(
            other for other in lengths[number + 1 :] if size <= other <= node
        )
        if size > 1 and size * later <= node and node % (size * inner) != 0:
            name = names[number]
            warnings.warn(
                phrase(
                    "make_mesh",
                    f"axis {name!r} (size {size}) straddles nodes of {node} ranks, though it would fit into one",
                    f"Name it last, with a size that divides {node}, or order the ranks with ranks=.",
                ),
                stacklevel=3,
            )
        inner *= size
