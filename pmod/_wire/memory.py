"""The wire of a simulation: ranks are threads, and messages are handed over in memory."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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


class Left(BaseException):
    """Another rank failed: leave, without a word of one's own."""


class _Meeting:
    """One exchange: what each member brought, and where in the user's code."""

    def __init__(self, members: Sequence[int]) -> None:
        self.members = members
        self.brought: dict[int, Any] = {}

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
        """Let the ranks that have a thread end, because this one and those after it
        have none.
        """
        given = f"this system starts {rank} threads, and there are {self.size} ranks"
        self.error = PmodError(phrase("simulate", given, "Simulate fewer ranks."))
        self._left.update(range(rank, self.size))
        if rank == 0:
            self.over.release()

    def bring(self, rank: int, axis: Axis, what: Any) -> _Meeting:
        """Take part in the next exchange of this axis, without waiting for the others."""
        number = self._seen[rank, axis.group_key]
        self._seen[rank, axis.group_key] += 1
        meeting = self._meetings.setdefault(
            (axis.group_key, number), _Meeting(axis.ranks)
        )
        if rank not in meeting.members or meeting.members[axis.index] != rank:
            raise AxisError(
                phrase(
                    "simulate",
                    f"the axis belongs to another rank than {rank}",
                    "Take the mesh inside the simulated function: pmod.current_mesh().",
                    axis=axis.label,
                )
            )
        meeting.brought[rank] = what
        if meeting.complete:
            del self._meetings[axis.group_key, number]
        return meeting

    def wait(self, rank: int, meeting: _Meeting) -> None:
        """Give the baton away until all have come to the meeting."""
        if meeting.complete:
            return
        self._waiting[rank] = (meeting, " at ".join(origin()))
        drawn = (
            torch.get_rng_state()
        )  # torch's generator is the process's: each rank puts its own state back
        if not self._pass_on(rank):
            self._end(self._deadlock())
        self.take_turn(rank)
        torch.set_rng_state(drawn)
        del self._waiting[rank]
        if not meeting.complete:
            raise Left

    def leave(self, rank: int, error: BaseException | None) -> None:
        """This rank is done, or has failed."""
        if error is not None and self.error is None:
            self.error = error
            error.add_note(
                f"on rank {rank} {coordinates(self.coords[rank])} of the simulation"
            )
        self._left.add(rank)
        if len(self._left) == self.size:
            self.over.release()
        elif not self._pass_on(rank):
            self._end(self._deadlock())

    def _pass_on(self, rank: int) -> bool:
        for step in range(1, self.size + 1):
            after = (rank + step) % self.size
            waits = after in self._waiting and not self._waiting[after][0].complete
            if after not in self._left and (not waits or self.error is not None):
                self._batons[after].release()
                return True
        return False

    def _end(self, error: BaseException) -> None:
        self.error = error
        self._pass_on(self.size - 1)

    def _deadlock(self) -> MismatchError:
        rows: list[str] = []
        for rank, (meeting, where) in sorted(self._waiting.items()):
            absent = ", ".join(
                f"rank {other} {coordinates(self.coords[other])}{' (has left)' if other in self._left else ''}"
                for other in meeting.missing()
            )
            rows.append(
                f"  rank {rank} {coordinates(self.coords[rank])} waits for {absent} in {where}"
            )
        given = "the ranks wait for each other, and none can go on:\n" + "\n".join(rows)
        return MismatchError(
            phrase(
                "simulate",
                given,
                "All ranks of an axis must make the same calls in the same order.",
            )
        )


class MemoryWire(Wire):
    """Tensors are handed over in memory, as copies: a rank may change its own
    afterwards.
    """

    def __init__(
        self, simulation: Simulation, rank: int, axis: Axis, said: Said
    ) -> None:
        super().__init__(axis.size, axis.index)
        self._simulation = simulation
        self._rank = rank
        self._axis = axis
        self._said = said

    def _exchange(self, what: Any) -> Callable[[], list[Any]]:
        (function, site), said = origin(), self._said
        post = Post(
            WAITS,
            "",
            (),
            f"{said.by(function)} at {site}",
            str(said.code),
            said.what,
            str(said.params),
        )
        meeting = self._simulation.bring(self._rank, self._axis, (post, what))

        def collect() -> list[Any]:
            self._simulation.wait(self._rank, meeting)
            for rank in (
                meeting.members
            ):  # as a real wire does, which never lets unlike calls meet
                given = unlike(post, self._rank, meeting.brought[rank][0], rank)
                if given is not None:
                    raise self._mismatch(given)
            return [meeting.brought[rank][1] for rank in meeting.members]

        return collect

    def _mismatch(self, given: str) -> MismatchError:
        function, axis = self._said.by(origin()[0]), self._axis
        return MismatchError(
            phrase(function, given, ALIKE, axis=axis.label, coords=dict(axis.coords))
        )

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Sent:
        count_parts(send, recv, self.index, x.element_size())
        collect = self._exchange([part.clone() for part in x.split(list(send))])

        def join() -> Tensor:
            parts = [
                parts[self.index] if isinstance(parts, list) else None
                for parts in collect()
            ]
            return self._fit(parts, recv, x.dtype)

        return Sent((), join)

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Sent:
        count_bytes(
            (self.size - 1) * x.nbytes,
            (sum(counts) - x.numel()) * x.element_size(),
            self.size - 1,
        )
        collect = self._exchange(x.clone())
        return Sent(
            (),
            lambda: self._fit(
                [part if isinstance(part, Tensor) else None for part in collect()],
                counts,
                x.dtype,
            ),
        )

    def _fit(
        self, parts: Sequence[Tensor | None], counts: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """Join what arrived, which must be what was expected: on a real wire this would
        hang or corrupt.
        """
        for rank, (part, count) in enumerate(zip(parts, counts, strict=True)):
            if part is None or part.numel() != count or part.dtype != dtype:
                what = (
                    "another kind of message"
                    if part is None
                    else _amount(part.numel(), part.dtype, dtype)
                )
                raise MismatchError(
                    phrase(
                        "simulate",
                        f"index {rank} of the axis sends {what} where index {self.index} expects "
                        f"{_amount(count, dtype, dtype if part is None else part.dtype)}, "
                        f"at {call_site()[1]}",
                        "All ranks of an axis must make the same calls with shapes that fit.",
                        axis=self._axis.label,
                        coords=dict(self._axis.coords),
                    )
                )
        return torch.cat([part for part in parts if part is not None])

    def words(self, mine: str) -> list[str]:
        """What each rank says (`debug`)."""
        return self._exchange(mine)()

    def barrier(self) -> None:
        self._exchange(None)()


class Threads(threading.local, World):
    """The world of a simulation: each thread that is a rank has its own, and other
    threads have that of the process.

    Python calls `__init__` anew in each thread that looks here.
    """

    def __init__(self, processes: Processes, simulation: Simulation) -> None:
        super().__init__(processes)
        self.here = processes
        self._simulation = simulation
        self._topology: Topology | None = None  # of a thread that is a rank

    def settle(self, rank: int, watching: Sequence[Any]) -> Topology:
        """Make this thread a rank; its place."""
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
    """`3 elements`, with their dtype where that is what differs."""
    return f"{count} elements" + ("" if dtype == other else f" of {dtype}")
