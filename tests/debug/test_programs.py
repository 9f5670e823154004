"""Whole programs on ranks that differ in one thing, and others that only look so: with debug and without.

Of an unlike program each rank that raises names what each does, or who does not come, and none hangs or raises torch's
own error. A right program runs under debug without a word. On real processes, which stay, and in simulate.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

import pmod
from pmod import P
from pmod._debug import compare
from pmod._ranks import world
from pmod._wire import waiting
from tests.lib import spmd

Tensor = torch.Tensor


def last() -> bool:
    return pmod.axis_index("x") == pmod.axis_size("x") - 1


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape)


def data(*shape: int) -> Tensor:
    """Other numbers on each rank."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(pmod.axis_index("x")))


def weight() -> Tensor:
    """The same numbers on each rank."""
    return torch.rand(3, 3, generator=torch.Generator().manual_seed(7)).requires_grad_()


Run = Callable[[], Any]


@attrs.frozen
class Program:
    """What the ranks run, and where it is unlike: some differences only debug sees, and one only who has it not."""

    run: Run
    debug: bool
    without: bool
    absent: bool  # a rank does not come, which the deadline finds


UNLIKE: dict[str, Program] = {}
RIGHT: dict[str, Run] = {}


def unlike(*, debug: bool = True, without: bool = True, absent: bool = False) -> Callable[[Run], Run]:
    def note(run: Run) -> Run:
        UNLIKE[run.__name__] = Program(run, debug, without, absent)
        return run

    return note


def right(run: Run) -> Run:
    RIGHT[run.__name__] = run
    return run


# --- unlike -------------------------------------------------------------------------------------------------------


@unlike()
def a_rank_in_backward_beside_one_in_forward() -> None:
    loss = (pmod.pvary(weight(), "x") * data(3)).sum()
    if last():
        loss.backward()
    else:
        pmod.psum(ones(2), "x")


@unlike()
def a_second_backward_beside_a_step() -> None:
    w = weight()
    loss = (pmod.pvary(w, "x") * data(3)).square().sum()
    loss.backward(retain_graph=last())
    if last():
        loss.backward()
    pmod.pmean(loss.detach(), "x")


@unlike()
def a_second_derivative_on_one_rank() -> None:
    x = data(3).requires_grad_()
    y = pmod.all_gather(x.sin(), "x").square().sum()
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    if last():
        g.square().sum().backward()
    pmod.psum(ones(1), "x")


@unlike()
def a_derivative_beside_none() -> None:
    def f(x: Tensor) -> Tensor:
        return pmod.all_gather(x.sin(), "x").sum()

    if last():
        grad(f)(data(3))
    else:
        f(data(3))
    pmod.barrier("x")


@unlike()
def goes_ahead_beside_a_sum() -> None:
    if last():
        pmod.psum(ones(1), "x")
    else:
        with pmod.first_rank_first():
            pass


@unlike(without=False)
def keys_of_a_dict() -> None:
    pmod.psum({"energy" if last() else "mass": ones(2), "loss": ones(2)}, "x")


@unlike(without=False)
def keys_deep_in_a_tree() -> None:
    pmod.pmean([ones(1), {"step": ({"a" if last() else "b": ones(2)}, None)}], "x")


@unlike(without=False)
def a_list_beside_a_tuple() -> None:
    pmod.all_gather([ones(2), ones(2)] if last() else (ones(2), ones(2)), "x")


@unlike(without=False)
def none_at_another_place() -> None:
    pmod.psum([None, ones(2)] if last() else [ones(2), None], "x")


@unlike()
def a_leaf_more() -> None:
    pmod.psum([ones(2)] * (3 if last() else 2), "x")


@unlike()
def a_tree_of_other_dtypes() -> None:
    pmod.psum({"a": ones(2), "n": ones(2).to(torch.int32 if last() else torch.int64)}, "x")


@unlike()
def halos_of_other_widths() -> None:
    pmod.halo_exchange(ones(4), "x", width=2 if last() else 1, sizes=[4] * pmod.axis_size("x"))


@unlike()
def a_convolution_with_another_kernel() -> None:
    kernel = ones(1, 1, 5 if last() else 3)
    pmod.nn.functional.conv1d(ones(1, 1, 8), kernel, axis="x", padding="same", sizes=[8] * pmod.axis_size("x"))


@unlike()
def sizes_exchanged_beside_given() -> None:
    sizes = [2] * pmod.axis_size("x")
    pmod.all_gather_v(ones(2), "x", sizes=None if last() else sizes)
    pmod.psum(ones(3), "x")


@unlike()
def transforms_along_another_dim() -> None:
    pmod.fft.fft2(ones(4, 4 * pmod.axis_size("x")).to(torch.complex64), axis="x", out_dim=0 if last() else 1)
    pmod.barrier("x")


