"""How the ranks compare what they are about to do, before a collective sends anything."""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pmod._collectives.slices import ALL_TO_ALL, lengths_exchanged
from pmod._core.row import Call
from pmod._core.tree import outline
from pmod._errors import CollectiveTimeout, MismatchError, phrase
from pmod._mesh.axis import Axis
from pmod._ranks import world
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
    WAITS,
    Board,
    Post,
    Said,
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
    """What a rank says of a step: what must be the same on all ranks, a text for each
    of FIELDS, and its line.
    """

    fields: list[str]
    site: str

    @staticmethod
    def of_call(call: Call, xs: Sequence[Tensor], origin: Origin) -> Words:
        params, shapes = call.params, [tuple(x.shape) for x in xs]
        if call.row.agreed is not None:
            alike = [call.row.agreed(params, shape) for shape in shapes]
            params, shapes = alike[0][0], [shape for _, shape in alike]
        return Words.of_tensors(xs, origin, call.axis, repr(params), shapes)

    @staticmethod
    def of_tensors(
        xs: Sequence[Tensor],
        origin: Origin,
        axis: Axis,
        arguments: str,
        shapes: Sequence[Any],
    ) -> Words:
        said = [
            arguments,
            ", ".join(map(str, shapes)),
            ", ".join(str(x.dtype).removeprefix("torch.") for x in xs),
            ", ".join(x.device.type for x in xs),
            ", ".join(str(torch.is_grad_enabled() and x.requires_grad) for x in xs),
            " of ".join(_transforms()) or "none",
            structure(),
        ]
        return Words(
            [origin[0], f"{axis.label!r} of {axis.size}", *said, _alike(origin[1])],
            origin[1],
        )

    @staticmethod
    def of_step(what: str, origin: Origin, axis: Axis) -> Words:
        """Of a step that is compared by what it is alone; ranks may call backward at
        unlike lines.
        """
        empty = [""] * (len(FIELDS) - 4)
        place = "" if origin[0] == ROOT else _alike(origin[1])
        return Words(
            [origin[0], f"{axis.label!r} of {axis.size}", what, *empty, place],
            origin[1],
        )

    @staticmethod
    def of_tree(
        tree: Any, leaves: Sequence[Tensor], origin: Origin, axis: Axis
    ) -> Words:
        """Of a value that is compared, wherever the ranks do so."""
        said = Words.of_tensors(
            leaves, origin, axis, "", [tuple(x.shape) for x in leaves]
        ).fields
        said[FIELDS.index("structure")] = outline(tree, origin[0], axis)
        said[FIELDS.index("requires grad")] = said[-1] = ""
        return Words(said, origin[1])

    def text(self, rest: str) -> str:
        return _BETWEEN.join([*self.fields, self.site, rest])

    @staticmethod
    def read(text: str) -> tuple[Words, str]:
        *fields, site, rest = text.split(_BETWEEN)
        return Words(fields, site), rest


def _alike(site: str) -> str:
    """A line of the user's code as all nodes name it."""
    return site.alike if isinstance(site, Site) else site


def differ(origin: Origin, axis: Axis, given: str, right: str) -> MismatchError:
    """The error of a call or of its backward."""
    function = origin[0].removeprefix(BACKWARD)
    given = f"in backward, {given}" if function != origin[0] else given
    return MismatchError(
        phrase(function, given, right, axis=axis.label, coords=dict(axis.coords))
    )


def _transforms() -> Iterator[str]:
    """The active transforms of torch.func, outermost last."""
    if not are_transforms_active():
        return
    for interpreter in reversed(interpreters() or []):
        yield interpreter.key().name.lower()


@contextmanager
def outside_transforms() -> Generator[None]:
    """What is compared and sent here is no part of what the user differentiates."""
    with no_transforms(), torch.no_grad():
        yield


def unwrapped(x: Tensor) -> Tensor:
    """The tensor inside torch.func's wrappers."""
    while is_wrapped(x):
        x = unwrap(x)
    return x.detach()


