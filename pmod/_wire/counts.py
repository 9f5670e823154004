"""One number per rank, as a wire takes them: a list, or runs of equal numbers.

Real wires hold a list, which the backend wants. A wire to nobody holds runs, so that
131,072 ranks cost as much as four.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias, overload

Run: TypeAlias = tuple[int, int]
"""A number, and how many ranks in a row it stands for."""


class Runs(Sequence[int]):
    """One number per rank, as runs of equal numbers."""

    __slots__ = ("_size", "runs")

    def __init__(self, runs: Sequence[Run]) -> None:
        joined: list[Run] = []
        for number, times in runs:
            if joined and joined[-1][0] == number:
                joined[-1] = number, joined[-1][1] + times
            elif times:
                joined.append((number, times))
        self.runs = joined
        self._size = sum([times for _, times in joined])

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return list(self)[index]
        left = index + self._size if index < 0 else index
        for number, times in self.runs:
            if 0 <= left < times:
                return number
            left -= times
        raise IndexError(index)

    def __iter__(self) -> Iterator[int]:
        for number, times in self.runs:
            yield from [number] * times


def runs_of(counts: Sequence[int]) -> Sequence[Run]:
    """Return the numbers as runs; each of a list is one by itself."""
    if isinstance(counts, Runs):
        return counts.runs
    return [(count, 1) for count in counts]


def total(counts: Sequence[int]) -> int:
    """Return the sum of the numbers."""
    if isinstance(counts, Runs):
        return sum([number * times for number, times in counts.runs])
    return sum(counts)


def start_of(counts: Sequence[int], index: int) -> int:
    """Return the sum of the numbers before a rank's own."""
    if not isinstance(counts, Runs):
        return sum(counts[:index])
    start = 0
    for number, times in counts.runs:
        start += number * min(times, index)
        index -= min(times, index)
    return start


def are_equal(counts: Sequence[int]) -> bool:
    """Return whether all ranks have one number."""
    if isinstance(counts, Runs):
        return len(counts.runs) == 1
    return len(set(counts)) == 1


def scaled_counts(scale: int, counts: Sequence[int]) -> Sequence[int]:
    """Return the counts of parts of which an element counts as `scale`."""
    if isinstance(counts, Runs):
        return Runs([(scale * number, times) for number, times in counts.runs])
    return [scale * count for count in counts]


def others_with_any(
    send: Sequence[int], recv: Sequence[int], index: int, to: Literal["both", "send"]
) -> int:
    """Return how many ranks but `index` are sent something, or send or are sent it."""
    sent, received = list(runs_of(send)), list(runs_of(recv))
    found = 0
    # The ends of both lists of runs are met in turn, so this takes as many steps as
    # there are runs.
    while sent and received:
        (leaving, ahead), (arriving, also) = sent.pop(), received.pop()
        step = min(ahead, also)
        if leaving or (to == "both" and arriving):
            found += step
        if ahead > step:
            sent.append((leaving, ahead - step))
        if also > step:
            received.append((arriving, also - step))
    own = send[index] or (to == "both" and recv[index])
    return found - 1 if own else found
