"""Wrong arguments: each raises the type that the design names, with the exact text, before anything is sent."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor

import pmod
from pmod._errors import coordinates, near_miss, phrase
from pmod._mesh import ambient
from tests.lib.raised import SIZES, check, on_all_ranks, raised_by

X = torch.ones(4, 2)  # wrong calls get it, so that nothing else is wrong with them


def sizes() -> list[int]:
    """All of X to the first rank, on an axis of any size; also where there is no mesh, or none with this rank."""
    mesh = ambient.ambient()
    return [4] + [0] * ((2 if mesh is None else mesh.shape["model"]) - 1)


# How a call is made where only the arguments in question differ; n is the size of the axis.
CALLS: dict[str, Callable[..., Any]] = {
    "psum": pmod.psum,
    "pmean": pmod.pmean,
    "pmean weighted": lambda x, axis: pmod.pmean(x, axis, weight=2.0),
    "pmax": pmod.pmax,
    "pmin": pmod.pmin,
    "pick": pmod.pick,
    "place": pmod.place,
    "pvary": pmod.pvary,
    "all_gather": pmod.all_gather,
    "all_gather stacked": lambda x, axis: pmod.all_gather(x, axis, tiled=False),
    "psum_scatter": pmod.psum_scatter,
    "shard": pmod.shard,
    "unshard": pmod.unshard,
    "all_to_all": lambda x, axis, split_dim=0, concat_dim=1, **kwargs: pmod.all_to_all(
        x, axis, split_dim=split_dim, concat_dim=concat_dim, **kwargs
    ),
    "ppermute": lambda x, axis: pmod.ppermute(x, axis, [(0, 0)]),
    "ppermute nothing": lambda x, axis: pmod.ppermute(x, axis, [(i, i) for i in range(pmod.axis_size("model"))]),
    "pshuffle": lambda x, axis: pmod.pshuffle(x, axis, range(pmod.axis_size("model"))[::-1]),
    "pshift": pmod.pshift,
    "broadcast": pmod.broadcast,
    "reduce": pmod.reduce,
    "gather": pmod.gather,
    "scatter": pmod.scatter,
    "all_gather_v": pmod.all_gather_v,
    "all_gather_v told": lambda x, axis: pmod.all_gather_v(x, axis, sizes=[4 for _ in sizes()]),
    "psum_scatter_v": lambda x, axis, **kwargs: pmod.psum_scatter_v(x, axis, **{"sizes": sizes(), **kwargs}),
    "gather_v": pmod.gather_v,
    "scatter_v": lambda x, axis, **kwargs: pmod.scatter_v(x, axis, **{"sizes": sizes(), **kwargs}),
    "all_to_all_v": lambda x, axis, **kwargs: pmod.all_to_all_v(x, axis, **{"send_sizes": sizes(), **kwargs}),
    "indexed_all_to_all_v": lambda x, axis, **kwargs: pmod.indexed_all_to_all_v(
        x, axis, indices=[torch.tensor([0])] * len(sizes()), **kwargs
    ),
}
NO_TENSOR = {"axis_index": pmod.axis_index, "axis_size": pmod.axis_size, "barrier": pmod.barrier}
LOCAL = ("pvary", "place", "shard", "ppermute nothing")
NUMBERS = ("psum", "pmean", "pmax", "pmin")


def name_of(function: str) -> str:
    return function.split()[0]


@attrs.frozen
class Wrong:
    """A call that raises `kind` with `text` on axes of `sizes`; what follows from the mesh stands in <>."""

    call: Callable[[int], Any]
    kind: type[pmod.PmodError]
    function: str
    text: str
    sizes: tuple[int, ...] = (1, 2)

    def expected(self, mesh: pmod.Mesh) -> str:
        n, index = mesh.axis_size("model"), mesh.axis_index("model")
        text = f"pmod.{self.function}(axis='model') at <at>: {self.text}"
        tokens = {"at": coordinates(mesh.coords), "n": n, "last": n - 1, "i": index}
        for token, value in tokens.items():
            text = text.replace(f"<{token}>", str(value))
        return text


@pytest.fixture(autouse=True)
def _no_mesh_left() -> Iterator[None]:
    yield
    assert ambient.ambient() is None


def alone(call: Callable[[], Any]) -> list[tuple[pmod.Mesh, BaseException | None]]:
    mesh = pmod.make_mesh(data=1, model=1, topology=pmod.Topology(rank=0, world_size=1))
    with pmod.set_mesh(mesh):
        return [(mesh, raised_by(call))]


# --- axes: every function -------------------------------------------------------------------------------------------

THE_MESH = "The mesh has {'data': 2, 'model': 2}."
A_NAME = "Pass a name of ('data', 'model'), a tuple of names, or a sub-mesh such as mesh['model']."
AXES: list[tuple[Any, str]] = [
    ("modle", f"(axis='modle') at <at>: no axis 'modle'; did you mean 'model'?\n{THE_MESH}"),
    ("batch", f"(axis='batch') at <at>: no axis 'batch'.\n{THE_MESH}"),
    (("data", "models"), f"(axis=('data', 'models')) at <at>: no axis 'models'; did you mean 'model'?\n{THE_MESH}"),
    (("model", "model"), "(axis=('model', 'model')) at <at>: an axis is named twice.\nName each axis once."),
    (1, f" at <at>: axis is 1, a int.\n{A_NAME}"),
    (None, f" at <at>: axis is None, a NoneType.\n{A_NAME}"),
    ([["model"]], f" at <at>: axis is [['model']], a list.\n{A_NAME}"),
    (torch.ones(1), f" at <at>: axis is tensor([1.]), a Tensor.\n{A_NAME}"),
]


def with_axis(function: str, axis: Any) -> Any:
    return NO_TENSOR[function](axis) if function in NO_TENSOR else CALLS[function](X, axis)


@pytest.mark.parametrize("function", [*CALLS, *NO_TENSOR])
def test_what_names_no_axis(function, messages):
    for axis, text in AXES:
        for mesh, error in on_all_ranks(lambda axis=axis: with_axis(function, axis)):
            assert mesh.coords is not None
            at = coordinates(mesh.coords)
            check(error, pmod.AxisError, f"pmod.{name_of(function)}{text.replace('<at>', at)}")
    assert not messages


@pytest.mark.parametrize("function", [*CALLS, *NO_TENSOR])
def test_no_mesh(function, messages):
    def without() -> None:
        ambient._put(None)
        if "nothing" in function or "pshuffle" in function:  # they ask for the size in this file
            pmod.ppermute(X, "model", []) if "nothing" in function else pmod.pshuffle(X, "model", [])
        with_axis(function, "model")

    for error in [raised_by(without), *(error for _, error in on_all_ranks(without))]:
        check(
            error,
            pmod.NoMeshError,
            f"pmod.{name_of(function)}(axis='model'): no mesh is set.\n"
            "Either set one, pmod.set_mesh(pmod.make_mesh(data=-1)), or pass a sub-mesh, axis=mesh['data'].",
        )
    assert not messages


@pytest.mark.parametrize("function", [*CALLS, *NO_TENSOR])
def test_a_rank_outside_the_mesh(function, messages):
    def rank() -> tuple[int, BaseException | None]:
        place = pmod.current_mesh().topology
        mesh = pmod.make_mesh(model=2, ranks=[1, 3], topology=place)
        with pmod.set_mesh(mesh):
            if mesh.coords is not None:
                return place.rank, None
            if "nothing" in function:
                return place.rank, raised_by(lambda: pmod.ppermute(X, "model", [(0, 0), (1, 1)]))
            if function == "pshuffle":
                return place.rank, raised_by(lambda: pmod.pshuffle(X, "model", [1, 0]))
            return place.rank, raised_by(lambda: with_axis(function, "model"))

    for number, error in pmod.simulate(rank, **SIZES)[::2]:
        check(
            error,
            pmod.AxisError,
            f"pmod.{name_of(function)}(axis='model'): "
            f"rank {number} is outside the mesh {{'model': 2}} over ranks [1, 3].\n"
            "Call it only on ranks that belong to the mesh (those where mesh.coords is not None).",
        )
    assert not messages


# --- tensors: every function ----------------------------------------------------------------------------------------


class Local(Tensor):
    """What a DTensor looks like from outside."""

    def to_local(self) -> Tensor:
        return X


def nested(layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, as torch says each time
        return torch.nested.nested_tensor([X, X[:1]], layout=layout)


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)


NOT_TENSORS: list[tuple[Any, str]] = [
    ("x", "x is a str.\nPass a tensor, or a dict, list or tuple of them."),
    (np.ones((4, 2)), "x is a ndarray.\nPass a tensor, torch.from_numpy(x)."),
    (object, "x is a type.\nPass a tensor, or a dict, list or tuple of them."),
    ({1, 2}, "x is a set.\nPass a tensor, or a dict, list or tuple of them."),
    (X.to_sparse(), "x has layout torch.sparse_coo.\nPass a dense tensor, x.to_dense()."),
    (X.as_subclass(Local), "x is a DTensor.\nPass its shard, x.to_local()."),
    (
        X.to("meta"),
        "x is on meta.\nIt has no values: pass a tensor on cpu, or see what would be sent with pmod.estimate.",
    ),
    (
        torch.nn.UninitializedParameter(),
        "x is a UninitializedParameter, which has no shape yet.\nCall its module once, which gives it one.",
    ),
    (nested(torch.strided), "x is a nested tensor.\nPass the list of its parts, list(x.unbind())."),
    (nested(torch.jagged), "x is a nested tensor.\nPass the list of its parts, list(x.unbind())."),
    (quantized(), "x is quantized, qint8.\nPass x.dequantize(), or x.int_repr()."),
    (
        torch.zeros(4, 2, dtype=torch.bits8),
        "x is bits8, which torch only stores.\nPass its bytes, x.view(torch.uint8).",
    ),
    (torch.zeros(4, 2, dtype=torch.int3), "x is int3, which torch only stores.\nPass its bytes, x.view(torch.uint8)."),
    (
        torch.zeros(4, 2, dtype=torch.float8_e8m0fnu),
        "x is float8_e8m0fnu, which torch only stores.\nPass its bytes, x.view(torch.uint8).",
    ),
]


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize(("x", "text"), NOT_TENSORS, ids=[text.split(".")[0] for _, text in NOT_TENSORS])
def test_what_is_no_tensor_to_send(function, x, text, messages):
    call = CALLS[function]
    # in a tree, the leaf before it is not sent either
    for tree in (x, [X, x], {"b": x, "a": (X, None)}):
        for mesh, error in on_all_ranks(lambda tree=tree: call(tree, "model")) + alone(
            lambda tree=tree: call(tree, "model")
        ):
            at = coordinates(mesh.coords)
            check(error, pmod.ArgumentError, f"pmod.{name_of(function)}(axis='model') at {at}: {text}")
    assert not messages


@pytest.mark.parametrize("function", [function for function in CALLS if name_of(function) not in NUMBERS])
@pytest.mark.parametrize("number", [1, 0.5, True, 1j])
def test_numbers_only_where_they_are_metrics(function, number, messages):
    for run in (on_all_ranks, alone):
        for mesh, error in run(lambda: CALLS[function](number, "model")):
            given = f"x is a {type(number).__name__}.\nPass a tensor, or a dict, list or tuple of them."
            where = f"pmod.{name_of(function)}(axis='model') at {coordinates(mesh.coords)}"
            check(error, pmod.ArgumentError, f"{where}: {given}")
    assert not messages


@pytest.mark.parametrize("function", CALLS)
def test_a_dict_whose_keys_do_not_sort(function, messages):
    for mesh, error in on_all_ranks(lambda: CALLS[function]({1: X, "a": X}, "model")):
        check(
            error,
            pmod.ArgumentError,
            f"pmod.{name_of(function)}(axis='model') at {coordinates(mesh.coords)}: "
            "a dict has keys of types ['int', 'str'], which do not sort.\n"
            "Use keys of one type: ranks walk a dict in the order of its keys.",
        )
    assert not messages


@pytest.mark.parametrize("function", CALLS)
def test_the_calls_of_this_file_are_right_with_right_arguments(function, messages):
    """So what raises above raises for the reason given; and the count of messages counts."""
    assert [error for _, error in on_all_ranks(lambda: CALLS[function](X, "model"))] == [None] * 4
    assert [error for _, error in alone(lambda: CALLS[function](X, "model"))] == [None]
    assert bool(messages) == (function not in LOCAL)
    before = len(messages)
    assert [error for _, error in on_all_ranks(lambda: CALLS[function]({"b": None, "a": [X]}, "model"))] == [None] * 4
    assert len(messages) == 2 * before


# --- the other arguments --------------------------------------------------------------------------------------------


def dtype_cases() -> Iterator[Wrong]:
    for function in ("psum", "reduce", "psum_scatter", "psum_scatter_v"):
        call = CALLS[function]
        text = (
            "x is bool, and a sum of truth values is ambiguous.\n"
            "Pass x.int() to count, or use pmax for any and pmin for all."
        )
        for tree in (X.bool(), [X, X.bool()]):
            yield Wrong(lambda n, call=call, tree=tree: call(tree, "model"), pmod.ArgumentError, function, text)
    for dtype in (torch.int32, torch.int64, torch.uint8, torch.bool):
        for function in ("pmean", "pmean weighted"):
            name = str(dtype).removeprefix("torch.")
            yield Wrong(
                lambda n, call=CALLS[function], dtype=dtype: call([X, X.to(dtype)], "model"),
                pmod.ArgumentError, "pmean", f"x is {name}, which has no mean.\nPass x.float().",
            )  # fmt: skip
    for function, x in itertools.product(("pmax", "pmin"), (X.cfloat(), X.cdouble(), [1, 1j])):
        yield Wrong(
            lambda n, call=CALLS[function], x=x: call(x, "model"),
            pmod.ArgumentError, function, "x is complex, which has no order.\nCompare x.abs() or x.real.",
        )  # fmt: skip
    functions = ("psum", "pmean", "pvary", "all_gather", "psum_scatter", "broadcast", "reduce",
                 "all_gather_v", "psum_scatter_v", "indexed_all_to_all_v")  # fmt: skip
    for function, dtype in itertools.product(functions, (torch.int32, torch.bool, torch.complex64, "float32", 32)):
        yield Wrong(
            lambda n, call=CALLS[function], dtype=dtype: call(X, "model", reduce_dtype=dtype),
            pmod.ArgumentError, function, f"reduce_dtype is {dtype!r}.\n"
            "Pass a floating dtype of 16 bits or more, such as torch.float32.",
        )  # fmt: skip


def dim_cases() -> Iterator[Wrong]:
    places = [(f, "dim", {}) for f in ("all_gather", "psum_scatter", "shard", "unshard", "gather", "scatter")]
    places += [("all_to_all", name, more) for name in ("split_dim", "concat_dim") for more in ({}, {"tiled": False})]
    places += [("psum_scatter", "dim", {"tiled": False})]
    ragged = ("all_gather_v", "psum_scatter_v", "gather_v", "scatter_v", "all_to_all_v", "indexed_all_to_all_v")
    places += [(f, "dim", {}) for f in ragged]
    for function, name, more in places:
        call, x = CALLS[function], X[:2] if more else X

        def wrong(dim: Any, text: str, x: Tensor = x, call=call, function=function, name=name, more=more) -> Wrong:
            return Wrong(
                lambda n: call(x[:n] if more else x, "model", **{name: dim}, **more), pmod.ShapeError, function, text
            )

        for dim in (2, -3, 100):
            yield wrong(dim, f"{name} is {dim} but x has 2 dims.\nPass {name} from -2 to 1.")
        yield wrong(1, f"{name} is 1 but x has 1 dims.\nPass {name} from -1 to 0.", X[:, 0])
        for dim in (1.0, "0", None, True, (0,)):
            yield wrong(dim, f"{name} is {dim!r}, a {type(dim).__name__}.\nPass an int.")
    for dim in (3, -4):
        yield Wrong(
            lambda n, dim=dim: pmod.all_gather(X, "model", dim=dim, tiled=False),
            pmod.ShapeError, "all_gather", f"dim is {dim} but x has 2 dims.\nPass dim from -3 to 2.",
        )  # fmt: skip
    yield Wrong(
        lambda n: pmod.all_gather(X.sum(), "model"),
        pmod.ShapeError, "all_gather", "dim is 0 but x has 0 dims.\nPass tiled=False, or a tensor with a dim.",
    )  # fmt: skip


def length_cases() -> Iterator[Wrong]:
    odd = X[:3]
    pad = "Pad x, or choose a dim whose length is a multiple of 2."

    def wrong(call: Callable[[int], Any], function: str, text: str, sizes: tuple[int, ...] = (1, 2)) -> Wrong:
        return Wrong(call, pmod.ShapeError, function, text, sizes)

    for x, dim, place in ((odd, 0, 0), (odd, -2, 0), (odd.T, 1, 1), (odd.T, -1, 1)):
        given = f"x.shape[{place}] is 3, which does not divide by 2"
        yield wrong(
            lambda n, x=x, dim=dim: pmod.psum_scatter(x, "model", dim=dim), "psum_scatter", f"{given}.\n{pad}", (2,)
        )
        yield wrong(
            lambda n, x=x, dim=dim: pmod.scatter(x, "model", dim=dim), "scatter", f"{given}.\nPass sizes=(2, 1).", (2,)
        )
        yield wrong(
            lambda n, x=x, dim=dim: pmod.all_to_all(x, "model", split_dim=dim, concat_dim=0),
            "all_to_all", f"{given}.\nPass split_sizes for uneven parts.", (2,),
        )  # fmt: skip
    given = "x.shape[0] is 3, which does not divide by 2"
    yield wrong(lambda n: pmod.psum_scatter([X, odd], "model"), "psum_scatter", f"{given}.\n{pad}", (2,))
    one_each = "tiled=False and x.shape[0] is 4.\nIt must be the axis size, <n>; or pass tiled=True."
    yield wrong(lambda n: pmod.psum_scatter(X, "model", tiled=False), "psum_scatter", one_each)
    yield wrong(lambda n: CALLS["all_to_all"](X, "model", tiled=False), "all_to_all", one_each)
    for sizes in ({"split_sizes": (2, 2)}, {"concat_sizes": (2, 2)}, {"split_sizes": (2, 2), "concat_sizes": (2, 2)}):
        yield wrong(
            lambda n, sizes=sizes: CALLS["all_to_all"](X, "model", tiled=False, **sizes),
            "all_to_all", "tiled=False and sizes are given.\nSizes need tiled=True.",
        )  # fmt: skip
    beside = [
        ({"split_sizes": (2, 2), "concat_sizes": (2, 2)}, "split_sizes and concat_sizes"),
        ({"concat_sizes": (2, 2)}, "concat_sizes"),
        ({"tiled": False}, "tiled=False"),
        ({"split_sizes": (2, 2), "tiled": False}, "split_sizes and tiled=False"),
    ]
    right = "Pass length alone, with tiled=True, or both lists of sizes."
    for more, names in beside:
        yield wrong(
            lambda n, more=more: CALLS["all_to_all"](X, "model", length=4, **more),
            "all_to_all", f"length and {names} are given.\n{right}",
        )  # fmt: skip


def size_cases() -> Iterator[Wrong]:
    def at_own_root(x: Any, axis: str, **kwargs: Any) -> Any:
        return pmod.scatter(x, axis, src=pmod.axis_index(axis), **kwargs)

    places = [
        ("shard", "sizes", pmod.shard),
        ("unshard", "sizes", pmod.unshard),
        ("scatter", "sizes", at_own_root),
        ("all_to_all", "split_sizes", CALLS["all_to_all"]),
        ("all_to_all", "concat_sizes", CALLS["all_to_all"]),
        ("psum_scatter_v", "sizes", pmod.psum_scatter_v),
        ("scatter_v", "sizes", lambda x, axis, **kwargs: pmod.scatter_v(x, axis, src=pmod.axis_index(axis), **kwargs)),
        ("all_to_all_v", "send_sizes", pmod.all_to_all_v),
        ("all_to_all_v", "recv_sizes", CALLS["all_to_all_v"]),
        ("indexed_all_to_all_v", "recv_sizes", CALLS["indexed_all_to_all_v"]),
        ("all_gather_v", "sizes", pmod.all_gather_v),
        ("gather_v", "sizes", pmod.gather_v),
        ("ppermute", "sizes", lambda x, axis, **kwargs: pmod.ppermute(x, axis, [], **kwargs)),
        ("pshuffle", "sizes", lambda x, axis, **kwargs: pmod.pshuffle(x, axis, range(pmod.axis_size(axis)), **kwargs)),
        ("pshift", "sizes", pmod.pshift),
    ]
    for function, name, call in places:

        def wrong(sizes: Any, text: str, only: tuple[int, ...], call=call, function=function, name=name) -> Wrong:
            return Wrong(lambda n: call(X, "model", **{name: sizes}), pmod.ShapeError, function, f"{name}{text}", only)

        count = "Pass <n> ints, one per rank of the axis."
        for sizes in ((1, 1, 2), (), [4, 0, 0], "abc", 4, {1, 2, 3}, torch.tensor([2, 2, 0])):
            yield wrong(sizes, f" is {sizes!r}.\n{count}", (1, 2))
        for sizes in ((2.0, 2.0), ("2", "2"), (None, 4), [[2], [2]], (torch.tensor(2.0), 2)):
            yield wrong(sizes, f" is {sizes!r}.\n{count}", (1, 2))
        yield wrong((4,), f" is (4,).\n{count}", (2,))
        yield wrong((5, -1), " is (5, -1).\nA size is 0 or more.", (2,))
        yield wrong((-4,), " is (-4,).\nA size is 0 or more.", (1,))
        if name == "recv_sizes" or function in ("all_gather_v", "gather_v"):
            continue  # what else may be wrong depends on the rank: test_ragged.py
        if name == "concat_sizes":
            held = "but this rank holds 2 along concat_dim.\nPass the length that each rank holds."
            yield wrong((3, 3), f"[<i>] is 3 {held}", (2,))
        elif function in ("ppermute", "pshuffle", "pshift"):
            right = "but x.shape[0] is 4.\nPass the length that each rank holds along dim."
            yield wrong((3, 3), f"[<i>] is 3 {right}", (2,))
            yield wrong((3,), f"[<i>] is 3 {right}", (1,))
        elif function == "unshard":
            right = "but x.shape[0] is 4.\nPass the sizes that the ranks hold, or the whole length that shard cut."
            yield wrong((3, 3), f"[<i>] is 3 {right}", (2,))
            yield wrong((3,), f"[<i>] is 3 {right}", (1,))
        else:
            for sizes, total in (((1, 2), 3), ((0, 0), 0), ((4, 4), 8)):
                right = f"Pass {name} that add up to 4, (2, 2) say."
                yield wrong(sizes, f" {sizes} add up to {total} but x.shape[0] is 4.\n{right}", (2,))
            yield wrong((3,), f" (3,) add up to 3 but x.shape[0] is 4.\nPass {name} that add up to 4, (4,) say.", (1,))

    def unshard(text: str, sizes: tuple[int, ...] = (1, 2), **kwargs: Any) -> Wrong:
        return Wrong(lambda n: pmod.unshard(X, "model", **kwargs), pmod.ShapeError, "unshard", text, sizes)

    yield unshard("sizes and length are given.\nPass one of them.", sizes=(4, 4), length=8)
    for length in (-1, True):
        yield unshard(f"length is {length!r}.\nPass the whole length, 0 or more.", length=length)
    right = "Pass the sizes that the ranks hold, or the whole length that shard cut."
    yield unshard(f"sizes[<i>] is 3 but x.shape[0] is 4.\n{right}", (2,), length=6)
    yield unshard(f"sizes[<i>] is 6 but x.shape[0] is 4.\n{right}", (1,), length=6)


    def exchange(text: str, sizes: tuple[int, ...] = (1, 2), **kwargs: Any) -> Wrong:
        return Wrong(lambda n: CALLS["all_to_all"](X, "model", **kwargs), pmod.ShapeError, "all_to_all", text, sizes)

    for length in (-1, True, 2.0):
        yield exchange(f"length is {length!r}.\nPass the whole length, 0 or more.", length=length)
    right = "Pass two different dims, or the lengths sent and received as split_sizes and concat_sizes."
    yield exchange(f"length is 4 and both dims are dim -2 of x.\n{right}", length=4, concat_dim=-2)
    right = "Pass the whole length that shard cut, or the lengths that the ranks hold as concat_sizes."
    yield exchange(
        f"length is 6, so that this rank holds 3 along concat_dim, but x has 2.\n{right}", (2,), length=6
    )
    yield Wrong(
        lambda n: pmod.all_to_all(X, "model", split_dim=0, concat_dim=0, split_sizes=(1, 3), concat_sizes=(2, 2)),
        pmod.ShapeError, "all_to_all", "concat_sizes[<i>] is 2 but this rank holds <own> along concat_dim.\n"
        "Pass the length that each rank holds.", (2,),
    )  # fmt: skip


def root_cases() -> Iterator[Wrong]:
    roots = {"pick": "src", "place": "dst", "broadcast": "src", "reduce": "dst", "gather": "dst", "scatter": "src"}
    roots |= {"gather_v": "dst", "scatter_v": "src"}
    for (function, name), root in itertools.product(roots.items(), (2, -1, 1.0, "0", None, True, (0,))):
        yield Wrong(
            lambda n, call=CALLS[function], name=name, root=root: call(X, "model", **{name: root}),
            pmod.AxisError, function, f"{name} is {root!r}.\nPass an index along the axis, 0 to <last>.",
        )  # fmt: skip


def permutation_cases() -> Iterator[Wrong]:
    pairs = "Pass (source, target) pairs of indices 0 to <last>, each source and each target once."

    def ppermute(perm: Any, given: str, sizes: tuple[int, ...] = (1, 2)) -> Wrong:
        return Wrong(lambda n: pmod.ppermute(X, "model", perm), pmod.AxisError, "ppermute", f"{given}.\n{pairs}", sizes)

    yield ppermute([(0, 0), (0, 1)], "perm has the source 0 twice", (2,))
    yield ppermute([(0, 0), (0, 0)], "perm has the source 0 twice")
    yield ppermute([(0, 1), (1, 1)], "perm has the target 1 twice", (2,))
    yield ppermute([(0, 2)], "perm holds (0, 2), outside the axis")
    yield ppermute([(2, 0)], "perm holds (2, 0), outside the axis")
    yield ppermute([(0, 0), (-1, 0)], "perm holds (-1, 0), outside the axis")
    for perm in ([0, 1], [(0, 1, 0)], 5, "ab", [("a", 0)], [(0,)], None, [(0, None)]):
        yield ppermute(perm, f"perm is {perm!r}")

    once = "Pass each index 0 to <last> once; perm[i] is where output i comes from."
    for perm in ([0, 0], [0, 2], [-1, 0], [0, 1, 2], "ab", None, 0.5, [[0], [1]], [None, 0], []):
        yield Wrong(
            lambda n, perm=perm: pmod.pshuffle(X, "model", perm),
            pmod.AxisError, "pshuffle", f"perm is {perm!r}, no permutation.\n{once}",
        )  # fmt: skip
    yield Wrong(
        lambda n: pmod.pshuffle(X, "model", [0]),
        pmod.AxisError, "pshuffle", f"perm is [0], no permutation.\n{once}", (2,),
    )  # fmt: skip
    for offset in (1.0, "1", None, True, [1]):
        yield Wrong(
            lambda n, offset=offset: pmod.pshift(X, "model", offset),
            pmod.AxisError, "pshift", f"offset is {offset!r}.\nPass an int.",
        )  # fmt: skip


def weight_cases() -> Iterator[Wrong]:
    for weight in (torch.ones(3), torch.ones(2, 1), torch.ones(1, 4, 2), torch.ones(0)):
        given = f"weight has shape {tuple(weight.shape)} and x has shape (4, 2)"
        yield Wrong(
            lambda n, weight=weight: pmod.pmean([X, 0.5], "model", weight=weight),
            pmod.ShapeError, "pmean", f"{given}.\nPass a number, or a weight that broadcasts to x.",
        )  # fmt: skip


CASES = {
    "dtypes": list(dtype_cases()),
    "dims": list(dim_cases()),
    "lengths": list(length_cases()),
    "sizes": list(size_cases()),
    "roots": list(root_cases()),
    "permutations": list(permutation_cases()),
    "weights": list(weight_cases()),
}


@pytest.mark.parametrize("what", CASES)
def test_wrong_arguments(what, messages):
    for case in CASES[what]:
        for n, run in ((2, on_all_ranks), (1, alone)):
            if n not in case.sizes:
                continue
            for mesh, error in run(lambda case=case, n=n: case.call(n)):
                own = (1, 3)[mesh.axis_index("model")]
                check(error, case.kind, case.expected(mesh).replace("<own>", str(own)))
        assert not messages, case.text


@pytest.mark.parametrize("what", CASES)
def test_start_raises_at_once_and_sends_nothing(what, messages):
    def started(case: Wrong) -> None:
        pmod.start(lambda: case.call(2))

    for case in CASES[what][::3]:
        if 2 not in case.sizes:
            continue
        for mesh, error in on_all_ranks(lambda case=case: started(case)):
            own = (1, 3)[mesh.axis_index("model")]
            check(error, case.kind, case.expected(mesh).replace("<own>", str(own)))
    assert not messages


# --- found by trying: each must be refused by pmod, not by torch or by luck -----------------------------------------

REFUSED: dict[str, tuple[type[pmod.PmodError], Callable[[], Any]]] = {
    "a length that is not an int": (pmod.ShapeError, lambda: pmod.unshard(X, "model", length=8.0)),
    "a length that is text": (pmod.ShapeError, lambda: pmod.unshard(X, "model", length="8")),
    "pairs of floats": (pmod.AxisError, lambda: pmod.ppermute(X, "model", [(0.7, 1)])),
    "pairs of text": (pmod.AxisError, lambda: pmod.ppermute(X, "model", ["01"])),
    "a permutation of floats": (pmod.AxisError, lambda: pmod.pshuffle(X, "model", [1.9, 0.2])),
    "a permutation of text": (pmod.AxisError, lambda: pmod.pshuffle(X, "model", "10")),
    "a weight that is text": (pmod.ArgumentError, lambda: pmod.pmean(X, "model", weight="2")),
    "a complex weight of a real tensor": (pmod.ArgumentError, lambda: pmod.pmean(X, "model", weight=torch.tensor(2j))),
    "a complex number as the weight": (pmod.ArgumentError, lambda: pmod.pmean(X, "model", weight=2j)),
    "a numpy array": (pmod.ArgumentError, lambda: pmod.psum({"loss": np.ones(1)}, "model")),
    "a long double": (pmod.ArgumentError, lambda: pmod.psum(np.longdouble(1), "model")),
    "a time": (pmod.ArgumentError, lambda: pmod.psum(np.timedelta64(1, "s"), "model")),
    "an int of more than 63 bits that is compared": (pmod.ArgumentError, lambda: pmod.pmax(2**63, "model")),
    "a weight that no float holds": (pmod.ArgumentError, lambda: pmod.pmean(X, "model", weight=10**400)),
    "a weight that is an array": (pmod.ArgumentError, lambda: pmod.pmean(X, "model", weight=np.ones(2))),
    "a root that is true": (pmod.AxisError, lambda: pmod.pick(X, "model", src=np.bool_(True))),
    "an offset that is an array": (pmod.AxisError, lambda: pmod.pshift(X, "model", np.ones(1))),
    "a width that is an array": (
        pmod.ShapeError,
        lambda: pmod.halo_exchange(X, "model", dim=0, width=np.ones((2, 2), int)),
    ),
    "sizes that are true": (pmod.ShapeError, lambda: pmod.shard(X, "model", sizes=(3, True))),
    "a number that no dtype holds": (pmod.ArgumentError, lambda: pmod.psum(2**70, "model")),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_pmod(what, messages):
    kind, call = REFUSED[what]
    for mesh, error in on_all_ranks(call):
        assert type(error) is kind, repr(error)
        assert f"at {coordinates(mesh.coords)}" in str(error)
    assert not messages


def test_a_wrong_weight_is_called_the_weight(messages):
    for weight in (X.to("meta"), X.to_sparse()):
        for _, error in on_all_ranks(lambda weight=weight: pmod.pmean(X, "model", weight=weight)):
            assert type(error) is pmod.ArgumentError
            assert "weight is on meta" in str(error) or "weight has layout" in str(error)
    assert not messages


@pytest.mark.parametrize("function", ["psum_scatter", "shard", "unshard", "gather", "scatter", "all_to_all",
                                      "all_gather_v", "gather_v", "psum_scatter_v", "scatter_v", "all_to_all_v",
                                      "indexed_all_to_all_v"])  # fmt: skip
def test_a_tensor_without_dims_where_tiled_does_not_help(function, messages):
    for run in (on_all_ranks, alone):
        for mesh, error in run(lambda: CALLS[function](X.sum(), "model")):
            assert type(error) is pmod.ShapeError
            dim = "split_dim" if function == "all_to_all" else "dim"
            where = f"pmod.{function}(axis='model') at {coordinates(mesh.coords)}"
            assert str(error).startswith(f"{where}: {dim} is 0 but x has 0 dims.\n")
            assert "tiled=False" not in str(error)
    assert not messages


def test_sizes_are_whatever_counts_as_an_int(messages):
    for sizes in (np.array([1, 3]), (torch.tensor(1), np.int32(3)), torch.tensor([1, 3]), range(1, 4, 2)):
        lengths = pmod.simulate(lambda sizes=sizes: pmod.shard(X, "model", sizes=sizes).shape[0], model=2)
        assert lengths == [1, 3]
    assert not messages


NUMPY: dict[str, Callable[[int], Any]] = {
    "pick": lambda n: pmod.pick(X, "model", src=np.int64(0)),
    "pshift": lambda n: pmod.pshift(X, "model", np.int32(1)),
    "ppermute of an array": lambda n: pmod.ppermute(X, "model", np.array([[i, (i + 1) % n] for i in range(n)])),
    "ppermute of arrays": lambda n: pmod.ppermute(X, "model", [np.array([i, i]) for i in range(n)]),
    "pshuffle of an array": lambda n: pmod.pshuffle(X, "model", np.arange(n)),
    "unshard": lambda n: pmod.unshard(X, "model", length=np.int64(4 * n)),
    "shard": lambda n: pmod.shard(X, "model", sizes=np.array([4] + [0] * (n - 1))),
    "split_sizes": lambda n: pmod.split_sizes(np.int64(4), np.int64(n)),
    "make_mesh": lambda n: pmod.make_mesh(model=np.int64(n), timeout=np.float32(60)),
    "halo_exchange": lambda n: pmod.halo_exchange(X, "model", dim=np.int64(0), width=np.int64(1)),
    "fft": lambda n: pmod.fft.fft(X, np.int64(4 * n), dim=np.int64(0), axis="model"),
    "sampler": lambda n: list(pmod.sampler(range(4), "model", batch_size=np.int64(2))),
    "fold_in": lambda n: pmod.fold_in(np.int64(3), "model"),
}


@pytest.mark.parametrize("what", NUMPY)
def test_numpy_s_ints_are_ints(what):
    """On one rank as on two; what comes back is made of Python's."""
    for n in (1, 2):
        for found in pmod.simulate(NUMPY[what], n, model=np.int64(n)):
            numbers = found if isinstance(found, list | tuple) else [found]
            assert not any(isinstance(number, np.generic) for number in numbers)


