"""The processes behind `%mesh`: a controller of ipyparallel and an engine per rank.

They end with this process.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Protocol

from attrs import frozen
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from pmod._errors import PmodError, phrase
from pmod._ranks.world import PLACE
from pmod._wire.board import Board
from pmod.notebook import rank as on_rank

_LOOPBACK = "127.0.0.1"
# seconds: 64 engines may import torch from a slow file system
_START = 300.0
# seconds that processes have to end when asked to: Jupyter gives the notebook itself
# little more
_OBEY = 1.0

# Both programs run the files of this name in their profile folder when they start.
# Their parent is the notebook. If it is killed they get another parent, and then leave,
# with the processes that they have started.
_WITH_PARENT = """
import os, shutil, signal, threading, time

def _end_with(parent, folder):
    while os.getppid() == parent:
        time.sleep(0.5)
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)

threading.Thread(target=_end_with, args=(os.getppid(), os.path.dirname(__file__)), daemon=True).start()
"""
_CONFIGURATION = {
    "ipcontroller_config.py": _WITH_PARENT,
    # an engine that says that it is there has imported pmod and torch already
    "ipengine_config.py": f"{_WITH_PARENT}\nimport pmod.notebook\n",
}


class Call(Protocol):
    """A call that was started on an engine: ipyparallel's AsyncResult has no types."""

    @property
    def metadata(self) -> Mapping[str, Any]: ...
    def ready(self) -> bool: ...
    def wait(self, timeout: float) -> bool: ...
    def wait_for_output(self, timeout: float) -> object: ...
    def get(self, timeout: float | None = None) -> Any: ...
    def exception(self, timeout: float) -> Any: ...


def _client(file: Path) -> Any:
    return importlib.import_module("ipyparallel").Client(str(file))


def check_installed() -> None:
    """Raise PmodError, which names the extra, if ipyparallel is not installed."""
    if importlib.util.find_spec("ipyparallel") is None:
        given = "%mesh needs ipyparallel, which is not installed"
        right = (
            'Install the extra: pip install "pmod[notebook]". '
            "Without %mesh, cells run in this process."
        )
        raise PmodError(phrase("notebook", given, right))


@frozen
class Engine:
    """One process that runs the cells of a rank; `view` sends to it."""

    process: subprocess.Popen[bytes]
    view: Any

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def death(self) -> str:
        """Return how it died, for a message."""
        code = self.process.returncode
        who = f"its engine, process {self.process.pid},"
        if code >= 0:
            return f"{who} left with exit code {code}"
        text = f"{who} was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            text += ", as the system does where memory is short"
        return text

    def kill(self) -> None:
        """End it, and the processes that it has started."""
        _kill(self.process)

    def call(self, f: Callable[..., object], *args: object) -> Call:
        """Start f(*args) there, after what was sent before."""
        return self.view.apply_async(f, *args)


