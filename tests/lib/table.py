"""One `Case` per collective: its kinds, its rows, what may be passed, and the oracle's word for it.

Adding a collective is a row with its functions in pmod, and a Case here: test_collectives.py fails if either is
missing, and holds every Case to every property.
"""

# pyright: standard

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import attrs
import numpy as np
import torch

import pmod
from tests.lib import oracle
from tests.lib.oracle import Arrays, Kind

Tensor = torch.Tensor

# What is not passed is what DESIGN.md says: a draw that comes to a default leaves the argument out.
DEFAULTS = dict(dim=0, tiled=True, src=0, dst=0, offset=1, wrap=True, exclusive=False, reverse=False)
LEFT_OUT = ("sizes", "length", "weight", "split_sizes", "concat_sizes", "recv_sizes")


@attrs.frozen
class Choices:
    """Where a draw takes its decisions from (hypothesis, or a seed), and what is asked of it."""

    integer: Callable[[int, int], int]  # from the first to the second, both included
    ndim: int | None = None  # where it is wanted, and the function can
    empty: bool = False  # one of the other dims has length 0
    lengths: tuple[int, int] = (1, 3)  # of a dim that the function leaves alone
    turn: int | None = None  # which of the ways to call it; any, if None
    axes: tuple[int, ...] = ()  # the sizes of the axes that it is called over, where there are several

    @staticmethod
    def seeded(*seed: int | str, **kwargs: Any) -> Choices:
        numbers = np.random.default_rng([zlib.crc32(repr(part).encode()) for part in seed])
        return Choices(lambda low, high: int(numbers.integers(low, high + 1)), **kwargs)

    def of(self, options: Sequence[Any]) -> Any:
        return options[self.integer(0, len(options) - 1)]

    def way(self, *ways: Any) -> Any:
        """One of the ways to call the function: `Case.ways` says how many there are."""
        return self.of(ways) if self.turn is None else ways[self.turn % len(ways)]

    def shape(self, least: int = 0) -> list[int]:
        """A shape of at least so many dims."""
        ndim = max(least, self.integer(least, 3) if self.ndim is None else self.ndim)
        shape = [self.integer(*self.lengths) for _ in range(ndim)]
        if ndim and self.empty:
            shape[self.integer(0, ndim - 1)] = 0
        return shape

    def dim(self, ndim: int) -> int:
        return self.integer(-ndim, ndim - 1)

    def parts(self, total: int, n: int) -> list[int]:
        """n sizes that add up, zeros among them."""
        ends = sorted(self.integer(0, total) for _ in range(n - 1))
        return [b - a for a, b in zip([0, *ends], [*ends, total], strict=True)]

    def permutation(self, n: int) -> list[int]:
        left = list(range(n))
        return [left.pop(self.integer(0, len(left) - 1)) for _ in range(n)]


@attrs.frozen(eq=False)
class Drawn:
    """The arguments of one call on each rank of an axis, and what comes of it."""

    shapes: list[list[int]]
    kwargs: list[dict[str, Any]]
    oracle: Callable[[Arrays], Arrays]

    def __str__(self) -> str:
        same = all(str(kwargs) == str(self.kwargs[0]) for kwargs in self.kwargs)
        return f"shapes {self.shapes}, {self.kwargs[0] if same else self.kwargs}"


def _alike(shape: list[int], n: int, function: Callable[..., Arrays], **kwargs: Any) -> Drawn:
    """The usual call: the same shape and arguments everywhere."""
    return _call([shape] * n, function, **kwargs)


def _call(shapes: list[list[int]], function: Callable[..., Arrays], **kwargs: Any) -> Drawn:
    passed = {k: v for k, v in kwargs.items() if DEFAULTS.get(k, ...) != v and (k not in LEFT_OUT or v is not None)}
    told = {k: v for k, v in kwargs.items() if k != "length"}
    return Drawn(shapes, [passed] * len(shapes), partial(function, **told))


def _along(shape: list[int], dim: int, length: int) -> list[int]:
    """The shape with this length along dim; where that dim is the one that is to be empty, as it is."""
    shape = list(shape)
    shape[dim] = 0 if shape[dim] == 0 else length
    return shape


# --- the draws ----------------------------------------------------------------------------------------------------


def _elementwise(function: Callable[..., Arrays]) -> Callable[[Choices, int], Drawn]:
    return lambda c, n: _alike(c.shape(), n, function)


