"""`explain`: a program's collectives and their transposes, line by line.

It says why each message is there.
"""

from __future__ import annotations

import ast
import html
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager

import attrs
import torch
from torch import Tensor

from pmod._core.arguments import check_function
from pmod._core.collective import COLLECTIVES
from pmod._core.leaves import map_tensors, tensors_in
from pmod._core.lineage import leaves_of
from pmod._core.row import ROWS, Call
from pmod._core.watch import Watcher
from pmod._debug.events import Event, in_bytes
from pmod._debug.trace import trace
from pmod._errors import NoMeshError, coordinates, phrase
from pmod._mesh.ambient import ambient
from pmod._mesh.axis import named
from pmod._mesh.mesh import Mesh
from pmod._run.alone import alone_on
from pmod._site import BACKWARD, Origin, call_source

Place = tuple[str, str | tuple[str, ...], str]
"""A function, its axis and the user's line."""


@attrs.define
class _Messages:
    calls: int = 0
    nbytes: int = 0

    def add(self, nbytes: int) -> None:
        self.calls += 1
        self.nbytes += nbytes

    def __str__(self) -> str:
        if not self.nbytes:
            return ""
        if self.calls == 1:
            return f", {in_bytes(self.nbytes)}"
        return f", {self.calls} messages, {in_bytes(self.nbytes)}"


@attrs.define
class Step:
    """One line's collective, however often it was called, and its backward's calls."""

    place: Place
    argument: str  # as the user wrote it
    forward: _Messages = attrs.field(factory=_Messages)
    backward: dict[str, _Messages] = attrs.field(factory=dict[str, _Messages])  # by row
    kinds: str = ""

    def add(self, event: Event) -> None:
        """Count a call of it, or of its backward."""
        if event.function.startswith(BACKWARD):
            self.backward.setdefault(event.row, _Messages()).add(event.nbytes)
            return
        self.forward.add(event.nbytes)
        if not self.kinds and event.row in ROWS:
            self.kinds = f"{ROWS[event.row].takes} -> {ROWS[event.row].gives}"

    def title(self) -> str:
        """Return `w: pvary(data) -> backward: psum, 12 MB`."""
        function, axis, _ = self.place
        forward = f"{function}({named(axis)}){self.forward}"
        if self.argument:
            forward = f"{self.argument}: {forward}"
        rows = [f"{row}{messages}" for row, messages in self.backward.items()]
        if rows:
            return f"{forward} -> backward: {'; '.join(rows)}"
        return f"{forward} -> no gradient comes back" if self.kinds else forward

    def reasons(self) -> Iterator[str]:
        """Yield what the call does, and why each message of its backward is there."""
        known = COLLECTIVES.get(self.place[0])
        if known is not None:
            yield f"{known.kinds}: {known.value}."
        else:
            yield from self._first_line_of_docstring()
        for row, messages in self.backward.items():
            why = ROWS[row].why if row in ROWS else ""
            if why:
                end = "." if messages.nbytes else "; nothing is sent."
                yield f"backward: {why}{end}"

    def _first_line_of_docstring(self) -> Iterator[str]:
        """Yield what a layer, or a module that reduces gradients, says of itself."""
        function = getattr(sys.modules["pmod"], self.place[0], None)
        # Python strips docstrings under -OO.
        said = getattr(function, "__doc__", None)
        if said:
            line = said.splitlines()[0]
            yield f"{self.kinds}: {line}" if self.kinds else line


