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
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from attrs import frozen
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from pmod._errors import PmodError, phrase
from pmod._ranks.world import PLACE
from pmod._wire.board import Board
from pmod.notebook import rank as on_rank

_LOOPBACK = "127.0.0.1"
_START = 300.0  # seconds: 64 engines that import torch on a slow file system
_OBEY = 1.0  # seconds that processes have to end when asked to: Jupyter gives the notebook itself little more

# Both programs run the files of this name in their profile folder when they start.
# Their parent is the notebook: where it is killed they get another, and leave, with the
# processes that they have started.
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
    "ipengine_config.py": f"{_WITH_PARENT}\nimport pmod.notebook\n",  # before it says that it is there
}


def _client(file: Path) -> Any:
    return importlib.import_module("ipyparallel").Client(str(file))


def check_installed() -> None:
    """Raises: PmodError that names the extra."""
    if importlib.util.find_spec("ipyparallel") is None:
        right = 'Install the extra: pip install "pmod[notebook]". Without %mesh, cells run in this process.'
        raise PmodError(
            phrase("notebook", "%mesh needs ipyparallel, which is not installed", right)
        )


@frozen
class Engine:
    """One process that runs the cells of a rank; `view` sends to it."""

    process: subprocess.Popen[bytes]
    view: Any

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def death(self) -> str:
        """How it died, for a message."""
        code = self.process.returncode
        how = (
            f"left with exit code {code}"
            if code >= 0
            else f"was killed by {signal.Signals(-code).name}"
        )
        memory = (
            ", as the system does where memory is short"
            if code == -signal.SIGKILL
            else ""
        )
        return f"its engine, process {self.process.pid}, {how}{memory}"

    def kill(self) -> None:
        """End it, and the processes that it has started."""
        _kill(self.process)

    def call(self, f: Callable[..., Any], *args: object) -> Any:
        """Start f(*args) there, after what was sent before. Returns ipyparallel's
        AsyncResult.
        """
        return self.view.apply_async(f, *args)


class Engines:
    """The controller, the engines in the order of the ranks (perhaps more than there
    are), and where the ranks meet.
    """

    def __init__(self) -> None:
        check_installed()
        self.ranks: list[Engine] = []
        self._stores: list[TCPStore] = []  # the ranks may hold on to an earlier one
        self._count = 0
        # a profile of its own: another key, other ports, and nothing of the user's own
        # clusters
        self._folder = Path(tempfile.mkdtemp(prefix="pmod-notebook-"))
        atexit.register(self.end)
        for name, text in _CONFIGURATION.items():
            (self._folder / name).write_text(text)
        try:
            options = (
                "--IPController.use_threads=True",
                "--IPController.broadcast_scheduler_depth=0",
                "--nodb",
            )
            self._controller = self._spawn(
                "controller", f"--ip={_LOOPBACK}", f"--location={_LOOPBACK}", *options
            )
            files = [
                self._folder / "security" / f"ipcontroller-{whose}.json"
                for whose in ("client", "engine")
            ]
            self._until(
                lambda: all(map(_is_written, files)),
                [self._controller],
                "its controller did not start",
            )
            self._client: Any = _client(files[0])
        except BaseException:
            self.end()
            raise

    def _spawn(self, program: str, *options: str) -> subprocess.Popen[bytes]:
        environment = dict(
            os.environ,
            PYTHONPATH=os.pathsep.join(path or os.getcwd() for path in sys.path),
        )
        command = [
            sys.executable,
            "-m",
            f"ipyparallel.{program}",
            f"--profile-dir={self._folder}",
            *options,
        ]
        with (self._folder / f"{program}.log").open("ab") as log:
            # a session of its own: Ctrl-C of a terminal, and Jupyter's stop button, go
            # to the whole group of processes
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
            if monotonic() > until or any(
                process.poll() is not None for process in processes
            ):
                logs = "\n".join(
                    path.read_text()[-2000:]
                    for path in sorted(self._folder.glob("*.log"))
                )
                raise PmodError(
                    phrase("notebook", given, f"What was logged last:\n{logs}")
                )
            sleep(0.02)

    def start(self, places: Sequence[int], tell: Callable[[int], None]) -> None:
        """Start engines for these ranks, in the place of dead ones or as new ones;
        `tell` how many are there yet.
        """
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
        """Connect the first `size` ranks anew and set the mesh there. Returns what they
        will say of their waits.

        They meet at a store that this process serves, which no death of an engine ends,
        and at a new one each time: the keys of one that was in use when ranks were cut
        off would mislead.
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
        try:
            calls = [
                engine.call(on_rank.enter, rank, size, port, axes)
                for rank, engine in enumerate(engines)
            ]
            self.gather(engines, calls)
        except BaseException:
            _end(
                [engine.process for engine in engines]
            )  # they may wait for one another until the deadline
            raise
        return Board(_as_on_ranks(store))

    def gather(self, engines: Sequence[Engine], calls: Sequence[Any]) -> list[Any]:
        """What the calls returned; raises where an engine has died."""
        for engine, call in zip(engines, calls, strict=True):
            while not call.wait(0.05):
                if not engine.is_alive:
                    raise PmodError(
                        phrase(
                            "notebook",
                            engine.death(),
                            "Run the cell again: a new one is started.",
                        )
                    )
        results = [call.get() for call in calls]
        self.forget(calls)
        return results

    def forget(self, calls: Sequence[Any]) -> None:
        """Let go of what these calls brought: ipyparallel's client keeps every result
        for ever.
        """
        self._client.purge_local_results(list(calls))

    def end(self) -> None:
        """End all processes, and remove what they wrote."""
        atexit.unregister(self.end)
        if hasattr(self, "_client"):
            self._client.close(linger=0)
        controller = [self._controller] if hasattr(self, "_controller") else []
        _end([engine.process for engine in self.ranks] + controller)
        self.ranks = []
        shutil.rmtree(self._folder, ignore_errors=True)


def _is_written(file: Path) -> bool:
    try:
        return bool(json.loads(file.read_text()))
    except (OSError, ValueError):  # not there, or half of it
        return False


def _as_on_ranks(store: TCPStore) -> Store:
    """The part of the store where the ranks write as to the store of their world: below
    a prefix that torch chose.
    """
    said = [key for key in store.list_keys() if key.endswith(PLACE.format(0))]
    return (
        PrefixStore(said[0].removesuffix(f"/{PLACE.format(0)}"), store)
        if said
        else store
    )  # nobody waits alone


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
        os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own
        process.wait()