def _rooted(function: Callable[..., Arrays], root: str) -> Callable[[Choices, int], Drawn]:
    return lambda c, n: _alike(c.shape(), n, function, **{root: c.integer(0, n - 1)})


def _pmean(c: Choices, n: int) -> Drawn:
    shape = c.shape()
    how = c.way("plain", "number", "tensor")
    if how == "plain":
        return _alike(shape, n, oracle.pmean)
    if how == "number":  # 0 for the first, who has no samples
        weights: list[Any] = [0.5 * c.integer(0 if rank == 0 and n > 1 else 1, 4) for rank in range(n)]
    else:
        own = [c.of([1, size]) for size in shape][c.integer(0, len(shape)) :]
        weights = [np.array([c.integer(1, 6) / 2 for _ in range(math.prod(own))]).reshape(own) for _ in range(n)]
    return Drawn([shape] * n, [{"weight": w} for w in weights], partial(oracle.pmean, weights=weights))


def _all_gather(c: Choices, n: int) -> Drawn:
    tiled = c.way(True, False)
    shape = c.shape(1 if tiled else 0)
    dim = c.dim(len(shape) + (not tiled))
    return _alike(shape, n, oracle.all_gather, dim=dim, tiled=tiled)


def _psum_scatter(c: Choices, n: int) -> Drawn:
    shape = c.shape(1)
    dim, tiled = c.dim(len(shape)), c.way(True, False)
    shape = _along(shape, dim, n * c.integer(1, 2))
    if not tiled:
        shape[dim] = n
    return _alike(shape, n, oracle.psum_scatter, dim=dim, tiled=tiled)


def _shard(c: Choices, n: int) -> Drawn:
    shape = c.shape(1)
    dim = c.dim(len(shape))
    shape = _along(shape, dim, c.integer(0, 2 * n + 1))
    sizes = c.way(c.parts(shape[dim], n), None)
    return _alike(shape, n, partial(oracle.shard, parts=c.axes), dim=dim, sizes=sizes)


def _unshard(c: Choices, n: int) -> Drawn:
    shape = c.shape(1)
    dim = c.dim(len(shape))
    how = c.way("equal", "sizes", "length")
    if how == "equal":
        return _alike(shape, n, oracle.unshard, dim=dim)
    total = c.integer(0, 2 * n + 1) if shape[dim] else 0
    sizes = c.parts(total, n) if how == "sizes" else oracle.split_sizes(total, *(c.axes or [n]))
    shapes = [[*shape] for _ in range(n)]
    for own, size in zip(shapes, sizes, strict=True):
        own[dim] = size
    told = {"sizes": sizes} if how == "sizes" else {"length": total}
    return Drawn(shapes, _call(shapes, oracle.unshard, dim=dim, **told).kwargs, partial(oracle.unshard, dim=dim))


def _gather(c: Choices, n: int) -> Drawn:
    shape = c.shape(1)
    return _alike(shape, n, oracle.gather, dim=c.dim(len(shape)), dst=c.integer(0, n - 1))


def _scatter(c: Choices, n: int) -> Drawn:
    shape = c.shape(1)
    dim, src = c.dim(len(shape)), c.integer(0, n - 1)
    if c.way("equal", "sizes") == "equal":
        return _alike(_along(shape, dim, n * c.integer(1, 2)), n, oracle.scatter, dim=dim, src=src)
    whole = _along(shape, dim, c.integer(0, 2 * n + 1))
    sizes = c.parts(whole[dim], n)
    shapes = [[*whole] for _ in range(n)]
    for rank, placeholder in enumerate(shapes):
        if rank != src:
            placeholder[dim] = c.integer(0, 2)
    return _call(shapes, oracle.scatter, dim=dim, src=src, sizes=sizes)


def _all_to_all(c: Choices, n: int) -> Drawn:
    how = c.way("equal", "split", "concat", "split concat", "length", "untiled",
                "same equal", "same split", "same concat", "same split concat")  # fmt: skip
    if how == "untiled":
        shape = c.shape(1)
        split, concat = c.dim(len(shape)), c.dim(len(shape))
        shape[split] = n
        return _alike(shape, n, oracle.all_to_all, split_dim=split, concat_dim=concat, tiled=False)
    shape = c.shape(1 if "same" in how else 2)
    split = c.dim(len(shape))
    if "same" in how:
        return _exchange_along(c, n, shape, split, "split" in how, "concat" in how)
    concat = c.of([dim for dim in range(-len(shape), len(shape)) if dim % len(shape) != split % len(shape)])
    if how == "length":
        return _all_to_all_of_length(c, n, shape, split, concat)
    shape = _along(shape, split, c.integer(0, 2 * n) if "split" in how else n * c.integer(1, 2))
    split_sizes = c.parts(shape[split], n) if "split" in how else None
    held = [shape[concat]] * n
    if "concat" in how and shape[concat]:
        held = c.parts(c.integer(0, n + 1), n)
    shapes = [[*shape] for _ in range(n)]
    for own, length in zip(shapes, held, strict=True):
        own[concat] = length
    return _uneven_all_to_all(shapes, split, concat, [split_sizes] * n, [held if "concat" in how else None] * n)


