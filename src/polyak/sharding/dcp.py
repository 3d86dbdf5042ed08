"""Saves and loads sharded tensors with ``torch.distributed.checkpoint`` (DCP). No other module calls it to do so.

Importing it takes half a second, so it is imported where it is used. Each rank writes its own shards. Tensors that
several ranks have, such as buffers, are written by rank 0.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from polyak.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class PlanOnce(dcp.DefaultSavePlanner):
    """Plans the first of many saves of the same layout, and uses that plan for the rest.

    Planning takes time in proportion to the number of shards on all ranks.
    """

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


def save(
    state: Mapping[str, Any],
    to: Path | dcp.StorageWriter,
    group: "ProcessGroup | None" = None,
    planner: dcp.DefaultSavePlanner | None = None,
) -> Metadata:
    """Save tensors in shards; return DCP's description of them. All ranks of the group must call this.

    Args:
        state: Tensors, and containers of them, by name.
        to: A folder, or a writer of another format.
        group: The ranks; None for all.
        planner: A ``PlanOnce`` for many saves of one layout.

    Raises:
        CheckpointError: If a rank failed; it says which, and why.
    """
    writer = dcp.FileSystemWriter(to) if isinstance(to, Path) else to
    planner = planner or dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    try:
        return dcp.save(dict(state), storage_writer=writer, planner=planner, process_group=group)
    except dcp.CheckpointException as error:  # which is no Exception
        raise CheckpointError(f"all ranks must write their shards, and it failed on {_failures(error)}") from error


def load(state: dict[str, Any], folder: Path, group: "ProcessGroup | None" = None, *, alone: bool = False) -> None:
    """Overwrite tensors with those that ``save`` saved, on the same ranks or others. All ranks must call this.

    Args:
        state: Tensors, and containers of them, by name. Each rank reads what its shards need.
        folder: As given to ``save``.
        group: The ranks; None for all.
        alone: Whether this process reads by itself, even if it is one of several.

    Raises:
        CheckpointError: If the files cannot be read.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        reader = dcp.FileSystemReader(folder)
        no_dist = alone or not distributed.is_initialized()
        try:
            dcp.load(state, storage_reader=reader, process_group=group, no_dist=no_dist)
        except dcp.CheckpointException as error:
            raise CheckpointError(f"the shards in {folder} cannot be read: {_failures(error)}{_hint(error)}") from error


def _hint(error: dcp.CheckpointException) -> str:
    """Return the advice for a checkpoint that has no state of an algorithm that the run has now."""
    missing = any("Missing key" in str(one) for one, _ in error.failures.values())
    return (
        "; if it was saved before the algorithm was added, load the rest by dcp.load(..., "
        "planner=DefaultLoadPlanner(allow_partial_load=True)), and averaging begins with the weights that are loaded"
        if missing
        else ""
    )


def _failures(error: dcp.CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {one}" for rank, (one, _) in sorted(error.failures.items()))
