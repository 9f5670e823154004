"""Modules whose parameters all ranks of an axis hold.

They are equal at the start, and their gradients are reduced over the axis. Three ways,
for three needs. The pure one is `pvary` over the parameter tree, before the forward
pass. `share_parameters` does just that inside the module's own call, so it has every
derivative that the pure one has. `data_parallel` reduces what backward leaves in
`.grad`, bucket by bucket while backward still runs: the fastest, for plain training
loops.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from types import FrameType
from typing import Literal, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from pmod._collectives.used import Idle, pvary_alone, pvary_used
from pmod._collectives.values import PVARY, SUM, differentiated, pick
from pmod._core.arguments import check_root, check_tensor, wrong
from pmod._core.leaves import map_tensors
from pmod._core.tree import flatten, map_leaves, together
from pmod._core.watch import called_as
from pmod._errors import ArgumentError, PmodError, quoted
from pmod._mesh.ambient import resolve
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import AxisLike
from pmod._torch import (
    accumulation_hooks,
    are_transforms_active,
    forward_hooks,
    next_number,
    parameters_of,
    set_number,
    version_of,
)

T = TypeVar("T")
Reduce: TypeAlias = Literal["sum", "mean"]

_State: TypeAlias = tuple[int, int, torch.Size, torch.dtype]
_Place: TypeAlias = tuple[dict[str, nn.Parameter | None], str, nn.Parameter]


def check_module(module: object, reduce: object, function: str, axis: Axis) -> None:
    """Raise unless this is a module whose state can be sent, and reduce is known."""
    if not isinstance(module, nn.Module):
        given = f"module is a {type(module).__name__}"
        raise wrong(ArgumentError, function, axis, given, "Pass an nn.Module.")
    if not isinstance(reduce, str) or reduce not in ("sum", "mean"):
        given = f"reduce is {quoted(reduce)}"
        raise wrong(ArgumentError, function, axis, given, "Pass 'sum' or 'mean'.")
    _state(module, function, axis)


def _state(module: nn.Module, function: str, axis: Axis) -> dict[str, Tensor]:
    """Return the parameters and buffers by name; raise if one cannot be sent."""
    state: dict[str, Tensor] = dict(module.named_parameters())
    state.update(module.named_buffers())
    for name, tensor in state.items():
        check_tensor(tensor, function, axis, name=name)
    return {name: tensor.detach() for name, tensor in state.items()}


def replicate(x: T, axis: AxisLike, *, src: int = 0) -> T:
    """Return the values of rank src on all ranks of the axis.

    So what they all hold is made equal at the start. x is a module, whose parameters
    and buffers are overwritten and which is returned; or a tree of tensors, of which an
    equal tree is returned, leaves of autograd like those that went in. Nothing is
    differentiated.
    Cost: one broadcast per dtype and device. Raises: AxisError if src is not an index
    along the axis.

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
    leaves: list[Tensor] = []
    flatten(x, "replicate", bound, leaves)
    for leaf in leaves:
        check_tensor(leaf, "replicate", bound)
    with torch.no_grad():
        equal = pick(x, axis, src=src)

    def as_before(ys: list[Tensor]) -> list[Tensor]:
        return [_leaf_like(like, y) for like, y in zip(leaves, ys, strict=True)]

    return map_leaves(as_before, equal, "replicate", bound)


def _leaf_like(like: Tensor, y: Tensor) -> Tensor:
    # what is returned shares no memory with what went in, on one rank as on several
    if y is like:
        y = y.clone()
    if isinstance(like, nn.Parameter):
        return nn.Parameter(y.detach(), requires_grad=like.requires_grad)
    return y.detach().requires_grad_(like.requires_grad)


_numbers = count()
# So many numbers of nodes are left for each set: one node for each dtype and device.
WIDTH = 16


