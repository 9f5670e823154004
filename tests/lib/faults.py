"""`python -m tests.lib.faults --trials 30`: hurt a rank of the demo at a random moment, and look what the others do.

A rank is killed, stopped for good (SIGSTOP), or held up for a while. The others of one that is killed or stopped must
end with an error that says so, and how long that took is printed; a job that was only held up must end as an
undisturbed one, to the last bit. Anything else is a hang or a wrong result, and the exit status is 1.

`python -m tests.lib.faults --short --trials 300 --beside 4`: many more, of small jobs and more kinds (`short_faults`).
"""

# pyright: standard

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import attrs

from tests.lib import short_faults

ROOT = Path(__file__).parents[2]
DEADLINE = 6.0  # PMOD_TIMEOUT of the ranks
PATIENCE = 40.0  # seconds until a rank that is still there counts as a hang
ERROR = "pmod._errors.CollectiveTimeout"
JOB = "--train 16 --test 4 --batch 8 --size 12 --steps 60 --channels 8 --modes 3 --layers 2 --float64 --no-serial"


def rank_main() -> None:
    """One rank of the demo; the first prints the losses in all digits."""
    import torch

    import pmod
    from pmod.demo import parallel
    from pmod.demo.options import parse

    with pmod.set_mesh(pmod.make_mesh(data=1, space=-1)):
        print("connected", flush=True)
        outcome = parallel.train(parse(JOB.split()), None)
    if outcome is not None:
        print(json.dumps(torch.as_tensor(outcome.run.losses).tolist()), flush=True)


@attrs.frozen
class Ended:
    """A rank that is over."""

    status: int
    at: float
    output: str


class Job:
    """The ranks of one trial, each a process of this machine."""

    def __init__(self, size: int, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self._files = [folder / f"rank{rank}" for rank in range(size)]
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.knew: dict[int, float] = {}  # when a rank printed the error
        for rank, path in enumerate(self._files):
            variables = {
                "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PMOD_TIMEOUT": DEADLINE, "OMP_NUM_THREADS": 1,
            }  # fmt: skip
            with path.open("wb") as output:
                self.ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.lib.faults", "--rank"], cwd=ROOT, stdout=output, stderr=output,
                        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
                    )
                )  # fmt: skip

    def output(self, rank: int) -> str:
        return self._files[rank].read_text(errors="replace")

    def wait(self, ranks: Sequence[int], until: float) -> dict[int, Ended]:
        """Those of the ranks that end in time."""
        ended: dict[int, Ended] = {}
        while len(ended) < len(ranks) and time.monotonic() < until:
            for rank in set(ranks) - set(ended):
                if rank not in self.knew and ERROR in self.output(rank):
                    self.knew[rank] = time.monotonic()
                status = self.ranks[rank].poll()
                if status is not None:
                    ended[rank] = Ended(status, time.monotonic(), self.output(rank))
            time.sleep(0.02)
        return ended

    def connected(self, until: float) -> float:
        """When all ranks have met."""
        while not all("connected" in self.output(rank) for rank in range(len(self.ranks))):
            if time.monotonic() > until:
                raise SystemExit("the ranks did not even start:\n" + self.output(0))
            time.sleep(0.02)
        return time.monotonic()

    def end(self) -> None:
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.wait()


def losses_of(output: str) -> list[float] | None:
    """What the first rank printed at its end."""
    last = output.strip().rpartition("\n")[2]
    return json.loads(last) if last.startswith("[") and last.endswith("]") else None


def undisturbed(size: int) -> tuple[list[float], float]:
    """The losses of the job, and its seconds from the meeting to the end."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(size, Path(folder))
        try:
            began = job.connected(time.monotonic() + 120)
            ended = job.wait(range(size), time.monotonic() + 120)
            losses = losses_of(ended[0].output) if 0 in ended else None
            if losses is None or any(end.status for end in ended.values()):
                raise SystemExit("the demo fails undisturbed:\n" + job.output(0))
            return losses, ended[0].at - began
        finally:
            job.end()


def trial(size: int, action: str, victim: int, after: float, pause: float, losses: Sequence[float]) -> tuple[str, str]:
    """What came of hurting a rank so many seconds after the ranks met: ok, HANG or WRONG, and what was seen."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(size, Path(folder))
        try:
            job.connected(time.monotonic() + 120)
            time.sleep(after)
            others = [rank for rank in range(size) if rank != victim]
            if any(rank.poll() is not None for rank in job.ranks):
                return "ok", "it was over before"
            os.kill(job.ranks[victim].pid, signal.SIGKILL if action == "kill" else signal.SIGSTOP)
            hurt = time.monotonic()
            if action == "delay":
                time.sleep(pause)
                os.kill(job.ranks[victim].pid, signal.SIGCONT)
                return _as_undisturbed(job, job.wait(range(size), time.monotonic() + 120), losses)
            return _as_it_should_fail(job, job.wait(others, hurt + PATIENCE), others, hurt)
        finally:
            job.end()


def _as_undisturbed(job: Job, ended: dict[int, Ended], losses: Sequence[float]) -> tuple[str, str]:
    if len(ended) < len(job.ranks):
        return "HANG", f"{len(job.ranks) - len(ended)} ranks are still there"
    if any(end.status for end in ended.values()):
        return "WRONG", "a rank that was only late was given up:\n" + "\n".join(end.output for end in ended.values())
    same = losses_of(ended[0].output) == losses
    return ("ok", "the same losses") if same else ("WRONG", f"other losses:\n{ended[0].output}")


def _as_it_should_fail(job: Job, ended: dict[int, Ended], others: Sequence[int], hurt: float) -> tuple[str, str]:
    if len(ended) < len(others):
        return "HANG", f"{len(others) - len(ended)} ranks are still there:\n{job.output(others[0])}"
    if any(end.status == 0 for end in ended.values()):
        # the last message of a job may be behind all of them when the rank is hurt
        whole = all(end.status == 0 for end in ended.values())
        return ("ok", "it was over for the others") if whole else ("WRONG", "some ranks noticed nothing")
    nameless = [end.output for end in ended.values() if ERROR not in end.output]
    if nameless:
        return "WRONG", "an error that is not ours:\n" + nameless[0]
    return "ok", f"the others knew after {max(job.knew.values()) - hurt:.1f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials; 1 where one hangs or is wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--short" in given:
        given.remove("--short")
        return short_faults.main(given)
    parser = argparse.ArgumentParser(prog="python -m tests.lib.faults", description=__doc__)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.rank:
        rank_main()
        return 0
    draw = random.Random(options.seed)
    expected = {size: undisturbed(size) for size in (2, 3)}
    bad = 0
    for number in range(options.trials):
        size, action = 2 + number % 2, ("kill", "stop", "delay")[number % 3]
        losses, seconds = expected[size]
        victim, after, pause = draw.randrange(size), draw.uniform(0, seconds), draw.uniform(0.2, 0.5 * DEADLINE)
        verdict, seen = trial(size, action, victim, after, pause, losses)
        bad += verdict != "ok"
        print(f"{number:3}  {action:5}  rank {victim} of {size} after {after:4.1f} s  {verdict:5}  {seen}", flush=True)
    print(f"{options.trials} trials, {bad} of them a hang or a wrong result")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
