"""What the public collectives are, as data: kinds, values, derivatives.

`@collective` stands on the public function, and lets it remember its calls
(`_core/ready.py`). Whoever shows or checks collectives reads `COLLECTIVES`: pictures,
`explain`, the table that `python -m pmod.collectives` prints, tests. What moves is in
the rows that a collective binds (`_core/row.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar

import attrs

from pmod._core.ready import remembering
from pmod._core.row import Kind

F = TypeVar("F", bound=Callable[..., object])


@attrs.frozen
class Collective:
    """A public function that moves tensors along an axis."""

    function: Callable[..., object]
    takes: Kind
    gives: Kind
    # "" if it is not linear
    transpose: str
    # in words; the transpose, if there is one
    derivative: str
    # in words: what each rank gets
    value: str

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def kinds(self) -> str:
        """Return the kinds as pictures and messages write them.

        >>> from pmod._core.collective import COLLECTIVES
        >>> COLLECTIVES["shard"].kinds
        'I -> V'
        """
        return f"{self.takes} -> {self.gives}"

    @property
    def arguments(self) -> list[str]:
        """Return the names of its arguments after x and the axis."""
        return [*inspect.signature(self.function).parameters][2:]

    @property
    def required(self) -> list[str]:
        """Return those of them that have no default."""
        given, none = (
            inspect.signature(self.function).parameters,
            inspect.Parameter.empty,
        )
        return [name for name in self.arguments if given[name].default is none]

    @property
    def signature(self) -> str:
        """Return how a user calls it, without types.

        >>> from pmod._core.collective import COLLECTIVES
        >>> COLLECTIVES["pick"].signature
        'pick(x, axis, *, src=0)'
        """
        plain = inspect.signature(self.function)
        shown = [p.replace(annotation=p.empty) for p in plain.parameters.values()]
        untyped = plain.replace(parameters=shown, return_annotation=plain.empty)
        return f"{self.name}{untyped}"


COLLECTIVES: dict[str, Collective] = {}


def collective(
    takes: Kind, gives: Kind, *, value: str, transpose: str = "", derivative: str = ""
) -> Callable[[F], F]:
    """Declare a public collective, which sends at once what it has sent before.

    transpose: the name of a collective, or words such as "the shift back"; derivative:
    of what is not linear.
    """

    def declare(f: F) -> F:
        remembered = remembering(f)
        COLLECTIVES[f.__name__] = Collective(
            remembered, takes, gives, transpose, derivative or transpose, value
        )
        return remembered

    return declare
