"""JAX-style functional collectives over PyTorch: one mesh, named axes, exact derivatives.

    mesh = pmod.make_mesh(data=-1, model=2)
    with pmod.set_mesh(mesh):
        y = pmod.psum(x, axis="model")

Start with the README, then `Mesh` and the table of collectives in `pmod._collectives`.
"""

from pmod import fft as fft
from pmod import nn as nn
from pmod import testing as testing
from pmod._ambient import current_mesh as current_mesh
from pmod._ambient import keep_mesh as keep_mesh
from pmod._ambient import set_mesh as set_mesh
from pmod._arguments import split_sizes as split_sizes
from pmod._collectives import axis_index as axis_index
from pmod._collectives import axis_size as axis_size
from pmod._collectives import barrier as barrier
from pmod._collectives import broadcast as broadcast
from pmod._collectives import pick as pick
from pmod._collectives import place as place
from pmod._collectives import pmax as pmax
from pmod._collectives import pmean as pmean
from pmod._collectives import pmin as pmin
from pmod._collectives import ppermute as ppermute
from pmod._collectives import pshift as pshift
from pmod._collectives import pshuffle as pshuffle
from pmod._collectives import psum as psum
from pmod._collectives import pvary as pvary
from pmod._collectives import reduce as reduce
from pmod._data import first as first
from pmod._data import is_first as is_first
from pmod._debug import assert_invariant as assert_invariant
from pmod._debug import checked as checked
from pmod._debug import debug as debug
from pmod._debug import varying as varying
from pmod._draw_collective import draw_collective as draw_collective
from pmod._draw_tensor import draw as draw
from pmod._errors import ArgumentError as ArgumentError
from pmod._errors import AxisError as AxisError
from pmod._errors import CollectiveTimeout as CollectiveTimeout
from pmod._errors import MismatchError as MismatchError
from pmod._errors import NoMeshError as NoMeshError
from pmod._errors import PmodError as PmodError
from pmod._errors import ShapeError as ShapeError
from pmod._errors import TopologyError as TopologyError
from pmod._estimate import estimate as estimate
from pmod._explain import explain as explain
from pmod._groups import shutdown as shutdown
from pmod._halo import halo_exchange as halo_exchange
from pmod._halo import halo_reduce as halo_reduce
from pmod._launch import launch as launch
from pmod._mesh import Mesh as Mesh
from pmod._mesh import make_mesh as make_mesh
from pmod._parallel import SharedParameters as SharedParameters
from pmod._parallel import data_parallel as data_parallel
from pmod._parallel import remove_data_parallel as remove_data_parallel
from pmod._parallel import replicate as replicate
from pmod._parallel import share_parameters as share_parameters
from pmod._ragged import ExchangePlan as ExchangePlan
from pmod._ragged import all_gather_v as all_gather_v
from pmod._ragged import all_to_all_v as all_to_all_v
from pmod._ragged import exchange_plan as exchange_plan
from pmod._ragged import gather_v as gather_v
from pmod._ragged import indexed_all_to_all_v as indexed_all_to_all_v
from pmod._ragged import psum_scatter_v as psum_scatter_v
from pmod._ragged import scatter_v as scatter_v
from pmod._random import fold_in as fold_in
from pmod._random import rng as rng
from pmod._sampler import sampler as sampler
from pmod._shard_map import shard_map as shard_map
from pmod._simulate import simulate as simulate
from pmod._slices import all_gather as all_gather
from pmod._slices import all_to_all as all_to_all
from pmod._slices import gather as gather
from pmod._slices import psum_scatter as psum_scatter
from pmod._slices import scatter as scatter
from pmod._slices import shard as shard
from pmod._slices import unshard as unshard
from pmod._specs import P as P
from pmod._specs import enter as enter
from pmod._specs import from_dtensors as from_dtensors
from pmod._specs import global_norm as global_norm
from pmod._specs import local_slice as local_slice
from pmod._specs import to_dtensors as to_dtensors
from pmod._start import Pending as Pending
from pmod._start import start as start
from pmod._topology import Topology as Topology
from pmod._trace import trace as trace
from pmod._version import __version__ as __version__
