"""The command line, parsed into one value, and whether it fits together."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import attrs
import torch

from pmod._errors import PmodError, near_miss, phrase
from pmod._mesh.sizes import parse_sizes

AXES = ("data", "space")
LEARNING_RATE = 8e-3

_EXAMPLES = """\
examples:
  python -m pmod.demo                               one rank a core (or GPU), at most 4; 2 to 3 minutes on 2 cores
  python -m pmod.demo --mesh data=2,space=2         4 ranks: the batch in 2 parts, each field in 2
  python -m pmod.demo --float64 --steps 100         the two loss curves agree to rounding
  python -m pmod.demo --data darcy_train_16.pt --test-data darcy_test_16.pt
  torchrun --nproc-per-node 4 -m pmod.demo --mesh data=2,space=2
  mpirun -n 2 python -m pmod.demo
  torchrun --standalone --max-restarts 3 --nproc-per-node 2 -m pmod.demo --checkpoint kept
  python -m pmod.demo graph --help                  another job: message passing on an unstructured mesh
  python -m pmod.demo wind --help                   another: vorticity of winds around the globe, by halos
  python -m pmod.demo pinn --help                   another: Burgers' equation by a network that knows it

The exit status is 1 where the two trainings differ by more than the bounds that it prints, and 2 where the command
line cannot be followed.
"""

Arguments: TypeAlias = "argparse._ArgumentGroup"
"""A group of options; argparse has no public name for it."""


@attrs.frozen
class Options:
    """What to train, on what, over which mesh; None is worked out later.

    An epoch sees each problem and its mirror image.
    """

    mesh: Mapping[str, int] | None = None
    data: Path | None = None
    test_data: Path | None = None
    size: int = 32
    train: int | None = None
    test: int | None = None
    channels: int = 24
    modes: int = 6
    layers: int = 4
    batch: int = 50
    epochs: int = 8
    steps: int | None = None
    float64: bool = False
    seed: int = 0
    serial: bool = True
    output: Path = Path("pmod-demo-darcy.png")
    checkpoint: Path | None = None
    every: int = 50

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.float64 else torch.float32

    def steps_on(self, problems: int) -> int:
        """Return how many steps to take on so many problems."""
        return self.steps or self.epochs * (problems // self.batch)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Return the options of the command line.

    Leaves with status 2 and a message if it is wrong.
    """
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    if ("data" in given) != ("test_data" in given):
        parser.error(
            "--data and --test-data go together: one file to train on, one to test on"
        )
    if "data" in given and "size" in given:
        parser.error(
            "--size is for problems that the demo makes itself; the grid of --data is what it is"
        )
    if "every" in given and "checkpoint" not in given:
        parser.error("--every goes with --checkpoint: nothing is kept without a folder")
    options = Options(**given)
    check_folder(options.output, parser)
    return options


def check_folder(output: Path, parser: argparse.ArgumentParser) -> None:
    """Leave with a message if the picture cannot be written."""
    if not output.absolute().parent.is_dir():
        parser.error(
            f"--output {output}: there is no folder {output.absolute().parent}"
        )


def _parser() -> argparse.ArgumentParser:
    usual = Options()
    parser = parser_of_job(
        "python -m pmod.demo",
        "Train a Fourier neural operator for 2-D Darcy flow over a mesh data x space, then the same model\n"
        "in one process, and compare. Without a launcher it starts its own ranks on this machine.\n\n"
        "Other jobs, each with its --help:\n"
        "  graph  a message-passing network on an unstructured triangle mesh\n"
        "  wind   vorticity and divergence of winds around the globe, by halos\n"
        "  pinn   Burgers' equation by a network that knows it, data- and tensor-parallel",
        _EXAMPLES,
        AXES,
        usual.output,
    )
    _add_data(parser.add_argument_group("data"), usual)
    _add_training(parser.add_argument_group("model and training"), usual)
    kept = parser.add_argument_group("checkpoints")
    kept.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FOLDER",
        help="go on from the last checkpoint there, if any, and keep new ones; all ranks must see the folder",
    )
    number(kept, "--every", f"steps from one to the next ({usual.every})")
    return parser


def _add_data(data: Arguments, usual: Options) -> None:
    data.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="train on a file in the format of darcy_train_16.pt",
    )
    data.add_argument(
        "--test-data", type=Path, metavar="FILE", help="test on such a file"
    )
    number(
        data,
        "--size",
        f"cells along a side of the problems that are made ({usual.size})",
        least=2,
    )
    number(
        data, "--train", f"problems to train on ({_MADE['train']}, or all of --data)"
    )
    number(
        data, "--test", f"problems to test on ({_MADE['test']}, or all of --test-data)"
    )


def _add_training(model: Arguments, usual: Options) -> None:
    number(model, "--channels", f"channels of each field ({usual.channels})")
    number(
        model,
        "--modes",
        f"Fourier modes kept, of each sign, in each dimension ({usual.modes})",
    )
    number(model, "--layers", f"Fourier layers ({usual.layers})")
    number(model, "--batch", f"problems in a step, over all ranks ({usual.batch})")
    length = model.add_mutually_exclusive_group()
    number(
        length,
        "--epochs",
        f"times to see all problems and their mirror images ({usual.epochs})",
    )
    number(length, "--steps", "steps to take, instead")
    number(
        model,
        "--seed",
        f"of the problems, the weights and the batches ({usual.seed})",
        least=0,
    )
    model.add_argument(
        "--float64",
        action="store_true",
        help="compute in float64; the curves then agree to rounding",
    )
    model.add_argument(
        "--no-serial",
        dest="serial",
        action="store_false",
        help="do not train in one process to compare",
    )


