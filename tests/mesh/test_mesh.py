"""`Mesh` and `make_mesh` with topologies given by hand: nothing is sent, and any rank's point of view is taken."""

from __future__ import annotations

import copy
import gc
import math
import os
import pickle
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import pmod
from pmod._mesh import axis as _axis
from pmod._mesh import mesh as _mesh
from pmod._mesh.axis import Axis
from pmod._mesh.sizes import parse_sizes
from pmod._ranks import world
from tests.lib import spmd

ROOT = Path(pmod.__file__).parents[1]


@pytest.fixture(autouse=True)
def _nothing_is_connected() -> Iterator[None]:
    yield
    assert not dist.is_initialized()
    pmod.shutdown()  # forget the last topology


def at(rank: int, world_size: int, **more: object) -> pmod.Topology:
    return pmod.Topology(rank=rank, world_size=world_size, **more)  # type: ignore[arg-type]


def mesh_at(rank: int, **sizes: int) -> pmod.Mesh:
    return pmod.make_mesh(sizes, topology=at(rank, math.prod(sizes.values())))


def refused(call: Callable[[], object], text: str, kind: type[Exception] = pmod.AxisError) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert str(caught.value) == text


# --- make_mesh ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs", "shape"),
    [
        ((), {}, {"data": 8}),
        ((None,), {}, {"data": 8}),
        (({},), {}, {"data": 8}),
        ((), {"data": 8}, {"data": 8}),
        ((), {"data": -1}, {"data": 8}),
        ((), {"data": -1, "model": 2}, {"data": 4, "model": 2}),
        ((), {"data": 2, "space": -1, "model": 2}, {"data": 2, "space": 2, "model": 2}),
        ((), {"data": 8, "model": -1}, {"data": 8, "model": 1}),
        ((), {"data": 1, "model": 8, "last": 1}, {"data": 1, "model": 8, "last": 1}),
        (({"no identifier": 4, "1": 2},), {}, {"no identifier": 4, "1": 2}),
        (({"data": 4},), {"model": 2}, {"data": 4, "model": 2}),
        (({"data": -1},), {"model": 2}, {"data": 4, "model": 2}),
        (({"ranks": 4, "timeout": 2},), {}, {"ranks": 4, "timeout": 2}),  # names that are keywords of make_mesh
    ],
)
def test_sizes_are_given_by_keyword_or_as_a_mapping_and_one_may_be_worked_out(args, kwargs, shape):
    mesh = pmod.make_mesh(*args, **kwargs, topology=at(5, 8))
    assert mesh.shape == shape
    assert list(mesh.shape) == list(shape)  # the order, too
    assert mesh.axis_names == tuple(shape)
    assert mesh.size == 8
    assert mesh.ranks.tolist() == np.arange(8).reshape(list(shape.values())).tolist()


def test_one_process_without_a_launcher(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "PMI", "PMOD")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    mesh = pmod.make_mesh()
    assert mesh.shape == {"data": 1} and mesh.coords == {"data": 0}
    assert mesh.topology == pmod.Topology.detect()
    assert pmod.make_mesh(data=-1, model=1).shape == {"data": 1, "model": 1}
    refused(
        lambda: pmod.make_mesh(model=2),
        "pmod.make_mesh: model=2 need 2 ranks, but the world has 1.\n"
        "Make the sizes multiply to 1; -1 stands for the rest.",
    )


@pytest.mark.parametrize(
    ("ranks", "shape", "expected"),
    [
        (range(4), {"a": 2, "b": 2}, [[0, 1], [2, 3]]),
        ([4, 5, 6, 7], {"a": 2, "b": 2}, [[4, 5], [6, 7]]),
        (range(1, 8, 2), {"a": 2, "b": 2}, [[1, 3], [5, 7]]),
        ([6, 0, 3, 5], {"a": 2, "b": 2}, [[6, 0], [3, 5]]),
        ([3, 2, 1, 0], {"a": 4}, [3, 2, 1, 0]),
        ([2], {"a": 1}, [2]),
        (np.array([[0, 4], [1, 5]]), {"a": 2, "b": 2}, [[0, 4], [1, 5]]),
        (torch.arange(2, 5), {"a": 3}, [2, 3, 4]),
    ],
)
def test_ranks_choose_a_part_of_the_world_and_its_order(ranks, shape, expected):
    for rank in range(8):
        mesh = pmod.make_mesh(shape, ranks=ranks, topology=at(rank, 8))
        assert mesh.ranks.tolist() == expected
        assert mesh.size == np.size(expected)
        places = np.argwhere(np.asarray(expected) == rank)
        if len(places):
            assert mesh.coords == dict(zip(shape, places[0].tolist(), strict=True))
        else:
            assert mesh.coords is None
        assert mesh.coords == mesh.coords_of(rank)


def test_on_a_rank_outside_only_what_needs_a_place_raises():
    mesh = pmod.make_mesh(data=2, model=2, ranks=[4, 5, 6, 7], topology=at(1, 8))
    assert mesh.coords is None
    assert mesh.axis_size("model") == 2 and mesh.axis_size(("data", "model")) == 4
    assert mesh.coords_of(6) == {"data": 1, "model": 0} and mesh.coords_of(1) is None
    assert repr(mesh) == "Mesh(data=2, model=2) at (outside)"
    assert "outside" in str(mesh) and "outside" in mesh._repr_html_()
    assert mesh.flatten(("data", "model"), "all").ranks.tolist() == [4, 5, 6, 7]
    assert mesh.split("data", a=2, b=1).coords is None
    assert mesh == pmod.make_mesh(data=2, model=2, ranks=[4, 5, 6, 7], topology=at(5, 8))
    right = "Call it only on ranks that belong to the mesh (those where mesh.coords is not None)."
    for function, call in {
        "Mesh.axis_index": lambda: mesh.axis_index("model"),
        "Mesh.group": lambda: mesh.group("model"),
        "Mesh.__getitem__": lambda: mesh["model"],
    }.items():
        given_ = f"rank 1 is outside the mesh {{'data': 2, 'model': 2}} over ranks [4, 5, 6, 7].\n{right}"
        refused(call, f"pmod.{function}(axis='model'): {given_}")
    large = pmod.make_mesh(data=-1, ranks=range(2, 1000), topology=at(1, 1000))
    refused(
        lambda: large["data"],
        "pmod.Mesh.__getitem__(axis='data'): rank 1 is outside the mesh {'data': 998} over ranks [2, 3, ..., 999].\n"
        + right,
    )


