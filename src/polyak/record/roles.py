"""Decides which ranks record, and compares the ranks."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from polyak.averaging.agreement import agree_on_names, refuse_unsynchronized
from polyak.averaging.weights import Shadow
from polyak.errors import RecordError
from polyak.sharding import Communicator, Ranks, communicator_of, pipeline_communicator_of
from polyak.tensors.slots import PolicyRule
from polyak.time import Time, TimeUnit


class Roles:
    """The ranks that train a model, and the role of this one in recording it.

    Args:
        model: As it is trained. All ranks that hold it must make this together.
    """

    def __init__(self, model: nn.Module) -> None:
        self._stage: Communicator = communicator_of(model)
        self._pipeline = pipeline_communicator_of(model, self._stage)
        self._ranks: Communicator = self._pipeline or self._stage

    @property
    def several(self) -> Ranks | None:
        """The ranks, if they are several."""
        return self._ranks if isinstance(self._ranks, Ranks) else None

    @property
    def follows(self) -> bool:
        """Whether rank 0, which has the same weights, records, and this rank only counts."""
        return self._ranks.replicas and self._ranks.rank > 0

    @property
    def sharded(self) -> bool:
        """Whether each rank records its shards of the weights."""
        return not self._ranks.replicas

    def separate(self) -> Communicator | None:
        """Return a communicator for the thread that writes shards, whose messages must not mix with training's."""
        return self._ranks.separate() if self.sharded else None

    def run(self, act: Callable[[], None]) -> None:
        """Run on the ranks that record; if one of them raises an error, raise it on every rank.

        Args:
            act: Called on each rank of a sharded model, else on rank 0.
        """
        if self.sharded:
            self._ranks.on_every_rank("what is recorded", act)
        else:
            self._ranks.on_rank_0(act)

    def agree(self, mean: Shadow | None, facts: Mapping[str, Any]) -> None:
        """Check that all ranks record the same, and that what is not sharded in a sharded model is equal.

        Args:
            mean: The running mean, if there is one yet.
            facts: What else must be the same.

        Raises:
            ShardingError: If something differs.
        """
        stage = self._stage
        if mean is None or not self.sharded or not isinstance(stage, Ranks):
            self._ranks.agree("what is recorded", facts)
        elif self._pipeline is None:
            mean.agree(stage, facts)
        else:
            self._pipeline.on_every_rank("what is recorded", lambda: mean.agree(stage, {}), facts)

    def agree_on_names(self, model: nn.Module) -> None:
        """Check that no two stages of a pipeline have different tensors of one name.

        Args:
            model: As it is trained.

        Raises:
            ShardingError: If they have.
        """
        if self._pipeline is not None:
            agree_on_names(self._pipeline, self._stage, model)

    def refuse_unsynchronized(self, model: nn.Module, policy: PolicyRule) -> None:
        """Refuse a model with recorded parameters that may differ by rank.

        Args:
            model: As it is trained.
            policy: Which tensors are recorded.

        Raises:
            ShardingError: If there are such parameters.
        """
        if isinstance(self._stage, Ranks):
            refuse_unsynchronized(self._stage, model, policy)

    def refuse_temporary(self, *, temporary: bool) -> None:
        """Refuse a temporary folder, which other ranks do not see.

        Args:
            temporary: Whether the folder of the record is one.

        Raises:
            RecordError: If it is, and there are several ranks.
        """
        if temporary and self.several is not None:
            raise RecordError(
                "ranks that train one model must have a folder for its record that all see (got Recorder(None), whose "
                "folder is temporary): use Recorder(folder)"
            )

    def refuse_seconds(self, interval: Time, max_duration: Time | None) -> None:
        """Refuse segments with a length in seconds, which each rank's own clock would decide.

        Args:
            interval: The length of a segment.
            max_duration: The length of the run.

        Raises:
            RecordError: If there are several ranks and the length is in seconds.
        """
        length = max_duration if interval.unit is TimeUnit.DURATION else interval
        if self.several is not None and length is not None and length.unit is TimeUnit.SECOND:
            raise RecordError(
                "a segment must end at the same batch on all ranks, and their clocks differ (got an interval of "
                f"{interval}, max_duration={max_duration}): use a unit other than seconds"
            )
