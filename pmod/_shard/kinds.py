"""Which tensors are V and which are I inside `shard_map`, followed from operation to
operation, as JAX does.

A tensor has the set of axes along which it varies. Where an operation of torch takes
tensors that vary along different axes, those that are one value (I) along some of them
go through `pvary`, and so their gradients are summed, once; a collective says by its
row what it takes and gives. Nothing else is changed: outside `shard_map`, pvary is
explicit.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, TypeAlias
from weakref import ref

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function
from torch.utils.weak import WeakIdKeyDictionary

from pmod._collectives.places import axis_index
from pmod._collectives.used import Idle, linked, pvary_used
from pmod._collectives.values import differentiated, pvary
from pmod._core.arguments import wrong
from pmod._core.bind import bind
from pmod._core.leaves import map_tensors, tensors_in
from pmod._core.lineage import lineage
from pmod._core.marks import is_marked_varying
from pmod._core.row import Call
from pmod._errors import ArgumentError, PmodError, phrase
from pmod._mesh.ambient import resolve
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import Mesh
from pmod._shard.captured import captured_leaves
from pmod._shard.traced import show_writes, writes_traced, written_places
from pmod._site import call_site
from pmod._torch import (
    FOREACH,
    TYPED_STORAGE,
    HigherOrderOperator,
    Operator,
    OperatorPacket,
    are_transforms_active,
    base_of,
    constant_in_graphs,
    count_function_modes,
    gets_base,
    has_storage,
    is_wrapped,
    next_number,
    no_function_modes,
    number_of,
    transform_level,
    unwrap,
    version_of,
    version_untraced,
)

Axes: TypeAlias = frozenset[str]

NONE: Axes = frozenset()
Known: TypeAlias = tuple[Axes, Axes, bool, int]
UNKNOWN: tuple[None, Axes, bool, int] = (None, NONE, False, 0)

# of no tensor: each rank makes the same of the same numbers. What these make is I,
# until the rank asks for its index
SAME = {
    "zeros",
    "ones",
    "full",
    "empty",
    "eye",
    "arange",
    "linspace",
    "logspace",
    "tensor",
    "as_tensor",
    "asarray",
    "scalar_tensor",
    "tril_indices",
    "triu_indices",
    "fft_fftfreq",
    "fft_rfftfreq",
}
# they take lengths of their results: one that is as long as an uneven shard is the
# rank's own
LENGTHS = {"expand", "broadcast_to", "repeat", "tile", "repeat_interleave", "narrow"}
# how long their results are depends on the values: a length of the rank's own, where
# these vary
BY_VALUE = {
    "nonzero",
    "argwhere",
    "masked_select",
    "unique",
    "unique_consecutive",
    "bincount",
}
# views by which a tensor that the tracer shows without its base can be written into
VIEWS = {
    "__getitem__",
    "view",
    "reshape",
    "transpose",
    "t",
    "permute",
    "select",
    "narrow",
    "expand",
    "squeeze",
    "chunk",
    "unsqueeze",
    "flatten",
    "unflatten",
    "swapaxes",
    "movedim",
    "diagonal",
    "split",
    "unbind",
    "detach",
    "view_as",
    "swapaxes_",
    "transpose_",
    "t_",
    "squeeze_",
    "unsqueeze_",
    "detach_",
    "alias",
}
# each rank draws its own
RANDOM = {
    "rand",
    "randn",
    "randint",
    "randperm",
    "normal",
    "bernoulli",
    "multinomial",
    "poisson",
    "binomial",
    "rand_like",
    "randn_like",
    "randint_like",
    "normal_",
    "uniform_",
    "bernoulli_",
    "random_",
    "exponential_",
    "cauchy_",
    "geometric_",
    "log_normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
    "gumbel_softmax",
}
DROPOUT = {
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "feature_alpha_dropout",
    "dropout_",
}
ATTENTION = {
    "scaled_dot_product_attention": 4,
    "multi_head_attention_forward": 10,
}  # where their dropout_p is
# they change running ones, of which torch counts no version: how, and whether where
# nothing is said
STATISTICS = {
    "batch_norm": ("training", False),
    "instance_norm": ("use_input_stats", True),
}
# their result is a number, or memory of others: what a rank goes on to do with it is
# its own
NUMBERS = {
    "item",
    "tolist",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__complex__",
    "__contains__",
    "numpy",
    "__array__",
    "equal",
    "allclose",
    "is_nonzero",
    "untyped_storage",
    "storage",
    TYPED_STORAGE,
    "data_ptr",
    "__dlpack__",
}


class Kinds(TorchFunctionMode):
    """Follows the kinds of tensors while the body of a `shard_map` runs."""

    def __init__(self, mesh: Mesh, idle: Idle) -> None:
        super().__init__()
        self.mesh = mesh
        self._idle = idle
        self.everywhere: Axes = frozenset(
            [name for name, size in mesh.shape.items() if size > 1]
        )
        # of a tensor its axes, those of them that are assumed to be on the safe side,
        # whether it had a derivative, and how often it was changed in place. A graph
        # cannot hold weak references, and need not
        self._known: dict[Any, Known] | _Noted
        self._written: MutableMapping[
            Any, Axes
        ]  # memory that was changed by what varies
        self._memory: MutableMapping[
            Any, Axes
        ]  # memory that was changed at all, as far as was seen
        self._known, self._written, self._memory = {}, {}, {}
        self._began, self._level = 0, None
        if not torch.compiler.is_compiling():
            self._known, self._written, self._memory = (
                _Noted(),
                WeakIdKeyDictionary(),
                WeakIdKeyDictionary(),
            )
            self._began = next_number()
            self._level = transform_level()
        self._differentiates = torch.is_grad_enabled()
        self._modules: list[torch.nn.Module] = []
        # of tensors from outside the body their pvary copies: along what, of which
        # version
        self._copies: dict[Tensor, dict[Axes, tuple[int, Tensor]]] = {}
        self._fused: set[Tensor] = (
            set()
        )  # copies that were made together, with a link of their own
        self._asked: Axes = NONE  # the axes along which this rank knows its own place: what it then makes is V
        self._ways: list[Axes] = []  # the same, in the order in which it asked
        self.lengths: dict[
            int, Axes
        ] = {}  # of uneven shards, those of all ranks: numbers that a rank has of its own
        self._roots: list[Any] = []  # the functions whose bodies run
        self._links: list[
            Tensor
        ] = []  # each a number that is 0, by which backward comes to what every rank sums
        self._arguments: list[Tensor] = []  # shards with a derivative
        self._looks_ahead = False  # what a body refers to is being looked up
        self._views: dict[
            Tensor, bool
        ] = {}  # while compiling: those whose base is not known
        self._shown = (
            0,
            0,
        )  # while compiling: the writes into tensors in the graph when control was here last
        if torch.compiler.is_compiling():
            show_writes()
            self._shown = writes_traced()
        self._met: list[
            Tensor
        ] = []  # while compiling: copies of one value that met what varies
        self._unsummed = (
            False  # one value with a derivative met what varies while no graph was made
        )

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            self.check_shown()
            result = self._followed(func, args, kwargs)
            self._shown = writes_traced()
            return result
        usual = self._one_kind(func, args, kwargs)
        if usual is not None:
            result = func(*args, **kwargs)
            for y in [result] if isinstance(result, Tensor) else tensors_in(result):
                self._known[y] = usual, NONE, y.requires_grad, version_untraced(y)
            return result
        return self._followed(func, args, kwargs)

    def _followed(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if func is bind:
            return self._bind(*args, **kwargs)
        if func is kinds_here:
            return self
        if func is all_cut:
            return self._vary_unasked()
        if func is _linked:
            return self._linked_compiled(*args)
        if func is axis_index or func is Mesh.axis_index:
            self._ask(self._names(args[-1]))
            return func(*args, **kwargs)
        if func is Mesh._own_coords:
            self._ask(self._names(args[0]))
            return func(*args)
        if func is torch.autograd.grad:
            return self._gradients(args, kwargs)
        if func is Tensor.backward:
            return self._backward(*args, **kwargs)
        if _name(func) == "__get__":
            return self._get(func, args)
        if _name(func) == "__set__":
            return self._set(func, args)
        return self._operation(func, args, kwargs)

    def _one_kind(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Axes | None:
        """Of a plain operation on tensors of one kind, about which nothing is in doubt:
        the kind. The usual case.
        """
        doubtful = (
            self._asked or self._written or self.lengths or are_transforms_active()
        )
        if torch.is_inference_mode_enabled():  # it counts no changes
            return None
        if (
            doubtful
            or "out" in kwargs
            or not (_plain[func] if func in _plain else _is_plain(func))
        ):
            return None
        kind: Axes | None = None
        for x in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(x, Tensor):
                axes, assumed, had_derivative, version = self._known.get(x, UNKNOWN)
                if axes is None or assumed or axes != (axes if kind is None else kind):
                    return None
                if not had_derivative and x.requires_grad and not x.is_leaf:
                    return None
                try:
                    if version != version_untraced(x):
                        return None
                except RuntimeError:  # an inference tensor counts none
                    return None
                kind = axes
            elif isinstance(x, list | tuple | dict) and tensors_in(x):
                return None
        return kind

    # --- what is known ----------------------------------------------------------------

    def of(self, x: Tensor) -> Axes:
        """The axes along which a tensor varies."""
        found, assumed, had_derivative, version = self._known.get(x, UNKNOWN)
        if found is not None and version != _version(x):
            found = self._changed_unseen(x, found)
        # what got its derivative later comes from an autograd.Function, whose forward
        # runs without
        if found is None or (x.requires_grad and not had_derivative and not x.is_leaf):
            if torch.compiler.is_compiling():
                return self._while_compiling(x)
            if is_wrapped(x):
                return self.of(unwrap(x))
            assumed = assumed if x.requires_grad else self.everywhere
            found = self._from_outside(x, found) if x.requires_grad else self.everywhere
            self.note(x, found, assumed & found)
        if self._written and has_storage(x):
            return found | self._written.get(x.untyped_storage(), NONE)
        return found

    def _changed_unseen(self, x: Tensor, found: Axes) -> Axes:
        """Of a tensor that was changed by another name, or by what function modes do
        not see, as Tensor.set_.
        """
        memory = self._memory.get(x.untyped_storage()) if has_storage(x) else None
        of, assumed = (
            found | (self.everywhere if memory is None else memory),
            self.assumed(x),
        )
        self.note(x, of, assumed | ((of - found) if memory is None else NONE))
        return of

    def _while_compiling(self, x: Tensor) -> Axes:
        if isinstance(x, torch.nn.Parameter):
            return NONE
        if x.requires_grad or are_transforms_active():
            raise self._unseen()
        return self.everywhere

    def _unseen(self) -> PmodError:
        given = "under torch.compile it cannot follow tensors into a transform or a checkpoint"
        right = "Transform or checkpoint the function that shard_map gives, or run this one eagerly."
        return wrong(
            ArgumentError, "shard_map", resolve(self.mesh, "shard_map"), given, right
        )

    def assumed(self, x: Tensor) -> Axes:
        """Those axes along which a tensor may as well be one value."""
        return self._known[x][1] if x in self._known else NONE

    def note(self, x: Tensor, axes: Axes, assumed: Axes = NONE) -> None:
        """The axes along which a tensor varies are these."""
        self._known[x] = axes, assumed, x.requires_grad, _version(x)
        # what leaves a transform is the tensor within
        if not torch.compiler.is_compiling() and is_wrapped(x):
            self.note(unwrap(x), axes, assumed)

    @property
    def asked(self) -> bool:
        """Whether this rank knows what is its own, and may go its own way."""
        return bool(self._asked)

    def comes_in(self, x: Tensor) -> None:
        """A tensor is from outside the body."""
        if x.requires_grad and not torch.compiler.is_compiling():
            self._copies.setdefault(x, {})

    def of_body(self, f: Any) -> None:
        """The body is f: what it refers to is looked up before a rank asks for what is
        its own.
        """
        self._roots.append(f)

    def of_argument(self, x: Tensor) -> None:
        """x is a shard that goes into the body."""
        self.comes_in(x)
        if x.requires_grad:
            self._arguments.append(x)

    def of_module(self, module: torch.nn.Module) -> None:
        """The body is a module's: its buffers are one value, as its parameters are."""
        self._modules.append(module)
        for buffer in module.buffers():
            self.note(buffer, NONE)

    def uneven(self, names: str | tuple[str, ...], sizes: Sequence[int]) -> None:
        """Shards along these axes have these lengths."""
        for n in set(sizes) if len(set(sizes)) > 1 else ():
            self.lengths[n] = self.lengths.get(n, NONE) | self._names(names)

    def _from_outside(self, x: Tensor, seen: Axes | None) -> Axes:
        """Of a tensor that is no argument: a parameter is one value; else its graph
        says what it was made from.

        A graph does not say what had no derivative: what an autograd.Function took of
        that was seen in its forward, and of another function that runs here it can be
        anything.
        """
        if x.is_leaf:
            self.comes_in(x)
            return frozenset(
                [
                    name
                    for name in self.everywhere
                    if is_marked_varying(x, self._axis(name))
                ]
            )
        node: Any = x.grad_fn
        if self._unsummed and type(node).__name__ == "CheckpointFunctionBackward":
            given = f"at {call_site()[1]} one value meets what varies inside a reentrant checkpoint, which runs again"
            given += " in backward, where shard_map does not follow it"
            raise ArgumentError(phrase("shard_map", given, "Pass use_reentrant=False."))
        if seen is None:
            seen = self.everywhere if number_of(node) >= self._began else NONE
        varying: set[str] = set()
        for name in self.everywhere:
            axis = self._axis(name)
            found = lineage(x, axis)
            if not (
                found.varying
                or name in seen
                or any(name in self.of(leaf) for leaf, _ in found.leaves)
            ):
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
        names = (
            axis.axis_names
            if isinstance(axis, Mesh)
            else (axis,)
            if isinstance(axis, str)
            else tuple(axis)
        )
        return self.everywhere & frozenset(names)

    # --- what is done -----------------------------------------------------------------

    def _vary(self, x: Tensor, axes: Axes) -> Tensor:
        """x, varying along these axes too."""
        missing = axes - self.of(x)
        self._unsummed |= (
            bool(missing) and x.requires_grad and not torch.is_grad_enabled()
        )
        if not missing or not differentiated(x):
            return x
        if torch.compiler.is_compiling():
            summed = (
                x.requires_grad and torch.is_grad_enabled()
            ) or are_transforms_active()
            _, kept = self._copies.get(x, {}).get(missing, (0, None))
            if kept is not None:
                return kept
            if summed and missing & self._asked:
                raise self._ordered()
            y = self._copy(x, missing)
            self._met += [y] if summed else []
            return y
        if x not in self._copies or not self._keeps(x):
            return self._copy_elsewhere(x, missing)
        known = self._looks_ahead or any(
            [self._asked & along for along in self._copies[x]]
        )
        if missing & self._asked and not known:
            raise self._unnamed(x)
        y, along = x, NONE
        for step in (*self._ways, missing):
            new = (step & missing) - along
            along = along | new
            if new:
                version, kept = self._copies[x].get(along, (None, y))
                y = kept if version == version_of(x) else self._copy(y, new)
                self._copies[x][along] = version_of(x), y
        return y

    def _ask_compiled(self, new: Axes) -> None:
        """While compiling: the ranks' graphs are alike up to here; what they hold as
        one value varies from here on.
        """
        whole = [
            x
            for x in [
                *self._arguments,
                *[x for module in self._modules for x in module.parameters()],
            ]
            if x.requires_grad and torch.is_grad_enabled() and new - self.of(x)
        ]
        for x in whole:
            of = self.of(x)
            earlier = [(along, y) for along, (_, y) in self._copies.get(x, {}).items()]
            before, y = earlier[-1] if earlier else (NONE, x)
            step = new - of - before
            copy = self._copy(y, step)
            self.note(copy, of | before | step, self.assumed(x))
            self._copies[x] = {**self._copies.get(x, {}), before | step: (0, copy)}
            self._met.append(copy)
        for y in self._met if new else ():
            self._links.append(y.reshape(-1)[:0].abs().sum())
        self._met = [] if new else self._met

    def _ordered(self) -> PmodError:
        """While compiling: ranks that go unlike ways would sum gradients in unlike
        orders, or not all of them.
        """
        given = "under torch.compile one value that is no argument, and no parameter of a module that is f, meets what"
        given += " varies after this rank asked for what is its own: each rank may come to it in an order of its own"
        right = (
            "Pass it as an argument, with the spec P(), or run this function eagerly."
        )
        return PmodError(phrase("shard_map", given, right))

    def _copy_elsewhere(self, x: Tensor, missing: Axes) -> Tensor:
        """A copy that does not serve elsewhere in the body: in a transform, or of what
        was made in the body.
        """
        version, kept = self._copies.get(x, {}).get(missing, (None, x))
        if version == version_of(x) and torch.is_grad_enabled():
            return kept  # of the level around a transform
        inside = transform_level() != self._level and is_wrapped(x)
        if missing & self._asked and inside and x.requires_grad:
            given = f"{_here()}a transform differentiates one value along {sorted(missing & self._asked)} after this"
            given += " rank asked for what is its own: each rank may come to it in an order of its own"
            right = "Begin the function that is transformed with pmod.pvary of what it differentiates."
            raise PmodError(phrase("shard_map", given, right))
        if missing & self._asked and not inside and self._keeps(x) and not x.is_leaf:
            given = f"{_here()}one value of shape {tuple(x.shape)} meets what varies, which came about after this rank"
            given += " asked for what is its own: each rank may come to it in an order of its own"
            raise PmodError(
                phrase(
                    "shard_map",
                    given,
                    "Make it before, or put pmod.pvary around it there.",
                )
            )
        return self._copy(x, missing)

    def _unnamed(self, x: Tensor) -> PmodError:
        given = f"{_here()}it meets a parameter or leaf of shape {tuple(x.shape)} that f does not refer to by a name,"
        given += " after this rank asked for what is its own: each rank may come to it in an order of its own"
        # no TypeError: x * y makes of one that y is not supported
        return PmodError(
            phrase("shard_map", given, "Pass it as an argument, with the spec P().")
        )

    def _keeps(self, x: Tensor) -> bool:
        """Whether a copy that is made here serves elsewhere in the body."""
        graph = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        return graph and x.requires_grad and transform_level() == self._level

    def _copy(self, x: Tensor, axes: Axes) -> Tensor:
        return pvary(
            x, self.mesh[tuple([name for name in self.mesh.axis_names if name in axes])]
        )

    def _ask(self, axes: Axes) -> None:
        """The rank learns what is its own along these axes, and may go its own way.

        Before, all that is one value becomes V, together: in backward each rank sums it
        in one message, in whichever order, how often, and of whichever part it made
        use.
        """
        new, before = axes - self._asked, self._asked
        self._asked = self._asked | axes
        if torch.compiler.is_compiling():
            self._ask_compiled(new)
            return
        if not new:
            return
        self._vary_ahead(new, before)

    def _vary_unasked(self) -> None:
        """All arguments are cut; where they are uneven, a rank with an empty shard may
        ask for nothing of its own.
        """
        uneven = NONE.union(*self.lengths.values())
        if uneven and not torch.compiler.is_compiling():
            self._vary_ahead(uneven - self._asked, self._asked)

    def _vary_ahead(self, new: Axes, before: Axes) -> None:
        """What is one value and known so far becomes V."""
        self._ways.append(new)
        with no_function_modes():
            named = [x for f in self._roots for x in captured_leaves(f)]
        self._looks_ahead = True
        try:
            for x in [
                *[x for module in self._modules for x in module.parameters()],
                *named,
            ]:
                self.of(x)
            with torch.set_grad_enabled(self._differentiates):
                self._vary_all(new, before)
        finally:
            self._looks_ahead = False

    def _vary_all(self, new: Axes, before: Axes) -> None:
        """What is one value along the new axes, varying along them, in one call for
        each dtype and device.
        """
        together: dict[Axes, list[tuple[Tensor, Axes, Tensor]]] = {}
        for x in [*[x for x in self._copies if self._keeps(x)], *self._computed(new)]:
            of = self.of(x)
            step, along = new - of, before - of
            if not step or not differentiated(x):
                continue
            copies = self._copies.setdefault(x, {})
            if along | step in copies and copies[along | step][0] == version_of(x):
                if (
                    copies[along | step][1] not in self._fused
                ):  # it met what varies already, on all ranks
                    self._link(copies[along | step][1])
                continue
            y = self._vary(x, of | along)
            together.setdefault(step, []).append((x, along | step, y))
        for step, found in together.items():
            names = tuple([name for name in self.mesh.axis_names if name in step])
            with no_function_modes():
                copies, links = pvary_used(
                    [y for *_, y in found], self._axis(names), "pvary", self._idle
                )
            for link in links:
                self._link(link)
            for (x, along, y), copy in zip(found, copies, strict=True):
                self.note(copy, self.of(y) | step, self.assumed(x))
                self._copies[x][along] = version_of(x), copy
                self._fused.add(copy)

    def _computed(self, new: Axes) -> list[Tensor]:
        """What the body made so far as one value, in the order in which all ranks made
        it.
        """
        alive = self._known.alive() if isinstance(self._known, _Noted) else []
        found = [
            x
            for x in alive
            if x.requires_grad
            and not x.is_leaf
            and x not in self._copies
            and self._keeps(x)
        ]
        found = [x for x in found if x.grad_fn is not None and new - self.of(x)]
        return sorted(found, key=lambda x: (number_of(x.grad_fn), x.output_nr))

    def _link(self, y: Tensor) -> None:
        with no_function_modes():
            self._links.append(y.reshape(-1)[:0].abs().sum())

    def linked(self, y: Tensor) -> Tensor:
        """y; in backward from it, this rank takes part in all sums, also where it used
        nothing of what is summed.
        """
        if torch.compiler.is_compiling():
            return _linked(y) if self._links else y
        if not (
            self._links
            and torch.is_grad_enabled()
            and (y.is_floating_point() or y.is_complex())
        ):
            return y
        of, assumed = self.of(y), self.assumed(y)
        with no_function_modes():
            z = linked(
                y,
                [
                    *self._links,
                    *[x.reshape(-1)[:0].abs().sum() for x in self._arguments],
                ],
            )
        self.note(z, of, assumed)
        return z

    def _linked_compiled(self, y: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and (y.is_floating_point() or y.is_complex())):
            return y
        z = linked(y, self._links)
        self.note(z, self.of(y), self.assumed(y))
        return z

    def check_shown(self) -> None:
        """Whether the tracer showed each write: what varies may have been written into
        one value unseen.
        """
        if torch.compiler.is_compiling():
            (graph, n), (of, shown) = writes_traced(), self._shown
            if graph == of and n != shown:
                raise self._hidden(
                    "a change in place, such as y[i] = x, that torch.compile does not show"
                )

    def _hidden(self, what: str) -> PmodError:
        right = (
            "Use torch.where, torch.cat or torch.stack, or run this function eagerly."
        )
        given = f"under torch.compile it cannot follow {what}"
        return wrong(
            ArgumentError, "shard_map", resolve(self.mesh, "shard_map"), given, right
        )

    def _operation(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = _name(func)
        if torch.compiler.is_compiling() and _is_higher_order(func):
            raise self._unseen()
        taken = tensors_in((args, kwargs))
        before = [self.of(x) for x in taken]
        axes = NONE.union(*before)
        sure = NONE.union(
            *[of - self.assumed(x) for of, x in zip(before, taken, strict=True)]
        )
        axes = axes | self._asked | self._own_lengths(name, args, kwargs)
        if not (before or name in SAME):
            axes = self.everywhere
        if _draws(name, args, kwargs):
            axes = sure = self.everywhere
        changed = _changed(func, name, args, kwargs)
        if torch.compiler.is_compiling():
            self._check_shown_whole(name, changed, axes)
        if any(axes - of for of in before):
            for x in changed:
                self._change(x, axes)
            args, kwargs = map_tensors(lambda x: self._vary(x, axes), (args, kwargs))
        versions = _versions(taken)
        result = func(*args, **kwargs)
        for x in [
            x
            for x, old, new in zip(taken, versions, _versions(taken), strict=True)
            if old != new
        ]:
            self._refresh(x)
            self._change(x, axes)  # by an operator of the user's, say
            self._note_memory(x)
        for y in [
            *tensors_in(result),
            *changed,
        ]:  # compiled code has another tensor after a change in place
            self.note(y, axes, axes - sure)
        if torch.compiler.is_compiling() and name in VIEWS:
            self._note_views(name, taken, result)
        told = axes if name in NUMBERS else axes & self._told(name, result)
        if told:
            self._ask(told)
        if name in BY_VALUE or (name == "__getitem__" and _has_mask(args[1])):
            self._lengths_of(result, axes)
        return result

    def _told(self, name: str, result: Any) -> Axes:
        """The axes of uneven shards of which the result, a length or the rows to go
        through, tells the length.
        """
        if not self.lengths or name not in ("__len__", "size", "unbind"):
            return NONE
        n = len(result) if name == "unbind" else result
        return self.lengths.get(n, NONE) if isinstance(n, int) else NONE

    def _note_views(self, name: str, taken: list[Tensor], result: Any) -> None:
        """While compiling: views of which the tracer shows no base, and views of those."""
        if name == "detach" or any([x in self._views for x in taken]):
            for y in tensors_in(result):
                self._views[y] = True

    def _check_shown_whole(self, name: str, changed: list[Tensor], axes: Axes) -> None:
        """While compiling: whether all that shares memory with what varies from now on
        is known.
        """
        for x in changed if axes else ():
            if x not in self._known:
                raise self._hidden(
                    f"what {name} writes into a tensor that torch.compile shows anew, as x.data"
                )
            if axes - self.of(x) and (name.startswith(FOREACH) or x in self._views):
                raise self._hidden(
                    f"what varies that {name} writes into one value, in a list or by a view of it"
                )

    def _lengths_of(self, result: Any, axes: Axes) -> None:
        for y in (
            tensors_in(result) if axes and not torch.compiler.is_compiling() else ()
        ):
            if y.dim():
                self.lengths[y.shape[0]] = self.lengths.get(y.shape[0], NONE) | axes

    def _own_lengths(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Axes:
        """The axes of uneven shards with a length that is asked for here."""
        if not self.lengths or not (
            name in LENGTHS or name in SAME or name == "__getitem__"
        ):
            return NONE
        if name in SAME:
            return NONE.union(
                *[self.lengths.get(n, NONE) for n in _numbers_in([*args, kwargs])]
            )
        index = args[1] if isinstance(args[-1], tuple) else args[1:]
        asked = (
            [i for i in index if isinstance(i, slice)]
            if name == "__getitem__"
            else [args[1:], kwargs]
        )
        return NONE.union(*[self.lengths.get(n, NONE) for n in _numbers_in(asked)])

    def _change(self, x: Tensor, axes: Axes) -> None:
        """What is changed in place varies from now on; where it has a derivative
        already, that cannot be undone.

        A module's buffers are one value in its next call, too.
        """
        if axes - self.of(x) and x.requires_grad and differentiated(x):
            given = f"what is one value along {sorted(axes - self.of(x))} is changed in place by what varies"
            right = "Change its pvary copy, pmod.pvary(x, axis).clone()."
            raise ArgumentError(phrase("shard_map", _here() + given, right))
        if axes - self.of(x) and any(
            x is y or base_of(x) is y
            for module in self._modules
            for y in module.buffers()
        ):
            given = f"a buffer of the module, one value along {sorted(axes - self.of(x))}, is changed by what varies"
            right = "Change it by what is one value (pmod.pmean). A norm keeps no statistics of its shards in eval(), "
            right += "or with track_running_stats=False."
            raise ArgumentError(phrase("shard_map", _here() + given, right))
        self.note(x, axes)
        base = base_of(x)
        if base is not None:
            self.note(base, axes)
        if not torch.compiler.is_compiling() and has_storage(x):
            memory = (
                x.untyped_storage()
            )  # other views of it, x.data and x.detach() vary too
            self._written[memory] = axes | self._written.get(memory, NONE)

    def _refresh(self, x: Tensor) -> None:
        """What changed x was seen."""
        found, assumed, had_derivative, _ = self._known.get(x, UNKNOWN)
        if found is not None:
            self._known[x] = found, assumed, had_derivative, _version(x)

    def _note_memory(self, x: Tensor) -> None:
        """The memory of x was changed; what it holds is now known, also where other
        tensors share it.
        """
        if has_storage(x):
            memory = x.untyped_storage()
            self._memory[memory] = self.of(x) | self._memory.get(memory, NONE)

    def _get(self, func: Any, args: tuple[Any, ...]) -> Any:
        """x.T and x.grad are what x is; other attributes are no tensors."""
        y = func(*args)
        if isinstance(y, Tensor) and torch.compiler.is_compiling():
            self._views[y] = True
        if (
            isinstance(y, Tensor)
            and y.requires_grad
            and self._asked
            and not gets_base(func)
        ):
            y = func(self._vary(args[0], self.of(args[0]) | self._asked))
            self.note(
                y,
                self.of(args[0]) | self._asked,
                self.assumed(args[0]) | (self._asked - self.of(args[0])),
            )
        if isinstance(y, Tensor) and y not in self._known:
            self.note(y, self.of(args[0]), self.assumed(args[0]))
        return y

    def _set(self, func: Any, args: tuple[Any, ...]) -> None:
        """x.data = y: x is what y is. x.grad and flags are as they were."""
        func(*args)
        if func.__self__ is Tensor.data:
            self._copies.get(args[0], {}).clear()
            self.note(args[0], self.of(args[1]), self.assumed(args[1]))

    def _gradients(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A gradient varies where its input does."""
        given: dict[str, Any] = {
            **dict(zip(("outputs", "inputs", "grad_outputs"), args, strict=False)),
            **kwargs,
        }
        outputs, inputs, cotangents = (
            given.pop("outputs"),
            given.pop("inputs"),
            given.pop("grad_outputs", None),
        )
        self._check_sure(tensors_in(outputs))
        outputs = map_tensors(self.linked, outputs)
        outputs, cotangents = self._alike(outputs, cotangents)
        gradients = torch.autograd.grad(outputs, inputs, cotangents, *args[3:], **given)
        for x, gradient in zip(tensors_in(inputs), gradients, strict=True):
            if gradient is not None:
                self.note(gradient, self.of(x))
                self._vary_results([gradient])
        return gradients

    def _backward(
        self, y: Tensor, gradient: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> None:
        self._check_sure([y])
        outputs, cotangents = self._alike([self.linked(y)], [gradient])
        Tensor.backward(outputs[0], cotangents[0], *args, **kwargs)

    def _check_sure(self, ys: list[Tensor]) -> None:
        """Whether an output is one value or each rank's own decides its gradient, so it
        is not assumed.
        """
        for y in ys:
            assumed = self.assumed(y) if self.of(y) else NONE
            if assumed:
                given = (
                    f"at {call_site()[1]} what is differentiated {self.why(assumed)}"
                )
                right = "Pass that tensor as an argument, and ask for the place after the loss; or mark a loss of each"
                right += " rank's own with pmod.pvary(loss, axis)."
                raise ArgumentError(phrase("shard_map", given, right))

    def why(self, assumed: Axes) -> str:
        """What it is that varies along these axes on the safe side only."""
        names = ", ".join(map(repr, sorted(assumed)))
        given = f"may vary along {names} or not: it was made from a tensor that f refers to and that is no argument"
        return f"{given}, or after axis_index or a number of the rank's own"

    def _alike(self, ys: Any, cotangents: Any) -> tuple[Any, Any]:
        """Where what flows back into an output varies the output does, and the other
        way round.
        """
        if cotangents is None:
            return ys, None
        ys, cotangents = [
            [x] if isinstance(x, Tensor) else list(x) for x in (ys, cotangents)
        ]
        if len(ys) != len(cotangents):
            return ys, cotangents  # torch says so
        with torch.enable_grad():
            for i, (y, cotangent) in enumerate(zip(ys, cotangents, strict=True)):
                pair = tensors_in([y, cotangent])
                axes = NONE.union(*[self.of(x) for x in pair])
                ys[i], cotangents[i] = map_tensors(
                    lambda x, axes=axes: self._vary(x, axes), [y, cotangent]
                )
        return ys, cotangents

    def _bind(
        self, call: Call, xs: list[Tensor], forward: Any = None
    ) -> Sequence[Tensor]:
        over = self._names(call.axis.label)
        before = [self.of(x) for x in xs]
        assumed = [self.assumed(x) - over for x in xs]
        if call.row.takes == "V":
            xs = [self._vary(x, of | over) for x, of in zip(xs, before, strict=True)]
        elif call.row.name == "pvary":
            return self._pvary(call, xs, before, over)
        elif any(of & over for of in before):
            given = f"x varies along {sorted(over)} already, because it was made from what does"
            right = f"{call.row.name} takes one value: pmod.pick or a sum of x, or leave {call.row.name} out.\n"
            right += "What x.new_zeros and torch.zeros_like make of x varies as x does; torch.zeros(..., dtype=x.dtype,"
            right += " device=x.device) is one value."
            raise wrong(ArgumentError, call.row.name, call.axis, given, right)
        ys = bind(call, xs, forward)
        for y, of, guess in zip(ys, before, assumed, strict=True):
            self.note(y, of - over if call.row.gives == "I" else of | over, guess)
        if call.row.gives == "I":
            self._vary_results(ys)
        return ys

    def _vary_results(self, ys: Sequence[Tensor]) -> None:
        """Copies of what all ranks make one value after the ask, now: later each may
        come to it in its own order.
        """
        for y in ys if self._asked and not torch.compiler.is_compiling() else ():
            missing = self._asked - self.of(y)
            if missing and self._keeps(y) and differentiated(y):
                copy = self._copy(y, missing)
                self._copies[y] = {missing: (version_of(y), copy)}
                self._link(copy)

    def _pvary(
        self, call: Call, xs: list[Tensor], before: list[Axes], over: Axes
    ) -> list[Tensor]:
        """What varies already stays as it is; all others go together, as the user
        asked.
        """
        new = [i for i, of in enumerate(before) if not of & over]
        ys = list(xs)
        for i in [i for i in new if call.params == (1, None)]:
            version, kept = self._copies.get(xs[i], {}).get(over, (None, xs[i]))
            if self._asked and version == version_of(xs[i]) and self._keeps(xs[i]):
                ys[i] = kept  # it varies since the rank asked
        new = [i for i in new if ys[i] is xs[i]]
        if new:
            for i, y in zip(new, bind(call, [xs[i] for i in new]), strict=True):
                ys[i] = y
        ys = [
            self._vary(y, of | over) if of & over else y
            for y, of in zip(ys, before, strict=True)
        ]
        for x, y, of in zip(xs, ys, before, strict=True):
            self.note(y, of | over, self.assumed(x) - over)
        return ys


class _Noted:
    """What is known of tensors, by identity, while they live: an entry of a dead one
    stays until its id comes again.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[ref[Tensor], Known]] = {}

    def get(self, x: Tensor, default: Any) -> Any:
        entry = self._entries.get(id(x))
        return entry[1] if entry is not None and entry[0]() is x else default

    def alive(self) -> list[Tensor]:
        return [x for x in [of() for of, _ in self._entries.values()] if x is not None]

    def __contains__(self, x: Tensor) -> bool:
        return self.get(x, None) is not None

    def __getitem__(self, x: Tensor) -> Known:
        return self.get(x, None)

    def __setitem__(self, x: Tensor, known: Known) -> None:
        self._entries[id(x)] = ref(x), known


def kinds_here() -> Kinds | None:
    """Those of the innermost shard_map whose body runs, or None."""
    return handle_torch_function(kinds_here, ()) if count_function_modes() > 0 else None


def all_cut() -> None:
    """The arguments of the innermost shard_map are shards now."""
    handle_torch_function(all_cut, ())


def _linked(y: Tensor) -> Tensor:
    """While compiling: y with the links of those whose body runs, which are not
    followed themselves.
    """
    return handle_torch_function(_linked, (), y)


def _here() -> str:
    return "" if torch.compiler.is_compiling() else f"at {call_site()[1]} "


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    return name.split(".")[0] if isinstance(func, Operator) else name


def _is_higher_order(func: Any) -> bool:
    """Whether it runs a function of the user's, in a graph of its own."""
    return isinstance(func, HigherOrderOperator)


_plain: dict[Any, bool] = {}  # a memo of `_is_plain`, which asks for names


def _is_plain(func: Any) -> bool:
    """Whether it is a function of torch's whose result varies where its tensors do, and
    that changes none of them.
    """
    name = _name(func)
    special = (
        SAME
        | LENGTHS
        | BY_VALUE
        | RANDOM
        | DROPOUT
        | ATTENTION.keys()
        | STATISTICS.keys()
        | NUMBERS
    )
    special |= {"grad", "backward", "rrelu", "__getitem__", "__get__", "__set__"}
    ours = not isinstance(func, (Operator, OperatorPacket, HigherOrderOperator))
    torchs = (getattr(func, "__module__", None) or "torch").split(".")[
        0
    ] == "torch"  # a method has no module
    _plain[func] = ours and torchs and name not in special and not _is_in_place(name)
    return _plain[func]


for _constant in (_name, _is_higher_order):
    constant_in_graphs(_constant)


def _changed(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    """The tensors that it changes in place, going by its name or, of an operator, by
    what its schema says.
    """
    if name in STATISTICS:
        training, usual = STATISTICS[name]
        changes = kwargs.get(training, args[5] if len(args) > 5 else usual)
        return (
            tensors_in(
                [args[1:3], kwargs.get("running_mean"), kwargs.get("running_var")]
            )
            if changes
            else []
        )
    if "out" in kwargs or _is_in_place(name):
        return tensors_in(kwargs.get("out", args[:1]))
    if kwargs.get("inplace") is True:
        return tensors_in(args[:1])
    places = written_places(func)
    by_place = [args[i] for i in places if isinstance(i, int) and i < len(args)]
    return tensors_in(
        by_place + [kwargs.get(name) for name in places if isinstance(name, str)]
    )


def _is_in_place(name: str) -> bool:
    changes = name.endswith("_") and not name.endswith("__")
    return (
        changes
        or name == "__setitem__"
        or (name.startswith("__i") and name != "__invert__")
    )


def _draws(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it draws random numbers."""
    if name in DROPOUT:
        chance = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        return bool(
            chance > 0
            and kwargs.get(
                "training", kwargs.get("train", args[2] if len(args) > 2 else True)
            )
        )
    if name in ATTENTION:
        chance = kwargs.get(
            "dropout_p", args[ATTENTION[name]] if len(args) > ATTENTION[name] else 0.0
        )
        return bool(chance > 0 and kwargs.get("training", True))
    return name in RANDOM or (
        name == "rrelu"
        and bool(kwargs.get("training", args[3] if len(args) > 3 else False))
    )


def _versions(xs: list[Tensor]) -> list[int]:
    """How often each was changed in place; a graph and an inference tensor do not
    count.
    """
    return [_version(x) for x in xs]


def _version(x: Tensor) -> int:
    if torch.compiler.is_compiling():
        return 0
    with no_function_modes():
        return 0 if x.is_inference() else version_of(x)


def _has_mask(index: Any) -> bool:
    """Whether elements are chosen by their values."""
    parts: Any = index if isinstance(index, tuple) else (index,)
    return any(
        isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8)
        for part in parts
    )


def _numbers_in(tree: Any) -> list[int]:
    """The ints in dicts, lists, tuples and slices."""
    if isinstance(tree, int):
        return [tree]
    if isinstance(tree, slice):
        tree = (tree.start, tree.stop)
    branches: Any = (
        tree.values()
        if isinstance(tree, dict)
        else tree
        if isinstance(tree, list | tuple)
        else ()
    )
    return [n for branch in branches for n in _numbers_in(branch)]
