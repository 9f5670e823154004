"""Many short trials, for `python -m tests.lib.faults --short`: each hurts one rank of a small job at a random moment.

A trial forks its ranks from a process that has imported torch already, so that it costs about a second. What a rank
goes through, it writes into a file: that it met the others, the error that it got, how long `shutdown` took, what the
survivors' new mesh adds up to. A verdict is "ok", "HANG", "WRONG", "NAMELESS" (an error that does not name the hurt
rank) or "ALSO" (one that blames another, too).
"""

# pyright: standard

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

ACTIONS = ("kill", "stop", "interrupt", "early", "delay")
DEADLINES = {"kill": 30.0, "stop": 4.0, "interrupt": 30.0, "early": 8.0, "delay": 30.0}  # timeout= of the ranks' mesh
AGAIN = 40.0  # and of the mesh that the survivors make, some of which wait for the first one until its deadline
PATIENCE = 60.0  # seconds until a rank that is still there counts as a hang
STEPS = 40  # of a job that is only held up


@attrs.frozen
class Plan:
    """What one trial does; all of it follows from the seed."""

    seed: int
    size: int
    action: str
    victim: int
    after: float  # seconds from the meeting (of an early death: from the start)
    pause: float  # of a delay

    @staticmethod
    def of(seed: int, actions: Sequence[str] = ACTIONS) -> Plan:
        draw = random.Random(seed)
        size, action = draw.choice((2, 3, 4)), draw.choice(actions)
        after = draw.uniform(0.0, 0.1 if action == "early" else 0.6)
        return Plan(seed, size, action, draw.randrange(size), after, draw.uniform(0.2, 2.0))

    @property
    def sizes(self) -> dict[str, int]:
        """The mesh: two axes where that goes, so that a rank may wait for one that waits for the victim."""
        return {"a": 2, "b": 2} if self.size == 4 else {"a": self.size}

    @property
    def others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.victim]


# --- a rank ---------------------------------------------------------------------------------------


def be_rank(plan: Plan, rank: int, ports: Sequence[int], file: Path) -> None:
    """The life of a rank, in a forked process."""
    import pmod

    def say(event: str, value: Any = None) -> None:
        with file.open("a") as lines:
            lines.write(json.dumps([event, value]) + "\n")

    def place(rank: int, size: int, port: int) -> pmod.Topology:
        return pmod.Topology(
            rank=rank, world_size=size, local_rank=rank, local_world_size=size, master_addr="127.0.0.1",
            master_port=port, launcher="env",
        )  # fmt: skip

    deadline = DEADLINES[plan.action]
    try:
        mesh = pmod.make_mesh(plan.sizes, topology=place(rank, plan.size, ports[0]), timeout=deadline)
        with pmod.set_mesh(mesh):
            _work(plan, rank, say)
        say("done")
        return
    except (pmod.PmodError, KeyboardInterrupt) as error:
        say("error", f"{type(error).__name__}: {error}")
    began = time.monotonic()
    pmod.shutdown()
    say("shutdown", time.monotonic() - began)
    if plan.action == "interrupt":  # all are still there
        again = pmod.make_mesh(plan.sizes, topology=place(rank, plan.size, ports[0]), timeout=AGAIN)
    else:
        others = plan.others
        where = place(others.index(rank), len(others), ports[1])
        again = pmod.make_mesh({"a": len(others)}, topology=where, timeout=AGAIN)
    with pmod.set_mesh(again):
        say("again", pmod.psum(rank, tuple(again.axis_names)))


