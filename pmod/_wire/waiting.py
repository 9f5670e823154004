"""Waiting for other ranks, which Ctrl-C ends, and a deadline.

The deadline names the ranks that never came. gloo's own wait can do neither. A rank
that waits longer than a second writes into the store of the world for what. A rank that
gives up reads there who waits elsewhere and who has left, and looks whether a process
of its own host is dead. What a rank writes says which call it makes, too. Ranks that
make unlike calls have sent messages that never meet (`Wait.tag`), and find out from it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cached_property, partial
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
    OVER,
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

# Seconds between looks at what the others say; less where the deadline is near.
LOOK = 1.0
# With so many next ranks of the axis a rank compares its call. If the calls of any two
# ranks differ, then so do those of two neighbours.
NEAR = 32
_ANSWER = timedelta(seconds=2)  # so long the store may take
_CHUNK = timedelta(seconds=0.05)  # so long a signal waits for Python to handle it

# Odd numbers, so that what they are multiplied with is told apart in a tag.
_NUMBER, _STAGE, _LENGTH, _BITS = 0x9E3779B1, 0x0F1BBCDD, 0x2545F491, 0x3FFFFFFF
# A user's own messages on the same group may have small tags, so ours have none.
_OURS = 0x40000000


class Work(Protocol):
    """A message under way, as torch.distributed has it."""

    def wait(self, timeout: timedelta = ..., /) -> object: ...
    def is_completed(self) -> bool: ...


class Wait:
    """The wait for one collective, which has the same number on all ranks."""

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
        # The number of an exchange, and the bytes sent and expected.
        self.exchange: tuple[int, Sequence[int], Sequence[int]] | None = None
        self._looks = 0
        self._written = False
        if self.number == 1:
            # This connects, while the rank that serves the board is there.
            board()
        elif self.number == 2:
            # By now all ranks of the axis have connected.
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
        """Return the other ranks of this node, those of the axis first.

        Their processes can be looked at.
        """
        known = {self._rank, *self._neighbours}
        node = ranks_of_node(self._axis.topology)
        others = [rank for rank in node if rank not in known]
        return [*self._neighbours, *others][:MANY]

    @cached_property
    def _neighbours(self) -> list[int]:
        return neighbours(self._axis)

    @cached_property
    def _near(self) -> dict[int, int]:
        """Return the ranks that this one compares its call with, by index."""
        ranks, size, here = list(self._axis.ranks), self._axis.size, self._axis.index
        near: dict[int, int] = {}
        for step in range(1, min(size, NEAR + 1)):
            for index in (here + step, here - step):
                near[index % size] = ranks[index % size]
        return near

    def tag(self, stage: int, nbytes: int) -> int:
        """Return the tag of a message of this call.

        Messages of unlike calls, of other exchanges or lengths have other tags.
        """
        call = self._said.code + _NUMBER * self.number
        return (call + _STAGE * stage + _LENGTH * nbytes) & _BITS | _OURS

    def refuse(self) -> NoReturn:
        """Raise, because an earlier wait along these ranks was cut off.

        Those that wait for this rank are told.
        """
        self._leave_word()
        function, _ = self._origin()
        given = (
            "an earlier call along these ranks was cut off while it waited, "
            "so messages no longer pair up"
        )
        right = (
            "Begin anew on all ranks: pmod.shutdown(), then pmod.make_mesh; "
            "in a notebook, %mesh."
        )
        raise MismatchError(self._phrase(function, given, right))

    def _phrase(self, function: str, given: str, right: str) -> str:
        axis = self._axis
        coords = dict(axis.coords)
        return phrase(function, given, right, axis=axis.label, coords=coords)

    def until_done(self, work: Work) -> None:
        """Return when the work is done.

        Raises: CollectiveTimeout at the deadline, or when a rank will not arrive.
        """
        try:
            if not _done_soon(work):
                self._wait_long(work)
        except RuntimeError as error:
            # gloo's: a connection broke, or its own deadline passed.
            self._give_up(work, error)
        except PmodError:
            raise
        except BaseException:
            # Ctrl-C. Others may still take what was sent, so the connections go with
            # the world only.
            if not work.is_completed():
                post = self._farewell()
                farewell = partial(self._say_farewell, post, work)
                world.leave_behind(self._axis.group, farewell)
            raise

    def _leave(self, work: Work) -> None:
        """Never use this group again."""
        # A thread that waits in it must end now: at Python's own end it would abort the
        # process.
        world.leave_behind(self._axis.group, self._cut_all)
        self._cut(work)

    def _cut(self, work: Work) -> None:
        """Close the connections of a failed message; ranks that wait hear of it."""
        if isinstance(work, InThread):
            with contextlib.suppress(RuntimeError):
                InThread(work.cut).wait(_ANSWER)
                work.wait(_ANSWER)

    def _farewell(self) -> Post:
        """Return what tells the others that this rank has left and waits for nobody."""
        return self._post(LEFT)._replace(meeting="", ranks=(self._rank,))

    def _leave_word(self) -> None:
        post = self._farewell()
        self._tell(lambda told: told.write(self._rank, post))

    def _say_farewell(self, post: Post, work: Work) -> None:
        self._tell(lambda told: told.write(self._rank, post))
        self._cut(work)
        self._cut_all()

    def _cut_all(self) -> None:
        """Close the connections of the world.

        Those who wait for this rank elsewhere hear of it.
        """
        groups = connect.groups_in_use()
        cuts = [InThread(partial(self._cut_off, group)) for group in groups]
        until = monotonic() + _ANSWER.total_seconds()
        for one in cuts:
            # A group without a connection waits for one.
            with contextlib.suppress(RuntimeError):
                one.wait(timedelta(seconds=max(0.0, until - monotonic())))

    def _wait_long(self, work: Work) -> None:
        started = looked = monotonic()
        while not _done_soon(work):
            now = monotonic()
            # Soon after the first look the others have written, too.
            pause = self._pause / 4 if 0 < self._looks < 4 else self._pause
            if now - started > self._axis.timeout:
                self._give_up(work)
            elif now - looked > pause:
                looked = now
                self._looks += 1
                if self._is_somebody_gone(work):
                    self._give_up(work)
        if self._written:
            self._written = False
            self._tell(lambda told: told.erase(self._rank))

    def _tell(self, say: Callable[[Board], T]) -> T | None:
        """Use the board, where it can be reached.

        The rank that serves it may be gone, or stand still.
        """
        told = board()
        if told is None or not told.reachable:
            return None
        answers: list[T] = []
        # torch's store has no deadline for an answer, so it is asked in a thread.
        job = InThread(lambda: answers.append(say(told)))
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
        said = self._said
        return Post(
            state,
            self._meeting,
            tuple(self._axis.ranks[:MANY]),
            " at ".join(self._origin()),
            str(said.code),
            said.what,
            str(said.params),
            parts=self._parts(),
            before=self._calls_before(),
        )

    def _parts(self) -> str:
        """Return what is sent to the ranks nearby and expected of them, in bytes."""
        if self.exchange is None:
            return ""
        number, sent, expected = self.exchange
        rows = [str(number)]
        for index, rank in self._near.items():
            rows.append(f"{rank}:{sent[index]}:{expected[index]}")
        return " ".join(rows)

    def _calls_before(self) -> str:
        """Return the last calls along these ranks, but for this one."""
        key = self._axis.group_key
        calls: list[str] = []
        for number, said in self._history:
            if number != self.number:
                words = f"{key}#{number}", str(said.code), said.what, str(said.params)
                calls.append("\x1d".join(words))
        return "\x1e".join(calls)

    def _origin(self) -> tuple[str, str]:
        function, site = call_site()
        return self._said.by(function), site

    def _is_somebody_gone(self, work: Work) -> bool:
        """Say where this rank is; return whether another is known to be gone."""
        if not self._written:
            self._write(WAITS)
        self._hear(work)
        # After 1, 2, 4, 8, ... looks. The rank that comes last looks soon after, and
        # finds the others' posts.
        if self._looks & (self._looks - 1) == 0:
            near = list(self._near.values())
            self._compare(self._tell(lambda told: told.read(near)), work)
        if self._dead():
            return True
        if not self._tell(Board.somebody_left):
            return False
        posts = self._tell(lambda told: told.read(self._others)) or {}
        return any(map(self._says_gone, posts.values()))

    def _says_gone(self, post: Post) -> bool:
        """Return whether its rank says that it will not arrive."""
        return post.state == LEFT or self._ended_before(post)

    def _ended_before(self, post: Post) -> bool:
        """Return whether its rank has ended without this call."""
        if post.state not in OVER:
            return False
        return json.loads(post.met).get(self._axis.group_key, 0) < self.number

    def _hear(self, work: Work) -> None:
        """Raise where another rank has found unlike calls."""
        given = self._tell(lambda told: told.was_found(self._axis.group_key))
        if given:
            self._refuse_unlike(given, work)

    def _compare(self, posts: dict[int, Post] | None, work: Work) -> None:
        """Raise where a rank that waits in this meeting makes an unlike call there.

        All others are told before.
        """
        key = self._axis.group_key
        for rank, post in (posts or {}).items():
            given = unlike(self._post(WAITS), self._rank, post, rank)
            if given is not None:
                self._tell(lambda told, given=given: told.found(key, given))
                self._refuse_unlike(given, work)

    def _refuse_unlike(self, given: str, work: Work) -> NoReturn:
        self._write(LEFT)
        self._leave(work)
        function, _ = self._origin()
        raise MismatchError(self._phrase(function, given, ALIKE))

    def _dead(self) -> dict[int, str]:
        """Return the ranks of the axis whose process, on this host, is dead."""
        self._tell(lambda told: told.learn(self._node))
        told = board()
        return {} if told is None else told.dead(self._neighbours)

    def _give_up(self, work: Work, cause: RuntimeError | None = None) -> None:
        """Raise an error that names the missing ranks.

        Return normally if the last one arrives while we are asking.
        """
        # By then every rank that has come has said so.
        until = monotonic() + 1.25 * self._pause
        self._write(LEFT)
        while True:
            posts = self._tell(lambda told: told.follow(self._others))
            dead = self._dead()
            self._hear(work)
            known = posts or {}
            self._compare(_only(self._others, known), work)
            absent = self._absent(known, cause)
            if cause is None and work.is_completed():
                return
            nothing_to_learn = posts is None or dead or not absent
            if nothing_to_learn or monotonic() > until:
                break
            sleep(self._pause / 4)
        self._leave(work)
        raise self._timeout(absent, posts, cause) from None

    def _absent(self, posts: dict[int, Post], cause: RuntimeError | None) -> list[int]:
        absent: list[int] = []
        for rank in self._others:
            if not self._is_here(posts.get(rank), cause):
                absent.append(rank)
        return absent

    def _timeout(
        self,
        absent: Sequence[int],
        posts: dict[int, Post] | None,
        cause: RuntimeError | None,
    ) -> CollectiveTimeout:
        broken = cause is not None and "imed out" not in str(cause)
        given = self._who_is_missing(absent, posts, broken)
        function, site = self._origin()
        right = f"Called at {site}"
        if cause is not None:
            right += f"\ngloo says: {first_sentence(cause)}"
            # Hosts that cannot reach each other may use the wrong network interface. A
            # connection that a peer has closed was there.
            several = self._axis.topology.num_nodes > 1
            if several and "closed by peer" not in str(cause):
                right += f"\n{connect.INTERFACE}"
        return CollectiveTimeout(self._phrase(function, given, right))

    def _who_is_missing(
        self, absent: Sequence[int], posts: dict[int, Post] | None, broken: bool
    ) -> str:
        """Return which ranks are to blame, for an error.

        These are the ranks that nobody keeps waiting, though others wait for them.
        """
        told, timeout = board(), self._axis.timeout
        server = f"{place_of(0)} or the launcher"
        unknown = f"the store of the world cannot be reached, which {server} serves"
        if told is None:
            return unknown
        dead, stopped = told.dead(self._node), told.stopped(self._node)
        if posts is not None:
            waiters = roots(absent, posts, dead)
            blamed = list(waiters) or absent
            return not_here(blamed, posts, dead, timeout, broken, stopped, waiters)
        # The board cannot be reached. The rank that served it is one of these, if it is
        # of this host; its connections end a little before its process.
        until = monotonic() + self._pause
        while not (dead or stopped) and monotonic() < until:
            sleep(self._pause / 10)
            dead = told.dead(self._node)
        known = [rank for rank in self._node if rank in {**stopped, **dead}]
        if known:
            return not_here(known, {}, dead, timeout, broken, stopped)
        return unknown

    def _is_here(self, post: Post | None, cause: RuntimeError | None) -> bool:
        if post is None:
            return False
        if post.state in OVER:
            # Where a connection is broken, the rank has not sent all that it began to
            # send.
            return cause is None and not self._ended_before(post)
        return post.meeting == self._meeting


def _only(ranks: Sequence[int], posts: dict[int, Post]) -> dict[int, Post]:
    return {rank: post for rank, post in posts.items() if rank in ranks}


def first_sentence(error: RuntimeError) -> str:
    """Return what torch says, without the place in its code and the advice.

    `[.../pair.cc:553] Connection closed by peer [127.0.0.1]:1. This is ...` becomes
    `Connection closed by peer [127.0.0.1]:1`.
    """
    return re.sub(r"^\[\S*\] ", "", str(error)).splitlines()[0].split(". ")[0]


def _done_soon(work: Work) -> bool:
    """Wait a moment, and return whether the work is over.

    Raises: what the work raised.
    """
    try:
        work.wait(_CHUNK)
    except RuntimeError:
        if not work.is_completed():
            return False
        # It is over meanwhile, and says how.
        work.wait()
    return True


def _tell_the_end() -> None:
    """Say that the world is over here, for those that wait for this rank."""
    _tell_last(ENDED)


def tell_return() -> None:
    """Say that what `launch` ran here has returned: it makes no more calls."""
    _tell_last(RETURNED, str(world.processes().runs))


def _tell_last(state: str, meeting: str = "") -> None:
    told = board()
    if told is None or not told.reachable:
        return
    rank, met = world.here().rank, json.dumps(world.processes().connection.meetings)
    post = Post(state, meeting, (rank,), "", met=met)
    InThread(lambda: told.write(rank, post)).wait(_ANSWER)


world.processes().before_end.append(_tell_the_end)
