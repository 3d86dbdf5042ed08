"""``Record``: averages from a record that is on disk, one tensor at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, nn

from polyak.checkpoints.series.averages import Said
from polyak.errors import ArgumentError, RecordError
from polyak.profiles import Profile
from polyak.record.contents import Contents
from polyak.record.exporting import export
from polyak.record.filling import fill
from polyak.record.fitting import Fit, finest, fit, warn_of_error
from polyak.record.moments import resolved
from polyak.record.passes import Passes
from polyak.record.recommendation import Recommendation
from polyak.storage.atomic import require_new
from polyak.time import Time

if TYPE_CHECKING:
    from polyak.record.series import SeriesRecord


class Record(Contents):
    """A record, as it was when this object was made. Reading needs no lock and changes nothing.

    Each file is compared with its hash in the manifest before it is first read, so that a damaged one is an error and
    gets into no average. Memory is bounded by what is returned, and 4 million numbers or a row of each segment.

    Args:
        folder: The folder of the record.

    Attributes:
        folder: As given, made absolute.
        segments: What the record holds, oldest first. ``stretches`` is an earlier name.
        tensors: What is kept of each tensor, by name.
        aliases: Further names of tied tensors, and the name that each is kept under.
        max_duration: The length of the run, if that was known.
        raw: Where the raw weights at the end of the record are kept; None if it has none. ``raw_weights`` reads them.

    Raises:
        RecordError: If there is no record, or its manifest is wrong.

    Example:
        >>> from polyak.profiles import Uniform
        >>> from polyak.record import Edge, TensorInfo, Writer
        >>> from polyak.time import Timestamp
        >>> now = Timestamp()
        >>> with Writer("run", {"weight": TensorInfo(torch.float32, (1,), averaged=True)}) as writer:
        ...     for update in range(3):
        ...         before, now = now, now.to_next_batch()
        ...         weights = {"weight": torch.tensor([float(update)])}
        ...         segment = writer.append(weights, Edge(update, before), Edge(update + 1, now))
        >>> record = Record("run")
        >>> len(record.segments), record.average(Uniform())
        (3, {'weight': tensor([1.])})
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self._passes = Passes()

    @staticmethod
    def from_checkpoints(paths: str | Path | Sequence[str | Path], **said: Unpack[Said]) -> "SeriesRecord":
        """Return the checkpoints of a run of any library as a record; see ``docs/foreign-runs.md``.

        Args:
            paths: Checkpoints, patterns such as ``"run/*.pt"``, or folders of checkpoints.
            **said: What they do not say themselves, by the names of ``polyak.record.Said``.

        Raises:
            ArgumentError: If there is no time for each path.
            CheckpointError: If there is none, one cannot be read safely, they are not of one run, or what they store is
                not known.
        """
        from polyak.record.series import open_checkpoints  # noqa: PLC0415  it needs this module

        return open_checkpoints([paths] if isinstance(paths, str | Path) else paths, said)

    @property
    def finest(self) -> int:
        """The shortest half-life, in recorded updates, that the record resolves at its end."""
        return finest(self.segments)

    def average(
        self,
        profile: Profile,
        at: Time | str | int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """Return the average under ``profile`` by name, and the last value of tensors that are not averaged.

        Warn if ``error`` is above 5 %. Each file is read once, for the average and its error together.

        Args:
            profile: Its clock starts where the record does.
            at: The moment of the average, counted from the start of the run, which must be one of ``moments``; or a
                share of the record such as ``"50%"``, for the nearest of them; None for the last.
            device: The device for the result; None for the CPU.
            dtype: The dtype for the tensors that are averaged; None for float32, and float64 where the record keeps
                that.

        Raises:
            ProfileError: If the record does not resolve the profile.
            TimeError: If ``at`` is not the end of a segment.
            RecordError: If a file is missing, truncated, damaged or foreign, or a value is infinite in ``dtype``.
        """
        return next(self.averages([profile], at, device=device, dtype=dtype))

    def averages(
        self,
        profiles: Iterable[Profile],
        at: Time | str | int | Sequence[Time | str | int | None] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_bytes: float = 4e9,
    ) -> Iterator[dict[str, Tensor]]:
        """Return the averages under several profiles, in order, each as ``average`` returns it.

        Each file is read once for as many averages as fit into ``max_bytes``, and for one at least. Memory is bounded
        by ``max_bytes``, or one average, and a few times the largest row of a tensor. An average is released as soon as
        the caller releases it.

        Args:
            profiles: As for ``average``.
            at: As for ``average``, for all profiles, or a list with a moment for each.
            device: As for ``average``.
            dtype: As for ``average``.
            max_bytes: The memory for averages that are computed together.

        Raises:
            ArgumentError: If there are more or fewer moments than profiles.
            ProfileError: As ``average``, before any file is read.
            TimeError: As ``average``, before any file is read.
            RecordError: As ``average``.

        Example:
            >>> from polyak.profiles import HalfLife, Window
            >>> from polyak.record import Edge, TensorInfo, Writer
            >>> from polyak.time import Timestamp
            >>> edges = [Edge(n, Timestamp().to_next_batch(steps=n)) for n in range(4)]
            >>> with Writer("three", {"weight": TensorInfo(torch.float32, (1,), averaged=True)}) as writer:
            ...     for start, end in zip(edges, edges[1:]):
            ...         segment = writer.append({"weight": torch.tensor([float(end.updates)])}, start, end)
            >>> [average["weight"].item() for average in Record("three").averages([Window("3ba"), Window("1ba")])]
            [2.0, 3.0]
        """
        asked = list(profiles)
        moments = list(at) if isinstance(at, Sequence) and not isinstance(at, str) else [at] * len(asked)
        if len(moments) != len(asked):
            raise ArgumentError(
                f"at must have a moment for each profile (got {len(moments)} for {len(asked)} profiles): give as many, "
                "or one for all"
            )
        fits = [self._fit(profile, moment) for profile, moment in zip(asked, moments, strict=True)]
        made = self._passes.averages(self, list(zip(asked, fits, strict=True)), dtype, max_bytes)
        return map(partial(self._completed, device=device), made)  # which keeps no average

    def error(self, profile: Profile, at: Time | str | int | None = None) -> float:
        """Estimate the error of ``average``, in units of |last weights - average|.

        It is an estimate and not a bound; show it doubled. The first call, of this or of ``average``, reads the record
        up to the moment; later ones, for any profile and no later moment, read nothing.

        Args:
            profile: As for ``average``.
            at: As for ``average``.

        Raises:
            ProfileError: As ``average``.
            TimeError: As ``average``.
            RecordError: As ``average``.
        """
        return self._passes.error(self, self._fit(profile, at))

    def export(
        self,
        profile: Profile,
        path: str | Path,
        at: Time | str | int | None = None,
        *,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the average to a safetensors file, with its profile, moment and error in the file's metadata.

        The metadata comes first in the file, so that the record is read for ``error`` before it is for the average.

        Args:
            profile: As for ``average``.
            path: The file.
            at: As for ``average``.
            dtype: As for ``average``.
            overwrite: Whether an existing file is replaced, once the new one is complete.

        Raises:
            ExistsError: If there is a file already.
            ProfileError: As ``average``.
            TimeError: As ``average``.
            RecordError: As ``average``, and if the disk refuses.
        """
        require_new(Path(path), overwrite=overwrite)
        fitted = self._fit(profile, at)
        error = self._passes.error(self, fitted)
        warn_of_error(profile, error, fitted.remedy)
        export(self, profile, fitted, error, Path(path), dtype)

    def average_into(self, model: nn.Module, profile: Profile, at: Time | str | int | None = None) -> None:
        """Overwrite a model's tensors with their average. If the model is sharded, each rank reads only its shards.

        Nothing is communicated, and no rank holds the full average. The values are those of ``average`` in the model's
        dtypes, bit for bit. Tensors that the record does not keep, such as frozen ones, stay. ``error`` is not
        computed: ask for it in one process.

        Args:
            model: The model with the names of the recorded one, wrapped, sharded by ``fully_shard`` or as ``DTensor``,
                or not.
            profile: As for ``average``.
            at: As for ``average``.

        Raises:
            MismatchError: If a recorded tensor is missing from the model or has another shape; nothing is changed.
            ProfileError: As ``average``.
            TimeError: As ``average``.
            RecordError: As ``average``.
        """
        fill(self, model, self._fit(profile, at))

    def recommend(self, evaluate: Callable[[dict[str, Tensor]], Any] | None = None, **options: Any) -> Recommendation:
        """Return the average to take, and why: what ``polyak.recommend`` returns.

        Args:
            evaluate: As for ``polyak.recommend``.
            **options: As for ``polyak.recommend``.
        """
        from polyak.sweeping.recommending import recommend  # noqa: PLC0415  sweeps are built on records

        return recommend(self, evaluate, **options)

    def _fit(self, profile: Profile, at: Time | str | int | None) -> Fit:
        fitted = fit(profile, self.segments, resolved(self, at), max_duration=self.max_duration)
        if fitted.raw and (self.raw is None or self.raw.end.updates != fitted.segments[-1].end.updates):
            has = "it has none" if self.raw is None else f"it has those at {self.raw.end.timestamp.batch}"
            raise RecordError(
                f"a floor needs the raw weights at the moment of the average, and {self.folder} lacks them ({has}: "
                "a record keeps them where its run has ended without an error); leave out the floor, or the moment"
            )
        return fitted
