"""What the ranks say of their waits, in the store of the world.

Errors name from it who is missing, and why.
"""

from __future__ import annotations

import contextlib
import socket
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from time import monotonic
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch

from pmod._errors import coordinates
from pmod._mesh.ambient import ambient
from pmod._mesh.axis import Axis
from pmod._ranks import world
from pmod._ranks.meeting import process_state
from pmod._ranks.topology import ranks_of_node
from pmod._site import Origin

# Of so many other ranks an error names those that are missing.
MANY = 256

WAITS, LEFT, ENDED, RETURNED = "waits", "left", "ended", "returned"
OVER = ENDED, RETURNED  # where no more calls are made
ALIKE = (
    "All ranks of an axis must make the same calls in the same order, "
    "with shapes that fit."
)
_SOMEBODY_LEFT = "pmod/left"
# Of a rank: what it waits for, and that what `launch` ran is over there.
_WAITS = "pmod/waits/{}"
_RETURNED = "pmod/returned/{}"
# Of the ranks of an axis: how their calls differ.
_FOUND = "pmod/unlike/{}"
# Of the ranks of an axis, and one of them: what it has called.
_CALLS = "pmod/calls/{}/{}"


@lru_cache(maxsize=4096)
def code_of(what: object) -> int:
    """Return a number for a value, the same in every process.

    The value is a number, a text, a dtype, or a tuple of them.
    """
    return zlib.crc32(repr(what).encode())


class Said(NamedTuple):
    """What a rank says of the call that it makes.

    `code` must be the same on all ranks; the rest is for an error.
    """

    row: str
    code: int
    shapes: Sequence[tuple[int, ...]] = ()
    dtype: torch.dtype | None = None
    params: tuple[object, ...] = ()
    otherwise: str = "numbers of its own"  # where no tensor of the user's is sent

    def by(self, function: str) -> str:
        """Return how an error names the function that a call site names."""
        if function == "backward":
            return f"{self.row} in backward"
        return function or self.row

    @property
    def what(self) -> str:
        """Return `(2, 3) float32`."""
        if not self.shapes:
            return self.otherwise
        shapes = ", ".join([str(tuple(shape)) for shape in self.shapes])
        return f"{shapes} {str(self.dtype).removeprefix('torch.')}"


class Post(NamedTuple):
    """What a rank that waits says."""

    # WAITS; or LEFT: it raised, and will not arrive; or ENDED: its world is over, as
    # far as it is concerned; or RETURNED: what `launch` ran is over here.
    state: str
    # The axis and the number of the call. Of a rank that has returned, the number of
    # what `launch` ran.
    meeting: str
    ranks: tuple[int, ...]  # for which it waits
    where: str
    # What must be the same on all ranks, as a number and in words: shapes and dtype.
    code: str = ""
    what: str = ""
    params: str = ""
    # Of an exchange of parts: its number, and for ranks nearby what is sent and
    # expected, in bytes.
    parts: str = ""
    # Of a rank that has ended or returned: how often it has sent along which ranks.
    met: str = ""
    # Its last calls along these ranks: an empty one is over at once, whatever the
    # others do.
    before: str = ""

    def text(self) -> str:
        """Return what `of` reads."""
        ranks = ",".join(map(str, self.ranks))
        return "\x1f".join([self.state, self.meeting, ranks, *self[3:]])

    @staticmethod
    def of(text: str) -> Post:
        """Read what `text` wrote."""
        state, meeting, listed, *rest = text.split("\x1f")
        ranks = tuple(map(int, listed.split(","))) if listed else ()
        return Post(state, meeting, ranks, *rest)


