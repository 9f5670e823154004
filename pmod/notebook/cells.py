"""Running a cell on ranks: waiting for them, the stop button, ranks that cannot end."""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import monotonic
from typing import Any, TypeAlias

from attrs import define, field

from pmod._wire.board import WAITS, Board, Post
from pmod.notebook import rank as on_rank
from pmod.notebook.engines import Call, Engine

# All in seconds. Between looks at what the ranks say of their waits; how long the stop
# button waits for ranks to leave what they are in; between interrupts of a rank that does
# not leave; how long ranks have if nobody looks at the clock; between looks at what came;
# how long an idle rank may take to answer.
_LOOK = 0.5
_AT_ONCE = 0.7
_AGAIN = 0.35
_PATIENCE = 5.0
_POLL = 0.02
_ANSWER = 10.0


Display: TypeAlias = Mapping[str, Any]
"""What IPython displays: "data" by MIME type, and "metadata"."""


@define
class Outcome:
    """What became of the cell on one rank."""

    # then done, raised, died, stuck (interrupted and not back) or unsent (interrupted
    # before it had the cell)
    how: str = "runs"
    stdout: str = ""
    stderr: str = ""
    # data and metadata of what it displayed; its result is the last of them
    shown: list[Display] = field(factory=list)
    # of what it raised: `ValueError: no`
    error: str = ""
    traceback: str = ""
    failure: on_rank.Failure | None = None
    finished: float = 0.0
    # by us, because those for which it waited had left; or by the user
    stopped: bool = False
    death: str = ""


