"""Folders with weights in one file, or in several with an index: of Transformers, diffusers, peft and Accelerate."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from polyak.checkpoints import distributed
from polyak.checkpoints.stored import Files, Found
from polyak.compat.files import load, read_json
from polyak.compat.words import listed, shown
from polyak.errors import CheckpointError

FORMAT = "folder"
INDEX = ".index.json"
_SAFETENSORS = ".safetensors"
_SUFFIXES = (_SAFETENSORS, ".bin", ".pt", ".pth", ".ckpt")
_WEIGHTS = re.compile(r"(model|pytorch_model|diffusion_pytorch_model|adapter_model)(_\d+)?\.(safetensors|bin)")
_MODEL = re.compile(r"(model|lit_model)\.(pt|pth|ckpt)")  # of OLMo, SpeechBrain and LitGPT
_SHARD = re.compile(r".*-\d+-of-\d+\.(safetensors|bin)")
_RECORD = "manifest.json"
_PIPELINE = "model_index.json"  # of diffusers
_TRAINER_STATE = "trainer_state.json"


def accepts(path: Path) -> bool:
    """Return whether it is a folder.

    Args:
        path: The path of a checkpoint.
    """
    return path.is_dir()


def read(path: Path, files: Files) -> Found:
    """Read what is in the files with weights, but no tensor.

    Args:
        path: The path of the folder.
        files: Opens its files.

    Raises:
        CheckpointError: If there are no such files or several models, or one is damaged.
    """
    state = path / _TRAINER_STATE
    clock = read_json(state) if state.exists() else {}
    clock = clock if isinstance(clock, Mapping) else {}
    models = weight_files(path)
    models = [one for one in models if _SAFETENSORS in one.name] or models  # as the libraries load them
    layout = _indexed(models[0]) if models and models[0].name.endswith(INDEX) else {}
    models = [one for one in models if one.name not in layout.values()]
    sharded = [one for one in path.iterdir() if distributed.accepts(one) and not one.name.startswith("optim")]
    found = [*models, *(one for one in sharded if len(sharded) == 1)]
    if len(found) > 1:
        raise CheckpointError(
            f"a folder must have the weights of one model ({shown(path)} has {listed(one.name for one in found)}); "
            "give the file instead, or leave one in the folder"
        )
    if not found:
        raise CheckpointError(
            f"a checkpoint that is a folder must have weights in it, such as model.safetensors ({shown(path)} has "
            f"{listed(sorted(one.name for one in path.iterdir())) or 'nothing'}); {_instead(path)}"
        )
    if found[0] in sharded:  # of Accelerate under FSDP
        inside = distributed.read(found[0], files)
        return replace(inside, clock=clock, format=distributed.FORMAT, folder=found[0].name)
    if layout:
        return Found(_tensors(path, layout, files), layout, clock)
    content = load(found[0], data=files.open(found[0]), unchecked=files.unchecked)
    return Found(content, dict.fromkeys((name for name in content if isinstance(name, str)), found[0].name), clock)


def weight_files(path: Path) -> list[Path]:
    """Return the files in a folder that libraries look for to find its weights: indexes, then files with all weights.

    Args:
        path: The path of the folder.
    """
    indexes = [one for one in path.glob(f"*{INDEX}") if one.name.startswith(("model", "pytorch", "diffusion"))]
    return [*sorted(indexes, key=lambda one: _SAFETENSORS not in one.name), *sorted(_models(path))]


def _models(path: Path) -> list[Path]:
    inside = [*path.iterdir()]
    found = [one for one in inside if _WEIGHTS.fullmatch(one.name)]
    # Next to files with numbers it is one of the checkpoints of a run.
    numbered = any(one.name.endswith(_SUFFIXES) and any(map(str.isdigit, one.name)) for one in inside)
    return found or ([] if numbered else [one for one in inside if _MODEL.fullmatch(one.name)])


def _instead(path: Path) -> str:
    """Return what to do with a folder that has no weights in it."""
    if (path / _RECORD).is_file():
        return "of a record, polyak reconstruct gives the averages"
    models = sorted(one.parent for one in path.glob("*/*") if _WEIGHTS.fullmatch(one.name) or INDEX in one.name)
    if models:
        of = " of a pipeline" if (path / _PIPELINE).is_file() else ""
        return f"average each model{of} by itself: {listed(dict.fromkeys(models))}"
    if any(_SHARD.fullmatch(one.name) for one in path.iterdir()):
        return f"the index of its shards, such as model.safetensors{INDEX}, is missing: copy it, or save again"
    if any(path.glob("*.distcp")):
        return "its .metadata is missing, which is saved last: wait until it is complete, or leave it out"
    endings = sorted(one.suffix for one in path.iterdir() if one.name.endswith(_SUFFIXES))
    return f"give the checkpoints themselves{f', such as {shown(path)}/*{endings[0]}' if endings else ''}"


def _indexed(path: Path) -> dict[str, str]:
    index = read_json(path)
    layout = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(layout, Mapping) or not layout or not all(isinstance(name, str) for name in layout.values()):
        raise CheckpointError(f"{shown(path)} must say in which file each tensor is; save the checkpoint again")
    for name in layout.values():
        if PurePath(name).name != name or not name.endswith(_SUFFIXES):
            raise CheckpointError(f"{shown(path)} must name files of the folder (got {shown(name)})")
    return dict(layout)


def _tensors(path: Path, layout: Mapping[str, str], files: Files) -> dict[str, Any]:
    loaded = {
        name: load(path / name, data=files.open(path / name), unchecked=files.unchecked)
        for name in dict.fromkeys(layout.values())
    }
    if missing := [name for name, file in layout.items() if name not in loaded[file]]:
        raise CheckpointError(
            f"the files of {shown(path)} must have all tensors that the index names (not so: {listed(missing)}); a "
            "file may be of another save"
        )
    return {name: loaded[file][name] for name, file in layout.items()}
