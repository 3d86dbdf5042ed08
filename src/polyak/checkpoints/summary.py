"""What is in a checkpoint: its state dicts, when it was saved, and what was measured then. No tensor is read."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from polyak.checkpoints.metrics import metrics_of
from polyak.checkpoints.moments import moment_of
from polyak.checkpoints.opening import named_errors, read
from polyak.checkpoints.stored import Files, StoredTensor
from polyak.checkpoints.weights import state_dicts, stored_in, unread_kind
from polyak.compat.words import listed
from polyak.errors import CheckpointError
from polyak.time import TimeUnit


@dataclass(frozen=True, slots=True)
class StateDict:
    """A state dict in a checkpoint.

    Args:
        place: Where it is, as for ``--key``; empty if it is the file itself.
        tensors: The tensors, by name.
        unread: Tensors that cannot be read, each with its kind.
    """

    place: str
    tensors: Mapping[str, StoredTensor]
    unread: Mapping[str, str]

    @property
    def numel(self) -> int:
        """The number of elements of all tensors with floating-point or complex numbers."""
        return sum(one.numel for one in self.tensors.values() if one.dtype.is_floating_point or one.dtype.is_complex)

    @property
    def size_bytes(self) -> int:
        """The size of the values."""
        return sum(one.size_bytes for one in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors there are of each dtype."""
        return dict(Counter(str(one.dtype).removeprefix("torch.") for one in self.tensors.values()))


@dataclass(frozen=True, slots=True)
class Summary:
    """What is in a checkpoint.

    Args:
        path: Where it is.
        format: What it is, for people.
        files: How many files have weights.
        size_bytes: The size of these files.
        state_dicts: At least one.
        moment: When it was saved, in the units that are known.
        metrics: Measured when it was saved, by name.
    """

    path: Path
    format: str
    files: int
    size_bytes: int
    state_dicts: tuple[StateDict, ...]
    moment: Mapping[TimeUnit, float]
    metrics: Mapping[str, float]


def summarize(path: Path) -> Summary:
    """Return what is in a checkpoint, in any format that `open_checkpoint` reads.

    Args:
        path: Where it is.

    Raises:
        CheckpointError: If it cannot be read safely, or has no state dict.
    """
    files = Files()
    with named_errors(path):
        found = read(path, files)
        states = [
            StateDict(
                place,
                stored_in(state, files),
                {str(name): kind for name, value in state.items() if (kind := unread_kind(value))},
            )
            for place, state in state_dicts(found.content)
        ]
        if not states:
            raise CheckpointError(
                f"a checkpoint must have a state dict in it (it has {listed(found.content) or 'nothing'}); give another"
            )
        moment = moment_of(path, found.content, found.clock)
        metrics = metrics_of(path, found.content, found.clock)
    return Summary(path, found.format, len(files.paths), files.size_bytes, tuple(states), moment, metrics)
