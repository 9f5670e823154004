"""Layers whose weights are cut: embedding and cross entropy over a cut vocabulary, linear."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pmod._core.arguments import as_int, as_real, check_tensor, dim_from_end, wrong
from pmod._errors import ArgumentError, PmodError, ShapeError, quoted
from pmod._mesh.ambient import resolve
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import AxisLike
from pmod.nn.functional.along import check_inside, check_numbers, top_of
from pmod.nn.functional.given import (
    Along,
    Axes,
    Held,
    Sizes,
    Spread,
    bound,
    check_choice,
    check_kind,
    cuts_told,
    held_of,
)
from pmod.nn.functional.links import tied, total, varied

_CLASSES = Along((-2,), "that of the rows", "Pass 0: a weight is (rows, features).")


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    *,
    axis: AxisLike,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return torch.nn.functional.embedding of a weight whose rows are cut.

    input: the same numbers of the whole's rows on every rank; weight: this rank's rows,
    in the order of the ranks; padding_idx: a row of the whole, whose gradient is 0.
    sizes: how many rows each rank has.

    V -> I. The input is I. Shapes: input (...), weight (k, e) -> (..., e).
    Cost: the result summed over the ranks; a row that a rank does not have is 0 there.
    Raises: ShapeError for sizes that do not fit; ArgumentError for numbers that are not
    integers; IndexError, of torch, for a row that is not there.

    >>> def looked_up():
    ...     table = pmod.shard(torch.arange(4.0)[:, None], "x")
    ...     return pmod.nn.functional.embedding(torch.tensor([3, 0]), table, axis="x")
    >>> pmod.simulate(looked_up, x=2)[0]
    tensor([[3.],
            [0.]])
    """
    function = "nn.functional.embedding"
    spread = Spread(axis, 0, sizes)
    bounds = bound(function, spread, 0)
    of = bounds[0][1]
    check_tensor(weight, function, of, name="weight")
    check_numbers(function, input, "input", of)
    check_kind(weight, "floating or complex", function, of, name="weight")
    if weight.dim() != 2:
        said = f"weight is {tuple(weight.shape)}"
        raise wrong(ShapeError, function, of, said, "Pass (rows, features).")
    (held,) = held_of(
        function, cuts_told(function, spread, bounds), weight, _CLASSES
    ).values()
    padding = _own_row(function, padding_idx, held)
    check_inside(input, held.total)
    rows = weight.shape[0]
    if not rows:
        # every rank takes part in the sum, and in the sum of gradients
        shape = (*input.shape, weight.shape[1])
        return total(tied(weight.new_zeros(shape), weight), of)
    local = input - held.start
    inside = (local >= 0) & (local < rows)
    y = F.embedding(local.clamp(0, rows - 1), weight, padding)
    return total(y.masked_fill(~inside.unsqueeze(-1), 0.0), of)


