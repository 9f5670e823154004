"""Counts as runs say what they say as lists."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmod._wire.counts import (
    Runs,
    are_equal,
    others_with_any,
    runs_of,
    scaled_counts,
    start_of,
    total,
)

RUNS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)))


def listed(runs: list[tuple[int, int]]) -> list[int]:
    return list(chain.from_iterable([number] * times for number, times in runs))


@given(RUNS, st.data())
def test_runs_are_the_list_that_they_stand_for(runs: list[tuple[int, int]], data: st.DataObject) -> None:
    counts, plain = Runs(runs), listed(runs)
    assert list(counts) == plain == listed(list(runs_of(counts)))
    assert len(counts) == len(plain) and total(counts) == sum(plain)
    assert [counts[i] for i in range(-len(plain), len(plain))] == plain + plain
    assert counts[1:3] == plain[1:3] and are_equal(counts) == are_equal(plain)
    assert list(scaled_counts(3, counts)) == scaled_counts(3, plain)
    for index in range(len(plain) + 1):
        assert start_of(counts, index) == start_of(plain, index) == sum(plain[:index])
    if plain:
        other = data.draw(st.permutations(plain))
        index = data.draw(st.integers(0, len(plain) - 1))
        others = [(a, b) for i, (a, b) in enumerate(zip(plain, other, strict=True)) if i != index]
        for theirs in (other, Runs([(number, 1) for number in other])):
            assert others_with_any(counts, theirs, index, "send") == sum(a > 0 for a, _ in others)
            assert others_with_any(counts, theirs, index, "both") == sum(a > 0 or b > 0 for a, b in others)


def test_there_is_no_rank_after_the_last() -> None:
    for index in (3, -4):
        with pytest.raises(IndexError):
            Runs([(1, 2), (0, 1)])[index]
