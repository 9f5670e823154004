"""`%mesh`, `%%spmd`, `pull` and `push`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeAlias

import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class

import pmod
from pmod._errors import ArgumentError, AxisError, PmodError, near_miss, phrase
from pmod._mesh.ambient import ambient, current_mesh, set_mesh
from pmod._mesh.make import make_mesh
from pmod._mesh.mesh import Mesh
from pmod._mesh.picture import mesh_html, mesh_text
from pmod._mesh.sizes import parse_sizes
from pmod._ranks import world
from pmod._ranks.connect import shutdown
from pmod._wire.board import Board
from pmod.notebook import peers
from pmod.notebook import rank as on_rank
from pmod.notebook.cells import Cell, plain
from pmod.notebook.engines import Call, Engine, Engines
from pmod.notebook.shown import Bar, Places, report, show, so_far

Along: TypeAlias = str | Iterable[str] | Mapping[int, str | Iterable[str]] | None
"""An axis, several as one with the first name slowest, or a mapping {dim: axis}."""


class CellFailed(PmodError):
    """A cell failed on some ranks; the text says on which, and where the others were."""

    # IPython shows this in place of a traceback
    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


class CellStopped(KeyboardInterrupt):
    """The stop button ended a cell; the text says which ranks waited where."""

    _render_traceback_ = CellFailed._render_traceback_


class _Shown(PmodError):
    """An error that is on the screen already."""

    def _render_traceback_(self) -> list[str]:
        return []


class Session:
    """The engines, and the mesh over the first of them."""

    def __init__(self, shell: InteractiveShell) -> None:
        self.shell = shell
        self.places = Places({})
        self.engines = Engines()
        # what the ranks say of their waits, once they are connected
        self._board: Board | None = None
        # whether the ranks are connected, and on this mesh
        self._in_step = False
        # the last cell, if it is not over on all ranks
        self._last: Cell | None = None

    def use(self, sizes: Mapping[str, int]) -> None:
        """Make this the mesh, with engines that are there and as many new as it needs."""
        self.places, self._in_step = Places(sizes), False
        self.ready()

    def ready(self) -> Board:
        """See to it, before each cell, that all ranks have an engine and are connected.

        Returns what they will say of their waits.
        """
        size, ranks = self.places.size, self.engines.ranks
        ended: list[int] = []
        if self._last is not None:
            ended = self._last.clear()
            self._last = None
        lacking: list[int] = []
        for rank in range(size):
            if rank >= len(ranks):
                lacking.append(rank)
            elif not ranks[rank].is_alive:
                lacking.append(rank)
                self._say_why(rank, ended)
        if lacking:
            bar = Bar(self.shell, "starting engines", len(lacking))
            self.engines.start(lacking, bar.draw)
            bar.end()
        if self._board is None or lacking or not self._in_step:
            self._board = self.engines.connect(self.places.sizes, size)
            self.engines.activate(size)
            self._in_step = True
        return self._board

    def _say_why(self, rank: int, ended: Sequence[int]) -> None:
        """Print that a rank gets a new engine: its variables are lost."""
        why = self.engines.ranks[rank].death()
        # we have killed it ourselves, so how it died explains nothing
        if rank in ended:
            why = "the last cell did not stop there"
        where = self.places.label([rank])
        print(f"({where}) gets a new engine, without variables: {why}.")

    def chosen(self, chosen: Mapping[str, int]) -> dict[int, Engine]:
        """Return the engines of the ranks that have these indices."""
        _check_indices(chosen, self.places.sizes)
        return {rank: self.engines.ranks[rank] for rank in self.places.select(chosen)}

    def run(self, code: str, chosen: Mapping[str, int]) -> None:
        """Run a cell, show what it shows, and raise if a rank did not finish it."""
        board = self.ready()
        cell = Cell(code, self.chosen(chosen), board)
        # until more is known: the stop button may be pressed a second time below
        self._last, self._in_step = cell, False
        bar = Bar(self.shell, "running", len(cell.outcomes))

        def tell(cell: Cell) -> None:
            done = len(cell.outcomes) - len(cell.left)
            bar.draw(done, lambda: so_far(cell, self.places))

        try:
            cell.run(tell)
        finally:
            bar.end()
        self._in_step = not cell.out_of_step()
        if not cell.ranks_that("stuck", "runs"):
            self._last = None
        show(cell.outcomes, self.places)
        calls = list(cell.calls.values())
        # a call to an engine that has died is never ready, and cannot be let go
        if self._last is None and all(call.ready() for call in calls):
            self.engines.forget(calls)
        text = report(cell, self.places, bar.seconds)
        if not text:
            return
        if str(self.shell.colors).lower() == "nocolor":
            text = plain(text)
        raise CellStopped(text) if cell.interrupted else CellFailed(text)


_session: Session | None = None


def _sizes(line: str, function: str) -> dict[str, int]:
    """Return what a magic's line says of axes; the line may be empty."""
    if not line.strip():
        return {}
    try:
        return parse_sizes(line)
    except ValueError as error:
        right = f"Write, for example, {function} data=2 model=2."
        raise _axis_error(function, str(error), right) from None


