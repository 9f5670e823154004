"""Who holds which part of a tensor, asked only for the parts that are drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice, product
from typing import TypeAlias

from attrs import frozen

from pmod._errors import coordinates
from pmod._mesh.mesh import Mesh
from pmod._mesh.picture import shown_of
from pmod._mesh.sizes import named_coords_at

# how many panels, rows and columns of shards are drawn of a large mesh
_MOST = (8, 14, 12)
# how many ranks a box and its tip name, and how many the list of empty ones does
_IN_BOX, _IN_TIP, _IN_LIST = 3, 4, 8

Shown: TypeAlias = list[int | None]
"""The parts to draw along a side, with None in place of those that are left out."""

NO_DIM = -1
"""The one part along a side of the picture that no dim of the tensor is drawn along."""


@frozen
class Dim:
    """A dim of a tensor, and what cuts it into parts."""

    length: int
    names: tuple[str, ...]
    # of its parts
    sizes: tuple[int, ...]
    # how much a part holds of the parts before and after it
    halo: tuple[int, int]

    @property
    def cuts(self) -> list[int]:
        """Return where each part begins, and where the last one ends."""
        return [0, *accumulate(self.sizes)]

    def slice(self, part: int) -> str:
        """Return `0:3`."""
        return f"{self.cuts[part]}:{self.cuts[part + 1]}"

    def slices(self, shown: Shown, gap: str) -> list[str]:
        """Return `0:3` for each part that is shown, and the gap for what is left out."""
        texts: list[str] = []
        for part in shown:
            texts.append(gap if part is None else self.slice(part))
        return texts

    def with_halo(self, part: int) -> str:
        """Return ` with its halo x[0:4]`, or nothing if there is none."""
        if not any(self.halo):
            return ""
        before, after = self.halo
        first = max(0, self.cuts[part] - before)
        last = min(self.length, self.cuts[part + 1] + after)
        return f" with its halo x[{first}:{last}]"


@frozen
class Held:
    """A tensor's dims on a mesh."""

    mesh: Mesh
    dims: list[Dim]

    @property
    def parts(self) -> int:
        """Return how many parts the tensor has."""
        return math.prod(len(dim.sizes) for dim in self.dims)

    @property
    def copies(self) -> int:
        """Return how many ranks hold each part."""
        return self.mesh.size // self.parts

    def ranks(self, part: Sequence[int]) -> Iterator[int]:
        """Yield the ranks that hold this part, in the order of the mesh."""
        fixed: dict[str, int] = {}
        for dim, index in zip(self.dims, part, strict=True):
            # the first name of an entry is the slowest
            sizes = {name: self.mesh.shape[name] for name in dim.names}
            fixed.update(named_coords_at(index, sizes))
        ranges: list[Sequence[int]] = []
        for name, size in self.mesh.shape.items():
            ranges.append([fixed[name]] if name in fixed else range(size))
        return (self.mesh._rank_at(place) for place in product(*ranges))

    def label(self, part: Sequence[int]) -> str:
        """Return `0 2`, or `0 1 2 ..` if there are many."""
        shown = " ".join(map(str, islice(self.ranks(part), _IN_BOX)))
        return shown if self.copies <= _IN_BOX else f"{shown} .."

    def tip(self, part: Sequence[int]) -> str:
        """Return `x[0:3, 4:8] on rank 1 (data=0, model=1)`."""
        where = ", ".join(map(Dim.slice, self.dims, part))
        names: list[str] = []
        for rank in islice(self.ranks(part), _IN_TIP):
            names.append(f"rank {rank} {coordinates(self.mesh.coords_of(rank))}")
        tip = f"x[{where}] on {', '.join(names)}"
        more = self.copies - len(names)
        return f"{tip} and {more} more" if more > 0 else tip

    def summary(self) -> str:
        """Return the sizes of the parts, and on how many ranks each is."""
        if self.parts == 1:
            return f"all of it on {self.copies} ranks"
        largest = tuple(max(dim.sizes) for dim in self.dims)
        smallest = tuple(min(dim.sizes) for dim in self.dims)
        text = f"shards of {largest}"
        if smallest != largest:
            text += f" to {smallest}"
        if self.copies > 1:
            text += f", each on {self.copies} ranks"
        return text

    def empty(self) -> list[str]:
        """Return a line that lists the ranks that hold nothing, if there are any."""
        few = list(islice(self._empty_ranks(), _IN_LIST + 1))
        if not few:
            return []
        ranks = [str(rank) for rank in few[:_IN_LIST]]
        if len(few) > _IN_LIST:
            ranks.append("..")
        return [f"nothing on ranks {' '.join(ranks)}"]

    def _empty_ranks(self) -> Iterator[int]:
        # a mesh may have 131,072 ranks: its parts are gone through only if one is empty
        if all(0 not in dim.sizes for dim in self.dims):
            return
        for part in product(*(range(len(dim.sizes)) for dim in self.dims)):
            lengths = [dim.sizes[i] for dim, i in zip(self.dims, part, strict=True)]
            if 0 in lengths:
                yield from self.ranks(part)

    def grid(self) -> list[Shown]:
        """Return the parts to draw along panels, rows and columns.

        The last dim runs to the right; the sides that are left over are [NO_DIM].
        """
        missing = len(_MOST) - len(self.dims)
        sides: list[Shown] = [[NO_DIM]] * missing
        for dim, most in zip(self.dims, _MOST[missing:], strict=True):
            # a box of no width cannot be seen: empty parts are listed below the picture
            full = [index for index, size in enumerate(dim.sizes) if size]
            sides.append(_chosen(full or [0], most))
        return sides

    def heads(self, columns: Shown, gap: str) -> list[str]:
        """Return what stands above each column, with the gap for those left out."""
        return self.dims[-1].slices(columns, gap)

    def sides(self, rows: Shown, gap: str) -> list[str]:
        """Return what stands left of each row, with the gap for those left out."""
        if rows == [NO_DIM]:
            return ["rank"]
        return self.dims[-2].slices(rows, gap)


def _chosen(parts: list[int], most: int) -> Shown:
    side: Shown = []
    for place in shown_of(len(parts), most):
        side.append(None if place is None else parts[place])
    return side


def part_of(*indices: int) -> list[int]:
    """Return the index of a part along each dim, from those along the sides."""
    return [index for index in indices if index != NO_DIM]


def halo_note(dims: Sequence[Dim], first: int = 0) -> str:
    """Return `1 before and 1 after along dim 0`, for the dims from the first on."""
    notes: list[str] = []
    for number, dim in enumerate(dims[first:], first):
        if any(dim.halo):
            before, after = dim.halo
            notes.append(f"{before} before and {after} after along dim {number}")
    return ", ".join(notes)
