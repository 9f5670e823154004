"""Measuring: blocks of calls that take turns, and what comes out of their times.

Whatever is compared runs in the same processes, in blocks that take turns: each round
takes the pairs in a new order, and the two of a pair in a new order, one right after the
other. A ratio is the median of the rounds' ratios, with the quartiles beside it. Quartiles
that lie far apart say that the machine was busy; more rounds help.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from pmod.bench.progress import tell


@frozen
class Spread:
    """A median between its quartiles."""

    low: float
    median: float
    high: float

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        low, median, high = np.quantile(list(values), [0.25, 0.5, 0.75]).tolist()
        return Spread(low, median, high)


@frozen
class Result:
    """What one function costs in one case."""

    section: str
    function: str
    case: str
    pmod_us: Spread
    raw_us: Spread | None
    # pmod's time over that of the raw call, None if there is no such call
    ratio: Spread | None

    @staticmethod
    def of(
        section: str, function: str, case: str, seconds: Sequence[Sequence[float]]
    ) -> Result:
        """Return it from the seconds of each round: (pmod's, raw's), or (pmod's,)."""
        pmod_us = Spread.of(1e6 * times[0] for times in seconds)
        if len(seconds[0]) == 1:
            return Result(section, function, case, pmod_us, None, None)
        raw_us = Spread.of(1e6 * times[1] for times in seconds)
        # of each round's ratio, not of the medians: the two of a round were measured
        # right after one another, on a machine that was equally busy
        ratio = Spread.of(ours / raw for ours, raw in seconds)
        return Result(section, function, case, pmod_us, raw_us, ratio)


Block: TypeAlias = Callable[[], float]
"""Runs something a number of times, and returns the seconds that one took."""


@frozen
class Clock:
    """How blocks are timed."""

    now: Callable[[], float]
    block_seconds: float
    # comes before each block
    ready: Callable[[], object] = lambda: None
    # hears how far it is
    tell: Callable[[str], None] = tell
    # makes the ranks' times one
    agree: Callable[[Tensor], Tensor] = lambda times: times

    def block(self, run: Callable[[], object]) -> Block:
        """Return a block that runs it, warmed up, as often as fills the block's time."""
        self.seconds(run, 3)
        own = torch.tensor(self.seconds(run, 3), dtype=torch.float64)
        # all ranks must run it equally often, or one of them waits for ever
        once = self.agree(own).item()
        calls = math.ceil(self.block_seconds / max(once, 1e-9))
        return partial(self.seconds, run, max(1, min(1000, calls)))

    def seconds(self, run: Callable[[], object], calls: int) -> float:
        """Return the seconds of one of so many calls."""
        self.ready()
        start = self.now()
        for _ in range(calls):
            run()
        return (self.now() - start) / calls


def take_turns(
    pairs: Sequence[Sequence[Block]],
    rounds: int,
    begun: Callable[[int], None] = lambda number: None,
) -> list[list[list[float]]]:
    """Return the seconds of each pair's blocks, in each round: [pair][round][block].

    The order is random, and the same on all ranks. begun: hears the number of each
    round as it begins.
    """
    chance = random.Random(0)
    times: list[list[list[float]]] = [[] for _ in pairs]
    for number in range(rounds):
        begun(number)
        for p in chance.sample(range(len(pairs)), len(pairs)):
            pair = pairs[p]
            seconds = [math.nan] * len(pair)
            for b in chance.sample(range(len(pair)), len(pair)):
                seconds[b] = pair[b]()
            times[p].append(seconds)
    return times


Runs: TypeAlias = dict[tuple[str, str], Sequence[Callable[[], object]]]
"""What is compared, by function and case: (ours, raw), or (ours,)."""


def compare(section: str, runs: Runs, clock: Clock, rounds: int) -> list[Result]:
    """Return the results of a section."""
    pairs: list[list[Block]] = []
    for number, pair in enumerate(runs.values()):
        clock.tell(f"{section}: {number} of {len(runs)} comparisons warmed up")
        pairs.append([clock.block(run) for run in pair])
    times = take_turns(
        pairs,
        rounds,
        lambda number: clock.tell(f"{section}: round {number + 1} of {rounds}"),
    )
    clock.tell("")
    results: list[Result] = []
    for (function, case), of_rounds in zip(runs, times, strict=True):
        agreed = clock.agree(torch.tensor(of_rounds, dtype=torch.float64))
        results.append(Result.of(section, function, case, agreed.tolist()))
    return results
