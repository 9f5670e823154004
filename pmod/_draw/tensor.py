"""`draw`: which rank holds what of a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import cast

from torch import Tensor
from torch.nn.parameter import is_lazy

from pmod._core.arguments import as_ints, as_list, as_width, split_sizes
from pmod._draw.held import NO_DIM, Dim, Held, Shown, halo_note, part_of
from pmod._draw.panels import drawn_panels
from pmod._draw.svg import Picture, table
from pmod._errors import (
    ArgumentError,
    AxisError,
    ShapeError,
    near_miss,
    phrase,
    quoted,
)
from pmod._mesh.ambient import given_mesh
from pmod._mesh.mesh import Mesh
from pmod._shard.spec import Entry, P


def draw(
    x: object, spec: P | Iterable[Entry], mesh: Mesh | None = None, *, halo: object = 0
) -> Picture:
    """Draw which rank holds what of a tensor of one to three dims.

    In a notebook it is a picture, elsewhere a table. Nothing is sent, and all ranks
    draw the same.

    x: the whole tensor, or only its shape. spec: a `P`, or its entries. mesh: the
    ambient one by default.
    halo: the rows that each rank also holds of its neighbours, as `width` of
    `halo_exchange`: an int or a pair for all dims that are cut, or a mapping by dim.
    They are hatched.

    Raises: ShapeError if x has another number of dims; AxisError for an axis that the
    mesh does not have, or that is named twice.

    >>> mesh = pmod.make_mesh(data=2, model=2, topology=pmod.Topology(rank=0, world_size=4))
    >>> pmod.draw((5, 4), pmod.P("data", None), mesh)
    (5, 4) by P('data', None) on data=2, model=2: shards of (3, 4) to (2, 4), each on 2 ranks
         0:4
    0:3  0 1
    3:5  2 3
    """
    mesh = given_mesh(mesh, "draw")
    shape = _shape(x)
    spec = _spec(spec)
    held = Held(mesh, _dims(shape, spec, mesh, halo))
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    title = f"{shape} by {spec} on {axes}: {held.summary()}"
    text = "\n".join([title, *_text(held)])
    return Picture(text, drawn_panels(held, title))


def _spec(spec: P | Iterable[Entry]) -> P:
    if isinstance(spec, P):
        return spec
    entries = as_list(spec)
    if entries is None:
        given = f"spec is {quoted(spec)}"
        right = "Pass a pmod.P, or a list of its entries."
        raise ArgumentError(phrase("draw", given, right))
    return P(*entries)


def _shape(x: object) -> tuple[int, ...]:
    lengths = _lengths(x)
    if lengths is None or min(lengths, default=0) < 0:
        given = f"x is a {type(x).__name__}" if lengths is None else f"x is {quoted(x)}"
        raise ArgumentError(phrase("draw", given, "Pass a tensor, or a shape."))
    if not 1 <= len(lengths) <= 3:
        given = f"x has {len(lengths)} dims, {lengths}"
        right = "One to three can be drawn: leave out dims that are not cut."
        raise ShapeError(phrase("draw", given, right))
    return lengths


def _lengths(x: object) -> tuple[int, ...] | None:
    # a lazy parameter has no shape yet; that of a nested tensor is not made of ints
    if isinstance(x, Tensor) and (is_lazy(x) or x.is_nested):
        return None
    return as_ints(getattr(x, "shape", x))


def _dims(shape: tuple[int, ...], spec: P, mesh: Mesh, halo: object) -> list[Dim]:
    _check_halo(halo, spec)
    uncut = len(shape) - len(spec.entries)
    if uncut < 0:
        given = f"spec has {len(spec.entries)} entries, and x has {len(shape)} dims"
        right = "An entry a dim; those left out are None."
        raise ShapeError(phrase("draw", given, right))
    dims: list[Dim] = []
    # a spec may stop early: the dims that it does not mention are whole
    entries = [*spec.entries, *[None] * uncut]
    for dim, entry in enumerate(entries):
        names = _names(entry)
        sizes = _sizes(dim, shape[dim], names, spec, mesh)
        width = _pair(halo, dim) if names else (0, 0)
        dims.append(Dim(shape[dim], names, sizes, width))
    return dims


def _check_halo(halo: object, spec: P) -> None:
    """Raise an error if a halo is given for a dim that is not cut."""
    if not isinstance(halo, Mapping):
        return
    # without a cut no rank has a neighbour: the halo would not be drawn, and not missed
    cut = [dim for dim, entry in enumerate(spec.entries) if entry is not None]
    for dim in cast(Mapping[object, object], halo):
        if dim not in cut:
            given = f"halo names dim {quoted(dim)}, which {spec} does not cut"
            right = "Name dims that an entry cuts, counted from 0."
            raise ShapeError(phrase("draw", given, right))


def _names(entry: Entry) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _sizes(
    dim: int, length: int, names: tuple[str, ...], spec: P, mesh: Mesh
) -> tuple[int, ...]:
    """Return the lengths of the parts that the named axes cut a dim into."""
    for name in names:
        if name not in mesh.shape:
            given = f"no axis {name!r}{near_miss(name, mesh.shape)}"
            raise AxisError(phrase("draw", given, f"The mesh has {mesh.shape}."))
    # a spec is made without a mesh, so only here can its sizes be held against the axes
    cuts = tuple(mesh.shape[name] for name in names)
    parts = math.prod(cuts)
    sizes = tuple(dict(spec.sizes).get(dim) or split_sizes(length, cuts))
    if (len(sizes), sum(sizes)) != (parts, length):
        given = (
            f"sizes of dim {dim} are {sizes}, "
            f"and x.shape[{dim}] is {length}, in {parts} parts"
        )
        right = f"Give {parts} sizes that add up to {length}."
        raise ShapeError(phrase("draw", given, right))
    return sizes


def _pair(halo: object, dim: int) -> tuple[int, int]:
    """Return the rows before and after that a halo has along a dim."""
    of_dim = halo
    if isinstance(halo, Mapping):
        of_dim = cast(Mapping[object, object], halo).get(dim, 0)
    width = as_width(of_dim)
    if width is None:
        right = "A width is 0 or more, or a pair of such."
        raise ShapeError(phrase("draw", f"halo is {quoted(halo)}", right))
    return width


def _text(held: Held) -> list[str]:
    """Return the lines of the picture in letters: a table a panel, then what it lacks."""
    panels, rows, columns = held.grid()
    lines: list[str] = []
    for panel in panels:
        if panel is None:
            lines.append("...")
        else:
            lines.append(table(_cells(held, panel, rows, columns)))
    halo = halo_note(held.dims)
    if halo:
        lines.append(f"and of the neighbours' {halo}")
    return [*lines, *held.empty()]


def _cells(held: Held, panel: int, rows: Shown, columns: Shown) -> list[list[str]]:
    """Return the table of one panel, row by row, with a head and a side."""
    corner = "" if panel == NO_DIM else f"x[{held.dims[0].slice(panel)}]"
    cells = [[corner, *held.heads(columns, "...")]]
    for row, side in zip(rows, held.sides(rows, "..."), strict=True):
        line = [side]
        cells.append(line)
        if row is None:
            continue
        for column in columns:
            gap = column is None
            line.append("..." if gap else held.label(part_of(panel, row, column)))
    return cells
