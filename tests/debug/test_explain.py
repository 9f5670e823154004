"""`explain` names each collective and its transpose, with the bytes that trace counts, and leaves all as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pmod
from pmod._core import watch
from pmod._core.collective import COLLECTIVES
from pmod._core.row import ROWS, TRANSPOSES
from tests.lib import spmd
from tests.lib.table import CASES, Here

Tensor = torch.Tensor


def loss(w: Tensor, x: Tensor) -> Tensor:
    w = pmod.pvary(w, "data")
    y = pmod.pvary(pmod.pmean(
        (w * x).square(),
        axis="data",
    ), "data")  # fmt: skip
    later = pmod.start(pmod.all_gather, y, "data")
    return pmod.psum(later.wait().sum(), axis="data")


def titles(found: Any) -> list[str]:
    return [step.title() for step in found.steps]


def test_line_by_line() -> None:
    w, x = torch.ones(250_000, requires_grad=True), torch.ones(250_000)
    found = pmod.explain(loss, w, x, mesh={"data": 4})
    assert titles(found) == [
        "w: pvary(data) -> backward: psum, 1.5 MB",
        "(w * x).square(): pmean(data), 1.5 MB -> backward: pvary",
        "pmod.pmean((w * x).square(), axis='data'): pvary(data) -> backward: psum, 1.5 MB",
        "y: all_gather(data), 3 MB -> backward: psum_scatter, 3 MB",
        "later.wait().sum(): psum(data), 12 B -> backward: pvary",
    ]
    text = str(found).split("\n")
    assert text[0] == "loss, as rank 0 (data=0) of Mesh(data=4)"
    assert [line.rpartition(": ")[2] for line in text if line.startswith("/")] == [
        'w = pmod.pvary(w, "data")',
        "y = pmod.pvary(pmod.pmean(",
        "y = pmod.pvary(pmod.pmean(",
        'later = pmod.start(pmod.all_gather, y, "data")',
        'return pmod.psum(later.wait().sum(), axis="data")',
    ]
    assert "    V -> I: the mean over the axis; with a weight `psum(w x) / psum(w)`." in text
    assert f"    backward: {ROWS['psum'].why}." in text
    assert f"    backward: {ROWS['pvary'].why}; nothing is sent." in text
    assert text[-1] == "In all this rank sends 4.5 MB forward and 6 MB backward."
    picture = found._repr_html_()
    assert picture.count("<tr>") == 5 and "(w * x).square(): pmean(data), 1.5 MB -&gt; backward: pvary" in picture
    assert w.grad is None and repr(found) == str(found)


def case_on_rank(name: str) -> None:
    h = Here(CASES[name], "x", "explain", lengths=(2, 2))
    x = h.mine(h.xs).requires_grad_()
    found = pmod.explain(h.call, x)
    assert {step.place[0] for step in found.steps} == {name}
    (step,) = found.steps
    text = "\n".join(step.reasons())
    assert f"{CASES[name].takes} -> {CASES[name].gives}: {COLLECTIVES[name].value}." in text
    if CASES[name].linear:
        (row,) = step.backward
        assert row in {ROWS[r].T.name for r in CASES[name].rows if r in TRANSPOSES} and ROWS[row].why in text


@pytest.mark.parametrize("name", CASES)
def test_every_collective(name: str) -> None:
    spmd.launch(case_on_rank, name, x=2)


@pytest.mark.parametrize("row", TRANSPOSES)
def test_every_row_says_why(row: str) -> None:
    assert ROWS[row].why and ROWS[row].why[-1] != "."


# --- what is run ----------------------------------------------------------------------------------------------------


def test_what_requires_no_gradient_does_where_nothing_else_does() -> None:
    tree = {"w": torch.ones(3), "n": 3, "index": torch.tensor([1])}

    def f(tree: Any, pair: Any) -> Any:
        return pmod.psum(pmod.pvary(tree["w"], "data") * pair[0], "data")

    found = pmod.explain(f, tree, (torch.ones(3), None), mesh={"data": 4})
    assert titles(found)[0] == "tree['w']: pvary(data) -> backward: psum, 36 B"
    assert not tree["w"].requires_grad
    frozen = pmod.explain(f, tree, (torch.ones(3, requires_grad=True), None), mesh={"data": 4})
    assert titles(frozen)[0] == "tree['w']: pvary(data) -> no gradient comes back"
    counts = pmod.explain(lambda n: pmod.psum(n, "data"), torch.tensor(3), mesh={"data": 4})
    assert titles(counts) == ["n: psum(data), 24 B -> no gradient comes back"]


def test_a_training_step() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 2)
    before = net.weight.grad = torch.ones(2, 4)
    reduced = nn.Linear(2, 1)

    def step(x: Tensor) -> None:
        params = pmod.pvary(dict(net.named_parameters()), "data")
        out = pmod.data_parallel(reduced, "data")(torch.func.functional_call(net, params, x))
        pmod.barrier("data")
        for _ in range(2):
            pmod.pmean(out.sum(), "data").backward(retain_graph=True)

    found = pmod.explain(step, torch.ones(3, 4), mesh={"data": 2})
    assert titles(found) == [
        "dict(net.named_parameters()): pvary(data) -> backward: psum, 2 messages, 80 B",
        "reduced: data_parallel(data), 12 B -> no gradient comes back",
        "barrier(data)",
        "out.sum(): pmean(data), 2 messages, 8 B -> backward: pvary",
        "data_parallel(data), 2 messages, 40 B -> no gradient comes back",
    ]
    assert net.weight.grad is before  # which the step added to


def test_gradients_of_who_only_returns_are_as_before() -> None:
    net = nn.Linear(4, 2)
    before = net.weight.grad = torch.ones(2, 4)
    pmod.explain(lambda x: pmod.psum(net(x).sum(), "data"), torch.ones(3, 4), mesh={"data": 2})
    assert net.weight.grad is before and torch.equal(before, torch.ones(2, 4)) and net.bias.grad is None


def test_a_function_transform() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: pmod.psum(pmod.pvary(x, "data").sin().sum(), "data"))(x)

    assert titles(pmod.explain(f, torch.ones(3), mesh={"data": 2}))[0] == "x: pvary(data) -> backward: psum, 12 B"


def test_the_ambient_mesh_and_none() -> None:
    mesh = pmod.make_mesh(data=500, model=2, topology=pmod.Topology(rank=3, world_size=1000))
    with pmod.set_mesh(mesh):
        found = pmod.explain(loss, torch.ones(3, device="meta"), torch.ones(3, device="meta"))
        assert str(found).startswith("loss, as rank 3 (data=1, model=1) of Mesh(data=500, model=2)\n")
        assert pmod.current_mesh() is mesh and watch.watchers() == []
    with pytest.raises(pmod.NoMeshError, match=r"pmod\.explain: no mesh is set"):
        pmod.explain(loss, torch.ones(3), torch.ones(3))


def test_source_that_is_not_at_hand() -> None:
    scope: dict[str, Any] = {"pmod": pmod}
    exec("def f(x):\n    return pmod.psum(x, 'data')", scope)
    assert titles(pmod.explain(scope["f"], torch.ones(3), mesh={"data": 2})) == ["psum(data), 12 B -> backward: pvary"]
