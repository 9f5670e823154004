"""Programs around and within domain_parallel: checkpoints, transforms, hooks, the compiler, what goes in and out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import pmod
from pmod import P
from pmod._torch import uncompiled
from tests.lib.fields import Cutting, cuttings, held_to, joined, number, on_all
from tests.lib.listening import counted, heard, on_processes, on_threads

Tensor = torch.Tensor
CUTTINGS = cuttings(8, 6)
UNEVEN, BOTH = CUTTINGS["uneven"], CUTTINGS["both"]
EVEN = Cutting({"lat": 2}, {2: ("lat", (4, 4))})

Run = Callable[..., list[Any]]


def field(*shape: int) -> Tensor:
    size = shape or (2, 3, 8, 6)
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolutions, a norm and a skip, of which the middle may be checkpointed."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.first = nn.Conv2d(3, 4, 3, padding=1).double()
        self.middle = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU()).double()
        self.last = nn.Conv2d(4, 2, 1).double()

    def inner(self, x: Tensor) -> Tensor:
        return self.middle(x) * x.shape[2] + x.mean((2, 3), keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.kind == "plain":
            return self.last(self.inner(x) + x)
        y: Any = checkpoint(self.inner, x, use_reentrant=self.kind == "reentrant")
        return self.last(y + x)


def trained(net: Any, module: nn.Module, x: Tensor) -> list[Tensor]:
    y = net(x)
    loss = pmod.domain_parallel(number, P())(y) if pmod.cut_of(y).axes else number(y)
    loss.backward()
    return [p.grad for p in module.parameters()]


def gradients(module: nn.Module, x: Tensor) -> list[Any]:
    number(module(x)).backward()
    return [p.grad for p in module.parameters()]


def alike(found: list[Any], wanted: list[Any]) -> None:
    assert len(found) == len(wanted)
    for y, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def train(kind: str, cutting: Cutting) -> None:
    whole, module = Net(), Net(kind)
    x = field().requires_grad_()
    wanted = gradients(whole, x)
    ours = cutting.block(x)
    net = pmod.domain_parallel(module, cutting.spec, sizes=cutting.sizes)
    alike(trained(net, module, ours), wanted)
    assert x.grad is not None and ours.grad is not None
    alike([joined(ours.grad, pmod.cut_of(ours))], [x.grad])


@pytest.mark.parametrize("kind", ["plain", "reentrant", "not reentrant"])
@pytest.mark.parametrize("cutting", CUTTINGS)
def test_checkpoints(kind: str, cutting: str) -> None:
    """What runs again in backward runs on blocks again; a loss outside of the call is one within another."""
    on_all(train, CUTTINGS[cutting], kind, CUTTINGS[cutting])


@pytest.mark.parametrize("kind", ["plain", "reentrant", "not reentrant"])
def test_trained_on_processes(kind: str) -> None:
    on_processes(train, kind, UNEVEN, **UNEVEN.mesh)


def second_order(cutting: Cutting) -> None:
    module = Net("not reentrant")
    held_to(module, field(), cutting, list(module.parameters()))


def test_second_order_of_a_checkpoint() -> None:
    on_all(second_order, BOTH, BOTH)


# --- what parameters cost -----------------------------------------------------------------------------------------


def costs() -> tuple[list[Any], list[Any], list[Any]]:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU(), nn.Conv2d(4, 4, 1)).double()
    net = pmod.domain_parallel(module, EVEN.spec, sizes=EVEN.sizes)
    x = EVEN.block(field())
    loss, forward = counted(lambda: pmod.psum(net(x).sum() + net(x * 2).sum(), "lat"))
    _, backward = counted(loss.backward)
    _, exchanged = counted(lambda: pmod.domain_parallel(module, EVEN.spec)(x.clone()))
    return forward, backward, exchanged


def test_gradients_are_summed_once_for_all_calls(run: Run) -> None:
    for forward, backward, exchanged in run(costs, lat=2):
        assert len(forward) == 1, "the loss"
        assert len(backward) == 1, "all parameters of both calls, together"
        assert len(exchanged) == 1, "the lengths"


def unused() -> Any:
    module = nn.ModuleDict({"used": nn.Linear(6, 6), "not": nn.Linear(6, 6)}).double()
    net = pmod.domain_parallel(lambda x: module["used"](x).sum(), P("lat"))
    net(field(3, 6)).backward()
    return [p.grad is None for p in module.parameters()]


def test_what_nobody_uses_gets_no_gradient() -> None:
    assert pmod.simulate(unused, lat=2) == [[False, False, True, True]] * 2


def accumulated(cutting: Cutting) -> None:
    whole, module = Net(), Net()
    for seed in (1.0, 2.0):
        number(whole(field() * seed)).backward()
    net = pmod.domain_parallel(module, cutting.spec, sizes=cutting.sizes)
    for seed in (1.0, 2.0):
        trained(net, module, cutting.block(field() * seed))
    alike([p.grad for p in module.parameters()], [p.grad for p in whole.parameters()])
    # the copies are new once the parameters are
    for p, q in zip(module.parameters(), whole.parameters(), strict=True):
        p.grad = q.grad = None
        with torch.no_grad():
            p += 1
            q += 1
    alike(trained(net, module, cutting.block(field())), gradients(whole, field()))


def test_accumulated_and_changed() -> None:
    on_all(accumulated, BOTH, BOTH)


def one_value_of_some(cutting: Cutting) -> None:
    """A parameter that is used on blocks and on one value, whose gradient has both parts, each once."""

    def f(x: Tensor, time: Tensor) -> Tensor:
        embedded = lin(time).tanh()
        return lin(x * embedded[:, None, None]).sum() + embedded.square().sum() + lin(x.mean(2)).square().sum()

    lin = nn.Linear(6, 6).double()
    time = field(3, 6)
    x = field(2, 3, 8, 6)
    wanted = torch.autograd.grad(f(x, time[:2]), list(lin.parameters()))
    net = pmod.domain_parallel(f, (cutting.spec, P()), sizes=cutting.sizes)
    found = torch.autograd.grad(net(cutting.block(x), time[:2]), list(lin.parameters()))
    alike(list(found), list(wanted))


@pytest.mark.parametrize("cutting", ["uneven", "empty"])
def test_parameters_on_one_value_and_on_blocks(cutting: str) -> None:
    on_all(one_value_of_some, CUTTINGS[cutting], CUTTINGS[cutting])


# --- transforms ---------------------------------------------------------------------------------------------------


def transforms(cutting: Cutting) -> None:
    module = Net()
    params = {name: p.detach() for name, p in module.named_parameters()}

    def loss(params: Any, x: Tensor) -> Tensor:
        return number(functional_call(module, params, (x,)))

    x, tangent = field(), field().flip(3)
    ours, moved = cutting.block(x), cutting.block(tangent)
    net = pmod.domain_parallel(loss, (P(), cutting.spec), sizes=cutting.sizes)
    spec = P(*cutting.spec, sizes=cutting.sizes)
    wanted, found = grad(loss)(params, x), grad(net)(params, ours)
    alike([found[name] for name in params], [wanted[name] for name in params])
    alike([joined(grad(net, 1)(params, ours), spec)], [grad(loss, 1)(params, x)])
    outs = jvp(lambda x: net(params, x), (ours,), (moved,))
    alike(list(outs), list(jvp(lambda x: loss(params, x), (x,), (tangent,))))
    value, pull = vjp(lambda x: net(params, x), ours)
    pulled = vjp(lambda x: loss(params, x), x)[1](torch.ones_like(value))
    alike([joined(pull(torch.ones_like(value))[0], spec)], [pulled[0]])


def test_transforms_around() -> None:
    on_all(transforms, UNEVEN, UNEVEN)


def mapped(cutting: Cutting) -> None:
    module = Net()
    xs = torch.stack([field(), field() * 2])
    ours = torch.stack([cutting.block(x) for x in xs])
    net = pmod.domain_parallel(module, cutting.spec, sizes=cutting.sizes)
    y = vmap(net)(ours)
    parts = [joined(of, P(*cutting.spec, sizes=cutting.sizes)) for of in y]
    alike([torch.stack(parts)], [vmap(module)(xs)])


def test_vmap_around() -> None:
    on_all(mapped, UNEVEN, UNEVEN)


def within(cutting: Cutting) -> None:
    """A program that differentiates by itself: an energy's force, a physics loss, a hessian of one value."""

    def energy(x: Tensor) -> Tensor:
        return (x.square() * x.roll(1, 2)).sum() * x.shape[2]

    def f(x: Tensor) -> Tensor:
        force = grad(energy)(x)
        y = x.sin().sum((2, 3), keepdim=True) * x
        (by_autograd,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        curved = hessian(lambda w: (w**3).sum())(x.mean((2, 3))[0])
        return force + by_autograd * x + curved.sum()

    held_to(f, field(), cutting, [])


def test_transforms_within() -> None:
    on_all(within, BOTH, BOTH)


def vmap_within() -> None:
    net = pmod.domain_parallel(lambda x: vmap(lambda row: row * row.shape[-1])(x), EVEN.spec, sizes=EVEN.sizes)
    with pytest.raises(pmod.PmodError, match="vmap"):
        net(EVEN.block(field()))


def test_vmap_of_a_block_within_is_refused() -> None:
    on_all(vmap_within, EVEN)


def test_jacobians() -> None:
    """As the README says of jacrev: each rank's row seeds all, so a whole result that is one value has its own."""

    def of_blocks() -> None:
        f = pmod.domain_parallel(lambda x: (x * x.roll(1, 0)).sum(0), P("lat"))
        x = field(5, 2)
        sizes = pmod.split_sizes(5, 2)
        own = x.split(list(sizes))[pmod.axis_index("lat")].clone()
        found = jacrev(f)(own)
        wanted = jacrev(lambda x: (x * x.roll(1, 0)).sum(0))(x)
        alike([joined(found, P(None, "lat", sizes={1: sizes}))], [wanted])

    pmod.simulate(of_blocks, lat=2)


# --- hooks --------------------------------------------------------------------------------------------------------


def hooks(cutting: Cutting) -> None:
    def f(x: Tensor) -> Tensor:
        y = x.sin()
        y.register_hook(lambda g: g * g.shape[2] + g.mean((2, 3), keepdim=True))
        return y * x

    held_to(f, field(), cutting, [])


def test_tensor_hooks_see_the_whole() -> None:
    on_all(hooks, BOTH, BOTH)


def module_hooks() -> None:
    module = Net()
    module.middle.register_full_backward_hook(lambda *_: None)
    net = pmod.domain_parallel(module, EVEN.spec, sizes=EVEN.sizes)
    with pytest.raises(pmod.PmodError, match="BackwardHookFunction"):
        net(EVEN.block(field().requires_grad_()))


def test_backward_hooks_of_modules_are_refused() -> None:
    on_all(module_hooks, EVEN)


# --- random numbers -----------------------------------------------------------------------------------------------


def dropped(cutting: Cutting, kind: str = "plain") -> tuple[Tensor, Tensor]:
    torch.manual_seed(pmod.axis_index(tuple(cutting.mesh)))  # only the first rank's counts

    def block(x: Tensor) -> Tensor:
        return F.dropout(x, 0.5) * F.dropout2d(x, 0.3) + torch.rand_like(x) + torch.randn(x.shape, dtype=x.dtype)

    def f(x: Tensor) -> Tensor:
        if kind == "plain":
            return block(x)
        y: Any = checkpoint(block, x, use_reentrant=kind == "reentrant")
        return y

    x = field().requires_grad_()
    ours = cutting.block(x)
    y = pmod.domain_parallel(f, cutting.spec, sizes=cutting.sizes)(ours)
    (g,) = torch.autograd.grad(y.sum(), ours) if kind != "reentrant" else (_backward(y, ours),)
    return joined(y, pmod.cut_of(y)), joined(g, pmod.cut_of(ours))


def _backward(y: Tensor, x: Tensor) -> Tensor:
    y.sum().backward()
    assert x.grad is not None
    return x.grad


def test_draws_do_not_depend_on_the_cut() -> None:
    one = Cutting({"lat": 1}, {2: ("lat", (8,))})
    ((wanted, by_x),) = on_all(dropped, one, one)
    assert (by_x == 0).double().mean() > 0.2 and len(by_x.unique()) > 2
    for cutting in CUTTINGS.values():
        for found in on_all(dropped, cutting, cutting):
            alike(list(found), [wanted, by_x])
    for kind in ("reentrant", "not reentrant"):
        for found in on_all(dropped, BOTH, BOTH, kind):
            alike(list(found), [wanted, by_x])


def drawn() -> list[Tensor]:
    def f(x: Tensor) -> list[Tensor]:
        kept = F.dropout(torch.ones_like(x), 0.25)
        return [kept, torch.rand_like(x), torch.randn_like(x), torch.bernoulli(torch.full_like(x, 0.1)),
                x.new_empty((2, 1, 1)).bernoulli_(0.5), torch.randint(9, (4,)), torch.randperm(5)]  # fmt: skip

    x = field(2, 64, 64)
    net = pmod.domain_parallel(f, P(None, "lat"))
    y = net(x.chunk(2, 1)[pmod.axis_index("lat")])
    again = net(x.chunk(2, 1)[pmod.axis_index("lat")])
    assert not torch.equal(y[1], again[1]), "a call draws anew"
    return [joined(of, pmod.cut_of(of)) for of in y]


def test_what_is_drawn() -> None:
    first, second = pmod.simulate(drawn, lat=2)
    alike(first, second)
    kept, uniform, normal, few, _, ints, order = first
    assert set(kept.unique().tolist()) == {0.0, 4 / 3} and abs(kept.mean() - 1) < 0.03
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.02
    assert abs(uniform.var() - 1 / 12) < 0.005 and len(uniform.unique()) == uniform.numel()
    assert abs(normal.mean()) < 0.04 and abs(normal.std() - 1) < 0.03
    assert abs(few.mean() - 0.1) < 0.02 and ints.max() < 9 and sorted(order.tolist()) == list(range(5))


# --- running statistics, state, dtypes ----------------------------------------------------------------------------


def statistics(cutting: Cutting) -> None:
    for make in (lambda: nn.BatchNorm2d(3), lambda: nn.InstanceNorm2d(3, track_running_stats=True)):
        whole, ours = make().double(), make().double()
        net = pmod.domain_parallel(ours, cutting.spec, sizes=cutting.sizes)
        for step in range(2):
            whole(field() + step)
            net(cutting.block(field() + step))
        alike([*ours.buffers()], [*whole.buffers()])
        y = net.eval()(cutting.block(field()))
        alike([joined(y, pmod.cut_of(y))], [whole.eval()(field())])


@pytest.mark.parametrize("cutting", CUTTINGS)
def test_running_statistics(cutting: str) -> None:
    on_all(statistics, CUTTINGS[cutting], CUTTINGS[cutting])


class Memory(nn.Module):
    """A recurrent cell that keeps its state between calls, and a constant that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Tensor | None = None
        self.scale = torch.tensor(2.0, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.state = x if self.state is None else (self.state.roll(1, 2) + x) * self.scale
        return self.state * x.shape[2]


def kept(cutting: Cutting) -> None:
    whole, module = Memory(), Memory()
    net = pmod.domain_parallel(module, cutting.spec, sizes=cutting.sizes)
    for step in range(3):
        wanted, found = whole(field() + step), net(cutting.block(field() + step))
    alike([joined(found, pmod.cut_of(found))], [wanted])


def test_state_between_calls() -> None:
    on_all(kept, BOTH, BOTH)


def halves(cutting: Cutting) -> None:
    module = Net().float()
    net = pmod.domain_parallel(module, cutting.spec, sizes=cutting.sizes)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = module(field().float())
        y = net(cutting.block(field().float()))
    assert y.dtype == wanted.dtype
    torch.testing.assert_close(joined(y, pmod.cut_of(y)), wanted, rtol=0.05, atol=0.1)


def test_autocast() -> None:
    on_all(halves, BOTH, BOTH)


# --- the compiler -------------------------------------------------------------------------------------------------


def by_shape(x: Tensor) -> Tensor:
    return x * x.shape[2] + x.roll(1, 2)


def compiled(kind: str) -> None:
    if kind in ("around", "whole graph"):
        net: Any = torch.compile(pmod.domain_parallel(by_shape, UNEVEN.spec, sizes=UNEVEN.sizes), backend="aot_eager",
                                 fullgraph=kind == "whole graph")
    elif kind == "a step":
        inner = pmod.domain_parallel(by_shape, UNEVEN.spec, sizes=UNEVEN.sizes)
        net = torch.compile(lambda x: inner(x + 0) * 1, backend="aot_eager")
    else:
        net = pmod.domain_parallel(torch.compile(by_shape, backend="aot_eager"), UNEVEN.spec, sizes=UNEVEN.sizes)
    y = net(UNEVEN.block(field()))
    alike([joined(y, P(*UNEVEN.spec, sizes=UNEVEN.sizes))], [by_shape(field())])


@pytest.mark.parametrize("kind", ["around", "whole graph", "a step", "within"])
def test_compiled_code_is_right(kind: str) -> None:
    """The parts that domain_parallel follows run as they are written."""
    on_processes(compiled, kind, **UNEVEN.mesh)




# --- what goes in and comes out -----------------------------------------------------------------------------------


def outputs() -> None:
    def f(x: Tensor, factor: float, *, names: Any) -> Any:
        return {"y": x * factor, "mean": x.mean(), "twice": (x.repeat_interleave(2, 2), names["a"])}

    net = pmod.domain_parallel(f, (UNEVEN.spec, P()), sizes=UNEVEN.sizes)
    y = net(UNEVEN.block(field()), 2.0, names={"a": torch.ones(2)})
    assert pmod.cut_of(y["y"]) == P(None, None, "lat", None, sizes={2: (2, 6)})
    assert pmod.cut_of(y["mean"]) == P() and pmod.cut_of(y["twice"][1]) == P()
    assert pmod.cut_of(y["twice"][0]) == P(None, None, "lat", None, sizes={2: (4, 12)})
    # the next call knows it, whatever its own sizes are
    z = pmod.domain_parallel(by_shape, UNEVEN.spec)(y["twice"][0])
    alike([joined(z, pmod.cut_of(z))], [by_shape((field() * 1).repeat_interleave(2, 2))])
    # one inside of another is part of its program
    inner = pmod.domain_parallel(by_shape, P())
    w = pmod.domain_parallel(lambda x: inner(x).mean(), UNEVEN.spec)(y["y"])
    alike([w], [by_shape(field() * 2).mean()])


def test_what_goes_in_and_comes_out() -> None:
    on_all(outputs, UNEVEN)


def by_names() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor, time: Tensor, mask: Tensor | None = None) -> Tensor:
            return x * time[:, None, None, None] if mask is None else x * mask

    net = pmod.domain_parallel(Named(), {"x": UNEVEN.spec, "mask": P("lat")})
    mask = field(8, 6)
    y = net(UNEVEN.block(field()), torch.ones(2), mask=mask.split([2, 6])[pmod.axis_index("lat")])
    alike([joined(y, pmod.cut_of(y))], [field() * mask])
    y = net(UNEVEN.block(field()), time=field(2), mask=mask.split([2, 6])[pmod.axis_index("lat")])
    with pytest.raises(pmod.ArgumentError, match="in_specs names 'mask', which the call does not pass"):
        net(UNEVEN.block(field()), field(2))


def test_specs_by_name() -> None:
    on_all(by_names, UNEVEN)


WRONG: dict[str, tuple[Any, Any, str]] = {
    "a spec of too many dims": (P(None, None, None, None, "lat"), {}, "the spec has 5 entries"),
    "an axis that is not there": (P("lot"), {}, "no axis 'lot'; did you mean 'lat'"),
    "sizes of another rank count": (P("lat"), {0: (1, 1, 1)}, r"sizes of dim 0 are \(1, 1, 1\)"),
    "sizes that are not this rank's": (P("lat"), {0: (5, 5)}, r"sizes of dim 0 are \(5, 5\) and in_specs\[0\] is"),
    "sizes that are no sizes": (P("lat"), {0: "ab"}, "sizes is"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    spec, sizes, words = WRONG[name]

    def wrong() -> None:
        with pytest.raises(pmod.PmodError, match=words):
            pmod.domain_parallel(torch.relu, spec, sizes=sizes or None)(field())

    pmod.simulate(wrong, lat=2)


def test_more_wrong_arguments() -> None:
    def unlike() -> None:
        shape = (2, 3) if pmod.axis_index("lat") else (2, 4)
        with pytest.raises(pmod.ShapeError, match="Blocks along an axis differ in the dim that it cuts, 0, alone"):
            pmod.domain_parallel(torch.relu, P("lat"))(torch.ones(shape))
        with pytest.raises(pmod.ArgumentError, match="that no domain_parallel took or returned"):
            pmod.cut_of(torch.ones(2) + 1)
        with pytest.raises(pmod.ArgumentError, match="no argument is cut"):
            pmod.domain_parallel(torch.relu, P())(torch.ones(2))
        with pytest.raises(pmod.ArgumentError, match="model is a int"):
            pmod.domain_parallel(3, P())  # pyright: ignore

    pmod.simulate(unlike, lat=2)


def test_one_rank() -> None:
    """As everywhere: the same code, no message."""

    def alone() -> None:
        net = pmod.domain_parallel(Net(), P(None, None, "lat", "lon"))
        y, sent = counted(lambda: net(field()))
        assert not sent
        alike([y], [Net()(field())])

    on_threads(alone, lat=1, lon=1)
    heard(lambda: None)


# --- together with the rest of pmod -------------------------------------------------------------------------------


def beside_data() -> None:
    """Two batches, each cut over two ranks: gradients are averaged over the batches."""
    whole, module = Net(), Net()
    batches = [field(), field() * 2]
    losses = torch.stack([number(whole(x)) for x in batches])
    wanted = torch.autograd.grad(losses.mean(), list(whole.parameters()))
    net = pmod.domain_parallel(pmod.data_parallel(module, "data"), EVEN.spec, sizes=EVEN.sizes)
    trained(net, module, EVEN.block(batches[pmod.axis_index("data")]))
    alike([p.grad for p in module.parameters()], list(wanted))


def test_beside_data_parallel(run: Run) -> None:
    run(beside_data, data=2, lat=2)


def tensor_parallel() -> None:
    """A collective of the model's own goes along another axis."""
    weight = field(6, 4)

    def f(x: Tensor, w: Tensor) -> Tensor:
        return pmod.psum(torch.tanh(x @ w) @ w.mT, "model") * x.shape[2]

    ours = weight.chunk(2, 1)[pmod.axis_index("model")]
    net = pmod.domain_parallel(f, (EVEN.spec, P()), sizes=EVEN.sizes)
    x = field().requires_grad_()
    block = EVEN.block(x)
    y = net(pmod.pvary(block, "model"), ours)
    alike([joined(y, pmod.cut_of(y))], [torch.tanh(x @ weight) @ weight.mT * 8])
    with pytest.raises(pmod.PmodError, match="all_gather: it changes a block's shape"):
        pmod.domain_parallel(lambda x: pmod.all_gather(x, "model"), EVEN.spec, sizes=EVEN.sizes)(EVEN.block(x))


def test_beside_tensor_parallel(run: Run) -> None:
    run(tensor_parallel, model=2, lat=2)


def in_shard_map() -> None:
    whole, module = Net(), Net()
    net = pmod.domain_parallel(module, EVEN.spec, sizes=EVEN.sizes)
    f = pmod.shard_map(lambda x: net(x), in_specs=EVEN.spec, out_specs=EVEN.spec)
    x = field().requires_grad_()
    y = f(x)
    alike([y], [whole(field())])
    alike(list(torch.autograd.grad(number(y), [x, *module.parameters()])), list(
        torch.autograd.grad(number(whole(x)), [x, *whole.parameters()])))  # fmt: skip


def test_in_a_shard_map(run: Run) -> None:
    run(in_shard_map, lat=2)


def of_dtensors() -> None:
    mesh = pmod.current_mesh()
    whole, module = Net(), Net()
    (x,) = pmod.to_dtensors([EVEN.block(field())], [EVEN.spec])
    net = pmod.domain_parallel(module, P())
    y = net(x)
    assert pmod.cut_of(y).axes == ("lat",) and mesh.axis_names == ("lat",)
    alike([joined(y, pmod.cut_of(y))], [whole(field())])
    (z,) = pmod.to_dtensors([y], [P(*pmod.cut_of(y).entries)])
    alike([z.full_tensor()], [whole(field())])


def test_dtensors_go_in() -> None:
    on_processes(of_dtensors, lat=2)


def test_the_compiler_is_back_after_the_last_thread() -> None:
    """Its stance is the process's, and the threads of a simulation leave in any order."""
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(uncompiled)
        second.enter_context(uncompiled)
        first.close()
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))
        assert not graphs
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))
    assert graphs
