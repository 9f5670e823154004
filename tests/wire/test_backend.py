"""A third backend: torch's store is a dictionary that all ranks read and write, so tensors can go by it.

What stands between the two lines is all that a backend takes, torch's own part included. It touches no file of pmod.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import pmod
from pmod._ranks import backends, world
from pmod._ranks.backends import Backend, backend_in, register
from pmod._wire.along import backend_along
from pmod._wire.base import Wire
from pmod._wire.fake import FAKE
from pmod._wire.gloo import GLOO
from pmod._wire.nccl import NCCL
from pmod._wire.sent import Sent
from tests.lib import spmd

Tensor = torch.Tensor
CPU = torch.device("cpu")

# ----------------------------------------------------------------------------------------------------------------------


class Dictionary(dist.ProcessGroup):
    group_name = ""  # torch's own property finds none where there is no C++ backend

    def __init__(self, of: Any, _: Any) -> None:
        super().__init__(of.group_rank, of.group_size)
        self.words, self.group_name, self.number = of.store, of.group_id, 0


class DictionaryWire(Wire):
    def __init__(self, size: int, index: int, group: Dictionary, backend: Backend, wait: Any) -> None:
        super().__init__(size, index)
        self.group = group

    def all_to_all(self, x: Tensor, send: Any, recv: Any) -> Sent:
        self.group.number += 1
        words, number, ranks = self.group.words, self.group.number, range(self.size)
        for rank, part in zip(ranks, x.split(list(send)), strict=True):
            words.set(f"{number} {self.index} {rank}", b"." + part.view(torch.uint8).numpy().tobytes())

        def take() -> Tensor:
            found = b"".join(words.get(f"{number} {rank} {self.index}")[1:] for rank in ranks)
            return torch.frombuffer(bytearray(found), dtype=torch.uint8).view(x.dtype) if found else x[:0]

        return Sent((), take)

    def barrier(self) -> None:
        self.all_to_all(torch.zeros(self.size), [1] * self.size, [1] * self.size).wait()


def register_dictionary() -> None:
    register(Backend("dictionary", "cpu", DictionaryWire, blocks=False))
    dist.Backend.register_backend("dictionary", Dictionary, extended_api=True, devices=["cpu"])


# ----------------------------------------------------------------------------------------------------------------------


def test_it_is_short() -> None:
    parts = [inspect.getsource(part) for part in (Dictionary, DictionaryWire, register_dictionary)]
    assert sum(len(part.splitlines()) for part in parts) < 40


def by_dictionary(folder: Path, used: Callable[[], Any]) -> Any:
    """In a rank: what a function returns in a world that is connected by the dictionary."""
    place = pmod.current_mesh().topology
    pmod.shutdown()
    register_dictionary()
    where = f"file://{folder / 'words'}"
    dist.init_process_group("dictionary", init_method=where, rank=place.rank, world_size=place.world_size)
    try:
        with pmod.set_mesh(pmod.make_mesh(data=2, model=2)):
            found = used()
            for axis in ("data", "model", ("data", "model")):
                along = pmod.current_mesh().bind(axis, "test")
                assert backend_along(along, CPU).name == "dictionary"
            assert all(type(group) is Dictionary for group in world.processes().connection.groups.values())
            pmod.barrier(("data", "model"))
            return found
    finally:
        pmod.shutdown()
        dist.destroy_process_group()


def collectives() -> dict[str, Any]:
    mesh = pmod.current_mesh()
    x = torch.arange(8.0, dtype=torch.float64) + 10 * mesh.topology.rank
    x.requires_grad_()
    y = pmod.psum(pmod.all_gather(x.sin(), "model") ** 2, "data")
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    z = torch.complex(x.detach(), x.detach())
    with pmod.debug():
        large = pmod.psum(torch.ones(20_000, dtype=torch.float64) * mesh.topology.rank, ("data", "model"))
        found = {
            "psum": y, "first": first, "second": second, "scattered": pmod.psum_scatter(x, "model"),
            "shifted": pmod.pshift(z, "data", 1), "ragged": pmod.all_gather_v(x[: mesh.topology.rank], "model"),
            "broadcast": pmod.broadcast(x > 12, "data"), "largest": pmod.pmax(x, ("data", "model")), "large": large[:3],
        }  # fmt: skip
    return {name: value.detach() for name, value in found.items()}


def test_values_and_derivatives_travel_by_it(tmp_path: Path) -> None:
    """They are the same bits as a simulation's, where the wire is memory."""
    expected = pmod.simulate(collectives, data=2, model=2)
    for found, right in zip(spmd.launch(by_dictionary, tmp_path, collectives, ranks=4), expected, strict=True):
        for name, value in right.items():
            assert torch.equal(found[name], value), name


def unlike() -> str:
    """A backend without tags has its calls compared after the fact."""
    assert not backend_along(pmod.current_mesh().bind("model", "test"), CPU).tags
    pmod.psum(torch.ones(2), "model")
    return type(world.processes().connection.witness).__name__


def test_it_is_what_its_record_says(tmp_path: Path) -> None:
    assert spmd.launch(by_dictionary, tmp_path, unlike, ranks=4) == ["Witness"] * 4


# --- which backend ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "device_type", "expected"),
    [
        ("gloo", "cpu", GLOO),
        ("cpu:gloo,cuda:nccl", "cpu", GLOO),
        ("cpu:gloo,cuda:nccl", "cuda", NCCL),
        ("cpu:gloo,cuda:gloo", "cuda", NCCL),  # gloo's record is for the CPU
        ("cpu:fake,cuda:fake,hpu:fake,xpu:fake", "cpu", FAKE),
        ("mpi", "cpu", GLOO),
    ],
)
def test_which_backend_carries_a_tensor(config: str, device_type: str, expected: Backend) -> None:
    assert backend_in(config, device_type) is expected


def test_a_registered_one_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_BACKENDS", dict(backends._BACKENDS))
    ucc, xccl = Backend("ucc", "cpu", Wire, blocks=True), Backend("xccl", "xpu", Wire, blocks=False)
    register(ucc)
    register(xccl)
    assert backend_in("cpu:ucc,cuda:nccl", "cpu") is ucc and backend_in("cpu:gloo,xpu:xccl", "xpu") is xccl
    assert backend_in("cpu:gloo,xpu:ucc", "xpu") is xccl  # ucc's record is for the CPU
    assert pmod.Topology(rank=0, world_size=2).backend == "gloo"  # which came first
    assert pmod.Topology(rank=0, world_size=2, device="xpu:1").backend == "cpu:gloo,xpu:xccl"


def test_a_device_without_a_backend_is_refused() -> None:
    said = "pmod.{}: pmod has no backend for tensors on xpu.\nIt has one for cpu (by gloo), cuda (by nccl)."
    with pytest.raises(pmod.TopologyError) as caught:
        pmod.Topology(rank=0, world_size=2, device="xpu:0")
    assert str(caught.value) == said.format("Topology")
    with pytest.raises(pmod.TopologyError) as caught:
        backend_in("cpu:gloo,xpu:xccl", "xpu")
    assert str(caught.value) == said.format("Mesh")
