"""One rank's blocks in a call of `domain_parallel`: what is known of tensors, and how a
block moves from one layout to another.

Methods that return a tensor and a layout leave it to the rule to note it; the others
note what they return.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from itertools import pairwise
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from pmod._collectives.halo import carry_out
from pmod._collectives.halo_plan import Plan, Windows, window_plan
from pmod._collectives.ragged import all_gather_v
from pmod._collectives.slices import all_to_all, shard, unshard
from pmod._collectives.values import pick, pmax, psum, pvary
from pmod._core.leaves import tensors_in
from pmod._core.row import Call
from pmod._domain import known
from pmod._domain.draws import Draws
from pmod._domain.layout import (
    Axes,
    Cut,
    Fold,
    Layout,
    Part,
    Place,
    Shape,
    axes_of,
    factors_held,
    meeting,
    rows_held,
    with_cut,
)
from pmod._domain.refusals import no_exact_form
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import Mesh
from pmod._torch import are_transforms_active, is_batched, is_wrapped, unwrap

T = TypeVar("T")
Arguments = ParamSpec("Arguments")


def label_of(axes: Sequence[str]) -> str | tuple[str, ...]:
    """Return axes as a collective takes them."""
    return axes[0] if len(axes) == 1 else tuple(axes)


class _Places(dict[Axes, int]):
    """This rank's index along axes, looked up once."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def __missing__(self, axes: Axes) -> int:
        self[axes] = self._mesh.bind(label_of(axes), "domain_parallel").index
        return self[axes]


@lru_cache(maxsize=1024)
def _plan(index: int, sizes: tuple[int, ...], windows: Windows, boundary: str) -> Plan:
    return window_plan(index, sizes, windows, boundary)


