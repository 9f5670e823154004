"""`python -m pmod.collectives`: the table of collectives, what each takes and gives,
and its derivative.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from pmod._core.collective import COLLECTIVES, Collective
from pmod._errors import near_miss

_TITLES = ("function", "signature", "value on each rank", "derivative")
_FILES = ("values", "scans", "slices", "permutes", "ragged", "indexed", "halo")
"""Of `_collectives/`, in the order in which they are read; what another file declares
comes last.
"""

_EXAMPLES = """examples:
  python -m pmod.collectives                      the whole table
  python -m pmod.collectives psum pvary           some of its rows
  python -m pmod.collectives --rst                as the README has it
  python -m pmod collectives all_to_all --rst     a row of that
"""


def _place(of: Collective) -> tuple[int, int]:
    """Where it stands: first what takes or gives one value; within that the files in
    their order.
    """
    file = of.function.__module__.rpartition(".")[2]
    kinds = ("V -> I", "I -> V", "V -> V").index(of.kinds)
    return kinds, _FILES.index(file) if file in _FILES else len(_FILES)


def in_order() -> list[Collective]:
    """All collectives, as the table lists them."""
    return sorted(COLLECTIVES.values(), key=_place)


def _row(of: Collective) -> tuple[str, str, str, str]:
    return of.signature, of.kinds, of.value, of.derivative


def as_text(collectives: Sequence[Collective]) -> str:
    """A table for the terminal.

    >>> from pmod.collectives import COLLECTIVES, as_text
    >>> print(as_text([COLLECTIVES["psum"]]))
    function                             signature  value on each rank     derivative
    psum(x, axis, *, reduce_dtype=None)  V -> I     the sum over the axis  pvary
    """
    rows = [_TITLES, *map(_row, collectives)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_TITLES))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def as_rst(collectives: Sequence[Collective]) -> str:
    """The list-table of the README."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for number, (function, kinds, value, derivative) in enumerate(
        [_TITLES, *map(_row, collectives)]
    ):
        cells = (function, kinds, value, derivative)
        if number:
            cells = (
                f"``{function}``",
                kinds,
                value.replace("`", "``"),
                _linked(derivative),
            )
        lines += [f"   * - {cells[0]}", *(f"     - {cell}" for cell in cells[1:])]
    return "\n".join(lines)


def _linked(derivative: str) -> str:
    """The words of a derivative, in which names of collectives are code."""
    return re.sub(
        r"\w+",
        lambda word: f"``{word[0]}``" if word[0] in COLLECTIVES else word[0],
        derivative,
    )


def main(arguments: Sequence[str]) -> None:
    """Print the table, or the rows that are named."""
    parser = argparse.ArgumentParser(
        prog="python -m pmod.collectives",
        description="Print what each collective takes and gives (V varying, I invariant), its value, its derivative.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help="only these; all of them by default")
    parser.add_argument(
        "--rst", action="store_true", help="print the table as the README has it"
    )
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in COLLECTIVES:
            parser.error(f"no collective {name!r}{near_miss(name, COLLECTIVES)}")
    shown = [of for of in in_order() if not options.names or of.name in options.names]
    print(as_rst(shown) if options.rst else as_text(shown))


if __name__ == "__main__":
    main(sys.argv[1:])
