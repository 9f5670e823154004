"""The loop that drives both models: the same batches, optimizer and curve."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Protocol

import attrs
import torch
from torch import Tensor, nn

from pmod._console import progress, say
from pmod.demo.checkpoint import Checkpoints
from pmod.demo.darcy import Fields
from pmod.demo.options import LEARNING_RATE


@attrs.frozen(eq=False)
class Run:
    """One training: each step's loss, some test errors, and the last predictions."""

    losses: Tensor
    errors: dict[int, float]
    prediction: Tensor
    seconds: float

    @property
    def error(self) -> float:
        """Return the last test error."""
        return self.errors[max(self.errors)]


@attrs.frozen
class Scale:
    """The mean and deviation of the inputs and outputs of all training problems."""

    x_mean: float
    x_std: float
    y_mean: float
    y_std: float

    @staticmethod
    def of(train: Fields) -> Scale:
        x, y = train.x.double(), train.y.double()
        return Scale(
            x.mean().item(),
            x.std().item() or 1.0,
            y.mean().item(),
            y.std().item() or 1.0,
        )

    def apply(self, fields: Fields, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the inputs and the outputs, scaled to mean 0 and deviation 1."""
        x, y = fields.x.to(dtype), fields.y.to(dtype)
        return (x - self.x_mean) / self.x_std, (y - self.y_mean) / self.y_std

    def undo(self, y: Tensor) -> Tensor:
        """Return outputs in the unit of the data."""
        return y * self.y_std + self.y_mean


def batches(problems: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield numbers of problems, `size` at a time, in a new order each time round.

    What is left of a round is dropped.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(problems, generator=generator)
        yield from order[: problems - problems % size].split(size)


class Length(Protocol):
    """What the loop asks of a job's options."""

    @property
    def batch(self) -> int: ...
    @property
    def seed(self) -> int: ...
    def steps_on(self, problems: int) -> int: ...


def fit(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    test_error: Callable[[], float],
    problems: int,
    options: Length,
    *,
    quiet: bool = False,
    checkpoints: Checkpoints | None = None,
) -> tuple[Tensor, dict[int, float], float]:
    """Minimize `loss`, a function of the batch.

    Returns the curve, the test errors by step, and the seconds it took.

    checkpoints: where to go on from, and what to keep; the curve is then that of all
    attempts, the seconds of this one.
    """
    steps = options.steps_on(problems)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps
    )
    curve: list[Tensor] = []
    errors: dict[int, float] = {}
    if checkpoints is not None:
        curve, errors = checkpoints.resume(model, optimizer, quiet=quiet)
        # the learning rate of the next step came with the optimizer's state
        schedule.last_epoch = len(curve)
    tested = max(steps // 10, 1)
    begun = time.perf_counter()
    with progress(total=steps, what="training", unit="step", quiet=quiet) as bar:
        bar.update(len(curve))
        for batch in islice(
            batches(problems, options.batch, options.seed), len(curve), steps
        ):
            optimizer.zero_grad()
            value = loss(batch)
            value.backward()
            optimizer.step()
            schedule.step()
            curve.append(value.detach())
            bar.update()
            step = len(curve)
            if step % tested == 0 or step == steps:
                errors[step] = test_error()
                if not quiet:
                    recent = torch.stack(curve[-tested:]).mean().item()
                    report(step, recent, errors[step], time.perf_counter() - begun)
            if checkpoints is not None and (
                step % checkpoints.every == 0 or step == steps
            ):
                checkpoints.save(model, optimizer, curve, errors)
    return torch.stack(curve).cpu(), errors, time.perf_counter() - begun


def report(step: int, loss: float, error: float, seconds: float) -> None:
    """Print a row."""
    say(f"{step:7}  {loss:9.4g}  {error:10.2%}  {seconds:7.1f}")


def heading() -> str:
    """Return the names of the columns that `report` prints.

    The loss that `fit` prints is the mean since the last row.
    """
    return f"{'step':>7}  {'loss':>9}  {'test error':>10}  {'seconds':>7}"
