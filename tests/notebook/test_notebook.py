"""Notebook cells on ranks: real engines, started once; the stop button, deaths, and what is left when all is over."""

from __future__ import annotations

import gc
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from jupyter_client.manager import KernelManager
from traitlets.config import Config

import pmod
from pmod import notebook as nb
from pmod._mesh import ambient
from pmod.notebook import cells, magics, rank, shown
from pmod.notebook.shown import Places

DEADLINE = 600.0  # seconds: only a hang reaches it

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(jupyter_client|ipyparallel|tornado|zmq|IPython|traitlets).*"),
    pytest.mark.filterwarnings("ignore:.*:RuntimeWarning:zmq"),
    # of the loops and sockets that the clients of ipyparallel and Jupyter leave to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def collect_what_clients_left() -> None:
    """Here, where its warnings are ignored, and not in a later test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def press_stop() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class Cell:
    """What a cell left on the screen; whoever waits for it presses the stop button once this holds of its ranks."""

    def __init__(
        self, shell: InteractiveShell, code: str, stop_when: Callable[[cells.Cell], bool] = lambda cell: False
    ) -> None:
        look, pressed = cells.Cell._look, False

        def look_and_press(cell: cells.Cell) -> None:
            nonlocal pressed
            look(cell)
            if not pressed and stop_when(cell):
                pressed = True
                press_stop()

        hangs = threading.Timer(DEADLINE, press_stop)
        hangs.start()
        with capture_output() as captured, pytest.MonkeyPatch.context() as patch:
            patch.setattr(cells.Cell, "_look", look_and_press)
            result = shell.run_cell(code)
        hangs.cancel()
        self.ok, self.error, self.value = result.success, result.error_in_exec, result.result
        self.outputs = [output.data for output in captured.outputs]
        self.text = str(captured.stdout) + str(captured.stderr)
        self.results = [data["text/plain"] for data in self.outputs]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InteractiveShell]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        config = Config(HistoryManager={"enabled": False}, InteractiveShell={"colors": "nocolor", "autocall": 0})
        shell = InteractiveShell.instance(config=config)
        try:
            yield shell
        finally:
            InteractiveShell.clear_instance()


@pytest.fixture(scope="module")
def engines(shell: InteractiveShell) -> Iterator[InteractiveShell]:
    """Two engines; tests that hurt them leave two behind."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}  # the ranks of other tests
    assert Cell(shell, "%load_ext pmod.notebook").ok
    made = Cell(shell, "%mesh data=2")
    assert made.ok, made.text
    assert repr(made.value).startswith("Mesh(data=2): 2 ranks\n") and "<table" in made.value._repr_html_()
    try:
        yield shell
    finally:
        pids = {process.pid for process in psutil.Process().children(recursive=True)} - before
        assert len(pids) >= 3 and Cell(shell, "%unload_ext pmod.notebook").ok
        assert not [pid for pid in pids if is_there(pid)]
        collect_what_clients_left()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stop button waits for the ranks however busy the machine is."""
    monkeypatch.setattr(cells, "_AT_ONCE", DEADLINE)


class Marks:
    """Files that ranks leave to say where they are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def leave(self) -> str:
        """Python that leaves this rank's."""
        return f"open(f'{self.folder}/{{me}}', 'w').close()"

    def of(self, *ranks: int) -> bool:
        return all((self.folder / str(rank)).exists() for rank in ranks)


@pytest.fixture
def marks(tmp_path: Path) -> Marks:
    return Marks(tmp_path)


@pytest.fixture
def two(engines: InteractiveShell) -> InteractiveShell:
    """The mesh and the names that the tests use, whatever the last one did."""
    session = magics._session
    assert session is not None
    if session.places.sizes != {"data": 2}:
        assert Cell(engines, "%mesh data=2").ok
    run = Cell(engines, "%%spmd\nimport os, time, torch, pmod\nme = pmod.axis_index('data')\nx = torch.ones(2) * me")
    assert run.ok, run.text
    return engines


