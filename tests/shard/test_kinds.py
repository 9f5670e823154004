"""What `shard_map` follows through a body, and what it refuses to guess at."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pmod
from pmod import P
from pmod._shard.operations import is_in_place
from tests.lib import spmd
from tests.lib.bodies import DATA, Cube, draw, message

X, W = draw(5, 3), draw(3, 2)
FIXED = X.detach()  # data as it comes: without a derivative


class Product(torch.autograd.Function):
    """What shard_map cannot see into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.from_numpy(x.detach().numpy() @ w.detach().numpy())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


def test_data_without_a_derivative_in_an_unseen_function() -> None:
    for unseen, args in ((Cube, (FIXED, draw(1))), (Product, (FIXED, W))):
        f = pmod.shard_map(lambda x, w, unseen=unseen: unseen.apply(x, w), in_specs=(DATA, P()), out_specs=DATA)
        assert "a function that shard_map cannot see into" in message(lambda f=f, args=args: f(*args), data=2)


def test_a_reentrant_checkpoint() -> None:
    f = pmod.shard_map(
        lambda x: pmod.psum(checkpoint(lambda x: (x @ W).sin(), x, use_reentrant=True).sum(), "data"),
        in_specs=DATA, out_specs=P(),
    )  # fmt: skip
    assert "Pass use_reentrant=False." in message(lambda: f(X), data=2)


