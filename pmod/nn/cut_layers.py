"""Layers of which each rank holds a part, and how their parameters are laid out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmod._collectives.slices import unshard
from pmod._collectives.values import psum, pvary
from pmod._core.arguments import shares, wrong
from pmod._core.lineage import lineage, name_of
from pmod._core.marks import is_marked_varying, mark_varying
from pmod._core.watch import called_as
from pmod._errors import MismatchError, ShapeError
from pmod._mesh.ambient import resolve
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import Mesh
from pmod._torch import are_transforms_active

NAME = "nn.tensor_parallel"
_CALLED = "tensor_parallel"


class Laid(NamedTuple):
    """How a dim of a whole parameter is cut: the stretches of it that each rank holds."""

    dim: int
    stretches: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The lengths of the ranks' parts."""
        return tuple(map(_length, self.stretches))

    def cut(self, whole: Tensor, index: int) -> Tensor:
        """Return a rank's part, in memory of its own."""
        parts: list[Tensor] = []
        for at, end in self.stretches[index]:
            parts.append(whole.narrow(self.dim, at, end - at))
        return torch.cat(parts, self.dim)

    def joined(self, parts: Tensor, dim: int) -> Tensor:
        """Return the whole of all ranks' parts, which stand one after the other."""
        held = [of for rank in self.stretches for of in rank]
        pieces = parts.split([end - at for at, end in held], dim)
        order = sorted(range(len(held)), key=held.__getitem__)
        return torch.cat([pieces[i] for i in order], dim)


def _length(stretches: Sequence[tuple[int, int]]) -> int:
    return sum(end - start for start, end in stretches)


def lay(dim: int, widths: Sequence[int], axis: Axis) -> Laid:
    """Return how groups of these widths are cut, each for itself."""
    held: list[list[tuple[int, int]]] = [[] for _ in range(axis.size)]
    for start, end in pairwise(accumulate(widths, initial=0)):
        cuts = accumulate(shares(end - start, axis), initial=start)
        for of, stretch in zip(held, pairwise(cuts), strict=True):
            of.append(stretch)
    return Laid(dim, tuple(map(tuple, held)))


class Form(NamedTuple):
    """What there is to know of a kind of layer.

    Its weight's dims of output and input, and the dim of the features in x.
    """

    function: str
    out: int
    into: int
    features: int


def form_of(layer: nn.Module) -> Form | None:
    """Return the form of a layer that can be cut, else None."""
    # a subclass may compute something else
    kind = type(layer)
    if kind is nn.Linear:
        return Form("linear", 0, 1, -1)
    if kind is nn.Embedding:
        return Form("embedding", 1, 0, -1)
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        return Form("transposed", 1, 0, -1)
    convolutions = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
    if kind in convolutions:
        count = convolutions[kind]
        return Form(f"conv{count}d", 0, 1, -count - 1)
    return None


class CutLayer(nn.Module):
    """A layer of which this rank holds a part; its state_dict is that of the whole."""

    _over: Mesh
    # of each parameter that is cut
    _parts: dict[str, Laid]
    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, layer: nn.Module, form: Form, over: Mesh, parts: dict[str, Laid]
    ) -> None:
        super().__init__()
        self._form, self._over, self._parts = form, over, parts
        self._options: dict[str, Any] = {}
        if form.function.startswith("conv"):
            for name in ("stride", "padding", "dilation"):
                self._options[name] = getattr(layer, name)
        for name in ("in_features", "out_features", "in_channels", "out_channels",
                     "num_embeddings", "embedding_dim", "padding_idx", "nf", "nx"):  # fmt: skip
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        # whether the first call with gradients has looked at what it was given
        self._looked = False
        self._marked: int | None = None
        self.register_state_dict_post_hook(_save_whole)
        self.register_load_state_dict_pre_hook(_load_part)

    def hold(self, parameters: Mapping[str, nn.Parameter | None]) -> None:
        """Register the parameters, which may be those of another layer too."""
        for name, p in parameters.items():
            self.register_parameter(name, p)

    def extra_repr(self) -> str:
        """Say what is cut, and which part this is."""
        lengths = [f"{name}={tuple(p.shape)}" for name, p in self.named_parameters()]
        place = f"part {resolve(self._over, NAME).index} of {self._over.size}"
        return f"{self._form.function}, {', '.join(lengths)}, {place}"

    def _mark(self) -> None:
        # by id, because a copy of the module has parameters of its own
        if torch.compiler.is_compiling() or self._marked == id(self.weight):
            return
        for name in self._parts:
            mark_varying(getattr(self, name), self._over)
        self._marked = id(self.weight)

    def _affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        function = self._form.function
        if function == "linear":
            return F.linear(x, self.weight, bias)
        if function == "transposed":
            return F.linear(x, self.weight.mT, bias)
        return getattr(F, function)(x, self.weight, bias, **self._options)

    def _look(self, x: Tensor, axis: Axis) -> None:
        """Raise if something that all ranks hold went into x without pvary.

        Its gradient would be this rank's part of it. The first call with gradients
        looks, in eager code.
        """
        if self._looked or axis.size == 1 or not x.requires_grad:
            return
        if torch.compiler.is_compiling() or are_transforms_active():
            return
        found = lineage(x, axis)
        for leaf, _ in found.leaves:
            if isinstance(leaf, nn.Parameter) and not is_marked_varying(leaf, axis):
                given = f"{name_of(leaf)} is whole, and is used on this rank's features alone"
                right = (
                    "Its gradient would be a part of it: give the module that holds it "
                    "to pmod.share_parameters over this axis."
                )
                raise wrong(MismatchError, NAME, axis, given, right)
        if found.invariant:
            given = "the result of a collective, one value (I), meets this rank's features without pvary"
            right = f"Put pmod.pvary(..., {axis.label!r}) around it; under pmod.debug() the error names the line."
            raise wrong(MismatchError, NAME, axis, given, right)
        self._looked = True


