"""What recording costs during training: the time per step without an average, with an EMA, a Recorder, and both.

    python benchmarks/recording_cost.py [--steps 320] [--out benchmarks/results/recording_cost.md]

Four copies of a small GPT train in turns, a block of steps each, so that other load on the machine affects all of them
equally. The results are ratios within a round.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from results_io import RESULTS, item, measured, paragraph, progress, provenance, table, write
from torch import Tensor, nn

from polyak import EMA, Recorder, attach
from polyak.algorithm import Algorithm
from polyak.record import Record

VOCABULARY, CONTEXT, WIDTH, LAYERS, HEADS, BATCH = 4096, 64, 256, 6, 4, 8
INTERVAL = 16
PER_LEVEL = 4
ENDING = INTERVAL // 2 - 1  # the step in each block that ends a segment
PLAIN = "neither"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.mix(self.before_attention(x)).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, dim=1)
        attended = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class GPT(nn.Module):
    """A decoder with learned positions; its head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def chain(generator: torch.Generator) -> Tensor:
    """Return a batch of token chains: mostly a fixed successor of the last token, sometimes a random one."""
    tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1), generator=generator)
    strays = torch.rand(BATCH, CONTEXT + 1, generator=generator) < 0.2
    for i in range(1, CONTEXT + 1):
        tokens[:, i] = torch.where(strays[:, i], tokens[:, i], (tokens[:, i - 1] * 3 + 1) % 64)
    return tokens


@dataclass
class Contender:
    """One model in training, with its average or recorder."""

    name: str
    algorithms: Sequence[Algorithm]
    duration: int
    block_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    loss: float = math.nan

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.data = torch.Generator().manual_seed(1)
        self.model = GPT()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4)
        self.attached = [
            attach(algorithm, self.model, self.optimizer, max_duration=f"{self.duration}ba")
            for algorithm in self.algorithms
        ]

    def step(self) -> None:
        tokens = chain(self.data)
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.loss = loss.item()

    def train(self, steps: int, tick: Callable[[int], None], *, timed: bool = True) -> None:
        began = last = time.perf_counter()
        for _ in range(steps):
            self.step()
            now = time.perf_counter()
            if timed:
                self.step_s.append(now - last)
            last = now
            tick(1)
        if timed:
            self.block_s.append((last - began) / steps)


