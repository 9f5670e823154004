"""How a tensor is cut: a layout, which all ranks derive alike from the first one.

Nothing here looks at a tensor or sends. A layout says of each dim that it is whole
(None), a `Part` or a `Fold`. Along an axis that no dim is cut over, a tensor is one
value (I); along the others it varies (V).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeAlias

import attrs

from pmod._core.arguments import split_sizes

Axes: TypeAlias = tuple[str, ...]

# An output has borders in proportion to its input's, so that no rank runs empty; where
# the input is more lopsided than this, even shares begin anew.
LOPSIDED = 1.5


@attrs.frozen(cache_hash=True)
class Part:
    """A dim that is cut into runs of rows, one for each rank of these axes in turn."""

    axes: Axes
    sizes: tuple[int, ...]
    # where each run begins, and the length of the whole
    starts: tuple[int, ...] = attrs.field(init=False, eq=False, repr=False)
    total: int = attrs.field(init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        starts = tuple(accumulate(self.sizes, initial=0))
        object.__setattr__(self, "starts", starts)
        object.__setattr__(self, "total", starts[-1])

    def cut_at(self, starts: Sequence[int]) -> Part:
        """Return the part over the same axes whose runs begin here; the last is its length."""
        return Part(self.axes, tuple(end - first for first, end in pairwise(starts)))

    def times(self, count: int) -> Part:
        """Return the part whose rows are `count` rows each."""
        return Part(self.axes, tuple(size * count for size in self.sizes))

    def evenly(self, length: int) -> Part:
        """Return equal shares of another length."""
        return Part(self.axes, split_sizes(length, len(self.sizes)))

    def scaled(self, length: int) -> Part:
        """Return the cut of another length whose borders keep their places in proportion."""
        n = self.total
        if length == n:
            return self
        if not n or max(self.sizes) > LOPSIDED * math.ceil(n / len(self.sizes)):
            return self.evenly(length)
        inner = [(start * length + n // 2) // n for start in self.starts[:-1]]
        return self.cut_at([*inner, length])


@attrs.frozen(cache_hash=True)
class Fold:
    """A dim that was made of several, outermost first, of which an inner one is cut.

    A rank's rows are those whose factors are all its own: not one run of rows.
    """

    lengths: tuple[int, ...]
    parts: tuple[Part | None, ...]
    axes: Axes = attrs.field(init=False, eq=False, repr=False)
    total: int = attrs.field(init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        axes: list[str] = []
        for part in self.parts:
            if part is not None:
                axes += part.axes
        object.__setattr__(self, "axes", tuple(axes))
        object.__setattr__(self, "total", math.prod(self.lengths))


Cut: TypeAlias = Part | Fold | None
Layout: TypeAlias = tuple[Cut, ...]
Place: TypeAlias = Mapping[Axes, int]
"""This rank's index along each tuple of axes that cuts something."""


def rows_held(cut: Part | Fold, place: Place) -> int:
    """Return how many rows of a dim this rank has."""
    if isinstance(cut, Part):
        return cut.sizes[place[cut.axes]]
    return math.prod(factors_held(cut, place))


def factors_held(fold: Fold, place: Place) -> list[int]:
    """Return how many rows of each factor this rank has."""
    held: list[int] = []
    for length, part in zip(fold.lengths, fold.parts, strict=True):
        held.append(length if part is None else part.sizes[place[part.axes]])
    return held


def axes_of(layout: Layout) -> frozenset[str]:
    """Return the axes along which a tensor of this layout varies."""
    axes: set[str] = set()
    for cut in layout:
        if cut is not None:
            axes.update(cut.axes)
    return frozenset(axes)


def without(layout: Layout, dims: Sequence[int], *, keepdim: bool = False) -> Layout:
    """Return the layout after these dims were reduced."""
    kept: list[Cut] = []
    for d, cut in enumerate(layout):
        if d not in dims:
            kept.append(cut)
        elif keepdim:
            kept.append(None)
    return tuple(kept)


def with_cut(layout: Layout, dim: int, cut: Cut) -> Layout:
    """Return the layout with another cut of one dim."""
    return (*layout[:dim], cut, *layout[dim + 1 :])


