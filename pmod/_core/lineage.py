"""Where a tensor comes from: a walk back through the autograd graph, along one axis.

Along an axis a collective in the graph says what its result is: V ends the walk, for
what went into it was looked at when it was called; I found on the way to something that
is summed over the axis was not made V, and neither was a leaf that all ranks hold
alike. Nothing needs to be declared: the graph has the calls (`_Linear`), and their
kinds.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from pmod._core.row import Call
from pmod._mesh.axis import Axis
from pmod._site import HERE, Origin


@attrs.frozen(eq=False)
class Found:
    """What a walk came to, and the line where that was used; the leaves in the order in
    which they were met.
    """

    leaves: list[tuple[Tensor, str]]
    invariant: list[tuple[Origin, str]]
    varying: bool  # a V of this axis is among what the tensor was made from


UNKNOWN: Origin = (
    "a collective",
    "an unknown line",
)  # of a call that was made before debug was on


def calls_in(x: Tensor) -> list[tuple[Call, Origin]]:
    """The calls of collectives in a tensor's graph, and where they were made; the first
    made comes first.
    """
    return [
        (node.call, node.origin or UNKNOWN)
        for node, _ in reversed(_nodes(x))
        if _is_call(node)
    ]


def lineage(x: Tensor, axis: Axis) -> Found:
    """What x was made from, as far back as the last collectives over this axis."""
    leaves: dict[int, tuple[Tensor, str]] = {}
    invariant: dict[int, tuple[Origin, str]] = {}
    varying = False
    if x.grad_fn is None and x.requires_grad:
        leaves[id(x)] = (x, "")
    for node, line in _nodes(x, axis):
        if _is_call(node):
            if node.call.row.gives == "I":
                invariant.setdefault(id(node), (node.origin or UNKNOWN, line))
            else:
                varying = True
        elif hasattr(node, "variable"):
            leaves.setdefault(id(node.variable), (node.variable, line))
    return Found(list(leaves.values()), list(invariant.values()), varying)


def leaves_of(x: Tensor) -> list[Tensor]:
    """The leaves that backward from x comes to."""
    return [node.variable for node, _ in _nodes(x) if hasattr(node, "variable")]


def _is_call(node: Any) -> bool:
    return isinstance(getattr(node, "call", None), Call)


def _nodes(x: Tensor, axis: Axis | None = None) -> list[tuple[Any, str]]:
    """The nodes behind x with the line that used each, ended by the collectives over
    the axis.
    """
    found: dict[Any, str] = {}
    left: list[tuple[Any, int, str]] = (
        [] if x.grad_fn is None else [(x.grad_fn, x.output_nr, "")]
    )
    seen: set[tuple[Any, int]] = set()
    while left:
        node, result, line = left.pop()
        # of leaves that one call took together (a tree of parameters), each result was
        # made from its own leaf only
        one = axis is not None and _is_call(node)
        if (node, one and result) in seen:
            continue
        seen.add((node, one and result))
        found.setdefault(node, line)
        if axis is not None and _is_call(node) and _overlap(node.call.axis, axis):
            continue
        here = _line(node) or line
        before = (
            node.next_functions[result : result + 1] if one else node.next_functions
        )
        left += [
            (earlier, which, here)
            for earlier, which in reversed(before)
            if earlier is not None
        ]
    if axis is None:
        return list(found.items())
    # one that overlaps without being the same says nothing certain
    return [
        (n, line)
        for n, line in found.items()
        if not _is_call(n) or n.call.axis.group_key == axis.group_key
    ]


def _overlap(a: Axis, b: Axis) -> bool:
    return a.group_key == b.group_key or len(set(a.ranks) & set(b.ranks)) > 1


_INSIDE = (HERE, os.path.dirname(torch.__file__) + os.sep)


def _line(node: Any) -> str:
    """The user's line that made a node, which torch's anomaly mode notes."""
    for entry in reversed(node.metadata.get("traceback_") or []):
        match = re.match(r'\s*File "(.*)", line (\d+), in .*\n\s*(.*)', entry)
        if match is not None and not match[1].startswith(_INSIDE):
            return f"{match[1]}:{match[2]}: {match[3]}"
    return ""


def name_of(leaf: Tensor) -> str:
    """How the user calls a leaf: its path in the largest module that holds it, else its
    shape.
    """
    paths: list[tuple[int, str]] = []
    for module in _modules():
        for path, parameter in module.named_parameters():
            if parameter is leaf:
                paths.append((path.count("."), f"{path} of {type(module).__name__}"))
    if paths:
        return f"the parameter {max(paths)[1]}"
    kind = "parameter" if isinstance(leaf, nn.Parameter) else "leaf"
    return f"a {kind} of shape {tuple(leaf.shape)}"


def _modules() -> Sequence[nn.Module]:
    return [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]
