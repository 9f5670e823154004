"""Two trials of `python -m tests.faults`, and that it can tell a hang and a wrong result."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests import faults
from tests.faults import Ended


@pytest.mark.launchers
def test_two_trials() -> None:
    losses, _ = faults.undisturbed(2)
    assert len(losses) == 60 and losses[-1] < losses[0]
    verdict, seen = faults.trial(2, "kill", 1, 0.3, 0.0, losses)
    assert verdict == "ok" and seen.startswith("the others knew after"), seen
    verdict, seen = faults.trial(2, "delay", 0, 0.3, 1.5, losses)
    assert (verdict, seen) == ("ok", "the same losses")


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


