"""How the ranks compare what they are about to do, before anything is sent."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from time import monotonic, sleep
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from pmod._collectives.slices import ALL_TO_ALL, lengths_exchanged
from pmod._core.row import Call
from pmod._core.tree import outline
from pmod._errors import CollectiveTimeout, MismatchError, phrase
from pmod._mesh.axis import Axis
from pmod._ranks import world
from pmod._ranks.blocking import InThread
from pmod._site import BACKWARD, Origin, Site, on_behalf_of, structure
from pmod._torch import (
    are_transforms_active,
    interpreters,
    is_wrapped,
    no_transforms,
    unwrap,
)
from pmod._wire.along import wire_of
from pmod._wire.board import (
    LEFT,
    OVER,
    WAITS,
    Board,
    Post,
    Pulse,
    Said,
    awaited,
    board,
    code_of,
    neighbours,
    not_here,
    place_of,
)
from pmod._wire.waiting import LOOK, first_sentence

SAME_CALLS = "All ranks of an axis must make the same calls in the same order."
FIELDS = (
    "function",
    "axis",
    "arguments",
    "shapes",
    "dtypes",
    "devices",
    "requires grad",
    "transforms",
    "structure",
    "called at",
)
ROOT = "backward"  # the function that looks at what backward begins with
SHOWN = 160  # characters of a field that differs
_BETWEEN = "\x1f"


class Words(NamedTuple):
    """What a rank says of a step."""

    # What must be the same on all ranks: a text for each of FIELDS.
    fields: list[str]
    site: str

    @staticmethod
    def of_call(call: Call, xs: Sequence[Tensor], origin: Origin) -> Words:
        """Return the words of a call."""
        params, shapes = call.params, [tuple(x.shape) for x in xs]
        if call.row.agreed is not None:
            # What ranks may differ in, such as lengths of their own, is left out.
            alike = [call.row.agreed(params, shape) for shape in shapes]
            params, shapes = alike[0][0], [shape for _, shape in alike]
        return Words.of_tensors(xs, origin, call.axis, repr(params), shapes)

    @staticmethod
    def of_tensors(
        xs: Sequence[Tensor],
        origin: Origin,
        axis: Axis,
        arguments: str,
        shapes: Sequence[tuple[int, ...]],
    ) -> Words:
        """Return the words of a step that takes these tensors."""
        function, site = origin
        with_grad = torch.is_grad_enabled()
        dtypes = [str(x.dtype).removeprefix("torch.") for x in xs]
        devices = [x.device.type for x in xs]
        requiring = [str(with_grad and x.requires_grad) for x in xs]
        fields = [
            function,
            f"{axis.label!r} of {axis.size}",
            arguments,
            ", ".join(map(str, shapes)),
            ", ".join(dtypes),
            ", ".join(devices),
            ", ".join(requiring),
            " of ".join(_transforms()) or "none",
            structure(),
            _alike(site),
        ]
        return Words(fields, site)

    @staticmethod
    def of_step(what: str, origin: Origin, axis: Axis) -> Words:
        """Return the words of a step that is compared by what it is alone."""
        function, site = origin
        empty = [""] * (len(FIELDS) - 4)
        # Ranks may call backward at unlike lines.
        place = "" if function == ROOT else _alike(site)
        fields = [function, f"{axis.label!r} of {axis.size}", what, *empty, place]
        return Words(fields, site)

    @staticmethod
    def of_tree(
        tree: object, leaves: Sequence[Tensor], origin: Origin, axis: Axis
    ) -> Words:
        """Return the words of a value, which ranks may compare at unlike lines."""
        shapes = [tuple(x.shape) for x in leaves]
        said = Words.of_tensors(leaves, origin, axis, "", shapes).fields
        said[FIELDS.index("structure")] = outline(tree, origin[0], axis)
        said[FIELDS.index("requires grad")] = ""
        said[FIELDS.index("called at")] = ""
        return Words(said, origin[1])

    def text(self, rest: str) -> str:
        """Return what `read` reads."""
        return _BETWEEN.join([*self.fields, self.site, rest])

    @staticmethod
    def read(text: str) -> tuple[Words, str]:
        """Read what `text` wrote: the words, and the rest."""
        *fields, site, rest = text.split(_BETWEEN)
        return Words(fields, site), rest


def _alike(site: str) -> str:
    """Return a line of the user's code as all nodes name it."""
    return site.alike if isinstance(site, Site) else site


