"""Profiles on records and folders of checkpoints: floors, snapped starts, negative shares, published merges."""

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from polyak import Cooldown, HalfLife, Momentum, ProfileError, Record, Recorder, RecordError, Time, Window, attach
from polyak.checkpoints import average_checkpoints, weights_at
from polyak.cli import main
from polyak.record import Edge, Segment, Writer, coefficients, fit, shares
from polyak.storage.safetensors import TensorInfo
from polyak.time import Timestamp

torch.set_num_threads(1)


@dataclass(frozen=True)
class Extrapolated:
    """An average that goes on beyond itself, away from the weights of `lag` ago or from the first ones."""

    span: float
    share: float
    lag: float | None = None

    unit = "ba"
    recursive = False

    def decay(self, before: float, now: float) -> float:
        def plain(end: float) -> float:
            return min(1.0, max(0.0, (before - (end - self.span)) / self.span))

        if before == now:
            return 1.0
        away = 1.0 if self.lag is None else plain(now - self.lag)
        return (1 + self.share) * plain(now) - self.share * away


def segments(lengths: list[int]) -> list[Segment]:
    """Return the segments of a record without files."""
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    edges = [Edge(n, Timestamp().to_next_batch(steps=n) if n else Timestamp()) for n in ends]
    return [Segment(start, end, 0, 0, "") for start, end in pairwise(edges)]


