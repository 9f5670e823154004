"""Running a call: its tensors, laid out in one flat message, go to the wire, and what
arrives is cut and shaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.autograd.profiler as profiler
from torch import Tensor

from pmod._core.row import Call, Params, Row
from pmod._mesh.axis import named
from pmod._torch import backward_here, is_profiled, unsafe_view
from pmod._wire.along import wire_of
from pmod._wire.base import Wire
from pmod._wire.board import Said, code_of
from pmod._wire.sent import Sent


def begin(call: Call, xs: Sequence[Tensor], wire: Wire) -> Sent[list[Tensor]]:
    """Send, and return what will be the list of results."""
    row, _, params = call
    if row.local or (len(xs) == 1 and not row.fused):
        results = [_begin_one(row, x, wire, params) for x in xs]
        return Sent(
            (),
            lambda: [
                result.wait() if isinstance(result, Sent) else result
                for result in results
            ],
        )
    whole = [_laid_out(x) for x in xs]
    flat = (
        whole[0].reshape(-1)
        if len(xs) == 1
        else torch.cat([x.reshape(-1) for x in whole])
    )
    shapes = None if row.resized is None else row.resized(params, xs, wire.index)
    if shapes is not None:  # also where this rank holds nothing, others may
        params = (*params, sum(math.prod(shape) for shape in shapes))
    elif flat.numel() == 0:
        return Sent((), lambda: [torch.empty_like(x) for x in xs])
    sent = row.send(flat, wire, params)
    assert isinstance(sent, Sent)
    return sent.then(lambda y: _cut(y, xs, shapes))


def _begin_one(
    row: Row, x: Tensor, wire: Wire, params: Params
) -> Sent[Tensor] | Tensor:
    if row.local:
        return row.send(x, wire, params)
    sent = row.send(_laid_out(x), wire, params)
    assert isinstance(sent, Sent)
    kept = memory_format(x)
    return (
        sent
        if kept is None
        else sent.then(
            lambda y: y.contiguous(memory_format=kept) if y.dim() == x.dim() else y
        )
    )


def _laid_out(x: Tensor) -> Tensor:
    """Row-major and resolved: every rank must send its elements in the same order,
    whatever its strides.
    """
    return x.resolve_conj().resolve_neg().contiguous()


def memory_format(x: Tensor) -> torch.memory_format | None:
    """channels_last (2d or 3d) where x, or what it is a slice of, is laid out so; None
    where it is not.

    What torch computes from such a slice is laid out so, too.
    """
    if x.dim() not in (4, 5):
        return None
    kept = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    if (
        x.numel() == 0
    ):  # an empty slice is contiguous in every format; its strides say what it was cut from
        return kept if x.stride(1) == 1 and x.stride(-1) > 1 else None
    if x.is_contiguous():
        return None
    try:
        return kept if x.is_contiguous(memory_format=kept) or _is_cut_from(x) else None
    except RuntimeError:  # inside vmap, which does not know
        return None


def _is_cut_from(x: Tensor) -> bool:
    """Whether the strides are those of a slice of a channels_last tensor, by torch's
    own rule.
    """
    least = 0
    for dim in (1, *range(x.dim() - 1, 1, -1), 0):
        stride = x.stride(dim)
        # ambiguous: one channel, or pixels that all lie at one place
        if stride == 0 or stride < least or (dim == 0 and least == x.stride(1)):
            return False
        least = stride * max(x.shape[dim], 1)
    return True


def _cut(
    flat: Tensor, like: Sequence[Tensor], shapes: Sequence[Sequence[int]] | None
) -> list[Tensor]:
    """The parts of a fused message, laid out as `like`; no views in autograd's eyes, so
    each may be changed.

    shapes: theirs, where they are not those of `like`.
    """
    wanted = [x.shape for x in like] if shapes is None else shapes
    parts = (
        [flat]
        if len(like) == 1
        else torch.unsafe_split_with_sizes(flat, [math.prod(shape) for shape in wanted])
    )
    out: list[Tensor] = []
    for part, x, shape in zip(parts, like, wanted, strict=True):
        y = part if x.dim() == 1 else unsafe_view(part, shape)
        kept = memory_format(x)
        out.append(y if kept is None else y.contiguous(memory_format=kept))
    return out


def run(call: Call, xs: Sequence[Tensor]) -> list[Tensor]:
    if is_profiled():
        with profiler.record_function(profiled_as(call)):
            return begin(call, xs, wire_for(call, xs)).wait()
    return begin(call, xs, wire_for(call, xs)).wait()


def wire_for(call: Call, xs: Sequence[Tensor]) -> Wire:
    """The wire along the axis of a call, which takes no message for one of an unlike
    call.
    """
    row, axis, params = call
    if row.local:  # ranks may make it unlike often
        return Wire(axis.size, axis.index)
    return wire_of(axis, xs[0].device, row.name, _said(row, params, xs))


def _said(row: Row, params: Params, xs: Sequence[Tensor]) -> Said:
    """What must be the same on all ranks, and what an error shows."""
    shapes, dtype = [x.shape for x in xs], xs[0].dtype
    # a sum of gradients and one of values may look alike, and must not meet
    in_backward = backward_here() != -1
    if row.agreed is None:
        return Said(
            row.name,
            code_of((row.name, params, dtype, in_backward, *shapes)),
            shapes,
            dtype,
            params,
        )
    alike = tuple([row.agreed(params, shape) for shape in shapes])
    return Said(
        row.name, code_of((row.name, alike, dtype, in_backward)), shapes, dtype, params
    )


def profiled_as(call: Call) -> str:
    """The name under which torch.profiler shows a call."""
    return f"pmod.{call.row.name} ({named(call.axis.label)})"