def differ(origin: Origin, axis: Axis, given: str, right: str) -> MismatchError:
    """Return the error of a call or of its backward."""
    function = origin[0].removeprefix(BACKWARD)
    if function != origin[0]:
        given = f"in backward, {given}"
    coords = dict(axis.coords)
    return MismatchError(phrase(function, given, right, axis=axis.label, coords=coords))


def _transforms() -> Iterator[str]:
    """Yield the active transforms of torch.func, outermost last."""
    if not are_transforms_active():
        return
    for interpreter in reversed(interpreters() or []):
        yield interpreter.key().name.lower()


@contextmanager
def outside_transforms() -> Generator[None]:
    """Keep what is compared and sent out of what the user differentiates."""
    with no_transforms(), torch.no_grad():
        yield


def unwrapped(x: Tensor) -> Tensor:
    """Return the tensor inside torch.func's wrappers."""
    while is_wrapped(x):
        x = unwrap(x)
    return x.detach()


def bits_of(xs: Sequence[Tensor]) -> int:
    """Return a number that differs where a bit differs."""
    code = 0
    for x in xs:
        flat = unwrapped(x).resolve_conj().resolve_neg().contiguous().reshape(-1).cpu()
        # A tensor of one element is contiguous at any stride; its bytes are not.
        dense = flat.as_strided(flat.shape, (1,))
        code = zlib.crc32(dense.view(torch.uint8).numpy().data, code)
    return code


class _Exchanges:
    """What the ranks say before each call, on the board.

    Words go through the store and not through the process groups: a rank that waits for
    words can be let go, and what it was going to send is not in anybody's way.
    """

    def __init__(self, board: Board) -> None:
        self.board = board
        self._met: Counter[str] = Counter()
        self._raised = False  # in a wait, and the board still has its words
        self._pulse = Pulse()  # of the last one

    def exchange(
        self, axis: Axis, mine: str, origin: Origin, pulse: Pulse
    ) -> list[str]:
        """Return what each rank of the axis says, in rank order."""
        # The thread of an earlier one still waits for an answer, and holds the store.
        if self._pulse.left and not self._pulse.ended:
            raise _out_of_reach(axis, origin)
        self._pulse = pulse
        try:
            return self._exchange(axis, mine, origin, pulse)
        except RuntimeError as error:
            # torch's: the connection to the store broke.
            more = f"\ntorch says: {first_sentence(error)}"
            raise _out_of_reach(axis, origin, more) from None
        finally:
            pulse.ended = True

    def _exchange(
        self, axis: Axis, mine: str, origin: Origin, pulse: Pulse
    ) -> list[str]:
        self._met[axis.group_key] += 1
        number, store = self._met[axis.group_key], self.board.store
        # The key of a group may name many ranks; that of the store stays short.
        encoded = axis.group_key.encode()
        group = hashlib.blake2b(encoded, digest_size=8).hexdigest()

        def key(number: int, index: int) -> str:
            return f"pmod/debug/{group}/{number}/{index}"

        store.set(key(number, axis.index), mine)
        keys = [key(number, index) for index in range(axis.size)]
        try:
            meeting = f"{axis.group_key}#words {number}"
            self._wait(keys, axis, meeting, origin, pulse)
        except BaseException:
            # The ranks did not meet, so what this one said is taken back.
            with contextlib.suppress(RuntimeError):
                store.delete_key(key(number, axis.index))
            self._met[axis.group_key] -= 1
            raise
        if number == 1:
            # All are here, and the store may be gone when it matters.
            self.board.learn(_may_serve(axis))
        if number > 2:
            # All have come here, so all have read what was said before the last time.
            store.delete_key(key(number - 2, axis.index))
        return [text.decode() for text in store.multi_get(keys)]

    def _wait(
        self, keys: list[str], axis: Axis, meeting: str, origin: Origin, pulse: Pulse
    ) -> None:
        """Wait until all have spoken.

        A long wait is written on the board, for others to see; one without end raises.
        """
        where = f"{' at '.join(origin)} (under debug, before it is sent)"
        mine = Post(WAITS, meeting, tuple(axis.ranks), where)
        look = _Look(self.board, keys, axis, origin, mine)
        pause = 5e-5
        try:
            # The store's own wait would print a warning each time it is left.
            while not self.board.store.check(keys):
                sleep(pause)
                pause = min(1.5 * pause, 0.01)
                pulse.answered = monotonic()
                if pulse.left:
                    raise _Interrupted
                look.when_due()
        except BaseException:
            # What is written stays, for the others to see, until this rank meets them
            # again.
            self._raised = True
            raise
        if look.written or self._raised:
            self._raised = False
            self.board.erase(axis.topology.rank)


class _Interrupted(Exception):
    """Whoever waited for this exchange was interrupted."""


