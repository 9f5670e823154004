"""The same functions on cuda tensors: a world of one rank with NCCL, where there is a GPU.

More ranks than GPUs cannot be had with NCCL, so what is tested here is what one GPU shows: the device of a mesh, where
tensors may live, streams, autograd's device threads, and the wire itself on a group of one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import pmod
from pmod._ranks import world
from pmod._wire.nccl import NCCL
from pmod._wire.process_group import GroupWire
from tests.lib.one_rank import IDENTITIES, ZEROS

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # said by torch when NCCL is used for the first time
    pytest.mark.filterwarnings("default::UserWarning:torch"),
]


def one_rank() -> pmod.Topology:
    return pmod.Topology.detect({})


@pytest.fixture
def mesh() -> Iterator[pmod.Mesh]:
    pmod.shutdown()
    mesh = pmod.make_mesh(data=-1, model=1, topology=one_rank())
    with pmod.set_mesh(mesh):
        yield mesh
    pmod.shutdown()
    assert not dist.is_initialized()


@pytest.fixture
def x() -> Tensor:
    return torch.linspace(-1.5, 2.0, 6, dtype=torch.float64, device="cuda:0").view(2, 3)


def test_one_process_takes_the_first_gpu_and_both_backends(mesh):
    assert mesh.device == torch.device("cuda:0")
    assert mesh.topology.backend == "cpu:gloo,cuda:nccl"
    assert mesh.device_mesh.device_type == "cuda"


@pytest.mark.parametrize("name", IDENTITIES)
def test_values_and_derivatives(name, mesh, x):
    def f(x: Tensor) -> Tensor:
        # the weights of a mean are on the device of the tensor
        return pmod.pmean(x, "model", weight=torch.ones(3, device=x.device)) if "weights" in name else call(x, "model")

    call = IDENTITIES[name]
    y = f(x)
    assert y.device == x.device and y.dtype == x.dtype
    torch.testing.assert_close(y, x)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(leaf**3).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    torch.testing.assert_close(first, 3 * x**2)
    torch.testing.assert_close(second, 6 * x)
    torch.testing.assert_close(torch.func.jvp(f, (x,), (x,))[1], x)
    torch.testing.assert_close(torch.func.vmap(f)(torch.stack([x, 2 * x])), torch.stack([x, 2 * x]))


@pytest.mark.parametrize("name", ZEROS)
def test_where_nothing_arrives(name, mesh, x):
    y = ZEROS[name](x, "model")
    assert y.device == x.device and not y.any()


def test_cpu_and_cuda_tensors_in_one_tree(mesh, x):
    found = pmod.psum({"gpu": x, "cpu": x.cpu(), "number": 2.5}, "model")
    assert found["gpu"].is_cuda and found["cpu"].is_cpu and found["number"] == 2.5


def test_a_tensor_on_another_device_is_refused(mesh, x):
    with pytest.raises(pmod.ArgumentError) as caught:
        pmod.psum(x.to("meta"), "model")
    assert str(caught.value) == (
        "pmod.psum(axis='model') at (data=0, model=0): x is on meta.\nThis rank sends from cuda:0: pass x.to('cuda:0')."
    )


def test_a_cuda_tensor_where_the_rank_sends_from_the_cpu(x):
    here = pmod.Topology(rank=0, world_size=1)
    with pmod.set_mesh(pmod.make_mesh(model=1, topology=here)), pytest.raises(pmod.ArgumentError) as caught:
        pmod.psum(x, "model")
    assert str(caught.value) == (
        "pmod.psum(axis='model') at (model=0): x is on cuda:0.\nThis rank sends from cpu: pass x.to('cpu')."
    )


# --- the wire on a real NCCL group ------------------------------------------------------------------------------------


@pytest.fixture
def wire(mesh) -> GroupWire:
    return GroupWire(1, 0, mesh.group("model"), NCCL)


DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.int16,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_message_arrives(dtype, wire):
    x = torch.arange(6, device="cuda:0").to(dtype)
    for sent in (
        wire.all_to_all(x, [6], [6]),
        wire.all_gather(x, [6]),
        wire.broadcast(x, 0),
        wire.permute(x, 0, 0),
    ):
        y = sent.wait()
        assert y.is_cuda and torch.equal(y, x)
    assert torch.equal(wire.permute(x, None, None).wait(), torch.zeros_like(x))
    wire.barrier()


@pytest.mark.parametrize("dtype", DTYPES[:5])
def test_sums_on_the_device(dtype, wire):
    x = torch.arange(6, device="cuda:0").to(dtype)
    accumulator = torch.float32 if dtype.itemsize == 2 else dtype
    for numel in (6, 1 << 20):  # a small message, and one whose parts travel as they are
        large = x.repeat(-(-numel // 6))[:numel].contiguous()
        assert torch.equal(wire.all_reduce(large, "sum", accumulator, 1).wait(), large)
        assert torch.equal(wire.all_reduce(large, "max", dtype, 1).wait(), large)
        assert torch.equal(wire.reduce_scatter(large, [numel], accumulator).wait(), large)
        assert torch.equal(wire.reduce(large, 0, accumulator).wait(), large)


def test_a_message_waits_for_the_stream_that_wrote_it(wire):
    """Written, sent and read on a stream of the user's, with the device kept busy before each."""
    stream = torch.cuda.Stream()
    work = torch.randn(2048, 2048, device="cuda:0")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for value in range(1, 4):
            x = torch.zeros(1 << 20, device="cuda:0")
            for _ in range(8):
                work = work @ work / 2048
            x += value  # queued behind the products
            y = wire.all_reduce(x, "sum", torch.float32, 1).wait()
            x.fill_(-1.0)  # after the wait the stream may change it
            total = y.sum()
            assert total.item() == value * (1 << 20)


