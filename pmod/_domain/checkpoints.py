"""Activation checkpoints: what runs again in backward runs on blocks again."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch.utils.checkpoint as checkpoint

from pmod._domain.mode import again, domain_here
from pmod._torch import replace_checkpoints

Contexts = tuple[
    contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]
]


class _Both:
    """Two contexts as one, which may be entered repeatedly."""

    def __init__(self, outer: Any, inner: Any) -> None:
        self._outer, self._inner = outer, inner

    def __enter__(self) -> None:
        self._outer.__enter__()
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)
        self._outer.__exit__(*error)


def follow_checkpoints() -> None:
    """Let torch's checkpoints that run in a domain run again in it.

    torch looks its generator of both passes up by name, so that one place serves all
    that imported `checkpoint` already. Once a process; outside of a domain nothing
    changes.
    """
    replace_checkpoints(_followed)


def _followed(generator: Callable[..., Any]) -> Callable[..., Any]:
    # versions of torch take what follows fn in different ways
    signature = inspect.signature(generator)

    @wraps(generator)
    def of_domain(*given: Any, **named: Any) -> Any:
        d = domain_here()
        if d is None:
            return generator(*given, **named)
        call = signature.bind(*given, **named)
        context_fn = call.arguments.get("context_fn", checkpoint.noop_context_fn)
        recompute = again(d)

        def contexts() -> Contexts:
            forward, backward = context_fn()
            return forward, _Both(backward, recompute)

        call.arguments["context_fn"] = contexts
        return generator(*call.args, **call.kwargs)

    return of_domain
