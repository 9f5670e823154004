"""Calls that were made before: what a call does, found once for tensors of one kind.

The first calls of a public collective look at all there is to look at: the axis, the
arguments, the tensor, the group. What that comes to depends on the arguments and on the
tensor's shape, dtype and device alone. So it is kept, as a `Ready`, in the mesh, and
the next call with the same arguments on such a tensor sends at once. It does the same
as the first: the same message, counted and noted alike, so ranks may differ in which of
them have one. Nothing is kept of what binds no row, or several, or changes what a row
is given or gives.

Where somebody takes part (a watcher, a meter, a mode, a transform, the profiler, a
started function), where ranks are no processes, and in compiled code, calls go the long
way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from pmod._core.bind import PLAIN, attach, bound, started, transposed, unmoved
from pmod._core.row import TRANSPOSES, Call
from pmod._core.send import begin, said_of
from pmod._mesh.mesh import Mesh
from pmod._ranks import world
from pmod._ranks.world import Connection, Made
from pmod._site import Origin
from pmod._torch import (
    are_transforms_active,
    backward_here,
    count_dispatch_modes,
    count_function_modes,
    forward_level,
    is_in_older_vmap,
    is_profiled,
    is_view,
)
from pmod._wire.along import ready_wire, wire_of
from pmod._wire.base import Wire

F = TypeVar("F", bound=Callable[..., Any])

# So many kinds of calls a mesh remembers; where shapes change at each step, it begins
# anew.
MOST = 4096
# By now all ranks of an axis have connected, and know one another.
CONNECTED = 2
_LABELS = frozenset({str, type(None)})
_SCALARS = frozenset({int, str, bool, float, torch.dtype, type(None)})


class Ready:
    """A call on a tensor of one shape, dtype and device, whose arguments are right.

    `send` gives the value for a plain, contiguous tensor, and autograd does not see it.
    """

    __slots__ = ("_back", "call", "connection", "is_linear", "send")

    def __init__(
        self, call: Call, like: Tensor, connection: Connection, in_backward: bool
    ) -> None:
        self.call = call
        self.connection = connection
        self.is_linear = call.row.name in TRANSPOSES
        self.send = _sender(call, like, in_backward)
        self._back: Ready | None = None

    def __call__(self, xs: Sequence[Tensor]) -> tuple[Tensor]:
        return (self.send(xs[0]),)

    def backward(
        self, gs: Sequence[Tensor], needed: Sequence[bool], of: Origin | None
    ) -> Sequence[Tensor]:
        """Return the transpose of the call on a gradient."""
        (g,) = gs
        is_recorded = g.requires_grad and torch.is_grad_enabled()
        if is_recorded or not is_quiet(g, self.connection):
            return transposed(self.call, gs, of)
        if self._back is None:
            self._back = Ready(self.call.T, g, self.connection, in_backward=True)
        y = self._back.send(g.contiguous())
        # as in `transposed`
        return [y.clone() if is_view(y) else y]


def _sender(call: Call, like: Tensor, in_backward: bool) -> Callable[[Tensor], Tensor]:
    row, axis, params = call
    if row.local:
        nowhere = Wire(axis.size, axis.index)
        return lambda x: cast(Tensor, row.send(x, nowhere, params))
    if axis.size == 1 and row.alone:
        return lambda x: unmoved([x])[0]
    device, said = like.device, said_of(row, params, [like], in_backward)
    ready = None if axis.size == 1 else ready_wire(axis, device)
    # each message has a wire of its own
    if ready is None:
        return lambda x: begin(call, [x], wire_of(axis, device, row.name, said)).wait()[
            0
        ]
    wire, note = ready
    at_once = None if row.at_once is None else row.at_once(like, wire, params)

    def send(x: Tensor) -> Tensor:
        note(said)
        if at_once is not None:
            return at_once(x)
        return begin(call, [x], wire).wait()[0]

    return send


def is_quiet(x: Tensor, connection: Connection) -> bool:
    """Whether x is plain, and nobody but this connection takes part in a call with it."""
    here = world.now.here
    return not (
        here.watchers
        or here.meters
        or not here.by_processes
        or here.processes.connection is not connection
        or here.processes.left_behind
        or started.by
        or type(x) not in PLAIN
        or x.layout is not torch.strided
        or x.is_neg()
        or count_function_modes()
        or count_dispatch_modes()
        or are_transforms_active()
        or is_in_older_vmap()
        or forward_level() >= 0
        or is_profiled()
    )


def remembering(f: F) -> F:
    """Let a public collective send at once what it has sent before."""

    @wraps(f)
    def at_once_or(x: Any, axis: Any, *rest: Any, **options: Any) -> Any:
        # what follows is nothing for a compiler
        if is_compiling():
            return f(x, axis, *rest, **options)
        key = mesh = None
        now = world.now
        connection = now.processes.connection
        if _may_be_known(x, connection):
            mesh, label = now.here.mesh, axis
            if type(axis) is Mesh:
                mesh, label = axis, None
            key = _key_of(f, label, x, rest, options)
        if mesh is None or key is None:
            return f(x, axis, *rest, **options)
        ready = mesh._made.get(key)
        # a forked process finds what its parent has made
        if ready is None or ready.connection is not connection:
            return _first(
                mesh._made, key, connection, partial(f, x, axis, *rest, **options), x
            )
        if x.requires_grad and torch.is_grad_enabled():
            if ready.is_linear:
                return attach(ready.call, ready, x)[0]
            return f(x, axis, *rest, **options)
        y = ready.send(x)
        # another tensor than x, which requires no gradient
        return x.detach() if y is x else y

    return cast(F, at_once_or)


def _may_be_known(x: Any, connection: Connection) -> bool:
    if type(x) not in PLAIN or x.is_nested or not x.is_contiguous():
        return False
    # what is sent in a backward pass says so
    return backward_here() == -1 and is_quiet(x, connection)


def _key_of(
    f: Callable[..., Any],
    label: Any,
    x: Tensor,
    rest: tuple[Any, ...],
    options: dict[str, Any],
) -> tuple[object, ...] | None:
    """Return what a call is kept under; None where its arguments are no such thing."""
    # other axes are no keys, or wrong
    if type(label) not in _LABELS:
        return None
    key = (f, label, x.shape, x.dtype, x.device)
    if not (rest or options):
        return key
    more = _frozen(rest, options)
    return None if more is None else (*key, *more)


def _frozen(rest: tuple[Any, ...], options: dict[str, Any]) -> list[object] | None:
    """Return what tells arguments apart: 1, 1.0 and True, too, which are equal.

    None where one is neither a number, a text nor a list of them.
    """
    found: list[object] = [*options]
    for value in (*rest, *options.values()):
        kind = type(value)
        if kind is list or kind is tuple:
            found += (kind, repr(value))
        elif kind in _SCALARS:
            found += (kind, value)
        else:
            return None
    return found


def _first(
    made: Made, key: object, connection: Connection, run: Callable[[], Any], x: Tensor
) -> Any:
    """Make a call of x the long way, and keep what it comes to."""
    before, bound.calls = bound.calls, []
    sent = connection.meetings.total()
    try:
        y = run()
        calls = bound.calls
    finally:
        bound.calls = before
    sent = connection.meetings.total() - sent
    # one row, of x itself, and its result
    if len(calls) != 1:
        return y
    call, xs, ys = calls[0]
    if len(xs) != 1 or xs[0] is not x or ys[0] is not y:
        return y
    # a message more would be one of sizes, which are other ones the next time
    moves = call.axis.size > 1 and not call.row.local
    if sent != moves or x.is_complex() or x.numel() == 0:
        return y
    if moves and connection.meetings[call.axis.group_key] < CONNECTED:
        return y
    if len(made) >= MOST:
        made.clear()
    connection.keep(made)
    made[key] = Ready(call, x, connection, in_backward=False)
    return y


def without_memory(f: object) -> object:
    """Return the function that `remembering` was given, or f where it was not."""
    if isinstance(f, FunctionType) and f.__code__ in remembering.__code__.co_consts:
        return cast(Any, f).__wrapped__
    return f
