"""Bytes, counted where they are handed to the process groups."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import attrs

from pmod import _wire
from pmod._errors import PmodError, explain
from pmod._wire import GroupWire


@attrs.define
class Traffic:
    """Bytes that this rank sent to other ranks."""

    sent: int = 0


@contextmanager
def counted() -> Generator[Traffic]:
    """Count what this process sends to other ranks, while in the block, on any thread.

    That is what its wires hand to torch's process groups. Exact for what goes from one rank to another; where a backend
    chooses the way by itself, the sum of a small tensor on gloo and every sum on NCCL, it is what a ring sends. Ranks
    that are simulated send nothing.
    """
    traffic = Traffic()

    def wire(size: int, index: int, group: Any) -> GroupWire:
        return GroupWire(size, index, _Counted(group, size, index, traffic))  # type: ignore[arg-type] # it acts as one

    _wire.GroupWire = wire  # type: ignore[assignment] # pmod._wire has no hook for this
    try:
        yield traffic
    finally:
        _wire.GroupWire = GroupWire


class _Counted:
    """A process group that notes the bytes it is given."""

    def __init__(self, group: Any, size: int, index: int, traffic: Traffic) -> None:
        self._group, self._size, self._index, self._traffic = group, size, index, traffic

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._group, name)
        if name not in _BYTES:
            raise PmodError(explain("demo", f"what {name} sends is not known", "Add it to the table in traffic.py."))

        def noted(*args: Any) -> Any:
            self._traffic.sent += _BYTES[name](self._size, self._index, args)
            return function(*args)

        return noted


def _apart(size: int, index: int, args: Any) -> int:
    x, counts = args[1], args[3]
    return (sum(counts) - counts[index]) * x.element_size()


_BYTES: dict[str, Callable[[int, int, Any], int]] = {
    "alltoall_base": _apart,
    "send": lambda size, index, args: args[0][0].nbytes,
    "recv": lambda size, index, args: 0,
    "allgather": lambda size, index, args: (size - 1) * args[1][0].nbytes,
    "_allgather_base": lambda size, index, args: (size - 1) * args[1].nbytes,
    "_reduce_scatter_base": lambda size, index, args: (size - 1) * args[1].nbytes // size,
    "allreduce": lambda size, index, args: 2 * (size - 1) * args[0][0].nbytes // size,
}
