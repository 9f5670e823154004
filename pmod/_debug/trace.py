"""`trace`: every collective with its axis, bytes, time and line.

It is shown as a table, as a picture, or in a file for Perfetto.
"""

from __future__ import annotations

import html
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict

import attrs
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.optim.optimizer import register_optimizer_step_post_hook

from pmod._collectives.objects import gather_json
from pmod._collectives.places import barrier
from pmod._core.row import Call
from pmod._core.watch import Watcher
from pmod._debug.events import (
    TITLES,
    Entry,
    Event,
    Open,
    chrome_entry,
    in_bytes,
    write_events,
    write_png,
)
from pmod._errors import ArgumentError, phrase, quoted
from pmod._mesh.ambient import ambient
from pmod._mesh.axis import named
from pmod._site import BACKWARD, Origin
from pmod._wire.traffic import Meter, meters

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Sums(TypedDict):
    """What the calls of an axis come to."""

    calls: int
    bytes: int
    seconds: float


class _Handle(Protocol):
    def remove(self) -> None: ...


class _Kept(TypedDict):
    """What a trace is pickled as: what it found, not what it looked with."""

    events: list[Event]
    began: float
    estimated: bool


class _Line(NamedTuple):
    """What a row of the table is about."""

    function: str
    axis: str
    module: str
    site: str


class _Modules(threading.local):
    """The modules that are being called on this thread, the outermost first."""

    def __init__(self) -> None:
        self.calls: list[nn.Module] = []
        self.names: dict[int, str] = {}

    def enter(self, module: nn.Module, _: object) -> None:
        """Note a module that is called."""
        # A module inside another has its name there, so the outermost one names all.
        if not self.calls:
            root = type(module).__name__
            inside = module.named_modules(prefix=root)
            self.names = {id(inner): name for name, inner in inside}
        self.calls.append(module)

    def leave(self, *_: object) -> None:
        """Note that the last module that was called has returned."""
        # The trace may have begun inside a module.
        if self.calls:
            self.calls.pop()

    @property
    def path(self) -> str:
        """Return the name of the innermost module, if any is being called."""
        if not self.calls:
            return ""
        module = self.calls[-1]
        return self.names.get(id(module), type(module).__name__)


