"""torch's fake process group: it sends nothing, and what arrives has no values.

It stands in for any number of ranks in one process: to see how much the host has to do
for a message, to trace, and to test. A message takes the way that it takes by NCCL.
"""

from __future__ import annotations

from pmod._ranks.backends import Backend
from pmod._wire.nccl import NCCL
from pmod._wire.process_group import GroupWire

FAKE = Backend(
    "fake",
    "cpu",
    GroupWire,
    blocks=False,
    in_graphs=True,
    carries=NCCL.carries,
    sums=NCCL.sums,
)