def _axis_error(magic: str, given: str, right: str) -> AxisError:
    """Return the error of a magic, which is not a function of pmod's to be called."""
    return AxisError(phrase(magic, given, right).removeprefix("pmod."))


def _check_indices(chosen: Mapping[str, int], sizes: Mapping[str, int]) -> None:
    for name, index in chosen.items():
        if name not in sizes:
            given = f"no axis {name!r}{near_miss(name, sizes)}"
            raise _axis_error("%%spmd", given, f"The mesh has {dict(sizes)}.")
        if not 0 <= index < sizes[name]:
            given = f"{name}={index} is not on the mesh"
            right = f"Indices along it go from 0 to {sizes[name] - 1}."
            raise _axis_error("%%spmd", given, right)


class _Picture:
    """The mesh over the engines; this process is not one of its ranks."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._names, self._places = tuple(sizes), tuple(sizes.values())

    def _rank_at(self, place: tuple[int, ...]) -> int:
        rank = 0
        for size, index in zip(self._places, place, strict=True):
            rank = rank * size + index
        return rank

    def __repr__(self) -> str:
        return mesh_text(self._names, self._places, self._rank_at, inside=False)

    def _repr_html_(self) -> str:
        return mesh_html(self._names, self._places, self._rank_at, inside=False)


@magics_class
class PmodMagics(Magics):
    """What `%load_ext pmod.notebook` adds."""

    @line_magic
    def mesh(self, line: str) -> Mesh | _Picture:
        """Start an engine per rank and set the mesh there: `%mesh data=2 model=2`.

        `%mesh` alone shows the mesh.
        """
        global _session
        sizes = _sizes(line, "%mesh")
        if not sizes:
            if _session is None:
                return current_mesh()
            return _Picture(_session.places.sizes)
        # this process is a rank already, as under jupyter-distributed
        if _session is None and world.here().world_size > 1:
            # a wait that was cut off has left the ranks out of step: connect them anew
            shutdown()
            set_mesh(make_mesh(sizes))
            return current_mesh()
        for name, size in sizes.items():
            if size < 1:
                right = "Sizes are 1 or more; their product is the number of engines."
                raise _axis_error("%mesh", f"{name}={size} is not a size", right)
        if _session is None:
            shell: Any = self.shell
            _session = Session(shell)
        _session.use(sizes)
        return _Picture(sizes)

    @cell_magic
    def spmd(self, line: str, cell: str) -> None:
        """Run the cell on all ranks, or with `%%spmd model=0` on those with this index."""
        chosen = _sizes(line, "%%spmd")
        if _session is not None:
            _session.run(cell, chosen)
            return
        if ambient() is None:
            set_mesh(make_mesh())
        mesh = current_mesh()
        _check_indices(chosen, mesh.shape)
        if mesh.coords is None or not chosen.items() <= mesh.coords.items():
            return
        shell: Any = self.shell
        outcome = shell.run_cell(cell)
        if not outcome.success:
            raise _Shown(str(outcome.error_in_exec or outcome.error_before_exec))


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Add the magics: `%load_ext pmod.notebook`."""
    shell.register_magics(PmodMagics)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """End the engines: `%unload_ext pmod.notebook`. They end with the notebook, too."""
    global _session
    if _session is not None:
        _session.engines.end()
    _session = None


def pull(name: str, *, axis: Along = None, dim: int | None = None) -> Any:
    """Return the value of a name on every rank, in a list in the order of the ranks.

    Tensors come to the CPU and without their history.

    dim: join the values along it into one, in the order of the ranks. axis: join only
    along this axis (or these, first name slowest), and of the ranks that differ
    elsewhere take the first. axis may also be a mapping {dim: axis}. If this process is
    itself a rank (jupyter-distributed), all of them call it, and all get the values.

    Raises: NameError if a rank has no such name; between processes that are the ranks,
    ArgumentError for a value that is not a tensor, array, number, text or container of
    these.

    If `%%spmd` has set ``x = torch.full((1,), pmod.axis_index("data"))`` on a mesh of ``data=2``::

        pull("x")           # [tensor([0]), tensor([1])]
        pull("x", dim=0)    # tensor([0, 1])
    """
    axes = _dims(axis, dim, "pull")
    places = _places()
    values = _fetched(name, places)
    if not axes:
        return values
    for value in values:
        _check_dims(name, value, axes, "pull")
    return _joined(values, list(axes.items()), {}, places)


def _check_dims(name: str, value: object, dims: Iterable[int], function: str) -> None:
    for dim in dims:
        if not isinstance(value, torch.Tensor):
            given = f"{name} is a {type(value).__name__}, which has no dims"
        elif not -value.dim() <= dim < value.dim():
            given = f"{name} has no dim {dim}, its shape is {tuple(value.shape)}"
        else:
            continue
        right = "Leave dim and axis out: one value per rank."
        raise ArgumentError(phrase(f"notebook.{function}", given, right))


