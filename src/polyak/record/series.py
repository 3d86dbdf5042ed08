"""``Record.from_checkpoints``: a record whose segments are checkpoints that another library wrote."""

import hashlib
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from polyak.checkpoints.series import Average, Options, Said, Series, open_series
from polyak.checkpoints.stored import Files, StoredTensor
from polyak.checkpoints.weights import is_extra_state
from polyak.compat.saved import Checksum
from polyak.compat.words import shown
from polyak.errors import RecordError
from polyak.profiles import Profile, named
from polyak.record.basis import basis_of
from polyak.record.files import Box, SegmentFile, full_box
from polyak.record.manifest import Edge, Segment
from polyak.record.passes import Passes
from polyak.record.reader import Record
from polyak.record.stored import StoredAverage
from polyak.storage.safetensors import TensorInfo
from polyak.time import Time, Timestamp, TimeUnit

_COUNTERS = {
    TimeUnit.BATCH: "batch",
    TimeUnit.EPOCH: "epoch",
    TimeUnit.SAMPLE: "sample",
    TimeUnit.TOKEN: "token",
    TimeUnit.ITERATION: "iteration",
}
# After reading so much, the memory of the files is let go.
_HELD_BYTES = 32 << 20
# A sample of the tensors, from which it is estimated how much rounding matters: numbers of each, tensors, checkpoints.
_SAMPLE, _SAMPLED_TENSORS, _SAMPLED_AVERAGES = 2048, 64, 64
# What rounding to a dtype loses of a number on average, relative to half of the largest relative step.
_LOST = 0.4
# As much is assumed of weights that do not move, or by less than what rounding loses.
_MOST_LOST = 1e-2


class SeriesFile(SegmentFile):
    """A checkpoint that is read like the file of a segment.

    Args:
        name: The name of the average, for people.
        tensors: The tensors, by name.
        files: The files that the tensors are in.
        held: How many bytes were read since the memory was let go: a list of one number, for all checkpoints.
        all_files: The files of all checkpoints.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, StoredTensor],
        files: Files,
        held: list[int],
        all_files: Sequence[Files],
    ) -> None:
        super().__init__({}, {})
        self._name, self._found, self._files = name, tensors, files
        self._held, self._all = held, all_files

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which the checkpoint keeps a tensor.

        Args:
            name: The tensor's name.
        """
        return self._found[name].dtype

    def read(self, name: str, box: Box | None = None, before: Tensor | None = None) -> Tensor:
        """Return a tensor, backed by the file: do not write to it.

        Args:
            name: The tensor's name.
            box: Some of its rows; None for all.
            before: Not used: a checkpoint has no differences.

        Raises:
            CheckpointError: If the file is damaged.
            RecordError: If the tensor has NaN or inf.
        """
        del before
        stored = self._found[name]
        sides = full_box(stored.shape) if box is None else box
        shape = tuple(side.stop - side.start for side in sides)
        row = torch.Size(stored.shape[1:]).numel()
        first, last = (sides[0].start * row, sides[0].stop * row) if sides else (0, 1)
        unchecked = len(self._files.unchecked)
        found = stored.read(first, last).reshape(shape)
        if len(self._files.unchecked) < unchecked:  # all of the tensor was read, for its checksum
            self._files.release()
        if found.dtype.is_floating_point and not bool(found.sum(dtype=torch.float64).isfinite()):
            raise RecordError(
                f"weights must be finite ({shown(name)} in {self._name} has NaN or inf); leave this checkpoint out"
            )
        self._held[0] += found.numel() * found.dtype.itemsize
        if self._held[0] > _HELD_BYTES:
            self._held[0] = 0
            for files in self._all:
                files.release()
        return found


