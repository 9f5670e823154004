"""Which operations of torch there are, and what each does to the kinds of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from pmod._core.leaves import tensors_in
from pmod._shard.traced import written_places
from pmod._torch import (
    TYPED_STORAGE,
    HigherOrderOperator,
    Operator,
    OperatorPacket,
    constant_in_graphs,
)

T = TypeVar("T")

Function: TypeAlias = Callable[..., Any]
Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]
"""What a function mode is given: the function that is called, and its arguments."""

# They take no tensor, and every rank makes the same of the same numbers: what they make
# is I until the rank asks for its index.
SAME = {
    "zeros",
    "ones",
    "full",
    "empty",
    "eye",
    "arange",
    "linspace",
    "logspace",
    "tensor",
    "as_tensor",
    "asarray",
    "scalar_tensor",
    "tril_indices",
    "triu_indices",
    "fft_fftfreq",
    "fft_rfftfreq",
}
# They take lengths of their results. A length that is that of an uneven shard is the
# rank's own, and so is then what they make.
LENGTHS = {"expand", "broadcast_to", "repeat", "tile", "repeat_interleave", "narrow"}
# The length of their result depends on the values: where these vary, it is a length of
# the rank's own.
BY_VALUE = {
    "nonzero",
    "argwhere",
    "masked_select",
    "unique",
    "unique_consecutive",
    "bincount",
}
# They make views. The tracer may show a view without its base, and what is written into
# one would then be missed in the other.
VIEWS = {
    "__getitem__",
    "view",
    "reshape",
    "transpose",
    "t",
    "permute",
    "select",
    "narrow",
    "expand",
    "squeeze",
    "chunk",
    "unsqueeze",
    "flatten",
    "unflatten",
    "swapaxes",
    "movedim",
    "diagonal",
    "split",
    "unbind",
    "detach",
    "view_as",
    "swapaxes_",
    "transpose_",
    "t_",
    "squeeze_",
    "unsqueeze_",
    "detach_",
    "alias",
}
# Each rank draws its own numbers.
RANDOM = {
    "rand",
    "randn",
    "randint",
    "randperm",
    "normal",
    "bernoulli",
    "multinomial",
    "poisson",
    "binomial",
    "rand_like",
    "randn_like",
    "randint_like",
    "normal_",
    "uniform_",
    "bernoulli_",
    "random_",
    "exponential_",
    "cauchy_",
    "geometric_",
    "log_normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
    "gumbel_softmax",
}
DROPOUT = {
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "feature_alpha_dropout",
    "dropout_",
}
# By place, where dropout_p is among their arguments.
ATTENTION = {
    "scaled_dot_product_attention": 4,
    "multi_head_attention_forward": 10,
}
# They change running statistics, of which torch counts no version: the argument that
# says so, and its default.
STATISTICS = {
    "batch_norm": ("training", False),
    "instance_norm": ("use_input_stats", True),
}
# Their result is a number, or memory that others read. What a rank goes on to do with
# it is not followed, so it counts as knowing its own place from here on.
NUMBERS = {
    "item",
    "tolist",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__complex__",
    "__contains__",
    "numpy",
    "__array__",
    "equal",
    "allclose",
    "is_nonzero",
    "untyped_storage",
    "storage",
    TYPED_STORAGE,
    "data_ptr",
    "__dlpack__",
}

# Their kinds are decided one by one, whatever their name says.
_OWN_RULES = {"grad", "backward", "rrelu", "__getitem__", "__get__", "__set__"}
_SPECIAL = (
    SAME
    | LENGTHS
    | BY_VALUE
    | RANDOM
    | DROPOUT
    | ATTENTION.keys()
    | STATISTICS.keys()
    | NUMBERS
    | _OWN_RULES
)

# x[i] = y, x += y and the like. Others begin with __i, too: __int__, __iter__.
_ASSIGNMENTS = {
    "__setitem__",
    "__iadd__",
    "__isub__",
    "__imul__",
    "__imatmul__",
    "__itruediv__",
    "__ifloordiv__",
    "__imod__",
    "__ipow__",
    "__ilshift__",
    "__irshift__",
    "__iand__",
    "__ixor__",
    "__ior__",
    # torch has kept that of Python 2
    "__idiv__",
}

_MASKS = (torch.bool, torch.uint8)


def name_of(func: Function) -> str:
    """Return the name of an operation, "" if it has none."""
    name = getattr(func, "__name__", "")
    if isinstance(func, Operator):
        # an operator of torch.ops adds its overload, as in add.Tensor
        return name.split(".")[0]
    return name


def is_higher_order(func: Function) -> bool:
    """Return whether it runs a function of the user's, in a graph of its own."""
    return isinstance(func, HigherOrderOperator)


