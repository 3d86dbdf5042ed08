"""MosaicML Composer as a host, run by the real thing: the contract of all hosts, and the table of what Composer gets
wrong, each row by its number."""

import re
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import loops
import numpy as np
import pytest
import torch
from paths import ROOT
from torch import Tensor, nn
from torch.utils.data import DataLoader

import polyak
from polyak import LoanError, MismatchError, PlanWarning, QuarantineWarning, Record
from polyak.averaging.swap import swap_of

if find_spec("mcli") is None:
    pytest.skip("Composer needs stubs: PYTHONPATH=tests/stubs pytest ..., as in `make test`", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Composer's own
    from composer.algorithms.ema import ema as composers
    from composer.core import DataSpec
    from composer.loggers import InMemoryLogger
    from composer_script import Keeps, trainer

    from polyak.hosts.composer import EMA, EMAParameters, Hosted, Recorder, compute_ema

from host_contract import HostContract, Plan, Session, num_tokens

# Composer's own warnings are not ours to mend; ours are asked for where they are to come.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::polyak.errors.PlanWarning"),
    pytest.mark.filterwarnings("ignore:training has waited:polyak.errors.PlanWarning"),  # disks differ
    # As in all tests: these average a few batches.
    pytest.mark.filterwarnings("ignore:the average that is .* is mostly its first weights:polyak.errors.PlanWarning"),
    pytest.mark.filterwarnings("ignore:raw weights are .* averaging has not begun:polyak.errors.PlanWarning"),
]


class ComposerSession:
    def __init__(self, net: nn.Module, algorithm: polyak.EMA, folder: Path, plan: Plan) -> None:
        self.net, self.algorithm, self.folder, self.plan = net, algorithm, folder, plan
        self.trainer: Any = None
        self.log = InMemoryLogger()
        self.handle = Hosted(algorithm, eval_weights=plan.eval_weights)

    def fit(self, resume: Path | None = None) -> None:
        self.trainer = self.trainer or self._made(resume)
        self.trainer.fit()

    def _made(self, resume: Path | None) -> Any:
        plan = self.plan
        loader = DataLoader(plan.data, batch_size=loops.BATCH * plan.accumulate, shuffle=plan.shuffle)
        made = trainer(
            self.folder,
            self.handle,
            net=self.net,
            train_dataloader=DataSpec(loader, get_num_tokens_in_batch=num_tokens if plan.counted else None),
            device_train_microbatch_size=loops.BATCH,
            max_duration=f"{plan.epochs}ep",
            save=f"{plan.save_every}ba" if plan.save_every else None,
            loggers=self.log,
            load_path=str(resume) if resume else None,
            **({} if plan.evaluate else {"eval_dataloader": None}),
        )
        return scaled(made, plan.scaler) if plan.scaled else made

    @property
    def trained(self) -> nn.Module:
        return self.trainer.state.model

    def evaluate(self) -> None:
        self.trainer.eval(self.plan.eval_loader)

    def evaluate_both(self) -> None:  # `eval` with data evaluates these data once, with the average
        self.trainer.eval()

    def predict(self) -> None:
        self.trainer.predict(self.plan.eval_loader)

    def save(self) -> Path:
        return Path(self.trainer.save_checkpoint(str(self.folder / "by-hand.pt")))

    def logged(self, name: str) -> list[float]:
        return [float(value) for _, value in self.log.data[name]]

    def checkpoint(self, step: int) -> Path:
        (found,) = self.folder.glob(f"ep*-ba{step}-rank0.pt")
        return found


def scaled(made: Any, scaler: Any) -> Any:
    """Let a trainer on the CPU scale its gradients, as Composer does on a GPU with fp16."""
    made._use_closures = lambda: False
    made._use_grad_scaling = lambda *args: True
    made.state.scaler = scaler
    return made


