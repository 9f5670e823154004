"""What each rank of the demo does: make problems, train, and hand in the results."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

import pmod
from pmod._console import say
from pmod.demo import fno
from pmod.demo.checkpoint import Checkpoints
from pmod.demo.darcy import TOLERANCE, Fields, random_fields, solve_together
from pmod.demo.fno import FNO
from pmod.demo.options import Options, counts, made_with
from pmod.demo.training import Run, Scale, fit, heading


@attrs.frozen(eq=False)
class Outcome:
    """What the comparison needs: problems, first weights, the run, and the mesh.

    rows: how many rows of a test problem each rank along "space" holds. threads: how
    many a rank computes with.
    """

    train: Fields
    test: Fields
    weights: dict[str, Tensor]
    run: Run
    axis_sizes: dict[str, int]
    rows: tuple[int, ...]
    threads: int


def make_problems(options: Options, *, quiet: bool) -> tuple[Fields, Fields]:
    """Draw media and solve them on all ranks together.

    Returns the problems to train and to test on.
    """
    train, test = counts(options)
    generator = torch.Generator().manual_seed(options.seed)
    media = random_fields(train + test, options.size, generator) > 0
    # rank 0's on all ranks: unlike machines may round differently
    media = pmod.pick(media, ("data", "space"))
    pressure = solve_together(media.to(pmod.current_mesh().device), quiet=quiet).cpu()
    problems = Fields(media, pressure)
    return problems[:train], problems[train:]


def checkpoints(
    options: Options, train: Sequence[int], test: Sequence[int]
) -> Checkpoints | None:
    """Return where a run on problems of these shapes is kept, if the options say."""
    folder = options.checkpoint
    return (
        None
        if folder is None
        else Checkpoints(folder, options.every, made_with(options, train, test))
    )


def train(options: Options, published: tuple[Fields, Fields] | None) -> Outcome | None:
    """Train over the current mesh ("data", "space"); rank 0 returns the outcome."""
    mesh = pmod.current_mesh()
    quiet = mesh.topology.rank != 0
    problems, tests = published or make_problems(options, quiet=quiet)
    if not quiet:
        _introduce(problems, tests, options)
    problems = problems.with_mirror_images()
    # all ranks draw the same weights
    torch.manual_seed(options.seed)
    model = FNO(options.channels, options.modes, options.layers).to(options.dtype)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    kept = checkpoints(
        options, (len(problems) // 2, *problems.x.shape[1:]), tests.x.shape
    )
    run = _run(
        model.to(mesh.device),
        problems.to(mesh.device),
        tests.to(mesh.device),
        options,
        kept,
        quiet=quiet,
    )
    rows = pmod.split_sizes(tests.x.shape[1], mesh.shape["space"])
    threads = torch.get_num_threads()
    return (
        None
        if quiet
        else Outcome(problems, tests, weights, run, mesh.shape, rows, threads)
    )


def _introduce(train: Fields, test: Fields, options: Options) -> None:
    grid = f"{train.x.shape[1]} x {train.x.shape[2]}"
    source = (
        f"solved to a residual of {TOLERANCE:.0e}"
        if options.data is None
        else f"from {options.data.name}"
    )
    say(f"data    {len(train)} + {len(test)} problems on {grid} cells, {source}")
    say(
        f"model   {options.layers} Fourier layers, {options.channels} channels, {options.modes} modes"
    )
    say("\n" + heading())


def _run(
    model: FNO,
    train: Fields,
    test: Fields,
    options: Options,
    kept: Checkpoints | None,
    *,
    quiet: bool,
) -> Run:
    scale, height = Scale.of(train), train.x.shape[1]
    a, y = pmod.shard(scale.apply(train, options.dtype), "space", dim=1)

    def batch_loss(batch: Tensor) -> Tensor:
        mine = pmod.shard(batch.to(a.device), "data")
        return fno.loss(model, a[mine], y[mine], height)

    predict = _Predictor(model, scale, test, options)
    losses, errors, seconds = fit(
        model,
        batch_loss,
        predict.error,
        len(train),
        options,
        quiet=quiet,
        checkpoints=kept,
    )
    return Run(losses, errors, predict.whole().cpu(), seconds)


class _Predictor:
    """The test problems of this rank: its part of them, and its rows of each."""

    def __init__(
        self, model: FNO, scale: Scale, test: Fields, options: Options
    ) -> None:
        self.model, self.scale, self.batch = model, scale, options.batch
        self.count, self.height = len(test), test.x.shape[1]
        a, _ = scale.apply(test, options.dtype)
        self.a, self.y = pmod.shard(
            pmod.shard((a, test.y.to(options.dtype)), "space", dim=1), "data"
        )

    @torch.no_grad()
    def here(self) -> Tensor:
        """Return this rank's rows of the predictions for its problems."""
        return self.scale.undo(
            torch.cat([self.model(a, self.height) for a in self.a.split(self.batch)])
        )

    def error(self) -> float:
        """Return the mean relative error over the problems of all ranks."""
        here = fno.relative_errors(self.here(), self.y)
        return pmod.psum(here.sum(), "data").item() / self.count

    def whole(self) -> Tensor:
        """Return all predictions, on every rank."""
        rows = pmod.unshard(self.here(), "space", dim=1, length=self.height)
        return pmod.unshard(rows, "data", length=self.count)