def _work(plan: Plan, rank: int, say: Any) -> None:
    """Random collectives, the same on all ranks, whose results are known."""
    import torch

    import pmod

    draw, own = random.Random(plan.seed), random.Random(f"{plan.seed} {rank}")
    mesh = pmod.current_mesh()
    pmod.barrier(tuple(mesh.axis_names))
    say("met")
    step = 0
    while plan.action != "delay" or step < STEPS:
        step += 1
        name, axis = draw.choice(("psum", "all_gather", "pshift", "barrier")), draw.choice(list(mesh.axis_names))
        x = torch.full((draw.choice((1, 100, 50_000)),), float(100 * step + rank))
        ranks = list(mesh.bind(axis, "test").ranks)
        index = ranks.index(rank)
        if name == "psum":
            right = bool((pmod.psum(x, axis) == sum(100 * step + other for other in ranks)).all())
        elif name == "all_gather":
            right = pmod.all_gather(x, axis).view(len(ranks), -1)[:, 0].tolist() == [100 * step + r for r in ranks]
        elif name == "pshift":
            right = bool((pmod.pshift(x, axis) == 100 * step + ranks[index - 1]).all())
        else:
            pmod.barrier(axis)
            right = True
        if not right:
            say("wrong", f"step {step}: {name} along {axis}")
        time.sleep(own.uniform(0.0, 0.01))


# --- its parent -----------------------------------------------------------------------------------