@attrs.frozen
class Explanation:
    """What `explain` found; prints as text, and as a table in notebooks."""

    of: str
    steps: Sequence[Step]

    def _total(self) -> str:
        forward = backward = 0
        for step in self.steps:
            forward += step.forward.nbytes
            backward += sum([sent.nbytes for sent in step.backward.values()])
        sent = f"{in_bytes(forward)} forward and {in_bytes(backward)} backward"
        return f"In all this rank sends {sent}."

    def __str__(self) -> str:
        lines = [self.of]
        for step in self.steps:
            lines += ["", step.place[2], f"  {step.title()}"]
            lines += [f"    {reason}" for reason in step.reasons()]
        return "\n".join([*lines, "", self._total()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(map(_html_row, self.steps))
        of, total = html.escape(self.of), html.escape(self._total())
        return f"<p>{of}</p><table>{rows}</table><p>{total}</p>"


def _html_row(step: Step) -> str:
    cell = "<td style='text-align:left'>"
    site, title = html.escape(step.place[2]), html.escape(step.title())
    reasons = "<br>".join(map(html.escape, step.reasons()))
    place = f"{cell}<code>{site}</code></td>"
    return f"<tr>{place}{cell}<b>{title}</b><br>{reasons}</td></tr>"


class _Reader(Watcher):
    """A watcher that reads in the user's source what each call was given."""

    def __init__(self) -> None:
        self.arguments: dict[Place, str] = {}

    def before(self, call: Call, xs: Sequence[Tensor], origin: Origin) -> None:
        function, site = origin
        if xs and not function.startswith(BACKWARD):
            argument = _first_argument(function, call_source())
            self.arguments.setdefault((function, call.axis.label, site), argument)


def _first_argument(function: str, source: str) -> str:
    """Return `w` of `pmod.pvary(w, "data")` or `pmod.start(pmod.pvary, w, "data")`.

    Nothing where the source is not such a call.
    """
    try:
        call = ast.parse(source.strip(), mode="eval").body
    except SyntaxError:
        return ""
    if not isinstance(call, ast.Call):
        return ""
    values = [*call.args, *[keyword.value for keyword in call.keywords]]
    given = [ast.unparse(value) for value in values]
    names = [text.rpartition(".")[2] for text in (ast.unparse(call.func), *given)]
    # `start` calls what it is given first, with the other arguments.
    at = 1 if names[:2] == ["start", function] else 0
    if names[at] != function:
        return ""
    return next(iter(given[at:]), "")


@contextmanager
def _gradients_kept(tensors: Sequence[Tensor]) -> Generator[None]:
    """Give `.grad` back afterwards as it was."""
    kept = [x.grad for x in tensors]
    for x in tensors:
        x.grad = None
    try:
        yield
    finally:
        for x, gradient in zip(tensors, kept, strict=True):
            x.grad = gradient


def _differentiate(result: object) -> bool:
    """Run backward from all of a result; return whether there was anything to run."""
    roots = [x for x in tensors_in(result) if x.requires_grad]
    with _gradients_kept([leaf for x in roots for leaf in leaves_of(x)]):
        torch.autograd.backward(roots, list(map(torch.ones_like, roots)))
    return bool(roots)


def _run(
    f: Callable[..., object], args: Sequence[object]
) -> tuple[trace, _Reader, bool]:
    """Run f and its backward, watched; return whether there was one."""
    with trace() as found, _Reader() as reader:
        result = f(*args)
        inside = any(event.function.startswith(BACKWARD) for event in found.events)
        differentiated = inside or _differentiate(result)
    return found, reader, differentiated


def _requiring_grad(x: Tensor) -> Tensor:
    # torch differentiates no other numbers, and pmod sends no sparse tensors.
    if x.layout is not torch.strided or not _is_differentiable(x):
        return x
    return x.detach().requires_grad_()


def _is_differentiable(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def explain(
    f: Callable[..., object],
    *args: object,
    mesh: Mesh | Mapping[str, int] | None = None,
) -> Explanation:
    """Return the collectives of f(*args) and of its backward, line by line.

    Each comes with what it sends, and why it is there.
    f runs once, on one rank of the mesh, whose other ranks need not exist: nothing is
    sent, and no rank waits. Then backward runs from all that f returns, unless f did
    that itself; where nothing requires a gradient, f runs again with all of args
    requiring one. What f changes (parameters, by an optimizer's step) stays changed;
    `.grad` does not, unless f calls backward. Tensors may be real or on the "meta"
    device.
    mesh: by default the ambient mesh; or another one, or sizes, ``{"data": 1000}``.
    Returns an object that prints as text, and as a table in notebooks. Raises:
    NoMeshError without any mesh.

    >>> def loss(w, x):
    ...     w = pmod.pvary(w, "data")
    ...     return pmod.psum((w * x).sum(), "data")
    >>> w = torch.ones(3, requires_grad=True)
    >>> print(pmod.explain(loss, w, torch.ones(3), mesh={"data": 4}))
    loss, as rank 0 (data=0) of Mesh(data=4)
    <BLANKLINE>
    <doctest pmod._debug.explain.explain[0]>:2: w = pmod.pvary(w, "data")
      w: pvary(data) -> backward: psum, 36 B
        I -> V: x itself, to be used in varying computation.
        backward: every rank used the one value in its own way: its gradient is the sum of theirs.
    <BLANKLINE>
    <doctest pmod._debug.explain.explain[0]>:3: return pmod.psum((w * x).sum(), "data")
      (w * x).sum(): psum(data), 12 B -> backward: pvary
        V -> I: the sum over the axis.
        backward: the result is one value, whose gradient is on every rank already; nothing is sent.
    <BLANKLINE>
    In all this rank sends 12 B forward and 36 B backward.
    """
    check_function(f, "explain", "f")
    if mesh is None:
        mesh = ambient()
    if mesh is None:
        right = "Pass mesh={'data': 4}, or set one, pmod.set_mesh(pmod.make_mesh())."
        raise NoMeshError(phrase("explain", "no mesh is set", right))
    with alone_on(mesh, "explain") as here:
        found, reader, differentiated = _run(f, args)
        if not differentiated and any(map(_is_differentiable, tensors_in(args))):
            found, reader, _ = _run(f, map_tensors(_requiring_grad, args))
    steps: dict[Place, Step] = {}
    for event in found.events:
        place = (event.function.removeprefix(BACKWARD), event.axis, event.site)
        steps.setdefault(place, Step(place, reader.arguments.get(place, ""))).add(event)
    name = getattr(f, "__name__", type(f).__name__)
    sizes = [f"{axis}={size}" for axis, size in here.shape.items()]
    rank = f"rank {here.topology.rank} {coordinates(here.coords)}"
    of = f"{name}, as {rank} of Mesh({', '.join(sizes)})"
    return Explanation(of, tuple(steps.values()))
