"""Values of a notebook between processes that are the ranks themselves. `test_launchers` runs notebooks in such."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import pmod
from pmod.notebook import peers
from tests.lib import spmd

VALUES: list[Any] = [
    torch.tensor([], dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.complex64).T, torch.tensor([0, 2]).to_sparse(),
    np.arange(3.0), np.zeros((2, 0)), np.float32(2), np.array(["a", "é"]), np.bool_(True), 1 << 70, float("inf"), 2j,
    "é", b"", None, {"a": [(1, 2), {3}], 4: torch.float64}, torch.nn.Parameter(torch.ones(1)),
]  # fmt: skip


def send_each(values: list[Any]) -> None:
    """Each in another number per rank, so that messages differ in length."""
    for value in values:
        found = peers.gathered([value] * pmod.axis_index("data"), pmod.current_mesh(), "pull")
        assert repr(found) == repr([[], [value]])


def test_values_between_processes_that_are_the_ranks() -> None:
    spmd.launch(send_each, VALUES, data=2)


class Unpicklable:
    def __reduce__(self) -> str:
        raise RuntimeError("not me")


def send_what_runs_code() -> None:
    refused = {
        "holds builtins.print": [1, print],
        "holds torch.nn.modules.linear.Linear": torch.nn.Linear(1, 1),
        "holds what cannot be pickled (RuntimeError: not me)": Unpicklable(),
    }
    for holds, value in refused.items():
        with pytest.raises(pmod.ArgumentError) as raised:
            peers.gathered(value if pmod.axis_index("data") else 0, pmod.current_mesh(), "pull")
        assert str(raised.value).startswith("pmod.notebook.pull: on rank 1 the value ") and holds in str(raised.value)


def test_what_would_run_code_does_not_travel() -> None:
    """And all ranks are told, so that none waits."""
    spmd.launch(send_what_runs_code, data=2)
