"""What the ranks say of their waits, in the store of the world: for errors that name
who is missing, and why.
"""

from __future__ import annotations

import contextlib
import socket
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from pmod._errors import coordinates
from pmod._mesh.ambient import ambient
from pmod._mesh.axis import Axis
from pmod._ranks import world
from pmod._ranks.meeting import process_state
from pmod._ranks.topology import ranks_of_node

MANY = 256  # of so many other ranks an error names those that are absent

WAITS, LEFT, ENDED, RETURNED = "waits", "left", "ended", "returned"
ALIKE = "All ranks of an axis must make the same calls in the same order, with shapes that fit."
_SOMEBODY_LEFT = "pmod/left"
_FOUND = "pmod/unlike/{}"  # the ranks of an axis -> how their calls differ
_CALLS = (
    "pmod/calls/{}/{}"  # the ranks of an axis, and one of them -> what it has called
)


@lru_cache(maxsize=4096)
def code_of(what: Any) -> int:
    """A number for numbers, texts, dtypes and tuples of them, the same in every
    process.
    """
    return zlib.crc32(repr(what).encode())


class Said(NamedTuple):
    """What a rank says of the call that it makes: `code` must be the same on all ranks,
    the rest is for an error.
    """

    row: str
    code: int
    shapes: Sequence[tuple[int, ...]] = ()
    dtype: torch.dtype | None = None
    params: Any = ()
    otherwise: str = "numbers of its own"  # where no tensor of the user's is sent

    def by(self, function: str) -> str:
        """Of the function that a call site names, how an error names it."""
        return (
            f"{self.row} in backward"
            if function == "backward"
            else function or self.row
        )

    @property
    def what(self) -> str:
        """`(2, 3) float32`."""
        shapes = ", ".join(str(tuple(shape)) for shape in self.shapes)
        return (
            f"{shapes} {str(self.dtype).removeprefix('torch.')}"
            if shapes
            else self.otherwise
        )


class Post(NamedTuple):
    """What a rank that waits says."""

    # WAITS; or LEFT: it raised, and comes no more; or ENDED: its world is over, as far
    # as it is concerned; or RETURNED: what `launch` ran is over here
    state: str
    meeting: str  # the axis and the number of the call; of one that has returned, the number of what `launch` ran
    ranks: tuple[int, ...]  # for which it waits
    where: str
    code: str = ""  # what must be the same on all ranks, as a number,
    what: str = ""  # and in words: the shapes and the dtype,
    params: str = ""  # and the parameters
    parts: str = ""  # of an exchange of parts: its number, and for ranks nearby what is sent and expected, in bytes
    met: str = (
        ""  # of one that has ended or returned: how often it has sent along which ranks
    )
    before: str = ""  # its last calls along these ranks: an empty one is over at once, whatever the others do

    def text(self) -> str:
        return "\x1f".join(
            [self.state, self.meeting, ",".join(map(str, self.ranks)), *self[3:]]
        )

    @staticmethod
    def of(text: str) -> Post:
        state, meeting, ranks, *rest = text.split("\x1f")
        return Post(
            state, meeting, tuple(map(int, ranks.split(","))) if ranks else (), *rest
        )


def unlike(ours: Post, me: int, theirs: Post, other: int) -> str | None:
    """What is wrong where this rank waits for a call, and another has made an unlike
    one in its place; else None.
    """
    theirs = _at(ours.meeting, theirs)
    rows = [
        f"  {place_of(rank)}: {post.what} in {post.where}"
        for rank, post in ((me, ours), (other, theirs))
    ]
    if theirs.code and ours.code != theirs.code:
        if (ours.what, ours.where) == (theirs.what, theirs.where):
            rows = [
                f"{row} with {post.params}"
                for row, post in zip(rows, (ours, theirs), strict=True)
            ]
        return "the ranks make unlike calls, so nothing was exchanged:\n" + "\n".join(
            rows
        )
    if (
        not theirs.parts
        or ours.parts.partition(" ")[0] != theirs.parts.partition(" ")[0]
    ):
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
    return (
        "the ranks send what others do not expect, so nothing was exchanged:\n"
        + "\n".join([*lines, *rows])
    )