def unlike(ours: Post, me: int, theirs: Post, other: int) -> str | None:
    """Return what is wrong where another rank makes an unlike call, else None.

    This rank waits for a call, and the other one has made its own in that place.
    """
    theirs = _at(ours.meeting, theirs)
    if theirs.code and ours.code != theirs.code:
        rows = _rows(ours, me, theirs, other)
        if (ours.what, ours.where) == (theirs.what, theirs.where):
            # Only the parameters tell these two calls apart.
            rows[0] += f" with {ours.params}"
            rows[1] += f" with {theirs.params}"
        return _listed("the ranks make unlike calls, so nothing was exchanged", rows)
    if not theirs.parts or _exchange_of(ours) != _exchange_of(theirs):
        return None
    sent, expected = _parts(ours).get(other, (0, 0))
    sent_there, expected_there = _parts(theirs).get(me, (0, 0))
    lines: list[str] = []
    if sent != expected_there:
        lines.append(_contradiction(me, sent, other, expected_there))
    if sent_there != expected:
        lines.append(_contradiction(other, sent_there, me, expected))
    if not lines:
        return None
    given = "the ranks send what others do not expect, so nothing was exchanged"
    return _listed(given, [*lines, *_rows(ours, me, theirs, other)])


def _rows(ours: Post, me: int, theirs: Post, other: int) -> list[str]:
    return [
        f"  {place_of(me)}: {ours.what} in {ours.where}",
        f"  {place_of(other)}: {theirs.what} in {theirs.where}",
    ]


def _listed(given: str, rows: list[str]) -> str:
    return "\n".join([f"{given}:", *rows])


def _contradiction(sender: int, sent: int, receiver: int, expected: int) -> str:
    to = f"{place_of(receiver)}, which expects {expected}"
    return f"  {place_of(sender)} sends {sent} bytes to {to}"


def _at(meeting: str, post: Post) -> Post:
    """Return what a rank said at a meeting: now, or then if it waits in a later one.

    There is no code where that is unknown.
    """
    if post.meeting == meeting:
        return post
    for row in filter(None, post.before.split("\x1e")):
        met, code, what, params = row.split("\x1d")
        if met == meeting:
            where = f"a call before {post.where}"
            return Post(post.state, meeting, post.ranks, where, code, what, params)
    return Post(post.state, meeting, post.ranks, post.where)


def _exchange_of(post: Post) -> str:
    """Return the number of the exchange that a post says the parts of."""
    return post.parts.partition(" ")[0]


def _parts(post: Post) -> dict[int, tuple[int, int]]:
    """Return what is sent to each rank and expected of it."""
    parts: dict[int, tuple[int, int]] = {}
    for row in post.parts.split(" ")[1:]:
        rank, sent, expected = row.split(":")
        parts[int(rank)] = int(sent), int(expected)
    return parts


class Pulse:
    """Of what asks the store in a thread: when it was answered, and who waits for it."""

    def __init__(self) -> None:
        self.answered = monotonic()
        # Whether nobody waits for it any more, and whether it has ended.
        self.left = False
        self.ended = False


class Exchanges(Protocol):
    """What the ranks say on a board before each call: `_debug/compare.py`."""

    def exchange(
        self, axis: Axis, mine: str, origin: Origin, pulse: Pulse
    ) -> list[str]: ...


