"""Maps over the leaves of nested dicts, lists, tuples and namedtuples; leaves of one
dtype and device sent together.

Our own forty lines, because the order of the leaves decides which message is sent
first: it must be the same on every rank, so dicts are walked by sorted key (torch's
pytree walks them by insertion), and so are other mappings that can be filled, such as a
TensorDict. None is a leaf that stays None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
"""A tensor, or a dict, list, tuple or namedtuple of trees; what goes in comes out with
the same structure.
"""


def flatten(tree: Any, function: str, axis: Axis, leaves: list[Any]) -> None:
    """Append the leaves in order; None is skipped."""
    try:
        _walk(tree, function, axis, leaves)
    except RecursionError:
        raise endless(function) from None


def _walk(tree: Any, function: str, axis: Axis, leaves: list[Any]) -> None:
    if tree is None:
        return
    if is_mapping(tree):
        for key in sorted_keys(tree, function, axis):
            _walk(tree[key], function, axis, leaves)
    elif isinstance(tree, list | tuple):
        for branch in cast(Sequence[Any], tree):
            _walk(branch, function, axis, leaves)
    else:
        leaves.append(tree)


def unflatten(tree: Any, function: str, axis: Axis, leaves: list[Any]) -> Any:
    """`tree` with its leaves replaced by those in `leaves`, which are used up from the
    front.
    """
    if tree is None:
        return None
    if is_mapping(tree):
        keys = sorted_keys(tree, function, axis)
        return refilled(
            tree, {key: unflatten(tree[key], function, axis, leaves) for key in keys}
        )
    if isinstance(tree, list | tuple):
        branches = [unflatten(branch, function, axis, leaves) for branch in tree]
        if isinstance(tree, list):
            return branches
        return type(tree)(*branches) if hasattr(tree, "_fields") else tuple(branches)
    return leaves.pop(0)


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


def outline(tree: Any, function: str, axis: Axis) -> str:
    """The structure of a tree, in which a leaf is *: the same text on all ranks, where
    their trees are alike.
    """
    if is_mapping(tree):
        keys = sorted_keys(tree, function, axis)
        return (
            "{"
            + ", ".join(
                [f"{_shown(key)}: {outline(tree[key], function, axis)}" for key in keys]
            )
            + "}"
        )
    if isinstance(tree, list | tuple):
        inside = ", ".join([outline(branch, function, axis) for branch in tree])
        if isinstance(tree, list):
            return f"[{inside}]"
        return f"{type(tree).__name__ if hasattr(tree, '_fields') else ''}({inside})"
    return "None" if tree is None else "*"


def _shown(key: Any) -> str:
    """A key as text, without an address, which no two processes share."""
    text = repr(key)
    return type(key).__name__ if " at 0x" in text else text


def sorted_keys(tree: Any, function: str, axis: Axis) -> list[Any]:
    """The order in which a dict is walked."""
    keys = list(tree.keys())  # a TensorDict iterates over its first dim
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
    """Bind a row to every leaf by itself; `prepare` checks a leaf and gives what to
    bind. First all are checked.
    """

    if isinstance(tree, Tensor):  # the usual case, without the machinery of trees
        check_tensor(tree, function, axis)
        x, params = prepare(tree)
        return cast(Tree, bind(Call(row, axis, params), [x])[0])

    def run(leaves: list[Any]) -> list[Any]:
        for x in leaves:
            check_tensor(x, function, axis)
        prepared = [prepare(x) for x in leaves]
        return [
            ys[0]
            for ys in bind_all(
                [(Call(row, axis, params), [x]) for x, params in prepared]
            )
        ]

    return map_leaves(run, tree, function, axis)


def alike(xs: Sequence[Tensor]) -> list[list[int]]:
    """The places of those that one message can carry: of one dtype and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, x in enumerate(xs):
        groups.setdefault((x.dtype, x.device), []).append(i)
    return list(groups.values())


def together(
    row: Row[Params], leaves: list[Any], axis: Axis, params: Params
) -> list[Any]:
    """Bind an elementwise row to many leaves: one message per dtype and device."""
    if len(leaves) == 1:
        return list(bind(Call(row, axis, params), leaves))
    groups = alike(leaves)
    results = bind_all(
        [(Call(row, axis, params), [leaves[i] for i in group]) for group in groups]
    )
    out: list[Any] = [None] * len(leaves)
    for group, ys in zip(groups, results, strict=True):
        for i, y in zip(group, ys, strict=True):
            out[i] = y
    return out
