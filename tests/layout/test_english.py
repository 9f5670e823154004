"""What pmod says is plain English: patterns that a native reader stumbles over stay out of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "pmod"

# pattern -> what to write in its place
STUMBLES = {
    r"\bcomes? no more\b": "will not arrive",
    r"\b(is|are) no (tensor|module|number|function|int|list|dict|size|dim|index|axis|name)\b": "is not a ...",
    r"\bbe it\b": "whether it is",
    r"\b(has|have|had) not (a|an|the|this|that|any)\b": "does not have",
    r", say\b(?! so)": "for example",
    r"\bfor what (is|are) (no|not)\b": "if ... is not",
}  # fmt: skip


def said(path: Path) -> Iterator[tuple[int, str]]:
    """The texts of a file: docstrings, messages, what it prints."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, " ".join(node.value.split())


def stumbles(text: str) -> list[str]:
    return [f"{found[0]!r}: write {better!r}" for pattern, better in STUMBLES.items()
            if (found := re.search(pattern, text))]  # fmt: skip


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_no_text_stumbles(path: Path) -> None:
    assert not [(line, found) for line, text in said(path) for found in stumbles(text)]


def test_a_stumble_is_seen() -> None:
    for text in ("rank 3 comes no more", "what is no tensor", "ArgumentError for what is no module", "be it as 0 * w",
                 "an axis that the mesh has not the size of", "give it a name, say"):  # fmt: skip
        assert stumbles(text), text
    for text in ("they say so", "it has not been set", "one that is not a tensor"):
        assert not stumbles(text), text
