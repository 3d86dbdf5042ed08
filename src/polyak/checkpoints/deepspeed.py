"""Folders of DeepSpeed's ZeRO (``global_step100``): float32 weights, put together from the parts of all ranks.

They are read in the layout that DeepSpeed's own ``zero_to_fp32.py`` reads, without running any of its code.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.checkpoints.moments import in_natural_order
from polyak.checkpoints.stored import Files, Found, StoredTensor
from polyak.compat.files import load
from polyak.compat.words import listed, shown
from polyak.errors import CheckpointError

FORMAT = "DeepSpeed checkpoint"
_MODELS = "*mp_rank_*_model_states.pt"
_OPTIMIZER = "*_optim_states.pt"
# What remains where the model itself is on one rank.
_OF_RANK_0 = re.compile(
    r"(zero_pp_rank_\d+_)?mp_rank_00_model_states\.pt|(bf16_)?zero_pp_rank_\d+_mp_rank_00_optim_states\.pt"
)
_MODEL_RANKS = "mp_world_size"
_LATEST = "latest"
# How many elements of the flat tensor of a rank, from which, and where they belong in a tensor.
_Part = tuple[Tensor, int, int, int]


def accepts(path: Path) -> bool:
    """Return whether it is a folder of ZeRO, or a folder of such folders and a file with the name of the latest.

    Args:
        path: The path of a checkpoint.
    """
    return _folder(path) is not None


def _folder(path: Path) -> Path | None:
    if not path.is_dir():
        return None
    if any(path.glob(_OPTIMIZER)) and any(path.glob(_MODELS)):
        return path
    latest = path / _LATEST
    name = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else ""
    return _folder(path / name) if name and name == Path(name).name and name != _LATEST else None


def read(path: Path, files: Files) -> Found:
    """Read what is in the files, but no tensor.

    Args:
        path: The path of the folder.
        files: Opens its files.

    Raises:
        CheckpointError: If files are missing, or are of another kind of parallelism.
    """
    folder = _folder(path)
    assert folder is not None
    names = sorted((one for one in folder.iterdir() if one.name.endswith("model_states.pt")), key=in_natural_order)
    optimizers = sorted(folder.glob(_OPTIMIZER), key=in_natural_order)
    # Of tensor parallelism, of the layers of a pipeline, and of experts.
    if more := [one.name for one in (*names, *optimizers) if not _OF_RANK_0.fullmatch(one.name)]:
        raise _parallel(folder, f"has {listed(more)}")

    def loaded(one: Path) -> Mapping[Any, Any]:
        return load(one, data=files.open(one), unchecked=files.unchecked)

    models = [loaded(one) for one in names]
    model = models[0]
    if isinstance(size := model.get(_MODEL_RANKS), int) and size > 1:
        raise _parallel(folder, f"is of {size} ranks of the model, and has the files of one")
    ranks = [_mapping(loaded(one).get("optimizer_state_dict"), "the state of an optimizer") for one in optimizers]
    _require_all(folder, ranks)
    found = dict(_weights(files, model, ranks)) | dict(_frozen(files, models))
    buffers = model.get("buffer_names") or ()
    module = _mapping(model.get("module"), "the weights of a model")
    found |= {name: files.stored(module[name]) for name in buffers if isinstance(module.get(name), Tensor)}
    for name, same in (model.get("shared_params") or {}).items():
        if same in found:
            found[name] = found[same]
    counts = {name: model[name] for name in ("global_steps", "global_samples") if name in model}
    return Found({"module": found, **counts})


def _parallel(where: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"a checkpoint of DeepSpeed must be of data parallelism alone ({shown(where)} {what}); convert it by python -m "
        "deepspeed.checkpoint.ds_to_universal, and give the folder that it writes"
    )


def require_all_weights(path: Path, content: Mapping[Any, Any]) -> None:
    """Raise if a file has only some weights of a model, because DeepSpeed saved the rest in files of other ranks.

    Args:
        path: The path of the file.
        content: What is in it.

    Raises:
        CheckpointError: If others have the rest.
    """
    module = content.get("module")
    if "ds_version" not in content or not isinstance(module, Mapping):
        return
    if isinstance(size := content.get(_MODEL_RANKS), int) and size > 1:
        raise _parallel(path, f"has the part of one of {size} ranks")
    if content.get("param_shapes") and not any(one.numel() for one in module.values() if isinstance(one, Tensor)):
        raise CheckpointError(
            f"a file must have all weights ({shown(path)} is of ZeRO stage 3, which keeps them in the files of all "
            "ranks); give its folder"
        )


def _mapping(value: object, what: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"a file of DeepSpeed must have {what} (got {shown(value)}); save it again")
    return value


def _require_all(folder: Path, ranks: Sequence[Mapping[Any, Any]]) -> None:
    count = ranks[0].get("partition_count")
    count = max(count) if isinstance(count, list) and count else count
    if isinstance(count, int) and count != len(ranks):
        raise CheckpointError(
            f"a checkpoint of DeepSpeed must have the files of all {count} ranks ({shown(folder)} has those of "
            f"{len(ranks)}); copy the rest"
        )


def _weights(
    files: Files, model: Mapping[Any, Any], ranks: Sequence[Mapping[Any, Any]]
) -> Iterator[tuple[str, StoredTensor]]:
    shapes = model.get("param_shapes")
    groups = [shapes] if isinstance(shapes, Mapping) else shapes
    if not isinstance(groups, list) or not all(isinstance(one, Mapping) for one in groups):
        raise CheckpointError(
            "a file of DeepSpeed must have the shapes of its parameters; save it with a newer release"
        )
    stage = ranks[0].get("zero_stage")
    if stage == 3:
        joined = {name: shape for group in groups for name, shape in group.items()}
        yield from _of_stage_3(files, joined, [_flat(rank, "fp32_flat_groups") for rank in ranks])
        return
    flat = [_flat(rank, "single_partition_of_fp32_groups") for rank in ranks]
    for i, group in enumerate(groups):
        yield from _of_stage_2(files, group, [of_rank[i] for of_rank in flat])


def _frozen(files: Files, models: Sequence[Mapping[Any, Any]]) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the parameters that are not trained: in one file, or, with stage 3, in parts in each rank's file."""
    shapes = models[0].get("frozen_param_shapes") or {}
    fragments = [_mapping(one.get("frozen_param_fragments"), "its frozen parameters") for one in models if shapes]
    for name, shape in shapes.items():
        parts, at, numel = list[_Part](), 0, torch.Size(shape).numel()
        for of_rank in fragments:
            flat = of_rank.get(name)
            if isinstance(flat, Tensor) and (count := min(flat.numel(), numel - at)):
                parts.append((flat.reshape(-1), 0, at, at + count))
                at += count
        if at < numel:
            raise CheckpointError(
                f"the files of all ranks must have {shown(name)}; files are missing or of another save"
            )
        yield name, _stored(files, tuple(shape), parts)


