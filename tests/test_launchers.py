"""Real launchers start real processes: one script prints the same under each, and nobody waits for ranks that nobody
started. A launcher that is not installed is a skip, or with PMOD_TEST_LAUNCHERS=all (what CI sets) a failure."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import slurm

ROOT = Path(__file__).parents[1]
TRAIN = str(ROOT / "tests/scripts/train.py")
# program -> the Debian package that has it
PACKAGES = {"mpirun.openmpi": "openmpi-bin", "mpiexec.hydra": "mpich", "ip": "iproute2", **slurm.PROGRAMS}
# what another launcher may have told the process that runs these tests
TOLD = re.compile(r"(SLURM|SBATCH|SALLOC|OMPI|PMIX|PMI|MPI|HYDI|HYDRA|TORCHELASTIC|PMOD)_|(LOCAL_|GROUP_|ROLE_)?RANK$|"
                  r"(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE$|MASTER_(ADDR|PORT)$")  # fmt: skip

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
MPIRUN = ["mpirun.openmpi", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none",
          "--mca", "oob_tcp_if_include", "lo"]  # fmt: skip


def need(*programs: str) -> None:
    """Skip where a program is not installed; where all must be, fail."""
    missing = sorted({PACKAGES[program] for program in programs if slurm.find(program) is None})
    if missing:
        say = pytest.fail if os.environ.get("PMOD_TEST_LAUNCHERS") == "all" else pytest.skip
        say(f"not installed: apt-get install -y --no-install-recommends {' '.join(missing)}")


def environment(**more: str) -> dict[str, str]:
    """What a user's shell has, and nothing of a launcher; on one machine gloo keeps to loopback."""
    ours = {name: value for name, value in os.environ.items() if not TOLD.match(name)}
    quick = {"OMP_NUM_THREADS": "1", "PMOD_TIMEOUT": "60", "GLOO_SOCKET_IFNAME": "lo"}
    return {**ours, "PYTHONPATH": str(ROOT), **quick, **more}


def start(command: list[str], **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, env=environment(**more), start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], fails: bool = False, timeout: float = 90) -> tuple[str, str]:
    """What it printed, to stdout and to stderr."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # a launcher ends its ranks when it is asked to end
        try:
            out, err = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
        pytest.fail(f"{process.args!r} took over {timeout} s\n{out}\n{err}")
    assert (process.returncode != 0) == fails, f"{process.args!r} ended with {process.returncode}\n{out}\n{err}"
    return out, err


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
    "mpirun": ([*MPIRUN, "-n", "3", sys.executable], "openmpi", 3),
    "mpiexec.hydra": (["mpiexec.hydra", "-n", "2", sys.executable], "pmi", 2),
    "srun": (["srun", "-N", "1", "-n", "2", sys.executable], "slurm", 2),
    "srun on two nodes": (["srun", "-N", "2", "-n", "4", sys.executable], "slurm", 4),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_loss(name: str, alone: float, request: pytest.FixtureRequest) -> None:
    command, launcher, ranks = COMMANDS[name]
    if command[0] in PACKAGES:
        need(command[0])
    more = request.getfixturevalue("nodes") if launcher == "slurm" else {}
    printed, _ = finish(start([*command, TRAIN], **more))
    assert loss(printed, launcher, ranks) == pytest.approx(alone, rel=1e-10)
