"""Prediction: the outputs for each batch of a loader."""

from collections.abc import Iterable
from typing import Any

import torch

from polyak.events import Event
from polyak.trainer import batches
from polyak.trainer.evaluation import drawing_alike, eval_mode
from polyak.trainer.parts import Parts


@torch.no_grad()
def predict(parts: Parts, dataloader: Iterable[Any]) -> list[Any]:
    """Return the outputs for each batch, in eval mode, between the events of a prediction. Each rank runs all batches.

    Args:
        parts: Of the trainer; the state's ``batch`` and ``outputs`` are set.
        dataloader: Batches as the model takes them.
    """
    outputs: list[Any] = []
    fire, state = parts.engine.fire, parts.state
    try:
        fire(Event.PREDICT_START)
        with drawing_alike(dataloader, parts.group), eval_mode(state.model):
            for batch in dataloader:
                state.batch = batches.to_device(batch, parts.group.device)
                fire(Event.PREDICT_BATCH_START)
                fire(Event.PREDICT_BEFORE_FORWARD)
                state.outputs = parts.forward.predict(state.batch)
                fire(Event.PREDICT_AFTER_FORWARD)
                outputs.append(state.outputs)
                fire(Event.PREDICT_BATCH_END)
    finally:
        fire(Event.PREDICT_END)
    return outputs
