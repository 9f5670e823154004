"""`debug`: a catalogue of wrong programs, each beside a twin that is right, and what makes the checker trustworthy."""

from __future__ import annotations

import functools
import os
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import pmod
from pmod._ranks import world
from pmod._wire import waiting
from tests.lib import spmd
from tests.lib.listening import listening
from tests.lib.properties import PROPERTIES, applies, on_rank
from tests.lib.started import run_ranks
from tests.lib.table import CASES

Tensor = torch.Tensor


# --- the catalogue ------------------------------------------------------------------------------------------------


@attrs.frozen
class Mistake:
    """A program as it is written by mistake (True) and as it should be (False), and what debug says of the first."""

    program: Callable[[bool], Any]
    says: str
    line: str  # of the user's code, which the error shows
    axes: dict[str, int] = attrs.field(factory=lambda: {"x": 2})


CATALOGUE: dict[str, Mistake] = {}


def mistake(says: str, line: str, **axes: int) -> Callable[[Callable[[bool], Any]], Callable[[bool], Any]]:
    def note(program: Callable[[bool], Any]) -> Callable[[bool], Any]:
        CATALOGUE[program.__name__] = Mistake(program, says, line, axes or {"x": 2})
        return program

    return note


def me() -> int:
    return pmod.current_mesh().topology.rank


def data(*shape: int) -> Tensor:
    """Other numbers on each rank."""
    return torch.rand(shape or (4, 3), generator=torch.Generator().manual_seed(me()))


def net(seed: int = 0, width: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 3))


def with_pvary(model: nn.Module, x: Tensor) -> Tensor:
    return functional_call(model, pmod.pvary(dict(model.named_parameters()), "x"), x)


# calls that differ


@mistake(r"differ in shapes", "pmod.psum(torch.ones(length)")
def one_rank_has_more_samples(wrong: bool) -> None:
    length = 3 if wrong and me() else 2
    pmod.psum(torch.ones(length), "x")


@mistake(r"differ in dtypes", 'pmod.psum(x, "x")')
def one_rank_in_half_precision(wrong: bool) -> None:
    x = torch.ones(2).half() if wrong and me() else torch.ones(2)
    pmod.psum(x, "x")


@mistake(r"dtypes: float64\n(.|\n)*dtypes: int64", 'pmod.psum(loss if seen else 0, "x")')
def a_rank_without_samples_counts_0(wrong: bool) -> None:
    seen = not (wrong and me())
    loss = 0.5
    pmod.psum(loss if seen else 0, "x")


@mistake(r"rank 1 \(x=1\) \(has left\)", 'pmod.psum(x, "x")')
def only_the_first_rank_logs_the_sum(wrong: bool) -> None:
    x = torch.ones(2)
    if me() == 0 or not wrong:
        pmod.psum(x, "x")


@mistake(r"differ in function", 'pmod.pmean(x, "x")')
def one_rank_sums_and_the_other_averages(wrong: bool) -> None:
    x = torch.ones(2)
    if wrong and me():
        pmod.pmean(x, "x")
    else:
        pmod.psum(x, "x")


@mistake(r"differ in function, arguments", 'pmod.all_gather(x, "x")')
def two_calls_in_another_order(wrong: bool) -> None:
    x = torch.ones(2)
    calls = [lambda: pmod.psum(x, "x"), lambda: pmod.all_gather(x, "x")]
    for call in reversed(calls) if wrong and me() else calls:
        call()


@mistake(r"wait for each other", 'pmod.psum(x, "b")', a=2, b=2)
def another_axis_on_some_ranks(wrong: bool) -> None:
    x = torch.ones(2)
    if wrong and me() in (1, 2):
        pmod.psum(x, "b")
    else:
        pmod.psum(x, "a")
    if not wrong:
        pmod.psum(x, "b")


@mistake(r"wait for each other", 'pmod.psum(torch.ones(2), ("b", "a"))', a=2, b=2)
def axes_of_a_tuple_in_another_order(wrong: bool) -> None:
    if wrong and me() in (1, 2):
        pmod.psum(torch.ones(2), ("b", "a"))
    else:
        pmod.psum(torch.ones(2), ("a", "b"))


@mistake(r"differ in arguments", "pmod.all_gather(x, ")
def gathered_along_another_dim(wrong: bool) -> None:
    x = torch.ones(2, 2)
    pmod.all_gather(x, "x", dim=1 if wrong and me() else 0)


@mistake(r"differ in arguments", "pmod.broadcast(x, ")
def each_thinks_that_it_is_the_root(wrong: bool) -> None:
    x = torch.ones(2)
    pmod.broadcast(x, "x", src=me() if wrong else 0)


