"""What all ranks hold as one value (I), and what meets varying data without a pvary."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pmod._core.arguments import check_tensor, check_tolerance, from_number, wrong
from pmod._core.lineage import Found, calls_in, lineage, name_of
from pmod._core.marks import is_marked_varying, marked
from pmod._core.tree import flatten
from pmod._debug.compare import (
    ROOT,
    Words,
    bits_of,
    differ,
    difference,
    gathered,
    outside_transforms,
    unwrapped,
)
from pmod._errors import MismatchError
from pmod._mesh.ambient import resolve
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import AxisLike
from pmod._site import Origin, backward_of, call_site
from pmod._torch import accumulation_hooks


def assert_invariant(tree: Any, axis: AxisLike, *, rtol: float = 0.0) -> None:
    """Raise where a value that all ranks of the axis should hold alike is not the same
    on all of them.

    The leaves are tensors or numbers.
    rtol: the largest difference between ranks, relative to the largest magnitude; 0
    asks for the same bits. Usable with and without debug. All ranks of the axis call
    it, with trees of the same shapes.
    Cost: one small message; two of the size of the tree where it differs or rtol is not
    0.
    Raises: MismatchError on every rank, with the largest difference and where it is;
    ArgumentError for other leaves.

    >>> pmod.assert_invariant(torch.ones(2), mesh["model"])
    """
    bound = resolve(axis, "assert_invariant")
    rtol = check_tolerance(rtol, "assert_invariant")
    leaves: list[Any] = []
    flatten(tree, "assert_invariant", bound, leaves)
    leaves = [from_number(leaf, int, "assert_invariant", bound) for leaf in leaves]
    for leaf in leaves:
        check_tensor(leaf, "assert_invariant", bound)
    if bound.size == 1:
        return
    names = (
        ["x"] if isinstance(tree, Tensor) else [f"leaf {i}" for i in range(len(leaves))]
    )
    with outside_transforms():
        origin = call_site()
        words = Words.of_tree(tree, leaves, origin, bound)
        rows = gathered([bits_of(leaves)], words, bound, origin)
        if rtol == 0.0 and len({row[0] for row in rows}) == 1:
            return
        found = difference(leaves, names, bound, rtol)
    if found is not None:
        right = "It should be the same on every rank: was it drawn from another seed, or is a psum missing?"
        raise wrong(MismatchError, "assert_invariant", bound, found, right)


def check_lineage(found: list[Found], axis: Axis, origin: Origin) -> None:
    """What goes into a sum over the axis must be V: made from no I of the axis but
    through pvary or shard.
    """
    leaves = [
        entry
        for f in found
        for entry in f.leaves
        if not is_marked_varying(entry[0], axis)
    ]
    invariant = [entry for f in found for entry in f.invariant]
    alone = all(
        not f.varying for f in found
    )  # nothing in it is V: it is one value itself
    rows = gathered(
        [len(leaves), len(invariant)],
        Words.of_step("what x is made from", origin, axis),
        axis,
        origin,
    )
    if any(row[1] for row in rows):
        (function, called), line = (
            invariant[0] if invariant else (("a collective", "another rank"), "")
        )
        if alone and not leaves:
            given = f"x is the result of {function}, one value (I) already: {_times(origin, axis)}"
            raise differ(
                origin,
                axis,
                given,
                f"It comes from {called}\nLeave one of the two out.",
            )
        given = (
            f"the result of {function}, one value (I), meets varying data without pvary"
        )
        right = f"It comes from {called}\n{_used_in(line)}Put pmod.pvary(..., {axis.label!r}) around it there."
        raise differ(origin, axis, given, right)
    if len({row[0] for row in rows}) > 1 or not leaves:
        return  # the ranks use different leaves, so these are not one value
    step = Words.of_step("the leaves that x is made from", origin, axis)
    codes = gathered([bits_of([leaf]) for leaf, _ in leaves], step, axis, origin)
    same = [
        entry
        for i, entry in enumerate(leaves)
        if entry[0].numel() and len({row[i] for row in codes}) == 1
    ]
    # zeros, ones: what shards start with, too
    certain = [
        entry
        for entry in same
        if not bool((unwrapped(entry[0]) == unwrapped(entry[0]).reshape(-1)[0]).all())
    ]
    if not same:
        return
    names = [name_of(leaf) for leaf, _ in certain or same]
    given = f"{_list(names)} {'is' if len(names) == 1 else 'are'} the same on all ranks, used in varying computation without pvary"  # noqa: E501
    right = (
        f"{_used_in((certain or same)[0][1])}"
        f"If it is one value (I): use pmod.pvary(..., {axis.label!r}) of it there. "
        f"If it only starts equal (V): pmod.mark_varying(..., {axis.label!r}) says so."
    )
    error = differ(origin, axis, given, right)
    if certain:
        raise error
    warnings.warn(str(error), RuntimeWarning, stacklevel=2)
    for leaf, _ in same:  # said once
        marked.setdefault(leaf, set()).add(axis.group_key)


def _list(names: list[str]) -> str:
    return ", ".join(names[:4]) + (
        f" and {len(names) - 4} more" if len(names) > 4 else ""
    )


def check_root(root: Tensor, inputs: Sequence[Tensor] | None) -> None:
    """Backward of a V: the derivative of the sum over the ranks. So what goes into it
    is looked at as by a sum.
    """
    origin = (ROOT, call_site()[1])
    axes = {
        call.axis.group_key: (call.axis, forward)
        for call, forward in calls_in(root)
        if call.axis.size > 1
    }
    for _, (axis, forward) in sorted(axes.items()):
        found = lineage(root, axis)
        asked = [
            (leaf, line) for leaf, line in found.leaves if _is_asked_for(leaf, inputs)
        ]
        # a rank whose loss has lost this call does not come
        words = Words.of_step("", origin, axis)
        rows = gathered(
            [found.varying, bits_of([root])], words, axis, backward_of(forward)
        )
        if not all(row[0] for row in rows):
            continue
        check_lineage([Found(asked, found.invariant, found.varying)], axis, origin)
        if inputs is None and len({row[1] for row in rows}) == 1:
            given = "the loss varies (V) and is the same on all ranks, so its gradient is that of their sum"
            right = "Did you mean unshard, pmean or pick, which give one value (I)?"
            warnings.warn(
                str(differ(origin, axis, given, right)), RuntimeWarning, stacklevel=2
            )


def _is_asked_for(leaf: Tensor, inputs: Sequence[Tensor] | None) -> bool:
    if inputs is not None:
        return any(leaf is x for x in inputs)
    return not accumulation_hooks(
        leaf
    )  # data_parallel's reduces what it leaves in .grad


def _times(origin: Origin, axis: Axis) -> str:
    return (
        f"this would multiply by {axis.size}"
        if origin[0] == "psum"
        else f"this is the same value {axis.size} times"
    )


def _used_in(line: str) -> str:
    return f"It is used in {line}\n" if line else ""
