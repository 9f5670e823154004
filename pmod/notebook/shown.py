"""What a cell shows: labels for sets of ranks, outputs folded where they are equal,
failures, the bar while it runs.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from html import escape
from time import monotonic
from typing import Any

from pmod._errors import coordinates
from pmod._site import HERE
from pmod.notebook.cells import Cell, Outcome, plain

_TAIL = 12  # lines of what a cell has printed, below the bar


class Places:
    """The coordinates of ranks, and short names for sets of them."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)
        self.size = math.prod(sizes.values())

    def coords(self, rank: int) -> dict[str, int]:
        """Axis name -> index."""
        found: dict[str, int] = {}
        for name in reversed(self.sizes):
            rank, found[name] = divmod(rank, self.sizes[name])
        return {name: found[name] for name in self.sizes}

    def select(self, chosen: Mapping[str, int]) -> list[int]:
        """The ranks that have these indices."""
        return [
            r
            for r in range(self.size)
            if all(self.coords(r)[name] == i for name, i in chosen.items())
        ]

    def label(self, ranks: Iterable[int]) -> str:
        """`all`; `model=0`, which is all of it along the other axes; `data=0..2,
        model=1`; else one by one.

        >>> Places({"data": 2, "model": 2}).label([1, 3])
        'model=1'
        """
        ranks = sorted(ranks)
        if len(ranks) == self.size:
            return "all"
        seen = {
            name: sorted({self.coords(rank)[name] for rank in ranks})
            for name in self.sizes
        }
        if math.prod(map(len, seen.values())) == len(ranks):  # a box
            return ", ".join(
                f"{n}={_run(i)}" for n, i in seen.items() if len(i) < self.sizes[n]
            )
        shown = [coordinates(self.coords(rank)) for rank in ranks[:6]]
        return " ".join(shown) + (
            f" and {len(ranks) - 6} more" if len(ranks) > 6 else ""
        )


def _run(indices: Sequence[int]) -> str:
    first, last = indices[0], indices[-1]
    if len(indices) > 2 and last - first == len(indices) - 1:
        return f"{first}..{last}"
    return ",".join(map(str, indices))


def fold(values: Mapping[int, Hashable]) -> dict[Hashable, list[int]]:
    """Equal values -> their ranks, in the order of the first of them."""
    folded: dict[Hashable, list[int]] = {}
    for rank, value in sorted(values.items()):
        folded.setdefault(value, []).append(rank)
    return folded


def prefixed(texts: Mapping[int, str], places: Places) -> str:
    """What the ranks have printed, each line behind its ranks; ranks that printed
    nothing are left out.
    """
    folded = {
        places.label(ranks): str(text) for text, ranks in fold(texts).items() if text
    }
    width = max(map(len, folded), default=0)
    lines = (
        (label, line)
        for label, text in folded.items()
        for line in text.removesuffix("\n").split("\n")
    )
    # of a line that was written over, as a progress bar's, the last state
    return "".join(
        f"{label:{width}} │ {line.rstrip(chr(13)).rpartition(chr(13))[2]}\n"
        for label, line in lines
    )


# --- what is left of a cell -----------------------------------------------------------


def show(outcomes: Mapping[int, Outcome], places: Places) -> None:
    """Print and display what the ranks did."""
    for stream in ("stdout", "stderr"):
        text = prefixed(
            {rank: getattr(outcome, stream) for rank, outcome in outcomes.items()},
            places,
        )
        if text:
            print(text, end="", file=getattr(sys, stream), flush=True)
    for number in range(max(len(outcome.shown) for outcome in outcomes.values())):
        at = {
            rank: outcome.shown[number]
            for rank, outcome in outcomes.items()
            if number < len(outcome.shown)
        }
        keys = fold({rank: _key(shown["data"]) for rank, shown in at.items()})
        for ranks in keys.values():
            _display(
                at[ranks[0]],
                ""
                if len(keys) == 1 and len(ranks) == len(outcomes)
                else places.label(ranks),
            )


