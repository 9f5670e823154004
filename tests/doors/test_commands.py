"""`python -m pmod`: the list is whole, and every command has a help with examples, without colours in a pipe."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import pmod
from pmod import collectives
from pmod.__main__ import COMMANDS, main

SOURCE = Path(pmod.__file__).parent
README = Path(__file__).parents[2] / "README.rst"


def test_the_list_is_whole() -> None:
    """A module that runs is a command, and the other way round."""
    runs = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
                runs.add(path.relative_to(SOURCE).with_suffix("").as_posix())
    assert {name.removesuffix("/__main__") for name in runs} == {*COMMANDS, "__main__"}


def test_the_list_as_it_is_printed() -> None:
    done = subprocess.run([sys.executable, "-m", "pmod"], capture_output=True, text=True, check=True, timeout=600)
    assert [line.split()[:3] for line in done.stdout.splitlines()] == [["python", "-m", f"pmod.{c}"] for c in COMMANDS]
    assert done.stderr == "" and "\x1b" not in done.stdout


@pytest.mark.parametrize("words", [[], ["graph"], ["wind"], ["bench"], ["doctor"], ["collectives"], ["pmod"]], ids=str)
def test_every_help_has_examples(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    modules = {"pmod": "pmod.__main__"} | {name: f"pmod.{name}" for name in ("bench", "doctor", "collectives")}
    module = modules.get("".join(words))
    command = f"python -m {module}" if module else " ".join(["python -m pmod.demo", *words])
    run = importlib.import_module(module or "pmod.demo.__main__").main
    with pytest.raises(SystemExit) as left:
        run(["--help"] if module else [*words, "--help"])
    printed = capsys.readouterr().out
    assert left.value.code in (None, 0) and "\x1b" not in printed
    examples = printed.split("examples:\n")[1].splitlines()
    called = command.removesuffix(".__main__")
    assert sum(line.startswith(f"  {called}") for line in examples) >= 1, printed
    assert len([line for line in examples if line.startswith("  ")]) >= 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dmo"], "no command 'dmo' among demo, bench, collectives, doctor; did you mean 'demo'?"),
        (["--frob"], "unrecognized arguments: --frob"),
    ],
)
def test_what_is_no_command(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2 and capsys.readouterr().err.endswith(f"error: {message}\n")


def test_a_command_by_its_name() -> None:
    calls = [["pmod", "doctor"], ["pmod.doctor"]]
    printed = [
        subprocess.run([sys.executable, "-m", *call, "--help"], capture_output=True, text=True, check=True, timeout=600)
        for call in calls
    ]
    assert printed[0].stdout == printed[1].stdout and "--timeout" in printed[0].stdout


def test_the_table_of_the_readme_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """README's table of collectives is what the command prints: `python -m pmod.collectives --rst`."""
    collectives.main(["--rst"])
    printed = capsys.readouterr().out
    assert f"\n\n{printed}\nAll take trees" in README.read_text()


def test_rows_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    collectives.main(["pvary", "psum"])
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "function", "psum(x, axis, *, reduce_dtype=None)", "pvary(x, axis, *, reduce_dtype=None)",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        collectives.main(["psun"])
    assert capsys.readouterr().err.endswith("error: no collective 'psun'; did you mean 'psum'?\n")
