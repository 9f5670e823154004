"""Which leaves of autograd a function refers to by its names.

These are in closures, globals, defaults, attributes and containers.
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

import torch
from torch import Tensor

# So many objects are looked at: who refers to more is not followed further.
MOST = 100_000

_WITHOUT_PARTS = (type(None), str, bytes, int, float, complex)

_FOREIGN = ("torch", "pmod", "numpy", "builtins", "typing", "collections")


def captured_leaves(f: object) -> list[Tensor]:
    """Return the leaves with a derivative that f refers to.

    They come in the order in which its code names them. That depends on the program
    alone, so it is the same on all ranks.
    """
    found: dict[int, Tensor] = {}
    # what was looked at is kept alive, so that no id comes again
    seen: dict[int, object] = {}
    left: list[object] = [f]
    while left and len(seen) < MOST:
        thing = left.pop()
        if id(thing) in seen or isinstance(thing, _WITHOUT_PARTS):
            continue
        seen[id(thing)] = thing
        if not isinstance(thing, Tensor):
            left += reversed(list(_parts(thing)))
        elif thing.requires_grad and _is_memory_here(thing):
            found[id(thing)] = thing
    return list(found.values())


def captured_modules(f: object) -> list[torch.nn.Module]:
    """Return the modules that f is, or refers to, without those inside others."""
    found: list[torch.nn.Module] = []
    seen: dict[int, object] = {}
    left: list[object] = [f]
    while left and len(seen) < MOST:
        thing = left.pop()
        if id(thing) in seen or isinstance(thing, (*_WITHOUT_PARTS, Tensor)):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, torch.nn.Module):
            found.append(thing)
        else:
            left += reversed(list(_parts(thing)))
    return found


def _is_memory_here(x: Tensor) -> bool:
    """Return whether it is a leaf that is plain memory of this process."""
    if not x.is_leaf or torch.nn.parameter.is_lazy(x):
        return False
    is_dtensor = hasattr(x, "to_local")
    is_strided = x.layout is torch.strided
    return is_strided and not is_dtensor and x.device.type != "meta"


def _parts(thing: object) -> Iterable[object]:
    """Return what it holds, without asking for attributes that it would make up."""
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
    if isinstance(thing, FunctionType):
        return _of_function(thing)
    return _attributes(thing)


def _is_foreign(thing: object) -> bool:
    """Return whether its class, or the function itself, is a library's.

    Such a thing holds none of the user's tensors.
    """
    of = thing if isinstance(thing, FunctionType) else type(thing)
    home = (of.__module__ or "").split(".")[0]
    return home in _FOREIGN and "__wrapped__" not in getattr(thing, "__dict__", ())


def _attributes(thing: object) -> list[object]:
    found: list[object] = [*getattr(thing, "__dict__", {}).values()]
    for cls in type(thing).__mro__:
        for name in _texts(vars(cls).get("__slots__", ())):
            slot = vars(cls).get(name)
            if isinstance(slot, MemberDescriptorType):
                found.append(_filled(thing, slot))
    return found


def _filled(thing: object, slot: MemberDescriptorType) -> object:
    try:
        return slot.__get__(thing)
    except AttributeError:
        # nothing was assigned to it
        return None


def _texts(names: str | Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _of_function(f: FunctionType) -> list[object]:
    parts: list[object] = [*vars(f).values(), f.__defaults__, f.__kwdefaults__]
    for cell in f.__closure__ or ():
        try:
            parts.append(cell.cell_contents)
        except ValueError:
            # nothing was assigned to it yet
            continue
    # pytest writes names into an assert that no program could
    names = [name for name in _names(f.__code__) if name.isidentifier()]
    for name in names:
        thing = f.__globals__.get(name)
        if isinstance(thing, ModuleType) and not _is_library(thing):
            # what the code asks of the module, but not all that the module holds
            parts += [vars(thing)[inner] for inner in names if inner in vars(thing)]
        parts.append(thing)
    return parts


def _is_library(module: ModuleType) -> bool:
    return module.__name__.split(".")[0] in _FOREIGN


def _names(code: CodeType) -> list[str]:
    """Return the global names and attributes in a function's code.

    Those of functions that are written in it come after its own.
    """
    names = list(code.co_names)
    for part in code.co_consts:
        if isinstance(part, CodeType):
            names += _names(part)
    return list(dict.fromkeys(names))
