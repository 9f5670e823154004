"""Waiting for other ranks: Ctrl-C ends it, and so does a deadline, which then names the ranks that never came.

gloo's own wait can do neither. A rank that waits longer than a second writes into the store of the world for what; who
gives up reads there who waits elsewhere and who has left, and whether a process of its own host is dead. What it writes
says which call it makes, too: ranks that make unlike calls have sent messages that never meet (`_wire`), and find out.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from functools import cached_property, lru_cache
from time import monotonic, sleep
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

import torch

from pmod import _groups
from pmod._ambient import ambient
from pmod._blocking import InThread
from pmod._errors import CollectiveTimeout, MismatchError, PmodError, call_site, coordinates, explain
from pmod._meeting import process_state
from pmod._mesh import Axis

LOOK = 1.0  # seconds between looks at what the others say; less where the deadline is near
MANY = 256  # of so many other ranks an error names those that are absent
NEAR = 32  # with so many next ranks of the axis a rank compares its call: if any two differ, then so do two neighbours
_ANSWER = timedelta(seconds=2)  # so long the store may take
_CHUNK = timedelta(seconds=0.05)  # so long a signal waits for Python to handle it

WAITS, LEFT, ENDED = "waits", "left", "ended"
ALIKE = "All ranks of an axis must make the same calls in the same order, with shapes that fit."
_SOMEBODY_LEFT = "pmod/left"
_FOUND = "pmod/unlike/{}"  # the ranks of an axis -> how their calls differ
_CALLS = "pmod/calls/{}/{}"  # the ranks of an axis, and one of them -> what it has called

# Odd numbers, so that what they are multiplied with is told apart in a tag.
_NUMBER, _STAGE, _LENGTH, _BITS = 0x9E3779B1, 0x0F1BBCDD, 0x2545F491, 0x3FFFFFFF
_OURS = 0x40000000  # no small tag, which a user's own messages on the same group may have

T = TypeVar("T")


class Work(Protocol):
    """A message under way, as torch.distributed has it."""

    def wait(self, timeout: timedelta = ..., /) -> Any: ...
    def is_completed(self) -> bool: ...


# --- the board ------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def code_of(what: Any) -> int:
    """A number for numbers, texts, dtypes and tuples of them, the same in every process."""
    return zlib.crc32(repr(what).encode())


class Said(NamedTuple):
    """What a rank says of the call that it makes: `code` must be the same on all ranks, the rest is for an error."""

    row: str
    code: int
    shapes: Sequence[tuple[int, ...]] = ()
    dtype: torch.dtype | None = None
    params: Any = ()
    otherwise: str = "numbers of its own"  # where no tensor of the user's is sent

    def by(self, function: str) -> str:
        """Of the function that a call site names, how an error names it."""
        return f"{self.row} in backward" if function == "backward" else function or self.row

    @property
    def what(self) -> str:
        """`(2, 3) float32`."""
        shapes = ", ".join(str(tuple(shape)) for shape in self.shapes)
        return f"{shapes} {str(self.dtype).removeprefix('torch.')}" if shapes else self.otherwise


class Post(NamedTuple):
    """What a rank that waits says."""

    state: str  # WAITS, or LEFT: it raised, and comes no more; or ENDED: its world is over, as far as it is concerned
    meeting: str  # the axis and the number of the call
    ranks: tuple[int, ...]  # for which it waits
    where: str
    code: str = ""  # what must be the same on all ranks, as a number,
    what: str = ""  # and in words: the shapes and the dtype,
    params: str = ""  # and the parameters
    parts: str = ""  # of an exchange of parts: its number, and for ranks nearby what is sent and expected, in bytes
    met: str = ""  # of one that has ended: how often it has sent along which ranks
    before: str = ""  # its last calls along these ranks: an empty one is over at once, whatever the others do

    def text(self) -> str:
        return "\x1f".join([self.state, self.meeting, ",".join(map(str, self.ranks)), *self[3:]])

    @staticmethod
    def of(text: str) -> Post:
        state, meeting, ranks, *rest = text.split("\x1f")
        return Post(state, meeting, tuple(map(int, ranks.split(","))) if ranks else (), *rest)


def unlike(ours: Post, me: int, theirs: Post, other: int) -> str | None:
    """What is wrong where this rank waits for a call, and another has made an unlike one in its place; else None."""
    theirs = _at(ours.meeting, theirs)
    rows = [f"  {place_of(rank)}: {post.what} in {post.where}" for rank, post in ((me, ours), (other, theirs))]
    if theirs.code and ours.code != theirs.code:
        if (ours.what, ours.where) == (theirs.what, theirs.where):
            rows = [f"{row} with {post.params}" for row, post in zip(rows, (ours, theirs), strict=True)]
        return "the ranks make unlike calls, so nothing was exchanged:\n" + "\n".join(rows)
    if not theirs.parts or ours.parts.partition(" ")[0] != theirs.parts.partition(" ")[0]:
        return None
    sent, expected = _parts(ours).get(other, (0, 0)), _parts(theirs).get(me, (0, 0))
    pairs = [(me, sent[0], other, expected[1]), (other, expected[0], me, sent[1])]
    lines = [
        f"  {place_of(a)} sends {here} bytes to {place_of(b)}, which expects {there}"
        for a, here, b, there in pairs
        if here != there
    ]
    if not lines:
        return None
    return "the ranks send what others do not expect, so nothing was exchanged:\n" + "\n".join([*lines, *rows])


def _at(meeting: str, post: Post) -> Post:
    """What a rank said at a meeting: now, or, where it waits in a later one, then; no code where that is unknown."""
    if post.meeting == meeting:
        return post
    for row in post.before.split("\x1e"):
        where, code, what, params = row.split("\x1d") if row else ("", "", "", "")
        if where == meeting:
            return Post(post.state, meeting, post.ranks, f"a call before {post.where}", code, what, params)
    return Post(post.state, meeting, post.ranks, post.where)


def _parts(post: Post) -> dict[int, tuple[int, int]]:
    """By rank, what is sent to it and expected of it."""
    rows = [row.split(":") for row in post.parts.split(" ")[1:]]
    return {int(rank): (int(sent), int(expected)) for rank, sent, expected in rows}


class Board:
    """What the ranks say of their waits, in the store of the world."""

    def __init__(self, store: Any) -> None:
        self.of = store
        self.reachable: bool = True
        try:
            self.store: Any = store.clone()  # a connection of its own: a wait locks it
        except RuntimeError:  # its server is gone, or it holds nothing (torch's fake one)
            self.store, self.reachable = store, False
        self._places: dict[int, tuple[str, int]] = {}

    def write(self, rank: int, post: Post) -> None:
        self.store.set(f"pmod/waits/{rank}", post.text())
        if post.state != WAITS:
            self.store.set(_SOMEBODY_LEFT, "1")

    def somebody_left(self) -> bool:
        """One question, however many ranks there are."""
        return self.store.check([_SOMEBODY_LEFT])

    def erase(self, rank: int) -> None:
        self.store.set(f"pmod/waits/{rank}", "")

    def tell_calls(self, ranks: str, rank: int, calls: str) -> None:
        """Tell what this rank has called along these ranks."""
        self.store.set(_CALLS.format(ranks, rank), calls)

    def calls_of(self, ranks: str, rank: int) -> str:
        """What another rank has called; nothing where it has told nothing."""
        return self._get(_CALLS.format(ranks, rank))

    def found(self, ranks: str, given: str) -> None:
        """Tell all that wait along these ranks what is wrong with their calls."""
        self.store.set(_FOUND.format(ranks), given)

    def was_found(self, ranks: str) -> str:
        """What `found` told; nothing where all is well."""
        return self._get(_FOUND.format(ranks))

    def read(self, ranks: Sequence[int]) -> dict[int, Post]:
        """The posts of these ranks, where they have one."""
        posts: dict[int, Post] = {}
        for rank in ranks:
            text = self._get(f"pmod/waits/{rank}")
            if text:
                posts[rank] = Post.of(text)
        return posts

    def follow(self, ranks: Sequence[int]) -> dict[int, Post]:
        """The posts of these ranks, of those for which they wait, and so on."""
        posts: dict[int, Post] = {}
        seen: set[int] = set()
        left = list(ranks)
        while left:
            rank = left.pop()
            if rank in seen:
                continue
            seen.add(rank)
            posts |= self.read([rank])
            left += posts[rank].ranks if rank in posts else ()
        return posts

    def learn(self, ranks: Sequence[int]) -> None:
        """Ask where these ranks are, once: the store may be gone when it matters."""
        for rank in ranks:
            known = _groups.place_of_process(rank)
            if known is not None:
                self._places[rank] = known
            elif rank not in self._places:
                host, _, pid = self._get(_groups.PLACE.format(rank)).partition("\x1f")
                if pid:
                    self._places[rank] = host, int(pid)

    def dead(self, ranks: Sequence[int]) -> dict[int, str]:
        """Those, of the ranks that it has learned of, whose process was on this host and is no more."""
        return self._whose_process(ranks, lambda pid: not _is_alive(pid), "is dead")

    def stopped(self, ranks: Sequence[int]) -> dict[int, str]:
        """Those, of the ranks that it has learned of, whose process on this host stands still until it is continued."""
        return self._whose_process(ranks, lambda pid: process_state(pid) in ("T", "t"), "is stopped")

    def _whose_process(self, ranks: Sequence[int], does: Callable[[int], bool], what: str) -> dict[int, str]:
        found: dict[int, str] = {}
        for rank in ranks:
            host, pid = self._places.get(rank, ("", 0))
            if host == socket.gethostname() and does(pid):
                found[rank] = f"process {pid} on {host} {what}"
        return found

    def _get(self, key: str) -> str:
        return self.store.get(key).decode() if self.store.check([key]) else ""


def _is_alive(pid: int) -> bool:
    return process_state(pid) != ""


_board: Board | None = None


def board() -> Board | None:
    """That of the world; None in a simulation, and where the user's process group has no store."""
    global _board
    store = _groups.blackboard()
    if store is None:
        return None
    if _board is None or _board.of is not store:
        _board = Board(store)
    return _board


