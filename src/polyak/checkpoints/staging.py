"""The folder in which an output is made. A run that was stopped leaves it; the next run of the same plan resumes it."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from polyak.checkpoints.averaging import Plan
from polyak.compat.words import shown
from polyak.errors import CheckpointError
from polyak.sharding.communicator import Communicator
from polyak.storage.atomic import put, remove, temporary_path
from polyak.storage.lock import Lock
from polyak.storage.safetensors import raw_bytes

_VERSION = 2


def fingerprint_of(plan: Plan, form: str, given: Mapping[str, Tensor]) -> str:
    """Return a text that is the same for plans with the same output.

    Args:
        plan: What is averaged.
        form: The form of the output.
        given: Tensors that are written instead of their average.
    """
    said = [
        _VERSION,
        form,
        [[str(one.path.absolute()), one.place, one.files.states] for one in plan.checkpoints],
        plan.weights,
        [[name, str(one.dtype), one.shape] for name, one in plan.tensors.items()],
        [[name, hashlib.sha256(raw_bytes(one.contiguous())).hexdigest()] for name, one in given.items()],
    ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


class Staging:
    """An output that is not complete.

    Args:
        folder: With ``output`` and, for each unit that is done, a file with its facts.
    """

    def __init__(self, folder: Path) -> None:
        self.output = folder / "output"
        self._done = folder / "done"

    def facts(self) -> dict[str, dict[str, Any]]:
        """Return the facts of the units that are done, by their names."""
        files = [one for one in self._done.iterdir() if one.suffix == ".json"]
        return {one.stem: json.loads(one.read_text()) for one in files}

    def mark(self, name: str, facts: Mapping[str, Any]) -> None:
        """Record that a unit is done, once what it wrote is on the disk.

        Args:
            name: The name of the unit.
            facts: What it returned.

        Raises:
            OSError: If the disk refuses.
        """
        self._flush(facts)
        new = self._done / f"{name}.new"
        new.write_text(json.dumps(facts))
        new.replace(self._done / f"{name}.json")

    def _flush(self, facts: Mapping[str, Any]) -> None:
        for file in _files(self.output):
            if not self.output.is_dir() or file.name in facts or facts.get("file") == file.name:
                with file.open("r+b") as opened:
                    os.fsync(opened.fileno())


def _files(output: Path) -> list[Path]:
    return [one for one in output.rglob("*") if one.is_file()] if output.is_dir() else [output]


@contextmanager
def staged(path: Path, fingerprint: str, communicator: Communicator, *, folder: bool) -> Iterator[tuple[Staging, bool]]:
    """Give the output of a plan to the processes that make it, and say whether it was begun before.

    It becomes ``path`` when the ``with`` block ends. After an error nothing remains; after Ctrl-C or a kill what was
    done stays.

    Args:
        path: The final name.
        fingerprint: The fingerprint of the plan.
        communicator: The communicator of the processes.
        folder: Whether the output is a folder.

    Raises:
        CheckpointError: If another run makes this output.
        OSError: If the disk refuses.
    """
    staging = temporary_path(path)
    held = list[Lock]()

    def busy(who: str) -> Exception:
        return CheckpointError(f"an output must be written by one run ({who} writes {shown(path)}); wait for it")

    def begin() -> bool:
        staging.mkdir(exist_ok=True)
        held.append(Lock(staging, busy))
        said, output = staging / "plan", staging / "output"
        if said.is_file() and said.read_text() == fingerprint and output.exists():
            return True
        for old in staging.iterdir():
            remove(old)
        (staging / "done").mkdir()
        if folder:
            output.mkdir()
        return False

    try:
        resumed = communicator.on_rank_0(begin, f"begin {path}")
        yield Staging(staging), resumed
        communicator.on_rank_0(lambda: put(staging / "output", path), f"write {path}")
        communicator.on_rank_0(lambda: remove(staging), f"remove {staging}")
    except Exception:
        if held:
            remove(staging)
        raise
    finally:
        for lock in held:
            lock.release()


def keep_plan(path: Path, fingerprint: str) -> None:
    """Record the plan of an output, once all files are prepared: from then on it can be resumed.

    Args:
        path: The final name of the output.
        fingerprint: The fingerprint of the plan.

    Raises:
        OSError: If the disk refuses.
    """
    (temporary_path(path) / "plan").write_text(fingerprint)
