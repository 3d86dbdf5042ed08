"""The record on disk: means of the weights over stretches of the run, in safetensors files, and their manifest.

``docs/record-format.md`` describes the format. What can be read out of a record is in ``polyak.posthoc``.
"""

from polyak.record.appender import Appender, Ended
from polyak.record.files import (
    Box,
    StretchFile,
    cast,
    check_content,
    check_size,
    disk_errors,
    hash_in,
    open_stretch,
    whole,
    write_tensors,
)
from polyak.record.manifest import Edge, Manifest, Pin, RecordError, Stretch, TensorInfo, load_manifest
from polyak.record.store import Writer

__all__ = [
    "Appender",
    "Box",
    "Edge",
    "Ended",
    "Manifest",
    "Pin",
    "RecordError",
    "Stretch",
    "StretchFile",
    "TensorInfo",
    "Writer",
    "cast",
    "check_content",
    "check_size",
    "disk_errors",
    "hash_in",
    "load_manifest",
    "open_stretch",
    "whole",
    "write_tensors",
]
