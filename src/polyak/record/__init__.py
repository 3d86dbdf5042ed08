"""The record of a run: writes and reads means of the weights over segments of training, in safetensors files.

``docs/record-format.md`` describes the format.
"""

from polyak.checkpoints.series.averages import Said
from polyak.errors import RecordError
from polyak.record.appender import Appender, Ended
from polyak.record.files import Box, SegmentFile, check_content, check_size, full_box, hash_in, open_segment
from polyak.record.fitting import Fit, coefficients, error_estimate, finest, fit, shares
from polyak.record.manifest import Edge, Manifest, Pin, Segment, load_manifest
from polyak.record.reader import Record
from polyak.record.recommendation import Comparison, Recommendation
from polyak.record.recorder import Recorder
from polyak.record.writer import Writer
from polyak.storage.safetensors import TensorInfo, cast, disk_errors, write_tensors

# Earlier names.
Stretch, StretchFile, open_stretch, whole = Segment, SegmentFile, open_segment, full_box

__all__ = [
    "Appender",
    "Box",
    "Comparison",
    "Edge",
    "Ended",
    "Fit",
    "Manifest",
    "Pin",
    "Recommendation",
    "Record",
    "RecordError",
    "Recorder",
    "Said",
    "Segment",
    "SegmentFile",
    "Stretch",
    "StretchFile",
    "TensorInfo",
    "Writer",
    "cast",
    "check_content",
    "check_size",
    "coefficients",
    "disk_errors",
    "error_estimate",
    "finest",
    "fit",
    "full_box",
    "hash_in",
    "load_manifest",
    "open_segment",
    "open_stretch",
    "shares",
    "whole",
    "write_tensors",
]
