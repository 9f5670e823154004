"""The tensors in a tree, which is made of mappings, lists, tuples and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any, TypeGuard, cast

from torch import Tensor

from pmod._errors import endless

_MAPPINGS = (dict, MutableMapping)


def is_mapping(tree: object) -> TypeGuard[MutableMapping[Any, Any]]:
    """Whether a tree branches by keys.

    A dict does, and so does what behaves as one and can be filled anew, such as a
    TensorDict.
    """
    return isinstance(tree, _MAPPINGS)


def refilled(tree: MutableMapping[Any, Any], filled: dict[Any, Any]) -> object:
    """Return a mapping like this one, in which the values are these.

    It keeps what the mapping knows besides its items.
    """
    if type(tree) is dict:
        return {key: filled[key] for key in tree}
    out, like = _copied(tree), cast(Any, tree)
    # a TensorDict says which first dims all its tensors share; a collective that changes
    # a length changes that, and in between it must agree with any tensor
    is_tensor_dict = hasattr(like, "batch_size")
    if is_tensor_dict:
        out.batch_size = ()
    for key, value in filled.items():
        out[key] = value
    if is_tensor_dict:
        shapes = [_shape_of(value) for value in filled.values() if value is not None]
        out.batch_size = _shared(shapes)[: len(like.batch_size)]
    return out


def _copied(tree: Any) -> Any:
    # the copy() of a subclass of dict is a dict; that of a TensorDict can be changed
    # where the TensorDict is locked
    if isinstance(tree, dict) or not hasattr(tree, "copy"):
        return copy.copy(cast(object, tree))
    return tree.copy()


def _shape_of(value: object) -> Sequence[int]:
    return getattr(value, "batch_size" if is_mapping(value) else "shape", ())


def _shared(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the first dims that all of them have."""
    shared: list[int] = []
    for lengths in zip(*shapes, strict=False):
        if len(set(lengths)) > 1:
            break
        shared.append(lengths[0])
    return tuple(shared)


def tensors_in(tree: object) -> list[Tensor]:
    """Return the tensors in dicts, lists, tuples and slices."""
    try:
        return list(_tensors_in(tree))
    except RecursionError:
        raise endless() from None


def _tensors_in(tree: object) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
        return
    for branch in _branches(tree):
        yield from _tensors_in(branch)


def _branches(tree: object) -> Iterable[object]:
    if is_mapping(tree):
        return tree.values()
    if isinstance(tree, list | tuple):
        return cast(Sequence[object], tree)
    # x[i:j] may have tensors for i and j
    if isinstance(tree, slice):
        return tree.start, tree.stop, tree.step
    return ()


def map_tensors(f: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply f to the tensors of what a function takes or returns.

    Whatever else is in it stays as it is.
    """
    try:
        return _mapped(f, tree)
    except RecursionError:
        raise endless() from None


def _mapped(f: Callable[[Tensor], Tensor], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return f(tree)
    # the compiler of torch 2.11 cannot ask whether None is a dataclass
    if tree is None:
        return None
    if is_mapping(tree):
        return refilled(tree, {key: _mapped(f, value) for key, value in tree.items()})
    if isinstance(tree, list | tuple):
        values = [_mapped(f, value) for value in cast(Sequence[object], tree)]
        # a namedtuple takes its items one by one
        if hasattr(tree, "_fields"):
            return type(tree)(*values)
        return type(tree)(values)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        filled = copy.copy(tree)
        for field in dataclasses.fields(tree):
            value = _mapped(f, getattr(tree, field.name))
            # also where it is frozen: the copy is nobody else's yet
            object.__setattr__(filled, field.name, value)
        return filled
    return tree
