"""Somebody has the port that follows from the job, when the ranks want to meet there."""

# pyright: standard

import socket

import pmod

here = pmod.Topology.detect()
somebody = socket.create_server(("", here.master_port or 0)) if here.rank == 0 else None
pmod.make_mesh()