def _by_alias(buffer: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The column sums of x, written into memory that was one value, times w."""

    def local(x: Tensor, w: Tensor) -> Tensor:
        y = torch.zeros(3, dtype=x.dtype)
        alias = buffer(y)
        alias.copy_(x.sum(0))
        return pmod.psum((w * y[:, None]).sum(), "data")

    return local


def _data_set(x: Tensor, w: Tensor) -> Tensor:
    y = torch.zeros(3, dtype=x.dtype)
    y.data = x.sum(0)
    return pmod.psum((w * y[:, None]).sum(), "data")


def _sibling(x: Tensor, w: Tensor) -> Tensor:
    y = torch.zeros(3, dtype=x.dtype)
    column = y.view(3, 1)
    y += x.sum(0)
    return pmod.psum((w * column).sum(), "data")


def _running(x: Tensor, w: Tensor) -> Tensor:
    mean, var = torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)
    torch.nn.functional.batch_norm(x, mean, var, training=True, momentum=1.0)
    return pmod.psum((w * mean[:, None]).sum(), "data")


def _sums(x: Tensor, w: Tensor) -> Tensor:
    return (w * x.sum(0)[:, None]).sum()


def _means(x: Tensor, w: Tensor) -> Tensor:
    return sum((w * part.mean(0)[:, None]).sum() for part in x.split([3, 2]))  # type: ignore[return-value]


def _other_data(x: Tensor, w: Tensor, sums: Callable[[Tensor], Tensor]) -> Tensor:
    v = torch.nn.Parameter(w.detach().clone())
    y = (x @ v).sum()
    v.data = v.data * 2
    return sums(y + (x @ v).sin().sum()) + 0 * w.sum()


def _first(x: Tensor, w: Tensor, found: Callable[[Tensor], bool]) -> Tensor:
    return pmod.psum(w.sum() * (2.0 if found(x) else 1.0), "data")


FOLLOWED: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "data": (_by_alias(lambda y: y.data), _sums),
    "detach": (_by_alias(lambda y: y.detach()), _sums),
    "data set": (_data_set, _sums),
    "another view": (_sibling, _sums),
    "running statistics": (_running, _means),
    "numpy": (lambda x, w: pmod.psum((w * torch.tensor(x.sum(0).numpy())[:, None]).sum(), "data"), _sums),
    "equal": (
        lambda x, w: _first(x, w, lambda x: torch.equal(x[0], FIXED[0])), lambda x, w: 3 * w.sum(),
    ),
    "in": (lambda x, w: _first(x, w, lambda x: FIXED[0, 0].item() in x), lambda x, w: 3 * w.sum()),
    "a tensor in a slice": (
        lambda x, w: pmod.psum(w[: (x[:, 0] == FIXED[0, 0]).sum()].sum(), "data"), lambda x, w: w[:1].sum(),
    ),
    "expand": (
        lambda x, w: torch.cat([x, w[:1].expand(len(x), -1)], 1), lambda x, w: torch.cat([x, w[:1].expand(5, -1)], 1),
    ),
    "other data": (lambda x, w: _other_data(x, w, lambda y: pmod.psum(y, "data")),
                   lambda x, w: _other_data(x, w, lambda y: y)),
    "slice": (
        lambda x, w: pmod.psum((x.T[:, :2] @ w[: len(x)]).sum() if len(x) == 2 else (x * w[: len(x), :1].T).sum(),
                               "data"),
        lambda x, w: (x[:3] * w[:, :1].T).sum() + (x[3:].T[:, :2] @ w[:2]).sum(),
    ),
    "dropped nothing": (
        lambda x, w: torch.nn.functional.dropout(w, 0.0).sum() + pmod.psum(x.sum(), "data"),
        lambda x, w: w.sum() + x.sum(),
    ),
    "lengths exchanged": (
        lambda x, w: (pmod.all_gather_v(x, "data") @ w).sum()[None],
        lambda x, w: torch.stack([(x @ w).sum()] * 2),
    ),
    "halo": (
        lambda x, w: pmod.halo_exchange(x @ w, "data", dim=0, width=1)[2:],
        lambda x, w: torch.nn.functional.pad(x @ w, (0, 0, 1, 1))[2:],
    ),
}  # fmt: skip


def first_order_in_w(f: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    w = W.detach().clone().requires_grad_()
    y = f(FIXED, w)
    return y.detach(), torch.autograd.grad(y.square().sum(), w)[0]


@pytest.mark.parametrize("mesh", [{"data": 2}, {"data": 2, "model": 2}], ids=str)
@pytest.mark.parametrize("name", FOLLOWED)
def test_what_is_followed(name: str, mesh: dict[str, int]) -> None:
    local, whole = FOLLOWED[name]
    want = first_order_in_w(whole)
    f = pmod.shard_map(local, in_specs=(DATA, P()), out_specs=DATA if want[0].dim() else P())
    for got in pmod.simulate(first_order_in_w, f, **mesh):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def _either(x: Tensor, a: Tensor, b: Tensor, sums: Callable[[Tensor], Tensor]) -> Tensor:
    """The ranks use a and b in another order, and a not equally often."""
    with torch.no_grad():
        first = bool((x @ a).sum() > 0)
    y = (x @ a).sin() @ b if first else ((x @ b).sin() @ a).cos() @ a
    return sums(y.sum())


class Either(torch.nn.Module):
    def __init__(self, a: Tensor, b: Tensor, sums: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.sums = torch.nn.Parameter(a), torch.nn.Parameter(b), sums

    def forward(self, x: Tensor) -> Tensor:
        return _either(x, self.a, self.b, self.sums)


def gradients_of_either(module: bool) -> list[Tensor]:
    x, a, b = torch.tensor([[0.5, 0.6], [-0.5, -0.6]]).double(), draw(2, 2).detach(), draw(2, 3).detach()[:, :2]
    if module:
        f = Either(a, b, lambda y: pmod.psum(y, "data"))
        return list(torch.autograd.grad(pmod.shard_map(f, in_specs=DATA, out_specs=P())(x), (f.a, f.b)))
    args = x, a.requires_grad_(), b.requires_grad_()
    f = pmod.shard_map(lambda x, a, b: _either(x, a, b, lambda y: pmod.psum(y, "data")), in_specs=(DATA, P(), P()),
                       out_specs=P())  # fmt: skip
    got = torch.autograd.grad(f(*args), args[1:])
    want = torch.autograd.grad(sum(_either(row[None], *args[1:], lambda y: y) for row in x), args[1:])
    torch.testing.assert_close(got, want)
    return list(got)


@pytest.mark.parametrize("mesh", [{"data": 2}, {"data": 2, "model": 2}], ids=str)
def test_ranks_that_go_their_own_ways(mesh: dict[str, int]) -> None:
    by_argument, by_parameter = (pmod.simulate(gradients_of_either, module, **mesh) for module in (False, True))
    torch.testing.assert_close(by_argument, by_parameter)


def messages_of_a_loop() -> list[str]:
    cell, x = torch.nn.GRUCell(2, 3), torch.ones(4, 5, 2)

    def local(x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 3)
        for step in x.unbind(1):
            h = cell(step, h)
        return pmod.psum(h.sum(), "data")

    with pmod.trace() as t:
        pmod.shard_map(local, in_specs=DATA, out_specs=P())(x).backward()
    return [event.row for event in t.events if event.nbytes]


def test_a_gradient_is_summed_once() -> None:
    assert pmod.simulate(messages_of_a_loop, data=2) == [["psum"] * 5] * 2  # the loss, and of the cell four gradients


# --- derivatives in the body ----------------------------------------------------------------------


def _descent(x: Tensor, w: Tensor) -> Tensor:
    return w - 0.1 * torch.func.grad(lambda w: pmod.psum((x @ w).sin().sum(), "data"))(w)


def _backward(x: Tensor, w: Tensor) -> Tensor:
    w = w.detach().clone().requires_grad_()
    pmod.psum((x @ w).sin().sum(), "data").backward(inputs=[w])
    assert w.grad is not None
    return w.grad


def _weighed(x: Tensor, w: Tensor) -> Tensor:
    """What flows back into one value varies."""
    return torch.autograd.grad((w**2).sum(0), w, x.sum(0)[:2], create_graph=True)[0]


def _along(x: Tensor, w: Tensor) -> Tensor:
    """What flows back into what varies is one value."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad((x @ w).sin().sum(0), x, w[0] * 2, create_graph=True)[0]


GRADIENTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "torch.func.grad": (_descent, lambda x, w: w - 0.1 * torch.func.grad(lambda w: (x @ w).sin().sum())(w)),
    "vmap": (lambda x, w: torch.vmap(torch.sin)(w), lambda x, w: w.sin()),
    "backward": (_backward, lambda x, w: x.T @ (x @ w).cos()),
    "what varies into one value": (_weighed, _weighed),
    "one value into what varies": (_along, _along),
}


