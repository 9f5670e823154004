"""What is checked under `python -O` and `-OO`, where `assert` and docstrings are gone: `.ci/run` runs it so once each.

pytest writes the asserts of test files anew, so these are checked there as ever, in this process and on its threads.
In the processes of ranks they are not: there `assert_close` and `pytest.raises` check, which raise by themselves.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

import pmod
from pmod._core.collective import COLLECTIVES
from tests.lib import spmd


def test_asserts_of_test_files_are_checked() -> None:
    with pytest.raises(AssertionError):
        assert sys.flags.optimize < 0


def optimized_on_rank() -> int:
    torch.testing.assert_close(pmod.psum(torch.ones(1), "x"), torch.tensor([2.0]))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(torch.zeros(1), torch.ones(1))
    return sys.flags.optimize


def test_ranks_run_as_python_was_started() -> None:
    """So that a run with PYTHONOPTIMIZE is one of the ranks, too."""
    asked = int(os.environ.get("PYTHONOPTIMIZE") or 0)
    assert sys.flags.optimize >= asked
    assert spmd.launch(optimized_on_rank, x=2) == [sys.flags.optimize] * 2


def loss(x: torch.Tensor) -> torch.Tensor:
    return pmod.psum(x.sum(), "x")


def test_what_is_said_of_collectives_needs_no_docstring() -> None:
    text = str(pmod.explain(loss, torch.ones(2, requires_grad=True), mesh={"x": 2}))
    assert f"V -> I: {COLLECTIVES['psum'].value}." in text
