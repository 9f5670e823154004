"""Which rows of the whole a rank's rows of a result are made of, and how it gets them.

A rule is one dim of a layer: how long the result is, where each rank's rows of it
begin, and which rows of the padded input these reach. `fetch` brings them, by the same
plans as a halo.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeAlias, cast

import torch.nn.functional as F
from torch import Tensor

from pmod._collectives.halo import carry_out, laid_out_as
from pmod._collectives.halo_plan import Plan, Windows, window_plan
from pmod._core.send import memory_format
from pmod._torch import constant_in_graphs
from pmod.nn.functional.given import Held

Sizes: TypeAlias = tuple[int, ...]


def begins(sizes: Sizes) -> list[int]:
    """Return the row of the whole at which each shard begins, and the length."""
    return [0, *accumulate(sizes)]


def lengths(starts: Sizes) -> Sizes:
    """Return how long the shards are that begin there."""
    return tuple(end - first for first, end in pairwise(starts))


class Slide(NamedTuple):
    """Windows that slide: convolutions, pools, unfold."""

    kernel: int
    stride: int
    padding: tuple[int, int]
    dilation: int
    ceil: bool = False

    @property
    def extent(self) -> int:
        """The rows from the first to the last of a window."""
        return self.dilation * (self.kernel - 1) + 1

    def length(self, rows: int) -> int:
        """Return the length of the result."""
        free = rows + sum(self.padding) - self.extent
        if not self.ceil:
            return free // self.stride + 1
        count = -(-free // self.stride) + 1
        # as in torch, the last window begins within the input or the padding before it
        if (count - 1) * self.stride >= rows + self.padding[0]:
            return count - 1
        return count

    def starts(self, sizes: Sizes) -> Sizes:
        """Return where each rank's rows of the result begin, and its length."""
        length = self.length(sum(sizes))
        # rounded up: a row of the result is where its row of x is
        own = [min(-(-start // self.stride), length) for start in begins(sizes)[:-1]]
        return (*own, length)

    def reach(self, first: int, end: int, rows: int) -> tuple[int, int]:
        """Return the rows that the rows `first` to `end` of the result are made of."""
        low = first * self.stride - self.padding[0]
        return low, low + (end - 1 - first) * self.stride + self.extent


class Spray(NamedTuple):
    """Windows that are added up: transposed convolutions, fold."""

    kernel: int
    stride: int
    padding: int
    dilation: int
    output_padding: int = 0

    @property
    def extent(self) -> int:
        """The rows from the first to the last of a window."""
        return self.dilation * (self.kernel - 1) + 1

    def length(self, rows: int) -> int:
        """Return the length of the result."""
        whole = (rows - 1) * self.stride + self.extent
        return whole - 2 * self.padding + self.output_padding

    def starts(self, sizes: Sizes) -> Sizes:
        """Return where each rank's rows of the result begin, and its length."""
        length = self.length(sum(sizes))
        own = [min(start * self.stride, length) for start in begins(sizes)[:-1]]
        return (*own, length)

    def reach(self, first: int, end: int, rows: int) -> tuple[int, int]:
        """Return the rows that the rows `first` to `end` of the result are made of."""
        begin, last = first + self.padding, end - 1 + self.padding
        # the window that starts at or before the first row, so that nothing is cropped
        # that is not there
        low = min(-((self.extent - 1 - begin) // self.stride), begin // self.stride)
        low = min(max(low, 0), rows - 1)
        return low, max(min(last // self.stride + 1, rows), low + 1)


class Shift(NamedTuple):
    """Rows that keep their order: padding, cropping, rolling."""

    before: int
    after: int
    keep: bool = False
    """Whether the shards keep their lengths, as where rows are rolled."""

    def length(self, rows: int) -> int:
        """Return the length of the result."""
        return rows + self.before + self.after

    def starts(self, sizes: Sizes) -> Sizes:
        """Return where each rank's rows of the result begin, and its length."""
        if self.keep:
            return tuple(begins(sizes))
        length = self.length(sum(sizes))
        inner = begins(sizes)[1:-1]
        # what is added is on the first rank and on the last
        own = [min(max(start + self.before, 0), length) for start in inner]
        return (0, *own, length)

    def reach(self, first: int, end: int, rows: int) -> tuple[int, int]:
        """Return the rows that the rows `first` to `end` of the result are made of."""
        return first - self.before, end - self.before


class Mirror(NamedTuple):
    """Rows in the opposite order."""

    def length(self, rows: int) -> int:
        """Return the length of the result."""
        return rows

    def starts(self, sizes: Sizes) -> Sizes:
        """Return where each rank's rows of the result begin, and its length."""
        return tuple(begins(sizes))

    def reach(self, first: int, end: int, rows: int) -> tuple[int, int]:
        """Return the rows that the rows `first` to `end` of the result are made of."""
        return rows - end, rows - first


class Scale(NamedTuple):
    """A result of another length: row j lies where row floor(j * rows / to) is."""

    to: int

    def length(self, rows: int) -> int:
        """Return the length of the result."""
        return self.to

    def starts(self, sizes: Sizes) -> Sizes:
        """Return where each rank's rows of the result begin, and its length."""
        rows = max(sum(sizes), 1)
        own = [min(-(-start * self.to // rows), self.to) for start in begins(sizes)]
        return (*own[:-1], self.to)

    def reach(self, first: int, end: int, rows: int) -> tuple[int, int]:
        """Return the rows of its own: what it is made of depends on more."""
        return first * rows // self.to, -(-end * rows // self.to)


class Near(NamedTuple):
    """Windows around each row, that stay within the whole: neighbourhoods."""

    kernel: int

    def length(self, rows: int) -> int:
        """Return the length of the result."""
        return rows

    def starts(self, sizes: Sizes) -> Sizes:
        """Return where each rank's rows of the result begin, and its length."""
        return tuple(begins(sizes))

    def begin(self, row: int, rows: int) -> int:
        """Return the first row that a row sees."""
        return min(max(row - self.kernel // 2, 0), rows - self.kernel)

    def reach(self, first: int, end: int, rows: int) -> tuple[int, int]:
        """Return the rows that the rows `first` to `end` of the result are made of."""
        return self.begin(first, rows), self.begin(end - 1, rows) + self.kernel


Rule: TypeAlias = Slide | Spray | Shift | Mirror | Scale | Near

_RULES: dict[str, type[Rule]] = {
    "Slide": Slide,
    "Spray": Spray,
    "Shift": Shift,
    "Mirror": Mirror,
    "Scale": Scale,
    "Near": Near,
}


class Layout(NamedTuple):
    """Of every rank alike: where its rows of the result begin, what they reach."""

    starts: Sizes
    windows: Windows

    def rows(self, index: int) -> tuple[int, int]:
        """Return this rank's rows of the result."""
        return self.starts[index], self.starts[index + 1]


@lru_cache(maxsize=256)
def _layout(kind: str, numbers: tuple[object, ...], sizes: Sizes) -> tuple[object, ...]:
    rule = _RULES[kind](*numbers)  # pyright: ignore[reportArgumentType]
    starts, rows = rule.starts(sizes), sum(sizes)
    windows: list[tuple[int, int]] = []
    for first, end in pairwise(starts):
        # a rank without a row of the result needs no row
        windows.append(rule.reach(first, end, rows) if first < end else (0, 0))
    return starts, tuple(windows)


@constant_in_graphs
def _laid(kind: str, numbers: tuple[object, ...], sizes: Sizes) -> tuple[object, ...]:
    # plain numbers in and out: compiled code takes them for constants
    return _layout(kind, numbers, sizes)


def layout(rule: Rule, sizes: Sizes) -> Layout:
    """Return what a rule makes of shards of these lengths."""
    starts, windows = _laid(type(rule).__name__, tuple(rule), sizes)
    return Layout(starts, windows)  # pyright: ignore[reportArgumentType]


@lru_cache(maxsize=256)
def _plan_of(index: int, sizes: Sizes, windows: Windows, boundary: str) -> Plan:
    return window_plan(index, sizes, windows, boundary)


@constant_in_graphs
def plan(index: int, sizes: Sizes, windows: Windows, boundary: str) -> Plan:
    """Return how a rank comes by its window."""
    return _plan_of(index, sizes, windows, boundary)


def fetch(
    x: Tensor, at: int, held: Held, windows: Windows, boundary: str = "zeros"
) -> Tensor:
    """Return this rank's window of the padded whole along a dim."""
    return fetch_all([x], at, held, windows, boundary)[0]


def fetch_all(
    xs: list[Tensor], at: int, held: Held, windows: Windows, boundary: str = "zeros"
) -> list[Tensor]:
    """Return the windows of several tensors that are cut alike, sent together."""
    needed = plan(held.place, held.sizes, windows, boundary)
    if not needed.moves:
        return xs
    return carry_out(needed, xs, [at] * len(xs), held.axis)


@lru_cache(maxsize=256)
def _rule_plan_of(
    kind: str, numbers: tuple[object, ...], index: int, sizes: Sizes, boundary: str
) -> Plan:
    _, windows = _layout(kind, numbers, sizes)
    return window_plan(index, sizes, cast(Windows, windows), boundary)


@constant_in_graphs
def _rule_plan(
    kind: str, numbers: tuple[object, ...], index: int, sizes: Sizes, boundary: str
) -> Plan:
    # one look into a memo, however many ranks there are
    return _rule_plan_of(kind, numbers, index, sizes, boundary)


def rows_of(
    x: Tensor, at: int, held: Held, rule: Rule, boundary: str = "zeros"
) -> Tensor:
    """Return this rank's window of the padded whole, as a rule has it."""
    kind = type(rule).__name__
    needed = _rule_plan(kind, tuple(rule), held.place, held.sizes, boundary)
    if not needed.moves:
        return x
    return carry_out(needed, [x], [at], held.axis)[0]


def filled(
    x: Tensor, at: int, held: Held, windows: Windows, value: float
) -> tuple[Tensor, tuple[int, int]]:
    """Return this rank's window of the whole padded with a value, and how much is that.

    Of zeros no padding is needed: `fetch` has them.
    """
    low, high = windows[held.place]
    y = fetch(x, at, held, clipped(windows, held.total))
    gaps = (max(min(high, 0) - low, 0), max(high - max(low, held.total), 0))
    if gaps == (0, 0):
        return y, gaps
    return laid_out_as(padded(y, at, gaps, value), memory_format(y)), gaps


@constant_in_graphs
def clipped(windows: Windows, total: int) -> Windows:
    """Return the windows without the rows that are outside the whole."""
    out: list[tuple[int, int]] = []
    for low, high in windows:
        first = min(max(low, 0), total)
        out.append((first, min(max(high, first), total)))
    return tuple(out)


def padded(x: Tensor, at: int, gaps: tuple[int, int], value: float) -> Tensor:
    """Return x with rows of a value before and after."""
    return F.pad(x, [0, 0] * (-at - 1) + list(gaps), value=value)


def not_empty(x: Tensor, extents: dict[int, int]) -> tuple[Tensor, list[int]]:
    """Return x with a window of zeros where it has no row, and the dims where.

    torch gives no empty results: the rows that come of them are dropped.
    """
    empty = [at for at in extents if x.shape[at] == 0]
    kept = memory_format(x)
    for at in empty:
        x = laid_out_as(padded(x, at, (0, extents[at]), 0.0), kept)
    return x, empty


def without(y: Tensor, dims: list[int]) -> Tensor:
    """Return y without the rows of these dims."""
    for at in dims:
        y = y.narrow(at, 0, 0)
    return y
