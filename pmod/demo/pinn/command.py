"""`python -m pmod.demo pinn`: train on the ranks, compare with one process, draw."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from pmod._console import check_extra, paint, say
from pmod._errors import PmodError
from pmod.demo import ranks
from pmod.demo.compare import Check, report
from pmod.demo.picture import check_output
from pmod.demo.pinn import parallel, picture, whole
from pmod.demo.pinn.options import TRIAL, Options, local_sizes, parse
from pmod.demo.pinn.parallel import Outcome

# how far losses and parameters may be apart
BOUND = 1e-10
# how far the solution may be from the formula's, after the usual steps
ERROR_BOUND = 0.05


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status.

    It is 0, or 1 if a bound is violated, or 2 if it cannot be run as asked.
    """
    options = parse(arguments)
    try:
        check_extra("matplotlib", "tqdm")
        check_output(options.output)
        mesh = ranks.launched(options.mesh or {"data": 1, "model": -1})
    except PmodError as error:
        print(error, file=sys.stderr)
        return 2
    sizes = local_sizes(options) if mesh is None else mesh.shape
    outcome = ranks.run(mesh, sizes, parallel.train, options)
    return 0 if outcome is None else conclude(outcome, options)


def conclude(outcome: Outcome, options: Options) -> int:
    """Compute in this process alone, compare, draw; return the exit status."""
    sums = [
        f"{count} over {axis} ({sent / 1e3:.1f} kB)"
        for axis, (count, sent) in outcome.sent.items()
    ]
    say(f"\nmessages of a loss and its gradient: {', '.join(sums)} sent by rank 0")
    checks: list[Check] = []
    if options.serial:
        say(
            f"the first {TRIAL} steps, of Adam, and {TRIAL} of L-BFGS after the training, again in one process"
        )
        with ranks.threads(outcome.threads):
            checks += compare(outcome)
    error = outcome.run.error
    if options.steps >= Options().steps and options.warm_up >= Options().warm_up:
        checks.append(
            Check(
                "error beside Cole and Hopf",
                error,
                ERROR_BOUND,
                f"{error:.2%} (bound {ERROR_BOUND:.0%})",
            )
        )
    status = report(checks)
    picture.draw(options.output, outcome)
    say(f"relative L2 error {paint(f'{error:.2%}', 'bold')}; picture: {options.output}")
    return status


def compare(outcome: Outcome) -> list[Check]:
    """Compare the trials with one process.

    That is the loss of each step, and the parameters after the last.
    """
    device = ranks.device_of_one()
    losses: list[Tensor] = []
    parameters: list[Tensor] = []
    for trial in outcome.trials:
        before = {name: value.to(device) for name, value in trial.before.items()}
        curve, after = whole.train(
            before, outcome.t.to(device), outcome.x.to(device), trial.warm_up, TRIAL
        )
        losses.append((trial.losses - curve).abs().max())
        parameters += [
            (trial.after[name] - value.cpu()).abs().max()
            for name, value in after.items()
        ]
    apart = {
        "losses": torch.stack(losses).max().item(),
        "parameters": torch.stack(parameters).max().item(),
    }
    return [
        Check(
            f"difference of the {what}", most, BOUND, f"{most:.1e} (bound {BOUND:.0e})"
        )
        for what, most in apart.items()
    ]
