"""How `pmod.fft` works: its arguments, the plan of stages and exchanges, and one stage.

A plan is a list of moves. Each move is one exchange, and every dim to transform is whole
at some time. Between two moves is a stage, which transforms the dims that are whole by
then, in one call of torch.fft.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pmod._collectives.exchange import check_eager, sizes_of_leaves
from pmod._collectives.slices import ALL_TO_ALL, SHARD, UNSHARD, Exchange, Slices
from pmod._core.arguments import (
    LONGEST,
    as_int,
    as_list,
    check_tensor,
    dim_from_end,
    shares,
    wrong,
)
from pmod._core.bind import bind
from pmod._errors import ArgumentError, PmodError, ShapeError, quoted
from pmod._mesh.ambient import resolve, resolve_each
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import AxisLike, Mesh

Ints = int | Sequence[int]
Some = int | Sequence[int | None]
Lengths = Sequence[int] | Sequence[Sequence[int] | None]
"""The lengths of the shards; with several axes, those along each."""
Sizes = tuple[int, ...]


class _Kind(NamedTuple):
    """Which transform, where, and its name for errors."""

    function: str
    inverse: bool
    real: bool
    norm: str | None
    axes: tuple[Axis, ...]
    called: str
    """The function of pmod.fft that was called."""

    def wrong(self, given: str, right: str) -> PmodError:
        return wrong(ShapeError, self.name, self.axes[0], given, right)

    @property
    def lengths(self) -> str:
        """The argument that holds the lengths of the signal."""
        return "s" if self.function.endswith(("2", "n")) else "n"

    @property
    def name(self) -> str:
        return f"fft.{self.called}"


def kind_of(
    function: str, norm: str | None, axes: tuple[Axis, ...], called: str = ""
) -> _Kind:
    """Return the kind of torch.fft's function."""
    is_inverse, is_real = function.startswith("i"), "rfft" in function
    return _Kind(function, is_inverse, is_real, norm, axes, called or function)


class _Dim(NamedTuple):
    """A transformed dim of the whole tensor."""

    at: int
    n: int
    """The length of the signal."""
    modes: int | None
    """How many modes are kept, or held by an inverse; None for torch.fft's number."""
    half: bool
    """Whether this is the one dim of a real transform whose spectrum is half."""

    @property
    def whole(self) -> int:
        """The number of modes when none is left out."""
        return modes_of(self.n, self.half)


def modes_of(n: int, half: bool) -> int:
    """Return the number of modes of n points."""
    return n // 2 + 1 if half else n


def axes_given(axis: AxisLike, many: bool, name: str) -> tuple[Axis, ...]:
    """Return the axes: one, or, with a dim for each of them, each by itself.

    As everywhere, one axis may be a tuple of names, which is flattened.
    """
    if not many:
        return (resolve(axis, name),)
    if isinstance(axis, Mesh):
        # a mesh without axes is one of one rank
        return resolve_each(axis, name) or (resolve(axis, name),)
    # `resolve` refuses an empty tuple, and says why
    if not isinstance(axis, tuple) or not axis:
        return (resolve(axis, name),)
    return tuple(resolve(one, name) for one in axis)


def _list(given: object, what: str, kind: _Kind) -> list[int | None]:
    """Return an int, or several, as a list; None stays."""
    listed = as_list(given)
    if listed is None:
        listed = [given]
    parsed: list[int | None] = []
    for one in listed:
        number = as_int(one)
        if one is not None and number is None:
            raise kind.wrong(
                f"{what} holds {quoted(one)}, a {type(one).__name__}", "Pass ints."
            )
        parsed.append(number)
    return parsed


def _check_input(x: Tensor, kind: _Kind) -> Tensor:
    """Return x as torch.fft would take it: floating or complex."""
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
        other = {"r": "", "i": "i"}[kind.called[0]] + kind.called.lstrip("irh")
        right = f"Pass x.real, or use {other}."
        raise wrong(ArgumentError, kind.name, kind.axes[0], "x is complex", right)
    return x


