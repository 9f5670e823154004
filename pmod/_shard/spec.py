"""`P`: which dims of a tensor are cut over which axes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import attrs

from pmod._core.arguments import as_int, as_list
from pmod._errors import AxisError, PmodError, ShapeError, near_miss, phrase, quoted
from pmod._mesh.ambient import given_mesh
from pmod._mesh.mesh import Mesh

if TYPE_CHECKING:
    from torch.distributed.tensor import Placement


Entry: TypeAlias = str | tuple[str, ...] | None
"""What a dim is cut along: nothing, an axis, or several flattened (first name slowest).
"""


def _entry(given: object) -> Entry:
    if given is None:
        return None
    is_several = isinstance(given, tuple | list)
    names = cast(Sequence[object], given) if is_several else (given,)
    parsed = [name for name in names if isinstance(name, str) and name]
    if not parsed or len(parsed) < len(names):
        right = "An entry is None, an axis name, or a tuple of axis names."
        raise AxisError(phrase("P", f"{quoted(given)} is no entry of a spec", right))
    return tuple(parsed) if is_several else parsed[0]


def names_in(entry: Entry) -> tuple[str, ...]:
    """Return the axes that an entry names."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else entry


def _lengths_by_dim(sizes: object) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Return what P holds of `sizes`."""
    parsed = _as_lengths(sizes)
    if parsed is None or min(sum(parsed.values(), (0,))) < 0:
        right = "Pass {dim: one length per rank of its axis}, all of them ints of 0 or more."
        raise ShapeError(phrase("P", f"sizes is {quoted(sizes)}", right))
    return tuple(sorted(parsed.items()))


def _as_lengths(sizes: object) -> dict[int, tuple[int, ...]] | None:
    """Return sizes as ints, None if some are not.

    A float is not cut off: it would say another length.
    """
    if not isinstance(sizes, Mapping):
        return None
    told: dict[int, tuple[int, ...]] = {}
    for key, held in cast(Mapping[object, Iterable[object]], sizes).items():
        dim = as_int(key)
        try:
            lengths = [as_int(length) for length in held]
        except TypeError:
            return None
        if dim is None or None in lengths:
            return None
        told[dim] = tuple(cast(list[int], lengths))
    return told


@attrs.frozen(init=False, repr=False)
class P:
    """How a tensor is held: for each dim an axis that cuts it, several, or None.

    Dims left out are whole.
    Along an axis that no entry names all ranks hold the same. A dim is cut as
    `split_sizes` says: ceil(length / n) each, the last ones shorter or empty; over
    several axes along one after the other, as DTensor cuts. `sizes` gives other
    lengths, {dim: one per rank of its axis}.
    Raises: AxisError where an axis is named twice; ShapeError where sizes are not ints
    of a dim that is cut. JAX: jax.sharding.PartitionSpec, where dims must divide.

    >>> pmod.P("data", None, ("node", "model"))
    P('data', None, ('node', 'model'))
    >>> spec = pmod.P(None, "model", sizes={1: (3, 5)})
    >>> spec.axes, spec.entries, spec.sizes
    (('model',), (None, 'model'), ((1, (3, 5)),))
    """

    entries: tuple[Entry, ...]
    sizes: tuple[tuple[int, tuple[int, ...]], ...]  # (dim, lengths), by dim

    def __init__(
        self,
        *entries: str | Sequence[str] | None,
        sizes: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        parsed = tuple([_entry(entry) for entry in entries])
        lengths = () if sizes is None else _lengths_by_dim(sizes)
        # torch.compile cannot trace the __init__ that attrs would write
        object.__setattr__(self, "entries", parsed)
        object.__setattr__(self, "sizes", lengths)
        seen: set[str] = set()
        for name in self.axes:
            if name in seen:
                given = f"{self} names the axis {name!r} twice"
                raise AxisError(phrase("P", given, "An axis cuts one dim, once."))
            seen.add(name)
        for dim, _ in lengths:
            if not 0 <= dim < len(parsed) or parsed[dim] is None:
                given = f"sizes names dim {dim}, which {self} does not cut"
                right = "Give sizes of the dims that an entry cuts, counted from 0."
                raise ShapeError(phrase("P", given, right))

    @property
    def axes(self) -> tuple[str, ...]:
        """Return the axes named, in the order of the dims."""
        named: list[str] = []
        for entry in self.entries:
            named += names_in(entry)
        return tuple(named)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, dim: int) -> Entry:
        return self.entries[dim]

    def __repr__(self) -> str:
        inside = [repr(entry) for entry in self.entries]
        if self.sizes:
            inside.append(f"sizes={dict(self.sizes)}")
        return f"P({', '.join(inside)})"

    def placements(self, mesh: Mesh) -> tuple[Placement, ...]:
        """Return what DTensor calls the spec on this mesh.

        That is Shard(dim) or Replicate() for each axis of the mesh.
        Raises: ShapeError if the spec has sizes of its own, or flattens axes in another
        order than the mesh has, because DTensor knows neither.

        >>> pmod.P("model").placements(pmod.make_mesh(data=1, model=1))
        (Replicate(), Shard(dim=0))
        """
        from torch.distributed.tensor import Replicate, Shard

        mesh = given_mesh(mesh, "P.placements")
        check_spec(self, [0] * len(self), mesh, "P.placements", "the spec")
        cut: dict[str, int] = {}
        for dim, entry in enumerate(self.entries):
            names = names_in(entry)
            cut |= dict.fromkeys(names, dim)
            if list(names) != sorted(names, key=mesh.axis_names.index):
                given = f"{self} flattens axes in another order than the mesh, which has {mesh.axis_names}"
                right = "Name them in the order of the mesh."
                raise ShapeError(phrase("P.placements", given, right))
        if self.sizes:
            given = f"{self} has sizes of its own"
            right = "Leave sizes out: DTensor cuts as split_sizes says."
            raise ShapeError(phrase("P.placements", given, right))
        placements: list[Placement] = []
        for name in mesh.axis_names:
            if name in cut:
                placements.append(Shard(cut[name]))
            else:
                placements.append(Replicate())
        return tuple(placements)

    @staticmethod
    def from_placements(placements: Sequence[Placement], mesh: Mesh) -> P:
        """Return the spec that DTensor calls so on this mesh.

        placements: one for each axis of the mesh.
        Raises: ShapeError for Partial, which is a sum that is still to be taken, and
        not a way to hold a tensor.

        >>> from torch.distributed.tensor import Replicate, Shard
        >>> pmod.P.from_placements((Replicate(), Shard(1)), pmod.make_mesh(data=1, model=1))
        P(None, 'model')
        """
        from torch.distributed.tensor import Replicate, Shard

        mesh, listed = given_mesh(mesh, "P.from_placements"), as_list(placements)
        if listed is None or len(listed) != len(mesh.axis_names):
            given = f"placements are {quoted(placements)}"
            right = f"Pass one for each axis of the mesh: {mesh.axis_names}."
            raise ShapeError(phrase("P.from_placements", given, right))
        cut: dict[int, list[str]] = {}
        for name, placement in zip(mesh.axis_names, listed, strict=True):
            if type(placement) is Shard:
                cut.setdefault(placement.dim, []).append(name)
            elif type(placement) is not Replicate:
                given = f"{quoted(placement)} along {name!r} is no spec"
                right = "Redistribute to Shard and Replicate first."
                raise ShapeError(phrase("P.from_placements", given, right))
        entries: list[Entry] = []
        for dim in range(max(cut, default=-1) + 1):
            names = cut.get(dim)
            if names is None:
                entries.append(None)
            elif len(names) == 1:
                entries.append(names[0])
            else:
                entries.append(tuple(names))
        return P(*entries)


WHOLE = P()

Specs: TypeAlias = Any
"""A `P`, or a dict, list or tuple of specs: a prefix of the tree that it is for.

