"""The cost of an average relative to a training step, for a small ResNet and a small transformer.

    python benchmarks/step_share.py [--rounds 40] [--out benchmarks/results/step_share.md]

In each round the model takes a step, then each library, in changing order, updates its average.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peers import MAKERS, OURS, PACKAGES, averages_of
from recording_cost import GPT, chain
from results_io import RESULTS, measured, paragraph, progress, provenance, table, write
from torch import Tensor, nn

WIDTHS = (32, 64, 128, 256)
IMAGES = 16


class Residual(nn.Module):
    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        stride = 1 if before == width else 2
        self.convolutions = nn.Sequential(
            nn.Conv2d(before, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut = nn.Conv2d(before, width, 1, stride) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.convolutions(x) + self.shortcut(x)).relu()


def resnet() -> nn.Module:
    """Return an 18-layer ResNet for images of 32 by 32."""
    before, blocks = WIDTHS[0], []
    for width in WIDTHS:
        blocks += [Residual(before, width), Residual(width, width)]
        before = width
    stem = nn.Sequential(nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU())
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def image_step(model: nn.Module) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.randn(IMAGES, 3, 32, 32), torch.randint(10, (IMAGES,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def token_step(model: nn.Module) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    tokens = chain(torch.Generator().manual_seed(0))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()

    return step


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40, help="the steps of each model (default: 40)")
    parser.add_argument("--out", type=Path, default=RESULTS / "step_share.md")
    arguments = parser.parse_args()
    began = time.perf_counter()
    torch.manual_seed(0)
    results, columns = [], {}
    with progress() as bar:
        task = bar.add_task("rounds", total=2 * arguments.rounds)
        for title, model, make_step in (("ResNet", resnet(), image_step), ("transformer", GPT(), token_step)):
            step = make_step(model)
            averages = averages_of(model, torch.float32)
            step()
            for average in averages.values():
                average.update()
            steps, updates = [], {name: [] for name in averages}
            for _ in range(arguments.rounds):
                steps.append(timed(step))
                for name in random.sample(list(averages), len(averages)):
                    updates[name].append(timed(averages[name].update))
                bar.advance(task)
            step_ms, count = statistics.median(steps), sum(p.numel() for p in model.parameters())
            shares = {name: statistics.median(found) / step_ms for name, found in updates.items()}
            columns[f"{title} ({count / 1e6:.1f} M, a step of {step_ms:.0f} ms)"] = shares
            results.append({"model": title, "parameters": count, "step_ms": step_ms, "share": shares})
    names = [name for name in MAKERS if all(name in shares for shares in columns.values())]
    names.sort(key=lambda name: (name != OURS, *(shares[name] for shares in columns.values())))
    how = provenance(*PACKAGES)
    wall_s = time.perf_counter() - began
    lines = [
        "# The cost of an average relative to a training step",
        "",
        *paragraph(
            f"The median of {arguments.rounds} updates over the median of the steps between them, float32. The ResNet "
            f"has 18 layers and takes {IMAGES} images of 32 by 32 per step with SGD, the transformer 512 tokens "
            "with AdamW. Each update begins with the caches as the step and the other updates left them. polyak also "
            "averages the statistics of BatchNorm; most others do not. Measured on a CPU only, not on a GPU."
        ),
        "",
        *table(("", *columns), [(name, *(f"{shares[name]:.2%}" for shares in columns.values())) for name in names]),
        "",
        *measured(how, wall_s),
    ]
    write(arguments.out, lines, {"results": results, "how": how, "wall_s": round(wall_s, 1)})


if __name__ == "__main__":
    main()
