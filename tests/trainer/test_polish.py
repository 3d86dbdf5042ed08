"""``Trainer(polish=)``: the average becomes the weights near the end, and the rates fall to 0 from there."""

import copy
import json
from contextlib import suppress
from functools import partial

import distributed_runs as runs
import loops
import pytest
import torch

from polyak import (
    BEMA,
    EMA,
    ArgumentError,
    CheckpointError,
    HalfLife,
    Record,
    Recorder,
    TimeError,
    Trainer,
)
from polyak.trainer import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:the average that is:polyak.PlanWarning")

BATCHES = 18  # in a run of `loops.train`


def logged(folder) -> dict[str, list]:
    found = dict[str, list]()
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("polish", ["60%", "50%", "9 steps", 9, "1ep"])
def test_the_rates_of_a_polish_fall_from_three_tenths_to_zero(tmp_path, polish) -> None:
    steps = {"60%": 10, "1ep": 6}.get(polish, 9)
    trainer = loops.train(tmp_path, ema=EMA("4ba"), polish=polish, log_interval="1ba", saves=None)
    trainer.fit()
    rates = logged(tmp_path)["lr"]
    begin = BATCHES - steps
    at_begin = 0.02 * 0.95**begin
    # A batch is logged after its scheduler has stepped; in a polish, with the rate of the batch.
    assert rates[: begin - 1] == pytest.approx([0.02 * 0.95 ** (n + 1) for n in range(begin - 1)])
    assert rates[begin:] == pytest.approx([0.3 * at_begin * (1 - n / steps) for n in range(steps)])


def test_a_polish_starts_at_the_average_and_its_figures_are_logged(tmp_path) -> None:
    begun = {}

    class Watch(loops.Callback):
        def batch_start(self, state, logger) -> None:
            if state.timestamp.batch.value == 9:
                begun.update(copy.deepcopy(state.model.state_dict()))

    ema = EMA("4ba")
    plain = loops.train(tmp_path / "plain", ema=ema, max_duration="9ba", saves=None)
    plain.fit()
    averaged = ema.ema_model.state_dict()
    trainer = loops.train(tmp_path / "polished", ema=EMA("4ba"), polish="50%", callbacks=(Watch(),), saves=None)
    trainer.fit()
    assert all(torch.equal(begun[name], averaged[name]) for name in averaged)
    found = logged(tmp_path / "polished")
    assert found["polish/before/eval/loss"] == [plain.state.eval_metrics["eval/loss"]]
    # The weights are the result: they are evaluated at the end, and the average is not swapped in.
    assert found["polish/after/eval/loss"] == [trainer.state.eval_metrics["eval/loss"]]
    assert trainer.eval() == pytest.approx(
        {name.removeprefix("polish/after/"): value[0] for name, value in found.items() if "polish/after" in name}
    )


@pytest.mark.slow
@pytest.mark.parametrize("polish", ["5ba", "8ba"])  # of 14 batches: it begins where the run was saved
@pytest.mark.parametrize("average", [EMA, BEMA])
def test_a_run_resumes_bit_for_bit_before_in_and_at_the_start_of_a_polish(tmp_path, polish, average) -> None:
    def build(folder, **options) -> Trainer:
        ema = EMA("4ba") if average is EMA else BEMA(update_interval="2ba")
        return loops.train(folder, ema=ema, polish=polish, **options)

    assert loops.resume_differences(build, tmp_path) == {}


def test_a_checkpoint_of_a_polish_says_so_and_has_the_weights_that_are_polished(tmp_path) -> None:
    trainer = loops.train(tmp_path, ema=EMA("4ba"), polish="60%")
    trainer.fit()
    saved = checkpoint.read(tmp_path / "checkpoints" / loops.MID_EPOCH)
    assert saved["polish"]["began"] == 8 / BATCHES
    assert saved["model_holds"] == "training weights"
    assert saved["polish"]["before"].keys() >= {"polish/before/eval/loss"}
    assert checkpoint.read(tmp_path / "checkpoints" / loops.EPOCH_END)["polish"] is None
    with pytest.raises(CheckpointError, match="must be resumed with polish="):
        loops.train(tmp_path, ema=EMA("4ba"), load_path=tmp_path / "checkpoints" / loops.MID_EPOCH)


