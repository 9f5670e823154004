"""Layers over tensors that are cut in space: `pmod.nn.functional`, torch.nn.functional
on shards.
"""

from pmod.nn import functional as functional
