"""The settings of a run in its checkpoint: hyper-parameters, arguments and configurations, as plain values."""

from collections.abc import Iterator, Mapping
from typing import Any

from polyak.compat.pickles import StandIn

# Where Lightning, fairseq, Ultralytics, EDM2 and scripts keep them.
_PLACES = (
    "hyper_parameters",
    "hparams",
    "args",
    "cfg",
    "config",
    "train_args",
    "model_args",
    "model_config",
    "dataset_kwargs",
)
# What a resumed run may change, or what grows while a run trains.
_VOLATILE = (
    *("resume", "rank", "device", "worker", "host", "port", "time", "date", "path", "dir", "log", "verbose", "debug"),
    *("ckpt", "checkpoint", "save", "output", "name", "version", "url", "epochs", "max_steps", "max_update", "nodes"),
    *("num_steps", "iters", "patience", "file", "load", "user", "project", "wandb", "world_size", "gpu", "eval"),
    *("start", "init_from", "iteration", "consumed", "skipped", "so_far"),
)
_MOST = 4096
_DEPTH = 6
Settings = dict[str, str | int | float | bool | None]


def settings_in(content: Mapping[Any, Any]) -> Settings:
    """Return the settings of the run that saved a checkpoint, by their places.

    Those that a resumed run may change are left out.

    Args:
        content: The content of a checkpoint.

    Example:
        >>> settings_in({"hyper_parameters": {"lr": 0.1, "log_every": 5}, "epoch": 3})
        {'hyper_parameters.lr': 0.1}
    """
    found: Settings = {}
    for place in _PLACES:
        if place in content:
            for name, value in _plain(content[place], place, _DEPTH):
                found[name] = value
                if len(found) >= _MOST:
                    return found
    return found


def _plain(value: object, place: str, depth: int) -> Iterator[tuple[str, str | int | float | bool | None]]:
    if isinstance(value, StandIn) and not value and isinstance(value.state, Mapping):
        value = value.state  # of a Namespace
    if isinstance(value, (str, int, float)) or value is None:
        yield place, value
    elif depth and isinstance(value, (Mapping, list, tuple)) and len(value) <= _MOST:
        inside = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in inside:
            if isinstance(key, (str, int)) and not (isinstance(key, str) and _is_volatile(key)):
                yield from _plain(inner, f"{place}.{key}", depth - 1)


def _is_volatile(name: str) -> bool:
    return name.startswith("_") or any(word in name.lower() for word in _VOLATILE)
