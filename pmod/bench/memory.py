"""Peak resident memory of a collective, beside that of the raw calls.

It is what the kernel counts for this process beyond what it held before, the result
included. Only Linux says so.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor

import pmod
from pmod._errors import PmodError, phrase
from pmod.bench.cases import AXIS, CASES

MIB = 1 << 20
LEAVES = 64


@frozen
class Peak:
    """The bytes that a function needs at most, on the rank that needs most."""

    function: str
    pmod_bytes: int
    raw_bytes: int


def measure_memory(nbytes: int = 64 * MIB) -> list[Peak]:
    """Measure the memory of messages of so many bytes. All ranks of the mesh call it."""
    peaks: list[Peak] = []
    for name, pair in _pairs(nbytes).items():
        found = [_most(_peak(run)) for run in pair]
        peaks.append(Peak(name, *found))
    return peaks


def _pairs(
    nbytes: int,
) -> Mapping[str, tuple[Callable[[], object], Callable[[], object]]]:
    x = torch.ones(nbytes // 4)
    parameter = torch.ones(nbytes // 4, requires_grad=True)
    leaves = list(torch.ones(nbytes // 4).chunk(LEAVES))
    raw_sum, raw_maximum = CASES["psum"].raw, CASES["pmax"].raw
    assert raw_sum is not None and raw_maximum is not None
    # what connects the ranks, and what is imported late, is no part of a message
    for warm in (torch.ones(4), torch.ones(4, requires_grad=True)):
        pmod.psum([warm, warm], AXIS)
        pmod.pmax(warm, AXIS)
    copied = pmod.pvary(parameter, AXIS)
    back = partial(torch.autograd.grad, copied, parameter, x, retain_graph=True)
    size = _size(nbytes)
    return {
        f"psum of {size}": (partial(pmod.psum, x, AXIS), partial(raw_sum, x)),
        f"pvary's backward of {size}": (back, partial(raw_sum, x)),
        f"pmax with grad of {size}": (
            partial(_there_and_back, parameter, x),
            partial(raw_maximum, x),
        ),
        f"psum of a tree of {LEAVES} x {_size(nbytes // LEAVES)}": (
            partial(pmod.psum, leaves, AXIS),
            lambda: [raw_sum(leaf) for leaf in leaves],
        ),
    }


def _there_and_back(parameter: Tensor, g: Tensor) -> object:
    return torch.autograd.grad(pmod.pmax(parameter, AXIS), parameter, g)


def _size(nbytes: int) -> str:
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // 1024} KiB"


def _most(nbytes: int) -> int:
    """Return the largest number of all ranks."""
    most = torch.tensor(nbytes)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most.item())


def _peak(run: Callable[[], object]) -> int:
    """Return by how many bytes the process grows while it runs."""
    gc.collect()
    pmod.barrier(AXIS)
    # What the C library has kept of the last messages would be used again, and would
    # not count. Not every C library can be asked to give it back.
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)
    try:
        # the kernel begins to count anew
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        given = "this system does not count the peak memory of a process anew"
        right = "Measure memory on Linux, where /proc/self/clear_refs can be written."
        raise PmodError(phrase("bench", given, right)) from error
    before = _status("VmRSS")
    result = run()
    grown = _status("VmHWM") - before
    del result
    return max(0, grown)


def _status(name: str) -> int:
    """Return a number of bytes that the kernel keeps of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    right = "Measure memory on Linux."
    raise PmodError(phrase("bench", f"/proc/self/status has no {name}", right))