def _may_serve(axis: Axis) -> list[int]:
    """Return the ranks of this node along the axis, and the one that serves the store."""
    me = axis.topology.rank
    return [rank for rank in {0: 0, **dict.fromkeys(neighbours(axis))} if rank != me]


def _out_of_reach(axis: Axis, origin: Origin, more: str = "") -> CollectiveTimeout:
    told: Board | None = world.current().board
    server = f"{place_of(0)} or the launcher"
    given = f"the store of the world cannot be reached, which {server} serves"
    if told is not None:
        ranks = _may_serve(axis)
        dead, stopped = told.dead(ranks), told.stopped(ranks)
        known = [rank for rank in ranks if rank in {**stopped, **dead}]
        if known:
            given = not_here(known, {}, dead, axis.timeout, stopped=stopped)
    return _timeout(given, axis, origin, more)


def _in_time(
    exchange: Callable[[Pulse], list[str]], axis: Axis, origin: Origin
) -> list[str]:
    """Return what the exchange returns, or raise if the store does not answer in time.

    torch's store has no deadline for an answer, so it is asked in a thread.
    """
    pulse = Pulse()
    said: list[str] = []
    job = InThread(lambda: said.extend(exchange(pulse)))
    started, pause = pulse.answered, min(LOOK, axis.timeout / 4)
    late = False
    try:
        while not late and not _is_over(job, pause):
            now = monotonic()
            # Where the store answers, the thread itself sees when time is up.
            late = now - pulse.answered > pause and now - started > axis.timeout
    except BaseException:
        pulse.left = True
        # After Ctrl-C it takes back what it said.
        with contextlib.suppress(BaseException):
            _is_over(job, pause)
        raise
    if late:
        pulse.left = True
        told: Board | None = world.current().board
        if told is not None:
            told.reachable = False
        raise _out_of_reach(axis, origin)
    return said


def _is_over(job: InThread, seconds: float) -> bool:
    """Wait for it so long, and return whether it is over; raise what it raised."""
    try:
        job.wait(timedelta(seconds=seconds))
    except RuntimeError:
        if not job.is_completed():
            return False
        job.wait()
    return True


class _Look:
    """What a rank that waits for words sees on the board, from time to time."""

    def __init__(
        self, board: Board, keys: list[str], axis: Axis, origin: Origin, mine: Post
    ) -> None:
        self._board, self._keys = board, keys
        self._axis, self._origin, self._mine = axis, origin, mine
        self._started = self._last = monotonic()
        self._before: dict[int, Post] = {}
        self.written = False

    def when_due(self) -> None:
        """Look at the others, a while after the last look; raise if none will come."""
        if monotonic() - self._last < LOOK:
            return
        self._last = monotonic()
        rank, others = self._axis.topology.rank, _others(self._axis)
        self._board.learn(others)
        dead = self._board.dead(others)
        stuck = self._ranks_in_a_cycle()
        if dead or (not stuck and self._has_left(others)) or self._is_late():
            self._end(dead)
        if not self.written:
            self.written = True
            self._board.write(rank, self._mine)

    def _ranks_in_a_cycle(self) -> set[int]:
        """Return the ranks that wait for ever; raise if they did at the last look."""
        followed = self._board.follow(self._axis.ranks)
        # A rank of the cycle that has raised already still counts, so that the others
        # see the cycle, too.
        posts = {other: post._replace(state=WAITS) for other, post in followed.items()}
        stuck = _stuck(posts, self._axis.topology.rank)
        before, self._before = self._before, posts if stuck else {}
        if stuck and all(before.get(other) == posts[other] for other in stuck):
            # Ranks under debug find out by themselves, and all may go on. Another one
            # would wait for ever.
            if any("#words " not in posts[other].meeting for other in stuck):
                self._leave()
            raise differ(self._origin, self._axis, _cycle(posts, stuck), SAME_CALLS)
        return stuck

    def _has_left(self, others: Sequence[int]) -> bool:
        """Return whether one of them has raised, and will not arrive."""
        if not self._board.somebody_left():
            return False
        posts = self._board.read(others).values()
        return any(post.state in (LEFT, *OVER) for post in posts)

    def _is_late(self) -> bool:
        return self._last - self._started > self._axis.timeout

    def _end(self, dead: dict[int, str]) -> None:
        """Raise, unless the last words have come meanwhile."""
        if self._board.store.check(self._keys):
            return
        axis = self._axis
        posts = self._board.read(axis.ranks)
        absent = [rank for rank in _others(axis) if not self._is_here(posts.get(rank))]
        stopped = self._board.stopped(axis.ranks)
        given = not_here(absent, posts, dead, axis.timeout, stopped=stopped)
        expired = _timeout(given, axis, self._origin, "")
        self._leave()
        raise expired

    def _is_here(self, post: Post | None) -> bool:
        return post is not None and post.meeting == self._mine.meeting

    def _leave(self) -> None:
        rank = self._axis.topology.rank
        self._board.write(rank, self._mine._replace(state=LEFT))


