"""Patterns of paths, as commands take them."""

import glob
from pathlib import Path


def matching(pattern: str) -> list[Path]:
    """Return the paths that match a pattern, in any order. Folders that exist are taken as they are named.

    So ``lr=[0.1]/*.pt`` is of the folder ``lr=[0.1]``, if there is one.

    Args:
        pattern: Such as ``"run/*.pt"``.
    """
    path = Path(pattern)
    base = next((one for one in path.parents if one.is_dir()), Path())
    return [base / one for one in glob.glob(str(path.relative_to(base)), root_dir=base)]  # noqa: PTH207  of a folder
