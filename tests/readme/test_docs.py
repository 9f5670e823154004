"""The README and the docstrings are programs: every code block runs, every example gives what it prints."""

from __future__ import annotations

import doctest
import functools
import importlib
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docutils.core
import docutils.nodes
import pytest
import torch

import pmod
from pmod._mesh import ambient
from pmod.demo import fno
from pmod.demo.graph import net
from pmod.demo.pinn import net as pinn
from pmod.demo.wind import stencil
from tests.lib import readme_picture
from tests.lib.documents import BLOCKS, README, ROOT, printed_here

# not imported to look at: they run when imported
COMMANDS = {"pmod.__main__", "pmod.demo.__main__"}


# run as files, because they start processes or are started by a launcher
SCRIPTS = {"no-launcher", "quick-start"}
RECIPES = {"train-ddp", "train-data-parallel", "train-pure"}  # run by every launcher


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, env=_environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("name", sorted({name for name, (kind, _) in BLOCKS.items() if kind == "python"} - RECIPES))
def test_python_block_runs(name: str, tmp_path: Path) -> None:
    text = BLOCKS[name][1]
    if name in SCRIPTS:
        script = tmp_path / "script.py"
        script.write_text(text)
        _run([sys.executable, str(script)], tmp_path)
        return
    printed_here(text)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
MPIRUN = ("mpirun.openmpi", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none",
          "--mca", "oob_tcp_if_include", "lo", "-n", "2", sys.executable)  # fmt: skip


# each script in the same ranks, which start once; what a script prints in a rank goes into a file of its own
ONE_BY_ONE = """
import contextlib, os, runpy, sys
import pmod

for script in sys.argv[1:]:
    with open(f"{script}.{os.environ['RANK']}", "w") as printed, contextlib.redirect_stdout(printed):
        runpy.run_path(script, run_name="__main__")
    pmod.shutdown()
"""


@functools.cache
def _under_torchrun() -> dict[str, str]:
    """What the recipes and the translations print on two ranks."""
    texts = {**{name: BLOCKS[name][1] for name in sorted(RECIPES)}, "translations": _every_translation()}
    with tempfile.TemporaryDirectory() as folder:
        scripts = {name: Path(folder) / f"{name}.py" for name in texts}
        for name, script in scripts.items():
            script.write_text(texts[name])
        one_by_one = Path(folder) / "one_by_one.py"
        one_by_one.write_text(ONE_BY_ONE)
        _run([*TORCHRUN, str(one_by_one), *map(str, scripts.values())], Path(folder))
        return {
            name: "".join(Path(f"{script}.{rank}").read_text() for rank in range(2)) for name, script in scripts.items()
        }


def _printed(name: str, launcher: tuple[str, ...]) -> str:
    """What a recipe prints under a launcher, or without one."""
    if launcher == TORCHRUN:
        return _under_torchrun()[name]
    if not launcher:
        return printed_here(BLOCKS[name][1])
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "train.py"
        script.write_text(BLOCKS[name][1])
        return _run([*launcher, str(script)], Path(folder))


@functools.cache
def _loss(name: str, *launcher: str) -> float:
    """What a recipe prints at its end."""
    (loss,) = re.findall(r"loss (\S+)", _printed(name, launcher))
    return float(loss)


@pytest.mark.parametrize("name", sorted(RECIPES))
@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["python", "torchrun"])
def test_training_recipes_agree(name: str, launcher: tuple[str, ...]) -> None:
    first = _loss("train-ddp")
    assert first < 2.0, "it does not train"
    assert abs(_loss(name, *launcher) - first) < 1e-5 * first


@pytest.mark.skipif(shutil.which("mpirun.openmpi") is None, reason="needs the Debian package openmpi-bin")
def test_training_recipe_under_mpirun() -> None:
    alone = _loss("train-pure")
    assert abs(_loss("train-pure", *MPIRUN) - alone) < 1e-5 * alone


