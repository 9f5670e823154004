"""replicate, share_parameters, data_parallel: gradients against one process that holds all ranks' data.

A program trains a module on one rank's data. Run for one rank after the other on a plain module, its gradients add up
in `.grad`: what the ranks must hold when each runs it on its own.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import re
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as prune
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import pmod
from pmod._train import data_parallel, share_parameters
from tests.lib import spmd
from tests.lib.listening import counted, same

Tensor = torch.Tensor
DOUBLE = torch.float64


def data(rank: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(shape or (4, 3), dtype=DOUBLE, generator=generator)


def small(**more: Any) -> nn.Sequential:
    more = {"dtype": DOUBLE, **more}
    return nn.Sequential(OrderedDict(first=nn.Linear(3, 4, **more), tanh=nn.Tanh(), last=nn.Linear(4, 2, **more)))


def set_values(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, dtype=p.dtype, generator=generator) / 2)
    return module


# --- the programs -------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass(frozen=True)
class Record:
    y: Tensor
    n: int = 3


class Branches(nn.Module):
    """Which parameters are used is for the caller to say."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 2, dtype=DOUBLE) for _ in "abc")

    def forward(self, x: Tensor, names: str) -> Tensor:
        return sum((getattr(self, name)(x).sin() for name in names), x[:, :2])


class Outputs(nn.Module):
    """Whatever a module may return."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=DOUBLE)
        self.idle = nn.Linear(3, 2, dtype=DOUBLE)
        self.used = True

    def forward(self, x: Tensor, what: str) -> Any:
        y = self.layer(x)
        if what == "dict":
            return {"y": y, "n": 3, "none": None}
        if what == "defaultdict":
            return defaultdict(list, y=[y, torch.arange(2)])
        if what == "dataclass":
            return Record(y if self.used else x[:, :2])
        if what == "namedtuple":
            return Pair(y, (torch.ones(2) > 0, y.to(torch.complex128)))
        return y.max(0)  # a type of torch's own


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(3, 2, dtype=DOUBLE, bias=False), nn.Linear(2, 3, dtype=DOUBLE)
        self.again = self.down
        self.up.weight = nn.Parameter(self.up.weight.detach().clone())
        self.copy = nn.Linear(3, 2, dtype=DOUBLE, bias=False)
        self.copy.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.up(self.down(x)).tanh()) * self.copy(x)


class Inside(nn.Module):
    """A checkpoint inside the module."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = small(), nn.Linear(2, 1, dtype=DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, x, use_reentrant=False))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, 2, dtype=torch.complex128))
        self.scale = nn.Parameter(torch.zeros(2, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex128) @ self.w) * self.scale


