"""Zero frequency to the middle and back: a roll of dims, some of which are cut."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from pmod._collectives.halo import carry_out
from pmod._collectives.halo_plan import Plan, window_plan
from pmod._collectives.spectrum import (
    Ints,
    Lengths,
    axes_given,
    cut_dims,
    held_sizes,
    kind_of,
)
from pmod._core.arguments import as_list, check_tensor, dim_from_end
from pmod._mesh.mesh import AxisLike
from pmod._torch import constant_in_graphs


@lru_cache(maxsize=256)
def _rolled_plan(index: int, sizes: tuple[int, ...], shift: int) -> Plan:
    # row i of the result is row i - shift
    ends = accumulate(sizes, initial=-shift)
    return window_plan(index, sizes, tuple(pairwise(ends)), "periodic")


@constant_in_graphs
def _plan(index: int, sizes: tuple[int, ...], shift: int) -> Plan:
    return _rolled_plan(index, sizes, shift)


def shifted(
    function: str,
    x: Tensor,
    dim: Ints | None,
    axis: AxisLike,
    in_dim: Ints | None,
    sizes: Lengths | None,
) -> Tensor:
    """Return this rank's shard of torch.fft's function of the whole tensor."""
    is_several = as_list(in_dim) is not None
    axes = axes_given(axis, is_several, f"fft.{function}")
    kind = kind_of(function, None, axes)
    check_tensor(x, kind.name, axes[0])
    listed: list[object] = list(range(-x.dim(), 0))
    if dim is not None:
        given = as_list(dim)
        listed = [dim] if given is None else given
    ats = [dim_from_end(one, x, kind.name, axes[0]) for one in listed]
    if len(set(ats)) < len(ats) or not ats:
        raise kind.wrong(f"dim is {tuple(listed)}", "Name each dim once.")
    # a spectrum is cut along the last of its dims
    ins = ats[-len(axes) :]
    if in_dim is not None:
        ins = cut_dims(x, in_dim, "in_dim", kind)
    whole = [at for at in ats if at not in ins]
    if whole:
        x = getattr(torch.fft, function)(x, whole)
    rolled = [number for number, at in enumerate(ins) if at in ats]
    if not rolled:
        return x
    held = held_sizes(x, ins, sizes, is_several, kind)
    for number in rolled:
        length = sum(held[number])
        half = length // 2
        if function == "ifftshift":
            half = length - half
        plan = _plan(axes[number].index, held[number], half)
        (x,) = carry_out(plan, [x], [ins[number]], axes[number])
    return x
