"""Where a rank is along an axis, and how all wait for one another."""

from __future__ import annotations

import torch
from torch.overrides import handle_torch_function

from pmod._collectives.values import SUM, Mean, send_pvary
from pmod._core.row import Row, V
from pmod._core.watch import told
from pmod._errors import PmodError, phrase
from pmod._mesh.ambient import resolve
from pmod._mesh.mesh import AxisLike
from pmod._site import origin
from pmod._torch import count_function_modes
from pmod._wire.along import wire_of
from pmod._wire.board import Said, code_of


def axis_index(axis: AxisLike) -> int:
    """Return this rank's index along the axis; of a tuple, in the flattened group.

    The first name of a tuple is the slowest. The index is a Python int, also in compiled
    code. JAX: lax.axis_index, which is traced.
    Raises: AxisError for an axis that the mesh lacks; NoMeshError if a name is given and
    no mesh is set.

    >>> pmod.simulate(lambda: pmod.axis_index(("data", "model")), data=2, model=2)
    [0, 1, 2, 3]
    """
    if count_function_modes() > 0:  # shard_map follows who knows where it is
        return handle_torch_function(axis_index, (), axis)
    return resolve(axis, "axis_index").index


def axis_size(axis: AxisLike) -> int:
    """The number of ranks along the axis; of a tuple, the product. JAX: lax.axis_size.

    Raises: as `axis_index`.

    >>> pmod.axis_size(mesh["model"])
    1
    """
    return resolve(axis, "axis_size").size


_BARRIER = Row("barrier", V, V, Mean, send_pvary)  # for watchers: nothing is bound


def barrier(axis: AxisLike) -> None:
    """Wait until every rank of the axis has come here.

    Raises: PmodError under torch.compile, whose graphs hold no effects.

    >>> pmod.barrier(mesh["model"])
    """
    if torch.compiler.is_compiling():
        raise PmodError(
            phrase(
                "barrier",
                "it is called in compiled code",
                "Call it outside the compiled function.",
            )
        )
    bound = resolve(axis, "barrier")
    with told(_BARRIER.along(bound, SUM), [], origin()):
        said = Said("barrier", code_of("barrier"), otherwise="nothing")
        wire_of(bound, bound.topology.device, said=said).barrier()
