"""`python -m pmod.doctor`: what is detected here, and whether the ranks reach one
another; to be pasted into a report.

Of the environment it shows the launchers' variables and no others. Every rank hands in
a row before the axes are tried, so that unlike versions and shared GPUs are named
instead of the hang that they cause, and one after; as all ranks have all rows, they
come to one verdict.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import socket
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch

import pmod
from pmod._collectives.objects import gather_json
from pmod._errors import coordinates
from pmod._ranks.launchers import shown_variables
from pmod.demo.console import paint

TIMES = 11  # of a psum, after a first one that connects
LENGTH = 16  # of its x

_EXAMPLES = """\
examples:
  python -m pmod.doctor                                            this process alone
  python -m pmod.doctor --mesh data=2,model=2                      four ranks, started here
  torchrun --standalone --nproc-per-node 4 -m pmod.doctor          one axis over all ranks
  torchrun --nproc-per-node 4 -m pmod.doctor --mesh data=2,model=2
  mpirun -n 2 python -m pmod.doctor --timeout 20
  srun -n 8 python -m pmod.doctor > report.txt

The exit status is 0 where all is right, on every rank; else 1, with the reason in one line.
"""


@attrs.frozen
class Row:
    """What a rank says of itself, and of each axis that it tried: the microseconds of a
    psum.
    """

    rank: int
    host: str = ""
    device: str = ""
    place: str = ""
    pmod: str = ""
    torch: str = ""
    gpu: str = ""  # its UUID
    problem: str = ""
    latency: Mapping[str, float] = attrs.field(factory=dict[str, float])

    @staticmethod
    def of(entry: Mapping[str, Any]) -> Row:
        """From another rank, whose pmod may know other fields."""
        return Row(
            **{name: entry[name] for name in attrs.fields_dict(Row) if name in entry}
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status of this rank."""
    options = _parser().parse_args(arguments)
    prefix = ""
    try:
        with warnings.catch_warnings(
            record=True
        ) as noted:  # which would be shown with the path of a file
            try:
                place = pmod.Topology.detect()
            except pmod.TopologyError:
                _show(_header(None))
                raise
            prefix = _prefix(place)
            texts = [one_line(warning.message) for warning in noted]
            if place.launcher == "single" and min(options.mesh.values(), default=0) > 0:
                return max(
                    pmod.launch(
                        _examine_here,
                        options.mesh,
                        options.timeout,
                        texts,
                        **options.mesh,
                    )
                )
            return _examine(place, options.mesh, options.timeout, texts)
    except Exception as error:  # whatever it is: the report says it in one line
        _complain(prefix + one_line(error))
        return 1


def _prefix(place: pmod.Topology) -> str:
    return "" if place.world_size == 1 else f"rank {place.rank} of {place.world_size}: "


def _examine_here(
    sizes: Mapping[str, int], timeout: float, noted: Sequence[str]
) -> int:
    """`_examine` on a rank that the doctor started itself."""
    place = pmod.current_mesh().topology
    try:
        return _examine(place, sizes, timeout, noted)
    except Exception as error:
        _complain(_prefix(place) + one_line(error))
        return 1


def _examine(
    place: pmod.Topology, sizes: Mapping[str, int], timeout: float, noted: Sequence[str]
) -> int:
    first, prefix = place.rank == 0, _prefix(place)
    if first:
        _show(_header(place))
    problem = gpu_problem(place.device)
    mesh = _connect(place, sizes, timeout, problem, prefix)
    row = _row(mesh, problem)
    with within(
        timeout,
        f"{prefix}connected, but not all ranks answered within {timeout:g} s. {_REACH}",
    ):
        rows = [Row.of(entry) for entry in gather_json(attrs.asdict(row), mesh)]
    found = problems(rows)
    for device in (
        "cpu",
        *(["cuda"] if place.device.type == "cuda" and not found else []),
    ):
        row = try_axes(mesh, torch.device(device), row, timeout, prefix)
    with within(
        timeout,
        f"{prefix}not all ranks answered within {timeout:g} s after the axes were tried. {_REACH}",
    ):
        rows = [Row.of(entry) for entry in gather_json(attrs.asdict(row), mesh)]
    found = problems(rows)
    if first:
        for warning in noted:
            _show(f"note      {warning}")
        _show(
            f"mesh      {', '.join(f'{name}={size}' for name, size in mesh.shape.items())}\n\n{table(rows)}\n"
        )
        for one in found:
            _complain(one)
        if not found:
            _show(paint("all is right", "green"))
    return 1 if found else 0


_REACH = (
    "Check that the hosts reach one another on every port; where they have several interfaces, set GLOO_SOCKET_IFNAME "
    "(for GPUs NCCL_SOCKET_IFNAME)."
)


