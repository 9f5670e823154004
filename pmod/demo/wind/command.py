"""`python -m pmod.demo wind`: parse, differentiate on the ranks, compare, draw."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import attrs
from torch import Tensor

from pmod._console import check_extra, paint, say
from pmod._errors import PmodError, phrase
from pmod.demo import ranks
from pmod.demo.compare import Check, report
from pmod.demo.picture import check_output
from pmod.demo.wind import compare, files, parallel, picture
from pmod.demo.wind.options import Options, local_sizes, parse
from pmod.demo.wind.winds import Winds, solid_body, solid_body_vorticity


@attrs.frozen(eq=False)
class Job:
    """The winds, where they come from, and their vorticity and divergence if known."""

    winds: Winds
    source: str
    published: tuple[Tensor, Tensor] | None = None
    known: Tensor | None = None


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status.

    It is 0, or 1 if a bound is violated, or 2 if it cannot be run as asked.
    """
    options = parse(arguments)
    try:
        check_extra("matplotlib", "tqdm")
        check_output(options.output)
        job = gather(options)
        mesh = ranks.launched(options.mesh or {"lat": 1, "lon": -1})
    except PmodError as error:
        print(error, file=sys.stderr)
        return 2
    sizes = local_sizes(options) if mesh is None else mesh.shape
    outcome = ranks.run(mesh, sizes, parallel.differentiate, job.winds)
    return 0 if outcome is None else conclude(outcome, job, options)


def gather(options: Options) -> Job:
    """Make the winds, or read them.

    Raises: PmodError for files that do not fit.
    """
    if options.u is None or options.v is None:
        made = (options.rows, options.columns, options.tilt)
        axis = f"an axis {options.tilt:g} degrees from the poles'"
        source = f"a solid body that turns about {axis}"
        return Job(solid_body(*made), source, known=solid_body_vorticity(*made))
    winds = files.read(options.u, options.v)
    source = f"from {options.u.name} and {options.v.name}"
    if options.vorticity is None or options.divergence is None:
        return Job(winds, source)
    fields = files.field(options.vorticity), files.field(options.divergence)
    files.check_like(winds.u, fields[0], options.vorticity)
    files.check_like(winds.u, fields[1], options.divergence)
    rows, columns = winds.grid
    # every second row must have both poles, and every second column go once round
    if not rows % 2 or columns % 2:
        given = (
            f"the error of differences on {rows} x {columns} points "
            "cannot be estimated from every second one"
        )
        right = "Pass an odd number of rows and an even one of columns."
        raise PmodError(phrase("demo", given, right))
    return Job(winds, source, published=fields)


def conclude(outcome: parallel.Outcome, job: Job, options: Options) -> int:
    """Say what was done and sent, compare, draw; return the exit status."""
    times, rows, columns = job.winds.u.shape
    say(f"winds   {job.source}")
    say(f"grid    {rows} x {columns} points, {times} time{'s' * (times > 1)}")
    sent = f"{max(outcome.sent) / 1e3:.1f} kB"
    held = f"{max(outcome.held) / 1e3:.1f} kB"
    say(f"halos   a rank sent at most {sent}, and holds at most {held} of winds\n")
    with ranks.threads(outcome.threads):
        checks: list[Check] = [compare.with_one_process(outcome, job.winds)]
        if job.known is not None:
            checks += compare.with_known(outcome, job.known)
        if job.published is not None:
            checks += compare.with_published(outcome, job.winds, job.published)
    status = report(checks)
    beside = job.known if job.published is None else job.published[0]
    picture.draw(options.output, outcome, job.winds, beside)
    largest = paint(f"{outcome.vorticity.abs().max().item():.2e}", "bold")
    say(f"largest vorticity {largest} per second; picture: {options.output}")
    return status
