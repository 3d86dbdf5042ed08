"""The manifest of a record, which lists its segments. Everything in it is checked when it is read.

This module does not open the files that the manifest names.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Self

import torch

from polyak.errors import RecordError, TimeError
from polyak.record.differences import LONGEST, SCALE, is_difference
from polyak.storage.safetensors import DTYPE_NAMES, DTYPES, TensorInfo
from polyak.time import Time, Timestamp, TimeUnit

FORMAT = "polyak-record"
VERSION = 2
_DIFFERENCES = 3  # the version of records whose means are differences: earlier versions of polyak cannot read them
_READABLE = (1, VERSION, _DIFFERENCES)  # the first has no `raw`
MANIFEST = "manifest.json"

_SHA256 = re.compile(r"[0-9a-f]{64}")
# How the text of a manifest ends: with the hash of the text without this line.
_OWN_SHA256 = re.compile(r',\n "sha256": "([0-9a-f]{64})"\n}\n\Z')
SEGMENT_FILE = re.compile(r"\d{10,20}-\d{10,20}-[0-9a-f]{16}(\.safetensors)?")
_COUNTERS = (
    TimeUnit.ITERATION,
    TimeUnit.EPOCH,
    TimeUnit.BATCH,
    TimeUnit.SAMPLE,
    TimeUnit.TOKEN,
    TimeUnit.SECOND,
)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RecordError(message)


@dataclass(frozen=True, slots=True)
class Edge:
    """A moment at which one segment ends and the next begins.

    Args:
        updates: Updates recorded up to here, from 0 where the record begins.
        timestamp: The clock of the run.
    """

    updates: int
    timestamp: Timestamp

    def clock(self, unit: TimeUnit | None, max_duration: Time | None = None) -> float:
        """Read the clock in ``unit``; with None, count the recorded updates.

        Args:
            unit: Any unit.
            max_duration: The length of the run; needed for ``dur``.

        Raises:
            TimeError: For ``dur`` without ``max_duration``.
        """
        return float(self.updates) if unit is None else self.timestamp.elapsed(unit, max_duration)


@dataclass(frozen=True, slots=True)
class Segment:
    """A stored interval: the mean of the weights over the updates after ``start``, up to and including ``end``.

    Args:
        start: Where it begins.
        end: Where it ends.
        level: How often its updates were merged.
        size_bytes: Size of its file, or of all files in its folder.
        sha256: Hash of its file, or of the list of the files in its folder, in hexadecimal.
        sharded: Whether it is a folder with a file of each rank, as several ranks have written it together.
        before: The segment before, if this one has differences from it.
    """

    start: Edge
    end: Edge
    level: int
    size_bytes: int
    sha256: str
    sharded: bool = False
    before: "Segment | None" = field(default=None, repr=False)

    @property
    def num_differences(self) -> int:
        """How many segments up to this one are differences, each from the one before."""
        return 0 if self.before is None else 1 + self.before.num_differences

    @property
    def num_updates(self) -> int:
        """The number of updates that it is the mean of."""
        return self.end.updates - self.start.updates

    @property
    def file(self) -> str:
        """The name of its file or folder, which depends on the content: one name never has two contents."""
        name = f"{self.start.updates:010d}-{self.end.updates:010d}-{self.sha256[:16]}"
        return name if self.sharded else f"{name}.safetensors"

    def to_plain(self) -> dict[str, Any]:
        """Return the entry of the manifest."""
        before = {} if self.before is None else {"before": self.before.file}
        return {
            "file": self.file,
            "start": {"updates": self.start.updates, **self.start.timestamp.state_dict()},
            "end": {"updates": self.end.updates, **self.end.timestamp.state_dict()},
            "level": self.level,
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
            **before,
        }

    @classmethod
    def from_plain(cls, plain: object, where: str, before: "Segment | None" = None) -> Self:
        """Read an entry of a manifest.

        Args:
            plain: What ``to_plain`` returned, or any other object.
            where: Its place in the manifest, for errors.
            before: The segment of the entry before.

        Raises:
            RecordError: If a field is missing, unknown, of another type or out of range.
        """
        differs = isinstance(plain, dict) and "before" in plain
        names = ("file", "start", "end", "level", "size_bytes", "sha256", *(["before"] if differs else []))
        entry = _fields(plain, where, names)
        file = None if before is None else before.file
        _require(
            not differs or (file is not None and entry["before"] == file),
            f"{where}.before must be the file of the segment before, {file!r} (got {entry.get('before')!r})",
        )
        segment = cls(
            _edge(entry["start"], f"{where}.start"),
            _edge(entry["end"], f"{where}.end"),
            _count(entry["level"], f"{where}.level"),
            _count(entry["size_bytes"], f"{where}.size_bytes"),
            _string(entry["sha256"], f"{where}.sha256"),
            sharded=not _string(entry["file"], f"{where}.file").endswith(".safetensors"),
            before=before if differs else None,
        )
        _require(
            _SHA256.fullmatch(segment.sha256) is not None,
            f"{where}.sha256 must be 64 hexadecimal digits (got {segment.sha256!r})",
        )
        _require(
            entry["file"] == segment.file,
            f"{where}.file must be {segment.file!r}, as its edges and hash say (got {entry['file']!r})",
        )
        return segment


def segments_from_plain(plain: Sequence[object]) -> tuple[Segment, ...]:
    """Read the entries of a manifest.

    Args:
        plain: What ``to_plain`` of each segment returned, oldest first, or any other objects.

    Raises:
        RecordError: As ``Segment.from_plain``.
    """
    segments: list[Segment] = []
    for i, entry in enumerate(plain):
        segments.append(Segment.from_plain(entry, f"stretches[{i}]", segments[-1] if segments else None))
    return tuple(segments)


def linked(segments: Sequence[Segment]) -> list[Segment]:
    """Return segments whose differences are from the segments that are now before them.

    Args:
        segments: Oldest first. One before a difference may have been replaced by another that holds the same mean.
    """
    found: list[Segment] = []
    for segment in segments:
        found.append(segment if segment.before is None else replace(segment, before=found[-1]))
    return found


@dataclass(frozen=True, slots=True)
class Pin:
    """Files that stay on disk because a checkpoint refers to them.

    Args:
        files: Their names.
        path: The checkpoint, relative to the record's folder; None if that is not known.
    """

    files: tuple[str, ...]
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that a record holds, except the tensors.

    Args:
        tensors: What is kept, by name.
        per_level: Segments of one level that are kept in addition to the two that merge next, at least 1; None merges
            none.
        max_duration: The length of the run, if known, which times in ``dur`` refer to.
        aliases: Further names of tied tensors, and the name that each is kept under.
        segments: Oldest first, without gaps.
        pins: The pins, by name.
        raw: The raw weights where the last segment ends, as a segment of no updates, once the run has ended.

    Raises:
        RecordError: If they contradict each other.
    """

    tensors: Mapping[str, TensorInfo]
    per_level: int | None = 4
    max_duration: Time | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    segments: tuple[Segment, ...] = ()
    pins: Mapping[str, Pin] = field(default_factory=dict)
    raw: Segment | None = None

    def __post_init__(self) -> None:
        _require(
            self.per_level is None or self.per_level >= 1,
            f"per_level must be at least 1, or None to merge nothing (got {self.per_level!r})",
        )
        for name, info in self.tensors.items():
            _require(
                info.dtype in DTYPE_NAMES,
                f"a record cannot keep {name!r} as {info.dtype}: leave it out with the policy, or convert it to one of "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPE_NAMES)}",
            )
            _require(
                not is_difference(info) or f"{name}{SCALE}" not in self.tensors,
                f"the scales of {name!r} are kept as {name + SCALE!r}, which must not be the name of a tensor "
                "(got one): rename it, or record in float16",
            )
        for alias, name in self.aliases.items():
            _require(
                alias not in self.tensors and name in self.tensors,
                f"an alias must be a new name of a tensor in the record (got {alias!r} for {name!r})",
            )
        before: Segment | None = None
        for segment in self.segments:
            _check_segment(segment, before)
            before = segment
        if self.raw is not None:
            end = None if before is None else before.end
            _require(
                self.raw.start == self.raw.end == end,
                f"the raw weights {self.raw.file} must be those where the last segment ends",
            )

    @property
    def has_differences(self) -> bool:
        """Whether means are kept as differences where that is accurate enough."""
        return any(map(is_difference, self.tensors.values()))

    @property
    def files(self) -> set[str]:
        """The names of all files that must stay on disk."""
        return set(self.current_files).union(*(pin.files for pin in self.pins.values()))

    @property
    def current_files(self) -> tuple[str, ...]:
        """The names of the files that the record consists of, without those that only pins keep."""
        return tuple(one.file for one in (*self.segments, *filter(None, [self.raw])))

    def to_json(self) -> str:
        """Return the text of the manifest."""
        plain = {
            "format": FORMAT,
            "version": _DIFFERENCES if self.has_differences else VERSION,
            "per_level": self.per_level,
            "max_duration": None if self.max_duration is None else self.max_duration.to_timestring(),
            "tensors": {
                name: {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "averaged": info.averaged}
                for name, info in self.tensors.items()
            },
            "aliases": dict(self.aliases),
            "stretches": [segment.to_plain() for segment in self.segments],
            "raw": None if self.raw is None else self.raw.to_plain(),
            "pins": {name: {"files": list(pin.files), "path": pin.path} for name, pin in self.pins.items()},
        }
        text = json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        return text.removesuffix("\n}\n") + f',\n "sha256": "{_sha256_of(text)}"\n}}\n'

    @property
    def stretches(self) -> tuple[Segment, ...]:
        """The earlier name of ``segments``."""
        return self.segments

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the text of a manifest.

        Args:
            text: What ``to_json`` returned, or any other text.

        Raises:
            RecordError: If it is not a manifest, or one of a later version, if a field is wrong, or if it does not have
                the hash that it ends with. Manifests of older versions of polyak end without one.
        """
        try:
            plain = json.loads(text)
        except ValueError as error:
            raise RecordError(f"a manifest must be JSON ({error})") from None
        _require(
            isinstance(plain, dict) and plain.get("format") == FORMAT,
            f"a manifest must say that its format is {FORMAT!r}",
        )
        version = plain.get("version")
        _require(
            version in _READABLE and not isinstance(version, bool),
            f"this polyak reads versions {_READABLE[0]} to {_READABLE[-1]} of the record (got {version!r}): use the "
            "polyak that wrote it, or a later one",
        )
        names = ("format", "version", "per_level", "max_duration", "tensors", "aliases", "stretches", "pins")
        names = names if version == 1 else (*names, "raw")
        own_sha256 = plain.pop("sha256", None)
        entry = _fields(plain, "the manifest", names)
        per_level, max_duration, segments = entry["per_level"], entry["max_duration"], entry["stretches"]
        _require(isinstance(segments, list), f"`stretches` must be a list (got {type(segments).__name__})")
        manifest = cls(
            tensors={
                name: _tensor_info(info, f"tensors[{name!r}]") for name, info in _object(entry["tensors"], "tensors")
            },
            per_level=None if per_level is None else _count(per_level, "per_level"),
            max_duration=None if max_duration is None else _duration(max_duration),
            aliases={
                alias: _string(name, f"aliases[{alias!r}]") for alias, name in _object(entry["aliases"], "aliases")
            },
            segments=segments_from_plain(segments),
            pins={name: _pin(pin, f"pins[{name!r}]") for name, pin in _object(entry["pins"], "pins")},
            raw=None if entry.get("raw") is None else Segment.from_plain(entry["raw"], "raw"),
        )
        _require(
            own_sha256 is None or _has_own_sha256(text),
            "a manifest must have the SHA-256 that it ends with: it is damaged, restore it from a copy; if it was "
            'edited on purpose, remove its "sha256"',
        )
        return manifest


def _sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _has_own_sha256(text: str) -> bool:
    end = _OWN_SHA256.search(text)
    return end is not None and _sha256_of(text[: end.start()] + "\n}\n") == end[1]


def load_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of the record in ``folder``.

    Args:
        folder: Where the record is.

    Raises:
        RecordError: If there is none, or something in it is wrong.
    """
    path = folder / MANIFEST
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(
            f"a record must have a {MANIFEST}, and there is none in {folder}: give the folder of a record"
        ) from None
    except (RecordError, OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} cannot be read as the manifest of a record: {error}") from error


