"""Checkpoints of a training over a mesh: a folder a step, there as a whole or not at all, whatever is killed when.

A checkpoint is written next to the last one, under another name, brought to the disk, and then renamed. It is loaded on
a mesh of any size: `torch.distributed.checkpoint` stores a tensor that all ranks hold once, and of a sharded one each
shard.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor, nn

import pmod
from pmod._errors import PmodError, explain
from pmod.demo.console import say

_STEP = "step-"
_WRITING = "writing"
_NOTES = "training.json"

Curve: TypeAlias = list[Tensor]
"""The loss of each step so far."""


@attrs.frozen
class Checkpoints:
    """Where a training over the current mesh is kept, after how many steps, and of what problem and model it is.

    All ranks see `folder`. `made_with` names what another run must share to go on from here. `sharded` says of a
    parameter that differs between ranks along which axis it is cut, in which dim, as `pmod.shard` cuts; all others are
    the same on every rank (I).
    """

    folder: Path
    every: int
    made_with: Mapping[str, Any]
    sharded: Mapping[str, Mapping[str, int]] = attrs.field(factory=dict[str, Mapping[str, int]])

    def last(self) -> Path | None:
        """The newest checkpoint that is whole, as this process sees the folder.

        Raises: PmodError where it is of another problem or model.
        """
        newest = max(self.folder.glob(f"{_STEP}*"), key=_step_of, default=None)
        if newest is None:
            return None
        theirs, ours = _notes(newest)["made_with"], json.loads(json.dumps(dict(self.made_with)))
        unlike = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
        if unlike:
            there, here = (", ".join(f"{name}={held.get(name)}" for name in unlike) for held in (theirs, ours))
            given = f"the checkpoint {newest} is of another problem or model: it has {there}, this run {here}"
            raise PmodError(explain("demo", given, "Pass the options of that run, or another --checkpoint folder."))
        return newest

    def resume(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, quiet: bool
    ) -> tuple[Curve, dict[int, float]]:
        """Put the last checkpoint into both, on all ranks; the curve and the test errors by step, empty where none is.

        The order of the problems follows from the seed and the length of the curve.
        """
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        mesh = pmod.current_mesh()
        newest = self.last()
        mine = torch.tensor(-1 if newest is None else _step_of(newest), device=mesh.device)
        step = int(pmod.pick(mine, mesh.axis_names).item())  # one answer, also where a file system is slow to tell
        if step < 0:
            return [], {}
        path = self.folder / f"{_STEP}{step}"
        if not quiet:
            say(f"{step:7}  from the checkpoint in {self.folder}")
        curve = torch.zeros(step, dtype=next(model.parameters()).dtype, device=mesh.device)
        held = _state(model, optimizer, curve)
        stored = self._as_stored(held)
        load(stored, checkpoint_id=path, process_group=mesh.group(mesh.axis_names))  # the tensors in place
        groups = stored["optimizer"]["param_groups"]
        set_optimizer_state_dict(model, optimizer, {"state": held["optimizer"]["state"], "param_groups": groups})
        return list(curve), {int(at): error for at, error in _notes(path)["errors"].items()}

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, curve: Curve, errors: Mapping[int, float]
    ) -> None:
        """Write a checkpoint, on all ranks together, and remove those before it."""
        from torch.distributed.checkpoint.state_dict_saver import save

        mesh, writing = pmod.current_mesh(), self.folder / _WRITING
        first = mesh.topology.rank == mesh.ranks.flat[0]
        if first:
            shutil.rmtree(writing, ignore_errors=True)  # of a run that was killed
            writing.mkdir(parents=True)
        pmod.barrier(mesh.axis_names)
        stored = self._as_stored(_state(model, optimizer, torch.stack(curve)))
        save(stored, checkpoint_id=writing, process_group=mesh.group(mesh.axis_names))  # which syncs its files
        if first:
            notes = {"made_with": dict(self.made_with), "errors": errors}
            _write(writing / _NOTES, json.dumps(notes, indent=1))
            _sync(writing)
            here = self.folder / f"{_STEP}{len(curve)}"
            os.rename(writing, here)
            _sync(self.folder)
            for path in self.folder.glob(f"{_STEP}*"):
                if path != here:
                    shutil.rmtree(path)

    def _as_stored(self, state: dict[str, Any]) -> dict[str, Any]:
        """The same tensors, those of sharded parameters as DTensors, which say where their shard belongs."""
        optimizer = state["optimizer"]
        moments = {
            name: {kind: self._shard(name, value) for kind, value in kinds.items()}
            for name, kinds in optimizer["state"].items()
        }
        model = {name: self._shard(name, value) for name, value in state["model"].items()}
        return {**state, "model": model, "optimizer": {**optimizer, "state": moments}}

    def _shard(self, name: str, value: Tensor) -> Tensor:
        if name not in self.sharded or value.ndim == 0:  # a step count is the same everywhere
            return value
        from torch.distributed.tensor import DTensor, Replicate, Shard

        mesh, dims = pmod.current_mesh(), self.sharded[name]
        shape = list(value.shape)
        for axis, dim in dims.items():
            shape[dim] = int(pmod.psum(torch.tensor(shape[dim], device=value.device), axis).item())
        return DTensor.from_local(
            value, mesh.device_mesh, [Shard(dims[axis]) if axis in dims else Replicate() for axis in mesh.axis_names],
            run_check=False, shape=torch.Size(shape), stride=torch.empty(shape, device="meta").stride(),
        )  # fmt: skip


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, curve: Tensor) -> dict[str, Any]:
    """What is kept in tensors: they are the model's and the optimizer's own."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return {
        "model": dict(model.named_parameters()),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "curve": curve,
    }


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix(_STEP))


def _notes(path: Path) -> dict[str, Any]:
    return json.loads((path / _NOTES).read_text())


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
