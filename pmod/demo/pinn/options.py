"""The command line of the job, parsed into one value."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import torch

from pmod.demo.options import check_folder, number, on_this_machine, parser_of_job

AXES = ("data", "model")
# so many steps are compared with one process at a time: rounding grows with each step
TRIAL = 10

_EXAMPLES = """\
examples:
  python -m pmod.demo pinn                          4 ranks: the points in 2 parts, the layers in 2; about a minute
  python -m pmod.demo pinn --mesh model=2           2 ranks: the layers in 2
  python -m pmod.demo pinn --warm-up 9 --steps 20   a few seconds, too few to be near the solution
  torchrun --nproc-per-node 4 -m pmod.demo pinn --mesh data=2,model=2
  mpirun -n 2 python -m pmod.demo pinn

The exit status is 1 where the ranks differ from one process, or after the usual steps the solution from its formula, by
more than the bounds that it prints, and 2 where the command line cannot be followed.
"""


@attrs.frozen
class Options:
    """How large a network, on how many points, for how long, over which mesh."""

    mesh: Mapping[str, int] | None = None
    points: int = 1000
    width: int = 20
    pairs: int = 3
    warm_up: int = 200
    steps: int = 500
    seed: int = 0
    serial: bool = True
    output: Path = Path("pmod-demo-pinn.png")


def parse(arguments: Sequence[str]) -> Options:
    """Return the options of the command line.

    Leaves with status 2 and a message if it is wrong.
    """
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    options = Options(**given)
    check_folder(options.output, parser)
    return options


def _parser() -> argparse.ArgumentParser:
    usual = Options()
    parser = parser_of_job(
        "python -m pmod.demo pinn",
        "Solve Burgers' equation by a network that is trained to satisfy it, over a mesh of ranks data x model: the\n"
        "points where it is to hold are spread over data, each pair of layers over model. Steps are compared with one\n"
        "process, and the solution with the formula of Cole and Hopf. Without a launcher it starts its own ranks.",
        _EXAMPLES,
        AXES,
        usual.output,
    )
    model = parser.add_argument_group("model and training")
    number(model, "--points", f"where the equation is asked to hold ({usual.points})")
    number(model, "--width", f"units of each hidden layer ({usual.width})")
    number(model, "--pairs", f"pairs of layers ({usual.pairs})")
    number(model, "--warm-up", f"steps of Adam, before ({usual.warm_up})")
    number(model, "--steps", f"of L-BFGS ({usual.steps})")
    number(model, "--seed", f"of the points and the weights ({usual.seed})", least=0)
    model.add_argument(
        "--no-serial",
        dest="serial",
        action="store_false",
        help="do not compare with one process",
    )
    return parser


def local_sizes(options: Options) -> dict[str, int]:
    """Return the axis sizes of a mesh on this machine.

    The default is 2 x 2, and on 1 to 3 GPUs all ranks on model.
    """
    gpus = torch.cuda.device_count()
    return on_this_machine(
        options.mesh
        or ({"data": 1, "model": gpus} if 0 < gpus < 4 else {"data": 2, "model": 2})
    )
