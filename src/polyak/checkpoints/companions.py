"""The files that a usable folder has next to its weights, such as configurations and tokenizers."""

import shutil
from pathlib import Path

from polyak.checkpoints.folder import INDEX

# Says what an average was made from, in a folder whose files have no header for it.
PROVENANCE = "polyak.average.json"
# All else, such as the states of optimizers, is left out.
_BELONGS = {".json", ".txt", ".model", ".py", ".md", ".jinja", ".tiktoken", ".vocab", ".yaml", ".yml"}
_TRAINING = ("trainer_state", "training_args", "optimizer", "scheduler", "rng_state", "random_states", PROVENANCE)
# Without them Lightning and Megatron do not load the weights next to them.
_BELONG = {"meta.pt", "common.pt"}


def companions(folder: Path) -> list[Path]:
    """Return the files that belong to a folder.

    Args:
        folder: The folder of a checkpoint; a file has none.
    """
    return sorted(
        one
        for one in (folder.iterdir() if folder.is_dir() else ())
        if one.is_file()
        and (one.suffix in _BELONGS or one.name in _BELONG)
        and not one.name.endswith(INDEX)
        and not one.name.startswith(_TRAINING)
    )


def copy_companions(folder: Path, to: Path) -> None:
    """Copy the files that belong to a folder to another.

    Args:
        folder: The folder of a checkpoint; a file has none.
        to: A folder.
    """
    for one in companions(folder):
        shutil.copyfile(one, to / one.name)
