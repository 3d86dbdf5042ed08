"""Configurations of torchtitan's debug model, for ``--module torchtitan_configs --config ...``."""

from collections.abc import Iterator
from dataclasses import dataclass
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
from torchtitan.models.llama3.config_registry import llama3_debugmodel, model_registry
from waiting import END_S

from polyak.hosts.torchtitan.config import averaged

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


def tiny() -> Any:
    """Return a run of eight steps, with validation, that saves a checkpoint every second step."""
    config = llama3_debugmodel()
    config.loss = CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(config.model_spec))
    config.tokenizer, config.dataloader = Tokenizer.Config(), Tokens.Config()
    config.training = TrainingConfig(
        local_batch_size=2, seq_len=32, steps=STEPS, disable_cuda_graphs=True, mixed_precision_param="float32"
    )
    config.parallelism = ParallelismConfig(spmd_backend="partial_dtensor")
    config.checkpoint = CheckpointManager.Config(enable=True, interval=2, last_save_model_only=False, keep_latest_k=0)
    config.validator = Validator.Config(enable=True, freq=4, steps=2, dataloader=Tokens.Config(infinite=False))
    config.optimizer.implementation = "foreach"
    config.comm.init_timeout_seconds = config.comm.train_timeout_seconds = END_S  # a busy machine fails nothing
    config.debug.seed = 0
    return config


def tiny_averaged() -> Any:
    """Return the same run with a section ``polyak``."""
    return averaged(tiny(), half_life="100ba", eval_weights="both", save="averaged")


def tiny_float8() -> Any:
    """Return the same run with float8 layers, which torchao emulates."""
    from torchtitan.components.quantization import Float8LinearConverter

    config = tiny()
    config.model_spec = model_registry("debugmodel", converters=[Float8LinearConverter.Config(emulate=True)])
    return config
