"""Ranks that never come, die or are interrupted: who waits hears of it in time, by name, and can begin anew."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

import pmod
from pmod._ranks import connect as _connect
from pmod._ranks import meeting, world
from pmod._ranks.meeting import Meeting, process_state
from pmod._wire import board as _board
from pmod._wire import waiting
from pmod._wire.board import LEFT, WAITS, Post, Said
from tests.lib import spmd
from tests.lib.started import free_ports

ROOT = Path(pmod.__file__).parents[1]
Tensor = torch.Tensor


def small() -> Tensor:
    return torch.ones(4)


CALLS: dict[str, Callable[[], Any]] = {
    "psum": lambda: pmod.psum(small(), "data"),
    "all_gather": lambda: pmod.all_gather(small(), "data"),
    "pshift": lambda: pmod.pshift(small(), "data"),
    "barrier": lambda: pmod.barrier("data"),
    "start": lambda: pmod.start(pmod.psum, small(), "data").wait(),
    "backward": lambda: pmod.pvary(small().requires_grad_(), "data").sum().backward(),
}


def me() -> int:
    return pmod.current_mesh().topology.rank


# --- deadlines ------------------------------------------------------------------------------------------------------


def without_rank_2(name: str) -> tuple[float, str]:
    """Ranks 0 and 1 call, rank 2 does not; then all begin anew."""
    topology = pmod.current_mesh().topology
    CALLS["barrier"]()  # connected: the deadline below is too short for ranks that are just beginning
    with pmod.set_mesh(pmod.make_mesh(data=3, timeout=2.0)):
        spmd.meet(3)
        CALLS[name]()
        spmd.meet(3)
        began, text = time.monotonic(), ""
        if me() != 2:
            with pytest.raises(pmod.CollectiveTimeout) as caught:
                CALLS[name]()
            text = str(caught.value)
        seconds = time.monotonic() - began
        spmd.meet(3)  # until then rank 2 lives, elsewhere
    pmod.shutdown()
    again = pmod.make_mesh(data=3, topology=topology)
    assert pmod.psum(torch.tensor(1), again["data"]).item() == 3
    return seconds, text


@pytest.mark.parametrize("name", CALLS)
def test_a_rank_that_never_comes_is_named(name: str) -> None:
    found = spmd.launch(without_rank_2, name, data=3)
    for rank, (seconds, text) in enumerate(found[:2]):
        function = {"backward": "psum in backward", "start": "psum"}.get(name, name)
        first, called, *_ = text.split("\n")
        assert first == (
            f"pmod.{function}(axis='data') at (data={rank}): not all ranks came within 2 s. Missing: rank 2 (data=2)."
        )
        assert called.startswith("Called at ") and "test_waiting.py:" in called
        assert seconds > 1.9


def elsewhere() -> str:
    pmod.barrier(("a", "b"))  # connected, as above
    with pmod.set_mesh(pmod.make_mesh(a=2, b=2, timeout=3.0)):
        pmod.psum(small(), ("a", "b"))
        axis = "a" if me() in (0, 3) else "b"
        spmd.meet(4)
        with pytest.raises(pmod.CollectiveTimeout) as caught:
            pmod.psum(small(), axis)  # the one line
    pmod.shutdown()
    return str(caught.value)


def test_who_waits_elsewhere_is_told_where() -> None:
    for rank, text in enumerate(spmd.launch(elsewhere, a=2, b=2)):
        other = {0: 2, 1: 0, 2: 3, 3: 1}[rank]
        coords = f"(a={other // 2}, b={other % 2})"
        assert f"rank {other} {coords}: it " in text, text
        assert "in psum at" in text.split("Missing")[1] and "# the one line" in text


def late() -> float:
    """A rank that comes within the deadline is waited for; nothing is left on the board."""
    topology = pmod.current_mesh().topology
    pmod.shutdown()  # on this board functions have returned, and said so
    with pmod.set_mesh(pmod.make_mesh(data=3, timeout=spmd.LONG, topology=topology)):
        CALLS["psum"]()
        if me() == 1:
            time.sleep(2.5)
        total = CALLS["psum"]()[0].item()
        CALLS["barrier"]()
        board = _board.board()
        assert board is not None and board.read([0, 1, 2]) == {} and not board.somebody_left()
        spmd.meet(3)  # a rank that returns says so on the board
    return total


def test_a_late_rank_is_waited_for() -> None:
    assert spmd.launch(late, data=3) == [3.0] * 3


class Slow:
    """A work that is over when the test says so."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def is_completed(self) -> bool:
        return self.over.is_set()

    def wait(self, timeout: timedelta | None = None, /) -> None:
        if not self.over.wait(0.05):
            raise RuntimeError("not yet")