class Board:
    """What the ranks say of their waits, in the store of the world."""

    def __init__(self, store: Any) -> None:
        self.of = store
        self.reachable: bool = True
        self.says_left = False  # what this rank has written last
        try:
            # A wait locks a connection, so this one has its own.
            self.store: Any = store.clone()
        except RuntimeError:
            # Its server is gone, or it holds nothing, as torch's fake one.
            self.store, self.reachable = store, False
        self._places: dict[int, tuple[str, int]] = {}
        self.exchanges: Exchanges | None = None  # under `debug`

    def write(self, rank: int, post: Post) -> None:
        # What a rank waited for when it raised says more than that it has returned.
        key = _RETURNED if post.state == RETURNED else _WAITS
        self.store.set(key.format(rank), post.text())
        self.says_left = post.state == LEFT
        if post.state != WAITS:
            self.store.set(_SOMEBODY_LEFT, "1")

    def somebody_left(self) -> bool:
        """Return whether any rank has raised, ended or returned."""
        # Every rank that waits asks this, so it is one question for all of them.
        return self.store.check([_SOMEBODY_LEFT])

    def erase(self, rank: int) -> None:
        self.store.set(_WAITS.format(rank), "")
        self.says_left = False

    def tell_calls(self, ranks: str, rank: int, calls: str) -> None:
        """Tell what this rank has called along these ranks."""
        self.store.set(_CALLS.format(ranks, rank), calls)

    def calls_of(self, ranks: str, rank: int) -> str:
        """Return what another rank has called; nothing if it has told nothing."""
        return self._get(_CALLS.format(ranks, rank))

    def found(self, ranks: str, given: str) -> None:
        """Tell all that wait along these ranks what is wrong with their calls."""
        self.store.set(_FOUND.format(ranks), given)

    def was_found(self, ranks: str) -> str:
        """Return what `found` told; nothing where all is well."""
        return self._get(_FOUND.format(ranks))

    def read(self, ranks: Sequence[int]) -> dict[int, Post]:
        """Return the posts of these ranks, where they have one."""
        posts: dict[int, Post] = {}
        # A rank that has returned from an earlier function makes the calls of this one.
        this_run = str(world.processes().runs)
        for rank in ranks:
            text = self._get(_WAITS.format(rank))
            if text:
                posts[rank] = Post.of(text)
                continue
            text = self._get(_RETURNED.format(rank))
            if text and Post.of(text).meeting == this_run:
                posts[rank] = Post.of(text)
        return posts

    def follow(self, ranks: Sequence[int]) -> dict[int, Post]:
        """Return the posts of these ranks, of those for which they wait, and so on."""
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
        """Ask once where these ranks are, because the store may be gone later."""
        for rank in ranks:
            known = world.processes().connection.places.get(rank)
            if known is not None:
                self._places[rank] = known
            elif rank not in self._places:
                host, _, pid = self._get(world.PLACE.format(rank)).partition("\x1f")
                if pid:
                    self._places[rank] = host, int(pid)

    def dead(self, ranks: Sequence[int]) -> dict[int, str]:
        """Return those of the ranks whose process, on this host, is dead."""
        return self._whose_process(ranks, lambda pid: not _is_alive(pid), "is dead")

    def stopped(self, ranks: Sequence[int]) -> dict[int, str]:
        """Return those of the ranks whose process, on this host, is stopped.

        It stands still until it is continued.
        """
        return self._whose_process(ranks, _is_stopped, "is stopped")

    def _whose_process(
        self, ranks: Sequence[int], does: Callable[[int], bool], what: str
    ) -> dict[int, str]:
        found: dict[int, str] = {}
        for rank in ranks:
            # Ranks of which nothing was learned are left out, as those of other hosts.
            host, pid = self._places.get(rank, ("", 0))
            if host == socket.gethostname() and does(pid):
                found[rank] = f"process {pid} on {host} {what}"
        return found

    def _get(self, key: str) -> str:
        # A key that is not there would be waited for.
        if not self.store.check([key]):
            return ""
        return self.store.get(key).decode()


def _is_alive(pid: int) -> bool:
    return process_state(pid) != ""


def _is_stopped(pid: int) -> bool:
    return process_state(pid) in ("T", "t")


def board() -> Board | None:
    """Return the board of the world.

    None in a simulation, and where the user's process group has no store.
    """
    ours = world.current()
    store = ours.store
    if store is None:
        return None
    if ours.board is None or ours.board.of is not store:
        ours.board = Board(store)
    return ours.board


def come_back(rank: int) -> None:
    """Take back that this rank has left, because it makes a call.

    It had raised in `debug`, before it sent anything.
    """
    told: Board | None = world.now.here.board
    if told is not None and told.says_left and told.reachable:
        # The store may be gone.
        with contextlib.suppress(RuntimeError):
            told.erase(rank)


