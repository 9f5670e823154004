"""World size 1 under plain `python`: the same code runs, nothing is connected, values and derivatives are right.

The functions called `program_...` run in one process of their own, without a launcher; a test shows how each ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import pmod
from tests.lib import spmd
from tests.lib.one_rank import IDENTITIES, ZEROS, X
from tests.lib.table import CASES, Here

ROOT = Path(pmod.__file__).parents[1]


def each_axis() -> list[Any]:
    mesh = pmod.current_mesh()
    return ["data", ("model", "data"), mesh["model"], mesh["data", "model"]]


def program_values() -> None:
    for axis in each_axis():
        for name, f in IDENTITIES.items():
            for x in (X, X.float(), X.cfloat(), X.half()):
                if x.is_complex() and name in ("pmax", "pmin"):
                    continue
                before = x.clone()
                y = f(x, axis)
                assert y.dtype == x.dtype, name
                torch.testing.assert_close(y, x, rtol=1e-3 if "weight" in name else 0, atol=0, msg=name)
                assert torch.equal(x, before), name
        for name, f in ZEROS.items():
            assert torch.equal(f(X, axis), torch.zeros_like(X)), name
        assert torch.equal(pmod.all_gather(X, axis, tiled=False), X[None])
        assert torch.equal(pmod.all_gather(X, axis, dim=2, tiled=False), X[..., None])
        assert torch.equal(pmod.all_gather(X, axis, dim=-1, tiled=False), X[..., None])
        assert torch.equal(pmod.psum_scatter(X[:, None], axis, dim=1, tiled=False), X)
        y = pmod.all_to_all(X[:, None], axis, split_dim=1, concat_dim=0, tiled=False)
        assert torch.equal(y, X[None])


def program_trees_and_numbers() -> None:
    tree = {"b": [X, None], "a": (X.float(), X.long())}
    for f in (pmod.psum, pmod.pmax, pmod.pvary, pmod.broadcast, pmod.all_gather, pmod.pshift):
        y: Any = f(tree, "model")
        assert list(y) == ["b", "a"] and y["b"][1] is None and isinstance(y["a"], tuple)
        assert torch.equal(y["b"][0], X) and torch.equal(y["a"][1], X.long())
    for number in (3, 2.5):
        for f in (pmod.psum, pmod.pmean, pmod.pmax, pmod.pmin):
            value = f(number, "model")
            assert value == number and not isinstance(value, Tensor)
    assert pmod.pmax(True, "model") is True
    assert (pmod.axis_index("model"), pmod.axis_size("model"), pmod.axis_size(("data", "model"))) == (0, 1, 1)
    assert pmod.barrier("model") is None
    assert torch.equal(pmod.start(pmod.psum, X, "model").wait(), X)


def program_derivatives() -> None:
    func = torch.func
    v = torch.linspace(1, 2, 6, dtype=torch.float64).view(2, 3)
    for axis in each_axis():
        for name, f in IDENTITIES.items():

            def loss(x: Tensor, f=f, axis=axis) -> Tensor:
                return (f(x**3, axis) * v).sum()

            x = X.clone().requires_grad_()
            (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
            (third,) = torch.autograd.grad(second.sum(), x)
            for order, (found, expected) in enumerate(((first, 3 * X**2), (second, 6 * X), (third, 6 + 0 * X))):
                torch.testing.assert_close(found, expected * v, msg=f"{name}, derivative {order + 1}")
            torch.testing.assert_close(func.grad(loss)(X), 3 * X**2 * v, msg=name)
            torch.testing.assert_close(func.jvp(loss, (X,), (X,))[1], (3 * X**3 * v).sum(), msg=name)
            torch.testing.assert_close(func.vmap(func.grad(loss))(torch.stack([X, 2 * X]))[1], 12 * X**2 * v, msg=name)
            pullback = func.vjp(lambda x, f=f, axis=axis: f(x, axis), X)[1]
            torch.testing.assert_close(pullback(v)[0], v, msg=name)
        for name, f in ZEROS.items():
            x = X.clone().requires_grad_()
            f(x, axis).sum().backward()
            assert x.grad is not None and not x.grad.any(), name


def program_errors_are_the_same() -> None:
    for call, kind in (
        (lambda: pmod.psum(X, "modle"), pmod.AxisError),
        (lambda: pmod.psum("x", "model"), pmod.ArgumentError),
        (lambda: pmod.all_gather(X, "model", dim=2), pmod.ShapeError),
        (lambda: pmod.make_mesh(data=2), pmod.AxisError),
    ):
        with pytest.raises(kind):
            call()


def program_a_collective_costs_little() -> None:
    """As much as a few sums of two tensors: best of many, because other processes share the core."""
    x, mesh = torch.ones(4), pmod.current_mesh()
    seconds: list[float] = []
    for call in (
        lambda: x + x,
        lambda: pmod.psum(x, "model"),
        lambda: pmod.psum(x, mesh),
        lambda: pmod.pvary(x, ("data", "model")),
        lambda: pmod.all_gather(x, "model"),
        lambda: pmod.shard(x, "model"),
        lambda: pmod.pmax(x, "model"),
        lambda: pmod.pshift(x, "model"),
        lambda: pmod.broadcast(x, "model"),
        lambda: pmod.scatter(x, "model"),
    ):
        best = 1.0
        for _ in range(100):
            began = time.perf_counter()
            for _ in range(20):
                call()
            best = min(best, (time.perf_counter() - began) / 20)
        seconds.append(best)
    assert max(seconds) < 20 * seconds[0]


def program_training_as_everywhere_else() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1).double()
    reference = torch.nn.Linear(3, 1).double()
    reference.load_state_dict(model.state_dict())
    for m, ours in ((model, True), (reference, False)):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        for _ in range(3):
            parameters = dict(m.named_parameters())
            if ours:
                parameters = pmod.pvary(parameters, ("data", "model"))
            loss = torch.func.functional_call(m, parameters, (X,)).square().mean()
            loss = pmod.pmean(loss, "data") if ours else loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert torch.equal(model.weight, reference.weight) and torch.equal(model.bias, reference.bias)


def nothing_is_connected() -> None:
    assert not dist.is_initialized()


def program_z_a_group_on_demand() -> None:
    """The last one, in the order of names: it connects."""
    from torch.nn.parallel import DistributedDataParallel

    mesh = pmod.current_mesh()
    group = mesh.group("model")
    assert dist.is_initialized() and group.size() == 1 and dist.get_process_group_ranks(group) == [0]
    assert mesh.group("data") is group and mesh.group(("data", "model")) is group
    x = X.clone()
    dist.all_reduce(x, group=group)
    assert torch.equal(x, X)
    module = torch.nn.Linear(3, 1)
    DistributedDataParallel(module, process_group=group)(X.float()).sum().backward()
    assert module.weight.grad is not None
    assert torch.equal(pmod.psum(X, "model"), X)
    device_mesh = mesh.device_mesh
    assert device_mesh.mesh_dim_names == ("data", "model") and device_mesh.mesh.tolist() == [[0]]
    assert pmod.Mesh.from_device_mesh(device_mesh) == mesh
    pmod.shutdown()
    nothing_is_connected()
    mesh = pmod.make_mesh()
    assert torch.equal(pmod.psum(X, mesh), X)
    nothing_is_connected()
    mesh.group("data")  # made again, and ended at exit


PROGRAMS = sorted(name for name in globals() if name.startswith("program_"))


def main() -> None:
    """In the process of its own: run all programs, and say how each ended."""
    pmod.set_mesh(pmod.make_mesh(data=-1, model=1))
    nothing_is_connected()
    ended: dict[str, str] = {}
    for name in PROGRAMS:
        try:
            globals()[name]()
            if not name.startswith("program_z"):
                nothing_is_connected()
            ended[name] = "well"
        except BaseException:
            ended[name] = traceback.format_exc()
    print(json.dumps(ended))


@pytest.fixture(scope="module")
def process() -> subprocess.CompletedProcess[str]:
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "OMPI_", "PMI_", "PMIX_", "SLURM_", "PMOD_", "MPI_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    code = "from tests.core import test_single; test_single.main()"
    ignored = ("-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning")  # torch.func.jvp meets one in torch
    command = [sys.executable, "-W", "error", *ignored, "-c", code]
    return subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=spmd.LONG)


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name, process):
    assert process.returncode == 0, process.stderr
    ended = json.loads(process.stdout)[name]
    assert ended == "well", ended


def test_it_ends_without_a_word(process):
    assert process.stderr == ""


# --- what a user can see of a result is the same on one rank as on two ---------------------------------------------


def _attempt(f: Callable[[], Any]) -> str:
    try:
        f()
    except RuntimeError as error:
        return type(error).__name__
    return "works"


def seen_of(h: Here, call: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """What a program can see of a result besides its values: nothing of it may depend on the number of ranks."""
    seen: dict[str, Any] = {}
    for kind in ("plain", "leaf", "computed", "no_grad", "parameter"):
        x = h.mine(h.xs).requires_grad_(kind != "plain")
        x = nn.Parameter(x) if kind == "parameter" else x * 1 if kind == "computed" else x
        before, version = x.detach().clone(), x._version
        with torch.set_grad_enabled(kind != "no_grad"):
            y = call(x)
        seen[kind, "is x"] = y is x
        seen[kind, "known to autograd"] = (y.requires_grad, y.is_leaf, y.grad_fn is None, type(y))
        if y.requires_grad:
            y.retain_grad()
            y.register_hook(lambda g: g * 3)
            y.sum().abs().backward(retain_graph=True)
            seen[kind, "retains"] = (y.grad is not None, x.grad_fn is not None or x.grad is not None)
        seen[kind, "in place"] = _attempt(lambda y=y: y.add_(1))
        if h.case.name not in ("pvary", "place", "shard"):  # may share storage with x, on any number of ranks
            seen[kind, "x is as it was"] = torch.equal(x.detach(), before) and x._version == version
            kept = y.detach().clone()
            with torch.no_grad():
                x.add_(1)
            seen[kind, "y is as it was"] = torch.equal(y.detach(), kept)
    return seen


def seen_on_rank(name: str) -> list[dict[str, Any]]:
    """Of each way to call a collective; {} for zeros that `place` makes, which one rank never has."""
    seen: list[dict[str, Any]] = []
    for way in range(CASES[name].ways):
        h = Here(CASES[name], "x", way, turn=way)
        seen.append(seen_of(h, h.call))
        seen.append(seen_of(h, lambda x, h=h: pmod.start(lambda: h.call([x])[0]).wait()))
        if name == "place" and not h.shares:
            seen[-2:] = [{}, {}]
    return seen


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if name != "scatter_v"])
def test_one_rank_is_as_two(name: str) -> None:
    with pmod.set_mesh(pmod.make_mesh(x=1)):
        alone = seen_on_rank(name)
    threads = pmod.simulate(seen_on_rank, name, x=1)[0]
    for other in (threads, *pmod.simulate(seen_on_rank, name, x=2), *spmd.launch(seen_on_rank, name, x=2)):
        assert len(other) == len(alone)
        for one, two in zip(alone, other, strict=True):
            assert two in (one, {})


def test_one_rank_leaves_the_memory_of_others_alone() -> None:
    """Numpy's memory, expanded tensors, slices: what cannot be copied when it is changed is copied at once."""
    with pmod.set_mesh(pmod.make_mesh(x=1)):
        array = np.ones(3)
        for x in (torch.from_numpy(array), torch.ones(1).expand(3), torch.ones(9)[2:5], torch.ones(2, 3).T[:, 0]):
            y = pmod.psum(x, "x")
            y += 1
            assert torch.equal(x, torch.ones_like(x))
            assert torch.equal(y, torch.full_like(x, 2))
        y = pmod.psum(torch.from_numpy(array), "x")
        array += 1
        assert torch.equal(y, torch.ones_like(y))
        for f in (pmod.psum, pmod.pmax):
            tree = {"a": torch.ones(3), "b": [torch.ones(2, dtype=torch.int64)], "n": 3}
            found = f(tree, "x")
            found["a"] += 1
            found["b"][0] += 1
            assert tree["a"].sum() == 3
            assert tree["b"][0].sum() == 2