None stands for P().
"""


def unfit(
    kind: type[PmodError],
    function: str,
    where: str,
    what: str,
    spec: P,
    shape: Sequence[int],
    mesh: Mesh,
    right: str,
) -> PmodError:
    """Return the error of a spec that does not fit.

    It shows spec, shape and mesh below each other.
    """
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    lengths = ", ".join([str(length) for length in shape])
    given = f"{where}: {what}\n  spec   {spec.__repr__()}\n  shape  ({lengths})\n  mesh   {sizes}"
    return kind(phrase(function, given, right, coords=mesh._shown_coords()))


def check_spec(
    spec: P, shape: Sequence[int], mesh: Mesh, function: str, where: str
) -> None:
    """Raise unless the spec's axes are the mesh's, and the tensor has its dims."""
    shown = tuple(int(length) for length in shape)
    for name in spec.axes:
        if name not in mesh.axis_names:
            what = f"the mesh has no axis {name!r}{near_miss(name, mesh.axis_names)}"
            right = f"Name axes of the mesh: {', '.join(mesh.axis_names)}."
            raise unfit(AxisError, function, where, what, spec, shown, mesh, right)
    if len(spec) > len(shown):
        what = f"the spec has {len(spec)} entries and the tensor {len(shown)} dims"
        right = "Give an entry per dim, or fewer."
        raise unfit(ShapeError, function, where, what, spec, shown, mesh, right)
