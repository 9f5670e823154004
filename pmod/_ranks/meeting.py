"""How the ranks meet at a store, each time they connect, and what this host knows of
their processes.
"""

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
    """Of a process of this host, the letter that /proc has for it: T where it is
    stopped; "" where it is dead.

    Elsewhere than on Linux it is "?" for a process that is there.
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
        return "" if stat.parent.parent.exists() else "?"
    return (
        "" if state in "ZX" else state
    )  # a zombie is dead, and not yet waited for by its parent


_LOOK = 1.0  # seconds between looks at the processes of those that have come; the first one comes sooner
_FIRST_LOOK = 0.05
_COMPANY = 32  # so many processes of its host does a rank look at


@frozen
class _Word:
    """What a rank that comes writes down: a word that nobody else has, where it is, and
    when it came.
    """

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
        self._store, self._rank, self._size = store, topology.rank, topology.world_size
        self._words = [f"word/{rank}" for rank in range(self._size)]
        self._since = since
        self._mine = _Word.new()
        self._proposed = self._agreed = ""
        node = ranks_of_node(topology)
        turned = [
            *node[topology.local_rank + 1 :],
            *node[: topology.local_rank],
        ]  # so that ranks look at unlike ones
        self._company = turned[:_COMPANY]
        self._came: dict[int, _Word] = {}

    def come(self, seconds: float) -> str:
        """The name, once all have come."""
        until, looked, pause = (
            time.monotonic() + seconds,
            time.monotonic() + _FIRST_LOOK - _LOOK,
            0.002,
        )
        try:
            self._store.set(self._words[self._rank], self._mine.text())
            while time.monotonic() < until:
                if self._all_agree():
                    return self._agreed
                if time.monotonic() - looked > _LOOK:
                    looked = time.monotonic()
                    self._look()
                time.sleep(pause)
                pause = min(1.5 * pause, 0.25)
            absent = [rank for rank in range(self._size) if not self._has_agreed(rank)]
        except RuntimeError:  # torch's: rank 0, which may serve the store, has gone
            self._refuse(self._dead_soon())
            given = "the store of the world, which rank 0 or the launcher serves, cannot be reached any more"
            raise CollectiveTimeout(
                phrase("make_mesh", given, "Did rank 0 end? Start all ranks anew.")
            ) from None
        given = f"not all {self._size} ranks came within {seconds:g} s; absent: {_some(absent)}"
        right = "Were all ranks started, and with the same MASTER_ADDR and MASTER_PORT?"
        raise CollectiveTimeout(phrase("make_mesh", given, right))

    @property
    def places(self) -> dict[int, tuple[str, int]]:
        """The host and the process of each rank, once all have come."""
        words = [_Word.of(text) for text in self._proposed.split("\x1e")]
        return {rank: (word.host, word.pid) for rank, word in enumerate(words)}

    def _all_agree(self) -> bool:
        store = self._store
        if self._rank == 0 and store.check(self._words):
            found = "\x1e".join(text.decode() for text in store.multi_get(self._words))
            if found != self._proposed:  # one of them was of a rank that is no more
                self._proposed = found
                store.set("proposed", found)
        elif self._rank != 0 and store.check(["proposed"]):
            self._proposed = store.get("proposed").decode()
        name = hashlib.sha1(self._proposed.encode()).hexdigest()
        if self._mine.unique in self._proposed and name != self._agreed:
            self._agreed = name
            store.set(f"agreed/{name}/{self._rank}", "")
            store.add(f"agreed/{name}", 1)
        return (
            self._agreed != "" and store.add(f"agreed/{self._agreed}", 0) == self._size
        )

    def _has_agreed(self, rank: int) -> bool:
        """Whether this rank has come to this meeting, as far as can be known: that a
        word is an old one cannot.
        """
        return self._store.check(
            [f"agreed/{self._agreed}/{rank}" if self._agreed else self._words[rank]]
        )

    def _look(self) -> None:
        """Raise where a process of this host that has come is dead."""
        for rank in self._company:
            if self._store.check([self._words[rank]]):
                self._came[rank] = _Word.of(self._store.get(self._words[rank]).decode())
        self._refuse(self._dead())

    def _dead(self) -> dict[int, _Word]:
        here = socket.gethostname()
        came = {
            rank: word
            for rank, word in self._came.items()
            if word.host == here and word.at > self._since
        }
        return {
            rank: word for rank, word in came.items() if not process_state(word.pid)
        }

    def _dead_soon(self) -> dict[int, _Word]:
        """Those of a process that is ending: its connections break a little before it
        is dead.
        """
        until = time.monotonic() + _LOOK
        while not self._dead() and time.monotonic() < until:
            time.sleep(_FIRST_LOOK)
        return self._dead()

    def _refuse(self, dead: dict[int, _Word]) -> None:
        if not dead:
            return
        who = "; ".join(
            f"rank {rank}, whose process {word.pid} on {word.host} is dead"
            for rank, word in dead.items()
        )
        right = "What it printed may say why. Start all ranks anew."
        raise CollectiveTimeout(
            phrase("make_mesh", f"some ranks come no more; absent: {who}", right)
        )


def _some(ranks: list[int]) -> str:
    """`rank 1; rank 2; and 3 more`."""
    more = [f"and {len(ranks) - _COMPANY} more"] if len(ranks) > _COMPANY else []
    return (
        "; ".join([*(f"rank {rank}" for rank in ranks[:_COMPANY]), *more])
        or "none, so one came too late"
    )
