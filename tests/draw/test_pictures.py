"""Pictures of tensors and collectives: the exact text, and of the SVG what an eye would miss: overflow and contrast."""

from __future__ import annotations

import colorsys
import re
import xml.etree.ElementTree as ET
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pmod
from pmod._core.collective import COLLECTIVES
from pmod._draw import collective
from pmod._draw.svg import FONT, Picture
from pmod._mesh.picture import mesh_html
from tests.lib.table import CASES

NAME = "{http://www.w3.org/2000/svg}"


def mesh_of(node: int | None = None, **sizes: int) -> pmod.Mesh:
    size = torch.Size(sizes.values()).numel()
    return pmod.make_mesh(sizes, topology=pmod.Topology(rank=0, world_size=size, local_world_size=node or size))


def brightness(colour: str) -> float:
    """The relative luminance of WCAG 2."""
    if colour.startswith("#"):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        rgb = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    else:
        hue, saturation, light = map(float, re.findall(r"[\d.]+", colour))
        rgb = list(colorsys.hls_to_rgb(hue / 360, light / 100, saturation / 100))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((brightness(one), brightness(other)))
    return (high + 0.05) / (low + 0.05)


Rectangle = tuple[float, float, float, float]


def corners(rectangle: ET.Element) -> Rectangle:
    x, y, width, height = (float(rectangle.attrib[name]) for name in ("x", "y", "width", "height"))
    assert width > 0 and height > 0
    return x, y, x + width, y + height


def around(text: ET.Element) -> Rectangle:
    """What a text takes up: no monospaced font in use is wider than 0.62 of its height."""
    width, x, y = 0.62 * FONT * len(text.text or ""), float(text.attrib["x"]), float(text.attrib["y"])
    left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[text.attrib["text-anchor"]] * width
    return left, y - FONT / 2, left + width, y + FONT / 2


def inside(one: Rectangle, other: Rectangle) -> bool:
    return one[0] >= other[0] and one[1] >= other[1] and one[2] <= other[2] and one[3] <= other[3]


def check(picture: Picture) -> ET.Element:
    """Nothing overflows or overlaps, letters can be read on their box and on any page; what is in the text is drawn."""
    page = ET.fromstring(picture.html)
    svg = page.find(f"{NAME}svg")
    assert svg is not None and picture._repr_html_() is picture.html and repr(picture) == picture.text
    whole = (0.0, 0.0, float(svg.attrib["width"]), float(svg.attrib["height"]))
    boxes = [e for e in svg.findall(f"{NAME}rect") if not e.attrib["fill"].startswith("url")]
    texts = svg.findall(f"{NAME}text")
    for element in boxes:
        assert inside(corners(element), whole)
    taken: list[Rectangle] = []
    for text in texts:
        here = around(text)
        assert inside(here, whole), text.text
        assert not any(meet(here, other) for other in taken), f"{text.text!r} is written over another text"
        taken.append(here)
        under = [box for box in boxes if meet(here, corners(box))]
        assert len(under) <= 1 and all(inside(here, corners(box)) for box in under), f"{text.text!r} leaves its box"
        fill = under[0].attrib["fill"] if under else "none"
        if fill == "none":  # on the page, whose colours the theme chooses
            assert text.attrib["fill"] == "currentColor"
        else:
            assert contrast(text.attrib["fill"], fill) >= 7, (text.text, fill)
    assert "<script" not in picture.html and picture.html.count("http") == 1, "the name of SVG, and no address"
    assert page.findtext("div") == picture.text.splitlines()[0]
    return svg


def meet(one: Rectangle, other: Rectangle) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def shown_texts(svg: ET.Element) -> list[str]:
    return [text.text or "" for text in svg.findall(f"{NAME}text")]


# --- tensors --------------------------------------------------------------------------------------------------------

GRID = mesh_of(4, data=2, model=4)

