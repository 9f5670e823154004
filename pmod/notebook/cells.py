"""Running a cell on ranks: waiting for them, the stop button, ranks that wait for one
that comes no more.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any

from attrs import define, field

from pmod._wire.board import WAITS, Board, Post
from pmod.notebook import rank as on_rank
from pmod.notebook.engines import Engine

_LOOK = 0.5  # seconds between looks at what the ranks say of their waits
_AT_ONCE = 0.7  # seconds that the stop button waits for ranks to leave what they are in
_AGAIN = 0.35  # seconds between interrupts of a rank that does not leave
_PATIENCE = 5.0  # seconds that they have where nobody looks at the clock
_POLL = 0.02
_ANSWER = 10.0  # seconds that an idle rank may take to answer


@define
class Outcome:
    """What became of the cell on one rank."""

    how: str = "runs"  # then done, raised, died, stuck (interrupted, and not back) or unsent (interrupted before that)
    stdout: str = ""
    stderr: str = ""
    shown: list[dict[str, Any]] = field(
        factory=list
    )  # data and metadata of what it displayed, last its result
    error: str = ""  # of what it raised: `ValueError: no`
    traceback: str = ""
    failure: on_rank.Failure | None = None
    finished: float = 0.0
    stopped: bool = (
        False  # by us, because those for which it waited had gone; or by the user
    )
    death: str = ""


class Cell:
    """A cell that runs on some ranks."""

    def __init__(self, code: str, engines: Mapping[int, Engine], board: Board) -> None:
        self._code, self._engines, self._board = code, engines, board
        self.calls: dict[int, Any] = {}
        self._looked, self._posts = monotonic(), dict[int, Post]()
        self.outcomes = {rank: Outcome() for rank in engines}
        self.interrupted = False

    @property
    def left(self) -> list[int]:
        """The ranks that still run it."""
        return [
            rank for rank, outcome in self.outcomes.items() if outcome.how == "runs"
        ]

    @property
    def waits(self) -> dict[int, str]:
        """What the ranks that run it wait in, as far as they say: a rank does after a
        second.
        """
        return {
            rank: on_rank.in_cell(self._posts[rank].where)
            for rank in self.left
            if rank in self._posts
        }

    def printed(self, rank: int) -> str:
        """What it has printed so far."""
        return self.calls[rank].metadata["stdout"]

    def run(self, tell: Callable[[Cell], None]) -> None:
        """Run it until all ranks are through, telling how it stands; Ctrl-C, which is
        the stop button, stops them.
        """
        try:
            for rank, engine in self._engines.items():
                self.calls[rank] = engine.view.execute(
                    self._code, silent=False, block=False
                )
            while self.left:
                self._wait(self.left, _POLL)
                self._look()
                tell(self)
        except KeyboardInterrupt:
            self.interrupted = True
            unsent = set(self._engines) - set(self.calls)
            for rank in unsent:  # or sent, who knows: this is answered after it
                self.calls[rank] = self._engines[rank].call(on_rank.sent)
            self._stop(self.left, _AT_ONCE)
            for rank in unsent:
                if self.outcomes[rank].how in (
                    "done",
                    "raised",
                ):  # an interrupt may have hit the question
                    self.outcomes[rank] = Outcome("unsent", stopped=True)
        self._ask_how(_AT_ONCE / 3 if self.interrupted else _PATIENCE)

    def _wait(self, ranks: Sequence[int], seconds: float) -> None:
        """Take in who is through; returns after so long, or when the first of these
        ranks is.
        """
        self.calls[ranks[0]].wait(seconds)
        for rank in self.left:
            call, engine = self.calls[rank], self._engines[rank]
            alive = (
                engine.is_alive
            )  # asked first: its answer may be here although it has died since
            if call.ready():
                self._take(rank, call)
            elif not alive:
                self.outcomes[rank] = Outcome(
                    "died", call.metadata["stdout"], death=engine.death()
                )

    def _take(self, rank: int, call: Any) -> None:
        call.wait_for_output(_AT_ONCE / 7 if self.interrupted else 1.0)
        told, outcome = call.metadata, self.outcomes[rank]
        outcome.how, outcome.finished = "done", monotonic()
        outcome.stdout, outcome.stderr = told["stdout"], told["stderr"]
        outcome.shown = [
            *told["outputs"],
            *([told["execute_result"]] if told["execute_result"] else []),
        ]
        error: Any = call.exception(0)
        if (
            type(error).__name__ == "TaskAborted"
        ):  # the kernel was leaving the cell before when it came
            outcome.how = "unsent"
        elif error is not None:
            outcome.how, outcome.traceback = "raised", on_rank.in_cell(error.traceback)
            outcome.error = on_rank.in_cell(
                f"{error.ename}: {error.evalue}" if error.evalue else error.ename
            )

    def _look(self) -> None:
        """Stop the ranks that wait for one that has left the cell: it cannot come any
        more.
        """
        if monotonic() - self._looked < _LOOK or not self.left:
            return
        self._looked = monotonic()
        before, self._posts = self._posts, self._board.read(self.left)
        # a rank that was about to wake up at the last look has done so by now
        waits = {
            rank: post
            for rank, post in self._posts.items()
            if post.state == WAITS and before.get(rank) == post
        }
        waiting = {rank: post.ranks for rank, post in waits.items()}
        # that a process is dead, who waits for it finds out by itself, and has more to
        # say of it
        gone = {
            rank
            for rank, outcome in self.outcomes.items()
            if outcome.how not in ("runs", "died")
        }
        lost = _lost(waiting, gone | self._elsewhere(waiting))
        if lost:
            self._stop(lost, _PATIENCE)

    def _elsewhere(self, waiting: Mapping[int, Sequence[int]]) -> set[int]:
        """The ranks on which this cell does not run."""
        return {rank for ranks in waiting.values() for rank in ranks} - set(
            self._engines
        )

    def _stop(self, ranks: Sequence[int], seconds: float) -> None:
        for rank in ranks:
            self.outcomes[rank].stopped = True
        until, again = monotonic() + seconds, 0.0
        while set(ranks) & set(self.left) and monotonic() < until:
            if (
                monotonic() > again
            ):  # more than once: a rank that has not begun yet ignores it
                again = monotonic() + _AGAIN
                self._interrupt([rank for rank in ranks if rank in self.left])
            self._wait(self.left, _POLL)
        for rank in set(ranks) & set(self.left):
            self.outcomes[rank].how = "stuck"

    def _interrupt(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            self._engines[rank].process.send_signal(signal.SIGINT)

    def _ask_how(self, seconds: float) -> None:
        """Ask the ranks that raised where."""
        until = monotonic() + seconds
        raised = [
            rank for rank, outcome in self.outcomes.items() if outcome.how == "raised"
        ]
        calls = {rank: self._engines[rank].call(on_rank.failure) for rank in raised}
        for rank, call in calls.items():
            # an interrupt that came late may have hit the question
            if call.wait(max(0.0, until - monotonic())) and call.exception(0) is None:
                self.outcomes[rank].failure = call.get()

    def clear(self) -> list[int]:
        """Give the ranks that were stuck some more time, and end the engines of those
        that still are: these ranks.
        """
        until = monotonic() + _PATIENCE
        stuck = [
            rank
            for rank, outcome in self.outcomes.items()
            if outcome.how in ("stuck", "runs")
        ]
        self._interrupt([rank for rank in stuck if not self.calls[rank].ready()])
        ended = [
            rank
            for rank in stuck
            if not self.calls[rank].wait(max(0.0, until - monotonic()))
        ]
        for rank in ended:
            self._engines[rank].kill()
        return ended

    def out_of_step(self) -> bool:
        """Whether the ranks cannot go on as they are connected: one was cut off, or
        sent what another did not.
        """
        outcomes = self.outcomes.values()
        if any(outcome.how in ("died", "stuck", "unsent") for outcome in outcomes):
            return True
        failures = [outcome.failure for outcome in outcomes if outcome.how == "raised"]
        if any(failure is None or failure.waited for failure in failures):
            return True
        return bool(failures) and self._differ()

    def _differ(self) -> bool:
        """Whether some ranks have sent along a group more often than others of it."""
        calls = {
            rank: engine.call(on_rank.sent) for rank, engine in self._engines.items()
        }
        sent: dict[int, dict[tuple[int, ...], int]] = {
            rank: call.get(_ANSWER) for rank, call in calls.items()
        }
        groups = {ranks for counts in sent.values() for ranks in counts}
        return any(
            len({sent[rank].get(ranks, 0) for rank in ranks if rank in sent}) > 1
            for ranks in groups
        )


def _lost(waiting: Mapping[int, Sequence[int]], gone: set[int]) -> list[int]:
    """Of the ranks that wait for others, those whose others are gone, or wait for such
    themselves.
    """
    lost: set[int] = set()
    while True:
        more = {
            rank
            for rank, others in waiting.items()
            if rank not in lost and set(others) & (gone | lost)
        }
        if not more:
            return sorted(lost)
        lost |= more


def plain(text: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
