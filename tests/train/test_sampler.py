"""Batches for DataLoader: every sample once, as many on every rank, and an epoch that goes on where it was left."""

from __future__ import annotations

import itertools
import pickle
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pmod
from tests.lib import spmd


@contextmanager
def rank_of(rank: int, ranks: int) -> Iterator[None]:
    """This process as one of the ranks: a sampler sends nothing."""
    with pmod.set_mesh(pmod.make_mesh(data=ranks, topology=pmod.Topology(rank=rank, world_size=ranks))):
        yield


def samplers(ranks: int, length: int, **options: Any) -> list[pmod.sampler]:
    found = []
    for rank in range(ranks):
        with rank_of(rank, ranks):
            found.append(pmod.sampler(range(length), "data", **options))
    return found


def joined(parts: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(parts))


def whole_batches(of_ranks: list[pmod.sampler]) -> list[list[int]]:
    """The batches of all ranks joined; there are as many on each, and as many as each says."""
    lists = [list(one) for one in of_ranks]
    assert {len(batches) for batches in lists} == {len(of_ranks[0])}
    return [joined(parts) for parts in zip(*lists, strict=True)]


lengths, sizes = st.integers(0, 40), st.integers(1, 5)


@given(lengths, sizes, sizes, st.booleans(), st.booleans(), st.integers(-3, 3))
def test_every_sample_once_and_as_many_batches_on_every_rank(
    length: int, ranks: int, size: int, shuffle: bool, drop_last: bool, seed: int
) -> None:
    found = samplers(ranks, length, batch_size=size, shuffle=shuffle, drop_last=drop_last, seed=seed)
    batches, whole = whole_batches(found), ranks * size
    order = joined(batches)
    assert len(batches) == (length // whole if drop_last else -(-length // whole))
    assert len(order) == len(set(order)) == (length // whole * whole if drop_last else length)
    assert shuffle or order == list(range(len(order)))
    (alone,) = samplers(1, length, batch_size=whole, shuffle=shuffle, drop_last=drop_last, seed=seed)
    assert list(alone) == batches
    for one in found:
        *full, last = [len(batch) for batch in one] or [0]
        assert set(full) <= {size} and (last == size or not drop_last or not batches)
    if batches:
        ends = [len(list(one)[-1]) for one in found]
        assert max(ends) - min(ends) <= 1


@given(lengths, st.tuples(sizes, sizes), st.tuples(sizes, sizes), st.integers(0, 5), st.data())
def test_going_on_with_another_number_of_ranks(
    length: int, before: tuple[int, int], after: tuple[int, int], epoch: int, data: st.DataObject
) -> None:
    """What was read and what is left are all samples, once; with batches as large, they are those of one go."""
    first = samplers(before[0], length, batch_size=before[1], seed=1)
    for one in first:
        one.set_epoch(epoch)
    every = whole_batches(first)
    done = data.draw(st.integers(0, len(every)))
    (state, *others) = [one.state_dict(done) for one in first]
    assert all(other == state for other in others)
    second = samplers(after[0], length, batch_size=after[1], seed=2, shuffle=False)
    for one in second:
        one.load_state_dict(state)
        one.set_epoch(one.epoch)  # as a loop over epochs does, and changes nothing
    rest = whole_batches(second)
    assert joined(every[:done] + rest) == joined(every)
    if before[0] * before[1] == after[0] * after[1]:
        assert rest == every[done:]
    # once more, from within what was resumed
    again = data.draw(st.integers(0, len(rest)))
    (third,) = samplers(1, length, batch_size=3)
    third.load_state_dict(second[0].state_dict(again))
    assert joined(rest[:again]) + joined(third) == joined(rest)


def test_orders_depend_on_seed_and_epoch_only() -> None:
    orders = []
    for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0)]:
        found = samplers(2, 30, batch_size=4, seed=seed)
        torch.manual_seed(len(orders))  # of no account
        for one in found:
            one.set_epoch(epoch)
        orders.append(whole_batches(found))
        assert whole_batches(found) == orders[-1]
    assert orders[0] == orders[4]
    assert all(one != other for k, one in enumerate(orders[:4]) for other in orders[:k])
    assert orders[0][0] == [2, 16, 9, 28, 0, 1, 13, 17], "an order that was saved must be found again"


