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
    """Make this process one rank of a mesh whose other ranks do not exist; its
    collectives reach nobody.
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
        if not isinstance(mesh, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            given, right = (
                f"mesh is a {type(mesh).__name__}",
                "Pass a pmod.Mesh, or sizes: mesh={'data': 64}.",
            )
            raise ArgumentError(phrase(function, given, right))
        mesh = check_axis_sizes(
            mesh, function, f"{function}(fn, ..., mesh={{'data': 64}})"
        )
        place = Topology(
            rank=0, world_size=math.prod(mesh.values()), device=world.here().device
        )
        mesh = make_mesh(mesh, topology=place)
    with (
        world.instead_of_processes(Nobody(world.processes(), mesh.topology)),
        set_mesh(mesh),
    ):
        yield mesh
