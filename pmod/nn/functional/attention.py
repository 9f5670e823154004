"""Attention over a sequence that is cut: a ring of keys and values.

Each rank has queries, keys and values of its own rows. Keys and values pass from rank
to rank, in one message, while the block that is here is attended to; what the blocks
give is joined by the running maximum and sum of a softmax. The scores of one block are
in memory at a time: backward computes them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pmod._core.arguments import (
    as_real,
    check_flag,
    check_own_size,
    check_sizes,
    check_tensor,
    wrong,
)
from pmod._core.bind import started
from pmod._core.start import start
from pmod._errors import ArgumentError, ShapeError, quoted
from pmod._mesh.axis import Axis
from pmod._torch import (
    are_transforms_active,
    count_dispatch_modes,
    count_function_modes,
)
from pmod.nn.functional.given import (
    Along,
    Axes,
    Held,
    Sizes,
    Spread,
    bound,
    check_choice,
    check_flags,
    check_kind,
    cuts_told,
    held_of,
)
from pmod.nn.functional.links import largest, shifted, tied, total
from pmod.nn.functional.windows import begins, fetch

T = TypeVar("T")

Mask: TypeAlias = Tensor | Callable[[Tensor, Tensor], Tensor]
"""A tensor, or a function of the positions of queries and of keys."""

_ROWS = Along(
    (-2,), "that of the sequence", "Pass -2; heads and batch are torch's own."
)


class _Run(NamedTuple):
    """Rows of a rank that are rows of the whole one after another."""

    at: int
    """Where they begin in the rank's rows."""
    start: int
    """Where they begin in the whole."""
    rows: int


