"""Who owns which node: parts of about equal work, with few edges between them."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pmod._core.arguments import LONGEST, as_int, unfit_kind
from pmod._errors import ArgumentError, ShapeError, phrase, quoted

Numbers = NDArray[np.int64]
Reals = NDArray[np.float64]

# a piece of a part goes to the part around it if that then has at most so much of the
# mean work
_FULL = 1.1


def owners(
    edge_index: Tensor,
    n: int,
    parts: int,
    *,
    weights: Tensor | None = None,
    points: Tensor | None = None,
) -> Tensor:
    """Return which of `parts` parts owns each of the n nodes of a graph.

    By METIS where pymetis is installed; else across the longest side of the points, and
    so on, where points are given; else in the order of the nodes. No part is empty if
    there is a node for each, and a piece of a part that lies within others is theirs
    where they have room for it; METIS alone leaves parts empty that have few nodes.
    edge_index: (2, edges) int64, from row 0 to row 1. weights: (n,), the work at each
    node, by default one and an edge each that ends there. points: (n, d).
    Shapes: -> (n,) int64, on the cpu. Nothing is sent.
    Raises: ArgumentError for tensors of another dtype; ShapeError for other shapes and
    for numbers of nodes that do not exist.

    >>> ring = torch.arange(6)
    >>> pmod.graph.owners(torch.stack([ring, ring.roll(1)]), 6, 6).sort().values
    tensor([0, 1, 2, 3, 4, 5])
    """
    edge_index = check_edges(edge_index, n, "graph.owners")
    count = _parts(parts, "graph.owners")
    source, target = edge_index.cpu().numpy()
    work = _work(target, n, weights)
    places = None if points is None else _reals(points, "points", n, 2, "graph.owners")
    if uses_metis(n, count):
        owner = _by_metis(source, target, count, work)
        owner = _without_pieces(owner, source, target, count, work)
    elif places is not None:
        owner = _by_coordinates(places, count, work)
    else:
        owner = _in_order(count, work)
    _fill(owner, source, target, count, work)
    return torch.from_numpy(owner)


def uses_metis(n: int, parts: int) -> bool:
    """Return whether `owners` of n nodes in so many parts are those of METIS.

    >>> pmod.graph.uses_metis(4, 7)
    False
    """
    nodes, count = as_int(n), _parts(parts, "graph.uses_metis")
    if nodes is None or nodes < 0:
        given, right = f"n is {quoted(n)}", "Pass the number of nodes, 0 or more."
        raise ShapeError(phrase("graph.uses_metis", given, right))
    return nodes > count > 1 and importlib.util.find_spec("pymetis") is not None


def _parts(parts: object, function: str) -> int:
    count = as_int(parts)
    if count is None or not 1 <= count <= LONGEST:
        given = f"parts is {quoted(parts)}"
        raise ShapeError(phrase(function, given, "Pass an int of 1 or more."))
    return count


def by_coordinates(points: Tensor, parts: int, weights: Tensor | None = None) -> Tensor:
    """Halve the parts, and with them the work, across the longest side, and so on.

    points: (n, d). weights: (n,), the work at each; by default all alike.
    Shapes: -> (n,) int64, on the cpu. Nothing is sent.
    Raises: as `owners`.

    >>> pmod.graph.by_coordinates(torch.tensor([[3.0], [0.0], [1.0], [2.0]]), 2)
    tensor([1, 0, 0, 1])
    """
    function = "graph.by_coordinates"
    count = _parts(parts, function)
    places = _reals(points, "points", None, 2, function)
    work = np.ones(len(places))
    if weights is not None:
        work = _weights(weights, len(places), function)
    return torch.from_numpy(_by_coordinates(places, count, work))


def check_edges(edge_index: object, n: object, function: str) -> Tensor:
    """Return the edges, detached; raise unless they are those of n nodes."""
    count = as_int(n)
    if count is None or not 0 <= count <= LONGEST:
        given, right = f"n is {quoted(n)}", "Pass the number of nodes, 0 or more."
        raise ShapeError(phrase(function, given, right))
    if not isinstance(edge_index, Tensor) or edge_index.dtype != torch.int64:
        kind = type(edge_index).__name__
        if isinstance(edge_index, Tensor):
            kind = str(edge_index.dtype)
        right = "Pass an int64 tensor (2, edges): from row 0 to row 1."
        raise ArgumentError(phrase(function, f"edge_index is a {kind}", right))
    _check_kind(edge_index, "edge_index", function)
    if edge_index.dim() != 2 or len(edge_index) != 2:
        given = f"edge_index has the shape {tuple(edge_index.shape)}"
        raise ShapeError(phrase(function, given, "Pass (2, edges)."))
    if edge_index.numel():
        low, high = torch.stack(edge_index.aminmax()).tolist()
        if low < 0 or high >= count:
            wrong = low if low < 0 else high
            given = f"edge_index holds {wrong} and there are {count} nodes"
            right = f"Nodes are 0 to {count - 1}."
            raise ShapeError(phrase(function, given, right))
    return edge_index.detach()


def _check_kind(x: Tensor, name: str, function: str) -> None:
    unfit = unfit_kind(x, name)
    if unfit is not None:
        raise ArgumentError(phrase(function, *unfit))


def _reals(x: object, name: str, n: int | None, dims: int, function: str) -> Reals:
    """Return numbers of nodes as an array; n is None for as many as there are."""
    shape = "(n, d)" if dims == 2 else "(n,)"
    right = f"Pass a real tensor {shape} that is in memory."
    if not isinstance(x, Tensor):
        given = f"{name} is a {type(x).__name__}"
        raise ArgumentError(phrase(function, given, right))
    _check_kind(x, name, function)
    given = f"{name} is {str(x.dtype).removeprefix('torch.')} on {x.device}"
    if x.is_complex() or x.is_meta:
        raise ArgumentError(phrase(function, given, right))
    if x.dim() != dims or n not in (None, len(x)):
        given = f"{name} has the shape {tuple(x.shape)}"
        if n is not None:
            given += f" and there are {n} nodes"
        raise ShapeError(phrase(function, given, f"Pass {shape}."))
    values: Reals = x.detach().cpu().double().numpy()
    if not np.isfinite(values).all():
        given = f"{name} holds a NaN or an infinity"
        raise ArgumentError(phrase(function, given, "Pass finite numbers."))
    return values


def _weights(weights: object, n: int, function: str) -> Reals:
    work = _reals(weights, "weights", n, 1, function)
    if work.min(initial=0) < 0:
        given = f"weights hold {work.min():g}"
        raise ArgumentError(phrase(function, given, "Pass weights of 0 or more."))
    return work


def _work(target: Numbers, n: int, weights: object) -> Reals:
    if weights is None:
        return np.ones(n) + np.bincount(target, minlength=n).astype(np.float64)
    work = _weights(weights, n, "graph.owners")
    return work if work.any() else np.ones(n)


# --- ways to cut ----------------------------------------------------------------------


def _by_metis(source: Numbers, target: Numbers, parts: int, work: Reals) -> Numbers:
    import pymetis

    n = len(work)
    # METIS wants each edge from both ends, once, and none from a node to itself
    other = source != target
    ends = np.concatenate([source[other], target[other]])
    starts = np.concatenate([target[other], source[other]])
    keys = np.unique(starts * n + ends)
    bounds = np.searchsorted(keys, np.arange(n + 1) * n)
    # it counts in whole numbers
    whole = np.maximum(np.rint(work * (1000 / work.max())), 1).astype(np.int64)
    adjacency = pymetis.CSRAdjacency(bounds, keys % n)
    _, found = pymetis.part_graph(parts, adjacency, vweights=whole.tolist())
    return np.asarray(found, dtype=np.int64)


def _by_coordinates(points: Reals, parts: int, work: Any) -> Numbers:
    found = np.zeros(len(points), dtype=np.int64)
    todo = [(np.arange(len(points)), 0, parts)]
    while todo:
        nodes, first, count = todo.pop()
        found[nodes] = first
        if count == 1 or not len(nodes):
            continue
        side = int(np.ptp(points[nodes], axis=0).argmax())
        nodes = nodes[np.argsort(points[nodes, side], kind="stable")]
        low = count // 2
        done = np.cumsum(work[nodes]) - work[nodes] / 2
        cut = int(np.searchsorted(done, work[nodes].sum() * low / count))
        todo += [(nodes[:cut], first, low), (nodes[cut:], first + low, count - low)]
    return found


def _in_order(parts: int, work: Reals) -> Numbers:
    if not len(work):
        return np.zeros(0, dtype=np.int64)
    done = (np.cumsum(work) - work / 2) / work.sum()
    return np.minimum((done * parts).astype(np.int64), parts - 1)


# --- what METIS leaves behind ---------------------------------------------------------


def _pieces(owner: Numbers, source: Numbers, target: Numbers) -> Numbers:
    """Return for each node the first node of its piece: what hangs together in a part."""
    label = np.arange(len(owner))
    inside = owner[source] == owner[target]
    a, b = source[inside], target[inside]
    while True:
        before = label
        # the smaller label goes over each edge, then from label to label
        least = np.minimum(label[a], label[b])
        label = label.copy()
        np.minimum.at(label, before[a], least)
        np.minimum.at(label, before[b], least)
        label = label[label]
        if np.array_equal(label, before):
            return label


def _without_pieces(
    owner: Numbers, source: Numbers, target: Numbers, parts: int, work: Reals
) -> Numbers:
    """Give pieces of parts to the parts around them, where these have room."""
    owner = owner.copy()
    label = _pieces(owner, source, target)
    weight = np.bincount(label, weights=work, minlength=len(owner))
    load = np.bincount(owner, weights=work, minlength=parts)
    room = _FULL * load.sum() / parts
    heaviest = np.zeros(parts)
    firsts = np.flatnonzero(label == np.arange(len(label)))
    np.maximum.at(heaviest, owner[firsts], weight[firsts])
    # light ones first: these find room most easily
    for first in firsts[np.argsort(weight[firsts], kind="stable")]:
        of = owner[first]
        if weight[first] == heaviest[of]:
            # the main piece of its part, or one that is as heavy
            heaviest[of] = np.inf
            continue
        nodes = label == first
        around = np.concatenate(
            [owner[target[nodes[source]]], owner[source[nodes[target]]]]
        )
        touches = np.bincount(around, minlength=parts)
        touches[of] = 0
        touches[load + weight[first] > room] = 0
        best = int(touches.argmax())
        if touches[best]:
            owner[nodes] = best
            load[of] -= weight[first]
            load[best] += weight[first]
    return owner


def _fill(
    owner: Numbers, source: Numbers, target: Numbers, parts: int, work: Reals
) -> None:
    """Give each empty part the half of the heaviest part that can be halved."""
    counts = np.bincount(owner, minlength=parts)
    load = np.bincount(owner, weights=work, minlength=parts)
    for empty in np.flatnonzero(counts == 0):
        big = int(np.where(counts > 1, load, -1.0).argmax())
        # there are fewer nodes than parts
        if counts[big] < 2:
            return
        nodes = _outward(np.flatnonzero(owner == big), source, target)
        done = np.cumsum(work[nodes]) - work[nodes] / 2
        cut = int(np.searchsorted(done, load[big] / 2))
        moved = nodes[: min(max(cut, 1), len(nodes) - 1)]
        owner[moved] = empty
        for part in (big, int(empty)):
            counts[part] = (owner == part).sum()
            load[part] = work[owner == part].sum()


def _outward(nodes: Numbers, source: Numbers, target: Numbers) -> Numbers:
    """Return nodes in order of their distance from the first, as edges go."""
    place = np.full(
        int(max(nodes.max(), source.max(initial=0), target.max(initial=0))) + 1, -1
    )
    place[nodes] = np.arange(len(nodes))
    inside = (place[source] >= 0) & (place[target] >= 0)
    a = np.concatenate([place[source[inside]], place[target[inside]]])
    b = np.concatenate([place[target[inside]], place[source[inside]]])
    level = np.full(len(nodes), len(nodes))
    level[0], reached = 0, 0
    while (level == reached).any():
        following = b[level[a] == reached]
        reached += 1
        level[following] = np.minimum(level[following], reached)
    return nodes[np.argsort(level, kind="stable")]
