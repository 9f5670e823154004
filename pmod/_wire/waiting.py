"""Waiting for other ranks: Ctrl-C ends it, and so does a deadline, which then names the
ranks that never came.

gloo's own wait can do neither. A rank that waits longer than a second writes into the
store of the world for what; who gives up reads there who waits elsewhere and who has
left, and whether a process of its own host is dead. What it writes says which call it
makes, too: ranks that make unlike calls have sent messages that never meet
(`Wait.tag`), and find out.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cached_property
from time import monotonic, sleep
from typing import Any, NoReturn, Protocol, TypeVar

from pmod._errors import CollectiveTimeout, MismatchError, PmodError, phrase
from pmod._mesh.axis import Axis
from pmod._ranks import connect, world
from pmod._ranks.blocking import InThread
from pmod._ranks.topology import ranks_of_node
from pmod._site import call_site
from pmod._wire.board import (
    ALIKE,
    ENDED,
    LEFT,
    MANY,
    RETURNED,
    WAITS,
    Board,
    Post,
    Said,
    board,
    neighbours,
    not_here,
    place_of,
    roots,
    unlike,
)

T = TypeVar("T")

LOOK = (
    1.0  # seconds between looks at what the others say; less where the deadline is near
)
NEAR = 32  # with so many next ranks of the axis a rank compares its call: if any two differ, then so do two neighbours
_ANSWER = timedelta(seconds=2)  # so long the store may take
_CHUNK = timedelta(seconds=0.05)  # so long a signal waits for Python to handle it

# Odd numbers, so that what they are multiplied with is told apart in a tag.
_NUMBER, _STAGE, _LENGTH, _BITS = 0x9E3779B1, 0x0F1BBCDD, 0x2545F491, 0x3FFFFFFF
_OURS = (
    0x40000000  # no small tag, which a user's own messages on the same group may have
)


class Work(Protocol):
    """A message under way, as torch.distributed has it."""

    def wait(self, timeout: timedelta = ..., /) -> Any: ...
    def is_completed(self) -> bool: ...


class Wait:
    """The wait for one collective, which other ranks of the axis know by the same
    number.
    """

    def __init__(
        self,
        axis: Axis,
        said: Said,
        cut_off: Callable[[Any], None] = lambda group: None,
    ) -> None:
        self._axis, self._said = axis, said
        self._cut_off = cut_off  # closes the connections of a group
        connection = world.now.processes.connection
        self.number = connection.next_meeting(axis.group_key)
        self._history = connection.history(axis.group_key)
        self._history.append((self.number, self._said))
        self.exchange: tuple[int, Sequence[int], Sequence[int]] | None = (
            None  # its number, bytes sent and expected
        )
        self._looks = 0
        self._written = False
        if self.number == 1:
            board()  # connected while the rank that serves it is there
        elif self.number == 2:  # by now all ranks of the axis have connected
            self._tell(lambda told: told.learn(self._node))

    @property
    def _meeting(self) -> str:
        return f"{self._axis.group_key}#{self.number}"

    @property
    def _rank(self) -> int:
        return self._axis.topology.rank

    @property
    def _pause(self) -> float:
        return min(LOOK, self._axis.timeout / 4)

    @cached_property
    def _others(self) -> list[int]:
        return [rank for rank in self._axis.ranks if rank != self._rank][:MANY]

    @cached_property
    def _node(self) -> list[int]:
        """The other ranks of this node, whose processes can be looked at; those of the
        axis first.
        """
        node = ranks_of_node(self._axis.topology)
        others = [
            rank for rank in node if rank != self._rank and rank not in self._neighbours
        ]
        return [*self._neighbours, *others][:MANY]

    @cached_property
    def _neighbours(self) -> list[int]:
        return neighbours(self._axis)

    @cached_property
    def _near(self) -> dict[int, int]:
        """Index along the axis -> rank, of those with whom this rank compares its call."""
        ranks, size, here = list(self._axis.ranks), self._axis.size, self._axis.index
        steps = range(1, min(size, NEAR + 1))
        return {
            index % size: ranks[index % size]
            for step in steps
            for index in (here + step, here - step)
        }

    def tag(self, stage: int, nbytes: int) -> int:
        """Of a message of this call: messages of unlike calls, of other exchanges or
        lengths have other tags.
        """
        mixed = (
            self._said.code + _NUMBER * self.number + _STAGE * stage + _LENGTH * nbytes
        )
        return mixed & _BITS | _OURS

    def refuse(self) -> NoReturn:
        """Raise, because an earlier wait along these ranks was cut off; and say so to
        those that wait for this rank.
        """
        self._leave_word()
        function, _ = self._origin()
        given = "an earlier call along these ranks was cut off while it waited, so messages no longer pair up"
        right = "Begin anew on all ranks: pmod.shutdown(), then pmod.make_mesh; in a notebook, %mesh."
        axis = self._axis
        raise MismatchError(
            phrase(function, given, right, axis=axis.label, coords=dict(axis.coords))
        )

    def until_done(self, work: Work) -> None:
        """Return when the work is done.

        Raises: CollectiveTimeout at the deadline, or when a rank cannot come any more.
        """
        try:
            if not _done_soon(work):
                self._wait_long(work)
        except (
            RuntimeError
        ) as error:  # gloo's: a connection broke, or its own deadline passed
            self._give_up(work, error)
        except PmodError:
            raise
        except BaseException:  # Ctrl-C: others may still take what was sent, so the connections go with the world only
            if not work.is_completed():
                post = self._farewell()
                world.leave_behind(
                    self._axis.group, lambda: self._say_farewell(post, work)
                )
            raise

    def _leave(self, work: Work) -> None:
        """Never use this group again. What waits in it in a thread ends, which Python's
        own end would abort.
        """
        world.leave_behind(self._axis.group, self._cut_all)
        self._cut(work)

    def _cut(self, work: Work) -> None:
        """Close the connections of a message that has failed, so that those who wait
        for this rank hear of it.
        """
        if isinstance(work, InThread):
            with contextlib.suppress(RuntimeError):
                InThread(work.cut).wait(_ANSWER)
                work.wait(_ANSWER)

    def _farewell(self) -> Post:
        """What tells the others that this rank comes no more, to no meeting, and waits
        for nobody.
        """
        return self._post(LEFT)._replace(meeting="", ranks=(self._rank,))

    def _leave_word(self) -> None:
        post = self._farewell()
        self._tell(lambda told: told.write(self._rank, post))

    def _say_farewell(self, post: Post, work: Work) -> None:
        self._tell(lambda told: told.write(self._rank, post))
        self._cut(work)
        self._cut_all()

    def _cut_all(self) -> None:
        """Close the connections of the world, so that those who wait for this rank
        elsewhere hear of it.
        """
        cuts = [
            InThread(lambda group=group: self._cut_off(group))
            for group in connect.groups_in_use()
        ]
        until = monotonic() + _ANSWER.total_seconds()
        for one in cuts:
            with contextlib.suppress(
                RuntimeError
            ):  # a group without a connection waits for one
                one.wait(timedelta(seconds=max(0.0, until - monotonic())))

    def _wait_long(self, work: Work) -> None:
        started = looked = monotonic()
        while not _done_soon(work):
            now = monotonic()
            if now - started > self._axis.timeout:
                self._give_up(work)
            # soon after the first look the others have written, too
            elif now - looked > (
                self._pause / 4 if 0 < self._looks < 4 else self._pause
            ):
                looked = now
                self._looks += 1
                if self._come_no_more(work):
                    self._give_up(work)
        if self._written:
            self._written = False
            self._tell(lambda told: told.erase(self._rank))

    def _tell(self, say: Callable[[Board], T]) -> T | None:
        """Use the board, where it can be reached: the rank that serves it may be gone,
        or stand still.
        """
        told = board()
        if told is None or not told.reachable:
            return None
        answers: list[T] = []
        job = InThread(
            lambda: answers.append(say(told))
        )  # torch's store has no deadline for an answer
        try:
            job.wait(_ANSWER)
        except RuntimeError:
            told.reachable = False
        return answers[0] if answers else None

    def _write(self, state: str) -> None:
        post = self._post(state)
        self._tell(lambda told: told.write(self._rank, post))
        self._written = True

    def _post(self, state: str) -> Post:
        said, parts = self._said, ""
        if self.exchange is not None:
            number, sent, expected = self.exchange
            rows = [
                f"{rank}:{sent[index]}:{expected[index]}"
                for index, rank in self._near.items()
            ]
            parts = " ".join([str(number), *rows])
        where, ranks = " at ".join(self._origin()), tuple(self._axis.ranks[:MANY])
        key = self._axis.group_key
        calls = [
            (f"{key}#{n}", str(s.code), s.what, str(s.params))
            for n, s in self._history
            if n != self.number
        ]
        before = "\x1e".join("\x1d".join(call) for call in calls)
        return Post(
            state,
            self._meeting,
            ranks,
            where,
            str(said.code),
            said.what,
            str(said.params),
            parts,
            "",
            before,
        )

    def _origin(self) -> tuple[str, str]:
        function, site = call_site()
        return self._said.by(function), site

    def _come_no_more(self, work: Work) -> bool:
        """Say where this rank is; whether another is known to be gone."""
        if not self._written:
            self._write(WAITS)
        # after 1, 2, 4, 8, ... looks: who comes last looks soon after, and finds the
        # others' posts
        self._hear(work)
        if self._looks & (self._looks - 1) == 0:
            self._compare(
                self._tell(lambda told: told.read(list(self._near.values()))), work
            )
        if self._dead():
            return True
        if not self._tell(Board.somebody_left):
            return False
        posts = self._tell(lambda told: told.read(self._others)) or {}
        return any(
            post.state == LEFT or self._ended_before(post) for post in posts.values()
        )

    def _ended_before(self, post: Post) -> bool:
        """Whether its rank has ended without this call."""
        return (
            self._is_over(post)
            and json.loads(post.met).get(self._axis.group_key, 0) < self.number
        )

    def _is_over(self, post: Post) -> bool:
        """Whether its rank makes no more calls, as far as it has said."""
        this_run = str(world.processes().connection.runs)
        return post.state == ENDED or (
            post.state == RETURNED and post.meeting == this_run
        )

    def _hear(self, work: Work) -> None:
        """Raise where another rank has found unlike calls."""
        given = self._tell(lambda told: told.was_found(self._axis.group_key))
        if given:
            self._refuse_unlike(given, work)

    def _compare(self, posts: dict[int, Post] | None, work: Work) -> None:
        """Raise where a rank that waits in this meeting makes an unlike call there, and
        tell all others.
        """
        for rank, post in (posts or {}).items():
            given = unlike(self._post(WAITS), self._rank, post, rank)
            if given is not None:
                self._tell(
                    lambda told, given=given: told.found(self._axis.group_key, given)
                )
                self._refuse_unlike(given, work)

    def _refuse_unlike(self, given: str, work: Work) -> NoReturn:
        self._write(LEFT)
        self._leave(work)
        function, _ = self._origin()
        axis = self._axis
        raise MismatchError(
            phrase(function, given, ALIKE, axis=axis.label, coords=dict(axis.coords))
        )

    def _dead(self) -> dict[int, str]:
        self._tell(lambda told: told.learn(self._node))
        told = board()
        return {} if told is None else told.dead(self._neighbours)

    def _give_up(self, work: Work, cause: RuntimeError | None = None) -> None:
        """Raise, with who is not here and why; unless the last one comes while the
        others are asked.
        """
        axis, until = (
            self._axis,
            monotonic() + 1.25 * self._pause,
        )  # by then who has come has said so
        self._write(LEFT)
        while True:
            posts, dead = (
                self._tell(lambda told: told.follow(self._others)),
                self._dead(),
            )
            self._hear(work)
            self._compare(
                {
                    rank: post
                    for rank, post in (posts or {}).items()
                    if rank in self._others
                },
                work,
            )
            absent = [
                rank
                for rank in self._others
                if not self._is_here((posts or {}).get(rank), cause)
            ]
            if cause is None and work.is_completed():
                return
            if posts is None or dead or not absent or monotonic() > until:
                break
            sleep(self._pause / 4)
        self._leave(work)
        broken = cause is not None and "imed out" not in str(cause)
        given = self._who_is_missing(absent, posts, broken)
        function, site = self._origin()
        right = f"Called at {site}" + (
            "" if cause is None else f"\ngloo says: {first_sentence(cause)}"
        )
        if (
            cause is not None
            and axis.topology.num_nodes > 1
            and "closed by peer" not in str(cause)
        ):
            right += f"\n{connect.INTERFACE}"
        raise CollectiveTimeout(
            phrase(function, given, right, axis=axis.label, coords=dict(axis.coords))
        ) from None

    def _who_is_missing(
        self, absent: Sequence[int], posts: dict[int, Post] | None, broken: bool
    ) -> str:
        """The ranks to blame: those that nobody keeps waiting, though others wait for
        them.
        """
        told, timeout = board(), self._axis.timeout
        dead, stopped = (
            ({}, {})
            if told is None
            else (told.dead(self._node), told.stopped(self._node))
        )
        if posts is not None:
            waiters = roots(absent, posts, dead)
            return not_here(
                list(waiters) or absent, posts, dead, timeout, broken, stopped, waiters
            )
        # the rank that served the board is one of these, if it is of this host: its
        # connections end a little before it
        until = monotonic() + self._pause
        while told is not None and not (dead or stopped) and monotonic() < until:
            sleep(self._pause / 10)
            dead = told.dead(self._node)
        known = [rank for rank in self._node if rank in dead or rank in stopped]
        if known:
            return not_here(known, {}, dead, timeout, broken, stopped)
        return f"the store of the world cannot be reached, which {place_of(0)} or the launcher serves"

    def _is_here(self, post: Post | None, cause: RuntimeError | None) -> bool:
        if post is None:
            return False
        if self._is_over(
            post
        ):  # where a connection is broken, it has not sent all that it began to send
            return cause is None and not self._ended_before(post)
        return post.meeting == self._meeting


def first_sentence(error: RuntimeError) -> str:
    """`[.../pair.cc:553] Connection closed by peer [127.0.0.1]:1. This is ...` without
    the first and the last part.
    """
    return re.sub(r"^\[\S*\] ", "", str(error)).splitlines()[0].split(". ")[0]


def _done_soon(work: Work) -> bool:
    """Wait a moment. Raises what the work raised, once it is over."""
    try:
        work.wait(_CHUNK)
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()  # over meanwhile: it says how
    return True


def _tell_the_end() -> None:
    """Say of this rank that its world is over, for those that wait for a connection to
    it, or for a message.
    """
    _tell_last(ENDED)


def tell_return() -> None:
    """Say of this rank that the function that `launch` ran here has returned: it makes
    no more calls of this run.
    """
    _tell_last(RETURNED, str(world.processes().connection.runs))


def _tell_last(state: str, meeting: str = "") -> None:
    told = board()
    if told is None or not told.reachable:
        return
    rank, met = world.here().rank, json.dumps(world.processes().connection.meetings)
    post = Post(state, meeting, (rank,), "", met=met)
    InThread(lambda: told.write(rank, post)).wait(_ANSWER)


world.processes().before_end.append(_tell_the_end)
