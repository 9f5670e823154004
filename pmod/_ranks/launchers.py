"""What launchers say in environment variables: a row for each, and how it is read."""

from __future__ import annotations

import logging
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import attrs

from pmod._errors import TopologyError, near_miss, phrase, quoted

_log = logging.getLogger("pmod")


@attrs.frozen
class Launcher:
    """The variables of one launcher.

    `needs` are the rank, the size, and what else must be there. One of `marks` selects
    the launcher; where none is found, one of `traces` does. `job` lists what is the
    same on every rank and differs between jobs.
    """

    name: str
    start: str
    needs: tuple[str, ...]
    places: Mapping[str, tuple[str, ...]]
    marks: tuple[str, ...]
    traces: tuple[str, ...] = ()
    job: tuple[tuple[str, ...], ...] = ()


_STEP = (("SLURM_JOB_ID", "SLURM_STEP_ID"), ("SLURM_JOBID", "SLURM_STEP_ID"))
_ENV = Launcher(
    name="env",
    start="torchrun",
    needs=("RANK", "WORLD_SIZE"),
    places={
        "local_rank": ("LOCAL_RANK",),
        "local_world_size": ("LOCAL_WORLD_SIZE",),
        "node_rank": ("GROUP_RANK",),
        "num_nodes": ("GROUP_WORLD_SIZE",),
    },
    marks=("RANK", "GROUP_RANK", "TORCHELASTIC_RESTART_COUNT"),
    # scripts for srun export the first two on their own
    traces=(
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "GROUP_WORLD_SIZE",
        "TORCHELASTIC_RUN_ID",
    ),
    job=(("TORCHELASTIC_RUN_ID",),),
)
_OPENMPI = Launcher(
    name="openmpi",
    start="mpirun",
    needs=("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    # Not OMPI_COMM_WORLD_NODE_RANK, which is a local rank, counted over all jobs of the
    # node.
    places={
        "local_rank": ("OMPI_COMM_WORLD_LOCAL_RANK",),
        "local_world_size": ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        "num_nodes": ("OMPI_MCA_orte_num_nodes",),
    },
    marks=(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "OMPI_UNIVERSE_SIZE",
    ),
    job=(
        ("PMIX_NAMESPACE",),
        ("OMPI_MCA_ess_base_jobid",),
        ("OMPI_MCA_orte_ess_jobid",),
    ),
)
PMI = Launcher(
    name="pmi",
    start="mpiexec",
    needs=("PMI_RANK", "PMI_SIZE"),
    places={
        "local_rank": ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
        "local_world_size": ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    },
    marks=("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    job=(("PMI_JOBID",), ("PALS_APID",), *_STEP),
)
_SLURM = Launcher(
    name="slurm",
    start="srun",
    needs=("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID"),
    places={
        "local_rank": ("SLURM_LOCALID",),
        "node_rank": ("SLURM_NODEID",),
        "num_nodes": ("SLURM_STEP_NUM_NODES",),
    },
    marks=("SLURM_STEP_ID",),
    job=_STEP,
)
# In the order in which they are tried.
_LAUNCHERS = {row.name: row for row in (_ENV, _OPENMPI, PMI, _SLURM)}


def names_of(launcher: Launcher) -> list[str]:
    """Return the variables that a message about this launcher shows, if set."""
    names = (
        *launcher.needs,
        *chain.from_iterable(launcher.places.values()),
        *launcher.marks,
        *launcher.traces,
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    return list(dict.fromkeys(names))


def as_assignments(environ: Mapping[str, str], names: Sequence[str]) -> str:
    return ", ".join(_assignments(environ, names))


def _assignments(environ: Mapping[str, str], names: Sequence[str]) -> list[str]:
    return [f"{name}={environ[name]!r}" for name in names if name in environ]


def shown_variables(environ: Mapping[str, str]) -> str:
    """Return the variables of all launchers that are set, with their values.

    It is all that a report may show of an environment.
    """
    names = ["PMOD_LAUNCHER"]
    for row in _LAUNCHERS.values():
        names += names_of(row)
        names += chain.from_iterable(row.job)
    return as_assignments(environ, list(dict.fromkeys(names)))


def refuse(given: str, right: str) -> TopologyError:
    return TopologyError(phrase("Topology.detect", given, right))


def _text(environ: Mapping[str, str], *names: str) -> str | None:
    """Return the value of the first of these variables that is set."""
    name = _first_set(environ, names)
    if name is None:
        return None
    text = environ[name]
    if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        given = f"{name} is {quoted(text)}"
        raise refuse(given, "Variables are texts, as in os.environ.")
    if not text.strip():
        raise refuse(f"{name} is empty", f"Give {name} a value, or unset it.")
    return text


def _number(environ: Mapping[str, str], *names: str) -> int | None:
    text = _text(environ, *names)
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,18}", text):
        name = _first_set(environ, names)
        raise refuse(f"{name} is {text!r}", f"{name} is a whole number, 0 or more.")
    return int(text)


def _first_set(environ: Mapping[str, str], names: Sequence[str]) -> str | None:
    for name in names:
        if name in environ:
            return name
    return None


def choose_launcher(environ: Mapping[str, str]) -> Launcher | None:
    """Return the launcher that started this process; None where it is one alone."""
    forced = environ.get("PMOD_LAUNCHER")
    if forced:
        return _forced(forced)
    for row in _LAUNCHERS.values():
        # Every process of a Slurm job may have the marks, not only the tasks of srun.
        if _has_any(environ, row.marks) and (row is not _SLURM or _in_step(environ)):
            return row
    # A launcher of which only traces are there is chosen as well, so that its rank is
    # found missing.
    for row in _LAUNCHERS.values():
        if _has_any(environ, row.traces):
            return row
    # Without a step only a batch script has SLURM_PROCID, and there it is 0.
    if environ.get("SLURM_PROCID", "0") != "0" and "SLURM_STEP_ID" not in environ:
        raise _incomplete(environ, _SLURM, ["SLURM_STEP_ID"])
    _warn_alone(environ)
    return None


def _forced(name: str) -> Launcher | None:
    known = (*_LAUNCHERS, "single")
    if name not in known:
        choices = f"{', '.join(known)}{near_miss(name, known)}"
        raise refuse(f"PMOD_LAUNCHER is {name!r}", f"It is one of {choices}")
    return _LAUNCHERS.get(name)


def _has_any(environ: Mapping[str, str], names: Sequence[str]) -> bool:
    return _first_set(environ, names) is not None


# From here on up Slurm numbers what srun did not start: salloc's interactive shell, a
# batch script.
_NO_STEP = 0xFFFFFFF0


def _in_step(environ: Mapping[str, str]) -> bool:
    """Return whether srun started this process, as a task of a step."""
    step = _number(environ, "SLURM_STEP_ID")
    if step is None or step >= _NO_STEP:
        return False
    tasks = environ.get("SLURM_STEP_NUM_TASKS")
    if tasks is None or environ.get("SLURM_PROCID") != "0":
        return True
    # sbatch typed inside a step hands that step's variables on; SLURM_NPROCS alone is
    # then the new job's
    return environ.get("SLURM_NPROCS", tasks) == tasks


_OF_ALLOCATION = (
    "SLURM_JOB_ID",
    "SLURM_JOBID",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_TASKS_PER_NODE",
)


def _warn_alone(environ: Mapping[str, str]) -> None:
    """Warn where one process is perhaps not what was meant."""
    allocation = as_assignments(environ, _OF_ALLOCATION)
    tasks = environ.get("SLURM_NTASKS", environ.get("SLURM_TASKS_PER_NODE"))
    if allocation and tasks != "1":
        _log.warning(
            "one process, because srun did not start it, though %s. "
            "To use the whole allocation: srun python script.py. "
            "PMOD_LAUNCHER=single silences this.",
            allocation,
        )
        return
    meeting_place = as_assignments(environ, ("MASTER_ADDR", "MASTER_PORT"))
    if meeting_place:
        _log.warning(
            "one process, because neither RANK nor WORLD_SIZE is set, though %s.",
            meeting_place,
        )


def _incomplete(
    environ: Mapping[str, str], launcher: Launcher, missing: Sequence[str]
) -> TopologyError:
    found = _assignments(environ, ["PMOD_LAUNCHER", *names_of(launcher)])
    return refuse(
        f"the launcher's environment is incomplete: {', '.join(missing)} "
        f"{_are(missing)} not set, although {', '.join(found)} {_are(found)}",
        f"Start with {launcher.start}, or set what is missing; "
        "PMOD_LAUNCHER=single makes this one process of its own.",
    )


def _are(things: Sequence[str]) -> str:
    return "is" if len(things) == 1 else "are"


def facts_of(
    environ: Mapping[str, str], launcher: Launcher, visible: int
) -> dict[str, Any]:
    """Return the arguments of Topology, as far as the launcher's variables give them.

    visible: how many GPUs this process sees.
    """
    rank, size = _rank_and_size(environ, launcher)
    places = _places(environ, launcher, rank, size)
    port = _number(environ, "MASTER_PORT")
    address = _text(environ, "MASTER_ADDR")
    job = _job(environ, launcher)
    names_job = launcher is not _ENV and job != ""
    if port is None and names_job:
        port = _port_of(job)
    if address is None:
        address = _address(environ, launcher, places, size)
    facts = {
        "rank": rank,
        "world_size": size,
        "launcher": launcher.name,
        **places,
        "master_addr": address,
        "job": job,
        "master_port": port,
    }
    if launcher is _ENV:
        facts["restart_count"] = _number(environ, "TORCHELASTIC_RESTART_COUNT") or 0
    sharing = places["local_world_size"], places["num_nodes"]
    if sharing == (None, None) and (places["local_rank"] or 0) < visible > 1:
        # Nothing says how many share this node, so it is as many as it has GPUs, where
        # that comes out even.
        facts["local_world_size"] = size if size % visible else visible
    return facts


def _rank_and_size(environ: Mapping[str, str], launcher: Launcher) -> tuple[int, int]:
    rank, size = [_number(environ, name) for name in launcher.needs[:2]]
    needs = list(launcher.needs)
    # One process meets nobody, and other launchers tell the place in other ways.
    if launcher is _ENV and size != 1:
        needs += ["MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in needs if name not in environ]
    if missing:
        raise _incomplete(environ, launcher, missing)
    assert rank is not None and size is not None
    told = environ.get("WORLD_SIZE", str(size))
    is_chosen = launcher is _ENV or bool(environ.get("PMOD_LAUNCHER"))
    if told != str(size) and not is_chosen:
        raise refuse(
            f"WORLD_SIZE is {told!r}, but {launcher.needs[1]} is {size}",
            f"Unset WORLD_SIZE, or set PMOD_LAUNCHER={launcher.name} "
            f"to go by {launcher.start}.",
        )
    return rank, size


def _places(
    environ: Mapping[str, str], launcher: Launcher, rank: int, size: int
) -> dict[str, int | None]:
    """Return local_rank, local_world_size, node_rank and num_nodes.

    They are None where the launcher does not say.
    """
    names: dict[str, tuple[str, ...]] = {
        "local_rank": (),
        "local_world_size": (),
        "node_rank": (),
        "num_nodes": (),
        **launcher.places,
    }
    is_task = launcher is _SLURM
    if launcher is PMI and _in_step(environ):
        # Under pmi2 the ranks are the tasks of the step. hydra's step has a proxy a
        # node, and only its nodes are ours.
        task = _number(environ, "SLURM_PROCID")
        tasks = _number(environ, "SLURM_STEP_NUM_TASKS")
        is_task = (task, tasks) == (rank, size)
        names["node_rank"] = _SLURM.places["node_rank"]
        names["num_nodes"] = _SLURM.places["num_nodes"]
        if is_task:
            names["local_rank"] += _SLURM.places["local_rank"]
    places = {field: _number(environ, *ours) for field, ours in names.items()}
    if is_task and places["local_world_size"] is None:
        places["local_world_size"] = _tasks_of_node(environ, places["node_rank"], size)
    if launcher in (_OPENMPI, PMI) and places["local_world_size"] == size:
        # The allocation may have more nodes than this job uses.
        places["node_rank"], places["num_nodes"] = 0, 1
    return places


def _tasks_of_node(
    environ: Mapping[str, str], node: int | None, size: int
) -> int | None:
    """Return how many tasks of the step share a node."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    text = _text(environ, name)
    if text is None or node is None:
        return None
    runs = _runs_in(text)
    if runs is None or sum(count * times for count, times in runs) != size:
        raise refuse(
            f"{name} is {text!r}",
            f"It shares SLURM_STEP_NUM_TASKS={size} tasks out among the nodes.",
        )
    for count, times in runs:
        if node < times:
            return count
        node -= times
    raise refuse(
        f"{name} is {text!r}, and SLURM_NODEID is {environ['SLURM_NODEID']!r}",
        "It has a part a node.",
    )


def _runs_in(text: str) -> list[tuple[int, int]] | None:
    """Return Slurm's '3,1' or '2(x3),1' as counts and how often each comes."""
    runs: list[tuple[int, int]] = []
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", part)
        if found is None:
            return None
        runs.append((int(found[1]), int(found[2] or 1)))
    return runs


def _address(
    environ: Mapping[str, str],
    launcher: Launcher,
    places: Mapping[str, int | None],
    size: int,
) -> str | None:
    """Return where rank 0 is, as far as the variables tell.

    None leaves it to connecting to ask for MASTER_ADDR.
    """
    if launcher is _ENV:
        return None
    if size in (1, places["local_world_size"]):
        return "127.0.0.1"
    started_on: str | None = None
    lists: tuple[str, ...] = ()
    if launcher is _OPENMPI:
        started_on, lists = _host_of_mpirun(environ), ("SLURM_JOB_NODELIST",)
    elif "SLURM_STEP_ID" in environ:
        started_on = environ.get("SLURM_LAUNCH_NODE_IPADDR")
        lists = ("SLURM_STEP_NODELIST", "SLURM_NODELIST")
    # All "nodes" are then this machine.
    if started_on and started_on.startswith("127."):
        return "127.0.0.1"
    # With a host file rank 0 can be anywhere.
    if environ.get("SLURM_DISTRIBUTION") == "arbitrary":
        return None
    # The list first: rank 0 is on its first host, while mpirun or srun is often typed
    # on a login node.
    return _first_host(environ, *lists) or started_on


def _host_of_mpirun(environ: Mapping[str, str]) -> str | None:
    """Return the host that mpirun runs on, as Open MPI 4 or 5 writes it."""
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    found = re.search(r"tcp://([^,:;]+)", uri)
    if found is None:
        namespace = environ.get("PMIX_NAMESPACE", "")
        found = re.fullmatch(r"prterun-(.+)-[0-9]+@[0-9]+", namespace)
    return None if found is None else found[1]


def _first_host(environ: Mapping[str, str], *names: str) -> str | None:
    """Return the first host of Slurm's list: n01 of 'n[01-03,7],m1'."""
    text = _text(environ, *names)
    if text is None:
        return None
    found = re.match(r"(?:[^\[\],]|\[[^\[\]]*\])+(?=,|$)", text)
    host = ""
    if found is not None:
        host = re.sub(r"\[([0-9]+)[^\]]*\]", r"\1", found[0])
    if not re.fullmatch(r"[\w.-]+", host):
        given = f"{_first_set(environ, names)} is {text!r}"
        raise refuse(given, "It lists hosts as Slurm does: n[01-03,7],m1.")
    return host


def _job(environ: Mapping[str, str], launcher: Launcher) -> str:
    """Return what names the job, alike on all its ranks and unlike the next job's."""
    for names in launcher.job:
        if environ.keys() >= set(names):
            return ".".join([environ[name] for name in names])
    return ""


def _port_of(job: str) -> int:
    # below 32768, where Linux starts to hand out ports
    return 20000 + zlib.crc32(job.encode()) % 12000


def port_of_proxy() -> int | None:
    """Return a port that follows from hydra's proxy.

    A job has one proxy on each node, and its ranks descend from it.
    """
    pid = os.getppid()
    # A script or a shell between the proxy and this process has the variables of its
    # rank; the proxy has none.
    try:
        while b"\0PMI_RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            stat = Path(f"/proc/{pid}/stat").read_text()
            pid = int(stat.rpartition(")")[2].split()[1])
    # This is not Linux, or a container hides the proxy.
    except OSError:
        return None
    return _port_of(f"pid {pid}")
