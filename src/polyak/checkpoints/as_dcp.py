"""Writes a folder of ``torch.distributed.checkpoint``, in the files and shards of the newest checkpoint."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.checkpoints.companions import PROVENANCE, copy_companions
from polyak.checkpoints.sharded import sizes_of
from polyak.checkpoints.stored import Saved
from polyak.checkpoints.units import SAID, Facts, Job, Unit, in_groups
from polyak.compat.folders import Box
from polyak.storage.saving import saving

_FILE_BYTES = 1 << 30
_METADATA = ".metadata"


def _saved(job: Job) -> dict[str, Saved]:
    """Return where each tensor goes: where the newest checkpoint has it, or in files of equal size."""
    tensors = job.plan.tensors
    if all(one.saved is not None and one.saved.keys[-1] == name for name, one in tensors.items()):
        return {name: one.saved for name, one in tensors.items() if one.saved is not None}
    groups = in_groups(job.plan.names, lambda name: tensors[name].size_bytes, _FILE_BYTES)
    return {
        name: Saved(name, (name,), ((tuple((0, n) for n in tensors[name].shape), f"__{i}_0.distcp"),))
        for i, group in enumerate(groups)
        for name in group
    }


def _folder(job: Job, to: Path) -> Path:
    return to / job.plan.newest.folder


def prepare(job: Job, to: Path) -> None:
    """Make the folder in which the shards are.

    Args:
        job: What is written.
        to: A folder that exists.
    """
    _folder(job, to).mkdir(exist_ok=True)


def units(job: Job, to: Path) -> list[Unit]:
    """Return the work: a unit for each file.

    Args:
        job: What is written.
        to: As for `prepare`.
    """
    files = dict[str, list[tuple[str, Box]]]()
    for name, saved in _saved(job).items():
        for box, file in saved.shards:
            files.setdefault(file, []).append((name, box))
    return [_unit(job, _folder(job, to) / file, shards) for file, shards in files.items()]


def _unit(job: Job, file: Path, shards: Sequence[tuple[str, Box]]) -> Unit:
    def write() -> dict[str, list[Any]]:
        places = list[Any]()
        with file.open("wb") as opened:
            for name, box in shards:
                begin, shard = opened.tell(), _shard(job, name, box)
                with saving():
                    torch.save(shard, opened)
                del shard  # before the next one is read
                places.append([name, [list(one) for one in box], begin, opened.tell() - begin])
        return {file.name: places}

    return Unit(file.name, write)


def _shard(job: Job, name: str, box: Box) -> Tensor:
    """Return the average of a shard, in memory of its own."""
    return job.read(name, None if sizes_of(box) == job.plan.tensors[name].shape else box)


def finish(job: Job, to: Path, facts: Facts) -> list[Path]:
    """Write the metadata and what the folder was made from, and copy what belongs to it.

    Args:
        job: What is written.
        to: As for `prepare`.
        facts: Where the shards are.
    """
    folder = _folder(job, to)
    shards = {file: [*places] for of_unit in facts.values() for file, places in of_unit.items()}
    extra = _copy_blobs(job, folder, next(iter(shards)))
    with (folder / _METADATA).open("wb") as file:
        pickle.dump(_metadata(job, shards, extra), file)
    copy_companions(job.plan.newest.path, to)
    (to / PROVENANCE).write_text(job.said[SAID] + "\n", encoding="utf-8")
    return []


def _copy_blobs(job: Job, folder: Path, into: str) -> dict[str, tuple[str, int, int]]:
    """Write the extra states of the newest checkpoint after the shards of a file; return where they are."""
    places = dict[str, tuple[str, int, int]]()
    with (folder / into).open("ab") as file:
        for fqn, (_, data) in job.plan.newest.blobs.items():
            places[fqn] = into, file.tell(), len(data)
            file.write(data)
    return places


def _metadata(job: Job, shards: Mapping[str, Sequence[Any]], extra: Mapping[str, tuple[str, int, int]]) -> object:
    from torch.distributed.checkpoint import metadata as dcp  # noqa: PLC0415  it takes half a second
    from torch.distributed.checkpoint.filesystem import _StorageInfo  # noqa: PLC0415

    saved, tensors = _saved(job), job.plan.tensors
    items, keys, places = dict[str, Any](), dict[str, Any](), dict[Any, Any]()
    numbers = dict[tuple[str, torch.Size], int]()  # of the shards of a tensor, by where they begin
    for name in job.plan.names:
        of, one = saved[name], tensors[name]
        chunks = [
            dcp.ChunkStorageMetadata(torch.Size(a for a, _ in box), torch.Size(b - a for a, b in box))
            for box, _ in of.shards
        ]
        properties = dcp.TensorProperties(dtype=one.dtype)
        items[of.fqn] = dcp.TensorStorageMetadata(properties, torch.Size(one.shape), chunks)
        keys[of.fqn] = of.keys
        numbers |= {(name, torch.Size(a for a, _ in box)): i for i, (box, _) in enumerate(of.shards)}
    for file, inside in shards.items():
        for name, box, begin, length in inside:
            offset = torch.Size(a for a, _ in box)
            places[dcp.MetadataIndex(saved[name].fqn, offset, numbers[name, offset])] = _StorageInfo(
                file, begin, length
            )
    for fqn, (file, begin, length) in extra.items():
        items[fqn] = dcp.BytesStorageMetadata()
        keys[fqn] = job.plan.newest.blobs[fqn][0]
        places[dcp.MetadataIndex(fqn)] = _StorageInfo(file, begin, length)
    return dcp.Metadata(items, keys, places)
