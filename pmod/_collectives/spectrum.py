"""How `pmod.fft` goes about it: arguments, the plan of stages and exchanges, and one
stage.

A plan is a list of moves, each one exchange, by which every dim to transform is whole
at some time, and between two moves a stage: the dims that are whole by then,
transformed by one call of torch.fft.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pmod._collectives.exchange import check_eager, sizes_of_leaves
from pmod._collectives.slices import ALL_TO_ALL, SHARD, UNSHARD, Exchange, Slices
from pmod._core.arguments import LONGEST, check_tensor, dim_from_end, shares, wrong
from pmod._core.bind import bind
from pmod._errors import ArgumentError, PmodError, ShapeError, quoted
from pmod._mesh.ambient import resolve, resolve_each
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import AxisLike, Mesh
from pmod._numbers import as_int, as_list

Ints = int | Sequence[int]
Some = int | Sequence[int | None]
Sizes = tuple[int, ...]


class _Kind(NamedTuple):
    """Which transform, where, and its name for errors."""

    function: str
    inverse: bool
    real: bool
    norm: str | None
    axes: tuple[Axis, ...]

    def wrong(self, given: str, right: str) -> PmodError:
        return wrong(ShapeError, self.name, self.axes[0], given, right)

    @property
    def lengths(self) -> str:
        """The argument that holds the lengths of the signal."""
        return "s" if self.function.endswith(("2", "n")) else "n"

    @property
    def name(self) -> str:
        return f"fft.{self.function}"


class _Dim(NamedTuple):
    """A transformed dim of the whole tensor."""

    at: int
    n: int  # the length of the signal
    modes: (
        int | None
    )  # how many of its modes are kept (held, of an inverse); None: torch.fft's own number
    half: bool  # the one dim of a real transform whose spectrum is half


def _axes(axis: AxisLike, many: bool, name: str) -> tuple[Axis, ...]:
    """One axis, names in a tuple flattened as everywhere; with a dim for each of them,
    each by itself.
    """
    if not many or (isinstance(axis, tuple) and not axis):
        return (resolve(axis, name),)
    if isinstance(axis, Mesh):
        return resolve_each(axis, name)
    return tuple(
        resolve(one, name) for one in (axis if isinstance(axis, tuple) else (axis,))
    )


def _list(given: Any, what: str, kind: _Kind) -> list[int | None]:
    """An int, or several; None stays."""
    listed = as_list(given)
    if listed is None:
        listed = [given]
    parsed = [None if one is None else as_int(one) for one in listed]
    for one, number in zip(listed, parsed, strict=True):
        if one is not None and number is None:
            raise kind.wrong(
                f"{what} holds {quoted(one)}, a {type(one).__name__}", "Pass ints."
            )
    return parsed


def _check_input(x: Tensor, kind: _Kind) -> Tensor:
    """x as torch.fft would take it: floating or complex."""
    norm: object = kind.norm
    is_known = isinstance(norm, str) and norm in ("backward", "ortho", "forward")
    if norm is not None and not is_known:
        given = f"norm is {quoted(kind.norm)}"
        raise wrong(
            ArgumentError,
            kind.name,
            kind.axes[0],
            given,
            "Pass 'backward', 'ortho' or 'forward'.",
        )
    if not (x.is_floating_point() or x.is_complex()):
        return x.to(torch.get_default_dtype())
    if x.dtype not in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        raise wrong(
            ArgumentError, kind.name, kind.axes[0], f"x is {x.dtype}", "Pass x.float()."
        )
    if kind.real and not kind.inverse and x.is_complex():
        right = f"Pass x.real, or use {kind.function.replace('rfft', 'fft')}."
        raise wrong(ArgumentError, kind.name, kind.axes[0], "x is complex", right)
    return x


def _parse_dims(
    x: Tensor, s: Any, dim: Any, kind: _Kind
) -> tuple[list[int], list[int | None]]:
    """The dims counted from the end, and the length asked for along each, None where
    x's own.
    """
    asked = None if s is None else _list(s, kind.lengths, kind)
    if dim is None:
        dim = range(-(x.dim() if asked is None else len(asked)), 0)
    listed = list(dim) if isinstance(dim, Sequence) else [dim]
    ats = [dim_from_end(one, x, kind.name, kind.axes[0]) for one in listed]
    if not ats or len(set(ats)) < len(ats):
        raise kind.wrong(f"dim is {tuple(listed)}", "Pass one dim or more, each once.")
    if kind.lengths == "n" and len(ats) > 1:
        raise kind.wrong(
            f"dim is {tuple(listed)}", f"Pass one dim, or use {kind.function}n."
        )
    if asked is None:
        asked = [None] * len(ats)
    if len(asked) != len(ats):
        given = f"{kind.lengths} is {quoted(s)} and dim has {len(ats)} dims"
        raise kind.wrong(given, "Pass a length for each dim.")
    return ats, [None if n == -1 and kind.lengths == "s" else n for n in asked]


def _parse_cuts(
    x: Tensor, ats: list[int], in_dim: Any, out_dim: Any, kind: _Kind
) -> tuple[list[int], list[int]]:
    """The dims that the axes cut on the way in, and on the way out."""
    count = len(kind.axes)
    ins = None if in_dim is None else _cut(x, in_dim, "in_dim", kind)
    outs = None if out_dim is None else _cut(x, out_dim, "out_dim", kind)
    first, last = ats[:count], ats[-count:]
    if ins is None:
        ins = last if kind.inverse else first
    if outs is None:
        outs = (first if kind.inverse else last) if set(ins) & set(ats) else ins
    if len(ins) < count or len(outs) < count:
        given = f"there are {count} axes and dim has {len(ats)} dims"
        raise kind.wrong(given, "Pass in_dim and out_dim, a dim per axis.")
    return ins, outs


def _cut(x: Tensor, given: Any, name: str, kind: _Kind) -> list[int]:
    listed = list(given) if isinstance(given, Sequence) else [given]
    ats = [
        dim_from_end(one, x, kind.name, axis, name=name)
        for one, axis in zip(listed, kind.axes, strict=False)
    ]
    if len(listed) != len(kind.axes) or len(set(ats)) < len(ats):
        raise kind.wrong(
            f"{name} is {quoted(given)}",
            f"Pass {len(kind.axes)} of them, each once: a dim per axis.",
        )
    return ats


def _held(
    x: Tensor, ins: list[int], sizes: Any, many: bool, kind: _Kind
) -> list[Sizes]:
    """How long the shards are along the dim that each axis cuts: as given, or as the
    ranks say.
    """
    if sizes is None:
        check_eager(kind.name, kind.axes[0])
    given = [None] * len(ins) if sizes is None else as_list(sizes) if many else [sizes]
    if given is None or len(given) != len(ins):
        raise kind.wrong(
            f"sizes is {quoted(sizes)}",
            f"Pass {len(ins)} tuples of sizes, one per axis.",
        )
    cuts = zip(kind.axes, ins, given, strict=True)
    return [
        next(sizes_of_leaves(x, at, one, kind.name, axis))[1] for axis, at, one in cuts
    ]


def _measure(
    lengths: dict[int, int | None],
    ats: list[int],
    asked: list[int | None],
    modes: Any,
    kind: _Kind,
) -> list[_Dim]:
    """The transformed dims with all their lengths, which fit together; those that are
    not known yet are left out.
    """
    kept = [None] * len(ats) if modes is None else _list(modes, "modes", kind)
    if len(kept) != len(ats):
        raise kind.wrong(
            f"modes is {quoted(modes)} and dim has {len(ats)} dims",
            "Pass one for each dim, or None.",
        )
    dims: list[_Dim] = []
    for at, n, few in zip(ats, asked, kept, strict=True):
        half, length = kind.real and at == ats[-1], lengths[at]
        if few is not None and kind.inverse and n is None:
            given = f"modes is {quoted(modes)} without the length of the signal"
            raise kind.wrong(given, f"Pass {kind.lengths} as well.")
        if few is not None and kind.inverse and length is not None and few != length:
            given = f"modes is {quoted(modes)} and x has {length} along dim {at}"
            raise kind.wrong(given, "Pass the number that x has.")
        if n is None and length is not None:
            n = 2 * (length - 1) if half and kind.inverse else length
        if n is None:
            continue
        if n > LONGEST:
            raise kind.wrong(
                f"the signal has {n} points along dim {at}",
                "No machine addresses so much memory.",
            )
        if n < 1:
            raise kind.wrong(
                f"the signal has {n} points along dim {at}",
                f"Pass {kind.lengths} of 1 or more.",
            )
        whole = n // 2 + 1 if half else n
        if few is not None and not 1 <= few <= whole:
            raise kind.wrong(
                f"modes is {quoted(modes)} and dim {at} has {whole}",
                f"Pass from 1 to {whole}.",
            )
        dims.append(_Dim(at, n, few, half))
    return dims


class _Move(NamedTuple):
    """One exchange, after which an axis cuts another dim than before.

    None for no dim, when all ranks of the axis have the whole. Not both are None.
    """

    number: int
    before: int | None
    after: int | None


def _moves(x: Tensor, ats: list[int], ins: list[int], outs: list[int]) -> list[_Move]:
    """The exchanges that bring every dim of `ats` together at some time, and the cuts
    where they are wanted.
    """
    held: list[int | None] = list(ins)
    moves: list[_Move] = []
    waiting = [
        number
        for number in range(len(ins))
        if ins[number] != outs[number] or ins[number] in ats
    ]
    while waiting:
        ready = [number for number in waiting if outs[number] not in held]
        number = ready[0] if ready else waiting[0]
        if ready:
            after = outs[number]
            waiting.remove(number)
        else:  # aside, there and back: its own dim is to be transformed, or another axis waits for it
            after, length = None, 1
            for at in range(-x.dim(), 0):
                if at not in held and x.shape[at] > length:
                    after, length = at, int(x.shape[at])
        moves.append(_Move(number, held[number], after))
        held[number] = after
    return moves


def _stages(
    dims: list[_Dim], holds: list[set[int | None]], kind: _Kind, *, in_order: bool
) -> list[list[_Dim]] | None:
    """Which dims are transformed under each hold: as soon as they are whole.

    A real transform has its half spectrum first, an inverse one last; None where that
    order leaves a dim behind.
    """
    left = dims
    stages: list[list[_Dim]] = []
    for held in holds:
        ready = [dim for dim in left if dim.at not in held]
        if in_order and left and left[-1].half:
            if kind.inverse and len(ready) < len(left):
                ready = [dim for dim in ready if not dim.half]
            elif not kind.inverse and left[-1] not in ready:
                ready = []
        left = [dim for dim in left if dim not in ready]
        stages.append(ready)
    return None if left else stages


def _exchange(x: Tensor, axis: Axis, move: _Move, sizes: Sizes) -> tuple[Tensor, Sizes]:
    """Return x after a move, and the lengths along the dim that is cut now."""
    _, before, after = move
    if after is None:
        assert before is not None
        call, cut = UNSHARD.along(axis, Slices(before, sizes)), ()
    elif before is None:
        cut = shares(int(x.shape[after]), axis)
        call = SHARD.along(axis, Slices(after, cut))
    else:
        cut = shares(int(x.shape[after]), axis)
        call = ALL_TO_ALL.along(axis, Exchange(after, before, cut, sizes))
    return bind(call, [x])[0], cut


def _padded(x: Tensor, at: int, n: int, start: int = 0) -> Tensor:
    """n entries of x from `start` on, zeros where x ends.

    No view: under a compiled jvp torch refuses one of an input whose tangent has
    another layout.
    """
    return F.pad(x, [0, 0] * (-at - 1) + [-start, n + start - int(x.shape[at])])


def _torch(name: str, x: Tensor, dims: list[_Dim], norm: str | None) -> Tensor:
    """torch.fft's function over these dims; of nothing too, which MKL refuses."""
    if x.numel() and len(dims) == 1:
        return getattr(torch.fft, name)(x, dims[0].n, dims[0].at, norm)
    if x.numel():
        return getattr(torch.fft, f"{name}n")(
            x, [dim.n for dim in dims], [dim.at for dim in dims], norm
        )
    for dim in dims:
        n = dim.n // 2 + 1 if dim.half and name == "rfft" else dim.n
        x = _padded(x, dim.at, n)
    if name == "irfft":
        return x.real if x.is_complex() else x
    return x if x.is_complex() else torch.complex(x, torch.zeros_like(x))


