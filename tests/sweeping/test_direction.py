"""Whether a sweep minimizes or maximizes a metric, and what it says where nobody tells it."""

import pytest
from records import record, validate

from polyak.sweeping import EvaluationError, sweep
from polyak.sweeping.direction import asked, direction


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("direction") / "run"
    record(folder, updates=64)
    return folder


@pytest.mark.parametrize(
    "name",
    ["loss", "val_loss", "eval/loss", "valLoss", "cross_entropy", "Perplexity", "word error", "mse", "FID", "bpb"],
)
def test_a_metric_that_is_sure_to_be_a_loss_is_minimized(name) -> None:
    assert direction(name, "validate", maximize=None) is False


@pytest.mark.parametrize(
    "name", ["accuracy", "val_acc", "f1", "macroF1", "bleu", "ROC_AUC", "psnr", "eval/accuracy", "mIoU", "win_rate"]
)
def test_a_metric_whose_higher_values_are_better_is_an_error_without_a_direction(name) -> None:
    with pytest.raises(EvaluationError, match=r"higher is usually better\); say so with --maximize or --minimize"):
        direction(name, "validate", maximize=None)
    assert direction(name, "validate", maximize=True) is True


@pytest.mark.parametrize("name", ["fitness", "accuracy_loss", "log_likelihood", "top1_error_accuracy", ""])
def test_a_name_that_does_not_say_the_direction_is_an_error(name) -> None:
    with pytest.raises(EvaluationError, match="its name does not say it"):
        direction(name, "validate", maximize=None)


def test_a_number_without_a_name_is_a_loss_unless_the_name_of_the_function_says_otherwise() -> None:
    assert direction("value", "validate", maximize=None) is False
    with pytest.raises(EvaluationError, match="higher value of accuracy is better"):
        direction("value", "accuracy", maximize=None)


def test_maximize_and_minimize_must_not_contradict_each_other() -> None:
    assert [asked(maximize=True, minimize=False), asked(maximize=None, minimize=True)] == [True, False]
    assert asked(maximize=None, minimize=None) is None
    with pytest.raises(EvaluationError, match="must not both be True"):
        asked(maximize=True, minimize=True)


def test_sweep_says_so_before_any_evaluation_if_the_metric_is_named_and_after_the_first_if_not(folder) -> None:
    calls = []

    def evaluate(state):
        calls.append(1)
        return {"accuracy": 0.5, **validate(state)}

    with pytest.raises(EvaluationError, match="higher accuracy is better"):
        sweep(folder, evaluate, metric="accuracy")
    assert not calls
    with pytest.raises(EvaluationError, match="higher accuracy is better"):
        sweep(folder, evaluate)
    assert len(calls) == 1
    assert sweep(folder, evaluate, points=2, refine=0, metric="loss").maximize is False
    assert sweep(folder, evaluate, points=2, refine=0, maximize=True).maximize is True