def _all_to_all_of_length(c: Choices, n: int, shape: list[int], split: int, concat: int) -> Drawn:
    """Both dims are cut as `split_sizes` cuts them."""
    shape = _along(shape, split, c.of([1, n + 1, 2 * n - 1]))  # none divides by two ranks or more
    total = c.integer(0, 2 * n + 1) if shape[concat] else 0
    parts, held = (oracle.split_sizes(length, *(c.axes or [n])) for length in (shape[split], total))
    shapes = [[*shape] for _ in range(n)]
    for own, length in zip(shapes, held, strict=True):
        own[concat] = length
    uneven = _uneven_all_to_all(shapes, split, concat, [parts] * n, [held] * n)
    told = [{"split_dim": split, "concat_dim": concat, "length": total} for _ in range(n)]
    return attrs.evolve(uneven, kwargs=told)


def _exchange_along(c: Choices, n: int, shape: list[int], dim: int, give_split: bool, give_concat: bool) -> Drawn:
    """Both dims are the same: the sizes are the lengths sent and received, a row and a column of one matrix."""
    same = c.of([dim, dim % len(shape)])
    low, high = (0, 2) if shape[dim] else (0, 0)
    own = [c.integer(low, high) for _ in range(n)]
    if give_split and give_concat:
        lengths = [[c.integer(low, high) for _ in range(n)] for _ in range(n)]
    elif give_split:  # all send alike
        lengths = [own] * n
    else:  # each cuts evenly: unlike the others where they are told
        lengths = [[own[rank if give_concat else 0]] * n for rank in range(n)]
    shapes = [[*shape] for _ in range(n)]
    for mine, sent in zip(shapes, lengths, strict=True):
        mine[dim] = sum(sent)
    received = [list(column) for column in zip(*lengths, strict=True)]
    none = [None] * n
    return _uneven_all_to_all(shapes, dim, same, lengths if give_split else none, received if give_concat else none)


def _uneven_all_to_all(
    shapes: list[list[int]], split: int, concat: int, split_sizes: list[Any], concat_sizes: list[Any]
) -> Drawn:
    n = len(shapes)
    kwargs = [
        _call(shapes[:1], oracle.all_to_all, split_dim=split, concat_dim=concat, split_sizes=split_sizes[rank],
              concat_sizes=concat_sizes[rank]).kwargs[0]
        for rank in range(n)
    ]  # fmt: skip
    whole = partial(
        oracle.all_to_all, split_dim=split, concat_dim=concat,
        split_sizes=None if split_sizes[0] is None else split_sizes,
        concat_sizes=None if concat_sizes[0] is None else concat_sizes,
    )  # fmt: skip
    return Drawn(shapes, kwargs, whole)


def _ring(c: Choices, n: int) -> list[tuple[int, int]]:
    """All ranks in one cycle, from 3 ranks on no inverse of itself."""
    order = c.permutation(n)
    return list(zip(order, [*order[1:], order[0]], strict=True))


def _ppermute(c: Choices, n: int) -> Drawn:
    pairs = _ring(c, n)
    how = c.way("ring", "any", "uneven ring", "uneven")
    if how in ("any", "uneven"):
        pairs = list(zip(c.permutation(n), c.permutation(n), strict=True))[: c.integer(0, n)]
    return _moved(c, n, "uneven" in how, oracle.ppermute, perm=pairs)


def _pshuffle(c: Choices, n: int) -> Drawn:
    perm = [source for _, source in sorted(_ring(c, n))]
    how = c.way("ring", "any", "uneven")
    if how == "any":
        perm = c.permutation(n)
    return _moved(c, n, how == "uneven", oracle.pshuffle, perm=perm)


def _pshift(c: Choices, n: int) -> Drawn:
    how = c.way("ring", "line", "uneven ring", "uneven line")
    return _moved(c, n, "uneven" in how, oracle.pshift, offset=c.integer(-n - 1, n + 1), wrap="ring" in how)


