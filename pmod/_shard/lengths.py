"""The lengths of uneven shards: numbers that tell a rank which of them it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pmod._core.leaves import tensors_in
from pmod._shard.known import NONE, Axes, KnownKinds
from pmod._shard.operations import LENGTHS, SAME, Args, Kwargs, numbers_in


class UnevenLengths:
    """The lengths of uneven shards, those of all ranks, each with the axes that cut so.

    A rank that uses such a number goes its own way. A number that is equal by chance
    counts as well: no operation says where its numbers came from.
    """

    def __init__(self, known: KnownKinds) -> None:
        self._known = known
        self.axes_by_length: dict[int, Axes] = {}

    def cut(self, names: str | tuple[str, ...], sizes: Sequence[int]) -> None:
        """Note the lengths of the shards along these axes."""
        if len(set(sizes)) == 1:
            return
        for n in set(sizes):
            self._add(n, self._known.names(names))

    def note_rows(self, result: object, axes: Axes) -> None:
        """Note the length of a result that depends on values that vary."""
        # in a graph such a length is symbolic, and cannot be looked up
        if not axes or torch.compiler.is_compiling():
            return
        for y in tensors_in(result):
            if y.dim():
                self._add(y.shape[0], axes)

    def _add(self, n: int, axes: Axes) -> None:
        self.axes_by_length[n] = self._axes(n) | axes

    def _axes(self, n: int) -> Axes:
        return self.axes_by_length.get(n, NONE)

    def all_axes(self) -> Axes:
        """Return the axes along which some shards are uneven."""
        return NONE.union(*self.axes_by_length.values())

    def told(self, name: str, result: object) -> Axes:
        """Return the axes of which a result tells this rank's length of a shard.

        The result is a length, or the rows that a loop goes through.
        """
        if not self.axes_by_length:
            return NONE
        if name == "unbind":
            assert isinstance(result, tuple | list)
            return self._axes(len(result))
        if name in ("__len__", "size") and isinstance(result, int):
            return self._axes(result)
        return NONE

    def asked(self, name: str, args: Args, kwargs: Kwargs) -> Axes:
        """Return the axes of uneven shards with a length that is asked for here."""
        if not self.axes_by_length:
            return NONE
        if name in SAME:
            return self._among([*args, kwargs])
        if name == "__getitem__":
            # an index picks an element; only the bounds of a slice are lengths
            index = args[1] if isinstance(args[-1], tuple) else args[1:]
            return self._among([i for i in index if isinstance(i, slice)])
        if name in LENGTHS:
            return self._among([args[1:], kwargs])
        return NONE

    def _among(self, tree: object) -> Axes:
        return NONE.union(*[self._axes(n) for n in numbers_in(tree)])