def _parse_dims(
    x: Tensor, s: object, dim: object, kind: _Kind
) -> tuple[list[int], list[int | None]]:
    """Return the dims, counted from the end, and the length asked for along each.

    None stands for x's own length.
    """
    asked = None if s is None else _list(s, kind.lengths, kind)
    if dim is None:
        # as torch.fft: the last dims, as many as there are lengths
        count = x.dim() if asked is None else len(asked)
        dim = range(-count, 0)
    listed = _listed(dim)
    ats = [dim_from_end(one, x, kind.name, kind.axes[0]) for one in listed]
    if not ats or len(set(ats)) < len(ats):
        raise kind.wrong(f"dim is {tuple(listed)}", "Pass one dim or more, each once.")
    if kind.lengths == "n" and len(ats) > 1:
        raise kind.wrong(
            f"dim is {tuple(listed)}", f"Pass one dim, or use {kind.called}n."
        )
    if asked is None:
        return ats, [None] * len(ats)
    if len(asked) != len(ats):
        given = f"{kind.lengths} is {quoted(s)} and dim has {len(ats)} dims"
        raise kind.wrong(given, "Pass a length for each dim.")
    if kind.lengths == "s":
        # torch.fft's own rule, for several dims only
        for i, n in enumerate(asked):
            if n == -1:
                asked[i] = None
    return ats, asked


def _listed(given: object) -> list[object]:
    """Return one or several as a list."""
    if isinstance(given, Sequence):
        # the compiler does not know `cast` of a range
        several: Any = given
        return list(several)
    return [given]


def _parse_cuts(
    x: Tensor, ats: list[int], in_dim: object, out_dim: object, kind: _Kind
) -> tuple[list[int], list[int]]:
    """Return the dims that the axes cut on the way in, and on the way out."""
    count = len(kind.axes)
    # what the caller named is checked first, both of it
    ins = None if in_dim is None else cut_dims(x, in_dim, "in_dim", kind)
    outs = None if out_dim is None else cut_dims(x, out_dim, "out_dim", kind)
    first, last = ats[:count], ats[-count:]
    if kind.inverse:
        # an inverse goes the way of its forward transform back, so that the pair of
        # them exchanges twice and no more
        first, last = last, first
    if ins is None:
        ins = first
    if outs is None:
        outs = last if set(ins) & set(ats) else ins
    if len(ins) < count or len(outs) < count:
        given = f"there are {count} axes and dim has {len(ats)} dims"
        raise kind.wrong(given, "Pass in_dim and out_dim, a dim per axis.")
    return ins, outs


def cut_dims(x: Tensor, given: object, name: str, kind: _Kind) -> list[int]:
    listed = _listed(given)
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


def held_sizes(
    x: Tensor, ins: list[int], sizes: Sequence[Any] | None, many: bool, kind: _Kind
) -> list[Sizes]:
    """Return the lengths of the shards along the dim that each axis cuts.

    They are those given, or what the ranks say.
    """
    given: Sequence[Any] | None = [sizes]
    if sizes is None:
        check_eager(kind.name, kind.axes[0])
        given = [None] * len(ins)
    elif many:
        given = as_list(sizes)
    if given is None or len(given) != len(ins):
        raise kind.wrong(
            f"sizes is {quoted(sizes)}",
            f"Pass {len(ins)} tuples of sizes, one per axis.",
        )
    held: list[Sizes] = []
    for axis, at, one in zip(kind.axes, ins, given, strict=True):
        # x is one leaf
        ((_, lengths),) = sizes_of_leaves(x, at, one, kind.name, axis)
        held.append(lengths)
    return held


def _measure(
    lengths: dict[int, int | None],
    ats: list[int],
    asked: list[int | None],
    modes: object,
    kind: _Kind,
) -> list[_Dim]:
    """Return the transformed dims with all their lengths, which fit together.

    Dims whose length is not known yet are left out.
    """
    kept = [None] * len(ats) if modes is None else _list(modes, "modes", kind)
    if len(kept) != len(ats):
        raise kind.wrong(
            f"modes is {quoted(modes)} and dim has {len(ats)} dims",
            "Pass one for each dim, or None.",
        )
    dims: list[_Dim] = []
    for at, n, few in zip(ats, asked, kept, strict=True):
        # torch.fft halves the spectrum of the last dim of a real transform
        half, length = kind.real and at == ats[-1], lengths[at]
        if few is not None and kind.inverse:
            _check_held_modes(at, n, few, length, modes, kind)
        if n is None:
            if length is None:
                continue
            # of a half spectrum, what torch.fft takes for the length of the signal
            n = 2 * (length - 1) if half and kind.inverse else length
        dim = _Dim(at, n, few, half)
        _check_length(dim, modes, kind)
        dims.append(dim)
    return dims


