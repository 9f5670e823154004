"""What state there is, and where: one variable holds the world, and whatever else can change has its reason here."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import logging
import re
import types
import typing
from collections.abc import Iterator, Mapping, Set
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import pmod

SOURCE = Path(pmod.__file__).parent

# Where -> why it is no part of the world. Memos of pure functions (lru_cache), and tables that nothing changes, need no
# reason.
STATE = {
    "_ranks.world.now": "the world: what else a rank knows hangs on it",
    "_mesh.ambient._token": "the key of the ambient mesh: torch.compile guards on a text of a module",
    # memos: emptying them would change no answer
    "_mesh.axis.parsed_axes": "a memo for compiled code, whose calls name their axes by keys",
    "_mesh.mesh._meshes": "a memo for compiled code, of meshes by their keys",
    "_shard.operations.plain": "a memo, by functions of torch",
    "_domain.mode.handlers": "a memo, by functions of torch",
    "_shard.traced._counted": "a memo, by graphs of the tracer",
    # what threads are doing, undone where it was done
    "_core.bind.started": "who runs a started function on this thread",
    "_core.bind.bound": "what this thread binds, where somebody asks",
    "_core.watch._telling": "whether this thread tells a watcher something, whose own calls nobody hears",
    "_site.watched": "the call that this thread binds, while somebody watches",
    # what torch is told, or was told, once a process
    "_core.bind._library": "torch's library of pmod's operators",
    "_core.inductor._told": "the operators whose lowering Inductor has",
    "_torch.uncompiled": "the compiler's stance, which the last thread that leaves a domain puts back",
    "_torch._registry": "torch's registry of operators",
    # filled when modules are imported, and not afterwards
    "_torch.SEEN": "the versions of torch that have each private name",
    "_core.collective.COLLECTIVES": "the kinds of each public collective, which its decorator tells",
    "bench.cases.CASES": "what is measured",
    "_ranks.backends._BACKENDS": "the table of backends, to which a third one may be added",
    "_core.row.ROWS": "the table of rows, where each file of collectives registers its own",
    "_core.row.TRANSPOSES": "of that table, which row is the transpose of which",
    "_domain.rules.table.RULES": "the table of rules, where each file of rules registers its own",
    "_domain.rules.table.OUTER": "of that table, which rules are for functions that are written in Python",
    # of tensors and modules of the user's
    "_domain.known.notes": "the layouts of tensors, each as long as it lives: cut_of is asked after the call",
    "_core.marks.marked": "the leaves that pmod.varying marks, each as long as it lives",
    "_train.share_parameters._numbers": "numbers the layers that it replaces, so that their hooks differ",
    # the notebook's, which is a door and no part of the library's ranks
    "notebook.magics._session": "the engines of this notebook",
    "notebook.rank._runner": "an engine's event loop, which outlives its cells",
}

UNCHANGING = (
    type(None), bool, int, float, complex, str, bytes, type, types.FunctionType, types.BuiltinFunctionType,
    types.ModuleType, types.GenericAlias, types.UnionType, re.Pattern, logging.Logger, timedelta, Path,
    torch.dtype, torch.device, torch.Size, torch._C.DispatchKey, type(torch.ops.aten.sin),
    type(torch.ops.aten.sin.default), functools.partial, typing.TypeVar, typing.ParamSpec,
    type(typing.Any), type(list[int] | None), type(typing.Callable), type(typing.Literal["a"]),
)  # fmt: skip
CHANGES = {
    "append", "extend", "insert", "remove", "pop", "clear", "add", "discard", "update", "setdefault", "popitem",
    "appendleft", "popleft", "difference_update", "intersection_update", "sort", "reverse",
}  # fmt: skip


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        if parts[-1] != "__init__":
            yield ".".join(parts), path


@functools.cache
def changed() -> set[str]:
    """Names of what a statement of pmod changes in place."""
    names: set[str] = set()
    for _, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            where: list[ast.expr] = []
            if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
                where = [node.value]
            elif isinstance(node, ast.AugAssign):
                where = [node.target]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
                where = [node.func.value]
            names |= {each.id if isinstance(each, ast.Name) else each.attr for each in where
                      if isinstance(each, ast.Name | ast.Attribute)}  # fmt: skip
    return names


def can_change(name: str, value: Any) -> bool:
    """Whether what stands at module or class level under this name is state."""
    if isinstance(value, UNCHANGING) or hasattr(value, "cache_info"):
        return False
    if isinstance(value, tuple | frozenset | types.MappingProxyType):
        return any(can_change("", part) for part in value)
    if isinstance(value, Mapping | Set | list) and type(value) in (dict, set, list):
        return name in changed() or name == ""
    if attrs.has(type(value)):
        with pytest.raises(attrs.exceptions.FrozenError):
            setattr(value, attrs.fields(type(value))[0].name, None)
        return False
    return not callable(value) or hasattr(value, "__dict__")


def assigned(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from assigned(node.body)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def found_in(module: str, path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    rebound = {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
    there = importlib.import_module(module)
    short = module.removeprefix("pmod.")
    for name in {*assigned(tree.body), *rebound}:
        if name in rebound or can_change(name, getattr(there, name, None)):
            yield f"{short}.{name}"
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            owner = getattr(there, node.name)
            for name in assigned(node.body):
                value = inspect.getattr_static(owner, name, None)
                if not name.startswith("__") and isinstance(value, dict | list | set) and can_change(name, value):
                    yield f"{short}.{node.name}.{name}"


def test_what_state_there_is() -> None:
    found = {name for module, path in modules() for name in found_in(module, path)}
    assert found == set(STATE), "state hangs on the world (_ranks/world.py), or its reason is given here"
