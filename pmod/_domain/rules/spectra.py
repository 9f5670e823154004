"""Fourier transforms, through pmod.fft."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from pmod import fft as sharded
from pmod._domain.blocks import Blocks, label_of
from pmod._domain.layout import Cut, Part
from pmod._domain.refusals import no_exact_form
from pmod._domain.rules.dims import Dims, dims_of, repeated
from pmod._domain.rules.joins import roll
from pmod._domain.rules.table import Function, rule

_ONE = ("fft", "ifft", "rfft", "irfft")
_NAMES = [f"fft_{kind}{n}" for kind in _ONE for n in ("", "2", "n")]


@rule(*_NAMES)
def transform(
    b: Blocks,
    func: Function,
    x: Tensor,
    s: int | Sequence[int] | None = None,
    dim: Any = "usual",
    norm: str | None = None,
    *,
    n: int | None = None,
) -> Tensor:
    name = func.__name__.removeprefix("fft_")
    s = s if n is None else n
    x = b.plain(x)
    layout, shape = b.layout(x), b.whole(x)
    dims = _dims(name, x.dim(), s, dim)
    given = [] if s is None else repeated(s, len(dims))
    cut = [d for d in range(x.dim()) if d in dims and layout[d] is not None]
    if not cut:
        length: Any = s
        if name not in _ONE:
            length = given or None
        return b.note(func(x, length, dims[0] if name in _ONE else dims, norm), layout)
    outs = _outs(layout, dims, cut)
    y = _called(b, name, x, s, dims, norm, cut, outs)
    lengths = _lengths(name, shape, dims, given)
    cuts: list[Cut] = list(layout)
    for d in cut:
        cuts[d] = None
    for d, e in zip(cut, outs, strict=True):
        of = layout[d]
        assert isinstance(of, Part)
        cuts[e] = of.evenly(lengths[e])
    return b.note(y, tuple(cuts))


def _dims(name: str, count: int, s: object, dim: Any) -> list[int]:
    """Return the dims of a transform, in its order."""
    if dim == "usual":
        dim = {"2": (-2, -1), "n": None}.get(name[-1], -1)
    if dim is None and s is not None:
        listed = repeated(cast(Sequence[int], s), 1)
        return list(range(count - len(listed), count))
    return dims_of(dim, count)


def _outs(layout: Sequence[Cut], dims: Sequence[int], cut: Sequence[int]) -> list[int]:
    """Return which dims are cut afterwards.

    One dim goes to the other end of the transform, in one exchange; several stay.
    """
    if len(cut) > 1 or len(dims) == 1:
        return list(cut)
    (d,) = cut
    other = dims[0] if d == dims[-1] else dims[-1]
    return [d if layout[other] is not None else other]


def _called(
    b: Blocks,
    name: str,
    x: Tensor,
    s: Any,
    dims: Sequence[int],
    norm: str | None,
    cut: Sequence[int],
    outs: Sequence[int],
) -> Tensor:
    parts: list[Part] = []
    for d in cut:
        of = b.layout(x)[d]
        assert isinstance(of, Part)
        parts.append(of)
    dim: Any = dims[0] if name in _ONE else tuple(dims)
    length: Any = s if name in _ONE or s is None else tuple(repeated(s, len(dims)))
    axes: Any = [label_of(part.axes) for part in parts]
    sizes: Any = [part.sizes for part in parts]
    first, last = list(cut), list(outs)
    f = getattr(sharded, name)
    if len(cut) == 1:
        return f(
            x,
            length,
            dim,
            norm,
            axis=axes[0],
            in_dim=first[0],
            out_dim=last[0],
            sizes=sizes[0],
        )
    if any(isinstance(axis, tuple) for axis in axes):
        right = "Cut each dim over one axis."
        raise no_exact_form(name, "a dim is cut over two axes", right)
    return f(
        x,
        length,
        dim,
        norm,
        axis=tuple(axes),
        in_dim=tuple(first),
        out_dim=tuple(last),
        sizes=tuple(sizes),
    )


def _lengths(
    name: str, shape: Sequence[int], dims: Sequence[int], given: Sequence[int]
) -> list[int]:
    """Return the lengths of the result."""
    lengths = list(shape)
    for d, n in zip(dims, given, strict=False):
        if n != -1:
            lengths[d] = operator.index(n)
    last = dims[-1]
    is_given = bool(given) and given[-1] != -1
    if name.startswith("rfft"):
        lengths[last] = lengths[last] // 2 + 1
    if name.startswith("irfft") and not is_given:
        lengths[last] = 2 * (shape[last] - 1)
    return lengths


@rule("fft_fftshift", "fft_ifftshift")
def shift(b: Blocks, func: Function, x: Tensor, dim: Dims = None) -> Tensor:
    dims = dims_of(dim, x.dim())
    up = int(func.__name__ == "fft_ifftshift")
    by = [(b.whole(x)[d] + up) // 2 for d in dims]
    return roll(b, torch.roll, x, by, dims)
