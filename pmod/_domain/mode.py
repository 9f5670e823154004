"""The function mode that runs a program of whole fields on blocks.

It answers questions about shapes with the whole's, lets what is pointwise pass, gives
everything else that meets a cut tensor to its rule, and raises where there is none.
"""

from __future__ import annotations

import math
from functools import cache, partial
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function

from pmod._collectives.places import axis_index
from pmod._core.bind import bind
from pmod._core.leaves import tensors_in
from pmod._core.row import Call
from pmod._domain import known
from pmod._domain.blocks import Blocks
from pmod._domain.known import WHOLE
from pmod._domain.refusals import no_exact_form
from pmod._domain.rules import loaded as loaded
from pmod._domain.rules.pointwise import in_place, pointwise
from pmod._domain.rules.table import (
    DRAWS,
    FREE,
    FREE_ATTRIBUTES,
    IN_PLACE,
    OUTER,
    POINTWISE,
    RULES,
    Function,
    Rule,
)
from pmod._domain.rules.views import turned
from pmod._mesh.ambient import under
from pmod._mesh.mesh import Mesh
from pmod._torch import (
    HigherOrderOperator,
    Operator,
    OperatorPacket,
    count_function_modes,
)

Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]


class Domain(TorchFunctionMode):
    """Follows layouts while a function of whole fields runs."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self.blocks = blocks
        self.entered: list[Function] = []
        blocks.mode = self
        blocks.reenter = partial(again, self)

    def __torch_function__(
        self,
        func: Function,
        types: object,
        args: Args = (),
        kwargs: Kwargs | None = None,
    ) -> Any:
        how = handlers[func]
        # the usual case, so it has no calls that it can do without
        if how is _elementwise and not kwargs:
            layout = _one_layout(args)
            if layout is not None:
                y = func(*args)
                known.note(y, layout)
                return y
        return how(self, func, args, kwargs or {})


_notes = known.notes


def _one_layout(args: Args) -> known.Layout | None:
    """Return the layout that all tensors among these have, None if there is a doubt."""
    layout: known.Layout | None = None
    for x in args:
        if isinstance(x, Tensor):
            of = _notes.get(id(x))
            if of is None or of() is not x:
                return None
            if layout is not None and of.layout is not layout and of.layout != layout:
                return None
            if not of.differentiates and x.requires_grad:
                return None
            layout = of.layout
        elif isinstance(x, list | tuple | dict):
            return None
    return layout


# --- how each function is taken -------------------------------------------------------


def _elementwise(d: Domain, func: Function, args: Args, kwargs: Kwargs) -> Any:
    check_out(func, kwargs)
    return pointwise(d.blocks, func, *args, **kwargs)


def _changed(d: Domain, func: Function, args: Args, kwargs: Kwargs) -> Any:
    return in_place(d.blocks, func, *args, **kwargs)


def _free(d: Domain, func: Function, args: Args, kwargs: Kwargs) -> Any:
    return func(*args, **kwargs)


_WITHOUT_TENSORS = frozenset([type(None), int, float, bool, str, slice, torch.dtype])


def _is_any_cut(d: Domain, args: Args, kwargs: Kwargs) -> bool:
    """Return whether any tensor is cut; raise if one is unknown."""
    noted, is_cut = d.blocks.noted, False
    # all are looked at
    for x in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(x, Tensor):
            is_cut = bool(noted(x)) or is_cut
        elif type(x) not in _WITHOUT_TENSORS:
            for y in tensors_in(x):
                is_cut = bool(noted(y)) or is_cut
    return is_cut


def note_rest(y: Any) -> Any:
    """Note tensors of a result that are not noted: they are one value."""
    if isinstance(y, Tensor):
        if known.noted(y) is None:
            known.note(y, WHOLE)
        return y
    for x in tensors_in(y):
        if known.noted(x) is None:
            known.note(x, WHOLE)
    return y


def _one_value(func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Run what takes no cut tensor: all ranks make the same of the same."""
    y = func(*args, **kwargs)
    for x in tensors_in(y):
        known.note(x, WHOLE)
    return y


def check_out(func: Function, kwargs: Kwargs) -> None:
    if kwargs.get("out") is not None:
        name = name_of(func)
        right = "Leave out= away, and use what it returns."
        raise no_exact_form(name, "it writes into out=", right)


def _by_rule(d: Domain, func: Function, args: Args, kwargs: Kwargs) -> Any:
    if not _is_any_cut(d, args, kwargs):
        return _one_value(func, args, kwargs)
    check_out(func, kwargs)
    return note_rest(RULES[name_of(func)](d.blocks, func, *args, **kwargs))


