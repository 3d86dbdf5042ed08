"""``recommend``: a sixteenth of the run, unless an evaluation shows that another average is better."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from polyak import EMA, ProfileError, Recorder, attach, recommend
from polyak.cli import main
from polyak.profiles import HalfLife
from polyak.record import Edge, Record, Writer
from polyak.storage.safetensors import TensorInfo
from polyak.sweeping import EvaluationError, sweep
from polyak.sweeping.recommending import recommended
from polyak.time import Time, Timestamp

INFOS = {"weight": TensorInfo(torch.float32, (4,), averaged=True)}
LENGTH = 256


def written(folder, length=LENGTH, step=1, *, per_epoch=None, max_duration=None):
    """Write the record of a walk around 1 that slowly leaves 0."""
    generator = torch.Generator().manual_seed(0)
    with Writer(folder, INFOS, max_duration=max_duration) as writer:
        now = Timestamp(epoch_length=per_epoch)
        start = Edge(0, now)
        for n in range(step, length + 1, step):
            for _ in range(step):
                now = now.to_next_batch()
                now = now.to_next_epoch() if now.ends_epoch else now
            mean = 1 - 2 ** (-n / 8) + torch.randn(4, generator=generator)
            end = Edge(n, now)
            writer.append({"weight": mean}, start, end)
            start = end
    return Record(folder)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return written(tmp_path_factory.mktemp("recorded") / "run")


def losses(noise, count=32):
    """Return an evaluation whose single losses have the same noise under all averages, and some of their own."""

    def evaluate(state):
        loss = float((state["weight"] - 1).square().mean())
        seed = int(abs(loss) * 1e9) % 2**31
        own = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * noise
        common = torch.randn(count, generator=torch.Generator().manual_seed(1))
        return {"loss": loss + own + common}

    return evaluate


def test_the_default_is_the_half_life_that_ema_keeps_with_auto(tmp_path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema, recorder = EMA("auto"), Recorder(tmp_path / "run", interval="1ba", per_level=None)
    with attach([ema, recorder], model, optimizer, max_duration="64ba") as attached:
        for _ in range(64):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(torch.randn(8, 3)), torch.randn(8, 1)).backward()
            optimizer.step()
        averaged = {name: tensor.clone() for name, tensor in attached.model.state_dict().items()}
    found = recommend(tmp_path / "run")
    assert found.profile == HalfLife("4ba", unbiased=True)
    assert found.comparison is None
    for name, tensor in found.average().items():
        torch.testing.assert_close(tensor, averaged[name], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_default_is_in_the_unit_of_the_length_of_the_run(tmp_path) -> None:
    record = written(tmp_path / "run", per_epoch=16, max_duration=Time(16, "ep"))
    assert record.recommend().half_life == Time(1.0, "ep")


@pytest.mark.slow
def test_record_recommends_what_the_function_recommends(record) -> None:
    assert record.recommend() == recommend(record)
    assert str(record.recommend()) == "half-life 16ba: a sixteenth of the run, the default without an evaluation"


def test_a_record_that_is_too_coarse_gives_the_shortest_half_life_that_it_resolves(tmp_path) -> None:
    record = written(tmp_path / "run", length=64, step=8)
    found = record.recommend()
    assert found.half_life > 4
    assert found.reason == "the shortest that the record resolves; a sixteenth of the run, 4ba, is shorter"
    assert found.average().keys() == {"weight"}


def test_a_record_of_one_segment_recommends_nothing(tmp_path) -> None:
    with pytest.raises(ProfileError, match="resolve at least one half-life"):
        written(tmp_path / "run", length=8, step=8).recommend()


def test_the_best_is_recommended_if_its_gain_exceeds_the_noise(record) -> None:
    found = record.recommend(losses(noise=1e-5))
    compared = found.comparison
    assert found.profile == compared.best != compared.default
    low, high = compared.interval
    assert 0 < low < compared.gain < high
    assert "its loss is lower than that of a sixteenth of the run, half-life 16ba, by" in found.reason


def test_the_default_is_recommended_if_the_gain_is_within_the_noise(record) -> None:
    found = record.recommend(losses(noise=3.0))
    compared = found.comparison
    assert found.profile == compared.default == HalfLife("16ba", unbiased=True)
    assert compared.gain > 0 > compared.interval[0]
    assert "within the noise of the evaluation" in found.reason


def test_the_default_is_recommended_if_the_noise_is_not_known(record) -> None:
    found = record.recommend(lambda state: float((state["weight"] - 1).norm()))
    assert found.profile == HalfLife("16ba", unbiased=True)
    assert found.comparison.interval is None
    assert "since the evaluation returns one number" in found.reason


def test_seven_values_do_not_tell_their_noise(record) -> None:
    assert "returns 7 values" in record.recommend(losses(noise=0.0, count=7)).reason


def test_the_interval_of_the_gain_is_wider_for_more_averages(record) -> None:
    many, few = (record.recommend(losses(0.1), points=points, refine=0).comparison.interval for points in (40, 2))
    assert many[1] - many[0] > 1.2 * (few[1] - few[0])


@pytest.mark.slow
def test_chance_alone_seldom_moves_the_recommendation(record) -> None:
    moved = 0
    for seed in range(40):
        draws = iter(torch.randn(1000, 20, generator=torch.Generator().manual_seed(seed)))
        found = record.recommend(lambda state, draws=draws: {"loss": next(draws)}, refine=0)
        moved += found.profile != found.comparison.default
    assert moved <= 3


def test_a_metric_that_is_maximized_moves_the_recommendation_the_other_way(record) -> None:
    evaluate = losses(noise=1e-5)

    def accuracy(state):
        return {"accuracy": -evaluate(state)["loss"]}

    by_loss, by_accuracy = record.recommend(evaluate), record.recommend(accuracy, maximize=True)
    assert by_accuracy.profile == by_loss.profile
    assert by_accuracy.comparison.gain == pytest.approx(by_loss.comparison.gain)
    assert "its accuracy is higher than" in by_accuracy.reason


def test_a_metric_without_a_known_direction_is_refused(record) -> None:
    with pytest.raises(EvaluationError, match="a lower or a higher"):
        record.recommend(lambda _: {"thing": 1.0})


def test_a_default_that_gives_no_number_is_not_recommended(record) -> None:
    evaluate = losses(noise=1e-5)
    wanted = record.average(HalfLife("16ba", unbiased=True))["weight"]

    def fails(state):
        return {"loss": math.nan} if torch.equal(state["weight"], wanted) else evaluate(state)

    found = record.recommend(fails)
    assert found.profile == found.comparison.best
    assert "gives no number" in found.reason


def test_a_sweep_without_a_sixteenth_compares_the_nearest_half_life(record) -> None:
    results = sweep(record, losses(3.0), [HalfLife(f"{n}ba", unbiased=True) for n in (4, 20, 128)], refine=0)
    found = recommended(results)
    assert found.comparison.default == HalfLife("20ba", unbiased=True)
    with pytest.raises(ProfileError, match="near 16ba"):
        recommended(sweep(record, losses(3.0), [HalfLife("128ba", unbiased=True)], refine=0))


def test_the_report_of_a_sweep_says_what_is_recommended(record, tmp_path) -> None:
    results = sweep(record, losses(3.0))
    assert "Recommended: half-life" in results.report(tmp_path / "report").read_text()


def test_recommend_on_the_command_line_writes_what_it_recommends(record, tmp_path, monkeypatch, capsys) -> None:
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    Path("run").symlink_to(record.folder)
    assert main(["recommend", "run", "-o", "averaged.safetensors", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["profile"] == "--half-life 16ba --unbiased"
    torch.testing.assert_close(load_file("averaged.safetensors"), record.recommend().average())
    assert main(["recommend", "run", "--maximize"]) == 2
    assert "--maximize must be given together with --evaluate" in capsys.readouterr().err


def test_recommend_on_the_command_line_says_why(record, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").symlink_to(record.folder)
    (tmp_path / "why.py").write_text("def loss(state):\n    return [float(state['weight'].norm())] * 10\n")
    assert main(["recommend", "run", "--evaluate", "why.py:loss"]) == 0
    text = capsys.readouterr().out
    assert "because" in text
    assert re.search(r"To write it: polyak reconstruct \S*run --half-life", " ".join(text.split()))
