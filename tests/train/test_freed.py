"""What pmod has been given is freed when nobody else holds it, and its tables are as long as before."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

import pytest
import torch
import torch.nn.modules.module as registry
from torch import Tensor, nn

import pmod
from pmod._ranks import world
from tests.lib import spmd

MANY = 1000


def layer() -> nn.Linear:
    return nn.Linear(2, 2)


def used(module: nn.Module) -> nn.Module:
    module(torch.ones(1, 2)).sum().backward()
    return module


def frozen(module: nn.Module) -> nn.Module:
    module.requires_grad_(False)
    return module


def unfrozen() -> nn.Module:
    module = pmod.data_parallel(nn.Sequential(layer(), frozen(layer())), "x")
    used(module[0])
    module[1].requires_grad_(True)
    module.append(layer())
    return used(module)


def with_handle(use: bool) -> nn.Module:
    module = layer()
    handle = pmod.share_parameters(module, "x")
    if use:
        used(module)
    handle.remove()
    return module


def shared(module: nn.Module, **how: Any) -> nn.Module:
    pmod.share_parameters(module, "x", **how)
    return module


def mapped(what: str) -> object:
    module = layer()
    f = pmod.shard_map(module, in_specs=pmod.P("x"), out_specs=pmod.P("x"))
    f(torch.ones(2 * pmod.axis_size("x"), 2)).sum().backward()
    return module if what == "module" else f


def started() -> Tensor:
    x = torch.ones(3, requires_grad=True)
    pmod.start(lambda x: pmod.psum(pmod.pvary(x, "x"), "x"), x).wait().sum().backward()
    return x


def remembered() -> nn.Module:
    module = layer()
    step = pmod.checked(lambda x: pmod.pmean(module(x).sum().detach(), "x"))
    step(torch.ones(1, 2))
    return module


MAKE: dict[str, Callable[[], object]] = {
    "data_parallel": lambda: pmod.data_parallel(layer(), "x"),
    "data_parallel, used": lambda: used(pmod.data_parallel(layer(), "x")),
    "data_parallel, sum": lambda: used(pmod.data_parallel(layer(), "x", reduce="sum")),
    "data_parallel, changed": unfrozen,
    "data_parallel, removed": lambda: pmod.remove_data_parallel(used(pmod.data_parallel(layer(), "x"))),
    "share_parameters": lambda: shared(layer()),
    "share_parameters, used": lambda: used(shared(layer(), reduce="mean")),
    "share_parameters, removed": lambda: with_handle(use=False),
    "share_parameters, used and removed": lambda: with_handle(use=True),
    "share_parameters, then data_parallel": lambda: used(pmod.data_parallel(shared(layer()), pmod.current_mesh()["y"])),
    "shard_map, its module": lambda: mapped("module"),
    "shard_map": lambda: mapped("function"),
    "start": started,
    "checked": remembered,
    "mark_varying": lambda: pmod.mark_varying(layer().weight, "x"),
    "replicate": lambda: pmod.replicate(layer(), "x"),
}


def tables() -> dict[str, int]:
    """How long what outlives a call is, when all ranks, which may be threads, have freed theirs."""
    pmod.barrier("x")
    gc.collect()
    pmod.barrier("x")
    counted = {
        name: len(value)
        for name, value in vars(registry).items()
        if name.startswith("_global_") and name.endswith("_hooks")
    }
    here = world.current()
    return {**counted, "watchers": len(here.watchers), "meters": len(here.meters)}


def left_of(make: Callable[[], object], times: int) -> int:
    """How many of so many are alive, when nobody holds them."""
    made = [ref(make()) for _ in range(times)]
    gc.collect()
    return sum(one() is not None for one in made)


def each_is_freed(names: list[str], times: int) -> None:
    for name in names:
        MAKE[name]()  # what is made once is made now
        before = tables()
        assert left_of(MAKE[name], times) == 0, name
        assert tables() == before, name


@pytest.fixture(autouse=True)
def few_to_look_through() -> Iterator[None]:
    """What the process held before need not be looked through at each collection."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("name", MAKE)
def test_what_is_freed(name: str) -> None:
    pmod.simulate(each_is_freed, [name], 5, x=2, y=1)


def each_is_freed_here(names: list[str], times: int) -> None:
    gc.freeze()  # what the process began with need not be looked through each time
    try:
        each_is_freed(names, times)
    finally:
        gc.unfreeze()


def test_what_is_freed_on_processes() -> None:
    names = ["data_parallel, used", "share_parameters, used", "shard_map", "start"]
    spmd.launch(each_is_freed_here, names, 3, x=2, y=1)


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_a_thousand_modules(how: Any) -> None:
    """A hook of a parameter kept the module that it was of for ever."""

    def rank() -> int:
        return left_of(lambda: used(pmod.data_parallel(layer(), "x", reduce=how)), MANY)

    assert pmod.simulate(rank, x=2) == [0, 0]


def with_a_world(name: str) -> object:
    module = layer()
    x = torch.ones(1, 2)
    if name == "simulate":
        pmod.simulate(lambda: pmod.psum(module(x), "x"), x=2)
    elif name == "estimate":
        pmod.estimate(lambda: pmod.psum(module(x), "x"), mesh={"x": 4})
    elif name == "failed":
        with pytest.raises(ZeroDivisionError):
            pmod.simulate(lambda: pmod.psum(module(x), "x") / (1 // pmod.axis_index("x")), x=2)
    else:
        pmod.simulate(lambda: used(pmod.data_parallel(copy.deepcopy(module), "x")), x=2)
    return module


@pytest.mark.parametrize("name", ["simulate", "estimate", "failed", "data_parallel"])
def test_what_a_world_was_given(name: str) -> None:
    assert left_of(lambda: with_a_world(name), 5) == 0


def test_meshes() -> None:
    place = pmod.Topology(rank=1, world_size=4)
    kept = [left_of(lambda: pmod.make_mesh(x=2, y=2, topology=place)["y"], times) for times in (3, 30)]
    assert kept[0] == kept[1] <= 1, "the last one may be remembered"


# --- who holds a reducer while it is needed -----------------------------------------------------------------------


def graph_outlives_module() -> None:
    rank, x = pmod.axis_index("x"), torch.ones(1, 2)
    module = pmod.data_parallel(layer(), "x")
    weight, y = module.weight, module(x * (1 + rank)).sum()
    del module
    gc.collect()
    y.backward()
    assert weight.grad is not None and weight.grad.tolist() == [[1.5, 1.5]] * 2


def test_a_backward_of_a_module_that_is_gone() -> None:
    pmod.simulate(graph_outlives_module, x=2)


def parameter_outlives_module(reduce: Any) -> None:
    x = torch.ones(1, 2)
    weight = pmod.data_parallel(layer(), "x", reduce=reduce).weight
    gc.collect()
    with pytest.raises(pmod.PmodError) as raised:
        (x @ weight).sum().backward()
    start = f"pmod.data_parallel(axis='x') at (x={pmod.axis_index('x')}): backward came to a parameter of a module that"
    assert str(raised.value).startswith(start)
    # a new module holds it: nothing is left of the one before
    module = layer()
    module.weight = weight
    weight.grad = None
    used(pmod.data_parallel(module, "x", reduce=reduce))
    assert weight.grad is not None and weight.grad[0, 0] == (2 if reduce == "sum" else 1)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_a_parameter_of_a_module_that_is_gone(reduce: str) -> None:
    """Its gradient would silently be this rank's own."""
    pmod.simulate(parameter_outlives_module, reduce, x=2)