class ComposerHost:
    lacks: Mapping[str, str] = {
        "random mid-epoch": "inside an epoch of shuffled data, Composer itself draws another order"
    }
    losses = "metrics/eval/CrossEntropy", "metrics/eval_raw/CrossEntropy"
    uncounted = ("tok", "iter")
    known_late = uncounted
    golden = """
        init before_load after_load fit_start iteration_start
        epoch_start batch_start batch_end batch_checkpoint
        batch_start batch_end batch_checkpoint save_start save_end
        epoch_end eval_before_all eval_start eval_end eval_after_all epoch_checkpoint
        epoch_start batch_start batch_end batch_checkpoint
        batch_start batch_end batch_checkpoint save_start save_end
        epoch_end eval_before_all eval_start eval_end eval_after_all epoch_checkpoint
        fit_end
    """

    def session(self, net: nn.Module, algorithm: polyak.EMA, folder: Path, plan: Plan) -> Session:
        return ComposerSession(net, algorithm, folder, plan)

    def loadable(self, saved: Path) -> Mapping[str, Tensor]:
        return torch.load(saved, weights_only=False)["state"]["model"]


HOST = ComposerHost()


class TestContract(HostContract):
    host = HOST


def run(folder: Path, *algorithms: Any, noisy: bool = True, seed: int = 0, **options: Any) -> Any:
    """Train with a callback that keeps the weights; return the trainer, which has it as ``keeps``."""
    made = trainer(
        folder,
        *algorithms,
        net=loops.noisy_perceptron(seed) if noisy else loops.perceptron(seed),
        **{"callbacks": Keeps(), **options},
    )
    made.keeps = next(c for c in made.state.callbacks if isinstance(c, Keeps))
    return made


def saved(folder: Path, batch: int) -> Path:
    (found,) = folder.glob(f"ep*-ba{batch}-rank0.pt")
    return found


def compare(whole: Any, resumed: Any) -> list[str]:
    ends = [[loops.bits(t.state.model), *(a.state_dict() for a in t.state.algorithms)] for t in (whole, resumed)]
    return loops.differences(*ends)


