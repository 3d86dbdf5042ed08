"""Checkpoints of the trainer: one file each, or a folder where tensors are in shards; written whole or not at all."""

import hashlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from polyak import sharding
from polyak.algorithm import MetricLogger
from polyak.averaging.swap import swap_of
from polyak.errors import CheckpointError, PlanWarning
from polyak.events import Event
from polyak.sharding import OneProcess, is_sharded
from polyak.storage.atomic import TEMPORARY, new_folder, put, remove, remove_whole, temporary_path
from polyak.tensors.slots import slots, unwrap
from polyak.time import Time
from polyak.trainer import checksums
from polyak.trainer.callback import Callback
from polyak.trainer.parallel import Group, laid_out
from polyak.trainer.state import TrainerState, ends_run, or_at_the_end, question

_FORMAT = 3
_WITHOUT_CHECKSUMS = 2  # a format that is read too
_NAME = re.compile(r"ep(\d+)-ba(\d+)(\.pt)?")
# In a folder: all but the sharded tensors, in whose places there are mappings of this one key.
_REST = "rest.pt"
_SHARDED = "polyak_sharded"
# In the same file: the hashes of the other files in the folder.
_FILES = "polyak_files"
_UNREADABLE = "it cannot be read"


class DamagedCheckpointError(CheckpointError):
    """A checkpoint file that is not what was written."""


def model_entries(model: nn.Module) -> dict[str, Any]:
    """Return the model's part of a checkpoint: ``model``, ``training_model``, and in ``model_holds`` what is what.

    While an average is lent to the model, ``model`` has the averaged weights and ``training_model`` the training
    weights; else ``model`` has the training weights and ``training_model`` is None.

    Args:
        model: Wrapped or not; names are saved without the wrapper's prefix.
    """
    inner = unwrap(model)
    sharding.reshard(inner)
    entries: dict[str, Any] = {"model": inner.state_dict(), "training_model": None, "model_holds": "training weights"}
    if swap := swap_of(model):
        saved = swap.training()
        kept: dict[int, Tensor] = {id(s.tensor): saved[s.name] for s in slots(inner) if s.name in saved}
        training = inner.state_dict(keep_vars=True)
        entries["training_model"] = {name: kept.get(id(t), entries["model"][name]) for name, t in training.items()}
        entries["model_holds"] = f"averaged weights of {swap.holder}"
    return entries


