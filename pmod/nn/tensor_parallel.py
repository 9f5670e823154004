"""Tensor parallelism of a model that exists: some of its layers, cut over an axis.

    pmod.nn.tensor_parallel(model, {"*.qkv": column(groups=3), "*.fc1": "column", "*.fc2": "row"}, "model")

A column layer takes what all ranks hold (I) and gives this rank some of its features
(V); a row layer takes those and gives the sum over the ranks (I). Between the two each
rank computes with its features alone, so one `pvary` and one `psum` are all that is
sent, and all derivatives are theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar, cast

import attrs
import torch
from torch import Tensor, nn

from pmod._collectives.values import pick
from pmod._core.arguments import (
    as_int,
    as_ints,
    check_flag,
    check_tensor,
    wrong,
)
from pmod._errors import ArgumentError, ShapeError, quoted
from pmod._mesh.ambient import current_mesh, resolve
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import AxisLike, Mesh
from pmod._torch import (
    accumulation_hooks,
    forward_hooks,
    forward_pre_hooks,
)
from pmod.nn.cut_layers import (
    NAME,
    ColumnLayer,
    CutLayer,
    Form,
    Laid,
    RowEmbedding,
    RowLayer,
    form_of,
    lay,
)

M = TypeVar("M", bound=nn.Module)

# what attention modules call the number of their heads, the length of one, and the
# length of all of them; the first and the last become those of this rank
_HEADS = (
    "num_heads n_heads n_head nhead heads num_attention_heads n_kv_heads n_kv_head "
    "num_kv_heads num_key_value_heads num_query_heads"
)
_HEAD_LENGTHS = (
    "head_dim d_head dim_head head_size attention_head_size d_k key_value_proj_dim"
)
_WIDTHS = (
    "split_size embed_dim all_head_size inner_dim hidden_size d_model dim n_embd "
    "embedding_dim attn_dim emb_dim embed_size"
)
# names of the layers that make queries, keys and values, and of those of a perceptron
_ATTENTION = re.compile(
    r"(^|_|to)(q|k|v|qkv|kv|query|key|value)(_|$|proj)|^w[qkv]$|attn$"
)
_PERCEPTRON = re.compile(
    r"fc|^lin(ear)?_?\d|mlp|ff|up|gate|^w(i|\d)|4h|intermediate|expand"
)

# --- how a layer is cut ---------------------------------------------------------------


@attrs.frozen
class Column:
    """A layer whose output features are cut: `groups`, `heads` and `gather` of `column`.

    >>> pmod.nn.column(groups=3, heads="h").heads
    'h'
    """

    groups: int | tuple[int, ...] | None
    heads: str | bool | None
    gather: bool


def column(
    groups: int | Sequence[int] | None = None,
    *,
    heads: str | bool | None = None,
    gather: bool = False,
) -> Column:
    """Return how `tensor_parallel` cuts a layer's output features.

    groups: how many layers of equal width are fused into one, or their widths; each is
    cut for itself: 3 for queries, keys and values one after the other. heads: the
    attribute of the module around it that counts its heads, if it is not one of the
    usual names; False if it has none. gather: whether all features are joined again, for the last layer of a
    model.
    Raises: ShapeError if groups is not of ints above 0; ArgumentError if heads is not a
    name.

    >>> pmod.nn.column(groups=3)
    Column(groups=3, heads=None, gather=False)
    """
    parsed: int | tuple[int, ...] | None = None
    if groups is not None:
        parsed = as_int(groups)
        # a float or a text is neither
        widths = as_ints(groups) if parsed is None else (parsed,)
        if not widths or min(widths) < 1:
            text = f"pmod.nn.column: groups is {quoted(groups)}.\nPass an int of 1 or more, or a width for each group."
            raise ShapeError(text)
        if parsed is None:
            parsed = widths
    if heads is not None and heads is not False and not isinstance(heads, str):
        text = f"pmod.nn.column: heads is {quoted(heads)}.\nPass the name of an attribute, or False."
        raise ArgumentError(text)
    check_flag(gather, "nn.column", "gather")
    return Column(parsed, heads, bool(gather))


# --- which layers ---------------------------------------------------------------------


class _Found(NamedTuple):
    """A layer of the plan, where it is, and how it is cut."""

    layer: nn.Module
    names: list[str]
    cut: Column | None  # None for a row layer
    form: Form

    @property
    def last(self) -> str:
        """What the module around the layer calls it."""
        return self.names[0].rpartition(".")[2]

    @property
    def length(self) -> int:
        """The length of the dim of the weight that is cut."""
        weight = cast(Tensor, self.layer.weight)
        return int(weight.shape[self.form.into if self.cut is None else self.form.out])

    @property
    def widths(self) -> tuple[int, ...]:
        """The groups that are cut, each for itself."""
        groups = None if self.cut is None else self.cut.groups
        if isinstance(groups, tuple):
            return groups
        count = groups or 1
        return (self.length // count,) * count

    def parts(self, axis: Axis) -> dict[str, Laid]:
        """Return how each parameter that is cut is laid out."""
        at = self.form.into if self.cut is None else self.form.out
        laid = {"weight": lay(at, self.widths, axis)}
        if self.cut is not None and getattr(self.layer, "bias", None) is not None:
            laid["bias"] = lay(0, self.widths, axis)
        return laid


def _parsed(given: object, pattern: str, axis: Axis) -> Column | None:
    if isinstance(given, Column):
        return given
    if given not in ("column", "row"):
        text = f"plan[{pattern!r}] is {quoted(given)}"
        right = "Pass 'column', 'row' or pmod.nn.column(...)."
        raise wrong(ArgumentError, NAME, axis, text, right)
    return column() if given == "column" else None


def _matched(module: nn.Module, plan: Mapping[str, Any], axis: Axis) -> list[_Found]:
    """Return the layers that the plan names, each once."""
    found: dict[int, _Found] = {}
    for pattern, given in plan.items():
        cut = _parsed(given, pattern, axis)
        count = 0
        for name, layer in module.named_modules(remove_duplicate=False):
            # "*.fc" is for an "fc" at the top as well
            if not name or not (
                fnmatchcase(name, pattern) or fnmatchcase(f".{name}", pattern)
            ):
                continue
            count += 1
            known = found.get(id(layer))
            if known is None:
                form = _checkedform_of(layer, name, axis)
                found[id(layer)] = _Found(layer, [name], cut, form)
            elif known.cut != cut:
                text = (
                    f"two patterns of the plan name {name} and cut it in different ways"
                )
                raise wrong(ArgumentError, NAME, axis, text, "Name each layer once.")
            elif name not in known.names:
                known.names.append(name)
        if not count:
            text = f"no layer has a name like {pattern!r}"
            some = [name for name, _ in module.named_modules() if name][:6]
            right = f"The names are those of named_modules(): {', '.join(some)}, ..."
            raise wrong(ArgumentError, NAME, axis, text, right)
    return list(found.values())


def _checkedform_of(layer: nn.Module, name: str, axis: Axis) -> Form:
    """Return the form of a layer; raise if it cannot be cut."""
    form, right = (
        form_of(layer),
        "Name layers that are an nn.Linear, a convolution, an nn.Embedding or a Conv1D of transformers.",
    )
    given = f"{name} is a {type(layer).__name__}"
    if form is None:
        if isinstance(layer, nn.MultiheadAttention):
            right = "It does not call its projections. Write them as nn.Linear, and scaled_dot_product_attention."
        raise wrong(ArgumentError, NAME, axis, given, right)
    options: Any = layer
    is_convolution = form.function.startswith("conv")
    if is_convolution and (options.groups != 1 or options.padding_mode != "zeros"):
        given += (
            f" with groups={options.groups} and padding_mode={options.padding_mode!r}"
        )
        right = (
            "Leave it whole: only convolutions with one group and zeros around are cut."
        )
        raise wrong(ArgumentError, NAME, axis, given, right)
    if form.function == "embedding" and (
        options.max_norm is not None or options.scale_grad_by_freq or options.sparse
    ):
        given += " with max_norm, scale_grad_by_freq or sparse"
        raise wrong(ArgumentError, NAME, axis, given, "Leave it whole.")
    hooks = [*forward_hooks(layer).values(), *forward_pre_hooks(layer).values()]
    for p in layer.parameters():
        hooks += accumulation_hooks(p).values()
    if hooks:
        given = f"{name} has hooks, of share_parameters, data_parallel or weight_norm for example"
        raise wrong(
            ArgumentError,
            NAME,
            axis,
            given,
            "Call tensor_parallel first, and attach them then.",
        )
    return form


def _check_lengths(found: Sequence[_Found], axis: Axis) -> None:
    """Raise if groups do not add up, or a rank would have nothing."""
    for of in found:
        if sum(of.widths) != of.length:
            assert of.cut is not None
            given = f"{of.names[0]} has {of.length} output features and groups is {of.cut.groups}"
            raise wrong(
                ShapeError, NAME, axis, given, "Pass groups that add up to them."
            )
        if 0 in of.parts(axis)["weight"].sizes:
            given = f"of the {of.length} features or rows of {of.names[0]} a rank would have none"
            raise wrong(ShapeError, NAME, axis, given, "Leave it whole.")


def _check_tied(module: nn.Module, found: Sequence[_Found], axis: Axis) -> None:
    """Raise if a parameter is in two layers that are not cut alike."""
    cuts: dict[int, dict[str, Laid]] = {id(of.layer): of.parts(axis) for of in found}
    first: dict[int, tuple[str, Laid | None]] = {}
    for name, layer in module.named_modules():
        for key, p in layer.named_parameters(recurse=False):
            laid = cuts.get(id(layer), {}).get(key)
            path = f"{name}.{key}".lstrip(".")
            other, before = first.setdefault(id(p), (path, laid))
            if before != laid:
                given = f"{path} and {other} are one parameter, and are not cut alike"
                right = (
                    "Cut both along the same dim, or neither: the 'row' of an embedding is "
                    "the 'column' of a linear layer, column(gather=True) at the end of a model."
                )
                raise wrong(ArgumentError, NAME, axis, given, right)


# --- heads ----------------------------------------------------------------------------


def _ints(module: nn.Module, names: str) -> dict[str, int]:
    """Return those of these attributes that a module has, and are ints above 0."""
    held = vars(module)
    found: dict[str, int] = {}
    for name in names.split():
        value = held.get(name)
        if type(value) is int and value > 0:
            found[name] = value
    return found


def _by_parent(
    module: nn.Module, found: Sequence[_Found]
) -> list[tuple[str, nn.Module, list[_Found]]]:
    """Return the modules right around column layers, each with these."""
    parents: dict[int, tuple[str, nn.Module, list[_Found]]] = {}
    for of in found:
        if of.cut is None or of.cut.gather or of.form.function == "embedding":
            continue
        for name in of.names:
            path = name.rpartition(".")[0]
            parent = module.get_submodule(path)
            held = parents.setdefault(id(parent), (path, parent, []))[2]
            if of not in held:
                held.append(of)
    return list(parents.values())


def _divided(
    path: str, parent: nn.Module, layers: Sequence[_Found], axis: Axis
) -> dict[str, int]:
    """Return the attributes of an attention module that become those of this rank.

    Raise if its heads do not divide, or nothing tells how many there are.
    """
    for child in parent.children():
        if isinstance(child, ColumnLayer):
            given = f"a part of {path or 'the module'} is cut already"
            raise wrong(
                ArgumentError,
                NAME,
                axis,
                given,
                "Cut all layers of a module in one call.",
            )
    told = [of.cut.heads for of in layers if of.cut is not None]
    named = [name for name in told if isinstance(name, str)]
    counts = _ints(parent, " ".join([*named, _HEADS]))
    for name in named:
        if name not in counts:
            given = (
                f"heads is {name!r}, and {path or 'the module'} has no int of this name"
            )
            right = "Name the attribute that counts its heads."
            raise wrong(ArgumentError, NAME, axis, given, right)
    lengths = _ints(parent, _HEAD_LENGTHS)
    for of in layers:
        _check_known(of, [*counts, *lengths], path, axis)
    if not any(map(_has_heads, layers)):
        return {}
    for name, count in counts.items():
        if count % axis.size:
            given = f"{path}.{name} is {count}, which does not divide by {axis.size}"
            raise wrong(ShapeError, NAME, axis, given.lstrip("."), _WHOLE_HEADS)
    if not counts:
        for of in filter(_has_heads, layers):
            _check_head_length(of, next(iter(lengths.items())), axis)
        return {}
    widths = {width for of in filter(_has_heads, layers) for width in of.widths}
    for name, width in _ints(parent, _WIDTHS).items():
        if width in widths and width % axis.size == 0:
            counts[name] = width
    return {name: value // axis.size for name, value in counts.items()}


_WHOLE_HEADS = (
    "A head stays on one rank: use an axis whose size divides it, "
    "or leave these layers whole."
)


def _has_heads(of: _Found) -> bool:
    """Return whether a layer makes queries, keys or values."""
    assert of.cut is not None
    if of.cut.heads is not None:
        return of.cut.heads is not False
    return _ATTENTION.search(of.last) is not None


def _check_head_length(of: _Found, length: tuple[str, int], axis: Axis) -> None:
    name, of_one = length
    for width in of.widths:
        if width % (of_one * axis.size):
            heads = f"{width / of_one:g} heads ({name} is {of_one})"
            given = f"{of.names[0]} has {heads}, which do not divide by {axis.size}"
            raise wrong(ShapeError, NAME, axis, given, _WHOLE_HEADS)


def _check_known(of: _Found, known: Sequence[str], path: str, axis: Axis) -> None:
    """Raise if a layer may have heads, and it is not certain how they lie in it.

    known: the attributes of the module around it that tell of heads.
    """
    name, cut = of.names[0], of.cut
    assert cut is not None
    weight = cast(Tensor, of.layer.weight)
    into = int(weight.shape[of.form.into])
    if _has_heads(of):
        if not known:
            given = f"nothing says how many heads {name} has"
            right = "Pass column(heads=...): the attribute of the module around it that counts them, or False."
            raise wrong(ArgumentError, NAME, axis, given, right)
        if cut.groups is None and of.length in (2 * into, 3 * into):
            given = f"{name} makes {of.length} features of {into}"
            right = (
                "Is it queries, keys and values in one? Pass column(groups=3), "
                "or column(groups=1) if its features are in the order of the heads."
            )
            raise wrong(ArgumentError, NAME, axis, given, right)
    elif known and cut.heads is None and not _PERCEPTRON.search(of.last):
        given = f"{name} may make heads: {path or 'the module'} has {known[0]}"
        right = (
            f"Pass column(heads={known[0]!r}), or column(heads=False) if it makes none."
        )
        raise wrong(ArgumentError, NAME, axis, given, right)


# --- the swap -------------------------------------------------------------------------


def _make_equal(module: nn.Module, over: Mesh, axis: Axis) -> None:
    """Give all ranks the values of the first."""
    state: dict[str, Tensor] = dict(module.named_parameters())
    state.update(module.named_buffers())
    for name, tensor in state.items():
        check_tensor(tensor, NAME, axis, name=name)
    with torch.no_grad():
        held = {name: tensor.detach() for name, tensor in state.items()}
        equal = pick(held, over)
        for name, tensor in held.items():
            tensor.copy_(equal[name])


def _cut_layer(
    of: _Found, over: Mesh, axis: Axis, made: dict[int, nn.Parameter]
) -> nn.Module:
    """Return the layer of this rank's part; parameters that were tied are so again."""
    parts = of.parts(axis)
    if of.cut is not None:
        new: CutLayer = ColumnLayer(of.layer, of.form, over, parts, of.cut.gather)
    elif of.form.function == "embedding":
        new = RowEmbedding(of.layer, of.form, over, parts)
    else:
        new = RowLayer(of.layer, of.form, over, parts)
    parameters: dict[str, nn.Parameter | None] = {}
    for name, p in of.layer.named_parameters():
        if name in parts and id(p) not in made:
            part = parts[name].cut(p.detach(), axis.index)
            made[id(p)] = nn.Parameter(part, requires_grad=p.requires_grad)
        parameters[name] = made.get(id(p), p)
    parameters.setdefault("bias", None)
    new.hold(parameters)
    return new.train(of.layer.training)


