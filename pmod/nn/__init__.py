"""Layers over tensors that are cut: `pmod.nn.functional`, torch.nn.functional on shards
of a field, and `pmod.nn.tensor_parallel`, a model some of whose layers are cut.
"""

from pmod.nn import functional as functional
from pmod.nn.tensor_parallel import Column as Column
from pmod.nn.tensor_parallel import column as column
from pmod.nn.tensor_parallel import tensor_parallel as tensor_parallel
