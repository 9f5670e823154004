"""`debug`: before each collective its ranks compare what they are about to do, so that a hang becomes an error.

Speed is traded for proof: before each collective every rank writes its words on a board, the store of the world, and
reads the others'; where they differ all of them raise the same table. What a row takes as invariant must be the same
bits on every rank. A rank that waits long says on the board for what: ranks that wait for each other in a cycle see so
within seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from time import monotonic, sleep
from types import TracebackType
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pmod import _groups
from pmod._ambient import Watcher, ambient, resolve, watchers
from pmod._arguments import check_flag, check_tensor, check_tolerance, from_number, wrong
from pmod._autodiff import BACKWARD, Call, Origin, backward_of, on_behalf_of, structure
from pmod._errors import ArgumentError, CollectiveTimeout, MismatchError, Site, call_site, explain, quoted
from pmod._factors import few
from pmod._lineage import Found, calls_in, lineage, name_of
from pmod._mesh import Axis, AxisLike
from pmod._pytree import flatten, outline
from pmod._slices import ALL_TO_ALL, lengths_exchanged
from pmod._waiting import LEFT, LOOK, WAITS, Board, Post, Said, _short, board, code_of, neighbours, not_here, place_of
from pmod._wire import wire_of

T = TypeVar("T")

# --- what a rank says of a call -------------------------------------------------------------------

SAME_CALLS = "All ranks of an axis must make the same calls in the same order."
FIELDS = (
    "function", "axis", "arguments", "shapes", "dtypes", "devices", "requires grad", "transforms", "structure",
    "called at",
)  # fmt: skip
ROOT = "backward"  # the function that looks at what backward begins with
SHOWN = 160  # characters of a field that differs
_BETWEEN = "\x1f"


class _Words(NamedTuple):
    """What a rank says of a step: what must be the same on all ranks, a text for each of FIELDS, and its line."""

    fields: list[str]
    site: str

    @staticmethod
    def of_call(call: Call, xs: Sequence[Tensor], origin: Origin) -> _Words:
        params, shapes = call.params, [tuple(x.shape) for x in xs]
        if call.row.agreed is not None:
            alike = [call.row.agreed(params, shape) for shape in shapes]
            params, shapes = alike[0][0], [shape for _, shape in alike]
        return _Words.of_tensors(xs, origin, call.axis, repr(params), shapes)

    @staticmethod
    def of_tensors(
        xs: Sequence[Tensor], origin: Origin, axis: Axis, arguments: str, shapes: Sequence[Any]
    ) -> _Words:
        said = [
            arguments,
            ", ".join(map(str, shapes)),
            ", ".join(str(x.dtype).removeprefix("torch.") for x in xs),
            ", ".join(x.device.type for x in xs),
            ", ".join(str(torch.is_grad_enabled() and x.requires_grad) for x in xs),
            " of ".join(_transforms()) or "none",
            structure(),
        ]
        return _Words([origin[0], f"{axis.label!r} of {axis.size}", *said, _alike(origin[1])], origin[1])

    @staticmethod
    def of_step(what: str, origin: Origin, axis: Axis) -> _Words:
        """Of a step that is compared by what it is alone; ranks may call backward at unlike lines."""
        empty = [""] * (len(FIELDS) - 4)
        place = "" if origin[0] == ROOT else _alike(origin[1])
        return _Words([origin[0], f"{axis.label!r} of {axis.size}", what, *empty, place], origin[1])

    @staticmethod
    def of_tree(tree: Any, leaves: Sequence[Tensor], origin: Origin, axis: Axis) -> _Words:
        """Of a value that is compared, wherever the ranks do so."""
        said = _Words.of_tensors(leaves, origin, axis, "", [tuple(x.shape) for x in leaves]).fields
        said[FIELDS.index("structure")] = outline(tree, origin[0], axis)
        said[FIELDS.index("requires grad")] = said[-1] = ""
        return _Words(said, origin[1])

    def text(self, rest: str) -> str:
        return _BETWEEN.join([*self.fields, self.site, rest])

    @staticmethod
    def read(text: str) -> tuple[_Words, str]:
        *fields, site, rest = text.split(_BETWEEN)
        return _Words(fields, site), rest


def _alike(site: str) -> str:
    """A line of the user's code as all nodes name it."""
    return site.alike if isinstance(site, Site) else site


