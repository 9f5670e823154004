"""`python -m pmod.doctor`: what it shows and does not show, what it calls wrong, and that all ranks end alike."""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import pmod
from pmod import doctor
from pmod.doctor import Row
from tests.lib import forked, spmd

ROOT = Path(pmod.__file__).parents[1]
SECRETS = {"HF_TOKEN": "hf_Vq3", "AWS_SECRET_ACCESS_KEY": "wJalr", "USER": "somebody", "SLURM_JWT": "eyJhbG",
           "MASTER_PASSWORD": "hunter2", "RANKS_KEY": "k3y"}  # fmt: skip


@pytest.fixture
def secrets(monkeypatch, tmp_path):
    """Texts that no report may show."""
    home = tmp_path / "folder-of-somebody"
    for name, value in {**SECRETS, "HOME": str(home)}.items():
        monkeypatch.setenv(name, value)
    return [*SECRETS, *SECRETS.values(), str(home)]


def check_report(said: str, secrets: list[str]) -> None:
    assert "\033" not in said
    assert [secret for secret in secrets if secret in said] == []


def test_one_process_is_all_right(capsys, secrets):
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    check_report(said, secrets)
    lines = said.splitlines()
    assert lines[0].startswith(f"pmod      {pmod.__version__} (") and lines[1] == f"torch     {torch.__version__}"
    assert "variables none of a launcher" in lines and "launcher  single" in lines
    assert "topology  1 rank on 1 node, 1 on this one; backend gloo; restarts 0" in lines
    assert re.fullmatch(r" *0 +\S+ +cpu +\(data=0\) +[0-9.]+ us +yes", lines[-3])
    assert lines[-1] == "all is right"


def test_half_a_set_of_variables_is_shown_and_called_wrong(capsys, secrets, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "node7")
    assert doctor.main([]) == 1
    said = capsys.readouterr().out
    check_report(said, secrets)
    *_, variables, wrong = said.splitlines()
    assert variables == "variables RANK='1', MASTER_ADDR='node7'"
    incomplete = "the launcher's environment is incomplete: WORLD_SIZE, MASTER_PORT are not set"
    assert wrong.startswith(f"not right: pmod.Topology.detect: {incomplete}")
    assert "Start with torchrun, or set what is missing" in wrong


def test_variables_of_every_launcher_are_shown():
    environ = {"PMOD_LAUNCHER": "slurm", "SLURM_JOB_ID": "7", "OMPI_COMM_WORLD_RANK": "2", "PMIX_NAMESPACE": "n@1"}
    assert doctor.shown_variables({**environ, **SECRETS}) == (
        "PMOD_LAUNCHER='slurm', OMPI_COMM_WORLD_RANK='2', PMIX_NAMESPACE='n@1', SLURM_JOB_ID='7'"
    )


def test_a_mesh_that_does_not_fit_is_refused(capsys):
    assert doctor.main(["--mesh", "data=-1,model=2"]) == 1
    wrong = capsys.readouterr().out.splitlines()[-1]
    given = "data=-1, model=2 need a multiple of 2 ranks, but the world has 1. Make the sizes"
    assert wrong.startswith(f"not right: pmod.make_mesh: {given}")


def test_an_error_is_one_line_without_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    frames = "Exception raised from here (/home/somebody/x.cpp:1)\nframe #0: ..."
    error = RuntimeError(f"no file\n /home/somebody/a.pt\n{frames}")
    assert doctor.one_line(error) == "no file ~/a.pt"
    assert doctor.one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    monkeypatch.setenv("HOME", "/")
    assert doctor.one_line("/a/b") == "/a/b"
    assert len(doctor.one_line("x" * 9999)) == 504


def test_colour_is_for_terminals(capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    assert doctor.main([]) == 0
    assert "\033[32mall is right" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert doctor.main([]) == 0
    assert "\033" not in capsys.readouterr().out


# --- what is called wrong --------------------------------------------------------------------------------------------


def rows(**changes: tuple[str, str]) -> list[Row]:
    """Two ranks, alike but for these."""
    usual = {"host": ("a", "a"), "pmod": ("1", "1"), "torch": ("2.13", "2.13"), **changes}
    return [Row(rank, **{name: values[rank] for name, values in usual.items()}) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, []),
        ({"gpu": ("u0", "u1")}, []),
        ({"gpu": ("u0", "u0")}, ["ranks 0 and 1 on a share a GPU. Start one rank a GPU, and"]),
        ({"torch": ("2.13", "2.12")}, ["torch is 2.13 on rank 0, 2.12 on rank 1. Install one version on all hosts."]),
        ({"pmod": ("1", "2")}, ["pmod is 1 on rank 0, 2 on rank 1. Install one version on all hosts."]),
        ({"problem": ("", "no card.")}, ["rank 1 on a: no card."]),
        ({"problem": ("x", "y"), "torch": ("1", "2")}, ["rank 0 on a: x", "rank 1 on a: y", "torch is 1"]),
    ],
)
def test_problems(changes, wrong):
    found = doctor.problems(rows(**changes))
    assert len(found) == len(wrong)
    assert all(one.startswith(start) for one, start in zip(found, wrong, strict=True))


def test_a_row_of_another_version_is_read():
    assert Row.of({"rank": 3, "torch": "2.12", "colour": "red"}) == Row(3, torch="2.12")


