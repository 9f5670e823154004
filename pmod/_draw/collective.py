"""`draw_collective`: what each rank holds before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from attrs import frozen
from torch import Tensor

from pmod._core.collective import COLLECTIVES
from pmod._draw.svg import LINE, Picture, Svg, colour, letters, table
from pmod._errors import (
    ArgumentError,
    AxisError,
    coordinates,
    near_miss,
    phrase,
    quoted,
)
from pmod._mesh.ambient import given_mesh
from pmod._mesh.mesh import AxisLike, Mesh
from pmod._ranks import world
from pmod._run.simulate import simulate

_MOST = 8  # ranks that are drawn
_GAP = 40  # pixels between before and after
_AXIS = "x"  # of the mesh that is simulated


@frozen
class _Example:
    """A collective on a small example: how many blocks a rank brings, given its index
    and how many ranks there are.
    """

    blocks: Callable[[int, int], int]
    arguments: Callable[[int, int], Mapping[str, Any]] = lambda index, size: {}
    word: str = ""  # of a result made from several blocks, where it is no sum
    drawn_as: str = ""  # another collective, whose result is written the same


def _one(index: int, size: int) -> int:
    return 1


def _two(index: int, size: int) -> int:
    return 2


def _each(index: int, size: int) -> int:
    return size


def _ragged_sizes(size: int) -> list[int]:
    return [1 + rank % 3 for rank in range(size)]


def _own(index: int, size: int) -> int:
    return _ragged_sizes(size)[index]


def _all(index: int, size: int) -> int:
    return sum(_ragged_sizes(size))


def _sizes(index: int, size: int) -> dict[str, Any]:
    return {"sizes": _ragged_sizes(size)}


def _uneven(index: int, size: int) -> list[int]:
    """What a rank sends to each: itself and the rank after it get two blocks."""
    return [2 if other in (index, (index + 1) % size) else 1 for other in range(size)]


_TWO = _Example(
    _two
)  # of a collective that is not named here: what keeps a tensor's shape, and needs no argument
_EXAMPLES = {
    "pmean": _Example(_two, word="mean"),
    "pmax": _Example(_two, word="max"),
    "pmin": _Example(
        _two, word="min", drawn_as="pmax"
    ),  # of unit vectors the minimum says nothing
    "ppermute": _Example(
        _two, lambda index, size: {"perm": [(r, r + 1) for r in range(size - 1)]}
    ),
    "pshuffle": _Example(
        _two, lambda index, size: {"perm": list(reversed(range(size)))}
    ),
    "all_gather": _Example(_one),
    "psum_scatter": _Example(_each),
    "shard": _Example(_each),
    "unshard": _Example(_one),
    "all_to_all": _Example(
        _each, lambda index, size: {"split_dim": 0, "concat_dim": 0}
    ),
    "gather": _Example(_one),
    "scatter": _Example(_each),
    "all_gather_v": _Example(_own, _sizes),
    "psum_scatter_v": _Example(_all, _sizes),
    "gather_v": _Example(_own, _sizes),
    "scatter_v": _Example(_all, _sizes),
    "all_to_all_v": _Example(
        lambda index, size: sum(_uneven(index, size)),
        lambda index, size: {"send_sizes": _uneven(index, size)},
    ),
    "halo_exchange": _Example(
        lambda index, size: 3, lambda index, size: {"width": 1, "boundary": "periodic"}
    ),
}
_NOT_DRAWN = (
    "indexed_all_to_all_v",
    "halo_reduce",
)  # no example can choose their arguments, or its block is many's


def drawn() -> list[str]:
    """The collectives of which there is a picture."""
    return [name for name in COLLECTIVES if name not in _NOT_DRAWN]


@frozen
class _Block:
    """One block of a tensor: what is written on it, whose it was, and what it is made
    of.
    """

    text: str
    source: (
        int | None
    )  # the rank that it comes from; None where several share in it, or none
    tip: str


def draw_collective(
    name: str, mesh: Mesh | None = None, axis: AxisLike | None = None, **arguments: Any
) -> Picture:
    """What each rank along an axis holds before and after a collective, by an example:
    `a0` is block 0 of the first.

    name: "psum", "all_to_all", ... mesh: the ambient one by default. axis: all axes of
    the mesh, flattened, by default.
    arguments: of the collective, such as src=1 or perm=[1, 0]; those left out are
    chosen. Of a long axis the first 8 ranks are drawn, as if there were no others. The
    collective is run, on threads of this process: what is drawn is what it does.
    Nothing is sent.

    Raises: AxisError for another name, with the near miss; what the collective raises
    for wrong arguments.

    >>> pmod.draw_collective("all_gather", pmod.make_mesh(model=2, topology=pmod.Topology(rank=0, world_size=2)))
    all_gather along 'model', V -> V
                      before     after
    rank 0 (model=0)  a0      →  a0 b0
    rank 1 (model=1)  b0      →  a0 b0
    """
    known = drawn()
    if name not in known:
        given = f"no collective {quoted(name)} is drawn{near_miss(name, known)}"
        raise AxisError(
            phrase("draw_collective", given, f"There are {', '.join(known)}.")
        )
    of, mesh = COLLECTIVES[name], given_mesh(mesh, "draw_collective")
    for argument in arguments:
        if argument not in of.arguments:
            given = f"{name} has no argument {argument!r}{near_miss(argument, of.arguments)}"
            raise ArgumentError(
                phrase(
                    "draw_collective",
                    given,
                    f"It has {', '.join(of.arguments) or 'none'}.",
                )
            )
    bound = mesh.bind(mesh.label if axis is None else axis, "draw_collective")
    size = min(bound.size, _MOST)
    example = _EXAMPLES.get(name, _TWO)
    function = COLLECTIVES[example.drawn_as or name].function
    before, after = _run(function, example, size, arguments, invariant=of.takes == "I")
    ranks = [
        f"rank {rank} {coordinates(mesh.coords_of(rank))}"
        for rank in bound.ranks[:size]
    ]
    few = f", {size} of {bound.size:,} ranks" if size < bound.size else ""
    title = f"{name} along {bound.label!r}, {of.kinds}{few}"
    return Picture(
        _text(title, ranks, before, after), _html(title, ranks, before, after)
    )


_Blocks: TypeAlias = list[list[_Block]]  # of each rank


def _run(
    function: Callable[..., Any],
    example: _Example,
    size: int,
    arguments: Mapping[str, Any],
    invariant: bool,
) -> tuple[_Blocks, _Blocks]:
    """The blocks of every rank before and after: each block is a unit vector, so that
    the result says what went in.
    """
    counts = [example.blocks(0 if invariant else index, size) for index in range(size)]
    starts = [0 if invariant else sum(counts[:index]) for index in range(size)]
    units = torch.eye(counts[0] if invariant else sum(counts), dtype=torch.float64)
    names = [
        (
            None if invariant else index,
            f"{'x' if invariant else chr(ord('a') + index)}{block}",
        )
        for index in range(1 if invariant else size)
        for block in range(counts[index])
    ]

    def main() -> tuple[Tensor, Tensor]:
        index = world.here().rank
        x = units[starts[index] : starts[index] + counts[index]]
        return x, function(x, _AXIS, **{**example.arguments(index, size), **arguments})

    pairs = simulate(main, **{_AXIS: size})
    before = [[_block(row, names, "") for row in x] for x, _ in pairs]
    return before, [[_block(row, names, example.word) for row in y] for _, y in pairs]


def _block(row: Tensor, names: list[tuple[int | None, str]], word: str) -> _Block:
    parts = [(names[i], float(row[i])) for i in row.nonzero().flatten().tolist()]
    if not parts:
        return _Block("0", None, "zeros")
    if len(parts) == 1 and not word:
        (source, text), _ = parts[0]
        return _Block(text, source, text)
    texts = [text for (_, text), _ in parts]
    number = texts[0][1:]
    of_all = texts == [
        text for _, text in names if text[1:] == number
    ]  # the block of every rank
    short = f"{word or 'Σ'}{' ' if word else ''}{number}" if of_all else "+".join(texts)
    return _Block(
        short, None, f"{word}({', '.join(texts)})" if word else " + ".join(texts)
    )


def _text(title: str, ranks: list[str], before: _Blocks, after: _Blocks) -> str:
    rows = [["", "before", "", "after"]]
    for rank, old, new in zip(ranks, before, after, strict=True):
        rows.append([rank, _blocks(old), "→", _blocks(new)])
    return "\n".join([title, table(rows)])


def _blocks(blocks: list[_Block]) -> str:
    return " ".join(block.text for block in blocks) or "nothing"


def _html(title: str, ranks: list[str], before: _Blocks, after: _Blocks) -> str:
    svg = Svg()
    height = LINE + 10
    width = max(letters(block.text) for row in [*before, *after] for block in row) + 12
    x0 = max(map(letters, ranks)) + 14
    x1 = x0 + width * max(map(len, before)) + _GAP
    svg.text(x0, LINE / 2 + 2, "before", bold=True)
    svg.text(x1, LINE / 2 + 2, "after", bold=True)
    for number, rank in enumerate(ranks):
        y = 4 + LINE + number * (height + 6)
        svg.text(4, y + height / 2, rank)
        svg.text(x1 - _GAP / 2, y + height / 2, "→", anchor="middle")
        for left, blocks in ((x0, before[number]), (x1, after[number])):
            for place, block in enumerate(blocks):
                svg.box(
                    left + place * width,
                    y,
                    width,
                    height,
                    _fill(block),
                    block.text,
                    block.tip,
                )
            if not blocks:
                svg.text(left, y + height / 2, "nothing")
    return svg.html(title)


def _fill(block: _Block) -> str:
    if block.text == "0":
        return "none"
    return "#d8d8d8" if block.source is None else colour(block.source)
