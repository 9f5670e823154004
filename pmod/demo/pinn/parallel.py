"""What each rank of the job does: take its points and its part of each layer, train,
and hand the results to rank 0.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice

import attrs
import torch
from torch import Tensor
from torch.nn.utils.convert_parameters import parameters_to_vector, vector_to_parameters

import pmod
from pmod.demo.console import progress, say
from pmod.demo.pinn import net
from pmod.demo.pinn.burgers import collocation_points, grid, solution
from pmod.demo.pinn.descent import descend
from pmod.demo.pinn.net import CUT, Net
from pmod.demo.pinn.options import AXES, TRIAL, Options
from pmod.demo.training import Run, heading, report


@attrs.frozen(eq=False)
class Trial:
    """A few steps, all of Adam or of L-BFGS: the whole weights before, the loss of
    each, the weights after the last.
    """

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
    """Train over the current mesh ("data", "model"); the outcome on rank 0, None
    elsewhere.
    """
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
    return (
        None
        if quiet
        else Outcome(*points, run, trials, sent, mesh.shape, torch.get_num_threads())
    )


class _Trainer:
    """The points of this rank along "data", its part of the network along "model"."""

    def __init__(
        self, model: Net, points: tuple[Tensor, Tensor], options: Options
    ) -> None:
        device, self.model, self.count = (
            pmod.current_mesh().device,
            model,
            options.points,
        )
        self.parameters, self.width = list(model.parameters()), options.width
        same = pmod.pick(
            [v.to(device) for v in points], AXES
        )  # unlike machines may round differently
        self.t, self.x = (v.clone().requires_grad_() for v in pmod.shard(same, "data"))
        self.grid = [v.to(device) for v in grid()]
        self.truth = solution(*grid()).to(device)
        # what several ranks hold is counted on the first of them
        first = [pmod.axis_index(axis) == 0 for axis in AXES]
        counts = [
            first[0] and (first[1] or name.split(".")[-1] in CUT)
            for name, _ in model.named_parameters()
        ]
        self.counted = torch.cat(
            [
                p.new_full((p.numel(),), c)
                for p, c in zip(self.parameters, counts, strict=True)
            ]
        )

    def loss(self) -> Tensor:
        return net.loss(self.model, self.t, self.x, self.count)

    def products(self, a: Tensor, b: Tensor) -> Tensor:
        """Of vectors like the parameters, over all ranks: what decides is then the same
        on all. V -> I.
        """
        return pmod.psum((a * self.counted) @ b.T, AXES)

    def descend(self, warm_up: int, steps: int) -> Iterator[float]:
        return islice(
            descend(self.loss, self.parameters, self.products, warm_up), steps
        )

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
                if len(curve) % tested == 0:
                    errors[len(curve)] = self.error()
                    if not quiet:
                        report(
                            len(curve),
                            value,
                            errors[len(curve)],
                            time.perf_counter() - begun,
                        )
        errors[len(curve)] = self.error()
        losses = torch.tensor(curve, dtype=torch.float64)
        return Run(losses, errors, self.predict().cpu(), time.perf_counter() - begun)

    def trial(self, warm_up: int) -> Trial:
        """A few steps from here, and back."""
        start, before = (
            parameters_to_vector(self.parameters).detach().clone(),
            self.weights(),
        )
        losses = list(self.descend(warm_up, TRIAL))
        after = self.weights()
        vector_to_parameters(start, self.parameters)
        return Trial(warm_up, before, torch.tensor(losses, dtype=torch.float64), after)

    def weights(self) -> dict[str, Tensor]:
        """The whole parameters, on all ranks."""
        held: dict[str, Tensor] = {}
        for name, p in self.model.named_parameters():
            dim = CUT.get(name.split(".")[-1])
            whole = (
                p.detach()
                if dim is None
                else pmod.unshard(p.detach(), "model", dim=dim, length=self.width)
            )
            held[name] = whole.cpu().clone()
        return held

    def traffic(self) -> dict[str, tuple[int, int]]:
        """By axis, the messages and the bytes of a loss and its gradient."""
        with pmod.trace() as traced:
            torch.autograd.grad(self.loss(), self.parameters)
        of = {
            axis: [
                event for event in traced.events if event.axis == axis and event.nbytes
            ]
            for axis in AXES
        }
        return {
            axis: (len(events), sum(event.nbytes for event in events))
            for axis, events in of.items()
        }

    @torch.no_grad()
    def predict(self) -> Tensor:
        """u on the grid, on every rank: each rank of "data" computes its share."""
        t, x = pmod.shard([v.reshape(-1, 1) for v in self.grid], "data")
        return pmod.unshard(
            self.model(t, x), "data", length=self.truth.numel()
        ).view_as(self.truth)

    def error(self) -> float:
        """The relative L2 error beside the formula."""
        return (
            torch.linalg.vector_norm(self.predict() - self.truth)
            / torch.linalg.vector_norm(self.truth)
        ).item()