def _pscan(c: Choices, n: int) -> Drawn:
    exclusive, reverse = c.way((False, False), (True, False), (False, True), (True, True))
    return _alike(c.shape(), n, oracle.pscan, exclusive=exclusive, reverse=reverse)


def _moved(c: Choices, n: int, uneven: bool, function: Callable[..., Arrays], **kwargs: Any) -> Drawn:
    """The same shape on all ranks, or lengths of their own, which are told."""
    if not uneven:
        return _alike(c.shape(), n, function, **kwargs)
    shapes, dim, lengths = _held(c, n)
    if not any(lengths) and not c.empty:  # what all know to be empty is not sent
        lengths[0] = shapes[0][dim] = 1
    drawn = _call(shapes, function, **kwargs)
    return attrs.evolve(drawn, kwargs=[k | {"sizes": lengths, "dim": dim} for k in drawn.kwargs])


# --- the draws of the ragged forms --------------------------------------------------------------------------------


def _held(c: Choices, n: int) -> tuple[list[list[int]], int, list[int]]:
    """Shapes that differ along one dim; the dim, and the lengths: with zeros, now and then all of them."""
    shape = c.shape(1)
    dim = c.dim(len(shape))
    longest = c.integer(0, 3) if shape[dim] else 0
    lengths = [c.integer(0, longest) for _ in range(n)]
    return [_with(shape, dim, length) for length in lengths], dim, lengths


def _with(shape: list[int], dim: int, length: int) -> list[int]:
    shape = list(shape)
    shape[dim] = length
    return shape


def _all_gather_v(c: Choices, n: int) -> Drawn:
    shapes, dim, lengths = _held(c, n)
    drawn = _call(shapes, oracle.all_gather, dim=dim)
    return _told(drawn, c.way(lengths, None))


def _gather_v(c: Choices, n: int) -> Drawn:
    shapes, dim, lengths = _held(c, n)
    drawn = _call(shapes, oracle.gather, dim=dim, dst=c.integer(0, n - 1))
    return _told(drawn, c.way(lengths, None))


def _told(drawn: Drawn, sizes: list[int] | None) -> Drawn:
    """The same call, with the sizes where they are given."""
    return drawn if sizes is None else attrs.evolve(drawn, kwargs=[k | {"sizes": sizes} for k in drawn.kwargs])


def _psum_scatter_v(c: Choices, n: int) -> Drawn:
    shapes, dim, lengths = _held(c, n)
    whole = _with(shapes[0], dim, sum(lengths))
    return _alike(whole, n, oracle.psum_scatter, dim=dim, sizes=lengths)


def _scatter_v(c: Choices, n: int) -> Drawn:
    _, dim, placeholders = _held(c, n)
    shapes, dim, lengths = _held(c, n)
    src = c.integer(0, n - 1)
    shapes = [
        _with(shape, dim, sum(lengths) if rank == src else placeholders[rank]) for rank, shape in enumerate(shapes)
    ]
    return _call(shapes, oracle.scatter, dim=dim, src=src, sizes=lengths)


def _all_to_all_v(c: Choices, n: int) -> Drawn:
    shape = c.shape(1)
    dim = c.dim(len(shape))
    longest = c.integer(0, 2) if shape[dim] else 0
    sent = [[c.integer(0, longest) for _ in range(n)] for _ in range(n)]
    received = [list(column) for column in zip(*sent, strict=True)]
    give = c.way(True, False)
    kwargs: list[dict[str, Any]] = [{"send_sizes": own, "dim": dim} for own in sent]
    if give:
        kwargs = [k | {"recv_sizes": own} for k, own in zip(kwargs, received, strict=True)]
    whole = partial(oracle.all_to_all, split_dim=dim, concat_dim=dim, split_sizes=sent)
    return Drawn([_with(shape, dim, sum(s)) for s in sent], kwargs, whole)


def _indexed_all_to_all_v(c: Choices, n: int) -> Drawn:
    shapes, dim, lengths = _held(c, n)
    counts = [[c.integer(0, 3) if length else 0 for _ in range(n)] for length in lengths]
    # repeats, within what goes to one rank and between ranks, and no order
    indices = [
        [np.array([c.integer(0, length - 1) for _ in range(count)], np.int64) for count in row]
        for length, row in zip(lengths, counts, strict=True)
    ]
    received = [list(column) for column in zip(*counts, strict=True)]
    how = c.way("given", "exchanged", "planned")
    kwargs: list[dict[str, Any]] = [{"indices": own, "dim": dim} for own in indices]
    if how == "given":
        kwargs = [k | {"recv_sizes": own} for k, own in zip(kwargs, received, strict=True)]
    if how == "planned":
        kwargs = [k | {"planned": True} for k in kwargs]
    return Drawn(shapes, kwargs, partial(oracle.indexed_all_to_all, dim=dim, indices=indices))


