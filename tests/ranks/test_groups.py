"""Process groups on real gloo processes: made lazily, by their own members, in any order; shared with torch; ended."""

from __future__ import annotations

import inspect
import math
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import pmod
from pmod._ranks import groups
from pmod._ranks import world as _world
from tests.lib import spmd
from tests.lib.started import run_ranks

ROOT = Path(pmod.__file__).parents[1]
DEADLINE = spmd.LONG  # a hang ends the pool, and the next test starts a new one


def here() -> pmod.Topology:
    return pmod.current_mesh().topology


def over(*ranks: int) -> pmod.Mesh:
    """A mesh over these ranks, whose one axis is called x."""
    return pmod.make_mesh(x=len(ranks), ranks=ranks, topology=here())


def total(mesh: pmod.Mesh) -> float:
    """Says which ranks took part: one decimal digit each."""
    return pmod.psum(torch.tensor(10.0 ** here().rank), mesh).item()


def digits(ranks: Any) -> float:
    return float(sum(10**rank for rank in ranks))


# --- orders of first use --------------------------------------------------------------------------------------------


def start_in_a_cyclic_order(rings: list[tuple[int, ...]], made_before: bool) -> None:
    """Each rank starts with its own ring, so no order of the rings fits all ranks."""
    rank = here().rank
    mine = [ring for ring in rings[rank:] + rings[:rank] if rank in ring]
    meshes = [over(*ring) for ring in mine]
    if made_before:
        for mesh in meshes:
            mesh.group("x")
    x = torch.tensor([10.0**rank])
    sums = [pmod.start(pmod.psum, x, mesh) for mesh in meshes]
    gathered = [pmod.start(pmod.all_gather, x, mesh) for mesh in meshes]
    shifted = [pmod.start(pmod.pshift, x, mesh) for mesh in meshes]
    for ring, a, b, c in zip(mine, sums, gathered, shifted, strict=True):
        assert a.wait().item() == digits(ring)
        assert b.wait().tolist() == [10.0**other for other in ring]
        assert c.wait().item() == 10.0 ** ring[ring.index(rank) - 1]


@pytest.mark.parametrize("made_before", [True, False])
def test_pairs_of_three_ranks_in_a_cyclic_order(made_before):
    # rings of another order in each case, so that the groups are new
    rings = [(0, 1), (1, 2), (2, 0)] if made_before else [(1, 0), (2, 1), (0, 2)]
    spmd.launch(start_in_a_cyclic_order, rings, made_before, timeout=DEADLINE, ring=3)


@pytest.mark.parametrize("made_before", [True, False])
def test_triples_of_four_ranks_in_a_cyclic_order(made_before):
    rings = [(0, 1, 2), (1, 2, 3), (2, 3, 0), (3, 0, 1)]
    if not made_before:
        rings = [ring[::-1] for ring in rings]
    spmd.launch(start_in_a_cyclic_order, rings, made_before, timeout=DEADLINE, data=2, model=2)


def start_large_sums_in_a_cyclic_order() -> None:
    """A large sum takes two messages, so the waits have one order on all ranks; the first messages still have none."""
    rank = here().rank
    rings = [(0, 2, 1), (1, 3, 2), (2, 0, 3), (3, 1, 0)]
    x = torch.full((20_000,), 10.0**rank)
    pending = {ring: pmod.start(pmod.psum, x, over(*ring)) for ring in rings[rank:] + rings[:rank] if rank in ring}
    for ring in rings:
        if rank in ring:
            assert pending[ring].wait().unique().tolist() == [digits(ring)]


def test_large_sums_of_triples_in_a_cyclic_order():
    spmd.launch(start_large_sums_in_a_cyclic_order, timeout=DEADLINE, data=2, model=2)


