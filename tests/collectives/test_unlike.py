"""Ranks that make unlike calls: an error on every rank within seconds, and never what nobody sent."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import pmod
from pmod._wire import waiting
from pmod._wire.board import LEFT, WAITS, Post, unlike
from pmod._wire.waiting import NEAR
from tests.lib import spmd

ROOT = Path(pmod.__file__).parents[1]
Tensor = torch.Tensor


def odd(other: Any, usual: Any) -> Any:
    """What the last rank passes, and what the others do."""
    return other if pmod.axis_index("x") == pmod.axis_size("x") - 1 else usual


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape)


def ring() -> list[tuple[int, int]]:
    n = pmod.axis_size("x")
    return [(i, (i + 1) % n) for i in range(n)]


def each(count: int) -> list[int]:
    return [count] * pmod.axis_size("x")


def summed_in_backward() -> None:
    pmod.pvary(ones(4).requires_grad_(), "x").sum().backward()


def all_to_all_v() -> Any:
    sizes = odd(each(1), each(2))
    return pmod.all_to_all_v(ones(sum(sizes)), "x", send_sizes=sizes, recv_sizes=sizes)


# what is called, and what an error shows of the last rank and of the others
CASES: dict[str, tuple[Callable[[], Any], str, str]] = {
    "psum": (lambda: pmod.psum(ones(odd(3, 4)), "x"), "(3,) float32", "(4,) float32"),
    "psum of as many": (lambda: pmod.psum(ones(*odd((2, 3), (3, 2))), "x"), "(2, 3) float32", "(3, 2) float32"),
    "psum of many": (lambda: pmod.psum(ones(odd(30000, 40000)), "x"), "(30000,) float32", "(40000,) float32"),
    "psum of none": (lambda: pmod.psum(ones(odd(0, 4)), "x"), "(0,) float32", "(4,) float32"),
    "psum of a tree": (lambda: pmod.psum([ones(2), ones(odd(3, 4))], "x"), "(2,), (3,) float32", "(2,), (4,) float32"),
    "psum, pmean": (lambda: odd(pmod.pmean, pmod.psum)(ones(4), "x"), "in pmean", "in psum"),
    "dtypes": (lambda: pmod.psum(ones(4).to(odd(torch.float64, torch.int64)), "x"), "(4,) float64", "(4,) int64"),
    "pmax": (lambda: pmod.pmax(ones(odd(3, 4)), "x"), "(3,) float32", "(4,) float32"),
    "pick": (lambda: pmod.pick(ones(odd(3, 4)), "x"), "(3,) float32", "(4,) float32"),
    "roots": (lambda: pmod.pick(ones(4), "x", src=odd(0, 1)), "with Root(root=0)", "with Root(root=1)"),
    "broadcast": (lambda: pmod.broadcast(ones(odd(3, 4)), "x"), "(3,) float32", "(4,) float32"),
    "reduce": (lambda: pmod.reduce(ones(odd(3, 4)), "x"), "(3,) float32", "(4,) float32"),
    "pshift": (lambda: pmod.pshift(ones(odd(3, 4)), "x"), "(3,) float32", "(4,) float32"),
    "ppermute": (lambda: pmod.ppermute(ones(odd(3, 4), 2), "x", ring()), "(3, 2) float32", "(4, 2) float32"),
    "gather": (lambda: pmod.gather(ones(odd(3, 4), 2), "x"), "(3, 2) float32", "(4, 2) float32"),
    "scatter": (lambda: pmod.scatter(ones(odd(6, 12)), "x"), "(6,) float32", "(12,) float32"),
    "all_gather": (lambda: pmod.all_gather(ones(odd(3, 4)), "x"), "(3,) float32", "(4,) float32"),
    "all_gather of none": (lambda: pmod.all_gather(ones(odd(0, 4)), "x"), "(0,) float32", "(4,) float32"),
    "unshard": (lambda: pmod.unshard(ones(odd(3, 4)), "x"), "(3,) float32", "(4,) float32"),
    "psum_scatter": (lambda: pmod.psum_scatter(ones(odd(6, 12)), "x"), "(6,) float32", "(12,) float32"),
    # a transpose of uneven shards, without concat_sizes
    "transpose": (
        lambda: pmod.all_to_all(ones(odd(2, 4), 6), "x", split_dim=1, concat_dim=0),
        "(2, 6) float32",
        "(4, 6) float32",
    ),
    "all_to_all_v": (all_to_all_v, "sends 4 bytes", "which expects 8"),
    "barrier": (lambda: odd(lambda: pmod.barrier("x"), lambda: pmod.psum(ones(3), "x"))(), "in barrier", "in psum"),
    "sizes": (
        lambda: odd(lambda: pmod.all_gather_v(ones(3), "x"), lambda: pmod.psum(ones(3), "x"))(),
        "in all_gather_v",
        "in psum",
    ),
    "backward": (
        lambda: pmod.pvary(ones(odd(3, 4)).requires_grad_(), "x").sum().backward(),
        "(3,) float32 in psum in backward",
        "(4,) float32 in psum in backward",
    ),
    "one in backward, the others in forward": (
        lambda: odd(summed_in_backward, lambda: pmod.psum(ones(4), "x"))(),
        "(4,) float32 in psum in backward",
        "(4,) float32 in psum at",
    ),
    "start": (lambda: pmod.start(pmod.psum, ones(odd(3, 4)), "x").wait(), "(3,) float32", "(4,) float32"),
}


def refused(name: str) -> str:
    """A rank whose own messages all came goes on, and hears of it at its next call."""
    with pytest.raises(pmod.MismatchError) as caught:
        CASES[name][0]()
        pmod.psum(torch.ones(7), "x")
    return str(caught.value)


def refused_soon(names: Sequence[str]) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waiting, "LOOK", 0.2)  # nothing but this is waited for
        return refused_in_processes(names)


def refused_in_processes(names: Sequence[str]) -> list[str]:
    """What is raised long before the deadline, which ends otherwise."""
    found: list[str] = []
    for name in names:
        topology = pmod.current_mesh().topology
        pmod.set_mesh(pmod.make_mesh(x=-1, timeout=spmd.LONG))
        pmod.barrier("x")  # all are here
        found.append(refused(name))
        with pytest.raises(pmod.MismatchError, match="cut off"):  # nothing may be sent along these ranks any more
            pmod.psum(torch.ones(4), "x")
        pmod.shutdown()
        pmod.set_mesh(pmod.make_mesh(x=topology.world_size, topology=topology))
        assert pmod.psum(torch.tensor(1), "x").item() == topology.world_size  # and all begin anew
    return found


@pytest.mark.parametrize(("n", "part"), [(2, 0), (2, 1), (3, 0), (3, 1)])
def test_unlike_calls_in_processes(n: int, part: int) -> None:
    names = list(CASES)[part::2]
    for rank, rows in enumerate(spmd.launch(refused_soon, names, x=n)):
        for name, text in zip(names, rows, strict=True):
            assert "nothing was exchanged" in text and f"at (x={rank})" in text, (name, text)
            for shown in CASES[name][1:]:
                assert shown in text, (name, text)
            assert text.count("test_unlike.py:") >= 2, (name, text)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", [name for name in CASES if "none" not in name])
def test_unlike_calls_in_threads(name: str, n: int) -> None:
    with pytest.raises(pmod.MismatchError) as caught:
        pmod.simulate(CASES[name][0], x=n)
    if name != "all_to_all_v":  # which counts elements there
        assert all(shown in str(caught.value) for shown in CASES[name][1:])


def test_a_process_ends_after_unlike_calls() -> None:
    """What waits in a thread of gloo's has ended, and does not abort the process at its end."""
    code = """
    import torch, pmod
    def f():
        try:
            pmod.psum(torch.ones(3 + pmod.axis_index("x")), "x")
        except pmod.MismatchError:
            return "refused"
    if __name__ == "__main__":
        print(pmod.launch(f, x=2))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=spmd.LONG)
    assert (ended.returncode, ended.stdout.strip(), ended.stderr) == (0, "['refused', 'refused']", "")


def local_calls_unlike_often() -> float:
    """What moves nothing may be called by one rank only: it is no meeting."""
    x = torch.ones(4)
    for _ in range(pmod.axis_index("x")):
        pmod.pvary(x, "x")
        pmod.shard(x, "x")
    return pmod.psum(x, "x").sum().item()


def test_local_calls_are_no_meetings() -> None:
    assert spmd.launch(local_calls_unlike_often, x=3) == [12.0] * 3


# --- what two posts say ---------------------------------------------------------------------------------------------


def post(code: str = "1", meeting: str = "x#5", **more: str) -> Post:
    return Post(WAITS, meeting, (0, 1), "psum at a.py:1", code, **more)


def test_two_posts_are_compared_where_they_are_of_one_meeting() -> None:
    assert unlike(post(), 0, post(), 1) is None
    assert "unlike calls" in (unlike(post(), 0, post("2"), 1) or "")
    assert unlike(post(), 0, post("2", "x#6"), 1) is None  # its call in our meeting is not known
    earlier = "x#5\x1d2\x1d(0,) float32\x1d(1, None)"
    text = unlike(post(what="(4,) float32"), 0, post("1", "x#6", before=earlier), 1) or ""
    assert "rank 1: (0,) float32 in a call before psum at a.py:1" in text
    # the second exchange of a large sum beside the first
    assert unlike(post(parts="0 1:4:4"), 0, post(parts="1 0:8:8"), 1) is None
    assert unlike(post(parts="0 1:4:8"), 0, post(parts="0 0:8:4"), 1) is None
    text = unlike(post(parts="0 1:4:8"), 0, post(parts="0 0:8:8"), 1) or ""
    assert "rank 0 sends 4 bytes to rank 1, which expects 8" in text and text.count("sends 8") == 0


def test_a_post_is_a_text() -> None:
    said = ("12", "(2,) float32", "(1, None)", "0 1:4:4", "0:4:1#6\x1d1\x1d\x1d")
    whole = Post(LEFT, "0:4:1#7", (0, 1), "psum at a.py:1", *said)
    assert Post.of(whole.text()) == whole
    assert NEAR < 256
