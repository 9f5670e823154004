"""Which samples each rank reads: batches for torch's DataLoader, every sample once, as
many batches on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from math import inf
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import default_collate

from pmod._core.arguments import wrong
from pmod._errors import ArgumentError, PmodError, ShapeError, quoted
from pmod._mesh.ambient import resolve
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import AxisLike
from pmod._numbers import as_int, as_number
from pmod._train.random import check_seed, hashed


def _count(x: object, function: str, axis: Axis, *, name: str, least: int) -> int:
    parsed = as_int(x)
    if parsed is None or parsed < least:
        raise wrong(
            ShapeError,
            function,
            axis,
            f"{name} is {quoted(x)}",
            f"Pass an int of {least} or more.",
        )
    return parsed


def _flag(x: object, axis: Axis, *, name: str) -> bool:
    number = as_number(x)  # 0, 1 and numpy's are as good; a text would count as true
    if number is None or number not in (True, False):
        raise wrong(
            ArgumentError,
            "sampler",
            axis,
            f"{name} is {quoted(x)}",
            "Pass True or False.",
        )
    return bool(x)


class sampler:  # lower case: it reads as the function it is called as
    """The batches of this rank: for ``DataLoader(dataset, batch_sampler=...)``.

    The whole order of an epoch is cut into batches of n * batch_size samples, n the
    size of the axis, and each rank takes its slice of every batch, along all other axes
    the same. So each sample is read once in an epoch, all ranks get the same number of
    batches (their collectives meet), and batch k holds the same samples on any number
    of ranks, if n * batch_size is the same. The last batch is spread as evenly as can
    be, and may be shorter or empty; with drop_last it is left out. For the mean over
    all its samples: ``pmean(loss, axis, weight=len(x))``, of the mean loss of each
    rank.

    batch_size: on each rank. shuffle: an order for each (seed, epoch); call `set_epoch`
    before each epoch. `collate`, a collate_fn, also makes a batch of no samples.
    `state_dict` and `load_state_dict` go on in the middle of an epoch, also on another
    number of ranks or with another batch_size. Nothing is sent.
    Raises: ArgumentError for a dataset without a length, or where shuffle or drop_last
    is not a bool; ShapeError where batch_size is no int of 1 or more.

    >>> def order():
    ...     return list(pmod.sampler(range(11), "data", batch_size=2, shuffle=False))
    >>> for batches in pmod.simulate(order, data=3):
    ...     print(batches)
    [[0, 1], [6, 7]]
    [[2, 3], [8, 9]]
    [[4, 5], [10]]
    """

    def __init__(
        self,
        dataset: Sized,
        axis: AxisLike,
        *,
        batch_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        bound = resolve(axis, "sampler")
        try:
            self._length = len(dataset)
        except TypeError:
            given = f"dataset is a {type(dataset).__name__}, which has no length"
            raise wrong(
                ArgumentError,
                "sampler",
                bound,
                given,
                "Pass one with __len__ and __getitem__.",
            ) from None
        self._dataset = dataset
        self._axis = bound
        self._batch_size = _count(
            batch_size, "sampler", bound, name="batch_size", least=1
        )
        self._shuffle = _flag(shuffle, bound, name="shuffle")
        self._seed = check_seed(seed, "sampler", bound)
        self._drop_last = _flag(drop_last, bound, name="drop_last")
        self._begin(epoch=0, start=0)

    def _begin(self, *, epoch: int, start: int) -> None:
        self._epoch = epoch
        self._start = (
            start  # so many samples of the epoch were read before it was resumed
        )
        self._spent = False  # the rest of them was read, too

    @property
    def epoch(self) -> int:
        """The epoch whose order it gives.

        >>> pmod.sampler(range(8), mesh["data"]).epoch
        0
        """
        return self._epoch

    @property
    def _whole(self) -> int:
        return self._batch_size * self._axis.size

    def set_epoch(self, epoch: int) -> None:
        """Give the order of this epoch; of the one that was loaded, what is left of it.

        Raises: ShapeError where it is no int of 0 or more.

        >>> batches = pmod.sampler(range(8), mesh["data"])
        >>> batches.set_epoch(3)
        >>> batches.epoch
        3
        """
        epoch = _count(epoch, "sampler.set_epoch", self._axis, name="epoch", least=0)
        if epoch != self._epoch:
            self._begin(epoch=epoch, start=0)

    def __len__(self) -> int:
        left = self._length - self._start
        return left // self._whole if self._drop_last else -(-left // self._whole)

    def __iter__(self) -> Iterator[list[int]]:
        if self._spent:
            given = f"epoch {self._epoch} was resumed after {self._start} of {self._length} samples and is over"
            raise wrong(
                PmodError,
                "sampler",
                self._axis,
                given,
                "Call set_epoch before the next one.",
            )
        if self._shuffle:
            chance = torch.Generator().manual_seed(
                hashed(f"{self._seed}/epoch {self._epoch}")
            )
            order = torch.randperm(self._length, generator=chance)
        else:
            order = torch.arange(self._length)
        n, index = self._axis.size, self._axis.index
        for number in range(len(self)):
            batch = order[self._start + number * self._whole :][: self._whole]
            each, more = divmod(
                len(batch), n
            )  # the first ranks of the last batch take one more
            first = each * index + min(more, index)
            yield batch[first : first + each + (index < more)].tolist()
        self._spent = self._start > 0

    def collate(self, samples: list[Any]) -> Any:
        """torch's default_collate; of no samples, tensors like those of a batch with
        length 0 along dim 0.

        >>> mesh = pmod.make_mesh(data=1)
        >>> pmod.sampler([(torch.ones(3), 5)], mesh["data"]).collate([])
        [tensor([], size=(0, 3)), tensor([], dtype=torch.int64)]
        """
        return (
            default_collate(samples)
            if samples
            else _emptied(default_collate([cast(Any, self._dataset)[0]]))
        )

    def state_dict(self, done: int) -> dict[str, int]:
        """Where the epoch is after `done` batches of this iteration: the same on all
        ranks, a few ints.

        done: how many the loop has had. The sampler does not know: the DataLoader's
        workers fetch ahead of the loop.
        Raises: ShapeError where there are not so many batches.

        >>> pmod.sampler(range(8), mesh["data"], batch_size=2).state_dict(done=3)
        {'epoch': 0, 'start': 6, 'length': 8, 'seed': 0, 'shuffle': 1}
        """
        done = _count(done, "sampler.state_dict", self._axis, name="done", least=0)
        if done > len(self):
            given = f"done is {done}, and there are {len(self)} batches"
            right = "Count the batches since the loop over the DataLoader began."
            raise wrong(ShapeError, "sampler.state_dict", self._axis, given, right)
        start = min(self._start + done * self._whole, self._length)
        return {
            "epoch": self._epoch,
            "start": start,
            "length": self._length,
            "seed": self._seed,
            "shuffle": int(self._shuffle),
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from there: the next iteration gives what is left of that epoch, in
        that order (its seed, its shuffle).

        The state is checked whole before anything of it is taken.
        Raises: ShapeError where the dataset has another length, or a number is out of
        range; ArgumentError where the state is not a mapping of the keys that
        `state_dict` gives to ints.

        >>> batches = pmod.sampler(range(8), mesh["data"], batch_size=2, shuffle=False)
        >>> batches.load_state_dict(batches.state_dict(done=3))
        >>> list(batches)
        [[6, 7]]
        """
        told = _as_state(state, self._axis)
        if told["length"] != self._length:
            given = f"the state is of a dataset of {told['length']} samples, and this one has {self._length}"
            right = "Resume with the dataset that it was saved with."
            raise wrong(ShapeError, _LOAD, self._axis, given, right)
        if told["start"] > self._length:
            given = f"start is {told['start']}, and there are {self._length} samples"
            raise wrong(
                ShapeError,
                _LOAD,
                self._axis,
                given,
                "It says how many of them were read.",
            )
        self._seed, self._shuffle = told["seed"], bool(told["shuffle"])
        self._begin(epoch=told["epoch"], start=told["start"])


