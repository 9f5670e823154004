"""How unlike calls are found after the fact, where messages have no tags.

On gloo messages of unlike calls never meet (`_wire/waiting.py`). NCCL has no tags.
There unlike calls exchange what nobody meant, or hang on the device, and the host goes
on. So each rank mixes what it says of its calls into one number per axis, which depends
on all calls before. A thread compares that number with the next rank's through the
store of the world. If the calls of any two ranks differ, so do those of two neighbours.
The rank that finds a difference tells all, and their next call raises.
"""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from pmod._errors import MismatchError, coordinates, phrase
from pmod._mesh.axis import Axis
from pmod._ranks import world
from pmod._site import call_site
from pmod._wire.board import ALIKE, Board, Said, board, place_of

LOOK = 1.0  # seconds between looks
# Of more ranks than this each looks less often, because one store serves all.
CROWD = 256
# So many last calls are told one by one, and before them so many whose number MARK
# divides: ranks that are far apart both tell those.
SHOWN = 32
MARKS = 16
MARK = 256

_PRIME, _BITS = 1000003, 0xFFFFFFFFFFFF


class Told(NamedTuple):
    """What a rank tells of one call."""

    number: int  # along the axis
    code: int  # of all calls until this one
    words: str


class Calls:
    """The calls of this rank along one axis."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.compared = True
        self._code = 0
        self._last: deque[tuple[int, int, Said]] = deque(maxlen=SHOWN)
        self._marks: deque[tuple[int, int, Said]] = deque(maxlen=MARKS)

    def add(self, number: int, said: Said) -> None:
        self._code = (self._code * _PRIME + said.code) & _BITS
        call = number, self._code, said
        self._last.append(call)
        if number % MARK == 0:
            self._marks.append(call)

    def told(self) -> list[Told]:
        """Return what is told of the calls, in the order of their numbers."""
        if not self.compared:
            return []
        # This is called in another thread, so the deques are copied first.
        calls = {call[0]: call for call in [*self._marks.copy(), *self._last.copy()]}
        told: list[Told] = []
        for number, code, said in sorted(calls.values()):
            told.append(Told(number, code, f"{said.what} in {said.row}"))
        return told


def as_text(told: list[Told]) -> str:
    return "\x1e".join(f"{number}\x1f{code}\x1f{words}" for number, code, words in told)


def of_text(text: str) -> list[Told]:
    rows = [row.split("\x1f") for row in text.split("\x1e") if row]
    return [Told(int(number), int(code), words) for number, code, words in rows]


def first_unlike(ours: list[Told], theirs: list[Told]) -> tuple[int, Told, Told] | None:
    """Return the number of the last call that is alike, and the first unlike one.

    Of the latter, what each of the two ranks tells. Calls that only one of them tells
    do not count. None where no call is unlike.
    """
    there = {told.number: told for told in theirs}
    alike = 0
    for mine in ours:
        other = there.get(mine.number)
        if other is None:
            continue
        if other.code != mine.code:
            return alike, mine, other
        alike = mine.number
    return None


class Witness:
    """What this process has called in its world, and the thread that compares it."""

    def __init__(self) -> None:
        self._calls: dict[str, Calls] = {}
        # What is wrong, by axis.
        self.found: dict[str, str] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=self._look_on, name="pmod compares calls", daemon=True
        )

    @property
    def _pause(self) -> float:
        # A copy, because `note` adds to the dict in the main thread.
        sizes = [calls.axis.topology.world_size for calls in list(self._calls.values())]
        return LOOK * max(1.0, max(sizes, default=1) / CROWD)

    def start(self) -> None:
        told = board()
        if told is None or not told.reachable:
            return
        # Those that wait ask the other connection, so this thread has one of its own.
        self._board = Board(told.of)
        self._thread.start()
        # In the store's C++ a daemon thread would abort the process at its end.
        atexit.register(self.stop)

    def stop(self) -> None:
        atexit.unregister(self.stop)
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(2.0)

    def note(self, axis: Axis, number: int, said: Said) -> None:
        """Note a call that is about to be made."""
        self.calls_along(axis).add(number, said)

    def calls_along(self, axis: Axis) -> Calls:
        """Return the calls of this rank along an axis."""
        return self._calls.setdefault(axis.group_key, Calls(axis))

    def check(self, axis: Axis, said: Said) -> None:
        """Raise MismatchError where an earlier call of this axis was found unlike."""
        given = self.found.get(axis.group_key)
        if given is None:
            return
        # What the group carries from now on would be void, too.
        world.leave_behind(axis.group)
        function, _ = call_site()
        debug = (
            "Run under pmod.debug(): it raises before they are made, with the lines."
        )
        text = phrase(
            said.by(function),
            given,
            f"{ALIKE} {debug}",
            axis=axis.label,
            coords=dict(axis.coords),
        )
        raise MismatchError(text)

    def _look_on(self) -> None:
        while not self._over.wait(self._pause):
            for key, calls in list(self._calls.items()):
                if key in self.found:
                    continue
                try:
                    given = self._compare(key, calls)
                except RuntimeError:
                    # The store is gone, and nobody is left to compare with.
                    return
                if given:
                    self._tell(key, calls.axis, given)

    def _tell(self, key: str, axis: Axis, given: str) -> None:
        """Log what is wrong, and keep it for the next call."""
        self.found[key] = given
        place = coordinates(dict(axis.coords))
        world.log.error("pmod along %r %s: %s", axis.label, place, given)

    def _compare(self, key: str, calls: Calls) -> str:
        """Return what is wrong with the calls along this axis, or nothing.

        It is what another rank has found, or what the next rank's calls show.
        """
        axis, told = calls.axis, calls.told()
        ranks = list(axis.ranks)
        me, other = ranks[axis.index], ranks[(axis.index + 1) % axis.size]
        self._board.tell_calls(key, me, as_text(told))
        found = first_unlike(told, of_text(self._board.calls_of(key, other)))
        if found is None:
            return self._board.was_found(key)
        alike, mine, theirs = found
        which = f"call {mine.number}"
        if alike < mine.number - 1:
            which = f"one of their calls {alike + 1} to {mine.number}"
        given = (
            f"the ranks made unlike calls, {which} along this axis, "
            "and what they exchanged since then is void:\n"
            f"  {place_of(me)}: {mine.words}\n"
            f"  {place_of(other)}: {theirs.words}"
        )
        self._board.found(key, given)
        return given


def noting(axis: Axis) -> Callable[[Said], None]:
    """Return what numbers and notes the calls along an axis, as `note` does, one by one."""
    witness: Witness = world.witness(Witness)
    connection, key = world.processes().connection, axis.group_key
    add, found = witness.calls_along(axis).add, witness.found
    meetings = connection.meetings

    def note_next(said: Said) -> None:
        meetings[key] = number = meetings[key] + 1
        add(number, said)
        if found:
            witness.check(axis, said)

    return note_next


def stop_noting(axis: Axis) -> None:
    """Compare the calls along an axis no more, on any of its ranks."""
    witness: Witness = world.witness(Witness)
    witness.calls_along(axis).compared = False


def note(axis: Axis, number: int, said: Said) -> None:
    """Note a call along an axis whose messages have no tags.

    Raises: MismatchError where an earlier one was unlike.
    """
    witness: Witness = world.witness(Witness)
    witness.note(axis, number, said)
    witness.check(axis, said)