def test_a_clock_that_is_set_back_begins_the_polish_again(tmp_path) -> None:
    trainer = loops.train(tmp_path, ema=EMA("4ba"), polish="50%", saves=None, log_interval="1ba")
    trainer.fit()
    with pytest.raises(ArgumentError, match="a polish that has begun must keep its length"):
        trainer.fit(duration="1ep")
    trainer.state.max_duration = loops.train(tmp_path / "b", saves=None).state.max_duration
    trainer.fit(reset_time=True)
    assert len(logged(tmp_path)["polish/before/eval/loss"]) == 2
    assert logged(tmp_path)["lr"][BATCHES] == pytest.approx(0.02 * 0.95**10)  # the schedule continues


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"polish": "5%"}, ArgumentError, "polish needs one average among the algorithms"),
        ({"ema": EMA("4ba"), "polish": "0%"}, ArgumentError, "polish must be above 0 % and below 100 %"),
        ({"ema": EMA("4ba"), "polish": "100%"}, ArgumentError, "polish must be above 0 % and below 100 %"),
        ({"ema": EMA("4ba"), "polish": "five%"}, ArgumentError, "polish must be above 0 % and below 100 %"),
        ({"ema": EMA("4ba"), "polish": 0.05}, TimeError, "polish"),
        ({"ema": EMA("4ba"), "polish": "0ba"}, TimeError, "polish must be above 0"),
    ],
)
def test_a_polish_that_cannot_be_is_refused_where_the_trainer_is_made(tmp_path, options, kind, message) -> None:
    with pytest.raises(kind, match=message):
        loops.train(tmp_path, saves=None, **options)


@pytest.mark.parametrize(
    ("polish", "ema", "message"),
    [
        ("18ba", EMA("4ba"), "polish must be shorter than the run"),
        ("100sp", EMA("4ba"), "polish must be in the unit of max_duration, or a percentage"),
        ("20%", EMA("4ba", ema_start="0.9dur"), "averaging must begin before the polish"),
        ("20%", Recorder(None, "8ba"), "a record must have 2 intervals before the polish"),
    ],
)
def test_a_polish_that_does_not_fit_into_the_run_is_refused_before_the_first_batch(
    tmp_path, polish, ema, message
) -> None:
    trainer = loops.train(tmp_path, ema=ema, polish=polish, saves=None)
    with pytest.raises(ArgumentError, match=message):
        trainer.fit()
    assert trainer.state.timestamp.batch.value == 0


def test_a_polish_without_an_ema_starts_at_the_average_that_the_record_recommends(tmp_path) -> None:
    begun = {}

    class Watch(loops.Callback):
        def batch_start(self, state, logger) -> None:
            if state.timestamp.batch.value == 9:
                begun.update(copy.deepcopy(state.model.state_dict()))

    recorder = Recorder(tmp_path / "record", "1ba", None)
    loops.train(tmp_path, ema=recorder, polish="50%", callbacks=(Watch(),), saves=None).fit()
    record = Record(tmp_path / "record")
    want = record.average(HalfLife(f"{9 / loops.EPOCH / 16}ep", unbiased=True), "9ba")
    assert all(torch.equal(begun[name], tensor) for name, tensor in want.items())


def test_a_polish_from_a_record_resumes_bit_for_bit(tmp_path) -> None:
    def run(folder, *stops) -> dict[str, torch.Tensor]:
        for stop in (*stops, None):
            raises = () if stop is None else (loops.Raises(loops.Event.BATCH_START, InterruptedError(), batch=stop),)
            recorder = Recorder(folder / "record", "2ba")
            trainer = loops.train(folder, ema=recorder, polish="50%", callbacks=raises, autoresume=True)
            with suppress(InterruptedError):
                trainer.fit()
        return loops.bits(trainer.state.model)

    assert loops.differences(run(tmp_path / "one"), run(tmp_path / "two", 8, 13)) == []


@pytest.mark.slow  # processes of several ranks
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_polish_from_the_record_as_one_process_does(ranks, tmp_path, kind) -> None:
    def options(folder):
        return {"polish": "50%", "algorithm": partial(Recorder, folder / "record", "1ba"), "saves": None}

    one = runs.polishes_from_a_record(None, tmp_path / "one", **options(tmp_path / "one"))
    for two in ranks.run(2, partial(runs.polishes_from_a_record, kind, tmp_path / "two", **options(tmp_path / "two"))):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # processes of several ranks
@pytest.mark.parametrize(
    ("kind", "algorithm"),
    [("ddp", None), ("fsdp2", partial(BEMA, update_interval="2ba"))],
    ids=["ddp-EMA", "fsdp2-BEMA"],
)
def test_a_polish_of_several_ranks_is_that_of_one_process_and_resumes(ranks, tmp_path, kind, algorithm) -> None:
    options = {"polish": "8ba", "algorithm": algorithm}
    one = runs.trains(None, tmp_path / "one", max_duration=loops.RESUMED, **options)
    for two, different in ranks.run(2, partial(runs.resumes, kind, tmp_path, **options)):
        assert different == {}
        for what in ("weights", "averages", "metrics"):
            torch.testing.assert_close(two[what], one[what], rtol=1e-4, atol=1e-5)
        if log := two["log"]:  # on rank 0
            rates = [[line["lr"] for line in lines if "lr" in line] for lines in (one["log"], log)]
            assert rates[0] == rates[1]
            assert any(name.startswith("polish/before") for name in set().union(*log))
