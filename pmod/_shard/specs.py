"""Trees of specs, and what needs no more than a spec.

The same tree of `P` beside the parameters serves `pvary_params`, `global_norm`,
`to_dtensors` and `shard_map`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from pmod._collectives.exchange import held_lengths
from pmod._collectives.values import psum, pvary
from pmod._core.arguments import check_tensor, shares, wrong
from pmod._core.leaves import is_mapping
from pmod._core.tree import sorted_keys, unflatten
from pmod._core.watch import tell, watchers
from pmod._errors import ArgumentError, ShapeError, endless
from pmod._mesh.ambient import given_mesh, resolve
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import Mesh
from pmod._shard.spec import WHOLE, P, Specs, check_spec, unfit
from pmod._wire.sums import accumulator

T = TypeVar("T")

Leaf: TypeAlias = tuple[Any, P, str]
"""A leaf of a tree, its spec, and its path."""
Held: TypeAlias = tuple[Tensor, P, str]
"""The same of a tensor."""


def sizes_of(
    spec: P,
    dim: int,
    axis: Axis,
    shape: Sequence[int],
    mesh: Mesh,
    function: str,
    where: str,
) -> tuple[int, ...]:
    """Return how a spec cuts a dim of a whole tensor."""
    told, length = dict(spec.sizes).get(dim), operator.index(shape[dim])
    if told is None:
        return shares(length, axis)
    cuts_all = len(told) == axis.size and sum(told) == length
    if not cuts_all or min(told) < 0:
        what = f"sizes {told} do not cut dim {dim}, of length {length}, for {axis.size} ranks"
        right = f"Pass {axis.size} sizes that add up to {length}."
        raise unfit(ShapeError, function, where, what, spec, tuple(shape), mesh, right)
    return told


def with_specs(
    tree: object, specs: Specs, function: str, where: str, axis: Axis
) -> list[Leaf]:
    """Return the leaves of a tree, in the order in which trees are walked."""
    try:
        return _with_specs(tree, specs, function, where, axis)
    except RecursionError:
        raise endless(function) from None


def _with_specs(
    tree: Any, specs: Specs, function: str, where: str, axis: Axis
) -> list[Leaf]:
    if tree is None:
        return []
    if specs is None:
        specs = WHOLE
    # one spec is for all that is below
    is_one = isinstance(specs, P)
    if not is_one and not fits(tree, specs):
        given = f"{where} is {_outline(tree)} and its specs are {_outline(specs)}"
        right = "Specs are a P for all that is below it, or have the structure of what they are for."
        raise wrong(ArgumentError, function, axis, given, right)
    if is_mapping(tree):
        keys = sorted_keys(tree, function, axis)
    elif isinstance(tree, list | tuple):
        keys = range(len(cast(Sequence[object], tree)))
    else:
        return [(tree, specs, where)]
    leaves: list[Leaf] = []
    for key in keys:
        below = specs if is_one else specs[key]
        leaves += _with_specs(tree[key], below, function, f"{where}[{key!r}]", axis)
    return leaves


def fits(tree: object, specs: Specs) -> bool:
    """Return whether specs are one for each branch of a tree.

    They have the same keys, or are as many.
    """
    if is_mapping(tree):
        return is_mapping(specs) and set(specs.keys()) == set(tree.keys())
    are_lists = isinstance(tree, list | tuple) and isinstance(specs, list | tuple)
    return are_lists and len(specs) == len(cast(Sequence[object], tree))


def _outline(tree: object) -> str:
    if is_mapping(tree):
        return f"a {type(tree).__name__} with the keys {sorted(map(str, tree.keys()))}"
    if isinstance(tree, list | tuple):
        return f"a {type(tree).__name__} of {len(tree)}"
    return f"a {type(tree).__name__}"


def checked_tree(
    tree: object, specs: Specs, mesh: Mesh | None, function: str
) -> tuple[Mesh, Axis, list[Held]]:
    """Return the mesh, all its axes as one, and the leaves, which are tensors."""
    mesh = given_mesh(mesh, function)
    everywhere = resolve(mesh, function)
    found = with_specs(tree, specs, function, "tree", everywhere)
    for x, spec, where in found:
        check_tensor(x, function, everywhere, name=where)
        check_spec(spec, x.shape, mesh, function, where)
    return mesh, everywhere, found


def _in_groups(keys: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], list[int]]:
    """Return which places hold the same key.

    The keys are in the order in which they come first.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return groups


def _left_out(found: Sequence[Held], mesh: Mesh) -> dict[tuple[str, ...], list[int]]:
    """Return the places of the leaves by the axes that their specs leave out."""
    left_out: list[tuple[str, ...]] = []
    for _, spec, _ in found:
        names = [name for name in mesh.axis_names if name not in spec.axes]
        left_out.append(tuple(names))
    return _in_groups(left_out)


def compare_left_out(found: Sequence[Held], mesh: Mesh, function: str) -> None:
    """Under debug: raise if a leaf differs along an axis that its spec leaves out."""
    if torch.compiler.is_compiling() or not watchers():
        return
    # sorted, so that all ranks compare in the same order
    for names, members in sorted(_left_out(found, mesh).items()):
        if not names:
            continue
        leaves = [(found[i][0], found[i][2]) for i in members]
        axis = mesh.bind(names[0] if len(names) == 1 else names, function)
        tell(operator.methodcaller("claimed", leaves, axis, function))


