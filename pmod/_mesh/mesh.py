"""`Mesh`: named axes over ranks, and the meshes that are made from another one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias, cast
from weakref import WeakValueDictionary

import attrs
import numpy as np
import torch
from torch.overrides import handle_torch_function

from pmod._errors import (
    AxisError,
    PmodError,
    TopologyError,
    near_miss,
    phrase,
    quoted,
)
from pmod._mesh.axis import Axis, Last, is_last, parsed_axes
from pmod._mesh.factors import (
    Factors,
    all_places,
    few,
    indices_of,
    merged,
    place_of,
    places_along,
    size_of,
    take_fastest,
)
from pmod._mesh.fields import check_fields
from pmod._mesh.picture import mesh_html, mesh_text
from pmod._mesh.sizes import check_names, fill_in, number_of, shown_sizes
from pmod._numbers import as_int
from pmod._ranks import place as _place
from pmod._ranks import world
from pmod._ranks.topology import Topology, is_thread
from pmod._ranks.world import DEFAULT_TIMEOUT, Made
from pmod._torch import constant_in_graphs, count_function_modes

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


_meshes: WeakValueDictionary[str, Last[Mesh]] = WeakValueDictionary()


@attrs.frozen(eq=False, repr=False)
class Mesh:
    """Ordered axis names over ranks: the immutable value that gives names a meaning.

    Made by `make_mesh`, or from another mesh by ``mesh[axis]``, `flatten`, `split`,
    `rename`. It compares and hashes by its axes and ranks, not by the process that
    asks; a pickled mesh finds its own place where it is loaded. It holds no process
    group: groups live in one cache keyed by the ranks, and are made on first use by
    their own members only.

    >>> mesh = pmod.make_mesh(data=2, model=2, topology=pmod.Topology(rank=1, world_size=4))
    >>> mesh.shape
    {'data': 2, 'model': 2}
    >>> mesh.coords
    {'data': 0, 'model': 1}
    >>> mesh.axis_names, mesh.size, mesh.device, mesh.topology.rank
    (('data', 'model'), 4, device(type='cpu'), 1)
    >>> mesh["model"].ranks
    array([0, 1])
    """

    axis_names: tuple[str, ...]
    _axes: tuple[Factors, ...]
    _offset: int
    _base: tuple[int, ...] | None
    topology: Topology
    _timeout: float = DEFAULT_TIMEOUT
    _sizes: tuple[int, ...] = attrs.field(init=False)
    _coords: tuple[int, ...] | None = attrs.field(init=False, default=None)
    # `_key` says which mesh it is and which place in it. `_axis_key` is that of all
    # axes flattened, as Axis.parse reads it, and `_axis_keys` are those of each axis by
    # itself; both are empty on a rank outside. Compiled code names meshes and axes by
    # these texts, because torch can guard on a text.
    _key: str = attrs.field(init=False)
    _axis_key: str = attrs.field(init=False, default="")
    _axis_keys: tuple[str, ...] = attrs.field(init=False, default=("",))
    # Every mesh of a key refers to the last one, so that `_meshes` holds it as long as
    # one of them lives.
    _last: Last[Mesh] | None = attrs.field(init=False, default=None)
    # What was looked up once. It is a memo and no state, because it changes no answer;
    # pickles leave it out.
    _bound: dict[object, Axis] = attrs.field(init=False, factory=dict)
    _parts: dict[object, Mesh] = attrs.field(init=False, factory=dict)
    # The calls that were made along its axes: a memo, too, of one connection.
    _made: Made = attrs.field(init=False, factory=Made)

    def __attrs_post_init__(self) -> None:
        check_fields(
            self.axis_names,
            self._axes,
            self._offset,
            self._base,
            self.topology,
            self._timeout,
        )
        set_once = object.__setattr__
        set_once(self, "_axes", tuple(map(merged, self._axes)))
        set_once(self, "_sizes", tuple(map(size_of, self._axes)))
        if self._fits():
            set_once(self, "_coords", self._coords_of(self.topology.rank))
        set_once(self, "_key", self._own_key())
        if self._coords is not None:
            self._bind_axes()
        # Simulated ranks share a process, and one would find the mesh of another.
        if not is_thread(self.topology):
            set_once(self, "_last", is_last(self, self._key, _meshes))

    def _own_key(self) -> str:
        base = None
        if self._base is not None:
            # the list may be as long as the world, and torch compares the key in every
            # call of compiled code
            base = hashlib.sha1(repr(self._base).encode()).hexdigest()
        return repr((self.axis_names, self._axes, self._offset, base, self._coords))

    def _bind_axes(self) -> None:
        """Bind all axes as one and each by itself, and keep their keys."""
        set_once = object.__setattr__
        whole = self.bind(self.label, "make_mesh").key
        set_once(self, "_axis_key", whole)
        keys = [whole]
        if len(self.axis_names) > 1:
            keys = [self.bind(name, "make_mesh").key for name in self.axis_names]
        set_once(self, "_axis_keys", tuple(keys))

    # --- what it is -------------------------------------------------------------------

    @property
    def shape(self) -> dict[str, int]:
        """Axis name -> size, in the order of the axes."""
        return dict(zip(self.axis_names, self._sizes, strict=True))

    @property
    def size(self) -> int:
        """The number of ranks."""
        return math.prod(self._sizes)

    @property
    def ranks(self) -> NDArray[np.int64]:
        """The ranks, one dimension per axis; read-only, int64."""
        ranks = all_places(self._offset, self._axes)
        if self._base is not None:
            ranks = np.asarray(self._base, dtype=np.int64)[ranks]
        ranks.flags.writeable = False
        return ranks

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.topology.device

    @property
    def coords(self) -> dict[str, int] | None:
        """Axis name -> this rank's index; None on a rank outside the mesh.

        Raises: TopologyError where the mesh was loaded in a job that does not have all
        of its ranks.
        """
        # shard_map follows who knows where it is
        if count_function_modes() > 0:
            return handle_torch_function(Mesh._own_coords, (), self)
        return self._own_coords()

    def _own_coords(self) -> dict[str, int] | None:
        """Return `coords`: torch's overrides want a function, not a property."""
        if self._coords is None and not self._fits():
            raise self._misfit("Mesh.coords")
        return self._shown_coords()

    def _shown_coords(self) -> dict[str, int] | None:
        return self._by_name(self._coords)

    def _by_name(self, coords: tuple[int, ...] | None) -> dict[str, int] | None:
        if coords is None:
            return None
        return dict(zip(self.axis_names, coords, strict=True))

    def coords_of(self, rank: int) -> dict[str, int] | None:
        """Return axis name -> the index of `rank`; None where it is outside the mesh.

        >>> mesh = pmod.make_mesh(data=2, model=2, topology=pmod.Topology(rank=1, world_size=4))
        >>> mesh.coords_of(2)
        {'data': 1, 'model': 0}
        """
        number = as_int(rank)
        if number is None:
            raise AxisError(
                phrase(
                    "Mesh.coords_of",
                    f"rank is {quoted(rank)}",
                    "Pass the number of a rank, an int.",
                )
            )
        return self._by_name(self._coords_of(number))

    def _coords_of(self, rank: int) -> tuple[int, ...] | None:
        if self._base is not None:
            if rank not in self._base:
                return None
            rank = self._base.index(rank)
        return indices_of(rank - self._offset, self._axes)

    @property
    def label(self) -> str | tuple[str, ...]:
        """What names all axes at once: the only name, else the tuple of names."""
        if len(self.axis_names) == 1:
            return self.axis_names[0]
        return self.axis_names

    def _fits(self) -> bool:
        """Return whether the job has all ranks; the mesh may come from a larger one."""
        size = self.topology.world_size
        if self._base is not None:
            return int(self.ranks.max()) < size
        return self._ends()[1] < size

    def _misfit(self, function: str, axis: object = None) -> TopologyError:
        here = f"rank {self.topology.rank} of {self.topology.world_size}"
        mine = f"the mesh {self.shape} is over ranks {few(self.ranks)}"
        given = f"{mine}, and this process is {here}"
        right = (
            "A mesh can be loaded where its ranks run. "
            "Make one that fits here, pmod.make_mesh(...), in its place."
        )
        return TopologyError(phrase(function, given, right, axis=axis))

    # --- axes -------------------------------------------------------------------------

    def bind(self, axis: object, function: str) -> Axis:
        """Return the axis (a name, names, a sub-mesh) through this rank.

        `function` is for the error.
        """
        if isinstance(axis, Mesh):
            return axis.bind(axis.label, function)
        label, numbers = self._numbers(axis, function)
        # A list of names is not hashable, so `resolve` does not find it: look again.
        if label in self._bound:
            return self._bound[label]
        if self._coords is None:
            raise self._no_place(axis, function)
        bound = self._axis_along(label, numbers, self._coords)
        if not is_thread(self.topology):
            object.__setattr__(bound, "last", is_last(bound, bound.key, parsed_axes))
        self._bound[label] = bound
        return bound

    def _no_place(self, axis: object, function: str) -> PmodError:
        if not self._fits():
            return self._misfit(function, axis)
        mine = f"the mesh {self.shape} over ranks {few(self.ranks)}"
        given = f"rank {self.topology.rank} is outside {mine}"
        right = (
            "Call it only on ranks that belong to the mesh "
            "(those where mesh.coords is not None)."
        )
        return AxisError(phrase(function, given, right, axis=axis))

    def _axis_along(
        self,
        label: str | tuple[str, ...],
        numbers: list[int],
        coords: tuple[int, ...],
    ) -> Axis:
        """Return the axes of these numbers as one, through the rank at `coords`."""
        offset = self._offset
        for number, factors in enumerate(self._axes):
            if number not in numbers:
                offset += place_of(factors, coords[number])
        parts = tuple([self._sizes[number] for number in numbers])
        return Axis(
            label,
            parts,
            offset,
            merged(self._joined(numbers)),
            self._base,
            number_of([coords[number] for number in numbers], parts),
            tuple(zip(self.axis_names, coords, strict=True)),
            self.topology,
            self._timeout,
            self,
        )

    def _joined(self, numbers: Iterable[int]) -> Factors:
        """Return the factors of several axes as those of one, first axis slowest."""
        joined: Factors = ()
        for number in numbers:
            joined += self._axes[number]
        return joined

    def _numbers(
        self, axis: object, function: str
    ) -> tuple[str | tuple[str, ...], list[int]]:
        """Return the label to show, and the places of the named axes in this mesh."""
        label = axis if isinstance(axis, str) else _names_in(axis)
        if label is None:
            # a mesh may have no axis
            some = ("model", *self.axis_names)[-1]
            raise AxisError(
                phrase(
                    function,
                    f"axis is {quoted(axis)}, a {type(axis).__name__}",
                    f"Pass a name of {self.axis_names}, a tuple of names, "
                    f"or a sub-mesh such as mesh['{some}'].",
                    coords=self._shown_coords(),
                )
            )
        names = (label,) if isinstance(label, str) else label
        for name in names:
            if name not in self.axis_names:
                raise AxisError(
                    phrase(
                        function,
                        f"no axis {name!r}{near_miss(name, self.axis_names)}",
                        f"The mesh has {self.shape}.",
                        axis=axis,
                        coords=self._shown_coords(),
                    )
                )
        if len(set(names)) != len(names):
            raise AxisError(
                phrase(
                    function,
                    "an axis is named twice",
                    "Name each axis once.",
                    axis=axis,
                    coords=self._shown_coords(),
                )
            )
        return label, [self.axis_names.index(name) for name in names]

    def axis_index(self, axis: AxisLike) -> int:
        """Return this rank's index along the axis.

        Of a tuple, that in the flattened group (first name slowest).

        Raises: AxisError for an axis that the mesh lacks, and on a rank outside the
        mesh.

        >>> mesh = pmod.make_mesh(data=2, model=2, topology=pmod.Topology(rank=1, world_size=4))
        >>> mesh.axis_index("model"), mesh.axis_index(("model", "data"))
        (1, 2)
        """
        # shard_map follows who knows where it is
        if count_function_modes() > 0:
            return handle_torch_function(Mesh.axis_index, (), self, axis)
        return self.bind(axis, "Mesh.axis_index").index

    def axis_size(self, axis: AxisLike) -> int:
        """Return the number of ranks along the axis; of a tuple, the product.

        Raises: AxisError for an axis that the mesh lacks.

        >>> mesh = pmod.make_mesh(data=2, model=2, topology=pmod.Topology(rank=1, world_size=4))
        >>> mesh.axis_size("model"), mesh.axis_size(("data", "model"))
        (2, 4)
        """
        if isinstance(axis, Mesh):
            return axis.size
        _, numbers = self._numbers(axis, "Mesh.axis_size")
        return math.prod([self._sizes[number] for number in numbers])

    def group(self, axis: AxisLike) -> ProcessGroup:
        """Return the process group of the axis through this rank, for DDP and others.

        It is made on first use by its own members only; the ranks are in the order of
        the axis. At size 1 it is a one-rank group.
        Raises: AxisError for an axis that the mesh lacks, and on a rank outside the
        mesh.

        >>> pmod.make_mesh(data=1).group("data").size()
        1
        """
        return self.bind(axis, "Mesh.group").group

    def __getitem__(self, axis: str | tuple[str, ...]) -> Mesh:
        if isinstance(axis, Mesh):
            return axis
        if torch.compiler.is_compiling():
            return _constant_part(self._key, axis)
        return self._part(axis)

    def _part(self, axis: str | tuple[str, ...]) -> Mesh:
        label, numbers = self._numbers(axis, "Mesh.__getitem__")
        if label not in self._parts:
            bound = self.bind(axis, "Mesh.__getitem__")
            kept = [(self.axis_names[number], self._axes[number]) for number in numbers]
            self._parts[label] = self._with("Mesh.__getitem__", kept, bound.offset)
        return self._parts[label]

    # --- new meshes from this one -----------------------------------------------------

    def _with(
        self,
        function: str,
        axes: Iterable[tuple[str, Factors]],
        offset: int | None = None,
    ) -> Mesh:
        named = list(axes)
        names = tuple([name for name, _ in named])
        check_names(names, function)
        factors = tuple([factors for _, factors in named])
        start = self._offset if offset is None else offset
        return Mesh(names, factors, start, self._base, self.topology, self._timeout)

    def flatten(self, axes: tuple[str, ...], name: str) -> Mesh:
        """Join axes into one called `name`, first of `axes` slowest.

        It stands where the first of them in the mesh stood.

        Raises: AxisError where the mesh has no such axes, or another of that name.

        >>> mesh = pmod.make_mesh(data=2, model=2, topology=pmod.Topology(rank=0, world_size=4))
        >>> mesh.flatten(("model", "data"), "all").ranks
        array([0, 2, 1, 3])
        """
        names = (axes,) if isinstance(axes, str) else axes
        _, numbers = self._numbers(names, "Mesh.flatten")
        if not numbers:
            raise AxisError(
                phrase(
                    "Mesh.flatten",
                    "no axis is named",
                    "Name one or more axes of the mesh.",
                )
            )
        joined = self._joined(numbers)
        kept: list[tuple[str, Factors]] = []
        for number, old in enumerate(zip(self.axis_names, self._axes, strict=True)):
            if number == min(numbers):
                kept.append((name, joined))
            elif number not in numbers:
                kept.append(old)
        return self._with("Mesh.flatten", kept)

    def split(self, axis: str, **sizes: int) -> Mesh:
        """Cut one axis into several, first slowest; one size may be -1.

        Raises: AxisError where the sizes do not multiply to the axis's.

        >>> mesh = pmod.make_mesh(data=4, topology=pmod.Topology(rank=0, world_size=4))
        >>> mesh.split("data", node=2, local=-1).shape
        {'node': 2, 'local': 2}
        """
        _, (number,) = self._numbers((axis,), "Mesh.split")
        whole = self._sizes[number]
        if not sizes:
            raise AxisError(
                phrase(
                    "Mesh.split",
                    "no size is given",
                    "Name the new axes: split('data', a=2, b=-1).",
                )
            )
        cut = fill_in(sizes, whole, "Mesh.split", f"axis {quoted(axis)} has {whole}")
        parts: list[tuple[str, Factors]] = []
        rest = self._axes[number]
        for name, size in reversed(cut.items()):
            taken, rest = take_fastest(rest, size)
            parts.insert(0, (name, taken))
        old = list(zip(self.axis_names, self._axes, strict=True))
        return self._with("Mesh.split", [*old[:number], *parts, *old[number + 1 :]])

    def rename(self, **old_new: str) -> Mesh:
        """Return the same mesh under other axis names.

        Raises: AxisError for an axis that the mesh lacks, or a name that another axis
        has.

        >>> pmod.make_mesh(data=1, model=1).rename(data="batch").axis_names
        ('batch', 'model')
        """
        self._numbers(tuple(old_new), "Mesh.rename")
        names = (old_new.get(name, name) for name in self.axis_names)
        return self._with("Mesh.rename", zip(names, self._axes, strict=True))

    # --- torch's DeviceMesh -----------------------------------------------------------

    @property
    def device_mesh(self) -> DeviceMesh:
        """A torch ``DeviceMesh`` over the same groups, for DTensor, FSDP2 and DCP.

        Makes the groups of all axes through this rank.
        Raises: AxisError where the mesh has no axis.

        >>> pmod.make_mesh(data=1, model=1).device_mesh.mesh_dim_names
        ('data', 'model')
        """
        # imported here, because that file makes meshes
        from pmod._mesh.device_mesh import device_mesh_of

        return device_mesh_of(self)

    @staticmethod
    def from_device_mesh(device_mesh: DeviceMesh) -> Mesh:
        """Return the mesh with the axes, ranks and groups of a torch ``DeviceMesh``.

        Unnamed axes are called dim0, dim1.

        >>> mesh = pmod.make_mesh(data=1, model=1)
        >>> pmod.Mesh.from_device_mesh(mesh.device_mesh) == mesh
        True
        """
        from pmod._mesh.device_mesh import mesh_of

        return mesh_of(device_mesh)

    # --- value semantics --------------------------------------------------------------

    def _ends(self) -> tuple[int, int]:
        """Return the first and the last rank, without listing the others."""
        first = [0] * len(self._sizes)
        last = [size - 1 for size in self._sizes]
        return self._rank_at(first), self._rank_at(last)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mesh):
            return NotImplemented
        if (self.axis_names, self._sizes) != (other.axis_names, other._sizes):
            return False
        if self._base is None and other._base is None:
            return (self._offset, self._axes) == (other._offset, other._axes)
        return bool(np.array_equal(self.ranks, other.ranks))

    def __hash__(self) -> int:
        return hash((self.axis_names, self._sizes, self._ends()))

    # A mesh is immutable, so it is its own copy. A copy made by way of a pickle would
    # look for a place of its own.
    def __copy__(self) -> Mesh:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Mesh:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        place = world.place_for_child(self.topology)
        fields = (self.axis_names, self._axes, self._offset, self._base, place)
        return _load_mesh, fields

    # --- pictures ---------------------------------------------------------------------

    def __repr__(self) -> str:
        mesh = f"Mesh({shown_sizes(self.shape)})"
        coords = self._shown_coords()
        if coords is not None:
            return f"{mesh} at ({shown_sizes(coords)})"
        if self._fits():
            return f"{mesh} at (outside)"
        here = f"rank {self.topology.rank} of {self.topology.world_size}"
        return f"{mesh}, which does not fit {here}"

    def _rank_at(self, coords: Sequence[int]) -> int:
        place = self._offset + places_along(self._axes, coords)
        if self._base is None:
            return place
        return self._base[place]

    def _node_of(self, rank: int) -> int:
        return rank // self.topology.local_world_size

    def __str__(self) -> str:
        return mesh_text(
            self.axis_names,
            self._sizes,
            self._rank_at,
            coords=self._coords,
            node_of=self._node_of,
        )

    def _repr_html_(self) -> str:
        return mesh_html(
            self.axis_names,
            self._sizes,
            self._rank_at,
            coords=self._coords,
            node_of=self._node_of,
        )


