"""Pictures of meshes: the exact text, bounds for huge meshes, HTML that parses and escapes."""

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmod._mesh.picture import mesh_html, mesh_text


def c_order(sizes: tuple[int, ...]) -> Callable[[tuple[int, ...]], int]:
    def rank_at(place: tuple[int, ...]) -> int:
        rank = 0
        for size, index in zip(sizes, place, strict=True):
            assert 0 <= index < size
            rank = rank * size + index
        return rank

    return rank_at


def nodes(size: int) -> Callable[[int], int]:
    return lambda rank: rank // size


PICTURES = {
    "1-D": (
        ("data",), (4,), (2,), None,
        """\
Mesh(data=4): 4 ranks, this one at (data=2)
data  0  1  2  3
rank  0  1 [2] 3"""),
    "1-D over nodes": (
        ("data",), (8,), (3,), nodes(4),
        """\
Mesh(data=8): 8 ranks, this one at (data=3)
data  0  1  2  3  4  5  6  7
rank  0  1  2 [3]|4  5  6  7   nodes 0, 1"""),
    "2-D, one node": (
        ("data", "model"), (2, 4), (0, 2), nodes(8),
        """\
Mesh(data=2, model=4): 8 ranks, this one at (data=0, model=2)
data  model 0  1  2  3
   0        0  1 [2] 3
   1        4  5  6  7"""),
    "2-D, an axis across nodes": (
        ("model", "data"), (2, 3), (1, 0), nodes(2),
        """\
Mesh(model=2, data=3): 6 ranks, this one at (model=1, data=0)
model  data 0  1  2
    0       0  1 |2   nodes 0, 1
    1      [3]|4  5   nodes 1, 2"""),
    "3-D, this rank outside": (
        ("pipe", "data", "model"), (2, 2, 2), None, nodes(4),
        """\
Mesh(pipe=2, data=2, model=2): 8 ranks, this one outside
pipe  data  model 0  1
   0     0        0  1   node 0
         1        2  3   node 0
   1     0        4  5   node 1
         1        6  7   node 1"""),
    "4-D": (
        ("pipe", "data", "seq", "model"), (2, 1, 2, 3), (1, 0, 0, 2), None,
        """\
Mesh(pipe=2, data=1, seq=2, model=3): 12 ranks, this one at (pipe=1, data=0, seq=0, model=2)
pipe  data  seq  model  0   1   2
   0     0    0         0   1   2
              1         3   4   5
   1     0    0         6   7  [8]
              1         9  10  11"""),
    "one rank": (("data",), (1,), (0,), nodes(1), "Mesh(data=1): 1 rank, this one at (data=0)\ndata  0\nrank [0]"),
    "no axis": ((), (), (), None, "Mesh(): 1 rank"),
    "a long axis": (
        ("data",), (131072,), (5000,), nodes(8),
        """\
Mesh(data=131072): 131,072 ranks, this one at (data=5000)
data       0       1       2     ...    5000     ...  131069  131070  131071
rank       0       1       2     ... | [5000]    ... |131069  131070  131071   nodes 0 to 16383"""),
    "many rows": (
        ("data", "model"), (16384, 2), (777, 1), nodes(8),
        """\
Mesh(data=16384, model=2): 32,768 ranks, this one at (data=777, model=1)
 data  model     0      1
    0            0      1   node 0
    1            2      3   node 0
    2            4      5   node 0
    3            6      7   node 0
    4            8      9   node 1
    5           10     11   node 1
    6           12     13   node 1
               ...
  777         1554  [1555]  node 194
               ...
16378        32756  32757   node 4094
16379        32758  32759   node 4094
16380        32760  32761   node 4095
16381        32762  32763   node 4095
16382        32764  32765   node 4095
16383        32766  32767   node 4095"""),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_the_text(name: str) -> None:
    names, sizes, coords, node_of, text = PICTURES[name]
    assert mesh_text(names, sizes, c_order(sizes), coords=coords, node_of=node_of) == text


def test_ranks_need_not_count_from_zero() -> None:
    text = mesh_text(("data",), (3,), lambda place: (7, 3, 12)[place[0]], coords=(1,))
    assert text.splitlines()[1:] == ["data   0   1   2", "rank   7  [3] 12"]


HUGE = [
    (("data", "model"), (16384, 8), (777, 3)),
    (("data",), (131072,), (131071,)),
    (("pipe", "data", "model"), (64, 32, 64), (33, 3, 9)),
    (("pipe", "data", "seq", "model"), (16, 16, 16, 32), None),
    (tuple("abcdefgh"), (4,) * 8, (3,) * 8),
    (tuple(letter * 30 for letter in "abcdefgh"), (4,) * 8, (0,) * 8),
    (("x" * 200, "y" * 200), (300, 300), (150, 150)),
]


@pytest.mark.parametrize(("names", "sizes", "coords"), HUGE)
def test_huge_meshes_stay_small_and_cheap(
    names: tuple[str, ...], sizes: tuple[int, ...], coords: tuple[int, ...] | None
) -> None:
    asked = 0

    def rank_at(place: tuple[int, ...]) -> int:
        nonlocal asked
        asked += 1
        return c_order(sizes)(place)

    lines = mesh_text(names, sizes, rank_at, coords=coords, node_of=nodes(8)).splitlines()
    assert len(lines) <= 20 and max(map(len, lines)) <= 100
    here = coords and f"[{c_order(sizes)(coords)}]"
    assert sum(line.count("[") for line in lines) == (0 if here is None else 1)
    assert here is None or any(here in line for line in lines)
    assert asked < 4000
    asked = 0
    page = mesh_html(names, sizes, rank_at, coords=coords, node_of=nodes(8))
    assert len(ET.fromstring(page).findall(".//tr")) <= 20
    assert asked < 400 and len(page) < 150_000


@given(st.data())
@settings(deadline=None)
def test_every_mesh_shows_this_rank_and_both_ends(data: st.DataObject) -> None:
    sizes = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4), label="sizes"))
    coords = tuple(data.draw(st.integers(0, size - 1)) for size in sizes)
    names = tuple("abcd"[: len(sizes)])
    lines = mesh_text(names, sizes, c_order(sizes), coords=coords, node_of=nodes(3)).splitlines()
    assert len(lines) <= 20 and max(map(len, lines)) <= 100
    ranks = {int(number) for line in lines[2:] for number in re.findall(r"\d+", line)}
    assert {0, math.prod(sizes) - 1, c_order(sizes)(coords)} <= ranks
    cells = ET.fromstring(mesh_html(names, sizes, c_order(sizes), coords=coords)).findall(".//td[@title]")
    assert {"0", str(math.prod(sizes) - 1)} <= {cell.text for cell in cells}
    (framed,) = [cell.text for cell in cells if "bold" in cell.attrib["style"]]
    assert framed == str(c_order(sizes)(coords))