def _key(data: Mapping[str, Any]) -> str:
    """What makes two outputs the same; addresses in memory do not count."""
    return re.sub(r"\bat 0x[0-9a-f]+", "at 0x", repr(sorted(data.items())))


def _display(shown: Mapping[str, Any], label: str) -> None:
    from IPython.display import display

    data = dict(shown["data"])
    only_text = set(data) <= {"text/plain"}
    if label and only_text:
        data["text/plain"] = (
            f"{label}: "
            + ("\n" if "\n" in data["text/plain"] else "")
            + data["text/plain"]
        )
    elif label:
        print(f"{label}:", flush=True)
    display(data, metadata=shown.get("metadata") or {}, raw=True)


# --- failures -------------------------------------------------------------------------


def report(cell: Cell, places: Places, seconds: float) -> str:
    """What went wrong, "" where nothing did: one traceback, who raised it, and where
    the others were.
    """
    outcomes = cell.outcomes
    if all(outcome.how == "done" for outcome in outcomes.values()):
        return ""
    own = {
        rank: outcome
        for rank, outcome in outcomes.items()
        if outcome.how == "raised" and not outcome.stopped
    }
    alike = list(
        fold({rank: _alike(outcome) for rank, outcome in own.items()}).values()
    )
    cause = _cause(alike, cell)
    blocks = [f"Interrupted after {seconds:.1f} s."] if cell.interrupted else []
    if cause:
        first = own[cause[0]]
        blocks.append(f"{_shortened(first)}\n\nraised {_where(cause, places)}")
    ranks_of = fold(
        {rank: _state(outcome) for rank, outcome in outcomes.items() if rank not in own}
    )
    rows = [f"{_where(ranks, places)}: {what}" for what, ranks in ranks_of.items()]
    rows += [
        f"{_where(ranks, places)}: {_state(own[ranks[0]])}"
        for ranks in alike
        if ranks != cause
    ]
    return "\n".join([*blocks, *rows, *_advice(cell)])


def _alike(outcome: Outcome) -> Hashable:
    """Errors of one kind at one place are one error, though their texts name different
    ranks.
    """
    failure = outcome.failure
    return (
        outcome.error.partition(":")[0],
        failure.lines if failure else plain(outcome.traceback),
    )


def _cause(alike: Sequence[list[int]], cell: Cell) -> list[int]:
    """The ranks whose traceback to show: those that raised first, and not because
    others did not come.
    """
    outcomes = cell.outcomes
    order = sorted(
        alike, key=lambda ranks: min(outcomes[rank].finished for rank in ranks)
    )
    ahead = [
        ranks
        for ranks in order
        if not outcomes[ranks[0]].error.startswith("CollectiveTimeout")
    ]
    if ahead:
        return ahead[0]
    elsewhere = any(outcome.how == "died" for outcome in outcomes.values())
    return [] if elsewhere or not order else order[0]


def _shortened(outcome: Outcome) -> str:
    """The traceback; where pmod raised on purpose, without the lines inside it."""
    if outcome.failure is None or not outcome.failure.ours:
        return outcome.traceback.rstrip()
    parts = outcome.traceback.rstrip().split("\n\n")
    kept = [part for part in parts[:-1] if not plain(part).startswith(f"File {HERE}")]
    left_out = len(parts) - 1 - len(kept)
    note = [f"({left_out} more inside pmod)"] if left_out else []
    return "\n\n".join([*kept, *note, parts[-1]])


def _advice(cell: Cell) -> list[str]:
    """What became of the ranks, and what comes next."""
    hows = {outcome.how for outcome in cell.outcomes.values()}
    lines: list[str] = []
    if not cell.interrupted and any(
        outcome.stopped for outcome in cell.outcomes.values()
    ):
        lines.append(
            "Who waited was stopped: a rank that has left the cell comes no more."
        )
    if "died" in hows:
        lines.append(
            "The next cell starts a new engine there, without variables: run the cells that set them again."
        )
    if "stuck" in hows:
        lines.append(
            "The next cell waits a little for it, and then starts a new engine there, without variables."
        )
    return lines