def first_use_in_an_order_of_its_own() -> None:
    mesh = pmod.current_mesh().rename(data="x", model="y")
    rank = here().rank
    axes = ["x", "y", ("x", "y"), ("y", "x")]
    mine = axes[rank:] + axes[:rank]
    tensor = torch.tensor([10.0**rank])
    pending = {axis: pmod.start(pmod.all_gather, tensor, mesh[axis]) for axis in mine}
    for axis in axes:
        assert pending[axis].wait().tolist() == [10.0**other for other in mesh[axis].ranks.reshape(-1)]


def test_axes_of_one_mesh_in_another_order_on_each_rank():
    spmd.launch(first_use_in_an_order_of_its_own, timeout=DEADLINE, data=2, model=2)


def make_a_group_before_the_others_come() -> None:
    mesh, everyone = over(2, 0), over(2, 1, 0)
    everyone.group("x")
    pmod.barrier(everyone)
    if here().rank == 0:
        mesh.group("x")
    spmd.meet(3)  # rank 0 did not wait for rank 2
    if here().rank == 2:
        mesh.group("x")
    if here().rank != 1:
        assert total(mesh) == 101


def test_making_a_group_waits_for_nobody():
    spmd.launch(make_a_group_before_the_others_come, timeout=DEADLINE, ring=3)


def use_a_mesh_of_which_this_rank_is_no_part() -> None:
    mesh = over(1, 2)
    if here().rank == 0:
        assert mesh.coords is None
        with pytest.raises(pmod.AxisError, match="rank 0 is outside the mesh"):
            pmod.psum(torch.ones(1), mesh.flatten(("x",), "y"))
        with pmod.set_mesh(mesh), pytest.raises(pmod.AxisError, match="rank 0 is outside the mesh"):
            pmod.psum(torch.ones(1), "x")
    else:
        assert total(mesh["x"]) == 110


def test_a_rank_outside_takes_no_part():
    spmd.launch(use_a_mesh_of_which_this_rank_is_no_part, timeout=DEADLINE, ring=3)


def make_meshes_without_saying_the_topology() -> list[dict[str, int]]:
    pmod.shutdown()
    assert not dist.is_initialized()
    return [pmod.make_mesh().shape, pmod.make_mesh(x=2, ranks=[0, 2]).shape]


def test_make_mesh_knows_the_world_of_a_launched_rank():
    before_any_message = spmd.launch(make_meshes_without_saying_the_topology, timeout=DEADLINE, ring=3)
    assert before_any_message == [[{"data": 3}, {"x": 2}]] * 3


# --- one group for the same ranks ------------------------------------------------------------------------------------


def groups_are_shared() -> None:
    mesh = pmod.current_mesh()
    world = mesh.group(("data", "model"))
    assert world is dist.group.WORLD
    assert mesh.group("model") is mesh.group("model")
    same = [mesh["model"].group("model"), mesh.group(mesh["model"]), mesh.group(("model",))]
    same.append(mesh.rename(model="m").group("m"))
    same.append(mesh.flatten(("model", "data"), "all").split("all", b=2, a=2).group("b"))
    same.append(pmod.make_mesh(model=2, ranks=mesh["model"].ranks, topology=here()).group("model"))
    assert all(group is mesh.group("model") for group in same)
    assert mesh.group("model") is not mesh.group("data")
    for axis in ("data", "model", ("data", "model"), ("model", "data")):
        group, axis_ranks = mesh.group(axis), mesh[axis].ranks.reshape(-1).tolist()
        assert dist.get_process_group_ranks(group) == axis_ranks
        assert dist.get_rank(group) == mesh.axis_index(axis) == axis_ranks.index(here().rank)
        assert dist.get_world_size(group) == group.size() == len(axis_ranks)
    reverse = over(3, 2, 1, 0)
    assert dist.get_process_group_ranks(reverse.group("x")) == [3, 2, 1, 0]
    assert dist.get_rank(reverse.group("x")) == 3 - here().rank
    assert pmod.all_gather(torch.tensor([here().rank]), reverse).tolist() == [3, 2, 1, 0]


