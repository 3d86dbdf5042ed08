"""The folder of a demo run: its files, its arguments, and a lock."""

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
    """The files of a demo run.

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
        """Make the folder if it does not exist, and lock it.

        Raises:
            UsageError: If the folder cannot be made or written to, or another run has locked it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--out must be a folder ({self.path} is a file); choose another --out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"--out must be a folder that can be made ({self.path}: {error.strerror}); choose another --out"
            ) from None
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise UsageError(
                f"--out must be a folder that can be written to ({self.path} is not); choose another --out"
            )
        lock = Lock(self.path, self._busy)
        try:
            yield
        finally:
            lock.release()

    def _busy(self, owner: str) -> UsageError:
        return UsageError(
            f"--out must not be in use (another polyak demo is running in {self.path}, {owner}); wait until it ends, "
            "or choose another --out"
        )

    def begin(self, arguments: Mapping[str, str | int], recipe: str, *, may_grow: str | None) -> None:
        """Check that the folder is new or has the same arguments, and save the arguments.

        Args:
            arguments: The arguments by their names on the command line.
            recipe: Everything else that determines the result.
            may_grow: The argument that may be larger than before, if any.

        Raises:
            UsageError: If the folder has other files, other arguments or another recipe.
        """
        kept = self._read()
        if kept is None:
            if foreign := sorted(p.name for p in self.path.iterdir() if not p.name.startswith(self._temporary_prefix)):
                raise UsageError(
                    f"--out must be a new or empty folder, or one of polyak demo ({self.path} has "
                    f"{', '.join(foreign[:3])}{', ...' if foreign[3:] else ''}); choose another --out"
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
                    f"--out must have the same arguments ({self.path} has {made}; this run has {asked}); choose "
                    f"another --out, or give the same arguments{f' (only {may_grow} may grow)' if may_grow else ''}"
                )
            if kept["recipe"] != recipe:
                raise UsageError(
                    f"--out must have the same recipe ({self.path} is of polyak {kept['polyak']}); choose another --out"
                )
            if was == arguments:
                return
        self._save(arguments, recipe, complete=False)

    @property
    def _temporary_prefix(self) -> str:
        return f".{self._arguments.name}"

    @property
    def complete(self) -> bool:
        """Whether all files are complete."""
        kept = self._read()
        files = (self.averaged, self.raw, self.metrics, self.png, self.svg)
        return kept is not None and kept["complete"] and all(file.is_file() for file in files)

    def finish(self) -> None:
        """Save that all files are complete."""
        kept = self._read()
        assert kept is not None
        self._save(kept["arguments"], kept["recipe"], complete=True)

    def _save(self, arguments: Mapping[str, str | int], recipe: str, *, complete: bool) -> None:
        saved = {
            "polyak": polyak.__version__,
            "arguments": dict(arguments),
            "recipe": recipe,
            "complete": complete,
        }
        with replacing(self._arguments, exclusive=True) as temporary:
            temporary.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")

    def _read(self) -> dict[str, Any] | None:
        try:
            kept = json.loads(self._arguments.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            kept = None
        if not isinstance(kept, dict) or not {"polyak", "arguments", "recipe", "complete"} <= kept.keys():
            raise UsageError(
                f"{self._arguments} must be as polyak demo wrote it (it was changed); choose another --out"
            )
        return kept