def trained(folder, steps: int = 20, interval: str = "1ba", **options):
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=torch.float64)
    optimizer, raw = torch.optim.SGD(model.parameters(), lr=0.05), list[torch.Tensor]()
    with attach(Recorder(folder, interval, **options), model, optimizer):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(8, 3, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
            raw.append(model.weight.detach().clone())
    return Record(folder), raw


def minus_sqrt_merge(count: int) -> list[float]:
    """Megatron's weights for `count` checkpoints: differences of the schedule at i / count, the rest for the oldest."""
    rates = [1 - math.sqrt(i / count) for i in range(count)]
    rest = [rates[i] - rates[i + 1] for i in range(1, count - 1)] + ([rates[-1]] if count > 1 else [])
    return [1 - sum(rest), *rest]


@pytest.mark.parametrize("count", [2, 5, 16])
def test_a_minus_sqrt_merge_from_a_record_is_the_published_formula(tmp_path, count) -> None:
    record, raw = trained(tmp_path, per_level=32)
    assert [segment.num_updates for segment in record.segments[-count:]] == [1] * count
    average = record.average(Cooldown(Time(count, "ba"), "1-sqrt"))["weight"]
    weights = minus_sqrt_merge(count)
    exact = sum(weight * one for weight, one in zip(weights, raw[-count:], strict=True))
    assert torch.allclose(average, exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("words", ["cooldown 50%, 1-sqrt", "cooldown 400ba, 1-sqrt"])
def test_a_minus_sqrt_merge_of_a_folder_is_the_published_formula(tmp_path, words) -> None:
    raw = [torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    paths = [tmp_path / f"step-{100 * (i + 1)}.safetensors" for i in range(8)]
    for path, one in zip(paths, raw, strict=True):
        save_file({"w": one}, path)
    out = tmp_path / "out.safetensors"
    assert main(["average", *map(str, paths), "--profile", words, "-o", str(out)]) == 0
    exact = sum(weight * one for weight, one in zip(minus_sqrt_merge(4), raw[-4:], strict=True))
    assert torch.allclose(load_file(out)["w"], exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("floor", [0.1, 0.5])
def test_a_floor_is_the_share_of_the_raw_weights(tmp_path, shape, floor) -> None:
    record, raw = trained(tmp_path, per_level=32)
    plain, floored = Cooldown("8ba", shape), Cooldown("8ba", shape, floor)
    both = [one["weight"] for one in record.averages([plain, floored])]
    assert torch.allclose(both[1], floor * raw[-1] + (1 - floor) * both[0], rtol=1e-12, atol=1e-14)
    assert torch.equal(record.average(floored)["weight"], both[1])
    assert sum(coefficients(floored, record.segments)) == pytest.approx(1 - floor)
    assert sum(shares(floored, record.segments)) == pytest.approx(1 - floor)
    record.export(floored, tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["weight"], both[1])


def test_the_errors_of_several_averages_do_not_depend_on_a_floor_among_them(tmp_path) -> None:
    record, _ = trained(tmp_path, steps=100, interval="2ba")
    alone = record.error(HalfLife("20ba", unbiased=True))
    again = Record(tmp_path)
    list(again.averages([HalfLife("20ba", unbiased=True), Cooldown("30ba", "cosine", floor=0.2)]))
    assert again.error(HalfLife("20ba", unbiased=True)) == alone
    # A floor scales the distance from the last weights and the error by the same factor.
    assert again.error(Cooldown("30ba", "cosine", floor=0.2)) == again.error(Cooldown("30ba", "cosine"))


def test_a_floor_without_raw_weights_is_refused_by_name(tmp_path) -> None:
    edges = [Edge(n, Timestamp().to_next_batch(steps=n)) for n in range(5)]
    with Writer(tmp_path, {"w": TensorInfo(torch.float32, (1,), averaged=True)}) as writer:
        for start, end in pairwise(edges):
            writer.append({"w": torch.ones(1)}, start, end)
    with pytest.raises(RecordError, match="a floor needs the raw weights at the moment of the average.*it has none"):
        Record(tmp_path).average(Cooldown("2ba", floor=0.1))
    record, _ = trained(tmp_path / "ended")
    with pytest.raises(RecordError, match="a floor needs the raw weights.*it has those at 20ba"):
        record.average(Cooldown("4ba", floor=0.1), at="16ba")


def test_a_floor_of_checkpoints_is_the_share_of_the_newest() -> None:
    weights = weights_at(Cooldown("40ba", floor=0.2), [10, 20, 30, 40])
    assert weights == pytest.approx([0.2, 0.2, 0.2, 0.4])
    assert weights_at(Cooldown("20ba", floor=0.2), [40]) == [1.0]


@pytest.mark.parametrize("span", [13, 37, 61, 97])
def test_a_linear_cooldown_that_snaps_to_an_edge_is_exact(span) -> None:
    recorded = segments([64, 32, 16, 8, 4, 2, 2])
    fitted = fit(Cooldown(Time(span, "ba"), snap=True), recorded)
    assert fitted.expected_error < 1e-12
    start = 128 - sum(
        segment.num_updates for segment, one in zip(recorded, fitted.coefficients, strict=True) if one > 1e-12
    )
    edges = [segment.start.updates for segment in recorded]
    assert abs(start - (128 - span)) == min(abs(edge - (128 - span)) for edge in edges)
    assert fit(Cooldown(Time(span, "ba"), "cosine", snap=True), recorded).expected_error < 0.35


def test_a_cooldown_of_checkpoints_snaps_to_one() -> None:
    assert weights_at(Cooldown("23ba", snap=True), [10, 20, 30, 40]) == pytest.approx([0, 0, 0.5, 0.5])


def test_a_cooldown_longer_than_what_is_recorded_is_one_clear_error(tmp_path) -> None:
    recorded = segments([8, 4, 4])
    message = "a cooldown must not be longer than what it is taken from .got 17ba for 16.*ba of training"
    for act in (fit, coefficients, shares):
        with pytest.raises(ProfileError, match=message):
            act(Cooldown("17ba"), recorded)
    assert sum(coefficients(Cooldown("16ba"), recorded)) == pytest.approx(1)
    with pytest.raises(ProfileError, match="a cooldown must not be longer"):
        weights_at(Cooldown("50ba"), [10, 20, 30, 40])
    paths = [tmp_path / f"step-{n}.pt" for n in (100, 110, 120)]
    for path in paths:
        torch.save({"w": torch.ones(1)}, path)
    with pytest.raises(ProfileError, match="got 31ba for 30.*ba of training"):
        average_checkpoints(paths, tmp_path / "out.pt", profile=Cooldown("31ba"))


def test_a_share_that_is_subtracted_within_the_record_is_exact() -> None:
    recorded = segments([1] * 20)
    got = coefficients(Extrapolated(5, 0.5, lag=5), recorded)
    assert got == pytest.approx([0.0] * 10 + [-0.1] * 5 + [0.3] * 5)


@pytest.mark.parametrize("profile", [Extrapolated(5, 0.2), Extrapolated(12, 0.3, lag=12)])
def test_weights_from_before_the_record_are_not_subtracted(profile) -> None:
    for act in (fit, coefficients, shares):
        with pytest.raises(ProfileError, match="must not subtract weights from before the record"):
            act(profile, segments([1] * 20))


@pytest.mark.parametrize("profile", [Extrapolated(20, 0.2), Extrapolated(20, 0.5, lag=20)])
def test_checkpoints_are_not_subtracted(profile) -> None:
    with pytest.raises(ProfileError, match="a profile of checkpoints must not subtract weights"):
        weights_at(profile, [10, 20, 30, 40, 50])


def test_a_momentum_on_a_record_needs_its_length_in_steps() -> None:
    recorded = segments([8, 4, 4])
    with pytest.raises(ProfileError, match=r"give max_duration to the loop, or over in steps"):
        fit(Momentum(0.9), recorded)
    assert sum(fit(Momentum(0.1, 1.0, over="16ba"), recorded).coefficients) == pytest.approx(1)


def test_a_linear_cooldown_is_a_window_on_a_record() -> None:
    recorded = segments([8, 4, 2, 2])
    assert coefficients(Cooldown("8ba"), recorded) == pytest.approx(coefficients(Window("8ba"), recorded))
