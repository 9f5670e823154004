"""How parts are added up: in rank order, and 16-bit floats in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pmod._wire.sent import Sent

Reduction: TypeAlias = Literal["sum", "max", "min"]

# torch neither adds nor compares these. The sums of their bits, taken as signed, are
# theirs, because both wrap around.
SIGNED = {
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
}


def accumulator(dtype: torch.dtype, asked: str | None) -> torch.dtype:
    """Return the dtype that a sum of `dtype` adds up in.

    That is what was asked for, else float32 for floats of 16 bits or fewer.
    """
    if not dtype.is_floating_point:
        return computed_in(dtype)
    if asked is not None:
        return getattr(torch, asked)
    if dtype.itemsize <= 2:
        return torch.float32
    return dtype


# Elements that are added up at once, where that is done in place.
BLOCK = 1 << 17


def reduce_parts(
    parts: Tensor, how: Reduction, dtype: torch.dtype, divisor: int
) -> Tensor:
    """Combine the rows of a tensor in their order, adding up in `dtype`."""
    if how != "sum":
        return extreme(parts, how)
    first, *others = parts.unbind()
    total = first.to(dtype, copy=True)
    for part in others:
        # torch casts the others itself, without a copy; it adds no 8-bit floats.
        total += part.to(dtype) if is_eight_bits(part) else part
    return scaled(total, divisor).to(parts.dtype)


def reduce_into(
    out: Tensor,
    parts: Sequence[Tensor],
    how: Reduction,
    dtype: torch.dtype,
    divisor: int,
) -> None:
    """Combine flat parts into `out`, which may be one of them.

    The bits are those of `reduce_parts`. It goes block by block, so no part is copied
    as a whole, and none is held in a wider `dtype`.
    """
    rows = [part.split(BLOCK) for part in parts]
    for into, *block in zip(out.split(BLOCK), *rows, strict=True):
        into.copy_(reduce_parts(torch.stack(block), how, dtype, divisor))


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_FIRST = {ints: torch.iinfo(ints).min for ints in _BITS.values()}


def extreme(parts: Tensor, how: Reduction) -> Tensor:
    """Return the extremum of the rows; a NaN stays, and +0.0 is larger than -0.0."""
    largest = torch.amax if how == "max" else torch.amin
    y = largest(parts, 0)
    if not parts.is_floating_point():
        return y
    # torch takes either of two zeros, by where they lie in memory. Where the extremum
    # is zero, the bits of all rows, taken as numbers, have an extremum whose first bit
    # is the sign of the right one. A zero of that sign changes no other number.
    ints = _BITS[parts.element_size()]
    zero = (largest(parts.view(ints), 0) & _FIRST[ints]).view(parts.dtype)
    # of two zeros a sum is the larger one
    if how == "max":
        return y.add_(zero)
    return y.neg_().sub_(zero).neg_()


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: another one where torch only stores it.

    These are floats of 8 bits, and pairs of halves.
    """
    if dtype == torch.complex32:
        return torch.complex64
    if dtype.is_floating_point and dtype.itemsize == 1:
        return torch.float32
    return dtype


def addable(x: Tensor) -> Tensor:
    """Return x as what torch adds up; `as_added` goes the other way.

    Unsigned ints become signed ones of the same bits.
    """
    if x.dtype in SIGNED:
        return x.view(SIGNED[x.dtype])
    return x.to(computed_in(x.dtype))


def as_added(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a sum of what `addable` gave, in the dtype of what was added."""
    if dtype in SIGNED:
        return y.view(dtype)
    return y.to(dtype)


def is_eight_bits(x: Tensor) -> bool:
    """Return whether torch stores the floats of x, and does not compute in them."""
    return x.dtype.itemsize == 1 and x.is_floating_point()


def scaled(total: Tensor, divisor: int) -> Tensor:
    """Divide a sum in place."""
    if divisor == 1:
        return total
    return total.div_(divisor)


def real_sum(flat: Tensor, send: Callable[[Tensor, int], Sent[Tensor]]) -> Sent[Tensor]:
    """Send what torch does not add up as what adds up the same.

    Complex numbers go as pairs of reals, unsigned ints as signed. `send` gets the
    factor on its counts.
    """
    if flat.dtype in SIGNED:
        return send(flat.view(SIGNED[flat.dtype]), 1).then(lambda y: y.view(flat.dtype))
    if not flat.is_complex():
        return send(flat, 1)
    sent = send(torch.view_as_real(flat).reshape(-1), 2)
    return sent.then(lambda y: torch.view_as_complex(y.view(-1, 2)))


def bytes_of(x: Tensor) -> Tensor:
    """Return a view of a flat tensor's bytes."""
    # A tensor of one element is contiguous at any stride; its bytes are not.
    return x.as_strided(x.shape, (1,)).view(torch.uint8)
