"""Calls that were made before (_core/ready.py): right on any wire, and what may change is not kept.

Most of it runs on ranks whose gloo has no tags: messages go as by NCCL, by gloo's own collectives.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import pmod
from pmod._core import ready
from pmod._core.send import begin
from pmod._ranks import world
from pmod._wire import process_group
from pmod._wire.process_group import GroupWire
from pmod.bench import cases, sections
from tests.lib import properties, spmd
from tests.lib.recorder import Recorder
from tests.lib.table import CASES
from tests.lib.untagged import UNTAGGED, call_untagged, untagged

Tensor = torch.Tensor

SOURCE = str(Path(pmod.__file__).parent)

@contextmanager
def told_apart() -> Iterator[list[str]]:
    """The names of the rows that are sent by what was kept."""
    sent: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        make = ready._sender

        def noting(call: Any, like: Tensor, in_backward: bool) -> Callable[[Tensor], Tensor]:
            send = make(call, like, in_backward)

            def noted(x: Tensor) -> Tensor:
                sent.append(call.row.name)
                return send(x)

            return noted

        patch.setattr(ready, "_sender", noting)
        yield sent


# --- values and derivatives ---------------------------------------------------------------------------------------

# the first two make what the others find
OFTEN = ("value", "value", "gradient", "accumulated", "higher", "adjoint", "untouched", "transforms", "layouts")


def often_on_rank(case: str) -> list[str]:
    with told_apart() as sent:
        for prop in OFTEN:
            properties.on_rank(case, prop, "x", "often", turn=0)
        with untagged():
            for prop in OFTEN:
                properties.on_rank(case, prop, "x", "often", turn=0)
    return sent


# whatever is drawn; others may be drawn with sizes that are asked for, or in several messages
ALWAYS = "psum pvary pmax pmin pick place broadcast reduce all_gather psum_scatter shard unshard gather"
ALWAYS += " all_to_all pshift"


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_was_sent_before(ranks: int) -> None:
    """Every collective, again and again on tensors of one kind: with tags, and as by NCCL."""
    for case in CASES:
        found = spmd.launch(often_on_rank, case, x=ranks)
        kept = [case for sent in found if sent]
        assert kept or case not in ALWAYS.split(), case


def unlike_ways() -> int:
    """One rank forgets, in turns, what the other knows."""
    x = torch.arange(3.0, requires_grad=True)
    with untagged(), told_apart() as sent:
        for turn in range(8):
            if turn % 2 == pmod.axis_index("x"):
                world.processes().connection.forget_calls()
            y = pmod.psum(x * (1 + pmod.axis_index("x")), "x")
            (g,) = torch.autograd.grad(pmod.psum((pmod.pvary(y, "x") ** 2).sum(), "x"), x)
            assert torch.equal(y, 3 * torch.arange(3.0))
            assert torch.equal(g, 12 * torch.arange(3.0) * (1 + pmod.axis_index("x")))
    return len(sent)


def test_ranks_may_go_unlike_ways() -> None:
    """A rank that has kept a call and one that has not send the same, and note the same."""
    assert all(spmd.launch(unlike_ways, x=2))


# --- what is not kept ---------------------------------------------------------------------------------------------


def lengths_change() -> None:
    """The length of this rank's shard stays, and that of the other one's does not."""
    for step in range(5):
        mine = 2 if pmod.axis_index("x") == 0 else step
        y = pmod.all_gather_v(torch.full((mine,), 1.0 + pmod.axis_index("x")), "x")
        assert y.tolist() == [1.0] * 2 + [2.0] * step


@pytest.mark.parametrize("within", [lambda f: f(), call_untagged], ids=["gloo", "as by NCCL"])
def test_lengths_that_are_asked_for_are_asked_for_each_time(within: Callable[..., None]) -> None:
    spmd.launch(within, lengths_change, x=2)


def wrong_after_right() -> list[str]:
    x = torch.ones(4, 4)
    for _ in range(4):
        pmod.pick(x, "x", src=1)
        pmod.all_gather(x, "x", dim=1)
        pmod.psum(x, "x")
        pmod.ppermute(x, "x", [(0, 1), (1, 0)])
    with warnings.catch_warnings(action="ignore"):
        nested = torch.nested.nested_tensor([x, x])
    wrong: list[Callable[[], Any]] = [
        lambda: pmod.pick(x, "x", src=True),
        lambda: pmod.all_gather(x, "x", dim=1.0),  # pyright: ignore
        lambda: pmod.all_gather(x, "x", dim=True),
        lambda: pmod.ppermute(x, "x", [(0, True), (1, 0)]),
        lambda: pmod.psum(x.to_sparse(), "x"),
        lambda: pmod.psum(nested, "x"),
        lambda: pmod.psum(x.to("meta"), "x"),
        lambda: pmod.psum(x, "y"),
    ]
    found: list[str] = []
    for call in wrong:
        with pytest.raises(pmod.PmodError) as caught:
            call()
        assert caught.value.__cause__ is None and caught.value.__context__ is None
        found.append(str(caught.value))
    with pytest.raises(TypeError, match=r"psum\(\) missing"):
        pmod.psum(x)  # pyright: ignore
    return found


def test_wrong_arguments_that_equal_right_ones_raise() -> None:
    """True is not 1, and a tensor of another kind is not one of the same shape."""
    here, there = spmd.launch(wrong_after_right, x=2)
    assert len(set(here)) == len(here) and len(there) == len(here)


def extremum_first_without_derivative() -> Any:
    x = torch.arange(3.0) * (1 - 2 * pmod.axis_index("x"))
    for _ in range(4):
        pmod.pmax(x, "x")
    leaf = x.requires_grad_()
    y = pmod.pmax(leaf, "x")
    (g,) = torch.autograd.grad(y.sum(), leaf)
    return g.tolist()


def test_what_is_not_linear_keeps_its_derivative() -> None:
    assert spmd.launch(extremum_first_without_derivative, x=2) == [[0.5, 1.0, 1.0], [0.5, 0.0, 0.0]]


# --- who takes part -----------------------------------------------------------------------------------------------


class Counting(pmod.Watcher):
    def __init__(self) -> None:
        self.names: list[str] = []

    def before(self, call: Any, xs: Any, origin: Any) -> None:
        self.names.append(call.row.name)


def everybody_takes_part() -> None:
    x = torch.ones(3, requires_grad=True)
    z = torch.ones(3)
    for _ in range(4):
        pmod.psum(z, "x")
        torch.autograd.grad(pmod.all_gather(x, "x").sum(), x)
    y = pmod.all_gather(x, "x").sum()
    with Counting() as watcher:
        pmod.psum(z, "x")
        torch.autograd.grad(y, x)
    assert watcher.names == ["psum", "psum_scatter"]
    with pmod.trace() as trace:
        pmod.psum(z, "x")
    assert trace.total_bytes() == 12
    assert pmod.start(pmod.psum, z, "x").wait().tolist() == [2.0] * 3
    assert torch.func.jvp(lambda x: pmod.psum(x, "x"), (z,), (z,))[1].tolist() == [2.0] * 3
    assert torch.vmap(lambda x: pmod.psum(x, "x"))(z.expand(2, 3)).shape == (2, 3)
    with torch.autograd.profiler.profile() as profile:
        pmod.psum(z, "x")
    assert any(event.name == "pmod.psum (x)" for event in profile.function_events or [])
    assert pmod.psum(torch.complex(z, z).conj().imag, "x").tolist() == [-2.0] * 3
    (first,) = torch.autograd.grad(pmod.psum(x, "x").pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.tolist() == [24.0] * 3


@pytest.mark.parametrize("within", [lambda f: f(), call_untagged], ids=["gloo", "as by NCCL"])
def test_who_takes_part_is_heard(within: Callable[..., None]) -> None:
    spmd.launch(within, everybody_takes_part, x=2)


def forgotten() -> None:
    mesh = pmod.current_mesh()
    for _ in range(4):
        pmod.psum(torch.ones(3), "x")
    assert mesh._made
    pmod.shutdown()
    assert not mesh._made
    with pmod.set_mesh(pmod.make_mesh(x=2)):
        assert pmod.psum(torch.ones(3), "x").tolist() == [2.0] * 3


def test_a_shutdown_forgets() -> None:
    spmd.launch(forgotten, x=2)


# --- the same message ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_at_once_asks_the_group_for_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a row does per call, where it has a shorter way, is what it sends anyway."""
    monkeypatch.setattr(process_group, "own_backend", lambda group, device: group)
    kept = 0
    for turn in range(CASES[case].ways):
        for call, x in _calls(case, turn):
            group = Recorder()
            wire = GroupWire(call.axis.size, call.axis.index, group, UNTAGGED)
            at_once = None if call.row.at_once is None else call.row.at_once(x, wire, call.params)
            if at_once is None:
                continue
            kept += 1
            y, asked = at_once(x), group.calls[:]
            group.calls.clear()
            (right,) = begin(call, [x], wire).wait()
            assert y.shape == right.shape and y.dtype == right.dtype
            assert [_even(call) for call in asked] == [_even(call) for call in group.calls]
    assert kept or case not in ("psum", "pick", "broadcast", "all_gather", "psum_scatter", "pshift", "pmax")


