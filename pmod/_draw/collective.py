"""`draw_collective`: what each rank holds before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias, cast

import torch
from attrs import frozen
from torch import Tensor

from pmod._core.collective import COLLECTIVES, Collective
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

# ranks that are drawn, pixels between before and after, the axis that is simulated
_MOST = 8
_GAP = 40
_AXIS = "x"


def _nothing(index: int, size: int) -> dict[str, object]:
    return {}


@frozen
class _Example:
    """A collective on a small example, given a rank's index and how many there are."""

    # how many blocks the rank brings
    blocks: Callable[[int, int], int]
    arguments: Callable[[int, int], Mapping[str, object]] = _nothing
    # for a result that is made from several blocks and is not their sum
    word: str = ""
    # another collective, whose result is written the same
    drawn_as: str = ""


def _one(index: int, size: int) -> int:
    return 1


def _two(index: int, size: int) -> int:
    return 2


def _three(index: int, size: int) -> int:
    return 3


def _each(index: int, size: int) -> int:
    return size


def _ragged_sizes(size: int) -> list[int]:
    return [1 + rank % 3 for rank in range(size)]


def _own(index: int, size: int) -> int:
    return _ragged_sizes(size)[index]


def _all(index: int, size: int) -> int:
    return sum(_ragged_sizes(size))


def _sizes(index: int, size: int) -> dict[str, object]:
    return {"sizes": _ragged_sizes(size)}


def _to_next(index: int, size: int) -> dict[str, object]:
    return {"perm": [(rank, rank + 1) for rank in range(size - 1)]}


def _reversed(index: int, size: int) -> dict[str, object]:
    return {"perm": list(reversed(range(size)))}


def _transposed(index: int, size: int) -> dict[str, object]:
    return {"split_dim": 0, "concat_dim": 0}


def _uneven_sizes(index: int, size: int) -> list[int]:
    """Return what a rank sends to each: two blocks to itself and to the next rank."""
    sizes = [1] * size
    sizes[index] = sizes[(index + 1) % size] = 2
    return sizes


def _uneven(index: int, size: int) -> int:
    return sum(_uneven_sizes(index, size))


def _send_sizes(index: int, size: int) -> dict[str, object]:
    return {"send_sizes": _uneven_sizes(index, size)}


def _periodic(index: int, size: int) -> dict[str, object]:
    return {"width": 1, "boundary": "periodic"}


# of a collective that keeps a tensor's shape and needs no argument
_TWO = _Example(_two)
_EXAMPLES = {
    "pmean": _Example(_two, word="mean"),
    "pmax": _Example(_two, word="max"),
    # a minimum of unit vectors is 0, which does not say what went into it
    "pmin": _Example(_two, word="min", drawn_as="pmax"),
    "ppermute": _Example(_two, _to_next),
    "pshuffle": _Example(_two, _reversed),
    "all_gather": _Example(_one),
    "psum_scatter": _Example(_each),
    "shard": _Example(_each),
    "unshard": _Example(_one),
    "all_to_all": _Example(_each, _transposed),
    "gather": _Example(_one),
    "scatter": _Example(_each),
    "all_gather_v": _Example(_own, _sizes),
    "psum_scatter_v": _Example(_all, _sizes),
    "gather_v": _Example(_own, _sizes),
    "scatter_v": _Example(_all, _sizes),
    "all_to_all_v": _Example(_uneven, _send_sizes),
    "halo_exchange": _Example(_three, _periodic),
}
# no example can choose the arguments of the first; a block of the second is a sum of
# several ranks' own
_NOT_DRAWN = ("indexed_all_to_all_v", "halo_reduce")


def drawn() -> list[str]:
    """Return the names of the collectives that can be drawn."""
    return [name for name in COLLECTIVES if name not in _NOT_DRAWN]


class _Unit(NamedTuple):
    """A block that a rank brings, drawn by what is written on it."""

    text: str
    # the rank that brings it; None if all bring the same
    source: int | None


@frozen
class _Block:
    """One block of a tensor: what is written on it, whose it was, what it is made of."""

    text: str
    # None if several ranks share in it, or none
    source: int | None
    tip: str


_Blocks: TypeAlias = list[list[_Block]]
"""The blocks of each rank."""


