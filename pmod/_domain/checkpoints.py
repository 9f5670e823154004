"""Activation checkpoints: what runs again in backward runs on blocks again."""

from __future__ import annotations

import contextlib
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
    @wraps(generator)
    def of_domain(
        fn: Any,
        preserve_rng_state: bool = True,
        context_fn: Callable[[], Contexts] = checkpoint.noop_context_fn,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        d = domain_here()
        if d is None:
            return generator(fn, preserve_rng_state, context_fn, *args, **kwargs)
        recompute = again(d)

        def contexts() -> Contexts:
            forward, backward = context_fn()
            return forward, _Both(backward, recompute)

        return generator(fn, preserve_rng_state, contexts, *args, **kwargs)

    return of_domain
