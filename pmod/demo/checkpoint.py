"""Checkpoints of a training over a mesh.

Each is a folder that is there as a whole or not at all, whatever is killed when.

A checkpoint is written next to the last one, under another name, brought to the disk,
and then renamed. The one before it stays, and is taken where the last one is damaged. A
checkpoint is loaded on a mesh of any size: `torch.distributed.checkpoint` stores a
tensor that all ranks hold once, and of a sharded one each shard.

Nothing is taken from a folder or a file that another user owns or may write to.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor, nn

import pmod
from pmod._console import say
from pmod._errors import PmodError, phrase

_STEP = "step-"
_WRITING = "writing"
_NOTES = "training.json"
# the sums of all other files, in the format that the command sha256sum reads
_SUMS = "SHA256SUMS"
# the bits of a mode that let others write
_OTHERS = 0o022

Curve: TypeAlias = list[Tensor]
"""The loss of each step so far."""

_State: TypeAlias = dict[str, Any]
"""What is stored: tensors in dicts of dicts, or what JSON holds."""


@attrs.frozen
class Found:
    """A checkpoint that is whole, and what is wrong with newer ones."""

    path: Path
    damaged: Sequence[str]


@attrs.frozen
class Checkpoints:
    """Where a training over the current mesh is kept, and after how many steps.

    All ranks see `folder`. `made_with` names what another run must share to go on from
    here. `sharded` says of a parameter that differs between ranks along which axis it
    is cut, in which dim, as `pmod.shard` cuts; all others are the same on every rank
    (I).
    """

    folder: Path
    every: int
    made_with: Mapping[str, object]
    sharded: Mapping[str, Mapping[str, int]] = attrs.field(
        factory=dict[str, Mapping[str, int]]
    )

    def last(self) -> Found | None:
        """Return the newest checkpoint that is whole, as this process sees the folder.

        Returns None if there is none.

        Raises: PmodError if it is of another problem or model, if all are damaged, and
        if another user may have written one.
        """
        newest = self._whole()
        if newest is None:
            return None
        theirs = _notes(newest.path)["made_with"]
        # by way of JSON, as theirs came: a tuple has become a list
        ours = json.loads(json.dumps(dict(self.made_with)))
        there: list[str] = []
        here: list[str] = []
        for name in {**theirs, **ours}:
            if theirs.get(name) != ours.get(name):
                there.append(f"{name}={theirs.get(name)}")
                here.append(f"{name}={ours.get(name)}")
        if there:
            given = (
                f"the checkpoint {newest.path} is of another problem or model: "
                f"it has {', '.join(there)}, this run {', '.join(here)}"
            )
            right = "Pass the options of that run, or another --checkpoint folder."
            raise PmodError(phrase("demo", given, right))
        return newest

    def _whole(self) -> Found | None:
        if not self.folder.exists():
            return None
        _check_ours(self.folder)
        damaged: list[str] = []
        for path in _steps(self.folder):
            for part in (path, *path.iterdir()):
                _check_ours(part)
            wrong = _damage(path)
            if not wrong:
                return Found(path, damaged)
            damaged.append(f"{path.name} is damaged: {wrong}")
        if damaged:
            given = f"no checkpoint in {self.folder} is whole: {'; '.join(damaged)}"
            right = "Remove these folders to begin anew, or pass another --checkpoint."
            raise PmodError(phrase("demo", given, right))
        return None

    def resume(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, quiet: bool
    ) -> tuple[Curve, dict[int, float]]:
        """Put the last whole checkpoint into both, on all ranks.

        Returns the curve and the test errors by step, empty if there is no checkpoint.

        The order of the problems follows from the seed and the length of the curve.
        """
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        # imported here, because it imports DCP, which takes time
        from pmod.demo import stored

        mesh = pmod.current_mesh()

        def found() -> tuple[str, Sequence[str]] | None:
            newest = self.last() if stored.is_first() else None
            return None if newest is None else (newest.path.name, newest.damaged)

        # the first rank's answer counts: a file system may tell others later
        newest = stored.together(found)[0]
        if newest is None:
            return [], {}
        path = self.folder / newest[0]
        step = _step_of(path)
        if not quiet:
            for wrong in newest[1]:
                say(f"{'':7}  {wrong}")
            say(f"{step:7}  from the checkpoint in {self.folder}")
        dtype = next(model.parameters()).dtype
        curve = torch.zeros(step, dtype=dtype, device=mesh.device)
        held = _state(model, optimizer, curve)
        state = self._as_stored(held)
        # this fills the tensors of the model and the optimizer themselves
        stored.read(state, path)
        # numbers, such as the learning rate, were put into `state`, not in place
        groups = state["optimizer"]["param_groups"]
        kept = {"state": held["optimizer"]["state"], "param_groups": groups}
        set_optimizer_state_dict(model, optimizer, kept)
        # JSON has made texts of the steps
        errors = _notes(path)["errors"].items()
        return list(curve), {int(at): error for at, error in errors}

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        curve: Curve,
        errors: Mapping[int, float],
    ) -> None:
        """Write a checkpoint, on all ranks together, and remove all older ones but one.

        Raises: PmodError on every rank if one cannot write; CollectiveTimeout, which
        names the rank, if one dies.
        """
        from pmod.demo import stored

        writing = self.folder / _WRITING

        def begin() -> None:
            if stored.is_first():
                # what lies there was left by a run that was killed
                shutil.rmtree(writing, ignore_errors=True)
                self.folder.mkdir(mode=0o777 & ~_OTHERS, parents=True, exist_ok=True)
                writing.mkdir(mode=0o777 & ~_OTHERS)

        def finish() -> None:
            if not stored.is_first():
                return
            notes = {"made_with": dict(self.made_with), "errors": errors}
            _write(writing / _NOTES, json.dumps(notes, indent=1))
            sums = {**digests, _NOTES: stored.digest(writing / _NOTES)}
            lines = [f"{value}  {name}\n" for name, value in sums.items()]
            _write(writing / _SUMS, "".join(lines))
            for part in writing.iterdir():
                part.chmod(part.stat().st_mode & ~_OTHERS)
            # the names must be on the disk before the rename says that all is there
            _sync(writing)
            self._install(writing, len(curve))

        stored.together(begin)
        state = self._as_stored(_state(model, optimizer, torch.stack(curve)))
        digests = stored.write(state, writing)
        stored.together(finish)

    def _install(self, written: Path, step: int) -> None:
        """Give a whole checkpoint its name, and keep only the newest one before it."""
        here = self.folder / f"{_STEP}{step}"
        # one that is there is damaged: the training went on from the one before
        if here.exists():
            shutil.rmtree(here)
        os.rename(written, here)
        _sync(self.folder)
        before = next(
            (path for path in _steps(self.folder) if _step_of(path) < step), None
        )
        for path in _steps(self.folder):
            if path not in (here, before):
                shutil.rmtree(path)

    def _as_stored(self, state: _State) -> _State:
        """Return the same tensors, those of sharded parameters as DTensors.

        A DTensor says where its shard belongs.
        """
        optimizer = state["optimizer"]
        moments: dict[str, dict[str, Tensor]] = {}
        for name, kinds in optimizer["state"].items():
            moments[name] = {
                kind: self._shard(name, value) for kind, value in kinds.items()
            }
        model = {
            name: self._shard(name, value) for name, value in state["model"].items()
        }
        return {**state, "model": model, "optimizer": {**optimizer, "state": moments}}

    def _shard(self, name: str, value: Tensor) -> Tensor:
        # a step count has no dims to cut, and is the same everywhere
        if name not in self.sharded or value.ndim == 0:
            return value
        from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

        mesh, dims = pmod.current_mesh(), self.sharded[name]
        shape = list(value.shape)
        for axis, dim in dims.items():
            shape[dim] = int(
                pmod.psum(torch.tensor(shape[dim], device=value.device), axis).item()
            )
        placements: list[Placement] = [Replicate()] * len(mesh.axis_names)
        for axis, dim in dims.items():
            placements[mesh.axis_names.index(axis)] = Shard(dim)
        return DTensor.from_local(
            value,
            mesh.device_mesh,
            placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=torch.empty(shape, device="meta").stride(),
        )


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, curve: Tensor) -> _State:
    """Return what is kept in tensors: they are the model's and the optimizer's own."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return {
        "model": dict(model.named_parameters()),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "curve": curve,
    }


