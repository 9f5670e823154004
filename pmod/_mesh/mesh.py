"""`Mesh`: named axes over ranks; `Axis`: one axis bound to this rank's place;
`make_mesh`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast
from weakref import WeakValueDictionary

import attrs
import numpy as np
import torch
from torch.overrides import handle_torch_function

from pmod._errors import (
    ArgumentError,
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
    layout,
    merged,
    place_of,
    take_fastest,
)
from pmod._mesh.picture import mesh_html, mesh_text
from pmod._mesh.sizes import check_names, fill_in
from pmod._numbers import as_int, as_ints, as_real
from pmod._ranks import connect, world
from pmod._ranks import groups as _groups
from pmod._ranks import place as _place
from pmod._ranks.topology import MOST_RANKS, Topology, is_thread, warn_of_straddling
from pmod._ranks.world import DEFAULT_TIMEOUT
from pmod._torch import constant_in_graphs, count_function_modes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


_meshes: WeakValueDictionary[str, Last[Mesh]] = WeakValueDictionary()


@attrs.frozen(eq=False, repr=False)
class Mesh:
    """Ordered axis names over an array of ranks: the immutable value that gives axis
    names their meaning.

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
    _coords: tuple[int, ...] | None = attrs.field(init=False)
    _key: str = attrs.field(init=False)  # says which mesh and which place in it
    _axis_key: str = attrs.field(
        init=False
    )  # all axes flattened, as Axis.parse reads it; "" outside
    _axis_keys: tuple[str, ...] = attrs.field(
        init=False
    )  # each axis by itself, likewise
    _last: Last[Mesh] | None = attrs.field(
        init=False, default=None
    )  # of those that share the key
    # what was looked up once: a memo, no state (it changes no answer), and left out of
    # pickles
    _bound: dict[object, Axis] = attrs.field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        _check_made(self)
        set_once = object.__setattr__
        set_once(self, "_axes", tuple(merged(factors) for factors in self._axes))
        set_once(
            self,
            "_sizes",
            tuple(math.prod(size for size, _ in factors) for factors in self._axes),
        )
        set_once(
            self,
            "_coords",
            self._coords_of(self.topology.rank) if self._fits() else None,
        )
        base = (
            None
            if self._base is None
            else hashlib.sha1(repr(self._base).encode()).hexdigest()
        )
        set_once(
            self,
            "_key",
            repr((self.axis_names, self._axes, self._offset, base, self._coords)),
        )
        whole = "" if self._coords is None else self.bind(self.label, "make_mesh").key
        several = self.axis_names if len(self.axis_names) > 1 and whole else ()
        set_once(self, "_axis_key", whole)
        set_once(
            self,
            "_axis_keys",
            tuple(self.bind(name, "make_mesh").key for name in several) or (whole,),
        )
        if not is_thread(self.topology):
            set_once(self, "_last", is_last(self, self._key, _meshes))

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
    def ranks(self) -> np.ndarray[Any, np.dtype[np.int64]]:
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
        if count_function_modes() > 0:  # shard_map follows who knows where it is
            return handle_torch_function(Mesh._own_coords, (), self)
        return self._own_coords()

    def _own_coords(self) -> dict[str, int] | None:
        """`coords`, which is no function."""
        if self._coords is None and not self._fits():
            raise self._misfit("Mesh.coords")
        return self._shown_coords()

    def _shown_coords(self) -> dict[str, int] | None:
        return (
            None
            if self._coords is None
            else dict(zip(self.axis_names, self._coords, strict=True))
        )

    def coords_of(self, rank: int) -> dict[str, int] | None:
        """Axis name -> the index of `rank`; None where it is outside the mesh.

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
        coords = self._coords_of(number)
        return (
            None if coords is None else dict(zip(self.axis_names, coords, strict=True))
        )

    def _coords_of(self, rank: int) -> tuple[int, ...] | None:
        if self._base is not None:
            if rank not in self._base:
                return None
            rank = self._base.index(rank)
        rest = rank - self._offset
        if rest < 0:
            return None
        # strides nest (each is at least the whole extent of the next), so the largest
        # stride is the leading digit
        flat = [
            (stride, size, a, f)
            for a, axis in enumerate(self._axes)
            for f, (size, stride) in enumerate(axis)
        ]
        digits: dict[tuple[int, int], int] = {}
        for stride, size, a, f in sorted(flat, reverse=True):
            digits[a, f], rest = divmod(rest, stride)
            if digits[a, f] >= size:
                return None
        if rest:
            return None
        return tuple(
            sum(
                digits[a, f] * math.prod(size for size, _ in axis[f + 1 :])
                for f in range(len(axis))
            )
            for a, axis in enumerate(self._axes)
        )

    @property
    def label(self) -> str | tuple[str, ...]:
        """What names all axes at once: the name of the only axis, else the tuple of
        names.
        """
        return self.axis_names[0] if len(self.axis_names) == 1 else self.axis_names

    def _fits(self) -> bool:
        """Whether the job has all ranks of the mesh, which may have been saved in a
        larger one.
        """
        last = self._ends()[1] if self._base is None else int(self.ranks.max())
        return last < self.topology.world_size

    def _misfit(self, function: str, axis: object = None) -> TopologyError:
        here = f"rank {self.topology.rank} of {self.topology.world_size}"
        given = f"the mesh {self.shape} is over ranks {few(self.ranks)}, and this process is {here}"
        right = "A mesh can be loaded where its ranks run. Make one that fits here, pmod.make_mesh(...), in its place."
        return TopologyError(phrase(function, given, right, axis=axis))

    # --- axes -------------------------------------------------------------------------

    def bind(self, axis: object, function: str) -> Axis:
        """The axis (a name, a tuple of names, a sub-mesh) through this rank; `function`
        is for the error.
        """
        if isinstance(axis, Mesh):
            return axis.bind(axis.label, function)
        label, numbers = self._numbers(axis, function)
        if (
            label in self._bound
        ):  # asked for by a list of names, which is not hashable: the same axis again
            return self._bound[label]
        if self._coords is None and not self._fits():
            raise self._misfit(function, axis)
        if self._coords is None:
            raise AxisError(
                phrase(
                    function,
                    f"rank {self.topology.rank} is outside the mesh {self.shape} over ranks {few(self.ranks)}",
                    "Call it on the ranks of the mesh only (mesh.coords is not None there).",
                    axis=axis,
                )
            )
        offset = self._offset
        for number, (factors, index) in enumerate(
            zip(self._axes, self._coords, strict=True)
        ):
            if number not in numbers:
                offset += place_of(factors, index)
        factors = merged(
            tuple(factor for number in numbers for factor in self._axes[number])
        )
        index = 0
        for number in numbers:
            index = index * self._sizes[number] + self._coords[number]
        coords = tuple(zip(self.axis_names, self._coords, strict=True))
        parts = tuple(self._sizes[number] for number in numbers)
        bound = Axis(
            label,
            parts,
            offset,
            factors,
            self._base,
            index,
            coords,
            self.topology,
            self._timeout,
            self,
        )
        if not is_thread(self.topology):
            object.__setattr__(bound, "last", is_last(bound, bound.key, parsed_axes))
        self._bound[label] = bound
        return bound

    def _numbers(
        self, axis: object, function: str
    ) -> tuple[str | tuple[str, ...], list[int]]:
        """The label to show, and the places of the named axes in this mesh."""
        names = (axis,) if isinstance(axis, str) else axis
        if not isinstance(names, tuple | list) or not all(
            isinstance(name, str) for name in names
        ):
            raise AxisError(
                phrase(
                    function,
                    f"axis is {quoted(axis)}, a {type(axis).__name__}",
                    f"Pass a name of {self.axis_names}, a tuple of names, or a sub-mesh such as mesh['{self._any()}'].",
                    coords=self._shown_coords(),
                )
            )
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
            coords = self._shown_coords()
            raise AxisError(
                phrase(
                    function,
                    "an axis is named twice",
                    "Name each axis once.",
                    axis=axis,
                    coords=coords,
                )
            )
        return axis if isinstance(axis, str) else tuple(names), [
            self.axis_names.index(name) for name in names
        ]

    def _any(self) -> str:
        return self.axis_names[-1] if self.axis_names else "model"

    def axis_index(self, axis: AxisLike) -> int:
        """This rank's index along the axis; of a tuple, in the flattened group (first
        name slowest).

        Raises: AxisError for an axis that the mesh lacks, and on a rank outside the
        mesh.

        >>> mesh = pmod.make_mesh(data=2, model=2, topology=pmod.Topology(rank=1, world_size=4))
        >>> mesh.axis_index("model"), mesh.axis_index(("model", "data"))
        (1, 2)
        """
        if count_function_modes() > 0:  # shard_map follows who knows where it is
            return handle_torch_function(Mesh.axis_index, (), self, axis)
        return self.bind(axis, "Mesh.axis_index").index

    def axis_size(self, axis: AxisLike) -> int:
        """The number of ranks along the axis; of a tuple, the product.

        Raises: AxisError for an axis that the mesh lacks.

        >>> mesh = pmod.make_mesh(data=2, model=2, topology=pmod.Topology(rank=1, world_size=4))
        >>> mesh.axis_size("model"), mesh.axis_size(("data", "model"))
        (2, 4)
        """
        if isinstance(axis, Mesh):
            return axis.size
        return math.prod(
            self._sizes[number] for number in self._numbers(axis, "Mesh.axis_size")[1]
        )

    def group(self, axis: AxisLike) -> ProcessGroup:
        """The process group of the axis through this rank, for DDP and all else that
        takes one.

        Made on first use by its own members only; the ranks are in the order of the
        axis. At size 1 a one-rank group.
        Raises: AxisError for an axis that the mesh lacks, and on a rank outside the
        mesh.

        >>> pmod.make_mesh(data=1).group("data").size()
        1
        """
        return self.bind(axis, "Mesh.group").group

    def __getitem__(self, axis: str | tuple[str, ...]) -> Mesh:
        if isinstance(axis, Mesh):
            return axis
        return (
            _constant_part(self._key, axis)
            if torch.compiler.is_compiling()
            else self._part(axis)
        )

    def _part(self, axis: str | tuple[str, ...]) -> Mesh:
        _, numbers = self._numbers(axis, "Mesh.__getitem__")
        bound = self.bind(axis, "Mesh.__getitem__")
        kept = [(self.axis_names[number], self._axes[number]) for number in numbers]
        return self._with("Mesh.__getitem__", kept, bound.offset)

    # --- new meshes from this one -----------------------------------------------------

    def _with(
        self,
        function: str,
        axes: Iterable[tuple[str, Factors]],
        offset: int | None = None,
    ) -> Mesh:
        named = list(axes)
        names, factors = (
            tuple(name for name, _ in named),
            tuple(factors for _, factors in named),
        )
        check_names(names, function)
        start = self._offset if offset is None else offset
        return Mesh(names, factors, start, self._base, self.topology, self._timeout)

    def flatten(self, axes: tuple[str, ...], name: str) -> Mesh:
        """Join axes into one called `name`, first of `axes` slowest, at the place of
        the first of them in the mesh.

        Raises: AxisError where the mesh has no such axes, or another of that name.

        >>> mesh = pmod.make_mesh(data=2, model=2, topology=pmod.Topology(rank=0, world_size=4))
        >>> mesh.flatten(("model", "data"), "all").ranks
        array([0, 2, 1, 3])
        """
        _, numbers = self._numbers(
            (axes,) if isinstance(axes, str) else axes, "Mesh.flatten"
        )
        if not numbers:
            raise AxisError(
                phrase(
                    "Mesh.flatten",
                    "no axis is named",
                    "Name one or more axes of the mesh.",
                )
            )
        joined = tuple(factor for number in numbers for factor in self._axes[number])
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
        """The same mesh under other axis names.

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
        """A torch ``DeviceMesh`` over the same process groups, for DTensor, FSDP2 and
        DCP.

        Makes the groups of all axes through this rank.
        Raises: AxisError where the mesh has no axis.

        >>> pmod.make_mesh(data=1, model=1).device_mesh.mesh_dim_names
        ('data', 'model')
        """
        from torch.distributed.device_mesh import DeviceMesh

        if not self.axis_names:
            raise AxisError(
                phrase(
                    "Mesh.device_mesh",
                    "the mesh has no axis",
                    "Make it with one axis or more.",
                )
            )
        groups = [self.group(name) for name in self.axis_names]
        kind = self.device.type
        if len(groups) == 1:
            return DeviceMesh.from_group(
                groups[0],
                kind,
                mesh=self.ranks.tolist(),
                mesh_dim_names=self.axis_names,
            )
        return DeviceMesh.from_group(
            groups,
            kind,
            mesh=torch.from_numpy(self.ranks.copy()),
            mesh_dim_names=self.axis_names,
        )

    @staticmethod
    def from_device_mesh(device_mesh: DeviceMesh) -> Mesh:
        """The mesh with the axes, ranks and process groups of a torch ``DeviceMesh``;
        unnamed axes are dim0, dim1.

        >>> mesh = pmod.make_mesh(data=1, model=1)
        >>> pmod.Mesh.from_device_mesh(mesh.device_mesh) == mesh
        True
        """
        ranks: Any = getattr(device_mesh, "mesh", None)
        if not isinstance(ranks, torch.Tensor):
            given = f"device_mesh is a {type(device_mesh).__name__}"
            raise ArgumentError(
                phrase("Mesh.from_device_mesh", given, "Pass a torch DeviceMesh.")
            )
        names = device_mesh.mesh_dim_names or tuple(
            f"dim{i}" for i in range(ranks.ndim)
        )
        sizes = dict(zip(names, ranks.shape, strict=True))
        mesh = make_mesh(
            sizes, ranks=ranks.reshape(-1).tolist(), topology=_world_topology()
        )
        for number, name in enumerate(names):
            if mesh.coords is not None:
                axis = mesh.bind(name, "Mesh.from_device_mesh")
                group = device_mesh.get_group(number)
                _groups.adopt(
                    axis.group_key, axis.ranks, group, mesh.topology, mesh._timeout
                )
        return mesh

    # --- value semantics --------------------------------------------------------------

    def _ends(self) -> tuple[int, int]:
        """The first and the last rank, without listing the others."""
        last = self._offset + sum(
            place_of(factors, size - 1)
            for factors, size in zip(self._axes, self._sizes, strict=True)
        )
        return (
            (self._offset, last)
            if self._base is None
            else (self._base[self._offset], self._base[last])
        )

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

    def __copy__(self) -> Mesh:
        return self  # immutable; and a copy stays in its place, where a pickle looks for its own

    def __deepcopy__(self, memo: dict[int, Any]) -> Mesh:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        place = world.place_for_child(self.topology)
        return _load_mesh, (
            self.axis_names,
            self._axes,
            self._offset,
            self._base,
            place,
        )

    # --- pictures ---------------------------------------------------------------------

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in self.shape.items())
        if self._coords is None and not self._fits():
            return f"Mesh({sizes}), which does not fit rank {self.topology.rank} of {self.topology.world_size}"
        coords = self._shown_coords()
        place = (
            "outside"
            if coords is None
            else ", ".join(f"{name}={i}" for name, i in coords.items())
        )
        return f"Mesh({sizes}) at ({place})"

    def _rank_at(self, coords: tuple[int, ...]) -> int:
        place = self._offset + sum(
            place_of(factors, index)
            for factors, index in zip(self._axes, coords, strict=True)
        )
        return place if self._base is None else self._base[place]

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