class Mixed(nn.Module):
    """Parameters of three dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, dtype=DOUBLE), nn.Linear(3, 3, dtype=torch.float32)
        self.c = nn.Linear(3, 1, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).float()).tanh().bfloat16()).double()


def frozen() -> nn.Module:
    module = small()
    module.first.requires_grad_(False)
    return module


def pruned() -> nn.Module:
    layer = nn.Linear(3, 2, dtype=DOUBLE)
    prune.custom_from_mask(layer, "weight", torch.tensor([[1, 0, 1], [0, 1, 1]]))
    return layer


def squared(y: Tensor) -> Tensor:
    return (y.abs() ** 2).sum()


def back(module: nn.Module, *args: Any) -> None:
    squared(module(*args)).backward()


def three_times(module: nn.Module, rank: int) -> None:
    for step in range(3):
        back(module, data(rank + 10 * step))


def twice_in_one(module: nn.Module, rank: int) -> None:
    (squared(module(data(rank))) * module(data(rank).cos()).sum()).backward()


def outputs(module: nn.Module, rank: int) -> None:
    for what in ("dict", "defaultdict", "namedtuple", "max", "dataclass"):
        module.used = rank > 0
        y = module(data(rank).requires_grad_(), what)
        y = y.y if isinstance(y, Record) else y["y"] if isinstance(y, dict) else y[0]
        squared(y[0] if isinstance(y, list) else y).backward()


def alone(module: nn.Module, rank: int) -> None:
    back(module, data(rank))
    back(module.first, data(rank + 7))


def checkpointed(module: nn.Module, rank: int) -> None:
    squared(checkpoint(module, data(rank), use_reentrant=False)).backward()


def slopes(module: nn.Module, rank: int) -> None:
    """A loss with a derivative in it."""
    x = data(rank).requires_grad_()
    (dx,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
    squared(dx).backward()


def autocast(module: nn.Module, rank: int) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        y = module(data(rank).float())
    assert y.dtype == torch.bfloat16
    (squared(y.float()) * 2.0**12).backward()


Program = Callable[[nn.Module, int], None]
PROGRAMS: dict[str, tuple[Callable[[], nn.Module], Program]] = {
    "one backward": (small, lambda m, rank: back(m, data(rank))),
    "three backwards": (small, three_times),
    "called twice in one forward": (small, twice_in_one),
    "a derivative in the loss": (small, slopes),
    "unused on some": (Branches, lambda m, rank: back(m, data(rank), "ab" if rank else "ac")),
    "unused on all": (Branches, lambda m, rank: back(m, data(rank), "a")),
    "only the last unused": (Branches, lambda m, rank: back(m, data(rank), "b")),
    "all unused on one": (Branches, lambda m, rank: squared(m(data(rank).requires_grad_(), "ba" * rank)).backward()),
    "all unused on all": (Branches, lambda m, rank: squared(m(data(rank).requires_grad_(), "")).backward()),
    "used here, then there": (Branches, lambda m, rank: [back(m, data(rank), "abc"[(rank + i) % 3]) for i in range(2)]),
    "outputs": (Outputs, outputs),
    "a submodule alone": (small, alone),
    "tied": (Tied, lambda m, rank: back(m, data(rank))),
    "checkpoint": (small, checkpointed),
    "a checkpoint inside": (Inside, lambda m, rank: back(m, data(rank))),
    "frozen": (frozen, lambda m, rank: back(m, data(rank))),
    "pruned": (pruned, lambda m, rank: back(m, data(rank))),
    "complex": (Complex, lambda m, rank: back(m, data(rank))),
    "mixed": (Mixed, lambda m, rank: back(m, data(rank))),
    "autocast": (lambda: small(dtype=torch.float32), autocast),
    "LSTM": (
        lambda: nn.LSTM(3, 2, num_layers=2, bidirectional=True, dtype=DOUBLE),
        lambda m, rank: [squared(m(data(rank + i))[0]).backward() for i in range(2)],
    ),
    "attention": (
        lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, dtype=DOUBLE),
        lambda m, rank: squared(m(data(rank, 3, 2, 4)) * data(9, 3, 2, 4)).backward(),
    ),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2, dtype=DOUBLE)),
        lambda m, rank: back(m, data(rank)),
    ),
    "sparse": (
        lambda: nn.Embedding(5, 2, sparse=True, dtype=DOUBLE),
        lambda m, rank: back(m, torch.tensor([rank, 3, rank])),
    ),
    "no parameters": (nn.Tanh, lambda m, rank: back(m, data(rank).requires_grad_())),
}
ATTACH: dict[str, tuple[Callable[[nn.Module, Any], Any], bool]] = {
    "share, sum": (lambda m, axis: pmod.share_parameters(m, axis), False),
    "share, mean": (lambda m, axis: pmod.share_parameters(m, axis, reduce="mean"), True),
    "data_parallel": (lambda m, axis: pmod.data_parallel(m, axis), True),
    "data_parallel, sum": (lambda m, axis: pmod.data_parallel(m, axis, reduce="sum"), False),
}


def expected_of(plain: nn.Module, program: Program, members: list[int], mean: bool) -> list[Tensor | None]:
    for rank in members:
        program(plain, rank)
    grads = [None if p.grad is None else p.grad.to_dense() for p in plain.parameters()]
    return [g if g is None or not mean else g / len(members) for g in grads]


def program_on_rank(name: str, how: str, axis: Any = "x") -> None:
    make, program = PROGRAMS[name]
    attach, mean = ATTACH[how]
    plain = set_values(make())
    module = set_values(make(), seed=pmod.current_mesh().topology.rank)  # the first rank's values count
    index, n = pmod.axis_index(axis), pmod.axis_size(axis)
    members = pmod.all_gather(torch.tensor([pmod.current_mesh().topology.rank]), axis).tolist()
    set_values(plain, seed=members[0])
    before = dict(module.named_parameters())
    attach(module, axis)
    expected = expected_of(plain, program, list(range(n)), mean)
    program(module, index)
    assert [id(p) for p in module.parameters()] == [id(p) for p in before.values()], "the parameters were not put back"
    for (key, p), e in zip(before.items(), expected, strict=True):
        assert (p.grad is None) == (e is None), f"{name}, {how}, {key}: {p.grad} for {e}"
        if p.grad is not None:
            assert p.grad.dtype == p.dtype and p.grad.grad_fn is None
            tol = {DOUBLE: 1e-12, torch.complex128: 1e-12, torch.bfloat16: 1e-2}.get(p.dtype, 1e-5)
            same(p.grad.to_dense(), e, f"{name}, {how}, {key}", rtol=tol, atol=tol)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("how", ATTACH)
def test_programs(name: str, how: str) -> None:
    for ranks in (1, 2, 3):
        pmod.simulate(program_on_rank, name, how, x=ranks)


def all_on_rank() -> None:
    for name, how in itertools.product(PROGRAMS, ("share, mean", "data_parallel")):
        program_on_rank(name, how)


def test_programs_on_processes() -> None:
    spmd.launch(all_on_rank, x=2)


def other_axes_on_rank() -> None:
    mesh = pmod.current_mesh()
    for how, axis in itertools.product(ATTACH, (("b", "a"), mesh["b"], mesh["a", "b"])):
        program_on_rank("unused on some", how, axis)


def test_kinds_of_axes(run: Any) -> None:
    run(other_axes_on_rank, a=2, b=2)


# --- share_parameters: derivatives that data_parallel has not -----------------------------------------------------


def curvature(params: dict[str, Tensor], module: nn.Module, x: Tensor) -> Tensor:
    return functional_call(module, params, (x,)).sin().sum()


def second_order_on_rank() -> None:
    """The gradient of the norm of the gradient of what all ranks' losses add up to."""
    n, rank = pmod.axis_size("x"), pmod.axis_index("x")
    plain, module = set_values(small()), set_values(small())
    pmod.share_parameters(module, "x")

    def both(module: nn.Module, loss: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
        return [*first, *torch.autograd.grad(sum(map(squared, first)), list(module.parameters()))]

    serial = both(plain, sum(squared(plain(data(r)).sin()) for r in range(n)))
    for got, e in zip(both(module, squared(module(data(rank)).sin())), serial, strict=True):
        same(got, e.detach(), "first and second", rtol=1e-12, atol=1e-12)

    params = {k: p.detach() for k, p in plain.named_parameters()}
    v = {k: p.cos() for k, p in params.items()}
    x = data(rank)

    def serial_loss(params: dict[str, Tensor]) -> Tensor:
        return sum(curvature(params, plain, data(r)) for r in range(n))

    g, g_serial = grad(curvature)(params, module, x), grad(serial_loss)(params)
    h = jvp(lambda p: grad(curvature)(p, module, x), (params,), (v,))[1]
    h_serial = jvp(lambda p: grad(serial_loss)(p), (params,), (v,))[1]
    tangent = jvp(lambda p: curvature(p, module, x), (params,), (v,))[1]
    same(tangent, jvp(lambda p: curvature(p, plain, x), (params,), (v,))[1], "jvp")
    each = vmap(grad(curvature), in_dims=(None, None, 0))(params, module, x[:, None])
    for k in params:
        same(g[k], g_serial[k], "functional_call and grad", rtol=1e-12, atol=1e-12)
        same(h[k], h_serial[k], "jvp of grad", rtol=1e-12, atol=1e-12)
        same(each[k].sum(0), g_serial[k], "grads of samples", rtol=1e-12, atol=1e-12)
    assert all(p.grad is None and p.is_leaf for p in module.parameters())


def test_second_order_and_functional_calls(run: Any) -> None:
    run(second_order_on_rank, x=2)


# which of two modules the ranks call, call by call
ROUTES = {
    "order": ((0, 1), (1, 0), (1, 0)),
    "often": ((0, 0, 1, 0), (0, 1), (1,)),
    "unlike sets": ((0, 0), (1,), (1, 0)),
    "one of two": ((0,), (0, 0), (0,)),
}


def routed(modules: nn.ModuleList, rank: int, route: tuple[int, ...], step: int) -> Tensor:
    return sum(squared(modules[i](data(rank + 10 * step + 100 * k)).sin()) for k, i in enumerate(route))


def calls_on_rank(kind: str, axes: tuple[tuple[str, ...], ...], reduce: Any) -> None:
    """Ranks that call modules in another order, unlike often, or unlike sets of them."""
    rank, n = pmod.current_mesh().topology.rank, pmod.current_mesh().size
    plain, modules = (nn.ModuleList(set_values(small(), seed) for seed in (1, 2)) for _ in range(2))
    scale = 1.0
    if axes == (("each",),):  # two sets
        pmod.share_parameters(modules[1], "x", reduce=reduce)
        pmod.share_parameters(modules[0], "x", reduce=reduce)
        scale = 1 / pmod.axis_size("x") if reduce == "mean" else 1.0
    else:
        for axis in axes:
            pmod.share_parameters(modules, axis, reduce=reduce)
            scale /= pmod.axis_size(axis) if reduce == "mean" else 1
    routes = [ROUTES[kind][r % 3] for r in range(n)]
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=1e-2) for m in (modules, plain))
    for step in range(2):
        for _ in range(2):  # accumulated
            routed(modules, rank, routes[rank], step).backward()
            (scale * sum(routed(plain, r, routes[r], step) for r in range(n))).backward()
        loss = routed(modules, rank, routes[rank], 7 + step)
        total = scale * sum(routed(plain, r, routes[r], 7 + step) for r in range(n))
        for m, y, factor in ((modules, loss, 1), (plain, total, scale)):
            used = torch.autograd.grad(y, [*m.parameters()], create_graph=True, allow_unused=True)
            (factor * sum(squared(g) for g in used if g is not None)).backward()
        for p, q in zip(modules.parameters(), plain.parameters(), strict=True):
            if q.grad is not None:
                same(p.grad, q.grad, f"{kind}, {axes}, {reduce}", rtol=1e-12, atol=1e-12)
        ours.step()
        theirs.step()
        for p, q in zip(modules.parameters(), plain.parameters(), strict=True):
            same(p, q.detach(), "values", rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ROUTES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_calls_in_another_order(run: Any, kind: str, ranks: int) -> None:
    run(calls_on_rank, kind, (("x",),), "sum", x=ranks)


@pytest.mark.parametrize("kind", ROUTES)
def test_calls_in_another_order_of_two_sets(kind: str) -> None:
    pmod.simulate(calls_on_rank, kind, (("x",),), "mean", x=3)
    if kind in ("order", "often"):  # a rank calls a module of each set
        pmod.simulate(calls_on_rank, kind, (("each",),), "mean", x=2)
    pmod.simulate(calls_on_rank, kind, (("a",), ("b",)), "mean", a=2, b=2)


def test_backward_runs_the_numbered_nodes_last() -> None:
    """What the order of the sums rests on, and torch does not promise: it shows here where torch changes it."""
    ran: list[str] = []
    leaf = torch.ones(2, requires_grad=True)
    share_parameters._run_last([], 2)
    nodes = {name: leaf.view_as(leaf) for name in ("second", "first", "other")}
    for name, y in nodes.items():
        y.grad_fn.register_prehook(lambda gradients, name=name: ran.append(name))
    share_parameters._run_last([nodes["second"].grad_fn], 1)
    share_parameters._run_last([nodes["first"].grad_fn], 2)
    sum(y.sum() for y in nodes.values()).backward()
    assert ran == ["other", "first", "second"]


def create_graph_on_rank() -> str:
    module = pmod.data_parallel(set_values(small()), "x")
    with pytest.raises(pmod.PmodError) as raised:
        squared(module(data(0))).backward(create_graph=True)
    return str(raised.value)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_data_parallel_refuses_create_graph(run: Any) -> None:
    for rank, text in enumerate(run(create_graph_on_rank, x=2)):
        assert text == (
            f"pmod.data_parallel(axis='x') at (x={rank}): backward ran with create_graph=True, and what is reduced in "
            ".grad has no derivative.\nUse share_parameters(module, axis, reduce='mean')."
        )


# --- messages -----------------------------------------------------------------------------------------------------


def messages_on_rank() -> dict[str, list[Any]]:
    sent: dict[str, list[Any]] = {}
    module = Mixed()
    _, sent["share"] = counted(lambda: pmod.share_parameters(module, "x"))
    y, sent["forward"] = counted(lambda: module(data(0)))
    _, sent["backward"] = counted(lambda: squared(y).backward())
    _, sent["two calls"] = counted(lambda: squared(module(data(0)) + module(data(1))).backward())
    with torch.no_grad():
        _, sent["no grad"] = counted(lambda: module(data(0)))
    tied = Tied()
    counted(lambda: pmod.share_parameters(tied, "x"))
    _, sent["tied"] = counted(lambda: squared(tied(data(0))).backward())
    module = Mixed()
    _, sent["data_parallel"] = counted(lambda: pmod.data_parallel(module, "x"))
    _, sent["reduced"] = counted(lambda: squared(module(data(0)) + module(data(1))).backward())
    return sent


def frozen_later_on_rank() -> None:
    for how in ATTACH:
        module = set_values(small())
        ATTACH[how][0](module, "x")
        module.requires_grad_(False)
        assert not module(data(0)).requires_grad
        _, sent = counted(lambda module=module: back(module, data(0).requires_grad_()))
        assert not sent, how
        module.requires_grad_(True)
        _, sent = counted(lambda module=module: back(module, data(0)))
        assert len(sent) == 1, how


def used_by_some_on_rank() -> None:
    """One layer is used by all ranks, one by the second, one by nobody; twice, with and without a second order."""
    rank = pmod.axis_index("x")
    layers = nn.ModuleDict({name: nn.Linear(3, 1, dtype=DOUBLE) for name in ("all", "one", "nobody")})
    pmod.share_parameters(layers, "x")
    x = torch.full((1, 3), 1.0 + rank, dtype=DOUBLE)
    for create_graph in (False, True):
        loss = layers["all"](x).sum() + (layers["one"](x).sum() if rank else 0)
        found = torch.autograd.grad(loss, list(layers.parameters()), create_graph=create_graph, allow_unused=True)
        weights, biases = found[::2], found[1::2]
        assert [None if w is None else w.tolist() for w in weights] == [[[3.0] * 3], [[2.0] * 3], None]
        assert [None if b is None else b.item() for b in biases] == [2, 1, None]


def test_what_no_rank_used_has_no_gradient(run: Any) -> None:
    run(used_by_some_on_rank, x=2)


def idle_on_rank(how: str) -> None:
    """What no rank used is left out of the next message, and comes after it where one rank uses it again."""
    rank = pmod.axis_index("x")
    layers = nn.ModuleDict({name: nn.Linear(10, 1, bias=False, dtype=DOUBLE) for name in "abc"})
    serial = copy.deepcopy(pmod.replicate(layers, "x"))
    x = torch.linspace(0, 1, 40, dtype=DOUBLE).reshape(4, 10)

    def loss(layers: Any, x: Tensor, used: str) -> Tensor:
        return sum((layers[name](x).square().sum() for name in used), x.sum() * 0)

    if how == "share_parameters":
        pmod.share_parameters(layers, "x")
        shared = partial(loss, layers)
    else:
        by_rank = pmod.shard_map(lambda x, used: pmod.psum(loss(layers, x, used[pmod.axis_index("x")]), "x"),
                                 in_specs=(pmod.P("x"), None), out_specs=pmod.P())  # fmt: skip
    sent: list[list[int]] = []
    passes = [("ab", "a"), ("ab", "a"), ("a", "c"), ("a", "a"), ("b", "bc"), ("abc", "abc"), ("", ""), ("", "a")]
    if how == "share_parameters":
        passes = passes[:-2]  # there each rank calls a module
    for of_ranks in passes:
        for module in (layers, serial):
            module.zero_grad()
        parts = x.clone().requires_grad_().split(2)
        sum(loss(serial, part, used) for part, used in zip(parts, of_ranks, strict=True)).backward()

        def backward(of_ranks: Any = of_ranks) -> None:
            if how == "share_parameters":
                shared(x[2 * rank : 2 * rank + 2].clone().requires_grad_(), of_ranks[rank]).backward()
            else:
                by_rank(x.clone().requires_grad_(), of_ranks).backward()

        _, messages = counted(backward)
        counts = [count for _, _, count in messages if count > 1]
        sent.append(counts if how == "share_parameters" else counts[:-1])  # the last is the gradient of x
        for p, q in zip(layers.parameters(), serial.parameters(), strict=True):
            used = q.grad is not None
            assert (p.grad is not None) == used, of_ranks
            if used:
                same(p.grad, q.grad, f"{of_ranks}")
    # three flags and the layers of 10 elements; then those that are used after all
    assert sent == [[33], [23], [23, 10], [23], [13, 20], [23, 10], [33], [3, 10]][: len(passes)], sent


@pytest.mark.parametrize("how", ["share_parameters", "shard_map"])
def test_what_no_rank_used_is_not_sent_again(run: Any, how: str) -> None:
    run(idle_on_rank, how, x=2)


def test_frozen_later(run: Any) -> None:
    run(frozen_later_on_rank, x=2)


def test_messages(run: Any) -> None:
    """One per dtype for all calls that are shared, one per bucket for each backward pass; with a flag per parameter."""
    first, second = run(messages_on_rank, x=2)
    assert first == second
    double, single, half = DOUBLE, torch.float32, torch.bfloat16
    equal = [("broadcast", double, 12), ("broadcast", single, 12), ("broadcast", half, 4)]
    assert first["share"] == first["data_parallel"] == equal
    assert first["forward"] == first["no grad"] == []
    summed = {("all_reduce", double, 14), ("all_reduce", single, 14), ("all_reduce", half, 6)}
    assert set(first["backward"]) == summed and len(first["backward"]) == 3
    assert set(first["two calls"]) == summed and len(first["two calls"]) == 3
    assert first["tied"] == [("all_reduce", double, sum(p.numel() + 1 for p in Tied().parameters()))]
    assert first["reduced"] == [("all_reduce", half, 6), ("all_reduce", single, 14), ("all_reduce", double, 14)]


def buckets_on_rank(events: list[list[str]]) -> None:
    """What happens in a backward pass, in order."""
    rank, x = pmod.axis_index("x"), torch.ones(1, 3, dtype=DOUBLE)
    module = pmod.data_parallel(set_values(Branches()), "x")
    loss = 0 * module(x, "").sum()
    for scale, name in zip((1, 10, 100), "abc", strict=True):
        hidden = x.clone().requires_grad_()
        hidden.register_hook(lambda _, name=name: events[rank].append(f"after {name}"))
        if rank == 0 or name != "b":
            loss = loss + scale * getattr(module, name)(hidden).sum()
    loss.backward()


def test_buckets_travel_while_backward_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[list[str]] = [[], []]
    together = data_parallel.together

    def noted(row: Any, tensors: list[Tensor], axis: Any, params: Any) -> list[Tensor]:
        if tensors[0].dim() == 2:  # a weight; its bias travels alone
            events[axis.index].append(f"send {int(tensors[0].sum())}")
        return together(row, tensors, axis, params)

    monkeypatch.setattr(data_parallel, "FIRST_BUCKET", 1)
    monkeypatch.setattr(data_parallel, "BUCKET", 1)
    monkeypatch.setattr(data_parallel, "together", noted)
    pmod.simulate(buckets_on_rank, events, x=2)
    waits = ["send 600", "send 60", "send 6"]  # `start` runs its function again
    assert events[0] == ["after c", "send 600", "after b", "send 60", "after a", "send 6", *waits]
    # the second rank has no gradient for b: what comes after b waits for the end, in the same order
    waits[1] = "send 0"
    assert events[1] == ["after c", "send 600", "after a", "send 0", "send 6", *waits]


# --- the module stays what it was ---------------------------------------------------------------------------------


def state_on_rank(how: str) -> None:
    attach = ATTACH[how][0]
    module = set_values(small())
    module.register_buffer("steps", torch.tensor(3))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    returned = attach(module, "x")
    assert (returned is module) == how.startswith("data_parallel")
    index = pmod.axis_index("x")
    for made in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        back(module, data(index))
        other = made(module)
        assert list(other.state_dict()) == list(before)
        for m in (other, module):
            m.zero_grad()
            back(m, data(index))
        for p, q in zip(module.parameters(), other.parameters(), strict=True):
            assert p is not q
            same(q.grad, p.grad, f"{how}: the gradient of a copy", rtol=0, atol=0)
    assert list(module.state_dict()) == list(before)
    for k, v in module.state_dict().items():
        same(v, before[k], k, rtol=0, atol=0)
    fresh = small()
    fresh.register_buffer("steps", torch.tensor(0))
    fresh.load_state_dict(module.state_dict())
    module.load_state_dict(before)


@pytest.mark.parametrize("how", ATTACH)
def test_state_and_copies(run: Any, how: str) -> None:
    run(state_on_rank, how, x=2)


class Failing(nn.Module):
    """Raises what it is told to, deep inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=DOUBLE)
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.error is not None:
            raise self.error
        return y


def fails_on_rank(error: BaseException, where: str) -> None:
    plain, module = set_values(nn.Sequential(Failing())), set_values(nn.Sequential(Failing()))
    told: list[BaseException] = []

    def hook(*_: Any) -> None:
        if told:
            raise told[0]

    if where == "a hook before":
        module[0].register_forward_pre_hook(hook)
    handle = pmod.share_parameters(module, "x")
    if where == "a hook before that came later":
        module[0].register_forward_pre_hook(hook, prepend=True)
    if where == "a hook after":
        module[0].register_forward_hook(hook)
    if where == "forward":
        module[0].error = error
    else:
        told.append(error)
    before = list(module.parameters())
    with pytest.raises(type(error)):
        module(data(0))
    if isinstance(error, Exception):
        assert all(p is q for p, q in zip(module.parameters(), before, strict=True))
    module[0].error = None
    told.clear()
    for r in range(2):
        back(plain, data(r))
    back(module, data(pmod.axis_index("x")))
    assert all(p is q for p, q in zip(module.parameters(), before, strict=True))
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        same(p.grad, q.grad, f"after {error!r} in {where}", rtol=1e-12)
    handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()) or where != "forward"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("where", ["forward", "a hook before", "a hook before that came later", "a hook after"])
def test_after_an_error_in_forward(error: BaseException, where: str) -> None:
    pmod.simulate(fails_on_rank, error, where, x=2)


class Summed(nn.Module):
    """Sends in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        return pmod.pvary(pmod.psum(self.layer(x).sin(), "x"), "x")


def started_on_rank() -> None:
    x = data(pmod.axis_index("x"))
    grads = []
    for start in (False, True):
        module = set_values(Summed())
        pmod.share_parameters(module, "x")
        y = pmod.start(module, x).wait() if start else module(x)
        squared(y).backward()
        grads.append(module.layer.weight.grad)
    same(grads[1], grads[0], "gradient", rtol=0, atol=0)


def test_a_module_that_is_started(run: Any) -> None:
    run(started_on_rank, x=2)


class Raising(torch.autograd.Function):
    on = True

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        if Raising.on:
            raise ValueError("in the middle")
        return g


def broken_pass_on_rank(to_none: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_parallel, "FIRST_BUCKET", 1)
        patch.setattr(data_parallel, "BUCKET", 1)
        module = pmod.data_parallel(set_values(small()), "x")
    x = data(pmod.axis_index("x"))
    with pytest.raises(ValueError, match="in the middle"):
        squared(module.last(Raising.apply(module.first(x)))).backward()
    module.zero_grad(set_to_none=to_none)
    back(module, x)
    plain = set_values(small())
    for r in range(2):
        back(plain, data(r))
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        same(p.grad, q.grad / 2, "gradient of the next pass", rtol=1e-12)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.filterwarnings("error")
def test_after_an_error_in_backward(run: Any, to_none: bool) -> None:
    run(broken_pass_on_rank, to_none, x=2)


def removed_on_rank() -> None:
    module = set_values(small())
    handle = pmod.share_parameters(module, "x")
    assert handle.axis == "x"
    handle.remove()
    rank = pmod.axis_index("x")
    _, sent = counted(lambda: back(module, data(rank)))
    assert not sent
    plain = set_values(small())
    back(plain, data(rank))
    same(module.first.weight.grad, plain.first.weight.grad, "its own gradient", rtol=0, atol=0)
    pmod.share_parameters(module, "x")
    _, sent = counted(lambda: back(module, data(rank)))
    assert len(sent) == 1


def test_remove(run: Any) -> None:
    run(removed_on_rank, x=2)


# --- more than one, and none --------------------------------------------------------------------------------------

TWICE: dict[str, Callable[[nn.Sequential], Any]] = {
    "shared": lambda m: pmod.share_parameters(m, "x"),
    "shared inside": lambda m: pmod.share_parameters(m.first, "x"),
    "parallel": lambda m: pmod.data_parallel(m, "x"),
    "parallel inside": lambda m: pmod.data_parallel(m.first, "x"),
    "parallel around": lambda m: pmod.data_parallel(nn.Sequential(m), "x"),
    "shared around": lambda m: pmod.share_parameters(nn.Sequential(m), "x"),
}


def twice_on_rank(once: str, again: str) -> None:
    module = small()
    TWICE[once](module)
    with pytest.raises(pmod.PmodError) as raised:
        TWICE[again](module)
    function = "share_parameters" if again.startswith("shared") else "data_parallel"
    start = f"pmod.{function}(axis='x') at (x={pmod.axis_index('x')}): the gradients of "
    assert str(raised.value).startswith(start)
    assert str(raised.value).endswith(
        " are reduced over these ranks already.\nA second reduction would count them n times."
    )


@pytest.mark.parametrize(("once", "again"), list(itertools.product(TWICE, TWICE)))
def test_twice_over_one_axis(once: str, again: str) -> None:
    pmod.simulate(twice_on_rank, once, again, x=2)


def two_axes_on_rank(how: tuple[str, str]) -> None:
    module, plain = set_values(small()), set_values(small())
    scale = 1.0
    for axis, name in zip("ab", how, strict=True):
        ATTACH[name][0](module, axis)
        scale /= pmod.axis_size(axis) if ATTACH[name][1] else 1
    rank = pmod.current_mesh().topology.rank
    for step in range(2):
        back(module, data(rank + 10 * step))
        for r in range(pmod.current_mesh().size):
            back(plain, data(r + 10 * step))
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        same(p.grad, q.grad * scale, f"{how}", rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", list(itertools.product(ATTACH, ATTACH)), ids=" then ".join)
def test_two_axes(how: tuple[str, str]) -> None:
    for a, b in ((2, 2), (2, 1), (1, 1)):
        if a * b == 4 and how[0].startswith("data_parallel") and how[1].startswith("data_parallel"):
            continue
        pmod.simulate(two_axes_on_rank, how, a=a, b=b)


def unused_over_two_axes_on_rank(how: tuple[str, str]) -> None:
    module = set_values(Branches())
    for axis, name in zip("ab", how, strict=True):
        ATTACH[name][0](module, axis)
    back(module, data(pmod.current_mesh().topology.rank), "a")
    unused = [name for name, p in module.named_parameters() if p.grad is None]
    assert unused == ["b.weight", "b.bias", "c.weight", "c.bias"]


@pytest.mark.parametrize("how", list(itertools.product(ATTACH, ATTACH)), ids=" then ".join)
def test_unused_over_two_axes(how: tuple[str, str]) -> None:
    sizes = [(1, 1), (1, 2), (2, 1)]
    if not all(name.startswith("data_parallel") for name in how):
        sizes.append((2, 2))
    for a, b in sizes:
        pmod.simulate(unused_over_two_axes_on_rank, how, a=a, b=b)


def test_data_parallel_over_two_axes() -> None:
    def rank() -> str:
        module = pmod.data_parallel(small(), "a")
        with pytest.raises(pmod.PmodError) as raised:
            pmod.data_parallel(nn.Sequential(module), "b")
        return str(raised.value)

    assert pmod.simulate(rank, a=2, b=2)[1] == (
        "pmod.data_parallel(axis='b') at (a=0, b=1): the gradients of Sequential are reduced by data_parallel "
        "over 'a'.\nCall it once, for a tuple of axes."
    )


def test_one_rank() -> None:
    with pmod.set_mesh(pmod.make_mesh(x=1)):
        module = small()
        assert pmod.data_parallel(module, "x") is module
        assert not module._forward_hooks and not any(p._post_accumulate_grad_hooks for p in module.parameters())
        pmod.share_parameters(module, "x", reduce="mean")
        squared(module(data(0))).backward(create_graph=False)


WRONG: dict[str, tuple[Callable[[], Any], type[pmod.PmodError], str]] = {
    "no module": (
        lambda: pmod.share_parameters(torch.ones(1), "x"), pmod.ArgumentError,
        "pmod.share_parameters(axis='x') at (x=0): module is a Tensor.\nPass an nn.Module.",
    ),
    "no reduction": (
        lambda: pmod.data_parallel(small(), "x", reduce="max"), pmod.ArgumentError,
        "pmod.data_parallel(axis='x') at (x=0): reduce is 'max'.\nPass 'sum' or 'mean'.",
    ),
    "no axis": (
        lambda: pmod.replicate(small(), "y"), pmod.AxisError,
        "pmod.replicate(axis='y') at (x=0): no axis 'y'.\nThe mesh has {'x': 1}.",
    ),
    "no such rank": (
        lambda: pmod.replicate(small(), "x", src=1), pmod.AxisError,
        "pmod.replicate(axis='x') at (x=0): src is 1.\nPass an index along the axis, 0 to 0.",
    ),
    "no such rank for a tree": (
        lambda: pmod.replicate([torch.ones(1)], "x", src=-1), pmod.AxisError,
        "pmod.replicate(axis='x') at (x=0): src is -1.\nPass an index along the axis, 0 to 0.",
    ),
    "no tensor": (
        lambda: pmod.replicate({"a": 1.0}, "x"), pmod.ArgumentError,
        "pmod.replicate(axis='x') at (x=0): x is a float.\nPass a tensor, or a dict, list or tuple of them.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(what: str) -> None:
    call, kind, text = WRONG[what]
    with pmod.set_mesh(pmod.make_mesh(x=1)), pytest.raises(kind) as raised:
        call()
    assert type(raised.value) is kind and str(raised.value) == text


# --- training -----------------------------------------------------------------------------------------------------


def trained_on_rank(how: str, to_none: bool) -> None:
    """Steps of an optimiser with momentum and decay, gradients scaled and accumulated: every rank stays with one."""
    module, plain = set_values(Branches(), seed=pmod.axis_index("x")), set_values(Branches())
    attach, mean = ATTACH[how]
    attach(module, "x")
    n, rank = pmod.axis_size("x"), pmod.axis_index("x")

    def train(module: nn.Module, ranks: list[int], divisor: int) -> None:
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for step in range(4):
            for part, r in itertools.product(range(2), ranks):
                used = "abc"[(step + part + r) % 3]  # each rank its own, and now and then the same twice
                y = module(data(r + 10 * step + 100 * part), used)
                scaler.scale(squared(y) / divisor).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(module.parameters(), 3.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=to_none)

    train(module, [rank], 1)
    train(plain, list(range(n)), n if mean else 1)
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        same(p, q.detach(), f"{how} after four steps", rtol=1e-10)
        assert torch.equal(pmod.pick(p.detach(), "x"), p.detach())


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("how", ATTACH)
def test_training(how: str, to_none: bool) -> None:
    pmod.simulate(trained_on_rank, how, to_none, x=2)


def ddp_on_rank() -> None:
    """torch's own wrapper over the same group: the same gradients, and the same after steps."""
    mesh = pmod.current_mesh()
    rank = pmod.axis_index("x")
    ours, theirs = pmod.data_parallel(set_values(small()), "x"), set_values(small())
    shared = set_values(small())
    pmod.share_parameters(shared, "x", reduce="mean")
    wrapped = DistributedDataParallel(theirs, process_group=mesh.group("x"))
    modules = (theirs, ours, shared)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in modules]
    for step in range(3):
        for m, optimizer in zip((wrapped, ours, shared), optimizers, strict=True):
            optimizer.zero_grad()
            back(m, data(rank + 10 * step))
            optimizer.step()
        for m in modules[1:]:
            for p, q in zip(m.parameters(), theirs.parameters(), strict=True):
                same(p.grad, q.grad, f"step {step}: gradient", rtol=1e-12, atol=1e-12)
                same(p, q.detach(), f"step {step}: parameter", rtol=1e-12, atol=1e-12)


def test_as_ddp() -> None:
    spmd.launch(ddp_on_rank, x=2)


def compiled_on_rank() -> None:
    torch._dynamo.reset()
    rank = pmod.axis_index("x")
    for how in ATTACH:
        module = set_values(Outputs())
        ATTACH[how][0](module, "x")
        fast = torch.compile(module, backend="aot_eager", fullgraph=True)
        grads = []
        for m in (module, fast):
            module.zero_grad()
            for step in range(2):
                squared(m(data(rank + 10 * step), "dict")["y"]).backward()
            grads.append([p.grad for p in module.parameters()])
        for a, b in zip(*grads, strict=True):
            if a is None:
                assert b is None if how.startswith("data_parallel") else not b.any(), how
            else:
                same(b, a, f"{how}: gradient of the compiled module", rtol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
# hidden by torch, as far as warnings are not errors: it looks at what stands in for the parameters
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled() -> None:
    spmd.launch(compiled_on_rank, x=2)


# --- replicate ----------------------------------------------------------------------------------------------------


def replicated_on_rank() -> None:
    rank = pmod.axis_index("x")
    for src in range(2):
        module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), Tied())
        set_values(module, seed=rank)
        module[1].num_batches_tracked += 5 + rank
        module[0].weight.requires_grad_(False)
        before = list(module.parameters())
        assert pmod.replicate(module, "x", src=src) is module
        expected = set_values(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), Tied()), seed=src)
        assert all(p is q for p, q in zip(module.parameters(), before, strict=True))
        assert [p.requires_grad for p in module.parameters()] == [False] + [True] * (len(before) - 1)
        for p, q in zip(module.parameters(), expected.parameters(), strict=True):
            assert torch.equal(p, q)
        assert module[1].num_batches_tracked == 5 + src and module[2].copy.weight is module[2].down.weight

        leaf = torch.full((2,), float(rank), requires_grad=True)
        tree = {"p": nn.Parameter(leaf.detach().clone()), "t": (leaf, None, [torch.tensor(rank > 0)]), "y": leaf * 2}
        (out, sent) = counted(lambda tree=tree, src=src: pmod.replicate(tree, "x", src=src))
        assert {name for name, *_ in sent} == {"broadcast"} and len(sent) == 2
        assert type(out["p"]) is nn.Parameter and out["t"][1] is None
        assert out["p"].tolist() == out["t"][0].tolist() == [src, src] and out["y"].tolist() == [2 * src] * 2
        assert out["t"][2][0].item() is (src > 0)
        assert all(x.is_leaf and x.requires_grad for x in (out["p"], out["t"][0], out["y"]))
        out["t"][0].detach().add_(1)
        assert leaf.tolist() == [rank, rank] and out["p"].tolist() == [src, src]


