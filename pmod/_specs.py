"""`P`: how a tensor is held on a mesh, dim by dim; trees of specs; and what needs no more than a spec.

The same tree of `P` beside the parameters serves `enter`, `global_norm`, `to_dtensors` and `shard_map`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import attrs
import torch
from torch import Tensor

from pmod._ambient import given_mesh, resolve, watchers
from pmod._arguments import check_tensor, shares, split_sizes, wrong
from pmod._autodiff import is_mapping
from pmod._collectives import psum, pvary
from pmod._debug import compare_claimed
from pmod._errors import ArgumentError, AxisError, PmodError, ShapeError, endless, explain, near_miss, quoted
from pmod._mesh import Axis, Mesh
from pmod._numbers import as_int, as_ints, as_list
from pmod._parallel import map_tensors
from pmod._pytree import sorted_keys, unflatten
from pmod._ragged import held_lengths
from pmod._wire import accumulator

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

T = TypeVar("T")

Entry: TypeAlias = str | tuple[str, ...] | None
"""What a dim is cut along: nothing, an axis, or several flattened (first name slowest)."""


def _entry(given: Any) -> Entry:
    names = given if isinstance(given, tuple | list) else (given,)
    if given is not None and not (names and all(isinstance(name, str) and name for name in names)):
        right = "An entry is None, an axis name, or a tuple of axis names."
        raise AxisError(explain("P", f"{quoted(given)} is no entry of a spec", right))
    return tuple(names) if isinstance(given, tuple | list) else given


def _lengths_by_dim(sizes: Any) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """What P holds of `sizes`: ints only, because a float that is cut off says another length."""
    try:
        parsed = {as_int(dim): tuple([as_int(length) for length in of]) for dim, of in sizes.items()}
    except (TypeError, AttributeError):  # of another kind, or holding what is not an int
        parsed = {}
    ints = {dim: cast(tuple[int, ...], of) for dim, of in parsed.items() if dim is not None and None not in of}
    whole = isinstance(sizes, Mapping) and len(ints) == len(cast(Mapping[Any, Any], sizes))
    if not whole or min(sum(ints.values(), (0,))) < 0:
        right = "Pass {dim: one length per rank of its axis}, all of them ints of 0 or more."
        raise ShapeError(explain("P", f"sizes is {quoted(sizes)}", right))
    return tuple(sorted(ints.items()))


@attrs.frozen(init=False, repr=False)
class P:
    """How a tensor is held: for each dim the axis that cuts it, a tuple of axes, or None; dims left out are whole.

    Along an axis that no entry names all ranks hold the same. A dim is cut as `split_sizes` says: ceil(length / n)
    each, the last ones shorter or empty; over several axes along one after the other, as DTensor cuts. `sizes` gives
    other lengths, {dim: one per rank of its axis}.
    Raises: AxisError where an axis is named twice; ShapeError where sizes are not ints of a dim that is cut. JAX:
    jax.sharding.PartitionSpec, where dims must divide.

    >>> pmod.P("data", None, ("node", "model"))
    P('data', None, ('node', 'model'))
    >>> spec = pmod.P(None, "model", sizes={1: (3, 5)})
    >>> spec.axes, spec.entries, spec.sizes
    (('model',), (None, 'model'), ((1, (3, 5)),))
    """

    entries: tuple[Entry, ...]
    sizes: tuple[tuple[int, tuple[int, ...]], ...]  # (dim, lengths), by dim

    def __init__(self, *entries: str | Sequence[str] | None, sizes: Mapping[int, Sequence[int]] | None = None) -> None:
        parsed = tuple([_entry(entry) for entry in entries])
        lengths = () if sizes is None else _lengths_by_dim(sizes)
        object.__setattr__(self, "entries", parsed)  # not attrs' own init, which torch.compile cannot trace
        object.__setattr__(self, "sizes", lengths)
        seen: set[str] = set()
        for name in self.axes:
            if name in seen:
                given = f"{self} names the axis {name!r} twice"
                raise AxisError(explain("P", given, "An axis cuts one dim, once."))
            seen.add(name)
        for dim, _ in lengths:
            if not 0 <= dim < len(parsed) or parsed[dim] is None:
                given = f"sizes names dim {dim}, which {self} does not cut"
                raise ShapeError(explain("P", given, "Give sizes of the dims that an entry cuts, counted from 0."))

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes named, in the order of the dims."""
        named: list[str] = []
        for entry in self.entries:
            named += () if entry is None else (entry,) if isinstance(entry, str) else entry
        return tuple(named)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, dim: int) -> Entry:
        return self.entries[dim]

    def __repr__(self) -> str:
        inside = [repr(entry) for entry in self.entries]
        if self.sizes:
            inside.append(f"sizes={dict(self.sizes)}")
        return f"P({', '.join(inside)})"

    def placements(self, mesh: Mesh) -> tuple[Placement, ...]:
        """What DTensor calls the spec on this mesh: Shard(dim) or Replicate() for each of its axes.

        Raises: ShapeError where the spec has sizes of its own, or flattens axes in another order than the mesh has:
        DTensor knows neither.

        >>> pmod.P("model").placements(pmod.make_mesh(data=1, model=1))
        (Replicate(), Shard(dim=0))
        """
        from torch.distributed.tensor import Replicate, Shard

        mesh = given_mesh(mesh, "P.placements")
        check_spec(self, [0] * len(self), mesh, "P.placements", "the spec")
        cut: dict[str, int] = {}
        for dim, entry in enumerate(self.entries):
            names = () if entry is None else (entry,) if isinstance(entry, str) else entry
            cut |= dict.fromkeys(names, dim)
            if list(names) != sorted(names, key=mesh.axis_names.index):
                given = f"{self} flattens axes in another order than the mesh, which has {mesh.axis_names}"
                raise ShapeError(explain("P.placements", given, "Name them in the order of the mesh."))
        if self.sizes:
            right = "Leave sizes out: DTensor cuts as split_sizes says."
            raise ShapeError(explain("P.placements", f"{self} has sizes of its own", right))
        return tuple(Shard(cut[name]) if name in cut else Replicate() for name in mesh.axis_names)

    @staticmethod
    def from_placements(placements: Sequence[Placement], mesh: Mesh) -> P:
        """The spec that DTensor calls so on this mesh, one placement for each of its axes.

        Raises: ShapeError for Partial, which is no way to hold a tensor but a sum to be taken.

        >>> from torch.distributed.tensor import Replicate, Shard
        >>> pmod.P.from_placements((Replicate(), Shard(1)), pmod.make_mesh(data=1, model=1))
        P(None, 'model')
        """
        from torch.distributed.tensor import Replicate, Shard

        mesh, listed = given_mesh(mesh, "P.from_placements"), as_list(placements)
        if listed is None or len(listed) != len(mesh.axis_names):
            given = f"placements are {quoted(placements)}"
            right = f"Pass one for each axis of the mesh: {mesh.axis_names}."
            raise ShapeError(explain("P.from_placements", given, right))
        cut: dict[int, list[str]] = {}
        for name, placement in zip(mesh.axis_names, listed, strict=True):
            if type(placement) is Shard:
                cut.setdefault(placement.dim, []).append(name)
            elif type(placement) is not Replicate:
                given = f"{quoted(placement)} along {name!r} is no spec"
                right = "Redistribute to Shard and Replicate first."
                raise ShapeError(explain("P.from_placements", given, right))
        entries = [cut.get(dim, [None]) for dim in range(max(cut, default=-1) + 1)]
        return P(*[entry[0] if len(entry) == 1 else tuple(name for name in entry if name) for entry in entries])


