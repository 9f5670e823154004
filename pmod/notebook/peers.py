"""Values between processes that are the ranks themselves.

Such are a kernel of jupyter-distributed, or IPython under mpirun. What the network
brings is read by the unpickler that torch has for checkpoints of strangers. It makes
tensors, arrays, numbers, texts and containers, and calls nothing else.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch

import pmod
from pmod._errors import ArgumentError, phrase
from pmod._mesh.mesh import Mesh
from pmod._ranks import world

# what numpy's arrays and numbers are made with, besides what torch knows
_DTYPES = {type(np.dtype(code)) for code in np.typecodes["All"]}
_NUMPY: list[Any] = [
    np.ndarray,
    np.dtype,
    bytes,
    np.empty(0).__reduce__()[0],
    np.float64().__reduce__()[0],
    *_DTYPES,
]


def gathered(value: object, mesh: Mesh, function: str) -> list[Any]:
    """Return the value of each rank, in the order of the mesh, tensors on the CPU.

    All ranks of the mesh call it together.
    Raises: ArgumentError on all of them if a rank has a value that is not a tensor,
    array, number, text or container of these.
    """
    if mesh.size == 1:
        return [value]
    device = world.number_device()
    packed = torch.frombuffer(bytearray(_packed(value)), dtype=torch.uint8).to(device)
    size = packed.new_tensor([packed.numel()], dtype=torch.int64)
    sizes = pmod.all_gather(size, mesh).tolist()
    parts = pmod.all_gather_v(packed, mesh, sizes=sizes).cpu().split(sizes)
    values: list[object] = []
    for rank, part in zip(mesh.ranks.reshape(-1), parts, strict=True):
        value, refused = _unpacked(part.numpy().tobytes())
        if refused:
            given = f"on rank {rank} the value holds {refused}"
            right = (
                "Between ranks go tensors, arrays, numbers, texts, "
                "and dicts, lists and tuples of them."
            )
            raise ArgumentError(phrase(f"notebook.{function}", given, right))
        values.append(value)
    return values


def _packed(value: object) -> bytes:
    """Return the bytes of (value, ""), or of (None, what in it does not travel)."""
    buffer = io.BytesIO()
    try:
        torch.save((value, ""), buffer)
        buffer.seek(0)
        with torch.serialization.safe_globals(_NUMPY):
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(buffer)
            refused = ", ".join(unsafe)
    # the pickling of a user's class may raise anything; the other ranks wait for this
    # one, and are told in place of its value
    except Exception as error:
        refused = f"what cannot be pickled ({type(error).__name__}: {error})"
    if refused:
        buffer = io.BytesIO()
        torch.save((None, refused), buffer)
    return buffer.getvalue()


def _unpacked(packed: bytes) -> tuple[object, str]:
    with torch.serialization.safe_globals(_NUMPY):
        return torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)
