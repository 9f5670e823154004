"""Which writes into tensors torch.compile's tracer shows to a function mode."""

from __future__ import annotations

import operator
from typing import Any
from weakref import WeakKeyDictionary

from torch.fx import Graph, Node

from pmod._torch import (
    Operator,
    OperatorPacket,
    assignments_traced,
    constant_in_graphs,
    graph_traced,
    schema_of,
)

_ASSIGNMENTS = {
    operator.setitem,
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.imatmul,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.ilshift,
    operator.irshift,
}
# They change no number.
_FLAGS = {"requires_grad_", "detach_"}
# Of graphs: up to which node they were counted, and how many writes there are.
_counted: WeakKeyDictionary[Graph, tuple[object, int]] = WeakKeyDictionary()


def show_writes() -> None:
    """While torch.compile traces: let `y[i] = x` go through function modes.

    In eager code it does. From torch 2.14 on, the tracer shows them the method
    `__setitem__` and not the statement; before, it shows both. If a torch has no such
    place, nothing is changed: `writes_traced` finds what then stays unseen.
    """
    found = assignments_traced()
    if found is None:
        return
    followed, is_shown = found
    slot = "mp_ass_subscript_impl"
    original: Any = vars(followed).get(slot)
    if original is None or hasattr(original, "shows"):
        return

    def shown(self: Any, tx: Any, key: Any, value: Any) -> Any:
        if value is not None and is_shown(tx, (self, key, value), {}):
            return self.call_method(tx, "__setitem__", [key, value], {})
        return original(self, tx, key, value)

    shown.shows = True  # type: ignore[attr-defined]
    setattr(followed, slot, shown)


def writes_traced() -> tuple[int, int]:
    """While torch.compile traces: return its graph, and how many writes are in it."""
    graph = graph_traced()
    last, before = _counted.get(graph, (None, 0))
    new: list[Node] = []
    # back to the last one that was counted, or through all if that one was erased
    for node in reversed(graph.nodes):
        if node is last:
            break
        new.append(node)
    else:
        before = 0
    n = before + sum(map(_writes, new))
    _counted[graph] = new[0] if new else last, n
    return id(graph), n


def _writes(node: Node) -> bool:
    if node.op not in ("call_method", "call_function"):
        return False
    target = node.target
    if target in _ASSIGNMENTS or "out" in node.kwargs:
        return True
    if written_places(target):
        return True
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if name == "__setitem__":
        return True
    is_in_place = name.endswith("_") and not name.endswith("__")
    return is_in_place and name not in _FLAGS


def written_places(func: Any) -> tuple[int | str, ...]:
    """Return the arguments that an operator of torch.ops writes, by place and by name.

    Its schema says so.
    """
    if isinstance(func, OperatorPacket):
        func = getattr(func, func.overloads()[0])
    if not isinstance(func, Operator):
        return ()
    places: list[int | str] = []
    for i, x in enumerate(schema_of(func).arguments):
        if x.alias_info and x.alias_info.is_write:
            places += [i, x.name]
    return tuple(places)


for _constant in (show_writes, writes_traced, written_places):
    constant_in_graphs(_constant)
