"""Where this rank's part lies in a whole: to read it from a file, and to place it.

Nothing here sends anything: a spec, the shape of the whole and the rank's own place in
the mesh say it all.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast, overload

import attrs
import numpy as np
import torch
from torch import Tensor

from pmod._collectives.cuts import BOUNDARIES, Width, too_wide
from pmod._collectives.halo_plan import window
from pmod._core.arguments import as_int, as_ints, as_width
from pmod._errors import ArgumentError, PmodError, ShapeError, near_miss, phrase, quoted
from pmod._mesh.ambient import given_mesh, resolve
from pmod._mesh.mesh import Mesh
from pmod._shard.spec import P, check_spec
from pmod._shard.specs import sizes_of


class _Run(NamedTuple):
    """Rows of the whole, one after another, and where they go in the block.

    One row that goes to a longer place is repeated.
    """

    rows: slice
    place: slice
    reverse: bool


@attrs.frozen
class Block:
    """A shard with rows around it, as `local_slice` finds them in the whole.

    `read(array)` gives what `halo_exchange` would give of the shard. `shape` is the
    shape of that, `slices` are for each dim the rows of the whole that it is made of,
    in the order of the block: one slice, two where a periodic window wraps, three where
    it does so on both sides. `whole` is the shape of the whole.

    >>> def read():
    ...     return pmod.local_slice((5,), pmod.P("data"), halo={0: 1}, boundary="periodic")
    >>> block = pmod.simulate(read, data=2)[0]
    >>> block.shape, block.slices
    ((5,), ((slice(4, 5, None), slice(0, 4, None)),))
    >>> block.read(torch.arange(5) * 10)
    tensor([40,  0, 10, 20, 30])
    """

    whole: tuple[int, ...]
    shape: tuple[int, ...]
    _runs: tuple[tuple[_Run, ...], ...] = attrs.field(repr=False)

    @property
    def slices(self) -> tuple[tuple[slice, ...], ...]:
        """For each dim, the rows of the whole that the block is made of."""
        found: list[tuple[slice, ...]] = []
        for runs in self._runs:
            found.append(tuple([run.rows for run in runs]))
        return tuple(found)

    def read(self, array: Any) -> Any:
        """Return the block: a tensor of a tensor, else a numpy array.

        array: the whole, indexed by slices: a tensor, a numpy memmap, an h5py or a zarr
        array. Only the rows that the block is made of are read.
        Raises: ShapeError if array is not of the shape that `local_slice` was given.
        """
        if tuple(array.shape) != self.whole:
            given = (
                f"array has the shape {tuple(array.shape)} and the whole {self.whole}"
            )
            right = "Pass local_slice the shape of the array that is read."
            raise ShapeError(phrase("Block.read", given, right))
        # rows that no run reaches are zeros, of the dtype in which the array is read
        nothing = array[tuple([slice(0, 0)] * len(self.shape))]
        pieces: list[tuple[tuple[slice, ...], Any]] = []
        for runs in itertools.product(*self._runs):
            piece = array[tuple([run.rows for run in runs])]
            backwards = [dim for dim, run in enumerate(runs) if run.reverse]
            pieces.append(
                (tuple([run.place for run in runs]), _flipped(piece, backwards))
            )
        block = self._zeros([nothing, *[piece for _, piece in pieces]])
        for place, piece in pieces:
            block[place] = piece
        return block

    def _zeros(self, read: Sequence[Any]) -> Any:
        if isinstance(read[0], Tensor):
            return read[0].new_zeros(self.shape)
        dtype = np.result_type(*[np.asanyarray(piece).dtype for piece in read])
        # netCDF4 gives masked arrays, and an array without a mask would drop theirs
        if any(isinstance(piece, np.ma.MaskedArray) for piece in read):
            return np.ma.zeros(self.shape, dtype)
        return np.zeros(self.shape, dtype)


def _flipped(piece: Any, dims: list[int]) -> Any:
    if isinstance(piece, Tensor):
        return piece.flip(dims)
    return np.flip(np.asanyarray(piece), tuple(dims))


@overload
def local_slice(
    shape: Sequence[int],
    spec: P,
    *,
    halo: None = None,
    boundary: str | Mapping[int, str] = "zeros",
    mesh: Mesh | None = None,
) -> tuple[slice, ...]: ...


@overload
def local_slice(
    shape: Sequence[int],
    spec: P,
    *,
    halo: Mapping[int, Width],
    boundary: str | Mapping[int, str] = "zeros",
    mesh: Mesh | None = None,
) -> Block: ...


def local_slice(
    shape: Sequence[int],
    spec: P,
    *,
    halo: Mapping[int, Width] | None = None,
    boundary: str | Mapping[int, str] = "zeros",
    mesh: Mesh | None = None,
) -> tuple[slice, ...] | Block:
    """Return where this rank's shard lies in the whole.

    It is an index for a numpy memmap, an h5py or a zarr array. Reading
    `array[pmod.local_slice(array.shape, spec)]` on every rank gives what `shard` of the
    whole would, and no rank reads more than its part. Nothing is sent.
    halo: {dim: width}, rows before and after or one int for both, of dims that are cut
    or whole. The result is then a `Block`, and `.read(array)` gives the shard with its
    surroundings, what `halo_exchange` would give. boundary: as there, one for all dims
    of halo or {dim: boundary}; periodic rows are read from the other end.
    Raises: ShapeError if the spec has more entries than the shape, or for a width that
    padding the whole would not allow; AxisError if it names an axis that the mesh does
    not have.

    >>> pmod.simulate(lambda: pmod.local_slice((5, 4), pmod.P("data")), data=2)
    [(slice(0, 3, None), slice(0, 4, None)), (slice(3, 5, None), slice(0, 4, None))]
    >>> def read():
    ...     rows = torch.arange(5)
    ...     block = pmod.local_slice(rows.shape, pmod.P("data"), halo={0: 1}, boundary="periodic")
    ...     return block.read(rows)
    >>> pmod.simulate(read, data=2)
    [tensor([4, 0, 1, 2, 3]), tensor([2, 3, 4, 0])]
    """
    mesh = given_mesh(mesh, "local_slice")
    shape, own = _own(shape, spec, mesh, "local_slice")
    if halo is None:
        return tuple([slice(start, end) for start, end in own])
    widths = _by_dim(halo, "halo", len(shape), mesh)
    told = boundary
    if not isinstance(boundary, Mapping):
        told = dict.fromkeys(widths, boundary)
    boundaries = _by_dim(told, "boundary", len(shape), mesh)
    if set(boundaries) != set(widths):
        given = (
            f"boundary names the dims {sorted(boundaries)} and halo {sorted(widths)}"
        )
        right = "Name the same dims in both, or pass one boundary for all."
        raise _wrong(ArgumentError, given, right, mesh)
    runs: list[tuple[_Run, ...]] = []
    lengths: list[int] = []
    for dim, (start, end) in enumerate(own):
        around, ends = (0, 0), "zeros"
        if dim in widths:
            around, ends = _checked(dim, widths[dim], boundaries[dim], shape[dim], mesh)
        low, high = start - around[0], end + around[1]
        runs.append(_runs(low, high, shape[dim], ends))
        lengths.append(high - low)
    return Block(shape, tuple(lengths), tuple(runs))


def local_coords(
    shape: Sequence[int], spec: P, *, mesh: Mesh | None = None
) -> tuple[Tensor, ...]:
    """Return the positions of this rank's points in the whole, for each dim.

    For grids and positional embeddings: `table[positions]`, `positions * spacing`,
    `torch.meshgrid(*positions)`. They are int64, of the dims of the whole shape, and on
    the cpu, so that the worker of a data loader may ask too. Nothing is sent.
    Shapes: one (k,) a dim, k the length of this rank's shard.
    Raises: as `local_slice`.

    >>> pmod.simulate(lambda: pmod.local_coords((5, 2), pmod.P("data")), data=2)
    [(tensor([0, 1, 2]), tensor([0, 1])), (tensor([3, 4]), tensor([0, 1]))]
    """
    mesh = given_mesh(mesh, "local_coords")
    _, own = _own(shape, spec, mesh, "local_coords")
    return tuple([torch.arange(start, end, device="cpu") for start, end in own])


def _wrong(kind: type[PmodError], given: str, right: str, mesh: Mesh) -> PmodError:
    coords = mesh._shown_coords()
    return kind(phrase("local_slice", given, right, coords=coords))


def _own(
    shape: object, spec: object, mesh: Mesh, function: str
) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """Return the whole shape as ints, and this rank's first and end row of each dim."""
    if not isinstance(spec, P):
        given = f"spec is {quoted(spec)}, a {type(spec).__name__}"
        raise ArgumentError(
            phrase(function, given, "Pass a pmod.P.", coords=mesh._shown_coords())
        )
    lengths = as_ints(shape)
    if lengths is None or min(lengths, default=0) < 0:
        right = "Pass a length of 0 or more per dim."
        raise ShapeError(phrase(function, f"shape is {quoted(shape)}", right))
    check_spec(spec, lengths, mesh, function, "shape")
    own = [(0, length) for length in lengths]
    for dim, entry in enumerate(spec.entries):
        if entry is None:
            continue
        axis = resolve(mesh[entry], function)
        sizes = sizes_of(spec, dim, axis, lengths, mesh, function, "shape")
        # not axis.index: a rank that learns where its slice lies goes its own way in a
        # shard_map, which follows who asks for an index
        index = mesh.axis_index(entry)
        start = sum(sizes[:index])
        own[dim] = (start, start + sizes[index])
    return tuple(lengths), own