def bits_of(xs: Sequence[Tensor]) -> int:
    """A number that differs where a bit differs."""
    code = 0
    for x in xs:
        flat = unwrapped(x).resolve_conj().resolve_neg().contiguous().reshape(-1).cpu()
        code = zlib.crc32(
            flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data, code
        )
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

    def exchange(self, axis: Axis, mine: str, origin: Origin) -> list[str]:
        """What each rank of the axis says, in rank order."""
        try:
            return self._exchange(axis, mine, origin)
        except RuntimeError as error:  # torch's: the connection to the store broke
            raise self._out_of_reach(axis, origin, error) from None

    def _exchange(self, axis: Axis, mine: str, origin: Origin) -> list[str]:
        self._met[axis.group_key] += 1
        number = self._met[axis.group_key]
        group, store = (
            hashlib.blake2b(axis.group_key.encode(), digest_size=8).hexdigest(),
            self.board.store,
        )

        def key(number: int, index: int) -> str:
            return f"pmod/debug/{group}/{number}/{index}"

        store.set(key(number, axis.index), mine)
        keys = [key(number, index) for index in range(axis.size)]
        try:
            self._wait(keys, axis, f"{axis.group_key}#words {number}", origin)
        except BaseException:  # nobody met: what was said is taken back
            with contextlib.suppress(RuntimeError):
                store.delete_key(key(number, axis.index))
            self._met[axis.group_key] -= 1
            raise
        if number == 1:  # all are here, and the store may be gone when it matters
            self.board.learn(neighbours(axis))
        if (
            number > 2
        ):  # all have come here, so all have read what was said before the last time
            store.delete_key(key(number - 2, axis.index))
        return [text.decode() for text in store.multi_get(keys)]

    def _wait(self, keys: list[str], axis: Axis, meeting: str, origin: Origin) -> None:
        """Until all have spoken. A long wait is written on the board, for others to
        see; one without end raises.
        """
        rank, started, pause = axis.topology.rank, monotonic(), 5e-5
        looked, written, before = started, False, dict[int, Post]()
        mine = Post(
            WAITS,
            meeting,
            tuple(axis.ranks),
            f"{' at '.join(origin)} (under debug, before it is sent)",
        )
        try:
            while not self.board.store.check(
                keys
            ):  # its own wait would print a warning each time it is left
                sleep(pause)
                pause = min(1.5 * pause, 0.01)
                if monotonic() - looked < LOOK:
                    continue
                looked = monotonic()
                others = [other for other in axis.ranks if other != rank]
                self.board.learn(others)
                dead = self.board.dead(others)
                posts = {
                    other: post._replace(state=WAITS)
                    for other, post in self.board.follow(axis.ranks).items()
                }
                stuck = _stuck(posts, rank)
                if stuck and all(before.get(other) == posts[other] for other in stuck):
                    # ranks under debug find out by themselves, and all may go on;
                    # another one would wait for ever
                    if any("#words " not in posts[other].meeting for other in stuck):
                        self.board.write(rank, mine._replace(state=LEFT))
                    raise differ(origin, axis, _cycle(posts, stuck), SAME_CALLS)
                before = posts if stuck else {}
                gone = (
                    dead
                    or (not stuck and self._left(others))
                    or looked - started > axis.timeout
                )
                if gone and not self.board.store.check(keys):
                    expired = self._expired(axis, meeting, origin, dead)
                    self.board.write(rank, mine._replace(state=LEFT))
                    raise expired
                if not written:
                    written = True
                    self.board.write(rank, mine)
        except BaseException:  # what is written stays, for the others to see, until this rank meets them again
            self._raised = True
            raise
        if written or self._raised:
            self._raised = False
            self.board.erase(rank)

    def _left(self, others: Sequence[int]) -> bool:
        """Whether one of them has raised, and comes no more."""
        return self.board.somebody_left() and any(
            post.state == LEFT for post in self.board.read(others).values()
        )

    def _expired(
        self, axis: Axis, meeting: str, origin: Origin, dead: dict[int, str]
    ) -> CollectiveTimeout:
        posts = self.board.read(axis.ranks)
        here = {
            axis.topology.rank,
            *(rank for rank, post in posts.items() if post.meeting == meeting),
        }
        absent, stopped = (
            [rank for rank in axis.ranks if rank not in here],
            self.board.stopped(axis.ranks),
        )
        given = not_here(absent, posts, dead, axis.timeout, stopped=stopped)
        return _absent(given, axis, origin, "")

    def _out_of_reach(
        self, axis: Axis, origin: Origin, error: RuntimeError
    ) -> CollectiveTimeout:
        dead = self.board.dead(
            [rank for rank in axis.ranks if rank != axis.topology.rank]
        )
        given = f"the store of the world cannot be reached, which {place_of(0)} or the launcher serves"
        if dead:
            given = not_here(list(dead), {}, dead, axis.timeout)
        return _absent(given, axis, origin, f"\ntorch says: {first_sentence(error)}")


