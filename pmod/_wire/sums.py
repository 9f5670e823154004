"""How parts are added up: in rank order, and 16-bit floats in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pmod._wire.sent import Sent

Reduction: TypeAlias = Literal["sum", "max", "min"]

# torch neither adds nor compares these; the sums of their bits, taken as signed, are
# theirs, as both wrap around
SIGNED = {
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
}


def accumulator(dtype: torch.dtype, asked: str | None) -> torch.dtype:
    """The dtype that a sum of `dtype` adds up in: what was asked for, else float32 for
    floats of 16 bits or fewer.
    """
    if not dtype.is_floating_point:
        return computed_in(dtype)
    if asked is not None:
        return getattr(torch, asked)
    return torch.float32 if dtype.itemsize <= 2 else dtype


def reduce_parts(
    parts: Sequence[Tensor], how: Reduction, dtype: torch.dtype, divisor: int
) -> Tensor:
    """Combine equal-shaped parts in rank order, adding up in `dtype`."""
    out_dtype = parts[0].dtype
    if how != "sum":
        total = (
            parts[0].clone() if len(parts) == 1 else _extreme(parts[0], parts[1], how)
        )
        for part in parts[2:]:
            total = _extreme(total, part, how)
        return total
    total = parts[0].to(dtype, copy=True)
    for part in parts[1:]:
        total += part.to(dtype) if is_eight_bits(part) else part
    return scaled(total, divisor).to(out_dtype)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _extreme(a: Tensor, b: Tensor, how: Reduction) -> Tensor:
    """The elementwise extremum, which lets a NaN through; +0.0 is larger than -0.0."""
    y = torch.maximum(a, b) if how == "max" else torch.minimum(a, b)
    if not a.is_floating_point():
        return y
    # torch takes either of two zeros, by where they lie in memory; what is equal has
    # equal bits, but for their sign
    ints = _BITS[a.element_size()]
    both = torch.bitwise_and if how == "max" else torch.bitwise_or
    return torch.where(a == b, both(a.view(ints), b.view(ints)).view(a.dtype), y)


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: another one where torch only stores it, as floats of 8
    bits and pairs of halves.
    """
    if dtype == torch.complex32:
        return torch.complex64
    return torch.float32 if dtype.is_floating_point and dtype.itemsize == 1 else dtype


def addable(x: Tensor) -> Tensor:
    """x as what torch adds up, and `as_added` the other way: unsigned ints as signed
    ones of the same bits.
    """
    return x.view(SIGNED[x.dtype]) if x.dtype in SIGNED else x.to(computed_in(x.dtype))


def as_added(y: Tensor, dtype: torch.dtype) -> Tensor:
    """A sum of what `addable` gave, in the dtype of what was added."""
    return y.view(dtype) if dtype in SIGNED else y.to(dtype)


def is_eight_bits(x: Tensor) -> bool:
    """Whether x has a floating dtype that torch stores and does not compute in."""
    return x.dtype.itemsize == 1 and x.is_floating_point()


def scaled(total: Tensor, divisor: int) -> Tensor:
    return total if divisor == 1 else total.div_(divisor)


def real_sum(flat: Tensor, send: Callable[[Tensor, int], Sent]) -> Sent:
    """Send what torch does not add up as what adds up the same: complex as pairs of
    reals, unsigned ints as signed.

    `send` gets the factor on its counts.
    """
    if flat.dtype in SIGNED:
        return send(flat.view(SIGNED[flat.dtype]), 1).then(lambda y: y.view(flat.dtype))
    if not flat.is_complex():
        return send(flat, 1)
    sent = send(torch.view_as_real(flat).reshape(-1), 2)
    return sent.then(lambda y: torch.view_as_complex(y.view(-1, 2)))


def bytes_of(x: Tensor) -> Tensor:
    """The bytes of a flat tensor. A tensor of one element is contiguous at any stride,
    its bytes are not.
    """
    return x.as_strided(x.shape, (1,)).view(torch.uint8)