def test_replicate(run: Any) -> None:
    run(replicated_on_rank, x=2)


def test_replicate_on_one_rank() -> None:
    with pmod.set_mesh(pmod.make_mesh(x=1)):
        x = torch.ones(2, requires_grad=True)
        y = pmod.replicate(x, "x")
        y.detach().add_(1)
        assert x.tolist() == [1, 1] and y.is_leaf and y.requires_grad
        assert pmod.replicate(None, "x") is None and pmod.replicate([], "x") == []


def test_a_gradient_that_is_asked_for_is_this_ranks_own() -> None:
    def run() -> list[list[float]]:
        layer = pmod.data_parallel(nn.Linear(1, 1, bias=False), "x", reduce="sum")
        x = torch.full((1, 1), 1.0 + pmod.axis_index("x"))
        (asked,) = torch.autograd.grad(layer(x).sum(), layer.weight)
        layer(x).sum().backward()
        return [asked.flatten().tolist(), layer.weight.grad.flatten().tolist()]

    assert pmod.simulate(run, x=2) == [[[1.0], [3.0]], [[2.0], [3.0]]]


@pytest.mark.parametrize("second", [("b", "a"), "a", ("a", "b")])
def test_ranks_that_are_reduced_over_twice_are_found_in_any_order(second: Any) -> None:
    def run() -> None:
        layer = nn.Linear(1, 1)
        pmod.share_parameters(layer, ("a", "b"))
        with pytest.raises(pmod.PmodError, match="are reduced over these ranks already"):
            pmod.share_parameters(layer, second)

    pmod.simulate(run, a=2, b=2)