def _own_row(function: str, given: object, held: Held) -> int | None:
    """Return which row of this rank's is a row of the whole; None if none is."""
    if given is None:
        return None
    row = as_int(given)
    if row is None or not -held.total <= row < held.total:
        said = f"padding_idx is {quoted(given)} and the whole has {held.total} rows"
        right = "Pass a row of the whole."
        raise wrong(ShapeError, function, held.axis, said, right)
    own = row % held.total - held.start
    if 0 <= own < held.sizes[held.place]:
        return own
    return None


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    axis: AxisLike,
    dim: int = 0,
) -> Tensor:
    """Return torch.nn.functional.linear of a weight that is cut.

    dim: that of the weight which is cut. 0, by column in the words of tensor
    parallelism: this rank's features of the result, bias being theirs. 1, by row: the
    input's features are cut as the weight's, and the result is one value, to which the
    whole's bias is added once.

    I -> V. With dim=1 V -> I. The weight is V, the bias as the result.
    Shapes: input (..., k), weight (m, k) -> (..., m).
    Cost: dim=0: nothing forward, backward the gradient of the input summed; dim=1: the
    result summed, nothing backward.
    Raises: ShapeError for shapes that do not fit.

    >>> def layers():
    ...     x, ones = torch.ones(1, 3), torch.ones(2, 3)  # of a whole (4, 3)
    ...     y = pmod.nn.functional.linear(x, ones, axis="model")
    ...     return pmod.nn.functional.linear(y, torch.ones(3, 2), axis="model", dim=1)
    >>> pmod.simulate(layers, model=2)[0]
    tensor([[12., 12., 12.]])
    """
    function = "nn.functional.linear"
    of = resolve(axis, function)
    check_tensor(input, function, of, name="input")
    check_tensor(weight, function, of, name="weight")
    if bias is not None:
        check_tensor(bias, function, of, name="bias")
    check_kind(input, "floating or complex", function, of)
    if weight.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
        said = f"weight is {weight.dtype} and input {input.dtype}"
        right = f"Pass weight.to({input.dtype})."
        raise wrong(ArgumentError, function, of, said, right)
    shapes = f"input is {tuple(input.shape)} and weight {tuple(weight.shape)}"
    if weight.dim() != 2 or not input.dim() or input.shape[-1] != weight.shape[1]:
        right = "Pass input (..., k) and weight (m, k)."
        raise wrong(ShapeError, function, of, shapes, right)
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        said = f"bias is {tuple(bias.shape)} and weight {tuple(weight.shape)}"
        raise wrong(ShapeError, function, of, said, f"Pass ({weight.shape[0]},).")
    if dim_from_end(dim, weight, function, of) == -2:
        return F.linear(varied(input, of), weight, bias)
    y = total(F.linear(input, weight), of)
    return y if bias is None else y + bias


# --- cross entropy --------------------------------------------------------------------


