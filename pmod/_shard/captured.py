"""Which leaves of autograd a function refers to by its names: closures, globals,
defaults, attributes, containers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from types import (
    BuiltinMethodType,
    CodeType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import torch
from torch import Tensor

MOST = 100_000  # objects that are looked at: who refers to more is not followed further

_FOREIGN = ("torch", "pmod", "numpy", "builtins", "typing", "collections")


def captured_leaves(f: Any) -> list[Tensor]:
    """The leaves with a derivative that f refers to, in the order in which its code
    names them.

    The order depends on the program alone, so that it is the same on all ranks.
    """
    found: dict[int, Tensor] = {}
    seen: dict[int, Any] = {}  # what was looked at is kept, so that no id comes again
    left: list[Any] = [f]
    while left and len(seen) < MOST:
        thing = left.pop()
        if (
            id(thing) in seen
            or thing is None
            or isinstance(thing, str | bytes | int | float | complex)
        ):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            if thing.is_leaf and thing.requires_grad and _is_plain(thing):
                found[id(thing)] = thing
        else:
            left += reversed(list(_parts(thing)))
    return list(found.values())


def _is_plain(x: Tensor) -> bool:
    """Whether it is memory of this process: neither a DTensor nor sparse, nor without a
    shape yet.
    """
    lazy = torch.nn.parameter.is_lazy(x)
    return (
        not lazy
        and not hasattr(x, "to_local")
        and x.layout is torch.strided
        and x.device.type != "meta"
    )


def _parts(thing: Any) -> Iterable[Any]:
    """What it holds, without asking it for attributes that it would make up."""
    if isinstance(thing, torch.nn.Module):
        return [*thing.parameters(), *_attributes(thing)]
    if isinstance(thing, Mapping):
        return list(thing.values())
    if isinstance(thing, list | tuple):
        return thing
    if isinstance(thing, partial):
        return [thing.func, thing.args, thing.keywords]
    if isinstance(thing, MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, BuiltinMethodType):
        return [thing.__self__]
    if isinstance(thing, type | ModuleType) or _is_foreign(thing):
        return ()
    return (
        _of_function(thing) if isinstance(thing, FunctionType) else _attributes(thing)
    )


def _is_foreign(thing: Any) -> bool:
    """Whether its class or the function itself is a library's, which holds none of the
    user's tensors.
    """
    of = thing if isinstance(thing, FunctionType) else type(thing)
    home = (of.__module__ or "").split(".")[0]
    return home in _FOREIGN and "__wrapped__" not in getattr(thing, "__dict__", ())


def _attributes(thing: Any) -> list[Any]:
    slots = [
        vars(cls).get(name)
        for cls in type(thing).__mro__
        for name in _texts(vars(cls).get("__slots__", ()))
    ]
    filled = [
        _filled(thing, slot) for slot in slots if isinstance(slot, MemberDescriptorType)
    ]
    return [*getattr(thing, "__dict__", {}).values(), *filled]


def _filled(thing: Any, slot: MemberDescriptorType) -> Any:
    try:
        return slot.__get__(thing)
    except AttributeError:  # not assigned
        return None


def _texts(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _of_function(f: FunctionType) -> list[Any]:
    parts: list[Any] = [*vars(f).values(), f.__defaults__, f.__kwdefaults__]
    for cell in f.__closure__ or ():
        try:
            parts.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    names = [
        name for name in _names(f.__code__) if name.isidentifier()
    ]  # pytest writes others into an assert
    for name in names:
        thing = f.__globals__.get(name)
        if (
            isinstance(thing, ModuleType)
            and thing.__name__.split(".")[0] not in _FOREIGN
        ):
            parts += [vars(thing)[inner] for inner in names if inner in vars(thing)]
        parts.append(thing)
    return parts


def _names(code: CodeType) -> list[str]:
    """The global names and attributes in a function's code, and in the functions that
    are written in it.
    """
    inner = [
        name
        for part in code.co_consts
        if isinstance(part, CodeType)
        for name in _names(part)
    ]
    return list(dict.fromkeys([*code.co_names, *inner]))