@mistake(r"differ in arguments", "pmod.pshift(x, ")
def other_sizes(wrong: bool) -> None:
    n = pmod.axis_size("x")
    x = torch.ones(1 + me())
    pmod.pshift(x, "x", sizes=[rank + 1 + (wrong and rank != me()) for rank in range(n)])


@mistake(r"differ in arguments", "pmod.ppermute(x, ")
def a_ring_in_both_directions(wrong: bool) -> None:
    x, n = data(2), 3
    step = -1 if wrong and me() else 1
    pmod.ppermute(x, "x", [(i, (i + step) % n) for i in range(n)])


CATALOGUE["a_ring_in_both_directions"] = attrs.evolve(CATALOGUE["a_ring_in_both_directions"], axes={"x": 3})


@mistake(r"the sizes contradict each other(.|\n)*sends 1 to rank 1 \(x=1\), which expects 2", "pmod.all_to_all_v(x")
def expected_sizes_that_are_not_sent(wrong: bool) -> None:
    x = torch.ones(3)
    sent, expected = [((1, 2), (1, 2)), ((2, 1), (2, 1))][me()]
    if wrong and me() == 0:
        sent, x = (1, 1), torch.ones(2)
    pmod.all_to_all_v(x, "x", send_sizes=sent, recv_sizes=expected)


@mistake(r"sends 2 to rank 0 \(x=0\), which expects 1", "pmod.all_to_all_v(x")
def sizes_of_the_last_step(wrong: bool) -> None:
    counts = [[0, 1], [2, 0]]
    expected = [[0, 1 if wrong else 2], [1, 0]][me()]
    x = torch.ones(sum(counts[me()]))
    pmod.all_to_all_v(x, "x", send_sizes=counts[me()], recv_sizes=expected)


@mistake(r"differ in arguments", "pmod.unshard(x")
def sizes_of_ones_own(wrong: bool) -> None:
    x = torch.ones(2)
    pmod.unshard(x, "x", sizes=(2, 1) if wrong and me() == 0 else (3, 2) if wrong else (2, 2))


@mistake(r"differ in arguments", "pmod.psum(x")
def sums_in_another_precision(wrong: bool) -> None:
    x = torch.ones(2, dtype=torch.bfloat16)
    pmod.psum(x, "x", reduce_dtype=torch.float64 if wrong and me() else None)


@mistake(r"differ in shapes", "pmod.psum(metrics")
def a_metric_that_only_one_rank_has(wrong: bool) -> None:
    metrics = {"loss": torch.ones(2), "error": torch.ones(2)}
    if wrong and me():
        del metrics["error"]
    pmod.psum(metrics, "x")


@mistake(r"differ in called at", 'pmod.psum(x * 2, "x")')
def branches_that_happen_to_fit(wrong: bool) -> None:
    x = torch.ones(2)
    if wrong and me():
        pmod.psum(x * 2, "x")
    else:
        pmod.psum(x, "x")


@mistake(r"rank 0 \(x=0\) waits for rank 1 \(x=1\) \(has left\)", "pmod.psum(part.sum()")
def another_number_of_batches(wrong: bool) -> None:
    for part in torch.ones(6).split(3 if wrong and me() else 2):
        pmod.psum(part.sum(), "x")


@mistake(r"\(has left\)", "pmod.pmean(loss, ")
def stops_on_its_own_loss(wrong: bool) -> None:
    for step in range(3):
        loss = torch.tensor(1.0 / (step + 1 + 5 * me()))
        mean = pmod.pmean(loss, "x")
        if (loss if wrong else mean) < 0.2:
            break


@mistake(r"differ in function", 'pmod.barrier("x")')
def a_barrier_on_one_rank(wrong: bool) -> None:
    if me() or not wrong:
        pmod.barrier("x")
    pmod.psum(torch.ones(1), "x")


@mistake(r"differ in", "pmod.start(pmod.psum")
def started_in_another_order(wrong: bool) -> None:
    x = torch.ones(2)
    if wrong and me():
        second = pmod.start(pmod.all_gather, x, "x")
        first = pmod.start(pmod.psum, x, "x")
    else:
        first = pmod.start(pmod.psum, x, "x")
        second = pmod.start(pmod.all_gather, x, "x")
    first.wait()
    second.wait()


@mistake(r"differ in shapes|has left", 'pmod.psum(x, "x")')
def an_exception_that_one_rank_swallows(wrong: bool) -> None:
    for step in range(2):
        try:
            if step == 0 and (me() and wrong):
                raise ValueError("a bad sample")
            x = torch.ones(2 + step)
            pmod.psum(x, "x")
        except ValueError:
            continue


