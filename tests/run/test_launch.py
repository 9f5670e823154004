"""`launch` from scripts, sessions and pytest: values, failures of every kind, and that no process is left."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

import pmod
from pmod._mesh.sizes import named_coords_at
from pmod._ranks import world
from pmod._run import launch, task
from pmod._wire import waiting
from tests.lib import spmd

ROOT = Path(pmod.__file__).parents[1]


def rank() -> int:
    return pmod.current_mesh().topology.rank


def alive(pid: int) -> bool:
    """Whether the process runs; one that is dead and not yet reaped does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    try:
        return not stat.parent.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int], within: float = spmd.LONG) -> bool:
    deadline = time.monotonic() + within
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def leave_pid(folder: Path) -> None:
    (folder / "writing").mkdir(exist_ok=True)
    written = folder / "writing" / str(rank())
    written.write_text(str(os.getpid()))
    written.rename(folder / f"rank{rank()}")  # whole, from the first moment it is seen


def pids_in(folder: Path, count: int, within: float = spmd.LONG) -> list[int]:
    deadline = time.monotonic() + within
    while len(found := list(folder.glob("rank*"))) < count and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(found) == count
    return [int(path.read_text()) for path in found]


def text_of(error: BaseException) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


def report(x: torch.Tensor) -> dict[str, object]:
    mesh = pmod.current_mesh()
    here = torch.full((2,), float(rank()))
    return {
        "coords": mesh.coords,
        "over data": pmod.psum(here, "data").tolist(),
        "over model": pmod.psum(here, "model").tolist(),
        "over both": pmod.psum(here, ("data", "model")).tolist(),
        "x": x,
        "large": torch.full((1 << 20,), rank()),  # far more than a pipe holds
        "threads": torch.get_num_threads(),
        "topology": mesh.topology,
        "pid": os.getpid(),
        "daemon": multiprocessing.current_process().daemon,
    }


@pytest.mark.usefixtures("spawned")
def test_results_come_in_rank_order_from_a_mesh_of_two_axes():
    x = torch.arange(2.0)
    results = pmod.launch(report, x, data=2, model=1)
    assert [result["coords"] for result in results] == [{"data": 0, "model": 0}, {"data": 1, "model": 0}]
    assert [result["over data"] for result in results] == [[1, 1], [1, 1]]
    assert [result["over model"] for result in results] == [[0, 0], [1, 1]]
    assert [result["over both"] for result in results] == [[1, 1]] * 2
    gpus = torch.cuda.device_count()
    for number, result in enumerate(results):
        assert torch.equal(result["x"], x)
        assert result["large"].unique().tolist() == [number]
        topology = result["topology"]
        assert (topology.rank, topology.world_size, topology.local_rank) == (number, 2, number)
        assert topology.launcher == "launch" and topology.master_addr == "127.0.0.1"
        assert topology.device == torch.device(f"cuda:{number % gpus}" if gpus else "cpu")
        assert result["threads"] * 2 <= max(2, os.cpu_count() or 1)
        assert result["daemon"] is False  # so that a rank may have children, such as a DataLoader's workers
    pids = [result["pid"] for result in results]
    assert len({os.getpid(), *pids}) == 3
    assert not any(map(alive, pids))


def listening() -> set[str]:
    """The local addresses, in hex, at which this rank and the parent that serves the store listen."""
    pmod.psum(torch.ones(()), "model")
    parent = multiprocessing.parent_process()
    assert parent is not None
    sockets = {os.readlink(f) for pid in ("self", parent.pid) for f in Path(f"/proc/{pid}/fd").iterdir() if exists(f)}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                found.add(local.split(":")[0])
    return found


