"""What all ranks hold as one value (I), and what meets varying data without a pvary."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor

from pmod._core.arguments import check_tensor, check_tolerance, from_number, wrong
from pmod._core.lineage import Found, calls_in, lineage, name_of
from pmod._core.marks import is_marked_varying, marked
from pmod._core.tree import flatten
from pmod._debug.compare import (
    ROOT,
    Words,
    are_same,
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


def assert_invariant(tree: object, axis: AxisLike, *, rtol: float = 0.0) -> None:
    """Raise if a value is not the same on all ranks of the axis.

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
    flat: list[Tensor] = []
    flatten(tree, "assert_invariant", bound, flat)
    leaves = [from_number(leaf, int, "assert_invariant", bound) for leaf in flat]
    for leaf in leaves:
        check_tensor(leaf, "assert_invariant", bound)
    if bound.size == 1:
        return
    names = [f"leaf {i}" for i in range(len(leaves))]
    if isinstance(tree, Tensor):
        names = ["x"]
    with outside_transforms():
        origin = call_site()
        words = Words.of_tree(tree, leaves, origin, bound)
        rows = gathered([bits_of(leaves)], words, bound, origin)
        found = difference(leaves, names, bound, rtol, are_same(rows))
    if found is not None:
        right = (
            "It should be the same on every rank: "
            "was it drawn from another seed, or is a psum missing?"
        )
        raise wrong(MismatchError, "assert_invariant", bound, found, right)


Used = tuple[Tensor, str]
"""A leaf, and the line where it is used."""


def check_lineage(found: list[Found], axis: Axis, origin: Origin) -> None:
    """Raise where one value (I) of the axis goes into a sum over it without pvary.

    What goes into the sum must be V: made from no I but through pvary or shard.
    """
    leaves: list[Used] = []
    invariant: list[tuple[Origin, str]] = []
    for each in found:
        invariant += each.invariant
        for leaf, line in each.leaves:
            if not is_marked_varying(leaf, axis):
                leaves.append((leaf, line))
    words = Words.of_step("what x is made from", origin, axis)
    rows = gathered([len(leaves), len(invariant)], words, axis, origin)
    # All ranks see the same rows, so all raise, also those that have no such value.
    if any(row[1] for row in rows):
        # If nothing in x is V, x is one value itself.
        alone = not leaves and not any(each.varying for each in found)
        raise _invariant_used(invariant, alone, axis, origin)
    # Ranks that use unlike numbers of leaves do not use one value.
    if leaves and are_same(rows):
        _check_leaves(leaves, axis, origin)


def _invariant_used(
    invariant: list[tuple[Origin, str]], alone: bool, axis: Axis, origin: Origin
) -> MismatchError:
    (function, called), line = ("a collective", "another rank"), ""
    if invariant:
        (function, called), line = invariant[0]
    if alone:
        given = f"x is the result of {function}, one value (I) already: "
        right = f"It comes from {called}\nLeave one of the two out."
        return differ(origin, axis, given + _times(origin, axis), right)
    given = f"the result of {function}, one value (I), meets varying data without pvary"
    put = f"Put pmod.pvary(..., {axis.label!r}) around it there."
    right = f"It comes from {called}\n{_used_in(line)}{put}"
    return differ(origin, axis, given, right)


def _check_leaves(leaves: list[Used], axis: Axis, origin: Origin) -> None:
    """Raise, or warn, where leaves are the same on all ranks."""
    step = Words.of_step("the leaves that x is made from", origin, axis)
    codes = gathered([bits_of([leaf]) for leaf, _ in leaves], step, axis, origin)
    same: list[Used] = []
    for i, (leaf, line) in enumerate(leaves):
        if leaf.numel() and are_same(codes, i):
            same.append((leaf, line))
    if not same:
        return
    # Shards, too, may start with zeros or ones.
    certain = [(leaf, line) for leaf, line in same if not _is_constant(leaf)]
    if certain:
        raise _leaves_used(certain, axis, origin)
    error = _leaves_used(same, axis, origin)
    warnings.warn(str(error), RuntimeWarning, stacklevel=3)
    # It is said once.
    for leaf, _ in same:
        marked.setdefault(leaf, set()).add(axis.group_key)


def _is_constant(leaf: Tensor) -> bool:
    plain = unwrapped(leaf)
    return bool((plain == plain.reshape(-1)[0]).all())


def _leaves_used(leaves: list[Used], axis: Axis, origin: Origin) -> MismatchError:
    names = [name_of(leaf) for leaf, _ in leaves]
    are = "is" if len(names) == 1 else "are"
    given = (
        f"{_list(names)} {are} the same on all ranks, "
        "used in varying computation without pvary"
    )
    right = (
        f"{_used_in(leaves[0][1])}"
        f"If it is one value (I): use pmod.pvary(..., {axis.label!r}) of it there. "
        f"If it only starts equal (V): pmod.mark_varying(..., {axis.label!r}) says so."
    )
    return differ(origin, axis, given, right)


def _list(names: list[str]) -> str:
    listed = ", ".join(names[:4])
    if len(names) > 4:
        return f"{listed} and {len(names) - 4} more"
    return listed


def check_root(root: Tensor, inputs: Sequence[Tensor] | None) -> None:
    """Check what goes into a varying loss, as what goes into a psum.

    `backward` differentiates the sum of such a loss over the ranks.
    """
    origin = (ROOT, call_site()[1])
    axes: dict[str, tuple[Axis, Origin]] = {}
    for call, forward in calls_in(root):
        if call.axis.size > 1:
            axes[call.axis.group_key] = call.axis, forward
    # In the same order on all ranks, because each of them is a step of its own.
    for _, (axis, forward) in sorted(axes.items()):
        found = lineage(root, axis)
        # A rank whose loss has lost this call does not come.
        words = Words.of_step("", origin, axis)
        numbers = [found.varying, bits_of([root])]
        rows = gathered(numbers, words, axis, backward_of(forward))
        if not all(row[0] for row in rows):
            continue
        asked = [used for used in found.leaves if _is_asked_for(used[0], inputs)]
        check_lineage([Found(asked, found.invariant, found.varying)], axis, origin)
        if inputs is None and are_same(rows, 1):
            given = (
                "the loss varies (V) and is the same on all ranks, "
                "so its gradient is that of their sum"
            )
            right = "Did you mean unshard, pmean or pick, which give one value (I)?"
            error = differ(origin, axis, given, right)
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)


def _is_asked_for(leaf: Tensor, inputs: Sequence[Tensor] | None) -> bool:
    if inputs is not None:
        return any(leaf is x for x in inputs)
    # `data_parallel` reduces what it leaves in .grad, by such a hook.
    return not accumulation_hooks(leaf)


def _times(origin: Origin, axis: Axis) -> str:
    if origin[0] == "psum":
        return f"this would multiply by {axis.size}"
    return f"this is the same value {axis.size} times"


def _used_in(line: str) -> str:
    return f"It is used in {line}\n" if line else ""