# --- what changes after the call of data_parallel -----------------------------------------------------------------


def late_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def unfrozen(net: nn.Sequential, wrap: Callable[[nn.Module], Any]) -> None:
    net[0].requires_grad_(False)
    wrap(net)
    net[0].requires_grad_(True)


def all_unfrozen(net: nn.Sequential, wrap: Callable[[nn.Module], Any]) -> None:
    net.requires_grad_(False)
    wrap(net)
    net.requires_grad_(True)


def loaded(net: nn.Sequential, wrap: Callable[[nn.Module], Any]) -> None:
    wrap(net)
    net.load_state_dict(late_net().state_dict(), assign=True)


def replaced(net: nn.Sequential, wrap: Callable[[nn.Module], Any]) -> None:
    wrap(net)
    torch.manual_seed(1)
    net[2] = nn.Linear(3, 1).double()


def added(net: nn.Sequential, wrap: Callable[[nn.Module], Any]) -> None:
    wrap(net)
    torch.manual_seed(1)
    net.append(nn.Linear(1, 1).double())


def parametrized(net: nn.Sequential, wrap: Callable[[nn.Module], Any]) -> None:
    wrap(net)
    nn.utils.parametrizations.weight_norm(net[0])


def cast_there_and_back(net: nn.Sequential, wrap: Callable[[nn.Module], Any]) -> None:
    wrap(net)
    net(torch.ones(1, 4, dtype=torch.float64))
    net.float().double()


