"""Folders that DeepSpeed's ``ds_to_universal`` writes: a folder for each parameter, whole, in float32."""

from pathlib import Path
from typing import Any

from polyak.checkpoints.stored import Files, Found
from polyak.compat.files import load
from polyak.compat.words import shown
from polyak.errors import CheckpointError

FORMAT = "universal DeepSpeed checkpoint"
_PARAMETERS = "zero"
_FILE = "fp32.pt"
_MODEL = "mp_rank_*_model_states.pt"
_COUNTS = ("global_steps", "global_samples")


def accepts(path: Path) -> bool:
    """Return whether it is a folder with a folder for each parameter.

    Args:
        path: The path of a checkpoint.
    """
    return any((path / _PARAMETERS).glob(f"*/{_FILE}"))


def read(path: Path, files: Files) -> Found:
    """Read what is in the files, but no tensor.

    Args:
        path: The path of the folder.
        files: Opens its files.

    Raises:
        CheckpointError: If a file has no parameter.
    """
    found, counts = dict[str, Any](), dict[str, Any]()
    for file in sorted((path / _PARAMETERS).glob(f"*/{_FILE}")):
        content = load(file, data=files.open(file), unchecked=files.unchecked)
        if "param" not in content:
            raise CheckpointError(f"{shown(file)} must have a parameter (it has none); convert the checkpoint again")
        found[file.parent.name] = content["param"]
    for file in sorted(path.glob(_MODEL))[:1]:  # what all ranks have
        model = load(file, data=files.open(file), unchecked=files.unchecked)
        module, buffers = model.get("module"), model.get("buffer_names") or ()
        found |= {name: module[name] for name in buffers if module is not None and name in module}
        counts = {name: model[name] for name in _COUNTS if name in model}
    return Found({"module": found, **counts})
