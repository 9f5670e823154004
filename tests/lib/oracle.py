"""Every collective in numpy, over the arrays of all ranks: what each rank should get, and nothing of how.

A function takes the arrays of the ranks of one axis, in the order of the axis, and returns as many. What is invariant
is the same array n times. `groups` says which ranks of a mesh those are; `Jacobian` turns a function into the matrix
from which every derivative follows by plain linear algebra.
"""

# pyright: standard

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import attrs
import numpy as np

Array = np.ndarray[Any, Any]
Arrays = list[Array]
Kind = Literal["V", "I"]


def groups(sizes: Mapping[str, int], axis: Sequence[str]) -> list[list[int]]:
    """The ranks of each group along the named axes, first name slowest; the mesh fills up in C order."""
    names = list(sizes)
    ranks = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    others = [name for name in names if name not in axis]
    order = [names.index(name) for name in (*others, *axis)]
    return ranks.transpose(order).reshape(-1, math.prod(sizes[name] for name in axis)).tolist()


def split_sizes(n: int, *parts: int) -> list[int]:
    """ceil(n / parts) each, until nothing is left; over several axes each part of the first is cut along the others."""
    if not parts:
        return [n]
    step = math.ceil(n / parts[0])
    lengths = [len(range(n)[i * step : (i + 1) * step]) for i in range(parts[0])]
    return [part for length in lengths for part in split_sizes(length, *parts[1:])]


def _cut(x: Array, sizes: Sequence[int], dim: int) -> Arrays:
    assert sum(sizes) == x.shape[dim], f"sizes {sizes} for {x.shape} along {dim}"
    return np.split(x, np.cumsum(sizes)[:-1], dim)


# --- sums and extrema ---------------------------------------------------------------------------------------------


def psum(xs: Arrays) -> Arrays:
    return [np.add.reduce(xs)] * len(xs)


def pmean(xs: Arrays, weights: Sequence[Any] | None = None) -> Arrays:
    if weights is None:
        weights = [1] * len(xs)
    above = sum((x * w for x, w in zip(xs, weights, strict=True)), np.zeros_like(xs[0]))
    return [above / sum(weights)] * len(xs)


def pscan(xs: Arrays, exclusive: bool = False, reverse: bool = False) -> Arrays:
    totals = np.cumsum(xs[::-1] if reverse else xs, 0) - (xs[::-1] if reverse else xs) * np.array(exclusive)
    return list(totals[::-1] if reverse else totals)


def pmax(xs: Arrays) -> Arrays:
    return [np.maximum.reduce(xs)] * len(xs)  # lets a NaN through


def pmin(xs: Arrays) -> Arrays:
    return [np.minimum.reduce(xs)] * len(xs)


def at_extremum(xs: Arrays, value: Array, tangents: Arrays) -> Arrays:
    """The derivative of pmax and pmin: the mean of the tangents over the ranks that attain the value."""
    hit = [(x == value) | (np.isnan(x) & np.isnan(value)) for x in xs]
    total = np.sum([np.where(h, t, 0) for h, t in zip(hit, tangents, strict=True)], 0)
    return [total / np.sum([h.astype(float) for h in hit], 0)] * len(xs)


# --- one rank's value ---------------------------------------------------------------------------------------------


def pick(xs: Arrays, src: int = 0) -> Arrays:
    return [xs[src]] * len(xs)


broadcast = pick  # the values are the same, the kinds are not


def place(xs: Arrays, dst: int = 0) -> Arrays:
    return [x if rank == dst else np.zeros_like(x) for rank, x in enumerate(xs)]


def pvary(xs: Arrays) -> Arrays:
    return list(xs)


def reduce(xs: Arrays, dst: int = 0) -> Arrays:
    return place(psum(xs), dst)


# --- slices -------------------------------------------------------------------------------------------------------


def all_gather(xs: Arrays, dim: int = 0, tiled: bool = True) -> Arrays:
    return [np.concatenate(xs, dim) if tiled else np.stack(xs, dim)] * len(xs)


def unshard(xs: Arrays, dim: int = 0) -> Arrays:
    return [np.concatenate(xs, dim)] * len(xs)


def psum_scatter(xs: Arrays, dim: int = 0, tiled: bool = True, sizes: Sequence[int] | None = None) -> Arrays:
    total = np.add.reduce(xs)
    parts = np.split(total, len(xs), dim) if sizes is None else _cut(total, sizes, dim)
    return parts if tiled else [np.squeeze(part, dim) for part in parts]


def shard(xs: Arrays, dim: int = 0, sizes: Sequence[int] | None = None, parts: Sequence[int] = ()) -> Arrays:
    """`parts` are the sizes of the axes, where there are several."""
    sizes = split_sizes(xs[0].shape[dim], *(parts or [len(xs)])) if sizes is None else sizes
    return [_cut(x, sizes, dim)[rank] for rank, x in enumerate(xs)]


