"""The only file that sends: seven functions on flat, contiguous, real tensors.

A `Wire` joins the ranks of one axis. The base class builds everything from `all_gather` and `all_to_all`; a backend
overrides what it does better. Counts are numbers of elements, one per rank of the axis. Every function returns a
`Sent`, which is on its way until `Sent.wait`.

Sums are taken in rank order wherever the parts are at hand, so they are the same bits on every run and rank; 16-bit
floats add up in float32 (`accumulator`), and travel in 16 bits where that halves the bytes of a large message.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import attrs
import torch
from torch import Tensor

from pmod import _groups
from pmod._mesh import Axis
from pmod._rolling import has_tags, note
from pmod._waiting import InThread, Said, Wait, Work, code_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Reduction: TypeAlias = Literal["sum", "max", "min"]

# Messages below this size are latency: one round trip beats fewer bytes. Measured with pmod.bench on gloo, 4 ranks.
SMALL = 16 * 1024

# What gloo and NCCL carry as they are; anything else travels as bytes.
CARRIED = {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64}  # fmt: skip # noqa: E501
NATIVE_SUMS = {torch.float32, torch.float64, torch.int32, torch.int64}


class Sent:
    """A message under way; `wait` gives its tensor, once and for all."""

    __slots__ = ("_finish", "_works")

    def __init__(self, works: Sequence[Any], finish: Callable[[], Any]) -> None:
        self._works = works
        self._finish = finish

    def wait(self) -> Any:
        for work in self._works:
            work.wait()
        result = self._finish()
        # a second message may follow from what the first one brought
        return result.wait() if isinstance(result, Sent) else result

    def then(self, f: Callable[[Any], Any]) -> Sent:
        """The same message, with `f` applied to what it brings; `f` may send again."""
        return Sent((), lambda: f(self.wait()))


def arrived(x: Tensor) -> Sent:
    """What needed no message."""
    return Sent((), lambda: x)


# torch neither adds nor compares these; the sums of their bits, taken as signed, are theirs, as both wrap around
SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def accumulator(dtype: torch.dtype, asked: str | None) -> torch.dtype:
    """The dtype that a sum of `dtype` adds up in: what was asked for, else float32 for floats of 16 bits or fewer."""
    if not dtype.is_floating_point:
        return computed_in(dtype)
    if asked is not None:
        return getattr(torch, asked)
    return torch.float32 if dtype.itemsize <= 2 else dtype


def _reduce_parts(parts: Sequence[Tensor], how: Reduction, dtype: torch.dtype, divisor: int) -> Tensor:
    """Combine equal-shaped parts in rank order, adding up in `dtype`."""
    out_dtype = parts[0].dtype
    if how != "sum":
        total = parts[0].clone() if len(parts) == 1 else _extreme(parts[0], parts[1], how)
        for part in parts[2:]:
            total = _extreme(total, part, how)
        return total
    total = parts[0].to(dtype, copy=True)
    for part in parts[1:]:
        total += part.to(dtype) if is_eight_bits(part) else part
    return scaled(total, divisor).to(out_dtype)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _extreme(a: Tensor, b: Tensor, how: Reduction) -> Tensor:
    """The elementwise extremum, which lets a NaN through; +0.0 is larger than -0.0."""
    y = torch.maximum(a, b) if how == "max" else torch.minimum(a, b)
    if not a.is_floating_point():
        return y
    # torch takes either of two zeros, by where they lie in memory; what is equal has equal bits, but for their sign
    ints = _BITS[a.element_size()]
    both = torch.bitwise_and if how == "max" else torch.bitwise_or
    return torch.where(a == b, both(a.view(ints), b.view(ints)).view(a.dtype), y)


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: another one where torch only stores it, as floats of 8 bits and pairs of halves."""
    if dtype == torch.complex32:
        return torch.complex64
    return torch.float32 if dtype.is_floating_point and dtype.itemsize == 1 else dtype


def addable(x: Tensor) -> Tensor:
    """x as what torch adds up, and `as_added` the other way: unsigned ints as signed ones of the same bits."""
    return x.view(SIGNED[x.dtype]) if x.dtype in SIGNED else x.to(computed_in(x.dtype))


def as_added(y: Tensor, dtype: torch.dtype) -> Tensor:
    """A sum of what `addable` gave, in the dtype of what was added."""
    return y.view(dtype) if dtype in SIGNED else y.to(dtype)


def is_eight_bits(x: Tensor) -> bool:
    """Whether x has a floating dtype that torch stores and does not compute in."""
    return x.dtype.itemsize == 1 and x.is_floating_point()


