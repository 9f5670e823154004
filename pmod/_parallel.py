"""Modules whose parameters all ranks of an axis hold: equal at the start, and their gradients reduced over the axis.

Three ways, for three needs. The pure one is `pvary` over the parameter tree, before the forward pass.
`share_parameters` does just that inside the module's own call, so it has every derivative that the pure one has.
`data_parallel` reduces what backward leaves in `.grad`, bucket by bucket while backward still runs: the fastest, for
plain training loops.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from types import FrameType
from typing import Any, Literal, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pmod._ambient import resolve
from pmod._arguments import check_root, check_tensor, wrong
from pmod._autodiff import called_as, is_mapping, refilled
from pmod._collectives import PICK, PSUM, PVARY, differentiated, pick
from pmod._errors import ArgumentError, PmodError, endless, explain, quoted
from pmod._mesh import Axis, AxisLike
from pmod._pytree import flatten, map_leaves, together
from pmod._start import Pending, start
from pmod._used import pvary_used

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
Reduce: TypeAlias = Literal["sum", "mean"]


def _checked(module: object, reduce: object, function: str, axis: Axis) -> None:
    if not isinstance(module, nn.Module):
        raise wrong(ArgumentError, function, axis, f"module is a {type(module).__name__}", "Pass an nn.Module.")
    if not isinstance(reduce, str) or reduce not in ("sum", "mean"):
        raise wrong(ArgumentError, function, axis, f"reduce is {quoted(reduce)}", "Pass 'sum' or 'mean'.")
    _state(module, function, axis)


def _state(module: nn.Module, function: str, axis: Axis) -> dict[str, Tensor]:
    """The parameters and buffers by name, each of which can be sent."""
    state: dict[str, Tensor] = dict((*module.named_parameters(), *module.named_buffers()))
    for name, tensor in state.items():
        check_tensor(tensor, function, axis, name=name)
    return {name: tensor.detach() for name, tensor in state.items()}


# --- the same values ------------------------------------------------------------------------------


def replicate(x: T, axis: AxisLike, *, src: int = 0) -> T:
    """The values of rank src on all ranks of the axis: how what they all hold is made equal at the start.

    x is a module, whose parameters and buffers are overwritten and which is returned; or a tree of tensors, of which
    an equal tree is returned, leaves of autograd like those that went in. Nothing is differentiated.
    Cost: one broadcast per dtype and device. Raises: AxisError where src is no index along the axis.

    >>> def start():
    ...     return pmod.replicate({"w": torch.ones(1) * pmod.axis_index("data")}, "data", src=1)
    >>> pmod.simulate(start, data=2)
    [{'w': tensor([1.])}, {'w': tensor([1.])}]
    """
    bound = resolve(axis, "replicate")
    check_root(src, "replicate", bound, name="src")
    if isinstance(x, nn.Module):
        state = _state(x, "replicate", bound)
        equal = pick(state, axis, src=src)
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(equal[name])
        return cast(T, x)
    leaves: list[Any] = []
    flatten(x, "replicate", bound, leaves)
    for leaf in leaves:
        check_tensor(leaf, "replicate", bound)
    with torch.no_grad():
        equal = pick(x, axis, src=src)
    return map_leaves(lambda ys: [_leaf_like(like, y) for like, y in zip(leaves, ys, strict=True)],
                      equal, "replicate", bound)  # fmt: skip


def _leaf_like(like: Tensor, y: Tensor) -> Tensor:
    y = y.clone() if y is like else y
    if isinstance(like, nn.Parameter):
        return nn.Parameter(y.detach(), requires_grad=like.requires_grad)
    return y.detach().requires_grad_(like.requires_grad)


# --- share_parameters -----------------------------------------------------------------------------


_numbers = count()
WIDTH = 16  # numbers for each set: one node for each dtype and device


class Reduces:
    """Hooks of a module that reduce its gradients over an axis."""

    _axis: Axis
    _over_all_axes = False  # whether no second one may reduce them, over whatever axis


class SharedParameters(Reduces):
    """What `share_parameters` attached to a module; `remove` takes it off again.

    >>> shared = pmod.share_parameters(torch.nn.Linear(2, 1), mesh["data"])
    >>> shared.axis
    'data'
    >>> shared.remove()
    """

    def __init__(self, module: nn.Module, axis: Axis, reduce: Reduce) -> None:
        self._module, self._axis = module, axis
        self._reduce: Reduce = reduce
        self._calls: list[nn.Module] = []  # under way, the outermost first
        self._frame: FrameType | None = None  # of the outermost call
        self._held: list[tuple[dict[str, Any], str, Any]] = []
        self._link: list[Tensor] = []
        self._number = next(_numbers)
        _run_last([], 1 + WIDTH * self._number)  # what is made from now on has higher numbers
        self._kept: list[tuple[Tensor, tuple[Any, ...], Tensor]] = []  # a parameter, its state and its pvary copy
        self._links: list[Tensor] = []  # from which backward comes to the nodes of those copies
        # what shares some of these parameters over another axis, and enters first: its copies are then copied here
        self._newer: list[SharedParameters] = []
        for older in _sharing(module):
            older._newer.append(self)
        # every module inside has the hooks, for who calls it by itself; the outermost call acts. The last to enter is
        # the first to leave, where several share over several axes; and hooks that prune or normalise come after.
        self._handles: list[Any] = []
        for inner in module.modules():
            self._handles.append(inner.register_forward_pre_hook(self._enter, prepend=True))
            self._handles.append(inner.register_forward_hook(self._leave, always_call=True))

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_kept": [], "_links": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._number = next(_numbers)  # of a copy: its sums are not those of the original

    @property
    def axis(self) -> str | tuple[str, ...]:
        """The axis over which the gradients are reduced."""
        return self._axis.label

    def remove(self) -> None:
        """From the next call on, the module's parameters are its own again."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._kept, self._links = [], [], []

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._calls and not torch.compiler.is_compiling() and not _is_running(self._frame):
            self._restore()  # after what no hook sees, such as ctrl-C
        self._calls.append(module)
        if len(self._calls) > 1:
            return
        if not torch.compiler.is_compiling():
            self._frame = sys._getframe(1)
        places = [
            (inner._parameters, name, p)
            for inner in module.modules()
            for name, p in inner._parameters.items()
            if p is not None and differentiated(p)
        ]
        shared = list({id(p): p for _, _, p in places}.values())  # a tied parameter once
        if not shared:
            return
        varying, self._link = self._copies(shared)
        self._held = places
        for parameters, name, p in places:
            parameters[name] = cast(nn.Parameter, varying[id(p)])

    def _copies(self, shared: Sequence[Tensor]) -> tuple[dict[int, Tensor], list[Tensor]]:
        """The pvary copies by the id of what they copy, and what links an output to their nodes."""
        kept = self._keep(shared) if _is_plain() else {}
        if all(id(p) in kept for p in shared):
            return kept, self._links
        copies = self._pvary(shared)
        smallest: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        for y in sorted(copies, key=Tensor.numel, reverse=True):
            smallest[y.dtype, y.device] = y
        return dict(zip(map(id, shared), copies, strict=True)), list(smallest.values())

    def _keep(self, more: Sequence[Tensor] = ()) -> dict[int, Tensor]:
        """Copies of all parameters, made once for all calls between two steps; {} where some are computed.

        So one node of the graph sums a parameter's gradient, whichever module is called first and however often. The
        nodes have the lowest numbers, in the order in which share_parameters was called: backward comes to them last.
        """
        if self._held:  # under way: the modules hold the copies
            return {id(p): y for p, _, y in self._kept}
        whole = {id(p): p for p in (*self._module.parameters(), *more) if differentiated(p)}
        copied: set[int] = set()
        for other in reversed(self._newer):
            if other._handles:
                newer = other._keep()
                copied |= {id(y) for y in newer.values()}
                whole = {id(y): y for y in (newer.get(i, p) for i, p in whole.items())}
        if not all(id(p) in copied or (p.is_leaf and p.requires_grad) for p in whole.values()):
            return {}
        now = [(p, (p._version, p.data_ptr(), p.shape, p.dtype)) for p in whole.values()]
        if [(id(p), at) for p, at, _ in self._kept] != [(id(p), at) for p, at in now]:
            copies, self._links = self._together(list(whole.values()))
            if self._axis.size > 1:
                _run_last([y.grad_fn for y in copies], 1 + WIDTH * self._number)
            if self._reduce == "mean":
                for y in copies:  # no division in the graph: the first backward would free what it keeps
                    y.register_hook(self._divided)
            self._kept = [(*of, y) for of, y in zip(now, copies, strict=True)]
        return {id(p): y for p, _, y in self._kept}

    def _together(self, parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Copies that know what no rank used, and a link to each of their nodes."""
        if self._axis.size == 1:
            return self._pvary(parameters, scale=False), []
        return pvary_used(parameters, self._axis, "share_parameters")

    def _divided(self, gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else gradient / self._axis.size  # None: unused on this rank

    def _pvary(self, parameters: Sequence[Tensor], *, scale: bool = True) -> list[Tensor]:
        varying = called_as("share_parameters", together, PVARY, list(parameters), self._axis, (1, None))
        if self._reduce == "sum" or not scale:
            return varying
        # the same value; of its derivative the n-th part
        n = self._axis.size
        return [p.detach() + (v - v.detach()) / n for p, v in zip(parameters, varying, strict=True)]

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        if all(call is not module for call in self._calls):
            return output  # another hook raised before `_enter`
        while self._calls.pop() is not module:
            pass
        if self._calls:
            return output
        link = self._restore()
        return _linked(output, link) if link else output

    def _restore(self) -> list[Tensor]:
        for parameters, name, p in self._held:
            parameters[name] = p
        link = self._link
        self._calls, self._frame, self._held, self._link = [], None, [], []
        return link


def _sharing(module: nn.Module) -> list[SharedParameters]:
    """What shares a parameter of the module already, over another axis; the oldest first."""
    found: dict[int, SharedParameters] = {}
    for inner in module.modules():
        for hook in inner._forward_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, SharedParameters):
                found[owner._number] = owner
    return [found[number] for number in sorted(found)]


def _is_plain() -> bool:
    """Whether autograd alone runs, with no transform around it: what it makes now, a later call may use."""
    compiling = torch.compiler.is_compiling()
    return not compiling and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()


def _run_last(nodes: Sequence[Any], number: int) -> None:
    """Let backward come to these nodes after all others: of those that are ready, it takes the highest number.

    The rest of the graph has higher ones: this thread's next node does not get one of these.
    """
    one = torch.ones((), requires_grad=True)
    while torch._C._autograd._get_sequence_nr() <= number + WIDTH:  # type: ignore[attr-defined]
        one.view_as(one)
    for i, node in enumerate(dict.fromkeys(nodes)):
        node._set_sequence_nr(number + i)


def _is_running(frame: FrameType | None) -> bool:
    caller: FrameType | None = sys._getframe(1)
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is not None


def _linked(output: Any, shared: list[Tensor]) -> Any:
    """The output, and 0 times what is shared: a rank that used none of it still takes part in its sum."""
    device = shared[0].device
    nothing = torch.stack([x.reshape(-1)[:0].sum().real.float().to(device) for x in shared]).sum()

    def link(x: Any) -> Any:
        return x + nothing.to(x.device, x.dtype) if x.is_floating_point() or x.is_complex() else x

    return map_tensors(link, output)


def map_tensors(f: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """f on the tensors of what a function takes or returns, whatever else is in it."""
    try:
        return _mapped(f, tree)
    except RecursionError:
        raise endless() from None


def _mapped(f: Callable[[Tensor], Tensor], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return f(tree)
    if tree is None:
        return None
    if is_mapping(tree):
        return refilled(tree, {key: _mapped(f, value) for key, value in tree.items()})
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_mapped(f, value) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(f, value) for value in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        filled = copy.copy(tree)
        for field in dataclasses.fields(tree):
            object.__setattr__(filled, field.name, _mapped(f, getattr(tree, field.name)))
        return filled
    return tree


def share_parameters(module: nn.Module, axis: AxisLike, *, reduce: Reduce = "sum") -> SharedParameters:
    """Let all ranks of an axis hold these parameters as one, and use them each on its own data.

    The values are made equal now (`replicate`, from the first rank). From then on each call of the module, or of one
    inside it, uses `pvary` copies of the parameters, so that their gradients are reduced over the axis, to any order
    and under every transform: accumulation, create_graph, torch.func.functional_call, autocast, checkpoint.
    The copies are made once for all calls until the parameters change, so ranks may call the modules in any order,
    unlike often, and use other parameters, so long as what a call returns is used. What no rank used gets no gradient.
    reduce="mean" divides the sum of the gradients by n: for losses that are averaged over the ranks.
    Cost: in each backward pass one message per dtype and device, of all parameters that require a gradient and an
    element for each, which says whether this rank used it.
    Returns a handle with `remove()`. Raises: PmodError where parameters are shared over this axis already;
    ArgumentError for what is no module; in backward CollectiveTimeout (MismatchError in `simulate`), where a rank calls
    no module of these between two changes of the parameters and another rank does.

    Under torch.compile and torch.func, and with parameters that are computed (functional_call with what a derivative
    flows through), each call has a message of its own: there all ranks call alike, and what no rank used gets zeros.
    What is used without a call of a module, `module.weight @ x`, is not reduced: write a forward.

    >>> def gradient():
    ...     layer = torch.nn.Linear(1, 1, bias=False)
    ...     pmod.share_parameters(layer, "data")
    ...     layer(torch.ones(1, 1) * (1 + pmod.axis_index("data"))).sum().backward()
    ...     return layer.weight.grad
    >>> pmod.simulate(gradient, data=2)
    [tensor([[3.]]), tensor([[3.]])]
    """
    bound = resolve(axis, "share_parameters")
    _checked(module, reduce, "share_parameters", bound)
    _check_not_reduced(module, "share_parameters", bound)
    replicate(module, axis)
    return SharedParameters(module, bound, reduce)


def _check_not_reduced(module: nn.Module, function: str, axis: Axis, *, but: object = None) -> None:
    for inner in module.modules():
        hooks = [*inner._forward_hooks.values()]
        for p in inner._parameters.values():  # of a module around this one, or of one that holds the same parameter
            hooks += (getattr(p, "_post_accumulate_grad_hooks", None) or {}).values()
        for hook in hooks:
            owner = getattr(getattr(hook, "func", hook), "__self__", None)
            if owner is but or not isinstance(owner, Reduces):
                continue
            name, other = type(inner).__name__, owner._axis
            # axes of one rank are all over the same ranks; axes of one mesh that cross share this rank only
            alone = axis.size == other.size == 1 and other.label == axis.label
            if alone or len(set(other.ranks) & set(axis.ranks)) > 1:
                given = f"the gradients of {name} are reduced over these ranks already"
                raise wrong(PmodError, function, axis, given, "A second reduction would count them n times.")
            if function == "data_parallel" and owner._over_all_axes and axis.size > 1:
                given = f"the gradients of {name} are reduced by data_parallel over {other.label!r}"
                raise wrong(PmodError, function, axis, given, "Call it once, for a tuple of axes.")


# --- data_parallel --------------------------------------------------------------------------------

# As DDP: a small first message, so that sending begins early, then large ones.
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20


class _Bucket:
    """Parameters whose gradients travel together, and the message that they are in."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.ready: set[int] = set()
        self.sent: Pending[list[Tensor]] | None = None


class _Reducer(Reduces):
    """Reduces the gradients of a module over an axis, while backward runs."""

    _over_all_axes = True

    def __init__(self, module: nn.Module, axis: Axis, reduce: Reduce) -> None:
        self._module, self._axis = module, axis
        self._reduce = reduce
        self._pass = -1  # the backward pass that is running
        self._scaled: set[int] = set()  # the parameters whose gradient of this pass is n times as large
        self._learn(list(module.parameters()))
        self._calls = [module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave)]
        self._attach()

    def _learn(self, parameters: list[nn.Parameter]) -> None:
        self._known = [(p, _kind(p)) for p in parameters]
        self._buckets = [_Bucket(together) for together in _in_buckets(parameters)]

    def _attach(self) -> None:
        # every pass comes to it, also one that uses no parameter; compiled code holds it, so it stays where it can
        device = self._known[0][0].device if self._known else torch.device("cpu")
        if getattr(self, "_anchor", torch.empty((), device="meta")).device != device:
            self._anchor = torch.zeros((), device=device, requires_grad=True)
            self._anchor.register_hook(self._begin)
        self._accumulators: dict[int, Any] = {}
        self._handles: list[Any] = []
        for bucket in self._buckets:
            for p in bucket.parameters:
                if self._reduce == "sum":  # as n times the mean: a mean may be taken again, as the next pass does
                    accumulator = _accumulator(p)  # torch.autograd.grad does not come to it
                    self._handles.append(accumulator.register_prehook(partial(self._times_n, id(p))))
                    self._accumulators[id(p)] = accumulator
                self._handles.append(p.register_post_accumulate_grad_hook(partial(self._on_gradient, bucket)))
        for p, (trained, dtype, _) in self._known:
            if not trained and (dtype.is_floating_point or dtype.is_complex) and not p.is_inference():
                p.requires_grad_(True)  # a frozen one takes no hook
                self._handles.append(p.register_post_accumulate_grad_hook(self._on_unfrozen))
                p.requires_grad_(False)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def remove(self) -> None:
        """Take every hook off; a backward pass of a call before this raises."""
        for handle in self._calls:
            handle.remove()
        self._detach()
        self._calls = []

    def _enter(self, module: nn.Module, args: Any) -> None:
        """See what has changed since the last call: parameters that came, went, were frozen, unfrozen or moved."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return
        now: list[Any] = list(module.parameters())
        # tensors in place of parameters are of a functional_call, or of share_parameters over another axis
        if not torch.is_grad_enabled() or not all(isinstance(p, nn.Parameter) for p in now):
            return
        before = {id(p) for p, _ in self._known}
        same = len(now) == len(self._known) and all(p is q for p, (q, _) in zip(now, self._known, strict=True))
        if same and all(_kind(p) == kind for p, kind in self._known) and not self._lost():
            return
        _check_not_reduced(module, "data_parallel", self._axis, but=self)
        if any(is_lazy(p) for p in now):
            right = "Call the module once under torch.no_grad(), which gives it one."
            raise wrong(ArgumentError, "data_parallel", self._axis, "a new parameter has no shape yet", right)
        self._detach()
        self._learn(now)
        new = [p for p in now if id(p) not in before]
        with torch.no_grad():
            for p, value in zip(new, self._equal(new), strict=True):
                p.copy_(value)
        self._attach()

    def _equal(self, new: list[nn.Parameter]) -> list[Tensor]:
        """The values that the first rank has."""
        return together(PICK, [p.detach() for p in new], self._axis, (0,)) if new else []

    def _lost(self) -> bool:
        """Whether torch has made the nodes that multiply anew: a cast there and back leaves no other trace."""
        return self._reduce == "sum" and any(
            _accumulator(p) is not self._accumulators[id(p)] for bucket in self._buckets for p in bucket.parameters
        )

    def __getstate__(self) -> dict[str, Any]:
        left = ("_anchor", "_accumulators", "_handles")
        return {key: value for key, value in vars(self).items() if key not in left} | {"_scaled": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._attach()  # a copy of a parameter has none of its hooks

    def _times_n(self, parameter: int, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._scaled.add(parameter)
        return tuple(gradient * self._axis.size for gradient in gradients)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
        return _linked(output, [self._anchor]) if trained else output

    def _reset(self, running: int) -> None:
        self._pass = running
        self._scaled.clear()
        for bucket in self._buckets:
            bucket.ready.clear()
            if bucket.sent is not None:
                bucket.sent._finish = None  # of a pass that raised: nobody waits for it
            bucket.sent = None

    def _begin(self, _: Tensor) -> None:
        """In a hook: where it is the first of this pass, see to it that the pass ends with `_finish`."""
        running = torch._C._current_graph_task_id()
        if self._pass != running:  # one that raised may have left something behind
            if not self._calls:
                raise self._late("remove_data_parallel was called between the call of the module and backward")
            if any((p.dtype, p.device) != kind[1:] for p, kind in self._known if p.requires_grad):
                raise self._late("a parameter was moved between the call of the module and backward")
            self._reset(running)
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)

    def _on_gradient(self, bucket: _Bucket, p: Tensor) -> None:
        assert p.grad is not None
        if p.grad.requires_grad:
            given = "backward ran with create_graph=True, and what is reduced in .grad has no derivative"
            right = "Use share_parameters(module, axis, reduce='mean')."
            raise wrong(PmodError, "data_parallel", self._axis, given, right)
        if self._reduce == "sum" and id(p) not in self._scaled:
            raise self._late("a parameter was moved to another dtype or device after the last call of the module")
        self._scaled.discard(id(p))
        self._begin(p)
        bucket.ready.add(id(p))
        if len(bucket.ready) == len(bucket.parameters):
            self._send()

    def _on_unfrozen(self, p: Tensor) -> None:
        raise self._late("a parameter was unfrozen after the last call of the module")

    def _check_known(self) -> None:
        """Raise where a parameter that no call of the module has found yet has a gradient: it is this rank's own."""
        known = {id(p) for p, _ in self._known}
        for name, p in cast(Iterator[tuple[str, Any]], self._module.named_parameters()):
            if id(p) not in known and isinstance(p, nn.Parameter) and p.grad is not None:
                self._reset(-1)
                raise self._late(f"{name} became a parameter in the last call of the module, or after it")

    def _late(self, given: str) -> PmodError:
        right = "Call the module after the change, as it is: a call of it finds what has changed."
        return wrong(PmodError, "data_parallel", self._axis, given, right)

    def _send(self, everything: bool = False) -> None:
        """Send what is complete, in the order of the buckets: it must be the same on all ranks."""
        for bucket in self._buckets:
            if bucket.sent is not None:
                continue
            if not everything and len(bucket.ready) < len(bucket.parameters):
                return
            first = bucket.parameters[0]
            used = torch.tensor([id(p) in bucket.ready for p in bucket.parameters], device=first.device)
            # .data: where gradients are parts of one buffer, a change of one counts as a change of all
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad.data.to_dense() for p in bucket.parameters]
            with torch.no_grad():
                bucket.sent = called_as("data_parallel", start, self._mean, [*gradients, used.to(first.dtype)])

    def _mean(self, gradients: list[Tensor]) -> list[Tensor]:
        return together(PSUM, gradients, self._axis, (self._axis.size, None))

    def _finish(self) -> None:
        """At the end of backward: what was sent becomes the gradients."""
        self._check_known()
        self._send(everything=True)
        for bucket in self._buckets:
            assert bucket.sent is not None
            *gradients, used = bucket.sent.wait()
            for i, (p, gradient) in enumerate(zip(bucket.parameters, gradients, strict=True)):
                # one that no rank used stays without a gradient
                if p.grad is None or p.grad.layout is not torch.strided:
                    p.grad = gradient if p.grad is not None or used[i] != 0 else None
                else:  # it may be a part of a buffer of the user's
                    p.grad.copy_(gradient)
        self._reset(-1)