def exists(link: Path) -> bool:
    try:
        return bool(os.readlink(link))
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_everything_listens_on_loopback_only():
    for addresses in spmd.launch(listening, model=2):
        assert addresses == {"0100007F"}  # 127.0.0.1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "pmod.launch: no axis size is given, so it cannot say how many ranks to start.\n"
             "Name the axes, as in pmod.launch(fn, x, data=2, model=2) for 4 ranks."),
        ({"data": 0}, "pmod.launch: data=0 is not a size.\n"
                      "Sizes are ints of 1 or more; their product is the number of processes."),
        ({"data": 2, "model": -1}, "pmod.launch: model=-1 is not a size.\n"
         "Nothing here says how many ranks there are, so -1 cannot be worked out: give the size."),
        ({"data": 2.0}, "pmod.launch: data=2.0 is not a size.\n"
                        "Sizes are ints of 1 or more; their product is the number of processes."),
        ({"data": True}, "pmod.launch: data=True is not a size.\n"
                         "Sizes are ints of 1 or more; their product is the number of processes."),
        ({"data": 1, "timeout": 0}, "pmod.launch: timeout is 0.\nPass seconds, a number above 0."),
        ({"timeout": 40}, "pmod.launch: no axis size is given, so it cannot say how many ranks to start.\n"
                          "Name the axes, as in pmod.launch(fn, x, data=2, model=2) for 4 ranks."),
    ],
)  # fmt: skip
def test_sizes_that_are_none_are_refused(sizes, message):
    with pytest.raises(pmod.AxisError) as caught:
        pmod.launch(rank, **sizes)
    assert str(caught.value) == message


def waits_in_vain(over: Path) -> str:
    pmod.barrier("data")
    if rank() == 1:
        while not over.exists():
            time.sleep(0.01)
        return ""
    with pytest.raises(pmod.CollectiveTimeout) as caught:
        pmod.barrier("data")
    over.touch()
    return str(caught.value)


def test_a_timeout_is_that_of_the_mesh_and_starts_no_ranks(tmp_path):
    """It was taken for an axis: 2 x 3 ranks."""
    said = pmod.launch(waits_in_vain, tmp_path / "over", data=2, timeout=3)
    assert len(said) == 2 and "within 3 s" in said[0], said


def test_what_cannot_be_called_or_sent_is_refused():
    with pytest.raises(pmod.ArgumentError) as caught:
        pmod.launch(3, data=1)
    assert str(caught.value) == "pmod.launch: fn is 3.\nPass the function that the ranks run, then its args."
    with pytest.raises(pmod.ArgumentError, match=r"args cannot be sent to the ranks: cannot pickle '.*lock' object"):
        pmod.launch(rank, threading.Lock(), data=1)


def test_a_closure_without_cloudpickle_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(pmod.ArgumentError, match="pip install cloudpickle"):
        pmod.launch(lambda: None, data=1)


@pytest.mark.parametrize(
    ("variables", "who"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}, "rank 1 of 2, started by env"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}, "rank 0 of 4, started by openmpi"),
    ],
)  # fmt: skip
def test_under_a_launcher_it_says_what_to_do_instead(monkeypatch, variables, who):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(pmod.PmodError) as caught:
        pmod.launch(rank, data=2)
    assert str(caught.value) == (
        f"pmod.launch: this process is {who}.\n"
        "Here the ranks run already: pmod.set_mesh(pmod.make_mesh(...)), then call the function itself. "
        "launch is for a plain `python script.py` or a notebook."
    )


def launch_again() -> str:
    with pytest.raises(pmod.PmodError) as caught:
        pmod.launch(rank, data=2)
    return str(caught.value)


def test_inside_a_rank_it_refuses():
    zero, one = spmd.launch(launch_again, model=2)
    assert "a rank of a launch already (pmod rank 0)" in zero
    assert "a rank of a launch already (pmod rank 1)" in one
    assert one.endswith("Inside a rank call collectives; to have more ranks, give the outer launch larger sizes.")


class OwnError(Exception):
    def __init__(self, what: str, value: int) -> None:
        super().__init__(what, value)
        self.value = value


def fail_while_another_waits(folder: Path) -> None:
    leave_pid(folder)
    if rank() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pmod.psum(torch.ones(()), "model")
    pids_in(folder, 2)
    raise OwnError("no good", 7)


