"""Averages in folders, saved by diffusers' ``EMAModel`` or by ``torch.distributed.checkpoint``."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from polyak.compat.files import Content, load, load_bytes, opened, read_json
from polyak.compat.found import Averaged, count, tensors_of
from polyak.compat.pickles import StandIn, Window
from polyak.compat.saved import Checksum
from polyak.compat.tensors import Unread, unpickler
from polyak.compat.words import shown
from polyak.errors import CheckpointError

_CONFIG = "config.json"
_METADATA = ".metadata"
# Of a sharded checkpoint of polyak.Trainer: what is not a sharded tensor, with the names of those.
_REST = "rest.pt"
_SHARDED = "polyak_sharded"
# Of the files of torch.save in a folder of diffusers; others, such as optimizer.bin, are no weights.
_BINS = ("diffusion_pytorch_model*.bin", "pytorch_model*.bin")


def is_diffusers(path: Path) -> bool:
    """Return whether a folder was not saved by ``torch.distributed.checkpoint``.

    Args:
        path: The path of a file or folder.
    """
    return path.is_dir() and not (path / _METADATA).exists()


def diffusers(path: Path) -> Averaged:
    """Read what ``EMAModel.save_pretrained`` wrote.

    Args:
        path: The folder.

    Raises:
        CheckpointError: If it is not one, or cannot be read.
    """
    try:
        config = read_json(path / _CONFIG)
    except CheckpointError:
        config = None
    if not isinstance(config, Mapping) or not {"decay", "optimization_step", "_class_name"} <= config.keys():
        raise CheckpointError(
            "a folder must be one that diffusers' EMAModel.save_pretrained wrote, with decay and optimization_step in "
            f"its config.json, or one of torch.distributed.checkpoint ({shown(path)} is neither); give the file instead"
        )
    files = sorted(path.glob("*.safetensors")) or sorted(one for pattern in _BINS for one in path.glob(pattern))
    found = dict[str, Tensor]()
    for file in files:
        tensors = tensors_of(load(file))
        if twice := found.keys() & tensors.keys():
            raise CheckpointError(f"each tensor must be in one file ({shown(min(twice))} is in several); give one file")
        found |= tensors
    notes = f"{shown(config['_class_name'])}, decay {count(config['decay'])}"
    return Averaged("diffusers EMAModel", found, (f"{notes}, {count(config['optimization_step'])} updates",))


# torch.distributed.checkpoint: its metadata is a pickle of dataclasses, and its files hold what torch.save wrote, of
# one item after the other.


def load_distributed(path: Path) -> Content:
    """Return what ``torch.distributed.checkpoint`` saved to a folder, by any number of ranks, without running code.

    Args:
        path: The folder.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        content = Distributed(path).load()
        return with_rest(path, content)
    except CheckpointError as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {error}") from None


def with_rest(path: Path, tensors: Content) -> Content:
    """Return what polyak's Trainer keeps in a file next to its sharded tensors, with these tensors put in.

    Args:
        path: The path of the folder. Without that file the tensors are returned.
        tensors: The tensors, by their names in the metadata.

    Raises:
        CheckpointError: If the file cannot be read, or names other tensors.
    """
    return _with_rest(load(path / _REST), tensors) if (path / _REST).exists() else tensors


def _with_rest(value: Any, tensors: Content) -> Any:
    if isinstance(value, Mapping) and _SHARDED in value:
        if value[_SHARDED] not in tensors:
            raise CheckpointError(
                f"it must have all tensors that {_REST} names ({shown(value[_SHARDED])} is not there)"
            )
        return tensors[value[_SHARDED]]
    if type(value) is dict:
        return {key: _with_rest(inner, tensors) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_rest(inner, tensors) for inner in value)
    return value


def _fields(value: object, kind: str) -> Mapping[str, Any]:
    """Return the fields of a dataclass with a given name."""
    if isinstance(value, StandIn) and value.of.rpartition(".")[2] == kind and isinstance(value.state, Mapping):
        return value.state
    raise CheckpointError(f"its metadata must have a {kind} (got {shown(value)})")


Box = tuple[tuple[int, int], ...]
Shards = list[tuple[Box, Tensor]]


