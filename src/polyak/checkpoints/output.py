"""Writes an average of checkpoints: as a safetensors file, a file of torch, or a folder of either kind."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from polyak.checkpoints import as_dcp, as_safetensors, as_torch
from polyak.checkpoints.averaging import average
from polyak.checkpoints.digests import Digests, files_of, fill, filled, placeholder
from polyak.checkpoints.plan import Plan
from polyak.checkpoints.provenance import made_from
from polyak.checkpoints.staging import Staging, fingerprint_of, keep_plan, staged
from polyak.checkpoints.units import SAID, Job, Unit, Writer
from polyak.compat.folders import Box
from polyak.compat.words import listed, shown
from polyak.compat.writing import require_names
from polyak.errors import ArgumentError
from polyak.sharding.communicator import Communicator, OneProcess
from polyak.storage.safetensors import DTYPE_NAMES

_TORCH = (".pt", ".pth", ".ckpt", ".bin")
_SAFETENSORS = ".safetensors"
# By what ``--as`` calls them.
WRITERS: Mapping[str, Writer] = {
    "hf": as_safetensors,
    "safetensors": as_safetensors,
    "pt": as_torch,
    "dcp": as_dcp,
}
_FOLDERS = ("hf", "dcp")
# Threads that hash: one hashes 1.6 GB/s, where all else reads and averages 5 GB/s.
_HASHING = min(8, os.cpu_count() or 1)

Progress = Callable[[str], None]


def form_of(path: Path, plan: Plan, form: str | None = None) -> str:
    """Return the format of an output: what it is told to be, what its suffix says, or what the newest checkpoint is.

    Args:
        path: The path of the output.
        plan: What is averaged.
        form: One of `WRITERS`; None to find out.

    Raises:
        ArgumentError: If it is not clear, or does not fit the suffix.
    """
    suffix = path.suffix
    if form is not None:
        wanted = "no suffix of a file" if form in _FOLDERS else _SAFETENSORS if form == "safetensors" else "a suffix of"
        fits = {"safetensors": suffix == _SAFETENSORS, "pt": suffix in _TORCH}
        if form not in WRITERS or not fits.get(form, suffix not in (_SAFETENSORS, *_TORCH)):
            wanted = f"{', '.join(_TORCH)}" if form == "pt" else wanted
            raise ArgumentError(f"the output must have {wanted} as {form} (got {shown(path)}); choose another name")
        return form
    if suffix not in (_SAFETENSORS, "", *_TORCH):
        raise ArgumentError(
            f"the output must be .safetensors, {', '.join(_TORCH)}, or a folder without a suffix (got {shown(path)}); "
            "choose another, or say which by --as"
        )
    if suffix:
        return "safetensors" if suffix == _SAFETENSORS else "pt"
    if all(one.saved is not None and one.saved.keys[-1] == name for name, one in plan.tensors.items()):
        return "dcp"
    if not plan.newest.layout.keys() >= {*plan.names}:
        raise ArgumentError(
            f"the output must have a suffix, such as .safetensors, where the checkpoints are no folders with model "
            f"files, or --prefix changes names (got {shown(path)}); add one, or say which folder by --as"
        )
    return "hf"


def check_output(path: Path, plan: Plan, form: str | None = None) -> str:
    """Return the format of an output, once it is known that the average can be written there.

    Args:
        path: Its suffix says the format.
        plan: What is averaged.
        form: One of `WRITERS` instead.

    Raises:
        ArgumentError: If it cannot.
    """
    inputs = [Path(os.path.realpath(one.path)) for one in plan.checkpoints]
    to = Path(os.path.realpath(path))
    if any(to == one or one in to.parents or to in one.parents for one in inputs):
        raise ArgumentError(
            f"the output must be neither in nor around a checkpoint (got {shown(path)}); choose another"
        )
    if not to.parent.is_dir():
        raise ArgumentError(f"the output must be in a folder that exists (got {shown(path)}); make the folder")
    found = form_of(path, plan, form)
    if found in ("hf", "safetensors"):
        _require_dtypes(plan)
    return found


def _require_dtypes(plan: Plan) -> None:
    require_names(plan.names)
    if other := [f"{name}: {one.dtype}" for name, one in plan.tensors.items() if one.dtype not in DTYPE_NAMES]:
        raise ArgumentError(f"all tensors must have a dtype of safetensors (got {listed(other)}); write a .pt file")


def write_average(
    plan: Plan,
    path: Path,
    progress: Progress = lambda name: None,
    *,
    given: Mapping[str, Tensor] | None = None,
    form: str | None = None,
    communicator: Communicator | None = None,
) -> None:
    """Compute the average and write it. It is complete, or what was at ``path`` is as it was.

    The output says what it was made from, with the SHA-256 of each file that has weights of a checkpoint:
    `provenance_of` reads it. A run that was stopped is resumed.

    Args:
        plan: What is averaged.
        path: A file, or a folder that is absent or empty.
        progress: Is called with the name of each tensor before it is averaged.
        given: Tensors by name that are written instead of their average.
        form: One of `WRITERS`; None for what the suffix or the newest checkpoint says.
        communicator: Of processes that all call this, and share the work; None for this one alone.

    Raises:
        CheckpointError: If a checkpoint is damaged or has changed.
        OSError: If the disk refuses.
    """
    given, together = given or {}, communicator or OneProcess()
    form = form_of(path, plan, form)
    writer = WRITERS[form]
    fingerprint = fingerprint_of(plan, form, given)

    def read(name: str, box: Box | None = None) -> Tensor:
        progress(name)
        if name in given:
            return given[name].contiguous() if box is None else given[name][tuple(slice(*one) for one in box)].clone()
        return average(plan, name, box)

    said = {"format": "pt", SAID: json.dumps(made_from(plan, path, fingerprint))}
    job = Job(plan, read, said)
    with staged(path, fingerprint, together, folder=form in _FOLDERS) as (staging, resumed):

        def prepare() -> None:
            if not resumed:
                writer.prepare(job, staging.output)
                keep_plan(path, fingerprint)

        together.on_rank_0(prepare, f"begin {path}")
        work = _Work(staging, together, files_of(plan.checkpoints))
        together.on_every_rank("whether all could write their part", lambda: work.do(writer.units(job, staging.output)))
        together.on_every_rank("whether the checkpoints stayed as they were", lambda: _require_unchanged(plan))
        together.on_rank_0(lambda: _finish(job, writer, staging, fingerprint), f"complete {path}")


def _finish(job: Job, writer: Writer, staging: Staging, fingerprint: str) -> None:
    facts = staging.facts()
    hashes = {one["path"]: one["sha256"] for name, one in facts.items() if name.startswith("sha256-")}
    tensors = {name: one for name, one in facts.items() if not name.startswith("sha256-")}
    found = {placeholder(Path(path), fingerprint): one for path, one in hashes.items()}
    said = {name: filled(text, found) for name, text in job.said.items()}
    for file in writer.finish(replace(job, said=said), staging.output, tensors):
        fill(file, found)


@dataclass(frozen=True, slots=True)
class _Work:
    """The units of this process, with the hashes of its share of the input files.

    Args:
        staging: Keeps what is done.
        communicator: The communicator of the processes.
        files: That are hashed by any of them.
    """

    staging: Staging
    communicator: Communicator
    files: Sequence[Path]

    def do(self, units: Sequence[Unit]) -> None:
        """Do the units of this process that are not done."""
        rank, size = self.communicator.rank, self.communicator.world_size
        done = self.staging.facts()
        own = [one for i, one in enumerate(units) if i % size == rank and one.name not in done]
        files = {f"sha256-{i}": path for i, path in enumerate(self.files) if i % size == rank}
        pools, marked = [ThreadPoolExecutor(1, "polyak-sha256") for _ in range(_HASHING)], list[Future[None]]()
        with ThreadPoolExecutor(1, "polyak-done") as marking, _ending(pools):
            digests = Digests([path for name, path in files.items() if name not in done], pools)
            digests.advance(1 / len(own) if own else 1)
            for i, unit in enumerate(own, 2):
                digests.advance(min(1, i / len(own)))  # it reads what the next unit needs, one file after the other
                marked.append(marking.submit(self.staging.mark, unit.name, unit.write()))
            for one in marked:
                one.result()
            found = digests.results()
            for name, path in files.items():
                if path in found:
                    self.staging.mark(name, {"path": str(path), "sha256": found[path]})


@contextmanager
def _ending(pools: Sequence[ThreadPoolExecutor]) -> Iterator[None]:
    """Let pools end after a ``with`` block, and do nothing more: after an error much may wait."""
    try:
        yield
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def _require_unchanged(plan: Plan) -> None:
    for one in plan.checkpoints:
        one.files.require_unchanged()
