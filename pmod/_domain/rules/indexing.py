"""Slices, rows, and what is written into them, all in numbers of the whole."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pmod._core.arguments import as_int
from pmod._domain import known
from pmod._domain.blocks import Blocks
from pmod._domain.layout import Cut, Fold, Layout, Part, sliced, with_cut, without
from pmod._domain.refusals import along_cut, no_exact_form
from pmod._domain.rules.dims import dims_of
from pmod._domain.rules.pointwise import become
from pmod._domain.rules.table import Function, rule


def cut_slice(b: Blocks, x: Tensor, d: int, start: int, stop: int, step: int) -> Tensor:
    """Return x[start:stop:step] along a dim of the whole; rows stay where they are."""
    n = b.whole(x)[d]
    stop = max(stop, start)
    if (start, stop, step) == (0, n, 1):
        return x
    x = b.plain(x, [d])
    layout, part = b.layout(x), b.layout(x)[d]
    if not isinstance(part, Part):
        return b.note(_taken(x, d, start, stop, step), layout)
    of = sliced(part, start, stop, step)
    at = b.index(part)
    first, count = of.first[at], of.part.sizes[at]
    y = x.narrow(d, 0, 0)
    if count:
        y = _taken(x, d, first, first + (count - 1) * step + 1, step)
    return b.note(y, with_cut(layout, d, of.part))


def _taken(x: Tensor, d: int, start: int, stop: int, step: int) -> Tensor:
    if step == 1:
        return x.narrow(d, start, stop - start)
    return x[(*(slice(None),) * d, slice(start, stop, step))]


def row(b: Blocks, x: Tensor, d: int, i: int) -> Tensor:
    """Return one row of a dim of the whole."""
    n, layout = b.whole(x)[d], b.layout(x)
    if not -n <= i < n:
        # as torch: a loop over rows ends here
        raise IndexError(f"index {i} is out of bounds for dimension {d} with size {n}")
    if layout[d] is None:
        return b.note(x.select(d, i), without(layout, [d]))
    return b.owned_row(x, d, i % n)


@rule("select")
def select(b: Blocks, func: Function, x: Tensor, dim: int, index: int) -> Tensor:
    (d,) = dims_of(dim, x.dim())
    return row(b, x, d, operator.index(index))


@rule("narrow")
def narrow(
    b: Blocks, func: Function, x: Tensor, dim: int, start: int | Tensor, length: int
) -> Tensor:
    (d,) = dims_of(dim, x.dim())
    n, begin = b.whole(x)[d], operator.index(start)
    begin = begin + n if begin < 0 else begin
    if begin + length > n or length < 0:
        raise IndexError(f"narrow: {begin} + {length} is more than {n} rows of dim {d}")
    return cut_slice(b, x, d, begin, begin + length, 1)


def spelled_out(x: Tensor, index: Any) -> list[Any]:
    """Return an index as one item for each dim, and None for each new one."""
    items: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
    used = 0
    for item in items:
        is_mask = isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8)
        if item is None or item is Ellipsis:
            continue
        used += item.dim() if is_mask else 1
    rest = [slice(None)] * (x.dim() - used)
    out: list[Any] = []
    is_open = True
    for item in items:
        if item is Ellipsis and is_open:
            out += rest
            is_open = False
        else:
            out.append(item)
    return out + rest if is_open else out


def _as_tensor(item: Any) -> Tensor | None:
    """Return an item that picks several rows as a tensor of their numbers."""
    if isinstance(item, Tensor):
        return item if item.dim() else None
    if isinstance(item, list | tuple | range):
        index = torch.tensor(list(item))
        known.note(index, known.WHOLE)
        return index
    return None


@rule("__getitem__")
def getitem(b: Blocks, func: Function, x: Tensor, index: Any) -> Tensor:
    if isinstance(index, Tensor) and not b.is_cut(x):
        # rows of a table: as an embedding
        return taken_by(b, x, 0, index)
    d = 0
    picks: list[tuple[int, Tensor]] = []
    y = x
    for item in spelled_out(x, index):
        several = _as_tensor(item)
        if item is None:
            layout = b.layout(y)
            y = b.note(y.unsqueeze(d), (*layout[:d], None, *layout[d:]))
            d += 1
        elif isinstance(item, slice):
            start, stop, step = item.indices(b.whole(y)[d])
            y = cut_slice(b, y, d, start, stop, step)
            d += 1
        elif several is not None:
            picks.append((d, several))
            d += 1
        elif isinstance(item, bool) or (as_int(item) is None and not _is_number(item)):
            raise _masked("__getitem__")
        else:
            y = row(b, y, d, operator.index(item))
    if picks:
        return _picked(b, y, picks)
    return _another(b, x, y)


def _is_number(item: Any) -> bool:
    return isinstance(item, Tensor) and not item.dim() and not item.is_floating_point()


def _another(b: Blocks, x: Tensor, y: Tensor) -> Tensor:
    """Return a view, where an index changed nothing, as torch does."""
    return b.note(x.view_as(x), b.layout(x)) if y is x else y


def _masked(name: str) -> Exception:
    right = "Use torch.where, or multiply by the mask."
    return no_exact_form(name, "how many rows a mask finds depends on the rank", right)


def _picked(b: Blocks, x: Tensor, picks: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Return x at tensors of row numbers, of dims that are whole."""
    layout = b.layout(x)
    for d, index in picks:
        if index.dtype in (torch.bool, torch.uint8):
            raise _masked("__getitem__")
        if layout[d] is not None and (len(picks) > 1 or b.is_cut(index)):
            raise along_cut("__getitem__", d, "Index one dim with whole numbers.")
    if len(picks) == 1:
        d, index = picks[0]
        return taken_by(b, x, d, index)
    dims = [d for d, _ in picks]
    if any([b.is_cut(index) for _, index in picks]):
        raise no_exact_form("__getitem__", "an index is cut", "Use take_along_dim.")
    items: list[Any] = [slice(None)] * x.dim()
    for d, index in picks:
        items[d] = index
    made = torch.broadcast_shapes(*[index.shape for _, index in picks])
    new: Layout = (None,) * len(made)
    rest = without(layout, dims)
    is_together = dims == list(range(dims[0], dims[0] + len(dims)))
    # torch puts what indices apart make first
    at = dims[0] if is_together else 0
    return b.note(x[tuple(items)], (*rest[:at], *new, *rest[at:]))


