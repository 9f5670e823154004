"""Calls with one or two wrong arguments, drawn with a seed: each is to end in a PmodError before anything is sent.

`RIGHT` says how each public function is called rightly; a draw takes one, and puts odd values (`ODD`) in the place of
one or two of its arguments. The call is then made in one process, on two simulated ranks and on two processes, and
what became of it is one of OUTCOMES. `python -m tests.lib.wrong_calls --draws 10000` makes many, behind a deadline for
each, and prints what was raw, late or hung; `--accepted` prints what was taken, to be looked at by eye.
"""

# pyright: standard

from __future__ import annotations

import argparse
import collections
import contextlib
import inspect
import multiprocessing
import os
import random
import re
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any

import attrs
import numpy as np
import torch
from torch import nn

import pmod
from pmod import P
from pmod._core.collective import COLLECTIVES
from pmod._mesh.ambient import resolve
from pmod._run.launch import Ranks
from pmod._run.task import Task
from pmod._wire.traffic import Meter, meters

F = pmod.nn.functional
OUTCOMES = ("accepted", "clear", "memory", "raw", "raw after sending", "late", "hung")


# --- right calls ------------------------------------------------------------------------------------------------------


def here() -> pmod.Mesh:
    return pmod.current_mesh()


def size() -> int:
    return here().size


def x() -> torch.Tensor:
    return torch.arange(8.0).reshape(4, 2) + pmod.axis_index("x")


def evenly() -> list[int]:
    return [4] * size()


