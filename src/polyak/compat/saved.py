"""The files of ``torch.save``, of any release since 0.4: zip archives, compressed or not, and the older format."""

import io
import sys
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from polyak.compat.kinds import other_archive
from polyak.compat.pickles import MOST_BYTES, Name, Window
from polyak.compat.tensors import STORAGES, Storage, as_storage, unpickler
from polyak.compat.words import listed, shown
from polyak.errors import CheckpointError

# What a file may claim: compressed data, and tensors that repeat numbers.
_GROWTH = 16
_SMALL_BYTES = 64 << 20
# An entry of a zip directory takes ten times its bytes in memory.
_MOST_DIRECTORY_BYTES = 16 << 20
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
# From so many bytes on, what is in a pickle may be of the file's own memory.
_VIEWED_BYTES = 1 << 20


def most_bytes(size_bytes: int) -> int:
    """Return how many bytes may be unpacked from a file.

    Args:
        size_bytes: Its size.
    """
    return _GROWTH * size_bytes + _SMALL_BYTES


class Checksum(NamedTuple):
    """A checksum that has not been checked yet.

    Args:
        data: The bytes that it is of.
        expected: Their CRC-32.
        entry: The name of the entry in the archive.
    """

    data: memoryview
    expected: int
    entry: str


def load_saved(data: memoryview, *, mapped: bool, strict: bool, unchecked: dict[int, Checksum] | None = None) -> Any:
    """Return what ``torch.save`` wrote.

    Args:
        data: The file, or the part of it that was saved by one call.
        mapped: Whether the tensors are the file's own bytes where they can be.
        strict: Whether to refuse what is not a tensor, container, number or text; otherwise something stands in for it.
        unchecked: To read no tensor now. The checksums of mapped storages are put in it, by their address, to be
            compared by who reads the tensors; and tensors are not copied where the file has them unaligned.

    Raises:
        CheckpointError: If it is not such a file, or is damaged.
    """
    if bytes(data[:4]) == b"PK\x03\x04":
        return _Archive(data, mapped=mapped, unchecked=unchecked).load(strict=strict)
    if bytes(data[:1]) == b"\x80" and not is_legacy(data):
        return _pickled(data, mapped=mapped, strict=strict, aligned=unchecked is None)
    return _Legacy(data, mapped=mapped, aligned=unchecked is None).load(strict=strict)


def is_legacy(data: memoryview) -> bool:
    """Return whether a file begins with torch's magic number.

    Args:
        data: The data of the file.
    """
    return _LEGACY_MAGIC.to_bytes(10, "little") in bytes(data[:32])


def _pickled(data: memoryview, *, mapped: bool, strict: bool, aligned: bool) -> Any:
    """Return what ``pickle.dump`` wrote. Its tensors are in the pickle, as ``torch.save`` writes storages."""

    def storage(saved: object) -> Any:
        if not isinstance(saved, (bytes, memoryview)):
            raise CheckpointError("a storage must be bytes")
        held = saved if isinstance(saved, memoryview) else memoryview(bytearray(saved))
        return load_saved(held, mapped=mapped, strict=strict)

    def persistent(_: object) -> Any:
        raise CheckpointError("it must hold all that it is made of; save it with torch.save")

    reader = unpickler(persistent, aligned=aligned, storage=storage)
    content = reader.load(Window(data, viewed=_VIEWED_BYTES))
    if strict:
        _refuse_unknown(reader.unknown)
    return content


def compare(checksum: int, expected: int, entry: str) -> None:
    """Raise unless the content of an entry is what was saved.

    Args:
        checksum: The checksum of what is there.
        expected: The checksum of what was saved.
        entry: Its name.

    Raises:
        CheckpointError: If it is not.
    """
    if checksum != expected:
        raise CheckpointError(f"its content must have the checksum in it (not so: {shown(entry)})")


def _refuse_unknown(names: list[str]) -> None:
    if names:
        raise CheckpointError(
            f"it must hold tensors in plain containers (it also has {listed(dict.fromkeys(names))}); save the state "
            "dict alone"
        )


