"""When a checkpoint was saved, from its content or its name."""

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from torch import Tensor

from polyak.checkpoints.snapshots import Snapshot
from polyak.checkpoints.stored import StoredTensor
from polyak.compat.pickles import StandIn
from polyak.time import TimeUnit

# What libraries call them, the surest first.
_COUNTERS = {
    TimeUnit.BATCH: (
        *("global_step", "num_updates", "global_steps", "batch", "step", "steps", "iteration", "iter"),
        *("step_count", "iter_num", "batch_idx_train", "completed_steps", "it"),
    ),
    TimeUnit.EPOCH: ("epoch", "current_epoch"),
    TimeUnit.TOKEN: ("token", "tokens_seen", "num_tokens"),
    TimeUnit.SAMPLE: ("sample", "samples_seen"),
}
# Where Composer, polyak, fairseq, mmengine, torchtitan and others keep them.
_PLACES = (
    (),
    ("state", "timestamp", "Timestamp"),
    ("state", "timestamp"),
    ("timestamp",),
    ("optimizer_history", -1),
    ("extra_state", "train_iterator"),
    ("train_state",),
    ("meta",),
    ("state",),
)
# How numpy's scalars are stored, by the name of their dtype.
_NUMPY = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i"}
# As people write them: 500, 100_000, 1e5, 10k or 1.5m.
_NUMBER = r"([1-9]\d{0,2}(?:_\d{3})+(?![\d_])|\d+(?:\.\d+)?e\d{1,2}(?![a-z\d])|\d+\.\d+(?=[km])|\d+)([km](?![a-z]))?"
_MULTIPLES = {"k": 1_000, "m": 1_000_000}
_NAMES = {
    # `checkpoint-500` is a step; fairseq's `checkpoint12.pt` is an epoch, and its `checkpoint_3_500.pt` both.
    TimeUnit.BATCH: (
        rf"(?:steps?|iter|iteration|ba|batch|updates?|checkpoint-|ckpt-)[-_=]*{_NUMBER}",
        rf"(?<![\d.]){_NUMBER}[-_]?steps?(?![a-z])",
        r"checkpoint_\d+_(\d+)",
        r"(?<!.)(?:(?:model|ema_0\.\d+_)(\d{6})|(\d{7}))\.pt",  # of guided-diffusion; of DiT and SiT
    ),
    TimeUnit.EPOCH: (r"(?:epochs?|ep)[-_=]*(\d+)", r"(?<!\d)(\d+)epochs?", r"checkpoint(\d+)", r"checkpoint_(\d+)_\d+"),
}
# Names that say nothing, and those of folders of one step, which do.
_OF_A_STEP = re.compile(r"(global_?|train_?)?(step|iter|iteration|checkpoint|ckpt|epoch|update)s?[-_=]?\d")
_USUAL = re.compile(r"([a-z]+_)*model(_weights)?\.(pt|pth|ckpt|bin|safetensors)")


def moment_of(path: Path, content: Mapping[Any, Any], clock: Mapping[str, Any]) -> dict[TimeUnit, float]:
    """Return when a checkpoint was saved, in the units that are known.

    Args:
        path: The path of the checkpoint.
        content: What is in it.
        clock: What files next to the weights say.
    """
    found = dict(_in_name(path))
    for source in (content, clock):
        for place in reversed(_PLACES):
            found |= dict(counters_in(at(source, place)))
    return {unit: found[unit] for unit in _COUNTERS if unit in found}


def counted_from_1(epochs: Sequence[float]) -> list[float]:
    """Return the epochs of checkpoints such that the first is 1, where it is 0: that one was saved at its end.

    Args:
        epochs: As checkpoints say them.

    Example:
        >>> counted_from_1([0, 1, 2]), counted_from_1([5, 6])
        ([1, 2, 3], [5, 6])
    """
    return [one + 1 for one in epochs] if 0 in epochs else [*epochs]


def at(value: object, place: tuple[str | int, ...]) -> object:
    """Return what is at a place in mappings and lists; None if it is not there.

    Args:
        value: The outermost.
        place: Keys of mappings, and numbers of items in lists.
    """
    for key in place:
        if isinstance(key, int):
            value = value[key] if isinstance(value, (list, tuple)) and value else None
        else:
            value = value.get(key) if isinstance(value, Mapping) else None
    return value


def counters_in(value: object) -> Iterator[tuple[TimeUnit, float]]:
    """Yield the counters in a mapping, such as ``global_step``, by their unit.

    Args:
        value: A mapping; anything else has none.
    """
    if isinstance(value, Mapping):
        for unit, names in _COUNTERS.items():
            numbers = (_count(value.get(name)) for name in names)
            if (number := next((one for one in numbers if one is not None), None)) is not None:
                yield unit, number


def is_counter(name: str) -> bool:
    """Return whether a name is that of a counter, such as ``global_step``.

    Args:
        name: The name of a value.
    """
    return any(name in names for names in _COUNTERS.values())


def _count(value: object) -> float | None:
    found = number(value)
    return found if found is not None and 0 <= found < 1 << 62 else None


def number(value: object, *, finite: bool = True) -> float | None:
    """Return a number, out of a tensor or of numpy if it is in one; None if it is none.

    Args:
        value: What a checkpoint has.
        finite: Whether NaN and infinities are none.
    """
    if isinstance(value, StoredTensor) and value.numel == 1:
        value = value.whole()
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, StandIn):
        value = _of_numpy(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, float) and not isfinite(value):
        return None if finite else value
    return float(value) if abs(value) < 1 << 62 else None


def _of_numpy(value: StandIn) -> object:
    """Return a scalar of numpy, out of what stands for it."""
    if not value.of.endswith("multiarray.scalar") or not isinstance(value.arguments, tuple):
        return None
    dtype, data = value.arguments if len(value.arguments) == 2 else (None, None)
    kind = dtype.arguments[:1] if isinstance(dtype, StandIn) and isinstance(dtype.arguments, tuple) else ()
    form = _NUMPY.get(kind[0]) if kind and isinstance(kind[0], str) else None
    return struct.unpack(form, data)[0] if form and isinstance(data, bytes) and len(data) == int(kind[0][1:]) else None


def _in_name(path: Path) -> Iterator[tuple[TimeUnit, float]]:
    # `step-500/model.pt` and `step-500/unet` are named as all others of the run.
    folder = path.absolute().parent.name
    is_usual = _USUAL.fullmatch(path.name) or (path.is_dir() and not any(map(str.isdigit, path.name)))
    name = folder if is_usual and _OF_A_STEP.match(folder.lower()) else path.name
    if (snapshot := Snapshot.named(path.name)) is not None:
        yield TimeUnit.SAMPLE, float(snapshot.images)
    for unit, patterns in _NAMES.items():
        for pattern in patterns:
            if found := re.search(rf"(?<![a-z]){pattern}", name.lower()):
                if (number := _number_in(*filter(None, found.groups()))) is not None:
                    yield unit, number
                break


def _number_in(digits: str, multiple: str = "") -> float | None:
    return _count(float(digits.replace("_", "")) * _MULTIPLES.get(multiple, 1))


def in_natural_order(path: Path) -> tuple[tuple[int, int | str], ...]:
    """Return a key that sorts names as people do: ``step-9`` comes before ``step-10``.

    Args:
        path: The path of a checkpoint.

    Example:
        >>> sorted([Path("b-10.pt"), Path("b-9.pt")], key=in_natural_order)[0].name
        'b-9.pt'
    """
    parts = re.split(r"([0-9]+)", str(path))
    return tuple((0, int(part)) if part.isdecimal() and part.isascii() else (1, part) for part in parts if part)