@unlike()
def one_call_more_on_one_rank() -> None:
    for _ in range(3 if last() else 2):
        pmod.psum(ones(1), "x")
    pmod.all_gather(ones(1), "x")


@unlike(absent=True)
def returns_early() -> None:
    pmod.psum(ones(1), "x")
    if last():
        return
    pmod.psum(ones(1), "x")


@unlike(absent=True)
def the_first_rank_is_done() -> None:
    pmod.psum(ones(1), "x")
    if pmod.axis_index("x"):
        pmod.psum(ones(1), "x")


@unlike(absent=True)
def an_exception_on_one_rank() -> None:
    if last():
        raise ValueError("a bad sample")
    pmod.pmean(ones(1), "x")


@unlike()
def a_shard_map_on_one_rank() -> None:
    if last():
        pmod.shard_map(lambda x: x * 2, in_specs=P("x"), out_specs=P("x"))(ones(4 * pmod.axis_size("x")))
    else:
        pmod.psum(ones(1), "x")


@unlike()
def another_order_in_a_step() -> None:
    steps = [lambda: pmod.pmean(ones(1), "x"), lambda: pmod.pshift(ones(1), "x"), lambda: pmod.barrier("x")]
    for step in reversed(steps) if last() else steps:
        step()


@unlike()
def started_beside_waited() -> None:
    if last():
        pmod.all_gather(ones(1), "x")
        pmod.start(pmod.psum, ones(1), "x").wait()
    else:
        pending = pmod.start(pmod.psum, ones(1), "x")
        pmod.all_gather(ones(1), "x")
        pending.wait()


@unlike(debug=False)
def debug_on_one_rank() -> None:
    with pmod.debug() if last() else contextlib.nullcontext():
        pmod.psum(ones(1), "x")


@unlike()
def mapped_on_one_rank() -> None:
    def f(x: Tensor) -> Tensor:
        return pmod.psum(x, "x")

    if last():
        vmap(f)(ones(2, 3))
    else:
        f(ones(3))


@unlike(without=False)
def grad_mode() -> None:
    x = data(2).requires_grad_()
    with torch.set_grad_enabled(last()):
        pmod.all_gather(x, "x")


@unlike()
def copied_from_another_rank() -> None:
    pmod.replicate({"w": data(3)}, "x", src=int(last()))


@unlike()
def checkpointed_on_one_rank() -> None:
    def f(x: Tensor) -> Tensor:
        return (pmod.all_gather(x.sin(), "x") ** 2).sum()

    x = data(2).requires_grad_()
    if last():
        checkpoint(f, x, use_reentrant=False).backward()
    else:
        f(x).backward()
    pmod.barrier("x")


@unlike()
def frozen_on_one_rank() -> None:
    model = nn.Linear(3, 3)
    model.load_state_dict({"weight": weight().detach(), "bias": weight().detach()[0]})
    model.requires_grad_(not last())
    pmod.data_parallel(model, "x")(data(2, 3).requires_grad_()).sum().backward()
    pmod.barrier("x")


@unlike()
def asks_whether_it_is_one_value() -> None:
    if last():
        pmod.assert_invariant(ones(2), "x")
    else:
        pmod.psum(ones(2), "x")


# --- right, though ranks differ in what they may differ in ----------------------------------------------------------


@right
def the_daily_lines() -> None:
    with pmod.first_rank_first():
        pass
    with contextlib.ExitStack() as stack:
        stack.enter_context(pmod.first_rank_first())
    if pmod.is_first():
        pass
    pmod.barrier("x")


@right
def backward_at_unlike_lines() -> None:
    y = pmod.pshift(data(3).requires_grad_(), "x", wrap=False)
    if last():
        y.square().sum().backward()
    else:
        torch.autograd.backward([y], [torch.zeros(3)])


@right
def roots_alone_have_something() -> None:
    src = pmod.scatter(data(2 * pmod.axis_size("x")), "x")
    pmod.gather(src, "x", dst=pmod.axis_size("x") - 1)
    pmod.reduce(data(2), "x", dst=0)


@right
def dicts_in_another_order() -> None:
    tree = {"b": ones(1), "a": ones(2)}
    pmod.psum(dict(reversed(tree.items())) if last() else tree, "x")


@right
def unequal_shards() -> None:
    rows = 1 + pmod.axis_index("x")
    whole = pmod.all_gather_v(data(rows, 2), "x")
    pmod.halo_exchange(data(rows, 2), "x", width=1)
    pmod.psum(whole.sum(), "x")


@right
def an_empty_shard() -> None:
    x = data(0 if last() else 3, 2).requires_grad_()
    (pmod.all_gather_v(x, "x") * (1 + pmod.axis_index("x"))).sum().backward()


