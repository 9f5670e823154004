"""`halo_exchange` and `halo_reduce` against torch.nn.functional.pad of the whole tensor, and all its derivatives."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.func import grad, hessian, jvp, vjp, vmap

import pmod
from pmod._collectives import halo_plan
from pmod._wire.gloo import GlooWire
from tests.lib import spmd
from tests.lib.listening import counted, on_processes, on_threads, same
from tests.lib.raised import check, on_all_ranks

Tensor = torch.Tensor
PADDING = {"zeros": "constant", "periodic": "circular", "reflect": "reflect", "replicate": "replicate"}  # torch's names


def padded(x: Tensor, dim: int, width: Sequence[int], boundary: str) -> Tensor:
    """torch's pad of any dim; torch's modes want the last one of three."""
    if tuple(width) == (0, 0):  # also of an empty tensor, which torch refuses
        return x
    rows = x.movedim(dim, -1)
    flat = torch.nn.functional.pad(rows.reshape(1, -1, rows.shape[-1]), tuple(width), mode=PADDING[boundary])
    return flat.reshape(*rows.shape[:-1], -1).movedim(-1, dim)


def random_tensor(shape: Sequence[int], dtype: torch.dtype, *seed: Any) -> Tensor:
    generator = torch.Generator().manual_seed(random.Random(str(seed)).randrange(2**31))
    return torch.randn(list(shape), dtype=dtype, generator=generator)


class Draw:
    """A whole tensor, how it is cut and padded, and what each rank holds: the same on every rank from the seed."""

    def __init__(self, seed: object, mesh: dict[str, int], dtype: torch.dtype = torch.float64, **choices: Any) -> None:
        rng = random.Random(str((seed, mesh)))
        self.seed, self.mesh, self.dtype = str((seed, mesh)), mesh, dtype
        self.shape = [rng.randint(1, 3) for _ in range(rng.randint(len(mesh), 3))]
        dims = rng.sample(range(len(self.shape)), len(mesh))
        self.axes = dict(zip(dims, mesh, strict=True))
        self.sizes, self.width, self.boundary = {}, {}, {}
        for dim, name in self.axes.items():
            n = mesh[name]
            drawn = [rng.choice([0, 1, 1, 2, 3, 5]) for _ in range(n)]
            drawn[rng.randrange(n)] += 1
            self.sizes[dim] = choices.get("sizes") or rng.choice([tuple(drawn), pmod.split_sizes(sum(drawn), n)])
            self.shape[dim] = total = sum(self.sizes[dim])
            self.boundary[dim] = boundary = choices.get("boundary") or rng.choice(list(PADDING))
            limit = {"zeros": 7, "periodic": total, "reflect": total - 1, "replicate": 7}[boundary]
            self.width[dim] = rng.choice([(rng.randint(0, limit), rng.randint(0, limit)), (min(1, limit),) * 2])
        self.x, self.v = (random_tensor(self.shape, dtype, self.seed, name) for name in "xv")
        # the caller's forms: dims from either end, one mapping or one value for all
        key = {dim: dim - rng.choice([0, len(self.shape)]) for dim in dims}
        mapped = len(mesh) > 1 or rng.random() < 0.3
        order = rng.sample(dims, len(dims))
        self.kwargs: dict[str, Any] = {"axis": {key[dim]: self.axes[dim] for dim in order}} if mapped else {
            "axis": self.axes[dims[0]], "dim": key[dims[0]]}  # fmt: skip
        forms = {"width": self.width, "boundary": self.boundary}
        if rng.random() < 0.5:
            forms["sizes"] = self.sizes
        for name, of in forms.items():
            self.kwargs[name] = {key[dim]: of[dim] for dim in dims} if mapped else of[dims[0]]

    def __repr__(self) -> str:
        return f"{self.seed}: sizes {self.sizes}, width {self.width}, boundary {self.boundary}, called {self.kwargs}"

    def places(self) -> list[dict[int, int]]:
        """Of every rank: its index along each dim that is cut."""
        names = list(self.mesh)
        of = {name: dim for dim, name in self.axes.items()}
        return [
            {of[name]: i for name, i in zip(names, index, strict=True)}
            for index in itertools.product(*[range(self.mesh[name]) for name in names])
        ]

    def here(self) -> int:
        return self.places().index({dim: pmod.axis_index(name) for dim, name in self.axes.items()})

    def shard(self, x: Tensor, rank: int, halo: int = 0) -> Tensor:
        """A rank's part of the whole; with halo=1 its window of the padded whole."""
        for dim, i in self.places()[rank].items():
            sizes = self.sizes[dim]
            x = x.narrow(dim, sum(sizes[:i]), sizes[i] + halo * sum(self.width[dim]))
        return x

    def windows(self, x: Tensor) -> list[Tensor]:
        """Of the padded whole, for all ranks."""
        for dim in self.axes:
            x = padded(x, dim, self.width[dim], self.boundary[dim])
        return [self.shard(x, rank, halo=1) for rank in range(len(self.places()))]

    def weights(self, name: str) -> list[Tensor]:
        """A tensor for every rank's window."""
        shapes = [y.shape for y in self.windows(self.x)]
        return [random_tensor(shape, self.dtype, self.seed, name, rank) for rank, shape in enumerate(shapes)]

    def exchange(self, x: Tensor) -> Tensor:
        return pmod.halo_exchange(x, **self.kwargs)

    def reduce(self, x: Tensor) -> Tensor:
        return pmod.halo_reduce(x, **self.kwargs)


