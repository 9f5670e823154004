"""What the public collectives are, as data: the kinds that each takes and gives, its
value and its derivative.

`@collective` stands on the public function and returns it as it is, so that a call
costs nothing more. Whoever shows or checks collectives reads `COLLECTIVES`: pictures,
`explain`, the table that `python -m pmod.collectives` prints, tests. What moves is in
the rows that a collective binds (`_core/row.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import attrs

from pmod._core.row import Kind

F = TypeVar("F", bound=Callable[..., Any])


@attrs.frozen
class Collective:
    """A public function that moves tensors along an axis."""

    function: Callable[..., Any]
    takes: Kind
    gives: Kind
    transpose: str  # "" where it is not linear
    derivative: str  # in words: the transpose, where there is one
    value: str  # what each rank gets, in words

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def kinds(self) -> str:
        """As pictures and messages write them.

        >>> from pmod._core.collective import COLLECTIVES
        >>> COLLECTIVES["shard"].kinds
        'I -> V'
        """
        return f"{self.takes} -> {self.gives}"

    @property
    def arguments(self) -> list[str]:
        """The names of its arguments after x and the axis."""
        return [*inspect.signature(self.function).parameters][2:]

    @property
    def required(self) -> list[str]:
        """Those of them that have no default."""
        given = inspect.signature(self.function).parameters
        return [
            name
            for name in self.arguments
            if given[name].default is inspect.Parameter.empty
        ]

    @property
    def signature(self) -> str:
        """As a user calls it, without types.

        >>> from pmod._core.collective import COLLECTIVES
        >>> COLLECTIVES["pick"].signature
        'pick(x, axis, *, src=0)'
        """
        plain = inspect.signature(self.function)
        shown = [p.replace(annotation=p.empty) for p in plain.parameters.values()]
        return self.name + str(
            plain.replace(parameters=shown, return_annotation=plain.empty)
        )


COLLECTIVES: dict[str, Collective] = {}


def collective(
    takes: Kind, gives: Kind, *, value: str, transpose: str = "", derivative: str = ""
) -> Callable[[F], F]:
    """Declare a public collective, by a decorator that gives the function back.

    transpose: the name of a collective, or words such as "the shift back"; derivative:
    of what is not linear.
    """

    def declare(f: F) -> F:
        COLLECTIVES[f.__name__] = Collective(
            f, takes, gives, transpose, derivative or transpose, value
        )
        return f

    return declare