def one_to_each() -> list[int]:
    return [4 // size()] * size()


def rows() -> list[torch.Tensor]:
    return [torch.tensor([0, 1])] * size()


def identity(*args: Any, **kwargs: Any) -> Any:
    """A function of the user's that takes whatever it is given."""
    return args[0] if args else None


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def image() -> torch.Tensor:
    return torch.ones(1, 4, 3)


def on_four() -> pmod.Mesh:
    return pmod.make_mesh(a=2, b=2, topology=pmod.Topology(rank=1, world_size=4))


def batches() -> Any:
    return pmod.sampler(range(8), "x", batch_size=2)


def entered(manager: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with manager(*args, **kwargs):
        pass


def restored(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Of a function that leaves a state behind."""
    state = torch.get_rng_state()
    try:
        return function(*args, **kwargs)
    finally:
        torch.set_rng_state(state)


def traced() -> pmod.trace:
    with pmod.trace() as t:
        pass
    return t


_FOLDER = tempfile.TemporaryDirectory()  # what is drawn as the name of a file may well be one


def in_folder(path: Any) -> Any:
    return os.path.join(_FOLDER.name, path) if isinstance(path, str) else path


def perceptron() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def ring() -> torch.Tensor:
    return torch.stack([torch.arange(4), torch.arange(4).roll(1)])


def ring_plan() -> pmod.graph.Plan:
    """Half of the ring's four nodes on each of two ranks, or all on one: made without a message."""
    axis = resolve(here(), "a test")
    other = [int(rank != axis.index) for rank in range(axis.size)]
    row = torch.zeros(sum(other), dtype=torch.int64)
    exchange = pmod.ExchangePlan(tuple(other), tuple(other), row, (0, len(row) - 1), (axis.group_key, axis.index))
    return pmod.graph.Plan(here(), exchange, 4 // axis.size, sum(other))


Right = tuple[Callable[..., Any], dict[str, Callable[[], Any]]]
"""A function, and right arguments by name; those that are left out here have defaults."""

TREE: dict[str, Callable[[], Any]] = {"x": x, "axis": lambda: "x"}
SIGNAL: dict[str, Callable[[], Any]] = {"x": lambda: torch.ones(2, 4), "axis": lambda: "x"}
CONV: dict[str, Callable[[], Any]] = {"input": image, "axis": lambda: "x"}
GRAPH: dict[str, Callable[[], Any]] = {"edge_index": ring, "n": lambda: 4}
CLOUDS: dict[str, Callable[[], Any]] = {
    "points": lambda: torch.ones(3, 2), "queries": lambda: torch.ones(2, 2), "axis": lambda: "x",
}  # fmt: skip
MODES: dict[str, Callable[[], Any]] = {"s": lambda: (8, 8), "axis": lambda: "x"}
OF_FFT = ("fft", "ifft", "rfft", "irfft", "fft2", "ifft2", "rfft2", "irfft2", "fftn", "ifftn", "rfftn", "irfftn",
          "hfft", "ihfft", "hfft2", "ihfft2", "hfftn", "ihfftn", "fftshift", "ifftshift")  # fmt: skip



def volume() -> torch.Tensor:
    return torch.ones(1, 4, 3, 3)


def points() -> torch.Tensor:
    return torch.ones(2, 4, 3)


ATTENTION: dict[str, Callable[[], Any]] = {"query": points, "key": points, "value": points}
WINDOW: dict[str, Callable[[], Any]] = {"kernel_size": lambda: 2}
SHAPED: dict[str, Callable[[], Any]] = {"dim": lambda: -1, "normalized_shape": lambda: (3 * size(),)}
# arguments beside the input and the axis, which an entry may replace
LAYERS: dict[str, dict[str, Callable[[], Any]]] = {
    "conv_transpose1d": {"weight": lambda: torch.ones(4, 2, 1)},
    "conv_transpose2d": {"weight": lambda: torch.ones(1, 2, 1, 1)},
    "conv_transpose3d": {"input": volume, "weight": lambda: torch.ones(1, 2, 1, 1, 1)},
    **{f"{kind}_pool{n}d": WINDOW | ({"input": volume} if n == 3 else {}) | more
       for kind, more in {"max": {}, "avg": {}, "lp": {"norm_type": lambda: 2}}.items() for n in (1, 2, 3)},
    **{f"adaptive_{kind}_pool{n}d": {"output_size": lambda: 2} | ({"input": volume} if n == 3 else {})
       for kind in ("avg", "max") for n in (1, 2, 3)},
    "interpolate": {"size": lambda: 5}, "unfold": WINDOW, "fold": {
        "input": lambda: torch.ones(1, 2, 4), "kernel_size": lambda: 1, "output_size": lambda: (2 * size(), 2)},
    "pixel_shuffle": {"input": lambda: torch.ones(4, 2, 2), "upscale_factor": lambda: 2},
    "pixel_unshuffle": {"input": lambda: torch.ones(1, 4, 2), "downscale_factor": lambda: 2},
    "pad": {"pad": lambda: (1, 1)}, "roll": {"shifts": lambda: 1, "dims": lambda: 1}, "flip": {"dims": lambda: 1},
    "diff": {"dim": lambda: 1}, "recut": {"to": lambda: [1] * size()},
    "batch_norm": {"running_mean": lambda: None, "running_var": lambda: None, "training": lambda: True},
    "instance_norm": {}, "group_norm": {"num_groups": lambda: 2}, "layer_norm": SHAPED, "rms_norm": SHAPED,
    "softmax": {"dim": lambda: 1}, "log_softmax": {"dim": lambda: 1}, "cumsum": {"dim": lambda: 1},
    "index_select": {"dim": lambda: 1, "index": lambda: torch.tensor([0])},
    "take_along_dim": {"dim": lambda: 1, "indices": lambda: torch.tensor([[[0]]])},
    "sort": {}, "topk": {"k": lambda: 1}, "zigzag": {},
    "embedding": {"input": lambda: torch.tensor([0, 1]), "weight": x},
    "linear": {"input": x, "weight": x}, "cross_entropy": {"input": x, "target": lambda: torch.tensor([0, 1, 0, 1])},
    **{name: {"target": image} for name in ("mse_loss", "l1_loss", "relative_l2_loss")},
}  # fmt: skip

RIGHT: dict[str, Right] = {
    **{name: (of.function, TREE) for name, of in COLLECTIVES.items() if not of.required},
    "replicate": (pmod.replicate, TREE),
    "ppermute": (pmod.ppermute, {**TREE, "perm": lambda: [(0, 0)]}),
    "pshuffle": (pmod.pshuffle, {**TREE, "perm": lambda: list(range(size()))[::-1]}),
    "all_to_all": (pmod.all_to_all, {**TREE, "split_dim": lambda: 0, "concat_dim": lambda: 1}),
    "psum_scatter_v": (pmod.psum_scatter_v, {**TREE, "sizes": one_to_each}),
    "scatter_v": (pmod.scatter_v, {**TREE, "sizes": one_to_each}),
    "all_to_all_v": (pmod.all_to_all_v, {**TREE, "send_sizes": one_to_each}),
    "indexed_all_to_all_v": (pmod.indexed_all_to_all_v, {**TREE, "indices": rows}),
    "exchange_plan": (pmod.exchange_plan, {"indices": rows, "axis": lambda: "x"}),
    "halo_exchange": (pmod.halo_exchange, {**TREE, "width": lambda: 1}),
    "halo_reduce": (pmod.halo_reduce, {**TREE, "width": lambda: 1}),
    "axis_index": (pmod.axis_index, {"axis": lambda: "x"}),
    "axis_size": (pmod.axis_size, {"axis": lambda: "x"}),
    "barrier": (pmod.barrier, {"axis": lambda: "x"}),
    "split_sizes": (pmod.split_sizes, {"n": lambda: 5, "parts": lambda: 2}),
    "set_mesh": (partial(entered, pmod.set_mesh), {"mesh": here}),
    "make_mesh": (
        lambda axes=None, ranks=None, topology=None, timeout=None, **sizes:
        pmod.make_mesh(axes, ranks=ranks, topology=topology, timeout=timeout, **sizes),
        {"axes": lambda: None, "ranks": lambda: None, "topology": lambda: None, "timeout": lambda: None,
         "x": lambda: -1, "y": lambda: 1},
    ),
    "Topology": (pmod.Topology, {"rank": lambda: 0, "world_size": lambda: 4}),
    "Topology.detect": (pmod.Topology.detect, {
        "environ": lambda: {"RANK": "0", "WORLD_SIZE": "1"}, "device_count": lambda: 0,
    }),
    "Mesh.axis_index": (lambda axis: here().axis_index(axis), {"axis": lambda: "x"}),
    "Mesh.axis_size": (lambda axis: here().axis_size(axis), {"axis": lambda: "x"}),
    "Mesh.coords_of": (lambda rank: here().coords_of(rank), {"rank": lambda: 0}),
    "Mesh.group": (lambda axis: on_four().group(axis), {"axis": lambda: "nope"}),
    "Mesh.__getitem__": (lambda axis: here()[axis], {"axis": lambda: "x"}),
    "Mesh.flatten": (
        lambda axes, name: on_four().flatten(axes, name), {"axes": lambda: ("a", "b"), "name": lambda: "all"}
    ),
    "Mesh.split": (lambda axis, **sizes: here().split(axis, **sizes),
                   {"axis": lambda: "x", "p": lambda: -1, "q": lambda: 1}),
    "Mesh.rename": (lambda **names: on_four().rename(**names), {"a": lambda: "c"}),
    "Mesh.from_device_mesh": (pmod.Mesh.from_device_mesh, {"device_mesh": lambda: None}),
    "Mesh": (pmod.Mesh, {
        "axis_names": lambda: ("x",), "axes": lambda: (((2, 1),),), "offset": lambda: 0, "base": lambda: None,
        "topology": lambda: pmod.Topology(rank=0, world_size=2),
    }),
    "P": (lambda entry, other, sizes=None: P(entry, other, sizes=sizes),
          {"entry": lambda: "x", "other": lambda: None}),
    "P.placements": (lambda mesh: P("x").placements(mesh), {"mesh": here}),
    "P.from_placements": (P.from_placements, {"placements": lambda: (), "mesh": here}),
    "pvary_params": (pmod.pvary_params, {"tree": lambda: {"w": x()}, "specs": lambda: {"w": P()}}),
    "global_norm": (pmod.global_norm, {"tree": lambda: {"w": x()}, "specs": lambda: {"w": P("x")}}),
    "to_dtensors": (pmod.to_dtensors, {"tree": lambda: None, "specs": lambda: None}),
    "from_dtensors": (pmod.from_dtensors, {"tree": x}),
    "local_slice": (pmod.local_slice, {"shape": lambda: (4, 2), "spec": lambda: P("x")}),
    "local_slice.read": (
        lambda shape, spec, halo, boundary="zeros":
        pmod.Block.read(
            pmod.local_slice(shape, spec, halo={} if halo is None else halo, boundary=boundary), torch.zeros(shape)
        ),
        {"shape": lambda: (4, 2), "spec": lambda: P("x"), "halo": lambda: {0: 1}},
    ),
    "local_coords": (pmod.local_coords, {"shape": lambda: (4, 2), "spec": lambda: P("x")}),
    "shard_map": (
        lambda f, arg, mesh=None, in_specs=None, out_specs=None:
        pmod.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(arg),
        {"f": lambda: identity, "arg": lambda: torch.arange(8.0).reshape(4, 2), "in_specs": lambda: P("x"),
         "out_specs": lambda: P("x")},
    ),
    "assert_invariant": (pmod.assert_invariant, {"tree": lambda: torch.ones(2), "axis": lambda: "x"}),
    "mark_varying": (pmod.mark_varying, {"leaf": x, "axis": lambda: "x"}),
    "checked": (lambda f, arg: pmod.checked(f)(arg), {"f": lambda: identity, "arg": x}),
    "debug": (partial(entered, pmod.debug), {"on": lambda: False}),
    "draw": (pmod.draw, {"x": lambda: (4, 2), "spec": lambda: P("x")}),
    "draw_collective": (pmod.draw_collective, {"name": lambda: "psum"}),
    "estimate": (pmod.estimate, {"fn": lambda: identity, "arg": x, "mesh": lambda: {"x": 4}}),
    "explain": (pmod.explain, {"f": lambda: identity, "arg": x}),
    "trace.total_bytes": (lambda axis: traced().total_bytes(axis), {"axis": lambda: "x"}),
    "trace.chrome": (lambda path: traced().chrome(in_folder(path)), {"path": lambda: "trace.json"}),
    "first_rank_first": (partial(entered, pmod.first_rank_first), {}),
    "is_first": (pmod.is_first, {}),
    "simulate": (pmod.simulate, {"fn": lambda: identity, "arg": x, "x": lambda: 1}),
    "start": (lambda f, arg, axis: pmod.start(f, arg, axis).wait(),
              {"f": lambda: pmod.psum, "arg": x, "axis": lambda: "x"}),
    "data_parallel": (pmod.data_parallel, {"module": module, "axis": lambda: "x"}),
    "remove_data_parallel": (pmod.remove_data_parallel, {"module": module}),
    "no_sync": (partial(entered, pmod.no_sync), {"model": lambda: pmod.data_parallel(module(), "x")}),
    "share_parameters": (pmod.share_parameters, {"module": module, "axis": lambda: "x"}),
    "fold_in": (pmod.fold_in, {"seed": lambda: 0, "axis": lambda: "x"}),
    "rng": (partial(entered, pmod.rng), {"seed": lambda: 0, "axis": lambda: "x"}),
    "sampler": (lambda dataset, axis, **options: list(pmod.sampler(dataset, axis, **options)),
                {"dataset": lambda: range(8), "axis": lambda: "x"}),
    "sampler.set_epoch": (lambda epoch: batches().set_epoch(epoch), {"epoch": lambda: 1}),
    "sampler.state_dict": (lambda done: batches().state_dict(done), {"done": lambda: 1}),
    "sampler.load_state_dict": (lambda state: batches().load_state_dict(state),
                                {"state": lambda: batches().state_dict(1)}),
    **{f"fft.{name}": (getattr(pmod.fft, name), SIGNAL) for name in OF_FFT},
    "fft.fftfreq": (pmod.fft.fftfreq, {"n": lambda: 4, "axis": lambda: "x"}),
    "fft.rfftfreq": (pmod.fft.rfftfreq, {"n": lambda: 4, "axis": lambda: "x"}),
    "nn.functional.conv1d": (F.conv1d, {**CONV, "weight": lambda: torch.ones(2, 4, 1)}),
    "nn.functional.conv2d": (F.conv2d, {**CONV, "weight": lambda: torch.ones(2, 1, 3, 3), "padding": lambda: 1}),
    "nn.functional.conv3d": (F.conv3d, {
        "input": lambda: torch.ones(1, 4, 3, 3), "axis": lambda: "x", "weight": lambda: torch.ones(1, 1, 3, 3, 3),
        "padding": lambda: 1,
    }),
    **{f"nn.functional.{name}": (getattr(F, name), {**CONV, **more}) for name, more in LAYERS.items()},
    "nn.functional.cat": (F.cat, {"tensors": lambda: [x(), x()], "axis": lambda: "x"}),
    "nn.functional.scaled_dot_product_attention": (F.scaled_dot_product_attention, {**ATTENTION, "axis": lambda: "x"}),
    **{f"nn.functional.neighborhood_attention{n}d": (
        getattr(F, f"neighborhood_attention{n}d"), {**dict.fromkeys(ATTENTION, around), **WINDOW, "axis": lambda: "x"})
       for n, around in ((1, points), (2, points), (3, volume))},
    "nn.functional.out_sizes": (partial(F.out_sizes, "conv2d"), {"sizes": lambda: (4, 4), "kernel_size": lambda: 3}),
    "nn.column": (pmod.nn.column, {"groups": lambda: 3}),
    "nn.tensor_parallel": (pmod.nn.tensor_parallel, {
        "module": perceptron, "plan": lambda: {"0": "column", "2": "row"}, "axis": lambda: "x",
    }),
    "graph.partition": (pmod.graph.partition, {**GRAPH, "axis": lambda: "x"}),
    "graph.halo": (pmod.graph.halo, {
        "x": lambda: torch.ones(4 // size(), 2), "plan": ring_plan,
    }),
    "graph.owners": (pmod.graph.owners, {**GRAPH, "parts": lambda: 2}),
    "graph.by_coordinates": (pmod.graph.by_coordinates, {"points": lambda: torch.ones(4, 2), "parts": lambda: 2}),
    "graph.uses_metis": (pmod.graph.uses_metis, {"n": lambda: 8, "parts": lambda: 2}),
    "graph.knn": (pmod.graph.knn, {**CLOUDS, "k": lambda: 1}),
    "graph.radius_search": (pmod.graph.radius_search, {**CLOUDS, "radius": lambda: 1.0}),
    "domain_parallel": (pmod.domain_parallel, {"model": lambda: torch.relu, "in_specs": lambda: pmod.P("x")}),
    "cut_of": (pmod.cut_of, {"y": lambda: pmod.domain_parallel(torch.relu, pmod.P("x"))(torch.ones(2))}),
    "sht.sht": (pmod.sht.sht, {"x": lambda: torch.ones(4, 6), "axis": lambda: "x"}),
    "sht.isht": (pmod.sht.isht, {**MODES, "x": lambda: torch.ones(2, 2 * size(), dtype=torch.complex64)}),
    "sht.vsht": (pmod.sht.vsht, {"x": lambda: torch.ones(2, 4, 6), "axis": lambda: {-1: "x"}}),
    "sht.ivsht": (pmod.sht.ivsht, {**MODES, "x": lambda: torch.ones(2, 2, 2 * size(), dtype=torch.complex64)}),
    "sht.latitudes": (pmod.sht.latitudes, {"nlat": lambda: 4}),
    "testing.assert_matches_serial": (pmod.testing.assert_matches_serial, {
        "f": lambda: identity, "serial": lambda: identity, "args": lambda: (torch.ones(4, 2),),
        "in_specs": lambda: (P("x"),), "out_specs": lambda: P("x"),
    }),
}  # fmt: skip

# What is not drawn: types of errors, values that functions give, and what takes no argument or starts processes.
NOT_DRAWN = {
    "current_mesh",
    "keep_mesh",
    "shutdown",
    "Block",
    "ExchangePlan",
    "Pending",
    "SharedParameters",
    "Watcher",
    "trace",
    "launch",
    "nn.Column",
    "graph.Part",
    "graph.Plan",
}

# --- odd values -------------------------------------------------------------------------------------------------------


class Struck(dict[str, Any]):
    """A dict of a kind of its own."""


class Torn:
    """What raises whatever one asks of it."""

    def __index__(self) -> int:
        raise RuntimeError("torn")

    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError("torn")

    def __len__(self) -> int:
        raise RuntimeError("torn")


def _cycle() -> list[Any]:
    ring: list[Any] = [torch.ones(4, 2)]
    ring.append(ring)
    return ring


def _quantized(dtype: torch.dtype) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(4, 2), 0.1, 0, dtype)


def _nested(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2, 2), torch.ones(3, 2)], layout=layout)


def _as_sparse(kind: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(torch.ones(4, 2), kind)()


def _inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(4, 2)


def _fake() -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(4, 2)


# of all names one each, in an order that is the same everywhere; what is quantized is made otherwise
DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
PLAIN = [dtype for dtype in DTYPES if not str(dtype).startswith(("torch.q", "torch.torch.q"))]


def _of_dtype(dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(4, 2, dtype=dtype)


NUMBERS: list[Any] = [
    -1, -2, -7, 0, 1, 2, 3, 7, 2**31, 2**62, 2**63, 2**64, -(2**64), 10**400, 0.5, 1.0, 4.0, -0.0, float("nan"),
    float("inf"), -float("inf"), 1e300, 1j, True, False, np.int64(1), np.int8(-1), np.uint64(2**64 - 1),
    np.float32(1.5), np.float64("nan"), np.bool_(True), np.complex64(1j), Fraction(1, 2), Decimal("1.5"),
    np.timedelta64(1), np.longdouble(1),
]  # fmt: skip
TEXTS: list[Any] = ["", "x", "y", "nope", "no", "sum", "0", b"x", "zeros", "same", "cuda:7", "meta", "float32",
    "é\ud800"]
LISTS: list[Any] = [
    [], (), [1], [1, 2], [2, 2], (4, 0), [4], [4, 4], (0, 1), (-1, 5), [[1, 2]], [[[]]], ["a"], ["x"], [None],
    [None, None],
    [0.5, 3.5], [True, True], [2**62, 2**62], [2**64, 4], [float("nan")] * 2, ((0, 1), (1, 0)), [(0, 0), (0, 1)],
    [(0,)],
    ["x", "x"], ("x", "y"), [1, "a"], [np.int64(4), np.int64(4)], list(range(300)), [b"x"], [{}], "ab", range(2),
    range(4),
]  # fmt: skip
MAPPINGS: list[Any] = [
    {}, {0: "x"}, {0: "x", 1: "x"}, {0: "x", -2: "x"}, {5: "x"}, {0: 1}, {0: None}, {0: [2, 2]}, {"a": 1, 2: 3},
    {"x": 2}, {"x": -1},
    {"x": "2"}, {"nope": 1}, {None: 1}, {0: (1, 1)}, {"0": "x"}, {0.5: "x"}, {"RANK": 0}, {"RANK": "0"}, {1: {2: {}}},
    {"epoch": 0, "start": 3, "length": 8, "seed": 0, "shuffle": 2},
]  # fmt: skip

def _each(values: list[Any]) -> dict[str, Callable[[], Any]]:
    return {repr(value)[:40]: (lambda value=value: value) for value in values}


OBJECTS: dict[str, Any] = {
    "object": object(), "torn": Torn(), "int": int, "Tensor": torch.Tensor, "lambda": lambda *_: None,
    "torch.sum": torch.sum,
    "pmod.psum": pmod.psum, "np.float32": np.float32, "slice": slice(0, 1), "a set": {1, 2},
    "frozenset": frozenset("x"),
    "torch.device": torch.device("cpu"), "torch.strided": torch.strided, "Ellipsis": ..., "None": None,
}  # fmt: skip

# By kind, each as likely as another; made anew for each call.
KINDS: dict[str, dict[str, Callable[[], Any]]] = {
  "numbers": _each(NUMBERS), "texts": _each(TEXTS), "lists": _each(LISTS), "mappings": _each(MAPPINGS),
  "dtypes": _each(DTYPES),
  "tensors of dtypes": {f"zeros of {dtype}": partial(_of_dtype, dtype) for dtype in PLAIN},
  "objects": {name: (lambda value=value: value) for name, value in OBJECTS.items()},
  "arrays": {
    "np.array(1)": lambda: np.array(1),
    "np.array([1, 2])": lambda: np.array([1, 2]),
    "np.array([4.0, 0.5])": lambda: np.array([4.0, 0.5]),
    "np.array('x')": lambda: np.array("x"),
    "np.array of objects": lambda: np.array([None, "a"], dtype=object),
    "np.ones((4, 2))": lambda: np.ones((4, 2)),
  },
  "tensors": {
    "tensor(0)": lambda: torch.tensor(0),
    "tensor(1)": lambda: torch.tensor(1),
    "tensor(0.5)": lambda: torch.tensor(0.5),
    "tensor(True)": lambda: torch.tensor(True),
    "tensor(nan)": lambda: torch.tensor(float("nan")),
    "tensor([0, 1])": lambda: torch.tensor([0, 1]),
    "tensor([4, 4])": lambda: torch.tensor([4, 4]),
    "tensor of no elements": lambda: torch.ones(0),
    "tensor (0, 2)": lambda: torch.ones(0, 2),
    "tensor (3, 2)": lambda: torch.ones(3, 2),
    "tensor of six dims": lambda: torch.ones(1, 2, 1, 2, 1, 2),
    "tensor of NaN": lambda: torch.full((4, 2), float("nan")),
    "tensor that requires grad": lambda: torch.ones(4, 2, requires_grad=True),
    "result of an operation": lambda: torch.ones(4, 2, requires_grad=True) * 2,
    "expanded": lambda: torch.ones(1, 2).expand(4, 2),
    "conj": lambda: torch.ones(4, 2, dtype=torch.complex64).conj(),
    "neg": lambda: torch.ones(4, 2, dtype=torch.complex64).conj().imag,
    "qint8": lambda: _quantized(torch.qint8),
    "quint8": lambda: _quantized(torch.quint8),
    "qint32": lambda: _quantized(torch.qint32),
    "nested strided": lambda: _nested(torch.strided),
    "nested jagged": lambda: _nested(torch.jagged),
    "sparse coo": lambda: _as_sparse("to_sparse"),
    "sparse csr": lambda: _as_sparse("to_sparse_csr"),
    "sparse csc": lambda: _as_sparse("to_sparse_csc"),
    "mkldnn": lambda: _as_sparse("to_mkldnn"),
    "meta tensor": lambda: torch.ones(4, 2, device="meta"),
    "inference tensor": _inference,
    "fake tensor": _fake,
    "lazy parameter": lambda: nn.UninitializedParameter(),
    "lazy buffer": lambda: nn.UninitializedBuffer(),
    "parameter": lambda: nn.Parameter(torch.ones(4, 2)),
  },
  "trees and modules": {
    "generator": lambda: (i for i in range(2)),
    "packed sequence": lambda: nn.utils.rnn.pack_sequence([torch.ones(2)]),
    "storage": lambda: torch.ones(2).untyped_storage(),
    "a cycle": _cycle,
    "an OrderedDict": lambda: collections.OrderedDict(b=torch.ones(4, 2), a=None),
    "a defaultdict": lambda: collections.defaultdict(list),
    "a dict of its own kind": lambda: Struck(a=torch.ones(4, 2)),
    "unlike keys": lambda: {1: torch.ones(4, 2), "a": torch.ones(4, 2)},
    "a tree with an object": lambda: {"a": torch.ones(4, 2), "b": object()},
    "a tree with a text": lambda: [torch.ones(4, 2), "text"],
    "a list of tensors": lambda: [torch.ones(4, 2), torch.ones(3)],
    "a set of tensors": lambda: {torch.ones(4, 2)},
    "lazy module": lambda: nn.LazyLinear(3),
    "meta module": lambda: nn.Linear(2, 2, device="meta"),
    "module without parameters": lambda: nn.ReLU(),
    "module with a float8 buffer": lambda: _with_buffer(torch.ones(2).to(torch.float8_e4m3fn)),
    "module with a sparse buffer": lambda: _with_buffer(_as_sparse("to_sparse")),
    "module of uint16": lambda: _with_buffer(_of_dtype(torch.uint16)),
    "module": module,
  },
  "pmod's own": {
    "a mesh of other axes": lambda: pmod.make_mesh(z=1, topology=pmod.Topology(rank=0, world_size=1)),
    "a mesh elsewhere": lambda: pmod.make_mesh(x=1, ranks=[2], topology=pmod.Topology(rank=1, world_size=4)),
    "a mesh without axes": lambda: pmod.make_mesh(x=1, topology=pmod.Topology(rank=0, world_size=1))[()],
    "the mesh": here,
    "a sub-mesh": lambda: here()["x"],
    "P()": lambda: P(),
    "P('x')": lambda: P("x"),
    "P('nope')": lambda: P("nope"),
    "P(None, 'x')": lambda: P(None, "x"),
    "P of three": lambda: P(None, None, "x"),
    "P with sizes": lambda: P("x", sizes={0: (1, 3)}),
    "topology": lambda: pmod.Topology(rank=0, world_size=2),
    "a plan": lambda: pmod.ExchangePlan((1,), (1,), torch.tensor([0]), (0, 0), ("0:1:1", 0)),
    "a broken plan": lambda: pmod.ExchangePlan(1, None, "x", 0, 3),  # pyright: ignore
    "a list of floats": lambda: [torch.ones(2)] * size(),
    "indices from -1": lambda: [torch.tensor([-1])] * size(),
    "indices past the end": lambda: [torch.tensor([99])] * size(),
  },
}  # fmt: skip
# What is nearly right, or right in another way: what is odd beside it is met further inside.
NEAR: dict[str, list[str]] = {
    "x": ["torch.ones(4, 2)", "torch.ones(2, 4)", "torch.ones(8)", "torch.ones(3, 5)", "torch.ones(())",
          "torch.ones(0, 2)", "torch.ones(4, 4, 4)", "torch.ones(4, 2).bool()", "torch.ones(4, 2).to(torch.complex32)",
          "torch.ones(4, 2).long()", "torch.ones(4, 2).to(torch.uint32)", "torch.ones(4, 2).to(torch.float8_e5m2)",
          "torch.ones(4, 2, dtype=torch.complex64)", "torch.ones(4, 2, requires_grad=True)", "0.5", "[]", "None",
          "{'a': torch.ones(4, 2), 'b': [torch.ones(4), torch.ones(4).int()]}", "torch.ones(4, 2)[::2]"],
    "axis": ["'x'", "('x',)", "['x']", "here()['x']", "here()", "()", "{0: 'x'}", "{1: 'x'}", "{-1: 'x'}",
             "{0: 'x', 1: 'x'}", "{}", "None"],
    "dim": ["0", "1", "-1", "2", "-3", "(0, 1)", "(1, 0)", "(0,)", "(0, 0)", "None", "np.int64(1)"],
    "sizes": ["[4] * size()", "[4 // size()] * size()", "[1] + [3] * (size() - 1)",
              "[2, 2]", "[4, -1]", "[4, 2**62]", "{0: [4] * size()}", "{0: None}", "[[4] * size()]",
              "np.array([4, 4])"],
    "specs": ["P()", "P('x')", "P(None, 'x')", "P('x', sizes={0: [4] * size()})", "{'w': P()}", "{'v': P()}", "[P()]",
              "(P('x'),)", "P(('x',))", "None", "{'w': None}", "P('nope')"],
    "int": ["0", "1", "2", "3", "-1", "size()", "size() - 1", "np.int64(0)", "(1, 1)", "(0, 1)", "[1]", "(1, 2, 3)",
            "{0: 1}", "{1: (1, 0)}", "(2, None)", "9", "None", "(-1, 4)", "[(0, 1), (1, 0)]", "[1, 0]", "[0]"],
    "flag": ["True", "False"],
    "text": ["'zeros'", "'periodic'", "'reflect'", "'replicate'", "'circular'", "'ortho'", "'sum'", "'mean'", "'same'",
             "'valid'", "'forward'", "'Zeros'", "1", "{0: 'periodic'}", "{1: 'zeros'}"],
    "weight": ["torch.ones(2, 1, 3, 3)", "torch.ones(2, 4, 1)", "torch.ones(1, 1, 3, 3, 3)", "torch.ones(4, 2)", "0",
               "torch.ones(1, 1, 3, 3).double()", "torch.ones(0, 1, 3, 3)", "torch.ones(1, 1, 0, 3)",
               "torch.ones(4, 1)"],
    "module": ["module()", "nn.Linear(2, 2)", "nn.Embedding(3, 2, sparse=True)", "nn.BatchNorm1d(2)"],
}  # fmt: skip
KIND_OF = {
    **dict.fromkeys(("in_dim", "out_dim", "split_dim", "concat_dim"), "dim"),
    **dict.fromkeys(("wrap", "tiled"), "flag"),
    **dict.fromkeys(("send_sizes", "recv_sizes", "split_sizes", "concat_sizes"), "sizes"),
    **dict.fromkeys(("in_specs", "out_specs", "spec"), "specs"), **dict.fromkeys(("tree", "input", "bias"), "x"),
    **dict.fromkeys(("boundary", "norm", "padding_mode", "reduce", "name"), "text"),
    **dict.fromkeys(("width", "n", "s", "modes", "stride", "padding", "dilation", "groups", "src", "dst", "perm",
                     "offset", "length", "order", "halo", "kernel_size", "parts", "seed", "batch_size"), "int"),
}  # fmt: skip


ODD = {name: make for kind in KINDS.values() for name, make in kind.items()}


def _with_buffer(buffer: torch.Tensor) -> nn.Module:
    made = nn.Linear(2, 2)
    made.register_buffer("b", buffer)
    return made


# --- draws ------------------------------------------------------------------------------------------------------------


@attrs.frozen
class Draw:
    """A call: of which function, and what is odd about it, by argument; `(in a tree)` where it is a leaf of one."""

    name: str
    odd: dict[str, tuple[str, bool]]
    near: dict[str, str] = attrs.field(factory=dict)

    def __str__(self) -> str:
        near = [f"{key}={what}" for key, what in self.near.items()]
        shown = near + [f"{key}={what}" + " (in a tree)" * leaf for key, (what, leaf) in self.odd.items()]
        return f"{self.name}({', '.join(shown)})"

    def call(self) -> Any:
        function, right = RIGHT[self.name]
        given = {key: make() for key, make in right.items() if key not in self.odd}
        given |= {key: eval(what, globals()) for key, what in self.near.items()}
        for key, (what, leaf) in self.odd.items():
            value = ODD[what]()
            given[key] = {"a": x(), "b": [value, None]} if leaf else value
        positional = [given.pop(key) for key in ("fn", "f", "arg") if key in given and self.name in BY_POSITION]
        return function(*positional, **given)


# What a function of the user's raises is the user's.
NO_FUNCTIONS = [what for what in ODD if what not in ("int", "Tensor", "torch.sum", "np.float32", "pmod.psum")]
NO_FUNCTIONS = [what for what in NO_FUNCTIONS if "module" not in what and not what.startswith("a su")]
BY_POSITION = ("estimate", "explain", "simulate")
ALONE = ("simulate", "estimate", "explain")  # no ranks call them
OPTIONS = {"sampler": ("batch_size", "shuffle", "seed", "drop_last"), "draw_collective": ("src", "dim", "perm"),
           "draw": ("halo", "mesh")}  # fmt: skip


def arguments_of(name: str) -> list[str]:
    """What can be odd about a call."""
    function, right = RIGHT[name]
    while isinstance(function, partial) and function.func is entered:
        function = function.args[0]
    parameters = inspect.signature(function).parameters.values()
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return list(dict.fromkeys([*right, *named, *OPTIONS.get(name, ())]))


def drawn(seed: int) -> Draw:
    """The draw of this seed: one or two odd arguments, and some that are nearly right."""
    chance = random.Random(seed)
    name = chance.choice(list(RIGHT))
    known = [key for key in arguments_of(name) if key not in ("run",)]
    if not known:
        return Draw(name, {})
    odd: dict[str, tuple[str, bool]] = {}
    for key in chance.sample(known, min(len(known), chance.choice((0, 1, 1, 1, 2)))):
        what = chance.choice(list(chance.choice(list(KINDS.values()))))
        if key in ("f", "fn", "serial", "attn_mask") and what not in NO_FUNCTIONS:
            what = "None"
        odd[key] = what, key in ("x", "tree") and chance.random() < 0.3
    able = [key for key in known if KIND_OF.get(key, key) in NEAR and key not in odd]
    some = chance.sample(able, min(len(able), chance.choice((0, 0, 1, 2, 3) if odd else (1, 2, 3))))
    return Draw(name, odd, {key: chance.choice(NEAR[KIND_OF.get(key, key)]) for key in some})


# --- what becomes of a call -------------------------------------------------------------------------------------------

# The ranks must have told one another how much they hold before these can be known.
TOLD = (
    r"all shards together have|the whole has|the signal has|modes is .* dim|MismatchError|sizes add up to|"
    r"differ between ranks|holds another number|nlat is \d|longitudes|degrees and \d|all ranks together hold"
)
OWN = {"testing.assert_matches_serial": AssertionError, "trace.chrome": OSError}  # what they are documented to raise


def outcome(draw: Draw) -> tuple[str, str]:
    """One of OUTCOMES but hung, and the error or the result; `memory` is where this machine has too little of it."""
    meter = Meter()
    meters().append(meter)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            result = draw.call()
        return "accepted", _shown(result)
    except pmod.PmodError as error:
        text = f"{type(error).__name__}: {error}"
        late = meter.total.messages > 0 and not re.search(TOLD, text)
        return ("late" if late else "clear"), text
    except OWN.get(draw.name, ()) as error:
        return "clear", f"{type(error).__name__}: {error}"
    except Exception as error:
        text = f"{type(error).__name__}: {str(error)[:300]}"
        if isinstance(error, MemoryError) or "can't allocate memory" in text:
            return "memory", text
        return ("raw after sending" if meter.total.messages else "raw"), text
    finally:
        if meter in meters():
            meters().remove(meter)


def _shown(result: Any) -> str:
    try:
        return " ".join(repr(result).split())[:160]
    except Exception as error:  # the repr of a strange tensor
        return f"a {type(result).__name__} whose repr raises {type(error).__name__}"


@contextlib.contextmanager
def _nothing_left() -> Iterator[None]:
    """What a call leaves behind on purpose is taken back."""
    try:
        yield
    finally:
        pmod.debug(False)


def in_one_process(draw: Draw) -> tuple[str, str]:
    """What becomes of a draw on a mesh of one rank."""
    mesh = pmod.make_mesh(x=1, topology=pmod.Topology(rank=0, world_size=1))
    with pmod.set_mesh(mesh), _nothing_left():
        return outcome(draw)


def in_a_bounded_rank(seeds: list[int], seconds: float) -> list[tuple[str, str]]:
    """As `in_a_rank`, in a process that is used for nothing else."""
    _bounded()
    return in_a_rank(seeds, seconds)


def worst(outcomes: list[tuple[str, str]]) -> tuple[str, str]:
    """That of several ranks: of one that waited for another which raised, the other's."""
    outcomes = [one for one in outcomes if "CollectiveTimeout" not in one[1]] or outcomes
    return max(outcomes, key=lambda one: OUTCOMES.index(one[0]))


def simulated(draw: Draw) -> tuple[str, str]:
    """What becomes of a draw on two ranks that are threads."""

    told: list[tuple[str, str]] = []

    def each() -> None:
        with _nothing_left():
            told.append(outcome(draw))

    try:
        pmod.simulate(each, x=2)
    except pmod.MismatchError:  # one rank raised and has left, and the other waited for it
        if len(told) != 1:
            raise
    return worst(told)


def in_a_rank(seeds: list[int], seconds: float) -> list[tuple[str, str]]:
    """What becomes of these draws on a rank, up to the first for which the ranks did not meet."""
    out: list[tuple[str, str]] = []
    for seed in seeds:
        with pmod.set_mesh(pmod.make_mesh(x=2, timeout=seconds)), _nothing_left():
            out.append(outcome(drawn(seed)))
        if "CollectiveTimeout" in out[-1][1]:
            break
    return out


# --- many of them -----------------------------------------------------------------------------------------------------

def _bounded() -> None:
    """Let what asks for very much memory find that there is not so much."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


MEMORY = 8 << 30
DEADLINE = 60.0  # seconds for one call, on a busy machine
BATCH = 50  # draws that two processes make before they are asked


def _serve(pipe: Any) -> None:
    """A process that makes the draws it is sent."""
    torch.set_num_threads(1)
    _bounded()
    sys.setrecursionlimit(1000)
    while (seed := pipe.recv()) is not None:
        draw = drawn(seed)
        pipe.send([(place.__name__, *_at(place, draw)) for place in (in_one_process, simulated)])


def _at(place: Callable[[Draw], tuple[str, str]], draw: Draw) -> tuple[str, str]:
    try:
        return place(draw)
    except Exception as error:  # raised beside the call
        return ("clear" if isinstance(error, pmod.PmodError) else "raw"), f"{type(error).__name__}: {error}"


class Server:
    """A process behind a pipe, started anew when it hangs."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, seed: int) -> list[tuple[str, str, str]]:
        self._pipe.send(seed)
        try:
            if self._pipe.poll(DEADLINE):
                return self._pipe.recv()
            word = "no answer before the deadline"
        except EOFError:
            word = "the process died"
        self._process.kill()
        self._process.join()
        self._start()
        return [("a process", "hung", word)]

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


class Pair:
    """Two ranks that are processes, started anew where they did not meet."""

    def __init__(self) -> None:
        self._ranks = Ranks(2)

    def ask(self, seeds: list[int]) -> list[tuple[str, str]]:
        out: list[tuple[str, str]] = []
        while len(out) < len(seeds):
            left = seeds[len(out) :]
            try:
                task = Task.of(in_a_bounded_rank, (left, DEADLINE / 6), {"x": 2})
                told: list[Any] = self._ranks.run(task, DEADLINE + len(left))
            except Exception as error:
                if len(left) > 1:
                    self._anew()
                    half = len(left) // 2
                    return out + self.ask(left[:half]) + self.ask(left[half:])
                told = [[("hung", f"{type(error).__name__}: {error}")]]
            out += [worst(list(each)) for each in zip(*told, strict=False)]
            if any("CollectiveTimeout" in each[-1][1] for each in told):
                if "CollectiveTimeout" in out[-1][1]:
                    out[-1] = ("hung", out[-1][1])
                self._anew()
        return out

    def _anew(self) -> None:
        self._ranks.close(patience=0)
        self._ranks = Ranks(2)

    def close(self) -> None:
        self._ranks.close(patience=1)


def many(draws: int, seed: int, gloo: bool) -> Iterator[tuple[Draw, str, str, str]]:
    """Each draw at each place: (draw, place, outcome, text)."""
    server, pair = Server(), Pair() if gloo else None
    for start in range(seed, seed + draws, BATCH):
        seeds = list(range(start, min(start + BATCH, seed + draws)))
        hung: set[int] = set()
        for one in seeds:
            for place, what, text in server.ask(one):
                hung |= {one} if what == "hung" else set()
                yield drawn(one), place, what, text
        met = [one for one in seeds if one not in hung and drawn(one).name not in ALONE]
        for one, (what, text) in zip(met, pair.ask(met) if pair and met else (), strict=False):
            yield drawn(one), "two_processes", what, text
    server.close()
    if pair:
        pair.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accepted", action="store_true", help="print what was taken, too")
    parser.add_argument("--no-processes", action="store_true", help="leave the two processes out")
    given = parser.parse_args()
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    shown: set[tuple[str, str, str]] = set()
    for draw, place, what, text in many(given.draws, given.seed, not given.no_processes):
        counts[place, what] += 1
        key = (draw.name, what, re.sub(r"0x\w+|\d+", "N", text)[:60]) if what != "accepted" else (str(draw), what, "")
        if what != "clear" and (what != "accepted" or given.accepted) and key not in shown:
            shown.add(key)
            print(f"{what} ({place}) {draw}\n    {' '.join(text.split())[:220]}", flush=True)
    for (place, what), number in sorted(counts.items()):
        print(f"{place}: {what} {number}")


if __name__ == "__main__":
    main()
