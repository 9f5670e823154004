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
from typing import cast

import attrs
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from pmod._core.row import Call
from pmod._mesh.axis import Axis
from pmod._site import HERE, Origin


@attrs.frozen(eq=False)
class Found:
    """What a walk came to, and the line where that was used.

    The leaves stand in the order in which they were met.
    """

    leaves: list[tuple[Tensor, str]]
    invariant: list[tuple[Origin, str]]
    # a V of this axis is among what the tensor was made from
    varying: bool


# of a call that was made before debug was on
UNKNOWN: Origin = ("a collective", "an unknown line")


def calls_in(x: Tensor) -> list[tuple[Call, Origin]]:
    """Return the calls of collectives in a tensor's graph, and where they were made.

    The first made comes first.
    """
    calls: list[tuple[Call, Origin]] = []
    for node, _ in reversed(_nodes(x)):
        call = _call_of(node)
        if call is not None:
            calls.append((call, _origin_of(node)))
    return calls


def lineage(x: Tensor, axis: Axis) -> Found:
    """Return what x was made from, back to the last collectives over this axis."""
    leaves: dict[int, tuple[Tensor, str]] = {}
    invariant: list[tuple[Origin, str]] = []
    varying = False
    if x.grad_fn is None and x.requires_grad:
        leaves[id(x)] = (x, "")
    for node, line in _nodes(x, axis):
        call, leaf = _call_of(node), _leaf_of(node)
        if leaf is not None:
            leaves.setdefault(id(leaf), (leaf, line))
        elif call is not None and call.row.gives == "I":
            invariant.append((_origin_of(node), line))
        elif call is not None:
            varying = True
    return Found(list(leaves.values()), invariant, varying)


def leaves_of(x: Tensor) -> list[Tensor]:
    """Return the leaves that backward from x comes to."""
    leaves = [_leaf_of(node) for node, _ in _nodes(x)]
    return [leaf for leaf in leaves if leaf is not None]


def _call_of(node: Node) -> Call | None:
    call = getattr(node, "call", None)
    # an autograd.Function of the user's may have an attribute of this name
    return call if isinstance(call, Call) else None


def _origin_of(node: Node) -> Origin:
    return getattr(node, "origin", None) or UNKNOWN


def _leaf_of(node: Node) -> Tensor | None:
    return getattr(node, "variable", None)


def _nodes(x: Tensor, axis: Axis | None = None) -> list[tuple[Node, str]]:
    """Return the nodes behind x with the line that used each.

    The walk ends at the collectives over the axis.
    """
    found: dict[Node, str] = {}
    left: list[tuple[Node | None, int, str]] = [(x.grad_fn, x.output_nr, "")]
    seen: set[tuple[Node, int]] = set()
    key = None if axis is None else axis.group_key
    while left:
        node, result, line = left.pop()
        # an input that requires no gradient has no node
        if node is None:
            continue
        call = None if axis is None else _call_of(node)
        place, before = (node, 0), node.next_functions
        # of leaves that one call took together (a tree of parameters), each result was
        # made from its own leaf only
        if call is not None:
            place, before = (node, result), before[result : result + 1]
        if place in seen:
            continue
        seen.add(place)
        # a call along other ranks says nothing certain, also where these overlap
        if call is None or call.axis.group_key == key:
            found.setdefault(node, line)
        if call is not None and _overlap(call.axis, axis):
            continue
        here = _line(node) or line
        left += [(earlier, which, here) for earlier, which in reversed(before)]
    return list(found.items())


def _overlap(a: Axis, b: Axis | None) -> bool:
    if b is None:
        return False
    return a.group_key == b.group_key or len(set(a.ranks) & set(b.ranks)) > 1


_INSIDE = (HERE, os.path.dirname(torch.__file__) + os.sep)


def _line(node: Node) -> str:
    """Return the user's line that made a node, which torch's anomaly mode notes."""
    notes = cast(dict[str, list[str]], node.metadata)
    for entry in reversed(notes.get("traceback_") or []):
        match = re.match(r'\s*File "(.*)", line (\d+), in .*\n\s*(.*)', entry)
        if match is not None and not match[1].startswith(_INSIDE):
            return f"{match[1]}:{match[2]}: {match[3]}"
    return ""


def name_of(leaf: Tensor) -> str:
    """Return what the user calls a leaf.

    That is its path in the largest module that holds it, else its shape.
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