def _names_in(axis: object) -> tuple[str, ...] | None:
    """Return the names of a tuple or a list of names; None of anything else."""
    if not isinstance(axis, tuple | list):
        return None
    items = cast(Sequence[object], axis)
    if all([isinstance(name, str) for name in items]):
        return tuple(cast(Sequence[str], items))
    return None


AxisLike: TypeAlias = str | tuple[str, ...] | Mesh
"""What every ``axis`` argument takes: a name, a tuple of names, or a sub-mesh.

A tuple of names is the flattened group.
"""


@constant_in_graphs
def _constant_part(key: str, axis: str | tuple[str, ...]) -> Mesh:
    """Return the sub-mesh while torch.compile traces.

    It is a constant of the code, which is guarded on both arguments.
    """
    found = _meshes.get(key)
    if found is None:
        raise PmodError(
            phrase(
                "Mesh.__getitem__",
                "a simulated rank runs compiled code",
                "Simulate the eager function.",
                axis=axis,
            )
        )
    return found.value._part(axis)


def _load_mesh(
    names: tuple[str, ...],
    axes: tuple[Factors, ...],
    offset: int,
    base: tuple[int, ...] | None,
    place: _place.Place | None = None,
) -> Mesh:
    return Mesh(names, axes, offset, base, world.here_with(place), world.deadline(None))