def _even(call: tuple[str, Any]) -> tuple[str, Any]:
    name, sent = call
    # no lists of lengths stand for equal ones, and rows count for elements
    return (name, None) if name == "alltoall_base" else (name, sent)


def _calls(case: str, turn: int) -> list[tuple[Any, Tensor]]:
    """The rows that a collective binds, on the first of two simulated ranks."""
    found: list[tuple[Any, Tensor]] = []

    class Noting(pmod.Watcher):
        def before(self, call: Any, xs: Any, origin: Any) -> None:
            found.extend((call, x.detach().contiguous()) for x in xs if len(xs) == 1 and x.numel())

    def on_rank() -> None:
        if pmod.axis_index("x"):
            properties.on_rank(case, "value", "x", "same", turn=turn)
            return
        with Noting():
            properties.on_rank(case, "value", "x", "same", turn=turn)

    pmod.simulate(on_rank, x=2)
    return found


# --- what a call costs, counted and not timed ---------------------------------------------------------------------

MAKES = {"clone", "empty_like", "new_empty", "detach", "view", "reshape", "narrow", "contiguous", "cat", "zeros_like"}
SENDS = {"allreduce", "broadcast", "alltoall_base", "_allgather_base", "_reduce_scatter_base", "allgather"}

# of a call that was made before, and of its backward: functions of pmod entered, tensors made or looked at, messages
COSTS = {
    "psum": ((10, 1, 1), (6, 1, 0)),
    "pvary": ((7, 1, 0), (9, 2, 1)),
    "pmax": ((11, 4, 1), (23, 0, 0)),
    "pmin": ((11, 4, 1), (23, 0, 0)),
    "pick": ((10, 1, 1), (6, 1, 0)),
    "place": ((7, 1, 0), (9, 2, 1)),
    "broadcast": ((10, 1, 1), (36, 5, 1)),
    "reduce": ((37, 4, 1), (9, 2, 1)),
    "all_gather": ((10, 1, 1), (9, 2, 1)),
    "psum_scatter": ((10, 1, 1), (9, 2, 1)),
    "shard": ((9, 1, 0), (9, 2, 1)),
    "unshard": ((10, 1, 1), (8, 3, 0)),
    "gather": ((32, 4, 1), (30, 6, 1)),
    "all_to_all": ((12, 1, 1), (9, 2, 1)),
    "pshift": ((10, 1, 1), (9, 2, 1)),
}


