"""Models that are sharded over processes: their tensors, the ranks that hold them, and how these communicate."""

from polyak.sharding.communicator import Communicator, OneProcess, Ranks, communicator_of
from polyak.sharding.groups import refuse_stage
from polyak.sharding.tensors import (
    copy_,
    divided,
    empty,
    full,
    gather,
    has_sharded,
    is_fsdp,
    is_initialized,
    is_sharded,
    local,
    offset,
    reshard,
    reshard_after_an_error,
    rows,
    sharded_like,
)

# Earlier names.
beside, has_spread, is_spread, whole = sharded_like, has_sharded, is_sharded, full

__all__ = [
    "Communicator",
    "OneProcess",
    "Ranks",
    "beside",
    "communicator_of",
    "copy_",
    "divided",
    "empty",
    "full",
    "gather",
    "has_sharded",
    "has_spread",
    "is_fsdp",
    "is_initialized",
    "is_sharded",
    "is_spread",
    "local",
    "offset",
    "refuse_stage",
    "reshard",
    "reshard_after_an_error",
    "rows",
    "sharded_like",
    "whole",
]
