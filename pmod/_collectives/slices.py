"""The rows of the derivative table that cut and join along a dim.

Each pair stands right above its public functions. Inside, dims are counted from the
end, so that a leading vmap dim changes nothing. Sizes are lengths along the dim, one
per rank; None stands for equal parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from pmod._collectives.lengths import check_joined, shares_joined, shares_of
from pmod._core.arguments import (
    accumulate_in,
    check_adds_up,
    check_flag,
    check_own_size,
    check_sizes,
    check_sum,
    dim_from_end,
    shares,
    wrong,
)
from pmod._core.collective import collective
from pmod._core.row import I, Row, V, pair
from pmod._core.tree import Tree, each, map_leaves
from pmod._errors import ShapeError
from pmod._mesh.ambient import resolve
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import AxisLike
from pmod._wire.base import AtOnce, Wire
from pmod._wire.counts import are_equal, scaled_counts, total
from pmod._wire.sent import Sent
from pmod._wire.sums import accumulator, real_sum

Sizes: TypeAlias = tuple[int, ...]
"""The length of each rank along the dim."""


class Parts(NamedTuple):
    """The parameters of `all_gather` and `psum_scatter`."""

    dim: int
    sizes: Sizes | None
    reduce_dtype: str | None
    """The name of the dtype that 16-bit floats add up in; None for float32."""


class Slices(NamedTuple):
    """The parameters of `shard` and `unshard`."""

    dim: int
    sizes: Sizes | None


class Exchange(NamedTuple):
    """The parameters of `all_to_all`."""

    split_dim: int
    concat_dim: int
    split_sizes: Sizes | None
    """The lengths that this rank sends: part j to rank j."""
    concat_sizes: Sizes | None
    """The lengths that arrive, by rank."""


def _unit(x: Tensor, dim: int) -> int:
    """Return the number of elements per step of `dim`."""
    # not a quotient of numel: the dim may be empty
    return math.prod(_with_length(x.shape, dim, 1))


def _lengths(sizes: Sizes | None, each_one: int, wire: Wire) -> Sequence[int]:
    if sizes is None:
        return wire.equal(each_one)
    return sizes


def _blocks(x: Tensor, dim: int, lengths: Sequence[int]) -> Tensor:
    """Return x cut along `dim`, the parts one after another in a flat tensor."""
    # along the first dim the parts lie in memory like that, and nothing is copied
    if dim == -x.dim():
        return x.reshape(-1)
    # one copy, which a compiler joins with what comes before
    if are_equal(lengths):
        at = x.dim() + dim
        return x.unflatten(at, (len(lengths), lengths[0])).movedim(at, 0).reshape(-1)
    return torch.cat([part.reshape(-1) for part in x.split(list(lengths), dim)])


def _join(
    flat: Tensor, shape: Sequence[int], dim: int, lengths: Sequence[int]
) -> Tensor:
    """Join the parts of a flat tensor: of this shape but for their lengths along `dim`.

    It is the opposite of `_blocks`.
    """
    # along the first dim without a copy
    if dim == -len(shape):
        return flat.view(total(lengths), *shape[1:])
    if are_equal(lengths):
        n, at = len(lengths), len(shape) + dim
        each_one = _with_length(shape, dim, lengths[0])
        joined = _with_length(shape, dim, n * lengths[0])
        return flat.view(n, *each_one).movedim(0, at).reshape(joined)
    shapes = [_with_length(shape, dim, length) for length in lengths]
    parts = flat.split([math.prod(shape) for shape in shapes])
    return torch.cat(list(map(Tensor.view, parts, shapes)), dim)


def _joined_later(
    sent: Sent[Tensor], shape: Sequence[int], dim: int, lengths: Sequence[int]
) -> Sent[Tensor]:
    """Join what arrives: parts of this shape but for their lengths along `dim`."""
    return sent.then(lambda y: _join(y, shape, dim, lengths))


def _with_length(shape: Sequence[int], dim: int, length: int) -> list[int]:
    out = list(shape)
    out[dim] = length
    return out


class _Cut(Protocol):
    """Parameters that cut or join along a dim."""

    @property
    def dim(self) -> int: ...
    @property
    def sizes(self) -> Sizes | None: ...


SomeParts = TypeVar("SomeParts", bound=_Cut)


def _but_for_dim(
    params: SomeParts, shape: tuple[int, ...]
) -> tuple[SomeParts, tuple[int, ...]]:
    """Return what ranks agree on: with sizes, not the length along the dim."""
    if params.sizes is None:
        return params, shape
    return params, tuple(_with_length(shape, params.dim, -1))


def _send_all_gather(x: Tensor, wire: Wire, params: Parts) -> Sent[Tensor]:
    return _joined(x, wire, params.dim, params.sizes)


def _joined(x: Tensor, wire: Wire, dim: int, sizes: Sizes | None) -> Sent[Tensor]:
    lengths = _lengths(sizes, x.shape[dim], wire)
    unit = _unit(x, dim)
    sent = wire.all_gather(x.reshape(-1), scaled_counts(unit, lengths))
    return _joined_later(sent, x.shape, dim, lengths)


def _joined_at_once(x: Tensor, wire: Wire, params: Parts | Slices) -> AtOnce | None:
    if params.sizes is not None or params.dim != -x.dim():
        return None
    return wire.ready_gather(x)


def _summed_at_once(x: Tensor, wire: Wire, params: Parts) -> AtOnce | None:
    dim, sizes, asked = params
    if sizes is not None or dim != -x.dim():
        return None
    return wire.ready_scatter(x, accumulator(x.dtype, asked))


def _send_psum_scatter(x: Tensor, wire: Wire, params: Parts) -> Sent[Tensor]:
    dim, sizes, asked = params
    lengths = _lengths(sizes, x.shape[dim] // wire.size, wire)
    unit = _unit(x, dim)
    shape = _with_length(x.shape, dim, lengths[wire.index])

    # scale: the numbers that an element of x is sent as, two for a complex one
    def send(y: Tensor, scale: int) -> Sent[Tensor]:
        counts = scaled_counts(scale * unit, lengths)
        return wire.reduce_scatter(y, counts, accumulator(y.dtype, asked))

    return real_sum(_blocks(x, dim, lengths), send).then(lambda y: y.view(shape))


ALL_GATHER, PSUM_SCATTER = pair(
    Row(
        "all_gather",
        V,
        V,
        Parts,
        _send_all_gather,
        agreed=_but_for_dim,
        at_once=_joined_at_once,
        why="each slice of the sum stands on one rank: its gradient goes to all that added to it",
    ),
    Row(
        "psum_scatter",
        V,
        V,
        Parts,
        _send_psum_scatter,
        at_once=_summed_at_once,
        why="every rank used the slice of every other: what they send back of it adds up at its owner",
    ),
)


@collective(
    V,
    V,
    transpose="psum_scatter",
    value="the shards joined along dim; stacked with `tiled=False`",
)
def all_gather(
    x: Tree,
    axis: AxisLike,
    *,
    dim: int = 0,
    tiled: bool = True,
    reduce_dtype: torch.dtype | None = None,
) -> Tree:
    """Join the shards of all ranks along `dim`, on every rank.

    V -> V. Transpose: psum_scatter. `unshard` is the V -> I form, for a whole that all
    ranks use alike.
    Shapes, n the axis size: x (..., k, ...) -> (..., n*k, ...); tiled=False stacks, x
    (...) -> (..., n, ...).
    Cost: x sent to every other rank. reduce_dtype: what 16-bit gradients add up in,
    float32 by default.
    Raises: ShapeError where x has no such dim. JAX: lax.all_gather, where tiled
    defaults to False.

    >>> pmod.simulate(lambda: pmod.all_gather(torch.tensor([1.0, pmod.axis_index("model")]), "model"), model=2)
    [tensor([1., 0., 1., 1.]), tensor([1., 0., 1., 1.])]
    """
    bound = resolve(axis, "all_gather")
    check_flag(tiled, "all_gather", "tiled")
    asked = accumulate_in(reduce_dtype, "all_gather", bound)

    # stacking makes a dim, which `dim` may name
    extra = 0 if tiled else 1
    no_dims = "Pass tiled=False, or a tensor with a dim."

    def prepare(x: Tensor) -> tuple[Tensor, Parts]:
        at = dim_from_end(dim, x, "all_gather", bound, extra=extra, no_dims=no_dims)
        if not tiled:
            x = x.unsqueeze(at)
        return x, Parts(at, None, asked)

    return each(ALL_GATHER, x, bound, "all_gather", prepare)


@collective(V, V, transpose="all_gather", value="this rank's slice of the sum")
def psum_scatter(
    x: Tree,
    axis: AxisLike,
    *,
    dim: int = 0,
    tiled: bool = True,
    reduce_dtype: torch.dtype | None = None,
) -> Tree:
    """Sum over the axis, keeping this rank's slice.

    V -> V. Transpose: all_gather.
    Shapes: x (..., n*k, ...) -> (..., k, ...), n the axis size; tiled=False: x (..., n,
    ...) -> (...).
    Cost: (n-1)/n of x sent per rank. 16-bit floats add up in float32 unless
    reduce_dtype says otherwise.
    Raises: ShapeError where dim does not divide by n; ArgumentError for bool.
    JAX: lax.psum_scatter, where tiled defaults to False.

    >>> pmod.simulate(lambda: pmod.psum_scatter(torch.arange(4.0), "model"), model=2)
    [tensor([0., 2.]), tensor([4., 6.])]
    """
    bound = resolve(axis, "psum_scatter")
    check_flag(tiled, "psum_scatter", "tiled")
    asked = accumulate_in(reduce_dtype, "psum_scatter", bound)

    def prepare(x: Tensor) -> tuple[Tensor, Parts]:
        check_sum(x, "psum_scatter", bound)
        at = dim_from_end(dim, x, "psum_scatter", bound)
        if tiled:
            _check_divides(x, at, "psum_scatter", bound)
        else:
            _check_one_each(x, at, "psum_scatter", bound)
        return x, Parts(at, None, asked)

    y = each(PSUM_SCATTER, x, bound, "psum_scatter", prepare)
    if tiled:
        return y
    # a slice of one row: the dim is removed
    return map_leaves(lambda ys: [y.squeeze(dim) for y in ys], y, "psum_scatter", bound)


def _check_divides(
    x: Tensor, at: int, function: str, axis: Axis, *, right: str = "", name: str = "dim"
) -> None:
    if axis.size > 1 and x.size(at) % axis.size:
        place = x.dim() + at
        given = (
            f"x.shape[{place}] is {x.shape[at]}, which does not divide by {axis.size}"
        )
        default = (
            f"Pad x, or choose a {name} whose length is a multiple of {axis.size}."
        )
        right = right.format(sizes=shares(int(x.shape[at]), axis))
        raise wrong(ShapeError, function, axis, given, right or default)


def _check_one_each(x: Tensor, at: int, function: str, axis: Axis) -> None:
    if x.shape[at] != axis.size:
        given = f"tiled=False and x.shape[{x.dim() + at}] is {x.shape[at]}"
        raise wrong(
            ShapeError,
            function,
            axis,
            given,
            f"It must be the axis size, {axis.size}; or pass tiled=True.",
        )


def _send_shard(x: Tensor, wire: Wire, params: Slices) -> Tensor:
    dim, sizes = params
    lengths = _lengths(sizes, x.shape[dim] // wire.size, wire)
    return x.narrow(dim, sum(lengths[: wire.index]), lengths[wire.index])


def _send_unshard(x: Tensor, wire: Wire, params: Slices) -> Sent[Tensor]:
    return _joined(x, wire, params.dim, params.sizes)


SHARD, UNSHARD = pair(
    Row(
        "shard",
        I,
        V,
        Slices,
        _send_shard,
        local=True,
        why="the result is one value, whose gradient is on every rank already: each keeps its slice",
    ),
    Row(
        "unshard",
        V,
        I,
        Slices,
        _send_unshard,
        agreed=_but_for_dim,
        at_once=_joined_at_once,
        why="each rank has the gradient of its slice of one value, which all hold",
    ),
)


@collective(I, V, transpose="unshard", value="this rank's slice")
def shard(
    x: Tree, axis: AxisLike, *, dim: int = 0, sizes: Sequence[int] | None = None
) -> Tree:
    """This rank's slice of an invariant tensor.

    I -> V. Transpose: unshard.
    Shapes: x (..., m, ...) -> (..., sizes[i], ...) on rank i; without sizes,
    `split_sizes(m, n)`: ceil(m / n) each, the last ones shorter or empty, as
    torch.chunk and DTensor cut; over several axes, along one after the other. The
    result may share storage with x.
    Cost: nothing forward; backward joins the slices. Raises: ShapeError where sizes do
    not add up to m.

    >>> pmod.simulate(lambda: pmod.shard(torch.arange(3), "model"), model=2)
    [tensor([0, 1]), tensor([2])]
    """
    bound = resolve(axis, "shard")
    given = None if sizes is None else check_sizes(sizes, "shard", bound)

    def prepare(x: Tensor) -> tuple[Tensor, Slices]:
        at = dim_from_end(dim, x, "shard", bound)
        if given is not None:
            check_adds_up(x, at, given, "shard", bound)
        return x, Slices(at, given or _uneven(x.size(at), bound))

    return each(SHARD, x, bound, "shard", prepare)


def _uneven(length: int, axis: Axis) -> tuple[int, ...] | None:
    """Return the sizes of `split_sizes`; None if all are equal."""
    # one rank first: a length may be a symbol of the compiler's, which is not asked
    if axis.size == 1 or length % axis.size == 0:
        return None
    return shares(int(length), axis)


@collective(V, I, transpose="shard", value="the slices joined, as one value")
def unshard(
    x: Tree,
    axis: AxisLike,
    *,
    dim: int = 0,
    sizes: Sequence[int] | None = None,
    length: int | None = None,
) -> Tree:
    """Join the slices of all ranks along `dim` into one whole that all use alike.

    V -> I. Transpose: shard. `all_gather` is the V -> V form, for shards that each rank
    then uses in its own way.
    Shapes: x (..., sizes[i], ...) on rank i -> (..., sum(sizes), ...); with length,
    sizes are `split_sizes(length, n)`; with neither, all slices are equally long.
    Cost: x sent to every other rank. Raises: ShapeError where x is not of this rank's
    size.

    >>> pmod.simulate(lambda: pmod.unshard(pmod.shard(torch.arange(3), "model"), "model", length=3), model=2)
    [tensor([0, 1, 2]), tensor([0, 1, 2])]
    """
    bound = resolve(axis, "unshard")
    if sizes is not None and length is not None:
        raise wrong(
            ShapeError,
            "unshard",
            bound,
            "sizes and length are given",
            "Pass one of them.",
        )
    given = None if sizes is None else check_sizes(sizes, "unshard", bound)
    if length is not None:
        given = shares_of(length, "unshard", bound)

    def prepare(x: Tensor) -> tuple[Tensor, Slices]:
        at = dim_from_end(dim, x, "unshard", bound)
        if given is not None:
            right = "Pass the sizes that the ranks hold, or the whole length that shard cut."
            check_own_size(x, at, given, "unshard", bound, right)
        return x, Slices(at, given)

    return each(UNSHARD, x, bound, "unshard", prepare)


def _send_all_to_all(x: Tensor, wire: Wire, params: Exchange) -> Sent[Tensor]:
    split_dim, concat_dim, split_sizes_, concat_sizes = params
    # as pairs of reals from the start: compilers leave complex layouts alone
    if x.is_complex():
        of_pairs = params._replace(split_dim=split_dim - 1, concat_dim=concat_dim - 1)
        sent = _send_all_to_all(torch.view_as_real(x), wire, of_pairs)
        return sent.then(torch.view_as_complex)
    out = _lengths(split_sizes_, x.shape[split_dim] // wire.size, wire)
    mine = out[wire.index]
    sending = scaled_counts(_unit(x, split_dim), out)
    # what arrives is as long along split_dim as this rank's part
    shape = _with_length(x.shape, split_dim, mine)
    into = _lengths(concat_sizes, shape[concat_dim], wire)
    unit = math.prod(_with_length(shape, concat_dim, 1))
    sent = wire.all_to_all(
        _blocks(x, split_dim, out), sending, scaled_counts(unit, into)
    )
    return _joined_later(sent, shape, concat_dim, into)


def _exchange_at_once(x: Tensor, wire: Wire, params: Exchange) -> AtOnce | None:
    first = -x.dim()
    # along the first dim the parts lie one after another
    if params != (first, first, None, None):
        return None
    return wire.ready_exchange(x)


def _swap(params: Exchange) -> Exchange:
    split_dim, concat_dim, split_sizes_, concat_sizes = params
    return Exchange(concat_dim, split_dim, concat_sizes, split_sizes_)


def _but_for_sizes(
    params: Exchange, shape: tuple[int, ...]
) -> tuple[Exchange | tuple[int, int, bool, bool], tuple[int, ...]]:
    """Return what ranks agree on: the sizes too, unless both dims are one.

    Along one dim each rank has sizes of its own; from dim to dim all have the same.
    """
    split_dim, concat_dim, split_sizes_, concat_sizes = params
    if concat_sizes is not None:
        shape = tuple(_with_length(shape, concat_dim, -1))
    if split_dim != concat_dim:
        return params, shape
    if split_sizes_ is not None:
        shape = tuple(_with_length(shape, split_dim, -1))
    return (split_dim, concat_dim, split_sizes_ is None, concat_sizes is None), shape


def lengths_exchanged(
    params: Exchange, length: int, axis: Axis
) -> tuple[Sequence[int], Sequence[int]] | None:
    """Return what a rank sends to each and expects of each along one dim.

    The result is None if all ranks have the same sizes.
    """
    split_dim, concat_dim, split_sizes_, concat_sizes = params
    if split_dim != concat_dim or (split_sizes_ is None and concat_sizes is None):
        return None
    sent = split_sizes_ or (length // axis.size,) * axis.size
    return sent, concat_sizes or (sent[axis.index],) * axis.size


ALL_TO_ALL = Row(
    "all_to_all",
    V,
    V,
    Exchange,
    _send_all_to_all,
    flip=_swap,
    at_once=_exchange_at_once,
    agreed=_but_for_sizes,
    why="the gradient of each part goes back to the rank that it came from",
)
pair(ALL_TO_ALL, ALL_TO_ALL)


@collective(
    V, V, transpose="itself, dims and sizes swapped", value="a transpose across ranks"
)
def all_to_all(
    x: Tree,
    axis: AxisLike,
    *,
    split_dim: int,
    concat_dim: int,
    tiled: bool = True,
    split_sizes: Sequence[int] | None = None,
    concat_sizes: Sequence[int] | None = None,
    length: int | None = None,
) -> Tree:
    """Send part j of split_dim to rank j, and join what arrives along concat_dim.

    V -> V. Transpose: itself, dims and sizes swapped.
    Shapes, n the axis size: tiled, split_dim n*k -> k and concat_dim m -> n*m.
    tiled=False: split_dim has length n and is removed, a dim of length n is inserted at
    concat_dim of the result. With sizes (tiled only), parts are uneven: split_sizes are
    the lengths of the parts, part j to rank j; concat_sizes the lengths that the ranks
    hold along concat_dim. Where the two dims are the same, they are the lengths sent
    and received. length, in place of both, is that of the whole along concat_dim: both
    are then cut as `split_sizes` cuts.
    Cost: (n-1)/n of x sent per rank.
    Raises: ShapeError where split_dim does not divide by n or sizes do not fit.
    JAX: lax.all_to_all, where tiled defaults to False.

    >>> pmod.simulate(lambda: pmod.all_to_all(torch.arange(2) + 2 * pmod.axis_index("model"), "model",
    ...                                       split_dim=0, concat_dim=0), model=2)
    [tensor([0, 2]), tensor([1, 3])]
    """
    bound = resolve(axis, "all_to_all")
    check_flag(tiled, "all_to_all", "tiled")
    joins = None
    if length is not None:
        told = {"split_sizes": split_sizes, "concat_sizes": concat_sizes}
        joins = shares_joined(length, told, tiled, bound)
    if not tiled:
        if split_sizes is not None or concat_sizes is not None:
            raise wrong(
                ShapeError,
                "all_to_all",
                bound,
                "tiled=False and sizes are given",
                "Sizes need tiled=True.",
            )
        return _untiled_all_to_all(x, bound, split_dim, concat_dim)
    sent = held = None
    if split_sizes is not None:
        sent = check_sizes(split_sizes, "all_to_all", bound, name="split_sizes")
    if concat_sizes is not None:
        held = check_sizes(concat_sizes, "all_to_all", bound, name="concat_sizes")

    def prepare(x: Tensor) -> tuple[Tensor, Exchange]:
        cut = dim_from_end(split_dim, x, "all_to_all", bound, name="split_dim")
        joined = dim_from_end(concat_dim, x, "all_to_all", bound, name="concat_dim")
        if joins is not None:
            check_joined(x, cut, joined, joins, bound)
            return x, Exchange(cut, joined, _uneven(x.size(cut), bound), joins)
        if sent is None:
            _check_divides(
                x, cut, "all_to_all", bound, right="Pass split_sizes for uneven parts."
            )
        else:
            check_adds_up(x, cut, sent, "all_to_all", bound, "split_sizes")
        if held is not None:
            own = x.shape[joined]
            # along one dim a rank holds the part that it sends itself
            if cut == joined:
                own = own // bound.size if sent is None else sent[bound.index]
            _check_held(held, own, bound)
        return x, Exchange(cut, joined, sent, held)

    return each(ALL_TO_ALL, x, bound, "all_to_all", prepare)


def _check_held(held: tuple[int, ...], own: int, axis: Axis) -> None:
    if held[axis.index] != own:
        given = f"concat_sizes[{axis.index}] is {held[axis.index]} but this rank holds {own} along concat_dim"
        raise wrong(
            ShapeError,
            "all_to_all",
            axis,
            given,
            "Pass the length that each rank holds.",
        )


def _untiled_all_to_all(x: Tree, axis: Axis, split_dim: int, concat_dim: int) -> Tree:
    # with the dim of length n in front, blocks of one row are exchanged; then the dim
    # moves to where it was asked for
    def prepare(x: Tensor) -> tuple[Tensor, Exchange]:
        cut = dim_from_end(split_dim, x, "all_to_all", axis, name="split_dim")
        dim_from_end(concat_dim, x, "all_to_all", axis, name="concat_dim")
        _check_one_each(x, cut, "all_to_all", axis)
        return x.movedim(cut, 0), Exchange(-x.dim(), -x.dim(), None, None)

    rows = each(ALL_TO_ALL, x, axis, "all_to_all", prepare)
    return map_leaves(
        lambda ys: [y.movedim(0, concat_dim) for y in ys], rows, "all_to_all", axis
    )