# --- the table ----------------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Case:
    """One collective, by its name in pmod."""

    name: str
    takes: Kind
    gives: Kind
    rows: tuple[str, ...]  # what it binds when it is called
    draw: Callable[[Choices, int], Drawn]
    dtypes: str = "bool int float complex"
    linear: bool = True
    ways: int = 1  # to call it, which differ in more than shapes and numbers

    asks: str | None = None  # what the ranks tell each other, in a message more, where it is left out

    def call(self, x: Any, axis: Any, kwargs: dict[str, Any]) -> Any:
        given = {k: as_tensors(v) for k, v in kwargs.items()}
        if given.pop("planned", False):
            given["indices"] = pmod.exchange_plan(given["indices"], axis)
        return getattr(pmod, self.name)(x, axis, **given)

    def asked(self, kwargs: dict[str, Any]) -> bool:
        return self.asks is not None and self.asks not in kwargs

    def jacobian(self, drawn: Drawn, inputs: Arrays) -> oracle.Jacobian:
        """The derivative at these inputs."""
        f = drawn.oracle
        if not self.linear:
            value = drawn.oracle(inputs)[0]
            f = partial(oracle.at_extremum, inputs, value)
        return oracle.Jacobian.of(f, inputs, self.takes, self.gives)


def as_tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    return [as_tensors(v) for v in value] if isinstance(value, list) else value


NO_BOOL = "int float complex"
CASES = {
    case.name: case
    for case in (
        Case("psum", "V", "I", ("psum",), _elementwise(oracle.psum), NO_BOOL),
        Case("pmean", "V", "I", ("psum",), _pmean, "float complex", ways=3),
        Case("pmax", "V", "I", ("extremum", "psum"), _elementwise(oracle.pmax), "bool int float", linear=False),
        Case("pmin", "V", "I", ("extremum", "psum"), _elementwise(oracle.pmin), "bool int float", linear=False),
        Case("pick", "V", "I", ("pick",), _rooted(oracle.pick, "src")),
        Case("place", "I", "V", ("place",), _rooted(oracle.place, "dst")),
        Case("pvary", "I", "V", ("pvary",), _elementwise(oracle.pvary)),
        Case("all_gather", "V", "V", ("all_gather",), _all_gather, ways=2),
        Case("psum_scatter", "V", "V", ("psum_scatter",), _psum_scatter, NO_BOOL, ways=2),
        Case("shard", "I", "V", ("shard",), _shard, ways=2),
        Case("unshard", "V", "I", ("unshard",), _unshard, ways=3),
        Case("all_to_all", "V", "V", ("all_to_all",), _all_to_all, ways=10),
        Case("ppermute", "V", "V", ("permute",), _ppermute, ways=4),
        Case("pshuffle", "V", "V", ("permute",), _pshuffle, ways=3),
        Case("pshift", "V", "V", ("permute",), _pshift, ways=4),
        Case("pscan", "V", "V", ("scan",), _pscan, NO_BOOL, ways=4),
        Case("broadcast", "V", "V", ("broadcast",), _rooted(oracle.broadcast, "src")),
        Case("reduce", "V", "V", ("reduce",), _rooted(oracle.reduce, "dst"), NO_BOOL),
        Case("gather", "V", "V", ("gather",), _gather),
        Case("scatter", "V", "V", ("scatter",), _scatter, ways=2),
        Case("all_gather_v", "V", "V", ("all_gather",), _all_gather_v, ways=2, asks="sizes"),
        Case("psum_scatter_v", "V", "V", ("psum_scatter",), _psum_scatter_v, NO_BOOL),
        Case("gather_v", "V", "V", ("gather",), _gather_v, ways=2, asks="sizes"),
        Case("scatter_v", "V", "V", ("scatter",), _scatter_v),
        Case("all_to_all_v", "V", "V", ("all_to_all",), _all_to_all_v, ways=2, asks="recv_sizes"),
        Case("indexed_all_to_all_v", "V", "V", ("all_to_all",), _indexed_all_to_all_v, ways=3, asks="recv_sizes"),
    )
}


# --- a draw on a rank ----------------------------------------------------------------------------------------------