def _by_rule_always(d: Domain, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Run what draws: it has a rule for one value, too."""
    _is_any_cut(d, args, kwargs)
    check_out(func, kwargs)
    return note_rest(RULES[name_of(func)](d.blocks, func, *args, **kwargs))


def _enter(d: Domain, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Run a Python function of torch, its body operation by operation."""
    if not _is_any_cut(d, args, kwargs):
        return _one_value(func, args, kwargs)
    assert isinstance(func, FunctionType)
    # one that asks under its own name for what it was to do would do so without end
    if d.entered[-1:] == [func]:
        return _refuse(d, func, args, kwargs)
    d.entered.append(func)
    try:
        return note_rest(d.blocks.follow(unasked(func), *args, **kwargs))
    finally:
        d.entered.pop()


def _refuse(d: Domain, func: Function, args: Args, kwargs: Kwargs) -> Any:
    if not _is_any_cut(d, args, kwargs):
        return _one_value(func, args, kwargs)
    dims: list[int] = []
    for x in tensors_in((args, kwargs)):
        dims += [i for i, cut in enumerate(d.blocks.noted(x)) if cut is not None]
    name = name_of(func) or repr(func)
    why = f"it has no exact form where dims {sorted(set(dims))} are cut"
    right = "Compute it outside, or make the dim whole first: pmod.unshard."
    raise no_exact_form(name, why, right)


def _asks(d: Domain, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Answer for the whole what asks for its shape."""
    name, x = name_of(func), args[0]
    shape = d.blocks.whole(x)
    if name == "__len__":
        if not shape:
            return func(x)
        return shape[0]
    if name in ("numel", "nelement"):
        return math.prod(shape)
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return torch.Size(shape) if dim is None else shape[dim]


def _get_shape(d: Domain, func: Function, args: Args, kwargs: Kwargs) -> Any:
    return torch.Size(d.blocks.whole(args[0]))


def _get_bytes(d: Domain, func: Function, args: Args, kwargs: Kwargs) -> Any:
    return math.prod(d.blocks.whole(args[0])) * args[0].itemsize


def _get_alike(d: Domain, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Read an attribute that is cut as its tensor is."""
    layout = d.blocks.noted(args[0])
    y = func(*args)
    if isinstance(y, Tensor):
        known.note(y, layout)
    return y


def _get_turned(d: Domain, func: Function, args: Args, kwargs: Kwargs) -> Any:
    return turned(d.blocks, func, args[0])


def _get_free(d: Domain, func: Function, args: Args, kwargs: Kwargs) -> Any:
    return func(*args)


def _set(d: Domain, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Write an attribute: after x.data = y, x is cut as y is."""
    func(*args)
    if func.__self__ is Tensor.data:
        known.note(args[0], d.blocks.noted(args[1]))


def _set_part(d: Domain, func: Any, args: Args, kwargs: Kwargs) -> Any:
    d.blocks.follow(getattr(args[0], func.__self__.__name__).copy_, args[1])


def _gradients(d: Domain, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Run torch.autograd.grad: a gradient is cut as its input is."""
    inputs = kwargs.get("inputs", args[1] if len(args) > 1 else None)
    gradients = func(*args, **kwargs)
    for x, gradient in zip(tensors_in(inputs), gradients, strict=True):
        if gradient is not None:
            known.note(gradient, d.blocks.noted(x))
    return gradients


def _hook(d: Domain, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Let a tensor's hook see the whole of a gradient, as the program does."""
    x, f = args
    layout = d.blocks.noted(x)

    def seen(gradient: Tensor) -> Tensor | None:
        known.note(gradient, layout)
        with again(d):
            y = f(gradient)
        if y is None:
            return None
        return d.blocks.relayout(y, layout or (None,) * y.dim())

    return func(x, seen)


def _call(d: Domain, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Run a collective of the user's: along an axis that cuts nothing here."""
    call, xs = args[0], args[1]
    assert isinstance(call, Call)
    label = call.axis.label
    names = {label} if isinstance(label, str) else set(label)
    layouts = [d.blocks.noted(x) for x in xs]
    along = names & set(d.blocks.axes)
    if along and call.axis.size > 1:
        why = f"it goes along {sorted(along)}, over which domain_parallel cuts"
        right = "A model of whole fields needs no collective there: leave it out."
        raise no_exact_form(call.row.name, why, right)
    ys = func(*args, **kwargs)
    for x, y, layout in zip(xs, ys, layouts, strict=True):
        is_same = y.shape == x.shape or not layout
        if not is_same:
            right = "Call it outside, on the block."
            raise no_exact_form(call.row.name, "it changes a block's shape", right)
        known.note(y, layout)
    return ys


def _asks_for_place(d: Domain, func: Function, args: Args, kwargs: Kwargs) -> Any:
    """Answer for the place along an axis that cuts nothing here; refuse the others."""
    axis = args[-1]
    label = axis.label if isinstance(axis, Mesh) else axis
    names = {label} if isinstance(label, str) else set(label)
    if names & set(d.blocks.axes):
        why = "it tells ranks apart, and a program of the whole runs once"
        right = "Compute positions from shapes: torch.arange(x.shape[dim])."
        raise no_exact_form("axis_index", why, right)
    return func(*args, **kwargs)


# --- which function is taken how ------------------------------------------------------


def name_of(func: Function) -> str:
    return getattr(func, "__name__", "")


class _Handlers(dict[Function, Rule]):
    """A memo: how a function of torch is taken."""

    def __missing__(self, func: Function) -> Rule:
        self[func] = _handler(func)
        return self[func]


handlers = _Handlers()


def _handler(func: Function) -> Rule:
    if func is bind:
        return _call
    if func is axis_index or func is Mesh.axis_index:
        return _asks_for_place
    if func is torch.autograd.grad:
        return _gradients
    if func is domain_here:
        return _here
    if isinstance(func, (Operator, OperatorPacket, HigherOrderOperator)):
        return _refuse
    name = name_of(func)
    if name in ("__get__", "__set__", "__delete__"):
        return _attribute(func, name)
    module = getattr(func, "__module__", None) or "torch"
    if module.split(".")[0] != "torch":
        # pmod's own questions, and libraries that ask function modes as torch does
        return _free if module.split(".")[0] == "pmod" else _refuse
    return _named(func, name)


def _named(func: Function, name: str) -> Rule:
    if name in ("size", "numel", "nelement", "__len__"):
        return _asks
    if name in FREE:
        return _free
    if name == "register_hook":
        return _hook
    is_python = isinstance(func, FunctionType)
    if name in RULES and (not is_python or name in OUTER):
        return _by_rule_always if name in DRAWS else _by_rule
    if is_python:
        return _enter
    if name in POINTWISE:
        return _elementwise
    if name in IN_PLACE:
        return _changed
    return _refuse


def _attribute(func: Any, name: str) -> Rule:
    what = getattr(func.__self__, "__name__", "")
    if name == "__set__":
        return _set_part if what in ("real", "imag") else _set
    if what == "shape":
        return _get_shape
    if what == "nbytes":
        return _get_bytes
    if what in ("T", "mT", "H", "mH"):
        return _get_turned
    if what in ("real", "imag", "grad", "data"):
        return _get_alike
    if what in FREE_ATTRIBUTES:
        return _get_free
    return _refuse


@cache
def unasked(func: FunctionType) -> FunctionType:
    """Return a Python function of torch that does not ask whether a mode wants it."""

    def no(*args: object, **kwargs: object) -> bool:
        return False

    asks = (
        "has_torch_function",
        "has_torch_function_unary",
        "has_torch_function_variadic",
    )
    answers = dict.fromkeys(asks, no)
    f = FunctionType(
        func.__code__,
        {**func.__globals__, **answers},
        func.__name__,
        func.__defaults__,
        func.__closure__,
    )
    f.__kwdefaults__ = func.__kwdefaults__
    return f


# --- asking for the mode --------------------------------------------------------------


def domain_here() -> Domain | None:
    """Return the innermost domain whose function runs, or None."""
    if count_function_modes() == 0:
        return None
    return handle_torch_function(domain_here, ())


def _here(d: Domain, func: Function, args: Args, kwargs: Kwargs) -> Domain:
    return d


class again:
    """A context in which a program that ran goes on: in hooks and checkpoints."""

    def __init__(self, d: Domain) -> None:
        self._domain = d
        self._before: list[under] = []

    def __enter__(self) -> None:
        mesh = under(self._domain.blocks.mesh)
        self._before.append(mesh)
        mesh.__enter__()
        self._domain.__enter__()

    def __exit__(self, *error: Any) -> None:
        mesh = self._before.pop()
        self._domain.__exit__(*error)
        mesh.__exit__(*error)
