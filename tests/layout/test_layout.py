"""The house: modules import downward, one file sends, and every row and collective is declared, documented, tested."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import pmod
from pmod import _torch
from pmod._core.collective import COLLECTIVES
from pmod._core.row import ROWS, TRANSPOSES, Row
from tests.lib.table import CASES, Here

SOURCE = Path(pmod.__file__).parent
TESTS = Path(__file__).parents[1]

# The import law: a floor imports what stands above it in this list, and its own files.
FLOORS = """
    _version _numbers _site
    _errors
    _torch _console
    _ranks
    _mesh
    _wire
    _core
    _collectives
    fft graph nn sht _run _train
    _debug _shard
    _draw _domain
    testing
    __init__
    notebook demo
    bench doctor collectives
    __main__
"""
LEVEL = {name: level for level, names in enumerate(FLOORS.strip().splitlines()) for name in names.split()}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def place(path: Path) -> str:
    """The entry of FLOORS that a file belongs to."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text()))


def imported(found: Iterable[ast.AST]) -> set[tuple[str, str]]:
    """The modules of pmod that these nodes import from, and the names: '' where it is the module."""
    names: set[tuple[str, str]] = set()
    for node in found:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {(node.module or "", alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {(alias.name, "") for alias in node.names}
    return {(module, name) for module, name in names if module.split(".")[0] == "pmod"}


def floor_of(module: str, name: str) -> str:
    """The entry of FLOORS of what is imported from a module; that may itself be a module."""
    part = [*module.split("."), name][1]
    return part if part in LEVEL else "__init__"


def test_every_file_has_its_place() -> None:
    assert {place(path) for path in modules()} == set(LEVEL)


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_imports_go_downward(path: Path) -> None:
    here = place(path)
    for module, name in imported(nodes(path)):
        other = floor_of(module, name)
        assert LEVEL[other] < LEVEL[here] or other == here, f"{here} imports {other}"
        private = name.startswith("_") and not name.startswith("__") and name not in LEVEL
        assert other == here or not private, f"{here} takes {name} from {other}"


def test_no_circle_within_a_floor() -> None:
    """The files can be read in an order in which each uses, when it is imported, only those before it."""
    needs: dict[str, set[str]] = {}
    for path in modules():
        names = imported(ast.parse(path.read_text()).body)
        module = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)
        needs[module] = {found for module, name in names for found in (module, f"{module}.{name}")}
    left = set(needs)
    while free := {module for module in left if not needs[module] & left}:
        left -= free
    assert not left


def test_no_test_file_imports_another() -> None:
    """What several files of tests use is in lib/."""
    for path in TESTS.rglob("*.py"):
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tests":
                assert node.module in ("tests.lib", *(f"tests.lib.{shared.stem}" for shared in TESTS.glob("lib/*.py")))


def test_init_only_exports() -> None:
    body = ast.parse((SOURCE / "__init__.py").read_text()).body
    assert isinstance(body[0], ast.Expr)
    assert all(isinstance(node, ast.ImportFrom) and all(a.asname == a.name for a in node.names) for node in body[1:])


# --- what moves data ----------------------------------------------------------------------------------------------

SENDING = {
    "allreduce", "alltoall_base", "allgather", "_allgather_base", "_reduce_scatter_base", "broadcast", "send", "recv",
    "barrier", "all_reduce", "all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "isend", "irecv",
    "all_gather_object", "broadcast_object_list",
}  # fmt: skip
BY_NAME = {"all_gather_flat", "reduce_scatter_flat"}  # of pmod._torch


def sends(func: ast.expr) -> bool:
    if isinstance(func, ast.Name):
        return func.id in BY_NAME
    if not isinstance(func, ast.Attribute) or func.attr not in SENDING:
        return False
    return re.search(r"\b(group|dist|distributed|c10d|pg)\b", ast.unparse(func.value)) is not None


def test_one_file_sends() -> None:
    """What moves data, of a process group or of torch.distributed, is in _wire/; bench measures itself against it."""
    found = {
        place(path)
        for path in modules()
        for node in nodes(path)
        if isinstance(node, ast.Call) and sends(node.func)
    }
    assert "_wire" in found and found <= {"_wire", "bench"}


def test_one_autograd_function() -> None:
    functions = [
        f"{place(path)}.{node.name}"
        for path in modules()
        for node in nodes(path)
        if isinstance(node, ast.ClassDef)
        and any(re.search(r"autograd\.Function|\bOneLevel\b", ast.unparse(base)) for base in node.bases)
    ]
    assert functions == ["_core._Linear"]


# --- what is private of torch -------------------------------------------------------------------------------------

# underscored names that are neither pmod's nor torch's: of Python, of a C library and of IPython
FOREIGN = {"_getframe", "_exit", "_replace", "_fields", "_set_running_loop", "_config", "_inheriting", "_repr_png_",
          "_render_traceback_"}  # fmt: skip
TORCHS = {part for name in _torch.SEEN for part in re.split("[.:]", name)} | {"_dynamo_marked_constant"}
LOOKED_UP = {"getattr", "hasattr", "setattr", "delattr", "attrgetter", "methodcaller", "import_module", "__import__"}


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[^_]\w*", name) is not None


def assigned(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield from target.elts if isinstance(target, ast.Tuple) else [target]


def members(tree: ast.AST) -> set[str]:
    """The attributes that the classes of a file give themselves: methods, fields, what is assigned to self or set."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found |= {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
            fields = [target for part in node.body for target in assigned(part) if isinstance(target, ast.Name)]
            found |= {target.id for target in fields}
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "set_once":
            found |= {part.value for part in node.args if isinstance(part, ast.Constant)}
    of_self = [target for target in assigned(tree) if isinstance(target, ast.Attribute)]
    return found | {target.attr for target in of_self if ast.unparse(target.value) == "self"}


def globals_of(tree: ast.Module) -> set[str]:
    """The functions, classes and variables of a module."""
    made = {part.name for part in tree.body if isinstance(part, ast.FunctionDef | ast.ClassDef)}
    return made | {target.id for part in tree.body for target in assigned(part) if isinstance(target, ast.Name)}


def docstrings(tree: ast.AST) -> set[ast.expr]:
    said = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    return {value for value in said if isinstance(value, ast.Constant)}


def private_of_torch(tree: ast.Module, ours: set[str]) -> Iterator[str]:
    """What a file names that is private and not pmod's: whatever the name of the thing that it is asked of.

    ours: the members and globals of all files. Where torch has a name of these too, it must be a member in this file.
    """
    allowed = FOREIGN | (ours - TORCHS) | members(tree)
    silent = docstrings(tree)
    # the end of a name is none
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    silent |= {end for call in calls if ast.unparse(call.func).endswith(".endswith") for end in call.args}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            for whole in [f"{module}.{alias.name}".strip(".") for alias in node.names]:
                if whole.split(".")[0] == "torch" and any(map(is_private, whole.split("."))):
                    yield whole
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in allowed:
            yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in silent:
            if re.search(r"\btorch[\w.:]*[.:]_[^_\W]", node.value):
                yield node.value
            elif is_private(node.value) and node.value not in allowed:
                yield repr(node.value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in LOOKED_UP:
            parts = [part.value for name in node.args for part in ast.walk(name) if isinstance(part, ast.Constant)]
            begin = [part for part in parts if isinstance(part, str) and re.match("_(?!_)", part)]
            yield from [part for part in begin if part not in allowed]


@cache
def names_of_all_files() -> set[str]:
    found = set(LEVEL)
    for path in modules():
        tree = ast.parse(path.read_text())
        found |= members(tree) | globals_of(tree)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_one_file_names_what_is_private_of_torch(path: Path) -> None:
    found = list(private_of_torch(ast.parse(path.read_text()), names_of_all_files()))
    assert bool(found) == (place(path) == "_torch"), found


@pytest.mark.parametrize("code", [
    "import torch._dynamo",
    "import torch._dynamo as compiler",
    "from torch import _lazy_clone",
    "from torch._functorch import pyfunctorch",
    "from torch.testing._internal.distributed.fake_pg import FakeStore",
    "import torch.distributed.distributed_c10d as c10d\nprivate: Any = c10d\nprivate._world.pg_map",
    "getattr(torch, '_lazy_clone')",
    "getattr(torch, '_lazy_' + 'clone')",
    "getattr(torch, f'_lazy_{rest}')",
    "vars(torch)['_lazy_clone']",
    "sys.modules['torch._dynamo']",
    "importlib.import_module('torch._inductor.ir')",
    "pkgutil.resolve_name('torch:_lazy_clone')",
    "operator.attrgetter('_version')(x)",
    "def _version(x): return x._version",
    "def _base(x): return x._base",
    "class A:\n    def f(self, x): return x._is_view()",
    "torch.ops.aten._unsafe_view.default(x, shape)",
    "f._dynamo_marked_constant = True",
    "x._never_heard_of",
])  # fmt: skip
def test_a_private_name_is_seen(code: str) -> None:
    assert list(private_of_torch(ast.parse(code), names_of_all_files()))


# --- rows and collectives -----------------------------------------------------------------------------------------


def collectives() -> dict[str, Callable[..., Any]]:
    """The public functions that take an axis."""
    return {
        name: f for name, f in vars(pmod).items() if inspect.isfunction(f) and "axis" in inspect.signature(f).parameters
    }


# they take an axis, and move no tensor along it, or move it as collectives that have a case do
OTHERS = {"axis_index", "axis_size", "barrier", "exchange_plan", "replicate", "share_parameters", "data_parallel",
          "assert_invariant", "mark_varying", "fold_in", "rng", "is_first", "halo_exchange", "halo_reduce",
          "draw_collective"}  # fmt: skip


def test_every_collective_has_a_case() -> None:
    assert set(collectives()) - OTHERS == set(CASES)
    assert set(COLLECTIVES) == set(CASES) | {"halo_exchange", "halo_reduce"}


def calls_of(name: str) -> list[Any]:
    """What a collective binds when it is called, over some draws."""
    calls: list[Any] = []
    begin = pmod._core.send.begin

    def noted(call: Any, *args: Any) -> Any:
        calls.append(call)
        return begin(call, *args)

    def forward(seed: int) -> None:
        h = Here(CASES[name], "x", seed)
        h.call(h.mine(h.xs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pmod._core.send, "begin", noted)
        for seed in range(4):
            pmod.simulate(forward, seed, x=2)
    return calls


def test_every_row_is_in_a_case() -> None:
    bound = {name: {call.row.name for call in calls_of(name)} for name in CASES}
    assert bound == {name: set(case.rows) for name, case in CASES.items()}
    assert set().union(*bound.values()) == set(ROWS)


@pytest.mark.parametrize("row", [ROWS[name] for name in TRANSPOSES], ids=lambda row: row.name)
def test_rows(row: Row) -> None:
    assert row.T.T is row
    assert (row.T.takes, row.T.gives) == (row.gives, row.takes)
    # its elements travel alone or together in both directions, or do not travel
    assert row.fused == row.T.fused or row.local or row.T.local


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.linear])
def test_transpose_of_a_transpose(name: str) -> None:
    """It is the call itself, parameters included."""
    for call in calls_of(name):
        assert (call.T.T.row, call.T.T.params) == (call.row, call.params)


def test_only_extrema_have_no_transpose() -> None:
    assert set(ROWS) - set(TRANSPOSES) == {"extremum"}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_docstrings(name: str) -> None:
    """What a docstring says for readers is what `@collective` says for programs."""
    of, doc = COLLECTIVES[name], inspect.getdoc(getattr(pmod, name)) or ""
    assert of.function is getattr(pmod, name)
    assert f"\n{of.kinds}. " in doc, "the kinds open the second paragraph"
    if name == "pmin":
        assert "As `pmax` in all else" in doc
        return
    assert re.search(r"\bShapes\b", doc) and re.search(r"\bCost\b", doc) and "\n>>> " in doc
    if not of.transpose:
        assert "Derivative: " in doc and of.derivative
        return
    assert f"Transpose: {of.transpose}" in doc, "the transpose is named"


@pytest.mark.parametrize("name", CASES)
def test_kinds(name: str) -> None:
    """Those of the collective are those of its case, of its row, and of its transpose the other way round."""
    case, of = CASES[name], COLLECTIVES[name]
    assert (of.takes, of.gives) == (case.takes, case.gives)
    assert bool(of.transpose) == case.linear
    if not case.linear:
        return
    row = ROWS[case.rows[0]]
    assert (row.takes, row.gives) == (of.takes, of.gives)
    if of.transpose in COLLECTIVES:
        back = COLLECTIVES[of.transpose]
        assert (back.takes, back.gives, back.transpose) == (of.gives, of.takes, name)
        assert back.name.removesuffix("_v") == row.T.name
    else:  # it is told in words: the same row with other parameters, or a pvary that divides
        assert row.T is row or name == "pmean"


# --- what is public -----------------------------------------------------------------------------------------------

OTHERS_PUBLIC = """
    Topology Mesh make_mesh set_mesh current_mesh keep_mesh shutdown
    exchange_plan ExchangePlan axis_index axis_size barrier split_sizes
    draw draw_collective debug checked mark_varying assert_invariant trace estimate explain start Pending Watcher
    launch simulate replicate share_parameters SharedParameters data_parallel remove_data_parallel no_sync
    fold_in rng
    is_first first_rank_first sampler P shard_map pvary_params global_norm to_dtensors from_dtensors local_slice
    local_coords Block domain_parallel cut_of
    PmodError NoMeshError AxisError ShapeError ArgumentError TopologyError MismatchError CollectiveTimeout
"""
PUBLIC = {*COLLECTIVES, *OTHERS_PUBLIC.split()}


def test_public_names() -> None:
    names = {name for name, value in vars(pmod).items() if not name.startswith("_") and not inspect.ismodule(value)}
    assert names == PUBLIC


def test_public_names_are_documented_and_typed() -> None:
    for name in sorted(PUBLIC):
        f = getattr(pmod, name)
        assert inspect.getdoc(f), name
        if inspect.isfunction(f):
            signature = inspect.signature(f)
            for parameter in signature.parameters.values():
                assert parameter.annotation is not parameter.empty, f"pmod.{name}: {parameter.name}"
            assert signature.return_annotation is not signature.empty, name


def test_arguments_of_collectives() -> None:
    """`f(x, axis, ...)`: what follows is by keyword, but for a permutation's."""
    for name, f in collectives().items():
        if name in CASES:
            x, axis, *rest = inspect.signature(f).parameters.values()
            assert (x.name, axis.name) == ("x", "axis")
            positional = [p.name for p in rest if p.kind is not p.KEYWORD_ONLY]
            assert positional in ([], ["perm"], ["offset"]), f"pmod.{name}"
    adding = {name for name, f in collectives().items() if "reduce_dtype" in inspect.signature(f).parameters}
    sums = {name for name, case in CASES.items() if "bool" not in case.dtypes}  # truth values are not added up
    summed_back = {name for name in CASES if COLLECTIVES[name].transpose in sums}
    assert adding == sums | summed_back | {"indexed_all_to_all_v"}, "who adds, forward or backward, says in what"
