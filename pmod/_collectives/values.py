"""The rows of the derivative table that keep a tensor's shape.

Each pair stands right above its public functions. A public function resolves its axis,
checks its arguments, and binds a row. The kinds, V (varying) and I (invariant), are
explained in `_core/row.py`. The rows that cut and join along a dim are in
`_collectives/slices.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pmod._core.arguments import (
    accumulate_in,
    as_number,
    check_mean,
    check_order,
    check_root,
    check_sum,
    check_tensor,
    from_number,
    summand,
    total_of,
    wrong,
)
from pmod._core.bind import bind, unmoved
from pmod._core.collective import collective
from pmod._core.row import Call, I, Params, Row, V, pair, without_derivative
from pmod._core.start import as_piece
from pmod._core.tree import Tree, map_leaves, together
from pmod._errors import ArgumentError, ShapeError, quoted
from pmod._mesh.ambient import resolve
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import AxisLike
from pmod._torch import are_transforms_active, forward_level
from pmod._wire.base import SMALL, AtOnce, Wire
from pmod._wire.sent import Sent
from pmod._wire.sums import (
    SIGNED,
    Reduction,
    accumulator,
    computed_in,
    extreme,
    is_eight_bits,
    real_sum,
)

Check = Callable[[Tensor, str, Axis], None]


class Mean(NamedTuple):
    """The parameters of `psum` and `pvary`."""

    divisor: int
    """1 for a sum, the number of ranks for a mean."""
    reduce_dtype: str | None
    """The name of the dtype that 16-bit floats add up in; None for float32."""


SUM = Mean(1, None)
"""Of a plain sum, made once: a NamedTuple takes longer to make than a tuple."""


def _send_psum(x: Tensor, wire: Wire, params: Mean) -> Sent[Tensor]:
    divisor, asked = params
    return real_sum(
        x, lambda y, _: wire.all_reduce(y, "sum", accumulator(y.dtype, asked), divisor)
    )


def _psum_at_once(x: Tensor, wire: Wire, params: Mean) -> AtOnce | None:
    return wire.ready_sum(x, accumulator(x.dtype, params.reduce_dtype), params.divisor)


def send_pvary(x: Tensor, wire: Wire, params: Mean) -> Tensor:
    if params.divisor == 1:
        return x
    return (_computable(x) / params.divisor).to(x.dtype)


# a divisor belongs to the row: a mean of 16-bit numbers is divided before it is rounded
PSUM, PVARY = pair(
    Row(
        "psum",
        V,
        I,
        Mean,
        _send_psum,
        fused=True,
        at_once=_psum_at_once,
        why="every rank used the one value in its own way: its gradient is the sum of theirs",
    ),
    Row(
        "pvary",
        I,
        V,
        Mean,
        send_pvary,
        local=True,
        why="the result is one value, whose gradient is on every rank already",
    ),
)


def fused(
    function: str,
    row: Row[Params],
    tree: Tree,
    axis: Axis,
    params: Params,
    check: Check,
    number: type | None = None,
) -> Tree:
    """Bind an elementwise row to a tree; with `number`, Python numbers are leaves too."""
    # the usual case, without the machinery of trees
    if isinstance(tree, Tensor):
        check_tensor(tree, function, axis)
        check(tree, function, axis)
        return cast(Tree, bind(Call(row, axis, params), [tree])[0])

    def run(leaves: list[Any]) -> list[Any]:
        tensors = list(leaves)
        if number is not None:
            of = partial(summand, least=number, function=function, axis=axis)
            _replace_numbers(tensors, of)
        for x in tensors:
            check_tensor(x, function, axis)
            check(x, function, axis)
        ys: list[Any] = [*together(row, tensors, axis, params)]
        for i, x in enumerate(leaves):
            # who passed a number gets one
            if not isinstance(x, Tensor):
                ys[i] = total_of(ys[i])
        return ys

    return map_leaves(run, tree, function, axis)


def _replace_numbers(leaves: list[Any], tensor_of: Callable[[Any], Any]) -> None:
    for i, x in enumerate(leaves):
        if not isinstance(x, Tensor):
            leaves[i] = tensor_of(x)


def anything(x: Tensor, function: str, axis: Axis) -> None:
    """No dtype is refused."""


def summing(reduce_dtype: torch.dtype | None, function: str, axis: Axis) -> Mean:
    """Return the parameters of a sum."""
    if reduce_dtype is None:
        return SUM
    return Mean(1, accumulate_in(reduce_dtype, function, axis))


@collective(V, I, transpose="pvary", value="the sum over the axis")
def psum(x: Tree, axis: AxisLike, *, reduce_dtype: torch.dtype | None = None) -> Tree:
    """Sum over the axis: the same value on every rank.

    V -> I. Transpose: pvary (its gradient needs no message).
    Shapes: x (...) -> (...).
    Cost: at most 2 (n-1)/n of x sent per rank; small messages on gloo go to all ranks,
    (n-1) x, in one round trip. Floats of 16 and 8 bits add up in float32
    (`reduce_dtype` to change that) and come back in x's dtype. Trees travel as one
    message per dtype and device. Numbers, numpy's scalars too, come back as Python
    numbers, and have the same type on every rank (0.0, not 0, where others hold a
    float). Ints of up to 64 bits and bools (which are counted) add up exactly, to an
    int of any size; integer tensors wrap around in their dtype, as torch's sums do.
    Raises: ArgumentError for bool tensors, and for numbers of more than 64 bits. JAX:
    lax.psum.

    >>> pmod.simulate(lambda: pmod.psum(torch.tensor([1.0, pmod.axis_index("model")]), "model"), model=2)
    [tensor([2., 1.]), tensor([2., 1.])]
    >>> pmod.simulate(lambda: pmod.psum({"seen": 3, "loss": 0.5}, "model"), model=2)[0]
    {'seen': 6, 'loss': 1.0}
    """
    bound = resolve(axis, "psum")
    params = summing(reduce_dtype, "psum", bound)
    return fused("psum", PSUM, x, bound, params, check_sum, int)


@collective(
    V,
    I,
    transpose="pvary / n",
    value="the mean over the axis; with a weight `psum(w x) / psum(w)`",
)
def pmean(
    x: Tree,
    axis: AxisLike,
    *,
    weight: Tensor | float | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> Tree:
    """Mean over the axis: the same value on every rank.

    V -> I. Transpose: pvary / n.
    Shapes: x (...) -> (...). weight: a number or a tensor per rank that broadcasts to
    x; then psum(w x) / psum(w), which is the mean over all samples where ranks hold
    different numbers of them. Both sums travel in one message. What has weight 0 counts
    for nothing, NaN included: the mean over a rank that has no samples.
    Cost and dtypes: as psum; 16-bit means are divided in float32. The mean of numbers
    is a Python float (or complex): ints and bools are rounded to float64 first.
    Raises: ArgumentError for bool and integer tensors. JAX: lax.pmean.

    >>> pmod.simulate(lambda: pmod.pmean(torch.tensor([0.0, 4.0 * pmod.axis_index("data")]), "data"), data=2)
    [tensor([0., 2.]), tensor([0., 2.])]
    >>> pmod.simulate(lambda: pmod.pmean(1.0, "data", weight=3), data=2)
    [1.0, 1.0]
    """
    bound = resolve(axis, "pmean")
    asked = accumulate_in(reduce_dtype, "pmean", bound)
    if weight is None:
        return fused(
            "pmean", PSUM, x, bound, Mean(bound.size, asked), check_mean, float
        )
    return map_leaves(
        as_piece(partial(_weighted, weight, bound, asked), "pmean"), x, "pmean", bound
    )


def _weighted(
    weight: Tensor | float, axis: Axis, asked: str | None, leaves: list[Any]
) -> list[Any]:
    xs = list(leaves)
    _replace_numbers(xs, lambda x: from_number(x, float, "pmean", axis))
    for x in xs:
        check_tensor(x, "pmean", axis)
        check_mean(x, "pmean", axis)
    # the weights add up once for each dtype and device, in the dtype of the sums
    weights: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    parts: list[Tensor] = []
    for x in xs:
        wide = x.to(accumulator(x.dtype, asked))
        kind = (wide.dtype, wide.device)
        if kind not in weights:
            weights[kind] = _weight_like(weight, wide, axis)
        _check_broadcasts(weights[kind], wide, axis)
        parts.append(_counted(wide, weights[kind]))
    # one message carries both sums
    sums = together(PSUM, parts + list(weights.values()), axis, Mean(1, asked))
    totals = dict(zip(weights, sums[len(parts) :], strict=True))
    means: list[Any] = []
    for given, x, y in zip(leaves, xs, sums[: len(parts)], strict=True):
        mean = (y / totals[y.dtype, y.device]).to(x.dtype)
        means.append(mean if isinstance(given, Tensor) else mean.item())
    return means


def _counted(x: Tensor, weight: Tensor) -> Tensor:
    """Return x times its weight."""
    # torch's mean of no samples is NaN, and NaN times a weight of 0 is NaN: what counts
    # for nothing must not spoil the sum
    return torch.where((weight == 0) & ~x.isfinite(), 0, x) * weight


def _weight_like(weight: Tensor | float, x: Tensor, axis: Axis) -> Tensor:
    if isinstance(weight, Tensor):
        check_tensor(weight, "pmean", axis, name="weight")
        if weight.is_complex() and not x.is_complex():
            raise wrong(
                ArgumentError,
                "pmean",
                axis,
                "weight is complex and x is real",
                "Pass a real weight.",
            )
        return weight.to(x.dtype)
    number = as_number(weight)
    if number is None or isinstance(number, complex):
        raise wrong(
            ArgumentError,
            "pmean",
            axis,
            f"weight is {quoted(weight)}",
            "Pass a real number, or a tensor.",
        )
    try:
        return torch.tensor(number, dtype=x.dtype, device=x.device)
    except (OverflowError, RuntimeError):  # torch raises either
        raise wrong(
            ArgumentError,
            "pmean",
            axis,
            f"weight is {weight}, too large for a float",
            "Divide all.",
        ) from None


def _check_broadcasts(weight: Tensor, x: Tensor, axis: Axis) -> None:
    shape, wanted = weight.shape, x.shape
    # torch's rule, from the last dim on; torch.broadcast_shapes would also widen x
    pairs = zip(reversed(shape), reversed(wanted), strict=False)
    fits = all(w in (1, k) for w, k in pairs)
    if len(shape) > len(wanted) or not fits:
        given = f"weight has shape {tuple(shape)} and x has shape {tuple(wanted)}"
        raise wrong(
            ShapeError,
            "pmean",
            axis,
            given,
            "Pass a number, or a weight that broadcasts to x.",
        )


@collective(I, V, transpose="psum", value="x itself, to be used in varying computation")
def pvary(x: Tree, axis: AxisLike, *, reduce_dtype: torch.dtype | None = None) -> Tree:
    """Return x itself, to be used in varying computation: its gradient is summed.

    I -> V. Transpose: psum; one message per dtype and device for a whole tree.
    Shapes: x (...) -> (...); the result may share storage with x. Cost: nothing
    forward.
    reduce_dtype: what 16-bit gradients add up in, float32 by default.
    JAX: lax.pcast(x, axis, to="varying"), which JAX inserts by itself.

    >>> def gradient():
    ...     w = torch.tensor(2.0, requires_grad=True)  # one parameter, held by all
    ...     x = torch.tensor(1.0 + pmod.axis_index("data"))  # data of this rank
    ...     loss = pmod.psum(pmod.pvary(w, "data") * x, "data")
    ...     loss.backward()
    ...     return w.grad
    >>> pmod.simulate(gradient, data=2)
    [tensor(3.), tensor(3.)]
    """
    bound = resolve(axis, "pvary")
    params = summing(reduce_dtype, "pvary", bound)
    return fused("pvary", PVARY, x, bound, params, anything)


class Extremum(NamedTuple):
    """The parameters of the row of `pmax` and `pmin`."""

    how: Reduction


def _send_extremum(x: Tensor, wire: Wire, params: Extremum) -> Sent[Tensor]:
    how = params.how
    # with the first bit turned over, signed numbers are in the order of the unsigned ones
    if x.dtype in SIGNED:
        signed = SIGNED[x.dtype]
        first = torch.iinfo(signed).min
        sent = wire.all_reduce(x.view(signed) ^ first, how, signed, 1)
        return sent.then(lambda y: (y ^ first).view(x.dtype))
    carried = x
    # neither is compared on the wire; both fit into what they are sent as
    if x.dtype == torch.bool:
        carried = x.to(torch.uint8)
    elif is_eight_bits(x):
        carried = x.to(torch.bfloat16)
    return wire.all_reduce(carried, how, carried.dtype, 1).then(lambda y: y.to(x.dtype))


def _extremum_at_once(x: Tensor, wire: Wire, params: Extremum) -> AtOnce | None:
    gather = None
    if x.dim() > 0 and x.nbytes <= SMALL:
        gather = wire.ready_gather(x)
    if gather is None:
        return None
    shape = (wire.size, *x.shape)
    return lambda x: extreme(gather(x).view(shape), params.how)


EXTREMUM = without_derivative(
    Row(
        "extremum",
        V,
        I,
        Extremum,
        _send_extremum,
        fused=True,
        at_once=_extremum_at_once,
    )
)


@collective(
    V,
    I,
    derivative="to the ranks that attain it, in equal parts",
    value="the elementwise maximum",
)
def pmax(x: Tree, axis: AxisLike) -> Tree:
    """Elementwise maximum over the axis; a NaN on any rank comes through.

    V -> I. Derivative: to the ranks that attain it, shared equally among them; it
    exists where the maximum is NaN or infinite, too. Where one is wanted, a second
    message counts those ranks (2 x).
    Shapes: x (...) -> (...). bool is any; numbers, numpy's scalars too, come back as
    Python numbers of x's type, ints of up to 63 bits. Of zeros, +0.0 is larger than
    -0.0.
    Cost: as psum. Raises: ArgumentError for complex. JAX: lax.pmax, which has no
    derivative.

    >>> pmod.simulate(lambda: pmod.pmax(torch.tensor([1.0, pmod.axis_index("model")]), "model"), model=2)
    [tensor([1., 1.]), tensor([1., 1.])]
    """
    return _extremum("pmax", "max", x, axis)


@collective(
    V,
    I,
    derivative="to the ranks that attain it, in equal parts",
    value="the elementwise minimum",
)
def pmin(x: Tree, axis: AxisLike) -> Tree:
    """Elementwise minimum over the axis; a NaN on any rank comes through.

    V -> I. As `pmax` in all else; bool is all.

    >>> pmod.simulate(lambda: pmod.pmin(pmod.axis_index("model") - 2, "model"), model=2)
    [-2, -2]
    """
    return _extremum("pmin", "min", x, axis)


def _extremum(function: str, how: Reduction, tree: Tree, axis: AxisLike) -> Tree:
    bound = resolve(axis, function)
    run = partial(_extrema, function, how, bound)
    return map_leaves(as_piece(run, function), tree, function, bound)


def _extrema(function: str, how: Reduction, axis: Axis, leaves: list[Any]) -> list[Any]:
    xs = list(leaves)
    _replace_numbers(xs, lambda x: from_number(x, int, function, axis))
    for x in xs:
        check_tensor(x, function, axis)
        check_order(x, function, axis)
    if axis.size == 1:
        return [_of_one_rank(x) for x in leaves]
    # it is not linear, so no row has its derivative, and `_attach` brings it
    values = together(EXTREMUM, list(map(_constant, xs)), axis, Extremum(how))
    _attach_to(values, xs, axis)
    for i, x in enumerate(leaves):
        if not isinstance(x, Tensor):
            # of the caller's type: a bool travels as an integer
            kind: Any = type(as_number(x))
            values[i] = kind(values[i].item())
    return values


def _of_one_rank(x: object) -> object:
    """Return the extremum of one value; a number needs no tensor then."""
    if isinstance(x, Tensor):
        return unmoved([x])[0]
    return as_number(x)


def differentiated(x: Tensor) -> bool:
    """Whether somebody may ask for a derivative with respect to x."""
    if torch.is_grad_enabled() and x.requires_grad:
        return True
    # of these no tensor says whether it takes part
    if torch.compiler.is_compiling() or are_transforms_active():
        return True
    return forward_level() >= 0


def _constant(x: Tensor) -> Tensor:
    """Return x as what has no derivative: itself where nobody asks for one."""
    return x.detach() if differentiated(x) else x


def _computable(x: Tensor) -> Tensor:
    """Return x in a dtype that torch computes in."""
    return x.to(computed_in(x.dtype))


def _attach_to(values: list[Tensor], xs: list[Tensor], axis: Axis) -> None:
    """Give the values of a list their derivatives, where anybody may ask for them."""
    smooth: list[int] = []
    for i, x in enumerate(xs):
        # all ranks must agree on this, for it sends a message
        if x.is_floating_point() and differentiated(x):
            smooth.append(i)
    if not smooth:
        return
    ys = [_computable(values[i]) for i in smooth]
    derived = _attach([_computable(xs[i]) for i in smooth], ys, axis)
    for i, y in zip(smooth, derived, strict=True):
        values[i] = y.to(xs[i].dtype)


def _attach(xs: list[Tensor], values: list[Tensor], axis: Axis) -> list[Tensor]:
    """Return the values with the derivative of an extremum.

    It is the mean over the ranks that attain the value. s below is that mean up to a
    constant factor, and is linear in x; s - s.detach() is exactly 0 with the derivative
    of s. The factor 1 / (2n) keeps the sum finite for the largest finite x. If the value
    is infinite the difference would be NaN, and s itself is the value.
    """
    n = axis.size
    parts: list[Tensor] = []
    hits: list[Tensor] = []
    for x, y in zip(xs, values, strict=True):
        hit = (x.detach() == y) | (x.detach().isnan() & y.isnan())
        parts.append(torch.where(hit, x / (2 * n), 0))
        hits.append(hit.to(x.dtype))
    sums = together(PSUM, parts + hits, axis, SUM)
    out: list[Tensor] = []
    for y, s, count in zip(values, sums[: len(xs)], sums[len(xs) :], strict=True):
        # a constant: a tangent of 0 times an infinite s would be NaN
        scale = 2 * n / count.detach()
        # subtracted: -0.0 stays what it is
        out.append(torch.where(y.isfinite(), y - (s.detach() - s) * scale, s * scale))
    return out


class Root(NamedTuple):
    """The parameters of `pick` and `place`."""

    root: int
    """The index of the one rank."""


def _send_pick(x: Tensor, wire: Wire, params: Root) -> Sent[Tensor]:
    return wire.broadcast(x, params.root)


def _send_place(x: Tensor, wire: Wire, params: Root) -> Tensor:
    return x if wire.index == params.root else torch.zeros_like(x)


def _at_once_from_root(x: Tensor, wire: Wire, params: Root | RootSum) -> AtOnce | None:
    return wire.ready_broadcast(x, params.root)


PICK, PLACE = pair(
    Row(
        "pick",
        V,
        I,
        Root,
        _send_pick,
        fused=True,
        at_once=_at_once_from_root,
        why="one rank used the value: all others get the gradient from there",
    ),
    Row(
        "place",
        I,
        V,
        Root,
        _send_place,
        local=True,
        why="the value came from one rank: the gradient goes to it alone",
    ),
)


@collective(
    V, I, transpose="place", value="src's value, as one value that all ranks hold"
)
def pick(x: Tree, axis: AxisLike, *, src: int = 0) -> Tree:
    """src's value, as one value that all ranks hold and use alike.

    V -> I. Transpose: place. `broadcast` is the V -> V form, for a value that each rank
    then uses in its own way.
    Shapes: x (...) -> (...), the same shape on all ranks. Cost: one broadcast.
    Raises: AxisError where src is not an index along the axis.

    >>> pmod.simulate(lambda: pmod.pick(torch.tensor(10 + pmod.axis_index("model")), "model", src=1), model=2)
    [tensor(11), tensor(11)]
    """
    bound = resolve(axis, "pick")
    params = Root(check_root(src, "pick", bound, name="src"))
    return fused("pick", PICK, x, bound, params, anything)


@collective(I, V, transpose="pick", value="x on dst, zeros elsewhere")
def place(x: Tree, axis: AxisLike, *, dst: int = 0) -> Tree:
    """An invariant value put on one rank: x on dst, zeros elsewhere.

    I -> V. Transpose: pick. Shapes: x (...) -> (...); on dst the result may share
    storage with x.
    Cost: nothing forward, one broadcast backward. Raises: AxisError where dst is not
    an index along the axis.

    >>> pmod.simulate(lambda: pmod.place(torch.tensor(5), "model", dst=1), model=2)
    [tensor(0), tensor(5)]
    """
    bound = resolve(axis, "place")
    params = Root(check_root(dst, "place", bound, name="dst"))
    return fused("place", PLACE, x, bound, params, anything)


class RootSum(NamedTuple):
    """The parameters of `broadcast` and `reduce`."""

    root: int
    """The index of the one rank."""
    reduce_dtype: str | None
    """The name of the dtype that 16-bit floats add up in; None for float32."""


def _send_broadcast(x: Tensor, wire: Wire, params: RootSum) -> Sent[Tensor]:
    return wire.broadcast(x, params.root)


def _send_reduce(x: Tensor, wire: Wire, params: RootSum) -> Sent[Tensor]:
    root, asked = params
    return real_sum(x, lambda y, _: wire.reduce(y, root, accumulator(y.dtype, asked)))


BROADCAST, REDUCE = pair(
    Row(
        "broadcast",
        V,
        V,
        RootSum,
        _send_broadcast,
        fused=True,
        at_once=_at_once_from_root,
        why="the sum stands on one rank: what flows back to it is every summand's gradient",
    ),
    Row(
        "reduce",
        V,
        V,
        RootSum,
        _send_reduce,
        fused=True,
        why="every rank used the one rank's value: what they send back adds up there",
    ),
)


@collective(
    V, V, transpose="reduce", value="src's value, which each rank uses in its own way"
)
def broadcast(
    x: Tree, axis: AxisLike, *, src: int = 0, reduce_dtype: torch.dtype | None = None
) -> Tree:
    """Return src's value on every rank, each of which uses it in its own way.

    V -> V. Transpose: reduce. `pick` is the V -> I form, for a value that all ranks use
    alike.
    Shapes: x (...) -> (...), the same shape on all ranks. Cost: one broadcast.
    reduce_dtype: what 16-bit gradients add up in, float32 by default. Raises: AxisError
    where src is not an index along the axis.

    >>> pmod.simulate(lambda: pmod.broadcast(torch.tensor(10 + pmod.axis_index("model")), "model", src=1), model=2)
    [tensor(11), tensor(11)]
    """
    bound = resolve(axis, "broadcast")
    params = RootSum(
        check_root(src, "broadcast", bound, name="src"),
        accumulate_in(reduce_dtype, "broadcast", bound),
    )
    return fused("broadcast", BROADCAST, x, bound, params, anything)


@collective(V, V, transpose="broadcast", value="the sum on dst, zeros elsewhere")
def reduce(
    x: Tree, axis: AxisLike, *, dst: int = 0, reduce_dtype: torch.dtype | None = None
) -> Tree:
    """The sum on dst, zeros elsewhere.

    V -> V. Transpose: broadcast. Shapes: x (...) -> (...).
    Cost: x sent to dst by every other rank. 16-bit floats add up in float32 unless
    reduce_dtype says otherwise.
    Raises: AxisError where dst is not an index along the axis; ArgumentError for bool.

    >>> pmod.simulate(lambda: pmod.reduce(torch.tensor(1 + pmod.axis_index("model")), "model", dst=1), model=2)
    [tensor(0), tensor(3)]
    """
    bound = resolve(axis, "reduce")
    params = RootSum(
        check_root(dst, "reduce", bound, name="dst"),
        accumulate_in(reduce_dtype, "reduce", bound),
    )
    return fused("reduce", REDUCE, x, bound, params, check_sum)
