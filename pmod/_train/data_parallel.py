"""`data_parallel`: gradients are reduced bucket by bucket while backward runs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar, cast
from weakref import WeakSet, finalize, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from pmod._collectives.values import PICK, PSUM, Mean, Root
from pmod._core.arguments import wrong
from pmod._core.start import Pending, start
from pmod._core.tree import together
from pmod._core.watch import called_as
from pmod._errors import ArgumentError, PmodError, phrase
from pmod._mesh.ambient import resolve
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import AxisLike
from pmod._torch import (
    accumulation_hooks,
    are_transforms_active,
    at_end_of_backward,
    backward_here,
    forward_hooks,
    no_function_subclasses,
)
from pmod._train.share_parameters import (
    Reduce,
    Reduces,
    check_module,
    check_not_reduced,
    linked,
    replicate,
)
from pmod._train.unsent import Unsent

M = TypeVar("M", bound=nn.Module)
H = TypeVar("H")

# As DDP: a small first message, so that sending begins early, then large ones.
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20

# The attribute of a module that was wrapped at axis size 1, where nothing is attached.
_ALONE = "pmod_data_parallel_of_one_rank"


class _Bucket:
    """Parameters whose gradients travel together, and the message that they are in."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.ready: set[int] = set()
        self.sent: Pending[list[Tensor]] | None = None


class _Hook(Generic[H]):
    """A method of a reducer, as a hook of a parameter that does not keep it alive.

    Python's garbage collector does not see what torch's hooks of a parameter hold: held
    by them, the reducer and its module would never be freed. The module holds the
    reducer, and so does the graph of a call of the module.
    """

    def __init__(self, reducer: _Reducer, method: Callable[..., H], *first: object):
        self._of = ref(reducer)
        self._method, self._first = method, first
        self._axis = reducer._axis

    @property
    def __self__(self) -> _Reducer | None:
        """The reducer, as of a method; None if it is gone."""
        return self._of()

    def __call__(self, *args: object) -> H:
        reducer = self._of()
        if reducer is None:
            given = "backward came to a parameter of a module that is gone, so its gradient is not reduced"
            right = "Keep the module that data_parallel was called with while its parameters are trained."
            raise wrong(PmodError, "data_parallel", self._axis, given, right)
        return self._method(reducer, *self._first, *args)