# Dynamo cannot trace what they ask of an operator; their answer never changes.
for _constant in (name_of, is_higher_order):
    constant_in_graphs(_constant)


class _Plain(dict[Function, bool]):
    """A memo: whether a function is torch's, and its result varies as its tensors do.

    Nor does it change a tensor. Every operation in a body asks, so the answers are kept.
    """

    def __missing__(self, func: Function) -> bool:
        self[func] = _has_no_rule(func)
        return self[func]


plain = _Plain()


def _has_no_rule(func: Function) -> bool:
    if isinstance(func, (Operator, OperatorPacket, HigherOrderOperator)):
        return False
    # a method of Tensor has no module
    module = getattr(func, "__module__", None) or "torch"
    if module.split(".")[0] != "torch":
        return False
    name = name_of(func)
    return name not in _SPECIAL and not is_in_place(name)


def is_in_place(name: str) -> bool:
    """Return whether an operation of this name changes what it is called on."""
    if name.endswith("__"):
        return name in _ASSIGNMENTS
    return name.endswith("_")


def changed_by(func: Function, name: str, args: Args, kwargs: Kwargs) -> list[Tensor]:
    """Return the tensors that it changes in place.

    The name says so; of an operator of torch.ops, its schema.
    """
    if name in STATISTICS:
        flag, usual = STATISTICS[name]
        if not _given(flag, 5, usual, args, kwargs):
            return []
        by_name = [kwargs.get("running_mean"), kwargs.get("running_var")]
        return tensors_in([args[1:3], *by_name])
    if "out" in kwargs or is_in_place(name):
        return tensors_in(kwargs.get("out", args[:1]))
    if kwargs.get("inplace") is True:
        return tensors_in(args[:1])
    written: list[object] = []
    for place in written_places(func):
        if isinstance(place, str):
            written.append(kwargs.get(place))
        elif place < len(args):
            written.append(args[place])
    return tensors_in(written)


def draws(name: str, args: Args, kwargs: Kwargs) -> bool:
    """Return whether it draws random numbers."""
    if name in DROPOUT:
        # torch.dropout calls it train, torch.nn.functional's training
        training = kwargs.get("training", _given("train", 2, True, args, kwargs))
        return bool(_given("p", 1, 0.5, args, kwargs) > 0 and training)
    if name in ATTENTION:
        chance = _given("dropout_p", ATTENTION[name], 0.0, args, kwargs)
        return bool(chance > 0 and kwargs.get("training", True))
    if name == "rrelu":
        return bool(_given("training", 3, False, args, kwargs))
    return name in RANDOM


def _given(name: str, place: int, usual: T, args: Args, kwargs: Kwargs) -> T:
    """Return an argument that is passed by name or by place, else its default."""
    if name in kwargs:
        return kwargs[name]
    if place < len(args):
        return args[place]
    return usual


def makes_length_by_value(name: str, args: Args) -> bool:
    """Return whether how long its result is depends on the values that it takes."""
    return name in BY_VALUE or (name == "__getitem__" and _has_mask(args[1]))


def _has_mask(index: object) -> bool:
    """Return whether an index chooses elements by their values."""
    parts: Args = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype in _MASKS for part in parts)


def numbers_in(tree: object) -> list[int]:
    """Return the ints in dicts, lists, tuples and slices."""
    if isinstance(tree, int):
        return [tree]
    branches: Iterable[object] = ()
    if isinstance(tree, slice):
        branches = (tree.start, tree.stop)
    elif isinstance(tree, dict):
        branches = tree.values()
    elif isinstance(tree, list | tuple):
        branches = tree
    numbers: list[int] = []
    for branch in branches:
        numbers += numbers_in(branch)
    return numbers
