"""How long one update of an average takes, next to other libraries and to the limit that memory sets.

    python benchmarks/update_time.py [--repeats 5] [--largest 300] [--out benchmarks/results/update_time.md]

All contenders of a case take turns in one run, so that everything else that the machine does affects them the same.
Libraries that are not installed are left out; see `peers.py`. 300 million in the largest tensor take some 16 GiB of
memory. `polyak, through attach` is a step of an optimizer that moves nothing, with its hooks, the clock and the update.
"""

import argparse
import ctypes
import gc
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from peers import DECAY, MAKERS, OURS, PACKAGES, QUICK, averages_of
from results_io import RESULTS, item, measured, paragraph, progress, provenance, table, write
from torch import nn

from polyak import EMA, Time, Timestamp, attach, kernels
from polyak.averaging.weights import Shadow

MOST_FOR_ALL = 150_000_000  # elements; of larger models there are averages of the quicker contenders only
BUILDS = 3
SMALL = 1_000_000  # elements; such models get more rounds, and two calls in each turn
LEAST, PATIENCE_S = 3, 1.0  # who takes twice our time, and has taken so long in so many turns, gets no more of them
OURS_TORCH, OURS_ATTACHED, LIMIT = "polyak, kernel in torch", "polyak, through attach", "the limit"
PAIRS = {
    "float32": (torch.float32, torch.float32),
    "bfloat16 model, float32 average": (torch.bfloat16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
}


def resnet50() -> list[tuple[int, ...]]:
    """Return the shapes of ResNet-50: 161 parameters, and the running means and variances."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), *[(64,)] * 4]
    before = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, before, 1, 1), *[(width,)] * 4, (width, width, 3, 3), *[(width,)] * 4]
            shapes += [(4 * width, width, 1, 1), *[(4 * width,)] * 4]
            if block == 0:
                shapes += [(4 * width, before, 1, 1), *[(4 * width,)] * 4]
            before = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2() -> list[tuple[int, ...]]:
    """Return the shapes of GPT-2 small, its head tied to the embedding."""
    block = [*[(768,)] * 2, (768, 2304), (2304,), (768, 768), (768,), *[(768,)] * 2, (768, 3072), (3072,)]
    return [(50257, 768), (1024, 768), *[*block, (3072, 768), (768,)] * 12, *[(768,)] * 2]


LIMIT_IN_C = """
struct work {float *y; const float *x; long n; float a; long shares; long next;};

static void share(void *given) {
    struct work *w = given;
    for (long i; (i = __atomic_fetch_add(&w->next, 1, __ATOMIC_SEQ_CST)) < w->shares;)
        for (long j = w->n * i / w->shares; j < w->n * (i + 1) / w->shares; j++)
            w->y[j] += w->a * (w->x[j] - w->y[j]);
}

void run(void (*parallel)(void (*)(void *), void *, unsigned, unsigned), float *y, const float *x, long n, float a,
         long shares) {
    struct work w = {y, x, n, a, shares, 0};
    parallel(share, &w, shares, 0);
}
"""


def limit(num_elements: int, folder: Path, threads: int) -> Callable[[], None]:
    """Return `y += a * (x - y)` in C over one flat pair of float32, a share of it for each of torch's threads."""
    source, library = folder / "limit.c", folder / "limit.so"
    source.write_text(LIMIT_IN_C)
    flags = ["-O3", "-march=native", "-shared", "-fPIC"]
    subprocess.run([os.environ.get("CC") or "cc", *flags, "-o", str(library), str(source)], check=True)
    call = ctypes.CDLL(str(library)).run
    call.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_long, ctypes.c_float, ctypes.c_long]
    y, x = torch.randn(num_elements), torch.randn(num_elements)
    team = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel

    def run() -> None:
        call(team, y.data_ptr(), x.data_ptr(), num_elements, 1 - DECAY, threads)

    return run


