"""What a wrong call raises, on each rank of a simulation, and its exact text."""

# pyright: standard

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pmod

SIZES = {"data": 2, "model": 2}


def raised_by(call: Callable[[], Any]) -> BaseException | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def on_all_ranks(call: Callable[[], Any]) -> list[tuple[pmod.Mesh, BaseException | None]]:
    return pmod.simulate(lambda: (pmod.current_mesh(), raised_by(call)), **SIZES)


def check(error: BaseException | None, kind: type[BaseException], text: str) -> None:
    assert error is not None, "nothing was raised"
    assert type(error) is kind, repr(error)
    assert str(error) == text
    hidden = error.__context__ is None or error.__suppress_context__
    assert hidden, "shown as a consequence of an error inside pmod"
