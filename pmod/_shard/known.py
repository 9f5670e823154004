"""What is known of the kinds of tensors while the body of a `shard_map` runs."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, TypeAlias, TypeVar
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pmod._core.arguments import wrong
from pmod._core.lineage import lineage
from pmod._core.marks import is_marked_varying
from pmod._errors import ArgumentError, PmodError, phrase
from pmod._mesh.ambient import resolve
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import Mesh
from pmod._site import call_site
from pmod._torch import (
    are_transforms_active,
    has_storage,
    is_wrapped,
    next_number,
    no_function_modes,
    number_of,
    unwrap,
    version_of,
)

T = TypeVar("T")

Axes: TypeAlias = frozenset[str]
NONE: Axes = frozenset()

Known: TypeAlias = tuple[Axes, Axes, bool, int]
"""Of a tensor: the axes along which it varies, those of them that are assumed to be on
the safe side, whether it had a derivative, and how often it was changed in place.
"""

UNKNOWN: tuple[None, Axes, bool, int] = (None, NONE, False, 0)


class Noted:
    """What is known of tensors, by identity, as long as they live.

    The entry of a dead one stays until its id comes again.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[ref[Tensor], Known]] = {}

    def get(self, x: Tensor, default: T) -> Known | T:
        entry = self._entries.get(id(x))
        if entry is not None and entry[0]() is x:
            return entry[1]
        return default

    def alive(self) -> list[Tensor]:
        tensors = [of() for of, _ in self._entries.values()]
        return [x for x in tensors if x is not None]

    def __contains__(self, x: Tensor) -> bool:
        return self.get(x, None) is not None

    def __setitem__(self, x: Tensor, known: Known) -> None:
        self._entries[id(x)] = ref(x), known


