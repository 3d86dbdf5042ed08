"""``MastersHandle``: the members of a handle for an average of an engine's masters."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import nn

from polyak.algorithm import Algorithm
from polyak.averaging.ema import EMA
from polyak.averaging.swap import refuse_second_swap, swap_of
from polyak.engines.export import save_average
from polyak.engines.masters import Masters
from polyak.errors import ArgumentError, CopyError, LoanError, ShardingError
from polyak.publish import Load, check_loader, stream
from polyak.sharding import Communicator, communicator_of
from polyak.training.block import block
from polyak.training.handle import Handle


class MastersHandle(Handle):
    """The members of a handle that differ if each rank has only a part of the masters and of their average."""

    @property
    def _masters(self) -> Masters:
        masters = self._met().state.model
        assert isinstance(masters, Masters)
        return masters

    @property
    def model(self) -> nn.Module:
        """Refuse to return a module: no rank has the full average.

        Raises:
            ShardingError: Always; it says what to use.
        """
        raise ShardingError(
            "one rank must have the full average for a module over it, and under an engine each has a part; evaluate "
            "in `with ema.applied():`, or write it by ema.save(path)"
        )

    @block
    def applied(self) -> Iterator[nn.Module]:
        """Swap the average into the masters, and the weights that follow them, for a ``with`` block.

        All ranks must enter and leave it together: the weights are gathered from the masters as after a step.

        Raises:
            LoanError: If the engine holds an average already, or a trainer has not begun to train.
            ShardingError: If the ranks disagree.
        """
        masters = self._masters
        refuse_second_swap(masters, "applied()")
        masters.follow()
        with self._swapped_in(self._met()):
            yield masters.model

    def save(self, path: str | Path, *, overwrite: bool = False, dtype: torch.dtype | None = None) -> None:
        """Save the averaged weights as safetensors, under the model's names, in its shapes. All ranks must call this.

        Each rank writes its parts to disk, and rank 0 puts them together, one tensor after the other.

        Args:
            path: A file whose name ends in ``.safetensors``, or a folder.
            overwrite: Whether what was saved there before is replaced.
            dtype: Of what is averaged, such as ``torch.float32``; None for the model's own.

        Raises:
            FileExistsError: If there is something already.
            LoanError: If averaging has not begun.
            ArgumentError: If ``dtype`` is not a floating-point dtype.
        """
        save_average(self._begun(), self._masters, Path(path), dtype, overwrite=overwrite)

    def publish(self, load: Load, *, every_rank: bool = False) -> None:
        """Give the averaged weights to another program, one full tensor at a time, as ``Attached.publish`` does.

        They have the engine's dtype, and the names and shapes of the full model. All ranks must call this.

        Args:
            load: A function of a name and a tensor. It must not change the tensor, and copies what it keeps.
            every_rank: Whether ``load`` is called on every rank; by default rank 0 alone calls it.

        Raises:
            ArgumentError: If ``load`` cannot be called.
            LoanError: If averaging has not begun.
            ShardingError: If the ranks disagree, or ``load`` failed on another rank.
        """
        average, ranks = self._begun(), communicator_of(self._masters)
        ranks.on_every_rank("publishing", lambda: check_loader(load))
        with nullcontext() if average.ema_weights_active else self.applied():
            self._stream(ranks, load, every_rank=every_rank)

    def _stream(self, ranks: Communicator, load: Load, *, every_rank: bool) -> None:
        """Give each weight of the model, into which the average is swapped, to a function."""
        masters = self._masters
        stream(masters.model, ranks, load, every_rank=every_rank, gathered=masters.gathered)

    def _in_fragments(self, state: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        masters = self._masters
        refuse_swapped(masters, "a state must be taken")
        masters.follow()
        return masters.in_fragments(state())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Refuse a copy."""
        raise CopyError(_NO_COPY)

    def __getstate__(self) -> NoReturn:  # type: ignore[override]
        raise CopyError(_NO_COPY)


_NO_COPY = (
    "one process must have the full average to copy or pickle it, and under an engine each has a part; save its "
    "state_dict() with torch.distributed.checkpoint"
)


def check_averages(algorithms: Sequence[Algorithm]) -> Sequence[Algorithm]:
    """Return algorithms that can average the masters of an engine.

    Args:
        algorithms: As given.

    Raises:
        ArgumentError: If there is another algorithm than an ``EMA``, or its average is to be sharded over a mesh.
    """
    if other := [one for one in algorithms if not isinstance(one, EMA)]:
        raise ArgumentError(
            f"the masters of an engine can be averaged by an EMA alone (got {other}): each rank has other parts of "
            "them; for a Recorder, train with FSDP2 or DDP"
        )
    if any(one._average.settings.mesh is not None for one in algorithms if isinstance(one, EMA)):  # noqa: SLF001
        raise ArgumentError(
            "mesh divides averages over ranks, and under an engine the masters are divided already (got a mesh); "
            "leave it out"
        )
    return algorithms


def refuse_swapped(masters: Masters, what: str) -> None:
    """Refuse what needs training weights while an average is swapped in.

    Args:
        masters: The masters of the engine.
        what: What must be done with training weights, for the error: "a step must be made".

    Raises:
        LoanError: If an average is swapped in.
    """
    if swap := swap_of(masters):
        raise LoanError(
            f"{what} with training weights, and {swap.owner} has swapped its average in; leave the block of applied() "
            "first"
        )
