"""The tables of ``annealing.py``."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from annealing_runs import CONSTANT, COSINE, HALF_LIVES, POLISHED, RAW, SIXTEENTH, SPANS, UNAVERAGED, half_life
from annealing_tasks import Task
from results_io import item, measured, paragraph, table
from scipy.stats import t as student

CHOSEN, ORACLE = "half-life chosen on validation", "half-life chosen on the test set (no result: a bound)"
AVERAGES = [half_life(share) for share in HALF_LIVES]
SIZES = (32, 128, None)  # validation examples of the table of rules; None for all
DRAWS = 20  # subsets of each size


@dataclass(frozen=True)
class Scores:
    """The losses of a method at a rate, by seed."""

    validation: np.ndarray
    test: np.ndarray


@dataclass
class Found:
    """The runs of a task: scores by kind, rate and seed."""

    task: Task
    runs: Mapping[tuple[str, float, int], dict[str, dict]]
    seeds: Sequence[int]

    def rates(self, kind: str) -> list[float]:
        """Return the rates at which all seeds ran."""
        rates = sorted({rate for found, rate, _ in self.runs if found == kind})
        return [rate for rate in rates if all((kind, rate, seed) in self.runs for seed in self.seeds)]

    def scores(self, kind: str, method: str, rate: float) -> Scores:
        found = [self._one(self.runs[kind, rate, seed], method) for seed in self.seeds]
        return Scores(*np.array(found).T)

    def _one(self, run: Mapping[str, dict], method: str) -> tuple[float, float]:
        if method == CHOSEN:
            method = min(AVERAGES, key=lambda name: np.mean(run[name]["validation"]))
        if method == ORACLE:
            method = min(AVERAGES, key=lambda name: run[name]["test"][0])
        return float(np.mean(run[method]["validation"])), run[method]["test"][0]

    def best_rate(self, kind: str, method: str) -> float:
        """Return the rate with the best mean validation loss."""
        method = CHOSEN if method == ORACLE else method
        return min(self.rates(kind), key=lambda rate: self.scores(kind, method, rate).validation.mean())

    def best_rates(self, kind: str) -> list[float]:
        """Return the rates at which some method is best."""
        methods = [*self.runs[kind, self.rates(kind)[0], self.seeds[0]], CHOSEN]
        return sorted({self.best_rate(kind, method) for method in methods})

    def best(self, kind: str, method: str) -> Scores:
        return self.scores(kind, method, self.best_rate(kind, method))


def methods() -> list[tuple[str, str, str]]:
    """Return the rows of a task: what they are, and the kind and the method that are scored."""
    rows = [
        ("raw weights", CONSTANT, RAW),
        ("half-life T/16", CONSTANT, SIXTEENTH),
        (CHOSEN, CONSTANT, CHOSEN),
        (ORACLE, CONSTANT, ORACLE),
        *((f"virtual cooldown, {span} %", CONSTANT, f"virtual {span} %") for span in SPANS),
        ("virtual cooldown 1 - x², 20 %", CONSTANT, "virtual 20 %, 1-square"),
        *((f"linear cooldown, {span} %", CONSTANT, f"cooldown {span} %") for span in SPANS),
        *((f"average, then polish, {span} %", CONSTANT, f"polish {span} %") for span in POLISHED),
    ]
    name = f"polish {UNAVERAGED} % of raw weights"
    rows.append((f"{name} (no averaging)", CONSTANT, name))
    rows += [("cosine", COSINE, RAW), ("cosine, half-life T/16", COSINE, SIXTEENTH)]
    return [*rows, (f"cosine, {CHOSEN}", COSINE, CHOSEN)]


def spread(values: np.ndarray, sign: str = "") -> str:
    return f"{values.mean():{sign}.4f} ± {values.std(ddof=1) if len(values) > 1 else 0:.4f}"


def by_method(found: Found) -> list[str]:
    raw = found.best(CONSTANT, RAW).test
    rows = []
    for what, kind, method in methods():
        test = found.best(kind, method).test
        rows.append([what, f"{found.best_rate(kind, method):g}", spread(test), spread(test - raw, "+")])
    return table(["", "learning rate", "test loss", "minus raw"], rows)


def by_rate(found: Found) -> list[str]:
    """Return the validation losses of the first seed, from which the rates were chosen."""
    shown = [(w, k, m) for w, k, m in methods() if m in (RAW, SIXTEENTH, "cooldown 20 %", "polish 10 %")]
    first = Found(found.task, found.runs, found.seeds[:1])
    rates = sorted({*first.rates(CONSTANT), *first.rates(COSINE)})
    rows = []
    for what, kind, method in shown:
        known = first.rates(kind)
        rows.append(
            [what, *(f"{first.scores(kind, method, r).validation[0]:.4f}" if r in known else "" for r in rates)]
        )
    return table(["validation loss of the first seed at", *(f"{rate:g}" for rate in rates)], rows)


QUESTIONS = (
    ("T/16 - raw", (CONSTANT, SIXTEENTH), (CONSTANT, RAW)),
    ("T/16 - chosen on validation", (CONSTANT, SIXTEENTH), (CONSTANT, CHOSEN)),
    *(
        (f"T/16 - linear cooldown {span} %", (CONSTANT, SIXTEENTH), (CONSTANT, f"cooldown {span} %"))
        for span in (10, 20, 40)
    ),
    ("T/16 - cosine", (CONSTANT, SIXTEENTH), (COSINE, RAW)),
    *(
        (f"virtual - linear cooldown, {span} %", (CONSTANT, f"virtual {span} %"), (CONSTANT, f"cooldown {span} %"))
        for span in SPANS
    ),
    *(
        (f"polish - linear cooldown, {span} %", (CONSTANT, f"polish {span} %"), (CONSTANT, f"cooldown {span} %"))
        for span in POLISHED
    ),
    ("polish 5 % - linear cooldown 10 %", (CONSTANT, "polish 5 %"), (CONSTANT, "cooldown 10 %")),
    ("polish 10 % - the same from raw weights", (CONSTANT, "polish 10 %"), (CONSTANT, "polish 10 % of raw weights")),
    ("polish 5 % - T/16", (CONSTANT, "polish 5 %"), (CONSTANT, SIXTEENTH)),
    ("cosine: T/16 - raw", (COSINE, SIXTEENTH), (COSINE, RAW)),
)


def questions(found: Sequence[Found]) -> list[str]:
    """Return the paired differences, each method at its own best rate."""
    rows = []
    for what, one, other in QUESTIONS:
        cells = []
        for task in found:
            difference = task.best(*one).test - task.best(*other).test
            cells.append(f"{spread(difference, '+')}, {(difference < 0).sum()}/{len(difference)}")
        rows.append([what, *cells])
    return table(["", *(task.task.name for task in found)], rows)


def beyond_noise(gains: np.ndarray) -> bool:
    """Return whether a mean gain is above 0 by its 95 % interval, which allows for the choice among all averages."""
    margin = student.ppf(1 - 0.025 / (len(AVERAGES) - 1), len(gains) - 1)
    return bool(gains.mean() > margin * gains.std(ddof=1) / len(gains) ** 0.5)


def chosen(run: Mapping[str, dict], rows: np.ndarray, *, noise: bool) -> str:
    """Return the half-life that is best on some validation examples; with ``noise`` only if that is no luck."""
    values = {name: np.array(run[name]["validation"])[rows] for name in AVERAGES}
    best = min(AVERAGES, key=lambda name: values[name].mean())
    if noise and best != SIXTEENTH:
        return best if beyond_noise(values[SIXTEENTH] - values[best]) else SIXTEENTH
    return best


def costs(run: Mapping[str, dict]) -> Iterator[tuple[str, list[float]]]:
    """Yield what each rule loses to the best half-life, in loss."""
    best = min(run[name]["test"][0] for name in AVERAGES)
    for name in ("T/64", "T/32", "T/16", "T/8", "T/4"):
        yield f"always {name}", [run[name]["test"][0] - best]
    total = len(run[RAW]["validation"])
    for size in SIZES:
        random = np.random.default_rng(0)
        draws = [random.permutation(total)[:size] for _ in range(DRAWS if size else 1)]
        for rule, noise in (("the best", False), ("recommend", True)):
            lost = [run[chosen(run, rows, noise=noise)]["test"][0] - best for rows in draws]
            yield f"{rule} on {size or 'all'} validation examples", lost


def rules(found: Sequence[Found]) -> tuple[list[list], int]:
    """Return what the rules cost over all runs at a constant rate that all seeds have, and how many these are."""
    lost: dict[str, list[tuple[float, float]]] = {}
    runs = 0
    for task in found:
        for rate in task.rates(CONSTANT):
            for seed in task.seeds:
                run, runs = task.runs[CONSTANT, rate, seed], runs + 1
                gain = run[RAW]["test"][0] - min(run[name]["test"][0] for name in AVERAGES)
                for name, found_costs in costs(run):
                    lost.setdefault(name, []).append((float(np.mean(found_costs)), float(np.mean(found_costs)) / gain))
    rows = []
    for name, values in lost.items():
        cost, share = np.array(values).T
        rows.append(
            [name, f"{cost.mean():.4f}", f"{cost.max():.4f}", f"{100 * share.mean():.1f}", f"{100 * share.max():.0f}"]
        )
    return rows, runs


def page(found: Sequence[Found], how: Mapping[str, str]) -> list[str]:
    rows, runs = rules(found)
    lines = ["# Averaging next to schedules", ""]
    for text in _ABOUT:
        lines += item(text)
    lines += ["", "## In short", "", *paragraph(_DIFFERENCES), "", *questions(found), ""]
    lines += ["## What a rule costs", "", *paragraph(_RULES.format(runs=runs, draws=DRAWS)), ""]
    heads = ["rule", "mean cost, loss", "worst", "mean, % of the gain", "worst, %"]
    lines += [*table(heads, rows), ""]
    for one in found:
        lines += [f"## {one.task.name}", "", *paragraph(f"{one.task.about}; {one.task.steps:,} steps."), ""]
        lines += [*by_method(one), "", *by_rate(one), ""]
    return [*lines, *measured(how)]


def summary(found: Found) -> dict:
    """Return the numbers of a task as JSON has them."""
    rows = [
        {
            "method": what,
            "rate": found.best_rate(kind, method),
            "validation": found.best(kind, method).validation.round(5).tolist(),
            "test": found.best(kind, method).test.round(5).tolist(),
        }
        for what, kind, method in methods()
    ]
    rates = {kind: found.rates(kind) for kind in (CONSTANT, COSINE)}
    return {
        "task": found.task.name,
        "steps": found.task.steps,
        "seeds": list(found.seeds),
        "rates": rates,
        "methods": rows,
    }


_ABOUT = (
    "All runs of a task have the same number of steps T, polishes and cooldowns included, and begin with a warm-up.",
    "Each method has its own learning rate: that with the best mean validation loss. The first seed tried all rates, "
    "the others those at which some method was best. Losses are means over seeds ± their standard deviation, on a "
    "test set that chose nothing.",
    "Cooldowns and polishes branch from the run at a constant rate, with its optimizer's state, and train on the "
    "batches that it trains on: that is what a run with such a schedule would do, step by step.",
    "Averages are exact ones over the weights after every step; half-lives are unbiased. Those from a record differ by "
    "some tenths of a percent of their distance from the last weights.",
    "A polish loads the T/16 average at 95 or 90 % of the run and trains to T, at 0.3 of the rate, falling linearly to "
    "0 (`polyak.polish`). The row without averaging does the same from the raw weights.",
)
_DIFFERENCES = (
    "Differences in test loss, paired by seed, each method at its own best rate: mean ± standard deviation, and in how "
    "many seeds the first is better. Negative: the first is better."
)
_RULES = (
    "Over all {runs} runs at a constant rate: how much worse the test loss is than that of the half-life that is best "
    "on the test set, and this in % of what averaging gains there over the raw weights. Subsets of the validation set: "
    "means over {draws} draws. `recommend` moves from T/16 only if the gain on the same examples exceeds its noise: a "
    "95 % interval that allows for the choice among all half-lives."
)
