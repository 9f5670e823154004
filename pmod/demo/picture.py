"""The picture of a training: a problem, its solution, the prediction, the losses."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pmod._errors import PmodError, phrase
from pmod.demo.darcy import PERMEABLE, TIGHT, permeability
from pmod.demo.options import shown
from pmod.demo.parallel import Outcome
from pmod.demo.serial import relative_errors
from pmod.demo.training import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE = "#1f5fa8", "#e07b1f"
DASHED = (0, (4, 3))


def check_output(path: Path) -> None:
    """Raise PmodError if matplotlib cannot write such a file.

    It is called before the training, not after it.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().lstrip(".") not in known:
        given = f"--output {path} is no kind of picture that matplotlib writes"
        raise PmodError(
            phrase("demo", given, f"End it in .{', .'.join(sorted(known))}.")
        )


def new_figure(width: float, height: float, title: str) -> Figure:
    """Return an empty picture, of so many inches, that needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure


def draw(
    path: Path, outcome: Outcome, serial: Run | None, bound: tuple[int, float]
) -> None:
    """Write the picture; it shows the test problem of median error.

    bound: over how many steps the loss curves are compared, and how far they may be
    apart.
    """
    mesh = shown(outcome.axis_sizes)
    title = f"Darcy flow by a Fourier neural operator over a mesh {mesh}: relative test error {outcome.run.error:.1%}"
    figure = new_figure(12, 7, title)
    halves: Any = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    _draw_problem(halves[0].subplots(1, 4), outcome)
    left, right = halves[1].subplots(1, 2, width_ratios=[1.4, 1])
    draw_losses(left, outcome.run, serial, "relative L2 error")
    _draw_difference(right, outcome.run, serial, bound)
    figure.savefig(path, dpi=120)


def _draw_problem(panels: Sequence[Axes], outcome: Outcome) -> None:
    test, prediction = outcome.test, outcome.run.prediction.double()
    errors = relative_errors(prediction, test.y.double())
    which = int(errors.argsort()[len(errors) // 2])
    _draw_fields(panels, test.x[which], test.y[which].double(), prediction[which])
    for edge in list(accumulate(outcome.rows))[:-1]:
        panels[2].axhline(edge - 0.5, color="white", linewidth=1, linestyle=DASHED)
        panels[2].set_xlabel("dashed: where a rank's rows end")
    panels[3].set_xlabel(f"{errors[which].item():.1%}: the median of the test problems")


def _draw_fields(
    panels: Sequence[Axes], x: Tensor, y: Tensor, prediction: Tensor
) -> None:
    from matplotlib.ticker import MaxNLocator

    low = min(y.min(), prediction.min()).item()
    high = max(y.max(), prediction.max()).item()
    error = prediction - y
    most = error.abs().max().item()
    draw_field(
        panels[0],
        permeability(x),
        "permeability",
        [TIGHT, PERMEABLE],
        cmap="cividis",
        vmin=TIGHT,
        vmax=PERMEABLE,
    )
    # both in the same colours, so that they can be compared
    for panel, field, how in (
        (panels[1], y, "solved"),
        (panels[2], prediction, "predicted"),
    ):
        title, ticks = f"pressure, {how}", MaxNLocator(4)
        draw_field(panel, field, title, ticks, cmap="viridis", vmin=low, vmax=high)
    ticks = MaxNLocator(4)
    draw_field(panels[3], error, "error", ticks, cmap="RdBu_r", vmin=-most, vmax=most)
    for panel in panels:
        panel.set(xticks=[], yticks=[])


def draw_field(
    panel: Axes, field: Tensor, title: str, ticks: Any, **looks: Any
) -> None:
    """Draw a field by colour, and below it what the colours stand for."""
    image = panel.imshow(field.numpy(), interpolation="nearest", **looks)
    panel.set(title=title)
    panel.figure.colorbar(image, ax=panel, location="bottom", shrink=0.8, ticks=ticks)


def draw_losses(panel: Axes, parallel: Run, serial: Run | None, title: str) -> None:
    """Draw the curves of the training, and the test errors."""
    steps = torch.arange(1, len(parallel.losses) + 1)
    panel.semilogy(
        steps,
        parallel.losses,
        color=BLUE,
        linewidth=2.5,
        alpha=0.6,
        label="loss, over the mesh",
    )
    if serial is not None:
        panel.semilogy(
            steps,
            serial.losses,
            color="black",
            linewidth=0.8,
            label="loss, in one process",
        )
    panel.semilogy(
        list(parallel.errors),
        list(parallel.errors.values()),
        "o-",
        color=ORANGE,
        label="test error",
    )
    panel.set(title=title, xlabel="step")
    panel.grid(alpha=0.3)
    panel.legend()


def _draw_difference(
    panel: Axes, parallel: Run, serial: Run | None, bound: tuple[int, float]
) -> None:
    if serial is None:
        panel.set_axis_off()
        panel.text(
            0.5,
            0.5,
            "not compared (--no-serial)",
            ha="center",
            transform=panel.transAxes,
        )
        return
    apart = (parallel.losses - serial.losses).abs()
    # equal losses are drawn on the floor, not at minus infinity
    floor = torch.finfo(apart.dtype).eps / 10
    panel.semilogy(
        torch.arange(1, len(apart) + 1),
        apart.clamp_min(floor),
        ".",
        color=BLUE,
        markersize=3,
    )
    panel.hlines(
        bound[1], 1, min(bound[0], len(apart)), color="black", linestyle=DASHED
    )
    panel.text(1, 0.5 * bound[1], f"bound, over the first {bound[0]} steps", va="top")
    panel.set(title="difference of the two loss curves", xlabel="step")
    panel.grid(alpha=0.3)
