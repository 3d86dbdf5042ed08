"""The events that Composer lacks, around its functions that save, load, train and evaluate."""

import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.core import State
from composer.utils import checkpoint, dist
from torch import Tensor, nn

from polyak.algorithm import NoLogger
from polyak.compat import training_weights
from polyak.errors import PlanWarning
from polyak.events import Event
from polyak.hosts.composer.hosted import hosted_in
from polyak.sharding import copy_
from polyak.tensors.slots import named_tensors, slots


def install() -> None:
    """Wrap Composer's functions. To be called once."""
    checkpoint.save_checkpoint = _saving(checkpoint.save_checkpoint)
    State.load_state_dict = _restoring(State.load_state_dict)
    for name in ("fit", "eval", "predict"):
        setattr(Trainer, name, _reporting_exceptions(getattr(Trainer, name)))


def _saving(save_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Fire ``SAVE_START`` and ``SAVE_END`` around the saving of any checkpoint, by a ``CheckpointSaver`` or by hand."""

    @functools.wraps(save_checkpoint)
    def save(state: Any, *args: Any, **options: Any) -> Any:
        hosted = hosted_in(state)
        path = _path_of(state, checkpoint.get_save_filename(state, *args, **_only(options, "filename")))
        try:
            for algorithm in hosted:
                algorithm.saving_to(path)
                algorithm.fire(Event.SAVE_START, state, NoLogger())
            return save_checkpoint(state, *args, **options)
        finally:
            for algorithm in hosted:
                algorithm.fire(Event.SAVE_END, state, NoLogger())
                algorithm.saving_to(None)

    return save


def _path_of(state: Any, filename: str) -> Path:
    """Return the path of a checkpoint, the same on all ranks that write it together."""
    if state.fsdp_sharded_state_dict_enabled:
        return Path(filename).parent  # the name of the file in it is always the same
    path = [filename]
    if state.fsdp_enabled:
        dist.broadcast_object_list(path)  # names have the rank in them, and rank 0 saves
    return Path(path[0])


def _only(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {name: options[name]} if name in options else {}


def _reporting_exceptions(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(trainer: Any, *args: Any, **options: Any) -> Any:
        try:
            return method(trainer, *args, **options)
        except BaseException:
            for algorithm in hosted_in(trainer.state):
                algorithm.fire(Event.EXCEPTION, trainer.state, NoLogger())
            raise

    return call


def _restoring(load_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """Restore the training weights of a model whose checkpoint has an ``EMA`` that no algorithm resumes."""

    @functools.wraps(load_state_dict)
    def load(state: Any, saved: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        result = load_state_dict(state, saved, *args, **options)
        known = {type(algorithm).__qualname__ for algorithm in state.algorithms}
        for name, algorithm in dict(saved.get("algorithms", ())).items():
            if name not in known and "model" in saved:
                # With load_monolith_rank0_only only rank 0 has the saved model.
                training = training_weights(algorithm, saved["model"] or {})
                ignored = set[str]() if saved["model"] is None else _left_out(state.model, saved["model"])
                _restore(name, {n: t for n, t in (training or {}).items() if n not in ignored}, state.model)
        return result

    return load


def _left_out(model: nn.Module, saved: Mapping[str, Tensor]) -> set[str]:
    """Return the names that a checkpoint's model lacks, as with ``load_ignore_keys``: those tensors are not changed."""
    return {slot.name for slot in slots(model) if slot.persistent} - saved.keys()


def _restore(name: str, training: Mapping[str, Tensor], model: nn.Module) -> None:
    if not training:
        return
    tensors = named_tensors(model)
    for key in training.keys() & tensors.keys():  # Composer has checked the others, if it was to be strict
        copy_(tensors[key], training[key])
    warnings.warn(
        f"the checkpoint was saved with the average of {name} in its model, and there is no {name} here: the model has "
        f"been given the training weights; add {name} to continue averaging, or load_weights_only=True for the average",
        PlanWarning,
        stacklevel=2,
    )