def _absent(given: str, axis: Axis, origin: Origin, more: str) -> CollectiveTimeout:
    function, right = origin[0].removeprefix(BACKWARD), f"Called at {origin[1]}{more}"
    return CollectiveTimeout(
        phrase(function, given, right, axis=axis.label, coords=dict(axis.coords))
    )


def _stuck(posts: dict[int, Post], me: int) -> set[int]:
    """The ranks that wait for ever, if this one does: each for another that waits
    elsewhere, round to itself.
    """
    stuck = set(posts)
    while True:
        free: set[int] = set()
        for rank in stuck:
            meeting = posts[rank].meeting
            absent = [
                r
                for r in posts[rank].ranks
                if r not in posts or posts[r].meeting != meeting
            ]
            if all(r not in stuck for r in absent):
                free.add(rank)
        if not free:
            return stuck if me in stuck else set()
        stuck -= free


def _cycle(posts: dict[int, Post], stuck: set[int]) -> str:
    rows = [
        f"  {place_of(rank)} waits in {posts[rank].where}" for rank in sorted(stuck)
    ]
    return "the ranks wait for each other, and none can go on:\n" + "\n".join(rows)


_COMPARED = Said("debug", code_of("debug"), otherwise="what debug compares")


def _said(mine: str, axis: Axis, origin: Origin) -> list[str]:
    """What each rank of the axis says, in rank order; all of them come to say it."""
    ours = world.current()
    here = (
        axis.group and board() if ours.by_processes else None
    )  # connects, and is no meeting
    if here is None:
        with on_behalf_of(origin):
            return cast(Any, wire_of(axis, torch.device("cpu"), said=_COMPARED)).words(
                mine
            )
    if here.exchanges is None:
        here.exchanges = _Exchanges(here)
    return here.exchanges.exchange(axis, mine, origin)


def gathered(
    numbers: Sequence[int], words: Words, axis: Axis, origin: Origin
) -> list[list[int]]:
    """The numbers of all ranks of the axis. Raise where one of them is at another step:
    its numbers mean others.
    """
    mine = words.text(" ".join([str(int(number)) for number in numbers]))
    said = [Words.read(text) for text in _said(mine, axis, origin)]
    if any(other.fields != words.fields for other, _ in said):
        raise differ(
            origin, axis, _table([other for other, _ in said], axis), SAME_CALLS
        )
    return [[int(number) for number in rest.split()] for _, rest in said]


def compare_calls(
    call: Call, xs: Sequence[Tensor], words: Words, origin: Origin, invariant: bool
) -> bool:
    """Raise where the ranks are about to do different things; whether what they take as
    invariant is the same.
    """
    same = compare_words(words, bits_of(xs) if invariant else 0, call.axis, origin)
    if call.row is ALL_TO_ALL:
        _compare_lengths(call, xs[0], origin)
    return same


def compare_words(words: Words, bits: int, axis: Axis, origin: Origin) -> bool:
    """Raise where the ranks say other words of a call; whether they have the same bits."""
    return len({bits for (bits,) in gathered([bits], words, axis, origin)}) == 1