def _check_segment(segment: Segment, before: Segment | None) -> None:
    where = f"the segment {segment.file}"
    _require(segment.num_updates > 0, f"{where} must end after it starts")
    if before is None:
        _require(segment.start.updates == 0, f"{where} is the first and must start at update 0")
    else:
        _require(segment.start == before.end, f"{where} must start where {before.file} ends")
        _require(segment.level <= before.level, f"{where} must not be merged more often than the older {before.file}")
    _require(
        segment.before is None or (segment.before == before and segment.level == segment.before.level),
        f"{where} must have its differences from the segment before, on the same level",
    )
    _require(segment.num_differences <= LONGEST, f"{where} must not be the last of more than {LONGEST} differences")
    for unit in _COUNTERS:
        start, end = segment.start.timestamp.get(unit), segment.end.timestamp.get(unit)
        _require(start <= end, f"{where} must not go back in time (from {start} to {end})")


def _object(plain: object, where: str) -> list[tuple[str, object]]:
    if not isinstance(plain, dict):
        raise RecordError(f"{where} must be an object (got {plain!r})")
    return list(plain.items())


def _fields(plain: object, where: str, names: tuple[str, ...]) -> dict[str, Any]:
    entry = dict(_object(plain, where))
    missing, unknown = sorted(set(names) - set(entry)), sorted(set(entry) - set(names))
    _require(
        not missing and not unknown, f"{where} must have the fields {names} (missing {missing}, unknown {unknown})"
    )
    return entry


