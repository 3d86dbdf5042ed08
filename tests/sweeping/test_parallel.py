"""Ranks that evaluate the averages of a record between them find what one process finds."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import sweeps_in_ranks as jobs
import torch
from records import record
from torch import nn

import polyak
from polyak.errors import ArgumentError
from polyak.sweeping import sweep, together
from polyak.sweeping.workers import is_of_another_rank, portable

in_ranks = pytest.mark.slow  # processes of several ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel") / "run"
    record(folder, per_level=None)
    return str(folder)


@pytest.fixture(scope="module")
def alone(folder):
    return jobs.sweeps(folder, parallel=False)


def lines(path) -> list[dict]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in found]


@in_ranks
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_find_what_one_process_finds_bit_for_bit_and_evaluate_each_average_once(
    ranks, folder, alone, tmp_path, size
) -> None:
    want, norms = alone
    found = ranks.run(size, jobs.sweeps, folder, str(tmp_path / "sweep.jsonl"))
    assert all(results == want for results, _ in found)
    assert sorted(norm for _, own in found for norm in own) == sorted(norms)
    shares = [len(own) for _, own in found]
    assert max(shares) <= len(norms) // size + 3  # and one for each half-life of the refinement
    jobs.sweeps(folder, str(tmp_path / "alone.jsonl"), parallel=False)
    assert lines(tmp_path / "sweep.jsonl") == lines(tmp_path / "alone.jsonl")


@in_ranks
def test_ranks_find_the_same_at_several_moments_and_with_other_weights(ranks, folder, tmp_path) -> None:
    others = {"another": str(tmp_path / "other.safetensors")}
    polyak.Record(folder).export(jobs.HALF_LIVES[1], others["another"], "50%")
    options = {"at": ["50%", "100%"], "others": others, "profiles": jobs.HALF_LIVES}
    want, norms = jobs.sweeps(folder, parallel=False, **options)
    found = ranks.run(2, partial(jobs.sweeps, **options), folder)
    assert all(results == want for results, _ in found)
    assert sorted(norm for _, own in found for norm in own) == sorted(norms)


@in_ranks
def test_ranks_evaluate_profiles_that_cannot_be_sent_and_those_that_are_given_twice_once(ranks, folder) -> None:
    want, norms = jobs.sweeps_by_own_profiles(folder, parallel=False)
    assert len(want) == len(norms) + 1 == 5
    found = ranks.run(2, jobs.sweeps_by_own_profiles, folder)
    assert [results for results, _ in found] == [want, want]
    assert sorted(norm for _, own in found for norm in own) == sorted(norms)


@in_ranks
@pytest.mark.parametrize("which", range(4))
def test_an_error_on_one_rank_ends_all_with_it_and_the_same_call_resumes(ranks, folder, alone, tmp_path, which) -> None:
    want, norms = alone
    path = str(tmp_path / "sweep.jsonl")
    found = ranks.run(2, jobs.sweeps, folder, path, (ZeroDivisionError("no"), norms[which]))
    said = [text.removesuffix(" It was raised on rank " + str(which % 2) + ".") for text, _ in found]
    assert said[0] == said[1]
    assert "EvaluationError: evaluating" in said[0]
    assert "ZeroDivisionError: no" in said[0]
    assert found[which % 2][0] == said[0]  # the rank of the error raises its own
    kept = len(lines(tmp_path / "sweep.jsonl"))
    assert kept == which + (which % 2 == 0)  # what the other rank has evaluated meanwhile is kept
    again = ranks.run(2, jobs.sweeps, folder, path)
    for results, _ in again:  # the file has the losses of examples to seven digits
        assert [one[:6] for one in results] == [one[:6] for one in want]
    assert sorted(norm for _, own in again + found for norm in own) == sorted(norms)


@in_ranks
def test_what_ranks_have_kept_is_resumed_by_one_process_and_the_reverse(ranks, folder, alone, tmp_path) -> None:
    path = tmp_path / "sweep.jsonl"
    ranks.run(2, jobs.sweeps, folder, str(path))
    assert jobs.sweeps(folder, str(path), parallel=False)[1] == []
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    assert len(jobs.sweeps(folder, str(path), (ValueError(), alone[1][6]), parallel=False)[1]) == 2
    found = ranks.run(2, jobs.sweeps, folder, str(path))
    assert sum(len(own) for _, own in found) == len(alone[1]) - 6


@in_ranks
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt(), ["KeyboardInterrupt:", "KeyboardInterrupt:  It was raised on rank 1."]),
        (SystemExit(3), ["SystemExit: 3", "SystemExit: 3 It was raised on rank 1."]),
    ],
)
def test_an_interrupt_on_one_rank_interrupts_all(ranks, folder, alone, error, said) -> None:
    found = [text for text, _ in ranks.run(2, jobs.sweeps, folder, None, (error, alone[1][1]))]
    assert found == said[::-1]


@in_ranks
def test_what_fails_on_rank_0_alone_ends_all_ranks(ranks, folder, tmp_path) -> None:
    full = ranks.run(2, jobs.has_a_full_disk, folder, str(tmp_path / "sweep.jsonl"))
    assert all("No space left on device" in text for text in full)
    assert "raised on rank 0" in full[1]
    outside = ranks.run(2, jobs.raises_outside, folder)
    assert outside == ["KeyError: 'progress'", "KeyError: 'progress' It was raised on rank 0."]


@in_ranks
def test_ranks_that_are_called_with_other_arguments_are_refused_before_they_evaluate(ranks, folder) -> None:
    found = ranks.run(2, jobs.sweeps_with_other_arguments, folder)
    assert found[0] == found[1]
    assert "all ranks must evaluate the same averages of one record in the same way (got options" in found[0]


@in_ranks
def test_a_sweep_on_one_rank_alone_sends_no_message(ranks, folder, alone) -> None:
    assert ranks.run(2, jobs.sweeps_on_rank_0, folder)[0] == alone


@in_ranks
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_model_that_communicates_is_evaluated_by_all_ranks_together(ranks, folder, kind) -> None:
    want, calls = jobs.sweeps_a_model("full", folder)
    found = ranks.run(2, jobs.sweeps_a_model, kind, folder)
    assert [(results, own) for results, own in found] == [(want, calls)] * 2


@in_ranks
def test_an_evaluation_that_communicates_unseen_is_refused_by_name_and_nothing_of_it_is_kept(
    ranks, folder, tmp_path
) -> None:
    path = tmp_path / "sweep.jsonl"
    found = ranks.run(2, jobs.communicates_unseen, folder, str(path))
    assert found[0] == found[1]
    assert "ShardingError: ranks that evaluate different averages must not communicate" in found[0]
    assert "parallel='together'" in found[0]
    assert not path.read_text()
    first, second = ranks.run(2, partial(jobs.communicates_unseen, parallel="together"), folder, str(path))
    assert first == second
    assert [one[2]["value"] for one in first] == pytest.approx([3 * norm for norm in norms_of(folder)])


def norms_of(folder) -> list[float]:
    return [one[2]["value"] for one in jobs.plain(sweep(folder, norm, jobs.HALF_LIVES, refine=0))]


def norm(state) -> float:
    return float(state["0.weight"].norm())


@in_ranks
def test_ranks_that_evaluate_together_must_get_the_same_value(ranks, folder) -> None:
    found = ranks.run(2, jobs.has_its_own_value, folder)
    assert all("must get the same value (got 1 on rank 0 and 2 on rank 1 for newest mean)" in text for text in found)


@in_ranks
def test_ranks_recommend_what_one_process_recommends(ranks, folder) -> None:
    (want, error, calls), *_ = ranks.run(1, jobs.recommends, folder)
    found = ranks.run(2, jobs.recommends, folder)
    assert [one[:2] for one in found] == [(want, error)] * 2
    assert sum(one[2] for one in found) == calls


@in_ranks
def test_ranks_sweep_the_record_that_rank_0_has_opened(ranks, tmp_path) -> None:
    record(tmp_path / "run")
    first, second = ranks.run(2, jobs.sweeps_a_live_record, str(tmp_path / "run"))
    assert first == second
    assert first == jobs.sweeps(str(tmp_path / "run"), parallel=False)[0]


# In one process


@pytest.mark.slow
def test_one_process_alone_sweeps_in_parallel_as_it_does_otherwise(folder, alone) -> None:
    assert jobs.sweeps(folder, parallel=True) == alone


def test_another_parallel_is_refused_by_name(folder) -> None:
    with pytest.raises(ArgumentError, match="parallel must be True, False or 'together' .got 'ranks'."):
        sweep(folder, norm, parallel="ranks")


def test_an_error_that_cannot_be_sent_is_told_in_words() -> None:
    sent = portable(jobs.OddError("a hole", where="the data"), 3)
    assert isinstance(sent, polyak.ShardingError)
    assert "rank 3 raised OddError: a hole in the data" in str(sent)
    assert is_of_another_rank(sent)
    known = portable(polyak.MismatchError("the model:", missing=["a"]), 1)
    assert isinstance(known, polyak.MismatchError)
    assert known.missing == ["a"]


class Divided(nn.Linear):
    """A model of several ranks, as far as the tests below are concerned."""


MODELS = [nn.Linear(1, 1), Divided(1, 1)]
HELD = SimpleNamespace(models={"one": MODELS[1]})


def helper(state):
    return [MODELS[0](x) for x in state]


class Validation:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, state) -> float:
        return self.loss(state)

    def loss(self, state) -> float:
        return float(self.model(state))


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda state: [model(state) for model in MODELS], True),
        (lambda state: [helper(state)], True),
        (lambda state: HELD, True),
        (partial(lambda model, state: model(state), Divided(1, 1)), True),
        (lambda state, model=MODELS[1]: model(state), True),
        (Validation(Divided(1, 1)), True),
        (Validation(Divided(1, 1)).loss, True),
        (Validation(nn.Linear(1, 1)), False),
        (norm, False),
        (torch.norm, False),
    ],
    ids=["global", "helper", "attribute", "partial", "default", "object", "method", "full", "none", "builtin"],
)
def test_a_model_is_seen_where_a_function_has_it(monkeypatch, function, found) -> None:
    monkeypatch.setattr(together, "_is_divided", lambda model: isinstance(model, Divided))
    assert together.communicates(function) == found


def test_a_model_is_seen_in_a_closure_and_a_name_that_is_not_bound_yet_is_none(monkeypatch) -> None:
    monkeypatch.setattr(together, "_is_divided", lambda model: isinstance(model, Divided))

    def function(state):
        return model(state), later

    model = Divided(1, 1)
    assert together.communicates(function)
    model = nn.Linear(1, 1)
    assert not together.communicates(function)
    later = None
