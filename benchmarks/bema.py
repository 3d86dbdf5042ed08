"""BEMA next to an EMA of a sixteenth of the run, from scratch and in fine-tuning: `python benchmarks/bema.py`.

Handwritten digits, a small network, SGD at a constant rate. Fine-tuning begins with weights trained on digits that are
turned by 90 degrees. All averages follow the same run; the mean and the standard deviation are over seeds.
"""

import argparse
import statistics
import warnings

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from polyak import BEMA, EMA, PlanWarning, attach

BATCH = 16


def data(seed: int, flipped: float, *, turned: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images and labels for training and for the test; a share of the labels for training is drawn at random."""
    images, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 8, 8) / 16
    images = (images.rot90(1, (1, 2)) if turned else images).flatten(1)
    labels, generator = torch.as_tensor(labels), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    images, labels = images[order], labels[order]
    wrong = torch.rand(1000, generator=generator) < flipped
    trained = torch.where(wrong, torch.randint(10, (1000,), generator=generator), labels[:1000])
    return images[:1000], trained, images[1000:], labels[1000:]


def train(model: nn.Module, steps: int, rate: float, parts: tuple[Tensor, ...], averages: dict[str, EMA]) -> None:
    """Train a model, followed by averages."""
    images, labels, *_ = parts
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    handles = [attach(one, model, optimizer, max_duration=steps) for one in averages.values()]
    for _ in range(steps):
        chosen = torch.randint(len(labels), (BATCH,))
        optimizer.zero_grad()
        cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    for handle in handles:
        handle.detach()


@torch.no_grad()
def measured(model: nn.Module, parts: tuple[Tensor, ...]) -> tuple[float, float]:
    """Return the loss and the percentage of errors of a model on the test digits."""
    outputs = model(parts[2])
    return float(cross_entropy(outputs, parts[3])), 100 * float((outputs.argmax(1) != parts[3]).float().mean())


def one_run(seed: int, given: argparse.Namespace, *, tuned: bool) -> dict[str, tuple[float, float]]:
    """Return the loss and the errors on the test digits by average."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    if tuned:
        train(model, 2 * given.steps, given.rate, data(seed, given.flipped, turned=True), {})
    averages = {
        "EMA, half-life T/16": EMA(half_life="auto"),
        "BEMA, bias_power 0.2 (the authors')": BEMA(),
        "BEMA, bias_power 0.4": BEMA(bias_power=0.4),
        "BEMA, bias_power None: its EMA": BEMA(bias_power=None),
    }
    parts = data(seed, given.flipped, turned=False)
    train(model, given.steps, given.rate, parts, averages)
    found = {"raw weights": measured(model, parts)}
    return found | {name: measured(one.ema_model, parts) for name, one in averages.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--flipped", type=float, default=0.3, help="share of the labels that is drawn at random")
    given = parser.parse_args()
    warnings.simplefilter("ignore", PlanWarning)
    torch.set_num_threads(1)
    print(
        f"test loss and % of errors, {given.seeds} seeds, {given.steps} steps at {given.rate:g}, "
        f"flipped {given.flipped:g}"
    )
    columns = {
        name: [one_run(seed, given, tuned=tuned) for seed in range(given.seeds)]
        for name, tuned in (("from scratch", False), ("fine-tuning", True))
    }
    print(f"{'':36}" + "".join(f"{name:>32}" for name in columns))
    for average in columns["from scratch"][0]:
        cells = list[str]()
        for runs in columns.values():
            losses, errors = zip(*(run[average] for run in runs), strict=True)
            cells += [f"{statistics.mean(one):.3f} +- {statistics.stdev(one):.3f}" for one in (losses, errors)]
        print(f"{average:36}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    main()
