"""What is changed in place in the body of a `shard_map`, and what shares its memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pmod._collectives.values import differentiated
from pmod._core.arguments import wrong
from pmod._core.leaves import tensors_in
from pmod._errors import ArgumentError, PmodError, phrase
from pmod._mesh.ambient import resolve
from pmod._shard.known import NONE, Axes, KnownKinds, here, version_in_eager
from pmod._shard.operations import VIEWS
from pmod._shard.traced import show_writes, writes_traced
from pmod._torch import FOREACH, base_of, has_storage


class Writes:
    """Changes in place: what they make of a kind, and which of them are seen."""

    def __init__(self, known: KnownKinds) -> None:
        self._known = known
        # while compiling: views whose base is not known
        self._views: dict[Tensor, bool] = {}
        # while compiling: the writes in the graph when control was here last
        self._shown = (0, 0)
        if torch.compiler.is_compiling():
            show_writes()
            self._shown = writes_traced()

    def change(self, x: Tensor, axes: Axes) -> None:
        """Let what is changed in place vary along these axes from now on.

        Where it has a derivative already, that cannot be undone; and the buffers of a
        module are to be one value in its next call, too.
        """
        new = axes - self._known.of(x)
        if new and x.requires_grad and differentiated(x):
            given = f"what is one value along {sorted(new)} is changed in place by what varies"
            right = "Change its pvary copy, pmod.pvary(x, axis).clone()."
            raise ArgumentError(phrase("shard_map", here() + given, right))
        if new and self._is_buffer(x):
            given = f"a buffer of the module, one value along {sorted(new)}, is changed by what varies"
            right = "Change it by what is one value (pmod.pmean). A norm keeps no statistics of its shards in eval(), "
            right += "or with track_running_stats=False."
            raise ArgumentError(phrase("shard_map", here() + given, right))
        self._known.note(x, axes)
        base = base_of(x)
        if base is not None:
            self._known.note(base, axes)
        # other views of its memory vary too, such as x.data and x.detach()
        if not torch.compiler.is_compiling() and has_storage(x):
            written, memory = self._known.written, x.untyped_storage()
            written[memory] = axes | written.get(memory, NONE)

    def _is_buffer(self, x: Tensor) -> bool:
        for module in self._known.modules:
            for buffer in module.buffers():
                if x is buffer or base_of(x) is buffer:
                    return True
        return False

    def note_changed(
        self, xs: Sequence[Tensor], before: Sequence[int], axes: Axes
    ) -> None:
        """Let those vary that an operation has changed.

        An operator of the user's may change any. before: their versions before it.
        """
        after = versions(xs)
        for x, old, new in zip(xs, before, after, strict=True):
            if old != new:
                self._known.refresh(x)
                self.change(x, axes)
                self._note_memory(x)

    def _note_memory(self, x: Tensor) -> None:
        """Note what the memory of x holds now, for other tensors that share it."""
        if has_storage(x):
            memory, known = self._known.memory, x.untyped_storage()
            memory[known] = self._known.of(x) | memory.get(known, NONE)

    def keep_count(self) -> None:
        """While compiling: note the writes in the graph up to here."""
        self._shown = writes_traced()

    def check_shown(self) -> None:
        """Raise if the tracer hid a write: what varies may be in what is one value."""
        if not torch.compiler.is_compiling():
            return
        graph, n = writes_traced()
        before, shown = self._shown
        if graph == before and n != shown:
            raise self._hidden(
                "a change in place, such as y[i] = x, that torch.compile does not show"
            )

    def check_shown_whole(self, name: str, changed: list[Tensor], axes: Axes) -> None:
        """While compiling: raise unless all that shares memory with these is known."""
        if not axes:
            return
        for x in changed:
            if x not in self._known.entries:
                raise self._hidden(
                    f"what {name} writes into a tensor that torch.compile shows anew, as x.data"
                )
            hides_base = name.startswith(FOREACH) or x in self._views
            if hides_base and axes - self._known.of(x):
                raise self._hidden(
                    f"what varies that {name} writes into one value, in a list or by a view of it"
                )

    def _hidden(self, what: str) -> PmodError:
        given = f"under torch.compile it cannot follow {what}"
        right = (
            "Use torch.where, torch.cat or torch.stack, or run this function eagerly."
        )
        whole = resolve(self._known.mesh, "shard_map")
        return wrong(ArgumentError, "shard_map", whole, given, right)

    def note_views(self, name: str, taken: list[Tensor], result: object) -> None:
        """While compiling: note views whose base is hidden, and views of those."""
        if name not in VIEWS:
            return
        if name == "detach" or any([x in self._views for x in taken]):
            for y in tensors_in(result):
                self.note_view(y)

    def note_view(self, y: Tensor) -> None:
        """While compiling: note a view whose base the tracer does not show."""
        self._views[y] = True


def versions(xs: Sequence[Tensor]) -> list[int]:
    """Return how often each was changed in place."""
    return [version_in_eager(x) for x in xs]