def test_a_group_is_made_once_and_has_the_order_of_its_axis():
    spmd.launch(groups_are_shared, timeout=DEADLINE, data=2, model=2)


def equal_meshes_made_differently() -> None:
    listed = pmod.make_mesh(x=4, ranks=[0, 2, 1, 3], topology=here())
    flat = pmod.current_mesh().flatten(("model", "data"), "x")
    assert listed == flat
    mesh = listed if here().rank % 2 else flat
    assert pmod.all_gather(torch.tensor([here().rank]), mesh).tolist() == [0, 2, 1, 3]
    assert listed.group("x") is flat.group("x")


def test_equal_meshes_meet_in_one_group():
    spmd.launch(equal_meshes_made_differently, timeout=DEADLINE, data=2, model=2)


# --- with torch ------------------------------------------------------------------------------------------------------


def torchs_own_collectives() -> None:
    mesh = pmod.current_mesh()
    for axis in ("data", "model", ("model", "data")):
        ranks = mesh[axis].ranks.reshape(-1).tolist()
        x = torch.tensor(10.0 ** here().rank)
        dist.all_reduce(x, group=mesh.group(axis))
        assert x.item() == digits(ranks)
        x = torch.tensor([here().rank])
        dist.broadcast(x, src=ranks[-1], group=mesh.group(axis))  # the global rank of the source
        assert x.item() == ranks[-1]
        parts = [torch.zeros(1) for _ in ranks]
        dist.all_gather(parts, torch.tensor([float(here().rank)]), group=mesh.group(axis))
        assert [int(part) for part in parts] == ranks
        found: list[Any] = [None] * len(ranks)
        dist.all_gather_object(found, here().rank, group=mesh.group(axis))
        assert found == ranks
        dist.barrier(group=mesh.group(axis))


def test_torchs_own_collectives_take_the_group():
    spmd.launch(torchs_own_collectives, timeout=DEADLINE, data=2, model=2)


def ddp_over_one_axis() -> None:
    from torch.nn.parallel import DistributedDataParallel

    mesh = pmod.current_mesh()
    module = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(module.weight, 1.0 + mesh.axis_index("model"))
    wrapped = DistributedDataParallel(module, process_group=mesh.group("data"))
    wrapped(torch.full((1, 2), 10.0 ** here().rank)).sum().backward()
    mean = digits(mesh["data"].ranks.tolist()) / 2
    assert module.weight.grad is not None
    assert module.weight.grad.tolist() == [[mean, mean]]


def test_DDP_takes_the_group_of_an_axis():
    spmd.launch(ddp_over_one_axis, timeout=DEADLINE, data=2, model=2)


def device_mesh_both_ways() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    mesh = pmod.current_mesh()
    torchs = mesh.device_mesh
    assert torchs.mesh_dim_names == ("data", "model")
    assert torchs.mesh.tolist() == mesh.ranks.tolist()
    assert torchs.get_group("data") is mesh.group("data") and torchs.get_group("model") is mesh.group("model")
    assert list(torchs.get_coordinate()) == list(mesh.coords.values())

    whole = torch.arange(15.0).view(5, 3)
    sharded = distribute_tensor(whole, torchs, [Replicate(), Shard(0)])
    assert torch.equal(sharded.to_local(), pmod.shard(whole, "model"))  # the same shards, 3 + 2 rows
    assert torch.equal(sharded.full_tensor(), whole)
    twice = distribute_tensor(whole, torchs, [Shard(0), Shard(1)])
    assert torch.equal(twice.to_local(), pmod.shard(pmod.shard(whole, "data"), "model", dim=1))
    assert torch.equal(twice.redistribute(placements=[Replicate(), Replicate()]).to_local(), whole)
    summed = type(twice).from_local(whole, torchs, [Partial(), Replicate()]).full_tensor()
    assert torch.equal(summed, pmod.psum(whole, "data"))

    again = pmod.Mesh.from_device_mesh(torchs)
    assert again == mesh and hash(again) == hash(mesh) and again.coords == mesh.coords
    assert all(again.group(name) is mesh.group(name) for name in mesh.axis_names)

    # groups that torch made, in an order of ranks that no mesh was made in before
    theirs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("p", "q"))
    sub = pmod.Mesh.from_device_mesh(theirs["q"])
    assert sub.axis_names == ("q",) and sub.ranks.tolist() == mesh["model"].ranks.tolist()
    ours = pmod.Mesh.from_device_mesh(theirs)
    assert ours == mesh.rename(data="p", model="q")
    assert pmod.psum(torch.tensor(10.0 ** here().rank), ours["q"]).item() == digits(mesh["model"].ranks.tolist())
    one = over(*mesh["data"].ranks.tolist()).device_mesh
    assert one.mesh.tolist() == mesh["data"].ranks.tolist() and one.get_group() is mesh.group("data")