def place_of(rank: int) -> str:
    """`rank 3 (data=1, model=1)`."""
    mesh = ambient()
    coords = None if mesh is None else mesh.coords_of(rank)
    return f"rank {rank}" + ("" if coords is None else f" {coordinates(coords)}")


def neighbours(axis: Axis) -> list[int]:
    """The other ranks of an axis that are on this node: their processes can be looked at."""
    place = axis.topology
    first = place.rank - place.local_rank
    return [rank for rank in axis.ranks if first <= rank < first + place.local_world_size and rank != place.rank][:MANY]


def roots(absent: Sequence[int], posts: dict[int, Post], dead: Collection[int]) -> dict[int, int | None]:
    """Of the absent ranks, and those for which they wait in their turn, the ones that wait for nobody: who is to blame.

    With each, the rank that waits for it, None where that is this one. Empty where all wait in a circle.
    """
    found: dict[int, int | None] = {}
    seen: set[int] = set()
    left: list[tuple[int, int | None]] = [(rank, None) for rank in absent]
    while left:
        rank, waiter = left.pop(0)
        if rank in seen:
            continue
        seen.add(rank)
        further = _awaited(rank, posts)
        if not further or (rank in dead and posts[rank].state != LEFT):
            found[rank] = waiter
        left += [(other, rank) for other in further]
    return found