@mistake(r"differ in requires grad, transforms", "pmod.psum(x.sin()")
def a_transform_on_one_rank(wrong: bool) -> None:
    def f(x: Tensor) -> Tensor:
        return pmod.psum(x.sin(), "x").sum()

    x = torch.ones(2)
    if wrong and me():
        f(x)
    else:
        grad(f)(x)


@mistake(r"differ in shapes, transforms", "pmod.psum(x")
def mapped_on_one_rank(wrong: bool) -> None:
    def f(x: Tensor) -> Tensor:
        return pmod.psum(x, "x")

    x = torch.ones(2, 2)
    if wrong and me():
        f(x)
    else:
        vmap(f)(x)


# gradients that only some ranks want


@mistake(r"differ in requires grad", "pmod.all_gather(x")
def frozen_on_one_rank(wrong: bool) -> None:
    x = data(2).requires_grad_(not (wrong and me()))
    pmod.all_gather(x, "x")


@mistake(r"differ in requires grad", "pmod.all_gather(x")
def no_grad_on_one_rank(wrong: bool) -> None:
    x = data(2).requires_grad_()
    with torch.set_grad_enabled(not (wrong and me())):
        pmod.all_gather(x, "x")


@mistake(r"in the backward of all_gather", 'y = pmod.all_gather(x * 2, "x")')
def detached_on_one_rank(wrong: bool) -> None:
    x = data(2).requires_grad_()
    y = pmod.all_gather(x * 2, "x")
    if wrong and me():
        y = y.detach()
    (y.sum() * x.sum()).backward()


@mistake(r"in the backward of pshift", 'y = pmod.pshift(x * 2, "x")')
def unused_on_the_last_rank(wrong: bool) -> None:
    x = data(2).requires_grad_()
    y = pmod.pshift(x * 2, "x")
    last = me() == 1
    (x.sum() + (0 if wrong and last else y.sum() * (not last))).backward()


