"""`python -m pmod.demo`: train on the ranks, then in one process; compare and draw.

The other jobs have a word of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pmod._console import check_extra, paint, say
from pmod._errors import PmodError, near_miss, phrase
from pmod.demo import parallel, picture, ranks, serial
from pmod.demo.compare import compare, curve_bound, report
from pmod.demo.darcy import Fields, read
from pmod.demo.graph import command as graph
from pmod.demo.options import Options, check_fit, counts, local_sizes, parse
from pmod.demo.pinn import command as pinn
from pmod.demo.training import heading
from pmod.demo.wind import command as wind

JOBS = {"graph": graph.main, "wind": wind.main, "pinn": pinn.main}
"""The jobs that have a word of their own, and what runs each."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    It is 0, or 1 if a bound is violated, or 2 if it cannot be run as asked.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and not given[0].startswith("-"):
        return _other(given[0], given[1:])
    options = parse(given)
    try:
        check_extra("matplotlib", "tqdm")
        picture.check_output(options.output)
        published = _published(options)
        mesh = ranks.launched(options.mesh or {"data": 1, "space": -1})
        sizes = local_sizes(options) if mesh is None else mesh.shape
        shapes = _shapes(options, published)
        check_fit(options, *shapes, sizes)
        kept = parallel.checkpoints(options, *shapes)
        if kept is not None:
            # a folder that cannot be used is refused before the ranks start
            kept.last()
    except PmodError as error:
        print(error, file=sys.stderr)
        return 2
    outcome = ranks.run(mesh, sizes, parallel.train, options, published)
    return 0 if outcome is None else conclude(outcome, options)


def _other(job: str, arguments: Sequence[str]) -> int:
    """Run the job of that name."""
    if job in JOBS:
        return JOBS[job](arguments)
    given = f"no job {job!r}{near_miss(job, JOBS)}"
    right = f"Pass {', '.join(JOBS)}, or none for Darcy flow."
    print(phrase("demo", given, right), file=sys.stderr)
    return 2


def _published(options: Options) -> tuple[Fields, Fields] | None:
    if options.data is None or options.test_data is None:
        return None
    return read(options.data)[: options.train], read(options.test_data)[: options.test]


def _shapes(
    options: Options, published: tuple[Fields, Fields] | None
) -> tuple[Sequence[int], Sequence[int]]:
    """Return (number, height, width) of the problems to train and to test on."""
    if published is not None:
        return published[0].x.shape, published[1].x.shape
    train, test = counts(options)
    return (train, options.size, options.size), (test, options.size, options.size)


def conclude(outcome: parallel.Outcome, options: Options) -> int:
    """Train in this process alone, compare, draw; return the exit status."""
    other, checks = None, []
    if options.serial:
        threads = f"as many threads as a rank ({outcome.threads})"
        say(f"\nthe same in one process, with {threads}\n{heading()}")
        with ranks.threads(outcome.threads):
            other = serial.train(options, outcome.train, outcome.test, outcome.weights)
        checks = compare(outcome.run, other, options)
        say()
    status = report(checks)
    picture.draw(options.output, outcome, other, curve_bound(options))
    error = paint(f"{outcome.run.error:.2%}", "bold")
    beside = "" if other is None else f", in one process {other.error:.2%}"
    say(f"test error {error}{beside}; picture: {options.output}")
    return status


if __name__ == "__main__":
    sys.exit(main())
