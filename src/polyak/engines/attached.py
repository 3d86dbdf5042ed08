"""``EngineAttached``: the handle of an average of an engine's masters, in the user's own loop."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyak.algorithm import Algorithm, as_algorithms
from polyak.engines.handle import MastersHandle, check_averages
from polyak.engines.masters import Masters
from polyak.training.attached import Attached
from polyak.training.options import LoopOptions


class EngineAttached(MastersHandle, Attached):
    """An average of the masters of an engine, and its handle. The ``attach`` of an integration makes it.

    Args:
        algorithms: One ``EMA``, or a list of one.
        masters: The masters of the engine's optimizer.
        options: The options of the loop.

    Raises:
        ArgumentError: If there is another algorithm than an ``EMA``, or its average is to be sharded over a mesh.
        TimeError: If it has a time in a unit that is not counted.
    """

    def __init__(self, algorithms: Algorithm | Sequence[Algorithm], masters: Masters, options: LoopOptions) -> None:
        super().__init__(check_averages(as_algorithms(algorithms)), masters, None, options)

    def step(self) -> None:
        """Refuse: the engine's steps are counted.

        Raises:
            ValueError: Always.
        """
        raise ValueError("steps are counted by the engine's own step() (got a call of step by hand); delete this call")

    def begin(self) -> None:
        """Note that a step begins. Integrations call this."""
        self._loop.begin()

    def state_dict(self, path: str | Path | None = None) -> dict[str, Any]:
        """Return the state with the parts of this rank, for ``torch.distributed.checkpoint``. All ranks must call this.

        Saved by ``dcp.save`` it is loaded on any number of ranks, under any ZeRO stage.

        Args:
            path: Where it will be saved.

        Raises:
            LoanError: If the average is swapped in.
        """
        return self._in_fragments(lambda: self._loop.state_for(path))

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
