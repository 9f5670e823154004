"""The command line of the job, parsed into one value, and whether it fits together."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import torch

from pmod.demo.options import (
    check_folder,
    check_rules,
    number,
    on_this_machine,
    parser_of_job,
    rule_of_batches,
    usual_ranks,
)

AXES = ("data", "graph")

_EXAMPLES = """\
examples:
  python -m pmod.demo graph                         one rank a core (or GPU), at most 4; a minute on 2 cores
  python -m pmod.demo graph --mesh data=2,graph=2   4 ranks: the batch in 2 parts, the nodes in 2
  python -m pmod.demo graph --float64 --steps 20    loss and gradients equal those of one process to 1e-10
  python -m pmod.demo graph --mesh-file bunny.obj   a mesh of your own, flat or curved
  torchrun --nproc-per-node 4 -m pmod.demo graph --mesh data=2,graph=2
  mpirun -n 2 python -m pmod.demo graph

The exit status is 1 where loss or gradients differ from one process by more than the bounds that it prints, and 2 where
the command line cannot be followed.
"""


@attrs.frozen
class Options:
    """What to train, on which mesh of triangles, over which mesh of ranks."""

    mesh: Mapping[str, int] | None = None
    mesh_file: Path | None = None
    nodes: int = 2500
    train: int = 64
    test: int = 16
    channels: int = 24
    rounds: int = 6
    batch: int = 4
    epochs: int = 12
    steps: int | None = None
    float64: bool = False
    seed: int = 0
    serial: bool = True
    output: Path = Path("pmod-demo-graph.png")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.float64 else torch.float32

    def steps_on(self, problems: int) -> int:
        """Return how many steps to take on so many problems."""
        return self.steps or self.epochs * (problems // self.batch)


def parse(arguments: Sequence[str]) -> Options:
    """Return the options of the command line.

    Leaves with status 2 and a message if it is wrong.
    """
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    if "mesh_file" in given and "nodes" in given:
        parser.error(
            "--nodes is for the mesh that the demo makes itself; the nodes of --mesh-file are what they are"
        )
    options = Options(**given)
    check_folder(options.output, parser)
    return options


def _parser() -> argparse.ArgumentParser:
    usual = Options()
    parser = parser_of_job(
        "python -m pmod.demo graph",
        "Train a message-passing network to solve steady diffusion on an unstructured triangle mesh, over\n"
        "a mesh of ranks data x graph: the nodes are spread over graph, the problems over data. Loss and gradients\n"
        "are compared with one process that holds the whole mesh. Without a launcher it starts its own ranks.",
        _EXAMPLES,
        AXES,
        usual.output,
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--mesh-file",
        type=Path,
        metavar="FILE",
        help="a mesh: .obj, .ply, .stl, .glb, .vtk, .msh, ...",
    )
    number(
        data, "--nodes", f"of the mesh that is made, about ({usual.nodes})", least=50
    )
    number(data, "--train", f"problems to train on ({usual.train})")
    number(data, "--test", f"problems to test on ({usual.test})")
    model = parser.add_argument_group("model and training")
    number(model, "--channels", f"channels at each node ({usual.channels})")
    number(model, "--rounds", f"rounds of message passing ({usual.rounds})")
    number(model, "--batch", f"problems in a step, over all ranks ({usual.batch})")
    length = model.add_mutually_exclusive_group()
    number(length, "--epochs", f"times to see all problems ({usual.epochs})")
    number(length, "--steps", "steps to take, instead")
    number(
        model,
        "--seed",
        f"of the mesh, the problems, the weights and the batches ({usual.seed})",
        least=0,
    )
    model.add_argument(
        "--float64",
        action="store_true",
        help="compute in float64; loss and gradients agree to 1e-10",
    )
    model.add_argument(
        "--no-serial",
        dest="serial",
        action="store_false",
        help="do not compare with one process",
    )
    return parser


def local_sizes(options: Options) -> dict[str, int]:
    """Return the axis sizes on this machine, by default all ranks on graph."""
    return on_this_machine(options.mesh or {"data": 1, "graph": usual_ranks()})


def check_fit(options: Options, sizes: Mapping[str, int]) -> None:
    """Raise PmodError if the problems and the mesh of ranks do not fit."""
    batch, train = options.batch, options.train
    check_rules(
        [
            (
                batch <= train,
                f"a batch of {batch} is more than {train} problems",
                f"Pass --batch {train} or less.",
            ),
            rule_of_batches(batch, sizes["data"]),
        ]
    )
