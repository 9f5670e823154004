"""The rank that goes ahead."""

from __future__ import annotations

from pathlib import Path

import pytest

import pmod
from tests.lib import spmd


def firsts() -> list[bool]:
    mesh = pmod.current_mesh()
    return [pmod.is_first(), pmod.is_first("a"), pmod.is_first("b"), pmod.is_first(mesh["a"]),
            pmod.is_first(("b", "a")), pmod.is_first(per_node=True)]  # fmt: skip


def test_who_is_first() -> None:
    assert pmod.simulate(firsts, a=2, b=2) == [
        [True] * 6,
        [False, True, False, True, False, False],
        [False, False, True, False, False, False],
        [False] * 6,
    ]


def test_the_first_of_each_node() -> None:
    found = []
    for rank in range(6):
        place = pmod.Topology(rank=rank, world_size=6, num_nodes=2)
        with pmod.set_mesh(pmod.make_mesh(data=6, topology=place)):
            found.append((pmod.is_first(), pmod.is_first(per_node=True)))
    assert found == [(True, True), (False, False), (False, False), (False, True), (False, False), (False, False)]


def ahead(folder: Path, axis: str | None) -> list[str]:
    with pmod.first_rank_first(axis):
        before = sorted(path.name for path in folder.iterdir())
        (folder / f"rank{pmod.current_mesh().topology.rank}").touch()
    pmod.barrier(("a", "b"))
    return before


@pytest.mark.parametrize("run", [pmod.simulate, spmd.launch], ids=["threads", "processes"])
def test_one_goes_ahead(tmp_path: Path, run: object) -> None:
    found = run(ahead, tmp_path, None, a=2, b=2)  # type: ignore[operator]
    assert found[0] == [] and all("rank0" in before for before in found[1:])


def test_one_goes_ahead_along_an_axis(tmp_path: Path) -> None:
    found = pmod.simulate(ahead, tmp_path, "b", a=2, b=2)
    assert "rank0" not in found[0] and "rank0" in found[1] and "rank2" in found[3]


def failing() -> str:
    with pytest.raises((OSError, pmod.PmodError)) as caught, pmod.first_rank_first():
        raise OSError("no space left, " + "x" * 1000)
    pmod.barrier("data")
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("run", [pmod.simulate, spmd.launch], ids=["threads", "processes"])
def test_a_failure_ahead_raises_on_all(run: object) -> None:
    leader, *others = run(failing, data=3)  # type: ignore[operator]
    assert leader.startswith("OSError: no space left, ")
    for text in others:
        given = "the rank (data=0) that went ahead raised OSError: no space left"
        assert text.startswith(f"PmodError: pmod.first_rank_first: {given}")


def test_alone() -> None:
    with pmod.set_mesh(pmod.make_mesh(data=1)):
        with pmod.first_rank_first():
            pass
        with pytest.raises(ZeroDivisionError), pmod.first_rank_first(per_node=True):
            _ = 1 / 0