@right
def uneven_blocks() -> None:
    n, me = pmod.axis_size("x"), pmod.axis_index("x")
    send = [(me + j) % 3 for j in range(n)]
    pmod.all_to_all_v(data(sum(send)), "x", send_sizes=send)
    pmod.all_to_all_v(data(sum(send)), "x", send_sizes=send, recv_sizes=[(j + me) % 3 for j in range(n)])


@right
def data_parallel_steps() -> None:
    torch.manual_seed(0)
    model = pmod.data_parallel(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), "x")
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(data(2 + pmod.axis_index("x"), 3)).mean().backward()
        optimizer.step()
    pmod.assert_invariant(dict(model.named_parameters()), "x")


@right
def an_accumulated_gradient() -> None:
    w = weight()
    for part in data(4, 3).split(2):
        (pmod.pvary(w, "x") @ part.T).square().sum().backward()
    pmod.assert_invariant(w.grad, "x", rtol=1e-6)


@right
def a_norm_over_shards() -> None:
    x = data(4, 3).requires_grad_()
    mean = pmod.pmean(x.mean(0), "x")
    spread = pmod.pmean((x - pmod.pvary(mean, "x")).square().mean(0), "x")
    ((x - pmod.pvary(mean, "x")) / pmod.pvary(spread, "x").sqrt()).pow(3).sum().backward()


@right
def an_equation_twice_differentiated() -> None:
    w, x = weight(), data(3, 3).requires_grad_()
    u = (x @ pmod.pvary(w, "x")).sin().sum()
    (slope,) = torch.autograd.grad(u, x, create_graph=True)
    pmod.pmean(slope.square().mean(), "x").backward()


@right
def transforms_on_all_ranks() -> None:
    def f(x: Tensor) -> Tensor:
        return pmod.psum(x.sin().sum(), "x")

    x = data(3)
    grad(f)(x)
    vmap(f)(data(2, 3))
    vmap(grad(f))(data(2, 3))


@right
def checkpointed_on_all_ranks() -> None:
    def f(x: Tensor) -> Tensor:
        return (pmod.all_gather(x.sin(), "x") ** 2).sum() + x.sum()

    checkpoint(f, data(2).requires_grad_(), use_reentrant=False).backward()


@right
def started_and_waited_for_elsewhere() -> None:
    pending = [pmod.start(pmod.psum, data(3), "x"), pmod.start(pmod.all_gather, data(1), "x")]
    if last():
        first, second = [one.wait() for one in pending]
    else:
        first = pending[0].wait()
        second = pending[1].wait()
    assert first.shape == (3,) and second.shape == (pmod.axis_size("x"),)


@right
def a_shard_map_of_a_module() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    f = pmod.shard_map(lambda x: model(x).square(), in_specs=P("x"), out_specs=P("x"))
    f(torch.arange(15.0).reshape(5, 3)).sum().backward()


@right
def a_convolution_of_uneven_shards() -> None:
    n = pmod.axis_size("x")
    w = pmod.pvary(torch.rand(2, 1, 3, generator=torch.Generator().manual_seed(1)).requires_grad_(), "x")
    x = data(1, 1, 3 + pmod.axis_index("x"))
    pmod.nn.functional.conv1d(x, w, padding="same", axis="x", sizes=[3 + i for i in range(n)]).square().sum().backward()


@right
def a_spectrum() -> None:
    n = pmod.axis_size("x")
    x = data(4, 4 * n).requires_grad_()
    pmod.fft.irfft2(pmod.fft.rfft2(x, axis="x", in_dim=0, out_dim=0), axis="x", in_dim=0, out_dim=0).sum().backward()


@right
def random_numbers_of_ones_own() -> None:
    with pmod.rng(3, "x"):
        noise = torch.rand(2)
    with pmod.rng(3, ()):
        shared = torch.rand(2)
    pmod.psum(noise, "x")
    pmod.pvary(shared, "x")


@right
def numbers_of_an_epoch() -> None:
    pmod.psum({"seen": 3 + pmod.axis_index("x"), "loss": 0.5}, "x")
    pmod.pmax(pmod.axis_index("x"), "x")
    pmod.pmean(1.0, "x", weight=1 + pmod.axis_index("x"))


@right
def a_clipped_gradient() -> None:
    params = {"w": data(2).requires_grad_(), "b": ones(1).requires_grad_()}
    specs = {"w": P("x"), "b": P()}
    held = pmod.pvary_params(params, specs)
    loss = pmod.psum((held["w"].sum() * held["b"] * (1 + pmod.axis_index("x"))).sum(), "x")
    loss.backward()
    pmod.global_norm({name: p.grad for name, p in params.items()}, specs)


