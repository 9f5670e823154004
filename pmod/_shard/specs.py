"""`P`: how a tensor is held on a mesh, dim by dim; trees of specs; and what needs no
more than a spec.

The same tree of `P` beside the parameters serves `pvary_params`, `global_norm`,
`to_dtensors` and `shard_map`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from pmod._collectives.exchange import held_lengths
from pmod._collectives.values import psum, pvary
from pmod._core.arguments import check_tensor, shares, wrong
from pmod._core.leaves import is_mapping
from pmod._core.tree import sorted_keys, unflatten
from pmod._core.watch import watchers
from pmod._debug.debug import compare_claimed
from pmod._errors import ArgumentError, ShapeError, endless, phrase, quoted
from pmod._mesh.ambient import given_mesh, resolve
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import Mesh
from pmod._numbers import as_ints
from pmod._shard.spec import WHOLE, P, Specs, check_spec, unfit
from pmod._wire.sums import accumulator

T = TypeVar("T")


def sizes_of(
    spec: P,
    dim: int,
    axis: Axis,
    shape: Sequence[int],
    mesh: Mesh,
    function: str,
    where: str,
) -> tuple[int, ...]:
    """How a spec cuts a dim of a whole tensor."""
    told, length = dict(spec.sizes).get(dim), operator.index(shape[dim])
    if told is None:
        return shares(length, axis)
    if len(told) != axis.size or sum(told) != length or min(told) < 0:
        what = f"sizes {told} do not cut dim {dim}, of length {length}, for {axis.size} ranks"
        right = f"Pass {axis.size} sizes that add up to {length}."
        raise unfit(ShapeError, function, where, what, spec, tuple(shape), mesh, right)
    return told


def with_specs(
    tree: Any, specs: Specs, function: str, where: str, axis: Axis
) -> list[tuple[Any, P, str]]:
    """The leaves of a tree in the order in which trees are walked, each with its spec
    and its path.
    """
    try:
        return _with_specs(tree, specs, function, where, axis)
    except RecursionError:
        raise endless(function) from None


def _with_specs(
    tree: Any, specs: Specs, function: str, where: str, axis: Axis
) -> list[tuple[Any, P, str]]:
    if tree is None:
        return []
    branches: list[tuple[Any, Specs, str]] = []
    one = (
        WHOLE if specs is None else specs if isinstance(specs, P) else None
    )  # for all that is below
    if is_mapping(tree) and (one is not None or fits(tree, specs)):
        for key in sorted_keys(tree, function, axis):
            branches.append((tree[key], _below(specs, key, one), f"{where}[{key!r}]"))
    elif isinstance(tree, list | tuple) and (one is not None or fits(tree, specs)):
        for i, branch in enumerate(cast(Sequence[Any], tree)):
            branches.append((branch, _below(specs, i, one), f"{where}[{i}]"))
    elif one is not None:
        return [(tree, one, where)]
    else:
        given = f"{where} is {_outline(tree)} and its specs are {_outline(specs)}"
        right = "Specs are a P for all that is below it, or have the structure of what they are for."
        raise wrong(ArgumentError, function, axis, given, right)
    return [
        leaf
        for branch in branches
        for leaf in _with_specs(branch[0], branch[1], function, branch[2], axis)
    ]


def _below(specs: Any, key: Any, one: P | None) -> Specs:
    return specs[key] if one is None else one


def fits(tree: Any, specs: Any) -> bool:
    """Whether specs are one for each branch of a tree: of the same keys, or as many."""
    if is_mapping(tree):
        return is_mapping(specs) and set(specs.keys()) == set(tree.keys())
    return (
        isinstance(tree, list | tuple)
        and isinstance(specs, list | tuple)
        and len(specs) == len(tree)
    )


def _outline(tree: Any) -> str:
    if is_mapping(tree):
        return f"a {type(tree).__name__} with the keys {sorted(map(str, tree.keys()))}"
    if isinstance(tree, list | tuple):
        return f"a {type(tree).__name__} of {len(tree)}"
    return f"a {type(tree).__name__}"


def checked_tree(
    tree: Any, specs: Specs, mesh: Mesh | None, function: str
) -> tuple[Mesh, Axis, list[tuple[Tensor, P, str]]]:
    """The mesh, all its axes as one, and the leaves with their specs and paths."""
    mesh = given_mesh(mesh, function)
    everywhere = resolve(mesh, function)
    found = with_specs(tree, specs, function, "tree", everywhere)
    for x, spec, where in found:
        check_tensor(x, function, everywhere, name=where)
        check_spec(spec, x.shape, mesh, function, where)
    return mesh, everywhere, found


def _in_groups(keys: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], list[int]]:
    """Which places hold the same key, the keys in the order in which they come first."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return groups


