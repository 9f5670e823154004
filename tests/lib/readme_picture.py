"""The README's picture, made of what `draw_collective` draws: `python -m tests.lib.readme_picture` writes it anew."""

# pyright: standard

from __future__ import annotations

import re
from pathlib import Path

import pmod

PATH = Path(__file__).parents[2] / "notebooks" / "images" / "collectives.svg"
SHOWN = ("psum", "pvary", "shard", "unshard", "all_gather", "psum_scatter", "all_to_all", "pshift")
COLUMNS, WIDTH, HEIGHT = 2, 430, 118


def picture() -> str:
    """Each collective on the two ranks of an axis, before and after, with its signature and its transpose."""
    mesh = pmod.make_mesh(model=2, topology=pmod.Topology(rank=0, world_size=2))
    cells: list[str] = []
    for i, name in enumerate(SHOWN):
        drawn = pmod.draw_collective(name, mesh, "model")
        title = drawn.text.split("\n")[0].replace(" along 'model'", "").replace("->", "→")
        (svg,) = re.findall(r"<svg.*</svg>", drawn.html)
        x, y = 10 + i % COLUMNS * WIDTH, 24 + i // COLUMNS * HEIGHT
        cells.append(f'<text x="{x}" y="{y}" font-weight="bold" font-size="14">{title}</text>')
        cells.append(svg.replace("<svg ", f'<svg x="{x}" y="{y + 8}" ', 1))
    width, height = COLUMNS * WIDTH, 10 + -(-len(SHOWN) // COLUMNS) * HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace">'
        f'<rect width="{width}" height="{height}" fill="#fff"/>{"".join(cells)}</svg>\n'
    )


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(picture())