def _check_made(mesh: Mesh) -> None:
    """Raise where someone calls the class with what `make_mesh` would not make it of."""
    names, axes, base = mesh.axis_names, mesh._axes, mesh._base
    offset = as_int(mesh._offset)
    fits = {
        "axis_names": type(names) is tuple and all(type(name) is str for name in names),
        "axes": type(axes) is tuple and all(map(_are_factors, axes)),
        "offset": offset is not None and 0 <= offset <= MOST_RANKS,
        "base": base is None or (type(base) is tuple and as_ints(base) is not None),
        "topology": isinstance(mesh.topology, Topology),  # pyright: ignore[reportUnnecessaryIsInstance]
        "timeout": as_real(mesh._timeout) is not None,
    }
    wrong = [name for name, fit in fits.items() if not fit]
    if not wrong and len(axes) != len(names):
        wrong = ["axes"]
    if (
        not wrong
        and base is not None
        and all_places(mesh._offset, axes).max(initial=0) >= len(base)
    ):
        wrong = ["base"]
    if wrong:
        given = getattr(mesh, wrong[0] if hasattr(mesh, wrong[0]) else f"_{wrong[0]}")
        right = "Make a mesh with pmod.make_mesh, or from another mesh."
        raise ArgumentError(phrase("Mesh", f"{wrong[0]} is {quoted(given)}", right))