class Reduces:
    """Hooks of a module that reduce its gradients over an axis."""

    _axis: Axis
    # whether no second one may reduce them, over whatever axis
    _over_all_axes = False


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
        # calls under way, the outermost first, and the frame of that one
        self._calls: list[nn.Module] = []
        self._frame: FrameType | None = None
        self._held: list[_Place] = []
        self._link: list[Tensor] = []
        self._number = next(_numbers)
        # what is made from now on has higher numbers
        _run_last([], 1 + WIDTH * self._number)
        # parameters, each with its state and its pvary copy
        self._kept: list[tuple[Tensor, _State, Tensor]] = []
        self._idle = Idle()
        # from these backward comes to the nodes of those copies
        self._links: list[Tensor] = []
        # what shares some of these parameters over another axis, and enters first: its
        # copies are then copied here
        self._newer: list[SharedParameters] = []
        for older in _sharing(module):
            older._newer.append(self)
        # every module inside has the hooks, for who calls it by itself; the outermost
        # call acts. The last to enter is the first to leave, where several share over
        # several axes; and hooks that prune or normalise come after.
        self._handles: list[RemovableHandle] = []
        for inner in module.modules():
            self._handles += [
                inner.register_forward_pre_hook(self._enter, prepend=True),
                inner.register_forward_hook(self._leave, always_call=True),
            ]

    def __getstate__(self) -> Mapping[str, object]:
        return vars(self) | {"_kept": [], "_links": []}

    def __setstate__(self, state: Mapping[str, object]) -> None:
        vars(self).update(state)
        # the sums of a copy are not those of the original
        self._number = next(_numbers)

    @property
    def axis(self) -> str | tuple[str, ...]:
        """The axis over which the gradients are reduced."""
        return self._axis.label

    def remove(self) -> None:
        """Let the module's parameters be its own again, from the next call on."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._kept, self._links = [], [], []

    def _enter(self, module: nn.Module, args: object) -> None:
        is_compiling = torch.compiler.is_compiling()
        if self._calls and not is_compiling and not _is_running(self._frame):
            # the last call ended by what no hook sees, such as ctrl-C
            self._restore()
        self._calls.append(module)
        if len(self._calls) > 1:
            return
        if not is_compiling:
            self._frame = sys._getframe(1)
        places: list[_Place] = []
        for inner in module.modules():
            parameters = parameters_of(inner)
            for name, p in parameters.items():
                if p is not None and differentiated(p):
                    places.append((parameters, name, p))
        # by id, because a tied parameter is in several places
        shared = list({id(p): p for _, _, p in places}.values())
        if not shared:
            return
        varying, self._link = self._copies(shared)
        self._held = places
        for parameters, name, p in places:
            parameters[name] = cast(nn.Parameter, varying[id(p)])

    def _copies(
        self, shared: Sequence[Tensor]
    ) -> tuple[dict[int, Tensor], list[Tensor]]:
        """Return the pvary copies, by the id of what they copy, and their links.

        The links let backward come to their nodes from an output.
        """
        kept = self._keep(shared) if _is_plain() else {}
        if all(id(p) in kept for p in shared):
            return kept, self._links
        copies = self._pvary(shared)
        smallest: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        for y in sorted(copies, key=Tensor.numel, reverse=True):
            smallest[y.dtype, y.device] = y
        return dict(zip(map(id, shared), copies, strict=True)), list(smallest.values())

    def _keep(self, more: Sequence[Tensor] = ()) -> dict[int, Tensor]:
        """Return copies of all parameters, {} if some are computed.

        They are made once for all calls between two steps. So one node of the graph
        sums a parameter's gradient, whichever module is called first and however often.
        The nodes have the lowest numbers, in the order in which share_parameters was
        called: backward comes to them last.
        """
        # a call is under way, and the modules hold the copies
        if self._held:
            return {id(p): y for p, _, y in self._kept}
        whole: dict[int, Tensor] = {}
        for p in (*self._module.parameters(), *more):
            if differentiated(p):
                whole[id(p)] = p
        copied: set[int] = set()
        for other in reversed(self._newer):
            if other._handles:
                newer = other._keep()
                copied |= set(map(id, newer.values()))
                sources = [newer.get(i, p) for i, p in whole.items()]
                whole = {id(y): y for y in sources}
        for p in whole.values():
            is_own = p.is_leaf and p.requires_grad
            if not is_own and id(p) not in copied:
                return {}
        now = [(p, _state_of(p)) for p in whole.values()]
        known = [(id(p), state) for p, state, _ in self._kept]
        if known != [(id(p), state) for p, state in now]:
            copies = self._copies_anew(list(whole.values()))
            self._kept = [(*of, y) for of, y in zip(now, copies, strict=True)]
        return {id(p): y for p, _, y in self._kept}

    def _copies_anew(self, parameters: list[Tensor]) -> list[Tensor]:
        """Return new copies of parameters, whose nodes backward comes to last."""
        copies, self._links = self._together(parameters)
        if self._axis.size > 1:
            _run_last([y.grad_fn for y in copies], 1 + WIDTH * self._number)
        if self._reduce == "mean":
            # no division in the graph: the first backward would free what it keeps
            for y in copies:
                # it holds nothing of this object, which holds y
                y.register_hook(partial(_divided, self._axis.size))
        return copies

    def _together(self, parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return copies that know what no rank used, and a link to each of their nodes."""
        if self._axis.size == 1:
            return pvary_alone(parameters, self._axis, "share_parameters"), []
        return pvary_used(parameters, self._axis, "share_parameters", self._idle)

    def _pvary(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        varying = called_as(
            "share_parameters", together, PVARY, list(parameters), self._axis, SUM
        )
        if self._reduce == "sum":
            return varying
        # the same value; of its derivative the n-th part
        n = self._axis.size
        pairs = zip(parameters, varying, strict=True)
        return [p.detach() + (v - v.detach()) / n for p, v in pairs]

    def _leave(self, module: nn.Module, args: object, output: object) -> object:
        # another hook raised before `_enter`
        if all(call is not module for call in self._calls):
            return output
        while self._calls.pop() is not module:
            pass
        if self._calls:
            return output
        link = self._restore()
        return linked(output, link) if link else output

    def _restore(self) -> list[Tensor]:
        for parameters, name, p in self._held:
            parameters[name] = p
        link = self._link
        self._calls, self._frame, self._held, self._link = [], None, [], []
        return link


def _divided(n: int, gradient: Tensor | None) -> Tensor | None:
    # None: unused on this rank
    if gradient is None:
        return None
    return gradient / n


def _sharing(module: nn.Module) -> list[SharedParameters]:
    """Return what shares a parameter of the module over another axis, oldest first."""
    found: dict[int, SharedParameters] = {}
    for inner in module.modules():
        for hook in forward_hooks(inner).values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, SharedParameters):
                found[owner._number] = owner
    return [found[number] for number in sorted(found)]


