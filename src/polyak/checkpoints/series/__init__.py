"""Series: checkpoints of one run that hold averages of known profiles, or weights of known moments.

``open_series`` recognises what they are. Each family has a file with the same three members, ``KIND``, ``accepts`` and
``read``; to add one, write it and put it in ``FAMILIES``.
"""

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from polyak.checkpoints import distributed
from polyak.checkpoints.folder import weight_files
from polyak.checkpoints.moments import in_natural_order
from polyak.checkpoints.opening import named_errors
from polyak.checkpoints.opening import read as read_content
from polyak.checkpoints.patterns import matching
from polyak.checkpoints.series import edm2, icefall, own, posthoc, raw, swa
from polyak.checkpoints.series.averages import Average, Family, Options, Said, Series
from polyak.checkpoints.series.checks import require_one_run
from polyak.checkpoints.stored import Files
from polyak.compat.words import listed, shown
from polyak.errors import CheckpointError

__all__ = ["FAMILIES", "Average", "Options", "Said", "Series", "holds_checkpoints", "open_series"]

# The first that accepts a checkpoint reads it.
FAMILIES: Sequence[Family] = (edm2, posthoc, icefall, own, swa, raw)

_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".pkl", ".nemo", ".pth.tar")
# What the files and folders are named by which a folder is one checkpoint; the last two are of Megatron and DeepSpeed.
_WEIGHTS = re.compile(
    r"(model|pytorch_model|diffusion_pytorch_model|adapter_model)(_\d+|-\d+-of-\d+)?\.(safetensors|bin)"
    r"|.*\.index\.json|.*\.distcp|\.metadata|mp_rank_\d.*|.*zero_pp_rank_\d.*"
)


def open_series(paths: Sequence[Path], options: Options) -> Series:
    """Open the checkpoints of one run. No tensor is read yet, and no code in them runs.

    Args:
        paths: Checkpoints, patterns, or folders of checkpoints.
        options: What the user says of them.

    Raises:
        CheckpointError: If there is none, one cannot be read safely, or they are not of one run.
    """
    found, left_out = _expanded(paths)
    kinds = {path: _family(path) for path in found}
    if len({family.KIND for family in kinds.values()}) > 1:
        first = next(iter(kinds))
        other = next(path for path, family in kinds.items() if family is not kinds[first])
        raise CheckpointError(
            f"checkpoints must be of one kind ({shown(first)}: {kinds[first].KIND}, {shown(other)}: "
            f"{kinds[other].KIND}); give those of one, by a pattern"
        )
    series = kinds[found[0]].read(found, options)
    averages = sorted(series.averages, key=lambda one: (one.updates, -_age(one)))
    require_one_run(averages)
    return replace(series, averages=averages, left_out=[*series.left_out, *left_out])


def _age(average: Average) -> float:
    """Return a number that is larger for the older of two averages from the same moment."""
    now = float(average.updates)
    return -1.0 if average.profile is None else average.profile.decay(now / 2, now)


def _family(path: Path) -> Family:
    try:
        with named_errors(path):
            content = read_content(path, Files()).content
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; if a run is writing it, wait until it is complete, and else leave it out or copy it again"
        ) from None
    return next(family for family in FAMILIES if family.accepts(path, content))


def _expanded(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return the checkpoints in natural order, each once, and what else is in the folders."""
    found, left_out = list[Path](), list[str]()
    for path in paths:
        if not path.exists() and glob.has_magic(str(path)):
            if not (inside := matching(str(path))):
                raise CheckpointError(f"a pattern must match checkpoints ({shown(path)} matches none); check the path")
            found += inside
        elif path.is_dir() and not _is_checkpoint(path):
            inside, others = _inside(path)
            found, left_out = [*found, *inside], [*left_out, *others]
        else:
            found.append(path)
    links_first = sorted(found, key=lambda path: not path.is_symlink())  # of a link and its file, the file remains
    once = sorted({os.path.realpath(path): path for path in links_first}.values(), key=in_natural_order)
    if not once:
        raise CheckpointError(f"there must be checkpoints ({listed(paths) or 'nothing'} has none); check the path")
    return once, left_out


def _inside(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the checkpoints in a folder. If some have a number in their names, one without is a copy or the last."""
    shown = [one for one in folder.iterdir() if not one.name.startswith(".")]
    every = [one for one in shown if one.name.endswith(_SUFFIXES) or (one.is_dir() and _is_checkpoint(one))]
    numbered = [one for one in every if any(character.isdigit() for character in one.name)]
    if not numbered:
        return every, []
    return numbered, [f"{one.name}: no number in its name" for one in every if one not in numbered]


def _is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a checkpoint, not a folder of checkpoints: it has weights, or Accelerate's shards."""
    inside = list(folder.iterdir())
    sharded = [one for one in inside if distributed.accepts(one) and not one.name.startswith("optim")]
    return any(_WEIGHTS.fullmatch(one.name) for one in inside) or len(sharded) == 1 or bool(weight_files(folder))


def holds_checkpoints(path: Path) -> bool:
    """Return whether a path is a pattern, or a folder with checkpoints in it.

    Args:
        path: Given by a user.
    """
    if not path.exists():
        return glob.has_magic(str(path))
    return path.is_dir() and not _is_checkpoint(path) and bool(_inside(path)[0])
