"""Checkpoints of a training over a mesh: a folder a step, there as a whole or not at
all, whatever is killed when.

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
from pmod._errors import PmodError, phrase
from pmod.demo.console import say

_STEP = "step-"
_WRITING = "writing"
_NOTES = "training.json"
_SUMS = "SHA256SUMS"  # of all other files, as the command sha256sum reads it
_OTHERS = 0o022  # the bits of a mode that let others write

Curve: TypeAlias = list[Tensor]
"""The loss of each step so far."""


@attrs.frozen
class Found:
    """A checkpoint that is whole, and what is wrong with newer ones."""

    path: Path
    damaged: Sequence[str]


@attrs.frozen
class Checkpoints:
    """Where a training over the current mesh is kept, after how many steps, and of what
    problem and model it is.

    All ranks see `folder`. `made_with` names what another run must share to go on from
    here. `sharded` says of a parameter that differs between ranks along which axis it
    is cut, in which dim, as `pmod.shard` cuts; all others are the same on every rank
    (I).
    """

    folder: Path
    every: int
    made_with: Mapping[str, Any]
    sharded: Mapping[str, Mapping[str, int]] = attrs.field(
        factory=dict[str, Mapping[str, int]]
    )

    def last(self) -> Found | None:
        """The newest checkpoint that is whole, as this process sees the folder; None
        where there is none.

        Raises: PmodError where it is of another problem or model, where all are
        damaged, and where another user may have written one.
        """
        newest = self._whole()
        if newest is None:
            return None
        theirs, ours = (
            _notes(newest.path)["made_with"],
            json.loads(json.dumps(dict(self.made_with))),
        )
        unlike = [
            name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)
        ]
        if unlike:
            there, here = (
                ", ".join(f"{name}={held.get(name)}" for name in unlike)
                for held in (theirs, ours)
            )
            given = f"the checkpoint {newest.path} is of another problem or model: it has {there}, this run {here}"
            raise PmodError(
                phrase(
                    "demo",
                    given,
                    "Pass the options of that run, or another --checkpoint folder.",
                )
            )
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
            raise PmodError(
                phrase(
                    "demo",
                    given,
                    "Remove these folders to begin anew, or pass another --checkpoint.",
                )
            )
        return None

    def resume(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, quiet: bool
    ) -> tuple[Curve, dict[int, float]]:
        """Put the last whole checkpoint into both, on all ranks; the curve and the test
        errors by step, empty where there is none.

        The order of the problems follows from the seed and the length of the curve.
        """
        from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

        from pmod.demo import stored  # which imports DCP

        mesh = pmod.current_mesh()

        def found() -> tuple[str, Sequence[str]] | None:
            newest = self.last() if stored.is_first() else None
            return None if newest is None else (newest.path.name, newest.damaged)

        newest = stored.together(found)[
            0
        ]  # one answer, also where a file system is slow to tell
        if newest is None:
            return [], {}
        path = self.folder / newest[0]
        step = _step_of(path)
        if not quiet:
            for wrong in newest[1]:
                say(f"{'':7}  {wrong}")
            say(f"{step:7}  from the checkpoint in {self.folder}")
        curve = torch.zeros(
            step, dtype=next(model.parameters()).dtype, device=mesh.device
        )
        held = _state(model, optimizer, curve)
        state = self._as_stored(held)
        stored.read(state, path)  # the tensors in place
        groups = state["optimizer"]["param_groups"]
        set_optimizer_state_dict(
            model,
            optimizer,
            {"state": held["optimizer"]["state"], "param_groups": groups},
        )
        return list(curve), {
            int(at): error for at, error in _notes(path)["errors"].items()
        }

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        curve: Curve,
        errors: Mapping[int, float],
    ) -> None:
        """Write a checkpoint, on all ranks together, and remove those before it but the
        last.

        Raises: PmodError on every rank where one cannot write; CollectiveTimeout, which
        names the rank, where one dies.
        """
        from pmod.demo import stored

        writing = self.folder / _WRITING

        def begin() -> None:
            if stored.is_first():
                shutil.rmtree(writing, ignore_errors=True)  # of a run that was killed
                self.folder.mkdir(mode=0o777 & ~_OTHERS, parents=True, exist_ok=True)
                writing.mkdir(mode=0o777 & ~_OTHERS)

        def finish() -> None:
            if stored.is_first():
                _write(
                    writing / _NOTES,
                    json.dumps(
                        {"made_with": dict(self.made_with), "errors": errors}, indent=1
                    ),
                )
                sums = {**digests, _NOTES: stored.digest(writing / _NOTES)}
                _write(
                    writing / _SUMS,
                    "".join(f"{value}  {name}\n" for name, value in sums.items()),
                )
                for part in writing.iterdir():
                    part.chmod(part.stat().st_mode & ~_OTHERS)
                _sync(writing)
                self._install(writing, len(curve))

        stored.together(begin)
        digests = stored.write(
            self._as_stored(_state(model, optimizer, torch.stack(curve))), writing
        )
        stored.together(finish)

    def _install(self, written: Path, step: int) -> None:
        """Give a whole checkpoint its name, and remove all others but the newest before
        it.
        """
        here = self.folder / f"{_STEP}{step}"
        if here.exists():  # damaged, so that the training went on from the one before
            shutil.rmtree(here)
        os.rename(written, here)
        _sync(self.folder)
        before = next(
            (path for path in _steps(self.folder) if _step_of(path) < step), None
        )
        for path in _steps(self.folder):
            if path not in (here, before):
                shutil.rmtree(path)

    def _as_stored(self, state: dict[str, Any]) -> dict[str, Any]:
        """The same tensors, those of sharded parameters as DTensors, which say where
        their shard belongs.
        """
        optimizer = state["optimizer"]
        moments = {
            name: {kind: self._shard(name, value) for kind, value in kinds.items()}
            for name, kinds in optimizer["state"].items()
        }
        model = {
            name: self._shard(name, value) for name, value in state["model"].items()
        }
        return {**state, "model": model, "optimizer": {**optimizer, "state": moments}}

    def _shard(self, name: str, value: Tensor) -> Tensor:
        if (
            name not in self.sharded or value.ndim == 0
        ):  # a step count is the same everywhere
            return value
        from torch.distributed.tensor import DTensor, Replicate, Shard

        mesh, dims = pmod.current_mesh(), self.sharded[name]
        shape = list(value.shape)
        for axis, dim in dims.items():
            shape[dim] = int(
                pmod.psum(torch.tensor(shape[dim], device=value.device), axis).item()
            )
        return DTensor.from_local(
            value,
            mesh.device_mesh,
            [
                Shard(dims[axis]) if axis in dims else Replicate()
                for axis in mesh.axis_names
            ],
            run_check=False,
            shape=torch.Size(shape),
            stride=torch.empty(shape, device="meta").stride(),
        )


def _state(
    model: nn.Module, optimizer: torch.optim.Optimizer, curve: Tensor
) -> dict[str, Any]:
    """What is kept in tensors: they are the model's and the optimizer's own."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return {
        "model": dict(model.named_parameters()),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "curve": curve,
    }