def _joined(
    values: list[torch.Tensor],
    axes: list[tuple[int, tuple[str, ...]]],
    at: dict[str, int],
    places: Places,
) -> torch.Tensor:
    """Return the values joined along these dims, of the ranks that are at these indices."""
    if not axes:
        first = dict.fromkeys(places.sizes, 0)
        return values[places.select(first | at)[0]]
    (dim, names), *rest = axes
    inner = Places({name: places.sizes[name] for name in names})
    parts: list[torch.Tensor] = []
    for index in range(inner.size):
        parts.append(_joined(values, rest, at | inner.coords(index), places))
    return torch.cat(parts, dim)


def push(
    values: Mapping[str, object], *, axis: Along = None, dim: int | None = None
) -> None:
    """Set names on every rank, tensors on its device: the same values everywhere.

    dim: cut tensors along it, in the order of the ranks and into the sizes of
    `pmod.split_sizes`, one part a rank. axis: cut only along this axis; ranks that
    differ elsewhere get the same. It may be a mapping {dim: axis}, as in `pull`. If
    this process is itself a rank, all of them call it, and the values of the first one
    count::

        push({"x": torch.arange(5)}, dim=0)    # of two ranks the first gets x = tensor([0, 1, 2])
    """
    axes = _dims(axis, dim, "push")
    for name, value in values.items():
        _check_dims(name, value, axes, "push")
    places = _places()
    if _session is None:
        mesh = _own_mesh()
        own = dict(values) if pmod.is_first(mesh) else {}
        sent = peers.gathered(own, mesh, "push")[0]
        (rank,) = places.select(mesh.coords or {})
        on_rank.keep(_parts(sent, axes, places, rank))
        return
    _session.ready()
    engines = _session.chosen({})
    calls: list[Call] = []
    for rank, engine in engines.items():
        parts = _parts(values, axes, places, rank)
        calls.append(engine.call(on_rank.keep, parts))
    _session.engines.gather(list(engines.values()), calls)


def _parts(
    values: Mapping[str, object],
    axes: Mapping[int, tuple[str, ...]],
    places: Places,
    rank: int,
) -> dict[str, object]:
    """Return a rank's part of each value."""
    parts: dict[str, object] = {}
    for name, value in values.items():
        # only a tensor has come here with dims to cut
        if isinstance(value, torch.Tensor):
            value = _part(value, axes, places, rank)
        parts[name] = value
    return parts


def _part(
    value: torch.Tensor, axes: Mapping[int, tuple[str, ...]], places: Places, rank: int
) -> torch.Tensor:
    coords = places.coords(rank)
    for dim, names in axes.items():
        inner = Places({name: places.sizes[name] for name in names})
        (index,) = inner.select({name: coords[name] for name in names})
        sizes = pmod.split_sizes(value.shape[dim], tuple(inner.sizes.values()))
        value = value.split(sizes, dim)[index]
    return value


def _places() -> Places:
    if _session is not None:
        return _session.places
    return Places(_own_mesh().shape)


def _own_mesh() -> Mesh:
    """Return the mesh that this process is a rank of: the one set, else all ranks."""
    mesh = ambient()
    return make_mesh() if mesh is None else mesh


def _dims(axis: Along, dim: int | None, function: str) -> dict[int, tuple[str, ...]]:
    """Return which dims are cut or joined, each along which axes."""
    function = f"notebook.{function}"
    sizes = _places().sizes
    asked: dict[int, tuple[str, ...]] = {}
    if isinstance(axis, Mapping):
        if dim is not None:
            given = "axis says which dims, and dim does, too"
            raise ArgumentError(phrase(function, given, "Give one."))
        for key, names in axis.items():
            asked[int(key)] = _names(names)
    elif dim is not None:
        asked[dim] = tuple(sizes) if axis is None else _names(axis)
    elif axis is not None:
        given = f"axis is {axis!r}, and no dim is given"
        raise ArgumentError(phrase(function, given, "Pass one, for example dim=0."))
    seen: set[str] = set()
    for name in chain.from_iterable(asked.values()):
        right = f"The mesh has {sizes}."
        if name not in sizes:
            given = f"no axis {name!r}{near_miss(name, sizes)}"
            raise AxisError(phrase(function, given, right))
        if name in seen:
            raise AxisError(phrase(function, f"{name!r} is named twice", right))
        seen.add(name)
    return asked


def _names(axes: str | Iterable[str]) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _fetched(name: str, places: Places) -> list[Any]:
    """Return what the name is on every rank."""
    found: list[tuple[bool, object]]
    if _session is None:
        found = peers.gathered(on_rank.fetch(name), _own_mesh(), "pull")
    else:
        _session.ready()
        engines = list(_session.chosen({}).values())
        calls = [engine.call(on_rank.fetch, name) for engine in engines]
        found = _session.engines.gather(engines, calls)
    lacking: list[int] = []
    for rank, (is_there, _) in enumerate(found):
        if not is_there:
            lacking.append(rank)
    if lacking:
        where = "any rank" if len(lacking) == places.size else places.label(lacking)
        raise NameError(phrase("notebook.pull", f"{name!r} is not defined on {where}"))
    return [value for _, value in found]
