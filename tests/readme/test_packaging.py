"""What is built and handed out: the sdist and the wheel, and what they say of themselves.

That the wheel works in an empty environment is tried in .ci/run, which may take a minute and use the network."""

from __future__ import annotations

import email.message
import email.parser
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import docutils.core
import pytest

import pmod

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WHEEL_LIMIT = 750_000  # bytes: text alone; a picture or a table of numbers that strays into it shows


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sdist and of the wheel that is built from it, as `python -m build` does by default."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    assert path.stat().st_size < WHEEL_LIMIT
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    return email.parser.Parser().parsestr(wheel.read(name).decode())


def sources(*folders: str) -> set[str]:
    """The files of these folders, without caches, by their names from the root."""
    caches = {"__pycache__", ".ipynb_checkpoints"}
    found = {path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {path.relative_to(ROOT).as_posix() for path in found if not caches & {*path.parts}}


def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == sources("pmod")
    assert {"pmod/py.typed", "pmod/demo/__main__.py", "pmod/nn/functional/conv.py"} <= held


def test_sdist_is_the_checkout(built: Path) -> None:
    """Its tests can be run."""
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames()}
    assert held - {"PKG-INFO"} == sources("pmod", "tests", "notebooks", ".ci") | {"README.rst", "pyproject.toml"}


def test_one_source_for_the_version(metadata: email.message.Message) -> None:
    assert metadata["Version"] == pmod.__version__
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    written = [path.name for path in ROOT.glob("pmod/**/*.py") if f'"{pmod.__version__}"' in path.read_text()]
    assert written == ["_version.py"]


def test_metadata(metadata: email.message.Message) -> None:
    assert metadata["Name"] == "pmod" and metadata["Summary"] == PROJECT["description"]
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["License"] is None
    assert metadata["License-File"] is None, "the licence is named; there is no file of it"
    assert metadata["Requires-Python"] == ">=3.11"
    classifiers = metadata.get_all("Classifier") or []
    assert "Programming Language :: Python :: 3.11" in classifiers and "Typing :: Typed" in classifiers
    assert not [name for name in classifiers if name.startswith("License ::")], "refused beside an expression"
    assert metadata["Description-Content-Type"] == "text/x-rst"
    assert str(metadata.get_payload()).rstrip() == (ROOT / "README.rst").read_text().rstrip()


def test_three_required_packages(metadata: email.message.Message) -> None:
    required = [line for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]
    assert {re.split(r"[^\w-]", line)[0] for line in required} == {"torch", "numpy", "attrs"}
    assert set(metadata.get_all("Provides-Extra") or []) == set(PROJECT["optional-dependencies"])


def test_readme_renders() -> None:
    """As `python -m docutils --strict` does: a warning is an error."""
    strict = {"halt_level": 1, "report_level": 1}
    page = docutils.core.publish_string((ROOT / "README.rst").read_text(), writer="html5", settings_overrides=strict)
    assert b"Quick start" in page
