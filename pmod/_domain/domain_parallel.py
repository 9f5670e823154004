"""`domain_parallel`: a model of whole fields as a function of blocks; `cut_of` a result."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any, overload

import torch
from torch import Tensor, nn

from pmod._collectives.slices import all_gather
from pmod._collectives.used import Idle, linked, pvary_used
from pmod._collectives.values import differentiated, pvary
from pmod._core.arguments import check_tensor, shares, wrong
from pmod._core.leaves import map_tensors, tensors_in
from pmod._domain import known
from pmod._domain.blocks import Blocks, label_of
from pmod._domain.checkpoints import follow_checkpoints
from pmod._domain.layout import Axes, Cut, Layout, Part, axes_of
from pmod._domain.mode import Domain, domain_here
from pmod._domain.refusals import FUNCTION
from pmod._errors import ArgumentError, PmodError, ShapeError, phrase, quoted
from pmod._mesh.ambient import current_mesh, resolve
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import Mesh
from pmod._shard.captured import captured_modules
from pmod._shard.spec import Entry, P, Specs, check_spec, names_in
from pmod._shard.specs import with_specs
from pmod._torch import (
    are_transforms_active,
    forward_hooks,
    parameters_of,
    uncompiled,
    untraced,
    version_of,
)
from pmod._train.share_parameters import Reduces

Sizes = Mapping[int, Sequence[int]]


@overload
def domain_parallel(
    model: nn.Module, in_specs: Specs, *, sizes: Sizes | None = None
) -> Blockwise: ...


@overload
def domain_parallel(
    model: Callable[..., Any], in_specs: Specs, *, sizes: Sizes | None = None
) -> Callable[..., Any]: ...


def domain_parallel(
    model: Callable[..., Any], in_specs: Specs, *, sizes: Sizes | None = None
) -> Callable[..., Any]:
    """Return a model of whole fields as one of this rank's blocks, unmodified.

    model: a module or a function. It runs as it is written, and sees the shapes of the
    whole: each function of torch that meets a cut dim gives this rank's block of what
    it gives on the whole, to any order of derivative; what has no exact form raises,
    and says which operation, on which line, and what to do. Nothing is silently local.
    in_specs: a `P` for all tensors that are arguments, a tuple with one for each
    argument, or a dict by the names of arguments. Tensors that are not named are whole.
    What another such call returned, and a DTensor, need no spec: their cut is known.
    sizes: {dim: the lengths of all ranks}; without them the ranks exchange them, one
    small message for each dim that is cut.

    V -> V along the axes of the specs; what no dim is cut over is I, one value.
    Shapes: x (..., k, ...) blocks of any lengths, empty ones included -> blocks of the
    result, cut as `cut_of` says.
    Cost: a convolution or pool sends the rows that windows of other ranks reach; a norm
    or reduction over a cut dim the sums; attention gathers keys and values; what is
    pointwise nothing. Parameters count as one value: in backward their gradients are
    summed over the axes, once for all calls between two changes of the parameters.
    Dropout draws by position: blocks differ, and another cut draws the same.
    Raises: ShapeError or AxisError for specs and sizes that do not fit; PmodError for
    an operation without an exact form, a tensor that this call was not given, and under
    torch.compile, which then runs it eagerly.

    A module returns a module, whose `module` is the one that was given.

    >>> def step():
    ...     conv = torch.nn.Conv1d(1, 1, 3, padding=1, bias=False)
    ...     torch.nn.init.ones_(conv.weight)
    ...     net = pmod.domain_parallel(conv, pmod.P(None, None, "x"))
    ...     y = net(torch.ones(1, 1, 2))  # of a whole (1, 1, 4)
    ...     return y.detach(), pmod.cut_of(y)
    >>> pmod.simulate(step, x=2)[0]
    (tensor([[[2., 3.]]]), P(None, None, 'x', sizes={2: (2, 2)}))
    """
    if not callable(model):
        given = f"model is a {type(model).__name__}"
        right = "Pass a module or a function of whole fields."
        raise ArgumentError(phrase(FUNCTION, given, right))
    calls = _Calls(model, in_specs, sizes)
    if isinstance(model, nn.Module):
        return Blockwise(model, calls)

    @wraps(model, updated=())
    def blockwise(*args: Any, **kwargs: Any) -> Any:
        return calls.run(args, kwargs)

    return blockwise


class Blockwise(nn.Module):
    """What `domain_parallel` makes of a module: `module` is the one that was given."""

    def __init__(self, module: nn.Module, calls: _Calls) -> None:
        super().__init__()
        self.module = module
        self._calls = calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module on this rank's blocks."""
        return self._calls.run(args, kwargs)


