"""The bounds for the two trainings, and the lines that say whether they agree."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from pmod._console import paint, say
from pmod.demo.options import Options
from pmod.demo.training import Run

# half a point of relative error: rounding grows during a training
ERROR_BOUND = 0.005


@attrs.frozen
class Check:
    """One measured difference and what it may be at most."""

    what: str
    value: float
    bound: float
    text: str

    @property
    def holds(self) -> bool:
        # asked this way round, NaN does not hold
        return self.value <= self.bound

    def __str__(self) -> str:
        verdict = paint("ok", "green")
        if not self.holds:
            verdict = paint("ABOVE THE BOUND", "red")
        return f"{self.what:<34} {self.text}  {verdict}"


def report(checks: Sequence[Check]) -> int:
    """Print the checks; return the exit status, 1 if a bound is violated."""
    for check in checks:
        say(str(check))
    hold = all(check.holds for check in checks)
    return 0 if hold else 1


def curve_bound(options: Options) -> tuple[int, float]:
    """Return how many steps of the loss curves are compared, and their bound.

    Rounding grows as training goes on, so the bound is for the first steps.
    """
    return (100, 1e-10) if options.float64 else (50, 1e-4)


def compare(parallel: Run, serial: Run, options: Options) -> list[Check]:
    """Return the differences of two trainings beside their bounds."""
    steps, bound = curve_bound(options)
    steps = min(steps, len(parallel.losses))
    apart = (parallel.losses - serial.losses).abs()
    curve = apart[:steps].max().item()
    over_first = f"{curve:.1e} over the first {steps} steps (bound {bound:.0e})"
    if steps < len(apart):
        over_first += f"; {apart.max().item():.1e} over all {len(apart)}"
    error = abs(parallel.error - serial.error)
    points = f"{100 * error:.2g} points (bound {100 * ERROR_BOUND:g})"
    return [
        Check("largest difference of the losses", curve, bound, over_first),
        Check("difference of the test errors", error, ERROR_BOUND, points),
    ]
