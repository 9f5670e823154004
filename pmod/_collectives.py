"""The rows of the derivative table that keep a tensor's shape, each pair right above its public functions.

A public function resolves its axis, checks its arguments, and binds a row. The kinds, V (varying) and I (invariant),
are explained in `_autodiff`. The rows that cut and join along a dim are in `_slices`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.overrides import handle_torch_function

from pmod._ambient import resolve
from pmod._arguments import (
    accumulate_in,
    check_flag,
    check_mean,
    check_order,
    check_own_size,
    check_permutation,
    check_root,
    check_sizes,
    check_sum,
    check_tensor,
    dim_from_end,
    from_number,
    summand,
    targets_of,
    total_of,
    wrong,
)
from pmod._autodiff import Call, I, Params, Row, V, bind, origin, pair, told, unmoved, without_derivative
from pmod._errors import ArgumentError, AxisError, PmodError, ShapeError, explain, quoted
from pmod._mesh import Axis, AxisLike
from pmod._numbers import as_int, as_number
from pmod._pytree import Tree, map_leaves, together
from pmod._start import as_piece
from pmod._waiting import Said, code_of
from pmod._wire import SIGNED, Reduction, Sent, Wire, accumulator, computed_in, is_eight_bits, real_sum, wire_of

Check = Callable[[Tensor, str, Axis], None]


# --- psum <-> pvary -------------------------------------------------------------------------------


def _send_psum(x: Tensor, wire: Wire, params: Params) -> Sent:
    divisor, asked = params
    return real_sum(x, lambda y, _: wire.all_reduce(y, "sum", accumulator(y.dtype, asked), divisor))


def _send_pvary(x: Tensor, wire: Wire, params: Params) -> Tensor:
    divisor, _ = params
    return x if divisor == 1 else (_computable(x) / divisor).to(x.dtype)


# a divisor belongs to the row, so that a mean of 16-bit numbers is divided before it is rounded
PSUM, PVARY = pair(
    Row(
        "psum", V, I, _send_psum, fused=True,
        why="every rank used the one value in its own way: its gradient is the sum of theirs",
    ),
    Row(
        "pvary", I, V, _send_pvary, local=True,
        why="the result is one value, whose gradient is on every rank already",
    ),
)


def _fused(
    function: str, row: Row, tree: Tree, axis: Axis, params: Params, check: Check, number: type | None = None
) -> Tree:
    """Bind an elementwise row to a tree; with `number`, Python numbers are leaves too (metrics)."""

    if isinstance(tree, Tensor):  # the usual case, without the machinery of trees
        check_tensor(tree, function, axis)
        check(tree, function, axis)
        return cast(Tree, bind(Call(row, axis, params), [tree])[0])

    def run(leaves: list[Any]) -> list[Any]:
        tensors = [
            x if isinstance(x, Tensor) or number is None else summand(x, number, function, axis) for x in leaves
        ]
        for x in tensors:
            check_tensor(x, function, axis)
            check(x, function, axis)
        ys = together(row, tensors, axis, params)
        return [y if isinstance(x, Tensor) else total_of(y) for x, y in zip(leaves, ys, strict=True)]

    return map_leaves(run, tree, function, axis)


def _anything(x: Tensor, function: str, axis: Axis) -> None:
    """No dtype is refused."""


def psum(x: Tree, axis: AxisLike, *, reduce_dtype: torch.dtype | None = None) -> Tree:
    """Sum over the axis: the same value on every rank.

    V -> I. Transpose: pvary (its gradient needs no message).
    Shapes: x (...) -> (...).
    Cost: at most 2 (n-1)/n of x sent per rank; small messages on gloo go to all ranks, (n-1) x, in one round trip.
    Floats of 16 and 8 bits add up in float32 (`reduce_dtype` to change that) and come back in x's dtype.
    Trees travel as one message per dtype and device. Numbers, numpy's scalars too, come back as Python numbers, and
    have the same type on every rank (0.0, not 0, where others hold a float). Ints of up to 64 bits and bools (which are
    counted) add up exactly, to an int of any size; integer tensors wrap around in their dtype, as torch's sums do.
    Raises: ArgumentError for bool tensors, and for numbers of more than 64 bits. JAX: lax.psum.

    >>> pmod.simulate(lambda: pmod.psum(torch.tensor([1.0, pmod.axis_index("model")]), "model"), model=2)
    [tensor([2., 1.]), tensor([2., 1.])]
    >>> pmod.simulate(lambda: pmod.psum({"seen": 3, "loss": 0.5}, "model"), model=2)[0]
    {'seen': 6, 'loss': 1.0}
    """
    bound = resolve(axis, "psum")
    params = (1, accumulate_in(reduce_dtype, "psum", bound))
    return _fused("psum", PSUM, x, bound, params, check_sum, int)


def pmean(
    x: Tree, axis: AxisLike, *, weight: Tensor | float | None = None, reduce_dtype: torch.dtype | None = None
) -> Tree:
    """Mean over the axis: the same value on every rank.

    V -> I. Transpose: pvary / n.
    Shapes: x (...) -> (...). weight: a number or a tensor per rank that broadcasts to x; then psum(w x) / psum(w),
    which is the mean over all samples where ranks hold different numbers of them. Both sums travel in one message. What
    has weight 0 counts for nothing, NaN included: the mean over a rank that has no samples.
    Cost and dtypes: as psum; 16-bit means are divided in float32.
    The mean of numbers is a Python float (or complex): ints and bools are rounded to float64 first.
    Raises: ArgumentError for bool and integer tensors. JAX: lax.pmean.

    >>> pmod.simulate(lambda: pmod.pmean(torch.tensor([0.0, 4.0 * pmod.axis_index("data")]), "data"), data=2)
    [tensor([0., 2.]), tensor([0., 2.])]
    >>> pmod.simulate(lambda: pmod.pmean(1.0, "data", weight=3), data=2)
    [1.0, 1.0]
    """
    bound = resolve(axis, "pmean")
    asked = accumulate_in(reduce_dtype, "pmean", bound)
    if weight is None:
        return _fused("pmean", PSUM, x, bound, (bound.size, asked), check_mean, float)
    return map_leaves(as_piece(partial(_weighted, weight, bound, asked), "pmean"), x, "pmean", bound)


def _weighted(weight: Tensor | float, axis: Axis, asked: str | None, leaves: list[Any]) -> list[Any]:
    xs = [x if isinstance(x, Tensor) else from_number(x, float, "pmean", axis) for x in leaves]
    for x in xs:
        check_tensor(x, "pmean", axis)
        check_mean(x, "pmean", axis)
    wide = [x.to(accumulator(x.dtype, asked)) for x in xs]
    weights: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    for x in wide:
        if (x.dtype, x.device) not in weights:
            weights[x.dtype, x.device] = _weight_like(weight, x, axis)
        _check_broadcasts(weights[x.dtype, x.device], x, axis)
    parts = [_counted(x, weights[x.dtype, x.device]) for x in wide]
    sums = together(PSUM, parts + list(weights.values()), axis, (1, asked))
    totals = dict(zip(weights, sums[len(wide) :], strict=True))
    ys = [(y / totals[y.dtype, y.device]).to(x.dtype) for x, y in zip(xs, sums, strict=False)]
    return [y if isinstance(x, Tensor) else y.item() for x, y in zip(leaves, ys, strict=True)]


def _counted(x: Tensor, weight: Tensor) -> Tensor:
    """x times its weight; of weight 0 also where x is not finite: torch's mean of no samples is NaN."""
    return torch.where((weight == 0) & ~x.isfinite(), 0, x) * weight


