"""The ``Trainer`` of Transformers, held to the contract, and to what only it can get wrong."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import loops
import pytest
import torch
from host_contract import HostContract, Overflows, Plan, Run, Session, Watched, loss_of, native, net_of, of_net
from torch import Tensor, nn

from polyak import EMA, Event, HalfLife, LoanError, MismatchError, PlanWarning, Record, Recorder
from polyak.averaging.weights import Shadow

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
safetensors_torch = pytest.importorskip("safetensors.torch")
from polyak.hosts.transformers import STATE_NAME, attach  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Classifier(nn.Module):
    main_input_name = "x"

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def collate(samples: list[Any]) -> dict[str, Tensor]:
    inputs, labels = zip(*samples, strict=True)
    return {"x": torch.stack(inputs), "labels": torch.stack(labels)}


class TransformersSession:
    def __init__(
        self,
        net: nn.Module,
        algorithms: Any,
        folder: Path,
        plan: Plan,
        eval_weights: Any = None,
        **arguments: Any,
    ) -> None:
        self.folder, self.plan = folder, plan
        model = self.trained = net if isinstance(net, Classifier) else Classifier(net)
        self.trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                **{
                    "output_dir": str(folder),
                    "num_train_epochs": plan.epochs,
                    "per_device_train_batch_size": loops.BATCH,
                    "per_device_eval_batch_size": loops.BATCH,
                    "gradient_accumulation_steps": plan.accumulate,
                    "train_sampling_strategy": "random" if plan.shuffle else "sequential",
                    # At steps, as saving: an evaluation at the end of the epoch draws random numbers, so that the
                    # trainer itself does not resume exactly from the checkpoint of the epoch's last step.
                    "eval_strategy": "steps" if plan.evaluate else "no",
                    "eval_steps": plan.steps,
                    "save_strategy": "steps" if plan.save_every else "no",
                    "save_steps": plan.save_every or 1,
                    "max_grad_norm": 0.0,
                    "use_cpu": True,
                    "report_to": "none",
                    "disable_tqdm": True,
                    "include_num_input_tokens_seen": "all" if plan.counted else "no",
                }
                | arguments
            ),
            data_collator=collate,
            train_dataset=plan.data,
            eval_dataset=plan.eval_data,
            optimizers=(optimizer := plan.optimizer(model), torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        )
        self.trainer.accelerator.scaler = plan.scaler  # which it makes for a GPU
        self.handle = attach(algorithms, self.trainer, eval_weights=eval_weights or plan.eval_weights)

    def fit(self, resume: Path | None = None) -> None:
        self.trainer.train(resume_from_checkpoint=None if resume is None else str(resume))

    def evaluate(self) -> None:
        self.trainer.evaluate()

    def predict(self) -> None:
        self.trainer.predict(self.plan.eval_data)

    def save(self) -> Path:
        self.trainer.save_model(str(self.folder / "by-hand"))
        return self.folder / "by-hand"

    def logged(self, name: str) -> list[float]:
        return [line[name] for line in self.trainer.state.log_history if name in line]

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"


class TransformersHost:
    lacks: Mapping[str, str] = {}
    losses = "eval_loss", "eval_raw_loss"
    uncounted = ("tok", "sec", "iter")
    known_late = ()
    golden = """
        init fit_start
        epoch_start batch_start batch_end batch_start batch_end epoch_end eval_start eval_end save_start save_end
        epoch_start batch_start batch_end batch_start batch_end epoch_end eval_start eval_end save_start save_end
        fit_end
    """

    def session(self, net: nn.Module, algorithm: EMA, folder: Path, plan: Plan) -> Session:
        return TransformersSession(net, algorithm, folder, plan)

    def loadable(self, saved: Path) -> Mapping[str, Tensor]:
        return safetensors_torch.load_file(saved / "model.safetensors")


HOST = TransformersHost()


class TestContract(HostContract):
    host = HOST


# Its own traps


def run(folder: Path, algorithms: Any = None, plan: Plan | None = None, net: Any = None, **arguments: Any) -> Run:
    """Return a run whose trainer has arguments of its own."""

    class Host(TransformersHost):
        def session(self, net, algorithm, folder, plan):
            return TransformersSession(net, algorithms or algorithm, folder, plan, **arguments)

    ema = next((one for one in algorithms or () if isinstance(one, Watched)), None)
    return Run(Host(), folder, plan or Plan(), ema, net)


BEST = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "loss"}


def worsening(run: Run, after: int) -> None:
    """Let every evaluation after some steps report a worse loss, so that the best checkpoint is not the last."""
    inner = run.session.trainer.compute_loss

    def compute_loss(model, *args, **kwargs):
        loss, outputs = inner(model, *args, **{**kwargs, "return_outputs": True})
        if not model.training and run.count(Event.BATCH_END) > after:
            loss = loss + 100
        return (loss, outputs) if kwargs.get("return_outputs") else loss

    run.session.trainer.compute_loss = compute_loss


@pytest.mark.parametrize("strategy", ["best", "steps"])
def test_the_best_checkpoint_is_loaded_with_its_training_weights_and_its_average(tmp_path, strategy) -> None:
    arguments = BEST | {
        "save_strategy": strategy,
        "save_steps": 3,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
    }
    best = run(tmp_path, **arguments)
    worsening(best, after=9)
    best.fit()
    state = best.session.trainer.state
    step = state.best_global_step
    assert 0 < step <= 9
    weights, average = best.ema.batches[step - 1]
    assert not loops.differences([weights, average], [best.weights, best.ema.average])
    assert not loops.differences(average, of_net(HOST.loadable(Path(state.best_model_checkpoint))))
    best.session.trainer.compute_loss = type(best.session.trainer).compute_loss.__get__(best.session.trainer)
    assert best.session.trainer.evaluate()["eval_loss"] == pytest.approx(state.best_metric, abs=1e-6)
    assert not loops.differences(weights, best.weights)


def test_each_evaluation_set_and_each_evaluation_by_other_callbacks_sees_the_average(tmp_path) -> None:
    class Asks(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = control.should_save = state.global_step == 4

    asked = run(tmp_path, eval_strategy="steps", eval_steps=1000)
    asked.session.trainer.eval_dataset = {"one": asked.plan.eval_data, "two": asked.plan.eval_data}
    asked.session.trainer.add_callback(Asks())
    asked.fit()
    average = asked.ema.batches[3][1]
    assert not loops.differences([average] * 4, asked.probe.evaluated)
    assert not loops.differences(average, of_net(HOST.loadable(tmp_path / "checkpoint-4")))


def test_a_rotated_folder_of_checkpoints_can_be_resumed(tmp_path) -> None:
    plan = Plan(save_every=3)
    whole = run(tmp_path / "whole", plan=plan, save_total_limit=2).fit()
    assert sorted(path.name for path in (tmp_path / "whole").glob("checkpoint-*")) == ["checkpoint-15", "checkpoint-18"]
    resumed = run(tmp_path / "resumed", plan=plan)
    (tmp_path / "resumed" / "checkpoint-15").symlink_to(tmp_path / "whole" / "checkpoint-15")
    resumed.session.trainer.train(resume_from_checkpoint=True)
    assert not loops.differences([whole.weights, whole.ema.state_dict()], [resumed.weights, resumed.ema.state_dict()])


def test_an_evaluation_at_the_start_of_a_resumed_run_sees_the_average_of_the_checkpoint(tmp_path) -> None:
    whole = run(tmp_path, plan=Plan(save_every=6)).fit()
    resumed = run(tmp_path / "resumed", eval_on_start=True).fit(tmp_path / "checkpoint-6")
    assert not loops.differences([whole.ema.batches[5][1]] * 2, resumed.probe.evaluated[:2])
    assert not loops.differences(whole.weights, resumed.weights)


def test_a_checkpoint_from_before_polyak_can_be_resumed(tmp_path) -> None:
    whole = run(tmp_path, plan=Plan(save_every=6)).fit()
    (tmp_path / "checkpoint-6" / STATE_NAME).unlink()
    late = run(tmp_path / "late", [Watched("2ba", ema_start="8ba")])
    with pytest.warns(PlanWarning, match=f"has no {STATE_NAME}, so it was saved without polyak"):
        late.fit(tmp_path / "checkpoint-6")
    assert late.ema.num_updates == 18 - 8
    assert whole.ema.num_updates == 18 - 1


def test_a_batch_size_found_by_trying_counts_each_step_once(tmp_path) -> None:
    found = run(tmp_path, auto_find_batch_size=True)
    found.probe.raises = ("train", 4, RuntimeError("CUDA out of memory."))
    found.fit()
    # Three steps, then three epochs of smaller batches.
    assert found.count(Event.BATCH_END) == found.probe.trained - 1 > 3 + 18
    assert found.count(Event.FIT_START) == 2
    found.assert_training_weights()


def test_an_epoch_in_which_steps_were_skipped_ends_where_the_trainers_does(tmp_path) -> None:
    skipped = run(tmp_path, plan=Plan(scaled=True))
    Overflows(skipped.net)
    skipped.fit()
    ends = [event for event in skipped.ema.events if event is Event.BATCH_END or event is Event.EPOCH_END]
    assert ends == [*[Event.BATCH_END] * 4, Event.EPOCH_END] * 3


@pytest.mark.parametrize(("limit", "duration"), [({"max_steps": 9}, "9ba"), ({"num_train_epochs": 1.5}, "1.5ep")])
def test_shares_of_the_run_are_of_its_steps_or_epochs_as_it_is_limited(tmp_path, limit, duration) -> None:
    limited = run(tmp_path, [Watched("0.2dur", ema_start="0.5dur")], **limit).fit()
    (attached,) = [cb for cb in limited.session.trainer.callback_handler.callbacks if hasattr(cb, "_loop")]
    assert attached._loop.state.max_duration == duration
    assert len(limited.ema.batches) == limited.session.trainer.state.global_step - 4 == 5
    assert limited.count(Event.EPOCH_END) == 1


def test_a_record_is_kept_next_to_the_average_and_resumed(tmp_path) -> None:
    plan = Plan(save_every=6)
    algorithms = [Watched("4ba"), Recorder(tmp_path / "record", "2ba")]
    whole = run(tmp_path, algorithms, plan).fit()
    want = Record(tmp_path / "record").average(HalfLife("4ba", unbiased=True))
    resumed = run(tmp_path, [Watched("4ba"), Recorder(tmp_path / "record", "2ba")], plan).fit(
        tmp_path / "checkpoint-12"
    )
    assert not loops.differences(whole.ema.state_dict(), resumed.ema.state_dict())
    assert not loops.differences(want, Record(tmp_path / "record").average(HalfLife("4ba", unbiased=True)))


def test_a_record_is_complete_where_the_best_checkpoint_is_loaded(tmp_path) -> None:
    plan = Plan(epochs=2)
    recorder = Recorder(tmp_path / "record", "2ba")
    best = run(tmp_path, [Watched("2ba"), recorder], plan, **BEST, load_best_model_at_end=True)
    worsening(best, after=6)
    best.fit()
    assert best.session.trainer.state.best_global_step <= 6
    assert Record(tmp_path / "record").stretches[-1].end.updates == 12


@pytest.mark.parametrize("what", ["save", "evaluate"])
def test_a_save_or_an_evaluation_inside_an_evaluation_does_not_end_its_swap(tmp_path, what) -> None:
    class Does(transformers.TrainerCallback):
        done = False

        def on_prediction_step(self, args, state, control, **kwargs):
            if not self.done:
                self.done = True
                getattr(nested.session, what)()

    nested = run(tmp_path).fit()
    nested.session.trainer.add_callback(Does())
    nested.session.evaluate()
    assert not loops.differences([nested.ema.average] * (2 if what == "save" else 4), nested.probe.evaluated)
    if what == "save":
        assert not loops.differences(nested.ema.average, of_net(HOST.loadable(tmp_path / "by-hand")))
    nested.assert_training_weights()


def test_nothing_is_evaluated_or_saved_with_the_average_of_another_owner(tmp_path) -> None:
    one = run(tmp_path).fit()
    with Shadow(one.session.trainer.model).swapped("someone else"):
        for refused in (one.session.evaluate, one.session.predict, one.session.save):
            with pytest.raises(LoanError, match="(average of|one average at a time:) someone else"):
                refused()
    one.assert_training_weights()


def test_an_epoch_that_was_left_is_counted_before_the_next(tmp_path) -> None:
    left = run(tmp_path, [Watched("1ep", update_interval="1ba")])
    left.probe.raises = ("train", 4, RuntimeError("as planned"))
    with pytest.raises(RuntimeError, match="as planned"):
        left.fit()
    left.fit()
    assert (left.count(Event.EXCEPTION), left.count(Event.EPOCH_END)) == (1, 3)
    assert [event for event in left.ema.events if event is Event.BATCH_END or event is Event.EPOCH_END][3:10] == [
        *[Event.BATCH_END] * 6,
        Event.EPOCH_END,
    ]


def test_an_exported_model_has_no_training_state_and_a_recorder_learns_where_a_checkpoint_is(tmp_path) -> None:
    class Hears(Watched):
        def state_dict(self):
            heard.append(attached._loop.state.saving_to)
            return super().state_dict()

    heard: list[Path | None] = []
    hears = run(tmp_path, [Hears("4ba")], Plan(save_every=9))
    (attached,) = [cb for cb in hears.session.trainer.callback_handler.callbacks if hasattr(cb, "_loop")]
    hears.fit()
    assert heard == [tmp_path / "checkpoint-9", tmp_path / "checkpoint-18"]
    assert not (hears.session.save() / STATE_NAME).exists()
    hears.session.trainer.save_model(_internal_call=True)  # as push_to_hub does
    assert not (tmp_path / STATE_NAME).exists()
    assert attached._loop.state.saving_to is None


def test_arguments_that_cannot_work_are_refused_before_training(tmp_path) -> None:
    session = run(tmp_path).session
    with pytest.raises(ValueError, match="attach must be called once for a trainer"):
        attach(EMA("4ba"), session.trainer)
    with pytest.raises(ValueError, match="there can be one"):
        run(tmp_path, [EMA("4ba"), EMA("8ba")])
    session.trainer.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=1)
    session.trainer.is_fsdp_enabled = True
    with pytest.raises(NotImplementedError, match="under FSDP1 it does not"):
        session.fit()


@pytest.mark.filterwarnings("ignore")  # of torch.compile itself
def test_a_compiled_model_is_averaged_as_it_is_inside(tmp_path) -> None:
    plan = Plan(save_every=9, evaluate=True)
    compiled = run(tmp_path, plan=plan, torch_compile=True, torch_compile_backend="eager").fit()
    assert not loops.differences(native(plan, "4ba").batches, compiled.ema.batches)
    compiled.assert_training_weights()
    assert not loops.differences(compiled.ema.average, of_net(HOST.loadable(tmp_path / "checkpoint-18")))
    resumed = run(tmp_path / "resumed", plan=plan).fit(tmp_path / "checkpoint-9")
    assert not loops.differences(compiled.ema.state_dict(), resumed.ema.state_dict())


@pytest.mark.parametrize("choice", ["both", "raw"])
def test_training_weights_can_be_evaluated_too_or_instead(tmp_path, choice) -> None:
    plan = Plan(evaluate=True)
    both = run(tmp_path, plan=plan, eval_weights=choice).fit()
    weights, average = both.ema.batches[5]
    expected = {"both": [weights, weights, average, average], "raw": [weights, weights]}[choice]
    assert not loops.differences(expected, both.probe.evaluated[: len(expected)])
    metrics = both.session.trainer.evaluate()
    assert ("eval_raw_loss" in metrics) == (choice == "both")
    assert metrics.get("eval_raw_loss") != metrics["eval_loss"]
    both.probe.evaluated.clear()
    both.session.predict()
    assert not loops.differences([both.ema.average] * 2, both.probe.evaluated)
    assert not loops.differences(native(plan, "4ba").batches, both.ema.batches)
    with pytest.raises(ValueError, match="eval_weights must be 'averaged', 'raw' or 'both' .got 'best'"):
        run(tmp_path, eval_weights="best")
    with pytest.warns(DeprecationWarning, match="eval_weights='training' is deprecated; write 'raw'"):
        run(tmp_path, eval_weights="training")


@pytest.mark.parametrize("metric", ["loss", "raw_loss"])
def test_with_both_the_best_checkpoint_is_that_of_either_metric_and_holds_what_was_measured(tmp_path, metric) -> None:
    arguments = BEST | {"load_best_model_at_end": True, "metric_for_best_model": metric, "save_total_limit": 1}
    best = run(tmp_path, eval_weights="both", **arguments).fit()
    state = best.session.trainer.state
    weights, average = best.ema.batches[state.best_global_step - 1]
    want = loss_of(best.net, average if metric == "loss" else weights, best.plan)
    assert state.best_metric == pytest.approx(want, rel=1e-4)
    assert not loops.differences(average, of_net(HOST.loadable(Path(state.best_model_checkpoint))))
    assert not loops.differences([weights, average], [best.weights, best.ema.average])


def test_evaluating_the_training_weights_too_does_not_change_what_training_draws(tmp_path) -> None:
    plan = Plan(evaluate=True, shuffle=True)
    one, both = (
        run(tmp_path / choice, plan=plan, net=net_of("noisy"), eval_weights=choice).fit()
        for choice in ("averaged", "both")
    )
    assert not loops.differences(one.ema.batches, both.ema.batches)


def test_steps_made_by_hand_after_training_do_not_count(tmp_path) -> None:
    ended = run(tmp_path).fit()
    for parameter in ended.net.parameters():
        parameter.grad = torch.ones_like(parameter)
    ended.session.trainer.optimizer.step()
    assert len(ended.ema.batches) == 18


def language_model() -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    )


def language_trainer(folder: Path, model: Any, ema: EMA, **arguments: Any) -> Any:
    tokens = torch.randint(11, (32, 8), generator=torch.Generator().manual_seed(0))
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(folder),
            max_steps=8,
            learning_rate=0.01,
            save_steps=4,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=(data := [{"input_ids": row, "labels": row} for row in tokens]),
        eval_dataset=data,
    )
    attach(ema, trainer)
    return trainer


def test_from_pretrained_loads_the_average_of_a_model_with_tied_weights(tmp_path) -> None:
    model, ema = language_model(), EMA("2ba")
    language_trainer(tmp_path, model, ema).train()
    training = loops.bits(model)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-8")
    assert not loops.differences(loops.averaged(ema), loops.bits(loaded))
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    resumed, again = language_model(), EMA("2ba")
    language_trainer(tmp_path / "again", resumed, again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert not loops.differences([training, ema.state_dict()], [loops.bits(resumed), again.state_dict()])


def adapted() -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1)
    return peft.get_peft_model(language_model(), config)


def test_the_best_adapters_are_loaded_with_their_training_weights_and_their_average(tmp_path) -> None:
    model, ema = adapted(), Watched("2ba")
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = language_trainer(tmp_path, model, ema, eval_strategy="steps", eval_steps=4, **best)
    trainer.train()
    assert trainer.state.best_global_step == 4
    weights, average = ema.batches[3]
    assert loops.differences(weights, ema.batches[-1][0])
    assert not loops.differences([weights, average], [of_net(loops.bits(model)), ema.average])


def test_adapters_alone_are_averaged_and_saved_as_adapters(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    model, ema = adapted(), EMA("2ba")
    language_trainer(tmp_path, model, ema).train()
    training, average = loops.bits(model), loops.averaged(ema)
    averaged = ema.state_dict()["ema_model"]
    assert averaged
    assert all("lora_" in name for name in averaged)
    loaded = peft.PeftModel.from_pretrained(language_model(), tmp_path / "checkpoint-8")
    found = loops.bits(loaded)
    assert not loops.differences({n: average[n] for n in averaged}, {n: found[n] for n in averaged})
    resumed, again = adapted(), EMA("2ba")
    language_trainer(tmp_path / "again", resumed, again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert not loops.differences([training, ema.state_dict()], [loops.bits(resumed), again.state_dict()])


def made_anew(folder: Path, algorithms: Any) -> Any:
    """Return a trainer that makes its model in each ``train``, as a search of hyperparameters does."""
    plan = Plan(epochs=1)
    trainer = transformers.Trainer(
        args=transformers.TrainingArguments(
            str(folder), num_train_epochs=1, per_device_train_batch_size=loops.BATCH, use_cpu=True, report_to="none",
            disable_tqdm=True, save_strategy="no",
        ),
        model_init=lambda: Classifier(net_of()),
        data_collator=collate,
        train_dataset=plan.data,
    )  # fmt: skip
    return trainer, attach(algorithms, trainer)


def test_each_model_that_the_trainer_makes_gets_its_own_average(tmp_path) -> None:
    trainer, attached = made_anew(tmp_path, lambda: Watched("4ba"))
    averages = []
    for _ in range(3):
        trainer.train()
        (ema,) = attached.algorithms
        assert len(ema.batches) == 6
        assert not loops.differences(ema.batches[-1][0], of_net(loops.bits(trainer.model)))
        averages.append(ema)
    assert len({id(ema) for ema in averages}) == 3


def test_one_algorithm_for_several_models_is_refused_with_the_remedy(tmp_path) -> None:
    trainer, _ = made_anew(tmp_path, EMA("4ba"))
    trainer.train()
    with pytest.raises(MismatchError, match=r"has made another.*model_init.*lambda: EMA\(\.\.\.\)"):
        trainer.train()


@pytest.mark.parametrize("weights", ["averaged", "both"])
def test_a_schedule_free_optimizer_changes_its_weights_before_the_average_is_swapped_in(tmp_path, weights) -> None:
    class ScheduleFree(torch.optim.SGD):
        evaluating = False

        def eval(self) -> None:
            self._set(evaluating=True)

        def train(self) -> None:
            self._set(evaluating=False)

        @torch.no_grad()
        def _set(self, *, evaluating: bool) -> None:
            if evaluating is not self.evaluating:
                self.evaluating = evaluating
                for parameter in self.param_groups[0]["params"]:
                    parameter.mul_(2.0 if evaluating else 0.5)

    net = loops.perceptron()
    model = Classifier(net)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            eval_strategy="steps",
            eval_steps=2,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
        ),
        data_collator=collate,
        train_dataset=loops.dataset(32),
        eval_dataset=loops.dataset(8),
        optimizers=(ScheduleFree(model.parameters(), lr=0.1), None),
    )
    attached = attach(EMA(decay=0.5), trainer, eval_weights=weights)
    trainer.train()  # an evaluation that changes the average is refused
    assert attached.num_updates == 6
