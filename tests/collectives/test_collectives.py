"""Every Case of lib/table.py times every property of lib/properties.py, on threads and on real ranks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pmod
from tests.lib import oracle, properties, spmd
from tests.lib.listening import counted, listening, same
from tests.lib.properties import (
    DTYPES,
    EVERYWHERE,
    HEAVY,
    PAIRS,
    PROPERTIES,
    on_all,
    on_rank,
    simulated,
)
from tests.lib.table import CASES, Choices


@pytest.mark.parametrize(("prop", "case"), [pair for pair in PAIRS if pair[0] != "duals"])
def test_threads(prop: str, case: str) -> None:
    properties.threads(prop, case)


def draws(prop: str, case: str, everything: bool) -> list[dict[str, Any]]:
    if not everything:
        return [{}]
    if prop == "gradchecked":
        return [{"turn": 0}]
    if prop not in (*EVERYWHERE, "dtypes", "higher"):  # the wire does not know what the tensors are differentiated for
        return [{"turn": 0}]
    empty = [{"empty": True, "ndim": 2}]
    return [{"turn": turn} for turn in range(CASES[case].ways)] + empty


def many_on_rank(pairs: list[tuple[str, str]], axis: str, everything: bool) -> list[list[Any]]:
    with listening():
        return [
            [on_rank(case, prop, axis, str(draw), **draw) for draw in draws(prop, case, everything)]
            for prop, case in pairs
        ]


@pytest.mark.parametrize(
    ("axis", "sizes"),
    [
        ("x", {"x": 2}),
        ("x", {"x": 4}),
        *((axis, {"a": 2, "b": 2}) for axis in ("a", "b", "a,b", "b,a", "mesh[b,a]")),
    ],
    ids=str,
)
def test_processes(axis: str, sizes: dict[str, int]) -> None:
    props = EVERYWHERE
    if axis == "x":
        props = [prop for prop in PROPERTIES if prop not in HEAVY or sizes == {"x": 2}]
    # what more ranks, and ragged forms, which bind the rows of the others, may do otherwise
    own = (*EVERYWHERE, "dtypes", "messages", "untouched", "layouts")
    few = sizes == {"x": 2}
    pairs = [
        (prop, case) for prop, case in PAIRS if prop in props and (prop in own or (few and not case.endswith("_v")))
    ]
    results = spmd.launch(many_on_rank, pairs, axis, axis == "x", **sizes)
    for (prop, case), of_ranks in zip(pairs, zip(*results, strict=True), strict=True):
        for of_draw in zip(*of_ranks, strict=True):
            on_all(case, prop, axis, sizes, list(of_draw))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_drawn(data: st.DataObject) -> None:
    """Any case, shape, axis and size of axis: hypothesis looks for the draw that breaks one."""
    case = CASES[data.draw(st.sampled_from(sorted(CASES)), label="case")]
    sizes = data.draw(st.sampled_from([{"x": 2}, {"x": 4}, {"a": 2, "b": 2}, {"a": 3, "b": 2}, {"x": 5}]), label="mesh")
    names = data.draw(st.permutations(list(sizes)), label="axes")[: data.draw(st.integers(1, len(sizes)))]
    axis = data.draw(st.sampled_from(["{}", "mesh[{}]"]), label="axis").format(",".join(names))
    empty = data.draw(st.sampled_from([False] * 5 + [True]), label="empty")
    axes = tuple(sizes[name] for name in names)
    choices = Choices(lambda low, high: data.draw(st.integers(low, high)), empty=empty, axes=axes)
    drawn = case.draw(choices, len(oracle.groups(sizes, names)[0]))
    prop = data.draw(
        st.sampled_from(["value", "higher", "transforms", "batched", "layouts", "dtypes"]), label="property"
    )
    simulated(case.name, prop, axis, sizes, drawn=drawn)


# --- what the properties leave open -------------------------------------------------------------------------------


def large_on_rank() -> None:
    for case in CASES:
        on_rank(case, "value", "x", ndim=2, lengths=(60, 70))
    for case in ("psum", "pmean", "pmax", "psum_scatter", "reduce"):
        on_rank(case, "dtypes", "x", ndim=2, lengths=(60, 70))


def test_large_messages(run: Any) -> None:
    """Above the size from which a wire sends in parts; nothing divides evenly."""
    run(large_on_rank, x=4)


@pytest.mark.parametrize("ndim", [4, 5])
def test_channels_last(run: Any, ndim: int) -> None:
    run(properties.channels_last_on_rank, ndim, x=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["pmax", "pmin"])
def test_extrema(name: str, dtype: torch.dtype) -> None:
    """All ways to hold infinities, NaNs, ties and the largest finite number on three ranks."""
    pmod.simulate(properties.extremum_on_rank, name, dtype, x=3)


def zeros_on_rank() -> None:
    i, n = pmod.axis_index("x"), pmod.axis_size("x")
    held = [*itertools.product([0.0, -0.0], repeat=n), (-0.0, -1.0, -2.0)[:n], (0.0, -0.0, 1.0)[:n]]
    for dtype in DTYPES["float"]:
        for k in (1, 7):  # torch takes another zero where it computes several at once
            x = torch.tensor([column[i] for column in held], dtype=dtype).repeat(k)
            for f, extremum, any_or_all in ((pmod.pmax, max, all), (pmod.pmin, min, any)):
                values = [extremum(column) for column in held] * k
                minus = [any_or_all(math.copysign(1, y) < 0 for y in column) for column in held] * k
                for grads in (False, True):
                    y = f(x.clone().requires_grad_(grads), "x")
                    assert y.tolist() == values
                    at_zero = [m for m, v in zip(minus, values, strict=True) if v == 0]
                    assert y.signbit()[y == 0].tolist() == at_zero, f"{f.__name__} {dtype} {grads}"


@pytest.mark.parametrize("n", [2, 3])
def test_the_sign_of_zero(run: Any, n: int) -> None:
    """Plus zero is the larger one, on threads and on processes."""
    run(zeros_on_rank, x=n)


def eight_bits_on_rank(dtype: torch.dtype, count: int) -> None:
    i, n = pmod.axis_index("x"), pmod.axis_size("x")
    x = torch.full((n * count,), float(2**i)).to(dtype)
    total = {2: 3.0, 3: 7.0}[n]  # exact in these dtypes
    sums = {
        "psum": (pmod.psum(x, "x"), total), "psum_scatter": (pmod.psum_scatter(x, "x"), total),
        "reduce": (pmod.pick(pmod.reduce(x, "x", dst=1), "x", src=1), total),
        "pmax": (pmod.pmax(x, "x"), 2.0 ** (n - 1)), "pmin": (pmod.pmin(x, "x"), 1.0),
        "pmean": (pmod.pmean(x, "x", weight=2), torch.tensor(total / n).to(dtype).item()),
        "broadcast": (pmod.broadcast(x, "x", src=1), 2.0), "pshift": (pmod.pshift(x, "x"), 2.0 ** ((i - 1) % n)),
        "all_gather": (pmod.all_gather(x, "x")[-1:], 2.0 ** (n - 1)),
        "uneven": (pmod.pshift(x[: i + 1], "x", sizes=range(1, n + 1)), 2.0 ** ((i - 1) % n)),
    }  # fmt: skip
    for name, (y, expected) in sums.items():
        assert y.dtype == dtype and set(y.float().tolist()) == {expected}, name
    leaf = x.clone().requires_grad_()
    for f, expected in ((pmod.psum, 1.0), (pmod.pmax, float(i == n - 1)), (pmod.pvary, float(n))):
        (g,) = torch.autograd.grad(f(leaf, "x"), leaf, torch.ones(n * count).to(dtype))
        assert set(g.float().tolist()) == {expected}, f.__name__


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("n", [2, 3])
def test_eight_bit_floats(run: Any, dtype: torch.dtype, n: int) -> None:
    """They add up in float32, and compare, in a small message and in a large one."""
    run(eight_bits_on_rank, dtype, 2, x=n)
    run(eight_bits_on_rank, dtype, 12_000, x=n)


@pytest.mark.parametrize("count", [3, 20_000])
def test_sixteen_bit_sums(run: Any, count: int) -> None:
    run(properties.sixteen_on_rank, count, x=4)


def weight_on_rank() -> None:
    """The derivative with respect to the weight as well, against one process that holds all ranks' tensors."""
    generator = torch.Generator().manual_seed(0)
    xs = torch.rand(4, 4, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    ws = torch.rand(4, 4, 1, dtype=torch.float64, generator=generator, requires_grad=True)
    c = torch.rand(4, 2, dtype=torch.float64, generator=generator)
    serial = (c * ((ws * xs).sum(0) / ws.sum(0)).exp()).sum()
    first = torch.autograd.grad(serial, (xs, ws), create_graph=True)
    second = torch.autograd.grad(sum(g.sin().sum() for g in first), (xs, ws))
    i = pmod.axis_index("x")
    x, w = xs[i].detach().requires_grad_(), ws[i].detach().requires_grad_()
    y, sent = counted(lambda: pmod.pmean(x, "x", weight=w))
    assert len(sent) == 1, sent
    mine = torch.autograd.grad((c * y.exp()).sum(), (x, w), create_graph=True)
    mine_second = torch.autograd.grad(sum(g.sin().sum() for g in mine), (x, w))
    for got, expected in zip((*mine, *mine_second), (*first, *second), strict=True):
        same(got, expected[i].detach(), "a derivative of a weighted mean")


def test_weight(run: Any) -> None:
    run(weight_on_rank, x=4)


def mean_of_no_samples_on_rank() -> None:
    """Rank 0 has none: its mean is NaN, which counts for nothing, in the gradient neither."""
    i = pmod.axis_index("x")
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    errors = torch.arange(1.0, 1.0 + i, dtype=torch.float64) * pmod.pvary(w, "x")
    y = pmod.pmean(errors.mean(), "x", weight=len(errors))
    (g,) = torch.autograd.grad(y, w)
    assert (y.item(), g.item()) == (2 * (1 + 1 + 2) / 3, (1 + 1 + 2) / 3)
    # a NaN that counts comes through, and so does the derivative by a weight that is 0
    assert pmod.pmean(torch.tensor(float("nan")), "x", weight=i).isnan()
    weight = torch.tensor(float(i), requires_grad=True)
    z = pmod.pmean(torch.tensor(1.0 + i), "x", weight=weight)
    (d,) = torch.autograd.grad(z, weight)
    torch.testing.assert_close(d, (1.0 + i - z.detach()) / 3)


def test_mean_of_no_samples(run: Any) -> None:
    run(mean_of_no_samples_on_rank, x=3)


def test_fused_messages(run: Any) -> None:
    properties.fused_messages(run)


def numbers_on_rank() -> None:
    i = pmod.axis_index("x")
    same_type = {
        "int": (pmod.psum(2**60 + i, "x"), 2**61 + 1),
        "int of 64 bits": (pmod.psum(2**62, "x"), 2**63),
        "unsigned": (pmod.psum(2**64 - 1, "x"), 2**65 - 2),
        "negative": (pmod.psum(-(2**63) + i, "x"), -(2**64) + 1),
        "of both signs": (pmod.psum((-1) ** i * (2**33 + i), "x"), -1),
        "np.int64": (pmod.psum(np.int64(2**62), "x"), 2**63),
        "np.uint8": (pmod.psum(np.uint8(200), "x"), 400),
        "np.bool_": (pmod.psum(np.bool_(i == 0), "x"), 1),
        "np.float64": (pmod.psum(np.mean([0.5, 0.0]), "x"), 0.5),
        "np.float32, float": (pmod.psum(np.float32(0.5) if i else 0.25, "x"), 0.75),
        "np.complex64": (pmod.psum(np.complex64(1j), "x"), 2j),
        "mean of np.float64": (pmod.pmean(np.float64(i), "x"), 0.5),
        "mean of np.int32": (pmod.pmean(np.int32(i), "x"), 0.5),
        "mean of bool": (pmod.pmean(i == 0, "x"), 0.5),
        "mean of large ints": (pmod.pmean(2**62, "x"), 2.0**62),
        "weighted by numpy": (pmod.pmean(np.float32(1.0 + i), "x", weight=np.int64(3 * i)), 2.0),
        "max of np.float32": (pmod.pmax(np.float32(i), "x"), 1.0),
        "max of np.int64": (pmod.pmax(np.int64(2**62 + i), "x"), 2**62 + 1),
        "any of np.bool_": (pmod.pmax(np.bool_(i == 1), "x"), True),
        "min of np.float64": (pmod.pmin(np.float64(i - 0.5), "x"), -0.5),
        "float": (pmod.psum(0.5 + i, "x"), 2.0),
        "bool": (pmod.psum(i == 0, "x"), 1),
        "complex": (pmod.psum(1j + i, "x"), 1 + 2j),
        "mean of ints": (pmod.pmean(i, "x"), 0.5),
        "weighted": (pmod.pmean(1.0 + i, "x", weight=3 * i), 2.0),
        "max": (pmod.pmax(i - 5, "x"), -4),
        "min": (pmod.pmin(i + 0.5, "x"), 0.5),
        "any": (pmod.pmax(i == 1, "x"), True),
        "all": (pmod.pmin(i == 1, "x"), False),
    }
    for what, (got, expected) in same_type.items():
        assert (type(got), got) == (type(expected), expected), f"{what}: {got!r}"
    tree = pmod.psum({"loss": torch.ones(2), "seen": 3, "rest": [0.25, None]}, "x")
    assert tree["loss"].tolist() == [2, 2] and tree["seen"] == 6 and tree["rest"] == [0.5, None]


def test_numbers(run: Any) -> None:
    run(numbers_on_rank, x=2)


def test_numbers_of_two_types() -> None:
    """A rank without samples must not hold 0 where others hold 0.5."""
    with pytest.raises(pmod.MismatchError, match="float64"):
        pmod.simulate(lambda: pmod.psum(0.5 if pmod.axis_index("x") else 0, "x"), x=2)


def places_on_rank() -> None:
    mesh = pmod.current_mesh()
    rank = mesh.topology.rank
    for names in itertools.chain(itertools.permutations("abc", 1), itertools.permutations("abc", 2)):
        group = next(group for group in oracle.groups(mesh.shape, names) if rank in group)
        for axis in (names, mesh[names], names[0] if len(names) == 1 else names):
            assert (pmod.axis_index(axis), pmod.axis_size(axis)) == (group.index(rank), len(group))
            assert pmod.all_gather(torch.tensor([rank]), axis).tolist() == group
            pmod.barrier(axis)


def test_places(run: Any) -> None:
    run(places_on_rank, a=2, b=1, c=2)


def test_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """World size 1 without a launcher: no process group, by no road."""
    monkeypatch.setattr(pmod._ranks.groups, "connect", lambda *_: pytest.fail("a process group was asked for"))
    with pmod.set_mesh(pmod.make_mesh(a=1, x=1)):
        for prop, case in PAIRS:
            if prop in ("value", "gradient", "transforms", "dtypes", "duals"):
                on_rank(case, prop, "x", 0)
        pmod.barrier(("a", "x"))
        assert pmod.psum(3, "x") == 3 and pmod.pmean(0.5, ("x", "a")) == 0.5 and pmod.pmax(True, "x") is True
