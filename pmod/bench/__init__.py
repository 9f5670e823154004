"""`python -m pmod.bench`: what pmod costs beside the raw calls of torch.distributed.

It measures where it runs.
"""

from pmod.bench.command import main as main