def load_model(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a model's weights, however they and it are divided over ranks.

    Args:
        model: Wrapped or not.
        weights: As saved.
    """
    inner = unwrap(model)
    sharding.reshard(inner)
    inner.load_state_dict(_fitted(weights, inner.state_dict(keep_vars=True)))


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any], saved_dtypes: Mapping[int, torch.dtype]) -> None:
    """Load an optimizer's state, however it and the parameters are divided over ranks.

    Args:
        optimizer: Over as many parameters.
        state: As saved.
        saved_dtypes: In which its parameters were saved, by ``id``.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    fitted = {
        index: _fitted(values, dict.fromkeys(values, parameters[index])) if index < len(parameters) else values
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": fitted})
    for index, values in fitted.items():
        if index < len(parameters) and parameters[index].dtype == saved_dtypes.get(id(parameters[index])):
            own = optimizer.state.get(parameters[index])
            if isinstance(own, dict):
                own.update({name: _as_saved(values.get(name), loaded) for name, loaded in own.items()})


def saved_dtypes(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[int, torch.dtype]:
    """Return the dtype in which each of a model's parameters was saved, by the parameter's ``id``.

    Args:
        model: Wrapped or not.
        weights: As saved.
    """
    named = unwrap(model).named_parameters(remove_duplicate=False)
    return {id(parameter): weights[name].dtype for name, parameter in named if name in weights}


def _as_saved(saved: Any, loaded: Any) -> Any:
    """Return what an optimizer loaded, with tensors in the dtypes in which they were saved.

    torch casts them to the parameter's. But of a parameter that has not changed its dtype they are right as they were:
    NAdam has a float32 number for a float64 parameter, and loses digits of it for a bfloat16 one.
    """
    if isinstance(loaded, Tensor) and isinstance(saved, Tensor) and loaded.dtype != saved.dtype:
        return saved.to(loaded.device)
    if isinstance(loaded, (list, tuple)) and isinstance(saved, (list, tuple)) and len(loaded) == len(saved):
        return type(loaded)(_as_saved(a, b) for a, b in zip(saved, loaded, strict=True))
    if isinstance(loaded, dict) and isinstance(saved, Mapping):
        return {key: _as_saved(saved.get(key), value) for key, value in loaded.items()}
    return loaded


def _fitted(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what was saved, with its tensors divided as ours of the same names and shapes are."""
    if not any(isinstance(value, Tensor) and is_sharded(value) for value in (*saved.values(), *ours.values())):
        return saved

    def fits(name: str, value: Any) -> bool:
        own = ours.get(name)
        return isinstance(value, Tensor) and isinstance(own, Tensor) and own.shape == value.shape

    return {name: laid_out(value, ours[name]) if fits(name, value) else value for name, value in saved.items()}


def has_shards(state: Mapping[str, Any]) -> bool:
    """Return whether there are sharded tensors in a nested container.

    Args:
        state: As ``state_dict`` returns it.
    """
    found = dict[str, Tensor]()
    _without_sharded(state, "", found)
    return bool(found)


def write(checkpoint: Mapping[str, Any], path: Path, group: Group) -> None:
    """Write a checkpoint such that ``path`` is complete or not there, whatever happens meanwhile. All ranks take part.

    It is a file if it has no sharded tensors. Else it is a folder: the sharded tensors in it are written by all ranks
    through ``torch.distributed.checkpoint``, the rest by the first.

    Args:
        checkpoint: Tensors and plain containers; those of the first rank count.
        path: Where; the folder that it is in is made if need be.
        group: The ranks.

    Raises:
        ShardingError: On the other ranks, if the first could not write.
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
    """Write all but the shards, and give the checkpoint its final name."""
    if not folder:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
    with (temporary / _REST if folder else temporary).open("w+b") as file:
        torch.save(rest, file)
        checksums.append(file)
    put(temporary, path, over_folder=True)


def _without_sharded(value: Any, name: str, sharded: dict[str, Tensor]) -> Any:
    """Return a nested container with what is said of its sharded tensors in their places, and note those by name."""
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
    """Return a nested container with tensors in the places of what is said of them, and note those by name."""
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
        group: Ranks among which the sharded tensors are divided, each reading what it gets; None reads all of them.

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
    """Read the newest checkpoint that is not damaged; warn of those that are. Return it after its path.

    Args:
        paths: Of the checkpoints, newest first; at least one.
        group: As for ``read``.

    Raises:
        CheckpointError: If one is not a checkpoint of the trainer, or all are damaged; that names the newest.
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
    except Exception as error:  # what torch raises for a file that is cut off or damaged is not specified
        # What torch says of a file that it cannot unpickle is a page of advice, to load it unsafely.
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
    """Return the hashes of files in a folder; each is read by one rank. Of one that cannot be read, return why."""
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
    """See that the files of a folder have the hashes they had when they were written."""
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
        whole = _with_sharded(checkpoint, lambda shape, dtype: torch.empty(shape, dtype=dtype), made)
    else:
        mesh = init_device_mesh(group.device.type, (group.size,))
        whole = _with_sharded(checkpoint, lambda shape, dtype: sharding.empty(shape, dtype, mesh), made)
    try:
        dcp.load(made, folder, alone=group is None or group.kind is None)
    except Exception as error:  # what torch raises for a damaged file is not specified
        raise DamagedCheckpointError(f"the shards in {folder} cannot be read: {error}") from error
    return whole


class CheckpointSaver(Callback):
    """Save a checkpoint each ``save_interval`` and at the end of the run.

    A checkpoint has the averaged weights, if there are any, as ``model``, and the training weights apart, as
    ``training_model``; ``model_holds`` says so. ``torch.load(path, weights_only=True)["model"]`` is for evaluation.
    Where the model or an average is divided over ranks, a checkpoint is a folder, of which each rank writes its part.

    Args:
        folder: Where to save; checkpoints are named by epochs and batches, as ``ep1-ba500.pt``, or ``ep1-ba500`` for
            a folder. All ranks must see it.
        save_interval: A time in any unit, or epochs as a number, saved at the ends of epochs for ``ep`` and of batches
            for others; or a function that says when, of the state and the event (``BATCH_CHECKPOINT`` or
            ``EPOCH_CHECKPOINT``).
        keep: How many of the newest to keep; None keeps all.

    Raises:
        TimeError: If ``save_interval`` is no time, or not above 0.
        ValueError: If ``keep`` is below 1.
    """

    def __init__(
        self,
        folder: str | Path,
        save_interval: str | Time | int | Callable[[TrainerState, Event], bool] = "1ep",
        keep: int | None = None,
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be None or at least 1 (got {keep})")
        self.folder = Path(folder).absolute()  # for good, also if the program changes its directory
        self.keep = keep
        self.save_interval: Callable[[TrainerState, Event], Any]
        if not isinstance(save_interval, (str, int, Time)) and callable(save_interval):
            self.save_interval = save_interval
        else:
            due = question("save_interval", save_interval, at=(Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT))
            self.save_interval = or_at_the_end(due)

    def run_event(self, event: Event, state: TrainerState, logger: MetricLogger) -> None:
        """Save if due; at the beginning, remove what is left of a save that was cut off.

        Args:
            event: What happened.
            state: What there is.
            logger: Not used.
        """
        del logger
        if event is Event.FIT_START and state.rank == 0:
            # What a process left that was killed while it wrote.
            for suffix in (TEMPORARY, ".draft"):  # the second is that of earlier versions
                for temporary in self.folder.glob(f".ep*-ba*{suffix}"):
                    remove(temporary)
        # Asked by its truth: it may answer with another library's bool.
        if event in (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT) and (
            self.save_interval(state, event) or ends_run(state, event)
        ):
            self._save(state)

    def _save(self, state: TrainerState) -> None:
        now = state.timestamp
        suffix = "" if state.sharded else ".pt"
        state.save_checkpoint(self.folder / f"ep{now.epoch.value}-ba{now.batch.value}{suffix}")
        if self.keep is not None and state.rank == 0:
            # What lies ahead is of a run that went further before this one was resumed from an earlier moment.
            passed = [(moment, path) for moment, path in self._saved() if moment <= (now.batch.value, now.epoch.value)]
            for _, path in passed[: -self.keep]:
                remove_whole(path)

    def _saved(self) -> list[tuple[tuple[int, int], Path]]:
        """Return the checkpoints in the folder with their batches and epochs, oldest first."""
        found = [(match, path) for path in self.folder.glob("ep*") if (match := _NAME.fullmatch(path.name))]
        return sorted(((int(match[2]), int(match[1])), path) for match, path in found)

    def latest(self) -> Path | None:
        """Return the newest checkpoint in the folder, if there is one."""
        return next(iter(self.newest_first()), None)

    def newest_first(self) -> list[Path]:
        """Return the checkpoints in the folder, the newest first."""
        return [path for _, path in reversed(self._saved())]