def scaled(total: Tensor, divisor: int) -> Tensor:
    return total if divisor == 1 else total.div_(divisor)


def real_sum(flat: Tensor, send: Callable[[Tensor, int], Sent]) -> Sent:
    """Send what torch does not add up as what adds up the same: complex as pairs of reals, unsigned ints as signed.

    `send` gets the factor on its counts.
    """
    if flat.dtype in SIGNED:
        return send(flat.view(SIGNED[flat.dtype]), 1).then(lambda y: y.view(flat.dtype))
    if not flat.is_complex():
        return send(flat, 1)
    sent = send(torch.view_as_real(flat).reshape(-1), 2)
    return sent.then(lambda y: torch.view_as_complex(y.view(-1, 2)))


def _bytes(x: Tensor) -> Tensor:
    """The bytes of a flat tensor. A tensor of one element is contiguous at any stride, its bytes are not."""
    return x.as_strided(x.shape, (1,)).view(torch.uint8)


class Wire:
    """The ranks of one axis, as this rank sees them."""

    def __init__(self, size: int, index: int) -> None:
        self.size = size
        self.index = index

    # --- what a backend must give -----------------------------------------------------------------

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Sent:
        """Part j of x (`send[j]` elements) to rank j; the parts that arrive, joined in rank order."""
        raise NotImplementedError

    def barrier(self) -> None:
        """Wait for all ranks."""
        raise NotImplementedError

    # --- what follows -----------------------------------------------------------------------------

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Sent:
        """All ranks' x, joined in rank order."""
        return self.all_to_all(x.repeat(self.size), [x.numel()] * self.size, counts)

    def reduce_scatter(self, x: Tensor, counts: Sequence[int], dtype: torch.dtype) -> Sent:
        """This rank's part of the sum of all x."""
        mine = counts[self.index]
        arriving = self.all_to_all(x, counts, [mine] * self.size)
        return arriving.then(lambda y: _reduce_parts(y.view(self.size, mine).unbind(), "sum", dtype, 1))

    def all_reduce(self, x: Tensor, how: Reduction, dtype: torch.dtype, divisor: int) -> Sent:
        """The sum (in `dtype`, divided by `divisor`), maximum or minimum of all x."""
        if self.size > 2 and x.numel() * x.element_size() > SMALL:
            return self._reduce_by_parts(x, how, dtype, divisor)
        arriving = self.all_gather(x, [x.numel()] * self.size)
        return arriving.then(lambda y: _reduce_parts(y.view(self.size, -1).unbind(), how, dtype, divisor))

    def _reduce_by_parts(self, x: Tensor, how: Reduction, dtype: torch.dtype, divisor: int) -> Sent:
        """Each rank reduces its part of x, and the parts are gathered: 2 (n-1)/n of x sent, in x's dtype."""
        counts = even_counts(x.numel(), self.size)
        mine = counts[self.index]
        arriving = self.all_to_all(x, counts, [mine] * self.size)

        def gather(y: Tensor) -> Sent:
            return self.all_gather(_reduce_parts(y.view(self.size, mine).unbind(), how, dtype, divisor), counts)

        return arriving.then(gather)

    def broadcast(self, x: Tensor, root: int) -> Sent:
        """The root's x on every rank."""
        send = [x.numel() if self.index == root else 0] * self.size
        recv = [x.numel() if rank == root else 0 for rank in range(self.size)]
        return self.all_to_all(x.repeat(self.size) if self.index == root else x[:0], send, recv)

    def reduce(self, x: Tensor, root: int, dtype: torch.dtype) -> Sent:
        """The sum of all x on the root, zeros elsewhere."""
        send = [x.numel() if rank == root else 0 for rank in range(self.size)]
        if self.index != root:
            return self.all_to_all(x, send, [0] * self.size).then(lambda _: torch.zeros_like(x))
        arriving = self.all_to_all(x, send, [x.numel()] * self.size)
        return arriving.then(lambda y: _reduce_parts(y.view(self.size, -1).unbind(), "sum", dtype, 1))

    def permute(self, x: Tensor, target: int | None, source: int | None, count: int | None = None) -> Sent:
        """x to the target; the `count` elements (as many as x has) that the source sent, zeros where there is none."""
        count = x.numel() if count is None else count
        send = [x.numel() if rank == target else 0 for rank in range(self.size)]
        recv = [count if rank == source else 0 for rank in range(self.size)]
        arriving = self.all_to_all(x if target is not None else x[:0], send, recv)
        return arriving.then(lambda y: x.new_zeros(count) if source is None else y)