def _is_plain() -> bool:
    """Return whether autograd alone runs, with no transform around it.

    What it makes now, a later call may use.
    """
    if torch.compiler.is_compiling() or are_transforms_active():
        return False
    return torch.is_grad_enabled()


def _state_of(p: Tensor) -> _State:
    """Return what changes whenever a copy of a parameter is no longer of its value."""
    return version_of(p), p.data_ptr(), p.shape, p.dtype


def _run_last(nodes: Sequence[Node | None], number: int) -> None:
    """Let backward come to these nodes after all others.

    Of those that are ready, it takes the highest number. The rest of the graph has
    higher ones, because this thread's next node does not get one of these.
    """
    one = torch.ones((), requires_grad=True)
    while next_number() <= number + WIDTH:
        one.view_as(one)
    for i, node in enumerate(dict.fromkeys(nodes)):
        set_number(node, number + i)


def _is_running(frame: FrameType | None) -> bool:
    caller: FrameType | None = sys._getframe(1)
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is not None


def linked(output: object, shared: list[Tensor]) -> object:
    """Return the output, and 0 times what is shared.

    So a rank that used none of it still takes part in its sum.
    """
    device = shared[0].device
    zeros = [x.reshape(-1)[:0].sum().real.float().to(device) for x in shared]
    nothing = torch.stack(zeros).sum()

    def link(x: Tensor) -> Tensor:
        if x.is_floating_point() or x.is_complex():
            return x + nothing.to(x.device, x.dtype)
        return x

    return map_tensors(link, output)


