"""`estimate`: one rank's program in a world that does not exist, to see what it would send and how long that takes.

The other ranks are taken to hold what this one holds: what they would send is made up from what this rank sends, so
that values stay finite and plausible, and everything up to the wire is the code that runs on a real mesh.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pmod import _groups
from pmod._ambient import set_mesh
from pmod._arguments import check_function
from pmod._errors import ArgumentError, AxisError, PmodError, explain, near_miss, quoted
from pmod._mesh import Axis, Mesh, make_mesh
from pmod._numbers import as_real
from pmod._simulate import check_axis_sizes
from pmod._topology import Topology
from pmod._trace import Event, trace
from pmod._waiting import Said
from pmod._wire import GroupWire, Reduction, Sent, scaled

Rate = float | Mapping[str | tuple[str, ...], float]
"""A number for all axes, or one for each."""


class _Nobody:
    """A process group whose messages go nowhere."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_: self  # which is also its own work

    def wait(self, *_: Any) -> None:
        pass


class _Mirror(GroupWire):
    """Sends as a process group does, to nobody; what would arrive is what this rank has."""

    def __init__(self, axis: Axis, _: Said) -> None:
        super().__init__(axis.size, axis.index, _Nobody())
        self._on_gpus = axis.topology.device.type == "cuda"

    def by_nccl(self, x: Tensor) -> bool:
        return self._on_gpus or x.is_cuda

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Sent:
        mine = x.split(list(send))[self.index]
        return super().all_to_all(x, send, recv).then(lambda _: torch.cat([_fitted(mine, n) for n in recv]))

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Sent:
        return super().all_gather(x, counts).then(lambda _: torch.cat([_fitted(x, n) for n in counts]))

    def reduce_scatter(self, x: Tensor, counts: Sequence[int], dtype: torch.dtype) -> Sent:
        mine = x.narrow(0, sum(counts[: self.index]), counts[self.index])
        total = (mine.to(dtype) * self.size).to(x.dtype)
        return super().reduce_scatter(x, counts, dtype).then(lambda _: total)

    def all_reduce(self, x: Tensor, how: Reduction, dtype: torch.dtype, divisor: int) -> Sent:
        total = x.clone()
        if how == "sum":
            total = scaled(x.to(dtype) * self.size, divisor).to(x.dtype)
        return super().all_reduce(x, how, dtype, divisor).then(lambda _: total)

    def broadcast(self, x: Tensor, root: int) -> Sent:
        return super().broadcast(x, root).then(lambda _: x.clone())

    def permute(self, x: Tensor, target: int | None, source: int | None, count: int | None = None) -> Sent:
        count = x.numel() if count is None else count
        arriving = x.new_zeros(count) if source is None else _fitted(x, count).clone()
        return super().permute(x, target, source, count).then(lambda _: arriving)

    def words(self, mine: str) -> list[str]:
        """What each rank says (`assert_invariant`)."""
        return [mine] * self.size


def _fitted(part: Tensor, count: int) -> Tensor:
    """As many elements as are expected: the first ones, and zeros."""
    return part[:count] if len(part) >= count else torch.cat([part, part.new_zeros(count - len(part))])