def _others(axis: Axis) -> list[int]:
    return [rank for rank in axis.ranks if rank != axis.topology.rank]


def _timeout(given: str, axis: Axis, origin: Origin, more: str) -> CollectiveTimeout:
    function, right = origin[0].removeprefix(BACKWARD), f"Called at {origin[1]}{more}"
    coords = dict(axis.coords)
    return CollectiveTimeout(
        phrase(function, given, right, axis=axis.label, coords=coords)
    )


def _stuck(posts: dict[int, Post], me: int) -> set[int]:
    """Return the ranks that wait for ever, if this one does.

    Each waits for another that waits elsewhere, round to itself.
    """
    stuck = set(posts)
    while True:
        free = {rank for rank in stuck if stuck.isdisjoint(awaited(rank, posts))}
        if not free:
            break
        stuck -= free
    return stuck if me in stuck else set()


def _cycle(posts: dict[int, Post], stuck: set[int]) -> str:
    rows = ["the ranks wait for each other, and none can go on:"]
    for rank in sorted(stuck):
        rows.append(f"  {place_of(rank)} waits in {posts[rank].where}")
    return "\n".join(rows)


_COMPARED = Said("debug", code_of("debug"), otherwise="what debug compares")


class _Speaking(Protocol):
    """A wire of a world without processes."""

    def words(self, mine: str) -> list[str]: ...


def _said(mine: str, axis: Axis, origin: Origin) -> list[str]:
    """Return what each rank of the axis says, in rank order; all come to say it."""
    here = world.current()
    # Asking for the group connects the ranks, which is no meeting.
    if here.by_processes and axis.group and here.store is not None:
        return _in_time(partial(_said_on_board, axis, mine, origin), axis, origin)
    with on_behalf_of(origin):
        wire = wire_of(axis, torch.device("cpu"), said=_COMPARED)
        return cast("_Speaking", wire).words(mine)


def _said_on_board(axis: Axis, mine: str, origin: Origin, pulse: Pulse) -> list[str]:
    told = board()
    assert told is not None
    if told.exchanges is None:
        told.exchanges = _Exchanges(told)
    return told.exchanges.exchange(axis, mine, origin, pulse)


def gathered(
    numbers: Sequence[int], words: Words, axis: Axis, origin: Origin
) -> list[list[int]]:
    """Return the numbers of all ranks of the axis.

    Raise where one of them is at another step, because its numbers mean others.
    """
    mine = words.text(" ".join([str(int(number)) for number in numbers]))
    said: list[Words] = []
    numbers_of: list[list[int]] = []
    for text in _said(mine, axis, origin):
        other, rest = Words.read(text)
        said.append(other)
        numbers_of.append([int(number) for number in rest.split()])
    if any(other.fields != words.fields for other in said):
        raise differ(origin, axis, _table(said, axis), SAME_CALLS)
    return numbers_of


def compare_calls(
    call: Call, xs: Sequence[Tensor], words: Words, origin: Origin, invariant: bool
) -> bool:
    """Raise where the ranks are about to do different things.

    Returns whether what they take as invariant is the same.
    """
    same = compare_words(words, bits_of(xs) if invariant else 0, call.axis, origin)
    if call.row is ALL_TO_ALL:
        _compare_lengths(call, xs[0], origin)
    return same


def compare_words(words: Words, bits: int, axis: Axis, origin: Origin) -> bool:
    """Raise where the ranks say other words; return whether they have the same bits."""
    return are_same(gathered([bits], words, axis, origin))


def are_same(rows: Sequence[list[int]], column: int = 0) -> bool:
    """Return whether all ranks have the same number there."""
    return len({row[column] for row in rows}) == 1


def _compare_lengths(call: Call, x: Tensor, origin: Origin) -> None:
    """Raise where a rank sends to another what that one does not expect."""
    axis = call.axis
    found = lengths_exchanged(call.params, x.shape[call.params[0]], axis)
    if found is None:
        return
    sent, expected = found
    words = Words.of_step("sizes", origin, axis)
    rows = gathered([*sent, *expected], words, axis, origin)
    lines = _contradictions(rows, axis)
    if lines:
        listed = "\n".join(lines)
        given = f"the sizes contradict each other:\n{listed}"
        meant = "recv_sizes[j] is what rank j sends to this rank."
        raise differ(origin, axis, given, f"{meant} Called at {origin[1]}")


