"""Adds a number over the ranks; each says who it is, where they met, and the sum.

A second argument changes variables that the launcher set, case by case, and compares what is then detected: JSON, a
list of [name -> value or null, number of GPUs, a text in what comes out].
"""

import json
import os
import sys

import torch

import pmod

mesh = pmod.make_mesh()
total = pmod.psum(torch.tensor(float(sys.argv[1])), mesh["data"])
here = mesh.topology
print(f"{here.launcher} {here.rank}/{here.world_size} met at {here.master_addr}:{here.master_port}, sum {total:g}.")

for change, count, expected in json.loads(sys.argv[2]) if len(sys.argv) > 2 else []:
    variables = {name: value for name, value in {**os.environ, **change}.items() if value is not None}
    try:
        found = repr(pmod.Topology.detect(variables, device_count=count))
    except pmod.TopologyError as error:
        found = str(error)
    assert expected in found, f"{change} gave {found}"
    print("As expected.")