@right
def stops_together() -> None:
    for step in range(5):
        loss = data(1).sum() / (step + 1)
        if pmod.pmean(loss, "x") < 0.3:
            break
    pmod.barrier("x")


@right
def a_checked_step() -> None:
    step = pmod.checked(lambda x: pmod.psum(x, "x"))
    for length in (2, 3, 2):
        step(ones(length))


@right
def a_frozen_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    shared = pmod.share_parameters(model, "x")
    model(data(2, 3)).sum().backward()
    del shared


@right
def one_rank_is_slow() -> None:
    if last():
        time.sleep(1.5)
    pmod.psum(ones(1), "x")


# --- what is said of them -----------------------------------------------------------------------------------------

HERE = "test_programs.py:"
DEADLINE = 3.0  # seconds, of a program in which a rank does not come
NEVER = 120.0  # a deadline that only a hang reaches


def of_mode(debug: bool) -> list[str]:
    return [name for name, program in UNLIKE.items() if (program.debug if debug else program.without)]


def outcome(run: Run, debug: bool, warned: str) -> tuple[str, str]:
    """The name and the text of what it raises."""
    try:
        with pmod.debug() if debug else contextlib.nullcontext(), warnings.catch_warnings():
            warnings.simplefilter(warned, RuntimeWarning)
            run()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def is_named(name: str, kind: str, text: str) -> bool:
    """Whether an error says what two ranks do, or who does not come."""
    if name == "an_exception_on_one_rank" and kind == "ValueError":
        return text == "a bad sample"
    if kind == "CollectiveTimeout":
        return "Missing: rank " in text and HERE in text
    return kind == "MismatchError" and (text.count(HERE) >= 2 or "(has left)" in text)


def all_are_done(name: str) -> None:
    """A meeting that is none of pmod's: a rank that has finished waits for the others, and says nothing."""
    store, size = world.current().store, pmod.axis_size("x")
    assert store is not None
    store.add(f"test/{name}", 1)
    while store.add(f"test/{name}", 0) < size:
        time.sleep(0.01)


def unlike_on_ranks(names: Sequence[str], debug: bool) -> list[tuple[str, str]]:
    grad(torch.sin)(torch.ones(()))  # the first transform imports for seconds
    found: list[tuple[str, str]] = []
    topology = pmod.current_mesh().topology
    with pytest.MonkeyPatch.context() as patch:
        for module in (waiting, compare):
            patch.setattr(module, "LOOK", 0.2)  # nothing but this is waited for
        for name in names:
            program = UNLIKE[name]
            pmod.barrier("x")  # connected: a short deadline may be too short for that
            pmod.set_mesh(pmod.make_mesh(x=-1, timeout=DEADLINE if program.absent else NEVER))
            pmod.barrier("x")
            found.append(outcome(program.run, debug, "ignore"))
            all_are_done(name)
            if program.absent or not debug:  # messages may be left in between
                pmod.shutdown()
                pmod.set_mesh(pmod.make_mesh(x=topology.world_size, topology=topology))
    return found


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("debug", [True, False], ids=["debug", "without"])
def test_unlike_programs_on_processes(n: int, debug: bool) -> None:
    names = of_mode(debug)[n % 2 :: 2]
    ranks = spmd.launch(unlike_on_ranks, names, debug, timeout=NEVER, x=n)
    for name, said in zip(names, zip(*ranks, strict=True), strict=True):
        raised = [(kind, text) for kind, text in said if kind]
        assert len(raised) >= (n - 1 if UNLIKE[name].absent else n), (name, said)
        for kind, text in raised:
            assert is_named(name, kind, text), (name, kind, text)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("debug", [True, False], ids=["debug", "without"])
def test_unlike_programs_in_threads(n: int, debug: bool) -> None:
    for name in of_mode(debug):
        kind, text = outcome(lambda name=name: pmod.simulate(UNLIKE[name].run, x=n), debug, "ignore")
        assert is_named(name, kind, text), (name, kind, text)


def right_on_ranks() -> list[tuple[str, str]]:
    return [outcome(run, True, "error") for run in RIGHT.values()]


@pytest.mark.parametrize("n", [2, 3])
def test_right_programs_pass_in_silence(n: int) -> None:
    for said in spmd.launch(right_on_ranks, timeout=NEVER, x=n):
        assert dict(zip(RIGHT, said, strict=True)) == dict.fromkeys(RIGHT, ("", ""))
    for name, run in RIGHT.items():
        assert outcome(lambda run=run: pmod.simulate(run, x=n), True, "error") == ("", ""), name


def test_there_are_enough() -> None:
    assert len(of_mode(True)) >= 25 and len(of_mode(False)) >= 20 and len(RIGHT) >= 20