def _by_dim(given: object, name: str, dims: int, mesh: Mesh) -> dict[int, object]:
    """Return what was given for each dim, counted from 0."""
    if not isinstance(given, Mapping):
        right = f"Pass a mapping, such as {{0: {'1' if name == 'halo' else repr('zeros')}}}."
        raise _wrong(ArgumentError, f"{name} is {quoted(given)}", right, mesh)
    found: dict[int, object] = {}
    for key, value in cast(Mapping[object, object], given).items():
        dim = as_int(key)
        if dim is None or not -dims <= dim < dims:
            text = f"{name} names the dim {quoted(key)} and shape has {dims} dims"
            raise _wrong(ShapeError, text, "Name dims of the whole.", mesh)
        if dim % dims in found:
            text = f"{name} names the dim {dim % dims} twice, as {dim} too"
            raise _wrong(ShapeError, text, "Name each dim once.", mesh)
        found[dim % dims] = value
    return found


def _checked(
    dim: int, width: object, boundary: object, length: int, mesh: Mesh
) -> tuple[tuple[int, int], str]:
    """Return the rows before and after, and what is beyond the ends of the whole."""
    rows = as_width(width)
    if rows is None:
        right = "Pass an int of 0 or more, or two: the rows before and after."
        raise _wrong(ShapeError, f"halo[{dim}] is {quoted(width)}", right, mesh)
    if not isinstance(boundary, str) or boundary not in BOUNDARIES:
        given = f"boundary is {quoted(boundary)}{near_miss(boundary, BOUNDARIES)}"
        right = f"Pass one of {', '.join(map(repr, BOUNDARIES))}."
        raise _wrong(ArgumentError, given, right, mesh)
    limit = too_wide(rows, length, boundary)
    if limit is not None:
        given = f"halo[{dim}] is {quoted(width)} with boundary={boundary!r}, but the whole has {length} rows"
        right = f"Pass a width of at most {limit}, or boundary='zeros'."
        raise _wrong(ShapeError, given, right, mesh)
    return rows, boundary


def _runs(low: int, high: int, total: int, boundary: str) -> tuple[_Run, ...]:
    """Return what the rows low to high - 1 of the padded whole are made of, in order."""
    runs: list[_Run] = []
    for at, (_, start, rows), length, reverse in window(low, high, total, boundary):
        place = slice(at, at + length)
        runs.append(_Run(slice(start, start + rows), place, reverse))
    return tuple(sorted(runs, key=lambda run: run.place.start))
