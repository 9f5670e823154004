"""`estimate` counts what real ranks send, on meshes of any size, and times it by the alpha-beta model."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pmod
from pmod._core import watch
from pmod._ranks import world
from tests.lib import spmd
from tests.lib.table import CASES, Here

Tensor = torch.Tensor


def counted(t: pmod.trace) -> list[tuple[Any, ...]]:
    return [(e.function, e.axis, e.size, e.rank, e.nbytes, e.received, e.messages, e.site) for e in t.events]


# --- as real ranks ------------------------------------------------------------------------------------------------


def both(f: Any, *args: Any) -> tuple[pmod.trace, pmod.trace]:
    """What f sends on these ranks, and what it is estimated to send on this one."""
    with pmod.trace() as real:
        f(*args)
    return real, pmod.estimate(f, *args, mesh=pmod.current_mesh())


def alike(case: Any, axis: str, turn: int) -> Iterator[Here]:
    """Draws of a case in which all ranks hold tensors of one size, and ask for the same."""
    for seed in range(200):
        h = Here(case, axis, "estimate", turn, seed, lengths=(2, 2), turn=turn)
        one = {(str(shape), str(kwargs)) for shape, kwargs in zip(h.drawn.shapes, h.drawn.kwargs, strict=True)}
        if len(one) == 1 and math.prod(h.drawn.shapes[0]) > 0:
            yield h


def cases_on_rank(axis: str) -> dict[str, int]:
    """Every collective with its backward."""
    sent: dict[str, int] = {}
    for name, case in CASES.items():
        for h in [h for turn in range(case.ways) for h in islice(alike(case, axis, turn), 1)]:

            def step(h: Here = h) -> None:
                y = h.call(h.mine(h.xs).requires_grad_())
                y.sum().backward() if y.requires_grad else None

            real, estimated = both(step)
            assert counted(real) == counted(estimated), (name, str(h.drawn))
            sent[name] = max(real.total_bytes(), sent.get(name, 0))
    return sent | rows_on_rank(pmod.axis_size(tuple(axis.split(","))), tuple(axis.split(",")))


def rows_on_rank(n: int, axis: tuple[str, ...]) -> dict[str, int]:
    """Those whose draws are seldom the same on all ranks."""
    x = torch.ones(2 * n, 3, requires_grad=True)
    indices = [torch.tensor([0, j]) for j in range(n)]
    sent: dict[str, int] = {}
    for name, arguments in (("all_to_all_v", {"send_sizes": [2] * n}), ("indexed_all_to_all_v", {"indices": indices})):
        real, estimated = both(lambda f, kwargs: f(x, axis, **kwargs).sum().backward(), getattr(pmod, name), arguments)
        assert counted(real) == counted(estimated), name
        sent[name] = real.total_bytes()
    return sent


@pytest.mark.parametrize("sizes", [{"x": 2}, {"x": 4}, {"x": 2, "y": 2}], ids=str)
def test_every_collective_sends_what_is_estimated(sizes: dict[str, int]) -> None:
    found = spmd.launch(cases_on_rank, ",".join(sizes), **sizes)
    assert {name for sent in found for name, nbytes in sent.items() if nbytes} == set(CASES)


def train(net: nn.Module, x: Tensor) -> None:
    """Data and tensor parallel, the first layer's columns and the second's rows cut over "model"."""
    w = pmod.pvary(dict(net.named_parameters()), "data")
    first = pmod.shard(w["0.weight"], "model", dim=0)
    second = pmod.shard(w["2.weight"], "model", dim=1)
    h = torch.tanh(pmod.pvary(x, "model") @ first.T + pmod.shard(w["0.bias"], "model"))
    y = pmod.psum(h @ second.T, "model") + w["2.bias"]
    loss = pmod.pmean(y.square().mean(), "data")
    loss.backward()
    pending = pmod.start(pmod.all_gather, loss.detach()[None], ("data", "model"))
    pmod.pmean({"loss": 0.5}, "data")
    pending.wait()
    pmod.barrier("model")


def large() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 32))


def trained_on_rank() -> None:
    torch.manual_seed(0)
    net, x = large(), torch.randn(16, 64)
    real, estimated = both(train, net, x)
    assert counted(real) == counted(estimated) and real.total_bytes("data") > 4 * 64 * 128
    reduced = pmod.data_parallel(large(), "data")
    real, estimated = both(lambda: reduced(x).square().mean().backward())
    assert counted(real) == counted(estimated) and real.total_bytes("data") > 4 * 64 * 128


def test_a_training_step_sends_what_is_estimated() -> None:
    spmd.launch(trained_on_rank, data=2, model=2)


# --- any mesh, any tensor -----------------------------------------------------------------------------------------


def test_ten_thousand_ranks_by_hand() -> None:
    net, x = large().to("meta"), torch.empty(16, 64, device="meta")
    place = pmod.Topology(rank=4321, world_size=10_000, device="cuda", num_nodes=1250)
    mesh = pmod.make_mesh(data=1250, model=8, topology=place)
    t = pmod.estimate(train, net, x, mesh=mesh, bandwidth={"data": 50e9, "model": 450e9}, latency=1e-6)
    parameters = 4 * sum(p.numel() for p in net.parameters())
    (total,) = (e for e in t.events if e.function == "the backward of pvary" and e.axis == "data")
    assert total.nbytes == 2 * 1249 * parameters // 1250 and total.messages == 2 * 11 and total.rank == 4321
    assert total.seconds == pytest.approx(22e-6 + total.nbytes / 50e9)
    assert t.by_axis()["model"]["seconds"] == pytest.approx(sum(e.seconds for e in t.events if e.axis == "model"))
    assert net[0].weight.grad is not None and net[0].weight.grad.is_meta


def calls_of(function: Any) -> int:
    """The calls that a call makes of Python functions and of those in C."""
    calls = 0

    def heard(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(heard)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def one_step(x: Tensor) -> None:
    x = x.detach().requires_grad_()
    total = pmod.psum(pmod.pvary(x, "data").square(), "data")
    whole = pmod.all_gather(total, "model")
    halves = pmod.psum_scatter(pmod.pmean(whole, "data"), "model")
    columns = pmod.all_to_all(whole, "model", split_dim=0, concat_dim=1)
    (pmod.pmax(halves, "model").sum() + columns.sum()).backward()
    pmod.unshard(x, "data")
    pmod.broadcast(x, "data")
    pmod.reduce(x, "data")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_step_on_131072_ranks_makes_as_many_calls_as_on_eight(device: str) -> None:
    x = torch.empty(65_536, 2, device="meta")

    def estimated(data: int, model: int) -> pmod.trace:
        place = pmod.Topology(rank=0, world_size=data * model, device=device)
        mesh = pmod.make_mesh(data=data, model=model, topology=place)
        return pmod.estimate(one_step, x, mesh=mesh)

    estimated(4, 2)  # what is made once is made
    few, many = (calls_of(lambda sizes=sizes: estimated(*sizes)) for sizes in ((4, 2), (64, 2048)))
    # a sum over two ranks takes another way than one over more, and a tree has more steps
    assert many <= 1.2 * few
    assert estimated(64, 2048).total_bytes("data") > 0


def test_meta_tensors_count_as_real_ones() -> None:
    real = pmod.estimate(train, large(), torch.randn(16, 64), mesh={"data": 2, "model": 4})
    meta = pmod.estimate(train, large().to("meta"), torch.empty(16, 64, device="meta"), mesh={"data": 2, "model": 4})
    assert counted(meta) == counted(real) and real.total_bytes() > 0


def test_lengths_that_are_exchanged() -> None:
    def gathered(x: Tensor) -> Tensor:
        return pmod.all_gather_v(x, "x")

    for device in ("cpu", "meta"):
        t = pmod.estimate(gathered, torch.zeros(5, 2, device=device), mesh={"x": 1000})
        assert [e.nbytes for e in t.events] == [999 * 8 * 8, 999 * 40]


def test_the_others_hold_what_this_rank_holds() -> None:
    x = torch.arange(6, dtype=torch.float64)
    seen: dict[str, Any] = {}

    def look() -> None:
        pmod.assert_invariant(x, "x")
        seen.update(
            psum=pmod.psum(x, "x"), pmean=pmod.pmean(x, "x"), pmax=pmod.pmax(x, "x"), number=pmod.psum(2, "x"),
            all_gather=pmod.all_gather(x, "x"), psum_scatter=pmod.psum_scatter(x, "x"), pick=pmod.pick(x, "x", src=2),
            pshift=pmod.pshift(x, "x"), edge=pmod.pshift(x, "x", wrap=False), reduce=pmod.reduce(x, "x"),
            here=pmod.make_mesh(a=-1), device=pmod.current_mesh().device,
        )  # fmt: skip

    for device in ("cpu", "cuda"):
        place = pmod.Topology(rank=0, world_size=3, device=device)
        pmod.estimate(look, mesh=pmod.make_mesh(x=3, topology=place))
        expected = dict(psum=3 * x, pmean=x, pmax=x, number=6, all_gather=torch.cat([x, x, x]), psum_scatter=3 * x[:2],
                        pick=x, pshift=x, edge=torch.zeros_like(x), reduce=3 * x)  # fmt: skip
        for name, value in expected.items():
            torch.testing.assert_close(seen[name], value, msg=name)
        assert seen["here"].shape == {"a": 3} and seen["device"].type == device


# --- time ---------------------------------------------------------------------------------------------------------


def several(x: Tensor) -> None:
    pmod.all_to_all(x, "a", split_dim=0, concat_dim=0)
    pmod.pshift(x, "b")
    pmod.psum(x, ("a", "b"))
    pmod.broadcast(x, "b", src=1)


def test_seconds_of_an_axis() -> None:
    x = torch.zeros(32 * 1024)
    rates: dict[str, Any] = dict(bandwidth={"a": 1e6, "b": 1e3}, latency={"a": 1.0, "b": 10.0})
    t = pmod.estimate(several, x, mesh={"a": 8, "b": 2}, **rates)
    to_all, shift, total, received = t.events
    assert to_all.seconds == pytest.approx(7 * 1.0 + 7 / 8 * x.nbytes / 1e6)
    assert shift.seconds == pytest.approx(10.0 + x.nbytes / 1e3)
    # on gloo the sum of a large tensor is an exchange of parts, then their gathering
    assert total.seconds == pytest.approx(30 * 10.0 + 30 / 16 * x.nbytes / 1e3)
    assert received.nbytes == 0 and received.seconds == pytest.approx(10.0 + x.nbytes / 1e3)
    assert [e.start for e in t.events[1:]] == pytest.approx([e.start + e.seconds for e in t.events[:-1]])
    assert pmod.estimate(several, x, mesh={"a": 8, "b": 2}).by_axis()["a"]["seconds"] == 0.0
    assert pmod.estimate(several, x, mesh={"a": 8, "b": 2}, latency=1.0).events[0].seconds == 7.0
    named = {("a", "b"): 1e9, "a": 1e6, "b": 1e3}
    assert pmod.estimate(several, x, mesh={"a": 8, "b": 2}, bandwidth=named).events[2].seconds < 1.0


def test_pictures(tmp_path: Path) -> None:
    t = pmod.estimate(several, torch.zeros(16), mesh={"a": 8, "b": 2}, bandwidth=1e3)
    assert "all_to_all" in t.table() and len(t.plot().axes[0].get_yticklabels()) == 3
    t.chrome(tmp_path / "trace.json")
    written = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event["dur"] for event in written if event["ph"] == "X") == pytest.approx(
        1e6 * sum(event.seconds for event in t.events)
    )


def chrome_of_one(path: Path) -> None:
    if pmod.axis_index("x") == 0:  # no rank waits for another
        pmod.estimate(several, torch.zeros(16), mesh={"a": 8, "b": 2}).chrome(path)


def test_chrome_is_this_process_alone(tmp_path: Path) -> None:
    spmd.launch(chrome_of_one, tmp_path / "trace.json", x=2)
    written = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in written) == 4 and {event["pid"] for event in written} == {0}


# --- the world around ---------------------------------------------------------------------------------------------


def test_the_world_is_as_before() -> None:
    mesh = pmod.make_mesh(x=1, topology=pmod.Topology(rank=0, world_size=1))
    with pmod.set_mesh(mesh), pmod.trace() as outer:
        with pytest.raises(ZeroDivisionError):
            pmod.estimate(lambda: 1 // 0, mesh={"a": 3})
        pmod.estimate(lambda: pmod.set_mesh(pmod.make_mesh(b=3)), mesh={"a": 3})
        assert pmod.current_mesh() is mesh and world.current() is world.processes()
        assert watch.watchers() == [outer] and outer.events == []


def test_debug_has_nobody_to_compare_with() -> None:
    @pmod.checked
    def step(x: Tensor) -> None:
        with pmod.debug():
            # lengths that contradict what a mirror image would send
            pmod.all_to_all_v(x, "x", send_sizes=(1, 2, 3), recv_sizes=(1, 5, 5))

    with pmod.debug():
        t = pmod.estimate(step, torch.zeros(6), mesh={"x": 3})
    assert [(e.nbytes, e.received) for e in t.events] == [(20, 40)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(mesh=3), "mesh is a int"),
        (dict(mesh={}), "no axis size is given"),
        (dict(mesh={"a": -1}), "a=-1 is not a size"),
        (dict(mesh={"a": 2}, bandwidth={"aa": 1.0}), "no axis 'aa' to be for; did you mean 'a'?"),
        (dict(mesh={"a": 2}, bandwidth=0), "bandwidth is 0"),
        (dict(mesh={"a": 2}, latency={"a": -1.0}), "latency is -1.0"),
        (dict(mesh={"a": 2}, latency="fast"), "latency is 'fast'"),
        (dict(mesh={"a": 2, "b": 2}, bandwidth={"b": 1.0}), "bandwidth names no 'a', which is used"),
        (dict(mesh={"a": 2, "b": 2}, latency={"b": 1.0}), "latency names no 'a', which is used"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(pmod.PmodError, match=r"pmod\.estimate") as error:
        pmod.estimate(lambda: pmod.psum(torch.ones(2), "a"), **wrong)
    assert message in str(error.value)


def test_not_inside_another_world() -> None:
    def inner() -> None:
        with pytest.raises(pmod.PmodError, match="simulated rank already"):
            pmod.estimate(lambda: None, mesh={"a": 2})
        with pytest.raises(pmod.PmodError, match="no process group"):
            pmod.current_mesh().group("x")

    pmod.simulate(inner, x=2)
    pmod.estimate(inner, mesh={"x": 2})


def test_who_only_receives_waits_for_a_message() -> None:
    mesh = pmod.make_mesh(x=3, topology=pmod.Topology(rank=2, world_size=3))
    (event,) = pmod.estimate(lambda: pmod.pshift(torch.zeros(4), "x", wrap=False), mesh=mesh, latency=2.0).events
    assert (event.nbytes, event.received, event.messages, event.seconds) == (0, 16, 0, 2.0)
