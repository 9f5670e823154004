"""The `_v` functions where the table of cases does not look: what is refused and told, plans, bytes on the wire."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import pmod
from pmod._collectives.exchange import HEAD
from pmod._wire.gloo import GLOO, GlooWire
from tests.lib import oracle, spmd
from tests.lib.listening import counted, listening, same
from tests.lib.raised import check, on_all_ranks, raised_by

Tensor = torch.Tensor
X = torch.ones(4, 2)
HERE = torch.tensor([0, 3])
NONE = torch.tensor([], dtype=torch.int64)


def index() -> int:
    return pmod.axis_index("model")


# --- what is refused ----------------------------------------------------------------------------------------------


def indexed(indices: Any, x: Any = X, **kwargs: Any) -> Any:
    return pmod.indexed_all_to_all_v(x, "model", indices=indices, **kwargs)


def planned(x: Any = X, **kwargs: Any) -> Any:
    return indexed(pmod.exchange_plan([HERE, NONE], "model"), x, **kwargs)


def plan_of_the_other() -> Any:
    plan = pmod.exchange_plan([HERE, NONE], "model")
    return indexed(attrs.evolve(plan, place=(plan.place[0], 1 - plan.place[1])))


def plan_of_another_axis() -> Any:
    return pmod.indexed_all_to_all_v(X, "data", indices=pmod.exchange_plan([HERE, NONE], "model"))


COUNT = "Pass 2 int64 tensors of one dim, one per rank of the axis."
SELF = "recv_sizes[j] is what rank j sends to this rank."
TOLD = "or leave sizes out to exchange them."
OF_ROWS = "indexed_all_to_all_v"
# the call, its type of error, what the error names, and its text; a pair holds a text per rank
WRONG: dict[str, tuple[Callable[[], Any], type[pmod.PmodError], str, str | tuple[str, str]]] = {
    "all_gather_v: another length": (
        lambda: pmod.all_gather_v(X, "model", sizes=(3, 3)), pmod.ShapeError, "all_gather_v",
        (f"sizes[0] is 3 but x.shape[0] is 4.\nPass sizes=(4, 3), {TOLD}",
         f"sizes[1] is 3 but x.shape[0] is 4.\nPass sizes=(3, 4), {TOLD}"),
    ),
    "all_gather_v: another length on one rank": (
        lambda: pmod.all_gather_v(X[: 4 - index()], "model", sizes=(3, 2), dim=-2), pmod.ShapeError, "all_gather_v",
        (f"sizes[0] is 3 but x.shape[0] is 4.\nPass sizes=(4, 2), {TOLD}",
         f"sizes[1] is 2 but x.shape[0] is 3.\nPass sizes=(3, 3), {TOLD}"),
    ),
    "gather_v: another length, of a leaf": (
        lambda: pmod.gather_v({"b": X.T, "a": X[:, :1].T}, "model", dim=1, sizes=(5, 5)), pmod.ShapeError, "gather_v",
        (f"sizes[0] is 5 but x.shape[1] is 4.\nPass sizes=(4, 5), {TOLD}",
         f"sizes[1] is 5 but x.shape[1] is 4.\nPass sizes=(5, 4), {TOLD}"),
    ),
    "psum_scatter_v: of a leaf": (
        lambda: pmod.psum_scatter_v([X, X[1:]], "model", sizes=(4, 0)), pmod.ShapeError, "psum_scatter_v",
        "sizes (4, 0) add up to 4 but x.shape[0] is 3.\nPass sizes that add up to 3, (2, 1) say.",
    ),
    "all_to_all_v: of a leaf, sizes to be told": (
        lambda: pmod.all_to_all_v([X, X[1:]], "model", send_sizes=(4, 0)), pmod.ShapeError, "all_to_all_v",
        "send_sizes (4, 0) add up to 4 but x.shape[0] is 3.\nPass send_sizes that add up to 3, (2, 1) say.",
    ),
    "all_to_all_v: recv_sizes contradict": (
        lambda: pmod.all_to_all_v(X, "model", send_sizes=(1, 3), recv_sizes=(2, 2)), pmod.ShapeError, "all_to_all_v",
        (f"recv_sizes[0] is 2 but this rank sends itself 1.\n{SELF}",
         f"recv_sizes[1] is 2 but this rank sends itself 3.\n{SELF}"),
    ),
    "indexed: recv_sizes contradict": (
        lambda: indexed([HERE, HERE[:1]], recv_sizes=(3, 3)), pmod.ShapeError, OF_ROWS,
        (f"recv_sizes[0] is 3 but this rank sends itself 2.\n{SELF}",
         f"recv_sizes[1] is 3 but this rank sends itself 1.\n{SELF}"),
    ),
    "indexed: recv_sizes of another length": (
        lambda: indexed([HERE, NONE], recv_sizes=[2]), pmod.ShapeError, OF_ROWS,
        "recv_sizes is [2].\nPass 2 ints, one per rank of the axis.",
    ),
    "indexed: a row too far": (
        lambda: indexed([HERE, torch.tensor([1, 4])], recv_sizes=(2, 2)), pmod.ShapeError, OF_ROWS,
        "indices hold 4 but x.shape[0] is 4.\nRows are 0 to 3.",
    ),
    "indexed: a row too far, recv_sizes to be told": (
        lambda: indexed([HERE, torch.tensor([1, 2])], dim=-1), pmod.ShapeError, OF_ROWS,
        "indices hold 3 but x.shape[1] is 2.\nRows are 0 to 1.",
    ),
    "indexed: a row too far for the second leaf": (
        lambda: indexed([HERE, HERE], [X, X[:3]]), pmod.ShapeError, OF_ROWS,
        "indices hold 3 but x.shape[0] is 3.\nRows are 0 to 2.",
    ),
    "indexed: a negative row": (
        lambda: indexed([torch.tensor([0, -1]), HERE]), pmod.ShapeError, OF_ROWS,
        "indices hold -1 but x.shape[0] is 4.\nRows are 0 to 3.",
    ),
    "indexed: a row of nothing": (
        lambda: indexed([HERE[:1], NONE], X[:0]), pmod.ShapeError, OF_ROWS, "indices hold 0 but x.shape[0] is 0.",
    ),
    "indexed: as many as ranks, but no more": (
        lambda: indexed([HERE]), pmod.ShapeError, OF_ROWS, f"indices are 1 of them.\n{COUNT}",
    ),
    "indexed: one tensor": (
        lambda: indexed(torch.stack([HERE, HERE])), pmod.ShapeError, OF_ROWS, f"indices are a Tensor.\n{COUNT}",
    ),
    "indexed: none": (lambda: indexed(None), pmod.ShapeError, OF_ROWS, f"indices are a NoneType.\n{COUNT}"),
    "indexed: of int32": (
        lambda: indexed([HERE, HERE.int()]), pmod.ArgumentError, OF_ROWS,
        f"indices[1] has dtype int32 and 1 dims.\n{COUNT}",
    ),
    "indexed: a mask": (
        lambda: indexed([X[:, 0] > 0, HERE]), pmod.ArgumentError, OF_ROWS,
        f"indices[0] has dtype bool and 1 dims.\n{COUNT}",
    ),
    "indexed: of float": (
        lambda: indexed([torch.tensor([]), HERE]), pmod.ArgumentError, OF_ROWS,
        f"indices[0] has dtype float32 and 1 dims.\n{COUNT}",
    ),
    "indexed: of two dims": (
        lambda: indexed([HERE, HERE[None]]), pmod.ArgumentError, OF_ROWS,
        f"indices[1] has dtype int64 and 2 dims.\n{COUNT}",
    ),
    "indexed: a number": (
        lambda: indexed([HERE, torch.tensor(3)]), pmod.ArgumentError, OF_ROWS,
        f"indices[1] has dtype int64 and 0 dims.\n{COUNT}",
    ),
    "indexed: lists": (
        lambda: indexed([[0], [1]]), pmod.ArgumentError, OF_ROWS, f"indices[0] is a list.\n{COUNT}",
    ),
    "indexed: on another device": (
        lambda: indexed([HERE, HERE.to("meta")]), pmod.ArgumentError, OF_ROWS,
        "indices[1] is on meta and x is on cpu.\nPass indices on cpu.",
    ),
    "indexed: mapped by vmap": (
        lambda: vmap(lambda rows: indexed([HERE, rows]))(torch.stack([HERE, HERE])), pmod.ArgumentError, OF_ROWS,
        "indices[1] is mapped by vmap.\nMap over x only.",
    ),
    "plan: a negative row": (
        lambda: pmod.exchange_plan([HERE, -HERE], "model"), pmod.ShapeError, "exchange_plan",
        "indices hold -3.\nRows count from 0.",
    ),
    "plan: one too many": (
        lambda: pmod.exchange_plan([HERE] * 3, "model"), pmod.ShapeError, "exchange_plan",
        f"indices are 3 of them.\n{COUNT}",
    ),
    "plan: of int32": (
        lambda: pmod.exchange_plan((HERE.int(), HERE), "model"), pmod.ArgumentError, "exchange_plan",
        f"indices[0] has dtype int32 and 1 dims.\n{COUNT}",
    ),
    "plan: on two devices": (
        lambda: pmod.exchange_plan((HERE, HERE.to("meta")), "model"), pmod.ArgumentError, "exchange_plan",
        "indices[1] is on meta and indices[0] is on cpu.\nPass indices on cpu.",
    ),
    "plan: mapped by vmap": (
        lambda: vmap(lambda rows: pmod.exchange_plan([rows, HERE], "model"))(torch.stack([HERE, HERE])),
        pmod.ArgumentError, "exchange_plan", "indices[0] is mapped by vmap.\nMap over x only.",
    ),
}  # fmt: skip
# those that make a plan first, which sends a message
WRONG_PLANS: dict[str, tuple[Callable[[], Any], type[pmod.PmodError], str]] = {
    "fewer rows": (
        lambda: planned(X[:3]), pmod.ShapeError, "indices hold 3 but x.shape[0] is 3.\nRows are 0 to 2.",
    ),
    "and recv_sizes": (
        lambda: planned(recv_sizes=(2, 0)), pmod.ShapeError,
        "recv_sizes and a plan are given.\nThe plan knows recv_sizes.",
    ),
    "of another rank": (
        plan_of_the_other, pmod.AxisError,
        "the plan is for index <other> of the ranks <model>.\n"
        "This is index <i> of the ranks <model>: each rank makes its own plan, per axis.",
    ),
    "of another axis": (
        plan_of_another_axis, pmod.AxisError,
        "the plan is for index <i> of the ranks <model>.\n"
        "This is index <j> of the ranks <data>: each rank makes its own plan, per axis.",
    ),
}  # fmt: skip


def place(mesh: pmod.Mesh) -> str:
    return f"(data={mesh.coords['data']}, model={mesh.coords['model']})"


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("started", [False, True])
def test_refused_before_anything_is_sent(what: str, started: bool, messages: list[Any]) -> None:
    call, kind, function, text = WRONG[what]
    for mesh, error in on_all_ranks((lambda: pmod.start(call)) if started else call):
        own = text if isinstance(text, str) else text[mesh.coords["model"]]
        check(error, kind, f"pmod.{function}(axis='model') at {place(mesh)}: {own}")
    assert not messages


@pytest.mark.parametrize("what", WRONG_PLANS)
def test_a_plan_refused(what: str, messages: list[Any]) -> None:
    call, kind, text = WRONG_PLANS[what]
    for mesh, error in on_all_ranks(call):
        i, j = mesh.coords["model"], mesh.coords["data"]
        axis = "data" if "another axis" in what else "model"
        tokens = {"i": i, "j": j, "other": 1 - i, "model": mesh["model"], "data": mesh["data"]}
        own = text
        for token, value in tokens.items():
            ranks = value.axis_names and f"{value.ranks.min()}:2:{2 if token == 'data' else 1}" if token in (
                "model", "data") else value  # fmt: skip
            own = own.replace(f"<{token}>", str(ranks))
        check(error, kind, f"pmod.{OF_ROWS}(axis={axis!r}) at {place(mesh)}: {own}")
    assert len(messages) == 4  # the plans'


# --- what only the others know ------------------------------------------------------------------------------------


def unlike(what: str) -> Any:
    """x on this rank, the last of which is another."""
    i, last = pmod.axis_index("x"), pmod.axis_index("x") == pmod.axis_size("x") - 1
    x = torch.ones(2, 3 + last if what == "another shape" else 3)
    if what == "another number of dims":
        x = x[..., None] if last else x
    if what == "another dtype":
        x = x.double() if last else x
    if what == "another number of leaves":
        return [x] * (1 + last)
    if what == "many leaves":
        return [x] * (HEAD + last)
    return {"a": x, "b": torch.ones(2, 1 + i * (what == "the second leaf"))}


FITS = {
    "another shape": ("(..., 3) float32, (..., 1) float32", "(..., 4) float32, (..., 1) float32"),
    "another number of dims": ("(..., 3) float32, (..., 1) float32", "(..., 3, 1) float32, (..., 1) float32"),
    "another dtype": ("(..., 3) float32, (..., 1) float32", "(..., 3) float64, (..., 1) float32"),
    "another number of leaves": ("(..., 3) float32", "(..., 3) float32, (..., 3) float32"),
    "many leaves": (", ".join(["(..., 3) float32"] * HEAD), ", ".join(["(..., 3) float32"] * (HEAD + 1))),
}


def unlike_on_rank() -> None:
    i, n = pmod.axis_index("x"), pmod.axis_size("x")
    calls: dict[str, Callable[[Any], Any]] = {
        "all_gather_v": lambda x: pmod.all_gather_v(x, "x"),
        "gather_v": lambda x: pmod.gather_v(x, "x", dst=1),
        "all_to_all_v": lambda x: pmod.all_to_all_v(x, "x", send_sizes=[2] + [0] * (n - 1)),
        "indexed_all_to_all_v": lambda x: pmod.indexed_all_to_all_v(x, "x", indices=[torch.tensor([0])] * n),
    }
    last = n - 1
    for (function, call), (what, fits) in itertools.product(calls.items(), FITS.items()):
        error, sent = counted(lambda call=call, what=what: raised_by(lambda: call(unlike(what))))
        others = ", ".join(map(str, range(last))) if i == last else str(last)
        check(
            error, pmod.MismatchError,
            f"pmod.{function}(axis='x') at (x={i}): x is {fits[i == last]} here, and of another shape or dtype at "
            f"index {others} of the axis.\nShards differ in length along dim only.",
        )  # fmt: skip
        assert len(sent) == 1, sent
    assert pmod.psum(1, "x") == n


@pytest.mark.parametrize("ranks", [2, 4])
def test_shapes_that_do_not_fit(run: Any, ranks: int) -> None:
    """Every rank raises, and all go on together."""
    run(unlike_on_rank, x=ranks)


def many_leaves_on_rank() -> None:
    i = pmod.axis_index("x")
    for count in (HEAD - 2, HEAD - 1, HEAD, 3 * HEAD):
        tree = [torch.full(((i + k) % 3, 2), float(k)) for k in range(count)]
        out, sent = counted(lambda tree=tree: pmod.all_gather_v(tree, "x"))
        assert len(sent) == 1 + (count >= HEAD) + sum(1 for _ in tree)
        for k, y in enumerate(out):
            assert y.tolist() == [[k, k]] * sum((j + k) % 3 for j in range(pmod.axis_size("x")))


def test_trees_of_many_leaves(run: Any) -> None:
    run(many_leaves_on_rank, x=2)


# --- plans --------------------------------------------------------------------------------------------------------


def rows_of(i: int, n: int, length: int) -> list[Tensor]:
    """Repeats, no order, nothing for some."""
    return [torch.tensor([(3 * i + 2 * j + k * k) % length for k in range((i + 2 * j) % 4)]).long() for j in range(n)]


def numbers(i: int, *shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(i))


def planned_on_rank(axis: Any) -> None:
    i, n = pmod.axis_index(axis), pmod.axis_size(axis)
    length = 5 + i
    indices = rows_of(i, n, length)
    kept = [rows.clone() for rows in indices]
    plan, sent = counted(lambda: pmod.exchange_plan(indices, axis))
    assert sent == ([("all_to_all", torch.int64, n)] if n > 1 else [])
    for rows in indices:
        rows.zero_()  # the plan is a value
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        plan.send_sizes = (0,) * n
    assert plan.send_sizes == tuple(map(len, kept))
    assert plan.recv_sizes == tuple(len(rows_of(j, n, 99)[i]) for j in range(n))
    loaded = pickle.loads(pickle.dumps(plan))
    w = numbers(7, sum(plan.recv_sizes), 2)
    v = numbers(8 + i, length, 2)

    def loss(x: Tensor, indices: Any) -> Tensor:
        return (w * pmod.indexed_all_to_all_v(x, axis, indices=indices).exp()).sum()

    def uses(x: Tensor, indices: Any) -> list[Tensor]:
        """Every way to use it."""

        def f(x: Tensor) -> Tensor:
            return loss(x, indices)

        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad((first * v).sum(), leaf)
        saved = x.clone().requires_grad_()
        checkpoint(f, saved, use_reentrant=False).backward()
        started = pmod.start(pmod.indexed_all_to_all_v, x, axis, indices=indices).wait()
        exchange = vmap(lambda x: pmod.indexed_all_to_all_v(x, axis, indices=indices), in_dims=-1)
        turned = pmod.indexed_all_to_all_v(x.T, axis, indices=indices, dim=1)
        return [started, first, second, saved.grad, grad(f)(x), jvp(grad(f), (x,), (v,))[1], exchange(x), turned]

    x = numbers(i, length, 2)
    raw = uses(x, kept)
    for given in (plan, loaded):
        for got, expected in zip(uses(x, given), raw, strict=True):
            same(got, expected.detach(), "by a plan", rtol=0, atol=0)
    for got, expected in ((raw[1], raw[3]), (raw[1], raw[4]), (raw[2], raw[5]), (raw[7], raw[0].T)):
        same(got, expected.detach(), "one way and another")
    for dtype in (torch.bool, torch.int32, torch.bfloat16, torch.complex64):
        z = (10 * numbers(i, length, 3)).to(dtype)
        y, sent = counted(lambda z=z: pmod.indexed_all_to_all_v(z, axis, indices=plan))
        # a complex number is a pair of reals
        kind, each = (torch.float32, 6) if dtype.is_complex else (dtype, 3)
        assert sent == ([("all_to_all", kind, each * sum(plan.send_sizes))] if n > 1 else [])
        assert torch.equal(y, pmod.indexed_all_to_all_v(z, axis, indices=kept))
    tree = pmod.indexed_all_to_all_v({"a": x, "b": [x.float(), None]}, axis, indices=plan)
    assert torch.equal(tree["a"], raw[0]) and torch.equal(tree["b"][0], raw[0].float())


AXES = [("x", {"x": 4}), ("x", {"x": 1}), ("b,a", {"a": 2, "b": 2}), ("mesh", {"a": 2, "b": 2})]


def planned_along(axis: str) -> None:
    mesh = pmod.current_mesh()
    planned_on_rank(mesh["b"] if axis == "mesh" else tuple(axis.split(",")))


@pytest.mark.parametrize(("axis", "sizes"), AXES, ids=str)
def test_plans(axis: str, sizes: dict[str, int]) -> None:
    with listening():
        pmod.simulate(planned_along, axis, **sizes)


def heard_plans(axes: list[str]) -> None:
    with listening():
        for axis in axes:
            planned_along(axis)


def test_plans_on_processes() -> None:
    spmd.launch(heard_plans, ["b,a", "mesh"], a=2, b=2)


def plans_made() -> bytes:
    return pickle.dumps(pmod.exchange_plan([HERE, HERE[: 1 + pmod.axis_index("x")]], "x"))


def plans_used(plans: list[bytes]) -> list[float]:
    i = pmod.axis_index("x")
    with pytest.raises(pmod.AxisError, match=f"the plan is for index {1 - i} of the ranks"):
        pmod.indexed_all_to_all_v(X, "x", indices=pickle.loads(plans[1 - i]))
    return pmod.indexed_all_to_all_v(10.0 * i + torch.arange(4.0), "x", indices=pickle.loads(plans[i])).tolist()


def test_a_plan_in_another_process() -> None:
    plans = pmod.simulate(plans_made, x=2)
    expected = [[0, 3, 10, 13], [0, 10, 13]]
    assert pmod.simulate(plans_used, plans, x=2) == spmd.launch(plans_used, plans, x=2) == expected


def nothing_on_rank() -> None:
    n = pmod.axis_size("x")
    x = torch.ones(0, 3, dtype=torch.float64, requires_grad=True)
    plan = pmod.exchange_plan([NONE] * n, "x")
    for y in (
        pmod.indexed_all_to_all_v(x, "x", indices=plan),
        pmod.indexed_all_to_all_v(x, "x", indices=[NONE] * n),
        pmod.all_to_all_v(x, "x", send_sizes=[0] * n),
        pmod.all_gather_v(x, "x"),
        pmod.gather_v(x, "x"),
        pmod.psum_scatter_v(x, "x", sizes=[0] * n),
        pmod.scatter_v(x, "x", sizes=[0] * n),
    ):
        assert y.shape == (0, 3)
        (g,) = torch.autograd.grad((y * y).sum(), x)
        assert g.shape == (0, 3)


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_own_nothing(run: Any, ranks: int) -> None:
    run(nothing_on_rank, x=ranks)


# --- sums ---------------------------------------------------------------------------------------------------------


def sums_on_rank(dtype: torch.dtype) -> None:
    i, n = pmod.axis_index("x"), pmod.axis_size("x")
    big = 2.0 / torch.finfo(dtype).eps  # from here on, adding 1 is lost
    received = big if i == 0 else 1.0
    wide = torch.float64 if dtype == torch.float32 else None
    repeated = [torch.tensor([0, 0, 0])] * n

    def back(function: Callable[..., Tensor], x: Tensor, **kwargs: Any) -> Tensor:
        """The gradient, where the first rank's weights are big and the others' 1."""
        x = x.clone().requires_grad_()
        y = function(x, "x", **kwargs)
        (g,) = torch.autograd.grad(y, x, torch.full_like(y, received))
        assert g.dtype == x.dtype
        return g

    exact = torch.tensor(3 * (big + n - 1)).to(dtype).item()  # rounded once
    for dim, shape in ((0, (2, 3)), (-1, (3, 2)), (0, (2,)), (1, (2, 2, 2))):
        x = torch.zeros(shape, dtype=dtype)
        for indices in (repeated, pmod.exchange_plan(repeated, "x")):
            g = back(pmod.indexed_all_to_all_v, x, indices=indices, dim=dim, reduce_dtype=wide)
            assert g.select(dim, 0).unique().tolist() == [exact] and g.select(dim, 1).unique().tolist() == [0]
        if len(shape) != 2:  # there torch's own sum is a wide one
            g = back(pmod.indexed_all_to_all_v, x, indices=repeated, dim=dim, reduce_dtype=dtype)
            assert g.select(dim, 0).unique().tolist() != [exact], "a narrow sum is another in this example"
    one = torch.zeros(1, dtype=dtype)
    total = torch.tensor(big + n - 1).to(dtype).item()
    assert back(pmod.all_gather_v, one, sizes=(1,) * n, reduce_dtype=wide).tolist() == [total]
    assert back(pmod.all_gather_v, one, reduce_dtype=dtype).tolist() == [big]
    parts = torch.full((n,), received, dtype=dtype)
    assert pmod.psum_scatter_v(parts, "x", sizes=(1,) * n, reduce_dtype=wide).tolist() == [total]
    assert pmod.psum_scatter_v(parts, "x", sizes=(1,) * n, reduce_dtype=dtype).tolist() == [big]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sums_are_wide(run: Any, dtype: torch.dtype) -> None:
    """In float32 where 16 bits would lose what is added, and in what is asked for."""
    run(sums_on_rank, dtype, x=4)


# --- bytes on the wire --------------------------------------------------------------------------------------------

SKEWED = (1000, 1, 0, 3)


def skewed_on_rank() -> None:
    i, n = pmod.axis_index("x"), 4
    x = torch.ones(SKEWED[i], 2, requires_grad=True)
    whole = torch.ones(sum(SKEWED), 2, requires_grad=True)
    rows = [torch.arange(min(SKEWED[i], j)) for j in range(n)]
    own = len(x) * 2
    everything = 2 * sum(SKEWED)
    scattered = whole if i == 1 else whole[:0]
    calls: dict[str, tuple[Callable[[], Tensor], int, int]] = {
        # the elements that are handed to the wire, forward and backward
        "all_gather_v": (lambda: pmod.all_gather_v(x, "x", sizes=SKEWED), own, everything),
        "psum_scatter_v": (lambda: pmod.psum_scatter_v(whole, "x", sizes=SKEWED), everything, own),
        "gather_v": (lambda: pmod.gather_v(x, "x", sizes=SKEWED, dst=1), own, everything if i == 1 else 0),
        "scatter_v": (lambda: pmod.scatter_v(scattered, "x", sizes=SKEWED, src=1), everything if i == 1 else 0, own),
        "all_to_all_v": (
            lambda: pmod.all_to_all_v(
                x, "x", send_sizes=[SKEWED[i] * (j == 3) for j in range(n)], recv_sizes=[s * (i == 3) for s in SKEWED]
            ),
            own, everything if i == 3 else 0,
        ),
        "indexed_all_to_all_v": (
            lambda: pmod.indexed_all_to_all_v(x, "x", indices=rows),
            2 * sum(map(len, rows)), 2 * sum(min(length, i) for length in SKEWED),
        ),
    }  # fmt: skip
    for name, (call, forward, backward) in calls.items():
        y, sent = counted(call)
        assert [count for *_, count in sent][-1] == forward, f"{name}: {sent}"
        assert [count for *_, count in sent][:-1] == ([HEAD * n] if name.startswith("indexed") else [])
        _, sent = counted(lambda y=y: torch.autograd.grad(y.sum(), x if y is not None and x in _leaves(y) else whole))
        assert [count for *_, count in sent] == [backward], f"{name}: {sent}"


def _leaves(y: Tensor) -> set[Tensor]:
    found, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        found |= {node.variable} if hasattr(node, "variable") else set()
        todo += [before for before, _ in node.next_functions if before is not None]
    return found


def test_nothing_is_padded(run: Any) -> None:
    run(skewed_on_rank, x=4)


class Socket:
    """Counts what leaves a rank, in place of a process group."""

    def __init__(self, index: int) -> None:
        self.index, self.sent = index, 0

    def alltoall_base(self, out: Tensor, x: Tensor, recv: list[int], send: list[int]) -> Any:
        self.sent += x.element_size() * (sum(send) - send[self.index])
        return self

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> Any:
        self.sent += sum(x.nbytes for x in tensors)
        return self

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> Any:
        return self

    def wait(self) -> None:
        pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("sizes", [SKEWED, (0, 7), (5, 0, 0)], ids=str)
def test_bytes_that_leave_a_rank(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """On gloo: its own part to each of the others once, and nothing else."""
    n = len(sizes)
    for index, ahead in itertools.product(range(n), (False, True)):
        x = torch.ones(sizes[index], dtype=dtype)
        for how, expected in (("gather", (n - 1) * x.nbytes), ("scatter", (sum(sizes) - sizes[index]) * x.itemsize)):
            socket = Socket(index)
            wire = GlooWire(n, index, socket, GLOO)
            wire.ahead = ahead
            if how == "gather":
                wire.all_gather(x, sizes).wait()
            elif dtype.is_floating_point:
                wire.reduce_scatter(torch.ones(sum(sizes), dtype=dtype), sizes, torch.float64).wait()
            else:
                continue
            assert socket.sent == expected, f"{how} on rank {index}"


# --- started ------------------------------------------------------------------------------------------------------

ASKING: dict[str, Callable[[Tensor], Any]] = {
    "all_gather_v": lambda x: pmod.all_gather_v(x, "x", dim=-1),
    "gather_v": lambda x: pmod.gather_v(x, "x", dst=1, dim=1),
    "all_to_all_v": lambda x: pmod.all_to_all_v(x, "x", send_sizes=[1, 2 + pmod.axis_index("x")], dim=1),
    "indexed_all_to_all_v": lambda x: pmod.indexed_all_to_all_v(x, "x", indices=[HERE % 3, HERE[:1]], dim=1),
    "a tree": lambda x: pmod.all_gather_v({"a": x, "b": x.float()}, "x", dim=1)["a"],
    "two that ask": lambda x: pmod.all_gather_v(pmod.all_gather_v(x.sin(), "x", dim=1).cos(), "x", dim=1),
    "asks, then not": lambda x: pmod.psum(pmod.all_gather_v(x, "x", dim=1).sin(), "x"),
}


def asking_on_rank() -> None:
    i = pmod.axis_index("x")
    for name, f in ASKING.items():
        results = []
        for started in (False, True):
            x = numbers(i, 2, 3 + i).requires_grad_()
            if started:
                pending, ahead = counted(lambda f=f, x=x: pmod.start(f, x))
                assert [dtype for _, dtype, _ in ahead][:2] == [torch.int64, torch.float64], f"{name}: {ahead}"
                y, rest = counted(pending.wait)
                sent = ahead + rest
            else:
                y, sent = counted(lambda f=f, x=x: f(x))
            sent = [*sent]  # from here on, what backward sends is noted too
            (first,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.cos().sum(), x)
            results.append(([y, first, second], sent))
        (direct, sent), (started_, sent_ahead) = results
        assert sent_ahead == sent, f"{name} sends {sent_ahead} for {sent}"
        for a, b in zip(started_, direct, strict=True):
            same(a, b.detach(), name, rtol=0, atol=0)


def test_started(run: Any) -> None:
    """Sizes are told once, when it is started."""
    run(asking_on_rank, x=2)


# --- compiled -----------------------------------------------------------------------------------------------------


def compiled_on_rank() -> list[str]:
    torch._dynamo.reset()
    i = pmod.axis_index("x")
    x = numbers(i, 4, 2)
    asking: dict[str, Callable[[Tensor], Any]] = {
        "all_gather_v": lambda x: pmod.all_gather_v(x, "x"),
        "gather_v": lambda x: pmod.gather_v(x, "x"),
        "all_to_all_v": lambda x: pmod.all_to_all_v(x, "x", send_sizes=(1, 3)),
        "indexed_all_to_all_v": lambda x: pmod.indexed_all_to_all_v(x, "x", indices=[HERE, HERE]),
        "exchange_plan": lambda x: pmod.exchange_plan([HERE, HERE], "x").rows,
    }
    for name, f in asking.items():
        with pytest.raises(Exception) as raised:
            torch.compile(f, fullgraph=True, backend="aot_eager")(x)
        assert f"pmod.{name}(axis='x') at (x={i}): sizes are left out under torch.compile." in str(raised.value)
        assert "Pass them: a compiled graph is fixed." in str(raised.value)

    plan = pmod.exchange_plan([HERE, HERE[: 1 + i]], "x")

    def loss(x: Tensor, plan: Any) -> Tensor:
        return (pmod.indexed_all_to_all_v(x, "x", indices=plan).exp() * (1 + i)).sum()

    def step(x: Tensor, plan: Any) -> tuple[Tensor, Tensor, Tensor]:
        slope = grad(loss)(x, plan)
        return loss(x, plan), slope, jvp(lambda x: grad(loss)(x, plan), (x,), (x.cos(),))[1]

    for got, expected in zip(
        torch.compile(step, fullgraph=True, backend="aot_eager")(x, plan), step(x, plan), strict=True
    ):
        same(got, expected, "compiled with a plan")
    leaf = x.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf, plan).backward()
    same(leaf.grad, step(x, plan)[1], "backward of what is compiled")


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled() -> None:
    spmd.launch(compiled_on_rank, x=2)


# --- split_sizes --------------------------------------------------------------------------------------------------


def test_split_sizes_are_torchs() -> None:
    for n, parts in itertools.product(range(12), range(1, 7)):
        chunks = [len(chunk) for chunk in torch.arange(n).chunk(parts)] if n else []
        expected = tuple(chunks + [0] * (parts - len(chunks)))
        assert pmod.split_sizes(n, parts) == expected == tuple(oracle.split_sizes(n, parts))


def mapped_rows() -> bool:
    """Rows of a tensor whose strides are no plain ones, below a vmap."""
    plan = pmod.exchange_plan([torch.tensor([0, 1]), torch.tensor([1])], "x")
    x = torch.rand(3, 2, 3, 4, 4).movedim(1, -1)
    each = [pmod.indexed_all_to_all_v(t, "x", indices=plan) for t in x]
    mapped = torch.vmap(lambda t: pmod.indexed_all_to_all_v(t, "x", indices=plan))(x)
    return torch.equal(mapped, torch.stack(each))


def test_rows_below_a_vmap() -> None:
    assert pmod.simulate(mapped_rows, x=2) == [True, True]


# --- permutes of uneven shards ------------------------------------------------------------------------------------

HELD = (2, 0, 3)  # tokens of each rank


def shards(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Keys and values of this rank: (heads, tokens, channels)."""
    i = pmod.axis_index("x")
    k = torch.arange(2 * HELD[i] * 2, dtype=dtype).view(2, HELD[i], 2) + 100 * i
    return k, -k


