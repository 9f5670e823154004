"""The command line: which sections are measured, and how they are shown."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
from attrs import asdict

import pmod
from pmod.bench.bars import SECTIONS, Verdict, judged
from pmod.bench.cases import AXIS
from pmod.bench.clock import Result
from pmod.bench.memory import MIB, Peak, measure_memory
from pmod.bench.progress import tell
from pmod.bench.sections import (
    FAKE_RANKS,
    measure_alone,
    measure_host,
    measure_import,
    measure_latency,
    measure_peers,
    measure_ragged,
    measure_step,
)

T = TypeVar("T")

Rows: TypeAlias = list[list[str]]
"""The lines of a table, the head first."""

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
PEERS = (
    "peers: CPU time of a collective, 64 floats on a fake process group of "
    f"{FAKE_RANKS} ranks, x of what has a gradient too"
)
MEMORY = (
    "memory: peak resident memory of a collective on gloo, {ranks} ranks, x of raw "
    "calls; the result counts"
)
ROUNDS = {
    "peers": 15,
    "import": 5,
    "alone": 15,
    "host": 15,
    "latency": 11,
    "ragged": 11,
    "step": 11,
}
ON_RANKS = ("latency", "ragged", "step")

# by name, the bytes of a rank's input
SIZES = {"4 B": 4, "4 KiB": 4 << 10, "64 KiB": 64 << 10, "1 MiB": 1 << 20}
LARGE = {"16 MiB": 16 << 20}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: measure, print, and write what was measured.

    Returns 1 where --check finds a bar missed.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    place = pmod.Topology.detect()
    launched = place.launcher != "single"
    sections = _sections(parser, options, place)
    machine = _machine()
    ranks = place.world_size if launched else options.ranks
    # the ranks that a launcher started all measure; one of them prints
    first = place.rank == 0
    if first:
        lines = [f"{name}: {value}" for name, value in machine.items()]
        print("\n".join(lines), flush=True)
    results: list[Result] = []
    peaks: list[Peak] = []
    report: list[tuple[str, Rows]] = []
    for number, section in enumerate(sections):
        if first:
            tell(f"{section}: section {number + 1} of {len(sections)}")
        if section == "memory":
            peaks = _on_all(measure_memory, launched=launched, ranks=ranks)
            title, rows = MEMORY.format(ranks=ranks), _rows_of_peaks(peaks)
        else:
            rounds = options.rounds or ROUNDS[section]
            found = _measured(section, rounds, options.large, launched, ranks)
            results += found
            titles = TITLES | {"peers": PEERS}
            title = f"{titles[section].format(ranks=ranks)}; {rounds} rounds"
            rows = _rows(found)
        report.append((title, rows))
        if first:
            tell("")
            print(f"\n{title}\n{_aligned(rows)}", flush=True)
    verdicts = judged(results) if options.check else []
    if verdicts:
        report.append(("bars", _rows_of_verdicts(verdicts)))
        print(f"\nbars\n{_aligned(report[-1][1])}", flush=True)
    if first:
        _write(options, machine, ranks, results, peaks, report)
    return int(any(verdict.missed for verdict in verdicts))


def _sections(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    place: pmod.Topology,
) -> list[str]:
    """Return what is measured, or end with what is wrong in the arguments."""
    launched = place.launcher != "single"
    usual: list[str] = list(TITLES)
    if launched:
        usual = [*ON_RANKS]
    elif options.check:
        usual = [*SECTIONS]
    more = [name for name in ("peers", "memory") if getattr(options, name)]
    # each of these alone asks for no other section
    if more and not options.check:
        usual = []
    asked: list[str] = options.only or usual
    sections = list(dict.fromkeys([*asked, *more]))
    if launched and not set(sections) <= {*ON_RANKS, "memory"}:
        given = f"{place.launcher} has started {place.world_size} ranks"
        parser.error(f"{given}: only {', '.join(ON_RANKS)} are measured on them")
    if options.check and not set(sections) & set(SECTIONS):
        parser.error(f"--check: only {', '.join(SECTIONS)} have bars")
    if options.ranks < 2:
        parser.error(f"--ranks is {options.ranks}: a message needs 2 ranks or more")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}: pass 1 or more")
    return sections


def _write(
    options: argparse.Namespace,
    machine: dict[str, str],
    ranks: int,
    results: Sequence[Result],
    peaks: Sequence[Peak],
    report: Sequence[tuple[str, Rows]],
) -> None:
    """Write the files that are asked for."""
    if options.json is not None:
        everything = {
            "machine": machine,
            "ranks": ranks,
            "results": list(map(asdict, results)),
            "memory": list(map(asdict, peaks)),
        }
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    if options.markdown is not None:
        lines = [f"- {name}: {value}" for name, value in machine.items()]
        for title, rows in report:
            lines += ["", f"**{title}**", "", *_markdown(rows)]
        options.markdown.write_text("\n".join(lines) + "\n")


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
    if section == "peers":
        return measure_peers(rounds)
    sizes = SIZES | LARGE if large else SIZES
    run = partial(_on_ranks, section, rounds, sizes)
    return _on_all(run, launched=launched, ranks=ranks)


def _on_all(run: Callable[[], list[T]], *, launched: bool, ranks: int) -> list[T]:
    """Return what the ranks measure: those that a launcher started, or new ones."""
    if launched:
        with pmod.set_mesh(pmod.make_mesh({AXIS: -1})):
            return run()
    # the times of all ranks are alike: they have agreed on the slowest one's
    return pmod.launch(run, **{AXIS: ranks})[0]


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
        "--peers",
        action="store_true",
        help="pmod beside torch's functional collectives, torch.distributed.nn and "
        "DTensor",
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="peak resident memory beside the raw calls (Linux)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"print the bars of {', '.join(SECTIONS)}, and exit 1 where one is missed",
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the tables there"
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
    return _aligned(_rows(results))


def _rows(results: Sequence[Result]) -> Rows:
    cells: dict[str, dict[str, str]] = {}
    for result in results:
        cells.setdefault(result.function, {})[result.case] = _cell(result)
    cases = list(dict.fromkeys(result.case for result in results))
    lines = [["", *cases]]
    for function, row in cells.items():
        lines.append([function, *(row.get(case, "-") for case in cases)])
    return lines


def _rows_of_peaks(peaks: Sequence[Peak]) -> Rows:
    lines = [["", "pmod", "raw", "ratio"]]
    for peak in peaks:
        ratio = "-"
        if peak.raw_bytes:
            ratio = f"x{peak.pmod_bytes / peak.raw_bytes:.2f}"
        shown = [f"{n / MIB:.1f} MiB" for n in (peak.pmod_bytes, peak.raw_bytes)]
        lines.append([peak.function, *shown, ratio])
    return lines


def _rows_of_verdicts(verdicts: Sequence[Verdict]) -> Rows:
    lines = [["", "of", "measured", "bar", ""]]
    for verdict in verdicts:
        unit = "x{:.2f}" if verdict.bar.of == "x" else "{:.2f} us"
        measured = "-"
        if verdict.measured is not None:
            measured = unit.format(verdict.measured)
        limit = unit.format(verdict.bar.limit)
        name = verdict.bar.name
        lines.append([name, verdict.function, measured, limit, verdict.word])
    return lines


def _aligned(lines: Rows) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts: list[str] = []
    for function, *row in lines:
        numbers = map(str.rjust, row, widths[1:])
        texts.append("  ".join([function.ljust(widths[0]), *numbers]))
    return "\n".join(texts)


def _markdown(lines: Rows) -> list[str]:
    """Return the lines of a Markdown table."""
    head, *rest = [f"| {' | '.join(line)} |" for line in lines]
    numbers = ["---:"] * (len(lines[0]) - 1)
    return [head, f"| {' | '.join(['---', *numbers])} |", *rest]


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