def gather(xs: Arrays, dim: int = 0, dst: int = 0) -> Arrays:
    whole = np.concatenate(xs, dim)
    nothing = np.split(whole, [0], dim)[0]
    return [whole if rank == dst else nothing for rank in range(len(xs))]


def scatter(xs: Arrays, dim: int = 0, src: int = 0, sizes: Sequence[int] | None = None) -> Arrays:
    if sizes is None:
        return np.split(xs[src], len(xs), dim)
    return _cut(xs[src], sizes, dim)


def all_to_all(
    xs: Arrays,
    split_dim: int,
    concat_dim: int,
    tiled: bool = True,
    split_sizes: Sequence[Sequence[int]] | None = None,
    concat_sizes: Sequence[Sequence[int]] | None = None,
) -> Arrays:
    """`split_sizes[i]` and `concat_sizes[i]` are what rank i passes."""
    n = len(xs)
    if not tiled:
        parts = [[np.squeeze(part, split_dim) for part in np.split(x, n, split_dim)] for x in xs]
        return [np.stack([parts[i][j] for i in range(n)], concat_dim) for j in range(n)]
    if split_sizes is None:
        parts = [np.split(x, n, split_dim) for x in xs]
    else:
        parts = [_cut(x, sizes, split_dim) for x, sizes in zip(xs, split_sizes, strict=True)]
    if concat_sizes is not None:
        for j in range(n):
            assert [parts[i][j].shape[concat_dim] for i in range(n)] == list(concat_sizes[j])
    return [np.concatenate([parts[i][j] for i in range(n)], concat_dim) for j in range(n)]


def indexed_all_to_all(xs: Arrays, dim: int, indices: Sequence[Sequence[Any]]) -> Arrays:
    """`indices[i][j]` are the rows that rank i sends to rank j."""
    ranks = range(len(xs))
    return [np.concatenate([np.take(xs[i], np.asarray(indices[i][j], int), dim) for i in ranks], dim) for j in ranks]


# --- permutations -------------------------------------------------------------------------------------------------


def ppermute(xs: Arrays, perm: Sequence[tuple[int, int]]) -> Arrays:
    """Of any shapes: who is sent nothing has zeros of the shape that it sends."""
    out = [np.zeros_like(x) for x in xs]
    for source, target in perm:
        out[target] = xs[source]
    return out


def pshuffle(xs: Arrays, perm: Sequence[int]) -> Arrays:
    return [xs[source] for source in perm]


def pshift(xs: Arrays, offset: int = 1, wrap: bool = True) -> Arrays:
    n = len(xs)
    sources = [rank - offset for rank in range(n)]
    return [xs[s % n] if wrap or 0 <= s < n else np.zeros_like(x) for s, x in zip(sources, xs, strict=True)]


# --- derivatives --------------------------------------------------------------------------------------------------


def flat(arrays: Sequence[Array], kind: Kind) -> Array:
    """All that a V or an I is, in one vector: a V counts once per rank, an I once."""
    counted = arrays if kind == "V" else arrays[:1]
    return np.concatenate([np.asarray(x).ravel() for x in counted])


def unflat(vector: Array, like: Sequence[Array], kind: Kind) -> Arrays:
    """One array per rank out of such a vector, in the shapes of `like`."""
    if kind == "I":
        return [vector.reshape(like[0].shape)] * len(like)
    ends = np.cumsum([x.size for x in like])
    return [part.reshape(x.shape) for part, x in zip(np.split(vector, ends[:-1]), like, strict=True)]


@attrs.frozen(eq=False)
class Jacobian:
    """A linear map from the arrays of all ranks to the arrays of all ranks, as a real matrix.

    It holds all there is to know: tangents go through the matrix, cotangents through its transpose.
    """

    matrix: Array
    takes: Kind
    gives: Kind
    inputs: Arrays  # for their shapes
    outputs: Arrays

    @staticmethod
    def of(f: Callable[[Arrays], Arrays], inputs: Arrays, takes: Kind, gives: Kind) -> Jacobian:
        zeros = [np.zeros(x.shape) for x in inputs]
        outputs = f(zeros)
        count = flat(inputs, takes).size
        columns = [flat(f(unflat(unit, inputs, takes)), gives) for unit in np.eye(count)]
        matrix = np.stack(columns, 1) if columns else np.zeros((flat(outputs, gives).size, 0))
        return Jacobian(matrix, takes, gives, inputs, outputs)

    def push(self, tangents: Sequence[Array]) -> Arrays:
        return unflat(self.matrix @ flat(tangents, self.takes), self.outputs, self.gives)

    def pull(self, cotangents: Sequence[Array]) -> Arrays:
        return unflat(self.matrix.T @ flat(cotangents, self.gives), self.inputs, self.takes)
