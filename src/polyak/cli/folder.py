"""The folder of a run of the demo: what is where, for which arguments, and one run at a time."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polyak
from polyak.cli.command import UsageError
from polyak.storage.atomic import replacing
from polyak.storage.lock import Lock


class RunFolder:
    """The files of a run.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.averaged = path / "averaged.safetensors"
        self.raw = path / "raw.safetensors"
        self.record = path / "record"
        self.sweep = path / "sweep"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.png = path / "demo.png"
        self.svg = path / "demo.svg"
        self._arguments = path / "demo.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder if need be, and keep other runs out of it.

        Raises:
            UsageError: If it cannot be a folder of this command's, or another run is in it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--out must be a folder, and {self.path} is a file; choose another --out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"--out must be a folder that can be made ({self.path}: {error.strerror}); choose another --out"
            ) from None
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise UsageError(f"--out must be a folder that can be written to, and {self.path} is not; choose another")
        lock = Lock(self.path, self._busy)
        try:
            yield
        finally:
            lock.release()

    def _busy(self, owner: str) -> UsageError:
        return UsageError(
            f"another polyak demo is running in {self.path} ({owner}); wait until it has ended, or choose another --out"
        )

    def begin(self, arguments: Mapping[str, str | int], recipe: str, *, may_grow: str | None) -> None:
        """See that what is in the folder came from the same arguments, and note them.

        Args:
            arguments: By their names on the command line.
            recipe: All else that decides on the outcome.
            may_grow: The argument that may be larger than it was, if there is one.

        Raises:
            UsageError: If it did not.
        """
        kept = self._read()
        if kept is None:
            if foreign := sorted(p.name for p in self.path.iterdir() if not p.name.startswith(self._draft_prefix)):
                raise UsageError(
                    f"--out must be a new or empty folder, or one that polyak demo made, and {self.path} has "
                    f"{', '.join(foreign[:3])}{', ...' if foreign[3:] else ''}; choose another --out"
                )
        else:
            was = kept["arguments"]
            differing = [
                name
                for name, value in arguments.items()
                if was.get(name) != value and not (name == may_grow and value > was[name])
            ]
            if differing:
                made = " ".join(f"{name} {was.get(name)}" for name in differing)
                asked = " ".join(f"{name} {arguments[name]}" for name in differing)
                raise UsageError(
                    f"{self.path} was made with {made}, and this asks for {asked}; choose another --out, or give the "
                    f"same arguments{f' (only {may_grow} may grow)' if may_grow else ''}"
                )
            if kept["recipe"] != recipe:
                raise UsageError(
                    f"{self.path} was made by polyak {kept['polyak']} with another recipe; choose another --out"
                )
            if was == arguments:
                return
        self._note(arguments, recipe, complete=False)

    @property
    def _draft_prefix(self) -> str:
        return f".{self._arguments.name}"

    @property
    def complete(self) -> bool:
        """Whether everything is written."""
        kept = self._read()
        files = (self.averaged, self.raw, self.metrics, self.png, self.svg)
        return kept is not None and kept["complete"] and all(file.is_file() for file in files)

    def finish(self) -> None:
        """Note that everything is written."""
        kept = self._read()
        assert kept is not None
        self._note(kept["arguments"], kept["recipe"], complete=True)

    def _note(self, arguments: Mapping[str, str | int], recipe: str, *, complete: bool) -> None:
        noted = {
            "polyak": polyak.__version__,
            "arguments": dict(arguments),
            "recipe": recipe,
            "complete": complete,
        }
        with replacing(self._arguments, exclusive=True) as temporary:
            temporary.write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")

    def _read(self) -> dict[str, Any] | None:
        try:
            kept = json.loads(self._arguments.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            kept = None
        if not isinstance(kept, dict) or not {"polyak", "arguments", "recipe", "complete"} <= kept.keys():
            raise UsageError(f"{self._arguments} must be as polyak demo wrote it, and is not; choose another --out")
        return kept
