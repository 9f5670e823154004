"""`shard_map`: a function of shards as a function of whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pmod._collectives.slices import all_gather, shard, unshard
from pmod._collectives.used import Idle
from pmod._core.arguments import check_tensor, wrong
from pmod._core.tree import unflatten
from pmod._errors import ArgumentError, AxisError, PmodError, phrase
from pmod._mesh.ambient import given_mesh, resolve, under
from pmod._mesh.mesh import Mesh
from pmod._shard.dtensors import as_dtensor
from pmod._shard.kinds import Kinds, all_cut, kinds_here
from pmod._shard.known import NONE, Axes
from pmod._shard.spec import Entry, P, Specs, check_spec, names_in, unfit
from pmod._shard.specs import Held, fits, sizes_of, whole_shapes, with_specs
from pmod._torch import are_transforms_active, no_function_modes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard_map(
    f: Callable[..., object],
    *,
    mesh: Mesh | None = None,
    in_specs: Specs,
    out_specs: Specs,
) -> Callable[..., Any]:
    """Return a function of whole tensors that runs f on each rank's shards.

    Every rank passes the same whole tensors (I). f gets its shards of those, as
    in_specs say, and what it returns are shards of whole tensors, as out_specs say;
    along an axis that a spec leaves out the tensor is whole. Specs are a `P` for all
    arguments, or a tuple with one for each; each may be a `P` for a whole tree. What is
    not a tensor passes as it is.

    Inside, kinds are followed as JAX follows them: where an unsharded argument, or a
    parameter that f refers to, meets varying data, it goes through `pvary`, so that its
    gradient is summed, once. An explicit pvary is right as well. f must learn its
    position with `axis_index`. Other tensors that f captures are treated as varying,
    except the buffers of the module when f is a module or one of its methods. In the
    body of a shard_map another one may cut along the axes that are left.

    Shapes: any length, cut as `split_sizes` says unless a spec has sizes. Outputs may
    have any lengths: the ranks exchange them, one small message for each entry of
    out_specs, and one more where arguments are cut unevenly: by it they find out what
    has a derivative, and compare what is one value; under torch.compile an output is
    cut as an input of its length was, or as its spec's sizes say.
    Cost: in forward the outputs are joined on every rank, in backward the gradients of
    the inputs. DTensors go in by their shards, redistributed where the spec says
    otherwise, and then DTensors come out.
    Raises: ShapeError or AxisError with spec, shape and mesh, if they do not fit;
    AxisError if an output varies along an axis that its spec leaves out. JAX:
    jax.shard_map.

    >>> P, shard_map = pmod.P, pmod.shard_map
    >>> def scaled():
    ...     w = torch.tensor(2.0, requires_grad=True)
    ...     y = shard_map(lambda x, w: x * w, in_specs=(P("data"), P()), out_specs=P("data"))(torch.arange(3.0), w)
    ...     y.sum().backward()
    ...     return y.detach(), w.grad
    >>> pmod.simulate(scaled, data=2)[0]
    (tensor([0., 2., 4.]), tensor(3.))
    """
    if not callable(f):
        given = f"f is a {type(f).__name__}"
        raise ArgumentError(
            phrase("shard_map", given, "Pass a function of the shards.")
        )
    module = _module(f)
    idle = Idle()

    @wraps(f, updated=())
    def mapped(*args: object, **by_name: object) -> object:
        if by_name:
            given = f"{', '.join(by_name)} came by name"
            right = "Pass arguments by position, which is what in_specs goes by; functools.partial binds the others."
            raise ArgumentError(phrase("shard_map", given, right))
        over = given_mesh(mesh, "shard_map")
        call = _Mapped(over, kinds_here(), idle)
        kinds = call.kinds
        # around this one the same mode is on already, and where every axis has one
        # rank there is nothing to follow
        is_followed = kinds.known.everywhere and not call.nested
        follow = kinds if is_followed else nullcontext()
        ambient = under(over) if mesh is not None else nullcontext()
        with ambient, follow:
            if module is not None:
                kinds.known.of_module(module)
            kinds.copies.of_body(f)
            shards = call.enter(args, in_specs)
            if kinds.lengths.axes_by_length:
                all_cut()
            result = f(*shards)
            # the last operation has nothing after it that would look
            kinds.writes.check_shown()
            return call.leave(result, out_specs)

    return mapped


def _module(f: Callable[..., object]) -> nn.Module | None:
    """Return the module that f is, or is a method of."""
    while isinstance(f, partial):
        f = f.func
    owner = f if isinstance(f, nn.Module) else getattr(f, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


# By so much of the sum of all magnitudes may the sums of one value differ between
# unlike devices.
ROUNDING = 1e-3


def _summary(y: Tensor, is_whole: bool) -> Tensor:
    """Return what ranks tell of a result, three numbers.

    They are the sum of the elements of one value, that of their magnitudes, and whether
    there is a derivative.
    """
    z = y.detach()
    if not is_whole:
        # shards may differ: nothing of them is compared
        z = z.reshape(-1)[:0]
    if z.is_complex():
        z = torch.view_as_real(z)
    z = z.double().nan_to_num()
    has_derivative = torch.full_like(z.sum(), y.requires_grad)
    return torch.stack([z.sum(), z.abs().sum(), has_derivative])


class _Mapped:
    """One call of a function that shard_map gave."""

    def __init__(self, mesh: Mesh, around: Kinds | None, idle: Idle) -> None:
        self.mesh = mesh
        self.axis = resolve(mesh, "shard_map")
        self.around = around
        self.nested = False
        self.kinds = Kinds(mesh, idle) if around is None else around
        if around is not None:
            names = set(around.known.mesh.axis_names)
            self.nested = set(mesh.axis_names) <= names
            # another mesh has kinds of its own
            if not self.nested:
                self.kinds = Kinds(mesh, idle)
        # the axes along which the arguments vary already
        self.outer: Axes = NONE
        # of the DTensors that went in
        self.device_mesh: DeviceMesh | None = None
        # of the arguments: an entry, its sizes, and this rank's
        self.cut: list[tuple[Entry, tuple[int, ...], int]] = []

    def enter(self, args: tuple[object, ...], specs: Specs) -> tuple[object, ...]:
        """Return the shards of the arguments."""
        self._check_given(args, specs)
        found = with_specs(args, specs, "shard_map", "in_specs", self.axis)
        for x, spec, where in found:
            self._check(x, spec, where)
            if isinstance(x, Tensor) and self.around is not None and not self.nested:
                self._check_around(x, self.around, where)
        shards: list[object] = []
        for x, spec, where in found:
            if isinstance(x, Tensor):
                shards.append(self._shard(x, spec, where))
            else:
                shards.append(x)
        return unflatten(args, "shard_map", self.axis, shards)

    def _check_given(self, args: tuple[object, ...], specs: Specs) -> None:
        """Raise if in_specs are for the only argument, and not for all arguments."""
        for_first = len(args) == 1 and fits(args[0], specs) and not fits(args, specs)
        if isinstance(specs, dict) or for_first:
            shown = specs.__repr__()
            given = f"in_specs is {shown}, and f is called with {len(args)} argument{'s' * (len(args) != 1)}"
            right = "Pass a tuple with one entry for each argument"
            right += f", in_specs=({shown},)." if len(args) == 1 else "."
            raise wrong(ArgumentError, "shard_map", self.axis, given, right)

    def _check(self, x: object, spec: P, where: str) -> None:
        if isinstance(x, Tensor):
            if not hasattr(x, "to_local"):
                check_tensor(x, "shard_map", self.axis, name=where)
            check_spec(spec, x.shape, self.mesh, "shard_map", where)
        elif spec.axes:
            what = f"the spec cuts a {type(x).__name__}"
            right = "Give what is not a tensor the spec P()."
            raise self._unfit(ArgumentError, where, what, spec, (), right)

    def _unfit(
        self,
        kind: type[PmodError],
        where: str,
        what: str,
        spec: P,
        shape: Sequence[int],
        right: str,
    ) -> PmodError:
        return unfit(kind, "shard_map", where, what, spec, shape, self.mesh, right)

    def _check_around(self, x: Tensor, around: Kinds, where: str) -> None:
        """Raise unless x is one value on the ranks of this mesh, in another's body."""
        places: list[Mapping[str, int]] = []
        for rank in self.mesh.ranks.flat:
            coords = around.known.mesh.coords_of(int(rank))
            if coords is not None:
                places.append(coords)
        apart: list[str] = []
        for name in sorted(around.known.sure(x)):
            if len({at[name] for at in places}) > 1:
                apart.append(name)
        if apart:
            given = f"{where} varies along {apart} of the mesh around, and this mesh joins such ranks"
            right = "Cut it along the axes that are left of the mesh around, pmod.current_mesh()."
            raise wrong(ArgumentError, "shard_map", self.axis, given, right)

    def _shard(self, x: Tensor, spec: P, where: str) -> Tensor:
        cuts: list[tuple[int, Mesh, tuple[int, ...]]] = []
        for dim, entry in enumerate(spec.entries):
            if entry is None:
                continue
            along = self.mesh[entry]
            axis = resolve(along, "shard_map")
            sizes = sizes_of(spec, dim, axis, x.shape, self.mesh, "shard_map", where)
            cuts.append((dim, along, sizes))
            self.cut.append((entry, sizes, sizes[axis.index]))
            self.kinds.lengths.cut(entry, sizes)
        if hasattr(x, "to_local"):
            return self._local(x, spec)
        outer = self.kinds.known.of(x) if self.nested else NONE
        self.outer = self.outer | outer
        self.kinds.known.note(x, outer)
        y = x
        for dim, along, sizes in cuts:
            y = shard(y, along, dim=dim, sizes=sizes)
        if not self.nested:
            self.kinds.copies.of_argument(y)
        return y

    def _local(self, x: Any, spec: P) -> Tensor:
        """Return the shard that a DTensor holds of itself."""
        placements = spec.placements(self.mesh)
        # what is compared here is not a number of the rank's own
        with no_function_modes():
            ranks = torch.from_numpy(self.mesh.ranks.copy())
            same = torch.equal(x.device_mesh.mesh, ranks)
        if not same:
            given = f"a DTensor is on {x.device_mesh}, and the mesh is {self.mesh!r} over other ranks"
            right = "Pass mesh=pmod.Mesh.from_device_mesh(x.device_mesh)."
            raise AxisError(phrase("shard_map", given, right))
        self.device_mesh = x.device_mesh
        if tuple(x.placements) != placements:
            x = x.redistribute(placements=placements)
        y = x.to_local()
        self.kinds.known.note(y, self.kinds.known.everywhere & frozenset(spec.axes))
        self.kinds.copies.of_argument(y)
        return y

    def leave(self, result: object, specs: Specs) -> object:
        """Return the whole tensors of the results."""
        found = with_specs(result, specs, "shard_map", "out_specs", self.axis)
        for y, spec, where in found:
            self._check(y, spec, where)
        # of the tensors among the leaves: their places
        places = [i for i, (y, _, _) in enumerate(found) if isinstance(y, Tensor)]
        tensors: list[Held] = [found[i] for i in places]
        for y, spec, where in tensors:
            self._check_whole(y, spec, where)
        smooth = self._compared(tensors)
        for i, (y, spec, where) in enumerate(tensors):
            if smooth[i]:
                tensors[i] = self.kinds.copies.linked(y), spec, where
        sizes = self._sizes(tensors)
        leaves = [y for y, _, _ in found]
        for i, held, (y, spec, where) in zip(places, sizes, tensors, strict=True):
            leaves[i] = self._whole(y, spec, held, where)
        return unflatten(result, "shard_map", self.axis, leaves)

    def _check_whole(self, y: Tensor, spec: P, where: str) -> None:
        """Raise if a result varies along an axis that its spec leaves out."""
        varies = self.kinds.known.of(y) - frozenset(spec.axes) - self.outer
        own = [name for name in self.mesh.axis_names if name in varies]
        if own:
            what = f"the result varies along {', '.join(map(repr, own))}, which the spec leaves out"
            right = "Return one value along it (pmod.psum, pmod.pmean, pmod.pick; pmod.unshard, not all_gather, to join"
            right += " shards), or name it in out_specs."
            if set(own) <= self.kinds.known.assumed(y):
                what = f"the result {self.kinds.known.why(frozenset(own))}, and the spec leaves it out"
                right = "Pass that tensor as an argument, and ask for the place or the number after what is one value."
            raise self._unfit(AxisError, where, what, spec, tuple(y.shape), right)

    def _uneven(self) -> tuple[str, ...]:
        """Return the axes along which some argument is cut unevenly."""
        uneven: set[str] = set()
        for entry, sizes, _ in self.cut:
            if len(set(sizes)) > 1:
                uneven |= set(names_in(entry))
        own = uneven - self.outer
        return tuple([name for name in self.mesh.axis_names if name in own])

    def _compared(self, tensors: Sequence[Held]) -> list[bool]:
        """Return whether each result may have a derivative on some rank.

        Where shards are uneven, the ranks tell one another. A rank with an empty shard
        may have made no use of what the others differentiate; and a loop over
        x.shape[0], which is not seen, makes each rank's own of one value.
        """
        names = self._uneven()
        if not names or not tensors:
            return [True] * len(tensors)
        if torch.compiler.is_compiling() or are_transforms_active():
            return [True] * len(tensors)
        is_whole = [not set(spec.axes) & set(names) for _, spec, _ in tensors]
        if not (any(is_whole) or torch.is_grad_enabled()):
            return [False] * len(tensors)
        with torch.no_grad():
            mine: list[Tensor] = []
            for (y, _, _), one_value in zip(tensors, is_whole, strict=True):
                mine.append(_summary(y, one_value))
            everywhere = all_gather(torch.stack(mine)[None], self.mesh[names])
        # all ranks read the same numbers, so none of them learns its place
        with no_function_modes():
            totals, sizes, smooth = everywhere.unbind(-1)
            apart = (totals - totals[:1]).abs() > ROUNDING * sizes.amax(0)
            off = apart.any(0).tolist()
            some, columns = smooth.any(0).tolist(), totals.T.tolist()
        for (y, spec, where), differs, sums in zip(tensors, off, columns, strict=True):
            if differs:
                what = f"the ranks along {names} return unlike values (their elements add up to {sums}), and"
                what += " the spec leaves that out"
                right = "The length of an uneven shard, as in a loop over x.shape[0], is each rank's own: make one"
                right += " value of what depends on it (pmod.psum, pmod.pmean), or name the axis in out_specs."
                raise self._unfit(AxisError, where, what, spec, tuple(y.shape), right)
        if self.kinds.copies.asked:
            return [True] * len(tensors)
        return some

    def _sizes(self, tensors: Sequence[Held]) -> list[dict[int, tuple[int, ...]]]:
        if not torch.compiler.is_compiling():
            return whole_shapes(tensors, self.mesh, "shard_map")
        return [self._sizes_in_graph(y, spec, where) for y, spec, where in tensors]

    def _sizes_in_graph(
        self, y: Tensor, spec: P, where: str
    ) -> dict[int, tuple[int, ...]]:
        """Return how a result is cut: as an input of its length was.

        A graph cannot depend on lengths that the other ranks tell.
        """
        told = dict(spec.sizes)
        for dim, entry in enumerate(spec.entries):
            if entry is None or dim in told:
                continue
            key = (entry, int(y.shape[dim]))
            known = [sizes for of, sizes, own in self.cut if (of, own) == key]
            if not known:
                what = f"no argument has length {y.shape[dim]} along {entry!r}, so how dim {dim} is cut is unknown"
                right = f"Under torch.compile pass the lengths that the ranks hold, P(..., sizes={{{dim}: ...}})."
                shape = tuple(y.shape)
                raise self._unfit(ArgumentError, where, what, spec, shape, right)
            told[dim] = known[0]
        return told

    def _whole(
        self, y: Tensor, spec: P, sizes: dict[int, tuple[int, ...]], where: str
    ) -> Tensor:
        if self.device_mesh is not None:
            return as_dtensor(
                y, spec, sizes, self.device_mesh, self.mesh, "shard_map", where
            )
        for dim, entry in enumerate(spec.entries):
            if entry is not None:
                y = unshard(y, self.mesh[entry], dim=dim, sizes=sizes[dim])
        return y
