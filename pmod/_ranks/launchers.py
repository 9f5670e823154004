"""What launchers say in environment variables: one row for each, and how its facts are
read.
"""

from __future__ import annotations

import logging
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from pmod._errors import TopologyError, near_miss, phrase, quoted

_log = logging.getLogger("pmod")


@attrs.frozen
class Launcher:
    """One launcher's variables. Any of `marks` selects it; any of `traces` does when no
    launcher is found.
    """

    name: str
    start: str
    needs: tuple[str, ...]  # rank, size, what else must be there
    places: Mapping[str, tuple[str, ...]]
    marks: tuple[str, ...]
    traces: tuple[str, ...] = ()
    job: tuple[
        tuple[str, ...], ...
    ] = ()  # what is the same on every rank and differs between jobs


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
    places={  # not OMPI_COMM_WORLD_NODE_RANK: that is a local rank, counted over all jobs of the node
        "local_rank": ("OMPI_COMM_WORLD_LOCAL_RANK",),
        "local_world_size": ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        "num_nodes": ("OMPI_MCA_orte_num_nodes",),
    },
    marks=(
        *(f"OMPI_COMM_WORLD_{x}" for x in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
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
_LAUNCHERS = {
    row.name: row for row in (_ENV, _OPENMPI, PMI, _SLURM)
}  # in the order in which they are tried


def names_of(launcher: Launcher) -> list[str]:
    """The variables that a message about this launcher shows, where they are set."""
    places = [name for names in launcher.places.values() for name in names]
    names = (
        *launcher.needs,
        *places,
        *launcher.marks,
        *launcher.traces,
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    return list(dict.fromkeys(names))


def as_assignments(environ: Mapping[str, str], names: Sequence[str]) -> str:
    return ", ".join(f"{name}={environ[name]!r}" for name in names if name in environ)


def shown_variables(environ: Mapping[str, str]) -> str:
    """The variables of all launchers that are set, with their values: what a report may
    show of an environment.
    """
    rows = _LAUNCHERS.values()
    names = [
        name
        for row in rows
        for name in (*names_of(row), *(name for names in row.job for name in names))
    ]
    return as_assignments(environ, list(dict.fromkeys(["PMOD_LAUNCHER", *names])))


def refuse(given: str, right: str) -> TopologyError:
    return TopologyError(phrase("Topology.detect", given, right))


def _text(environ: Mapping[str, str], *names: str) -> str | None:
    """The first of these variables that is set."""
    name = next((name for name in names if name in environ), None)
    if name is not None and not isinstance(environ[name], str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise refuse(
            f"{name} is {quoted(environ[name])}",
            "Variables are texts, as in os.environ.",
        )
    if name is not None and not environ[name].strip():
        raise refuse(f"{name} is empty", f"Give {name} a value, or unset it.")
    return None if name is None else environ[name]


def _number(environ: Mapping[str, str], *names: str) -> int | None:
    text = _text(environ, *names)
    if text is not None and not re.fullmatch("[0-9]{1,18}", text):
        name = next(name for name in names if name in environ)
        raise refuse(f"{name} is {text!r}", f"{name} is a whole number, 0 or more.")
    return None if text is None else int(text)


def choose_launcher(environ: Mapping[str, str]) -> Launcher | None:
    forced = environ.get("PMOD_LAUNCHER")
    if forced:
        known = (*_LAUNCHERS, "single")
        if forced not in known:
            raise refuse(
                f"PMOD_LAUNCHER is {forced!r}",
                f"It is one of {', '.join(known)}{near_miss(forced, known)}",
            )
        return _LAUNCHERS.get(forced)
    for row in _LAUNCHERS.values():
        if any(mark in environ for mark in row.marks) and (
            row is not _SLURM or _in_step(environ)
        ):
            return row
    for row in _LAUNCHERS.values():
        if any(trace in environ for trace in row.traces):
            return row  # and its rank is found missing
    if environ.get("SLURM_PROCID", "0") != "0" and "SLURM_STEP_ID" not in environ:
        raise _half(
            environ, _SLURM, ["SLURM_STEP_ID"]
        )  # without a step only a batch script has one, and it is 0
    _warn_alone(environ)
    return None


def _in_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process, as a task of a step."""
    step = _number(environ, "SLURM_STEP_ID")
    if (
        step is None or step >= 0xFFFFFFF0
    ):  # the numbers of salloc's interactive shell and of a batch script
        return False
    # sbatch typed inside a step hands that step's variables on; SLURM_NPROCS alone is
    # then the new job's
    tasks = environ.get("SLURM_STEP_NUM_TASKS")
    return (
        tasks is None
        or environ.get("SLURM_PROCID") != "0"
        or environ.get("SLURM_NPROCS", tasks) == tasks
    )


def _warn_alone(environ: Mapping[str, str]) -> None:
    """Say so where one process is perhaps not what was meant."""
    slurm = (
        "SLURM_JOB_ID",
        "SLURM_JOBID",
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "SLURM_TASKS_PER_NODE",
    )
    there, master = (
        as_assignments(environ, slurm),
        as_assignments(environ, ("MASTER_ADDR", "MASTER_PORT")),
    )
    if (
        there
        and environ.get("SLURM_NTASKS", environ.get("SLURM_TASKS_PER_NODE")) != "1"
    ):
        advice = "To use the whole allocation: srun python script.py. PMOD_LAUNCHER=single silences this."
        _log.warning(
            "one process, because srun did not start it, though %s. %s", there, advice
        )
    elif master:
        _log.warning(
            "one process, because neither RANK nor WORLD_SIZE is set, though %s.",
            master,
        )


def _half(
    environ: Mapping[str, str], launcher: Launcher, missing: Sequence[str]
) -> TopologyError:
    there = as_assignments(environ, ["PMOD_LAUNCHER", *names_of(launcher)])
    advice = "PMOD_LAUNCHER=single makes this one process of its own."
    return refuse(
        f"half a set of variables: {', '.join(missing)} missing, {there} there",
        f"Start with {launcher.start}, or set what is missing; {advice}",
    )


def facts_of(
    environ: Mapping[str, str], launcher: Launcher, visible: int
) -> dict[str, Any]:
    """The arguments of Topology, as far as the launcher's variables give them."""
    rank, size = (_number(environ, name) for name in launcher.needs[:2])
    needs = (
        *launcher.needs,
        *(("MASTER_ADDR", "MASTER_PORT") if launcher is _ENV and size != 1 else ()),
    )
    missing = [name for name in needs if name not in environ]
    if rank is None or size is None or missing:
        raise _half(environ, launcher, missing)
    told = environ.get("WORLD_SIZE", str(size))
    if told != str(size) and launcher is not _ENV and not environ.get("PMOD_LAUNCHER"):
        advice = f"Unset WORLD_SIZE, or set PMOD_LAUNCHER={launcher.name} to go by {launcher.start}."
        raise refuse(
            f"WORLD_SIZE is {told!r}, but {launcher.needs[1]} is {size}", advice
        )
    places, port = (
        _places(environ, launcher, rank, size),
        _number(environ, "MASTER_PORT"),
    )
    facts = {"rank": rank, "world_size": size, "launcher": launcher.name, **places}
    facts["master_addr"] = _text(environ, "MASTER_ADDR") or _address(
        environ, launcher, places, size
    )
    facts["job"] = _job(environ, launcher)
    facts["master_port"] = (
        _port_of(facts["job"])
        if port is None and launcher is not _ENV and facts["job"]
        else port
    )
    if launcher is _ENV:
        facts["restart_count"] = _number(environ, "TORCHELASTIC_RESTART_COUNT") or 0
    if (
        places["local_world_size"] is None
        and places["num_nodes"] is None
        and (places["local_rank"] or 0) < visible > 1
    ):
        # nothing says how many share this node: as many as it has GPUs, where that
        # comes out even
        facts["local_world_size"] = size if size % visible else visible
    return facts


def _places(
    environ: Mapping[str, str], launcher: Launcher, rank: int, size: int
) -> dict[str, int | None]:
    """local_rank, local_world_size, node_rank and num_nodes; None where the launcher
    does not say.
    """
    names = {
        "local_rank": (),
        "local_world_size": (),
        "node_rank": (),
        "num_nodes": (),
        **launcher.places,
    }
    is_task = launcher is _SLURM
    if launcher is PMI and _in_step(environ):
        # under pmi2 the ranks are the tasks of the step; hydra's step has a proxy a
        # node, and only its nodes are ours
        is_task = (
            _number(environ, "SLURM_PROCID"),
            _number(environ, "SLURM_STEP_NUM_TASKS"),
        ) == (rank, size)
        names |= {name: _SLURM.places[name] for name in ("node_rank", "num_nodes")}
        names["local_rank"] += _SLURM.places["local_rank"] if is_task else ()
    places = {field: _number(environ, *ours) for field, ours in names.items()}
    if is_task and places["local_world_size"] is None:
        places["local_world_size"] = _tasks_of_node(environ, places["node_rank"], size)
    if launcher in (_OPENMPI, PMI) and places["local_world_size"] == size:
        places |= {
            "node_rank": 0,
            "num_nodes": 1,
        }  # the allocation may have more nodes than this job uses
    return places


def _tasks_of_node(
    environ: Mapping[str, str], node: int | None, size: int
) -> int | None:
    """How many tasks of the step share a node; SLURM_STEP_TASKS_PER_NODE reads '3,1' or
    '2(x3),1'.
    """
    name = "SLURM_STEP_TASKS_PER_NODE"
    text = _text(environ, name)
    if text is None or node is None:
        return None
    found = [
        re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", part)
        for part in text.split(",")
    ]
    runs = [(int(match[1]), int(match[2] or 1)) for match in found if match]
    if None in found or sum(count * times for count, times in runs) != size:
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


def _address(
    environ: Mapping[str, str],
    launcher: Launcher,
    places: Mapping[str, int | None],
    size: int,
) -> str | None:
    """Where rank 0 is, as far as the variables tell; None leaves it to connecting to
    ask for MASTER_ADDR.
    """
    if launcher is _ENV:
        return None
    if size in (1, places["local_world_size"]):
        return "127.0.0.1"
    started_on, hosts = None, ()
    if launcher is _OPENMPI:
        uri = re.search(r"tcp://([^,:;]+)", environ.get("OMPI_MCA_orte_hnp_uri", ""))
        started = uri or re.fullmatch(
            r"prterun-(.+)-[0-9]+@[0-9]+", environ.get("PMIX_NAMESPACE", "")
        )
        started_on, hosts = started and started[1], ("SLURM_JOB_NODELIST",)
    elif "SLURM_STEP_ID" in environ:
        started_on, hosts = (
            environ.get("SLURM_LAUNCH_NODE_IPADDR"),
            ("SLURM_STEP_NODELIST", "SLURM_NODELIST"),
        )
    if started_on and started_on.startswith("127."):  # all "nodes" are this machine
        return "127.0.0.1"
    if (
        environ.get("SLURM_DISTRIBUTION") == "arbitrary"
    ):  # a host file: rank 0 can be anywhere
        return None
    # The list first: rank 0 is on its first host, while mpirun or srun is often typed
    # on a login node.
    return _first_host(environ, *hosts) or started_on


def _first_host(environ: Mapping[str, str], *names: str) -> str | None:
    """The first host of Slurm's list: n01 of 'n[01-03,7],m1'."""
    text = _text(environ, *names)
    if text is None:
        return None
    found = re.match(r"(?:[^\[\],]|\[[^\[\]]*\])+(?=,|$)", text)
    host = re.sub(r"\[([0-9]+)[^\]]*\]", r"\1", found[0]) if found else ""
    if not re.fullmatch(r"[\w.-]+", host):
        name = next(name for name in names if name in environ)
        raise refuse(
            f"{name} is {text!r}", "It lists hosts as Slurm does: n[01-03,7],m1."
        )
    return host


def _job(environ: Mapping[str, str], launcher: Launcher) -> str:
    """What names the job: the same on all its ranks, another for the next job."""
    names = next(
        (names for names in launcher.job if all(name in environ for name in names)), ()
    )
    return ".".join(environ[name] for name in names)


def _port_of(job: str) -> int:
    return (
        20000 + zlib.crc32(job.encode()) % 12000
    )  # below 32768, where Linux starts to hand out ports


def port_of_proxy() -> int | None:
    """A port from hydra's proxy: a job has one on each node, and its ranks descend from
    it.
    """
    pid = os.getppid()
    try:
        # a script or a shell between the proxy and this process has the variables of
        # its rank, the proxy has none
        while b"\0PMI_RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            pid = int(
                Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
            )
    except OSError:
        return None  # no Linux, or a container that hides the proxy
    return _port_of(f"pid {pid}")
