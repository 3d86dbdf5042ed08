"""Raw against averaged weights in the scripts of docs/scripts, over seeds.

    python benchmarks/scripts_seeds.py [--seeds 5] [--out benchmarks/results/scripts_seeds.md]

Each script runs in a Python of its own and in an empty folder, with its line `SEED = 0` changed.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from results_io import RESULTS, measured, paragraph, provenance, table, write

PAGES = sorted(Path(__file__).parents[1].glob("docs/scripts/*.md"))
FIGURE = re.compile(r"^(.+): raw ([\d.]+), averaged ([\d.]+)$", re.MULTILINE)


def script(page: Path, seed: int) -> str:
    """Return the code blocks of a page, one after another."""
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return "\n\n".join(blocks).replace("\nSEED = 0\n", f"\nSEED = {seed}\n")


def run(page: Path, seed: int) -> dict[str, tuple[float, float]]:
    """Return raw and averaged figures by what they are of."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "script.py")
        file.write_text(script(page, seed), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-W", "error", file.name], cwd=folder, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{page.name} must run with seed {seed} (it exited with {done.returncode}):\n{done.stderr}")
    return {what: (float(raw), float(averaged)) for what, raw, averaged in FIGURE.findall(done.stdout)}


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3g} ± {statistics.stdev(values):.1g}"


def rows(page: Path, runs: list[dict[str, tuple[float, float]]]) -> Iterator[tuple[str, ...]]:
    for what in runs[0]:
        raw, averaged = zip(*(found[what] for found in runs), strict=True)
        ratios = [b / a for a, b in zip(raw, averaged, strict=True)]
        better = sum(ratio < 1 for ratio in ratios)
        shares = (f"{statistics.median(ratios):.2f}", f"{max(ratios):.2f}", f"{better} of {len(ratios)}")
        yield f"{page.stem}: {what}", spread(raw), spread(averaged), *shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many, at least 2 (default: 5)")
    parser.add_argument("--out", type=Path, default=RESULTS / "scripts_seeds.md")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error(f"--seeds must be at least 2 for a spread (got {arguments.seeds})")
    torch.set_num_threads(1)  # as the scripts do
    began = time.perf_counter()
    found = {page: [run(page, seed) for seed in range(arguments.seeds)] for page in PAGES if script(page, 0)}
    head = ("script: figure, less is better", "raw", "averaged", "averaged / raw, median", "largest", "better in")
    text = (
        f"Mean ± standard deviation over seeds 0 to {arguments.seeds - 1}, and the ratio within each run. "
        "The half-lives are those of the pages, fixed beforehand. Data, weights and the order of the batches "
        "follow from the seed."
    )
    lines = [
        "# The scripts of docs/scripts over seeds",
        "",
        *paragraph(text),
        "",
        *table(head, (cells for page, runs in found.items() for cells in rows(page, runs))),
        "",
        *measured(provenance("torch", "torchmetrics"), time.perf_counter() - began),
    ]
    write(arguments.out, lines)


if __name__ == "__main__":
    main()
