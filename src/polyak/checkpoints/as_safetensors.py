"""Writes safetensors: one file, or the files of a folder for ``from_pretrained`` with their index."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from polyak.checkpoints.companions import copy_companions
from polyak.checkpoints.folder import INDEX
from polyak.checkpoints.units import Facts, Job, Unit, in_groups
from polyak.storage.safetensors import TensorInfo, layout_of, raw_bytes

# Of the files of a folder, where the checkpoints are none: as Transformers has them.
_FILE_BYTES = 5_000_000_000


def _files(job: Job, to: Path) -> dict[Path, list[str]]:
    """Return the names of the tensors in each file."""
    plan, files = job.plan, dict[Path, list[str]]()
    if not to.is_dir():
        return {to: [*plan.names]}
    for name, file in layout_of_folder(job).items():
        files.setdefault(to / file, []).append(name)
    return files


def layout_of_folder(job: Job) -> dict[str, str]:
    """Return the name of the file of each tensor in a folder: the newest checkpoint's, if that is such a folder.

    Args:
        job: What is written.
    """
    plan = job.plan
    if plan.newest.layout.keys() >= {*plan.names}:
        return {name: _as_safetensors(plan.newest.layout[name]) for name in plan.names}
    groups = in_groups(plan.names, lambda name: plan.tensors[name].size_bytes, _FILE_BYTES)
    if len(groups) == 1:
        return dict.fromkeys(plan.names, "model.safetensors")
    return {
        name: f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i, group in enumerate(groups, 1) for name in group
    }


def _as_safetensors(file: str) -> str:
    """Return the file name that Transformers, diffusers or peft look for, for such tensors."""
    name = Path(file).with_suffix(".safetensors").name
    return name.removeprefix("pytorch_") if name.startswith("pytorch_model") else name


def _infos(job: Job, names: Sequence[str]) -> dict[str, TensorInfo]:
    tensors = job.plan.tensors
    return {name: TensorInfo(tensors[name].dtype, tensors[name].shape, averaged=False) for name in names}


def prepare(job: Job, to: Path) -> None:
    """Make the files, with headers and room for the tensors.

    Args:
        job: What is written.
        to: A file, or a folder that exists.
    """
    for file, names in _files(job, to).items():
        header, _, size_bytes = layout_of(_infos(job, names), job.said)
        with file.open("wb") as opened:
            opened.write(header)
            opened.truncate(size_bytes)


def units(job: Job, to: Path) -> list[Unit]:
    """Return the work.

    Args:
        job: What is written.
        to: As for `prepare`.
    """
    found = list[Unit]()
    for file, names in _files(job, to).items():
        _, places, _ = layout_of(_infos(job, names), job.said)
        for group in in_groups([*places], lambda name: job.plan.tensors[name].size_bytes):
            found.append(_unit(job, file, {name: places[name] for name in group}, len(found)))
    return found


def _unit(job: Job, file: Path, places: Mapping[str, int], number: int) -> Unit:
    def write() -> dict[str, object]:
        with file.open("r+b") as opened:
            for name, place in places.items():
                tensor = job.read(name)
                opened.seek(place)
                opened.write(raw_bytes(tensor))
                del tensor  # before the next one is read
        return {"file": file.name}

    return Unit(f"tensors-{number}", write)


def finish(job: Job, to: Path, facts: Facts) -> list[Path]:
    """Write the index of a folder, and copy what belongs to it.

    Args:
        job: What is written.
        to: As for `prepare`.
        facts: Not used.
    """
    del facts
    files = [*_files(job, to)]
    if to.is_dir():
        if len(files) > 1:
            size_bytes = sum(one.size_bytes for one in job.plan.tensors.values())
            index = {"metadata": {"total_size": size_bytes}, "weight_map": layout_of_folder(job)}
            stem = min(file.name for file in files).partition("-")[0]
            (to / f"{stem}.safetensors{INDEX}").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        copy_companions(job.plan.newest.path, to)
    return files
