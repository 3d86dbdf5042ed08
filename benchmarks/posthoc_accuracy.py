"""How close a post-hoc average comes to the true average, for our record and for what other libraries keep.

    python benchmarks/posthoc_accuracy.py [--steps 16384] [--out benchmarks/results/posthoc_accuracy.md]

A small network trains on MNIST-1D, and its weights after every step are kept: the truth. Then each store receives the
same weights, step by step, and gives averages under profiles that it did not know in advance.
"""

import argparse
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from ema_pytorch import PostHocEMA
from mnist1d_data import Split, splits
from results_io import RESULTS, item, measured, paragraph, progress, provenance, table, write
from scipy.optimize import minimize_scalar
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from polyak.errors import PlanWarning, ProfileError
from polyak.profiles import HalfLife, PowerFunction, Profile, Window
from polyak.record import Edge, Record, Writer, shares
from polyak.storage.safetensors import TensorInfo
from polyak.time import Time, Timestamp, TimeUnit

# The required limits in %, for our record at T/ell = 512 and a constant learning rate.
TARGETS = {"T/512": 3.5, "T/256": 1.2, "T/128": 0.6} | dict.fromkeys(("T/64", "T/32", "T/16", "T/8", "T/4", "T/2"), 0.4)
MOST_FILES = 33
FACTOR = 3.0
CHUNK = 512
BATCH_SIZE = 64
OURS = "**polyak, solve**"


@dataclass(frozen=True)
class Run:
    name: str
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    cosine: bool = False


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=3e-3)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