def _differ(origin: Origin, axis: Axis, given: str, right: str) -> MismatchError:
    """The error of a call or of its backward."""
    function = origin[0].removeprefix(BACKWARD)
    given = f"in backward, {given}" if function != origin[0] else given
    return MismatchError(explain(function, given, right, axis=axis.label, coords=dict(axis.coords)))


def _transforms() -> Iterator[str]:
    """The active transforms of torch.func, outermost last."""
    if not torch._C._are_functorch_transforms_active():
        return
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    for interpreter in reversed(functorch.get_interpreter_stack() or []):
        yield interpreter.key().name.lower()


@contextmanager
def _outside_transforms() -> Generator[None]:
    """What is compared and sent here is no part of what the user differentiates."""
    with torch._C._DisableFuncTorch(), torch.no_grad():
        yield


def _plain(x: Tensor) -> Tensor:
    """The tensor inside torch.func's wrappers."""
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x.detach()


def _bits(xs: Sequence[Tensor]) -> int:
    """A number that differs where a bit differs."""
    code = 0
    for x in xs:
        flat = _plain(x).resolve_conj().resolve_neg().contiguous().reshape(-1).cpu()
        code = zlib.crc32(flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data, code)
    return code


# --- the messages ---------------------------------------------------------------------------------


class _Exchanges:
    """What the ranks say before each call, on the board.

    Words go through the store and not through the process groups: a rank that waits for words can be let go, and what
    it was going to send is not in anybody's way.
    """

    def __init__(self, board: Board) -> None:
        self.board = board
        self._met: Counter[str] = Counter()
        self._raised = False  # in a wait, and the board still says so

    def exchange(self, axis: Axis, mine: str, origin: Origin) -> list[str]:
        """What each rank of the axis says, in rank order."""
        try:
            return self._exchange(axis, mine, origin)
        except RuntimeError as error:  # torch's: the connection to the store broke
            raise self._out_of_reach(axis, origin, error) from None

    def _exchange(self, axis: Axis, mine: str, origin: Origin) -> list[str]:
        self._met[axis.group_key] += 1
        number = self._met[axis.group_key]
        group, store = hashlib.blake2b(axis.group_key.encode(), digest_size=8).hexdigest(), self.board.store

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
        if number > 2:  # all have come here, so all have read what was said before the last time
            store.delete_key(key(number - 2, axis.index))
        return [text.decode() for text in store.multi_get(keys)]

    def _wait(self, keys: list[str], axis: Axis, meeting: str, origin: Origin) -> None:
        """Until all have spoken. A long wait is written on the board, for others to see; one without end raises."""
        rank, started, pause = axis.topology.rank, monotonic(), 5e-5
        looked, written, before = started, False, dict[int, Post]()
        mine = Post(WAITS, meeting, tuple(axis.ranks), f"{' at '.join(origin)} (under debug, before it is sent)")
        try:
            while not self.board.store.check(keys):  # its own wait would print a warning each time it is left
                sleep(pause)
                pause = min(1.5 * pause, 0.01)
                if monotonic() - looked < LOOK:
                    continue
                looked = monotonic()
                others = [other for other in axis.ranks if other != rank]
                self.board.learn(others)
                dead = self.board.dead(others)
                posts = {other: post._replace(state=WAITS) for other, post in self.board.follow(axis.ranks).items()}
                stuck = _stuck(posts, rank)
                if stuck and all(before.get(other) == posts[other] for other in stuck):
                    raise _differ(origin, axis, _cycle(posts, stuck), SAME_CALLS)
                before = posts if stuck else {}
                gone = dead or (not stuck and self._left(others)) or looked - started > axis.timeout
                if gone and not self.board.store.check(keys):
                    raise self._expired(axis, meeting, origin, dead)
                if not written:
                    written = True
                    self.board.write(rank, mine)
        except BaseException:  # it stays on the board, for the others to see, until this rank meets them again
            self._raised = True
            self.board.write(rank, mine._replace(state=LEFT))
            raise
        if written or self._raised:
            self._raised = False
            self.board.erase(rank)

    def _left(self, others: Sequence[int]) -> bool:
        """Whether one of them has raised, and comes no more."""
        return self.board.somebody_left() and any(post.state == LEFT for post in self.board.read(others).values())

    def _expired(self, axis: Axis, meeting: str, origin: Origin, dead: dict[int, str]) -> CollectiveTimeout:
        posts = self.board.read(axis.ranks)
        here = {axis.topology.rank, *(rank for rank, post in posts.items() if post.meeting == meeting)}
        absent, stopped = [rank for rank in axis.ranks if rank not in here], self.board.stopped(axis.ranks)
        given = not_here(absent, posts, dead, axis.timeout, stopped=stopped)
        return _absent(given, axis, origin, "")

    def _out_of_reach(self, axis: Axis, origin: Origin, error: RuntimeError) -> CollectiveTimeout:
        dead = self.board.dead([rank for rank in axis.ranks if rank != axis.topology.rank])
        given = f"the store of the world cannot be reached, which {place_of(0)} or the launcher serves"
        if dead:
            given = not_here(list(dead), {}, dead, axis.timeout)
        return _absent(given, axis, origin, f"\ntorch says: {_short(error)}")


