"""One file: of ``torch.save`` in any of its formats (``.pt``, ``.pth``, ``.ckpt``, ``.bin``), or of safetensors."""

from pathlib import Path

from polyak.checkpoints.stored import Files, Found
from polyak.compat.files import load

FORMAT = "file"


def accepts(path: Path) -> bool:
    """Return whether it is no folder.

    Args:
        path: Of a checkpoint.
    """
    return not path.is_dir()


def read(path: Path, files: Files) -> Found:
    """Read what is in the file, but no tensor.

    Args:
        path: Of the file.
        files: Opens it.

    Raises:
        CheckpointError: If it is no such file, or is damaged.
    """
    return Found(load(path, data=files.open(path), unchecked=files.unchecked))