def _save_whole(
    layer: nn.Module, state: dict[str, Any], prefix: str, metadata: object
) -> None:
    """Put the whole parameters into a state_dict: all ranks of the axis ask for it."""
    assert isinstance(layer, CutLayer)
    for name, laid in layer._parts.items():
        part = state[prefix + name]
        whole = unshard(part, layer._over, dim=laid.dim, sizes=laid.sizes)
        state[prefix + name] = laid.joined(whole, laid.dim)


def _load_part(
    layer: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: object,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Take this rank's part out of the whole parameters that are loaded."""
    assert isinstance(layer, CutLayer)
    for name, laid in layer._parts.items():
        given = state.get(prefix + name)
        if given is None:
            continue
        shape = list(getattr(layer, name).shape)
        shape[laid.dim] = sum(laid.sizes)
        if list(given.shape) != shape:
            # torch raises all of them together
            has = f"the state_dict has {tuple(given.shape)}, the whole {tuple(shape)}"
            errors.append(f"size mismatch for {prefix + name}: {has}.")
            del state[prefix + name]
            continue
        index = resolve(layer._over, NAME).index
        state[prefix + name] = laid.cut(given, index)


class ColumnLayer(CutLayer):
    """A layer of which each rank has some output features. I -> V; I with gather."""

    def __init__(
        self,
        layer: nn.Module,
        form: Form,
        over: Mesh,
        parts: dict[str, Laid],
        gather: bool,
    ) -> None:
        super().__init__(layer, form, over, parts)
        self._gathers = gather

    def forward(self, x: Tensor) -> Tensor:
        """Return this rank's features of the layer's output."""
        self._mark()
        if self._form.function == "embedding":
            # its input is whole numbers, which no gradient flows back to
            y = F.embedding(x, self.weight, cast(Any, self).padding_idx)
        else:
            y = self._affine(called_as(_CALLED, pvary, x, self._over), self.bias)
        if not self._gathers:
            return y
        self._look(y, resolve(self._over, NAME))
        laid, at = self._parts["weight"], self._form.features
        return laid.joined(unshard(y, self._over, dim=at, sizes=laid.sizes), at)


class RowLayer(CutLayer):
    """A layer of which each rank has some input features. V -> I."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output: the sum of the ranks' parts of it."""
        self._mark()
        axis = resolve(self._over, NAME)
        own = int(self.weight.shape[self._form.into])
        if x.shape[self._form.features] != own:
            whole = sum(self._parts["weight"].sizes)
            got = x.shape[self._form.features]
            given = (
                f"a row layer gets {got} features, and this rank holds {own} of {whole}"
            )
            right = "Its input is what a column layer gave: cut that one too, in as many parts."
            raise wrong(ShapeError, NAME, axis, given, right)
        self._look(x, axis)
        y = called_as(_CALLED, psum, self._affine(x, None), self._over)
        if self.bias is None:
            return y
        # once, after the sum; under autocast in the dtype of the product
        bias = self.bias.to(y.dtype)
        return y + bias.view(-1, *[1] * (-self._form.features - 1))


class RowEmbedding(CutLayer):
    """An embedding of which each rank has the rows of some numbers. I -> I."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the rows that x names."""
        self._mark()
        laid = self._parts["weight"]
        ((start, end),) = laid.stretches[resolve(self._over, NAME).index]
        here = (x >= start) & (x < end)
        # a number that no rank has the row of is an error of torch's on every rank
        outside = (x < 0) | (x >= sum(laid.sizes))
        rows = (x - start).where(here, torch.where(outside, end - start, 0))
        padding = cast(Any, self).padding_idx
        if padding is not None:
            padding = padding - start if start <= padding < end else None
        y = F.embedding(rows, self.weight, padding)
        return called_as(_CALLED, psum, y.where(here.unsqueeze(-1), 0), self._over)