def _absent(given: str, axis: Axis, origin: Origin, more: str) -> CollectiveTimeout:
    function, right = origin[0].removeprefix(BACKWARD), f"Called at {origin[1]}{more}"
    return CollectiveTimeout(explain(function, given, right, axis=axis.label, coords=dict(axis.coords)))


def _stuck(posts: dict[int, Post], me: int) -> set[int]:
    """The ranks that wait for ever, if this one does: each for another that waits elsewhere, round to itself."""
    stuck = set(posts)
    while True:
        free: set[int] = set()
        for rank in stuck:
            meeting = posts[rank].meeting
            absent = [r for r in posts[rank].ranks if r not in posts or posts[r].meeting != meeting]
            if all(r not in stuck for r in absent):
                free.add(rank)
        if not free:
            return stuck if me in stuck else set()
        stuck -= free


def _cycle(posts: dict[int, Post], stuck: set[int]) -> str:
    rows = [f"  {place_of(rank)} waits in {posts[rank].where}" for rank in sorted(stuck)]
    return "the ranks wait for each other, and none can go on:\n" + "\n".join(rows)


_exchanges: _Exchanges | None = None
_COMPARED = Said("debug", code_of("debug"), otherwise="what debug compares")


def _said(mine: str, axis: Axis, origin: Origin) -> list[str]:
    """What each rank of the axis says, in rank order; all of them come to say it."""
    global _exchanges
    here = None if _groups.in_simulation() else axis.group and board()  # connects, and is no meeting
    if here is None:
        with on_behalf_of(origin):
            return cast(Any, wire_of(axis, said=_COMPARED)).words(mine)
    if _exchanges is None or _exchanges.board is not here:
        _exchanges = _Exchanges(here)
    return _exchanges.exchange(axis, mine, origin)


def _gathered(numbers: Sequence[int], words: _Words, axis: Axis, origin: Origin) -> list[list[int]]:
    """The numbers of all ranks of the axis. Raise where one of them is at another step: its numbers mean others."""
    mine = words.text(" ".join([str(int(number)) for number in numbers]))
    said = [_Words.read(text) for text in _said(mine, axis, origin)]
    if any(other.fields != words.fields for other, _ in said):
        raise _differ(origin, axis, _table([other for other, _ in said], axis), SAME_CALLS)
    return [[int(number) for number in rest.split()] for _, rest in said]


def _compare(call: Call, xs: Sequence[Tensor], words: _Words, origin: Origin, invariant: bool) -> bool:
    """Raise where the ranks are about to do different things; whether what they take as invariant is the same."""
    same = _compare_words(words, _bits(xs) if invariant else 0, call.axis, origin)
    if call.row is ALL_TO_ALL:
        _compare_lengths(call, xs[0], origin)
    return same


def _compare_words(words: _Words, bits: int, axis: Axis, origin: Origin) -> bool:
    """Raise where the ranks say other words of a call; whether they have the same bits."""
    return len({bits for (bits,) in _gathered([bits], words, axis, origin)}) == 1


def compare_claimed(leaves: Sequence[tuple[Tensor, str]], axis: Axis, function: str) -> None:
    """Under debug: raise where leaves whose specs leave an axis out are not the same on all its ranks."""
    checker = next((watcher for watcher in watchers() if isinstance(watcher, _Checker)), None)
    if checker is None or axis.size == 1:
        return
    origin, (xs, names) = (function, call_site()[1]), zip(*leaves, strict=True)
    words = _Words.of_tensors(xs, origin, axis, ", ".join(names), [tuple(x.shape) for x in xs])
    with _outside_transforms():
        same = _compare_words(words, _bits(xs), axis, origin)
        found = None if same and checker.rtol == 0.0 else _difference(xs, names, axis, checker.rtol)
    if found is not None:
        given = f"{found}, but its spec leaves {axis.label!r} out, so ranks {few(axis.ranks)} should hold one value"
        right = f"Make it one (pmod.replicate, pmod.pmean), or name the axis in the spec.\nCalled at {origin[1]}"
        raise _differ(origin, axis, given, right)


