"""Adds a number over the ranks; each says who it is, where they met, and the sum."""

# pyright: standard

import sys

import torch

import pmod

mesh = pmod.make_mesh()
total = pmod.psum(torch.tensor(float(sys.argv[1])), mesh["data"])
here = mesh.topology
print(f"{here.launcher} {here.rank}/{here.world_size} met at {here.master_addr}:{here.master_port}, sum {total:g}.")