def _steps(folder: Path) -> list[Path]:
    """The checkpoints in the folder, the newest first. What else lies there is no
    business of ours.
    """
    found = [
        path
        for path in folder.iterdir()
        if re.fullmatch(rf"{_STEP}[0-9]+", path.name) and path.is_dir()
    ]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix(_STEP))


def _check_ours(path: Path) -> None:
    """Raise where a user other than this one may have written what lies here."""
    held = path.stat()
    given = right = ""
    if held.st_uid != os.geteuid():
        given = f"{path} belongs to user {held.st_uid}, and this process runs as user {os.geteuid()}"
        right = "Pass a --checkpoint folder of your own."
    elif held.st_mode & _OTHERS:
        given = (
            f"other users may write to {path} (its mode is {held.st_mode & 0o777:o})"
        )
        right = f"If it holds nothing but what you wrote: chmod -R go-w {path}"
    if given:
        raise PmodError(
            phrase(
                "demo",
                f"a checkpoint is taken only from where nobody else can write: {given}",
                right,
            )
        )


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint; nothing where every file is as it was written."""
    from pmod.demo.stored import METADATA, digest

    try:
        lines = (path / _SUMS).read_text().splitlines()
        rows = [re.fullmatch("([0-9a-f]{64})  (.+)", line) for line in lines]
        sums = {row[2]: row[1] for row in rows if row is not None}
        missing = [
            name for name in (*sums, METADATA, _NOTES) if not (path / name).is_file()
        ]
        if missing:
            return f"{missing[0]} is missing"
        if None in rows or not {METADATA, _NOTES} <= sums.keys():
            return f"{_SUMS} is not as it was written"
        unlike = [name for name, value in sums.items() if digest(path / name) != value]
        return f"{unlike[0]} is not as it was written" if unlike else ""
    except (OSError, ValueError) as error:  # not there, or no text
        return str(error)


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
