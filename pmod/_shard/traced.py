"""What torch.compile's tracer shows to a function mode of the writes into tensors, and
what it does not.
"""

from __future__ import annotations

import operator
from typing import Any
from weakref import WeakKeyDictionary

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
_FLAGS = {"requires_grad_", "detach_"}  # they change no number
_counted: WeakKeyDictionary[Any, tuple[Any, int]] = (
    WeakKeyDictionary()
)  # of graphs: up to which node, how many writes


def show_writes() -> None:
    """While torch.compile traces: `y[i] = x` goes through function modes, as it does in
    eager code.

    From torch 2.14 on, the tracer shows them the method `__setitem__` and not the
    statement; before, both. Where a
    torch has no such place, nothing is changed: what then stays unseen is found by
    `writes_traced`.
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
    """While torch.compile traces: which graph it writes, and how many operations in
    there change a tensor in place.
    """
    graph = graph_traced()
    last, before = _counted.get(graph, (None, 0))
    new: list[Any] = []
    for node in reversed(
        graph.nodes
    ):  # as far as the last one that was counted, or all where that one was erased
        if node is last:
            break
        new.append(node)
    else:
        before = 0
    n = before + sum(map(_writes, new))
    _counted[graph] = new[0] if new else last, n
    return id(graph), n


def _writes(node: Any) -> bool:
    if node.op not in ("call_method", "call_function"):
        return False
    if (
        node.target in _ASSIGNMENTS
        or "out" in node.kwargs
        or written_places(node.target)
    ):
        return True
    name = (
        node.target
        if isinstance(node.target, str)
        else getattr(node.target, "__name__", "")
    )
    return name == "__setitem__" or (
        name.endswith("_") and not name.endswith("__") and name not in _FLAGS
    )


def written_places(func: Any) -> tuple[int | str, ...]:
    """The arguments, by place and by name, that an operator of torch.ops says it
    writes.
    """
    if isinstance(func, OperatorPacket):
        func = getattr(func, func.overloads()[0])
    if not isinstance(func, Operator):
        return ()
    written = [
        (i, x.name)
        for i, x in enumerate(schema_of(func).arguments)
        if x.alias_info and x.alias_info.is_write
    ]
    return tuple([place for pair in written for place in pair])


for _constant in (show_writes, writes_traced, written_places):
    constant_in_graphs(_constant)