MULTIPLY = "Make the sizes multiply to 8; -1 stands for the rest."
INTS = "Sizes are ints of 1 or more; one may be -1."


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {"data": 3}, f"data=3 need 3 ranks, but the world has 8.\n{MULTIPLY}"),
        ((), {"data": 1}, f"data=1 need 1 rank, but the world has 8.\n{MULTIPLY}"),
        ((), {"data": 4, "model": 4}, f"data=4, model=4 need 16 ranks, but the world has 8.\n{MULTIPLY}"),
        ((), {"a": -1, "b": 3}, f"a=-1, b=3 need a multiple of 3 ranks, but the world has 8.\n{MULTIPLY}"),
        ((), {"a": -1, "b": 16}, f"a=-1, b=16 need a multiple of 16 ranks, but the world has 8.\n{MULTIPLY}"),
        ((), {"a": -1, "b": -1}, "a=-1, b=-1: two sizes are -1.\nLeave one size to be worked out."),
        ((), {"data": 0}, f"data=0 is not a size.\n{INTS}"),
        ((), {"data": -2}, f"data=-2 is not a size.\n{INTS}"),
        ((), {"data": True, "model": 8}, f"data=True is not a size.\n{INTS}"),
        ((), {"data": 8.0}, f"data=8.0 is not a size.\n{INTS}"),
        ((), {"data": "8"}, f"data='8' is not a size.\n{INTS}"),
        ((), {"data": None}, f"data=None is not a size.\n{INTS}"),
        (({"": 8},), {}, "'' is not an axis name.\nName axes with non-empty strings."),
        (({0: 8},), {}, "0 is not an axis name.\nName axes with non-empty strings."),
        (({"data": 8},), {"data": 1}, "axis 'data' is given twice.\nGive each axis once."),
        ((), {"timeout": 0}, "timeout is 0.\nPass seconds, a number above 0."),
        ((), {"timeout": -1.5}, "timeout is -1.5.\nPass seconds, a number above 0."),
        ((), {"timeout": math.nan}, "timeout is nan.\nPass seconds, a number above 0."),
        ((), {"ranks": [0, 8]}, "ranks holds 8.\nThe world has ranks 0 to 7."),
        ((), {"ranks": [-1]}, "ranks holds -1.\nThe world has ranks 0 to 7."),
        ((), {"ranks": [1, 2, 1]}, "ranks holds a rank twice.\nList each rank that the mesh covers once."),
        ((), {"ranks": []}, "ranks is empty.\nList each rank that the mesh covers once."),
        ((), {"ranks": [1, 2, 3], "a": 2},
         "a=2 need 2 ranks, but ranks lists 3.\nMake the sizes multiply to 3; -1 stands for the rest."),
    ],
)  # fmt: skip
def test_what_makes_no_mesh_is_refused(args, kwargs, text):
    refused(lambda: pmod.make_mesh(*args, **kwargs, topology=at(0, 8)), f"pmod.make_mesh: {text}")