class trace(Watcher):  # lower case: it reads as the function it is called as
    """Record every collective, forward and backward: function, axis, bytes sent by this
    rank, time, line, module, step.

    As a context manager, ``with pmod.trace() as t:``. `t.events` holds the records,
    `t.table()` sums them up by line, `t.by_axis()` by axis; `t.total_bytes(axis)`;
    `t.plot()` draws them (needs matplotlib); `t.chrome(path)` writes all ranks' into a
    file that opens in Perfetto. Bytes are those handed over for other ranks: a rank's
    part for itself does not count, and a sum that NCCL or gloo does by itself counts as
    a ring's. On cuda the time is the host's. Compiled code is not seen. Cost: some 20
    us per collective.

    >>> def step():
    ...     with pmod.trace() as t:
    ...         x = torch.ones(4, requires_grad=True)
    ...         pmod.all_gather(x, "model").sum().backward()
    ...     return t.by_axis()["model"]["bytes"]
    >>> pmod.simulate(step, model=2)
    [32, 32]
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.began: float = perf_counter()
        self._meter = Meter()
        self._open: list[Open] = []
        self._modules = _Modules()
        self._sites: dict[str, str] = {}  # line -> the module that called it forward
        self._step, self._thread = 0, 0
        self._handles: list[_Handle] = []
        self._waited: set[int] = set()
        self._estimated = False

    def __enter__(self) -> trace:
        super().__enter__()
        self.began = perf_counter()
        self._thread = threading.get_ident()
        self._handles = [
            hooks.register_module_forward_pre_hook(self._modules.enter),
            hooks.register_module_forward_hook(self._modules.leave, always_call=True),
            register_optimizer_step_post_hook(self._count_step),
        ]
        meters().append(self._meter)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        meters().remove(self._meter)
        for handle in self._handles:
            handle.remove()

    def __getstate__(self) -> _Kept:
        return _Kept(events=self.events, began=self.began, estimated=self._estimated)

    def __setstate__(self, state: _Kept) -> None:
        self.__init__()
        self.events, self.began = state["events"], state["began"]
        self._estimated = state["estimated"]

    def _count_step(self, *_: object) -> None:
        # Another thread's optimizer is that of another rank of a simulation.
        if threading.get_ident() == self._thread:
            self._step += 1

    def before(self, call: Call, xs: Sequence[Tensor], origin: Origin) -> None:
        """Note that a call begins."""
        self._open.append(Open(call, origin, perf_counter(), self._meter.total))

    def after(self, call: Call) -> None:
        """Note that the last call that began has ended."""
        now = perf_counter()
        done = self._open.pop()
        # What a call inside this one moves counts there, and only there.
        moved = self._meter.total - done.before
        if self._open:
            self._open[-1].inner += moved
        own = moved - done.inner
        function, site = done.origin
        if not function.startswith(BACKWARD):
            self._sites[site] = self._modules.path
        axis = call.axis
        self.events.append(
            Event(
                function,
                call.row.name,
                axis.label,
                axis.size,
                axis.topology.rank,
                own.sent,
                own.received,
                own.messages,
                done.start - self.began,
                now - done.start,
                site,
                self._sites.get(site, ""),
                self._step,
            )
        )

    def waited(self, call: Call, seconds: float) -> None:
        """Note that a call that was started has its result.

        It is the first along its axis that is not waited for yet.
        """
        along = call.axis.label, call.axis.size
        for i, event in enumerate(self.events):
            if i not in self._waited and (event.axis, event.size) == along:
                self._waited.add(i)
                self.events[i] = attrs.evolve(event, seconds=event.seconds + seconds)
                return

    def retime(self, seconds: Callable[[Event], float]) -> None:
        """Let each event take what an estimate gives it, one after the other."""
        clock, timed = 0.0, list[Event]()
        for event in self.events:
            timed.append(attrs.evolve(event, start=clock, seconds=seconds(event)))
            clock += timed[-1].seconds
        self.events, self._estimated = timed, True

    def total_bytes(self, axis: str | tuple[str, ...] | None = None) -> int:
        """Return the bytes that this rank sent, along an axis or along all.

        >>> def sent():
        ...     with pmod.trace() as t:
        ...         pmod.all_gather(torch.ones(4), "model")
        ...     return t.total_bytes("model")
        >>> pmod.simulate(sent, model=2)
        [16, 16]
        """
        asked = [event for event in self.events if axis in (None, event.axis)]
        return sum([event.nbytes for event in asked])

    def by_axis(self) -> dict[str | tuple[str, ...], Sums]:
        """Return calls, bytes and seconds of each axis."""
        found: dict[str | tuple[str, ...], Sums] = {}
        for event in self.events:
            none = Sums(calls=0, bytes=0, seconds=0.0)
            entry = found.setdefault(event.axis, none)
            entry["calls"] += 1
            entry["bytes"] += event.nbytes
            entry["seconds"] += event.seconds
        return found

    def _rows(self) -> list[tuple[str, ...]]:
        """Return a row for each function, axis and line, and one for all.

        They stand in the order of their first calls.
        """
        together: dict[_Line, list[Event]] = {}
        for event in self.events:
            axis = named(event.axis)
            line = _Line(event.function, axis, event.module, event.site)
            together.setdefault(line, []).append(event)
        rows = [_row(line, events) for line, events in together.items()]
        return [*rows, _row(_Line("all", "", "", ""), self.events)]

    def table(self) -> str:
        """Return what was called where, how often, with what bytes and milliseconds.

        >>> print(pmod.trace().table().splitlines()[0])
        function  axis   calls  sent    ms  module  line
        """
        rows = [TITLES, *self._rows()]
        columns = zip(*rows, strict=True)
        padded = [_padded(*column) for column in columns]
        lines = ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        body = "".join([_html_row(cells, "td") for cells in self._rows()])
        return f"<table>{_html_row(TITLES, 'th')}{body}</table>"

    def plot(self) -> Figure:
        """Return a matplotlib figure, in which each axis is a lane.

        Each call is a bar from its start to its end. Needs matplotlib.
        Raises: ArgumentError where matplotlib is not installed.

        >>> def drawn():
        ...     with pmod.trace() as t:
        ...         pmod.psum(torch.ones(4), "model")
        ...     return t.plot()
        >>> pmod.simulate(drawn, model=2)[0]
        <Figure size 1000x160 with 1 Axes>
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            right = "pip install matplotlib, or use table() or chrome(path)."
            text = phrase("trace.plot", "matplotlib is not installed", right)
            raise ArgumentError(text) from None
        lanes = list(self.by_axis())
        figure = Figure(figsize=(10, 1 + 0.6 * len(lanes)), layout="constrained")
        axes = figure.subplots()
        called = [event.function.removeprefix(BACKWARD) for event in self.events]
        functions = sorted(set(called))
        for event in self.events:
            function = event.function.removeprefix(BACKWARD)
            axes.barh(
                lanes.index(event.axis),
                1e3 * event.seconds,
                left=1e3 * event.start,
                height=0.7,
                color=f"C{functions.index(function)}",
                alpha=1.0 if function == event.function else 0.5,
            )
        # A bar of no length, so that each function is named once, in its strong colour.
        for i, function in enumerate(functions):
            axes.barh(0, 0, color=f"C{i}", label=function)
        axes.set_yticks(range(len(lanes)), [str(lane) for lane in lanes])
        axes.set_xlabel("ms since the trace began (paler: backward)")
        if functions:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        # IPython knows no Figure until pyplot has drawn one.
        shown: Any = figure
        shown._repr_png_ = partial(write_png, figure)
        return figure

    def chrome(self, path: str | os.PathLike[str]) -> None:
        """Write the events of all ranks of the current mesh, on one clock, for Perfetto
        or chrome://tracing.

        All ranks call it; the first one writes. Without a mesh, this process's own; so
        those of `estimate`.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, pmod.trace() as t:
        ...     t.chrome(f"{folder}/trace.json")
        """
        if not isinstance(path, str | os.PathLike):  # pyright: ignore[reportUnnecessaryIsInstance]
            given = f"path is {quoted(path)}"
            text = phrase("trace.chrome", given, "Pass the name of a file.")
            raise ArgumentError(text)
        # What an estimate found is one rank's, though its mesh has others.
        mesh = None if self._estimated else ambient()
        if mesh is None or mesh.size == 1 or mesh.coords is None:
            write_events(path, self._entries(0.0))
            return
        # The ranks leave the barrier at one time, which begins their common clock.
        barrier(mesh.axis_names)
        entries = self._entries(self.began - perf_counter())
        parts = gather_json(entries, mesh)
        if mesh.ranks.reshape(-1)[0] == mesh.topology.rank:
            write_events(path, list(itertools.chain.from_iterable(parts)))

    def _entries(self, offset: float) -> list[Entry]:
        return [chrome_entry(event, offset) for event in self.events]


def _row(line: _Line, events: Sequence[Event]) -> tuple[str, ...]:
    """Return a row of the table, which has a cell for each of TITLES."""
    nbytes = sum([event.nbytes for event in events])
    milliseconds = 1e3 * sum([event.seconds for event in events])
    sums = str(len(events)), in_bytes(nbytes), f"{milliseconds:.2f}"
    return line.function, line.axis, *sums, line.module, line.site


def _padded(title: str, *cells: str) -> list[str]:
    """Return a column of the table, all of one width; numbers stand on the right."""
    width = max(map(len, [title, *cells]))
    pad = str.rjust if title in ("calls", "sent", "ms") else str.ljust
    return [pad(cell, width) for cell in (title, *cells)]


def _html_row(cells: Sequence[str], tag: str) -> str:
    escaped = [f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells]
    return f"<tr>{''.join(escaped)}</tr>"
