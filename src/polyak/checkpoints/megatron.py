"""Megatron's older folders (``iter_0001000``): one file per rank of the model, each with different tensors."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from polyak.checkpoints.stored import Files, Found
from polyak.compat.files import load
from polyak.compat.words import shown
from polyak.errors import CheckpointError

FORMAT = "Megatron checkpoint"
_FILES = ("model_optim_rng.pt", "model_rng.pt")
_LATEST = "latest_checkpointed_iteration.txt"
_DEPTH = 8


def accepts(path: Path) -> bool:
    """Return whether it is a folder with a folder per rank, or a folder of those and a file with the latest's number.

    Args:
        path: The path of a checkpoint.
    """
    return bool(_ranks(path))


def _ranks(path: Path) -> list[Path]:
    latest = path / _LATEST
    if latest.is_file() and (number := latest.read_text(encoding="utf-8", errors="replace").strip()).isdecimal():
        path /= f"iter_{int(number):07d}"
    return sorted(one for name in _FILES for one in path.glob(f"mp_rank_[0-9]*/{name}"))


def read(path: Path, files: Files) -> Found:
    """Read what is in the files, but no tensor. With several ranks, the names begin with that of the rank.

    Args:
        path: The path of the folder.
        files: Opens its files.

    Raises:
        CheckpointError: If a file has no weights.
    """
    ranks, found, content = _ranks(path), dict[str, Any](), dict[Any, Any]()
    for file in ranks:
        content = dict(load(file, data=files.open(file), unchecked=files.unchecked))
        models = {name: one for name, one in content.items() if isinstance(name, str) and name.startswith("model")}
        tensors = {
            name: one for key, model in models.items() for name, one in _flat(model, "" if key == "model" else key)
        }
        if not tensors:
            raise CheckpointError(f"a file of Megatron must have a model in it ({shown(file)} has none); save it again")
        before = f"{file.parent.name}/" if len(ranks) > 1 else ""
        found |= {f"{before}{name}": one for name, one in tensors.items()}
    kept = {name: content[name] for name in ("iteration", "args") if name in content}
    return Found({"model": found, **kept})


def _flat(value: object, place: str, depth: int = _DEPTH) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in mappings, named by their keys."""
    for key, inner in value.items() if isinstance(value, Mapping) and depth else ():
        name = f"{place}.{key}" if place else str(key)
        if isinstance(inner, Tensor):
            yield name, inner
        else:
            yield from _flat(inner, name, depth - 1)
