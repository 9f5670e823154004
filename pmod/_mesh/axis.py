"""One axis, or several as one, as a rank sees it: what every collective is bound to."""

from __future__ import annotations

import ast
import math
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakValueDictionary

import attrs

from pmod._mesh.factors import Factors, all_places
from pmod._ranks import groups, world
from pmod._ranks.topology import Topology
from pmod._site import call_site

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from pmod._mesh.mesh import Mesh


T = TypeVar("T")


@attrs.frozen(eq=False)
class Axis:
    """One axis (or several flattened) through this rank: what a collective runs over.

    `key` says all of it but the device as a text that can be read back (`Axis.parse`):
    what torch.compile puts into its graphs, which may be run by another process than
    the one that traced them. `group_key` names ranks and order only.
    """

    label: str | tuple[str, ...]
    parts: tuple[
        int, ...
    ]  # the size of each axis that the label names: a dim is cut along one after the other
    offset: int
    factors: Factors
    base: tuple[int, ...] | None
    index: int
    coords: tuple[tuple[str, int], ...]
    topology: Topology  # of the mesh it was taken from, as is the timeout
    timeout: float
    mesh: Mesh | None = attrs.field(default=None, repr=False)
    last: Last[Axis] | None = attrs.field(
        init=False, default=None, repr=False
    )  # of those that share the key
    size: int = attrs.field(init=False)
    key: str = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "size", math.prod(size for size, _ in self.factors))
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
        return places if self.base is None else [self.base[place] for place in places]

    @cached_property
    def group_key(self) -> str:
        """The ranks and their order, as one text however the axis was made."""
        if self.base is None and len(self.factors) <= 1:
            return (
                f"{self.offset}:{self.size}:{self.factors[0][1] if self.factors else 1}"
            )
        ranks = self.ranks
        step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
        evenly = all(b - a == step for a, b in pairwise(ranks))
        return f"{ranks[0]}:{len(ranks)}:{step}" if evenly else repr(ranks)

    @property
    def group(self) -> ProcessGroup:
        """The process group over these ranks, made on first use."""
        return groups.group_of(
            self.group_key, lambda: self.ranks, self.topology, self.timeout
        )

    @staticmethod
    def parse(key: str) -> Axis:
        """The axis that `key` was written for, at this process's place."""
        found = parsed_axes.get(key)
        return (
            found.value
            if found is not None
            else _read_axis(key, world.here(), world.deadline(None))
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Axis:
        return self  # as a mesh

    def __reduce__(self) -> tuple[Any, ...]:
        return (
            (_load_axis, (self.mesh, self.label))
            if self.mesh is not None
            else (Axis.parse, (self.key,))
        )


def named(label: str | tuple[str, ...]) -> str:
    """An axis or a tuple of axes, in a word."""
    return label if isinstance(label, str) else ", ".join(label)


@lru_cache(maxsize=256)
def _read_axis(key: str, here: Topology, timeout: float) -> Axis:
    """The axis of a key, where no mesh of this process has it: compiled code may
    outlive its mesh, and its process.
    """
    label, parts, offset, factors, base, index, coords = ast.literal_eval(key)
    return Axis(label, parts, offset, factors, base, index, coords, here, timeout)


class Last(Generic[T]):
    """The last value that was made of a key. Each of that key refers to this, which so
    lives as long as one of them.
    """

    __slots__ = ("__weakref__", "value")

    def __init__(self, value: T) -> None:
        self.value = value


def is_last(value: T, key: str, of: WeakValueDictionary[str, Last[T]]) -> Last[T]:
    last = of.get(key)
    if last is None:
        last = of[key] = Last(value)
    last.value = value
    return last


# The axes that were bound and the meshes that are there in this process, by key: memos
# for compiled code, whose calls name them by their keys. What nobody refers to is let
# go.
parsed_axes: WeakValueDictionary[str, Last[Axis]] = WeakValueDictionary()


def _load_axis(mesh: Mesh, label: str | tuple[str, ...]) -> Axis | _NoAxis:
    """The axis at this process's place; where there is none, what holds it can be
    loaded all the same.
    """
    return _NoAxis(mesh, label) if mesh._coords is None else mesh.bind(label, "Mesh")


class _NoAxis:
    """An axis that was loaded by a process with no place on it: says so at the first
    question.
    """

    def __init__(self, mesh: Mesh, label: str | tuple[str, ...]) -> None:
        self._place = mesh, label

    def __getattr__(self, name: str) -> Any:
        if name == "_place" or name.startswith("__"):
            raise AttributeError(name)
        mesh, label = self._place
        function = call_site()[0]
        return getattr(
            mesh.bind(label, "Mesh" if function.startswith("_") else function), name
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_axis, self._place
