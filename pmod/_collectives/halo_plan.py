"""Which pieces of the neighbours' shards a rank's windows reach, who sends them, and
where they are put.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeAlias

from pmod._collectives.permutes import inverse_of
from pmod._torch import constant_in_graphs


class Run(NamedTuple):
    """Rows one after another in a buffer."""

    buffer: int
    start: int
    rows: int


class Copy(NamedTuple):
    """Rows brought from one run to another; one row to many is repeated, many to one
    are summed.
    """

    of: Run
    to: Run
    reverse: bool

    @property
    def T(self) -> Copy:
        """The transpose."""
        return Copy(self.to, self.of, self.reverse)


class Plan(NamedTuple):
    """One rank's part; buffer 0 is the shard, buffer g message g. `permutes`: targets
    and rows of each message.
    """

    takes: tuple[Copy, ...]
    permutes: tuple[tuple[tuple[int, ...], int], ...]
    places: tuple[Copy, ...]
    held: int  # rows of the shard
    gives: int  # rows of the result

    @property
    def T(self) -> Plan:
        """The transpose: that of each step, in reverse order."""
        back = tuple((inverse_of(targets), rows) for targets, rows in self.permutes)
        takes, places = (
            tuple(copy.T for copy in copies) for copies in (self.places, self.takes)
        )
        return Plan(takes, back, places, self.held, self.held)

    @property
    def moves(self) -> bool:
        """The window is not the shard itself, or others need rows of it."""
        return (
            bool(self.permutes) or self.takes != self.places or self.held != self.gives
        )


Windows: TypeAlias = tuple[tuple[int, int], ...]
"""Of each rank: the rows low to high - 1 of the padded whole, those before its first
below 0.
"""


def _around(sizes: tuple[int, ...], width: tuple[int, int]) -> Windows:
    """Every shard with rows around it."""
    return tuple(
        (start - width[0], end + width[1])
        for start, end in pairwise(accumulate(sizes, initial=0))
    )


def _window(
    low: int, high: int, total: int, boundary: str
) -> list[tuple[int, Run, int, bool]]:
    """The rows low to high - 1 of the padded whole: where in the window, which of its
    rows, how often, reversed.
    """
    out = [(max(low, 0), max(low, 0), min(high, total), False)]
    below, above = (low, min(high, 0)), (max(low, total), high)
    if boundary == "periodic":
        out += [
            (a, a + by, b + by, False)
            for (a, b), by in ((below, total), (above, -total))
        ]
    elif boundary == "reflect":  # row a stands for row about - a
        out += [
            (a, about - b + 1, about - a + 1, True)
            for (a, b), about in ((below, 0), (above, 2 * total - 2))
        ]
    runs = [
        (at - low, Run(0, start, end - start), end - start, reverse)
        for at, start, end, reverse in out
    ]
    if boundary == "replicate":
        edges = ((below, 0), (above, total - 1))
        runs += [(a - low, Run(0, edge, 1), b - a, False) for (a, b), edge in edges]
    return [run for run in runs if run[2] > 0]


class Need(NamedTuple):
    """Rows of an owner's shard, and where they go in the window."""

    owner: int
    start: int
    rows: int
    at: int
    length: int
    reverse: bool


def _needs(low: int, high: int, sizes: tuple[int, ...], boundary: str) -> list[Need]:
    """All that a window is made of, whoever holds it; what is not listed is zeros."""
    starts = [0, *accumulate(sizes)]
    out: list[Need] = []
    for at, (_, start, count), length, reverse in _window(
        low, high, starts[-1], boundary
    ):
        first, end = start, start + count
        while first < end:
            owner = (
                bisect_right(starts, first, hi=len(sizes)) - 1
            )  # of shards that start here, the last is not empty
            last = min(end, starts[owner + 1])
            place = at + (end - last if reverse else first - start)
            rows = last - first
            out.append(
                Need(
                    owner,
                    first - starts[owner],
                    rows,
                    place,
                    rows if count > 1 else length,
                    reverse,
                )
            )
            first = last
    return out


def _merged(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Intervals without overlap that cover the same rows."""
    out: list[tuple[int, int]] = []
    for start, end in sorted(runs):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


class _Exchange(NamedTuple):
    needs: list[list[Need]]
    sent: dict[
        tuple[int, int], list[tuple[int, int]]
    ]  # (owner, rank) -> intervals of the owner's rows, each once
    message: dict[tuple[int, int], int]  # (owner, rank) -> which permute carries them
    permutes: tuple[tuple[tuple[int, ...], int], ...]


@lru_cache(maxsize=256)
def _exchange(sizes: tuple[int, ...], windows: Windows, boundary: str) -> _Exchange:
    """What goes from whom to whom. A permute joins the pairs as far apart with as many
    rows: none is sent in vain.
    """
    n = len(sizes)
    needs = [_needs(low, high, sizes, boundary) for low, high in windows]
    wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for rank, of in enumerate(needs):
        for need in of:
            if need.owner != rank:
                wanted.setdefault((need.owner, rank), []).append(
                    (need.start, need.start + need.rows)
                )
    sent = {pair: _merged(runs) for pair, runs in wanted.items()}
    alike: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for pair, runs in sent.items():
        rows = sum(end - start for start, end in runs)
        alike.setdefault(((pair[1] - pair[0]) % n, rows), []).append(pair)
    message: dict[tuple[int, int], int] = {}
    permutes: list[tuple[tuple[int, ...], int]] = []
    for (_, rows), pairs in sorted(alike.items()):
        targets = [-1] * n
        for owner, rank in pairs:
            targets[owner] = rank
            message[owner, rank] = len(permutes) + 1
        permutes.append((tuple(targets), rows))
    return _Exchange(needs, sent, message, tuple(permutes))


def window_plan(
    index: int, sizes: tuple[int, ...], windows: Windows, boundary: str
) -> Plan:
    """The part of the rank at this index."""
    exchange = _exchange(sizes, windows, boundary)
    own = sizes[index]
    takes = [Copy(Run(0, 0, own), Run(0, 0, own), False)] if own else []
    for (owner, rank), runs in exchange.sent.items():
        at = 0
        for start, end in runs if owner == index else ():
            takes.append(
                Copy(
                    Run(0, start, end - start),
                    Run(exchange.message[owner, rank], at, end - start),
                    False,
                )
            )
            at += end - start
    places: list[Copy] = []
    for need in exchange.needs[index]:
        buffer, start = 0, need.start
        if need.owner != index:
            pair = (need.owner, index)
            buffer = exchange.message[pair]
            start = sum(
                min(end, need.start) - first
                for first, end in exchange.sent[pair]
                if first <= need.start
            )
        places.append(
            Copy(
                Run(buffer, start, need.rows),
                Run(0, need.at, need.length),
                need.reverse,
            )
        )
    low, high = windows[index]
    return Plan(tuple(takes), exchange.permutes, tuple(places), own, high - low)


@lru_cache(maxsize=256)
def _around_plan(
    index: int, sizes: tuple[int, ...], width: tuple[int, int], boundary: str
) -> Plan:
    return window_plan(index, sizes, _around(sizes, width), boundary)


def exchange_of(
    index: int, sizes: tuple[int, ...], width: tuple[int, int], boundary: str
) -> Plan:
    return _around_plan(index, sizes, width, boundary)


def plan_back(
    index: int, sizes: tuple[int, ...], width: tuple[int, int], boundary: str
) -> Plan:
    return _around_plan(index, sizes, width, boundary).T


for _constant in (
    exchange_of,
    plan_back,
):  # numbers in, numbers out: compiled code need not see how
    constant_in_graphs(_constant)
