"""An average as a section of torchtitan's configuration, on its command line, or as one of its overrides."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from torchtitan.components.checkpointer import BaseCheckpointManager
from torchtitan.config import Configurable
from torchtitan.config.override import derive, override
from torchtitan.trainer import Trainer

from polyak.algorithm import Algorithm, as_algorithms
from polyak.averaging.ema import EMA
from polyak.errors import ArgumentError
from polyak.hosts.torchtitan.attached import TorchtitanAttached
from polyak.record.recorder import Recorder


class Averaging(TorchtitanAttached, Configurable):
    """An average of the weights as a component of torchtitan's ``Trainer``, which has it as ``trainer.averaging``.

    Args:
        config: Its settings.
        trainer: As its configuration built it.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        """The section ``polyak`` of a configuration.

        Raises:
            TimeError: If a time cannot be read.
            ProfileError: If both a half-life and a decay are given.
            ArgumentError: If settings are given next to ``algorithms``, or for nothing that is saved.
        """

        enable: bool = True
        """Whether the weights are averaged."""

        half_life: str | None = None
        """The time in which half of the average is replaced: 1000ba, 1e9tok or 0.05dur. 1000 steps by default."""

        decay: float | None = None
        """Instead of a half-life, the share of the average that each update keeps."""

        ema_start: str = "0ba"
        """How much training comes before averaging."""

        update_interval: str | None = None
        """The time between updates; one step by default."""

        eval_weights: Literal["averaged", "raw", "both"] = "averaged"
        """Which weights validation uses."""

        save: str = ""
        """Folder in the dump folder for the averaged weights after the last step, as safetensors; none by default."""

        save_in_hf: bool = False
        """Whether these have Hugging Face's names."""

        record: str = ""
        """Folder in the dump folder for a record of the weights, for averages of any half-life; none by default."""

        algorithms: Annotated[Callable[[], Any] | None, tyro.conf.Suppress] = None
        """Returns the algorithms, instead of the settings of one. It cannot be given on the command line."""

        def __post_init__(self) -> None:
            # Checked where the command line is read, on every rank, before anything is built.
            own = (self.half_life, self.decay, self.update_interval, self.record or None)
            if self.algorithms is not None and any(one is not None for one in own):
                raise ArgumentError(
                    "the algorithms must come from one place (got algorithms, and a half-life, a decay, an update "
                    "interval or a record too); set these in what algorithms returns"
                )
            if self.save_in_hf and not self.save:
                raise ArgumentError("save_in_hf must have a folder to write to (got no save); set save='averaged' too")
            if self.algorithms is None:
                self.ema()

        def ema(self) -> EMA:
            """Return the average that is asked for."""
            rest: dict[str, Any] = {"ema_start": self.ema_start, "update_interval": self.update_interval}
            if self.decay is not None:
                return EMA(self.half_life, decay=self.decay, **rest)
            return EMA(**rest) if self.half_life is None else EMA(self.half_life, **rest)

        def listed(self, folder: Path) -> Sequence[Algorithm]:
            """Return the algorithms.

            Args:
                folder: The dump folder.
            """
            if self.algorithms is not None:
                return as_algorithms(self.algorithms())
            recorders = [Recorder(folder / self.record)] if self.record else []
            return [self.ema(), *recorders]

    def __init__(self, config: Config, *, trainer: Trainer) -> None:
        folder = Path(trainer.config.dump_folder)
        super().__init__(config.listed(folder), trainer, config.eval_weights)
        if config.save:
            target, hf = folder / config.save, config.save_in_hf

            def save(inner: Callable[..., bool], curr_step: int, last_step: bool = False) -> bool:
                saved = inner(curr_step, last_step)
                if last_step:
                    self.save(target, overwrite=True, hf=hf)
                return saved

            self._around(trainer.checkpointer, "save", save)


def averaged(config: Trainer.Config, **settings: Any) -> Any:
    """Return a configuration with a section ``polyak``: of the same trainer, with an average.

    Args:
        config: The configuration of torchtitan's ``Trainer``, or of a subclass of it.
        **settings: The settings of ``Averaging.Config``, such as ``half_life="1000ba"`` and ``eval_weights="both"``.

    Raises:
        ArgumentError: If the configuration has such a section already.
    """
    if hasattr(config, "polyak"):
        raise ArgumentError(
            "a configuration must have one section polyak (got one that has it already); set its fields: "
            "config.polyak.half_life = '1000ba'"
        )
    return derive(config, _trainer_of(_owner(config)).Config, polyak=Averaging.Config(**settings))


@override(target=BaseCheckpointManager.Config, fqns=["checkpoint"], description="an average of the weights")
def ema(config: BaseCheckpointManager.Config, **settings: Any) -> Any:
    """Average the weights in a run of any configuration: ``--override.imports polyak.hosts.torchtitan.config.ema``.

    An override replaces a component, and the checkpoint manager is the component that gets the whole trainer.

    Args:
        config: The configuration of the checkpoint manager.
        **settings: The settings of ``Averaging.Config``.
    """
    return derive(config, _manager_of(_owner(config)).Config, polyak=Averaging.Config(**settings))


def _owner(config: Any) -> Any:
    return type(config)._owner  # noqa: SLF001


@functools.cache
def _trainer_of(base: Any) -> Any:
    class AveragedTrainer(base):
        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):
            polyak: Averaging.Config = field(default_factory=Averaging.Config)

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            if config.polyak.enable:
                config.polyak.build(trainer=self)

    return AveragedTrainer


@functools.cache
def _manager_of(base: Any) -> Any:
    class AveragedCheckpointManager(base):
        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):
            polyak: Averaging.Config = field(default_factory=Averaging.Config)

        def __init__(self, config: Any, *, states: dict[str, Any], **rest: Any) -> None:
            self._polyak, self._trainer = config.polyak, states["train_state"]
            super().__init__(config, states=states, **rest)

        def load(self, step: int = -1) -> bool:
            """Let the average meet the trainer, which is complete now and has loaded nothing; then load."""
            if self._polyak.enable and getattr(self._trainer, "averaging", None) is None:
                self._polyak.build(trainer=self._trainer)
            return super().load(step)

    return AveragedCheckpointManager


AveragedTrainer = _trainer_of(Trainer)