def test_a_failing_rank_brings_its_traceback_and_ends_the_others(tmp_path):
    with pytest.raises(OwnError) as caught:  # while rank 0 waits, and would do so until its deadline of 600 s
        pmod.launch(fail_while_another_waits, tmp_path, model=2)
    pids = pids_in(tmp_path, 2)
    assert gone(pids, within=0)
    assert caught.value.value == 7
    place, trace = caught.value.__notes__
    assert place == "pmod.launch at (model=1): rank 1 of 2 raised this.\n"
    assert re.search(r'test_launch.py", line \d+, in fail_while_another_waits\n +raise OwnError\("no good", 7\)', trace)
    assert trace.count("File ") == 1  # the machinery of launch is not in it


def die(how: str) -> None:
    pmod.psum(torch.ones(()), "model")
    if rank() == 1 and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank() == 1:
        time.sleep(0.1)
        os._exit(3)
    if how == "exit":
        raise RuntimeError("rank 1 is gone")  # as gloo says, and here before the parent can know
    pmod.psum(torch.ones(()), "model")


def test_messages_place_ranks_as_the_mesh_does():
    sizes = {"pod": 2, "data": 3, "model": 2}
    assert named_coords_at(0, sizes) == {"pod": 0, "data": 0, "model": 0}
    assert named_coords_at(7, sizes) == {"pod": 1, "data": 0, "model": 1}
    assert list(named_coords_at(10, sizes).items()) == [("pod", 1), ("data", 2), ("model", 0)]


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