def two_long_waits_of_one_call() -> list[list[int]]:
    """A large sum waits twice; each time the board says so, and nothing is left on it."""
    with pmod.set_mesh(pmod.make_mesh(data=2, timeout=spmd.LONG)):
        CALLS["barrier"]()
        wait = waiting.Wait(pmod.current_mesh().bind("data", "test"), Said("psum", 1))
        board, seen = _board.board(), list[list[int]]()
        assert board is not None
        for _ in range(2):
            work = Slow()
            thread = threading.Thread(target=wait.until_done, args=(work,))
            thread.start()
            while not board.read([me()]):
                time.sleep(0.01)
            seen.append([rank for rank in board.read([me()]) if rank == me()])
            work.over.set()
            thread.join()
            seen.append(list(board.read([me()])))
        CALLS["barrier"]()
    return seen


def test_each_wait_of_a_call_is_told() -> None:
    for rank, seen in enumerate(spmd.launch(two_long_waits_of_one_call, data=2)):
        assert seen == [[rank], [], [rank], []]


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------


def is_waiting() -> bool:
    """Whether the main thread stands in the wait for a message."""
    main = threading.main_thread().ident
    assert main is not None
    frame = sys._current_frames()[main]
    while frame is not None and frame.f_code is not waiting._done_soon.__code__:
        frame = frame.f_back
    return frame is not None


def interrupted(name: str) -> None:
    """Rank 0 is interrupted while it waits, and sends no more along these ranks: whether the others complete with what
    is on its way, as here, or take a later message for it, it cannot know. Then all begin anew."""
    size = pmod.current_mesh().size
    with pmod.set_mesh(pmod.make_mesh(data=size, timeout=spmd.LONG)):
        CALLS[name]()
        if me() != 0:
            spmd.meet(size)  # nothing but the interrupt ends the wait of rank 0
            CALLS[name]()
            spmd.meet(size)
        else:
            before = signal.signal(signal.SIGINT, signal.default_int_handler)

            def press() -> None:
                while not is_waiting():
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGINT)

            threading.Thread(target=press).start()
            try:
                with pytest.raises(KeyboardInterrupt):
                    CALLS[name]()
            finally:
                signal.signal(signal.SIGINT, before)
            spmd.meet(size)
            spmd.meet(size)
            with pytest.raises(pmod.MismatchError, match="an earlier call along these ranks was cut off"):
                CALLS[name]()
    pmod.shutdown()
    assert pmod.psum(1, pmod.make_mesh(data=size)["data"]) == size


@pytest.mark.parametrize(("name", "size"), [("psum", 2), ("psum", 3), ("all_gather", 3), ("backward", 2)])
def test_ctrl_c_ends_a_wait_at_once(name: str, size: int) -> None:
    spmd.launch(interrupted, name, data=size)


# --- death ----------------------------------------------------------------------------------------------------------

SCRIPT = """
    import os, signal, sys, threading, time
    import torch
    import pmod

    def connect(rank, size, port):
        place = pmod.Topology(rank=rank, world_size=size, master_addr="127.0.0.1", master_port=port)
        return pmod.make_mesh(data=size, topology=place, timeout=300)

    rank, victim, *ports = map(int, sys.argv[1:])
    mesh = connect(rank, 3, ports[0])
    x = torch.ones(100_000)
    with pmod.set_mesh(mesh):
        pmod.psum(x, "data")
        if rank == victim:
            threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        began = time.monotonic()
        try:
            while time.monotonic() < began + 200:
                pmod.psum(x, "data")
                began = time.monotonic() if time.monotonic() < began + 0.4 else began
        except pmod.CollectiveTimeout as error:
            print(f"{time.monotonic() - began:.2f}", str(error).replace(chr(10), " "), flush=True)
    pmod.shutdown()
    others = [other for other in range(3) if other != victim]
    with pmod.set_mesh(connect(others.index(rank), 2, ports[1])):
        print(pmod.psum(1, "data"), flush=True)
"""


