"""The picture of the job: who owns what, a problem, its solution, and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pmod.demo.graph.parallel import Outcome
from pmod.demo.graph.problems import conductivity
from pmod.demo.graph.surface import Numbers, Reals, Surface
from pmod.demo.options import shown
from pmod.demo.picture import draw_losses, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CUT = "#303030"


class _View:
    """The triangles of a mesh as they are seen.

    Flat ones are seen from above, others from a corner, the nearest last.
    """

    def __init__(self, surface: Surface) -> None:
        points = surface.points.numpy()
        axes = (
            _looking_down() if np.ptp(points[:, 2]) < 1e-6 else _looking_from_a_corner()
        )
        seen = points @ axes.T
        corners = seen[surface.triangles.numpy()]
        order = np.argsort(corners[..., 2].mean(1), kind="stable")
        self.triangles: Numbers = surface.triangles.numpy()[order]
        self.corners: Reals = corners[order, :, :2]
        normals = np.cross(
            corners[order, 1] - corners[order, 0], corners[order, 2] - corners[order, 0]
        )
        self.light: Reals = 0.55 + 0.45 * np.abs(normals[:, 2]) / np.linalg.norm(
            normals, axis=1
        )
        self.low, self.high = seen[:, :2].min(0), seen[:, :2].max(0)

    def paint(
        self, panel: Axes, colours: Any, *, lines: Any = "face", width: float = 0.3
    ) -> None:
        """Draw each triangle in its colour, darker where it is seen from the side."""
        from matplotlib.collections import PolyCollection
        from matplotlib.colors import to_rgba_array

        lit = to_rgba_array(colours) * np.pad(
            np.repeat(self.light[:, None], 3, 1), ((0, 0), (0, 1)), constant_values=1
        )
        triangles = PolyCollection(
            list(self.corners),
            facecolors=lit,
            edgecolors=lines,
            linewidths=width,
            rasterized=True,
        )
        panel.add_collection(triangles)
        margin = 0.02 * float((self.high - self.low).max())
        panel.set_xlim(self.low[0] - margin, self.high[0] + margin)
        panel.set_ylim(self.low[1] - margin, self.high[1] + margin)
        panel.set_aspect("equal")
        panel.set_axis_off()


def _looking_down() -> Reals:
    return np.eye(3)


def _looking_from_a_corner() -> Reals:
    """Return the directions right, up, and towards the eye."""
    turn, lift = np.radians(35), np.radians(25)
    right = np.array([np.cos(turn), np.sin(turn), 0])
    eye = np.array(
        [np.sin(turn) * np.cos(lift), -np.cos(turn) * np.cos(lift), np.sin(lift)]
    )
    return np.stack([right, np.cross(eye, right), eye])


def draw(path: Path, outcome: Outcome) -> None:
    """Write the picture; it shows the test problem of median error."""
    mesh, error = shown(outcome.axis_sizes), outcome.run.error
    title = f"Steady diffusion by message passing over a mesh {mesh}: relative test error {error:.1%}"
    figure = new_figure(14, 6.8, title)
    halves: Any = figure.subfigures(2, 1, height_ratios=[1.35, 1])
    view = _View(outcome.surface)
    left, right = halves[0].subplots(1, 2, width_ratios=[1.3, 1])
    _draw_parts(left, view, outcome)
    draw_losses(right, outcome.run, None, "mean square loss, relative test error")
    _draw_problem(halves[1].subplots(1, 5), view, outcome)
    figure.savefig(path, dpi=120)


def _draw_parts(panel: Axes, view: _View, outcome: Outcome) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    ranks = outcome.axis_sizes["graph"]
    few = colormaps["tab10" if ranks <= 10 else "tab20"].colors  # type: ignore[attr-defined] # of listed maps only
    colours = np.array(few)[np.arange(ranks) % len(few)]
    owner = outcome.owner.numpy()[view.triangles]
    shared = (owner != owner[:, :1]).any(1)
    faces = np.where(shared[:, None], 1.0, 0.35 + 0.65 * colours[owner[:, 0]])
    width = min(0.4, 20 / len(owner) ** 0.5)
    view.paint(
        panel, faces, lines=np.where(shared[:, None], 0.2, 0.6 * faces), width=width
    )
    nodes = np.bincount(outcome.owner.numpy(), minlength=ranks)
    labels = [f"rank {i}: {nodes[i]} nodes" for i in range(min(ranks, 10))]
    handles = [
        Patch(color=pale, label=label)
        for pale, label in zip(0.35 + 0.65 * colours, labels, strict=False)
    ]
    handles.append(
        Patch(
            facecolor="white", edgecolor=_CUT, label="triangles of more than one rank"
        )
    )
    panel.legend(
        handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False
    )
    panel.set_title("the parts: corners of white triangles are ghosts of one another")


def _draw_problem(panels: Sequence[Axes], view: _View, outcome: Outcome) -> None:
    test, prediction = outcome.test, outcome.run.prediction.double()
    errors = torch.linalg.vector_norm(
        prediction - test.u, dim=0
    ) / torch.linalg.vector_norm(test.u, dim=0)
    which = int(errors.argsort()[len(errors) // 2])
    u, found = test.u[:, which], prediction[:, which]
    low, high = min(u.min(), found.min()).item(), max(u.max(), found.max()).item()
    most = max((found - u).abs().max().item(), 1e-30)
    k, f = conductivity(test.x[:, which, 0]), test.x[:, which, 1]
    rows: list[tuple[str, Tensor, str, float, float]] = [
        ("conductivity k", k, "cividis", k.min().item(), k.max().item()),
        ("source f", f, "PuOr", -1, 1),
        ("u, by finite elements", u, "viridis", low, high),
        ("u, by the network", found, "viridis", low, high),
        (
            f"error: {errors[which].item():.1%}, the median",
            found - u,
            "RdBu_r",
            -most,
            most,
        ),
    ]
    for panel, (title, values, name, least, largest) in zip(panels, rows, strict=True):
        _draw_field(panel, view, values, name, (least, largest))
        panel.set_title(title)


def _draw_field(
    panel: Axes, view: _View, values: Tensor, name: str, limits: tuple[float, float]
) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    colours = ScalarMappable(Normalize(*limits), name)
    view.paint(panel, colours.to_rgba(values.numpy()[view.triangles].mean(1)))
    panel.figure.colorbar(
        colours, ax=panel, location="bottom", shrink=0.8, ticks=MaxNLocator(4)
    )