class Blocks:
    """What a rule is given: this rank's place, the layouts, and how blocks move."""

    def __init__(self, mesh: Mesh, axes: Axes) -> None:
        self.mesh = mesh
        self.axes = axes
        self.place: Place = _Places(mesh)
        # varying copies of the parameters, whose gradients are summed together
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}
        self.draws = Draws(mesh, axes)
        # the mode, which follows what a rule lets torch compute
        self.mode: AbstractContextManager[object]
        # the same again, in backward
        self.reenter: Callable[[], AbstractContextManager[object]]

    # --- what is known ----------------------------------------------------------------

    def noted(self, x: Tensor) -> Layout:
        """Return what is noted of a tensor: `WHOLE`, or a layout with a cut."""
        of = known.noted(x)
        if of is not None:
            if x.requires_grad and not of.differentiates:
                self.check_gained(x, of.layout)
            return of.layout
        if isinstance(x, torch.nn.Parameter):
            return known.WHOLE
        if is_wrapped(x):
            return self._in_transform(x)
        why = "it takes a tensor that no argument, parameter, buffer or function of torch gave to this call"
        right = "Pass it as an argument, or register it as a buffer of the module."
        raise no_exact_form("an operation", why, right)

    def check_gained(self, x: Tensor, layout: Layout) -> None:
        """Look at a tensor that has a derivative by now, and had none.

        What an autograd.Function returns has. Its backward is a part of the program,
        and runs as its forward did: on blocks that are followed.
        """
        node: Any = x.grad_fn
        is_own = isinstance(node, torch.autograd.function.BackwardCFunction)
        # a collective of a rule has its transpose
        if is_own and not isinstance(getattr(node, "call", None), Call):
            name = type(node).__name__.removesuffix("Backward")
            if name == "BackwardHookFunction":
                right = "Register hooks of tensors, which see the whole."
                raise no_exact_form(name, "hooks of modules would see blocks", right)
            if name == "CheckpointFunction":
                self.checkpointed(node)
            else:
                self.follow_backward(node, x.output_nr, layout)
        known.note(x, layout)

    def follow_backward(self, node: Any, number: int, layout: Layout) -> None:
        """Let the backward of a function run as its forward did.

        The gradient of output `number` is cut as that output is. What it saved is known
        still, or raises when it is used.
        """
        layouts = getattr(node, "layouts", None)
        if layouts is None:
            layouts = node.layouts = {}
            apply, context = node.apply, self.reenter()

            def followed(*gradients: Tensor | None) -> object:
                for i, gradient in enumerate(gradients):
                    if gradient is not None and i in layouts:
                        known.note(gradient, layouts[i])
                with context:
                    return apply(*gradients)

            node.apply = followed
        layouts[number] = layout

    def checkpointed(self, node: Any) -> None:
        """Let a reentrant checkpoint run again, in backward, as it ran here."""
        f = node.run_function
        if getattr(f, "__name__", "") == "run_again":
            return
        context = self.reenter()
        layouts: list[Layout] = [self.noted(x) for x in node.saved_tensors]

        def run_again(*args: Any) -> Any:
            for x, layout in zip(tensors_in(args), layouts, strict=True):
                known.note(x, layout)
            with context:
                return f(*args)

        node.run_function = run_again

    def _in_transform(self, x: Tensor) -> Layout:
        """Return the layout of what a transform made of a tensor that is known."""
        inner = unwrap(x)
        layout = self.noted(inner)
        if layout and is_batched(x):
            raise no_exact_form(
                "vmap",
                "a tensor that is cut comes from outside of it",
                "Pass it to the function that is mapped, or map the whole call.",
            )
        return layout

    def layout(self, x: Tensor) -> Layout:
        """Return the layout of a tensor, an entry for each dim."""
        return self.noted(x) or (None,) * x.dim()

    def is_cut(self, x: Tensor) -> bool:
        return bool(self.noted(x))

    def whole(self, x: Tensor) -> Shape:
        """Return the shape of the whole."""
        layout = self.noted(x)
        if not layout:
            return tuple(x.shape)
        shape: list[int] = []
        for cut, length in zip(layout, x.shape, strict=True):
            shape.append(length if cut is None else cut.total)
        return tuple(shape)

    def axes_of(self, x: Tensor) -> frozenset[str]:
        """Return the axes along which a tensor varies."""
        return axes_of(self.noted(x))

    def note(self, x: Tensor, layout: Layout) -> Tensor:
        """Note the layout of a tensor, and return it."""
        if not any(layout):
            known.note(x, known.WHOLE)
            return x
        for d, cut in enumerate(layout):
            held = None if cut is None else rows_held(cut, self.place)
            assert held is None or held == x.shape[d], (layout, x.shape)
        known.note(x, layout)
        return x

    def index(self, part: Part) -> int:
        return self.place[part.axes]

    def axis(self, part: Part) -> Axis:
        return self.mesh.bind(label_of(part.axes), "domain_parallel")

    def rows(self, cut: Cut, whole: int) -> int:
        """Return how many rows of a dim this rank has."""
        return whole if cut is None else rows_held(cut, self.place)

    def span(self, part: Part) -> tuple[int, int]:
        """Return the first row of this rank's, and the one after its last."""
        at = self.index(part)
        return part.starts[at], part.starts[at + 1]

    def follow(
        self,
        f: Callable[Arguments, T],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> T:
        """Run functions of torch by their own rules, inside of a rule."""
        with self.mode:
            return f(*args, **kwargs)

    # --- one value and many -----------------------------------------------------------

    def ordered(self, axes: Iterable[str]) -> Axes:
        """Return axes in the order of the mesh, which is the same on all ranks."""
        given = frozenset(axes)
        return tuple(name for name in self.axes if name in given)

    def over(self, layout: Layout, dims: Sequence[int]) -> Axes:
        """Return the axes that cut these dims."""
        return self.ordered(axes_of(tuple(layout[d] for d in dims)))

    def vary(self, x: Tensor, axes: Iterable[str]) -> Tensor:
        """Return x for a use that varies along these axes: its gradient is summed."""
        missing = self.ordered(frozenset(axes) - self.axes_of(x))
        return self.varied(x, missing)

    def varied(self, x: Tensor, missing: Axes) -> Tensor:
        """Return x, one value along these axes, for a use that varies along them."""
        if not missing:
            return x
        kept = self.copies.get(id(x))
        if kept is not None and kept[0] is x and missing == self.axes:
            return kept[1]
        if x.requires_grad or are_transforms_active():
            return pvary(x, label_of(missing))
        return x

    def sum(self, x: Tensor, axes: Axes) -> Tensor:
        """Return the sum over the ranks: one value along these axes."""
        return psum(x, label_of(axes)) if axes else x

    def greatest(self, x: Tensor, axes: Axes) -> Tensor:
        """Return the greatest over the ranks: one value along these axes."""
        return pmax(x, label_of(axes)) if axes else x

    # --- moving -----------------------------------------------------------------------

    def window(
        self, x: Tensor, dim: int, part: Part, windows: Windows, boundary: str = "zeros"
    ) -> Tensor:
        """Return this rank's window of the whole, padded; of each rank the rows low to
        high - 1.
        """
        plan = _plan(self.index(part), part.sizes, windows, boundary)
        if not plan.moves:
            # another object, for x keeps its layout
            return x.view_as(x)
        (y,) = carry_out(plan, [x], [dim - x.dim()], self.axis(part))
        return y

    def recut(self, x: Tensor, dim: int, cut: Part | Fold) -> Tensor:
        """Return x with another cut of a dim over the same axes."""
        layout = self.layout(x)
        before = layout[dim]
        if before == cut:
            return x
        if isinstance(cut, Part) and isinstance(before, Part):
            windows = tuple(pairwise(cut.starts))
            y = self.window(x, dim, before, windows)
            return self.note(y, with_cut(layout, dim, cut))
        return self.shard(self.unshard(x, dim), dim, cut)

    def plain(self, x: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        """Return x with no folded dims among these: each cut in runs, evenly."""
        for d in range(x.dim()) if dims is None else dims:
            cut = self.layout(x)[d]
            if isinstance(cut, Fold):
                n = math.prod(self.mesh.shape[name] for name in cut.axes)
                even = Part(cut.axes, (0,) * n).evenly(cut.total)
                x = self.recut(x, d, even)
        return x

    def unshard(self, x: Tensor, dim: int) -> Tensor:
        """Return x with a dim whole, as one value."""
        layout = self.layout(x)

        def join(y: Tensor, d: int, part: Part) -> Tensor:
            return unshard(y, label_of(part.axes), dim=d, sizes=part.sizes)

        y = self._by_factor(x, dim, layout[dim], join, held=True)
        return self.note(y, with_cut(layout, dim, None))

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Return x with a dim whole, for a use of this rank's own; it is not noted."""
        layout = self.layout(x)

        def join(y: Tensor, d: int, part: Part) -> Tensor:
            return all_gather_v(y, label_of(part.axes), dim=d, sizes=part.sizes)

        return self._by_factor(x, dim, layout[dim], join, held=True)

    def shard(self, x: Tensor, dim: int, cut: Part | Fold) -> Tensor:
        """Return this rank's rows of a dim that is whole."""

        def take(y: Tensor, d: int, part: Part) -> Tensor:
            return shard(y, label_of(part.axes), dim=d, sizes=part.sizes)

        y = self._by_factor(x, dim, cut, take, held=False)
        return self.note(y, with_cut(self.layout(x), dim, cut))

    def _by_factor(
        self,
        x: Tensor,
        dim: int,
        cut: Cut,
        f: Callable[[Tensor, int, Part], Tensor],
        *,
        held: bool,
    ) -> Tensor:
        """Return f of a dim, or of each dim that a folded one was made of."""
        if cut is None:
            return x
        if isinstance(cut, Part):
            return f(x, dim, cut)
        lengths = factors_held(cut, self.place) if held else list(cut.lengths)
        y = x.unflatten(dim, lengths)
        for i, part in enumerate(cut.parts):
            if part is not None:
                y = f(y, dim + i, part)
        return y.flatten(dim, dim + len(lengths) - 1)

    def owned_row(self, x: Tensor, dim: int, row: int) -> Tensor:
        """Return one row of a dim that is cut: one value along its axes."""
        x = self.plain(x, [dim])
        layout = self.layout(x)
        part = layout[dim]
        assert isinstance(part, Part)
        # of runs that begin alike, all but the last are empty
        owner = max(i for i in range(len(part.sizes)) if part.starts[i] <= row)
        y = x.narrow(dim, 0, 0).sum(dim, dtype=x.dtype)
        if self.index(part) == owner:
            y = x.select(dim, row - part.starts[owner])
        y = pick(y, label_of(part.axes), src=owner)
        return self.note(y, layout[:dim] + layout[dim + 1 :])

    def relayout(self, x: Tensor, want: Layout) -> Tensor:
        """Return x cut as wanted.

        What stays on its axes is re-cut, what changes its dim goes by all_to_all, and
        the rest through the whole of a dim.
        """
        if self.layout(x) == want:
            return x
        for d in range(x.dim()):
            have, wish = self.layout(x)[d], want[d]
            if have is not None and wish is not None and have.axes == wish.axes:
                x = self.recut(x, d, wish)
        for d in range(x.dim()):
            x = self._turned(x, d, want)
        for d in range(x.dim()):
            have = self.layout(x)[d]
            if have is not None and have != want[d]:
                x = self.unshard(x, d)
        for d in range(x.dim()):
            wish = want[d]
            if wish is not None and self.layout(x)[d] is None:
                x = self.shard(x, d, wish)
        return x

    def _turned(self, x: Tensor, dim: int, want: Layout) -> Tensor:
        """Return x with what cuts `dim` on the dim where it is wanted."""
        layout = self.layout(x)
        have = layout[dim]
        if not isinstance(have, Part) or want[dim] is not None:
            return x
        for e, wish in enumerate(want):
            fits = isinstance(wish, Part) and wish.axes == have.axes
            if not fits or layout[e] is not None or not isinstance(wish, Part):
                continue
            y = all_to_all(
                x,
                label_of(have.axes),
                split_dim=e,
                concat_dim=dim,
                split_sizes=wish.sizes,
                concat_sizes=have.sizes,
            )
            return self.note(y, with_cut(with_cut(layout, dim, None), e, wish))
        return x

    def common(
        self, xs: Sequence[Tensor], first: int = 0
    ) -> tuple[list[Tensor], Layout]:
        """Return tensors that are broadcast with one another, cut alike, and the layout
        of what they make.

        first: whose cut counts first.
        """
        layouts = tuple(self.layout(x) for x in xs)
        shapes = tuple(self.whole(x) for x in xs)
        met = meeting(layouts, shapes, first)
        if isinstance(met, str):
            raise no_exact_form("an operation", met, "Pass tensors that broadcast.")
        axes = axes_of(met.layout)
        out: list[Tensor] = []
        for x, want in zip(xs, met.wanted, strict=True):
            out.append(self.vary(self.relayout(x, want), axes))
        return out, met.layout