def cut_of(y: Tensor) -> P:
    """Return how a result of `domain_parallel` is cut, with the lengths of all ranks.

    For what follows outside: a loss (best as a function of domain_parallel, too),
    `unshard`, `to_dtensors`. The next call of domain_parallel knows it by itself.
    Shapes: y (...) -> a spec with an entry for each dim that is cut. Nothing is sent.
    Raises: ArgumentError for a tensor that is not a result or an argument of
    domain_parallel, such as what was computed from one outside.

    >>> def halves():
    ...     y = pmod.domain_parallel(torch.relu, pmod.P("x"))(torch.ones(2 - pmod.axis_index("x")))
    ...     return pmod.cut_of(y)
    >>> pmod.simulate(halves, x=2)[1]
    P('x', sizes={0: (2, 1)})
    """
    of = known.noted(y) if isinstance(y, Tensor) else None  # pyright: ignore[reportUnnecessaryIsInstance]
    if of is None:
        given = f"y is a {type(y).__name__} that no domain_parallel took or returned"
        right = "Pass its result itself: compute what follows inside, or say its cut by hand."
        raise ArgumentError(phrase("cut_of", given, right))
    entries: list[Entry] = []
    sizes: dict[int, tuple[int, ...]] = {}
    for d, cut in enumerate(of.layout):
        if isinstance(cut, Part):
            entries.append(cut.axes[0] if len(cut.axes) == 1 else cut.axes)
            sizes[d] = cut.sizes
        else:
            entries.append(None)
    return P(*entries, sizes=sizes)


# --- one function, many calls ---------------------------------------------------------


class _Calls:
    """A function of whole fields, and what its calls share."""

    def __init__(
        self, f: Callable[..., Any], specs: Specs, sizes: Sizes | None
    ) -> None:
        self._f = f
        self._specs = specs
        self._sizes = _parsed(sizes)
        self._idle = Idle()
        self._kept = _Copies()

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            given = "torch.compile does not ask a function mode for shapes"
            right = "Without fullgraph=True this part runs eagerly."
            raise PmodError(phrase(FUNCTION, given, right))
        # what the compiler has left to Python it would look into, frame by frame
        return untraced(self._run)(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if domain_here() is not None:
            # the blocks are known: the model is part of the program around it
            return self._f(*args, **kwargs)
        follow_checkpoints()
        mesh = current_mesh()
        axis = resolve(mesh, FUNCTION)
        local = partial(_local, mesh)
        args, kwargs = map_tensors(local, args), map_tensors(local, kwargs)
        found = self._with_specs(args, kwargs, axis)
        for x, spec, where in found:
            check_tensor(x, FUNCTION, axis, name=where)
            check_spec(spec, x.shape, mesh, FUNCTION, where)
        axes = _axes_cut(found, mesh)
        if not axes and not any([known.noted(x) for x, _, _ in found]):
            given = "no argument is cut: in_specs cut none, and no domain_parallel returned one"
            right = "Say which dims are cut, P(None, None, 'lat'); what was computed outside is not known."
            raise ArgumentError(phrase(FUNCTION, given, right))
        blocks = Blocks(mesh, axes)
        _note_arguments(blocks, found, self._sizes)
        modules = captured_modules(self._f)
        _note_state(modules)
        links = self._share(blocks, modules)
        with uncompiled, Domain(blocks):
            y = self._f(*args, **kwargs)
        return _left(blocks, y, _first_layout(found), links)

    def _with_specs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], axis: Axis
    ) -> list[tuple[Tensor, P, str]]:
        """Return the tensors among the arguments, each with its spec."""
        specs = self._specs
        named: Any = kwargs
        if isinstance(specs, dict):
            bound = inspect.signature(_forward(self._f)).bind(*args, **kwargs)
            args, named = (), dict(bound.arguments)
            named |= named.pop("kwargs", {})
            for name in specs:
                if name not in named:
                    given = f"in_specs names {name!r}, which the call does not pass"
                    right = f"It passes {', '.join(named)}."
                    raise ArgumentError(phrase(FUNCTION, given, right))
        leaves: list[tuple[Any, P, str]] = []
        if args:
            whole = specs if not isinstance(specs, list) else tuple(specs)
            leaves += with_specs(args, whole, FUNCTION, "in_specs", axis)
        for name, x in named.items():
            spec = specs.get(name, P()) if isinstance(specs, dict) else P()
            leaves += with_specs(x, spec, FUNCTION, name, axis)
        found: list[tuple[Tensor, P, str]] = []
        for x, spec, where in leaves:
            if isinstance(x, Tensor):
                found.append((x, spec, where))
        return found

    def _share(self, blocks: Blocks, modules: list[nn.Module]) -> list[Tensor]:
        """Make varying copies of the parameters, whose gradients are summed together."""
        if not blocks.axes:
            return []
        shared: dict[int, Tensor] = {}
        for module in modules:
            for p in module.parameters():
                if differentiated(p) and not hasattr(p, "to_local"):
                    shared[id(p)] = p
        params = list(shared.values())
        if not params:
            return []
        copies, links = self._kept.of(params, blocks, self._idle)
        for p, copy in zip(params, copies, strict=True):
            blocks.copies[id(p)] = (p, copy)
        return links


