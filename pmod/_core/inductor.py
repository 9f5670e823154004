"""What torch's Inductor makes of pmod's operator: calls stay in order, and messages are
torch's own where they can be.

The operator is registered with an ordered effect, and AOTAutograd threads a token
through the calls. Inductor 2.13 then loses it: `with_effects` records the order under
the name of a buffer where the scheduler looks for the name of an operation, and ranks
whose shapes differ (an empty shard on one of them) may run their collectives in
different orders. This lowering records the order under both. tests/core/test_compile.py
tells when it is no longer needed.

Before Inductor a call is one operator, so nothing that happens there (a partition of the
graph into forward and backward, a result that one rank does not use) can move or drop
its message on one rank alone. Here it becomes torch's functional collectives, with what
is done to the tensor before and after, which Inductor fuses with the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_arg as map_nodes

from pmod._core.row import decode, group_of
from pmod._core.send import begin, memory_format
from pmod._torch import (
    box_made,
    core_decompositions,
    graph_lowered,
    is_inductor_loaded,
    kernel_made,
    lowering_registered,
    map_only,
    node_class,
    ordered_effect,
    traced_graph,
)
from pmod._wire.along import functional_wire
from pmod._wire.functional import Unwritten

_told: set[object] = set()


def keep_order(operator: object) -> None:
    """Register the lowering of an operator once Inductor is there.

    It takes seconds to import, so pmod does not import it.
    """
    if operator in _told or not is_inductor_loaded():
        return
    _told.add(operator)
    graph_of, made, node, box = graph_lowered(), kernel_made(), node_class(), box_made()

    def lower(xs: Sequence[object], call: str) -> object:
        graph = graph_of.graph
        first = len(graph.operations)
        result = _lowered(graph, xs, call)
        if result is None:
            result = map_only(node, box, made(operator, xs, call))
        before = graph.effectful_ops.get(ordered_effect())
        if before is not None:
            for operation in graph.operations[first:]:
                name = operation.get_operation_name()
                graph.additional_star_deps[name].add(before.get_name())
        return result

    lowering_registered()(operator, type_promotion_kind=None)(lower)


def _lowered(graph: Any, xs: Sequence[object], call: str) -> list[object] | None:
    """Return the results of a call, as torch's functional collectives bring them.

    graph: what Inductor makes. None where pmod sends: by a backend with tags, and where
    these collectives do not have the message.
    """
    group = group_of(call)
    examples = _examples(graph.current_node) if group else None
    this = decode(call)
    if examples is None or examples[0].device.type != this.axis.topology.device.type:
        return None
    wire = functional_wire(this.axis, group)

    def send(*xs: Tensor) -> list[Tensor]:
        return begin(this, xs, wire).wait()

    trace = traced_graph()(send, decomposition_table=core_decompositions()())
    try:
        written = trace(*examples)
    except Unwritten:
        return None
    return _into(graph, written.graph, xs)


def _examples(node: Any) -> list[Tensor] | None:
    """Return the tensors that a node of the operator stands for.

    None where one has symbols for lengths, or is channels_last, as its result must be.
    """
    # an ordered one is an argument of `with_effects`, after the token
    found = node.args[0] if isinstance(node.args[0], list) else node.args[2]
    xs: list[Tensor] = [arg.meta["val"] for arg in found]
    for x in xs:
        if any(map(_is_symbol, x.shape)) or memory_format(x) is not None:
            return None
    return xs


def _is_symbol(length: object) -> bool:
    return isinstance(length, torch.SymInt)


def _into(graph: Any, written: Any, xs: Sequence[object]) -> list[object]:
    """Make a traced graph a part of what Inductor makes, and return its results."""
    given = iter(xs)
    made: dict[Any, object] = {}

    def value(arg: Any) -> Any:
        return made[arg]

    for node in written.nodes:
        if node.op == "placeholder":
            made[node] = next(given)
        elif node.op == "call_function":
            args, kwargs = map_nodes(node.args, value), map_nodes(node.kwargs, value)
            # a lowering looks at the shape that a node was traced with
            with graph.set_current_node(node):
                made[node] = graph.call_function(node.target, args, kwargs)
    (results,) = [node.args[0] for node in written.nodes if node.op == "output"]
    return [made[node] for node in results]
