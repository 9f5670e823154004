"""What torch's Inductor must be told of pmod's operator: that calls stay in order.

The operator is registered with an ordered effect, and AOTAutograd threads a token
through the calls. Inductor 2.13 then loses it: `with_effects` records the order under
the name of a buffer where the scheduler looks for the name of an operation, and ranks
whose shapes differ (an empty shard on one of them) may run their collectives in
different orders. This lowering records the order under both. tests/core/test_compile.py
tells when it is no longer needed.
"""

from __future__ import annotations

from pmod._torch import (
    box_made,
    graph_lowered,
    is_inductor_loaded,
    kernel_made,
    lowering_registered,
    map_only,
    node_class,
    ordered_effect,
)

_told: set[object] = set()


def keep_order(operator: object) -> None:
    """Register the lowering of an operator once Inductor is there.

    It takes seconds to import, so pmod does not import it.
    """
    if operator in _told or not is_inductor_loaded():
        return
    _told.add(operator)
    graph_of, made, node, box = graph_lowered(), kernel_made(), node_class(), box_made()

    def lower(*args: object, **kwargs: object) -> object:
        graph = graph_of.graph
        first = len(graph.operations)
        result = made(operator, *args, **kwargs)
        before = graph.effectful_ops.get(ordered_effect())
        if before is not None:
            for operation in graph.operations[first:]:
                name = operation.get_operation_name()
                graph.additional_star_deps[name].add(before.get_name())
        return map_only(node, box, result)

    lowering_registered()(operator, type_promotion_kind=None)(lower)
