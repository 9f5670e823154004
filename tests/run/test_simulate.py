"""`simulate`: ranks as threads, one at a time; what goes wrong is seen at once, and leaves nothing behind."""

from __future__ import annotations

import math
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
from torch import Tensor

import pmod
from pmod._mesh import ambient
from pmod._ranks import world


def index() -> int:
    """This rank, along the one axis of most tests."""
    return pmod.axis_index("r")


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    import torch._functorch.eager_transforms as eager_transforms

    threads = set(threading.enumerate())
    before = (eager_transforms.JVP_NESTING, forward_ad._current_level, torch.is_grad_enabled(), ambient.ambient())
    yield
    after = (eager_transforms.JVP_NESTING, forward_ad._current_level, torch.is_grad_enabled(), ambient.ambient())
    assert after == before
    assert world.current() is world.processes()
    assert not set(threading.enumerate()) - threads
    assert not dist.is_initialized()


# --- results --------------------------------------------------------------------------------------------------------


def test_results_come_in_rank_order_and_arguments_as_they_are():
    token = object()

    def rank(x: object, y: object) -> tuple[Any, ...]:
        mesh = pmod.current_mesh()
        return x is token, y, mesh.topology.rank, mesh.topology.world_size, mesh.topology.launcher, mesh.coords

    assert pmod.simulate(rank, token, 5, a=2, b=3) == [
        (True, 5, 3 * i + j, 6, "simulate", {"a": i, "b": j}) for i in range(2) for j in range(3)
    ]
    assert pmod.simulate(lambda: None, r=1) == [None]


def test_real_values_and_derivatives():
    def rank() -> tuple[float, float]:
        x = torch.tensor(2.0 + index(), requires_grad=True)
        loss = pmod.psum(x**2, "r") ** 2  # (4 + 9) ** 2
        loss.backward()
        assert x.grad is not None
        return loss.item(), x.grad.item()

    assert pmod.simulate(rank, r=2) == [(169.0, 2 * 13 * 2 * 2.0), (169.0, 2 * 13 * 2 * 3.0)]


def test_what_was_sent_is_a_copy():
    def rank() -> list[list[float]]:
        found = []
        for f in (pmod.psum, pmod.all_gather, pmod.pshift, pmod.broadcast):
            x = torch.full((1,), 1.0 + index())
            y = f(x, "r")
            x.fill_(-1.0)  # the last rank is here before the first has read
            pmod.barrier("r")
            found.append(y.tolist())
            y.fill_(-2.0)
        return found

    expected = [[6.0], [1.0, 2.0, 3.0], [0.0], [1.0]]
    for number, found in enumerate(pmod.simulate(rank, r=3)):
        assert found == [*expected[:2], [(3.0, 1.0, 2.0)[number]], expected[3]]


def test_one_rank_runs_at_a_time_and_in_the_same_order_each_time():
    def run() -> tuple[list[tuple[int, int]], list[Tensor]]:
        order: list[tuple[int, int]] = []
        inside: list[int] = []

        def rank() -> Tensor:
            total = torch.zeros(100)
            for step in range(5):
                inside.append(index())
                order.append((index(), step))
                time.sleep(0.0005)  # room for another to come in
                assert inside == [index()]
                inside.pop()
                total = total + pmod.psum(torch.linspace(0, 1 + index(), 100).sin() * 1e-3, ("a", "r"))
                if step % 2:
                    total = pmod.pshift(total, "r")
            return total

        return order, pmod.simulate(rank, a=2, r=3)

    first, second = run(), run()
    assert first[0] == second[0] and len(first[0]) == 30
    assert all(torch.equal(x, y) for x, y in zip(first[1], second[1], strict=True))


def test_many_ranks(record_property):
    def rank() -> tuple[float, list[int]]:
        total = pmod.psum(torch.ones(1000), ("a", "b", "c"))
        return total.sum().item(), pmod.all_gather(torch.tensor([pmod.axis_index("b")]), "b").tolist()

    began = time.perf_counter()
    assert pmod.simulate(rank, a=4, b=4, c=4) == [(64_000.0, [0, 1, 2, 3])] * 64
    record_property("seconds", time.perf_counter() - began)  # under one on an idle core


