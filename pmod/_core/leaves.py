"""What a tree of tensors is made of: mappings, lists, tuples, dataclasses; and the
tensors in it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, cast

from torch import Tensor

from pmod._errors import endless

_MAPPINGS: Any = (dict, MutableMapping)


def is_mapping(tree: Any) -> bool:
    """Whether a tree branches by keys: a dict, or what behaves as one and can be filled
    anew, such as a TensorDict.
    """
    return isinstance(tree, _MAPPINGS)


def refilled(tree: Any, filled: dict[Any, Any]) -> Any:
    """A mapping like this one, with what it knows besides its items, in which the
    values are these.
    """
    if type(tree) is dict:
        return {key: filled[key] for key in tree}
    like: Any = tree
    # the copy() of a subclass of dict is a dict; that of a TensorDict can be changed
    # where the TensorDict is locked
    plain = isinstance(tree, dict) or not hasattr(tree, "copy")
    out: Any = copy.copy(like) if plain else like.copy()
    if not hasattr(like, "batch_size"):
        for key, value in filled.items():
            out[key] = value
        return out
    # a TensorDict says which first dims all its tensors share; they are others where a
    # collective changes a length
    out.batch_size = ()
    for key, value in filled.items():
        out[key] = value
    out.batch_size = _shared(list(filled.values()), len(like.batch_size))
    return out


def _shared(values: Sequence[Any], most: int) -> tuple[int, ...]:
    """The first dims that all of them have, at most so many."""
    known = [value for value in values if value is not None]
    shapes = [
        tuple(getattr(value, "batch_size" if is_mapping(value) else "shape", ()))
        for value in known
    ]
    shared: list[int] = []
    for lengths in zip(*[shape[:most] for shape in shapes], strict=False):
        if len(set(lengths)) > 1:
            break
        shared.append(lengths[0])
    return tuple(shared)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in dicts, lists, tuples and slices."""
    try:
        return list(_tensors_in(tree))
    except RecursionError:
        raise endless() from None


def _tensors_in(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, slice):
        yield from _tensors_in((tree.start, tree.stop, tree.step))
    elif is_mapping(tree):
        for branch in tree.values():
            yield from _tensors_in(branch)
    elif isinstance(tree, list | tuple):
        for branch in cast(Sequence[Any], tree):
            yield from _tensors_in(branch)


def map_tensors(f: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """f on the tensors of what a function takes or returns, whatever else is in it."""
    try:
        return _mapped(f, tree)
    except RecursionError:
        raise endless() from None


def _mapped(f: Callable[[Tensor], Tensor], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return f(tree)
    if tree is None:
        return None
    if is_mapping(tree):
        return refilled(tree, {key: _mapped(f, value) for key, value in tree.items()})
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_mapped(f, value) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(f, value) for value in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        filled = copy.copy(tree)
        for field in dataclasses.fields(tree):
            object.__setattr__(
                filled, field.name, _mapped(f, getattr(tree, field.name))
            )
        return filled
    return tree
