"""What averaging, virtual cooldowns and a polish are worth next to real schedules, each at its own best rate.

    python benchmarks/annealing.py [--task CNN] [--seeds 5] [--out benchmarks/results/annealing.md]

Three tasks, all runs of a task with the same number of steps. A first seed tries all learning rates, and the others
those at which some method had its best validation loss. Then each method is scored at the rate with the best mean
validation loss over all seeds, on the test set. Runs are kept in ``--cache``: a benchmark that stops resumes there.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from annealing_runs import CONSTANT, COSINE, Cache
from annealing_tables import Found, page, summary
from annealing_tasks import TASKS, Task
from results_io import RESULTS, provenance, write


def train(task: Task, seeds: int, folder: Path) -> Found:
    cache = Cache(folder, task)
    for kind, rates in ((CONSTANT, task.rates), (COSINE, task.cosine_rates)):
        for rate in rates:
            cache.get(kind, rate, 0)
        for rate in Found(task, cache.found, (0,)).best_rates(kind):
            for seed in range(1, seeds):
                cache.get(kind, rate, seed)
    return Found(task, cache.found, tuple(range(seeds)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=TASKS, help="one of the tasks; repeat it for more")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "polyak-annealing")
    parser.add_argument("--train-only", action="store_true", help="fill the cache, and write no results")
    parser.add_argument("--out", type=Path, default=RESULTS / "annealing.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = [train(TASKS[name], arguments.seeds, arguments.cache) for name in arguments.task or TASKS]
    if not arguments.train_only:
        how = provenance("torch", "numpy", "scipy")
        data = {"tasks": [summary(one) for one in found], "how": how}
        write(arguments.out, page(found, how), data)


if __name__ == "__main__":
    main()
