"""What the process imports from which ranks are forked: whatever a first compiled function imports takes a second."""

from __future__ import annotations

import importlib
import warnings

# pmod first, as users import it: it does not know yet that there will be an Inductor
NAMES = ("hypothesis", "pytest", "pmod", "torch._dynamo", "torch._inductor.lowering", "functorch.compile")

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, where Inductor uses it
    warnings.simplefilter("ignore", FutureWarning)
    for name in NAMES:
        importlib.import_module(name)
