"""JAX-style functional collectives over PyTorch: one mesh, named axes, exact
derivatives.

    mesh = pmod.make_mesh(data=-1, model=2)
    with pmod.set_mesh(mesh):
        y = pmod.psum(x, axis="model")

Start with the README, then `Mesh` and the table of collectives in `pmod/_collectives/`.
"""

from pmod import fft as fft
from pmod import graph as graph
from pmod import nn as nn
from pmod import sht as sht
from pmod import testing as testing
from pmod._collectives.halo import halo_exchange as halo_exchange
from pmod._collectives.halo import halo_reduce as halo_reduce
from pmod._collectives.indexed import ExchangePlan as ExchangePlan
from pmod._collectives.indexed import exchange_plan as exchange_plan
from pmod._collectives.indexed import indexed_all_to_all_v as indexed_all_to_all_v
from pmod._collectives.permutes import ppermute as ppermute
from pmod._collectives.permutes import pshift as pshift
from pmod._collectives.permutes import pshuffle as pshuffle
from pmod._collectives.places import axis_index as axis_index
from pmod._collectives.places import axis_size as axis_size
from pmod._collectives.places import barrier as barrier
from pmod._collectives.ragged import all_gather_v as all_gather_v
from pmod._collectives.ragged import all_to_all_v as all_to_all_v
from pmod._collectives.ragged import gather_v as gather_v
from pmod._collectives.ragged import psum_scatter_v as psum_scatter_v
from pmod._collectives.ragged import scatter_v as scatter_v
from pmod._collectives.rooted import gather as gather
from pmod._collectives.rooted import scatter as scatter
from pmod._collectives.scans import pscan as pscan
from pmod._collectives.slices import all_gather as all_gather
from pmod._collectives.slices import all_to_all as all_to_all
from pmod._collectives.slices import psum_scatter as psum_scatter
from pmod._collectives.slices import shard as shard
from pmod._collectives.slices import unshard as unshard
from pmod._collectives.values import broadcast as broadcast
from pmod._collectives.values import pick as pick
from pmod._collectives.values import place as place
from pmod._collectives.values import pmax as pmax
from pmod._collectives.values import pmean as pmean
from pmod._collectives.values import pmin as pmin
from pmod._collectives.values import psum as psum
from pmod._collectives.values import pvary as pvary
from pmod._collectives.values import reduce as reduce
from pmod._core.arguments import split_sizes as split_sizes
from pmod._core.marks import mark_varying as mark_varying
from pmod._core.start import Pending as Pending
from pmod._core.start import start as start
from pmod._core.watch import Watcher as Watcher
from pmod._debug.debug import checked as checked
from pmod._debug.debug import debug as debug
from pmod._debug.estimate import estimate as estimate
from pmod._debug.explain import explain as explain
from pmod._debug.invariant import assert_invariant as assert_invariant
from pmod._debug.trace import trace as trace
from pmod._domain.domain_parallel import cut_of as cut_of
from pmod._domain.domain_parallel import domain_parallel as domain_parallel
from pmod._draw.collective import draw_collective as draw_collective
from pmod._draw.tensor import draw as draw
from pmod._errors import ArgumentError as ArgumentError
from pmod._errors import AxisError as AxisError
from pmod._errors import CollectiveTimeout as CollectiveTimeout
from pmod._errors import MismatchError as MismatchError
from pmod._errors import NoMeshError as NoMeshError
from pmod._errors import PmodError as PmodError
from pmod._errors import ShapeError as ShapeError
from pmod._errors import TopologyError as TopologyError
from pmod._mesh.ambient import current_mesh as current_mesh
from pmod._mesh.ambient import keep_mesh as keep_mesh
from pmod._mesh.ambient import set_mesh as set_mesh
from pmod._mesh.make import make_mesh as make_mesh
from pmod._mesh.mesh import Mesh as Mesh
from pmod._ranks.connect import shutdown as shutdown
from pmod._ranks.topology import Topology as Topology
from pmod._run.launch import launch as launch
from pmod._run.simulate import simulate as simulate
from pmod._shard.dtensors import from_dtensors as from_dtensors
from pmod._shard.dtensors import to_dtensors as to_dtensors
from pmod._shard.reading import Block as Block
from pmod._shard.reading import local_coords as local_coords
from pmod._shard.reading import local_slice as local_slice
from pmod._shard.shard_map import shard_map as shard_map
from pmod._shard.spec import P as P
from pmod._shard.specs import global_norm as global_norm
from pmod._shard.specs import pvary_params as pvary_params
from pmod._train.data_parallel import data_parallel as data_parallel
from pmod._train.data_parallel import no_sync as no_sync
from pmod._train.data_parallel import remove_data_parallel as remove_data_parallel
from pmod._train.first import first_rank_first as first_rank_first
from pmod._train.first import is_first as is_first
from pmod._train.random import fold_in as fold_in
from pmod._train.random import rng as rng
from pmod._train.sampler import sampler as sampler
from pmod._train.share_parameters import SharedParameters as SharedParameters
from pmod._train.share_parameters import replicate as replicate
from pmod._train.share_parameters import share_parameters as share_parameters
from pmod._version import __version__ as __version__
