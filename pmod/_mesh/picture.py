"""Pictures of meshes, as text for terminals and as HTML for notebooks, from a function
that gives the ranks.

Only what is drawn is asked for: a mesh of 131,072 ranks costs as much as one of 200.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import NamedTuple, TypeAlias

from pmod._errors import coordinates

RankAt: TypeAlias = Callable[[tuple[int, ...]], int]
NodeOf: TypeAlias = Callable[[int], int]

_WIDTH, _ROWS, _COLUMNS = 100, 14, 16


class _Cell(NamedTuple):
    rank: int
    node: int | None
    here: bool
    place: tuple[int, ...]


class _Row(NamedTuple):
    place: tuple[int, ...]  # along all axes but the last
    cells: list[_Cell | None]  # None where columns are left out


def mesh_text(
    names: Sequence[str],
    sizes: Sequence[int],
    rank_at: RankAt,
    *,
    coords: Sequence[int] | None = None,
    node_of: NodeOf | None = None,
    inside: bool = True,
) -> str:
    """The mesh as a small table: the last axis runs to the right, the others down; this
    rank is in brackets.

    A bar stands where the node changes. At most 20 lines of 100 columns, so the middle
    of a large mesh is left out; this rank and the corners never are. `coords` None:
    this rank is outside; inside=False: no rank asks.

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
    for columns in range(_COLUMNS, 2, -1):
        shown = shown_of(sizes[-1], columns, coords[-1] if coords else None)
        lines = _table(
            short, shown, list(_rows(sizes, shown, rank_at, coords, node_of))
        )
        if max(map(len, lines)) <= _WIDTH:
            break
    return "\n".join(_clip(line.rstrip(), _WIDTH) for line in (title, *lines))


def mesh_html(
    names: Sequence[str],
    sizes: Sequence[int],
    rank_at: RankAt,
    *,
    coords: Sequence[int] | None = None,
    node_of: NodeOf | None = None,
    inside: bool = True,
) -> str:
    """The table of `mesh_text` for notebooks: a colour a node and a paler one an axis,
    this rank in a frame.
    """
    title = f"<div>{escape(_title(names, sizes, coords, inside))}</div>"
    if not names:
        return f"<div>{title}</div>"
    shown = shown_of(sizes[-1], _COLUMNS, coords[-1] if coords else None)
    rows = list(_rows(sizes, shown, rank_at, coords, node_of))
    heads = [_head(place, escape(name)) for place, name in enumerate(names[:-1])]
    last = [
        f"{escape(names[-1])}&#160;{index}" if index is not None else "&#8230;"
        for index in shown
    ]
    heads += [_head(len(names) - 1, text) for text in last]
    body = [f"<tr>{''.join(heads)}</tr>"]
    for row in rows:
        if row is None:
            body.append(f"<tr>{'<td>&#8942;</td>' * len(heads)}</tr>")
            continue
        cells = "".join(
            "<td>&#8230;</td>" if cell is None else _html_cell(names, cell)
            for cell in row.cells
        )
        indices = "".join(
            _head(axis, str(index)) for axis, index in enumerate(row.place)
        )
        body.append(f"<tr>{indices}{cells}</tr>")
    table = f'<table style="border-collapse: collapse">{"".join(body)}</table>'
    return f"<div>{title}{table}{_legend(rows)}</div>"


def _title(
    names: Sequence[str],
    sizes: Sequence[int],
    coords: Sequence[int] | None,
    inside: bool,
) -> str:
    axes = ", ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True))
    count = math.prod(sizes)
    title = f"Mesh({axes}): {count:,} {'rank' if count == 1 else 'ranks'}"
    if not names or not inside:
        return title
    place = (
        "outside"
        if coords is None
        else f"at {coordinates(dict(zip(names, coords, strict=True)))}"
    )
    return f"{title}, this one {place}"


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def shown_of(size: int, most: int, keep: int | None = None) -> list[int | None]:
    """Which of `size` indices to draw, None for a gap: all, or both ends and `keep`."""
    if size <= most:
        return list(range(size))
    ends = (most - 1) // 2
    chosen = {
        *range(most - 1 - ends),
        *range(size - ends, size),
        *(() if keep is None else (keep,)),
    }
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
    """The rows to draw, None for a gap; all axes but the last are counted through as
    one.
    """
    outer = tuple(sizes[:-1])
    here = None if coords is None else tuple(coords)
    keep = None if here is None else _count(outer, here[:-1])
    for number in shown_of(math.prod(outer), _ROWS, keep):
        if number is None:
            yield None
            continue
        place = _place(outer, number)
        cells: list[_Cell | None] = []
        for column in columns:
            if column is None:
                cells.append(None)
                continue
            at = (*place, column)
            rank = rank_at(at)
            cells.append(
                _Cell(rank, None if node_of is None else node_of(rank), at == here, at)
            )
        yield _Row(place, cells)