def _runs(sizes: tuple[int, ...], zigzag: bool) -> list[list[_Run]]:
    """Return the runs of every rank."""
    if not zigzag:
        starts = begins(sizes)[:-1]
        return [[_Run(0, first, n)] for first, n in zip(starts, sizes, strict=True)]
    # the first halves in the order of the ranks, then the second ones the other way
    halves = [(n + 1) // 2 for n in sizes]
    rest = [n - half for n, half in zip(sizes, halves, strict=True)]
    firsts = [0, *accumulate(halves)]
    lasts = [firsts[-1], *accumulate(reversed(rest), initial=firsts[-1])][1:-1]
    out: list[list[_Run]] = []
    for rank, (half, more) in enumerate(zip(halves, rest, strict=True)):
        second = _Run(half, lasts[len(sizes) - 1 - rank], more)
        out.append([_Run(0, firsts[rank], half), second])
    return out


class _Call(NamedTuple):
    """What every block is attended to with."""

    mask: Mask | None
    is_causal: bool
    scale: float
    repeats: int
    """How many heads of queries share one of keys."""


class _Sums(NamedTuple):
    """Of some queries: what a softmax over all blocks so far is made of."""

    values: Tensor
    weights: Tensor
    top: Tensor
    """The largest score, which cancels: it has no derivative."""


def _mask_of(call: _Call, q: _Run, k: _Run, like: Tensor) -> Tensor | None:
    """Return the part of the mask for a block, or None if all is to be seen."""
    rows = torch.arange(q.start, q.start + q.rows, device=like.device).unsqueeze(-1)
    columns = torch.arange(k.start, k.start + k.rows, device=like.device).unsqueeze(0)
    mask: Tensor | None = None
    if isinstance(call.mask, Tensor):
        mask = call.mask
        # one row or one column is for all
        if mask.shape[-1] != 1:
            mask = mask.narrow(-1, k.start, k.rows)
        if mask.dim() > 1 and mask.shape[-2] != 1:
            mask = mask.narrow(-2, q.at, q.rows)
    elif call.mask is not None:
        mask = call.mask(rows, columns)
    if not call.is_causal or k.start + k.rows - 1 <= q.start:
        return mask
    past = columns <= rows
    if mask is None:
        return past
    if mask.dtype == torch.bool:
        return mask & past
    return mask.masked_fill(~past, -torch.inf)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, repeats: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a block's sum of weighted values, its sum of weights, its largest score."""
    if repeats > 1:
        k = k.repeat_interleave(repeats, -3)
        v = v.repeat_interleave(repeats, -3)
    scores = (q * scale) @ k.transpose(-2, -1)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    top = scores.detach().amax(-1, keepdim=True)
    # where all is masked every weight is 0
    top = top.clamp(min=torch.finfo(top.dtype).min)
    weights = (scores - top).exp()
    return weights @ v, weights.sum(-1, keepdim=True), top


def recomputed(f: Callable[..., T], *args: Any) -> T:
    """Run f, whose intermediate results backward computes again where that can be."""
    is_seen = torch.compiler.is_compiling() or are_transforms_active()
    if is_seen or not torch.is_grad_enabled():
        return f(*args)
    # a mode would see it happen twice
    if count_dispatch_modes() > 0 or count_function_modes() > 0:
        return f(*args)
    again = cast(Any, checkpoint)
    return again(f, *args, use_reentrant=False, preserve_rng_state=False)


def _joined(sums: _Sums, block: tuple[Tensor, Tensor, Tensor]) -> _Sums:
    values, weights, top = block
    both = torch.maximum(sums.top, top)
    before, now = (sums.top - both).exp(), (top - both).exp()
    return _Sums(
        sums.values * before + values * now,
        sums.weights * before + weights * now,
        both,
    )


def _nothing(q: Tensor, k: Tensor, v_dim: int, repeats: int) -> _Sums:
    """Return the sums over no block."""
    heads = list(k.shape[:-2])
    if repeats > 1:
        heads[-1] = heads[-1] * repeats
    shape = torch.broadcast_shapes(q.shape[:-2], heads)
    return _Sums(
        q.new_zeros((*shape, q.shape[-2], v_dim)),
        q.new_zeros((*shape, q.shape[-2], 1)),
        q.new_full((*shape, q.shape[-2], 1), torch.finfo(q.dtype).min),
    )


def _tied(sums: _Sums, other: Tensor) -> _Sums:
    return sums._replace(values=tied(sums.values, other))


def _quotient(sums: _Sums, dtype: torch.dtype) -> Tensor:
    # a query that sees nothing has zeros, as torch gives them
    weights = sums.weights.masked_fill(sums.weights == 0, 1.0)
    return (sums.values / weights).to(dtype)


# --- what a call is given -------------------------------------------------------------


class _Tensors(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor


def _check_tensors(function: str, given: _Tensors, of: Axis, grouped: bool) -> int:
    """Raise unless the tensors fit; return how many heads share one of keys."""
    for name, x in zip(("query", "key", "value"), given, strict=True):
        check_tensor(x, function, of, name=name)
        check_kind(x, "floating", function, of, name=name)
        if x.dim() < 2:
            said = f"{name} is {tuple(x.shape)}"
            right = "Pass (..., rows, features)."
            raise wrong(ShapeError, function, of, said, right)
    q, k, v = given
    shapes = f"query is {tuple(q.shape)}, key {tuple(k.shape)}, value {tuple(v.shape)}"
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        said = f"query is {q.dtype}, key {k.dtype}, value {v.dtype}"
        right = "Pass tensors of one dtype, on one device."
        raise wrong(ArgumentError, function, of, said, right)
    if q.shape[-1] != k.shape[-1] or k.shape[:-1] != v.shape[:-1]:
        right = "Pass as many features of query and key, and keys and values alike."
        raise wrong(ShapeError, function, of, shapes, right)
    if not grouped:
        return 1
    heads = (q.shape[-3], k.shape[-3]) if min(q.dim(), k.dim()) > 2 else (1, 0)
    if heads[1] < 1 or heads[0] % heads[1]:
        right = "Pass heads of queries that those of keys divide."
        raise wrong(ShapeError, function, of, shapes, right)
    return int(heads[0]) // int(heads[1])


def _check_mask(function: str, mask: object, rows: int, columns: int, of: Axis) -> None:
    if mask is None or (callable(mask) and not isinstance(mask, Tensor)):
        return
    check_tensor(mask, function, of, name="attn_mask")
    assert isinstance(mask, Tensor)
    check_kind(mask, "of numbers", function, of, name="attn_mask")
    shape = mask.shape[-2:]
    fits = len(shape) == 2 and shape[0] in (1, rows) and shape[1] in (1, columns)
    if not fits:
        said = f"attn_mask is {tuple(mask.shape)} and the whole has {columns} keys"
        right = f"Pass (..., {rows}, {columns}): this rank's queries, the whole's keys."
        raise wrong(ShapeError, function, of, said, right)


def _told_by_queries(
    function: str, q: Tensor, sizes: object, k: Tensor, of: Axis, *, needed: bool
) -> tuple[int, ...] | None:
    """Return the lengths of the queries' shards; None if they are those of the keys."""
    if sizes is not None:
        told = check_sizes(cast(Any, sizes), function, of, name="query_sizes")
        right = "Pass the length of each rank's queries."
        check_own_size(q, -2, told, function, of, right)
        return told
    if needed and q.shape[-2] != k.shape[-2]:
        said = f"this rank has {q.shape[-2]} queries and {k.shape[-2]} keys"
        right = "Pass query_sizes, where queries are cut otherwise than keys."
        raise wrong(ShapeError, function, of, said, right)
    return None


# --- the ring -------------------------------------------------------------------------


class _Both(NamedTuple):
    """The runs of every rank."""

    queries: list[list[_Run]]
    keys: list[list[_Run]]


def _ring(given: _Tensors, call: _Call, held: Held, runs: _Both) -> Tensor:
    """Return what this rank's queries see of all blocks."""
    q, k, v = given
    wide = _wide(q)
    features, n = k.shape[-1], held.axis.size
    block, lengths = torch.cat([k, v], -1), held.sizes
    own = runs.queries[held.axis.index]
    sums: list[_Sums] = []
    for run in own:
        part = wide.narrow(-2, run.at, run.rows)
        sums.append(_nothing(part, k, v.shape[-1], call.repeats))
    # a rank that sees nothing uses what the others use, all the same
    sums[0] = _tied(sums[0], q)
    if isinstance(call.mask, Tensor):
        sums[0] = _tied(sums[0], call.mask)
    for step in range(n):
        owner = (held.axis.index - step) % n
        # the next block is under way while this one is attended to
        coming = None
        if step < n - 1:
            coming = _sent(block, held.axis, lengths)
        here, used = _wide(block), False
        for i, run in enumerate(own):
            for seen in runs.keys[owner]:
                if _sees(call, run, seen):
                    sums[i] = _joined(
                        sums[i], _of_runs(wide, here, features, call, run, seen)
                    )
                    used = True
        if not used:
            sums[0] = _tied(sums[0], block)
        if coming is not None:
            block, lengths = coming()
    return torch.cat([_quotient(one, q.dtype) for one in sums], -2)


def _wide(x: Tensor) -> Tensor:
    """Return x in the dtype that is computed in."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _sees(call: _Call, q: _Run, k: _Run) -> bool:
    """Whether any of these queries sees any of these keys."""
    if not q.rows or not k.rows:
        return False
    return not call.is_causal or k.start <= q.start + q.rows - 1


def _of_runs(
    q: Tensor, block: Tensor, features: int, call: _Call, run: _Run, seen: _Run
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend with one run of queries to one run of keys."""
    queries = q.narrow(-2, run.at, run.rows)
    rows = block.narrow(-2, seen.at, seen.rows)
    keys, values = rows.split([features, rows.shape[-1] - features], -1)
    mask = _mask_of(call, run, seen, q)
    return recomputed(_attend, queries, keys, values, mask, call.scale, call.repeats)


_Arrival: TypeAlias = Callable[[], tuple[Tensor, tuple[int, ...]]]


def _sent(block: Tensor, axis: Axis, lengths: tuple[int, ...]) -> _Arrival:
    """Send a block to the next rank; what is returned waits for the one that comes."""
    # who starts the whole call runs it twice, and finds what was sent then
    if torch.compiler.is_compiling() or started.by is not None:
        here = shifted(block, -2, axis, lengths)
        return lambda: here
    return start(shifted, block, -2, axis, lengths).wait


def _over_all(given: _Tensors, call: _Call, held: Held, runs: _Both) -> Tensor:
    """Return what queries that all ranks have see: each rank's block, then their sum."""
    q, k, v = given
    wide = _wide(q)
    sums = _nothing(wide, k, v.shape[-1], call.repeats)
    block = _wide(torch.cat([k, v], -1))
    # a rank without a key uses what the others use, all the same
    sums = _tied(sums, q)
    if isinstance(call.mask, Tensor):
        sums = _tied(sums, call.mask)
    run = _Run(0, 0, int(q.shape[-2]))
    for seen in runs.keys[held.axis.index]:
        if _sees(call, run, seen):
            sums = _joined(sums, _of_runs(wide, block, k.shape[-1], call, run, seen))
    top = largest(sums.top, held.axis)
    now = (sums.top - top).exp()
    sums = _tied(sums, block)
    # as one tensor: on every rank derivatives then take the same way back
    parts = torch.cat([sums.values * now, sums.weights * now], -1)
    values, weights = total(parts, held.axis).split([v.shape[-1], 1], -1)
    return _quotient(_Sums(values, weights, top), q.dtype)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Mask | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
    query_sizes: Sequence[int] | None = None,
    queries: str = "cut",
    zigzag: bool = False,
) -> Tensor:
    """Return this rank's rows of torch's attention over a sequence that is cut.

    query, key and value are cut along their rows, dim -2; sizes: the lengths of the
    shards of key and value. query_sizes: those of the query where they are others and
    positions matter. attn_mask: this rank's queries by the keys of the whole, (..., L,
    S); or a function of positions, whose tensors are (L, 1) and (1, S), so that no rank
    has a whole row. queries="whole": every rank has the same query, and the result is
    one value. zigzag: the rows are those that `zigzag` gives, so that causal work is as
    much on every rank.

    V -> V. Of a whole query V -> I. Shapes: query (..., l, e), key (..., s, e), value
    (..., s, f) -> (..., l, f).
    Cost: n - 1 messages of a block of keys and values each, forward and backward; they
    are under way while a block is attended to, forward. The scores of one block are in
    memory at a time, and for backward the keys and values of all blocks are kept. Of a
    whole query: its result, its weights and their largest, in two messages.
    Raises: ShapeError for shapes or sizes that do not fit; ArgumentError for dropout,
    which would differ from torch's.

    >>> def attend():
    ...     x = pmod.shard(torch.eye(4)[None], "x", dim=-2)
    ...     y = pmod.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True, axis="x")
    ...     return y[0, 0].round(decimals=2)
    >>> pmod.simulate(attend, x=2)
    [tensor([1., 0., 0., 0.]), tensor([0.2700, 0.2700, 0.4500, 0.0000])]
    """
    function = "nn.functional.scaled_dot_product_attention"
    spread = Spread(axis, dim, sizes)
    bounds = bound(function, spread, -2)
    of = bounds[0][1]
    given = _Tensors(query, key, value)
    check_flags(function, enable_gqa=enable_gqa, is_causal=is_causal, zigzag=zigzag)
    repeats = _check_tensors(function, given, of, bool(enable_gqa))
    check_choice(queries, "queries", ("cut", "whole"), function, of)
    if as_real(dropout_p) != 0:
        said = f"dropout_p is {quoted(dropout_p)}"
        right = "Pass 0: blocks would draw other numbers than the whole."
        raise wrong(ArgumentError, function, of, said, right)
    factor = query.shape[-1] ** -0.5 if scale is None else as_real(scale)
    if factor is None:
        said = f"scale is {quoted(scale)}"
        raise wrong(ArgumentError, function, of, said, "Pass a number, or None.")
    cuts = cuts_told(function, spread, bounds)
    is_whole, told = queries == "whole", None
    if not is_whole:
        needed = bool(is_causal) or attn_mask is not None
        told = _told_by_queries(function, query, query_sizes, key, of, needed=needed)
    (held,) = held_of(function, cuts, key, _ROWS).values()
    _check_mask(function, attn_mask, int(query.shape[-2]), held.total, of)
    call = _Call(attn_mask, bool(is_causal), float(factor), repeats)
    by_queries = held.sizes if told is None else told
    runs = _Both(_runs(by_queries, bool(zigzag)), _runs(held.sizes, bool(zigzag)))
    if is_whole:
        return _over_all(given, call, held, runs)
    return _ring(given, call, held, runs)


# --- a cut that is balanced -----------------------------------------------------------


def zigzag(
    input: Tensor,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
    back: bool = False,
) -> Tensor:
    """Return the rows that balance causal attention: early and late ones on each rank.

    The sequence is in 2n pieces, of which rank r gets piece r and piece 2n - 1 - r.
    back: from there to one run of rows for each rank. Positions are taken along: what
    depends on them is computed before, or moved in the same way. dim: -2, unless given.

    V -> V. Shapes: input (..., k, ...) -> the same.
    Cost: each row that changes its rank, once; two exchanges.
    Raises: ShapeError for a dim or sizes that do not fit.

    >>> def order():
    ...     x = pmod.shard(torch.arange(8), "x")
    ...     return pmod.nn.functional.zigzag(x, axis="x", dim=0)
    >>> pmod.simulate(order, x=2)
    [tensor([0, 1, 6, 7]), tensor([2, 3, 4, 5])]
    """
    function = "nn.functional.zigzag"
    spread = Spread(axis, dim, sizes)
    bounds = bound(function, spread, -2)
    check_tensor(input, function, bounds[0][1], name="input")
    check_flag(back, function, "back")
    (cut,) = cuts_told(function, spread, bounds)
    along = Along(tuple(range(-input.dim(), 0)), "", "")
    ((at, held),) = held_of(function, [cut], input, along).items()
    runs = _runs(held.sizes, True)
    if not back:
        parts: list[Tensor] = []
        for half in range(2):
            windows = [(of[half].start, of[half].start + of[half].rows) for of in runs]
            parts.append(fetch(input, at, held, _empty_at_0(windows)))
        return torch.cat(parts, at)
    return _back(input, at, held, runs)


def _empty_at_0(windows: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return windows of which those without a row are at the first."""
    out: list[tuple[int, int]] = []
    for low, high in windows:
        out.append((low, high) if low < high else (0, 0))
    return tuple(out)


def _back(x: Tensor, at: int, held: Held, runs: list[list[_Run]]) -> Tensor:
    """Return one run of rows for each rank, of two for each."""
    firsts = tuple([of[0].rows for of in runs])
    lasts = tuple([of[1].rows for of in runs])
    borders = begins(held.sizes)
    early: list[tuple[int, int]] = []
    late: list[tuple[int, int]] = []
    middle, rest = sum(firsts), sum(lasts)
    for first, end in pairwise(borders):
        low = min(first, middle)
        early.append((low, min(end, middle)))
        # the later pieces stand in the opposite order of the ranks: turned over, they
        # are a whole in the order of the ranks
        low = min(max(first - middle, 0), rest)
        high = min(max(end - middle, low), rest)
        late.append((rest - high, rest - low))
    own = runs[held.place]
    before = x.narrow(at, own[0].at, own[0].rows)
    behind = x.narrow(at, own[1].at, own[1].rows).flip(at)
    one = fetch(before, at, Held(held.axis, firsts), _empty_at_0(early))
    two = fetch(behind, at, Held(held.axis, lasts), _empty_at_0(late))
    return torch.cat([one, two.flip(at)], at)
