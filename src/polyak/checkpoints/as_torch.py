"""Writes a file of ``torch.save``: first without the tensors, which then fill their places one by one."""

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_crc32_options, set_crc32_options, skip_data

from polyak.checkpoints.companions import PROVENANCE
from polyak.checkpoints.units import SAID, Facts, Job, Unit, in_groups
from polyak.storage.safetensors import raw_bytes
from polyak.storage.saving import saving

_DESCRIPTOR = b"PK\x07\x08"
_ENTRY = b"PK\x01\x02"
_LOCAL_CHECKSUM = 14  # where it is in the header of an entry


def prepare(job: Job, to: Path) -> None:
    """Make the file with room for the tensors.

    Args:
        job: What is written.
        to: A file.
    """
    # Memory that nobody touches takes no place.
    state: dict[str, Any] = {name: torch.empty(one.shape, dtype=one.dtype) for name, one in job.plan.tensors.items()}
    with saving(), _without_checksums(), skip_data():
        torch.save({**state, **job.plan.newest.extra}, to)
    with zipfile.ZipFile(to, "a") as archive:  # `torch.load` reads the entries that it knows, and passes over others
        archive.writestr(f"{_root(archive.namelist())}{PROVENANCE}", job.said[SAID])


@contextmanager
def _without_checksums() -> Iterator[None]:
    before = get_crc32_options()
    set_crc32_options(compute_crc32=False)
    try:
        yield
    finally:
        set_crc32_options(before)


def _entries(to: Path) -> dict[str, zipfile.ZipInfo]:
    with zipfile.ZipFile(to) as archive:
        return {one.filename: one for one in archive.infolist()}


def _places(job: Job, to: Path) -> dict[str, tuple[str, int]]:
    """Return the entry and the place in the file of each tensor: ``torch.save`` numbers them in their order."""
    entries = _entries(to)
    root = _root(entries)
    found = dict[str, tuple[str, int]]()
    with to.open("rb") as file:
        for i, name in enumerate(job.plan.names):
            entry = entries[f"{root}data/{i}"]
            assert entry.file_size == job.plan.tensors[name].size_bytes, name
            found[name] = entry.filename, _begin(file, entry)
    return found


def units(job: Job, to: Path) -> list[Unit]:
    """Return the work.

    Args:
        job: What is written.
        to: As for `prepare`.
    """
    places = _places(job, to)
    groups = in_groups(job.plan.names, lambda name: job.plan.tensors[name].size_bytes)
    return [_unit(job, to, {name: places[name] for name in group}, i) for i, group in enumerate(groups)]


def _unit(job: Job, to: Path, places: Mapping[str, tuple[str, int]], number: int) -> Unit:
    def write() -> dict[str, int]:
        checksums = dict[str, int]()
        with to.open("r+b") as opened:
            for name, (entry, place) in places.items():
                tensor = job.read(name)
                raw = raw_bytes(tensor)
                checksums[entry] = zlib.crc32(raw)
                opened.seek(place)
                opened.write(raw)
                del raw, tensor  # before the next one is read
        return checksums

    return Unit(f"tensors-{number}", write)


def finish(job: Job, to: Path, facts: Facts) -> list[Path]:
    """Write what the file was made from, and the checksums of the tensors into the directory of the archive.

    Args:
        job: What is written.
        to: As for `prepare`.
        facts: The checksums.
    """
    checksums = {entry: checksum for of_unit in facts.values() for entry, checksum in of_unit.items()}
    entries = _entries(to)
    with zipfile.ZipFile(to) as archive:
        begin = archive.start_dir
    with to.open("r+b") as file:
        _say(file, entries[f"{_root(entries)}{PROVENANCE}"], job.said[SAID].encode())
        file.seek(begin)
        directory = bytearray(file.read())
        at = 0
        while directory[at : at + 4] == _ENTRY:
            name, extra, comment = (int.from_bytes(directory[at + i : at + i + 2], "little") for i in (28, 30, 32))
            entry = directory[at + 46 : at + 46 + name].decode()
            checksum = (checksums[entry] if entry in checksums else _checksum(file, entries[entry])).to_bytes(
                4, "little"
            )
            directory[at + 16 : at + 20] = checksum
            _describe(file, entries[entry], checksum)
            at += 46 + name + extra + comment
        file.seek(begin)
        file.write(directory)
    return []


def _say(file: Any, entry: zipfile.ZipInfo, text: bytes) -> None:
    """Write what the file was made from in place of the text with placeholders, which is as long."""
    assert len(text) == entry.file_size, entry
    file.seek(entry.header_offset + _LOCAL_CHECKSUM)
    file.write(zlib.crc32(text).to_bytes(4, "little"))
    file.seek(_begin(file, entry))
    file.write(text)


def _root(names: Iterable[str]) -> str:
    (found,) = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
    return found


def _begin(file: Any, entry: zipfile.ZipInfo) -> int:
    """Return where in the file the data of an entry begin."""
    file.seek(entry.header_offset)
    header = file.read(30)
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return entry.header_offset + len(header) + names


def _checksum(file: Any, entry: zipfile.ZipInfo) -> int:
    """Return the checksum of an entry that is not a tensor."""
    file.seek(_begin(file, entry))
    return zlib.crc32(file.read(entry.file_size))


def _describe(file: Any, entry: zipfile.ZipInfo, checksum: bytes) -> None:
    """Write a checksum after the data of an entry, where the archive has one."""
    end = _begin(file, entry) + entry.file_size
    file.seek(end)
    if file.read(4) == _DESCRIPTOR:
        file.seek(end + 4)
        file.write(checksum)