def _check_held_modes(
    at: int,
    n: int | None,
    few: int,
    length: int | None,
    modes: object,
    kind: _Kind,
) -> None:
    """Check that an inverse that is given a part of a spectrum knows the whole."""
    if n is None:
        given = f"modes is {quoted(modes)} without the length of the signal"
        raise kind.wrong(given, f"Pass {kind.lengths} as well.")
    if length is not None and few != length:
        given = f"modes is {quoted(modes)} and x has {length} along dim {at}"
        raise kind.wrong(given, "Pass the number that x has.")


def _check_length(dim: _Dim, modes: object, kind: _Kind) -> None:
    given = f"the signal has {dim.n} points along dim {dim.at}"
    if dim.n > LONGEST:
        raise kind.wrong(given, "No machine addresses so much memory.")
    if dim.n < 1:
        raise kind.wrong(given, f"Pass {kind.lengths} of 1 or more.")
    if dim.modes is not None and not 1 <= dim.modes <= dim.whole:
        raise kind.wrong(
            f"modes is {quoted(modes)} and dim {dim.at} has {dim.whole}",
            f"Pass from 1 to {dim.whole}.",
        )


class _Move(NamedTuple):
    """One exchange, after which an axis cuts another dim than before.

    None for no dim, when all ranks of the axis have the whole. Not both are None.
    """

    number: int
    before: int | None
    after: int | None


def _moves(x: Tensor, ats: list[int], ins: list[int], outs: list[int]) -> list[_Move]:
    """Return exchanges after which each dim of `ats` was whole, and `outs` are cut."""
    held: list[int | None] = list(ins)
    moves: list[_Move] = []
    waiting = [
        number
        for number in range(len(ins))
        if ins[number] != outs[number] or ins[number] in ats
    ]
    while waiting:
        ready = [number for number in waiting if outs[number] not in held]
        if ready:
            number = ready[0]
            after = outs[number]
            waiting.remove(number)
        else:
            # aside, there and back: its own dim is to be transformed, or another axis
            # waits for it
            number = waiting[0]
            after = _aside(x, held)
        moves.append(_Move(number, held[number], after))
        held[number] = after
    return moves


def _aside(x: Tensor, held: list[int | None]) -> int | None:
    """Return the longest dim that no axis cuts; None if none is longer than 1."""
    longest, length = None, 1
    for at in range(-x.dim(), 0):
        if at not in held and x.shape[at] > length:
            longest, length = at, int(x.shape[at])
    return longest


def _stages(
    dims: list[_Dim], holds: list[set[int | None]], kind: _Kind, *, in_order: bool
) -> list[list[_Dim]] | None:
    """Return which dims are transformed under each hold: as soon as they are whole.

    A real transform has its half spectrum first, and an inverse one last. The result is
    None if that order leaves a dim behind.
    """
    left = dims
    stages: list[list[_Dim]] = []
    for held in holds:
        ready = [dim for dim in left if dim.at not in held]
        is_real_left = bool(left) and left[-1].half
        if in_order and is_real_left:
            ready = _in_order(ready, left, kind)
        left = [dim for dim in left if dim not in ready]
        stages.append(ready)
    return None if left else stages


def _in_order(ready: list[_Dim], left: list[_Dim], kind: _Kind) -> list[_Dim]:
    """Return those of the ready dims whose turn it is; the half one is last in `left`."""
    if kind.inverse and len(ready) < len(left):
        return [dim for dim in ready if not dim.half]
    if not kind.inverse and left[-1] not in ready:
        return []
    return ready


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
    """Return n entries of x from `start` on, zeros where x ends.

    The result is no view: under a compiled jvp torch refuses one of an input whose tangent has
    another layout.
    """
    return F.pad(x, [0, 0] * (-at - 1) + [-start, n + start - int(x.shape[at])])