RUNS = {
    "adam": Run("Adam, constant learning rate", adam),
    "sgd": Run("SGD with momentum, constant learning rate", sgd),
    "adam_cosine": Run("Adam, cosine decay of the learning rate", adam, cosine=True),
}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(40, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def train(run: Run, data: Split, steps: int, path: Path, tick: Callable[[int], None]) -> np.ndarray:
    """Train; return the weights after every step as a memory-mapped array of shape (steps, parameters)."""
    torch.manual_seed(0)
    model = network()
    optimizer = run.optimizer(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if run.cosine else None
    weights = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.float32, shape=(steps, sum(p.numel() for p in model.parameters()))
    )
    for step in range(steps):
        batch = torch.randint(len(data.y), (BATCH_SIZE,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.x[batch]), data.y[batch]).backward()
        optimizer.step()
        if schedule:
            schedule.step()
        weights[step] = parameters_to_vector(model.parameters()).detach().numpy()
        tick(1)
    return weights


def profiles(steps: int) -> dict[str, Profile]:
    half_lives = {f"T/{k}": HalfLife(f"{steps / k}ba", unbiased=True) for k in (512, 256, 128, 64, 32, 16, 8, 4, 2)}
    powers = {f"pow {sigma:.2f}": PowerFunction(sigma_rel=sigma) for sigma in (0.02, 0.10, 0.25)}
    return half_lives | powers | {"last 10 %": Window(f"{steps // 10}ba")}


def curve(profile: Profile, now: int, steps: int) -> np.ndarray:
    """Return the cumulative profile of the average at ``now``, at each of the steps 0, 1, ... ``steps``."""
    values = np.ones(steps + 1)
    if profile.recursive:  # each decay spans a single step
        for before in range(now - 1, -1, -1):
            values[before] = values[before + 1] * profile.decay(before, before + 1)
    else:
        values[: now + 1] = [profile.decay(before, now) for before in range(now + 1)]
    assert abs(values[0]) < 1e-6, f"{profile} must have no share of the weights before the first step"
    return values


def each_step(profile: Profile, now: int, steps: int) -> np.ndarray:
    """Return the share of the weights after each step in the average at ``now``."""
    return np.diff(curve(profile, now, steps))


def chunks(weights: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    for start in range(0, len(weights), CHUNK):
        part = slice(start, start + CHUNK)
        yield part, weights[part].astype(np.float64)


def combine(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Multiply (wanted, steps) by (steps, parameters) in float64."""
    total = np.zeros((len(counts), weights.shape[1]))
    for part, chunk in chunks(weights):
        total += counts[:, part] @ chunk
    return total


# A store returns its average for each profile, or None if it cannot give one.
Averages = dict[str, np.ndarray | None]


@dataclass
class Stored:
    files: int
    most_files: int
    averages: Averages
    estimates: dict[str, float | None] | None = None


def polyak_record(
    folder: Path, weights: np.ndarray, wanted: Mapping[str, Profile], interval: int, per_level: int | None
) -> tuple[Stored, Stored]:
    """Record; return the averages of the solve and those of the plain shares."""
    names = {name: p.shape for name, p in network().named_parameters()}
    tensors = {name: TensorInfo(torch.float32, tuple(shape), averaged=True) for name, shape in names.items()}
    steps, most = len(weights), 0
    duration = Time(steps, TimeUnit.BATCH)
    with Writer(folder, tensors, per_level=per_level, max_duration=duration) as writer:
        edges = [*range(0, steps, interval), steps]
        moments = [Edge(edge, Timestamp().to_next_batch(steps=edge)) for edge in edges]
        for start, end in pairwise(moments):
            mean = torch.from_numpy(weights[start.updates : end.updates].mean(axis=0, dtype=np.float64)).float()
            parts = mean.split([math.prod(shape) for shape in names.values()])
            writer.append({n: p.view(names[n]) for n, p in zip(names, parts, strict=True)}, start, end)
            most = max(most, len(list(folder.glob("*.safetensors"))))
    record = Record(folder)
    means = np.zeros((len(record.stretches), weights.shape[1]))
    for i, stretch in enumerate(record.stretches):
        with record.open(stretch) as file:
            means[i] = np.concatenate([file.read(name).double().numpy().ravel() for name in names])
    solved, plain, estimates = {}, {}, {}
    for label, profile in wanted.items():
        plain[label] = np.asarray(shares(profile, record.stretches)) @ means
        try:
            average = record.average(profile, dtype=torch.float64)
            solved[label] = np.concatenate([average[name].numpy().ravel() for name in names])
            estimates[label] = record.error(profile)
        except ProfileError:  # the record does not resolve it
            solved[label] = estimates[label] = None
    files = len(record.stretches)
    return Stored(files, most, solved, estimates=estimates), Stored(files, most, plain)


def power_averages(
    weights: np.ndarray, wanted: Mapping[str, Profile], snapshots: int, sigmas: Sequence[float] = (0.05, 0.10)
) -> tuple[Stored, Stored]:
    """Keep snapshots of two power-function averages; return the averages of the published solve and of ours.

    The published solve fits the profile; ours fits the cumulative profile, with a sum of 1.
    """
    steps = len(weights)
    moments = [steps * (i + 1) // snapshots for i in range(snapshots)]
    basis = np.stack(
        [each_step(PowerFunction(sigma_rel=sigma), moment, steps) for moment in moments for sigma in sigmas]
    )
    kept = combine(basis, weights).astype(np.float32).astype(np.float64)
    cumulative = basis.cumsum(axis=1)
    published, summed = {}, {}
    for label, profile in wanted.items():
        target = each_step(profile, steps, steps)
        published[label] = np.linalg.lstsq(basis.T, target, rcond=None)[0] @ kept
        # A sum of 1: the last coefficient is 1 minus the sum of the others.
        free = cumulative[:-1] - cumulative[-1]
        found = np.linalg.lstsq(free.T, target.cumsum() - cumulative[-1], rcond=None)[0]
        summed[label] = np.append(found, 1 - found.sum()) @ kept
    return Stored(len(kept), len(kept), published), Stored(len(kept), len(kept), summed)


def checkpoints(weights: np.ndarray, wanted: Mapping[str, Profile], files: int) -> tuple[Stored, Stored]:
    """Keep the weights of some steps; use each for the steps nearest to it, or interpolate linearly."""
    steps = len(weights)
    moments = np.array([steps * (i + 1) // files for i in range(files)]) - 1
    kept = weights[moments].astype(np.float64)
    every = np.arange(steps)
    nearest = np.eye(files)[np.abs(every[:, None] - moments).argmin(axis=1)]
    lines = np.stack([np.interp(every, moments, one) for one in np.eye(files)], axis=1)
    targets = {label: each_step(profile, steps, steps) for label, profile in wanted.items()}
    return (
        Stored(files, files, {label: target @ nearest @ kept for label, target in targets.items()}),
        Stored(files, files, {label: target @ lines @ kept for label, target in targets.items()}),
    )


def nearest_gamma(profile: Profile, steps: int) -> float:
    """Return the exponent of the power function with the nearest cumulative profile."""
    if isinstance(profile, PowerFunction):
        return profile.exponent
    target = curve(profile, steps, steps)
    moments = np.arange(steps + 1) / steps

    def distance(log_exponent: float) -> float:
        return float(((moments ** math.exp(log_exponent) - target) ** 2).sum())

    return math.exp(minimize_scalar(distance, bounds=(0, math.log(2 * steps)), method="bounded").x) - 1


def nearest_power_functions(weights: np.ndarray, wanted: Mapping[str, Profile]) -> Stored:
    """Return the true averages under the power functions that ema-pytorch gives."""
    steps = len(weights)
    counts = [each_step(PowerFunction(gamma=nearest_gamma(p, steps)), steps, steps) for p in wanted.values()]
    return Stored(0, 0, dict(zip(wanted, combine(np.stack(counts), weights), strict=True)))


def ema_pytorch(
    folder: Path,
    weights: np.ndarray,
    wanted: Mapping[str, Profile],
    files: int,
    tick: Callable[[int], None],
    **options: object,
) -> Stored:
    """Use ema-pytorch's classes to keep snapshots, and its function to compute averages."""
    steps = len(weights)
    model = network()
    sigmas = options.pop("sigma_rels", (0.05, 0.28))  # from its README: there is no default
    kept = PostHocEMA(
        model,
        sigma_rels=sigmas,
        checkpoint_every_num_steps=steps * len(sigmas) // files,
        checkpoint_folder=str(folder),
        **options,
    )
    with torch.no_grad():
        for step in range(steps):
            vector_to_parameters(torch.from_numpy(weights[step]), model.parameters())
            kept.update()
            tick(1)
    averages: Averages = {}
    for label, profile in wanted.items():
        made = kept.synthesize_ema_model(gamma=nearest_gamma(profile, steps), step=steps).ema_model
        averages[label] = parameters_to_vector(made.parameters()).detach().double().numpy()
    found = len(list(folder.glob("*.pt")))
    return Stored(found, found, averages)


def evaluate(vector: np.ndarray, data: Split) -> tuple[float, float]:
    """Return cross-entropy and accuracy in %."""
    model = network()
    with torch.no_grad():
        vector_to_parameters(torch.from_numpy(vector).float(), model.parameters())
        logits = model(data.x)
        loss = nn.functional.cross_entropy(logits, data.y).item()
    return loss, 100 * (logits.argmax(1) == data.y).float().mean().item()


def measure(run: Run, sets: Sequence[Split], steps: int, folder: Path) -> dict:
    """Train once; compare all stores on that run."""
    training, validation, test = sets
    wanted = profiles(steps)
    interval = max(1, steps // 512)
    folder.mkdir()
    with progress() as bar:
        task = bar.add_task(f"{run.name}: training", total=steps)
        weights = train(run, training, steps, folder / "weights.npy", lambda n: bar.advance(task, n))
        task = bar.add_task(f"{run.name}: the stores", total=10 + 3 * steps)

        def tick(n: int) -> None:
            bar.advance(task, n)

        truth_counts = np.stack([each_step(profile, steps, steps) for profile in wanted.values()])
        truth = dict(zip(wanted, combine(truth_counts, weights), strict=True))
        tick(1)
        stores: dict[str, Stored] = {}
        ours = polyak_record(folder / "c4", weights, wanted, interval, 4)
        stores[f"{OURS}, per_level 4"], stores["polyak, plain shares, per_level 4"] = ours
        tick(3)
        stores["polyak, solve, per_level 8"], _ = polyak_record(folder / "c8", weights, wanted, interval, 8)
        tick(3)
        stores["uniform segment means, our solve"], _ = polyak_record(
            folder / "uniform", weights, wanted, max(1, steps // 32), None
        )
        tick(1)
        edm2 = power_averages(weights, wanted, 16)
        stores["EDM2: power EMAs .05 and .10, as published"], stores["the same files, a solve like ours"] = edm2
        tick(1)
        raw = checkpoints(weights, wanted, 32)
        stores["raw checkpoints, shares"], stores["raw checkpoints, lines between them"] = raw
        tick(1)
        theirs = {
            "ema-pytorch, defaults (update_every 100)": {},
            "ema-pytorch, update_every 1": {"update_every": 1},
            "ema-pytorch, update_every 1, .05 and .10, float32 files": {
                "update_every": 1,
                "sigma_rels": (0.05, 0.10),
                "checkpoint_dtype": torch.float32,
            },
        }
        for i, (name, options) in enumerate(theirs.items()):
            stores[name] = ema_pytorch(folder / f"theirs{i}", weights, wanted, 32, tick, **options)
        stores["(the nearest power function itself)"] = nearest_power_functions(weights, wanted)
    last = weights[-1].astype(np.float64)
    return {
        "run": run.name,
        "interval": interval,
        "stores": {
            name: {
                "files": store.files,
                "most_files": store.most_files,
                "error_percent": {
                    label: None if average is None else 100 * distance(average, truth[label], last)
                    for label, average in store.averages.items()
                },
                "estimate_percent": store.estimates
                and {label: None if found is None else 100 * found for label, found in store.estimates.items()},
            }
            for name, store in stores.items()
        },
        "distance": {label: float(np.linalg.norm(last - true)) for label, true in truth.items()},
        "evaluated": {
            "last weights": scores(last, last, validation, test),
            **{
                label: scores(truth[label], ours[0].averages[label], validation, test)
                for label in wanted
                if ours[0].averages[label] is not None
            },
        },
    }


def distance(average: np.ndarray, true: np.ndarray, last: np.ndarray) -> float:
    return float(np.linalg.norm(average - true) / np.linalg.norm(last - true))


def scores(true: np.ndarray, reconstructed: np.ndarray, validation: Split, test: Split) -> dict[str, float]:
    found = {}
    for name, vector in (("true", true), ("reconstructed", reconstructed)):
        found[f"{name}_validation_loss"], found[f"{name}_validation_accuracy"] = evaluate(vector, validation)
        found[f"{name}_test_loss"], found[f"{name}_test_accuracy"] = evaluate(vector, test)
    return found


def number(value: float | None) -> str:
    """Return a percentage in two significant digits."""
    if value is None:
        return "refused"
    if value >= 10_000:
        return "> 10,000"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 2 else f"{value:.2f}"


def verdicts(found: dict) -> list[tuple[object, ...]]:
    """Compare our row with the required limits; those on errors are for a constant learning rate."""
    store = found["stores"][f"{OURS}, per_level 4"]
    errors, estimates = store["error_percent"], store["estimate_percent"]
    most = store["most_files"]
    rows = [("files, at most", MOST_FILES, most, most <= MOST_FILES)]
    if "cosine" not in found["run"]:
        rows += [(f"error at {at}, %", most, number(errors[at]), errors[at] <= most) for at, most in TARGETS.items()]
    ratios = [estimates[at] / errors[at] for at in errors]
    within = all(1 / FACTOR <= ratio <= FACTOR for ratio in ratios)
    found_range = f"{min(ratios):.2f} to {max(ratios):.2f}"
    rows.append(("estimate / error", f"{1 / FACTOR:.2f} to {FACTOR:g}", found_range, within))
    return [(*cells, "met" if met else "**missed**") for *cells, met in rows]


def section(found: dict) -> list[str]:
    labels = list(found["distance"])
    ours = found["stores"][f"{OURS}, per_level 4"]
    evaluated = {label: of for label, of in found["evaluated"].items() if label.startswith(("last w", "T/"))}
    best = min(evaluated, key=lambda label: evaluated[label]["reconstructed_validation_loss"])
    differences = [of for label, of in found["evaluated"].items() if label != "last weights"]
    worst_loss = max(abs(of["reconstructed_test_loss"] - of["true_test_loss"]) for of in differences)
    worst_accuracy = max(abs(of["reconstructed_test_accuracy"] - of["true_test_accuracy"]) for of in differences)
    return [
        f"## {found['run']}",
        "",
        "Error in % of |last weights - true average|. `T/k` is the half-life, `pow` the sigma_rel of a power function.",
        "",
        *table(
            ("store", "files", "at most", *labels),
            (
                (
                    name,
                    s["files"] or "",
                    s["most_files"] or "",
                    *(number(s["error_percent"][label]) for label in labels),
                )
                for name, s in found["stores"].items()
            ),
        ),
        "",
        "Our estimate of the error, computed without the truth (`per_level` 4):",
        "",
        *table(
            ("", *labels),
            (
                ("estimate, %", *(number(ours["estimate_percent"][label]) for label in labels)),
                ("error, %", *(number(ours["error_percent"][label]) for label in labels)),
                (
                    "ratio",
                    *(f"{ours['estimate_percent'][label] / ours['error_percent'][label]:.2f}" for label in labels),
                ),
            ),
        ),
        "",
        "The required limits:",
        "",
        *table(("", "asked", "found", ""), verdicts(found)),
        "",
        f"The half-life chosen afterwards, on the validation set: {best}.",
        "",
        *table(
            ("half-life", "validation loss", "test loss", "test accuracy, %", "the true average's loss", "accuracy, %"),
            (
                (
                    f"**{label}**" if label == best else label,
                    f"{of['reconstructed_validation_loss']:.4f}",
                    f"{of['reconstructed_test_loss']:.4f}",
                    f"{of['reconstructed_test_accuracy']:.2f}",
                    f"{of['true_test_loss']:.4f}",
                    f"{of['true_test_accuracy']:.2f}",
                )
                for label, of in evaluated.items()
            ),
        ),
        "",
        *paragraph(
            "Over all profiles, the test loss of a post-hoc average differs from that of the true average by at most "
            f"{worst_loss:.5f}, the accuracy by at most {worst_accuracy:.2f} points."
        ),
        "",
    ]


def page(results: Sequence[dict], sizes: Sequence[int], steps: int, how: Mapping[str, str], wall_s: float) -> list[str]:
    parameters = sum(p.numel() for p in network().parameters())
    return [
        "# Post-hoc averages compared with the truth",
        "",
        *paragraph(
            f"A network of 40-128-64-10 ({parameters:,} parameters) on MNIST-1D (generated with seed 42: {sizes[0]:,} "
            f"samples to train, {sizes[1]:,} to validate, {sizes[2]:,} to test), {steps:,} steps with batches of "
            f"{BATCH_SIZE}. The truth is the sum of the weights after every step, in float64."
        ),
        "",
        *item(
            f"polyak records means over {results[0]['interval']} steps (T/512), in float32 files. `at most` counts the "
            "files after each append."
        ),
        *item("Half-lives are unbiased: the weights before the first step have no share."),
        *item(
            "EDM2: two power-function EMAs, 16 snapshots each, float32, coefficients by least squares on the profile "
            "as published. `a solve like ours` fits the cumulative profile instead, with coefficients that sum to 1."
        ),
        *item(
            "ema-pytorch: `PostHocEMA`, sigma_rel .05 and .28 as in its README, a checkpoint every T/16 steps "
            "(instead of every 1000, to have the same number of files and one at the end), float16 files, its "
            "default. It can express power functions only: for other profiles it gave the power function with the "
            "nearest cumulative profile. The distance of that function from the profile, without any error of a "
            "store, is the last "
            "row."
        ),
        *item(
            "Raw checkpoints every T/32 steps: each has the share of the steps nearest to it, or linear interpolation "
            "is used between them."
        ),
        *item("`refused`: the record does not resolve the profile, and polyak raises an error."),
        "",
        *(line for found in results for line in section(found)),
        *measured(how, wall_s),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=16_384, help="the steps of each run, a multiple of 512 (default: 16384)"
    )
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="the runs (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS / "posthoc_accuracy.md")
    arguments = parser.parse_args()
    if arguments.steps < 512 or arguments.steps % 512:
        parser.error(f"--steps must be a multiple of 512 (got {arguments.steps})")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", PlanWarning)  # large errors are what is measured
    began = time.perf_counter()
    sizes = (40_000, 4_000, 4_000)
    sets = splits(*sizes)
    results = []
    for name in arguments.runs:
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(RUNS[name], sets, arguments.steps, Path(folder) / "run"))
    how = provenance("torch", "numpy", "scipy", "ema-pytorch")
    wall_s = time.perf_counter() - began
    data = {"steps": arguments.steps, "runs": results, "how": how, "wall_s": round(wall_s, 1)}
    write(arguments.out, page(results, sizes, arguments.steps, how, wall_s), data)


if __name__ == "__main__":
    main()
