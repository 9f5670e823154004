"""What torch's Inductor must be told of pmod's operator: that calls stay in order.

The operator is registered with an ordered effect, and AOTAutograd threads a token through the calls. Inductor 2.13 then
loses it: `with_effects` records the order under the name of a buffer where the scheduler looks for the name of an
operation, and ranks whose shapes differ (an empty shard on one of them) may run their collectives in different orders.
This lowering records the order under both. tests/core/test_compile.py tells when it is no longer needed.
"""

from __future__ import annotations

import sys
from typing import Any

_told: set[Any] = set()


def keep_order(operator: Any) -> None:
    """Register the lowering once Inductor is there: it takes seconds to import, so pmod does not import it."""
    if operator in _told or "torch._inductor.lowering" not in sys.modules:
        return
    _told.add(operator)
    from torch._inductor import ir, lowering
    from torch._inductor.virtualized import V
    from torch._library.effects import EffectType
    from torch.utils import _pytree

    graph_of: Any = V

    def lower(*args: Any, **kwargs: Any) -> Any:
        graph = graph_of.graph
        first = len(graph.operations)
        result = ir.FallbackKernel.create(operator, *args, **kwargs)
        before = graph.effectful_ops.get(EffectType.ORDERED)
        if before is not None:
            for operation in graph.operations[first:]:
                graph.additional_star_deps[operation.get_operation_name()].add(before.get_name())
        return _pytree.tree_map_only(ir.IRNode, ir.TensorBox.create, result)

    lowering.register_lowering(operator, type_promotion_kind=None)(lower)
