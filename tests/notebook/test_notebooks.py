"""Every notebook runs from top to bottom; what it claims is asserted in its cells."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import nbclient
import nbformat
import pytest
from jupyter_client.manager import KernelManager

from tests.lib.documents import BLOCKS, README

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


def test_the_readme_names_only_notebooks_that_are_there() -> None:
    named = set(re.findall(r"``(\d\d_\w+)``", README.read_text()))
    assert named and named <= {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_short_and_clean(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len(notebook.cells) < 15
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit notebooks without outputs"
    assert any("assert" in cell.source for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("name", ["data", "tensor", "fsdp", "context", "pipeline", "domain"])
def test_cookbook_is_the_readme_s(name: str) -> None:
    """Word for word but for the imports, so that a recipe is mended in both places."""
    recipe = re.split(r"from pmod import P\n+", BLOCKS[f"cookbook-{name}"][1])[1]
    cells = nbformat.read(NOTEBOOKS[0].parent / "03_parallelism_cookbook.ipynb", as_version=4).cells
    assert any(recipe.strip() in cell.source for cell in cells)


@pytest.fixture(scope="module", params=["0", "1"], ids=["as it is", "under debug"])
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelManager]:
    """One for all notebooks, whose engines it keeps: most of the time would go into starting them."""
    folder = tmp_path_factory.mktemp("notebooks")
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(folder), env={**os.environ, "PMOD_DEBUG": request.param})
    yield manager
    manager.shutdown_kernel()
    manager.cleanup_resources()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client", "ignore:.*:RuntimeWarning:zmq")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, kernel: KernelManager) -> None:
    notebook = nbformat.read(path, as_version=4)
    afresh = "%reset -f\nimport torch\ntorch.set_default_dtype(torch.float32)\ndel torch"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(afresh))
    client = nbclient.NotebookClient(notebook, km=kernel, timeout=600)
    try:
        client.execute()
    finally:
        client.kc.stop_channels()