def _weight_like(weight: Tensor | float, x: Tensor, axis: Axis) -> Tensor:
    if isinstance(weight, Tensor):
        check_tensor(weight, "pmean", axis, name="weight")
        if weight.is_complex() and not x.is_complex():
            raise wrong(ArgumentError, "pmean", axis, "weight is complex and x is real", "Pass a real weight.")
        return weight.to(x.dtype)
    number = as_number(weight)
    if number is None or isinstance(number, complex):
        raise wrong(ArgumentError, "pmean", axis, f"weight is {quoted(weight)}", "Pass a real number, or a tensor.")
    try:
        return torch.tensor(number, dtype=x.dtype, device=x.device)
    except (OverflowError, RuntimeError):  # torch raises either
        raise wrong(ArgumentError, "pmean", axis, f"weight is {weight}, too large for a float", "Divide all.") from None


def _check_broadcasts(weight: Tensor, x: Tensor, axis: Axis) -> None:
    shape, wanted = weight.shape, x.shape
    fits = len(shape) <= len(wanted) and all(
        w in (1, k) for w, k in zip(reversed(shape), reversed(wanted), strict=False)
    )
    if not fits:
        given = f"weight has shape {tuple(shape)} and x has shape {tuple(wanted)}"
        raise wrong(ShapeError, "pmean", axis, given, "Pass a number, or a weight that broadcasts to x.")