def _awaited(rank: int, posts: dict[int, Post]) -> list[int]:
    """The ranks for which a rank waits, or waited when it raised, and that have not come to it."""
    post = posts.get(rank)
    if post is None:
        return []
    others = [other for other in post.ranks if other != rank]
    return [other for other in others if other not in posts or posts[other].meeting != post.meeting]


_DOES = {WAITS: "waits in ", LEFT: "raised in ", ENDED: "has ended its mesh"}


def not_here(
    absent: Sequence[int], posts: dict[int, Post], dead: dict[int, str], timeout: float, broken: bool = False,
    stopped: Mapping[int, str] = MappingProxyType({}), waiters: Mapping[int, int | None] = MappingProxyType({}),
) -> str:  # fmt: skip
    """What is wrong, for an error: these ranks did not come, and what is known of them. broken: a connection is."""
    gone = [rank for rank in absent if rank in dead or (rank in posts and posts[rank].state != WAITS)]
    still = [rank for rank in absent if rank in stopped]
    rows: list[str] = []
    for rank in gone or still or absent:  # beside those that come no more, the others may just be late
        row = place_of(rank)
        if rank in dead or rank in stopped:
            row += f", whose {dead.get(rank) or stopped[rank]}"
        elif rank in posts:
            row += f", which {_DOES[posts[rank].state]}{posts[rank].where}"
        waiter = waiters.get(rank)
        if waiter is not None:
            row += f", for which {place_of(waiter)} waits in {posts[waiter].where}"
        rows.append(row)
    given = "a connection failed" if broken else f"not all ranks came within {timeout:g} s"
    given = "some ranks come no more" if gone else given
    return f"{given}; absent: {'; '.join(rows) or 'none, so a connection is broken or slow'}"


