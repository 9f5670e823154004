"""What is private of torch: without each name `import pmod` works, and what needs it raises, with the version.

In core/ since most of the names are for the one mechanism; tests/lib/lacking.py has a use of each.
"""

from __future__ import annotations

import json
import os
import pkgutil
import re
import subprocess
import sys
import warnings
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from pmod import _torch
from tests.lib.lacking import COMPILED, HARMLESS, USES

ROOT = Path(__file__).parents[2]


class Tries:
    """A process in which torch is imported, and pmod not yet."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.lib.lacking", *arguments], cwd=ROOT, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def __call__(self, name: str, *, hidden: bool) -> dict[str, str]:
        assert self.process.stdin and self.process.stdout
        print(json.dumps([name, hidden]), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        self.process.communicate()


@pytest.fixture(scope="module")
def plainly() -> Generator[Tries]:
    tries = Tries()
    yield tries
    tries.end()


@pytest.fixture(scope="module")
def compiling() -> Generator[Tries]:
    tries = Tries("compiler")
    yield tries
    tries.end()


def test_every_name_has_a_use() -> None:
    assert set(USES) == set(_torch.SEEN)


@pytest.mark.parametrize("name", _torch.SEEN)
def test_without(name: str, plainly: Tries, compiling: Tries) -> None:
    tries = compiling if name in COMPILED else plainly
    found = tries(name, hidden=True)
    assert found["ended"] == "use", found["raised"]
    if name in HARMLESS:
        assert not found["raised"], found["raised"]
        return
    said = f"torch {torch.__version__} has no {name.replace(':', '.')}"
    # the compiler wraps what is raised while it traces, and keeps the words
    kind = r"\bpmod\.\w+: " if name in COMPILED else r"pmod\._errors\.PmodError: pmod\.\w*: "
    assert re.search(kind + re.escape(said), found["raised"]), found["raised"]
    assert "It was seen in torch 2.11 to 2.14: install one of these" in found["raised"]


@pytest.mark.parametrize("use", sorted({use.__name__ for use in USES.values()}))
def test_with(use: str, plainly: Tries, compiling: Tries) -> None:
    """Where no name is hidden the same uses work, so it is the name that they lacked."""
    name = next(name for name, of in USES.items() if of.__name__ == use)
    found = (compiling if name in COMPILED else plainly)(name, hidden=False)
    assert found == {"ended": "use", "raised": ""}


def test_this_torch_has_all() -> None:
    """Each name is where the record says that it was seen."""
    release = ".".join(torch.__version__.split(".")[:2])
    for name, versions in _torch.SEEN.items():
        seen = any(version.startswith(f"{release}.") for version in versions)
        if name.startswith("torch.nn:Module."):
            assert hasattr(torch.nn.Module(), name.removeprefix("torch.nn:Module.")) == seen
        elif seen:
            pkgutil.resolve_name(name)


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.14.1+cu130", "2.14.9"])
def test_a_torch_that_was_tested(version: str) -> None:
    assert _torch.newer_than_tested(version) == ""


@pytest.mark.parametrize("version", ["2.15.0", "2.15.0a0+git12ab", "3.0.0", "10.1"])
def test_a_newer_torch(version: str) -> None:
    text = _torch.newer_than_tested(version)
    assert text.startswith(f"pmod was tested with torch up to 2.14, and this is torch {version}.\n")


NEWER = """
import warnings, torch
torch.__version__ = "99.0.1+cpu"
{silence}
with warnings.catch_warnings(record=True) as said:
    {first}
    import pmod, pmod.testing
    assert float(pmod.simulate(lambda: pmod.psum(torch.ones(()), "x"), x=2)[0]) == 2.0
print(*[w.category.__name__ + ": " + str(w.message) for w in said if "pmod" in str(w.message)], sep="|")
"""


def imported_on_a_newer(silence: str = "", *options: str) -> str:
    code = NEWER.format(silence=silence, first="pass" if silence or options else "warnings.simplefilter('always')")
    return subprocess.run(
        [sys.executable, *options, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True
    ).stdout.strip()


def test_a_newer_torch_is_named_once() -> None:
    assert imported_on_a_newer() == "UserWarning: " + _torch.newer_than_tested("99.0.1+cpu")


def test_it_is_silenced_as_it_says() -> None:
    said = _torch.newer_than_tested("99.0.1+cpu")
    line = 'warnings.filterwarnings("ignore", "pmod was tested with torch")'
    assert line in said and "python -W" in said
    assert imported_on_a_newer(line) == ""
    assert imported_on_a_newer("", "-W", "ignore:pmod was tested with torch") == ""


def test_what_compiled_code_takes_for_constant() -> None:
    """The mark that torch.compiler.assume_constant_result sets is the one that pmod sets without it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.compiler.assume_constant_result(lambda: 1)
    assert vars(_torch.constant_in_graphs(lambda: 1)) == vars(theirs)
