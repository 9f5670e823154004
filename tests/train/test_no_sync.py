"""no_sync: passes that send nothing, and the one that sends for all, against one process that holds all ranks' data."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import pmod
from tests.lib.listening import counted, on_threads, same

Tensor = torch.Tensor
DOUBLE = torch.float64


class Parts(nn.Module):
    """Layers of which the caller says which are used."""

    def __init__(self) -> None:
        super().__init__()
        for seed, name in enumerate("abcd"):
            layer = nn.Linear(3, 2, dtype=DOUBLE)
            with torch.no_grad():
                layer.weight.copy_(torch.arange(6.0).view(2, 3).sin() + seed)
                layer.bias.fill_(0.5 * seed)
            setattr(self, name, layer)

    def forward(self, x: Tensor, names: str) -> Tensor:
        return sum((getattr(self, name)(x).sin() for name in names), x[:, :2])


def data(rank: int, i: int = 0) -> Tensor:
    return (torch.arange(12, dtype=DOUBLE).view(4, 3) + 5 * rank + i).cos()


def back(module: nn.Module, rank: int, i: int = 0, names: str = "abcd") -> None:
    # it requires a gradient, so that a pass may use no layer
    (module(data(rank, i).requires_grad_(), names) ** 2).sum().backward()


# Which layers each pass uses, on rank 0 and on the others. The last pass alone sends. d is used by nobody.
ROUTES = {"all alike": ("abc", "abc", "abc"), "some": ("ab", "c", "a"), "not in the last": ("abc", "b", "")}


def expected(n: int, routes: list[tuple[str, ...]], mean: bool) -> list[Tensor | None]:
    plain = Parts()
    for rank in range(n):
        for i, names in enumerate(routes[rank]):
            back(plain, rank, i, names)
    return [None if p.grad is None else p.grad / (n if mean else 1) for p in plain.parameters()]


def check(module: nn.Module, wanted: list[Tensor | None]) -> None:
    for (name, p), e in zip(module.named_parameters(), wanted, strict=True):
        assert (p.grad is None) == (e is None), name
        if e is not None:
            same(p.grad, e, name)


def passes(module: nn.Module, rank: int, route: tuple[str, ...]) -> list[list[Any]]:
    """What each pass of a step sent."""
    sent: list[list[Any]] = []
    with pmod.no_sync(module):
        for i, names in enumerate(route[:-1]):
            sent.append(counted(lambda i=i, names=names: back(module, rank, i, names))[1])
    sent.append(counted(lambda: back(module, rank, len(route) - 1, route[-1]))[1])
    return sent


def step_on_rank(kind: str, reduce: Any) -> None:
    rank, n = pmod.axis_index("x"), pmod.axis_size("x")
    routes = [ROUTES[kind]] + [ROUTES["all alike"] if kind == "all alike" else ("b", "a", "a")] * (n - 1)
    module = pmod.data_parallel(Parts(), "x", reduce=reduce)
    wanted = expected(n, routes, reduce == "mean")
    # a second step, and one whose gradients add up on those of the first
    for times in (1, 1, 2):
        if times == 1:
            module.zero_grad()
        sent = passes(module, rank, routes[rank])
        assert [len(messages) for messages in sent] == [0, 0, 1 if n > 1 else 0]
        check(module, [None if e is None else times * e for e in wanted])
        # all ranks have the same ones now
        torch.optim.SGD(module.parameters(), lr=0.0).step()


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("kind", ROUTES)
def test_a_step_sends_once(kind: str, reduce: str, run: Any) -> None:
    run(step_on_rank, kind, reduce, x=2)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_step_on_other_numbers_of_ranks(ranks: int) -> None:
    on_threads(step_on_rank, "some", "mean", x=ranks)


def nested_on_rank() -> None:
    rank = pmod.axis_index("x")
    module = pmod.data_parallel(Parts(), "x")
    routes = [("abc", "abc", "abc", "abc")] * 2

    def send(i: int) -> int:
        return len(counted(lambda: back(module, rank, i, "abc"))[1])

    with pmod.no_sync(module):
        with pmod.no_sync(module):
            assert send(0) == 0
        assert send(1) == 0
        with pytest.raises(KeyError, match="of mine"), pmod.no_sync(module):
            raise KeyError("of mine")
        assert send(2) == 0
    assert send(3) == 1
    check(module, expected(2, routes, True))
    # an exception ends it
    with pytest.raises(KeyError, match="of mine"), pmod.no_sync(module):
        raise KeyError("of mine")
    module.zero_grad()
    assert send(0) == 1
    # where backward is called counts, not where the module is
    module.zero_grad()
    y = module(data(rank), "abc")
    with pmod.no_sync(module):
        z = module(data(rank, 1), "abc")
        assert not counted((y**2).sum().backward)[1]
    assert len(counted((z**2).sum().backward)[1]) == 1
    check(module, expected(2, [("abc", "abc")] * 2, True))


def test_contexts_in_contexts(run: Any) -> None:
    run(nested_on_rank, x=2)


def broken_on_rank() -> None:
    rank = pmod.axis_index("x")
    module = pmod.data_parallel(Parts(), "x")

    def stop(_: Tensor) -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"), pmod.no_sync(module):
        back(module, rank, 0, "abc")
        y = module(data(rank), "abc")
        y.register_hook(stop)
        y.sum().backward()
    back(module, rank, 1, "abc")
    check(module, expected(2, [("abc", "abc")] * 2, True))


def test_a_pass_that_raises(run: Any) -> None:
    run(broken_on_rank, x=2)


def held_on_rank() -> None:
    rank = pmod.axis_index("x")
    for wrapped in (Parts(), nn.ModuleDict({"inner": Parts()})):
        inner = wrapped if isinstance(wrapped, Parts) else wrapped["inner"]
        pmod.data_parallel(inner, "x")
        for model in (wrapped, copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
            module = model if isinstance(model, Parts) else model["inner"]
            with pmod.no_sync(model):
                assert not counted(lambda m=module: back(m, rank))[1]
            back(module, rank, 1)
            check(module, expected(pmod.axis_size("x"), [("abcd", "abcd")] * 2, True))


@pytest.mark.parametrize("ranks", [1, 2])
def test_modules_inside_and_copies(ranks: int) -> None:
    on_threads(held_on_rank, x=ranks)


# --- what cannot work ---------------------------------------------------------------------------------------------

UNSENT = (
    "pmod.data_parallel(axis='x') at (x={rank}): {happened} while gradients of passes under no_sync are not sent, so "
    "each rank has its own.\nRun the last pass before a step outside of no_sync: it sends them all."
)


def stepped_on_rank() -> None:
    rank = pmod.axis_index("x")
    module = pmod.data_parallel(Parts(), "x")
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    other = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    with pmod.no_sync(module):
        back(module, rank)
        for step in (optimizer.step, torch.optim.Adam(module.a.parameters()).step):
            with pytest.raises(pmod.PmodError) as raised:
                step()
            assert str(raised.value) == UNSENT.format(rank=rank, happened="optimizer.step() was called")
    other.step()
    # one that is frozen now is in no later message
    module.a.requires_grad_(False)
    back(module, rank, 1)
    with pytest.raises(pmod.PmodError, match=r"optimizer\.step\(\) was called"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
    module.a.requires_grad_(True)
    # what was thrown away may be stepped with, and is not sent
    for to_none in (True, False):
        with pmod.no_sync(module):
            back(module, rank)
        optimizer.zero_grad(set_to_none=to_none)
        optimizer.step()
    back(module, rank)
    optimizer.step()


def test_a_step_with_what_was_never_sent_raises(run: Any) -> None:
    run(stepped_on_rank, x=2)


def by_hand_on_rank() -> None:
    rank = pmod.axis_index("x")
    module = pmod.data_parallel(Parts(), "x")
    with pmod.no_sync(module):
        back(module, rank)
        with torch.no_grad():
            module.a.weight -= 0.1 * module.a.weight.grad
        with pytest.raises(pmod.PmodError) as raised:
            back(module, rank)
    assert str(raised.value) == UNSENT.format(rank=rank, happened="a parameter was changed")
    with pytest.raises(pmod.PmodError, match="a parameter was changed"):
        back(module, rank)
    module.zero_grad()
    back(module, rank)


def test_a_change_by_what_was_never_sent_raises(run: Any) -> None:
    run(by_hand_on_rank, x=2)


def taken_off_on_rank() -> None:
    module = pmod.data_parallel(Parts(), "x")
    with pmod.no_sync(module):
        back(module, pmod.axis_index("x"))
    pmod.remove_data_parallel(module)
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    with pytest.raises(pmod.PmodError, match="data_parallel wrapped neither"), pmod.no_sync(module):
        pass


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_of_a_module_without_data_parallel_are_its_own(ranks: int) -> None:
    pmod.simulate(taken_off_on_rank, x=ranks)


def unwrapped_on_rank() -> None:
    module = Parts()
    pmod.share_parameters(module, "x")
    with pytest.raises(pmod.PmodError) as raised, pmod.no_sync(module):
        pass
    assert str(raised.value) == (
        "pmod.no_sync: data_parallel wrapped neither this Parts nor a module inside.\n"
        "Pass what data_parallel returned; with share_parameters, add up the losses and call backward once."
    )
    with pytest.raises(pmod.ArgumentError) as raised, pmod.no_sync(torch.ones(1)):
        pass
    assert str(raised.value) == "pmod.no_sync: model is a Tensor.\nPass an nn.Module."


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_that_nothing_wrapped_raises(ranks: int) -> None:
    pmod.simulate(unwrapped_on_rank, x=ranks)
