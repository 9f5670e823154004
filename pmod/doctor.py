"""`python -m pmod.doctor`: what is detected here, and whether the ranks connect.

Its output is to be pasted into a report: of the environment it shows the launchers'
variables and no others. Every rank hands in a row before the axes are tried, so that
unlike versions and shared GPUs are named instead of the hang that they cause. It hands in
another row afterwards. All ranks have all rows, so they come to one verdict.
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
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch

import pmod
from pmod._collectives.objects import gather_json
from pmod._console import paint
from pmod._errors import coordinates
from pmod._mesh.sizes import parse_sizes
from pmod._ranks.launchers import shown_variables

# how often a psum is timed, after a first one that connects, and how long its x is
TIMES = 11
LENGTH = 16

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
    """What a rank says of itself, and the microseconds of a psum along each axis."""

    rank: int
    host: str = ""
    device: str = ""
    place: str = ""
    pmod: str = ""
    torch: str = ""
    # the UUID of its GPU
    gpu: str = ""
    problem: str = ""
    latency: Mapping[str, float] = attrs.field(factory=dict[str, float])

    @staticmethod
    def of(entry: Mapping[str, Any]) -> Row:
        """Return the row of another rank."""
        # its pmod may be of another version, which knows other fields
        known = attrs.fields_dict(Row)
        return Row(**{name: entry[name] for name in entry if name in known})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status of this rank."""
    options = _parser().parse_args(arguments)
    sizes, timeout = options.mesh, options.timeout
    prefix = ""
    try:
        # kept for the report: as Python shows them they carry the path of a file
        with warnings.catch_warnings(record=True) as noted:
            place = _detected()
            prefix = _prefix(place)
            texts = [one_line(warning.message) for warning in noted]
            if place.launcher == "single" and min(sizes.values(), default=0) > 0:
                return max(pmod.launch(_examine_here, sizes, timeout, texts, **sizes))
            return _examine(place, sizes, timeout, texts)
    # whatever it is, the report says it in one line
    except Exception as error:
        _complain(prefix + one_line(error))
        return 1


def _detected() -> pmod.Topology:
    try:
        return pmod.Topology.detect()
    except pmod.TopologyError:
        # the variables in it show what is wrong
        _show(_header(None))
        raise


def _prefix(place: pmod.Topology) -> str:
    return "" if place.world_size == 1 else f"rank {place.rank} of {place.world_size}: "


def _examine_here(
    sizes: Mapping[str, int], timeout: float, noted: Sequence[str]
) -> int:
    """Run `_examine` on a rank that the doctor started itself."""
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
    late = f"not all ranks answered within {timeout:g} s"
    with within(timeout, f"{prefix}connected, but {late}. {_REACH}"):
        rows = _rows_of_all(row, mesh)
    devices = ["cpu"]
    # on GPUs that are shared, or under unlike versions, NCCL would hang
    if place.device.type == "cuda" and not problems(rows):
        devices.append("cuda")
    for device in devices:
        row = try_axes(mesh, torch.device(device), row, timeout, prefix)
    with within(timeout, f"{prefix}{late} after the axes were tried. {_REACH}"):
        rows = _rows_of_all(row, mesh)
    found = problems(rows)
    if first:
        _report(mesh, rows, found, noted)
    return 1 if found else 0


def _rows_of_all(row: Row, mesh: pmod.Mesh) -> list[Row]:
    return [Row.of(entry) for entry in gather_json(attrs.asdict(row), mesh)]


def _report(
    mesh: pmod.Mesh, rows: list[Row], found: list[str], noted: Sequence[str]
) -> None:
    for warning in noted:
        _show(f"note      {warning}")
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    _show(f"mesh      {axes}\n\n{table(rows)}\n")
    for one in found:
        _complain(one)
    if not found:
        _show(paint("all is right", "green"))


_REACH = (
    "Check that the hosts reach one another on every port; where they have several "
    "interfaces, set GLOO_SOCKET_IFNAME (for GPUs NCCL_SOCKET_IFNAME)."
)


def _connect(
    place: pmod.Topology,
    sizes: Mapping[str, int],
    timeout: float,
    problem: str,
    prefix: str,
) -> pmod.Mesh:
    """Return the mesh, its ranks connected.

    Raises: PmodError if they do not connect. Its text is about a broken GPU if there is
    one, which may be why.
    """
    where = f"{place.master_addr}:{place.master_port}"
    late = (
        f"the {place.world_size} ranks did not connect at {where} "
        f"within {timeout:g} s. Check that all of them were started, that each reaches "
        "that host, and that the port is free; --timeout gives them longer"
    )
    try:
        # a second more: torch's own deadline comes first, and says more
        with within(timeout + 1, prefix + late):
            return pmod.make_mesh(sizes, timeout=timeout)
    # the sizes do not fit the number of ranks: that is said already
    except pmod.PmodError:
        raise
    except Exception as error:
        given = f"{late} ({type(error).__name__}: {one_line(error)})."
        raise pmod.PmodError(problem or given) from None


