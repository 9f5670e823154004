"""`simulate`: the ranks are threads of one process, and the wire is memory.

Only one rank runs at a time: it keeps the baton until it must wait for another, then
the next rank that can go on gets it. So a simulation is deterministic, a debugger shows
one rank, and when nobody can go on it is a deadlock, seen at once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.autograd.forward_ad as forward_ad

from pmod._core.arguments import check_function
from pmod._core.watch import watchers
from pmod._errors import AxisError, PmodError, phrase, quoted
from pmod._mesh.ambient import set_mesh
from pmod._mesh.make import make_mesh
from pmod._mesh.sizes import check_axis_sizes
from pmod._ranks import world
from pmod._torch import are_transforms_active, forward_level, swap_forward_nesting
from pmod._wire.memory import Left, Simulation, Threads

T = TypeVar("T")


@contextmanager
def _forward_mode_held_open() -> Generator[None]:
    """Hold one forward-mode level open, because torch counts them per process.

    Threads that entered and left them would break each other; while one level is held
    open, each thread's functorch levels are its own, and torch.func.jvp is right on all
    of them.
    """
    with forward_ad.dual_level():
        nesting = swap_forward_nesting(1)
        try:
            yield
        finally:
            swap_forward_nesting(nesting)


def _close_forward_mode() -> None:
    """Close what the threads of a simulation hold open, which are not in a child."""
    while forward_level() >= 0:
        forward_ad.exit_dual_level()
    swap_forward_nesting(0)


def simulate(fn: Callable[..., T], *args: object, **axis_sizes: int) -> list[T]:
    """Run fn(*args) on every rank of a mesh in this process: the results in rank order.

    The ranks are threads and the wire is memory: real values and all derivatives,
    without a launcher. Eager code on cpu tensors only; torch.func.jvp works,
    torch.autograd.forward_ad does not. One rank runs at a time, so the same program
    gives the same bits each time. Each rank has a random state of torch's of its own,
    which starts as the caller's, and the caller's is as before afterwards; those of
    Python and numpy are shared.

    Raises: what a rank raises, with a note that says which; MismatchError where ranks
    wait for each other, or for a rank that left, with the line where each waits;
    AxisError for sizes that make no mesh, and for a timeout, which only `launch` has.

    >>> pmod.simulate(lambda x: x * pmod.axis_index("model"), 10, model=3)
    [0, 10, 20]
    """
    _refuse_timeout(axis_sizes)
    axis_sizes = check_axis_sizes(
        axis_sizes, "simulate", "simulate(fn, data=2, model=2)"
    )
    check_function(fn, "simulate")
    if not world.current().by_processes:
        raise PmodError(
            phrase(
                "simulate", "this is a simulated rank already", "Call it from outside."
            )
        )
    if torch.compiler.is_compiling():
        raise PmodError(
            phrase(
                "simulate",
                "it is called in compiled code",
                "Simulate the eager function.",
            )
        )
    simulation = Simulation(math.prod(axis_sizes.values()))
    threads = Threads(world.processes(), simulation)
    with world.instead_of_processes(threads, _close_forward_mode):
        # Asked only here, because another simulation held a level open until now.
        if forward_level() >= 0 or are_transforms_active():
            raise PmodError(
                phrase(
                    "simulate",
                    "it is called inside a transform, which its threads do not see",
                    "Differentiate inside the simulated function, "
                    "as the ranks of a real mesh would.",
                )
            )
        with _forward_mode_held_open():
            return _run(fn, args, axis_sizes, simulation, threads)


def _refuse_timeout(axis_sizes: Mapping[str, object]) -> None:
    """Raise if a deadline is given, as for `launch`: it would be taken for an axis."""
    if "timeout" not in axis_sizes:
        return
    given = f"timeout={quoted(axis_sizes['timeout'])} is not an axis"
    right = "A simulation needs no deadline: it sees at once when no rank can go on."
    raise AxisError(phrase("simulate", given, right))


def _run(
    fn: Callable[..., T],
    args: tuple[object, ...],
    axis_sizes: Mapping[str, int],
    simulation: Simulation,
    ranks: Threads,
) -> list[T]:
    size = simulation.size
    results: dict[int, T] = {}
    grad, watching, drawn = torch.is_grad_enabled(), watchers(), torch.get_rng_state()

    def rank_main(rank: int) -> None:
        simulation.take_turn(rank)
        # torch's generator is the process's, and the ranks before have drawn from it.
        torch.set_rng_state(drawn)
        error: BaseException | None = None
        try:
            # A rank that failed before this one began has ended the simulation.
            if simulation.error is not None:
                raise Left
            # torch keeps it per thread.
            with torch.set_grad_enabled(grad):
                place = ranks.settle(rank, watching)
                mesh = make_mesh(dict(axis_sizes), topology=place)
                simulation.coords[rank] = mesh.coords
                set_mesh(mesh)
                results[rank] = fn(*args)
        except Left:
            pass
        except BaseException as raised:
            error = raised
        simulation.leave(rank, error)

    threads: list[threading.Thread] = []
    for rank in range(size):
        thread = threading.Thread(target=rank_main, args=(rank,), daemon=True)
        try:
            thread.start()
        # The system has no more.
        except RuntimeError:
            simulation.stop_before(rank)
            break
        threads.append(thread)
    simulation.begin()
    simulation.over.acquire()
    for thread in threads:
        thread.join()
    torch.set_rng_state(drawn)
    if simulation.error is not None:
        raise simulation.error
    return [results[rank] for rank in range(size)]
