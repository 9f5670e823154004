"""Small values that every rank tells every other, as JSON."""

from __future__ import annotations

import json
from typing import Any

import torch

from pmod._collectives.ragged import all_gather_v
from pmod._mesh.mesh import Mesh
from pmod._ranks import world


def gather_json(value: object, mesh: Mesh) -> list[Any]:
    """Return what each rank of the mesh hands in, in mesh order, on all of them.

    It travels as JSON, so nothing that arrives is run.
    """
    text = json.dumps(value).encode()
    mine = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(
        world.number_device()
    )
    axes = mesh[mesh.axis_names]
    sizes = all_gather_v(
        torch.tensor([len(text)], device=mine.device), axes, sizes=[1] * mesh.size
    ).tolist()
    joined = all_gather_v(mine, axes, sizes=sizes).cpu()
    return [json.loads(bytes(part.tolist())) for part in joined.split(sizes)]