class SeriesRecord(Record):
    """A record that is read from checkpoints. ``Record.from_checkpoints`` makes it.

    Args:
        series: The averages in the checkpoints.
        max_duration: The length of the run, if it is known.
        arguments: The arguments with which commands open it; None if a command line cannot express them.

    Attributes:
        kind: What the checkpoints are, for people.
        left_out: What is in their folders and was not taken, with the reason.
    """

    def __init__(self, series: Series, max_duration: Time | None, arguments: str | None) -> None:
        averages = list(series.averages)
        newest = averages[-1].checkpoint
        self.kind, self.left_out = series.kind, tuple(series.left_out)
        self.folder = _folder([one.checkpoint.path for one in averages])
        self.tensors = {
            name: _info(tensor, averaged=name not in averages[-1].copied)
            for name, tensor in newest.tensors.items()
            if not is_extra_state(name)
        }
        self.aliases = {}
        self._arguments = arguments
        self.max_duration = max_duration
        self._averages, self._held = averages, [0]
        self._passes, self._verified = Passes(), set[Path]()
        self.segments = self._with_rounding(tuple(_segments(series, averages)))
        self._raw = series.raw
        self.raw = None if series.raw is None else replace(_stored(self.segments[-1]), name=f"{averages[-1].name}:raw")

    @property
    def arguments(self) -> str | None:
        """The arguments with which commands open it; None if a command line cannot express them."""
        return self._arguments

    def open(self, segment: Segment) -> AbstractContextManager[SegmentFile]:
        """Return a checkpoint for the length of a ``with`` block; its ``read(name)`` returns one tensor.

        Args:
            segment: One of ``segments``.

        Raises:
            CheckpointError: If the file has changed since it was opened.
        """
        one = self._averages[_stored(segment).index]
        one.checkpoint.files.require_unchanged()
        every = [average.checkpoint.files for average in self._averages]
        return nullcontext(SeriesFile(one.name, one.checkpoint.tensors, one.checkpoint.files, self._held, every))

    def open_raw(self) -> AbstractContextManager[SegmentFile]:
        """Open the raw weights of the last moment for the length of a ``with`` block.

        Raises:
            RecordError: If the newest checkpoint does not have them.
        """
        newest = self._averages[-1]
        every = [average.checkpoint.files for average in self._averages]
        return nullcontext(SeriesFile(newest.name, self._raw_tensors(), newest.checkpoint.files, self._held, every))

    def raw_weights(self, *, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """Return the raw weights of the last moment, if the newest checkpoint has them.

        Args:
            device: The device for the result; None for the CPU.

        Raises:
            RecordError: If it does not.
        """
        raw = self._raw_tensors()
        return {name: raw[name].whole().clone().to(device) for name in self.tensors if name in raw}

    def _raw_tensors(self) -> Mapping[str, StoredTensor]:
        if self._raw is None:
            raise RecordError(
                f"the raw weights must be in the newest checkpoint, and {self._averages[-1].name} has only averages; "
                "take them from another file"
            )
        return self._raw

    def verify(self) -> None:
        """Read all checkpoints and check those that have checksums.

        Raises:
            CheckpointError: If one is damaged.
            RecordError: If one has NaN or inf.
        """
        for segment in self.segments:
            with self.open(segment) as file:
                for name in self.tensors:
                    file.read(name)

    def _with_rounding(self, segments: tuple[StoredAverage, ...]) -> tuple[StoredAverage, ...]:
        """Return what each average's dtype loses, relative to how far the weights moved over the run."""
        step = max(1, len(segments) // _SAMPLED_AVERAGES)
        taken = segments[::-1][::step][::-1]
        sampled = [self._sample(one) for one in taken]
        losses = {name: torch.finfo(self._dtype(segments[-1], name)).eps / 2 * _LOST for name in sampled[-1]}
        lost = torch.tensor([sum((losses[name] * v.norm()) ** 2 for name, v in one.items()) for one in sampled])
        rows = torch.stack([torch.cat(list(one.values())) for one in sampled])
        moved = rows.diff(dim=0).square().sum(dim=1) - lost[1:] - lost[:-1]
        basis = basis_of(taken, self.max_duration)
        expected = basis.profiles.diff(dim=0).square() @ basis.weights
        variance = moved.clamp(min=0).sum() / expected.sum().clamp(min=1e-300)
        relative = (lost / variance.clamp(min=1e-300)).sqrt().clamp(max=_MOST_LOST)
        number = {one.index: float(relative[i]) for i, one in enumerate(taken)}
        nearest = [min(number, key=lambda i, one=one: abs(i - one.index)) for one in segments]
        return tuple(replace(one, rounding=number[i]) for one, i in zip(segments, nearest, strict=True))

    def _dtype(self, segment: StoredAverage, name: str) -> torch.dtype:
        return self._averages[segment.index].checkpoint.tensors[name].dtype

    def _sample(self, segment: StoredAverage) -> dict[str, Tensor]:
        checkpoint = self._averages[segment.index].checkpoint
        stored = checkpoint.tensors
        names = [name for name, info in self.tensors.items() if info.averaged and stored[name].numel]
        names = names[:: max(1, len(names) // _SAMPLED_TENSORS)]
        found = dict[str, Tensor]()
        # The checksum of a tensor is that of all of it, and is compared when it is averaged.
        unchecked, checkpoint.files.unchecked = checkpoint.files.unchecked, dict[int, Checksum]()
        for name in names:
            grain = stored[name].grain
            most = min(stored[name].numel, max(grain, _SAMPLE // grain * grain))
            values = stored[name].read(0, most)
            wide = torch.view_as_real(values).reshape(-1) if values.is_complex() else values
            found[name] = wide.to(torch.float64, copy=True).nan_to_num(0.0, 0.0, 0.0)
        checkpoint.files.unchecked = unchecked
        checkpoint.files.release()
        return found or {"": torch.zeros(1, dtype=torch.float64)}


def open_checkpoints(paths: Sequence[str | Path], said: Said) -> SeriesRecord:
    """Return the checkpoints of a run as a record.

    Snapshots of EDM2, icefall's ``model_avg``, folders of ``PostHocEMA``, torch's ``AveragedModel`` and states of
    ``EMA`` of polyak and Composer are averages of known profiles. All others are the weights of moments: averages of
    these have a large error, which is stated as for any record. An average whose error would be above 25 % of its
    distance from the last weights is refused.

    Args:
        paths: Checkpoints, patterns such as ``"run/*.pt"``, or folders of checkpoints.
        said: What they do not say themselves.

    Raises:
        ArgumentError: If there is no time for each path.
        CheckpointError: If there is none, one cannot be read safely, they are not of one run, or what they store is not
            known.

    Example:
        >>> from polyak.profiles import Window
        >>> for step in range(100, 900, 100):
        ...     torch.save({"weight": torch.tensor([float(step)])}, f"step-{step}.pt")
        >>> record = Record.from_checkpoints("step-*.pt")
        >>> record.kind, len(record.segments)
        ('checkpoints of training weights', 8)
        >>> record.average(Window("800 steps"))
        {'weight': tensor([406.2500])}
        >>> round(record.error(Window("800 steps")), 2)  # of |last weights - average|
        0.03
    """
    given, length = [Path(path) for path in paths], said.get("max_duration")
    series = open_series(given, Options.of(given, said))
    length = _length_of(series) if length is None else Time.from_input(length)
    return SeriesRecord(series, length, _arguments(given, said))


def _length_of(series: Series) -> Time | None:
    """Return the length of a run that is over: what there is of it. An average in ``dur`` is of what was planned."""
    planned = any(one.profile is not None and one.profile.unit is TimeUnit.DURATION for one in series.averages)
    last = series.averages[-1].clock.get(TimeUnit.BATCH)
    return None if planned or not last else Time(round(last), TimeUnit.BATCH)


def _arguments(paths: Sequence[Path], said: Said) -> str | None:
    """Return the arguments with which commands open the checkpoints; None if a command line cannot express them."""
    stored = said.get("stored")
    forms = [_form(one) for one in (() if stored is None else stored if isinstance(stored, Sequence) else (stored,))]
    if len(paths) > 1 or None in forms or said.get("times") or said.get("max_duration"):
        return None
    values = {"stored": ",".join(one for one in forms if one)}
    values |= {name: str(said[name]) for name in ("update_every", "batch_size", "key", "prefix") if said.get(name)}
    options = [f"--{name.replace('_', '-')} {shlex.quote(value)}" for name, value in values.items() if value]
    corrected = ["--step-size-correction"] if said.get("step_size_correction") else []
    return " ".join([shlex.quote(str(paths[0].absolute())), *options, *corrected])


def _form(profile: Profile) -> str | None:
    """Return a profile as it is written on a command line, such as ``half-life=500ba``."""
    words = (named(profile).options or "").removeprefix("--").split()
    if not words:
        return None
    return f"{'unbiased' if words[2:] == ['--unbiased'] else words[0]}={words[1]}"


def _stored(segment: Segment) -> StoredAverage:
    assert isinstance(segment, StoredAverage)
    return segment


def _info(tensor: StoredTensor, *, averaged: bool) -> TensorInfo:
    floating = tensor.dtype.is_floating_point or tensor.dtype.is_complex
    return TensorInfo(tensor.dtype, tensor.shape, averaged and floating)


def _folder(paths: Sequence[Path]) -> Path:
    """Return the folder that all checkpoints are in."""
    return Path(os.path.commonpath([path.absolute().parent for path in paths]))


def _segments(series: Series, averages: Sequence[Average]) -> list[StoredAverage]:
    units = set(_COUNTERS).intersection(*(one.clock for one in averages))
    before = Edge(0, _timestamp({unit: series.begin.get(unit, 0.0) for unit in units}))
    start, found, digest = before, list[StoredAverage](), hashlib.sha256()
    for i, one in enumerate(averages):
        end = Edge(one.updates, _timestamp({unit: one.clock[unit] for unit in units}))
        if end.updates > before.updates:
            start, before = before, end
        for path in one.checkpoint.files.paths:
            stat = path.stat()
            said = f"{path.name} {stat.st_size} {stat.st_mtime_ns} {one.profile!r}\n"
            digest.update(said.encode(errors="surrogateescape"))
        sha256, size = digest.hexdigest(), one.checkpoint.size_bytes
        found.append(
            StoredAverage(
                start,
                before,
                0,
                size,
                sha256,
                name=one.name,
                profile=one.profile,
                origin=one.origin,
                last=one.last,
                index=i,
            )
        )
    return found


def _timestamp(clock: Mapping[TimeUnit, float]) -> Timestamp:
    return Timestamp(**{_COUNTERS[unit]: round(value) for unit, value in clock.items()})
