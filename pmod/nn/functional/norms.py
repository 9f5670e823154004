"""Norms of a cut tensor, whose statistics are those of the whole.

A rank takes the mean and the variance of its own block; those of all ranks travel in
one small message for each axis, and are joined on every rank alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pmod._core.arguments import (
    as_int,
    as_ints,
    as_real,
    check_tensor,
    wrong,
)
from pmod._errors import ArgumentError, ShapeError, quoted
from pmod._mesh.axis import Axis
from pmod.nn.functional.given import (
    Along,
    Axes,
    Held,
    Sizes,
    Spread,
    bound,
    check_flags,
    check_kind,
    cuts_told,
    held_of,
)
from pmod.nn.functional.links import stacked


class _Statistics(NamedTuple):
    """Of the whole, on every rank: broadcast against its block."""

    mean: Tensor
    variance: Tensor
    number: int


class _Norm(NamedTuple):
    """A norm, parsed: the dims that its statistics run over, those of them cut."""

    function: str
    dims: tuple[int, ...]
    held: dict[int, Held]
    eps: float | None

    @property
    def axis(self) -> Axis:
        """The axis that errors name."""
        return next(iter(self.held.values())).axis


class _Given(NamedTuple):
    """What is checked before anything is sent."""

    eps: object
    parameters: dict[str, Tensor | None]
    shape: tuple[int, ...]
    """That of each parameter."""


def _input(function: str, x: Tensor, spread: Spread, least: int) -> int:
    """Return how many dims the input has, which is checked."""
    axis = bound(function, spread, 0)[0][1]
    check_tensor(x, function, axis, name="input")
    check_kind(x, "floating", function, axis)
    if x.dim() < least:
        right = f"Pass an input of {least} dims or more."
        raise wrong(ShapeError, function, axis, f"input is {tuple(x.shape)}", right)
    return x.dim()


def _parsed(
    function: str,
    x: Tensor,
    spread: Spread,
    default: int,
    dims: tuple[int, ...],
    given: _Given,
) -> _Norm:
    """Return a norm over these dims, each counted from the end."""
    bounds = bound(function, spread, default)
    axis = bounds[0][1]
    for name, one in given.parameters.items():
        _check_parameter(function, axis, name, one, given.shape, x)
    eps = as_real(given.eps)
    if given.eps is not None and (eps is None or math.isnan(eps)):
        said = f"eps is {quoted(given.eps)}"
        raise wrong(ArgumentError, function, axis, said, "Pass a number.")
    named = ", ".join(map(str, sorted(dims)))
    right = f"Pass one of {named}; along others torch's own norm is that of the whole."
    along = Along(dims, "one that the statistics run over", right)
    held = held_of(function, cuts_told(function, spread, bounds), x, along)
    return _Norm(function, dims, held, None if eps is None else float(eps))


def _wide(x: Tensor) -> Tensor:
    """Return x in the dtype that statistics are taken in, which is torch's."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _own(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance of a block."""
    if math.prod([x.shape[at] for at in dims]):
        variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
        return mean, variance
    # of nothing both are 0, with a weight of 0
    nothing = x.sum(dims, keepdim=True)
    return nothing, nothing


def _joined(own: Tensor, held: Held, weights: Tensor) -> Tensor:
    """Return the mean over the ranks of means and variances, weighted by lengths.

    own: (2, ...). The variance of the whole is that within blocks and that of their
    means; no difference of large numbers is taken.
    """
    of_all = stacked(own, held.axis)
    weights = weights.view([-1] + [1] * own.dim())
    mean, variance = (of_all * weights).sum(0).unbind(0)
    between = (of_all[:, 0] - mean).square()
    return torch.stack([mean, variance + (between * weights[:, 0]).sum(0)])


def _weights(held: Held, x: Tensor) -> Tensor:
    shares = [size / held.total for size in held.sizes]
    return torch.tensor(shares, dtype=x.dtype, device=x.device)


