"""Two trials of `python -m tests.lib.faults`, and that it can tell a hang and a wrong result."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.lib import faults, short_faults
from tests.lib.faults import Ended


@pytest.mark.launchers
def test_two_trials() -> None:
    losses, _ = faults.undisturbed(2)
    assert len(losses) == 60 and losses[-1] < losses[0]
    verdict, seen = faults.trial(2, "kill", 1, 0.3, 0.0, losses)
    assert verdict == "ok" and seen.startswith("the others knew after"), seen
    verdict, seen = faults.trial(2, "delay", 0, 0.3, 1.5, losses)
    assert (verdict, seen) == ("ok", "the same losses")


@pytest.mark.launchers
@pytest.mark.parametrize("action", short_faults.ACTIONS)
def test_short_trials(action: str) -> None:
    """In a process of their own, which can be forked."""
    trials = ["--short", "--trials", "3", "--seed", "100", "--actions", action]
    command = [sys.executable, "-m", "tests.lib.faults", *trials]
    environment = {**os.environ, "PYTHONPATH": str(faults.ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=faults.ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0 and f"3 trials: {action} ok 3" in done.stdout, done.stdout + done.stderr


class Survivors:
    """A job whose ranks have ended as they should, but for what `said` says of one."""

    def __init__(self, rank: int = 0, **said: Any) -> None:
        named = "rank 2 (a=2): its process is dead, and rank 1 (a=1) waits for it"
        fine = {"error": named, "shutdown": 0.1, "again": 1}
        self.told = {other: {**fine, **(said if other == rank else {})} for other in (0, 1)}
        self.status = {0: 0, 1: 0}
        self.errors = [Path(os.devnull)] * 3

    def events(self, rank: int) -> dict[str, Any]:
        return {event: value for event, value in self.told[rank].items() if value is not None}


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ({}, "ok"),
        ({"wrong": "step 3"}, "WRONG"),
        ({"again": 2}, "WRONG"),
        ({"again": None}, "WRONG"),
        ({"error": "rank 1 (a=1) raised"}, "NAMELESS"),
        ({"error": "rank 1 (a=1); rank 2 (a=2)"}, "ALSO"),
    ],
)
def test_verdicts_on_a_short_trial(said: dict[str, Any], verdict: str) -> None:
    plan = short_faults.Plan(0, 3, "kill", 2, 0.0, 0.0)
    job: Any = Survivors(**said)
    assert short_faults._checked(plan, job, [0, 1], 1.0)[0] == verdict
    job.status[0] = -6
    assert short_faults._checked(plan, job, [0, 1], 1.0)[0] == "WRONG"


class Done(faults.Job):
    def __init__(self, size: int) -> None:
        self.ranks: list[Any] = [None] * size
        self.knew = {0: time.monotonic()}

    def output(self, rank: int) -> str:
        return "what it printed"


ERROR = f"Traceback\n{faults.ERROR}: rank 1 is gone"


@pytest.mark.parametrize(
    ("ended", "verdict"),
    [
        ({}, "HANG"),
        ({0: Ended(1, 1.0, ERROR), 2: Ended(1, 1.0, ERROR)}, "ok"),
        ({0: Ended(1, 1.0, ERROR), 2: Ended(0, 1.0, "")}, "WRONG"),
        ({0: Ended(1, 1.0, ERROR), 2: Ended(1, 1.0, "RuntimeError")}, "WRONG"),
    ],
)
def test_verdicts_on_a_death(ended: dict[int, Ended], verdict: str) -> None:
    assert faults._as_it_should_fail(Done(3), ended, [0, 2], 0.0)[0] == verdict


@pytest.mark.parametrize(
    ("ended", "verdict"),
    [
        ({0: Ended(0, 1.0, "[1.0, 0.5]\n")}, "HANG"),
        ({0: Ended(0, 1.0, "step 1\n[1.0, 0.5]\n"), 1: Ended(0, 1.0, "")}, "ok"),
        ({0: Ended(0, 1.0, "[1.0, 0.50000001]\n"), 1: Ended(0, 1.0, "")}, "WRONG"),
        ({0: Ended(0, 1.0, ""), 1: Ended(0, 1.0, "")}, "WRONG"),
        ({0: Ended(0, 1.0, "[1.0, 0.5]\n"), 1: Ended(1, 1.0, ERROR)}, "WRONG"),
    ],
)
def test_verdicts_on_a_delay(ended: dict[int, Ended], verdict: str) -> None:
    assert faults._as_undisturbed(Done(2), ended, [1.0, 0.5])[0] == verdict
