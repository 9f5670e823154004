"""How far the derivatives are from one process's, known ones, and published ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pmod.demo import ranks
from pmod.demo.compare import Check
from pmod.demo.wind import whole
from pmod.demo.wind.parallel import Outcome
from pmod.demo.wind.winds import Winds, every_second, latitudes, norm, outside

# a published field is not compared within so many degrees of a pole, where meridians
# crowd
CAP = 10.0
# the error may be this many times its estimate
SLACK = 1.5

Pair = tuple[Tensor, Tensor]


def with_one_process(outcome: Outcome, winds: Winds) -> Check:
    """Return how many values have another bit somewhere."""
    device = ranks.device_of_one()
    plain = whole.derivatives(Winds(winds.u.to(device), winds.v.to(device)))
    pairs = zip((outcome.vorticity, outcome.divergence), plain, strict=True)
    unlike = sum(
        int((a.view(torch.int64) != b.cpu().view(torch.int64)).sum()) for a, b in pairs
    )
    text = f"{unlike} of {2 * outcome.vorticity.numel()} (bound 0)"
    return Check("values unlike those of one process", unlike, 0, text)


def with_known(outcome: Outcome, vorticity: Tensor) -> list[Check]:
    """Compare with the vorticity that is known, and no divergence.

    The differences are of second order in the spacing.
    """
    bound, size = (math.pi / (outcome.vorticity.shape[-2] - 1)) ** 2, norm(vorticity)
    errors = norm(outcome.vorticity - vorticity) / size, norm(outcome.divergence) / size
    names = ("error of the vorticity", "divergence, which should be 0")
    return [
        Check(
            name,
            error,
            bound,
            f"{error:.1e} of the vorticity (bound {bound:.1e}, the spacing squared)",
        )
        for name, error in zip(names, errors, strict=True)
    ]


def with_published(outcome: Outcome, winds: Winds, published: Pair) -> list[Check]:
    """Compare with published fields, outside the polar caps.

    Beside the difference stands the stencil's error, by its own estimate.

    The differences err at second order. Those over twice the spacing err by four times
    as much, so the error of these is a third of the change.
    """
    coarse = whole.derivatives(winds.coarser())
    ours = (outcome.vorticity, outcome.divergence)
    names = ("vorticity", "divergence")
    kept = outside(latitudes(winds.grid[0]), CAP)
    checks: list[Check] = []
    for name, mine, wide, wanted in zip(names, ours, coarse, published, strict=True):
        change = norm((wide - every_second(mine)) / 3, CAP)
        estimate = change / norm(every_second(wanted), CAP)
        error, bound = norm(mine - wanted, CAP) / norm(wanted, CAP), SLACK * estimate
        both = torch.stack([mine[:, kept].flatten(), wanted[:, kept].flatten()])
        alike = both.corrcoef()[0, 1].item()
        limit = f"bound {bound:.2%}, {SLACK:g} times its estimate"
        text = f"{error:.2%} ({limit}); correlation {alike:.5f}"
        checks.append(Check(f"{name} beside the published", error, bound, text))
    return checks