def _compare_lengths(call: Call, x: Tensor, origin: Origin) -> None:
    """What each rank sends to another must be what that one expects."""
    axis = call.axis
    found = lengths_exchanged(call.params, x.shape[call.params[0]], axis)
    if found is None:
        return
    sent, expected = found
    rows = _gathered([*sent, *expected], _Words.of_step("sizes", origin, axis), axis, origin)
    n = axis.size
    wrong_pairs = [(i, j) for i in range(n) for j in range(n) if rows[i][j] != rows[j][n + i]]
    if wrong_pairs:
        lines = [
            f"  {place_of(axis.ranks[i])} sends {rows[i][j]} to {place_of(axis.ranks[j])}, "
            f"which expects {rows[j][n + i]}"
            for i, j in wrong_pairs
        ]
        given = "the sizes contradict each other:\n" + "\n".join(lines)
        right = f"recv_sizes[j] is what rank j sends to this rank. Called at {origin[1]}"
        raise _differ(origin, axis, given, right)


def _table(said: list[_Words], axis: Axis) -> str:
    """What each rank is about to do, with what differs. A field that some rank says nothing of is no difference."""
    columns = list(zip(*[words.fields for words in said], strict=True))
    alone = len(set(columns[0])) == 1  # the same function: then an empty field says something, too
    differing = [i for i, texts in enumerate(columns) if len(set(texts)) > 1 and (alone or all(texts))]
    listed = [i for i in differing if FIELDS[i] not in ("function", "called at")]
    parts = {i: _apart(columns[i]) for i in listed}
    rows: list[str] = []
    for index, (rank, words) in enumerate(zip(axis.ranks, said, strict=True)):
        rows.append(f"  {place_of(rank)}: {words.fields[0]} at {words.site}")
        rows += [f"    {FIELDS[i]}: {parts[i][index]}".rstrip() for i in listed]
    return f"the ranks differ in {', '.join(FIELDS[i] for i in differing)}:\n" + "\n".join(rows)


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


# --- what must be invariant -----------------------------------------------------------------------


