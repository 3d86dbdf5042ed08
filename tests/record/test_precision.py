"""What a record keeps by itself: how long its segments are, and in which dtype."""

import copy
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from polyak import HalfLife, Record, Recorder, RecordError, TimeError, Uniform, attach
from polyak.record import Edge, Segment, Writer, fit
from polyak.storage.safetensors import TensorInfo
from polyak.time import Time, Timestamp, TimeUnit
from tests.record.test_recorder import Loop, segments

torch.set_num_threads(1)


def edge(updates: int) -> Edge:
    return Edge(updates, Timestamp().to_next_batch(steps=updates))


def written(folder: Path, means: list[torch.Tensor], dtype: torch.dtype = torch.float16, **options) -> Record:
    """Write a record of these means, each of one update."""
    with Writer(folder, {"w": TensorInfo(dtype, tuple(means[0].shape), averaged=True)}, **options) as writer:
        for n, mean in enumerate(means):
            writer.append({"w": mean}, edge(n), edge(n + 1))
    return Record(folder)


def dtypes(record: Record, name: str = "w") -> list[torch.dtype]:
    found = []
    for segment in record.segments:
        with record.open(segment) as file:
            assert file.read(name).dtype == file.dtype(name)
            found.append(file.dtype(name))
    return found


F16, F32 = torch.float16, torch.float32


