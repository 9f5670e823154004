"""The error of what has no exact form on blocks: which operation, which line, what to do."""

from __future__ import annotations

from pmod._errors import PmodError, phrase
from pmod._site import call_site

FUNCTION = "domain_parallel"


def no_exact_form(operation: str, why: str, right: str) -> PmodError:
    """Return the error of an operation that blocks cannot do as the whole would.

    It is not a TypeError: the operators of a tensor take that for "try the other one".
    """
    given = f"at {call_site()[1]} {operation}: {why}"
    return PmodError(phrase(FUNCTION, given, right))


def along_cut(operation: str, dim: int, right: str = "") -> PmodError:
    """Return the error of an operation along a dim that is cut."""
    remedy = right or "Compute it outside, or make the dim whole first: pmod.unshard."
    return no_exact_form(operation, f"dim {dim} is cut", remedy)
