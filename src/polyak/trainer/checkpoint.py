"""Reads and writes checkpoints: one file, or a folder if tensors are sharded, written completely or not at all."""

import hashlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from polyak import sharding
from polyak.errors import CheckpointError, PlanWarning
from polyak.sharding import OneProcess, is_sharded
from polyak.storage.atomic import new_folder, put, remove, temporary_path
from polyak.trainer import checksums
from polyak.trainer.parallel import Group

_FORMAT = 3
_WITHOUT_CHECKSUMS = 2  # an earlier format, which can be read
_NAME = re.compile(r"ep(\d+)-ba(\d+)(\.pt)?")
# In a folder: the file with everything except sharded tensors, in which mappings with this key stand for these.
_REST = "rest.pt"
_SHARDED = "polyak_sharded"
# In the same file: the hashes of the other files in the folder.
_FILES = "polyak_files"
_UNREADABLE = "it cannot be read"


class DamagedCheckpointError(CheckpointError):
    """A checkpoint file that differs from what was written."""


def has_shards(state: Mapping[str, Any]) -> bool:
    """Return whether there are sharded tensors in a nested container.

    Args:
        state: As ``state_dict`` returns it.
    """
    found = dict[str, Tensor]()
    _without_sharded(state, "", found)
    return bool(found)


def write(checkpoint: Mapping[str, Any], path: Path, group: Group) -> None:
    """Write a checkpoint; ``path`` is complete or absent, whatever happens meanwhile. A collective: all ranks call it.

    Without sharded tensors it is a file. With them it is a folder: all ranks write the sharded tensors with
    ``torch.distributed.checkpoint``, and rank 0 writes the rest.

    Args:
        checkpoint: Tensors and plain containers; full tensors are written as rank 0 has them.
        path: Where to write it; its parent folder is created if it is missing.
        group: The ranks.

    Raises:
        ShardingError: On the other ranks, if rank 0 could not write.
    """
    sharded = dict[str, Tensor]()
    without = _without_sharded(checkpoint, "", sharded)
    rest = {"polyak_checkpoint": _FORMAT, **(without if sharded else checkpoint)}
    temporary = temporary_path(path)
    try:
        if sharded:
            group.ranks.on_rank_0(lambda: new_folder(temporary), f"write {path}")
            _write_shards(sharded, temporary)
            rest[_FILES] = _hashes_of_new(temporary, group)
        group.ranks.on_rank_0(lambda: _finish(rest, temporary, path, folder=bool(sharded)), f"write {path}")
    except BaseException:
        if group.rank == 0:
            remove(temporary)
        raise


def _write_shards(sharded: dict[str, Tensor], folder: Path) -> None:
    from polyak.sharding import dcp  # noqa: PLC0415  half a second

    dcp.save(sharded, folder)


def _finish(rest: Mapping[str, Any], temporary: Path, path: Path, *, folder: bool) -> None:
    """Write everything except the shards, and give the checkpoint its final name."""
    if not folder:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
    with (temporary / _REST if folder else temporary).open("w+b") as file:
        torch.save(rest, file)
        checksums.append(file)
    put(temporary, path, over_folder=True)


def _without_sharded(value: Any, name: str, sharded: dict[str, Tensor]) -> Any:
    """Return a nested container with descriptions in place of its sharded tensors, and note these by name."""
    if isinstance(value, Tensor):
        if not is_sharded(value):
            return value
        sharded[name] = value
        return {_SHARDED: name, "shape": tuple(value.shape), "dtype": value.dtype}
    if isinstance(value, Mapping):
        return {key: _without_sharded(inner, f"{name}.{key}".strip("."), sharded) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_without_sharded(inner, f"{name}.{i}", sharded) for i, inner in enumerate(value))
    return value


def _with_sharded(value: Any, make: Callable[[tuple[int, ...], torch.dtype], Tensor], made: dict[str, Tensor]) -> Any:
    """Return a nested container with tensors in place of their descriptions, and note these by name."""
    if isinstance(value, Mapping):
        if _SHARDED in value:
            tensor = made[value[_SHARDED]] = make(value["shape"], value["dtype"])
            return tensor
        return {key: _with_sharded(inner, make, made) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_with_sharded(inner, make, made) for inner in value)
    return value


def read(path: Path, group: Group | None = None) -> dict[str, Any]:
    """Read a checkpoint that ``write`` wrote, by any number of ranks; tensors are on the CPU.

    Args:
        path: The file or folder.
        group: The ranks over which the tensors are sharded, each reading its shards; None reads full tensors.

    Raises:
        CheckpointError: If it is absent, damaged, or not such a checkpoint. All ranks raise it.
    """
    checkpoint: dict[str, Any] = {}
    error: CheckpointError | None = None
    try:
        checkpoint = _read_rest(path, verify=group is None or group.rank == 0)
    except CheckpointError as raised:
        error = raised
    errors = [error] if group is None else group.ranks.gather(None if error is None else type(error)(str(error)))
    if error is not None:
        raise error
    for other in filter(None, errors):
        raise other
    if not path.is_dir():
        return checkpoint
    _check_files(checkpoint, path, group)
    return _read_shards(checkpoint, path, group)