def test_html_is_coloured_by_node() -> None:
    page = ET.fromstring(mesh_html(("data", "model"), (2, 4), c_order((2, 4)), coords=(0, 2), node_of=nodes(4)))
    cells = page.findall(".//td")
    assert [cell.text for cell in cells] == [str(rank) for rank in range(8)]
    colours = [cell.attrib["style"].split("; border")[0] for cell in cells]
    assert len(set(colours[:4])) == len(set(colours[4:])) == 1 and colours[0] != colours[4]
    assert cells[2].attrib["title"] == "rank 2 at (data=0, model=2), node 0"
    assert [head.text for head in page.findall(".//tr[1]/th")] == ["data", *(f"model\xa0{index}" for index in range(4))]
    assert [chip.text for chip in page.findall(".//span")] == ["node 0", "node 1"]
    assert page.findtext("div") == "Mesh(data=2, model=4): 8 ranks, this one at (data=0, model=2)"


def test_html_needs_no_legend_for_one_node() -> None:
    page = ET.fromstring(mesh_html(("data",), (4,), c_order((4,)), node_of=nodes(4)))
    assert page.findall(".//span") == []
    assert ET.fromstring(mesh_html((), (), c_order(()))).findtext("div") == "Mesh(): 1 rank"


def test_html_leaves_out_the_middle() -> None:
    page = ET.fromstring(mesh_html(("data", "model"), (40, 40), c_order((40, 40)), coords=(0, 0)))
    rows = page.findall(".//tr")
    assert [len(row) for row in rows] == [1 + 16] * (1 + 14)  # a gap takes the place of one row, and of one column
    assert {cell.text for row in rows for cell in row if cell.tag == "td" and not cell.attrib} == {"\u2026", "\u22ee"}


def test_html_escapes_names_and_runs_nothing() -> None:
    name = "<script>alert('&\"')</script>"
    text = mesh_html((name, "b"), (2, 2), c_order((2, 2)), coords=(0, 0), node_of=nodes(2))
    page = ET.fromstring(text)
    assert "<script" not in text
    assert page.findtext("div") == f"Mesh({name}=2, b=2): 4 ranks, this one at ({name}=0, b=0)"
    assert page.findtext(".//tr[1]/th[1]") == name
    assert page.find(".//td").attrib["title"] == f"rank 0 at ({name}=0, b=0), node 0"  # type: ignore[union-attr]


def test_html_sets_text_and_background_together() -> None:
    text = mesh_html(("data",), (40,), c_order((40,)), coords=(3,), node_of=nodes(4))
    styles = [element.attrib.get("style", "") for element in ET.fromstring(text).iter()]
    declared = [{part.split(":")[0].strip() for part in style.split(";")} for style in styles]
    assert any("color" in one for one in declared)
    assert all(("color" in one) == ("background" in one) for one in declared)