class OtherSignature(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def fail_oddly() -> object:
    pmod.barrier("model")
    if rank() == 0:
        sys.exit(0)
    if rank() == 1:
        raise Unpicklable
    if rank() == 2:
        raise OtherSignature(1, 2)
    return (x for x in ())


def test_what_cannot_be_brought_back_as_it_is_comes_as_text(monkeypatch):
    monkeypatch.setattr(launch, "_GRACE", spmd.LONG)  # until all four have failed
    with pytest.raises(pmod.PmodError) as caught:
        pmod.launch(fail_oddly, model=4)
    text = text_of(caught.value)
    assert "SystemExit: 0" in text
    assert "Unpicklable: holds a lock" in text
    assert "OtherSignature: 1 and 2" in text
    assert "fn returned a generator, which cannot be sent back: cannot pickle 'generator' object" in text
    assert sum(note.startswith("also rank") for note in caught.value.__notes__) == 3  # whichever was the first
    assert sorted(re.findall(r"model=(\d)", text)) == ["0", "1", "2", "3"]


def returns_early(calls: int) -> str:
    """The last rank makes so many calls, the others one more. Who makes none is not connected to anybody."""
    for _ in range(calls):
        pmod.psum(1, "model")
    if pmod.axis_index("model") == pmod.axis_size("model") - 1:
        return "returned"
    with pytest.raises(pmod.CollectiveTimeout) as caught:
        pmod.psum(1, "model")
    return str(caught.value)


@pytest.mark.parametrize(("calls", "ranks"), [(0, 2), (2, 3)])
def test_a_rank_that_has_returned_is_named_long_before_the_deadline(calls, ranks):
    *waited, returned = pmod.launch(returns_early, calls, model=ranks)
    last = rf"rank {ranks - 1} (model={ranks - 1}): it has returned from the function that launch runs"
    assert returned == "returned" and len(waited) == ranks - 1
    assert all(f"some ranks will not arrive. Missing: {last}" in text for text in waited), waited


def late_for_the_next() -> int:
    """What a rank said of the end of the run before does not hold for this one."""
    waiting.LOOK = 0.1  # of this process, which ends with the test
    if pmod.axis_index("model") == 1:
        time.sleep(10 * waiting.LOOK)
    return pmod.psum(1, "model")


def test_a_rank_that_is_late_for_the_next_run_is_waited_for():
    with launch.Ranks(2) as ranks:
        for _ in range(2):
            assert ranks.run(task.Task.of(late_for_the_next, (), {"model": 2})) == [2, 2]


def number_of_run(connects: bool) -> tuple[int, int]:
    """As it is before and after the ranks connect."""
    before = world.processes().runs
    if connects:
        pmod.psum(1, "model")
    after = world.processes().runs
    pmod.shutdown()
    return before, after


def test_each_run_has_a_number_of_its_own():
    """What a rank said of its return from one run must not be taken for its return from another."""
    with launch.Ranks(2) as ranks:
        for number, connects in enumerate([True, True, False, True], 1):
            told = ranks.run(task.Task.of(number_of_run, (connects,), {"model": 2}))
            assert told == [(number, number)] * 2


def pid() -> int:
    return os.getpid()


def hang_on_one() -> None:
    if rank() == 0:
        time.sleep(2 * spmd.LONG)


def test_the_pool_stays_until_a_rank_dies_or_hangs(monkeypatch):
    monkeypatch.setattr(launch, "_GRACE", spmd.LONG)  # until both have failed
    first = spmd.launch(pid, model=2)
    assert spmd.launch(pid, data=2) == first
    ranks = spmd._pools[2]
    with pytest.raises(pmod.PmodError) as caught:
        spmd.launch(die, "exit", model=2)
    assert str(caught.value) == (
        "pmod.launch at (model=1): rank 1 of 2 ended with exit code 3.\nWhat it printed (on stderr) may say why."
    )
    assert caught.value.__notes__ == ["also rank 0 (model=0): RuntimeError: rank 1 is gone"]
    assert gone(first, within=0)
    with pytest.raises(pmod.PmodError, match=r"^pmod.launch: these ranks have ended"):
        ranks.run(task.Task.of(pid, (), {"model": 2}))

    second = spmd.launch(pid, model=2)
    assert not set(first) & set(second)
    with pytest.raises(pmod.CollectiveTimeout) as caught:
        spmd.launch(hang_on_one, model=2, timeout=5.0)
    assert str(caught.value) == "pmod.launch: no answer within 5.0 s from rank 0 (model=0)."
    assert gone(second, within=0)

    third = spmd.launch(pid, model=2)
    with pytest.raises(pmod.PmodError) as caught:
        spmd.launch(die, "kill", model=2)
    assert str(caught.value) == (
        "pmod.launch at (model=1): rank 1 of 2 was ended by SIGKILL (exit code -9).\n"
        "The system does that when memory runs out."
    )
    assert gone(third, within=0)


def warn() -> None:
    warnings.warn("to be ignored, as the test says")
    with pytest.raises(UserWarning, match="an error by pyproject"):
        warnings.warn("an error by pyproject.toml")


@pytest.mark.filterwarnings("ignore:to be ignored")
def test_a_rank_of_the_pool_treats_warnings_as_the_test_does():
    spmd.launch(warn, model=2)


# --- workers of a rank ------------------------------------------------------------------------------------------------


def asked(mesh: pmod.Mesh, batches: pmod.sampler) -> dict[str, Any]:
    """What a process says of its place, by the mesh it was sent and by one that it makes."""
    made = pmod.make_mesh(data=-1)
    rows = pmod.local_slice((8,), pmod.P("data"), mesh=mesh)[0].start
    found = {"coords": mesh.coords, "rank": mesh.topology.rank, "rows": rows, "made": made.coords,
             "index": pmod.axis_index(mesh["data"]), "batches": list(batches)}  # fmt: skip
    for name, x in {"psum": mesh, "made psum": made}.items():
        with pytest.raises(pmod.TopologyError) as raised:  # at once: no deadline is waited for, which ends otherwise
            pmod.psum(torch.ones(()), x["data"])
        found[name] = str(raised.value)
    return found


def work(mesh: pmod.Mesh, batches: pmod.sampler, pipe: Connection, below: str | None) -> None:
    found = asked(mesh, batches)
    if below is not None:
        assert ask_worker(below, mesh, batches) == found
    pipe.send(found)


def ask_worker(how: str, mesh: pmod.Mesh, batches: pmod.sampler, below: str | None = None) -> dict[str, Any]:
    context = multiprocessing.get_context(how)
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(mesh, batches, theirs, below))
    process.start()
    theirs.close()
    try:
        assert ours.poll(spmd.LONG / 2), f"no answer from a worker by {how}"
        return ours.recv()
    finally:
        process.kill()
        process.join()


