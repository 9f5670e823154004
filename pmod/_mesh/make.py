"""`make_mesh`: from what the launcher says and the sizes of the axes to a mesh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pmod._errors import ArgumentError, AxisError, phrase, quoted
from pmod._mesh.factors import Factors, layout
from pmod._mesh.mesh import Mesh
from pmod._mesh.sizes import fill_in, shown_sizes
from pmod._ranks import connect, world
from pmod._ranks.topology import Topology, warn_of_straddling


def make_mesh(
    axes: Mapping[str, int] | None = None,
    /,
    *,
    ranks: Sequence[int] | None = None,
    topology: Topology | None = None,
    timeout: float | None = None,
    **axis_sizes: int,
) -> Mesh:
    """Detect the launcher, connect, and name the axes of parallelism.

    Sizes are given by keyword or as a mapping (for names that are not identifiers),
    slowest axis first; one may be -1, and with no axis at all it is ``data=-1``. Ranks
    fill the mesh in C order, last axis fastest, so that the last axis stays inside a
    node when it fits; a `UserWarning` names an axis that could stay inside a node and
    straddles two.

    ranks: the ranks that the mesh covers, in mesh order; all by default. Elsewhere
    `Mesh.coords` is None and collectives raise `AxisError`. topology: given by hand,
    nothing is connected before the first use. timeout: seconds until a collective gives
    up; by default PMOD_TIMEOUT, else 600.

    A process group that is initialized already is joined and left alone. With one
    process nothing is connected, nor in one that a rank has started with
    multiprocessing (a DataLoader's worker): it gets the mesh at its rank's place, and
    collectives raise TopologyError there. Where it connects ranks that have GPUs, it
    makes this rank's GPU torch's current device.

    Raises: AxisError where the sizes do not multiply to the number of ranks;
    TopologyError where what the launcher says is incomplete.

    >>> pmod.make_mesh()
    Mesh(data=1) at (data=0)
    """
    _check_kinds(axes, topology)
    sizes = _together(axes or {}, axis_sizes)
    seconds = world.deadline(timeout)
    place = world.to_connect() if topology is None else topology
    offset, stride, base, count = layout(ranks, place.world_size)
    have = f"the world has {count}" if ranks is None else f"ranks lists {count}"
    sizes = fill_in(sizes or {"data": -1}, count, "make_mesh", have)
    factors = _in_c_order(sizes, stride)
    mesh = Mesh(tuple(sizes), factors, offset, base, place, seconds)
    # To order the ranks by hand is what the warning advises, and so it silences it.
    if base is None and mesh.size == place.world_size:
        warn_of_straddling(sizes, place)
    if topology is None:
        _connect(place, seconds, shown_sizes(sizes))
    return mesh


def _check_kinds(axes: object, topology: object) -> None:
    if not isinstance(axes, Mapping | None):
        given = f"axes is {quoted(axes)}"
    elif not isinstance(topology, Topology | None):
        given = f"topology is {quoted(topology)}"
    else:
        return
    right = "Pass {'data': 2} or data=2, and a pmod.Topology."
    raise ArgumentError(phrase("make_mesh", given, right))


def _together(
    axes: Mapping[str, int], axis_sizes: Mapping[str, int]
) -> Mapping[str, int]:
    """Return the sizes that were given both ways, those of the mapping first."""
    twice = set(axes) & set(axis_sizes)
    if twice:
        raise AxisError(
            phrase(
                "make_mesh",
                f"axis {min(twice)!r} is given twice",
                "Give each axis once.",
            )
        )
    return {**axes, **axis_sizes}


def _in_c_order(sizes: Mapping[str, int], stride: int) -> tuple[Factors, ...]:
    """Return the factors of the axes, the last of which has this stride."""
    factors: list[Factors] = []
    for size in reversed(list(sizes.values())):
        factors.append(((size, stride),))
        stride *= size
    return tuple(reversed(factors))


def _connect(place: Topology, seconds: float, shown: str) -> None:
    # Ranks that are threads, or are alone, have nobody to connect with.
    if not world.current().by_processes:
        return
    if place.world_size == 1 or world.is_no_rank():
        connect.announce(place, shown)
    else:
        connect.connect(place, seconds, shown)