def _torch(name: str, x: Tensor, dims: list[_Dim], norm: str | None) -> Tensor:
    """Call torch.fft's function over these dims."""
    if not x.numel():
        return _torch_of_nothing(name, x, dims)
    if len(dims) == 1:
        return getattr(torch.fft, name)(x, dims[0].n, dims[0].at, norm)
    lengths = [dim.n for dim in dims]
    ats = [dim.at for dim in dims]
    return getattr(torch.fft, f"{name}n")(x, lengths, ats, norm)


def _torch_of_nothing(name: str, x: Tensor, dims: list[_Dim]) -> Tensor:
    """Return a result without elements, in the shape and dtype of torch.fft's."""
    # MKL refuses an empty tensor; the padding keeps the derivative
    for dim in dims:
        x = _padded(x, dim.at, dim.whole if name == "rfft" else dim.n)
    if x.is_complex() == (name != "irfft"):
        return x
    return x.real if x.is_complex() else torch.complex(x, torch.zeros_like(x))


def lowest(x: Tensor, at: int, few: int, half: bool) -> Tensor:
    """Return the lowest modes of a spectrum, in the order of fftfreq(few)."""
    whole = int(x.shape[at])
    if few == whole:
        return x
    if half:
        return x.narrow(at, 0, few)
    negative = few // 2
    positive = x.narrow(at, 0, few - negative)
    return torch.cat([positive, x.narrow(at, whole - negative, negative)], at)


def _spread(x: Tensor, at: int, n: int) -> Tensor:
    """Return the spectrum of n modes whose lowest are x, and whose others are zero."""
    few = int(x.shape[at])
    if few == n:
        return x
    negative = few // 2
    positive = _padded(x, at, few - negative)
    wide = _padded(positive, at, n - negative)
    return torch.cat([wide, _padded(x, at, negative, few - negative)], at)


def _one_by_one(dims: list[_Dim]) -> list[list[_Dim]]:
    """Return the dims to transform in each call: all, or each, if modes are dropped."""
    if all(dim.modes is None for dim in dims):
        return [dims]
    # later transforms then see only the modes that are kept
    return [[dim] for dim in dims]


def _forward(x: Tensor, dims: list[_Dim], kind: _Kind) -> Tensor:
    for some in reversed(_one_by_one(dims)):
        # x is complex already if a real dim could not be transformed first
        is_half = some[-1].half and not x.is_complex()
        x = _torch("rfft" if is_half else "fft", x, some, kind.norm)
        for dim in some:
            kept = dim.whole if dim.modes is None else dim.modes
            x = lowest(x, dim.at, kept, dim.half)
    return x


def _inverse(x: Tensor, dims: list[_Dim], kind: _Kind, in_order: bool) -> Tensor:
    for some in _one_by_one(dims):
        for dim in some:
            if dim.half and not in_order:
                x = _one_sided(x, dim.at, dim.n)
            elif dim.modes is not None and not dim.half:
                x = _spread(x, dim.at, dim.n)
        is_half = some[-1].half and in_order
        x = _torch("irfft" if is_half else "ifft", x, some, kind.norm)
    return x


def _one_sided(x: Tensor, at: int, n: int) -> Tensor:
    """Return a half spectrum such that the real part of its ifft is its irfft."""
    count = min(int(x.shape[at]), modes_of(n, half=True))
    # a mode counts for two, itself and its conjugate, but for those that are their own
    weight = torch.full((count,), 2.0, dtype=x.dtype.to_real(), device=x.device)
    weight[0] = 1.0
    if 2 * (count - 1) == n:
        weight[-1] = 1.0
    return _padded(x, at, count) * weight.view(-1, *[1] * (-at - 1))


class Cut(NamedTuple):
    """How the tensor is spread, and which modes: what follows torch.fft's arguments."""

    axis: AxisLike
    in_dim: Ints | None
    out_dim: Ints | None
    sizes: Lengths | None
    modes: Some | None