def _flat(rank: Mapping[Any, Any], key: str) -> list[Tensor]:
    found = rank.get(key)
    if not isinstance(found, list) or not all(isinstance(one, Tensor) for one in found):
        raise CheckpointError(f"the state of ZeRO's optimizer must have {key} (it has {listed(rank)}); save it again")
    return found


def _of_stage_2(files: Files, shapes: Mapping[str, Any], ranks: Sequence[Tensor]) -> Iterator[tuple[str, StoredTensor]]:
    """Yield tensors that lie one after the other, also where one begins on a rank and ends on the next."""
    at = 0
    begins = [sum(one.numel() for one in ranks[:i]) for i in range(len(ranks) + 1)]
    for name, shape in shapes.items():
        numel = torch.Size(shape).numel()
        parts = [
            (ranks[i], max(at, begins[i]) - begins[i], max(at, begins[i]) - at, min(at + numel, begins[i + 1]) - at)
            for i in range(len(ranks))
            if begins[i] < at + numel and begins[i + 1] > at
        ]
        if at + numel > begins[-1]:
            raise CheckpointError(
                f"the parts of all ranks must have {shown(name)}; files are missing or of another save"
            )
        yield name, _stored(files, tuple(shape), parts)
        at += numel


def _of_stage_3(
    files: Files, shapes: Mapping[str, Any], ranks: Sequence[Sequence[Tensor]]
) -> Iterator[tuple[str, StoredTensor]]:
    """Yield tensors that are split into equal parts, one per rank."""
    at = 0
    for name, shape in shapes.items():
        numel = torch.Size(shape).numel()
        each = -(-numel // len(ranks))
        parts = [
            part for i, flat in enumerate(ranks) for part in _pieces(flat, at, i * each, min(numel, (i + 1) * each))
        ]
        if sum(end - begin for _, _, begin, end in parts) != numel:
            raise CheckpointError(
                f"the parts of all ranks must have {shown(name)}; files are missing or of another save"
            )
        yield name, _stored(files, tuple(shape), parts)
        at += each


def _pieces(flat: Sequence[Tensor], at: int, begin: int, end: int) -> Iterator[_Part]:
    """Yield where a range of a tensor's elements is in the flat tensors of a rank."""
    first = 0
    for one in flat:
        low, high = max(at, first), min(at + end - begin, first + one.numel())
        if low < high:
            yield one, low - first, begin + low - at, begin + high - at
        first += one.numel()


def _stored(files: Files, shape: tuple[int, ...], parts: Sequence[_Part]) -> StoredTensor:
    return StoredTensor(parts[0][0].dtype if parts else torch.float32, shape, 1, _reader(files, parts))


def _reader(files: Files, parts: Sequence[_Part]) -> Callable[[int, int], Tensor]:
    def read(first: int, last: int) -> Tensor:
        found = []
        for flat, at, begin, end in parts:
            low, high = max(first, begin), min(last, end)
            if low < high:
                files.check(flat)
                found.append(flat[at + low - begin : at + high - begin])
        return torch.cat(found) if len(found) != 1 else found[0].clone()

    return read