def _count(plain: object, where: str) -> int:
    if not isinstance(plain, int) or isinstance(plain, bool) or plain < 0:
        raise RecordError(f"{where} must be a whole number of at least 0 (got {plain!r})")
    return plain


def _number(plain: object, where: str) -> int | float:
    if isinstance(plain, float) and math.isfinite(plain) and plain >= 0:
        return plain
    return _count(plain, where)


def _string(plain: object, where: str) -> str:
    if not isinstance(plain, str):
        raise RecordError(f"{where} must be a string (got {plain!r})")
    return plain


def _duration(plain: object) -> Time:
    try:
        duration = Time.from_timestring(_string(plain, "max_duration"))
    except TimeError as error:
        raise RecordError(f"max_duration: {error}") from None
    _require(duration.value > 0 and duration.unit is not TimeUnit.DURATION, f"max_duration cannot be {duration}")
    return duration


def _edge(plain: object, where: str) -> Edge:
    names = tuple(Timestamp().state_dict())
    entry = _fields(plain, where, ("updates", *names))
    epoch_length = entry.pop("epoch_length")
    timestamp = {name: _number(entry[name], f"{where}.{name}") for name in names if name != "epoch_length"}
    length = None if epoch_length is None else _count(epoch_length, f"{where}.epoch_length")
    return Edge(
        _count(entry["updates"], f"{where}.updates"),
        Timestamp.from_state_dict({**timestamp, "epoch_length": length}),
    )