def even_counts(total: int, parts: int) -> list[int]:
    """`total` cut as evenly as it goes, the larger parts first."""
    low, more = divmod(total, parts)
    return [low + 1] * more + [low] * (parts - more)


class ShapesOnly(Wire):
    """Sends nothing and knows only shapes: how torch.compile learns what a collective returns."""

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Sent:
        return arrived(x.new_empty(sum(recv)))

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Sent:
        return arrived(x.new_empty(sum(counts)))

    def barrier(self) -> None:
        pass


class Alone(Wire):
    """An axis of one rank."""

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Sent:
        return arrived(x[: recv[0]].clone())

    def barrier(self) -> None:
        pass


class _Patient:
    """A work whose wait is `Wait.until_done`."""

    __slots__ = ("_wait", "_work")

    def __init__(self, work: Work, wait: Wait) -> None:
        self._work, self._wait = work, wait

    def wait(self) -> None:
        self._wait.until_done(self._work)


class GroupWire(Wire):
    """A torch process group: gloo for cpu tensors, NCCL for cuda tensors."""

    def __init__(self, size: int, index: int, group: ProcessGroup | Any, wait: Wait | None = None) -> None:
        super().__init__(size, index)
        self.group: Any = _Metered(group, size, index) if meters() else group  # its C++ methods have no stubs
        self._wait = wait
        self._exchanges = 0

    def _on_its_way(self, x: Tensor, work: Any, finish: Callable[[], Any]) -> Sent:
        """NCCL's wait does not block; gloo's does, and `Wait` does so in its stead."""
        if self._wait is not None and not self.by_nccl(x):
            work = _Patient(work, self._wait)
        return Sent((work,), finish)

    def by_nccl(self, x: Tensor) -> bool:
        """Whether NCCL carries x; else gloo does."""
        return x.is_cuda

    def all_to_all(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Sent:
        out = x.new_empty(sum(recv))
        scale = 1
        carried_out, carried_x = out, x
        if x.dtype not in CARRIED:
            carried_out, carried_x, scale = _bytes(out), _bytes(x), x.element_size()
        recv, send = [scale * n for n in recv], [scale * n for n in send]
        if self.by_nccl(x):
            return self._on_its_way(x, self.group.alltoall_base(carried_out, carried_x, recv, send), lambda: out)
        ins, outs = carried_x.split(send), carried_out.split(recv)
        if self._wait is not None:
            nbytes = carried_x.element_size()
            self._wait.exchange = self._exchanges, [nbytes * n for n in send], [nbytes * n for n in recv]
        arriving = [(outs[rank], rank) for rank in self._others() if recv[rank]]
        work = self._peer_to_peer([(ins[rank], rank) for rank in self._others() if send[rank]], arriving)
        outs[self.index].copy_(ins[self.index])
        return self._on_its_way(x, work, lambda: out)

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Sent:
        if x.dtype not in CARRIED:
            scale, dtype = x.element_size(), x.dtype
            return self.all_gather(_bytes(x), [scale * n for n in counts]).then(lambda y: y.view(dtype))
        out = x.new_empty(sum(counts))
        parts = out.split(list(counts))
        if self.by_nccl(x) and len(set(counts)) == 1:
            return self._on_its_way(x, self.group._allgather_base(out, x), lambda: out)
        if self.by_nccl(x):
            return self._on_its_way(x, self.group.allgather([list(parts)], [x]), lambda: out)
        arriving = [(parts[rank], rank) for rank in self._others() if counts[rank]]
        work = self._peer_to_peer([(x, rank) for rank in self._others() if x.numel()], arriving)
        parts[self.index].copy_(x)
        return self._on_its_way(x, work, lambda: out)

    def _peer_to_peer(self, sent: Sequence[tuple[Tensor, int]], received: Sequence[tuple[Tensor, int]]) -> Work:
        """Send and receive in a thread: gloo blocks there until the two ranks have connected."""
        tag = self._tags()
        count_bytes(sum(part.nbytes for part, _ in sent), sum(part.nbytes for part, _ in received), len(sent))

        def run() -> None:
            works = [self.group.recv([part], rank, tag(part)) for part, rank in received]
            works += [self.group.send([part], rank, tag(part)) for part, rank in sent]
            for work in works:
                work.wait()

        return InThread(run, lambda: _cut_off(self.group, [rank for _, rank in [*sent, *received]]))

    def _tags(self) -> Callable[[Tensor], int]:
        """The tags of one exchange. gloo gives a message to whoever asks for its tag, and trusts its length."""
        wait, number = self._wait, self._exchanges
        self._exchanges += 1
        return (lambda part: TAG) if wait is None else (lambda part: wait.tag(number, part.nbytes))

    def _others(self) -> list[int]:
        """The other ranks, starting with the next, so that not all send to the same one first."""
        return [(self.index + step) % self.size for step in range(1, self.size)]

    def reduce_scatter(self, x: Tensor, counts: Sequence[int], dtype: torch.dtype) -> Sent:
        if self.by_nccl(x) and dtype == x.dtype and len(set(counts)) == 1:
            out = x.new_empty(counts[0])
            return self._on_its_way(x, self.group._reduce_scatter_base(out, x), lambda: out)
        return super().reduce_scatter(x, counts, dtype)

    def all_reduce(self, x: Tensor, how: Reduction, dtype: torch.dtype, divisor: int) -> Sent:
        nbytes = x.numel() * x.element_size()
        # NCCL's own, but for large 16-bit sums, whose parts stay 16-bit; gloo's own aborts at unlike lengths
        native = self.by_nccl(x) and how == "sum" and dtype in NATIVE_SUMS
        if native and (x.dtype == dtype or nbytes <= SMALL):
            total = x.to(dtype, copy=True)
            work = self.group.allreduce([total])
            return self._on_its_way(x, work, lambda: scaled(total, divisor).to(x.dtype))
        return super().all_reduce(x, how, dtype, divisor)

    def broadcast(self, x: Tensor, root: int) -> Sent:
        out = x.clone() if self.index == root else torch.empty_like(x)
        carried = out if x.dtype in CARRIED else _bytes(out)
        work = _broadcast(self.group, carried, root) if self.by_nccl(x) else self._down_a_tree(carried, root)
        return self._on_its_way(x, work, lambda: out)

    def _down_a_tree(self, x: Tensor, root: int) -> Work:
        """The root's x to all in ceil(log2 n) steps: a binomial tree, counted from the root."""
        place, size = (self.index - root) % self.size, self.size
        span = place & -place or 1 << (size - 1).bit_length()  # it serves the ranks place + 1 to place + span - 1
        halves = [span >> step for step in range(1, span.bit_length())]
        below = [(place + half + root) % size for half in halves if place + half < size]
        tag = self._tags()(x)
        count_bytes(len(below) * x.nbytes, x.nbytes if place else 0, (size - 1).bit_length())

        def run() -> None:
            if place:
                self.group.recv([x], (place - span + root) % size, tag).wait()
            for work in [self.group.send([x], rank, tag) for rank in below]:
                work.wait()

        return InThread(run, lambda: _cut_off(self.group, [*below, (place - span + root) % size]))

    def permute(self, x: Tensor, target: int | None, source: int | None, count: int | None = None) -> Sent:
        if self.by_nccl(x):
            return super().permute(x, target, source, count)
        count = x.numel() if count is None else count
        # gloo's all_to_all would trouble every rank with an empty message
        if x.dtype not in CARRIED:
            dtype, scale = x.dtype, x.element_size()
            return self.permute(_bytes(x), target, source, scale * count).then(lambda y: y.view(dtype))
        if target == self.index:
            return arrived(x.clone())
        out = x.new_zeros(count) if source is None else x.new_empty(count)
        # what is empty is not sent, as both sides know
        sent = [] if target is None or x.numel() == 0 else [target]
        received = [] if source is None or count == 0 else [source]
        work = self._peer_to_peer([(x, rank) for rank in sent], [(out, rank) for rank in received])
        return self._on_its_way(x, work, lambda: out)

    def barrier(self) -> None:
        work = self.group.barrier()
        if self._wait is None or self._wait.device.type == "cuda":
            work.wait()
        else:
            self._wait.until_done(work)


@attrs.frozen
class Traffic:
    """What a rank hands over for other ranks and gets from them."""

    sent: int = 0  # bytes
    received: int = 0  # bytes
    messages: int = 0  # that follow one another: a sum or a broadcast is as many as a tree has steps

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent + other.sent, self.received + other.received, self.messages + other.messages)

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent - other.sent, self.received - other.received, self.messages - other.messages)


