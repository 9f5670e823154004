"""The bars that pmod holds itself to, and whether what was measured is below them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from attrs import frozen

from pmod.bench.cases import CASES
from pmod.bench.clock import Result
from pmod.bench.peers import BOTH_WAYS


@frozen
class Bar:
    """What some functions may cost: a ratio, or microseconds."""

    name: str
    section: str
    functions: tuple[str, ...]
    # how the names of the cases end; of several cases the dearest counts, so that of
    # several peers it is the cheapest
    case: str
    limit: float
    of: Literal["x", "us"] = "x"


# On the fake process group, where nothing is sent; along an axis of one rank nothing is
# sent anywhere.
BARS = (
    Bar(
        "one message in place, as raw",
        "host",
        ("psum", "pmean", "pick", "broadcast", "reduce"),
        "forward",
        1.0,
    ),
    Bar(
        "one message into another tensor, as raw",
        "host",
        (
            "all_gather",
            "psum_scatter",
            "all_to_all",
            "unshard",
            "pshift",
            "ppermute",
            "pshuffle",
        ),
        "forward",
        1.2,
    ),
    Bar("an extremum, as raw", "host", ("pmax", "pmin"), "forward", 1.6),
    Bar("a sum and back, as the cheapest peer", "peers", ("psum",), BOTH_WAYS, 0.8),
    Bar(
        "cut or joined and back, as the cheapest peer",
        "peers",
        ("all_gather", "psum_scatter", "all_to_all"),
        BOTH_WAYS,
        0.6,
    ),
    Bar(
        "pvary and back, as the cheapest peer",
        "peers",
        ("pvary",),
        BOTH_WAYS,
        1.0,
    ),
    Bar("an axis of one rank", "alone", tuple(CASES), "no grad", 0.5, of="us"),
)

SECTIONS = tuple(dict.fromkeys(bar.section for bar in BARS))
"""The sections that have a bar."""


@frozen
class Verdict:
    """A function beside its bar."""

    bar: Bar
    function: str
    # None where nothing was measured
    measured: float | None

    @property
    def missed(self) -> bool:
        """Whether it costs more than it may."""
        return self.measured is not None and self.measured > self.bar.limit

    @property
    def word(self) -> str:
        """What stands in the table."""
        if self.measured is None:
            return "not measured"
        return "MISSED" if self.missed else "held"


def judged(results: Sequence[Result]) -> list[Verdict]:
    """Return each function of each bar beside what was measured of it."""
    verdicts: list[Verdict] = []
    for bar in BARS:
        for function in bar.functions:
            found: list[float] = []
            for result in results:
                its_own = (result.section, result.function) == (bar.section, function)
                if its_own and result.case.endswith(bar.case):
                    found.append(_measured(result, bar))
            verdicts.append(Verdict(bar, function, max(found, default=None)))
    return verdicts


def _measured(result: Result, bar: Bar) -> float:
    if bar.of == "us" or result.ratio is None:
        return result.pmod_us.median
    return result.ratio.median
