"""``Handle``: the members by which users read, evaluate and save an attached average, in a plain loop or a trainer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from polyak.algorithm import Algorithm
from polyak.averaging.ema import EMA
from polyak.averaging.evalmode import keep_evaluating
from polyak.averaging.fill import refuse_swap
from polyak.averaging.habits import OF_AN_AVERAGE, absent, explained
from polyak.errors import ArgumentError, LoanError
from polyak.events import Event, State
from polyak.export import save_averaged
from polyak.publish import publish_averaged
from polyak.tensors.slots import unwrap
from polyak.training.between import Between
from polyak.training.block import block
from polyak.training.summary import in_words, summary, updates_of


class Followed(Protocol):
    """The members of a ``Loop`` that a handle needs."""

    @property
    def state(self) -> State:
        """What the algorithms read: the model and the clock."""
        ...

    def between(self, start: Event, end: Event) -> AbstractContextManager[None]:
        """Return a context that fires ``start`` before its block and ``end`` after it."""
        ...

    def warn_of_uncounted(self) -> None:
        """Warn, once, if weights have moved and no step was counted."""


class Handle(ABC):
    """The handle of the average of a loop or a trainer, with the members that all integrations have.

    Attributes:
        algorithms: The algorithms in use.
    """

    algorithms: Sequence[Algorithm]

    @abstractmethod
    def _follows(self) -> Followed | None:
        """Return the loop that follows the steps; None before a trainer has a model."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the state, or the part of it that the framework saves by this name."""

    @property
    def average(self) -> EMA:
        """The EMA among the algorithms, with its settings and further methods.

        Raises:
            ArgumentError: If there is none.
        """
        for algorithm in self.algorithms:
            if isinstance(algorithm, EMA):
                return algorithm
        raise ArgumentError(
            f"there must be an EMA among the algorithms to have an average (got {list(self.algorithms)}); attach one: "
            "attach([EMA(decay=0.999), ...], model, optimizer)"
        )

    @property
    def model(self) -> nn.Module:
        """The averaged module, in eval mode: the model's structure over the averages themselves, not over copies.

        It follows the updates, and needs no gradients. Each read makes a new module. While you keep one, ``applied()``
        needs memory for another copy of the weights. If the average is sharded, under FSDP2 or by ``EMA(mesh=...)``,
        ``fully_shard`` is applied to the module too, and all ranks must call it together.

        Raises:
            LoanError: If averaging has not begun, or if the module is called after ``train()``.
            ShardingError: If ``fully_shard`` cannot be applied to it as to the model: use ``applied()``.
            CopyError: If the module would still compute with the model's own tensors, or cannot be made.
        """
        average = self._begun()
        self._met().warn_of_uncounted()
        average._average.warn_before_use("read")  # noqa: SLF001
        model = average.ema_model
        assert model is not None
        if not average.ema_weights_active:
            keep_evaluating(model)
        return model

    @block
    @explained("ema.applied()", {})
    def applied(self) -> Iterator[nn.Module]:
        """Swap the average into the model for a ``with`` block, to evaluate or export it.

        Before averaging has begun, the model keeps its own weights. With a trainer, everything that it evaluates,
        predicts and saves in the block uses the average, also with ``eval_weights="raw"``. With ``"both"``, it refuses
        to evaluate in the block, since the raw weights are not in the model.

        Raises:
            LoanError: If the model holds an average already, or a trainer has not begun to train it.
            ShardingError: If ranks that train together disagree, or one of them cannot swap.
        """
        followed = self._met()
        refuse_swap(self.average._average, followed.state.model, "applied()")  # noqa: SLF001
        with self._swapped_in(followed):
            yield unwrap(followed.state.model)

    def _swapped_in(self, followed: Followed) -> AbstractContextManager[None]:
        """Return the context of ``applied``. Events of the trainer inside the block do not end it."""
        average, model = self.average, followed.state.model
        if not average.ema_started:
            return followed.between(Event.EVAL_START, Event.EVAL_END)

        def fire(event: Event) -> None:
            if event is Event.EVAL_START:
                followed.warn_of_uncounted()
                average.get_ema_model(model)
            else:
                average.get_training_model(model)

        return Between(fire, followed.state, Event.EVAL_START, Event.EVAL_END)

    @property
    def num_updates(self) -> int:
        """How many updates were made: the first copied the weights, and each later one moved the average.

        It is one more than ``average.num_updates``, which counts only how often the average has moved.
        """
        return updates_of(self.average)

    def metrics(self) -> dict[str, float]:
        """Return ``ema/decay`` and ``ema/distance``, as they are logged; nothing before averaging has begun.

        ``ema/distance`` is how far the weights are from the average, relative to it. See ``EMA.metrics``.
        """
        return self.average.metrics()

    @explained("ema.save('averaged.safetensors')", {})
    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Save the averaged weights alone, under the names and in the dtypes of the model's ``state_dict()``.

        Any tool reads them: ``model.load_state_dict(safetensors.torch.load_file(path))``. To resume the run, save
        ``state_dict()`` next to the states of the model and the optimizer instead. Sharded models are written without
        gathering them in memory; all ranks must call this.

        Args:
            path: A file whose name ends in ``.safetensors``, or a folder, which gets files of at most 5 GB.
            overwrite: Whether to replace what was saved there before.

        Raises:
            ExistsError: If the path exists.
            LoanError: If averaging has not begun, or the model holds another average.
            ArgumentError: If the name has another ending, such as ``.pt``.
            CheckpointError: If the model has a tensor that safetensors cannot hold.
        """
        average = self._begun()
        self._met().warn_of_uncounted()
        save_averaged(average, self._met().state.model, path, overwrite=overwrite)

    @explained("ema.publish(lambda name, tensor: engine.load_weights([(name, tensor)]))", {})
    def publish(self, load: Callable[[str, Tensor], object], *, every_rank: bool = False) -> None:
        """Give the averaged weights to another program, such as an inference engine, one full tensor at a time.

        ``load`` is called with the names, dtypes and order of the model's ``state_dict()``. For a pipeline these are
        the names of all stages, one after the other, and for declared experts those of the full model. Shards are
        gathered for each call, so a rank holds one full tensor in addition to the memory of ``applied()``. All ranks
        must call this, since each has shards. If ``load`` fails on one rank, all raise, and the training weights are
        restored.

        Args:
            load: A function of a name and a tensor. It must not change the tensor, and copies what it keeps.
            every_rank: Whether ``load`` is called on every rank, as for an engine in the same processes; by default
                rank 0 alone calls it.

        Raises:
            ArgumentError: If ``load`` cannot be called.
            LoanError: If averaging has not begun, the model holds another average, or ``load`` has changed a parameter.
            ShardingError: If ranks disagree, ``load`` failed on another rank, or stages of a pipeline have different
                tensors of one name.

        Example:
            >>> import torch
            >>> from polyak import attach, EMA
            >>> model, engine = nn.Linear(2, 1), nn.Linear(2, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> ema = attach(EMA("10ba"), model, optimizer)
            >>> for _ in range(20):
            ...     model(torch.ones(4, 2)).square().mean().backward()
            ...     optimizer.step()
            >>> weights = engine.state_dict()
            >>> ema.publish(lambda name, tensor: weights[name].copy_(tensor))
            >>> torch.equal(engine.weight, ema.model.weight)
            True
        """
        average = self._begun()
        self._met().warn_of_uncounted()
        publish_averaged(average, self._met().state.model, load, every_rank=every_rank)

    def _met(self) -> Followed:
        followed = self._follows()
        if followed is None:
            raise LoanError(
                "the trainer must have begun to train its model before there is an average of it (it has not); call "
                "its train() or fit() first"
            )
        return followed

    def _begun(self) -> EMA:
        followed, average = self._met(), self.average
        if not average.ema_started:
            counted = followed.state.timestamp.batch.value
            start = (
                f"the first update after {in_words(average.ema_start)}"
                if average.ema_start.value
                else "the first update"
            )
            raise LoanError(
                f"averaging must have begun before there is an average ({counted} steps were counted, and it begins "
                f"with {start}); train until then"
            )
        return average

    def __repr__(self) -> str:
        followed = self._follows()
        if followed is None:
            return f"<Average of a model that is not trained yet: {', '.join(map(repr, self.algorithms))}>"
        return summary(unwrap(followed.state.model), self.algorithms, followed.state.timestamp)

    if not TYPE_CHECKING:  # it would hide misspelled names from type checkers

        def __getattr__(self, name: str) -> Any:
            if not name.startswith("_") and hasattr(type(self), name):
                return object.__getattribute__(self, name)  # a property has failed with an AttributeError of its own
            raise absent(self, name, OF_AN_AVERAGE if hasattr(type(self), "detach") else OF_A_TRAINERS)


OF_A_TRAINERS: Mapping[str, str] = {
    name: advice for name, advice in OF_AN_AVERAGE.items() if "ema.detach()" not in advice
}
