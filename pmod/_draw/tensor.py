"""`draw`: which rank holds what of a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, islice, pairwise, product
from typing import Any

from attrs import frozen
from torch import Tensor
from torch.nn.parameter import is_lazy

from pmod._core.arguments import as_width, split_sizes
from pmod._draw.svg import LINE, Picture, Svg, colour, letters, table
from pmod._errors import (
    ArgumentError,
    AxisError,
    ShapeError,
    coordinates,
    near_miss,
    phrase,
    quoted,
)
from pmod._mesh.ambient import given_mesh
from pmod._mesh.mesh import Mesh
from pmod._mesh.picture import shown_of
from pmod._numbers import as_ints, as_list
from pmod._shard.spec import Entry, P

_MOST = (8, 14, 12)  # panels, rows and columns of shards that are drawn of a large mesh
_AREA = 300.0  # pixels: the longest side of a panel, unless letters need more
_GAP = 26  # pixels of what is left out, and between panels


@frozen
class _Dim:
    """A dim and what cuts it."""

    length: int
    names: tuple[str, ...]
    sizes: tuple[int, ...]  # of its parts
    halo: tuple[int, int]  # what a part holds of those before and after it

    @property
    def cuts(self) -> list[int]:
        """Where the parts begin, and the end."""
        return [0, *accumulate(self.sizes)]

    def slice(self, part: int) -> str:
        """`0:3`."""
        return f"{self.cuts[part]}:{self.cuts[part + 1]}"

    def with_halo(self, part: int) -> str:
        """` with its halo x[0:4]`."""
        first, last = (
            max(0, self.cuts[part] - self.halo[0]),
            min(self.length, self.cuts[part + 1] + self.halo[1]),
        )
        return f" with its halo x[{first}:{last}]" if any(self.halo) else ""


def draw(
    x: Any, spec: P | Iterable[Entry], mesh: Mesh | None = None, *, halo: Any = 0
) -> Picture:
    """Which rank holds what of a tensor of one to three dims: a picture in a notebook,
    a table elsewhere.

    x: a tensor, or only its shape, of the whole. spec: a `P`, or its entries. mesh: the
    ambient one by default.
    halo: the rows that each rank holds of its neighbours, too, as `width` of
    `halo_exchange`: an int or a pair for all cut dims, or a mapping by dim; hatched.

    Nothing is sent; the picture is the same on all ranks.
    Raises: ShapeError for another number of dims, AxisError for an axis that the mesh
    lacks or that is named twice.

    >>> mesh = pmod.make_mesh(data=2, model=2, topology=pmod.Topology(rank=0, world_size=4))
    >>> pmod.draw((5, 4), pmod.P("data", None), mesh)
    (5, 4) by P('data', None) on data=2, model=2: shards of (3, 4) to (2, 4), each on 2 ranks
         0:4
    0:3  0 1
    3:5  2 3
    """
    mesh, shape = given_mesh(mesh, "draw"), _shape(x)
    if not isinstance(spec, P):
        entries = as_list(spec)
        if entries is None:
            raise ArgumentError(
                phrase(
                    "draw",
                    f"spec is {quoted(spec)}",
                    "Pass a pmod.P, or a list of its entries.",
                )
            )
        spec = P(*entries)
    held = _Held(mesh, _dims(shape, spec, mesh, halo))
    title = f"{shape} by {spec} on {', '.join(f'{n}={s}' for n, s in mesh.shape.items())}: {held.summary()}"
    return Picture("\n".join([title, *_text(held)]), _html(held, title))


def _shape(x: Any) -> tuple[int, ...]:
    shapeless = isinstance(x, Tensor) and (is_lazy(x) or x.is_nested)
    lengths = None if shapeless else as_ints(getattr(x, "shape", x))
    if lengths is None or min(lengths, default=0) < 0:
        given = f"x is a {type(x).__name__}" if lengths is None else f"x is {quoted(x)}"
        raise ArgumentError(phrase("draw", given, "Pass a tensor, or a shape."))
    if not 1 <= len(lengths) <= 3:
        given = f"x has {len(lengths)} dims, {lengths}"
        raise ShapeError(
            phrase(
                "draw",
                given,
                "One to three can be drawn: leave out dims that are not cut.",
            )
        )
    return lengths


def _dims(shape: tuple[int, ...], spec: P, mesh: Mesh, halo: Any) -> list[_Dim]:
    entries, sizes = spec.entries, dict(spec.sizes)
    uncut = (
        [dim for dim in halo if dim not in _cut_dims(spec)]
        if isinstance(halo, Mapping)
        else []
    )
    if uncut:
        given = f"halo names dim {quoted(uncut[0])}, which {spec} does not cut"
        raise ShapeError(
            phrase("draw", given, "Name dims that an entry cuts, counted from 0.")
        )
    if len(entries) > len(shape):
        given = f"spec has {len(entries)} entries, and x has {len(shape)} dims"
        raise ShapeError(
            phrase("draw", given, "An entry a dim; those left out are None.")
        )
    dims: list[_Dim] = []
    for dim, length in enumerate(shape):
        entry = entries[dim] if dim < len(entries) else None
        names: tuple[str, ...] = (
            ()
            if entry is None
            else (entry,)
            if isinstance(entry, str)
            else tuple(entry)
        )
        for name in names:
            if name not in mesh.shape:
                given = f"no axis {name!r}{near_miss(name, mesh.shape)}"
                raise AxisError(phrase("draw", given, f"The mesh has {mesh.shape}."))
        cuts = tuple(mesh.shape[name] for name in names)
        parts = math.prod(cuts)
        lengths = tuple(sizes.get(dim) or split_sizes(length, cuts))
        if (len(lengths), sum(lengths)) != (parts, length):
            given = f"sizes of dim {dim} are {lengths}, and x.shape[{dim}] is {length}, in {parts} parts"
            raise ShapeError(
                phrase("draw", given, f"Give {parts} sizes that add up to {length}.")
            )
        dims.append(_Dim(length, names, lengths, _pair(halo, dim) if names else (0, 0)))
    return dims


def _pair(halo: Any, dim: int) -> tuple[int, int]:
    width = as_width(halo.get(dim, 0) if isinstance(halo, Mapping) else halo)
    if width is None:
        raise ShapeError(
            phrase(
                "draw",
                f"halo is {quoted(halo)}",
                "A width is 0 or more, or a pair of such.",
            )
        )
    return width


def _cut_dims(spec: P) -> list[int]:
    return [dim for dim, entry in enumerate(spec.entries) if entry is not None]


@frozen
class _Held:
    """Who holds which part; asked only for what is drawn."""

    mesh: Mesh
    dims: list[_Dim]

    @property
    def copies(self) -> int:
        """How many ranks hold each part."""
        return self.mesh.size // math.prod(len(dim.sizes) for dim in self.dims)

    def ranks(self, part: Sequence[int]) -> Iterator[int]:
        """Those that hold this part, in the order of the mesh."""
        fixed: dict[str, int] = {}
        for dim, index in zip(self.dims, part, strict=True):
            for name in reversed(dim.names):
                index, fixed[name] = divmod(index, self.mesh.shape[name])
        ranges = [
            [fixed[name]] if name in fixed else range(size)
            for name, size in self.mesh.shape.items()
        ]
        return (self.mesh._rank_at(place) for place in product(*ranges))

    def label(self, part: Sequence[int]) -> str:
        """`0 2`, or `0 2 ..` where there are many."""
        shown = " ".join(str(rank) for rank in islice(self.ranks(part), 3))
        return shown if self.copies <= 3 else f"{shown} .."

    def tip(self, part: Sequence[int]) -> str:
        """`x[0:3, 4:8] on rank 1 (data=0, model=1)`."""
        where = ", ".join(
            dim.slice(index) for dim, index in zip(self.dims, part, strict=True)
        )
        ranks = list(islice(self.ranks(part), 4))
        names = [
            f"rank {rank} {coordinates(self.mesh.coords_of(rank))}" for rank in ranks
        ]
        more = (
            f" and {self.copies - len(ranks)} more" if self.copies > len(ranks) else ""
        )
        return f"x[{where}] on {', '.join(names)}{more}"

    def summary(self) -> str:
        """The sizes of the parts, and on how many ranks each is."""
        largest, smallest = (
            tuple(pick(dim.sizes) for dim in self.dims) for pick in (max, min)
        )
        several = math.prod(len(dim.sizes) for dim in self.dims) > 1
        sizes = str(largest) if largest == smallest else f"{largest} to {smallest}"
        copies = f", each on {self.copies} ranks" if self.copies > 1 else ""
        return (
            f"shards of {sizes}{copies}"
            if several
            else f"all of it on {self.copies} ranks"
        )

    def empty(self) -> str:
        """Which ranks hold nothing, "" where there is none."""
        if all(map(all, (dim.sizes for dim in self.dims))):
            return ""
        parts = (
            p
            for p in product(*(range(len(d.sizes)) for d in self.dims))
            if self._is_empty(p)
        )
        few = list(islice((rank for part in parts for rank in self.ranks(part)), 9))
        return (
            f"nothing on ranks {' '.join(map(str, few[:8]))}{' ..' if len(few) > 8 else ''}"
            if few
            else ""
        )

    def _is_empty(self, part: Sequence[int]) -> bool:
        return any(
            dim.sizes[index] == 0 for dim, index in zip(self.dims, part, strict=True)
        )

    def grid(self) -> list[list[int | None]]:
        """The parts to draw along panels, rows and columns; None for what is left out,
        [-1] for a dim that is not.
        """
        shown: list[list[int | None]] = [[-1]] * (3 - len(self.dims))
        for dim, most in zip(self.dims, _MOST[3 - len(self.dims) :], strict=True):
            kept = [index for index, size in enumerate(dim.sizes) if size] or [0]
            shown.append(
                [
                    None if index is None else kept[index]
                    for index in shown_of(len(kept), most)
                ]
            )
        return shown


def _part(*indices: int) -> list[int]:
    return [index for index in indices if index != -1]


def _text(held: _Held) -> list[str]:
    panels, rows, columns = held.grid()
    lines: list[str] = []
    for panel in panels:
        if panel is None:
            lines.append("...")
            continue
        corner = f"x[{held.dims[0].slice(panel)}]" if panel != -1 else ""
        heads = [
            "..." if column is None else held.dims[-1].slice(column)
            for column in columns
        ]
        cells: list[list[str]] = [[corner, *heads]]
        for row in rows:
            if row is None:
                cells.append(["..."])
                continue
            side = "rank" if row == -1 else held.dims[-2].slice(row)
            cells.append(
                [
                    side,
                    *(
                        "..." if c is None else held.label(_part(panel, row, c))
                        for c in columns
                    ),
                ]
            )
        lines.append(table(cells))
    halo = _halo_note(held)
    notes = [f"and of the neighbours' {halo}" if halo else "", held.empty()]
    return [*lines, *(note for note in notes if note)]


def _halo_note(held: _Held, first: int = 0) -> str:
    """`1 before and 1 after along dim 0`, of the dims from the first."""
    widths = list(enumerate(dim.halo for dim in held.dims))[first:]
    return ", ".join(
        f"{b} before and {a} after along dim {dim}" for dim, (b, a) in widths if b or a
    )


def _lengths(
    dim: _Dim | None, shown: Sequence[int | None], least: float, area: float
) -> list[float]:
    """The pixels of the parts, in proportion to their sizes where letters leave the
    room.
    """
    if dim is None:
        return [max(least, 2 * LINE)]
    total = sum(dim.sizes[index] for index in shown if index is not None)
    return [
        _GAP if index is None else max(least, area * dim.sizes[index] / max(total, 1))
        for index in shown
    ]


def _html(held: _Held, title: str) -> str:
    svg = Svg()
    panels, rows, columns = held.grid()
    two = len(held.dims) > 1
    longest = max(dim.length for dim in held.dims[-2:]) or 1
    labels = [
        held.label(_part(p, r, c))
        for p in panels
        for r in rows
        for c in columns
        if None not in (p, r, c)
    ]  # type: ignore[arg-type]
    heads = [held.dims[-1].slice(column) for column in columns if column is not None]
    least = max(map(letters, [*labels, *heads]), default=0.0) + 12
    widths = _lengths(
        held.dims[-1], columns, least, _AREA * held.dims[-1].length / longest
    )
    tall = held.dims[-2] if two else None
    heights = _lengths(
        tall, rows, LINE + 8, _AREA * tall.length / longest if tall else 0
    )
    left, top = 4.0, 4.0
    for panel in panels:
        if panel is None:
            svg.text(left, top + LINE, "...")
            left = svg.width + _GAP
            continue
        _panel(svg, held, panel, (rows, heights), (columns, widths), left, top)
        left = svg.width + _GAP
    halo = _halo_note(
        held, len(held.dims) == 3
    )  # along the first of three, panels say it
    for note in (
        f"hatched: the neighbour holds it, too ({halo})" if halo else "",
        held.empty(),
    ):
        if note:
            svg.text(4, svg.height + LINE, note)
    return svg.html(title)


_Side = tuple[Sequence["int | None"], Sequence[float]]


def _panel(
    svg: Svg,
    held: _Held,
    panel: int,
    rows: _Side,
    columns: _Side,
    left: float,
    top: float,
) -> None:
    """The shards of one part along dim 0 of a tensor of three dims; else all."""
    if panel != -1:
        svg.text(
            left,
            top + LINE / 2,
            f"x[{held.dims[0].slice(panel)}]{held.dims[0].with_halo(panel)}",
            bold=True,
        )
        top += LINE
    sides = [
        "rank" if row == -1 else "" if row is None else held.dims[-2].slice(row)
        for row in rows[0]
    ]
    x0, y0 = left + max(map(letters, sides)) + 8, top + LINE
    y = y0
    for row, side, height in zip(rows[0], sides, rows[1], strict=True):
        svg.text(x0 - 6, y + height / 2, side or "⋮", anchor="end")
        x = x0
        for column, width in zip(columns[0], columns[1], strict=True):
            if row == rows[0][0]:
                head = "…" if column is None else held.dims[-1].slice(column)
                svg.text(x + width / 2, top + LINE / 2, head, anchor="middle")
            if row is not None and column is not None:
                part = _part(panel, row, column)
                svg.box(
                    x,
                    y,
                    width,
                    height,
                    _fill(held, part),
                    held.label(part),
                    held.tip(part),
                )
            x += width
        y += height
    if len(held.dims) > 1:
        _hatch(svg, held.dims[-2], rows, y0, (x0, sum(columns[1])), down=True)
    _hatch(svg, held.dims[-1], columns, x0, (y0, sum(rows[1])), down=False)


def _fill(held: _Held, part: Sequence[int]) -> str:
    """A hue along the dim that is cut first, paler along the next."""
    cut = [
        index for dim, index in zip(held.dims, part, strict=True) if len(dim.sizes) > 1
    ]
    return colour(*cut[-2:]) if cut else colour(0)


def _hatch(
    svg: Svg,
    dim: _Dim,
    side: _Side,
    start: float,
    across: tuple[float, float],
    *,
    down: bool,
) -> None:
    """Both sides of each cut: what the part after it holds of the one before it, and
    the other way round.
    """
    before, after = dim.halo
    at = start
    for (index, pixels), (following, more) in pairwise(zip(*side, strict=True)):
        at += pixels
        if index is None or following is None:
            continue
        back = pixels * min(1.0, before / dim.sizes[index])
        ahead = more * min(1.0, after / dim.sizes[following])
        if back + ahead:
            along = (at - back, across[0], back + ahead, across[1])
            svg.hatch(*((along[1], along[0], along[3], along[2]) if down else along))
