"""The code blocks of the README, by name."""

# pyright: standard

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import docutils.core
import docutils.nodes

import pmod
from pmod._mesh import ambient

ROOT = Path(__file__).parents[2]


README = ROOT / "README.rst"


def _blocks() -> dict[str, tuple[str, str]]:
    """Name -> (language, text) of the README's code blocks; strict: a warning of docutils is an error."""
    tree = docutils.core.publish_doctree(README.read_text(), settings_overrides={"halt_level": 2, "report_level": 2})
    found = {}
    for node in tree.findall(docutils.nodes.literal_block):
        assert node["names"], f"a code block without a name, which no test can run:\n{node.astext()}"
        found[node["names"][0]] = (node["classes"][1], node.astext())
    return found


BLOCKS = _blocks()


def printed_here(text: str) -> str:
    """What a script prints in this process, which is left as it was."""
    before, printed = ambient.ambient(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(text, "README", "exec"), {"__name__": "__main__"})
    finally:
        ambient._put(before)
        pmod.shutdown()
    return printed.getvalue()