def read_newest(paths: Sequence[Path], group: Group) -> tuple[Path, dict[str, Any]]:
    """Return the path and the content of the newest checkpoint that is not damaged; warn of newer ones.

    Args:
        paths: The paths of the checkpoints, newest first; at least one.
        group: As for ``read``.

    Raises:
        CheckpointError: If one is not a checkpoint of the trainer; if all are damaged, for the newest.
    """
    newest: DamagedCheckpointError | None = None
    for path in paths:
        try:
            checkpoint = read(path, group)
        except DamagedCheckpointError as error:
            newest = newest or error
            continue
        if newest is not None:
            warnings.warn(f"{newest}; the run resumes from {path}, an older one", PlanWarning, stacklevel=4)
        return path, checkpoint
    assert newest is not None
    raise newest


def _read_rest(path: Path, *, verify: bool) -> dict[str, Any]:
    file = path / _REST if path.is_dir() else path
    try:
        has_checksum = checksums.verify(file) if verify else True
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        if path.is_dir():
            raise DamagedCheckpointError(f"{path} must be a checkpoint of polyak.Trainer; it has no {_REST}") from None
        raise CheckpointError(f"a checkpoint must exist to be loaded (there is no {path})") from None
    except PermissionError as error:
        raise CheckpointError(f"{file} must be readable to be loaded ({error}): change its permissions") from error
    except Exception as error:  # torch does not specify what it raises for a damaged file
        # For a file that it cannot unpickle, torch's message explains at length how to load it unsafely.
        reason = "torch.load cannot read it" if isinstance(error, UnpicklingError) else error
        raise DamagedCheckpointError(
            f"{file} must be a checkpoint of polyak.Trainer ({reason}); it is damaged, or a file of another kind"
        ) from error
    found = checkpoint.get("polyak_checkpoint") if isinstance(checkpoint, dict) else None
    if found not in (_FORMAT, _WITHOUT_CHECKSUMS):
        raise CheckpointError(
            f"{file} must be a checkpoint of polyak.Trainer in format {_FORMAT} (got "
            f"{'a file of another kind' if found is None else f'format {found!r}'}); to start from other weights, use "
            "model.load_state_dict before Trainer(...)"
        )
    if found == _FORMAT and not has_checksum:
        raise DamagedCheckpointError(f"{file} must end with its SHA-256, and does not: it is damaged")
    return checkpoint


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _hashes(folder: Path, names: Sequence[str], group: Group | None) -> dict[str, str]:
    """Return the hashes of files in a folder, each read by one rank; for one that cannot be read, the reason."""
    ranks = OneProcess() if group is None else group.ranks
    own = {name: _hash(folder / name) for name in names[ranks.rank :: ranks.world_size]}
    return {name: found for of_rank in ranks.gather(own) for name, found in of_rank.items()}


def _hashes_of_new(folder: Path, group: Group) -> dict[str, str]:
    found = _hashes(folder, group.ranks.from_rank_0(_names(folder) if group.rank == 0 else []), group)
    unreadable = {name: why for name, why in found.items() if why.startswith(_UNREADABLE)}
    if unreadable:
        raise CheckpointError(f"all ranks must see the files that are written to {folder} (got {unreadable})")
    return found


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{_UNREADABLE}: {error.strerror}"


def _check_files(checkpoint: dict[str, Any], folder: Path, group: Group | None) -> None:
    """Check that the files of a folder have the hashes that they had when they were written."""
    expected = checkpoint.pop(_FILES, {})
    found = _hashes(folder, sorted(expected), group)
    wrong = {name: found[name] for name in expected if found[name] != expected[name]}
    for name, got in sorted(wrong.items()):
        raise DamagedCheckpointError(
            f"{folder / name} must have the SHA-256 {expected[name]}, as when the checkpoint was written (got {got}): "
            "it is damaged"
        )


def _read_shards(checkpoint: dict[str, Any], folder: Path, group: Group | None) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415

    from polyak.sharding import dcp  # noqa: PLC0415  half a second

    made = dict[str, Tensor]()
    if group is None or group.kind is None:
        full = _with_sharded(checkpoint, lambda shape, dtype: torch.empty(shape, dtype=dtype), made)
    else:
        mesh = init_device_mesh(group.device.type, (group.size,))
        full = _with_sharded(checkpoint, lambda shape, dtype: sharding.empty(shape, dtype, mesh), made)
    try:
        dcp.load(made, folder, alone=group is None or group.kind is None)
    except Exception as error:  # what torch raises for a damaged file is not specified
        raise DamagedCheckpointError(f"the shards in {folder} cannot be read: {error}") from error
    return full
