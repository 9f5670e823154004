"""`%mesh`, `%%spmd`, `pull` and `push`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class

from pmod._core.arguments import split_sizes
from pmod._errors import ArgumentError, AxisError, PmodError, near_miss, phrase
from pmod._mesh.ambient import ambient, current_mesh, set_mesh
from pmod._mesh.make import make_mesh
from pmod._mesh.mesh import Mesh
from pmod._mesh.picture import mesh_html, mesh_text
from pmod._ranks import world
from pmod._ranks.connect import shutdown
from pmod._train.first import is_first
from pmod.notebook import peers
from pmod.notebook import rank as on_rank
from pmod.notebook.cells import Cell, plain
from pmod.notebook.engines import Engine, Engines
from pmod.notebook.shown import Bar, Places, report, show, so_far


class CellFailed(PmodError):
    """A cell failed on some ranks; the text says on which, and where the others were."""

    def _render_traceback_(
        self,
    ) -> list[str]:  # IPython shows this in place of a traceback
        return str(self).splitlines()


class CellStopped(KeyboardInterrupt):
    """The stop button ended a cell; the text says which ranks waited where."""

    _render_traceback_ = CellFailed._render_traceback_


class _Shown(PmodError):
    """What went wrong is on the screen already."""

    def _render_traceback_(self) -> list[str]:
        return []


class Session:
    """The engines, and the mesh over the first of them."""

    def __init__(self, shell: Any) -> None:
        self.shell = shell
        self.places = Places({})
        self.engines = Engines()
        self._board: Any = None
        self._in_step = False  # whether the ranks are connected, and on this mesh
        self._last: Cell | None = None  # where it is not over on all ranks

    def use(self, sizes: Mapping[str, int]) -> None:
        """Make this the mesh, with the engines that are there and as many more as it
        needs.
        """
        self.places, self._in_step = Places(sizes), False
        self.ready()

    def ready(self) -> None:
        """Before each cell: an engine a rank, and the ranks connected."""
        size, ranks = self.places.size, self.engines.ranks
        ended = self._last.clear() if self._last is not None else []
        self._last = None
        lacking = [
            rank
            for rank in range(size)
            if rank >= len(ranks) or not ranks[rank].is_alive
        ]
        if lacking:
            for rank in lacking:
                if rank < len(ranks):
                    why = (
                        "the last cell did not stop there"
                        if rank in ended
                        else ranks[rank].death()
                    )
                    print(
                        f"({self.places.label([rank])}) gets a new engine, without variables: {why}."
                    )
            bar = Bar(self.shell, "starting engines", len(lacking))
            self.engines.start(lacking, bar.draw)
            bar.end()
        if lacking or not self._in_step:
            self._board = self.engines.connect(self.places.sizes, size)
            self.engines.activate(size)
            self._in_step = True

    def chosen(self, chosen: Mapping[str, int]) -> dict[int, Engine]:
        """The engines of the ranks that have these indices."""
        _check_indices(chosen, self.places.sizes)
        return {rank: self.engines.ranks[rank] for rank in self.places.select(chosen)}

    def run(self, code: str, chosen: Mapping[str, int]) -> None:
        """Run a cell, show what it shows, and raise where a rank did not finish it."""
        self.ready()
        cell = Cell(code, self.chosen(chosen), self._board)
        self._last, self._in_step = (
            cell,
            False,
        )  # until more is known: the stop button may be pressed twice
        bar = Bar(self.shell, "running", len(cell.outcomes))
        try:
            cell.run(
                lambda cell: bar.draw(
                    len(cell.outcomes) - len(cell.left),
                    lambda: so_far(cell, self.places),
                )
            )
        finally:
            bar.end()
        self._in_step = not cell.out_of_step()
        self._last = (
            cell
            if any(
                outcome.how in ("stuck", "runs") for outcome in cell.outcomes.values()
            )
            else None
        )
        show(cell.outcomes, self.places)
        if self._last is None and all(
            call.ready() for call in cell.calls.values()
        ):  # of the dead none is
            self.engines.forget(list(cell.calls.values()))
        text = report(cell, self.places, bar.seconds)
        if text:
            text = plain(text) if str(self.shell.colors).lower() == "nocolor" else text
            raise CellStopped(text) if cell.interrupted else CellFailed(text)


_session: Session | None = None


def _sizes(line: str, function: str) -> dict[str, int]:
    """`data=2 model=2`, with commas or without, as a dict."""
    found: dict[str, int] = {}
    for part in line.replace(",", " ").split():
        match = re.fullmatch(r"(\w+)=(-?\d+)", part)
        if match is None or match[1] in found:
            given = (
                f"{part!r} is no name=number"
                if match is None
                else f"{match[1]!r} is given twice"
            )
            raise AxisError(
                phrase(
                    function, given, f"Write {function} data=2 model=2, say."
                ).removeprefix("pmod.")
            )
        found[match[1]] = int(match[2])
    return found


def _check_indices(chosen: Mapping[str, int], sizes: Mapping[str, int]) -> None:
    for name, index in chosen.items():
        if name not in sizes:
            given = f"no axis {name!r}{near_miss(name, sizes)}"
            raise AxisError(
                phrase("%%spmd", given, f"The mesh has {dict(sizes)}.").removeprefix(
                    "pmod."
                )
            )
        if not 0 <= index < sizes[name]:
            right = f"Indices along it go from 0 to {sizes[name] - 1}."
            raise AxisError(
                phrase(
                    "%%spmd", f"{name}={index} is not on the mesh", right
                ).removeprefix("pmod.")
            )


class _Picture:
    """The mesh over the engines, which this process is no rank of."""

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
        """`%mesh data=2 model=2`: an engine per rank, and the mesh set on them; `%mesh`
        alone shows it.
        """
        global _session
        sizes = _sizes(line, "%mesh")
        if not sizes:
            return (
                current_mesh() if _session is None else _Picture(_session.places.sizes)
            )
        if (
            _session is None and world.here().world_size > 1
        ):  # this process is a rank already
            shutdown()  # begins anew, also where a wait was cut off
            set_mesh(make_mesh(sizes))
            return current_mesh()
        for name, size in sizes.items():
            if size < 1:
                right = "Sizes are 1 or more; their product is the number of engines."
                raise AxisError(
                    phrase("%mesh", f"{name}={size} is no size", right).removeprefix(
                        "pmod."
                    )
                )
        if _session is None:
            _session = Session(self.shell)
        _session.use(sizes)
        return _Picture(sizes)

    @cell_magic
    def spmd(self, line: str, cell: str) -> None:
        """`%%spmd`: the cell on all ranks; `%%spmd model=0`: on those with this index
        along the axis.
        """
        chosen = _sizes(line, "%%spmd")
        if _session is not None:
            _session.run(cell, chosen)
            return
        if ambient() is None:
            set_mesh(make_mesh())
        mesh = current_mesh()
        _check_indices(chosen, mesh.shape)
        coords = mesh.coords
        if coords is None or any(
            coords[name] != index for name, index in chosen.items()
        ):
            return
        shell: Any = self.shell
        outcome = shell.run_cell(cell)
        if not outcome.success:
            raise _Shown(str(outcome.error_in_exec or outcome.error_before_exec))


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext pmod.notebook`."""
    shell.register_magics(PmodMagics)