def _translations(name: str, column: int) -> list[str]:
    """What a column of a translation table of the README says to run."""
    tree = docutils.core.publish_doctree(README.read_text(), settings_overrides={"halt_level": 2, "report_level": 2})
    (table,) = tree.findall(lambda node: name in node.get("names", []) if hasattr(node, "get") else False)
    rows = list(table.findall(docutils.nodes.row))[1:]
    return [next(iter(row[column].findall(docutils.nodes.literal))).astext() for row in rows]


# what its users call
TRANSLATED = """
    initialize is_initialized rank world_size local_rank device cuda distributed group_names mesh_dims global_mesh
    broadcast_buffers find_unused_parameters group group_size group_rank group_name create_process_subgroup
    create_orthogonal_process_group create_groups_from_config initialize_mesh get_mesh_group cleanup ProcessGroupNode
    ProcessGroupConfig all_gather_v gather_v scatter_v indexed_all_to_all_v copy_to_parallel_region
    reduce_from_parallel_region scatter_to_parallel_region gather_from_parallel_region compute_split_shapes
    distributed_transpose DistributedRFFT2 DistributedIRFFT2 pad_helper truncate_helper get_memory_format
    split_tensor_along_dim reduce_loss mark_module_as_shared unmark_module_as_shared fused_all_reduce
"""


def test_every_function_is_translated() -> None:
    section = README.read_text().split("Every function\n")[1].split("From JAX, torch.distributed")[0]
    left = " ".join(re.findall(r"^   \* - (.*)$", section, re.MULTILINE))
    assert [name for name in TRANSLATED.split() if not re.search(rf"\b{name}\b", left)] == []


def _every_translation() -> str:
    transform = "torch.testing.assert_close(modes, torch.fft.rfft2(whole).split(pmod.split_sizes(4, n), 1)[index])"
    modulus, others = _translations("translation", 1), _translations("translation-others", 0)
    assert len(modulus) > 30 and len(others) > 20
    return "\n".join([BLOCKS["translation-setup"][1], *modulus, transform, *others, "print('ran')"])


@pytest.mark.parametrize("ranks", [1, 2], ids=["python", "torchrun"])
def test_every_translation_runs(ranks: int) -> None:
    printed = printed_here(_every_translation()) if ranks == 1 else _under_torchrun()["translations"]
    assert printed == "ran\n" * ranks


def test_shell_blocks_are_what_the_tests_run() -> None:
    assert BLOCKS["launchers"][1].split("\n") == [
        "python train.py",
        "torchrun --standalone --nproc-per-node 2 train.py",
        "mpirun -n 2 python train.py",
    ]
    # .ci/run takes its test command from the README; the demo's differs in its last step only
    test, demo = BLOCKS["test"][1], BLOCKS["demo"][1]
    assert test.replace("[test]", "[demo]").replace("pytest", "pmod.demo") == demo
    for name in ("test", "test-launchers", "test-newest"):
        assert f"awk '/:name: {name}$/" in (ROOT / ".ci/run").read_text()


def test_readme_shows_the_demo_as_it_is() -> None:
    shown = BLOCKS["fno"][1]
    for thing in (fno.SpectralConv, fno.relative_errors, fno.loss):
        assert inspect.getsource(thing).rstrip() in shown
    assert inspect.getsource(net.Round).rstrip() in BLOCKS["graph"][1]
    assert inspect.getsource(stencil.derivatives).rstrip() in BLOCKS["wind"][1]
    assert all(inspect.getsource(thing).rstrip() in BLOCKS["pinn"][1] for thing in (pinn.Pair, pinn.loss))


def _modules() -> list[str]:
    found = [info.name for info in pkgutil.walk_packages(pmod.__path__, "pmod.")]
    return [name for name in found if name not in COMMANDS]


@pytest.mark.parametrize("name", _modules())
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    mesh = pmod.make_mesh(data=1, model=1)
    names = {"pmod": pmod, "torch": torch, "mesh": mesh, **vars(module)}
    before = ambient.ambient()
    try:
        result = doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    finally:
        ambient._put(before)
        pmod.shutdown()
    assert result.failed == 0


# --- every public name has an example ---------------------------------------------------------------------------------

