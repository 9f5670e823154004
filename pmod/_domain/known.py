"""Which layout each tensor has, by its identity, while it lives.

Layouts outlive the call that noted them: a model may keep a tensor until its next
call, and `cut_of` is asked afterwards.
"""

from __future__ import annotations

from typing import TypeAlias
from weakref import ref

import torch
from torch import Tensor

from pmod._domain.layout import Layout
from pmod._torch import are_transforms_active, is_batched, is_wrapped, unwrap

WHOLE: Layout = ()
"""The layout that is noted of one value: no dim of it is cut."""


class Note(ref[Tensor]):
    """A tensor that is known: its layout, and whether it had a derivative then."""

    __slots__ = ("differentiates", "key", "layout")

    key: int
    layout: Layout
    differentiates: bool


Notes: TypeAlias = dict[int, Note]

notes: Notes = {}


def forget(of: Note) -> None:
    """Take a dead tensor out; its id may have come again."""
    if notes.get(of.key) is of:
        del notes[of.key]


def note(x: Tensor, layout: Layout) -> None:
    """Note the layout of a tensor: `WHOLE`, or one with a cut."""
    # what leaves a transform is the tensor within
    if are_transforms_active() and is_wrapped(x) and not (layout and is_batched(x)):
        note(unwrap(x), layout)
    of = Note(x, forget)
    of.key = id(x)
    of.layout = layout
    # a view that is made without derivatives may get one later
    of.differentiates = x.requires_grad and torch.is_grad_enabled()
    notes[of.key] = of


def noted(x: Tensor) -> Note | None:
    """Return what is known of a tensor."""
    of = notes.get(id(x))
    return of if of is not None and of() is x else None
