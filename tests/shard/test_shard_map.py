"""`shard_map`: every body equals the same function of the whole tensors in one process, to second order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

import pmod
from pmod import P
from tests.lib import spmd
from tests.lib.bodies import DATA, Cube, draw, message

MESHES = [{"data": 2}, {"data": 3}, {"data": 4}, {"data": 2, "model": 2}]


LAYER = torch.nn.Linear(3, 3, dtype=torch.float64)
with torch.no_grad():
    for p in LAYER.parameters():
        p.copy_(torch.linspace(-1, 1, p.numel(), dtype=torch.float64).reshape(p.shape))


@attrs.frozen
class Body:
    """A function of shards, and the function of whole tensors that it is."""

    local: Callable[..., Any]
    whole: Callable[..., Any]
    in_specs: Any
    out_specs: Any
    shapes: tuple[tuple[int, ...], ...] = ((5, 3), (3,))
    parameters: bool = False
    compiled: bool = True


def _place(x: Tensor, w: Tensor) -> Tensor:
    """w's element of this rank's rows: what a rank knows of its place."""
    n, i = pmod.axis_size("data"), pmod.axis_index("data")
    start = sum(pmod.split_sizes(5, n)[:i])
    return x * w[start : start + x.shape[0], None]


def _buffer(x: Tensor, w: Tensor) -> Tensor:
    y = torch.zeros(2, *x.shape, dtype=x.dtype)
    y[0] = x * w
    y[1].add_(x)
    return (y * w).sum(0)


def _rows_of_even_ranks(x: Tensor) -> Tensor:
    return x * 2 if pmod.axis_index("data") % 2 == 0 else x[:0]


def _even_rows(x: Tensor, n: int) -> Tensor:
    return torch.cat([part * 2 for i, part in enumerate(x.split(pmod.split_sizes(5, n))) if i % 2 == 0])


def _inner(x: Tensor, w: Tensor) -> Tensor:
    names = pmod.current_mesh().axis_names
    if "model" not in names:
        return x * w
    return pmod.shard_map(lambda x, w: x * w, in_specs=(P(None, "model"), P("model")), out_specs=P(None, "model"))(x, w)


def _summed(x: Tensor, w: Tensor) -> Tensor:
    return (x * w).sin() * pmod.psum((x * w).sum(), "data")


def _derivative(u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """d u / d x of each row, as a PINN takes it."""
    return torch.autograd.grad(u(x).sum(), x, create_graph=True)[0]


BODIES = {
    "unsharded": Body(lambda x, w: x * w, lambda x, w: x * w, (DATA, P()), DATA),
    "loss": Body(
        lambda x, w: pmod.psum((x * w).square().sum(), "data") + (w**3).sum(),
        lambda x, w: (x * w).square().sum() + (w**3).sum(), (DATA, P()), P(),
    ),
    "explicit pvary": Body(
        lambda x, w: pmod.psum((x * pmod.pvary(w, "data")).square().sum(), "data"),
        lambda x, w: (x * w).square().sum(), (DATA, P()), P(),
    ),
    "pvary of what varies": Body(
        lambda x, w: x * w * pmod.pvary(x * w, "data"), lambda x, w: (x * w) ** 2, (DATA, P()), DATA,
    ),
    "one value": Body(lambda x, w: (w**2, w.sum()), lambda x, w: (w**2, w.sum()), (DATA, P()), P()),
    "copies": Body(
        lambda x, w: w**2, lambda x, w: torch.cat([w**2] * SIZE["data"]), (DATA, P()), DATA, compiled=False,
    ),
    "sum of one value": Body(
        lambda x, w: pmod.psum(w**2, "data") + 0 * x.shape[1], lambda x, w: SIZE["data"] * w**2, (DATA, P()), P(),
    ),
    "mean": Body(
        lambda x, w: x * w - pmod.psum((x * w).sum(0), "data") / 5, lambda x, w: x * w - (x * w).sum(0) / 5,
        (DATA, P()), DATA,
    ),
    "max": Body(
        lambda x, w: pmod.pmax((x * w).amax(0), "data") * w, lambda x, w: (x * w).amax(0) * w, (DATA, P()), P(),
        shapes=((12, 3), (3,)),
    ),
    "gather": Body(
        lambda x, w: pmod.all_gather_v(x, "data", sizes=pmod.split_sizes(5, pmod.axis_size("data"))).sum() * x * w,
        lambda x, w: x.sum() * x * w, (DATA, P()), DATA,
    ),
    "parameters": Body(
        lambda x: LAYER(x).tanh(), lambda x: LAYER(x).tanh(), DATA, DATA, shapes=((5, 3),), parameters=True,
    ),
    "place": Body(_place, lambda x, w: x * w[:, None], (DATA, P()), DATA, shapes=((5, 3), (5,))),
    "buffer": Body(_buffer, lambda x, w: (x * w + x) * w, (DATA, P()), DATA),
    "number": Body(
        lambda x, w: pmod.psum(w.sum() * x.detach().sum().item(), "data"), lambda x, w: w.sum() * x.detach().sum(),
        (DATA, P()), P(), compiled=False,
    ),
    "trees": Body(
        lambda tree, y: {"a": (tree["x"] * tree["w"], None), "n": 3}, lambda tree, y: [tree["x"] * tree["w"]],
        ({"x": DATA, "w": P()}, None), {"a": DATA, "n": None}, shapes=(),
    ),
    "uneven results": Body(
        _rows_of_even_ranks, lambda x: _even_rows(x, SIZE["data"]), (DATA,), DATA, shapes=((5, 3),), compiled=False,
    ),
    "torch.func.grad": Body(
        lambda x, w: torch.func.grad(lambda x: (x * w).sin().sum())(x), lambda x, w: w * (x * w).cos(),
        (DATA, P()), DATA, compiled=False,
    ),
    "torch.func.grad of one value": Body(
        lambda x, w: torch.func.grad(lambda w: pmod.psum((x * w).sin().sum(), "data"))(w),
        lambda x, w: (x * (x * w).cos()).sum(0), (DATA, P()), P(), compiled=False,
    ),
    "jvp": Body(
        lambda x, w: torch.func.jvp(lambda x: (x * w).sin(), (x,), (x,))[1], lambda x, w: x * w * (x * w).cos(),
        (DATA, P()), DATA, compiled=False,
    ),
    "vmap": Body(
        lambda x, w: torch.vmap(lambda w: (x * w).sum(1))(w), lambda x, w: torch.stack([(x * v).sum(1) for v in w]),
        (DATA, P()), P(None, "data"), shapes=((5, 3), (2, 3)), compiled=False,
    ),
    "autograd.grad": Body(
        lambda x, w: _derivative(lambda x: (x * w).sin(), x), lambda x, w: w * (x * w).cos(), (DATA, P()), DATA,
        compiled=False,
    ),
    "checkpoint": Body(
        lambda x, w: checkpoint(_summed, x, w, use_reentrant=False),
        lambda x, w: (x * w).sin() * (x * w).sum(), (DATA, P()), DATA, compiled=False,
    ),
    "an unseen function": Body(
        lambda x, w: x * Cube.apply(w, w), lambda x, w: x * w**3, (DATA, P()), DATA, compiled=False,
    ),
    "an unseen function of what varies": Body(
        lambda x, w: Cube.apply(x * w, x), lambda x, w: (x * w) ** 2 * x, (DATA, P()), DATA, compiled=False,
    ),
    "started": Body(
        lambda x, w: x * w * pmod.start(pmod.psum, (x * w).sum(), "data").wait(),
        lambda x, w: x * w * (x * w).sum(), (DATA, P()), DATA,
    ),
    "nested": Body(_inner, lambda x, w: x * w, (DATA, P()), DATA),
    "rows and columns": Body(
        lambda x, w: x * w, lambda x, w: x * w, (P("data", "model"), P("model")), P("data", "model"),
    ),
    "two axes as one": Body(
        lambda x, w: pmod.psum((x * w).sin(), "model") * w, lambda x, w: _by_groups(x, w),
        (P(("data", "model")), P()), DATA, compiled=False, shapes=((8, 3), (3,)),
    ),
    "tensor parallel": Body(
        lambda x, a, b: pmod.psum((x @ a).tanh() @ b, "model"), lambda x, a, b: (x @ a).tanh() @ b,
        (DATA, P(None, "model"), P("model")), DATA, shapes=((5, 3), (3, 5), (5, 2)),
    ),
}  # fmt: skip

SIZE: dict[str, int] = {}


def _by_groups(x: Tensor, w: Tensor) -> Tensor:
    """The rows of all ranks of "model", which hold two each, added up."""
    y = (x * w).sin().reshape(2, 2, 2, 3)
    return y.sum(1).reshape(4, 3) * w


def arguments(body: Body) -> list[Any]:
    if not body.shapes:
        return [{"x": draw(5, 3), "w": draw(3)}, None]
    return [draw(*shape) for shape in body.shapes]


def leaves(tree: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def to_second_order(f: Callable[..., Any], args: list[Any], parameters: bool) -> list[Tensor]:
    """The values, the gradients of a function of them, and the gradients of a function of those."""
    ys = leaves(f(*args))
    inputs = leaves(args) + (list(LAYER.parameters()) if parameters else [])
    loss = sum(((y + 0.5) ** 3).sum() for y in ys)
    first = torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in first), inputs, materialize_grads=True)
    return [y.detach() for y in (*ys, *first, *second)]


def check(name: str, order: Callable[..., list[Tensor]] = to_second_order, wrap: Any = lambda f: f) -> None:
    body = BODIES[name]
    SIZE.update(pmod.current_mesh().shape)
    f = pmod.shard_map(body.local, in_specs=body.in_specs, out_specs=body.out_specs)
    got = order(wrap(f), arguments(body), body.parameters)
    want = order(body.whole, arguments(body), body.parameters)
    assert len(got) == len(want)
    for y, z in zip(got, want, strict=True):
        torch.testing.assert_close(y, z, rtol=1e-9, atol=1e-9)


def needs_model(name: str) -> bool:
    return name in ("rows and columns", "two axes as one", "tensor parallel")


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", BODIES)
def test_equals_the_function_of_whole_tensors(name: str, mesh: dict[str, int]) -> None:
    if needs_model(name) and "model" not in mesh:
        pytest.skip("needs a second axis")
    pmod.simulate(check, name, **mesh)


def check_all(names: list[str]) -> None:
    for name in names:
        check(name)


def first_order(f: Callable[..., Any], args: list[Any], parameters: bool) -> list[Tensor]:
    ys = leaves(f(*args))
    inputs = leaves(args) + (list(LAYER.parameters()) if parameters else [])
    first = torch.autograd.grad(sum(((y + 0.5) ** 3).sum() for y in ys), inputs, materialize_grads=True)
    return [y.detach() for y in (*ys, *first)]


def check_compiled(names: list[str]) -> None:
    for name in names:
        torch._dynamo.reset()
        check(name, first_order, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"))


def test_on_processes() -> None:
    spmd.launch(check_all, list(BODIES), data=2, model=2)


def compiled_transforms() -> None:
    """Where it cannot follow, it says so: a wrong gradient would not be seen."""
    for name in ("torch.func.grad", "torch.func.grad of one value", "jvp", "vmap", "checkpoint"):
        torch._dynamo.reset()
        with pytest.raises(Exception, match="cannot follow tensors into a transform or a checkpoint"):
            check(name, first_order, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"))


def test_compiled_transforms_in_the_body() -> None:
    spmd.launch(compiled_transforms, data=2)


COMPILED = [name for name, body in BODIES.items() if body.compiled and not needs_model(name)]


@pytest.mark.parametrize("part", range(3))
def test_compiled(part: int) -> None:
    spmd.launch(check_compiled, COMPILED[part::3], data=2)


def functional(f: Callable[..., Any], args: list[Any], parameters: bool) -> list[Tensor]:
    """Through torch.func: gradient, jvp, vmap over cotangents."""

    def loss(*args: Tensor) -> Tensor:
        return sum(((y + 0.5) ** 3).sum() for y in leaves(f(*args)))  # type: ignore[return-value]

    plain = [x.detach() for x in args]
    gradients = torch.func.grad(loss, tuple(range(len(plain))))(*plain)
    _, tangent = torch.func.jvp(loss, tuple(plain), tuple(plain))
    twice = torch.func.grad(lambda *args: (torch.func.grad(loss)(*args) ** 2).sum())(*plain)
    batch = torch.vmap(loss, in_dims=(0, *[None] * (len(plain) - 1)))(torch.stack([plain[0], 2 * plain[0]]), *plain[1:])
    return [*gradients, tangent, twice, batch]


@pytest.mark.parametrize("name", ["unsharded", "loss", "explicit pvary", "one value", "mean", "place", "vmap", "jvp"])
def test_transforms_around_it(name: str) -> None:
    pmod.simulate(check, name, functional, data=2)


# --- what does not fit ----------------------------------------------------------------------------


def test_a_result_that_varies() -> None:
    f = pmod.shard_map(lambda x: x.sum(), in_specs=DATA, out_specs=P())
    assert message(lambda: f(torch.ones(4)), data=2) == (
        "pmod.shard_map at (data=0): out_specs: the result varies along 'data', which the spec leaves out\n"
        "  spec   P()\n"
        "  shape  ()\n"
        "  mesh   data=2.\n"
        "Return one value along it (pmod.psum, pmod.pmean, pmod.pick; pmod.unshard, not all_gather, to join shards), "
        "or name it in out_specs."
    )


def test_a_spec_that_does_not_fit() -> None:
    f = pmod.shard_map(lambda x, y: x, in_specs=(P(), {"w": P("data", None, "modle")}), out_specs=P())
    assert message(lambda: f(torch.ones(4), {"w": torch.ones(2, 2, 2)}), data=2, model=2) == (
        "pmod.shard_map at (data=0, model=0): in_specs[1]['w']: the mesh has no axis 'modle'; did you mean 'model'?\n"
        "  spec   P('data', None, 'modle')\n"
        "  shape  (2, 2, 2)\n"
        "  mesh   data=2, model=2.\n"
        "Name axes of the mesh: data, model."
    )
    f = pmod.shard_map(lambda x: x, in_specs=P(None, "data"), out_specs=P())
    assert "in_specs[0]: the spec has 2 entries and the tensor 1 dims\n" in message(lambda: f(torch.ones(4)), data=2)
    f = pmod.shard_map(lambda x: x, in_specs=P("data", sizes={0: (3, 2)}), out_specs=P())
    assert "sizes (3, 2) do not cut dim 0, of length 4, for 2 ranks" in message(lambda: f(torch.ones(4)), data=2)


def test_specs_of_another_structure() -> None:
    f = pmod.shard_map(lambda x, y: x, in_specs=(P(),), out_specs=P())
    assert message(lambda: f(torch.ones(4), torch.ones(4)), data=2) == (
        "pmod.shard_map(axis='data') at (data=0): in_specs is a tuple of 2 and its specs are a tuple of 1.\n"
        "Specs are a P for all that is below it, or have the structure of what they are for."
    )
    for tree, specs in (({"a": draw(4)}, {"a": DATA}), ([draw(4), draw(4)], [DATA, P()])):
        f = pmod.shard_map(lambda tree: tree, in_specs=specs, out_specs=DATA)
        assert message(lambda f=f, tree=tree: f(tree), data=2) == (
            f"pmod.shard_map(axis='data') at (data=0): in_specs is {specs}, and f is called with 1 argument.\n"
            f"Pass a tuple with one entry for each argument, in_specs=({specs},)."
        )
        pmod.simulate(pmod.shard_map(lambda tree: tree, in_specs=(specs,), out_specs=specs), tree, data=2)
    f = pmod.shard_map(lambda x, y: x, in_specs={"a": P()}, out_specs=P())
    assert message(lambda: f(draw(4), draw(4)), data=2).endswith(
        "in_specs is {'a': P()}, and f is called with 2 arguments.\nPass a tuple with one entry for each argument."
    )
    f = pmod.shard_map(lambda n: n, in_specs=DATA, out_specs=P())
    assert "in_specs[0]: the spec cuts a int" in message(lambda: f(3), data=2)


def test_one_value_and_varying_in_an_unseen_function() -> None:
    f = pmod.shard_map(lambda x, w: Cube.apply(x, w), in_specs=(DATA, P()), out_specs=DATA)
    text = message(lambda: f(draw(4), draw(1)), data=2)
    assert "a tensor comes from a function that shard_map cannot see into, which took varying tensors and" in text
    assert "test_shard_map.py" in text


def test_one_value_changed_in_place_by_what_varies() -> None:
    f = pmod.shard_map(lambda x, w: (w * 1).add_(x.sum()), in_specs=(DATA, P()), out_specs=DATA)
    assert "what is one value along ['data'] is changed in place by what varies" in message(
        lambda: f(draw(4), draw(1)), data=2
    )


def test_a_slice_of_what_varies() -> None:
    for made in (lambda x: x, lambda x: x.new_zeros(4), torch.zeros_like):
        f = pmod.shard_map(lambda x, made=made: pmod.shard(made(x), "data"), in_specs=DATA, out_specs=DATA)
        assert message(lambda f=f: f(torch.ones(4)), data=2) == (
            "pmod.shard(axis='data') at (data=0): x varies along ['data'] already, because it was made from what does."
            "\n"
            "shard takes one value: pmod.pick or a sum of x, or leave shard out.\n"
            "What x.new_zeros and torch.zeros_like make of x varies as x does; torch.zeros(..., dtype=x.dtype, "
            "device=x.device) is one value."
        )


def _along_all(x: Tensor) -> Tensor:
    mesh = pmod.current_mesh().flatten(("data", "model"), "all")
    return pmod.shard_map(torch.sin, mesh=mesh, in_specs=P("all"), out_specs=P("all"))(x)


def test_what_varies_within_another_mesh() -> None:
    f = pmod.shard_map(_along_all, in_specs=DATA, out_specs=DATA)
    assert message(lambda: f(torch.ones(8)), data=2, model=2) == (
        "pmod.shard_map(axis='all') at (all=0): in_specs[0] varies along ['data'] of the mesh around, and this mesh "
        "joins such ranks.\n"
        "Cut it along the axes that are left of the mesh around, pmod.current_mesh()."
    )
    f = pmod.shard_map(_along_all, in_specs=P(), out_specs=P())
    for y in pmod.simulate(f, torch.arange(8.0), data=2, model=2):
        torch.testing.assert_close(y, torch.arange(8.0).sin())


def test_an_argument_by_name() -> None:
    mapped = pmod.shard_map(lambda x, w: x * w, in_specs=(DATA, P()), out_specs=DATA)
    with pytest.raises(pmod.ArgumentError, match="w came by name"):
        mapped(torch.ones(2), w=2)


def test_no_mesh() -> None:
    with pytest.raises(pmod.NoMeshError):
        pmod.shard_map(lambda x: x, in_specs=DATA, out_specs=DATA)(torch.ones(2))


def test_a_mesh_of_its_own() -> None:
    mesh = pmod.make_mesh(data=1)
    f = pmod.shard_map(lambda x: pmod.psum(x, "data"), mesh=mesh, in_specs=DATA, out_specs=P())
    assert torch.equal(f(torch.ones(2)), torch.ones(2))


def compiled_with_lengths_of_its_own() -> None:
    f = pmod.shard_map(lambda x: torch.cat([x, x]), in_specs=DATA, out_specs=DATA)
    with pytest.raises(Exception, match="no argument has length 4 along 'data'"):
        torch.compile(f, fullgraph=True, backend="aot_eager")(torch.ones(4))
    torch._dynamo.reset()
    g = pmod.shard_map(lambda x: torch.cat([x, x]), in_specs=DATA, out_specs=P("data", sizes={0: (4, 4)}))
    y = torch.compile(g, fullgraph=True, backend="aot_eager")(torch.arange(4.0))
    assert y.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    g = pmod.shard_map(lambda x: torch.cat([x, x]), in_specs=DATA, out_specs=P("data", sizes={0: (3, 5)}))
    with pytest.raises(pmod.ShapeError, match=r"sizes are \(3, 5\) and the rank at \d of 2 holds 4\n  spec   P"):
        g(torch.ones(4))


def test_compiled_with_lengths_of_its_own() -> None:
    spmd.launch(compiled_with_lengths_of_its_own, data=2)


# --- what is sent ---------------------------------------------------------------------------------


def sent() -> list[tuple[str, str, int]]:
    f = pmod.shard_map(lambda x, w: x * w, in_specs=(DATA, P()), out_specs=P("data", sizes={0: (2, 2)}))
    x, w = draw(4), draw(1)
    with pmod.trace() as t:
        f(x, w).sum().backward()
    return [(event.function, event.row, event.nbytes) for event in t.events if event.nbytes]


def test_what_is_sent() -> None:
    """Forward the result is joined; backward the gradient of x, and the sum of w's."""
    x, w = ("the backward of shard_map", "unshard", 16), ("the backward of pvary", "psum", 8)
    for events in pmod.simulate(sent, data=2):
        assert events[0] == ("shard_map", "unshard", 16) and sorted(events[1:]) == [w, x]