@pytest.mark.launchers
@pytest.mark.parametrize("victim", [0, 2], ids=["that serves the store", "another"])
def test_a_killed_rank_is_named_and_the_others_go_on(victim: int) -> None:
    ports = [str(port) for port in free_ports(2)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SCRIPT), str(rank), str(victim), *ports],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    try:
        ended = [rank.communicate(timeout=spmd.LONG) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[victim].returncode == -signal.SIGKILL
    for rank in {0, 1, 2} - {victim}:
        assert ranks[rank].returncode == 0, ended[rank][1]
        first, total = ended[rank][0].splitlines()
        seconds, _, text = first.partition(" ")
        assert float(seconds) < 5.0 and total == "2"
        assert text.startswith(f"pmod.psum(axis='data') at (data={rank}): "), text
        assert f"rank {victim} (data={victim})" in text
        assert f"its process {ranks[victim].pid} on {socket.gethostname()} is dead" in text


def test_a_dead_process_is_seen() -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        assert _board._is_alive(process.pid)
        process.kill()
        deadline = time.monotonic() + spmd.LONG
        while _board._is_alive(process.pid) and time.monotonic() < deadline:  # before anybody waits for it
            time.sleep(0.01)
        assert not _board._is_alive(process.pid)
    finally:
        process.wait()
    assert not _board._is_alive(process.pid)


# --- meeting --------------------------------------------------------------------------------------------------------


def place(rank: int, port: int) -> pmod.Topology:
    return pmod.Topology(rank=rank, world_size=2, master_addr="127.0.0.1", master_port=port)


@pytest.mark.parametrize("launcher", ["env", "slurm"])  # torch listens, pmod does
def test_a_port_that_is_taken(launcher: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        where = attrs.evolve(place(0, port), launcher=launcher)
        with pytest.raises(pmod.TopologyError) as caught:
            pmod.make_mesh(data=2, topology=where, timeout=2).group("data")
    assert str(caught.value) == (
        f"pmod.make_mesh: port {port} of 127.0.0.1 is taken, perhaps by another job.\n"
        "Set MASTER_PORT to a free port, the same on every rank."
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_store_of_one_host_listens_on_loopback_only() -> None:
    (port,) = free_ports(1)
    try:
        _connect._store_of_job(place(0, port), timedelta(seconds=20))
        tables = [Path(f"/proc/net/{table}").read_text().splitlines()[1:] for table in ("tcp", "tcp6")]
        listening = [line.split()[1] for lines in tables for line in lines if line.split()[3] == "0A"]
        assert [local for local in listening if local.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
    finally:
        world.processes().stores.pop(("127.0.0.1", port), None)


@pytest.mark.parametrize(
    ("rank", "given"),
    [(0, "not all 2 ranks came within 1 s; absent: rank 1"),
     (1, "rank 0 did not come to 127.0.0.1:{} within 1 s")],
)  # fmt: skip
def test_nobody_comes_to_the_store(rank: int, given: str) -> None:
    (port,) = free_ports(1)
    with pytest.raises(pmod.CollectiveTimeout) as caught:
        pmod.make_mesh(data=2, topology=place(rank, port), timeout=1).group("data")
    assert str(caught.value).split("\n")[0] == f"pmod.make_mesh: {given.format(port)}."


def test_another_job_at_the_same_port_stays_a_stranger() -> None:
    """Its rank 1 finds the store of the first job, and must not be taken for that one's."""
    (port,) = free_ports(1)
    places = [attrs.evolve(place(rank, port), job=job) for rank, job in enumerate(["first", "second"])]
    stores: dict[str, Any] = {}

    def connect(where: pmod.Topology) -> None:
        stores[where.job] = _connect._store_of_job(where, timedelta(seconds=20))

    threads = [threading.Thread(target=connect, args=(where,)) for where in places]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stores["first"].set("address of rank 0", "here")
        assert stores["first"].check(["address of rank 0"])
        assert not stores["second"].check(["address of rank 0"])
    finally:
        world.processes().stores.pop(("127.0.0.1", port), None)


def attempt(store: Any, ranks: Sequence[int], seconds: float = 20.0, late: int | None = None) -> list[str]:
    """What ranks of three agree on, each a thread; one of them may be late."""
    names: dict[int, str] = {}

    def start(rank: int) -> None:
        time.sleep(0.3 if rank == late else 0.0)
        where = pmod.Topology(rank=rank, world_size=3, launcher="env")
        try:
            names[rank] = Meeting(store, where, world.processes().met).come(seconds)
        except pmod.CollectiveTimeout as error:
            names[rank] = str(error)

    threads = [threading.Thread(target=start, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [names[rank] for rank in ranks]


def test_an_attempt_has_a_name_that_no_earlier_one_knows() -> None:
    store = _connect.HashStore()
    (first,) = set(attempt(store, (0, 1, 2)))
    for late in (0, 1, 2, None):  # the others find what an earlier attempt of this rank wrote
        (name,) = set(attempt(store, (0, 1, 2), late=late))
        assert name != first
        first = name
    # rank 0 tells who has agreed to what it proposes; without a proposal nobody knows whose word is an old one
    for came, absent in (((0, 1), "rank 2"), ((1, 2), None)):
        for said in attempt(store, came, seconds=0.5):
            assert said.startswith("pmod.make_mesh: not all 3 ranks came within 0.5 s; absent: ")
            assert absent is None or said.split("\n")[0].endswith(f"absent: {absent}.")
    (name,) = set(attempt(store, (0, 1, 2), late=2))
    assert len(name) == 40 and name != first


def logged() -> list[str]:
    """What make_mesh writes into the log when it connects, and when it is called again."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log = logging.getLogger("pmod")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        pmod.shutdown()
        for _ in range(2):
            pmod.make_mesh(data=2, model=1)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    return lines


def test_one_line_in_the_log_of_rank_0() -> None:
    first, second = spmd.launch(logged, data=2)
    assert second == []
    (line,) = first
    assert re.fullmatch(
        r"2 ranks on 1 node, started by launch, met at 127\.0\.0\.1:[0-9]+: backend \S+, device \S+, "
        r"mesh data=2, model=1", line,
    )  # fmt: skip


def test_one_process_says_so_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pmod"):
        pmod.make_mesh(data=1)
    assert re.fullmatch("1 rank on 1 node, started by .*: backend .*, device .*, mesh data=1", caplog.messages[-1])


# --- the parts ------------------------------------------------------------------------------------------------------


def test_a_post_is_read_as_it_was_written() -> None:
    post = Post(WAITS, "0:4:1#7", (0, 1, 2, 3), "psum at train.py:3: pmod.psum(x, 'data')")
    assert Post.of(post.text()) == post


def test_what_an_error_says_of_the_absent() -> None:
    posts = {1: Post(WAITS, "m", (0, 1), "pmax at a.py:1"), 2: Post(LEFT, "m", (2, 3), "pmin at b.py:2")}
    assert _board.not_here([1, 3], posts, {}, 5.0) == (
        "not all ranks came within 5 s. Missing: rank 1: it waits in pmax at a.py:1; rank 3"
    )
    # one that is only late is no news beside those that will not arrive
    assert _board.not_here([1, 2, 3], posts, {3: "process 9 on n is dead"}, 5.0) == (
        "some ranks will not arrive. Missing: rank 2: it raised in pmin at b.py:2; rank 3: its process 9 on n is dead"
    )
    assert _board.not_here([3], {}, {}, 5.0, broken=True) == "a connection failed. Missing: rank 3"
    here = "Every rank reported that it is here, so a network connection is broken or slow"
    assert _board.not_here([], {}, {}, 5.0) == f"the call was not over within 5 s. {here}"
    assert _board.not_here([], {}, {}, 5.0, broken=True) == f"a connection failed. {here}"


def test_a_blocking_call_in_a_thread() -> None:
    go = threading.Event()
    job = waiting.InThread(lambda: go.wait(10) and None)
    with pytest.raises(RuntimeError, match="not done yet"):
        job.wait(timedelta(seconds=0.01))
    assert not job.is_completed()
    go.set()
    job.wait()
    assert job.is_completed()
    failing = waiting.InThread(lambda: [][0])
    with pytest.raises(IndexError):
        failing.wait()
    before = threading.active_count()
    for _ in range(5):
        waiting.InThread(lambda: None).wait()
    assert threading.active_count() == before  # threads are used again


def test_a_group_with_a_message_in_it_is_never_ended() -> None:
    group = object()
    count = sys.getrefcount(group)
    for _ in range(2):
        world.leave_behind(group)  # type: ignore[arg-type]
    assert sys.getrefcount(group) == count + 2  # the set's, and one for good
    world.processes().left_behind.discard(group)  # type: ignore[arg-type]


# --- groups that are never ended, and ends that wait for nobody -----------------------------------------------------


class Unending:
    """A group whose end does not come."""

    def __init__(self) -> None:
        self.asked, self.go = threading.Event(), threading.Event()

    def __del__(self) -> None:
        self.asked.set()
        self.go.wait()


def test_a_group_that_does_not_end_is_waited_for_no_longer_than_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_connect, "_take_out", lambda groups, whole_world: None)
    monkeypatch.setattr(_connect, "_PATIENCE", 0.2)
    monkeypatch.setattr(world, "end_without_destructors", lambda: None)
    group = Unending()
    asked, go = group.asked, group.go
    groups: list[Any] = [group]
    del group
    try:
        _connect._end(groups, whole_world=True)
        assert asked.is_set() and not groups
    finally:
        go.set()


def test_what_somebody_else_holds_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_connect, "_take_out", lambda groups, whole_world: None)
    left: list[Any] = []
    monkeypatch.setattr(_connect, "leave_behind", left.append)
    held, other = Unending(), Unending()
    held.go.set()
    other.go.set()
    asked = other.asked
    groups: list[Any] = [held, other]
    del other
    _connect._end(groups, whole_world=True)
    assert left == [held] and not held.asked.is_set() and asked.is_set()


def broken_by_a_leaver() -> list[bool]:
    """Rank 1 goes; what rank 0 waits for fails at once, and is over."""
    topology = pmod.current_mesh().topology
    found: list[bool] = []
    with pmod.set_mesh(pmod.make_mesh(data=2, timeout=spmd.LONG)):
        CALLS["psum"]()
        CALLS["psum"]()
        if me() == 1:
            pmod.shutdown()
        else:
            group = pmod.current_mesh().group("data")
            with pytest.raises(pmod.CollectiveTimeout, match=r"rank 1 \(data=1\): it has ended its mesh"):
                CALLS["psum"]()
            found = [world.is_left_behind(group)]
    pmod.shutdown()
    assert pmod.psum(1, pmod.make_mesh(data=2, topology=topology)["data"]) == 2
    return found


def test_a_group_whose_message_has_failed_is_left_behind_though_the_message_is_over() -> None:
    assert spmd.launch(broken_by_a_leaver, data=2) == [[True], []]


BLOCKED = """
    import datetime, socket, sys, time
    import pmod
    from pmod._ranks.blocking import InThread
    from torch.distributed import TCPStore

    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach())
    pmod.make_mesh(data=1).group("data")

    class Slow:
        def __del__(self, sleep=time.sleep):
            sleep(1.0)

    slow = Slow()  # Python's end takes so long, in the midst of which the call returns
    InThread(lambda: store.wait(["what nobody writes"], datetime.timedelta(seconds=0.4)))
    time.sleep(0.1)
    sys.exit(7)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="halts threads by a real-time signal")
def test_a_call_that_returns_while_python_ends_does_not_abort_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BLOCKED)], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 7, done.stderr


# --- who is to blame ------------------------------------------------------------------------------------------------


def test_the_one_that_keeps_all_others_waiting_is_found() -> None:
    waits = Post(WAITS, "b#1", (0, 1), "psum at a.py:1")
    further = Post(WAITS, "a#1", (1, 3), "psum at b.py:2")
    posts = {0: Post(LEFT, "b#1", (0, 1), "psum at a.py:1"), 1: further}
    assert _board.roots([1], posts, {}) == {3: 1}  # 0 waits for 1, and 1 for 3, of which nothing is known
    posts[1] = further._replace(state=LEFT)
    assert _board.roots([1], posts, {1: "dead by now"}) == {3: 1}  # it raised before, because of 3
    assert _board.roots([1], {0: waits, 1: further}, {1: "dead"}) == {1: None, 3: 1}
    assert _board.roots([1], {0: waits, 1: Post(WAITS, "a#1", (0, 1), "")}, {}) == {}  # each waits for the other
    given = _board.not_here([3], posts, {}, 5.0, stopped={3: "process 9 on n is stopped"}, waiters={3: 1})
    assert given == (
        "not all ranks came within 5 s. Missing: rank 3: its process 9 on n is stopped, "
        "and rank 1 waits for it in psum at b.py:2"
    )
    given = _board.not_here([3], posts, {}, 5.0, waiters={3: 1})
    assert given.endswith(" Missing: rank 3: rank 1 waits for it in psum at b.py:2")


def test_a_rank_that_has_ended_waits_for_nobody() -> None:
    posts = {1: Post(_board.ENDED, "", (1,), "", met='{"a": 3}')}
    assert Post.of(posts[1].text()) == posts[1]
    assert _board.roots([1], posts, {}) == {1: None}
    assert _board.not_here([1], posts, {}, 5.0) == "some ranks will not arrive. Missing: rank 1: it has ended its mesh"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_stands_still_is_seen() -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert process_state(process.pid) == "T"
        told: Any = object.__new__(_board.Board)
        told._places = {1: (socket.gethostname(), process.pid), 2: ("elsewhere", process.pid)}
        assert told.stopped([1, 2, 3]) == {1: f"process {process.pid} on {socket.gethostname()} is stopped"}
        assert told.dead([1, 2, 3]) == {}
    finally:
        process.kill()
        process.wait()
    assert process_state(process.pid) == ""


def test_one_that_dies_while_the_others_come_is_named() -> None:
    process = subprocess.Popen(["sleep", "60"])
    store = _connect.HashStore()
    where = pmod.Topology(rank=0, world_size=3, local_rank=0, local_world_size=3)
    word = meeting._Word.new()
    store.set("word/1", attrs.evolve(word, pid=process.pid).text())
    process.kill()
    process.wait()
    with pytest.raises(pmod.CollectiveTimeout) as caught:
        Meeting(store, where, world.processes().met).come(60.0)
    assert str(caught.value).split("\n")[0] == (
        f"pmod.make_mesh: some ranks will not arrive; absent: rank 1, whose process {process.pid} on "
        f"{socket.gethostname()} is dead."
    )
    # one of an earlier meeting may have been started anew, and is waited for
    store.set("word/1", attrs.evolve(word, pid=process.pid, at=0.0).text())
    with pytest.raises(pmod.CollectiveTimeout, match=r"not all 3 ranks came within 0\.5 s; absent: rank 2\."):
        Meeting(store, where, world.processes().met).come(0.5)


def test_ranks_meet_though_one_of_them_has_given_up_before() -> None:
    (port,) = free_ports(1)
    seconds = timedelta(seconds=20)
    stores: dict[int, Any] = {}

    def connect(rank: int) -> None:
        stores[rank] = _connect._store(place(rank, port), seconds)[0]

    try:
        with pytest.raises(pmod.CollectiveTimeout):
            _connect._store(place(0, port), timedelta(seconds=0.2))
        threads = [threading.Thread(target=connect, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stores[0].set("said", "by rank 0")
        assert stores[1].check(["said"])
    finally:
        world.processes().stores.pop(("127.0.0.1", port), None)


def test_a_group_that_is_made_when_the_store_is_gone() -> None:
    class Gone:
        def check(self, keys: list[str]) -> bool:
            raise torch.distributed.DistNetworkError("Connection reset by peer")

    with pytest.raises(pmod.CollectiveTimeout, match="the store of the world cannot be reached, which rank 0"):
        _connect.own_connection(Gone())
