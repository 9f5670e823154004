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
from pathlib import Path

import docutils.core
import docutils.nodes
import pytest
import torch

import pmod
from pmod import _ambient
from pmod.demo import fno

ROOT = Path(__file__).parents[1]
README = ROOT / "README.rst"
# not imported to look at: they run when imported
COMMANDS = {"pmod.__main__", "pmod.demo.__main__"}


def _blocks() -> dict[str, tuple[str, str]]:
    """Name -> (language, text) of the README's code blocks; strict: a warning of docutils is an error."""
    tree = docutils.core.publish_doctree(README.read_text(), settings_overrides={"halt_level": 2, "report_level": 2})
    found = {}
    for node in tree.findall(docutils.nodes.literal_block):
        assert node["names"], f"a code block without a name, which no test can run:\n{node.astext()}"
        found[node["names"][0]] = (node["classes"][1], node.astext())
    return found


BLOCKS = _blocks()
# run as files, because they start processes or are started by a launcher
SCRIPTS = {"no-launcher", "quick-start"}
RECIPES = {"train-ddp", "train-pure"}  # run by every launcher


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, env=_environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("name", sorted({name for name, (kind, _) in BLOCKS.items() if kind == "python"} - RECIPES))
def test_python_block_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = BLOCKS[name][1]
    if name in SCRIPTS:
        script = tmp_path / "script.py"
        script.write_text(text)
        _run([sys.executable, str(script)], tmp_path)
        return
    before = _ambient.ambient()
    try:
        exec(compile(text, f"README:{name}", "exec"), {"__name__": "__main__"})
    finally:
        _ambient._put(before)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
MPIRUN = ("mpirun.openmpi", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none",
          "--mca", "oob_tcp_if_include", "lo", "-n", "2", sys.executable)  # fmt: skip


@functools.cache
def _loss(name: str, *launcher: str) -> float:
    """What a recipe prints at its end."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "train.py"
        script.write_text(BLOCKS[name][1])
        (loss,) = re.findall(r"loss (\S+)", _run([*launcher, str(script)], Path(folder)))
    return float(loss)


@pytest.mark.parametrize("name", sorted(RECIPES))
@pytest.mark.parametrize("launcher", [(sys.executable,), TORCHRUN], ids=["python", "torchrun"])
def test_training_recipes_agree(name: str, launcher: tuple[str, ...]) -> None:
    first = _loss("train-ddp", sys.executable)
    assert first < 2.0, "it does not train"
    assert abs(_loss(name, *launcher) - first) < 1e-5 * first


@pytest.mark.skipif(shutil.which("mpirun.openmpi") is None, reason="needs the Debian package openmpi-bin")
def test_training_recipe_under_mpirun() -> None:
    alone = _loss("train-pure", sys.executable)
    assert abs(_loss("train-pure", *MPIRUN) - alone) < 1e-5 * alone


def test_shell_blocks_are_what_the_tests_run() -> None:
    assert BLOCKS["launchers"][1].split("\n") == [
        "python train.py",
        "torchrun --standalone --nproc-per-node 2 train.py",
        "mpirun -n 2 python train.py",
    ]
    # .ci/run takes its test command from the README; the demo's differs in its last step only
    test, demo = BLOCKS["test"][1], BLOCKS["demo"][1]
    assert test.replace("[test]", "[demo]").replace("pytest", "pmod.demo") == demo
    assert 'awk \'/:name: test$/' in (ROOT / ".ci/run").read_text()


def test_readme_shows_the_demo_as_it_is() -> None:
    shown = BLOCKS["fno"][1]
    for thing in (fno.even_sizes, fno.SpectralConv, fno.relative_errors, fno.loss):
        assert inspect.getsource(thing).rstrip() in shown


def _modules() -> list[str]:
    found = [info.name for info in pkgutil.walk_packages(pmod.__path__, "pmod.")]
    return [name for name in found if name not in COMMANDS]


@pytest.mark.parametrize("name", _modules())
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    mesh = pmod.make_mesh(data=1, model=1)
    names = {"pmod": pmod, "torch": torch, "mesh": mesh, **vars(module)}
    before = _ambient.ambient()
    try:
        result = doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE)
    finally:
        _ambient._put(before)
    assert result.failed == 0


def test_every_public_function_has_an_example() -> None:
    for name in dir(pmod):
        thing = getattr(pmod, name)
        if name.startswith("_") or not callable(thing) or (isinstance(thing, type) and issubclass(thing, Exception)):
            continue
        if name in ("Pending", "ExchangePlan", "SharedParameters"):  # shown by the functions that make them
            continue
        assert ">>>" in (thing.__doc__ or ""), f"pmod.{name} shows no example"
