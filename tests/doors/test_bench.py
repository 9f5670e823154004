"""`python -m pmod.bench` measures what it says: its raw calls give what pmod gives, and its numbers make sense."""

from __future__ import annotations

import importlib.util
import json
import runpy
import subprocess
import sys
from functools import partial

import pytest
import torch

import pmod
from pmod._core.collective import COLLECTIVES
from pmod.bench import bars, cases, clock, command, memory, peers, progress, sections
from tests.lib import spmd

WITHOUT_RAW = [name for name, case in cases.CASES.items() if case.raw is None]


def check_spread(spread):
    assert 0 < spread.low <= spread.median <= spread.high


def check_results(results, section, functions, cases):
    assert [(r.function, r.case) for r in results] == [(f, c) for f in functions for c in cases]
    for result in results:
        assert result.section == section
        check_spread(result.pmod_us)
        if section == "alone" or result.function in WITHOUT_RAW:
            assert result.raw_us is None and result.ratio is None
        else:
            check_spread(result.raw_us)
            check_spread(result.ratio)


# On other ranks than the first, these raw calls leave what nobody asked for.
FIRST_ONLY = {"reduce": ("forward",), "broadcast": ("backward",)}


def raw_calls_agree():
    index = pmod.axis_index(cases.AXIS)
    pmod.barrier(cases.AXIS)  # connects: the raw calls use the default group
    for name, case in cases.CASES.items():
        takes_i = name in ("pvary", "place", "shard")
        x = torch.arange(64.0).view(8, 8) * (1 if takes_i else 1 + index)
        x.requires_grad_()
        if case.raw is None:
            continue
        y, raw = case.ours(x), case.raw(x.detach())
        if index == 0 or "forward" not in FIRST_ONLY.get(name, ()):
            torch.testing.assert_close(y, raw, msg=partial("{}: {}".format, name))
        # an extremum's derivative is more than a message; where gather left nothing, the raw scatter has no shape
        if case.raw_back is None or name in ("pmax", "pmin", "gather"):
            continue
        g = torch.arange(1.0, 1 + y.numel()).view_as(y) * (1 + index)
        raw = case.raw_back(g)
        (derivative,) = torch.autograd.grad(y, x, g)
        if name == "scatter" and index > 0:
            raw = torch.zeros_like(x)
        if index == 0 or "backward" not in FIRST_ONLY.get(name, ()):
            torch.testing.assert_close(derivative, raw, msg=partial("{}, backward: {}".format, name))


def test_raw_calls_give_what_pmod_gives():
    spmd.launch(raw_calls_agree, **{cases.AXIS: 2})


def test_cases_cover_the_collectives():
    """All but the ragged forms, which bind the same rows, and the halos, which are sums of permutations' costs."""
    assert set(cases.MESSAGES) <= {name for name, case in cases.CASES.items() if case.raw is not None}
    ragged = {name for name in COLLECTIVES if name.endswith("_v")}
    assert set(cases.CASES) == set(COLLECTIVES) - ragged - {"halo_exchange", "halo_reduce"}