def pvary_params(
    tree: T,
    specs: Specs,
    *,
    mesh: Mesh | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> T:
    """Return `pvary` of every leaf over the axes that its spec leaves out.

    For parameters on their way into varying computation. I -> V along those axes.
    Transpose: psum, of all leaves that leave out the same axes together: one message
    per dtype and device. Shapes: x (...) -> (...). Cost: nothing forward.
    mesh: the ambient one by default. Raises: ArgumentError if specs are not a prefix of
    the tree; AxisError if a spec names an axis that the mesh does not have.

    >>> def gradient():
    ...     w = torch.ones(2, requires_grad=True)  # held by all
    ...     p = pmod.pvary_params({"w": w}, pmod.P())
    ...     pmod.psum(p["w"].sum() * (1 + pmod.axis_index("data")), "data").backward()
    ...     return w.grad
    >>> pmod.simulate(gradient, data=2)
    [tensor([3., 3.]), tensor([3., 3.])]
    """
    mesh, everywhere, found = checked_tree(tree, specs, mesh, "pvary_params")
    entered = [x for x, _, _ in found]
    for names, members in _left_out(found, mesh).items():
        if not names:
            continue
        invariant = [entered[i] for i in members]
        varying = pvary(invariant, mesh[names], reduce_dtype=reduce_dtype)
        for i, y in zip(members, varying, strict=True):
            entered[i] = y
    return unflatten(tree, "pvary_params", everywhere, entered)


def global_norm(tree: object, specs: Specs, *, mesh: Mesh | None = None) -> Tensor:
    """Return the 2-norm of all leaves as one vector: for clipping.

    Each element of the whole tensors is counted once. A leaf is V along the axes that
    its spec names and I along the others; the result is I along all of them. 16-bit
    leaves add up in float32.
    Shapes: any -> (). Cost: one number for each set of axes that specs name. optax:
    global_norm.
    Raises: as `pvary_params`; ArgumentError for bools and ints. Under `debug`
    MismatchError if a leaf differs along an axis that its spec leaves out.

    >>> def norm():
    ...     shard, bias = torch.full((2,), 3.0), torch.full((1,), 8.0)
    ...     return pmod.global_norm({"w": shard, "b": bias}, {"w": pmod.P("model"), "b": pmod.P()})
    >>> pmod.simulate(norm, model=2)
    [tensor(10.), tensor(10.)]
    """
    mesh, everywhere, found = checked_tree(tree, specs, mesh, "global_norm")
    for x, _, where in found:
        if not (x.is_floating_point() or x.is_complex()):
            dtype = str(x.dtype).removeprefix("torch.")
            given, right = (
                f"{where} is {dtype}, which has no norm",
                f"Pass {where}.float().",
            )
            raise wrong(ArgumentError, "global_norm", everywhere, given, right)
    compare_left_out(found, mesh, "global_norm")
    squares: list[Tensor] = []
    cut_along: list[tuple[str, ...]] = []
    for x, spec, _ in found:
        squares.append(x.to(accumulator(x.dtype, None)).abs().square().sum())
        names = [name for name in mesh.axis_names if name in spec.axes]
        cut_along.append(tuple(names))
    total = torch.zeros(())
    # sorted, so that all ranks add in the same order
    for names, members in sorted(_in_groups(cut_along).items()):
        norm = sum((squares[i] for i in members[1:]), squares[members[0]])
        if names:
            norm = psum(norm, mesh[names])
        total = total.to(norm.device) + norm
    return total.sqrt()


def whole_shapes(
    leaves: Sequence[Held], mesh: Mesh, function: str
) -> list[dict[int, tuple[int, ...]]]:
    """Return for each local tensor the sizes of the dims that its spec cuts.

    They are as the spec says, else as the ranks hold them. One message for each entry
    (an axis, or several as one) that some spec names.
    """
    told: list[dict[int, tuple[int, ...]]] = [{} for _ in leaves]
    asked: dict[str | tuple[str, ...], list[tuple[int, int]]] = {}
    for i, (x, spec, where) in enumerate(leaves):
        for dim, entry in enumerate(spec.entries):
            if entry is None:
                continue
            sizes = dict(spec.sizes).get(dim)
            if sizes is None:
                asked.setdefault(entry, []).append((i, dim))
                continue
            axis = resolve(mesh[entry], function)
            if len(sizes) != axis.size or sizes[axis.index] != x.shape[dim]:
                what = f"sizes are {sizes} and the rank at {axis.index} of {axis.size} holds {x.shape[dim]}"
                right = "Pass the lengths that the ranks hold, or leave sizes out to exchange them."
                shape = tuple(x.shape)
                raise unfit(ShapeError, function, where, what, spec, shape, mesh, right)
            told[i][dim] = sizes
    # the ranks may have walked their trees in unlike orders
    for entry in sorted(asked, key=repr):
        places = asked[entry]
        axis = resolve(mesh[entry], function)
        pairs = [(leaves[i][0], dim - leaves[i][0].dim()) for i, dim in places]
        held = held_lengths(pairs, function, axis)
        for (i, dim), sizes in zip(places, held, strict=True):
            told[i][dim] = sizes
    return told
