"""What torch.compile's tracer shows to a function mode of the writes into tensors, and what it does not."""

from __future__ import annotations

import operator
from typing import Any


def show_writes() -> None:
    """While torch.compile traces: `y[i] = x` goes through function modes, as it does in eager code.

    From torch 2.14 on, the tracer shows them the method `__setitem__` and not the statement; before, both.
    """
    from torch._dynamo.variables.tensor import TensorVariable
    from torch._dynamo.variables.torch_function import can_dispatch_torch_function

    slot = "mp_ass_subscript_impl"
    original: Any = vars(TensorVariable).get(slot)
    if original is None or hasattr(original, "shows"):
        return

    def shown(self: Any, tx: Any, key: Any, value: Any) -> Any:
        if value is not None and can_dispatch_torch_function(tx, (self, key, value), {}):
            return self.call_method(tx, "__setitem__", [key, value], {})
        return original(self, tx, key, value)

    shown.shows = True  # type: ignore[attr-defined]
    setattr(TensorVariable, slot, shown)


def writes_traced() -> int:
    """While torch.compile traces: how many `y[i] = x` are in the graph so far."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    nodes: Any = InstructionTranslator.current_tx().output.graph.nodes
    return sum(node.target is operator.setitem or node.target == "__setitem__" for node in nodes)


for _constant in (show_writes, writes_traced):
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined] # see _ambient._constant
