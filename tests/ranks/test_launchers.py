"""Real launchers start real processes: one script prints the same under each, and nobody waits for ranks that nobody
started. A launcher that is not installed is a skip, or with PMOD_TEST_LAUNCHERS=all (what CI sets) a failure."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from jupyter_client.multikernelmanager import AsyncMultiKernelManager

from pmod import Topology, TopologyError
from tests.lib import namespaces, slurm

pytestmark = pytest.mark.launchers

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tests/lib/scripts"
TRAIN, RANK, LEAVE, TAKEN, VARIABLES = (
    str(SCRIPTS / f"{name}.py") for name in ("train", "rank", "leave", "taken", "variables")
)
# program -> the Debian package that has it
PACKAGES = {"mpirun.openmpi": "openmpi-bin", "mpiexec.hydra": "mpich", "ip": "iproute2", **slurm.PROGRAMS}
# what another launcher may have told the process that runs these tests
TOLD = re.compile(r"(SLURM|SBATCH|SALLOC|OMPI|PMIX|PMI|MPI|HYDI|HYDRA|TORCHELASTIC|PMOD)_|(LOCAL_|GROUP_|ROLE_)?RANK$|"
                  r"(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE$|MASTER_(ADDR|PORT)$")  # fmt: skip

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
MPIRUN = ["mpirun.openmpi", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none",
          "--mca", "oob_tcp_if_include", "lo"]  # fmt: skip


def absent(advice: str) -> None:
    """Skip, or fail where all launchers must be there."""
    say = pytest.fail if os.environ.get("PMOD_TEST_LAUNCHERS") == "all" else pytest.skip
    say(f"not installed: {advice}")


def need(*programs: str) -> None:
    """Those of these programs that belong to Debian packages are installed."""
    missing = {PACKAGES[name] for name in programs if name in PACKAGES and slurm.find(name) is None}
    if missing:
        absent(f"apt-get install -y --no-install-recommends {' '.join(sorted(missing))}")


def environment(**more: str) -> dict[str, str]:
    """What a user's shell has, and nothing of a launcher; on one machine gloo keeps to loopback."""
    ours = {name: value for name, value in os.environ.items() if not TOLD.match(name)}
    quick = {"OMP_NUM_THREADS": "1", "PMOD_TIMEOUT": "60", "GLOO_SOCKET_IFNAME": "lo"}
    return {**ours, "PYTHONPATH": str(ROOT), **quick, **more}


_started: list[subprocess.Popen[str]] = []


def start(command: list[str], **more: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command, env=environment(**more), start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    _started.append(process)
    return process


def finish(process: subprocess.Popen[str], fails: bool = False, timeout: float = 90) -> tuple[str, str]:
    """What it printed, to stdout and to stderr."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        out, err = end(process)
        pytest.fail(f"{process.args!r} took over {timeout} s\n{out}\n{err}")
    assert (process.returncode != 0) == fails, f"{process.args!r} ended with {process.returncode}\n{out}\n{err}"
    return out, err


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """End a launcher that still runs, and then those of its descendants that it did not end itself."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        for descendant in psutil.wait_procs(family, timeout=5)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                descendant.kill()
    try:
        return process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate(timeout=10)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    while _started:
        process = _started.pop()
        if process.poll() is None:
            end(process)


def test_ci_installs_every_launcher() -> None:
    script = (ROOT / ".ci/run").read_text()
    for program, package in PACKAGES.items():
        assert re.search(rf" {program}:{package}[ ;]", script), f"{package} is missing in .ci/run"
    assert "export PMOD_TEST_LAUNCHERS=all\n" in script


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[str, str]]:
    """The variables of a Slurm of two nodes."""
    need(*slurm.PROGRAMS)
    with slurm.cluster() as variables:
        yield variables


# --- the same script under every launcher -----------------------------------------------------------------------------


def loss(printed: str, launcher: str, ranks: int) -> float:
    """Of what the script printed, once and under this launcher."""
    found = re.fullmatch(r"(\w+) (\d+) ranks, loss (\d\.\d{10}e[+-]\d\d)\n", printed)
    assert found, printed
    assert (found[1], int(found[2])) == (launcher, ranks)
    return float(found[3])


@pytest.fixture(scope="module")
def alone() -> float:
    """The loss in one process."""
    value = loss(finish(start([sys.executable, TRAIN]))[0], "single", 1)
    assert value < 1.0, "it does not train"
    return value