def tensor_parallel(module: M, plan: Mapping[str, str | Column], axis: AxisLike) -> M:
    """Cut layers of a model over an axis, in place, and return the model.

    plan: for patterns of the names of `named_modules()`, "column", "row" or
    `column(...)`. A "column" layer is cut along its output features, a "row" layer
    along its input features: what lies between the two is computed with this rank's
    features alone. An nn.Linear, an nn.Conv1d, 2d or 3d (with one group), a Conv1D of
    transformers; of an nn.Embedding "row" are the rows of some numbers, "column" some
    features of all. The number of heads (num_heads and other usual names) in the module
    around column layers, and their width, become those of this rank.
    The values are made equal first, from the first rank. Call it before the optimizer
    is made. All ranks call the model with one value (I) and get one value; a loss is
    that of one process, and so are the gradients: those of the cut layers this rank's
    parts of them, the others whole and equal on all ranks.
    `state_dict` and `load_state_dict` of the model are those of the model before, and
    all ranks of the axis call them.

    I -> I. Cost: a pvary for each column layer, a psum for each row layer, both of its
    whole side.
    Raises: ArgumentError if a pattern names nothing, or what cannot be cut: parameters
    that are tied to others, fused layers of which the groups are not known; ShapeError
    if heads do not divide by the axis. In the first call with gradients MismatchError
    if a parameter that is whole is used on this rank's features alone.
    Random numbers, of dropout, are those of each rank's generator: seed them alike.
    Where a model divides by a number of heads or features that is not an attribute of
    that module, compare a result with that of one process.

    >>> def outputs():
    ...     model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    ...     pmod.nn.tensor_parallel(model, {"0": "column", "2": "row"}, "model")
    ...     return tuple(model[0].weight.shape), tuple(model.state_dict()["0.weight"].shape)
    >>> pmod.simulate(outputs, model=2)
    [((2, 2), (4, 2)), ((2, 2), (4, 2))]
    """
    bound = resolve(axis, NAME)
    if not isinstance(module, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        given = f"module is a {type(module).__name__}"
        raise wrong(ArgumentError, NAME, bound, given, "Pass an nn.Module.")
    if not isinstance(plan, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        given = f"plan is {quoted(plan)}"
        raise wrong(
            ArgumentError,
            NAME,
            bound,
            given,
            "Pass {pattern: 'column', 'row' or pmod.nn.column(...)}.",
        )
    over = axis if isinstance(axis, Mesh) else current_mesh()[axis]
    found = _matched(module, plan, bound)
    _check_lengths(found, bound)
    _check_tied(module, found, bound)
    changes: list[tuple[nn.Module, dict[str, int]]] = []
    for path, parent, layers in _by_parent(module, found):
        changes.append((parent, _divided(path, parent, layers, bound)))
    _make_equal(module, over, bound)
    made: dict[int, nn.Parameter] = {}
    for of in found:
        new = _cut_layer(of, over, bound, made)
        for name in of.names:
            path, _, last = name.rpartition(".")
            parent = module.get_submodule(path)
            setattr(parent, last, new)
            if isinstance(parent, nn.TransformerEncoderLayer):
                # else it takes the weights, not the layers, in inference
                parent.activation_relu_or_gelu = 0
    for parent, values in changes:
        for name, value in values.items():
            setattr(parent, name, value)
    return module
