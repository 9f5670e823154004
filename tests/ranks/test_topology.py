"""Detection of the launcher: variables as the real launchers set them (torchrun of torch 2.13, Open MPI 4.1.4, MPICH
hydra 4.0.2, Slurm 22.05 with two nodes on one machine), cut down to those that carry meaning."""

import logging
import os
import pickle
import socket
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pmod._errors import TopologyError
from pmod._ranks import backends
from pmod._ranks.topology import Topology, _say_unused
from pmod._wire.base import Wire

Environ = dict[str, str]
FIELDS = ("launcher", "rank", "world_size", "local_rank", "local_world_size", "node_rank", "num_nodes")


def torchrun(rank: int, size: int = 4, local: int = 2) -> Environ:
    told = {
        "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local,
        "GROUP_RANK": rank // local, "GROUP_WORLD_SIZE": size // local, "ROLE_RANK": rank, "ROLE_WORLD_SIZE": size,
        "MASTER_ADDR": "n1", "MASTER_PORT": 29500, "TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip
    return {name: str(value) for name, value in told.items()}


def openmpi(rank: int, local_rank: int, local: int, size: int, nodes: int = 1, hnp: str = "127.0.0.1") -> Environ:
    told = {
        "OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": size, "OMPI_COMM_WORLD_LOCAL_RANK": local_rank,
        "OMPI_COMM_WORLD_LOCAL_SIZE": local, "OMPI_COMM_WORLD_NODE_RANK": local_rank, "OMPI_UNIVERSE_SIZE": size,
        "OMPI_MCA_ess_base_jobid": 2085158913, "OMPI_MCA_orte_num_nodes": nodes, "PMIX_RANK": rank,
        "OMPI_MCA_orte_hnp_uri": f"2085158912.0;tcp://{hnp},172.17.0.1:51505", "PMIX_NAMESPACE": 2085158913,
    }  # fmt: skip
    return {name: str(value) for name, value in told.items()}


def hydra(rank: int, local_rank: int, local: int, size: int) -> Environ:
    told = {"PMI_RANK": rank, "PMI_SIZE": size, "MPI_LOCALRANKID": local_rank, "MPI_LOCALNRANKS": local}
    return {name: str(value) for name, value in told.items()} | {"PMI_FD": str(6 + 2 * rank), "HYDI_CONTROL_FD": "7"}


def step(rank: int, local_rank: int, node: int, tasks: str, size: int, nodes: int = 2, job: int = 1) -> Environ:
    told = {
        "SLURM_JOB_ID": job, "SLURM_JOBID": job, "SLURM_STEP_ID": 0, "SLURM_STEPID": 0, "SLURM_PROCID": rank,
        "SLURM_LOCALID": local_rank, "SLURM_NODEID": node, "SLURM_NTASKS": size, "SLURM_NPROCS": size,
        "SLURM_STEP_NUM_TASKS": size, "SLURM_STEP_NUM_NODES": nodes, "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_TASKS_PER_NODE": tasks, "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NODELIST": "n[1-2]",
        "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": 2, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
    }  # fmt: skip
    return {name: str(value) for name, value in told.items()}


SALLOC = {
    "SLURM_JOB_ID": "4", "SLURM_JOBID": "4", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_TASKS_PER_NODE": "3,1", "SLURM_JOB_NUM_NODES": "2",
}  # fmt: skip
SBATCH = SALLOC | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
INTERACTIVE = SBATCH | {  # salloc with LaunchParameters=use_interactive_step: a step by name only
    "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_LAUNCH_NODE_IPADDR": "172.18.140.10", "SLURM_NPROCS": "1",
}  # fmt: skip
# sbatch typed inside `srun -n1`: the old step's variables are still there
INHERITED = step(0, 0, 0, "1", 1, nodes=1) | SBATCH
ALONE = ("single", 0, 1, 0, 1, 0, 1)


def proxy(node: int) -> Environ:
    """What hydra's ranks see inside an allocation: the step in which hydra started one proxy on each node."""
    return step(node, 0, node, "1(x2)", 2) | {"SLURM_NTASKS": "4"}


def pmi2(*place: object) -> Environ:
    ours = step(*place)  # type: ignore[arg-type]
    return ours | {"PMI_RANK": ours["SLURM_PROCID"], "PMI_SIZE": "4", "PMI_JOBID": "1.0", "PMI_FD": "11"}


WHERE = {"MASTER_ADDR": "n1", "MASTER_PORT": "1234"}
# name: variables, (launcher, rank, size, local rank, local size, node, nodes), address
ROWS: dict[str, tuple[Environ, tuple[object, ...], str | None]] = {
    "nothing": ({}, ALONE, None),
    "torchrun": (torchrun(3), ("env", 3, 4, 1, 2, 1, 2), "n1"),
    "torchrun, one process": (torchrun(0, 1, 1), ("env", 0, 1, 0, 1, 0, 1), "n1"),
    "torchrun as a task of srun": (step(1, 0, 1, "1(x2)", 2) | torchrun(3), ("env", 3, 4, 1, 2, 1, 2), "n1"),
    "a kernel of jupyter-distributed": (
        {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", **WHERE}, ("env", 1, 2, 1, 2, 0, 1), "n1"),
    "no LOCAL_RANK": ({"RANK": "3", "WORLD_SIZE": "4", **WHERE}, ("env", 3, 4, 3, 4, 0, 1), "n1"),
    "one process needs no address": ({"RANK": "0", "WORLD_SIZE": "1"}, ("env", 0, 1, 0, 1, 0, 1), None),
    "mpirun": (openmpi(1, 1, 4, 4), ("openmpi", 1, 4, 1, 4, 0, 1), "127.0.0.1"),
    "mpirun, two hosts": (openmpi(3, 1, 2, 4, 2, "10.1.5.5"), ("openmpi", 3, 4, 1, 2, 1, 2), "10.1.5.5"),
    "mpirun, two hosts, uneven": (openmpi(3, 0, 1, 4, 2, "10.1.5.5"), ("openmpi", 3, 4, 0, 1, 1, 2), "10.1.5.5"),
    "mpirun --map-by node": (openmpi(1, 0, 2, 4, 2, "10.1.5.5"), ("openmpi", 1, 4, 0, 2, 1, 2), "10.1.5.5"),
    "mpirun inside salloc": (SALLOC | openmpi(1, 1, 4, 4), ("openmpi", 1, 4, 1, 4, 0, 1), "127.0.0.1"),
    "mpirun inside salloc, two nodes": (
        proxy(1) | openmpi(3, 0, 1, 4, 2, "10.1.5.5"), ("openmpi", 3, 4, 0, 1, 1, 2), "n1"),
    "prterun, two hosts": (
        {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
         "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-login-3-4279@1"},
        ("openmpi", 2, 4, 0, 2, 1, 2), "login-3"),
    "hydra": (hydra(2, 2, 3, 3), ("pmi", 2, 3, 2, 3, 0, 1), "127.0.0.1"),
    "hydra, two hosts": (hydra(2, 0, 2, 4), ("pmi", 2, 4, 0, 2, 1, 2), None),
    "hydra inside salloc": (proxy(0) | hydra(2, 2, 3, 4), ("pmi", 2, 4, 2, 3, 0, 2), "n1"),
    "hydra inside salloc, second node": (proxy(1) | hydra(3, 0, 1, 4), ("pmi", 3, 4, 0, 1, 1, 2), "n1"),
    "hydra inside salloc, one node of two": (proxy(0) | hydra(2, 2, 4, 4), ("pmi", 2, 4, 2, 4, 0, 1), "127.0.0.1"),
    "PMI without local ranks, inside salloc": (
        {**proxy(0), "PMI_RANK": "2", "PMI_SIZE": "4"}, ("pmi", 2, 4, 0, 2, 0, 2), "n1"),
    "PMI, one process": ({"PMI_RANK": "0", "PMI_SIZE": "1"}, ("pmi", 0, 1, 0, 1, 0, 1), "127.0.0.1"),
    "hydra in an sbatch script": (SBATCH | hydra(2, 2, 4, 4), ("pmi", 2, 4, 2, 4, 0, 1), "127.0.0.1"),
    "srun --mpi=pmi2": (pmi2(2, 2, 0, "3,1", 4), ("pmi", 2, 4, 2, 3, 0, 2), "n1"),
    "srun": (step(2, 2, 0, "3,1", 4), ("slurm", 2, 4, 2, 3, 0, 2), "n1"),
    "srun, second node": (step(3, 0, 1, "3,1", 4), ("slurm", 3, 4, 0, 1, 1, 2), "n1"),
    "srun, 2(x3),1": (step(6, 0, 3, "2(x3),1", 7, 4), ("slurm", 6, 7, 0, 1, 3, 4), "n1"),
    "srun --distribution=cyclic": (step(1, 0, 1, "2(x2)", 4), ("slurm", 1, 4, 0, 2, 1, 2), "n1"),
    "srun -n3 in an allocation of 4": (step(2, 0, 1, "2,1", 3), ("slurm", 2, 3, 0, 1, 1, 2), "n1"),
    "the size is the step's": (
        step(2, 0, 1, "2,1", 3) | {"SLURM_NTASKS": "4"}, ("slurm", 2, 3, 0, 1, 1, 2), "n1"),
    "srun, one node": (step(3, 3, 0, "4", 4, 1), ("slurm", 3, 4, 3, 4, 0, 1), "127.0.0.1"),
    "srun -n1": (step(0, 0, 0, "1", 1, 1), ("slurm", 0, 1, 0, 1, 0, 1), "127.0.0.1"),
    "srun with MASTER_ADDR": (step(3, 0, 1, "3,1", 4) | {"MASTER_ADDR": "ib7"}, ("slurm", 3, 4, 0, 1, 1, 2), "ib7"),
    "srun with an exported WORLD_SIZE": (
        step(3, 0, 1, "3,1", 4) | {"WORLD_SIZE": "4"}, ("slurm", 3, 4, 0, 1, 1, 2), "n1"),
    "two nodes on one machine": (
        step(3, 0, 1, "3,1", 4) | {"SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"},
        ("slurm", 3, 4, 0, 1, 1, 2), "127.0.0.1"),
    "a host file: rank 0 can be anywhere": (
        step(2, 1, 1, "1,2", 3) | {"SLURM_DISTRIBUTION": "arbitrary"}, ("slurm", 2, 3, 1, 2, 1, 2), None),
    "forced": (step(3, 0, 1, "3,1", 4) | hydra(0, 0, 1, 2) | {"PMOD_LAUNCHER": "slurm"},
               ("slurm", 3, 4, 0, 1, 1, 2), "n1"),
    "forced to be one": (torchrun(3) | {"PMOD_LAUNCHER": "single"}, ALONE, None),
    "forced to nothing": (torchrun(3) | {"PMOD_LAUNCHER": ""}, ("env", 3, 4, 1, 2, 1, 2), "n1"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_variables_and_what_they_mean(name: str, caplog: pytest.LogCaptureFixture) -> None:
    environ, expected, address = ROWS[name]
    found = Topology.detect(environ, device_count=0)
    assert tuple(getattr(found, field) for field in FIELDS) == expected
    assert found.master_addr == address
    assert not caplog.records


@pytest.mark.parametrize(
    "environ", [SALLOC, SBATCH, INTERACTIVE, INHERITED, {"SLURM_JOB_ID": "4", "SLURM_TASKS_PER_NODE": "1(x2)"}]
)
def test_slurm_without_a_step_is_one_process_and_says_so(environ: Environ, caplog: pytest.LogCaptureFixture) -> None:
    found = Topology.detect(environ, device_count=0)
    assert tuple(getattr(found, field) for field in FIELDS) == ALONE
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("pmod", "WARNING")
    assert "srun python script.py" in record.message and "SLURM_JOB_ID='4'" in record.message


ONE_TASK = {"SLURM_JOB_ID": "4", "SLURM_TASKS_PER_NODE": "1"}


@pytest.mark.parametrize("environ", [SALLOC | {"SLURM_NTASKS": "1"}, ONE_TASK])
def test_a_job_of_one_task_needs_no_srun(environ: Environ, caplog: pytest.LogCaptureFixture) -> None:
    assert Topology.detect(environ, device_count=0).launcher == "single"
    assert not caplog.records


def test_an_address_alone_is_one_process_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert Topology.detect({"MASTER_ADDR": "n1"}, device_count=0).world_size == 1
    assert caplog.messages == ["one process, because neither RANK nor WORLD_SIZE is set, though MASTER_ADDR='n1'."]


def without(environ: Environ, *names: str) -> Environ:
    return {name: value for name, value in environ.items() if name not in names}


INCOMPLETE = "pmod.Topology.detect: the launcher's environment is incomplete:"
ADVICE = "PMOD_LAUNCHER=single makes this one process of its own."
ERRORS = {
    "no MASTER_ADDR": (
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"},
        f"{INCOMPLETE} MASTER_ADDR is not set, although RANK='1', WORLD_SIZE='2', MASTER_PORT='29500' are.\n"
        f"Start with torchrun, or set what is missing; {ADVICE}"),
    "no MASTER_PORT": (
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n1"},
        f"{INCOMPLETE} MASTER_PORT is not set, although RANK='1', WORLD_SIZE='2', MASTER_ADDR='n1' are.\n"
        f"Start with torchrun, or set what is missing; {ADVICE}"),
    "no RANK": (
        {"WORLD_SIZE": "2"},
        f"{INCOMPLETE} RANK, MASTER_ADDR, MASTER_PORT are not set, although WORLD_SIZE='2' is.\n"
        f"Start with torchrun, or set what is missing; {ADVICE}"),
    "no PROCID": (
        {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_ID": "7"},
        f"{INCOMPLETE} SLURM_PROCID is not set, although SLURM_STEP_NUM_TASKS='4', SLURM_STEP_ID='0' are.\n"
        f"Start with srun, or set what is missing; {ADVICE}"),
    "forced, and nothing there": (
        {"PMOD_LAUNCHER": "pmi"},
        f"{INCOMPLETE} PMI_RANK, PMI_SIZE are not set, although PMOD_LAUNCHER='pmi' is.\n"
        f"Start with mpiexec, or set what is missing; {ADVICE}"),
    "an unknown launcher": (
        {"PMOD_LAUNCHER": "slrum"},
        "pmod.Topology.detect: PMOD_LAUNCHER is 'slrum'.\n"
        "It is one of env, openmpi, pmi, slurm, single; did you mean 'slurm'?"),
    "a port that is no number": (
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "None"},
        "pmod.Topology.detect: MASTER_PORT is 'None'.\nMASTER_PORT is a whole number, 0 or more."),
    "an empty rank": (
        torchrun(1) | {"RANK": ""}, "pmod.Topology.detect: RANK is empty.\nGive RANK a value, or unset it."),
    "a rank out of range": (
        {"PMI_RANK": "4", "PMI_SIZE": "4"},
        "pmod.Topology: rank is 4, and world_size is 4.\nrank is a whole number from 0 to 3.\n"
        "The variables: PMI_RANK='4', PMI_SIZE='4'."),
    "two sizes": (
        step(0, 0, 0, "1", 1, 1) | {"WORLD_SIZE": "4"},
        "pmod.Topology.detect: WORLD_SIZE is '4', but SLURM_STEP_NUM_TASKS is 1.\n"
        "Unset WORLD_SIZE, or set PMOD_LAUNCHER=slurm to go by srun."),
    "tasks that do not add up": (
        step(0, 0, 0, "2(x3)", 4),
        "pmod.Topology.detect: SLURM_STEP_TASKS_PER_NODE is '2(x3)'.\n"
        "It shares SLURM_STEP_NUM_TASKS=4 tasks out among the nodes."),
    "a node too many": (
        step(0, 0, 2, "3,1", 4),
        "pmod.Topology.detect: SLURM_STEP_TASKS_PER_NODE is '3,1', and SLURM_NODEID is '2'.\nIt has a part a node."),
    "a list of hosts that ends early": (
        step(0, 0, 0, "3,1", 4) | {"SLURM_STEP_NODELIST": "n[1-"},
        "pmod.Topology.detect: SLURM_STEP_NODELIST is 'n[1-'.\nIt lists hosts as Slurm does: n[01-03,7],m1."),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_the_text_of_errors(name: str) -> None:
    environ, text = ERRORS[name]
    with pytest.raises(TopologyError) as caught:
        Topology.detect(environ, device_count=0)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        (without(torchrun(3), "RANK"), "RANK is not set"),
        (without(torchrun(3), "WORLD_SIZE"), "WORLD_SIZE is not set"),
        ({"GROUP_WORLD_SIZE": "2"},
         "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set, although GROUP_WORLD_SIZE='2' is"),
        ({"LOCAL_RANK": "1"}, "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set"),
        (without(step(1, 0, 1, "1(x2)", 2) | torchrun(3), "RANK"), "RANK is not set"),
        (without(openmpi(1, 1, 4, 4), "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_RANK is not set"),
        (without(hydra(1, 1, 4, 4), "PMI_RANK", "PMI_SIZE"), "PMI_RANK, PMI_SIZE are not set"),
        (without(proxy(0) | hydra(2, 2, 3, 4), "PMI_RANK", "PMI_SIZE"), "PMI_RANK, PMI_SIZE are not set"),
        (without(step(0, 0, 0, "3,1", 4), "SLURM_STEP_NUM_TASKS"), "SLURM_STEP_NUM_TASKS is not set"),
        (without(step(2, 2, 0, "3,1", 4), "SLURM_STEP_ID"), "SLURM_STEP_ID is not set"),
        (SBATCH | {"PMOD_LAUNCHER": "slurm"}, "SLURM_STEP_NUM_TASKS, SLURM_STEP_ID are not set"),
        (torchrun(3) | {"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        (torchrun(3) | {"LOCAL_RANK": "2"}, "LOCAL_RANK='2'"),
        (torchrun(3) | {"GROUP_RANK": "2"}, "GROUP_RANK='2'"),
        (torchrun(3) | {"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE='4'"),
        (torchrun(3) | {"MASTER_PORT": "70000"}, "MASTER_PORT='70000'"),
        (torchrun(3) | {"RANK": "-1"}, "RANK is '-1'"),
        (torchrun(3) | {"RANK": "9" * 5000}, "RANK is '9999"),  # int() itself refuses that many digits
        (torchrun(3) | {"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT is 'x'"),
        (step(0, 0, 0, "3,1", 4) | {"SLURM_STEP_ID": "x"}, "SLURM_STEP_ID is 'x'"),
        (step(0, 0, 0, "3,1(y2)", 4), "SLURM_STEP_TASKS_PER_NODE is '3,1(y2)'"),
        (step(0, 0, 0, "4,x", 4), "SLURM_STEP_TASKS_PER_NODE is '4,x'"),
    ],
)
def test_errors_name_the_variable(environ: Environ, named: str) -> None:
    with pytest.raises(TopologyError) as caught:
        Topology.detect(environ, device_count=0)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("n[1-3,7]", "n1"),
        ("n[001-003],m1", "n001"),
        ("login", "login"),
        ("a-b.c,d", "a-b.c"),
        ("r[2-3]n[08,1]-ib", "r2n08-ib"),
    ],
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    environ = step(3, 0, 1, "3,1", 4) | {"SLURM_STEP_NODELIST": hosts}
    assert Topology.detect(environ, device_count=0).master_addr == first
    older = without(environ, "SLURM_STEP_NODELIST") | {"SLURM_NODELIST": hosts}
    assert Topology.detect(older, device_count=0).master_addr == first


def test_slurm_without_a_list_meets_where_srun_was_typed() -> None:
    environ = without(step(3, 0, 1, "3,1", 4), "SLURM_STEP_NODELIST", "SLURM_NODELIST")
    assert Topology.detect(environ, device_count=0).master_addr == "10.0.0.9"
    assert Topology.detect(without(environ, "SLURM_LAUNCH_NODE_IPADDR"), device_count=0).master_addr is None


def port(environ: Environ) -> int | None:
    return Topology.detect(environ, device_count=0).master_port


def test_ranks_of_a_job_share_a_port_and_jobs_do_not() -> None:
    srun = [port(step(rank, rank, 0, "4", 4, 1)) for rank in range(4)]
    mpirun = [port(openmpi(rank, rank, 4, 4)) for rank in range(4)]
    proxies = [port(proxy(node) | hydra(rank, rank % 2, 2, 4)) for rank, node in enumerate((0, 0, 1, 1))]
    for ports in (srun, mpirun, proxies):
        (only,) = set(ports)
        assert only is not None and 20000 <= only < 32768
    jobs = [port(step(0, 0, 0, "4", 4, 1, job=job)) for job in range(1000, 1020)]
    steps = [port(step(0, 0, 0, "4", 4, 1) | {"SLURM_STEP_ID": str(number)}) for number in range(20)]
    assert len({*jobs, *steps}) == 40
    assert port(openmpi(0, 0, 4, 4) | {"PMIX_NAMESPACE": "2085158914"}) != mpirun[0]
    assert port(step(0, 0, 0, "4", 4, 1) | {"MASTER_PORT": "1234"}) == 1234
    assert port(hydra(0, 0, 4, 4)) is None  # nothing in hydra's variables tells its jobs apart


def test_hydra_on_one_node_has_the_port_of_its_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    parents = {os.getppid(): 7, 7: 4279, 4279: 1}  # 7 is a shell in a rank, 4279 the proxy

    def read(path: Path) -> bytes:
        pid = int(path.parts[2])
        return b"A=1\0" + (b"" if pid == 4279 else b"PMI_RANK=1\0") + b"B=PMI_RANK=2\0"

    for name, value in hydra(1, 1, 2, 2).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "read_bytes", read)
    monkeypatch.setattr(Path, "read_text", lambda path: f"1 (a) b) S {parents[int(path.parts[2])]} 1")
    found = Topology.detect(device_count=0).master_port
    assert found == 20000 + zlib.crc32(b"pid 4279") % 12000
    monkeypatch.setattr(os, "getppid", lambda: 4279)
    assert Topology.detect(device_count=0).master_port == found
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert Topology.detect(device_count=0).master_port == 1234
    monkeypatch.delenv("MASTER_PORT")
    monkeypatch.setenv("MPI_LOCALNRANKS", "1")
    monkeypatch.setenv("MPI_LOCALRANKID", "0")
    assert Topology.detect(device_count=0).master_port is None  # the proxy of another node is another process


def test_hydra_without_proc_tells_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in hydra(1, 1, 2, 2).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "getppid", lambda: 0)  # its parent is outside the container
    assert Topology.detect(device_count=0).master_port is None


@pytest.mark.parametrize(
    ("local_rank", "visible", "device", "backend"),
    [
        (3, 8, "cuda:3", "cpu:gloo,cuda:nccl"),
        (3, 1, "cuda:0", "cpu:gloo,cuda:nccl"),  # --gpu-bind: each task sees its own GPU as number 0
        (3, 2, "cuda:1", "cpu:gloo,cuda:nccl"),
        (3, 0, "cpu", "gloo"),
    ],
)
def test_the_device_is_by_local_rank_among_those_visible(
    local_rank: int, visible: int, device: str, backend: str
) -> None:
    for environ in (torchrun(local_rank, 8, 8), step(3, local_rank, 0, "4", 4, 1), openmpi(3, local_rank, 4, 4)):
        found = Topology.detect(environ, device_count=visible)
        assert (found.device, found.backend) == (torch.device(device), backend)


def test_one_process_takes_the_first_device() -> None:
    assert Topology.detect({}, device_count=4).device == torch.device("cuda:0")
    assert Topology.detect({}, device_count=0) == Topology(rank=0, world_size=1)


@pytest.mark.parametrize(
    ("more", "visible", "place"),
    [
        ({}, 4, (1, 4, 1)),  # a node has as many ranks as GPUs ...
        ({}, 3, (5, 8, 0)),  # ... unless that does not come out even
        ({}, 0, (5, 8, 0)),
        ({"LOCAL_RANK": "1"}, 4, (1, 4, 1)),
        ({"LOCAL_RANK": "5"}, 4, (5, 8, 0)),
        ({"LOCAL_RANK": "5"}, 1, (5, 8, 0)),
        ({"GROUP_WORLD_SIZE": "4"}, 8, (1, 2, 2)),
    ],
)
def test_places_that_nobody_told(more: Environ, visible: int, place: tuple[int, ...]) -> None:
    found = Topology.detect({"RANK": "5", "WORLD_SIZE": "8", **WHERE, **more}, device_count=visible)
    assert (found.local_rank, found.local_world_size, found.node_rank) == place


def test_restarts_are_counted() -> None:
    assert Topology.detect(torchrun(3) | {"TORCHELASTIC_RESTART_COUNT": "2"}, device_count=0).restart_count == 2
    assert Topology.detect(torchrun(3), device_count=0).restart_count == 0


def test_detect_looks_at_its_arguments_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in torchrun(3).items():
        monkeypatch.setenv(name, value)
    sees(monkeypatch, "cuda", 2)
    assert Topology.detect() == Topology.detect(torchrun(3), device_count=2)
    for name in ("current_accelerator", "device_count", "is_available"):
        monkeypatch.setattr(torch.accelerator, name, lambda *_: pytest.fail("asked torch for GPUs"))
    monkeypatch.setattr(socket, "socket", lambda *_: pytest.fail("opened a socket"))
    assert Topology.detect({}, device_count=0).world_size == 1


# --- which accelerator ------------------------------------------------------------------------------------------------


def sees(monkeypatch: pytest.MonkeyPatch, kind: str, visible: int) -> None:
    """Let torch be built for this type of accelerator, and see so many."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: visible)
    _say_unused.cache_clear()


def test_a_gpu_of_rocm_is_one_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch for ROCm calls its devices "cuda", and RCCL "nccl"."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.version, "cuda", None)
    sees(monkeypatch, "cuda", 4)
    found = Topology.detect(torchrun(3, 4, 4))
    assert (found.device, found.backend) == (torch.device("cuda:3"), "cpu:gloo,cuda:nccl")


@pytest.mark.parametrize(("kind", "visible", "shown"), [("xpu", 4, "4 xpu devices"), ("mps", 1, "1 mps device")])
def test_another_accelerator_is_said_to_be_unused(
    kind: str, visible: int, shown: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sees(monkeypatch, kind, visible)
    for _ in range(2):
        found = Topology.detect(torchrun(3, 4, 4))
        assert (found.device, found.backend) == (torch.device("cpu"), "gloo")
    said = f"the ranks are on the CPU: torch sees {shown}, and pmod has a backend for cpu and cuda only."
    assert [record.getMessage() for record in caplog.records] == [said]


def test_one_that_is_built_for_and_not_there_is_not_spoken_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for kind in ("xpu", "cuda"):
        sees(monkeypatch, kind, 0)
        assert Topology.detect(torchrun(3)).device == torch.device("cpu")
    assert not caplog.records


def test_one_with_a_backend_is_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backends, "_BACKENDS", dict(backends._BACKENDS))
    backends.register(backends.Backend("xccl", "xpu", Wire, blocks=False))
    sees(monkeypatch, "xpu", 4)
    found = Topology.detect(torchrun(3, 4, 4))
    assert (found.device, found.backend) == (torch.device("xpu:3"), "cpu:gloo,xpu:xccl")
    assert not caplog.records


def test_to_look_starts_no_gpu() -> None:
    """A process that has started CUDA cannot fork workers that use it."""
    code = (
        "import torch, pmod\n"
        "pmod.Topology.detect()\n"
        "assert not torch.cuda.is_initialized() and not torch.cuda._is_in_bad_fork()\n"
        "torch.accelerator.is_available = torch.cuda.is_available = None  # they may ask the driver\n"
        "pmod.Topology.detect()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "place"),
    [
        ({"rank": 5, "world_size": 8}, (5, 8, 0, 1)),
        ({"rank": 5, "world_size": 8, "num_nodes": 2}, (1, 4, 1, 2)),
        ({"rank": 5, "world_size": 8, "local_world_size": 4}, (1, 4, 1, 2)),
        ({"rank": 3, "world_size": 4, "local_rank": 0, "local_world_size": 1, "num_nodes": 2}, (0, 1, 1, 2)),
        ({"rank": 1, "world_size": 4, "local_rank": 0, "local_world_size": 3, "num_nodes": 2}, (0, 3, 1, 2)),
        ({"rank": 4, "world_size": 5, "local_world_size": 2}, (0, 2, 2, 3)),
        ({"rank": 2, "world_size": 6, "local_rank": 1, "local_world_size": 3, "num_nodes": 2}, (1, 3, 0, 2)),
        ({"rank": np.int64(5), "world_size": np.int64(8), "node_rank": 1, "num_nodes": 2}, (1, 4, 1, 2)),
    ],
)
def test_what_is_left_out_is_filled_in(given_: Mapping[str, int], place: tuple[int, ...]) -> None:
    made = Topology(**given_)
    assert (made.local_rank, made.local_world_size, made.node_rank, made.num_nodes) == place
    assert (made.device, made.backend, made.launcher) == (torch.device("cpu"), "gloo", "single")
    assert (made.master_addr, made.master_port, made.restart_count) == (None, None, 0)
    assert type(made.rank) is int


@pytest.mark.parametrize(
    ("given_", "text"),
    [
        ({"rank": 4, "world_size": 4}, "rank is 4, and world_size is 4.\nrank is a whole number from 0 to 3."),
        ({"rank": -1, "world_size": 4}, "rank is -1, and world_size is 4.\nrank is a whole number from 0 to 3."),
        ({"rank": 0, "world_size": 0}, "world_size is 0.\nworld_size is a whole number from 1 to 2147483647."),
        ({"rank": "0", "world_size": 4}, "rank is '0', and world_size is 4.\nrank is a whole number from 0 to 3."),
        ({"rank": None, "world_size": 4}, "rank is None, and world_size is 4.\nrank is a whole number from 0 to 3."),
        ({"rank": 0, "world_size": 4, "local_rank": 4},
         "local_rank is 4, and local_world_size is 4.\nlocal_rank is a whole number from 0 to 3."),
        ({"rank": 0, "world_size": 4, "local_world_size": 5},
         "local_world_size is 5, and world_size is 4.\nlocal_world_size is a whole number from 1 to 4."),
        ({"rank": 0, "world_size": 4, "node_rank": 1},
         "node_rank is 1, and num_nodes is 1.\nnode_rank is a whole number from 0 to 0."),
        ({"rank": 0, "world_size": 4, "num_nodes": 0},
         "num_nodes is 0, and world_size is 4.\nnum_nodes is a whole number from 1 to 4."),
        ({"rank": 0, "world_size": 4, "num_nodes": 3, "local_world_size": 3},
         "num_nodes is 3, local_world_size is 3, and world_size is 4.\nThat leaves 1 ranks for 2 other nodes."),
        ({"rank": 0, "world_size": 4, "num_nodes": 1, "local_world_size": 3},
         "num_nodes is 1, local_world_size is 3, and world_size is 4.\nThat leaves 1 ranks for 0 other nodes."),
        ({"rank": 0, "world_size": 1, "master_port": 65536},
         "master_port is 65536.\nmaster_port is a whole number from 1 to 65535."),
        ({"rank": 0, "world_size": 1, "restart_count": -1},
         "restart_count is -1.\nrestart_count is a whole number from 0 up."),
    ],
)  # fmt: skip
def test_contradictions_by_hand(given_: Mapping[str, object], text: str) -> None:
    with pytest.raises(TopologyError) as caught:
        Topology(**given_)  # type: ignore[arg-type]
    assert str(caught.value) == f"pmod.Topology: {text}"


def test_a_frozen_value() -> None:
    made = Topology(rank=1, world_size=4, device="cuda:1")
    assert (made.device, made.backend) == (torch.device("cuda", 1), "cpu:gloo,cuda:nccl")
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        made.rank = 2  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(made)) == made
    assert hash(made) == hash(attrs.evolve(made)) and made != attrs.evolve(made, rank=2)


# --- whatever is lost or garbled on the way ---------------------------------------------------------------------------

# sets of 4 ranks, and the variables of which any one says that there is more than one process
WHOLE = {
    "torchrun": ([torchrun(rank) for rank in range(4)],
                 [*list(torchrun(0))[:6], "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID"]),
    "torchrun in srun": ([step(rank // 2, 0, rank // 2, "1(x2)", 2) | torchrun(rank) for rank in range(4)],
                         ["RANK", "GROUP_RANK", "TORCHELASTIC_RESTART_COUNT"]),
    "mpirun": ([openmpi(rank, rank, 4, 4) for rank in range(4)], list(openmpi(0, 0, 4, 4))[:4]),
    "mpirun in salloc": ([proxy(0) | openmpi(rank, rank, 4, 4) for rank in range(4)], list(openmpi(0, 0, 4, 4))[:4]),
    "hydra": ([hydra(rank, rank, 4, 4) for rank in range(4)], list(hydra(0, 0, 4, 4))[:4]),
    "hydra in salloc": ([proxy(rank // 2) | hydra(rank, rank % 2, 2, 4) for rank in range(4)],
                        list(hydra(0, 0, 4, 4))[:4]),
    "pmi2": ([pmi2(rank, rank % 2, rank // 2, "2(x2)", 4) for rank in range(4)], ["PMI_RANK", "PMI_SIZE"]),
    "srun": ([step(rank, rank % 2, rank // 2, "2(x2)", 4) for rank in range(4)],
             ["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS"]),
}  # fmt: skip
RUBBISH = st.sampled_from(["", " ", "x", "-1", "1.5", "None", "99999999999999999999", "4(x", "n[", "0x1"])


@contextmanager
def logged() -> Iterator[list[logging.LogRecord]]:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("pmod").addHandler(handler)
    try:
        yield records
    finally:
        logging.getLogger("pmod").removeHandler(handler)


@pytest.mark.parametrize("launcher", WHOLE)
@given(data=st.data())
@settings(deadline=None)
def test_what_is_lost_never_makes_a_silent_single_process(launcher: str, data: st.DataObject) -> None:
    sets, telling = WHOLE[launcher]
    rank = data.draw(st.integers(0, 3), label="rank")
    names = sorted(sets[rank])
    lost = data.draw(st.sets(st.sampled_from(names)), label="lost")
    garbled = data.draw(st.dictionaries(st.sampled_from(names), RUBBISH, max_size=3), label="garbled")
    environ = {name: garbled.get(name, sets[rank][name]) for name in names if name not in lost}
    assume(any(name in environ for name in telling))
    with logged() as records:
        try:
            found = Topology.detect(environ, device_count=data.draw(st.integers(0, 4), label="GPUs"))
        except TopologyError:
            return
    assert (found.rank, found.world_size) == (rank, 4) or (found.world_size == 1 and records)