def test_a_result_of_start_is_ready_after_wait_on_another_stream(mesh, wire):
    x = torch.full((1 << 20,), 3.0, device="cuda:0")
    sent = wire.all_gather(x, [1 << 20])
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        y = sent.wait() * 2
        assert y.sum().item() == 6.0 * (1 << 20)


# --- backward runs on autograd's own thread -------------------------------------------------------------------------


class NamesAnAxis(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[Any]) -> Tensor:
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        ctx.seen.append((pmod.current_mesh().axis_names, threading.get_ident()))
        return pmod.psum(g, "model"), None


def test_the_mesh_is_found_on_the_device_thread(mesh, x):
    seen: list[Any] = []
    leaf = x.clone().requires_grad_()
    NamesAnAxis.apply(leaf, seen).sum().backward()
    ((axes, thread),) = seen
    assert axes == ("data", "model") and thread != threading.get_ident()
    assert leaf.grad is not None and torch.equal(leaf.grad, torch.ones_like(x))


def test_keep_mesh_on_the_device_thread(mesh, x):
    from torch.utils.checkpoint import checkpoint

    leaf = x.clone().requires_grad_()
    y = checkpoint(lambda x: pmod.psum(x.sin(), "model").cos(), leaf, use_reentrant=False, context_fn=pmod.keep_mesh)
    with pmod.set_mesh(mesh.rename(model="other")):
        y.sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, -x.sin().sin() * x.cos())


def test_random_numbers_follow_their_seed_and_are_as_before_outside(mesh):
    def draw() -> list[list[float]]:
        return [torch.rand(4, device=device).tolist() for device in ("cpu", "cuda:0")]

    torch.manual_seed(1)
    outside = draw() + draw()
    torch.manual_seed(1)
    found = draw()
    with pmod.rng(0, "data"):
        inside = draw()
    assert found + draw() == outside
    with pmod.rng(0, "data"):
        assert draw() == inside
    assert not set(map(tuple, inside)) & set(map(tuple, outside))


def test_a_world_of_the_user_with_nccl_alone(x):
    pmod.shutdown()
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda:0"))
    try:
        mesh = pmod.make_mesh(model=-1)
        assert mesh.group("model") is dist.group.WORLD
        assert torch.equal(pmod.psum(x, mesh), x)
        assert pmod.psum(2.5, mesh) == 2.5
        flat = x.reshape(-1)
        assert torch.equal(GroupWire(1, 0, mesh.group("model"), NCCL).all_gather(flat, [6]).wait(), flat)
        pmod.shutdown()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
    assert not world.processes().connection.groups


def test_shard_map_and_its_relatives(mesh, x):
    w = torch.ones(3, dtype=x.dtype, device=x.device, requires_grad=True)
    specs = {"in_specs": (pmod.P("data"), pmod.P()), "out_specs": pmod.P("data")}
    y = pmod.shard_map(lambda x, w: x * w, **specs)(x, w)
    y.sum().backward()
    assert w.grad is not None and y.device == x.device
    torch.testing.assert_close(w.grad, x.sum(0))
    torch.testing.assert_close(pmod.global_norm([x], pmod.P("data")), x.norm())
    torch.testing.assert_close(pmod.from_dtensors(pmod.to_dtensors([x], pmod.P("data"))), [x])
    pmod.testing.assert_matches_serial(lambda x, w: x * pmod.pvary(w, "data"), lambda x, w: x * w, (x, w), **specs)


def test_convolutions(mesh, x):
    image, weight = torch.rand(1, 2, 5, 4, device="cuda:0"), torch.rand(3, 2, 3, 3, device="cuda:0")
    ours = pmod.nn.functional.conv2d(image, weight, padding="same", axis="data")
    torch.testing.assert_close(ours, torch.nn.functional.conv2d(image, weight, padding="same"))
