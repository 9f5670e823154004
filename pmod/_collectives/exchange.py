"""The exchange of lengths, where ranks hold shards of any length."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from pmod._collectives.slices import ALL_TO_ALL, Exchange, Sizes
from pmod._core.ahead import once
from pmod._core.arguments import (
    check_own_size,
    check_sizes,
    check_tensor,
    dim_from_end,
    wrong,
)
from pmod._core.tree import flatten
from pmod._core.watch import told
from pmod._errors import ArgumentError, MismatchError
from pmod._mesh.axis import Axis
from pmod._ranks import world
from pmod._site import origin
from pmod._torch import no_function_modes, no_transforms
from pmod._wire.along import wire_of

HEAD = 8
"""How many numbers tell sizes; trees of more leaves send a second message."""


def check_eager(function: str, axis: Axis) -> None:
    if torch.compiler.is_compiling():
        given = "sizes are left out under torch.compile"
        raise wrong(
            ArgumentError,
            function,
            axis,
            given,
            "Pass them: a compiled graph is fixed.",
        )


def swapped(
    numbers: Sequence[Sequence[int]], device: torch.device, axis: Axis
) -> list[list[int]]:
    """Send numbers[j] to rank j, as many to each, and return what arrives, by rank."""
    if axis.size == 1:
        return [list(row) for row in numbers]
    width = len(numbers[0])
    # sizes are real where tensors are not: other calls depend on them
    if device.type == "meta":
        device = world.number_device()

    def send() -> list[list[int]]:
        counts = [width] * axis.size
        # plain numbers, in any transform and mode
        with no_transforms(), no_function_modes(), torch.no_grad():
            call = ALL_TO_ALL.along(axis, Exchange(-1, -1, None, None))
            flat = torch.tensor(numbers, dtype=torch.int64, device=device).view(-1)
            with told(call, [flat], origin()):
                return (
                    wire_of(axis, device)
                    .all_to_all(flat, counts, counts)
                    .wait()
                    .view(axis.size, width)
                    .tolist()
                )

    return once(send)


def others(x: Tensor, at: int) -> str:
    """Return what must be the same on all ranks: all but the length along the dim."""
    shape = list(map(str, x.shape))
    shape[at] = "..."
    return f"({', '.join(shape)}) {str(x.dtype).removeprefix('torch.')}"


def swapped_alike(
    numbers: Sequence[Sequence[int]],
    fits: str,
    device: torch.device,
    function: str,
    axis: Axis,
) -> list[list[int]]:
    """Do as `swapped`, and raise unless all ranks hold what `fits` says."""
    check_eager(function, axis)
    mine = zlib.crc32(fits.encode())
    rows = [[mine, *row] for row in numbers]
    # as long on every rank: one with another number of leaves is seen like the others,
    # and neither waited for nor aborted by gloo
    arrived = swapped([(row + [0] * HEAD)[:HEAD] for row in rows], device, axis)
    strangers = [rank for rank, row in enumerate(arrived) if row[0] != mine]
    if strangers:
        places = ", ".join(map(str, strangers))
        given = f"x is {fits} here, and of another shape or dtype at index {places} of the axis"
        right = "Shards differ in length along dim only."
        raise wrong(MismatchError, function, axis, given, right)
    if len(rows[0]) > HEAD:
        more = swapped([row[HEAD:] for row in rows], device, axis)
        arrived = [head + tail for head, tail in zip(arrived, more, strict=True)]
    return [row[1 : len(rows[0])] for row in arrived]


def leaves_of(
    tree: object, dim: int, function: str, axis: Axis
) -> list[tuple[Tensor, int]]:
    """Return the leaves, each with its dim counted from the end."""
    leaves: list[Any] = []
    flatten(tree, function, axis, leaves)
    for x in leaves:
        check_tensor(x, function, axis)
    return [(x, dim_from_end(dim, x, function, axis)) for x in leaves]


def sizes_of_leaves(
    tree: object, dim: int, sizes: Sequence[int] | None, function: str, axis: Axis
) -> Iterator[tuple[int, Sizes]]:
    """Return the dim and the sizes of each leaf: those given, or what the ranks hold."""
    leaves = leaves_of(tree, dim, function, axis)
    ats = [at for _, at in leaves]
    if sizes is None:
        return zip(ats, held_lengths(leaves, function, axis), strict=True)
    given = check_sizes(sizes, function, axis)
    for x, at in leaves:
        fitting = (*given[: axis.index], int(x.shape[at]), *given[axis.index + 1 :])
        right = f"Pass sizes={fitting}, or leave sizes out to exchange them."
        check_own_size(x, at, given, function, axis, right)
    return zip(ats, repeat(given), strict=False)


def held_lengths(
    leaves: Sequence[tuple[Tensor, int]], function: str, axis: Axis
) -> list[Sizes]:
    """Return what the ranks hold of each (tensor, dim from the end), in one message."""
    if not leaves:
        return []
    lengths = [int(x.shape[at]) for x, at in leaves]
    fits = ", ".join(others(x, at) for x, at in leaves)
    held = swapped_alike(
        [lengths] * axis.size, fits, leaves[0][0].device, function, axis
    )
    return list(zip(*held, strict=True))
