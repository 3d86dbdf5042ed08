"""Prediction: the outputs for each batch of a loader."""

from collections.abc import Iterable
from typing import Any

import torch

from polyak.events import Event
from polyak.trainer import batches
from polyak.trainer.engine import Engine
from polyak.trainer.evaluation import drawing_alike, eval_mode
from polyak.trainer.forward import Forward
from polyak.trainer.parallel import Group
from polyak.trainer.state import TrainerState


@torch.no_grad()
def predict(
    engine: Engine, state: TrainerState, forward: Forward, group: Group, dataloader: Iterable[Any]
) -> list[Any]:
    """Return the outputs for each batch, in eval mode, between the events of a prediction.

    Args:
        engine: Fires the events.
        state: Its ``batch`` and ``outputs`` are set.
        forward: Runs the model.
        group: Each of whose ranks runs all batches.
        dataloader: Batches as the model takes them.
    """
    outputs = []
    try:
        engine.fire(Event.PREDICT_START)
        with drawing_alike(dataloader, group), eval_mode(state.model):
            for batch in dataloader:
                state.batch = batches.to_device(batch, group.device)
                engine.fire(Event.PREDICT_BATCH_START)
                engine.fire(Event.PREDICT_BEFORE_FORWARD)
                state.outputs = forward.predict(state.batch)
                engine.fire(Event.PREDICT_AFTER_FORWARD)
                outputs.append(state.outputs)
                engine.fire(Event.PREDICT_BATCH_END)
    finally:
        engine.fire(Event.PREDICT_END)
    return outputs