def test_device_mesh_both_ways():
    spmd.launch(device_mesh_both_ways, data=2, model=2)


def adopt_the_groups_of_a_device_mesh() -> None:
    from torch.distributed.device_mesh import DeviceMesh

    pmod.current_mesh().group(("data", "model"))  # a DeviceMesh does not connect a launched rank
    theirs = DeviceMesh("cpu", [[3, 1], [2, 0]])  # unnamed, and in an order of its own
    mesh = pmod.Mesh.from_device_mesh(theirs)
    assert mesh.shape == {"dim0": 2, "dim1": 2}
    assert mesh.ranks.tolist() == [[3, 1], [2, 0]]
    if dist.get_process_group_ranks(theirs.get_group(1)) == mesh["dim1"].ranks.tolist():
        assert mesh.group("dim1") is theirs.get_group(1)
    # torch sorts the ranks of a group, a mesh does not
    gathered = pmod.all_gather(torch.tensor([here().rank]), mesh["dim1"]).tolist()
    assert gathered == mesh["dim1"].ranks.tolist()
    assert pmod.all_gather(torch.tensor([here().rank]), mesh["dim0"]).tolist() == mesh["dim0"].ranks.tolist()
    assert pmod.pick(torch.tensor(here().rank), mesh["dim1"], src=0).item() == mesh["dim1"].ranks.tolist()[0]


def test_a_device_mesh_in_any_order_of_ranks_is_adopted():
    spmd.launch(adopt_the_groups_of_a_device_mesh, data=2, model=2)


# --- starting and ending -------------------------------------------------------------------------------------------


def start_and_end(times: int) -> None:
    place = here()
    for _ in range(times):
        mesh = pmod.make_mesh(ring=3, topology=place)
        group = mesh.group("ring")
        assert total(mesh) == 111
        if place.rank != 1:
            assert total(over(0, 2)) == 101
        if place.rank != 0:
            assert total(over(2, 1)) == 110
        pmod.shutdown()
        assert not dist.is_initialized()
        pmod.shutdown()
        assert group is not None  # held by somebody, and ended all the same
    assert total(pmod.current_mesh()) == 111  # a mesh that was made before connects again


def test_shutdown_can_be_called_again_and_make_mesh_starts_afresh():
    spmd.launch(start_and_end, 4, timeout=DEADLINE, ring=3)


def start_again_where_the_ranks_made_different_groups() -> None:
    pair = over(1, 0)
    if here().rank == 0:
        pair.group("x")  # made, and used by nobody
    pmod.make_mesh(ring=3, topology=here()).group("ring")
    pmod.shutdown()
    pmod.make_mesh(ring=3, topology=here()).group("ring")
    if here().rank != 2:
        assert total(over(1, 0)) == 11
    pmod.shutdown()


def test_starting_afresh_forgets_which_groups_a_rank_had_made():
    spmd.launch(start_again_where_the_ranks_made_different_groups, timeout=DEADLINE, ring=3)


