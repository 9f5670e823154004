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
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from attrs import evolve
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from pmod._core.arguments import as_int, check_function
from pmod._errors import (
    AxisError,
    CollectiveTimeout,
    PmodError,
    coordinates,
    phrase,
)
from pmod._mesh.ambient import set_mesh
from pmod._mesh.make import make_mesh
from pmod._mesh.sizes import as_size, named_coords_at
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
# Seconds for a rank to end when told to.
_OBEY = 2.0
# The exit code of a rank that met `launch` while it imported the script.
_UNGUARDED = 113
# What a process is called is where it stands: `launch` asks it whether it may start
# ranks here.
_STARTING = "pmod starting rank"
_SERVING = "pmod rank"


def launch(
    fn: Callable[..., T],
    /,
    *args: object,
    timeout: float | None = None,
    **axis_sizes: int,
) -> list[T]:
    """Run ``fn(*args)`` on local processes, one per rank, and return their results.

    They are in rank order. It is for a script or a notebook on one machine,
    where nothing else has started ranks. Each rank has the mesh of `axis_sizes` set, a
    GPU where there are any, and its share of the cores. Ranks talk over loopback only.
    timeout: seconds until a collective gives up, as for `make_mesh`; by default
    PMOD_TIMEOUT, else 600. How long `fn` computes has no limit.

    `fn`, `args` and results are pickled by value: tensors are copied, and leave their
    autograd history behind. What a script or a module defines at its top level is found
    by name; functions of a notebook, lambdas and closures need cloudpickle. A script
    calls launch under ``if __name__ == "__main__":``, because the ranks import the
    script.

    A rank's exception is raised here with the rank's traceback as a note, and the other
    ranks are ended.

    Raises: AxisError where no axis is given, a size is not an int of 1 or more, or
    timeout is not a number above 0; ArgumentError where fn cannot be sent; PmodError
    under a launcher, inside a rank, where the script has no guard, and where a rank
    dies.

    >>> pmod.launch(pmod.axis_index, "model", model=2)
    [0, 1]
    """
    _check_place()
    sizes = _checked_sizes(axis_sizes)
    check_function(fn, "launch")
    seconds = None if timeout is None else world.deadline(timeout, "launch")
    # Before anything starts: what cannot be sent fails at once.
    task = Task.of(fn, args, sizes, last=True, timeout=seconds)
    with Ranks(math.prod(sizes.values())) as ranks:
        return cast(list[T], ranks.run(task))


