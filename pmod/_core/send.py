"""Running a call: its tensors go to the wire, and what arrives is cut and shaped.

The tensors of a fused row travel as one flat message.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

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

# A fused message is copied as a whole before it is sent; a larger one goes in parts.
BUCKET = 16 << 20


def begin(call: Call, xs: Sequence[Tensor], wire: Wire) -> Sent[list[Tensor]]:
    """Send, and return what will be the list of results."""
    row, _, params = call
    if row.local:
        # nothing is laid out anew: a view of x may be the result
        values = cast(list[Tensor], [row.send(x, wire, params) for x in xs])
        return Sent((), lambda: values)
    if len(xs) == 1 and not row.fused:
        return _begin_one(row, xs[0], wire, params)
    parts = [_laid_out(x).reshape(-1) for x in xs]
    flat = parts[0] if len(parts) == 1 else torch.cat(parts)
    shapes = None
    resized = None if row.resized is None else row.resized(params, xs, wire.index)
    # where shapes change, a rank takes part that holds nothing: others may send to it
    if resized is not None:
        params, shapes = resized
    elif flat.numel() == 0:
        return Sent((), lambda: [torch.empty_like(x) for x in xs])
    sent = row.send(flat, wire, params)
    assert isinstance(sent, Sent)
    return sent.then(lambda y: _cut(y, xs, shapes))


def _begin_one(
    row: Row[Params], x: Tensor, wire: Wire, params: Params
) -> Sent[list[Tensor]]:
    sent = row.send(_laid_out(x), wire, params)
    assert isinstance(sent, Sent)
    return sent.then(lambda y: [_laid_out_as(x, y)])


def _laid_out(x: Tensor) -> Tensor:
    # row-major and resolved: every rank must send its elements in the same order,
    # whatever its strides
    return x.resolve_conj().resolve_neg().contiguous()


def _laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """Return y in the memory format of x."""
    kept = memory_format(x)
    if kept is None or y.dim() != x.dim():
        return y
    return y.contiguous(memory_format=kept)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(x: Tensor) -> torch.memory_format | None:
    """Return channels_last (2d or 3d) if x, or what it is a slice of, is laid out so.

    What torch computes from such a slice is laid out so, too.
    """
    kept = _CHANNELS_LAST.get(x.dim())
    if kept is None or not _is_laid_out(x, kept):
        return None
    return kept


def _is_laid_out(x: Tensor, channels_last: torch.memory_format) -> bool:
    # an empty slice is contiguous in every format; its strides say what it was cut from
    if x.numel() == 0:
        return x.stride(1) == 1 and x.stride(-1) > 1
    if x.is_contiguous():
        return False
    try:
        return x.is_contiguous(memory_format=channels_last) or _is_slice(x)
    except RuntimeError:
        # a vmap of torch.func answers for row-major tensors only
        return False


def _is_slice(x: Tensor) -> bool:
    """Whether x has the strides of a slice of a channels_last tensor, by torch's rule."""
    least = 1
    for dim in (1, *range(x.dim() - 1, 1, -1), 0):
        stride = x.stride(dim)
        if stride < least:
            return False
        # ambiguous: one channel, or pixels that all lie at one place
        if dim == 0 and least == x.stride(1):
            return False
        least = stride * max(x.shape[dim], 1)
    return True


def _cut(
    flat: Tensor, like: Sequence[Tensor], shapes: Sequence[Sequence[int]] | None
) -> list[Tensor]:
    """Return the parts of a fused message, laid out as `like`.

    shapes: theirs, if they are not those of `like`.
    """
    wanted = shapes
    if wanted is None:
        wanted = [x.shape for x in like]
    parts = [flat]
    # no views in autograd's eyes, so that the user may change each of them
    if len(like) > 1:
        lengths = [math.prod(shape) for shape in wanted]
        parts = torch.unsafe_split_with_sizes(flat, lengths)
    out: list[Tensor] = []
    for part, x, shape in zip(parts, like, wanted, strict=True):
        y = part if x.dim() == 1 else unsafe_view(part, shape)
        out.append(_laid_out_as(x, y))
    return out


def run(call: Call, xs: Sequence[Tensor]) -> list[Tensor]:
    """Send a call and wait for its results."""
    if is_profiled():
        with profiler.record_function(profiled_as(call)):
            return _run_now(call, xs)
    if len(xs) > 1:
        return _run_now(call, xs)
    return begin(call, xs, wire_for(call, xs)).wait()


def _run_now(call: Call, xs: Sequence[Tensor]) -> list[Tensor]:
    """Send and wait; of many tensors, few at a time are copied."""
    row, wire = call.row, wire_for(call, xs)
    if not row.fused or row.local or row.resized is not None or len(xs) == 1:
        return begin(call, xs, wire).wait()
    # cut here and not where calls are bound: the derivative stays one call, in which
    # every rank takes part whatever it used
    out: list[Tensor] = []
    for bucket in _buckets(xs):
        out += begin(call, bucket, wire).wait()
    return out


def _buckets(xs: Sequence[Tensor]) -> list[list[Tensor]]:
    """Cut the tensors of one message, in their order, where BUCKET is reached."""
    buckets: list[list[Tensor]] = [[]]
    held = 0
    for x in xs:
        if held and held + x.nbytes > BUCKET:
            buckets.append([])
            held = 0
        buckets[-1].append(x)
        held += x.nbytes
    return buckets


def wire_for(call: Call, xs: Sequence[Tensor]) -> Wire:
    """Return the wire of a call, which takes no message of an unlike call for it."""
    row, axis, params = call
    # not counted: ranks may make a call that moves nothing unlike often
    if row.local:
        return Wire(axis.size, axis.index)
    said = said_of(row, params, xs, in_backward=backward_here() != -1)
    return wire_of(axis, xs[0].device, row.name, said)


def said_of(
    row: Row[Params], params: Params, xs: Sequence[Tensor], in_backward: bool
) -> Said:
    """Return what must be the same on all ranks, and what an error shows.

    A sum of gradients and one of values may look alike, and must not meet.
    """
    shapes, dtype = [x.shape for x in xs], xs[0].dtype
    if row.agreed is None:
        code = code_of((row.name, params, dtype, in_backward, *shapes))
    else:
        alike = tuple([row.agreed(params, shape) for shape in shapes])
        code = code_of((row.name, alike, dtype, in_backward))
    return Said(row.name, code, shapes, dtype, params)


def profiled_as(call: Call) -> str:
    """Return the name under which torch.profiler shows a call."""
    return f"pmod.{call.row.name} ({named(call.axis.label)})"
