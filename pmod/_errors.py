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
    """Not a tensor, a dtype that the function cannot take, or a tensor on another
    device.
    """


class TopologyError(PmodError):
    """What the launcher says is incomplete or contradicts itself."""


class MismatchError(PmodError):
    """The ranks of one program did not make the same calls."""


class CollectiveTimeout(PmodError):
    """Some ranks did not arrive before the deadline, or cannot any more: they died, or
    raised.
    """


def coordinates(coords: Mapping[str, int] | None) -> str:
    """``(data=0, model=1)``, as messages and pictures write a rank's place."""
    if coords is None:
        return "(outside the mesh)"
    return "(" + ", ".join(f"{name}={index}" for name, index in coords.items()) + ")"


_LONGEST = 200  # characters of a value in a message, which is to be read in one look


def quoted(value: object) -> str:
    """A value as messages write it: its repr in one line, not too long.

    >>> quoted([1, 2]), quoted("model")
    ('[1, 2]', "'model'")
    """
    try:
        text = repr(value)
    except (
        Exception
    ):  # a __repr__ raises what it likes, that of a tensor of 1-bit ints too
        return f"a {type(value).__name__}"
    if "\n" in text:
        text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def phrase(
    function: str,
    given: str,
    right: str = "",
    *,
    axis: object = None,
    coords: Mapping[str, int] | None = None,
) -> str:
    """The text of every error: which function, axis and rank; what was given; what
    would be right.

    >>> print(phrase("shard", "x.shape[0] is 5", "Pass sizes=(3, 2).", axis="model", coords={"model": 1}))
    pmod.shard(axis='model') at (model=1): x.shape[0] is 5.
    Pass sizes=(3, 2).
    """
    call = f"pmod.{function}" + ("" if axis is None else f"(axis={quoted(axis)})")
    place = "" if coords is None else f" at {coordinates(coords)}"
    stop = "" if given.endswith("?") else "."
    return f"{call}{place}: {given}{stop}" + (f"\n{right}" if right else "")


def endless(function: str = "") -> ArgumentError:
    """The error of a tree in which a walk came to no end; by default of the public
    function that was called.
    """
    given = "a tree holds itself, or is nested too deeply"
    return ArgumentError(
        phrase(
            function or call_site()[0],
            given,
            "Pass containers that do not hold themselves.",
        )
    )


def near_miss(given: object, known: Iterable[str]) -> str:
    """``; did you mean 'model'?`` where one of the known names is close, else nothing."""
    close = (
        difflib.get_close_matches(given, list(known), n=1)
        if isinstance(given, str)
        else []
    )
    return f"; did you mean {close[0]!r}?" if close else ""
