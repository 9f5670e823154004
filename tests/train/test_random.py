"""Seeds along axes, and random numbers that differ along one axis and agree along another."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pmod
from tests.lib import spmd

Axis = str | tuple[str, ...]


def seeds() -> dict[str, int]:
    return {
        "a": pmod.fold_in(7, "a"), "b": pmod.fold_in(7, "b"), "both": pmod.fold_in(7, ("a", "b")),
        "chain": pmod.fold_in(pmod.fold_in(7, "a"), "b"), "other": pmod.fold_in(8, "a"),
    }  # fmt: skip


def test_seeds_differ_along_their_axis_only() -> None:
    found = pmod.simulate(seeds, a=2, b=3)
    for rank, mine in enumerate(found):
        for other, theirs in enumerate(found):
            assert (mine["a"] == theirs["a"]) == (rank // 3 == other // 3)
            assert (mine["b"] == theirs["b"]) == (rank % 3 == other % 3)
            assert (mine["both"] == theirs["both"]) == (mine["chain"] == theirs["chain"]) == (rank == other)
    values = {seed for mine in found for seed in mine.values()}
    assert len(values) == 2 + 3 + 6 + 6 + 2  # another axis or seed gives other numbers
    assert all(0 <= seed < 2**63 for seed in values)
    torch.Generator().manual_seed(max(values))


def test_seeds_are_the_same_on_every_machine_and_size() -> None:
    assert pmod.simulate(lambda: pmod.fold_in(0, "data"), data=2) == pmod.simulate(
        lambda: pmod.fold_in(0, "data"), data=4
    )[:2]  # fmt: skip
    assert pmod.simulate(lambda: pmod.fold_in(0, "data"), data=2) == [7541626262678432639, 4603387107390632223]


def draw_with_half_a_seed() -> None:
    with pmod.rng(0.5, "data"):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("name", ["fold_in", "rng"])
def test_a_seed_that_is_none(name: str) -> None:
    call = draw_with_half_a_seed if name == "rng" else lambda: pmod.fold_in(0.5, "data")  # type: ignore[arg-type]
    with pytest.raises(pmod.ArgumentError, match=rf"pmod\.{name}\(axis='data'\) at \(data=0\): seed is a float"):
        pmod.simulate(call, data=1)


# --- rng ----------------------------------------------------------------------------------------------------------


def numbers(axis: Axis) -> list[float]:
    with pmod.rng(3, axis):
        x = F.dropout(torch.ones(64))
        pmod.barrier(("a", "b"))  # the other ranks draw now
        return [*x.tolist(), *torch.rand(4).tolist(), *torch.empty(4).normal_().tolist()]


@pytest.mark.parametrize("run", [pmod.simulate, spmd.launch], ids=["threads", "processes"])
def test_they_differ_along_the_axis_and_agree_along_the_others(run: Any) -> None:
    kinds: dict[Axis, list[int]] = {"a": [0, 0, 1, 1], "b": [0, 1, 0, 1], ("a", "b"): [0, 1, 2, 3], (): [0, 0, 0, 0]}
    for axis, kind in kinds.items():
        found = run(numbers, axis, a=2, b=2)
        for (one, mine), (other, theirs) in itertools.combinations(zip(kind, found, strict=True), 2):
            assert (mine == theirs) == (one == other), axis
            # by themselves, too: the masks, the uniform and the normal numbers
            for part in (slice(64), slice(64, 68), slice(68, 72)):
                assert (mine[part] == theirs[part]) == (one == other), axis


def test_the_same_seed_gives_the_same_again_and_outside_all_is_as_before() -> None:
    with pmod.set_mesh(pmod.make_mesh(a=1, b=1)):
        first = numbers("a")
        torch.manual_seed(1)
        plain = torch.rand(6).tolist()
        torch.manual_seed(1)
        drawn = torch.rand(2).tolist()
        with pmod.rng(3, "a"):
            once = torch.rand(2).tolist()
            with pytest.raises(ZeroDivisionError), pmod.rng(4, "b"):
                torch.rand(7)
                _ = 1 / 0
            once += torch.rand(2).tolist()
        drawn += torch.rand(2).tolist()
        assert numbers("a") == first
        assert drawn + torch.rand(2).tolist() == plain
        with pmod.rng(3, "a"):
            assert torch.rand(4).tolist() == once
        with pmod.rng(4, "a"):
            assert torch.rand(4).tolist() != once


def layer(x: Tensor) -> Tensor:
    """Its first mask agrees along b; its second one differs, by a seed from the numbers around it."""
    x = pmod.pvary(pmod.psum(F.dropout(x), "b"), "b")
    with pmod.rng(int(torch.randint(2**62, ())), ("a", "b")):
        x = F.dropout(x, 0.25)
    return pmod.pvary(pmod.psum(x, "b"), "b") * torch.rand(())


def step(x: Tensor, keeping: str, reentrant: bool) -> list[float]:
    """Two calls of the layer, and the gradient, which is right only where a second forward draws the same."""
    x = x.clone().requires_grad_()

    def forward(x: Tensor) -> Tensor:
        with pmod.rng(5, "a"):
            return layer(layer(x))

    def half(x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=reentrant)

    if keeping == "all":
        y = checkpoint(forward, x, use_reentrant=reentrant)
    elif keeping == "parts":
        with pmod.rng(5, "a"):
            y = half(half(x))
    else:
        y = forward(x)
    torch.rand(1 + pmod.axis_index("b"))  # between forward and backward the ranks go on, each in its own way
    y.sum().backward()
    assert x.grad is not None and 0 < (x.grad == 0).sum() < 64, "masks that kept all or nothing would show nothing"
    return [*y.tolist(), *x.grad.tolist(), *torch.rand(2).tolist()]


@pytest.mark.parametrize("run", [pmod.simulate, spmd.launch], ids=["threads", "processes"])
def test_a_checkpoint_draws_the_same_again(run: Any) -> None:
    found = run(kept, a=2, b=2)
    for values in found:
        for rows in values.values():
            assert rows == values["nothing", False]
    outputs = [values["nothing", False][:64] for values in found]
    assert outputs[0] == outputs[1] != outputs[2] == outputs[3]


def kept() -> dict[tuple[str, bool], list[float]]:
    found = {}
    for how in itertools.product(["nothing", "all", "parts"], [False, True]):
        torch.manual_seed(pmod.axis_index("b"))
        found[how] = step(torch.linspace(1, 2, 64), *how)
    return found


def program() -> list[float]:
    """Draws of every kind, and between them messages, at which other ranks take their turn."""
    found: list[float] = []

    def note(x: Tensor) -> None:
        found.extend(pmod.all_gather(x.detach().reshape(-1), "a").tolist())

    torch.manual_seed(0)
    note(torch.rand(3))
    note(torch.nn.Linear(2, 2).weight)
    if pmod.axis_index("b") == 1:
        torch.manual_seed(5)
        note(torch.randperm(5).double())
    else:
        note(F.dropout(torch.ones(9, dtype=torch.float64)))
    pmod.barrier("b")
    note(torch.rand(2))
    with pmod.rng(11, "a"):
        note(torch.randn(3))
        torch.manual_seed(pmod.axis_index("b"))
        note(torch.rand(2))
    note(torch.rand(3, generator=torch.Generator().manual_seed(2)))
    note(torch.rand(2))
    state = torch.get_rng_state()
    note(torch.rand(2))
    torch.set_rng_state(state)
    note(torch.vmap(lambda x: x + pmod.psum(torch.rand(()), "a"), randomness="different")(torch.zeros(2)))
    return found


def test_a_simulated_rank_draws_what_a_process_draws() -> None:
    found = pmod.simulate(program, a=2, b=2)
    assert found == spmd.launch(program, a=2, b=2)
    assert found[0] != found[1] and found[0] == found[2]


# --- in a simulation ----------------------------------------------------------------------------------------------


def test_simulated_ranks_start_from_the_state_of_the_caller_which_is_as_before() -> None:
    def draw() -> list[float]:
        mine = torch.rand(2).tolist()
        if pmod.axis_index("a") == 0:
            torch.manual_seed(99)
        pmod.barrier("a")
        return mine + torch.rand(2).tolist()

    torch.manual_seed(4)
    expected = torch.rand(4).tolist()
    torch.manual_seed(4)
    first, *others = pmod.simulate(draw, a=3)
    assert others == [expected, expected]
    assert first == expected[:2] + torch.rand(2, generator=torch.Generator().manual_seed(99)).tolist()
    assert torch.rand(4).tolist() == expected
    torch.manual_seed(4)
    with pytest.raises(ZeroDivisionError):
        pmod.simulate(lambda: torch.rand(1) / 0 if draw() is None else 1 / 0, a=2)
    assert torch.rand(4).tolist() == expected


def test_in_an_estimate_of_ranks_with_gpus() -> None:
    place = pmod.Topology(rank=3, world_size=8, device="cuda")
    with pmod.set_mesh(pmod.make_mesh(a=8, b=1, topology=place)):
        found: list[list[float]] = []
        pmod.estimate(lambda: found.append(numbers("a")), mesh=pmod.current_mesh())
    assert found == [pmod.simulate(numbers, "a", a=4, b=1)[3]]


# --- compiled code ------------------------------------------------------------------------------------------------


def masked(x: Tensor) -> Tensor:
    with pmod.rng(0, "a"):
        return F.dropout(x)


def test_compiled_code() -> None:
    x = torch.ones(64)
    around = torch.compile(F.dropout, fullgraph=True, backend="aot_eager")
    with pmod.set_mesh(pmod.make_mesh(a=1)):
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"pmod\.rng\(axis='a'\): it is entered in compiled"):
            torch.compile(masked, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(torch.compile(masked, backend="aot_eager")(x), masked(x))  # a graph break: it runs as it is
        found = []
        for seed in (0, 0, 1):
            with pmod.rng(seed, "a"):
                found.append(around(x).tolist())
        assert found[0] == found[1] != found[2]
