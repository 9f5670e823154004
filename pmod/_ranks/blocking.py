"""Calls that block, in threads of their own, and what becomes of these at the end."""

from __future__ import annotations

import ctypes
import queue
import signal
import threading
from collections.abc import Callable
from datetime import timedelta

from pmod._ranks.world import Job, processes


class InThread:
    """A call in a thread, because gloo's sends and receives block and cannot be asked.

    They block for their connection and for their end. `cut` ends what the call waits
    for.
    """

    def __init__(
        self, f: Callable[[], None], cut: Callable[[], None] = lambda: None
    ) -> None:
        self._f = f
        self.cut = cut
        # Held until the call is over.
        self._over = threading.Lock()
        self._over.acquire()
        self._error: BaseException | None = None
        try:
            worker = processes().idle.pop()
        except IndexError:
            # There are as many threads as calls have blocked at once.
            worker = queue.SimpleQueue()
            threading.Thread(
                target=_serve, args=(worker,), name="pmod sends", daemon=True
            ).start()
        worker.put(self)

    def run(self) -> None:
        try:
            self._f()
        except BaseException as error:
            self._error = error

    def release(self) -> None:
        self._over.release()

    def is_completed(self) -> bool:
        return not self._over.locked()

    def wait(self, timeout: timedelta | None = None) -> None:
        # -1 is for ever
        seconds = -1 if timeout is None else timeout.total_seconds()
        if not self._over.acquire(timeout=seconds):
            raise RuntimeError("not done yet")
        self._over.release()
        if self._error is not None:
            raise self._error


def _serve(jobs: queue.SimpleQueue[Job]) -> None:
    here, ours = threading.get_ident(), processes()
    while True:
        job = jobs.get()
        ours.busy.add(here)
        job.run()
        ours.busy.discard(here)
        ours.idle.append(jobs)
        job.release()
        # With the tensors that it holds, which would live until the next job comes.
        del job


def hold_still() -> None:
    """Halt the threads that are in such a call for good, before Python ends.

    A call that returns while Python ends wants the interpreter, does not get it, and
    aborts the process ("terminate called without an active exception"). What it waits
    for often ends just then: the other ranks end, too.
    """
    number = getattr(signal, "SIGRTMAX", None)
    busy = processes().busy
    if not busy or number is None:
        return
    libc = ctypes.CDLL(None)
    # The handler is C's own `pause`: it needs no interpreter and does not return. This
    # thread has the interpreter, so none that is halted has it.
    libc.signal(int(number), libc.pause)
    for thread in list(busy):
        signal.pthread_kill(thread, number)
