"""`ppermute`, `pshift` and `pshuffle`: a rank sends to one and receives from one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from pmod._collectives.slices import Sizes
from pmod._collectives.values import anything, fused
from pmod._core.arguments import (
    as_int,
    check_flag,
    check_own_size,
    check_permutation,
    check_sizes,
    check_tensor,
    dim_from_end,
    targets_of,
    wrong,
)
from pmod._core.bind import unmoved
from pmod._core.collective import collective
from pmod._core.row import Row, V, pair
from pmod._core.start import as_piece
from pmod._core.tree import Tree, map_leaves, together
from pmod._errors import AxisError, quoted
from pmod._mesh.ambient import resolve
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import AxisLike
from pmod._wire.base import AtOnce, Wire, counts_at
from pmod._wire.sent import Sent


class Permutation(NamedTuple):
    """The parameters of a permute.

    If the ranks hold different lengths along a dim, `dim`, `held` and `given` say which.
    A rank to which nobody sends keeps its own length (zeros), so that equal sizes change
    nothing; in the transpose its length is that of what it held.
    """

    targets: tuple[int, ...]
    """Where each rank's value goes, -1 for nowhere."""
    dim: int = -1
    held: Sizes = ()
    """The length that each rank holds; () if all hold the same."""
    given: Sizes = ()
    """The length that each rank is given."""
    arriving: int | None = None
    """How many elements arrive on this rank, where `send` cannot tell."""

    def __repr__(self) -> str:
        if not self.held:
            return f"Permutation(targets={self.targets})"
        return "Permutation" + repr(self[:4])


def inverse_of(targets: tuple[int, ...]) -> tuple[int, ...]:
    """Return where each value came from."""
    sources = [-1] * len(targets)
    for source, target in enumerate(targets):
        if target >= 0:
            sources[target] = source
    return tuple(sources)


def _send_permute(x: Tensor, wire: Wire, params: Permutation) -> Sent[Tensor]:
    targets = params.targets
    source = targets.index(wire.index) if wire.index in targets else None
    target = targets[wire.index]
    to = target if target >= 0 else None
    return wire.permute(x, to, source, params.arriving)


def _permute_at_once(x: Tensor, wire: Wire, params: Permutation) -> AtOnce | None:
    targets, me = params.targets, wire.index
    # the whole goes to one rank, and another's whole comes
    if params.held or x.dim() == 0 or targets[me] < 0 or me not in targets:
        return None
    send = counts_at(targets[me], x.shape[0], wire.size)
    recv = counts_at(targets.index(me), x.shape[0], wire.size)
    return wire.ready_exchange(x, (send, recv))


def _inverse(params: Permutation) -> Permutation:
    return Permutation(
        inverse_of(params.targets), params.dim, params.given, params.held
    )


def _given(
    params: Permutation, xs: Sequence[Tensor], index: int
) -> tuple[Permutation, list[list[int]]] | None:
    if not params.held:
        return None
    shapes: list[list[int]] = []
    for x in xs:
        shape = list(x.shape)
        shape[params.dim] = params.given[index]
        shapes.append(shape)
    arriving = sum(math.prod(shape) for shape in shapes)
    return params._replace(arriving=arriving), shapes


def _but_for_length(
    params: Permutation, shape: tuple[int, ...]
) -> tuple[Permutation, tuple[int, ...]]:
    """Return what ranks agree on: with sizes, not the length along the dim."""
    if not params.held:
        return params, shape
    at = len(shape) + params.dim
    return params, (*shape[:at], -1, *shape[at + 1 :])


PERMUTE = Row(
    "permute",
    V,
    V,
    Permutation,
    _send_permute,
    flip=_inverse,
    at_once=_permute_at_once,
    fused=True,
    alone=False,
    agreed=_but_for_length,
    resized=_given,
    why="each value's gradient goes back to the rank that it came from",
)
pair(PERMUTE, PERMUTE)


def _stay(function: str, axis: Axis, leaves: list[Any]) -> list[Any]:
    for x in leaves:
        check_tensor(x, function, axis)
    return [unmoved([x])[0] for x in leaves]


def _permuted(
    function: str,
    x: Tree,
    axis: Axis,
    targets: tuple[int, ...],
    sizes: Sequence[int] | None,
    dim: int,
) -> Tree:
    if sizes is not None:
        return _permuted_uneven(
            function, x, axis, targets, check_sizes(sizes, function, axis), dim
        )
    # nothing moves
    if targets == tuple(range(axis.size)):
        return map_leaves(partial(_stay, function, axis), x, function, axis)
    return fused(function, PERMUTE, x, axis, Permutation(targets), anything)


def _permuted_uneven(
    function: str,
    tree: Tree,
    axis: Axis,
    targets: tuple[int, ...],
    sizes: tuple[int, ...],
    dim: int,
) -> Tree:
    """Give each rank the length of the rank that sends to it, or its own in zeros."""
    sources = inverse_of(targets)
    given = list(sizes)
    for rank, source in enumerate(sources):
        if source >= 0:
            given[rank] = sizes[source]

    def run(leaves: list[Any]) -> list[Any]:
        at: list[int] = []
        for x in leaves:
            check_tensor(x, function, axis)
            at.append(dim_from_end(dim, x, function, axis))
            right = "Pass the length that each rank holds along dim."
            check_own_size(x, at[-1], sizes, function, axis, right)
        # nothing moves
        if targets == tuple(range(axis.size)):
            return _stay(function, axis, leaves)
        if len(set(sizes)) == 1:
            return together(PERMUTE, leaves, axis, Permutation(targets))
        # one message per dtype and device, where the dim is as far from the end
        out = list(leaves)
        for end in sorted(set(at)):
            some = [i for i, one in enumerate(at) if one == end]
            params = Permutation(targets, end, sizes, tuple(given))
            ys = together(PERMUTE, [leaves[i] for i in some], axis, params)
            for i, y in zip(some, ys, strict=True):
                out[i] = y
        return out

    return map_leaves(as_piece(run, function), tree, function, axis)


