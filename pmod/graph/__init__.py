"""Graphs and clouds of points whose nodes are spread over ranks.

    part = pmod.graph.partition(edge_index, n, axis="graph")  # once: who owns what
    x = features[part.nodes]  # this rank's nodes, then its ghosts
    for layer in layers:
        x = layer(pmod.graph.halo(x, part.plan), part.edge_index)  # any layer: the ghosts are fetched first
    mine = x[: len(part.owned)]

An edge belongs to the rank that owns its target, which has the node at its source as a
ghost if another rank owns that. So what a layer makes of the edges that end at a node
is exact at this rank's own nodes.
"""

from pmod.graph.ghosts import Part as Part
from pmod.graph.ghosts import Plan as Plan
from pmod.graph.ghosts import halo as halo
from pmod.graph.ghosts import partition as partition
from pmod.graph.owners import by_coordinates as by_coordinates
from pmod.graph.owners import owners as owners
from pmod.graph.owners import uses_metis as uses_metis
from pmod.graph.search import knn as knn
from pmod.graph.search import radius_search as radius_search
