"""`python -m module` without the seconds in which it and its ranks import torch: all are forked from one process.

For tests of what a command does and says. How its processes start is looked at elsewhere, and so is what is raised
while it imports: tests/demo/test_demo.py and `.ci/run` start the commands as users do.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from unittest import mock

from pmod._run import launch
from tests.lib import spmd

_CONTEXT: Any = multiprocessing.get_context("forkserver")


class _Inheriting:
    """Processes which begin as children do: with the streams, the folder, the environment and the warnings' filters."""

    def __init__(self, out: Path, err: Path) -> None:
        self._streams = out, err

    def Pipe(self) -> Any:
        return _CONTEXT.Pipe()

    def Process(self, *, target: Callable[..., Any], args: tuple[Any, ...], name: str | None = None) -> Any:
        inherited = (self._streams, Path.cwd(), dict(os.environ), list(warnings.filters))
        return _CONTEXT.Process(target=_begin, args=(inherited, target, args), name=name)


def _begin(inherited: tuple[Any, ...], target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    streams, folder, environ, filters = inherited
    for number, path in enumerate(streams, 1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    known: Any = warnings.filters
    known[:] = filters
    target(*args)


def _run(module: str, arguments: list[str], out: Path, err: Path) -> None:
    sys.argv = [module, *arguments]
    warnings.simplefilter("error")
    context = _Inheriting(out, err)
    with mock.patch.object(launch, "get_context", mock.Mock(return_value=context)):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_module(module: str, arguments: Sequence[str], folder: Path, **variables: str) -> CompletedProcess[str]:
    """What `python -W error -m module` returns and prints where it is called in the folder, with these variables."""
    out, err = folder / "stdout", folder / "stderr"
    streams = (out, err)
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    inherited = (streams, folder, environ, list(warnings.filters))
    process = _CONTEXT.Process(target=_begin, args=(inherited, _run, (module, list(arguments), out, err)))
    process.start()
    process.join(spmd.LONG)
    try:
        assert process.exitcode is not None, f"it hangs\n{out.read_text()}\n{err.read_text()}"
    finally:
        process.kill()
        process.join()
    return CompletedProcess([module, *arguments], process.exitcode, out.read_text(), err.read_text())
