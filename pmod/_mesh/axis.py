"""One axis, or several as one, as a rank sees it: what every collective is bound to."""

from __future__ import annotations

import ast
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Generic, TypeVar
from weakref import WeakValueDictionary

import attrs

from pmod._mesh.factors import Factors, all_places, size_of
from pmod._ranks import groups, world
from pmod._ranks.topology import Topology
from pmod._site import call_site

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from pmod._mesh.mesh import Mesh


T = TypeVar("T")


@attrs.frozen(eq=False)
class Axis:
    """An axis (or several flattened) through this rank: what a collective runs over.

    `key` says all of it but the device as a text that can be read back (`Axis.parse`):
    what torch.compile puts into its graphs, which may be run by another process than
    the one that traced them. `group_key` names ranks and order only.
    """

    label: str | tuple[str, ...]
    # The size of each axis that the label names, because a dim is cut along one after
    # the other.
    parts: tuple[int, ...]
    offset: int
    factors: Factors
    base: tuple[int, ...] | None
    index: int
    coords: tuple[tuple[str, int], ...]
    # Both are those of the mesh that it was taken from.
    topology: Topology
    timeout: float
    mesh: Mesh | None = attrs.field(default=None, repr=False)
    # All axes of a key refer to the last one, so that `parsed_axes` holds it as long as
    # one of them lives.
    last: Last[Axis] | None = attrs.field(init=False, default=None, repr=False)
    size: int = attrs.field(init=False)
    key: str = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "size", size_of(self.factors))
        fields = (
            self.label,
            self.parts,
            self.offset,
            self.factors,
            self.base,
            self.index,
            self.coords,
        )
        object.__setattr__(self, "key", repr(fields))

    @property
    def ranks(self) -> list[int]:
        """The ranks in the order of the axis."""
        places = all_places(self.offset, (self.factors,)).reshape(-1).tolist()
        if self.base is None:
            return places
        return [self.base[place] for place in places]

    @cached_property
    def group_key(self) -> str:
        """The ranks and their order, as one text however the axis was made."""
        if self.base is None and len(self.factors) <= 1:
            step = self.factors[0][1] if self.factors else 1
            return f"{self.offset}:{self.size}:{step}"
        # A list of ranks at even steps must have the key that arithmetic gives, or the
        # same ranks would get two groups.
        ranks = self.ranks
        steps = {b - a for a, b in pairwise(ranks)} or {1}
        if len(steps) > 1:
            return repr(ranks)
        return f"{ranks[0]}:{len(ranks)}:{steps.pop()}"

    @property
    def group(self) -> ProcessGroup:
        """The process group over these ranks, made on first use."""
        return groups.group_of(
            self.group_key, lambda: self.ranks, self.topology, self.timeout
        )

    @staticmethod
    def parse(key: str) -> Axis:
        """Return the axis that `key` was written for, at this process's place."""
        found = parsed_axes.get(key)
        if found is not None:
            return found.value
        return _read_axis(key, world.here(), world.deadline(None))

    # As a mesh, it is its own copy.
    def __deepcopy__(self, memo: dict[int, object]) -> Axis:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        if self.mesh is None:
            return Axis.parse, (self.key,)
        return _load_axis, (self.mesh, self.label)


def named(label: str | tuple[str, ...]) -> str:
    """Return the name of an axis or of a tuple of axes, in a word."""
    return label if isinstance(label, str) else ", ".join(label)


@lru_cache(maxsize=256)
def _read_axis(key: str, here: Topology, timeout: float) -> Axis:
    """Return the axis of a key that no mesh of this process has.

    Compiled code may outlive its mesh, and its process.
    """
    label, parts, offset, factors, base, index, coords = ast.literal_eval(key)
    return Axis(label, parts, offset, factors, base, index, coords, here, timeout)


class Last(Generic[T]):
    """A holder of the last value that was made of a key.

    Each value of that key refers to this, which so lives as long as one of them.
    """

    __slots__ = ("__weakref__", "value")

    def __init__(self, value: T) -> None:
        self.value = value


def is_last(value: T, key: str, of: WeakValueDictionary[str, Last[T]]) -> Last[T]:
    """Make a value the last one of its key, and return the holder that they share."""
    last = of.get(key)
    if last is None:
        last = of[key] = Last(value)
    last.value = value
    return last


# The axes that were bound in this process, by key: a memo for compiled code, whose
# calls name them by their keys. What nobody refers to is let go.
parsed_axes: WeakValueDictionary[str, Last[Axis]] = WeakValueDictionary()


def _load_axis(mesh: Mesh, label: str | tuple[str, ...]) -> Axis | _NoAxis:
    """Return the axis at this process's place.

    Where there is none, what holds the axis can be loaded all the same.
    """
    if mesh._coords is None:
        return _NoAxis(mesh, label)
    return mesh.bind(label, "Mesh")


class _NoAxis:
    """An axis loaded by a process without a place on it: a first question raises."""

    def __init__(self, mesh: Mesh, label: str | tuple[str, ...]) -> None:
        self._place = mesh, label

    def __getattr__(self, name: str) -> object:
        # What pickle and copy ask of an object they have not filled yet has no answer.
        if name == "_place" or name.startswith("__"):
            raise AttributeError(name)
        mesh, label = self._place
        function = call_site()[0]
        if function.startswith("_"):
            function = "Mesh"
        return getattr(mesh.bind(label, function), name)

    def __reduce__(self) -> tuple[object, ...]:
        return _load_axis, self._place
