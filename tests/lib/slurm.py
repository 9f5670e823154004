"""Slurm on loopback, for the tests: munged, slurmctld and a slurmd per node, in a folder and on ports of their own."""

# pyright: standard

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.lib.started import free_ports

# program -> the Debian package that has it
PROGRAMS = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client"}
NODES = ("n1", "n2")  # both are this machine
CONFIG = """\
ClusterName=pmod
FirstJobId={job}
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=2
NodeName=DEFAULT CPUs=8 RealMemory=1000 State=UNKNOWN
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]}
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def find(program: str) -> str | None:
    """Where a program is: the folder of daemons is not on everybody's PATH."""
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


@contextlib.contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """Two idle nodes while it lasts; the variables with which srun, sbatch and salloc find them."""
    # not a folder of pytest: the path of a socket has 107 letters at most
    folder = Path(tempfile.mkdtemp(prefix="pmod-slurm-"))
    folder.chmod(0o755)  # munged wants its socket within reach of everybody
    (folder / "state").mkdir()
    config = folder / "slurm.conf"
    job = 1 + secrets.randbelow(10**7)  # ports follow from jobs, and another Slurm on this machine may count from 1
    config.write_text(CONFIG.format(folder=folder, user=getpass.getuser(), ports=free_ports(3), job=job))
    environ = {**os.environ, "SLURM_CONF": str(config)}
    try:
        with contextlib.ExitStack() as daemons:
            daemons.enter_context(_daemon(folder, environ, "munged", *_munge(folder)))
            _wait(folder, "munged", (folder / "munge.socket").exists)
            daemons.enter_context(_daemon(folder, environ, "slurmctld", "-D", "-c"))
            for node in NODES:
                daemons.enter_context(_daemon(folder, environ, "slurmd", "-D", "-c", "-N", node))
            idle = ["idle"] * len(NODES)
            _wait(folder, "the nodes", lambda: _ask(environ, "sinfo", "-h", "-N", "-o", "%T") == idle)
            try:
                yield {"SLURM_CONF": str(config)}
            finally:
                _ask(environ, "scancel", "--full", "--user", getpass.getuser())
                _wait(folder, "the last jobs", lambda: not _ask(environ, "squeue", "-h"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _munge(folder: Path) -> list[str]:
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    files = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    return ["--foreground", "--force", f"--key-file={key}", *files]  # --force: though others may write to /tmp


@contextlib.contextmanager
def _daemon(folder: Path, environ: Mapping[str, str], program: str, *arguments: str) -> Iterator[None]:
    path = find(program)
    assert path is not None, f"{program} is not installed"
    with (folder / f"{program}.out").open("ab") as out:
        process = subprocess.Popen([path, *arguments], env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ask(environ: Mapping[str, str], *command: str) -> list[str]:
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, check=False)
    return (done.stdout + done.stderr).split()


def _wait(folder: Path, what: str, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not ready():
        if time.monotonic() > deadline:
            files = [*folder.glob("*.log"), *folder.glob("*.out")]
            logs = [f"{path.name}:\n{path.read_text()[-2000:]}" for path in files]
            raise TimeoutError("\n".join([f"waited 30 s for {what}", *logs]))
        time.sleep(0.1)