def share_parameters(
    module: nn.Module, axis: AxisLike, *, reduce: Reduce = "sum"
) -> SharedParameters:
    """Let all ranks of an axis hold these parameters as one.

    Each uses them on its own data. The values are made equal now (`replicate`, from the
    first rank). From then on each call of the module, or of one inside it, uses `pvary`
    copies of the parameters, so that their gradients are reduced over the axis, to any
    order and under every transform: accumulation, create_graph,
    torch.func.functional_call, autocast, checkpoint. The copies are made once for all
    calls until the parameters change, so ranks may call the modules in any order,
    unlike often, and use other parameters, so long as what a call returns is used. What
    no rank used gets no gradient.
    reduce="mean" divides the sum of the gradients by n: for losses that are averaged
    over the ranks.
    Cost: in each backward pass one message per dtype and device, of all parameters that
    require a gradient and an element for each, which says whether this rank used it.
    What no rank used in a pass is left out of the next; where a rank then uses it, it
    follows in a message of its own.
    Returns a handle with `remove()`. Raises: PmodError if parameters are shared over
    this axis already; ArgumentError if the argument is not a module; in backward
    CollectiveTimeout (MismatchError in `simulate`), if a rank calls no module of
    these between two changes of the parameters and another rank does.

    Under torch.compile and torch.func, and with parameters that are computed
    (functional_call with what a derivative flows through), each call has a message of
    its own: there all ranks call alike, and what no rank used gets zeros. What is used
    without a call of a module, `module.weight @ x`, is not reduced: write a forward.

    >>> def gradient():
    ...     layer = torch.nn.Linear(1, 1, bias=False)
    ...     pmod.share_parameters(layer, "data")
    ...     layer(torch.ones(1, 1) * (1 + pmod.axis_index("data"))).sum().backward()
    ...     return layer.weight.grad
    >>> pmod.simulate(gradient, data=2)
    [tensor([[3.]]), tensor([[3.]])]
    """
    bound = resolve(axis, "share_parameters")
    check_module(module, reduce, "share_parameters", bound)
    check_not_reduced(module, "share_parameters", bound)
    replicate(module, axis)
    return SharedParameters(module, bound, reduce)


def check_not_reduced(
    module: nn.Module, function: str, axis: Axis, *, but: object = None
) -> None:
    """Raise if anything reduces the gradients over these ranks already."""
    for inner in module.modules():
        hooks = [*forward_hooks(inner).values()]
        # a module around this one, or one that holds the same parameter
        for p in parameters_of(inner).values():
            hooks += accumulation_hooks(p).values()
        for hook in hooks:
            owner = getattr(hook, "__self__", None)
            if owner is not but and isinstance(owner, Reduces):
                _check_other(owner, type(inner).__name__, function, axis)


def _check_other(owner: Reduces, name: str, function: str, axis: Axis) -> None:
    other = owner._axis
    # axes of one rank are all over the same ranks; axes of one mesh that cross share
    # this rank only
    alone = axis.size == other.size == 1 and other.label == axis.label
    if alone or len(set(other.ranks) & set(axis.ranks)) > 1:
        given = f"the gradients of {name} are reduced over these ranks already"
        right = "A second reduction would count them n times."
        raise wrong(PmodError, function, axis, given, right)
    is_second = function == "data_parallel" and owner._over_all_axes
    if is_second and axis.size > 1:
        given = (
            f"the gradients of {name} are reduced by data_parallel over {other.label!r}"
        )
        right = "Call it once, for a tuple of axes."
        raise wrong(PmodError, function, axis, given, right)