def is_there(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pids() -> list[int]:
    assert magics._session is not None
    return [engine.process.pid for engine in magics._session.engines.ranks]


# --- what runs where ------------------------------------------------------------------------------------------------


def test_an_engine_a_rank_on_this_machine_only(two: InteractiveShell) -> None:
    run = Cell(two, "%%spmd\nos.getpid(), os.getppid(), str(pmod.current_mesh().device), os.getcwd()")
    device = str(pmod.Topology.detect({}).device.type)
    found = dict(re.findall(r"data=(\d): \((\d+), ", "\n".join(run.results)))
    assert [int(found[index]) for index in "01"] == pids()
    assert all(f"{os.getpid()}, '{device}" in text and repr(os.getcwd()) in text for text in run.results)
    assert magics._session is not None
    controller, folder = magics._session.engines._controller, magics._session.engines._folder
    for pid in [controller.pid, *pids()]:
        listening = [c.laddr.ip for c in psutil.Process(pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert set(listening) <= {"127.0.0.1"}
    assert len(re.findall(r'"key": "[0-9a-f-]{30,}"', (folder / "security/ipcontroller-client.json").read_text())) == 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_outputs_are_folded_where_they_are_equal(two: InteractiveShell) -> None:
    run = Cell(two, "%%spmd\nprint('both')\npmod.psum(x, 'data')")
    assert (run.text, run.results) == ("all │ both\n", ["tensor([1., 1.])"])
    run = Cell(two, "%%spmd\nprint('I am', me)\nprint('so')\nx")
    assert run.text.splitlines() == ["data=0 │ I am 0", "data=0 │ so", "data=1 │ I am 1", "data=1 │ so"]
    assert run.results == ["data=0: tensor([0., 0.])", "data=1: tensor([1., 1.])"]
    run = Cell(two, "%%spmd\nif me: print('only here')\nobject()")
    assert run.text == "data=1 │ only here\n" and len(run.results) == 1, "an address in memory tells nothing apart"


def test_displays_and_errors_on_stderr_are_folded_too(two: InteractiveShell) -> None:
    code = "%%spmd\nimport sys\nfrom IPython.display import HTML, display\ndisplay(HTML('<b>same</b>'))\n"
    run = Cell(two, f"{code}display(HTML(f'<b>{{me}}</b>'))\nprint('careful', file=sys.stderr)")
    pages = [data["text/html"] for data in run.outputs]
    assert pages == ["<b>same</b>", "<b>0</b>", "<b>1</b>"]
    assert run.text == "data=0:\ndata=1:\nall │ careful\n"


def test_a_figure_is_shown_once(two: InteractiveShell) -> None:
    run = Cell(two, "%%spmd\n%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([0, 1]); plt.show()")
    assert run.ok and len([data for data in run.outputs if "image/png" in data]) == 1


def test_a_cell_on_some_ranks(two: InteractiveShell) -> None:
    run = Cell(two, "%%spmd data=1\nprint(me)\nme")
    assert (run.text, run.results) == ("data=1 │ 1\n", ["1"])
    for line, wrong in {
        "dat=1": "%%spmd: no axis 'dat'; did you mean 'data'?.\nThe mesh has {'data': 2}.",
        "data=2": "%%spmd: data=2 is not on the mesh.\nIndices along it go from 0 to 1.",
        "data": "%%spmd: 'data' is not an axis.\nWrite, for example, %%spmd data=2 model=2.",
    }.items():
        refused = Cell(two, f"%%spmd {line}\nme")
        assert isinstance(refused.error, pmod.AxisError) and str(refused.error) == wrong.replace("?.", "?")


def test_a_cell_that_awaits(two: InteractiveShell, marks: Marks, patient: None) -> None:
    start = "import asyncio\ntask = asyncio.create_task(asyncio.sleep(0.3, 7))"
    assert Cell(two, f"%%spmd\n{start}\nawait asyncio.sleep(0.1, 1)").results == ["1"]
    assert Cell(two, "%%spmd\nawait task").results == ["7"], "a loop that stays, as a notebook's does"
    line = f"{marks.leave()}; await asyncio.sleep(600)"
    run = Cell(two, f"%%spmd\n{line}", stop_when=lambda cell: marks.of(0, 1))
    assert run.text.splitlines()[1:] == [f"on all ranks: was at line 1: {line}"]


def test_where_a_cell_was_is_a_line_of_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not one of Python's own, which the cell has called."""
    with pytest.raises(TypeError) as caught:
        exec(compile("\nimport os\nos.path.join(1)", "/tmp/ipykernel_1/2.py", "exec"))
    monkeypatch.setattr(sys, "last_value", caught.value, raising=False)
    failed = rank.failure()
    assert failed.at == "line 3: " and failed.lines[-1].startswith("<frozen posixpath>"), failed


def test_px_works_too(two: InteractiveShell) -> None:
    run = Cell(two, "%%px\nprint(pmod.psum(x, 'data'))")
    assert run.ok and run.text.count("tensor([1., 1.])") == 2, run.text


def test_values_are_pulled_and_pushed(two: InteractiveShell) -> None:
    assert [x.tolist() for x in nb.pull("x")] == [[0, 0], [1, 1]]
    assert nb.pull("x", dim=0).tolist() == [0, 0, 1, 1]
    nb.push({"whole": torch.arange(5), "word": "yes"})
    assert nb.pull("word") == ["yes", "yes"] and nb.pull("whole")[1].tolist() == [0, 1, 2, 3, 4]
    nb.push({"part": torch.arange(5.0).requires_grad_()}, dim=-1)
    assert [x.tolist() for x in nb.pull("part")] == [[0, 1, 2], [3, 4]]
    assert Cell(two, "%%spmd\npmod.shard(whole, 'data').equal(part.long())").results == ["True"]
    assert nb.pull("part", axis={0: "data"}).tolist() == [0, 1, 2, 3, 4]
    Cell(two, "%%spmd data=1\nmine = 1")
    with pytest.raises(NameError, match="'mine' is not defined on data=0"):
        nb.pull("mine")
    with pytest.raises(pmod.AxisError, match="no axis 'dta'; did you mean 'data'"):
        nb.pull("x", dim=0, axis="dta")
    with pytest.raises(pmod.ArgumentError, match="no dim is given"):
        nb.pull("x", axis="data")
    with pytest.raises(pmod.ArgumentError, match="word is a str"):
        nb.pull("word", dim=0)
    with pytest.raises(pmod.ArgumentError, match="word is a str"):
        nb.push({"word": "no"}, dim=0)
    with pytest.raises(pmod.ArgumentError, match=r"x has no dim 1, its shape is \(2,\)"):
        nb.pull("x", dim=1)


def test_the_cells_of_the_readme(two: InteractiveShell) -> None:
    text = (Path(pmod.__file__).parents[1] / "README.rst").read_text()
    block = re.split(r"\n(?=\S)", text.split(":name: notebook\n\n")[1])[0]
    first, second, third = (Cell(two, cell) for cell in textwrap.dedent(block).split("\n\n")[:3])
    assert first.ok and second.ok and third.ok
    assert second.text == "data=0 │ this is rank 0\ndata=1 │ this is rank 1\n"
    assert second.results == ["tensor([1., 1.])"]
    assert third.value.tolist() == [0, 0, 1, 1]


def test_nothing_is_kept_of_what_was_brought(two: InteractiveShell) -> None:
    assert magics._session is not None
    client = magics._session.engines._client
    before = len(client.results), len(client.metadata)
    Cell(two, "%%spmd\nx")
    assert [x.tolist() for x in nb.pull("x")] == [[0, 0], [1, 1]]
    nb.push({"z": 1})
    assert (len(client.results), len(client.metadata)) == before


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_one_traceback_for_all_and_the_ranks_stay_connected(two: InteractiveShell) -> None:
    Cell(two, "%%spmd\ngroup = pmod.current_mesh().group('data')")
    run = Cell(two, "%%spmd\nprint('before')\nnot_there")
    assert not run.ok and run.text.count("NameError") == 2, run.text  # its heading, and its text
    assert run.text.startswith("all │ before\n") and run.text.rstrip().endswith("raised on all ranks")
    assert Cell(two, "%%spmd\npmod.psum(x, 'data')\ngroup is pmod.current_mesh().group('data')").results == ["True"]


def test_who_waits_for_a_rank_that_raised_is_stopped(two: InteractiveShell) -> None:
    run = Cell(two, "%%spmd\nif me == 1:\n    raise ValueError('no')\ny = pmod.psum(x, 'data')")
    assert not run.ok
    assert run.text.count("ValueError: no\n\nraised at (data=1)\n") == 1 and "Traceback" in run.text
    assert "\nat (data=0): waited in pmod.psum(axis='data'), line 3: y = pmod.psum(x, 'data')\n" in run.text
    assert Cell(two, "%%spmd\npmod.psum(x, 'data')").results == ["tensor([1., 1.])"]


def test_who_waits_for_a_rank_that_is_through_is_stopped(two: InteractiveShell) -> None:
    run = Cell(two, "%%spmd\nif me == 0:\n    pmod.psum(x, 'data')")
    assert not run.ok
    assert run.text.splitlines() == [
        "at (data=0): waited in pmod.psum(axis='data'), line 2: pmod.psum(x, 'data')",
        "at (data=1): had finished the cell",
        "The waiting ranks were stopped, because a rank they waited for has already left the cell.",
    ]
    run = Cell(two, "%%spmd data=0\npmod.psum(x, 'data')")
    assert "at (data=0): waited in" in run.text


def test_a_message_that_one_rank_alone_has_sent_is_not_taken_for_the_next(two: InteractiveShell) -> None:
    """One that was started does not wait: the other rank would add its old value in the next cell."""
    begin = "pending = pmod.start(pmod.psum, torch.full((1,), 7.), 'data')"
    run = Cell(two, f"%%spmd\nif me == 1:\n    raise ValueError('no')\n{begin}")
    assert "raised at (data=1)\nat (data=0): had finished the cell" in run.text
    assert Cell(two, "%%spmd\npmod.psum(torch.full((1,), 8.), 'data')").results == ["tensor([16.])"]


def test_the_stop_button_ends_a_hung_collective(two: InteractiveShell, marks: Marks, patient: None) -> None:
    line = f"{marks.leave()}; time.sleep(600)"
    code = f"%%spmd\nif me == 1:\n    {line}\npmod.psum(x, 'data')"
    run = Cell(two, code, stop_when=lambda cell: 0 in cell.waits and marks.of(1))
    assert isinstance(run.error, KeyboardInterrupt)
    assert re.sub(r"\d+\.\d s", "0.5 s", run.text).splitlines() == [
        "Interrupted after 0.5 s.",
        "at (data=0): waited in pmod.psum(axis='data'), line 3: pmod.psum(x, 'data')",
        f"at (data=1): was at line 2: {line}",
    ]
    assert Cell(two, "%%spmd\npmod.psum(x, 'data')").results == ["tensor([1., 1.])"]


def test_the_stop_button_twice(two: InteractiveShell, marks: Marks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits any longer; the next cell sees to what still runs."""
    def again(cell: cells.Cell, seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cells.Cell, "_ask_how", again)
        code = f"%%spmd\nif me:\n    {marks.leave()}\n    time.sleep(600)\npmod.psum(x, 'data')"
        run = Cell(two, code, stop_when=lambda cell: marks.of(1))
    assert isinstance(run.error, KeyboardInterrupt)
    assert Cell(two, "%%spmd\npmod.psum(x, 'data')").results == ["tensor([1., 1.])"]


SUM = "pmod.psum(torch.ones(1), 'data')"


def test_the_stop_button_while_a_cell_is_sent(two: InteractiveShell, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt comes when a rank has the cell, and when ipyparallel has not yet said that it has."""
    assert magics._session is not None
    for last in (0, 1):
        view = magics._session.engines.ranks[last].view
        execute = view.execute

        def sent(*args: object, execute: Any = execute, **options: object) -> None:
            execute(*args, **options)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(view, "execute", sent)
            run = Cell(two, f"%%spmd\nimport torch, pmod\nif pmod.axis_index('data') == 0:\n    {SUM}")
        assert isinstance(run.error, KeyboardInterrupt)
        # at any moment: before the cell, in it, or between a kernel's messages, which lets the cell fall unanswered;
        # and on a busy machine a rank may take longer to stop than the stop button waits
        place = (
            r"waited in pmod.psum\(axis='data'\), line 3: .*|was at line [123]: .*|was at no line of the cell"
            "|was stopped|has not stopped yet, in a call that is not Python's"
        )
        before, busy = "was stopped before it began", "has not stopped yet, in a call that is not Python's"
        unsent = rf"(on all ranks|at \(data=0\)): ({before}|{busy})"
        said = rf"at \(data=0\): ({place})|on all ranks: {busy}" if last else unsent
        states = run.text.partition("Interrupted after ")[2].splitlines()[1:]  # IPython says what hit it before
        assert states and re.fullmatch(said, states[0]), run.text
        assert Cell(two, f"%%spmd\nimport torch, pmod\n{SUM}").results == ["tensor([2.])"]


def test_an_interrupt_between_messages_leaves_the_ranks_connected(
    two: InteractiveShell, marks: Marks, patient: None
) -> None:
    Cell(two, "%%spmd\ngroup = pmod.current_mesh().group('data')")
    line = f"{marks.leave()}; time.sleep(600)"
    run = Cell(two, f"%%spmd\npmod.psum(x, 'data')\n{line}", stop_when=lambda cell: marks.of(0, 1))
    assert run.text.splitlines()[1:] == [f"on all ranks: was at line 2: {line}"]
    assert Cell(two, "%%spmd\npmod.psum(x, 'data')\ngroup is pmod.current_mesh().group('data')").results == ["True"]


def test_a_rank_that_hears_no_interrupt_is_replaced(
    two: InteractiveShell, marks: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "_PATIENCE", 0.5)
    deaf = f"import signal\n    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\n    {marks.leave()}"
    before = pids()
    code = f"%%spmd\nif me == 1:\n    {deaf}\n    time.sleep(600)"
    run = Cell(two, code, stop_when=lambda cell: cell.left == [1] and marks.of(1))
    assert "at (data=0): had finished the cell\nat (data=1): has not stopped yet, in a call that is not" in run.text
    assert "The next cell waits a little for it, and then starts a new engine there" in run.text
    run = Cell(two, "%%spmd\nimport torch, pmod\npmod.psum(torch.ones(1), 'data')")
    assert run.results == ["tensor([2.])"]
    assert run.text == "(data=1) gets a new engine, without variables: the last cell did not stop there.\n"
    assert pids()[0] == before[0] and pids()[1] != before[1] and not is_there(before[1])


def test_another_mesh_keeps_the_engines(two: InteractiveShell) -> None:
    before = pids()
    assert Cell(two, "%mesh model=1").ok and pids() == before
    assert Cell(two, "%%spmd\npmod.current_mesh().shape, x").results == ["({'model': 1}, tensor([0., 0.]))"]
    assert Cell(two, "%mesh a=1 b=2").ok and pids() == before
    assert Cell(two, "%%spmd\npmod.psum(x, 'b')").results == ["tensor([1., 1.])"]
    assert repr(Cell(two, "%mesh").value).startswith("Mesh(a=1, b=2): 2 ranks\n")
    refused = Cell(two, "%mesh data=-1")
    assert "%mesh: data=-1 is not a size" in str(refused.error)
    refused = Cell(two, "%mesh data=2 timeout=40")
    assert "%mesh: 'timeout=40' is a deadline in seconds, not an axis.\nWrite, for example, %mesh" in str(refused.error)


def test_an_engine_that_is_killed_is_replaced(two: InteractiveShell) -> None:
    before = pids()
    run = Cell(two, "%%spmd\nif me == 1:\n    os.kill(os.getpid(), 9)\npmod.psum(x, 'data')")
    assert not run.ok
    first, second, third = run.text.splitlines()
    assert first.startswith(f"at (data=1): its engine, process {before[1]}, was killed by SIGKILL")
    assert second.startswith("at (data=0): CollectiveTimeout: pmod.psum(axis='data') at (data=0): some ranks will ")
    assert third == "The next cell starts a new engine there, without variables: run the cells that set them again."
    run = Cell(two, "%mesh data=3")  # one in its place, and one more
    assert run.ok and run.text.startswith("(data=1) gets a new engine, without variables: its engine, process ")
    run = Cell(two, "%%spmd\nimport pmod, torch\nprint('me' in globals())\npmod.psum(torch.ones(1), 'data')")
    assert run.text.splitlines() == ["data=0   │ True", "data=1,2 │ False"] and run.results == ["tensor([3.])"]
    assert len(pids()) == 3 and pids()[0] == before[0] and pids()[1] != before[1]


# --- a real kernel, and its end -------------------------------------------------------------------------------------


class Kernel:
    """A kernel of Jupyter, and the messages that its cells send."""

    def __init__(self) -> None:
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(env={**os.environ, "PYTHONPATH": str(Path(pmod.__file__).parents[1])})
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=DEADLINE)

    def run(self, code: str, stop_at: str = "") -> list[dict[str, Any]]:
        """Whoever sees this text in what it displays presses the stop button."""
        messages: list[dict[str, Any]] = []
        stopped = False

        def see(message: dict[str, Any]) -> None:
            nonlocal stopped
            messages.append(message)
            if stop_at and not stopped and stop_at in str(message["content"].get("data")):
                stopped = True
                self.manager.interrupt_kernel()

        self.client.execute_interactive(code, timeout=DEADLINE, output_hook=see)
        return [message["content"] for message in messages if message["content"].keys() & {"data", "text", "traceback"}]


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    kernel = Kernel()
    try:
        yield kernel
    finally:
        kernel.client.stop_channels()
        kernel.manager.shutdown_kernel(now=True)
        kernel.manager.cleanup_resources()
        collect_what_clients_left()


def test_a_kernel_shows_a_bar_is_stopped_and_takes_its_engines_along(kernel: Kernel) -> None:
    kernel.run("%load_ext pmod.notebook")
    shown = kernel.run("%mesh data=2")
    assert any("<progress" in message["data"].get("text/html", "") for message in shown if "data" in message)
    kernel.run(f"from pmod.notebook import cells; cells._AT_ONCE = {DEADLINE}")
    code = "%%spmd\nimport pmod, torch, time\nprint('here')\nif pmod.axis_index('data'): time.sleep(600)\n"
    shown = kernel.run(f"{code}pmod.psum(torch.ones(1), 'data')", stop_at="data=0 waits in psum")
    bars = [message["data"]["text/plain"] for message in shown if "data" in message]
    assert any(bar.startswith("▯▯ running: 0 of 2 ranks, ") and "all │ here" in bar for bar in bars), bars
    assert any("\ndata=0 waits in psum at line 4: pmod.psum(" in bar for bar in bars), bars
    assert re.fullmatch(r"running: 2 ranks, \d+\.\d s", bars[-1])
    (failed,) = [message for message in shown if "traceback" in message]
    assert failed["ename"] == "CellStopped" and "at (data=0): waited in pmod.psum" in "\n".join(failed["traceback"])
    assert kernel.run("%%spmd\npmod.psum(torch.ones(1), 'data')")[-1]["data"]["text/plain"] == "tensor([2.])"
    (said,) = kernel.run("from pmod.notebook import magics; print(magics._session.engines._folder)")
    folder = said["text"].strip()
    assert Path(folder).is_dir() and kernel.manager.provisioner is not None
    process = psutil.Process(kernel.manager.provisioner.pid)  # type: ignore[attr-defined]
    started = process.children(recursive=True)
    assert len(started) >= 3
    process.kill()
    _, alive = psutil.wait_procs(started, timeout=DEADLINE)
    assert not [child for child in alive if is_there(child.pid)]
    assert not Path(folder).exists(), "the key to the engines goes with them"


# --- without engines ------------------------------------------------------------------------------------------------


def test_without_a_mesh_cells_run_here(shell: InteractiveShell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(magics, "_session", None)
    before = ambient.ambient()
    Cell(shell, "%load_ext pmod.notebook")
    try:
        ambient._put(None)
        run = Cell(shell, "%%spmd\nimport pmod, torch\nx = torch.ones(1)\nprint('here')\npmod.psum(x, 'data')")
        assert re.fullmatch(r"here\nOut\[\d+\]: tensor\(\[1\.\]\)\n", run.text), run.text
        assert [x.tolist() for x in nb.pull("x")] == [[1]] and nb.pull("x", dim=0).tolist() == [1]
        nb.push({"z": 3})
        assert Cell(shell, "%%spmd data=0\nz").text.endswith(": 3\n")
        failed = Cell(shell, "%%spmd\nnot_there")
        assert not failed.ok and failed.text.count("NameError") == 2, "shown once, and the cell counts as failed"
        pmod.set_mesh(pmod.make_mesh(data=1, model=1))
        assert Cell(shell, "%%spmd model=0\npmod.psum(x, 'model')").text.endswith(": tensor([1.])\n")
        assert Cell(shell, "%mesh").value == pmod.current_mesh()
    finally:
        ambient._put(before)


def test_outside_ipython_there_are_no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(magics, "_session", None)
    monkeypatch.setattr("IPython.core.getipython.get_ipython", lambda: None)
    with pytest.raises(pmod.PmodError, match="pull and push are for a notebook"):
        nb.pull("x")


# --- names for sets of ranks ----------------------------------------------------------------------------------------

GRID = Places({"data": 2, "model": 4})


@pytest.mark.parametrize(
    ("ranks", "label"),
    [
        (range(8), "all"),
        ([0, 4], "model=0"),
        ([4, 5, 6, 7], "data=1"),
        ([1, 2, 3, 5, 6, 7], "model=1..3"),
        ([1, 3], "data=0, model=1,3"),
        ([5], "data=1, model=1"),
        ([0, 5], "(data=0, model=0) (data=1, model=1)"),
    ],
)
def test_labels(ranks: list[int], label: str) -> None:
    assert GRID.label(ranks) == label


@given(st.sets(st.integers(0, 7), min_size=1))
def test_a_label_names_these_ranks_and_no_others(ranks: set[int]) -> None:
    label = GRID.label(ranks)
    if label == "all":
        assert ranks == set(range(8))
    elif label.startswith("("):
        shown = [r for r in range(8) if pmod._errors.coordinates(GRID.coords(r)) in label]
        assert shown == sorted(ranks)[:6] and (len(ranks) <= 6 or label.endswith(f"and {len(ranks) - 6} more"))
    else:
        def values(text: str) -> set[int]:
            first, *last = map(int, text.split(".."))
            return set(range(first, last[0] + 1)) if last else {first}

        parts = dict(re.findall(r"(\w+)=([\d.,]*\d)", label))
        asked = {name: set().union(*map(values, text.split(","))) for name, text in parts.items()}
        assert ranks == {r for r in range(8) if all(GRID.coords(r)[name] in asked[name] for name in asked)}


def test_who_is_lost() -> None:
    assert cells._lost({0: (0, 1), 1: (1, 2)}, {2}) == [0, 1], "0 waits for 1, which waits for one that is gone"
    assert cells._lost({0: (0, 1), 3: (3, 4)}, {2}) == [], "they may still come"
    assert cells._lost({}, {0}) == []


def test_no_bar_where_nobody_looks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown.Bar, "AFTER", 0.0)
    monkeypatch.setattr(shown.Bar, "EVERY", 0.0)
    bar = shown.Bar(object(), "running", 4)
    bar.draw(1)
    bar.end()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((60, 20)))
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2, raising=False)
    bar = shown.Bar(object(), "running", 4)
    bar.draw(1, lambda: "data=0 waits in psum at line 1\nmore")
    bar.end()
    line = capsys.readouterr().err
    assert line.startswith("\r▮▯▯▯ running: 1 of 4 ranks, 0.0 s  data=0 waits") and line.endswith("\r\x1b[K")
    assert "more" not in line


def test_a_line_that_was_written_over_is_shown_once() -> None:
    text = shown.prefixed({0: "\r 0%\r50%\r100%\ndone\n", 1: ""}, Places({"x": 2}))
    assert text == "x=0 │ 100%\nx=0 │ done\n"


def test_the_extra_is_named_where_it_is_missing(shell: InteractiveShell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(magics, "_session", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    Cell(shell, "%load_ext pmod.notebook")
    run = Cell(shell, "%mesh data=2")
    assert isinstance(run.error, pmod.PmodError) and 'pip install "pmod[notebook]"' in str(run.error)
    loaded = "import sys; sys.modules['ipyparallel'] = None; import pmod.notebook"
    assert subprocess.run([sys.executable, "-c", loaded], check=False).returncode == 0


def test_names_of_cells_are_lines() -> None:
    assert rank.in_cell("psum at /tmp/ipykernel_12/345.py:3: f(x)") == "psum at line 3: f(x)"
    assert rank.in_cell("psum at cell 345:3: f(x)") == "psum at line 3: f(x)"
    assert rank.in_cell("/home/me/model.py:3: f(x)") == "/home/me/model.py:3: f(x)"


def test_shortened_tracebacks_keep_what_is_the_users() -> None:
    inside = f"File {Path(pmod.__file__).parent}/_wire/base.py:3, in wait\n    x"
    failure = rank.Failure((), "", "", ours=True)
    text = "\n\n".join(["Traceback\nCell In[1], line 1\n    f()", inside, inside, "AxisError: no axis"])
    outcome = cells.Outcome("raised", traceback=text, failure=failure)
    assert shown._shortened(outcome).splitlines()[-3:] == ["(2 more inside pmod)", "", "AxisError: no axis"]
    outcome.failure = rank.Failure((), "", "", ours=False)
    assert shown._shortened(outcome) == text, "a mistake of pmod's is shown whole"


def test_an_interrupt_before_the_cell_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        monkeypatch.setattr(sys, "last_value", error, raising=False)
    assert shown._state(cells.Outcome("raised", failure=rank.failure(), stopped=True)) == "was at no line of the cell"
