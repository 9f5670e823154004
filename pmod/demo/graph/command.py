"""`python -m pmod.demo graph`: parse, train on the ranks, compare with one process, say
what was sent, draw.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from pmod._errors import PmodError
from pmod.demo import ranks
from pmod.demo.compare import Check, report
from pmod.demo.console import check_extra, paint, say
from pmod.demo.graph import files, parallel, picture, whole
from pmod.demo.graph.options import Options, check_fit, local_sizes, parse
from pmod.demo.graph.parallel import Outcome, Step
from pmod.demo.graph.surface import Surface, plate
from pmod.demo.picture import check_output


def main(arguments: Sequence[str]) -> int:
    """Run the command; its exit status: 0, or 1 where a bound is violated, or 2 where
    it cannot be run as asked.
    """
    options = parse(arguments)
    try:
        check_extra("matplotlib", "tqdm", "scipy")
        check_output(options.output)
        surface, said = (
            files.read(options.mesh_file)
            if options.mesh_file
            else (plate(options.nodes, options.seed), [])
        )
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
    source = (
        "a plate with two holes"
        if options.mesh_file is None
        else f"from {options.mesh_file.name}"
    )
    pieces = "" if surface.pieces == 1 else f" in {surface.pieces} pieces"
    say(
        f"nodes   {len(surface)}, in {len(surface.triangles)} triangles{pieces}: {source}"
    )
    for line in said:
        say(f"        {line}")


def conclude(outcome: Outcome, options: Options) -> int:
    """Compute in this process alone, compare, draw; the exit status."""
    say()
    for line in traffic(outcome):
        say(line)
    checks: list[Check] = []
    if options.serial:
        with ranks.threads(outcome.threads):
            checks = compare(outcome, options)
        say(
            f"\nthe same in one process that holds all {len(outcome.surface)} nodes, before and after the training"
        )
    status = report(checks)
    picture.draw(options.output, outcome)
    say(
        f"test error {paint(f'{outcome.run.error:.2%}', 'bold')}; picture: {options.output}"
    )
    return status


def traffic(outcome: Outcome) -> list[str]:
    """How many ghosts each rank has, and what it sent in a step."""
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
    heads = "  ".join(name.rjust(w) for name, w in zip(names, widths, strict=True))
    lines = ["kB that each rank sends in a step, counted", heads]
    for data, graph, nodes, ghosts, *sent in outcome.traffic[:8]:
        share = f"{ghosts / nodes:.1%}" if nodes else "-"
        cells = [
            f"{data},{graph}",
            str(nodes),
            str(ghosts),
            share,
            *(f"{n / 1e3:.2f}" for n in (*sent, sum(sent))),
        ]
        lines.append(
            "  ".join(cell.rjust(w) for cell, w in zip(cells, widths, strict=True))
        )
    if len(outcome.traffic) > 8:
        lines.append(f"... and {len(outcome.traffic) - 8} ranks more")
    rows = [
        row for row in outcome.traffic if row[0] == 0
    ]  # along data they hold the same nodes
    share = sum(row[3] for row in rows) / len(outcome.surface)
    total = sum(sum(row[4:]) for row in outcome.traffic)
    return [
        *lines,
        f"ghost rows are {share:.1%} of all nodes; all ranks together sent {total / 1e3:.2f} kB in a step",
    ]


# --- the comparison -------------------------------------------------------------------


def bound(options: Options) -> float:
    """How far loss and gradients may be apart."""
    return 1e-10 if options.float64 else 1e-4


def compare(outcome: Outcome, options: Options) -> list[Check]:
    """Loss and gradients of the ranks beside those of one process, before and after the
    training.
    """
    pairs = [_differences(step, outcome, options) for step in outcome.steps]
    apart = torch.stack([loss for loss, _ in pairs])
    names = list(outcome.steps[0].weights)
    gradients = torch.stack([each for _, each in pairs]).amax(0)  # of NaN it makes NaN
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
    """Of the loss, and of the gradient in each weight, at the entry where it is
    largest.
    """
    device = ranks.device_of_one()
    weights = {name: value.to(device) for name, value in step.weights.items()}
    problems = outcome.train[step.batch].to(options.dtype).to(device)
    loss, gradients = whole.loss_and_gradients(
        weights, outcome.surface, problems.x, problems.u / outcome.scale
    )
    each = [
        (step.gradients[name] - gradient.cpu()).abs().max()
        for name, gradient in gradients.items()
    ]
    return (step.loss - loss.cpu()).abs(), torch.stack(each)
