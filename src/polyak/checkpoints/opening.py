"""Opens a checkpoint, whatever its format."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from polyak.checkpoints import deepspeed, deepspeed_universal, distributed, folder, megatron, nemo, one_file
from polyak.checkpoints.metrics import metrics_of
from polyak.checkpoints.moments import moment_of
from polyak.checkpoints.settings import settings_in
from polyak.checkpoints.stored import Files, Found, StoredTensor
from polyak.checkpoints.weights import weights_in
from polyak.compat.saved import most_bytes
from polyak.compat.words import listed, shown
from polyak.errors import CheckpointError
from polyak.time import TimeUnit


class Reader(Protocol):
    """The members of a reader's module."""

    @property
    def FORMAT(self) -> str:  # noqa: N802  a constant of the module
        """What it reads, as text for messages."""
        ...

    @property
    def accepts(self) -> Callable[[Path], bool]:
        """Whether it can read what is at a path."""
        ...

    @property
    def read(self) -> Callable[[Path, Files], Found]:
        """Read what is at a path, but no tensor."""
        ...


# The first that accepts a path reads it.
READERS: Sequence[Reader] = (distributed, deepspeed_universal, deepspeed, megatron, folder, nemo, one_file)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that is open.

    Args:
        path: Where it is.
        format: What it is, for people.
        place: Where the weights are in it, as ``state.model``; empty if it is all weights.
        tensors: The weights, by name.
        moment: When it was saved, in the units that are known.
        metrics: Measured when it was saved, by name.
        extra: Extra states that are no tensors, but plain values, by name.
        left: The names of extra states that are neither, and stay behind.
        layout: By tensor the name of its file, for a folder of files with weights.
        files: Its files.
        settings: Hyper-parameters of the run, by their places in the checkpoint.
        folder: In which folder of the checkpoint the weights are; empty for itself.
        blobs: Extra states of ``torch.distributed.checkpoint`` by their names, each with its keys and its bytes.
        buffers: Which of the weights are buffers, of a network that was pickled as an object; none of a state dict.
    """

    path: Path
    format: str
    place: str
    tensors: Mapping[str, StoredTensor]
    moment: Mapping[TimeUnit, float]
    metrics: Mapping[str, float]
    extra: Mapping[str, Any]
    left: Sequence[str]
    layout: Mapping[str, str]
    files: Files
    settings: Mapping[str, object] = field(default_factory=dict)
    folder: str = ""
    blobs: Mapping[str, tuple[tuple[str | int, ...], memoryview]] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()

    @property
    def size_bytes(self) -> int:
        """The size of the weights."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())


def open_checkpoint(path: Path, key: str | None = None, prefix: str | None = None) -> Checkpoint:
    """Open a checkpoint: a file of torch or safetensors, or a folder. No tensor is read yet, and no code in it runs.

    Args:
        path: Where it is.
        key: Where the weights are in it, as ``model`` or ``state.model``; None to find out.
        prefix: How the names of the tensors to take begin, as ``teacher.``, which is left out of them; None for all.

    Raises:
        CheckpointError: If it cannot be read safely, or it is not clear where the weights are.
    """
    files = Files()
    with named_errors(path):
        found = read(path, files)
        place, tensors, extra, left, buffers = weights_in(found.content, files, key, prefix)
        for file in dict.fromkeys(file for one in tensors.values() if one.saved for _, file in one.saved.shards):
            files.open(path / found.folder / file)  # that it is there is known now, and its hash is computed
        moment = moment_of(path, found.content, found.clock)
        metrics = metrics_of(path, found.content, found.clock)
        settings = settings_in(found.content)
        if found.format != distributed.FORMAT:  # whose shards are compared with their tensors
            _require_possible(tensors, files.size_bytes)
    named = {name: _named(path, tensor) for name, tensor in tensors.items()}
    return Checkpoint(
        path,
        found.format,
        place,
        named,
        moment,
        metrics,
        extra,
        left,
        found.layout,
        files,
        settings,
        found.folder,
        found.blobs,
        buffers,
    )


def read(path: Path, files: Files) -> Found:
    """Read what is at a path, but no tensor.

    Args:
        path: The path of a checkpoint.
        files: Opens its files.

    Raises:
        CheckpointError: If it cannot be read safely.
    """
    reader = next(reader for reader in READERS if reader.accepts(path))
    found = reader.read(path, files)
    if reader is distributed and (others := folder.weight_files(path)):
        raise CheckpointError(
            f"a folder must have the weights of one model ({shown(path)} has .metadata and "
            f"{listed(one.name for one in others)}); move one to a folder of its own"
        )
    return replace(found, format=found.format or reader.FORMAT)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Let errors in a ``with`` block name the checkpoint.

    Args:
        path: The path of the checkpoint.

    Raises:
        CheckpointError: Instead of any error.
    """
    try:
        yield
    except CheckpointError as error:
        raise error if shown(path) in str(error) else CheckpointError(f"{shown(path)}: {error}") from None
    except OSError as error:  # a folder that may not be read, or a disk that fails
        raise CheckpointError(
            f"{shown(path)} must be readable ({error.strerror or shown(error)}); change its permissions, or copy it"
        ) from error
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as error:
        # A file of a known format with something else where its numbers and tensors should be.
        said = f"{type(error).__name__}: {shown(error)}"
        raise CheckpointError(f"{shown(path)} must be whole (reading it gave {said}); save it again") from error


def _require_possible(tensors: Mapping[str, StoredTensor], held: int) -> None:
    claimed = {name: tensor.size_bytes for name, tensor in tensors.items()}
    if sum(claimed.values()) > most_bytes(held):
        name = max(claimed, key=claimed.__getitem__)
        raise CheckpointError(
            f"tensors must not be far larger than their file ({shown(name)} repeats its numbers to {claimed[name]:,} "
            f"bytes, of a file of {held:,}); save it contiguous"
        )


def _named(path: Path, tensor: StoredTensor) -> StoredTensor:
    """Return a tensor whose errors name the checkpoint."""

    def read(first: int, last: int) -> Tensor:
        try:
            return tensor.read(first, last)
        except CheckpointError as error:
            raise CheckpointError(f"{shown(path)} cannot be read: {error}; leave it out, or save it again") from None

    take = tensor.take
    return replace(tensor, read=read, take=None if take is None else lambda box: _named(path, take(box)))
