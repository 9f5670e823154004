"""The demo goes on from its checkpoint: as if nothing had happened, whatever was killed when, and under torchrun."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from unittest import mock

import attrs
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load

import pmod
from pmod.demo import fno, parallel, stored
from pmod.demo.__main__ import main
from pmod.demo.checkpoint import Checkpoints
from pmod.demo.options import Options, parse
from tests.lib import namespaces, spmd

ROOT = Path(pmod.__file__).parents[1]
SMALL = "--size 12 --train 8 --test 4 --batch 4 --channels 4 --layers 2 --modes 3 --float64 --no-serial"


def small(**changes: object) -> Options:
    return attrs.evolve(parse(SMALL.split()), **changes)


class Killed(BaseException):
    """Nothing in the program may answer to it."""


# --- nothing is lost -------------------------------------------------------------------------------------------------


def trained(options: Options, steps: int | None = None) -> tuple[torch.Tensor, dict[int, float], int] | None:
    """The curve, the errors, and how many steps were taken here; the program ends before a step after `steps`."""
    taken = count(1)

    def loss(*args: object) -> torch.Tensor:
        if next(taken) > (steps or 1000):
            raise Killed
        return plain(*args)

    plain = fno.loss
    with mock.patch.object(fno, "loss", loss):
        try:
            outcome = parallel.train(options, None)
        except Killed:
            return None
    run = None if outcome is None else outcome.run
    return None if run is None else (run.losses, run.errors, next(taken) - 1)


@pytest.mark.parametrize("axis_sizes", [{"data": 1, "space": 2}, {"data": 2, "space": 1}])
def test_a_resumed_training_is_the_undisturbed_one(tmp_path, axis_sizes):
    options = small(steps=11)
    (losses, errors, _), _ = spmd.launch(trained, options, data=1, space=2)
    kept = attrs.evolve(options, checkpoint=tmp_path / "new" / "kept", every=4)
    assert spmd.launch(trained, kept, 6, data=1, space=2) == [None, None]
    assert sorted(path.name for path in kept.checkpoint.iterdir()) == ["step-4"]
    (resumed, again, taken), _ = spmd.launch(trained, kept, **axis_sizes)  # on another mesh, too
    assert taken == 7
    exact = axis_sizes["space"] == 2
    torch.testing.assert_close(resumed, losses, rtol=0, atol=0 if exact else 1e-12)
    assert again == (errors if exact else pytest.approx(errors, rel=1e-10))
    assert sorted(path.name for path in kept.checkpoint.iterdir()) == ["step-11", "step-8"]
    (resumed, again, taken), _ = spmd.launch(trained, kept, data=1, space=2)
    assert taken == 0 and again == pytest.approx(errors, rel=1e-10)  # it was finished


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pmod.simulate(trained, small(steps=2), data=1, space=1)
    assert list(tmp_path.iterdir()) == []


class Halves(nn.Module):
    """A weight of which each rank holds some rows, and a bias that all hold."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        whole = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(pmod.shard(whole, "model"))
        self.bias = nn.Parameter(torch.full((3,), float(seed)))

    def whole(self, of: torch.Tensor) -> torch.Tensor:
        return pmod.unshard(of.detach(), "model", length=5)


def steps(model: Halves, optimizer: torch.optim.Optimizer, number: int) -> None:
    for step in range(number):
        ramp = torch.arange(15.0).view(5, 3) + step
        model.weight.grad = pmod.shard(ramp, "model")
        model.bias.grad = torch.ones(3) * step
        optimizer.step()


def held_in_halves(folder: Path, writes: bool) -> list[torch.Tensor]:
    """The whole weight, its moment, and the bias, after a checkpoint and two more steps."""
    kept = Checkpoints(folder, 1, {"what": "halves"}, {"weight": {"model": 0}})
    model = Halves(seed=1 if writes else 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1 if writes else 0.5)
    if writes:
        steps(model, optimizer, 3)
        kept.save(model, optimizer, [torch.tensor(1.0), torch.tensor(2.0)], {2: 0.5})
    else:
        curve, errors = kept.resume(model, optimizer, quiet=True)
        assert [value.item() for value in curve] == [1.0, 2.0] and errors == {2: 0.5}
    steps(model, optimizer, 2)
    assert optimizer.param_groups[0]["lr"] == 0.1
    moment = optimizer.state[model.weight]["exp_avg"]
    pmod.shutdown()  # of a world of one, which would stay
    return [model.whole(model.weight), model.whole(moment), model.bias.detach()]


