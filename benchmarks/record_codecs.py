"""Bytes against error: what a record would take on disk in other encodings than those that polyak writes.

    python benchmarks/record_codecs.py [--steps 4096] [--out benchmarks/results/record_codecs.md]

The encodings are simulated in memory, with the record's own merges and coefficients; every merged mean is encoded
again, as on disk. Sizes are in models of float32, at their peak, scales included; errors in % of
|last weights - true average|, the worst over half-lives from T/256 to T/2. It needs the package zstandard.
"""

import argparse
import json
import math
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
import zstandard
from matplotlib.figure import Figure
from mnist1d_data import splits
from posthoc_accuracy import Run, adam, combine, each_step, network, sgd, train
from results_io import RESULTS, measured, paragraph, provenance, table, write

from polyak.profiles import HalfLife
from polyak.record import Edge, coefficients
from polyak.record.manifest import Segment
from polyak.record.precision import MOST_OF_DISTANCE, MOST_OF_NORM
from polyak.record.writer import due
from polyak.report.figures import STYLE, render
from polyak.time import Timestamp

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "record_codecs.png"
RUNS = (Run("Adam", adam), Run("SGD", sgd), Run("Adam, cosine decay", adam, cosine=True))
PANELS = {"constant rate: Adam and SGD": ("Adam", "SGD"), "cosine: Adam": ("Adam, cosine decay",)}
SHARES = (256, 128, 64, 32, 16, 8, 4, 2)
SHAPES = [tuple(p.shape) for p in network().parameters()]


def tensors(vector: np.ndarray) -> list[np.ndarray]:
    """Return the tensors of a model, as matrices of their rows."""
    parts = np.split(vector, np.cumsum([math.prod(shape) for shape in SHAPES])[:-1])
    return [part.reshape(shape[0] if len(shape) > 1 else 1, -1) for part, shape in zip(parts, SHAPES, strict=True)]


@dataclass
class Encoded:
    """What a reader decodes, and what it takes on disk; where it is a difference, and which one."""

    vector: np.ndarray
    size_bytes: float
    differs: np.ndarray | None = None
    difference: np.ndarray | None = None


# Encodes a mean, given what a reader decodes of the segment before, or None, and whether that is on the same level.
Codec = Callable[[np.ndarray, np.ndarray | None, bool], Encoded]
Packed = Callable[..., int]


def zlib_size(*arrays: np.ndarray) -> int:
    """Return what zlib makes of the bytes, those of equal significance together."""
    return sum(len(zlib.compress(plane, 6)) for plane in planes(*arrays))


def zstd_size(*arrays: np.ndarray) -> int:
    """Return what zstandard makes of the bytes, those of equal significance together."""
    return sum(len(zstandard.compress(plane, 9)) for plane in planes(*arrays))


def planes(*arrays: np.ndarray) -> list[bytes]:
    return [array.view(np.uint8).reshape(-1, array.itemsize).T.tobytes() for array in arrays]


def float32(mean: np.ndarray, _: np.ndarray | None, __: bool) -> Encoded:
    return Encoded(mean.astype(np.float32), 4 * mean.size)


def float16(mean: np.ndarray, _: np.ndarray | None, __: bool) -> Encoded:
    return Encoded(mean.astype(np.float16).astype(np.float32), 2 * mean.size)