PLANS = {
    "batches": {"half_life": "4ba"},
    "epochs": {"half_life": "1ep"},
    "fractions of epochs": {"half_life": "0.5ep", "update_interval": "2ba"},
    "stride": {"half_life": "8ba", "update_interval": "4ba"},
    "late start": {"half_life": "4ba", "ema_start": "0.4dur"},
    "start in epochs": {"half_life": "4ba", "ema_start": "1ep"},
    "smoothing": {"smoothing": 0.8},
    "samples": {"half_life": "20sp"},
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
def test_a_resumed_run_equals_one_that_never_stopped_in_weights_average_and_state(tmp_path, plan):
    options = {"max_duration": "12ba"}
    whole = run(tmp_path / "whole", EMA(**plan), **options)
    whole.fit()
    for batch in (6, 9):
        loops.disturb()
        path = saved(tmp_path / "whole", batch)
        resumed = run(tmp_path / f"resumed{batch}", EMA(**plan), seed=9, load_path=str(path), **options)
        resumed.fit()
        assert compare(whole, resumed) == []
        assert loops.differences(whole.keeps.trained[12], resumed.keeps.trained[12]) == []


def test_at_the_end_of_an_epoch_resuming_is_exact_with_shuffled_data_and_dropout(tmp_path):
    whole = run(tmp_path / "whole", EMA("4ba"), shuffle=True)
    whole.fit()
    loops.disturb()
    resumed = run(tmp_path / "b", EMA("4ba"), shuffle=True, load_path=str(saved(tmp_path / "whole", 6)), seed=7)
    resumed.fit()
    assert compare(whole, resumed) == []


def test_with_shuffled_data_composer_itself_does_not_resume_exactly_inside_an_epoch(tmp_path):
    # If this fails, Composer was mended: take "random mid-epoch" out of what it lacks.
    whole = run(tmp_path / "whole", shuffle=True)
    whole.fit()
    loops.disturb()
    resumed = run(tmp_path / "b", shuffle=True, load_path=str(saved(tmp_path / "whole", 9)), seed=7)
    resumed.fit()
    assert compare(whole, resumed) != []


# Row 1


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The weights after each batch of a run without an average."""
    made = run(tmp_path_factory.mktemp("plain"), noisy=False, save=None, eval_dataloader=None)
    made.fit()
    return made.keeps.trained


@pytest.fixture(scope="module", params=["4ba", "1ep"])
def alone(request, tmp_path_factory):
    """A half-life, and the state of the average of a run without evaluations and checkpoints."""
    ema = EMA(request.param)
    run(tmp_path_factory.mktemp("alone"), ema, noisy=False, save=None, eval_dataloader=None).fit()
    return request.param, ema.state_dict()


@pytest.mark.parametrize("save", ["1ba", "1ep", lambda state, event: np.bool_(True)], ids=["1ba", "1ep", "row 11"])
def test_saving_and_evaluating_change_nothing_in_training(tmp_path, plain, alone, save):
    half_life, state_alone = alone
    ema = EMA(half_life)
    averaged = run(tmp_path / "b", ema, noisy=False, save=save)
    averaged.fit()
    assert loops.differences(plain, averaged.keeps.trained) == []
    assert loops.differences(state_alone, ema.state_dict()) == []
    newest = max((tmp_path / "b").glob("ep*.pt"), key=lambda path: path.stat().st_mtime_ns)
    found = torch.load(newest, weights_only=False)["state"]
    ((_, state),) = found["algorithms"]
    assert loops.differences(dict(state["ema_model"]), dict(found["model"])) == []
    assert loops.differences(loops.bits(averaged.state.model), dict(state["training_model"])) == []


# Row 2


def test_a_state_that_composer_saved_under_ddp_fits(tmp_path):
    whole = run(tmp_path / "a", composers.EMA("4ba"), noisy=False)
    whole.fit()
    path = saved(tmp_path / "a", 9)
    file = torch.load(path, weights_only=False)
    ((name, state),) = file["state"]["algorithms"]
    held = state["ema_model"]
    for kind in held:
        held[kind] = {f"module.{key}": tensor for key, tensor in held[kind].items()}
    file["state"]["algorithms"] = [(name, state)]
    torch.save(file, tmp_path / "ddp.pt")
    ema = EMA("4ba")
    resumed = run(tmp_path / "b", ema, noisy=False, seed=7, load_path=str(tmp_path / "ddp.pt"))
    assert loops.differences(loops.bits(resumed.state.model), whole.keeps.trained[9]) == []
    resumed.fit()
    assert loops.differences(loops.bits(resumed.state.model), whole.keeps.trained[18]) == []


# Row 3


@pytest.fixture
def one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_model_under_fsdp1_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(NotImplementedError, match="FSDP1 keeps flat parameters"):
        run(tmp_path, EMA("4ba"), parallelism_config={"fsdp": {}})


# Row 4


def test_a_second_average_in_one_trainer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one average at a time"):
        run(tmp_path, EMA("4ba"), Hosted(polyak.EMA("8ba")))
    with pytest.raises(ValueError, match="one average at a time"):
        run(tmp_path, EMA("4ba"), composers.EMA("4ba"))
    with pytest.raises(ValueError, match="one state for each class"):
        run(tmp_path, Recorder(tmp_path / "r", "3ba"), Recorder(tmp_path / "s", "3ba"))


# Row 5


@pytest.mark.parametrize("save", ["7ba", "18ba", "1ep", None], ids=str)
def test_fit_leaves_training_weights_and_predict_and_save_see_the_average(tmp_path, save):
    ema = EMA("4ba")
    made = run(tmp_path, ema, save=save)
    made.fit()
    training = made.keeps.trained[18]
    assert loops.differences(training, loops.bits(made.state.model)) == []
    made.predict(DataLoader(loops.dataset(2), batch_size=loops.BATCH))
    assert loops.differences([loops.averaged(ema)] * 2, made.keeps.of("predict_batch_start")) == []
    for weights_only in (False, True):
        path = made.save_checkpoint(str(tmp_path / f"{weights_only}.pt"), weights_only=weights_only)
        model = torch.load(path, weights_only=False)["state"]["model"]
        assert loops.differences(loops.averaged(ema), dict(model)) == []
    assert loops.differences(training, loops.bits(made.state.model)) == []
    assert all(
        any(loops.differences(t, w) == [] for t in made.keeps.trained.values())
        for w in made.keeps.of("batch_start")[1:] + made.keeps.of("fit_end")
    )


# Row 6


@pytest.mark.parametrize(
    ("event", "error"),
    [
        ("eval_batch_start", KeyboardInterrupt()),
        ("eval_end", RuntimeError("planned")),
        ("predict_batch_start", KeyboardInterrupt()),
        ("batch_end", RuntimeError("planned")),
        ("epoch_end", KeyboardInterrupt()),
    ],
    ids=lambda one: one if isinstance(one, str) else type(one).__name__,
)
def test_an_exception_leaves_training_weights_and_the_run_continues(tmp_path, event, error):
    ema = EMA("4ba")
    made = run(tmp_path, ema, callbacks=Keeps({event: error}, at=6), save=None)
    with pytest.raises(type(error)):
        made.fit()
        made.predict(DataLoader(loops.dataset(2), batch_size=loops.BATCH))
    assert swap_of(made.state.model) is None
    assert not ema.ema_weights_active
    assert loops.differences(max(made.keeps.trained.items())[1], loops.bits(made.state.model)) == []


def test_an_exception_while_saving_leaves_training_weights(tmp_path, monkeypatch):
    made = run(tmp_path, EMA("4ba"))
    monkeypatch.setattr(torch, "save", lambda *args, **options: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        made.fit()
    assert swap_of(made.state.model) is None
    assert loops.differences(made.keeps.trained[3], loops.bits(made.state.model)) == []


# Row 7


@pytest.mark.parametrize(
    ("start", "duration", "updates"), [("0.5dur", "2ep", 6), ("0.5dur", "12ba", 6), ("1ep", "2ep", 6)]
)
def test_averaging_starts_at_ema_start(tmp_path, start, duration, updates):
    ema = EMA("2ba", ema_start=start)
    run(tmp_path, ema, save=None, max_duration=duration).fit()
    assert ema.num_updates == updates


@pytest.mark.parametrize(
    ("options", "duration"), [({"half_life": "4ba", "ema_start": "1ep"}, "1ep"), ({"half_life": "1ep"}, "5ba")]
)
def test_an_average_that_cannot_start_within_the_run_warns_with_both_numbers(tmp_path, options, duration):
    with pytest.warns(PlanWarning, match=r"\d+ba"):
        run(tmp_path, EMA(**options), save=None, max_duration=duration).fit()


# Row 8


@pytest.mark.parametrize("options", [{"half_life": "0ba"}, {"half_life": "infba"}, {"smoothing": 0.9}], ids=str)
def test_every_documented_form_of_the_half_life_works(tmp_path, options):
    ema = EMA(**options)
    made = run(tmp_path, ema, save=None, max_duration="2ep")
    made.fit()
    average = loops.averaged(ema)
    if options == {"half_life": "0ba"}:
        assert loops.differences(average, loops.bits(made.state.model)) == []
    if options == {"half_life": "infba"}:
        parameters = [name for name in average if "running" not in name and "num_batches" not in name]
        assert loops.differences(*({n: w[n] for n in parameters} for w in (made.keeps.trained[1], average))) == []


@pytest.mark.parametrize("options", [{"half_life": "-10ba"}, {"smoothing": 1.5}, {"smoothing": float("nan")}], ids=str)
def test_arguments_that_make_no_sense_are_a_value_error(options):
    with pytest.raises(ValueError, match="got"):
        EMA(**options)


# Rows 9 and 13


def test_the_average_counts_batches_as_the_model_does_and_keeps_a_nan_out(tmp_path):
    class Spoils(Keeps):
        def run_event(self, event: Any, state: Any, logger: Any) -> None:
            super().run_event(event, state, logger)
            if event.value == "batch_start" and int(state.timestamp.batch) == 4:
                self.kept = loops.bits(state.model)
                with torch.no_grad():
                    state.model.net[0].weight.fill_(float("nan"))
            if event.value == "batch_end" and int(state.timestamp.batch) == 5:
                state.model.load_state_dict(self.kept)

    ema = EMA("4ba")
    with pytest.warns(QuarantineWarning):
        made = run(tmp_path, ema, callbacks=Spoils(), save=None)
        made.fit()
    assert ema.num_quarantined > 0
    average = loops.averaged(ema)
    assert all(tensor.isfinite().all() for tensor in average.values())
    (name,) = [name for name in average if name.endswith("num_batches_tracked")]
    assert torch.equal(average[name], loops.bits(made.state.model)[name])


# Row 10


def test_the_average_of_a_bfloat16_model_is_float32_and_the_swap_restores_its_bits(tmp_path):
    ema = EMA("4ba")
    net = loops.perceptron().bfloat16()
    data = torch.utils.data.TensorDataset(loops.dataset()[:][0].bfloat16(), loops.dataset()[:][1])
    made = trainer(tmp_path, ema, net=net, data=data, callbacks=Keeps(), eval_dataloader=None)
    made.fit()
    (keeps,) = [c for c in made.state.callbacks if isinstance(c, Keeps)]
    assert {tensor.dtype for tensor in loops.averaged(ema).values()} == {torch.float32}
    assert loops.differences(keeps.trained[18], loops.bits(made.state.model)) == []


# Row 12


def test_a_checkpoint_names_the_weights_that_it_holds_and_another_half_life_warns(tmp_path):
    whole = run(tmp_path / "a", EMA("4ba"))
    whole.fit()
    path = saved(tmp_path / "a", 9)
    ((_, state),) = torch.load(path, weights_only=False)["state"]["algorithms"]
    assert loops.differences(whole.keeps.trained[9], dict(state["training_model"])) == []
    with pytest.warns(PlanWarning, match=r"4, 'ba'.*9, 'ba'"):
        run(tmp_path / "b", EMA("9ba"), load_path=str(path))


# Row 14 is of compute_ema, for which tests/averaging/test_composer_table.py measures. Row 15


def test_the_default_half_life_on_a_short_run_warns(tmp_path):
    with pytest.warns(PlanWarning, match="the first weights"):
        run(tmp_path, EMA(), save=None, max_duration="18ba").fit()


# What else a host does


def test_an_evaluator_named_raw_sees_the_training_weights(tmp_path):
    ema = EMA("4ba")
    made = run(tmp_path, ema, save=None, raw=True)
    made.fit()
    (*_, last) = made.keeps.of("eval_batch_start eval_raw")
    assert loops.differences(made.keeps.trained[18], last) == []
    (*_, last) = [w for name, w in made.keeps.seen if name == "eval_batch_start eval"]
    assert loops.differences(loops.averaged(ema), last) == []


def test_a_step_that_mixed_precision_skips_does_not_count(tmp_path):
    class Overflows(Keeps):
        def run_event(self, event: Any, state: Any, logger: Any) -> None:
            super().run_event(event, state, logger)
            if event.value == "after_loss" and int(state.timestamp.batch) in {2, 7}:
                state.loss = state.loss * float("inf")

    ema = EMA("4ba")
    made = run(tmp_path, ema, noisy=False, callbacks=Overflows(), save=None)
    scaled(made, torch.amp.GradScaler("cpu", init_scale=2.0**4))
    made.fit()
    assert ema.num_updates == 18 - 2 - 1
    assert ema.state_dict()["updated_at"]["batch"] == 16
    weights = [made.keeps.trained[b] for b in range(1, 19) if b not in {3, 8}]
    want, kept = {n: t.double() for n, t in weights[0].items()}, 0.5**0.25
    for step in weights[1:]:
        want = {name: kept * want[name] + (1 - kept) * tensor.double() for name, tensor in step.items()}
    for name, tensor in loops.averaged(ema).items():
        torch.testing.assert_close(tensor.double(), want[name], rtol=1e-5, atol=1e-6)


def test_a_record_is_kept_and_a_resumed_run_rewinds_it(tmp_path):
    def record(folder: Path, **options: Any) -> Any:
        return run(folder, Recorder(tmp_path / "record", "2ba"), EMA("4ba"), **options)

    record(tmp_path / "a", shuffle=False).fit()
    profile = polyak.HalfLife("4ba", unbiased=True)
    want = Record(tmp_path / "record").average(profile)
    resumed = record(tmp_path / "b", load_path=str(saved(tmp_path / "a", 9)), seed=5)
    resumed.fit()
    assert loops.differences(want, Record(tmp_path / "record").average(profile)) == []
    assert next(iter(resumed.state.algorithms)).num_updates == 18


def test_a_record_is_closed_after_an_exception(tmp_path):
    made = run(
        tmp_path,
        Recorder(tmp_path / "record", "2ba"),
        callbacks=Keeps({"batch_start": OSError("planned")}, at=11),
        save=None,
    )
    with pytest.raises(OSError, match="planned"):
        made.fit()
    assert Record(tmp_path / "record").average(polyak.HalfLife("4ba", unbiased=True), "11ba")


def test_the_parameters_of_composers_functional_form_average_swap_and_copy():
    model, other = loops.perceptron(0), loops.perceptron(1)
    begun = loops.bits(model)
    average = EMAParameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    training = loops.bits(model)
    compute_ema(model, average, smoothing=0.75)
    average.swap_params(model)
    for name, tensor in loops.bits(model).items():
        torch.testing.assert_close(tensor, begun[name] + 0.25)
    with pytest.raises(LoanError):
        compute_ema(model, average, smoothing=0.75)
    average.swap_params(model)
    assert loops.differences(training, loops.bits(model)) == []
    average.transfer_ema_params(other)
    assert loops.differences(dict(average.named_parameters()), dict(loops.bits(other))) == []
    assert dict(average.named_buffers()) == {}
    with pytest.raises(MismatchError, match="another"):
        average.swap_params(other)
    compute_ema(model, other, smoothing=0.0)
    assert loops.differences(training, loops.bits(other)) == []


def test_the_script_of_the_page_runs(tmp_path, monkeypatch):
    page = ROOT / "docs" / "hosts" / "composer.md"
    if not page.exists():
        pytest.skip("the documentation is not here")
    monkeypatch.chdir(tmp_path)
    script, going_on = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert script.count("\n") < 40
    names: dict[str, Any] = {"__name__": "__page__"}
    exec(compile(script, str(page), "exec"), names)
    made = names["trainer"]
    made._checkpoint_saver.tmp_dir_for_symlink.cleanup()
    (ema,) = made.state.algorithms
    averaged = torch.load("averaged.pt", weights_only=False)["state"]["model"]
    assert loops.differences(loops.averaged(ema), dict(averaged)) == []
    exec(compile(going_on, str(page), "exec"), names)
    training = torch.load("training.pt", weights_only=False)["state"]["model"]
    assert loops.differences(loops.bits(made.state.model), dict(training)) == []


# Which weights are evaluated


def test_with_both_each_evaluator_of_the_trainer_has_one_of_the_training_weights_also_after_a_resume(tmp_path):
    log = InMemoryLogger()
    options = {"eval_weights": "both", "half_life": "4ba"}
    whole = run(tmp_path / "whole", EMA(**options), loggers=log)
    assert [evaluator.label for evaluator in whole.state.evaluators] == ["eval_raw", "eval"]
    whole.fit()
    end = int(whole.state.timestamp.batch)
    assert loops.differences(whole.keeps.of("eval_batch_start eval_raw")[-1], whole.keeps.trained[end]) == []
    assert loops.differences(whole.keeps.of("eval_batch_start eval")[-1], whole.keeps.trained[end])
    assert {"metrics/eval/CrossEntropy", "metrics/eval_raw/CrossEntropy"} <= log.data.keys()
    resumed = run(tmp_path / "resumed", EMA(**options), seed=9, load_path=str(saved(tmp_path / "whole", 9)))
    resumed.fit()
    assert compare(whole, resumed) == []
    values = [float(whole.state.eval_metrics[label]["CrossEntropy"].compute()) for label in ("eval", "eval_raw")]
    resumed.eval()
    assert values == [
        pytest.approx(float(resumed.state.eval_metrics[label]["CrossEntropy"].compute()))
        for label in ("eval", "eval_raw")
    ]
    assert values[0] != pytest.approx(values[1])


def test_raw_weights_are_evaluated_and_the_average_is_saved(tmp_path):
    made = run(tmp_path, EMA("4ba", eval_weights="raw"))
    made.fit()
    end = int(made.state.timestamp.batch)
    assert loops.differences(made.keeps.of("eval_batch_start eval")[-1], made.keeps.trained[end]) == []
    state = torch.load(saved(tmp_path, end), weights_only=False)["state"]["model"]
    assert loops.differences(dict(state), made.keeps.trained[end])


def test_another_value_of_eval_weights_is_refused_and_the_old_one_is_deprecated():
    with pytest.raises(ValueError, match="eval_weights must be 'averaged', 'raw' or 'both' .got 'best'"):
        EMA("4ba", eval_weights="best")
    with pytest.warns(DeprecationWarning, match="write 'raw'"):
        Hosted(polyak.EMA("4ba"), eval_weights="training")


def test_an_optimizer_that_is_replaced_in_mid_run_is_noticed(tmp_path):
    class Replaces(Keeps):
        def run_event(self, event: Any, state: Any, logger: Any) -> None:
            if event.value == "epoch_start" and int(state.timestamp.epoch) == 1:
                state.optimizers = torch.optim.SGD(state.model.parameters(), lr=0.1)

    made = run(tmp_path, EMA("4ba"), callbacks=Replaces())
    with pytest.warns(polyak.PlanWarning, match="steps must be counted.*1 of SGD, which steps the same parameters"):
        made.fit()