def _kind(p: Tensor) -> tuple[bool, torch.dtype, torch.device]:
    return p.requires_grad, p.dtype, p.device


def _accumulator(p: Tensor) -> Any:
    """The node that adds into p.grad."""
    with torch.enable_grad():
        return cast(Any, p.view_as(p).grad_fn).next_functions[0][0]


def _in_buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """The parameters in about the order in which backward comes to them."""
    full: list[Tensor] = []
    size, limit = 0, FIRST_BUCKET
    for p in reversed([p for p in parameters if p.requires_grad]):
        if full and (size >= limit or (p.dtype, p.device) != (full[0].dtype, full[0].device)):
            yield full
            full, size, limit = [], 0, BUCKET
        full.append(p)
        size += p.numel() * p.element_size()
    if full:
        yield full


def data_parallel(module: M, axis: AxisLike, *, reduce: Reduce = "mean") -> M:
    """Train one module on every rank's own data: the same module back, its gradients averaged over the axis.

    The values are made equal now (`replicate`, from the first rank). In each backward pass the gradients travel in
    buckets while it still runs, and `.grad` holds their mean (reduce="sum": their sum) when it returns; with several
    backward passes before a step it holds what they add up to. A parameter that some rank did not use counts as 0
    there; one that no rank used keeps no gradient. At axis size 1 nothing is attached. `remove_data_parallel` ends it.
    What is frozen, unfrozen, moved, replaced or added later is found at the next call of the module, on all ranks
    alike; the values of new parameters are made equal then, by a broadcast from the first rank; new buffers are not.
    Calls under torch.no_grad, compiled ones and those of a submodule do not look: where a gradient then comes to what
    no call has found, backward raises. A new submodule that is used alone, with nothing else of the module in the loss,
    is not seen. The result is written into `.grad` where there is one, so that it may be a part of a buffer of yours; a
    sparse gradient travels dense, and stays so.
    Cost: the gradients, 2 (n-1)/n of them sent per rank in each backward pass.
    Only what backward() leaves in `.grad` is reduced: for torch.autograd.grad, create_graph or torch.func use
    `share_parameters`, or `pvary` over the parameters. To wrap the module in torch's own DDP instead, pass
    `process_group=mesh.group(axis)`.
    Raises: PmodError where the gradients are reduced over this axis already, or by data_parallel over another; in a
    backward pass with create_graph; ArgumentError for what is no module.

    >>> def gradient():
    ...     layer = pmod.data_parallel(torch.nn.Linear(1, 1, bias=False), "data")
    ...     layer(torch.ones(1, 1) * (1 + pmod.axis_index("data"))).sum().backward()
    ...     return layer.weight.grad
    >>> pmod.simulate(gradient, data=2)
    [tensor([[1.5000]]), tensor([[1.5000]])]
    """
    bound = resolve(axis, "data_parallel")
    _checked(module, reduce, "data_parallel", bound)
    _check_not_reduced(module, "data_parallel", bound)
    replicate(module, axis)
    if bound.size > 1:
        _Reducer(module, bound, reduce)
    return module


def remove_data_parallel(module: M) -> M:
    """Let the gradients of a module be this rank's own again, from its next call on: the same module back.

    What `data_parallel` attached to this very module, or to what it is a copy of, is taken off; the values stay.
    Nothing is sent, and a module without it stays as it is. A backward pass of a call before this raises PmodError.

    >>> layer = pmod.data_parallel(torch.nn.Linear(2, 1), mesh["data"])
    >>> pmod.remove_data_parallel(layer) is layer
    True
    """
    if not isinstance(module, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        given = f"module is a {type(module).__name__}"
        raise ArgumentError(explain("remove_data_parallel", given, "Pass an nn.Module."))
    for hook in [*module._forward_hooks.values()]:
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, _Reducer):
            owner.remove()
    return module
