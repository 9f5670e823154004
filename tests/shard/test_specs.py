"""`P`, and what needs no more than a tree of them: `pvary_params`, `global_norm`, checkpoints, slices of files."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import pmod
from pmod import P
from tests.lib import spmd

# --- the value ------------------------------------------------------------------------------------


def test_a_spec_is_a_value() -> None:
    spec = P("data", None, ("node", "model"))
    assert spec == P("data", None, ["node", "model"]) and hash(spec) == hash(P("data", None, ("node", "model")))
    assert spec != P("data") and P("data") != P("data", sizes={0: (1, 2)}) and P() != P(None)
    assert list(spec) == ["data", None, ("node", "model")] and len(spec) == 3 and spec[2] == ("node", "model")
    assert spec.axes == ("data", "node", "model")
    assert repr(P("data", sizes={0: [1, 2]})) == "P('data', sizes={0: (1, 2)})"
    assert pickle.loads(pickle.dumps(spec)) == spec
    with pytest.raises(AttributeError):
        spec.entries = ()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("entries", "sizes", "error", "text"),
    [
        (("data", "data"), None, pmod.AxisError, "P('data', 'data') names the axis 'data' twice"),
        (("data", ("model", "data")), None, pmod.AxisError, "names the axis 'data' twice"),
        ((3,), None, pmod.AxisError, "3 is no entry of a spec"),
        (((),), None, pmod.AxisError, "() is no entry of a spec"),
        (("data",), {0: (1.9, 2.9)}, pmod.ShapeError, "sizes is {0: (1.9, 2.9)}.\nPass {dim: one length per rank"),
        (("data",), {0: None}, pmod.ShapeError, "sizes is {0: None}."),
        (("data",), {"0": (1, 2)}, pmod.ShapeError, "sizes is {'0': (1, 2)}."),
        (("data",), {0: (-1, 2)}, pmod.ShapeError, "sizes is {0: (-1, 2)}."),
        (("data",), [(1, 2)], pmod.ShapeError, "sizes is [(1, 2)]."),
        (("data", None), {1: (1, 2)}, pmod.ShapeError, "sizes names dim 1, which P('data', None, sizes={1: (1, 2)})"),
    ],
)
def test_no_spec(entries: Any, sizes: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        P(*entries, sizes=sizes)
    assert text in str(raised.value)


def test_placements_and_back() -> None:
    mesh = pmod.make_mesh(data=2, node=2, model=2, topology=pmod.Topology(rank=0, world_size=8))
    for spec, placements in {
        P(): (Replicate(), Replicate(), Replicate()),
        P(None, "model"): (Replicate(), Replicate(), Shard(1)),
        P(("data", "model"), "node"): (Shard(0), Shard(1), Shard(0)),
    }.items():
        assert spec.placements(mesh) == placements
        assert P.from_placements(placements, mesh) == spec
    with pytest.raises(pmod.ShapeError, match="flattens axes in another order than the mesh"):
        P(("model", "data")).placements(mesh)
    with pytest.raises(pmod.ShapeError, match="has sizes of its own"):
        P("data", sizes={0: (1, 2)}).placements(mesh)
    with pytest.raises(pmod.AxisError, match=r"P\.placements.*no axis 'modle'; did you mean 'model'\?"):
        P("modle").placements(mesh)
    with pytest.raises(pmod.ShapeError, match="Pass one for each axis of the mesh"):
        P.from_placements((Replicate(),), mesh)
    with pytest.raises(pmod.ShapeError, match="Partial"):
        P.from_placements((torch.distributed.tensor.Partial(), Replicate(), Replicate()), mesh)


# --- pvary_params and global_norm -------------------------------------------------------------

SPECS = {"whole": P(), "rows": P("model"), "columns": [P(None, "data"), P(("data", "model"))]}
LENGTHS = {"whole": (3,), "rows": (5, 2), "columns": [(2, 3), (9,)]}


def whole_tree() -> dict[str, Any]:
    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))

    return {"whole": draw((3,)), "rows": draw((5, 2)), "columns": [draw((2, 3)), draw((9,))]}


def cut(x: torch.Tensor, spec: P) -> torch.Tensor:
    return x[pmod.local_slice(x.shape, spec)].clone().requires_grad_()


def shards() -> dict[str, Any]:
    tree = whole_tree()
    columns = [cut(x, spec) for x, spec in zip(tree["columns"], SPECS["columns"], strict=True)]
    return {"whole": cut(tree["whole"], P()), "rows": cut(tree["rows"], P("model")), "columns": columns}


def leaves(tree: dict[str, Any]) -> list[torch.Tensor]:
    return [tree["columns"][0], tree["columns"][1], tree["rows"], tree["whole"]]


def norm_and_clipped() -> tuple[torch.Tensor, list[torch.Tensor]]:
    tree = shards()
    norm = pmod.global_norm(tree, SPECS)
    gradients = torch.autograd.grad(norm, leaves(tree))
    return norm.detach(), list(gradients)


def test_global_norm() -> None:
    """Of the whole tensors, whatever is cut along what; and its gradient, x / norm, on every shard."""
    flat = torch.cat([x.reshape(-1) for x in leaves(whole_tree())])
    for norm, gradients in pmod.simulate(norm_and_clipped, data=2, model=2):
        torch.testing.assert_close(norm, flat.norm(), rtol=1e-12, atol=0)
        whole = {tuple(g.shape): g for g in gradients}
        torch.testing.assert_close(whole[(3,)], whole_tree()["whole"] / flat.norm(), rtol=1e-12, atol=0)
    alone = torch.cat([g.reshape(-1) for g in pmod.simulate(norm_and_clipped, data=1, model=1)[0][1]])
    torch.testing.assert_close(alone, flat / flat.norm(), rtol=1e-12, atol=0)


def test_global_norm_of_other_dtypes() -> None:
    def norms() -> list[Any]:
        half = pmod.global_norm([torch.full((4096,), 8.0, dtype=torch.float16)], P("model"))
        mixed = pmod.global_norm([torch.tensor([3.0 + 4.0j]), torch.tensor([12.0])], [P(), P()])
        return [half, mixed, pmod.global_norm({}, P())]

    for half, mixed, nothing in pmod.simulate(norms, model=4):
        assert half.item() == 1024 and half.dtype == torch.float32  # 512**2 and more, which 16 bits do not hold
        assert mixed.item() == 13 and nothing.item() == 0


def entered() -> tuple[list[torch.Tensor], list[str], bool]:
    tree = shards()
    inside = pmod.pvary_params(tree, SPECS)
    place = pmod.axis_index(("data", "model")) + 1
    with pmod.trace() as t:
        (sum(x.sum() for x in leaves(inside)) * place).backward()
    sent = [str(event.axis) for event in t.events if event.nbytes]
    return [x.grad for x in leaves(tree)], sent, list(inside) == list(tree)


def test_enter() -> None:
    """Gradients are summed over the axes that a spec leaves out, those that leave out the same in one message."""
    for rank, (gradients, sent, in_order) in enumerate(pmod.simulate(entered, data=2, model=2)):
        data, model = divmod(rank, 2)
        wanted = {"columns 0": (2 * data + 1) + (2 * data + 2), "columns 1": rank + 1,
                  "rows": (model + 1) + (model + 3), "whole": 10}  # fmt: skip
        for gradient, value in zip(gradients, wanted.values(), strict=True):
            assert torch.equal(gradient, torch.full_like(gradient, value))
        assert sorted(sent) == sorted(["model", "data", str(("data", "model"))]) and in_order


def messages_of_enter() -> int:
    tree = {str(i): torch.ones(3, requires_grad=True) for i in range(5)}
    inside = pmod.pvary_params(tree, P())
    with pmod.trace() as t:
        sum(x.sum() for x in inside.values()).backward()  # type: ignore[union-attr]
    return sum(event.nbytes > 0 for event in t.events)


def test_enter_is_fused() -> None:
    assert pmod.simulate(messages_of_enter, data=2) == [1, 1]


def test_trees_that_do_not_fit() -> None:
    def wrong() -> None:
        pmod.pvary_params({"a": torch.ones(1)}, {"b": P()})

    with pytest.raises(pmod.ArgumentError) as raised:
        pmod.simulate(wrong, data=1)
    assert str(raised.value).startswith(
        "pmod.pvary_params(axis='data') at (data=0): tree is a dict with the keys ['a'] and its specs are a dict with "
        "the keys ['b'].\nSpecs are a P for all that is below it, or have the structure of what they are for."
    )
    with pytest.raises(pmod.ArgumentError, match=r"tree\['a'\] is a int"):
        pmod.simulate(lambda: pmod.global_norm({"a": 1}, P()), data=1)


# --- slices of files ------------------------------------------------------------------------------


def as_memmap(whole: np.ndarray[Any, Any], folder: Path) -> Any:
    np.save(folder / "x.npy", whole)
    return np.load(folder / "x.npy", mmap_mode="r")


def as_h5py(whole: np.ndarray[Any, Any], folder: Path) -> Any:
    file = h5py.File(folder / "x.h5", "w")
    return file.create_dataset("x", data=whole, chunks=(2, 2))


@pytest.mark.parametrize("stored", [as_memmap, as_h5py])
@pytest.mark.parametrize("mesh", [{"data": 3}, {"data": 2, "model": 3}, {"data": 8}], ids=str)
def test_slices_of_a_file(mesh: dict[str, int], stored: Any, tmp_path: Path) -> None:
    """What the ranks read is the whole, each element as often as it is held."""
    whole = np.arange(5 * 7).reshape(5, 7)
    array = stored(whole, tmp_path)
    spec = P("data", "model") if "model" in mesh else P(None, "data")

    def read() -> tuple[tuple[slice, ...], np.ndarray[Any, Any]]:
        own = pmod.local_slice(array.shape, spec)
        shard = torch.from_numpy(whole)
        for dim, name in enumerate(spec):
            shard = pmod.shard(shard, name, dim=dim) if name else shard
        assert np.array_equal(array[own], shard.numpy())
        return own, np.array(array[own])

    seen = np.zeros_like(whole)
    for own, part in pmod.simulate(read, **mesh):
        seen[own] += 1
        assert np.array_equal(whole[own], part)
    assert (seen == 1).all()


def test_slices_with_sizes_and_without_fit() -> None:
    def slices() -> Any:
        return pmod.local_slice((4, 2), P("data", sizes={0: (1, 3)}))

    assert pmod.simulate(slices, data=2) == [(slice(0, 1), slice(0, 2)), (slice(1, 4), slice(0, 2))]
    with pytest.raises(pmod.ShapeError, match="the spec has 2 entries and the tensor 1 dims"):
        pmod.simulate(lambda: pmod.local_slice((4,), P(None, "data")), data=2)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: pmod.local_slice((4, 3), "data"), pmod.ArgumentError, "local_slice at (data=0): spec is 'data', a"),
        (lambda: pmod.local_slice(4, P("data")), pmod.ShapeError, "local_slice: shape is 4."),
        (lambda: pmod.local_slice((-4,), P("data")), pmod.ShapeError, "local_slice: shape is (-4,)."),
        (lambda: pmod.local_slice((4.0,), P("data")), pmod.ShapeError, "local_slice: shape is (4.0,)."),
        (lambda: pmod.local_slice((4,), P(), mesh="x"), pmod.ArgumentError, "local_slice: mesh is a str."),
        (lambda: pmod.pvary_params({}, P(), mesh="x"), pmod.ArgumentError, "pvary_params: mesh is a str."),
        (lambda: pmod.shard_map(abs, mesh="x", in_specs=P(), out_specs=P())(1), pmod.ArgumentError, "mesh is a str."),
    ],
)
def test_wrong_arguments(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        pmod.simulate(call, data=2)
    assert text in str(raised.value)


# --- DTensors and checkpoints ---------------------------------------------------------------------


def as_dtensors_and_back() -> None:
    tree = shards()
    held = pmod.to_dtensors(tree, SPECS)
    for x, whole in zip(leaves(held), leaves(whole_tree()), strict=True):
        assert isinstance(x, DTensor)
        torch.testing.assert_close(x.full_tensor(), whole, rtol=0, atol=0)
    for x, y in zip(leaves(pmod.from_dtensors(held)), leaves(tree), strict=True):
        assert x.data_ptr() == y.data_ptr() and torch.equal(x, y)
    # lengths that DTensor does not cut
    own = torch.ones(1 + 2 * pmod.axis_index("data"))
    with pytest.raises(pmod.ShapeError, match=r"dim 0 is cut in \(1, 3\), and DTensor cuts 4 in \(2, 2\)"):
        pmod.to_dtensors(own, P("data"))


def test_dtensors() -> None:
    # 9 elements on 2 x 2 ranks: 5 + 4 along the first axis, then 3, 2, 2, 2
    spmd.launch(as_dtensors_and_back, data=2, model=2)


def claims_of_one_value() -> list[str]:
    """A leaf that differs along an axis that its spec leaves out, and one that differs along an axis that it names."""
    mesh = pmod.current_mesh()
    x, y = mesh.axis_index("x"), mesh.axis_index("y")
    state = {"same": torch.ones(2), "rows": torch.full((1,), float(x)), "stray": torch.tensor([1.0, float(y == 1)])}
    specs = {"same": P(), "rows": P("x"), "stray": P("x")}
    texts: list[str] = []
    for f in (pmod.to_dtensors, pmod.global_norm):
        f(state, specs)  # not looked at without debug
        with pmod.debug(), pytest.raises(pmod.MismatchError) as raised:
            f(state, specs)
        texts.append(str(raised.value))
        with pmod.debug():
            f({**state, "stray": torch.ones(2)}, specs)
            f({**state, "stray": torch.ones(2) + y}, {**specs, "stray": P(("x", "y"))})
    return texts


def check_claims(found: list[list[str]]) -> None:
    for rank, texts in enumerate(found):
        for name, text in zip(("to_dtensors", "global_norm"), texts, strict=True):
            x, y = divmod(rank, 2)
            ranks = [2 * x, 2 * x + 1]
            assert text.startswith(
                f"pmod.{name}(axis='y') at (x={x}, y={y}): tree['stray'][1] goes from 0 to 1 over the ranks, "
                f"a difference of 1, but its spec leaves 'y' out, so ranks {ranks} should hold one value.\n"
            )


def test_under_debug_a_leaf_is_one_value_where_its_spec_says_so() -> None:
    check_claims(spmd.launch(claims_of_one_value, x=2, y=2))


def global_norm_of_what_differs() -> str:
    with pmod.debug(), pytest.raises(pmod.MismatchError) as raised:
        pmod.global_norm(torch.ones(2) + pmod.axis_index("x"), P())
    return str(raised.value)


def test_under_debug_simulated_ranks_say_the_same() -> None:
    texts = pmod.simulate(global_norm_of_what_differs, x=3)
    assert all("tree[0] goes from 1 to 3 over the ranks" in text for text in texts), texts


TWO_AXES = [P(("data", "model")), P(None, ("data", "model"))]


def over_two_axes(length: int) -> None:
    """shard, local_slice, shard_map and unshard cut as DTensor does: along one axis, then each part along the other."""
    for spec in TWO_AXES:
        dim = len(spec) - 1
        shape = (2, length) if dim else (length, 2)
        whole = torch.arange(2.0 * length).reshape(shape)
        placements = (Shard(dim), Shard(dim))
        mine = distribute_tensor(whole, pmod.current_mesh().device_mesh, placements).to_local()
        axis = ("data", "model")
        assert torch.equal(mine, pmod.shard(whole, axis, dim=dim)) and torch.equal(
            mine, whole[pmod.local_slice(shape, spec)]
        )
        assert torch.equal(whole, pmod.unshard(mine, axis, dim=dim, length=length))
        held = pmod.to_dtensors(mine, spec)
        assert held.placements == placements and torch.equal(held.to_local(), mine)
        seen: list[torch.Tensor] = []
        y = pmod.shard_map(lambda x, seen=seen: seen.append(x) or 2 * x, in_specs=spec, out_specs=spec)(whole)
        assert torch.equal(seen[0], mine) and torch.equal(y, 2 * whole)


@pytest.mark.parametrize("sizes", [{"data": 2, "model": 2}, {"data": 1, "model": 3}, {"data": 3, "model": 1}], ids=str)
def test_over_two_axes(sizes: dict[str, int]) -> None:
    for length in (1, 2, 5, 6, 9, 13):
        spmd.launch(over_two_axes, length, **sizes)


def test_what_counts_as_two_axes() -> None:
    """A tuple, and a sub-mesh of two axes, cut one axis after the other; an axis that was flattened cuts once."""

    def lengths() -> list[int]:
        mesh, whole = pmod.current_mesh(), torch.arange(9)
        one = mesh.flatten(("x", "y"), "xy")
        axes = [("x", "y"), ("y", "x"), mesh["x", "y"], mesh, one["xy"], one.split("xy", a=2, b=3)]
        axes += [mesh.rename(x="y", y="x")["y", "x"]]
        return [len(pmod.shard(whole, axis)) for axis in axes]

    cuts = [pmod.split_sizes(9, cut) for cut in ((2, 3), (3, 2), (2, 3), (2, 3), 6, (2, 3), (2, 3))]
    found = pmod.simulate(lengths, x=2, y=3)
    assert cuts[0] == (2, 2, 1, 2, 2, 0) and cuts[1] == (2, 1, 2, 1, 2, 1) and cuts[4] == (2, 2, 2, 2, 1, 0)
    for number, cut in enumerate(cuts):
        held = sorted(lengths[number] for lengths in found)
        assert held == sorted(cut) and sum(held) == 9
    assert [lengths[0] for lengths in found] == list(cuts[0]) and [lengths[4] for lengths in found] == list(cuts[4])


def save(folder: str, specs: dict[str, Any]) -> None:
    dcp.save(pmod.to_dtensors(shards(), specs), checkpoint_id=folder)


def load(folder: str) -> list[torch.Tensor]:
    """On a mesh of another shape: into the shards themselves."""
    tree = shards()
    with torch.no_grad():
        for x in leaves(tree):
            x.zero_()
    dcp.load(pmod.to_dtensors(tree, SPECS), checkpoint_id=folder)
    for x, y in zip(leaves(tree), leaves(shards()), strict=True):
        assert torch.equal(x, y)
    return [x.detach() for x in leaves(tree)]


@pytest.mark.parametrize(("saved", "loaded"), list(itertools.permutations([(2, 1), (2, 2), (1, 4)], 2)), ids=str)
def test_checkpoints_load_on_another_mesh(saved: tuple[int, int], loaded: tuple[int, int], tmp_path: Path) -> None:
    spmd.launch(save, str(tmp_path), SPECS, data=saved[0], model=saved[1])
    spmd.launch(load, str(tmp_path), data=loaded[0], model=loaded[1])


# --- a shard with its surroundings --------------------------------------------------------------------------------

WINDOWS: list[tuple[P, dict[int, Any], Any]] = [
    (P("data"), {0: 1}, "zeros"),
    (P("data"), {0: 1}, "periodic"),
    (P("data"), {0: (0, 2), 1: 2}, "replicate"),
    (P("data", "model"), {0: (2, 1), -1: (3, 0)}, {0: "reflect", -1: "periodic"}),
    (P(None, "data"), {0: 2}, "periodic"),
    (P("data", sizes={0: (0, 1, 4)}), {0: (5, 3)}, "periodic"),
    (P("data", sizes={0: (0, 1, 4)}), {0: 4}, "reflect"),
    (P("data", sizes={0: (0, 1, 4)}), {0: 7}, "zeros"),
    (P("data", sizes={0: (5, 0, 0)}), {0: 0}, "zeros"),
]  # fmt: skip


def as_tensor(whole: np.ndarray[Any, Any], folder: Path) -> torch.Tensor:
    return torch.from_numpy(whole)


@pytest.mark.parametrize("stored", [as_tensor, as_memmap, as_h5py])
@pytest.mark.parametrize(("spec", "halo", "boundary"), WINDOWS, ids=str)
def test_a_block_is_what_halo_exchange_gives(spec: P, halo: Any, boundary: Any, stored: Any, tmp_path: Path) -> None:
    whole = np.arange(5 * 7).reshape(5, 7) + 1
    array = stored(whole, tmp_path)

    def read() -> None:
        block = pmod.local_slice(array.shape, spec, halo=halo, boundary=boundary)
        expected = torch.from_numpy(whole)[pmod.local_slice(array.shape, spec)]
        for dim, width in halo.items():
            name = spec.entries[dim] if dim % 2 < len(spec.entries) else None
            ends = boundary[dim] if isinstance(boundary, dict) else boundary
            # a whole dim has surroundings too: those of the one shard that there is
            axis = name or pmod.current_mesh().split("data", one=1, rest=-1)["one"]
            expected = pmod.halo_exchange(expected, axis, dim=dim, width=width, boundary=ends)
        found = block.read(array)
        assert type(found) is (torch.Tensor if stored is as_tensor else np.ndarray)
        assert block.shape == tuple(found.shape)
        assert torch.equal(torch.as_tensor(found), expected)

    sizes = {"data": 3, "model": 2} if "model" in spec.axes else {"data": 3}
    pmod.simulate(read, **sizes)


def test_slices_of_a_block() -> None:
    """A periodic window that wraps is read in two slices, and no row of the file that is not in it is read."""
    read: list[Any] = []

    class Spied(np.ndarray[Any, Any]):
        def __getitem__(self, index: Any) -> Any:
            found = super().__getitem__(index)
            read.append(found.size)
            return np.asarray(found)

    def slices(boundary: str) -> Any:
        return pmod.local_slice((6, 2), P("data"), halo={0: 1}, boundary=boundary).slices

    last = (slice(0, 2),)
    assert pmod.simulate(slices, "periodic", data=2) == [
        ((slice(5, 6), slice(0, 4)), last), ((slice(2, 6), slice(0, 1)), last)
    ]  # fmt: skip
    assert pmod.simulate(slices, "zeros", data=2) == [((slice(0, 4),), last), ((slice(2, 6),), last)]
    block = pmod.simulate(lambda: pmod.local_slice((6, 2), P("data"), halo={0: 1}, boundary="periodic"), data=2)[0]
    whole = np.arange(12).reshape(6, 2)
    assert block.read(whole.view(Spied)).tolist() == [[10, 11], *whole[:4].tolist()]
    assert sum(read) == 10


def test_a_masked_array_keeps_its_mask() -> None:
    whole = np.ma.masked_equal(np.arange(6), 5)
    block = pmod.simulate(lambda: pmod.local_slice((6,), P("data"), halo={0: 1}, boundary="periodic"), data=2)[0]
    assert block.read(whole).mask.tolist() == [True, False, False, False, False]
    with pytest.raises(pmod.ShapeError, match=r"array has the shape \(5,\) and the whole \(6,\)"):
        block.read(whole[:5])


def test_a_block_of_a_tensor_is_differentiable() -> None:
    x = torch.arange(4.0, requires_grad=True)
    block = pmod.simulate(lambda: pmod.local_slice((4,), P("data"), halo={0: 1}, boundary="replicate"), data=2)[0]
    block.read(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2, 1, 1, 0]


@pytest.mark.parametrize(
    ("halo", "boundary", "error", "text"),
    [
        (1, "zeros", pmod.ArgumentError, "at (data=0): halo is 1.\nPass a mapping, such as {0: 1}."),
        ({2: 1}, "zeros", pmod.ShapeError, "halo names the dim 2 and shape has 2 dims."),
        ({True: 1}, "zeros", pmod.ShapeError, "halo names the dim True and shape has 2 dims."),
        ({0: 1, -2: 1}, "zeros", pmod.ShapeError, "halo names the dim 0 twice, as -2 too."),
        ({0: -1}, "zeros", pmod.ShapeError, "halo[0] is -1.\nPass an int of 0 or more, or two"),
        ({0: 1}, "periodc", pmod.ArgumentError, "boundary is 'periodc'; did you mean 'periodic'?\nPass one of "),
        ({0: 1}, {1: "zeros"}, pmod.ArgumentError, "boundary names the dims [1] and halo [0]."),
        ({0: 5}, "periodic", pmod.ShapeError, "halo[0] is 5 with boundary='periodic', but the whole has 4 rows."),
        ({0: (0, 4)}, "reflect", pmod.ShapeError, "the whole has 4 rows.\nPass a width of at most 3, or "),
    ],
)  # fmt: skip
def test_wrong_halos(halo: Any, boundary: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        pmod.simulate(lambda: pmod.local_slice((4, 2), P("data"), halo=halo, boundary=boundary), data=2)
    assert text in str(raised.value) and "pmod.local_slice at (data=0): " in str(raised.value)


def test_local_coords() -> None:
    """They are where local_slice reads, so that what is computed from them is what is read."""
    spec = P("data", None, ("data", "model")[1:], sizes={0: (3, 1)})

    def positions() -> None:
        own = pmod.local_slice((4, 2, 5), spec)
        found = pmod.local_coords((4, 2, 5), spec)
        whole = torch.arange(4 * 2 * 5).reshape(4, 2, 5)
        i, j, k = torch.meshgrid(*found, indexing="ij")
        assert torch.equal(whole[own], 10 * i + 5 * j + k)
        assert {(x.dtype, x.device.type) for x in found} == {(torch.int64, "cpu")}

    pmod.simulate(positions, data=2, model=2)
    with pytest.raises(pmod.ArgumentError, match=r"pmod.local_coords at \(data=0\): spec is 'data', a str"):
        pmod.simulate(lambda: pmod.local_coords((4,), "data"), data=2)
