"""Rank 1 ends with 3 between two sums, unless torchrun has restarted it; the others say what they get instead."""

# pyright: standard

import sys

import torch

import pmod

mesh = pmod.make_mesh()
here = mesh.topology
pmod.psum(torch.ones(()), mesh["data"])
if here.rank == 1 and here.restart_count == 0:
    sys.exit(3)
try:
    total = pmod.psum(torch.ones(()), mesh["data"])
except Exception as error:
    print(f"rank {here.rank} got {type(error).__name__}.")
    raise
print(f"rank {here.rank} got {total:g}.")