@pytest.mark.parametrize("text", ["data=2,model=-1", "data=2 model=-1", " data=2,  model=-1 "])
def test_sizes_in_a_text(text):
    assert list(parse_sizes(text).items()) == [("data", 2), ("model", -1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not an axis"),
        ("data=2,model", "'model' is not an axis"),
        ("=2", "'=2' is not an axis"),
        ("data=", "'data=' is not an axis"),
        ("data=2.0", "'data=2.0' is not an axis"),
        ("data=--1", "'data=--1' is not an axis"),
        ("data=2=2", "'data=2=2' is not an axis"),
        ("data=2,data=3", "axis 'data' is given twice"),
        ("data=2,timeout=40", "'timeout=40' is a deadline in seconds, not an axis"),
    ],
)
def test_a_text_that_holds_no_sizes_is_refused(text, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_sizes(text)


@pytest.mark.parametrize("timeout", ["5", math.inf, [1]])
def test_a_timeout_that_is_no_number_of_seconds_is_refused_by_pmod(timeout):
    with pytest.raises(pmod.PmodError):
        pmod.make_mesh(timeout=timeout, topology=at(0, 8))


@pytest.mark.parametrize("ranks", ["ab", 3, [0.5, 1.5], [[0, 1], [2]]])
def test_ranks_that_are_no_list_of_ints_are_refused_by_pmod(ranks):
    with pytest.raises(pmod.PmodError):
        pmod.make_mesh(ranks=ranks, topology=at(0, 8))


@pytest.mark.parametrize("text", ["soon", "", "0", "-3", "nan", "inf"])
def test_a_PMOD_TIMEOUT_that_is_no_number_of_seconds_is_refused(monkeypatch, text):
    monkeypatch.setenv("PMOD_TIMEOUT", text)
    refused(
        lambda: pmod.make_mesh(topology=at(0, 8)),
        f"pmod.make_mesh: PMOD_TIMEOUT is {text!r}.\nSet it to seconds, a number above 0.",
        pmod.TopologyError,
    )


# --- sub-meshes and axes --------------------------------------------------------------------------------------------


def test_sub_meshes_and_tuples_in_any_order():
    for rank in range(24):
        mesh = mesh_at(rank, a=2, b=3, c=4)
        i, j, k = mesh.coords.values()
        all_ranks = np.arange(24).reshape(2, 3, 4)
        assert (i, j, k) == np.unravel_index(rank, (2, 3, 4))
        assert mesh["b"].ranks.tolist() == all_ranks[i, :, k].tolist()
        assert mesh["b"].axis_names == ("b",) and mesh["b"].coords == {"b": j}
        assert mesh["a", "c"].ranks.tolist() == all_ranks[:, j, :].tolist()
        assert mesh["c", "a"].ranks.tolist() == all_ranks[:, j, :].T.tolist()
        assert mesh["c", "a"].shape == {"c": 4, "a": 2}
        assert mesh["c", "b", "a"].ranks.tolist() == all_ranks.T.tolist()
        assert mesh["a", "b", "c"] == mesh
        assert mesh[("b",)] == mesh["b"]
        assert mesh["a", "c"]["c"] == mesh["c"]
        # an axis that is a tuple is the flattened group, its first name slowest
        assert mesh.axis_index(("c", "a")) == k * 2 + i
        assert mesh.axis_index(("a", "c")) == i * 4 + k
        assert mesh.axis_index(mesh["c", "a"]) == k * 2 + i
        assert mesh.axis_index("b") == mesh.axis_index(("b",)) == mesh.axis_index(mesh["b"]) == j
        assert mesh.axis_size(("c", "a")) == mesh.axis_size(mesh["c", "a"]) == 8
        assert mesh.bind(("c", "a"), "test").ranks == all_ranks[:, j, :].T.reshape(-1).tolist()
        assert mesh.bind(["c", "a"], "test").ranks == mesh.bind(("c", "a"), "test").ranks


def test_sub_meshes_beside_a_flattened_axis():
    whole = np.arange(24).reshape(2, 3, 4)
    for rank in range(24):
        i, j, k = np.unravel_index(rank, (2, 3, 4))
        flat = mesh_at(rank, a=2, b=3, c=4).flatten(("c", "a"), "z")  # strides 1 and 12
        assert flat.coords == {"z": 2 * k + i, "b": j}
        assert flat["b"].ranks.tolist() == whole[i, :, k].tolist()
        assert flat["z"].ranks.tolist() == whole[:, j, :].T.reshape(-1).tolist()
        assert flat["z"].flatten(("z",), "y").coords_of(rank) == {"y": 2 * k + i}
        text = str(flat)
        assert f"[{rank}]" in text.replace("|", " ").split()


def test_a_tuple_of_no_axes_is_this_rank_alone():
    mesh = mesh_at(3, a=2, b=2)
    assert (mesh.axis_size(()), mesh.axis_index(())) == (1, 0)
    assert mesh[()].ranks.tolist() == 3
    assert mesh[()].shape == {}


NO_NAME = "Pass a name of ('data', 'model'), a tuple of names, or a sub-mesh such as mesh['model']."


@pytest.mark.parametrize(
    ("axis", "text"),
    [
        ("modle", "(axis='modle') at (data=0, model=1): no axis 'modle'; did you mean 'model'?\n"
                  "The mesh has {'data': 2, 'model': 2}."),
        ("batch", "(axis='batch') at (data=0, model=1): no axis 'batch'.\nThe mesh has {'data': 2, 'model': 2}."),
        ("", "(axis='') at (data=0, model=1): no axis ''.\nThe mesh has {'data': 2, 'model': 2}."),
        (("data", "dta"), "(axis=('data', 'dta')) at (data=0, model=1): no axis 'dta'; did you mean 'data'?\n"
                          "The mesh has {'data': 2, 'model': 2}."),
        (("data", "data"), "(axis=('data', 'data')) at (data=0, model=1): an axis is named twice.\n"
                           "Name each axis once."),
        (0, f" at (data=0, model=1): axis is 0, a int.\n{NO_NAME}"),
        (None, f" at (data=0, model=1): axis is None, a NoneType.\n{NO_NAME}"),
        (("data", 1), f" at (data=0, model=1): axis is ('data', 1), a tuple.\n{NO_NAME}"),
        ({"data"}, f" at (data=0, model=1): axis is {{'data'}}, a set.\n{NO_NAME}"),
        (b"data", f" at (data=0, model=1): axis is b'data', a bytes.\n{NO_NAME}"),
    ],
)  # fmt: skip
def test_what_names_no_axis_is_refused_by_every_method(axis, text):
    mesh = mesh_at(1, data=2, model=2)
    for function, method in {
        "Mesh.__getitem__": mesh.__getitem__,
        "Mesh.axis_index": mesh.axis_index,
        "Mesh.axis_size": mesh.axis_size,
        "Mesh.group": mesh.group,
    }.items():
        refused(lambda method=method: method(axis), f"pmod.{function}{text}")


def test_a_sub_mesh_is_taken_where_the_message_says_so():
    mesh = mesh_at(1, data=2, model=2)
    assert mesh[mesh["model"]] == mesh["model"]


# --- flatten, split, rename -------------------------------------------------------------------------------------------


def test_flatten():
    mesh = mesh_at(7, a=2, b=3, c=4)
    whole = np.arange(24).reshape(2, 3, 4)
    cases = {
        ("a", "b"): (("z", "c"), whole.reshape(6, 4)),
        ("b", "c"): (("a", "z"), whole.reshape(2, 12)),
        ("c", "b"): (("a", "z"), whole.transpose(0, 2, 1).reshape(2, 12)),
        ("b", "a"): (("z", "c"), whole.transpose(1, 0, 2).reshape(6, 4)),
        ("a", "c"): (("z", "b"), whole.transpose(0, 2, 1).reshape(8, 3)),
        ("c", "a"): (("z", "b"), whole.transpose(2, 0, 1).reshape(8, 3)),
        ("c", "a", "b"): (("z",), whole.transpose(2, 0, 1).reshape(24)),
        ("b",): (("a", "z", "c"), whole),
    }
    for axes, (names, ranks) in cases.items():
        flat = mesh.flatten(axes, "z")
        assert flat.axis_names == names
        assert flat.ranks.tolist() == ranks.tolist()
        assert flat.coords == dict(zip(names, np.argwhere(ranks == 7)[0].tolist(), strict=True))
    assert mesh.flatten(("a", "b"), "a").axis_names == ("a", "c")  # a name that is free again
    assert mesh.shape == {"a": 2, "b": 3, "c": 4}  # as it was


def test_split():
    mesh = mesh_at(7, a=2, b=12)
    whole = np.arange(24).reshape(2, 12)
    assert mesh.split("b", c=3, d=4).ranks.tolist() == whole.reshape(2, 3, 4).tolist()
    assert mesh.split("b", c=3, d=-1).shape == {"a": 2, "c": 3, "d": 4}
    assert mesh.split("b", c=-1, d=2, e=3).shape == {"a": 2, "c": 2, "d": 2, "e": 3}
    assert mesh.split("b", b=-1, c=1).shape == {"a": 2, "b": 12, "c": 1}
    assert mesh.split("a", x=2, y=1).coords == {"x": 0, "y": 0, "b": 7}
    flat = mesh_at(7, a=2, b=3, c=4).flatten(("c", "a"), "z")  # z is 8: 4 of stride 1, then 2 of stride 12
    assert flat.split("z", c=4, a=2).ranks.tolist() == np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1).tolist()
    assert flat.split("z", c=2, d=-1).shape == {"c": 2, "d": 4, "b": 3}  # a cut inside of c
    assert (flat.split("z", c=2, d=4).ranks.reshape(8, 3) == flat.ranks).all()