def test_a_gpu_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr(doctor, "_cards", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    what = "this machine has 2 GPUs, and torch sees none"
    cpu = torch.device("cpu")
    assert doctor.gpu_problem(cpu).startswith(f"{what}: torch {torch.__version__} is built without CUDA. Install")
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    assert doctor.gpu_problem(cpu).startswith(f"{what}. Check nvidia-smi: the driver may be older than CUDA 12.9")
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert doctor.gpu_problem(cpu) == ""
    monkeypatch.setattr(doctor, "_cards", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert doctor.gpu_problem(cpu) == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a torch that has no GPU")
def test_a_gpu_that_does_not_answer():
    assert doctor.gpu_problem(torch.device("cuda:0")).startswith("torch cannot use cuda:0: ")


def test_a_wait_that_is_too_long_ends_the_process(monkeypatch, capsys):
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with doctor.within(60, "never"):
        pass
    with doctor.within(0.01, "rank 1 is not there"):
        until = time.monotonic() + spmd.LONG
        while not codes and time.monotonic() < until:
            time.sleep(0.01)
    assert codes == [1] and capsys.readouterr().out == "not right: rank 1 is not there\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--mesh data", "'data' is not an axis: write data=2,model=2, each name once"),
        ("--mesh =2", "'=2' is not an axis"),
        ("--mesh data=1,data=1", "axis 'data' is given twice: write data=2,model=2, each name once"),
        ("--mesh data=2,timeout=40", "'timeout=40' is a deadline in seconds, not an axis"),
        ("--timeout 0", "0 is no time to wait"),
        ("--timeout soon", "invalid _seconds value: 'soon'"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        doctor.main(arguments.split())
    assert message in capsys.readouterr().err


# --- on ranks --------------------------------------------------------------------------------------------------------


def test_each_axis_is_tried_and_a_wrong_sum_is_seen(monkeypatch):
    def tried() -> Row:
        return doctor.try_axes(pmod.current_mesh(), torch.device("cpu"), Row(0), 60)

    for row in pmod.simulate(tried, data=2, model=2):
        assert list(row.latency) == ["data, cpu", "model, cpu"] and min(row.latency.values()) > 0
        assert row.problem == ""
    psum = pmod.psum
    monkeypatch.setattr(pmod, "psum", lambda x, axis: psum(x, axis) + (axis.axis_names == ("model",)))
    for row in pmod.simulate(tried, data=2, model=2):
        assert row.problem.startswith("psum along axis 'model' of 2 ranks on cpu gave a wrong value.")


def examined(what: str) -> tuple[int, str]:
    """Status and words of a rank, of which the second has something wrong with it."""
    place = pmod.current_mesh().topology
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(pmod.Topology, "detect", lambda: place)
        if what == "torch" and place.rank == 1:
            patch.setattr(torch, "__version__", "1.0")
        if what == "sum" and place.rank == 1:
            psum = pmod.psum
            patch.setattr(pmod, "psum", lambda x, axis: psum(x, axis) + axis.size - 1)
        return doctor.main(["--mesh", "data=1,model=-1"]), said.getvalue()


@pytest.mark.parametrize(
    ("what", "status", "last"),
    [
        ("nothing", 0, "all is right"),
        ("torch", 1, f"not right: torch is {torch.__version__} on rank 0, 1.0 on rank 1. Install one version"),
        (
            "sum",
            1,
            f"not right: rank 1 on {socket.gethostname()}: psum along axis 'model' of 2 ranks on cpu gave a wrong",
        ),
    ],
)
def test_all_ranks_end_alike_and_the_first_reports(what, status, last):
    (first, said), (second, nothing) = spmd.launch(examined, what, model=2)
    assert (first, second, nothing) == (status, status, "")
    lines = said.splitlines()
    assert lines[-1].startswith(last)
    right = "no" if what == "sum" else "yes"
    assert "mesh      data=1, model=2" in lines
    assert re.fullmatch(rf" *1 +\S+ +cpu +\(data=0, model=1\) +[0-9.]+ us +[0-9.]+ us +{right}", lines[-3])


def run(command: list[str], environ: dict[str, str]) -> tuple[int, str, str]:
    """Status, stdout and stderr of a process, which a deadline ends."""
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT), **environ}, capture_output=True, text=True,
        timeout=spmd.LONG,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_without_a_launcher_it_starts_the_ranks_of_a_mesh(secrets, tmp_path):
    done = forked.run_module("pmod.doctor", ["--mesh", "data=1,model=2"], tmp_path)
    said = done.stdout
    check_report(said, secrets)
    assert (done.returncode, done.stderr) == (0, ""), said
    assert "variables none of a launcher" in said and "launcher  launch" in said and "mesh      data=1, model=2" in said
    assert said.count("yes") == 2 and said.splitlines()[-1] == "all is right"


def test_under_torchrun(secrets):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "pmod.doctor", "--mesh", "data=2,model=1"]  # fmt: skip
    status, said, _ = run(command, {"OMP_NUM_THREADS": "1"})
    check_report(said, secrets)
    assert status == 0, said
    assert "variables RANK='0', WORLD_SIZE='2', LOCAL_RANK='0', LOCAL_WORLD_SIZE='2', GROUP_RANK='0'" in said
    assert said.count("yes") == 2 and said.splitlines()[-1] == "all is right"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes(rank, secrets, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    alone = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = forked.run_module("pmod.doctor", ["--timeout", "2"], tmp_path, **alone)
    said = done.stdout
    check_report(said, secrets)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    # whose 2 s are over first: those of the doctor, or on a busy machine those of the meeting itself
    where = rf"127\.0\.0\.1:{port} within 2 s\. "
    meeting = rf"rank 0 did not come to {where}" if rank else r"not all 2 ranks came within 2 s; absent: rank 1\. "
    reason = rf"(the 2 ranks did not connect at {where}|pmod\.make_mesh: {meeting})"
    assert re.match(rf"not right: rank {rank} of 2: {reason}", said.splitlines()[-1])
