"""Layouts alone: what a reshape, a slice and a broadcast make of cuts, held against indices of the whole."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import pmod
from pmod._domain.layout import (
    Cut,
    Fold,
    Layout,
    Part,
    meeting,
    reshape,
    rows_held,
    sliced,
)

AXES = ("x", "y")


@st.composite
def parts(draw: Any, length: int, axis: str) -> Part:
    borders = sorted(draw(st.lists(st.integers(0, length), min_size=1, max_size=2)))
    return Part((axis,), (0,) * (len(borders) + 1)).cut_at([0, *borders, length])


def rows_of(cut: Cut, length: int, place: dict[tuple[str, ...], int]) -> list[int]:
    """The rows of the whole that a rank has, in its order."""
    if isinstance(cut, Part):
        at = place[cut.axes]
        return list(range(sum(cut.sizes[:at]), sum(cut.sizes[: at + 1])))
    if isinstance(cut, Fold):
        factors = [rows_of(part, n, place) for part, n in zip(cut.parts, cut.lengths, strict=True)]
        return [int(np.ravel_multi_index(at, cut.lengths)) for at in itertools.product(*factors)]
    return list(range(length))


def block(whole: Any, layout: Layout, place: dict[tuple[str, ...], int]) -> Any:
    rows = [rows_of(cut, n, place) for cut, n in zip(layout, whole.shape, strict=True)]
    return whole[np.ix_(*rows)]


def places(layouts: Sequence[Layout]) -> list[dict[tuple[str, ...], int]]:
    """The places of all ranks along the axes of layouts."""
    counts: dict[tuple[str, ...], int] = {}
    for layout in layouts:
        for cut in layout:
            for part in cut.parts if isinstance(cut, Fold) else [cut]:
                if part is not None:
                    counts[part.axes] = len(part.sizes)
    ranges = [range(n) for n in counts.values()]
    return [dict(zip(counts, at, strict=True)) for at in itertools.product(*ranges)]


@st.composite
def fields(draw: Any, least: int = 1) -> tuple[tuple[int, ...], Layout]:
    """A shape, and a layout with one or two cuts."""
    shape = tuple(draw(st.lists(st.sampled_from([least, 1, 2, 3, 4, 6, 8]), min_size=1, max_size=4)))
    cuts: list[Cut] = [None] * len(shape)
    for axis in draw(st.sampled_from([("x",), AXES])):
        free = [d for d, cut in enumerate(cuts) if cut is None]
        if free:
            d = draw(st.sampled_from(free))
            cuts[d] = draw(parts(shape[d], axis))
    return shape, tuple(cuts)


def factored(draw: Any, n: int) -> list[int]:
    """A shape of n elements."""
    out: list[int] = []
    while n > 1:
        factor = draw(st.sampled_from([k for k in range(2, n + 1) if n % k == 0]))
        out.append(factor)
        n //= factor
    return out or [1]


@given(st.data())
def test_reshape(data: Any) -> None:
    """The block of the reshaped whole is the reshaped block, after what the plan moves; twice, through folds."""
    shape, layout = data.draw(fields())
    whole = np.arange(math.prod(shape)).reshape(shape)
    for _ in range(2):
        target = tuple(factored(data.draw, math.prod(shape)))
        plan = reshape(layout, shape, target)
        if plan is None:
            return
        moved = list(plan.opened)
        for d in plan.one_row:
            moved[d] = None
        for d, part in plan.recut:
            moved[d] = part
        made = whole.reshape(target)
        for place in places([layout, plan.layout]):
            held = block(whole.reshape(plan.lengths), tuple(moved), place)
            expected = block(made, plan.layout, place)
            rows = [n if cut is None else rows_held(cut, place) for cut, n in zip(plan.layout, target, strict=True)]
            assert np.array_equal(held.reshape(rows), expected)
        whole, shape, layout = made, target, plan.layout


def test_reshape_joins_and_splits_without_moving() -> None:
    """Tokens of a field that is cut over rows and columns go back to rows and columns as they were."""
    rows, columns = Part(("x",), (3, 1)), Part(("y",), (2, 4))
    plan = reshape((None, rows, columns), (2, 4, 6), (2, 24))
    assert plan is not None and plan.layout == (None, Fold((4, 6), (rows, columns))) and not plan.recut
    back = reshape(plan.layout, (2, 24), (2, 4, 2, 3))
    assert back is not None and back.recut == ((2, Part(("y",), (3, 3))),)
    again = reshape(plan.layout, (2, 24), (2, 4, 6))
    assert again is not None and again.layout == (None, rows, columns) and not again.recut


def test_what_cannot_be_split() -> None:
    rows = Part(("x",), (3, 3))
    assert reshape((rows, None), (6, 2), (4, 3)) is None
    # what is whole is nobody's concern
    assert reshape((None, None, rows), (6, 2, 6), (4, 3, 6)) is not None


@given(st.data())
def test_slices(data: Any) -> None:
    length = data.draw(st.integers(0, 9))
    part = data.draw(parts(length, "x"))
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))
    step = data.draw(st.integers(1, 4))
    of = sliced(part, start, stop, step)
    taken = list(range(length))[start:stop:step]
    assert of.part.total == len(taken)
    for rank in range(len(part.sizes)):
        own = rows_of(part, length, {("x",): rank})
        count = of.part.sizes[rank]
        found = [own[of.first[rank] + k * step] for k in range(count)]
        assert found == [row for row in taken if row in own]


@given(st.data())
def test_meetings(data: Any) -> None:
    """What tensors are cut as before fits the result, whichever comes first."""
    shape, layout = data.draw(fields())
    other = tuple(data.draw(st.sampled_from([n, 1])) for n in shape)
    cuts: list[Cut] = [None] * len(other)
    d = data.draw(st.integers(0, len(other) - 1))
    cuts[d] = data.draw(parts(other[d], data.draw(st.sampled_from(AXES))))
    first = data.draw(st.integers(0, 1))
    met = meeting((layout, tuple(cuts)), (shape, other), first)
    assert not isinstance(met, str) and met.shape == tuple(np.broadcast_shapes(shape, other))
    axes = [axis for cut in met.layout if cut is not None for axis in cut.axes]
    assert len(set(axes)) == len(axes), "an axis cuts one dim"
    for wanted, of in zip(met.wanted, (shape, other), strict=True):
        for cut, result, n, m in zip(wanted, met.layout, of, met.shape, strict=True):
            assert cut == (result if n == m else None)


def test_meeting_says_what_does_not_fit() -> None:
    assert meeting(((None,), (None,)), ((3,), (4,)), 0) == "lengths 4 and 3 of the whole do not match in dim 0"


@given(st.data())
def test_scaled(data: Any) -> None:
    """Another length is cut at the same places in proportion, and no rank runs empty."""
    length = data.draw(st.integers(0, 40))
    part = data.draw(parts(length, "x"))
    to = data.draw(st.integers(0, 80))
    of = part.scaled(to)
    assert of.total == to and len(of.sizes) == len(part.sizes) and min(of.sizes) >= 0
    if part.sizes == pmod.split_sizes(length, len(part.sizes)) and to >= length and min(part.sizes):
        assert min(of.sizes)
    assert part.scaled(length) is part
