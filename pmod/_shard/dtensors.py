"""From shards to torch's DTensors and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pmod._core.arguments import split_sizes
from pmod._core.leaves import map_tensors
from pmod._core.tree import unflatten
from pmod._errors import ShapeError
from pmod._mesh.mesh import Mesh
from pmod._shard.spec import P, Specs, names_in, unfit
from pmod._shard.specs import checked_tree, compare_left_out, whole_shapes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def as_dtensor(
    x: Tensor,
    spec: P,
    sizes: Mapping[int, tuple[int, ...]],
    device_mesh: DeviceMesh,
    mesh: Mesh,
    function: str,
    where: str,
) -> DTensor:
    """Return the DTensor that a local tensor is a shard of."""
    from torch.distributed.tensor import DTensor

    shape = [int(length) for length in x.shape]
    for dim, held in sizes.items():
        shape[dim] = sum(held)
    for dim, held in sizes.items():
        parts = tuple([mesh.shape[name] for name in names_in(spec.entries[dim])])
        cut = split_sizes(shape[dim], parts)
        if held != cut:
            what = f"dim {dim} is cut in {held}, and DTensor cuts {shape[dim]} in {cut}"
            right = f"Use shards of the lengths of split_sizes({shape[dim]}, {parts})."
            raise unfit(
                ShapeError, function, where, what, spec, tuple(x.shape), mesh, right
            )
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return DTensor.from_local(
        x,
        device_mesh,
        spec.placements(mesh),
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(strides),
    )


def to_dtensors(tree: object, specs: Specs, *, mesh: Mesh | None = None) -> Any:
    """Return local shards as DTensors: for torch's distributed checkpoints (DCP).

    The DTensors share the storage of the shards. What DCP loads into them is in the
    tensors that went in; `from_dtensors` gives local tensors back. Nothing is
    differentiated.
    Cost: the lengths of the shards, one small message for each axis that cuts
    something.
    Raises: ShapeError if shards are not as long as `split_sizes` says, which DTensor
    cannot hold. Under `debug` MismatchError if a leaf differs along an axis that its
    spec leaves out: of such a leaf a checkpoint would hold the value of any rank.

        state = pmod.to_dtensors(dict(model.named_parameters()), specs)
        torch.distributed.checkpoint.save(state, checkpoint_id="step_100")

    >>> pmod.to_dtensors(torch.ones(2), pmod.P("model"), mesh=mesh).placements
    (Replicate(), Shard(dim=0))
    """
    mesh, everywhere, found = checked_tree(tree, specs, mesh, "to_dtensors")
    compare_left_out(found, mesh, "to_dtensors")
    # it raises if there is none, so it is asked for before anything is sent
    device_mesh = mesh.device_mesh
    sizes = whole_shapes(found, mesh, "to_dtensors")
    made = [
        as_dtensor(x.detach(), spec, held, device_mesh, mesh, "to_dtensors", where)
        for (x, spec, where), held in zip(found, sizes, strict=True)
    ]
    return unflatten(tree, "to_dtensors", everywhere, made)


def from_dtensors(tree: object) -> Any:
    """Return the local shards of the DTensors in a tree, and all else as it is.

    The shards share the storage of the DTensors. Nothing is sent.
    >>> pmod.from_dtensors({"w": pmod.to_dtensors(torch.ones(2), pmod.P("model"), mesh=mesh)})
    {'w': tensor([1., 1.])}
    """
    from torch.distributed.tensor import DTensor

    return map_tensors(lambda x: x.to_local() if isinstance(x, DTensor) else x, tree)
