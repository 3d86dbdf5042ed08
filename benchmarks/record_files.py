"""The number of files of a record, by simulation of a run of a million steps with the writer's rule for merging.

python benchmarks/record_files.py [--steps 1000000] [--out benchmarks/results/record_files.md]
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from results_io import RESULTS, measured, paragraph, progress, provenance, table, write

from polyak.record.writer import due

PER_LEVEL = (2, 4, 8)
STRETCHES = (128, 512, 1024, 4096, 16_384, 100_000)
INTERVALS = (1, 10, 100, 1000)


def simulate(
    stretches: int, per_level: int, wanted: tuple[int, ...], tick: Callable[[int], None]
) -> dict[int, dict[str, int]]:
    """Append segments and merge them; return the numbers of files after each number of segments in ``wanted``."""
    levels: list[int] = []
    most = most_within = merges = most_merges = 0
    found: dict[int, dict[str, int]] = {}
    for appended in range(1, stretches + 1):
        levels.append(0)
        level = 0
        while (oldest := due(levels, level, per_level)) is not None:
            levels[oldest : oldest + 2] = [level + 1]
            level += 1
        merges += level
        most_merges = max(most_merges, level)
        most = max(most, len(levels))
        # Files are deleted after the new manifest, which does not name them, is in place.
        most_within = max(most_within, len(levels) + 2 * level)
        if appended in wanted:
            found[appended] = {
                "files": len(levels),
                "most_files": most,
                "most_within_append": most_within,
                "merges": merges,
                "most_merges_per_append": most_merges,
            }
        if appended % 1000 == 0:
            tick(1000)
    tick(stretches % 1000)
    return found


def count(number: int) -> str:
    return f"{number:,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1_000_000, help="the length of the run (default: 1000000)")
    parser.add_argument("--out", type=Path, default=RESULTS / "record_files.md")
    arguments = parser.parse_args()
    steps = arguments.steps
    if steps < 512:
        parser.error(f"--steps must be at least 512 (got {steps})")
    began = time.perf_counter()
    default = steps // 512
    by_interval = {interval: -(-steps // interval) for interval in (*INTERVALS, default)}
    wanted = tuple(sorted({*STRETCHES, *by_interval.values()}))
    with progress() as bar:
        found = {}
        for per_level in PER_LEVEL:
            task = bar.add_task(f"per_level {per_level}", total=wanted[-1])
            found[per_level] = simulate(wanted[-1], per_level, wanted, lambda n, task=task: bar.advance(task, n))
    lines = [
        "# The number of files of a record",
        "",
        *paragraph(
            "Simulated with `polyak.record.writer.due`, the writer's rule for merging. Each file has the size of the "
            "weights in the record's dtype."
        ),
        "",
        "## Largest number of files after any append, by the number of segments in the run",
        "",
        *table(
            ("`per_level`", *(f"T/ell = {count(number)}" for number in STRETCHES)),
            ((per_level, *(of[number]["most_files"] for number in STRETCHES)) for per_level, of in found.items()),
        ),
        "",
        f"## A run of {count(steps)} steps",
        "",
        *paragraph(
            "`left`: at the end. `most`: after any append. `within`: during an append, before merged files are deleted."
        ),
        "",
        *table(
            ("interval", "segments", *(f"`per_level` {c}: left, most, within" for c in PER_LEVEL)),
            (
                (
                    f"{count(interval)}{' (T/512)' if interval == default else ''}",
                    count(number),
                    *(
                        ", ".join(str(of[number][key]) for key in ("files", "most_files", "most_within_append"))
                        for of in found.values()
                    ),
                )
                for interval, number in by_interval.items()
            ),
        ),
        "",
        "Merges of two files, by the number of segments, and the largest number in one append:",
        "",
        *table(
            ("`per_level`", *(f"T/ell = {count(number)}" for number in STRETCHES)),
            (
                (
                    per_level,
                    *(f"{count(of[number]['merges'])}, {of[number]['most_merges_per_append']}" for number in STRETCHES),
                )
                for per_level, of in found.items()
            ),
        ),
        "",
        *measured(provenance(), time.perf_counter() - began),
    ]
    write(arguments.out, lines)


if __name__ == "__main__":
    main()
