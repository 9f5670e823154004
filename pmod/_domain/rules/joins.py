"""Tensors joined, stacked, taken apart, and rows that go elsewhere: roll, flip."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pmod._core.leaves import tensors_in
from pmod._domain.blocks import Blocks
from pmod._domain.layout import Fold, Layout, Part, with_cut
from pmod._domain.refusals import no_exact_form
from pmod._domain.rules.dims import Dims, dims_of, numbers
from pmod._domain.rules.indexing import cut_slice
from pmod._domain.rules.pointwise import pointwise
from pmod._domain.rules.reductions import mean, total
from pmod._domain.rules.table import Function, rule


@rule("cat", "concat", "concatenate", "hstack", "vstack", "dstack", "column_stack")
def cat(
    b: Blocks, func: Function, tensors: Sequence[Tensor], dim: int = 0, **named: int
) -> Tensor:
    if "stack" in func.__name__:
        right = "Use torch.cat with a dim."
        raise no_exact_form(func.__name__, "it has no rule", right)
    dim = named.get("axis", dim)
    # torch takes an empty vector for a tensor of any shape
    xs = [x for x in tensors if b.whole(x) != (0,)] or list(tensors)
    d = operator.index(dim) % xs[0].dim()
    first = next(i for i, x in enumerate(xs) if b.is_cut(x))
    layout = b.layout(xs[first])
    if not any([b.layout(x)[d] for x in xs]):
        axes = b.axes_of(xs[first])
        alike = [b.vary(b.relayout(x, layout), axes) for x in xs]
        return b.note(torch.cat(alike, d), layout)
    return _joined(b, [b.plain(x, [d]) for x in xs], d)


def _joined(b: Blocks, xs: Sequence[Tensor], d: int) -> Tensor:
    """Return tensors joined along a dim that is cut: rows go to even shares."""
    longest = max(xs, key=lambda x: b.whole(x)[d] if b.layout(x)[d] else -1)
    layout = b.layout(longest)
    part = layout[d]
    assert isinstance(part, Part)
    whole = sum(b.whole(x)[d] for x in xs)
    result = part.scaled(whole)
    pieces: list[Tensor] = []
    before = 0
    for x in xs:
        n = b.whole(x)[d]
        own = b.layout(x)[d]
        x = b.relayout(x, with_cut(layout, d, own))
        x = b.vary(x, b.axes_of(longest) - {*part.axes})
        windows: list[tuple[int, int]] = []
        for first, end in pairwise(result.starts):
            low, high = max(first - before, 0), min(end - before, n)
            windows.append((low, high) if low < high else (0, 0))
        if isinstance(own, Part):
            pieces.append(b.window(x, d, own, tuple(windows)))
        else:
            low, high = windows[b.index(part)]
            x = b.varied(x, b.ordered(part.axes))
            pieces.append(x.narrow(d, low, high - low))
        before += n
    return b.note(torch.cat(pieces, d), with_cut(layout, d, result))


@rule("stack")
def stack(b: Blocks, func: Function, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    first = next(i for i, x in enumerate(tensors) if b.is_cut(x))
    alike, layout = b.common(tensors, first)
    (d,) = dims_of(dim, len(layout) + 1)
    return b.note(torch.stack(alike, d), (*layout[:d], None, *layout[d:]))


def _listed(tensors: tuple[Any, ...]) -> list[Tensor]:
    """Return tensors that come one by one, or in one sequence."""
    if len(tensors) == 1 and not isinstance(tensors[0], Tensor):
        return list(tensors[0])
    return list(tensors)


@rule("meshgrid", outer=True)
def meshgrid(b: Blocks, func: Function, *tensors: Any, **named: Any) -> Any:
    return _grid(b, _listed(tensors), named.get("indexing") or "ij")


@rule("broadcast_tensors")
def broadcast_tensors(b: Blocks, func: Function, *tensors: Any) -> Any:
    xs = _listed(tensors)
    _, layout = b.common(xs)
    shape = torch.broadcast_shapes(*[b.whole(x) for x in xs])
    rows = [b.rows(cut, n) for cut, n in zip(layout, shape, strict=True)]
    alike, _ = b.common(xs)
    return tuple([b.note(x.expand(rows), layout) for x in alike])


def _grid(b: Blocks, xs: Sequence[Tensor], indexing: str) -> tuple[Tensor, ...]:
    layout: Layout = tuple([*b.layout(x), None][0] for x in xs)
    axes = [axis for cut in layout if cut is not None for axis in cut.axes]
    if len(set(axes)) < len(axes):
        right = "Cut them over axes of their own."
        raise no_exact_form("meshgrid", "two are cut over one axis", right)
    made = torch.meshgrid(*[b.vary(x, axes) for x in xs], indexing=indexing)
    if indexing == "xy":
        layout = (layout[1], layout[0], *layout[2:])
    return tuple([b.note(x, layout) for x in made])


@rule("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk",
      "unsafe_split", outer=True)  # fmt: skip
def split(
    b: Blocks, func: Function, x: Tensor, given: Any = None, dim: int = 0, **named: Any
) -> tuple[Tensor, ...]:
    name = func.__name__
    dim = named.pop("dim", dim)
    given = given if given is not None else next(iter(named.values()))
    (d,) = dims_of(dim, x.dim())
    n = b.whole(x)[d]
    if name == "tensor_split":
        raise no_exact_form(name, "it has no rule", "Use split with sizes.")
    if isinstance(given, int):
        step = max(-(-n // given), 1) if "chunk" in name else given
        lengths = [min(step, n - first) for first in range(0, max(n, 1), step)]
    else:
        lengths = [operator.index(length) for length in given]
    pieces: list[Tensor] = []
    first = 0
    for length in lengths:
        y = cut_slice(b, x, d, first, first + length, 1)
        if y is x:
            y = b.note(x.view_as(x), b.layout(x))
        pieces.append(y)
        first += length
    return tuple(pieces)


@rule("roll")
def roll(
    b: Blocks, func: Function, x: Tensor, shifts: Any, dims: Dims = None
) -> Tensor:
    if dims is None or dims == ():
        right = "Pass dims."
        raise no_exact_form("roll", "of the flattened tensor", right)
    places = dims_of(dims, x.dim())
    for shift, d in zip(numbers([shifts]), places, strict=True):
        x = b.plain(x, [d])
        layout, part = b.layout(x), b.layout(x)[d]
        if not isinstance(part, Part):
            x = b.note(x.roll(shift, d), layout)
            continue
        by = shift % part.total if part.total else 0
        windows: list[tuple[int, int]] = []
        for first, end in pairwise(part.starts):
            windows.append((first - by, end - by) if first < end else (0, 0))
        y = b.window(x, d, part, tuple(windows), "periodic")
        x = b.note(y, layout)
    return x


@rule("flip", "fliplr", "flipud")
def flip(b: Blocks, func: Function, x: Tensor, *dims: Any, **named: Any) -> Tensor:
    names = {"fliplr": [1], "flipud": [0]}
    given = dims or tuple(named.values())
    places = names.get(func.__name__) or dims_of(numbers(given), x.dim())
    for d in places:
        x = b.plain(x, [d])
        layout, part = b.layout(x), b.layout(x)[d]
        if isinstance(part, Part):
            n = part.total
            windows: list[tuple[int, int]] = []
            for first, end in pairwise(part.starts):
                windows.append((n - end, n - first) if first < end else (0, 0))
            x = b.window(x, d, part, tuple(windows))
        x = b.note(x.flip(d), layout)
    return x


@rule("diff")
def diff(
    b: Blocks, func: Function, x: Tensor, n: int = 1, dim: int = -1, **named: Any
) -> Tensor:
    if named:
        right = "Use torch.cat."
        raise no_exact_form("diff", "with prepend or append", right)
    (d,) = dims_of(dim, x.dim())
    for _ in range(n):
        rows = b.whole(x)[d]
        upper = cut_slice(b, x, d, 1, rows, 1)
        lower = cut_slice(b, x, d, 0, rows - 1, 1)
        x = pointwise(b, torch.sub, upper, lower)
    return x


REDUCTIONS = ("none", "mean", "sum")


@rule("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss",
      "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div",
      "poisson_nll_loss")  # fmt: skip
def loss(b: Blocks, func: Function, x: Tensor, y: Tensor, *args: Any, **kw: Any) -> Any:
    """Reduce a loss of each element as the whole's is.

    The functions within torch take the reduction as a number.
    """
    name = func.__name__
    after = {"mse_loss": 0, "l1_loss": 0, "soft_margin_loss": 0, "kl_div": 0}
    at = after.get(name, 1 if name == "binary_cross_entropy" else 0)
    if name == "binary_cross_entropy_with_logits":
        at = 2
    if name == "poisson_nll_loss":
        at = 3
    given = list(args)
    how = kw.pop("reduction", None)
    if len(given) > at:
        how = given.pop(at)
    if how is None:
        # torch's own have defaults of their own
        one = torch.ones(2)
        how = 0 if func(one, one).dim() else 1
    word = how if isinstance(how, str) else REDUCTIONS[how]
    if word not in REDUCTIONS:
        raise no_exact_form(name, f"reduction={word!r}", "Use 'mean', 'sum' or 'none'.")
    reduction: Any = "none" if isinstance(how, str) else 0
    elements = pointwise(b, _unreduced(func, at, reduction), x, y, *given, **kw)
    if word == "mean":
        return mean(b, torch.mean, elements)
    if word == "sum":
        return total(b, elements, range(elements.dim()), keepdim=False)
    return elements


def _unreduced(func: Function, at: int, reduction: Any) -> Function:
    """Return the loss of each element, the reduction put where it goes."""

    def of_each(x: Tensor, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rest = [*args[:at], reduction, *args[at:]]
        if len(args) < at:
            return func(x, y, *args, **kwargs, reduction=reduction)
        return func(x, y, *rest, **kwargs)

    return of_each


@rule("cosine_similarity")
def cosine_similarity(
    b: Blocks, func: Function, x: Tensor, y: Tensor, dim: int = 1, eps: float = 1e-8
) -> Tensor:
    def body() -> Tensor:
        one, other = torch.broadcast_tensors(x, y)
        lengths = [
            (z * z).sum(dim, keepdim=True).sqrt().clamp_min(eps) for z in (one, other)
        ]
        return ((one / lengths[0]) * (other / lengths[1])).sum(dim)

    return b.follow(body)


@rule("tril", "triu")
def triangle(b: Blocks, func: Function, x: Tensor, diagonal: int = 0) -> Tensor:
    """Keep one side of a diagonal, counted in rows and columns of the whole."""
    layout = b.layout(x)
    starts: list[int] = []
    for cut in layout[-2:]:
        if isinstance(cut, Fold):
            raise no_exact_form(func.__name__, "a dim is folded", "Reshape after it.")
        starts.append(0 if cut is None else b.span(cut)[0])
    down, right = starts
    return b.note(func(x, diagonal + down - right), layout)


@rule("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor")
def made_new(b: Blocks, func: Function, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Make a tensor of a shape that is given: one value, whatever x is."""
    if any([b.is_cut(of) for of in tensors_in((args, kwargs))]):
        right = "Pass a number, or clone the tensor."
        raise no_exact_form(func.__name__, "it is made from a block", right)
    return func(x, *args, **kwargs)
