"""The oracle against values worked out by hand, and the properties against rules broken on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import attrs
import numpy as np
import pytest
import torch

import pmod
from pmod._collectives import lengths, permutes, rooted, slices, values
from pmod._core import bind as _bind
from pmod._core import send as _send
from pmod._core.bind import bind
from pmod._core.row import ROWS, TRANSPOSES, Call, I, Row, V, _read, pair
from pmod._wire import base
from tests.lib import oracle, properties
from tests.lib.listening import on_threads

Tensor = torch.Tensor


# --- the oracle, by hand ------------------------------------------------------------------------------------------

A, B = np.array([1.0, 2.0]), np.array([30.0, 40.0])
BY_HAND: dict[str, tuple[list[Any], list[Any]]] = {
    "psum": (oracle.psum([A, B]), [[31, 42], [31, 42]]),
    "pmean": (oracle.pmean([A, B]), [[15.5, 21], [15.5, 21]]),
    "weighted": (oracle.pmean([A, B], weights=[3, 1]), [[8.25, 11.5], [8.25, 11.5]]),
    "pmax": (oracle.pmax([np.array([1, np.nan, -np.inf]), np.array([2, 5, 0])]), [[2, np.nan, 0]] * 2),
    "pmin": (oracle.pmin([np.array([1, np.nan, -np.inf]), np.array([2, 5, 0])]), [[1, np.nan, -np.inf]] * 2),
    "pick": (oracle.pick([A, B], src=1), [[30, 40], [30, 40]]),
    "place": (oracle.place([A, A], dst=1), [[0, 0], [1, 2]]),
    "reduce": (oracle.reduce([A, B], dst=0), [[31, 42], [0, 0]]),
    "all_gather": (oracle.all_gather([A, B]), [[1, 2, 30, 40]] * 2),
    "stacked": (oracle.all_gather([A, B], dim=-1, tiled=False), [[[1, 30], [2, 40]]] * 2),
    "psum_scatter": (oracle.psum_scatter([A, B]), [[31], [42]]),
    "unstacked": (oracle.psum_scatter([A, B], tiled=False), [31, 42]),
    "shard": (oracle.shard([np.arange(5)] * 4), [[0, 1], [2, 3], [4], []]),
    "shard by sizes": (oracle.shard([np.arange(3)] * 3, sizes=[1, 0, 2]), [[0], [], [1, 2]]),
    "unshard": (oracle.unshard([A, B[:1]]), [[1, 2, 30]] * 2),
    "gather": (oracle.gather([A, B], dst=1), [[], [1, 2, 30, 40]]),
    "scatter": (oracle.scatter([A, B], src=1), [[30], [40]]),
    "scatter by sizes": (oracle.scatter([A, B], src=1, sizes=[0, 2]), [[], [30, 40]]),
    "all_to_all": (oracle.all_to_all([A, B], split_dim=0, concat_dim=0), [[1, 30], [2, 40]]),
    "all_to_all by sizes": (
        oracle.all_to_all([A, B], 0, 0, split_sizes=[[2, 0], [1, 1]], concat_sizes=[[2, 1], [0, 1]]),
        [[1, 2, 30], [40]],
    ),
    "untiled": (oracle.all_to_all([A[None], B[None]][:1], 0, 1, tiled=False), [[[1], [2]]]),
    "ppermute": (oracle.ppermute([A, B], perm=[(0, 1)]), [[0, 0], [1, 2]]),
    "pshuffle": (oracle.pshuffle([A, B, A + 2], perm=[2, 0, 1]), [[3, 4], [1, 2], [30, 40]]),
    "pshift": (oracle.pshift([A, B]), [[30, 40], [1, 2]]),
    "pshift without wrap": (oracle.pshift([A, B], wrap=False), [[0, 0], [1, 2]]),
    "groups": (oracle.groups({"a": 2, "b": 3}, ["b"]), [[0, 1, 2], [3, 4, 5]]),
    "groups of a tuple": (oracle.groups({"a": 2, "b": 3}, ["b", "a"]), [[0, 3, 1, 4, 2, 5]]),
    "split_sizes": (oracle.split_sizes(10, 4), [3, 3, 3, 1]),
    "split_sizes over two axes": (oracle.split_sizes(9, 2, 2), [3, 2, 2, 2]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    found, expected = BY_HAND[name]
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y, strict=False)


def test_jacobian_by_hand() -> None:
    """The mean of two ranks: tangents are averaged; a cotangent, counted once, goes to each rank halved."""
    mean = oracle.Jacobian.of(oracle.pmean, [A, B], "V", "I")
    np.testing.assert_array_equal(mean.push([A, B]), [[15.5, 21]] * 2)
    np.testing.assert_array_equal(mean.pull([A, A]), [A / 2, A / 2])
    copy = oracle.Jacobian.of(oracle.pvary, [A, A], "I", "V")
    np.testing.assert_array_equal(copy.pull([A, B]), [A + B, A + B])


# --- rules broken on purpose --------------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def change(patch: Patch, row: str, **changes: Any) -> None:
    """Another row under the same name, for the public functions and for who looks it up."""
    old, new = ROWS[row], attrs.evolve(ROWS[row], **changes)
    patch.setitem(ROWS, row, new)
    for module in (permutes, rooted, slices, values):
        for name, value in list(vars(module).items()):
            if value is old:
                patch.setattr(module, name, new)


def transpose(row: str, to: str, flip: Callable[[Any], Any] = lambda params: params) -> Callable[[Patch], None]:
    def broken(patch: Patch) -> None:
        change(patch, row, flip=flip)
        patch.setitem(TRANSPOSES, row, to)

    return broken


def row(name: str, **changes: Any) -> Callable[[Patch], None]:
    return lambda patch: change(patch, name, **changes)


def memory_order(x: Tensor) -> Tensor:
    return x.permute(sorted(range(x.dim()), key=lambda d: -x.stride(d))).contiguous().reshape(x.shape)


def forgotten_conjugate(x: Tensor) -> Tensor:
    return (x.conj() if x.is_conj() else x).resolve_conj().resolve_neg().contiguous()


def without_clones(ctx: Any, *gs: Tensor) -> Any:
    return (None, None, *(g.view_as(g) for g in bind(ctx.call.T, list(gs))))


def detached(ctx: Any, *gs: Tensor) -> Any:
    return (None, None, *(g.detach() for g in bind(ctx.call.T, list(gs))))


def local_tangents(ctx: Any, *tangents: Tensor) -> Any:
    return tangents[2:]


def one_by_one(row: Row, leaves: list[Any], axis: Any, params: Any) -> list[Any]:
    return [bind(Call(row, axis, params), [x])[0] for x in leaves]


def sends_in_backward(patch: Patch) -> None:
    """Right values at a price: what all ranks hold already is broadcast."""
    change(patch, "pvary", local=False, fused=True, send=lambda x, wire, params: wire.broadcast(x, 0))


shard, reduce, psum, broadcast = (ROWS[name].send for name in ("shard", "reduce", "psum", "broadcast"))

# what is broken: how, and the properties that must notice, each with a case
BROKEN: dict[str, tuple[Callable[[Patch], None], list[tuple[str, str]]]] = {
    # the classics: what other libraries do
    "psum is its own transpose": (
        transpose("psum", "psum"),
        [(prop, "psum") for prop in ("adjoint", "gradient", "higher", "transforms", "complex_numbers", "checkpointed")],
    ),
    "pvary's gradient is not summed": (
        transpose("pvary", "pvary"),
        [("adjoint", "pvary"), ("gradient", "pvary"), ("batched", "pvary")],
    ),
    "all_gather's gradient is sliced, not summed": (
        transpose("all_gather", "shard", lambda params: slices.Slices(params.dim, params.sizes)),
        [("adjoint", "all_gather"), ("gradient", "all_gather"), ("jacobians", "all_gather")],
    ),
    "unshard's gradient counts an I once per rank": (
        transpose("unshard", "psum_scatter", lambda params: slices.Parts(*params, None)),
        [("adjoint", "unshard"), ("gradient", "unshard"), ("gradchecked", "unshard")],
    ),
    "broadcast's gradient stays where it is": (
        transpose("broadcast", "place", lambda params: values.Root(params.root)),
        [("adjoint", "broadcast"), ("gradient", "broadcast")],
    ),
    "pmean's gradient is not divided": (
        row("psum", flip=lambda params: params._replace(divisor=1)),
        [("adjoint", "pmean"), ("gradient", "pmean"), ("transforms", "pmean")],
    ),
    # parameters of the transpose
    "all_to_all's dims are not swapped": (
        row("all_to_all", flip=lambda params: params),
        [("gradient", "all_to_all"), ("adjoint", "all_to_all")],
    ),
    "all_to_all's sizes are not swapped": (
        row("all_to_all", flip=lambda p: slices.Exchange(p.concat_dim, p.split_dim, p.split_sizes, p.concat_sizes)),
        [("gradient", "all_to_all")],
    ),
    "a permutation is not inverted": (
        row("permute", flip=lambda params: params),
        [("gradient", "ppermute"), ("adjoint", "pshuffle"), ("higher", "pshift")],
    ),
    "gather's root is lost in backward": (
        row("gather", flip=lambda params: params._replace(root=0)),
        [("gradient", "gather")],
    ),
    # values
    "shard gives the next rank's slice": (
        row("shard", send=lambda x, w, p: shard(x, base.ShapesOnly(w.size, (w.index + 1) % w.size), p)),
        [("value", "shard"), ("gradient", "unshard")],
    ),
    "uneven shards are longest at the end": (
        lambda patch: [
            patch.setattr(module, "shares", lambda n, axis: pmod.split_sizes(n, axis.parts)[::-1])
            for module in (lengths, slices)
        ],
        [("value", "shard"), ("value", "unshard")],
    ),
    "place puts it on the next rank": (
        row("place", send=lambda x, w, p: x if (w.index + 1) % w.size == p[0] else torch.zeros_like(x)),
        [("value", "place"), ("gradient", "pick")],
    ),
    "pick picks the first": (
        row("pick", send=lambda x, w, p: broadcast(x, w, values.RootSum(0, None))),
        [("value", "pick")],
    ),
    "reduce leaves the sum everywhere": (
        row("reduce", send=lambda x, w, p: psum(x, w, values.Mean(1, p.reduce_dtype))),
        [("value", "reduce"), ("gradient", "broadcast")],
    ),
    "a dim is counted from the front": (
        row("shard", send=lambda x, w, p: shard(x, w, slices.Slices(-x.dim(), p.sizes))),
        [("value", "shard"), ("batched", "shard")],
    ),
    "an extremum's gradient goes to all ranks": (
        lambda patch: patch.setattr(Tensor, "isnan", lambda x: torch.ones_like(x, dtype=torch.bool)),
        [("gradient", "pmax"), ("higher", "pmin")],
    ),
    # the mechanism
    "tangents stay local": (
        lambda patch: patch.setattr(_bind._Linear, "jvp", staticmethod(local_tangents)),
        [("transforms", "psum"), ("jacobians", "pshift"), ("batched", "reduce")],
    ),
    "backward cannot be differentiated": (
        lambda patch: patch.setattr(_bind._Linear, "backward", staticmethod(detached)),
        [("higher", "all_gather"), ("checkpointed", "psum")],
    ),
    "gradients share storage": (
        lambda patch: patch.setattr(_bind._Linear, "backward", staticmethod(without_clones)),
        [("accumulated", "psum"), ("accumulated", "unshard")],
    ),
    "elements are sent in the order of memory": (
        lambda patch: patch.setattr(_send, "_laid_out", memory_order),
        [("layouts", "psum"), ("layouts", "all_gather")],
    ),
    "a conjugate view is sent as it lies in memory": (
        lambda patch: patch.setattr(_send, "_laid_out", forgotten_conjugate),
        [("layouts", "psum"), ("layouts", "gather")],
    ),
    "an input is changed": (
        row("reduce", send=lambda x, w, p: reduce(x.add_(1), w, p)),
        [("untouched", "reduce")],
    ),
    "a result is the input": (
        row("broadcast", send=lambda x, w, p: broadcast(x, w, p).then(lambda y: x if w.index == p[0] else y)),
        [("untouched", "broadcast")],
    ),
    "dicts are walked as they were filled": (
        lambda patch: patch.setattr(pmod._core.tree, "sorted_keys", lambda tree, *_: list(tree)),
        [("trees", "psum"), ("trees", "all_gather")],
    ),
    "backward sends what all ranks hold": (sends_in_backward, [("messages", "psum"), ("messages", "pmean")]),
    "16-bit sums are rounded at each step": (
        lambda patch: [patch.setattr(m, "accumulator", lambda dtype, _: dtype) for m in (slices, values)],
        [("dtypes", "psum")],
    ),
}


@pytest.fixture
def patch() -> Iterator[Patch]:
    """A MonkeyPatch around which nobody remembers a row."""
    with pytest.MonkeyPatch.context() as patch:
        _read.cache_clear()
        yield patch
    _read.cache_clear()


RED = (AssertionError, RuntimeError, pmod.PmodError)


@pytest.mark.parametrize(
    ("what", "prop", "case"), [(what, *noticed) for what, (_, all_) in BROKEN.items() for noticed in all_]
)
def test_broken_rules(patch: Patch, what: str, prop: str, case: str) -> None:
    BROKEN[what][0](patch)
    with pytest.raises(RED):
        properties.threads(prop, case)


BROKEN_OTHERWISE: dict[str, tuple[Callable[[Patch], Any], Callable[[], Any]]] = {
    "one message per leaf": (
        lambda patch: patch.setattr(values, "together", one_by_one),
        lambda: properties.fused_messages(on_threads),
    ),
    "16-bit sums are rounded at each step": (
        BROKEN["16-bit sums are rounded at each step"][0],
        partial(on_threads, properties.sixteen_on_rank, 3, x=4),
    ),
    "a NaN is passed over": (
        lambda patch: patch.setattr(torch, "amax", lambda x, dim, amax=torch.amax: amax(x.nan_to_num(), dim)),
        partial(pmod.simulate, properties.extremum_on_rank, "pmax", torch.float64, x=3),
    ),
    "channels_last is lost": (
        lambda patch: patch.setattr(_send, "memory_format", lambda _: None),
        partial(pmod.simulate, properties.channels_last_on_rank, 4, x=2),
    ),
}


@pytest.mark.parametrize("what", BROKEN_OTHERWISE)
def test_broken_otherwise(patch: Patch, what: str) -> None:
    broken, test = BROKEN_OTHERWISE[what]
    test()
    broken(patch)
    with pytest.raises(RED):
        test()


def test_kinds_that_do_not_reverse() -> None:
    def nothing(x: Tensor, *_: Any) -> Tensor:
        return x

    with pytest.raises(AssertionError, match="the kinds of a transpose reverse"):
        pair(Row("summed", V, I, values.Mean, nothing), Row("copied", V, V, values.Mean, nothing))
    assert "summed" not in ROWS