def test_rename():
    mesh = mesh_at(1, a=2, b=2)
    assert mesh.rename(a="x").shape == {"x": 2, "b": 2}
    assert mesh.rename(a="b", b="a").axis_names == ("b", "a")  # swapped, so the ranks stay
    assert mesh.rename(a="b", b="a").ranks.tolist() == [[0, 1], [2, 3]]
    assert mesh.rename() == mesh
    assert mesh.rename(a="x") != mesh


AT = " at (a=0, b=0)"


@pytest.mark.parametrize(
    ("function", "call", "text"),
    [
        ("flatten", lambda m: m.flatten(("a", "z"), "x"), f"(axis=('a', 'z')){AT}: no axis 'z'.\n"
         "The mesh has {'a': 2, 'b': 6}."),
        ("flatten", lambda m: m.flatten(("a", "a"), "x"), f"(axis=('a', 'a')){AT}: an axis is named twice.\n"
         "Name each axis once."),
        ("flatten", lambda m: m.flatten((), "x"), ": no axis is named.\nName one or more axes of the mesh."),
        ("split", lambda m: m.split("z", x=2), f"(axis=('z',)){AT}: no axis 'z'.\nThe mesh has {{'a': 2, 'b': 6}}."),
        ("split", lambda m: m.split("b", x=4, y=2), ": x=4, y=2 need 8 ranks, but axis 'b' has 6.\n"
         "Make the sizes multiply to 6; -1 stands for the rest."),
        ("split", lambda m: m.split("b", x=-1, y=-1), ": x=-1, y=-1: two sizes are -1.\n"
         "Leave one size to be worked out."),
        ("split", lambda m: m.split("b", x=0), ": x=0 is not a size.\nSizes are ints of 1 or more; one may be -1."),
        ("split", lambda m: m.flatten(("b", "a"), "c").split("c", x=-1, y=3),
         ": a size of 3 cuts across the axes that were flattened into this one.\n"
         "Split it by the sizes that it was flattened from."),
        ("rename", lambda m: m.rename(z="x"), f"(axis=('z',)){AT}: no axis 'z'.\nThe mesh has {{'a': 2, 'b': 6}}."),
    ],
)  # fmt: skip
def test_what_makes_no_new_mesh_is_refused(function, call, text):
    refused(lambda: call(mesh_at(0, a=2, b=6)), f"pmod.Mesh.{function}{text}")


@pytest.mark.parametrize(
    ("function", "call", "text"),
    [
        ("flatten", lambda m: m.flatten(("a",), "b"), "two axes are called 'b'"),
        ("flatten", lambda m: m.flatten(("a",), ""), "'' is not an axis name"),
        ("split", lambda m: m.split("a", b=2), "two axes are called 'b'"),
        ("rename", lambda m: m.rename(a="b"), "two axes are called 'b'"),
        ("rename", lambda m: m.rename(a=1), "1 is not an axis name"),
    ],
)
def test_a_name_that_is_taken_is_refused_by_the_function_that_was_called(function, call, text):
    with pytest.raises(pmod.AxisError) as caught:
        call(mesh_at(0, a=2, b=6))
    assert text in str(caught.value)
    assert str(caught.value).startswith(f"pmod.Mesh.{function}")


def test_a_split_into_nothing_is_refused_whatever_the_size():
    for sizes in ({"a": 2, "b": 2}, {"a": 1, "b": 2}, {"a": 1}):
        with pytest.raises(pmod.AxisError):
            mesh_at(0, **sizes).split("a")


# --- what a mesh says of itself -----------------------------------------------------------------------------------


def test_ranks_are_a_read_only_int64_array():
    listed = pmod.make_mesh(a=2, b=2, ranks=[3, 0, 1, 2], topology=at(1, 4))
    for mesh in (mesh_at(1, a=2, b=2), listed, mesh_at(0, a=1)):
        assert isinstance(mesh.ranks, np.ndarray)
        assert mesh.ranks.dtype == np.int64
        with pytest.raises(ValueError, match="read-only"):
            mesh.ranks[...] = 0


def test_a_mesh_is_frozen():
    mesh = mesh_at(1, a=2, b=2)
    for name in ("axis_names", "topology", "new"):
        with pytest.raises((attrs.exceptions.FrozenInstanceError, AttributeError)):
            setattr(mesh, name, ())
    mesh.shape["a"] = 5  # a copy
    mesh.coords["a"] = 5
    assert mesh.shape == {"a": 2, "b": 2} and mesh.coords == {"a": 0, "b": 1}


def test_topology_and_device():
    topology = at(1, 4, device="cuda:1", num_nodes=2)
    mesh = pmod.make_mesh(a=2, b=2, topology=topology)
    assert mesh.topology is topology and mesh.device == torch.device("cuda:1")
    assert mesh["b"].topology is topology


def test_coords_of():
    mesh = pmod.make_mesh(a=2, b=2, ranks=[1, 3, 5, 7], topology=at(0, 8))
    assert [mesh.coords_of(rank) for rank in (1, 3, 5, 7)] == [{"a": i, "b": j} for i in (0, 1) for j in (0, 1)]
    assert [mesh.coords_of(rank) for rank in (-1, 0, 2, 4, 6, 8, 9, 100)] == [None] * 8
    shuffled = pmod.make_mesh(a=3, ranks=[4, 0, 2], topology=at(0, 5))
    assert [shuffled.coords_of(rank) for rank in range(5)] == [{"a": 1}, None, {"a": 2}, None, {"a": 0}]


def test_repr():
    assert repr(mesh_at(1, a=2, b=2)) == "Mesh(a=2, b=2) at (a=0, b=1)"
    assert repr(mesh_at(1, a=2, b=2)["b"]) == "Mesh(b=2) at (b=1)"