def uneven_ring_on_rank() -> None:
    i, n = pmod.axis_index("x"), pmod.axis_size("x")
    k, v = shards()
    (a, b), sent = counted(lambda: pmod.pshift((k, v), "x", sizes=HELD, dim=1))
    before = HELD[i - 1]
    assert a.shape == (2, before, 2) and torch.equal(b, -a) and len(sent) == 1
    assert torch.equal(a, torch.arange(4.0 * before, dtype=k.dtype).view(2, before, 2) + 100 * ((i - 1) % n))
    # once round: the lengths go with the shards
    for step in range(n):
        k, v = pmod.pshift((k, v), "x", sizes=[HELD[rank - step] for rank in range(n)], dim=-2)
    assert all(map(torch.equal, (k, v), shards()))
    # started, and watched
    pending = pmod.start(pmod.pshift, (k, v), "x", sizes=HELD, dim=1)
    assert torch.equal(pending.wait()[0], a)
    with pmod.debug(), pmod.trace() as t:
        x = k.clone().requires_grad_()
        y = pmod.pshift(x, "x", sizes=HELD, dim=1)
        pmod.psum(y.sin().sum(), "x").backward()
    assert torch.equal(y.detach(), a) and torch.equal(x.grad, x.detach().cos())
    moved = [event for event in t.events if event.row == "permute"]
    assert [event.nbytes for event in moved] == [8 * k.numel(), 8 * a.numel()]
    # leaves whose dim is not as far from the end, and a dtype of its own
    tree = {"a": torch.full((HELD[i],), i), "b": k[0], "c": k[0].float()}
    shifted = pmod.pshift(tree, "x", -1, sizes=HELD)
    after = HELD[(i + 1) % n]
    assert shifted["a"].tolist() == [(i + 1) % n] * after
    assert shifted["b"].shape == (after, 2) and torch.equal(shifted["b"].float(), shifted["c"])