def _compare_lengths(call: Call, x: Tensor, origin: Origin) -> None:
    """What each rank sends to another must be what that one expects."""
    axis = call.axis
    found = lengths_exchanged(call.params, x.shape[call.params[0]], axis)
    if found is None:
        return
    sent, expected = found
    rows = gathered(
        [*sent, *expected], Words.of_step("sizes", origin, axis), axis, origin
    )
    n = axis.size
    wrong_pairs = [
        (i, j) for i in range(n) for j in range(n) if rows[i][j] != rows[j][n + i]
    ]
    if wrong_pairs:
        lines = [
            f"  {place_of(axis.ranks[i])} sends {rows[i][j]} to {place_of(axis.ranks[j])}, "
            f"which expects {rows[j][n + i]}"
            for i, j in wrong_pairs
        ]
        given = "the sizes contradict each other:\n" + "\n".join(lines)
        right = (
            f"recv_sizes[j] is what rank j sends to this rank. Called at {origin[1]}"
        )
        raise differ(origin, axis, given, right)


def _table(said: list[Words], axis: Axis) -> str:
    """What each rank is about to do, with what differs. A field that some rank says
    nothing of is no difference.
    """
    columns = list(zip(*[words.fields for words in said], strict=True))
    alone = (
        len(set(columns[0])) == 1
    )  # the same function: then an empty field says something, too
    differing = [
        i
        for i, texts in enumerate(columns)
        if len(set(texts)) > 1 and (alone or all(texts))
    ]
    listed = [i for i in differing if FIELDS[i] not in ("function", "called at")]
    parts = {i: _apart(columns[i]) for i in listed}
    rows: list[str] = []
    for index, (rank, words) in enumerate(zip(axis.ranks, said, strict=True)):
        rows.append(f"  {place_of(rank)}: {words.fields[0]} at {words.site}")
        rows += [f"    {FIELDS[i]}: {parts[i][index]}".rstrip() for i in listed]
    return (
        f"the ranks differ in {', '.join(FIELDS[i] for i in differing)}:\n"
        + "\n".join(rows)
    )


def _apart(texts: Sequence[str]) -> list[str]:
    """The texts, long ones from shortly before the place where they differ."""
    letters = enumerate(zip(*texts, strict=False))
    same = next((i for i, each in letters if len(set(each)) > 1), min(map(len, texts)))
    start = 0 if max(map(len, texts)) <= SHOWN else max(0, same - SHOWN // 4)
    cut = [text[start : start + SHOWN] for text in texts]
    return [
        ("... " if start else "") + part + (" ..." if start + SHOWN < len(text) else "")
        for part, text in zip(cut, texts, strict=True)
    ]


def _spread(x: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each element over the axis."""
    plain = unwrapped(x)
    real = torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain
    flat = real.double().contiguous().reshape(-1)
    wire = wire_of(axis, flat.device)
    low = wire.all_reduce(flat, "min", flat.dtype, 1).wait()
    high = wire.all_reduce(flat, "max", flat.dtype, 1).wait()
    return low.view(real.shape), high.view(real.shape)


def difference(
    xs: Sequence[Tensor], names: Sequence[str], axis: Axis, rtol: float
) -> str | None:
    """Where the ranks differ most, None where they agree within the tolerance."""
    worst: tuple[float, str] | None = None
    for name, x in zip(names, xs, strict=True):
        low, high = _spread(x, axis)
        if low.numel() == 0:
            continue
        gap = torch.where(low == high, 0.0, high - low).nan_to_num(nan=torch.inf)
        scale = torch.maximum(low.abs(), high.abs()).nan_to_num(nan=0.0)
        beyond = gap > rtol * scale
        if not beyond.any():
            continue
        at = int(torch.where(beyond, gap, -1.0).argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), gap.shape))[
            : x.dim()
        ]
        largest = gap.reshape(-1)[at].item()
        if worst is None or largest > worst[0]:
            spot = f"{name}[{', '.join(map(str, index))}]" if index else name
            values = f"from {low.reshape(-1)[at].item():.9g} to {high.reshape(-1)[at].item():.9g}"
            worst = (
                largest,
                f"{spot} goes {values} over the ranks, a difference of {largest:.3g}",
            )
    return None if worst is None else worst[1]