def test_grad_mode_is_inherited():
    def rank() -> tuple[bool, bool]:
        x = torch.ones(1, requires_grad=True)
        return torch.is_grad_enabled(), pmod.psum(x * 2, "r").requires_grad

    assert pmod.simulate(rank, r=2) == [(True, True)] * 2
    with torch.no_grad():
        assert pmod.simulate(rank, r=2) == [(False, False)] * 2
    assert pmod.simulate(lambda: torch.set_grad_enabled(False) and None, r=2) == [None] * 2  # a rank's own affair
    assert torch.is_grad_enabled()


def test_a_program_of_several_meshes():
    def rank() -> list[float]:
        mesh = pmod.current_mesh()
        place = mesh.topology
        pairs = [(0, 1), (1, 2), (2, 0)]
        mine = [pmod.make_mesh(x=2, ranks=pair, topology=place) for pair in pairs if place.rank in pair]
        pending = [pmod.start(pmod.psum, torch.tensor(10.0**place.rank), pair) for pair in mine]
        return [value.wait().item() for value in pending] + [pmod.psum(10.0**place.rank, mesh.rename(r="q")["q"])]

    assert pmod.simulate(rank, r=3) == [[11.0, 101.0, 111.0], [11.0, 110.0, 111.0], [110.0, 101.0, 111.0]]


def test_make_mesh_inside_a_simulation_needs_no_topology():
    def rank() -> tuple[Any, ...]:
        pair = pmod.make_mesh(x=2, ranks=[2, 0])
        return pmod.make_mesh().shape, pair.coords, pair.coords and pmod.psum(10.0 ** index(), pair)

    coords = [{"x": 1}, None, {"x": 0}]
    assert pmod.simulate(rank, r=3) == [({"data": 3}, at, at and 101.0) for at in coords]


def test_a_simulated_rank_has_no_process_group():
    with pytest.raises(pmod.PmodError, match="simulate"):
        pmod.simulate(lambda: pmod.current_mesh().group("r"), r=2)


# --- torch.func on all ranks at once --------------------------------------------------------------------------------
# f is a function of the sum S of all x; T is the sum of all tangents t.


def f(x: Tensor) -> Tensor:
    return pmod.psum(x, "r") ** 3


def own(x: Tensor) -> Tensor:
    """Varies over the ranks, and couples them."""
    return x**2 * pmod.pvary(pmod.psum(x, "r"), "r")


