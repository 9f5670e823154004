"""`trace` counts what it says: each collective once, its bytes as by hand, its line, its module and its step."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pmod
from pmod._wire import traffic
from tests.lib import spmd
from tests.lib.table import CASES, Here

Tensor = torch.Tensor

X = 8 * 6  # bytes of x below
# what a rank sends forward and backward, x being 6 float64 on each of n ranks; on rank 0, which is every root
BY_HAND: dict[str, Any] = {
    "psum": (lambda x: pmod.psum(x, "x"), lambda n: (X * (n - 1), 0)),
    "pvary": (lambda x: pmod.pvary(x, "x"), lambda n: (0, X * (n - 1))),
    "pick": (lambda x: pmod.pick(x, "x"), lambda n: (X * (n - 1), 0)),
    "broadcast": (lambda x: pmod.broadcast(x, "x"), lambda n: (X * (n - 1), 0)),
    "all_gather": (lambda x: pmod.all_gather(x, "x"), lambda n: (X * (n - 1), X * (n - 1))),
    "psum_scatter": (lambda x: pmod.psum_scatter(x, "x"), lambda n: (X * (n - 1) // n, X // n * (n - 1))),
    "shard": (lambda x: pmod.shard(x, "x"), lambda n: (0, X // n * (n - 1))),
    "unshard": (lambda x: pmod.unshard(x, "x"), lambda n: (X * (n - 1), 0)),
    "all_to_all": (
        lambda x: pmod.all_to_all(x, "x", split_dim=0, concat_dim=0),
        lambda n: (X * (n - 1) // n, X * (n - 1) // n),
    ),
    "pshift": (lambda x: pmod.pshift(x, "x"), lambda n: (X, X)),
    "gather": (lambda x: pmod.gather(x, "x"), lambda n: (0, X * (n - 1))),
    "scatter": (lambda x: pmod.scatter(x, "x"), lambda n: (X * (n - 1) // n, 0)),
}


def traced(name: str) -> list[tuple[str, int]]:
    x = torch.ones(6, dtype=torch.float64, requires_grad=True)
    with pmod.trace() as t:
        BY_HAND[name][0](x).sum().backward()
    assert t.total_bytes() == t.total_bytes("x") == sum(event.nbytes for event in t.events)
    assert [(event.axis, event.rank) for event in t.events] == [("x", pmod.axis_index("x"))] * 2
    return [(event.function, event.nbytes) for event in t.events]


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", BY_HAND)
def test_bytes_by_hand(name: str, n: int) -> None:
    forward, backward = BY_HAND[name][1](n)
    found = pmod.simulate(traced, name, x=n)[0]
    assert found == [(name, forward), (f"the backward of {name}", backward)]


def all_on_rank() -> list[list[tuple[str, int]]]:
    return [traced(name) for name in BY_HAND]


def test_bytes_on_real_ranks() -> None:
    for name, found in zip(BY_HAND, spmd.launch(all_on_rank, x=2)[0], strict=True):
        forward, backward = BY_HAND[name][1](2)
        assert found == [(name, forward), (f"the backward of {name}", backward)]


def cases_on_rank() -> list[int]:
    """All of them run under trace, with the values that they have without."""
    sent = []
    for case in CASES.values():
        if not case.linear:
            continue  # a simulation holds a forward-mode level open, for which an extremum sends a second message
        h = Here(case, "x", "trace", turn=0)
        with pmod.trace() as t:
            y = h.call(h.mine(h.xs))
        torch.testing.assert_close(y, h.mine(h.ys))
        assert len(t.events) >= 1 or h.still
        sent.append(t.total_bytes())
    return sent


def test_both_wires_count_alike() -> None:
    assert pmod.simulate(cases_on_rank, x=2) == spmd.launch(cases_on_rank, x=2)


def test_what_a_process_group_is_given_is_counted() -> None:
    class Group:
        def __getattr__(self, name: str) -> object:
            return lambda *args: name

    x = torch.zeros(12, dtype=torch.float64)
    group = traffic.Metered(Group(), 3, 1)
    meter = traffic.Meter()
    traffic.meters().append(meter)
    try:
        for name, args, nbytes in [
            ("alltoall_base", (x, x, [4, 4, 4], [1, 9, 2]), 8 * 3),
            ("allgather", ([[x]], [x]), 2 * 96),
            ("_allgather_base", (x, x), 2 * 96), ("_reduce_scatter_base", (x, x), 64), ("allreduce", ([x],), 128),
        ]:  # fmt: skip
            before = meter.total.sent
            assert getattr(group, name)(*args) == name
            assert meter.total.sent - before == nbytes, name
    finally:
        traffic.meters().remove(meter)


# --- lines, modules, steps ----------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return pmod.psum(self.inner(x), "x")  # here


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(pmod.pvary(x, "x"))
        return x


def trained() -> Any:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pmod.trace() as t:
        for _ in range(2):
            net(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    return t


def test_lines_modules_and_steps() -> None:
    t = pmod.simulate(trained, x=2)[0]
    sums = [event for event in t.events if event.function == "psum"]
    assert [event.module for event in sums] == ["Net.blocks.0", "Net.blocks.1"] * 2
    assert all(event.site.endswith('return pmod.psum(self.inner(x), "x")  # here') for event in sums)
    assert [event.step for event in sums] == [0, 0, 1, 1]
    back = [event for event in t.events if event.function == "the backward of pvary"]
    assert {event.module for event in back} == {"Net"} and {event.step for event in back} == {0, 1}
    assert all(event.seconds > 0 and event.start > 0 for event in t.events)
    assert [event.start for event in sums] == sorted(event.start for event in sums)


def test_nothing_is_left_behind() -> None:
    def run() -> None:
        with pytest.raises(ZeroDivisionError), pmod.trace():
            pmod.psum(torch.ones(1), "x")
            _ = 1 / 0
        assert pmod._core.watch.watchers() == [] and traffic.meters() == []

    pmod.simulate(run, x=2)
    assert not nn.modules.module._global_forward_pre_hooks


def test_under_debug_each_call_is_one_event() -> None:
    def run() -> int:
        with pmod.debug(), pmod.trace() as t:
            pmod.psum(torch.ones(2), "x")
        return len(t.events)

    assert pmod.simulate(run, x=2) == [1, 1]


def started() -> Any:
    with pmod.trace() as t:
        began = time.perf_counter()
        pending = pmod.start(pmod.all_gather, torch.ones(4), "x")
        sent = time.perf_counter()
        time.sleep(0.05)
        asked = time.perf_counter()
        pending.wait()
        came = time.perf_counter()
    return t, (sent - began) + (came - asked)


def test_a_started_call_is_one_event_without_the_time_between() -> None:
    for t, most in spmd.launch(started, x=2):
        (event,) = t.events
        assert event.function == "all_gather" and event.nbytes == 16 and 0 < event.seconds <= most


def nested() -> list[int]:
    with pmod.trace() as t:
        torch.func.jvp(lambda x: pmod.psum(x, "x"), (torch.ones(4),), (torch.ones(4),))
    return [event.nbytes for event in t.events]


def test_the_bytes_of_a_tangent_are_its_own() -> None:
    assert pmod.simulate(nested, x=2) == [[16, 16]] * 2


# --- what is shown ------------------------------------------------------------------------------------------------


def test_table() -> None:
    t = pmod.simulate(trained, x=2)[0]
    lines = t.table().splitlines()
    assert lines[0].split() == ["function", "axis", "calls", "sent", "ms", "module", "line"]
    psum = next(line for line in lines if line.startswith("psum") and "blocks.1" in line)
    assert psum.split()[:4] == ["psum", "x", "2", "16"]
    assert lines[-1].startswith("all") and str(len(t.events)) in lines[-1]
    assert t._repr_html_().count("<tr>") == len(lines)
    assert "<td>psum</td>" in t._repr_html_()


def test_by_axis() -> None:
    def run() -> Any:
        with pmod.trace() as t:
            pmod.psum(torch.ones(4), "a")
            pmod.psum(torch.ones(4), ("a", "b"))
            pmod.all_gather(torch.ones(4), "b")
        return {axis: (entry["calls"], entry["bytes"]) for axis, entry in t.by_axis().items()}

    assert pmod.simulate(run, a=2, b=2)[0] == {"a": (1, 16), ("a", "b"): (1, 48), "b": (1, 16)}


def test_plot() -> None:
    figure = pmod.simulate(trained, x=2)[0].plot()
    for one in (figure, pickle.loads(pickle.dumps(figure))):  # what a notebook shows, also of a rank of `launch`
        assert one._repr_png_().startswith(b"\x89PNG")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["x"]
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"psum", "pvary"}


def written(path: Path) -> int:
    with pmod.trace() as t:
        for _ in range(3):
            pmod.psum(torch.ones(4), "x")
    t.chrome(path)
    return len(t.events)


@pytest.mark.parametrize("launch", [pmod.simulate, spmd.launch], ids=["threads", "processes"])
def test_chrome(launch: Any, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    assert launch(written, path, x=2) == [3, 3]
    events = json.loads(path.read_text())["traceEvents"]
    calls = [event for event in events if event["ph"] == "X"]
    names = {kind: [event["args"]["name"] for event in events if event["name"] == kind] for kind in
             ("process_name", "thread_name")}  # fmt: skip
    assert names == {"process_name": ["rank 0", "rank 1"], "thread_name": ["x", "x"]}
    assert {event["tid"] for event in calls} == {0}
    assert sorted(event["pid"] for event in calls) == [0, 0, 0, 1, 1, 1]
    assert all(event["name"] == "psum (x)" and event["args"]["bytes"] == 16 for event in calls)
    assert min(event["ts"] for event in calls) == 0
    for number in range(3):  # on one clock, the two halves of a call overlap
        first, second = (sorted((e for e in calls if e["pid"] == r), key=lambda e: e["ts"])[number] for r in (0, 1))
        slack = 20_000
        assert first["ts"] < second["ts"] + second["dur"] + slack and second["ts"] < first["ts"] + first["dur"] + slack


def test_alone() -> None:
    with pmod.set_mesh(pmod.make_mesh(x=1, topology=pmod.Topology(rank=0, world_size=1))), pmod.trace() as t:
        pmod.psum(torch.ones(4), "x")
    assert t.events == [] and t.by_axis() == {} and t.table().startswith("function")


def profiled() -> list[str]:
    x = torch.ones(4, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        pmod.all_gather(x, "x").sum().backward()
        pmod.start(pmod.psum, x.detach(), ("x",)).wait()
    return sorted(entry.key for entry in profile.key_averages() if entry.key.startswith("pmod."))


def test_the_profiler_shows_collectives_by_name_and_axis() -> None:
    names = ["pmod.all_gather (x)", "pmod.psum (x)", "pmod.psum_scatter (x)"]
    assert spmd.launch(profiled, x=2) == [names, names]
