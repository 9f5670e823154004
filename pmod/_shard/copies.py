"""The pvary copies of what is one value in the body of a `shard_map`.

Links let backward come to all of them. Ranks sum the gradient of what is one value when
they come to its copy in backward. As long as all go the same way they come to the
copies in the same order. A rank that asks for its own place may go its own way from
there on, so all that is one value is copied just before, together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from pmod._collectives.used import Idle, linked, pvary_used
from pmod._collectives.values import differentiated, pvary
from pmod._errors import PmodError, phrase
from pmod._shard.captured import captured_leaves
from pmod._shard.known import NONE, Axes, KnownKinds, here
from pmod._shard.operations import Function
from pmod._torch import (
    are_transforms_active,
    is_wrapped,
    no_function_modes,
    number_of,
    transform_level,
    version_of,
)


class Copies:
    """Makes the copies: where one value meets what varies, and where a rank asks."""

    def __init__(self, known: KnownKinds, idle: Idle) -> None:
        self._known = known
        self._idle = idle
        self._copies = known.copies_of
        # the axes along which this rank knows its own place: what it then makes is V
        self.asked: Axes = NONE
        # the same, in the order in which it asked
        self._ways: list[Axes] = []
        # copies that were made together, with a link of their own
        self._fused: set[Tensor] = set()
        # numbers that are 0, by which backward comes to what every rank sums
        self._links: list[Tensor] = []
        # shards with a derivative
        self._arguments: list[Tensor] = []
        # the functions whose bodies run
        self._roots: list[Function] = []
        # while it is looked up what a body refers to
        self._looks_ahead = False
        # while compiling: copies of one value that met what varies
        self._met: list[Tensor] = []
        self._level: int | None = None
        if not torch.compiler.is_compiling():
            self._level = transform_level()
        self._differentiates = torch.is_grad_enabled()

    def of_body(self, f: Function) -> None:
        """Note that the body is f.

        What it refers to is looked up before a rank asks for what is its own.
        """
        self._roots.append(f)

    def of_argument(self, x: Tensor) -> None:
        """Note that x is a shard that goes into the body."""
        self._known.comes_in(x)
        if x.requires_grad:
            self._arguments.append(x)

    # --- where one value meets what varies --------------------------------------------

    def vary(self, x: Tensor, axes: Axes) -> Tensor:
        """Return x, varying along these axes too."""
        missing = axes - self._known.of(x)
        if missing and x.requires_grad and not torch.is_grad_enabled():
            self._known.is_unsummed = True
        if not missing or not differentiated(x):
            return x
        if torch.compiler.is_compiling():
            return self._vary_in_graph(x, missing)
        if x not in self._copies or not self.keeps(x):
            return self._copy_elsewhere(x, missing)
        if missing & self.asked and not self._is_named(x):
            raise self._unnamed(x)
        y, along = x, NONE
        # step by step, so that the copies made where the rank asked serve here too
        for step in (*self._ways, missing):
            new = (step & missing) - along
            if not new:
                continue
            along = along | new
            version, kept = self._copies[x].get(along, (None, y))
            y = kept if version == version_of(x) else self._copy(y, new)
            self._copies[x][along] = version_of(x), y
        return y

    def _is_named(self, x: Tensor) -> bool:
        """Return whether all ranks know of x: what a body refers to is looked up."""
        if self._looks_ahead:
            return True
        return any([self.asked & along for along in self._copies[x]])

    def _vary_in_graph(self, x: Tensor, missing: Axes) -> Tensor:
        _, kept = self._copies.get(x, {}).get(missing, (0, None))
        if kept is not None:
            return kept
        in_graph = x.requires_grad and torch.is_grad_enabled()
        is_summed = in_graph or are_transforms_active()
        if is_summed and missing & self.asked:
            raise self._ordered()
        y = self._copy(x, missing)
        if is_summed:
            self._met.append(y)
        return y

    def _copy_elsewhere(self, x: Tensor, missing: Axes) -> Tensor:
        """Return a copy that serves here only.

        That is in a transform, or of what was made in the body.
        """
        version, kept = self._copies.get(x, {}).get(missing, (None, x))
        if version == version_of(x) and torch.is_grad_enabled():
            # of the level around a transform
            return kept
        unordered = missing & self.asked
        inside = transform_level() != self._level and is_wrapped(x)
        if unordered and inside and x.requires_grad:
            given = f"{here()}a transform differentiates one value along {sorted(unordered)} after this"
            given += " rank asked for what is its own: each rank may come to it in an order of its own"
            right = "Begin the function that is transformed with pmod.pvary of what it differentiates."
            raise PmodError(phrase("shard_map", given, right))
        made_here = not inside and not x.is_leaf
        if unordered and made_here and self.keeps(x):
            given = f"{here()}one value of shape {tuple(x.shape)} meets what varies, which came about after this rank"
            given += " asked for what is its own: each rank may come to it in an order of its own"
            right = "Make it before, or put pmod.pvary around it there."
            raise PmodError(phrase("shard_map", given, right))
        return self._copy(x, missing)

    def keeps(self, x: Tensor) -> bool:
        """Return whether a copy that is made here serves elsewhere in the body."""
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return False
        return x.requires_grad and transform_level() == self._level

    def _copy(self, x: Tensor, axes: Axes) -> Tensor:
        return pvary(x, self._known.mesh[self._ordered_names(axes)])

    def _ordered_names(self, axes: Axes) -> tuple[str, ...]:
        return tuple([name for name in self._known.mesh.axis_names if name in axes])

    def _ordered(self) -> PmodError:
        """Return the error of one value that is met too late, while compiling.

        Ranks that go unlike ways would sum gradients in unlike orders, or not all of
        them.
        """
        given = "under torch.compile one value that is no argument, and no parameter of a module that is f, meets what"
        given += " varies after this rank asked for what is its own: each rank may come to it in an order of its own"
        right = (
            "Pass it as an argument, with the spec P(), or run this function eagerly."
        )
        return PmodError(phrase("shard_map", given, right))

    def _unnamed(self, x: Tensor) -> PmodError:
        given = f"{here()}it meets a parameter or leaf of shape {tuple(x.shape)} that f does not refer to by a name,"
        given += " after this rank asked for what is its own: each rank may come to it in an order of its own"
        # not a TypeError: x * y would make of one that y is not supported
        right = "Pass it as an argument, with the spec P()."
        return PmodError(phrase("shard_map", given, right))

    # --- where a rank asks for its own place ------------------------------------------

    def ask(self, axes: Axes) -> None:
        """Let the rank learn what is its own along these axes, and go its own way.

        Before, all that is one value becomes V, together: in backward each rank sums it
        in one message, in whichever order, how often, and of whichever part it made
        use.
        """
        new, before = axes - self.asked, self.asked
        self.asked = self.asked | axes
        if not new:
            return
        if torch.compiler.is_compiling():
            self._ask_in_graph(new)
        else:
            self._vary_ahead(new, before)

    def vary_unasked(self, uneven: Axes) -> None:
        """Let all that is one value vary along the axes of uneven shards.

        A rank with an empty shard may ask for nothing of its own.
        """
        if uneven and not torch.compiler.is_compiling():
            self._vary_ahead(uneven - self.asked, self.asked)

    def _parameters(self) -> list[Tensor]:
        found: list[Tensor] = []
        for module in self._known.modules:
            # one by one, because the compiler of torch 2.11 extends no list by a generator
            for parameter in module.parameters():
                found.append(parameter)
        return found

    def _ask_in_graph(self, new: Axes) -> None:
        """While compiling: the ranks' graphs are alike up to here.

        What they hold as one value varies from here on.
        """
        for x in [*self._arguments, *self._parameters()]:
            if x.requires_grad and torch.is_grad_enabled():
                self._vary_once_more(x, new)
        for y in self._met:
            self._links.append(_zero_of(y))
        self._met = []

    def _vary_once_more(self, x: Tensor, new: Axes) -> None:
        of = self._known.of(x)
        if not new - of:
            return
        copies = self._copies.get(x, {})
        before, y = NONE, x
        if copies:
            before = list(copies)[-1]
            _, y = copies[before]
        step = new - of - before
        copy = self._copy(y, step)
        self._known.note(copy, of | before | step, self._known.assumed(x))
        self._copies[x] = {**copies, before | step: (0, copy)}
        self._met.append(copy)

    def _vary_ahead(self, new: Axes, before: Axes) -> None:
        """Let vary what is one value and known so far, or has a name in the body."""
        self._ways.append(new)
        named: list[Tensor] = []
        with no_function_modes():
            for f in self._roots:
                named += captured_leaves(f)
        self._looks_ahead = True
        try:
            for x in [*self._parameters(), *named]:
                # what is asked for is known from then on
                self._known.of(x)
            # the ask may stand under no_grad, and the copies serve outside of it
            with torch.set_grad_enabled(self._differentiates):
                self._vary_all(new, before)
        finally:
            self._looks_ahead = False

    def _vary_all(self, new: Axes, before: Axes) -> None:
        """Copy what is one value along the new axes, so that it varies along them.

        One call copies all that have a dtype and device.
        """
        together: dict[Axes, list[tuple[Tensor, Axes, Tensor]]] = {}
        outside = [x for x in self._copies if self.keeps(x)]
        for x in [*outside, *self._computed(new)]:
            of = self._known.of(x)
            step, along = new - of, before - of
            if not step or not differentiated(x):
                continue
            made = self._copies.setdefault(x, {}).get(along | step)
            if made is None or made[0] != version_of(x):
                y = self.vary(x, of | along)
                together.setdefault(step, []).append((x, along | step, y))
            elif made[1] not in self._fused:
                # it met what varies already, on all ranks
                self._link(made[1])
        for step, found in together.items():
            self._vary_together(step, found)

    def _vary_together(
        self, step: Axes, found: list[tuple[Tensor, Axes, Tensor]]
    ) -> None:
        """Copy these, each with where its copy belongs and what is copied."""
        axis = self._known.axis(self._ordered_names(step))
        sources = [y for *_, y in found]
        with no_function_modes():
            copies, links = pvary_used(sources, axis, "pvary", self._idle)
        for link in links:
            self._link(link)
        for (x, along, y), copy in zip(found, copies, strict=True):
            self._known.note(copy, self._known.of(y) | step, self._known.assumed(x))
            self._copies[x][along] = version_of(x), copy
            self._fused.add(copy)

    def _computed(self, new: Axes) -> list[Tensor]:
        """Return what the body made so far as one value.

        All ranks made it in this order, so all sum it in this order.
        """
        found: list[Tensor] = []
        for x in self._known.alive():
            if x in self._copies or not self.keeps(x):
                continue
            if x.grad_fn is not None and new - self._known.of(x):
                found.append(x)
        return sorted(found, key=lambda x: (number_of(x.grad_fn), x.output_nr))

    def kept(self, x: Tensor, along: Axes) -> Tensor | None:
        """Return the copy of x that was made when the rank asked, None if none was."""
        version, copy = self._copies.get(x, {}).get(along, (None, None))
        if not self.asked or version != version_of(x):
            return None
        return copy if self.keeps(x) else None

    def vary_results(self, ys: Sequence[Tensor]) -> None:
        """Copy now what all ranks make one value after the ask.

        Later each may come to it in an order of its own.
        """
        if not self.asked or torch.compiler.is_compiling():
            return
        for y in ys:
            missing = self.asked - self._known.of(y)
            if missing and self.keeps(y) and differentiated(y):
                copy = self._copy(y, missing)
                self._copies[y] = {missing: (version_of(y), copy)}
                self._link(copy)

    # --- backward comes to all of them ------------------------------------------------

    def _link(self, y: Tensor) -> None:
        with no_function_modes():
            self._links.append(_zero_of(y))

    def linked(self, y: Tensor) -> Tensor:
        """Return y; in backward from it, this rank takes part in all sums.

        It takes part also where it used nothing of what is summed.
        """
        if torch.compiler.is_compiling():
            return linked_in_graph(y) if self._links else y
        if not self._links or not _has_backward(y):
            return y
        of, assumed = self._known.of(y), self._known.assumed(y)
        with no_function_modes():
            shards = [_zero_of(x) for x in self._arguments]
            z = linked(y, [*self._links, *shards])
        self._known.note(z, of, assumed)
        return z

    def linked_unfollowed(self, y: Tensor) -> Tensor:
        """While compiling: the same, where no function mode follows what is done."""
        if not _has_backward(y):
            return y
        z = linked(y, self._links)
        self._known.note(z, self._known.of(y), self._known.assumed(y))
        return z


def linked_in_graph(y: Tensor) -> Tensor:
    """While compiling: return y with the links of those whose body runs.

    The mode that answers is off meanwhile, so that adding the links is not followed.
    """
    return handle_torch_function(linked_in_graph, (), y)


def _has_backward(y: Tensor) -> bool:
    return torch.is_grad_enabled() and (y.is_floating_point() or y.is_complex())


def _zero_of(y: Tensor) -> Tensor:
    """Return a number that is 0, from which backward comes to y."""
    return y.reshape(-1)[:0].abs().sum()
