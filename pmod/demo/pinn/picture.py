"""The picture of the job: the solution, its error, three moments, and the loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from pmod.demo.options import shown
from pmod.demo.picture import BLUE, DASHED, draw_field, draw_losses, new_figure
from pmod.demo.pinn.burgers import grid, solution
from pmod.demo.pinn.parallel import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(path: Path, outcome: Outcome) -> None:
    """Write the picture."""
    mesh, error = shown(outcome.axis_sizes), outcome.run.error
    title = f"Burgers' equation by a network that knows it, over a mesh {mesh}: relative error {error:.2%}"
    figure = new_figure(13, 8.4, title)
    panels = figure.subplots(2, 2)
    prediction, truth = outcome.run.prediction, solution(*grid())
    _draw(panels[0, 0], prediction, "u(t, x)")
    _draw(
        panels[0, 1],
        prediction - truth,
        "error, and where the equation is asked to hold",
    )
    panels[0, 1].plot(
        outcome.t.flatten(), outcome.x.flatten(), ",", color="black", alpha=0.5
    )
    _draw_moments(panels[1, 0], prediction, truth)
    draw_losses(
        panels[1, 1],
        outcome.run,
        None,
        "mean square of the residual, relative error of u",
    )
    figure.savefig(path, dpi=120)


def _draw(panel: Axes, field: Tensor, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    most = field.abs().max().item()
    draw_field(
        panel,
        field.T,
        title,
        MaxNLocator(5),
        vmin=-most,
        vmax=most,
        extent=(0, 1, -1, 1),
        aspect="auto",
        origin="lower",
        cmap="RdBu_r",
    )
    panel.set(xlabel="t", ylabel="x")


def _draw_moments(panel: Axes, prediction: Tensor, truth: Tensor) -> None:
    t, x = grid()
    for part, shade in ((0.25, 0.4), (0.5, 0.7), (1.0, 1.0)):
        row = round(part * (len(t) - 1))
        panel.plot(
            x[row],
            prediction[row],
            color=BLUE,
            linewidth=2.5,
            alpha=shade,
            label=f"t = {part:g}",
        )
        panel.plot(x[row], truth[row], color="black", linewidth=0.8, linestyle=DASHED)
    panel.set(
        title="u at three times; dashed: the formula of Cole and Hopf", xlabel="x"
    )
    panel.grid(alpha=0.3)
    panel.legend()