def compete(rounds: int, folder: Path) -> tuple[list[Contender], float]:
    """Train all models in turns; return them and the seconds to end the record."""
    duration = INTERVAL * 512

    def recorder(name: str) -> Recorder:
        return Recorder(folder / name, interval=f"{INTERVAL}ba", per_level=PER_LEVEL)

    half_life = f"{duration // 64}ba"
    contenders = [
        Contender(PLAIN, [], duration),
        Contender("EMA", [EMA(half_life=half_life)], duration),
        Contender("Recorder", [recorder("alone")], duration),
        Contender("Recorder and EMA", [recorder("both"), EMA(half_life=half_life)], duration),
    ]
    with progress() as bar, ExitStack() as stack:
        total = len(contenders) * (rounds * INTERVAL + INTERVAL // 2)
        task = bar.add_task("training", total=total)
        # Half a block first: each later block then has the end of one segment in its middle, and the work that follows.
        for contender in contenders:
            contender.train(INTERVAL // 2, lambda n: bar.advance(task, n), timed=False)
        for i in range(rounds):
            for j in range(len(contenders)):
                contenders[(i + j) % len(contenders)].train(INTERVAL, lambda n: bar.advance(task, n))
        ending = time.perf_counter()
        for contender in contenders:
            for attached in contender.attached:
                stack.callback(attached.detach)
    return contenders, (time.perf_counter() - ending) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=320, help="the steps of each of the four models, at least 32 (default: 320)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--out", type=Path, default=RESULTS / "recording_cost.md")
    arguments = parser.parse_args()
    if arguments.steps < 2 * INTERVAL:
        parser.error(f"--steps must be at least {2 * INTERVAL} (got {arguments.steps})")
    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    rounds = arguments.steps // INTERVAL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contenders, ending_s = compete(rounds, folder)
        record = Record(folder / "alone")
        raw_bytes = 0 if record.raw is None else record.raw.size_bytes
        sizes = [segment.size_bytes for segment in record.segments]
    parameters = sum(p.numel() for p in contenders[0].model.parameters())
    plain = contenders[0]
    stretches = -(-(rounds * INTERVAL + INTERVAL // 2) // INTERVAL)
    written = (2 * stretches - len(sizes)) * sizes[0]  # each merge wrote one file, and left one fewer
    results = {}
    for contender in contenders:
        ratios = [a / b for a, b in zip(contender.block_s, plain.block_s, strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        results[contender.name] = {
            "median_block_ms": 1000 * statistics.median(contender.block_s),
            "ending_step_ms": 1000 * statistics.median(contender.step_s[ENDING::INTERVAL]),
            "step_after_ms": 1000 * statistics.median(contender.step_s[ENDING + 1 :: INTERVAL]),
            "other_step_ms": 1000
            * statistics.median(s for i, s in enumerate(contender.step_s) if i % INTERVAL not in (ENDING, ENDING + 1)),
            "longest_step_ms": 1000 * max(contender.step_s),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [quartiles[0], quartiles[2]],
            "ratios": ratios,
            "final_loss": contender.loss,
        }
    how = provenance("torch", "safetensors")
    wall_s = time.perf_counter() - began
    lines = [
        "# What recording costs during training",
        "",
        *paragraph(
            f"A GPT of {parameters:,} parameters ({LAYERS} layers of width {WIDTH}, head tied to the embedding), "
            f"AdamW, {BATCH} x {CONTEXT} tokens per step, float32, on the CPU. Four copies train in turns, {INTERVAL} "
            f"steps each, in rotating order, {rounds} rounds. A segment of the record has {INTERVAL} steps, T/512 of "
            f"a run of {INTERVAL * 512:,}: short, so that the cost of files is visible; longer runs have it less "
            "often in proportion. The time per step is that of a block, files included; the ratio is to the block "
            "without an average in the same round: median and quartiles. The next three columns are medians over "
            "single steps: the one that ends a segment, the one after it, and all others."
        ),
        "",
        *table(
            (
                "with",
                "time per step, ms",
                "ratio",
                "quartiles",
                "ending, ms",
                "after, ms",
                "others, ms",
                "longest step, ms",
            ),
            (
                (
                    name,
                    f"{found['median_block_ms']:.1f}",
                    "" if name == PLAIN else f"{found['ratio']:.3f}",
                    "" if name == PLAIN else " to ".join(f"{q:.3f}" for q in found["ratio_quartiles"]),
                    *(f"{found[key]:.1f}" for key in ("ending_step_ms", "step_after_ms", "other_step_ms")),
                    f"{found['longest_step_ms']:.1f}",
                )
                for name, found in results.items()
            ),
        ),
        "",
        *item(
            f"On disk after {stretches} segments: {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB, each "
            f"{sizes[0] / 1e6:.1f} MB ({sizes[0] / (4 * parameters):.3f} x the float32 weights), and the last raw "
            f"weights, {raw_bytes / 1e6:.1f} MB."
        ),
        *item(
            f"Segments written in total, merges included: {written / 1e6:.0f} MB, "
            f"{written / sizes[0] / stretches:.2f} files per segment."
        ),
        *item(f"Ending a record at the end of training: {ending_s:.2f} s."),
        *item(f"The finest half-life that this record resolves: {record.finest} steps."),
        *item(
            f"The loss after the last step is {plain.loss:.6f} in "
            + (
                "all four: averaging does not affect training."
                if len({contender.loss for contender in contenders}) == 1
                else "the first, and differs in others: "
                + ", ".join(f"{c.name} {c.loss:.6f}" for c in contenders)
                + "."
            )
        ),
        "",
        *measured(how, wall_s),
    ]
    data = {
        "parameters": parameters,
        "interval": INTERVAL,
        "per_level": PER_LEVEL,
        "results": results,
        "files": len(sizes),
        "bytes_per_segment": sizes[0],
        "bytes_on_disk": sum(sizes) + raw_bytes,
        "bytes_written": written,
        "ending_s": ending_s,
        "how": how,
        "wall_s": round(wall_s, 1),
    }
    write(arguments.out, lines, data)


if __name__ == "__main__":
    main()