_TOLD = "called by whatever tells a trace what happens, not by users"
_OURS = "for pmod's own functions, which give their names to its errors"
_IPYTHON = "called by IPython at %load_ext"
_ENGINES = "shows what it gives in a notebook with engines, which tests/notebook/test_notebook.py starts"
# what is public and shows nothing, and why
WITHOUT = {
    **{f"{watcher}.{name}": _TOLD for watcher in ("Watcher", "trace")
       for name in ("before", "after", "waited", "claimed", "compiled")},
    "Mesh.bind": _OURS, "Mesh.label": _OURS,
    "trace.retime": "called by estimate",
    "load_ipython_extension": _IPYTHON, "unload_ipython_extension": _IPYTHON, "pull": _ENGINES, "push": _ENGINES,
}  # fmt: skip


# what users import; demo, bench, collectives and doctor are commands
MODULES = {"fft", "graph", "nn", "sht", "notebook", "testing"}


def _api() -> dict[str, object]:
    """Where each public function and class is defined -> what it is."""
    found: dict[str, object] = {}
    for name in ("pmod", "pmod.nn.functional", *(f"pmod.{module}" for module in MODULES)):
        for thing in vars(importlib.import_module(name)).values():
            home = getattr(thing, "__module__", None) or ""
            if callable(thing) and home.startswith(name) and not thing.__name__.startswith("_"):
                found[f"{home}.{thing.__qualname__}"] = thing
    return found


API = {home: thing for home, thing in _api().items() if not (isinstance(thing, type) and issubclass(thing, Exception))}


def _members() -> Iterator[tuple[str, str, Any]]:
    """(class, name, what it is) of the methods, properties and fields of public classes that are pmod's own."""
    for home, thing in API.items():
        for owner in thing.__mro__ if isinstance(thing, type) else ():
            if owner.__module__.startswith("pmod."):
                yield from ((home, name, member) for name, member in vars(owner).items() if not name.startswith("_"))


@functools.cache
def _examples() -> dict[str, str]:
    """The code of the examples that `test_docstring_examples` runs, by where they stand."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = [test for name in _modules() for test in finder.find(importlib.import_module(name))]
    return {test.name: "".join(example.source for example in test.examples) for test in tests}


def test_every_public_function_and_class_has_an_example() -> None:
    assert len(API) > 80
    top = {info.name for info in pkgutil.iter_modules(pmod.__path__) if not info.name.startswith("_")}
    assert top == MODULES | {"demo", "bench", "collectives", "doctor"}
    left = {thing.__qualname__ for home, thing in API.items() if not _examples().get(home)}
    assert left == {name for name in WITHOUT if "." not in name}


def test_every_public_member_is_shown() -> None:
    """By an example of its own, or one of its class."""
    left: set[str] = set()
    for home, name, member in _members():
        if isinstance(member, types.MemberDescriptorType):  # a field
            assert re.search(rf"\b{name}\b", API[home].__doc__), f"{home}: {name}"
            continue
        assert inspect.getdoc(member), f"{home}.{name}"
        shown = _examples().get(f"{home}.{name}") or re.search(rf"\.{name}\b", _examples()[home])
        if not shown:
            left.add(f"{home.rsplit('.')[-1]}.{name}")
    assert left == {name for name in WITHOUT if "." in name}


def test_the_picture_is_what_is_drawn() -> None:
    assert readme_picture.PATH.read_text() == readme_picture.picture()
    assert f".. image:: {readme_picture.PATH.relative_to(ROOT).as_posix()}" in README.read_text()


def test_docstrings_of_what_is_composed_of_collectives() -> None:
    """They have the form of a collective's (for those, see test_layout.py)."""
    for home, thing in API.items():
        moves = inspect.isfunction(thing) and {"x", "input"} & {*inspect.signature(thing).parameters}
        if moves and home.startswith(("pmod.fft.", "pmod.nn.", "pmod._collectives.halo.")):
            doc = inspect.getdoc(thing) or ""
            assert re.search(r"^[VI] -> [VI]\. ", doc, re.MULTILINE), f"{home}: V -> V opens a line"
            assert [word for word in ("Shapes", "Cost", "Raises") if word not in doc] == [], home
