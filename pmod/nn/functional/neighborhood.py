"""Neighbourhood attention over a field that is cut: each point sees those around it."""

from __future__ import annotations

import torch
from torch import Tensor

from pmod._core.arguments import as_real, check_tensor, wrong
from pmod._errors import ArgumentError, ShapeError, quoted
from pmod._mesh.axis import Axis
from pmod._torch import constant_in_graphs
from pmod.nn.functional.attention import recomputed
from pmod.nn.functional.given import (
    Along,
    Axes,
    Held,
    Ints,
    Sizes,
    Spread,
    bound,
    check_kind,
    cuts_told,
    held_of,
    ints,
    shape_error,
)
from pmod.nn.functional.taps import Rows, Taps, tapped
from pmod.nn.functional.windows import Near, fetch, layout


@constant_in_graphs
def _seen(kernel: int, sizes: tuple[int, ...], place: int) -> Rows:
    """Return the rows of its window that each of a rank's rows sees."""
    rule, total = Near(kernel), sum(sizes)
    first, low = sum(sizes[:place]), 0
    out: list[tuple[int, ...]] = []
    for row in range(first, first + sizes[place]):
        begin = rule.begin(row, total)
        low = low if out else begin
        out.append(tuple(range(begin - low, begin - low + kernel)))
    return tuple(out)


def _attend(
    q: Tensor, kv: Tensor, taps: list[Rows], features: int, scale: float
) -> Tensor:
    """Return what each point sees, of windows that are here."""
    count = len(taps)
    for later, rows in enumerate(reversed(taps)):
        # each dim of what is seen stands after its own
        kv = tapped(kv, -2 - 2 * later, Taps(rows, None))
    sources = [-2 * (count - i) for i in range(count)]
    kv = kv.movedim(sources, list(range(-count - 1, -1))).flatten(-count - 1, -2)
    keys, values = kv.split([features, kv.shape[-1] - features], -1)
    scores = (keys @ (q * scale).unsqueeze(-1)).squeeze(-1)
    return (scores.softmax(-1).unsqueeze(-2) @ values).squeeze(-2)


def _neighborhood(
    given: tuple[Tensor, Tensor, Tensor],
    kernel_size: object,
    scale: object,
    spread: Spread,
    count: int,
) -> Tensor:
    """Return this rank's points of the attention of the whole."""
    function = f"nn.functional.neighborhood_attention{count}d"
    bounds = bound(function, spread, -count - 1)
    of = bounds[0][1]
    error = shape_error(function, of)
    for name, x in zip(("query", "key", "value"), given, strict=True):
        check_tensor(x, function, of, name=name)
        check_kind(x, "floating", function, of, name=name)
    q, k, v = given
    fits = q.shape == k.shape and k.shape[:-1] == v.shape[:-1]
    if not fits or q.dim() <= count or not q.dtype == k.dtype == v.dtype:
        said = (
            f"query is {tuple(q.shape)}, key {tuple(k.shape)}, value {tuple(v.shape)}"
        )
        right = f"Pass tensors of one dtype, (..., {count} dims of points, features)."
        raise error(said, right)
    factor = q.shape[-1] ** -0.5 if scale is None else as_real(scale)
    if factor is None:
        said = f"scale is {quoted(scale)}"
        raise wrong(ArgumentError, function, of, said, "Pass a number, or None.")
    kernels = ints(kernel_size, "kernel_size", count, 1, error)
    dims = dict(zip(range(-count - 1, -1), kernels, strict=True))

    def check(at: int, rows: int, of: Axis) -> None:
        if rows < dims[at]:
            said = f"the whole has {rows} rows along dim {at}, and a neighbourhood {dims[at]}"
            raise wrong(ShapeError, function, of, said, "Pass a smaller kernel_size.")

    right = f"Pass a dim from {-count - 1} to -2; heads and batch are torch's own."
    along = Along(tuple(dims), "one of the points", right)
    held = held_of(function, cuts_told(function, spread, bounds), q, along, check)
    kv = torch.cat([k, v], -1)
    taps: list[Rows] = []
    for at, kernel in dims.items():
        cut = held.get(at, Held(of, (int(q.shape[at]),)))
        kv = fetch(kv, at, cut, layout(Near(kernel), cut.sizes).windows)
        taps.append(_seen(kernel, cut.sizes, cut.place))
    return recomputed(_attend, q, kv, taps, k.shape[-1], float(factor))


def neighborhood_attention1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    scale: float | None = None,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's points of neighbourhood attention over a cut field.

    A point sees the kernel_size points around it; at the ends of the whole, the
    kernel_size nearest to the end. dim: the first of the points' dims, unless given.

    V -> V. Shapes: query, key (..., k, e), value (..., k, f) -> (...,
    k, f).
    Cost: kernel_size // 2 rows of keys and values to each neighbour, in one message.
    Raises: ShapeError for shapes, a kernel or sizes that do not fit.

    >>> def attend():
    ...     x = pmod.shard(torch.eye(4), "x")
    ...     return pmod.nn.functional.neighborhood_attention1d(x, x, x, 3, axis="x").round(decimals=2)
    >>> pmod.simulate(attend, x=2)[0]
    tensor([[0.4500, 0.2700, 0.2700, 0.0000],
            [0.2700, 0.4500, 0.2700, 0.0000]])
    """
    given, spread = (query, key, value), Spread(axis, dim, sizes)
    return _neighborhood(given, kernel_size, scale, spread, 1)


def neighborhood_attention2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    scale: float | None = None,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's points of neighbourhood attention over a cut field.

    As `neighborhood_attention1d`, of 2 dims of points.

    V -> V. Shapes: query, key (..., h, w, e), value (..., h, w, f) -> (...,
    h, w, f).
    Cost, Raises: as `neighborhood_attention1d`, for each dim that is cut.

    >>> def attend():
    ...     x = torch.ones(1, 2, 4, 8)
    ...     return pmod.nn.functional.neighborhood_attention2d(x, x, x, 3, axis="y").shape
    >>> pmod.simulate(attend, y=2)[0]
    torch.Size([1, 2, 4, 8])
    """
    given, spread = (query, key, value), Spread(axis, dim, sizes)
    return _neighborhood(given, kernel_size, scale, spread, 2)


def neighborhood_attention3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    scale: float | None = None,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's points of neighbourhood attention over a cut field.

    As `neighborhood_attention1d`, of 3 dims of points.

    V -> V. Shapes: query, key (..., d, h, w, e), value (..., d, h, w, f) -> (...,
    d, h, w, f).
    Cost, Raises: as `neighborhood_attention1d`, for each dim that is cut.

    >>> def attend():
    ...     x = torch.ones(1, 2, 3, 3, 8)
    ...     return pmod.nn.functional.neighborhood_attention3d(x, x, x, 3, axis="z").shape
    >>> pmod.simulate(attend, z=2)[0]
    torch.Size([1, 2, 3, 3, 8])
    """
    given, spread = (query, key, value), Spread(axis, dim, sizes)
    return _neighborhood(given, kernel_size, scale, spread, 3)