_MADE = {"train": 1000, "test": 100}


def parser_of_job(
    command: str, what: str, examples: str, axes: tuple[str, str], output: Path
) -> argparse.ArgumentParser:
    """Return the parser of a job's command, with the options that say where.

    These are the mesh of ranks, and the picture.
    """
    # SUPPRESS leaves what is not given to the defaults of Options
    parser = argparse.ArgumentParser(
        prog=command,
        description=what,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    sizes = ",".join(f"{name}={name[0].upper()}" for name in axes)
    where = parser.add_argument_group("where")
    where.add_argument(
        "--mesh",
        type=axis_sizes(axes),
        metavar=sizes,
        help=f"the axes; by default all ranks on {axes[1]}",
    )
    where.add_argument(
        "--output", type=Path, metavar="FILE", help=f"the picture to write ({output})"
    )
    return parser


def number(group: Arguments, name: str, what: str, *, least: int = 1) -> None:
    """Add an option that is a whole number."""

    def parse_number(text: str) -> int:
        # argparse reports its ValueError, under the name of this function
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    parse_number.__name__ = "whole number"
    group.add_argument(name, type=parse_number, metavar="N", help=what)


def axis_sizes(axes: tuple[str, str]) -> Callable[[str], dict[str, int]]:
    """Return what parses ``data=2,space=2`` as sizes of both axes.

    An axis that is not named has size 1. One size may be -1, the rest.
    """
    example = ",".join(f"{name}=2" for name in axes)

    def parse(text: str) -> dict[str, int]:
        try:
            sizes = parse_sizes(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{error}: write {example}") from None
        for name, size in sizes.items():
            if name not in axes:
                raise argparse.ArgumentTypeError(
                    f"no axis {name!r}{near_miss(name, axes)}: write {example}"
                )
            if size != -1 and size < 1:
                raise argparse.ArgumentTypeError(
                    f"{name}={size} is not a size: write a whole number of 1 or more"
                )
        if list(sizes.values()) == [-1, -1]:
            raise argparse.ArgumentTypeError(
                "two sizes are -1: leave one to be worked out"
            )
        return {name: sizes.get(name, 1) for name in axes}

    return parse


def shown(axis_sizes: Mapping[str, int]) -> str:
    """Return ``data=2 x space=2``."""
    return " x ".join(f"{name}={size}" for name, size in axis_sizes.items())


def counts(options: Options) -> tuple[int, int]:
    """Return how many problems to make, to train and to test on."""
    return options.train or _MADE["train"], options.test or _MADE["test"]


def made_with(
    options: Options, train: Sequence[int], test: Sequence[int]
) -> dict[str, object]:
    """Return what two runs share if one can go on from where the other ended.

    train, test: the shapes (N, height, width) of the problems.
    """
    names = ("channels", "modes", "layers", "batch", "float64", "seed")
    data = "made" if options.data is None else options.data.name
    steps = options.steps_on(2 * train[0])
    shared = {name: getattr(options, name) for name in names}
    return {
        "data": data,
        "train": list(train),
        "test": list(test),
        "steps": steps,
        **shared,
    }


def local_sizes(options: Options) -> dict[str, int]:
    """Return the axis sizes on this machine, by default all ranks on space."""
    return on_this_machine(options.mesh or {"data": 1, "space": usual_ranks()})


def usual_ranks() -> int:
    """Return a rank per core or GPU, at most 4."""
    cores = os.cpu_count() or 1
    # only some systems can say which cores this process may use
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return min(torch.cuda.device_count() or cores, 4)


def on_this_machine(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes, with a -1 worked out for as many ranks as usual."""
    # the other size is 1 or more: there are two axes, and one -1 at most
    known = max(sizes.values())
    rest = max(usual_ranks() // known, 1)
    filled = dict(sizes)
    for name, size in sizes.items():
        if size == -1:
            filled[name] = rest
    return filled


def check_fit(
    options: Options,
    train: Sequence[int],
    test: Sequence[int],
    axis_sizes: Mapping[str, int],
) -> None:
    """Raise PmodError if the problems, the model and the mesh do not fit.

    train, test: the shapes (N, height, width) of the problems.
    """
    side = min(*train[1:], *test[1:])
    batch, modes = options.batch, options.modes
    rules = [
        (
            2 * modes <= side,
            f"{modes} modes of each sign need {2 * modes} cells along a side, and there are {side}",
            f"Pass --modes {max(side // 2, 1)} or less.",
        ),
        (
            batch <= 2 * train[0],
            f"a batch of {batch} is more than {train[0]} problems and their mirror images",
            f"Pass --batch {2 * train[0]} or less.",
        ),
        rule_of_batches(batch, axis_sizes["data"]),
    ]
    check_rules(rules)


def rule_of_batches(batch: int, data: int) -> tuple[bool, str, str]:
    """Return the rule by which the ranks of an axis can share a batch."""
    given = f"a batch of {batch} does not divide by data={data}"
    return batch % data == 0, given, f"Pass a --batch that is a multiple of {data}."


def check_rules(rules: Sequence[tuple[bool, str, str]]) -> None:
    """Raise PmodError for the first rule that does not hold.

    A rule is whether it holds, what was given, and what would be right.
    """
    for holds, given, right in rules:
        if not holds:
            raise PmodError(phrase("demo", given, right))