def _are_factors(axis: object) -> bool:
    """Whether it is pairs of a size and a stride."""
    if type(axis) is not tuple:
        return False
    pairs = [as_ints(pair) for pair in cast(tuple[Any, ...], axis)]
    return all(pair is not None and len(pair) == 2 and min(pair) >= 1 for pair in pairs)


AxisLike: TypeAlias = str | tuple[str, ...] | Mesh
"""What every ``axis`` argument takes: a name, a tuple of names (the flattened group),
or a sub-mesh.
"""


@constant_in_graphs
def _constant_part(key: str, axis: str | tuple[str, ...]) -> Mesh:
    """While torch.compile traces: the sub-mesh, a constant of the code, which is
    guarded on both arguments.
    """
    found = _meshes.get(key)
    if found is None:
        right = "Simulate the eager function."
        raise PmodError(
            phrase(
                "Mesh.__getitem__",
                "a simulated rank runs compiled code",
                right,
                axis=axis,
            )
        )
    return found.value._part(axis)


def _load_mesh(
    names: Any, axes: Any, offset: int, base: Any, place: _place.Place | None = None
) -> Mesh:
    return Mesh(names, axes, offset, base, world.here_with(place), world.deadline(None))


def make_mesh(
    axes: Mapping[str, int] | None = None,
    /,
    *,
    ranks: Sequence[int] | None = None,
    topology: Topology | None = None,
    timeout: float | None = None,
    **axis_sizes: int,
) -> Mesh:
    """Detect the launcher, connect, and name the axes of parallelism.

    Sizes are given by keyword or as a mapping (for names that are no identifiers),
    slowest axis first; one may be -1, and with no axis at all it is ``data=-1``. Ranks
    fill the mesh in C order, last axis fastest, so that the last axis stays inside a
    node when it fits; a `UserWarning` names an axis that could stay inside a node and
    straddles two.

    ranks: the ranks that the mesh covers, in mesh order; all by default. Elsewhere
    `Mesh.coords` is None and collectives raise `AxisError`. topology: given by hand,
    nothing is connected before the first use. timeout: seconds until a collective gives
    up; by default PMOD_TIMEOUT, else 600.

    A process group that is initialized already is joined and left alone. With one
    process nothing is connected, nor in one that a rank has started with
    multiprocessing (a DataLoader's worker): it gets the mesh at its rank's place, and
    collectives raise TopologyError there. Where it connects ranks that have GPUs, it
    makes this rank's GPU torch's current device.

    Raises: AxisError where the sizes do not multiply to the number of ranks;
    TopologyError where what the launcher says is incomplete.

    >>> pmod.make_mesh()
    Mesh(data=1) at (data=0)
    """
    if not isinstance(axes, Mapping | None) or not isinstance(
        topology, Topology | None
    ):  # pyright: ignore[reportUnnecessaryIsInstance]
        given = (
            f"axes is {quoted(axes)}"
            if not isinstance(axes, Mapping | None)
            else f"topology is {quoted(topology)}"
        )
        raise ArgumentError(
            phrase(
                "make_mesh", given, "Pass {'data': 2} or data=2, and a pmod.Topology."
            )
        )
    sizes = {**(axes or {}), **axis_sizes}
    twice = set(axes or {}) & set(axis_sizes)
    if twice:
        raise AxisError(
            phrase(
                "make_mesh",
                f"axis {min(twice)!r} is given twice",
                "Give each axis once.",
            )
        )
    seconds = world.deadline(timeout)
    by_hand = topology is not None
    place = topology if topology is not None else _world_topology()
    offset, stride, base, count = layout(ranks, place.world_size)
    have = f"the world has {count}" if ranks is None else f"ranks lists {count}"
    sizes = fill_in(sizes or {"data": -1}, count, "make_mesh", have)
    factors: list[Factors] = []
    for size in reversed(sizes.values()):
        factors.insert(0, ((size, stride),))
        stride *= size
    mesh = Mesh(tuple(sizes), tuple(factors), offset, base, place, seconds)
    if base is None and mesh.size == place.world_size:
        warn_of_straddling(sizes, place)
    if not by_hand and world.current().by_processes:
        shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
        if place.world_size > 1 and not world.is_no_rank():
            connect.connect(place, seconds, shown)
        else:
            connect.announce(place, shown)
    return mesh


def _world_topology() -> Topology:
    """What the launcher says, or what torch.distributed was initialized with (some
    launchers say nothing else).
    """
    import torch.distributed as dist

    if (
        not world.current().by_processes or world.here().launcher == "launch"
    ):  # no variable says what these started
        return world.here()
    if not (dist.is_available() and dist.is_initialized()):
        return Topology.detect()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    known = world.here()
    if (known.rank, known.world_size) == (rank, world_size):
        return known
    return Topology(rank=rank, world_size=world_size, device=known.device)
