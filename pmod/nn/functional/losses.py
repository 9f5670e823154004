"""Losses over a field that is cut: the same number on every rank, that of the whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pmod._core.arguments import check_tensor, wrong
from pmod._errors import ArgumentError, ShapeError
from pmod._mesh.ambient import resolve
from pmod._mesh.axis import Axis
from pmod.nn.functional.given import Axes, check_choice, check_kind
from pmod.nn.functional.links import total


def _axes(function: str, axis: Axes) -> list[Axis]:
    """Return the axes that the field is cut over: which dim each cuts does not matter."""
    if not isinstance(axis, Mapping):
        return [resolve(axis, function)]
    return [resolve(axis[key], function) for key in sorted(axis, key=repr)]


def _parsed(
    function: str,
    tensors: dict[str, Tensor | None],
    reduction: str,
    axis: Axes,
) -> list[Axis]:
    """Return the axes; the tensors are checked, which are alike."""
    axes = _axes(function, axis)
    if not axes:
        raise ArgumentError(f"pmod.{function}: axis is an empty mapping.")
    check_choice(reduction, "reduction", ("none", "mean", "sum"), function, axes[0])
    shape: tuple[int, ...] | None = None
    for name, x in tensors.items():
        if x is None and name == "weight":
            continue
        check_tensor(x, function, axes[0], name=name)
        assert x is not None
        check_kind(x, "floating or complex", function, axes[0], name=name)
        shape = tuple(x.shape) if shape is None else shape
        if tuple(x.shape) != shape:
            said = f"input is {shape} and {name} {tuple(x.shape)}"
            right = f"Pass {name} in the shape of input: nothing is broadcast."
            raise wrong(ShapeError, function, axes[0], said, right)
    return axes


def _summed(x: Tensor, axes: list[Axis]) -> Tensor:
    for of in axes:
        x = total(x, of)
    return x


def _reduced(
    errors: Tensor, weight: Tensor | None, reduction: str, axes: list[Axis]
) -> Tensor:
    """Return the errors, their sum, or their mean over the whole."""
    heavy = errors if weight is None else errors * weight
    if reduction == "none":
        return heavy
    wide = heavy.float() if heavy.dtype in (torch.float16, torch.bfloat16) else heavy
    # both sums travel together
    share = wide.new_full((), wide.numel()) if weight is None else weight.sum()
    sums = _summed(torch.stack([wide.sum(), share.to(wide.dtype)]), axes)
    y = sums[0] if reduction == "sum" else sums[0] / sums[1]
    return y.to(errors.dtype)


def mse_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    weight: Tensor | None = None,
    *,
    axis: Axes,
) -> Tensor:
    """Return torch.nn.functional.mse_loss of the whole field.

    weight: of each point, its area for example; a mean is then sum(weight * error) /
    sum(weight). Which dim an axis cuts does not matter, and no lengths are needed.

    V -> I. With reduction="none" V -> V, and nothing is sent. Shapes: input, target,
    weight (...), all the same -> ().
    Cost: two numbers to every rank of each axis.
    Raises: ShapeError for tensors of other shapes; ArgumentError for another reduction.

    >>> def loss():
    ...     x = pmod.shard(torch.tensor([0.0, 1.0, 5.0]), "x")
    ...     return pmod.nn.functional.mse_loss(x, torch.zeros_like(x), "sum", axis="x")
    >>> pmod.simulate(loss, x=2)
    [tensor(26.), tensor(26.)]
    """
    tensors = {"input": input, "target": target, "weight": weight}
    axes = _parsed("nn.functional.mse_loss", tensors, reduction, axis)
    return _reduced((input - target).square(), weight, reduction, axes)


def l1_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    weight: Tensor | None = None,
    *,
    axis: Axes,
) -> Tensor:
    """Return torch.nn.functional.l1_loss of the whole field.

    V -> I. weight, Shapes, Cost, Raises: as `mse_loss`.

    >>> def loss():
    ...     x = pmod.shard(torch.tensor([0.0, 1.0, 5.0]), "x")
    ...     return pmod.nn.functional.l1_loss(x, torch.zeros_like(x), axis="x")
    >>> pmod.simulate(loss, x=2)
    [tensor(2.), tensor(2.)]
    """
    tensors = {"input": input, "target": target, "weight": weight}
    axes = _parsed("nn.functional.l1_loss", tensors, reduction, axis)
    return _reduced((input - target).abs(), weight, reduction, axes)


def relative_l2_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    weight: Tensor | None = None,
    *,
    axis: Axes,
) -> Tensor:
    """Return the norm of each sample's error over that of its target.

    A sample is what stands under one index of the first dim, which is not cut; weight:
    of each point, its area for example. reduction: the mean of the samples, their sum,
    or none of both.

    V -> I. Shapes: input, target, weight (n, ...), all the same -> (), or (n,).
    Cost: two numbers for each sample to every rank of each axis.
    Raises: as `mse_loss`; a target of zeros gives inf or nan.

    >>> def loss():
    ...     x = pmod.shard(torch.tensor([[3.0, 8.0]]), "x", dim=1)
    ...     y = pmod.shard(torch.tensor([[0.0, 4.0]]), "x", dim=1)
    ...     return pmod.nn.functional.relative_l2_loss(x, y, axis="x")
    >>> pmod.simulate(loss, x=2)
    [tensor(1.2500), tensor(1.2500)]
    """
    function = "nn.functional.relative_l2_loss"
    tensors = {"input": input, "target": target, "weight": weight}
    axes = _parsed(function, tensors, reduction, axis)
    if isinstance(axis, Mapping) and {0, -input.dim()} & set(axis):
        said = "dim 0, that of the samples, is cut"
        right = "Take the mean of the samples' losses with pmean."
        raise wrong(ShapeError, function, axes[0], said, right)
    if input.dim() < 2:
        said = f"input is {tuple(input.shape)}"
        raise wrong(ShapeError, function, axes[0], said, "Pass (samples, ...).")
    errors, size = (input - target).abs().square(), target.abs().square()
    if weight is not None:
        errors, size = errors * weight, size * weight
    sums = torch.stack([errors.flatten(1).sum(1), size.flatten(1).sum(1)])
    # of an error of 0 the norm has no derivative: 0 is what torch's norm has
    sums = _summed(sums, axes)
    nothing = sums == 0
    norms = sums.masked_fill(nothing, 1.0).sqrt().masked_fill(nothing, 0.0)
    ratio = norms[0] / norms[1]
    if reduction == "none":
        return ratio
    return ratio.sum() if reduction == "sum" else ratio.mean()