_LOAD = "sampler.load_state_dict"
_RANGES: dict[str, tuple[float, float]] = {
    "epoch": (0, inf),
    "start": (0, inf),
    "length": (0, inf),
    "seed": (-inf, inf),
    "shuffle": (0, 1),
}


def _as_state(state: object, axis: Axis) -> dict[str, int]:
    """A state with all keys and no others, each an int in its range."""
    right = "Pass what state_dict(done) returned."
    if not isinstance(state, Mapping):
        raise wrong(
            ArgumentError, _LOAD, axis, f"state is a {type(state).__name__}", right
        )
    held = cast(Mapping[Any, Any], state)
    missing, unknown = (
        [key for key in _RANGES if key not in held],
        [key for key in held if key not in _RANGES],
    )
    if missing or unknown:
        given = " and ".join(
            f"{'lacks' if keys is missing else 'has unknown'} {', '.join(map(repr, keys))}"
            for keys in (missing, unknown)
            if keys
        )
        raise wrong(ArgumentError, _LOAD, axis, f"the state {given}", right)
    told: dict[str, int] = {}
    for key, (low, high) in _RANGES.items():
        number = (
            int(held[key])
            if isinstance(held[key], bool) and key == "shuffle"
            else as_int(held[key])
        )
        if number is None:
            given = f"{key} is {quoted(held[key])}, a {type(held[key]).__name__}"
            raise wrong(ArgumentError, _LOAD, axis, given, right)
        if not low <= number <= high:
            span = "0 or 1" if high == 1 else "0 or more"
            raise wrong(
                ShapeError, _LOAD, axis, f"{key} is {number}", f"It is {span}. {right}"
            )
        told[key] = number
    return told


def _emptied(batch: Any) -> Any:
    """A batch of one sample, as default_collate makes it, without the sample."""
    if isinstance(batch, Tensor):
        return batch[:0]
    if isinstance(batch, Mapping):
        return {key: _emptied(value) for key, value in batch.items()}
    if all(isinstance(text, str | bytes) for text in batch):
        return []
    parts = [_emptied(part) for part in batch]
    return type(batch)(*parts) if hasattr(batch, "_fields") else parts
