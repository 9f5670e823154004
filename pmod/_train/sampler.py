"""Which samples each rank reads: batches for torch's DataLoader.

Every sample is read once, and all ranks have as many batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from math import inf
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import default_collate

from pmod._core.arguments import as_int, as_number, wrong
from pmod._errors import ArgumentError, PmodError, ShapeError, quoted
from pmod._mesh.ambient import resolve
from pmod._mesh.axis import Axis
from pmod._mesh.mesh import AxisLike
from pmod._train.random import check_seed, hashed


def _count(x: object, function: str, axis: Axis, *, name: str, least: int) -> int:
    parsed = as_int(x)
    if parsed is None or parsed < least:
        right = f"Pass an int of {least} or more."
        raise wrong(ShapeError, function, axis, f"{name} is {quoted(x)}", right)
    return parsed


def _flag(x: object, axis: Axis, *, name: str) -> bool:
    # 0, 1 and numpy's are as good; a text would count as true
    number = as_number(x)
    if number is None or number not in (True, False):
        given = f"{name} is {quoted(x)}"
        raise wrong(ArgumentError, "sampler", axis, given, "Pass True or False.")
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
    Raises: ArgumentError for a dataset without a length, or if shuffle or drop_last is
    not a bool; ShapeError if batch_size is not an int of 1 or more.

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
            right = "Pass one with __len__ and __getitem__."
            raise wrong(ArgumentError, "sampler", bound, given, right) from None
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
        # so many samples of the epoch were read before it was resumed
        self._start = start
        # whether the rest of them was read, too
        self._spent = False

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

        Raises: ShapeError if it is not an int of 0 or more.

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
        if self._drop_last:
            return left // self._whole
        return -(-left // self._whole)

    def __iter__(self) -> Iterator[list[int]]:
        if self._spent:
            given = f"epoch {self._epoch} was resumed after {self._start} of {self._length} samples and is over"
            right = "Call set_epoch before the next one."
            raise wrong(PmodError, "sampler", self._axis, given, right)
        order = self._order()
        n, index = self._axis.size, self._axis.index
        for number in range(len(self)):
            batch = order[self._start + number * self._whole :][: self._whole]
            # the first ranks of the last batch take one more
            each, more = divmod(len(batch), n)
            first = each * index + min(more, index)
            yield batch[first : first + each + (index < more)].tolist()
        self._spent = self._start > 0

    def _order(self) -> Tensor:
        """Return the samples of the epoch, in the same order on all ranks."""
        if not self._shuffle:
            return torch.arange(self._length)
        seed = hashed(f"{self._seed}/epoch {self._epoch}")
        chance = torch.Generator().manual_seed(seed)
        return torch.randperm(self._length, generator=chance)

    def collate(self, samples: list[Any]) -> Any:
        """Return a batch, as torch's default_collate makes it.

        Of no samples it is tensors like those of a batch, with length 0 along dim 0.
        >>> mesh = pmod.make_mesh(data=1)
        >>> pmod.sampler([(torch.ones(3), 5)], mesh["data"]).collate([])
        [tensor([], size=(0, 3)), tensor([], dtype=torch.int64)]
        """
        if samples:
            return default_collate(samples)
        first = cast(Sequence[object], self._dataset)[0]
        return _emptied(default_collate([first]))

    def state_dict(self, done: int) -> dict[str, int]:
        """Return where the epoch is after `done` batches of this iteration.

        It is a few ints, the same on all ranks. Pass the number of batches that your
        loop has consumed as `done`. The sampler cannot know it, because the
        DataLoader's workers prefetch.
        Raises: ShapeError if there are not so many batches.

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
        """Go on from there: the next iteration gives what is left of that epoch.

        The order is that of its seed and its shuffle. The whole state is checked before
        anything of it is taken.
        Raises: ShapeError if the dataset has another length, or a number is out of
        range; ArgumentError if the state is not a mapping of the keys that `state_dict`
        gives to ints.

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
            right = "It says how many of them were read."
            raise wrong(ShapeError, _LOAD, self._axis, given, right)
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
    """Return a state that has all keys and no others, each an int in its range."""
    right = "Pass what state_dict(done) returned."
    if not isinstance(state, Mapping):
        given = f"state is a {type(state).__name__}"
        raise wrong(ArgumentError, _LOAD, axis, given, right)
    held = cast(Mapping[object, object], state)
    missing = [repr(key) for key in _RANGES if key not in held]
    unknown = [repr(key) for key in held if key not in _RANGES]
    faults: list[str] = []
    if missing:
        faults.append(f"lacks {', '.join(missing)}")
    if unknown:
        faults.append(f"has unknown {', '.join(unknown)}")
    if faults:
        given = f"the state {' and '.join(faults)}"
        raise wrong(ArgumentError, _LOAD, axis, given, right)
    told: dict[str, int] = {}
    for key, (low, high) in _RANGES.items():
        value = held[key]
        number = as_int(value)
        if isinstance(value, bool) and key == "shuffle":
            # a bool is not an int elsewhere
            number = int(value)
        if number is None:
            given = f"{key} is {quoted(value)}, a {type(value).__name__}"
            raise wrong(ArgumentError, _LOAD, axis, given, right)
        if not low <= number <= high:
            span = "0 or 1" if high == 1 else "0 or more"
            given = f"{key} is {number}"
            raise wrong(ShapeError, _LOAD, axis, given, f"It is {span}. {right}")
        told[key] = number
    return told


def _emptied(batch: Any) -> Any:
    """Return a batch of one sample, as default_collate makes it, without the sample."""
    if isinstance(batch, Tensor):
        return batch[:0]
    if isinstance(batch, Mapping):
        return {key: _emptied(value) for key, value in batch.items()}
    if all(isinstance(text, str | bytes) for text in batch):
        return []
    parts = [_emptied(part) for part in batch]
    # default_collate keeps named tuples, and makes lists of all else
    if hasattr(batch, "_fields"):
        return type(batch)(*parts)
    return parts
