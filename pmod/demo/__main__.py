"""`python -m pmod.demo`: parse, train on the ranks, train in one process, compare, draw."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch

import pmod
from pmod._errors import PmodError
from pmod.demo import parallel, picture, serial
from pmod.demo.compare import compare, curve_bound
from pmod.demo.console import check_extra, paint, say
from pmod.demo.darcy import Fields, read
from pmod.demo.options import Options, check_fit, counts, local_sizes, parse, shown
from pmod.demo.training import heading


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit status: 0, or 1 where a bound is violated, or 2 where it cannot be run as asked."""
    options = parse(arguments)
    try:
        check_extra()
        picture.check_output(options.output)
        published = _published(options)
        place = pmod.Topology.detect()
        mesh = None if place.launcher == "single" else pmod.make_mesh(options.mesh or {"data": 1, "space": -1})
        sizes = local_sizes(options) if mesh is None else mesh.shape
        check_fit(options, *_shapes(options, published), sizes)
    except PmodError as error:
        print(error, file=sys.stderr)
        return 2
    if place.rank == 0:
        ranks = math.prod(sizes.values())
        started = "started here" if mesh is None else f"started by {place.launcher}"
        say(f"mesh    {shown(sizes)}: {ranks} rank{'s' * (ranks > 1)}, {started}")
    if mesh is None:
        outcome = pmod.launch(parallel.train, options, published, **sizes)[0]
    else:
        # under mpirun each rank would start a thread per core of the node, and they would wait for one another
        with pmod.set_mesh(mesh), _threads((os.cpu_count() or 1) // place.local_world_size):
            outcome = parallel.train(options, published)
    return 0 if outcome is None else conclude(outcome, options)


@contextmanager
def _threads(most: int) -> Generator[None]:
    """Compute with no more threads than that."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, most)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _published(options: Options) -> tuple[Fields, Fields] | None:
    if options.data is None or options.test_data is None:
        return None
    return read(options.data)[: options.train], read(options.test_data)[: options.test]


def _shapes(options: Options, published: tuple[Fields, Fields] | None) -> tuple[Sequence[int], Sequence[int]]:
    """(number, height, width) of the problems to train and to test on."""
    if published is not None:
        return published[0].x.shape, published[1].x.shape
    train, test = counts(options)
    return (train, options.size, options.size), (test, options.size, options.size)


def conclude(outcome: parallel.Outcome, options: Options) -> int:
    """Train in this process alone, compare, draw; the exit status."""
    other, checks = None, []
    if options.serial:
        say(f"\nthe same in one process, with as many threads as a rank ({outcome.threads})\n{heading()}")
        with _threads(outcome.threads):
            other = serial.train(options, outcome.train, outcome.test, outcome.weights)
        checks = compare(outcome.run, other, options)
        say()
    for check in checks:
        say(str(check))
    picture.draw(options.output, outcome, other, curve_bound(options))
    ranks = paint(f"{outcome.run.error:.2%}", "bold")
    beside = "" if other is None else f", in one process {other.error:.2%}"
    say(f"test error {ranks}{beside}; picture: {options.output}")
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