def _steps(folder: Path) -> list[Path]:
    """Return the checkpoints in the folder, the newest first.

    Whatever else lies there is left alone.
    """
    found: list[Path] = []
    for path in folder.iterdir():
        if re.fullmatch(rf"{_STEP}[0-9]+", path.name) and path.is_dir():
            found.append(path)
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix(_STEP))


def _check_ours(path: Path) -> None:
    """Raise an error if another user may have written what lies here."""
    held, me = path.stat(), os.geteuid()
    given = right = ""
    if held.st_uid != me:
        owner = f"{path} belongs to user {held.st_uid}"
        given = f"{owner}, and this process runs as user {me}"
        right = "Pass a --checkpoint folder of your own."
    elif held.st_mode & _OTHERS:
        mode = f"{held.st_mode & 0o777:o}"
        given = f"other users may write to {path} (its mode is {mode})"
        right = f"If it holds nothing but what you wrote: chmod -R go-w {path}"
    if given:
        rule = "a checkpoint is taken only from where nobody else can write"
        raise PmodError(phrase("demo", f"{rule}: {given}", right))


def _damage(path: Path) -> str:
    """Return what is wrong with a checkpoint, "" if every file is as it was written."""
    from pmod.demo.stored import METADATA, digest

    try:
        lines = (path / _SUMS).read_text().splitlines()
        sums: dict[str, str] = {}
        for line in lines:
            row = re.fullmatch("([0-9a-f]{64})  (.+)", line)
            if row is not None:
                sums[row[2]] = row[1]
        for name in (*sums, METADATA, _NOTES):
            if not (path / name).is_file():
                return f"{name} is missing"
        # a line that is cut off, or one that is gone, would leave a file unchecked
        if len(sums) < len(lines) or not {METADATA, _NOTES} <= sums.keys():
            return f"{_SUMS} is not as it was written"
        for name, value in sums.items():
            if digest(path / name) != value:
                return f"{name} is not as it was written"
        return ""
    # the files are not there, or are not text
    except (OSError, ValueError) as error:
        return str(error)


def _notes(path: Path) -> _State:
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