TENSORS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "1-D, uneven, with copies": (
        ((10,), ("model",), GRID), {},
        """\
(10,) by P('model') on data=2, model=4: shards of (3,) to (1,), each on 2 ranks
      0:3  3:6  6:9  9:10
rank  0 4  1 5  2 6  3 7"""),
    "2-D, with halos": (
        ((10, 12), ("data", "model"), GRID), {"halo": 1},
        """\
(10, 12) by P('data', 'model') on data=2, model=4: shards of (5, 3)
      0:3  3:6  6:9  9:12
0:5   0    1    2    3
5:10  4    5    6    7
and of the neighbours' 1 before and 1 after along dim 0, 1 before and 1 after along dim 1"""),
    "3-D, one width a dim": (
        ((6, 9, 10), ("data", None, "model"), GRID), {"halo": {0: 1, 2: (0, 2)}},
        """\
(6, 9, 10) by P('data', None, 'model') on data=2, model=4: shards of (3, 9, 3) to (3, 9, 1)
x[0:3]  0:3  3:6  6:9  9:10
0:9     0    1    2    3
x[3:6]  0:3  3:6  6:9  9:10
0:9     4    5    6    7
and of the neighbours' 1 before and 1 after along dim 0, 0 before and 2 after along dim 2"""),
    "flattened axes, last ranks empty": (
        ((9,), (("model", "data"),), GRID), {},
        """\
(9,) by P(('model', 'data')) on data=2, model=4: shards of (2,) to (0,)
      0:2  2:3  3:5  5:6  6:8  8:9
rank  0    4    1    5    2    6
nothing on ranks 3 7"""),
    "not cut": (
        ((3, 2), (), GRID), {},
        """\
(3, 2) by P() on data=2, model=4: all of it on 8 ranks
     0:2
0:3  0 1 2 .."""),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(name: str) -> None:
    args, halo, text = TENSORS[name]
    picture = pmod.draw(*args, **halo)
    assert picture.text == text
    drawn = set(shown_texts(check(picture)))
    cells = {cell for line in text.splitlines()[1:] for cell in re.split(r"  +", line) if not line[0].isalpha()}
    assert cells - {""} <= drawn


def test_a_tensor_or_its_shape_and_the_ambient_mesh() -> None:
    with pmod.set_mesh(GRID):
        assert pmod.draw(torch.zeros(4, 8), (None, "model")).text == pmod.draw((4, 8), (None, "model"), GRID).text


def test_the_picture_says_what_shard_does() -> None:
    """Every box's tip names the slice and the ranks that hold it, against shard on simulated ranks."""
    def main() -> dict[int, tuple[int, ...]]:
        x = pmod.shard(pmod.shard(torch.arange(35).reshape(5, 7), ("b", "a")), "c", dim=1)
        return {pmod.current_mesh().topology.rank: tuple(x.flatten().tolist())}

    held = {rank: x for part in pmod.simulate(main, a=2, b=2, c=3) for rank, x in part.items() if x}
    svg = check(pmod.draw((5, 7), (("b", "a"), "c"), mesh_of(a=2, b=2, c=3)))
    drawn: dict[int, tuple[int, ...]] = {}
    for tip in svg.findall(f"{NAME}rect/{NAME}title"):
        match = re.fullmatch(r"x\[(\d):(\d), (\d):(\d)\] on rank (\d+) \(.*\)", tip.text or "")
        assert match, tip.text
        a, b, c, d, rank = map(int, match.groups())
        drawn[rank] = tuple(7 * i + j for i, j in product(range(a, b), range(c, d)))
    assert drawn == held


def test_halos_are_hatched_on_both_sides_of_a_cut() -> None:
    svg = check(pmod.draw((8, 5), ("model", None), mesh_of(model=2), halo=(1, 2)))
    (hatched,) = [corners(e) for e in svg.findall(f"{NAME}rect") if e.attrib["fill"].startswith("url(#hatch-")]
    boxes = [corners(e) for e in svg.findall(f"{NAME}rect") if e.attrib["fill"].startswith("hsl")]
    cut, row = boxes[0][3], (boxes[0][3] - boxes[0][1]) / 4
    assert hatched == pytest.approx((boxes[0][0], cut - 1 * row, boxes[0][2], cut + 2 * row), abs=0.2)
    name = svg.findall(f"{NAME}defs/{NAME}pattern")[0].attrib["id"]
    assert f"url(#{name})" in ET.tostring(svg, encoding="unicode")
    other = pmod.draw((8, 5), ("model", None), mesh_of(model=2), halo=1)
    assert name not in other.html, "two pictures on one page share no names"


def test_a_halo_wider_than_a_shard_ends_with_it() -> None:
    svg = check(pmod.draw((4,), ("model",), mesh_of(model=4), halo=3))
    boxes = [corners(e) for e in svg.findall(f"{NAME}rect") if e.attrib["fill"].startswith("hsl")]
    for hatched in [corners(e) for e in svg.findall(f"{NAME}rect") if e.attrib["fill"].startswith("url")]:
        assert hatched[0] >= boxes[0][0] - 0.1 and hatched[2] <= boxes[-1][2] + 0.1