class Meter:
    """Counts the traffic of this process (`trace`)."""

    def __init__(self) -> None:
        self.total = Traffic()


_meters: list[Meter] = []


def meters() -> list[Meter]:
    """Those of this process; in a simulation those of this rank."""
    if _groups.simulated is not None and hasattr(_groups.simulated, "meters"):
        return _groups.simulated.meters
    return _meters


def count_bytes(sent: int, received: int, messages: int) -> None:
    """Note bytes that are on their way to and from other ranks."""
    for meter in meters():
        meter.total += Traffic(sent, received, messages)


def count_parts(send: Sequence[int], recv: Sequence[int], index: int, itemsize: int) -> None:
    """Note an exchange of parts: what a rank keeps for itself does not travel."""
    messages = sum((n > 0 or m > 0) and rank != index for rank, (n, m) in enumerate(zip(send, recv, strict=True)))
    count_bytes((sum(send) - send[index]) * itemsize, (sum(recv) - recv[index]) * itemsize, messages)


class _Metered:
    """A process group whose bytes are counted, call by call.

    Exact for what goes from one rank to another; where a backend chooses the way by itself, the sum of a small tensor
    on gloo and every sum on NCCL, it is what a ring sends.
    """

    def __init__(self, group: Any, size: int, index: int) -> None:
        self._group, self._size, self._index = group, size, index
        self._steps = (size - 1).bit_length()  # of a tree

    def alltoall_base(self, out: Tensor, x: Tensor, recv: Sequence[int], send: Sequence[int]) -> Any:
        count_parts(send, recv, self._index, x.element_size())
        return self._group.alltoall_base(out, x, recv, send)

    def _allgather_base(self, out: Tensor, x: Tensor) -> Any:
        count_bytes((self._size - 1) * x.nbytes, out.nbytes - x.nbytes, self._steps)
        return self._group._allgather_base(out, x)

    def allgather(self, outs: list[list[Tensor]], xs: list[Tensor]) -> Any:
        received = sum(out.nbytes for out in outs[0]) - xs[0].nbytes
        count_bytes((self._size - 1) * xs[0].nbytes, received, self._steps)
        return self._group.allgather(outs, xs)

    def _reduce_scatter_base(self, out: Tensor, x: Tensor) -> Any:
        nbytes = (self._size - 1) * x.nbytes // self._size
        count_bytes(nbytes, nbytes, self._steps)
        return self._group._reduce_scatter_base(out, x)

    def allreduce(self, xs: list[Tensor]) -> Any:
        nbytes = 2 * (self._size - 1) * xs[0].nbytes // self._size
        count_bytes(nbytes, nbytes, 2 * self._steps)
        return self._group.allreduce(xs)

    def broadcast(self, xs: list[Tensor], options: Any) -> Any:
        root = self._index == options.rootRank
        count_bytes(xs[0].nbytes if root else 0, 0 if root else xs[0].nbytes, self._steps)
        return self._group.broadcast(xs, options)

    def send(self, xs: list[Tensor], to: int, tag: int) -> Any:
        return self._group.send(xs, to, tag)  # counted by who calls: it is called in a thread

    def recv(self, xs: list[Tensor], of: int, tag: int) -> Any:
        return self._group.recv(xs, of, tag)

    def barrier(self) -> Any:
        count_bytes(0, 0, self._steps)
        return self._group.barrier()


