"""The shards of a tensor as an SVG: a panel for each part along the first of three dims.

Boxes are in proportion to the shards' sizes, unless their letters need more room.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

from attrs import frozen

from pmod._draw.held import NO_DIM, Dim, Held, Shown, halo_note, part_of
from pmod._draw.svg import LINE, Svg, colour, letters

# pixels: the longest side of a panel, and what stands for parts that are left out
_LONGEST = 300.0
_GAP = 26


@frozen
class _Side:
    """The parts along a side of a panel, and how many pixels each takes."""

    parts: Shown
    pixels: list[float]


def drawn_panels(held: Held, title: str) -> str:
    """Return the picture as HTML, with its title above it."""
    svg = Svg()
    panels, rows, columns = held.grid()
    longest = max(dim.length for dim in held.dims[-2:]) or 1
    scale = _LONGEST / longest
    across = _Side(columns, _widths(held, scale))
    down = _Side(rows, _heights(held, rows, scale))
    left, top = 4.0, 4.0
    for panel in panels:
        if panel is None:
            svg.text(left, top + LINE, "...")
        else:
            _panel(svg, held, panel, down, across, left, top)
        left = svg.width + _GAP
    # a panel's own line already says its halo along the first of three dims
    halo = halo_note(held.dims, first=1 if len(held.dims) == 3 else 0)
    if halo:
        note = f"hatched: the neighbour holds it, too ({halo})"
        svg.text(4, svg.height + LINE, note)
    for note in held.empty():
        svg.text(4, svg.height + LINE, note)
    return svg.html(title)


def _widths(held: Held, scale: float) -> list[float]:
    """Return the widths of the columns; the longest label of any box fits in each."""
    panels, rows, columns = held.grid()
    last = held.dims[-1]
    texts = held.heads(columns, gap="…")
    for place in product(panels, rows, columns):
        indices = [index for index in place if index is not None]
        if len(indices) == len(place):
            texts.append(held.label(part_of(*indices)))
    least = max(map(letters, texts)) + 12
    return _pixels(last, columns, least, scale)


def _heights(held: Held, rows: Shown, scale: float) -> list[float]:
    if len(held.dims) == 1:
        return [2.0 * LINE]
    return _pixels(held.dims[-2], rows, LINE + 8, scale)


def _pixels(dim: Dim, parts: Shown, least: float, scale: float) -> list[float]:
    """Share the dim's length on the page between the parts that are shown."""
    length = scale * dim.length
    total = sum(dim.sizes[part] for part in parts if part is not None)
    pixels: list[float] = []
    for part in parts:
        if part is None:
            pixels.append(_GAP)
        else:
            pixels.append(max(least, length * dim.sizes[part] / max(total, 1)))
    return pixels


def _panel(
    svg: Svg,
    held: Held,
    panel: int,
    rows: _Side,
    columns: _Side,
    left: float,
    top: float,
) -> None:
    """Draw the shards of one part along dim 0 of a tensor of three dims; else all."""
    if panel != NO_DIM:
        first = held.dims[0]
        head = f"x[{first.slice(panel)}]{first.with_halo(panel)}"
        svg.text(left, top + LINE / 2, head, bold=True)
        top += LINE
    sides = held.sides(rows.parts, gap="⋮")
    x0 = left + max(map(letters, sides)) + 8
    y0 = top + LINE
    x, y = x0, y0
    heads = held.heads(columns.parts, gap="…")
    for head, width in zip(heads, columns.pixels, strict=True):
        svg.text(x + width / 2, top + LINE / 2, head, anchor="middle")
        x += width
    for row, side, height in zip(rows.parts, sides, rows.pixels, strict=True):
        svg.text(x0 - 6, y + height / 2, side, anchor="end")
        if row is not None:
            _row(svg, held, (panel, row), columns, (x0, y, height))
        y += height
    if len(held.dims) > 1:
        _hatch(svg, held.dims[-2], rows, y0, (x0, sum(columns.pixels)), down=True)
    _hatch(svg, held.dims[-1], columns, x0, (y0, sum(rows.pixels)), down=False)


def _row(
    svg: Svg,
    held: Held,
    place: tuple[int, int],
    columns: _Side,
    corner: tuple[float, float, float],
) -> None:
    """Draw the boxes of one row.

    place: its panel and its row. corner: where it begins, and its height.
    """
    x, y, height = corner
    for column, width in zip(columns.parts, columns.pixels, strict=True):
        if column is not None:
            part = part_of(*place, column)
            fill = _fill(held, part)
            svg.box(x, y, width, height, fill, held.label(part), held.tip(part))
        x += width


def _fill(held: Held, part: Sequence[int]) -> str:
    """Return a hue for the place along the dim that is cut first, paler for the next."""
    cut: list[int] = []
    for dim, index in zip(held.dims, part, strict=True):
        if len(dim.sizes) > 1:
            cut.append(index)
    return colour(*cut[-2:]) if cut else colour(0)


def _hatch(
    svg: Svg,
    dim: Dim,
    side: _Side,
    start: float,
    across: tuple[float, float],
    *,
    down: bool,
) -> None:
    """Hatch both sides of each cut along a dim.

    The part after a cut holds some of the one before it, and the other way round. start:
    where the side begins. across: where the hatching begins, and how far it reaches.
    """
    before, after = dim.halo
    cut = start
    for (part, pixels), (following, more) in pairwise(
        zip(side.parts, side.pixels, strict=True)
    ):
        cut += pixels
        if part is None or following is None:
            continue
        # a halo wider than a shard ends with it
        back = pixels * min(1.0, before / dim.sizes[part])
        ahead = more * min(1.0, after / dim.sizes[following])
        if not back + ahead:
            continue
        if down:
            svg.hatch(across[0], cut - back, across[1], back + ahead)
        else:
            svg.hatch(cut - back, across[0], back + ahead, across[1])
