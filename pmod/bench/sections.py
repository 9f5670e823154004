"""The sections: what each measures. All functions return its results."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter, thread_time

import torch
import torch.distributed as dist
from torch import Tensor

import pmod
from pmod._torch import fake_store
from pmod.bench.cases import AXIS, CASES, MESSAGES, Case, raw_all_gather
from pmod.bench.clock import Clock, Result, Runs, compare, take_turns
from pmod.bench.peers import runs_of_peers
from pmod.bench.progress import be_quiet, tell

FAKE_RANKS = 8

# the host's cost is processor time of this thread, so that what others do on the machine
# counts little
_HOST = Clock(thread_time, block_seconds=2e-3)


def measure_import(rounds: int) -> list[Result]:
    """Measure the user CPU time of `import pmod` in a fresh Python.

    It stands beside the import of what pmod stands on.
    """
    pair = [partial(_import_seconds, "pmod"), partial(_import_seconds, "torch, attrs")]
    # the first round writes the byte code, and fills the disk cache
    take_turns([pair], 1)
    (seconds,) = take_turns([pair], rounds)
    return [Result.of("import", "import pmod", "user time", seconds)]


def _import_seconds(modules: str) -> float:
    used = "resource.getrusage(resource.RUSAGE_SELF).ru_utime"
    command = [sys.executable, "-c", f"import {modules}, resource; print({used})"]
    # from a checkout that is not installed pmod is found here
    where = Path(pmod.__file__).parents[1]
    done = subprocess.run(command, cwd=where, check=True, capture_output=True)
    return float(done.stdout)


def measure_alone(rounds: int) -> list[Result]:
    """Measure the host cost of each collective in a program of one process."""
    x = torch.ones(8, 8)
    parameter = torch.ones(8, 8, requires_grad=True)
    runs: Runs = {}
    for name, case in CASES.items():
        runs[name, "no grad"] = [partial(case.ours, x)]
        runs[name, "with grad"] = [partial(case.ours, parameter)]
    alone = pmod.Topology(rank=0, world_size=1)
    with pmod.set_mesh(pmod.make_mesh({AXIS: 1}, topology=alone)):
        return compare("alone", runs, _HOST, rounds)


def measure_host(rounds: int) -> list[Result]:
    """Measure the host cost of each collective on a process group that sends nothing.

    Backward is measured beside autograd's walk through one view and the raw call of
    the transpose.
    """
    runs: Runs = {}
    with fake_ranks(FAKE_RANKS):
        for name, case in CASES.items():
            x = torch.ones(8, 8)
            parameter = torch.ones(8, 8, requires_grad=True)
            y = case.ours(parameter)
            g = torch.ones_like(y)
            ours = partial(torch.autograd.grad, y, parameter, g, retain_graph=True)
            view = parameter.view_as(parameter)
            raw_back = partial(_raw_backward, view, parameter, x, g, case)
            raw = _raw(case, x)
            runs[name, "forward"] = [partial(case.ours, x), *raw]
            runs[name, "forward with grad"] = [partial(case.ours, parameter), *raw]
            runs[name, "backward"] = [ours, raw_back] if raw else [ours]
        return compare("host", runs, _HOST, rounds)


def measure_peers(rounds: int) -> list[Result]:
    """Measure the host cost beside that of the libraries that have a gradient, too.

    They send on the same process group, which sends nothing.
    """
    with fake_ranks(FAKE_RANKS), warnings.catch_warnings():
        # torch deprecates one of these, and says so at each of its calls
        warnings.simplefilter("ignore", FutureWarning)
        return compare("peers", runs_of_peers(), _HOST, rounds)


def _raw(case: Case, x: Tensor) -> list[Callable[[], object]]:
    return [] if case.raw is None else [partial(case.raw, x)]


def _raw_backward(
    view: Tensor, parameter: Tensor, ones: Tensor, g: Tensor, case: Case
) -> None:
    torch.autograd.grad(view, parameter, ones, retain_graph=True)
    if case.raw_back is not None:
        case.raw_back(g)


@contextmanager
def fake_ranks(n: int) -> Generator[None]:
    dist.init_process_group("fake", store=fake_store()(), rank=0, world_size=n)
    try:
        place = pmod.Topology(rank=0, world_size=n)
        with pmod.set_mesh(pmod.make_mesh({AXIS: n}, topology=place)):
            yield
    finally:
        dist.destroy_process_group()
        # the next section must not take the fake ranks for real ones
        pmod.shutdown()


def _ranks_clock() -> Clock:
    """Return a clock of all ranks together: it takes the slowest rank's time."""
    return Clock(
        perf_counter,
        block_seconds=4e-3,
        ready=partial(pmod.barrier, AXIS),
        tell=tell if pmod.axis_index(AXIS) == 0 else be_quiet,
        agree=lambda x: pmod.pmax(x, AXIS),
    )