@collective(
    V,
    V,
    transpose="the inverse permutation",
    value="the value that was sent here, zeros where none was",
)
def ppermute(
    x: Tree,
    axis: AxisLike,
    perm: Sequence[tuple[int, int]],
    *,
    sizes: Sequence[int] | None = None,
    dim: int = 0,
) -> Tree:
    """Send along (source, target) pairs of indices; zeros where nothing arrives.

    V -> V. Transpose: the inverse permutation.
    Shapes: x (...) -> (...), the same shape on all ranks. With sizes, the lengths that
    the ranks hold along `dim`: x (..., sizes[i], ...) on rank i -> (..., sizes[s],
    ...), s being the rank that sends to it; where nothing arrives zeros like x.
    Cost: x sent once; where nothing moves, nothing is sent.
    Raises: AxisError where an index is outside the axis, or a source or a target comes
    twice; ShapeError where sizes[i] is not this rank's length.
    JAX: lax.ppermute, which numbers the ranks of a tuple of axes in mesh order; here
    the first name is slowest.

    >>> pmod.simulate(lambda: pmod.ppermute(torch.tensor(1 + pmod.axis_index("model")), "model", [(0, 1)]), model=2)
    [tensor(0), tensor(1)]
    >>> def swap():
    ...     mine = torch.full((1 + pmod.axis_index("model"),), pmod.axis_index("model"))
    ...     return pmod.ppermute(mine, "model", [(0, 1), (1, 0)], sizes=(1, 2))
    >>> pmod.simulate(swap, model=2)
    [tensor([1, 1]), tensor([0])]
    """
    bound = resolve(axis, "ppermute")
    return _permuted(
        "ppermute", x, bound, targets_of(perm, "ppermute", bound), sizes, dim
    )


@collective(
    V, V, transpose="the inverse permutation", value="the value of rank `perm[i]`"
)
def pshuffle(
    x: Tree,
    axis: AxisLike,
    perm: Sequence[int],
    *,
    sizes: Sequence[int] | None = None,
    dim: int = 0,
) -> Tree:
    """Output i comes from input perm[i].

    V -> V. Transpose: the inverse permutation.
    Shapes: x (...) -> (...), the same shape on all ranks. With sizes, the lengths that
    the ranks hold along `dim`: x (..., sizes[i], ...) -> (..., sizes[perm[i]], ...) on
    rank i.
    Cost: x sent once; where nothing moves, nothing is sent.
    Raises: AxisError where perm is no permutation; ShapeError where sizes[i] is not
    this rank's length.
    JAX: lax.pshuffle.

    >>> pmod.simulate(lambda: pmod.pshuffle(torch.tensor(pmod.axis_index("x")), "x", [2, 0, 1]), x=3)
    [tensor(2), tensor(0), tensor(1)]
    """
    bound = resolve(axis, "pshuffle")
    sources = check_permutation(perm, "pshuffle", bound)
    return _permuted("pshuffle", x, bound, inverse_of(sources), sizes, dim)


@collective(
    V, V, transpose="the shift back", value="the value of the rank `offset` before"
)
def pshift(
    x: Tree,
    axis: AxisLike,
    offset: int = 1,
    *,
    wrap: bool = True,
    sizes: Sequence[int] | None = None,
    dim: int = 0,
) -> Tree:
    """Return the value of the rank `offset` before: a step of a ring.

    V -> V. Transpose: the shift back. Without wrap, zeros where nothing arrives.
    Shapes: x (...) -> (...), the same shape on all ranks. With sizes, the lengths that
    the ranks hold along `dim`: x (..., sizes[i], ...) on rank i -> (..., sizes[i -
    offset], ...); where nothing arrives zeros like x. A ring's next step has these
    lengths: `sizes` shifted as the shards were.
    Cost: x sent once.
    Raises: AxisError where offset is not an int; ShapeError where sizes[i] is not this
    rank's length.

    >>> pmod.simulate(lambda: pmod.pshift(torch.tensor(pmod.axis_index("x")), "x"), x=3)
    [tensor(2), tensor(0), tensor(1)]
    >>> pmod.simulate(lambda: pmod.pshift(torch.arange(pmod.axis_index("x")), "x", sizes=(0, 1, 2)), x=3)
    [tensor([0, 1]), tensor([], dtype=torch.int64), tensor([0])]
    """
    bound = resolve(axis, "pshift")
    check_flag(wrap, "pshift", "wrap")
    steps = as_int(offset)
    if steps is None:
        raise wrong(
            AxisError, "pshift", bound, f"offset is {quoted(offset)}", "Pass an int."
        )
    n = bound.size
    targets = [rank + steps for rank in range(n)]
    for rank, target in enumerate(targets):
        # past the ends, without wrap, nobody gets it
        is_inside = wrap or 0 <= target < n
        targets[rank] = target % n if is_inside else -1
    return _permuted("pshift", x, bound, tuple(targets), sizes, dim)
