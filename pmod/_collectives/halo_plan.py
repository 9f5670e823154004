"""Which rows of other shards a rank's window reaches, who sends them, and where to."""

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

    @property
    def end(self) -> int:
        """The row after the last."""
        return self.start + self.rows


class Copy(NamedTuple):
    """Rows brought from one run to another.

    One row to many is repeated; many to one are summed.
    """

    of: Run
    to: Run
    reverse: bool

    @property
    def T(self) -> Copy:
        """The transpose."""
        return Copy(self.to, self.of, self.reverse)


class Plan(NamedTuple):
    """One rank's part in an exchange.

    Buffer 0 is the shard, and buffer g is message g. `permutes` holds the targets and
    the rows of each message.
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
        takes = tuple(copy.T for copy in self.places)
        places = tuple(copy.T for copy in self.takes)
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
    """Return the windows of shards with rows around them."""
    return tuple(
        (start - width[0], end + width[1])
        for start, end in pairwise(accumulate(sizes, initial=0))
    )


def window(
    low: int, high: int, total: int, boundary: str
) -> list[tuple[int, Run, int, bool]]:
    """Return the runs that make up the rows low to high - 1 of the padded whole.

    Of each run: where it is in the window, which rows of the whole, how often, and
    whether reversed.
    """
    out = [(max(low, 0), max(low, 0), min(high, total), False)]
    below, above = (low, min(high, 0)), (max(low, total), high)
    if boundary == "periodic":
        for (a, b), by in ((below, total), (above, -total)):
            out.append((a, a + by, b + by, False))
    elif boundary == "reflect":
        # row a stands for row about - a
        for (a, b), about in ((below, 0), (above, 2 * total - 2)):
            out.append((a, about - b + 1, about - a + 1, True))
    runs: list[tuple[int, Run, int, bool]] = []
    for at, start, end, reverse in out:
        runs.append((at - low, Run(0, start, end - start), end - start, reverse))
    if boundary == "replicate":
        # one row is repeated
        for (a, b), edge in ((below, 0), (above, total - 1)):
            runs.append((a - low, Run(0, edge, 1), b - a, False))
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
    """Return all that a window is made of, whoever holds it; the rest of it is zeros."""
    starts = [0, *accumulate(sizes)]
    out: list[Need] = []
    found = window(low, high, starts[-1], boundary)
    for at, (_, start, count), length, reverse in found:
        first, end = start, start + count
        while first < end:
            # of the shards that start here, the last is not empty
            owner = bisect_right(starts, first, hi=len(sizes)) - 1
            last = min(end, starts[owner + 1])
            place = at + (end - last if reverse else first - start)
            rows = last - first
            # one row may be repeated; of several, each is needed once
            wide = rows if count > 1 else length
            own = first - starts[owner]
            out.append(Need(owner, own, rows, place, wide, reverse))
            first = last
    return out


def _merged(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return intervals without overlap that cover the same rows."""
    out: list[tuple[int, int]] = []
    for start, end in sorted(runs):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


class _Exchange(NamedTuple):
    needs: list[list[Need]]
    # (owner, rank) -> intervals of the owner's rows, each once
    sent: dict[tuple[int, int], list[tuple[int, int]]]
    # (owner, rank) -> which permute carries them
    message: dict[tuple[int, int], int]
    permutes: tuple[tuple[tuple[int, ...], int], ...]


@lru_cache(maxsize=256)
def _exchange(sizes: tuple[int, ...], windows: Windows, boundary: str) -> _Exchange:
    """Return what goes from whom to whom.

    A permute joins the pairs as far apart with as many rows, so that none is sent in
    vain.
    """
    n = len(sizes)
    needs = [_needs(low, high, sizes, boundary) for low, high in windows]
    wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for rank, of in enumerate(needs):
        for need in of:
            if need.owner != rank:
                rows = (need.start, need.start + need.rows)
                wanted.setdefault((need.owner, rank), []).append(rows)
    # a row that a window has twice is sent once
    sent = {pair: _merged(runs) for pair, runs in wanted.items()}
    alike: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for pair, runs in sent.items():
        count = sum(end - start for start, end in runs)
        alike.setdefault(((pair[1] - pair[0]) % n, count), []).append(pair)
    message: dict[tuple[int, int], int] = {}
    permutes: list[tuple[tuple[int, ...], int]] = []
    # in one order on all ranks
    for (_, count), pairs in sorted(alike.items()):
        targets = [-1] * n
        for owner, rank in pairs:
            targets[owner] = rank
            message[owner, rank] = len(permutes) + 1
        permutes.append((tuple(targets), count))
    return _Exchange(needs, sent, message, tuple(permutes))


def window_plan(
    index: int, sizes: tuple[int, ...], windows: Windows, boundary: str
) -> Plan:
    """Return the part of the rank at this index."""
    exchange = _exchange(sizes, windows, boundary)
    own = sizes[index]
    takes: list[Copy] = []
    if own:
        takes.append(Copy(Run(0, 0, own), Run(0, 0, own), False))
    for pair, runs in exchange.sent.items():
        if pair[0] == index:
            takes += _message(runs, exchange.message[pair])
    places: list[Copy] = []
    for need in exchange.needs[index]:
        buffer, start = 0, need.start
        if need.owner != index:
            pair = (need.owner, index)
            buffer = exchange.message[pair]
            start = _place_in(exchange.sent[pair], need.start)
        of = Run(buffer, start, need.rows)
        places.append(Copy(of, Run(0, need.at, need.length), need.reverse))
    low, high = windows[index]
    return Plan(tuple(takes), exchange.permutes, tuple(places), own, high - low)


def _message(runs: list[tuple[int, int]], buffer: int) -> list[Copy]:
    """Return the copies that put runs of the shard one after another in a message."""
    out: list[Copy] = []
    at = 0
    for start, end in runs:
        rows = end - start
        out.append(Copy(Run(0, start, rows), Run(buffer, at, rows), False))
        at += rows
    return out


def _place_in(runs: list[tuple[int, int]], row: int) -> int:
    """Return where a row of the owner's is in a message of these runs."""
    before = [(first, end) for first, end in runs if first <= row]
    return sum(min(end, row) - first for first, end in before)


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


# numbers in, numbers out: compiled code need not see how
for _constant in (exchange_of, plan_back):
    constant_in_graphs(_constant)