def _contradictions(rows: list[list[int]], axis: Axis) -> list[str]:
    """Return a line for each rank that sends another what it does not expect.

    rows: what each rank sends to each, and then what it expects of each.
    """
    places = [place_of(rank) for rank in axis.ranks]
    lines: list[str] = []
    for i, j in itertools.product(range(axis.size), repeat=2):
        sent, expected = rows[i][j], rows[j][axis.size + i]
        if sent != expected:
            to = f"{places[j]}, which expects {expected}"
            lines.append(f"  {places[i]} sends {sent} to {to}")
    return lines


def _table(said: list[Words], axis: Axis) -> str:
    """Return what each rank is about to do, with what differs."""
    columns = list(zip(*[words.fields for words in said], strict=True))
    # A field of which some rank says nothing does not differ. Between calls of the same
    # function an empty field says something, too.
    alone = len(set(columns[0])) == 1
    differing: dict[str, list[str]] = {}
    for field, texts in zip(FIELDS, columns, strict=True):
        if len(set(texts)) > 1 and (alone or all(texts)):
            differing[field] = _apart(texts)
    rows = [f"the ranks differ in {', '.join(differing)}:"]
    for index, (rank, words) in enumerate(zip(axis.ranks, said, strict=True)):
        rows.append(f"  {place_of(rank)}: {words.fields[0]} at {words.site}")
        for field, texts in differing.items():
            # The line above says these two already.
            if field not in ("function", "called at"):
                rows.append(f"    {field}: {texts[index]}".rstrip())
    return "\n".join(rows)


def _apart(texts: Sequence[str]) -> list[str]:
    """Return the texts, long ones from shortly before the place where they differ."""
    start = 0
    if max(map(len, texts)) > SHOWN:
        start = max(0, _first_difference(texts) - SHOWN // 4)
    return [_window(text, start) for text in texts]


def _first_difference(texts: Sequence[str]) -> int:
    for place, letters in enumerate(zip(*texts, strict=False)):
        if len(set(letters)) > 1:
            return place
    return min(map(len, texts))


def _window(text: str, start: int) -> str:
    end = start + SHOWN
    before = "... " if start else ""
    after = " ..." if end < len(text) else ""
    return f"{before}{text[start:end]}{after}"


def _spread(x: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of each element over the axis."""
    plain = unwrapped(x)
    real = torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain
    flat = real.double().contiguous().reshape(-1)
    wire = wire_of(axis, flat.device)
    low = wire.all_reduce(flat, "min", flat.dtype, 1).wait()
    high = wire.all_reduce(flat, "max", flat.dtype, 1).wait()
    return low.view(real.shape), high.view(real.shape)


def difference(
    xs: Sequence[Tensor], names: Sequence[str], axis: Axis, rtol: float, same: bool
) -> str | None:
    """Return where the ranks differ most; None if they agree within the tolerance.

    same: whether they have the same bits.
    """
    if same and rtol == 0.0:
        return None
    worst, said = -1.0, None
    for name, x in zip(names, xs, strict=True):
        low, high = _spread(x, axis)
        if low.numel() == 0:
            continue
        # Equal infinities differ by a NaN that means nothing; any other NaN is the
        # largest difference.
        gap = torch.where(low == high, 0.0, high - low).nan_to_num(nan=torch.inf)
        scale = torch.maximum(low.abs(), high.abs()).nan_to_num(nan=0.0)
        beyond = gap > rtol * scale
        if not beyond.any():
            continue
        at = int(torch.where(beyond, gap, -1.0).argmax())
        largest = gap.reshape(-1)[at].item()
        if largest > worst:
            worst = largest
            least, most = low.reshape(-1)[at].item(), high.reshape(-1)[at].item()
            values = f"goes from {least:.9g} to {most:.9g} over the ranks"
            spot = _spot(name, at, gap.shape, x.dim())
            said = f"{spot} {values}, a difference of {largest:.3g}"
    return said


def _spot(name: str, at: int, shape: torch.Size, dims: int) -> str:
    """Return `x[0, 1]` for the element at a place of the flat tensor."""
    index = torch.unravel_index(torch.tensor(at), shape)
    # A complex element has a last index of its own, for its parts.
    listed = ", ".join([str(int(i)) for i in index[:dims]])
    return f"{name}[{listed}]" if listed else name