def taken_by(b: Blocks, x: Tensor, d: int, index: Tensor) -> Tensor:
    """Return the rows that an index names; the index may be cut where x is not."""
    if index.dtype in (torch.bool, torch.uint8):
        raise _masked("__getitem__")
    layout = b.layout(x)
    if layout[d] is not None:
        return _rows_named(b, x, d, index)
    varying = b.axes_of(index)
    if varying & b.axes_of(x):
        raise no_exact_form(
            "an index", "it is cut over x's axes", "Use take_along_dim."
        )
    y = b.vary(x, varying)[(*(slice(None),) * d, index)]
    return b.note(y, (*layout[:d], *b.layout(index), *layout[d + 1 :]))


def _rows_named(b: Blocks, x: Tensor, d: int, index: Tensor) -> Tensor:
    """Return rows of a dim that is cut, named by whole numbers: one value.

    Each rank gives those that it has, and zeros; the ranks add up.
    """
    if b.is_cut(index):
        right = "Name them by whole numbers."
        raise along_cut("an index", d, right)
    x = b.plain(x, [d])
    layout, part = b.layout(x), b.layout(x)[d]
    assert isinstance(part, Part)
    first, end = b.span(part)
    at = index.to(x.device) % part.total
    own = (at >= first) & (at < end)
    # a row more, of zeros, for what others have
    shape = list(x.shape)
    shape[d] = 1
    wide = torch.cat([x, x.new_zeros(shape)], d)
    local = torch.where(own, at - first, end - first)
    y = wide[(*(slice(None),) * d, local)]
    y = b.sum(y, b.ordered(part.axes))
    return b.note(y, (*layout[:d], *(None,) * index.dim(), *layout[d + 1 :]))


@rule("index_select")
def index_select(
    b: Blocks, func: Function, x: Tensor, dim: int, index: Tensor
) -> Tensor:
    (d,) = dims_of(dim, x.dim())
    return taken_by(b, x, d, index)


@rule("embedding", outer=False)
def embedding(
    b: Blocks, func: Function, weight: Tensor, indices: Tensor, *args: Any, **kw: Any
) -> Tensor:
    if b.is_cut(weight):
        raise along_cut("embedding", 0, "Cut the indices.")
    y = func(b.vary(weight, b.axes_of(indices)), indices, *args, **kw)
    return b.note(y, (*b.layout(indices), None))


