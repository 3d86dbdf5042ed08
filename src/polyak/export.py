"""The averaged weights alone, as safetensors that any tool reads: in one file, or in several with an index."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from polyak.averaging.agreement import agree_on_plain
from polyak.averaging.ema import EMA
from polyak.errors import CheckpointError
from polyak.sharding import Ranks, local, refuse_stage
from polyak.storage.safetensors import DTYPE_NAMES, TensorInfo, write_tensors
from polyak.tensors.slots import all_slots

Read = Callable[[list[str]], dict[str, Tensor]]


def export_averaged(ema: EMA, model: nn.Module, folder: str | Path, *, max_file_bytes: float = 5e9) -> None:
    """Write the model with its averaged weights to a folder of safetensors files, in the model's own dtypes.

    It holds what the model's state dict would: averaged, copied and left tensors, tied ones under each of their names,
    as ``model.safetensors``, or in several files with an index, named as Hugging Face does. Where it comes from is in
    their metadata. Of a sharded model each rank writes its shards by ``torch.distributed.checkpoint``, and the first
    one puts them together from disk, a file at a time: no rank holds the whole. All ranks must call this.

    Args:
        ema: Whose average.
        model: The one in training, as it was given to the loop. The average is swapped in while writing.
        folder: A new or empty one. It is complete or not there.
        max_file_bytes: How large a file may become, if it holds more than one tensor.

    Raises:
        FileExistsError: If ``folder`` has something in it.
        CheckpointError: If the model's state dict has a tensor that safetensors cannot hold: sparse, nested, without
            values, or of a dtype such as complex128 or quantized ones.
        LoanError: If averaging has not begun, or the model holds an average.
        ShardingError: If ranks disagree, or the model is a stage of a pipeline.

    Example:
        >>> from polyak import attach
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> ema = attach(EMA("10ba"), model, optimizer)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(4, 2)).square().mean().backward()
        ...     optimizer.step()
        >>> export_averaged(ema.algorithm, model, "averaged")
        >>> from safetensors.torch import load_file
        >>> sorted(load_file("averaged/model.safetensors"))
        ['bias', 'weight']
    """
    folder = Path(folder)
    refuse_stage(model, "an export")
    ranks = Ranks.of(model)
    _on_each(ranks, lambda: _check(folder, model))
    temporary = folder.with_name(f".{folder.name}.temporary")
    metadata = {"format": "pt", "polyak.algorithm": repr(ema), "polyak.updates": str(ema.num_updates)}
    try:
        ema.get_ema_model(model)
        tensors = {slot.name: slot.tensor.detach() for slot in all_slots(model) if slot.persistent}
        if ranks is not None:
            agree_on_plain(ranks, {s.name: s.tensor for s in all_slots(model) if s.is_parameter})
        _on_first(ranks, lambda: _make(temporary))
        if ranks is not None and not ranks.replicas:
            read = _shards(tensors, temporary / "shards", ranks)
        else:
            read = _whole(tensors)
        _on_first(ranks, lambda: _write(tensors, temporary, max_file_bytes, metadata, read))
        _on_first(ranks, lambda: _finish(temporary, folder))
    except BaseException:
        if ranks is None or ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        ema.get_training_model(model)


def _on_each(ranks: Ranks | None, act: Callable[[], None]) -> None:
    """Run on every rank; raise the error of any on all."""
    ranks.each("the export", act) if ranks is not None else act()


def _on_first(ranks: Ranks | None, act: Callable[[], None]) -> None:
    """Run on rank 0; raise its error on every rank."""
    ranks.first(act) if ranks is not None else act()


def _check(folder: Path, model: nn.Module) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"an export needs a new or empty folder (got {folder}, which holds something)")
    _require_exportable(model)


def _require_exportable(model: nn.Module) -> None:
    """See that safetensors can hold the model's state dict."""
    slots = {slot.name: slot.tensor for slot in all_slots(model) if slot.persistent}
    other = [name for name, tensor in slots.items() if tensor.layout != torch.strided or tensor.is_nested]
    if other:
        raise CheckpointError(
            "a model must have no sparse or nested tensors to be exported as safetensors, except in buffers registered "
            f"with persistent=False (got {other})"
        )
    if meta := [name for name, tensor in slots.items() if tensor.is_meta]:
        raise CheckpointError(
            f"a model must have values to be exported (on the meta device are {meta}); load them before"
        )
    dtypes = {name: str(tensor.dtype) for name, tensor in slots.items() if tensor.dtype not in DTYPE_NAMES}
    if dtypes:
        raise CheckpointError(
            f"a model must have dtypes that safetensors has to be exported (got {dtypes}); convert a copy of "
            "ema.ema_model, such as by .to(torch.complex64), or save its state_dict() by torch.save"
        )
    if "__metadata__" in slots:
        raise CheckpointError("a tensor must not be named '__metadata__' to be exported as safetensors; rename it")


def _make(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _finish(temporary: Path, folder: Path) -> None:
    """Give the complete folder its name."""
    shutil.rmtree(temporary / "shards", ignore_errors=True)
    if folder.exists():
        folder.rmdir()
    temporary.rename(folder)


def _whole(tensors: dict[str, Tensor]) -> Read:
    # What is sharded is so over one rank.
    return lambda names: {name: local(tensors[name]) for name in names}


def _shards(tensors: dict[str, Tensor], folder: Path, ranks: Ranks) -> Read:
    """Write the shards of all ranks, and return what reads full tensors from them."""
    import torch.distributed.checkpoint as dcp  # noqa: PLC0415  half a second that few need

    # Plain tensors, such as buffers, are the first rank's.
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    dcp.save(tensors, checkpoint_id=folder, planner=planner, process_group=ranks.group)

    def read(names: list[str]) -> dict[str, Tensor]:
        whole = {name: torch.empty(tensors[name].shape, dtype=tensors[name].dtype) for name in names}
        dcp.load(whole, checkpoint_id=folder, no_dist=True)
        return whole

    return read


def _write(
    tensors: dict[str, Tensor],
    folder: Path,
    max_file_bytes: float,
    metadata: dict[str, str],
    read: Read,
) -> None:
    """Write files of at most ``max_file_bytes``, each of which is read as a whole."""
    files, size = [list[str]()], 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if files[-1] and size > max_file_bytes:
            files.append([])
            size = tensor.nbytes
        files[-1].append(name)
    weight_map = dict[str, str]()
    for number, names in enumerate(files, start=1):
        file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        held = read(names)
        infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape), averaged=True) for name, tensor in held.items()}
        write_tensors(folder / file, infos, held.__getitem__, metadata)
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": weight_map,
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
