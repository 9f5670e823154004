"""The function mode that follows which tensors are V and which are I in a `shard_map`.

It goes from operation to operation, as JAX does. A tensor has the set of axes along
which it varies. Where an operation of torch takes tensors that vary along different
axes, those that are one value (I) along some of them go through `pvary`, and so their
gradients are summed, once; a collective says by its row what it takes and gives.
Nothing else is changed: outside `shard_map`, pvary is explicit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function

from pmod._collectives.places import axis_index
from pmod._collectives.used import Idle
from pmod._collectives.values import SUM
from pmod._core.arguments import wrong
from pmod._core.bind import bind
from pmod._core.leaves import map_tensors, tensors_in
from pmod._core.row import Call
from pmod._errors import ArgumentError, phrase
from pmod._mesh.mesh import Mesh
from pmod._shard.copies import Copies, linked_in_graph
from pmod._shard.known import NONE, UNKNOWN, Axes, KnownKinds
from pmod._shard.lengths import UnevenLengths
from pmod._shard.operations import (
    NUMBERS,
    SAME,
    Args,
    Function,
    Kwargs,
    changed_by,
    draws,
    is_higher_order,
    makes_length_by_value,
    name_of,
    plain,
)
from pmod._shard.writes import Writes, versions
from pmod._site import Origin, call_site
from pmod._torch import (
    are_transforms_active,
    count_function_modes,
    gets_base,
    version_untraced,
)


class Kinds(TorchFunctionMode):
    """Follows the kinds of tensors while the body of a `shard_map` runs."""

    def __init__(self, mesh: Mesh, idle: Idle) -> None:
        super().__init__()
        self.known = KnownKinds(mesh)
        self.lengths = UnevenLengths(self.known)
        self.copies = Copies(self.known, idle)
        self.writes = Writes(self.known)

    def __torch_function__(
        self,
        func: Function,
        types: object,
        args: Args = (),
        kwargs: Kwargs | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            self.writes.check_shown()
            result = self._followed(func, args, kwargs)
            self.writes.keep_count()
            return result
        kind = self._one_kind(func, args, kwargs)
        if kind is None:
            return self._followed(func, args, kwargs)
        result = func(*args, **kwargs)
        entries = self.known.entries
        if isinstance(result, Tensor):
            version = version_untraced(result)
            entries[result] = kind, NONE, result.requires_grad, version
            return result
        for y in tensors_in(result):
            entries[y] = kind, NONE, y.requires_grad, version_untraced(y)
        return result

    def _one_kind(self, func: Function, args: Args, kwargs: Kwargs) -> Axes | None:
        """Return the kind that all inputs of an ordinary operation have.

        None if the slow path must decide. This is the usual case, so it has no calls
        that it can do without.
        """
        known = self.known
        if self.copies.asked or known.written:
            return None
        if self.lengths.axes_by_length or are_transforms_active():
            return None
        # inference mode counts no changes in place
        if torch.is_inference_mode_enabled():
            return None
        if "out" in kwargs or not plain[func]:
            return None
        kind: Axes | None = None
        given = (*args, *kwargs.values()) if kwargs else args
        for x in given:
            if isinstance(x, Tensor):
                axes, assumed, had_derivative, version = known.entries.get(x, UNKNOWN)
                if axes is None or assumed:
                    return None
                if kind is not None and axes != kind:
                    return None
                if not had_derivative and x.requires_grad and not x.is_leaf:
                    return None
                try:
                    if version != version_untraced(x):
                        return None
                except RuntimeError:
                    # an inference tensor has no version
                    return None
                kind = axes
            elif isinstance(x, list | tuple | dict) and tensors_in(x):
                return None
        return kind

    def _followed(self, func: Function, args: Args, kwargs: Kwargs) -> object:
        """Run what is called, each kind of function by rules of its own."""
        if func is bind:
            return self._bind(*args, **kwargs)
        if func is kinds_here:
            return self
        if func is all_cut:
            return self.copies.vary_unasked(self.lengths.all_axes())
        if func is linked_in_graph:
            return self.copies.linked_unfollowed(*args)
        if func is axis_index or func is Mesh.axis_index:
            self.copies.ask(self.known.names(args[-1]))
            return func(*args, **kwargs)
        if func is Mesh._own_coords:
            self.copies.ask(self.known.names(args[0]))
            return func(*args)
        if func is torch.autograd.grad:
            return self._gradients(args, kwargs)
        if func is Tensor.backward:
            return self._backward(*args, **kwargs)
        if name_of(func) == "__get__":
            return self._get(func, args)
        if name_of(func) == "__set__":
            return self._set(func, args)
        return self._operation(func, args, kwargs)

    # --- operations and attributes ----------------------------------------------------

    def _operation(self, func: Function, args: Args, kwargs: Kwargs) -> object:
        """Let all that an operation takes vary alike, run it, and note its results."""
        name = name_of(func)
        if torch.compiler.is_compiling() and is_higher_order(func):
            raise self.known.unseen()
        taken = tensors_in((args, kwargs))
        before = [self.known.of(x) for x in taken]
        sure = NONE.union(
            *[of - self.known.assumed(x) for of, x in zip(before, taken, strict=True)]
        )
        axes = NONE.union(*before) | self.copies.asked
        axes = axes | self.lengths.asked(name, args, kwargs)
        # what takes no tensor and is not known to be the same everywhere
        if not before and name not in SAME:
            axes = self.known.everywhere
        if draws(name, args, kwargs):
            axes = sure = self.known.everywhere
        changed = changed_by(func, name, args, kwargs)
        if torch.compiler.is_compiling():
            self.writes.check_shown_whole(name, changed, axes)
        if any([axes - of for of in before]):
            for x in changed:
                self.writes.change(x, axes)
            args, kwargs = map_tensors(
                lambda x: self.copies.vary(x, axes), (args, kwargs)
            )
        counts = versions(taken)
        result = func(*args, **kwargs)
        self.writes.note_changed(taken, counts, axes)
        # compiled code has another tensor after a change in place
        for y in [*tensors_in(result), *changed]:
            self.known.note(y, axes, axes - sure)
        if torch.compiler.is_compiling():
            self.writes.note_views(name, taken, result)
        told = axes
        if name not in NUMBERS:
            told = axes & self.lengths.told(name, result)
        if told:
            self.copies.ask(told)
        if makes_length_by_value(name, args):
            self.lengths.note_rows(result, axes)
        return result

    def _get(self, func: Function, args: Args) -> object:
        """Read an attribute: x.T and x.grad are what x is; others are not tensors."""
        y = func(*args)
        if not isinstance(y, Tensor):
            return y
        if torch.compiler.is_compiling():
            self.writes.note_view(y)
        x, asked = args[0], self.copies.asked
        if y.requires_grad and asked and not gets_base(func):
            of = self.known.of(x)
            y = func(self.copies.vary(x, of | asked))
            self.known.note(y, of | asked, self.known.assumed(x) | (asked - of))
        if y not in self.known.entries:
            self.known.note(y, self.known.of(x), self.known.assumed(x))
        return y

    def _set(self, func: Any, args: Args) -> None:
        """Write an attribute: after x.data = y, x is what y is.

        x.grad and flags are as they were.
        """
        func(*args)
        if func.__self__ is Tensor.data:
            x, y = args
            self.known.copies_of.get(x, {}).clear()
            self.known.note(x, self.known.of(y), self.known.assumed(y))

    # --- derivatives ------------------------------------------------------------------

    def _gradients(self, args: Args, kwargs: Kwargs) -> object:
        """Run torch.autograd.grad: a gradient varies where its input does."""
        names = ("outputs", "inputs", "grad_outputs")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        outputs, inputs = given.pop("outputs"), given.pop("inputs")
        cotangents = given.pop("grad_outputs", None)
        self._check_sure(tensors_in(outputs))
        outputs = map_tensors(self.copies.linked, outputs)
        outputs, cotangents = self._alike(outputs, cotangents)
        gradients = torch.autograd.grad(outputs, inputs, cotangents, *args[3:], **given)
        for x, gradient in zip(tensors_in(inputs), gradients, strict=True):
            if gradient is not None:
                self.known.note(gradient, self.known.of(x))
                self.copies.vary_results([gradient])
        return gradients

    def _backward(
        self, y: Tensor, gradient: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> None:
        self._check_sure([y])
        outputs, cotangents = self._alike([self.copies.linked(y)], [gradient])
        Tensor.backward(outputs[0], cotangents[0], *args, **kwargs)

    def _check_sure(self, ys: list[Tensor]) -> None:
        """Raise if an output is V on the safe side only: its gradient depends on it."""
        for y in ys:
            # in this order: `of` may learn of y, and with it what is assumed
            of = self.known.of(y)
            assumed = self.known.assumed(y)
            if of and assumed:
                why = self.known.why(assumed)
                given = f"at {call_site()[1]} what is differentiated {why}"
                right = "Pass that tensor as an argument, and ask for the place after the loss; or mark a loss of each"
                right += " rank's own with pmod.pvary(loss, axis)."
                raise ArgumentError(phrase("shard_map", given, right))

    def _alike(self, ys: Any, cotangents: Any) -> tuple[Any, Any]:
        """Give each output and its cotangent the same kind: if one varies, both do."""
        if cotangents is None:
            return ys, None
        outputs, given = _listed(ys), _listed(cotangents)
        if len(outputs) != len(given):
            # torch says so
            return outputs, given
        with torch.enable_grad():
            for i, pair in enumerate(zip(outputs, given, strict=True)):
                both = list(pair)
                axes = NONE.union(*[self.known.of(x) for x in tensors_in(both)])
                outputs[i], given[i] = map_tensors(
                    lambda x, axes=axes: self.copies.vary(x, axes), both
                )
        return outputs, given

    # --- collectives ------------------------------------------------------------------

    def _bind(
        self, call: Call, xs: list[Tensor], forward: Origin | None = None
    ) -> Sequence[Tensor]:
        """Run a collective: its row says what it takes and gives along its axis."""
        over = self.known.names(call.axis.label)
        before = [self.known.of(x) for x in xs]
        assumed = [self.known.assumed(x) - over for x in xs]
        if call.row.takes == "V":
            pairs = zip(xs, before, strict=True)
            xs = [self.copies.vary(x, of | over) for x, of in pairs]
        elif call.row.name == "pvary":
            return self._pvary(call, xs, before, over)
        elif any([of & over for of in before]):
            given = f"x varies along {sorted(over)} already, because it was made from what does"
            right = f"{call.row.name} takes one value: pmod.pick or a sum of x, or leave {call.row.name} out.\n"
            right += "What x.new_zeros and torch.zeros_like make of x varies as x does; torch.zeros(..., dtype=x.dtype,"
            right += " device=x.device) is one value."
            raise wrong(ArgumentError, call.row.name, call.axis, given, right)
        ys = bind(call, xs, forward)
        is_one_value = call.row.gives == "I"
        for y, of, guess in zip(ys, before, assumed, strict=True):
            after = of - over if is_one_value else of | over
            self.known.note(y, after, guess)
        if is_one_value:
            self.copies.vary_results(ys)
        return ys

    def _pvary(
        self, call: Call, xs: list[Tensor], before: list[Axes], over: Axes
    ) -> list[Tensor]:
        """Run pvary: what varies already stays as it is.

        All others go together, as the user asked.
        """
        ys = list(xs)
        new: list[int] = []
        for i, of in enumerate(before):
            if of & over:
                continue
            kept = None
            if call.params == SUM:
                # it varies since the rank asked
                kept = self.copies.kept(xs[i], over)
            if kept is None:
                new.append(i)
            else:
                ys[i] = kept
        if new:
            made = bind(call, [xs[i] for i in new])
            for i, y in zip(new, made, strict=True):
                ys[i] = y
        for i, of in enumerate(before):
            if of & over:
                ys[i] = self.copies.vary(ys[i], of | over)
        for x, y, of in zip(xs, ys, before, strict=True):
            self.known.note(y, of | over, self.known.assumed(x) - over)
        return ys


def kinds_here() -> Kinds | None:
    """Return those of the innermost shard_map whose body runs, or None."""
    if count_function_modes() == 0:
        return None
    return handle_torch_function(kinds_here, ())


def all_cut() -> None:
    """Say that the arguments of the innermost shard_map are shards now."""
    handle_torch_function(all_cut, ())


def _listed(xs: Tensor | Sequence[Tensor | None]) -> list[Tensor | None]:
    return [xs] if isinstance(xs, Tensor) else list(xs)
