"""The picture of the job: the winds, their vorticity and divergence, and the error."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pmod.demo.options import shown
from pmod.demo.picture import DASHED, draw_field, new_figure
from pmod.demo.wind.parallel import Outcome
from pmod.demo.wind.winds import Winds

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(path: Path, outcome: Outcome, winds: Winds, beside: Tensor | None) -> None:
    """Write the picture, of the first time.

    beside: the vorticity that it is compared with.
    """
    figure = new_figure(
        13,
        8.4,
        f"Vorticity and divergence of winds over a mesh {shown(outcome.axis_sizes)}",
    )
    panels = figure.subplots(2, 2)
    u, v = winds.u[0], winds.v[0]
    _draw(panels[0, 0], (u.square() + v.square()).sqrt(), "wind, m/s", cmap="viridis")
    _draw_arrows(panels[0, 0], u, v)
    borders = [
        list(accumulate(sizes))[:-1] for sizes in (outcome.rows, outcome.columns)
    ]
    for panel, field, title in (
        (panels[0, 1], outcome.vorticity[0], "vorticity, 1/s"),
        (panels[1, 0], outcome.divergence[0], "divergence, 1/s"),
    ):
        _draw_signed(panel, field, title)
        _draw_borders(panel, borders, outcome)
    if beside is None:
        panels[1, 1].set_axis_off()
        panels[1, 1].text(
            0.5,
            0.5,
            "nothing to compare with",
            ha="center",
            transform=panels[1, 1].transAxes,
        )
    else:
        _draw_signed(
            panels[1, 1],
            outcome.vorticity[0] - beside[0],
            "error of the vorticity, 1/s",
        )
    figure.savefig(path, dpi=120)


def _draw(panel: Axes, field: Tensor, title: str, **looks: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    where = {"extent": (0, 360, -90, 90), "aspect": "auto"}
    draw_field(panel, field, title, MaxNLocator(5), **where, **looks)
    panel.set(xticks=range(0, 361, 90), yticks=range(-90, 91, 45))


def _draw_signed(panel: Axes, field: Tensor, title: str) -> None:
    most = field.abs().max().item()
    _draw(panel, field, title, cmap="RdBu_r", vmin=-most, vmax=most)


def _draw_arrows(panel: Axes, u: Tensor, v: Tensor) -> None:
    rows, columns = u.shape
    down, along = max(rows // 12, 1), max(columns // 24, 1)
    y = [90 - 180 * i / (rows - 1) for i in range(rows)][::down]
    x = [360 * (j + 0.5) / columns for j in range(columns)][::along]
    panel.quiver(
        x,
        y,
        u[::down, ::along].numpy(),
        v[::down, ::along].numpy(),
        color="white",
        width=0.002,
    )


def _draw_borders(
    panel: Axes, borders: Sequence[Sequence[int]], outcome: Outcome
) -> None:
    rows, columns = sum(outcome.rows), sum(outcome.columns)
    for edge in borders[0]:
        panel.axhline(
            90 - 180 * edge / rows, color="black", linewidth=1, linestyle=DASHED
        )
    for edge in borders[1]:
        panel.axvline(
            360 * edge / columns, color="black", linewidth=1, linestyle=DASHED
        )
    panel.set_xlabel("dashed: where a rank's points end")
