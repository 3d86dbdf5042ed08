"""Models that are sharded over processes: their tensors, the ranks that hold them, and what those must agree on."""

from polyak.sharding.groups import refuse_stage
from polyak.sharding.ranks import Ranks
from polyak.sharding.tensors import (
    beside,
    copy_,
    divided,
    empty,
    gather,
    has_spread,
    is_fsdp,
    is_initialized,
    is_spread,
    local,
    offset,
    reshard,
    reshard_after_an_error,
    rows,
    whole,
)

__all__ = [
    "Ranks",
    "beside",
    "copy_",
    "divided",
    "empty",
    "gather",
    "has_spread",
    "is_fsdp",
    "is_initialized",
    "is_spread",
    "local",
    "offset",
    "refuse_stage",
    "reshard",
    "reshard_after_an_error",
    "rows",
    "whole",
]
