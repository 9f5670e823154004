"""`python -m pmod.bench`: what pmod costs beside the raw calls of torch.distributed,
measured where it runs.

Whatever is compared runs in the same processes, in blocks that take turns: each round
takes the pairs in a new order, and the two of a pair in a new order, one right after
the other. A ratio is the median of the rounds' ratios, with the quartiles beside it;
where the quartiles lie apart, the machine was busy, and more rounds help.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from attrs import asdict, frozen
from torch import Tensor

import pmod
from pmod._core.collective import COLLECTIVES
from pmod._torch import fake_store

AXIS = "ranks"
FAKE_RANKS = 8
SIZES = {"4 B": 4, "4 KiB": 4 << 10, "64 KiB": 64 << 10, "1 MiB": 1 << 20}
LARGE = {"16 MiB": 16 << 20}


# --- what is compared -----------------------------------------------------------------

Function: TypeAlias = Callable[[Tensor], Any]


@frozen
class Case:
    """A collective beside the raw calls that give the same, out of place: forward, and
    for its derivative.

    raw: None where torch.distributed has no such call. raw_back: the message of the
    transpose; None where the transpose needs none.
    """

    ours: Function
    raw: Function | None
    raw_back: Function | None = None


def _copied(x: Tensor, send: Callable[[Tensor], object]) -> Tensor:
    y = x.clone()
    send(y)
    return y


def _all_reduce(x: Tensor) -> Tensor:
    return _copied(x, dist.all_reduce)


def _mean(x: Tensor) -> Tensor:
    return _all_reduce(x).div_(dist.get_world_size())


def _maximum(x: Tensor) -> Tensor:
    return _copied(x, partial(dist.all_reduce, op=dist.ReduceOp.MAX))


def _minimum(x: Tensor) -> Tensor:
    return _copied(x, partial(dist.all_reduce, op=dist.ReduceOp.MIN))


def _broadcast(x: Tensor) -> Tensor:
    return _copied(x, partial(dist.broadcast, src=0))


def _reduce(x: Tensor) -> Tensor:
    return _copied(x, partial(dist.reduce, dst=0))


# torch 2.13 renamed them, and warns of the old names on each call
_torch: Any = dist
_all_gather_single = (
    getattr(_torch, "all_gather_single", None) or _torch.all_gather_into_tensor
)
_reduce_scatter_single = (
    getattr(_torch, "reduce_scatter_single", None) or _torch.reduce_scatter_tensor
)


def _all_gather(x: Tensor) -> Tensor:
    y = x.new_empty(dist.get_world_size() * x.shape[0], *x.shape[1:])
    _all_gather_single(y, x)
    return y


def _reduce_scatter(x: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0] // dist.get_world_size(), *x.shape[1:])
    _reduce_scatter_single(y, x)
    return y


def _all_to_all(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    dist.all_to_all_single(y, x)
    return y


def _gather(x: Tensor) -> Tensor:
    if dist.get_rank() != 0:
        dist.gather(x, dst=0)
        return x[:0]
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.gather(x, parts, dst=0)
    return torch.cat(parts)


def _scatter(x: Tensor) -> Tensor:
    n = dist.get_world_size()
    y = x.new_empty(x.shape[0] // n, *x.shape[1:])
    dist.scatter(y, list(x.chunk(n)) if dist.get_rank() == 0 else None, src=0)
    return y


def _shift(x: Tensor) -> Tensor:
    rank, n = dist.get_rank(), dist.get_world_size()
    y = torch.empty_like(x)
    messages = [
        dist.P2POp(dist.isend, x, (rank + 1) % n),
        dist.P2POp(dist.irecv, y, (rank - 1) % n),
    ]
    for work in dist.batch_isend_irecv(messages):
        work.wait()
    return y


def _view(x: Tensor) -> Tensor:
    return x.view_as(x)


def _slice(x: Tensor) -> Tensor:
    n = dist.get_world_size()
    return x.narrow(0, dist.get_rank() * (x.shape[0] // n), x.shape[0] // n)


def _on_first(x: Tensor) -> Tensor:
    return x.view_as(x) if dist.get_rank() == 0 else torch.zeros_like(x)


def _ppermute(x: Tensor) -> Tensor:
    n = pmod.axis_size(AXIS)
    return pmod.ppermute(x, AXIS, [(i, (i + 1) % n) for i in range(n)])


def _pshuffle(x: Tensor) -> Tensor:
    n = pmod.axis_size(AXIS)
    return pmod.pshuffle(x, AXIS, [(i - 1) % n for i in range(n)])


CASES = {
    "psum": Case(lambda x: pmod.psum(x, AXIS), _all_reduce),
    "pmean": Case(lambda x: pmod.pmean(x, AXIS), _mean),
    "pmax": Case(lambda x: pmod.pmax(x, AXIS), _maximum, _all_reduce),
    "pmin": Case(lambda x: pmod.pmin(x, AXIS), _minimum, _all_reduce),
    "pvary": Case(lambda x: pmod.pvary(x, AXIS), _view, _all_reduce),
    "pick": Case(lambda x: pmod.pick(x, AXIS), _broadcast),
    "place": Case(lambda x: pmod.place(x, AXIS), _on_first, _broadcast),
    "broadcast": Case(lambda x: pmod.broadcast(x, AXIS), _broadcast, _reduce),
    "reduce": Case(lambda x: pmod.reduce(x, AXIS), _reduce, _broadcast),
    "all_gather": Case(
        lambda x: pmod.all_gather(x, AXIS), _all_gather, _reduce_scatter
    ),
    "psum_scatter": Case(
        lambda x: pmod.psum_scatter(x, AXIS), _reduce_scatter, _all_gather
    ),
    "shard": Case(lambda x: pmod.shard(x, AXIS), _slice, _all_gather),
    "unshard": Case(lambda x: pmod.unshard(x, AXIS), _all_gather),
    "gather": Case(lambda x: pmod.gather(x, AXIS), _gather, _scatter),
    "scatter": Case(lambda x: pmod.scatter(x, AXIS), _scatter, _gather),
    "all_to_all": Case(
        lambda x: pmod.all_to_all(x, AXIS, split_dim=0, concat_dim=0),
        _all_to_all,
        _all_to_all,
    ),
    "pshift": Case(lambda x: pmod.pshift(x, AXIS), _shift, _shift),
    "ppermute": Case(_ppermute, _shift, _shift),
    "pshuffle": Case(_pshuffle, _shift, _shift),
}
# The ragged forms bind the rows of the others, and have a section of their own.
CASES.update(
    {
        name: Case(partial(of.function, axis=AXIS), None)
        for name, of in COLLECTIVES.items()
        if name not in CASES and not name.endswith("_v") and not of.required
    }
)

# One of each kind of message: pmean, unshard, pick and the permutations send what these
# send.
MESSAGES = (
    "psum",
    "pmax",
    "all_gather",
    "psum_scatter",
    "all_to_all",
    "pshift",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
)


# --- measuring ------------------------------------------------------------------------


@frozen
class Spread:
    """A median between its quartiles."""

    low: float
    median: float
    high: float

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        low, median, high = np.quantile(list(values), [0.25, 0.5, 0.75]).tolist()
        return Spread(low, median, high)


@frozen
class Result:
    """What one function costs in one case. ratio: pmod's time over the raw one's; None
    where there is no raw call.
    """

    section: str
    function: str
    case: str
    pmod_us: Spread
    raw_us: Spread | None
    ratio: Spread | None

    @staticmethod
    def of(
        section: str, function: str, case: str, seconds: Sequence[Sequence[float]]
    ) -> Result:
        """From the seconds of each round: (pmod's, raw's), or (pmod's,)."""
        pmod_us = Spread.of(1e6 * times[0] for times in seconds)
        if len(seconds[0]) == 1:
            return Result(section, function, case, pmod_us, None, None)
        raw_us = Spread.of(1e6 * times[1] for times in seconds)
        return Result(
            section,
            function,
            case,
            pmod_us,
            raw_us,
            Spread.of(ours / raw for ours, raw in seconds),
        )


Block: TypeAlias = Callable[[], float]
"""Runs something a number of times: the seconds that one took."""


@frozen
class Clock:
    """How blocks are timed: `ready` comes before each, and `agree` makes the ranks'
    times one.
    """

    now: Callable[[], float]
    block_seconds: float
    ready: Callable[[], object] = lambda: None
    agree: Callable[[Tensor], Tensor] = lambda times: times

    def block(self, run: Callable[[], object]) -> Block:
        """`run`, warmed up, as often as fills a block; equally often on all ranks."""
        self.seconds(run, 3)
        once = self.agree(
            torch.tensor(self.seconds(run, 3), dtype=torch.float64)
        ).item()
        return partial(
            self.seconds,
            run,
            max(1, min(1000, math.ceil(self.block_seconds / max(once, 1e-9)))),
        )

    def seconds(self, run: Callable[[], object], calls: int) -> float:
        self.ready()
        start = self.now()
        for _ in range(calls):
            run()
        return (self.now() - start) / calls


def take_turns(
    pairs: Sequence[Sequence[Block]], rounds: int
) -> list[list[list[float]]]:
    """[pair][round]: the seconds of the pair's blocks. The order is random, and the
    same on all ranks.
    """
    chance = random.Random(0)
    times: list[list[list[float]]] = [
        [[math.nan] * len(pair) for _ in range(rounds)] for pair in pairs
    ]
    for i in range(rounds):
        for p in chance.sample(range(len(pairs)), len(pairs)):
            for b in chance.sample(range(len(pairs[p])), len(pairs[p])):
                times[p][i][b] = pairs[p][b]()
    return times


# The host's cost is processor time of this thread: what others do on the machine counts
# little.
_HOST = Clock(thread_time, block_seconds=2e-3)


def _compare(
    section: str,
    runs: dict[tuple[str, str], Sequence[Callable[[], object]]],
    clock: Clock,
    rounds: int,
) -> list[Result]:
    """The results of {(function, case): (ours, raw) or (ours,)}."""
    times = take_turns(
        [[clock.block(run) for run in pair] for pair in runs.values()], rounds
    )
    agreed = [
        clock.agree(torch.tensor(seconds, dtype=torch.float64)).tolist()
        for seconds in times
    ]
    return [
        Result.of(section, *names, seconds)
        for names, seconds in zip(runs, agreed, strict=True)
    ]


# --- the sections ---------------------------------------------------------------------


def measure_import(rounds: int) -> list[Result]:
    """User processor time of a fresh Python that imports pmod, beside one that imports
    what pmod stands on.
    """
    pairs = [
        [partial(_import_seconds, "pmod"), partial(_import_seconds, "torch, attrs")]
    ]
    take_turns(pairs, 1)  # writes the byte code, and fills the disk cache
    return [
        Result.of("import", "import pmod", "user time", take_turns(pairs, rounds)[0])
    ]


def _import_seconds(modules: str) -> float:
    code = f"import {modules}, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_utime)"
    where = Path(pmod.__file__).parents[1]
    return float(
        subprocess.run(
            [sys.executable, "-c", code], cwd=where, check=True, capture_output=True
        ).stdout
    )


def measure_alone(rounds: int) -> list[Result]:
    """Host cost of a collective in a program of one process."""
    x = torch.ones(8, 8)
    parameter = torch.ones(8, 8, requires_grad=True)
    runs: dict[tuple[str, str], Sequence[Callable[[], object]]] = {}
    for name, case in CASES.items():
        runs[name, "no grad"] = [partial(case.ours, x)]
        runs[name, "with grad"] = [partial(case.ours, parameter)]
    with pmod.set_mesh(
        pmod.make_mesh({AXIS: 1}, topology=pmod.Topology(rank=0, world_size=1))
    ):
        return _compare("alone", runs, _HOST, rounds)


def measure_host(rounds: int) -> list[Result]:
    """Host cost of a collective on torch's fake process group, which sends nothing.

    Backward is measured beside autograd's walk through one view, and the raw call of
    the transpose.
    """
    runs: dict[tuple[str, str], Sequence[Callable[[], object]]] = {}
    with _fake_ranks(FAKE_RANKS):
        for name, case in CASES.items():
            x = torch.ones(8, 8)
            parameter = torch.ones(8, 8, requires_grad=True)
            y = case.ours(parameter)
            g = torch.ones_like(y)
            ours = partial(torch.autograd.grad, y, parameter, g, retain_graph=True)
            raw_back = partial(
                _raw_backward, parameter.view_as(parameter), parameter, x, g, case
            )
            runs[name, "forward"] = [partial(case.ours, x), *_raw(case, x)]
            runs[name, "forward with grad"] = [
                partial(case.ours, parameter),
                *_raw(case, x),
            ]
            runs[name, "backward"] = [ours] if case.raw is None else [ours, raw_back]
        return _compare("host", runs, _HOST, rounds)


def _raw(case: Case, x: Tensor) -> list[Callable[[], object]]:
    return [] if case.raw is None else [partial(case.raw, x)]


def _raw_backward(
    view: Tensor, parameter: Tensor, ones: Tensor, g: Tensor, case: Case
) -> None:
    torch.autograd.grad(view, parameter, ones, retain_graph=True)
    if case.raw_back is not None:
        case.raw_back(g)


@contextmanager
def _fake_ranks(n: int) -> Generator[None]:
    dist.init_process_group("fake", store=fake_store()(), rank=0, world_size=n)
    try:
        with pmod.set_mesh(
            pmod.make_mesh({AXIS: n}, topology=pmod.Topology(rank=0, world_size=n))
        ):
            yield
    finally:
        dist.destroy_process_group()
        pmod.shutdown()  # forgets the topology of the fake ranks


def _ranks_clock() -> Clock:
    """Of all ranks of the mesh together: the slowest rank's time."""
    return Clock(
        perf_counter,
        block_seconds=4e-3,
        ready=partial(pmod.barrier, AXIS),
        agree=lambda x: pmod.pmax(x, AXIS),
    )


def measure_latency(rounds: int, sizes: dict[str, int]) -> list[Result]:
    """Time of a collective on gloo, for each size of x in bytes: the slowest rank's.
    All ranks of the mesh call it.
    """
    n = pmod.axis_size(AXIS)
    runs: dict[tuple[str, str], Sequence[Callable[[], object]]] = {}
    for name in MESSAGES:
        for size, nbytes in sizes.items():
            x = torch.ones(n * max(1, nbytes // 4 // n))  # an element per rank at least
            runs[name, size] = [partial(CASES[name].ours, x), *_raw(CASES[name], x)]
    return _compare("latency", runs, _ranks_clock(), rounds)


def _skewed(total: int, n: int) -> list[int]:
    """Half for the first rank, half of the rest for the next, and so on."""
    sizes = [total >> (i + 1) for i in range(n - 1)]
    return [*sizes, total - sum(sizes)]


def _padded_all_gather(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """What is written by hand where a backend wants equal parts."""
    padded = x.new_empty(max(sizes))
    padded[: len(x)] = x
    parts = _all_gather(padded).split(max(sizes))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def measure_ragged(rounds: int, sizes: dict[str, int]) -> list[Result]:
    """Time of an all_gather_v of shards that differ in length, for each size of the
    whole, beside padded shards.
    """
    n, index = pmod.axis_size(AXIS), pmod.axis_index(AXIS)
    runs: dict[tuple[str, str], Sequence[Callable[[], object]]] = {}
    for size, nbytes in sizes.items():
        total = max(n, nbytes // 4)
        for how, lengths in (
            ("even", list(pmod.split_sizes(total, n))),
            ("skewed", _skewed(total, n)),
        ):
            x = torch.ones(lengths[index])
            ours = partial(pmod.all_gather_v, x, AXIS, sizes=lengths)
            runs[f"all_gather_v, {how}", size] = [
                ours,
                partial(_padded_all_gather, x, lengths),
            ]
    return _compare("ragged", runs, _ranks_clock(), rounds)


def _layers(count: int, width: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(count)])


def _step(model: torch.nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).square().mean().backward()


def measure_step(rounds: int) -> list[Result]:
    """Time of forward and backward of a module whose gradients are averaged, beside
    torch's DDP.
    """
    from torch.nn.parallel import DistributedDataParallel

    group = pmod.current_mesh().group(AXIS)
    runs: dict[tuple[str, str], Sequence[Callable[[], object]]] = {}
    for case, count, width in (
        ("4 layers of 4 MiB", 4, 1024),
        ("100 layers of 16 KiB", 100, 64),
    ):
        x = torch.ones(16, width)
        raw = partial(
            _step,
            DistributedDataParallel(_layers(count, width), process_group=group),
            x,
        )
        runs["data_parallel", case] = [
            partial(_step, pmod.data_parallel(_layers(count, width), AXIS), x),
            raw,
        ]
        shared = _layers(count, width)
        pmod.share_parameters(shared, AXIS, reduce="mean")
        runs["share_parameters", case] = [partial(_step, shared, x), raw]
    return _compare("step", runs, _ranks_clock(), rounds)


# --- the command ----------------------------------------------------------------------

TITLES = {
    "import": "import: user CPU time of `import pmod`, x of `import torch, attrs`",
    "alone": "alone: CPU time of a collective at world size 1",
    "host": f"host: CPU time of a collective, 64 floats on a fake process group of {FAKE_RANKS} ranks, x of raw calls",
    "latency": "latency: time of a collective on gloo, {ranks} ranks, by the size of a rank's input, x of raw calls",
    "ragged": "ragged: time of a gather of unlike shards on gloo, {ranks} ranks, by the whole's size, x of padding",
    "step": "step: time of forward and backward on gloo, {ranks} ranks, x of torch's DDP",
}
ROUNDS = {"import": 5, "alone": 15, "host": 15, "latency": 11, "ragged": 11, "step": 11}
ON_RANKS = ("latency", "ragged", "step")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: measure, print, and write what was measured."""
    parser = _parser()
    options = parser.parse_args(arguments)
    place = pmod.Topology.detect()
    launched = place.launcher != "single"
    sections: list[str] = options.only or list(ON_RANKS if launched else TITLES)
    if launched and not set(sections) <= set(ON_RANKS):
        given = f"{place.launcher} has started {place.world_size} ranks"
        parser.error(f"{given}: only {', '.join(ON_RANKS)} are measured on them")
    if options.ranks < 2:
        parser.error(f"--ranks is {options.ranks}: a message needs 2 ranks or more")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}: pass 1 or more")
    machine = _machine()
    sizes = SIZES | (LARGE if options.large else {})
    ranks = place.world_size if launched else options.ranks
    first = place.rank == 0
    if first:
        print(
            "\n".join(f"{name}: {value}" for name, value in machine.items()), flush=True
        )
    results: list[Result] = []
    for section in sections:
        rounds = options.rounds or ROUNDS[section]
        if section not in ON_RANKS:
            found = {
                "import": measure_import,
                "alone": measure_alone,
                "host": measure_host,
            }[section](rounds)
        elif launched:
            with pmod.set_mesh(pmod.make_mesh({AXIS: -1})):
                found = _on_ranks(section, rounds, sizes)
        else:
            found = pmod.launch(_on_ranks, section, rounds, sizes, **{AXIS: ranks})[0]
        results += found
        if first:
            print(
                f"\n{TITLES[section].format(ranks=ranks)}; {rounds} rounds\n{table(found)}",
                flush=True,
            )
    if first and options.json is not None:
        everything = {
            "machine": machine,
            "ranks": ranks,
            "results": [asdict(result) for result in results],
        }
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    return 0


def _on_ranks(section: str, rounds: int, sizes: dict[str, int]) -> list[Result]:
    if section == "step":
        return measure_step(rounds)
    return {"latency": measure_latency, "ragged": measure_ragged}[section](
        rounds, sizes
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pmod.bench",
        description="Measure what pmod costs beside the raw calls of torch.distributed: host time per collective, "
        "latency on gloo, ragged gathers, a training step, cost at world size 1, cost of the import. A cell shows "
        "pmod's time, its ratio to the raw call's (below 1: pmod is faster), and the quartiles of that ratio.",
        epilog="""examples:
  python -m pmod.bench                              all sections, in a minute or two
  python -m pmod.bench --only latency --ranks 4     gloo latency with 4 local ranks
  python -m pmod.bench --only host --rounds 50      a narrower spread
  python -m pmod.bench --large --json bench.json    messages of 16 MiB too; all numbers into a file
  torchrun --nproc-per-node 4 -m pmod.bench         on the ranks that a launcher started""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(TITLES),
        metavar="SECTION",
        help=f"of {', '.join(TITLES)}",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=2,
        metavar="N",
        help="local ranks to send between (default: 2)",
    )
    parser.add_argument("--large", action="store_true", help="latency of 16 MiB, too")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="more rounds for a narrower spread"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all numbers there"
    )
    return parser


def _machine() -> dict[str, str]:
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "CPU": f"{_cpu_model()}, {cores} cores",
        "card": f"{card} (what is measured here are cpu tensors)"
        if card != "none"
        else card,
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        return platform.processor() or platform.machine()
    models = [
        line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
    ]
    return models[0] if models else platform.machine()


def table(results: Sequence[Result]) -> str:
    """One line per function, one column per case."""
    functions = list(dict.fromkeys(result.function for result in results))
    cases = list(dict.fromkeys(result.case for result in results))
    cells = {(result.function, result.case): _cell(result) for result in results}
    lines = [
        ["", *cases],
        *(
            [function, *(cells[function, case] for case in cases)]
            for function in functions
        ),
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(cases) + 1)]
    return "\n".join(
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(text.rjust(w) for text, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in lines
    )


def _cell(result: Result) -> str:
    time = _duration(result.pmod_us.median)
    if result.ratio is None:
        return f"{time} ({result.pmod_us.low:.1f}-{result.pmod_us.high:.1f})"
    return f"{time} x{result.ratio.median:.2f} ({result.ratio.low:.2f}-{result.ratio.high:.2f})"


def _duration(us: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{us / size:.2f} {unit}"
    return f"{us:.1f} us"


if __name__ == "__main__":
    sys.exit(main())
