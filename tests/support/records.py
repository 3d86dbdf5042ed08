"""Small records of real runs, for tests of code that reads records."""

from pathlib import Path

import torch
from torch import Tensor, nn

from polyak.record import Edge, Writer
from polyak.storage.safetensors import TensorInfo
from polyak.time import Time, Timestamp, TimeUnit

EPOCH = 50  # batches
SAMPLES = 8


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def data(seed: int = 0, batches: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(batches, SAMPLES, 3, generator=generator)
    noise = torch.randn(batches, SAMPLES, 1, generator=generator)
    return [(x, x.sum(1, keepdim=True) + y) for x, y in zip(inputs, noise, strict=True)]


def validate(state: dict[str, Tensor]) -> dict[str, Tensor | float]:
    """Return metrics, as an evaluation of the user does."""
    model = build().eval()
    model.load_state_dict(state)
    with torch.no_grad():
        losses = [nn.functional.mse_loss(model(x), y) for x, y in data(seed=1, batches=8)]
    loss = torch.stack(losses).mean()
    return {"loss": loss, "accuracy": 1 / (1 + float(loss))}


def record(folder: Path, updates: int = 256, interval: int = 2, per_level: int | None = 4) -> nn.Module:
    """Train, write the record into ``folder``, and return the model at the end."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averaged = {name: value.is_floating_point() for name, value in model.state_dict().items()}
    infos = {name: TensorInfo.of(value, averaged=averaged[name]) for name, value in model.state_dict().items()}
    batches, now = data(), Timestamp(epoch_length=EPOCH)
    with Writer(folder, infos, per_level=per_level, max_duration=Time(updates, TimeUnit.BATCH)) as writer:
        start, sums = Edge(0, now), dict[str, Tensor]()
        for update in range(1, updates + 1):
            inputs, targets = batches[update % len(batches)]
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
            now = now.to_next_batch(samples=SAMPLES, seconds=0.01)
            if update % EPOCH == 0:
                now = now.to_next_epoch()
            for name, value in model.state_dict().items():
                sums[name] = sums.get(name, 0) + value.clone() if averaged[name] else value.clone()
            if update % interval == 0:
                end = Edge(update, now)
                means = {name: value / interval if averaged[name] else value for name, value in sums.items()}
                writer.append(means, start, end)
                start, sums = end, {}
        writer.pin("ep2", folder.parent / "ep2.pt")
    return model