def test_sharded_parameters_are_kept_shard_by_shard(tmp_path):
    first, second = spmd.launch(held_in_halves, tmp_path, True, data=1, model=2)
    for ranks in ({"data": 1, "model": 2}, {"data": 2, "model": 1}):
        for got in spmd.launch(held_in_halves, tmp_path, False, **ranks):
            for wanted, one in zip(first, got, strict=True):
                assert torch.equal(wanted, one)
    assert torch.equal(first[0], second[0]) and first[0].shape == (5, 3)


# --- a kill at any moment --------------------------------------------------------------------------------------------


@pytest.fixture
def alone():
    with pmod.set_mesh(pmod.make_mesh(data=1, space=1)):
        yield
    pmod.shutdown()


def test_a_kill_in_the_middle_of_a_write_leaves_a_checkpoint(tmp_path, alone, monkeypatch):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    kept = Checkpoints(tmp_path, 1, {})
    whole, outcomes = 1, set()

    def write(length: int) -> None:
        nn.init.constant_(model.weight, length)
        kept.save(model, optimizer, [torch.tensor(float(i)) for i in range(length)], {length: float(length)})

    def read() -> int:
        with torch.no_grad():
            model.weight.zero_()
        curve, errors = kept.resume(model, optimizer, quiet=True)
        assert [value.item() for value in curve] == list(range(len(curve)))
        assert errors == {len(curve): float(len(curve))} and (model.weight == len(curve)).all()
        return len(curve)

    write(1)
    assert read() == 1
    for moment in count(1):
        calls = count(1)

        def killing(f, calls=calls, moment=moment):
            def call(*args, **kwargs):
                if next(calls) == moment:
                    raise Killed
                return f(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for module, name in ((os, "fsync"), (os, "rename"), (os, "unlink"), (shutil, "rmtree")):
                patch.setattr(module, name, killing(getattr(module, name)))
            try:
                write(1 + moment)
                break
            except BaseException as error:  # of torch's checkpoint its own, around ours
                assert isinstance(error, Killed) or "Killed" in str(error)
        found = read()
        assert found in (whole, 1 + moment)
        outcomes.add(found == whole)
        whole = found
    assert moment > 8 and outcomes == {True, False}
    assert read() == 1 + moment
    assert {path.name for path in tmp_path.iterdir()} == {f"step-{whole}", f"step-{1 + moment}"}


# --- damage, strangers, and ranks that die ---------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path, alone):
    """A folder with the checkpoints of steps 1 and 2, of a model whose weights say which."""
    kept = Checkpoints(tmp_path / "kept", 1, {})
    for step in (1, 2):
        model, optimizer = trained_for(step)
        kept.save(model, optimizer, [torch.tensor(float(i)) for i in range(step)], {step: float(step)})
    return kept


def trained_for(step: int) -> tuple[nn.Linear, torch.optim.Optimizer]:
    model = nn.Linear(30, 20)
    nn.init.constant_(model.weight, step)
    return model, torch.optim.Adam(model.parameters(), lr=1.0 / step)


def resumed(kept: Checkpoints) -> int:
    """From which step a new model went on."""
    model, optimizer = trained_for(9)
    curve, errors = kept.resume(model, optimizer, quiet=False)
    assert errors == {len(curve): float(len(curve))} and (model.weight == len(curve)).all()
    assert optimizer.param_groups[0]["lr"] == 1.0 / len(curve)
    return len(curve)


def flip(path: Path) -> None:
    """Change a byte in the middle."""
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    path.write_bytes(held)


DAMAGE = {
    "a byte of the tensors": (lambda step: flip(step / "__0_0.distcp"), "__0_0.distcp is not as it was written"),
    "half of the tensors": (lambda step: os.truncate(step / "__0_0.distcp", 99), "__0_0.distcp is not as it was"),
    "no tensors": (lambda step: (step / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "no metadata": (lambda step: (step / ".metadata").unlink(), ".metadata is missing"),
    "a byte of the notes": (lambda step: flip(step / "training.json"), "training.json is not as it was written"),
    "half of the sums": (lambda step: os.truncate(step / "SHA256SUMS", 99), "SHA256SUMS is not as it was written"),
    "a line of the sums": (lambda step: os.truncate(step / "SHA256SUMS", 79), "SHA256SUMS is not as it was written"),
    "no sums": (lambda step: (step / "SHA256SUMS").unlink(), "No such file or directory"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(kept, capsys, what):
    hurt, said = DAMAGE[what]
    assert resumed(kept) == 2 and " is damaged: " not in capsys.readouterr().out
    hurt(kept.folder / "step-2")
    assert resumed(kept) == 1
    wrong, taken = capsys.readouterr().out.splitlines()
    assert wrong.strip().startswith("step-2 is damaged: ") and said in wrong
    assert taken == f"      1  from the checkpoint in {kept.folder}"
    kept.save(*trained_for(2), [torch.tensor(0.0), torch.tensor(1.0)], {2: 2.0})  # in place of the damaged one
    assert resumed(kept) == 2 and {path.name for path in kept.folder.iterdir()} == {"step-1", "step-2"}
    hurt(kept.folder / "step-1")
    hurt(kept.folder / "step-2")
    with pytest.raises(pmod.PmodError, match=r"is whole: step-2 is damaged: .*; step-1 is damaged: .*\nRemove these"):
        kept.resume(*trained_for(9), quiet=True)


def test_what_else_lies_in_the_folder_is_left_alone(kept):
    strays = [kept.folder / name for name in ("step-old", "step-3.bak", "writing.old", "notes")]
    for path in strays:
        path.mkdir()
    (kept.folder / "step-4").write_text("no folder")
    assert resumed(kept) == 2
    kept.save(*trained_for(3), [torch.tensor(0.0)] * 3, {3: 3.0})
    assert resumed(kept) == 3 and all(path.is_dir() for path in strays)
    assert {path.name for path in kept.folder.iterdir()} == {
        *(path.name for path in strays), "step-2", "step-3", "step-4",
    }  # fmt: skip


@pytest.mark.parametrize("part", ["", "step-2", "step-2/.metadata", "step-2/__0_0.distcp", "step-2/SHA256SUMS"])
def test_what_others_may_write_to_is_refused(kept, part, monkeypatch):
    path = kept.folder / part
    assert not path.stat().st_mode & 0o022
    for mode in (0o020, 0o002):
        path.chmod(path.stat().st_mode | mode)
        with pytest.raises(pmod.PmodError) as caught:
            kept.last()
        assert f"other users may write to {path} (its mode is" in str(caught.value)
        assert str(caught.value).endswith(f"chmod -R go-w {path}")
        path.chmod(path.stat().st_mode & ~mode)
    assert resumed(kept) == 2
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(pmod.PmodError, match=f"{kept.folder} belongs to user {user}, and .* as user {user + 1}"):
        kept.last()


def test_files_are_kept_from_others_whatever_the_umask(kept):
    before = os.umask(0)
    try:
        kept.save(*trained_for(3), [torch.tensor(0.0)] * 3, {3: 3.0})
    finally:
        os.umask(before)
    assert resumed(kept) == 3


class Runs:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_nothing_that_a_folder_or_a_message_brings_is_run(tmp_path, alone):
    ran = tmp_path / "ran"
    pickle.loads(pickle.dumps(Runs(ran)))
    assert ran.exists()
    ran.unlink()
    with pytest.raises(pickle.UnpicklingError, match=r"pathlib.* is no part of a checkpoint, and is not loaded"):
        stored._exchanged(Runs(ran), pmod.current_mesh())
    state = {"x": torch.ones(2), "y": Runs(ran)}
    folder = tmp_path / "kept"
    stored.write(state, folder)
    with pytest.raises(pmod.PmodError, match=r"rank 0 .* cannot read or write a checkpoint: .*[Ww]eights"):
        stored.read({"x": torch.zeros(2), "y": 0}, folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Runs(ran)))
    with pytest.raises(pmod.PmodError, match="is no part of a checkpoint, and is not loaded"):
        stored.read({"x": torch.zeros(2)}, folder)
    assert not ran.exists()


def full(folder: Path, victim: int) -> str:
    """What is raised where the disk of one rank is full."""
    model, optimizer = trained_for(1)
    with contextlib.ExitStack() as stack:
        if pmod.axis_index("space") == victim:
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            stack.enter_context(mock.patch.object(os, "fsync", side_effect=error))
        with pytest.raises(pmod.PmodError) as caught:
            Checkpoints(folder, 1, {}).save(model, optimizer, [torch.tensor(1.0)], {})
    return str(caught.value)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_cannot_write_is_named_on_all(tmp_path, victim):
    first, second = spmd.launch(full, tmp_path, victim, data=1, space=2)
    assert first == second
    assert f"rank {victim} (data=0, space={victim}) cannot read or write a checkpoint: " in first
    assert "No space left on device" in first and not list(tmp_path.glob("step-*"))


DYING = """
    import os, signal, sys
    from pathlib import Path
    from unittest import mock
    import torch
    import pmod
    from pmod.demo.checkpoint import Checkpoints

    folder, rank, port, victim, moment = Path(sys.argv[1]), *map(int, sys.argv[2:])
    place = pmod.Topology(rank=rank, world_size=3, master_addr="127.0.0.1", master_port=port)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    with pmod.set_mesh(pmod.make_mesh(space=3, topology=place, timeout=300)):
        kept = Checkpoints(folder, 1, {})
        pmod.barrier("space")
        kept.save(model, optimizer, [torch.tensor(1.0)], {})
        calls, fsync = [], os.fsync

        def dies(file):
            calls.append(file)
            if len(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(file)

        with mock.patch.object(os, "fsync", dies if rank == victim else fsync):
            try:
                kept.save(model, optimizer, [torch.tensor(1.0), torch.tensor(2.0)], {})
            except pmod.PmodError as error:
                print(error, flush=True)
"""


@pytest.mark.launchers
@pytest.mark.parametrize(
    ("victim", "moment"), [(1, 1), (0, 1), (0, 3)], ids=["writes", "writes and serves the store", "ends the writing"]
)
def test_a_rank_that_dies_while_it_saves_is_named(tmp_path, victim, moment):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    numbers = [[str(number) for number in (rank, port, victim, moment)] for rank in range(3)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(DYING), str(tmp_path), *given],
            env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for given in numbers
    ]  # fmt: skip
    try:
        ended = [rank.communicate(timeout=600) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[victim].returncode == -signal.SIGKILL, ended[victim]
    for rank in {0, 1, 2} - {victim}:
        said = ended[rank][0]
        assert ranks[rank].returncode == 0 and said.startswith("pmod."), ended[rank]
        assert f"rank {victim} (space={victim}): its process {ranks[victim].pid} on" in said, said
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-1"]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_something_else_is_refused(tmp_path, capsys):
    options = small(steps=2, checkpoint=tmp_path, every=1)
    spmd.launch(trained, options, data=1, space=2)
    other = f"{SMALL} --steps 2 --mesh space=2 --checkpoint {tmp_path} --channels 5 --size 13".split()
    assert main(other) == 2
    said = capsys.readouterr().err
    assert said == (
        f"pmod.demo: the checkpoint {tmp_path / 'step-2'} is of another problem or model: it has train=[8, 12, 12], "
        "test=[4, 12, 12], channels=4, this run train=[8, 13, 13], test=[4, 13, 13], channels=5.\n"
        "Pass the options of that run, or another --checkpoint folder.\n"
    )


def test_options(capsys):
    got = parse(["--checkpoint", "kept", "--every", "3"])
    assert (got.checkpoint, got.every) == (Path("kept"), 3)
    with pytest.raises(SystemExit):
        parse(["--every", "3"])
    assert "--every goes with --checkpoint" in capsys.readouterr().err


# --- under torchrun --------------------------------------------------------------------------------------------------


def workers(agent: int) -> dict[str, int]:
    """The process ids of torchrun's workers, by rank."""
    found: dict[str, int] = {}
    for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        variables = dict(v.partition("=")[::2] for v in Path(f"/proc/{pid}/environ").read_text().split("\0"))
        found[variables.get("RANK", "")] = int(pid)
    return found


def newest(folder: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in folder.glob("step-*")), default=0)


def wait_for(process: subprocess.Popen[bytes], folder: Path, step: int, deadline: float) -> float:
    """When a checkpoint of this step or a later one was there."""
    while newest(folder) < step:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return time.monotonic()


def killed_on_the_way(agents: Sequence[Sequence[str]], steps: int, tmp_path: Path) -> tuple[float, float, str]:
    """Start agents of torchrun, and kill a worker of the last one in the middle of the training.

    Seconds from the kill until the restarted job trains, seconds that the first start took, and what was printed.
    """
    folder, said = tmp_path / "kept", tmp_path / "said"
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    job = ["--max-restarts=2", "-m", "pmod.demo", *SMALL.split(), "--steps", str(steps), "--mesh", "data=1,space=2",
           "--checkpoint", str(folder), "--every", "1"]  # fmt: skip
    begun = time.monotonic()
    deadline = begun + 150
    with said.open("wb") as output:
        started = [
            subprocess.Popen([*agent, *job], cwd=tmp_path, env=environ, stdout=output, stderr=output)
            for agent in agents
        ]  # fmt: skip
    try:
        start = wait_for(started[0], folder, 1, deadline) - begun
        wait_for(started[0], folder, 20, deadline)
        os.kill(max(workers(started[-1].pid).items())[1], signal.SIGKILL)
        killed, before = time.monotonic(), newest(folder)
        took = wait_for(started[0], folder, before + 2, deadline) - killed  # the one being written may still have come
        for process in started:
            assert process.wait(timeout=deadline - time.monotonic()) == 0, said.read_text()
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()  # torchrun ends its workers
                process.wait(timeout=40)
    return took, start, said.read_text()


def check_the_curve(steps: int, folder: Path) -> None:
    """It is that of a run which nobody disturbed."""
    curve = torch.zeros(steps, dtype=torch.float64)
    with pytest.warns(UserWarning, match="assuming the intent is to load in a single process"):
        load({"curve": curve}, checkpoint_id=folder / f"step-{steps}", no_dist=True)
    (losses, _, _), _ = spmd.launch(trained, small(steps=steps), data=1, space=2)
    torch.testing.assert_close(curve, losses, rtol=1e-6, atol=0)


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the workers in /proc")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


@needs_proc
@pytest.mark.launchers
def test_a_killed_worker_costs_ten_seconds_and_no_accuracy(tmp_path):
    agent = [*TORCHRUN, "--standalone", "--nproc-per-node=2"]
    took, start, said = killed_on_the_way([agent], 120, tmp_path)
    assert f"from the checkpoint in {tmp_path / 'kept'}" in said, said
    check_the_curve(120, tmp_path / "kept")
    # 6 s of processor time a rank go into imports: where others keep the cores busy, the start took long, too
    assert took < max(10, 2 * start), f"{took:.1f} s to go on after the kill, {start:.1f} s to start"


@needs_proc
@pytest.mark.launchers
def test_a_worker_killed_on_another_host(tmp_path):
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(namespaces.two_hosts())
        except (PermissionError, FileNotFoundError) as error:
            pytest.skip(f"network namespaces are not permitted here: {error}")
        meeting = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=demo",
                   f"--rdzv-endpoint={hosts[0].address}:29400"]  # fmt: skip
        agents = [
            [*host.inside, "env", f"GLOO_SOCKET_IFNAME={host.name}", *TORCHRUN, *meeting,
             f"--rdzv-conf=is_host={int(host is hosts[0])}", f"--local-addr={host.address}"]
            for host in hosts
        ]  # fmt: skip
        _, _, said = killed_on_the_way(agents, 60, tmp_path)
    assert f"from the checkpoint in {tmp_path / 'kept'}" in said, said
    check_the_curve(60, tmp_path / "kept")