TAG = 0x706D  # of what belongs to no call


def _cut_off(group: Any, ranks: Sequence[int] | None = None) -> None:
    """Close the connections of a group: gloo does so, with all of them, where a receive does not come in time.

    ranks: those of its ranks with which it is connected; the neighbours, unless it is known better.
    """
    if ranks is None:
        ranks = [(group.rank() + step) % group.size() for step in (1, -1)]
    for rank in ranks:
        with contextlib.suppress(RuntimeError):
            group.recv([torch.empty(1)], rank, TAG).wait(timedelta(milliseconds=1))


def _broadcast(group: Any, x: Tensor, root: int) -> Any:
    options = torch.distributed.BroadcastOptions()
    options.rootRank = root
    options.rootTensor = 0
    return group.broadcast([x], options)


def wire_of(axis: Axis, row: str = "", said: Said | None = None) -> Wire:
    """The wire that joins the ranks of an axis, for a message of this row; `said` is what all ranks must say of it."""
    if axis.size == 1:
        return Alone(1, 0)
    said = said or Said(row, code_of(row))
    if _groups.simulated is not None and hasattr(_groups.simulated, "wire"):
        return _groups.simulated.wire(axis, said)
    group, wait = axis.group, Wait(axis, said, _cut_off)
    if _groups.is_left_behind(group):
        wait.refuse()
    if not has_tags(axis):
        note(axis, wait.number, said)
    return GroupWire(axis.size, axis.index, group, wait)
