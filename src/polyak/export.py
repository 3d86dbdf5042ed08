"""Exports the averaged weights to safetensors files, which any tool reads."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from polyak.averaging.agreement import agree_on_names, agree_on_plain
from polyak.averaging.ema import EMA
from polyak.averaging.habits import explained, kind_of
from polyak.errors import ArgumentError, CheckpointError, ExistsError
from polyak.sharding import Communicator, Ranks, communicator_of, local, pipeline_communicator_of, unwrapped
from polyak.storage.atomic import new_folder, put, remove, temporary_path
from polyak.storage.safetensors import DTYPE_NAMES, TensorInfo, write_tensors
from polyak.tensors.slots import all_slots, extra_states, places_of

Read = Callable[[list[str]], dict[str, Tensor]]
# In the temporary folder: what all ranks write, and rank 0 reads.
_SHARDS = "shards"
# What an export consists of.
_EXPORTED = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors|model\.safetensors\.index\.json")


class HasAverage(Protocol):
    """The member of what ``attach`` returns that an export reads."""

    @property
    def average(self) -> EMA:
        """The EMA among the algorithms."""
        ...


@explained("export_averaged(ema, model, 'averaged')", {})
def export_averaged(
    ema: EMA | HasAverage,
    model: nn.Module,
    folder: str | Path,
    *,
    max_file_bytes: float = 5e9,
    overwrite: bool = False,
) -> None:
    """Write the model with its averaged weights to a folder of safetensors files, in the model's dtypes.

    The files hold what the model's state dict would: averaged, copied and left tensors, tied ones under each of their
    names. They are named as those of Hugging Face: ``model.safetensors``, or several files with an index. Their
    metadata says how the average was made. Of a sharded model each rank writes its shards by
    ``torch.distributed.checkpoint``, and rank 0 puts them together from disk, a file at a time: no rank holds the full
    model. The stages of a pipeline write one folder, with the names of all stages. All ranks must call this.

    Args:
        ema: What ``attach`` returned, or the algorithm itself, whose average is written.
        model: The one in training, as it was given to the loop. The average is swapped in while writing.
        folder: A new or empty folder. It gets all files or none.
        max_file_bytes: The largest size of a file that holds more than one tensor.
        overwrite: Whether an earlier export in ``folder`` is replaced, once the new one is complete. A folder with
            other files is refused all the same: they would be lost.

    Raises:
        ArgumentError: If ``folder`` has the name of a file.
        ExistsError: If ``folder`` is not empty, and with ``overwrite`` if it has more than an earlier export.
        CheckpointError: If the model's state dict has a tensor that safetensors cannot hold: sparse, nested, without
            values, or of a dtype such as complex128 or quantized ones.
        LoanError: If averaging has not begun, or the model holds another average.
        ShardingError: If ranks disagree, or stages of a pipeline have different tensors of one name.

    Example:
        >>> from polyak import attach
        >>> from safetensors.torch import load_file
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> ema = attach(EMA("10ba"), model, optimizer)
        >>> for _ in range(20):
        ...     model(torch.ones(4, 2)).square().mean().backward()
        ...     optimizer.step()
        >>> export_averaged(ema, model, "averaged")
        >>> sorted(load_file("averaged/model.safetensors"))
        ['bias', 'weight']
    """
    average, folder = _average_of(ema, model), Path(folder)
    if folder.suffix in {".safetensors", *_PICKLES}:
        raise ArgumentError(f"an export is a folder (got '{folder}'); for one file, ema.save('averaged.safetensors')")
    stage = communicator_of(model)
    ranks = pipeline_communicator_of(model, stage) or stage
    ranks.on_every_rank("the export", lambda: _check(folder, model, overwrite=overwrite))
    with swapped_in(average, model):
        agree_on_values(model, ranks, stage)
        _export(average, model, folder, ranks, max_file_bytes=max_file_bytes, finish=_finish)


def save_averaged(ema: EMA | HasAverage, model: nn.Module, path: str | Path, *, overwrite: bool = False) -> None:
    """Write the model with its averaged weights to one safetensors file, or to a folder as ``export_averaged`` does.

    All ranks must call this.

    Args:
        ema: What ``attach`` returned, or the algorithm itself.
        model: The one in training, as it was given to the loop.
        path: A file whose name ends in ``.safetensors``, or a folder.
        overwrite: Whether an earlier file, or an earlier export in the folder, is replaced.

    Raises:
        ExistsError: If there is a file, or a folder that is not empty.
        ArgumentError: If the name has another ending, as ``.pt``.
        CheckpointError: If the model's state dict has a tensor that safetensors cannot hold.
        LoanError: If averaging has not begun, or the model holds another average.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentError(
            f"path must be a file .safetensors or a folder (got {kind_of(path)}); write "
            "ema.save('averaged.safetensors')"
        )
    path = Path(path)
    if path.suffix in _PICKLES:
        raise ArgumentError(
            f"averaged weights are saved as safetensors, in a file .safetensors or in a folder (got {str(path)!r}); to "
            "resume the run, torch.save(ema.state_dict(), ...) instead"
        )
    if path.suffix != ".safetensors":
        export_averaged(ema, model, path, overwrite=overwrite)
        return
    average = _average_of(ema, model)
    stage = communicator_of(model)
    ranks = pipeline_communicator_of(model, stage) or stage
    ranks.on_every_rank("the export", lambda: _check_file(path, model, overwrite=overwrite))
    with swapped_in(average, model):
        agree_on_values(model, ranks, stage)
        _export(average, model, path, ranks, max_file_bytes=math.inf, finish=_finish_file)


