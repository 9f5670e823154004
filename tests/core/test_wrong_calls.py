"""Wrong calls of every public function end in a PmodError, before anything is sent: some of those that are drawn."""

from __future__ import annotations

import inspect
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import pmod
from tests.lib import spmd
from tests.lib.wrong_calls import (
    ALONE,
    DEADLINE,
    NOT_DRAWN,
    ODD,
    RIGHT,
    Draw,
    drawn,
    in_a_rank,
    in_one_process,
    simulated,
    worst,
)

LARGE = ("2147483648", "4294967296")  # what a machine may have the memory for
SEEDS = [seed for seed in range(250) if not any(number in str(drawn(seed)) for number in LARGE)]
FINE = ("accepted", "clear", "memory")


@contextmanager
def deadline() -> Iterator[None]:
    """Only what hangs comes to it."""

    def too_late(*_: Any) -> None:
        raise AssertionError("no answer before the deadline")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module", autouse=True)
def _nothing_stays() -> Iterator[None]:
    yield
    pmod.shutdown()


def public() -> set[str]:
    """What can be called wrongly."""
    modules = {"": pmod, "fft.": pmod.fft, "nn.functional.": pmod.nn.functional, "testing.": pmod.testing}
    names: set[str] = set()
    for prefix, module in modules.items():
        for name, f in vars(module).items():
            error = inspect.isclass(f) and issubclass(f, Exception)
            own = prefix == "" or getattr(f, "__module__", "").startswith(module.__name__)
            if callable(f) and own and not name.startswith("_") and not error:
                names.add(prefix + name)
    return names


def test_every_public_function_is_drawn() -> None:
    drawn_from = {name for name in RIGHT if name in public()}
    assert public() - drawn_from == NOT_DRAWN
    assert {name.split(".")[0] for name in RIGHT} <= {*vars(pmod)}


@pytest.mark.parametrize("name", RIGHT)
def test_right_calls_are_taken(name: str) -> None:
    """So that one odd argument is what is wrong with a call."""
    if name in ("Mesh.group", "Mesh.from_device_mesh", "P.from_placements"):
        pytest.skip("its right argument is a group's or a DeviceMesh's, which simulated ranks do not have")
    place = in_one_process if name in (*ALONE, "draw_collective", "to_dtensors") else simulated
    with deadline():
        what, text = place(Draw(name, {}))
    assert what == "accepted", text


@pytest.mark.parametrize("place", [in_one_process, simulated])
def test_wrong_calls(place: Any) -> None:
    for seed in SEEDS:
        with deadline():
            what, text = place(drawn(seed))
        assert what in FINE, f"{what}: draw {seed}, {drawn(seed)}: {text}"


def test_wrong_calls_of_processes() -> None:
    seeds = [seed for seed in SEEDS if drawn(seed).name not in ALONE]
    told = spmd.launch(in_a_rank, seeds, DEADLINE, x=2)
    for seed, outcomes in zip(seeds, zip(*told, strict=True), strict=True):
        what, text = worst(list(outcomes))
        assert what in FINE, f"{what}: draw {seed}, {drawn(seed)}: {text}"


@pytest.mark.parametrize("draw", [
    Draw("psum", {"x": ("a cycle", False)}),
    Draw("global_norm", {"tree": ("zeros of torch.bool", False)}),
    Draw("fft.fftfreq", {"n": ("4.0", False)}),
    Draw("assert_invariant", {"tree": ("a tree with a text", False)}),
    Draw("share_parameters", {"module": ("lazy module", False)}),
    Draw("data_parallel", {"module": ("lazy module", False)}),
    Draw("replicate", {"x": ("lazy module", False)}),
    Draw("split_sizes", {"parts": (str(2**62), False)}),
    Draw("simulate", {"x": (str(2**31), False)}),
    Draw("all_gather", {"tiled": ("tensor([0, 1])", False)}),
    Draw("pshift", {"wrap": ("torn", False)}),
    Draw("start", {"f": ("None", False)}),
    Draw("draw_collective", {"perm": ("[1]", False)}),
    Draw("axis_size", {"axis": ("mkldnn", False)}),
    Draw("axis_size", {"axis": ("zeros of torch.uint4", False)}),
    Draw("shard", {"sizes": ("{0: 1}", False)}),
    Draw("shard", {"sizes": ("a set", False)}),
    Draw("unshard", {"sizes": (repr([2**62, 2**62])[:40], False)}),
    Draw("assert_invariant", {"rtol": (repr(10**400)[:40], False)}),
    Draw("fft.fftfreq", {"d": (repr(10**400)[:40], False)}),
    Draw("fft.ifftn", {"axis": ("()", False)}, {"out_dim": "(0, 1)"}),
    Draw("start", {"axis": ("lazy buffer", False)}),
    Draw("estimate", {"bandwidth": ("{0.5: 'x'}", False)}),
    Draw("psum", {"reduce_dtype": ("torch.float8_e4m3fn", False)}),
    Draw("pscan", {"exclusive": ("torn", False)}),
], ids=str)  # fmt: skip
def test_what_was_raw_or_taken(draw: Draw) -> None:
    assert all(what in ODD for what, _ in draw.odd.values())
    for place in (in_one_process, simulated):
        with deadline():
            assert place(draw)[0] == "clear", place(draw)