def test_weights_that_move_are_kept_in_float16_by_default_and_averages_come_in_float32(tmp_path) -> None:
    with (loop := Loop(Recorder(tmp_path, "4ba"))).attached:
        loop.run(40)
    record = Record(tmp_path)
    assert record.tensors["0.weight"].dtype == F16
    assert set(dtypes(record, "0.weight")) == {F16}
    average = record.average(Uniform())
    assert average["0.weight"].dtype == F32
    torch.testing.assert_close(average["0.weight"].double(), loop.mean("0.weight", 0, 40), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("value", [65536.0, -1e6, 1e38])
def test_a_tensor_with_a_value_beyond_float16_is_kept_in_float32_as_long_as_it_has_one(tmp_path, value) -> None:
    steps = [torch.tensor([1.0, 1.0]), torch.tensor([2.0, value]), torch.tensor([3.0, 3.0])]
    record = written(tmp_path, steps, per_level=None)
    assert dtypes(record) == [F16, F32, F16]
    record.verify()
    torch.testing.assert_close(record.average(Uniform())["w"], torch.stack(steps).mean(0))


def test_a_tensor_of_numbers_too_small_for_float16_is_kept_in_float32(tmp_path) -> None:
    variances = [torch.rand(100) * 1e-6 for _ in range(4)]
    assert dtypes(written(tmp_path, variances)) == [F32] * 4


def test_a_tensor_that_moves_less_than_float16_resolves_is_kept_in_float32(tmp_path) -> None:
    torch.manual_seed(0)
    begin, step = torch.randn(1000), torch.randn(1000)
    slow, fast = ([begin + n * scale * step for n in range(4)] for scale in (1e-4, 1e-1))
    assert dtypes(written(tmp_path / "slow", slow)) == [F16, F32, F32, F32]
    assert dtypes(written(tmp_path / "fast", fast)) == [F16] * 4
    assert dtypes(written(tmp_path / "still", [begin] * 3)) == [F16, F32, F32]  # a tensor that stays is exact


def test_what_is_merged_is_in_float16_again_where_that_is_enough(tmp_path) -> None:
    torch.manual_seed(0)
    walk = torch.randn(40, 1000).mul(1e-2).cumsum(0) + torch.randn(1000)
    walk[20, 3] = 1e6
    record = written(tmp_path, list(walk), per_level=1)
    kept = dict(zip([(s.start.updates, s.end.updates) for s in record.segments], dtypes(record), strict=True))
    assert all((dtype == F32) == (start <= 20 < end) for (start, end), dtype in kept.items())
    torch.testing.assert_close(record.average(Uniform())["w"], walk.mean(0), rtol=1e-3, atol=1e-3)


def test_nan_and_inf_are_kept_as_they_are(tmp_path) -> None:
    mean = torch.tensor([1.0, torch.nan, torch.inf])
    record = written(tmp_path, [mean, 2 * mean])
    assert dtypes(record) == [F16, F16]
    with record.open(record.segments[0]) as file:
        torch.testing.assert_close(file.read("w").float(), mean, equal_nan=True)


def test_float64_stays_float64_and_complex_stays_complex_unless_a_dtype_is_given(tmp_path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.real = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
            self.complex = nn.Parameter(torch.tensor([1.0 + 1.0j], dtype=torch.complex64))

        def forward(self) -> torch.Tensor:
            return self.real.square().sum() + self.complex.abs().square().sum()

    for name, options, want in (("default", {}, torch.float64), ("given", {"dtype": F32}, F32)):
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        history = []
        with attach(Recorder(tmp_path / name, "2ba", **options), model, optimizer):
            for _ in range(9):
                optimizer.zero_grad()
                model().backward()
                optimizer.step()
                history.append((model.real.item(), model.complex.item()))
        record = Record(tmp_path / name)
        assert (record.tensors["real"].dtype, record.tensors["complex"].dtype) == (want, torch.complex64)
        average = record.average(Uniform())
        assert average["real"].dtype == want
        mean = sum(double for double, _ in history) / 9
        assert average["real"].item() == pytest.approx(mean, rel=1e-14 if want is torch.float64 else 1e-6)
        assert average["complex"].item() == pytest.approx(sum(value for _, value in history) / 9, rel=1e-5)


def old_state(loop: Loop) -> dict:
    """Return the state that an earlier version saved of this run."""
    state = loop.attached.state_dict()
    recorder = find(state)
    recorder["record"] = json.dumps({"stretches": json.loads(recorder["record"])["stretches"]})
    return state


def find(state: dict) -> dict:
    """Return the state of the recorder in that of a loop."""
    return state if "record" in state else next(one for name, one in state["algorithms"] if name == "Recorder")


def test_a_record_of_the_earlier_defaults_is_continued_with_them(tmp_path) -> None:
    for name, resume in (("whole", None), ("resumed", 21)):
        options = {"max_duration": "1024ba"}
        loop = Loop(Recorder(tmp_path / name, "0.001953125dur", dtype=F32), **options)
        if resume is None:
            loop.run(60)
        else:
            state = copy.deepcopy(old_state(loop.run(resume)))
            optimizer = copy.deepcopy(loop.optimizer.state_dict())
            loop.run(10).attached.detach()
            earlier = loop
            loop = Loop(Recorder(tmp_path / name), **options)
            loop.model.load_state_dict(earlier.history[resume - 1])
            loop.attached.load_state_dict(state)
            loop.optimizer.load_state_dict(optimizer)
            loop.history = earlier.history[:resume]
            loop.run(60 - resume)
        loop.attached.detach()
    assert segments(tmp_path / "resumed") == segments(tmp_path / "whole")
    assert Record(tmp_path / "resumed").tensors["0.weight"].dtype == F32


def test_a_resumed_recorder_that_is_given_nothing_continues_with_the_interval_and_dtype_of_its_record(tmp_path) -> None:
    loop = Loop(Recorder(tmp_path, "4ba", dtype=torch.bfloat16, per_level=None)).run(9)
    state = loop.attached.state_dict()
    loop.attached.detach()
    other = Loop(Recorder(tmp_path, per_level=None))
    other.attached.load_state_dict(state)
    other.run(9).attached.detach()
    assert [s.num_updates for s in Record(tmp_path).segments] == [4, 4, 4, 4, 2]
    assert Record(tmp_path).tensors["0.weight"].dtype == torch.bfloat16


def test_a_recorder_without_an_interval_is_refused_where_a_run_begins_that_resumes_nothing(tmp_path) -> None:
    Loop(Recorder(tmp_path, "4ba")).run(9).attached.detach()
    loop = Loop(Recorder(tmp_path, overwrite=True))  # until a state is loaded, it may yet continue the record
    with pytest.raises(TimeError, match="length of a segment must be known"):
        loop.run(1)
    assert Record(tmp_path).segments[-1].end.updates == 9


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.integers(512, 12_000), st.integers(0, 200))
def test_a_half_life_of_two_intervals_is_resolved_whatever_the_length_of_the_run_divides_by(total, cut) -> None:
    interval = total / 1024
    now = total - cut
    edges = [0, *(n for n in range(1, now + 1) if int(n / interval) > int((n - 1) / interval))]
    edges += [] if edges[-1] == now else [now]
    parts = tuple(Segment(edge(a), edge(b), 0, 1, "0" * 64) for a, b in pairwise(edges))
    fit(HalfLife(Time(total / 512, TimeUnit.BATCH), unbiased=True), parts)


def test_bfloat16_is_refused_a_value_beyond_its_range(tmp_path) -> None:
    with pytest.raises(RecordError, match="use a dtype with a wider range"):
        written(tmp_path, [torch.tensor([3.4e38])], torch.bfloat16)