class _Entropy(NamedTuple):
    """What torch's cross entropy is given beside its tensors."""

    ignore_index: int
    smoothing: float
    classes: int


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return torch.nn.functional.cross_entropy of the whole.

    The classes may be cut, which is dim 1 of the input, the dims of a field, or both.
    target: numbers of the whole's classes, or their probabilities, cut as the input;
    along an axis that cuts the classes, numbers are the same on every rank. weight: of
    this rank's classes. dim: 1, unless given; sizes: only those of the classes matter.

    V -> I. With reduction="none" V along the axes of a field. Shapes: input (n,
    classes, ...), target (n, ...) or as input -> ().
    Cost: a few numbers for each element, in two messages along the classes; along a
    field two numbers.
    Raises: ShapeError for shapes or sizes that do not fit; ArgumentError for another
    reduction; IndexError, of torch, for a class that is not there.

    >>> def entropy():
    ...     logits = pmod.shard(torch.zeros(2, 4), "x", dim=1)
    ...     return pmod.nn.functional.cross_entropy(logits, torch.tensor([3, 0]), axis="x").exp()
    >>> pmod.simulate(entropy, x=2)[0]
    tensor(4.)
    """
    function = "nn.functional.cross_entropy"
    spread = Spread(axis, dim, sizes)
    bounds = bound(function, spread, 1)
    of = bounds[0][1]
    check_tensor(input, function, of, name="input")
    check_tensor(target, function, of, name="target")
    check_kind(input, "floating", function, of)
    check_choice(reduction, "reduction", ("none", "mean", "sum"), function, of)
    ignored = as_int(ignore_index)
    if ignored is None or not -(2**63) <= ignored < 2**63:
        said = f"ignore_index is {quoted(ignore_index)}"
        raise wrong(ArgumentError, function, of, said, "Pass an int.")
    smoothing = as_real(label_smoothing)
    if smoothing is None or not 0 <= smoothing <= 1:
        said = f"label_smoothing is {quoted(label_smoothing)}"
        raise wrong(ArgumentError, function, of, said, "Pass a number from 0 to 1.")
    _check_shapes(function, input, target, weight, of)
    at = 1 - input.dim()
    by_dim = {dim_from_end(key, input, function, one): one for key, one in bounds}
    cuts = [
        cut
        for cut in cuts_told(function, spread, bounds)
        if dim_from_end(cut.dim, input, function, of) == at
    ]
    held = Held(of, (int(input.shape[at]),))
    if cuts:
        along = Along((at,), "", "")
        held = held_of(function, cuts, input, along)[at]
    entropy = _Entropy(ignored, float(smoothing), held.total)
    loss, share = _of_each(input, target, weight, at, held, entropy)
    if reduction == "none":
        return loss.to(input.dtype)
    sums = torch.stack([loss.sum(), share.sum()])
    for other, one in by_dim.items():
        if other != at:
            sums = total(sums, one)
    if reduction == "sum":
        return sums[0].to(input.dtype)
    return (sums[0] / sums[1]).to(input.dtype)


def _check_shapes(
    function: str, x: Tensor, target: Tensor, weight: Tensor | None, of: Axis
) -> None:
    def error(given: str, right: str) -> PmodError:
        return wrong(ShapeError, function, of, given, right)

    if x.dim() < 2:
        raise error(f"input is {tuple(x.shape)}", "Pass (n, classes, ...).")
    wanted = tuple(x.shape)
    if not target.is_floating_point():
        wanted = (x.shape[0], *x.shape[2:])
        check_numbers(function, target, "target", of)
    if tuple(target.shape) != wanted:
        raise error(f"target is {tuple(target.shape)}", f"Pass {wanted}.")
    if weight is not None:
        check_tensor(weight, function, of, name="weight")
        if tuple(weight.shape) != (x.shape[1],):
            raise error(f"weight is {tuple(weight.shape)}", f"Pass ({x.shape[1]},).")


def _of_each(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    at: int,
    held: Held,
    given: _Entropy,
) -> tuple[Tensor, Tensor]:
    """Return the loss of each element, and what a mean divides by of it."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    moved = wide - top_of(wide, at, held.axis if len(held.sizes) > 1 else None)
    heavy = torch.ones(x.shape[at], dtype=wide.dtype, device=x.device)
    if weight is not None:
        heavy = weight.to(wide.dtype)
    heavy = heavy.view([-1] + [1] * (-at - 1))
    sums = [moved.exp().sum(at)]
    if target.is_floating_point():
        smooth = target.to(wide.dtype) * (1 - given.smoothing)
        smooth = (smooth + given.smoothing / given.classes) * heavy
        sums += [(smooth * moved).sum(at), smooth.sum(at)]
        powers, picked, share = _summed(sums, held)
        return powers.log() * share - picked, torch.ones_like(picked)
    kept = target != given.ignore_index
    check_inside(target.masked_fill(~kept, 0), given.classes)
    sums += _picked(moved, heavy, target - held.start, at)
    if given.smoothing:
        sums += [(moved * heavy).sum(at), heavy.expand(moved.shape).sum(at)]
    powers, picked, share, *rest = _summed(sums, held)
    logs = powers.log()
    loss = logs * share - picked
    if given.smoothing:
        others = (logs * rest[1] - rest[0]) * (given.smoothing / given.classes)
        loss = loss * (1 - given.smoothing) + others
    nothing = torch.zeros((), dtype=logs.dtype, device=logs.device)
    return loss.where(kept, nothing), share.where(kept, nothing)


def _picked(moved: Tensor, heavy: Tensor, rows: Tensor, at: int) -> list[Tensor]:
    """Return the weighted logits of the targets that are here, and their weights."""
    count = moved.shape[at]
    if not count:
        nothing = moved.sum(at)
        return [nothing, nothing]
    inside = (rows >= 0) & (rows < count)
    places = rows.clamp(0, count - 1).unsqueeze(at)
    out: list[Tensor] = []
    for x in (moved * heavy, heavy.expand(moved.shape)):
        out.append(x.gather(at, places).squeeze(at).masked_fill(~inside, 0.0))
    return out


def _summed(parts: list[Tensor], held: Held) -> tuple[Tensor, ...]:
    """Return sums over the classes of all ranks, in one message."""
    stacked = torch.stack(parts)
    if len(held.sizes) > 1:
        stacked = total(stacked, held.axis)
    return stacked.unbind(0)