# --- the wait -------------------------------------------------------------------------------------


class Wait:
    """The wait for one collective, which other ranks of the axis know by the same number."""

    def __init__(self, axis: Axis, said: Said, cut_off: Callable[[Any], None] = lambda group: None) -> None:
        self._axis, self._said = axis, said
        self._cut_off = cut_off  # closes the connections of a group
        self.number = _groups.next_meeting(axis.group_key)
        self._history = _groups.history(axis.group_key)
        self._history.append((self.number, self._said))
        self.exchange: tuple[int, Sequence[int], Sequence[int]] | None = None  # its number, bytes sent and expected
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
        """The other ranks of this node, whose processes can be looked at; those of the axis first."""
        place = self._axis.topology
        first = place.rank - place.local_rank
        node = range(first, min(first + place.local_world_size, place.world_size))
        others = [rank for rank in node if rank != place.rank and rank not in self._neighbours]
        return [*self._neighbours, *others][:MANY]

    @cached_property
    def _neighbours(self) -> list[int]:
        return neighbours(self._axis)

    @cached_property
    def _near(self) -> dict[int, int]:
        """Index along the axis -> rank, of those with whom this rank compares its call."""
        ranks, size, here = list(self._axis.ranks), self._axis.size, self._axis.index
        steps = range(1, min(size, NEAR + 1))
        return {index % size: ranks[index % size] for step in steps for index in (here + step, here - step)}

    def tag(self, stage: int, nbytes: int) -> int:
        """Of a message of this call: messages of unlike calls, of other exchanges or lengths have other tags."""
        mixed = self._said.code + _NUMBER * self.number + _STAGE * stage + _LENGTH * nbytes
        return mixed & _BITS | _OURS

    @property
    def device(self) -> torch.device:
        """That of the mesh."""
        return self._axis.topology.device

    def refuse(self) -> NoReturn:
        """Raise, because an earlier wait along these ranks was cut off; and say so to those that wait for this rank."""
        self._leave_word()
        function, _ = self._origin()
        given = "an earlier call along these ranks was cut off while it waited, so messages no longer pair up"
        right = "Begin anew on all ranks: pmod.shutdown(), then pmod.make_mesh; in a notebook, %mesh."
        axis = self._axis
        raise MismatchError(explain(function, given, right, axis=axis.label, coords=dict(axis.coords)))

    def until_done(self, work: Work) -> None:
        """Return when the work is done.

        Raises: CollectiveTimeout at the deadline, or when a rank cannot come any more.
        """
        try:
            if not _done_soon(work):
                self._wait_long(work)
        except RuntimeError as error:  # gloo's: a connection broke, or its own deadline passed
            self._give_up(work, error)
        except PmodError:
            raise
        except BaseException:  # Ctrl-C: others may still take what was sent, so the connections go with the world only
            if not work.is_completed():
                post = self._farewell()
                _groups.leave_behind(self._axis.group, lambda: self._say_farewell(post, work))
            raise

    def _leave(self, work: Work) -> None:
        """Never use this group again. What waits in it in a thread ends, which Python's own end would abort."""
        _groups.leave_behind(self._axis.group, self._cut_all)
        self._cut(work)

    def _cut(self, work: Work) -> None:
        """Close the connections of a message that has failed, so that those who wait for this rank hear of it."""
        if isinstance(work, InThread):
            with contextlib.suppress(RuntimeError):
                InThread(work.cut).wait(_ANSWER)
                work.wait(_ANSWER)

    def _farewell(self) -> Post:
        """What tells the others that this rank comes no more, to no meeting, and waits for nobody."""
        return self._post(LEFT)._replace(meeting="", ranks=(self._rank,))

    def _leave_word(self) -> None:
        post = self._farewell()
        self._tell(lambda told: told.write(self._rank, post))

    def _say_farewell(self, post: Post, work: Work) -> None:
        self._tell(lambda told: told.write(self._rank, post))
        self._cut(work)
        self._cut_all()

    def _cut_all(self) -> None:
        """Close the connections of the world, so that those who wait for this rank elsewhere hear of it."""
        cuts = [InThread(lambda group=group: self._cut_off(group)) for group in _groups.groups_in_use()]
        until = monotonic() + _ANSWER.total_seconds()
        for one in cuts:
            with contextlib.suppress(RuntimeError):  # a group without a connection waits for one
                one.wait(timedelta(seconds=max(0.0, until - monotonic())))

    def _wait_long(self, work: Work) -> None:
        started = looked = monotonic()
        while not _done_soon(work):
            now = monotonic()
            if now - started > self._axis.timeout:
                self._give_up(work)
            # soon after the first look the others have written, too
            elif now - looked > (self._pause / 4 if 0 < self._looks < 4 else self._pause):
                looked = now
                self._looks += 1
                if self._come_no_more(work):
                    self._give_up(work)
        if self._written:
            self._written = False
            self._tell(lambda told: told.erase(self._rank))

    def _tell(self, say: Callable[[Board], T]) -> T | None:
        """Use the board, where it can be reached: the rank that serves it may be gone, or stand still."""
        told = board()
        if told is None or not told.reachable:
            return None
        answers: list[T] = []
        job = InThread(lambda: answers.append(say(told)))  # torch's store has no deadline for an answer
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
            rows = [f"{rank}:{sent[index]}:{expected[index]}" for index, rank in self._near.items()]
            parts = " ".join([str(number), *rows])
        where, ranks = " at ".join(self._origin()), tuple(self._axis.ranks[:MANY])
        key = self._axis.group_key
        calls = [(f"{key}#{n}", str(s.code), s.what, str(s.params)) for n, s in self._history if n != self.number]
        before = "\x1e".join("\x1d".join(call) for call in calls)
        return Post(state, self._meeting, ranks, where, str(said.code), said.what, str(said.params), parts, "", before)

    def _origin(self) -> tuple[str, str]:
        function, site = call_site()
        return self._said.by(function), site

    def _come_no_more(self, work: Work) -> bool:
        """Say where this rank is; whether another is known to be gone."""
        if not self._written:
            self._write(WAITS)
        # after 1, 2, 4, 8, ... looks: who comes last looks soon after, and finds the others' posts
        self._hear(work)
        if self._looks & (self._looks - 1) == 0:
            self._compare(self._tell(lambda told: told.read(list(self._near.values()))), work)
        if self._dead():
            return True
        if not self._tell(Board.somebody_left):
            return False
        posts = self._tell(lambda told: told.read(self._others)) or {}
        return any(post.state == LEFT or self._ended_before(post) for post in posts.values())

    def _ended_before(self, post: Post) -> bool:
        """Whether its rank has ended without this call."""
        return post.state == ENDED and json.loads(post.met).get(self._axis.group_key, 0) < self.number

    def _hear(self, work: Work) -> None:
        """Raise where another rank has found unlike calls."""
        given = self._tell(lambda told: told.was_found(self._axis.group_key))
        if given:
            self._refuse_unlike(given, work)

    def _compare(self, posts: dict[int, Post] | None, work: Work) -> None:
        """Raise where a rank that waits in this meeting makes an unlike call there, and tell all others."""
        for rank, post in (posts or {}).items():
            given = unlike(self._post(WAITS), self._rank, post, rank)
            if given is not None:
                self._tell(lambda told, given=given: told.found(self._axis.group_key, given))
                self._refuse_unlike(given, work)

    def _refuse_unlike(self, given: str, work: Work) -> NoReturn:
        self._write(LEFT)
        self._leave(work)
        function, _ = self._origin()
        axis = self._axis
        raise MismatchError(explain(function, given, ALIKE, axis=axis.label, coords=dict(axis.coords)))

    def _dead(self) -> dict[int, str]:
        self._tell(lambda told: told.learn(self._node))
        told = board()
        return {} if told is None else told.dead(self._neighbours)

    def _give_up(self, work: Work, cause: RuntimeError | None = None) -> None:
        """Raise, with who is not here and why; unless the last one comes while the others are asked."""
        axis, until = self._axis, monotonic() + 1.25 * self._pause  # by then who has come has said so
        self._write(LEFT)
        while True:
            posts, dead = self._tell(lambda told: told.follow(self._others)), self._dead()
            self._hear(work)
            self._compare({rank: post for rank, post in (posts or {}).items() if rank in self._others}, work)
            absent = [rank for rank in self._others if not self._is_here((posts or {}).get(rank), cause)]
            if cause is None and work.is_completed():
                return
            if posts is None or dead or not absent or monotonic() > until:
                break
            sleep(self._pause / 4)
        self._leave(work)
        broken = cause is not None and "imed out" not in str(cause)
        given = self._who_is_missing(absent, posts, broken)
        function, site = self._origin()
        right = f"Called at {site}" + ("" if cause is None else f"\ngloo says: {_short(cause)}")
        if cause is not None and axis.topology.num_nodes > 1 and "closed by peer" not in str(cause):
            right += f"\n{_groups.INTERFACE}"
        raise CollectiveTimeout(explain(function, given, right, axis=axis.label, coords=dict(axis.coords))) from None

    def _who_is_missing(self, absent: Sequence[int], posts: dict[int, Post] | None, broken: bool) -> str:
        """The ranks to blame: those that nobody keeps waiting, though others wait for them."""
        told, timeout = board(), self._axis.timeout
        dead, stopped = ({}, {}) if told is None else (told.dead(self._node), told.stopped(self._node))
        if posts is not None:
            waiters = roots(absent, posts, dead)
            return not_here(list(waiters) or absent, posts, dead, timeout, broken, stopped, waiters)
        # the rank that served the board is one of these, if it is of this host: its connections end a little before it
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
        if post.state == ENDED:  # where a connection is broken, it has not sent all that it began to send
            return cause is None and not self._ended_before(post)
        return post.meeting == self._meeting


def _short(error: RuntimeError) -> str:
    """`[.../pair.cc:553] Connection closed by peer [127.0.0.1]:1. This is ...` without the first and the last part."""
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
    """Say of this rank that its world is over, for those that wait for a connection to it, or for a message."""
    told = board()
    if told is None or not told.reachable:
        return
    rank, met = _groups.here().rank, json.dumps(_groups.meetings())
    post = Post(ENDED, "", (rank,), "", met=met)
    InThread(lambda: told.write(rank, post)).wait(_ANSWER)


_groups.before_end.append(_tell_the_end)
