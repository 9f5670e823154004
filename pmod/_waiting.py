"""Waiting for other ranks: Ctrl-C ends it, and so does a deadline, which then names the ranks that never came.

gloo's own wait can do neither. A rank that waits longer than a second writes into the store of the world for what; who
gives up reads there who waits elsewhere and who has left, and whether a process of its own host is dead.
"""

from __future__ import annotations

import os
import queue
import re
import socket
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

import torch

from pmod import _groups
from pmod._ambient import ambient
from pmod._errors import CollectiveTimeout, MismatchError, call_site, coordinates, explain
from pmod._mesh import Axis

LOOK = 1.0  # seconds between looks at what the others say; less where the deadline is near
MANY = 256  # of so many other ranks an error names those that are absent
_ANSWER = timedelta(seconds=2)  # so long the store may take
_CHUNK = timedelta(seconds=0.05)  # so long a signal waits for Python to handle it

WAITS, LEFT = "waits", "left"
_SOMEBODY_LEFT = "pmod/left"

T = TypeVar("T")


class Work(Protocol):
    """A message under way, as torch.distributed has it."""

    def wait(self, timeout: timedelta = ..., /) -> Any: ...
    def is_completed(self) -> bool: ...


# --- the board ------------------------------------------------------------------------------------


class Post(NamedTuple):
    """What a rank that waits says."""

    state: str  # WAITS, or LEFT: it raised, and comes no more
    meeting: str  # the axis and the number of the call
    ranks: tuple[int, ...]  # for which it waits
    where: str

    def text(self) -> str:
        return "\x1f".join([self.state, self.meeting, ",".join(map(str, self.ranks)), self.where])

    @staticmethod
    def of(text: str) -> Post:
        state, meeting, ranks, where = text.split("\x1f", 3)
        return Post(state, meeting, tuple(map(int, ranks.split(","))), where)


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
        if post.state == LEFT:
            self.store.set(_SOMEBODY_LEFT, "1")

    def somebody_left(self) -> bool:
        """One question, however many ranks there are."""
        return self.store.check([_SOMEBODY_LEFT])

    def erase(self, rank: int) -> None:
        self.store.set(f"pmod/waits/{rank}", "")

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
            if rank not in self._places:
                host, _, pid = self._get(_groups.PLACE.format(rank)).partition("\x1f")
                if pid:
                    self._places[rank] = host, int(pid)

    def dead(self, ranks: Sequence[int]) -> dict[int, str]:
        """Those, of the ranks that it has learned of, whose process was on this host and is no more."""
        found: dict[int, str] = {}
        for rank in ranks:
            host, pid = self._places.get(rank, ("", 0))
            if host == socket.gethostname() and not _is_alive(pid):
                found[rank] = f"process {pid} on {host} is dead"
        return found

    def _get(self, key: str) -> str:
        return self.store.get(key).decode() if self.store.check([key]) else ""


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"  # dead, and not yet waited for by its parent
    except OSError:
        return not stat.parent.parent.exists()


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


def not_here(
    absent: Sequence[int], posts: dict[int, Post], dead: dict[int, str], timeout: float, broken: bool = False
) -> str:
    """What is wrong, for an error: these ranks did not come, and what is known of them. broken: a connection is."""
    gone = [rank for rank in absent if rank in dead or (rank in posts and posts[rank].state == LEFT)]
    rows: list[str] = []
    for rank in gone or absent:  # beside those that come no more, the others may just be late
        row = place_of(rank)
        if rank in dead:
            row += f", whose {dead[rank]}"
        elif rank in posts:
            row += f", which {'raised' if posts[rank].state == LEFT else 'waits'} in {posts[rank].where}"
        rows.append(row)
    given = "a connection failed" if broken else f"not all ranks came within {timeout:g} s"
    given = "some ranks come no more" if gone else given
    return f"{given}; absent: {'; '.join(rows) or 'none, so a connection is broken or slow'}"


# --- the wait -------------------------------------------------------------------------------------