def _check_place() -> None:
    """Raise unless ranks may start from this process, which must not be one itself."""
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
                "Inside a rank call collectives; to have more ranks, "
                "give the outer launch larger sizes.",
            )
        )
    place = Topology.detect(os.environ, device_count=0)
    if place.launcher != "single":
        raise PmodError(
            phrase(
                "launch",
                f"this process is rank {place.rank} of {place.world_size}, "
                f"started by {place.launcher}",
                "Here the ranks run already: pmod.set_mesh(pmod.make_mesh(...)), "
                "then call the function itself. launch is for a plain "
                "`python script.py` or a notebook.",
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
    for name, given in axis_sizes.items():
        right = "Sizes are ints of 1 or more; their product is the number of processes."
        if as_int(given) == -1:
            right = (
                "Nothing here says how many ranks there are, "
                "so -1 cannot be worked out: give the size."
            )
        sizes[name] = as_size(name, given, "launch", right)
    return sizes


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    """Be a rank: send one outcome for each task, until the parent closes the pipe."""
    current_process().name = f"{_SERVING} {rank}"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _ignore_interrupts()
    faulthandler.enable()
    settle_in(size)
    topology = topology_of(rank, size, port)
    use_device(topology.device)
    # An outcome before any task says that the rank is ready.
    pipe.send_bytes(pickle.dumps(Returned(b"")))
    while True:
        try:
            task = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        outcome = _perform(task, topology)
        # What fn printed comes before what the caller prints next.
        print(end="", flush=True)
        pipe.send_bytes(pickle.dumps(outcome))


def _end_with_parent() -> None:
    """End this process when its parent has died."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _ignore_interrupts() -> None:
    """Do nothing at Ctrl-C: it reaches the parent too, who answers for the ranks."""
    # A handler that does nothing, because an ignored signal would stay ignored in what
    # fn starts.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def settle_in(size: int) -> None:
    """Make this process a good neighbour of `size` - 1 others on one machine."""
    there = {interface for _, interface in socket.if_nameindex()}
    # The loopback interface, on Linux and elsewhere.
    for name in there & {"lo", "lo0"}:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = name
    # A batch system may let this process use fewer cores than there are.
    affinity = getattr(os, "sched_getaffinity", None)
    cores = os.cpu_count() or 1
    if affinity is not None:
        cores = len(affinity(0))
    torch.set_num_threads(max(1, min(torch.get_num_threads(), cores // size)))
    # glibc maps blocks over 32 MiB afresh each time, and the page faults cost more than
    # a message of that size. Other C libraries have no mallopt.
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
        libc.mallopt(-3, 1 << 30)
        libc.mallopt(-1, 1 << 30)


def topology_of(rank: int, size: int, port: int) -> Topology:
    """Return the topology of a rank whose parent serves the store at `port`.

    Device and backend are as `Topology.detect` chooses them.
    """
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": _LOOPBACK,
        "MASTER_PORT": str(port),
    }
    return evolve(Topology.detect(variables), launcher="launch")


def _perform(task: Task, topology: Topology) -> Outcome:
    try:
        world.launch_as(topology)
        mesh = make_mesh(task.axis_sizes, topology=topology, timeout=task.timeout)
        with set_mesh(mesh):
            fn, args = unpack(task.packed)
            world.processes().runs += 1
            result = fn(*args)
            # Others may wait for a rank that has returned without any call. For them it
            # comes to the world after all.
            if task.last and not dist.is_initialized():
                connect.connect(topology, world.deadline(task.timeout))
            tell_return()
            return Returned(pack_result(result))
    except BaseException as error:
        return Raised.of(error)


class Ranks:
    """Local processes that stay, one per rank, and all run one function after another.

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
        # Not a daemon: fn may start processes of its own (a DataLoader's).
        process = context.Process(
            target=_serve,
            args=(rank, self.size, port, theirs),
            name=f"{_STARTING} {rank}",
        )
        try:
            process.start()
            self._processes.append(process)
        finally:
            # Or the pipe would not tell of the rank's death.
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
                        f"{script} calls launch without a guard, and the ranks, "
                        "which import it, would start ranks in their turn",
                        "Put the call under a guard:\n\n"
                        '    if __name__ == "__main__":\n'
                        "        pmod.launch(...)",
                    )
                )
            where = f", importing {script}" if main_is_imported() else ""
            raise PmodError(
                phrase(
                    "launch",
                    f"rank {rank} of {self.size} {outcome} "
                    f"while it was starting{where}",
                    outcome.advice,
                )
            )

    def run(self, task: Task, timeout: float | None = None) -> list[object]:
        """Return the outcome of the task on every rank, in rank order.

        Raises: where one failed, or the seconds have passed.
        """
        if not self._processes:
            raise PmodError(
                phrase("launch", "these ranks have ended", "Start new ones.")
            )
        deadline = math.inf
        if timeout is not None:
            deadline = time.monotonic() + timeout
        try:
            message = pickle.dumps(task)
            for pipe in self._pipes:
                # One that died between two tasks is found out by `_gather`.
                with contextlib.suppress(OSError):
                    pipe.send_bytes(message)
            outcomes = self._gather(deadline)
            self._check_finished(outcomes, task.axis_sizes, timeout)
            return [self._load(rank, outcomes[rank]) for rank in range(self.size)]
        except BaseException:
            self.close(patience=0)
            raise

    def _gather(self, deadline: float) -> dict[int, Outcome]:
        """Return one outcome per rank, in the order in which they came.

        Some are missing when one failed or time is up.
        """
        outcomes: dict[int, Outcome] = {}
        while len(outcomes) < self.size and time.monotonic() < deadline:
            left = [rank for rank in range(self.size) if rank not in outcomes]
            pipes = [self._pipes[rank] for rank in left]
            ends = [self._processes[rank].sentinel for rank in left]
            # Neither pipe nor sentinel tells of a death while a child of the rank holds
            # them: ask once a second, too.
            wait([*pipes, *ends], min(1.0, deadline - time.monotonic()))
            for rank in left:
                outcome = self._outcome(rank)
                if outcome is not None:
                    outcomes[rank] = outcome
                if isinstance(outcome, (Raised, Died)):
                    deadline = min(deadline, time.monotonic() + _GRACE)
        return outcomes

    def _outcome(self, rank: int) -> Outcome | None:
        process, pipe = self._processes[rank], self._pipes[rank]
        # First, because what a rank wrote before it died is in the pipe by then.
        exitcode = process.exitcode
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
        """Raise what the ranks have failed with, if they have."""
        failed: dict[int, Raised | Died] = {}
        for rank, outcome in outcomes.items():
            if not isinstance(outcome, Returned):
                failed[rank] = outcome
        if failed:
            raise self._failure(failed, axis_sizes)
        late = [rank for rank in range(self.size) if rank not in outcomes]
        if late:
            who = ", ".join([_named(rank, axis_sizes) for rank in late])
            given = f"no answer within {timeout} s from {who}"
            raise CollectiveTimeout(phrase("launch", given))

    def _failure(
        self, failed: Mapping[int, Raised | Died], axis_sizes: Mapping[str, int]
    ) -> Exception:
        """Return the error of the failure that explains the others, which it notes."""
        # A death explains the exceptions that it causes, else it is the first one.
        died = [rank for rank, outcome in failed.items() if isinstance(outcome, Died)]
        first = [*died, *failed][0]
        error = self._error_of(first, failed[first], axis_sizes)
        for rank, outcome in failed.items():
            if rank != first:
                error.add_note(f"also {_named(rank, axis_sizes)}: {outcome}")
        return error

    def _error_of(
        self, rank: int, outcome: Raised | Died, axis_sizes: Mapping[str, int]
    ) -> Exception:
        # the mesh of the rank is not here to be asked
        coords = named_coords_at(rank, axis_sizes)
        who = f"rank {rank} of {self.size}"
        if isinstance(outcome, Died):
            given, right = f"{who} {outcome}", outcome.advice
            return PmodError(phrase("launch", given, right, coords=coords))
        error = outcome.error()
        if error is None:
            given, text = f"{who} raised {outcome}", f"\n{outcome.text}"
            return PmodError(phrase("launch", given, text, coords=coords))
        error.add_note(f"pmod.launch at {coordinates(coords)}: {who} raised this.\n")
        error.add_note(outcome.text)
        return error

    def _load(self, rank: int, outcome: Outcome) -> object:
        assert isinstance(outcome, Returned)
        try:
            return pickle.loads(outcome.packed)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise PmodError(
                phrase(
                    "launch",
                    f"what rank {rank} returned cannot be loaded here: {reason}",
                    "Return tensors, numbers, or containers of them.",
                )
            ) from error

    def close(self, patience: float = 5.0) -> None:
        """Let the ranks leave, and end those still there after `patience` seconds."""
        # A rank that waits for a task leaves when its pipe is closed.
        for pipe in self._pipes:
            pipe.close()
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


def _named(rank: int, axis_sizes: Mapping[str, int]) -> str:
    return f"rank {rank} {coordinates(named_coords_at(rank, axis_sizes))}"


@contextlib.contextmanager
def _spawning() -> Generator[None]:
    """Hold back Ctrl-C and a session's `__main__` while processes start.

    So no rank meets Ctrl-C unprepared.
    """
    main = sys.modules["__main__"]
    hidden: dict[str, object] = {}
    is_session = getattr(main, "__spec__", None) is None and not main_is_imported()
    # multiprocessing would run <stdin>.
    if is_session and hasattr(main, "__file__"):
        hidden["__file__"] = main.__dict__.pop("__file__")
    mask = None
    if hasattr(signal, "pthread_sigmask"):
        # It would be started with the first rank, and unblocks signals.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        main.__dict__.update(hidden)
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