def ask_workers(ways: list[tuple[str, str | None]]) -> None:
    mesh = pmod.current_mesh()
    batches = pmod.sampler(range(4), "data", shuffle=False)
    pmod.psum(torch.ones(()), "data")  # connected: the rank's own group must not be used by a worker
    index, size = mesh.axis_index("data"), mesh.size
    text = f"pmod.psum: this process works for rank {index} of {size} (as a DataLoader's worker does) and is not a rank"
    for how, below in ways:
        found = ask_worker(how, mesh, batches, below)
        texts = [found.pop(name) for name in ("psum", "made psum")]
        assert all(told.startswith(text) for told in texts), texts
        assert found == {"coords": {"data": index}, "rank": index, "rows": 4 * index, "made": {"data": index},
                         "index": index, "batches": list(batches)}  # fmt: skip
    assert pmod.psum(1, "data") == size  # and the rank goes on


@pytest.mark.parametrize("ways", [[("fork", "fork")], [("spawn", None)], [("forkserver", "spawn")]], ids=str)
def test_a_worker_stands_where_its_rank_does_and_sends_nothing(ways):
    spmd.launch(ask_workers, ways, data=2)


def test_a_worker_under_torchrun_does_the_same(tmp_path):
    code = """
        import os
        import pmod
        from tests.run.test_launch import ask_workers

        os.environ.pop("GLOO_SOCKET_IFNAME", None)
        mesh = pmod.make_mesh(data=-1)  # without a guard: a worker that is spawned runs it, too
        if __name__ == "__main__":
            pmod.set_mesh(mesh)
            ask_workers([("spawn", None), ("fork", None)])
            print("as it should be", flush=True)
    """
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run = python(*torchrun, script(tmp_path, code))
    assert run.stdout.count("as it should be") == 2, run.stderr


def in_simulated_worker() -> tuple[int | None, str]:
    ours, theirs = multiprocessing.Pipe()

    def work() -> None:
        try:
            pmod.psum(torch.ones(()), "x")
        except pmod.TopologyError as error:
            theirs.send((pmod.axis_index("x"), str(error)))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    try:
        return ours.recv() if ours.poll(20) else (None, "no answer")
    finally:
        process.kill()
        process.join()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_worker_of_a_simulated_rank():
    for rank, (index, text) in enumerate(pmod.simulate(in_simulated_worker, x=2)):
        assert index == rank and f"works for rank {rank} of 2" in text


def test_where_multiprocessing_keeps_what_children_get():
    """`_ranks/place.py` writes there. A process that is started by a plain one has no place but its own."""
    assert isinstance(multiprocessing.current_process()._config, dict)
    assert world.of_parent() is None and not world.is_no_rank()


def environment() -> dict[str, str]:
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(ROOT), *([before] if before else [])])
    return {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "nowhere"}  # ranks use loopback all the same


def python(*command: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    stdin = None if code is None else textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, *command], input=stdin, env=environment(), capture_output=True, text=True, timeout=spmd.LONG
    )


def script(folder: Path, code: str) -> str:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(code))
    return str(path)


def test_a_script_runs_the_functions_that_it_defines(tmp_path):
    path = script(
        tmp_path,
        """
        import pmod, torch

        class Point:
            def __init__(self, x): self.x = x

        class ScriptError(Exception):
            pass

        def sum_and_point(point):
            y = pmod.psum(point.x * (1 + pmod.axis_index("model")), "model")
            if pmod.axis_index("model") == 1:
                print("in rank 1")
            return Point(y.tolist())

        def fail(inner):
            raise ScriptError(inner())

        if __name__ == "__main__":
            points = pmod.launch(sum_and_point, Point(torch.ones(2)), model=2)
            print([type(point) is Point and point.x for point in points], flush=True)
            exec("def typed(): return 'typed later'")  # in __main__, but not in the file
            try:
                pmod.launch(fail, typed, model=1)
            except ScriptError as error:
                print(error)
        """,
    )
    done = python(path)
    assert done.stdout.splitlines() == ["in rank 1", "[[3.0, 3.0], [3.0, 3.0]]", "typed later"]
    assert (done.returncode, done.stderr) == (0, "")


