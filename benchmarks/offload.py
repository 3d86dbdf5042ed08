"""What an average costs a training step: on the device of the model, in CPU memory, or no average.

    python benchmarks/offload.py [--steps 160] [--out benchmarks/results/offload.md]
    python benchmarks/offload.py --device cuda --layers 20 --width 2048 --batch 16 --context 1024

The second command trains 1 B parameters in bfloat16. Copies of a small transformer train in turns, a block of steps
each, so that other load on the machine affects all of them equally. The results are ratios within a round.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from results_io import RESULTS, item, measured, paragraph, progress, provenance, table, write
from torch import Tensor, nn

from polyak import EMA, Offload, attach

VOCABULARY = 4096
BLOCK = 16  # steps
PLAIN = "no average"
HALF_LIFE = "1000ba"


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, max(1, width // 64), 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
                )
                for _ in range(layers)
            )
        )
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(tokens)))


class Contender:
    """One model in training, and its average."""

    def __init__(self, name: str, ema: EMA | None, arguments: argparse.Namespace) -> None:
        self.name, self.ema = name, ema
        self.device = torch.device(arguments.device)
        self.block_s = list[float]()
        before = self.memory()
        torch.manual_seed(0)
        self.model = Transformer(arguments.width, arguments.layers).to(self.device, arguments.dtype)
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=on_gpu)
        if ema is not None:
            attach(ema, self.model, self.optimizer)
        shape = arguments.batch, arguments.context
        self.tokens = torch.randint(VOCABULARY, shape, device=self.device)
        self.train(BLOCK, timed=False)
        self.memory_mb = (self.memory() - before) / 1e6

    def memory(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def settle(self) -> None:
        """Wait for all work of this model, so that it is not counted with the next one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if self.ema is not None:
            _ = self.ema.num_quarantined

    def train(self, steps: int, tick: Callable[[int], object] = lambda _: None, *, timed: bool = True) -> None:
        self.settle()
        began = time.perf_counter()
        for _ in range(steps):
            self.optimizer.zero_grad()
            logits = self.model(self.tokens)
            nn.functional.cross_entropy(logits.flatten(0, 1), self.tokens.flatten()).backward()
            self.optimizer.step()
            tick(1)
        self.settle()
        if timed:
            self.block_s.append((time.perf_counter() - began) / steps)


def contenders(arguments: argparse.Namespace) -> list[Contender]:
    made = {
        PLAIN: None,
        "on the model's device": EMA(HALF_LIFE),
        "`Offload()`": EMA(HALF_LIFE, offload=Offload()),
    }
    if torch.device(arguments.device).type == "cuda":
        made["`Offload(overlap=True)`"] = EMA(HALF_LIFE, offload=Offload(overlap=True))
    return [Contender(name, ema, arguments) for name, ema in made.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--width", type=int, default=256, help="the width of the layers, a multiple of 64 (default: 256)"
    )
    parser.add_argument("--layers", type=int, default=4, help="the number of layers (default: 4)")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a batch (default: 8)")
    parser.add_argument("--context", type=int, default=64, help="tokens in a sequence (default: 64)")
    parser.add_argument(
        "--steps", type=int, default=160, help=f"steps of each model, at least {2 * BLOCK} (default: 160)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--out", type=Path, default=RESULTS / "offload.md")
    arguments = parser.parse_args()
    if arguments.steps < 2 * BLOCK:
        parser.error(f"--steps must be at least {2 * BLOCK} (got {arguments.steps})")
    torch.set_num_threads(arguments.threads)
    on_gpu = torch.device(arguments.device).type == "cuda"
    arguments.dtype = torch.bfloat16 if on_gpu else torch.float32
    began = time.perf_counter()
    rounds = arguments.steps // BLOCK
    found = contenders(arguments)
    with progress() as bar:
        task = bar.add_task("training", total=len(found) * rounds * BLOCK)
        for i in range(rounds):
            for j in range(len(found)):
                found[(i + j) % len(found)].train(BLOCK, lambda n: bar.advance(task, n))
    plain = found[0]
    parameters = sum(p.numel() for p in plain.model.parameters())
    results = {}
    for contender in found:
        ratios = [a / b for a, b in zip(contender.block_s, plain.block_s, strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        results[contender.name] = {
            "median_step_ms": 1000 * statistics.median(contender.block_s),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [quartiles[0], quartiles[2]],
            "ratios": ratios,
            "gpu_memory_mb": contender.memory_mb,
        }
    where = torch.cuda.get_device_name() if on_gpu else "the CPU"
    how = provenance("torch")
    if on_gpu:
        how["hardware"] += f"; {where}"
    wall_s = time.perf_counter() - began
    lines = [
        "# What an average costs a training step, on the device and in CPU memory",
        "",
        *paragraph(
            f"A transformer of {parameters:,} parameters ({arguments.layers} layers of width {arguments.width}) in "
            f"{str(arguments.dtype).removeprefix('torch.')}, a float32 average with an update after each step, AdamW,"
            f" {arguments.batch} x {arguments.context} tokens per step, on {where}. The copies train in turns, "
            f"{BLOCK} steps each, in rotating order, {rounds} rounds. The time per step is that of a block. A block "
            "ends when all its work has ended, so that one update per block does not overlap with training. The "
            "ratio is to the block without an average in the same round: median and quartiles."
        ),
        "",
        *table(
            ("average", "time per step, ms", "ratio", "quartiles", *(["held on the GPU, MB"] if on_gpu else [])),
            (
                (
                    name,
                    f"{result['median_step_ms']:.1f}",
                    "" if name == PLAIN else f"{result['ratio']:.3f}",
                    "" if name == PLAIN else " to ".join(f"{q:.3f}" for q in result["ratio_quartiles"]),
                    *([f"{result['gpu_memory_mb']:.0f}"] if on_gpu else []),
                )
                for name, result in results.items()
            ),
        ),
        "",
        *(
            []
            if on_gpu
            else item("Offloading is for GPUs, which were not measured here: run the benchmark with `--device cuda`.")
        ),
        *([] if on_gpu else [""]),
        *measured(how, wall_s),
    ]
    data = {
        "parameters": parameters,
        "device": where,
        "block": BLOCK,
        "results": results,
        "how": how,
        "wall_s": round(wall_s, 1),
    }
    write(arguments.out, lines, data)


if __name__ == "__main__":
    main()