class _Reducer(Reduces):
    """Reduces the gradients of a module over an axis, while backward runs."""

    _over_all_axes = True

    def __init__(self, module: nn.Module, axis: Axis, reduce: Reduce) -> None:
        self._module, self._axis = module, axis
        self._reduce = reduce
        # the backward pass that is running, and whether it sends nothing
        self._pass, self._holds = -1, False
        self.unsent = Unsent(self._refuse_unsent)
        # the parameters whose gradient of this pass is n times as large
        self._scaled: set[int] = set()
        self._learn(list(module.parameters()))
        self._calls = [
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(self._leave),
        ]
        self._attach()
        self._registrations = _see_registrations(self)

    def _learn(self, parameters: list[nn.Parameter]) -> None:
        self._known = [(p, _kind(p)) for p in parameters]
        self._buckets = [_Bucket(members) for members in _in_buckets(parameters)]
        # the module and those in it, once somebody asks
        self._inside: WeakSet[nn.Module] | None = None

    def _attach(self) -> None:
        # every pass comes to it, also one that uses no parameter; compiled code holds
        # it, so it stays where it can
        device = torch.device("cpu")
        if self._known:
            device = self._known[0][0].device
        if getattr(self, "_anchor", torch.empty((), device="meta")).device != device:
            self._anchor = torch.zeros((), device=device, requires_grad=True)
            self._anchor.register_hook(self._begin)
        self._accumulators: dict[int, Node] = {}
        self._handles: list[RemovableHandle] = []
        for number, bucket in enumerate(self._buckets):
            for p in bucket.parameters:
                _drop_dead_hooks(p)
                if self._reduce == "sum":
                    self._scale(p)
                hook = _Hook(self, _Reducer._on_gradient, number)
                self._handles.append(p.register_post_accumulate_grad_hook(hook))
        for p, (trained, _, _) in self._known:
            if not trained:
                self._refuse_gradient(p, "was unfrozen")

    def _scale(self, p: Tensor) -> None:
        """Take the sum as n times the mean.

        A mean may be taken again, as the next pass does where `.grad` is kept.
        """
        # torch.autograd.grad does not come to this node, so it is not scaled
        accumulator = _accumulator(p)
        hook = _Hook(self, _Reducer._times_n, id(p))
        self._handles.append(accumulator.register_prehook(hook))
        self._accumulators[id(p)] = accumulator

    def _refuse_gradient(self, p: Tensor, happened: str) -> None:
        """Let backward raise if it comes to this parameter before the next call."""
        # one that has no shape yet lets nobody else ask it anything
        with no_function_subclasses():
            if not (p.is_floating_point() or p.is_complex()) or p.is_inference():
                return
            trained = p.requires_grad
            # a frozen one takes no hook
            p.requires_grad_(True)
            hook = _Hook(self, _Reducer._refuse, happened)
            self._handles.append(p.register_post_accumulate_grad_hook(hook))
            p.requires_grad_(trained)

    def _refuse(self, happened: str, p: Tensor) -> None:
        names = [name for name, q in self._module.named_parameters() if q is p]
        name = names[0] if names else "a parameter"
        raise self._late(f"{name} {happened} after the last call of the module")

    def registered(self, where: nn.Module, new: object) -> None:
        """See what is about to become a parameter or a module inside.

        Until the next call of the module, its gradient is its own.
        """
        if self._inside is None:
            self._inside = WeakSet(self._module.modules())
        if where not in self._inside or not isinstance(new, nn.Module | nn.Parameter):
            return
        known = {id(p) for p, _ in self._known}
        parameters: list[nn.Parameter] = []
        if isinstance(new, nn.Parameter):
            parameters = [new]
        else:
            self._inside.update(new.modules())
            parameters = list(new.parameters())
        for p in parameters:
            if id(p) not in known:
                self._refuse_gradient(p, "became a parameter")

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def remove(self) -> None:
        """Take every hook off; a backward pass of a call before this raises."""
        for handle in [*self._calls, *self._registrations]:
            handle.remove()
        self._detach()
        self._calls = []
        # they are to be this rank's own
        self.unsent.clear()

    def _enter(self, module: nn.Module, args: object) -> None:
        """See what has changed since the last call.

        Parameters may have come, gone, or been frozen, unfrozen or moved.
        """
        if torch.compiler.is_compiling() or are_transforms_active():
            return
        if not torch.is_grad_enabled():
            return
        # tensors in place of parameters are of a functional_call, or of
        # share_parameters over another axis
        held: list[Tensor] = list(module.parameters())
        now = [p for p in held if isinstance(p, nn.Parameter)]
        if len(now) < len(held) or self._are_known(now):
            return
        check_not_reduced(module, "data_parallel", self._axis, but=self)
        if any(is_lazy(p) for p in now):
            given = "a new parameter has no shape yet"
            right = "Call the module once under torch.no_grad(), which gives it one."
            raise wrong(ArgumentError, "data_parallel", self._axis, given, right)
        before = {id(p) for p, _ in self._known}
        self._detach()
        self._learn(now)
        self._make_equal([p for p in now if id(p) not in before])
        self._attach()

    def _are_known(self, now: Sequence[nn.Parameter]) -> bool:
        """Return whether nothing has changed since they were looked at."""
        if len(now) != len(self._known):
            return False
        for p, (known, kind) in zip(now, self._known, strict=True):
            if p is not known or _kind(p) != kind:
                return False
        return not self._lost()

    def _make_equal(self, new: list[nn.Parameter]) -> None:
        """Write into new parameters the values that the first rank has."""
        if not new:
            return
        with torch.no_grad():
            values = together(PICK, [p.detach() for p in new], self._axis, Root(0))
            for p, value in zip(new, values, strict=True):
                p.copy_(value)

    def _lost(self) -> bool:
        """Return whether torch has made the nodes that multiply anew.

        A cast there and back leaves no other trace.
        """
        if self._reduce != "sum":
            return False
        for bucket in self._buckets:
            for p in bucket.parameters:
                if _accumulator(p) is not self._accumulators[id(p)]:
                    return True
        return False

    def __getstate__(self) -> Mapping[str, object]:
        left = ("_anchor", "_accumulators", "_handles", "_registrations", "unsent")
        kept = {key: value for key, value in vars(self).items() if key not in left}
        return kept | {"_scaled": set(), "_inside": None}

    def __setstate__(self, state: Mapping[str, object]) -> None:
        vars(self).update(state)
        self.unsent = Unsent(self._refuse_unsent)
        # a copy of a parameter has none of its hooks
        self._attach()
        self._registrations = _see_registrations(self)

    def _times_n(
        self, parameter: int, gradients: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        # share_parameters, over another axis, found that no rank there used it
        if gradient is None:
            return gradients
        self._scaled.add(parameter)
        return (gradient * self._axis.size,)

    def _leave(self, module: nn.Module, args: object, output: object) -> object:
        if not torch.is_grad_enabled():
            return output
        if not any(p.requires_grad for p in module.parameters()):
            return output
        return linked(output, [self._anchor])

    def _reset(self, running: int) -> None:
        self._pass = running
        self._scaled.clear()
        for bucket in self._buckets:
            bucket.ready.clear()
            if bucket.sent is not None:
                # of a pass that raised: nobody waits for it
                bucket.sent._finish = None
            bucket.sent = None

    def _begin(self, _: Tensor) -> None:
        """In the first hook of a pass: see to it that the pass ends with `_finish`."""
        running = backward_here()
        if self._pass == running:
            return
        if not self._calls:
            raise self._late(
                "remove_data_parallel was called between the call of the module and backward"
            )
        for p, kind in self._known:
            if p.requires_grad and (p.dtype, p.device) != kind[1:]:
                raise self._late(
                    "a parameter was moved between the call of the module and backward"
                )
        self.unsent.check_values()
        # a pass that raised may have left something behind
        self._reset(running)
        self._holds = self.unsent.contexts > 0
        at_end_of_backward(self._finish)

    def _on_gradient(self, number: int, p: Tensor) -> None:
        if p.grad is None:
            # share_parameters, over another axis, found that no rank there used it
            if self._is_first(p):
                return
            # or a hook of the user's ran before this one
            given = "a hook took a gradient away before it was reduced"
            right = "Register the hook after data_parallel."
            raise wrong(PmodError, "data_parallel", self._axis, given, right)
        if p.grad.requires_grad:
            given = "backward ran with create_graph=True, and what is reduced in .grad has no derivative"
            right = "Use share_parameters(module, axis, reduce='mean')."
            raise wrong(PmodError, "data_parallel", self._axis, given, right)
        if self._reduce == "sum" and id(p) not in self._scaled:
            raise self._late(
                "a parameter was moved to another dtype or device after the last call of the module"
            )
        self._scaled.discard(id(p))
        self._begin(p)
        if self._holds:
            self.unsent.add(p)
            return
        bucket = self._buckets[number]
        bucket.ready.add(id(p))
        if len(bucket.ready) == len(bucket.parameters):
            self._send()

    def _is_first(self, p: Tensor) -> bool:
        """Return whether no other hook sees this parameter's gradient before."""
        first = next(iter(accumulation_hooks(p).values()))
        return getattr(first, "__self__", None) is self

    def _check_known(self) -> None:
        """Raise if a parameter has a gradient that no call of the module has found.

        That gradient would be this rank's own.
        """
        known = {id(p) for p, _ in self._known}
        held = self._module.named_parameters()
        for name, p in cast(Iterator[tuple[str, Tensor]], held):
            is_new = id(p) not in known and isinstance(p, nn.Parameter)
            if is_new and p.grad is not None:
                self._reset(-1)
                raise self._late(
                    f"{name} became a parameter in the last call of the module, or after it"
                )

    def _refuse_unsent(self, happened: str) -> PmodError:
        given = f"{happened} while gradients of passes under no_sync are not sent, so each rank has its own"
        right = "Run the last pass before a step outside of no_sync: it sends them all."
        return wrong(PmodError, "data_parallel", self._axis, given, right)

    def _late(self, given: str) -> PmodError:
        right = "Call the module after the change, as it is: a call of it finds what has changed."
        return wrong(PmodError, "data_parallel", self._axis, given, right)

    def _send(self, everything: bool = False) -> None:
        """Send what is complete.

        It goes in the order of the buckets, which is the same on all ranks.
        """
        for bucket in self._buckets:
            if bucket.sent is not None:
                continue
            if not everything and len(bucket.ready) < len(bucket.parameters):
                return
            first = bucket.parameters[0]
            flags = [
                id(p) in bucket.ready or p in self.unsent for p in bucket.parameters
            ]
            used = torch.tensor(flags, device=first.device).to(first.dtype)
            message = [*map(_dense_gradient, bucket.parameters), used]
            with torch.no_grad():
                bucket.sent = called_as("data_parallel", start, self._mean, message)

    def _mean(self, gradients: list[Tensor]) -> list[Tensor]:
        return together(PSUM, gradients, self._axis, Mean(self._axis.size, None))

    def _finish(self) -> None:
        """At the end of backward: let what was sent become the gradients."""
        self._check_known()
        if self._holds:
            self._reset(-1)
            return
        self._send(everything=True)
        for bucket in self._buckets:
            assert bucket.sent is not None
            *gradients, used = bucket.sent.wait()
            for i, p in enumerate(bucket.parameters):
                gradient = gradients[i]
                if p.grad is None:
                    # one that no rank used stays without a gradient
                    if used[i] != 0:
                        p.grad = gradient
                elif p.grad.layout is not torch.strided:
                    p.grad = gradient
                else:
                    # it may be a part of a buffer of the user's
                    p.grad.copy_(gradient)
            self.unsent.sent(bucket.parameters)
        self._reset(-1)


def _drop_dead_hooks(p: Tensor) -> None:
    """Take off the hooks of reducers that are gone with their modules."""
    hooks = accumulation_hooks(p)
    for number, hook in [*hooks.items()]:
        if isinstance(hook, _Hook) and hook.__self__ is None:
            del hooks[number]


def _dense_gradient(p: Tensor) -> Tensor:
    if p.grad is None:
        return torch.zeros_like(p)
    # .data: where gradients are parts of one buffer, a change of one counts as a change
    # of all
    return p.grad.data.to_dense()


def _see_registrations(reducer: _Reducer) -> list[RemovableHandle]:
    """Return hooks that tell the reducer what is registered in any module.

    They do so as long as it lives.
    """
    of = ref(reducer)

    def tell(where: nn.Module, _: str, new: object) -> None:
        reducer = of()
        if reducer is not None:
            reducer.registered(where, new)

    handles = [
        register_module_parameter_registration_hook(tell),
        register_module_module_registration_hook(tell),
    ]
    for handle in handles:
        finalize(reducer, handle.remove)
    return handles


def _kind(p: Tensor) -> tuple[bool, torch.dtype, torch.device]:
    return p.requires_grad, p.dtype, p.device


def _accumulator(p: Tensor) -> Node:
    """Return the node that adds into p.grad."""
    with torch.enable_grad():
        view = cast(Node, p.view_as(p).grad_fn)
    return cast(Node, view.next_functions[0][0])


def _in_buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Give the parameters in about the order in which backward comes to them."""
    full: list[Tensor] = []
    held: tuple[torch.dtype, torch.device] | None = None
    size, limit = 0, FIRST_BUCKET
    for p in reversed(parameters):
        if not p.requires_grad:
            continue
        # one message carries one dtype and device
        before, held = held, (p.dtype, p.device)
        if full and (size >= limit or held != before):
            yield full
            full, size, limit = [], 0, BUCKET
        full.append(p)
        size += p.numel() * p.element_size()
    if full:
        yield full


def data_parallel(module: M, axis: AxisLike, *, reduce: Reduce = "mean") -> M:
    """Train one module on every rank's own data: its gradients are averaged.

    The same module is returned. The values are made equal now (`replicate`, from the
    first rank). In each backward pass the gradients travel in buckets while it still
    runs, and `.grad` holds their mean (reduce="sum": their sum) when it returns; with
    several backward passes before a step it holds what they add up to. A parameter that
    some rank did not use counts as 0 there; one that no rank used keeps no gradient. At
    axis size 1 nothing is attached. `remove_data_parallel` ends it. What is frozen,
    unfrozen, moved, replaced or added later is found at the next call of the module, on
    all ranks alike; the values of new parameters are made equal then, by a broadcast
    from the first rank; new buffers are not. Calls under torch.no_grad, compiled ones
    and those of a submodule do not look: where a gradient then comes to what no call
    has found, backward raises. The result is written into `.grad` where there is one,
    so that it may be a part of a buffer of yours; a sparse gradient travels dense, and
    stays so.
    Cost: the gradients, 2 (n-1)/n of them sent per rank in each backward pass. Only
    what backward() leaves in `.grad` is reduced: for torch.autograd.grad, create_graph
    or torch.func use `share_parameters`, or `pvary` over the parameters. To wrap the
    module in torch's own DDP instead, pass `process_group=mesh.group(axis)`.
    Raises: PmodError if the gradients are reduced over this axis already, or by
    data_parallel over another; in a backward pass with create_graph; ArgumentError if
    the argument is not a module.

    >>> def gradient():
    ...     layer = pmod.data_parallel(torch.nn.Linear(1, 1, bias=False), "data")
    ...     layer(torch.ones(1, 1) * (1 + pmod.axis_index("data"))).sum().backward()
    ...     return layer.weight.grad
    >>> pmod.simulate(gradient, data=2)
    [tensor([[1.5000]]), tensor([[1.5000]])]
    """
    bound = resolve(axis, "data_parallel")
    check_module(module, reduce, "data_parallel", bound)
    check_not_reduced(module, "data_parallel", bound)
    replicate(module, axis)
    if bound.size > 1:
        _Reducer(module, bound, reduce)
    else:
        # a copy of the module has it, too
        setattr(module, _ALONE, True)
    return module


def remove_data_parallel(module: M) -> M:
    """Let a module's gradients be this rank's own again, from its next call on.

    The same module is returned. What `data_parallel` attached to this very module, or
    to what it is a copy of, is taken off; the values stay. Nothing is sent, and a
    module without it stays as it is. A backward pass of a call before this raises
    PmodError.

    >>> layer = pmod.data_parallel(torch.nn.Linear(2, 1), mesh["data"])
    >>> pmod.remove_data_parallel(layer) is layer
    True
    """
    if not isinstance(module, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        given = f"module is a {type(module).__name__}"
        raise ArgumentError(phrase("remove_data_parallel", given, "Pass an nn.Module."))
    for reducer in _reducers_of(module):
        reducer.remove()
    if hasattr(module, _ALONE):
        delattr(module, _ALONE)
    return module


def _reducers_of(module: nn.Module) -> list[_Reducer]:
    """Return what `data_parallel` attached to this very module."""
    owners = [getattr(hook, "__self__", 0) for hook in forward_hooks(module).values()]
    return [owner for owner in owners if isinstance(owner, _Reducer)]


@contextmanager
def no_sync(model: nn.Module) -> Generator[None]:
    """Let backward passes leave their gradients unsent: the next pass outside sends all.

    So k passes send once. What counts is where `backward` is called. Under it `.grad`
    adds up on each rank by itself; the first pass outside, which may be of any loss,
    reduces what has added up: what it leaves in `.grad` are the gradients of the sum of
    the k losses, as with k passes that each send. A parameter that some rank used in
    any of the passes counts. `model` is what `data_parallel` returned, or holds such
    modules. Contexts may be nested, and an exception ends them. All ranks must leave
    the same passes out: else CollectiveTimeout (MismatchError in `simulate`).
    Cost: nothing is sent. At axis size 1 nothing changes.
    Raises: ArgumentError if the argument is not a module; PmodError if data_parallel
    wrapped neither it nor a module inside. For `share_parameters`, add up the losses
    and call backward once. Where an optimizer steps with gradients that were never
    sent, its step raises PmodError, and the next pass where a parameter was changed
    without an optimizer; `zero_grad` drops them.

    >>> def gradient():
    ...     layer = pmod.data_parallel(torch.nn.Linear(1, 1, bias=False), "data")
    ...     x = torch.ones(1, 1) * (1 + pmod.axis_index("data"))
    ...     with pmod.no_sync(layer):
    ...         layer(x).sum().backward()  # nothing is sent
    ...     layer(10 * x).sum().backward()  # one message: 11 x, averaged
    ...     return layer.weight.grad
    >>> pmod.simulate(gradient, data=2)
    [tensor([[16.5000]]), tensor([[16.5000]])]
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        given = f"model is a {type(model).__name__}"
        raise ArgumentError(phrase("no_sync", given, "Pass an nn.Module."))
    reducers: list[_Reducer] = []
    is_wrapped = False
    for module in model.modules():
        reducers += _reducers_of(module)
        is_wrapped = is_wrapped or hasattr(module, _ALONE)
    if not (reducers or is_wrapped):
        given = f"data_parallel wrapped neither this {type(model).__name__} nor a module inside"
        right = "Pass what data_parallel returned; with share_parameters, add up the losses and call backward once."
        raise PmodError(phrase("no_sync", given, right))
    for reducer in reducers:
        reducer.unsent.watch_optimizers()
        reducer.unsent.contexts += 1
    try:
        yield
    finally:
        for reducer in reducers:
            reducer.unsent.contexts -= 1