def unload_ipython_extension(shell: Any) -> None:
    """`%unload_ext pmod.notebook`: end the engines, which otherwise end with the
    notebook.
    """
    global _session
    if _session is not None:
        _session.engines.end()
    _session = None


def pull(name: str, *, axis: Any = None, dim: int | None = None) -> Any:
    """The value of a name on every rank: a list in the order of the ranks, tensors on
    the CPU and without history.

    dim: join them along it into one value, in the order of the ranks; axis: only along
    this axis (or these, first name slowest), and of the ranks that differ elsewhere the
    first; axis may also be a mapping {dim: axis}. Where this process is a rank itself
    (jupyter-distributed) all of them call it, and all get the values.

    Raises: NameError where a rank has no such name; between processes that are the
    ranks, ArgumentError for what is no tensor, array, number, text or container of
    these.

    Where `%%spmd` has set ``x = torch.full((1,), pmod.axis_index("data"))`` on a mesh of ``data=2``::

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


def _check_dims(name: str, value: Any, dims: Iterable[int], function: str) -> None:
    for dim in dims:
        if not isinstance(value, torch.Tensor):
            given = f"{name} is a {type(value).__name__}, which has no dims"
        elif not -value.dim() <= dim < value.dim():
            given = f"{name} has no dim {dim}, its shape is {tuple(value.shape)}"
        else:
            continue
        raise ArgumentError(
            phrase(
                f"notebook.{function}",
                given,
                "Leave dim and axis out: one value per rank.",
            )
        )


def _joined(
    values: list[Any],
    axes: list[tuple[int, tuple[str, ...]]],
    at: dict[str, int],
    places: Places,
) -> Any:
    if not axes:
        return values[places.select({name: 0 for name in places.sizes} | at)[0]]
    (dim, names), *rest = axes
    inner = Places({name: places.sizes[name] for name in names})
    return torch.cat(
        [
            _joined(values, rest, at | inner.coords(i), places)
            for i in range(inner.size)
        ],
        dim,
    )


def push(
    values: Mapping[str, Any], *, axis: Any = None, dim: int | None = None
) -> None:
    """Set names on every rank, tensors on its device: the same values everywhere.

    dim: cut tensors along it, in the order of the ranks and into the sizes of
    `pmod.split_sizes`, a part a rank; axis: only along this axis, and the same on ranks
    that differ elsewhere; a mapping {dim: axis} as in `pull`. Where this
    process is a rank itself all of them call it, and what counts are the values of the first::

        push({"x": torch.arange(5)}, dim=0)    # of two ranks the first gets x = tensor([0, 1, 2])
    """
    axes = _dims(axis, dim, "push")
    for name, value in values.items():
        _check_dims(name, value, axes, "push")
    places = _places()
    if _session is None:
        mesh = _own_mesh()
        sent = peers.gathered(dict(values) if is_first(mesh) else {}, mesh, "push")[0]
        (rank,) = places.select(mesh.coords or {})
        on_rank.keep(
            {name: _part(value, axes, places, rank) for name, value in sent.items()}
        )
        return
    _session.ready()
    engines = _session.chosen({})
    parts = {
        rank: {name: _part(value, axes, places, rank) for name, value in values.items()}
        for rank in engines
    }
    calls = [engine.call(on_rank.keep, parts[rank]) for rank, engine in engines.items()]
    _session.engines.gather(list(engines.values()), calls)


def _part(
    value: Any, axes: Mapping[int, tuple[str, ...]], places: Places, rank: int
) -> Any:
    for dim, names in axes.items():
        inner = Places({name: places.sizes[name] for name in names})
        coords = places.coords(rank)
        (index,) = inner.select({name: coords[name] for name in names})
        value = value.split(
            split_sizes(value.shape[dim], tuple(inner.sizes.values())), dim
        )[index]
    return value


def _places() -> Places:
    return _session.places if _session is not None else Places(_own_mesh().shape)


def _own_mesh() -> Mesh:
    """The mesh where this process is a rank of it: what is set, else all ranks."""
    mesh = ambient()
    return make_mesh() if mesh is None else mesh


def _dims(axis: Any, dim: int | None, function: str) -> dict[int, tuple[str, ...]]:
    """What is cut or joined along what: dim -> axes."""
    sizes = _places().sizes
    if isinstance(axis, Mapping):
        if dim is not None:
            raise ArgumentError(
                phrase(
                    f"notebook.{function}",
                    "axis says which dims, and dim does, too",
                    "Give one.",
                )
            )
        asked = {
            int(key): (name,) if isinstance(name, str) else tuple(name)
            for key, name in axis.items()
        }
    elif dim is None:
        if axis is not None:
            given = f"axis is {axis!r}, and no dim is given"
            raise ArgumentError(
                phrase(f"notebook.{function}", given, "Pass dim=0, say.")
            )
        return {}
    else:
        asked = {
            dim: tuple(sizes)
            if axis is None
            else (axis,)
            if isinstance(axis, str)
            else tuple(axis)
        }
    named = [name for names in asked.values() for name in names]
    for name in named:
        if name not in sizes or named.count(name) > 1:
            given = (
                f"no axis {name!r}{near_miss(name, sizes)}"
                if name not in sizes
                else f"{name!r} is named twice"
            )
            raise AxisError(
                phrase(f"notebook.{function}", given, f"The mesh has {sizes}.")
            )
    return asked


def _fetched(name: str, places: Places) -> list[Any]:
    if _session is None:
        found = peers.gathered(on_rank.fetch(name), _own_mesh(), "pull")
    else:
        _session.ready()
        engines = list(_session.chosen({}).values())
        found = _session.engines.gather(
            engines, [engine.call(on_rank.fetch, name) for engine in engines]
        )
    lacking = [rank for rank, (is_there, _) in enumerate(found) if not is_there]
    if lacking:
        where = "any rank" if len(lacking) == places.size else places.label(lacking)
        raise NameError(phrase("notebook.pull", f"{name!r} is not defined on {where}"))
    return [value for _, value in found]