class Cell:
    """A cell that runs on some ranks."""

    def __init__(self, code: str, engines: Mapping[int, Engine], board: Board) -> None:
        self._code, self._engines, self._board = code, engines, board
        self.calls: dict[int, Call] = {}
        self._looked = monotonic()
        self._posts: dict[int, Post] = {}
        self.outcomes = {rank: Outcome() for rank in engines}
        self.interrupted = False

    def ranks_that(self, *hows: str) -> list[int]:
        """Return the ranks that ended, or still run, in one of these ways."""
        ranks: list[int] = []
        for rank, outcome in self.outcomes.items():
            if outcome.how in hows:
                ranks.append(rank)
        return ranks

    @property
    def left(self) -> list[int]:
        """Return the ranks that still run it."""
        return self.ranks_that("runs")

    @property
    def waits(self) -> dict[int, str]:
        """Return what the ranks wait in, of those that have waited for a second."""
        waits: dict[int, str] = {}
        for rank in self.left:
            if rank in self._posts:
                waits[rank] = on_rank.in_cell(self._posts[rank].where)
        return waits

    def printed(self, rank: int) -> str:
        """Return what the rank has printed so far."""
        return self.calls[rank].metadata["stdout"]

    def run(self, tell: Callable[[Cell], None]) -> None:
        """Run it until all ranks are through, telling how it stands.

        Ctrl-C, which is what the stop button sends, stops them.
        """
        try:
            for rank, engine in self._engines.items():
                sent = engine.view.execute(self._code, silent=False, block=False)
                self.calls[rank] = sent
            while self.left:
                self._wait(self.left, _POLL)
                self._look()
                tell(self)
        except KeyboardInterrupt:
            self.interrupted = True
            self._stop_all()
        self._ask_how(_AT_ONCE / 3 if self.interrupted else _PATIENCE)

    def _stop_all(self) -> None:
        """Stop the ranks, also those that the cell was not sent to yet."""
        # the interrupt may have come while a cell was being sent: whether or not the
        # rank has it, it answers this question after it
        unsent = set(self._engines) - set(self.calls)
        for rank in unsent:
            self.calls[rank] = self._engines[rank].call(on_rank.sent)
        self._stop(self.left, _AT_ONCE)
        # "raised" because our interrupt may have hit the question instead of a cell
        for rank in unsent.intersection(self.ranks_that("done", "raised")):
            self.outcomes[rank] = Outcome("unsent", stopped=True)

    def _wait(self, ranks: Sequence[int], seconds: float) -> None:
        """Take in who is through.

        Returns after so many seconds, or as soon as the first of these ranks is through.
        """
        self.calls[ranks[0]].wait(seconds)
        for rank in self.left:
            call, engine = self.calls[rank], self._engines[rank]
            # asked before the answer is looked for: a rank may answer and then die
            alive = engine.is_alive
            if call.ready():
                self._take(rank, call)
            elif not alive:
                printed, death = self.printed(rank), engine.death()
                self.outcomes[rank] = Outcome("died", printed, death=death)

    def _take(self, rank: int, call: Call) -> None:
        call.wait_for_output(_AT_ONCE / 7 if self.interrupted else 1.0)
        told, outcome = call.metadata, self.outcomes[rank]
        outcome.how, outcome.finished = "done", monotonic()
        outcome.stdout, outcome.stderr = told["stdout"], told["stderr"]
        outcome.shown = list(told["outputs"])
        if told["execute_result"]:
            outcome.shown.append(told["execute_result"])
        error = call.exception(0)
        if error is None:
            return
        # the kernel was still leaving the cell before when this one arrived
        if type(error).__name__ == "TaskAborted":
            outcome.how = "unsent"
            return
        outcome.how, outcome.traceback = "raised", on_rank.in_cell(error.traceback)
        text = f"{error.ename}: {error.evalue}" if error.evalue else error.ename
        outcome.error = on_rank.in_cell(text)

    def _look(self) -> None:
        """Stop the ranks that wait for one that has left the cell: it cannot arrive."""
        if monotonic() - self._looked < _LOOK or not self.left:
            return
        self._looked = monotonic()
        before, self._posts = self._posts, self._board.read(self.left)
        waiting: dict[int, Sequence[int]] = {}
        for rank, post in self._posts.items():
            # a rank that was about to wake up at the last look has done so by now
            if post.state == WAITS and before.get(rank) == post:
                waiting[rank] = post.ranks
        # that a process has died is found by the ranks that wait for it: they can say
        # more about it
        gone = set(self._engines) - set(self.ranks_that("runs", "died"))
        lost = _lost(waiting, gone | self._elsewhere(waiting))
        if lost:
            self._stop(lost, _PATIENCE)

    def _elsewhere(self, waiting: Mapping[int, Sequence[int]]) -> set[int]:
        """Return the ranks that are waited for and do not run this cell."""
        awaited: set[int] = set().union(*waiting.values())
        return awaited - set(self._engines)

    def _stop(self, ranks: Sequence[int], seconds: float) -> None:
        for rank in ranks:
            self.outcomes[rank].stopped = True
        until, again = monotonic() + seconds, 0.0
        while monotonic() < until and (running := set(ranks) & set(self.left)):
            # more than once: a rank that has not begun the cell ignores an interrupt
            if monotonic() > again:
                again = monotonic() + _AGAIN
                self._interrupt(running)
            self._wait(self.left, _POLL)
        for rank in set(ranks) & set(self.left):
            self.outcomes[rank].how = "stuck"

    def _interrupt(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            self._engines[rank].process.send_signal(signal.SIGINT)

    def _ask_how(self, seconds: float) -> None:
        """Ask the ranks that raised where they did."""
        until = monotonic() + seconds
        calls: dict[int, Call] = {}
        for rank in self.ranks_that("raised"):
            calls[rank] = self._engines[rank].call(on_rank.failure)
        for rank, call in calls.items():
            # an interrupt that came late may have hit the question
            if call.wait(_until(until)) and call.exception(0) is None:
                self.outcomes[rank].failure = call.get()

    def clear(self) -> list[int]:
        """Give ranks that are stuck some more time, then end their engines.

        Returns the ranks whose engines were ended.
        """
        until = monotonic() + _PATIENCE
        stuck = self.ranks_that("stuck", "runs")
        self._interrupt([rank for rank in stuck if not self.calls[rank].ready()])
        ended: list[int] = []
        for rank in stuck:
            if not self.calls[rank].wait(_until(until)):
                ended.append(rank)
        for rank in ended:
            self._engines[rank].kill()
        return ended

    def out_of_step(self) -> bool:
        """Return whether the ranks cannot go on as they are connected.

        That is so if one was cut off in a wait, or sent what another did not send.
        """
        if self.ranks_that("died", "stuck", "unsent"):
            return True
        raised = self.ranks_that("raised")
        for rank in raised:
            failure = self.outcomes[rank].failure
            # a rank that did not say how it failed may have been cut off as well
            if failure is None or failure.waited:
                return True
        return bool(raised) and self._differ()

    def _differ(self) -> bool:
        """Return whether some ranks have sent along a group more often than others."""
        calls: dict[int, Call] = {}
        for rank, engine in self._engines.items():
            calls[rank] = engine.call(on_rank.sent)
        told: dict[int, Counter[tuple[int, ...]]] = {}
        for rank, call in calls.items():
            told[rank] = Counter(call.get(_ANSWER))
        # a rank that has not sent along a group yet does not know it: 0 messages
        for ranks in set().union(*told.values()):
            counts = {told[rank][ranks] for rank in ranks if rank in told}
            if len(counts) > 1:
                return True
        return False


def _until(moment: float) -> float:
    """Return the seconds that are left until then."""
    return max(0.0, moment - monotonic())


def _lost(waiting: Mapping[int, Sequence[int]], gone: set[int]) -> list[int]:
    """Return the ranks that wait for one that is gone, or for one that does so."""
    lost: set[int] = set()
    # what one look over all finds lost may have others waiting for it: until none is new
    while True:
        before = len(lost)
        for rank, others in waiting.items():
            if (gone | lost).intersection(others):
                lost.add(rank)
        if len(lost) == before:
            return sorted(lost)


def plain(text: str) -> str:
    """Return a text without its colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