def init_by_hand(folder: Path, name: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / name}", rank=here().rank, world_size=3)


def ours_alive() -> list[str]:
    import torch.distributed.distributed_c10d as c10d

    return [name for name in c10d._world.pg_names.values() if name.startswith("pmod:")]  # type: ignore[attr-defined]


def join_what_the_user_initialized(folder: Path) -> None:
    pmod.shutdown()
    init_by_hand(folder, "first")
    world = dist.group.WORLD
    mesh = pmod.make_mesh(ring=-1)
    assert (mesh.topology.rank, mesh.topology.world_size) == (dist.get_rank(), 3)
    assert mesh.group("ring") is world
    assert total(mesh) == 111
    assert total(over(2, 1, 0)) == 111
    assert ours_alive()
    pmod.shutdown()
    pmod.shutdown()
    assert dist.is_initialized() and dist.group.WORLD is world
    assert not ours_alive()  # what pmod made itself is gone
    x = torch.ones(1)
    dist.all_reduce(x)
    assert x.item() == 3
    mesh = pmod.make_mesh(ring=3)  # joined a second time
    assert total(over(2, 1, 0)) == 111
    dist.destroy_process_group()


def test_a_process_group_of_the_user_is_joined_and_left_alone(tmp_path):
    spmd.launch(join_what_the_user_initialized, tmp_path, timeout=DEADLINE, ring=3)


def destroy_and_init_between(folder: Path) -> None:
    pmod.shutdown()
    for name in ("a", "b", "c"):  # twice: from the user's world to another
        init_by_hand(folder, name)
        mesh = pmod.make_mesh(ring=3)
        assert mesh.group("ring") is dist.group.WORLD
        assert total(mesh) == 111
        if here().rank != 2:
            pair = over(1, 0)
            assert total(pair) == 11
            assert pair.group("x").group_name in ours_alive()
        dist.destroy_process_group()  # pmod is not told
    init_by_hand(folder, "d")  # no new mesh: the old one must not use a group of a world that is gone
    assert total(mesh) == 111
    if here().rank != 2:
        assert total(pair) == 11
    dist.destroy_process_group()
    # and from what pmod started to the user's
    mesh = pmod.make_mesh(ring=3, topology=here())
    assert total(mesh) == 111
    dist.destroy_process_group()
    init_by_hand(folder, "e")
    assert total(mesh) == 111 and mesh.group("ring") is dist.group.WORLD
    pmod.shutdown()
    assert dist.is_initialized()  # it is the user's now
    dist.destroy_process_group()


def test_no_group_outlives_the_world_that_it_was_made_in(tmp_path):
    spmd.launch(destroy_and_init_between, tmp_path, timeout=DEADLINE, ring=3)


def contradict(whose: str, folder: Path) -> None:
    rank = here().rank
    if whose == "user":
        pmod.shutdown()
        init_by_hand(folder, "world")
    mesh = pmod.make_mesh(ring=3, topology=here())
    assert total(mesh) == 111
    for other in (pmod.Topology(rank=rank, world_size=5), pmod.Topology(rank=(rank + 1) % 3, world_size=3)):
        wrong = pmod.make_mesh(data=-1, topology=other)
        with pytest.raises(pmod.TopologyError) as caught:
            wrong.group("data")
        assert str(caught.value) == (
            f"pmod.make_mesh: torch.distributed is initialized as rank {rank} of 3, "
            f"the topology says rank {other.rank} of {other.world_size}.\n"
            "Leave topology out, or call torch.distributed.destroy_process_group() first."
        )
        with pytest.raises(pmod.TopologyError):
            pmod.psum(torch.ones(1), wrong)
        assert total(mesh) == 111  # the right one goes on
    if whose == "user":
        dist.destroy_process_group()


@pytest.mark.parametrize("whose", ["user", "pmod"])
def test_a_topology_that_contradicts_the_process_group_is_refused(whose, tmp_path):
    spmd.launch(contradict, whose, tmp_path, timeout=DEADLINE, ring=3)