@rule("gather", "take_along_dim")
def gather(b: Blocks, func: Function, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    given = [*args, *kwargs.values()]
    index = next(of for of in given if isinstance(of, Tensor))
    dim = next((of for of in given if not isinstance(of, Tensor)), None)
    if dim is None:
        raise no_exact_form(func.__name__, "of a flattened tensor", "Pass dim.")
    (d,) = dims_of(dim, x.dim())
    lx, li = b.layout(x), b.layout(index)
    if lx[d] is not None or li[d] is not None:
        raise along_cut(func.__name__, d)
    alike: list[Cut] = []
    for e, (n, m) in enumerate(zip(b.whole(x), b.whole(index), strict=True)):
        fits = n == m or e == d
        if not fits and (lx[e] is not None or li[e] is not None):
            right = "Pass an index as long as x along dims that are cut."
            raise no_exact_form(func.__name__, f"lengths differ in dim {e}", right)
        alike.append(lx[e] or li[e] if e != d else None)
    layout = tuple(alike)
    x, index = b.relayout(x, layout), b.relayout(index, layout)
    return b.note(b.vary(x, b.axes_of(index)).gather(d, index), layout)


# --- writing --------------------------------------------------------------------------


@rule("__setitem__")
def setitem(b: Blocks, func: Function, x: Tensor, index: Any, value: Any) -> None:
    items = spelled_out(x, index)
    if isinstance(index, Tensor) and index.dtype == torch.bool:
        _write_masked(b, func, x, index, value)
        return
    for item in items:
        is_slice = isinstance(item, slice) or item is None
        if not is_slice and (isinstance(item, bool) or as_int(item) is None):
            right = "Write to slices and rows, or use torch.where."
            raise no_exact_form(
                "__setitem__", "it writes at a tensor of numbers", right
            )
    is_cut = isinstance(value, Tensor) and b.is_cut(value)
    if is_cut and not b.is_cut(x):
        become(b, x, _cut_for(b, x, items, value), func)
    target, dropped = _target(b, x, items)
    if isinstance(value, Tensor):
        value = _aligned(b, value, dropped, target, x)
    target[...] = value


def _write_masked(
    b: Blocks, func: Function, x: Tensor, mask: Tensor, value: Any
) -> None:
    if isinstance(value, Tensor) and value.dim():
        raise _masked("__setitem__")
    (_, mask), _ = b.common([x, mask])
    x[mask] = value


def _cut_for(b: Blocks, x: Tensor, items: Sequence[Any], value: Tensor) -> Layout:
    """Return how x is to be cut, so that what is written goes where it is, as far as it
    goes.
    """
    kept = [d for d, item in enumerate(items) if isinstance(item, slice)]
    cuts: list[Cut] = [None] * x.dim()
    ends = zip(reversed(kept), reversed(b.layout(value)), strict=False)
    for d, part in ends:
        if not isinstance(part, Part):
            continue
        start, _, step = items[d].indices(x.shape[d])
        inner = [start + row * step for row in part.starts[1:-1]]
        cuts[d] = part
        if part.total != x.shape[d]:
            cuts[d] = part.cut_at([0, *inner, x.shape[d]])
    return tuple(cuts)


def _target(b: Blocks, x: Tensor, items: Sequence[Any]) -> tuple[Tensor, list[int]]:
    """Return the part of this block that is written, a view, and its dims of one row.

    A row of a dim that is cut stays a dim, which is empty on other ranks.
    """
    y = x
    dropped: list[int] = []
    for d, item in enumerate(items):
        if item is None:
            layout = b.layout(y)
            y = b.note(y.unsqueeze(d), (*layout[:d], None, *layout[d:]))
        elif isinstance(item, slice):
            start, stop, step = item.indices(b.whole(y)[d])
            y = _cut_in_place(b, y, d, start, stop, step)
        else:
            n = b.whole(y)[d]
            at = operator.index(item)
            if not -n <= at < n:
                raise IndexError(f"index {at} is out of bounds for a dim of {n} rows")
            y = _cut_in_place(b, y, d, at % n, at % n + 1, 1)
            dropped.append(d)
    return y, dropped


def _cut_in_place(
    b: Blocks, x: Tensor, d: int, start: int, stop: int, step: int
) -> Tensor:
    """Return a slice that is a view of x."""
    if isinstance(b.layout(x)[d], Fold) and (start, stop, step) != (
        0,
        b.whole(x)[d],
        1,
    ):
        raise no_exact_form(
            "__setitem__", f"dim {d} is folded", "Write before reshaping."
        )
    return cut_slice(b, x, d, start, stop, step)


def _aligned(
    b: Blocks, value: Tensor, dropped: Sequence[int], target: Tensor, x: Tensor
) -> Tensor:
    """Return what is written, cut as where it is written to."""
    layout, whole = b.layout(target), b.whole(target)
    kept = [d for d in range(target.dim()) if d not in dropped]
    shape = b.whole(value)
    # torch drops leading dims of one row
    while len(shape) > len(kept):
        value = row(b, value, 0, 0)
        shape = b.whole(value)
    want: list[Cut] = []
    for d, n in zip(kept[len(kept) - len(shape) :], shape, strict=True):
        want.append(layout[d] if n == whole[d] else None)
    value = b.vary(b.relayout(value, tuple(want)), b.axes_of(x))
    value = value[(None,) * (len(kept) - len(shape))]
    for d in dropped:
        value = value.unsqueeze(d)
    return value