def transform(
    function: str,
    x: Tensor,
    s: object,
    dim: object,
    norm: str | None,
    cut: Cut,
    called: str = "",
) -> Tensor:
    """Return this rank's shard of torch.fft's function of the whole tensor.

    called: the function of pmod.fft, if it is another. What is wrong raises before
    anything is sent.
    """
    many = isinstance(cut.in_dim, Sequence) or isinstance(cut.out_dim, Sequence)
    axes = axes_given(cut.axis, many, f"fft.{called or function}")
    kind = kind_of(function, norm, axes, called)
    check_tensor(x, kind.name, axes[0])
    x = _check_input(x, kind)
    ats, asked = _parse_dims(x, s, dim, kind)
    ins, outs = _parse_cuts(x, ats, cut.in_dim, cut.out_dim, kind)
    lengths: dict[int, int | None] = dict.fromkeys(ats)
    for at in ats:
        if at not in ins:
            lengths[at] = int(x.shape[at])
    # what can be checked without the whole length is, before the ranks ask for it
    dims = _measure(lengths, ats, asked, cut.modes, kind)
    sizes: list[Sizes] = [()] * len(ins)
    is_cut = any(at in ats for at in ins)
    if is_cut or ins != outs or cut.sizes is not None:
        sizes = held_sizes(x, ins, cut.sizes, many, kind)
        for at, held in zip(ins, sizes, strict=True):
            if at in ats:
                lengths[at] = sum(held)
        dims = _measure(lengths, ats, asked, cut.modes, kind)
    # an axis of one rank exchanges nothing
    spread = [number for number, axis in enumerate(axes) if axis.size > 1]
    if not spread and cut.modes is None and x.numel():
        return _torch_alone(function, x, dims, ats, kind, asks=s is not None)
    starts = [ins[number] for number in spread]
    moves = _moves(x, ats, starts, [outs[number] for number in spread])
    return _run(x, dims, starts, moves, [sizes[number] for number in spread], kind)


# torch's own way: what it divides by forward, it does not divide by back
_TURNED = {None: "forward", "backward": "forward", "forward": "backward"}


def hermitian(
    function: str, x: Tensor, s: object, dim: object, norm: str | None, cut: Cut
) -> Tensor:
    """Return `transform` of torch.fft's hfft, ihfft, and those of more dims."""
    # another norm is refused there, under its own name
    turned = norm
    if norm is None or isinstance(norm, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        turned = _TURNED.get(norm, norm)
    if function.startswith("i"):
        other = function.replace("ih", "r")
        return transform(other, x, s, dim, turned, cut, function).conj()
    check_tensor(x, f"fft.{function}", _first_axis(cut, f"fft.{function}"))
    other = function.replace("h", "ir")
    return transform(other, x.conj(), s, dim, turned, cut, function)


def _first_axis(cut: Cut, name: str) -> Axis:
    many = isinstance(cut.in_dim, Sequence) or isinstance(cut.out_dim, Sequence)
    return axes_given(cut.axis, many, name)[0]


def _torch_alone(
    function: str, x: Tensor, dims: list[_Dim], ats: list[int], kind: _Kind, asks: bool
) -> Tensor:
    """Call torch.fft's own function, as a rank that holds the whole does."""
    transformed = getattr(torch.fft, function)
    lengths: list[int] | None = None
    if asks:
        lengths = [dim.n for dim in dims]
    if kind.lengths == "s":
        return transformed(x, lengths, ats, kind.norm)
    length = None if lengths is None else lengths[0]
    return transformed(x, length, ats[0], kind.norm)


def _run(
    x: Tensor,
    dims: list[_Dim],
    held: list[int],
    moves: list[_Move],
    sizes: list[Sizes],
    kind: _Kind,
) -> Tensor:
    """Run the stages, with an exchange between one and the next."""
    axes = [axis for axis in kind.axes if axis.size > 1]
    now: list[int | None] = list(held)
    holds = [set(now)]
    for move in moves:
        now[move.number] = move.after
        holds.append(set(now))
    stages = _stages(dims, holds, kind, in_order=True)
    in_order = stages is not None
    if stages is None:
        # the real dim is treated as a complex one: all of its spectrum travels
        stages = _stages(dims, holds, kind, in_order=False)
    assert stages is not None, "every dim to transform is whole at some time"
    for move, ready in zip([None, *moves], stages, strict=True):
        if move is not None:
            number = move.number
            x, sizes[number] = _exchange(x, axes[number], move, sizes[number])
        if ready and kind.inverse:
            x = _inverse(x, ready, kind, in_order)
        elif ready:
            x = _forward(x, ready, kind)
    if kind.inverse and not in_order:
        return x.real
    return x
