"""Operations element by element: what they take is cut alike first."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pmod._core.leaves import map_tensors, tensors_in
from pmod._domain import known
from pmod._domain.blocks import Blocks
from pmod._domain.layout import Layout, Part
from pmod._domain.refusals import no_exact_form
from pmod._domain.rules.table import Function, rule
from pmod._torch import base_of, is_memory_shared


def pointwise(b: Blocks, func: Function, *args: Any, **kwargs: Any) -> Any:
    """Run an operation element by element."""
    xs = tensors_in((args, kwargs))
    if not any([b.is_cut(x) for x in xs]):
        y = func(*args, **kwargs)
        for x in tensors_in(y):
            known.note(x, known.WHOLE)
        return y
    if len(xs) == 1:
        layout = b.layout(xs[0])
    else:
        alike, layout = b.common(xs)
        left = iter(alike)
        args, kwargs = map_tensors(lambda _: next(left), (args, kwargs))
    y = func(*args, **kwargs)
    for x in tensors_in(y):
        b.note(x, layout)
    return y


def in_place(b: Blocks, func: Function, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run an operation that changes its first tensor element by element."""
    others = tensors_in((args, kwargs))
    cut = [of for of in others if b.is_cut(of)]
    if cut and not b.is_cut(x):
        become(b, x, b.common([x, *others], 1 + _place(others, cut[0]))[1], func)
    if not b.is_cut(x):
        func(x, *args, **kwargs)
        return x
    (first, *rest), layout = b.common([x, *others])
    if first is not x or layout != b.layout(x):
        right = "Write y = x + ... in place of x += ..."
        why = "what is written is cut unlike what it is written to"
        raise no_exact_form(func.__name__, why, right)
    left = iter(rest)
    args, kwargs = map_tensors(lambda _: next(left), (args, kwargs))
    func(x, *args, **kwargs)
    return x


def _place(xs: list[Tensor], x: Tensor) -> int:
    return [of is x for of in xs].index(True)


def become(b: Blocks, x: Tensor, layout: Layout, func: Function) -> None:
    """Make one value a block, in place, so that a block can be written into it.

    So zeros that are made to be filled become a block of zeros.
    """
    is_seen = base_of(x) is not None or is_memory_shared(x)
    if x.requires_grad or is_seen or len(layout) != x.dim():
        why = "a block is written into one value that has a derivative or views"
        right = "Write into a tensor that is made of zeros, or of the field itself."
        raise no_exact_form(func.__name__, why, right)
    y = x.detach()
    for d, cut in enumerate(layout):
        if isinstance(cut, Part):
            first, end = b.span(cut)
            y = y.narrow(d, first, end - first)
        elif cut is not None:
            raise no_exact_form(
                func.__name__, f"dim {d} is folded", "Write before the reshape."
            )
    x.data = y.clone()
    b.note(x, layout)


@rule("where")
def where(b: Blocks, func: Function, *args: Any, **kwargs: Any) -> Any:
    if len(args) + len(kwargs) < 2:
        right = "Pass all three arguments, or multiply by the mask."
        raise no_exact_form("where", "how many it finds depends on the rank", right)
    return pointwise(b, func, *args, **kwargs)


@rule("type")
def type_of(b: Blocks, func: Function, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not args and not kwargs:
        return func(x)
    return pointwise(b, func, x, *args, **kwargs)


@rule("to", "type_as")
def moved(b: Blocks, func: Function, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Give x another dtype or device; another tensor says only which."""
    return b.note(func(x, *args, **kwargs), b.layout(x))


@rule("prelu")
def prelu(b: Blocks, func: Function, x: Tensor, weight: Tensor) -> Tensor:
    if weight.numel() > 1 and x.dim() > 1 and b.layout(x)[1] is not None:
        raise no_exact_form("prelu", "its channels are cut", "Cut other dims.")
    y = func(x, b.vary(weight, b.axes_of(x)))
    return b.note(y, b.layout(x))