def draw_another_mesh_before_the_first_use() -> None:
    pmod.shutdown()
    mesh = pmod.make_mesh(ring=3, topology=here())
    str(pmod.make_mesh(data=8, topology=pmod.Topology(rank=0, world_size=8)))
    assert total(mesh) == 111


def test_a_mesh_that_is_only_drawn_changes_nothing():
    spmd.launch(draw_another_mesh_before_the_first_use, timeout=DEADLINE, ring=3)


def nobody_comes() -> float | None:
    """Rank 0 calls a collective that ranks 1 and 2 never call."""
    mesh = pmod.make_mesh(x=3, ranks=[1, 2, 0], topology=here(), timeout=3.0)
    mesh.group("x")
    seconds = None
    if here().rank == 0:
        began = time.monotonic()
        with pytest.raises((pmod.CollectiveTimeout, RuntimeError)):
            pmod.psum(torch.ones(1), mesh)  # what it does not end, the deadline of the test does
        seconds = time.monotonic() - began
    return seconds


def test_the_deadline_ends_a_collective_that_the_others_never_call():
    seconds = spmd.launch(nobody_comes, timeout=DEADLINE, ring=3)[0]
    assert seconds > 0.5


def timeouts() -> list[float]:
    """The deadline of a group is that of its mesh, whatever mesh was made last."""
    first = pmod.make_mesh(x=2, ranks=[0, 1], topology=here(), timeout=7)
    pmod.make_mesh(x=2, ranks=[0, 1], topology=here(), timeout=11)
    if here().rank == 2:
        return []
    return [seconds_of(first.group("x"))]


def test_the_timeout_belongs_to_the_mesh_that_was_given_it():
    assert spmd.launch(timeouts, timeout=DEADLINE, ring=3)[:2] == [[7.0], [7.0]]


def patience_of_the_store() -> list[float]:
    """Of the store of the world, after one connection with a short deadline and another with a long one."""
    place, found = here(), []
    pmod.barrier(over(0, 1, 2))  # connected on all ranks, or on none
    for seconds in (3.0, 20.0):
        pmod.shutdown()
        pmod.barrier(pmod.make_mesh(x=3, topology=place, timeout=seconds))
        (store,) = _world.processes().stores.values()
        found.append(store.timeout.total_seconds())
    pmod.shutdown()
    return found


def test_the_store_waits_as_long_as_the_mesh_that_was_connected_last():
    assert spmd.launch(patience_of_the_store, timeout=DEADLINE, ring=3) == [[3.0, 20.0]] * 3


@pytest.fixture
def alone() -> Iterator[None]:
    """This process connects to nobody, before and after."""
    pmod.shutdown()
    yield
    pmod.shutdown()
    assert not dist.is_initialized()


def test_a_topology_that_does_not_say_where_to_meet(alone):
    mesh = pmod.make_mesh(data=2, topology=pmod.Topology(rank=0, world_size=2))
    with pytest.raises(pmod.TopologyError) as caught:
        mesh.group("data")
    assert str(caught.value) == (
        "pmod.make_mesh: single says rank 0 of 2 but not where to meet.\n"
        "Set MASTER_ADDR to the first rank's host and MASTER_PORT to a port that is free there, on every rank."
    )


@pytest.mark.parametrize("text", ["soon", "", "0", "-3", "nan", "inf", "1e400"])
def test_a_bad_PMOD_TIMEOUT_is_found_before_anything_connects(alone, monkeypatch, text):
    monkeypatch.setenv("PMOD_TIMEOUT", text)
    with pytest.raises(pmod.TopologyError) as caught:
        pmod.make_mesh()
    assert str(caught.value) == (f"pmod.make_mesh: PMOD_TIMEOUT is {text!r}.\nSet it to seconds, a number above 0.")