def test_split_sizes():
    for n, parts in ((-1, 2), (3, 0), (3, -1)):
        given = f"n is {n} and parts is {parts}"
        check(
            raised_by(lambda n=n, parts=parts: pmod.split_sizes(n, parts)), pmod.ShapeError,
            f"pmod.split_sizes: {given}.\nPass a length of 0 or more and 1 or more parts.",
        )  # fmt: skip


@pytest.mark.parametrize(("n", "parts"), [(2.5, 2), (4, 2.0), ("4", 2), (4, None)])
def test_split_sizes_of_what_is_no_int(n, parts):
    with pytest.raises(pmod.ShapeError):
        pmod.split_sizes(n, parts)


# --- the types, and the formatter -----------------------------------------------------------------------------------


def test_what_the_types_are_caught_as():
    kinds = [pmod.NoMeshError, pmod.AxisError, pmod.ShapeError, pmod.ArgumentError, pmod.TopologyError]
    kinds += [pmod.MismatchError, pmod.CollectiveTimeout]
    for kind in kinds:
        assert issubclass(kind, pmod.PmodError) and issubclass(kind, Exception)
        assert kind.__module__.startswith("pmod") and kind.__doc__
    assert [kind for kind in kinds if issubclass(kind, ValueError)] == [pmod.AxisError, pmod.ShapeError]
    assert [kind for kind in kinds if issubclass(kind, TypeError)] == [pmod.ArgumentError]