def contenders(model: nn.Module, average: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return functions that update an average of ``model``, each its own average."""
    large = sum(p.numel() for p in model.parameters()) > MOST_FOR_ALL
    names = list(QUICK if large else MAKERS)
    random.shuffle(names)
    found = {name: made.update for name, made in averages_of(model, average, names).items()}
    other = Shadow(model, dtype=average)
    with kernels.only("torch"):
        other.update_(1 - DECAY)  # a kernel is kept from the first update on
    found[OURS_TORCH] = lambda: other.update_(1 - DECAY)
    found[OURS_ATTACHED] = attached_step(model, EMA(smoothing=DECAY, dtype=average))
    return found


class Idle(torch.optim.Optimizer):
    """Moves nothing, so that its step takes as long as its hooks."""

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Do nothing."""


def attached_step(model: nn.Module, ema: EMA | None) -> Callable[[], object]:
    """Return the step of an idle optimizer, to which ``ema`` is attached if it is given."""
    parameters = list(model.parameters())
    smallest = min(parameters, key=torch.Tensor.numel)
    smallest.grad = torch.zeros_like(smallest)  # steps without gradients do not count
    optimizer = Idle(parameters, {})
    if ema is not None:
        attached = attach(ema, model, optimizer)
        optimizer.step()  # averaging begins

        def step() -> object:
            optimizer.step()
            return attached  # keeps the average up

        return step
    return optimizer.step


def shares(steps: int = 500, rounds: int = 40) -> dict[str, float]:
    """Return what `attach` adds to a step in which no update is due, and what the clock takes of it, in microseconds.

    The former is the difference between a step with an ``EMA`` that never begins and one without, of an idle optimizer.
    They take turns; each is the fastest round, by the processor time of this thread, which other processes barely
    change.
    """
    never = attached_step(nn.Linear(4, 4), EMA(smoothing=DECAY, ema_start=Time(10**12, "ba")))
    bare, now = attached_step(nn.Linear(4, 4), None), Timestamp(epoch_length=100)
    runs = {"attached": never, "bare": bare, "clock": partial(now.to_next_batch, 8, 64)}
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.thread_time()
            for _ in range(steps):
                run()
            best[name] = min(best[name], (time.thread_time() - began) / steps * 1e6)
    return {"attach_us": best["attached"] - best["bare"], "clock_us": best["clock"]}


def race(
    model: nn.Module, average: torch.dtype, make_limit: Callable[[], Callable[[], None]], repeats: int
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Return the seconds of each contender, and of the limit, round by round, in each of which all take turns.

    The first list is of the first call of a turn, when caches hold the data of others; the second of a second call
    right after it, which only small models get. All are made several times, in an order that changes: memory is not
    equally fast everywhere.
    """
    rounds: list[dict[str, float]] = []
    again: list[dict[str, float]] = []
    twice = sum(p.numel() for p in model.parameters()) < SMALL
    took: dict[str, list[float]] = {OURS: []}
    for _ in range(BUILDS):
        runs = {LIMIT: make_limit()}
        for name, run in contenders(model, average).items():
            try:
                run()
            except (RuntimeError, TypeError) as error:
                print(f"{name} refuses: {str(error).splitlines()[0]}")
            else:
                runs[name] = run
        for _ in range(repeats):
            rounds.append({})
            again.append({})
            for name in random.sample(list(runs), len(runs)):
                found = took.setdefault(name, [])
                is_slow = found and min(found) > 2 * min(took[OURS], default=1e9)
                if is_slow and len(found) >= LEAST and sum(found) > PATIENCE_S:
                    continue
                for turns in (rounds, again) if twice else (rounds,):
                    began = time.perf_counter()
                    runs[name]()
                    turns[-1][name] = time.perf_counter() - began
                found.append(rounds[-1][name])
        del runs
        gc.collect()
    return rounds, again


def ratio(rounds: Sequence[Mapping[str, float]], above: str, below: str) -> float:
    """Return the median over all rounds of how much longer one took than the other in the same round.

    Everything else that the machine does changes from second to second, and so affects both.
    """
    return statistics.median(found[above] / found[below] for found in rounds if above in found and below in found)


def figures(rounds: Sequence[Mapping[str, float]], size: int) -> dict[str, object]:
    """Return the figures of a case: medians, and ratios.

    Args:
        rounds: The seconds of all, round by round; the limit's are for 12 bytes an element.
        size: Bytes that an update reads and writes an element.
    """
    names = {name for found in rounds for name in found}
    medians = {name: statistics.median(found[name] for found in rounds if name in found) for name in names}
    medians[LIMIT] *= size / 12
    peers = {name: ratio(rounds, name, OURS) for name in names if name != LIMIT and not name.startswith(OURS)}
    best = min(peers, key=peers.__getitem__)
    return {
        "median_ms": {name: 1000 * s for name, s in medians.items()},
        "over_limit": ratio(rounds, OURS, LIMIT) * 12 / size,
        "best_peer": best,
        "best_peer_over_ours": peers[best],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="of each, in each of three places (default: 5)")
    parser.add_argument("--largest", type=int, default=300, help="millions in the largest tensor (default: 300)")
    parser.add_argument("--out", type=Path, default=RESULTS / "update_time.md")
    parser.add_argument("--limit-s", type=float, default=1e9, help="begin no further case after so many seconds")
    arguments = parser.parse_args()
    began = time.perf_counter()
    cases = {
        "4,000 of 64": [(64,)] * 4000,
        "GPT-2": gpt2(),
        "ResNet-50": resnet50(),
        f"one of {arguments.largest} M": [(arguments.largest * 1_000_000,)],
    }
    threads, results, missing = torch.get_num_threads(), [], list[str]()
    with progress() as bar, tempfile.TemporaryDirectory() as folder:
        task = bar.add_task("cases", total=len(cases) * len(PAIRS))
        for case, shapes in cases.items():
            count = sum(torch.Size(shape).numel() for shape in shapes)
            make_limit = partial(limit, count, Path(folder), threads)
            for pair, (dtype, average) in PAIRS.items():
                if time.perf_counter() - began > arguments.limit_s:
                    missing.append(f"{case}, {pair}")
                    continue
                model = nn.ParameterList(nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes)
                size = dtype.itemsize + 2 * average.itemsize
                measured_in = race(model, average, make_limit, arguments.repeats * (3 if count < SMALL else 1))
                of_case = {"tensors": len(shapes), "elements": count, "pair": pair, "bytes_per_element": size}
                for name, rounds in zip((case, f"{case}, second call"), measured_in, strict=True):
                    if any(rounds):
                        results.append({"case": name, **of_case, **figures(rounds, size)})
                bar.advance(task)
    lines = [
        "# How long one update takes",
        "",
        *paragraph(
            f"Milliseconds, medians of {BUILDS * arguments.repeats} or more (of {LEAST} or more for what takes "
            f"long); all contenders of a column took turns in one run, in changing order, each made {BUILDS} "
            "times, since memory is not equally fast everywhere. A ratio is the median of those within each round "
            "of turns. Of the small tensors there is also the second of two calls in a turn, when caches hold its own "
            "data and not those of the others. *Through attach* is the step of an optimizer that moves nothing, with "
            "its hooks, the clock and the update. The "
            "limit is `y += a * (x - y)` in C over one flat float32 pair of as many elements, on "
            "torch's threads, times the bytes that an update of these dtypes reads and writes, over 12. Ours is "
            "below it where that loop leaves speed unused, since it asks for memory ahead. A 16-bit average is "
            "rounded stochastically by polyak and timm; the others round to nearest, which is quicker and stalls "
            "at long half-lives. *Formula of*: the lines of a library that is not installed. No GPU: nothing of "
            "this was measured on one."
        ),
        "",
    ]
    for pair in PAIRS:
        of = [found for found in results if found["pair"] == pair]
        if not of:
            continue
        names = list(dict.fromkeys(name for found in of for name in found["median_ms"]))
        names.sort(key=lambda name: of[0]["median_ms"].get(name, 1e9))
        titles = [f"{found['case']} ({found['tensors']:,} tensors, {found['elements'] / 1e6:.1f} M)" for found in of]
        rows = [(name, *(f"{found['median_ms'].get(name, float('nan')):.2f}" for found in of)) for name in names]
        rows.append(("polyak over the limit", *(f"{found['over_limit']:.2f}" for found in of)))
        rows.append(("the best peer over polyak", *(f"{found['best_peer_over_ours']:.2f}" for found in of)))
        lines += [f"## {pair.capitalize()}", "", *table(("", *titles), rows), ""]
    per_step = shares()
    how = provenance(*PACKAGES)
    wall_s = time.perf_counter() - began
    kernel = kernels.serving_cpu()[0]
    lines += [
        *item(f"polyak's kernel: {kernel}. Load of the machine at the end: {os.getloadavg()[0]:.1f} processes."),
        *item(
            f"A step in which no update is due takes {per_step['attach_us']:.1f} µs longer with `attach`, of which the "
            f"clock takes {per_step['clock_us']:.1f} µs (processor time; the quickest of 40 rounds of 500)."
        ),
    ]
    if missing:
        lines += item(f"Not measured in this run, which was cut short: {'; '.join(missing)}.")
    lines += ["", *measured(how, wall_s)]
    write(
        arguments.out,
        lines,
        {"results": results, **per_step, "kernel": kernel, "how": how, "wall_s": round(wall_s, 1)},
    )


if __name__ == "__main__":
    main()