def _row(mesh: pmod.Mesh, problem: str) -> Row:
    gpu = ""
    # of a broken card not even the properties can be asked
    if mesh.device.type == "cuda" and not problem:
        gpu = str(torch.cuda.get_device_properties(mesh.device).uuid)
    return Row(
        rank=mesh.topology.rank,
        host=socket.gethostname(),
        device=str(mesh.device),
        place=coordinates(mesh.coords),
        pmod=pmod_version(),
        torch=torch.__version__,
        gpu=gpu,
        problem=problem,
    )


def try_axes(
    mesh: pmod.Mesh, device: torch.device, row: Row, timeout: float, prefix: str = ""
) -> Row:
    """Return the row with the time of a small psum along each axis on this device.

    If a value was wrong, the row says so as well.
    """
    kind = device.type
    # this rank's own card, not the first one
    here = mesh.device if kind == "cuda" else device
    for name, n in mesh.shape.items():
        late = f"no answer along axis {name!r} on {kind} within {timeout:g} s"
        with within(timeout, f"{prefix}{late}. {_REACH}"):
            microseconds, right = try_psum(mesh[name], here)
        latency = {**row.latency, f"{name}, {kind}": microseconds}
        row = attrs.evolve(row, latency=latency)
        if not right and not row.problem:
            wrong = f"psum along axis {name!r} of {n} ranks on {kind}"
            problem = f"{wrong} gave a wrong value. Report it, with this page."
            row = attrs.evolve(row, problem=problem)
    return row


def try_psum(axis: pmod.Mesh, device: torch.device) -> tuple[float, bool]:
    """Return the median of its microseconds, and whether its value was always right."""
    ranks: list[int] = axis.ranks.reshape(-1).tolist()
    # whole numbers: their sum is exact in any order
    ramp = torch.arange(LENGTH, dtype=torch.float64, device=device)
    x = ramp + axis.topology.rank
    expected = len(ranks) * ramp + sum(ranks)
    seconds: list[float] = []
    right = True
    for _ in range(1 + TIMES):
        _wait_for(device)
        begun = time.perf_counter()
        total = pmod.psum(x, axis)
        _wait_for(device)
        seconds.append(time.perf_counter() - begun)
        right = right and torch.equal(total, expected)
    return 1e6 * statistics.median(seconds[1:]), right


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# --- what is off ----------------------------------------------------------------------


def problems(rows: Sequence[Row]) -> list[str]:
    """Return what is wrong, a line each, with the way out."""
    found: list[str] = []
    for row in rows:
        if row.problem:
            found.append(f"rank {row.rank} on {row.host}: {row.problem}")
    versions = {"pmod": [row.pmod for row in rows]}
    versions["torch"] = [row.torch for row in rows]
    for name, held in versions.items():
        unlike: list[str] = []
        for version in dict.fromkeys(held):
            unlike.append(f"{version} on rank {rows[held.index(version)].rank}")
        if len(unlike) > 1:
            install = "Install one version on all hosts."
            found.append(f"{name} is {', '.join(unlike)}. {install}")
    return found + _shared_gpus(rows)


def _shared_gpus(rows: Sequence[Row]) -> list[str]:
    found: list[str] = []
    users: dict[str, Row] = {}
    for row in rows:
        if not row.gpu:
            continue
        other = users.setdefault(row.gpu, row)
        if other is not row:
            shared = f"ranks {other.rank} and {row.rank} on {row.host} share a GPU"
            found.append(
                f"{shared}. Start one rank a GPU, and where the launcher gives each "
                "task a GPU of its own (--gpu-bind), one that no other task has."
            )
    return found


def gpu_problem(device: torch.device) -> str:
    """Return why this rank's GPU, or one that the machine has, cannot be used.

    Returns "" if it can be used, or if there is none.
    """
    if device.type == "cuda":
        return _fault(device)
    cards = _cards()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip()
    # GPUs that are hidden on purpose are no problem
    if not cards or visible in ("", "-1"):
        return ""
    what = f"this machine has {cards} GPU{'s' * (cards > 1)}, and torch sees none"
    if torch.version.cuda is None:
        without = f"torch {torch.__version__} is built without CUDA"
        way_out = (
            "Install a torch with CUDA, or hide the GPUs: "
            "set CUDA_VISIBLE_DEVICES to nothing."
        )
        return f"{what}: {without}. {way_out}"
    older = f"the driver may be older than CUDA {torch.version.cuda}"
    hidden = "CUDA_VISIBLE_DEVICES names none of them"
    return f"{what}. Check nvidia-smi: {older}, or {hidden}."


