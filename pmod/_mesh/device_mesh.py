"""A mesh as torch's ``DeviceMesh``, and the other way round: the groups are shared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pmod._errors import ArgumentError, AxisError, phrase
from pmod._mesh.make import make_mesh
from pmod._mesh.mesh import Mesh
from pmod._ranks import groups, world

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def device_mesh_of(mesh: Mesh) -> DeviceMesh:
    """Return a torch ``DeviceMesh`` over the process groups of all axes."""
    from torch.distributed.device_mesh import DeviceMesh

    names = mesh.axis_names
    if not names:
        raise AxisError(
            phrase(
                "Mesh.device_mesh",
                "the mesh has no axis",
                "Make it with one axis or more.",
            )
        )
    its_groups = [mesh.group(name) for name in names]
    kind = mesh.device.type
    ranks = mesh.ranks
    # torch takes the one group of one axis by itself, with a list of ranks
    if len(names) == 1:
        return DeviceMesh.from_group(
            its_groups[0], kind, mesh=ranks.tolist(), mesh_dim_names=names
        )
    return DeviceMesh.from_group(
        its_groups, kind, mesh=torch.from_numpy(ranks.copy()), mesh_dim_names=names
    )


def mesh_of(device_mesh: DeviceMesh) -> Mesh:
    """Return the mesh of a ``DeviceMesh``, and use its groups from now on."""
    ranks: object = getattr(device_mesh, "mesh", None)
    if not isinstance(ranks, torch.Tensor):
        given = f"device_mesh is a {type(device_mesh).__name__}"
        raise ArgumentError(
            phrase("Mesh.from_device_mesh", given, "Pass a torch DeviceMesh.")
        )
    names = device_mesh.mesh_dim_names
    if not names:
        names = tuple([f"dim{number}" for number in range(ranks.ndim)])
    sizes = dict(zip(names, ranks.shape, strict=True))
    listed = ranks.reshape(-1).tolist()
    mesh = make_mesh(sizes, ranks=listed, topology=world.to_connect())
    # a rank outside has no group to share
    if mesh.coords is None:
        return mesh
    for number, name in enumerate(names):
        axis = mesh.bind(name, "Mesh.from_device_mesh")
        group = device_mesh.get_group(number)
        groups.adopt(axis.group_key, axis.ranks, group, axis.topology, axis.timeout)
    return mesh
