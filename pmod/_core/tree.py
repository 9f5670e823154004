"""Maps over the leaves of nested dicts, lists, tuples and namedtuples.

Leaves of one dtype and device are sent together. The order of the leaves decides which
message is sent first, so it must be the same on every rank: dicts are walked by sorted
key (torch's pytree, which is not used here, walks them by insertion), and so are other
mappings that can be filled, such as a TensorDict. None is a leaf that stays None.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from pmod._core.arguments import check_tensor, wrong
from pmod._core.bind import bind, bind_all
from pmod._core.leaves import is_mapping, refilled
from pmod._core.row import Call, Params, Row
from pmod._core.watch import watchers
from pmod._errors import ArgumentError, endless
from pmod._mesh.axis import Axis
from pmod._site import of_tree

Tree = TypeVar("Tree")
"""A tensor, or a dict, list, tuple or namedtuple of trees.

What goes in comes out with the same structure.
"""


def flatten(tree: object, function: str, axis: Axis, leaves: list[Any]) -> None:
    """Append the leaves in order; None is skipped."""
    try:
        _walk(tree, function, axis, leaves)
    except RecursionError:
        raise endless(function) from None


def _walk(tree: object, function: str, axis: Axis, leaves: list[object]) -> None:
    if tree is None:
        return
    branches = _branches(tree, function, axis)
    if branches is None:
        leaves.append(tree)
        return
    for branch in branches:
        _walk(branch, function, axis, leaves)


def _branches(tree: object, function: str, axis: Axis) -> Sequence[object] | None:
    """Return the trees that a tree holds, in the order of all ranks; None for a leaf."""
    if is_mapping(tree):
        return [tree[key] for key in sorted_keys(tree, function, axis)]
    if isinstance(tree, list | tuple):
        return cast(Sequence[object], tree)
    return None


def unflatten(tree: object, function: str, axis: Axis, leaves: list[Any]) -> Any:
    """Return `tree` with its leaves replaced by those in `leaves`.

    These are used up from the front.
    """
    if tree is None:
        return None
    branches = _branches(tree, function, axis)
    if branches is None:
        return leaves.pop(0)
    filled = [unflatten(branch, function, axis, leaves) for branch in branches]
    if is_mapping(tree):
        keys = sorted_keys(tree, function, axis)
        return refilled(tree, dict(zip(keys, filled, strict=True)))
    if isinstance(tree, list):
        return filled
    # a namedtuple takes its items one by one
    if hasattr(tree, "_fields"):
        return cast(Callable[..., object], type(tree))(*filled)
    return tuple(filled)


def map_leaves(
    f: Callable[[list[Any]], Sequence[Any]], tree: Tree, function: str, axis: Axis
) -> Tree:
    """Replace all leaves at once: `f` takes the list of them and returns as many."""
    if isinstance(tree, Tensor):
        return f([tree])[0]
    leaves: list[Any] = []
    flatten(tree, function, axis, leaves)
    if torch.compiler.is_compiling() or not watchers():
        return unflatten(tree, function, axis, list(f(leaves)))
    with of_tree(outline(tree, function, axis)):
        return unflatten(tree, function, axis, list(f(leaves)))


def outline(tree: object, function: str, axis: Axis) -> str:
    """Return the structure of a tree, in which a leaf is *.

    If the trees of all ranks are alike, it is the same text on all of them.
    """
    if tree is None:
        return "None"
    branches = _branches(tree, function, axis)
    if branches is None:
        return "*"
    inside = [outline(branch, function, axis) for branch in branches]
    if is_mapping(tree):
        keys = map(_shown, sorted_keys(tree, function, axis))
        return "{" + ", ".join(map(": ".join, zip(keys, inside, strict=True))) + "}"
    if isinstance(tree, list):
        return f"[{', '.join(inside)}]"
    name = type(tree).__name__ if hasattr(tree, "_fields") else ""
    return f"{name}({', '.join(inside)})"


def _shown(key: object) -> str:
    text = repr(key)
    # no two processes share an address
    if " at 0x" in text:
        return type(key).__name__
    return text


def sorted_keys(tree: MutableMapping[Any, Any], function: str, axis: Axis) -> list[Any]:
    """Return the keys in the order in which a dict is walked."""
    # a TensorDict iterates over its first dim
    keys = list(tree.keys())
    try:
        return sorted(keys)
    except TypeError:
        kinds = sorted({type(key).__name__ for key in keys})
        given = f"a dict has keys of types {kinds}, which do not sort"
        right = "Use keys of one type: ranks walk a dict in the order of its keys."
        raise wrong(ArgumentError, function, axis, given, right) from None


def each(
    row: Row[Params],
    tree: Tree,
    axis: Axis,
    function: str,
    prepare: Callable[[Tensor], tuple[Tensor, Params]],
) -> Tree:
    """Bind a row to every leaf by itself.

    `prepare` checks a leaf and gives what to bind. All are checked before one is bound.
    """
    # the usual case, without the machinery of trees
    if isinstance(tree, Tensor):
        check_tensor(tree, function, axis)
        x, params = prepare(tree)
        return cast(Tree, bind(Call(row, axis, params), [x])[0])

    def run(leaves: list[Tensor]) -> list[Tensor]:
        for x in leaves:
            check_tensor(x, function, axis)
        prepared = [prepare(x) for x in leaves]
        calls = [(Call(row, axis, params), [x]) for x, params in prepared]
        return [ys[0] for ys in bind_all(calls)]

    return map_leaves(run, tree, function, axis)


def alike(xs: Sequence[Tensor]) -> list[list[int]]:
    """Return the places of those that one message can carry: of one dtype and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, x in enumerate(xs):
        groups.setdefault((x.dtype, x.device), []).append(i)
    return list(groups.values())


def together(
    row: Row[Params], leaves: list[Tensor], axis: Axis, params: Params
) -> list[Tensor]:
    """Bind an elementwise row to many leaves: one message per dtype and device."""
    if len(leaves) == 1:
        return list(bind(Call(row, axis, params), leaves))
    call = Call(row, axis, params)
    groups = alike(leaves)
    messages: list[tuple[Call, list[Tensor]]] = []
    for group in groups:
        messages.append((call, [leaves[i] for i in group]))
    results = bind_all(messages)
    out = list(leaves)
    for group, ys in zip(groups, results, strict=True):
        for i, y in zip(group, ys, strict=True):
            out[i] = y
    return out
