"""``Record``: reads a record that is on disk, one tensor at a time."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from polyak.profiles import Profile
from polyak.record.files import Box, SegmentFile, check_content, check_size, full_box, hash_in, open_segment
from polyak.record.fitting import Fit, error_estimate, finest, fit, warn_of_error
from polyak.record.manifest import Segment, load_manifest
from polyak.storage.atomic import replacing
from polyak.storage.safetensors import TensorInfo, cast, disk_errors, write_tensors
from polyak.time import Time

# How many numbers are in memory while distances between segments are computed.
_CHUNK = 1 << 22


class Record:
    """A record, as it was when this object was made. Reading needs no lock and changes nothing.

    Each file is compared with its hash in the manifest before it is first read, so that a damaged one is an error and
    gets into no average. Memory is bounded by a few times the largest tensor, in addition to what is returned.

    Args:
        folder: The folder of the record.

    Attributes:
        folder: As given, made absolute.
        segments: What the record holds, oldest first. ``stretches`` is an earlier name.
        tensors: What is kept of each tensor, by name.
        aliases: Further names of tied tensors, and the name that each is kept under.
        max_duration: The length of the run, if that was known.

    Raises:
        RecordError: If there is no record, or its manifest is wrong.

    Example:
        >>> from polyak.profiles import Uniform
        >>> from polyak.record import Edge, Writer
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
        self.folder = Path(folder).absolute()
        manifest = load_manifest(self.folder)
        self.segments: tuple[Segment, ...] = manifest.segments
        self.tensors: Mapping[str, TensorInfo] = manifest.tensors
        self.aliases: Mapping[str, str] = manifest.aliases
        self.max_duration: Time | None = manifest.max_duration
        self._products = list[list[float]]()  # of the first segments; see ``Products``
        self._verified = set[Path]()

    @property
    def finest(self) -> int:
        """The shortest half-life, in recorded updates, that the record resolves at its end."""
        return finest(self.segments)

    @property
    def stretches(self) -> tuple[Segment, ...]:
        """The earlier name of ``segments``."""
        return self.segments

    def open(self, segment: Segment) -> AbstractContextManager[SegmentFile]:
        """Open a segment's file for the length of a ``with`` block; its ``read(name)`` returns one tensor.

        Args:
            segment: One of ``segments``. Each is an averaged model by itself.

        Raises:
            RecordError: If the file is missing, truncated or foreign. If it does not have its hash, the first ``read``
                raises that.
        """
        return open_segment(self.folder, segment, self.tensors, self._verified)

    def average(
        self,
        profile: Profile,
        at: Time | str | int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """Return the average under ``profile`` by name; of tensors that are not averaged, the last value.

        Warn if ``error`` is above 5 %. Each file is read once, for the average and its error together.

        Args:
            profile: Its clock starts where the record does.
            at: The moment of the average, counted from the start of the run, which must be the end of a segment; None
                for the last.
            device: For the result; None for the CPU.
            dtype: For the tensors that are averaged; None for float32.

        Raises:
            ProfileError: If the record does not resolve the profile.
            TimeError: If ``at`` is not the end of a segment.
            RecordError: If a file is missing, truncated, damaged or foreign, or a value is infinite in ``dtype``.
        """
        fitted = self._fit(profile, at)
        products = self._new_products(fitted)
        result: dict[str, Tensor] = {}
        with self._opened(fitted.segments) as files:
            for name, info in self.tensors.items():
                wanted = _averaged_as(info, dtype).dtype
                total = _combined(files, name, info, fitted.coefficients, products)
                result[name] = cast(name, total, wanted).to(device)
        warn_of_error(profile, error_estimate(fitted, self._keep(products)))
        return result | {alias: result[name] for alias, name in self.aliases.items()}

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
        return self._error_of(self._fit(profile, at))

    def export(
        self,
        profile: Profile,
        path: str | Path,
        at: Time | str | int | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write the average to a safetensors file, with its profile, moment and error in the file's metadata.

        The metadata comes first in the file, so that the record is read for ``error`` before it is for the average.

        Args:
            profile: As for ``average``.
            path: The file. An existing one is replaced once the new one is complete.
            at: As for ``average``.
            dtype: As for ``average``.

        Raises:
            ProfileError: As ``average``.
            TimeError: As ``average``.
            RecordError: As ``average``, and if the disk refuses.
        """
        path = Path(path)
        fitted = self._fit(profile, at)
        error = self._error_of(fitted)
        warn_of_error(profile, error)
        end = fitted.segments[-1].end
        metadata = {
            "format": "pt",
            "polyak.profile": repr(profile),
            "polyak.moment": json.dumps({"updates": end.updates, **end.timestamp.state_dict()}),
            "polyak.error_estimate": f"{error:.3g}",
            "polyak.record": self.folder.resolve().name,
        }
        names = {name: name for name in self.tensors} | dict(self.aliases)
        infos = {name: _averaged_as(self.tensors[kept], dtype) for name, kept in names.items()}
        with disk_errors(f"exporting to {path}"), self._opened(fitted.segments) as files:

            def read(name: str) -> Tensor:
                return _combined(files, names[name], self.tensors[names[name]], fitted.coefficients)

            with replacing(path) as temporary:
                write_tensors(temporary, infos, read, metadata)

    def verify(self) -> None:
        """Compare all files, also those that are kept for checkpoints, with the hashes in the manifest.

        Raises:
            RecordError: If one differs.
        """
        for segment in self.segments:
            check_size(self.folder, segment)
        # Reading the manifest verifies it too. The name of a pinned file has the beginning of its hash.
        pinned = load_manifest(self.folder).files
        hashes = {name: hash_in(name) for name in pinned} | {one.file: one.sha256 for one in self.segments}
        for name, sha256 in sorted(hashes.items()):
            check_content(self.folder, name, sha256)

    def _fit(self, profile: Profile, at: Time | str | int | None) -> Fit:
        return fit(profile, self.segments, at, max_duration=self.max_duration)

    def _error_of(self, fitted: Fit) -> float:
        products = self._new_products(fitted)
        if products is not None:
            with self._opened(fitted.segments) as files:
                for name, info in self.tensors.items():
                    products.add(files, name, info)
        return error_estimate(fitted, self._keep(products))

    def _new_products(self, fitted: Fit) -> "Products | None":
        """Return an object to compute the products of the error in; None if they are known, or not needed."""
        pairs = len(fitted.segments) - 1
        return None if fitted.is_exact or len(self._products) >= pairs else Products(pairs)

    def _keep(self, products: "Products | None") -> list[list[float]]:
        if products is not None:
            self._products = products.sums.tolist()
        return self._products

    @contextmanager
    def _opened(self, segments: Sequence[Segment]) -> Iterator[list[SegmentFile]]:
        with ExitStack() as stack:
            yield [stack.enter_context(self.open(segment)) for segment in segments]


class Products:
    """The inner products of the differences between the means of neighbors, of all averaged tensors together.

    Args:
        pairs: How many pairs of neighbors there are.

    Attributes:
        sums: For each two pairs, the sum so far.
    """

    def __init__(self, pairs: int) -> None:
        self.sums = torch.zeros(pairs, pairs, dtype=torch.float64)

    def add(self, files: Sequence[SegmentFile], name: str, info: TensorInfo) -> None:
        """Read a tensor and add its products.

        Args:
            files: The segments, oldest first.
            name: The tensor's name.
            info: The tensor.
        """
        for box in _boxes(info.shape, _CHUNK // len(files)) if info.averaged and len(files) > 1 else ():
            self.add_means([file.read(name, box) for file in files])

    @torch.no_grad()
    def add_means(self, means: Sequence[Tensor]) -> None:
        """Add the products of some elements of a tensor.

        Args:
            means: These elements in each segment.
        """
        if not len(self.sums):
            return
        flat = [_flat(mean) for mean in means]
        for parts in zip(*(mean.split(max(1, _CHUNK // len(flat))) for mean in flat), strict=True):
            rows = torch.stack([part.float() for part in parts]).diff(dim=0).neg_()
            self.sums += (rows @ rows.T).double()


def _averaged_as(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    if not info.averaged or info.dtype.is_complex:
        return info
    return replace(info, dtype=dtype or torch.float32)


@torch.no_grad()
def _combined(
    files: Sequence[SegmentFile],
    name: str,
    info: TensorInfo,
    coefficients: Sequence[float],
    products: Products | None = None,
) -> Tensor:
    """Return a tensor of the average; add to ``products`` from the same reads."""
    if not info.averaged:
        return files[-1].read(name).clone()
    total = torch.zeros(info.shape, dtype=torch.complex128 if info.dtype.is_complex else torch.float64)
    for box in _boxes(info.shape, _CHUNK // len(files)) if products else (None,):
        target = total if box is None else total[box]
        means = [file.read(name, box) if c or products else None for file, c in zip(files, coefficients, strict=True)]
        for mean, coefficient in zip(means, coefficients, strict=True):
            if coefficient and mean is not None:
                target.add_(mean, alpha=coefficient)
        if products is not None:
            products.add_means([mean for mean in means if mean is not None])
    return total


def _boxes(shape: tuple[int, ...], most: int) -> Iterator[Box | None]:
    """Yield the boxes of a tensor to read in turn: all of it, or rows with about ``most`` elements."""
    if prod(shape) <= most:
        yield None
        return
    rows = max(1, most // prod(shape[1:]))
    for at in range(0, shape[0], rows):
        yield slice(at, min(at + rows, shape[0])), *full_box(shape[1:])


def _flat(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
