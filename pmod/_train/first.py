"""One rank that goes ahead of the others."""

from __future__ import annotations

from types import TracebackType

import torch

from pmod._collectives.values import pick
from pmod._core.arguments import check_flag
from pmod._errors import PmodError, coordinates, phrase
from pmod._mesh.ambient import current_mesh
from pmod._mesh.make import make_mesh
from pmod._mesh.mesh import AxisLike, Mesh
from pmod._ranks import world
from pmod._site import call_site, on_behalf_of


def _ahead_of(axis: AxisLike | None, per_node: bool, function: str) -> Mesh:
    """Return the ranks of which the first goes ahead.

    They are those of the axis, or of the whole mesh; if asked, of this node only.
    """
    check_flag(per_node, function, "per_node")
    if axis is None:
        mesh = current_mesh()
    elif isinstance(axis, Mesh):
        mesh = axis
    else:
        mesh = current_mesh()[axis]
    if mesh.coords is None:
        given = "this rank is outside the mesh"
        right = "Call it on the ranks of the mesh only."
        raise PmodError(phrase(function, given, right, axis=axis))
    if not per_node:
        return mesh
    place = mesh.topology
    here: list[int] = []
    for rank in mesh.ranks.reshape(-1).tolist():
        if rank // place.local_world_size == place.node_rank:
            here.append(rank)
    return make_mesh({"node": len(here)}, ranks=here, topology=place)


def is_first(axis: AxisLike | None = None, *, per_node: bool = False) -> bool:
    """Return whether this rank is the first of the axis, or of the mesh.

    With per_node, the first of those on its node. Nothing is sent. It is for what one
    rank does alone, such as prints and files. If the others need what it does, use
    `first_rank_first`.

    >>> pmod.simulate(lambda: pmod.is_first("model"), data=2, model=2)
    [True, False, True, False]
    """
    mesh = _ahead_of(axis, per_node, "is_first")
    return int(mesh.ranks.reshape(-1)[0]) == mesh.topology.rank


class first_rank_first:  # lower case: it reads as the function it is called as
    """Let the first rank run the block, and the others run it after that.

    It is for what fills a cache: downloads, compiled extensions, preprocessed files.
    The first rank is that of the axis, or of the mesh; with per_node, the first one on
    each node. If it fails, all ranks raise. The block calls no collective of these
    ranks.
    Cost: one message of 512 bytes.
    Raises: on the others PmodError, with what the first one raised.

    >>> def cached():
    ...     with pmod.first_rank_first():
    ...         return "downloaded" if pmod.is_first() else "found"
    >>> pmod.simulate(cached, data=2)
    ['downloaded', 'found']
    """

    def __init__(self, axis: AxisLike | None = None, *, per_node: bool = False) -> None:
        self._mesh = _ahead_of(axis, per_node, "first_rank_first")
        self._leads = int(self._mesh.ranks.reshape(-1)[0]) == self._mesh.topology.rank
        # one place for all, although the first rank sends at the end of the block
        self._origin = ("first_rank_first", call_site()[1])

    def __enter__(self) -> None:
        if self._leads:
            return
        failure = self._tell("")
        if failure:
            first = int(self._mesh.ranks.reshape(-1)[0])
            ahead = coordinates(self._mesh.coords_of(first))
            given = f"the rank {ahead} that went ahead raised {failure}"
            raise PmodError(phrase("first_rank_first", given))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._leads:
            self._tell("" if error is None else f"{type(error).__name__}: {error}")

    def _tell(self, failure: str) -> str:
        """Return on all ranks what the first one says."""
        if self._mesh.size == 1:
            return failure
        text = failure.encode()[:512]
        message = torch.tensor(
            list(text.ljust(512, b"\0")),
            dtype=torch.uint8,
            device=world.number_device(),
        )
        with on_behalf_of(self._origin):
            said = pick(message, self._mesh)
        return bytes(said.tolist()).rstrip(b"\0").decode(errors="replace")