class _Copies:
    """Varying copies of parameters, kept until these change.

    So one node of the graph sums a parameter's gradient for all calls between.
    """

    def __init__(self) -> None:
        self._key: object = None
        self._made: tuple[list[Tensor], list[Tensor], list[Tensor]] = [], [], []

    def of(
        self, params: list[Tensor], blocks: Blocks, idle: Idle
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return a copy of each, and the tensors that lead backward to their nodes."""
        label = label_of(blocks.axes)
        is_plain = torch.is_grad_enabled() and not are_transforms_active()
        if not is_plain or not all([p.is_leaf and p.requires_grad for p in params]):
            return list(pvary(params, label)), []
        axis = blocks.mesh.bind(label, FUNCTION)
        if axis.size == 1:
            return params, []
        states = [(id(p), version_of(p), p.data_ptr(), p.dtype) for p in params]
        key = (axis.key, *states)
        # ids do not come again while the parameters are held here
        if key != self._key:
            copies, links = pvary_used(params, axis, FUNCTION, idle)
            self._key, self._made = key, (params, copies, links)
        return self._made[1], self._made[2]


def _forward(f: Callable[..., Any]) -> Callable[..., Any]:
    return f.forward if isinstance(f, nn.Module) else f


def _parsed(sizes: Sizes | None) -> dict[int, tuple[int, ...]]:
    if sizes is None:
        return {}
    told: dict[int, tuple[int, ...]] = {}
    try:
        for dim, lengths in sizes.items():
            told[int(dim)] = tuple([int(length) for length in lengths])
    except (AttributeError, TypeError, ValueError):
        given = f"sizes is {quoted(sizes)}"
        right = "Pass {dim: one length per rank of its axis}."
        raise ShapeError(phrase(FUNCTION, given, right)) from None
    return told


def _local(mesh: Mesh, x: Any) -> Tensor:
    """Return the block that a DTensor holds of itself, noted; other tensors as they are."""
    if not hasattr(x, "to_local"):
        return x
    spec = P.from_placements(x.placements, mesh)
    cuts: list[Cut] = [None] * x.dim()
    for d, entry in enumerate(spec.entries):
        names = names_in(entry)
        if names:
            axis = mesh.bind(label_of(names), FUNCTION)
            cuts[d] = Part(names, shares(x.shape[d], axis))
    y: Tensor = x.to_local()
    known.note(y, tuple(cuts) if any(cuts) else known.WHOLE)
    return y


def _axes_cut(found: Sequence[tuple[Tensor, P, str]], mesh: Mesh) -> Axes:
    """Return the axes over which something is cut, in the order of the mesh."""
    named: set[str] = set()
    for x, spec, _ in found:
        named |= {*spec.axes}
        of = known.noted(x)
        if of is not None:
            named |= axes_of(of.layout)
    return tuple(name for name in mesh.axis_names if name in named)


def _note_arguments(
    blocks: Blocks,
    found: Sequence[tuple[Tensor, P, str]],
    sizes: Mapping[int, tuple[int, ...]],
) -> None:
    """Note how each argument is cut."""
    for x, spec, where in found:
        of = known.noted(x)
        is_known = of is not None and bool(of.layout) and not spec.sizes
        if of is not None and is_known and _agrees(blocks, of.layout, spec):
            continue
        cuts: list[Cut] = [None] * x.dim()
        for d, entry in enumerate(spec.entries):
            names = names_in(entry)
            if names:
                told = dict(spec.sizes).get(d, sizes.get(d))
                cuts[d] = _part(blocks, x, d, names, told, where)
        blocks.note(x, tuple(cuts))


def _agrees(blocks: Blocks, layout: Layout, spec: P) -> bool:
    """Return whether what is known of a tensor is what a spec says, or it says nothing."""
    for cut in layout:
        if cut is None:
            continue
        # it may be from a call on another mesh
        ranks = [blocks.mesh.shape.get(name, 0) for name in cut.axes]
        if not isinstance(cut, Part) or len(cut.sizes) != math.prod(ranks):
            return False
    if not spec.axes:
        return True
    # dims that a spec leaves out are whole
    said: list[Axes] = [()] * len(layout)
    for d, entry in enumerate(spec.entries):
        said[d] = names_in(entry)
    held: list[Axes] = [()] * len(layout)
    for d, cut in enumerate(layout):
        if cut is not None:
            held[d] = cut.axes
    return held == said


def _part(
    blocks: Blocks,
    x: Tensor,
    dim: int,
    names: Axes,
    told: tuple[int, ...] | None,
    where: str,
) -> Part:
    """Return how a dim is cut; without lengths, the ranks exchange them."""
    axis = blocks.mesh.bind(label_of(names), FUNCTION)
    if told is None:
        shape = torch.tensor([tuple(x.shape)], device=x.device).long()
        everywhere = all_gather(shape, label_of(names)).tolist()
        told = tuple([of[dim] for of in everywhere])
        others: set[tuple[int, ...]] = set()
        for of in everywhere:
            others.add((*of[:dim], *of[dim + 1 :]))
        if len(others) > 1:
            given = f"{where} has the shapes {everywhere}"
            right = (
                f"Blocks along an axis differ in the dim that it cuts, {dim}, alone."
            )
            raise wrong(ShapeError, FUNCTION, axis, given, right)
    if len(told) != axis.size or told[axis.index] != x.shape[dim] or min(told) < 0:
        given = f"sizes of dim {dim} are {told} and {where} is {tuple(x.shape)}"
        right = (
            f"Pass the lengths of {axis.size} ranks, this one's being {x.shape[dim]}."
        )
        raise wrong(ShapeError, FUNCTION, axis, given, right)
    return Part(names, told)


def _note_state(modules: Sequence[nn.Module]) -> None:
    """Note what modules hold: parameters, buffers and tensors that are attributes."""
    for module in modules:
        for inner in module.modules():
            held: list[object] = [*parameters_of(inner).values()]
            held += inner.buffers(recurse=False)
            for hook in forward_hooks(inner).values():
                owner = getattr(hook, "__self__", None)
                # what data_parallel ties to the result
                if isinstance(owner, Reduces):
                    held += vars(owner).values()
            for name, value in vars(inner).items():
                if isinstance(value, Tensor):
                    held.append(value)
                elif isinstance(value, list | tuple | dict) and name[0] != "_":
                    held += tensors_in(value)
            for x in held:
                if isinstance(x, Tensor) and known.noted(x) is None:
                    known.note(x, known.WHOLE)


def _first_layout(found: Sequence[tuple[Tensor, P, str]]) -> Layout:
    """Return the layout of the first argument that is cut."""
    for x, _, _ in found:
        of = known.noted(x)
        if of is not None and of.layout:
            return of.layout
    return ()


def _left(blocks: Blocks, result: Any, like: Layout, links: list[Tensor]) -> Any:
    """Return results as they leave: cut as the first argument is, where it is as long."""

    def home(y: Tensor) -> Tensor:
        layout = blocks.noted(y)
        if layout:
            y = blocks.plain(y)
            y = blocks.relayout(y, _home(blocks, y, like))
        return y

    results = map_tensors(home, result)
    if not links:
        return results

    def link(y: Tensor) -> Tensor:
        if not (y.is_floating_point() or y.is_complex()) or not y.requires_grad:
            return y
        return blocks.note(linked(y, links), blocks.layout(y))

    return map_tensors(link, results)


def _home(blocks: Blocks, y: Tensor, like: Layout) -> Layout:
    """Return how a result is to be cut."""
    layout = blocks.layout(y)
    if len(layout) != len(like):
        return layout
    cuts: list[Cut] = []
    for cut, wish, n in zip(layout, like, blocks.whole(y), strict=True):
        fits = isinstance(wish, Part) and wish.total == n
        cuts.append(wish if fits else cut)
    # what moves to another dim must leave the one where it is
    named = [name for cut in cuts if cut is not None for name in cut.axes]
    if len(set(named)) < len(named) or frozenset(named) != axes_of(layout):
        return layout
    return tuple(cuts)
