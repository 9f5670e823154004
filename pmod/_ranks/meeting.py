"""How the ranks meet at a store, and what this host knows of their processes."""

from __future__ import annotations

import hashlib
import os
import socket
import time
import uuid
from pathlib import Path

from attrs import frozen
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from pmod._errors import CollectiveTimeout, phrase
from pmod._ranks.topology import Topology, ranks_of_node


def process_state(pid: int) -> str:
    """Return the letter that /proc has for a process of this host; "" where it is dead.

    T is one that is stopped. Elsewhere than on Linux it is "?" for a process that is
    there.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    stat = Path(f"/proc/{pid}/stat")
    try:
        state = stat.read_text().rpartition(")")[2].split()[0]
    except OSError:
        # It has ended since, or there is no /proc.
        return "" if stat.parent.parent.exists() else "?"
    # A zombie is dead, and not yet waited for by its parent.
    return "" if state in "ZX" else state


# Seconds between looks at the processes of those that have come. The first look comes
# sooner.
_LOOK = 1.0
_FIRST_LOOK = 0.05
# So many processes of its host does a rank look at.
_COMPANY = 32


@frozen
class _Word:
    """What a rank that comes writes down: a word of its own, its place, the time."""

    unique: str
    host: str
    pid: int
    at: float

    @staticmethod
    def new() -> _Word:
        return _Word(uuid.uuid4().hex, socket.gethostname(), os.getpid(), time.time())

    @staticmethod
    def of(text: str) -> _Word:
        unique, host, pid, at = text.split("\x1f")
        return _Word(unique, host, int(pid), float(at))

    def text(self) -> str:
        return "\x1f".join([self.unique, self.host, str(self.pid), repr(self.at)])


class Meeting:
    """The ranks that come to a store, and what each has written there.

    torchrun's agents outlive their workers, and so does what those wrote into the
    store; and each agent counts restarts for itself (TORCHELASTIC_RESTART_COUNT), so
    that the counts of two hosts differ after one worker has died. A rank's own count of
    its meetings is no better: one whose make_mesh was interrupted, or has given up, is
    ahead of others. So each rank writes down a word of its own. Rank 0 proposes the
    words that it finds; whoever finds its word among them agrees, which the dead
    cannot; and what all have agreed to is the name of the meeting.
    """

    def __init__(self, store: Store, topology: Topology, since: float) -> None:
        self._store = store
        self._rank = topology.rank
        self._size = topology.world_size
        self._words = [f"word/{rank}" for rank in range(self._size)]
        self._since = since
        self._mine = _Word.new()
        self._proposed = self._agreed = ""
        # Turned, so that ranks look at unlike ones.
        node = ranks_of_node(topology)
        after, before = node[topology.local_rank + 1 :], node[: topology.local_rank]
        self._company = [*after, *before][:_COMPANY]
        self._came: dict[int, _Word] = {}

    def come(self, seconds: float) -> str:
        """Return the name, once all have come."""
        try:
            self._store.set(self._words[self._rank], self._mine.text())
            if self._wait(seconds):
                return self._agreed
            absent = [rank for rank in range(self._size) if not self._has_agreed(rank)]
        # It is torch's: rank 0, which may serve the store, has gone.
        except RuntimeError:
            self._refuse(self._dead_soon())
            given = (
                "the store of the world, which rank 0 or the launcher serves, "
                "cannot be reached any more"
            )
            right = "Did rank 0 end? Start all ranks anew."
            raise CollectiveTimeout(phrase("make_mesh", given, right)) from None
        who = f"not all {self._size} ranks came within {seconds:g} s"
        given = f"{who}; absent: {_some(absent)}"
        right = "Were all ranks started, and with the same MASTER_ADDR and MASTER_PORT?"
        raise CollectiveTimeout(phrase("make_mesh", given, right))

    def _wait(self, seconds: float) -> bool:
        """Wait for the others, at most so long; return whether all agree."""
        started = time.monotonic()
        look_at, pause = started + _FIRST_LOOK, 0.002
        while time.monotonic() < started + seconds:
            if self._all_agree():
                return True
            if time.monotonic() > look_at:
                look_at = time.monotonic() + _LOOK
                self._look()
            time.sleep(pause)
            # Ranks that come together need not wait long; those that wait for a late
            # one must not keep their one store busy.
            pause = min(1.5 * pause, 0.25)
        return False

    @property
    def places(self) -> dict[int, tuple[str, int]]:
        """The host and the process of each rank, once all have come."""
        words = [_Word.of(text) for text in self._proposed.split("\x1e")]
        return {rank: (word.host, word.pid) for rank, word in enumerate(words)}

    def _all_agree(self) -> bool:
        store = self._store
        self._propose_or_read()
        name = hashlib.sha1(self._proposed.encode()).hexdigest()
        # A proposal without this rank's word is of another meeting.
        if self._mine.unique in self._proposed and name != self._agreed:
            self._agreed = name
            store.set(f"agreed/{name}/{self._rank}", "")
            store.add(f"agreed/{name}", 1)
        if not self._agreed:
            return False
        return store.add(f"agreed/{self._agreed}", 0) == self._size

    def _propose_or_read(self) -> None:
        store = self._store
        if self._rank != 0:
            if store.check(["proposed"]):
                self._proposed = store.get("proposed").decode()
            return
        if not store.check(self._words):
            return
        words = [text.decode() for text in store.multi_get(self._words)]
        found = "\x1e".join(words)
        # The proposal before held the word of a rank that has ended since.
        if found != self._proposed:
            self._proposed = found
            store.set("proposed", found)

    def _has_agreed(self, rank: int) -> bool:
        """Return whether this rank has come to this meeting, as far as can be known.

        That a word is an old one cannot.
        """
        key = self._words[rank]
        if self._agreed:
            key = f"agreed/{self._agreed}/{rank}"
        return self._store.check([key])

    def _look(self) -> None:
        """Raise where a process of this host that has come is dead."""
        for rank in self._company:
            word = self._words[rank]
            if self._store.check([word]):
                self._came[rank] = _Word.of(self._store.get(word).decode())
        self._refuse(self._dead())

    def _dead(self) -> dict[int, _Word]:
        here = socket.gethostname()
        dead: dict[int, _Word] = {}
        for rank, word in self._came.items():
            # An older word is of the meeting before, whose ranks may well have ended.
            is_ours = word.host == here and word.at > self._since
            if is_ours and not process_state(word.pid):
                dead[rank] = word
        return dead

    def _dead_soon(self) -> dict[int, _Word]:
        """Return those that are dead, or will be in a moment.

        The connections of a process that is ending break a little before it is dead.
        """
        until = time.monotonic() + _LOOK
        while not self._dead() and time.monotonic() < until:
            time.sleep(_FIRST_LOOK)
        return self._dead()

    def _refuse(self, dead: dict[int, _Word]) -> None:
        if not dead:
            return
        parts: list[str] = []
        for rank, word in dead.items():
            process = f"process {word.pid} on {word.host}"
            parts.append(f"rank {rank}, whose {process} is dead")
        given = f"some ranks will not arrive; absent: {'; '.join(parts)}"
        right = "What it printed may say why. Start all ranks anew."
        raise CollectiveTimeout(phrase("make_mesh", given, right))


def _some(ranks: list[int]) -> str:
    """Return `rank 1; rank 2; and 3 more`."""
    if not ranks:
        return "none, so one came too late"
    named = [f"rank {rank}" for rank in ranks[:_COMPANY]]
    if len(ranks) > _COMPANY:
        named.append(f"and {len(ranks) - _COMPANY} more")
    return "; ".join(named)
