"""`python -m pmod.collectives`: the table of collectives and their derivatives."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from pmod._core.collective import COLLECTIVES, Collective
from pmod._errors import near_miss

_TITLES = ("function", "signature", "value on each rank", "derivative")
# of `_collectives/`, in the order in which they are read
_FILES = ("values", "scans", "slices", "permutes", "ragged", "indexed", "halo")

_EXAMPLES = """examples:
  python -m pmod.collectives                      the whole table
  python -m pmod.collectives psum pvary           some of its rows
  python -m pmod.collectives --rst                as the README has it
  python -m pmod collectives all_to_all --rst     a row of that
"""


def _place(of: Collective) -> tuple[int, int]:
    """Return where it stands in the table: by its kinds, then by its file."""
    kinds = ("V -> I", "I -> V", "V -> V").index(of.kinds)
    file = of.function.__module__.rpartition(".")[2]
    # what a file declares that is not in the list comes last, and is not left out
    return kinds, _FILES.index(file) if file in _FILES else len(_FILES)


def in_order() -> list[Collective]:
    """Return all collectives in the order of the table."""
    return sorted(COLLECTIVES.values(), key=_place)


def _row(of: Collective) -> tuple[str, str, str, str]:
    return of.signature, of.kinds, of.value, of.derivative


def as_text(collectives: Sequence[Collective]) -> str:
    """Return a table for the terminal.

    >>> from pmod.collectives import COLLECTIVES, as_text
    >>> print(as_text([COLLECTIVES["psum"]]))
    function                             signature  value on each rank     derivative
    psum(x, axis, *, reduce_dtype=None)  V -> I     the sum over the axis  pvary
    """
    rows = [_TITLES, *map(_row, collectives)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for row in rows:
        lines.append("  ".join(map(str.ljust, row, widths)).rstrip())
    return "\n".join(lines)


def as_rst(collectives: Sequence[Collective]) -> str:
    """Return the list-table of the README."""
    rows: list[tuple[str, str, str, str]] = [_TITLES]
    for function, kinds, value, derivative in map(_row, collectives):
        # a name in single backquotes would be a reference in reStructuredText
        value = value.replace("`", "``")
        rows.append((f"``{function}``", kinds, value, _linked(derivative)))
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for first, *others in rows:
        lines.append(f"   * - {first}")
        lines += [f"     - {cell}" for cell in others]
    return "\n".join(lines)


def _linked(derivative: str) -> str:
    """Return the words of a derivative, with the names of collectives as code."""

    def as_code(word: re.Match[str]) -> str:
        return f"``{word[0]}``" if word[0] in COLLECTIVES else word[0]

    return re.sub(r"\w+", as_code, derivative)


def main(arguments: Sequence[str]) -> None:
    """Print the table, or the rows that are named."""
    parser = argparse.ArgumentParser(
        prog="python -m pmod.collectives",
        description="Print what each collective takes and gives "
        "(V varying, I invariant), its value, its derivative.",
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
    # in the table's order, not in the one they are named in
    names = options.names or COLLECTIVES
    shown = [of for of in in_order() if of.name in names]
    print(as_rst(shown) if options.rst else as_text(shown))


if __name__ == "__main__":
    main(sys.argv[1:])