def _fault(device: torch.device) -> str:
    """Return why a GPU that torch sees cannot be used, "" if it can."""
    try:
        right = torch.ones(LENGTH, device=device).sum().item() == LENGTH
    # there is no kernel for this card, it is in a bad state, or out of memory
    except Exception as error:
        way_out = "Check nvidia-smi, and install a torch for this card."
        return f"torch cannot use {device}: {one_line(error)}. {way_out}"
    if right:
        return ""
    return f"{device} adds up wrongly. Check nvidia-smi for errors of its memory."


def _cards() -> int:
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


@contextmanager
def within(seconds: float, reason: str) -> Generator[None]:
    """End this process, with status 1 and a reason, if the block takes longer."""
    # a backend's wait has no other end
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
    """Return the text of an error in one line.

    Its C++ frames are left out, and the name of the home folder.
    """
    text = str(error).split("\nException raised from")[0] or type(error).__name__
    line = " ".join(text.split())
    home = os.path.expanduser("~")
    # of a user without a home it is "/"
    if len(home) > 1:
        line = line.replace(home, "~")
    return line if len(line) <= 500 else f"{line[:500]} ..."


def pmod_version() -> str:
    """Return the version and a digest of the source."""
    # between releases only the digest tells one checkout from another
    digest = hashlib.sha1()
    for path in sorted(Path(pmod.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return f"{pmod.__version__} ({digest.hexdigest()[:8]})"


def _header(place: pmod.Topology | None) -> str:
    """Return what is there before anything is sent.

    place: None if it could not be detected.
    """
    system = f"{platform.system()} {platform.machine()}"
    lines = {
        "pmod": pmod_version(),
        "torch": torch.__version__,
        "Python": f"{platform.python_version()}, {system}",
        "CUDA": _cuda(),
        "devices": _devices(),
        "variables": shown_variables(os.environ) or "none of a launcher",
    }
    if place is not None:
        lines["launcher"] = place.launcher
        lines["topology"] = _topology(place)
    return "\n".join(f"{name:<9} {value}" for name, value in lines.items())


def _topology(place: pmod.Topology) -> str:
    ranks, nodes, here = place.world_size, place.num_nodes, place.local_world_size
    counted = f"{ranks} rank{'s' * (ranks > 1)} on {nodes} node{'s' * (nodes > 1)}"
    meeting = ""
    if ranks > 1:
        meeting = f"; they meet at {place.master_addr}:{place.master_port}"
    return (
        f"{counted}, {here} on this one{meeting}; "
        f"backend {place.backend}; restarts {place.restart_count}"
    )


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
    # only some systems can say which cores this process may use
    affinity = getattr(os, "sched_getaffinity", None)
    cores = os.cpu_count() if affinity is None else len(affinity(0))
    return ", ".join([*kinds, f"{cores} cores"])


def table(rows: Sequence[Row]) -> str:
    """Return a line for each rank, with a column for each axis and kind of device."""
    tried: dict[str, None] = {}
    for row in rows:
        tried |= dict.fromkeys(row.latency)
    lines = [["rank", "host", "device", "coordinates", *tried, "right"]]
    for row in rows:
        line = [str(row.rank), row.host, row.device, row.place]
        for name in tried:
            time_of = row.latency.get(name)
            line.append("-" if time_of is None else f"{time_of:.1f} us")
        line.append("no" if row.problem else "yes")
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


# --- the command line -----------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pmod.doctor",
        description="Say what pmod detects here and from which variables, connect the "
        "ranks, and try each axis of a\nmesh with a small psum. The output is for bug "
        "reports: of the environment it shows the launchers'\nvariables only.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--mesh",
        type=_axis_sizes,
        default={},
        metavar="A=N,B=M",
        help="the axes (default: one over all ranks); "
        "without a launcher its ranks are started here",
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
    try:
        return parse_sizes(text)
    except ValueError as error:
        given = f"{error}: write data=2,model=2, each name once"
        raise argparse.ArgumentTypeError(given) from None


def _seconds(text: str) -> float:
    # argparse reports its ValueError, under the name of this function
    seconds = float(text)
    if not 0 < seconds < 1e6:
        given = f"{text} is no time to wait: pass seconds, a number above 0"
        raise argparse.ArgumentTypeError(given)
    return seconds


if __name__ == "__main__":
    status = main()
    with within(10, "the process groups did not end within 10 s"):
        pmod.shutdown()
    sys.exit(status)