class Balanced(HTMLParser):
    """Checks that tags close in order, and collects the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_pictures_show_every_rank_and_this_one():
    mesh = pmod.make_mesh(data=2, model=3, ranks=[10, 11, 12, 21, 20, 22], topology=at(20, 30))
    text = str(mesh)
    assert len(text.splitlines()) > 2
    words = text.replace("|", " ").split()
    for rank in ("10", "11", "12", "21", "[20]", "22"):
        assert words.count(rank) == 1
    assert "data" in text and "model" in text
    html = mesh._repr_html_()
    shown = Balanced(html).text
    for rank in (10, 11, 12, 21, 20, 22):
        assert shown.count(str(rank)) == 1
    assert "data" in html and "model" in html
    hostile = pmod.make_mesh({"<b>&": 1}, topology=at(0, 1))._repr_html_()
    assert "<b>" not in hostile and "&lt;b&gt;&amp;" in hostile


# --- value semantics --------------------------------------------------------------------------------------------------


def same(*meshes: pmod.Mesh) -> None:
    for mesh in meshes:
        assert mesh == meshes[0] and meshes[0] == mesh
        assert hash(mesh) == hash(meshes[0])
    assert len(set(meshes)) == 1


def test_equal_meshes_made_in_different_ways():
    mesh = mesh_at(1, a=2, b=4)
    same(
        mesh,
        mesh_at(6, a=2, b=4),  # not of the process that asks
        pmod.make_mesh({"a": -1, "b": 4}, topology=at(0, 8)),
        pmod.make_mesh(a=2, b=4, topology=at(0, 100, num_nodes=25), ranks=range(8)),
        pmod.make_mesh(a=2, b=4, topology=at(20, 100), ranks=list(range(8))),
        mesh.flatten(("a", "b"), "c").split("c", a=2, b=4),
        mesh.split("b", c=2, d=2).flatten(("c", "d"), "b"),
        mesh.rename(a="x").rename(x="a"),
        mesh["a", "b"],
        mesh["b", "a"]["a", "b"],
        pmod.make_mesh(b=4, a=2, ranks=[0, 4, 1, 5, 2, 6, 3, 7], topology=at(3, 8))["a", "b"],
        pmod.make_mesh(x=8, ranks=[0, 4, 1, 5, 2, 6, 3, 7], topology=at(3, 8)).split("x", b=4, a=2)["a", "b"],
    )


def test_ranks_in_a_list_and_as_arithmetic_are_equal_where_they_name_the_same():
    listed = pmod.make_mesh(x=4, ranks=[0, 2, 1, 3], topology=at(0, 4))
    same(listed, mesh_at(0, p=2, q=2).flatten(("q", "p"), "x"))
    # the sub-mesh of a listed mesh whose ranks happen to be in order
    same(
        pmod.make_mesh(x=2, y=2, ranks=[3, 1, 0, 2], topology=at(2, 4))["y"].rename(y="z"),
        pmod.make_mesh(z=2, ranks=[0, 2], topology=at(0, 4)),
    )
    same(
        pmod.make_mesh(x=2, y=2, ranks=[5, 4, 0, 1], topology=at(1, 6))["y"],
        pmod.make_mesh(y=2, ranks=[0, 1], topology=at(1, 6)),
    )


def test_meshes_that_differ():
    mesh = mesh_at(0, a=2, b=4)
    others = [
        mesh_at(0, a=4, b=2),
        mesh.rename(a="c"),
        mesh["b", "a"],
        mesh.rename(a="b", b="a"),
        mesh.flatten(("a", "b"), "a"),
        pmod.make_mesh(a=2, b=4, ranks=range(1, 9), topology=at(1, 10)),
        pmod.make_mesh(a=2, b=4, ranks=range(0, 16, 2), topology=at(0, 16)),
        pmod.make_mesh(a=2, b=4, ranks=[0, 1, 2, 3, 4, 6, 5, 7], topology=at(0, 8)),  # same ends
        pmod.make_mesh(a=2, b=4, c=1, topology=at(0, 8)),
    ]
    for other in others:
        assert mesh != other and other != mesh
    assert len({mesh, *others}) == 1 + len(others)
    assert mesh != "mesh" and mesh != {"a": 2, "b": 4}
    assert mesh["b"] != mesh_at(4, a=2, b=4)["b"]  # the rows of two different ranks


def test_a_pickled_mesh_finds_its_own_place(monkeypatch):
    meshes = [
        mesh_at(0, a=2, b=2),
        pmod.make_mesh(a=2, b=2, ranks=[3, 0, 2, 1], topology=at(0, 4)),
        mesh_at(0, a=2, b=2).flatten(("b", "a"), "c"),
    ]
    for rank in range(4):
        monkeypatch.setattr(world.processes(), "launched", at(rank, 4))
        for mesh in meshes:
            loaded = pickle.loads(pickle.dumps(mesh))
            same(mesh, loaded)
            assert loaded.topology == at(rank, 4)
            assert loaded.coords == mesh.coords_of(rank)
            assert loaded.axis_index(loaded.axis_names) == loaded.ranks.reshape(-1).tolist().index(rank)
    monkeypatch.setattr(world.processes(), "launched", at(5, 6))
    assert pickle.loads(pickle.dumps(meshes[0])).coords is None
    row = mesh_at(0, a=2, b=2)["b"]  # the row of rank 0: another rank is outside
    monkeypatch.setattr(world.processes(), "launched", at(2, 4))
    assert pickle.loads(pickle.dumps(row)).coords is None


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: pmod.make_mesh([("a", 2)]), pmod.ArgumentError, "make_mesh: axes is [('a', 2)]."),
        (lambda: pmod.make_mesh(a=1, topology={}), pmod.ArgumentError, "make_mesh: topology is {}."),
        (lambda: mesh_at(0, a=2, b=2).flatten(3, "c"), pmod.AxisError, "Mesh.flatten at (a=0, b=0): axis is 3, a int."),
        (lambda: mesh_at(0, a=2).coords_of("a"), pmod.AxisError, "Mesh.coords_of: rank is 'a'."),
        (lambda: mesh_at(0, a=2).coords_of(0.5), pmod.AxisError, "Mesh.coords_of: rank is 0.5."),
        (lambda: at(0, 1, device="gpu"), pmod.TopologyError, "Topology: device is 'gpu'."),
        (lambda: at(0, 1, launcher=3), pmod.TopologyError, "Topology: launcher is 3."),
        (lambda: at(0, 1, master_addr=3), pmod.TopologyError, "Topology: master_addr is 3."),
    ],
)
def test_odd_arguments(call, error, text):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(f"pmod.{text}\n")


def test_flatten_takes_one_name():
    assert mesh_at(0, data=2, b=2).flatten("data", "c").axis_names == ("c", "b")


def holders() -> bytes:
    """What holds a mesh or an axis of two ranks, saved."""
    mesh = pmod.current_mesh()
    plain = torch.nn.Linear(2, 1)
    averaged = pmod.data_parallel(torch.nn.Linear(2, 1), "data")
    pmod.share_parameters(plain, "data")
    return pickle.dumps([mesh, mesh["data"], pmod.sampler(range(4), "data"), averaged, plain])


def test_a_mesh_that_does_not_fit_where_it_is_loaded_says_so_at_the_first_question():
    mesh, part, batches, averaged, shared = pickle.loads(spmd.launch(holders, data=2)[1])
    assert mesh.shape == {"data": 2} and mesh.ranks.tolist() == [0, 1] and mesh.axis_size("data") == mesh.size == 2
    assert mesh == mesh_at(0, data=2) and hash(mesh) == hash(mesh_at(0, data=2)) and "data" in str(mesh)
    assert repr(mesh) == "Mesh(data=2), which does not fit rank 0 of 1" and mesh.coords_of(1) == {"data": 1}
    assert pickle.loads(pickle.dumps(mesh)) == mesh and pickle.loads(pickle.dumps(batches)).epoch == 0
    x = torch.ones(1, 2)
    for ask in (lambda: mesh.coords, lambda: mesh.axis_index("data"), lambda: mesh["data"], lambda: part.device_mesh,
                lambda: mesh.group("data"), lambda: pmod.psum(x, part), lambda: pmod.shard(x, mesh),
                lambda: pmod.local_slice((4,), pmod.P("data"), mesh=mesh), lambda: next(iter(batches)),
                lambda: averaged(x).sum().backward(), lambda: shared(x)):  # fmt: skip
        with pytest.raises(pmod.TopologyError) as raised:  # and no deadline is waited for, which ends otherwise
            ask()
        assert "the mesh {'data': 2} is over ranks [0, 1], and this process is rank 0 of 1" in str(raised.value)


def test_an_axis_finds_its_own_place_where_it_is_loaded():
    batches = pmod.simulate(lambda: pickle.dumps(pmod.sampler(range(4), "data", shuffle=False)), data=2)[0]
    assert pmod.simulate(lambda: list(pickle.loads(batches)), data=2) == [[[0], [2]], [[1], [3]]]
    row = mesh_at(0, data=2, model=2)["model"]  # of ranks 0 and 1
    found = pmod.simulate(lambda: pickle.loads(pickle.dumps(row)).coords, data=3)
    assert found == [{"model": 0}, {"model": 1}, None]


def test_a_mesh_pickled_to_another_process_finds_its_place_there(tmp_path):
    path = tmp_path / "mesh.pickle"
    path.write_bytes(pickle.dumps([mesh_at(0, a=2, b=2), pmod.make_mesh(a=4, ranks=[3, 0, 2, 1], topology=at(0, 4))]))
    code = (
        "import pickle, sys, torch.distributed as dist\n"
        "meshes = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print([(mesh.coords, mesh.topology.rank, mesh.topology.launcher) for mesh in meshes], dist.is_initialized())"
    )
    environ = {**os.environ, "RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, str(path)], env=environ, cwd=ROOT,
                          capture_output=True, text=True, timeout=spmd.LONG)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[({'a': 1, 'b': 1}, 3, 'env'), ({'a': 0}, 3, 'env')] False"


def test_copies():
    mesh = mesh_at(2, a=2, b=2)
    for copied in (copy.copy(mesh), copy.deepcopy(mesh), copy.deepcopy({"mesh": mesh})["mesh"]):
        same(copied, mesh)
        assert copied.coords == {"a": 1, "b": 0}


def test_another_topology_given_by_hand_moves_no_mesh():
    """A mesh that is only drawn must not change where this process stands."""
    mesh = mesh_at(2, a=2, b=2)
    pmod.make_mesh(data=8, topology=at(0, 8))
    assert mesh.coords == {"a": 1, "b": 0}
    assert copy.copy(mesh).coords == {"a": 1, "b": 0}
    assert copy.deepcopy(mesh).coords == {"a": 1, "b": 0}


# --- straddling ---------------------------------------------------------------------------------------------------


def straddles(name: str, size: int, node: int) -> str:
    return (
        f"pmod.make_mesh: axis {name!r} (size {size}) straddles nodes of {node} ranks, though it would fit into one.\n"
        f"Name it last, with a size that divides {node}, or order the ranks with ranks=."
    )


def warned_of(sizes: dict[str, int], nodes: int, **more: object) -> list[str]:
    topology = at(0, math.prod(sizes.values()), num_nodes=nodes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pmod.make_mesh(sizes, topology=topology, **more)  # type: ignore[arg-type]
    assert all(warning.category is UserWarning and warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("sizes", "nodes", "axes"),
    [
        ({"data": 2, "model": 4}, 2, []),
        ({"model": 4, "data": 2}, 2, ["model"]),
        ({"data": 8}, 2, []),  # too large for a node
        ({"data": 2, "space": 2, "model": 2}, 2, []),
        ({"space": 4, "data": 2, "model": 2}, 4, ["space"]),
        ({"data": 4, "model": 3}, 3, ["model", "data"]),  # 3 of nodes of 4: both would fit into one
        ({"data": 2, "model": 3}, 1, []),
        ({"data": 4, "model": 2}, 4, []),  # nodes of 2
        ({"model": 2, "data": 4}, 4, ["model"]),  # data is larger, but has no claim to a node it does not fit into
        ({"model": 2, "one": 1, "data": 2}, 2, []),
        ({"a": 2, "one": 1, "b": 4, "c": 2}, 4, ["b"]),
        ({"data": 16, "model": 8}, 16, []),
        ({"model": 8, "data": 16}, 16, ["model"]),
        ({"model": 8, "data": 4}, 4, ["model"]),
    ],
)
def test_an_axis_that_could_stay_inside_a_node_and_straddles_two_is_named(sizes, nodes, axes):
    node = math.prod(sizes.values()) // nodes
    assert warned_of(sizes, nodes) == [straddles(name, sizes[name], node) for name in axes]


def test_who_orders_the_ranks_by_hand_is_not_warned():
    assert warned_of({"model": 4, "data": 2}, 2, ranks=[0, 4, 1, 5, 2, 6, 3, 7]) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pmod.make_mesh(model=2, data=2, ranks=range(4), topology=at(0, 8, num_nodes=4))
        mesh = pmod.make_mesh(data=2, model=4, topology=at(0, 8, num_nodes=2))
        mesh["model", "data"].flatten(("model", "data"), "all")  # made from another mesh


# --- size -------------------------------------------------------------------------------------------------------------


def best(f: Callable[[], object], times: int = 30) -> float:
    """Seconds of the fastest run: the others shared their core."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        f()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def costs(sizes: dict[str, int], nodes: int) -> dict[str, float]:
    """Seconds that a mesh over axes pod, data, model costs in the process of its last rank but one."""
    ranks = math.prod(sizes.values())
    topology, other = at(ranks - 2, ranks, num_nodes=nodes), at(0, ranks, num_nodes=nodes)
    mesh, same = pmod.make_mesh(sizes, topology=topology), pmod.make_mesh(sizes, topology=other)
    assert mesh == same
    return {
        "to make": best(lambda: pmod.make_mesh(sizes, topology=topology)),
        "to hash": best(lambda: hash(mesh)),
        "to compare": best(lambda: mesh == same),
        "a part": best(lambda: mesh["model", "pod"]),
        "to flatten and to split": best(lambda: mesh.flatten(("pod", "data"), "all").split("all", a=-1, b=2)),
        "where a rank is": best(lambda: mesh.coords_of(ranks - 3)),
        "an index": best(lambda: mesh.axis_index(("model", "pod"))),
        "to send": best(lambda: pickle.loads(pickle.dumps(mesh))),
        "to draw": best(lambda: (str(mesh), mesh._repr_html_())),
    }