# command, launcher, ranks
COMMANDS = {
    "torchrun": ([*TORCHRUN, "--standalone", "--nproc-per-node", "2"], "env", 2),
    "mpirun": ([*MPIRUN, "-n", "2", sys.executable], "openmpi", 2),
    "mpiexec.hydra": (["mpiexec.hydra", "-n", "2", sys.executable], "pmi", 2),
    "srun": (["srun", "-N", "1", "-n", "2", sys.executable], "slurm", 2),
    "srun on two nodes": (["srun", "-N", "2", "-n", "4", sys.executable], "slurm", 4),
}


def variables_for(launcher: str, request: pytest.FixtureRequest) -> dict[str, str]:
    """What the commands of a launcher need: of Slurm, one that runs."""
    return request.getfixturevalue("nodes") if launcher == "slurm" else {}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_loss(name: str, alone: float, request: pytest.FixtureRequest) -> None:
    command, launcher, ranks = COMMANDS[name]
    need(command[0])
    printed, _ = finish(start([*command, TRAIN], **variables_for(launcher, request)))
    assert loss(printed, launcher, ranks) == pytest.approx(alone, rel=1e-10)


@pytest.mark.parametrize("name", ["torchrun", "mpirun", "mpiexec.hydra", "srun"])
def test_the_benchmark_measures_on_the_ranks_of_a_launcher(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    command, launcher, ranks = COMMANDS[name]
    need(command[0])
    file = tmp_path / "bench.json"
    sections = ["--memory", "--only", "latency", "ragged", "step"]
    bench = ["-m", "pmod.bench", "--rounds", "1", *sections, "--json", str(file)]
    printed, _ = finish(start([*command, *bench], **variables_for(launcher, request)))
    written = json.loads(file.read_text())
    assert written["ranks"] == ranks and len(written["memory"]) == 4
    assert {result["section"] for result in written["results"]} == {"latency", "ragged", "step"}
    # one rank prints
    assert printed.count("step: ") == 1


def batch(nodes: dict[str, str], folder: Path, tasks: int, line: str) -> str:
    """What a batch script of one line prints, on one node."""
    output, end = folder / "output", time.monotonic() + 90
    options = ["--parsable", "-N", "1", "-n", str(tasks), "-o", str(output)]
    job = finish(start(["sbatch", *options, "--wrap", line], **nodes))[0].strip()
    state = "PENDING"
    while state in ("PENDING", "RUNNING", "COMPLETING"):  # sbatch --wait asks every ten seconds
        assert time.monotonic() < end, f"{state} after 90 s\n{output.read_text()}"
        time.sleep(0.1)
        state = re.findall(r"JobState=(\w+)", finish(start(["scontrol", "show", "job", job], **nodes))[0])[0]
    assert state == "COMPLETED", f"{state}\n{output.read_text()}"
    return output.read_text()


def test_the_same_loss_under_srun_in_sbatch(alone: float, nodes: dict[str, str], tmp_path: Path) -> None:
    printed = batch(nodes, tmp_path, 2, f"srun {sys.executable} {TRAIN}")
    assert loss(printed, "slurm", 2) == pytest.approx(alone, rel=1e-10)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[namespaces.Host]]:
    need("ip")
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(namespaces.two_hosts())
        except PermissionError as error:
            pytest.skip(f"network namespaces are not permitted here: {error}")
        yield made


def test_the_same_loss_on_two_hosts(alone: float, hosts: list[namespaces.Host]) -> None:
    shared = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", hosts[0].address, "--master-port", "29500"]
    agents = [
        start([*host.inside, *TORCHRUN, *shared, "--node-rank", str(number), TRAIN], GLOO_SOCKET_IFNAME=host.name)
        for number, host in enumerate(hosts)
    ]
    printed = [finish(agent)[0] for agent in agents]
    assert printed[1] == ""
    assert loss(printed[0], "env", 2) == pytest.approx(alone, rel=1e-10)