class Distributed:
    """What ``torch.distributed.checkpoint`` saved to a folder.

    Args:
        folder: The folder.
        open_file: Returns the bytes of a file in it.

    Raises:
        CheckpointError: If its metadata cannot be read.
    """

    def __init__(self, folder: Path, open_file: Callable[[Path], memoryview] = opened) -> None:
        self._folder, self._open = folder, open_file
        self._files: dict[str, memoryview] = {}
        metadata = unpickler(_nothing_outside).load(Window(opened(folder / _METADATA)))
        fields = _fields(metadata, "Metadata")
        self._items = _mapping(fields.get("state_dict_metadata"))
        self._paths = _mapping(fields.get("planner_data") or {})
        self._stored = defaultdict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]](list)
        for index, place in _mapping(fields.get("storage_data")).items():
            one = _fields(index, "MetadataIndex")
            self._stored[str(one.get("fqn"))[:4096]].append((one, _fields(place, "_StorageInfo")))

    def load(self, tensor: Callable[[str, Mapping[str, Any]], Any] | None = None) -> Content:
        """Return what was saved.

        Args:
            tensor: Returns what stands for a tensor, from its name and its metadata; None for the tensor itself.

        Raises:
            CheckpointError: If the folder is damaged.
        """
        found: dict[Any, Any] = {}
        for name, item in self._items.items():
            if isinstance(item, StandIn) and item.of.endswith(".TensorStorageMetadata"):
                value = (tensor or self.tensor)(name, _fields(item, "TensorStorageMetadata"))
            else:
                value = self._object(name)
            *outer, last = self.keys(name)
            inner = found
            for key in outer:
                inner = inner.setdefault(key, {})
                if not isinstance(inner, dict):
                    raise CheckpointError(f"its metadata must have one place for {shown(name)}")
            inner[last] = value
        content = _with_lists(found)
        return content if isinstance(content, Mapping) else found

    def keys(self, name: str) -> tuple[str | int, ...]:
        """Return the keys that lead to an item in the mappings that were saved.

        Args:
            name: The name in the metadata.

        Raises:
            CheckpointError: If the metadata do not say it.
        """
        keys = self._paths.get(name, (name,))
        if not isinstance(keys, tuple) or not keys or not all(isinstance(key, (str, int)) for key in keys):
            raise CheckpointError(f"its metadata must say where {shown(name)} belongs")
        return keys

    def boxes(self, name: str, item: Mapping[str, Any], shape: tuple[int, ...]) -> Iterator[tuple[Box, str]]:
        """Yield where each shard of a tensor begins and ends in each dimension, and the name of its file.

        Args:
            name: The name in the metadata.
            item: What the metadata say of it.
            shape: The shape of the tensor.

        Raises:
            CheckpointError: If the metadata do not say it.
        """
        chunks = [_fields(one, "ChunkStorageMetadata") for one in item.get("chunks") or ()]
        sizes = {metadata_shape(one.get("offsets")): metadata_shape(one.get("sizes")) for one in chunks}
        for index, place in self._places(name):
            offset = index.get("offset")
            begin = (0,) * len(shape) if offset is None else metadata_shape(offset)
            size = sizes.get(begin, shape)
            yield tuple((a, a + n) for a, n in zip(begin, size, strict=True)), _file_of(place)

    def blobs(self, wanted: Callable[[str], bool]) -> dict[str, tuple[tuple[str | int, ...], memoryview]]:
        """Return the items that are not tensors, by name: the keys and the bytes of each.

        Args:
            wanted: Whether an item of a name is.
        """
        return {
            name: (self.keys(name), self._bytes(self._places(name, 1)[0][1]))
            for name, item in self._items.items()
            if wanted(name) and isinstance(item, StandIn) and item.of.endswith(".BytesStorageMetadata")
        }

    def _object(self, name: str) -> Any:
        ((_, place),) = self._places(name, 1)
        return load_bytes(self._bytes(place), self._folder)

    def tensor(self, name: str, item: Mapping[str, Any]) -> Any:
        """Return a tensor, made of its shards.

        Args:
            name: The name in the metadata.
            item: What the metadata say of it.

        Raises:
            CheckpointError: If the shards do not make up the tensor.
        """
        shape = metadata_shape(item.get("size"))
        shards = self.shards(name, shape)
        if isinstance(shards, Unread):
            return shards
        (box, first), *others = shards
        if not others and tuple(first.shape) == shape:
            return first
        whole = torch.empty(shape, dtype=first.dtype)
        for box, shard in shards:
            whole[tuple(slice(*one) for one in box)] = shard
        return whole

    def shards(
        self, name: str, shape: tuple[int, ...], unchecked: dict[int, Checksum] | None = None
    ) -> Shards | Unread:
        """Return the shards of a tensor, each with where it begins and ends in each dimension.

        Args:
            name: The name in the metadata.
            shape: The shape of the tensor.
            unchecked: As for `load_saved`: to read no tensor now.

        Raises:
            CheckpointError: If they do not make up the tensor.
        """
        found: Shards = []
        for index, place in self._places(name):
            part = load_bytes(self._bytes(place), self._folder, unchecked=unchecked)
            if not isinstance(part, Tensor):
                return part if isinstance(part, Unread) else Unread(f"{shown(part)} where a tensor should be")
            offset = index.get("offset")
            begin = (0,) * len(shape) if offset is None else metadata_shape(offset)
            box = tuple((a, a + n) for a, n in zip(begin, part.shape, strict=True))
            if tuple(part.shape) == shape and not any(begin):
                return [(box, part)]
            found.append((box, part))
        boxes = [box for box, _ in found]
        numel = sum(shard.numel() for _, shard in found)
        inside = all(end <= n for box in boxes for (_, end), n in zip(box, shape, strict=True))
        dtypes = {shard.dtype for _, shard in found}
        if not inside or numel != torch.Size(shape).numel() or _overlap(boxes) or len(dtypes) > 1:
            raise CheckpointError(f"its shards of {shown(name)} must make up the tensor, of shape {shape}")
        return found

    def _places(self, name: str, most: int | None = None) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        found = self._stored.get(name, [])
        if not found or (most is not None and len(found) > most):
            raise CheckpointError(f"its metadata must say where {shown(name)} is stored")
        return found

    def _bytes(self, place: Mapping[str, Any]) -> memoryview:
        file, offset, length = _file_of(place), place.get("offset"), place.get("length")
        if type(offset) is not int or type(length) is not int or offset < 0 or length <= 0:
            raise CheckpointError(f"its metadata must say where in {shown(file)} something is")
        if place.get("transform_descriptors"):
            raise CheckpointError("its files must not be compressed or encrypted")
        if file not in self._files:
            self._files[file] = self._open(self._folder / file)
        if offset + length > len(self._files[file]):
            raise CheckpointError(f"its file {shown(file)} is truncated")
        return self._files[file][offset : offset + length]


