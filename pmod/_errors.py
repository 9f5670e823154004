"""The types of errors that pmod raises, and the one form of their messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from pmod._site import call_site


class PmodError(Exception):
    """The root: ``except pmod.PmodError`` catches all that pmod raises on purpose."""


class NoMeshError(PmodError):
    """An axis was named and no mesh is set."""


class AxisError(PmodError, ValueError):
    """An axis, a root or a permutation that the mesh does not have."""


class ShapeError(PmodError, ValueError):
    """A dim that the tensor lacks, or sizes that do not fit it."""


class ArgumentError(PmodError, TypeError):
    """Not a tensor, or one whose dtype or device the function cannot take."""


class TopologyError(PmodError):
    """What the launcher says is incomplete or contradicts itself."""


class MismatchError(PmodError):
    """The ranks of one program did not make the same calls."""


class CollectiveTimeout(PmodError):
    """Some ranks did not arrive before the deadline, or cannot: they died or raised."""


def coordinates(coords: Mapping[str, int] | None) -> str:
    """Return ``(data=0, model=1)``: a rank's place in messages and pictures."""
    if coords is None:
        return "(outside the mesh)"
    return "(" + ", ".join(f"{name}={index}" for name, index in coords.items()) + ")"


# characters of a value in a message, which is to be read in one look
_LONGEST = 200


def quoted(value: object) -> str:
    """Return a value as messages write it: its repr in one line, not too long.

    >>> quoted([1, 2]), quoted("model")
    ('[1, 2]', "'model'")
    """
    try:
        text = repr(value)
    except Exception:
        # a __repr__ raises what it likes, that of a tensor of 1-bit ints too
        return f"a {type(value).__name__}"
    if "\n" in text:
        text = " ".join(text.split())
    if len(text) > _LONGEST:
        text = text[: _LONGEST - 3] + "..."
    return text


def phrase(
    function: str,
    given: str,
    right: str = "",
    *,
    axis: object = None,
    coords: Mapping[str, int] | None = None,
) -> str:
    """Return the text of an error, whose form is the same everywhere.

    It says which function, axis and rank; what was given; what would be right.

    >>> print(phrase("shard", "x.shape[0] is 5", "Pass sizes=(3, 2).", axis="model", coords={"model": 1}))
    pmod.shard(axis='model') at (model=1): x.shape[0] is 5.
    Pass sizes=(3, 2).
    """
    text = f"pmod.{function}"
    if axis is not None:
        text += f"(axis={quoted(axis)})"
    if coords is not None:
        text += f" at {coordinates(coords)}"
    text += f": {given}"
    # a near miss ends in a question
    if not given.endswith("?"):
        text += "."
    if right:
        text += f"\n{right}"
    return text


def endless(function: str = "") -> ArgumentError:
    """Return the error of a tree that a walk does not get out of.

    function: by default the public function that was called.
    """
    given = "a tree holds itself, or is nested too deeply"
    right = "Pass containers that do not hold themselves."
    return ArgumentError(phrase(function or call_site()[0], given, right))


def near_miss(given: object, known: Iterable[str]) -> str:
    """Return ``; did you mean 'model'?`` if one of the known names is close, else ""."""
    if not isinstance(given, str):
        return ""
    close = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