@mistake(r"has left|differ in", "loss.backward()|pmod.pvary")
def backward_on_one_rank(wrong: bool) -> None:
    w = torch.rand(2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = (pmod.pvary(w, "x") * data(2)).sum()
    if me() == 0 or not wrong:
        loss.backward()


@mistake(r"differ in function|has left|differ in", "pmod.all_gather(x.sin()")
def checkpointed_on_one_rank(wrong: bool) -> None:
    def f(x: Tensor) -> Tensor:
        return (pmod.all_gather(x.sin(), "x") * data(4)).sum()

    x = data(2).requires_grad_()
    if wrong and me():
        f(x).backward()
    else:
        checkpoint(f, x, use_reentrant=False).backward()


# one value that is not one


@mistake(r"x\[\d, \d\] goes from .* all ranks should hold the same", "pmod.pvary(w")
def weights_from_different_seeds(wrong: bool) -> None:
    w = net(seed=me() if wrong else 0)[0].weight
    pmod.pvary(w, "x")


@mistake(r"x\[\d\] goes from", "pmod.shard(samples")
def shuffled_differently(wrong: bool) -> None:
    samples = torch.arange(8)[torch.randperm(8, generator=torch.Generator().manual_seed(me() if wrong else 0))]
    pmod.shard(samples, "x")


@mistake(r"x\[\d, \d\] goes from", 'pmod.shard(h, "x")')
def dropout_of_one_value(wrong: bool) -> None:
    h = torch.ones(4, 3)
    torch.manual_seed(me() if wrong else 0)
    h = nn.functional.dropout(h, 0.5)
    pmod.shard(h, "x")


@mistake(r"x\[\d\] goes from", 'pmod.shard(whole, "x")')
def changed_in_place_after_the_gather(wrong: bool) -> None:
    whole = pmod.unshard(data(2), "x")
    whole[me() if wrong else 0] += 1
    pmod.shard(whole, "x")


@mistake(r"in backward, the gradient goes from 1 to 2", "y = pmod.psum(x.sum()")
def one_value_weighted_by_rank(wrong: bool) -> None:
    x = data(2).requires_grad_()
    y = pmod.psum(x.sum(), "x")
    (y * (1 + me() if wrong else 2)).backward()


@mistake(r"in backward, the gradient\[\d\] goes from", "y = pmod.unshard(x")
def a_whole_used_in_ones_own_way(wrong: bool) -> None:
    x = data(2).requires_grad_()
    y = pmod.unshard(x, "x") if wrong else pmod.all_gather(x, "x")
    (y * data(4)).sum().backward()


@mistake(r"x goes from", "pmod.place(loss")
def a_varying_loss_placed(wrong: bool) -> None:
    loss = data(4).sum()
    pmod.place(loss if wrong else pmod.psum(loss, "x"), "x")


@mistake(r"x\[0\] goes from", "pmod.pvary(rate")
def a_learning_rate_that_drifts(wrong: bool) -> None:
    loss = data(4).sum()
    rate = torch.ones(1) / (1 + (loss if wrong else pmod.pmean(loss, "x")))
    pmod.pvary(rate, "x")


# forgotten pvary, and sums of what is summed


@mistake(r"the parameter .* of Sequential.* same on all ranks.* without pvary", "loss = model(x).square().sum()")
def data_parallel_without_pvary(wrong: bool) -> None:
    model, x = net(), data()
    loss = model(x).square().sum() if wrong else with_pvary(model, x).square().sum()
    pmod.psum(loss, "x").backward()


@mistake(r"weight of Linear", "h = torch.tanh(below(x))")
def megatron_without_copying_in(wrong: bool) -> None:
    below, x = net()[0], torch.rand(4, 3, generator=torch.Generator().manual_seed(7))
    columns, rows = (nn.Linear(3, 3, bias=False) for _ in range(2))
    for layer in (columns, rows):
        layer.weight.data = data(3, 3)
    h = torch.tanh(below(x))
    h = columns(h if wrong else pmod.pvary(h, "x"))
    pmod.psum(rows(torch.tanh(h)), "x").sum().backward()


@mistake(r"the result of pmean, one value \(I\), meets varying data without pvary", 'mean = pmod.pmean(x.mean(0), "x")')
def a_norm_without_pvary(wrong: bool) -> None:
    x = data().requires_grad_()
    mean = pmod.pmean(x.mean(0), "x")
    centred = x - (mean if wrong else pmod.pvary(mean, "x"))
    pmod.psum((centred**3).sum(), "x").backward()


@mistake(r"the result of pmax|the result of psum", 'total = pmod.psum(e.sum(-1), "x")')
def a_split_softmax_without_pvary(wrong: bool) -> None:
    logits = data().requires_grad_()
    e = logits.exp()
    total = pmod.psum(e.sum(-1), "x")
    p = e / (total if wrong else pmod.pvary(total, "x"))[:, None]
    pmod.psum((p * data()).sum(), "x").backward()


@mistake(r"a parameter of shape \(3,\) is the same", "y = x * (scale if wrong")
def a_norms_weight_without_pvary(wrong: bool) -> None:
    scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    x = data()
    y = x * (scale if wrong else pmod.pvary(scale, "x"))
    pmod.psum(y.sum(), "x").backward()


@mistake(r"the parameter .* of Sequential", "u = model(x)")
def a_pinn_without_pvary(wrong: bool) -> None:
    model, x = net(), data().requires_grad_()
    u = model(x) if wrong else with_pvary(model, x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    pmod.pmean((slope**2).mean(), "x").backward()


@mistake(r"a leaf of shape \(3,\) is the same", "x * (conductivity if wrong")
def a_physical_constant_without_pvary(wrong: bool) -> None:
    conductivity = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    x = data()
    pmod.pmean((x * (conductivity if wrong else pmod.pvary(conductivity, "x"))).mean(), "x").backward()


@mistake(r"pmod.backward.*the parameter .* of Linear", "out = head(h) if wrong")
def one_layer_forgotten_and_no_sum(wrong: bool) -> None:
    model, head, x = net(), net(1)[0], data()
    h = with_pvary(model, x)
    out = head(h) if wrong else with_pvary(head, h)
    out.sum().backward()


@mistake(r"result of psum, one value \(I\) already: this would multiply by 2", 'loss = pmod.psum(x.sum(), "x")')
def summed_twice(wrong: bool) -> None:
    x = data().requires_grad_()
    loss = pmod.psum(x.sum(), "x")
    (pmod.psum(loss, "x") if wrong else loss).backward()


@mistake(r"one value \(I\) already: this is the same value 2 times", 'loss = pmod.pmean(x.mean(), "x")')
def a_mean_of_means(wrong: bool) -> None:
    x = data().requires_grad_()
    loss = pmod.pmean(x.mean(), "x")
    (pmod.pmean(loss, "x") if wrong else loss).backward()


@mistake(r"the result of unshard, one value \(I\)|result of unshard", 'whole = pmod.unshard(x, "x")')
def a_sum_over_what_all_hold(wrong: bool) -> None:
    x = data(2).requires_grad_()
    whole = pmod.unshard(x, "x")
    loss = whole.square().sum()
    (pmod.psum(loss, "x") if wrong else loss).backward()


@mistake(r"the parameter .* of Sequential|already", "loss = model(x).mean()")
def data_parallel_and_a_mean(wrong: bool) -> None:
    model, x = pmod.data_parallel(net(), "x"), data()
    loss = model(x).mean()
    (pmod.pmean(loss, "x") if wrong else loss).backward()


def test_the_catalogue_is_long_enough() -> None:
    assert len(CATALOGUE) >= 40


@contextmanager
def strict() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("name", CATALOGUE)
def test_what_is_wrong_is_named(name: str) -> None:
    found = CATALOGUE[name]

    def run() -> None:
        with pmod.debug(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a bias of zeros, before the weight
            found.program(True)

    with pytest.raises(pmod.MismatchError, match=found.says) as caught:
        pmod.simulate(run, **found.axes)
    assert any(line in str(caught.value) for line in found.line.split("|")), caught.value
    assert "test_debug.py:" in str(caught.value)


@pytest.mark.parametrize("name", CATALOGUE)
def test_what_is_right_passes_in_silence(name: str) -> None:
    found = CATALOGUE[name]

    def run() -> None:
        with pmod.debug():
            found.program(False)

    with strict():
        pmod.simulate(run, **found.axes)


# --- on real ranks ------------------------------------------------------------------------------------------------

# those in which each rank still calls something, so that all of them know
ON_REAL_RANKS = [
    name
    for name, found in CATALOGUE.items()
    if found.axes == {"x": 2} and not any(word in found.says for word in ("has left", "in the backward of"))
]


def catalogue_on_rank(wrong: bool) -> list[str]:
    said = []
    for name in ON_REAL_RANKS:
        with pmod.debug(), warnings.catch_warnings():
            warnings.simplefilter("ignore" if wrong else "error", RuntimeWarning)
            try:
                CATALOGUE[name].program(wrong)
                said.append("")
            except pmod.MismatchError as error:
                said.append(str(error))
    return said


def test_every_rank_of_the_axis_raises() -> None:
    for said in spmd.launch(catalogue_on_rank, True, x=2):
        for name, text in zip(ON_REAL_RANKS, said, strict=True):
            assert text, f"{name}: a rank did not raise"


def test_right_programs_pass_on_real_ranks() -> None:
    assert spmd.launch(catalogue_on_rank, False, x=2) == [[""] * len(ON_REAL_RANKS)] * 2


# --- no false alarms ----------------------------------------------------------------------------------------------

# `value` calls place on some ranks only, which sends nothing; `messages` counts what debug adds to
SAME_ROWS = ("pmin", "ppermute", "pshuffle", "all_gather_v", "psum_scatter_v", "gather_v", "scatter_v", "all_to_all_v")
QUIET = [prop for prop in PROPERTIES if prop not in ("messages", "duals", "gradchecked", "value")]


@pytest.mark.parametrize("prop", QUIET)
def test_the_table_passes_under_debug(prop: str) -> None:
    def run(name: str) -> None:
        with pmod.debug(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # losses that vary and happen to be equal
            on_rank(name, prop, "x", "debug", turn=0)

    for name, case in CASES.items():
        # one function for each row, and the ragged exchange
        if applies(prop, case) and name not in SAME_ROWS:
            with listening():
                pmod.simulate(run, name, x=2)


# --- the parts ----------------------------------------------------------------------------------------------------


def test_it_can_be_a_statement_and_leaves_nothing_behind() -> None:
    backward, take_gradient = torch.autograd.backward, torch.autograd.grad

    def differs() -> None:
        pmod.psum(torch.ones(2 + me()), "x")

    def run() -> None:
        pmod.debug()
        with pytest.raises(pmod.MismatchError):
            differs()
        with pmod.debug(False):
            assert not watching()
        assert watching()
        pmod.debug(False)
        assert not watching()

    pmod.simulate(run, x=2)
    assert (torch.autograd.backward, torch.autograd.grad) == (backward, take_gradient)
    assert not torch.is_anomaly_enabled()


def watching() -> bool:
    return bool(pmod._core.watch.watchers())


def test_a_simulation_is_watched_as_its_caller_is() -> None:
    with pmod.debug(), pytest.raises(pmod.MismatchError, match="differ in shapes"):
        pmod.simulate(lambda: pmod.psum(torch.ones(2 + me()), "x"), x=2)
    assert pmod.simulate(watching, x=2) == [False, False]


def test_tolerance() -> None:
    def run(rtol: float) -> None:
        with pmod.debug(rtol=rtol):
            pmod.pvary(torch.tensor([1.0, 1.0 + 1e-6 * me()], dtype=torch.float64), "x")

    pmod.simulate(run, 1e-5, x=2)
    with pytest.raises(pmod.MismatchError, match=r"x\[1\] goes from 1 to 1\.000001 .* a difference of 1e-06"):
        pmod.simulate(run, 0.0, x=2)
    with pytest.raises(pmod.MismatchError):
        pmod.simulate(run, 1e-7, x=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.bool])
def test_assert_invariant(dtype: torch.dtype) -> None:
    def run(differing: bool) -> None:
        tree = {"a": torch.ones(2, 3).to(dtype), "b": [torch.zeros(0), None]}
        if differing and me() == 1:
            tree["a"][1, 2] = 0
        pmod.assert_invariant(tree, "x")

    pmod.simulate(run, False, x=2)
    with pytest.raises(pmod.MismatchError, match=r"pmod.assert_invariant.*leaf 0\[1, 2\] goes from 0 to 1"):
        pmod.simulate(run, True, x=2)


def test_assert_invariant_finds_a_nan_and_takes_a_tolerance() -> None:
    def run(value: float, rtol: float) -> None:
        pmod.assert_invariant(torch.tensor([1.0, value if me() else 1.0]), "x", rtol=rtol)

    pmod.simulate(run, 1.001, 0.01, x=2)
    for value, rtol in ((1.001, 1e-4), (torch.nan, 0.0), (torch.nan, 0.1), (torch.inf, 0.1)):
        with pytest.raises(pmod.MismatchError, match=r"x\[1\] goes"):
            pmod.simulate(run, value, rtol, x=2)


def biased(mark: bool) -> int:
    """How often a column-parallel layer whose biases start at 0 is remarked on."""
    layer = nn.Linear(3, 2)
    layer.weight.data = data(2, 3)
    nn.init.zeros_(layer.bias)
    if mark:
        assert pmod.mark_varying(layer.bias, "x") is layer.bias
    with pmod.debug(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            pmod.psum(layer(pmod.pvary(torch.ones(1, 3), "x")).square().sum(), "x").backward()
    assert all("the parameter bias of Linear is the same on all ranks" in str(one.message) for one in said)
    return len(said)


def test_what_only_starts_equal_is_remarked_on_once_or_marked() -> None:
    # simulated ranks share the interpreter's record of warnings: each adds its own
    assert sum(pmod.simulate(biased, True, x=2)) == 0
    assert max(pmod.simulate(biased, False, x=2)) >= 1
    assert spmd.launch(biased, False, x=2) == [1, 1]


def test_leaves_that_one_call_took_together_are_told_apart() -> None:
    def run(right: bool) -> None:  # parameters of which some are cut over "model", in one message over "data"
        cut, whole = pmod.pick(data(3), "data").requires_grad_(), torch.ones(3, requires_grad=True)
        with pmod.debug():
            held = pmod.pvary({"cut": cut, "whole": whole}, "data")
            here = held["cut"] * (1.0 if right else held["whole"])
            pmod.psum((pmod.psum(here, "model") + held["whole"]).sum(), "data").backward()

    with strict():
        pmod.simulate(run, True, data=2, model=2)
    with pytest.warns(RuntimeWarning, match=r"a leaf of shape \(3,\) is the same on all ranks"):
        pmod.simulate(run, False, data=2, model=2)


def test_a_varying_loss_that_is_the_same_everywhere() -> None:
    def run(gather: Callable[..., Tensor]) -> None:
        x = data(2).requires_grad_()
        with pmod.debug():
            gather(x, "x").sum().backward()

    with strict():
        pmod.simulate(run, pmod.unshard, x=2)
    with pytest.warns(RuntimeWarning, match="Did you mean unshard, pmean or pick"):
        pmod.simulate(run, pmod.all_gather, x=2)


def test_checked_checks_once_per_signature() -> None:
    seen: list[bool] = []

    @pmod.checked
    def step(x: Tensor) -> Tensor:
        """Doc."""
        seen.append(watching())
        return pmod.psum(x, "x")

    def run() -> None:
        for x in (torch.ones(2), torch.ones(2), torch.ones(3), torch.ones(3), torch.ones(2, dtype=torch.int64)):
            step(x)
        with torch.no_grad():
            step(torch.ones(2))
        step(torch.ones(2).requires_grad_())

    assert step.__doc__ == "Doc."
    pmod.simulate(run, x=1)
    assert seen == [True, False, True, False, True, True, True]
    with pytest.raises(pmod.MismatchError, match="differ in shapes"):
        pmod.simulate(lambda: step(torch.ones(2 + me())), x=2)


def compiled_on_rank() -> list[str]:
    torch._dynamo.reset()
    f = torch.compile(lambda x: pmod.psum(x, "x") * 2, backend="aot_eager")
    with pmod.debug(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert f(torch.ones(2)).tolist() == [4.0, 4.0]
    return [str(one.message) for one in said if "pmod" in str(one.message)]


def test_compiled_code_is_said_to_be_unchecked() -> None:
    for said in spmd.launch(compiled_on_rank, x=2):
        assert said == ["pmod.debug: compiled code is not checked.\nRun the eager function under debug."]


# --- waits on real ranks ------------------------------------------------------------------------------------------


def crossed() -> str:
    with pmod.debug():
        pmod.psum(torch.ones(1), ("a", "b"))
        axis = "a" if me() in (0, 3) else "b"
        with pytest.raises(pmod.MismatchError) as caught:
            pmod.psum(torch.ones(1), axis)
    return str(caught.value)


def test_ranks_that_wait_for_each_other_on_two_axes_find_out() -> None:
    for rank, text in enumerate(spmd.launch(crossed, a=2, b=2)):
        assert text.startswith(f"pmod.psum(axis='{'abba'[rank]}') at (a={rank // 2}, b={rank % 2}): the ranks wait")
        for other in range(4):
            assert f"rank {other} (a={other // 2}, b={other % 2}) waits in psum at " in text


def crossed_and_on() -> int:
    crossed()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waiting, "LOOK", 0.1)
        if me() == 3:
            time.sleep(1.0)  # the others look at what it has said meanwhile
        return int(pmod.psum(torch.tensor(1), ("a", "b")).item())


def test_ranks_that_debug_has_stopped_in_time_go_on() -> None:
    assert spmd.launch(crossed_and_on, a=2, b=2) == [4] * 4


def left_alone() -> str:
    pmod.barrier("x")  # connected: the deadline below is too short for ranks that are just beginning
    with pmod.set_mesh(pmod.make_mesh(x=2, timeout=3)), pmod.debug():
        pmod.psum(torch.ones(1), "x")
        text = ""
        if me() == 1:
            with pytest.raises(pmod.CollectiveTimeout) as caught:
                pmod.psum(torch.ones(1), "x")
            text = str(caught.value)
        spmd.meet(2)  # a rank that returned would be named as one that has
    return text


def test_a_rank_that_has_stopped_calling() -> None:
    _, text = spmd.launch(left_alone, x=2)
    assert text.startswith("pmod.psum(axis='x') at (x=1): not all ranks came within 3 s. Missing: rank 0 (x=0).")
    assert "test_debug.py:" in text and 'pmod.psum(torch.ones(1), "x")' in text


def interrupted() -> float:
    """One rank is interrupted while it waits alone, and takes back what it said."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    with pmod.debug():
        pmod.psum(torch.ones(1), "x")
        if me() == 1:
            before = signal.signal(signal.SIGALRM, interrupt)
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                pmod.psum(torch.ones(2), "x")
            signal.signal(signal.SIGALRM, before)
        spmd.meet(2)
        return pmod.psum(torch.ones(3), "x").sum().item()


def test_a_rank_that_is_interrupted_takes_back_what_it_said() -> None:
    assert spmd.launch(interrupted, x=2) == [6, 6]


def server_stands_still(folder: Path) -> str:
    """The first rank serves the store, and is stopped by the other one."""
    pmod.shutdown()
    if me() == 0:
        store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
        (folder / "port").write_text(str(store.port))
        (folder / "port").rename(folder / f"pid {os.getpid()}")
    else:
        while not (found := list(folder.glob("pid *"))):
            time.sleep(0.01)
        pid = int(found[0].name.removeprefix("pid "))
        store = dist.TCPStore("127.0.0.1", int(found[0].read_text()), 2, is_master=False)
    dist.init_process_group("gloo", store=store, rank=me(), world_size=2)
    text = ""
    with pmod.set_mesh(pmod.make_mesh(x=2, timeout=3)), pmod.debug():
        pmod.psum(torch.ones(1), "x")
        if me() == 1:
            os.kill(pid, signal.SIGSTOP)
            try:
                for _ in range(2):  # the thread of the first still waits for its answer
                    with pytest.raises(pmod.CollectiveTimeout) as caught:
                        pmod.psum(torch.ones(1), "x")
                text = str(caught.value)
            finally:
                os.kill(pid, signal.SIGCONT)
            while world.processes().busy:
                time.sleep(0.01)
            (folder / "on").touch()
        while not (folder / "on").exists():
            time.sleep(0.01)
        assert pmod.psum(torch.ones(1), "x").item() == 2
    pmod.shutdown()
    dist.destroy_process_group()
    return text


def test_a_store_whose_server_stands_still(tmp_path: Path) -> None:
    """torch waits for its answer for ever."""
    _, text = spmd.launch(server_stands_still, tmp_path, timeout=60, x=2)
    missing = r"Missing: rank 0 \(x=0\): its process \d+ on \S+ is stopped.\nCalled at .*test_debug.py:"
    assert re.match(rf"pmod.psum\(axis='x'\) at \(x=1\): not all ranks came within 3 s. {missing}", text), text


def from_cell(number: int, rank_of: Callable[[], int]) -> Any:
    """A psum as a cell of Jupyter calls it, whose file is named after the process."""
    code = compile("result = pmod.psum(1.0, 'data')", f"/tmp/ipykernel_{1000 + rank_of()}/{number}.py", "exec")
    names: dict[str, Any] = {"pmod": pmod}
    exec(code, names)
    return names["result"]


def test_a_cell_is_the_same_place_on_all_ranks() -> None:
    def me() -> int:
        return pmod.axis_index("data")

    with pmod.debug():
        assert pmod.simulate(lambda: from_cell(7, me), data=2) == [2.0, 2.0]
        with pytest.raises(pmod.MismatchError, match=r"the ranks differ in called at:\n.* at cell 7:1\n.* at cell 8:1"):
            pmod.simulate(lambda: from_cell(7 + me(), me), data=2)


@pytest.mark.parametrize("f", ["text", None, 3])
def test_checked_takes_what_can_be_called(f: Any) -> None:
    with pytest.raises(pmod.ArgumentError) as raised:
        pmod.checked(f)
    assert str(raised.value) == f"pmod.checked: f is {f!r}.\nPass a step function: @pmod.checked above its def."


# --- one place on all nodes ---------------------------------------------------------------------------------------


def from_file(path: str, module: str) -> Any:
    """A psum as a module calls it, whose file lies elsewhere on each node."""
    names: dict[str, Any] = {"pmod": pmod, "__name__": module}
    exec(compile("result = pmod.psum(1.0, 'data')", path, "exec"), names)
    return names["result"]


@pytest.mark.parametrize(
    ("paths", "modules"),
    [
        (("/node0/job/train.py", "/scratch/7/train.py"), ("__main__", "__main__")),
        (("/node0/job/train.py", "/node0/job/train.py"), ("__main__", "__mp_main__")),  # a rank's child is a rank
        (("/node0/pkg/model.py", "/venv/lib/pkg/model.py"), ("pkg.model", "pkg.model")),
    ],
)
def test_a_script_may_lie_elsewhere_on_each_node(paths: tuple[str, str], modules: tuple[str, str]) -> None:
    def run() -> Any:
        rank = pmod.axis_index("data")
        return from_file(paths[rank], modules[rank])

    with pmod.debug():
        assert pmod.simulate(run, data=2) == [2.0, 2.0]


@pytest.mark.parametrize(
    ("paths", "modules"),
    [
        (("/job/train.py", "/job/evaluate.py"), ("__main__", "__main__")),
        (("/job/v1/model.py", "/job/v2/model.py"), ("v1.model", "v2.model")),
    ],
)
def test_unlike_files_are_unlike_places(paths: tuple[str, str], modules: tuple[str, str]) -> None:
    def run() -> Any:
        rank = pmod.axis_index("data")
        return from_file(paths[rank], modules[rank])

    with pmod.debug(), pytest.raises(pmod.MismatchError, match="differ in called at") as caught:
        pmod.simulate(run, data=2)
    assert all(f"{path}:1" in str(caught.value) for path in paths)


# --- what differs in a large tree, and a store that is gone -------------------------------------------------------


def test_a_long_structure_is_shown_where_it_differs() -> None:
    def run() -> None:
        tree = {f"layer{i:03}": torch.ones(1) for i in range(300)}
        tree["layer999" if me() else "layer998"] = torch.ones(1)
        pmod.psum(tree, "x")

    with pmod.debug(), pytest.raises(pmod.MismatchError, match="differ in structure") as caught:
        pmod.simulate(run, x=2)
    rows = [line for line in str(caught.value).splitlines() if line.startswith("    structure: ")]
    assert len(rows) == 2 and all("... " in row and len(row) < 200 for row in rows)
    assert "'layer998': *}" in rows[0] and "'layer999': *}" in rows[1]


def test_keys_without_a_text_of_their_own_are_compared_by_type() -> None:
    @functools.total_ordering
    class Key:
        def __lt__(self, other: object) -> bool:
            return False

    with pmod.debug():
        assert pmod.simulate(lambda: list(pmod.psum({Key(): 1}, "x").values()), x=2) == [[2], [2]]


def test_a_store_that_has_left_is_named() -> None:
    code = """
        import os, torch, pmod
        mesh = pmod.make_mesh(x=-1, timeout=60)
        pmod.set_mesh(mesh)
        with pmod.debug():
            pmod.psum(torch.ones(1), "x")
            if mesh.topology.rank == 0:
                os._exit(0)
            try:
                pmod.psum(torch.ones(2), "x")
            except pmod.CollectiveTimeout as error:
                print(error)
    """
    _, (status, said, _) = run_ranks(code, 2)
    assert status == 0
    gone = "some ranks will not arrive. Missing: rank 0 (x=0): its process "
    assert said.startswith(f"pmod.psum(axis='x') at (x=1): {gone}")
    assert "\nCalled at <string>:" in said