def data_replaced(net: nn.Sequential, wrap: Callable[[nn.Module], Any]) -> None:
    wrap(net.float())
    for p in net.parameters():
        p.data = p.data.double()


LATE = [unfrozen, all_unfrozen, loaded, replaced, added, parametrized, cast_there_and_back, data_replaced]


def late_gradients(net: nn.Module, x: Tensor) -> list[Tensor | None]:
    for _ in range(2):  # accumulated
        net(x).square().sum().backward()
    return [p.grad for p in net.parameters()]


def late_on_rank(reduce: Any) -> None:
    x = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(4, 4)
    n = pmod.axis_size("x")
    for change in LATE:
        plain, parallel = late_net(), late_net()
        change(plain, lambda module: module)
        change(parallel, lambda module: pmod.data_parallel(module, "x", reduce=reduce))
        expected = late_gradients(plain, x)
        for got, whole in zip(late_gradients(parallel, pmod.shard(x, "x")), expected, strict=True):
            assert got is not None and whole is not None, change.__name__
            same(got, whole if reduce == "sum" else whole / n, change.__name__)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_what_changes_after_data_parallel(run: Any, reduce: str) -> None:
    run(late_on_rank, reduce, x=2)


def unlike_values_on_rank() -> None:
    """The values of a new parameter are made equal, as those of the first ones were."""
    net = pmod.data_parallel(late_net(), "x")
    net[2] = nn.Linear(3, 1).double()
    with torch.no_grad():
        net[2].weight.fill_(float(pmod.axis_index("x")))
    net(torch.ones(1, 4, dtype=torch.float64))
    assert net[2].weight.eq(0).all()


