"""`Watcher`: what a check of a user's own hears of the calls, in which order, and what becomes of what it raises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import pmod
from pmod._core.watch import watchers
from tests.lib.listening import counted

Tensor = torch.Tensor


class Noting(pmod.Watcher):
    """Writes down what it hears, by its own name."""

    def __init__(self, name: str = "", notes: list[str] | None = None) -> None:
        self.name, self.notes = name, [] if notes is None else notes
        self.functions: list[str] = []
        self.lines: list[str] = []

    def before(self, call: Any, xs: Sequence[Tensor], origin: tuple[str, str]) -> None:
        self.notes.append(f"{self.name}before {call.row.name} of {sum(x.nbytes for x in xs)}")
        self.functions.append(origin[0])
        self.lines.append(origin[1])

    def after(self, call: Any) -> None:
        self.notes.append(f"{self.name}after {call.row.name}")

    def waited(self, call: Any, seconds: float) -> None:
        assert seconds >= 0
        self.notes.append(f"{self.name}waited {call.axis.label} of {call.axis.size}")


def heard_on_rank() -> None:
    x = torch.ones(3, requires_grad=True)
    pmod.psum(x, "x")  # before it is on
    with Noting() as watcher:
        pmod.all_gather(x, "x").sum().backward()
        assert watcher.notes == [
            "before all_gather of 12", "after all_gather", "before psum_scatter of 24", "after psum_scatter",
        ]  # fmt: skip
        assert watcher.functions == ["all_gather", "the backward of all_gather"]
        (line,) = set(watcher.lines)
        assert "test_watch.py" in line and line.endswith('pmod.all_gather(x, "x").sum().backward()')
    pmod.psum(x, "x")  # after it
    assert len(watcher.notes) == 4 and watchers() == []


def test_it_hears_forward_and_backward(run: Any) -> None:
    run(heard_on_rank, x=2)


def started_on_rank() -> None:
    with Noting() as watcher:
        pending = pmod.start(pmod.psum, torch.ones(2), "x")
        assert watcher.notes == ["before psum of 8", "after psum"]
        pending.wait()
    assert watcher.notes[2:] == ["waited x of 2"]


def test_it_hears_of_what_is_started(run: Any) -> None:
    run(started_on_rank, x=2)


def ordered_on_rank() -> None:
    notes: list[str] = []
    with Noting("1 ", notes), Noting("2 ", notes):
        pmod.psum(torch.ones(1), "x")
        assert notes == ["1 before psum of 4", "2 before psum of 4", "2 after psum", "1 after psum"]
        pmod.start(pmod.psum, torch.ones(1), "x").wait()
    assert notes[-2:] == ["1 waited x of 2", "2 waited x of 2"]


def test_several_hear_in_their_order(run: Any) -> None:
    run(ordered_on_rank, x=2)


class Raising(pmod.Watcher):
    """Raises in one of its methods."""

    def __init__(self, where: str) -> None:
        self.where = where

    def before(self, call: Any, xs: Any, origin: Any) -> None:
        self._raise("before")

    def after(self, call: Any) -> None:
        self._raise("after")

    def waited(self, call: Any, seconds: float) -> None:
        self._raise("waited")

    def _raise(self, where: str) -> None:
        if where == self.where:
            raise ZeroDivisionError(where)


def raised_on_rank() -> None:
    x = torch.ones(1)
    with Noting() as first, Raising("before"), Noting() as last:

        def call() -> None:
            with pytest.raises(ZeroDivisionError, match="before"):
                pmod.psum(x, "x")

        _, sent = counted(call)
        assert sent == [], "nothing is sent"
    assert first.notes == ["before psum of 4", "after psum"] and last.notes == []
    with Noting() as first, Raising("after"), Noting() as last, pytest.raises(ZeroDivisionError, match="after"):
        pmod.psum(x, "x")
    assert first.notes == last.notes == ["before psum of 4", "after psum"]
    with Noting() as first, Raising("waited"), Noting() as last:
        pending = pmod.start(pmod.psum, x, "x")
        with pytest.raises(ZeroDivisionError, match="waited"):
            pending.wait()
    assert first.notes[2:] == last.notes[2:] == ["waited x of 2"]
    with Noting() as watcher, pytest.raises(pmod.ShapeError):
        pmod.all_gather(x, "x", dim=3)
    assert watcher.notes == [], "what is refused before anything is sent is no call"
    torch.testing.assert_close(pmod.psum(x, "x"), torch.tensor([2.0]))


def test_what_it_raises_reaches_the_user(run: Any) -> None:
    run(raised_on_rank, x=2)


class Adding(pmod.Watcher):
    """Sends a message itself: the sum of what the ranks are about to send."""

    def __init__(self) -> None:
        self.sums: list[float] = []

    def before(self, call: Any, xs: Sequence[Tensor], origin: Any) -> None:
        self.sums.append(pmod.psum(float(sum(x.sum() for x in xs)), "x"))


def sends_on_rank() -> None:
    with Noting() as noting, Adding() as adding:
        pmod.pshift(torch.tensor([1.0 + pmod.axis_index("x")]), "x")
    assert adding.sums == [3.0]
    assert noting.notes == ["before permute of 4", "after permute"], "nobody hears of what a watcher sends"


def test_it_may_send(run: Any) -> None:
    run(sends_on_rank, x=2)


def twice_on_rank() -> None:
    with Noting() as watcher:
        with pytest.raises(pmod.PmodError, match=r"pmod\.Watcher: this Noting is on already"), watcher:
            pass
        pmod.psum(torch.ones(1), "x")
        assert watcher.notes == ["before psum of 4", "after psum"]
    with watcher:  # once more, later
        pass
    assert watchers() == []


def test_it_is_put_on_once(run: Any) -> None:
    run(twice_on_rank, x=2)


def test_one_outside_a_simulation_hears_all_ranks() -> None:
    with Noting() as watcher:
        pmod.simulate(lambda: pmod.psum(torch.ones(1), "x"), x=3)
    assert sorted(watcher.notes) == ["after psum"] * 3 + ["before psum of 4"] * 3
    assert watchers() == []


def beside_debug_on_rank() -> None:
    with Noting() as watcher, pmod.debug(), pmod.trace() as traced:
        pmod.psum(torch.ones(1), "x")
    assert watcher.notes == ["before psum of 4", "after psum"] and len(traced.events) == 1
    assert watchers() == []


def test_beside_debug_and_trace(run: Any) -> None:
    run(beside_debug_on_rank, x=2)


def test_the_base_does_nothing() -> None:
    def total() -> Tensor:
        with pmod.Watcher():
            return pmod.start(pmod.psum, torch.ones(1), "x").wait()

    assert [y.item() for y in pmod.simulate(total, x=2)] == [2.0, 2.0]