def seconds_of(group: Any) -> float:
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def test_the_argument_goes_before_PMOD_TIMEOUT_before_600_seconds(alone, monkeypatch):
    def deadline(**kwargs: float) -> float:
        mesh = pmod.make_mesh(data=1, topology=pmod.Topology(rank=0, world_size=1), **kwargs)
        seconds = seconds_of(mesh.group("data"))
        pmod.shutdown()
        return seconds

    monkeypatch.delenv("PMOD_TIMEOUT", raising=False)
    assert deadline() == 600
    monkeypatch.setenv("PMOD_TIMEOUT", "2.5")
    assert deadline() == 2.5
    assert deadline(timeout=7) == 7


def test_one_process_makes_a_group_on_demand_and_ends_it(alone):
    mesh = pmod.make_mesh(data=1, model=1, topology=pmod.Topology(rank=0, world_size=1))
    assert not dist.is_initialized()
    x = torch.ones(2)
    dist.all_reduce(x, group=mesh.group("model"))
    assert x.tolist() == [1, 1]
    assert mesh.group("data") is mesh.group("model") is mesh.group(("model", "data"))


# --- a process of its own -------------------------------------------------------------------------------------------


LISTENS = """
    import os, pathlib, sys, torch, pmod
    mesh = pmod.make_mesh(x=-1)
    assert pmod.psum(torch.ones(()), mesh["x"]).item() == 2
    port = f"{int(os.environ['MASTER_PORT']):04X}"
    links = [entry for entry in pathlib.Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    own = {os.readlink(link) for link in links if link.exists() or link.is_symlink()}
    for table in ("tcp", "tcp6"):
        for line in pathlib.Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and local.endswith(":" + port) and f"socket:[{rest[5]}]" in own:
                print(local.split(":")[0])
"""


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("address", "listens"),
    [
        ("127.0.0.1", "0100007F"),
        ("127.0.0.5", "0500007F"),
        ("localhost", "0100007F"),
        pytest.param("::1", 24 * "0" + "01000000", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")),
    ],
)
def test_a_store_for_this_host_alone_is_reached_from_this_host_alone(address, listens):
    (first, served, said), (second, nothing, errors) = run_ranks(LISTENS, 2, address=address)
    assert (first, second) == (0, 0), said + errors
    assert (served.split(), nothing.split()) == ([listens], [])


def test_a_store_of_this_process_is_shared():
    code = """
        import os, torch, torch.distributed as dist, pmod
        port = int(os.environ["MASTER_PORT"])
        store = dist.TCPStore("127.0.0.1", port, 2, is_master=os.environ["RANK"] == "0", multi_tenant=True)
        assert pmod.psum(torch.ones(()), pmod.make_mesh(x=-1)["x"]).item() == 2
        pmod.shutdown()
        dist.init_process_group("gloo")
        assert pmod.psum(torch.ones(()), pmod.make_mesh(x=-1)["x"]).item() == 2
        dist.destroy_process_group()
    """
    for status, _, said in run_ranks(code, 2):
        assert status == 0, said


def test_ranks_of_a_launcher_start_afresh_and_end_without_a_word():
    code = """
        import torch, torch.distributed as dist, pmod
        for round in range(3):
            mesh = pmod.make_mesh(data=1, model=-1)
            assert dist.is_initialized() and mesh.topology.launcher == "env"
            x = torch.tensor(10.0 ** mesh.topology.rank)
            print(pmod.psum(x, mesh["model"]).item(), mesh.coords)
            assert pmod.psum(x, pmod.make_mesh(x=2, ranks=[1, 0])).item() == 11
            if round < 2:
                pmod.shutdown()
                assert not dist.is_initialized()
        # the last world is ended at exit
    """
    for rank, (code_, out, err) in enumerate(run_ranks(code, 2)):
        assert (code_, err) == (0, "")
        assert out.splitlines() == [f"11.0 {{'data': 0, 'model': {rank}}}"] * 3


