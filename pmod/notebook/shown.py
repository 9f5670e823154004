"""What a cell shows: equal outputs folded, failures, and a bar while it runs."""

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
from pmod._mesh.sizes import named_coords_at
from pmod._site import HERE
from pmod.notebook.cells import Cell, Display, Outcome, plain

# lines of what a cell has printed, below the bar
_TAIL = 12
# ranks that a label names one by one
_NAMED = 6


class Places:
    """The coordinates of ranks, and short names for sets of them."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = dict(sizes)
        self.size = math.prod(sizes.values())

    def coords(self, rank: int) -> dict[str, int]:
        """Return the rank's index along each axis."""
        return named_coords_at(rank, self.sizes)

    def select(self, chosen: Mapping[str, int]) -> list[int]:
        """Return the ranks that have these indices."""
        ranks: list[int] = []
        for rank in range(self.size):
            if chosen.items() <= self.coords(rank).items():
                ranks.append(rank)
        return ranks

    def label(self, ranks: Iterable[int]) -> str:
        """Return a short name for a set of ranks.

        `all`; or `model=0`, which is all of it along the other axes; or `data=0..2,
        model=1`; or else one rank after the other.

        >>> Places({"data": 2, "model": 2}).label([1, 3])
        'model=1'
        """
        ranks = sorted(ranks)
        if len(ranks) == self.size:
            return "all"
        seen = self._seen(ranks)
        # as many ranks as places in the box around them: they fill it
        if math.prod(map(len, seen.values())) == len(ranks):
            cut = [name for name in seen if len(seen[name]) < self.sizes[name]]
            return ", ".join(f"{name}={_run(seen[name])}" for name in cut)
        shown = [coordinates(self.coords(rank)) for rank in ranks[:_NAMED]]
        if len(ranks) > _NAMED:
            shown.append(f"and {len(ranks) - _NAMED} more")
        return " ".join(shown)

    def _seen(self, ranks: Sequence[int]) -> dict[str, list[int]]:
        """Return the indices that these ranks have along each axis."""
        seen: dict[str, list[int]] = {}
        for name in self.sizes:
            seen[name] = sorted({self.coords(rank)[name] for rank in ranks})
        return seen


def _run(indices: Sequence[int]) -> str:
    first, last = indices[0], indices[-1]
    if len(indices) > 2 and last - first == len(indices) - 1:
        return f"{first}..{last}"
    return ",".join(map(str, indices))


def fold(values: Mapping[int, Hashable]) -> dict[Hashable, list[int]]:
    """Return the ranks of each value, in the order of the first rank that has it."""
    folded: dict[Hashable, list[int]] = {}
    for rank, value in sorted(values.items()):
        folded.setdefault(value, []).append(rank)
    return folded


def prefixed(texts: Mapping[int, str], places: Places) -> str:
    """Return what the ranks have printed, each line behind the ranks that printed it.

    Ranks that printed nothing are left out.
    """
    folded: dict[str, str] = {}
    for text, ranks in fold(texts).items():
        if text:
            folded[places.label(ranks)] = str(text)
    width = max(map(len, folded), default=0)
    lines: list[str] = []
    for label, text in folded.items():
        for line in text.removesuffix("\n").split("\n"):
            # a progress bar writes over its line: only the last state of it is shown
            last = line.rstrip("\r").rpartition("\r")[2]
            lines.append(f"{label:{width}} │ {last}\n")
    return "".join(lines)


# --- what is left of a cell -----------------------------------------------------------


def show(outcomes: Mapping[int, Outcome], places: Places) -> None:
    """Print and display what the ranks did."""
    stdout = {rank: outcome.stdout for rank, outcome in outcomes.items()}
    stderr = {rank: outcome.stderr for rank, outcome in outcomes.items()}
    for texts, stream in ((stdout, sys.stdout), (stderr, sys.stderr)):
        text = prefixed(texts, places)
        if text:
            print(text, end="", file=stream, flush=True)
    most = max(len(outcome.shown) for outcome in outcomes.values())
    for number in range(most):
        _show_output(number, outcomes, places)


def _show_output(number: int, outcomes: Mapping[int, Outcome], places: Places) -> None:
    """Display what the ranks displayed as their output of this number, each once."""
    at: dict[int, Display] = {}
    for rank, outcome in outcomes.items():
        if number < len(outcome.shown):
            at[rank] = outcome.shown[number]
    sets = fold({rank: _key(shown["data"]) for rank, shown in at.items()}).values()
    for ranks in sets:
        # what all ranks show alike stands there as if one process had shown it
        alike = len(ranks) == len(outcomes)
        _display(at[ranks[0]], "" if alike else places.label(ranks))


