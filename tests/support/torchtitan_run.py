"""Trains torchtitan's debug model with an average, under torchrun: ``torchtitan_run.py FOLDER [kill-at] [--plain]``."""

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchtitan_shim  # noqa: F401  before torchtitan
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.components.validate import Validator
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from waiting import END_S

STEPS, HALF_LIFE = 8, 3


class Tokens(BaseDataLoader):
    """Random tokens that repeat a pattern, by their number: each rank has its own, and resumes where it was."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        infinite: bool = True

    def __init__(self, config: Config, *, dp_rank: int, seq_len: int, local_batch_size: int, **rest: Any) -> None:
        del rest
        self._shape, self._rank, self._at = (local_batch_size, seq_len + 1), dp_rank, 0

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            seed = torch.Generator().manual_seed(1000 * self._rank + self._at)
            tokens = torch.randint(0, 50, self._shape, generator=seed)
            tokens[:, 1::2] = (tokens[:, :-1:2] * 3 + 1) % 50
            self._at += 1
            yield {"input": tokens[:, :-1]}, tokens[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {f"at_{self._rank}": self._at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._at = state.get(f"at_{self._rank}", 0)


class Tokenizer(BaseTokenizer):
    """None: the data are tokens."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **rest: Any) -> None:
        super().__init__()

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        return []

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return ""

    def get_vocab_size(self) -> int:
        return 2048


def config_of(folder: Path, tp: int = 1) -> Any:
    config = llama3_debugmodel()
    config.loss = CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(config.model_spec))
    config.tokenizer, config.dataloader = Tokenizer.Config(), Tokens.Config()
    config.training = TrainingConfig(
        local_batch_size=2, seq_len=32, steps=STEPS, disable_cuda_graphs=True, mixed_precision_param="float32"
    )
    config.parallelism = ParallelismConfig(tensor_parallel_degree=tp, spmd_backend="partial_dtensor")
    config.checkpoint = CheckpointManager.Config(enable=True, interval=2, last_save_model_only=False, keep_latest_k=0)
    config.validator = Validator.Config(enable=True, freq=4, steps=2, dataloader=Tokens.Config(infinite=False))
    config.optimizer.implementation = "foreach"
    config.comm.init_timeout_seconds = config.comm.train_timeout_seconds = END_S  # a busy machine fails nothing
    config.debug.seed = 0
    config.dump_folder = str(folder)
    return config


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def main(folder: Path, kill_at: int, plain: bool, tp: int) -> None:
    from polyak import EMA
    from polyak.hosts.torchtitan import attach

    trainer = config_of(folder, tp).build()
    model = trainer.model_parts[0]
    ema = None if plain else attach(EMA(f"{HALF_LIFE}ba"), trainer, eval_weights="both")
    decay, reference, losses, logged = 0.5 ** (1 / HALF_LIFE), {}, [], {}
    log = trainer.metrics_processor.logger.log

    def note(metrics: dict[str, Any], step: int) -> None:
        losses.extend((step, name, value) for name, value in metrics.items() if "validation_metrics/loss" in name)
        logged.update({name: value for name, value in metrics.items() if name.startswith("ema/")})
        log(metrics, step)

    trainer.metrics_processor.logger.log = note
    step = trainer.train_step

    def train_step(iterator: Any) -> None:
        if trainer.step == kill_at:
            torch.distributed.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        step(iterator)
        for name, parameter in model.named_parameters():
            now = whole(parameter).double()
            reference[name] = now if name not in reference else decay * reference[name] + (1 - decay) * now

    trainer.train_step = train_step
    trainer.train()
    end = {"raw": {name: whole(p) for name, p in model.named_parameters()}, "losses": losses, "logged": sorted(logged)}
    if ema is not None:
        with ema.applied():
            end["average"] = {name: whole(p) for name, p in model.named_parameters()}
        end["tokens"], end["updates"] = ema.timestamp.token.value, ema.num_updates
    end["reference"] = reference
    if torch.distributed.get_rank() == 0:
        torch.save(end, folder / "end.pt")
    trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    numbers = [int(one) for one in sys.argv[2:] if one.lstrip("-").isdigit()]
    main(Path(sys.argv[1]), numbers[0] if numbers else -1, "--plain" in sys.argv, 2 if "--tp" in sys.argv else 1)
