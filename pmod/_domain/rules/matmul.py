"""Products: matmul, einsum, linear. What is summed over a cut dim is summed over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_letters
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pmod._domain.blocks import Blocks
from pmod._domain.layout import Cut, Layout, Part, axes_of, with_cut, without
from pmod._domain.refusals import no_exact_form
from pmod._domain.rules.dims import dims_of
from pmod._domain.rules.pointwise import pointwise
from pmod._domain.rules.table import Function, rule


def _cuts(
    b: Blocks, ins: Sequence[str], out: str, xs: Sequence[Tensor]
) -> dict[str, Part]:
    """Return how each letter is cut; those of the result come first."""
    cuts: dict[str, Part] = {}
    used: set[str] = set()
    for c in dict.fromkeys(out + "".join(ins)):
        for letters, x in zip(ins, xs, strict=True):
            cut = b.layout(x)[letters.index(c)] if c in letters else None
            if not isinstance(cut, Part) or c in cuts or used & {*cut.axes}:
                continue
            if cut.total > 1:
                cuts[c] = cut
                used |= {*cut.axes}
    return cuts


def contract(b: Blocks, ins: Sequence[str], out: str, xs: Sequence[Tensor]) -> Tensor:
    """Return the einsum of wholes.

    A letter has one cut. Where two letters are cut over the same axis, the later one is
    gathered for this rank's use.
    """
    xs = [b.plain(x) for x in xs]
    cuts = _cuts(b, ins, out, xs)
    used = {name for cut in cuts.values() for name in cut.axes}
    operands: list[Tensor] = []
    for letters, x in zip(ins, xs, strict=True):
        if len(set(letters)) < len(letters):
            right = "Take torch.diagonal first."
            raise no_exact_form("einsum", "a letter stands twice in one operand", right)
        operands.append(_operand(b, letters, x, cuts, used))
    y = torch.einsum(f"{','.join(ins)}->{out}", *operands)
    summed: set[str] = set()
    for c, cut in cuts.items():
        if c not in out:
            summed |= {*cut.axes}
    layout: list[Cut] = [cuts.get(c) for c in out]
    return b.note(b.sum(y, b.ordered(summed)), tuple(layout))


def _operand(
    b: Blocks, letters: str, x: Tensor, cuts: dict[str, Part], used: set[str]
) -> Tensor:
    """Return an operand cut as its letters are, for a use that varies."""
    wishes: list[Cut] = [cuts.get(c) for c in letters]
    for d, n in enumerate(b.whole(x)):
        # one row is broadcast
        if n == 1:
            wishes[d] = None
    want: Layout = tuple(wishes)
    stays = axes_of(want)
    varies: set[str] = set()
    for d, have in enumerate(b.layout(x)):
        if have is None or want[d] is not None:
            continue
        axes = {*have.axes}
        if axes <= used and not axes & stays:
            # as unshard and pvary, but its gradient is scattered while it is summed
            layout = with_cut(b.layout(x), d, None)
            x = b.note(b.gather(x, d), layout)
            varies |= axes
    x = b.relayout(x, want)
    return b.varied(x, b.ordered(used - b.axes_of(x) - varies))


def spelled_out(equation: str, xs: Sequence[Tensor]) -> tuple[list[str], str]:
    """Return the letters of each operand and of the result, without dots."""
    equation = equation.replace(" ", "")
    left, arrow, out = equation.partition("->")
    ins = left.split(",")
    free = [c for c in ascii_letters if c not in equation]
    most = 0
    for letters, x in zip(ins, xs, strict=True):
        if "..." in letters:
            most = max(most, x.dim() - len(letters) + 3)
    for i, x in enumerate(xs):
        count = x.dim() - len(ins[i]) + 3
        ins[i] = ins[i].replace("...", "".join(free[most - count : most]))
    out = out.replace("...", "".join(free[:most]))
    if not arrow:
        listed = "".join(ins)
        once = sorted(c for c in set(left) if c.isalpha() and listed.count(c) == 1)
        out = "".join(free[:most]) + "".join(once)
    return ins, out


@rule("einsum", outer=True)
def einsum(b: Blocks, func: Function, equation: Any, *operands: Any) -> Tensor:
    if not isinstance(equation, str):
        raise no_exact_form("einsum", "with lists of dims", "Pass an equation.")
    xs: list[Tensor] = list(operands)
    if len(operands) == 1 and not isinstance(operands[0], Tensor):
        xs = list(operands[0])
    ins, out = spelled_out(equation, xs)
    return contract(b, ins, out, xs)


@rule("matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "mv", "dot", "inner", "vdot")
def matmul(b: Blocks, func: Function, x: Tensor, y: Tensor) -> Tensor:
    if func.__name__ == "__rmatmul__":
        x, y = y, x
    if func.__name__ in ("inner", "vdot"):
        raise no_exact_form(func.__name__, "it has no rule", "Use einsum.")
    batch = max(x.dim(), y.dim(), 2) - 2
    lead = ascii_letters[:batch]
    rows, columns = "X" * (x.dim() > 1), "Y" * (y.dim() > 1)
    left = lead[batch - max(x.dim() - 2, 0) :] + rows + "Z"
    right = lead[batch - max(y.dim() - 2, 0) :] + "Z" + columns
    out = lead + rows + columns
    x, left = _without_one_rows(b, x, left, y, right)
    y, right = _without_one_rows(b, y, right, x, left)
    return contract(b, [left, right], out, [x, y])


def _without_one_rows(
    b: Blocks, x: Tensor, letters: str, other: Tensor, others: str
) -> tuple[Tensor, str]:
    """Drop dims of one row that are broadcast."""
    drop: list[int] = []
    for d, c in enumerate(letters):
        is_batch = c not in "XYZ" and c in others
        if is_batch and b.whole(x)[d] == 1 and b.whole(other)[others.index(c)] != 1:
            drop.append(d)
            x = b.unshard(x, d)
    if drop:
        x = b.note(x.squeeze(drop), without(b.layout(x), drop))
    return x, "".join(c for d, c in enumerate(letters) if d not in drop)


@rule("linear")
def linear(
    b: Blocks, func: Function, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    layout = b.layout(x)
    if layout[-1] is None and not b.is_cut(weight):
        axes = b.axes_of(x)
        offset = None if bias is None else b.vary(bias, axes)
        y = F.linear(x, b.vary(weight, axes), offset)
        return b.note(y, (*layout[:-1], None))
    lead = ascii_letters[: x.dim() - 1]
    y = contract(b, [lead + "X", "YX"], lead + "Y", [x, weight])
    return y if bias is None else pointwise(b, torch.add, y, bias)


@rule("addmm", "baddbmm", "addmv", "addbmm")
def addmm(
    b: Blocks,
    func: Function,
    c: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Tensor:
    if func.__name__ == "addbmm":
        raise no_exact_form("addbmm", "it has no rule", "Use baddbmm and a sum.")
    return b.follow(lambda: c * beta + (x @ y) * alpha)


@rule("outer", "ger")
def outer(b: Blocks, func: Function, x: Tensor, y: Tensor) -> Tensor:
    return contract(b, ["a", "b"], "ab", [x, y])


@rule("tensordot")
def tensordot(
    b: Blocks, func: Function, x: Tensor, y: Tensor, *dims: Any, **named: Any
) -> Tensor:
    # torch's own function has parsed them
    ours, theirs = dims_of(dims[0], x.dim()), dims_of(dims[1], y.dim())
    left = list(ascii_letters[: x.dim()])
    right = list(ascii_letters[26 : 26 + y.dim()])
    for one, other in zip(ours, theirs, strict=True):
        right[other] = left[one]
    kept = [c for d, c in enumerate(left) if d not in ours]
    kept += [c for d, c in enumerate(right) if d not in theirs]
    return contract(b, ["".join(left), "".join(right)], "".join(kept), [x, y])
