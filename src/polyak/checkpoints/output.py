"""Writes an average of checkpoints as what they are: a safetensors file, a file of torch, or a folder."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from polyak.checkpoints.averaging import Plan, average
from polyak.checkpoints.digests import Digests, hashing
from polyak.checkpoints.folder import INDEX
from polyak.checkpoints.one_file import read as read_file
from polyak.checkpoints.stored import Files
from polyak.compat.words import listed, shown
from polyak.errors import ArgumentError
from polyak.storage.atomic import replacing
from polyak.storage.safetensors import DTYPE_NAMES, TensorInfo, write_tensors

_TORCH = (".pt", ".pth", ".ckpt", ".bin")
# What belongs to a usable folder; all else, such as the states of optimizers, is left out.
_BELONGS = {".json", ".txt", ".model", ".py", ".md", ".jinja", ".tiktoken", ".vocab"}
_TRAINING = ("trainer_state", "training_args", "optimizer", "scheduler", "rng_state", "random_states")

Progress = Callable[[str], None]


def check_output(path: Path, plan: Plan) -> None:
    """See that an average can be written to a path.

    Args:
        path: Its suffix says the format.
        plan: What is averaged.

    Raises:
        ArgumentError: If it is not so.
    """
    inputs = [Path(os.path.realpath(one.path)) for one in plan.checkpoints]
    to = Path(os.path.realpath(path))
    if any(to == one or one in to.parents or to in one.parents for one in inputs):
        raise ArgumentError(
            f"the output must be neither in nor around a checkpoint (got {shown(path)}); choose another"
        )
    if not to.parent.is_dir():
        raise ArgumentError(f"the output must be in a folder that exists (got {shown(path)}); make the folder")
    if path.suffix not in (".safetensors", "", *_TORCH):
        raise ArgumentError(
            f"the output must be .safetensors, {', '.join(_TORCH)}, or a folder without a suffix (got {shown(path)}); "
            "choose another"
        )
    if path.suffix == "" and not plan.newest.layout.keys() >= {*plan.names}:
        raise ArgumentError(
            f"the output must have a suffix, such as .safetensors, where the checkpoints are no folders with model "
            f"files, or --prefix changes names (got {shown(path)}); add one"
        )
    if path.suffix in ("", ".safetensors"):
        _require_dtypes(plan)


def _require_dtypes(plan: Plan) -> None:
    if other := [f"{name}: {one.dtype}" for name, one in plan.tensors.items() if one.dtype not in DTYPE_NAMES]:
        raise ArgumentError(f"all tensors must have a dtype of safetensors (got {listed(other)}); write a .pt file")


def write_average(
    plan: Plan, path: Path, progress: Progress = lambda name: None, given: Mapping[str, Tensor] | None = None
) -> None:
    """Compute the average and write it. It is complete, or what was at ``path`` is as it was.

    The header of safetensors files says what it was made from, with the SHA-256 of each file that has weights of a
    checkpoint.

    Args:
        plan: What is averaged.
        path: A file, or a folder that is absent or empty.
        progress: Is called with the name of each tensor before it is averaged.
        given: Tensors by name that are written instead of their average.

    Raises:
        CheckpointError: If a checkpoint is damaged or has changed.
        OSError: If the disk refuses.
    """

    def read(name: str) -> Tensor:
        progress(name)
        return average(plan, name) if given is None or name not in given else given[name]

    with replacing(path, folder=path.suffix == "") as temporary:
        if path.suffix in ("", ".safetensors"):
            with hashing(plan.checkpoints) as digests:
                said = {"format": "pt", "polyak.average": json.dumps(provenance(plan, path, digests))}
                written = _write_folder(plan, temporary, said, read) if path.suffix == "" else [temporary]
                if path.suffix:
                    _write(plan, temporary, plan.names, said, read)
                for file in written:
                    digests.write_into(file)
        else:
            _write_torch(plan, temporary, read)
        _require_unchanged(plan)


def _require_unchanged(plan: Plan) -> None:
    for one in plan.checkpoints:
        one.files.require_unchanged()


Read = Callable[[str], Tensor]


def _write(plan: Plan, to: Path, names: Sequence[str], said: Mapping[str, str], read: Read) -> None:
    tensors = plan.tensors
    infos = {name: TensorInfo(tensors[name].dtype, tensors[name].shape, averaged=False) for name in names}
    write_tensors(to, infos, read, said)


def _write_torch(plan: Plan, to: Path, read: Read) -> None:
    """Write by ``torch.save``, which needs all tensors: they are in a file meanwhile, not in memory."""
    between = to.with_name(f"{to.name}.tensors")
    try:
        known = {name: one for name, one in plan.tensors.items() if one.dtype in DTYPE_NAMES}
        infos = {name: TensorInfo(one.dtype, one.shape, averaged=False) for name, one in known.items()}
        write_tensors(between, infos, read, {})
        files = Files()
        on_disk = read_file(between, files).content
        state = {name: on_disk[name] if name in known else read(name) for name in plan.names}
        torch.save(state, to)
        files.release()
    finally:
        between.unlink(missing_ok=True)


def _write_folder(plan: Plan, to: Path, said: Mapping[str, str], read: Read) -> list[Path]:
    """Write the files of a folder; return those with weights."""
    layout = {name: _as_safetensors(plan.newest.layout[name]) for name in plan.names}
    files = dict.fromkeys(layout.values())
    for file in files:
        _write(plan, to / file, [name for name in plan.names if layout[name] == file], said, read)
    if len(files) > 1:
        size_bytes = sum(one.size_bytes for one in plan.tensors.values())
        index = {"metadata": {"total_size": size_bytes}, "weight_map": layout}
        stem = min(files).partition("-")[0]
        (to / f"{stem}.safetensors{INDEX}").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for one in files_of_folder(plan.newest.path):
        shutil.copyfile(one, to / one.name)
    return [to / file for file in files]


def _as_safetensors(file: str) -> str:
    """Return the name that Transformers, diffusers and peft look for, of a file with such tensors."""
    name = Path(file).with_suffix(".safetensors").name
    return name.removeprefix("pytorch_") if name.startswith("pytorch_model") else name


def files_of_folder(folder: Path) -> list[Path]:
    """Return the files that a usable folder has next to its weights, such as configurations and tokenizers.

    Args:
        folder: Of a checkpoint.
    """
    return sorted(
        one
        for one in folder.iterdir()
        if one.is_file()
        and one.suffix in _BELONGS
        and not one.name.endswith(INDEX)
        and not one.name.startswith(_TRAINING)
    )


def provenance(plan: Plan, path: Path, digests: Digests) -> list[dict[str, object]]:
    """Return what an average was made from: of each checkpoint the path from the output, hashes, moment and weight.

    Args:
        plan: What is averaged.
        path: Of the output.
        digests: Of the files.
    """
    here = Path(os.path.realpath(path)).parent
    return [
        {
            "path": Path(os.path.relpath(os.path.realpath(one.path), here)).as_posix(),
            "weights": one.place,
            "moment": {str(unit): value for unit, value in one.moment.items()},
            "weight": weight,
            "sha256": {file.name: digests.placeholder(file) for file in one.files.paths},
        }
        for one, weight in zip(plan.checkpoints, plan.weights, strict=True)
    ]
