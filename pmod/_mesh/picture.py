"""Pictures of meshes, as text for terminals and as HTML for notebooks.

A function gives the ranks, and only those that are drawn are asked for, so a mesh of
131,072 ranks costs as much as one of 200.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import NamedTuple, TypeAlias

from pmod._errors import coordinates
from pmod._mesh.sizes import coords_at, number_of, shown_sizes

RankAt: TypeAlias = Callable[[tuple[int, ...]], int]
NodeOf: TypeAlias = Callable[[int], int]

_WIDTH, _ROWS, _COLUMNS = 100, 14, 16


class _Cell(NamedTuple):
    rank: int
    node: int | None
    here: bool
    place: tuple[int, ...]


class _Row(NamedTuple):
    """A row at a place along the outer axes, with None where columns are left out."""

    place: tuple[int, ...]
    cells: list[_Cell | None]

    def present(self) -> list[_Cell]:
        return [cell for cell in self.cells if cell is not None]


def mesh_text(
    names: Sequence[str],
    sizes: Sequence[int],
    rank_at: RankAt,
    *,
    coords: Sequence[int] | None = None,
    node_of: NodeOf | None = None,
    inside: bool = True,
) -> str:
    """Return the mesh as a small table, with this rank in brackets.

    The last axis runs to the right, the others down. A bar stands where the node
    changes. At most 20 lines of 100 columns are drawn, so the middle of a large mesh is
    left out; this rank and the corners never are. `coords` None: this rank is outside;
    inside=False: no rank asks.

    >>> def rank_at(at):
    ...     return 4 * at[0] + at[1]
    >>> print(mesh_text(("data", "model"), (2, 4), rank_at, coords=(0, 2), node_of=lambda rank: rank // 4))
    Mesh(data=2, model=4): 8 ranks, this one at (data=0, model=2)
    data  model 0  1  2  3
       0        0  1 [2] 3   node 0
       1        4  5  6  7   node 1
    """
    title = _title(names, sizes, coords, inside)
    if not names:
        return title
    short = [_clip(name, max(6, 48 // len(names))) for name in names]
    lines: list[str] = []
    # How wide the cells are is known only once the ranks in them are, so columns are
    # left out one by one.
    for columns in range(_COLUMNS, 2, -1):
        shown = _columns(sizes, columns, coords)
        rows = list(_rows(sizes, shown, rank_at, coords, node_of))
        lines = _table(short, shown, rows)
        if max(map(len, lines)) <= _WIDTH:
            break
    return "\n".join([_clip(line.rstrip(), _WIDTH) for line in (title, *lines)])


def mesh_html(
    names: Sequence[str],
    sizes: Sequence[int],
    rank_at: RankAt,
    *,
    coords: Sequence[int] | None = None,
    node_of: NodeOf | None = None,
    inside: bool = True,
) -> str:
    """Return the table of `mesh_text` for notebooks.

    Each node has a colour and each axis a paler one; this rank is in a frame.
    """
    title = f"<div>{escape(_title(names, sizes, coords, inside))}</div>"
    if not names:
        return f"<div>{title}</div>"
    shown = _columns(sizes, _COLUMNS, coords)
    rows = list(_rows(sizes, shown, rank_at, coords, node_of))
    body = [_html_heads(names, shown)]
    for row in rows:
        if row is None:
            gaps = "<td>&#8942;</td>" * (len(names) - 1 + len(shown))
            body.append(f"<tr>{gaps}</tr>")
        else:
            body.append(_html_row(names, row))
    table = f'<table style="border-collapse: collapse">{"".join(body)}</table>'
    return f"<div>{title}{table}{_legend(rows)}</div>"


def _html_heads(names: Sequence[str], columns: Sequence[int | None]) -> str:
    outer = len(names) - 1
    heads = [_head(axis, escape(names[axis])) for axis in range(outer)]
    for index in columns:
        text = "&#8230;"
        if index is not None:
            text = f"{escape(names[-1])}&#160;{index}"
        heads.append(_head(outer, text))
    return f"<tr>{''.join(heads)}</tr>"


def _html_row(names: Sequence[str], row: _Row) -> str:
    cells = [_head(axis, str(index)) for axis, index in enumerate(row.place)]
    for cell in row.cells:
        if cell is None:
            cells.append("<td>&#8230;</td>")
        else:
            cells.append(_html_cell(names, cell))
    return f"<tr>{''.join(cells)}</tr>"


def _title(
    names: Sequence[str],
    sizes: Sequence[int],
    coords: Sequence[int] | None,
    inside: bool,
) -> str:
    mesh = f"Mesh({shown_sizes(dict(zip(names, sizes, strict=True)))})"
    count = math.prod(sizes)
    title = f"{mesh}: {count:,} {'rank' if count == 1 else 'ranks'}"
    if not names or not inside:
        return title
    if coords is None:
        return f"{title}, this one outside"
    place = coordinates(dict(zip(names, coords, strict=True)))
    return f"{title}, this one at {place}"


def _clip(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    return text[: width - 3] + "..."


def _columns(
    sizes: Sequence[int], most: int, coords: Sequence[int] | None
) -> list[int | None]:
    """Return the indices to draw along the last axis, that of this rank among them."""
    return shown_of(sizes[-1], most, coords[-1] if coords else None)


def shown_of(size: int, most: int, keep: int | None = None) -> list[int | None]:
    """Return the indices to draw, None for a gap: all, or both ends and `keep`."""
    if size <= most:
        return list(range(size))
    # One fewer than `most`, so that `keep` has a place in any case.
    ends = (most - 1) // 2
    chosen = {*range(most - 1 - ends), *range(size - ends, size)}
    if keep is not None:
        chosen.add(keep)
    shown: list[int | None] = []
    for index in sorted(chosen):
        if index and index - 1 not in chosen:
            shown.append(None)
        shown.append(index)
    return shown


def _rows(
    sizes: Sequence[int],
    columns: Sequence[int | None],
    rank_at: RankAt,
    coords: Sequence[int] | None,
    node_of: NodeOf | None,
) -> Iterator[_Row | None]:
    """Yield the rows to draw, None for a gap.

    All axes but the last are counted through as one.
    """
    outer = tuple(sizes[:-1])
    here, keep = None, None
    if coords is not None:
        here, keep = tuple(coords), number_of(coords[:-1], outer)
    for number in shown_of(math.prod(outer), _ROWS, keep):
        if number is None:
            yield None
            continue
        place = coords_at(number, outer)
        cells: list[_Cell | None] = []
        for column in columns:
            if column is None:
                cells.append(None)
                continue
            at = (*place, column)
            rank = rank_at(at)
            node = None if node_of is None else node_of(rank)
            cells.append(_Cell(rank, node, at == here, at))
        yield _Row(place, cells)


def _table(
    names: Sequence[str], columns: Sequence[int | None], rows: Sequence[_Row | None]
) -> list[str]:
    """Return the lines of the table, header first."""
    present = [row for row in rows if row is not None]
    width = _width(columns, present)
    several = len(_nodes_of(present)) > 1
    outer = _widths_of_indices(names[:-1], present)
    # "rank" goes below the name where no index does, and needs four columns
    label = names[-1] if outer else f"{names[-1]:4} "
    left = _in_columns(names[:-1], outer)
    heads = [text.rjust(width - 1) for text in map(_index, columns)]
    lines = [f"{left}{label}{' '.join(heads)} "]
    below = ("" if outer else "rank").ljust(len(label))
    last: tuple[int, ...] = ()
    for row in rows:
        if row is None:
            lines.append(" " * (len(left) + len(label)) + "...".rjust(width - 1))
            # after a gap all indices are written again
            last = ()
            continue
        indices = _in_columns(_changed(row.place, last), outer)
        line = f"{indices}{below}{_ranks(row, width)}"
        if several:
            line += f"  {_nodes(row)}"
        lines.append(line)
        last = row.place
    return lines


def _index(index: int | None) -> str:
    return "..." if index is None else str(index)


def _width(columns: Sequence[int | None], rows: Sequence[_Row]) -> int:
    """Return the width of a cell: its longest text, and two for the brackets."""
    texts = list(map(_index, columns))
    for row in rows:
        texts += [str(cell.rank) for cell in row.present()]
    return 2 + max(map(len, texts))


def _widths_of_indices(names: Sequence[str], rows: Sequence[_Row]) -> list[int]:
    """Return the widths of the columns that hold the indices along the outer axes."""
    widths: list[int] = []
    for axis, name in enumerate(names):
        longest = max([len(str(row.place[axis])) for row in rows])
        widths.append(max(len(name), longest))
    return widths


def _in_columns(texts: Sequence[str], widths: Sequence[int]) -> str:
    columns = zip(texts, widths, strict=True)
    return "".join([f"{text.rjust(width)}  " for text, width in columns])


def _changed(place: tuple[int, ...], last: tuple[int, ...]) -> list[str]:
    """Return the indices as texts, "" as long as they are those of the last row.

    So an index is written where it, or one before it, changes.
    """
    texts: list[str] = []
    for axis, index in enumerate(place):
        same = place[: axis + 1] == last[: axis + 1]
        texts.append("" if same else str(index))
    return texts


def _ranks(row: _Row, width: int) -> str:
    """Return the ranks of a row, with a bar before the first of another node."""
    text, node = "", row.present()[0].node
    for cell in row.cells:
        if cell is None:
            text += "...".rjust(width - 1) + " "
            continue
        entry = f"[{cell.rank}]" if cell.here else f"{cell.rank} "
        entry = entry.rjust(width)
        # Where this rank's brackets fill the cell, there is no room for a bar.
        if cell.node != node and entry.startswith(" "):
            entry = f"|{entry[1:]}"
        text += entry
        node = cell.node
    return text


def _nodes(row: _Row) -> str:
    nodes = _nodes_of([row])
    if len(nodes) == 1:
        return f"node {nodes[0]}"
    if len(nodes) < 3:
        return "nodes " + ", ".join(map(str, nodes))
    return f"nodes {nodes[0]} to {nodes[-1]}"


def _nodes_of(rows: Sequence[_Row]) -> list[int]:
    """Return the nodes of these rows in order, as far as they are known."""
    nodes: set[int] = set()
    for row in rows:
        nodes |= {cell.node for cell in row.present() if cell.node is not None}
    return sorted(nodes)


def _head(axis: int, text: str) -> str:
    """Return a name or an index of an axis, on the colour of that axis."""
    background = f"hsl({(45 + 110 * axis) % 360}, 45%, 91%)"
    style = f"color: #111; background: {background}; padding: 2px 8px"
    return f'<th style="{style}">{text}</th>'


def hue_of(number: int) -> float:
    """Return a hue for a number, far from those of the numbers beside it."""
    # the golden angle spreads the hues of however many numbers there are
    return (210 + 137.508 * number) % 360


def _colours(node: int | None) -> str:
    # Text and background are set together, so that either theme leaves them readable.
    hue = hue_of(0 if node is None else node)
    return f"color: #111; background: hsl({hue:.0f}, 65%, 84%)"


def _html_cell(names: Sequence[str], cell: _Cell) -> str:
    place = coordinates(dict(zip(names, cell.place, strict=True)))
    tip = f"rank {cell.rank} at {place}"
    if cell.node is not None:
        tip += f", node {cell.node}"
    frame = "3px solid #d00; font-weight: bold" if cell.here else "1px solid #888"
    style = (
        f"{_colours(cell.node)}; border: {frame}; text-align: right; padding: 2px 8px"
    )
    return f'<td style="{style}" title="{escape(tip)}">{cell.rank}</td>'


def _legend(rows: Sequence[_Row | None]) -> str:
    nodes = _nodes_of([row for row in rows if row is not None])
    if len(nodes) < 2:
        return ""
    chips: list[str] = []
    for node in nodes[:8]:
        style = f"{_colours(node)}; padding: 0 6px"
        chips.append(f'<span style="{style}">node {node}</span>')
    more = " &#8230;" if len(nodes) > 8 else ""
    return f"<div>{' '.join(chips)}{more}</div>"