def test_new_parameters_are_made_equal(run: Any) -> None:
    run(unlike_values_on_rank, x=2)


def between_on_rank() -> None:
    """A change between the call and backward raises, where nobody would find it."""
    x = torch.ones(1, 4, dtype=torch.float64)
    net = pmod.data_parallel(late_net(), "x", reduce="sum")
    y = net(x).sum()
    net.float().double()
    with pytest.raises(pmod.PmodError, match="moved to another dtype"):
        (y + sum(p.sum() for p in net.parameters())).backward()
    net = late_net()
    net[0].requires_grad_(False)
    y = pmod.data_parallel(net, "x")(x).sum()
    net[0].requires_grad_(True)
    with pytest.raises(pmod.PmodError, match="unfrozen"):
        (y + net[0].weight.sum()).backward()


def test_a_change_before_backward_raises(run: Any) -> None:
    run(between_on_rank, x=2)


def views_on_rank() -> None:
    """Gradients that are parts of a buffer stay parts of it."""
    net = pmod.data_parallel(nn.Linear(2, 1, bias=False, dtype=torch.float64), "x")
    flat = torch.zeros(2, dtype=torch.float64)
    net.weight.grad = flat.view(1, 2)
    net(torch.full((1, 2), 1.0 + pmod.axis_index("x"), dtype=torch.float64)).sum().backward()
    assert flat.tolist() == [1.5, 1.5] and net.weight.grad.data_ptr() == flat.data_ptr()


