"""What the terminal shows: colours and progress bars, on a terminal only."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

from pmod._errors import PmodError, phrase

if TYPE_CHECKING:
    from tqdm import tqdm

    Bar: TypeAlias = tqdm[Any]

_COLOURS = {"bold": 1, "dim": 2, "red": 31, "green": 32}


def check_extra(*names: str, extra: str = "demo") -> None:
    """Raise PmodError, which names the extra, if packages of it are missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        right = f'Install the demo\'s extra: pip install "pmod[{extra}]"'
        raise PmodError(
            phrase("demo", f"{' and '.join(missing)} cannot be imported", right)
        )


def progress(*, total: int, what: str, unit: str, quiet: bool) -> Bar:
    """Return a progress bar on stderr, if that is a terminal.

    quiet: show none, for all ranks but one.
    """
    from tqdm import tqdm

    return tqdm(
        total=total, desc=what, unit=unit, leave=False, disable=True if quiet else None
    )


def paint(text: str, colour: str) -> str:
    """Return the text in a colour, on a terminal for which NO_COLOR is not set."""
    # both, because mpirun makes stdout look like a terminal wherever its own output
    # goes
    terminal = sys.stdout.isatty() and sys.stderr.isatty()
    if not terminal or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{_COLOURS[colour]}m{text}\033[0m"


def say(text: str = "") -> None:
    """Print a line above the progress bar, immediately even if stdout is a pipe."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()