def jvp(g: Callable[[Tensor], Tensor], t: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.func.jvp(g, (x,), (t,))[1]


def test_forward_mode_and_its_nestings():
    def rank() -> dict[str, list[float]]:
        x, t = torch.tensor(1.0 + index()), torch.tensor(1.0 + 2 * index())  # S = 3, T = 4
        func = torch.func
        found = {
            "value": func.jvp(f, (x,), (t,))[0],
            "jvp": jvp(f, t)(x),
            "jvp of jvp": jvp(jvp(f, t), t)(x),
            "jvp of jvp of jvp": jvp(jvp(jvp(f, t), t), t)(x),
            "grad of jvp": func.grad(jvp(f, t))(x),
            "jvp of grad": jvp(func.grad(f), t)(x),
            "vmap of jvp": func.vmap(jvp(f, torch.ones(())))(torch.stack([x, 2 * x])),
            "jvp of vmap": func.jvp(func.vmap(f), (torch.stack([x, 2 * x]),), (torch.stack([t, t]),))[1],
            "hessian": func.hessian(f)(x),
            "own jvp": jvp(own, t)(x),
            "own vjp": func.vjp(own, x)[1](torch.ones(()))[0],
        }
        return {name: value.reshape(-1).tolist() for name, value in found.items()}

    for number, found in enumerate(pmod.simulate(rank, r=2)):
        x, t = 1.0 + number, 1.0 + 2 * number
        assert found == {
            "value": [27.0],
            "jvp": [3 * 9 * 4.0],
            "jvp of jvp": [6 * 3 * 16.0],
            "jvp of jvp of jvp": [6 * 64.0],
            "grad of jvp": [6 * 3 * 4.0],
            "jvp of grad": [6 * 3 * 4.0],
            "vmap of jvp": [3 * 9 * 2.0, 3 * 36 * 2.0],
            "jvp of vmap": [3 * 9 * 4.0, 3 * 36 * 4.0],
            # seeded on both ranks at once, so both move in forward mode: d(3 S^2) = 6 S * 2
            "hessian": [36.0],
            "own jvp": [2 * x * t * 3 + x**2 * 4],
            "own vjp": [2 * x * 3 + 1 + 4.0],  # the V losses of both ranks count
        }


def test_ranks_are_at_different_depths_of_forward_mode():
    """torch counts its levels per process: a rank must not see those of another."""

    def rank() -> list[float]:
        depth = index()

        def nested(x: Tensor, left: int) -> Tensor:
            if left:
                return jvp(lambda y: nested(y, left - 1), torch.ones(()))(x)
            pmod.barrier("r")  # all ranks are inside, each at its depth
            y = x**4
            pmod.barrier("r")
            return y

        first = nested(torch.tensor(2.0), depth).item()
        second = nested(torch.tensor(2.0), 3 - depth).item()
        return [first, second]

    derivatives = [16.0, 32.0, 48.0, 48.0]  # of x^4 at 2
    assert pmod.simulate(rank, r=4) == [[derivatives[i], derivatives[3 - i]] for i in range(4)]


def test_forward_mode_works_after_a_rank_failed_in_it():
    def rank() -> float:
        def fails(x: Tensor) -> Tensor:
            if index() == 1:
                raise ValueError("inside")
            return f(x)

        return jvp(fails, torch.ones(()))(torch.ones(())).item()

    with pytest.raises(ValueError, match="inside"):
        pmod.simulate(rank, r=2)
    assert jvp(lambda x: x**2, torch.ones(()))(torch.tensor(3.0)).item() == 6
    assert pmod.simulate(lambda: jvp(f, torch.ones(()))(torch.ones(())).item(), r=2) == [24.0, 24.0]


def test_inside_a_transform_of_the_caller_it_is_refused():
    with pytest.raises(pmod.PmodError):
        torch.func.jvp(lambda x: pmod.simulate(lambda: x, r=1)[0], (torch.ones(()),), (torch.ones(()),))


# --- ranks that wait for each other ---------------------------------------------------------------------------------

HERE = __file__
ADVICE = "All ranks of an axis must make the same calls in the same order."
NONE_CAN = "pmod.simulate: the ranks wait for each other, and none can go on:"


def line_of(function: Callable[..., Any], code: str) -> str:
    """path:line: code, of the line of a function that reads `code`."""
    start = function.__code__.co_firstlineno
    lines = Path(HERE).read_text().splitlines()
    number = next(n for n in range(start, start + 60) if lines[n - 1].strip() == code)
    return f"{HERE}:{number}: {code}"


def deadlock(rank: Callable[[], Any], **sizes: int) -> str:
    with pytest.raises(pmod.MismatchError) as caught:  # at once: a simulation has no deadline
        pmod.simulate(rank, **sizes)
    assert pmod.simulate(lambda: pmod.psum(1, "r"), r=2) == [2, 2]  # and the next one is none the worse
    return str(caught.value)


def test_a_cycle_of_ranks():
    def rank() -> None:
        place = pmod.current_mesh().topology
        after = (place.rank + 1) % 3
        pair = pmod.make_mesh(x=2, ranks=[place.rank, after], topology=place)
        pmod.psum(torch.ones(1), pair)

    where = line_of(rank, "pmod.psum(torch.ones(1), pair)")
    rows = [f"  rank {i} (r={i}) waits for rank {(i + 1) % 3} (r={(i + 1) % 3}) in psum at {where}" for i in range(3)]
    assert deadlock(rank, r=3) == "\n".join([NONE_CAN, *rows]) + f".\n{ADVICE}"


def test_axes_in_another_order():
    def rank() -> None:
        if pmod.axis_index("a") == pmod.axis_index("b"):
            pmod.psum(1, "a")
        else:
            pmod.barrier("b")

    along_a, along_b = line_of(rank, 'pmod.psum(1, "a")'), line_of(rank, 'pmod.barrier("b")')
    assert deadlock(rank, a=2, b=2) == (
        f"{NONE_CAN}\n"
        f"  rank 0 (a=0, b=0) waits for rank 2 (a=1, b=0) in psum at {along_a}\n"
        f"  rank 1 (a=0, b=1) waits for rank 0 (a=0, b=0) in barrier at {along_b}\n"
        f"  rank 2 (a=1, b=0) waits for rank 3 (a=1, b=1) in barrier at {along_b}\n"
        f"  rank 3 (a=1, b=1) waits for rank 1 (a=0, b=1) in psum at {along_a}.\n{ADVICE}"
    )


def test_a_rank_that_left():
    def rank() -> None:
        if index() != 1:
            pmod.barrier("r")
            pmod.barrier("r")

    where = line_of(rank, 'pmod.barrier("r")')
    assert deadlock(rank, r=3) == (
        f"{NONE_CAN}\n"
        f"  rank 0 (r=0) waits for rank 1 (r=1) (has left) in barrier at {where}\n"
        f"  rank 2 (r=2) waits for rank 1 (r=1) (has left) in barrier at {where}.\n{ADVICE}"
    )


def test_a_rank_that_left_one_call_early():
    def rank() -> None:
        for _ in range(5 - index()):
            pmod.psum(torch.ones(2), "r")

    text = deadlock(rank, r=2)
    assert "rank 0 (r=0) waits for rank 1 (r=1) (has left)" in text and 'pmod.psum(torch.ones(2), "r")' in text


def test_ranks_that_wait_in_backward_are_shown_where_they_called_it():
    def rank() -> None:
        w = torch.ones(1, requires_grad=True)
        loss = (pmod.pvary(w, "r") * 2).sum()
        if index() == 0:
            loss.backward()

    where = line_of(rank, "loss.backward()")
    row = f"  rank 0 (r=0) waits for rank 1 (r=1) (has left) in backward at {where}"
    assert deadlock(rank, r=2) == f"{NONE_CAN}\n{row}.\n{ADVICE}"


# --- calls that do not fit ------------------------------------------------------------------------------------------


ALIKE = "All ranks of an axis must make the same calls in the same order, with shapes that fit."


def test_another_shape():
    def rank() -> None:
        pmod.psum(torch.ones(2 + index()), "r")

    where = line_of(rank, 'pmod.psum(torch.ones(2 + index()), "r")')
    assert deadlock(rank, r=2) in (
        f"pmod.psum(axis='r') at (r={i}): the ranks make unlike calls, so nothing was exchanged:\n"
        f"  rank {i} (r={i}): ({2 + i},) float32 in psum at {where}\n"
        f"  rank {1 - i} (r={1 - i}): ({3 - i},) float32 in psum at {where}.\n{ALIKE}"
        for i in range(2)
    )


def test_another_function():
    def rank() -> None:
        x = torch.ones(2)
        pmod.psum_scatter(x, "r") if index() else pmod.psum(x, "r")

    where = line_of(rank, 'pmod.psum_scatter(x, "r") if index() else pmod.psum(x, "r")')
    text = deadlock(rank, r=2)
    assert f"rank 0 (r=0): (2,) float32 in psum at {where}" in text
    assert f"rank 1 (r=1): (2,) float32 in psum_scatter at {where}" in text
    assert text.endswith(f".\n{ALIKE}")


@pytest.mark.parametrize(
    "call",
    [
        lambda x: pmod.barrier("r") if index() else pmod.psum(x, "r"),
        lambda x: pmod.all_to_all(x, "r", split_dim=0, concat_dim=0) if index() else pmod.all_gather(x, "r"),
        lambda x: pmod.all_gather(x, "r") if index() else pmod.all_to_all(x, "r", split_dim=0, concat_dim=0),
        lambda x: pmod.psum(x[:1] if index() else x, "r"),
        lambda x: pmod.all_gather(x[index() :], "r"),
        lambda x: pmod.pshift(x[index() :], "r"),
        lambda x: pmod.pick(x, "r", src=index()),
        lambda x: pmod.psum([x, x] if index() else [x], "r"),
    ],
)
def test_calls_that_do_not_fit(call):
    text = deadlock(lambda: call(torch.ones(4)), r=2)
    assert HERE in text


@pytest.mark.parametrize("f", [pmod.psum, pmod.all_gather, pmod.pshift, pmod.pmax])
def test_another_dtype_is_no_fit(f):
    """A real wire would send other bytes than are expected."""
    with pytest.raises(pmod.MismatchError):
        pmod.simulate(lambda: f(torch.ones(2, dtype=(torch.float32, torch.float64)[index()]), "r"), r=2)


# --- a rank that fails ----------------------------------------------------------------------------------------------


class Custom(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__("custom")
        self.code = code


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_its_exception_comes_to_the_caller_with_a_note_and_the_others_end(failing):
    error = Custom(code=7)
    cleaned: list[int] = []
    swallowed: list[BaseException] = []

    def rank() -> None:
        pmod.psum(1, ("a", "r"))
        try:
            if pmod.current_mesh().topology.rank == failing:
                raise error
            try:
                for _ in range(3):
                    pmod.psum(1, ("a", "r"))
            except Exception as other:  # what ends the others is no Exception, and is theirs to clean up after only
                swallowed.append(other)
        finally:
            cleaned.append(pmod.current_mesh().topology.rank)

    with pytest.raises(Custom) as caught:
        pmod.simulate(rank, a=1, r=3)
    assert caught.value is error and error.code == 7
    assert error.__notes__ == [f"on rank {failing} (a=0, r={failing}) of the simulation"]
    assert any(entry.name == "rank" and entry.path == caught.traceback[-1].path for entry in caught.traceback)
    assert sorted(cleaned) == [0, 1, 2] and not swallowed


def test_the_first_failure_is_raised():
    def rank() -> None:
        if index() == 1:
            raise ValueError("the first")
        try:
            pmod.barrier("r")
        finally:
            raise KeyError("while it is cleaned up")

    with pytest.raises(ValueError, match="the first") as caught:
        pmod.simulate(rank, r=3)
    assert caught.value.__notes__ == ["on rank 1 (r=1) of the simulation"]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_what_is_no_Exception_comes_through_too(error):
    def rank() -> None:
        if index() == 1:
            raise error
        pmod.barrier("r")

    with pytest.raises(type(error)) as caught:
        pmod.simulate(rank, r=2)
    assert caught.value is error


def test_a_failure_inside_backward():
    def rank() -> None:
        x = torch.ones(1, requires_grad=True)
        y = pmod.pvary(x, "r") * 1

        def hook(g: Tensor) -> None:
            if index() == 1:
                raise Custom(code=1)

        y.register_hook(hook)
        y.sum().backward()

    with pytest.raises(Custom) as caught:
        pmod.simulate(rank, r=3)
    assert caught.value.__notes__ == ["on rank 1 (r=1) of the simulation"]


def test_ranks_that_need_nobody_run_to_their_end():
    finished: list[int] = []

    def rank() -> None:
        if index() == 0:
            raise Custom(code=0)
        finished.append(index())

    with pytest.raises(Custom):
        pmod.simulate(rank, r=4)
    assert finished in ([], [1, 2, 3])  # ended before they began, or left alone


# --- what it is not for ---------------------------------------------------------------------------------------------


def test_a_simulation_inside_a_simulation_is_refused():
    with pytest.raises(pmod.PmodError) as caught:
        pmod.simulate(lambda: pmod.simulate(index, r=2), r=2)
    assert str(caught.value) == "pmod.simulate: this is a simulated rank already.\nCall it from outside."


def test_a_mesh_from_outside_is_refused():
    outer = pmod.make_mesh(r=3, topology=pmod.Topology(rank=0, world_size=3))
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("r", lambda: pmod.psum(1, outer)),
        ("r", lambda: pmod.psum(1, outer["r"])),
        ("q", lambda: pmod.barrier(outer.rename(r="q")["q"])),
    ]
    for label, call in calls:
        with pytest.raises(pmod.AxisError) as caught:
            pmod.simulate(call, r=3)
        assert str(caught.value) == (
            f"pmod.simulate(axis={label!r}): the axis belongs to another rank than 1.\n"
            "Take the mesh inside the simulated function: pmod.current_mesh()."
        )


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({}, "no axis size is given.\nName the axes: simulate(fn, data=2, model=2)."),
        ({"r": 0}, "r=0 is not a size.\nSizes are ints of 1 or more."),
        ({"a": 2, "r": -1}, "r=-1 is not a size.\nSizes are ints of 1 or more."),
        ({"r": 2.0}, "r=2.0 is not a size.\nSizes are ints of 1 or more."),
        ({"r": True}, "r=True is not a size.\nSizes are ints of 1 or more."),
        ({"r": None}, "r=None is not a size.\nSizes are ints of 1 or more."),
        ({"r": 2, "timeout": 40}, "timeout=40 is not an axis.\n"
         "A simulation needs no deadline: it sees at once when no rank can go on."),
    ],
)
def test_sizes_that_make_no_mesh_are_refused(sizes, text):
    with pytest.raises(pmod.AxisError) as caught:
        pmod.simulate(index, **sizes)
    assert str(caught.value) == f"pmod.simulate: {text}"


