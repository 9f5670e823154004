"""`estimate`: what one rank's program would send in a world that does not exist.

The other ranks are taken to hold what this one holds. What they would send is made up
from what this rank sends, so that values stay finite and plausible. Everything up to
the wire is the code that runs on a real mesh.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from pmod._core.arguments import as_real, check_function
from pmod._debug.events import Event
from pmod._debug.trace import trace
from pmod._errors import ArgumentError, AxisError, near_miss, phrase, quoted
from pmod._mesh.mesh import Mesh
from pmod._run.alone import alone_on

Rate = float | Mapping[str | tuple[str, ...], float]
"""A number for all axes, or one for each."""


def estimate(
    fn: Callable[..., object],
    *args: object,
    mesh: Mesh | Mapping[str, int],
    bandwidth: Rate = math.inf,
    latency: Rate = 0.0,
) -> trace:
    """Return what fn(*args) would send on a mesh of any size, and how long that takes.

    It is a `trace`, made in this one process.
    fn is one rank's program, and runs once, as the rank that the mesh says (of a
    mapping, the first); no other rank exists, and nothing is sent. Tensors may be real
    or on the "meta" device, where a model of any size costs no memory. What arrives is
    made up from what this rank holds, so what depends on values may take another course
    than it would.

    mesh: sizes, ``{"data": 1250, "model": 8}``, or a Mesh, ``make_mesh(...,
    topology=Topology(rank=3, world_size=10000, device="cuda"))``: on cuda the messages
    are those of NCCL, else those of gloo. bandwidth: bytes per second from one rank to
    the others, latency: seconds per message, each a number, or a number for each axis;
    a tuple of axes that is not named is as slow as its slowest. A call takes ``latency
    * messages + max(sent, received) / bandwidth``, where messages are those that follow
    one another, n - 1 for an all_to_all and ceil(log2 n) for a broadcast (the
    alpha-beta model: Thakur, Rabenseifner and Gropp 2005,
    doi:10.1177/1094342005051521). Neither computing nor what overlaps with it is
    counted. Eager code only. Raises: AxisError where a bandwidth or latency is missing
    for an axis that is used.

    >>> def step(x):
    ...     return pmod.psum(x, "data")
    >>> x = torch.empty(1_000_000, device="meta")
    >>> t = pmod.estimate(step, x, mesh={"data": 1000}, bandwidth=50e9, latency=5e-6)
    >>> t.total_bytes("data")
    7992000
    """
    check_function(fn, "estimate")
    with alone_on(mesh, "estimate") as here:
        _check_rate(bandwidth, "bandwidth", here)
        _check_rate(latency, "latency", here)
        with trace() as found:
            fn(*args)
    found.retime(lambda event: _seconds(event, bandwidth, latency))
    return found


def _check_rate(rate: Rate, name: str, mesh: Mesh) -> None:
    if not isinstance(rate, Mapping):
        _check_number(rate, name)
        return
    for axis, value in rate.items():
        for part in _parts(axis):
            if part not in mesh.axis_names:
                near = near_miss(part, mesh.axis_names)
                given = f"{name} has no axis {quoted(part)} to be for{near}"
                right = f"The mesh has {mesh.shape}."
                raise AxisError(phrase("estimate", given, right))
        _check_number(value, name, axis)


def _check_number(value: object, name: str, axis: object = None) -> None:
    number = as_real(value)
    if name == "bandwidth":
        # Nothing would arrive at 0 bytes per second.
        fine = number is not None and number > 0
        right = "Pass bytes per second, above 0."
    else:
        fine = number is not None and number >= 0
        right = "Pass seconds, 0 or more."
    if not fine:
        given = f"{name} is {quoted(value)}"
        raise ArgumentError(phrase("estimate", given, right, axis=axis))


def _parts(axis: str | tuple[str, ...]) -> tuple[str, ...]:
    return axis if isinstance(axis, tuple) else (axis,)


def _of_axis(rate: Rate, axis: str | tuple[str, ...], name: str) -> float:
    if not isinstance(rate, Mapping):
        return rate
    if axis in rate:
        return rate[axis]
    parts = _parts(axis)
    missing = [part for part in parts if part not in rate]
    if missing:
        given = f"{name} names no {missing[0]!r}, which is used"
        pass_it = f"Pass {name}={{{missing[0]!r}: ...}} beside the others"
        raise AxisError(phrase("estimate", given, f"{pass_it}, or one number for all."))
    # A tuple of axes is as slow as its slowest.
    rates = [rate[part] for part in parts]
    return min(rates) if name == "bandwidth" else max(rates)


def _seconds(event: Event, bandwidth: Rate, latency: Rate) -> float:
    alpha = _of_axis(latency, event.axis, "latency")
    per_second = _of_axis(bandwidth, event.axis, "bandwidth")
    nbytes = max(event.nbytes, event.received)
    return alpha * max(event.messages, nbytes > 0) + nbytes / per_second