class Here:
    """One draw of a case as a rank of an axis sees it: its own tensors, and the oracle's word on all ranks'.

    `axis` reads "x", "a,b" (a tuple) or "mesh[a,b]" (a sub-mesh).
    """

    def __init__(self, case: Case, axis: str, *seed: int | str, drawn: Drawn | None = None, **choices: Any) -> None:
        mesh = pmod.current_mesh()
        names = tuple(axis.removeprefix("mesh[").removesuffix("]").split(","))
        self.axis = mesh[names] if axis.startswith("mesh[") else names[0] if len(names) == 1 else names
        rank = mesh.topology.rank
        self.group = next(group for group in oracle.groups(mesh.shape, names) if rank in group)
        self.index, self.n = self.group.index(rank), len(self.group)
        self.case = case
        # one draw for all groups of the mesh, as one program is for all ranks; the numbers differ between groups
        if drawn is None:
            axes = tuple(mesh.shape[name] for name in names)
            drawn = case.draw(Choices.seeded(case.name, axis, self.n, *seed, axes=axes, **choices), self.n)
        self.drawn = drawn
        self._numbers = np.random.default_rng([*map(ord, case.name), self.group[0]])
        self.complex = False
        self.xs = self.random_inputs()

    def random(self, shapes: list[Any], kind: str) -> Arrays:
        draw = self._numbers.standard_normal
        arrays = [0.5 * draw(shape) + (0.5j * draw(shape) if self.complex else 0) for shape in shapes]
        return [arrays[0]] * len(arrays) if kind == "I" else arrays

    def random_inputs(self) -> Arrays:
        return self.random(self.drawn.shapes, self.case.takes)

    def on(self, xs: Arrays | None = None, *, ws: Arrays | None = None) -> Here:
        """The same call on other numbers."""
        other = copy.copy(self)
        for known in ("ys", "jacobian", "ws", "vs", "us"):
            vars(other).pop(known, None)
        other.xs = self.random_inputs() if xs is None else xs
        if ws is not None:
            other.ws = ws
        return other

    def on_complex(self) -> Here:
        """The same call on complex numbers."""
        other = copy.copy(self)
        other.complex = True
        return other.on()

    # --- what this rank does ---

    def call(self, x: Any) -> Any:
        return self.case.call(x, self.axis, self.drawn.kwargs[self.index])

    def mine(self, arrays: Arrays) -> Tensor:
        """This rank's of them."""
        return torch.from_numpy(np.array(arrays[self.index])).clone(memory_format=torch.contiguous_format)

    def leaf(self) -> Tensor:
        return self.mine(self.xs).requires_grad_()

    def loss(self, y: Tensor) -> Tensor:
        return torch.dot(self.mine(self.ws).reshape(-1), y.reshape(-1).exp()).real

    # --- what the oracle says; of inputs other than xs where given ---

    @cached_property
    def ys(self) -> Arrays:
        return self.drawn.oracle(self.xs)

    @cached_property
    def jacobian(self) -> oracle.Jacobian:
        return self.case.jacobian(self.drawn, self.xs)

    @cached_property
    def ws(self) -> Arrays:
        return self.random([y.shape for y in self.ys], self.case.gives)

    @cached_property
    def vs(self) -> Arrays:
        return self.random_inputs()

    @cached_property
    def us(self) -> Arrays:
        return self.random_inputs()

    def derivative(self, *directions: Arrays) -> Arrays:
        """Of S, to the order of one and the number of directions."""
        pushed = [self.jacobian.push(vs) for vs in directions]
        weighted = [w * np.exp(y) for w, y in zip(self.ws, self.ys, strict=True)]
        products = [math.prod(factors) for factors in zip(weighted, *pushed, strict=True)]
        return self.jacobian.pull([np.conj(x) for x in products])

    @property
    def alike(self) -> bool:
        """Whether inputs and outputs have the same shape on all ranks."""
        return all(len({a.shape for a in arrays}) == 1 for arrays in (self.xs, self.ys))

    @property
    def still(self) -> bool:
        """Whether nothing moves."""
        permutes = self.case.rows == ("permute",)
        return self.n == 1 or (permutes and all(y is x for x, y in zip(self.xs, self.ys, strict=True)))

    @property
    def shares(self) -> bool:
        """Whether the result may share storage with x on this rank."""
        on_dst = self.case.name == "place" and self.index == self.drawn.kwargs[0].get("dst", 0)
        return on_dst or self.case.name in ("pvary", "shard")
