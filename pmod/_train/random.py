"""Random numbers that differ along some axes and agree along the others.

These are seeds, and those of torch's own generators.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from pmod._collectives.places import axis_index
from pmod._core.arguments import as_int, wrong
from pmod._errors import ArgumentError, PmodError, phrase
from pmod._mesh.ambient import resolve
from pmod._mesh.axis import Axis, named
from pmod._mesh.mesh import AxisLike
from pmod._ranks import world


def hashed(text: str) -> int:
    """Return 63 bits that look random, the same on every machine."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    # a seed of torch's is a signed number of 64 bits
    return int.from_bytes(digest, "little") >> 1


def check_seed(seed: object, function: str, axis: Axis) -> int:
    """Return the seed as an int."""
    parsed = as_int(seed)
    if parsed is None:
        given = f"seed is a {type(seed).__name__}"
        raise wrong(ArgumentError, function, axis, given, "Pass an int.")
    return parsed


def _folded(seed: int, axis: AxisLike, function: str) -> tuple[int, Axis]:
    bound = resolve(axis, function)
    number = check_seed(seed, function, bound)
    return hashed(f"{number}/{named(bound.label)}/{bound.index}"), bound


def fold_in(seed: int, axis: AxisLike) -> int:
    """Return a seed that differs along the axis and agrees along all others.

    For torch.manual_seed, torch.Generator and whatever takes an int of 63 bits. Fold
    several axes in one after the other, or pass a tuple. It depends on the seed, the
    name of the axis and the index along it, so a run on another number of ranks gives
    the ranks that remain the same numbers. Nothing is sent.
    Raises: ArgumentError if seed is not an int. JAX: random.fold_in, of lax.axis_index.

    >>> seeds = pmod.simulate(lambda: pmod.fold_in(0, "data"), data=2, model=2)
    >>> seeds[0] == seeds[1] != seeds[2] == seeds[3]
    True
    """
    number, _ = _folded(seed, axis, "fold_in")
    # shard_map follows who has a number of its own
    axis_index(axis)
    return number


@contextmanager
def rng(seed: int, axis: AxisLike) -> Generator[None]:
    """Let torch's random numbers differ along the axis and agree along all others.

    So do nn.Dropout's masks. torch's default generators, that of the cpu and that of
    the mesh's device, are seeded with `fold_in(seed, axis)`; on leaving they are as
    they were before. Ranks stay in agreement only if they draw the same amount of
    numbers. axis: a name; a tuple, over which all ranks differ; or (), along which all
    agree. Python's and numpy's generators are left alone. The same seed gives the same
    numbers again: fold the step in, ``rng(seed + step, "data")``. A layer that differs
    along one more axis takes its seed from the numbers around it, which go on from call
    to call and agree along it: ``rng(int(torch.randint(2**62, ())), ("data",
    "model"))``. Activation checkpoints, inside or around it, draw the same numbers
    again. Nothing is sent.
    Raises: ArgumentError if seed is not an int; PmodError inside a function that is
    compiled with fullgraph=True (torch runs others as they are). Enter it around the
    compiled function, whose random numbers follow it.

    >>> def masks():
    ...     with pmod.rng(0, "data"):
    ...         return torch.nn.functional.dropout(torch.ones(64)).tolist()
    >>> a, b, c, d = pmod.simulate(masks, data=2, model=2)
    >>> a == b != c == d
    True
    """
    if torch.compiler.is_compiling():
        right = "Enter it around the compiled function, whose random numbers follow it."
        raise PmodError(
            phrase("rng", "it is entered in compiled code", right, axis=axis)
        )
    number, bound = _folded(seed, axis, "rng")
    device = bound.topology.device
    # the GPU of an estimate need not exist
    on_cpu = device.type == "cpu" or world.current().alone
    with torch.random.fork_rng([] if on_cpu else [device], device_type=device.type):
        torch.default_generator.manual_seed(number)
        if not on_cpu:
            module: Any = torch.get_device_module(device)
            with module.device(device):
                module.manual_seed(number)
        yield