def loss(y: Tensor, w: Tensor) -> Tensor:
    return (w * y.sin() * y.conj()).real.sum()


def derivatives(value: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient, and that of its product with v."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(value(x), x, create_graph=True)
    (second,) = torch.autograd.grad((first * v.conj()).real.sum(), x)
    return first.detach(), second


def properties(d: Draw) -> Any:
    """All that is said of both functions, on this rank; the parts of the inner products."""
    rank = d.here()
    x, v, w, z = d.shard(d.x, rank), d.shard(d.v, rank), d.weights("w")[rank], d.weights("z")[rank]
    expected = d.windows(d.x)[rank]
    y = d.exchange(x)
    assert y.shape == expected.shape and torch.equal(y, expected), f"value: {y} is not {expected}"

    def whole_loss(x: Tensor) -> Tensor:
        return sum((loss(y, w) for y, w in zip(d.windows(x), d.weights("w"), strict=True)), torch.zeros(()))

    first, second = derivatives(whole_loss, d.x, d.v)
    got = derivatives(lambda x: loss(d.exchange(x), w), x, v)
    same(got[0], d.shard(first, rank), "gradient")
    same(got[1], d.shard(second, rank), "second derivative")

    whole = d.x.clone().requires_grad_()
    (adjoint,) = torch.autograd.grad(d.windows(whole), whole, d.weights("z"))
    reduced = d.reduce(z)
    same(reduced, d.shard(adjoint, rank), "halo_reduce")
    curved = derivatives(lambda z: loss(d.reduce(z), v), z, w)
    leaf = reduced.clone().requires_grad_()
    (outer,) = torch.autograd.grad(loss(leaf, v), leaf)
    same(curved[0], d.exchange(outer), "gradient of halo_reduce")
    (inner,) = torch.autograd.functional.vjp(
        lambda r: torch.autograd.grad(loss(r, v), r, create_graph=True)[0], leaf, d.reduce(w))[1:]  # fmt: skip
    same(curved[1], d.exchange(inner), "second derivative of halo_reduce")
    return torch.vdot(y.reshape(-1), z.reshape(-1)), torch.vdot(x.reshape(-1), reduced.reshape(-1))


def on_rank(*args: Any, **choices: Any) -> Any:
    d = Draw(*args, **choices)
    try:
        return properties(d)
    except BaseException as error:
        error.add_note(repr(d))
        raise


def adjoint(parts: list[tuple[Tensor, Tensor]]) -> None:
    left, right = (sum(part[i] for part in parts) for i in (0, 1))
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


MESHES = [{"x": 1}, {"x": 2}, {"x": 3}, {"x": 4}, {"x": 2, "y": 2}]


@pytest.mark.parametrize("boundary", PADDING)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_drawn(mesh: dict[str, int], boundary: str) -> None:
    for seed in range(6):
        adjoint(pmod.simulate(lambda seed=seed: on_rank(seed, mesh, boundary=boundary), **mesh))


@pytest.mark.parametrize("mesh", [{"x": 2}, {"x": 3}, {"x": 3, "y": 2}], ids=str)
def test_complex(mesh: dict[str, int]) -> None:
    """Every dim with a boundary of its own."""
    for seed in range(5):
        adjoint(pmod.simulate(lambda seed=seed: on_rank(("c", seed), mesh, torch.complex128), **mesh))


def test_every_width_of_small_shards() -> None:
    """All there is for a few sizes, empty shards and one rank among them."""

    def values(sizes: tuple[int, ...], boundary: str, limit: int) -> None:
        whole = torch.arange(1.0, 1 + sum(sizes), dtype=torch.float64)
        i = pmod.axis_index("x")
        start = sum(sizes[:i])
        for width in itertools.product(range(limit + 1), repeat=2):
            y = pmod.halo_exchange(whole[start : start + sizes[i]], "x", width=width, boundary=boundary, sizes=sizes)
            expected = padded(whole, 0, width, boundary)[start : start + sizes[i] + sum(width)]
            assert torch.equal(y, expected), (sizes, boundary, width, y, expected)

    for sizes in [(3,), (1,), (2, 2), (0, 3), (3, 0), (1, 0, 2), (2, 1, 1), (0, 0, 2, 0), (2, 1, 0, 1)]:
        total = sum(sizes)
        for boundary, limit in {"zeros": total + 1, "periodic": total, "reflect": total - 1, "replicate": 5}.items():
            pmod.simulate(values, sizes, boundary, limit, x=len(sizes))


def test_nothing_but_empty_shards() -> None:
    def run() -> list[Tensor]:
        x = torch.ones(0, 2, requires_grad=True)
        y = pmod.halo_exchange(x, "x", width=(1, 2))
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == (0, 2)
        return [y.detach(), pmod.halo_exchange(x, "x", width=0, boundary="reflect")]

    for y, none in pmod.simulate(run, x=3):
        assert torch.equal(y, torch.zeros(3, 2)) and none.shape == (0, 2)


def test_corners_by_hand() -> None:
    def run() -> Tensor:
        x = torch.tensor([[2 * pmod.axis_index("a") + pmod.axis_index("b")]])
        return pmod.halo_exchange(x, {0: "a", 1: "b"}, width={0: (0, 1), 1: 1}, boundary={0: "zeros", 1: "periodic"})

    # 0 1
    # 2 3
    assert [y.tolist() for y in pmod.simulate(run, a=2, b=2)] == [
        [[1, 0, 1], [3, 2, 3]], [[0, 1, 0], [2, 3, 2]], [[3, 2, 3], [0, 0, 0]], [[2, 3, 2], [0, 0, 0]],
    ]  # fmt: skip


def test_ranks_may_write_a_mapping_in_any_order() -> None:
    def run() -> Tensor:
        i, j = pmod.axis_index("a"), pmod.axis_index("b")
        order = [(0, "a"), (1, "b")][:: 1 if i == j else -1]
        return pmod.halo_exchange(torch.tensor([[2 * i + j]]), dict(order), width=1, boundary="periodic")

    for y, middle in zip(pmod.simulate(run, a=2, b=2), ([0, 1], [1, 0], [2, 3], [3, 2]), strict=True):
        assert y[1].tolist() == [middle[1], middle[0], middle[1]]


# --- real ranks ---------------------------------------------------------------------------------------------------


def many_on_rank(mesh: dict[str, int]) -> list[Any]:
    return [on_rank(("real", seed, boundary), mesh, boundary=boundary) for boundary in PADDING for seed in range(2)]


@pytest.mark.parametrize("mesh", [{"x": 2}, {"x": 3}], ids=str)
def test_real_ranks(mesh: dict[str, int]) -> None:
    for parts in zip(*spmd.launch(many_on_rank, mesh, **mesh), strict=True):
        adjoint(parts)


# --- torch.func, start, compile -----------------------------------------------------------------------------------


def transforms(d: Draw) -> None:
    rank = d.here()
    x, v, w = d.shard(d.x, rank), d.shard(d.v, rank), d.weights("w")[rank]
    y, tangent = jvp(lambda x: d.exchange(x).sin(), (x,), (v,))
    window, moved = d.windows(d.x)[rank], d.windows(d.v)[rank]
    same(y, window.sin(), "value under jvp")
    same(tangent, window.cos() * moved, "jvp")
    both = vmap(d.exchange, in_dims=-1)(torch.stack([x, v], -1))
    same(both, torch.stack([window, moved]), "vmap")
    same(vmap(d.reduce, in_dims=1)(torch.stack([w, window], 1))[0], d.reduce(w), "vmap of halo_reduce")

    def value(x: Tensor) -> Tensor:
        return loss(d.exchange(x), w)

    first, second = derivatives(value, x, v)
    same(grad(value)(x), first, "torch.func.grad")
    same(grad(lambda x: (grad(value)(x) * v).sum())(x), second, "torch.func.grad of grad")
    same(vjp(d.exchange, x)[1](w)[0], d.reduce(w), "torch.func.vjp")
    each = vmap(grad(value))(torch.stack([x, v]))
    same(each[1], grad(value)(v), "vmap of grad")
    same(jvp(grad(value), (x,), (v,))[1], second, "forward over reverse")


def transforms_on_rank(seed: int, mesh: dict[str, int]) -> None:
    transforms(Draw(("t", seed), mesh))


@pytest.mark.parametrize("mesh", [{"x": 1}, {"x": 2}, {"x": 3}, {"x": 2, "y": 2}], ids=str)
def test_transforms(mesh: dict[str, int]) -> None:
    for seed in range(4):
        pmod.simulate(transforms_on_rank, seed, mesh, **mesh)


def test_hessian() -> None:
    """Of a sum over a ring of differences: each rank's block is what two neighbours give it."""

    def run() -> Tensor:
        x = torch.arange(3.0, dtype=torch.float64)

        def energy(x: Tensor) -> Tensor:
            return pmod.halo_exchange(x, "x", width=(0, 1), boundary="periodic", sizes=(3, 3)).diff().square().sum() / 2

        return hessian(energy)(x)

    second = torch.tensor([[2.0, -1, 0], [-1, 2, -1], [0, -1, 2]], dtype=torch.float64)
    for found in pmod.simulate(run, x=2):
        # all ranks move the same coordinate at once: what comes from the other rank adds up in the corners
        ring = second.clone()
        ring[0, 2] -= 1
        ring[2, 0] -= 1
        same(found, ring, "hessian")


def started_on_rank(mesh: dict[str, int]) -> None:
    for seed in range(3):
        d = Draw(("s", seed), mesh)
        rank = d.here()
        x, w = d.shard(d.x, rank), d.weights("w")[rank]
        x.requires_grad_()
        expected = d.exchange(x)
        y = pmod.start(pmod.halo_exchange, x, **d.kwargs).wait()
        same(y, expected.detach(), f"start: {d}")
        same(*(torch.autograd.grad(loss(of, w), x)[0] for of in (y, expected)), f"gradient: {d}")
        same(pmod.start(pmod.halo_reduce, w, **d.kwargs).wait(), d.reduce(w), f"start of halo_reduce: {d}")


@pytest.mark.parametrize("run", [on_threads, on_processes])
def test_start(run: Any) -> None:
    run(started_on_rank, {"x": 3}, x=3)
    if run is on_threads:
        run(started_on_rank, {"x": 2, "y": 2}, x=2, y=2)


def overlapping_on_rank() -> None:
    """Both directions are under way before anybody waits."""
    x = torch.ones(3, 2) * pmod.axis_index("x")
    pending, sent = counted(lambda: pmod.start(pmod.halo_exchange, x, "x", width=1, sizes=(3, 3, 3)))
    assert len(sent) == 2
    _, sent = counted(pending.wait)
    assert not sent


@pytest.mark.parametrize("run", [on_threads, on_processes])
def test_start_sends(run: Any) -> None:
    run(overlapping_on_rank, x=3)


def compiled_on_rank() -> None:
    torch._dynamo.reset()
    i = pmod.axis_index("x")
    sizes = (3, 1)
    x = random_tensor((sizes[i], 2), torch.float64, "compile", i).requires_grad_()
    for boundary, width in [("reflect", (2, 1)), ("zeros", (3, 2)), ("periodic", (1, 0)), ("replicate", (2, 2))]:

        def value(x: Tensor, boundary: str = boundary, width: Any = width) -> Tensor:
            y = pmod.halo_exchange(x, "x", width=width, boundary=boundary, sizes=sizes)
            back = pmod.halo_reduce(y.cos(), "x", width=width, boundary=boundary, sizes=sizes)
            return y.sin().square().sum() + (back * x).sum()

        expected = value(x)
        y = torch.compile(value, fullgraph=True, backend="aot_eager")(x)
        same(y, expected.detach(), f"{boundary}: value")
        same(*(torch.autograd.grad(of, x)[0] for of in (y, expected)), f"{boundary}: gradient")
    with pytest.raises(Exception) as raised:
        torch.compile(lambda x: pmod.halo_exchange(x, "x", width=1), fullgraph=True, backend="eager")(x)
    assert f"pmod.halo_exchange(axis='x') at (x={i}): sizes are left out under torch.compile." in str(raised.value)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compile() -> None:
    spmd.launch(compiled_on_rank, x=2)


# --- what is kept -------------------------------------------------------------------------------------------------


def test_memory_format_and_dtype() -> None:
    def run() -> None:
        for shape, kept in (((2, 3, 4, 5), torch.channels_last), ((2, 3, 4, 5, 6), torch.channels_last_3d)):
            for dim in range(len(shape)):
                lengths = [length * (1 + (d == dim)) for d, length in enumerate(shape)]
                whole = torch.rand(lengths).contiguous(memory_format=kept)
                part = whole.narrow(dim, pmod.axis_index("x") * shape[dim], shape[dim])  # as torch.chunk cuts it
                for x in (part.contiguous(memory_format=kept), part):
                    y = pmod.halo_exchange(x, "x", dim=dim, width=(1, 2), boundary="reflect")
                    z = pmod.halo_reduce(y, "x", dim=dim, width=(1, 2), boundary="reflect")
                    assert z.shape == x.shape and y.shape[dim] == shape[dim] + 3
                    for result in (y, z):
                        assert result.is_contiguous(memory_format=kept) and not result.is_contiguous(), (shape, dim)
        assert pmod.halo_exchange(torch.rand(2, 3, 4, 5), "x", width=1).is_contiguous()
        # under vmap torch does not say in which format a tensor is
        x = torch.rand(2, 2, 3, 4, 5)
        last = torch.stack([x[0].contiguous(memory_format=torch.channels_last), x[1]])
        for of in (x, last, x.transpose(2, -1).contiguous().transpose(2, -1)):
            both = vmap(lambda x: pmod.halo_exchange(x, "x", width=1))(of)
            assert torch.equal(both[1], pmod.halo_exchange(of[1], "x", width=1))
        inner = [int(pmod.axis_index("x") > 0), 1, 1, int(pmod.axis_index("x") < 1)]
        for dtype in (torch.bool, torch.uint8, torch.int32, torch.float16, torch.bfloat16, torch.complex64):
            y = pmod.halo_exchange(torch.ones(2, dtype=dtype), "x", width=1)
            assert torch.equal(y, torch.tensor(inner, dtype=dtype)) and y.dtype == dtype
            if dtype != torch.bool:
                z = pmod.halo_reduce(torch.ones(6, dtype=dtype), "x", width=2, boundary="replicate")
                assert torch.equal(z, torch.tensor([4, 2], dtype=dtype).roll(pmod.axis_index("x"))), (dtype, z)
                assert z.dtype == dtype

    pmod.simulate(run, x=2)


def test_results_are_their_own() -> None:
    """What a result holds is no view of x: changing it in place leaves x alone."""

    def run() -> None:
        for f in (pmod.halo_exchange, pmod.halo_reduce):
            for width in (0, 1):
                x = torch.ones(4)
                f(x, "x", width=width).zero_()
                assert torch.equal(x, torch.ones(4))

    for n in (1, 2):
        pmod.simulate(run, x=n)


def test_trees() -> None:
    """Leaves of one dtype travel together, each along its own dim."""

    def run() -> Any:
        i = pmod.axis_index("x")
        x = torch.arange(6.0).view(3, 2) + 10 * i
        tree = {"b": [x, x.double().T.contiguous().T], "a": (x + 1, None)}
        result, sent = counted(lambda: pmod.halo_exchange(tree, "x", width=1, boundary="periodic", sizes=(3, 3, 3)))
        assert len(sent) == 4  # two ways, two dtypes
        for leaf, y in ((x, result["b"][0]), (tree["b"][1], result["b"][1]), (x + 1, result["a"][0])):
            assert torch.equal(y, pmod.halo_exchange(leaf, "x", width=1, boundary="periodic")) and y.dtype == leaf.dtype
        assert result["a"][1] is None and isinstance(result["a"], tuple)
        back = pmod.halo_reduce(result, "x", width=1, boundary="periodic")
        assert torch.equal(back["b"][0], pmod.halo_reduce(result["b"][0], "x", width=1, boundary="periodic"))
        assert pmod.halo_exchange({"a": None}, "x", width=1) == {"a": None}

    on_threads(run, x=3)


# --- messages -----------------------------------------------------------------------------------------------------

ROW = 3 * 8  # bytes


def sent_by(n: int, sizes: tuple[int, ...], width: Any, boundary: str, known: bool = True) -> list[list[int]]:
    """The bytes that this rank sends forward, and backward."""
    x = torch.ones(sizes[pmod.axis_index("x")], 3, dtype=torch.float64, requires_grad=True)
    with pmod.trace() as t:
        y = pmod.halo_exchange(x, "x", width=width, boundary=boundary, sizes=sizes if known else None)
        forward = len(t.events)
        y.sum().backward()
    assert {event.function for event in t.events[:forward]} <= {"halo_exchange"}
    assert {event.function for event in t.events[forward:]} <= {"the backward of halo_exchange"}
    moved = [event for event in t.events[:forward] if event.row == "permute"]
    assert sum(event.received for event in moved) == sum(event.nbytes for event in t.events[forward:])
    return [[event.nbytes for event in half] for half in (t.events[:forward], t.events[forward:])]


# shards, width, boundary -> rows that each rank sends, forward and backward
VOLUMES: list[tuple[tuple[int, ...], Any, str, list[int], list[int]]] = [
    ((4, 4, 4, 4), 1, "zeros", [1, 2, 2, 1], [1, 2, 2, 1]),
    ((4, 4, 4, 4), (3, 1), "zeros", [3, 4, 4, 1], [1, 4, 4, 3]),
    ((4, 4, 4, 4), (0, 2), "zeros", [0, 2, 2, 2], [2, 2, 2, 0]),
    ((4, 4, 4, 4), (4, 4), "periodic", [8, 8, 8, 8], [8, 8, 8, 8]),
    ((4, 3, 3, 4), 2, "replicate", [2, 4, 4, 2], [2, 4, 4, 2]),
    ((4, 4, 4, 1), 2, "reflect", [2, 4, 4, 2 - 1], [2, 4, 3, 2]),  # rank 3 mirrors two rows of rank 2
    ((2, 2, 2), 3, "zeros", [2 + 1, 4, 2 + 1], [3, 4, 3]),  # two hops, the second with one row
    ((5, 0, 5), 2, "zeros", [4, 0, 4], [2, 4, 2]),
    ((3, 3), (2, 2), "periodic", [3, 3], [3, 3]),  # both neighbours are the other rank: its three rows, once each
    ((5, 5), (1, 2), "periodic", [3, 3], [3, 3]),
    ((5,), 3, "periodic", [0], [0]),
]


@pytest.mark.parametrize("sizes, width, boundary, forward, backward", VOLUMES)
def test_rows_sent(sizes: Any, width: Any, boundary: str, forward: list[int], backward: list[int]) -> None:
    n = len(sizes)
    found = pmod.simulate(sent_by, n, sizes, width, boundary, x=n)
    assert [sum(rank[0]) / ROW for rank in found] == forward
    assert [sum(rank[1]) / ROW for rank in found] == backward
    told = pmod.simulate(sent_by, n, sizes, width, boundary, False, x=n)
    # where sizes are left out, one small message more: 8 numbers to each other rank
    assert [rank[0] for rank in told] == [[64 * (n - 1)] * (n > 1) + rank[0] for rank in found]


def test_only_neighbours_talk(talks: Counter[tuple[int, int]]) -> None:
    ring = lambda boundary: pmod.halo_exchange(torch.ones(3), "x", width=2, boundary=boundary, sizes=[3] * 5)  # noqa: E731
    pmod.simulate(ring, "reflect", x=5)
    line = {(i, i + 1) for i in range(4)} | {(i + 1, i) for i in range(4)}
    assert talks == dict.fromkeys(line, 1)
    talks.clear()
    pmod.simulate(ring, "periodic", x=5)
    assert talks == dict.fromkeys(line | {(4, 0), (0, 4)}, 1)


def on_a_real_wire() -> tuple[int, int]:
    """Empty messages too would be seen: what gloo is asked for."""
    asked: list[str] = []
    peer_to_peer, all_to_all = GlooWire._peer_to_peer, GlooWire.all_to_all

    def peers(self: Any, sent: Any, received: Any) -> Any:
        asked.extend([f"to {rank}" for _, rank in sent] + [f"from {rank}" for _, rank in received])
        return peer_to_peer(self, sent, received)

    def everyone(self: Any, *args: Any) -> Any:
        asked.append("everyone")
        return all_to_all(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GlooWire, "_peer_to_peer", peers)
        patch.setattr(GlooWire, "all_to_all", everyone)
        with pmod.trace() as t:
            pmod.halo_exchange(torch.ones(3, 3, dtype=torch.float64), "x", width=(1, 2), sizes=(3, 3, 3))
    expected = [["to 1", "from 1"], ["to 2", "from 0", "to 0", "from 2"], ["from 1", "to 1"]][pmod.axis_index("x")]
    assert asked == expected
    return t.total_bytes(), sum(event.messages for event in t.events)


def test_only_neighbours_talk_on_gloo() -> None:
    assert spmd.launch(on_a_real_wire, x=3) == [(ROW, 1), (3 * ROW, 2), (2 * ROW, 1)]


def test_plans_transpose() -> None:
    """A plan is its transpose's transpose, step by step."""
    for sizes, boundary in itertools.product([(3, 0, 2), (1, 4), (5,)], PADDING):
        for index in range(len(sizes)):
            plan = halo_plan.exchange_of(index, sizes, (2, 1), boundary)
            assert [(c.of, c.to) for c in plan.T.takes] == [(c.to, c.of) for c in plan.places]
            assert plan.T.T[:3] == plan[:3]


# --- what is refused ----------------------------------------------------------------------------------------------

X = torch.ones(4, 2)
PAIR = "Pass an int of 0 or more, or two: the rows before and after."
MODES = "Pass 'zeros' (torch.nn.functional.pad's constant), 'periodic' (circular), 'reflect' or 'replicate'."


def exchange(x: Any = X, axis: Any = "model", **kwargs: Any) -> Any:
    return pmod.halo_exchange(x, axis, **{"width": 1, "sizes": (4, 4), **kwargs})


def reduce(x: Any = X, axis: Any = "model", **kwargs: Any) -> Any:
    return pmod.halo_reduce(x, axis, **{"width": 1, "sizes": (2, 2), **kwargs})


BOTH = {0: "data", 1: "model"}
EACH = {0: (4, 4), 1: (2, 2)}
# the call, its error, and its text after the place
WRONG: dict[str, tuple[Callable[[], Any], type[pmod.PmodError], str]] = {
    "a dim too far": (lambda: exchange(dim=2), pmod.ShapeError, "dim is 2 but x has 2 dims.\nPass dim from -2 to 1."),
    "a dim of a mapping": (
        lambda: exchange(axis={0: "model", -3: "data"}, sizes=None), pmod.ShapeError,
        "dim is -3 but x has 2 dims.\nPass dim from -2 to 1.",
    ),
    "a negative width": (lambda: exchange(width=-1), pmod.ShapeError, f"width is -1.\n{PAIR}"),
    "a negative width of two": (lambda: exchange(width=(1, -1)), pmod.ShapeError, f"width is (1, -1).\n{PAIR}"),
    "three widths": (lambda: exchange(width=(1, 1, 1)), pmod.ShapeError, f"width is (1, 1, 1).\n{PAIR}"),
    "a width of 1.5": (lambda: exchange(width=1.5), pmod.ShapeError, f"width is 1.5.\n{PAIR}"),
    "a mapping of widths without one of axes": (
        lambda: exchange(width={0: 1}), pmod.ShapeError, f"width is {{0: 1}}.\n{PAIR}"),
    "near a boundary": (
        lambda: exchange(boundary="reflekt"), pmod.ArgumentError,
        f"boundary is 'reflekt'; did you mean 'reflect'?\n{MODES}",
    ),
    "torch's name": (
        lambda: exchange(boundary="circular"), pmod.ArgumentError, f"boundary is 'circular'.\n{MODES}"),
    "no boundary": (lambda: exchange(boundary=None), pmod.ArgumentError, f"boundary is None.\n{MODES}"),
    "three sizes": (
        lambda: exchange(sizes=(4, 4, 0)), pmod.ShapeError,
        "sizes is (4, 4, 0).\nPass 2 ints, one per rank of the axis."),
    "sizes of others": (
        lambda: exchange(sizes=(3, 3)), pmod.ShapeError,
        "sizes[<i>] is 3 but x.shape[0] is 4.\nPass sizes=<fits>, or leave sizes out to exchange them.",
    ),
    "sizes with the halos": (
        lambda: reduce(sizes=(4, 4)), pmod.ShapeError,
        "sizes[<i>] is 4 but x.shape[0] is 4, 2 without its halos.\n"
        "Pass sizes=<halved>, or leave sizes out to exchange them.",
    ),
    "no room for the halos": (
        lambda: reduce(width=3, sizes=None), pmod.ShapeError,
        "x.shape[0] is 4 but the halos have 6 rows.\nPass a shard with its halos, as halo_exchange gives it.",
    ),
    "reflect": (
        lambda: exchange(width=(0, 8), boundary="reflect"), pmod.ShapeError,
        "width is (0, 8) with boundary='reflect', but all shards together have 8 rows.\n"
        "Pass a width of at most 7, or boundary='zeros'.",
    ),
    "periodic": (
        lambda: reduce(width=(5, 0), boundary="periodic", x=torch.ones(7)), pmod.ShapeError,
        "width is (5, 0) with boundary='periodic', but all shards together have 4 rows.\n"
        "Pass a width of at most 4, or boundary='zeros'.",
    ),
    "replicate of nothing": (
        lambda: exchange(torch.ones(0), boundary="replicate", sizes=(0, 0)), pmod.ShapeError,
        "width is (1, 1) with boundary='replicate', but all shards together have 0 rows.\n"
        "Pass a width of at most 0, or boundary='zeros'.",
    ),
    "dim and a mapping": (
        lambda: exchange(axis=BOTH, dim=0, sizes=EACH), pmod.ArgumentError,
        "dim is 0 and axis a mapping.\nThe mapping names the dims."),
    "an axis twice": (
        lambda: exchange(axis={0: "model", 1: "model"}), pmod.AxisError,
        "two dims are cut along 'model'.\nCut one along each axis."),
    "a dim twice": (
        lambda: exchange(axis={0: "model", -2: "data"}, sizes=None), pmod.ShapeError,
        "two of the dims [-2, 0] are the same dim of x, which has 2.\nName each dim once."),
    "other dims": (
        lambda: exchange(axis={0: "model"}, width={0: 1, 1: 1}, sizes=None), pmod.ArgumentError,
        "width names the dims [0, 1].\nName the same dims as axis does, [0]."),
    "sizes for all": (
        lambda: exchange(axis={0: "model"}), pmod.ShapeError,
        "sizes is (4, 4).\nPass {dim: sizes}, as axis is {dim: axis}; None for a dim whose sizes are to be exchanged."),
    "leaves of several lengths": (
        lambda: exchange([X, X[:3]]), pmod.ShapeError,
        "the leaves of x have 4, 3 rows along dim 0.\nPass shards of one length, or call it for each."),
    "bool": (
        lambda: reduce(X > 0), pmod.ArgumentError,
        "x is bool, and a sum of truth values is ambiguous.\n"
        "Pass x.int() to count, or use pmax for any and pmin for all."),
    "no tensor": (
        lambda: exchange(1.0), pmod.ArgumentError, "x is a float.\nPass a tensor, or a dict, list or tuple of them."),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_refused(name: str, messages: list[Any]) -> None:
    call, kind, text = WRONG[name]
    for mesh, error in on_all_ranks(call):
        i = mesh.axis_index("model")
        place = str(mesh.coords and f"(data={mesh.axis_index('data')}, model={i})")
        function = "halo_reduce" if "reduce(" in _source(call) else "halo_exchange"
        axis = "data" if name in ("a dim of a mapping", "dim and a mapping", "a dim twice") else "model"
        fits = "(4, 3)" if i == 0 else "(3, 4)"
        halved = "(2, 4)" if i == 0 else "(4, 2)"
        said = text.replace("<i>", str(i)).replace("<fits>", fits).replace("<halved>", halved)
        check(error, kind, f"pmod.{function}(axis={axis!r}) at {place}: {said}")
    assert not messages


def _source(call: Callable[[], Any]) -> str:
    return f"{call.__code__.co_names[0]}("


def test_refused_after_sizes_are_told() -> None:
    """All ranks find it alike, and no rows are sent."""
    for mesh, error in on_all_ranks(lambda: exchange(width=8, boundary="reflect", sizes=None)):
        place = f"(data={mesh.axis_index('data')}, model={mesh.axis_index('model')})"
        check(error, pmod.ShapeError,
              f"pmod.halo_exchange(axis='model') at {place}: width is (8, 8) with boundary='reflect', but all shards "
              "together have 8 rows.\nPass a width of at most 7, or boundary='zeros'.")  # fmt: skip
    for _, error in on_all_ranks(lambda: exchange(torch.ones(2, 2 + pmod.axis_index("model")), sizes=None)):
        assert type(error) is pmod.MismatchError and "Shards differ in length along dim only." in str(error)


def test_an_empty_mapping() -> None:
    with pytest.raises(pmod.ArgumentError) as raised:
        exchange(axis={})
    check(raised.value, pmod.ArgumentError,
          "pmod.halo_exchange: axis is an empty mapping.\nPass {dim: axis}, or one axis.")  # fmt: skip
