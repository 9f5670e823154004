"""`trace`: every collective with its axis, bytes, time and line, as a table, a picture,
or a file for Perfetto.
"""

from __future__ import annotations

import html
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any

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


class _Modules(threading.local):
    """The modules that are being called on this thread, the outermost first."""

    def __init__(self) -> None:
        self.calls: list[nn.Module] = []
        self.names: dict[int, str] = {}

    def enter(self, module: nn.Module, _: Any) -> None:
        if not self.calls:
            root = type(module).__name__
            self.names = {
                id(m): f"{root}.{name}" if name else root
                for name, m in module.named_modules()
            }
        self.calls.append(module)

    def leave(self, *_: Any) -> None:
        if self.calls:
            self.calls.pop()

    @property
    def path(self) -> str:
        return (
            self.names.get(id(self.calls[-1]), type(self.calls[-1]).__name__)
            if self.calls
            else ""
        )


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
        self._handles: list[Any] = []
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

    def __getstate__(self) -> dict[str, Any]:
        return {
            "events": self.events,
            "began": self.began,
            "estimated": self._estimated,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()
        self.events, self.began, self._estimated = (
            state["events"],
            state["began"],
            state["estimated"],
        )

    def _count_step(self, *_: Any) -> None:
        self._step += (
            threading.get_ident() == self._thread
        )  # not for another rank of a simulation

    # --- what is told -----------------------------------------------------------------

    def before(self, call: Call, xs: Sequence[Tensor], origin: Origin) -> None:
        """A call begins."""
        self._open.append(Open(call, origin, perf_counter(), self._meter.total))

    def after(self, call: Call) -> None:
        """The last call that began has ended."""
        done = self._open.pop()
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
                perf_counter() - done.start,
                site,
                self._sites.get(site, ""),
                self._step,
            )
        )

    def waited(self, call: Call, seconds: float) -> None:
        """A call that was started has its result: the first that is not waited for yet."""
        for i, event in enumerate(self.events):
            if (event.axis, event.size) == (
                call.axis.label,
                call.axis.size,
            ) and i not in self._waited:
                self._waited.add(i)
                self.events[i] = attrs.evolve(event, seconds=event.seconds + seconds)
                return

    def retime(self, seconds: Callable[[Event], float]) -> None:
        """Let each event take the seconds that an estimate gives it, one after the
        other.
        """
        clock, timed = 0.0, list[Event]()
        for event in self.events:
            timed.append(attrs.evolve(event, start=clock, seconds=seconds(event)))
            clock += timed[-1].seconds
        self.events, self._estimated = timed, True

    # --- what is shown ----------------------------------------------------------------

    def total_bytes(self, axis: str | tuple[str, ...] | None = None) -> int:
        """Bytes that this rank sent, along an axis or along all.

        >>> def sent():
        ...     with pmod.trace() as t:
        ...         pmod.all_gather(torch.ones(4), "model")
        ...     return t.total_bytes("model")
        >>> pmod.simulate(sent, model=2)
        [16, 16]
        """
        return sum(
            event.nbytes for event in self.events if axis is None or event.axis == axis
        )

    def by_axis(self) -> dict[str | tuple[str, ...], dict[str, Any]]:
        """Calls, bytes and seconds of each axis."""
        found: dict[str | tuple[str, ...], dict[str, Any]] = {}
        for event in self.events:
            entry = found.setdefault(
                event.axis, {"calls": 0, "bytes": 0, "seconds": 0.0}
            )
            entry["calls"] += 1
            entry["bytes"] += event.nbytes
            entry["seconds"] += event.seconds
        return found

    def _rows(self) -> list[tuple[str, ...]]:
        """One per function, axis and line, in the order of their first call; and what
        they come to.
        """
        sums: dict[tuple[str, str, str, str], list[float]] = {}
        for event in self.events:
            entry = sums.setdefault(
                (event.function, named(event.axis), event.module, event.site),
                [0, 0, 0.0],
            )
            entry[0] += 1
            entry[1] += event.nbytes
            entry[2] += event.seconds
        rows = [
            (
                function,
                axis,
                str(int(calls)),
                in_bytes(nbytes),
                f"{1e3 * seconds:.2f}",
                module,
                site,
            )
            for (function, axis, module, site), (calls, nbytes, seconds) in sums.items()
        ]
        seconds = sum(event.seconds for event in self.events)
        return [
            *rows,
            (
                "all",
                "",
                str(len(self.events)),
                in_bytes(self.total_bytes()),
                f"{1e3 * seconds:.2f}",
                "",
                "",
            ),
        ]

    def table(self) -> str:
        """What was called where, how often, with how many bytes and milliseconds.

        >>> print(pmod.trace().table().splitlines()[0])
        function  axis   calls  sent    ms  module  line
        """
        lines = [TITLES, *self._rows()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(TITLES) - 1)]
        return "\n".join(
            "  ".join(
                [
                    text.rjust(w) if i in (2, 3, 4) else text.ljust(w)
                    for i, (text, w) in enumerate(zip(line, widths, strict=False))
                ]
                + [line[-1]]
            ).rstrip()
            for line in lines
        )

    def _repr_html_(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            return (
                "<tr>"
                + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
                + "</tr>"
            )

        body = "".join(row(cells, "td") for cells in self._rows())
        return f"<table>{row(TITLES, 'th')}{body}</table>"

    def plot(self) -> Figure:
        """A matplotlib figure: each axis a lane, each call a bar from its start to its
        end. Needs matplotlib.

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
            raise ArgumentError(
                phrase("trace.plot", "matplotlib is not installed", right)
            ) from None
        lanes = list(self.by_axis())
        figure = Figure(figsize=(10, 1 + 0.6 * len(lanes)), layout="constrained")
        axes = figure.subplots()
        functions = sorted(
            {event.function.removeprefix(BACKWARD) for event in self.events}
        )
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
        for i, function in enumerate(functions):
            axes.barh(0, 0, color=f"C{i}", label=function)
        axes.set_yticks(range(len(lanes)), [str(lane) for lane in lanes])
        axes.set_xlabel("ms since the trace began (paler: backward)")
        if functions:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        shown: Any = figure
        shown._repr_png_ = partial(
            write_png, figure
        )  # IPython knows no Figure until pyplot has drawn one
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
            raise ArgumentError(
                phrase(
                    "trace.chrome",
                    f"path is {quoted(path)}",
                    "Pass the name of a file.",
                )
            )
        mesh = ambient()
        if mesh is None or mesh.size == 1 or mesh.coords is None or self._estimated:
            write_events(path, [chrome_entry(event, 0.0) for event in self.events])
            return
        barrier(mesh.axis_names)  # the ranks leave it at one time
        offset = self.began - perf_counter()
        entries = [chrome_entry(event, offset) for event in self.events]
        parts = gather_json(entries, mesh)
        if mesh.ranks.reshape(-1)[0] == mesh.topology.rank:
            write_events(path, [entry for part in parts for entry in part])