async def run_in_kernel(cells: list[str], ranks: int, folder: Path) -> list[list[str]]:
    """What each cell prints on the ranks of a jupyter-distributed kernel, started as its server extension does."""
    from jupyter_distributed.coordinator import DistributedKernelCoordinator

    kernels, printed = AsyncMultiKernelManager(), list[list[str]]()
    coordinator = DistributedKernelCoordinator(kernels, registry_dir=folder)
    try:
        name = await kernels.start_kernel(kernel_name="python3", env=environment())
        await coordinator.set_world_size(name, ranks)
        client = kernels.get_kernel(name).client()
        client.start_channels()
        try:
            await client.wait_for_ready(timeout=60)
            for cell in cells:
                shown: list[dict[str, Any]] = []
                reply = await client.execute_interactive(cell, timeout=90, output_hook=shown.append)
                data = [message["content"]["data"] for message in shown if "data" in message["content"]]
                last = data[-1]["application/vnd.jupyter-distributed.rank+json"]["ranks"] if data else []
                assert reply["content"]["status"] == "ok", (cell, last, reply)
                printed.append(["".join(part["content"].get("text", "") for part in rank["outputs"]) for rank in last])
        finally:
            client.stop_channels()
    finally:
        await kernels.shutdown_all()
        await coordinator.reaper.reap()  # of a kernel that did not end its ranks
    return printed


def printed_in_kernel(cells: list[str], folder: Path) -> list[list[str]]:
    """What each cell prints on each of two ranks (nothing at all is an empty list); none fails."""
    if importlib.util.find_spec("jupyter_distributed") is None:
        absent("pip install jupyter-distributed")
    return asyncio.run(run_in_kernel(cells, 2, folder))


in_kernel = pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client", "ignore:.*:RuntimeWarning:zmq")


@in_kernel
def test_the_same_loss_in_a_kernel_of_jupyter_distributed(alone: float, tmp_path: Path) -> None:
    (printed,) = printed_in_kernel([f"%run {TRAIN}"], tmp_path)
    assert printed[1] == ""
    assert loss(printed[0], "env", 2) == pytest.approx(alone, rel=1e-10)


CELLS = ["%load_ext pmod.notebook\nfrom pmod import notebook\nimport pmod, torch", "%mesh data=2",
         "%%spmd data=1\nprint('one', pmod.axis_index('data'))",
         "%%spmd\nprint(pmod.psum(torch.ones(1), 'data'))\nx = torch.arange(1 + pmod.axis_index('data'))",
         "print(notebook.pull('x'), notebook.pull('x', dim=0))",
         "%%spmd data=1\ny = 5",
         "try:\n    notebook.pull('y')\nexcept NameError as error:\n    print(error)",
         # the ranks' own values differ: those of the first count
         "me = pmod.axis_index('data')\nnotebook.push({'z': torch.arange(3) + 10 * me}, dim=0)\nprint(z)",
         "import os, signal, threading\nstop = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))",
         "%%spmd data=0\nstop.start()\ntry:\n    pmod.psum(1, 'data')\nexcept KeyboardInterrupt:\n    print('stopped')",
         "%mesh data=2", "%%spmd\nprint(pmod.psum(torch.ones(1), 'data'))",
         "import psutil\nprint([c.cmdline() for c in psutil.Process().children(recursive=True)])"]  # fmt: skip


@in_kernel
def test_the_cells_of_a_notebook_in_a_kernel_of_jupyter_distributed(tmp_path: Path) -> None:
    """Its processes are the ranks: nothing is started, and each cell runs in all of them, or on those that it names."""
    printed = printed_in_kernel(CELLS, tmp_path)
    one, sums, pulled, lacking, pushed, stopped, anew, engines = itemgetter(2, 3, 4, 6, 7, 9, 11, 12)(printed)
    assert one == ["", "one 1\n"]
    assert sums == anew == ["tensor([2.])\n"] * 2 and stopped == ["stopped\n", ""]
    assert pulled == ["[tensor([0]), tensor([0, 1])] tensor([0, 0, 1])\n"] * 2
    assert lacking == ["pmod.notebook.pull: 'y' is not defined on data=0.\n"] * 2
    assert pushed == ["tensor([0, 1])\n", "tensor([2])\n"]
    assert not any("ipyparallel" in text for text in engines), engines


