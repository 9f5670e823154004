"""What `trace` notes of a call, and the files that it writes."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs

from pmod._core.row import Call
from pmod._mesh.axis import named
from pmod._site import Origin
from pmod._wire.traffic import Traffic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Entry: TypeAlias = dict[str, Any]
"""What Chrome's format has of an event: the texts and numbers of a JSON object."""


@attrs.frozen
class Event:
    """One collective on one rank."""

    function: str  # as it was called; "the backward of psum" for its transpose
    row: str  # the operator that ran: of a backward, the transpose
    axis: str | tuple[str, ...]
    size: int  # of the axis
    rank: int
    nbytes: int  # sent by this rank
    received: int  # bytes
    messages: int  # that follow one another
    start: float  # seconds since the trace began
    # From the call to its result, waiting included. Of a call that was started, sending
    # and waiting, without what lies between.
    seconds: float
    site: str  # the user's line; of a backward, that of its forward
    module: str  # the path of the nn.Module that called it
    step: int  # how many optimizer steps came before


@attrs.define
class Open:
    """A call whose result is not there yet."""

    call: Call
    origin: Origin
    start: float
    before: Traffic
    inner: Traffic = attrs.field(factory=Traffic)  # of the calls inside it: a jvp's


def write_png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


TITLES = ("function", "axis", "calls", "sent", "ms", "module", "line")


def in_bytes(count: float) -> str:
    """Return a number of bytes in four digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{int(count)} B"


def chrome_entry(event: Event, offset: float) -> Entry:
    """Return a complete event of Chrome's format, whose times are in us.

    offset: of the trace's beginning on the common clock, in seconds.
    """
    axis = named(event.axis)
    return {
        "name": f"{event.function} ({axis})",
        "ph": "X",
        "pid": event.rank,
        "tid": axis,
        "ts": 1e6 * (event.start + offset),
        "dur": 1e6 * event.seconds,
        "args": {
            "bytes": event.nbytes,
            "line": event.site,
            "module": event.module,
            "step": event.step,
        },
    }


def write_events(path: str | os.PathLike[str], entries: list[Entry]) -> None:
    """Write entries of `chrome_entry` into a file, with the names of ranks and axes."""
    first = min([entry["ts"] for entry in entries], default=0.0)
    lanes: dict[str, int] = {}
    names: dict[tuple[int, int], str] = {}
    for entry in entries:
        axis = entry["tid"]
        # The format wants a number for a lane, and its name in an entry of its own.
        lane = lanes.setdefault(axis, len(lanes))
        names[entry["pid"], lane] = axis
        entry["ts"] -= first
        entry["tid"] = lane
    told: list[Entry] = []
    for rank in sorted({rank for rank, _ in names}):
        told.append(_name_entry("process_name", f"rank {rank}", pid=rank))
    for (rank, lane), axis in sorted(names.items()):
        told.append(_name_entry("thread_name", axis, pid=rank, tid=lane))
    Path(path).write_text(json.dumps({"traceEvents": [*told, *entries]}))


def _name_entry(what: str, name: str, **place: int) -> Entry:
    return {"name": what, "ph": "M", **place, "args": {"name": name}}