# --- what we rely on in torch and is not public ----------------------------------------------------------------------


def test_the_private_names_of_torch_are_where_they_were():
    """Each is used behind one file of ours; where this fails, torch has moved it and that file must follow."""
    import torch._functorch.eager_transforms as eager_transforms
    import torch.autograd.forward_ad as forward_ad
    import torch.distributed.distributed_c10d as c10d

    helper = inspect.signature(c10d._new_process_group_helper).parameters
    assert list(helper)[:6] == [
        "group_size", "group_rank", "global_ranks_in_group", "backend", "store", "group_name",
    ]  # fmt: skip
    assert {"timeout", "group_desc"} <= set(helper)
    assert isinstance(c10d._world.pg_group_ranks, dict)
    assert callable(c10d._get_default_store)
    for name in ("get_single_level_autograd_function_allowed", "set_single_level_autograd_function_allowed"):
        assert callable(getattr(torch._C._functorch, name))
    for name in ("_are_functorch_transforms_active", "_len_torch_dispatch_stack", "_AutoDispatchBelowAutograd"):
        assert callable(getattr(torch._C, name))
    assert isinstance(torch._C._after_autograd_keyset, torch._C.DispatchKeySet)
    assert isinstance(forward_ad._current_level, int) and callable(forward_ad._set_fwd_grad_enabled)
    assert callable(torch.ops.aten._unsafe_view.default)

    def depth(x: torch.Tensor) -> torch.Tensor:
        seen.append((eager_transforms.JVP_NESTING, forward_ad._current_level >= 0))
        assert torch._C._are_functorch_transforms_active()
        return x

    seen: list[tuple[int, bool]] = []
    before = eager_transforms.JVP_NESTING
    torch.func.jvp(lambda x: torch.func.jvp(depth, (x,), (x,))[0], (torch.ones(1),), (torch.ones(1),))
    assert seen == [(before + 2, True)]
    assert not torch._C._are_functorch_transforms_active()


def test_the_helper_registers_a_group_as_new_group_does():
    """After it, torch finds the ranks, the name and the backend of a group; and destroys it."""
    import torch.distributed.distributed_c10d as c10d

    pmod.shutdown()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = groups._make_group("test", [0], dist.default_pg_timeout)
        assert group is dist.group.WORLD  # the whole world needs no other
        made, _ = c10d._new_process_group_helper(
            1, 0, [0], "gloo", c10d._get_default_store(), "pmod:test:0", timeout=dist.default_pg_timeout, group_desc="x"
        )
        assert made.group_name == "pmod:test:0" and made.group_desc == "x"
        assert dist.get_backend(made) == "gloo"
        assert c10d._resolve_process_group("pmod:test:0") is made
        c10d._world.pg_group_ranks[made] = {0: 0}
        assert dist.get_process_group_ranks(made) == [0]
        dist.destroy_process_group(made)
        assert made not in c10d._world.pg_map
    finally:
        dist.destroy_process_group()


class Untraceable:
    calls = 0

    def __call__(self) -> int:
        self.calls += 1
        return math.gcd(len(os.listdir("/")), 0) and 7  # nothing that a graph may hold


_untraceable = Untraceable()


def marked() -> int:
    return _untraceable()


def test_dynamo_honours_the_mark_of_a_constant():
    """`torch.compiler.assume_constant_result` sets `_dynamo_marked_constant`, and imports torch._dynamo to do so."""

    def double() -> None: ...

    torch.compiler.assume_constant_result(double)
    assert double._dynamo_marked_constant is True  # type: ignore[attr-defined]
    marked._dynamo_marked_constant = True  # type: ignore[attr-defined]
    compiled = torch.compile(lambda x: x * marked(), backend="eager", fullgraph=True)
    assert compiled(torch.ones(1)).item() == 7
    calls = _untraceable.calls
    assert compiled(torch.ones(1)).item() == 7
    assert _untraceable.calls == calls  # a constant of the graph
