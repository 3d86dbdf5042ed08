"""Trains torchtitan's debug model with an average, under torchrun: ``torchtitan_run.py FOLDER [kill-at]``.

``--layout`` says how the model is distributed. ``trains`` is for tests: several runs, one after the other, such as
``[{"name": "whole"}, {"name": "resumed", "load": "whole", "load_step": 4}]``.
"""

import argparse
import hashlib
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchtitan_configs
import torchtitan_shim  # noqa: F401  before torchtitan
from torchtitan.config import ConfigManager
from torchtitan.tools.logging import init_logger
from torchtitan_configs import HALF_LIFE

from polyak import EMA
from polyak.errors import PlanWarning
from polyak.hosts.torchtitan import attach

LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "tp": {"tensor_parallel_degree": 2},
    "fsdp and tp": {"tensor_parallel_degree": 2},  # on 4 ranks
    "pp": {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "1F1B"},
    "pp, several parts": {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "Interleaved1F1B"},
    "pp and fsdp": {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "1F1B"},  # on 4 ranks
    "float8": {},
}


def config_of(folder: Path, layout: str, run: dict[str, Any]) -> Any:
    if "args" in run:
        return ConfigManager().parse_args([*run["args"], f"--dump_folder={folder / run['name']}"])
    config = torchtitan_configs.tiny_float8() if layout == "float8" else torchtitan_configs.tiny()
    for name, value in LAYOUTS[layout].items():
        setattr(config.parallelism, name, value)
    if layout != "fsdp":
        del config.model_spec.model.layers[4:]
    config.checkpoint.enable = run.get("average", True)
    config.checkpoint.interval = run.get("interval", 2)
    config.dump_folder = str(folder / run.get("load", run["name"]))
    config.checkpoint.load_step = run.get("load_step", -1)
    config.checkpoint.load_only = "load" in run
    return config


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    named = (one for part in trainer.model_parts for one in part.named_parameters())
    return {name.replace("_checkpoint_wrapped_module.", ""): full(parameter) for name, parameter in named}


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


class Observer:
    """Notes what is logged, and averages in float64."""

    def __init__(self, trainer: Any, kill_at: int) -> None:
        self.losses, self.logged = list[tuple[int, str, float]](), set[str]()
        self.reference = dict[str, torch.Tensor]()
        self._trainer, self._kill_at = trainer, kill_at
        self._log, self._step = trainer.metrics_processor.logger.log, trainer.train_step
        trainer.metrics_processor.logger.log, trainer.train_step = self.log, self.train_step

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.losses += [(step, name, value) for name, value in metrics.items() if "validation_metrics/loss" in name]
        self.logged |= {name for name in metrics if name.startswith("ema/")}
        self._log(metrics, step)

    def train_step(self, iterator: Any) -> None:
        if self._trainer.step == self._kill_at:
            torch.distributed.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        self._step(iterator)
        decay = 0.5 ** (1 / HALF_LIFE)
        for name, now in weights(self._trainer).items():
            before = self.reference.get(name)
            self.reference[name] = now.double() if before is None else decay * before + (1 - decay) * now.double()

    def error(self, averaged: dict[str, torch.Tensor]) -> float:
        """Return how far an average is from that in float64, relative to it: the largest of all tensors."""
        assert averaged.keys() == self.reference.keys()
        off = (
            (averaged[name].double() - one).norm() / one.norm().clamp(min=1e-9) for name, one in self.reference.items()
        )
        return float(max(off))


def error_of(act: Callable[[], object]) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def train(folder: Path, layout: str, run: dict[str, Any]) -> dict[str, Any]:
    trainer = config_of(folder, layout, run).build()
    if run.get("average", True) and "args" not in run:
        attach(EMA(f"{HALF_LIFE}ba"), trainer, eval_weights="both")
    observer = Observer(trainer, run.get("kill_at", -1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PlanWarning)
        trainer.train()
    uncounted = [str(one.message) for one in caught if "steps must be counted" in str(one.message)]
    assert not uncounted, uncounted
    end: dict[str, Any] = {"losses": observer.losses, "logged": sorted(observer.logged)}
    end["raw"] = bits(weights(trainer))
    if (ema := getattr(trainer, "averaging", None)) is not None:
        with ema.applied():
            found = weights(trainer)
        end |= {"average": bits(found), "tokens": ema.timestamp.token.value, "updates": ema.num_updates}
        if "load" not in run:
            end["error"] = observer.error(found)
        if run.get("publish"):
            published = dict[str, torch.Tensor]()
            ema.publish(lambda name, tensor: published.update({name: tensor.clone()}), every_rank=True)
            end["published"] = bits(published)
            ema.save(folder / "published.safetensors")
        if run.get("export"):
            ema.save(folder / "titan.safetensors")
            ema.save(folder / "hf", hf=True)
            torch.save(found, folder / f"averaged-{torch.distributed.get_rank()}.pt")
            with ema.applied():
                end["refused"] = error_of(lambda: trainer.validator.validate(trainer.model_parts, trainer.step))
            ema.detach()
            assert "validate" not in vars(trainer.validator)
        assert bits(weights(trainer)) == end["raw"]  # restored
    trainer.close()
    return end


def trains(folder: str, layout: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Do the same in a process of ``ranks.Ranks``; return what the runs gave on this rank."""
    rank, size = (str(number) for number in (torch.distributed.get_rank(), torch.distributed.get_world_size()))
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, WANDB_MODE="disabled")
    torch.autograd.set_multithreading_enabled(False)  # as torchtitan does where it makes the group itself
    return {run["name"]: train(Path(folder), layout, run) for run in runs}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("kill_at", type=int, nargs="?", default=-1)
    parser.add_argument("--layout", choices=LAYOUTS, default="fsdp")
    given = parser.parse_args()
    init_logger()
    train(given.folder, given.layout, {"name": "run", "kill_at": given.kill_at})
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
