"""A model whose averages other libraries save, and ``polyak convert`` of their files."""

from pathlib import Path
from typing import Any

import loops
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from polyak.cli import main


def net() -> nn.Module:
    """Return a model with BatchNorm, and two names for one tensor."""
    model = loops.noisy_perceptron()
    model.add_module("tied", nn.Linear(6, 8, bias=False))
    model.tied.weight = model[0].weight
    return model


def move(model: nn.Module, steps: int = 5) -> None:
    """Change the weights, as training does."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _ in range(steps):
            for tensor in [*model.parameters(), *model.buffers()]:
                if tensor.is_floating_point():
                    tensor.add_(torch.rand(tensor.shape, generator=generator))
                else:
                    tensor.add_(1)


def convert(file: Path, *more: str) -> dict[str, Tensor]:
    output = file.parent / "out.safetensors"
    assert main(["convert", str(file), "-o", str(output), "--force", *more]) == 0
    return load_file(output)


def assert_is(want: Any, got: dict[str, Tensor], model: nn.Module | None = None) -> None:
    assert loops.differences(dict(want), got) == []
    if model is not None:
        model.load_state_dict(got)