def of_a_mesh() -> tuple[list[list[int]], ...]:
    return tuple(list(pmod.sampler(range(20), axis, batch_size=3)) for axis in ("data", ("data", "model")))


def test_along_other_axes_all_read_the_same() -> None:
    found = pmod.simulate(of_a_mesh, data=2, model=2)
    assert found[0][0] == found[1][0] != found[2][0] == found[3][0]
    assert sorted(joined(joined(batches) for _, batches in found)) == list(range(20))


def test_a_resumed_epoch_is_given_once() -> None:
    """Without set_epoch the next epochs would be its rest, again and again."""
    (one,) = samplers(1, 10, batch_size=2)
    list(one)
    assert len(list(one)) == 5
    one.load_state_dict(one.state_dict(3))
    assert len(one) == len(list(one)) == 2
    text = r"pmod\.sampler\(axis='data'\) at \(data=0\): epoch 0 was resumed after 6 of 10 samples and is over"
    with pytest.raises(pmod.PmodError, match=text):
        list(one)
    one.set_epoch(1)
    assert one.epoch == 1 and len(list(one)) == 5


# --- with DataLoader ----------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "x name")


class Samples:
    """Samples of every structure that torch collates; batches are told apart by "id"."""

    def __len__(self) -> int:
        return 21

    def __getitem__(self, i: int) -> dict[str, Any]:
        x = torch.full((2, 3), float(i))
        return {"id": i, "pair": Pair(x, f"sample {i}"), "list": [x.numpy(), 0.5 * i], "tuple": (b"raw", True)}


def loaders(ranks: int, size: int, **options: Any) -> list[tuple[pmod.sampler, DataLoader[Any]]]:
    found = []
    for rank in range(ranks):
        with rank_of(rank, ranks):
            one = pmod.sampler(Samples(), "data", batch_size=size)
        loader = DataLoader(Samples(), batch_sampler=one, collate_fn=one.collate, **options)  # type: ignore[arg-type]
        found.append((one, loader))
    return found


def ids(batch: dict[str, Any]) -> list[int]:
    return batch["id"].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_the_loop_was(workers: int) -> None:
    """Workers fetch ahead: the state is of what the loop has had."""
    options = {"num_workers": workers, "prefetch_factor": 4, "persistent_workers": True} if workers else {}
    expected = [whole_batches(samplers(2, 21, batch_size=2, seed=0))]
    ((one, loader), (other, second)) = loaders(2, 2, **options)
    assert len(loader) == 6
    had, states = [], []
    for done, parts in enumerate(zip(loader, second, strict=True), 1):
        had.append(joined(map(ids, parts)))
        states.append(one.state_dict(done))
        if done == 2:
            break
    assert had == expected[0][:2]
    one.load_state_dict(states[-1])
    other.load_state_dict(states[-1])
    assert [joined(map(ids, parts)) for parts in zip(loader, second, strict=True)] == expected[0][2:]
    one.set_epoch(1)
    other.set_epoch(1)
    of_next = [joined(map(ids, parts)) for parts in zip(loader, second, strict=True)]
    assert sorted(joined(of_next)) == list(range(21)) and of_next != expected[0]


