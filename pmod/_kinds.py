"""Which tensors are V and which are I inside `shard_map`, followed from operation to operation, as JAX does.

A tensor has the set of axes along which it varies. Where an operation of torch takes tensors that vary along different
axes, those that are one value (I) along some of them go through `pvary`, and so their gradients are summed, once; a
collective says by its row what it takes and gives. Nothing else is changed: outside `shard_map`, pvary is explicit.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function
from torch.utils.weak import WeakIdKeyDictionary

from pmod._ambient import resolve
from pmod._arguments import wrong
from pmod._autodiff import Call, bind, tensors_in
from pmod._collectives import axis_index, differentiated, pvary
from pmod._debug import is_marked_varying
from pmod._errors import ArgumentError, PmodError, call_site, explain
from pmod._lineage import lineage
from pmod._mesh import Axis, Mesh
from pmod._parallel import map_tensors

Axes: TypeAlias = frozenset[str]

NONE: Axes = frozenset()

# of no tensor: each rank makes the same of the same numbers. What these make is I, until the rank asks for its index
SAME = {"zeros", "ones", "full", "empty", "eye", "arange", "linspace", "logspace", "tensor", "scalar_tensor"}
# each rank draws its own
RANDOM = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson", "rand_like",
          "randn_like", "randint_like", "normal_", "uniform_", "bernoulli_", "random_", "exponential_"}  # fmt: skip
DROPOUT = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "dropout_"}
# their result is a number: what a rank goes on to do with it is its own
NUMBERS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__"}


class Kinds(TorchFunctionMode):
    """Follows the kinds of tensors while the body of a `shard_map` runs."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.everywhere: Axes = frozenset([name for name, size in mesh.shape.items() if size > 1])
        # of a tensor its axes, and whether it had a derivative. A graph cannot hold weak references, and need not
        self._known: MutableMapping[Any, tuple[Axes, bool]]
        self._known = {} if torch.compiler.is_compiling() else WeakIdKeyDictionary()
        self._asked: Axes = NONE  # the axes along which this rank knows its own place: what it then makes is V

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is bind:
            return self._bind(*args, **kwargs)
        if func is kinds_here:
            return self
        if func is axis_index:
            self._asked |= self._names(args[0])
            return func(*args, **kwargs)
        if func is torch.autograd.grad:
            return self._gradients(func, args, kwargs)
        return self._operation(func, args, kwargs)

    # --- what is known ----------------------------------------------------------------------------

    def of(self, x: Tensor) -> Axes:
        """The axes along which a tensor varies."""
        found, had_derivative = self._known.get(x, (None, False))
        # what got its derivative later comes from an autograd.Function, whose forward runs without
        if found is not None and (had_derivative or not x.requires_grad or x.is_leaf):
            return found
        if torch.compiler.is_compiling():
            return self._while_compiling(x)
        functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
        if functorch.is_functorch_wrapped_tensor(x):
            return self.of(functorch.get_unwrapped(x))
        found = self._from_outside(x) if x.requires_grad else self.everywhere
        self.note(x, found)
        return found

    def _while_compiling(self, x: Tensor) -> Axes:
        if isinstance(x, torch.nn.Parameter):
            return NONE
        if x.requires_grad or torch._C._are_functorch_transforms_active():
            raise self._unseen()
        return self.everywhere

    def _unseen(self) -> PmodError:
        given = "under torch.compile it cannot follow tensors into a transform or a checkpoint"
        right = "Transform or checkpoint the function that shard_map gives, or run this one eagerly."
        return wrong(ArgumentError, "shard_map", resolve(self.mesh, "shard_map"), given, right)

    def note(self, x: Tensor, axes: Axes) -> None:
        """The axes along which a tensor varies are these."""
        self._known[x] = axes, x.requires_grad

    def _from_outside(self, x: Tensor) -> Axes:
        """Of a tensor that is no argument: a parameter is one value; else its graph says what it was made from."""
        if x.is_leaf:
            return frozenset([name for name in self.everywhere if is_marked_varying(x, self._axis(name))])
        varying: set[str] = set()
        for name in self.everywhere:
            axis = self._axis(name)
            found = lineage(x, axis)
            if not found.varying:
                continue
            varying.add(name)
            one_value = [leaf for leaf, _ in found.leaves if name not in self.of(leaf)]
            if one_value or found.invariant:
                given = f"at {call_site()[1]} a tensor comes from a function that shard_map cannot see into, which took"
                given += " varying tensors and others that are one value"
                right = "Put pmod.pvary around those before they go into the function."
                raise wrong(ArgumentError, "shard_map", axis, given, right)
        return frozenset(varying)

    def _axis(self, names: str | tuple[str, ...]) -> Axis:
        return resolve(self.mesh[names], "shard_map")

    def _names(self, axis: Any) -> Axes:
        names = axis.axis_names if isinstance(axis, Mesh) else (axis,) if isinstance(axis, str) else tuple(axis)
        return self.everywhere & frozenset(names)

    # --- what is done -----------------------------------------------------------------------------

    def _vary(self, x: Tensor, axes: Axes) -> Tensor:
        """x, varying along these axes too."""
        missing = axes - self.of(x)
        if not missing or not differentiated(x):
            return x
        return pvary(x, self.mesh[tuple([name for name in self.mesh.axis_names if name in missing])])

    def _operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = _name(func)
        if torch.compiler.is_compiling() and _is_higher_order(func):
            raise self._unseen()
        before = [self.of(x) for x in tensors_in((args, kwargs))]
        axes = NONE.union(*before) if name == "__get__" else self._asked.union(*before)
        drawn = name in RANDOM or (name in DROPOUT and _drops(args, kwargs))
        if drawn or not (before or name in SAME):
            axes = self.everywhere
        changed = tensors_in(kwargs.get("out", args[:1])) if _in_place(name, kwargs) else []
        if any(axes - of for of in before):
            for x in changed:
                self._change(x, axes)
            args, kwargs = map_tensors(lambda x: self._vary(x, axes), (args, kwargs))
        result = func(*args, **kwargs)
        for y in [*tensors_in(result), *changed]:  # compiled code has another tensor after a change in place
            self.note(y, axes)
        if name in NUMBERS:
            self._asked |= axes
        return result

    def _change(self, x: Tensor, axes: Axes) -> None:
        """What is changed in place varies from now on; where it has a derivative already, that cannot be undone."""
        if axes - self.of(x) and x.requires_grad and differentiated(x):
            given = f"at {call_site()[1]} what is one value along {sorted(axes - self.of(x))} is changed in place by"
            given += " what varies"
            raise ArgumentError(explain("shard_map", given, "Change its pvary copy, pmod.pvary(x, axis).clone()."))
        self.note(x, axes)
        if x._base is not None:
            self.note(x._base, axes)

    def _gradients(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A gradient varies where its input does."""
        inputs = kwargs["inputs"] if "inputs" in kwargs else args[1]
        gradients = func(*args, **kwargs)
        for x, gradient in zip(tensors_in(inputs), gradients, strict=True):
            if gradient is not None:
                self.note(gradient, self.of(x))
        return gradients

    def _bind(self, call: Call, xs: list[Tensor], forward: Any = None) -> Sequence[Tensor]:
        over = self._names(call.axis.label)
        before = [self.of(x) for x in xs]
        if call.row.takes == "V":
            xs = [self._vary(x, of | over) for x, of in zip(xs, before, strict=True)]
        elif call.row.name == "pvary":
            return self._pvary(call, xs, before, over)
        elif any(of & over for of in before):
            given = f"x varies along {sorted(over)} already"
            right = f"{call.row.name} takes one value: pmod.pick or a sum of x, or leave {call.row.name} out."
            raise wrong(ArgumentError, call.row.name, call.axis, given, right)
        ys = bind(call, xs, forward)
        for y, of in zip(ys, before, strict=True):
            self.note(y, of - over if call.row.gives == "I" else of | over)
        return ys

    def _pvary(self, call: Call, xs: list[Tensor], before: list[Axes], over: Axes) -> list[Tensor]:
        """What varies already stays as it is; all others go together, as the user asked."""
        new = [i for i, of in enumerate(before) if not of & over]
        ys = list(xs)
        if new:
            for i, y in zip(new, bind(call, [xs[i] for i in new]), strict=True):
                ys[i] = y
        ys = [self._vary(y, of | over) if of & over else y for y, of in zip(ys, before, strict=True)]
        for y, of in zip(ys, before, strict=True):
            self.note(y, of | over)
        return ys


def kinds_here() -> Kinds | None:
    """Those of the innermost shard_map whose body runs, or None."""
    return handle_torch_function(kinds_here, ()) if torch._C._len_torch_function_stack() > 0 else None


def _name(func: Any) -> str:
    return getattr(func, "__name__", "")


def _is_higher_order(func: Any) -> bool:
    """Whether it runs a function of the user's, in a graph of its own."""
    return isinstance(func, torch._ops.HigherOrderOperator)


for _constant in (_name, _is_higher_order):
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined] # see _ambient._constant


def _in_place(name: str, kwargs: dict[str, Any]) -> bool:
    changes = name.endswith("_") and not name.endswith("__")
    return changes or name == "__setitem__" or (name.startswith("__i") and name != "__invert__") or "out" in kwargs


def _drops(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("training", args[2] if len(args) > 2 else True))