def counted(f: Callable[[], Any]) -> tuple[int, int, int]:
    entered = made = sent = 0

    def note(frame: Any, event: str, what: Any) -> None:
        nonlocal entered, made, sent
        code = frame.f_code
        # Python 3.12 has no frames for comprehensions
        if event == "call" and code.co_filename.startswith(SOURCE) and not code.co_name.startswith("<"):
            entered += 1
        elif event == "c_call":
            made += what.__name__ in MAKES
            sent += what.__name__ in SENDS

    sys.setprofile(note)
    try:
        f()
    finally:
        sys.setprofile(None)
    return entered, made, sent


def costs() -> dict[str, tuple[tuple[int, int, int], ...]]:
    found: dict[str, tuple[tuple[int, int, int], ...]] = {}
    with sections.fake_ranks(4):
        for name in ALWAYS.split():
            f = cases.CASES[name].ours
            x, leaf = torch.ones(4, 4), torch.ones(4, 4, requires_grad=True)
            for _ in range(4):
                y = f(leaf)
                one = torch.ones_like(y)
                f(x)
                torch.autograd.grad(y, leaf, one, retain_graph=True)
            found[name] = counted(partial(f, x)), counted(partial(torch.autograd.grad, y, leaf, one))
    return found


def test_what_a_call_costs() -> None:
    """Counted and not timed: a slower way shows as another number."""
    assert costs() == COSTS
