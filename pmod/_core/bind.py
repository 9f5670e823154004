"""The one mechanism: a collective is a linear map, declared once with its transpose.

A `Row` says how to compute an operator and how its parameters turn into those of its
transpose; `pair` declares two rows as each other's transposes. `bind` runs a row, and
everything else follows here, once for all rows:

- backward binds the transpose, so that it has a derivative itself, to any order;
- jvp binds the same row on the tangent (the operator is linear);
- vmap binds the same row on the tensor with the mapped dim moved to the front (dims are
  counted from the end);
- torch.func and torch.compile see one library operator,
  ``pmod::linear(Tensor[] xs, str call) -> Tensor[]``. The call travels as text, because
  a compiled graph may be cached and run by a process that never traced it.

Along its axis a row takes V (varying: each rank its own value) or I (invariant: one
value, held by all) and gives V or I; the transpose does the reverse, with respect to
the inner product that counts a V once per rank and an I once.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
import torch.autograd.profiler as profiler
from torch import Tensor
from torch.overrides import handle_torch_function

from pmod._core.arguments import wrong
from pmod._core.inductor import keep_order
from pmod._core.row import Call, decode, encode, encode_in_graph
from pmod._core.send import begin, profiled_as, run, wire_for
from pmod._core.watch import tell, told, watchers
from pmod._errors import PmodError
from pmod._site import Origin, backward_of, on_behalf_of, origin, watched
from pmod._torch import (
    OneLevel,
    add_batch_dim,
    after_autograd,
    allow_one_level,
    are_transforms_active,
    backward_here,
    below_autograd,
    below_views,
    count_dispatch_modes,
    count_function_modes,
    forward_level,
    is_in_older_vmap,
    is_one_level_allowed,
    is_traced,
    is_view,
    keep_calls,
    lazy_clone,
    memory_of,
    older_vmap_level,
    remove_batch_dim,
    with_forward_mode,
)
from pmod._wire.base import SMALL, ShapesOnly
from pmod._wire.sent import Sent


class _Linear(OneLevel):
    """A row that autograd sees, on tensors of one dtype.

    `below`, if given, computes the value in place of running the call (transforms;
    messages sent by `start`; calls that were made before).

    The base is what torch makes for each level of torch.func: a Function of one level.
    `torch.autograd.Function` adds the levels, and since torch 2.14 it does so even in
    an operator's kernel, where they are taken care of; it also inspects its signature
    at each call (20 to 50 us).
    """

    @staticmethod
    def forward(
        call: Call,
        below: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None,
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        values = partial(run, call) if below is None else below
        # the result may be a view of x, and autograd must see that it is one
        if call.row.local:
            return tuple(values(xs))
        # what arrives is private: where it is a view of a message, autograd need not
        # know, and the user may change it
        with below_views():
            return tuple(values(xs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        ctx.call, below, *_ = inputs
        ctx.origin = watched.origin
        # of a call that was made before
        ctx.instead = getattr(below, "backward", None)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        if ctx.instead is not None:
            return (None, None, *ctx.instead(gs, needed, ctx.origin))
        places = [place for place, need in enumerate(needed) if need]
        own = transposed(ctx.call, [gs[place] for place in places], ctx.origin)
        return (None, None, *_placed(own, places, len(gs)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        moving = {place: t for place, t in enumerate(tangents[2:]) if t is not None}
        own = bind(ctx.call, list(moving.values()))
        return tuple(_placed(own, list(moving), len(tangents) - 2))


def _placed(
    ys: Sequence[Tensor], places: Sequence[int], length: int
) -> list[Tensor | None]:
    """Return a list in which these tensors stand at their places, and None elsewhere."""
    out: list[Tensor | None] = [None] * length
    for place, y in zip(places, ys, strict=True):
        out[place] = y
    return out


def transposed(
    call: Call, gs: Sequence[Tensor], forward: Origin | None
) -> list[Tensor]:
    """Bind the transpose of a call on gradients: its derivative, autograd's own."""
    ys = list(bind(call.T, [_dense(g) for g in gs], forward))
    for i, y in enumerate(ys):
        # torch keeps a gradient that only it refers to, and adds later ones into it: a
        # view would pass that on to what backward was called with
        if is_view(y):
            ys[i] = y.clone()
    return ys


def _dense(gradient: Tensor) -> Tensor:
    # an embedding with sparse=True makes a sparse gradient, and no message carries one
    if gradient.layout is torch.strided:
        return gradient
    return gradient.to_dense()


# the stubs of torch do not say what `apply` takes
attach: Callable[..., tuple[Tensor, ...]] = cast(Any, _Linear).apply
"""Return the results of a call with its derivative: of (call, below, *xs)."""

_library = torch.library.Library("pmod", "FRAGMENT")
_library.define(
    "linear(Tensor[] xs, str call) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,)
)
_operator: Any = torch.ops.pmod.linear.default


