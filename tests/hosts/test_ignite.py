"""Ignite's engines, held to the contract, and what goes wrong there without care."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import loops
import pytest
import torch
from host_contract import HostContract, Plan, Probe, Session, Watched, loss_of, native, net_of, num_tokens
from torch import Tensor, nn
from torch.utils.data import DataLoader

from polyak import EMA, Event, PlanWarning, ProfileError
from polyak.averaging.swap import swap_of
from polyak.trainer.batches import num_samples

pytest.importorskip("ignite", minversion="0.5.5")

from ignite.engine import Engine, Events, create_supervised_evaluator, create_supervised_trainer
from ignite.engine.deterministic import DeterministicEngine
from ignite.handlers import Checkpoint, DiskSaver
from ignite.metrics import Loss

from polyak.hosts.ignite import Averaging

# Ignite's mixed precision asks for a GPU's, whatever the device.
pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla is imported")


class IgniteSession:
    def __init__(self, net: nn.Module, algorithm: EMA, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        optimizer, accumulate = plan.optimizer(net), plan.accumulate
        self.trainer = create_supervised_trainer(
            net,
            optimizer,
            nn.functional.cross_entropy,
            gradient_accumulation_steps=accumulate,
            amp_mode="amp" if plan.scaled else None,
            scaler=plan.scaler or False,
        )
        metrics = {"loss": Loss(nn.functional.cross_entropy)}
        self.evaluator = create_supervised_evaluator(net, metrics=metrics)
        self.predictor = create_supervised_evaluator(net)
        self.log: list[dict[str, float]] = []
        if plan.evaluate:
            self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self.evaluate)
            # As Ignite's loggers do.
            self.trainer.add_event_handler(
                Events.EPOCH_COMPLETED,
                lambda engine: self.log.append(engine.state.metrics | self.evaluator.state.metrics),
            )
        self.averaging = self.handle = Averaging(
            algorithm,
            self.trainer,
            net,
            optimizer,
            evaluators=[self.evaluator],
            predictors=[self.predictor],
            eval_weights=plan.eval_weights,
            gradient_accumulation_steps=accumulate,
            num_samples=num_samples if plan.counted else None,
            num_tokens=num_tokens if plan.counted else None,
        )
        self.objects = {"model": net, "optimizer": optimizer, "trainer": self.trainer, "averaging": self.averaging}
        self.saver = Checkpoint(self.objects, DiskSaver(folder, require_empty=False), n_saved=None)
        if plan.save_every:
            # At the end of an epoch, after its evaluation.
            every, save = plan.save_every * accumulate, self.averaging.saves(self.saver)
            self.trainer.add_event_handler(
                Events.ITERATION_COMPLETED(
                    event_filter=lambda _, step: step % every == 0 and step % (plan.steps * accumulate) != 0
                ),
                save,
            )
            self.trainer.add_event_handler(Events.EPOCH_COMPLETED, save)

    def fit(self, resume: Path | None = None) -> None:
        if resume:
            Checkpoint.load_objects(self.objects, torch.load(resume, weights_only=True))
        else:
            self.trainer.state.max_epochs = None  # from the beginning, also after a run that failed
        self.trainer.run(self.plan.loader, max_epochs=self.plan.epochs)

    def evaluate(self) -> None:
        self.evaluator.run(self.plan.eval_loader)

    def predict(self) -> None:
        self.predictor.run(self.plan.eval_loader)

    def save(self) -> Path:
        saver = Checkpoint(self.objects, DiskSaver(self.folder, require_empty=False), filename_prefix="by-hand")
        self.averaging.saves(saver)(self.trainer)
        return saver.last_checkpoint

    def logged(self, name: str) -> list[float]:
        return [line[name] for line in self.log]

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"checkpoint_{step * self.plan.accumulate}.pt"


class IgniteHost:
    lacks: Mapping[str, str] = {
        "mid-epoch": "Ignite resumes inside an epoch only with a loader that has a state, which torch's does not"
    }
    losses = "loss", "raw_loss"
    uncounted = ("sp", "tok", "sec", "iter")
    known_late = ()
    golden = """
        init fit_start
        epoch_start batch_end
        batch_end epoch_end eval_start eval_end save_start save_end
        epoch_start batch_end
        batch_end epoch_end eval_start eval_end save_start save_end
        fit_end
    """

    def session(self, net: nn.Module, algorithm: EMA, folder: Path, plan: Plan) -> Session:
        return IgniteSession(net, algorithm, folder, plan)

    def loadable(self, saved: Path) -> Mapping[str, Tensor]:
        net = net_of()
        Checkpoint.load_objects({"model": net}, saved)
        return net.state_dict()


HOST = IgniteHost()


class TestContract(HostContract):
    host = HOST


# What goes wrong in Ignite without care


def session(folder: Path, ema: EMA | None = None, plan: Plan | None = None, kind: str = "perceptron") -> Any:
    net = net_of(kind)
    made = IgniteSession(net, ema or Watched("4ba"), folder, plan or Plan(epochs=2))
    made.net, made.ema = net, made.averaging.algorithms[0]
    return made


def assert_training_weights(run: Any) -> None:
    assert swap_of(run.net) is None
    assert not loops.differences(run.ema.batches[-1][0], loops.bits(run.net))


@pytest.mark.parametrize("how", ["terminate", "terminate without COMPLETED", "interrupt", "swallowed"])
def test_an_evaluator_that_does_not_complete_restores_the_training_weights(tmp_path: Path, how: str) -> None:
    run = session(tmp_path)
    run.fit()
    lent = []

    def stop(engine: Engine) -> None:
        lent.append(swap_of(run.net) is not None)
        if how == "interrupt":
            engine.interrupt()
        elif how == "swallowed":
            raise RuntimeError("as planned")
        else:
            engine.terminate(skip_completed=how != "terminate")

    run.evaluator.add_event_handler(Events.ITERATION_COMPLETED(once=1), stop)
    if how == "swallowed":
        run.evaluator.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: None)
    run.evaluate()
    assert lent == [True]
    assert_training_weights(run)


@pytest.mark.parametrize("choice", [False, True], ids=["averaged", "both"])
@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_the_checkpoint_of_the_best_score_has_the_weights_that_were_scored(
    tmp_path: Path, before: bool, choice: bool
) -> None:
    run = session(tmp_path, plan=Plan(epochs=2, evaluate=True, choice=choice))
    scored: list[Any] = []
    handlers = [
        Checkpoint({"model": run.net}, DiskSaver(tmp_path), score_function=lambda engine: float(len(scored))),
        lambda engine: scored.append(loops.bits(run.net)),
    ]
    for handler in reversed(handlers) if before else handlers:
        run.evaluator.add_event_handler(Events.COMPLETED, handler)
    run.fit()
    saved = torch.load(handlers[0].last_checkpoint, weights_only=True)
    assert len(scored) == 2
    assert not loops.differences(scored[-1], saved)
    assert not loops.differences(run.ema.average, saved)
    assert_training_weights(run)


def test_a_run_that_was_interrupted_continues_and_counts_each_step_once(tmp_path: Path) -> None:
    run = session(tmp_path)
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=4), lambda engine: engine.interrupt())
    run.fit()
    assert len(run.ema.batches) == 4
    assert Event.FIT_END not in run.ema.events
    run.trainer.run(run.plan.loader, max_epochs=2)
    assert run.ema.events.count(Event.FIT_START) == run.ema.events.count(Event.FIT_END) == 1
    assert not loops.differences(native(run.plan, "4ba").batches, run.ema.batches)


def test_a_run_that_was_terminated_inside_an_epoch_begins_a_new_one(tmp_path: Path) -> None:
    run = session(tmp_path, Watched("1ep"), Plan(epochs=3))
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=9), lambda engine: engine.terminate())
    ends: list[int] = []
    run.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: ends.append(run.ema.num_updates))
    run.fit()
    run.trainer.run(run.plan.loader)
    now = run.averaging._loop.state.timestamp
    assert now.batch_in_epoch.value == 0
    assert (now.epoch.value, now.batch.value) == (3, 15)
    assert ends == [0, 1]


def test_an_exception_that_a_handler_swallows_leaves_training_weights_and_ends_the_run(tmp_path: Path) -> None:
    run = session(tmp_path)
    Probe(run.net).raises = ("train", 4, RuntimeError("as planned"))
    run.trainer.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: None)
    run.fit()
    assert run.ema.events[-1] is Event.FIT_END
    assert_training_weights(run)
    run.trainer.state.max_epochs = None
    seen = len(run.ema.batches)
    run.trainer.run(run.plan.loader, max_epochs=1)
    assert len(run.ema.batches) - seen == 6


def test_algorithms_get_an_event_for_an_exception_that_ends_the_run(tmp_path: Path) -> None:
    run = session(tmp_path)
    Probe(run.net).raises = ("train", 4, RuntimeError("as planned"))
    with pytest.raises(RuntimeError, match="as planned"):
        run.fit()
    assert run.ema.events[-1] is Event.EXCEPTION


def test_handlers_at_the_end_of_an_epoch_find_it_ended_in_whatever_order(tmp_path: Path) -> None:
    # IgniteSession evaluates at EPOCH_COMPLETED, and says so before there is an Averaging.
    run = session(tmp_path, Watched("1ep"), Plan(epochs=3, evaluate=True))
    probe = Probe(run.net)
    run.fit()
    assert not loops.differences([run.ema.average] * 2, probe.evaluated[-2:])


def test_a_checkpoint_of_training_weights_is_resumed_too(tmp_path: Path) -> None:
    whole, first, second = (session(tmp_path, plan=Plan(epochs=epochs)) for epochs in (3, 2, 3))
    whole.fit()
    first.fit()
    saver = Checkpoint(first.objects, DiskSaver(tmp_path, require_empty=False))
    saver(first.trainer)
    saved = torch.load(saver.last_checkpoint, weights_only=True)
    assert not loops.differences(loops.bits(first.net), saved["model"])
    second.fit(saver.last_checkpoint)
    assert not loops.differences(whole.ema.state_dict(), second.ema.state_dict())
    assert not loops.differences(loops.bits(whole.net), loops.bits(second.net))


@pytest.mark.parametrize("step", [6, 9])
def test_with_the_deterministic_engine_resuming_inside_an_epoch_is_exact(tmp_path: Path, step: int) -> None:
    def run(folder: str, resume: Path | None = None) -> Any:
        plan, net, ema = Plan(shuffle=True), net_of("noisy"), Watched("4ba")
        optimizer = plan.optimizer(net)
        trainer = create_supervised_trainer(net, optimizer, nn.functional.cross_entropy)
        trainer = DeterministicEngine(trainer._process_function)
        averaging = Averaging(ema, trainer, net, optimizer)
        objects = {"model": net, "optimizer": optimizer, "trainer": trainer, "averaging": averaging}
        saver = Checkpoint(objects, DiskSaver(tmp_path / folder, require_empty=False), n_saved=None)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3), averaging.saves(saver))
        if resume:
            # Ignite saves numpy's own objects with this engine.
            Checkpoint.load_objects(objects, torch.load(resume, weights_only=False))
        torch.manual_seed(3)
        trainer.run(plan.loader, max_epochs=3)
        return ema, net

    (whole, one), (resumed, other) = run("whole"), run("resumed", tmp_path / "whole" / f"checkpoint_{step}.pt")
    assert len(resumed.batches) == 18 - step
    assert not loops.differences(whole.state_dict(), resumed.state_dict())
    assert not loops.differences(loops.bits(one), loops.bits(other))


def test_the_averages_buffers_are_not_the_models(tmp_path: Path) -> None:
    # Ignite's own EMAHandler shares the trained model's buffers by default.
    run = session(tmp_path, kind="noisy")
    run.fit()
    own = {tensor.data_ptr() for tensor in run.net.buffers()}
    assert own.isdisjoint(tensor.data_ptr() for tensor in run.ema.ema_model.buffers())
    assert loops.differences(dict(run.net.named_buffers()), dict(run.ema.ema_model.named_buffers()))


def test_epochs_that_steps_do_not_divide_have_no_fraction(tmp_path: Path) -> None:
    run = session(tmp_path, Watched("1ep", update_interval="1ba"), Plan(epochs=1, steps=3, accumulate=2))
    loader = DataLoader(loops.dataset(5), batch_size=loops.BATCH)
    with pytest.raises(ProfileError, match="the loop must count ep"):
        run.trainer.run(loader, max_epochs=2)


def test_iterations_limit_a_run_in_steps(tmp_path: Path) -> None:
    run = session(tmp_path, Watched("0.5dur"), Plan(steps=4, accumulate=2))
    run.trainer.run(run.plan.loader, max_iters=12)
    assert run.averaging._loop.state.max_duration == "6ba"
    assert run.ema.events.count(Event.EPOCH_END) == 1


def test_with_both_handlers_find_the_metrics_of_both_and_stop_by_either(tmp_path: Path) -> None:
    run = session(tmp_path, plan=Plan(evaluate=True, choice=True))
    seen: list[tuple[float, float]] = []
    saver = Checkpoint(
        {"model": run.net}, DiskSaver(tmp_path), score_function=lambda engine: -engine.state.metrics["raw_loss"]
    )
    run.evaluator.add_event_handler(Events.COMPLETED, saver)
    run.evaluator.add_event_handler(
        Events.COMPLETED, lambda engine: seen.append((engine.state.metrics["raw_loss"], engine.state.metrics["loss"]))
    )
    run.fit()
    want = [[loss_of(run.net, tensors, run.plan) for tensors in run.ema.batches[step]] for step in (5, 11, 17)]
    assert [one for pair in seen for one in pair] == pytest.approx([one for pair in want for one in pair], rel=1e-4)
    assert_training_weights(run)


def test_a_pass_over_the_raw_weights_that_fails_leaves_the_evaluator_with_its_handlers(tmp_path: Path) -> None:
    run = session(tmp_path, plan=Plan(choice=True))
    run.fit()
    calls: list[Engine] = []
    run.evaluator.add_event_handler(Events.COMPLETED, calls.append)
    Probe(run.net).raises = ("eval", 0, RuntimeError("as planned"))
    with pytest.raises(RuntimeError, match="as planned"):
        run.evaluate()
    run.evaluate()
    assert len(calls) == 1
    assert_training_weights(run)


def test_a_second_average_of_the_same_run_is_noticed(tmp_path: Path) -> None:
    run = session(tmp_path, EMA("4ba"), plan=Plan(epochs=1))
    optimizer = run.objects["optimizer"]
    Averaging(EMA("4ba"), run.trainer, run.net, optimizer)
    with pytest.warns(PlanWarning, match="a model should have one average"):
        run.fit()


def test_evaluators_that_are_not_given_use_the_training_weights(tmp_path: Path) -> None:
    run = session(tmp_path)
    run.fit()
    probe, other = Probe(run.net), create_supervised_evaluator(run.net)
    other.run(run.plan.eval_loader)
    assert not loops.differences([run.ema.batches[-1][0]] * 2, probe.evaluated)


def test_two_averages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one average at a time"):
        session(tmp_path, [EMA(), EMA()])
