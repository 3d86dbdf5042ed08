"""One file: of ``torch.save`` in any of its formats (``.pt``, ``.pth``, ``.ckpt``, ``.bin``), or of safetensors."""

from pathlib import Path

from polyak.checkpoints.deepspeed import require_all_weights
from polyak.checkpoints.stored import Files, Found
from polyak.compat.files import load
from polyak.compat.saved import is_legacy

FORMAT = "file"


def accepts(path: Path) -> bool:
    """Return whether it is not a folder.

    Args:
        path: The path of a checkpoint.
    """
    return not path.is_dir()


def read(path: Path, files: Files) -> Found:
    """Read what is in the file, but no tensor.

    Args:
        path: The path of the file.
        files: Opens it.

    Raises:
        CheckpointError: If it is not such a file, or is damaged.
    """
    data = files.open(path)
    content = load(path, data=data, unchecked=files.unchecked)
    require_all_weights(path, content)
    if bytes(data[:2]) == b"PK":
        return Found(content, format="torch file")
    if bytes(data[8:9]) == b"{":
        return Found(content, format="safetensors file")
    return Found(content, format="torch file of before 1.6" if is_legacy(data) else "pickle")
