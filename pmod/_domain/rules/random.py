"""What draws: by position, so that no draw depends on how a field is cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pmod._domain.blocks import Blocks
from pmod._domain.layout import Cut, Layout
from pmod._domain.refusals import no_exact_form
from pmod._domain.rules.dims import numbers
from pmod._domain.rules.table import Function, rule


def uniform(b: Blocks, layout: Layout, shape: Sequence[int], device: Any) -> Tensor:
    """Return numbers in [0, 1) for a block of this layout, in float64."""
    return b.draws.uniform(layout, shape, b.place, device)


def normal(b: Blocks, layout: Layout, shape: Sequence[int], device: Any) -> Tensor:
    """Return normal numbers, by Box and Muller, in float64."""
    one, other = [uniform(b, layout, shape, device) for _ in range(2)]
    return (-2 * (1 - one).log()).sqrt() * (2 * math.pi * other).cos()


@rule("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout",
      "alpha_dropout", "feature_alpha_dropout", outer=True)  # fmt: skip
def dropout(
    b: Blocks,
    func: Function,
    x: Tensor,
    p: float = 0.5,
    training: bool | None = None,
    inplace: bool = False,
    *,
    train: bool = True,
) -> Tensor:
    name = func.__name__
    # modules and functions begin with it on, but for alpha_dropout's functions
    usual = "alpha" not in name
    if training is None:
        training = usual and train
    if not 0 <= p <= 1:
        right = "Pass a probability from 0 to 1."
        raise no_exact_form(name, f"p is {p}", right)
    if not training or p == 0:
        return x if inplace else b.note(x.view_as(x), b.layout(x))
    if "alpha" in name:
        raise no_exact_form(name, "it has no rule", "Use dropout, or eval().")
    layout, shape = b.layout(x), b.whole(x)
    if name not in ("dropout", "dropout_"):
        # whole channels at once
        lead = 2 if x.dim() > 2 else 1
        cuts: list[Cut] = [*layout[:lead], *[None] * (x.dim() - lead)]
        layout, shape = tuple(cuts), (*shape[:lead], *[1] * (x.dim() - lead))
    kept = uniform(b, layout, shape, x.device) >= p
    scale = 0.0 if p == 1 else 1 / (1 - p)
    y = x * (kept.to(x.dtype) * scale)
    if inplace:
        x.copy_(y)
        return x
    return b.note(y, b.layout(x))


def _like(y: Tensor, dtype: torch.dtype | None, requires_grad: bool) -> Tensor:
    z = y.to(dtype or torch.get_default_dtype())
    return z.requires_grad_() if requires_grad else z


@rule("rand_like", "randn_like")
def rand_like(
    b: Blocks,
    func: Function,
    x: Tensor,
    *,
    dtype: torch.dtype | None = None,
    requires_grad: bool = False,
    generator: torch.Generator | None = None,
    **named: Any,
) -> Tensor:
    _check_generator(func, generator)
    layout, shape = b.layout(x), b.whole(x)
    of = uniform if func.__name__ == "rand_like" else normal
    y = of(b, layout, shape, x.device)
    return b.note(_like(y, dtype or x.dtype, requires_grad), layout)


def _check_generator(func: Function, generator: object) -> None:
    if generator is not None:
        right = "Leave generator= away: draws go by position."
        raise no_exact_form(func.__name__, "with a generator of its own", right)


@rule("rand", "randn")
def rand(
    b: Blocks,
    func: Function,
    *size: Any,
    dtype: torch.dtype | None = None,
    device: Any = None,
    requires_grad: bool = False,
    generator: torch.Generator | None = None,
    **named: Any,
) -> Tensor:
    _check_generator(func, generator)
    shape = numbers(size or (named["size"],))
    layout: Layout = (None,) * len(shape)
    where = torch.empty(0, device=device).device
    of = uniform if func.__name__ == "rand" else normal
    y = of(b, layout, shape, where)
    return b.note(_like(y, dtype, requires_grad), layout)


@rule("randint", "randperm")
def randint(b: Blocks, func: Function, *args: Any, **kwargs: Any) -> Tensor:
    _check_generator(func, kwargs.pop("generator", None))
    # one value: a generator that all ranks seed alike
    device = torch.empty(0, device=kwargs.get("device")).device
    generator = torch.Generator(device).manual_seed(b.draws.next_seed() & (2**63 - 1))
    return func(*args, generator=generator, **kwargs)


@rule("bernoulli", "bernoulli_")
def bernoulli(
    b: Blocks, func: Function, x: Tensor, p: Any = None, *, generator: Any = None
) -> Tensor:
    _check_generator(func, generator)
    layout, shape = b.layout(x), b.whole(x)
    in_place = func.__name__.endswith("_")
    chance = p
    if p is None:
        chance = 0.5 if in_place else x
    if isinstance(p, Tensor):
        (_, chance), _ = b.common([x, p])
    y = (uniform(b, layout, shape, x.device) < chance).to(x.dtype)
    if not in_place:
        return b.note(y, layout)
    with torch.no_grad():
        x.copy_(y)
    return x


@rule("uniform_", "normal_")
def fill(
    b: Blocks,
    func: Function,
    x: Tensor,
    first: float = 0.0,
    second: float = 1.0,
    *,
    generator: Any = None,
    **named: float,
) -> Tensor:
    _check_generator(func, generator)
    layout, shape = b.layout(x), b.whole(x)
    first = named.get("mean", named.get("from", first))
    second = named.get("std", named.get("to", second))
    if func.__name__ == "uniform_":
        y = first + (second - first) * uniform(b, layout, shape, x.device)
    else:
        y = first + second * normal(b, layout, shape, x.device)
    with torch.no_grad():
        x.copy_(y)
    return x


@rule("normal", "multinomial", "poisson", "binomial", "randint_like", "random_",
      "exponential_", "cauchy_", "geometric_", "log_normal_", "rrelu", "gumbel_softmax",
      outer=True)  # fmt: skip
def drawn(b: Blocks, func: Function, *args: Any, **kwargs: Any) -> Any:
    name = func.__name__
    if name == "rrelu" and not kwargs.get("training", False):
        kwargs.pop("inplace", None)
        return b.follow(torch.nn.functional.leaky_relu, args[0], (1 / 8 + 1 / 3) / 2)
    right = "Use rand, randn, rand_like, randint, bernoulli or dropout."
    raise no_exact_form(name, "ranks would draw numbers of their own", right)