_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl"}


def _average_of(ema: object, model: object) -> EMA:
    """Return the EMA to export, with the model that it averages."""
    average = ema if isinstance(ema, EMA) else None if isinstance(ema, type) else getattr(ema, "average", None)
    if not isinstance(average, EMA) or not isinstance(model, nn.Module):
        raise ArgumentError(
            "an export takes what attach returned, then the model in training: export_averaged(ema, model, folder) "
            f"(got {kind_of(ema)}, {kind_of(model)})"
        )
    return average


@contextmanager
def swapped_in(average: EMA, model: nn.Module) -> Iterator[None]:
    """Swap the average in for a block. If the model holds it already, it stays.

    Args:
        average: It has begun.
        model: The one in training.
    """
    if average.ema_weights_active:
        yield
        return
    try:
        average.get_ema_model(model)
        yield
    finally:
        average.get_training_model(model)


def agree_on_values(model: nn.Module, ranks: Communicator, stage: Communicator) -> None:
    """Check that each name stands for one tensor: equal on all ranks of a stage, and on one stage only.

    Args:
        model: The model with the average in it.
        ranks: The ranks that train it, with all stages. All of them must call this.
        stage: Those of the same stage; the same object where there are no others.

    Raises:
        ShardingError: If it does not; it names the tensors.
    """
    places = places_of(model)
    plain = {s.name: s.tensor for s in all_slots(model) if s.is_parameter and not places.differs(s.name, s.tensor)}
    if isinstance(stage, Ranks):
        ranks.on_every_rank("the export", lambda: agree_on_plain(stage, plain))
    elif stage is not ranks:
        ranks.agree("the export", {})  # what other stages do
    if stage is not ranks and isinstance(ranks, Ranks):
        agree_on_names(ranks, stage, model)


def _export(
    ema: EMA,
    model: nn.Module,
    target: Path,
    ranks: Communicator,
    *,
    max_file_bytes: float,
    finish: Callable[[Path, Path], None],
) -> None:
    own = {slot.name: unwrapped(slot.tensor).detach() for slot in all_slots(model) if slot.persistent}
    extra = {name: one.detach() for name, one in extra_states(model) if isinstance(one, Tensor)}
    tensors = places_of(model).as_full(own) | extra
    infos = {name: _info(tensor) for name, tensor in tensors.items()}
    if isinstance(ranks, Ranks) and ranks.differ:
        infos = ranks.union(infos)

    def source(folder: Path) -> Read:
        return _full(tensors) if ranks.replicas else shards(tensors, infos, folder, ranks)

    _write_all(ema, infos, source, target, ranks, max_file_bytes=max_file_bytes, finish=finish)


def export_from(  # noqa: PLR0917
    ema: EMA,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    source: Callable[[Path], Read],
    path: Path,
    ranks: Communicator,
    *,
    overwrite: bool,
) -> None:
    """Write tensors that are not read from the model, to one file or a folder. All ranks must call this.

    Args:
        ema: The EMA whose average it is, for the metadata.
        model: The model in training, unwrapped.
        tensors: Their dtypes and shapes.
        source: Given a folder for temporary files, it returns what reads full tensors by their names on rank 0. It may
            communicate.
        path: A file whose name ends in ``.safetensors``, or a folder.
        ranks: The ranks that train the model.
        overwrite: Whether an earlier export is replaced.
    """
    single = path.suffix == ".safetensors"
    check, finish = (_check_file, _finish_file) if single else (_check, _finish)
    ranks.on_every_rank("the export", lambda: check(path, model, overwrite=overwrite))
    infos = {name: _info(tensor) for name, tensor in tensors.items()}
    _write_all(ema, infos, source, path, ranks, max_file_bytes=math.inf if single else 5e9, finish=finish)


def _write_all(
    ema: EMA,
    infos: Mapping[str, TensorInfo],
    source: Callable[[Path], Read],
    target: Path,
    ranks: Communicator,
    *,
    max_file_bytes: float,
    finish: Callable[[Path, Path], None],
) -> None:
    temporary = temporary_path(target)
    metadata = {"format": "pt", "polyak.algorithm": repr(ema), "polyak.updates": str(ema.num_updates)}
    try:
        ranks.on_rank_0(lambda: new_folder(temporary), f"make {temporary}")
        read = source(temporary / _SHARDS)
        ranks.on_rank_0(lambda: _write(infos, temporary, max_file_bytes, metadata, read), f"write {target}")
        ranks.on_rank_0(lambda: finish(temporary, target), f"write {target}")
    except BaseException:
        if ranks.rank == 0:
            with suppress(OSError):
                remove(temporary)
        raise