def _key(data: Mapping[str, object]) -> str:
    """Return what is the same for two outputs that are shown as one."""
    # an address in memory differs between processes, and says nothing
    return re.sub(r"\bat 0x[0-9a-f]+", "at 0x", repr(sorted(data.items())))


def _display(shown: Display, label: str) -> None:
    from IPython.display import display

    data = dict(shown["data"])
    only_text = set(data) <= {"text/plain"}
    if label and only_text:
        text = data["text/plain"]
        # below the label, the lines of an array stay below one another
        data["text/plain"] = (
            f"{label}: \n{text}" if "\n" in text else f"{label}: {text}"
        )
    elif label:
        print(f"{label}:", flush=True)
    display(data, metadata=shown.get("metadata") or {}, raw=True)


# --- failures -------------------------------------------------------------------------


def report(cell: Cell, places: Places, seconds: float) -> str:
    """Return what went wrong, or "" if nothing did.

    That is one traceback, who raised it, and where the others were.
    """
    outcomes = cell.outcomes
    if all(outcome.how == "done" for outcome in outcomes.values()):
        return ""
    errors: dict[int, Hashable] = {}
    others: dict[int, str] = {}
    for rank, outcome in outcomes.items():
        # what a rank raised because it was stopped is nothing that the user did wrong
        if outcome.how == "raised" and not outcome.stopped:
            errors[rank] = _alike(outcome)
        else:
            others[rank] = _state(outcome)
    alike = list(fold(errors).values())
    cause = _cause(alike, cell)
    lines: list[str] = []
    if cell.interrupted:
        lines.append(f"Interrupted after {seconds:.1f} s.")
    if cause:
        traceback = _shortened(outcomes[cause[0]])
        lines.append(f"{traceback}\n\nraised {_where(cause, places)}")
    for state, ranks in fold(others).items():
        lines.append(f"{_where(ranks, places)}: {state}")
    for ranks in alike:
        if ranks != cause:
            lines.append(f"{_where(ranks, places)}: {_state(outcomes[ranks[0]])}")
    return "\n".join([*lines, *_advice(cell)])


def _alike(outcome: Outcome) -> Hashable:
    """Return what is the same for errors of one kind at one place.

    Their texts are left out, because they may name different ranks.
    """
    failure = outcome.failure
    kind = outcome.error.partition(":")[0]
    return kind, failure.lines if failure else plain(outcome.traceback)


def _cause(alike: Sequence[list[int]], cell: Cell) -> list[int]:
    """Return the ranks whose traceback to show: those that raised first.

    Ranks that raised because others did not arrive come last: they are not the cause.
    """
    outcomes = cell.outcomes

    def first_of(ranks: list[int]) -> float:
        return min(outcomes[rank].finished for rank in ranks)

    order = sorted(alike, key=first_of)
    for ranks in order:
        if not outcomes[ranks[0]].error.startswith("CollectiveTimeout"):
            return ranks
    # all gave up waiting: for one that died, which is told of anyway, or for one another
    died = any(outcome.how == "died" for outcome in outcomes.values())
    return [] if died or not order else order[0]


def _shortened(outcome: Outcome) -> str:
    """Return the traceback, without the lines inside pmod if it raised on purpose."""
    if outcome.failure is None or not outcome.failure.ours:
        return outcome.traceback.rstrip()
    *frames, error = outcome.traceback.rstrip().split("\n\n")
    kept = [part for part in frames if not plain(part).startswith(f"File {HERE}")]
    left_out = len(frames) - len(kept)
    if left_out:
        kept.append(f"({left_out} more inside pmod)")
    return "\n\n".join([*kept, error])


def _advice(cell: Cell) -> list[str]:
    """Return what was done to the ranks, and what comes next."""
    hows = {outcome.how for outcome in cell.outcomes.values()}
    stopped = any(outcome.stopped for outcome in cell.outcomes.values())
    lines: list[str] = []
    # after the stop button the user knows why they were stopped
    if stopped and not cell.interrupted:
        lines.append(
            "The waiting ranks were stopped, because a rank they waited for "
            "has already left the cell."
        )
    if "died" in hows:
        lines.append(
            "The next cell starts a new engine there, without variables: "
            "run the cells that set them again."
        )
    if "stuck" in hows:
        lines.append(
            "The next cell waits a little for it, and then starts a new engine there, "
            "without variables."
        )
    return lines