def test_a_script_without_a_guard_is_told_to_write_one(tmp_path):
    path = script(tmp_path, "import pmod\npmod.launch(pmod.axis_size, 'model', model=1)\n")
    done = python(path)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.endswith(
        f"PmodError: pmod.launch: {path} calls launch without a guard, and the ranks, which import it, would start "
        "ranks in their turn.\n"
        'Put the call under a guard:\n\n    if __name__ == "__main__":\n        pmod.launch(...)\n'
    )


def test_a_script_that_the_ranks_cannot_import_is_named(tmp_path):
    path = script(
        tmp_path, "if __name__ != '__main__':\n    raise SystemExit(7)\nimport pmod\npmod.launch(len, data=1)\n"
    )
    done = python(path)
    assert f"rank 0 of 1 ended with exit code 7 while it was starting, importing {path}." in done.stderr


def test_a_session_runs_what_was_typed():
    pytest.importorskip("cloudpickle")
    done = python(
        "-",
        code="""
        import pmod, torch
        class Point:
            def __init__(self, x): self.x = x
        class TypedError(Exception): pass
        def double(x): return 2 * x
        def closed_over(n):
            return lambda x: Point((double(pmod.psum(x, "model")) + n).tolist())
        points = pmod.launch(closed_over(1), torch.ones(2), model=2)
        print([type(point) is Point and point.x for point in points])
        def fail(): raise TypedError("typed")
        try: pmod.launch(fail, model=1)
        except TypedError as error: print("caught", error)
        """,
    )
    assert done.stdout.splitlines() == ["[[5.0, 5.0], [5.0, 5.0]]", "caught typed"]
    assert (done.returncode, done.stderr) == (0, "")


def test_a_session_without_cloudpickle_names_it():
    done = python(
        "-c",
        "import sys; sys.modules['cloudpickle'] = None\nimport pmod\ndef f(): pass\npmod.launch(f, data=2)",
    )
    assert done.returncode == 1
    assert done.stderr.endswith(
        "ArgumentError: pmod.launch: fn or args cannot be sent to the ranks: f is defined in an interactive session.\n"
        "Define it at the top level of a module, or install cloudpickle, which carries notebook cells, lambdas and "
        "closures: pip install cloudpickle.\n"
    )


@pytest.mark.parametrize(("how", "count"), [("killed", 2), ("interrupted", 1)])
def test_no_rank_outlives_its_parent(tmp_path, how, count):
    path = script(
        tmp_path,
        """
        import pathlib, signal, sys, time
        import pmod
        from tests.run.test_launch import leave_pid

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

        def wait(folder):
            leave_pid(folder)
            try:
                time.sleep(6000)
            except KeyboardInterrupt:
                (folder / "interrupted").touch()

        if __name__ == "__main__":
            pmod.launch(wait, pathlib.Path(sys.argv[1]), model=int(sys.argv[2]))
        """,
    )
    command = [sys.executable, path, str(tmp_path), str(count)]
    parent = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        pids = pids_in(tmp_path, count)
        assert all(map(alive, pids))
        if how == "killed":
            parent.kill()
        else:
            os.kill(pids[0], signal.SIGINT)  # a terminal sends it to the parent and its ranks alike: the ranks go on
            time.sleep(0.5)
            assert alive(pids[0]) and not (tmp_path / "interrupted").exists()
            os.killpg(parent.pid, signal.SIGINT)
        _, stderr = parent.communicate(timeout=spmd.LONG)
    finally:
        parent.kill()
    assert gone(pids)
    if how == "interrupted":
        assert stderr.count("Traceback") == 1 and stderr.endswith("KeyboardInterrupt\n")
        assert parent.returncode == -signal.SIGINT