def _fresh(ys: Sequence[Tensor], xs: Sequence[Tensor]) -> list[Tensor]:
    """Copy the results that share storage with an input or another result."""
    # the results of an operator may not: compilers reuse the memory of its inputs
    taken = {memory_of(x) for x in xs}
    out = list(ys)
    for i, y in enumerate(ys):
        storage = memory_of(y)
        if storage in taken:
            out[i] = y.clone()
        taken.add(storage)
    return out


def _operator_value(xs: list[Tensor], call: str) -> list[Tensor]:
    return _fresh(run(decode(call), xs), xs)


def _operator_shapes(xs: list[Tensor], call: str) -> list[Tensor]:
    _check_kept()
    keep_order(_operator)
    if watchers():
        tell(lambda watcher: watcher.compiled())
    decoded = decode(call)
    wire = ShapesOnly(decoded.axis.size, decoded.axis.index)
    return _fresh(begin(decoded, xs, wire).wait(), xs)


def _refuse_second_derivative(call: Call) -> None:
    """Raise where a compiled region runs backward with create_graph=True.

    torch cuts the region's gradients off from what it was given: autograd.grad with
    respect to that leaves out the second derivative, silently.
    """
    if not _is_compiled_backward_recorded():
        return
    given = f"a compiled function that calls {call.row.T.name} runs backward with "
    given += "create_graph=True, and what torch compiles has no second derivative"
    right = "Take both derivatives inside the compiled function, with torch.func.grad, "
    right += "or leave it eager."
    raise wrong(PmodError, "torch.compile", call.axis, given, right)


def _is_compiled_backward_recorded() -> bool:
    """Whether the backward of a compiled region runs, with create_graph=True."""
    frame, grad = sys._getframe(), torch.is_grad_enabled()
    # nothing tells an operator of create_graph; the stack does
    while frame is not None:
        # torch 2.13 and later end the gradients in a node that raises where it is
        # reached, as torch 2.11 and 2.12 do where a gradient that comes in has a
        # derivative; else these run the region as it is, in the caller's grad mode
        name = frame.f_code.co_qualname
        if name.endswith("CompiledFunctionBackward.forward"):
            return True
        if grad and name.endswith("CompiledFunction.backward"):
            return True
        frame = frame.f_back
    return False


def _operator_autograd(keyset: object, xs: list[Tensor], call: str) -> list[Tensor]:
    # a backward runs, and is not only traced
    if backward_here() != -1 and count_dispatch_modes() == 0:
        _refuse_second_derivative(decode(call))

    here = decode(call)

    def below(xs: Sequence[Tensor]) -> list[Tensor]:
        # outer transforms differentiate what is done here, so autograd stays on for the
        # levels below this one
        with torch.enable_grad(), with_forward_mode(True), below_autograd():
            # what moves nothing needs no operator in a graph, and need not stay in order
            if here.row.local and is_traced():
                return _fresh(run(here, xs), xs)
            return _operator.redispatch(after_autograd(keyset), list(xs), call)

    allowed = is_one_level_allowed()
    allow_one_level(True)
    try:
        return list(attach(here, below, *xs))
    finally:
        allow_one_level(allowed)


def _operator_vmap(
    info: Any, in_dims: tuple[Any, ...], xs: list[Tensor], call: str
) -> tuple[list[Tensor], list[int]]:
    moved: list[Tensor] = []
    for x, dim in zip(xs, in_dims[0], strict=True):
        if dim is None:
            moved.append(x.expand(info.batch_size, *x.shape))
        else:
            moved.append(x.movedim(dim, 0))
    return _operator(moved, call), [0] * len(xs)


def _operator_batched(xs: list[Tensor], call: str) -> list[Tensor]:
    """Run under autograd's own vmap, older than torch.func's.

    It serves is_grads_batched and functional.jacobian(vectorize=True).
    """
    for level in range(older_vmap_level(), 0, -1):
        # a tensor that is not mapped at this level gets a dim of the size that is asked
        # for: the length that stays the same, whatever is asked for, is that of the map
        one = [remove_batch_dim(x, level, 1, 0) for x in xs]
        two = [remove_batch_dim(x, level, 2, 0) for x in xs]
        sizes = {x.shape[0] for x in one}
        sizes &= {x.shape[0] for x in two}
        if sizes:
            size = sizes.pop()
            moved = [x.expand(size, *x.shape[1:]) for x in one]
            return [add_batch_dim(y, 0, level) for y in _operator(moved, call)]
    raise AssertionError("no tensor is mapped")


# A compiler must neither drop a call whose result one rank happens not to need (the
# others would wait for it), nor change the order of calls, which ranks with other
# shapes would change otherwise.
_check_kept = keep_calls("pmod::linear")
_library.impl("linear", _operator_value, "CompositeExplicitAutograd")
_library.impl("linear", _operator_autograd, "Autograd", with_keyset=True)
_library.impl("linear", _operator_batched, "Batched")
torch.library.register_fake("pmod::linear", _operator_shapes, lib=_library)
torch.library.register_vmap("pmod::linear", _operator_vmap, lib=_library)