def compare_left_out(
    found: Sequence[tuple[Tensor, P, str]], mesh: Mesh, function: str
) -> None:
    """Under debug: along the axes that its spec leaves out each leaf is one value."""
    if torch.compiler.is_compiling() or not watchers():
        return
    left_out = [
        tuple(name for name in mesh.axis_names if name not in spec.axes)
        for _, spec, _ in found
    ]
    for names, members in sorted(_in_groups(left_out).items()):
        if names:
            leaves = [(found[i][0], found[i][2]) for i in members]
            compare_claimed(
                leaves,
                mesh.bind(names[0] if len(names) == 1 else names, function),
                function,
            )


def pvary_params(
    tree: T,
    specs: Specs,
    *,
    mesh: Mesh | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> T:
    """`pvary` of every leaf over the axes that its spec leaves out: parameters on their
    way into varying computation.

    I -> V along those axes. Transpose: psum, of all leaves that leave out the same axes
    together: one message per dtype and device. Shapes: x (...) -> (...). Cost: nothing
    forward.
    mesh: the ambient one by default. Raises: ArgumentError where specs are no prefix of
    the tree; AxisError where a spec names an axis that the mesh has not.

    >>> def gradient():
    ...     w = torch.ones(2, requires_grad=True)  # held by all
    ...     p = pmod.pvary_params({"w": w}, pmod.P())
    ...     pmod.psum(p["w"].sum() * (1 + pmod.axis_index("data")), "data").backward()
    ...     return w.grad
    >>> pmod.simulate(gradient, data=2)
    [tensor([3., 3.]), tensor([3., 3.])]
    """
    mesh, everywhere, found = checked_tree(tree, specs, mesh, "pvary_params")
    entered: list[Any] = [x for x, _, _ in found]
    left_out = [
        tuple(name for name in mesh.axis_names if name not in spec.axes)
        for _, spec, _ in found
    ]
    for names, members in _in_groups(left_out).items():
        if names:
            varying = pvary(
                [entered[i] for i in members], mesh[names], reduce_dtype=reduce_dtype
            )
            for i, y in zip(members, varying, strict=True):
                entered[i] = y
    return unflatten(tree, "pvary_params", everywhere, entered)


def global_norm(tree: Any, specs: Specs, *, mesh: Mesh | None = None) -> Tensor:
    """The 2-norm of all leaves as one vector, each element of the whole tensors counted
    once: for clipping.

    A leaf is V along the axes that its spec names and I along the others; the result is
    I along all of them. 16-bit leaves add up in float32.
    Shapes: any -> (). Cost: one number for each set of axes that specs name. optax:
    global_norm.
    Raises: as `pvary_params`; ArgumentError for bools and ints. Under `debug`
    MismatchError where a leaf differs along an axis that its spec leaves out.

    >>> def norm():
    ...     shard, bias = torch.full((2,), 3.0), torch.full((1,), 8.0)
    ...     return pmod.global_norm({"w": shard, "b": bias}, {"w": pmod.P("model"), "b": pmod.P()})
    >>> pmod.simulate(norm, model=2)
    [tensor(10.), tensor(10.)]
    """
    mesh, everywhere, found = checked_tree(tree, specs, mesh, "global_norm")
    for x, _, where in found:
        if not (x.is_floating_point() or x.is_complex()):
            given = (
                f"{where} is {str(x.dtype).removeprefix('torch.')}, which has no norm"
            )
            raise wrong(
                ArgumentError,
                "global_norm",
                everywhere,
                given,
                f"Pass {where}.float().",
            )
    compare_left_out(found, mesh, "global_norm")
    squares = [
        x.to(accumulator(x.dtype, None)).abs().square().sum() for x, _, _ in found
    ]
    cut_along = [
        tuple(name for name in mesh.axis_names if name in spec.axes)
        for _, spec, _ in found
    ]
    total = torch.zeros(())
    for names, members in sorted(_in_groups(cut_along).items()):
        here = sum((squares[i] for i in members[1:]), squares[members[0]])
        total = total.to(here.device) + (psum(here, mesh[names]) if names else here)
    return total.sqrt()


def whole_shapes(
    leaves: Sequence[tuple[Tensor, P, str]], mesh: Mesh, function: str
) -> list[dict[int, tuple[int, ...]]]:
    """For each local tensor the sizes of the dims that its spec cuts: as the spec says,
    else as the ranks hold them.

    One message for each entry (an axis, or several as one) that some spec names.
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
                raise unfit(
                    ShapeError, function, where, what, spec, tuple(x.shape), mesh, right
                )
            told[i][dim] = sizes
    for entry in sorted(
        asked, key=repr
    ):  # the ranks may have walked their trees in another order
        places = asked[entry]
        axis = resolve(mesh[entry], function)
        pairs = [(leaves[i][0], dim - leaves[i][0].dim()) for i, dim in places]
        for (i, dim), sizes in zip(
            places, held_lengths(pairs, function, axis), strict=True
        ):
            told[i][dim] = sizes
    return told


def local_slice(
    shape: Sequence[int], spec: P, *, mesh: Mesh | None = None
) -> tuple[slice, ...]:
    """Where this rank's shard lies in the whole: an index for a numpy memmap, an h5py
    or a zarr array.

    Reading `array[pmod.local_slice(array.shape, spec)]` on every rank gives what
    `shard` of the whole would, and no rank reads more than its part. Nothing is sent.
    Raises: ShapeError where the spec has more entries than the shape; AxisError where
    it names an axis that the mesh has not.

    >>> pmod.simulate(lambda: pmod.local_slice((5, 4), pmod.P("data")), data=2)
    [(slice(0, 3, None), slice(0, 4, None)), (slice(3, 5, None), slice(0, 4, None))]
    """
    mesh = given_mesh(mesh, "local_slice")
    if not isinstance(spec, P):  # pyright: ignore[reportUnnecessaryIsInstance]
        given = f"spec is {quoted(spec)}, a {type(spec).__name__}"
        raise ArgumentError(
            phrase("local_slice", given, "Pass a pmod.P.", coords=mesh._shown_coords())
        )
    lengths = as_ints(shape)
    if lengths is None or min(lengths, default=0) < 0:
        right = "Pass a length of 0 or more per dim."
        raise ShapeError(phrase("local_slice", f"shape is {quoted(shape)}", right))
    shape = lengths
    check_spec(spec, shape, mesh, "local_slice", "shape")
    slices = [slice(0, length) for length in shape]
    for dim, entry in enumerate(spec.entries):
        if entry is not None:
            axis = resolve(mesh[entry], "local_slice")
            sizes = sizes_of(spec, dim, axis, shape, mesh, "local_slice", "shape")
            index = mesh.axis_index(
                entry
            )  # who asks where its slice lies goes its own way in a shard_map
            start = sum(sizes[:index])
            slices[dim] = slice(start, start + sizes[index])
    return tuple(slices)