def _statistics(x: Tensor, norm: _Norm) -> _Statistics:
    """Return the mean and the variance of the whole over the dims."""
    count = 1
    for at in norm.dims:
        count *= norm.held[at].total if at in norm.held else int(x.shape[at])
    if count == 0:
        raise wrong(
            ShapeError,
            norm.function,
            norm.axis,
            "the whole has nothing to take the mean of",
            "Pass an input with rows.",
        )
    own = torch.stack(_own(x, norm.dims))
    for held in norm.held.values():
        if held.axis.size > 1:
            own = _joined(own, held, _weights(held, own))
    return _Statistics(own[0], own[1], count)


def _scaled(
    x: Tensor,
    statistics: tuple[Tensor, Tensor],
    eps: float | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Return (x - mean) / sqrt(variance + eps) * weight + bias.

    As one multiplication and one addition: of the size of x only x is kept for
    backward.
    """
    mean, variance = statistics
    scale = (variance + (1e-5 if eps is None else eps)).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = bias + shift
    return torch.addcmul(shift, x, scale)


def _check_parameter(
    function: str,
    axis: Axis,
    name: str,
    given: Tensor | None,
    shape: tuple[int, ...],
    x: Tensor,
) -> None:
    """Raise unless a weight, a bias or a buffer fits."""
    if given is None:
        return
    check_tensor(given, function, axis, name=name)
    check_kind(given, "floating", function, axis, name=name)
    if tuple(given.shape) != shape:
        said = f"{name} is {tuple(given.shape)}"
        raise wrong(ShapeError, function, axis, said, f"Pass {shape}.")
    if given.device != x.device:
        said = f"{name} is on {given.device} and input on {x.device}"
        right = f"Pass {name}.to({str(x.device)!r})."
        raise wrong(ArgumentError, function, axis, said, right)


def _shaped(given: Tensor | None, shape: list[int]) -> Tensor | None:
    """Return a parameter in a shape that meets that of the input."""
    if given is None:
        return None
    return _wide(given).reshape(shape)


def _along_channels(given: Tensor | None, x: Tensor) -> Tensor | None:
    return _shaped(given, [-1] + [1] * (x.dim() - 2))


def _spatial(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2 - x.dim(), 0))


# --- over channels and the batch ------------------------------------------------------


class _Running(NamedTuple):
    """What a norm by channels is given beside its input."""

    mean: Tensor | None
    variance: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    momentum: float
    eps: float


def _by_channel(
    function: str,
    x: Tensor,
    given: _Running,
    spread: Spread,
    dims: tuple[int, ...],
    own_statistics: object,
) -> Tensor:
    """Normalize each channel, or each of each sample where the batch is not summed."""
    flag = "training" if "batch" in function else "use_input_stats"
    check_flags(function, **{flag: own_statistics})
    names = ("running_mean", "running_var", "weight", "bias")
    parameters: dict[str, Tensor | None] = dict(zip(names, given[:4], strict=True))
    checked = _Given(given.eps, parameters, (int(x.shape[1]),))
    default = 2 if x.dim() > 2 else 0
    axis = bound(function, spread, default)[0][1]
    if as_real(given.momentum) is None:
        said = f"momentum is {quoted(given.momentum)}"
        raise wrong(ArgumentError, function, axis, said, "Pass a number.")
    if not own_statistics and (given.mean is None or given.variance is None):
        said = "there are no running statistics, and none are taken"
        right = "Pass running_mean and running_var."
        raise wrong(ArgumentError, function, axis, said, right)
    norm = _parsed(function, x, spread, default, dims, checked)
    weight, bias = _along_channels(given.weight, x), _along_channels(given.bias, x)
    wide = _wide(x)
    mean, variance = _along_channels(given.mean, x), _along_channels(given.variance, x)
    if own_statistics:
        of = _statistics(wide, norm)
        if of.number == 1:
            said = "the whole has one value for each channel"
            right = "Pass more, or a norm with running statistics in eval."
            raise wrong(ShapeError, function, norm.axis, said, right)
        _remember(given, of)
        mean, variance = of.mean, of.variance
    assert mean is not None and variance is not None
    return _scaled(wide, (mean, variance), norm.eps, weight, bias).to(x.dtype)


def _remember(given: _Running, of: _Statistics) -> None:
    """Move the running statistics, by the same numbers on every rank."""
    with torch.no_grad():
        for buffer, new, factor in (
            (given.mean, of.mean, 1.0),
            (given.variance, of.variance, of.number / (of.number - 1)),
        ):
            if buffer is not None:
                # those of the samples count alike
                means = (new * factor).mean(0).flatten().to(buffer.dtype)
                buffer.mul_(1 - given.momentum).add_(means * given.momentum)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.batch_norm of the whole.

    In training its statistics are those of the whole. The running ones, which are
    changed in place, are those of one process, and the same on all ranks. The batch may
    be cut, the spatial dims, or several of them; dim: the first spatial one, or the
    batch where there is none.

    V -> V. The running statistics are I. Shapes: input (n, channels, k, ...) -> the
    same.
    Cost: two numbers for each channel to every rank of each axis, in training.
    Raises: ShapeError for shapes or sizes that do not fit; ArgumentError for integers.

    >>> def normalized():
    ...     x = pmod.shard(torch.tensor([[0.0], [1.0], [2.0], [3.0]]), "x")
    ...     y = pmod.nn.functional.batch_norm(x, None, None, training=True, axis="x")
    ...     return y.flatten().round(decimals=2)
    >>> pmod.simulate(normalized, x=2)
    [tensor([-1.3400, -0.4500]), tensor([0.4500, 1.3400])]
    """
    function, spread = "nn.functional.batch_norm", Spread(axis, dim, sizes)
    count = _input(function, input, spread, 2)
    dims = tuple([at for at in range(-count, 0) if at != 1 - count])
    given = _Running(running_mean, running_var, weight, bias, momentum, eps)
    return _by_channel(function, input, given, spread, dims, training)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.instance_norm of the whole.

    V -> V. The running statistics are I. Shapes: input (n, channels, k, ...) -> the
    same, cut along spatial dims.
    Cost: two numbers for each channel of each sample to every rank of each axis.
    Raises: as `batch_norm`.

    >>> def normalized():
    ...     x = pmod.shard(torch.tensor([[[0.0, 1.0, 2.0, 3.0]]]), "x", dim=-1)
    ...     return pmod.nn.functional.instance_norm(x, axis="x").flatten().round(decimals=2)
    >>> pmod.simulate(normalized, x=2)
    [tensor([-1.3400, -0.4500]), tensor([0.4500, 1.3400])]
    """
    function, spread = "nn.functional.instance_norm", Spread(axis, dim, sizes)
    _input(function, input, spread, 3)
    given = _Running(running_mean, running_var, weight, bias, momentum, eps)
    dims = _spatial(input)
    return _by_channel(function, input, given, spread, dims, use_input_stats)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.group_norm of the whole.

    V -> V. Shapes: input (n, channels, k, ...) -> the same, cut along spatial dims.
    Cost: two numbers for each group of each sample to every rank of each axis.
    Raises: as `batch_norm`.

    >>> def normalized():
    ...     x = pmod.shard(torch.tensor([[[0.0, 1.0, 2.0, 3.0]]]), "x", dim=-1)
    ...     return pmod.nn.functional.group_norm(x, 1, axis="x").flatten().round(decimals=2)
    >>> pmod.simulate(normalized, x=2)
    [tensor([-1.3400, -0.4500]), tensor([0.4500, 1.3400])]
    """
    function, spread = "nn.functional.group_norm", Spread(axis, dim, sizes)
    _input(function, input, spread, 3)
    axis_of = bound(function, spread, 2)[0][1]
    groups, channels = as_int(num_groups), int(input.shape[1])
    if groups is None or groups < 1 or channels % groups:
        said = f"num_groups is {quoted(num_groups)} and input has {channels} channels"
        raise wrong(ShapeError, function, axis_of, said, "Pass one that divides them.")
    given = _Given(eps, {"weight": weight, "bias": bias}, (channels,))
    norm = _parsed(function, input, spread, 2, _spatial(input), given)
    # a group's channels are one dim more that the statistics run over
    x = _wide(input).unflatten(1, (groups, channels // groups))
    of = _statistics(x, norm._replace(dims=(1 - input.dim(), *norm.dims)))
    shape = [groups, channels // groups] + [1] * (input.dim() - 2)
    w, b = _shaped(weight, shape), _shaped(bias, shape)
    y = _scaled(x, (of.mean, of.variance), norm.eps, w, b)
    return y.flatten(1, 2).to(input.dtype)


# --- over the last dims ---------------------------------------------------------------


def _over_last(
    function: str,
    x: Tensor,
    normalized_shape: Sequence[int],
    parameters: dict[str, Tensor | None],
    eps: object,
    spread: Spread,
) -> tuple[_Norm, list[Tensor | None]]:
    """Return a norm over the last dims, and this rank's part of its parameters."""
    _input(function, x, spread, 1)
    of = bound(function, spread, -1)[0][1]
    wanted = as_ints(normalized_shape)
    if not wanted or len(wanted) > x.dim():
        said = f"normalized_shape is {quoted(normalized_shape)}"
        right = "Pass the lengths of the whole along the last dims."
        raise wrong(ShapeError, function, of, said, right)
    count = len(wanted)
    dims = tuple(range(-count, 0))
    given = _Given(eps, parameters, tuple(wanted))
    norm = _parsed(function, x, spread, -count, dims, given)
    held = norm.held
    lengths: list[int] = []
    for at in dims:
        lengths.append(held[at].total if at in held else int(x.shape[at]))
    if lengths != list(wanted):
        said = f"normalized_shape is {tuple(wanted)}, but the whole has (..., {', '.join(map(str, lengths))})"
        raise wrong(ShapeError, function, norm.axis, said, "Pass the whole's lengths.")
    out: list[Tensor | None] = []
    for one in parameters.values():
        for at, cut in held.items():
            if one is not None:
                one = one.narrow(at, cut.start, x.shape[at])
        out.append(one)
    return norm, out


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.layer_norm of the whole.

    normalized_shape: the lengths of the whole along the last dims, of which some are
    cut; weight and bias are those of the whole, of which a rank uses its part. dim: the
    first of these dims.

    V -> V. Shapes: input (..., k, ...) -> the same.
    Cost: two numbers for each row that is normalized to every rank of each axis.
    Raises: as `batch_norm`.

    >>> def normalized():
    ...     x = pmod.shard(torch.tensor([0.0, 1.0, 2.0, 3.0]), "x")
    ...     return pmod.nn.functional.layer_norm(x, (4,), axis="x").round(decimals=2)
    >>> pmod.simulate(normalized, x=2)
    [tensor([-1.3400, -0.4500]), tensor([0.4500, 1.3400])]
    """
    function, spread = "nn.functional.layer_norm", Spread(axis, dim, sizes)
    parameters = {"weight": weight, "bias": bias}
    norm, (w, b) = _over_last(
        function, input, normalized_shape, parameters, eps, spread
    )
    of = _statistics(_wide(input), norm)
    pair = (of.mean, of.variance)
    shape = list(input.shape[-len(norm.dims) :])
    w, b = _shaped(w, shape), _shaped(b, shape)
    return _scaled(_wide(input), pair, norm.eps, w, b).to(input.dtype)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.rms_norm of the whole.

    normalized_shape, weight, dim: as in `layer_norm`.

    V -> V. Shapes: input (..., k, ...) -> the same.
    Cost: as `layer_norm`. Raises: as `batch_norm`.

    >>> def normalized():
    ...     x = pmod.shard(torch.tensor([3.0, 4.0]), "x")
    ...     return pmod.nn.functional.rms_norm(x, (2,), axis="x").round(decimals=2)
    >>> pmod.simulate(normalized, x=2)
    [tensor([0.8500]), tensor([1.1300])]
    """
    function, spread = "nn.functional.rms_norm", Spread(axis, dim, sizes)
    norm, (w,) = _over_last(
        function, input, normalized_shape, {"weight": weight}, eps, spread
    )
    x = _wide(input)
    least = torch.finfo(input.dtype).eps if norm.eps is None else norm.eps
    # of squares the mean alone is needed, and it is joined as means are
    scale = (_statistics(x.square(), norm).mean + least).rsqrt()
    y = x * scale
    if w is not None:
        y = y * _wide(w)
    return y.to(input.dtype)