def place_of(rank: int) -> str:
    """Return `rank 3 (data=1, model=1)`."""
    mesh = ambient()
    coords = None if mesh is None else mesh.coords_of(rank)
    if coords is None:
        return f"rank {rank}"
    return f"rank {rank} {coordinates(coords)}"


def neighbours(axis: Axis) -> list[int]:
    """Return the other ranks of an axis that are on this node.

    Their processes can be looked at.
    """
    me, node = axis.topology.rank, ranks_of_node(axis.topology)
    return [rank for rank in axis.ranks if rank in node and rank != me][:MANY]


def roots(
    absent: Sequence[int], posts: dict[int, Post], dead: Collection[int]
) -> dict[int, int | None]:
    """Return who is to blame: the ranks that are waited for and wait for nobody.

    These are among the absent ranks, those for which they wait in their turn, and so
    on. With each comes the rank that waits for it, None where that is this one. Empty
    where all wait in a circle.
    """
    found: dict[int, int | None] = {}
    seen: set[int] = set()
    left: list[tuple[int, int | None]] = [(rank, None) for rank in absent]
    while left:
        rank, waiter = left.pop(0)
        if rank in seen:
            continue
        seen.add(rank)
        further = awaited(rank, posts)
        # A rank that died while it waited is to blame, too. One that had raised before
        # it died has only passed on what others did.
        if not further or (rank in dead and posts[rank].state != LEFT):
            found[rank] = waiter
        left += [(other, rank) for other in further]
    return found


def awaited(rank: int, posts: dict[int, Post]) -> list[int]:
    """Return the ranks that a rank waits for, and that have not come to it.

    One that has raised names those for which it waited then.
    """
    if rank not in posts:
        return []
    waiting = posts[rank]
    come = {other for other, post in posts.items() if post.meeting == waiting.meeting}
    return [other for other in waiting.ranks if other not in come]


_DOES = {
    WAITS: "it waits in ",
    LEFT: "it raised in ",
    ENDED: "it has ended its mesh",
    RETURNED: "it has returned from the function that launch runs",
}


def not_here(
    absent: Sequence[int],
    posts: dict[int, Post],
    dead: dict[int, str],
    timeout: float,
    broken: bool = False,
    stopped: Mapping[int, str] = MappingProxyType({}),
    waiters: Mapping[int, int | None] = MappingProxyType({}),
) -> str:
    """Return what is wrong, for an error: which ranks are missing, and why.

    broken: whether a connection is. waiters: which rank waits for each of them.
    """
    left = {rank for rank, post in posts.items() if post.state != WAITS}
    lost = left.union(dead)
    gone = [rank for rank in absent if rank in lost]
    still = [rank for rank in absent if rank in stopped]
    if gone:
        given = "some ranks will not arrive"
    elif broken:
        given = "a connection failed"
    elif absent:
        given = f"not all ranks came within {timeout:g} s"
    else:
        given = f"the call was not over within {timeout:g} s"
    if not absent:
        right = "so a network connection is broken or slow"
        return f"{given}. Every rank reported that it is here, {right}"
    rows: list[str] = []
    # Beside ranks that will not arrive, the others may just be late.
    for rank in gone or still or absent:
        known = [_known_of(rank, posts, {**stopped, **dead})]
        waiter = waiters.get(rank)
        if waiter is not None:
            where = posts[waiter].where
            known.append(f"{place_of(waiter)} waits for it in {where}")
        said = ", and ".join(filter(None, known))
        rows.append(": ".join(filter(None, [place_of(rank), said])))
    return f"{given}. Missing: {'; '.join(rows)}"


def _known_of(rank: int, posts: dict[int, Post], processes: Mapping[int, str]) -> str:
    """Return what is known of a missing rank: how its process is, or what it said."""
    if rank in processes:
        return f"its {processes[rank]}"
    if rank in posts:
        return f"{_DOES[posts[rank].state]}{posts[rank].where}"
    return ""
