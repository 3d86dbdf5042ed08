"""The settings of a ``Recorder``, and the objects made from them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyak.averaging.weights import Shadow
from polyak.errors import ArgumentError, RecordError, TimeError
from polyak.events import State
from polyak.record.writer import Writer
from polyak.sharding import Communicator
from polyak.storage.safetensors import TensorInfo
from polyak.tensors.slots import PolicyRule, all_slots, places_of, views_of
from polyak.time import Time, TimeUnit

# A checkpoint may be written over the last one of its path, and if that fails the last one is still needed.
_PINS_PER_PATH = 2
_INTERVAL = Time(1 / 1024, TimeUnit.DURATION)
# Of records whose checkpoints do not say.
_EARLIER_INTERVAL, _EARLIER_DTYPE = Time(1 / 512, TimeUnit.DURATION), torch.float32


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a ``Recorder``.

    Args:
        folder: As for ``Recorder``, absolute.
        interval: As for ``Recorder``.
        per_level: As for ``Recorder``.
        dtype: As for ``Recorder``.
        device: As for ``Recorder``.
        policy: As for ``Recorder``.
        shown: The recorder as text, which ranks compare: without the paths of their disks.
        overwrite: As for ``Recorder``.
        temporary: Whether the folder is deleted with the ``Recorder``.
    """

    folder: Path
    interval: Time | None
    per_level: int | None
    dtype: torch.dtype | None
    device: torch.device | str | None
    policy: PolicyRule
    shown: str
    overwrite: bool = False
    temporary: bool = False

    def interval_of(self, state: State) -> Time:
        """Return the length of a segment.

        Args:
            state: The state of the loop.

        Raises:
            TimeError: If it is a share of a run whose ``max_duration`` is not known.
        """
        interval = _INTERVAL if self.interval is None else self.interval
        if interval.unit is TimeUnit.DURATION and state.max_duration is None:
            raise TimeError(
                "the length of a segment must be known: give Recorder an interval such as '100ba', or the loop its "
                f"max_duration (got interval={self.interval})"
            )
        return interval

    def to_resume(self) -> dict[str, str]:
        """Return the settings with which a resumed run must continue if its ``Recorder`` is given no others."""
        dtype = {} if self.dtype is None else {"dtype": str(self.dtype).removeprefix("torch.")}
        kept = {"temporary": str(self.folder)} if self.temporary else {}
        return {"interval": (self.interval or _INTERVAL).to_timestring(), "dtype": "", **dtype, **kept}

    def resumed(self, plain: Mapping[str, Any]) -> "Settings":
        """Return these settings, filled from the record that a run resumes where the ``Recorder`` is given none.

        Args:
            plain: What ``to_resume`` returned, among other entries; earlier versions saved none.

        Raises:
            RecordError: If that record was in a temporary folder of another ``Recorder``.
        """
        if plain.get("temporary", str(self.folder)) != str(self.folder):
            raise RecordError(
                "the record of a resumed run must be in a folder, and this one was in a temporary folder, which is "
                "deleted with its Recorder(None): begin a new run, with Recorder(folder)"
            )
        if "interval" not in plain:
            return replace(self, interval=self.interval or _EARLIER_INTERVAL, dtype=self.dtype or _EARLIER_DTYPE)
        dtype = getattr(torch, plain["dtype"]) if plain["dtype"] else None
        interval = self.interval or Time.from_timestring(plain["interval"])
        return replace(self, interval=interval, dtype=self.dtype or dtype)

    def new_mean(self, state: State) -> Shadow:
        """Return a running mean of no updates.

        Args:
            state: The state of the loop.
        """
        return Shadow(state.model, policy=self.policy, device=self.device, views=True)

    def writer(self, mean: Shadow, state: State, ranks: Communicator | None, *, new: bool = False) -> Writer:
        """Return a writer of the record.

        Args:
            mean: The running mean, whose tensors are recorded.
            state: The state of the loop.
            ranks: As for ``Writer``.
            new: Whether a run begins that resumes nothing. Then a record that exists is replaced with ``overwrite``,
                and moved to a backup if the trainer has found no checkpoint to continue it from.
        """
        places, kinds = places_of(state.model), mean.kinds()
        full = places.as_full({name: tensor for name, (tensor, _) in kinds.items()})
        averaged = places.as_full({name: averaged for name, (_, averaged) in kinds.items()})
        tensors = {
            name: TensorInfo.of(tensor, averaged=averaged[name], dtype=self.dtype) for name, tensor in full.items()
        }
        return Writer(
            self.folder,
            tensors,
            per_level=self.per_level,
            max_duration=state.max_duration,
            aliases=_aliases(state.model, mean.averages),
            ranks=ranks,
            back_up=new and getattr(state, "found_no_checkpoint", False),
            overwrite=new and self.overwrite,
        )


def pinned(writer: Writer, checkpoint: Path | None, num_updates: int) -> dict[str, Any]:
    """Keep the files of a record for a checkpoint; return what ``Writer.rewind`` needs.

    Args:
        writer: The writer of the record.
        checkpoint: Its path; None if that is not known.
        num_updates: How many updates were recorded.

    Raises:
        RecordError: If the disk refuses.
    """
    writer.unpin_gone()
    prefix = f"{checkpoint.name if checkpoint else 'state'}@"
    writer.pin(f"{prefix}{num_updates}", checkpoint)
    for name in [name for name in writer.pins if name.startswith(prefix)][:-_PINS_PER_PATH]:
        writer.unpin(name)
    return writer.state_dict()


def _aliases(model: nn.Module, kept: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the other names of tied tensors, and the name under which each is kept."""
    persistent = {slot.name for slot in all_slots(model) if slot.persistent}
    tied = views_of(model, tied=True)
    place = places_of(model).name
    found = ((name, own.name) for name, (own, _) in tied.items() if own.name in kept and name in persistent)
    return {place(name): place(own) for name, own in found}


def check_arguments(*, per_level: Any, dtype: Any, device: Any, policy: Any, overwrite: Any) -> None:
    """Check the arguments of a ``Recorder``, before a run begins.

    Args:
        per_level: As given.
        dtype: As given.
        device: As given.
        policy: As given.
        overwrite: As given.

    Raises:
        RecordError: If ``per_level`` is not a whole number, or below 1.
        ArgumentError: If another one has a wrong type or value.
    """
    whole = isinstance(per_level, int) and not isinstance(per_level, bool)
    if per_level is not None and not (whole and per_level >= 1):
        raise RecordError(f"per_level must be at least 1, or None to merge nothing (got {per_level!r})")
    must = {
        "dtype": (dtype in _DTYPES, "torch.float32, torch.float16, torch.bfloat16, torch.int8 or None", dtype),
        "device": (_is_device(device), "a device of this machine or None", device),
        "policy": (callable(policy) and not isinstance(policy, type), "a function of a Slot", policy),
        "overwrite": (isinstance(overwrite, bool), "True or False", overwrite),
    }
    for name, (holds, what, given) in must.items():
        if not holds:
            raise ArgumentError(f"{name} of a Recorder must be {what} (got {given!r}); leave it out for the default")


_DTYPES = (None, torch.float32, torch.float16, torch.bfloat16, torch.int8)


def _is_device(given: Any) -> bool:
    try:
        return given is None or torch.empty(0, device=given).numel() == 0
    except (RuntimeError, TypeError, AssertionError, NotImplementedError):
        return False
