"""``Record``: what can be read out of a record once it is on disk, one tensor at a time."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from polyak.profiles import Profile
from polyak.record.files import Box, StretchFile, check_content, check_size, hash_in, open_stretch, whole
from polyak.record.fitting import Fit, error_estimate, finest, fit, warn_of_error
from polyak.record.manifest import Stretch, load_manifest
from polyak.storage.atomic import replacing
from polyak.storage.safetensors import TensorInfo, cast, disk_errors, write_tensors
from polyak.time import Time

# Numbers held at once while distances between stretches are summed up.
_CHUNK = 1 << 22


class Record:
    """A record, as it was when this was made. Reading needs no lock and changes nothing.

    Each file is compared with its hash in the manifest before it is first read from, so that a damaged one is an error
    and gets into no average. Memory is bounded by a few times the largest tensor, beside what is returned.

    Args:
        folder: Where it is.

    Attributes:
        folder: As given, made absolute.
        stretches: What it holds, oldest first.
        tensors: What is kept of each tensor, by name.
        aliases: Further names of tied tensors, and the name that each is kept under.
        max_duration: The length of the run, if that was known.

    Raises:
        RecordError: If there is no record, or its manifest is not as it must be.

    Example:
        >>> from polyak.profiles import Uniform
        >>> from polyak.record import Edge, Writer
        >>> from polyak.time import Timestamp
        >>> now = Timestamp()
        >>> with Writer("run", {"weight": TensorInfo(torch.float32, (1,), averaged=True)}) as writer:
        ...     for update in range(3):
        ...         before, now = now, now.to_next_batch()
        ...         weights = {"weight": torch.tensor([float(update)])}
        ...         stretch = writer.append(weights, Edge(update, before), Edge(update + 1, now))
        >>> record = Record("run")
        >>> len(record.stretches), record.average(Uniform())
        (3, {'weight': tensor([1.])})
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        manifest = load_manifest(self.folder)
        self.stretches: tuple[Stretch, ...] = manifest.stretches
        self.tensors: Mapping[str, TensorInfo] = manifest.tensors
        self.aliases: Mapping[str, str] = manifest.aliases
        self.max_duration: Time | None = manifest.max_duration
        self._products: list[list[float]] | None = None
        self._verified = set[Path]()

    @property
    def finest(self) -> int:
        """The shortest half-life, in recorded updates, that can be told at the end of the record."""
        return finest(self.stretches)

    def open(self, stretch: Stretch) -> AbstractContextManager[StretchFile]:
        """Open a stretch's file for the length of a ``with`` block; its ``read(name)`` gives one tensor.

        Args:
            stretch: One of ``stretches``. Each is an averaged model by itself.

        Raises:
            RecordError: If the file is missing, truncated or foreign. If it does not have its hash, the first ``read``
                raises that.
        """
        return open_stretch(self.folder, stretch, self.tensors, self._verified)

    def average(
        self,
        profile: Profile,
        at: Time | str | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """Return the average under ``profile`` by name; of tensors that are not averaged, the last value.

        Warns if ``error`` is above 5 %, for which the first call reads the record once more.

        Args:
            profile: Its clock starts where the record does.
            at: The moment of the average, counted from the start of the run, which must be the end of a stretch; None
                for the last.
            device: For the result; None for the CPU.
            dtype: For the tensors that are averaged; None for float32.

        Raises:
            ProfileError: If the profile is finer than the record can tell.
            TimeError: If ``at`` is not the end of a stretch.
            RecordError: If a file is missing, truncated, damaged or foreign, or a value is infinite in ``dtype``.
        """
        fitted, error = self._fit(profile, at)
        warn_of_error(profile, error)
        result: dict[str, Tensor] = {}
        with self._opened(fitted.stretches) as files:
            for name, info in self.tensors.items():
                wanted = _averaged_as(info, dtype).dtype
                result[name] = cast(name, _combined(files, name, info, fitted.coefficients), wanted).to(device)
        return result | {alias: result[name] for alias, name in self.aliases.items()}

    def error(self, profile: Profile, at: Time | str | None = None) -> float:
        """Estimate how far off ``average`` is, in units of |last weights - average|.

        It is an estimate and not a bound; show it doubled. The first call reads the whole record; later ones, for any
        profile and moment, read nothing.

        Args:
            profile: As for ``average``.
            at: As for ``average``.

        Raises:
            ProfileError: As ``average``.
            TimeError: As ``average``.
            RecordError: As ``average``.
        """
        return self._fit(profile, at)[1]

    def export(
        self, profile: Profile, path: str | Path, at: Time | str | None = None, *, dtype: torch.dtype | None = None
    ) -> None:
        """Write the average to a safetensors file, and where it comes from to the file's metadata.

        Args:
            profile: As for ``average``.
            path: Of the file. One that is there is replaced once the new one is complete.
            at: As for ``average``.
            dtype: As for ``average``.

        Raises:
            ProfileError: As ``average``.
            TimeError: As ``average``.
            RecordError: As ``average``, and if the disk refuses.
        """
        path = Path(path)
        fitted, error = self._fit(profile, at)
        warn_of_error(profile, error)
        end = fitted.stretches[-1].end
        metadata = {
            "format": "pt",
            "polyak.profile": repr(profile),
            "polyak.moment": json.dumps({"updates": end.updates, **end.timestamp.state_dict()}),
            "polyak.error_estimate": f"{error:.3g}",
            "polyak.record": self.folder.resolve().name,
        }
        names = {name: name for name in self.tensors} | dict(self.aliases)
        infos = {name: _averaged_as(self.tensors[kept], dtype) for name, kept in names.items()}
        with disk_errors(f"exporting to {path}"), self._opened(fitted.stretches) as files:

            def read(name: str) -> Tensor:
                return _combined(files, names[name], self.tensors[names[name]], fitted.coefficients)

            with replacing(path) as temporary:
                write_tensors(temporary, infos, read, metadata)

    def verify(self) -> None:
        """Read all files, also those that are kept for checkpoints, and compare them with the hashes in the manifest.

        Raises:
            RecordError: If one is not what was written.
        """
        for stretch in self.stretches:
            check_size(self.folder, stretch)
        # Reading the manifest verifies it too. Of a pinned file it knows the beginning of the hash, from the name.
        pinned = load_manifest(self.folder).files
        hashes = {name: hash_in(name) for name in pinned} | {one.file: one.sha256 for one in self.stretches}
        for name, sha256 in sorted(hashes.items()):
            check_content(self.folder, name, sha256)

    def _fit(self, profile: Profile, at: Time | str | None) -> tuple[Fit, float]:
        fitted = fit(profile, self.stretches, at, max_duration=self.max_duration)
        return fitted, error_estimate(fitted, self._inner_products())

    @contextmanager
    def _opened(self, stretches: Sequence[Stretch]) -> Iterator[list[StretchFile]]:
        with ExitStack() as stack:
            yield [stack.enter_context(self.open(stretch)) for stretch in stretches]

    @torch.no_grad()
    def _inner_products(self) -> list[list[float]]:
        """Return what ``error_estimate`` needs, of all averaged tensors together."""
        if self._products is None:
            pairs = len(self.stretches) - 1
            products = torch.zeros(pairs, pairs, dtype=torch.float64)
            with self._opened(self.stretches) as files:
                for name, info in self.tensors.items():
                    for box in _boxes(info.shape, _CHUNK // len(files)) if info.averaged and pairs else ():
                        _add_inner_products(products, [_flat(file.read(name, box)) for file in files])
            self._products = products.tolist()
        return self._products


def _averaged_as(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    if not info.averaged or info.dtype.is_complex:
        return info
    return replace(info, dtype=dtype or torch.float32)


@torch.no_grad()
def _combined(files: Sequence[StretchFile], name: str, info: TensorInfo, coefficients: Sequence[float]) -> Tensor:
    if not info.averaged:
        return files[-1].read(name).clone()
    total = torch.zeros(info.shape, dtype=torch.complex128 if info.dtype.is_complex else torch.float64)
    for file, coefficient in zip(files, coefficients, strict=True):
        if coefficient:
            total.add_(file.read(name), alpha=coefficient)
    return total


def _boxes(shape: tuple[int, ...], most: int) -> Iterator[Box | None]:
    """Yield what to read of a tensor at a time: all of it, or as many of its rows as have about ``most`` numbers."""
    if prod(shape) <= most:
        yield None
        return
    rows = max(1, most // prod(shape[1:]))
    for at in range(0, shape[0], rows):
        yield slice(at, min(at + rows, shape[0])), *whole(shape[1:])


def _flat(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)


def _add_inner_products(products: Tensor, means: Sequence[Tensor]) -> None:
    for parts in zip(*(mean.split(max(1, _CHUNK // len(means))) for mean in means), strict=True):
        rows = torch.stack([part.float() for part in parts]).diff(dim=0).neg_()
        products += (rows @ rows.T).double()