@in_kernel
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_as_it_is_in_a_kernel_of_jupyter_distributed(path: Path, tmp_path: Path) -> None:
    printed_in_kernel([cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"], tmp_path)


# --- where the ranks meet ---------------------------------------------------------------------------------------------

Said = tuple[str, int, int, str, str]  # launcher, rank, size, port, sum


def said(printed: str) -> list[Said]:
    """What the ranks say of themselves, in order."""
    found = re.findall(r"(\w+) (\d+)/(\d+) met at [\w.]+:(\w+), sum (\d+)\.", printed)
    return sorted((launcher, int(rank), int(size), port, total) for launcher, rank, size, port, total in found)


@pytest.mark.parametrize("name", ["mpirun", "mpiexec.hydra", "srun"])
def test_two_jobs_at_once_do_not_mix(name: str, request: pytest.FixtureRequest) -> None:
    command, launcher, ranks = COMMANDS[name]
    need(command[0])
    more = variables_for(launcher, request)
    jobs = [start([*command, RANK, number], **more) for number in ("1", "10")]
    printed = [said(finish(job)[0]) for job in jobs]
    ports = [lines[0][3] for lines in printed]
    assert ports[0] != ports[1]
    for lines, port, total in zip(printed, ports, (ranks, 10 * ranks), strict=True):
        assert lines == [(launcher, rank, ranks, port, str(total)) for rank in range(ranks)]


def test_a_taken_port_is_reported() -> None:
    need("mpirun.openmpi")
    _, told = finish(start([*COMMANDS["mpirun"][0], TAKEN]), fails=True)
    assert re.search(r"TopologyError: pmod\.make_mesh: port \d+ of 127\.0\.0\.1 is taken", told), told
    assert "Set MASTER_PORT to a free port" in told


# --- traps ------------------------------------------------------------------------------------------------------------

ONE = [("single", 0, 1, "None", "7")]


def test_a_batch_script_without_srun_is_one_process(nodes: dict[str, str], tmp_path: Path) -> None:
    printed = batch(nodes, tmp_path, 4, f"{sys.executable} {RANK} 7")
    assert said(printed) == ONE
    assert "one process, because srun did not start it" in printed and "srun python script.py" in printed


def variables(command: list[str], folder: Path, **more: str) -> list[dict[str, str]]:
    """The variables of each process that a command starts."""
    finish(start([*command, VARIABLES, str(folder)], **more))
    return [json.loads(path.read_text()) for path in folder.iterdir()]


def test_a_shell_of_salloc_is_one_process(
    nodes: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (told,) = variables(["salloc", "-n", "4", sys.executable], tmp_path, **nodes)
    assert told["SLURM_NTASKS"] == "4"
    assert Topology.detect(told, device_count=0) == Topology(rank=0, world_size=1)
    assert "one process, because srun did not start it" in caplog.text and "srun python script.py" in caplog.text


@pytest.mark.parametrize("name", ["mpirun", "mpiexec.hydra"])
def test_mpi_inside_an_allocation_of_two_nodes(name: str, nodes: dict[str, str]) -> None:
    command, launcher, _ = COMMANDS[name]
    need(command[0])
    printed, _ = finish(start(["salloc", "-N", "2", "-n", "2", *command, RANK, "7"], **nodes))
    lines = said(printed)
    assert lines == [(launcher, rank, 2, lines[0][3], "14") for rank in range(2)]


INCOMPLETE = "the launcher's environment is incomplete"
# launcher -> changes of its variables, and a text in what is then detected
NO_GPU, ONE_GPU = 0, 1
CASES: dict[str, list[tuple[dict[str, str | None], int, str]]] = {
    "torchrun": [
        ({}, NO_GPU, "world_size=2"),
        ({}, ONE_GPU, "device(type='cuda', index=0)"),  # each task has a GPU of its own
        *(({name: None}, NO_GPU, f"{INCOMPLETE}: {name} is not set")
          for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")),
        ({"RANK": "one"}, NO_GPU, "RANK is 'one'"),
        ({"MASTER_PORT": ""}, NO_GPU, "MASTER_PORT is empty"),
        ({"LOCAL_RANK": "2"}, NO_GPU, "local_rank is 2, and local_world_size is 2"),
        ({"PMOD_LAUNCHER": "single"}, NO_GPU, "world_size=1"),
        ({"PMOD_LAUNCHER": "slurm"}, NO_GPU, "SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_STEP_ID are not set"),
    ],
    "mpirun": [
        ({}, NO_GPU, "world_size=2"),
        ({}, ONE_GPU, "device(type='cuda', index=0)"),
        *(({name: None}, NO_GPU, f"{INCOMPLETE}: {name} is not set")
          for name in ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")),
        ({"OMPI_COMM_WORLD_SIZE": "-2"}, NO_GPU, "OMPI_COMM_WORLD_SIZE is '-2'"),
        ({"OMPI_COMM_WORLD_RANK": "2"}, NO_GPU, "rank is 2, and world_size is 2"),
        ({"WORLD_SIZE": "4"}, NO_GPU, "WORLD_SIZE is '4', but OMPI_COMM_WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "4", "PMOD_LAUNCHER": "openmpi"}, NO_GPU, "world_size=2"),
        ({"PMOD_LAUNCHER": "single"}, NO_GPU, "world_size=1"),
        ({"RANK": "0"}, NO_GPU, f"{INCOMPLETE}: WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set"),
    ],
    "mpiexec.hydra": [
        ({}, NO_GPU, "world_size=2"),
        ({}, ONE_GPU, "device(type='cuda', index=0)"),
        *(({name: None}, NO_GPU, f"{INCOMPLETE}: {name} is not set") for name in ("PMI_RANK", "PMI_SIZE")),
        ({"PMI_SIZE": "2.0"}, NO_GPU, "PMI_SIZE is '2.0'"),
        ({"PMI_RANK": "2"}, NO_GPU, "rank is 2, and world_size is 2"),
        ({"MPI_LOCALRANKID": "2"}, NO_GPU, "local_rank is 2, and local_world_size is 2"),
        ({"PMOD_LAUNCHER": "single"}, NO_GPU, "world_size=1"),
        ({"PMOD_LAUNCHER": "hydra"}, NO_GPU, "It is one of env, openmpi, pmi, slurm, single"),
    ],
    "srun": [
        ({}, NO_GPU, "world_size=2"),
        ({}, ONE_GPU, "device(type='cuda', index=0)"),
        *(({name: None}, NO_GPU, f"{INCOMPLETE}: {name} is not set")
          for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")),
        ({"SLURM_PROCID": "1", "SLURM_STEP_ID": None}, NO_GPU, f"{INCOMPLETE}: SLURM_STEP_ID is not set"),
        ({"SLURM_PROCID": "?"}, NO_GPU, "SLURM_PROCID is '?'"),
        ({"SLURM_STEP_TASKS_PER_NODE": "3"}, NO_GPU, "It shares SLURM_STEP_NUM_TASKS=2 tasks out among the nodes"),
        ({"WORLD_SIZE": "4"}, NO_GPU, "WORLD_SIZE is '4', but SLURM_STEP_NUM_TASKS is 2"),
        ({"PMOD_LAUNCHER": "single"}, NO_GPU, "world_size=1"),
        ({"PMOD_LAUNCHER": "pmi"}, NO_GPU, f"{INCOMPLETE}: PMI_RANK, PMI_SIZE are not set"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_changed_variables_are_noticed(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    command, launcher, ranks = COMMANDS[name]
    need(command[0])
    told = variables(command, tmp_path, **variables_for(launcher, request))
    assert len(told) == ranks
    for environ, (change, count, expected) in itertools.product(told, CASES[name]):
        changed = {key: value for key, value in {**environ, **change}.items() if value is not None}
        try:
            found = repr(Topology.detect(changed, device_count=count))
        except TopologyError as error:
            found = str(error)
        assert expected in found, change


def test_ranks_that_are_forced_to_be_alone_are() -> None:
    command, _, ranks = COMMANDS["mpirun"]
    need(command[0])
    printed, _ = finish(start([*command, RANK, "7"], PMOD_LAUNCHER="single"))
    assert [(*line[:3], line[4]) for line in said(printed)] == [("single", 0, 1, "7")] * ranks


def test_nobody_waits_for_a_rank_that_ended(nodes: dict[str, str]) -> None:
    need("mpiexec.hydra")
    # mpirun ends the others itself, these two let them wait
    jobs = [start([*COMMANDS[name][0], LEAVE], **nodes, PMOD_TIMEOUT="20") for name in ("mpiexec.hydra", "srun")]
    for job in jobs:
        printed, _ = finish(job, fails=True, timeout=60)
        assert re.search(r"rank 0 got [A-Z]\w+\.", printed), printed


def test_a_restart_of_torchrun_meets_anew() -> None:
    restarting = [*COMMANDS["torchrun"][0], "--max-restarts", "1"]
    printed, _ = finish(start([*restarting, LEAVE]))
    assert printed.count("rank 0 got 2.") == printed.count("rank 1 got 2.") == 1


def test_an_interface_that_does_not_reach_the_other_host_is_named(hosts: list[namespaces.Host]) -> None:
    there = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    there |= {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29500", "PMOD_TIMEOUT": "20"}
    jobs = [  # gloo takes lo here, as it does where the name of the host stands for 127.0.0.1
        start([*host.inside, sys.executable, RANK, "1"], **there, RANK=str(rank)) for rank, host in enumerate(hosts)
    ]
    told = [finish(job, fails=True, timeout=60)[1] for job in jobs]
    assert any("GLOO_SOCKET_IFNAME" in text for text in told), told
