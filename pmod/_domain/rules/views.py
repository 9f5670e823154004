"""Views: dims change places, are split and joined; nothing moves but where it must."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pmod._domain.blocks import Blocks
from pmod._domain.layout import Cut, Fold, Layout, Part, Reshape, without
from pmod._domain.layout import reshape as reshape_of
from pmod._domain.refusals import along_cut, no_exact_form
from pmod._domain.rules.dims import Dims, dims_of, numbers
from pmod._domain.rules.table import Function, rule

# --- dims change places ---------------------------------------------------------------


@rule("permute")
def permute(b: Blocks, func: Function, x: Tensor, *dims: Any, **named: Any) -> Tensor:
    order = dims_of(numbers(dims or (named["dims"],)), x.dim())
    layout = b.layout(x)
    return b.note(x.permute(order), tuple(layout[d] for d in order))


def _swapped(layout: Layout, one: int, other: int) -> Layout:
    cuts = list(layout)
    cuts[one], cuts[other] = cuts[other], cuts[one]
    return tuple(cuts)


@rule("transpose", "swapaxes", "swapdims")
def transpose(b: Blocks, func: Function, x: Tensor, *dims: int, **named: int) -> Tensor:
    one, other = (*dims, *named.values())
    return b.note(x.transpose(one, other), _swapped(b.layout(x), one, other))


@rule("t")
def transposed(b: Blocks, func: Function, x: Tensor) -> Tensor:
    return b.note(x.t(), b.layout(x)[::-1])


@rule("adjoint")
def adjoint(b: Blocks, func: Function, x: Tensor) -> Tensor:
    return b.note(x.adjoint(), _swapped(b.layout(x), -1, -2))


def turned(b: Blocks, func: Function, x: Tensor) -> Tensor:
    """Read x.T, x.mT, x.H or x.mH."""
    what = getattr(getattr(func, "__self__", None), "__name__", "")
    layout = b.layout(x)
    after = layout[::-1] if what == "T" else _swapped(layout, -1, -2)
    return b.note(func(x), after)


@rule("movedim", "moveaxis")
def movedim(
    b: Blocks, func: Function, x: Tensor, source: Any, destination: Any
) -> Tensor:
    # where each dim goes is read off a tensor of as many dims, each of its own length
    shape = (
        torch.empty(0).expand(0).new_empty(list(range(2, x.dim() + 2)), device="meta")
    )
    order = [n - 2 for n in shape.movedim(source, destination).shape]
    layout = b.layout(x)
    return b.note(x.permute(order), tuple(layout[d] for d in order))


@rule("unsqueeze")
def unsqueeze(b: Blocks, func: Function, x: Tensor, dim: int) -> Tensor:
    (d,) = dims_of(dim, x.dim() + 1)
    layout = b.layout(x)
    return b.note(x.unsqueeze(d), (*layout[:d], None, *layout[d:]))


@rule("squeeze")
def squeeze(b: Blocks, func: Function, x: Tensor, *dim: Any, **named: Any) -> Tensor:
    given: Dims = named.get("dim", numbers(dim) if dim else None)
    shape = b.whole(x)
    dims = [d for d in dims_of(given, x.dim()) if shape[d] == 1]
    for d in dims:
        x = b.unshard(x, d)
    return b.note(x.squeeze(dims), without(b.layout(x), dims))


@rule("diagonal")
def diagonal(
    b: Blocks, func: Function, x: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Tensor:
    dims, layout = dims_of([dim1, dim2], x.dim()), b.layout(x)
    for d in dims:
        if layout[d] is not None:
            raise along_cut("diagonal", d)
    return b.note(x.diagonal(offset, *dims), (*without(layout, dims), None))


@rule("view_as_real")
def view_as_real(b: Blocks, func: Function, x: Tensor) -> Tensor:
    # the gradient of nothing may have any strides, and torch asks for 1
    y = func(x) if x.numel() else torch.stack([x.real, x.imag], -1)
    return b.note(y, (*b.layout(x), None))


@rule("view_as_complex")
def view_as_complex(b: Blocks, func: Function, x: Tensor) -> Tensor:
    layout = b.layout(x)
    if layout[-1] is not None:
        raise along_cut("view_as_complex", x.dim() - 1)
    if not x.numel():
        # the strides of nothing may be any, and torch asks for 1
        return b.note(torch.complex(x.select(-1, 0), x.select(-1, 1)), layout[:-1])
    return b.note(func(x), layout[:-1])


# --- rows repeated --------------------------------------------------------------------


@rule("expand", "broadcast_to", "expand_copy")
def expand(b: Blocks, func: Function, x: Tensor, *size: Any, **named: Any) -> Tensor:
    sizes = numbers(size or (named["size"],))
    new = len(sizes) - x.dim()
    shape = b.whole(x)
    for d, n in enumerate(shape):
        if n == 1 and sizes[new + d] not in (1, -1):
            # one row that a rank has, and all need
            x = b.unshard(x, d)
    layout: Layout = (*(None,) * new, *b.layout(x))
    for d, cut in enumerate(layout):
        if cut is None:
            continue
        if sizes[d] not in (-1, cut.total):
            raise no_exact_form("expand", f"dim {d} has {cut.total} rows", "Pass -1.")
        sizes[d] = -1
    return b.note(x.expand(sizes), layout)


@rule("expand_as")
def expand_as(b: Blocks, func: Function, x: Tensor, other: Tensor) -> Tensor:
    return expand(b, func, x, b.whole(other))


@rule("repeat", "tile")
def repeat(b: Blocks, func: Function, x: Tensor, *counts: Any, **named: Any) -> Tensor:
    times = numbers(counts or tuple(named.values()))
    times = [1] * (x.dim() - len(times)) + times
    new = len(times) - x.dim()
    layout: Layout = (*(None,) * new, *b.layout(x))
    for d, cut in enumerate(layout):
        if cut is not None and times[d] != 1:
            right = "Use torch.cat of copies, or repeat_interleave."
            raise along_cut("repeat", d - new, right)
    return b.note(x.repeat(times), layout)


@rule("repeat_interleave")
def repeat_interleave(
    b: Blocks,
    func: Function,
    x: Tensor,
    repeats: int | Tensor | None = None,
    dim: int | None = None,
    *,
    output_size: int | None = None,
) -> Tensor:
    if not isinstance(repeats, int) or dim is None:
        right = "Pass one number, and a dim."
        raise no_exact_form("repeat_interleave", "a block repeats its own rows", right)
    (d,) = dims_of(dim, x.dim())
    x = b.plain(x, [d])
    layout, part = b.layout(x), b.layout(x)[d]
    cuts = list(layout)
    if isinstance(part, Part):
        cuts[d] = part.times(repeats)
    return b.note(x.repeat_interleave(repeats, d), tuple(cuts))


# --- dims split and joined ------------------------------------------------------------


def filled_in(shape: Sequence[int], count: int) -> tuple[int, ...]:
    """Return a shape in which -1 stands for what is left of so many elements."""
    if -1 not in shape:
        return tuple(shape)
    known = -math.prod(shape)
    rest = count // known if known else 0
    sizes = list(shape)
    sizes[sizes.index(-1)] = rest
    return tuple(sizes)


def reshaped(b: Blocks, name: str, x: Tensor, target: Sequence[int]) -> Tensor:
    """Return x with the dims of the whole split and joined."""
    shape = b.whole(x)
    to = filled_in(target, math.prod(shape))
    if math.prod(to) != math.prod(shape):
        right = f"Pass a shape of {math.prod(shape)} elements."
        raise no_exact_form(name, f"{shape} does not have the elements of {to}", right)
    if 0 in shape:
        # nothing is in it
        for d in range(x.dim()):
            x = b.unshard(x, d)
        return b.note(x.reshape(to), (None,) * len(to))
    plan = reshape_of(b.layout(x), shape, to)
    if plan is None:
        cut = [d for d, of in enumerate(b.layout(x)) if of is not None]
        why = f"from {shape} to {to}, dims {cut} are cut and would be split unevenly"
        right = "Split a dim into factors of it, or cut another dim."
        raise no_exact_form(name, why, right)
    return _carried_out(b, x, plan, to)


def _carried_out(b: Blocks, x: Tensor, plan: Reshape, to: Sequence[int]) -> Tensor:
    held = [b.rows(cut, n) for cut, n in zip(plan.opened, plan.lengths, strict=True)]
    if any(isinstance(cut, Fold) for cut in b.layout(x)) or plan.one_row or plan.recut:
        x = b.note(x.reshape(held), plan.opened)
    for d in plan.one_row:
        x = b.unshard(x, d)
    for d, part in plan.recut:
        x = b.recut(x, d, part)
    rows = [b.rows(cut, n) for cut, n in zip(plan.layout, to, strict=True)]
    return b.note(x.reshape(rows), plan.layout)


@rule("view", "reshape")
def view(b: Blocks, func: Function, x: Tensor, *shape: Any, **named: Any) -> Tensor:
    given = shape or tuple(named.values())
    if isinstance(given[0], torch.dtype):
        if given[0].itemsize != x.dtype.itemsize:
            right = "Use view_as_real or view_as_complex."
            raise no_exact_form("view", "of a dtype of another size", right)
        return b.note(x.view(given[0]), b.layout(x))
    return reshaped(b, func.__name__, x, numbers(given))


@rule("view_as", "reshape_as")
def view_as(b: Blocks, func: Function, x: Tensor, other: Tensor) -> Tensor:
    return reshaped(b, func.__name__, x, b.whole(other))


@rule("flatten", "ravel")
def flatten(
    b: Blocks, func: Function, x: Tensor, start_dim: int = 0, end_dim: int = -1
) -> Tensor:
    (first,), (last,) = dims_of(start_dim, x.dim()), dims_of(end_dim, x.dim())
    shape = b.whole(x)
    inside = math.prod(shape[first : last + 1])
    return reshaped(b, "flatten", x, [*shape[:first], inside, *shape[last + 1 :]])


@rule("unflatten", outer=True)
def unflatten(
    b: Blocks, func: Function, x: Tensor, dim: int, sizes: Sequence[int], *names: object
) -> Tensor:
    (d,) = dims_of(dim, x.dim())
    shape = b.whole(x)
    inside = filled_in(sizes, shape[d])
    return reshaped(b, "unflatten", x, [*shape[:d], *inside, *shape[d + 1 :]])


@rule("unbind")
def unbind(b: Blocks, func: Function, x: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    (d,) = dims_of(dim, x.dim())
    layout = b.layout(x)
    if layout[d] is not None:
        n = b.whole(x)[d]
        return tuple(b.owned_row(x, d, i) for i in range(n))
    return tuple(b.note(y, without(layout, [d])) for y in x.unbind(d))


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def pixel_shuffle(b: Blocks, func: Function, x: Tensor, factor: int) -> Tensor:
    name, shape = func.__name__, b.whole(x)
    lead, (c, h, w) = shape[:-3], shape[-3:]
    n, k = len(lead), factor
    if b.layout(x)[-3] is not None:
        raise along_cut(name, x.dim() - 3, "Cut its rows and columns.")
    if name == "channel_shuffle":
        y = reshaped(b, name, x, [*shape[:1], k, shape[1] // k, *shape[2:]])
        y = transpose(b, func, y, 1, 2)
        return reshaped(b, name, y, shape)
    kept = list(range(n))
    if name == "pixel_shuffle":
        y = reshaped(b, name, x, [*lead, c // k**2, k, k, h, w])
        order = [*kept, n, n + 3, n + 1, n + 4, n + 2]
        return reshaped(
            b, name, permute(b, func, y, order), [*lead, c // k**2, h * k, w * k]
        )
    y = reshaped(b, name, x, [*lead, c, h // k, k, w // k, k])
    order = [*kept, n, n + 2, n + 4, n + 1, n + 3]
    return reshaped(
        b, name, permute(b, func, y, order), [*lead, c * k**2, h // k, w // k]
    )


def cut_along(b: Blocks, x: Tensor, d: int) -> Cut:
    """Return how a dim is cut."""
    return b.layout(x)[d]