def calls_of(function):
    """The calls of Python functions that a call makes."""
    calls = 0

    def heard(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(heard)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def test_a_mesh_makes_each_part_once_and_of_any_size_by_as_many_calls():
    def made(data):
        return pmod.make_mesh(data=data, model=8, topology=at(3, 8 * data))

    made(2), made(16_384)  # what is read once is read
    assert calls_of(lambda: made(16_384)) <= calls_of(lambda: made(2)) + 10
    small, large = made(2), made(16_384)
    assert calls_of(lambda: large["model"]) <= calls_of(lambda: small["model"]) + 10 <= 120
    assert large["model"] is large["model"] and large["data", "model"] is large[["data", "model"]]
    assert calls_of(lambda: large["model"]) <= 8


def test_a_mesh_of_131072_ranks_costs_as_little_as_a_small_one():
    sizes = {"pod": 8, "data": 2048, "model": 8}
    small, large = costs({"pod": 2, "data": 2, "model": 2}, 1), costs(sizes, 16_384)
    # whatever goes over the ranks takes 16,384 times as long; a drawing shows more of them, up to a bound
    assert [what for what, seconds in large.items() if seconds > 30 * small[what]] == []
    mesh = pmod.make_mesh(sizes, topology=at(99_999, 131_072, num_nodes=16_384))
    assert len(str(mesh)) < 10_000 and len(mesh._repr_html_()) < 100_000
    assert mesh.coords == {"pod": 6, "data": 211, "model": 7}
    assert mesh["model"].ranks.tolist() == list(range(99_992, 100_000))
    assert mesh.ranks.shape == (8, 2048, 8) and mesh.ranks[6, 211, 7] == 99_999


# --- against a model: the array of ranks ------------------------------------------------------------------------------


@attrs.frozen
class Model:
    """What a mesh means: names, and the array of places in the list of its ranks."""

    names: tuple[str, ...]
    places: np.ndarray
    listed: np.ndarray

    @property
    def ranks(self) -> np.ndarray:
        return self.listed[self.places]

    def transposed(self, names: tuple[str, ...]) -> np.ndarray:
        return self.places.transpose([self.names.index(name) for name in names])

    def flatten(self, axes: tuple[str, ...], name: str) -> Model:
        first = min(self.names.index(axis) for axis in axes)
        before, after = self.names[:first], tuple(n for n in self.names[first:] if n not in axes)
        moved = self.transposed((*before, *axes, *after))
        shape = (*moved.shape[:first], -1, *moved.shape[first + len(axes) :])
        return Model((*before, name, *after), moved.reshape(shape), self.listed)

    def split(self, axis: str, **sizes: int) -> Model:
        number = self.names.index(axis)
        shape = (*self.places.shape[:number], *sizes.values(), *self.places.shape[number + 1 :])
        return Model((*self.names[:number], *sizes, *self.names[number + 1 :]), self.places.reshape(shape), self.listed)

    def rename(self, **old_new: str) -> Model:
        return Model(tuple(old_new.get(name, name) for name in self.names), self.places, self.listed)

    def coords_of(self, rank: int) -> dict[str, int] | None:
        found = np.argwhere(self.ranks == rank)
        return dict(zip(self.names, found[0].tolist(), strict=True)) if len(found) else None

    def sub(self, names: tuple[str, ...], rank: int) -> Model:
        coords = self.coords_of(rank)
        assert coords is not None
        kept = tuple(name for name in self.names if name in names)
        row = self.places[tuple(slice(None) if name in names else coords[name] for name in self.names)]
        return Model(names, Model(kept, row, self.listed).transposed(names), self.listed)

    def is_arithmetic(self) -> bool:
        """Whether each axis adds to the place by itself, which is what a mesh can hold."""
        origin = self.places[(0,) * self.places.ndim]
        total = np.array(origin)
        for dim in range(self.places.ndim):
            line = self.places[tuple(slice(None) if d == dim else 0 for d in range(self.places.ndim))] - origin
            total = np.add.outer(total, line) if dim else origin + line
        return bool((total == self.places).all())


@st.composite
def meshes(draw: st.DrawFn) -> tuple[int, dict[str, int], list[int] | None]:
    """World size, axis sizes, ranks."""
    wanted = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    few = [size for i, size in enumerate(wanted) if math.prod(wanted[: i + 1]) <= 24]
    sizes = dict(zip("abcde", few, strict=False))
    count = math.prod(sizes.values())
    kind = draw(st.sampled_from(("all", "stretch", "shuffled")))
    if kind == "all":
        return count, sizes, None
    if kind == "stretch":
        start, step = draw(st.integers(0, 2)), draw(st.integers(1, 2))
        return 2 * count + 2, sizes, list(range(start, start + step * count, step))
    return count + 2, sizes, draw(st.permutations(range(count + 2)))[:count]


def draw_step(data: st.DataObject, model: Model, number: int) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    kind = data.draw(st.sampled_from(("flatten", "flatten", "split", "rename")))
    axis = data.draw(st.sampled_from(model.names))
    if kind == "flatten":
        axes = data.draw(st.permutations(model.names))
        return kind, (tuple(axes[: data.draw(st.integers(1, len(axes)))]), f"f{number}"), {}
    if kind == "split":
        size = model.places.shape[model.names.index(axis)]
        fast = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
        return kind, (axis,), {f"s{number}": size // fast, f"t{number}": fast}
    return kind, (), {axis: f"r{number}"}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_mesh_agrees_with_the_array_of_its_ranks(data):
    world_size, sizes, ranks = data.draw(meshes())
    listed = np.arange(world_size) if ranks is None else np.asarray(ranks)
    model = Model(tuple(sizes), np.arange(math.prod(sizes.values())).reshape(list(sizes.values())), listed)
    views = [pmod.make_mesh(sizes, ranks=ranks, topology=at(rank, world_size)) for rank in range(world_size)]
    for number in range(data.draw(st.integers(0, 4))):
        kind, args, kwargs = draw_step(data, model, number)
        after = getattr(model, kind)(*args, **kwargs)
        if not after.is_arithmetic():
            assert kind == "split"
            with pytest.raises(pmod.AxisError, match="cuts across"):
                views[0].split(*args, **kwargs)
            continue
        model = after
        views = [getattr(mesh, kind)(*args, **kwargs) for mesh in views]
        assert views[0].axis_names == model.names
        assert np.array_equal(views[0].ranks, model.ranks)
    names = data.draw(st.permutations(model.names))
    check(views, model, tuple(names[: data.draw(st.integers(1, len(names)))]))


def check(views: list[pmod.Mesh], model: Model, names: tuple[str, ...]) -> None:
    """Every rank's view of the mesh, and of its sub-mesh `names`, is the model's."""
    mesh = views[0]
    assert mesh.shape == dict(zip(model.names, model.ranks.shape, strict=True))
    assert mesh.size == model.ranks.size
    for rank in range(-1, len(views) + 1):
        assert mesh.coords_of(rank) == model.coords_of(rank)
    # the same axes and ranks, made in one step
    again = pmod.make_mesh(mesh.shape, ranks=model.ranks.reshape(-1), topology=mesh.topology)
    for other in (again, pickle.loads(pickle.dumps(mesh)), *views):
        assert mesh == other and hash(mesh) == hash(other)
    for rank, view in enumerate(views):
        coords = model.coords_of(rank)
        assert view.coords == coords
        if coords is None:
            continue
        row = model.sub(names, rank)
        ranks = row.ranks.reshape(-1).tolist()
        sub = view[names]
        assert sub.axis_names == names
        assert np.array_equal(sub.ranks, row.ranks)
        assert sub.coords == {name: coords[name] for name in names}
        assert view.bind(names, "test").ranks == ranks
        assert view.axis_index(names) == ranks.index(rank)
        assert view.axis_size(names) == row.ranks.size
        for other in (0, len(views) // 2, len(views) - 1):
            assert sub.coords_of(other) == row.coords_of(other)


# --- what is let go -----------------------------------------------------------------------------------------------


def alive() -> Counter[str]:
    """How many meshes and axes there are in this process."""
    gc.collect()
    return Counter(type(thing).__name__ for thing in gc.get_objects() if type(thing) in (pmod.Mesh, Axis, _axis.Last))


def named_once(number: int) -> None:
    """A mesh, and what is made of it, under names that no other has."""
    place = pmod.Topology(rank=1, world_size=4)
    mesh = pmod.make_mesh({f"a{number}": 2, "b": 2}, topology=place)
    made = [mesh[f"a{number}"], mesh["b", f"a{number}"], mesh.split("b", c=2, d=1), mesh.rename(b=f"c{number}")]
    for each in made:
        assert Axis.parse(each._axis_key).key == each._axis_key
    with pmod.set_mesh(pmod.make_mesh({f"e{number}": 1})):
        torch.func.vmap(lambda x: pmod.psum(x, f"e{number}"))(torch.ones(2))


def test_meshes_and_axes_that_nobody_refers_to_are_let_go() -> None:
    named_once(0)
    before = alive()
    meshes, axes = len(_mesh._meshes), len(_axis.parsed_axes)
    for number in range(1, 1001):
        named_once(number)
    assert not alive() - before
    assert len(_mesh._meshes) <= meshes and len(_axis.parsed_axes) <= axes


def test_equal_meshes_are_one_to_compiled_code_while_one_of_them_lives() -> None:
    place = pmod.Topology(rank=1, world_size=4)
    kept = pmod.make_mesh(one=2, other=2, topology=place, timeout=7)
    axis = kept.bind("one", "test")
    assert Axis.parse(axis.key) is axis
    again = pmod.make_mesh(one=2, other=2, topology=place, timeout=8)
    last = again.bind("one", "test")
    assert Axis.parse(axis.key) is last
    del again, last
    gc.collect()
    assert Axis.parse(axis.key).timeout == 8
    assert _mesh._constant_part(kept._key, "one") == kept["one"]
    key = axis.key
    del kept, axis
    gc.collect()
    assert key not in _axis.parsed_axes
    assert Axis.parse(key).ranks == [1, 3]  # read, as in a process that never had it