class KnownKinds:
    """The axes along which each tensor varies, and what was written into its memory."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        cut = [name for name, size in mesh.shape.items() if size > 1]
        self.everywhere: Axes = frozenset(cut)
        self.entries: dict[Tensor, Known] | Noted = {}
        # memory that was changed by what varies
        self.written: MutableMapping[torch.UntypedStorage, Axes] = {}
        # memory that was changed at all, as far as it was seen
        self.memory: MutableMapping[torch.UntypedStorage, Axes] = {}
        self._began = 0
        # a graph cannot hold weak references, and need not: it lives as long as these
        if not torch.compiler.is_compiling():
            self.entries = Noted()
            self.written = WeakIdKeyDictionary()
            self.memory = WeakIdKeyDictionary()
            self._began = next_number()
        self.modules: list[torch.nn.Module] = []
        # of tensors from outside the body, in the order in which they came, their pvary
        # copies: along what, and of which version
        self.copies_of: dict[Tensor, dict[Axes, tuple[int, Tensor]]] = {}
        # one value with a derivative met what varies while no graph was made
        self.is_unsummed = False

    def of(self, x: Tensor) -> Axes:
        """Return the axes along which a tensor varies."""
        found, assumed, had_derivative, version = self.entries.get(x, UNKNOWN)
        if found is not None and version != version_in_eager(x):
            found = self._changed_unseen(x, found)
        # the forward of an autograd.Function runs without derivatives: what it makes
        # gets its own later, and what was noted there is to be looked at again
        gained = x.requires_grad and not had_derivative
        if found is None or (gained and not x.is_leaf):
            if torch.compiler.is_compiling():
                return self._while_compiling(x)
            if is_wrapped(x):
                return self.of(unwrap(x))
            found = self._learned(x, found, assumed)
        if self.written and has_storage(x):
            return found | self.written.get(x.untyped_storage(), NONE)
        return found

    def assumed(self, x: Tensor) -> Axes:
        """Return those axes along which a tensor may as well be one value."""
        return self.entries.get(x, UNKNOWN)[1]

    def sure(self, x: Tensor) -> Axes:
        """Return the axes along which a tensor varies without a doubt."""
        return self.of(x) - self.assumed(x)

    def note(self, x: Tensor, axes: Axes, assumed: Axes = NONE) -> None:
        """Note that a tensor varies along these axes, and no others."""
        self.entries[x] = axes, assumed, x.requires_grad, version_in_eager(x)
        # what leaves a transform is the tensor within
        if not torch.compiler.is_compiling() and is_wrapped(x):
            self.note(unwrap(x), axes, assumed)

    def refresh(self, x: Tensor) -> None:
        """Note that what changed x was seen."""
        found, assumed, had_derivative, _ = self.entries.get(x, UNKNOWN)
        if found is not None:
            self.entries[x] = found, assumed, had_derivative, version_in_eager(x)

    def alive(self) -> list[Tensor]:
        """Return the tensors that are known and live, except in a graph."""
        return self.entries.alive() if isinstance(self.entries, Noted) else []

    def comes_in(self, x: Tensor) -> None:
        """Note that a tensor is from outside the body."""
        if x.requires_grad and not torch.compiler.is_compiling():
            self.copies_of.setdefault(x, {})

    def of_module(self, module: torch.nn.Module) -> None:
        """Note that the body is a module's: its buffers are one value.

        Its parameters are one value as well, as those of every module.
        """
        self.modules.append(module)
        for buffer in module.buffers():
            self.note(buffer, NONE)

    def axis(self, names: str | tuple[str, ...]) -> Axis:
        """Return the axis of the mesh that has these names."""
        return resolve(self.mesh[names], "shard_map")

    def names(self, axis: str | Sequence[str] | Mesh) -> Axes:
        """Return the names of an axis, without those of one rank."""
        if isinstance(axis, Mesh):
            names = axis.axis_names
        elif isinstance(axis, str):
            names = (axis,)
        else:
            names = tuple(axis)
        return self.everywhere & frozenset(names)

    def why(self, assumed: Axes) -> str:
        """Return why a tensor may vary along these axes, and may not."""
        names = ", ".join(map(repr, sorted(assumed)))
        given = f"may vary along {names} or not: it was made from a tensor that f refers to and that is no argument"
        return f"{given}, or after axis_index or a number of the rank's own"

    def unseen(self) -> PmodError:
        """Return the error of a tensor that the tracer hides in a transform."""
        given = "under torch.compile it cannot follow tensors into a transform or a checkpoint"
        right = "Transform or checkpoint the function that shard_map gives, or run this one eagerly."
        whole = resolve(self.mesh, "shard_map")
        return wrong(ArgumentError, "shard_map", whole, given, right)

    def _changed_unseen(self, x: Tensor, found: Axes) -> Axes:
        """Learn of a tensor that was changed where function modes do not see it.

        That was by another name of its memory, or by such as Tensor.set_.
        """
        memory = self.memory.get(x.untyped_storage()) if has_storage(x) else None
        assumed = self.assumed(x)
        if memory is not None:
            of = found | memory
        else:
            # nobody saw what was written, so it may be anything
            of = found | self.everywhere
            assumed = assumed | (of - found)
        self.note(x, of, assumed)
        return of

    def _while_compiling(self, x: Tensor) -> Axes:
        if isinstance(x, torch.nn.Parameter):
            return NONE
        if x.requires_grad or are_transforms_active():
            raise self.unseen()
        return self.everywhere

    def _learned(self, x: Tensor, seen: Axes | None, assumed: Axes) -> Axes:
        """Learn of a tensor that no operation here has made."""
        if x.requires_grad:
            found = self._from_outside(x, seen)
        else:
            # it has no graph that says what it was made from
            found = assumed = self.everywhere
        self.note(x, found, assumed & found)
        return found

    def _from_outside(self, x: Tensor, seen: Axes | None) -> Axes:
        """Return the axes of a tensor with a derivative that is not an argument.

        A parameter is one value; of others the graph says what they were made from. The
        graph does not say what had no derivative: what an autograd.Function took of that
        was seen in its forward, and what another function that runs here took can be
        anything.
        """
        if x.is_leaf:
            self.comes_in(x)
            return self._marked(x)
        node: Any = x.grad_fn
        if self.is_unsummed and type(node).__name__ == "CheckpointFunctionBackward":
            given = f"at {call_site()[1]} one value meets what varies inside a reentrant checkpoint, which runs again"
            given += " in backward, where shard_map does not follow it"
            raise ArgumentError(phrase("shard_map", given, "Pass use_reentrant=False."))
        if seen is None:
            made_here = number_of(node) >= self._began
            seen = self.everywhere if made_here else NONE
        varying: set[str] = set()
        for name in self.everywhere:
            if self._varies_by_graph(x, name, name in seen):
                varying.add(name)
        return frozenset(varying)

    def _marked(self, leaf: Tensor) -> Axes:
        marked: set[str] = set()
        for name in self.everywhere:
            if is_marked_varying(leaf, self.axis(name)):
                marked.add(name)
        return frozenset(marked)

    def _varies_by_graph(self, x: Tensor, name: str, seen: bool) -> bool:
        """Return whether a tensor varies along an axis by what its graph comes from."""
        axis = self.axis(name)
        found = lineage(x, axis)
        one_value: list[Tensor] = []
        varies = found.varying or seen
        for leaf, _ in found.leaves:
            if name in self.of(leaf):
                varies = True
            else:
                one_value.append(leaf)
        if not varies:
            return False
        # what is one value has met what varies without a pvary, inside
        if one_value or found.invariant:
            given = f"at {call_site()[1]} a tensor comes from a function that shard_map cannot see into, which took"
            given += " varying tensors and others that are one value"
            right = "Put pmod.pvary around those before they go into the function."
            raise wrong(ArgumentError, "shard_map", axis, given, right)
        return True


def version_in_eager(x: Tensor) -> int:
    """Return how often a tensor was changed in place.

    A graph and an inference tensor do not count: 0.
    """
    if torch.compiler.is_compiling():
        return 0
    with no_function_modes():
        if x.is_inference():
            return 0
        return version_of(x)


def here() -> str:
    """Return where the body is in the user's code, for a message; "" in a graph."""
    if torch.compiler.is_compiling():
        return ""
    return f"at {call_site()[1]} "
