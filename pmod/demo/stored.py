"""A state in a folder, in torch's format (DCP), read without running what it says.

DCP's own planners, writer and reader do the work. Its `save` and `load` would send
pickles through torch's object collectives, which unpickle whatever arrives, and which
wait for a dead rank until the deadline and name nobody. Here pmod's collectives carry
the plans, and an unpickler that makes nothing but the parts of a plan opens them.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner, storage
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
)

import pmod
from pmod._errors import PmodError, phrase
from pmod._torch import (
    layout_made,
    memory_formats,
    set_element,
    storage_info,
    storage_prefix,
)
from pmod._wire.board import place_of

T = TypeVar("T")

METADATA = ".metadata"
"""The name of the file in which DCP keeps what lies where."""


def write(state: dict[str, object], folder: Path) -> dict[str, str]:
    """Write the state of all ranks of the current mesh into an empty folder.

    All ranks must see the folder.

    Returns the SHA-256 of each file by its name, the same on every rank. Three small
    messages.
    Raises: PmodError on every rank if one cannot write; CollectiveTimeout, which names
    the rank, if one dies.
    """
    first = is_first()
    writer, plans = filesystem.FileSystemWriter(folder), DefaultSavePlanner()

    def plan() -> planner.SavePlan:
        plans.set_up_planner(state, writer.storage_meta(), first)
        writer.set_up_storage_writer(first)
        return writer.prepare_local_plan(plans.create_local_plan())

    def data() -> tuple[list[storage.WriteResult], dict[str, str]]:
        written = writer.write_data(plans.finish_plan(mine), plans).value()
        names = {part.storage_data.relative_path for part in written}
        return written, {name: digest(folder / name) for name in names}

    def finish() -> dict[str, str]:
        if not first:
            return {}
        writer.finish(whole, [written for written, _ in results])
        return {METADATA: digest(folder / METADATA)}

    mesh = pmod.current_mesh()
    # every rank makes the same plan of all plans, so that none has to be sent back
    everyones, whole = plans.create_global_plan(together(plan))
    mine = writer.prepare_global_plan(everyones)[
        mesh.ranks.flatten().tolist().index(mesh.topology.rank)
    ]
    results = together(data)
    digests = [names for _, names in results] + together(finish)
    return {name: names[name] for names in digests for name in sorted(names)}


def read(state: dict[str, object], folder: Path) -> None:
    """Put what the folder holds into the state, in place.

    Tensors are filled; what is not a tensor goes into the state's dicts and lists.

    All ranks of the current mesh call it. Raises: PmodError on every rank where one
    cannot read.
    """

    def fill() -> None:
        reader, plans = _Reader(folder), _LoadPlanner()
        kept = reader.read_metadata()
        plans.set_up_planner(state, kept, False)
        reader.set_up_storage_reader(kept, False)
        # each rank reads what it needs, so no plan of all is made
        plan = plans.finish_plan(plans.create_local_plan())
        reader.read_data(plan, plans).wait()

    together(fill)


def is_first() -> bool:
    """Return whether this is the first rank of the mesh, which writes for all."""
    mesh = pmod.current_mesh()
    return mesh.topology.rank == mesh.ranks.flat[0]


def together(f: Callable[[], T]) -> list[T]:
    """Return what f returned on each rank of the current mesh, in their order.

    Only what a plan is made of can be returned. One exchange.

    Raises: PmodError on every rank where f raised on one, with its words.
    """
    mesh = pmod.current_mesh()
    try:
        outcome = f(), ""
    except PmodError as error:
        outcome = None, str(error)
    # whatever the disk or DCP raises: the other ranks wait for this one, and are told
    except Exception as error:
        given = f"{place_of(mesh.topology.rank)} cannot read or write a checkpoint: {type(error).__name__}: {error}"
        outcome = None, phrase("demo", given)
    outcomes = _exchanged(outcome, mesh)
    for _, wrong in outcomes:
        if wrong:
            raise PmodError(wrong)
    return [value for value, _ in outcomes]


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _exchanged(value: object, mesh: pmod.Mesh) -> list[Any]:
    """Return the value of every rank, in their order."""
    packed = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(
        mesh.device
    )
    lengths = pmod.all_gather(
        torch.tensor([packed.numel()], device=mesh.device), mesh.axis_names
    ).tolist()
    parts = (
        pmod.all_gather_v(packed, mesh.axis_names, sizes=lengths).cpu().split(lengths)
    )
    return [_Parts(io.BytesIO(part.numpy().tobytes())).load() for part in parts]


# --- what may be unpickled ------------------------------------------------------------


def _parts() -> dict[tuple[str, str], object]:
    """Return what plans and metadata are made of, by their names in a pickle."""
    made: list[type] = [
        *(planner.SavePlan, planner.WriteItem, planner.WriteItemType),
        *(planner.TensorWriteData, planner.BytesIOWriteData),
        *(
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.TensorStorageMetadata,
            metadata.BytesStorageMetadata,
        ),
        *(metadata.ChunkStorageMetadata, metadata.TensorProperties, memory_formats()),
        *(metadata.StorageMeta, storage.WriteResult, storage_info(), storage_prefix()),
        *(torch.Size, layout_made(), type(Path())),
    ]
    dtypes = {
        ("torch", name): value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype)
    }
    return {**{(part.__module__, part.__qualname__): part for part in made}, **dtypes}


class _Parts(pickle.Unpickler):
    """An unpickler that makes numbers, texts, containers and the parts of a plan.

    For anything else it raises an error, and calls nothing.
    """

    allowed: Mapping[tuple[str, str], object] = _parts()

    def find_class(self, module: str, name: str, /) -> object:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(
                f"{module}.{name} is no part of a checkpoint, and is not loaded"
            )
        return self.allowed[module, name]


class _Reader(filesystem.FileSystemReader):
    """DCP's reader, which itself would unpickle anything that the metadata names."""

    def read_metadata(self, *args: object, **kwargs: object) -> metadata.Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            return _Parts(file).load()


class _LoadPlanner(DefaultLoadPlanner):
    """DCP's planner, which itself would unpickle anything that is not a tensor."""

    def load_bytes(self, read_item: planner.ReadItem, value: io.BytesIO) -> None:
        where = self.mappings[read_item.dest_index.fqn]
        set_element()(
            self.original_state_dict, where, torch.load(value, weights_only=True)
        )
