"""Models that are sharded over processes: their tensors, the ranks that hold them, and how these communicate."""

from polyak.sharding.communicator import (
    Communicator,
    OneProcess,
    Ranks,
    communicator_of,
    pipeline_communicator_of,
)
from polyak.sharding.experts import Places, declare_experts, declared, has_experts
from polyak.sharding.groups import pipeline_of
from polyak.sharding.parts import ModelParts
from polyak.sharding.start import start_process_group
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
    sharded_over,
    unwrapped,
)
from polyak.sharding.wrapped import rewrapped, scales

# Earlier names.
beside, has_spread, is_spread, whole = sharded_like, has_sharded, is_sharded, full

__all__ = [
    "Communicator",
    "ModelParts",
    "OneProcess",
    "Places",
    "Ranks",
    "beside",
    "communicator_of",
    "copy_",
    "declare_experts",
    "declared",
    "divided",
    "empty",
    "full",
    "gather",
    "has_experts",
    "has_sharded",
    "has_spread",
    "is_fsdp",
    "is_initialized",
    "is_sharded",
    "is_spread",
    "local",
    "offset",
    "pipeline_communicator_of",
    "pipeline_of",
    "reshard",
    "reshard_after_an_error",
    "rewrapped",
    "rows",
    "scales",
    "sharded_like",
    "sharded_over",
    "start_process_group",
    "unwrapped",
    "whole",
]