# --- broadcasting ---------------------------------------------------------------------

Shape: TypeAlias = tuple[int, ...]


class Meeting(NamedTuple):
    """How tensors meet: what each is cut as before, and the result."""

    wanted: tuple[Layout, ...]
    layout: Layout
    shape: Shape


@lru_cache(maxsize=4096)
def meeting(
    layouts: tuple[Layout, ...], shapes: tuple[Shape, ...], first: int
) -> Meeting | str:
    """Return how tensors of these layouts and whole shapes are broadcast.

    Where they are cut unlike, the one at `first` decides, then the others in their
    order; a dim of one row decides only where no other has more. A text says why they
    do not fit.
    """
    n = max(map(len, layouts))
    shape = [1] * n
    for of in shapes:
        for d, length in enumerate(of, n - len(of)):
            if shape[d] == 1:
                shape[d] = length
            elif length not in (1, shape[d]):
                return f"lengths {length} and {shape[d]} of the whole do not match in dim {d}"
    cuts: list[Cut] = [None] * n
    used: set[str] = set()
    order = [first, *[i for i in range(len(layouts)) if i != first]]
    for is_one_row in (False, True):
        for i in order:
            here = n - len(layouts[i])
            for d, cut in enumerate(layouts[i], here):
                fits = cut is not None and (shapes[i][d - here] == 1) == is_one_row
                if is_one_row and shape[d] != 1:
                    continue
                if (
                    fits
                    and cuts[d] is None
                    and cut is not None
                    and not used & {*cut.axes}
                ):
                    cuts[d] = cut
                    used |= {*cut.axes}
    wanted: list[Layout] = []
    for of in shapes:
        own: list[Cut] = []
        for d, length in enumerate(of, n - len(of)):
            own.append(cuts[d] if length == shape[d] else None)
        wanted.append(tuple(own))
    return Meeting(tuple(wanted), tuple(cuts), tuple(shape))


# --- reshape --------------------------------------------------------------------------


class Reshape(NamedTuple):
    """How a reshape goes on blocks, one step after the other.

    Folded dims are opened (`opened` is then the layout), dims of one row are made whole,
    dims are cut so that no border falls within a row of a new dim; then the block has
    the new layout, and nothing moves.
    """

    opened: Layout
    lengths: Shape
    one_row: tuple[int, ...]
    recut: tuple[tuple[int, Part], ...]
    layout: Layout


def opened(layout: Layout, shape: Shape) -> tuple[list[Part | None], list[int]]:
    """Return the parts and lengths where folded dims are the dims that they were made of."""
    parts: list[Part | None] = []
    lengths: list[int] = []
    for cut, length in zip(layout, shape, strict=True):
        if isinstance(cut, Fold):
            parts += cut.parts
            lengths += cut.lengths
        else:
            parts.append(cut)
            lengths.append(length)
    return parts, lengths


def joined(lengths: Sequence[int], parts: Sequence[Part | None]) -> Cut:
    """Return the cut of a dim that is made of several, outermost first.

    What is whole joins the factor before it, so that equal cuts compare equal.
    """
    merged: list[tuple[int, Part | None]] = []
    for length, part in zip(lengths, parts, strict=True):
        if part is None and merged:
            before, outer = merged[-1]
            wide = None if outer is None else outer.times(length)
            merged[-1] = (before * length, wide)
        else:
            merged.append((length, part))
    if len(merged) == 1:
        return merged[0][1]
    if not any([part for _, part in merged]):
        return None
    factors, cuts = zip(*merged, strict=True)
    return Fold(factors, cuts)


