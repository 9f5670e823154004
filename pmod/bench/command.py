"""The command line: which sections are measured, and how they are shown."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from attrs import asdict

import pmod
from pmod.bench.cases import AXIS
from pmod.bench.clock import Result
from pmod.bench.sections import (
    FAKE_RANKS,
    measure_alone,
    measure_host,
    measure_import,
    measure_latency,
    measure_ragged,
    measure_step,
)

TITLES = {
    "import": "import: user CPU time of `import pmod`, x of `import torch, attrs`",
    "alone": "alone: CPU time of a collective at world size 1",
    "host": "host: CPU time of a collective, 64 floats on a fake process group of "
    f"{FAKE_RANKS} ranks, x of raw calls",
    "latency": "latency: time of a collective on gloo, {ranks} ranks, "
    "by the size of a rank's input, x of raw calls",
    "ragged": "ragged: time of a gather of unlike shards on gloo, {ranks} ranks, "
    "by the whole's size, x of padding",
    "step": "step: time of forward and backward on gloo, {ranks} ranks, "
    "x of torch's DDP",
}
ROUNDS = {"import": 5, "alone": 15, "host": 15, "latency": 11, "ragged": 11, "step": 11}
ON_RANKS = ("latency", "ragged", "step")

# by name, the bytes of a rank's input
SIZES = {"4 B": 4, "4 KiB": 4 << 10, "64 KiB": 64 << 10, "1 MiB": 1 << 20}
LARGE = {"16 MiB": 16 << 20}


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
    ranks = place.world_size if launched else options.ranks
    # the ranks that a launcher started all measure; one of them prints
    first = place.rank == 0
    if first:
        lines = [f"{name}: {value}" for name, value in machine.items()]
        print("\n".join(lines), flush=True)
    results: list[Result] = []
    for section in sections:
        rounds = options.rounds or ROUNDS[section]
        found = _measured(section, rounds, options.large, launched, ranks)
        results += found
        if first:
            title = TITLES[section].format(ranks=ranks)
            print(f"\n{title}; {rounds} rounds\n{table(found)}", flush=True)
    if first and options.json is not None:
        everything = {
            "machine": machine,
            "ranks": ranks,
            "results": [asdict(result) for result in results],
        }
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    return 0


def _measured(
    section: str, rounds: int, large: bool, launched: bool, ranks: int
) -> list[Result]:
    """Return the results of a section, on ranks that are there or started here."""
    if section == "import":
        return measure_import(rounds)
    if section == "alone":
        return measure_alone(rounds)
    if section == "host":
        return measure_host(rounds)
    sizes = SIZES | LARGE if large else SIZES
    if launched:
        with pmod.set_mesh(pmod.make_mesh({AXIS: -1})):
            return _on_ranks(section, rounds, sizes)
    # the times of all ranks are alike: they have agreed on the slowest one's
    return pmod.launch(_on_ranks, section, rounds, sizes, **{AXIS: ranks})[0]


def _on_ranks(section: str, rounds: int, sizes: dict[str, int]) -> list[Result]:
    if section == "step":
        return measure_step(rounds)
    if section == "ragged":
        return measure_ragged(rounds, sizes)
    return measure_latency(rounds, sizes)


_EXAMPLES = """examples:
  python -m pmod.bench                              all sections, in a minute or two
  python -m pmod.bench --only latency --ranks 4     gloo latency with 4 local ranks
  python -m pmod.bench --only host --rounds 50      a narrower spread
  python -m pmod.bench --large --json bench.json    messages of 16 MiB too; all numbers into a file
  torchrun --nproc-per-node 4 -m pmod.bench         on the ranks that a launcher started"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pmod.bench",
        description="Measure what pmod costs beside the raw calls of torch.distributed: "
        "host time per collective, latency on gloo, ragged gathers, a training step, "
        "cost at world size 1, cost of the import. A cell shows pmod's time, its ratio "
        "to the raw call's (below 1: pmod is faster), and the quartiles of that ratio.",
        epilog=_EXAMPLES,
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
    """Return what the numbers depend on."""
    # only some systems can say which cores this process may use
    affinity = getattr(os, "sched_getaffinity", None)
    cores = os.cpu_count() if affinity is None else len(affinity(0))
    card = "none"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        card = f"{name} (what is measured here are cpu tensors)"
    return {
        "CPU": f"{_cpu_model()}, {cores} cores",
        "card": card,
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    # this is not Linux
    except OSError:
        return platform.processor() or platform.machine()
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def table(results: Sequence[Result]) -> str:
    """Return one line per function, with one column per case."""
    cells: dict[str, dict[str, str]] = {}
    for result in results:
        cells.setdefault(result.function, {})[result.case] = _cell(result)
    cases = list(dict.fromkeys(result.case for result in results))
    lines = [["", *cases]]
    for function, row in cells.items():
        lines.append([function, *(row[case] for case in cases)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts: list[str] = []
    for function, *row in lines:
        numbers = map(str.rjust, row, widths[1:])
        texts.append("  ".join([function.ljust(widths[0]), *numbers]))
    return "\n".join(texts)


def _cell(result: Result) -> str:
    time = _duration(result.pmod_us.median)
    if result.ratio is None:
        return f"{time} ({result.pmod_us.low:.1f}-{result.pmod_us.high:.1f})"
    ratio = result.ratio
    return f"{time} x{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def _duration(us: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{us / size:.2f} {unit}"
    return f"{us:.1f} us"
