"""NCCL: tensors on a GPU, for whose messages the host does not wait.

On ROCm it is RCCL, which torch calls by the same name.
"""

from __future__ import annotations

import torch

from pmod._ranks.backends import Backend
from pmod._wire.process_group import CARRIED, GroupWire

NCCL = Backend(
    "nccl",
    "cuda",
    GroupWire,
    blocks=False,
    in_graphs=True,
    set_device=torch.cuda.set_device,
    carries=CARRIED,
    sums=frozenset({torch.float32, torch.float64, torch.int32, torch.int64}),
)
