"""`mark_varying`: leaves that start equal and may differ."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pmod._core.arguments import wrong
from pmod._errors import ArgumentError
from pmod._mesh.ambient import resolve
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import AxisLike

T = TypeVar("T")

# leaf -> the ranks along which it is marked as V
marked: Any = WeakIdKeyDictionary()


def mark_varying(leaf: T, axis: AxisLike) -> T:
    """Mark a leaf of autograd as varying along an axis, for `debug`.

    `debug` takes equal values for one value. Shards of a parameter that start equal on
    all ranks (zeros, or the same seed) are V and look like I. Returns the leaf.
    Raises: ArgumentError if the leaf is not a tensor.

    >>> bias = pmod.mark_varying(torch.nn.Parameter(torch.zeros(4)), mesh["model"])
    """
    bound = resolve(axis, "mark_varying")
    if not isinstance(leaf, Tensor):
        given = f"leaf is a {type(leaf).__name__}"
        raise wrong(ArgumentError, "mark_varying", bound, given, "Pass a tensor.")
    marked.setdefault(leaf, set()).add(bound.group_key)
    return leaf


def is_marked_varying(leaf: Tensor, axis: Axis) -> bool:
    """Whether `mark_varying` marked it."""
    return axis.group_key in marked.get(leaf, ())
