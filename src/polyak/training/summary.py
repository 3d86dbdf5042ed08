"""Describes what an attached loop does, in one sentence."""

from collections.abc import Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from polyak.algorithm import Algorithm
from polyak.averaging.ema import EMA
from polyak.time import Time, Timestamp, TimeUnit


def summary(model: nn.Module, algorithms: Sequence[Algorithm], now: Timestamp, *, detached: bool = False) -> str:
    """Return what is averaged, how, and how far it is.

    Args:
        model: The model in training, unwrapped.
        algorithms: At work in the loop.
        now: What has been counted.
        detached: Whether counting has stopped.
    """
    size = sum(parameter.numel() for parameter in model.parameters() if not is_lazy(parameter))
    name = f"{type(model).__name__} ({size:,} parameters)"
    counted = f"{now.batch.value:,} step{'' if now.batch == 1 else 's'} counted"
    others = [repr(algorithm) for algorithm in algorithms if not isinstance(algorithm, EMA)]
    averages = [algorithm for algorithm in algorithms if isinstance(algorithm, EMA)]
    if averages:
        text = f"Average of {name}: {_how(averages[0])}; {counted}, {_how_far(averages[0])}"
        text += f"; with {', '.join(others)}" if others else ""
    else:
        text = f"{', '.join(others) or 'no algorithm'} on {name}; {counted}"
    return f"<{text}{'; detached' if detached else ''}>"


def updates_of(ema: EMA) -> int:
    """Return how many updates were made, including the first, which began the average.

    Args:
        ema: Attached.
    """
    return ema.num_updates + 1 if ema.ema_started else 0


def _how(ema: EMA) -> str:
    if ema.half_life is not None:
        text = f"half-life {in_words(ema.half_life)}"
    elif ema.smoothing is not None:
        text = f"decay {ema.smoothing:g}"
    else:
        text = repr(ema.profile)
    start = f", from {in_words(ema.ema_start)} on" if ema.ema_start.value else ""
    return f"{text}, updated every {in_words(ema.update_interval).removeprefix('1 ')}{start}"


def in_words(time: Time) -> str:
    """Return a time with its unit as a word, such as ``"100 steps"``.

    Args:
        time: In any unit.
    """
    if time.unit is TimeUnit.DURATION:
        return f"{100 * time.value:.3g}% of the run"
    return f"{time.value:,g} {_UNITS[time.unit]}{'' if time == 1 else 's'}"


_UNITS = {
    TimeUnit.BATCH: "step",
    TimeUnit.EPOCH: "epoch",
    TimeUnit.SAMPLE: "sample",
    TimeUnit.TOKEN: "token",
    TimeUnit.ITERATION: "iteration",
    TimeUnit.SECOND: "second",
}


def _how_far(ema: EMA) -> str:
    if not ema.ema_started:
        return "averaging has not begun"
    held = "; the model holds the average" if ema.ema_weights_active else ""
    updates = updates_of(ema)
    return f"{updates:,} update{'' if updates == 1 else 's'}{held}"