def test_gradients_stay_in_a_buffer_of_the_user(run: Any) -> None:
    run(views_on_rank, x=2)


class Grows(nn.Module):
    """Makes a parameter in its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "scale"):
            self.scale = nn.Parameter(torch.ones(3, dtype=DOUBLE))
        return self.first(x) * self.scale


def frozen_late_net(parts: slice) -> nn.Sequential:
    net = late_net()
    net[parts].requires_grad_(False)
    net = pmod.data_parallel(net, "x")
    net.requires_grad_(True)
    return net


def unseen_on_rank(whole: bool) -> None:
    """What no call of the module has found: a submodule alone, a parameter made in forward."""
    x = pmod.axis_index("x") + torch.ones(1, 4, dtype=DOUBLE)
    net = frozen_late_net(slice(0, 3 if whole else 1))
    with pytest.raises(pmod.PmodError, match="unfrozen after the last call"):
        net[0](x).sum().backward()
    grows = pmod.data_parallel(Grows(), "x")
    with pytest.raises(pmod.PmodError, match="scale became a parameter"):
        grows(x).sum().backward()
    grows.zero_grad()
    grows(x).sum().backward()
    same(pmod.pick(grows.scale.grad, "x"), grows.scale.grad, "the next call has found it")
    net[2] = nn.LazyLinear(1, dtype=DOUBLE)
    with pytest.raises(pmod.ArgumentError, match="has no shape yet"):
        net(x)
    with torch.no_grad():
        net(x)
    net.zero_grad()
    net(x).sum().backward()
    same(pmod.pick(net[2].weight.grad, "x"), net[2].weight.grad, "a lazy layer")


def used_alone_on_rank(how: str) -> None:
    """A new part of the module, with nothing else of it in the loss."""
    x = pmod.axis_index("x") + torch.ones(1, 3, dtype=DOUBLE)
    net = pmod.data_parallel(nn.Sequential(nn.Linear(3, 3), nn.Sequential()).double(), "x")
    new = nn.Linear(3, 1, dtype=DOUBLE)
    if how == "frozen":
        new.requires_grad_(False)
    elif how == "inside":
        new = nn.Sequential(nn.Sequential(), new)
    elif how == "lazy":
        new = nn.LazyLinear(1, dtype=DOUBLE)
    if how == "parameter":
        net[1].scale = nn.Parameter(torch.ones(3, dtype=DOUBLE))
    elif how == "later":
        net[1].append(nn.Sequential())
        net[1][0].append(new)
    else:
        net[1].append(new)
    if how == "frozen":
        new.requires_grad_(True)
    name = {"parameter": "1.scale", "later": "1.0.0.weight", "inside": "1.0.1.weight"}.get(how, "1.0.weight")
    weight = net.get_parameter(name)
    with pytest.raises(pmod.PmodError, match="became a parameter after the last call of the module") as raised:
        ((x * weight).sum() if how == "parameter" else new(x).sum()).backward()
    assert re.search(r": 1\.\S+ became", str(raised.value))
    net.zero_grad()
    (net(x).sum() * weight.sum()).backward()
    same(pmod.pick(weight.grad, "x"), weight.grad, "the next call has found it")
    # another module's parts are its own, and so are those of one that is let go
    nn.Sequential(nn.Linear(3, 1, dtype=DOUBLE))(x).sum().backward()
    pmod.remove_data_parallel(net).append(new := nn.Linear(3, 1, dtype=DOUBLE))
    new(x).sum().backward()


@pytest.mark.parametrize("how", ["module", "parameter", "frozen", "inside", "later", "lazy"])
def test_a_new_part_used_alone_raises(run: Any, how: str) -> None:
    run(used_alone_on_rank, how, x=2)


def test_registrations_are_seen_by_what_lives() -> None:
    """A copy sees its own, and nothing is left of what nobody refers to."""
    hooks = torch.nn.modules.module._global_parameter_registration_hooks
    before = len(hooks)

    def rank() -> None:
        net = pmod.data_parallel(nn.Linear(1, 1), "x")
        copied = copy.deepcopy(net)
        copied.scale = nn.Parameter(torch.ones(1))
        with pytest.raises(pmod.PmodError, match="scale became a parameter"):
            copied.scale.sum().backward()
        for module in (net, copied):
            pmod.remove_data_parallel(module)

    pmod.simulate(rank, x=2)
    assert len(hooks) == before


@pytest.mark.parametrize("whole", [True, False])
def test_what_no_call_has_found_raises(run: Any, whole: bool) -> None:
    run(unseen_on_rank, whole, x=2)


def compiled_late_on_rank() -> None:
    """Compiled code does not look for changes: backward does, and one call of the module itself finds them."""
    x = pmod.axis_index("x") + torch.ones(1, 4, dtype=DOUBLE)
    for whole in (True, False):
        torch._dynamo.reset()
        net = late_net()
        net[: 3 if whole else 1].requires_grad_(False)
        net = pmod.data_parallel(net, "x")
        fast = torch.compile(net, backend="aot_eager")
        fast(x.clone().requires_grad_()).sum().backward()
        net.requires_grad_(True)
        with pytest.raises(pmod.PmodError, match="unfrozen after the last call"):
            fast(x).sum().backward()
        net.zero_grad()
        net(x)
        fast(x).sum().backward()
        same(pmod.pick(net[0].weight.grad, "x"), net[0].weight.grad, "unfrozen")
        net[2] = nn.Linear(3, 1, dtype=DOUBLE)
        with pytest.raises(pmod.PmodError, match=r"2\.weight became a parameter"):
            fast(x).sum().backward()
        net.zero_grad()
        net(x)
        fast(x).sum().backward()
        same(pmod.pick(net[2].weight.grad, "x"), net[2].weight.grad, "a new head")


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_changes_that_compiled_code_does_not_see() -> None:
    spmd.launch(compiled_late_on_rank, x=2)


def reduced_parts_on_rank() -> str:
    """A part that is reduced by itself would be reduced twice: a sum would be n times as large."""
    net = pmod.data_parallel(late_net(), "x", reduce="sum")
    net[2] = pmod.data_parallel(nn.Linear(3, 1).double(), "x", reduce="sum")
    with pytest.raises(pmod.PmodError) as raised:
        net(torch.ones(1, 4, dtype=DOUBLE))
    return str(raised.value)


def test_a_new_part_that_is_reduced_already(run: Any) -> None:
    for rank, text in enumerate(run(reduced_parts_on_rank, x=2)):
        assert text == (
            f"pmod.data_parallel(axis='x') at (x={rank}): the gradients of Linear are reduced over these ranks already."
            "\nA second reduction would count them n times."
        )


def functional_on_rank() -> None:
    """A functional_call with tensors of the user's is no change of the module: they stay, and nothing is sent."""
    net, x = pmod.data_parallel(late_net(), "x"), torch.ones(1, 4, dtype=DOUBLE)
    mine = {k: torch.full_like(p, pmod.axis_index("x")).requires_grad_() for k, p in net.named_parameters()}
    _, sent = counted(lambda: functional_call(net, mine, x))
    assert not sent and all(p.eq(pmod.axis_index("x")).all() for p in mine.values())


