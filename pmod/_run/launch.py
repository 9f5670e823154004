"""`launch`: a function on local processes, one per rank, without a launcher.

The parent serves the store at which the ranks meet, sends each rank the same task, and
gathers one outcome per rank. Task and outcome travel as plain pickles over a pipe per
rank: `Connection.send` would hand tensors over in shared memory, whose file descriptors
outlive what they were sent for.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import math
import operator
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from multiprocessing import (
    current_process,
    get_context,
    parent_process,
    resource_tracker,
)
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from attrs import evolve
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  (public, by torch's own page)

from pmod._core.arguments import check_function
from pmod._errors import (
    AxisError,
    CollectiveTimeout,
    PmodError,
    coordinates,
    phrase,
    quoted,
)
from pmod._mesh.ambient import set_mesh
from pmod._mesh.make import make_mesh
from pmod._ranks import connect, world
from pmod._ranks.backends import use_device
from pmod._ranks.topology import Topology
from pmod._run.task import (
    Died,
    Outcome,
    Raised,
    Returned,
    Task,
    main_is_imported,
    pack_result,
    unpack,
)
from pmod._wire.waiting import tell_return

T = TypeVar("T")

_LOOPBACK = "127.0.0.1"
# A rank that fails tears its partners down with it: for so long after the first failure
# a better explanation may come.
_GRACE = 0.5
_OBEY = 2.0  # seconds for a rank to end when told to
_UNGUARDED = 113  # exit code of a rank that met `launch` while it imported the script
# What a process is called is where it stands: `launch` asks it whether it may start
# ranks here.
_STARTING = "pmod starting rank"
_SERVING = "pmod rank"


def launch(fn: Callable[..., T], /, *args: object, **axis_sizes: int) -> list[T]:
    """Run ``fn(*args)`` on local processes, one per rank, and return what each rank
    returned, in rank order.

    For a script or a notebook on one machine, where nothing else has started ranks.
    Each rank has the mesh of `axis_sizes` set, a GPU where there are any, and its share
    of the cores. Ranks talk over loopback only.

    `fn`, `args` and results are pickled by value: tensors are copied, and leave their
    autograd history behind. What a script or a module defines at its top level is found
    by name; functions of a notebook, lambdas and closures need cloudpickle. A script
    calls launch under ``if __name__ == "__main__":``, because the ranks import the
    script.

    A rank's exception is raised here with the rank's traceback as a note, and the other
    ranks are ended.

    Raises: AxisError where no axis is given or a size is not an int of 1 or more;
    ArgumentError where fn cannot be sent; PmodError under a launcher, inside a rank,
    where the script has no guard, and where a rank dies.

    >>> pmod.launch(pmod.axis_index, "model", model=2)
    [0, 1]
    """
    _check_place()
    sizes = _checked_sizes(axis_sizes)
    check_function(fn, "launch")
    task = Task.of(
        fn, args, sizes, last=True
    )  # before anything starts: what cannot be sent fails at once
    with Ranks(math.prod(sizes.values())) as ranks:
        return ranks.run(task)


def _check_place() -> None:
    """Ranks start from a process that is none itself."""
    name = current_process().name
    if name.startswith(_STARTING):
        # The script calls launch without a guard: the parent says so, once for all
        # ranks.
        os._exit(_UNGUARDED)
    if name.startswith(_SERVING):
        raise PmodError(
            phrase(
                "launch",
                f"this process is a rank of a launch already ({name})",
                "Inside a rank call collectives; to have more ranks, give the outer launch larger sizes.",
            )
        )
    place = Topology.detect(os.environ, device_count=0)
    if place.launcher != "single":
        raise PmodError(
            phrase(
                "launch",
                f"this process is rank {place.rank} of {place.world_size}, started by {place.launcher}",
                "Here the ranks run already: pmod.set_mesh(pmod.make_mesh(...)), then call the function itself. "
                "launch is for a plain `python script.py` or a notebook.",
            )
        )


def _checked_sizes(axis_sizes: Mapping[str, int]) -> dict[str, int]:
    if not axis_sizes:
        raise AxisError(
            phrase(
                "launch",
                "no axis size is given, so it cannot say how many ranks to start",
                "Name the axes, as in pmod.launch(fn, x, data=2, model=2) for 4 ranks.",
            )
        )
    sizes: dict[str, int] = {}
    for name, size in axis_sizes.items():
        try:
            sizes[name] = 0 if isinstance(size, bool) else operator.index(size)
        except TypeError:
            sizes[name] = 0
        if sizes[name] < 1:
            right = (
                "Sizes are ints of 1 or more; their product is the number of processes."
            )
            if sizes[name] == -1:
                right = "Nothing here says how many ranks there are, so -1 cannot be worked out: give the size."
            raise AxisError(
                phrase("launch", f"{name}={quoted(size)} is no size", right)
            )
    return sizes


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    """A rank's main function: one outcome for each task, until the parent closes the
    pipe or dies.
    """
    current_process().name = f"{_SERVING} {rank}"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _ignore_interrupts()
    faulthandler.enable()
    settle_in(size)
    topology = topology_of(rank, size, port)
    use_device(topology.device)
    pipe.send_bytes(pickle.dumps(Returned(b"")))  # ready
    while True:
        try:
            task = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        outcome = _perform(task, topology)
        print(
            end="", flush=True
        )  # what fn printed comes before what the caller prints next
        pipe.send_bytes(pickle.dumps(outcome))


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches all processes of a terminal, and the parent answers for the ranks."""
    # a handler that does nothing, because an ignored signal would stay ignored in what
    # fn starts
    signal.signal(signal.SIGINT, lambda number, frame: None)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def settle_in(size: int) -> None:
    """Make this process a good neighbour of `size` - 1 others on one machine."""
    for name in ("lo", "lo0"):  # the loopback interface, on Linux and elsewhere
        if name in (interface for _, interface in socket.if_nameindex()):
            os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = name
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    torch.set_num_threads(max(1, min(torch.get_num_threads(), cores // size)))
    # glibc maps blocks over 32 MiB afresh each time, and the page faults cost more than
    # a message of that size.
    with contextlib.suppress(AttributeError):  # other C libraries have no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def topology_of(rank: int, size: int, port: int) -> Topology:
    """That of a rank whose parent serves the store at `port`; device and backend as
    `Topology.detect` chooses them.
    """
    one_node = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": size,
    }
    variables = {name: str(value) for name, value in one_node.items()}
    variables.update(MASTER_ADDR=_LOOPBACK, MASTER_PORT=str(port))
    return evolve(Topology.detect(variables), launcher="launch")


def _perform(task: Task, topology: Topology) -> Outcome:
    try:
        world.launch_as(topology)
        with set_mesh(make_mesh(task.axis_sizes, topology=topology)):
            fn, args = unpack(task.packed)
            world.processes().connection.runs += 1
            result = fn(*args)
            # others may wait for a rank that has returned without any call: for them it
            # comes to the world after all
            if task.last and not dist.is_initialized():
                connect.connect(topology, world.deadline(None))
            tell_return()
            return Returned(pack_result(result))
    except BaseException as error:
        return Raised.of(error)


class Ranks:
    """Local processes that stay, one per rank: each `run` is one function on all of
    them.

    A run that fails ends the processes, because ranks that were cut off in the middle
    cannot be brought together again.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        # Served from here, on a port that the system picks and that is bound from then
        # on: no other process can take it. torch would listen on all interfaces.
        listener = socket.create_server((_LOOPBACK, 0), backlog=max(128, size))
        port = listener.getsockname()[1]
        self._store: TCPStore | None = TCPStore(
            _LOOPBACK,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        try:
            with _spawning():
                for rank in range(size):
                    self._start(rank, port)
            self._check_started(self._gather(math.inf))
        except BaseException:
            self.close(patience=0)
            raise

    def _start(self, rank: int, port: int) -> None:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        self._pipes.append(ours)
        process = context.Process(
            target=_serve,
            args=(rank, self.size, port, theirs),
            name=f"{_STARTING} {rank}",
        )  # not a daemon: fn may start processes of its own (a DataLoader's)
        try:
            process.start()
            self._processes.append(process)
        finally:
            theirs.close()

    def _check_started(self, outcomes: Mapping[int, Outcome]) -> None:
        for rank, outcome in outcomes.items():
            if not isinstance(outcome, Died):
                continue
            script = getattr(sys.modules["__main__"], "__file__", None)
            if outcome.exitcode == _UNGUARDED:
                raise PmodError(
                    phrase(
                        "launch",
                        f"{script} calls launch without a guard, and the ranks, which import it, "
                        "would start ranks in their turn",
                        'Put the call under a guard:\n\n    if __name__ == "__main__":\n        pmod.launch(...)',
                    )
                )
            where = f", importing {script}" if main_is_imported() else ""
            raise PmodError(
                phrase(
                    "launch",
                    f"rank {rank} of {self.size} {outcome} while it was starting{where}",
                    outcome.advice,
                )
            )

    def run(self, task: Task, timeout: float | None = None) -> list[Any]:
        """The outcome of the task on every rank; an exception where one failed or the
        seconds have passed.
        """
        if not self._processes:
            raise PmodError(
                phrase("launch", "these ranks have ended", "Start new ones.")
            )
        try:
            message = pickle.dumps(task)
            for pipe in self._pipes:
                with contextlib.suppress(
                    OSError
                ):  # died between two tasks: _gather finds out
                    pipe.send_bytes(message)
            outcomes = self._gather(
                math.inf if timeout is None else time.monotonic() + timeout
            )
            self._check_finished(outcomes, task.axis_sizes, timeout)
            return [self._load(rank, outcomes[rank]) for rank in range(self.size)]
        except BaseException:
            self.close(patience=0)
            raise

    def _gather(self, deadline: float) -> dict[int, Outcome]:
        """One outcome per rank, in the order in which they came; not all of them when
        one failed or time is up.
        """
        outcomes: dict[int, Outcome] = {}
        while len(outcomes) < self.size and time.monotonic() < deadline:
            left = [rank for rank in range(self.size) if rank not in outcomes]
            handles = [self._pipes[rank] for rank in left]
            # Neither pipe nor sentinel tells of a death while a child of the rank holds
            # them: ask once a second, too.
            wait(
                [*handles, *(self._processes[rank].sentinel for rank in left)],
                min(1.0, deadline - time.monotonic()),
            )
            for rank in left:
                outcome = self._outcome(rank)
                if outcome is not None:
                    outcomes[rank] = outcome
                if isinstance(outcome, (Raised, Died)):
                    deadline = min(deadline, time.monotonic() + _GRACE)
        return outcomes

    def _outcome(self, rank: int) -> Outcome | None:
        process, pipe = self._processes[rank], self._pipes[rank]
        exitcode = (
            process.exitcode
        )  # first: what a rank wrote before it died is in the pipe by then
        try:
            if pipe.poll():
                return pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            process.join(1.0)
            return Died(process.exitcode)
        return None if exitcode is None else Died(exitcode)

    def _check_finished(
        self,
        outcomes: Mapping[int, Outcome],
        axis_sizes: Mapping[str, int],
        timeout: float | None,
    ) -> None:
        """Raise what the ranks have failed with: a death explains the exceptions that
        it causes, else the first one.
        """
        failed = {
            rank: outcome
            for rank, outcome in outcomes.items()
            if not isinstance(outcome, Returned)
        }
        if not failed:
            late = [rank for rank in range(self.size) if rank not in outcomes]
            if late:
                who = ", ".join(
                    f"rank {rank} {coordinates(_coords(rank, axis_sizes))}"
                    for rank in late
                )
                raise CollectiveTimeout(
                    phrase("launch", f"no answer within {timeout} s from {who}")
                )
            return
        rank = next(
            (rank for rank, outcome in failed.items() if isinstance(outcome, Died)),
            next(iter(failed)),
        )
        first = failed.pop(rank)
        coords = _coords(rank, axis_sizes)
        if isinstance(first, Raised):
            error = first.error()
            if error is not None:
                error.add_note(
                    f"pmod.launch at {coordinates(coords)}: rank {rank} of {self.size} raised this.\n"
                )
                error.add_note(first.text)
            else:
                given = f"rank {rank} of {self.size} raised {first.summary}"
                error = PmodError(
                    phrase("launch", given, f"\n{first.text}", coords=coords)
                )
        else:
            error = PmodError(
                phrase(
                    "launch",
                    f"rank {rank} of {self.size} {first}",
                    first.advice,
                    coords=coords,
                )
            )
        for other, outcome in failed.items():
            what = outcome.summary if isinstance(outcome, Raised) else str(outcome)
            error.add_note(
                f"also rank {other} {coordinates(_coords(other, axis_sizes))}: {what}"
            )
        raise error

    def _load(self, rank: int, outcome: Outcome) -> object:
        assert isinstance(outcome, Returned)
        try:
            return pickle.loads(outcome.packed)
        except Exception as error:
            given = f"what rank {rank} returned cannot be loaded here: {type(error).__name__}: {error}"
            raise PmodError(
                phrase(
                    "launch", given, "Return tensors, numbers, or containers of them."
                )
            ) from error

    def close(self, patience: float = 5.0) -> None:
        """Let the ranks leave, and end those that have not left after `patience`
        seconds.
        """
        for pipe in self._pipes:
            pipe.close()  # a rank that waits for a task leaves
        self._join(patience)
        for end in (BaseProcess.terminate, BaseProcess.kill):
            for process in self._processes:
                if process.exitcode is None:
                    end(process)
            self._join(_OBEY)
        for process in self._processes:
            if process.exitcode is not None:
                process.close()
        self._processes, self._pipes, self._store = [], [], None

    def _join(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close() if kind is None else self.close(patience=0)


def _coords(rank: int, axis_sizes: Mapping[str, int]) -> dict[str, int]:
    """The place of a rank, last axis fastest: the failing rank's mesh is not here to be
    asked.
    """
    coords: dict[str, int] = {}
    for name in reversed(list(axis_sizes)):
        rank, coords[name] = divmod(rank, axis_sizes[name])
    return {name: coords[name] for name in axis_sizes}


@contextlib.contextmanager
def _spawning() -> Generator[None]:
    """While processes start: Ctrl-C waits, so that no rank meets it unprepared; a
    session's `__main__` stays behind.
    """
    main = sys.modules["__main__"]
    hidden: dict[str, object] = {}
    if (
        not main_is_imported()
        and getattr(main, "__spec__", None) is None
        and hasattr(main, "__file__")
    ):
        hidden["__file__"] = main.__dict__.pop(
            "__file__"
        )  # multiprocessing would run <stdin>
    mask = None
    if hasattr(signal, "pthread_sigmask"):
        resource_tracker.ensure_running()  # it would be started with the first rank, and unblocks signals
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        main.__dict__.update(hidden)
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