def _check(folder: Path, model: nn.Module, *, overwrite: bool) -> None:
    found = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if overwrite and (others := sorted(name for name in found if not _EXPORTED.fullmatch(name))):
        raise ExistsError(
            f"overwrite=True replaces an earlier export and nothing else (got {folder}, which also has "
            f"{', '.join(others[:5])}): move these files, or choose another folder"
        )
    if found and not overwrite:
        raise ExistsError(
            f"an export needs a new or empty folder (got {folder}, which is not): choose another, or replace an "
            "earlier export by overwrite=True"
        )
    if folder.exists() and not folder.is_dir():
        raise ExistsError(
            f"an export needs a new or empty folder (got {folder}, which is not a folder): choose another"
        )
    _require_exportable(model)


def _check_file(path: Path, model: nn.Module, *, overwrite: bool) -> None:
    if path.is_dir() or (path.exists() and not overwrite):
        raise ExistsError(
            f"averaged weights need a new file (got {path}, which is there): choose another"
            f"{'' if path.is_dir() else ', or replace it by overwrite=True'}"
        )
    _require_exportable(model)


def _require_exportable(model: nn.Module) -> None:
    """Check that safetensors can hold the model's state dict."""
    slots = {slot.name: slot.tensor for slot in all_slots(model) if slot.persistent}
    for name, extra in extra_states(model):
        if not isinstance(extra, Tensor):
            raise CheckpointError(
                f"the extra state of a module must be a tensor to be exported as safetensors (got {kind_of(extra)} for "
                f"{name!r}); in `with ema.applied():`, save model.state_dict() by torch.save"
            )
        slots[name] = extra
    other = [name for name, tensor in slots.items() if tensor.layout != torch.strided or tensor.is_nested]
    if other:
        raise CheckpointError(
            "a model must have no sparse or nested tensors to be exported as safetensors, except in buffers registered "
            f"with persistent=False (got {other})"
        )
    if meta := [name for name, tensor in slots.items() if tensor.is_meta]:
        raise CheckpointError(
            f"a model must have values to be exported (got {meta} on the meta device); load them first"
        )
    dtypes = {name: str(tensor.dtype) for name, tensor in slots.items() if tensor.dtype not in DTYPE_NAMES}
    if dtypes:
        raise CheckpointError(
            f"a model must have dtypes that safetensors has to be exported (got {dtypes}); convert a copy of "
            "ema.ema_model, such as by .to(torch.complex64), or save its state_dict() by torch.save"
        )
    if "__metadata__" in slots:
        raise CheckpointError("a tensor must not be named '__metadata__' to be exported as safetensors; rename it")


def _finish(temporary: Path, folder: Path) -> None:
    """Give the complete folder its final name."""
    remove(temporary / _SHARDS)
    put(temporary, folder, over_folder=True)


def _finish_file(temporary: Path, path: Path) -> None:
    """Give the one file in the complete folder its final name."""
    put(temporary / "model.safetensors", path)
    remove(temporary)


def _full(tensors: dict[str, Tensor]) -> Read:
    # The local shard of what is sharded over one rank is the full tensor.
    return lambda names: {name: local(tensors[name]) for name in names}


def _info(tensor: Tensor) -> TensorInfo:
    return TensorInfo(tensor.dtype, tuple(tensor.shape), averaged=True)


def shards(
    saved: Mapping[str, Any], full: Mapping[str, TensorInfo | Tensor], folder: Path, ranks: Communicator
) -> Read:
    """Write the shards of all ranks; return a function that reads full tensors from them.

    Args:
        saved: By name, as ``torch.distributed.checkpoint`` saves it.
        full: What the full tensors are.
        folder: The folder to be made.
        ranks: All of which must call this.
    """
    from polyak.sharding import dcp  # noqa: PLC0415  half a second that few need

    dcp.save(saved, folder, ranks.group)

    def read(names: list[str]) -> dict[str, Tensor]:
        found = {name: torch.empty(full[name].shape, dtype=full[name].dtype) for name in names}
        dcp.load(found, folder, alone=True)
        return found

    return read


def _write(
    tensors: Mapping[str, TensorInfo],
    folder: Path,
    max_file_bytes: float,
    metadata: dict[str, str],
    read: Read,
) -> None:
    """Write files of at most ``max_file_bytes``, reading the tensors of one file at a time."""
    files, size = [list[str]()], 0
    size_bytes = {name: math.prod(info.shape) * info.dtype.itemsize for name, info in tensors.items()}
    for name in tensors:
        size += size_bytes[name]
        if files[-1] and size > max_file_bytes:
            files.append([])
            size = size_bytes[name]
        files[-1].append(name)
    weight_map = dict[str, str]()
    for number, names in enumerate(files, start=1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        held = read(names)
        write_tensors(folder / file, {name: tensors[name] for name in names}, held.__getitem__, metadata)
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(size_bytes.values())},
            "weight_map": weight_map,
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
