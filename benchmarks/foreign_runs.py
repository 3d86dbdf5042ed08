"""Averages from what other libraries store: their errors, and the memory that they take.

    python benchmarks/foreign_runs.py [--steps 4096] [--memory] [--out benchmarks/results/foreign_runs.md]

A small network is trained by Adam at a constant rate, and the weights of every step are kept as the truth. Snapshots of
EDM2 of sigma_rel 0.05 and 0.10 are written as EDM2 writes them and read by ``Record.from_checkpoints``; the published
coefficients are computed again from the paper (Karras et al., 2024, equation 151). Raw checkpoints of the same run are
read too. Errors are in % of |last weights - average|.

With ``--memory``, 16 checkpoints of 64 MiB are averaged in a process of their own.
"""

import argparse
import math
import pickle
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from polyak import HalfLife, PowerFunction, Record, Window
from polyak.errors import ProfileError
from polyak.profiles import Profile

SIGMAS = (0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.15, 0.20, 0.25)
STORED = (0.10, 0.05)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))


def trajectory(steps: int) -> Tensor:
    """Return the weights after each step, a row for each."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    inputs = torch.randn(2000, 20)
    targets = (inputs[:, :5] * inputs[:, 5:10] + 0.5 * torch.randn(2000, 5)).argmax(1)
    rows: list[Tensor] = []
    for _ in range(steps):
        batch = torch.randint(0, 2000, (32,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()
        optimizer.step()
        rows.append(nn.utils.parameters_to_vector(model.parameters()).detach().double())
    return torch.stack(rows)


def average(weights: Tensor, profile: Profile, step: int) -> Tensor:
    shares = torch.tensor([profile.decay(float(t), float(step)) for t in range(step + 1)], dtype=torch.float64)
    return ((shares - shares[0]) / (1 - shares[0])).diff() @ weights[:step]


def write_snapshots(folder: Path, weights: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Write snapshots as EDM2 does; return what is in them, a row for each."""
    rows: list[Tensor] = []
    steps = len(weights)
    for end in range(steps // count, steps + 1, steps // count):
        for sigma in STORED:
            model = network()
            nn.utils.vector_to_parameters(average(weights, PowerFunction(sigma), end).float(), model.parameters())
            model.to(dtype)
            rows.append(nn.utils.parameters_to_vector(model.parameters()).detach().double())
            with (folder / f"network-snapshot-{end * 1024 // 1000:07d}-{sigma:.3f}.pkl").open("wb") as file:
                pickle.dump({"ema": model}, file)
    return torch.stack(rows)


def published(steps: int, count: int, sigma: float) -> Tensor:
    """Return the coefficients of the paper: least squares of densities, whose inner products are integrals."""
    t = torch.arange(steps // count, steps + 1, steps // count, dtype=torch.float64).repeat_interleave(len(STORED))
    g = torch.tensor([PowerFunction(one).exponent for one in STORED], dtype=torch.float64).repeat(count)

    def product(t1: Tensor, g1: Tensor, t2: Tensor, g2: Tensor) -> Tensor:
        least = torch.minimum(t1, t2)
        size = (g1 + 1) * (g2 + 1) / (g1 + g2 + 1)
        return size * (least / t1) ** (g1 + 1) * (least / t2) ** (g2 + 1) / least

    asked = torch.tensor(PowerFunction(sigma).exponent, dtype=torch.float64)
    found = torch.linalg.solve(product(t[:, None], g[:, None], t[None], g[None]), product(t, g, t[-1], asked))
    return found / found.sum()


def of_record(record: Record, weights: Tensor, profile: Profile) -> tuple[float, float]:
    """Return the error of an average of a record, and what the record says of it; NaN if it is refused."""
    try:
        found = record.average(profile)
    except ProfileError:
        return float("nan"), float("nan")
    names = [name for name, _ in network().named_parameters()]
    flat = torch.cat([found[name].double().flatten() for name in names])
    return error(flat, weights, profile), record.error(profile)


def error(found: Tensor, weights: Tensor, profile: Profile) -> float:
    true = average(weights, profile, len(weights))
    return float((found - true).norm() / (weights[-1] - true).norm())


def row(name: str, values: Sequence[float]) -> str:
    return f"| {name} | " + " | ".join("refused" if math.isnan(v) else f"{100 * v:.2g}" for v in values) + " |"


def snapshots(weights: Tensor) -> list[str]:
    lines = [f"| sigma_rel | {' | '.join(map(str, SIGMAS))} |", f"|{' --- |' * (len(SIGMAS) + 1)}"]
    for count, dtype in ((16, torch.float16), (32, torch.float16), (32, torch.float32)):
        with tempfile.TemporaryDirectory() as folder:
            stored = write_snapshots(Path(folder), weights, count, dtype)
            record = Record.from_checkpoints(folder, batch_size=1024)
            theirs, ours, stated = list[float](), list[float](), list[float]()
            for sigma in SIGMAS:
                profile = PowerFunction(sigma)
                theirs.append(error(published(len(weights), count, sigma) @ stored, weights, profile))
                actual, said = of_record(record, weights, profile)
                ours.append(actual)
                stated.append(said)
        kind = f"2 x {count}, {str(dtype).removeprefix('torch.')}"
        lines += [row(f"{kind}, published", theirs), row(f"{kind}, polyak", ours), row("as stated", stated)]
    return lines


def raw(weights: Tensor) -> list[str]:
    steps = len(weights)
    shares = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
    lines = ["| half-life, of the run | 1/32 | 1/16 | 1/8 | 1/4 | 1/2 | window 1/4 |", f"|{' --- |' * 7}"]
    for count in (16, 32, 64):
        with tempfile.TemporaryDirectory() as folder:
            for end in range(steps // count, steps + 1, steps // count):
                model = network()
                nn.utils.vector_to_parameters(weights[end - 1].float(), model.parameters())
                torch.save(model.state_dict(), Path(folder) / f"step-{end}.pt")
            record = Record.from_checkpoints(folder)
            profiles = [HalfLife(f"{share * steps}ba", unbiased=True) for share in shares]
            found = [of_record(record, weights, one) for one in (*profiles, Window(f"{steps // 4}ba"))]
        lines += [row(f"{count} checkpoints", [a for a, _ in found]), row("as stated", [s for _, s in found])]
    return lines


def memory() -> str:
    """Return the peak memory of an average of large checkpoints, and how much more it is than for small ones."""
    found: list[int] = []
    for size in (1 << 10, 1 << 22):
        with tempfile.TemporaryDirectory() as folder:
            for step in range(1, 17):
                torch.save({str(i): torch.randn(4, size // 4) for i in range(4)}, Path(folder) / f"step-{step}.pt")
            command = [sys.executable, __file__, "--average", folder]
            found.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return (
        f"16 checkpoints of 64 MiB, tensors of 16 MiB: {(found[1] - found[0]) / 1024:.0f} MiB more than for tiny ones, "
        f"{found[1] / 1024:.0f} MiB in all"
    )


def exported(folder: Path) -> None:
    Record.from_checkpoints(folder).export(Window("8ba"), folder / "out.safetensors")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4096)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--average", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.average:
        exported(arguments.average)
        return
    weights = trajectory(arguments.steps)
    title = [
        f"`python benchmarks/foreign_runs.py --steps {arguments.steps}{' --memory' if arguments.memory else ''}`",
        "",
    ]
    text = "\n".join(
        [*title, *snapshots(weights), "", *raw(weights), *(["", memory()] if arguments.memory else []), ""]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