def pvary(x: Tree, axis: AxisLike, *, reduce_dtype: torch.dtype | None = None) -> Tree:
    """Use an invariant value in varying computation: x itself, whose gradient is summed over the axis.

    I -> V. Transpose: psum; one message per dtype and device for a whole tree.
    Shapes: x (...) -> (...); the result may share storage with x. Cost: nothing forward.
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
    params = (1, accumulate_in(reduce_dtype, "pvary", bound))
    return _fused("pvary", PVARY, x, bound, params, _anything)


# --- pmax, pmin: not linear, composed from the rows -----------------------------------------------


def _send_extremum(x: Tensor, wire: Wire, params: Params) -> Sent:
    how: Reduction = params[0]
    if x.dtype in SIGNED:  # with the first bit turned over, signed numbers are in the order of the unsigned ones
        signed = SIGNED[x.dtype]
        first = torch.iinfo(signed).min
        sent = wire.all_reduce(x.view(signed) ^ first, how, signed, 1)
        return sent.then(lambda y: (y ^ first).view(x.dtype))
    carried = x.to(torch.uint8) if x.dtype == torch.bool else x.to(torch.bfloat16) if is_eight_bits(x) else x
    return wire.all_reduce(carried, how, carried.dtype, 1).then(lambda y: y.to(x.dtype))


EXTREMUM = without_derivative(Row("extremum", V, I, _send_extremum, fused=True))


def pmax(x: Tree, axis: AxisLike) -> Tree:
    """Elementwise maximum over the axis; a NaN on any rank comes through.

    V -> I. Derivative: to the ranks that attain it, shared equally among them; it exists where the maximum is NaN or
    infinite, too. Where one is wanted, a second message counts those ranks (2 x).
    Shapes: x (...) -> (...). bool is any; numbers, numpy's scalars too, come back as Python numbers of x's type, ints
    of up to 63 bits. Of zeros, +0.0 is larger than -0.0.
    Cost: as psum. Raises: ArgumentError for complex. JAX: lax.pmax, which has no derivative.

    >>> pmod.simulate(lambda: pmod.pmax(torch.tensor([1.0, pmod.axis_index("model")]), "model"), model=2)
    [tensor([1., 1.]), tensor([1., 1.])]
    """
    return _extremum("pmax", "max", x, axis)


def pmin(x: Tree, axis: AxisLike) -> Tree:
    """Elementwise minimum over the axis; a NaN on any rank comes through.

    V -> I. As `pmax` in all else; bool is all.

    >>> pmod.simulate(lambda: pmod.pmin(pmod.axis_index("model") - 2, "model"), model=2)
    [-2, -2]
    """
    return _extremum("pmin", "min", x, axis)


def _extremum(function: str, how: Reduction, tree: Tree, axis: AxisLike) -> Tree:
    bound = resolve(axis, function)

    def run(leaves: list[Any]) -> list[Any]:
        xs = [x if isinstance(x, Tensor) else from_number(x, int, function, bound) for x in leaves]
        for x in xs:
            check_tensor(x, function, bound)
            check_order(x, function, bound)
        if bound.size == 1:
            return [unmoved([x])[0] if isinstance(x, Tensor) else as_number(x) for x in leaves]
        values = together(EXTREMUM, [x.detach() for x in xs], bound, (how,))
        smooth = [i for i, x in enumerate(xs) if x.is_floating_point() and differentiated(x)]
        derived = _attach([_computable(xs[i]) for i in smooth], [_computable(values[i]) for i in smooth], bound)
        for i, y in zip(smooth, derived, strict=True):
            values[i] = y.to(xs[i].dtype)
        kinds: list[Any] = [None if isinstance(x, Tensor) else type(as_number(x)) for x in leaves]
        return [y if kind is None else kind(y.item()) for kind, y in zip(kinds, values, strict=True)]

    return map_leaves(as_piece(run, function), tree, function, bound)


def differentiated(x: Tensor) -> bool:
    """Whether somebody may ask for a derivative with respect to x."""
    return (
        (torch.is_grad_enabled() and x.requires_grad)
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _computable(x: Tensor) -> Tensor:
    """x in a dtype that torch computes in."""
    return x.to(computed_in(x.dtype))


def _attach(xs: list[Tensor], values: list[Tensor], axis: Axis) -> list[Tensor]:
    """The values with the derivative of an extremum: the mean over the ranks that attain it.

    s below is that mean up to a constant factor, and is linear in x; s - s.detach() is exactly 0 with the derivative of
    s. The factor 1 / (2n) keeps the sum finite for the largest finite x. Where the value is infinite the difference
    would be NaN, and s itself is the value.
    """
    if not xs:
        return []
    n = axis.size
    attained = [(x.detach() == y) | (x.detach().isnan() & y.isnan()) for x, y in zip(xs, values, strict=True)]
    parts = [torch.where(hit, x / (2 * n), 0) for hit, x in zip(attained, xs, strict=True)]
    hits = [hit.to(x.dtype) for hit, x in zip(attained, xs, strict=True)]
    sums = together(PSUM, parts + hits, axis, (1, None))
    out: list[Tensor] = []
    for y, s, count in zip(values, sums[: len(xs)], sums[len(xs) :], strict=True):
        scale = 2 * n / count.detach()  # a constant: a tangent of 0 times an infinite s would be NaN
        # subtracted: -0.0 stays what it is
        out.append(torch.where(y.isfinite(), y - (s.detach() - s) * scale, s * scale))
    return out


# --- pick <-> place -------------------------------------------------------------------------------


def _send_broadcast(x: Tensor, wire: Wire, params: Params) -> Sent:
    return wire.broadcast(x, params[0])


def _send_place(x: Tensor, wire: Wire, params: Params) -> Tensor:
    return x if wire.index == params[0] else torch.zeros_like(x)


PICK, PLACE = pair(
    Row(
        "pick", V, I, _send_broadcast, fused=True,
        why="one rank used the value: all others get the gradient from there",
    ),
    Row(
        "place", I, V, _send_place, local=True,
        why="the value came from one rank: the gradient goes to it alone",
    ),
)


def pick(x: Tree, axis: AxisLike, *, src: int = 0) -> Tree:
    """src's value, as one value that all ranks hold and use alike.

    V -> I. Transpose: place. `broadcast` is the V -> V form, for a value that each rank then uses in its own way.
    Shapes: x (...) -> (...), the same shape on all ranks. Cost: one broadcast.
    Raises: AxisError where src is no index along the axis.

    >>> pmod.simulate(lambda: pmod.pick(torch.tensor(10 + pmod.axis_index("model")), "model", src=1), model=2)
    [tensor(11), tensor(11)]
    """
    bound = resolve(axis, "pick")
    return _fused("pick", PICK, x, bound, (check_root(src, "pick", bound, name="src"),), _anything)


def place(x: Tree, axis: AxisLike, *, dst: int = 0) -> Tree:
    """An invariant value put on one rank: x on dst, zeros elsewhere.

    I -> V. Transpose: pick. Shapes: x (...) -> (...); on dst the result may share storage with x.
    Cost: nothing forward, one broadcast backward. Raises: AxisError where dst is no index along the axis.

    >>> pmod.simulate(lambda: pmod.place(torch.tensor(5), "model", dst=1), model=2)
    [tensor(0), tensor(5)]
    """
    bound = resolve(axis, "place")
    return _fused("place", PLACE, x, bound, (check_root(dst, "place", bound, name="dst"),), _anything)


# --- broadcast <-> reduce -------------------------------------------------------------------------


def _send_reduce(x: Tensor, wire: Wire, params: Params) -> Sent:
    root, asked = params
    return real_sum(x, lambda y, _: wire.reduce(y, root, accumulator(y.dtype, asked)))


BROADCAST, REDUCE = pair(
    Row(
        "broadcast", V, V, _send_broadcast, fused=True,
        why="the sum stands on one rank: what flows back to it is every summand's gradient",
    ),
    Row(
        "reduce", V, V, _send_reduce, fused=True,
        why="every rank used the one rank's value: what they send back adds up there",
    ),
)


def broadcast(x: Tree, axis: AxisLike, *, src: int = 0, reduce_dtype: torch.dtype | None = None) -> Tree:
    """src's value on every rank, each of which goes on in its own way: the gradients add up on src.

    V -> V. Transpose: reduce. `pick` is the V -> I form, for a value that all ranks use alike.
    Shapes: x (...) -> (...), the same shape on all ranks. Cost: one broadcast. reduce_dtype: what 16-bit gradients add
    up in, float32 by default. Raises: AxisError where src is no index along the axis.

    >>> pmod.simulate(lambda: pmod.broadcast(torch.tensor(10 + pmod.axis_index("model")), "model", src=1), model=2)
    [tensor(11), tensor(11)]
    """
    bound = resolve(axis, "broadcast")
    params = (check_root(src, "broadcast", bound, name="src"), accumulate_in(reduce_dtype, "broadcast", bound))
    return _fused("broadcast", BROADCAST, x, bound, params, _anything)


def reduce(x: Tree, axis: AxisLike, *, dst: int = 0, reduce_dtype: torch.dtype | None = None) -> Tree:
    """The sum on dst, zeros elsewhere.

    V -> V. Transpose: broadcast. Shapes: x (...) -> (...).
    Cost: x sent to dst by every other rank. 16-bit floats add up in float32 unless reduce_dtype says otherwise.
    Raises: AxisError where dst is no index along the axis; ArgumentError for bool.

    >>> pmod.simulate(lambda: pmod.reduce(torch.tensor(1 + pmod.axis_index("model")), "model", dst=1), model=2)
    [tensor(0), tensor(3)]
    """
    bound = resolve(axis, "reduce")
    params = (check_root(dst, "reduce", bound, name="dst"), accumulate_in(reduce_dtype, "reduce", bound))
    return _fused("reduce", REDUCE, x, bound, params, check_sum)


# --- permute <-> its inverse ----------------------------------------------------------------------


def _send_permute(x: Tensor, wire: Wire, params: Params) -> Sent:
    targets, *uneven = params
    source = targets.index(wire.index) if wire.index in targets else None
    target = targets[wire.index] if targets[wire.index] >= 0 else None
    return wire.permute(x, target, source, uneven[-1] if uneven else None)


def _inverse(params: Params) -> Params:
    targets, *uneven = params
    inverse = tuple(targets.index(rank) if rank in targets else -1 for rank in range(len(targets)))
    if not uneven:
        return (inverse,)
    dim, held, given = uneven
    return inverse, dim, given, held


def _given(params: Params, xs: Sequence[Tensor], index: int) -> list[list[int]] | None:
    if len(params) == 1:
        return None
    _, dim, _, given = params
    return [[*x.shape[:dim], given[index], *x.shape[x.dim() + dim + 1 :]] for x in xs]


def _but_for_length(params: Params, shape: tuple[int, ...]) -> tuple[Params, tuple[int, ...]]:
    """With sizes, the ranks hold different lengths along the dim."""
    if len(params) == 1:
        return params, shape
    at = len(shape) + params[1]
    return params, (*shape[:at], -1, *shape[at + 1 :])


# targets: where each rank's value goes, -1 for nowhere. If the ranks hold different lengths along a dim: that dim, the
# lengths that they hold, and those that they are given. A rank to which nobody sends keeps its own length (zeros), so
# that equal sizes change nothing; in the transpose its length is that of what it held
PERMUTE = Row(
    "permute", V, V, _send_permute, flip=_inverse, fused=True, alone=False, agreed=_but_for_length, resized=_given,
    why="each value's gradient goes back to the rank that it came from",
)  # fmt: skip
pair(PERMUTE, PERMUTE)


def _stay(function: str, axis: Axis, leaves: list[Any]) -> list[Any]:
    for x in leaves:
        check_tensor(x, function, axis)
    return [unmoved([x])[0] for x in leaves]


def _permuted(
    function: str, x: Tree, axis: Axis, targets: tuple[int, ...], sizes: Sequence[int] | None, dim: int
) -> Tree:
    if sizes is not None:
        return _permuted_uneven(function, x, axis, targets, check_sizes(sizes, function, axis), dim)
    if targets == tuple(range(axis.size)):  # nothing moves
        if isinstance(x, Tensor):
            check_tensor(x, function, axis)
            return cast(Tree, unmoved([x])[0])
        return map_leaves(partial(_stay, function, axis), x, function, axis)
    return _fused(function, PERMUTE, x, axis, (targets,), _anything)


def _permuted_uneven(
    function: str, tree: Tree, axis: Axis, targets: tuple[int, ...], sizes: tuple[int, ...], dim: int
) -> Tree:
    """Each rank gets the length of the rank that sends to it, or zeros of its own length."""
    given = tuple([sizes[targets.index(rank) if rank in targets else rank] for rank in range(axis.size)])

    def run(leaves: list[Any]) -> list[Any]:
        at: list[int] = []
        for x in leaves:
            check_tensor(x, function, axis)
            at.append(dim_from_end(dim, x, function, axis))
            check_own_size(x, at[-1], sizes, function, axis, "Pass the length that each rank holds along dim.")
        if targets == tuple(range(axis.size)):  # nothing moves
            return _stay(function, axis, leaves)
        if len(set(sizes)) == 1:
            return together(PERMUTE, leaves, axis, (targets,))
        # one message per dtype and device, where the dim is as far from the end
        out: dict[int, Any] = {}
        for end in sorted(set(at)):
            some = [i for i, one in enumerate(at) if one == end]
            ys = together(PERMUTE, [leaves[i] for i in some], axis, (targets, end, sizes, given))
            out.update(zip(some, ys, strict=True))
        return [out[i] for i in range(len(leaves))]

    return map_leaves(as_piece(run, function), tree, function, axis)


def ppermute(
    x: Tree, axis: AxisLike, perm: Sequence[tuple[int, int]], *, sizes: Sequence[int] | None = None, dim: int = 0
) -> Tree:
    """Send along (source, target) pairs of indices; zeros where nothing arrives.

    V -> V. Transpose: the inverse permutation.
    Shapes: x (...) -> (...), the same shape on all ranks. With sizes, the lengths that the ranks hold along `dim`:
    x (..., sizes[i], ...) on rank i -> (..., sizes[s], ...), s being the rank that sends to it; where nothing arrives
    zeros like x.
    Cost: x sent once; where nothing moves, nothing is sent.
    Raises: AxisError where an index is outside the axis, or a source or a target comes twice; ShapeError where sizes[i]
    is not this rank's length.
    JAX: lax.ppermute, which numbers the ranks of a tuple of axes in mesh order; here the first name is slowest.

    >>> pmod.simulate(lambda: pmod.ppermute(torch.tensor(1 + pmod.axis_index("model")), "model", [(0, 1)]), model=2)
    [tensor(0), tensor(1)]
    >>> def swap():
    ...     mine = torch.full((1 + pmod.axis_index("model"),), pmod.axis_index("model"))
    ...     return pmod.ppermute(mine, "model", [(0, 1), (1, 0)], sizes=(1, 2))
    >>> pmod.simulate(swap, model=2)
    [tensor([1, 1]), tensor([0])]
    """
    bound = resolve(axis, "ppermute")
    return _permuted("ppermute", x, bound, targets_of(perm, "ppermute", bound), sizes, dim)


def pshuffle(
    x: Tree, axis: AxisLike, perm: Sequence[int], *, sizes: Sequence[int] | None = None, dim: int = 0
) -> Tree:
    """Output i comes from input perm[i].

    V -> V. Transpose: the inverse permutation.
    Shapes: x (...) -> (...), the same shape on all ranks. With sizes, the lengths that the ranks hold along `dim`:
    x (..., sizes[i], ...) -> (..., sizes[perm[i]], ...) on rank i.
    Cost: x sent once; where nothing moves, nothing is sent.
    Raises: AxisError where perm is no permutation; ShapeError where sizes[i] is not this rank's length.
    JAX: lax.pshuffle.

    >>> pmod.simulate(lambda: pmod.pshuffle(torch.tensor(pmod.axis_index("x")), "x", [2, 0, 1]), x=3)
    [tensor(2), tensor(0), tensor(1)]
    """
    bound = resolve(axis, "pshuffle")
    sources = check_permutation(perm, "pshuffle", bound)
    targets = sources if bound.size == 1 else tuple([sources.index(rank) for rank in range(bound.size)])
    return _permuted("pshuffle", x, bound, targets, sizes, dim)


def pshift(
    x: Tree,
    axis: AxisLike,
    offset: int = 1,
    *,
    wrap: bool = True,
    sizes: Sequence[int] | None = None,
    dim: int = 0,
) -> Tree:
    """The value of the rank `offset` before: a step of a ring. Without wrap, zeros where nothing arrives.

    V -> V. Transpose: the shift back.
    Shapes: x (...) -> (...), the same shape on all ranks. With sizes, the lengths that the ranks hold along `dim`:
    x (..., sizes[i], ...) on rank i -> (..., sizes[i - offset], ...); where nothing arrives zeros like x. A ring's next
    step has these lengths: `sizes` shifted as the shards were.
    Cost: x sent once.
    Raises: AxisError where offset is no int; ShapeError where sizes[i] is not this rank's length.

    >>> pmod.simulate(lambda: pmod.pshift(torch.tensor(pmod.axis_index("x")), "x"), x=3)
    [tensor(2), tensor(0), tensor(1)]
    >>> pmod.simulate(lambda: pmod.pshift(torch.arange(pmod.axis_index("x")), "x", sizes=(0, 1, 2)), x=3)
    [tensor([0, 1]), tensor([], dtype=torch.int64), tensor([0])]
    """
    bound = resolve(axis, "pshift")
    check_flag(wrap, "pshift", "wrap")
    steps = as_int(offset)
    if steps is None:
        raise wrong(AxisError, "pshift", bound, f"offset is {quoted(offset)}", "Pass an int.")
    n = bound.size
    targets = tuple([(rank + steps) % n if wrap or 0 <= rank + steps < n else -1 for rank in range(n)])
    return _permuted("pshift", x, bound, targets, sizes, dim)


# --- where this rank is ---------------------------------------------------------------------------


def axis_index(axis: AxisLike) -> int:
    """This rank's index along the axis; of a tuple, in the flattened group (first name slowest).

    A Python int, also in compiled code. JAX: lax.axis_index, which is traced.
    Raises: AxisError for an axis that the mesh lacks; NoMeshError where a name is given and no mesh is set.

    >>> pmod.simulate(lambda: pmod.axis_index(("data", "model")), data=2, model=2)
    [0, 1, 2, 3]
    """
    if torch._C._len_torch_function_stack() > 0:  # shard_map follows who knows where it is
        return handle_torch_function(axis_index, (), axis)
    return resolve(axis, "axis_index").index


def axis_size(axis: AxisLike) -> int:
    """The number of ranks along the axis; of a tuple, the product. JAX: lax.axis_size.

    Raises: as `axis_index`.

    >>> pmod.axis_size(mesh["model"])
    1
    """
    return resolve(axis, "axis_size").size


_BARRIER = Row("barrier", V, V, _send_pvary)  # for who watches: nothing is bound


def barrier(axis: AxisLike) -> None:
    """Wait until every rank of the axis has come here.

    Raises: PmodError under torch.compile, whose graphs hold no effects.

    >>> pmod.barrier(mesh["model"])
    """
    if torch.compiler.is_compiling():
        raise PmodError(explain("barrier", "it is called in compiled code", "Call it outside the compiled function."))
    bound = resolve(axis, "barrier")
    with told(Call(_BARRIER, bound, ()), [], origin()):
        wire_of(bound, "barrier", Said("barrier", code_of("barrier"), otherwise="nothing")).barrier()
