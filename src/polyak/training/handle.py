"""``Handle``: what one reads, evaluates and saves of an attached average."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from torch import nn

from polyak.algorithm import Algorithm
from polyak.averaging.ema import EMA
from polyak.averaging.evalmode import keep_evaluating
from polyak.averaging.habits import OF_AN_AVERAGE, absent, explained, kind_of
from polyak.errors import ArgumentError, CallError, FixedError, LoanError
from polyak.export import save_averaged
from polyak.tensors.slots import unwrap
from polyak.training.counted import CountedLoop
from polyak.training.summary import in_words, summary, updates_of


class Handle(ABC):
    """The average among the algorithms of a loop.

    Attributes:
        algorithms: At work.
    """

    algorithms: Sequence[Algorithm]
    _own: ClassVar[frozenset[str]] = frozenset({"algorithms"})

    @property
    @abstractmethod
    def loop(self) -> CountedLoop:
        """The loop that follows the steps."""

    @property
    def average(self) -> EMA:
        """The EMA among the algorithms: its settings, and more that one can do with it.

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
        """The averaged module: the model's structure over the averages, not copies of them, in eval mode.

        It follows the updates, and needs no gradients. Read it where you use it: each read makes a new module, and
        while one is kept, ``applied()`` takes the memory of another copy.

        Raises:
            LoanError: If averaging has not begun; when it is called after ``train()``.
            ShardingError: If the average is sharded: use ``applied()``.
            CopyError: If the module would still compute with the model's own tensors, or cannot be made.
        """
        average = self._begun()
        self.loop.warn_of_uncounted()
        average._average.warn_of_youth("read")  # noqa: SLF001
        model = average.ema_model
        assert model is not None
        if not average.ema_weights_active:
            keep_evaluating(model)
        return model

    @property
    def num_updates(self) -> int:
        """How many updates were made: the first took the weights as they were, and each later one moved the average.

        It is one more than ``average.num_updates``, which counts how often the average has moved.
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
            overwrite: Whether what was saved there before is replaced.

        Raises:
            FileExistsError: If there is something already.
            LoanError: If averaging has not begun, or the model holds another average.
            ArgumentError: If the name has another ending, as ``.pt``.
            CheckpointError: If the model has a tensor that safetensors cannot hold.
        """
        save_averaged(self._begun(), self.loop.state.model, path, overwrite=overwrite)

    def _begun(self) -> EMA:
        average = self.average
        if not average.ema_started:
            counted = self.loop.state.timestamp.batch.value
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
        return summary(unwrap(self.loop.state.model), self.algorithms, self.loop)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in self._own:
            what = OF_AN_AVERAGE.get(name, "it is read, and its settings are those of the EMA that was attached")
            raise FixedError(f"{name} of what attach returned cannot be assigned (got {kind_of(value)}); {what}")
        object.__setattr__(self, name, value)

    if not TYPE_CHECKING:  # these would hide misspelled names from type checkers

        def __getattr__(self, name: str) -> Any:
            if not name.startswith("_") and hasattr(type(self), name):
                return object.__getattribute__(self, name)  # a property has failed with an AttributeError of its own
            raise absent(self, name, OF_AN_AVERAGE)

        def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
            """Refuse a call: the averaged module is ``model``."""
            del args, kwargs
            raise CallError(
                "what attach returned cannot be called; call ema.model(...), or the model in `with ema.applied():`"
            )