def _at(meeting: str, post: Post) -> Post:
    """What a rank said at a meeting: now, or, where it waits in a later one, then; no
    code where that is unknown.
    """
    if post.meeting == meeting:
        return post
    for row in post.before.split("\x1e"):
        where, code, what, params = row.split("\x1d") if row else ("", "", "", "")
        if where == meeting:
            return Post(
                post.state,
                meeting,
                post.ranks,
                f"a call before {post.where}",
                code,
                what,
                params,
            )
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
        self.says_left = False  # what this rank has written last
        try:
            self.store: Any = store.clone()  # a connection of its own: a wait locks it
        except (
            RuntimeError
        ):  # its server is gone, or it holds nothing (torch's fake one)
            self.store, self.reachable = store, False
        self._places: dict[int, tuple[str, int]] = {}
        self.exchanges: Any = (
            None  # what the ranks say on it under `debug`, of _debug/compare.py
        )

    def write(self, rank: int, post: Post) -> None:
        self.store.set(f"pmod/waits/{rank}", post.text())
        self.says_left = post.state == LEFT
        if post.state != WAITS:
            self.store.set(_SOMEBODY_LEFT, "1")

    def somebody_left(self) -> bool:
        """One question, however many ranks there are."""
        return self.store.check([_SOMEBODY_LEFT])

    def erase(self, rank: int) -> None:
        self.store.set(f"pmod/waits/{rank}", "")
        self.says_left = False

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
            known = world.processes().connection.places.get(rank)
            if known is not None:
                self._places[rank] = known
            elif rank not in self._places:
                host, _, pid = self._get(world.PLACE.format(rank)).partition("\x1f")
                if pid:
                    self._places[rank] = host, int(pid)

    def dead(self, ranks: Sequence[int]) -> dict[int, str]:
        """Those, of the ranks that it has learned of, whose process was on this host
        and is no more.
        """
        return self._whose_process(ranks, lambda pid: not _is_alive(pid), "is dead")

    def stopped(self, ranks: Sequence[int]) -> dict[int, str]:
        """Those, of the ranks that it has learned of, whose process on this host stands
        still until it is continued.
        """
        return self._whose_process(
            ranks, lambda pid: process_state(pid) in ("T", "t"), "is stopped"
        )

    def _whose_process(
        self, ranks: Sequence[int], does: Callable[[int], bool], what: str
    ) -> dict[int, str]:
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


def board() -> Board | None:
    """That of the world; None in a simulation, and where the user's process group has
    no store.
    """
    ours = world.current()
    store = ours.store
    if store is None:
        return None
    if ours.board is None or ours.board.of is not store:
        ours.board = Board(store)
    return ours.board


def come_back(rank: int) -> None:
    """Take back that this rank comes no more: it raised in `debug`, before it sent
    anything, and now makes a call.
    """
    told: Board | None = world.now.here.board
    if told is not None and told.says_left:
        with contextlib.suppress(RuntimeError):  # the store is gone
            told.erase(rank)


def place_of(rank: int) -> str:
    """`rank 3 (data=1, model=1)`."""
    mesh = ambient()
    coords = None if mesh is None else mesh.coords_of(rank)
    return f"rank {rank}" + ("" if coords is None else f" {coordinates(coords)}")


def neighbours(axis: Axis) -> list[int]:
    """The other ranks of an axis that are on this node: their processes can be looked
    at.
    """
    node = ranks_of_node(axis.topology)
    return [rank for rank in axis.ranks if rank in node and rank != axis.topology.rank][
        :MANY
    ]


def roots(
    absent: Sequence[int], posts: dict[int, Post], dead: Collection[int]
) -> dict[int, int | None]:
    """Of the absent ranks, and those for which they wait in their turn, the ones that
    wait for nobody: who is to blame.

    With each, the rank that waits for it, None where that is this one. Empty where all
    wait in a circle.
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
    """The ranks for which a rank waits, or waited when it raised, and that have not
    come to it.
    """
    post = posts.get(rank)
    if post is None:
        return []
    others = [other for other in post.ranks if other != rank]
    return [
        other
        for other in others
        if other not in posts or posts[other].meeting != post.meeting
    ]


_DOES = {
    WAITS: "waits in ",
    LEFT: "raised in ",
    ENDED: "has ended its mesh",
    RETURNED: "has returned from the function that launch runs",
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
    """What is wrong, for an error: these ranks did not come, and what is known of them.
    broken: a connection is.
    """
    gone = [
        rank
        for rank in absent
        if rank in dead or (rank in posts and posts[rank].state != WAITS)
    ]
    still = [rank for rank in absent if rank in stopped]
    rows: list[str] = []
    for rank in (
        gone or still or absent
    ):  # beside those that come no more, the others may just be late
        row = place_of(rank)
        if rank in dead or rank in stopped:
            row += f", whose {dead.get(rank) or stopped[rank]}"
        elif rank in posts:
            row += f", which {_DOES[posts[rank].state]}{posts[rank].where}"
        waiter = waiters.get(rank)
        if waiter is not None:
            row += f", for which {place_of(waiter)} waits in {posts[waiter].where}"
        rows.append(row)
    given = (
        "a connection failed" if broken else f"not all ranks came within {timeout:g} s"
    )
    given = "some ranks come no more" if gone else given
    return f"{given}; absent: {'; '.join(rows) or 'none, so a connection is broken or slow'}"