WHOLE = P()

Specs: TypeAlias = Any
"""A `P`, or a dict, list or tuple of specs: a prefix of the tree that it is for. None stands for P()."""

# --- a spec beside its tensor ---------------------------------------------------------------------


def unfit(
    kind: type[PmodError], function: str, where: str, what: str, spec: P, shape: Sequence[int], mesh: Mesh, right: str
) -> PmodError:
    """The error of a spec that does not fit: spec, shape and mesh below each other."""
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    lengths = ", ".join([str(length) for length in shape])
    given = f"{where}: {what}\n  spec   {spec.__repr__()}\n  shape  ({lengths})\n  mesh   {sizes}"
    return kind(explain(function, given, right, coords=mesh._shown_coords()))


def check_spec(spec: P, shape: Sequence[int], mesh: Mesh, function: str, where: str) -> None:
    """The spec's axes are the mesh's, and the tensor has its dims."""
    shown = tuple(int(length) for length in shape)
    for name in spec.axes:
        if name not in mesh.axis_names:
            what = f"the mesh has no axis {name!r}{near_miss(name, mesh.axis_names)}"
            right = f"Name axes of the mesh: {', '.join(mesh.axis_names)}."
            raise unfit(AxisError, function, where, what, spec, shown, mesh, right)
    if len(spec) > len(shown):
        what = f"the spec has {len(spec)} entries and the tensor {len(shown)} dims"
        raise unfit(ShapeError, function, where, what, spec, shown, mesh, "Give an entry per dim, or fewer.")


