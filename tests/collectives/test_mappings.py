"""Mappings that are no dicts are trees, too: those that can be filled anew, a TensorDict among them."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, MutableMapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

import pmod
from pmod import P


class Batch(MutableMapping[str, Any]):
    """What a TensorDict does: iterates over its first dim, and says which dims its tensors share."""

    def __init__(self, items: dict[str, Any], batch_size: tuple[int, ...]) -> None:
        self._items, self.batch_size = dict(items), batch_size

    def copy(self) -> Batch:
        return Batch(self._items, self.batch_size)

    def keys(self) -> Any:
        return self._items.keys()

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __setitem__(self, key: str, value: Any) -> None:
        held = value.batch_size if isinstance(value, Batch) else value.shape
        if tuple(held[: len(self.batch_size)]) != tuple(self.batch_size):
            raise RuntimeError("another batch size")
        self._items[key] = value

    def __delitem__(self, key: str) -> None:
        del self._items[key]

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("it iterates over its first dim")

    def __len__(self) -> int:
        return self.batch_size[0]

    def values(self) -> Any:
        return self._items.values()

    def items(self) -> Any:
        return self._items.items()


def tensordict(items: dict[str, Any], batch_size: tuple[int, ...]) -> Any:
    made = pytest.importorskip("tensordict").TensorDict(items, batch_size=batch_size)
    return made.lock_()


MADE: list[Callable[..., Any]] = [Batch, tensordict, lambda items, batch_size: UserDict(items)]


def tree_of(made: Callable[..., Any]) -> Any:
    inner = made({"d": torch.ones(4) * pmod.axis_index("x")}, (4,))
    return made({"b": torch.ones(4, 2), "a": inner}, (4,))


@pytest.mark.parametrize("made", MADE)
def test_a_mapping_is_a_tree(made: Callable[..., Any]) -> None:
    def each() -> None:
        tree = tree_of(made)
        total = pmod.psum(tree, "x")
        assert type(total) is type(tree) and type(total["a"]) is type(tree["a"])
        assert total["b"].tolist() == [[2, 2]] * 4 and total["a"]["d"].tolist() == [1] * 4
        assert tree["b"].tolist() == [[1, 1]] * 4, "the input stays as it is"
        assert pmod.pvary_params(tree, P())["a"]["d"].tolist() == [pmod.axis_index("x")] * 4
        assert pmod.replicate(tree, "x", src=1)["a"]["d"].tolist() == [1] * 4
        specs = {"a": {"d": P("x")}, "b": P()}
        assert pmod.global_norm(tree, specs).item() == pytest.approx((8 + 4) ** 0.5)

    pmod.simulate(each, x=2)


@pytest.mark.parametrize("made", MADE[:2])
def test_the_dims_that_its_tensors_share_are_those_that_they_have_then(made: Callable[..., Any]) -> None:
    def each() -> None:
        tree = tree_of(made)
        joined = pmod.all_gather(tree, "x")
        assert tuple(joined.batch_size) == (8,) and joined["a"]["d"].shape == (8,)
        assert tuple(tree.batch_size) == (4,)
        assert tuple(pmod.all_gather(tree, "x", tiled=False).batch_size) == (2,)

    pmod.simulate(each, x=2)


def test_what_cannot_be_filled_anew_is_no_tree() -> None:
    x: Tensor = torch.ones(2)

    def each() -> None:
        with pytest.raises(pmod.ArgumentError, match="x is a mappingproxy"):
            pmod.psum(MappingProxyType({"a": x}), "x")

    pmod.simulate(each, x=2)