def _groups(
    source: Sequence[int], target: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Return the dims of both that hold the same elements, in groups as small as can be.

    Dims of one row are in no group.
    """
    groups: list[tuple[list[int], list[int]]] = []
    ours = [d for d, n in enumerate(source) if n != 1]
    theirs = [d for d, n in enumerate(target) if n != 1]
    while ours and theirs:
        mine, other = [ours.pop(0)], [theirs.pop(0)]
        have, want = source[mine[0]], target[other[0]]
        while have != want:
            if have < want:
                mine.append(ours.pop(0))
                have *= source[mine[-1]]
            else:
                other.append(theirs.pop(0))
                want *= target[other[-1]]
        groups.append((mine, other))
    return groups


_Piece: TypeAlias = tuple[int, int, int]
"""A factor of a dim: the dim, how many are further out, its length."""


def _pieces(
    source: Sequence[int], target: Sequence[int], mine: list[int], other: list[int]
) -> dict[int, list[_Piece]] | None:
    """Return of which factors of the old dims each new dim is made, None if of none."""
    left = [(d, source[d]) for d in mine]
    count = dict.fromkeys(mine, 0)
    out: dict[int, list[_Piece]] = {}
    for e in other:
        need, made = target[e], list[_Piece]()
        while need > 1:
            d, here = left.pop(0)
            take = math.gcd(here, need)
            # the rows within one row of the new dim are a factor, or these of the old
            if take not in (here, need):
                return None
            made.append((d, count[d], take))
            count[d] += 1
            need //= take
            if here > take:
                left.insert(0, (d, here // take))
        out[e] = made
    return out


@lru_cache(maxsize=4096)
def reshape(layout: Layout, shape: Shape, target: Shape) -> Reshape | None:
    """Return how a tensor of this layout and whole shape gets the shape `target`.

    None if a dim that is cut would be taken apart unevenly. No length is 0.
    """
    parts, lengths = opened(layout, shape)
    one_row: list[int] = []
    for d, (part, n) in enumerate(zip(parts, lengths, strict=True)):
        if part is not None and n == 1:
            one_row.append(d)
    cuts: list[Cut] = [None] * len(target)
    recut: list[tuple[int, Part]] = []
    for mine, other in _groups(lengths, target):
        if not any([parts[d] for d in mine]):
            continue
        made = _pieces(lengths, target, mine, other)
        if made is None:
            return None
        outer = _outermost(parts, made, recut)
        for e, pieces in made.items():
            inside: list[Part | None] = []
            for d, further_out, _ in pieces:
                inside.append(outer.get(d) if further_out == 0 else None)
            cuts[e] = joined([take for _, _, take in pieces], inside)
    return Reshape(
        tuple(parts), tuple(lengths), tuple(one_row), tuple(recut), tuple(cuts)
    )


def _outermost(
    parts: Sequence[Part | None],
    made: dict[int, list[_Piece]],
    recut: list[tuple[int, Part]],
) -> dict[int, Part]:
    """Return how the outermost factor of each dim is cut, and note what must move."""
    inner: dict[int, int] = {}
    for pieces in made.values():
        for d, further_out, take in pieces:
            inner[d] = inner.get(d, 1) * (take if further_out else 1)
    outer: dict[int, Part] = {}
    for d, rows in inner.items():
        part = parts[d]
        if part is None:
            continue
        if any([size % rows for size in part.sizes]):
            # rounded up: a row of the new dim goes to who has its end
            starts = [
                min(-(-start // rows) * rows, part.total) for start in part.starts
            ]
            part = part.cut_at(starts)
            recut.append((d, part))
        outer[d] = Part(part.axes, tuple(size // rows for size in part.sizes))
    return outer


# --- slices ---------------------------------------------------------------------------


class Slice(NamedTuple):
    """Which rows of a block a slice of the whole takes, and how its result is cut."""

    part: Part
    first: tuple[int, ...]  # of each rank, counted in its block


@lru_cache(maxsize=4096)
def sliced(part: Part, start: int, stop: int, step: int) -> Slice:
    """Return the rows start, start + step, ... before stop, where they are."""

    def before(row: int) -> int:
        """Return how many rows of the result come before a row."""
        return max(0, -(-(min(max(row, start), stop) - start) // step))

    of = part.cut_at([before(row) for row in part.starts])
    first: list[int] = []
    for begin, count in zip(part.starts, of.starts, strict=True):
        first.append(start + count * step - begin)
    return Slice(of, tuple(first[:-1]))