def _tensor_info(plain: object, where: str) -> TensorInfo:
    entry = _fields(plain, where, ("dtype", "shape", "averaged"))
    dtype = DTYPES.get(_string(entry["dtype"], f"{where}.dtype"))
    if dtype is None:
        raise RecordError(f"{where}.dtype must be one of {', '.join(DTYPES)} (got {entry['dtype']!r})")
    _require(isinstance(entry["shape"], list), f"{where}.shape must be a list (got {entry['shape']!r})")
    _require(isinstance(entry["averaged"], bool), f"{where}.averaged must be true or false (got {entry['averaged']!r})")
    _require(
        not entry["averaged"] or dtype.is_floating_point or dtype.is_complex or dtype == torch.int8,
        f"{where} cannot be averaged as {entry['dtype']}",
    )
    return TensorInfo(dtype, tuple(_count(size, f"{where}.shape") for size in entry["shape"]), entry["averaged"])


def _pin(plain: object, where: str) -> Pin:
    entry = _fields(plain, where, ("files", "path"))
    _require(isinstance(entry["files"], list), f"{where}.files must be a list (got {entry['files']!r})")
    for name in entry["files"]:
        _require(
            SEGMENT_FILE.fullmatch(_string(name, f"{where}.files")) is not None,
            f"{where}.files must be names of segment files (got {name!r})",
        )
    path = None if entry["path"] is None else _string(entry["path"], f"{where}.path")
    _require(path is None or not PurePosixPath(path).is_absolute(), f"{where}.path must be relative (got {path!r})")
    return Pin(tuple(entry["files"]), path)


Stretch = Segment  # its earlier name
