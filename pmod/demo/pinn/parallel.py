"""What each rank of the job does: take its part, train, and hand in the results."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice

import attrs
import torch
from torch import Tensor
from torch.nn.utils.convert_parameters import parameters_to_vector, vector_to_parameters

import pmod
from pmod._console import progress, say
from pmod.demo.pinn import net
from pmod.demo.pinn.burgers import collocation_points, grid, solution
from pmod.demo.pinn.descent import descend
from pmod.demo.pinn.net import CUT, Net
from pmod.demo.pinn.options import AXES, TRIAL, Options
from pmod.demo.training import Run, heading, report


@attrs.frozen(eq=False)
class Trial:
    """A few steps, all of Adam or of L-BFGS: the weights around them, and each loss."""

    warm_up: int
    before: dict[str, Tensor]
    losses: Tensor
    after: dict[str, Tensor]


@attrs.frozen(eq=False)
class Outcome:
    """What the comparison, the text and the picture need.

    t, x: the points of all ranks. trials: before the training, and after it. sent: by
    axis the messages and bytes of a loss and its gradient, on rank 0. threads: how many
    a rank computes with.
    """

    t: Tensor
    x: Tensor
    run: Run
    trials: list[Trial]
    sent: dict[str, tuple[int, int]]
    axis_sizes: dict[str, int]
    threads: int


def train(options: Options) -> Outcome | None:
    """Train over the current mesh ("data", "model"); rank 0 returns the outcome."""
    mesh = pmod.current_mesh()
    quiet = mesh.topology.rank != 0
    model = Net(options.width, options.pairs, options.seed).to(
        mesh.device, torch.float64
    )
    points = collocation_points(options.points, options.seed)
    trainer = _Trainer(model, points, options)
    sent, trials = trainer.traffic(), [trainer.trial(warm_up=TRIAL)]
    if not quiet:
        say("\n" + heading())
    run = trainer.fit(options.warm_up, options.warm_up + options.steps, quiet=quiet)
    trials.append(trainer.trial(warm_up=0))
    if quiet:
        return None
    threads = torch.get_num_threads()
    return Outcome(*points, run, trials, sent, mesh.shape, threads)


class _Trainer:
    """The points of this rank along "data", its part of the network along "model"."""

    def __init__(
        self, model: Net, points: tuple[Tensor, Tensor], options: Options
    ) -> None:
        device = pmod.current_mesh().device
        self.model, self.count = model, options.points
        self.parameters, self.width = list(model.parameters()), options.width
        # rank 0's on all ranks: unlike machines may round differently
        same = pmod.pick([v.to(device) for v in points], AXES)
        self.t, self.x = (v.clone().requires_grad_() for v in pmod.shard(same, "data"))
        self.grid = [v.to(device) for v in grid()]
        self.truth = solution(*grid()).to(device)
        # what several ranks hold is counted on the first of them
        first_of_data, first_of_model = (pmod.axis_index(axis) == 0 for axis in AXES)
        counted: list[Tensor] = []
        for name, p in model.named_parameters():
            is_own = first_of_model or name.split(".")[-1] in CUT
            counted.append(p.new_full((p.numel(),), first_of_data and is_own))
        self.counted = torch.cat(counted)

    def loss(self) -> Tensor:
        return net.loss(self.model, self.t, self.x, self.count)

    def products(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the products of vectors like the parameters, over all ranks. V -> I.

        What decides by them then decides the same on all ranks.
        """
        return pmod.psum((a * self.counted) @ b.T, AXES)

    def descend(self, warm_up: int, steps: int) -> Iterator[float]:
        values = descend(self.loss, self.parameters, self.products, warm_up)
        return islice(values, steps)

    def fit(self, warm_up: int, steps: int, *, quiet: bool) -> Run:
        """Train."""
        curve: list[float] = []
        errors: dict[int, float] = {}
        tested = max(steps // 10, 1)
        begun = time.perf_counter()
        with progress(total=steps, what="training", unit="step", quiet=quiet) as bar:
            for value in self.descend(warm_up, steps):
                curve.append(value)
                bar.update()
                step = len(curve)
                if step % tested:
                    continue
                errors[step] = self.error()
                if not quiet:
                    report(step, value, errors[step], time.perf_counter() - begun)
        errors[len(curve)] = self.error()
        losses = torch.tensor(curve, dtype=torch.float64)
        return Run(losses, errors, self.predict().cpu(), time.perf_counter() - begun)

    def trial(self, warm_up: int) -> Trial:
        """Take a few steps from here, and go back."""
        start = parameters_to_vector(self.parameters).detach().clone()
        before = self.weights()
        losses = list(self.descend(warm_up, TRIAL))
        after = self.weights()
        vector_to_parameters(start, self.parameters)
        return Trial(warm_up, before, torch.tensor(losses, dtype=torch.float64), after)

    def weights(self) -> dict[str, Tensor]:
        """Return the whole parameters, on all ranks."""
        held: dict[str, Tensor] = {}
        for name, p in self.model.named_parameters():
            whole = p.detach()
            dim = CUT.get(name.split(".")[-1])
            if dim is not None:
                whole = pmod.unshard(whole, "model", dim=dim, length=self.width)
            held[name] = whole.cpu().clone()
        return held

    def traffic(self) -> dict[str, tuple[int, int]]:
        """Return by axis the messages and the bytes of a loss and its gradient."""
        with pmod.trace() as traced:
            torch.autograd.grad(self.loss(), self.parameters)
        sent: dict[str, tuple[int, int]] = {axis: (0, 0) for axis in AXES}
        for event in traced.events:
            # calls that send nothing, such as the forward of pvary, are traced as well
            if event.axis in sent and event.nbytes:
                messages, nbytes = sent[event.axis]
                sent[event.axis] = messages + 1, nbytes + event.nbytes
        return sent

    @torch.no_grad()
    def predict(self) -> Tensor:
        """Return u on the grid, on every rank; each rank of "data" computes a share."""
        t, x = pmod.shard([v.reshape(-1, 1) for v in self.grid], "data")
        u = pmod.unshard(self.model(t, x), "data", length=self.truth.numel())
        return u.view_as(self.truth)

    def error(self) -> float:
        """Return the relative L2 error beside the formula."""
        off = torch.linalg.vector_norm(self.predict() - self.truth)
        return (off / torch.linalg.vector_norm(self.truth)).item()
