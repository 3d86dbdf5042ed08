"""The peak memory of a training run with the average of each library, and without one (Linux only).

    python benchmarks/training_memory.py [--layers 8] [--out benchmarks/results/training_memory.md]

Each run is a separate process, in which freed memory is returned to the system immediately: a transformer, AdamW, a few
steps with an update each, then an evaluation with the averaged weights swapped in, and one more step.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from peers import MAKERS, OURS, PACKAGES, averages_of
from process_memory import alone, peak_bytes, settled_bytes
from results_io import RESULTS, measured, paragraph, progress, provenance, table, write
from torch import nn
from update_time import PAIRS

WIDTH, VOCABULARY, STEPS = 512, 16_384, 4
NONE = "no average"


def train(name: str, pair: str, layers: int) -> tuple[int, bool]:
    """Train with this average; return the bytes of the model, and whether the library supports the case."""
    torch.manual_seed(0)
    dtype, average_dtype = PAIRS[pair]
    layer = nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), encoder, nn.Linear(WIDTH, VOCABULARY)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(VOCABULARY, (2, 32))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()

    found = averages_of(model, average_dtype, [name] if name != NONE else [])
    for _ in range(STEPS):
        step()
        for average in found.values():
            average.update()
    for average in found.values():
        if average.lend and average.give_back:
            average.lend()
            with torch.no_grad():
                model(tokens)
            average.give_back()
    step()
    return sum(p.nbytes for p in model.parameters()), name == NONE or bool(found)


def memory(name: str, pair: str, layers: int) -> dict[str, int]:
    """Return the peak memory of a training run, above that of the process before it made the model."""
    before, found = settled_bytes(), list[tuple[int, bool]]()
    peak = peak_bytes(lambda: found.append(train(name, pair, layers)))
    ((size, was_had),) = found
    return {"peak_bytes": peak - before if was_had else 0, "model_bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8, help="the number of layers (default: 8)")
    parser.add_argument("--out", type=Path, default=RESULTS / "training_memory.md")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "DTYPES"), help="measure only this run, in this process")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(memory(*arguments.one, arguments.layers)))
        return
    began = time.perf_counter()
    results, size = [], dict[str, int]()
    with progress() as bar:
        task = bar.add_task("runs", total=len(PAIRS) * (len(MAKERS) + 1))
        for pair in PAIRS:
            for name in (NONE, *MAKERS):
                try:
                    found = alone("--layers", str(arguments.layers), "--one", name, pair)
                    size[pair] = found["model_bytes"]
                except RuntimeError:  # some libraries do not average these dtypes
                    if name in (NONE, OURS):
                        raise
                    found = {"peak_bytes": 0}
                results.append({"dtypes": pair, "name": name} | found)
                bar.advance(task)
    peaks = {(found["dtypes"], found["name"]): found["peak_bytes"] for found in results}
    names = sorted(MAKERS, key=lambda name: (name != OURS, *(peaks[pair, name] for pair in PAIRS)))

    def cell(pair: str, name: str) -> str:
        peak, without = peaks[pair, name], peaks[pair, NONE]
        return f"{peak / 2**20:.0f} (+{(peak - without) / size[pair]:.2f})" if peak else "refuses"

    how = provenance(*PACKAGES)
    wall_s = time.perf_counter() - began
    heads = [f"{pair}, a model of {size[pair] / 2**20:.0f} MiB" for pair in PAIRS]
    lines = [
        "# The peak memory of a training run",
        "",
        *paragraph(
            "MiB above the memory of the process before it made the model and, in parentheses, the difference to a "
            f"run without an average, in units of the model's size. A transformer with AdamW, {STEPS + 1} steps of 64 "
            "tokens, an update after each but the last; libraries that swap in their average did so once for an "
            "evaluation. An average needs at least its own size: 1, or 2 for a float32 average of a bfloat16 model. "
            "A swap between dtypes keeps a backup of the model's weights; it adds to the peak only what exceeds the "
            "optimizer's temporaries, which are part of each peak and released before the swap. Averages that are "
            "separate modules are not swapped in, and were not evaluated. Allocators return free memory; otherwise "
            "peaks differ by a tenth of the model between runs. Measured on a CPU only, not on a GPU."
        ),
        "",
        *table(("", *heads), [(name, *(cell(pair, name) for pair in PAIRS)) for name in (NONE, *names)]),
        "",
        *measured(how, wall_s),
    ]
    write(arguments.out, lines, {"results": results, "how": how, "wall_s": round(wall_s, 1)})


if __name__ == "__main__":
    main()