class Wait:
    """The wait for one collective, which other ranks of the axis know by the same number."""

    def __init__(self, axis: Axis, row: str) -> None:
        self._axis, self._row = axis, row
        self._number = _groups.next_meeting(axis.group_key)
        self._written = False
        if self._number == 1:
            board()  # connected while the rank that serves it is there
        elif self._number == 2:  # by now all ranks of the axis have connected
            self._tell(lambda told: told.learn(self._neighbours))

    @property
    def _meeting(self) -> str:
        return f"{self._axis.group_key}#{self._number}"

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
    def _neighbours(self) -> list[int]:
        """The others of this node, whose processes can be looked at."""
        place = self._axis.topology
        first = place.rank - place.local_rank
        return [rank for rank in self._others if first <= rank < first + place.local_world_size]

    @property
    def device(self) -> torch.device:
        """That of the mesh."""
        return self._axis.topology.device

    def refuse(self) -> NoReturn:
        """Raise, because an earlier wait along these ranks was cut off; and say so to those that wait for this rank."""
        self._write(LEFT)
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
        except BaseException:
            if not work.is_completed():
                _groups.leave_behind(self._axis.group)
            raise

    def _wait_long(self, work: Work) -> None:
        started = looked = monotonic()
        while not _done_soon(work):
            now = monotonic()
            if now - started > self._axis.timeout:
                self._give_up(work)
            elif now - looked > self._pause:
                looked = now
                if self._come_no_more():
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
        post = Post(state, self._meeting, tuple(self._axis.ranks[:MANY]), " at ".join(self._origin()))
        self._tell(lambda told: told.write(self._rank, post))
        self._written = True

    def _origin(self) -> tuple[str, str]:
        function, site = call_site()
        return (f"{self._row} in backward" if function == "backward" else function or self._row), site

    def _come_no_more(self) -> bool:
        """Say where this rank is; whether another is known to be gone."""
        if not self._written:
            self._write(WAITS)
        if self._dead():
            return True
        if not self._tell(Board.somebody_left):
            return False
        posts = self._tell(lambda told: told.read(self._others)) or {}
        return any(post.state == LEFT for post in posts.values())

    def _dead(self) -> dict[int, str]:
        self._tell(lambda told: told.learn(self._neighbours))
        told = board()
        return {} if told is None else told.dead(self._neighbours)

    def _give_up(self, work: Work, cause: RuntimeError | None = None) -> None:
        """Raise, with who is not here and why; unless the last one comes while the others are asked."""
        axis, until = self._axis, monotonic() + 1.25 * self._pause  # by then who has come has said so
        self._write(LEFT)
        while True:
            posts, dead = self._tell(lambda told: told.read(self._others)), self._dead()
            absent = [rank for rank in self._others if not self._is_here((posts or {}).get(rank))]
            if cause is None and work.is_completed():
                return
            if posts is None or dead or not absent or monotonic() > until:
                break
            sleep(self._pause / 4)
        if not work.is_completed():
            _groups.leave_behind(axis.group)
        broken = cause is not None and "imed out" not in str(cause)
        given = not_here(absent, posts or {}, dead, axis.timeout, broken)
        if posts is None and not dead:
            given = f"the store of the world cannot be reached, which {place_of(0)} or the launcher serves"
        function, site = self._origin()
        right = f"Called at {site}" + ("" if cause is None else f"\ngloo says: {_short(cause)}")
        if cause is not None and axis.topology.num_nodes > 1 and "closed by peer" not in str(cause):
            right += f"\n{_groups.INTERFACE}"
        raise CollectiveTimeout(explain(function, given, right, axis=axis.label, coords=dict(axis.coords))) from None

    def _is_here(self, post: Post | None) -> bool:
        return post is not None and post.meeting == self._meeting


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


# --- works that only a blocking call can wait for ---------------------------------------------------


class InThread:
    """gloo's sends and receives block, for their connection and for their end, and cannot be looked at: in a thread."""

    def __init__(self, f: Callable[[], None]) -> None:
        self._f = f
        self._over = threading.Lock()
        self._over.acquire()
        self._error: BaseException | None = None
        try:
            worker = _idle.pop()
        except IndexError:
            worker = queue.SimpleQueue()
            threading.Thread(target=_serve, args=(worker,), name="pmod sends", daemon=True).start()
        worker.put(self)

    def run(self) -> None:
        try:
            self._f()
        except BaseException as error:
            self._error = error

    def release(self) -> None:
        self._over.release()

    def is_completed(self) -> bool:
        return not self._over.locked()

    def wait(self, timeout: timedelta | None = None) -> None:
        if not self._over.acquire(timeout=-1 if timeout is None else timeout.total_seconds()):
            raise RuntimeError("not done yet")
        self._over.release()
        if self._error is not None:
            raise self._error


_idle: list[queue.SimpleQueue[InThread]] = []
os.register_at_fork(after_in_child=_idle.clear)  # threads stay behind


def _serve(jobs: queue.SimpleQueue[InThread]) -> None:
    while True:
        job = jobs.get()
        job.run()
        _idle.append(jobs)
        job.release()
        del job  # with the tensors that it holds