def bind(
    call: Call, xs: list[Tensor], forward: Origin | None = None
) -> Sequence[Tensor]:
    """Run a call on tensors of one dtype and device; the results have derivatives.

    forward: the origin of the call that this one is the transpose of.
    """
    if call.axis.size == 1 and call.row.alone:
        ys = _bind_alone(call, xs)
        if bound.calls is not None:
            bound.calls.append((call, xs, ys))
        return ys
    # a mode (shard_map's) sees this as one operation
    if count_function_modes() > 0:
        return handle_torch_function(bind, xs, call, xs, forward)
    if torch.compiler.is_compiling():
        # the compiler takes a tuple for a constant, and no class of ours
        params = tuple(call.params)
        return _operator(xs, encode_in_graph(call.row.name, call.axis.key, params))
    if watchers():
        return _bind_watched(call, xs, forward)
    ys = _bind(call, xs)
    if bound.calls is not None:
        bound.calls.append((call, xs, ys))
    return ys


def _bind_alone(call: Call, xs: list[Tensor]) -> Sequence[Tensor]:
    # a local row may return x itself; a compiler or a transform must not see that
    if call.row.local and not _is_seen(xs):
        return carry(call, xs)
    return unmoved(xs)


def _is_seen(xs: list[Tensor]) -> bool:
    return torch.compiler.is_compiling() or is_transformed(xs)


def unmoved(xs: list[Tensor]) -> list[Tensor]:
    """Return the same values as tensors of their own: changing one changes no other.

    Memory is copied when one of them is changed, and not before; what is small is
    copied now, which costs less.
    """
    if _is_seen(xs):
        return [x.clone() for x in xs]
    return [_unmoved(x) for x in xs]


def _unmoved(x: Tensor) -> Tensor:
    if x.nbytes > SMALL and x.is_contiguous():
        try:
            return lazy_clone(x)
        except RuntimeError:
            # torch shares no memory that is not its own, such as numpy's
            pass
    return x.clone()


def _bind_watched(
    call: Call, xs: list[Tensor], forward: Origin | None
) -> Sequence[Tensor]:
    of = origin() if forward is None else backward_of(forward)
    with on_behalf_of(of), ExitStack() as stack:
        # `start` tells them what is sent ahead, and what is waited for
        if is_transformed(xs) or not is_ahead(call):
            stack.enter_context(told(call, xs, of))
        return _bind(call, xs)


def _bind(call: Call, xs: list[Tensor]) -> Sequence[Tensor]:
    if is_transformed(xs):
        return _operator(xs, encode(call.row.name, call.axis.key, call.params))
    if started.by is not None and is_ahead(call):
        return started.by.bind(call, xs)
    return carry(call, xs)


def is_transformed(xs: list[Tensor]) -> bool:
    """Whether transforms, modes or subclasses of Tensor see the operator."""
    if are_transforms_active() or is_in_older_vmap():
        return True
    return count_dispatch_modes() > 0 or not _are_plain(xs)


def carry(
    call: Call,
    xs: Sequence[Tensor],
    below: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None,
) -> Sequence[Tensor]:
    """Run a call on plain tensors, or let `below` do it, and attach the derivative."""
    if forward_level() >= 0 or _is_recorded(xs):
        return attach(call, below, *xs)
    if below is not None:
        return below(xs)
    ys = run(call, xs)
    # What shares memory with x is another tensor, which requires no gradient. In a
    # backward pass it stays x: torch takes a gradient that nobody else refers to for
    # its own, and adds later ones into its memory.
    if call.row.local and backward_here() == -1:
        for i, x in enumerate(xs):
            if ys[i] is x:
                ys[i] = x.detach()
    return ys


def _is_recorded(xs: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in xs)


def send_ahead(call: Call, xs: Sequence[Tensor]) -> Sent[list[Tensor]]:
    """Send the message of a call, to be waited for later."""
    with profiler.record_function(profiled_as(call)), torch.no_grad():
        return begin(call, xs, wire_for(call, xs))


class Starter:
    """What `start` does with the calls that are bound while it runs a function."""

    def bind(self, call: Call, xs: list[Tensor]) -> Sequence[Tensor]:
        """Return the results of a call, in place of running it now."""
        raise NotImplementedError

    def prepare(self, calls: Sequence[tuple[Call, list[Tensor]]]) -> None:
        """See the calls that are bound next, none of which needs the result of another."""


class _Started(threading.local):
    by: Starter | None = None


started = _Started()
"""Who runs a started function on this thread."""


class _Bound(threading.local):
    calls: list[tuple[Call, list[Tensor], Sequence[Tensor]]] | None = None


bound = _Bound()
"""What this thread binds, where somebody asks."""


def is_ahead(call: Call) -> bool:
    """Whether `start` runs on this thread, and sends this call ahead."""
    return started.by is not None and not call.row.local and call.axis.size > 1


def bind_all(calls: Sequence[tuple[Call, list[Tensor]]]) -> list[Sequence[Tensor]]:
    """Bind several calls, which `start` sends ahead together."""
    if not torch.compiler.is_compiling() and started.by is not None:
        started.by.prepare(calls)
    return [bind(call, xs) for call, xs in calls]


PLAIN = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer})


def _are_plain(xs: list[Tensor]) -> bool:
    return PLAIN.issuperset(map(type, xs))