def _connect(
    place: pmod.Topology,
    sizes: Mapping[str, int],
    timeout: float,
    problem: str,
    prefix: str,
) -> pmod.Mesh:
    """The mesh, its ranks connected.

    Raises: PmodError where they are not; a broken GPU, which may be why, goes first.
    """
    where = f"{place.master_addr}:{place.master_port}"
    late = (
        f"the {place.world_size} ranks did not connect at {where} within {timeout:g} s. Check that all of them were "
        f"started, that each reaches that host, and that the port is free; --timeout gives them longer"
    )
    try:
        with within(timeout + 1, prefix + late):  # torch's own deadline says more
            return pmod.make_mesh(sizes, timeout=timeout)
    except pmod.PmodError:  # a mesh that does not fit
        raise
    except Exception as error:
        raise pmod.PmodError(
            problem or f"{late} ({type(error).__name__}: {one_line(error)})."
        ) from None


def _row(mesh: pmod.Mesh, problem: str) -> Row:
    device, usable = mesh.device, mesh.device.type == "cuda" and not problem
    return Row(
        mesh.topology.rank,
        socket.gethostname(),
        str(device),
        coordinates(mesh.coords),
        pmod_version(),
        torch.__version__,
        str(torch.cuda.get_device_properties(device).uuid) if usable else "",
        problem,
    )


def try_axes(
    mesh: pmod.Mesh, device: torch.device, row: Row, timeout: float, prefix: str = ""
) -> Row:
    """The row, with the time of a small psum along each axis on this kind of device,
    and what its value was not.
    """
    for name, n in mesh.shape.items():
        late = f"{prefix}no answer along axis {name!r} on {device.type} within {timeout:g} s. {_REACH}"
        with within(timeout, late):
            microseconds, right = try_psum(
                mesh[name], mesh.device if device.type == "cuda" else device
            )
        row = attrs.evolve(
            row, latency={**row.latency, f"{name}, {device.type}": microseconds}
        )
        if not right and not row.problem:
            wrong = f"psum along axis {name!r} of {n} ranks on {device.type} gave a wrong value"
            row = attrs.evolve(row, problem=f"{wrong}. Report it, with this page.")
    return row


def try_psum(axis: pmod.Mesh, device: torch.device) -> tuple[float, bool]:
    """The median of its microseconds, and whether its value was right each time."""
    ranks: list[int] = axis.ranks.reshape(-1).tolist()
    ramp = torch.arange(LENGTH, dtype=torch.float64, device=device)
    x, expected = (
        ramp + axis.topology.rank,
        len(ranks) * ramp + sum(ranks),
    )  # whole numbers: exact in any order
    wait: Callable[[], object] = (
        torch.cuda.synchronize if device.type == "cuda" else lambda: None
    )
    seconds: list[float] = []
    right = True
    for _ in range(1 + TIMES):
        wait()
        begun = time.perf_counter()
        total = pmod.psum(x, axis)
        wait()
        seconds.append(time.perf_counter() - begun)
        right = right and torch.equal(total, expected)
    return 1e6 * statistics.median(seconds[1:]), right


# --- what is off ----------------------------------------------------------------------


def problems(rows: Sequence[Row]) -> list[str]:
    """What is off, a line each, with the way out."""
    found = [
        f"rank {row.rank} on {row.host}: {row.problem}" for row in rows if row.problem
    ]
    for name in ("pmod", "torch"):
        holders: dict[str, int] = {}
        for row in rows:
            holders.setdefault(getattr(row, name), row.rank)
        if len(holders) > 1:
            unlike = ", ".join(
                f"{version} on rank {rank}" for version, rank in holders.items()
            )
            found.append(f"{name} is {unlike}. Install one version on all hosts.")
    users: dict[str, Row] = {}
    for row in rows:
        other = users.setdefault(row.gpu, row)
        if row.gpu and other is not row:
            found.append(
                f"ranks {other.rank} and {row.rank} on {row.host} share a GPU. Start one rank a GPU, and where the "
                "launcher gives each task a GPU of its own (--gpu-bind), one that no other task has."
            )
    return found


def gpu_problem(device: torch.device) -> str:
    """Why this rank's GPU, or one that the machine has, cannot be used; nothing where
    it can or where there is none.
    """
    if device.type == "cuda":
        try:
            right = torch.ones(LENGTH, device=device).sum().item() == LENGTH
        except (
            Exception
        ) as error:  # no kernel for this card, a card in a bad state, out of memory
            return f"torch cannot use {device}: {one_line(error)}. Check nvidia-smi, and install a torch for this card."
        return (
            ""
            if right
            else f"{device} adds up wrongly. Check nvidia-smi for errors of its memory."
        )
    cards = _cards()
    if not cards or os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in (
        "",
        "-1",
    ):  # hidden on purpose
        return ""
    what = f"this machine has {cards} GPU{'s' * (cards > 1)}, and torch sees none"
    if torch.version.cuda is None:
        way_out = "Install a torch with CUDA, or hide the GPUs: set CUDA_VISIBLE_DEVICES to nothing."
        return f"{what}: torch {torch.__version__} is built without CUDA. {way_out}"
    older = f"the driver may be older than CUDA {torch.version.cuda}, or CUDA_VISIBLE_DEVICES names none of them"
    return f"{what}. Check nvidia-smi: {older}."


