"""Adam, then L-BFGS, for parameters that are spread over ranks.

Adam takes each number by itself. The direction of L-BFGS is a combination of the last
steps, the last changes of the gradient and the gradient, whose coefficients follow from
their inner products alone (Chen, Wang and Zhou, "Large-scale L-BFGS using MapReduce",
2014): one message brings all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.convert_parameters import parameters_to_vector, vector_to_parameters

Evaluate: TypeAlias = Callable[[Tensor], tuple[float, Tensor]]
"""The value and the gradient (n,) at a point (n,)."""
Products: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Of rows of vectors (a, n) and (b, n), each rank with its part of them, all inner
products (a, b).
"""

MEMORY = 50
# Wolfe's conditions: the share of the foretold descent, and of the slope; then the most
# points that are tried along a direction
_ENOUGH, _FLATTER, _TRIALS = (
    1e-4,
    0.9,
    20,
)


LEARNING_RATE = 5e-3


def descend(
    loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    products: Products,
    warm_up: int,
) -> Iterator[float]:
    """Take so many steps of Adam, then L-BFGS; return the loss of each step.

    Adam finds the valley, L-BFGS goes down it.
    """
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=max(warm_up, 1)
    )
    for _ in range(warm_up):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        schedule.step()
        yield value.item()
    yield from minimize(loss, parameters, products)


def minimize(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], products: Products
) -> Iterator[float]:
    """Change the parameters step by step; return the loss after each.

    It ends when no step goes down any more.

    loss: a function of the parameters as they are, the same on all ranks. So is all
    that decides: all go the same way.
    """

    def evaluate(x: Tensor) -> tuple[float, Tensor]:
        vector_to_parameters(x, parameters)
        value = loss()
        return value.item(), torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(value, parameters)]
        )

    x = parameters_to_vector(parameters).detach()
    value, gradient = evaluate(x)
    steps, changes = x.new_empty(0, len(x)), x.new_empty(0, len(x))
    while True:
        basis = torch.cat([steps, changes, gradient[None]])
        weights = coefficients(products(basis, basis).cpu()).to(x)
        direction = weights @ basis
        found = _search(
            evaluate, x, value, gradient, direction, products, first=not len(steps)
        )
        if found is None and not len(steps):
            vector_to_parameters(x, parameters)
            return
        # nothing was found: try along the gradient, without what is remembered
        if found is None:
            steps, changes = steps[:0], changes[:0]
            continue
        length, value, after = found
        step, change = length * direction, after - gradient
        x, gradient = x + step, after
        # the search leaves a slope that rose, so that step @ change > 0
        steps, changes = (
            torch.cat([old, new[None]])[-MEMORY:]
            for old, new in ((steps, step), (changes, change))
        )
        yield value


def coefficients(gram: Tensor) -> Tensor:
    """Return the direction in terms of k steps, k changes and the gradient.

    These are the two loops of L-BFGS, on inner products only.
    """
    k = len(gram) // 2
    c = gram.new_zeros(2 * k + 1)
    c[-1] = -1
    along = gram.new_zeros(k)
    for i in reversed(range(k)):
        along[i] = gram[i] @ c / gram[i, k + i]
        c[k + i] -= along[i]
    if k:
        c *= gram[k - 1, 2 * k - 1] / gram[2 * k - 1, 2 * k - 1]
    for i in range(k):
        c[i] += along[i] - gram[k + i] @ c / gram[i, k + i]
    return c


def _search(
    evaluate: Evaluate,
    x: Tensor,
    value: float,
    gradient: Tensor,
    direction: Tensor,
    products: Products,
    *,
    first: bool,
) -> tuple[float, float, Tensor] | None:
    """Return a length along the direction, with the value and the gradient there.

    The value is lower enough, the slope flatter (Wolfe's conditions).
    """

    def slope(at: Tensor) -> float:
        return products(at[None], direction[None]).item()

    start = slope(gradient)
    if not start < 0:
        return None
    low, high, length = (
        0.0,
        float("inf"),
        min(1.0, 1 / abs(start) ** 0.5) if first else 1.0,
    )
    for _ in range(_TRIALS):
        there, after = evaluate(x + length * direction)
        if not there <= value + _ENOUGH * length * start:
            high = length
        elif slope(after) < _FLATTER * start:
            low = length
        else:
            return length, there, after
        length = 2 * low if high == float("inf") else (low + high) / 2
    return None
