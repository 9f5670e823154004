"""Ranks that are started as torchrun would, each a program of its own."""

# pyright: standard

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from tests.lib import spmd

ROOT = Path(__file__).parents[2]


def free_ports(count: int) -> list[int]:
    """Ports of this machine on which nobody listens now; all are held at once, so that they differ."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


def run_ranks(
    code: str, count: int, timeout: float = spmd.LONG, address: str = "127.0.0.1"
) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each rank, started as torchrun would."""
    meet = {"WORLD_SIZE": str(count), "MASTER_ADDR": address, "MASTER_PORT": str(free_ports(1)[0])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(code)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, **meet, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]  # fmt: skip
    deadline = time.monotonic() + timeout
    try:
        ended = [process.communicate(timeout=max(0.1, deadline - time.monotonic())) for process in processes]
        return [(process.returncode, out, err) for process, (out, err) in zip(processes, ended, strict=True)]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                assert pipe is not None
                pipe.close()