def measure_latency(rounds: int, sizes: dict[str, int]) -> list[Result]:
    """Measure the time of each message on gloo, for each size of x in bytes.

    All ranks of the mesh call it.
    """
    n = pmod.axis_size(AXIS)
    runs: Runs = {}
    for name in MESSAGES:
        case = CASES[name]
        for size, nbytes in sizes.items():
            # at least one element a rank: some of them cut x
            x = torch.ones(n * max(1, nbytes // 4 // n))
            runs[name, size] = [partial(case.ours, x), *_raw(case, x)]
    return compare("latency", runs, _ranks_clock(), rounds)


def _skewed(total: int, n: int) -> list[int]:
    """Return half for the first rank, half of the rest for the next, and so on."""
    sizes = [total >> (i + 1) for i in range(n - 1)]
    return [*sizes, total - sum(sizes)]


def _padded_all_gather(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Gather as one does by hand if a backend wants equal parts."""
    padded = x.new_empty(max(sizes))
    padded[: len(x)] = x
    parts = raw_all_gather(padded).split(max(sizes))
    cut = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    return torch.cat(cut)


def measure_ragged(rounds: int, sizes: dict[str, int]) -> list[Result]:
    """Measure all_gather_v of unlike shards, for each size of the whole.

    It stands beside shards that are padded.
    """
    n, index = pmod.axis_size(AXIS), pmod.axis_index(AXIS)
    runs: Runs = {}
    for size, nbytes in sizes.items():
        total = max(n, nbytes // 4)
        cuts = {"even": list(pmod.split_sizes(total, n)), "skewed": _skewed(total, n)}
        for how, lengths in cuts.items():
            x = torch.ones(lengths[index])
            ours = partial(pmod.all_gather_v, x, AXIS, sizes=lengths)
            padded = partial(_padded_all_gather, x, lengths)
            runs[f"all_gather_v, {how}", size] = [ours, padded]
    return compare("ragged", runs, _ranks_clock(), rounds)


def _layers(count: int, width: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(count)])


def _step(model: torch.nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).square().mean().backward()


def measure_step(rounds: int) -> list[Result]:
    """Measure forward and backward of a module whose gradients are averaged.

    It stands beside torch's DistributedDataParallel.
    """
    from torch.nn.parallel import DistributedDataParallel

    group = pmod.current_mesh().group(AXIS)
    models = {"4 layers of 4 MiB": (4, 1024), "100 layers of 16 KiB": (100, 64)}
    runs: Runs = {}
    for case, (count, width) in models.items():
        x = torch.ones(16, width)
        theirs = DistributedDataParallel(_layers(count, width), process_group=group)
        ours = pmod.data_parallel(_layers(count, width), AXIS)
        shared = _layers(count, width)
        pmod.share_parameters(shared, AXIS, reduce="mean")
        raw = partial(_step, theirs, x)
        runs["data_parallel", case] = [partial(_step, ours, x), raw]
        runs["share_parameters", case] = [partial(_step, shared, x), raw]
    return compare("step", runs, _ranks_clock(), rounds)