def _spread(x: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each element over the axis."""
    plain = _plain(x)
    real = torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain
    flat = real.double().contiguous().reshape(-1)
    wire = wire_of(axis)
    low = wire.all_reduce(flat, "min", flat.dtype, 1).wait()
    high = wire.all_reduce(flat, "max", flat.dtype, 1).wait()
    return low.view(real.shape), high.view(real.shape)


def _difference(xs: Sequence[Tensor], names: Sequence[str], axis: Axis, rtol: float) -> str | None:
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
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), gap.shape))[: x.dim()]
        largest = gap.reshape(-1)[at].item()
        if worst is None or largest > worst[0]:
            spot = f"{name}[{', '.join(map(str, index))}]" if index else name
            values = f"from {low.reshape(-1)[at].item():.9g} to {high.reshape(-1)[at].item():.9g}"
            worst = (largest, f"{spot} goes {values} over the ranks, a difference of {largest:.3g}")
    return None if worst is None else worst[1]


def assert_invariant(tree: Any, axis: AxisLike, *, rtol: float = 0.0) -> None:
    """Raise where a value that all ranks of the axis should hold alike is not the same on all of them.

    The leaves are tensors or numbers.
    rtol: the largest difference between ranks, relative to the largest magnitude; 0 asks for the same bits. Usable with
    and without debug. All ranks of the axis call it, with trees of the same shapes.
    Cost: one small message; two of the size of the tree where it differs or rtol is not 0.
    Raises: MismatchError on every rank, with the largest difference and where it is; ArgumentError for other leaves.

    >>> pmod.assert_invariant(torch.ones(2), mesh["model"])
    """
    bound = resolve(axis, "assert_invariant")
    rtol = check_tolerance(rtol, "assert_invariant")
    leaves: list[Any] = []
    flatten(tree, "assert_invariant", bound, leaves)
    leaves = [from_number(leaf, int, "assert_invariant", bound) for leaf in leaves]
    for leaf in leaves:
        check_tensor(leaf, "assert_invariant", bound)
    if bound.size == 1:
        return
    names = ["x"] if isinstance(tree, Tensor) else [f"leaf {i}" for i in range(len(leaves))]
    with _outside_transforms():
        origin = call_site()
        words = _Words.of_tree(tree, leaves, origin, bound)
        rows = _gathered([_bits(leaves)], words, bound, origin)
        if rtol == 0.0 and len({row[0] for row in rows}) == 1:
            return
        found = _difference(leaves, names, bound, rtol)
    if found is not None:
        right = "It should be the same on every rank: was it drawn from another seed, or is a psum missing?"
        raise wrong(MismatchError, "assert_invariant", bound, found, right)


# --- what goes into a sum -------------------------------------------------------------------------

_varying: Any = WeakIdKeyDictionary()  # leaf -> the ranks along which it is marked as V


def varying(leaf: T, axis: AxisLike) -> T:
    """Mark a leaf of autograd as varying along an axis: for `debug`, which else takes equal values for one value.

    Shards of a parameter that start equal on all ranks (zeros, or the same seed) are V and look like I. Returns the
    leaf. Raises: ArgumentError for what is no tensor.

    >>> bias = pmod.varying(torch.nn.Parameter(torch.zeros(4)), mesh["model"])
    """
    bound = resolve(axis, "varying")
    if not isinstance(leaf, Tensor):
        raise wrong(ArgumentError, "varying", bound, f"leaf is a {type(leaf).__name__}", "Pass a tensor.")
    _varying.setdefault(leaf, set()).add(bound.group_key)
    return leaf


def is_marked_varying(leaf: Tensor, axis: Axis) -> bool:
    """Whether `varying` marked it."""
    return axis.group_key in _varying.get(leaf, ())


def _check_lineage(found: list[Found], axis: Axis, origin: Origin) -> None:
    """What goes into a sum over the axis must be V: made from no I of the axis but through pvary or shard."""
    leaves = [entry for f in found for entry in f.leaves if not is_marked_varying(entry[0], axis)]
    invariant = [entry for f in found for entry in f.invariant]
    alone = all(not f.varying for f in found)  # nothing in it is V: it is one value itself
    rows = _gathered([len(leaves), len(invariant)], _Words.of_step("what x is made from", origin, axis), axis, origin)
    if any(row[1] for row in rows):
        (function, called), line = invariant[0] if invariant else (("a collective", "another rank"), "")
        if alone and not leaves:
            given = f"x is the result of {function}, one value (I) already: {_times(origin, axis)}"
            raise _differ(origin, axis, given, f"It comes from {called}\nLeave one of the two out.")
        given = f"the result of {function}, one value (I), meets varying data without pvary"
        right = f"It comes from {called}\n{_used_in(line)}Put pmod.pvary(..., {axis.label!r}) around it there."
        raise _differ(origin, axis, given, right)
    if len({row[0] for row in rows}) > 1 or not leaves:
        return  # the ranks use different leaves, so these are not one value
    step = _Words.of_step("the leaves that x is made from", origin, axis)
    codes = _gathered([_bits([leaf]) for leaf, _ in leaves], step, axis, origin)
    same = [entry for i, entry in enumerate(leaves) if entry[0].numel() and len({row[i] for row in codes}) == 1]
    # zeros, ones: what shards start with, too
    certain = [entry for entry in same if not bool((_plain(entry[0]) == _plain(entry[0]).reshape(-1)[0]).all())]
    if not same:
        return
    names = [name_of(leaf) for leaf, _ in certain or same]
    given = f"{_list(names)} {'is' if len(names) == 1 else 'are'} the same on all ranks, used in varying computation without pvary"  # noqa: E501
    right = (
        f"{_used_in((certain or same)[0][1])}"
        f"If it is one value (I): use pmod.pvary(..., {axis.label!r}) of it there. "
        f"If it only starts equal (V): pmod.varying(..., {axis.label!r}) says so."
    )
    error = _differ(origin, axis, given, right)
    if certain:
        raise error
    warnings.warn(str(error), RuntimeWarning, stacklevel=2)
    for leaf, _ in same:  # said once
        _varying.setdefault(leaf, set()).add(axis.group_key)


def _list(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _check_root(root: Tensor, inputs: Sequence[Tensor] | None) -> None:
    """Backward of a V: the derivative of the sum over the ranks. So what goes into it is looked at as by a sum."""
    origin = (ROOT, call_site()[1])
    axes = {call.axis.group_key: (call.axis, forward) for call, forward in calls_in(root) if call.axis.size > 1}
    for _, (axis, forward) in sorted(axes.items()):
        found = lineage(root, axis)
        asked = [(leaf, line) for leaf, line in found.leaves if _is_asked_for(leaf, inputs)]
        # a rank whose loss has lost this call does not come
        words = _Words.of_step("", origin, axis)
        rows = _gathered([found.varying, _bits([root])], words, axis, backward_of(forward))
        if not all(row[0] for row in rows):
            continue
        _check_lineage([Found(asked, found.invariant, found.varying)], axis, origin)
        if inputs is None and len({row[1] for row in rows}) == 1:
            given = "the loss varies (V) and is the same on all ranks, so its gradient is that of their sum"
            right = "Did you mean unshard, pmean or pick, which give one value (I)?"
            warnings.warn(str(_differ(origin, axis, given, right)), RuntimeWarning, stacklevel=2)


def _is_asked_for(leaf: Tensor, inputs: Sequence[Tensor] | None) -> bool:
    if inputs is not None:
        return any(leaf is x for x in inputs)
    return not leaf._post_accumulate_grad_hooks  # data_parallel's reduces what it leaves in .grad


def _times(origin: Origin, axis: Axis) -> str:
    return f"this would multiply by {axis.size}" if origin[0] == "psum" else f"this is the same value {axis.size} times"


def _used_in(line: str) -> str:
    return f"It is used in {line}\n" if line else ""


# --- debug ----------------------------------------------------------------------------------------


class _Checker:
    """The watcher that `debug` sets."""

    def __init__(self, rtol: float) -> None:
        self.rtol = rtol
        self.warned = False

    def compiled(self) -> None:
        if not self.warned:
            self.warned = True
            text = explain("debug", "compiled code is not checked", "Run the eager function under debug.")
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def after(self, call: Call) -> None:
        pass

    def waited(self, call: Call, seconds: float) -> None:
        pass

    def before(self, call: Call, xs: Sequence[Tensor], origin: Origin) -> None:
        if call.axis.size == 1:
            return
        words = _Words.of_call(call, xs, origin)
        forward = call.row.takes == "V" and not origin[0].startswith(BACKWARD)
        traced = forward and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
        with _outside_transforms():
            self._check(call, xs, words, origin)
            if traced and any(x.requires_grad for x in xs):
                _check_lineage([lineage(x, call.axis) for x in xs if x.requires_grad], call.axis, origin)

    def _check(self, call: Call, xs: Sequence[Tensor], words: _Words, origin: Origin) -> None:
        invariant = call.row.takes == "I"
        same = _compare(call, xs, words, origin, invariant)
        if invariant and not (same and self.rtol == 0.0):
            name = "the gradient" if origin[0].startswith(BACKWARD) else "x"
            names = [name] if len(xs) == 1 else [f"{name} {i}" for i in range(len(xs))]
            found = _difference(xs, names, call.axis, self.rtol)
            if found is not None:
                given = f"{found}, but all ranks should hold the same there (I)"
                raise _differ(origin, call.axis, given, f"Called at {origin[1]}")


class _Backward:
    """torch.autograd's two entries, looked into while debug is on anywhere in this process.

    torch's anomaly mode is on meanwhile, so that the graph knows the lines that made it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._backward: Any = torch.autograd.backward
        self._grad: Any = torch.autograd.grad
        self._anomaly = (False, True)

    def watch(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._backward, self._grad = torch.autograd.backward, torch.autograd.grad
                torch.autograd.backward, torch.autograd.grad = self._watched_backward, self._watched_grad
                self._anomaly = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
                torch.autograd.set_detect_anomaly(True, check_nan=all(self._anomaly))

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                torch.autograd.backward, torch.autograd.grad = self._backward, self._grad
                torch.autograd.set_detect_anomaly(*self._anomaly)

    def _watched_backward(self, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        _look_at_roots(tensors, kwargs.get("inputs"))
        return self._backward(tensors, *args, **kwargs)

    def _watched_grad(self, outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        _look_at_roots(outputs, inputs)
        return self._grad(outputs, inputs, *args, **kwargs)


def _look_at_roots(roots: Any, inputs: Any) -> None:
    if torch._C._are_functorch_transforms_active() or not any(isinstance(w, _Checker) for w in watchers()):
        return
    wanted = [inputs] if isinstance(inputs, Tensor) else inputs
    for root in [roots] if isinstance(roots, Tensor) else roots:
        if isinstance(root, Tensor) and root.requires_grad:
            with _outside_transforms():
                _check_root(root, wanted)


_entries = _Backward()


class debug:  # lower case: it reads as the function it is called as
    """Compare the ranks before each collective, so that hangs and silent corruption become errors.

    As a context manager, ``with pmod.debug():``; as a statement, ``pmod.debug()`` until ``pmod.debug(False)``; or for a
    whole run, PMOD_DEBUG=1. All ranks switch it on and off at the same places.
    Before each collective, forward and backward, the ranks of the axis compare function, axis, arguments, shapes,
    dtypes, devices, requires_grad, active transforms, the structure of trees with the keys of their dicts, and call
    site (module, file name and line: the files may lie elsewhere on each node); what is taken as invariant (into
    `pvary`, `shard`, `place`, and back into `psum`, `unshard`, `pick`) must be the same bits on all of them, or within
    rtol of the largest magnitude. Ranks that wait for each other in different places find out within seconds.
    Cost: one small message before each collective, and a look at every bit of what is invariant. Eager code only:
    compiled code runs unchecked, and a warning says so.
    Raises: MismatchError on every rank of the axis, with what each was about to do.

    >>> def step():
    ...     with pmod.debug():
    ...         return pmod.psum(torch.ones(2 if pmod.axis_index("model") else 3), "model")
    >>> pmod.simulate(step, model=2)  # doctest: +ELLIPSIS, +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    MismatchError: pmod.psum(axis='model') at (model=0): the ranks differ in shapes: ...
    """

    def __init__(self, on: bool = True, *, rtol: float = 0.0) -> None:
        check_flag(on, "debug", "on")
        rtol = check_tolerance(rtol, "debug")
        self._before = list(watchers())
        kept = [w for w in self._before if not isinstance(w, _Checker)]
        self._change([*kept, _Checker(rtol)] if on and not _groups.alone() else kept)

    def _change(self, to: list[Watcher]) -> None:
        was, now = (any(isinstance(w, _Checker) for w in them) for them in (watchers(), to))
        watchers()[:] = to
        if now and not was:
            _entries.watch()
        elif was and not now:
            _entries.leave()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._change(self._before)


# --- checked --------------------------------------------------------------------------------------

F = TypeVar("F", bound=Callable[..., Any])


def checked(f: F) -> F:
    """A step function that is run under `debug` the first time, and as it is from then on.

    Each new signature is checked once: the shapes and dtypes of its tensors, what requires grad, the types of all else,
    grad mode and mesh. All ranks must come to a new signature in the same call: where shards change their lengths from
    step to step on some ranks only, use `debug` instead.
    Cost: a look-up per call. Raises: ArgumentError where f cannot be called; as `debug`, in those calls.

    >>> @pmod.checked
    ... def total(x):
    ...     return pmod.psum(x, "model")
    >>> pmod.simulate(lambda: total(torch.ones(2)), model=2)[0]
    tensor([2., 2.])
    """
    if not callable(f):
        right = "Pass a step function: @pmod.checked above its def."
        raise ArgumentError(explain("checked", f"f is {quoted(f)}", right))
    seen: set[Any] = set()

    @wraps(f)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _groups.alone():  # nobody to compare with
            return f(*args, **kwargs)
        place = _groups.simulated and _groups.simulated.topology.rank  # ranks that are threads share this function
        key = (ambient(), torch.is_grad_enabled(), place, _signature(args), _signature(kwargs))
        if key in seen or torch.compiler.is_compiling():
            return f(*args, **kwargs)
        with debug():
            result = f(*args, **kwargs)
        seen.add(key)
        return result

    return cast(F, wrapper)


def _signature(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.shape, tree.dtype, tree.device, tree.requires_grad
    if isinstance(tree, dict):
        return tuple((key, _signature(value)) for key, value in tree.items())
    if isinstance(tree, list | tuple):
        return tuple(map(_signature, tree))
    return type(tree)


if os.environ.get("PMOD_DEBUG", "0") not in ("", "0"):
    debug()
