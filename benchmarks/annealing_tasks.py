"""The three small tasks of ``annealing.py``: text of Python's standard library, MNIST-1D, and a fine-tuning."""

import math
import pydoc_data.topics
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from pathlib import Path

import torch
from mnist1d_data import splits
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

SYMBOLS, CONTEXT, WIDTH = 128, 32, 48


@dataclass(frozen=True)
class Data:
    """Examples, one per row, that no two splits share. Training rows may overlap each other."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    name: str
    about: str
    steps: int
    rates: tuple[float, ...]
    cosine_rates: tuple[float, ...]
    warmup: int
    batch_size: int
    data: Callable[[], Data]
    network: Callable[[], nn.Module]
    optimizer: Callable[[Iterable[nn.Parameter], float], Optimizer]
    begin: Callable[[Path], Mapping[str, Tensor]] | None = None  # weights to start from, kept in a folder


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss of each example: of text, the mean over its characters."""
    logits = model(x)
    if y.ndim == 1:
        return nn.functional.cross_entropy(logits, y, reduction="none")
    return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y).mean(1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, 3, WIDTH // 3)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Predict the next character: two blocks, three heads."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks, self.norm = nn.Sequential(Block(), Block()), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, SYMBOLS, bias=False)
        for embedding in (self.tokens, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(x) + self.places.weight)))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 40)),
        *(nn.Conv1d(1, 16, 5, stride=2, padding=2), nn.GroupNorm(4, 16), nn.ReLU()),
        *(nn.Conv1d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU()),
        *(nn.Conv1d(32, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(160, 10),
    )


def _symbols(text: str) -> Tensor:
    return torch.tensor(list(text.encode("ascii", "replace"))).clamp(max=SYMBOLS - 1)


def _windows(text: Tensor, stride: int, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Return windows and their next characters; ``most`` of them, evenly spread."""
    rows = text.unfold(0, CONTEXT + 1, stride)
    if most is not None:
        rows = rows[torch.linspace(0, len(rows) - 1, most).long()]
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _text_data(pieces: Mapping[str, str], train_characters: int, stride: int) -> Data:
    """Split whole pieces by a hash of their names: 80 % to train, 7 % to validate, 13 % to test."""
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for name, text in sorted(pieces.items()):
        place = sha256(name.encode()).digest()[0] / 256
        parts["train" if place < 0.8 else "validation" if place < 0.87 else "test"].append(text)
    train, validation, test = (_symbols("\n".join(part)) for part in parts.values())
    return Data(
        _windows(train[:train_characters], stride),
        _windows(validation, CONTEXT + 1, 384),
        _windows(test, CONTEXT + 1, 768),
    )


@cache
def sources() -> Data:
    folder = Path(sysconfig.get_paths()["stdlib"])
    pieces = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py") if path.name[0] != "_"}
    return _text_data(pieces, 4_000_000, 7)


@cache
def topics() -> Data:
    return _text_data(pydoc_data.topics.topics, 150_000, 3)


@cache
def signals(train: int = 6000) -> Data:
    return Data(*((part.x, part.y) for part in splits(train, 1000, 4000, seed=7)))


def adamw(parameters: Iterable[nn.Parameter], lr: float) -> Optimizer:
    return AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)


def sgd(parameters: Iterable[nn.Parameter], lr: float) -> Optimizer:
    return SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4, foreach=True)


def pretrained(folder: Path) -> Mapping[str, Tensor]:
    """Train the transformer on sources with a cosine, or read what an earlier call trained."""
    path, steps, peak = folder / "pretrained.pt", 2000, 6e-3
    if path.exists():
        return torch.load(path, weights_only=True)
    torch.manual_seed(12345)
    model, (x, y) = Transformer(), sources().train
    optimizer = adamw(model.parameters(), peak)
    for step in range(steps):
        rate = peak * min((step + 1) / 50, (1 + math.cos(math.pi * step / steps)) / 2)
        optimizer.param_groups[0]["lr"] = rate
        rows = torch.randint(len(x), (16,))
        losses(model, x[rows], y[rows]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.state_dict(), path)
    return model.state_dict()


TASKS = {
    task.name: task
    for task in (
        Task(
            "transformer",
            "next character of the sources of Python's standard library; a transformer of 70 k parameters, AdamW",
            640,
            (1.5e-3, 3e-3, 6e-3, 1.2e-2),
            (1.5e-3, 3e-3, 6e-3, 1.2e-2),
            *(50, 16, sources, Transformer, adamw),
        ),
        Task(
            "CNN",
            "MNIST-1D, 6,000 signals; a CNN of 7 k parameters, SGD with momentum 0.9",
            1280,
            (0.01, 0.03, 0.1, 0.3),
            (0.01, 0.03, 0.1, 0.3),
            *(50, 32, signals, convolutions, sgd),
        ),
        Task(
            "fine-tuning",
            "the same transformer, pretrained on the sources with a cosine, fine-tuned on 150,000 characters of "
            "Python's help topics (prose), AdamW",
            400,
            (1e-3, 2e-3, 4e-3, 8e-3),
            (1e-3, 2e-3, 4e-3, 8e-3),
            *(20, 16, topics, Transformer, adamw, pretrained),
        ),
        Task(
            "transformer-long",
            "as the transformer, four times as long",
            2560,
            (1.5e-3, 3e-3, 6e-3),
            (3e-3, 6e-3, 1.2e-2),
            *(50, 16, sources, Transformer, adamw),
        ),
        Task(
            "CNN-long",
            "as the CNN, four times as long, with 24,000 signals",
            5120,
            (0.005, 0.01, 0.03, 0.1),
            (0.03, 0.1, 0.2),
            *(50, 32, partial(signals, 24_000), convolutions, sgd),
        ),
    )
}
