"""`python -m pmod.demo graph`: train on the ranks, compare with one process, draw."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from pmod._console import check_extra, paint, say
from pmod._errors import PmodError
from pmod.demo import ranks
from pmod.demo.compare import Check, report
from pmod.demo.graph import files, parallel, picture, whole
from pmod.demo.graph.options import Options, check_fit, local_sizes, parse
from pmod.demo.graph.parallel import Outcome, Step
from pmod.demo.graph.surface import Surface, plate
from pmod.demo.picture import check_output


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status.

    It is 0, or 1 if a bound is violated, or 2 if it cannot be run as asked.
    """
    options = parse(arguments)
    try:
        check_extra("matplotlib", "tqdm", "scipy")
        check_output(options.output)
        if options.mesh_file is None:
            surface, said = plate(options.nodes, options.seed), list[str]()
        else:
            surface, said = files.read(options.mesh_file)
        mesh = ranks.launched(options.mesh or {"data": 1, "graph": -1})
        sizes = local_sizes(options) if mesh is None else mesh.shape
        check_fit(options, sizes)
    except PmodError as error:
        print(error, file=sys.stderr)
        return 2
    if mesh is None or mesh.topology.rank == 0:
        _introduce(surface, said, options)
    outcome = ranks.run(mesh, sizes, parallel.train, options, surface)
    return 0 if outcome is None else conclude(outcome, options)


def _introduce(surface: Surface, said: list[str], options: Options) -> None:
    source = "a plate with two holes"
    if options.mesh_file is not None:
        source = f"from {options.mesh_file.name}"
    pieces = "" if surface.pieces == 1 else f" in {surface.pieces} pieces"
    triangles = f"{len(surface.triangles)} triangles{pieces}"
    say(f"nodes   {len(surface)}, in {triangles}: {source}")
    for line in said:
        say(f"        {line}")


def conclude(outcome: Outcome, options: Options) -> int:
    """Compute in this process alone, compare, draw; return the exit status."""
    say()
    for line in traffic(outcome):
        say(line)
    checks: list[Check] = []
    if options.serial:
        with ranks.threads(outcome.threads):
            checks = compare(outcome, options)
        nodes = f"all {len(outcome.surface)} nodes, before and after the training"
        say(f"\nthe same in one process that holds {nodes}")
    status = report(checks)
    picture.draw(options.output, outcome)
    error = paint(f"{outcome.run.error:.2%}", "bold")
    say(f"test error {error}; picture: {options.output}")
    return status


def traffic(outcome: Outcome) -> list[str]:
    """Say how many ghosts each rank has, and what it sent in a step."""
    names = (
        "rank",
        "nodes",
        "ghosts",
        "share",
        "fetch ghosts",
        "their gradients",
        "loss",
        "parameters",
        "sent, kB",
    )
    widths = [max(len(name), 6) for name in names]
    lines = ["kB that each rank sends in a step, counted"]
    lines.append("  ".join(map(str.rjust, names, widths)))
    for data, graph, nodes, ghosts, *sent in outcome.traffic[:8]:
        # a rank has no nodes if there are more ranks than nodes
        share = f"{ghosts / nodes:.1%}" if nodes else "-"
        kilobytes = [f"{n / 1e3:.2f}" for n in (*sent, sum(sent))]
        cells = [f"{data},{graph}", str(nodes), str(ghosts), share, *kilobytes]
        lines.append("  ".join(map(str.rjust, cells, widths)))
    if len(outcome.traffic) > 8:
        lines.append(f"... and {len(outcome.traffic) - 8} ranks more")
    # ranks along data hold the same nodes: they are counted once
    rows = [row for row in outcome.traffic if row[0] == 0]
    share = sum(row[3] for row in rows) / len(outcome.surface)
    total = sum(sum(row[4:]) for row in outcome.traffic)
    together = f"all ranks together sent {total / 1e3:.2f} kB in a step"
    return [*lines, f"ghost rows are {share:.1%} of all nodes; {together}"]


# --- the comparison -------------------------------------------------------------------


def bound(options: Options) -> float:
    """Return how far loss and gradients may be apart."""
    return 1e-10 if options.float64 else 1e-4


def compare(outcome: Outcome, options: Options) -> list[Check]:
    """Compare loss and gradients with one process, before and after the training."""
    pairs = [_differences(step, outcome, options) for step in outcome.steps]
    apart = torch.stack([loss for loss, _ in pairs])
    names = list(outcome.steps[0].weights)
    # amax keeps a NaN, which then is above the bound
    gradients = torch.stack([each for _, each in pairs]).amax(0)
    most, limit = gradients.max().item(), bound(options)
    worst = names[int(gradients.argmax())]
    return [
        Check(
            "largest difference of the losses",
            apart.max().item(),
            limit,
            f"{apart.max().item():.1e} (bound {limit:.0e})",
        ),
        Check(
            f"of the {len(names)} parameters' gradients",
            most,
            limit,
            f"{most:.1e} (bound {limit:.0e}), in {worst}",
        ),
    ]


def _differences(
    step: Step, outcome: Outcome, options: Options
) -> tuple[Tensor, Tensor]:
    """Return how far the loss is apart, and each gradient where that is furthest."""
    device = ranks.device_of_one()
    weights = {name: value.to(device) for name, value in step.weights.items()}
    problems = outcome.train[step.batch].to(options.dtype).to(device)
    loss, gradients = whole.loss_and_gradients(
        weights, outcome.surface, problems.x, problems.u / outcome.scale
    )
    each: list[Tensor] = []
    for name, gradient in gradients.items():
        each.append((step.gradients[name] - gradient.cpu()).abs().max())
    return (step.loss - loss.cpu()).abs(), torch.stack(each)