def test_a_batch_of_nothing_is_like_the_others() -> None:
    (_, first), (_, second) = loaders(2, 4)
    full, last = next(iter(first)), list(second)[-1]  # 21 = 2 x 8 + 5, of which the second rank has 2
    assert len(ids(last)) == 2
    (_, first), (_, second) = loaders(2, 5)
    last = list(second)[-1]  # 21 = 2 x 10 + 1
    assert ids(last) == []

    def like(x: Any, y: Any) -> None:
        if isinstance(y, torch.Tensor):
            assert (x.shape[1:], x.dtype, len(x)) == (y.shape[1:], y.dtype, 0)
        elif isinstance(y, dict):
            assert list(x) == list(y)
            for key in y:
                like(x[key], y[key])
        elif isinstance(y[0], str | bytes):
            assert x == []
        else:
            assert type(x) is type(y) and len(x) == len(y)
            for part, other in zip(x, y, strict=True):
                like(part, other)

    like(last, full)


def test_workers_that_are_spawned_are_sent_the_collate() -> None:
    ((one, _),) = loaders(1, 2)
    assert ids(pickle.loads(pickle.dumps(one.collate))([])) == []


# --- training -----------------------------------------------------------------------------------------------------


def trained(steps: int, state: dict[str, Any] | None) -> dict[str, Any]:
    """An epoch's last batch is one sample: some ranks have none."""
    x = torch.linspace(-1, 1, 17 * 3, dtype=torch.float64).reshape(17, 3)
    dataset = TensorDataset(x, x.sin().sum(1, keepdim=True))
    model = torch.nn.Linear(3, 1, dtype=torch.float64)
    model.load_state_dict(state["model"] if state else {"weight": torch.ones(1, 3), "bias": torch.ones(1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    batches = pmod.sampler(dataset, "data", batch_size=8 // pmod.axis_size("data"))
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=batches.collate)  # type: ignore[arg-type]
    if state:
        batches.load_state_dict(state["batches"])
    for epoch in range(batches.epoch, 3):
        batches.set_epoch(epoch)
        for done, (x, y) in enumerate(loader, 1):
            params = pmod.pvary(dict(model.named_parameters()), "data")
            errors = (torch.func.functional_call(model, params, (x,)) - y).square()
            loss = pmod.pmean(errors.mean(), "data", weight=len(x))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps -= 1
            if steps == 0:
                return {"model": model.state_dict(), "batches": batches.state_dict(done)}
    raise AssertionError("there are 9 steps")


@pytest.mark.parametrize(("run", "ranks"), [(pmod.simulate, 2), (pmod.simulate, 4), (spmd.launch, 2)])
def test_training_is_that_of_one_process(run: Callable[..., Any], ranks: int) -> None:
    (alone,) = pmod.simulate(trained, 9, None, data=1)
    (half,) = pmod.simulate(trained, 5, None, data=1)  # in the middle of the second epoch
    for found in run(trained, 9, None, data=ranks) + run(trained, 4, half, data=ranks):
        assert found["batches"] == alone["batches"] == {"epoch": 2, "start": 17, "length": 17, "seed": 0, "shuffle": 1}
        torch.testing.assert_close(found["model"], alone["model"], rtol=1e-12, atol=1e-12)


# --- wrong arguments ----------------------------------------------------------------------------------------------


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return itertools.count()


def resumed(**changes: int) -> None:
    one = pmod.sampler(range(9), "data")
    one.load_state_dict({**one.state_dict(0), **changes})


WRONG: dict[str, tuple[Callable[[], Any], type[pmod.PmodError], str]] = {
    "no length": (
        lambda: pmod.sampler(Endless(), "data"),  # type: ignore[arg-type]
        pmod.ArgumentError,
        "pmod.sampler(axis='data') at (data=0): dataset is a Endless, which has no length.\n"
        "Pass one with __len__ and __getitem__.",
    ),
    "no batch": (
        lambda: pmod.sampler(range(9), "data", batch_size=0),
        pmod.ShapeError,
        "pmod.sampler(axis='data') at (data=0): batch_size is 0.\nPass an int of 1 or more.",
    ),
    "half a batch": (
        lambda: pmod.sampler(range(9), "data", batch_size=0.5),  # type: ignore[arg-type]
        pmod.ShapeError,
        "pmod.sampler(axis='data') at (data=0): batch_size is 0.5.\nPass an int of 1 or more.",
    ),
    "seed": (
        lambda: pmod.sampler(range(9), "data", seed="s"),  # type: ignore[arg-type]
        pmod.ArgumentError,
        "pmod.sampler(axis='data') at (data=0): seed is a str.\nPass an int.",
    ),
    "epoch": (
        lambda: pmod.sampler(range(9), "data").set_epoch(-1),
        pmod.ShapeError,
        "pmod.sampler.set_epoch(axis='data') at (data=0): epoch is -1.\nPass an int of 0 or more.",
    ),
    "too many": (
        lambda: pmod.sampler(range(9), "data", batch_size=4).state_dict(4),
        pmod.ShapeError,
        "pmod.sampler.state_dict(axis='data') at (data=0): done is 4, and there are 3 batches.\n"
        "Count the batches since the loop over the DataLoader began.",
    ),
    "start before the first": (
        lambda: resumed(start=-4),
        pmod.ShapeError,
        "pmod.sampler.load_state_dict(axis='data') at (data=0): start is -4.\n"
        "It is 0 or more. Pass what state_dict(done) returned.",
    ),
    "start after the last": (
        lambda: resumed(start=50),
        pmod.ShapeError,
        "pmod.sampler.load_state_dict(axis='data') at (data=0): start is 50, and there are 9 samples.\n"
        "It says how many of them were read.",
    ),
    "start is a text": (
        lambda: resumed(start="2"),  # type: ignore[arg-type]
        pmod.ArgumentError,
        "pmod.sampler.load_state_dict(axis='data') at (data=0): start is '2', a str.\n"
        "Pass what state_dict(done) returned.",
    ),
    "epoch of a state": (
        lambda: resumed(epoch=-1),
        pmod.ShapeError,
        "pmod.sampler.load_state_dict(axis='data') at (data=0): epoch is -1.\n"
        "It is 0 or more. Pass what state_dict(done) returned.",
    ),
    "seed of a state": (
        lambda: resumed(seed=None),  # type: ignore[arg-type]
        pmod.ArgumentError,
        "pmod.sampler.load_state_dict(axis='data') at (data=0): seed is None, a NoneType.\n"
        "Pass what state_dict(done) returned.",
    ),
    "shuffle of a state": (
        lambda: resumed(shuffle=2),
        pmod.ShapeError,
        "pmod.sampler.load_state_dict(axis='data') at (data=0): shuffle is 2.\n"
        "It is 0 or 1. Pass what state_dict(done) returned.",
    ),
    "unknown and missing": (
        lambda: pmod.sampler(range(9), "data").load_state_dict({"epoch": 0, "step": 3, "length": 9, "seed": 0}),
        pmod.ArgumentError,
        "pmod.sampler.load_state_dict(axis='data') at (data=0): the state lacks 'start', 'shuffle' and has unknown "
        "'step'.\nPass what state_dict(done) returned.",
    ),
    "no state": (
        lambda: pmod.sampler(range(9), "data").load_state_dict(None),  # type: ignore[arg-type]
        pmod.ArgumentError,
        "pmod.sampler.load_state_dict(axis='data') at (data=0): state is a NoneType.\n"
        "Pass what state_dict(done) returned.",
    ),
    "shuffle is a text": (
        lambda: pmod.sampler(range(9), "data", shuffle="no"),  # type: ignore[arg-type]
        pmod.ArgumentError,
        "pmod.sampler(axis='data') at (data=0): shuffle is 'no'.\nPass True or False.",
    ),
    "another dataset": (
        lambda: resumed(length=8),
        pmod.ShapeError,
        "pmod.sampler.load_state_dict(axis='data') at (data=0): the state is of a dataset of 8 samples, and this one "
        "has 9.\nResume with the dataset that it was saved with.",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(what: str) -> None:
    call, kind, text = WRONG[what]
    with pmod.set_mesh(pmod.make_mesh(data=1)), pytest.raises(kind) as raised:
        call()
    assert type(raised.value) is kind and str(raised.value) == text
