"""The table of derivatives: a row is a linear map between the ranks, declared once with
its transpose.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

import attrs
from torch import Tensor

from pmod._mesh.axis import Axis
from pmod._torch import constant_in_graphs
from pmod._wire.base import Wire
from pmod._wire.sent import Sent

Kind: TypeAlias = Literal["V", "I"]
Params: TypeAlias = tuple[Any, ...]
"""Numbers, strings, None, and tuples of them: they are written into compiled graphs."""

V: Kind = "V"
I: Kind = "I"  # noqa: E741


@attrs.frozen
class Row:
    """One linear operator. `send` gets a tensor, the wire and the parameters; what
    moves nothing returns a tensor.
    """

    name: str
    takes: Kind
    gives: Kind
    send: Callable[[Tensor, Wire, Params], Sent[Tensor] | Tensor]
    flip: Callable[[Params], Params] = lambda params: (
        params
    )  # the transpose's parameters
    fused: bool = (
        False  # elementwise: many tensors of one dtype and device travel as one message
    )
    local: bool = False  # nothing moves, and no layout has to be agreed on
    alone: bool = True  # on an axis of one rank it is the identity
    why: str = ""  # it is called in a backward, as the transpose of another
    # of parameters and shape, what is the same on all ranks, where that is not all of
    # it
    agreed: (
        Callable[[Params, tuple[int, ...]], tuple[Params, tuple[int, ...]]] | None
    ) = None
    # of a fused row: the shapes of the results on the rank of this index, None where
    # they are those of the inputs; of others `send` must know how many elements arrive,
    # its last parameter
    resized: (
        Callable[[Params, Sequence[Tensor], int], list[list[int]] | None] | None
    ) = None

    @property
    def T(self) -> Row:
        """The transpose."""
        return ROWS[_TRANSPOSES[self.name]]


ROWS: dict[str, Row] = {}
_TRANSPOSES: dict[str, str] = {}


def pair(row: Row, transpose: Row) -> tuple[Row, Row]:
    """Declare two rows as each other's transposes."""
    assert (row.takes, row.gives) == (transpose.gives, transpose.takes), (
        f"{row.name}: the kinds of a transpose reverse"
    )
    for a, b in ((row, transpose), (transpose, row)):
        ROWS[a.name] = a
        _TRANSPOSES[a.name] = b.name
    return row, transpose


def without_derivative(row: Row) -> Row:
    """Declare a row that is never differentiated: its callers detach what they pass."""
    ROWS[row.name] = row
    return row


class Call(NamedTuple):
    """A row with its axis and parameters: hashable, no tensor in it."""

    row: Row
    axis: Axis
    params: Params

    @property
    def T(self) -> Call:
        """The transposed call."""
        return Call(self.row.T, self.axis, self.row.flip(self.params))


@constant_in_graphs
def encode(name: str, axis_key: str, params: Params) -> str:
    """The call as text."""
    return f"{name}|{params!r}|{axis_key}"


def decode(call: str) -> Call:
    """The call that `encode` wrote."""
    row, params, axis_key = _read(call)
    return Call(row, Axis.parse(axis_key), params)


@lru_cache(maxsize=4096)
def _read(call: str) -> tuple[Row, Params, str]:
    """Of a call its row and parameters, and the axis as text: a memo must not keep a
    mesh alive.
    """
    name, params, axis_key = call.split("|", 2)
    return ROWS[name], ast.literal_eval(params), axis_key