def test_panels_name_their_halo() -> None:
    picture = pmod.draw((6, 2, 2), ("data",), mesh_of(data=3), halo=1)
    texts = shown_texts(check(picture))
    assert {f"x[{a}] with its halo x[{b}]" for a, b in (("0:2", "0:3"), ("2:4", "1:5"), ("4:6", "3:6"))} <= set(texts)
    assert not any(text.startswith("hatched") for text in texts), "nothing is"


def test_large_meshes_are_cut_short() -> None:
    mesh = mesh_of(node=8, data=512, seq=32, model=8)
    picture = pmod.draw((4096, 640, 4096), ("data", "seq", "model"), mesh)
    assert len(picture.text.splitlines()) < 150 and "..." in picture.text and len(picture.html) < 400_000
    check(pmod.draw((4096, 4096), (("data", "seq"), "model"), mesh))
    check(pmod.draw((131072,), (("data", "seq", "model"),), mesh))
    assert "131071" in pmod.draw((131072,), (("data", "seq", "model"),), mesh).text


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_nothing_overflows(data: st.DataObject) -> None:
    names = ("data", "model", "a_rather_long_name")
    mesh = mesh_of(**{name: data.draw(st.integers(1, 5)) for name in names})
    shape = data.draw(st.lists(st.integers(0, 40) | st.just(100_000), min_size=1, max_size=3))
    free = data.draw(st.permutations(names))
    spec = [free[i] if data.draw(st.booleans()) else None for i in range(len(shape))]
    check(pmod.draw(shape, spec, mesh, halo=data.draw(st.integers(0, 3))))


def test_other_sizes_than_even_ones() -> None:
    text = pmod.draw((5, 2), pmod.P("model", sizes={0: (4, 0, 1, 0)}), mesh_of(model=4)).text
    assert text.splitlines()[1:] == ["     0:2", "0:4  0", "4:5  2", "nothing on ranks 1 3"]
    with pytest.raises(pmod.ShapeError, match=r"sizes of dim 0 are \(4, 2\), and x.shape\[0\] is 5, in 2 parts"):
        pmod.draw((5, 2), pmod.P("model", sizes={0: (4, 2)}), mesh_of(model=2))


WRONG: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (((2, 2, 2, 2), ()), {}, pmod.ShapeError, r"x has 4 dims, \(2, 2, 2, 2\)"),
    (((), ()), {}, pmod.ShapeError, "x has 0 dims"),
    ((3, ()), {}, pmod.ArgumentError, "x is a int"),
    (((2,), ("data", None)), {}, pmod.ShapeError, "spec has 2 entries, and x has 1 dims"),
    (((2,), ("modle",)), {}, pmod.AxisError, "no axis 'modle'; did you mean 'model'"),
    (((2, 2), ("data", "data")), {}, pmod.AxisError, "names the axis 'data' twice"),
    (((2,), ("data",)), {"halo": -1}, pmod.ShapeError, "halo is -1"),
]


