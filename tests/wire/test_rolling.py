"""Unlike calls where messages have no tags, as on NCCL: they meet, and the ranks hear of it soon after.

gloo's messages get one and the same tag here, so that they pair up in order, whatever they are, as NCCL's do.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any

import attrs
import pytest
import torch

import pmod
from pmod._mesh.ambient import resolve
from pmod._ranks import backends, world
from pmod._wire import gloo, rolling, waiting
from pmod._wire.board import Said
from pmod._wire.rolling import (
    MARK,
    SHOWN,
    Calls,
    Told,
    Witness,
    as_text,
    first_unlike,
    of_text,
)
from tests.lib import spmd


@contextmanager
def without_tags() -> Generator[None]:
    """A world of its own, whose calls nothing but a thread compares."""
    before = pmod.current_mesh()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rolling, "LOOK", 0.05)
        patch.setattr(waiting, "LOOK", 0.2)  # where one rank has heard of it, and another still waits for its message
        patch.setitem(backends._BACKENDS, "gloo", attrs.evolve(gloo.GLOO, tags=False))
        patch.setattr(waiting.Wait, "tag", lambda wait, stage, nbytes: gloo.TAG)
        pmod.shutdown()
        pmod.set_mesh(pmod.make_mesh(x=-1, topology=before.topology))
        yield
        pmod.shutdown()
    pmod.set_mesh(pmod.make_mesh(dict(before.shape), topology=before.topology))
    assert pmod.psum(torch.tensor(1), "x").item() == before.topology.world_size


def odd(other: Any, usual: Any) -> Any:
    """What the last rank passes, and what the others do."""
    return other if pmod.axis_index("x") == pmod.axis_size("x") - 1 else usual


UNLIKE: dict[str, tuple[Callable[[], Any], str, str]] = {
    "shapes": (lambda: pmod.psum(torch.ones(*odd((2, 3), (3, 2))), "x"), "(2, 3) float32 in psum", "(3, 2) float32"),
    "functions": (lambda: odd(pmod.pmax, pmod.psum)(torch.ones(4), "x"), "in extremum", "in psum"),
    "both from a root": (lambda: odd(pmod.broadcast, pmod.pick)(torch.ones(4), "x"), "in broadcast", "in pick"),
    "dtypes": (lambda: pmod.psum(torch.ones(4, dtype=odd(torch.int32, torch.float32)), "x"), "int32", "float32"),
}


def heard_of(name: str, before: int, after: int) -> str:
    """What a rank hears of an unlike call that came between alike ones, in a call of its own some time later."""
    with without_tags():
        for _ in range(before):
            pmod.psum(torch.ones(2), "x")
        with pytest.raises(pmod.MismatchError) as caught:
            UNLIKE[name][0]()
            for _ in range(after):
                pmod.pshift(torch.ones(2), "x")
            until = monotonic() + 50.0
            while monotonic() < until:  # as a call asks, sending nothing
                world.witness(Witness).check(resolve("x", "probe"), Said("probe", 0))
                sleep(0.02)
        with pytest.raises(pmod.MismatchError):  # from now on
            pmod.psum(torch.ones(2), "x")
        return str(caught.value)


@pytest.mark.parametrize("n", [2, 3])
def test_unlike_calls_are_named(n: int) -> None:
    for name, (_, other, usual) in UNLIKE.items():
        for rank, text in enumerate(spmd.launch(heard_of, name, 3, 2, x=n)):
            assert f"at (x={rank})" in text and "call 4 along this axis" in text, (name, text)
            assert other in text and usual in text and "void" in text, (name, text)


def test_unlike_calls_long_ago() -> None:
    """When a rank looks, the call is no more among those that it tells one by one."""
    for text in spmd.launch(heard_of, "shapes", 3, 2 * MARK, x=2):
        assert "one of their calls" in text or "call 4 along" in text, text
        assert "unlike calls" in text


def alike(calls: int) -> float:
    """Right calls, with ranks that are ahead of one another."""
    with without_tags():
        total = 0.0
        for i in range(calls):
            if i % 100 == 0:
                sleep(0.1 * pmod.axis_index("x"))
            total += pmod.pshift(torch.ones(2), "x").sum().item()
        pmod.psum(torch.ones(3), "x")
        sleep(0.3)
        return pmod.psum(torch.tensor(total), "x").item()


def test_right_calls_pass() -> None:
    assert spmd.launch(alike, 400, x=3) == [2400.0] * 3


# --- what two ranks tell ------------------------------------------------------------------------------------------


def calls(count: int, odd_one: int = 0) -> list[Told]:
    spoken = Calls(resolve(pmod.make_mesh(x=1), "calls"))
    for number in range(1, count + 1):
        spoken.add(number, Said("psum", 7 + (number == odd_one)))
    return spoken.told()


def test_first_unlike() -> None:
    assert first_unlike(calls(40), calls(40)) is None
    assert first_unlike(calls(40), calls(60)) is None
    assert first_unlike(calls(3), calls(3 + SHOWN)) is None  # nothing that both tell
    found = first_unlike(calls(40), calls(50, odd_one=33))
    assert found is not None and found[0] == 32 and found[1].number == found[2].number == 33
    found = first_unlike(calls(2 * MARK), calls(3 * MARK, odd_one=5))  # told by the marks
    assert found is not None and found[0] == 0 and found[1].number == MARK
    assert of_text(as_text(calls(40))) == calls(40) and of_text("") == []