def _asked(persistent_id: object, count: int) -> tuple[torch.dtype, str, str, int]:
    """Return the dtype, key, location and number of elements that a persistent id gives."""
    if not isinstance(persistent_id, tuple) or len(persistent_id) != count or persistent_id[0] != "storage":
        raise CheckpointError("what lies outside the pickle must be a storage")
    kind, key, location, numel = persistent_id[1:5]
    dtype = STORAGES.get(kind.path) if isinstance(kind, Name) else None
    if dtype is None or not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 1 << 60:
        raise CheckpointError(f"a storage must have a known type ({shown(getattr(kind, 'path', kind))}), key and size")
    return dtype, key, str(location), numel


class _Archive:
    """A zip archive of ``torch.save``."""

    def __init__(self, data: memoryview, *, mapped: bool, unchecked: dict[int, Checksum] | None) -> None:
        self._data, self._mapped, self._unchecked = data, mapped, unchecked
        try:
            self._zip = zipfile.ZipFile(Window(data, None, _MOST_DIRECTORY_BYTES))
        except (zipfile.BadZipFile, NotImplementedError, ValueError, IndexError, OverflowError) as error:
            if isinstance(error, CheckpointError):
                raise CheckpointError("its zip directory is too large") from None
            raise CheckpointError(f"its zip archive is damaged or truncated ({shown(error)})") from None
        self._entries = {info.filename: info for info in self._zip.infolist()}
        if len(self._entries) < len(self._zip.infolist()):
            raise CheckpointError("its zip archive has two entries of one name")
        roots = [name.removesuffix("data.pkl") for name in self._entries if name.rpartition("/")[2] == "data.pkl"]
        if not roots:
            raise CheckpointError(f"it must be a file of torch or safetensors (it is {other_archive(self._entries)})")
        if len(roots) != 1:
            raise CheckpointError(f"a zip archive of torch.save must have one data.pkl (this has {len(roots)})")
        (self._root,) = roots
        self._storages: dict[str, torch.UntypedStorage] = {}
        self._left = most_bytes(len(data))

    def load(self, *, strict: bool) -> Any:
        if f"{self._root}constants.pkl" in self._entries:
            raise CheckpointError("it is an archive of TorchScript: load it with torch.jit.load, and save state_dict()")
        order = self._entries.get(f"{self._root}byteorder")
        if order is not None and order.file_size < 16 and bytes(self._read(order)).decode("latin1") != sys.byteorder:
            raise CheckpointError(
                f"it was saved on a machine with another byte order than this one's ({sys.byteorder})"
            )
        pickled = self._entries[f"{self._root}data.pkl"]
        if pickled.file_size > MOST_BYTES:
            raise CheckpointError(f"what it holds other than tensors is larger than {MOST_BYTES >> 20} MiB")
        reader = unpickler(self._persistent, aligned=self._unchecked is None)
        content = reader.load(io.BytesIO(self._read(pickled)))
        if strict:
            _refuse_unknown(reader.unknown)
        return content

    def _persistent(self, persistent_id: object) -> Storage:
        dtype, key, location, numel = _asked(persistent_id, 5)
        if location == "meta":
            return Storage(dtype, None)
        if key not in self._storages:
            info = self._entries.get(f"{self._root}data/{key}")
            if info is None:
                raise CheckpointError(f"it must have the data of all tensors ({shown(key)} is not there)")
            if info.file_size < numel * dtype.itemsize:
                raise CheckpointError(
                    f"a storage of {numel} numbers must have them all in the file ({info.file_size} bytes are there)"
                )
            self._storages[key] = self._storage(info)
        return Storage(dtype, self._storages[key])

    def _storage(self, info: zipfile.ZipInfo) -> torch.UntypedStorage:
        later = self._unchecked is not None and info.compress_type == zipfile.ZIP_STORED
        data = self._read(info, check=not later)
        storage = as_storage(data, mapped=self._mapped)
        if self._unchecked is not None and later and info.CRC:
            self._unchecked[storage.data_ptr()] = Checksum(data, info.CRC, info.filename)
        return storage

    def _read(self, info: zipfile.ZipInfo, *, check: bool = True) -> memoryview:
        """Return the bytes of an entry: those in the file if they are not compressed."""
        if info.flag_bits & 1:
            raise CheckpointError("its zip archive must not be encrypted")
        if info.compress_type != zipfile.ZIP_STORED:
            return self._decompressed(info)
        at = info.header_offset
        header = bytes(self._data[at : at + 30])
        begin = at + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        found = self._data[begin : begin + info.file_size]
        if at < 0 or header[:4] != b"PK\x03\x04" or len(found) != info.file_size:
            raise CheckpointError(f"its zip archive is damaged or truncated (at {shown(info.filename)})")
        # Zero where torch was told to save none.
        if info.CRC and check:
            compare(zlib.crc32(found), info.CRC, info.filename)
        return found

    def _decompressed(self, info: zipfile.ZipInfo) -> memoryview:
        self._left -= info.file_size
        if self._left < 0:
            raise CheckpointError(
                f"its compressed data must not be over {_GROWTH} times its size (it says {info.file_size:,} bytes for "
                f"{shown(info.filename)}); save it again with torch.save"
            )
        found = bytearray(info.file_size)
        view, at = memoryview(found), 0
        try:
            with self._zip.open(info) as file:
                while at < len(found) and (count := file.readinto(view[at : at + (1 << 20)])):  # pyrefly: ignore
                    at += count
                whole = at == len(found) and not file.read(1)
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            NotImplementedError,
            RuntimeError,
            OSError,
            ValueError,
        ) as error:
            raise CheckpointError(f"its zip archive is damaged ({shown(error)})") from None
        if not whole:
            raise CheckpointError(f"its zip archive is damaged ({shown(info.filename)} has another size than it says)")
        return view