def test_explain():
    assert phrase("psum", "x is odd") == "pmod.psum: x is odd."
    assert phrase("psum", "why?", "Do so.") == "pmod.psum: why?\nDo so."
    assert phrase("psum", "x", axis=("a", "b")) == "pmod.psum(axis=('a', 'b')): x."
    assert phrase("psum", "x", "y", axis="a", coords={"a": 1, "b": 0}) == "pmod.psum(axis='a') at (a=1, b=0): x.\ny"
    assert coordinates(None) == "(outside the mesh)" and coordinates({}) == "()"
    assert near_miss("dta", ("data", "model")) == "; did you mean 'data'?"
    assert near_miss("zzz", ("data", "model")) == ""


def test_an_error_leaves_nothing_behind():
    """After a refused call the ranks go on together."""

    def rank() -> list[float]:
        found = []
        for wrong in (lambda: pmod.psum("x", "model"), lambda: pmod.start(pmod.psum, X.bool(), "model")):
            assert raised_by(wrong) is not None
            found.append(pmod.psum(1.0 + pmod.axis_index("model"), "model"))
            found.append(pmod.start(pmod.psum, torch.tensor(2.0), "model").wait().item())
        return found

    assert pmod.simulate(rank, **SIZES) == [[3.0, 4.0, 3.0, 4.0]] * 4