def _where(ranks: Sequence[int], places: Places) -> str:
    label = places.label(ranks)
    return (
        "on all ranks"
        if label == "all"
        else f"at {label}"
        if label.startswith("(")
        else f"at ({label})"
    )


def _state(outcome: Outcome) -> str:
    """What a rank that is not the cause did."""
    failure = outcome.failure
    if outcome.how == "raised" and failure is not None:
        if not outcome.stopped:
            return outcome.error.splitlines()[0] + (
                f" [{failure.at}]" if failure.at else ""
            )
        if failure.waited:
            return f"waited in {failure.waited}, {failure.at}"
        return f"was at {failure.at}" if failure.at else "was at no line of the cell"
    return {
        "done": "had finished the cell",
        "raised": "was stopped" if outcome.stopped else f"raised {outcome.error}",
        "unsent": "was stopped before it began",
        "died": outcome.death,
        "stuck": "has not stopped yet, in a call that is not Python's",
    }[outcome.how]


# --- while it runs --------------------------------------------------------------------


class Bar:
    """How many ranks are through, updated in place in a notebook; on a terminal one
    line; elsewhere nothing.
    """

    AFTER, EVERY = 0.5, 0.25  # seconds: what is over sooner needs no bar

    def __init__(self, shell: Any, what: str, size: int) -> None:
        self._what, self._size = what, size
        self._started = self._drawn = monotonic()
        self._handle: Any = None
        self._in_notebook = hasattr(shell, "kernel")
        self._on_terminal = not self._in_notebook and sys.stderr.isatty()

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return monotonic() - self._started

    def draw(self, done: int, more: Callable[[], str] = str) -> None:
        """Now `done` ranks are through; `more` is asked for what else is known only
        where it is drawn.
        """
        now = monotonic()
        if now - self._started < self.AFTER or now - self._drawn < self.EVERY:
            return
        self._drawn = now
        self._put(done, more())

    def _put(self, done: int, more: str) -> None:
        count = f"{self._what}: {done} of {self._size} ranks, {self.seconds:.1f} s"
        if self._in_notebook:
            self._update(
                f'<progress value="{done}" max="{self._size}"></progress> {escape(count)}'
                + (f'<pre style="margin: 4px 0">{escape(more)}</pre>' if more else ""),
                f"{_bricks(done, self._size)} {count}" + (f"\n{more}" if more else ""),
            )
        elif self._on_terminal:
            width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
            line = f"{_bricks(done, self._size)} {count}  {more.splitlines()[0] if more else ''}"[
                :width
            ]
            print(f"\r{line:{width}}", end="", file=sys.stderr, flush=True)

    def _update(self, html: str, text: str) -> None:
        from IPython.display import display

        data = {"text/plain": text, "text/html": html}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)

    def end(self) -> None:
        """Leave how long it took; on a terminal nothing."""
        if self._handle is not None:
            count = f"{self._what}: {self._size} rank{'s' * (self._size > 1)}, {self.seconds:.1f} s"
            self._update(f"<small>{escape(count)}</small>", count)
        elif self._on_terminal and self._drawn != self._started:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _bricks(done: int, size: int) -> str:
    width = min(size, 20)
    full = width * done // size
    return "▮" * full + "▯" * (width - full)


def so_far(cell: Cell, places: Places) -> str:
    """Who waits where, and the last lines that were printed."""
    waits = [
        f"{places.label(ranks)} waits in {where}"
        for where, ranks in fold(cell.waits).items()
    ]
    printed = prefixed(
        {rank: cell.printed(rank) for rank in cell.outcomes}, places
    ).splitlines()[-_TAIL:]
    return "\n".join([*waits, *printed])
