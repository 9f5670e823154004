"""The ambient mesh, and how an axis name becomes an `Axis`."""

from __future__ import annotations

import contextlib
from types import TracebackType

import torch

from pmod._errors import ArgumentError, NoMeshError, PmodError, phrase
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import AxisLike, Mesh
from pmod._ranks import world
from pmod._torch import constant_in_graphs

# The mesh hangs on the world, not on a ContextVar: autograd runs backward on threads of
# its own, which must find the same mesh, and torch.compile cannot read a ContextVar.
# `_token` says which mesh that of the process is, and where: compiled code reads it, so
# that torch guards on its value and compiles again when the mesh has changed.
_token: str = ""


def ambient() -> Mesh | None:
    """Return the ambient mesh, or None."""
    return world.now.here.mesh


def _put(mesh: Mesh | None) -> None:
    global _token
    ours = world.current()
    ours.mesh = mesh
    # Simulated ranks run no compiled code, and they share this module.
    if ours.by_processes:
        _token = "" if mesh is None else mesh._key


# In lower case, because it reads as the function that it is called as.
class set_mesh:
    """Set the ambient mesh, which gives axis names their meaning.

    As a statement (a notebook cell, a script's top) it holds until further notice; as a
    context manager it restores what was there, also after an exception. It is found
    inside backward, on whatever thread, and in compiled code.

    >>> with pmod.set_mesh(pmod.make_mesh(model=1)):
    ...     pmod.current_mesh().shape
    {'model': 1}
    """

    def __init__(self, mesh: Mesh) -> None:
        if not isinstance(mesh, Mesh):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError(
                phrase(
                    "set_mesh", f"mesh is a {type(mesh).__name__}", "Pass a pmod.Mesh."
                )
            )
        self._mesh = mesh
        # What each exit restores; the first is for `with set_mesh(mesh):`.
        self._before = [ambient()]
        self._entered = 0
        _put(mesh)

    def __enter__(self) -> Mesh:
        # The mesh is set already, unless the object was kept until other meshes were
        # set, or is entered inside itself.
        if self._entered or ambient() is not self._mesh:
            self._before.append(ambient())
            _put(self._mesh)
        self._entered += 1
        return self._mesh

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered -= 1
        # The first stays, for the object may be entered again.
        if len(self._before) > 1:
            _put(self._before.pop())
        else:
            _put(self._before[0])


def current_mesh() -> Mesh:
    """Return the ambient mesh.

    Raises: NoMeshError where none is set.

    >>> with pmod.set_mesh(mesh):
    ...     pmod.current_mesh() is mesh
    True
    """
    mesh = ambient()
    if mesh is None:
        raise _no_mesh("current_mesh", None)
    return mesh


def given_mesh(mesh: Mesh | None, function: str) -> Mesh:
    """Return the mesh that a function was given by `mesh=`, else the ambient one."""
    if mesh is None:
        return current_mesh()
    if not isinstance(mesh, Mesh):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(
            phrase(function, f"mesh is a {type(mesh).__name__}", "Pass a pmod.Mesh.")
        )
    return mesh


def _no_mesh(function: str, axis: object) -> NoMeshError:
    return NoMeshError(
        phrase(
            function,
            "no mesh is set",
            "Either set one, pmod.set_mesh(pmod.make_mesh(data=-1)), "
            "or pass a sub-mesh, axis=mesh['data'].",
            axis=axis,
        )
    )


def keep_mesh() -> tuple[
    contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]
]:
    """Recompute an activation checkpoint under the mesh of its forward.

    It does so whatever mesh is set by then.

    >>> from torch.utils.checkpoint import checkpoint
    >>> x = torch.ones(2, requires_grad=True)
    >>> with pmod.set_mesh(pmod.make_mesh(model=1)):
    ...     y = checkpoint(lambda x: pmod.psum(x.sin(), "model"), x, use_reentrant=False, context_fn=pmod.keep_mesh)
    >>> y.sum().backward()
    """
    return contextlib.nullcontext(), under(ambient())


class under:
    """A context with this ambient mesh, or with none; it can be entered repeatedly."""

    def __init__(self, mesh: Mesh | None) -> None:
        self._mesh = mesh
        self._before: list[Mesh | None] = []

    def __enter__(self) -> None:
        self._before.append(ambient())
        _put(self._mesh)

    def __exit__(self, *error: object) -> None:
        _put(self._before.pop())


def resolve(axis: AxisLike, function: str) -> Axis:
    """Return the axis of a collective, bound to this rank.

    `function` is for the error.
    """
    if torch.compiler.is_compiling():
        if isinstance(axis, Mesh):
            return _constant(axis._axis_key, None, function)
        return _constant(_token, axis, function)
    if isinstance(axis, Mesh):
        mesh, label = axis, axis.label
    else:
        mesh, label = ambient(), axis
    if mesh is None:
        raise _no_mesh(function, axis)
    # It may not have been looked up yet, or not be hashable (a list, a mistake).
    try:
        return mesh._bound[label]
    except (KeyError, TypeError, ValueError):
        bind = mesh.bind
    # Outside the handler, or its error would be shown as a consequence of this one.
    return bind(axis, function)


def resolve_each(mesh: Mesh, function: str) -> tuple[Axis, ...]:
    """Return each axis of a mesh that was given as an axis."""
    if torch.compiler.is_compiling():
        return tuple([_constant(key, None, function) for key in mesh._axis_keys])
    return tuple([resolve(mesh[name], function) for name in mesh.axis_names])


@constant_in_graphs
def _constant(key: str, axis: str | tuple[str, ...] | None, function: str) -> Axis:
    """Return the axis of a sub-mesh (its key) while torch.compile traces.

    Of the ambient mesh the token and a name are given. Both texts are guarded on, so
    what is returned is a constant of the compiled code.
    """
    ours = world.current()
    if not ours.by_processes:
        raise PmodError(
            phrase(
                function,
                "a simulated rank runs compiled code",
                "Simulate the eager function.",
                axis=axis,
            )
        )
    if axis is None and key:
        return Axis.parse(key)
    if ours.mesh is None:
        raise _no_mesh(function, axis)
    return ours.mesh.bind(axis, function)
