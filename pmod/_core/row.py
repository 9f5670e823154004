"""The table of derivatives: a row is a linear map between the ranks, declared once with
its transpose.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

import attrs
from torch import Tensor

from pmod._mesh.axis import Axis
from pmod._torch import constant_in_graphs
from pmod._version import __version__ as VERSION
from pmod._wire.along import group_in_graphs
from pmod._wire.base import AtOnce, Wire
from pmod._wire.sent import Sent

Kind: TypeAlias = Literal["V", "I"]
Params = TypeVar("Params", bound=tuple[Any, ...])
"""The parameters of a row: a NamedTuple of numbers, strings, None, and tuples of them,
because they are written into compiled graphs.
"""

V: Kind = "V"
I: Kind = "I"  # noqa: E741


def _same(params: Params) -> Params:
    return params


@attrs.frozen
class Row(Generic[Params]):
    """A linear operator with parameters of the class `params`.

    `send` gets a tensor, the wire and the parameters; a row that moves nothing returns
    a tensor. `flip` gives the parameters of the transpose, which have the same class.
    """

    name: str
    takes: Kind
    gives: Kind
    params: type[Params]
    send: Callable[[Tensor, Wire, Params], Sent[Tensor] | Tensor]
    flip: Callable[[Params], Params] = _same
    # elementwise: many tensors of one dtype and device travel as one message
    fused: bool = False
    local: bool = False  # nothing moves, and no layout has to be agreed on
    alone: bool = True  # on an axis of one rank it is the identity
    why: str = ""  # it is called in a backward, as the transpose of another
    # the part of the parameters and the shape that is the same on all ranks; None where
    # all of it is
    agreed: (
        Callable[[Params, tuple[int, ...]], tuple[tuple[Any, ...], tuple[int, ...]]]
        | None
    ) = None
    # what is done per call on a contiguous tensor of this shape and dtype, where the
    # wire has a way of its own for it: the same as by `send`
    at_once: Callable[[Tensor, Wire, Params], AtOnce | None] | None = None
    # of a fused row whose results may have other shapes than its inputs: the parameters
    # with what `send` must know of them, and the shapes on the rank of this index
    resized: (
        Callable[[Params, Sequence[Tensor], int], tuple[Params, list[list[int]]] | None]
        | None
    ) = None

    @property
    def T(self) -> Row[Params]:
        """The transpose."""
        return ROWS[TRANSPOSES[self.name]]

    def along(self, axis: Axis, params: Params) -> Call:
        """Return the call of this row along an axis."""
        return Call(self, axis, params)


ROWS: dict[str, Row[Any]] = {}
TRANSPOSES: dict[str, str] = {}


def pair(row: Row[Params], transpose: Row[Params]) -> tuple[Row[Params], Row[Params]]:
    """Declare two rows as each other's transposes."""
    assert (row.takes, row.gives) == (transpose.gives, transpose.takes), (
        f"{row.name}: the kinds of a transpose reverse"
    )
    for a, b in ((row, transpose), (transpose, row)):
        ROWS[a.name] = a
        TRANSPOSES[a.name] = b.name
    return row, transpose


def without_derivative(row: Row[Params]) -> Row[Params]:
    """Declare a row that is never differentiated: its callers detach what they pass."""
    ROWS[row.name] = row
    return row


class Call(NamedTuple):
    """A row with its axis and parameters: hashable, no tensor in it."""

    row: Row[Any]
    axis: Axis
    params: Any  # of the row's class: `Row.along` has them checked

    @property
    def T(self) -> Call:
        """The transposed call."""
        return Call(self.row.T, self.axis, self.row.flip(self.params))


def encode(name: str, axis_key: str, params: tuple[Any, ...], version: str = "") -> str:
    """Return the call as text: its parameters are a plain tuple there.

    version: of what a compiler makes of the call. It keeps what it has made under this
    text.
    """
    return f"{name}|{version}|{tuple(params)!r}|{axis_key}"


@constant_in_graphs
def encode_in_graph(name: str, axis_key: str, params: tuple[Any, ...]) -> str:
    """Return the call as text, with the group by which compiled code sends it."""
    version = ""
    if not ROWS[name].local:
        group = group_in_graphs(Axis.parse(axis_key))
        version = f"{VERSION} {group}" if group else ""
    return encode(name, axis_key, params, version)


def group_of(call: str) -> str:
    """Return the name of the group by which compiled code sends a call; "" for none."""
    return call.split("|", 2)[1].rpartition(" ")[2]


def decode(call: str) -> Call:
    """Return the call that `encode` wrote, its parameters of the row's class again."""
    row, params, axis_key = _read(call)
    return Call(row, Axis.parse(axis_key), params)


@lru_cache(maxsize=4096)
def _read(call: str) -> tuple[Row[Any], tuple[Any, ...], str]:
    """Return the row, the parameters and the axis of a call.

    The axis is text, because a memo must not keep a mesh alive.
    """
    name, _, params, axis_key = call.split("|", 3)
    row = ROWS[name]
    return row, row.params(*ast.literal_eval(params)), axis_key