def lowest(x: Tensor, at: int, few: int, half: bool) -> Tensor:
    """The lowest modes of a spectrum, in the order of fftfreq(few)."""
    whole = int(x.shape[at])
    if few == whole:
        return x
    if half:
        return x.narrow(at, 0, few)
    return torch.cat(
        [x.narrow(at, 0, few - few // 2), x.narrow(at, whole - few // 2, few // 2)], at
    )


def _spread(x: Tensor, at: int, n: int) -> Tensor:
    """The spectrum of n modes whose lowest are x, the others zero."""
    few = int(x.shape[at])
    if few == n:
        return x
    positive = _padded(x, at, few - few // 2)
    return torch.cat(
        [_padded(positive, at, n - few // 2), _padded(x, at, few // 2, few - few // 2)],
        at,
    )


def _one_by_one(dims: list[_Dim]) -> list[list[_Dim]]:
    """Together; where modes are cut, a dim at a time, so that others have to do with
    the few that are kept.
    """
    return [dims] if all(dim.modes is None for dim in dims) else [[dim] for dim in dims]


def _forward(x: Tensor, dims: list[_Dim], kind: _Kind) -> Tensor:
    for some in reversed(_one_by_one(dims)):
        x = _torch(
            "rfft" if some[-1].half and not x.is_complex() else "fft",
            x,
            some,
            kind.norm,
        )
        for dim in some:
            whole = dim.n // 2 + 1 if dim.half else dim.n
            x = lowest(x, dim.at, whole if dim.modes is None else dim.modes, dim.half)
    return x


def _inverse(x: Tensor, dims: list[_Dim], kind: _Kind, in_order: bool) -> Tensor:
    for some in _one_by_one(dims):
        for dim in some:
            if dim.modes is not None and not dim.half:
                x = _spread(x, dim.at, dim.n)
            if dim.half and not in_order:
                x = _one_sided(x, dim.at, dim.n)
        x = _torch(
            "irfft" if some[-1].half and in_order else "ifft", x, some, kind.norm
        )
    return x


def _one_sided(x: Tensor, at: int, n: int) -> Tensor:
    """A half spectrum such that the real part of its ifft is its irfft: interior modes
    count for two.
    """
    count = min(int(x.shape[at]), n // 2 + 1)
    weight = torch.full((count,), 2.0, dtype=x.dtype.to_real(), device=x.device)
    weight[0] = 1.0
    if 2 * (count - 1) == n:
        weight[-1] = 1.0
    return _padded(x, at, count) * weight.view(-1, *[1] * (-at - 1))


class Cut(NamedTuple):
    """How the tensor is spread, and which modes: what follows torch.fft's own
    arguments.
    """

    axis: AxisLike
    in_dim: Ints | None
    out_dim: Ints | None
    sizes: Sequence[Any] | None
    modes: Some | None


def transform(
    function: str, x: Tensor, s: Any, dim: Any, norm: str | None, cut: Cut
) -> Tensor:
    """torch.fft's function of the whole tensor whose shard is x. Raises: before
    anything is sent.
    """
    many = isinstance(cut.in_dim, Sequence) or isinstance(cut.out_dim, Sequence)
    axes = _axes(cut.axis, many, f"fft.{function}")
    kind = _Kind(function, function.startswith("i"), "rfft" in function, norm, axes)
    check_tensor(x, kind.name, axes[0])
    x = _check_input(x, kind)
    ats, asked = _parse_dims(x, s, dim, kind)
    ins, outs = _parse_cuts(x, ats, cut.in_dim, cut.out_dim, kind)
    moving = ins != outs or any(at in ats for at in ins)
    lengths = {at: None if at in ins else int(x.shape[at]) for at in ats}
    dims = _measure(lengths, ats, asked, cut.modes, kind)
    sizes: list[Sizes] = [()] * len(ins)
    if moving or cut.sizes is not None:
        sizes = _held(x, ins, cut.sizes, many, kind)
        lengths |= {
            at: sum(held) for at, held in zip(ins, sizes, strict=True) if at in ats
        }
        dims = _measure(lengths, ats, asked, cut.modes, kind)
    spread = [number for number, axis in enumerate(axes) if axis.size > 1]
    if not spread and cut.modes is None and x.numel():
        told = [dim.n for dim in dims] if s is not None else None
        if kind.lengths == "n":
            return getattr(torch.fft, function)(
                x, told[0] if told else None, ats[0], norm
            )
        return getattr(torch.fft, function)(x, told, ats, norm)
    moves = _moves(
        x, ats, [ins[number] for number in spread], [outs[number] for number in spread]
    )
    return _run(
        x,
        dims,
        [ins[number] for number in spread],
        moves,
        [sizes[number] for number in spread],
        kind,
    )


def _run(
    x: Tensor,
    dims: list[_Dim],
    held: list[int],
    moves: list[_Move],
    sizes: list[Sizes],
    kind: _Kind,
) -> Tensor:
    """The stages, with an exchange between one and the next."""
    axes = [axis for axis in kind.axes if axis.size > 1]
    now: list[int | None] = list(held)
    holds = [set(now)]
    for move in moves:
        now[move.number] = move.after
        holds.append(set(now))
    stages = _stages(dims, holds, kind, in_order=True)
    in_order = stages is not None
    if (
        stages is None
    ):  # the real dim is treated as a complex one: all of its spectrum travels
        stages = _stages(dims, holds, kind, in_order=False)
    assert stages is not None, "every dim to transform is whole at some time"
    for move, ready in zip([None, *moves], stages, strict=True):
        if move is not None:
            x, sizes[move.number] = _exchange(
                x, axes[move.number], move, sizes[move.number]
            )
        if ready:
            x = (
                _inverse(x, ready, kind, in_order)
                if kind.inverse
                else _forward(x, ready, kind)
            )
    return x if in_order or not kind.inverse else x.real
