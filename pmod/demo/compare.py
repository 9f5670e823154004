"""Whether the two trainings agree: the bounds, and the lines that say so."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from pmod.demo.console import paint, say
from pmod.demo.options import Options
from pmod.demo.training import Run

ERROR_BOUND = 0.005  # half a point of relative error


@attrs.frozen
class Check:
    """One measured difference and what it may be at most."""

    what: str
    value: float
    bound: float
    text: str

    @property
    def holds(self) -> bool:
        return self.value <= self.bound  # so that NaN does not

    def __str__(self) -> str:
        verdict = (
            paint("ok", "green") if self.holds else paint("ABOVE THE BOUND", "red")
        )
        return f"{self.what:<34} {self.text}  {verdict}"


def report(checks: Sequence[Check]) -> int:
    """Print them; the exit status of a job: 1 where a bound is violated."""
    for check in checks:
        say(str(check))
    return 0 if all(check.holds for check in checks) else 1


def curve_bound(options: Options) -> tuple[int, float]:
    """Over how many steps the loss curves are compared, and how far they may be apart.

    Rounding grows as training goes on, so the bound is for the first steps.
    """
    return (100, 1e-10) if options.float64 else (50, 1e-4)


def compare(parallel: Run, serial: Run, options: Options) -> list[Check]:
    """The differences of two trainings beside their bounds."""
    steps, bound = curve_bound(options)
    steps = min(steps, len(parallel.losses))
    apart = (parallel.losses - serial.losses).abs()
    curve, error = apart[:steps].max().item(), abs(parallel.error - serial.error)
    whole = (
        ""
        if steps == len(apart)
        else f"; {apart.max().item():.1e} over all {len(apart)}"
    )
    return [
        Check(
            "largest difference of the losses",
            curve,
            bound,
            f"{curve:.1e} over the first {steps} steps (bound {bound:.0e}){whole}",
        ),
        Check(
            "difference of the test errors",
            error,
            ERROR_BOUND,
            f"{100 * error:.2g} points (bound {100 * ERROR_BOUND:g})",
        ),
    ]