@contextmanager
def alone_on(mesh: Mesh | Mapping[str, int], function: str) -> Generator[Mesh]:
    """Make this process one rank of a mesh whose other ranks do not exist; its collectives reach nobody."""
    if _groups.in_simulation():
        raise PmodError(explain(function, "this is a simulated rank already", "Call it from outside."))
    if torch.compiler.is_compiling():
        raise PmodError(explain(function, "it is called in compiled code", "Pass it the eager function."))
    if not isinstance(mesh, Mesh):
        if not isinstance(mesh, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            given, right = f"mesh is a {type(mesh).__name__}", "Pass a pmod.Mesh, or sizes: mesh={'data': 64}."
            raise ArgumentError(explain(function, given, right))
        mesh = check_axis_sizes(mesh, function, f"{function}(fn, ..., mesh={{'data': 64}})")
        place = Topology(rank=0, world_size=math.prod(mesh.values()), device=_groups.here().device)
        mesh = make_mesh(mesh, topology=place)
    world = SimpleNamespace(topology=mesh.topology, mesh=None, wire=_Mirror, watchers=[], meters=[], alone=True)
    with _groups.instead_of_processes(world), set_mesh(mesh):
        yield mesh


def estimate(
    fn: Callable[..., Any],
    *args: Any,
    mesh: Mesh | Mapping[str, int],
    bandwidth: Rate = math.inf,
    latency: Rate = 0.0,
) -> trace:
    """What fn(*args) would send on a mesh of any size, and how long that would take: a `trace`, in this one process.

    fn is one rank's program, and runs once, as the rank that the mesh says (of a mapping, the first); no other rank
    exists, and nothing is sent. Tensors may be real or on the "meta" device, where a model of any size costs no memory.
    What arrives is made up from what this rank holds, so what depends on values may take another course than it would.

    mesh: sizes, ``{"data": 1250, "model": 8}``, or a Mesh, ``make_mesh(..., topology=Topology(rank=3, world_size=10000,
    device="cuda"))``: on cuda the messages are those of NCCL, else those of gloo. bandwidth: bytes per second from one
    rank to the others, latency: seconds per message, each a number, or a number for each axis; a tuple of axes that is
    not named is as slow as its slowest.
    A call takes ``latency * messages + max(sent, received) / bandwidth``, where messages are those that follow one
    another, n - 1 for an all_to_all and ceil(log2 n) for a broadcast (the alpha-beta model: Thakur, Rabenseifner and
    Gropp 2005, doi:10.1177/1094342005051521). Neither computing nor what overlaps with it is counted.
    Eager code only. Raises: AxisError where a bandwidth or latency is missing for an axis that is used.

    >>> def step(x):
    ...     return pmod.psum(x, "data")
    >>> x = torch.empty(1_000_000, device="meta")
    >>> t = pmod.estimate(step, x, mesh={"data": 1000}, bandwidth=50e9, latency=5e-6)
    >>> t.total_bytes("data")
    7992000
    """
    check_function(fn, "estimate")
    with alone_on(mesh, "estimate") as here:
        rates = [_checked_rate(bandwidth, "bandwidth", here), _checked_rate(latency, "latency", here)]
        with trace() as found:
            fn(*args)
    found.retime(lambda event: _seconds(event, *rates))
    return found


def _checked_rate(rate: Rate, name: str, mesh: Mesh) -> Rate:
    for axis, value in rate.items() if isinstance(rate, Mapping) else [(None, rate)]:
        for part in () if axis is None else axis if isinstance(axis, tuple) else (axis,):
            if part not in mesh.axis_names:
                given = f"{name} has no axis {quoted(part)} to be for{near_miss(part, mesh.axis_names)}"
                raise AxisError(explain("estimate", given, f"The mesh has {mesh.shape}."))
        number = as_real(value)
        if number is None or not (number > 0 if name == "bandwidth" else number >= 0):
            right = "Pass bytes per second, above 0." if name == "bandwidth" else "Pass seconds, 0 or more."
            raise ArgumentError(explain("estimate", f"{name} is {quoted(value)}", right, axis=axis))
    return rate


def _of_axis(rate: Rate, axis: str | tuple[str, ...], name: str) -> float:
    if not isinstance(rate, Mapping):
        return rate
    if axis in rate:
        return rate[axis]
    parts = (axis,) if isinstance(axis, str) else axis
    missing = [part for part in parts if part not in rate]
    if missing:
        right = f"Pass {name}={{{missing[0]!r}: ...}} beside the others, or one number for all."
        raise AxisError(explain("estimate", f"{name} names no {missing[0]!r}, which is used", right))
    return (min if name == "bandwidth" else max)(rate[part] for part in parts)


def _seconds(event: Event, bandwidth: Rate, latency: Rate) -> float:
    alpha, per_second = _of_axis(latency, event.axis, "latency"), _of_axis(bandwidth, event.axis, "bandwidth")
    nbytes = max(event.nbytes, event.received)
    return alpha * max(event.messages, nbytes > 0) + nbytes / per_second
