"""How far the derivatives are from those of one process, from what is known of the
winds, and from published ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pmod.demo import ranks
from pmod.demo.compare import Check
from pmod.demo.wind import whole
from pmod.demo.wind.parallel import Outcome
from pmod.demo.wind.winds import Winds, every_second, latitudes, norm, outside

CAP = 10.0  # degrees around each pole that a published field is not compared in: there meridians crowd
SLACK = 1.5  # what the error may be of its estimate

Pair = tuple[Tensor, Tensor]


def with_one_process(outcome: Outcome, winds: Winds) -> Check:
    """How many values have another bit somewhere."""
    device = ranks.device_of_one()
    plain = whole.derivatives(Winds(winds.u.to(device), winds.v.to(device)))
    pairs = zip((outcome.vorticity, outcome.divergence), plain, strict=True)
    unlike = sum(
        int((a.view(torch.int64) != b.cpu().view(torch.int64)).sum()) for a, b in pairs
    )
    text = f"{unlike} of {2 * outcome.vorticity.numel()} (bound 0)"
    return Check("values unlike those of one process", unlike, 0, text)


def with_known(outcome: Outcome, vorticity: Tensor) -> list[Check]:
    """Beside the vorticity that is known, and no divergence: the differences are of
    second order in the spacing.
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
    """Beside published fields, outside the polar caps, and what the stencil's error is
    by its own estimate.

    The differences err at second order: those over twice the spacing by four times as
    much, so a third of the change is what these err by.
    """
    coarse, ours = (
        whole.derivatives(winds.coarser()),
        (outcome.vorticity, outcome.divergence),
    )
    checks: list[Check] = []
    for name, mine, wide, wanted in zip(
        ("vorticity", "divergence"), ours, coarse, published, strict=True
    ):
        estimate = norm((wide - every_second(mine)) / 3, CAP) / norm(
            every_second(wanted), CAP
        )
        error, bound = norm(mine - wanted, CAP) / norm(wanted, CAP), SLACK * estimate
        kept = outside(latitudes(winds.grid[0]), CAP)
        alike = (
            torch.stack([mine[:, kept].flatten(), wanted[:, kept].flatten()])
            .corrcoef()[0, 1]
            .item()
        )
        text = f"{error:.2%} (bound {bound:.2%}, {SLACK:g} times its estimate); correlation {alike:.5f}"
        checks.append(Check(f"{name} beside the published", error, bound, text))
    return checks
