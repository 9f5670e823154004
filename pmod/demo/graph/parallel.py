"""What each rank of the job does: take its part, train, and hand in the results."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

import pmod
from pmod._console import say
from pmod.demo.graph import net
from pmod.demo.graph.net import GraphNet
from pmod.demo.graph.options import AXES, Options
from pmod.demo.graph.partition import owners, part_of, partitioner
from pmod.demo.graph.problems import TOLERANCE, Problems, make_problems
from pmod.demo.graph.surface import Surface
from pmod.demo.training import Run, batches, fit, heading


@attrs.frozen(eq=False)
class Step:
    """One step without its update: weights, problems, loss, and gradients."""

    weights: dict[str, Tensor]
    batch: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


@attrs.frozen(eq=False)
class Outcome:
    """What the comparison, the text and the picture need.

    scale: what the solutions are divided by. steps: before and after the training.
    traffic: per rank its place along data and along graph, its nodes, its ghosts, and
    the bytes it sent in a step: to fetch ghosts, to bring their gradients back, for the
    loss, for the gradients of the parameters. threads: how many a rank computes with.
    """

    surface: Surface
    owner: Tensor
    train: Problems
    test: Problems
    scale: float
    run: Run
    steps: list[Step]
    traffic: list[list[int]]
    axis_sizes: dict[str, int]
    threads: int


def train(options: Options, surface: Surface) -> Outcome | None:
    """Train over the current mesh ("data", "graph"); rank 0 returns the outcome."""
    mesh = pmod.current_mesh()
    quiet = mesh.topology.rank != 0
    surface, owner = _agreed(surface)
    made = make_problems(
        surface, options.train + options.test, options.seed, quiet=quiet
    )
    problems, tests = made[: options.train], made[options.train :]
    scale = problems.u.std().item() or 1.0
    # all ranks draw the same weights
    torch.manual_seed(options.seed)
    model = GraphNet(options.channels, options.rounds).to(options.dtype)
    if not quiet:
        _introduce(surface, model, options)
    trainer = _Trainer(
        model.to(mesh.device), surface, owner, problems, tests, scale, options
    )
    traffic = trainer.traffic()
    batch = next(batches(len(problems), options.batch, options.seed))
    steps = [trainer.step(batch)]
    losses, errors, seconds = fit(
        model, trainer.loss, trainer.error, len(problems), options, quiet=quiet
    )
    steps.append(trainer.step(batch))
    run = Run(losses, errors, trainer.whole(), seconds)
    if quiet:
        return None
    threads = torch.get_num_threads()
    return Outcome(
        surface, owner, problems, tests, scale, run, steps, traffic, mesh.shape, threads
    )


def _agreed(surface: Surface) -> tuple[Surface, Tensor]:
    """Return rank 0's mesh and partition on all ranks.

    Unlike machines may round differently.
    """
    device, ranks = pmod.current_mesh().device, pmod.axis_size("graph")
    held = [surface.points, surface.triangles, owners(surface, ranks)]
    lengths = pmod.pick(
        torch.tensor([len(v) for v in held], device=device), AXES
    ).tolist()
    same = [len(v) for v in held] == lengths
    fitting = held
    if not same:
        pairs = zip(held, lengths, strict=True)
        fitting = [v.new_zeros(n, *v.shape[1:]) for v, n in pairs]
    sent = [v.to(device) for v in fitting]
    points, triangles, owner = map(Tensor.cpu, pmod.pick(sent, AXES))
    return Surface(points, triangles), owner


def _introduce(surface: Surface, model: GraphNet, options: Options) -> None:
    ranks = pmod.axis_size("graph")
    say(f"parts   {ranks} of the nodes, by {partitioner(surface, ranks)}")
    say(
        f"data    {options.train} + {options.test} problems, finite elements solved to a residual of {TOLERANCE:.0e}"
    )
    weights = sum(p.numel() for p in model.parameters())
    say(
        f"model   {options.rounds} rounds of message passing, {options.channels} channels, {weights} parameters"
    )
    say("\n" + heading())


class _Trainer:
    """The problems of this rank: its part of a batch, at its nodes of the mesh."""

    def __init__(
        self,
        model: GraphNet,
        surface: Surface,
        owner: Tensor,
        train: Problems,
        test: Problems,
        scale: float,
        options: Options,
    ) -> None:
        mesh, ranks = pmod.current_mesh(), pmod.axis_size("graph")
        self.model, self.scale, self.nodes, self.options = (
            model,
            scale,
            len(surface),
            options,
        )
        self.part = part_of(surface, owner, options.dtype)
        self.sizes = torch.bincount(owner, minlength=ranks).tolist()
        # unshard joins the nodes of all ranks, one rank after another
        self.order = owner.argsort(stable=True)
        self.train, self.test = (
            v.to(mesh.device).to(options.dtype).rows(self.part.owned)
            for v in (train, test)
        )

    def loss(self, batch: Tensor) -> Tensor:
        """V -> I along "data": `batch` numbers the problems of all ranks."""
        parameters = net.varying(self.model)
        x, u = self._share(batch)
        return self._mean_square(net.predict(self.model, parameters, x, self.part), u)

    def _share(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        mine = self.train[pmod.shard(batch.to(self.train.u.device), "data")]
        return mine.x, mine.u / self.scale

    def _mean_square(self, prediction: Tensor, u: Tensor) -> Tensor:
        return net.loss(prediction, u, self.nodes * self.options.batch)

    def step(self, batch: Tensor) -> Step:
        """Return loss and gradients at the weights as they are."""
        self.model.zero_grad()
        value = self.loss(batch)
        value.backward()
        held = dict(self.model.named_parameters())
        weights = {name: p.detach().cpu().clone() for name, p in held.items()}
        gradients = {
            name: p.grad.cpu().clone() for name, p in held.items() if p.grad is not None
        }
        return Step(weights, batch, value.detach().cpu(), gradients)

    def traffic(self) -> list[list[int]]:
        """Return a row for each rank, as in `Outcome`.

        The gradient is taken in two parts, so that each is counted by itself.
        """
        x, u = self._share(torch.arange(self.options.batch))
        held: dict[str, Tensor] = dict(self.model.named_parameters())
        parameters = net.varying(self.model)
        with pmod.trace() as fetched:
            prediction = net.predict(self.model, parameters, x, self.part)
        with pmod.trace() as added:
            value = self._mean_square(prediction, u)
        with pmod.trace() as returned:
            partial = torch.autograd.grad(
                value, list(parameters.values()), retain_graph=True
            )
        with pmod.trace() as reduced:
            torch.autograd.grad(list(parameters.values()), list(held.values()), partial)
        sent = [t.total_bytes() for t in (fetched, returned, added, reduced)]
        place = [pmod.axis_index(axis) for axis in AXES]
        row = [*place, len(self.part.owned), len(self.part.ghosts), *sent]
        return pmod.all_gather(
            torch.tensor(row, device=x.device), AXES, tiled=False
        ).tolist()

    @torch.no_grad()
    def _here(self) -> Tensor:
        """Return this rank's nodes of the predictions for its problems."""
        x = pmod.shard(self.test.x, "data", dim=1)
        held: dict[str, Tensor] = dict(self.model.named_parameters())
        parts = [
            net.predict(self.model, held, part, self.part)
            for part in x.split(self.options.batch, 1)
        ]
        return self.scale * torch.cat(parts, dim=1)

    def error(self) -> float:
        """Return the mean relative error over the problems of all ranks."""
        errors = net.relative_errors(
            self._here(), pmod.shard(self.test.u, "data", dim=1)
        )
        return pmod.psum(errors.sum(), "data").item() / len(self.test)

    def whole(self) -> Tensor:
        """Return all predictions, at the nodes of the whole mesh, on every rank."""
        nodes = pmod.unshard(self._here(), "graph", sizes=self.sizes)
        rows = pmod.unshard(nodes, "data", dim=1, length=len(self.test)).cpu()
        return torch.zeros_like(rows).index_copy(0, self.order, rows)