ODD: dict[str, tuple[Callable[[pmod.Mesh], Any], str]] = {
    "Topology(rank=True)": (lambda mesh: pmod.Topology(rank=True, world_size=2), "rank is True"),
    "P(sizes=(True, 2))": (lambda mesh: pmod.P("model", sizes={0: (True, 2)}), "sizes is {0: (True, 2)}"),
    "P(sizes={True: ...})": (lambda mesh: pmod.P("model", "data", sizes={True: (1, 2)}), "sizes is {True: (1, 2)}"),
    "local_slice": (lambda mesh: pmod.local_slice((True,), pmod.P(), mesh=mesh), "shape is (True,)"),
    "coords_of": (lambda mesh: mesh.coords_of(True), "rank is True"),
    "from_device_mesh": (lambda mesh: pmod.Mesh.from_device_mesh(3), "device_mesh is a int"),  # type: ignore[arg-type]
    "debug(on)": (lambda mesh: pmod.debug("no"), "on is 'no'"),  # type: ignore[arg-type]
    "debug(rtol)": (lambda mesh: pmod.debug(rtol="x"), "rtol is 'x'"),  # type: ignore[arg-type]
    "debug(rtol=nan)": (lambda mesh: pmod.debug(rtol=float("nan")), "rtol is nan"),
    "assert_invariant": (lambda mesh: pmod.assert_invariant(X, mesh["model"], rtol=-1.0), "rtol is -1.0"),
    "is_first": (lambda mesh: pmod.is_first(mesh, per_node="x"), "per_node is 'x'"),  # type: ignore[arg-type]
    "simulate": (lambda mesh: pmod.simulate(3, model=2), "fn is 3"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", ODD)
def test_odd_arguments(name: str) -> None:
    call, text = ODD[name]
    with pytest.raises(pmod.PmodError) as caught:
        call(pmod.make_mesh(model=1))
    assert text in str(caught.value)
