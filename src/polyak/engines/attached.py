"""``EngineAttached``: the handle of an average of an engine's masters."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor, nn

from polyak.algorithm import Algorithm, as_algorithms
from polyak.averaging.ema import EMA
from polyak.averaging.swap import refuse_second_swap, swap_of
from polyak.engines.export import save_average
from polyak.engines.masters import Masters
from polyak.errors import ArgumentError, CopyError, LoanError, ShardingError
from polyak.events import Event
from polyak.publish import check_loader, stream
from polyak.sharding import communicator_of
from polyak.training.attached import Attached
from polyak.training.block import block
from polyak.training.options import LoopOptions


class EngineAttached(Attached):
    """An average of the masters of an engine, and its handle. The ``attach`` of an integration makes it.

    Args:
        algorithms: One ``EMA``, or a list of one.
        masters: Of the engine's optimizer.
        options: Of the loop.

    Raises:
        ArgumentError: If there is another algorithm than an ``EMA``, or its average is to be sharded over a mesh.
        TimeError: If it has a time in a unit that is not counted.
    """

    _own: ClassVar[frozenset[str]] = frozenset({"algorithms"})

    def __init__(self, algorithms: Algorithm | Sequence[Algorithm], masters: Masters, options: LoopOptions) -> None:
        listed = as_algorithms(algorithms)
        if other := [one for one in listed if not isinstance(one, EMA)]:
            raise ArgumentError(
                f"the masters of an engine can be averaged by an EMA alone (got {other}): each rank has other parts of "
                "them; for a Recorder, train with FSDP2 or DDP"
            )
        if any(one._average.settings.mesh is not None for one in listed if isinstance(one, EMA)):  # noqa: SLF001
            raise ArgumentError(
                "mesh divides averages over ranks, and under an engine the masters are divided already (got a mesh); "
                "leave it out"
            )
        self._masters = masters
        super().__init__(listed, masters, None, options)

    @property
    def model(self) -> nn.Module:
        """Not there under an engine: no rank has the full average.

        Raises:
            ShardingError: Always; it says what to use.
        """
        raise ShardingError(
            "one rank must have the full average for a module over it, and under an engine each has a part; evaluate "
            "in `with ema.applied():`, or write it by ema.save(path)"
        )

    def step(self) -> None:
        """Refuse: the engine's steps are counted.

        Raises:
            ValueError: Always.
        """
        raise ValueError("steps are counted by the engine's own step() (got a call of step by hand); delete this call")

    def begin(self) -> None:
        """Note that a step begins. Integrations call this."""
        self._loop.begin()

    @block
    def applied(self) -> Iterator[nn.Module]:
        """Swap the average into the masters, and the weights that follow them, for a ``with`` block.

        All ranks must enter and leave it together: the weights are gathered from the masters as after a step.

        Raises:
            LoanError: If the engine holds an average already.
            ShardingError: If the ranks disagree.
        """
        refuse_second_swap(self._masters, "applied()")
        self._masters.follow()
        with self._loop.between(Event.EVAL_START, Event.EVAL_END):
            yield self._masters.model

    def state_dict(self, path: str | Path | None = None) -> dict[str, Any]:
        """Return the state with the parts of this rank, for ``torch.distributed.checkpoint``. All ranks must call this.

        Saved by ``dcp.save`` it is loaded on any number of ranks, under any ZeRO stage.

        Args:
            path: Where it will be saved.

        Raises:
            LoanError: If the average is swapped in.
        """
        refuse_swapped(self._masters, "a state must be taken")
        self._masters.follow()
        return self._masters.in_fragments(self._loop.state_for(path))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what ``state_dict`` returned, after ``dcp.load`` has filled it. Load the engine's state first.

        Args:
            state: As filled.

        Raises:
            CheckpointError: If it is the state of other algorithms.
            MismatchError: If names or shapes differ from the masters' on this rank.
        """
        self._masters.follow()
        self._loop.load_state_dict(self._masters.without_fragments(state))

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
            ArgumentError: If ``dtype`` is no floating-point dtype.
        """
        save_average(self._begun(), self._masters, Path(path), dtype, overwrite=overwrite)

    def publish(self, load: Callable[[str, Tensor], object], *, every_rank: bool = False) -> None:
        """Give the averaged weights to another program, one full tensor at a time, as ``Attached.publish`` does.

        They have the engine's dtype. What ZeRO-3 has partitioned is gathered for the call. All ranks must call this.

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
            stream(self._masters.model, ranks, load, every_rank=every_rank, gathered=self._masters.gathered)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Refuse a copy."""
        raise CopyError(_NO_COPY)

    def __getstate__(self) -> NoReturn:  # type: ignore[override]
        raise CopyError(_NO_COPY)


_NO_COPY = (
    "one process must have the full average to copy or pickle it, and under an engine each has a part; save its "
    "state_dict() with torch.distributed.checkpoint"
)


def refuse_swapped(masters: Masters, what: str) -> None:
    """Refuse what needs training weights while an average is swapped in.

    Args:
        masters: Of the engine.
        what: What must be done with training weights, for the error: "a step must be made".

    Raises:
        LoanError: If an average is swapped in.
    """
    if swap := swap_of(masters):
        raise LoanError(
            f"{what} with training weights, and {swap.owner} has swapped its average in; leave the block of applied() "
            "first"
        )