def test_simulations_from_two_threads_take_turns():
    found: dict[int, list[int]] = {}

    def main(number: int) -> None:
        found[number] = pmod.simulate(lambda: [pmod.psum(number, "r") for _ in range(20)][-1], r=3)

    threads = [threading.Thread(target=main, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [3 * number] * 3 for number in range(4)}


def test_a_thread_beside_a_simulation_keeps_its_own_mesh():
    mesh = pmod.make_mesh(alone=1, topology=pmod.Topology(rank=0, world_size=1))
    seen: list[Any] = []

    def beside() -> None:
        seen.extend([pmod.current_mesh() is mesh, pmod.psum(1, "alone"), pmod.make_mesh(x=1).shape])

    def rank() -> None:
        if index() == 0:
            thread = threading.Thread(target=beside)
            thread.start()
            thread.join()

    with pmod.set_mesh(mesh):
        pmod.simulate(rank, r=2)
    assert seen == [True, 1, {"x": 1}]


def in_child(work: Callable[[], object]) -> Any:
    """What `work` returns in a process that is forked here."""
    ours, theirs = multiprocessing.Pipe()

    def main() -> None:
        try:
            theirs.send(work())
        except BaseException as error:
            theirs.send(f"{type(error).__name__}: {error}")

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    try:
        return ours.recv() if ours.poll(20) else "no answer"
    finally:
        process.kill()
        process.join()


def simulated_with_tangents() -> list[float]:
    """A simulation whose ranks take a derivative forward, after one outside of it."""
    assert torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))[1] == 1
    with forward_ad.dual_level():
        pass
    one = torch.ones(())
    return pmod.simulate(lambda: torch.func.jvp(lambda x: pmod.psum(x, "r"), (one,), (one,))[1].item(), r=3)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_that_is_forked_beside_a_simulation_simulates_too():
    begun, over = threading.Event(), threading.Event()

    def rank() -> None:
        begun.set()
        over.wait()

    beside = threading.Thread(target=lambda: pmod.simulate(rank, r=2))
    beside.start()
    try:
        begun.wait()
        assert in_child(simulated_with_tangents) == [3.0] * 3
    finally:
        over.set()
        beside.join()