def sizes_of(
    spec: P, dim: int, axis: Axis, shape: Sequence[int], mesh: Mesh, function: str, where: str
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


def with_specs(tree: Any, specs: Specs, function: str, where: str, axis: Axis) -> list[tuple[Any, P, str]]:
    """The leaves of a tree in the order in which trees are walked, each with its spec and its path."""
    try:
        return _with_specs(tree, specs, function, where, axis)
    except RecursionError:
        raise endless(function) from None


def _with_specs(tree: Any, specs: Specs, function: str, where: str, axis: Axis) -> list[tuple[Any, P, str]]:
    if tree is None:
        return []
    branches: list[tuple[Any, Specs, str]] = []
    one = WHOLE if specs is None else specs if isinstance(specs, P) else None  # for all that is below
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
    return [leaf for branch in branches for leaf in _with_specs(branch[0], branch[1], function, branch[2], axis)]


def _below(specs: Any, key: Any, one: P | None) -> Specs:
    return specs[key] if one is None else one


def fits(tree: Any, specs: Any) -> bool:
    """Whether specs are one for each branch of a tree: of the same keys, or as many."""
    if is_mapping(tree):
        return is_mapping(specs) and set(specs.keys()) == set(tree.keys())
    return isinstance(tree, list | tuple) and isinstance(specs, list | tuple) and len(specs) == len(tree)


def _outline(tree: Any) -> str:
    if is_mapping(tree):
        return f"a {type(tree).__name__} with the keys {sorted(map(str, tree.keys()))}"
    if isinstance(tree, list | tuple):
        return f"a {type(tree).__name__} of {len(tree)}"
    return f"a {type(tree).__name__}"


# --- what needs no more than a spec ---------------------------------------------------------------


def _checked(
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


def _compare_left_out(found: Sequence[tuple[Tensor, P, str]], mesh: Mesh, function: str) -> None:
    """Under debug: along the axes that its spec leaves out each leaf is one value."""
    if torch.compiler.is_compiling() or not watchers():
        return
    left_out = [tuple(name for name in mesh.axis_names if name not in spec.axes) for _, spec, _ in found]
    for names, members in sorted(_in_groups(left_out).items()):
        if names:
            leaves = [(found[i][0], found[i][2]) for i in members]
            compare_claimed(leaves, mesh.bind(names[0] if len(names) == 1 else names, function), function)


def enter(tree: T, specs: Specs, *, mesh: Mesh | None = None, reduce_dtype: torch.dtype | None = None) -> T:
    """`pvary` of every leaf over the axes that its spec leaves out: parameters on their way into varying computation.

    I -> V along those axes. Transpose: psum, of all leaves that leave out the same axes together: one message per dtype
    and device. Shapes: x (...) -> (...). Cost: nothing forward.
    mesh: the ambient one by default. Raises: ArgumentError where specs are no prefix of the tree; AxisError where a
    spec names an axis that the mesh has not.

    >>> def gradient():
    ...     w = torch.ones(2, requires_grad=True)  # held by all
    ...     pmod.psum(pmod.enter({"w": w}, pmod.P())["w"].sum() * (1 + pmod.axis_index("data")), "data").backward()
    ...     return w.grad
    >>> pmod.simulate(gradient, data=2)
    [tensor([3., 3.]), tensor([3., 3.])]
    """
    mesh, everywhere, found = _checked(tree, specs, mesh, "enter")
    entered: list[Any] = [x for x, _, _ in found]
    left_out = [tuple(name for name in mesh.axis_names if name not in spec.axes) for _, spec, _ in found]
    for names, members in _in_groups(left_out).items():
        if names:
            varying = pvary([entered[i] for i in members], mesh[names], reduce_dtype=reduce_dtype)
            for i, y in zip(members, varying, strict=True):
                entered[i] = y
    return unflatten(tree, "enter", everywhere, entered)


def global_norm(tree: Any, specs: Specs, *, mesh: Mesh | None = None) -> Tensor:
    """The 2-norm of all leaves as one vector, each element of the whole tensors counted once: for clipping.

    A leaf is V along the axes that its spec names and I along the others; the result is I along all of them. 16-bit
    leaves add up in float32.
    Shapes: any -> (). Cost: one number for each set of axes that specs name. optax: global_norm.
    Raises: as `enter`; ArgumentError for bools and ints. Under `debug` MismatchError where a leaf differs along an axis
    that its spec leaves out.

    >>> def norm():
    ...     shard, bias = torch.full((2,), 3.0), torch.full((1,), 8.0)
    ...     return pmod.global_norm({"w": shard, "b": bias}, {"w": pmod.P("model"), "b": pmod.P()})
    >>> pmod.simulate(norm, model=2)
    [tensor(10.), tensor(10.)]
    """
    mesh, everywhere, found = _checked(tree, specs, mesh, "global_norm")
    for x, _, where in found:
        if not (x.is_floating_point() or x.is_complex()):
            given = f"{where} is {str(x.dtype).removeprefix('torch.')}, which has no norm"
            raise wrong(ArgumentError, "global_norm", everywhere, given, f"Pass {where}.float().")
    _compare_left_out(found, mesh, "global_norm")
    squares = [x.to(accumulator(x.dtype, None)).abs().square().sum() for x, _, _ in found]
    cut_along = [tuple(name for name in mesh.axis_names if name in spec.axes) for _, spec, _ in found]
    total = torch.zeros(())
    for names, members in sorted(_in_groups(cut_along).items()):
        here = sum((squares[i] for i in members[1:]), squares[members[0]])
        total = total.to(here.device) + (psum(here, mesh[names]) if names else here)
    return total.sqrt()


# --- DTensors -------------------------------------------------------------------------------------


def whole_shapes(
    leaves: Sequence[tuple[Tensor, P, str]], mesh: Mesh, function: str
) -> list[dict[int, tuple[int, ...]]]:
    """For each local tensor the sizes of the dims that its spec cuts: as the spec says, else as the ranks hold them.

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
                raise unfit(ShapeError, function, where, what, spec, tuple(x.shape), mesh, right)
            told[i][dim] = sizes
    for entry in sorted(asked, key=repr):  # the ranks may have walked their trees in another order
        places = asked[entry]
        axis = resolve(mesh[entry], function)
        pairs = [(leaves[i][0], dim - leaves[i][0].dim()) for i, dim in places]
        for (i, dim), sizes in zip(places, held_lengths(pairs, function, axis), strict=True):
            told[i][dim] = sizes
    return told


def as_dtensor(x: Tensor, spec: P, sizes: Mapping[int, tuple[int, ...]], device_mesh: DeviceMesh, mesh: Mesh,
               function: str, where: str) -> DTensor:  # fmt: skip
    """A local tensor as the DTensor that it is a shard of."""
    from torch.distributed.tensor import DTensor

    shape = [sum(sizes[dim]) if dim in sizes else int(length) for dim, length in enumerate(x.shape)]
    for dim, held in sizes.items():
        entry = spec.entries[dim]
        parts = tuple([mesh.shape[name] for name in ((entry,) if isinstance(entry, str) else entry or ())])
        cut = split_sizes(shape[dim], parts)
        if held != cut:
            what = f"dim {dim} is cut in {held}, and DTensor cuts {shape[dim]} in {cut}"
            right = f"Use shards of the lengths of split_sizes({shape[dim]}, {parts})."
            raise unfit(ShapeError, function, where, what, spec, tuple(x.shape), mesh, right)
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return DTensor.from_local(x, device_mesh, spec.placements(mesh), run_check=False, shape=torch.Size(shape),
                              stride=tuple(strides))  # fmt: skip


def to_dtensors(tree: Any, specs: Specs, *, mesh: Mesh | None = None) -> Any:
    """Local shards as DTensors, which share their storage: for torch's distributed checkpoints (DCP), and back.

    What DCP loads into them is in the tensors that went in; `from_dtensors` gives local tensors back. Nothing is
    differentiated.
    Cost: the lengths of the shards, one small message for each axis that cuts something.
    Raises: ShapeError where shards are not as long as `split_sizes` says, which DTensor cannot hold. Under `debug`
    MismatchError where a leaf differs along an axis that its spec leaves out: of such a leaf a checkpoint holds the
    value of any rank.

        state = pmod.to_dtensors(dict(model.named_parameters()), specs)
        torch.distributed.checkpoint.save(state, checkpoint_id="step_100")

    >>> pmod.to_dtensors(torch.ones(2), pmod.P("model"), mesh=mesh).placements
    (Replicate(), Shard(dim=0))
    """
    mesh, everywhere, found = _checked(tree, specs, mesh, "to_dtensors")
    _compare_left_out(found, mesh, "to_dtensors")
    device_mesh = mesh.device_mesh  # raises where there is none, before anything is sent
    sizes = whole_shapes(found, mesh, "to_dtensors")
    made = [
        as_dtensor(x.detach(), spec, held, device_mesh, mesh, "to_dtensors", where)
        for (x, spec, where), held in zip(found, sizes, strict=True)
    ]
    return unflatten(tree, "to_dtensors", everywhere, made)


def from_dtensors(tree: Any) -> Any:
    """The local shards of the DTensors in a tree, which share their storage; all else as it is. Nothing is sent.

    >>> pmod.from_dtensors({"w": pmod.to_dtensors(torch.ones(2), pmod.P("model"), mesh=mesh)})
    {'w': tensor([1., 1.])}
    """
    from torch.distributed.tensor import DTensor

    return map_tensors(lambda x: x.to_local() if isinstance(x, DTensor) else x, tree)


# --- reading --------------------------------------------------------------------------------------


def local_slice(shape: Sequence[int], spec: P, *, mesh: Mesh | None = None) -> tuple[slice, ...]:
    """Where this rank's shard lies in the whole: an index for a numpy memmap, an h5py or a zarr array.

    Reading `array[pmod.local_slice(array.shape, spec)]` on every rank gives what `shard` of the whole would, and no
    rank reads more than its part. Nothing is sent.
    Raises: ShapeError where the spec has more entries than the shape; AxisError where it names an axis that the mesh
    has not.

    >>> pmod.simulate(lambda: pmod.local_slice((5, 4), pmod.P("data")), data=2)
    [(slice(0, 3, None), slice(0, 4, None)), (slice(3, 5, None), slice(0, 4, None))]
    """
    mesh = given_mesh(mesh, "local_slice")
    if not isinstance(spec, P):  # pyright: ignore[reportUnnecessaryIsInstance]
        given = f"spec is {quoted(spec)}, a {type(spec).__name__}"
        raise ArgumentError(explain("local_slice", given, "Pass a pmod.P.", coords=mesh._shown_coords()))
    lengths = as_ints(shape)
    if lengths is None or min(lengths, default=0) < 0:
        right = "Pass a length of 0 or more per dim."
        raise ShapeError(explain("local_slice", f"shape is {quoted(shape)}", right))
    shape = lengths
    check_spec(spec, shape, mesh, "local_slice", "shape")
    slices = [slice(0, length) for length in shape]
    for dim, entry in enumerate(spec.entries):
        if entry is not None:
            axis = resolve(mesh[entry], "local_slice")
            sizes = sizes_of(spec, dim, axis, shape, mesh, "local_slice", "shape")
            index = mesh.axis_index(entry)  # who asks where its slice lies goes its own way in a shard_map
            start = sum(sizes[:index])
            slices[dim] = slice(start, start + sizes[index])
    return tuple(slices)
