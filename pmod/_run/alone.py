"""One rank whose messages go nowhere."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch

from pmod._errors import ArgumentError, PmodError, phrase
from pmod._mesh.ambient import set_mesh
from pmod._mesh.make import make_mesh
from pmod._mesh.mesh import Mesh
from pmod._mesh.sizes import check_axis_sizes
from pmod._ranks import world
from pmod._ranks.topology import Topology
from pmod._wire.nobody import Nobody


@contextmanager
def alone_on(mesh: Mesh | Mapping[str, int], function: str) -> Generator[Mesh]:
    """Make this process one rank of a mesh whose other ranks do not exist.

    Its collectives reach nobody.
    """
    if not world.current().by_processes:
        raise PmodError(
            phrase(
                function, "this is a simulated rank already", "Call it from outside."
            )
        )
    if torch.compiler.is_compiling():
        raise PmodError(
            phrase(
                function, "it is called in compiled code", "Pass it the eager function."
            )
        )
    if not isinstance(mesh, Mesh):
        mesh = _mesh_of(mesh, function)
    nobody = Nobody(world.processes(), mesh.topology)
    with world.instead_of_processes(nobody), set_mesh(mesh):
        yield mesh


def _mesh_of(sizes: Mapping[str, int], function: str) -> Mesh:
    """Return a mesh of these sizes at rank 0, on the device of this process."""
    if not isinstance(sizes, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        given = f"mesh is a {type(sizes).__name__}"
        right = "Pass a pmod.Mesh, or sizes: mesh={'data': 64}."
        raise ArgumentError(phrase(function, given, right))
    example = f"{function}(fn, ..., mesh={{'data': 64}})"
    checked = check_axis_sizes(sizes, function, example)
    size, device = math.prod(checked.values()), world.here().device
    # A topology by hand, so that nothing is detected or connected.
    place = Topology(rank=0, world_size=size, device=device)
    return make_mesh(checked, topology=place)
