"""Writes segments on several ranks together, each its shards, through ``torch.distributed.checkpoint`` (DCP).

DCP plans which rank writes what, so that each number is written once, and gathers the errors. What a rank writes is a
safetensors file that DCP's ``HuggingFaceStorageReader`` reads too.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import StorageWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from polyak.errors import CheckpointError, RecordError
from polyak.record.differences import SCALE, with_scales
from polyak.record.files import OFFSETS, PARTS, PLACES, Source
from polyak.record.output import Written
from polyak.sharding import Communicator, dcp
from polyak.storage.atomic import TEMPORARY, flush, flush_folder
from polyak.storage.safetensors import TensorInfo, disk_errors, write_tensors


class ShardFiles:
    """Writes each segment to a folder with a file of each rank. All ranks must make the same calls in the same order.

    Args:
        ranks: The ranks, in a group that nothing else uses.
    """

    def __init__(self, ranks: Communicator) -> None:
        self._ranks = ranks
        self._planner = dcp.PlanOnce()

    def write(
        self,
        folder: Path,
        tensors: Mapping[str, TensorInfo],
        like: Mapping[str, Tensor],
        source: Source,
        metadata: Mapping[str, str],
    ) -> Written:
        """Write a segment; see ``Output``. Equal tensors of several ranks are written by the lowest of them.

        Args:
            folder: The folder of the record.
            tensors: What is written.
            like: Tensors that are sharded as what is written is.
            source: Gives the values.
            metadata: The metadata for the headers of the files.

        Raises:
            RecordError: If a rank failed; it says which, and why.
        """
        writer = _ShardWriter(folder, tensors, source, metadata)
        try:
            return dcp.save(like, writer, self._ranks.group, self._planner).storage_data
        except CheckpointError as error:
            raise RecordError(str(error)) from error
        except RuntimeError as error:
            raise RecordError(f"all ranks must write their shards, and one has ended: {error}") from error


@dataclass(frozen=True)
class _Destination:
    """What rank 0 sends to each rank with the plan: the folder of the segment, and the number in the file's name."""

    folder: str
    rank: int


class _ShardWriter(StorageWriter):
    """What DCP calls to write one segment."""

    def __init__(
        self, folder: Path, tensors: Mapping[str, TensorInfo], source: Source, metadata: Mapping[str, str]
    ) -> None:
        self._folder = folder
        self._tensors = tensors
        self._source = source
        self._metadata = metadata
        # Never the same twice: a process that outlives a restart must not write among the files of a new one.
        self._temporary = folder / f"stretch-{uuid.uuid4().hex}{TEMPORARY}"

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: this object is for one segment."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether DCP may choose this writer by itself."""
        del checkpoint_id
        return False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the folder that all ranks write to."""
        del args, kwargs
        if is_coordinator:
            self._temporary.mkdir()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return what this rank could write."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Add to the plan of each rank where to write."""
        return [replace(plan, storage_data=_Destination(self._temporary.name, rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the shards of this rank; write no file if there are none."""
        del planner
        to: _Destination = plan.storage_data
        chunks = {item.index.fqn: item.tensor_data.chunk for item in plan.items if item.tensor_data is not None}
        boxes = {
            name: tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
            for name, chunk in chunks.items()
            if prod(chunk.sizes)
        }
        infos = with_scales({name: replace(self._tensors[name], shape=tuple(chunks[name].sizes)) for name in boxes})
        of = {name: name if name in boxes else name.removesuffix(SCALE) for name in sorted(infos)}  # scales too
        places = {name: {OFFSETS: list(chunks[tensor].offsets)} for name, tensor in of.items()}
        results = []
        if boxes:
            path = self._folder / to.folder / f"{to.rank:05d}.safetensors"
            metadata = {**self._metadata, PLACES: json.dumps(places)}
            with disk_errors(f"writing {path}"), self._source as read:
                size_bytes, sha256 = write_tensors(path, infos, lambda name: read(name, boxes[of[name]]), metadata)
            results.append(WriteResult(MetadataIndex(path.name), size_bytes, sha256))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """List the files, once rank 0 sees all of them; put what was written into what DCP returns."""
        written = [one for of_rank in results for one in of_rank]
        with disk_errors(f"writing {self._temporary}"):
            for one in written:
                path = self._temporary / one.index.fqn
                if not path.exists() or path.stat().st_size != one.size_in_bytes:
                    raise RecordError(
                        f"all ranks must write to one folder, and rank 0 does not see {path}: record to a disk that "
                        "all machines share"
                    )
            listed = {o.index.fqn: {"size_bytes": o.size_in_bytes, "sha256": o.storage_data} for o in written}
            text = json.dumps(listed, indent=1).encode() + b"\n"
            with (self._temporary / PARTS).open("wb") as file:
                file.write(text)
                flush(file)
            flush_folder(self._temporary)
        size_bytes = sum(one.size_in_bytes for one in written)
        metadata.state_dict_metadata = {}  # DCP would send it to all ranks
        metadata.storage_data = Written(self._temporary, size_bytes, hashlib.sha256(text).hexdigest(), sharded=True)