def _cards() -> int:
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


@contextmanager
def within(seconds: float, reason: str) -> Generator[None]:
    """End this process, with status 1 and a reason, where the block takes longer: a
    backend's wait has no other end.
    """
    timer = threading.Timer(seconds, _give_up, [reason])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(reason: str) -> None:
    _complain(reason)
    os._exit(1)


# --- what is shown --------------------------------------------------------------------


def _show(text: str) -> None:
    print(text, flush=True)


def _complain(reason: str) -> None:
    _show(f"{paint('not right:', 'red')} {reason}")


def one_line(error: object) -> str:
    """The text of an error without its C++ frames, and without the name of the home
    folder.
    """
    text = str(error).split("\nException raised from")[0]
    line, home = (
        " ".join((text or type(error).__name__).split()),
        os.path.expanduser("~"),
    )
    line = line.replace(home, "~") if len(home) > 1 else line
    return line if len(line) <= 500 else f"{line[:500]} ..."


def pmod_version() -> str:
    """The version, and a digest of the source: between releases only that differs."""
    digest = hashlib.sha1()
    for path in sorted(Path(pmod.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return f"{pmod.__version__} ({digest.hexdigest()[:8]})"


def _header(place: pmod.Topology | None) -> str:
    """What is there before anything is sent. place: None where none could be detected."""
    lines = {
        "pmod": pmod_version(),
        "torch": torch.__version__,
        "Python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "CUDA": _cuda(),
        "devices": _devices(),
        "variables": shown_variables(os.environ) or "none of a launcher",
    }
    if place is not None:
        lines["launcher"] = place.launcher
        ranks, nodes, here = place.world_size, place.num_nodes, place.local_world_size
        meeting = (
            f"; they meet at {place.master_addr}:{place.master_port}"
            if ranks > 1
            else ""
        )
        lines["topology"] = (
            f"{ranks} rank{'s' * (ranks > 1)} on {nodes} node{'s' * (nodes > 1)}, {here} on this one{meeting}; "
            f"backend {place.backend}; restarts {place.restart_count}"
        )
    return "\n".join(f"{name:<9} {value}" for name, value in lines.items())


def _cuda() -> str:
    if torch.version.cuda is None:
        return "torch is built without"
    nccl = ""
    if torch.distributed.is_nccl_available():
        nccl = ", NCCL " + ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return torch.version.cuda + nccl


def _devices() -> str:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kinds = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    affinity = getattr(os, "sched_getaffinity", None)
    return ", ".join(
        [
            *kinds,
            f"{len(affinity(0)) if affinity is not None else os.cpu_count()} cores",
        ]
    )


def table(rows: Sequence[Row]) -> str:
    """A line a rank; a column of latencies for each axis and kind of device."""
    tried = list(dict.fromkeys(name for row in rows for name in row.latency))
    lines = [["rank", "host", "device", "coordinates", *tried, "right"]]
    for row in rows:
        times = [
            f"{row.latency[name]:.1f} us" if name in row.latency else "-"
            for name in tried
        ]
        lines.append(
            [
                str(row.rank),
                row.host,
                row.device,
                row.place,
                *times,
                "no" if row.problem else "yes",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True))
        for line in lines
    )


# --- the command line -----------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pmod.doctor",
        description="Say what pmod detects here and from which variables, connect the ranks, and try each axis of a\n"
        "mesh with a small psum. The output is for bug reports: of the environment it shows the launchers'\n"
        "variables only.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--mesh",
        type=_axis_sizes,
        default={},
        metavar="A=N,B=M",
        help="the axes (default: one over all ranks); without a launcher its ranks are started here",
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=60.0,
        metavar="S",
        help="seconds to wait for other ranks (default: 60)",
    )
    return parser


def _axis_sizes(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not name or name in sizes or not size.removeprefix("-").isdecimal():
            raise argparse.ArgumentTypeError(
                f"{part!r} is no axis: write data=2,model=2, each name once"
            )
        sizes[name] = int(size)
    return sizes


def _seconds(text: str) -> float:
    seconds = float(
        text
    )  # its ValueError is reported by argparse, under the name of this function
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(
            f"{text} is no time to wait: pass seconds, a number above 0"
        )
    return seconds


if __name__ == "__main__":
    status = main()
    with within(10, "the process groups did not end within 10 s"):
        pmod.shutdown()
    sys.exit(status)