@pytest.mark.parametrize(("args", "more", "kind", "message"), WRONG)
def test_wrong_arguments(args: tuple[Any, ...], more: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        pmod.draw(*args, GRID, **more)


# --- collectives ----------------------------------------------------------------------------------------------------

BEFORE_AFTER = {
    "psum": ("a0 a1 | b0 b1 | c0 c1", "Σ0 Σ1 | Σ0 Σ1 | Σ0 Σ1"),
    "pmean": ("a0 a1 | b0 b1 | c0 c1", "mean 0 mean 1 | mean 0 mean 1 | mean 0 mean 1"),
    "pmin": ("a0 a1 | b0 b1 | c0 c1", "min 0 min 1 | min 0 min 1 | min 0 min 1"),
    "pick": ("a0 a1 | b0 b1 | c0 c1", "a0 a1 | a0 a1 | a0 a1"),
    "place": ("x0 x1 | x0 x1 | x0 x1", "x0 x1 | 0 0 | 0 0"),
    "reduce": ("a0 a1 | b0 b1 | c0 c1", "Σ0 Σ1 | 0 0 | 0 0"),
    "ppermute": ("a0 a1 | b0 b1 | c0 c1", "0 0 | a0 a1 | b0 b1"),
    "psum_scatter": ("a0 a1 a2 | b0 b1 b2 | c0 c1 c2", "Σ0 | Σ1 | Σ2"),
    "shard": ("x0 x1 x2 | x0 x1 x2 | x0 x1 x2", "x0 | x1 | x2"),
    "all_to_all": ("a0 a1 a2 | b0 b1 b2 | c0 c1 c2", "a0 b0 c0 | a1 b1 c1 | a2 b2 c2"),
    "gather": ("a0 | b0 | c0", "a0 b0 c0 | nothing | nothing"),
    "all_gather_v": ("a0 | b0 b1 | c0 c1 c2", " | ".join(3 * ["a0 b0 b1 c0 c1 c2"])),
    "halo_exchange": ("a0 a1 a2 | b0 b1 b2 | c0 c1 c2", "c2 a0 a1 a2 b0 | a2 b0 b1 b2 c0 | b2 c0 c1 c2 a0"),
}


@pytest.mark.parametrize("name", BEFORE_AFTER)
def test_before_and_after(name: str) -> None:
    picture = pmod.draw_collective(name, mesh_of(x=3))
    rows = [re.split(r"  +", line.replace("→", "  ")) for line in picture.text.splitlines()[2:]]
    assert [row[0] for row in rows] == [f"rank {rank} (x={rank})" for rank in range(3)]
    before, after = (" | ".join(row[i].strip() for row in rows) for i in (1, 2))
    assert (before, after) == BEFORE_AFTER[name]


@pytest.mark.parametrize("name", collective.drawn())
def test_every_collective_is_drawn(name: str) -> None:
    picture = pmod.draw_collective(name, GRID, "model")
    kinds = ("V", "V") if name == "halo_exchange" else (CASES[name].takes, CASES[name].gives)
    assert picture.text.startswith(f"{name} along 'model', {' -> '.join(kinds)}\n")
    drawn = shown_texts(check(picture))
    blocks = picture.text.split("after\n")[1]
    assert {text for text in drawn if re.fullmatch(r"[a-dxΣ]\d", text)} == set(re.findall(r"[a-dxΣ]\d", blocks))
    assert len(picture.text.splitlines()) == 2 + 4 and all(f"rank {rank} " in blocks for rank in range(4))


def test_collectives_without_a_picture() -> None:
    """Those whose arguments no example can choose."""
    assert set(COLLECTIVES) - set(collective.drawn()) == {"indexed_all_to_all_v", "halo_reduce"}


def test_colours_follow_the_blocks() -> None:
    svg = check(pmod.draw_collective("all_to_all", mesh_of(x=3)))
    fills = {}
    for box in svg.findall(f"{NAME}rect"):
        tip = box.findtext(f"{NAME}title") or ""
        fills.setdefault(tip[0], set()).add(box.attrib["fill"])
    assert [len(fills[letter]) for letter in "abc"] == [1, 1, 1] and len(set.union(*fills.values())) == 3


def test_arguments_go_to_the_collective() -> None:
    mesh = mesh_of(x=2)
    assert "a0 a1\nrank 1 (x=1)  b0 b1   →  a0 a1" in pmod.draw_collective("pick", mesh).text
    assert "b0 b1\nrank 1 (x=1)  b0 b1   →  b0 b1" in pmod.draw_collective("pick", mesh, src=1).text
    with pytest.raises(pmod.AxisError, match="src"):
        pmod.draw_collective("pick", mesh, src=2)
    with pytest.raises(pmod.AxisError, match="no collective 'all_to_al' is drawn; did you mean 'all_to_all'"):
        pmod.draw_collective("all_to_al", mesh)


def test_of_a_long_axis_eight_ranks_are_drawn() -> None:
    picture = pmod.draw_collective("all_to_all", mesh_of(node=8, data=64, model=2), "data")
    assert picture.text.startswith("all_to_all along 'data', V -> V, 8 of 64 ranks\n")
    assert len(picture.text.splitlines()) == 2 + 8 and "rank 14 (data=7, model=0)" in picture.text
    check(picture)
    assert pmod.draw_collective("psum", GRID).text.startswith("psum along ('data', 'model'), V -> I\n")


# --- meshes ---------------------------------------------------------------------------------------------------------


def test_meshes_can_be_read_in_either_theme() -> None:
    page = ET.fromstring(mesh_html(tuple("abcdefg"), (2,) * 7, lambda place: sum(place), coords=(0,) * 7, node_of=int))
    coloured = [e.attrib["style"] for e in page.iter() if "background" in e.attrib.get("style", "")]
    assert len(coloured) > 14
    for style in coloured:
        colours = dict(part.split(": ") for part in style.split("; "))
        assert contrast(colours["color"], colours["background"]) >= 7, style


def test_axes_have_colours_of_their_own() -> None:
    page = ET.fromstring(GRID._repr_html_())
    backgrounds: dict[str, set[str]] = {}
    for head in page.findall(".//th"):
        backgrounds.setdefault(head.attrib["style"], set()).add(head.text or "")
    assert list(backgrounds.values()) == [{"data", "0", "1"}, {f"model\xa0{index}" for index in range(4)}]