def _where(ranks: Sequence[int], places: Places) -> str:
    label = places.label(ranks)
    if label == "all":
        return "on all ranks"
    # the places of single ranks come in brackets already
    return f"at {label}" if label.startswith("(") else f"at ({label})"


def _state(outcome: Outcome) -> str:
    """Return what a rank did that is not the cause."""
    if outcome.how == "raised":
        return _stopped_at(outcome) if outcome.stopped else _raised(outcome)
    return {
        "done": "had finished the cell",
        "unsent": "was stopped before it began",
        "died": outcome.death,
        "stuck": "has not stopped yet, in a call that is not Python's",
    }[outcome.how]


def _raised(outcome: Outcome) -> str:
    if outcome.failure is None:
        return f"raised {outcome.error}"
    line = outcome.error.splitlines()[0]
    return f"{line} [{outcome.failure.at}]" if outcome.failure.at else line


def _stopped_at(outcome: Outcome) -> str:
    failure = outcome.failure
    if failure is None:
        return "was stopped"
    if failure.waited:
        return f"waited in {failure.waited}, {failure.at}"
    return f"was at {failure.at}" if failure.at else "was at no line of the cell"


# --- while it runs --------------------------------------------------------------------


class Bar:
    """How many ranks are through.

    In a notebook it is updated in place, on a terminal it is one line, elsewhere nothing.
    """

    # seconds: what is over sooner needs no bar
    AFTER, EVERY = 0.5, 0.25

    def __init__(self, shell: object, what: str, size: int) -> None:
        self._what, self._size = what, size
        self._started = self._drawn = monotonic()
        self._handle: Any = None
        self._in_notebook = hasattr(shell, "kernel")
        self._on_terminal = not self._in_notebook and sys.stderr.isatty()

    @property
    def seconds(self) -> float:
        """Return the seconds since it was made."""
        return monotonic() - self._started

    def draw(self, done: int, more: Callable[[], str] = str) -> None:
        """Show that `done` ranks are through.

        `more` returns what else is known. It is called only if the bar is drawn, because
        it costs more than a look at the clock.
        """
        now = monotonic()
        if now - self._started < self.AFTER or now - self._drawn < self.EVERY:
            return
        self._drawn = now
        self._put(done, more())

    def _put(self, done: int, more: str) -> None:
        count = f"{self._what}: {done} of {self._size} ranks, {self.seconds:.1f} s"
        text = f"{_bricks(done, self._size)} {count}"
        if self._in_notebook:
            progress = f'<progress value="{done}" max="{self._size}"></progress>'
            html = f"{progress} {escape(count)}"
            if more:
                html += f'<pre style="margin: 4px 0">{escape(more)}</pre>'
                text += f"\n{more}"
            self._update(html, text)
        elif self._on_terminal:
            width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
            first = more.partition("\n")[0]
            # padded, so that nothing is left of a longer line that it is written over
            line = f"{text}  {first}"[:width].ljust(width)
            print(f"\r{line}", end="", file=sys.stderr, flush=True)

    def _update(self, html: str, text: str) -> None:
        from IPython.display import display

        data = {"text/plain": text, "text/html": html}
        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)

    def end(self) -> None:
        """Leave a line that says how long it took; on a terminal leave nothing."""
        if self._handle is not None:
            ranks = "ranks" if self._size > 1 else "rank"
            count = f"{self._what}: {self._size} {ranks}, {self.seconds:.1f} s"
            self._update(f"<small>{escape(count)}</small>", count)
        elif self._on_terminal and self._drawn != self._started:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _bricks(done: int, size: int) -> str:
    width = min(size, 20)
    full = width * done // size
    return "▮" * full + "▯" * (width - full)


def so_far(cell: Cell, places: Places) -> str:
    """Return who waits where, and the last lines that were printed."""
    lines: list[str] = []
    for where, ranks in fold(cell.waits).items():
        lines.append(f"{places.label(ranks)} waits in {where}")
    printed = {rank: cell.printed(rank) for rank in cell.outcomes}
    return "\n".join([*lines, *prefixed(printed, places).splitlines()[-_TAIL:]])