def draw_collective(
    name: str,
    mesh: Mesh | None = None,
    axis: AxisLike | None = None,
    **arguments: object,
) -> Picture:
    """Draw what each rank along an axis holds before and after a collective.

    It is drawn by an example: `a0` is block 0 of the first rank. The collective is run,
    on threads of this process, so what is drawn is what it does. Nothing is sent.

    name: "psum", "all_to_all", ... mesh: the ambient one by default. axis: all axes of
    the mesh, flattened, by default.
    arguments: those of the collective, such as src=1 or perm=[1, 0]; the ones that are
    left out are chosen. Of a long axis the first 8 ranks are drawn, as if there were no
    others.

    Raises: AxisError for an unknown name, with the near miss; what the collective raises
    for wrong arguments.

    >>> pmod.draw_collective("all_gather", pmod.make_mesh(model=2, topology=pmod.Topology(rank=0, world_size=2)))
    all_gather along 'model', V -> V
                      before     after
    rank 0 (model=0)  a0      →  a0 b0
    rank 1 (model=1)  b0      →  a0 b0
    """
    known = drawn()
    if not isinstance(name, str) or name not in known:  # pyright: ignore[reportUnnecessaryIsInstance]
        given = f"no collective {quoted(name)} is drawn{near_miss(name, known)}"
        right = f"There are {', '.join(known)}."
        raise AxisError(phrase("draw_collective", given, right))
    of = COLLECTIVES[name]
    mesh = given_mesh(mesh, "draw_collective")
    _check_arguments(of, arguments)
    bound = mesh.bind(mesh.label if axis is None else axis, "draw_collective")
    size = min(bound.size, _MOST)
    before, after = _run(of, size, arguments)
    ranks: list[str] = []
    for rank in bound.ranks[:size]:
        ranks.append(f"rank {rank} {coordinates(mesh.coords_of(rank))}")
    title = f"{name} along {bound.label!r}, {of.kinds}"
    if size < bound.size:
        title += f", {size} of {bound.size:,} ranks"
    text = _text(title, ranks, before, after)
    return Picture(text, _html(title, ranks, before, after))


def _check_arguments(of: Collective, arguments: Mapping[str, object]) -> None:
    for argument in arguments:
        if argument not in of.arguments:
            miss = near_miss(argument, of.arguments)
            given = f"{of.name} has no argument {argument!r}{miss}"
            right = f"It has {', '.join(of.arguments) or 'none'}."
            raise ArgumentError(phrase("draw_collective", given, right))


def _run(
    of: Collective, size: int, arguments: Mapping[str, object]
) -> tuple[_Blocks, _Blocks]:
    """Return the blocks of every rank before and after.

    Each block is a unit vector, so that the result says what went into it.
    """
    example = _EXAMPLES.get(of.name, _TWO)
    function = COLLECTIVES[example.drawn_as or of.name].function
    units = [_units(of, example, index, size) for index in range(size)]
    # ranks that hold the same bring one set of unit vectors, not one each
    distinct = units[:1] if of.takes == "I" else units
    names = [unit for own in distinct for unit in own]
    vectors = torch.eye(len(names), dtype=torch.float64)

    def main() -> tuple[Tensor, Tensor]:
        index = world.here().rank
        first = names.index(units[index][0])
        x = vectors[first : first + len(units[index])]
        chosen = {**example.arguments(index, size), **arguments}
        return x, cast(Tensor, function(x, _AXIS, **chosen))

    before: _Blocks = []
    after: _Blocks = []
    for x, y in simulate(main, **{_AXIS: size}):
        before.append([_block(row, names, "") for row in x])
        after.append([_block(row, names, example.word) for row in y])
    return before, after


def _units(of: Collective, example: _Example, index: int, size: int) -> list[_Unit]:
    """Return the blocks that a rank brings: `a0`, `a1`, ... of the first rank."""
    if of.takes == "I":
        return [_Unit(f"x{block}", None) for block in range(example.blocks(0, size))]
    letter = chr(ord("a") + index)
    count = example.blocks(index, size)
    return [_Unit(f"{letter}{block}", index) for block in range(count)]


def _block(row: Tensor, names: list[_Unit], word: str) -> _Block:
    """Return the block that a row of a result is, from the unit vectors in it."""
    parts = [names[i] for i in row.nonzero().flatten().tolist()]
    if not parts:
        return _Block("0", None, "zeros")
    if len(parts) == 1 and not word:
        return _Block(parts[0].text, parts[0].source, parts[0].text)
    texts = [part.text for part in parts]
    number = texts[0][1:]
    of_all_ranks = [unit.text for unit in names if unit.text[1:] == number]
    short = "+".join(texts)
    if texts == of_all_ranks:
        short = f"{word} {number}" if word else f"Σ{number}"
    tip = f"{word}({', '.join(texts)})" if word else " + ".join(texts)
    return _Block(short, None, tip)


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
    # all boxes are equally wide, so that what moves can be followed
    texts = [block.text for blocks in [*before, *after] for block in blocks]
    width = max(map(letters, texts)) + 12
    x0 = max(map(letters, ranks)) + 14
    x1 = x0 + width * max(map(len, before)) + _GAP
    svg.text(x0, LINE / 2 + 2, "before", bold=True)
    svg.text(x1, LINE / 2 + 2, "after", bold=True)
    for number, rank in enumerate(ranks):
        y = 4 + LINE + number * (height + 6)
        svg.text(4, y + height / 2, rank)
        svg.text(x1 - _GAP / 2, y + height / 2, "→", anchor="middle")
        _boxes(svg, before[number], x0, y, width, height)
        _boxes(svg, after[number], x1, y, width, height)
    return svg.html(title)


def _boxes(
    svg: Svg, blocks: list[_Block], x: float, y: float, width: float, height: float
) -> None:
    """Draw the blocks of a rank, from x to the right."""
    if not blocks:
        svg.text(x, y + height / 2, "nothing")
    for block in blocks:
        svg.box(x, y, width, height, _fill(block), block.text, block.tip)
        x += width


def _fill(block: _Block) -> str:
    if block.text == "0":
        return "none"
    return "#d8d8d8" if block.source is None else colour(block.source)