class Forked:
    """The ranks of one trial."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        ports = [server.getsockname()[1] for server in servers]
        for server in servers:
            server.close()
        self.files = [folder / f"rank{rank}" for rank in range(plan.size)]
        self.errors = [folder / f"stderr{rank}" for rank in range(plan.size)]
        self.status: dict[int, int] = {}
        self.pids = [self._fork(plan, rank, ports) for rank in range(plan.size)]

    def _fork(self, plan: Plan, rank: int, ports: Sequence[int]) -> int:
        pid = os.fork()
        if pid:
            return pid
        with self.errors[rank].open("wb") as stderr:
            os.dup2(stderr.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        faulthandler.register(signal.SIGUSR1)
        status = 0
        try:
            be_rank(plan, rank, ports, self.files[rank])
        except BaseException:
            traceback.print_exc()
            status = 1
        ctypes.pythonapi.Py_Exit(status)  # as a program ends; to leave the stack would end what its parent began
        raise AssertionError

    def events(self, rank: int) -> dict[str, Any]:
        """What it has said, the last of each kind."""
        try:
            lines = self.files[rank].read_text().splitlines()
        except FileNotFoundError:
            return {}
        return {event: value for event, value in map(json.loads, lines)}

    def reap(self, rank: int) -> bool:
        """Whether it is over."""
        if rank not in self.status:
            pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
            if pid:
                self.status[rank] = os.waitstatus_to_exitcode(status)
        return rank in self.status

    def until(self, ranks: Sequence[int], happened: Any, seconds: float) -> list[int]:
        """Wait for this of each rank; those of which it has not come in time."""
        deadline, left = time.monotonic() + seconds, list(ranks)
        while left and time.monotonic() < deadline:
            left = [rank for rank in left if not happened(rank)]
            time.sleep(0.005)
        return left

    def end(self) -> None:
        for rank, pid in enumerate(self.pids):
            if not self.reap(rank):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def trial(plan: Plan) -> tuple[str, str]:
    """The verdict, and what was seen."""
    folder = Path(tempfile.mkdtemp())  # a TemporaryDirectory would end with the first rank
    job = Forked(plan, folder)
    try:
        return _judged(plan, job)
    finally:
        job.end()
        shutil.rmtree(folder)


def _judged(plan: Plan, job: Forked) -> tuple[str, str]:
    if plan.action != "early":
        late = job.until(range(plan.size), lambda rank: "met" in job.events(rank) or job.reap(rank), PATIENCE)
        if late or job.status:
            return "HANG", f"ranks {late or sorted(job.status)} did not meet:\n{_told(job, late or sorted(job.status))}"
    time.sleep(plan.after)
    number = {"kill": signal.SIGKILL, "early": signal.SIGKILL, "interrupt": signal.SIGINT}
    os.kill(job.pids[plan.victim], number.get(plan.action, signal.SIGSTOP))
    hurt = time.monotonic()
    if plan.action == "delay":
        time.sleep(plan.pause)
        os.kill(job.pids[plan.victim], signal.SIGCONT)
    alive = list(range(plan.size)) if plan.action in ("delay", "interrupt") else plan.others
    late = job.until(alive, job.reap, PATIENCE)
    if late:
        stacks = "\n".join([_stacks(job.pids[rank]) for rank in late])
        return "HANG", f"ranks {late} are still there:\n{_told(job, late)}\n{stacks}"
    return _checked(plan, job, alive, time.monotonic() - hurt)


def _checked(plan: Plan, job: Forked, alive: Sequence[int], seconds: float) -> tuple[str, str]:
    told = {rank: job.events(rank) for rank in alive}
    if any("wrong" in said for said in told.values()) or any(job.status[rank] != 0 for rank in alive):
        return "WRONG", _told(job, alive)
    if plan.action == "delay":
        fine = all("done" in said and "error" not in said for said in told.values())
        return ("ok", "nothing was noticed") if fine else ("WRONG", _told(job, alive))
    if any("again" not in said or said["again"] != sum(alive) for said in told.values()):
        return "WRONG", "the survivors did not meet:\n" + _told(job, alive)
    for rank in alive:
        # who waits for the victim in its turn is named, too
        blamed = re.sub(r"rank \d+( \([^)]*\))? waits for it", "", told[rank]["error"])
        names = re.findall(r"rank (\d+)", blamed)
        if str(plan.victim) not in names and rank != plan.victim:
            return "NAMELESS", f"rank {rank} was told: {told[rank]['error']}"
        innocent = {name for name in names if name != str(plan.victim)}
        if innocent and rank != plan.victim:
            return "ALSO", f"rank {rank} was told of {sorted(innocent)} too: {told[rank]['error']}"
    return "ok", f"all was over after {seconds:.1f} s, shutdown took {max(s['shutdown'] for s in told.values()):.2f} s"


def _told(job: Forked, ranks: Sequence[int]) -> str:
    lines: list[str] = []
    for rank in ranks:
        printed = job.errors[rank].read_text(errors="replace")
        lines.append(f"  rank {rank} (exit {job.status.get(rank)}): {job.events(rank)}\n{printed}")
    return "\n".join(lines)


def _stacks(pid: int) -> str:
    """Where the threads of a process that hangs stand: Python's go to its stderr, all others are shown by gdb."""
    os.kill(pid, signal.SIGUSR1)
    gdb = shutil.which("gdb")
    if gdb is None:
        return ""
    command = [gdb, "-p", str(pid), "-batch", "-ex", "thread apply all bt 12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False).stdout
    except subprocess.TimeoutExpired:
        return ""


@contextmanager
def busy(count: int) -> Generator[None]:
    """So many processes that only compute."""
    ours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for one in ours:
            one.kill()
            one.wait()


def run(seeds: Sequence[int], actions: Sequence[str], beside: int, deadline: float) -> int:
    """Run the trials one after another; the number of those that were not ok."""
    import pmod  # before the ranks are forked: they need not import it again

    pmod.Topology.detect()
    gc.freeze()  # else a rank would look through all of torch at its end, and copy it
    counts: dict[tuple[str, str], int] = {}
    with busy(beside):
        until = time.monotonic() + deadline
        for seed in seeds:
            if time.monotonic() > until:
                break
            plan = Plan.of(seed, actions)
            verdict, seen = trial(plan)
            counts[plan.action, verdict] = counts.get((plan.action, verdict), 0) + 1
            what = f"{seed:5} {plan.action:9} rank {plan.victim} of {plan.size} after {plan.after:.2f} s"
            print(f"{what}  {verdict} {seen}", flush=True)
    print(f"{sum(counts.values())} trials: " + ", ".join(f"{a} {v} {n}" for (a, v), n in sorted(counts.items())))
    return sum(n for (_, verdict), n in counts.items() if verdict != "ok")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials; 1 where one is not ok."""
    parser = argparse.ArgumentParser(prog="python -m tests.lib.faults --short", description=__doc__)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beside", type=int, default=0, help="so many processes compute all the while")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no trial later than this")
    parser.add_argument("--actions", nargs="+", choices=ACTIONS, default=ACTIONS)
    options = parser.parse_args(arguments)
    seeds = range(options.seed, options.seed + options.trials)
    return 1 if run(seeds, options.actions, options.beside, options.seconds) else 0


if __name__ == "__main__":
    sys.exit(main())