def bfloat16(mean: np.ndarray, _: np.ndarray | None, __: bool) -> Encoded:
    bits = mean.astype(np.float32).view(np.uint32)
    return Encoded(((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32), 2 * mean.size)


def float16_or_32(mean: np.ndarray, before: np.ndarray | None, _: bool) -> Encoded:
    """Choose by tensor, by the record's rule."""
    found, size = [], 0
    for part, other in zip(tensors(mean), tensors(mean if before is None else before), strict=True):
        half = part.astype(np.float16).astype(np.float32)
        moved = np.linalg.norm(part - other) if before is not None else math.inf
        most = min(MOST_OF_NORM * np.linalg.norm(part), MOST_OF_DISTANCE * moved)
        wide = np.linalg.norm(half - part) > most
        found.append((part.astype(np.float32) if wide else half).ravel())
        size += (4 if wide else 2) * part.size
    return Encoded(np.concatenate(found), size)


def float16_packed(packed: Packed) -> Codec:
    def encode(mean: np.ndarray, before: np.ndarray | None, same: bool) -> Encoded:
        return replace(float16(mean, before, same), size_bytes=packed(mean.astype(np.float16)))

    return encode


def rounded(vector: np.ndarray, by_row: bool, bits: int = 8) -> tuple[list[np.ndarray], np.ndarray, int]:
    """Round with a scale by tensor or row; return the levels, the numbers, and the bytes of the scales."""
    levels, found, scales, most = [], [], 0, 2 ** (bits - 1) - 1
    for part in tensors(vector):
        scale = np.abs(part).max(axis=1 if by_row else None, keepdims=True) / most
        level = np.round(part / np.where(scale > 0, scale, 1)).astype(np.int8)
        levels.append(level)
        found.append((level * scale).astype(np.float32).ravel())
        scales += 4 * scale.size
    return levels, np.concatenate(found), scales


def int8(by_row: bool) -> Codec:
    def encode(mean: np.ndarray, _: np.ndarray | None, __: bool) -> Encoded:
        _, found, scales = rounded(mean, by_row)
        return Encoded(found, mean.size + scales)

    return encode


def difference(by_row: bool = True, bits: int = 8, packed: Packed | None = None, base: Codec = float32) -> Codec:
    """Encode the difference to what is decoded before it, so that no error adds up; the first of a level by itself."""

    def encode(mean: np.ndarray, before: np.ndarray | None, same: bool) -> Encoded:
        if before is None or not same:
            return base(mean, before, same)
        levels, found, scales = rounded(mean - before, by_row, bits)
        size = packed(*(level.ravel() for level in levels)) if packed else mean.size * bits / 8
        return Encoded(before + found, size + scales, np.ones(mean.size, bool), found)

    return encode


def int8_or_wider(mean: np.ndarray, before: np.ndarray | None, same: bool) -> Encoded:
    """Choose by tensor, by the rule of a record in int8: a difference or float32."""
    if before is None or not same:
        return float32(mean, before, same)
    vectors, differs, differences, size = [], [], [], 0
    _, steps, _ = rounded(mean - before, by_row=True)
    for part, other, step in zip(*map(tensors, (mean, before, steps)), strict=True):
        half_a_step = np.abs(part - other).max(axis=1) / 254
        lost = np.linalg.norm(half_a_step) * math.sqrt(part.shape[1])
        fits = lost <= MOST_OF_DISTANCE * np.linalg.norm(part - other)
        size += part.size + 4 * len(part) if fits else 4 * part.size
        vectors.append((other + step if fits else part.astype(np.float32)).ravel())
        differs.append(np.full(part.size, fits))
        differences.append(step.ravel())
    return Encoded(np.concatenate(vectors), size, np.concatenate(differs), np.concatenate(differences))


# The families of the figure and the table: name, codec, and (segments in the run, per_level).
USUAL = ((512, 2), (512, 4), (1024, 2), (1024, 4), (1024, 8))
ONCE = ((1024, 4),)
DEFAULT = "float16, or float32 by tensor (polyak)"
IN_INT8 = "differences in 8 bits, or float32 by tensor (polyak, int8)"
Family = tuple[str, Codec, Sequence[tuple[int, int]]]
FAMILIES: tuple[Family, ...] = (
    ("float32", float32, USUAL),
    (DEFAULT, float16_or_32, USUAL),
    ("float16 always", float16, USUAL),
    ("bfloat16", bfloat16, ONCE),
    ("float16 always, zlib", float16_packed(zlib_size), ONCE),
    ("float16 always, zstandard", float16_packed(zstd_size), ONCE),
    ("8 bits, scale by tensor", int8(False), ONCE),
    ("8 bits, scale by row", int8(True), ONCE),
    (IN_INT8, int8_or_wider, USUAL),
    ("differences in 8 bits, base in float16 or 32", difference(base=float16_or_32), ONCE),
    ("differences in 8 bits, scale by tensor", difference(by_row=False), ONCE),
    ("differences in 8 bits, scale by row, zlib", difference(packed=zlib_size), ONCE),
    ("differences in 8 bits, scale by row, zstandard", difference(packed=zstd_size), ONCE),
    ("differences in 6 bits, scale by row", difference(bits=6), ONCE),
    ("differences in 4 bits, scale by row", difference(bits=4), USUAL),
)


def follow(encoded: list[Encoded], at: int) -> None:
    """Decode what differs from a segment that was written again, rounded."""
    while at < len(encoded) and (differs := encoded[at].differs) is not None:
        moved = encoded[at - 1].vector + encoded[at].difference
        encoded[at].vector = np.where(differs, moved, encoded[at].vector)
        at += 1


def record(weights: np.ndarray, number: int, per_level: int, codec: Codec) -> tuple[list[Segment], list, float, float]:
    """Return the segments of a record, what a reader decodes, the bytes at the peak, and how often it encoded."""
    steps, segments, encoded, peak, count = len(weights), list[Segment](), list[Encoded](), 0.0, 0

    def put(at: int, mean: np.ndarray, merged: np.ndarray | None = None) -> None:
        nonlocal count
        same = at > 0 and segments[at - 1].level == segments[at].level
        by_itself = merged is not None and (codec is float16_or_32 or not same)
        before = merged if by_itself else encoded[at - 1].vector if at else None
        encoded[at] = codec(mean, before, same)
        count += 1

    ends = np.unique(np.ceil(np.arange(1, number + 1) * steps / number).astype(int))
    for first, last in zip([0, *ends[:-1]], ends, strict=True):
        edges = [Edge(int(n), Timestamp().to_next_batch(steps=int(n))) for n in (first, last)]
        segments.append(Segment(*edges, 0, 0, ""))
        encoded.append(Encoded(np.empty(0), 0))
        put(len(segments) - 1, weights[first:last].mean(axis=0, dtype=np.float64).astype(np.float32))
        level = 0
        while (i := due([segment.level for segment in segments], level, per_level)) is not None:
            old, new = segments[i], segments[i + 1]
            lengths = np.array([old.num_updates, new.num_updates], dtype=np.float64)
            mean = (lengths / lengths.sum()) @ np.stack([encoded[i].vector, encoded[i + 1].vector])
            segments[i : i + 2] = [Segment(old.start, new.end, level + 1, 0, "")]
            older, newer = encoded[i].vector, encoded[i + 1].vector
            encoded[i : i + 2] = [Encoded(np.empty(0), 0)]
            put(i, mean.astype(np.float32), older)
            if i + 1 < len(segments) and encoded[i + 1].differs is not None:  # it was a difference to what merged
                put(i + 1, encoded[i + 1].vector, newer)
                follow(encoded, i + 2)
            level += 1
        peak = max(peak, sum(one.size_bytes for one in encoded))
    return segments, encoded, peak, count / number


def measure(run: Run, steps: int, folder: Path, families: Sequence[Family]) -> list[dict]:
    weights = train(run, splits(4000)[0], steps, folder / "weights.npy", lambda _: None)
    last = weights[-1].astype(np.float64)
    wanted = [HalfLife(f"{steps / k}ba", unbiased=True) for k in SHARES]
    truth = combine(np.stack([each_step(profile, steps, steps) for profile in wanted]), weights)
    found = []
    for name, codec, stores in families:
        for number, per_level in stores:
            segments, encoded, peak, count = record(weights, number, per_level, codec)
            vectors = np.stack([one.vector for one in encoded]).astype(np.float64)
            errors = {}
            for profile, share, true in zip(wanted, SHARES, truth, strict=True):
                average = np.array(coefficients(profile, segments)) @ vectors
                errors[share] = 100 * float(np.linalg.norm(average - true) / np.linalg.norm(last - true))
            one = {"run": run.name, "steps": steps, "family": name, "segments": number, "per_level": per_level}
            one |= {"models": peak / (4 * weights.shape[1]), "errors": errors, "encodings_per_segment": count}
            found.append(one)
    return found


def points(found: Sequence[dict], names: Sequence[str], family: str) -> list[tuple[float, float, str]]:
    """Return the size, the worst error over the runs and the store, in the order of size."""
    result = []
    for number, per_level in next(stores for name, _, stores in FAMILIES if name == family):
        store = (family, number, per_level)
        chosen = [
            one for one in found if one["run"] in names and (one["family"], one["segments"], one["per_level"]) == store
        ]
        worst = max(max(one["errors"].values()) for one in chosen)
        result.append((max(one["models"] for one in chosen), worst, f"T/{number}, {per_level}"))
    return sorted(result)


def draw(found: Sequence[dict], path: Path) -> None:
    """Draw size against error, the runs at a constant rate in a panel of their own."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 5.0), layout="constrained")
        both = figure.subplots(1, 2, sharey=True)
        for axes, (title, names) in zip(both, PANELS.items(), strict=True):
            for (family, _, stores), colour in zip(FAMILIES, mpl.color_sequences["tab20"], strict=False):
                x, y, _ = zip(*points(found, names, family), strict=True)
                mark = "o" if len(stores) > 1 else "D"
                axes.plot(x, y, mark, color=colour, markersize=6, label=family)
            axes.set(xscale="log", yscale="log", xlabel="size at the peak, models of float32")
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xticks([5, 10, 20, 40, 60], ["5", "10", "20", "40", "60"])
            axes.set_xticks([], minor=True)
            axes.set_yticks(ticks := [0.1, 1, 10, 100, 1e3, 1e4, 1e5], [f"{tick:,g}" for tick in ticks])
            axes.grid(alpha=0.25)
        both[0].set_ylabel("worst error, %")
        figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
        path.write_bytes(render(figure, "png"))


def page(found: Sequence[dict], note: str = "") -> list[str]:
    about = (
        "Encodings of the segments of a record, simulated in memory with the record's own merges and coefficients. A "
        "merged mean is encoded again. Differences are taken to what a reader decodes of the segment before on the "
        "same level, so that errors do not add up; the oldest segment of a level is in float32, where nothing else is "
        "said. When it merges, the next is encoded again. An MLP of 14,154 parameters on MNIST-1D. "
        "Sizes are in models of float32, at their peak, scales "
        "included; errors in % of |last weights - true average|, the worst over half-lives from T/256 to T/2 and over "
        "the runs named."
    )
    rows = []
    for family, _, stores in FAMILIES:
        for i in range(len(stores)):
            (models, worst, store), (cosine_models, cosine, _) = (
                points(found, names, family)[i] for names in PANELS.values()
            )
            number, per_level = (int(part) for part in store.removeprefix("T/").split(", "))
            encodings = max(
                one["encodings_per_segment"]
                for one in found
                if (one["family"], one["segments"], one["per_level"]) == (family, number, per_level)
            )
            rows.append(
                [
                    family,
                    store,
                    f"{models:.1f}",
                    f"{worst:.2f}",
                    f"{cosine_models:.1f}",
                    f"{cosine:.2f}",
                    f"{encodings:.1f}",
                ]
            )
    heads = [
        "encoding",
        "interval, per_level",
        "models",
        "worst error",
        "models, cosine",
        "worst error, cosine",
        "encodings per segment",
    ]
    return ["# Bytes against error", "", *paragraph(f"{about} {note}"), "", *table(heads, rows), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=RESULTS / "record_codecs.md")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--only", nargs="+", help="words in the names of those measured; the others stay as they are")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [one for one in FAMILIES if not arguments.only or any(word in one[0] for word in arguments.only)]
    found = []
    if arguments.only:
        names = {name for name, *_ in FAMILIES} - {name for name, *_ in chosen}
        earlier = json.loads(arguments.out.with_suffix(".json").read_text(encoding="utf-8"))["found"]
        found += [one for one in earlier if one["family"] in names and one["steps"] == arguments.steps]
    for run in RUNS:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
            found += measure(run, arguments.steps, Path(folder), chosen)
    how = provenance("torch", "numpy", "zstandard")
    words = (
        f"Those without one of the words {', '.join(arguments.only)} in their names are from an earlier run of all."
        if arguments.only
        else ""
    )
    write(arguments.out, [*page(found, words), *measured(how)], {"found": found, "how": how})
    draw(found, arguments.picture)


if __name__ == "__main__":
    main()
