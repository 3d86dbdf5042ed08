"""The peak of memory of a training run with each library's average, and with none (Linux only).

    python benchmarks/training_memory.py [--layers 8] [--out benchmarks/results/training_memory.md]

Each run is a process of its own, in which what is freed goes back at once: a transformer, AdamW, a few steps each with
an update, then an evaluation with the averaged weights where these are lent, and one more step.
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
    """Train with this average, and return the bytes of the model, and whether the average could be had."""
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
    """Return the peak of memory of a training run, over what the process had before it made the model."""
    before, found = settled_bytes(), list[tuple[int, bool]]()
    peak = peak_bytes(lambda: found.append(train(name, pair, layers)))
    ((size, was_had),) = found
    return {"peak_bytes": peak - before if was_had else 0, "model_bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8, help="of the transformer (default: 8)")
    parser.add_argument("--out", type=Path, default=RESULTS / "training_memory.md")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "DTYPES"), help="only this run, in this process")
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
                except RuntimeError:  # some do not average these dtypes
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
        "# The peak of memory of a training run",
        "",
        *paragraph(
            f"MiB above what the process had before it made the model and, in parentheses, what is more than without "
            f"an average, in units of the model's size. A transformer with AdamW, {STEPS + 1} steps of 64 tokens, an "
            "update after each of the first; libraries that lend their average have done so once for an evaluation. "
            "The least that an average can take is its own size: 1, or 2 for a float32 average of a bfloat16 model. "
            "A loan between dtypes keeps the model's own weights aside, and counts by what these take more than the "
            "optimizer's temporaries, which are part of each peak and gone when it begins. Averages that are modules "
            "of their own are not lent, and were not evaluated. Allocators were told to give back what is free: else "
            "peaks differ by a tenth of the model from run to run. CPU only: nothing of this was measured on a GPU."
        ),
        "",
        *table(("", *heads), [(name, *(cell(pair, name) for pair in PAIRS)) for name in (NONE, *names)]),
        "",
        *measured(how, wall_s),
    ]
    write(arguments.out, lines, {"results": results, "how": how, "wall_s": round(wall_s, 1)})


if __name__ == "__main__":
    main()