class _Legacy:
    """A file of ``torch.save`` before 1.6: pickles, then the storages."""

    def __init__(self, data: memoryview, *, mapped: bool, aligned: bool) -> None:
        self._data, self._mapped, self._aligned = data, mapped, aligned
        self._sizes: dict[str, int] = {}
        self._storages: dict[str, torch.UntypedStorage] = {}

    def load(self, *, strict: bool) -> Any:
        file = Window(self._data)
        try:
            magic, version = (unpickler(self._persistent).load(file) for _ in range(2))
        except CheckpointError:
            magic = version = None
        if type(magic) is not int or magic != _LEGACY_MAGIC or version != _LEGACY_VERSION:
            raise CheckpointError("it is neither a safetensors file nor one of torch.save")
        system = unpickler(self._persistent).load(file)
        if not isinstance(system, Mapping) or system.get("little_endian") is not (sys.byteorder == "little"):
            raise CheckpointError("it must have been saved on a machine with this one's byte order")
        at = file.tell()
        # Storages come after the objects that are made of them, and their places are known once all are listed.
        unpickler(self._persistent).load(file)
        self._find(unpickler(self._persistent).load(file), file.tell())
        file = Window(self._data)
        file.seek(at)
        reader = unpickler(self._persistent, aligned=self._aligned)
        content = reader.load(file)
        if strict:
            _refuse_unknown(reader.unknown)
        return content

    def _find(self, keys: object, at: int) -> None:
        if not isinstance(keys, list) or {*map(str, keys)} != self._sizes.keys() or len(keys) != len(self._sizes):
            raise CheckpointError("it must list its storages after its objects")
        for key in map(str, keys):
            begin, end = at + 8, at + 8 + self._sizes[key]
            if end > len(self._data):
                raise CheckpointError(f"it is truncated ({end:,} bytes must be there, {len(self._data):,} are)")
            self._storages[key] = as_storage(self._data[begin:end], mapped=self._mapped)
            at = end

    def _persistent(self, persistent_id: object) -> Any:
        if isinstance(persistent_id, tuple) and persistent_id[:1] == ("module",) and len(persistent_id) > 1:
            return persistent_id[1]  # a class, and its source, which is not looked at
        dtype, key, location, numel = _asked(persistent_id, 6)
        if location == "meta":
            return Storage(dtype, None)
        if isinstance(persistent_id, tuple) and persistent_id[5] is not None:
            raise CheckpointError("its storages must not be views of others, as torch before 0.4 saved them")
        if key in self._storages:
            return Storage(dtype, self._storages[key])
        size_bytes = numel * dtype.itemsize
        if size_bytes > len(self._data):
            raise CheckpointError(f"it is truncated (a storage of {size_bytes:,} bytes must be in the file)")
        if self._sizes.setdefault(key, size_bytes) != size_bytes:
            raise CheckpointError("each storage must have one size")
        return Storage(dtype, None)
