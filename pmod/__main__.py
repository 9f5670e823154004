"""`python -m pmod`: the list of commands, of which each can follow as a word."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence

from pmod._errors import near_miss

COMMANDS = {
    "demo": "train a Fourier neural operator over a mesh; "
    "with the words graph, wind and pinn other jobs",
    "bench": "measure what pmod costs beside the raw calls of torch.distributed",
    "collectives": "print the table of collectives: "
    "what each takes and gives, its value and its derivative",
    "doctor": "say what is detected here, and whether the ranks reach one another; "
    "for bug reports",
}
_LINES = [f"python -m pmod.{name:<11} {what}\n" for name, what in COMMANDS.items()]
_LIST = "".join(_LINES)
_EXAMPLES = """examples:
  python -m pmod.demo --mesh data=2,space=2
  python -m pmod.bench --only latency --ranks 4
  torchrun --standalone --nproc-per-node 4 -m pmod.doctor
  python -m pmod demo --help                         each has a --help of its own, with more examples
"""


def main(arguments: Sequence[str]) -> None:
    """Run the command that comes first, with what is left; with none, print the list."""
    # before any parsing: --help behind a command is that command's
    if arguments and arguments[0] in COMMANDS:
        sys.argv[1:] = arguments[1:]
        runpy.run_module(f"pmod.{arguments[0]}", run_name="__main__", alter_sys=True)
        return
    parser = argparse.ArgumentParser(
        prog="python -m pmod",
        description=_LIST,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    given, more = parser.parse_known_args(arguments)
    if given.command is not None:
        miss = near_miss(given.command, COMMANDS)
        parser.error(f"no command {given.command!r} among {', '.join(COMMANDS)}{miss}")
    if more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    print(_LIST, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