class Engines:
    """The controller, the engines, and the stores at which the ranks meet.

    The engines are in the order of the ranks. There may be more of them than ranks.
    """

    def __init__(self) -> None:
        check_installed()
        self.ranks: list[Engine] = []
        # all of them: ranks that were cut off may hold on to an earlier one
        self._stores: list[TCPStore] = []
        self._count = 0
        # a profile of its own: another key and other ports, so that the user's own
        # clusters are not touched
        self._folder = Path(tempfile.mkdtemp(prefix="pmod-notebook-"))
        atexit.register(self.end)
        for name, text in _CONFIGURATION.items():
            (self._folder / name).write_text(text)
        try:
            self._controller = self._spawn(
                "controller",
                f"--ip={_LOOPBACK}",
                f"--location={_LOOPBACK}",
                "--IPController.use_threads=True",
                "--IPController.broadcast_scheduler_depth=0",
                "--nodb",
            )
            security = self._folder / "security"
            client = security / "ipcontroller-client.json"
            engine = security / "ipcontroller-engine.json"
            self._until(
                lambda: _is_written(client) and _is_written(engine),
                [self._controller],
                "its controller did not start",
            )
            self._client = _client(client)
        except BaseException:
            self.end()
            raise

    def _spawn(self, program: str, *options: str) -> subprocess.Popen[bytes]:
        # engines import what the notebook does, also from where it was started
        paths = [path or os.getcwd() for path in sys.path]
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
        command = [
            sys.executable,
            "-m",
            f"ipyparallel.{program}",
            f"--profile-dir={self._folder}",
            *options,
        ]
        with (self._folder / f"{program}.log").open("ab") as log:
            # a session of its own: Ctrl-C of a terminal, and Jupyter's stop button,
            # would reach the whole group of processes, and a cell stops only its ranks
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def _until(
        self,
        done: Callable[[], bool],
        processes: Sequence[subprocess.Popen[bytes]],
        given: str,
    ) -> None:
        until = monotonic() + _START
        while not done():
            dead = any(process.poll() is not None for process in processes)
            if dead or monotonic() > until:
                logs = sorted(self._folder.glob("*.log"))
                last = "\n".join(path.read_text()[-2000:] for path in logs)
                right = f"What was logged last:\n{last}"
                raise PmodError(phrase("notebook", given, right))
            sleep(0.02)

    def start(self, places: Sequence[int], tell: Callable[[int], None]) -> None:
        """Start engines for these ranks, new ones or in the place of dead ones.

        `tell` is told how many are there.
        """
        # a number is not used twice: ipyparallel may still know a dead engine by it
        first = self._count
        self._count += len(places)
        numbers = list(range(first, self._count))
        options = (
            "--IPEngine.enable_nanny=False",
            "--IPEngine.wait_for_url_file=60",
            "--IPEngine.timeout=60",
        )
        processes: list[subprocess.Popen[bytes]] = []

        def all_there() -> bool:
            there = sum(number in self._client.ids for number in numbers)
            tell(there)
            return there == len(numbers)

        try:
            for number in numbers:
                processes.append(
                    self._spawn("engine", f"--IPEngine.id={number}", *options)
                )
            self._until(all_there, processes, "an engine did not start")
        except BaseException:
            _end(processes)
            raise
        for place, number, process in zip(places, numbers, processes, strict=True):
            engine = Engine(process, self._client[number])
            if place < len(self.ranks):
                self.ranks[place] = engine
            else:
                self.ranks.append(engine)

    def activate(self, size: int) -> None:
        """Let `%px` and `%%px` of ipyparallel run on the first `size` ranks."""
        view = self._client[[engine.view.targets for engine in self.ranks[:size]]]
        view.block = True
        view.activate()

    def connect(self, axes: dict[str, int], size: int) -> Board:
        """Connect the first `size` ranks anew and set the mesh there.

        Returns what they will say of their waits. They meet at a store that this process
        serves, so that it outlives every engine. It is a new one each time, because the
        keys of one that was in use when ranks were cut off would mislead.
        """
        listener = socket.create_server((_LOOPBACK, 0), backlog=max(128, size))
        port = listener.getsockname()[1]
        store = TCPStore(
            _LOOPBACK,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        self._stores.append(store)
        engines = self.ranks[:size]
        calls: list[Call] = []
        try:
            for rank, engine in enumerate(engines):
                calls.append(engine.call(on_rank.enter, rank, size, port, axes))
            self.gather(engines, calls)
        except BaseException:
            # otherwise they might wait for one another until the deadline
            _end([engine.process for engine in engines])
            raise
        return Board(_as_on_ranks(store))

    def gather(self, engines: Sequence[Engine], calls: Sequence[Call]) -> list[Any]:
        """Return what the calls returned; raise an error if an engine has died."""
        for engine, call in zip(engines, calls, strict=True):
            while not call.wait(0.05):
                if not engine.is_alive:
                    right = "Run the cell again: a new one is started."
                    raise PmodError(phrase("notebook", engine.death(), right))
        results = [call.get() for call in calls]
        self.forget(calls)
        return results

    def forget(self, calls: Sequence[Call]) -> None:
        """Let go of what these calls brought: ipyparallel's client would keep it."""
        self._client.purge_local_results(list(calls))

    def end(self) -> None:
        """End all processes, and remove what they wrote."""
        atexit.unregister(self.end)
        processes = [engine.process for engine in self.ranks]
        # one or both are missing if the start failed
        if hasattr(self, "_client"):
            self._client.close(linger=0)
        if hasattr(self, "_controller"):
            processes.append(self._controller)
        _end(processes)
        self.ranks = []
        shutil.rmtree(self._folder, ignore_errors=True)


def _is_written(file: Path) -> bool:
    try:
        return bool(json.loads(file.read_text()))
    # it is not there yet, or only half of it
    except (OSError, ValueError):
        return False


def _as_on_ranks(store: TCPStore) -> Store:
    """Return the part of the store where the ranks write, as to their world's store.

    It lies below a prefix that torch chose.
    """
    end = PLACE.format(0)
    for key in store.list_keys():
        if key.endswith(end):
            return PrefixStore(key.removesuffix(f"/{end}"), store)
    # a rank that is alone writes nothing: it never waits
    return store


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    until = monotonic() + _OBEY
    for process in processes:
        try:
            process.wait(max(0.0, until - monotonic()))
        except subprocess.TimeoutExpired:
            _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        # it leads a group of its own, in which are the processes that it started
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