def _file_of(place: Mapping[str, Any]) -> str:
    file = place.get("relative_path")
    if not isinstance(file, str) or PurePath(file).name != file or file in {"", ".", ".."}:
        raise CheckpointError(f"its files must be in the folder (got {shown(file)})")
    return file


def _nothing_outside(_: object) -> Any:
    raise CheckpointError("its metadata must hold no tensors")


def _mapping(value: object) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"its metadata must be mappings (got {shown(value)})")
    return value


def metadata_shape(value: object) -> tuple[int, ...]:
    """Return a shape in the metadata.

    Args:
        value: What is there.

    Raises:
        CheckpointError: If it is not one.
    """
    if isinstance(value, StandIn) and value.of.endswith("Size"):
        value = value.arguments
    if not isinstance(value, tuple) or not all(type(one) is int and one >= 0 for one in value):
        raise CheckpointError(f"its metadata must have shapes (got {shown(value)})")
    return tuple(value)


def _overlap(boxes: list[Box]) -> bool:
    """Return whether two shards have elements in common. Only shards that meet in one dimension are compared."""
    held = [box for box in boxes if all(begin < end for begin, end in box)]
    if not held or not held[0]:
        return len(held) > 1
    cut = max(range(len(held[0])), key=lambda i: len({box[i][0] for box in held}))
    near = list[Box]()
    for box in sorted(held, key=lambda one: one[cut]):
        near = [one for one in near if box[cut][0] < one[cut][1]]
        if any(all(a < d and c < b for (a, b), (c, d) in zip(one, box, strict=True)) for one in near):
            return True
        near.append(box)
    return False


def _with_lists(value: Any) -> Any:
    """Turn mappings whose keys are 0, 1, 2, ... back into the lists that they were."""
    todo: list[tuple[dict[Any, Any], Any, dict[Any, Any]]] = []
    for parent, key, inner in _inner(value):
        todo.append((parent, key, inner))
    for parent, key, inner in reversed(todo):
        if inner and [*sorted(k for k in inner if type(k) is int)] == [*range(len(inner))]:
            parent[key] = [inner[i] for i in range(len(inner))]
    return value


def _inner(value: dict[Any, Any]) -> Iterator[tuple[dict[Any, Any], Any, dict[Any, Any]]]:
    """Yield the mappings in a mapping, outer ones first, each with its place."""
    waiting = [value]
    while waiting:
        outer = waiting.pop()
        for key, inner in outer.items():
            if type(inner) is dict:
                yield outer, key, inner
                waiting.append(inner)