def test_functional_calls_change_nothing(run: Any) -> None:
    run(functional_on_rank, x=2)


def harmless_on_rank() -> None:
    """A change between the call and backward is none of backward's business where no gradient comes to it."""
    net = pmod.data_parallel(late_net(), "x")
    net.requires_grad_(False)
    y = net(torch.ones(1, 4, dtype=DOUBLE).requires_grad_()).sum()
    net.requires_grad_(True)
    y.backward()  # as a generator's step through a frozen discriminator
    assert all(p.grad is None for p in net.parameters())
    y = net(pmod.axis_index("x") + torch.ones(1, 4, dtype=DOUBLE)).sum()
    net.append(nn.Linear(1, 1, dtype=DOUBLE))
    y.backward()
    same(pmod.pick(net[0].weight.grad, "x"), net[0].weight.grad, "gradient")
    assert net[3].weight.grad is None


def test_changes_that_do_not_count(run: Any) -> None:
    run(harmless_on_rank, x=2)


class Alternating(nn.Module):
    """Dtypes that alternate: each layer is in a bucket of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 3, dtype=DOUBLE), nn.Linear(3, 1, dtype=DOUBLE)
        self.middle = nn.Linear(3, 3)
        self._modules = {name: self._modules[name] for name in ("first", "middle", "last")}

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x).float()).double())


def one_buffer_on_rank(reduce: Any) -> None:
    """Parts of one buffer, which autograd counts as one tensor, in several buckets and passes."""
    x = torch.linspace(-1, 1, 24, dtype=DOUBLE).reshape(6, 4)
    net, plain = pmod.data_parallel(set_values(Alternating()), "x", reduce=reduce), set_values(Alternating())
    parts = [*net.first.parameters(), *net.last.parameters()]
    flat = torch.zeros(sum(p.numel() for p in parts), dtype=DOUBLE)
    for p, part in zip(parts, flat.split([p.numel() for p in parts]), strict=True):
        p.grad = part.view_as(p)
    for _ in range(2):
        net(pmod.shard(x, "x")).square().sum().backward()
        plain(x).square().sum().backward()
    whole = torch.cat([p.grad.flatten() for p in (*plain.first.parameters(), *plain.last.parameters())])
    n = 1 if reduce == "sum" else pmod.axis_size("x")
    same(flat, whole / n, "the buffer", rtol=1e-5)
    net.zero_grad(set_to_none=False)
    net(pmod.shard(x, "x")).square().sum().backward()
    same(flat, whole / n / 2, "the buffer, from 0", rtol=1e-5)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_one_buffer_for_several_buckets(run: Any, reduce: str) -> None:
    run(one_buffer_on_rank, reduce, x=3)


def taken_off_on_rank(reduce: Any) -> None:
    rank, x = pmod.axis_index("x"), torch.ones(1, 4, dtype=DOUBLE)
    module = pmod.data_parallel(late_net(), "x", reduce=reduce)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module]
    for net in copies:
        y = net(x).sum()
        assert pmod.remove_data_parallel(net) is net
        with pytest.raises(pmod.PmodError, match="between the call of the module and backward"):
            y.backward()
        assert not net._forward_hooks and not net._forward_pre_hooks
        net.zero_grad()
        _, sent = counted(lambda net=net: net(rank + x).sum().backward())
        plain = late_net()
        plain(rank + x).sum().backward()
        assert not sent
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            same(p.grad, q.grad, "its own gradient", rtol=0, atol=0)
    net.zero_grad()
    pmod.data_parallel(net, "x")(rank + x).sum().backward()
    same(pmod.pick(net[0].weight.grad, "x"), net[0].weight.grad, "attached again")


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_remove_data_parallel(run: Any, reduce: str) -> None:
    run(taken_off_on_rank, reduce, x=2)


def test_remove_data_parallel_where_there_is_none() -> None:
    module = small()
    assert pmod.remove_data_parallel(module) is module


def without_gradient_on_rank() -> None:
    layer = nn.Linear(2, 1)
    layer.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    model = pmod.data_parallel(layer, "x")
    with pytest.raises(pmod.PmodError, match="a hook took a gradient away before it was reduced"):
        model(torch.ones(3, 2)).sum().backward()


def test_a_hook_that_takes_the_gradient_away() -> None:
    pmod.simulate(without_gradient_on_rank, x=2)
