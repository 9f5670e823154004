"""Attention: a rank has its own queries, and all keys that they look at."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pmod._domain.blocks import Blocks, label_of
from pmod._domain.layout import Cut, Layout, Part, axes_of, with_cut
from pmod._domain.refusals import no_exact_form
from pmod._domain.rules.table import Function, rule
from pmod.nn.functional import scaled_dot_product_attention as ring_attention

NAME = "scaled_dot_product_attention"


@rule(NAME)
def attention(
    b: Blocks,
    func: Function,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p:
        raise no_exact_form(NAME, "with dropout", "Pass dropout_p=0, or eval().")
    if any([b.layout(x)[-1] for x in (query, key, value)]) and not enable_gqa:
        # the weights of this rank's queries and all keys are held at once
        spelled = partial(spelled_out, query, key, value, attn_mask, is_causal, scale)
        return b.follow(spelled)
    batch = _batch(b, query, key, value)
    named: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    tokens = b.layout(query)[-2]
    if tokens is None:
        tokens = b.layout(key)[-2]
        if tokens is not None and {*tokens.axes} & axes_of(batch):
            tokens = None
        if tokens is not None:
            # a rank does its share of the queries
            query, tokens = _shared(b, query, tokens)
    layout: Layout = (*batch, tokens, None)
    axes = axes_of(layout)
    ring = _ring(b, layout, key, value, attn_mask)
    if ring is not None:
        return b.note(
            _around(b, ring, (query, key, value), layout, is_causal, named, attn_mask),
            layout,
        )
    q = b.vary(b.relayout(query, layout), axes)
    keys = [_whole_rows(b, x, batch, axes) for x in (key, value)]
    mask = _mask(b, q, keys[0], layout, attn_mask, is_causal, axes)
    k, v = keys
    if not q.shape[-2]:
        # no query here, but every rank takes part in sending gradients back
        y = q[..., :1].expand(*q.shape[:-1], v.shape[-1]) + (k.sum() + v.sum()) * 0
        return b.note(y, layout)
    return b.note(func(q, k, v, mask, 0.0, False, **named), layout)


def spelled_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """Return attention as torch documents it, from products and a softmax."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.mT * factor
    if is_causal:
        rows = torch.arange(query.shape[-2], device=query.device)
        mask = torch.arange(key.shape[-2], device=query.device) <= rows[:, None]
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ value


def _ring(
    b: Blocks, layout: Layout, key: Tensor, value: Tensor, mask: Tensor | None
) -> Part | None:
    """Return how tokens are cut as one run for each rank, where keys are cut as queries.

    The tokens of a folded dim are not in their order then, which without a mask nothing
    asks for.
    """
    tokens = layout[-2]
    for x in (key, value):
        if tokens is None or b.layout(x)[-2] != tokens:
            return None
        if b.layout(x)[:-2] != layout[:-2]:
            return None
    if isinstance(tokens, Part):
        return tokens
    assert tokens is not None
    if mask is not None:
        return None
    held = [1]
    for length, part in zip(tokens.lengths, tokens.parts, strict=True):
        sizes = (length,) if part is None else part.sizes
        held = [before * size for before in held for size in sizes]
    return Part(tokens.axes, tuple(held))


def _around(
    b: Blocks,
    part: Part,
    tensors: tuple[Tensor, Tensor, Tensor],
    layout: Layout,
    is_causal: bool,
    named: dict[str, Any],
    mask: Tensor | None,
) -> Tensor:
    """Return attention by a ring: blocks of keys and values go around."""
    if is_causal and not isinstance(layout[-2], Part):
        right = "Flatten the field before it is cut."
        raise no_exact_form(NAME, "causal over a folded dim", right)
    axes = axes_of(layout)
    query, key, value = [b.vary(x, axes) for x in tensors]
    if mask is not None:
        want: list[Cut] = [None] * mask.dim()
        for d in range(2, mask.dim() + 1):
            if b.whole(mask)[-d] > 1 and d <= len(layout):
                want[-d] = layout[-d]
        mask = b.vary(b.relayout(mask, tuple(want)), axes)
    return ring_attention(
        query,
        key,
        value,
        mask,
        0.0,
        is_causal,
        **named,
        axis=label_of(part.axes),
        sizes=part.sizes,
    )


def _batch(b: Blocks, *xs: Tensor) -> Layout:
    """Return how batch and heads are cut: alike, or not in one of them."""
    n = xs[0].dim()
    if any(x.dim() != n for x in xs):
        right = "Pass query, key and value of as many dims."
        raise no_exact_form(NAME, "their numbers of dims differ", right)
    cuts: list[Cut] = [None] * (n - 2)
    for d in range(n - 2):
        for x in xs:
            cut = b.layout(x)[d]
            if cuts[d] is None and cut is not None and b.whole(x)[d] > 1:
                cuts[d] = cut
            if len({b.whole(y)[d] for y in xs}) > 1 and cut is not None:
                right = "Cut the tokens, or the batch."
                raise no_exact_form(NAME, f"dim {d} is cut and broadcast", right)
    return tuple(cuts)


def _shared(b: Blocks, query: Tensor, tokens: Cut) -> tuple[Tensor, Part]:
    """Return whole queries cut over the axes that cut the keys."""
    assert tokens is not None
    n = 1
    for name in tokens.axes:
        n *= b.mesh.shape[name]
    part = Part(tokens.axes, (0,) * n).evenly(b.whole(query)[-2])
    return b.shard(query, query.dim() - 2, part), part


def _whole_rows(b: Blocks, x: Tensor, batch: Layout, axes: frozenset[str]) -> Tensor:
    """Return keys or values of all tokens, for this rank's queries."""
    own = b.layout(x)[-2]
    x = b.relayout(x, (*batch, own, None))
    if own is None:
        return b.vary(x, axes)
    at = x.dim() - 2
    if {*own.axes} <= axes:
        varies = axes_of(b.layout(x))
        y = b.gather(x, at)
        b.note(y, with_cut(b.layout(x), at, None))
        return b.varied(y, b.ordered(axes - varies))
    return b.vary(b.unshard(x, at), axes)


def _mask(
    b: Blocks,
    q: Tensor,
    k: Tensor,
    layout: Layout,
    mask: Tensor | None,
    is_causal: bool,
    axes: frozenset[str],
) -> Tensor | None:
    """Return the mask of this rank's queries."""
    tokens = layout[-2]
    if is_causal:
        first = 0
        if isinstance(tokens, Part):
            first = b.span(tokens)[0]
        elif tokens is not None:
            right = "Flatten the field before it is cut."
            raise no_exact_form(NAME, "causal over a folded dim", right)
        rows = torch.arange(q.shape[-2], device=q.device) + first
        return torch.arange(k.shape[-2], device=q.device)[None] <= rows[:, None]
    if mask is None:
        return None
    want: list[Cut] = [None] * mask.dim()
    shape = b.whole(mask)
    for d in range(1, mask.dim() + 1):
        if d != 1 and shape[-d] > 1 and d <= len(layout):
            want[-d] = layout[-d]
    return b.vary(b.relayout(mask, tuple(want)), axes)