def on_every_call(x: Tensor, w: Tensor) -> Tensor:
    return pmod.psum((x * w).sum(), "data")


def debugged() -> None:
    with pmod.debug():
        pmod.shard_map(on_every_call, in_specs=(DATA, P()), out_specs=P())(draw(4), draw(1)).backward()
        f = pmod.shard_map(lambda x: x, in_specs=DATA, out_specs=DATA)
        with pytest.raises(pmod.MismatchError, match=r"(?s)^pmod.shard_map\(axis='data'\).*test_shard_map"):
            f(torch.ones(4) * pmod.axis_index("data"))  # no whole tensor: each rank has another


def test_under_debug() -> None:
    pmod.simulate(debugged, data=2)


# --- DTensors -------------------------------------------------------------------------------------


def dtensors(length: int) -> None:
    mesh = pmod.current_mesh()
    device_mesh = mesh.device_mesh
    x, w = draw(length, 3), draw(3)
    f = pmod.shard_map(
        lambda x, w: ((x * w).sin(), pmod.psum((x * w).sum(), "data")), in_specs=(DATA, P()), out_specs=(DATA, P())
    )
    placed = [Shard(0), *[Replicate()] * (len(mesh.axis_names) - 1)]
    whole = [Replicate()] * len(mesh.axis_names)
    dx = distribute_tensor(x.detach(), device_mesh, placed).requires_grad_()
    dw = distribute_tensor(w.detach(), device_mesh, whole).requires_grad_()
    y, total = f(dx, dw)
    assert isinstance(y, DTensor) and isinstance(total, DTensor) and list(y.placements) == placed
    assert y.shape == (length, 3)
    (y.to_local().square().sum() + total.to_local()).backward()
    want = (x * w).sin()
    (want.square().sum() + (x * w).sum()).backward()
    assert isinstance(dx.grad, DTensor)
    for got, expected in ((y, want), (total, (x * w).sum()), (dx.grad, x.grad), (dw.grad, w.grad)):
        assert expected is not None
        torch.testing.assert_close(got.full_tensor().detach(), expected.detach(), rtol=1e-12, atol=1e-12)
    # held otherwise, it is redistributed
    again, _ = f(distribute_tensor(x.detach(), device_mesh, [Shard(1), *placed[1:]]), dw.detach())
    assert list(again.placements) == placed
    torch.testing.assert_close(again.full_tensor(), want.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mesh", [{"data": 2}, {"data": 4}, {"data": 2, "model": 2}], ids=str)
def test_dtensors(mesh: dict[str, int]) -> None:
    spmd.launch(dtensors, 5, **mesh)


def dtensors_of_another_mesh() -> None:
    pmod.barrier(("data", "model"))  # connected, whatever ran before
    other = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (4,)), [Shard(0)])
    with pytest.raises(pmod.AxisError, match=r"Mesh\.from_device_mesh"):
        pmod.shard_map(lambda x: x, in_specs=DATA, out_specs=DATA)(other)


def test_dtensors_of_another_mesh() -> None:
    spmd.launch(dtensors_of_another_mesh, data=2, model=2)