@pytest.mark.parametrize("derivative", [False, True])
@pytest.mark.parametrize("name", GRADIENTS)
def test_derivatives_in_the_body(name: str, derivative: bool) -> None:
    local, whole = GRADIENTS[name]
    out = DATA if name.startswith("one value") else P()
    f = pmod.shard_map(local, in_specs=(DATA, P()), out_specs=out)

    def run(f: Callable[..., Tensor]) -> list[Tensor]:
        w = W.detach().clone().requires_grad_(derivative or name.startswith(("what", "one")))
        y = f(FIXED, w)
        return [y.detach(), *(torch.autograd.grad(y.square().sum(), w) if derivative and y.requires_grad else ())]

    want = run(whole if name != "backward" else lambda x, w: whole(x, w).detach())
    for got in pmod.simulate(run, f, data=2):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_derivative_of_what_may_be_one_value_or_not() -> None:
    scale = torch.tensor(0.5, dtype=X.dtype)

    def gradient(x: Tensor, w: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(loss(pmod.psum((x @ w).sum(), "data")), w, create_graph=True)[0]

    def after_index(y: Tensor) -> Tensor:
        return y / 2 if pmod.axis_index("data") >= 0 else y

    for loss in (lambda y: y * scale, after_index):
        f = pmod.shard_map(lambda x, w, loss=loss: gradient(x, w, loss), in_specs=(DATA, P()), out_specs=P())
        assert "what is differentiated may vary along 'data' or not" in message(lambda f=f: f(X, W), data=2)
    f = pmod.shard_map(lambda x, w: gradient(x, w, lambda y: pmod.pvary(y * scale, "data")), in_specs=(DATA, P()),
                       out_specs=P())  # fmt: skip
    for got in pmod.simulate(lambda: f(X, W).detach(), data=2):
        torch.testing.assert_close(got, X.detach().sum(0)[:, None].expand(3, 2))  # of the losses of two ranks, 1/2 each


def test_a_result_that_may_be_one_value_or_not() -> None:
    f = pmod.shard_map(lambda x: x * torch.ones(2)[FIXED[:2, 0].argsort()], in_specs=P(), out_specs=P())
    text = message(lambda: f(torch.ones(2)), data=2)
    assert "the result may vary along 'data' or not: it was made from a tensor that f refers to" in text
    assert "Pass that tensor as an argument" in text


class Scaled(torch.nn.Module):
    """A parameter, a buffer that all ranks hold, and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * self.scale


def module_with_a_buffer() -> None:
    module, x = Scaled(), torch.arange(15.0, dtype=torch.float64).reshape(5, 3)
    y = pmod.shard_map(module, in_specs=P("data"), out_specs=P("data"))(x)
    torch.testing.assert_close(y, module(x))
    y.sum().backward()
    torch.testing.assert_close(module.weight.grad, x.sum(0) * module.scale)
    for f in (module.forward, partial(module), partial(module.forward)):
        torch.testing.assert_close(pmod.shard_map(f, in_specs=P(), out_specs=P())(x), module(x))


def test_the_buffers_of_a_module_are_one_value() -> None:
    pmod.simulate(module_with_a_buffer, data=2, model=2)


class Counting(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("scale").add_(x.mean(0))
        return x


def test_a_buffer_is_not_changed_by_what_varies() -> None:
    x = torch.arange(12.0, dtype=torch.float64).reshape(4, 3)
    norm = torch.nn.BatchNorm1d(3, dtype=torch.float64)
    for module in (norm, Counting()):
        f = pmod.shard_map(module, in_specs=DATA, out_specs=DATA)
        text = message(lambda f=f: f(x), data=2)
        assert "a buffer of the module, one value along ['data'], is changed by what varies" in text
        assert "track_running_stats=False" in text
    assert norm.running_mean is not None and norm.running_mean.tolist() == [0, 0, 0]
    torch.testing.assert_close(pmod.simulate(pmod.shard_map(norm.eval(), in_specs=DATA, out_specs=DATA), x, data=2)[0],
                               norm(x))  # fmt: skip


READS: dict[str, Callable[[Tensor], object]] = {
    "item": Tensor.item, "float": float, "int": int, "index": lambda x: operator.index(x.detach().long()),
    "iter": lambda x: list(x[None]), "invert": lambda x: ~x.detach().long(),
}  # fmt: skip


class Reading(Scaled):
    """It reads a buffer after each rank has asked for its place."""

    def __init__(self, read: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.read = read
        self.register_buffer("steps", torch.tensor(2))

    def forward(self, x: Tensor) -> Tensor:
        pmod.axis_index("data")
        self.read(self.get_buffer("steps"))
        total = pmod.psum(x.sum() * self.weight.sum(), "data")
        with warnings.catch_warnings(action="ignore"):  # of torch: it requires a gradient
            self.read(total)
        return total


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", READS)
def test_who_reads_a_number_changes_nothing(name: str, grad: bool) -> None:
    """int(x) was taken for a change of x in place."""
    module = Reading(READS[name]).requires_grad_(grad)
    x = torch.arange(4.0, dtype=torch.float64)
    f = pmod.shard_map(module, in_specs=DATA, out_specs=P())
    assert [y.item() for y in pmod.simulate(f, x, data=2)] == [36, 36]


def test_what_changes_in_place() -> None:
    """x.__iadd__ does: without the i it is an operator. x.__int__ and x.__iter__ do not."""
    named = [name for name in dir(Tensor) if name.startswith("__i")]
    found = [name for name in named if is_in_place(name)]
    assert found == [name for name in named if hasattr(Tensor, f"__{name[3:]}")] and len(found) > 10
    assert is_in_place("__setitem__") and is_in_place("add_")
    assert not is_in_place("__init__") and not is_in_place("__or__") and not is_in_place("add")


# --- ranks that go unlike ways --------------------------------------------------------------------

ROUTES = {"in one order": [0, 0, 1, 0, 1, 1], "in another order": [0, 0, 1, 1, 0, 0], "unlike sets": [0, 0, 0, 1, 1, 1]}


class Tied(torch.nn.Module):
    """Its weight is computed from its parameter in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(draw(4, 4).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.w + self.w.T)


def _plain() -> torch.nn.Module:
    return torch.nn.Linear(4, 4, bias=False, dtype=torch.float64)


def _normed() -> torch.nn.Module:
    return torch.nn.utils.parametrizations.weight_norm(_plain())


def routed(make: Callable[[], torch.nn.Module], route: list[int], second: bool) -> None:
    """Each sample goes to an expert of its own: the gradients are those of one process."""
    torch.manual_seed(0)
    experts, serial = (torch.nn.ModuleList([make(), make(), make()]) for _ in range(2))
    serial.load_state_dict(experts.state_dict())
    x, to = draw(6, 4).detach(), torch.tensor(route)

    def loss(experts: Any, x: Tensor, to: Tensor) -> Tensor:
        return sum(experts[int(e)](row[None]).square().sum() for row, e in zip(x, to, strict=True))  # type: ignore

    f = pmod.shard_map(lambda x, to: pmod.psum(loss(experts, x, to), "data"), in_specs=DATA, out_specs=P())
    for module, value in ((experts, f(x, to)), (serial, loss(serial, x, to))):
        if second:
            ws = [w for expert in (module[0], module[1]) for w in expert.parameters()]
            value = sum(g.sin().sum() for g in torch.autograd.grad(value, ws, create_graph=True))
        value.backward()
    for w, want in zip(experts.parameters(), serial.parameters(), strict=True):
        if not second:
            assert (w.grad is None) == (want.grad is None)  # what no rank used has no gradient
        if w.grad is not None:
            torch.testing.assert_close(w.grad, torch.zeros_like(w) if want.grad is None else want.grad)


@pytest.mark.parametrize("mesh", [{"data": 2}, {"data": 3}], ids=str)
@pytest.mark.parametrize("make", [_plain, Tied, _normed])
@pytest.mark.parametrize("route", ROUTES)
def test_experts(route: str, make: Callable[[], torch.nn.Module], mesh: dict[str, int]) -> None:
    for second in (False, True):
        pmod.simulate(routed, make, ROUTES[route], second, **mesh)


def routed_each_way() -> None:
    for route in ROUTES.values():
        routed(Tied, route, False)
        routed(_plain, route, True)


def test_experts_on_processes() -> None:
    spmd.launch(routed_each_way, data=3)


def _after(x: Tensor, w: Tensor, sums: Callable[[Tensor], Tensor]) -> Tensor:
    """One value that was computed before each rank went its own way."""
    u, v = w.sin(), w.cos()
    first = bool(x.detach().sum() > 0)
    return sums(((x @ u) @ v.T).sum() if first else ((x @ v).square() @ u.T).sum() + (x @ v).sum())


def test_values_computed_before() -> None:
    def gradient(f: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        w = W.detach().clone().requires_grad_()
        return torch.autograd.grad(f(x, w), w)[0]

    x = torch.cat([torch.ones(1, 3), -torch.ones(1, 3)]).double()
    f = pmod.shard_map(lambda x, w: _after(x, w, lambda y: pmod.psum(y, "data")), in_specs=(DATA, P()), out_specs=P())
    want = gradient(lambda x, w: sum(_after(row[None], w, lambda y: y) for row in x))  # type: ignore[return-value]
    for got in pmod.simulate(gradient, f, data=2):
        torch.testing.assert_close(got, want)


HIDDEN = {torch.nn.Parameter(torch.ones(3, dtype=torch.float64))}


def test_a_parameter_without_a_name() -> None:
    def local(x: Tensor) -> Tensor:
        pmod.axis_index("data")
        return pmod.psum((x * next(iter(HIDDEN))).sum(), "data")

    f = pmod.shard_map(local, in_specs=DATA, out_specs=P())
    assert "a parameter or leaf of shape (3,) that f does not refer to by a name" in message(lambda: f(FIXED), data=2)


OWN: dict[str, Callable[[Tensor], Tensor]] = {
    "fold_in": lambda x: torch.ones(1) * (pmod.fold_in(0, "data") % 97),
    "the mesh's axis_index": lambda x: torch.ones(1) * pmod.current_mesh()["data"].axis_index("data"),
    "zeros of a shard's length": lambda x: torch.zeros(len(x), 2),
    "a loop over a shard's length": lambda x: sum((torch.ones(1) for _ in range(len(x))), torch.zeros(1)),
    "nonzero": lambda x: torch.ones(len((x > 0.3).nonzero())),
    "a mask": lambda x: torch.ones(len(x[x > 0.3])),
    "a number by its length": lambda x: torch.ones(1) * len(x),
    "a loop over rows": lambda x: sum((torch.ones(1) for _ in enumerate(x)), torch.zeros(1)),
    "unbind": lambda x: torch.ones(len(x.unbind())),
    "the mesh's coords": lambda x: torch.ones(1) * (pmod.current_mesh().coords or {})["data"],
    "is_first": lambda x: torch.ones(1) if pmod.is_first("data") else torch.zeros(1),
    "local_slice": lambda x: torch.arange(8)[pmod.local_slice((8,), DATA)],
    "local_slice with halo": lambda x: pmod.local_slice((8,), DATA, halo={0: 1}).read(torch.arange(8))[1:-1],
    "local_coords": lambda x: pmod.local_coords((8,), DATA)[0],
    "masked_select": lambda x: torch.zeros(x.masked_select(x > 0.3).size(0)),
}


@pytest.mark.parametrize("name", OWN)
def test_what_is_a_rank_s_own(name: str) -> None:
    f = pmod.shard_map(OWN[name], in_specs=DATA, out_specs=P())
    assert "the result may vary along 'data'" in message(lambda: f(FIXED), data=2)


class Lazy:
    """As a module of six's: it imports what it is asked for."""

    weight = torch.ones(1)

    def __getattr__(self, name: str) -> Any:
        raise ImportError(name)


LAZY = Lazy()


def test_what_a_body_refers_to_is_not_asked_for_what_it_makes_up() -> None:
    f = pmod.shard_map(lambda x: x * LAZY.weight, in_specs=DATA, out_specs=DATA)
    assert torch.equal(pmod.simulate(lambda: f(torch.ones(3)), data=2)[0], torch.ones(3))


def test_a_length_that_nobody_asked_for() -> None:
    def grown(x: Tensor) -> Tensor:
        y = torch.ones(1)
        for _ in range(x.shape[0]):
            y = y * 2
        return y

    f = pmod.shard_map(grown, in_specs=DATA, out_specs=P())
    said = message(lambda: f(FIXED), data=2)
    assert "the ranks along ('data',) return unlike values (their elements add up to [8.0, 4.0])" in said
    assert pmod.simulate(lambda: f(torch.ones(4)), data=2) == [torch.full((1,), 4.0)] * 2


def with_an_empty_shard(rows: Callable[[Tensor], Iterable[Tensor]]) -> None:
    """Rank 2 of 3 has nothing, and uses nothing; the others use parameters in orders of their own."""

    def body(x: Tensor) -> Tensor:
        y = x * 1
        for row in rows(x):
            y = y + (row * a * b if row > 1 else b + row * a) + (unused if row > 9 else 0)
        return y

    a, b, unused = [torch.tensor(n, dtype=X.dtype, requires_grad=True) for n in (2.0, 3.0, 4.0)]
    x = torch.tensor([1.0, 2.0], dtype=X.dtype)
    y = pmod.shard_map(body, in_specs=DATA, out_specs=DATA)(x)
    assert y.tolist() == [1 + 3 + 2, 2 + 2 * 6]
    found = torch.autograd.grad(y.sum(), (a, b, unused), allow_unused=True)
    assert found[:2] == (1 + 2 * 3, 1 + 2 * 2) and found[2] is None


def _by_number(x: Tensor) -> Iterator[Tensor]:
    """Where nothing is, nothing is asked."""
    return (x[i] for i in range(x.shape[0]))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("rows", [iter, _by_number])
def test_an_empty_shard(rows: Callable[[Tensor], Iterable[Tensor]], ranks: int) -> None:
    pmod.simulate(with_an_empty_shard, rows, data=ranks)
    spmd.launch(with_an_empty_shard, rows, data=ranks)


def test_what_has_no_derivative_has_none_in_uneven_shards() -> None:
    w = torch.ones(3, dtype=X.dtype, requires_grad=True)
    f = pmod.shard_map(lambda x, w: (x @ w).detach(), in_specs=(DATA, P()), out_specs=DATA)
    assert pmod.simulate(lambda: f(FIXED, w).requires_grad, data=2) == [False, False]


# --- changes in place -----------------------------------------------------------------------------


@torch.library.custom_op("pmod_test_kinds::write", mutates_args={"y"})
def _write(y: Tensor, x: Tensor) -> None:
    y.copy_(x.expand_as(y))


def _assign(y: Tensor, x: Tensor) -> None:
    y[0] = x


def _assign_sum(y: Tensor, x: Tensor) -> None:
    y[0] += x


def _assign_masked(y: Tensor, x: Tensor) -> None:
    y[torch.ones(2, dtype=torch.bool)] = x


def _assign_transposed(y: Tensor, x: Tensor) -> None:
    y.T[:, 0] = x


def _assign_detached(y: Tensor, x: Tensor) -> None:
    y.detach()[0] = x


def _assign_data(y: Tensor, x: Tensor) -> None:
    y.data[0] = x


def _assign_view(y: Tensor, x: Tensor) -> None:
    y.view(-1)[: len(x)] = x


def _assign_without_a_graph(y: Tensor, x: Tensor) -> None:
    with torch.no_grad():
        y[0] = x


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "y[0] = x": _assign,
    "y[0] += x": _assign_sum,
    "y += x": lambda y, x: operator.iadd(y, x),
    "y[mask] = x": _assign_masked,
    "y.T[:, 0] = x": _assign_transposed,
    "y.detach()[0] = x": _assign_detached,
    "y.data[0] = x": _assign_data,
    "y.view(-1)[:n] = x": _assign_view,
    "no_grad": _assign_without_a_graph,
    "copy_": lambda y, x: y.copy_(x),
    "out=": lambda y, x: torch.add(torch.stack([x, x]), 1, out=y),
    "foreach": lambda y, x: torch._foreach_add_([y], [torch.stack([x, x])]),
    "foreach of a view": lambda y, x: torch._foreach_copy_([y[0]], [x]),
    "aten.add_": lambda y, x: torch.ops.aten.add_(y, x),
    "aten.copy_.default": lambda y, x: torch.ops.aten.copy_.default(y, x.expand_as(y)),
    "set_": lambda y, x: y.set_(torch.stack([x, x])),
    "storage": lambda y, x: y.untyped_storage().copy_(torch.stack([x, x]).untyped_storage()),
    "an operator": lambda y, x: _write(y, x),
}
EAGER_TOO = {"storage"}  # the only one that eager code may refuse as well


def _written(write: Callable[[Tensor, Tensor], Any], x: Tensor, w: Tensor) -> Tensor:
    y = torch.zeros(2, *x.shape, dtype=x.dtype)
    write(y, x)
    return (y * w).sum(0)


def check_write(name: str, backend: str | None) -> bool:
    """Whether the form is right in a body; else it raises, and says that shard_map does not follow it."""
    x, w = torch.arange(4.0) + 1, torch.ones((), requires_grad=True)
    local = partial(_written, WRITES[name])
    f = pmod.shard_map(lambda x, w: local(x, w), in_specs=(DATA, P()), out_specs=DATA)
    if backend is not None:
        torch._dynamo.reset()  # each form is a function of its own, and there is a limit to those
    g = f if backend is None else torch.compile(f, fullgraph=True, backend=backend)
    want, of_want = local(x, w), torch.autograd.grad(local(x, w).sin().sum(), w)[0]
    try:
        y = g(x, w)
        gradient = torch.autograd.grad(y.sin().sum(), w)[0]
    except Exception as error:
        ours = "pmod.shard_map(axis='data')" in str(error)
        assert ours or (backend is not None and name in ("storage", "set_")), f"{name}, {backend}: {error}"  # torch's
        return False
    torch.testing.assert_close((y, gradient), (want, of_want), msg=lambda text: f"{name}, {backend}: {text}")
    return True


def check_writes(names: list[str], backend: str | None) -> list[str]:
    return [name for name in names if check_write(name, backend)]


def test_changes_in_place() -> None:
    for right in spmd.launch(check_writes, list(WRITES), None, data=2):
        assert set(WRITES) - EAGER_TOO <= set(right)


def test_compiled_changes_in_place() -> None:
    for right in spmd.launch(check_writes, list(WRITES), "aot_eager", data=2):
        assert {"y[0] = x", "y[0] += x", "y += x", "copy_", "aten.add_"} <= set(right)


# --- compiled bodies that ask for what is a rank's own ----------------------------------------------


def _unlike(x: Tensor, v: Tensor, w: Tensor, first: bool) -> Tensor:
    return x * v * w if first else (x * w).sin() * w * v


def _unlike_sets(x: Tensor, v: Tensor, w: Tensor, first: bool) -> Tensor:
    return x * v if first else x * w


def _met_before(x: Tensor, v: Tensor, w: Tensor, first: bool) -> Tensor:
    return x * w if first else x


class Two(torch.nn.Module):
    """Its ranks use two parameters in unlike orders."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.w = (torch.nn.Parameter(torch.tensor(n)) for n in (2.0, 3.0))

    def forward(self, x: Tensor) -> Tensor:
        return pmod.psum(_unlike(x, self.v, self.w, pmod.axis_index("data") == 0).sum(), "data")


def check_compiled_order(way: Callable[..., Tensor]) -> None:
    x, v, w = torch.arange(4.0), torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)

    def local(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
        y = x * v  # before the rank asks
        return pmod.psum((y + way(x, v, w, pmod.axis_index("data") == 0)).sum(), "data")

    f = pmod.shard_map(local, in_specs=(DATA, P(), P()), out_specs=P())
    got = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(x, v, w), [v, w])
    whole = (x * v).sum() + way(x[:2], v, w, True).sum() + way(x[2:], v, w, False).sum()
    torch.testing.assert_close(got, torch.autograd.grad(whole, [v, w]))


def compiled_orders() -> None:
    torch._dynamo.reset()
    for way in (_unlike, _unlike_sets, _met_before):
        check_compiled_order(way)
    two, x = Two(), torch.arange(4.0)
    torch.compile(pmod.shard_map(two, in_specs=DATA, out_specs=P()), fullgraph=True, backend="aot_eager")(x).backward()
    whole = sum(_unlike(part, two.v, two.w, i == 0).sum() for i, part in enumerate(x.split(2)))
    torch.testing.assert_close((two.v.grad, two.w.grad), torch.autograd.grad(whole, [two.v, two.w]))
    weight = torch.nn.Parameter(torch.ones(()))
    f = pmod.shard_map(lambda x: x.sin() * pmod.axis_index("data") * weight, in_specs=DATA, out_specs=DATA)
    with pytest.raises(Exception, match="each rank may come to it in an order of its own"):
        torch.compile(f, fullgraph=True, backend="aot_eager")(x)


def test_compiled_orders() -> None:
    spmd.launch(compiled_orders, data=2)