def test_a_ring_of_uneven_shards(run: Any) -> None:
    run(uneven_ring_on_rank, x=3)


def nothing_arrives_on_rank() -> None:
    i = pmod.axis_index("x")
    x = torch.full((HELD[i], 2), 1.0 + i, requires_grad=True)
    y = pmod.pshift(x, "x", wrap=False, sizes=HELD)
    expected = [torch.zeros(2, 2), torch.ones(2, 2), torch.zeros(0, 2)][i]
    assert torch.equal(y.detach(), expected)
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(g, [torch.ones(2, 2), torch.zeros(0, 2), torch.zeros(3, 2)][i])
    # with equal sizes it is what it is without
    same_length = torch.full((2, 2), 1.0 + i)
    for f in (lambda **kw: pmod.pshift(same_length, "x", 2, wrap=False, **kw),
              lambda **kw: pmod.ppermute(same_length, "x", [(0, 2)], **kw)):  # fmt: skip
        assert torch.equal(f(sizes=(2, 2, 2)), f())
    # sixteen bits and bytes travel, and nobody has anything
    for dtype in (torch.bfloat16, torch.int16, torch.bool, torch.complex64):
        z = pmod.pshuffle(x.detach().to(dtype), "x", [2, 0, 1], sizes=HELD)
        assert z.dtype == dtype and z.shape == (HELD[i - 1], 2)
        assert torch.equal(z, torch.full_like(z, 1.0 + (i - 1) % 3))
    assert pmod.pshift(x[:0], "x", sizes=(0, 0, 0)).shape == (0, 2)


def test_zeros_are_as_long_as_what_the_rank_holds(run: Any) -> None:
    run(nothing_arrives_on_rank, x=3)


def test_a_ring_is_estimated_and_explained() -> None:
    place = pmod.Topology(rank=2, world_size=3)
    mesh = pmod.make_mesh(x=3, topology=place)
    x = torch.ones(3, 2, requires_grad=True)
    t = pmod.estimate(lambda: pmod.pshift(x, "x", sizes=HELD).sum().backward(), mesh=mesh)
    assert [(e.function, e.nbytes, e.received) for e in t.events] == [
        ("pshift", 24, 0), ("the backward of pshift", 0, 24)
    ]  # fmt: skip
    text = str(pmod.explain(lambda x: pmod.pshift(x, "x", sizes=HELD), x, mesh=mesh))
    assert "x: pshift(x), 24 B -> backward: permute" in text
