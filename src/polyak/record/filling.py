"""Fills a model with an average of a record; each rank fills its shards."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from polyak.errors import MismatchError
from polyak.record.combining import combine
from polyak.record.files import Box, SegmentFile, full_box
from polyak.record.fitting import Fit
from polyak.record.passes import averaged_as, opened, weights
from polyak.sharding import local, offset, pipeline_of, reshard
from polyak.tensors.slots import all_slots, places_of

if TYPE_CHECKING:
    from polyak.record.reader import Record


@torch.no_grad()
def fill(record: "Record", model: nn.Module, fitted: Fit) -> None:
    """Overwrite the tensors of a model with their average.

    Args:
        record: What is read.
        model: The model with the recorded names; each rank has its shards.
        fitted: What ``fit`` returned for the average.

    Raises:
        MismatchError: If a recorded tensor is missing from the model or has another shape.
        RecordError: If a file is damaged, or a value is infinite in the dtype of the model.
    """
    reshard(model)
    places = places_of(model)
    tensors = places.as_full({slot.name: slot.tensor.detach() for slot in all_slots(model)})
    here = {name for name in record.tensors if name in tensors}
    shapes = {name: (record.tensors[name].shape, tuple(tensors[name].shape)) for name in here}
    misshaped = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    elsewhere = places.partial or bool(pipeline_of(model))
    missing = set[str]() if elsewhere else record.tensors.keys() - here
    if misshaped or missing:
        raise MismatchError("the model must have the recorded tensors", missing=missing, misshaped=misshaped)
    with opened(record, fitted.segments, raw=bool(fitted.raw)) as files:
        for name in record.tensors:
            if name in here:
                _fill(record, files, name, tensors[name], fitted)


def _fill(record: "Record", files: Sequence[SegmentFile], name: str, tensor: Tensor, fitted: Fit) -> None:
    shard = local(tensor)
    info = replace(averaged_as(record.tensors[name], None), shape=tuple(shard.shape))
    if not shard.numel():
        return
    at = offset(tensor) or (0,) * shard.dim()
    box: Box = tuple(slice(a + b.start, a + b.stop) for a, b in zip(at, full_box(shard.shape), strict=True))
    if not info.averaged:
        shard.copy_(files[len(fitted.segments) - 1].read(name, box))
        return
    shares = weights(fitted, len(fitted.segments), raw=bool(fitted.raw))
    result = torch.empty(shard.shape, dtype=info.dtype)
    combine([_Shard(file, box) for file in files], name, info, [shares], [result])
    shard.copy_(result)


class _Shard:
    """A segment as one rank reads it: boxes are counted from the first element of the rank's shard."""

    def __init__(self, file: SegmentFile, box: Box) -> None:
        self._file, self._box = file, box

    def read(self, name: str, box: Box | None = None, before: Tensor | None = None) -> Tensor:
        """Return the local shard of a tensor, or a box of it."""
        if box is None:
            return self._file.read(name, self._box, before)
        pairs = zip(self._box, box, strict=True)
        return self._file.read(name, tuple(slice(o.start + b.start, o.start + b.stop) for o, b in pairs), before)