def simulated_in_thread() -> str:
    """A simulation in another thread than that which the rank has forked, which is that rank's."""
    said: list[str] = []

    def main() -> None:
        with pytest.raises(pmod.TopologyError) as raised:
            pmod.simulate(index, r=2)
        said.append(str(raised.value))

    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
    return said[0]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_that_a_simulated_rank_forks_says_why_it_does_not_simulate():
    for rank, text in enumerate(pmod.simulate(lambda: in_child(simulated_in_thread), r=2)):
        assert text.startswith(f"pmod.simulate: this process works for rank {rank} of 2"), text
    again = pmod.simulate(lambda: in_child(lambda: pmod.simulate(index, r=2)), r=1)
    assert again == ["PmodError: pmod.simulate: this is a simulated rank already.\nCall it from outside."]


def test_nan_and_infinity_come_through():
    """Values are real ones: nothing is rounded or replaced on the wire."""
    odd = torch.tensor([math.nan, math.inf, -0.0, 1e-45])
    for found in pmod.simulate(lambda: pmod.all_gather(odd, "r"), r=2):
        assert found.view(torch.int32).tolist() == odd.view(torch.int32).tolist() * 2


def test_inside_a_forward_mode_level_it_is_refused():
    with forward_ad.dual_level(), pytest.raises(pmod.PmodError, match="it is called inside a transform"):
        pmod.simulate(index, r=2)
    assert pmod.simulate(lambda: pmod.psum(1, "r"), r=2) == [2, 2]