def test_order_is_random_and_covers_each_block_once_a_round():
    order = []
    blocks = [[lambda p=p, b=b: order.append((p, b)) or float(10 * p + b) for b in range(2)] for p in range(3)]
    times = clock.take_turns(blocks, 4)
    assert times == [[[10 * p, 10 * p + 1]] * 4 for p in range(3)]
    turns = [order[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(turn) == [(p, b) for p in range(3) for b in range(2)] for turn in turns)
    assert all(turn[i][0] == turn[i + 1][0] for turn in turns for i in (0, 2, 4))  # a pair stays together
    assert len({tuple(turn) for turn in turns}) > 1


def test_ratio_is_the_median_of_the_rounds_ratios():
    result = clock.Result.of("host", "psum", "forward", [(2.0, 1.0), (3.0, 1.0), (40.0, 10.0)])
    assert (result.ratio.low, result.ratio.median, result.ratio.high) == (2.5, 3.0, 3.5)
    assert result.pmod_us.median == 3e6


def test_alone():
    check_results(sections.measure_alone(2), "alone", cases.CASES, ("no grad", "with grad"))


def test_host_leaves_no_fake_group_behind():
    results = sections.measure_host(2)
    check_results(results, "host", cases.CASES, ("forward", "forward with grad", "backward"))
    assert not torch.distributed.is_initialized()
    assert pmod.make_mesh().size == 1
    lines = command.table(results).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 1 + len(cases.CASES)


def test_latency():
    sizes = {"4 B": 4, "4 KiB": 4096}
    for results in spmd.launch(sections.measure_latency, 2, sizes, **{cases.AXIS: 2}):
        check_results(results, "latency", cases.MESSAGES, sizes)


def ragged_calls_agree():
    n, index = pmod.axis_size(cases.AXIS), pmod.axis_index(cases.AXIS)
    sizes = sections._skewed(13, n)
    assert sizes == [6, 7]
    x = torch.arange(13.0).split(sizes)[index]
    torch.testing.assert_close(sections._padded_all_gather(x, sizes), pmod.all_gather_v(x, cases.AXIS, sizes=sizes))


def test_ragged():
    spmd.launch(ragged_calls_agree, **{cases.AXIS: 2})
    sizes = {"4 KiB": 4096}
    for results in spmd.launch(sections.measure_ragged, 2, sizes, **{cases.AXIS: 2}):
        check_results(results, "ragged", ("all_gather_v, even", "all_gather_v, skewed"), sizes)


def test_step():
    for results in spmd.launch(sections.measure_step, 1, **{cases.AXIS: 2}):
        functions = ("data_parallel", "share_parameters")
        results = sorted(results, key=lambda result: (result.function, result.case != "4 layers of 4 MiB"))
        check_results(results, "step", functions, ("4 layers of 4 MiB", "100 layers of 16 KiB"))


def peers_agree():
    pmod.barrier(cases.AXIS)  # connects: the peers use the default group
    for peer, collectives in peers.PEERS.items():
        for name, theirs in collectives().items():
            x = (torch.arange(64.0).view(8, 8) * (1 + pmod.axis_index(cases.AXIS))).requires_grad_()
            y, other = cases.CASES[name].ours(x), theirs(x)
            torch.testing.assert_close(other.detach() + 0, y.detach(), msg=f"{peer}, {name}")
            # what a gradient means is theirs to say: that there is one is what is measured
            (derivative,) = torch.autograd.grad(other, x, torch.ones_like(y))
            assert derivative.shape == x.shape


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peers_give_what_pmod_gives():
    spmd.launch(peers_agree, **{cases.AXIS: 2})


def test_peers():
    results = sections.measure_peers(1)
    assert {result.function for result in results} == {"psum", "all_gather", "psum_scatter", "all_to_all"}
    assert {result.case.split(",")[0] for result in results} == set(peers.PEERS)
    assert all(result.raw_us.median > 0 for result in results)
    # a peer that has no such collective leaves a gap
    assert command.table(results).splitlines()[-1].split()[-1] == "-"


def test_memory():
    nbytes = 64 * memory.MIB
    for peaks in spmd.launch(memory.measure_memory, nbytes, **{cases.AXIS: 2}):
        psum, back, _, tree = peaks
        assert "psum of 64 MiB" in psum.function and "64 x 1 MiB" in tree.function
        for peak in (psum, back):
            # the copy that a raw sum is taken in, and pmod's result
            assert 0.9 * nbytes < peak.raw_bytes < 1.5 * nbytes and 0.9 * nbytes < peak.pmod_bytes
        assert tree.raw_bytes > 0.9 * nbytes


def of_peer(function, peer, ratio):
    spread = clock.Spread(ratio, ratio, ratio)
    return clock.Result("peers", function, f"{peer}, {peers.BOTH_WAYS}", spread, spread, spread)


def test_a_bar_counts_the_cheapest_peer():
    results = [of_peer("psum", "a", 0.5), of_peer("psum", "b", 0.9), of_peer("all_gather", "a", 0.5)]
    by_function = {v.function: v for v in bars.judged(results) if v.bar.section == "peers"}
    assert (by_function["psum"].measured, by_function["psum"].word) == (0.9, "MISSED")
    assert (by_function["all_gather"].missed, by_function["all_gather"].word) == (False, "held")
    assert (by_function["pvary"].missed, by_function["pvary"].word) == (False, "not measured")


def test_bars_are_of_what_is_measured():
    for bar in bars.BARS:
        assert set(bar.functions) <= set(cases.CASES), bar.name
        assert bar.section in command.TITLES or bar.section == "peers"


@pytest.mark.parametrize(("microseconds", "code"), [(0.4, 0), (0.6, 1)])
def test_check_exits_with_1_where_a_bar_is_missed(microseconds, code, monkeypatch, capsys, tmp_path):
    spread = clock.Spread(microseconds, microseconds, microseconds)
    found = [clock.Result("alone", "psum", "no grad", spread, None, None)]
    monkeypatch.setattr(command, "measure_alone", lambda rounds: found)
    file = tmp_path / "bench.md"
    assert command.main(["--only", "alone", "--check", "--markdown", str(file)]) == code
    out = capsys.readouterr().out
    assert ("MISSED" in out) == bool(code)
    lines = file.read_text().splitlines()
    word = "MISSED" if code else "held"
    assert f"| an axis of one rank | psum | {microseconds:.2f} us | 0.50 us | {word} |" in lines
    # without --check nothing is judged
    assert command.main(["--only", "alone"]) == 0
    assert "MISSED" not in capsys.readouterr().out


def test_progress_is_shown_on_a_terminal_only(monkeypatch, capsys):
    run = {("f", "g"): [lambda: None]}
    assert clock.compare("host", run, sections._HOST, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert clock.compare("host", run, sections._HOST, 2)
    shown = capsys.readouterr().err.split("\r\033[K")
    assert shown == ["", "host: 0 of 1 comparisons warmed up", "host: round 1 of 2", "host: round 2 of 2", ""]
    progress.be_quiet("host: round 1 of 2")
    assert capsys.readouterr().err == ""


def test_import(monkeypatch):
    measured = sections._import_seconds
    asked = []

    def seconds(modules):
        asked.append(modules)
        return measured("json")  # a fraction of the time

    monkeypatch.setattr(sections, "_import_seconds", seconds)
    check_results(sections.measure_import(2), "import", ("import pmod",), ("user time",))
    assert sorted(asked) == ["pmod"] * 3 + ["torch, attrs"] * 3


def test_command_line(tmp_path):
    file = tmp_path / "bench.json"
    command = [sys.executable, "-m", "pmod.bench", "--only", "alone", "--rounds", "1", "--json", str(file)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    assert f"torch: {torch.__version__}" in done.stdout and "CPU: " in done.stdout
    written = json.loads(file.read_text())
    assert {result["section"] for result in written["results"]} == {"alone"}
    assert all(result["pmod_us"]["median"] > 0 for result in written["results"])
    assert written["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "launched", "message"),
    [
        (["--only", "host"], True, "env has started 2 ranks: only latency, ragged, step are measured on them"),
        (["--ranks", "1"], False, "--ranks is 1: a message needs 2 ranks or more"),
        (["--rounds", "0"], False, "--rounds is 0: pass 1 or more"),
        (["--peers"], True, "env has started 2 ranks: only latency, ragged, step are measured on them"),
        (["--only", "latency", "--check"], False, "--check: only host, peers, alone have bars"),
    ],
)
def test_wrong_arguments(arguments, launched, message, monkeypatch, capsys):
    if launched:
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_list_of_commands(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "pmod.__main__", raising=False)  # of another test in this process
    monkeypatch.setattr(sys, "argv", ["pmod"])
    runpy.run_module("pmod", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == ["pmod.demo", "pmod.bench", "pmod.collectives", "pmod.doctor"]
    for line in lines:
        assert importlib.util.find_spec(line.split()[2]) is not None