def _count(sizes: Sequence[int], place: Sequence[int]) -> int:
    number = 0
    for size, index in zip(sizes, place, strict=True):
        number = number * size + index
    return number


def _place(sizes: Sequence[int], number: int) -> tuple[int, ...]:
    place: list[int] = []
    for size in reversed(sizes):
        number, index = divmod(number, size)
        place.append(index)
    return tuple(reversed(place))


def _table(
    names: Sequence[str], columns: Sequence[int | None], rows: Sequence[_Row | None]
) -> list[str]:
    """The lines of the table, header first."""
    cells = [cell for row in rows if row for cell in row.cells if cell]
    width = 2 + max(
        3 if None in columns else 1, *(len(str(cell.rank)) for cell in cells)
    )
    width = max(width, *(len(str(column)) + 2 for column in columns))
    several = len({cell.node for cell in cells}) > 1
    outer = [
        max(len(name), *(len(str(row.place[i])) for row in rows if row))
        for i, name in enumerate(names[:-1])
    ]
    label = names[-1] if outer else f"{names[-1]:4} "  # "rank" goes below it
    heads = "".join(
        ("..." if index is None else str(index)).rjust(width - 1) + " "
        for index in columns
    )
    left = "".join(
        name.rjust(size) + "  " for name, size in zip(names, outer, strict=False)
    )
    lines = [f"{left}{label}{heads}"]
    last: tuple[int, ...] = ()
    for row in rows:
        if row is None:
            lines.append(" " * (len(left) + len(label)) + "...".rjust(width - 1))
            last = ()
            continue
        # an index is written where it, or one before it, changes
        same = next(
            (
                i
                for i, (a, b) in enumerate(zip(row.place, last, strict=False))
                if a != b
            ),
            len(last),
        )
        indices = ("" if i < same else str(index) for i, index in enumerate(row.place))
        left = "".join(
            index.rjust(size) + "  " for index, size in zip(indices, outer, strict=True)
        )
        nodes = f"  {_nodes(row)}" if several else ""
        lines.append(
            f"{left}{('' if outer else 'rank').ljust(len(label))}{_ranks(row, width)}{nodes}"
        )
        last = row.place
    return lines


def _ranks(row: _Row, width: int) -> str:
    """The ranks of a row, a bar before the first of another node."""
    text, node = "", next(cell.node for cell in row.cells if cell)
    for cell in row.cells:
        if cell is None:
            text += "...".rjust(width - 1) + " "
            continue
        entry = (f"[{cell.rank}]" if cell.here else f"{cell.rank} ").rjust(width)
        text += (
            entry
            if cell.node == node
            else f"|{entry[1:]}"
            if entry[0] == " "
            else entry
        )
        node = cell.node
    return text


def _nodes(row: _Row) -> str:
    nodes = sorted({cell.node for cell in row.cells if cell and cell.node is not None})
    if len(nodes) < 3:
        return ("node " if len(nodes) == 1 else "nodes ") + ", ".join(map(str, nodes))
    return f"nodes {nodes[0]} to {nodes[-1]}"


def _head(axis: int, text: str) -> str:
    """A name or an index of an axis, on the colour of that axis."""
    background = f"hsl({(45 + 110 * axis) % 360}, 45%, 91%)"
    return f'<th style="color: #111; background: {background}; padding: 2px 8px">{text}</th>'


def _colours(node: int | None) -> str:
    # text and background are set together, so that either theme leaves them readable;
    # the golden angle spreads hues
    hue = 210 if node is None else (210 + 137.508 * node) % 360
    return f"color: #111; background: hsl({hue:.0f}, 65%, 84%)"


def _html_cell(names: Sequence[str], cell: _Cell) -> str:
    tip = (
        f"rank {cell.rank} at {coordinates(dict(zip(names, cell.place, strict=True)))}"
    )
    tip += "" if cell.node is None else f", node {cell.node}"
    frame = "3px solid #d00; font-weight: bold" if cell.here else "1px solid #888"
    style = (
        f"{_colours(cell.node)}; border: {frame}; text-align: right; padding: 2px 8px"
    )
    return f'<td style="{style}" title="{escape(tip)}">{cell.rank}</td>'


def _legend(rows: Sequence[_Row | None]) -> str:
    nodes = sorted(
        {
            cell.node
            for row in rows
            if row
            for cell in row.cells
            if cell and cell.node is not None
        }
    )
    if len(nodes) < 2:
        return ""
    chips = [
        f'<span style="{_colours(node)}; padding: 0 6px">node {node}</span>'
        for node in nodes[:8]
    ]
    return f"<div>{' '.join(chips)}{' &#8230;' if len(nodes) > 8 else ''}</div>"
