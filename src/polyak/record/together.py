"""A record that several ranks write together, each its part, through ``torch.distributed.checkpoint`` (DCP).

DCP plans who writes what, so that each number is written once, and gathers what went wrong where. What a rank writes is
a safetensors file that DCP's own ``HuggingFaceStorageReader`` reads too.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner, StorageWriter, save
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from polyak.errors import RecordError
from polyak.record.files import OFFSETS, PARTS, PASSING, PLACES, Source, Written
from polyak.sharding import Ranks
from polyak.storage.atomic import flush, flush_folder
from polyak.storage.safetensors import TensorInfo, disk_errors, write_tensors

T = TypeVar("T")


class Together:
    """The ranks that write one record. Each must do the same calls in the same order.

    Args:
        ranks: They, in a group that nobody else uses.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._planner = _Planner()

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that does what one must do alone."""
        return self._ranks.rank == 0

    def first(self, act: Callable[[], T]) -> T:
        """Return what ``act`` returns on the first rank; where it fails there, fail everywhere.

        Args:
            act: Done by the first alone.

        Raises:
            ShardingError: On the others, if it failed.
        """
        return self._ranks.on_rank_0(act)

    def agree(self, what: str, facts: Mapping[str, Any]) -> None:
        """Check that all say the same.

        Args:
            what: What they must agree on.
            facts: By name.

        Raises:
            ShardingError: If they do not.
        """
        self._ranks.agree(what, facts)

    def write(
        self,
        folder: Path,
        tensors: Mapping[str, TensorInfo],
        like: Mapping[str, Tensor],
        source: Source,
        metadata: Mapping[str, str],
    ) -> Written:
        """Write a stretch under a passing name, and see that it is on disk.

        Args:
            folder: Of the record.
            tensors: What is written.
            like: Tensors that lie over the ranks as what is written does. Where several hold the same the first of
                them writes it.
            source: Gives the values, where they are wanted.
            metadata: For the headers.

        Raises:
            RecordError: If that failed on any rank; it says where and why.
        """
        parts = _Parts(folder, tensors, source, metadata)
        try:
            group = self._ranks.group
            return save(dict(like), storage_writer=parts, planner=self._planner, process_group=group).storage_data
        except CheckpointException as error:
            said = "; ".join(f"rank {rank}: {one}" for rank, (one, _) in sorted(error.failures.items()))
            raise RecordError(f"all ranks must write their parts of a stretch, and it failed on {said}") from error
        except RuntimeError as error:
            raise RecordError(f"all ranks must write their parts of a stretch, and one is gone: {error}") from error

    def close(self) -> None:
        """Let the group go."""
        self._ranks.close()


class _Planner(DefaultSavePlanner):
    """Plans once: what a rank holds stays the same, and planning takes as long as there are shards on all ranks."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True)
        self._own: list[WriteItem] | None = None

    def create_local_plan(self) -> SavePlan:
        """Return what this rank could write."""
        return super().create_local_plan() if self._own is None else SavePlan([])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Return what each rank writes."""
        return super().create_global_plan(all_plans) if self._own is None else (all_plans, Metadata({}))

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Return what this rank writes."""
        if self._own is None:
            self._own = new_plan.items
        return replace(new_plan, items=self._own)


@dataclass(frozen=True)
class _Share:
    """What the first rank tells another beside the plan."""

    folder: str
    rank: int


class _Parts(StorageWriter):
    """Where DCP writes one stretch."""

    def __init__(
        self, folder: Path, tensors: Mapping[str, TensorInfo], source: Source, metadata: Mapping[str, str]
    ) -> None:
        self._folder = folder
        self._tensors = tensors
        self._source = source
        self._metadata = metadata
        # Never the same twice: a process that a restart has left over must not write among the parts of a new one.
        self._passing = folder / f"stretch-{uuid.uuid4().hex}{PASSING}"

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: this is for one stretch."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether DCP may choose this by itself."""
        del checkpoint_id
        return False

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the folder that all write to."""
        del args, kwargs
        if is_coordinator:
            self._passing.mkdir()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return what this rank could write."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell each rank where to write."""
        return [replace(plan, storage_data=_Share(self._passing.name, rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the part of this rank; it needs no file for nothing."""
        del planner
        share: _Share = plan.storage_data
        chunks = {item.index.fqn: item.tensor_data.chunk for item in plan.items if item.tensor_data is not None}
        boxes = {
            name: tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
            for name, chunk in chunks.items()
            if prod(chunk.sizes)
        }
        infos = {name: replace(self._tensors[name], shape=tuple(chunks[name].sizes)) for name in boxes}
        places = {name: {OFFSETS: list(chunks[name].offsets)} for name in sorted(boxes)}
        results = []
        if boxes:
            path = self._folder / share.folder / f"{share.rank:05d}.safetensors"
            metadata = {**self._metadata, PLACES: json.dumps(places)}
            with disk_errors(f"writing {path}"), self._source as read:
                size_bytes, sha256 = write_tensors(path, infos, lambda name: read(name, boxes[name]), metadata)
            results.append(WriteResult(MetadataIndex(path.name), size_bytes, sha256))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """List the parts, once the first rank sees all of them. What DCP returns says what was written."""
        parts = [part for of_rank in results for part in of_rank]
        with disk_errors(f"writing {self._passing}"):
            for part in parts:
                path = self._passing / part.index.fqn
                if not path.exists() or path.stat().st_size != part.size_in_bytes:
                    raise RecordError(
                        f"all ranks must write to one folder, and the first does not see {path}: record to a disk that "
                        "all machines share"
                    )
            listed = {p.index.fqn: {"size_bytes": p.size_in_bytes, "sha256": p.storage_data} for p in parts}
            text = json.dumps(listed, indent=1).encode() + b"\n"
            with (self._passing / PARTS).open("wb") as file:
                file.write(text)
                flush(file)
            flush_folder(self._passing)
        size_bytes = sum(part.size_in_bytes for part in parts)
        metadata.state_dict_metadata = {}  # it would be sent to all
        metadata.storage_data = Written(self._passing, size_bytes, hashlib.sha256(text).hexdigest(), sharded=True)
