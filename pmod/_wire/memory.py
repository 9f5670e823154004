"""The wire of a simulation: ranks are threads, and messages stay in memory."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pmod._errors import AxisError, MismatchError, PmodError, coordinates, phrase
from pmod._mesh.axis import Axis
from pmod._ranks.topology import THREADS, Topology
from pmod._ranks.world import Processes, World
from pmod._site import call_site, origin
from pmod._wire.base import Wire
from pmod._wire.board import ALIKE, WAITS, Post, Said, unlike
from pmod._wire.sent import Sent
from pmod._wire.traffic import count_bytes, count_parts

Brought = tuple[Post, object]
"""What a rank says of a call, and what it sends."""


class Left(BaseException):
    """Another rank has failed, so this one leaves without a word of its own."""


class _Meeting:
    """One exchange: what each member brought, and where in the user's code."""

    def __init__(self, members: Sequence[int]) -> None:
        self.members = members
        self.brought: dict[int, Brought] = {}

    @property
    def complete(self) -> bool:
        return len(self.brought) == len(self.members)

    def missing(self) -> list[int]:
        return [rank for rank in self.members if rank not in self.brought]


class Simulation:
    """The ranks of a simulation, and whose turn it is."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.coords: list[Mapping[str, int] | None] = [None] * size
        self.error: BaseException | None = None
        self.over = threading.Semaphore(0)
        self._batons = [threading.Semaphore(0) for _ in range(size)]
        self._left: set[int] = set()
        self._waiting: dict[int, tuple[_Meeting, str]] = {}
        self._meetings: dict[tuple[str, int], _Meeting] = {}
        self._seen: Counter[tuple[int, str]] = Counter()

    def take_turn(self, rank: int) -> None:
        self._batons[rank].acquire()

    def begin(self) -> None:
        self._batons[0].release()

    def stop_before(self, rank: int) -> None:
        """End the ranks before this one, because it and those after have no thread."""
        given = f"this system starts {rank} threads, and there are {self.size} ranks"
        self.error = PmodError(phrase("simulate", given, "Simulate fewer ranks."))
        self._left.update(range(rank, self.size))
        if rank == 0:
            self.over.release()

    def bring(self, rank: int, axis: Axis, brought: Brought) -> _Meeting:
        """Take part in the next exchange of this axis, without waiting."""
        number = self._seen[rank, axis.group_key]
        self._seen[rank, axis.group_key] += 1
        key = axis.group_key, number
        meeting = self._meetings.setdefault(key, _Meeting(axis.ranks))
        if rank not in meeting.members or meeting.members[axis.index] != rank:
            given = f"the axis belongs to another rank than {rank}"
            right = "Take the mesh inside the simulated function: pmod.current_mesh()."
            raise AxisError(phrase("simulate", given, right, axis=axis.label))
        meeting.brought[rank] = brought
        if meeting.complete:
            # Nobody looks for it any more; those who wait for it hold it themselves.
            del self._meetings[key]
        return meeting

    def wait(self, rank: int, meeting: _Meeting) -> None:
        """Give the baton away until all have come to the meeting."""
        if meeting.complete:
            return
        self._waiting[rank] = (meeting, " at ".join(origin()))
        # torch's generator is the process's, so each rank puts its own state back.
        drawn = torch.get_rng_state()
        if not self._pass_on(rank):
            self._end(self._deadlock())
        self.take_turn(rank)
        torch.set_rng_state(drawn)
        del self._waiting[rank]
        # The baton came, and the meeting is not complete: another rank has failed.
        if not meeting.complete:
            raise Left

    def leave(self, rank: int, error: BaseException | None) -> None:
        """Note that this rank is done, or has failed."""
        # The first error counts; what fails after it may fail because of it.
        if error is not None and self.error is None:
            self.error = error
            error.add_note(f"on {self._place_of(rank)} of the simulation")
        self._left.add(rank)
        if len(self._left) == self.size:
            self.over.release()
        elif not self._pass_on(rank):
            self._end(self._deadlock())

    def _pass_on(self, rank: int) -> bool:
        """Give the baton to the next rank that can go on.

        Returns whether there is one.
        """
        for step in range(1, self.size + 1):
            after = (rank + step) % self.size
            if self._can_go_on(after):
                self._batons[after].release()
                return True
        return False

    def _can_go_on(self, rank: int) -> bool:
        if rank in self._left:
            return False
        if self.error is not None:
            # It wakes up only to leave, whatever it waits for.
            return True
        return rank not in self._waiting or self._waiting[rank][0].complete

    def _end(self, error: BaseException) -> None:
        self.error = error
        self._pass_on(self.size - 1)

    def _deadlock(self) -> MismatchError:
        rows: list[str] = []
        for rank, (meeting, where) in sorted(self._waiting.items()):
            missing = ", ".join(map(self._missing, meeting.missing()))
            rows.append(f"  {self._place_of(rank)} waits for {missing} in {where}")
        listed = "\n".join(rows)
        given = f"the ranks wait for each other, and none can go on:\n{listed}"
        right = "All ranks of an axis must make the same calls in the same order."
        return MismatchError(phrase("simulate", given, right))

    def _missing(self, rank: int) -> str:
        place = self._place_of(rank)
        return f"{place} (has left)" if rank in self._left else place

    def _place_of(self, rank: int) -> str:
        return f"rank {rank} {coordinates(self.coords[rank])}"


class MemoryWire(Wire):
    """A wire that hands tensors over in memory.

    They are copies, because a rank may change its own afterwards.
    """

    def __init__(
        self, simulation: Simulation, rank: int, axis: Axis, said: Said
    ) -> None:
        super().__init__(axis.size, axis.index)
        self._simulation = simulation
        self._rank = rank
        self._axis = axis
        self._said = said

    def _exchange(self, what: object) -> Callable[[], list[object]]:
        (function, site), said = origin(), self._said
        where, code = f"{said.by(function)} at {site}", str(said.code)
        post = Post(WAITS, "", (), where, code, said.what, str(said.params))
        meeting = self._simulation.bring(self._rank, self._axis, (post, what))

        def collect() -> list[object]:
            self._simulation.wait(self._rank, meeting)
            # A real wire never lets unlike calls meet, so this one raises.
            for rank in meeting.members:
                given = unlike(post, self._rank, meeting.brought[rank][0], rank)
                if given is not None:
                    raise self._mismatch(given)
            return [meeting.brought[rank][1] for rank in meeting.members]

        return collect

    def _mismatch(self, given: str) -> MismatchError:
        function, axis = self._said.by(origin()[0]), self._axis
        coords = dict(axis.coords)
        return MismatchError(
            phrase(function, given, ALIKE, axis=axis.label, coords=coords)
        )

    def all_to_all(
        self, x: Tensor, send: Sequence[int], recv: Sequence[int]
    ) -> Sent[Tensor]:
        count_parts(send, recv, self.index, x.element_size())
        collect = self._exchange([part.clone() for part in x.split(list(send))])

        def join() -> Tensor:
            mine: list[Tensor | None] = []
            for parts in collect():
                mine.append(parts[self.index] if isinstance(parts, list) else None)
            return self._fit(mine, recv, x.dtype)

        return Sent((), join)

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Sent[Tensor]:
        others = self.size - 1
        received = (sum(counts) - x.numel()) * x.element_size()
        count_bytes(others * x.nbytes, received, others)
        collect = self._exchange(x.clone())

        def join() -> Tensor:
            parts: list[Tensor | None] = []
            for part in collect():
                parts.append(part if isinstance(part, Tensor) else None)
            return self._fit(parts, counts, x.dtype)

        return Sent((), join)

    def _fit(
        self, parts: Sequence[Tensor | None], counts: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """Join what arrived, which must be what was expected.

        What is not would hang on a real wire, or corrupt.
        """
        fitting: list[Tensor] = []
        for rank, (part, count) in enumerate(zip(parts, counts, strict=True)):
            if part is None:
                sent, expected = "another kind of message", _amount(count, dtype, dtype)
                raise self._unfit(rank, sent, expected)
            if part.numel() != count or part.dtype != dtype:
                sent = _amount(part.numel(), part.dtype, dtype)
                raise self._unfit(rank, sent, _amount(count, dtype, part.dtype))
            fitting.append(part)
        return torch.cat(fitting)

    def _unfit(self, rank: int, sent: str, expected: str) -> MismatchError:
        mine = f"index {self.index} expects {expected}, at {call_site()[1]}"
        given = f"index {rank} of the axis sends {sent} where {mine}"
        right = "All ranks of an axis must make the same calls with shapes that fit."
        axis = self._axis
        return MismatchError(
            phrase("simulate", given, right, axis=axis.label, coords=dict(axis.coords))
        )

    def words(self, mine: str) -> list[str]:
        """Return what each rank says, for `debug`."""
        return [str(said) for said in self._exchange(mine)()]

    def barrier(self) -> None:
        self._exchange(None)()


class Threads(threading.local, World):
    """The world of a simulation.

    Each thread that is a rank has its own, and other threads have that of the process.
    Python calls `__init__` anew in each thread that looks here.
    """

    def __init__(self, processes: Processes, simulation: Simulation) -> None:
        super().__init__(processes)
        self.here = processes
        self._simulation = simulation
        self._topology: Topology | None = None  # of a thread that is a rank

    def settle(self, rank: int, watching: Sequence[object]) -> Topology:
        """Make this thread a rank, and return its place."""
        size = self._simulation.size
        self._topology = Topology(
            rank=rank,
            world_size=size,
            local_rank=rank,
            local_world_size=size,
            launcher=THREADS,
        )
        self.watchers = list(watching)
        self.here = self
        return self._topology

    @property
    def topology(self) -> Topology:
        assert self._topology is not None
        return self._topology

    def wire(self, axis: Axis, said: Said, device: torch.device) -> Wire:
        return MemoryWire(self._simulation, self.topology.rank, axis, said)


def _amount(count: int, dtype: torch.dtype, other: torch.dtype) -> str:
    """Return `3 elements`, with their dtype where that is what differs."""
    if dtype == other:
        return f"{count} elements"
    return f"{count} elements of {dtype}"
