"""A line on the terminal that says what is measured: on stderr, and nowhere else."""

from __future__ import annotations

import sys


def tell(text: str) -> None:
    """Show the text in place of the last one; "" takes it away."""
    if sys.stderr.isatty():
        # the sequence clears what a longer text has left
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def be_quiet(text: str) -> None:
    """Show nothing: all ranks but the first do."""
